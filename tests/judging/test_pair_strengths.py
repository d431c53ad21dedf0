"""Strengths of doses are Bradley and Terry's, their intervals know that an item's pairs hang together, and nobody wins what was not answered."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy.special import expit
from scipy.stats import binomtest

from relseek_assets.judging import rankings
from tests.judging.baseball import GAMES, STRENGTHS, TEAMS

DOSES = (-1.0, 0.0, 1.0, 2.0)


def pair(item: str, a: float, b: float, winner: str | None, status: str = "judged", **more: Any) -> dict[str, Any]:
    keys = {"site": "m:L01", "epoch": 1, "item": item, "multiplier_a": a, "multiplier_b": b, "first_shown": None, "judge": "j"}
    return {**keys, "winner": winner, "status": status, "cost_usd": 0.0, **more}


def judged(items: int, seed: int, doses: tuple[float, ...] = DOSES, steep: float = 0.7, spread: float = 0.0) -> pd.DataFrame:
    """Every pair of doses of every item. `spread` is the sd of what an item adds to each dose: it makes the item's pairs dependent."""
    generator = np.random.default_rng(seed)
    rows = []
    for item in range(items):
        worth = steep * np.array(doses) + generator.normal(0, spread, len(doses))
        for one, two in combinations(range(len(doses)), 2):
            won = generator.random() < expit(worth[one] - worth[two])
            rows.append(pair(f"i{item:03d}", doses[one], doses[two], "a" if won else "b"))
    return pd.DataFrame(rows)


def test_strengths_of_baseball_teams_are_the_published_ones() -> None:
    wins = np.zeros((7, 7))
    for home, games in GAMES.items():
        for away, (won, lost) in games.items():
            wins[TEAMS.index(home), TEAMS.index(away)] += won
            wins[TEAMS.index(away), TEAMS.index(home)] += lost
    found = rankings.bradley_terry(wins)
    assert bool(found.maximum)
    assert found.values.mean() == pytest.approx(0, abs=1e-12)
    against = dict(zip(TEAMS, found.values - found.values[0], strict=True))
    assert {team: round(against[team], 4) for team in STRENGTHS} == STRENGTHS


def test_strengths_and_errors_are_those_of_a_logistic_regression_on_who_met() -> None:
    import statsmodels.api as sm

    pairs = judged(60, 1, spread=1.0)
    tally = rankings.tallies(pairs)
    fit = rankings.bradley_terry(tally.wins.sum(0))
    clustered, independent = rankings.covariances(tally, fit.values)
    design = np.zeros((len(pairs), 4))
    design[np.arange(len(pairs)), [DOSES.index(dose) for dose in pairs["multiplier_a"]]] = 1
    design[np.arange(len(pairs)), [DOSES.index(dose) for dose in pairs["multiplier_b"]]] = -1
    outcome = (pairs["winner"] == "a").astype(float)
    groups = pairs["item"].astype("category").cat.codes
    model = sm.GLM(outcome, design[:, 1:], family=sm.families.Binomial())
    other = model.fit(cov_type="cluster", cov_kwds={"groups": groups, "use_correction": False})
    plain = model.fit()
    np.testing.assert_allclose(fit.values[1:] - fit.values[0], other.params, atol=1e-7)
    against = np.hstack([-np.ones((3, 1)), np.eye(3)])  # strengths against the first dose
    np.testing.assert_allclose(against @ clustered @ against.T, other.cov_params() * 60 / 59, rtol=1e-5)
    np.testing.assert_allclose(against @ independent @ against.T, plain.cov_params(), rtol=1e-5)


def test_the_bootstrap_and_the_sandwich_say_the_same_and_pairs_as_if_independent_do_not() -> None:
    frame = rankings.pair_strengths(judged(150, 2, doses=(-2.0, -1.0, 0.0, 1.0, 2.0), spread=1.5), 1000, 7)
    half = (frame["upper"] - frame["lower"]) / 2
    np.testing.assert_allclose(half / 1.96, frame["se"], rtol=0.12)
    assert (frame["se"] > 1.1 * frame["se_independent"]).all()
    assert (frame["status"] == "measured").all()


