"""Slopes and profiles, against balanced data, textbook formulas of two proportions, and the published predictions."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from released import made_up, merged, needs_release, path_of, published, same, table
from scipy import stats

from relseek_assets.trials import profiles
from relseek_assets.trials.comparisons import ComparisonFault


def weekly(slopes: np.ndarray, *, noise: float = 1.0) -> pd.DataFrame:
    """Four weeks of separation distress of participants with given slopes."""
    draw = np.random.default_rng(2)
    who, week = np.repeat(np.arange(len(slopes)), 4), np.tile(np.arange(1, 5), len(slopes))
    values = 50 + draw.standard_normal(len(slopes))[who] * 5 + slopes[who] * week + noise * draw.standard_normal(len(who))
    frame = pd.DataFrame({"ppt_id": [f"ppt{index}" for index in who], "study": "longitudinal", "week": week, "separation_distress": values})
    return frame.astype({"week": "Int64"})


def test_slopes_are_shrunk_towards_their_mean_which_balanced_data_keep() -> None:
    rows = weekly(np.random.default_rng(3).normal(2, 3, 200), noise=4.0)
    found = profiles.wanting_slopes(rows)
    own = rows.groupby("ppt_id")[["week", "separation_distress"]].apply(
        lambda part: np.polyfit(part["week"].astype(float), part["separation_distress"], 1)[0]
    )
    assert found.mean() == pytest.approx(own.mean(), abs=1e-6)
    assert found.std() < own.std() and np.corrcoef(found, own[found.index])[0, 1] > 0.9


def test_liking_pools_two_items_and_is_a_slope_per_session() -> None:
    draw = np.random.default_rng(5)
    slopes = draw.normal(0.3, 0.6, 120)
    who, session = np.repeat(np.arange(120), 20), np.tile(np.arange(1, 21), 120)
    base = 40 + 10 * draw.standard_normal(120)[who] + slopes[who] * session
    rows = pd.DataFrame({"ppt_id": [f"ppt{index}" for index in who], "study": "longitudinal", "session": session})
    rows["likeability"], rows["engagingness"] = base + draw.standard_normal(len(rows)), base + draw.standard_normal(len(rows))
    rows.loc[::7, "engagingness"] = np.nan
    found = profiles.liking_slopes(rows.astype({"session": "Int64"}))
    assert np.abs(found[[f"ppt{index}" for index in range(120)]].to_numpy() - slopes).max() < 0.2


def test_slopes_of_one_participant_are_refused() -> None:
    with pytest.raises(ComparisonFault, match="separation_distress: 1 participants at 4 times"):
        profiles.wanting_slopes(weekly(np.ones(1)))


def test_the_four_profiles_are_the_four_quadrants_and_zero_counts_as_down() -> None:
    liking = pd.Series([-1.0, 1.0, 0.0, 2.0], index=list("abcd"))
    wanting = pd.Series([2.0, 3.0, 0.0, -1.0, 9.0], index=list("abcde"))
    found = profiles.profiles(liking, wanting).set_index("ppt_id")
    assert found["behaviour_category"].tolist() == [profiles.DEPENDENCY, profiles.ENGAGEMENT, profiles.DISENGAGEMENT, profiles.SATIATION]
    assert found.loc["a", "decoupling_score"] == 2 + 5 and "e" not in found.index
    standardised = profiles.profiles(liking, wanting, standardised=True)["decoupling_score"]
    assert standardised.mean() == pytest.approx(0)


def quadrants(n: int = 400) -> tuple[pd.DataFrame, pd.DataFrame]:
    """(profiles, arms) in which dependency is commoner where λ > 0."""
    people, draw = made_up(n), np.random.default_rng(9)
    index = pd.Index(people["ppt_id"], name="ppt_id")
    liking = pd.Series(draw.normal(0.1, 0.5, n), index=index)
    wanting = pd.Series(draw.normal(1.0, 2.0, n) + (people["multiplier"] > 0).to_numpy(), index=index)
    return profiles.profiles(liking, wanting), people[["ppt_id", "multiplier", "domain"]]


def test_comparisons_follow_the_formulas_of_two_proportions() -> None:
    found, arms = quadrants()
    rows = profiles.compare_profiles(found, arms, wanting="w").set_index(["comparison", "test"])
    assert len(rows) == 24
    members = found.merge(arms, on="ppt_id")
    first, second = (members[side]["behaviour_category"] == profiles.DEPENDENCY for side in (members["multiplier"] < 0, members["multiplier"] > 0))
    n1, n2, p1, p2 = len(first), len(second), first.mean(), second.mean()
    both = (first.sum() + second.sum()) / (n1 + n2)
    z = (p2 - p1 - (1 / n1 + 1 / n2) / 2) / np.sqrt(both * (1 - both) * (1 / n1 + 1 / n2))
    risk = rows.loc[("relationship_seeking_category", "risk_difference")]
    assert [risk["estimate"], risk["statistic"], risk["p"]] == pytest.approx([p2 - p1, z, stats.norm.sf(z)])
    ratio = rows.loc[("relationship_seeking_category", "odds_ratio")]
    odds = stats.contingency.odds_ratio([[second.sum(), n2 - second.sum()], [first.sum(), n1 - first.sum()]], kind="sample")
    interval = odds.confidence_interval(0.95)
    assert ratio["estimate"] == pytest.approx(odds.statistic) and [ratio["lower"], ratio["upper"]] == pytest.approx(
        [interval.low, interval.high], rel=1e-3
    )
    assert rows.loc[("relationship_seeking_category", "harm"), "estimate"] == pytest.approx(1 / (p2 - p1))
    size = rows.loc[("relationship_seeking_category", "effect_size"), "estimate"]
    score = rows.loc[("relationship_seeking_category", "score"), "statistic"]
    assert size == pytest.approx(score * np.sqrt(1 / n1 + 1 / n2), rel=0.02)  # equal but for unequal variances


def test_without_harm_there_is_no_number_needed() -> None:
    found, arms = quadrants()
    rows = profiles.compare_profiles(found, arms.assign(multiplier=-arms["multiplier"]), wanting="w").set_index(["comparison", "test"])
    harm = rows.loc[("relationship_seeking_category", "harm")]
    assert np.isnan(harm["estimate"]) and harm["note"] == "the risk does not rise"
    assert rows.loc[("relationship_seeking_category", "risk_difference"), "p"] > 0.5


def test_a_profile_that_nobody_has_and_a_group_that_is_empty() -> None:
    found, arms = quadrants()
    nobody = found.assign(behaviour_category=pd.Categorical([profiles.ENGAGEMENT] * len(found), categories=list(profiles.CATEGORIES)))
    rows = profiles.compare_profiles(nobody, arms, wanting="w").set_index(["comparison", "test"])
    assert rows.loc[("domain", "profiles"), "note"] == "everyone has the same profile"
    assert rows.loc[("domain", "odds_ratio"), "note"] == "an empty cell: no finite odds ratio" and np.isnan(
        rows.loc[("domain", "risk_difference"), "p"]
    )
    with pytest.raises(ComparisonFault, match="w, domain: groups of 400 and 0 participants"):
        profiles.compare_profiles(found, arms.assign(domain="polchat"), wanting="w")


def test_who_left_keeps_the_seeking_of_before_treatment() -> None:
    people = made_up(2)[["ppt_id", "study", "multiplier", "domain"]]
    attachment = weekly(np.ones(2)).merge(people[["ppt_id", "multiplier", "domain"]], on="ppt_id")
    attachment = attachment[~((attachment["ppt_id"] == "ppt1") & (attachment["week"] > 2))]
    seeking = pd.DataFrame({"ppt_id": ["ppt0", "ppt0", "ppt1"], "week": [4, 0, 0], "seeking_companionship_likelihood": [80.0, 10.0, 30.0]})
    goodbye = pd.DataFrame({"ppt_id": ["ppt0"], "goodbye_action": [1.0]})
    last = profiles.last_measures(attachment, seeking, goodbye).set_index("ppt_id")
    assert last["seeking_companionship_likelihood"].to_dict() == {"ppt0": 80, "ppt1": 30}
    assert (
        last.loc["ppt1", "separation_distress"]
        == attachment[(attachment["ppt_id"] == "ppt1") & (attachment["week"] == 2)]["separation_distress"].item()
    )
    assert np.isnan(last.loc["ppt1", "goodbye_action"])


@needs_release
def test_wanting_and_seeking_are_distributed_as_published() -> None:
    wanting, seeking = profiles.wanting_slopes(table("attachment")), profiles.seeking_changes(table("seeking_companionship"))
    found = [wanting.mean(), wanting.std(), wanting.min(), wanting.max()]
    assert len(wanting) == 1939 and found[:2] == pytest.approx([2.1652, 3.4317], abs=6e-5) and found[2:] == pytest.approx([-9.43, 13.70], abs=6e-3)
    assert (len(seeking), round(seeking.mean(), 2), round(seeking.std(), 2)) == (1820, 8.83, 27.28)


@needs_release
def test_what_separation_distress_predicts_is_as_published() -> None:
    last = profiles.last_measures(table("attachment"), table("seeking_companionship"), table("goodbye"))
    seeking = profiles.distress_predicts_seeking(last).set_index(["analysis", "term"])
    goodbye = profiles.distress_predicts_goodbye(last).set_index(["analysis", "term"])
    theirs, slope, crossed = published("decoupling_stats"), "separation_distress", "separation_distress:relationship_seeking_category[T.pos_lambda]"
    p, g = theirs["predictive_analysis"], theirs["goodbye_analysis"]
    pairs = [
        (seeking, ("three categories", slope), "estimate", p["full_model"]["sep_distress_beta"]),
        (seeking, ("three categories", slope), "p", p["full_model"]["sep_distress_p"]),
        (seeking, ("three categories", "R²"), "estimate", p["full_model"]["r_squared"]),
        (seeking, ("outer categories", slope), "estimate", p["binary_model"]["sep_distress_beta"]),
        (seeking, ("outer categories", slope), "p", p["binary_model"]["sep_distress_p"]),
        (seeking, ("outer categories", crossed), "estimate", p["binary_model"]["interaction_beta"]),
        (seeking, ("outer categories", crossed), "p", p["binary_model"]["interaction_p"]),
        (seeking, ("outer categories", "R²"), "estimate", p["binary_model"]["r_squared"]),
        (seeking, ("pos_lambda", slope), "estimate", p["by_group"]["seeking_beta"]),
        (seeking, ("pos_lambda", slope), "p", p["by_group"]["seeking_p"]),
        (seeking, ("neg_lambda", slope), "estimate", p["by_group"]["avoiding_beta"]),
        (seeking, ("neg_lambda", slope), "p", p["by_group"]["avoiding_p"]),
        (seeking, ("correlation", "r"), "estimate", p["correlation"]["r"]),
        (seeking, ("correlation", "r"), "p", p["correlation"]["p"]),
        (seeking, ("correlation", "r"), "n", p["n"]),
        (goodbye, ("goodbye", "distress without - with goodbye"), "statistic", g["t_test"]["statistic"]),
        (goodbye, ("goodbye", "distress without - with goodbye"), "p", g["t_test"]["p_value"]),
        (goodbye, ("goodbye", "Cohen's d, with - without goodbye"), "estimate", g["t_test"]["cohens_d"]),
        (goodbye, ("correlation", "r"), "estimate", g["correlation"]["r"]),
        (goodbye, ("correlation", "r"), "p", g["correlation"]["p"]),
        (goodbye, ("outer categories", slope), "estimate", g["logistic_model"]["sep_distress_beta"]),
        (goodbye, ("outer categories", slope), "p", g["logistic_model"]["sep_distress_p"]),
        (goodbye, ("outer categories", crossed), "estimate", g["logistic_model"]["interaction_beta"]),
        (goodbye, ("outer categories", crossed), "p", g["logistic_model"]["interaction_p"]),
        (goodbye, ("outer categories", slope), "n", g["n"]),
        (goodbye, ("pos_lambda", slope), "estimate", g["by_group"]["seeking_beta"]),
        (goodbye, ("pos_lambda", slope), "p", g["by_group"]["seeking_p"]),
        (goodbye, ("neg_lambda", slope), "estimate", g["by_group"]["avoiding_beta"]),
        (goodbye, ("neg_lambda", slope), "p", g["by_group"]["avoiding_p"]),
    ]
    for level, name in (("pos_lambda", "Prob_Seeking"), ("neg_lambda", "Prob_Avoiding")):
        for distress, value in zip(g["predicted_probs"]["separation_distress"], g["predicted_probs"][name], strict=True):
            pairs.append((goodbye, ("outer categories", f"probability at {distress}, {level}"), "estimate", value))
    differing = [(key, column) for rows, key, column, value in pairs if not same(rows.loc[key, column], value)]
    assert len(pairs) == 35
    assert not differing


@needs_release
def test_as_many_want_more_as_the_published_profiles_say() -> None:
    wanting = {"sep_distress": profiles.wanting_slopes(table("attachment")), "seeking": profiles.seeking_changes(table("seeking_companionship"))}
    for name, slopes in wanting.items():
        counts = {row["Var1"]: row["Freq"] for row in published("decoupling_stats")["behavioral_categories"][name]}
        assert len(slopes) == sum(counts.values())
        assert (slopes > 0).sum() == counts[profiles.ENGAGEMENT] + counts[profiles.DEPENDENCY]


@needs_release
@pytest.mark.parametrize("name", ["separation_distress", "seeking_companionship"])
@pytest.mark.parametrize("comparison", profiles.COMPARISONS, ids=lambda comparison: comparison.name)
def test_counts_that_the_published_odds_ratio_implies_give_the_published_tests(name: str, comparison: profiles.Arms) -> None:
    """Group sizes are known, so the published odds ratio and risk difference fix how many in either group are dependent."""
    slopes = (
        profiles.wanting_slopes(table("attachment")) if name == "separation_distress" else profiles.seeking_changes(table("seeking_companionship"))
    )
    people = merged().set_index("ppt_id").loc[slopes.index]
    groups = [np.logical_and.reduce([people[column] == level for column, level in side.items()]) for side in (comparison.group1, comparison.group2)]
    n1, n2 = (int(group.sum()) for group in groups)
    theirs = published("decoupling_stats")[name][comparison.name]
    x1, x2 = np.meshgrid(np.arange(1, n1), np.arange(1, n2), indexing="ij")
    fits = np.abs(x2 / n2 - x1 / n1 - theirs["risk_diff"]) + np.abs(x2 * (n1 - x1) / ((n2 - x2) * x1) - theirs["odds_ratio"])
    dependent = np.unravel_index(fits.argmin(), fits.shape)
    category = np.full(len(people), profiles.ENGAGEMENT, dtype=object)
    for group, count in zip(groups, dependent, strict=True):
        category[np.flatnonzero(group)[: count + 1]] = profiles.DEPENDENCY
    found = profiles.profiles(slopes.rename("liking"), slopes).assign(
        behaviour_category=pd.Categorical(category, categories=list(profiles.CATEGORIES))
    )
    rows = profiles.compare_profiles(found, people.reset_index()[["ppt_id", "multiplier", "domain"]], wanting=name).set_index(["comparison", "test"])
    columns = {
        ("risk_difference", "estimate"): "risk_diff",
        ("risk_difference", "p"): "prop_test_p",
        ("odds_ratio", "estimate"): "odds_ratio",
        ("odds_ratio", "lower"): "ci_lower",
        ("odds_ratio", "upper"): "ci_upper",
        ("harm", "estimate"): "nnh",
    }
    for (test, column), key in columns.items():
        assert same(rows.loc[(comparison.name, test), column], theirs[key]), (test, column)


@needs_release
def test_decoupling_is_the_published_one() -> None:
    if not path_of("preferences").exists():
        pytest.skip("the release lacks preferences.jsonl")
    liking, theirs = profiles.liking_slopes(table("preferences")), published("decoupling_stats")
    arms = merged()[["ppt_id", "multiplier", "domain"]]
    columns = {
        ("profiles", "statistic"): "chisq_stat",
        ("profiles", "p"): "chisq_p",
        ("risk_difference", "p"): "prop_test_p",
        ("risk_difference", "estimate"): "risk_diff",
        ("odds_ratio", "estimate"): "odds_ratio",
        ("odds_ratio", "lower"): "ci_lower",
        ("odds_ratio", "upper"): "ci_upper",
        ("harm", "estimate"): "nnh",
        ("steady", "p"): "sens1_p",
        ("steep", "p"): "sens2_p",
        ("score", "statistic"): "decoupling_t",
        ("score", "p"): "decoupling_p",
        ("effect_size", "estimate"): "cohens_d",
    }
    wanting = {
        "separation_distress": profiles.wanting_slopes(table("attachment")),
        "seeking_companionship": profiles.seeking_changes(table("seeking_companionship")),
    }
    short = {"separation_distress": "sep_distress", "seeking_companionship": "seeking"}
    for name, slopes in wanting.items():
        found = profiles.profiles(liking, slopes, standardised=name == "seeking_companionship")
        expected = {row["Var1"]: row["Freq"] for row in theirs["behavioral_categories"][short[name]]}
        assert found["behaviour_category"].value_counts().to_dict() == expected
        rows = profiles.compare_profiles(found, arms, wanting=name).set_index(["comparison", "test"])
        for comparison, values in theirs[name].items():
            for (test, column), key in columns.items():
                assert same(rows.loc[(comparison, test), column], values[key]), (name, comparison, test, column)
