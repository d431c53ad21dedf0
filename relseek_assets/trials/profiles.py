"""Liking and wanting: how each changes within a participant, the four profiles that follow, and what separation distress predicts (spec section 9).

Here belong slopes, profiles and their comparison between arms. The mixed model that gives the slopes belongs in `relseek_assets/mixed_models.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats
from scipy.special import expit

from relseek_assets import mixed_models
from relseek_assets.trials.comparisons import ComparisonFault
from relseek_assets.trials.participants import treatment_columns
from relseek_assets.trials.regressions import Regression, logit, ols

SESSIONS_A_WEEK = 5
STEADY = 0.1  # a slope within ±STEADY is left out of the sensitivity analyses
SIMULATIONS = 20_000

DEPENDENCY, ENGAGEMENT = "Decoupled Dependency", "Aligned Engagement"
DISENGAGEMENT, SATIATION = "Aligned Disengagement", "Decoupled Satiation"
CATEGORIES = (DISENGAGEMENT, ENGAGEMENT, DEPENDENCY, SATIATION)

PROFILE_COLUMNS = ("ppt_id", "liking_slope", "liking_slope_weekly", "wanting_slope", "behaviour_category", "decoupling_score")
COMPARISON_COLUMNS = ("wanting", "comparison", "test", "estimate", "se", "df", "statistic", "p", "lower", "upper", "method", "n", "note")
PREDICTION_COLUMNS = ("analysis", "term", "estimate", "se", "df", "statistic", "p", "lower", "upper", "method", "n", "note")


@dataclass(frozen=True)
class Arms:
    """A comparison of group 2, in which decoupling is expected, with group 1; each a set of levels that must all hold."""

    name: str
    group1: Mapping[str, str]
    group2: Mapping[str, str]


COMPARISONS = (
    Arms("relationship_seeking_category", {"relationship_seeking_category": "neg_lambda"}, {"relationship_seeking_category": "pos_lambda"}),
    Arms("domain", {"domain": "polchat"}, {"domain": "emotchat"}),
    Arms(
        "companionship_condition",
        {"relationship_seeking_category": "neg_lambda", "domain": "polchat"},
        {"relationship_seeking_category": "pos_lambda", "domain": "emotchat"},
    ),
)


def liking_slopes(preferences: pd.DataFrame) -> pd.Series:
    """Change of liking per session, by participant: likeability and engagingness (0-100) of the longitudinal study, in one model."""
    rows = preferences[preferences["study"] == "longitudinal"]
    rows = rows.melt(id_vars=["ppt_id", "session"], value_vars=["likeability", "engagingness"], value_name="liking").dropna(
        subset=["liking", "session"]
    )
    session = rows["session"].astype(float)
    return _slopes("liking", rows["liking"].astype(float), (session - session.mean()).rename("session_centred"), rows["ppt_id"])


def wanting_slopes(attachment: pd.DataFrame) -> pd.Series:
    """Change of separation distress (0-100) per week, by participant of the longitudinal study."""
    rows = attachment[attachment["study"] == "longitudinal"].dropna(subset=["separation_distress", "week"])
    return _slopes("separation_distress", rows["separation_distress"].astype(float), rows["week"].astype(float), rows["ppt_id"])


def seeking_changes(seeking_companionship: pd.DataFrame) -> pd.Series:
    """Change in the likelihood of seeking companionship (0-100), after - before, by participant of the longitudinal study who was asked twice."""
    rows = seeking_companionship[seeking_companionship["study"] == "longitudinal"]
    weeks = rows.pivot(index="ppt_id", columns="week", values="seeking_companionship_likelihood").reindex(columns=[0, 4]).astype(float)
    return (weeks[4] - weeks[0]).dropna().rename("seeking_change")


def profiles(liking: pd.Series, wanting: pd.Series, *, standardised: bool = False) -> pd.DataFrame:
    """Participants with both slopes, `PROFILE_COLUMNS`.

    liking: per session; its weekly value is five times that. wanting: per week, or the change of seeking; `standardised` then puts both parts of the
    decoupling score (wanting - weekly liking) in standard deviations.
    """
    both = pd.concat([liking.rename("liking_slope"), wanting.rename("wanting_slope")], axis=1, join="inner").dropna()
    both["liking_slope_weekly"] = SESSIONS_A_WEEK * both["liking_slope"]
    liked, wanted = both["liking_slope"] > 0, both["wanting_slope"] > 0
    both["behaviour_category"] = pd.Categorical(
        np.where(liked, np.where(wanted, ENGAGEMENT, SATIATION), np.where(wanted, DEPENDENCY, DISENGAGEMENT)), categories=list(CATEGORIES)
    )
    parts = both[["wanting_slope", "liking_slope_weekly"]]
    if standardised:
        parts = (parts - parts.mean()) / parts.std(ddof=1)
    both["decoupling_score"] = parts["wanting_slope"] - parts["liking_slope_weekly"]
    return both.rename_axis("ppt_id").reset_index()[list(PROFILE_COLUMNS)]


def compare_profiles(found: pd.DataFrame, arms: pd.DataFrame, *, wanting: str) -> pd.DataFrame:
    """Whether decoupled dependency is commoner in group 2 of every comparison, `COMPARISON_COLUMNS`.

    found: `profiles`. arms: a row a participant with `multiplier` and `domain`. wanting: the name that rows carry. Tests of a comparison:

    - profiles: chi-squared on 2 x 4, with simulated tables where an expected count is below 5;
    - risk_difference, odds_ratio: share of decoupled dependency, Wald intervals; p is one-sided, of proportions with Yates' correction;
    - harm: the number needed, where the risk rises;
    - steady: the risk difference without slopes within ±0.1;
    - steep: difference of the shares whose liking falls and wanting rises by more than 0.1;
    - score, effect_size: difference of means of the decoupling score (Welch, p one-sided, interval two-sided) and Cohen's d with pooled SD.

    Raises:
        ComparisonFault: a group of a comparison is empty.
    """
    members = found.merge(treatment_columns(arms.drop_duplicates("ppt_id")), on="ppt_id", how="inner")
    rows: list[dict[str, Any]] = []
    for comparison in COMPARISONS:
        sides = (comparison.group1, comparison.group2)
        groups = [members[np.logical_and.reduce([members[column] == level for column, level in side.items()])] for side in sides]
        if min(map(len, groups)) < 2:
            raise ComparisonFault(
                f"{wanting}, {comparison.name}: groups of {len(groups[0])} and {len(groups[1])} participants; both need two or more"
            )
        rows += [{"wanting": wanting, "comparison": comparison.name, **row} for row in _compared(*groups)]
    table = pd.DataFrame(rows).reindex(columns=list(COMPARISON_COLUMNS))
    return table.assign(note=table["note"].fillna(""))


def last_measures(attachment: pd.DataFrame, seeking_companionship: pd.DataFrame, goodbye: pd.DataFrame) -> pd.DataFrame:
    """Each longitudinal participant's last separation distress, with seeking companionship and goodbye, one row a participant.

    Seeking is the last answer given: who left before the end keeps the one from before treatment, as the published analysis does; goodbye is then
    missing.
    """
    rows = attachment[(attachment["study"] == "longitudinal") & attachment["separation_distress"].notna()].sort_values("week")
    last = rows.groupby("ppt_id", sort=False).tail(1)[["ppt_id", "multiplier", "domain", "separation_distress"]]
    answers = seeking_companionship.dropna(subset=["seeking_companionship_likelihood"]).sort_values("week").groupby("ppt_id", sort=False).tail(1)
    last = last.merge(answers[["ppt_id", "seeking_companionship_likelihood"]], on="ppt_id", how="inner")
    last = last.merge(goodbye[["ppt_id", "goodbye_action"]], on="ppt_id", how="left")
    return treatment_columns(last).astype(dict.fromkeys(("separation_distress", "seeking_companionship_likelihood", "goodbye_action"), float))


def profile_outcomes(found: pd.DataFrame, last: pd.DataFrame) -> pd.DataFrame:
    """Mean and SD of `last_measures` by profile: behaviour_category, measure, estimate, se, sd, n (answers)."""
    members = found.merge(last, on="ppt_id", how="inner")
    rows = []
    for measure in ("separation_distress", "goodbye_action", "seeking_companionship_likelihood"):
        summary = members.groupby("behaviour_category", observed=True)[measure].agg(estimate="mean", se="sem", sd="std", n="count")
        rows.append(summary.reset_index().assign(measure=measure))
    return pd.concat(rows, ignore_index=True)[["behaviour_category", "measure", "estimate", "se", "sd", "n"]]


def distress_predicts_seeking(last: pd.DataFrame) -> pd.DataFrame:
    """Seeking companionship on separation distress, by dose category: `PREDICTION_COLUMNS`, with a row for R² and one for Pearson's r.

    analysis: `three categories`, `outer categories` (without λ = 0), and each outer category alone. last: `last_measures`.
    """
    outcome, formula = "seeking_companionship_likelihood", "seeking_companionship_likelihood ~ separation_distress"
    by_category = f"{formula} * relationship_seeking_category"
    outer = last[last["multiplier"] != 0]
    fits = [("three categories", ols(by_category, last)), ("outer categories", ols(by_category, outer))]
    for category in ("neg_lambda", "pos_lambda"):
        fits.append((category, ols(formula, last[last["relationship_seeking_category"] == category], outcome=f"{outcome}, {category}")))
    tables = [_prediction(name, fit) for name, fit in fits]
    shares = pd.DataFrame([{"analysis": name, "term": "R²", "estimate": fit.r_squared, "method": "ols", "n": fit.n} for name, fit in fits])
    return _predictions([*tables, shares, _correlation(last, outcome)], outcome)


def distress_predicts_goodbye(last: pd.DataFrame) -> pd.DataFrame:
    """Saying goodbye on separation distress: `PREDICTION_COLUMNS`; coefficients are log-odds.

    Besides logits of the outer dose categories together and alone: Welch's test of distress between those who did not and did say goodbye, with
    Cohen's d, Pearson's r, and `probability at 25 / 50 / 75` of distress for either category.
    """
    outcome, formula = "goodbye_action", "goodbye_action ~ separation_distress"
    answered = last.dropna(subset=[outcome])
    fit = logit(f"{formula} * relationship_seeking_category", answered[answered["multiplier"] != 0])
    tables = [_prediction("outer categories", fit), _goodbye_probabilities(fit)]
    for category in ("neg_lambda", "pos_lambda"):
        members = answered[answered["relationship_seeking_category"] == category]
        tables.append(_prediction(category, logit(formula, members, outcome=f"{outcome}, {category}")))
    return _predictions([*tables, _goodbye_difference(answered), _correlation(answered, outcome)], outcome)


def _compared(group1: pd.DataFrame, group2: pd.DataFrame) -> list[dict[str, Any]]:
    dependent = [(group["behaviour_category"] == DEPENDENCY).to_numpy() for group in (group1, group2)]
    moving = [(np.abs(group[["liking_slope", "wanting_slope"]]) > STEADY).all(axis=1).to_numpy() for group in (group1, group2)]
    steep = [((group["liking_slope"] < -STEADY) & (group["wanting_slope"] > STEADY)).to_numpy() for group in (group1, group2)]
    risk = _risk(*dependent, test="risk_difference")
    harm = {"test": "harm", "estimate": 1 / risk["estimate"] if risk["estimate"] > 0 else np.nan, "method": "1 / risk difference", "n": risk["n"]}
    return [
        _four_profiles(group1, group2),
        risk,
        _odds_ratio(*dependent) | {"p": risk["p"]},
        harm if risk["estimate"] > 0 else harm | {"note": "the risk does not rise"},
        _risk(*(values[kept] for values, kept in zip(dependent, moving, strict=True)), test="steady"),
        _risk(*steep, test="steep"),
        *_scores(group1["decoupling_score"].to_numpy(), group2["decoupling_score"].to_numpy()),
    ]


def _four_profiles(group1: pd.DataFrame, group2: pd.DataFrame) -> dict[str, Any]:
    counts = np.array([[(group["behaviour_category"] == category).sum() for category in CATEGORIES] for group in (group1, group2)])
    counts = counts[:, counts.sum(0) > 0]
    row: dict[str, Any] = {"test": "profiles", "n": int(counts.sum()), "method": "Pearson"}
    if counts.shape[1] < 2:
        return row | {"note": "everyone has the same profile"}
    expected = stats.contingency.expected_freq(counts)
    if (expected >= 5).all():
        found = stats.chi2_contingency(counts, correction=False)
        return row | {"statistic": found.statistic, "df": found.dof, "p": found.pvalue}
    generator = np.random.default_rng(0)
    simulated = stats.chi2_contingency(counts, correction=False, method=stats.MonteCarloMethod(n_resamples=SIMULATIONS, rng=generator))
    return row | {"statistic": simulated.statistic, "p": simulated.pvalue, "method": f"Pearson, {SIMULATIONS} simulated tables"}


def _risk(first: np.ndarray, second: np.ndarray, *, test: str) -> dict[str, Any]:
    """Difference of proportions, second - first, with Wald's interval; p of R's `prop.test`, one-sided, with Yates' correction."""
    row: dict[str, Any] = {"test": test, "n": len(first) + len(second), "method": "proportions, Yates' correction, one-sided"}
    if min(len(first), len(second)) == 0:
        return row | {"estimate": np.nan, "p": np.nan, "note": "a group is empty"}
    shares = first.mean(), second.mean()
    difference = float(shares[1] - shares[0])
    se = float(np.sqrt(sum(share * (1 - share) / len(group) for share, group in zip(shares, (first, second), strict=True))))
    row |= {"estimate": difference, "se": se, "lower": difference - 1.96 * se, "upper": difference + 1.96 * se}
    counts = np.array([[group.sum(), len(group) - group.sum()] for group in (first, second)])
    if (counts.sum(0) == 0).any():
        return row | {"p": np.nan, "note": "the same in everyone"}
    found = stats.chi2_contingency(counts, correction=True)
    statistic = float(np.sign(difference) * np.sqrt(found.statistic))
    return row | {"statistic": statistic, "p": float(stats.norm.sf(statistic))}


