"""Participants' scores on factors of questionnaires, and types of participants: psychosocial factors and pre-treatment types.

Here belong the questionnaires (their items and how answers are coded), what missing answers count as, and how the scores before and
after treatment share one scale. The arithmetic of factors is in factor_analysis.py; regressions on the scores are elsewhere.
Source: human_study.md, sections 11 and 12.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
from sklearn.cluster import KMeans
from sklearn.metrics import calinski_harabasz_score, silhouette_score

from relseek_assets.trials import factor_analysis
from relseek_assets.trials.factor_analysis import FactorFit
from relseek_assets.trials.raw import TrialFault

PSYCHOSOCIAL_FILE = "psychosocial.jsonl"
ATTITUDES_FILE = "anthro_attitudes.jsonl"


class QuestionnaireError(TrialFault):
    """A questionnaire's table lacks a column or holds an answer that its coding does not know."""


@dataclass(frozen=True)
class Scale:
    """One instrument: its item columns and how answers become numbers, higher meaning better off.

    Numbers from `low` to `high` stand for themselves; `answers` codes answers in words, and `no_answer` are words that count as
    missing. Items in `reversed_items` become low + high - answer.
    """

    name: str
    items: tuple[str, ...]
    low: int
    high: int
    reversed_items: frozenset[str] = frozenset()
    answers: Mapping[str, int] = field(default_factory=dict)
    no_answer: frozenset[str] = frozenset()


def _items(prefix: str, count: int) -> tuple[str, ...]:
    return tuple(f"{prefix}_{number}" for number in range(1, count + 1))


#: The 23 items. The release leaves the raw file out: column names are assumed, `{scale}_{number}` in the instruments' own order.
SCALES = (
    Scale("who", _items("who", 5), 0, 5),
    # ULS-8: items 3 and 6 are worded positively.
    Scale("ucla", _items("ucla", 8), 1, 4, frozenset(f"ucla_{number}" for number in (1, 2, 4, 5, 7, 8))),
    Scale("phq_gad", _items("phq_gad", 4), 0, 3, frozenset(_items("phq_gad", 4))),
    Scale(
        "lubben",
        _items("lubben", 6),
        1,
        5,
        answers={"One": 1, "Two": 2, "Three or four": 3, "Five thru eight": 4, "Five through eight": 4, "Five to eight": 4, "Nine or more": 5},
        # The published coding knew no number for nobody at all, so these answers count as missing (section 12).
        no_answer=frozenset({"None"}),
    ),
)
PSYCHOSOCIAL_FACTORS = 2

PREFERENCE_ITEMS = (
    "cold_warm",
    "impersonal_personal",
    "insensitive_sensitive",
    "personalisation_agreement",
    "robot_human",
    "tool_friend",
    "unsociable_sociable",
)
SEEKING_ITEM = "seeking_companionship_likelihood"
ATTITUDE_COUNT = 12
#: Reversed, so that higher means that the assistant is to be treated like a person, as in the other sliders.
RUDE_ITEM = "rude_to_ai"
CLUSTERS = range(2, 8)
#: Names of two types in the order of their mean answer.
TYPE_NAMES = ("Anthro Skeptic", "Anthro Enthusiast")


@dataclass(frozen=True)
class PsychosocialFactors:
    """`scores`: ppt_id, study, {pre,post}_psychosocial_F1, F2 (NaN where a participant did not answer); `loadings`: item, F1, F2;

    `factor_correlations` (2, 2) and `variance` (2), shares of the items' variance; `fit`; factors by parallel analysis and by the
    very simple structure criterion of complexity 1 and 2; `missing_share` of answers before treatment.
    """

    scores: pd.DataFrame
    loadings: pd.DataFrame
    factor_correlations: np.ndarray
    variance: np.ndarray
    fit: FactorFit
    parallel_factors: int
    simple_structure_factors: tuple[int, int]
    missing_share: float


@dataclass(frozen=True)
class PreTreatmentTypes:
    """`types`: ppt_id, study, cluster_name, factor_1_score, ...; `loadings`: item, factor_1, ...; `variance` by factor;

    `clusterings`: k, silhouette, calinski_harabasz, chosen.
    """

    types: pd.DataFrame
    loadings: pd.DataFrame
    variance: np.ndarray
    clusterings: pd.DataFrame


def code_answers(answers: pd.DataFrame, scales: Sequence[Scale], file: str) -> pd.DataFrame:
    """Coded items, one float column an item, NaN where there is no answer.

    Raises QuestionnaireError naming the column that `file` lacks or the answer that its scale does not know.
    """
    names = [item for scale in scales for item in scale.items]
    _require(answers, names, file)
    return pd.DataFrame({item: _coded(answers[item], scale, file) for scale in scales for item in scale.items}, index=answers.index)


