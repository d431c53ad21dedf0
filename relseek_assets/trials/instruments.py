"""The analyses of the published instruments as tables of one shape: which parts each has, which raw tables a part reads, what its rows are called.

Here belongs turning the results of the analyses into rows, also where a table is absent or at fault. The analyses themselves belong in
`secondary_outcomes.py`, `profiles.py`, `vulnerability.py`, `attrition.py`, `psychometrics.py`, `topics.py`, `calibration.py`, `rankings.py` and
`frontier.py`; the figures in `relseek_assets/instrument_figures.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from relseek_assets import instrument_figures
from relseek_assets.trial import Trial
from relseek_assets.trials import (
    attrition,
    calibration,
    comparisons,
    frontier,
    profiles,
    psychometrics,
    rankings,
    secondary_outcomes,
    topics,
    vulnerability,
)
from relseek_assets.trials.exact import benjamini_hochberg
from relseek_assets.trials.participants import CATEGORIES, CLUSTERS, STUDIES, treatment_columns
from relseek_assets.trials.parts import PEOPLE, Begun, Inputs, Part, Tables, mean_of, objects, rows_of, shares_of, text_of


@dataclass(frozen=True)
class Instrument:
    """A published instrument as an asset: the raw tables that it reads, its parts and what is done to their rows in the end, its figures as base64
    PNG, and a stated time in seconds.
    """

    name: str
    description: str
    tables: tuple[str, ...]
    parts: tuple[Part, ...]
    figures: Callable[[pd.DataFrame, Trial], dict[str, str]]
    seconds: float
    finish: Callable[[pd.DataFrame], pd.DataFrame] = lambda rows: rows

    def begin(self, tables: Tables, people: pd.DataFrame | None) -> Begun:
        return Begun(self.parts, tables, people)

    def table(self, trial: Trial, begun: Begun) -> pd.DataFrame:
        """The rows of what was begun, with the files that the trial declares in the place of the names of absent tables."""
        found = self.finish(begun.rows())
        return found.assign(note=objects(_with_files(note, trial) for note in found["note"]))


def _with_files(note: str | None, trial: Trial) -> str | None:
    if note is None or not note.startswith("absent: "):
        return note
    names = note.removeprefix("absent: ").split(", ")
    files = [trial.tables[name].file if name in trial.tables else f"{name} (no table of the study file)" for name in names if name != PEOPLE]
    return "absent: " + ", ".join([*files, *(["the table of participants"] if PEOPLE in names else [])])


# --- comparisons ------------------------------------------------------------------------------------------------------

TWO_SAMPLE_DETAILS = ("group1", "group2", "n1", "n2", "mean1", "mean2", "sd1", "sd2", "clusters")
CHI_SQUARED = {
    "goodbye": ("goodbye_action", "goodbye_feeling_recoded"),
    "seeking_companionship": ("change_recoded", "change_recoded_all_answers"),
    "sentience_measures": ("change_sentience_recoded",),
}
SCALES = ("phq_gad_score", "ucla_score", "lubben_score", "who_score")
FACTORS = ("psychosocial_F1", "psychosocial_F2")


def _goodbye_by_dose(inputs: Inputs) -> pd.DataFrame:
    means, ratios = secondary_outcomes.goodbye_by_dose(inputs["goodbye"])
    shared = {"grouping": "lambda_factor", "outcome": "goodbye_action"}
    return pd.concat(
        [
            rows_of("goodbye by dose", means.assign(term=means["lambda_factor"], **shared), ["log_odds"]),
            rows_of("goodbye odds ratios", ratios.assign(term=ratios["contrast"], **shared), ["log_odds"]),
        ]
    )


def _chi_squared(source: str, inputs: Inputs) -> pd.DataFrame:
    data = secondary_outcomes.recoded(inputs[source])
    tables = []
    for outcome in CHI_SQUARED[source]:
        tests = comparisons.treatment_tests(data, outcome)
        study = tests["scope"].where(tests["scope"] != "cross_study", None)
        tables.append(rows_of("chi-squared", tests.assign(study=study, grouping=tests["treatment"], term="association"), ["min_expected"]))
        for scope, treatment in zip(tests["scope"], tests["treatment"], strict=True):
            members = data if scope == "cross_study" else data[data["study"] == scope]
            tables.append(_answers(comparisons.breakdown(members, outcome, treatment), None if scope == "cross_study" else scope))
    return pd.concat(tables)


def _answers(counts: pd.DataFrame, study: str | None) -> pd.DataFrame:
    """Shares of a group's participants who gave an answer; study: theirs, None where the groups are the studies."""
    asked = counts.groupby("group")["n"].transform("sum")
    rows = []
    for row, share in zip(counts.to_dict("records"), shares_of(counts["n"], asked), strict=True):
        group, level = row["group"], text_of(row["level"])
        within = {"study": group, "term": level} if study is None else {"study": study, "term": f"{group}: {level}"}
        key = {**within, "grouping": row["treatment"], "outcome": row["outcome"]}
        details = {"group": group, "level": level, "count": row["n"], "percentage": row["percentage"]}
        rows.append({**key, **share, "details": details})
    return rows_of("answers", rows)


