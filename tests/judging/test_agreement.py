"""Agreement is what the papers that defined it computed, and its intervals resample items."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy.stats import spearmanr
from scipy.stats import t as student

from relseek_assets.judging import agreement, published
from relseek_resources.release import Release, read_ratings, read_rescores

# Krippendorff, "Computing Krippendorff's Alpha-Reliability" (2011), section D: four observers, twelve units; 0 is missing
OBSERVERS = np.array(
    [
        [1, 2, 3, 3, 2, 1, 4, 1, 2, 0, 0, 0],
        [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, 0, 3],
        [0, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, 0],
        [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, 0],
    ],
    dtype=float,
)
OBSERVERS[OBSERVERS == 0] = np.nan
# Bland and Altman (1986), Table 1: first readings of peak expiratory flow by a large and a mini meter, litres a minute
LARGE = (494, 395, 516, 434, 476, 557, 413, 442, 650, 433, 417, 656, 267, 478, 178, 423, 427)
MINI = (512, 430, 520, 428, 500, 600, 364, 380, 658, 445, 432, 626, 260, 477, 259, 350, 451)


def scored(judges: dict[str, Any], items: int, doses: int = 1, rubric: str = "warmth") -> pd.DataFrame:
    """Rows of judge_scores; each judge's scores are (items, doses), NaN where there is none."""
    parts = []
    for judge, scores in judges.items():
        grid = np.asarray(scores, dtype=float).reshape(items, doses)
        cells = {"item": np.repeat([f"i{item:03d}" for item in range(items)], doses), "multiplier": np.tile(np.arange(doses, dtype=float), items)}
        parts.append(pd.DataFrame({"site": "m:L01", "epoch": 1, **cells, "rubric": rubric, "judge": judge, "score": grid.ravel()}))
    return pd.concat(parts, ignore_index=True)


def measures(frame: pd.DataFrame, first: str, second: str, column: str = "estimate") -> pd.Series:
    return frame[(frame["judge_a"] == first) & (frame["judge_b"] == second)].set_index("measure")[column]


def related(items: int, doses: int, seed: int) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(seed)
    true = 4 + generator.normal(0, 1, (items, 1)) + np.arange(doses) * 0.6 + generator.normal(0, 0.8, (items, doses))
    return {name: np.clip(np.rint(true + shift + generator.normal(0, 1, true.shape)), 1, 10) for name, shift in (("one", 0.0), ("two", 0.7))}


@pytest.mark.parametrize(("metric", "published"), [("interval", 0.849), ("ordinal", 0.815)])
def test_alpha_of_four_observers_is_krippendorffs(metric: str, published: float) -> None:
    assert round(float(agreement.krippendorff_alpha(OBSERVERS, metric)[0]), 3) == published


def test_alpha_over_all_judges_stands_in_the_table() -> None:
    frame = agreement.judge_agreement(scored({f"o{number}": row for number, row in enumerate(OBSERVERS)}, 12), 200, 1)
    found = measures(frame, "all", "all")
    assert {name: round(value, 3) for name, value in found.items()} == {"alpha_interval": 0.849, "alpha_ordinal": 0.815}
    assert measures(frame, "all", "all", "n").unique().tolist() == [11], "one unit has a single observer"


def test_limits_of_agreement_of_flow_meters_are_bland_and_altmans() -> None:
    frame = agreement.judge_agreement(scored({"large": LARGE, "mini": MINI}, 17), 2000, 1)
    found = measures(frame, "large", "mini")
    assert -found["bias"] == pytest.approx(-2.1, abs=0.05), "they give large less mini"
    sd = (found["limit_high"] - found["limit_low"]) / (2 * 1.96)
    assert sd == pytest.approx(38.8, abs=0.05)
    differences = np.array(MINI) - np.array(LARGE)
    half = student.ppf(0.975, 16) * sd / 17**0.5
    low, high = (measures(frame, "large", "mini", end)["bias"] for end in ("lower", "upper"))
    assert high - low == pytest.approx(2 * half, rel=0.2), "of one row an item, their interval"
    middle = (np.array(MINI) + np.array(LARGE)) / 2
    assert found["difference_slope"] == pytest.approx(np.polyfit(middle, differences, 1)[0])


def test_limits_have_the_width_that_bland_and_altman_give_them() -> None:
    generator = np.random.default_rng(2)
    first = generator.normal(5, 1, 400)
    frame = agreement.judge_agreement(scored({"a": first, "b": first + generator.normal(0.3, 0.5, 400)}, 400), 2000, 1)
    spread = 0.5 * (1 / 400 + 1.96**2 / (2 * 399)) ** 0.5  # Bland and Altman 1999, section 2
    for name, centre in (("limit_low", 0.3 - 1.96 * 0.5), ("limit_high", 0.3 + 1.96 * 0.5)):
        low, high = (measures(frame, "a", "b", end)[name] for end in ("lower", "upper"))
        assert low < centre < high
        assert high - low == pytest.approx(2 * 1.96 * spread, rel=0.12)


