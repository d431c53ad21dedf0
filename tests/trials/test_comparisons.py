"""Tests between arms, against closed forms, statsmodels, the matrix definition of CR2 and the published chi-squared tests."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from released import needs_release, published, same, table
from scipy import linalg
from statsmodels.stats import weightstats

from relseek_assets.trials import comparisons
from relseek_assets.trials.comparisons import ComparisonFault, chi_squared, equivalence, one_sample_tests, welch_tests
from relseek_assets.trials.secondary_outcomes import recoded

PAIR = {"arm": ("a", "b")}


def rows_of_participants(sizes: dict[str, list[int]], seed: int = 0) -> pd.DataFrame:
    """Rows of a and b with participants of the given numbers of rows, who differ from each other."""
    draw = np.random.default_rng(seed)
    parts = []
    for arm, counts in sizes.items():
        who = np.repeat(np.arange(len(counts)), counts)
        parts.append(
            pd.DataFrame(
                {"arm": arm, "who": [f"{arm}{index}" for index in who], "y": draw.standard_normal(len(counts))[who] + draw.standard_normal(len(who))}
            )
        )
    return pd.concat(parts, ignore_index=True)


def cr2_by_matrices(data: pd.DataFrame) -> tuple[float, float]:
    """Standard error and Bell-McCaffrey df of the difference of means: the definition, with hat matrices and their inverse roots."""
    X = np.c_[np.ones(len(data)), data["arm"] == "a"].astype(float)
    contrast, bread = np.array([0.0, 1.0]), np.linalg.inv(X.T @ X)
    residual_maker = np.eye(len(X)) - X @ bread @ X.T
    e = residual_maker @ data["y"].to_numpy()
    scores, weights = [], []
    for who in data["who"].unique():
        rows = (data["who"] == who).to_numpy()
        root = linalg.inv(linalg.sqrtm(np.eye(rows.sum()) - X[rows] @ bread @ X[rows].T).real)
        loading = root @ X[rows] @ bread @ contrast
        scores.append(loading @ e[rows])
        weights.append(residual_maker[rows].T @ loading)
    products = np.array(weights) @ np.array(weights).T
    return float(np.sqrt(np.sum(np.square(scores)))), float(np.trace(products) ** 2 / np.sum(products**2))


def test_yates_correction_of_a_two_by_two_table() -> None:
    a, b, c, d = 12, 30, 25, 18
    data = pd.DataFrame({"arm": ["x"] * (a + b) + ["y"] * (c + d), "said": ["no"] * a + ["yes"] * b + ["no"] * c + ["yes"] * d})
    n = a + b + c + d
    margins = (a + b) * (c + d) * (a + c) * (b + d)
    found = chi_squared(data, "said", "arm")
    assert found["statistic"] == pytest.approx(n * (abs(a * d - b * c) - n / 2) ** 2 / margins)
    assert found["estimate"] == pytest.approx(abs(a * d - b * c) / np.sqrt(margins))  # V is |φ|
    assert (found["df"], found["n"]) == (1, n)


def test_an_outcome_that_is_the_same_for_everyone_is_flagged() -> None:
    found = chi_squared(pd.DataFrame({"arm": ["x", "y"] * 4, "said": "yes"}), "said", "arm")
    assert np.isnan(found["p"]) and found["note"] == "a table of 2 x 1: nothing to compare"


def test_percentages_of_a_group_sum_to_a_hundred() -> None:
    data = pd.DataFrame({"arm": pd.Categorical(list("aabbb"), categories=["b", "a", "c"]), "said": ["no", "yes", "no", "no", "yes"]})
    found = comparisons.breakdown(data, "said", "arm")
    assert found["group"].drop_duplicates().tolist() == ["b", "a"]
    np.testing.assert_allclose(found.groupby("group")["percentage"].sum(), 100)


def test_welch_is_statsmodels() -> None:
    data = rows_of_participants({"a": [1] * 15, "b": [1] * 40})
    first, second = (weightstats.DescrStatsW(data.loc[data["arm"] == arm, "y"]) for arm in "ab")
    compared = weightstats.CompareMeans(first, second)
    statistic, p, df = compared.ttest_ind(usevar="unequal")
    lower, upper = compared.tconfint_diff(usevar="unequal")
    found = welch_tests(data, ["y"], PAIR).iloc[0]
    assert found[["statistic", "p", "df", "lower", "upper"]].astype(float).tolist() == pytest.approx([statistic, p, df, lower, upper])


def test_equivalence_is_two_one_sided_tests() -> None:
    data = rows_of_participants({"a": [1] * 60, "b": [1] * 60}, seed=3)
    tests = welch_tests(data, ["y"], PAIR)
    samples = [data.loc[data["arm"] == arm, "y"] for arm in "ab"]
    for margin in (0.1, 0.6, 1.5):
        expected, above, below = weightstats.ttost_ind(*samples, -margin, margin, usevar="unequal")
        found = equivalence(tests, margin).iloc[0]
        assert [found["p_equivalence"], found["p_above_lower"], found["p_below_upper"]] == pytest.approx([expected, above[1], below[1]])
        within = found["lower90"] > -margin and found["upper90"] < margin
        assert within == (found["p_equivalence"] < 0.05)
    with pytest.raises(ComparisonFault, match="margin is positive"):
        equivalence(tests, 0.0)


@pytest.mark.parametrize("sizes", [{"a": [4] * 6, "b": [4] * 9}, {"a": [1, 2, 3, 4, 4], "b": [4, 1, 1, 2, 7, 3]}])
def test_clustered_rows_have_the_standard_error_and_df_of_cr2(sizes: dict[str, list[int]]) -> None:
    data = rows_of_participants(sizes)
    found = welch_tests(data, ["y"], PAIR, cluster="who").iloc[0]
    se, df = cr2_by_matrices(data)
    assert found["se"] == pytest.approx(se, rel=1e-10) and found["df"] == pytest.approx(df, rel=1e-10)
    assert found["clusters"] == sum(map(len, sizes.values()))
    assert found["estimate"] == pytest.approx(welch_tests(data, ["y"], PAIR)["estimate"].item())


def test_one_row_a_participant_makes_clustering_harmless() -> None:
    data = rows_of_participants({"a": [1] * 12, "b": [1] * 20})
    plain, clustered = welch_tests(data, ["y"], PAIR).iloc[0], welch_tests(data, ["y"], PAIR, cluster="who").iloc[0]
    assert clustered["se"] == pytest.approx(plain["se"])


def test_a_participant_in_both_groups_is_refused() -> None:
    data = pd.DataFrame({"arm": list("aabb"), "who": ["p", "q", "r", "p"], "y": [1.0, 2.0, 3.0, 4.0]})
    with pytest.raises(ComparisonFault, match="y: who p has rows in both a and b"):
        welch_tests(data, ["y"], PAIR, cluster="who")


@pytest.mark.parametrize("cluster", [None, "who"])
def test_groups_that_allow_no_test_are_flagged(cluster: str | None) -> None:
    data = pd.DataFrame({"arm": list("aaab"), "who": list("pqrs"), "y": [1.0, 2.0, 3.0, 4.0]})
    alone = welch_tests(data, ["y"], PAIR, cluster=cluster).iloc[0]
    assert alone["note"] == comparisons.TOO_FEW and np.isnan(alone["p"]) and alone["n2"] == 1
    empty = welch_tests(data[data["arm"] == "a"], ["y"], PAIR, cluster=cluster).iloc[0]
    assert empty["note"] == comparisons.TOO_FEW and empty["n2"] == 0
    constant = pd.concat([data, data.assign(who=list("tuvw"), arm=list("bbba"))]).assign(y=5.0)
    assert welch_tests(constant, ["y"], PAIR, cluster=cluster)["note"].item() == comparisons.CONSTANT


def test_one_sample_against_zero() -> None:
    values = pd.DataFrame({"y": [1.0, 2.0, 4.0, np.nan], "same": 3.0, "none": np.nan})
    found = one_sample_tests(values, ["y", "same", "none"]).set_index("outcome")
    statistic, p, df = weightstats.DescrStatsW(values["y"].dropna()).ttest_mean(0)
    assert found.loc["y", ["statistic", "p", "df"]].astype(float).tolist() == pytest.approx([statistic, p, df])
    assert found["note"].tolist() == ["", comparisons.CONSTANT, comparisons.TOO_FEW]


@needs_release
@pytest.mark.parametrize(
    ("file", "source", "outcomes"),
    [
        ("goodbye_treatment_tests", "goodbye", ["goodbye_action", "goodbye_feeling_recoded"]),
        ("seeking_companionship_categorical_tests", "seeking_companionship", ["change_recoded"]),
    ],
)
def test_chi_squared_tests_are_the_published_ones(file: str, source: str, outcomes: list[str]) -> None:
    data, compared = recoded(table(source)), 0
    for outcome in outcomes:
        ours = comparisons.treatment_tests(data, outcome).set_index(["scope", "treatment"])
        for scope, by_outcome in published(file).items():
            for treatment, theirs in by_outcome.get(outcome, {}).items():
                treatment = treatment.replace("study_id", "study")
                row = ours.loc[(scope, treatment)]
                for column, name in (("statistic", "chi_sq"), ("df", "df"), ("p", "p_value"), ("min_expected", "min_expected")):
                    assert same(row[column], theirs[name][0]), (outcome, scope, treatment, column)
                    compared += 1
                if not theirs["breakdown"]:
                    continue
                rows = data if scope == "cross_study" else data[data["study"] == scope]
                groups = comparisons.breakdown(rows, outcome, treatment)
                for mine, other in zip(groups.to_dict("records"), theirs["breakdown"], strict=True):
                    assert str(mine["group"]).replace("_", "-") == str(other["group"]).replace("_", "-") and mine["level"] == other["level"]
                    assert mine["n"] == other["n"] and same(mine["percentage"], other["percentage"])
    assert compared == {"goodbye": 52, "seeking_companionship": 36}[source]