def _coded(column: pd.Series, scale: Scale, file: str) -> pd.Series:
    words = column.astype(object)
    words = words.where(words.notna(), None)
    numbers = pd.to_numeric(words, errors="coerce").astype(float)
    in_words = words.map(lambda answer: scale.answers.get(answer, np.nan)).astype(float)
    values = numbers.where(numbers.between(scale.low, scale.high), in_words)
    known = values.notna() | words.isna() | words.isin(scale.no_answer)
    if not known.all():
        raise QuestionnaireError(
            f"{file}: {column.name} holds {words[~known].iloc[0]!r}; {scale.name} takes {scale.low} to {scale.high}"
            + (f" or one of {sorted({*scale.answers, *scale.no_answer})}" if scale.answers else "")
        )
    return scale.low + scale.high - values if column.name in scale.reversed_items else values


def _require(table: pd.DataFrame, columns: Sequence[str], file: str) -> None:
    missing = [column for column in columns if column not in table]
    if missing:
        raise QuestionnaireError(f"{file} has no column {missing[0]!r} ({len(missing)} of {len(columns)} missing; it has {list(table.columns)})")


def _one_row_each(table: pd.DataFrame, file: str) -> pd.DataFrame:
    repeated = table["ppt_id"][table["ppt_id"].duplicated()]
    if len(repeated):
        raise QuestionnaireError(f"{file}: ppt_id {repeated.iloc[0]!r} has more than one row at the same timepoint")
    return table.set_index("ppt_id")


def psychosocial_factors(psychosocial: pd.DataFrame, *, scales: Sequence[Scale] = SCALES, seed: int = 0) -> PsychosocialFactors:
    """Two oblique factors of well-being and loneliness, extracted before treatment and scored before and after.

    `psychosocial` has ppt_id, study, timepoint (pre, post) and the items of `scales`. ULS of polychoric correlations, quartimin,
    ten Berge scores. Means and standard deviations before treatment also standardise the answers after it, where missing answers
    count as the mean; scored are those who answered before treatment. `seed` is that of the parallel analysis.
    Source: human_study.md, section 12.
    """
    _require(psychosocial, ["ppt_id", "study", "timepoint"], PSYCHOSOCIAL_FILE)
    coded = code_answers(psychosocial, scales, PSYCHOSOCIAL_FILE)
    pre, post = (_one_row_each(psychosocial[psychosocial["timepoint"] == time], PSYCHOSOCIAL_FILE) for time in ("pre", "post"))
    items, later = (coded[psychosocial["timepoint"] == time].to_numpy() for time in ("pre", "post"))
    correlation = factor_analysis.polychoric(items)
    factors = factor_analysis.factor_analysis(correlation, PSYCHOSOCIAL_FACTORS, "quartimin")

    means = np.nanmean(items, axis=0)
    filled = np.where(np.isnan(items), means, items)
    deviations = filled.std(0, ddof=1)
    weights = factor_analysis.ten_berge_weights(np.corrcoef(filled, rowvar=False), factors)
    names = [f"psychosocial_F{number + 1}" for number in range(PSYCHOSOCIAL_FACTORS)]
    columns: dict[str, pd.Series] = {}
    for time, table, values in (("pre", pre, items), ("post", post, later)):
        scores = np.where(np.isnan(values), 0.0, (values - means) / deviations) @ weights
        columns |= {f"{time}_{name}": pd.Series(scores[:, number], index=table.index).reindex(pre.index) for number, name in enumerate(names)}
    scores = pd.DataFrame({"study": pre["study"], **columns}).rename_axis("ppt_id").reset_index()
    return PsychosocialFactors(
        scores=scores,
        loadings=pd.DataFrame({"item": coded.columns, **{f"F{k + 1}": factors.loadings[:, k] for k in range(PSYCHOSOCIAL_FACTORS)}}),
        factor_correlations=factors.correlations,
        variance=factors.variance,
        fit=factor_analysis.factor_fit(correlation, factors, len(items)),
        parallel_factors=factor_analysis.parallel_analysis(correlation, len(items), seed=seed),
        simple_structure_factors=(
            factor_analysis.very_simple_structure(correlation, 1),
            factor_analysis.very_simple_structure(correlation, 2),
        ),
        missing_share=float(np.isnan(items).mean()),
    )