def test_kappa_alpha_and_correlations_are_those_of_other_libraries() -> None:
    from sklearn.metrics import cohen_kappa_score

    judges = related(80, 5, 3)
    frame = agreement.judge_agreement(scored(judges, 80, 5), 100, 1)
    found = measures(frame, "one", "two")
    one, two = judges["one"].ravel(), judges["two"].ravel()
    assert found["weighted_kappa"] == pytest.approx(cohen_kappa_score(one, two, weights="quadratic"))
    assert found["spearman"] == pytest.approx(spearmanr(one, two).statistic)
    assert found["pearson"] == pytest.approx(np.corrcoef(one, two)[0, 1])
    centred = [values - values.mean(0) for values in judges.values()]
    assert found["pearson_within_doses"] == pytest.approx(np.corrcoef(*(values.ravel() for values in centred))[0, 1])
    assert found["share_unchanged"] == pytest.approx((one == two).mean())
    assert found["bias"] == pytest.approx((two - one).mean())
    for metric in ("interval", "ordinal"):
        assert found[f"alpha_{metric}"] == pytest.approx(float(agreement.krippendorff_alpha(np.stack([one, two]), metric)[0]))
    # krippendorff 0.9.0 on the same rows
    assert (round(found["alpha_interval"], 10), round(found["alpha_ordinal"], 10)) == KRIPPENDORFF


KRIPPENDORFF = (0.6121920095, 0.5712308052)


def test_a_draw_of_items_counts_rows_as_often_as_their_item_was_drawn() -> None:
    judges = related(6, 4, 4)
    one, two = judges["one"].ravel(), judges["two"].ravel()
    counts = np.array([2, 0, 1, 3, 0, 0])
    rows = np.repeat(np.arange(24), np.repeat(counts, 4))
    weights = np.repeat(counts, 4).astype(float)[None]
    found = agreement.of_ranks(one, two, weights)
    assert found["spearman"][0] == pytest.approx(spearmanr(one[rows], two[rows]).statistic)
    repeated = np.stack([one[rows], two[rows]])
    assert found["alpha_ordinal"][0] == pytest.approx(float(agreement.krippendorff_alpha(repeated, "ordinal")[0]))
    three = np.stack([one, two, np.where(np.arange(24) % 3, one, np.nan)])
    for metric in ("interval", "ordinal"):
        drawn = agreement.krippendorff_alpha(three, metric, weights)
        assert drawn[0] == pytest.approx(float(agreement.krippendorff_alpha(three[:, rows], metric)[0]))


def test_intervals_are_as_wide_as_few_items_make_them() -> None:
    judges = related(30, 1, 5)
    many = {name: np.repeat(scores, 8, axis=1) for name, scores in judges.items()}  # each item eight times over: no more is known
    narrow, wide = (agreement.judge_agreement(scored(found, 30, doses), 500, 1) for found, doses in ((judges, 1), (many, 8)))
    for name in ("bias", "pearson", "weighted_kappa"):
        widths = [measures(frame, "one", "two", "upper")[name] - measures(frame, "one", "two", "lower")[name] for frame in (narrow, wide)]
        assert widths[0] == pytest.approx(widths[1], rel=1e-6)


def test_doses_alone_can_make_judges_agree() -> None:
    generator = np.random.default_rng(6)
    shift = np.linspace(1, 9, 9)
    judges = {name: shift + generator.normal(0, 0.5, (100, 9)) for name in ("a", "b")}
    found = measures(agreement.judge_agreement(scored(judges, 100, 9), 200, 1), "a", "b")
    assert found["pearson"] > 0.95
    assert abs(found["pearson_within_doses"]) < 0.1


def test_real_valued_scores_are_rounded_for_kappa_alone() -> None:
    assert agreement.rounded(np.array([1.49, 1.5, 2.5, 9.99])).tolist() == [1, 2, 3, 10]
    first, second = np.array([1.2, 2.4, 3.1, 4.9, 6.2, 7.7]), np.array([1.4, 1.6, 3.4, 5.3, 6.4, 8.2])
    found = measures(agreement.judge_agreement(scored({"a": first, "b": second}, 6), 100, 1), "a", "b")
    assert found["weighted_kappa"] == pytest.approx(1.0), "the integers are the same"
    assert found["alpha_interval"] < 1
    assert found["share_unchanged"] == 0