def _companionship_users(inputs: Inputs) -> pd.DataFrame:
    found = secondary_outcomes.companionship_users(inputs["seeking_companionship"], inputs.people)
    return rows_of("companionship users", found.assign(study="longitudinal", outcome="companionship_user"))


def _between(part: str, tests: pd.DataFrame) -> pd.DataFrame:
    """Rows of two-sample tests; the tests of rows that depend on each other are a part of their own."""
    scope = tests["scope"].str.split(" ", n=1, expand=True).reindex(columns=[0, 1])
    grouping = tests["treatment"] + scope[1].map(lambda level: f" within {level}", na_action="ignore").fillna("")
    clustered = tests["method"].str.startswith("CR2")
    found = tests.assign(study=scope[0], grouping=grouping, term=tests["group1"] + " - " + tests["group2"])
    parts = [(part, ~clustered), (f"{part}, clustered", clustered)]
    return pd.concat([rows_of(name, found[chosen], TWO_SAMPLE_DETAILS) for name, chosen in parts if chosen.any()])


def _changes(part: str, tests: pd.DataFrame) -> pd.DataFrame:
    scope = tests["scope"].str.split(" ", n=1, expand=True).reindex(columns=[0, 1])
    return rows_of(part, tests.assign(study=scope[0], grouping=scope[1], term="mean"), ["mean", "sd"])


def _relational(inputs: Inputs) -> pd.DataFrame:
    return _between("relational between arms", secondary_outcomes.relational_tests(inputs["relational"]))


def _competency(inputs: Inputs) -> pd.DataFrame:
    changed, between = secondary_outcomes.competency_tests(secondary_outcomes.competency_scores(inputs["domain_competency"]))
    return pd.concat([_changes("competency changes", changed), _between("competency between arms", between)])


def _closeness(inputs: Inputs) -> pd.DataFrame:
    changed, between = secondary_outcomes.closeness_change(inputs["relational"])
    return pd.concat([_changes("closeness changes", changed), _between("closeness changes between arms", between)])


def _cross_study_change(people: pd.DataFrame, outcomes: Sequence[str]) -> pd.DataFrame:
    found = secondary_outcomes.cross_study_change(people, {name: (f"pre_{name}", f"post_{name}") for name in outcomes})
    return rows_of("cross-study change", found.assign(grouping=found["model"]))


def _cross_study_factors(inputs: Inputs) -> pd.DataFrame:
    return _cross_study_change(inputs.people, FACTORS)


def _cross_study_scales(inputs: Inputs) -> pd.DataFrame:
    asked = inputs["psychosocial"]
    wide = asked.pivot(index="ppt_id", columns="timepoint", values=list(SCALES))
    wide.columns = pd.Index([f"{time}_{scale}" for scale, time in wide.columns])
    arms = treatment_columns(asked.drop_duplicates("ppt_id"))[["ppt_id", "study", "domain"]]
    return _cross_study_change(arms.join(wide, on="ppt_id"), SCALES)


def _cross_study_goodbye(inputs: Inputs) -> pd.DataFrame:
    return rows_of("cross-study goodbye", secondary_outcomes.cross_study_goodbye(inputs["goodbye"]).assign(grouping="study"))


COMPARISONS = (
    Part("goodbye by dose", ("goodbye",), _goodbye_by_dose),
    *(Part("chi-squared", (source,), partial(_chi_squared, source), outcomes[0]) for source, outcomes in CHI_SQUARED.items()),
    Part("companionship users", ("seeking_companionship", PEOPLE), _companionship_users),
    Part("relational between arms", ("relational",), _relational),
    Part("closeness changes", ("relational",), _closeness),
    Part("competency changes", ("domain_competency",), _competency),
    Part("cross-study change", (PEOPLE,), _cross_study_factors, FACTORS[0]),
    Part("cross-study change", ("psychosocial",), _cross_study_scales, SCALES[0]),
    Part("cross-study goodbye", ("goodbye",), _cross_study_goodbye),
)


