"""Worths and win rates against closed forms, Hunter's algorithm and the values computed from the published rankings."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from relseek_assets.trials import rankings
from relseek_assets.trials.rankings import RankingError

DOSES = (-1.5, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5)
#: human_study.md, section 14
LOG_WORTHS = {
    "relationship-seeking": [-1.632, -1.139, -0.543, 0, 0.696, 1.107, 1.189],
    "preference": [-1.034, -0.637, -0.398, 0, 0.313, 0.107, -0.862],
}
WIN_RATES = {
    "relationship-seeking": [0.166, 0.241, 0.374, 0.505, 0.673, 0.756, 0.786],
    "preference": [0.302, 0.405, 0.485, 0.603, 0.680, 0.634, 0.392],
}


def lists(*orders: tuple[float, ...]) -> pd.DataFrame:
    """Rankings, the best first, a participant each."""
    rows = [(f"p{person:04d}", item, place) for person, order in enumerate(orders) for place, item in enumerate(order, 1)]
    return pd.DataFrame(rows, columns=["ppt_id", "multiplier", "place"])


def drawn(worths: dict[float, float], people: int, length: int, seed: int) -> pd.DataFrame:
    """Rankings by Plackett-Luce with known log-worths: the order of worths with Gumbel noise."""
    generator = np.random.default_rng(seed)
    items = np.array(list(worths))
    orders = []
    for _ in range(people):
        shown = generator.choice(items, length, replace=False)
        orders.append(tuple(shown[np.argsort([-(worths[item] + generator.gumbel()) for item in shown])]))
    return lists(*orders)


def raw(orders: pd.DataFrame, ranking_type: str = "preference") -> pd.DataFrame:
    """The columns of the raw file; rank 4 is best."""
    rows = []
    for person, one in orders.groupby("ppt_id"):
        row = {"ppt_id": person, "ranking_type": ranking_type, "subtask": "multi-chat"}
        for position, item, place in zip("CADB", one["multiplier"], one["place"], strict=True):
            row |= {f"{position}:multiplier": item, f"{position}:rank": 5.0 - place}
        rows.append(row)
    return pd.DataFrame(rows)


def test_two_items_have_the_log_odds_of_their_wins() -> None:
    found = rankings.plackett_luce(lists(*[(1.0, 0.0)] * 30, *[(0.0, 1.0)] * 10), pseudo=0.0)
    assert found.items == (0.0, 1.0) and found.rankings == 40
    assert found.log_worth == pytest.approx([0.0, np.log(3)], abs=1e-6)
    assert found.covariance[1, 1] == pytest.approx(1 / 30 + 1 / 10, rel=1e-5)


def test_worths_are_those_of_hunters_algorithm_with_the_ghost_written_out() -> None:
    orders = drawn({0.0: 0.0, 0.5: 0.8, 1.0: 1.5, -1.0: -1.0, -0.5: -0.4}, 40, 4, 3)
    found = rankings.plackett_luce(orders)
    # Hunter (2004), equation 30: gamma_i = wins_i / sum over choices of 1 / sum of the set, the ghost's gamma being 1.
    items = list(found.items)
    choices = [(tuple(one["multiplier"])[start:], 1.0) for _, one in orders.groupby("ppt_id") for start in range(3)]
    choices += [pair for item in items for pair in (((item, "ghost"), 0.5), (("ghost", item), 0.5))]
    worth = dict.fromkeys([*items, "ghost"], 1.0)
    for _ in range(1500):
        wins, weight = dict.fromkeys(worth, 0.0), dict.fromkeys(worth, 0.0)
        for chosen, share in choices:
            wins[chosen[0]] += share
            for item in chosen:
                weight[item] += share / sum(worth[other] for other in chosen)
        worth = {item: 1.0 if item == "ghost" else wins[item] / weight[item] for item in worth}
    assert found.log_worth == pytest.approx([np.log(worth[item] / worth[0.0]) for item in items], abs=1e-5)


def test_an_item_that_never_won_has_a_finite_worth() -> None:
    found = rankings.plackett_luce(lists(*[(1.0, 0.0, -1.0)] * 12))
    assert np.isfinite(found.log_worth).all() and list(found.log_worth) == sorted(found.log_worth)


def test_known_worths_are_recovered_within_their_errors() -> None:
    worths = dict(zip(DOSES, [-1.6, -1.1, -0.5, 0.0, 0.7, 1.1, 1.2], strict=True))
    found = rankings.plackett_luce(drawn(worths, 1500, 4, 8))
    errors = np.sqrt(np.diag(found.covariance))
    others = errors > 0
    z = (found.log_worth - np.array(list(worths.values())))[others] / errors[others]
    assert others.sum() == 6 and np.abs(z).max() < 3.5


def test_quasi_variances_of_three_items_give_every_contrast_exactly() -> None:
    found = rankings.plackett_luce(drawn({0.0: 0.0, 0.5: 0.8, 1.0: 1.5}, 200, 3, 1))
    v, q = found.covariance, found.quasi_variance
    for i, j in ((0, 1), (0, 2), (1, 2)):
        assert q[i] + q[j] == pytest.approx(v[i, i] + v[j, j] - 2 * v[i, j], rel=1e-6)


def test_quasi_variances_do_not_depend_on_the_reference() -> None:
    orders = drawn(dict(zip(DOSES, np.linspace(-1, 1, 7), strict=True)), 200, 4, 2)
    one, other = (rankings.plackett_luce(orders, reference=reference) for reference in (0.0, 1.5))
    assert one.quasi_variance == pytest.approx(other.quasi_variance, rel=1e-5)
    assert one.log_worth - one.log_worth[-1] == pytest.approx(other.log_worth, abs=1e-5)
    assert other.covariance[-1].tolist() == [0.0] * 7


def test_raw_rankings_are_read_best_first_whatever_the_positions() -> None:
    orders = lists((1.0, 0.5, 0.0, -1.0), (0.5, 1.5, -1.0, 0.0))
    pd.testing.assert_frame_equal(rankings.long_rankings(raw(orders), "preference"), orders, check_dtype=False)


def test_truncated_rankings_keep_the_order_of_what_remains() -> None:
    found = rankings.long_rankings(raw(lists((1.5, 0.5, -1.5, 0.0))), "preference", doses=(-1.0, -0.5, 0.0, 0.5, 1.0))
    assert found[["multiplier", "place"]].to_numpy().tolist() == [[0.5, 1], [0.0, 2]]


def test_win_rates_are_means_over_the_opponents_met() -> None:
    found = rankings.win_rates(lists((1.0, 0.0), (1.0, 0.0), (0.0, 1.0), (1.0, 0.5)), draws=50).set_index("multiplier")
    assert found.loc[1.0, "win_rate"] == pytest.approx((2 / 3 + 1) / 2)
    assert found.loc[0.0, "win_rate"] == pytest.approx(1 / 3)
    assert found["n"].to_dict() == {0.0: 3, 0.5: 1, 1.0: 4}


def test_a_participant_drawn_twice_counts_twice() -> None:
    # Of one pair, the win rate is a share, whose bootstrap interval is the binomial's; dropping repeats would widen it by a half.
    orders = lists(*[(1.0, 0.0)] * 240, *[(0.0, 1.0)] * 160)
    found = rankings.win_rates(orders, draws=4000, seed=3).set_index("multiplier").loc[1.0]
    error = np.sqrt(0.6 * 0.4 / 400)
    assert [found["lower"], found["upper"]] == pytest.approx([0.6 - 1.96 * error, 0.6 + 1.96 * error], abs=0.15 * error)


def test_pairs_hold_both_sides_of_a_comparison() -> None:
    found = rankings.pairwise_wins(lists((1.0, 0.0), (1.0, 0.0), (0.0, 1.0)))
    assert found.to_numpy().tolist() == [[0.0, 1.0, pytest.approx(1 / 3), 3], [1.0, 0.0, pytest.approx(2 / 3), 3]]


def test_refusals_say_what_is_wrong() -> None:
    with pytest.raises(RankingError, match=r"reference 0\.25 was never ranked"):
        rankings.plackett_luce(lists((1.0, 0.0)), reference=0.25)
    with pytest.raises(RankingError, match="never compared"):
        rankings.plackett_luce(lists((1.0, 0.0), (0.5, -0.5)))
    with pytest.raises(RankingError, match="types are"):
        rankings.long_rankings(raw(lists((1.0, 0.5, 0.0, -1.0))), "coherence")
    with pytest.raises(RankingError, match="A:rank"):
        rankings.long_rankings(raw(lists((1.0, 0.5, 0.0, -1.0))).drop(columns="A:rank"), "preference")
    tied = raw(lists((1.0, 0.5, 0.0, -1.0))).assign(**{"A:rank": 1.0, "B:rank": 1.0})
    with pytest.raises(RankingError, match="without ties"):
        rankings.long_rankings(tied, "preference")


@pytest.fixture(scope="module")
def published() -> pd.DataFrame:
    if "RELSEEK_RELEASE" not in os.environ:
        pytest.skip("RELSEEK_RELEASE is not set: the rankings are not here")
    path = Path(os.environ["RELSEEK_RELEASE"]) / "data/human_study/calibration_study/combined_ranking_tasks.jsonl"
    return pd.DataFrame(json.loads(line) for line in path.read_text().splitlines())


@pytest.mark.parametrize("ranking_type", LOG_WORTHS)
def test_worths_and_win_rates_of_the_published_rankings_are_recomputed(published: pd.DataFrame, ranking_type: str) -> None:
    orders = rankings.long_rankings(published, ranking_type)
    assert orders["ppt_id"].nunique() == 296
    assert rankings.plackett_luce(orders).log_worth.round(3).tolist() == LOG_WORTHS[ranking_type]
    assert rankings.win_rates(orders, draws=50)["win_rate"].round(3).tolist() == WIN_RATES[ranking_type]
