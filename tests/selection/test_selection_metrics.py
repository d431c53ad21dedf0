"""Dose-response, areas, slopes and the choice among candidates, against pandas, numpy, normal theory and brute force."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from relseek_assets import figures
from relseek_assets.selection import metrics
from relseek_assets.selection.checks import inversions, monotone, spans, stays_coherent
from relseek_assets.selection.metrics import Candidate
from relseek_resources.storage import StorageError

NINE = tuple(np.linspace(-2, 2, 9))
SITE = "small:L15"


def scores_of(values: np.ndarray, doses: tuple[float, ...] = NINE, rubric: str = "coherence", site: str = SITE, epoch: int = 1) -> pd.DataFrame:
    """Judge scores from values (items, doses)."""
    rows = [
        {"site": site, "epoch": epoch, "multiplier": dose, "item": f"i{item:04d}", "rubric": rubric, "judge": "j", "score": values[item, column]}
        for item in range(len(values))
        for column, dose in enumerate(doses)
    ]
    return pd.DataFrame(rows)


def ordered_pairs(doses: tuple[float, ...], items: int, outcome: str = "b") -> pd.DataFrame:
    """Every pair of doses of every item: won by `a` (the smaller dose) or `b`, or a `tie`, or `unscored`."""
    return pd.DataFrame(
        {
            "site": SITE,
            "epoch": 1,
            "item": f"i{item:04d}",
            "multiplier_a": low,
            "multiplier_b": high,
            "winner": outcome if outcome in ("a", "b") else None,
            "status": "judged" if outcome in ("a", "b") else outcome,
        }
        for item in range(items)
        for low, high in combinations(sorted(doses), 2)
    )


def one_candidate(coherence: np.ndarray, rating: np.ndarray, pairs: pd.DataFrame | None = None, doses: tuple[float, ...] = NINE) -> Candidate:
    scores = pd.concat([scores_of(coherence, doses), scores_of(rating, doses, "warmth")])
    (found,) = metrics.candidates_of(metrics.candidate_items(scores, pairs, doses, "warmth"), draws=200, seed=1)
    return found


def given_figures(name: str, auc: float, rating: float, pairwise: float = np.nan, spread: float = 0.0) -> Candidate:
    """A candidate with known figures whose bootstrap draws scatter around them."""
    estimates = {"coherence_auc": auc, "rating_slope": rating, "pairwise_slope": pairwise}
    generator = np.random.default_rng(int.from_bytes(name.encode(), "big"))
    draws = {metric: value + spread * generator.standard_normal(400) for metric, value in estimates.items()}
    return Candidate(name, 1, estimates, draws, 30)


# --- dose-response ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ragged() -> pd.DataFrame:
    """Scores of two sites, two epochs and two rubrics with gaps."""
    generator = np.random.default_rng(3)
    parts = [
        scores_of(generator.uniform(1, 10, (25, 9)), rubric=rubric, site=site, epoch=epoch)
        for site in ("m:L03", "m:L15")
        for epoch in (1, 2)
        for rubric in ("coherence", "warmth")
    ]
    scores = pd.concat(parts, ignore_index=True)
    scores.loc[generator.choice(len(scores), 200, replace=False), "score"] = np.nan
    return scores.sample(frac=1, random_state=1)


def test_dose_response_gives_the_means_and_counts_of_the_scores(ragged: pd.DataFrame) -> None:
    keys = ["site", "epoch", "multiplier", "rubric", "judge"]
    found = metrics.dose_response(ragged, draws=50, seed=1).set_index(keys).sort_index()
    expected = ragged.groupby(keys)["score"].agg(["mean", "count", "size"]).sort_index()
    assert len(found) == len(expected) == 2 * 2 * 2 * 9
    np.testing.assert_allclose(found["estimate"], expected["mean"], rtol=1e-12)
    assert list(found["n"]) == list(expected["count"])
    assert list(found["unscored"]) == list(expected["size"] - expected["count"])
    assert found["unscored"].sum() == 200


def test_dose_response_fits_its_declared_table(ragged: pd.DataFrame) -> None:
    frame = metrics.dose_response(ragged, draws=50, seed=1)
    assert metrics.DOSE_RESPONSE.to_arrow(frame, "dose_response").num_rows == len(frame)


def test_intervals_of_many_items_are_those_of_normal_theory() -> None:
    values = np.random.default_rng(5).normal([4.0, 6.0], [1.0, 2.0], (900, 2))
    found = metrics.dose_response(scores_of(values, (0.0, 1.0)), draws=4000, seed=2)
    for row, column in zip(found.itertuples(), values.T, strict=True):
        error = column.std(ddof=1) / np.sqrt(900)
        low, high = stats.norm.interval(0.95, column.mean(), error)
        assert row.se == pytest.approx(error, rel=0.06)  # 4,000 draws: sd of the sd is 1.1%
        assert [row.lower, row.upper] == pytest.approx([low, high], abs=0.12 * error)  # sd of such a quantile is 0.04 errors
        assert row.estimate == pytest.approx(column.mean())


def test_a_dose_at_which_nothing_is_scored_has_no_row() -> None:
    values = np.array([[1.0, np.nan], [3.0, np.nan]])
    found = metrics.dose_response(scores_of(values, (0.0, 1.0)), draws=50, seed=1)
    assert list(found["multiplier"]) == [0.0]


def test_resamples_depend_on_the_items_and_the_seed() -> None:
    names = [f"i{number}" for number in range(30)]
    once = metrics.resamples(names, 500, 1)
    assert np.array_equal(once, metrics.resamples(names, 500, 1))
    assert not np.array_equal(once, metrics.resamples(names, 500, 2))
    assert not np.array_equal(once, metrics.resamples([*names[:-1], "other"], 500, 1))
    assert (once.sum(1) == 30).all()
    assert once.mean(0) == pytest.approx(1, abs=0.25)
    assert once.var() == pytest.approx(1 - 1 / 30, abs=0.05)


def test_candidates_share_their_draws() -> None:
    """The same vector twice has the same draws, so its difference from itself is surely nothing."""
    values = np.random.default_rng(1).uniform(1, 10, (20, 9))
    items = pd.concat(
        metrics.candidate_items(pd.concat([scores_of(values, site=site), scores_of(values, rubric="warmth", site=site)]), None, NINE, "warmth")
        for site in ("m:L03", "m:L15")
    )
    first, second = metrics.candidates_of(items, 100, 1)
    assert np.array_equal(first.draws["coherence_auc"], second.draws["coherence_auc"])
    assert first.draws["coherence_auc"].std() > 0


# --- one candidate's figures ------------------------------------------------------------------------------------------


def test_full_coherence_over_nine_doses_has_the_area_forty() -> None:
    found = one_candidate(np.full((4, 9), 10.0), np.full((4, 9), 5.0))
    assert found.estimates["coherence_auc"] == pytest.approx(40)
    assert found.draws["coherence_auc"] == pytest.approx(40)
    assert found.estimates["rating_slope"] == pytest.approx(0)


def test_coherence_area_is_a_trapezoid_by_hand() -> None:
    doses = (-2.0, -0.5, 0.0, 2.0)  # steps of 1.5, 0.5 and 2
    coherence = np.array([[2.0, 6.0, 9.0, 4.0], [4.0, 8.0, 9.0, 2.0]])  # means 3, 7, 9, 3
    found = one_candidate(coherence, coherence, doses=doses)
    assert found.estimates["coherence_auc"] == pytest.approx(1.5 * 5 + 0.5 * 8 + 2 * 6)


def test_rating_slope_is_the_least_squares_line_through_the_means() -> None:
    doses = (-2.0, -0.5, 0.0, 2.0)
    rating = np.random.default_rng(8).uniform(1, 10, (13, 4))
    found = one_candidate(rating, rating, doses=doses)
    assert found.estimates["rating_slope"] == pytest.approx(np.polyfit(doses, rating.mean(0), 1)[0])


def test_the_draws_of_a_slope_scatter_as_its_standard_error() -> None:
    rating = np.random.default_rng(8).normal(5, 1, (400, 9))
    found = one_candidate(rating, rating)
    error = np.sqrt((rating.var(axis=0, ddof=1) / 400 * np.array(NINE) ** 2).sum()) / (np.array(NINE) ** 2).sum()
    assert found.draws["rating_slope"].std() == pytest.approx(error, rel=0.2)  # 200 draws: sd of the sd is 5%; sample covariances add to it


@pytest.mark.parametrize(("outcome", "expected"), [("b", 0.25), ("a", -0.25), ("tie", 0.0)])
def test_perfect_order_over_nine_doses_has_the_pairwise_slope_a_quarter(outcome: str, expected: float) -> None:
    values = np.ones((3, 9))
    assert one_candidate(values, values, ordered_pairs(NINE, 3, outcome)).estimates["pairwise_slope"] == pytest.approx(expected)


def test_a_tie_is_half_a_win_and_an_unscored_pair_no_match() -> None:
    doses = (-1.0, 0.0, 1.0)
    pairs = ordered_pairs(doses, 1)
    pairs["status"] = ["tie", "judged", "unscored"]  # (-1, 0), (-1, 1), (0, 1)
    pairs["winner"] = [None, "b", None]
    items = metrics.candidate_items(scores_of(np.ones((1, 3)), doses), pairs, doses, "warmth").set_index("multiplier")
    assert items["wins"].to_dict() == {-1.0: 0.5, 0.0: 0.5, 1.0: 1.0}
    assert items["matches"].to_dict() == {-1.0: 2, 0.0: 1, 1.0: 1}
    found = one_candidate(np.ones((1, 3)), np.ones((1, 3)), pairs, doses)
    assert found.estimates["pairwise_slope"] == pytest.approx(np.polyfit(doses, [0.25, 0.5, 1.0], 1)[0])


def test_pairs_and_scores_beyond_the_selection_doses_do_not_count() -> None:
    wide = (-4.0, *NINE, 4.0)
    scores = pd.concat([scores_of(np.ones((2, 11)), wide), scores_of(np.ones((2, 11)), wide, "warmth")])
    inside = metrics.candidate_items(scores, ordered_pairs(wide, 2), NINE, "warmth")
    assert sorted(inside["multiplier"].unique()) == sorted(NINE)
    assert (inside["matches"] == 8).all()
    (found,) = metrics.candidates_of(inside, 10, 1)
    assert found.estimates["pairwise_slope"] == pytest.approx(0.25)


def test_items_keep_their_own_scores_side_by_side() -> None:
    coherence, rating = np.array([[1.0, 2.0], [3.0, np.nan]]), np.array([[5.0, 6.0], [7.0, 8.0]])
    scores = pd.concat([scores_of(coherence, (0.0, 1.0)), scores_of(rating, (0.0, 1.0), "warmth")]).sample(frac=1, random_state=2)
    items = metrics.candidate_items(scores, None, (0.0, 1.0), "warmth").set_index(["item", "multiplier"])
    assert items.loc[("i0000", 1.0), ["coherence", "rating"]].tolist() == [2.0, 6.0]
    assert np.isnan(items.loc[("i0001", 1.0), "coherence"])
    assert items.loc[("i0001", 1.0), "rating"] == 8.0
    assert items["wins"].isna().all()
    assert metrics.CANDIDATE_ITEMS.to_arrow(items.reset_index(), "items").num_rows == 4


# --- among candidates -------------------------------------------------------------------------------------------------


def test_z_scores_use_the_population_sd() -> None:
    values = np.array([1.0, 4.0, 4.0, 9.0])
    np.testing.assert_allclose(metrics.z_scores(values), stats.zscore(values, ddof=0))
    columns = np.random.default_rng(1).normal(size=(6, 5))
    np.testing.assert_allclose(metrics.z_scores(columns), stats.zscore(columns, axis=0, ddof=0))


@pytest.mark.parametrize("value", [0.0, 0.1, 1 / 3, 32.2])
@pytest.mark.parametrize("count", [1, 3, 7])
def test_equal_figures_have_no_z_scores_however_their_mean_rounds(value: float, count: int) -> None:
    assert np.isnan(metrics.z_scores(np.full(count, value))).all()


FIGURES = [("a", 30.0, 1.0, 0.10), ("b", 32.0, 2.0, 0.24), ("c", 36.0, 1.5, 0.12), ("d", 20.0, 2.2, 0.23)]


def test_the_score_is_the_mean_of_both_z_scores() -> None:
    frame = metrics.selection([given_figures(*row) for row in FIGURES])
    auc, rating, pairwise = (stats.zscore([row[column] for row in FIGURES]) for column in (1, 2, 3))
    np.testing.assert_allclose(frame["score"].astype(float), (auc + pairwise) / 2)
    np.testing.assert_allclose(frame["rating_score"].astype(float), (auc + rating) / 2)
    assert list(frame["site"][frame["selected"]]) == [FIGURES[int(np.argmax(auc + pairwise))][0]] == ["b"]
    assert (frame["candidates"] == 4).all()
    assert (frame["reason"] == "").all()
    assert list(frame["pareto"]) == [False, True, True, False]


def test_the_selection_fits_its_declared_table() -> None:
    for rows in (FIGURES, FIGURES[:1], [row[:3] for row in FIGURES]):
        frame = metrics.selection([given_figures(*row) for row in rows])
        assert metrics.SELECTION.to_arrow(frame, "selection").num_rows == len(rows)


def test_without_pairs_the_rating_decides_and_the_reason_is_given() -> None:
    frame = metrics.selection([given_figures(*row[:3]) for row in FIGURES])
    expected = (stats.zscore([row[1] for row in FIGURES]) + stats.zscore([row[2] for row in FIGURES])) / 2
    assert frame["score"].isna().all()
    assert frame["pareto"].isna().all()
    np.testing.assert_allclose(frame["rating_score"].astype(float), expected)
    assert int(np.argmax(frame["selected"])) == int(np.argmax(expected))
    assert all("no pairwise slopes" in reason for reason in frame["reason"])


def test_one_candidate_is_selected_without_a_score_and_says_why() -> None:
    frame = metrics.selection([given_figures(*FIGURES[0])])
    assert frame[["score", "rating_score"]].isna().all(axis=None)
    assert list(frame["selected"]) == [True]
    assert list(frame["selected_share"]) == [1.0]
    assert list(frame["pareto"]) == [True]
    assert "one candidate" in frame["reason"][0]


def test_equal_candidates_have_no_scores_and_none_is_selected() -> None:
    frame = metrics.selection([given_figures(name, 0.1, 0.1, 0.1) for name in "abc"])
    assert frame[["score", "rating_score"]].isna().all(axis=None)
    assert not frame["selected"].any()
    assert all("same figures" in reason for reason in frame["reason"])
    assert list(frame["pareto"]) == [True, True, True]
    assert not metrics.sensitivity([given_figures(name, 0.1, 0.1, 0.1) for name in "abc"])["best"].any()


def test_a_candidate_without_coherence_leaves_the_others_as_they_are_without_it() -> None:
    finite = [given_figures(*row, spread=0.05) for row in FIGURES]
    gone = replace(given_figures("e", np.nan, 9.0, 0.9), gaps={"coherence_auc": (-2.0, 0.5)})
    alone, beside = metrics.selection(finite), metrics.selection([*finite, gone])
    pd.testing.assert_frame_equal(beside.head(4).astype({"pareto": bool}), alone)
    left_out = beside.iloc[4]
    assert np.isnan(left_out["score"])
    assert np.isnan(left_out["rating_score"])
    assert left_out["pareto"] is None
    assert not left_out["selected"]
    assert left_out["selected_share"] == 0
    assert left_out["reason"] == "no coherence at λ = -2, 0.5: not a candidate"
    assert (beside["candidates"] == 4).all()
    sure, other = metrics.sensitivity(finite), metrics.sensitivity([*finite, gone])
    pd.testing.assert_frame_equal(other[other["site"] != "e"].reset_index(drop=True), sure)
    assert other.loc[other["site"] == "e", "score"].isna().all()
    assert not other.loc[other["site"] == "e", ["best", "share"]].any(axis=None)
    figures.pareto(beside)


def test_with_one_candidate_that_has_coherence_it_is_the_one_selected() -> None:
    frame = metrics.selection([given_figures("e", np.nan, 9.0, 0.9), given_figures(*FIGURES[0])])
    assert list(frame["selected"]) == [False, True]
    assert list(frame["selected_share"]) == [0, 1]
    assert list(frame["candidates"]) == [1, 1]
    assert frame["score"].isna().all()
    assert "no coherence auc" in frame["reason"][0]
    assert "one candidate" in frame["reason"][1]


@pytest.mark.parametrize("names", ["a", "abc"])
def test_without_any_coherence_nobody_is_selected_and_every_reason_says_so(names: str) -> None:
    values = np.full((4, 9), 5.0)
    silent = values.copy()
    silent[:, 2] = np.nan
    candidates = [replace(one_candidate(silent, values), site=name) for name in names]
    frame = metrics.selection(candidates)
    assert not frame["selected"].any()
    assert (frame["candidates"] == 0).all()
    assert all(reason == "no coherence at λ = -1: not a candidate" for reason in frame["reason"])
    assert metrics.SELECTION.to_arrow(frame, "selection").num_rows == len(names)
    figures.pareto(frame)
    weighed = metrics.sensitivity(candidates)
    assert not weighed[["best", "share"]].any(axis=None)
    assert metrics.SELECTION_SENSITIVITY.to_arrow(weighed, "selection_sensitivity").num_rows == 11 * len(names)


def test_without_any_candidate_the_error_says_what_to_score() -> None:
    with pytest.raises(StorageError, match="no candidate: no vector has a rating and a coherence score"):
        metrics.candidates_of(pd.DataFrame(columns=list(metrics.CANDIDATE_ITEMS.names)), 100, 1)


def test_a_draw_that_leaves_one_candidate_without_coherence_counts_for_nobody() -> None:
    finite = [given_figures(*row, spread=0.05) for row in FIGURES]
    finite[3].draws["coherence_auc"][:100] = np.nan
    shares = metrics.selection(finite)["selected_share"]
    assert shares.sum() == pytest.approx(0.75)


def test_intervals_hold_the_middle_95_percent_of_the_draws() -> None:
    found = given_figures("a", 30.0, 1.0, 0.1, spread=0.05)
    frame = metrics.selection([found, given_figures("b", 31.0, 1.2, 0.2, spread=0.05)])
    low, high = frame.loc[0, ["rating_slope_lower", "rating_slope_upper"]]
    inside = (found.draws["rating_slope"] >= low) & (found.draws["rating_slope"] <= high)
    assert inside.mean() == pytest.approx(0.95, abs=0.005)


def test_a_planted_better_vector_is_selected_and_surely() -> None:
    generator = np.random.default_rng(12)
    doses = np.array(NINE)
    items = []
    for site, steer, fall in (("m:L03", 0.6, 0.3), ("m:L09", 2.0, 0.3), ("m:L15", 0.9, 1.2)):
        rating = 5 + steer * doses + generator.normal(0, 0.5, (40, 9))
        coherence = 9 - fall * doses**2 + generator.normal(0, 0.5, (40, 9))
        scores = pd.concat([scores_of(coherence, site=site), scores_of(rating, rubric="warmth", site=site)])
        pairs = ordered_pairs(NINE, 40).assign(site=site)
        higher = generator.random(len(pairs)) < 0.5 + steer / 5
        pairs["winner"] = np.where(higher, "b", "a")
        items.append(metrics.candidate_items(scores, pairs, NINE, "warmth"))
    candidates = metrics.candidates_of(pd.concat(items), 300, 4)
    frame = metrics.selection(candidates)
    chosen = frame[frame["selected"]]
    assert list(chosen["site"]) == ["m:L09"]
    assert chosen["selected_share"].iloc[0] > 0.95
    assert frame["selected_share"].sum() == pytest.approx(1)
    assert chosen["pareto"].iloc[0]
    assert chosen["rating_slope_lower"].iloc[0] < 2.0 < chosen["rating_slope_upper"].iloc[0]


# ties are what the definition is about, so the coordinates come from few values
COORDINATES = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=12)


@settings(deadline=None)
@given(COORDINATES)
def test_the_pareto_set_is_what_nobody_beats(points: list[tuple[int, int]]) -> None:
    def beaten(mine: tuple[int, int]) -> bool:
        return any(other[0] >= mine[0] and other[1] >= mine[1] and other != mine for other in points)

    assert list(metrics.pareto_set(np.array(points, dtype=float))) == [not beaten(mine) for mine in points]


def test_winners_share_out_the_draws() -> None:
    draws = np.array([[3.0, 1.0, 2.0, np.nan], [1.0, 2.0, 3.0, 1.0]])
    assert list(metrics.winners(draws)) == [0.25, 0.5]  # the fourth draw, without finite scores, is nobody's
    assert list(metrics.winners(np.full((2, 3), np.nan))) == [0.0, 0.0]


# --- sensitivity ------------------------------------------------------------------------------------------------------


def test_sensitivity_weighs_coherence_from_nothing_to_all() -> None:
    frame = metrics.sensitivity([given_figures(*row) for row in FIGURES])
    assert sorted(frame["weight"].unique()) == pytest.approx([0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1])
    assert (frame.groupby("weight")["best"].sum() == 1).all()
    best = frame[frame["best"]].set_index("weight")["site"]
    assert best[0.0] == max(FIGURES, key=lambda row: row[3])[0] == "b"
    assert best[1.0] == max(FIGURES, key=lambda row: row[1])[0] == "c"
    auc, pairwise = (stats.zscore([row[column] for row in FIGURES]) for column in (1, 3))
    at = frame[frame["weight"] == 0.3]
    np.testing.assert_allclose(at["score"].astype(float), 0.3 * auc + 0.7 * pairwise)


def test_sensitivity_at_one_half_is_the_selection() -> None:
    candidates = [given_figures(*row, spread=0.2) for row in FIGURES]
    half = metrics.sensitivity(candidates).query("weight == 0.5")
    chosen = metrics.selection(candidates)
    np.testing.assert_allclose(half["score"].astype(float), chosen["score"].astype(float))
    assert list(half["best"]) == list(chosen["selected"])
    np.testing.assert_allclose(half["share"], chosen["selected_share"])


def test_sensitivity_without_pairs_uses_the_rating() -> None:
    frame = metrics.sensitivity([given_figures(*row[:3]) for row in FIGURES])
    best = frame[frame["best"]].set_index("weight")["site"]
    assert best[0.0] == max(FIGURES, key=lambda row: row[2])[0] == "d"
    assert metrics.SELECTION_SENSITIVITY.to_arrow(frame, "sensitivity").num_rows == 11 * 4


# --- the check of the curve -------------------------------------------------------------------------------------------


def test_inversions_are_the_falls_between_neighbouring_doses() -> None:
    curve = pd.DataFrame({"multiplier": [1.0, 0.0, 0.5, 1.5], "estimate": [5.0, 4.0, 4.5, 4.2], "upper": [5.5, 4.5, 5.0, 4.9]})
    assert inversions(curve) == [(1.0, 1.5, False)]
    assert inversions(curve.assign(upper=5.5)) == [(1.0, 1.5, True)]
    assert inversions(curve[curve["multiplier"] <= 1.0]) == []


def means(values: dict[float, float]) -> pd.DataFrame:
    return pd.DataFrame({"multiplier": list(values), "estimate": list(values.values()), "upper": [value + 0.2 for value in values.values()]})


@pytest.mark.parametrize(("top", "passed"), [(6.0, True), (5.9, False)])
def test_the_disposition_has_to_move_by_three_points(top: float, passed: bool) -> None:
    found, shown = spans(means({-1.0: 3.0, 0.0: 4.0, 1.0: top}))
    assert found is passed
    assert shown["span"] == pytest.approx(top - 3)


@pytest.mark.parametrize(("low", "passed"), [(8.0, True), (7.9, False)])
def test_coherence_may_fall_by_a_point_at_small_doses_and_by_more_beyond(low: float, passed: bool) -> None:
    found, shown = stays_coherent(means({-1.5: 2.0, -1.0: low, 0.0: 9.0, 1.0: 8.9, 2.0: 1.0}))
    assert found is passed
    assert (shown["furthest"], shown["at"]) == (pytest.approx(9 - low), -1.0)


@pytest.mark.parametrize("values", [{}, {0.0: 5.0}, {0.0: 5.0, 2.0: 5.0}, {-2.0: 5.0, -1.0: 5.0}])
def test_studies_without_such_doses_do_not_fail(values: dict[float, float]) -> None:
    for check in (spans, stays_coherent):
        passed, shown = check(means(values))
        assert passed
        assert "not applicable" in shown


def test_a_curve_that_falls_twice_is_not_monotone() -> None:
    assert monotone(means({-1.0: 3.0, 0.0: 4.0, 1.0: 3.9}))[0]
    assert not monotone(means({-1.0: 3.0, 0.0: 4.0, 1.0: 3.9, 2.0: 3.8}))[0]