# --- profiles ---------------------------------------------------------------------------------------------------------

BINS = 24  # of either axis of a density


def _change_summary(outcome: str, slopes: pd.Series, arms: pd.DataFrame) -> pd.DataFrame:
    """Distribution of participants' slopes, of everyone and by category of the dose."""
    category = slopes.index.to_series().map(treatment_columns(arms.drop_duplicates("ppt_id")).set_index("ppt_id")["relationship_seeking_category"])
    rows = [{"term": "everyone", **mean_of(slopes)}]
    rows += [{"term": level, **mean_of(slopes[category == level])} for level in CATEGORIES if (category == level).any()]
    return rows_of("slopes", [{"study": "longitudinal", "outcome": outcome, **row} for row in rows])


def _liking(inputs: Inputs) -> pd.DataFrame:
    return _change_summary("liking", inputs.liking, inputs["preferences"])


def _wanting(name: str, table: str, inputs: Inputs) -> pd.DataFrame:
    return _change_summary(name, inputs.wanting[name], inputs[table])


def _profile_sizes(wanting: str, inputs: Inputs) -> pd.DataFrame:
    found = inputs.profiles[wanting]
    counts = found["behaviour_category"].value_counts().reindex(profiles.CATEGORIES, fill_value=0)
    rows = [
        {"study": "longitudinal", "outcome": wanting, "term": category, **share, "details": {"count": int(counts[category])}}
        for category, share in zip(counts.index, shares_of(counts, [len(found)] * len(counts)), strict=True)
    ]
    return rows_of("profile sizes", rows)


def _profile_comparisons(wanting: str, table: str, inputs: Inputs) -> pd.DataFrame:
    found = profiles.compare_profiles(inputs.profiles[wanting], inputs[table], wanting=wanting)
    found = found.assign(study="longitudinal", grouping=found["comparison"], outcome=wanting, term=found["test"])
    harm = found[found["term"] == "harm"].set_index("grouping")["estimate"]
    risks = found["term"] == "risk_difference"
    details = [{"nnh": harm[grouping]} if risk else None for grouping, risk in zip(found["grouping"], risks, strict=True)]
    return rows_of("profile comparisons", found.assign(details=pd.Series(details, dtype=object)))


def _profile_outcomes(inputs: Inputs) -> pd.DataFrame:
    found = profiles.profile_outcomes(inputs.profiles["separation_distress"], inputs.last)
    found = found.assign(study="longitudinal", grouping=found["behaviour_category"], outcome=found["measure"], term="mean", method="mean")
    return rows_of("profile outcomes", found, ["sd"])


def _predictions(inputs: Inputs) -> pd.DataFrame:
    tables = []
    for outcome, predict in (
        ("seeking_companionship_likelihood", profiles.distress_predicts_seeking),
        ("goodbye_action", profiles.distress_predicts_goodbye),
    ):
        found = predict(inputs.last)
        tables.append(rows_of("distress predicts", found.assign(study="longitudinal", grouping=found["analysis"], outcome=outcome)))
    return pd.concat(tables)


def _slope_density(inputs: Inputs) -> pd.DataFrame:
    """Participants by liking and wanting slope, in squares, by category of the dose; no participant's own slopes."""
    found = inputs.profiles["separation_distress"]
    arms = treatment_columns(inputs["attachment"].drop_duplicates("ppt_id"))[["ppt_id", "relationship_seeking_category"]]
    members = found.merge(arms, on="ppt_id", how="inner")
    pair = ["liking_slope_weekly", "wanting_slope"]
    edges = [np.linspace(*_around_zero(members[name]), BINS + 1) for name in pair]
    rows = []
    for level in CATEGORIES:
        slopes = members.loc[members["relationship_seeking_category"] == level, pair].to_numpy()
        counts = np.histogram2d(slopes[:, 0], slopes[:, 1], bins=edges)[0].astype(int)
        details = {"liking_edges": edges[0], "wanting_edges": edges[1], "counts": counts, "means": slopes.mean(axis=0) if len(slopes) else [None] * 2}
        rows.append({"study": "longitudinal", "grouping": level, "outcome": "separation_distress", "n": len(slopes), "details": details})
    return rows_of("slope density", rows)


def _around_zero(slopes: pd.Series) -> tuple[float, float]:
    """Limits with zero in the middle, so that a square lies in one quadrant."""
    reach = float(slopes.abs().max()) or 1.0
    return -reach, reach