def _odds_ratio(first: np.ndarray, second: np.ndarray) -> dict[str, Any]:
    cells = np.array([second.sum(), len(second) - second.sum(), first.sum(), len(first) - first.sum()], dtype=float)
    row: dict[str, Any] = {"test": "odds_ratio", "n": len(first) + len(second), "method": "Wald interval of the log, p of proportions"}
    if (cells == 0).any():
        return row | {"estimate": np.nan, "note": "an empty cell: no finite odds ratio"}
    ratio, se = cells[0] * cells[3] / (cells[1] * cells[2]), np.sqrt((1 / cells).sum())
    bounds = ratio * np.exp(1.96 * se * np.array([-1, 1]))
    return row | {"estimate": ratio, "se": ratio * se, "lower": bounds[0], "upper": bounds[1]}


def _scores(first: np.ndarray, second: np.ndarray) -> list[dict[str, Any]]:
    n1, n2 = len(first), len(second)
    found = stats.ttest_ind(second, first, equal_var=False, alternative="greater")
    both_sided = stats.ttest_ind(second, first, equal_var=False).confidence_interval()
    pooled = np.sqrt(((n1 - 1) * first.var(ddof=1) + (n2 - 1) * second.var(ddof=1)) / (n1 + n2 - 2))
    difference = float(second.mean() - first.mean())
    score = {"estimate": difference, "se": np.sqrt(first.var(ddof=1) / n1 + second.var(ddof=1) / n2), "df": found.df, "statistic": found.statistic}
    return [
        {"test": "score", **score, "p": found.pvalue, "lower": both_sided.low, "upper": both_sided.high, "method": "Welch, one-sided", "n": n1 + n2},
        {"test": "effect_size", "estimate": difference / pooled, "method": "Cohen's d, pooled SD", "n": n1 + n2},
    ]