def pre_treatment_types(anthro_attitudes: pd.DataFrame, stated_preferences: pd.DataFrame, seeking_companionship: pd.DataFrame) -> PreTreatmentTypes:
    """Types of participants by k-means, and varimax factors, of 20 answers before treatment.

    Twelve attitude sliders, 0 to 100, are the columns of `anthro_attitudes` with a colon in the name (`category:name`, an assumption: the release
    leaves the file out), one of which ends in `rude_to_ai`; then the seven stated preferences and the likelihood of seeking
    companionship, which only the longitudinal study asked before treatment. Missing answers count as the item's mean.
    Source: human_study.md, section 11.
    """
    answers, study = _pre_treatment_answers(anthro_attitudes, stated_preferences, seeking_companionship)
    filled = answers.fillna(answers.mean())
    standardised = ((filled - filled.mean()) / filled.std(ddof=0)).to_numpy()
    labels, clusterings = _clusters(standardised)
    correlation = np.corrcoef(standardised, rowvar=False)
    count = int((np.linalg.eigvalsh(correlation) > 1).sum())
    factors = factor_analysis.factor_analysis(correlation, count, "varimax")
    scores = standardised @ factor_analysis.regression_weights(correlation, factors)
    names = [f"factor_{number + 1}" for number in range(count)]
    types = pd.DataFrame({"ppt_id": answers.index, "study": study.to_numpy(), "cluster_name": _named(labels)})
    return PreTreatmentTypes(
        types=types.assign(**{f"{name}_score": scores[:, number] for number, name in enumerate(names)}),
        loadings=pd.DataFrame({"item": answers.columns, **{name: factors.loadings[:, number] for number, name in enumerate(names)}}),
        variance=factors.variance,
        clusterings=clusterings,
    )


def _pre_treatment_answers(attitudes: pd.DataFrame, preferences: pd.DataFrame, seeking: pd.DataFrame) -> tuple[pd.DataFrame, pd.Series]:
    """The 20 answers by participant, NaN where missing, and the participants' study."""
    sliders = [column for column in attitudes.columns if ":" in column]
    rude = [column for column in sliders if column.endswith(f":{RUDE_ITEM}")]
    if len(sliders) != ATTITUDE_COUNT or len(rude) != 1:
        raise QuestionnaireError(
            f"{ATTITUDES_FILE} needs {ATTITUDE_COUNT} slider columns named category:item, one of them ending in ':{RUDE_ITEM}'; it has {sliders}"
        )
    _require(attitudes, ["ppt_id", "study"], ATTITUDES_FILE)
    _require(preferences, ["ppt_id", *PREFERENCE_ITEMS], "stated-preferences.jsonl")
    _require(seeking, ["ppt_id", "timepoint", SEEKING_ITEM], "seeking-companionship.jsonl")
    people = _one_row_each(attitudes, ATTITUDES_FILE)
    answers = people[sliders].astype(float)
    answers[rude[0]] = 100 - answers[rude[0]]
    answers = answers.rename(columns={rude[0]: rude[0].replace(RUDE_ITEM, "polite_to_ai")})
    asked = _one_row_each(seeking[seeking["timepoint"] == "pre"], "seeking-companionship.jsonl")
    answers = answers.join(_one_row_each(preferences, "stated-preferences.jsonl")[list(PREFERENCE_ITEMS)].astype(float))
    answers = answers.join(asked[[SEEKING_ITEM]].astype(float))
    empty = answers.columns[answers.notna().sum() < 2]
    if len(empty):
        raise QuestionnaireError(f"{empty[0]} has no answers for the participants of {ATTITUDES_FILE}; are their ppt_id the same?")
    return answers, people["study"]


def _clusters(standardised: np.ndarray) -> tuple[np.ndarray, pd.DataFrame]:
    """Labels of the clustering with the largest silhouette, 0 being the cluster with the lowest mean, and the table of all."""
    fits = {k: KMeans(n_clusters=k, n_init=10, random_state=42).fit_predict(standardised) for k in CLUSTERS}
    table = pd.DataFrame(
        {
            "k": k,
            "silhouette": float(silhouette_score(standardised, labels)),
            "calinski_harabasz": float(calinski_harabasz_score(standardised, labels)),
        }
        for k, labels in fits.items()
    )
    best = int(table.loc[table["silhouette"].idxmax(), "k"])
    means = [standardised[fits[best] == label].mean() for label in range(best)]
    return np.argsort(np.argsort(means))[fits[best]], table.assign(chosen=table["k"] == best)


def _named(labels: np.ndarray) -> list[str]:
    names = TYPE_NAMES if labels.max() == 1 else [f"Type {number + 1}" for number in range(labels.max() + 1)]
    return [names[label] for label in labels]