WANTING = {"separation_distress": "attachment", "seeking_companionship": "seeking_companionship"}
PROFILES = (
    Part("slopes", ("preferences",), _liking, "liking"),
    *(Part("slopes", (table,), partial(_wanting, name, table), name) for name, table in WANTING.items()),
    *(Part("profile sizes", ("preferences", table), partial(_profile_sizes, name), name) for name, table in WANTING.items()),
    *(Part("profile comparisons", ("preferences", table), partial(_profile_comparisons, name, table), name) for name, table in WANTING.items()),
    Part("profile outcomes", ("preferences", "attachment", "seeking_companionship", "goodbye"), _profile_outcomes),
    Part("distress predicts", ("attachment", "seeking_companionship", "goodbye"), _predictions),
    Part("slope density", ("preferences", "attachment"), _slope_density),
)


# --- vulnerability ----------------------------------------------------------------------------------------------------


def _vulnerability(outcome: vulnerability.VulnerabilityOutcome, inputs: Inputs) -> pd.DataFrame:
    rows = vulnerability.outcome_rows(outcome, inputs[outcome.table], inputs.people)
    found = vulnerability.adjusted([vulnerability.fit_outcome(outcome, rows)])
    return rows_of("vulnerability", found.assign(study="longitudinal", grouping=found["kind"], p_adjusted=found["p_within"]))


VULNERABILITY = tuple(
    Part("vulnerability", (outcome.table, PEOPLE), partial(_vulnerability, outcome), outcome.name) for outcome in vulnerability.OUTCOMES
)


def _adjusted_over_outcomes(rows: pd.DataFrame) -> pd.DataFrame:
    """Terms adjusted also over the outcomes that are there, main effects and interactions apart (spec section 8)."""
    for _, family in rows[rows["term"].notna()].groupby("grouping"):
        adjusted = benjamini_hochberg(family["p"])
        outcomes = int(family["outcome"].nunique())
        for index, p in zip(family.index, adjusted, strict=True):
            rows.at[index, "details"] = {"p_global": float(p), "outcomes": outcomes}
    return rows


# --- attrition --------------------------------------------------------------------------------------------------------

DROPPED = "post_treatment_dropout"


def _dropout_rates(inputs: Inputs) -> pd.DataFrame:
    found = attrition.dropout_rates(inputs.people)
    whole = found[found["treatment"] == attrition.ARMS[0]].groupby("study", as_index=False, sort=False)[["dropped", "n"]].sum()
    groups = [*whole.to_dict("records"), *found.to_dict("records")]
    shares = shares_of((row["dropped"] for row in groups), (row["n"] for row in groups))
    rows = [
        {"study": row["study"], "grouping": row.get("treatment"), "outcome": DROPPED, "term": row.get("level", "everyone")}
        | {**share, "details": {"dropped": row["dropped"]}}
        for row, share in zip(groups, shares, strict=True)
    ]
    return rows_of("dropout rates", rows)


def _differential_attrition(inputs: Inputs) -> pd.DataFrame:
    found = attrition.differential_attrition(inputs.people)
    return rows_of("differential attrition", found.assign(grouping=found["treatment"], outcome=DROPPED, term="largest difference"))


def _balance(inputs: Inputs) -> pd.DataFrame:
    found = attrition.balance_tests(inputs.people)
    return rows_of("balance", found.assign(grouping=found["treatment"], outcome=found["covariate"], term="any difference"), ["se_p"])


def _weights(study: str, inputs: Inputs) -> pd.DataFrame:
    """The dropout model and a summary of the weights that follow from it."""
    covariates = attrition.dropout_covariates(inputs.people, inputs["seeking_companionship"], inputs["domain_competency"])
    model = attrition.dropout_model(covariates, study).table()
    weights = attrition.inverse_probability_weights(covariates, [study])
    rows = []
    for name in ("ipw_weight", "ipw_weight_truncated"):
        values = weights[name]
        effective = values.sum() ** 2 / (values**2).sum()
        row = {"study": study, "outcome": name, "term": "mean", **mean_of(values)}
        rows.append(row | {"details": {**row["details"], "effective_n": effective, "at_limit": int((values >= attrition.HEAVIEST).sum())}})
    return pd.concat([rows_of("dropout model", model.assign(study=study, outcome=DROPPED)), rows_of("weights", rows)])