def test_drift_is_the_comparison_of_a_judge_with_itself_at_another_date() -> None:
    judges = related(60, 3, 7)
    later = np.clip(judges["one"] + (np.random.default_rng(1).random((60, 3)) < 0.25), 1, 10)
    frame = agreement.judge_agreement(
        scored({"gpt": judges["one"], "gpt@2026-01": later, "gpt@2026-02": judges["one"], "mini": judges["two"]}, 60, 3), 300, 1
    )
    assert set(frame.loc[frame["comparison"] == "dates", "judge_b"]) == {"gpt@2026-01", "gpt@2026-02"}
    assert set(frame.loc[frame["judge_b"] == "mini", "comparison"]) == {"judges"}
    moved = frame[(frame["judge_a"] == "gpt") & (frame["judge_b"] == "gpt@2026-01")].set_index("measure")
    assert moved.loc["bias", "estimate"] == pytest.approx((later - judges["one"]).mean()), "later less earlier"
    assert moved.loc["bias", "lower"] > 0
    assert moved.loc["share_unchanged", "estimate"] == pytest.approx((later == judges["one"]).mean())
    same = measures(frame, "gpt", "gpt@2026-02")
    assert (same["share_unchanged"], same["bias"]) == (1, 0)
    assert same["weighted_kappa"] == pytest.approx(1)


def test_judges_that_share_no_row_or_never_differ_say_so() -> None:
    apart = {"a": [1, 2, 3, np.nan, np.nan, np.nan], "b": [np.nan, np.nan, np.nan, 1, 2, 3]}
    frame = agreement.judge_agreement(scored(apart, 6), 100, 1)
    assert frame["status"].unique().tolist() == ["no rows in common"]
    assert frame["estimate"].isna().all() and (frame["n"] == 0).all()
    constant = agreement.judge_agreement(scored({"a": [5] * 6, "b": [1, 2, 3, 4, 5, 6]}, 6), 100, 1)
    assert np.isnan(measures(constant, "a", "b").astype(float)["pearson"])
    assert measures(constant, "a", "b", "status")["pearson"].startswith("undefined")
    assert measures(constant, "a", "b")["bias"] == pytest.approx(-1.5)
    agreement.JUDGE_AGREEMENT.to_arrow(frame, "agreement")
    agreement.JUDGE_AGREEMENT.to_arrow(constant, "agreement")
    assert agreement.judge_agreement(scored({"a": [1, 2, 3, 4, 5, 6]}, 6), 100, 1).empty


def test_vectors_are_pooled_by_adding_their_sums_and_items_are_drawn_once() -> None:
    parts = [scored(related(40, 3, seed), 40, 3).assign(site=f"m:L0{seed}") for seed in (1, 2, 3)]
    sums = agreement.pooled([agreement.agreement_sums(part) for part in parts])
    agreement.AGREEMENT_SUMS.to_arrow(sums, "sums")
    frame = agreement.study_agreement(sums, 300, 1)
    agreement.STUDY_AGREEMENT.to_arrow(frame, "study")
    together = agreement.judge_agreement(
        pd.concat(parts).assign(multiplier=lambda rows: rows["multiplier"] + 10 * rows["site"].str[-1].astype(int), site="m"), 300, 1
    )
    for column in ("estimate", "lower", "upper", "n", "items"):
        one, two = measures(frame, "one", "two", column), measures(together, "one", "two", column)
        assert set(one.index) == {
            "weighted_kappa",
            "alpha_interval",
            "pearson",
            "bias",
            "limit_low",
            "limit_high",
            "difference_slope",
            "share_unchanged",
        }
        np.testing.assert_allclose(one.astype(float), two[one.index].astype(float), rtol=1e-9)
    assert agreement.agreement_sums(scored({"a": [1, 2, 3]}, 3)).empty


@pytest.mark.skipif("RELSEEK_RELEASE" not in os.environ, reason="RELSEEK_RELEASE is not set: the published scores are not here")
def test_two_published_judges_agree_on_more_than_the_dose() -> None:
    """GPT-4o's ratings of one vector and GPT-4.1-mini's of 500 of the same replies (spec/pipeline.md, section 8)."""
    from sklearn.metrics import cohen_kappa_score

    vector = ("Llama-3.1-70B-Instruct", 31, 10)
    release = Release.from_environment()
    again = release.rescored_file(*vector)
    if again is None:
        pytest.skip("the replies that were scored again are not in RELSEEK_RELEASE")
    ratings = {rubric: read_ratings(path) for rubric, path in release.rating_files(*vector).items()}
    scores = published.ratings_by_dose("llama31-70b:L31", 10, ratings, read_rescores(again, *vector))
    frame = agreement.judge_agreement(scores, 300, 42)
    (first, second), one = sorted(scores["judge"].unique()), scores[scores["rubric"] == "relationship"]
    wide = one.pivot_table(index=["item", "multiplier"], columns="judge", values="score").dropna()
    found = measures(frame, first, second)
    assert measures(frame, first, second, "n").unique().tolist() == [len(wide)] == [500]
    assert found["weighted_kappa"] == pytest.approx(cohen_kappa_score(wide[first], wide[second], weights="quadratic"))
    assert found["bias"] == pytest.approx((wide[second] - wide[first]).mean())
    assert 0.6 < found["pearson_within_doses"] < found["pearson"] - 0.1
    assert set(frame["rubric"]) == {"relationship"}, "coherence has one judge"