def _slopes(outcome: str, value: pd.Series, time: pd.Series, participant: pd.Series) -> pd.Series:
    """Fixed slope plus best linear unbiased predictor of each participant's own, index `ppt_id`."""
    name = str(time.name)
    data = pd.DataFrame({"value": value, name: time, "ppt_id": participant})
    if data["ppt_id"].nunique() < 2 or data[name].nunique() < 2:
        raise ComparisonFault(f"{outcome}: {data['ppt_id'].nunique()} participants at {data[name].nunique()} times; slopes need two of each")
    try:
        fit = mixed_models.fit(f"value ~ {name} + (1 + {name} | ppt_id)", data)
    except mixed_models.MixedModelError as error:
        raise ComparisonFault(f"{outcome}: {error}") from error
    own = fit.blups("ppt_id").set_index("level")[name]
    return (fit.coefficients[fit.names.index(name)] + own).rename(outcome)


def _prediction(analysis: str, fit: Regression) -> pd.DataFrame:
    return fit.table().assign(analysis=analysis)


def _predictions(tables: list[pd.DataFrame], outcome: str) -> pd.DataFrame:
    table = pd.concat(tables, ignore_index=True).assign(outcome=outcome).reindex(columns=list(PREDICTION_COLUMNS))
    return table.assign(note=table["note"].fillna(""))