def test_only_intervals_that_know_of_items_cover() -> None:
    doses, runs = np.array(DOSES), 400
    generator = np.random.default_rng(5)

    def tallied(items: int) -> rankings.Tallies:
        worth = 0.6 * doses + generator.normal(0, 1.5, (items, 4))
        won = np.triu(generator.random((items, 4, 4)) < expit(worth[:, :, None] - worth[:, None, :]), 1).astype(float)
        wins = won + np.triu(1 - won, 1).swapaxes(1, 2)
        return rankings.Tallies(doses, tuple(f"i{item}" for item in range(items)), wins, np.zeros(4), np.zeros(4))

    truth = rankings.bradley_terry(tallied(200_000).wins.sum(0)).values  # what the fit tends to with ever more items
    covered = np.zeros(2, dtype=int)
    for _ in range(runs):
        tally = tallied(60)
        fit = rankings.bradley_terry(tally.wins.sum(0)).values
        covered += [abs(fit[3] - truth[3]) < 1.96 * covariance[3, 3] ** 0.5 for covariance in rankings.covariances(tally, fit)]
    (low, high), (_, highest) = (binomtest(int(count), runs).proportion_ci() for count in covered)
    assert low <= 0.95 <= high, "clustered by item"
    assert highest < 0.93, "as if pairs were independent"


def test_a_dose_that_always_wins_is_flagged_and_has_no_interval() -> None:
    pairs = judged(30, 3)
    always = (pairs["multiplier_b"] == 2.0).to_numpy()
    pairs.loc[always, "winner"] = "b"
    frame = rankings.pair_strengths(pairs, 200, 1)
    assert frame["status"].unique().tolist() == ["no maximum of the likelihood: λ=2 won every pair"]
    assert frame["method"].str.startswith("Firth").all()
    assert np.isfinite(frame["strength"]).all() and frame["lower"].isna().all() and frame["se"].isna().all()
    best = frame[frame["multiplier"] == 2.0].iloc[0]
    assert best["strength"] == frame["strength"].max()
    assert best["win_rate"] == best["win_rate_upper"] == 1.0
    assert 0.85 < best["win_rate_lower"] < 0.9, "thirty items that all say so leave a share of 0.886 possible (Wilson)"
    slopes = rankings.pair_slopes(pairs, (), 200, 1).set_index("measure")
    assert np.isnan(slopes.loc["strength", "lower"]) and slopes.loc["strength", "status"].startswith("no maximum")
    assert slopes.loc["win_rate", "lower"] < slopes.loc["win_rate", "estimate"] < slopes.loc["win_rate", "upper"]


def test_firths_strength_of_two_doses_is_the_log_odds_with_half_a_game_more_on_either_side() -> None:
    wins = np.array([[0.0, 0.0], [9.0, 0.0]])
    found = rankings.bradley_terry(wins)
    assert not found.maximum
    assert found.values[1] - found.values[0] == pytest.approx(np.log(9.5 / 0.5))


def test_doses_that_never_met_have_no_strengths() -> None:
    pairs = pd.DataFrame([pair(f"i{number}", *doses, winner) for number in range(6) for doses in ((-1.0, 0.0), (1.0, 2.0)) for winner in "ab"])
    pairs["item"] = [f"i{number}" for number in range(len(pairs))]
    frame = rankings.pair_strengths(pairs, 100, 1)
    assert frame["strength"].isna().all()
    assert frame["status"].str.startswith("no strengths: some doses were never compared").all()
    np.testing.assert_allclose(frame["win_rate"], 0.5)


def test_ties_are_half_a_win_and_what_was_not_answered_is_nobodys() -> None:
    rows = [pair("i1", 0.0, 1.0, "b"), pair("i2", 0.0, 1.0, "a"), pair("i3", 0.0, 1.0, None, "tie"), pair("i4", 0.0, 1.0, None, "tie")]
    lost = [pair(f"u{number}", 0.0, 1.0, None, status) for number, status in enumerate(("unscored", "unreadable", "missing", "refused"))]
    frame = rankings.pair_strengths(pd.DataFrame(rows + lost), 100, 1)
    assert frame["win_rate"].tolist() == [0.5, 0.5]
    assert frame["n"].tolist() == [4, 4]
    assert frame["ties"].tolist() == [2, 2]
    assert frame["unanswered"].tolist() == [4, 4]
    assert frame["items"].tolist() == [4, 4]
    np.testing.assert_allclose(frame["strength"], 0, atol=1e-9)
    alone = rankings.pair_strengths(pd.DataFrame(lost), 100, 1)
    assert alone.empty and list(alone.columns) == list(rankings.PAIR_STRENGTHS.names)
    nothing = rankings.pair_slopes(pd.DataFrame(lost), (), 100, 1)
    assert nothing["status"].unique().tolist() == ["no answered pairs between selection doses"]