ATTRITION = (
    Part("dropout rates", (PEOPLE,), _dropout_rates),
    Part("differential attrition", (PEOPLE,), _differential_attrition),
    Part("balance", (PEOPLE,), _balance),
    *(Part("weights", (PEOPLE, "seeking_companionship", "domain_competency"), partial(_weights, study), study) for study in STUDIES),
)


# --- psychometrics ----------------------------------------------------------------------------------------------------

TYPES = "pre_treatment_preference_types"


def _psychosocial_factors(inputs: Inputs) -> pd.DataFrame:
    found = psychometrics.psychosocial_factors(inputs["psychosocial_items"])
    names = [f"F{number + 1}" for number in range(psychometrics.PSYCHOSOCIAL_FACTORS)]
    fit = {name: value for name, value in asdict(found.fit).items() if name != "n"} | {
        "missing_share": found.missing_share,
        "parallel_factors": found.parallel_factors,
        "simple_structure_factors_1": found.simple_structure_factors[0],
        "simple_structure_factors_2": found.simple_structure_factors[1],
    }
    n, method = found.fit.n, "ULS of polychoric correlations, quartimin"
    indices = [{"grouping": "fit", "outcome": name, "estimate": value, "n": n, "method": method} for name, value in fit.items()]
    indices += [
        {"grouping": "variance", "outcome": name, "estimate": share, "n": n, "method": method}
        for name, share in zip(names, found.variance, strict=True)
    ]
    indices.append({"grouping": "factor correlation", "outcome": "F1, F2", "estimate": found.factor_correlations[0, 1], "n": n, "method": method})
    return pd.concat(
        [_loadings("psychosocial loadings", found.loadings, n, method), rows_of("psychosocial fit", indices), _score_summary("made", found.scores)]
    )


def _loadings(part: str, loadings: pd.DataFrame, n: int, method: str) -> pd.DataFrame:
    long = loadings.melt("item", var_name="term", value_name="estimate").rename(columns={"item": "outcome"})
    return rows_of(part, long.assign(n=n, method=method))


def _score_summary(source: str, scores: pd.DataFrame) -> pd.DataFrame:
    """Means of the scores before and after, and how the factors correlate before; source: made here, or imported."""
    rows = [
        {"grouping": source, "outcome": f"{time}_{name}", "term": "mean", **mean_of(scores[f"{time}_{name}"].dropna())}
        for time in ("pre", "post")
        for name in FACTORS
    ]
    both = scores[[f"pre_{name}" for name in FACTORS]].dropna()
    found = stats.pearsonr(*both.to_numpy(float).T)
    interval = found.confidence_interval()
    row = {"grouping": source, "outcome": "pre_psychosocial_F1, pre_psychosocial_F2", "term": "correlation", "estimate": found.statistic}
    rows.append(row | {"p": found.pvalue, "lower": interval.low, "upper": interval.high, "n": len(both), "method": "Pearson"})
    return rows_of("psychosocial scores", rows)


def _imported_scores(inputs: Inputs) -> pd.DataFrame:
    return _score_summary("imported", inputs["psychosocial_factors"])


def _pre_treatment_types(inputs: Inputs) -> pd.DataFrame:
    asked = inputs["anthro_attitudes"]
    wide = asked.pivot(index="ppt_id", columns="item", values="answer").astype(float)
    wide = wide.join(asked.drop_duplicates("ppt_id").set_index("ppt_id")["study"]).reset_index()
    found = psychometrics.pre_treatment_types(wide, inputs["stated_preferences"], inputs["seeking_companionship"])
    method, n = "principal axes by least squares, varimax", len(found.types)
    variance = [
        {"grouping": "variance", "outcome": name, "estimate": share, "n": n, "method": method}
        for name, share in zip(found.loadings.columns[1:], found.variance, strict=True)
    ]
    clusterings = found.clusterings.melt(["k", "chosen"], var_name="outcome", value_name="estimate")
    clusterings = clusterings.assign(grouping="clusters", term=clusterings["k"], n=n, method="k-means")
    return pd.concat(
        [
            _loadings("type loadings", found.loadings, n, method),
            rows_of("type fit", variance),
            rows_of("type fit", clusterings, ["chosen"]),
            _types("made", found.types),
        ]
    )


