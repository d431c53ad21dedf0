"""Published ratings and comparisons as rows of this project: who judged, what is off the scale, what is missing, and who wins a pair."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pandas as pd
import pytest

from relseek_assets.judging import published, tables

SITE, EPOCH = "big:L01", 3
DOSES = (-1.0, 0.0, 2.0)


def ratings(scores: dict[tuple[str, float], float]) -> pd.DataFrame:
    rows = [{"item": item, "multiplier": dose, "score": score} for (item, dose), score in scores.items()]
    return pd.DataFrame(rows).assign(prompt_tokens=800, completion_tokens=6, total_cost=0.002)


def cell(frame: pd.DataFrame, **where: object) -> pd.Series:
    (row,) = (row for _, row in frame.iterrows() if all(row[name] == value for name, value in where.items()))
    return row


def test_a_score_off_the_scale_keeps_its_value_because_the_published_means_count_it_and_says_that_it_is_off() -> None:
    frame = published.ratings_by_dose(SITE, EPOCH, {"coherence": ratings({("1", 0.0): 0, ("2", 0.0): 10, ("3", 0.0): 1})}, None)
    assert cell(frame, item="1")[["score", "status"]].tolist() == [0, "out_of_range"]
    assert set(frame.loc[frame["item"] != "1", "status"]) == {"scored"}
    tables.LANGUAGE_SCORES.to_arrow(frame[list(tables.LANGUAGE_SCORES.names)], "scores")


def test_a_reply_that_one_rubric_lacks_is_a_row_with_a_status_and_no_invented_cost() -> None:
    whole = {(item, dose): 5.0 for item in "12" for dose in DOSES}
    part = {key: score for key, score in whole.items() if key != ("2", 2.0)}
    frame = published.ratings_by_dose(SITE, EPOCH, {"coherence": ratings(whole), "relationship": ratings(part)}, None)
    assert len(frame) == 12
    missing = frame[frame["status"] != "scored"]
    assert missing[["rubric", "item", "multiplier", "status"]].to_numpy().tolist() == [["relationship", "2", 2.0, "missing"]]
    assert missing[["score", "cost_usd", "prompt_tokens"]].isna().all(axis=None)
    assert frame["cost_usd"].sum() == pytest.approx(11 * 0.002)


def test_replies_that_were_scored_again_have_two_judges() -> None:
    again = pd.DataFrame({"item": ["1", "2"], "multiplier": [0.0, 0.0], "relationship_score": [7.0, np.nan]})
    frame = published.ratings_by_dose(SITE, EPOCH, {"relationship": ratings({("1", 0.0): 6, ("2", 0.0): 4})}, again)
    both = frame.pivot_table(index="item", columns="judge", values="score", dropna=False)
    assert both.loc["1"].to_dict() == {"gpt-4o-2024-08-06": 6, "gpt-4.1-mini": 7}
    assert cell(frame, item="2", judge="gpt-4.1-mini")["status"] == "missing"
    assert frame.loc[frame["judge"] == "gpt-4.1-mini", "cost_usd"].isna().all(), "what was paid for it is not published"
    assert set(frame["source"]) == {"published"}


def comparisons(rows: list[tuple[str, float, float, str]]) -> pd.DataFrame:
    frame = pd.DataFrame(rows, columns=["item", "multiplier_a", "multiplier_b", "model_response"])
    return frame.assign(prompt_tokens=500, completion_tokens=1, total_cost=0.001)


def test_the_published_a_is_the_reply_shown_first_and_ours_the_one_of_the_smaller_dose() -> None:
    shown = [("1", -1.0, 0.0, "A"), ("1", 2.0, -1.0, "A"), ("1", 2.0, 0.0, "B"), ("2", 0.0, -1.0, "B"), ("2", -1.0, 2.0, "B"), ("2", 0.0, 2.0, "B")]
    frame = published.comparison_rows(SITE, EPOCH, comparisons(shown), DOSES).set_index(["item", "multiplier_a", "multiplier_b"])
    assert (frame.index.get_level_values(1) < frame.index.get_level_values(2)).all()
    found = frame[["first_shown", "winner"]].to_dict("index")
    assert found == {
        ("1", -1.0, 0.0): {"first_shown": "a", "winner": "a"},
        ("1", -1.0, 2.0): {"first_shown": "b", "winner": "b"},
        ("1", 0.0, 2.0): {"first_shown": "b", "winner": "a"},
        ("2", -1.0, 0.0): {"first_shown": "b", "winner": "a"},
        ("2", -1.0, 2.0): {"first_shown": "a", "winner": "b"},
        ("2", 0.0, 2.0): {"first_shown": "a", "winner": "b"},
    }
    assert set(frame["status"]) == {"judged"}


@pytest.mark.parametrize("answer", ["Tie", "", "A or B", "Assistant A", "C"])
def test_an_answer_that_is_neither_a_nor_b_wins_for_nobody(answer: str) -> None:
    frame = published.comparison_rows(SITE, EPOCH, comparisons([("1", -1.0, 0.0, answer)]), (-1.0, 0.0))
    assert frame[["status", "raw"]].to_numpy().tolist() == [["unreadable", answer]]
    assert frame["winner"].isna().all()
    published.PAIRS.to_arrow(frame[list(published.PAIRS.names)], "pairs")


def test_pairs_that_the_file_lost_are_rows_with_a_status() -> None:
    frame = published.comparison_rows(SITE, EPOCH, comparisons([("1", -1.0, 0.0, "A"), ("1", 2.0, 0.0, "A")]), DOSES)
    lost = frame[frame["status"] == "missing"]
    assert lost[["item", "multiplier_a", "multiplier_b"]].to_numpy().tolist() == [["1", -1.0, 2.0]]
    assert lost[["winner", "first_shown", "cost_usd", "raw"]].isna().all(axis=None)


def test_the_published_rule_counts_other_answers_for_the_reply_shown_second_and_ours_for_none() -> None:
    """Ten items ordered perfectly: the slopes are equal. Then unreadable answers, the larger dose shown first, pull the published one down."""
    doses = np.linspace(-2, 2, 9)
    perfect = [(str(item), low, high, "B") for item in range(10) for low, high in combinations(doses, 2)]
    frame = published.comparison_rows(SITE, EPOCH, comparisons(perfect), doses)
    assert published.pairwise_slopes(frame, doses) == pytest.approx({"pairwise_slope": 0.25, "pairwise_slope_as_published": 0.25})
    spoilt = [(item, high, low, "neither") if item == "0" else (item, low, high, answer) for item, low, high, answer in perfect]
    frame = published.comparison_rows(SITE, EPOCH, comparisons(spoilt), doses)
    found = published.pairwise_slopes(frame, doses)
    assert found["pairwise_slope"] == pytest.approx(0.25)
    assert found["pairwise_slope_as_published"] == pytest.approx(0.25 * (9 - 1) / 10), "one item of ten counts against the order"


def test_pairs_with_a_dose_outside_selection_do_not_count() -> None:
    inside = [("1", -1.0, 0.0, "B"), ("1", -1.0, 1.0, "B"), ("1", 0.0, 1.0, "B")]
    outside = [("1", dose, 4.0, "A") for dose in (-1.0, 0.0, 1.0)]
    frame = published.comparison_rows(SITE, EPOCH, comparisons(inside + outside), (-1.0, 0.0, 1.0, 4.0))
    assert published.pairwise_slopes(frame, (-1.0, 0.0, 1.0))["pairwise_slope"] == pytest.approx(0.5), "win rates 0, 1/2, 1"