def test_the_slope_of_a_perfect_order_is_a_quarter_and_takes_selection_doses_alone() -> None:
    doses = tuple(np.arange(-2, 2.5, 0.5))  # spec/pipeline.md, section 4.4: nine doses from -2 to 2
    rows = [pair(f"i{item}", a, b, "b") for item in range(3) for a, b in combinations((*doses, 20.0), 2)]
    slopes = rankings.pair_slopes(pd.DataFrame(rows), doses, 100, 1).set_index("measure")
    assert slopes.loc["win_rate", "estimate"] == pytest.approx(0.25)
    assert slopes.loc["win_rate", "n"] == 3 * 36
    assert slopes.loc["win_rate", "doses"] == 9


def test_the_slope_of_strengths_is_the_one_that_made_the_answers() -> None:
    slopes = rankings.pair_slopes(judged(400, 4, steep=0.7), (), 400, 1).set_index("measure")
    assert slopes.loc["strength", "lower"] < 0.7 < slopes.loc["strength", "upper"]
    assert slopes.loc["strength", "upper"] - slopes.loc["strength", "lower"] < 0.2


def test_elo_is_the_published_recursion() -> None:
    ratings = rankings.elo(np.array([0, 1, 0]), np.array([1, 2, 2]), np.array([1.0, 0.5, 0.0]), 3, np.arange(3)[None])[0]
    one, two, three = 1500.0, 1500.0, 1500.0  # by hand: K = 32 from 1500
    one, two = one + 32 * 0.5, two - 32 * 0.5
    expected = 1 / (1 + 10 ** ((three - two) / 400))
    two, three = two + 32 * (0.5 - expected), three - 32 * (0.5 - expected)
    expected = 1 / (1 + 10 ** ((three - one) / 400))
    one, three = one + 32 * (0 - expected), three - 32 * (0 - expected)
    np.testing.assert_allclose(ratings, [one, two, three])
    assert ratings.sum() == pytest.approx(4500)


def test_elo_changes_with_the_order_of_the_answers_and_strengths_do_not() -> None:
    pairs = judged(80, 6, spread=1.0)
    shuffled = pairs.sample(frac=1, random_state=1)
    one, two = (rankings.pair_strengths(frame, 100, 1) for frame in (pairs, shuffled))
    np.testing.assert_allclose(one["strength"], two["strength"], atol=1e-9)
    np.testing.assert_allclose(one["lower"], two["lower"], atol=1e-9)
    assert (one["elo"] - two["elo"]).abs().max() > 5
    assert (one["elo_high"] - one["elo_low"] > 50).all(), "and by more than a step of K = 32"
    assert one["elo"].sum() == pytest.approx(1500 * len(DOSES))


def test_every_judge_is_ranked_by_itself_and_in_the_declared_form() -> None:
    one, two = judged(20, 1), judged(20, 2, steep=-0.5).assign(judge="contrarian")
    frame = rankings.pair_strengths(pd.concat([one, two], ignore_index=True), 100, 1)
    rankings.PAIR_STRENGTHS.to_arrow(frame, "strengths")
    assert frame.groupby("judge")["strength"].sum().abs().max() < 1e-9
    slopes = rankings.pair_slopes(pd.concat([one, two], ignore_index=True), DOSES, 100, 1)
    rankings.PAIR_SLOPES.to_arrow(slopes, "slopes")
    by_judge = slopes[slopes["measure"] == "strength"].set_index("judge")["estimate"]
    assert by_judge["j"] > 0 > by_judge["contrarian"]
    pd.testing.assert_frame_equal(frame, rankings.pair_strengths(pd.concat([one, two], ignore_index=True), 100, 1))