def _types(source: str, types: pd.DataFrame) -> pd.DataFrame:
    """Sizes of the clusters and their first factor score; source: made here, or imported."""
    counts = types["cluster_name"].value_counts()
    rows = [
        {"grouping": source, "outcome": "cluster_name", "term": name, **share, "details": {"count": int(count)}}
        for (name, count), share in zip(counts.items(), shares_of(counts, [len(types)] * len(counts)), strict=True)
    ]
    scores = {name: types.loc[types["cluster_name"] == name, "factor_1_score"].dropna() for name in counts.index}
    rows += [{"grouping": source, "outcome": "factor_1_score", "term": name, **mean_of(values)} for name, values in scores.items()]
    table = rows_of("types", rows)
    if set(scores) != set(CLUSTERS):
        return table
    return pd.concat([table, rows_of("types", [{"grouping": source, "outcome": "factor_1_score", **_difference_of_types(scores)}])])


def _difference_of_types(scores: Mapping[str, pd.Series]) -> dict[str, Any]:
    """The second type's mean score less the first one's, by Student's test with one variance as the published one is (spec section 11)."""
    sceptic, enthusiast = (scores[name].to_numpy(float) for name in CLUSTERS)
    found = stats.ttest_ind(enthusiast, sceptic)
    interval, estimate = found.confidence_interval(), float(enthusiast.mean() - sceptic.mean())
    tested = {"estimate": estimate, "se": estimate / found.statistic, "df": found.df, "statistic": found.statistic, "p": found.pvalue}
    ends = {"lower": interval.low, "upper": interval.high, "n": len(sceptic) + len(enthusiast)}
    return {"term": f"{CLUSTERS[1]} - {CLUSTERS[0]}", **tested, **ends, "method": "Student, pooled variance"}


def _imported_types(inputs: Inputs) -> pd.DataFrame:
    return _types("imported", inputs[TYPES])


PSYCHOMETRICS = (
    Part("psychosocial factors", ("psychosocial_items",), _psychosocial_factors),
    Part("psychosocial scores", ("psychosocial_factors",), _imported_scores),
    Part("types", ("anthro_attitudes", "stated_preferences", "seeking_companionship"), _pre_treatment_types, "made"),
    Part("types", (TYPES,), _imported_types, "imported"),
)


# --- topics -----------------------------------------------------------------------------------------------------------


def _topic_ranks(inputs: Inputs) -> pd.DataFrame:
    found = topics.topic_ranks(inputs["usecase_preferences"])
    reach = stats.t.ppf(0.975, found["n"] - 1) * found["se"]
    ends = {"lower": found["mean"] - reach, "upper": found["mean"] + reach}
    found = found.assign(outcome="reversed rank", term=found["topic"], estimate=found["mean"], **ends, df=found["n"] - 1, method="mean, t")
    return rows_of("topic ranks", found, ["sd"])


def _topic_matches(source: str, inputs: Inputs) -> pd.DataFrame:
    if source == "made":
        groups = topics.topic_groups(inputs["usecase_preferences"])
    else:
        arms = inputs["metadata_with_dropout"][["ppt_id", "study", "domain"]]
        groups = inputs["topic_groups"].merge(arms, on="ppt_id", validate="one_to_one")
    found = topics.match_shares(groups)
    found = found.assign(grouping=f"{source} " + found["domain"], outcome=found["match"], term="share", estimate=found["share"])
    se = np.sqrt(found["share"] * (1 - found["share"]) / found["n"])
    return rows_of("topic matches", found.assign(se=se, method="share, Clopper-Pearson"), ["matched", "domain"])


def _sociodemographics(inputs: Inputs) -> pd.DataFrame:
    asked = [inputs[name] for name in ("sociodemographics", "calibration_sociodemographics") if name in inputs.tables]
    found = topics.sociodemographic_counts(asked)
    asked_of = found.groupby(["study", "characteristic"])["n"].transform("sum")
    rows = [
        {"study": row["study"], "outcome": row["characteristic"], "term": row["answer"], **share, "details": {"count": row["n"]}}
        for row, share in zip(found.to_dict("records"), shares_of(found["n"], asked_of), strict=True)
    ]
    return rows_of("sociodemographics", rows)


def _condition_sizes(inputs: Inputs) -> pd.DataFrame:
    found = topics.condition_sizes(inputs["metadata_with_dropout"])
    labels = [f"{row.multiplier:g}, {row.domain}, {row.personalisation}" for row in found.itertuples()]
    found = found.assign(grouping="arm", outcome="participants", term=labels, estimate=found["n"], method="count")
    return rows_of("condition sizes", found, ["multiplier", "domain", "personalisation"])


