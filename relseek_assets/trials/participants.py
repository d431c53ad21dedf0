"""Who took part: one row a participant, covariates coarsened, treatments as levels whose first is the reference.

Here belong the questionnaire's answers and the codes they become. Outcomes do not, nor does the choice of rows that a model uses.
"""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd

from relseek_assets.trials.raw import TrialFault

PNTS = "Prefer not to say"
MAJOR_UNREGISTERED = (
    "I have major health issues or a major disability that significantly affects my day-to-day activities, but I am not registered disabled"
)


class ParticipantFault(TrialFault):
    """A participant table that cannot be read as one row a participant; the message names the column and the value."""


@dataclass(frozen=True)
class Coarsening:
    """A covariate made of a questionnaire item: `codes` maps its answers to `levels`, the first of which is the reference."""

    name: str
    item: str
    levels: tuple[str, ...]
    codes: dict[str, str]


COARSENINGS = (
    Coarsening(
        "gender_binary",
        "gender",
        ("Male", "Non-Male", PNTS),
        {"Male": "Male", "Female": "Non-Male", "Non-binary": "Non-Male", "Other": "Non-Male", PNTS: PNTS},
    ),
    Coarsening(
        "ethnicity_binary",
        "ethnicity",
        ("White", "Non-White", PNTS),
        {
            "White": "White",
            "Asian and Asian British": "Non-White",
            "Black, African, Caribbean or Black British": "Non-White",
            "Mixed and multiple ethnic groups": "Non-White",
            "Middle Eastern": "Non-White",
            "Hispanic": "Non-White",
            "Jewish": "Non-White",
            "Other": "Non-White",
            PNTS: PNTS,
        },
    ),
    Coarsening(
        "religion_binary",
        "religion",
        ("Non-Religious", "Religious", PNTS),
        {
            "No religion": "Non-Religious",
            **dict.fromkeys(("Buddhist", "Christian", "Hindu", "Jewish", "Muslim", "Sikh", "Spiritual", "Other"), "Religious"),
            PNTS: PNTS,
        },
    ),
    Coarsening(
        "disability_binary",
        "disability",
        ("No disability", "Has disability", PNTS),
        {
            "I do not have a disability": "No disability",
            "I have minor health issues or a mild disability": "Has disability",
            MAJOR_UNREGISTERED: "Has disability",
            "Yes, and I am registered disabled": "Has disability",
            PNTS: PNTS,
        },
    ),
    Coarsening(
        "income_binary",
        "income",
        ("High/Middle", "Low", PNTS),
        {
            **dict.fromkeys((">£100K", "£50-100K", "£30-50K"), "High/Middle"),
            **dict.fromkeys(("£20-30K", "£10-20K", "<£10k"), "Low"),
            PNTS: PNTS,
        },
    ),
    Coarsening(
        "ai_frequency_coarsened",
        "ai_frequency",
        ("Non-users", "Moderate", "Heavy", PNTS),
        {
            **dict.fromkeys(("I have never used a chatbot", "Less than once a year"), "Non-users"),
            **dict.fromkeys(("Once per month", "More than once a month"), "Moderate"),
            **dict.fromkeys(("Every week", "Every day"), "Heavy"),
            PNTS: PNTS,
        },
    ),
)
EDUCATION_YEARS = {
    "No qualifications": 10.0,
    "GCSEs or equivalent": 11.0,
    "Vocational qualifications": 12.0,
    "A levels or equivalent": 13.0,
    "Undergraduate degree or equivalent": 16.0,
    "Graduate study": 18.0,
}
CLUSTERS = ("Anthro Skeptic", "Anthro Enthusiast")

# A treatment that has its own column, and the two that are read off the dose λ; the reference level first.
STUDIES = ("cross_sectional", "longitudinal")
DOMAINS = ("polchat", "emotchat")
PERSONALISATION = ("non-personalised", "personalised")
CATEGORIES = ("neg_lambda", "zero_lambda", "pos_lambda")
DOSES = {-1.0: "neg1", -0.5: "neg0.5", 0.0: "zero", 0.5: "pos0.5", 1.0: "pos1"}
TREATMENTS = ("personalisation", "domain", "relationship_seeking_category", "lambda_factor")

ASSIGNED = ("ppt_id", "study", "multiplier", "domain", "personalisation")
CARRIED = ("age", "mas_score", "gcs_score", "charity_amount_gbp")
DROPOUT = ("pre_treatment_dropout", "post_treatment_dropout")
FACTOR_SCORES = ("pre_psychosocial_F1", "pre_psychosocial_F2", "post_psychosocial_F1", "post_psychosocial_F2")