def _correlation(rows: pd.DataFrame, outcome: str) -> pd.DataFrame:
    values = rows[["separation_distress", outcome]].dropna()
    found = stats.pearsonr(values["separation_distress"], values[outcome])
    interval = found.confidence_interval()
    row = {"estimate": found.statistic, "p": found.pvalue, "lower": interval.low, "upper": interval.high, "df": len(values) - 2, "n": len(values)}
    return pd.DataFrame([{"analysis": "correlation", "term": "r", "method": "Pearson", **row}])


def _goodbye_probabilities(fit: Regression) -> pd.DataFrame:
    grid = pd.DataFrame(
        [(distress, category) for category in ("neg_lambda", "pos_lambda") for distress in (25.0, 50.0, 75.0)],
        columns=["separation_distress", "relationship_seeking_category"],
    )
    labels = [f"probability at {distress:g}, {category}" for distress, category in grid.itertuples(index=False)]
    table = fit.contrast(fit.design.at(grid), labels).assign(analysis="outer categories", statistic=np.nan, p=np.nan)
    means = expit(table["estimate"])
    return table.assign(estimate=means, se=table["se"] * means * (1 - means), lower=expit(table["lower"]), upper=expit(table["upper"]))


def _goodbye_difference(answered: pd.DataFrame) -> pd.DataFrame:
    no, yes = (answered.loc[answered["goodbye_action"] == said, "separation_distress"].to_numpy() for said in (0.0, 1.0))
    score = _scores(yes, no)[0]
    both_sided = 2 * stats.t.sf(abs(float(score["statistic"])), float(score["df"]))
    # The published d divides by the root of the plain mean of the two variances, not by the pooled SD as for the profiles' score.
    size = (yes.mean() - no.mean()) / np.sqrt((yes.var(ddof=1) + no.var(ddof=1)) / 2)
    rows = [
        score | {"term": "distress without - with goodbye", "p": both_sided, "method": "Welch"},
        {"term": "Cohen's d, with - without goodbye", "estimate": size, "method": "Cohen's d, mean variance", "n": len(yes) + len(no)},
    ]
    return pd.DataFrame(rows).drop(columns="test").assign(analysis="goodbye")