TOPICS = (
    Part("topic ranks", ("usecase_preferences",), _topic_ranks),
    Part("topic matches", ("usecase_preferences",), partial(_topic_matches, "made"), "made"),
    Part("topic matches", ("topic_groups", "metadata_with_dropout"), partial(_topic_matches, "imported"), "imported"),
    Part("sociodemographics", ("sociodemographics",), _sociodemographics),
    Part("condition sizes", ("metadata_with_dropout",), _condition_sizes),
)


# --- calibration ------------------------------------------------------------------------------------------------------

RANKINGS = ("relationship-seeking", "preference")
VARIANTS: dict[str, tuple[float, ...] | None] = {"all doses": None, "truncated": (-1.0, -0.5, 0.0, 0.5, 1.0)}


def _rating_models(inputs: Inputs) -> pd.DataFrame:
    terms, compared = calibration.calibration_models(inputs.ratings)
    terms = terms.assign(grouping=terms["model"], outcome=terms["composite"], method="mixed, Satterthwaite")
    criteria = compared.melt(["composite", "model", "n", "singular", "reported"], ["aic", "bic", "rmse"], var_name="term", value_name="estimate")
    criteria = criteria.assign(grouping=criteria["model"], outcome=criteria["composite"], method="restricted likelihood")
    shared = {"study": "calibration"}
    return pd.concat(
        [rows_of("mixed models", terms.assign(**shared)), rows_of("model comparison", criteria.assign(**shared), ["singular", "reported"])]
    )


def _rating_means(inputs: Inputs) -> pd.DataFrame:
    # A participant's mean at a dose first, so that several conversations of one are no several participants.
    own = inputs.ratings.groupby(["ppt_id", "multiplier"])[list(calibration.COMPOSITES)].mean().reset_index()
    rows = []
    for composite in calibration.COMPOSITES:
        for dose, values in own.dropna(subset=[composite]).groupby("multiplier")[composite]:
            rows.append({"study": "calibration", "grouping": "participants", "outcome": composite, "term": f"{dose:g}", **mean_of(values)})
    return rows_of("rating means", rows)


def _worths(inputs: Inputs) -> pd.DataFrame:
    tables = []
    for ranking_type in RANKINGS:
        for variant, doses in VARIANTS.items():
            lists = rankings.long_rankings(inputs["calibration_rankings"], ranking_type, doses=doses)
            # Some lists keep one assistant only, and order nothing.
            lists = lists[lists.groupby("ppt_id")["place"].transform("size") > 1]
            found = rankings.plackett_luce(lists).table()
            reach = stats.norm.ppf(0.975) * found["quasi_se"]
            ends = {"estimate": found["log_worth"], "lower": found["log_worth"] - reach, "upper": found["log_worth"] + reach}
            tables.append(found.assign(grouping=variant, outcome=ranking_type, term=_doses(found), **ends))
    method = "Plackett-Luce against dose 0, quasi-variance interval"
    return rows_of("log-worths", pd.concat(tables).assign(study="calibration", method=method), ["quasi_se"])


def _win_rates(inputs: Inputs) -> pd.DataFrame:
    tables = []
    for ranking_type in RANKINGS:
        lists = rankings.long_rankings(inputs["calibration_rankings"], ranking_type)
        rates, pairs = rankings.win_rates(lists), rankings.pairwise_wins(lists)
        rates = rates.assign(outcome=ranking_type, term=_doses(rates), estimate=rates["win_rate"], grouping="mean over opponents")
        tables.append(rows_of("win rates", rates.assign(study="calibration", method="bootstrap over participants")))
        opponents = "against " + pairs["opponent"].map("{:g}".format)
        pairs = pairs.assign(outcome=ranking_type, grouping=opponents, term=_doses(pairs), estimate=pairs["share"])
        tables.append(rows_of("pairwise wins", pairs.assign(study="calibration", method="share")))
    return pd.concat(tables)


def _doses(table: pd.DataFrame) -> pd.Series:
    return table["multiplier"].map("{:g}".format)


CALIBRATION = (
    Part("mixed models", ("calibration_ratings",), _rating_models),
    Part("rating means", ("calibration_ratings",), _rating_means),
    Part("log-worths", ("calibration_rankings",), _worths),
    Part("win rates", ("calibration_rankings",), _win_rates),
)


# --- frontier ---------------------------------------------------------------------------------------------------------

SCORE = "relationship_score"


def _trend(inputs: Inputs) -> pd.DataFrame:
    found = frontier.trend(inputs.panel)
    found = found.assign(grouping=found["model"], outcome=SCORE, term="years", method=found["model"])
    return rows_of("trend", found, ["r_squared", "models", "providers"])