def participants(
    sociodemographics: pd.DataFrame,
    metadata_with_dropout: pd.DataFrame,
    *,
    types: pd.DataFrame | None = None,
    factors: pd.DataFrame | None = None,
) -> pd.DataFrame:
    """The merged participant table (spec section 1): one row a participant of `sociodemographics`, in its order.

    Columns: `ASSIGNED`, `relationship_seeking_category` and `lambda_factor`, `CARRIED`, a categorical for each of `COARSENINGS`, `education_years`
    (years; "Prefer not to say" has the median of all rows), `DROPOUT`; with `types` also `cluster_name` and `factor_1_score`; with `factors` also
    `FACTOR_SCORES`, missing where the file has none.

    Raises:
        ParticipantFault: two rows of one participant, an unknown answer, a participant without a row in `metadata_with_dropout`, or one whom the
            two tables assign to different arms.
    """
    for name, table in (("sociodemographics", sociodemographics), ("metadata_with_dropout", metadata_with_dropout)):
        _one_row_each(table, name)
    table = sociodemographics[[*ASSIGNED, *CARRIED]].reset_index(drop=True)
    table = table.astype(dict.fromkeys(("multiplier", *CARRIED), float))
    for coarsening in COARSENINGS:
        table[coarsening.name] = _coarsened(sociodemographics[coarsening.item].reset_index(drop=True), coarsening)
    table["education_years"] = _education_years(sociodemographics["education"].reset_index(drop=True))
    table = _with_dropout(table, metadata_with_dropout)
    if types is not None:
        _one_row_each(types, "pre_treatment_preference_types")
        table = table.merge(types[["ppt_id", "cluster_name", "factor_1_score"]], on="ppt_id", how="left")
        table["cluster_name"] = _levels(table["cluster_name"], CLUSTERS)
    if factors is not None:
        _one_row_each(factors, "psychosocial_factors")
        table = table.merge(factors.reindex(columns=["ppt_id", *FACTOR_SCORES]), on="ppt_id", how="left")
    return treatment_columns(table)


def treatment_columns(frame: pd.DataFrame) -> pd.DataFrame:
    """`frame` with its treatments as categoricals whose first level is the reference (spec section 1).

    Reads `multiplier` (λ: -1, -0.5, 0, 0.5, 1) and, where they are there, `study`, `domain` and `personalisation`. Adds
    `relationship_seeking_category` (neg_lambda, zero_lambda, pos_lambda) and `lambda_factor` (neg1 to pos1).

    Raises:
        ParticipantFault: a dose or level that the trial does not have.
    """
    frame = frame.copy()
    for column, levels in (("study", STUDIES), ("domain", DOMAINS), ("personalisation", PERSONALISATION)):
        if column in frame:
            frame[column] = _levels(frame[column], levels)
    multiplier = frame["multiplier"].astype(float)
    unknown = multiplier.notna() & ~multiplier.isin(list(DOSES))
    if unknown.any():
        raise ParticipantFault(f"multiplier: {multiplier[unknown].iloc[0]} is no dose of the trial; its doses are {', '.join(map(str, DOSES))}")
    frame["relationship_seeking_category"] = pd.cut(multiplier, [-2, -0.25, 0.25, 2], labels=list(CATEGORIES), ordered=False)
    frame["lambda_factor"] = _levels(multiplier.map(DOSES).rename("lambda_factor"), tuple(DOSES.values()))
    return frame


def _one_row_each(table: pd.DataFrame, name: str) -> None:
    repeated = table["ppt_id"][table["ppt_id"].duplicated()]
    if len(repeated):
        raise ParticipantFault(f"{name}: ppt_id {repeated.iloc[0]} has more than one row; keep one row a participant")


def _unknown(values: pd.Series, known: object) -> None:
    value = values.iloc[0]
    raise ParticipantFault(f"{values.name}: unknown answer {value!r}; correct the file, or give it a code beside {known}")


def _levels(values: pd.Series, levels: tuple[str, ...]) -> pd.Series:
    unknown = values.notna() & ~values.isin(levels)
    if unknown.any():
        _unknown(values[unknown], levels)
    return pd.Series(pd.Categorical(values.astype(object).where(values.notna(), None), categories=list(levels)), index=values.index, name=values.name)


def _coarsened(answers: pd.Series, coarsening: Coarsening) -> pd.Series:
    unknown = answers.notna() & ~answers.isin(list(coarsening.codes))
    if unknown.any():
        _unknown(answers[unknown], f"the codes of {coarsening.name}")
    return _levels(answers.map(coarsening.codes), coarsening.levels)


def _education_years(answers: pd.Series) -> pd.Series:
    unknown = answers.notna() & ~answers.isin([*EDUCATION_YEARS, PNTS])
    if unknown.any():
        _unknown(answers[unknown], "EDUCATION_YEARS")
    years = answers.map(EDUCATION_YEARS).astype(float)
    # Over all rows, before any analysis chooses its own: that is where the published value comes from.
    return years.mask(answers == PNTS, years.median())


def _with_dropout(table: pd.DataFrame, metadata: pd.DataFrame) -> pd.DataFrame:
    found = table[["ppt_id"]].merge(metadata, on="ppt_id", how="left", indicator=True)
    if (found["_merge"] == "left_only").any():
        raise ParticipantFault(f"metadata_with_dropout: no row for ppt_id {found['ppt_id'][found['_merge'] == 'left_only'].iloc[0]}; add it")
    for column in ASSIGNED[1:]:
        differs = found[column].astype(object) != table[column].astype(object)
        if differs.any():
            who = found["ppt_id"][differs].iloc[0]
            raise ParticipantFault(f"{column}: sociodemographics and metadata_with_dropout disagree on ppt_id {who}; correct one of them")
    for column in DROPOUT:
        unknown = ~found[column].isin([True, False])
        if unknown.any():
            raise ParticipantFault(f"{column}: {found[column][unknown].iloc[0]!r} for ppt_id {found['ppt_id'][unknown].iloc[0]}; it is true or false")
        table[column] = found[column].astype(bool)
    return table