def _models(inputs: Inputs) -> pd.DataFrame:
    rows = []
    for (model, provider, released, years), values in inputs.panel.groupby(["model_name", "provider", "released", "years"])["score"]:
        row = {"grouping": provider, "outcome": SCORE, "term": model, **mean_of(values)}
        rows.append(row | {"details": {"released": released.date().isoformat(), "years": years, "year": released.year}})
    return rows_of("model means", rows)


def _vector(inputs: Inputs) -> pd.DataFrame:
    found = inputs.vector.assign(grouping="vector", outcome=SCORE, term=_doses(inputs.vector), estimate=inputs.vector["mean"], method="mean, t")
    return rows_of("vector scores", found, ["sd"])


def _dose_equivalents(inputs: Inputs) -> pd.DataFrame:
    rows = []
    for year in sorted(inputs.panel["released"].dt.year.unique()):
        found = frontier.dose_equivalent(inputs.panel, inputs.vector, int(year))
        shared = {"grouping": year, "outcome": SCORE, "n": found.n}
        rows.append({**shared, "term": "mean of responses", "estimate": found.mean_dose, "details": {"score": found.mean, "models": found.models}})
        ends = {"estimate": found.median_dose, "lower": found.lower, "upper": found.upper, "method": "bootstrap over models"}
        details = {"score": found.median, "models": found.models, "draws": found.draws}
        rows.append({**shared, "term": "median of models", **ends, "details": details})
    table = rows_of("dose equivalents", rows)
    return table.assign(note=np.where(table["estimate"].astype(float).isna(), "outside of the vector's mean scores", ""))


FRONTIER = (
    Part("trend", ("frontier_scores", "frontier_models"), _trend),
    Part("model means", ("frontier_scores", "frontier_models"), _models),
    Part("vector scores", ("frontier_vector",), _vector),
    Part("dose equivalents", ("frontier_scores", "frontier_models", "frontier_vector"), _dose_equivalents),
)


# --- instruments ------------------------------------------------------------------------------------------------------


def _instrument(
    name: str,
    description: str,
    parts: tuple[Part, ...],
    figures: Callable[[pd.DataFrame, Trial], dict[str, str]],
    seconds: float,
    *,
    further: tuple[str, ...] = (),
    finish: Callable[[pd.DataFrame], pd.DataFrame] = lambda rows: rows,
) -> Instrument:
    needs = [table for part in parts for need in part.needs for table in (("metadata_with_dropout",) if need == PEOPLE else (need,))]
    return Instrument(name, description, tuple(dict.fromkeys([*needs, *further])), parts, figures, seconds, finish)


INSTRUMENTS = {
    instrument.name: instrument
    for instrument in (
        _instrument(
            "comparisons",
            "Tests beside the main models: goodbyes by dose, answers between arms and studies, competency, closeness, companionship users.",
            COMPARISONS,
            instrument_figures.comparisons,
            1.5,
        ),
        _instrument(
            "profiles",
            "Liking against wanting: the four profiles, who is in them, the number needed to harm, and what separation distress predicts.",
            PROFILES,
            instrument_figures.profiles,
            0.5,
        ),
        _instrument(
            "vulnerability",
            "Whether personal characteristics change the effect of a companion, outcome by outcome.",
            VULNERABILITY,
            instrument_figures.vulnerability,
            2.0,
            finish=_adjusted_over_outcomes,
        ),
        _instrument(
            "attrition",
            "Who left: rates, differences between arms, balance of the arms, the dropout model and its weights.",
            ATTRITION,
            instrument_figures.attrition,
            1.7,
        ),
        _instrument(
            "psychometrics",
            "Factors of the psychosocial questionnaires and types of participants: loadings, fit, scores, clusters.",
            PSYCHOMETRICS,
            instrument_figures.psychometrics,
            3.0,
        ),
        _instrument(
            "topics",
            "What participants wanted to talk about, whether they could, who they are and how many each arm has.",
            TOPICS,
            instrument_figures.topics,
            0.3,
            further=("calibration_sociodemographics",),
        ),
        _instrument(
            "calibration",
            "Ratings and rankings of doses before the trials: mixed models and their comparison, Plackett-Luce worths, win rates.",
            CALIBRATION,
            instrument_figures.calibration,
            1.0,
        ),
        _instrument(
            "frontier_trend",
            "Scores of frontier models over their release dates, and the dose of the vector that they are worth.",
            FRONTIER,
            instrument_figures.frontier_trend,
            0.3,
        ),
    )
}
