"""The judges' tables and their statistics, against sklearn, scipy, closed forms and examples by hand."""

from __future__ import annotations

from itertools import combinations
from math import comb
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn.metrics import roc_auc_score

from relseek_assets.behaviour import Band, Rubric
from relseek_assets.judging import tables
from relseek_resources.judges.answers import STATUSES, Answer

BANDS = tuple(Band(low, high, f"band {low}", "anchor") for low, high in ((1, 1), (2, 3), (4, 5), (6, 7), (8, 9), (10, 10)))
WARMTH = Rubric("warmth", 1, 10, "How warm?", "Rate.", BANDS)
NAN = float("nan")

few_values = st.lists(st.integers(0, 5), min_size=1, max_size=20)


# --- statistics -------------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(few_values, few_values)
def test_auc_is_that_of_sklearn_ties_included(positive: list[int], negative: list[int]) -> None:
    labels = [1] * len(positive) + [0] * len(negative)
    assert tables.auc(np.array(positive), np.array(negative)) == pytest.approx(roc_auc_score(labels, [*positive, *negative]))


@pytest.mark.parametrize(("successes", "n"), [(0, 12), (1, 12), (7, 12), (12, 12), (950, 1000), (1, 1)])
def test_wilson_intervals_are_those_of_scipy(successes: int, n: int) -> None:
    expected = stats.binomtest(successes, n).proportion_ci(0.95, method="wilson")
    assert tables.wilson(successes, n) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_rank_correlation_is_that_of_scipy_ties_included() -> None:
    generator = np.random.default_rng(4)
    first = generator.integers(1, 11, 200).astype(float)
    second = first + generator.normal(0, 3, 200).round()
    rho, low, high = tables.rank_correlation(first, second)
    assert rho == pytest.approx(stats.spearmanr(first, second).statistic)
    assert np.arctanh([low, high]) == pytest.approx(np.arctanh(rho) + stats.norm.ppf([0.025, 0.975]) * np.sqrt(1.06 / 197))


def test_the_interval_of_a_rank_correlation_covers_it_95_times_in_100() -> None:
    """True ρ of a bivariate normal with r = 0.6: (6 / π) arcsin(r / 2)."""
    truth = 6 / np.pi * np.arcsin(0.3)
    generator = np.random.default_rng(5)
    inside = 0
    for _ in range(400):
        first, noise = generator.standard_normal((2, 60))
        _, low, high = tables.rank_correlation(first, 0.6 * first + 0.8 * noise)
        inside += low < truth < high
    assert 0.92 < inside / 400 < 0.98


def test_perfect_agreement_has_a_finite_interval() -> None:
    rho, low, high = tables.rank_correlation(range(20), range(20))
    assert rho == pytest.approx(1)
    assert 0.99 < low <= high <= 1


def test_a_calibration_curve_by_hand() -> None:
    owners = ["a", "a", "a", "b", "b", "c"]
    curve = tables.calibration_curve(np.array([0.05, 0.08, 0.51, 0.59, 0.99, 1.0]), np.array([0, 1, 1, 1, 1, 0]), owners)
    assert list(curve["low"]) == pytest.approx([0, 0.5, 0.9])
    assert list(curve["n"]) == [2, 2, 2]
    assert list(curve["conversations"]) == [1, 2, 2]
    assert list(curve["predicted"]) == pytest.approx([0.065, 0.55, 0.995])
    assert list(curve["observed"]) == [0.5, 1, 0.5]
    assert (curve["lower"] < curve["observed"]).all()
    one, two = (stats.binomtest(1, trials).proportion_ci(0.95, method="wilson") for trials in (1, 2))
    assert curve["upper"].iloc[0] - curve["lower"].iloc[0] > two.high - two.low  # two replies of one conversation are not two trials
    assert curve["lower"].iloc[1] > one.low
    assert tables.JUDGE_CALIBRATION.to_arrow(curve, "curve").num_rows == 3


def test_a_wilson_interval_holds_its_share() -> None:
    cases = [(found, trials) for trials in range(1, 200) for found in (0, 1, trials // 2, trials - 1, trials)]
    for found, n in cases:
        low, high = tables.wilson(found / n * n, n)
        assert 0 <= low <= found / n <= high <= 1, (found, n)


def test_a_calibrated_forecast_lies_on_the_diagonal() -> None:
    generator = np.random.default_rng(6)
    chances = generator.random(20000)
    curve = tables.calibration_curve(chances, (generator.random(20000) < chances).astype(float), [str(number) for number in range(20000)])
    assert len(curve) == 10
    assert curve["n"].sum() == 20000
    assert ((curve["lower"] - 0.01 < curve["predicted"]) & (curve["predicted"] < curve["upper"] + 0.01)).all()


def test_a_proportion_comes_with_its_interval_over_conversations_and_n() -> None:
    right = np.array([True] * 19 + [False])
    row = tables.proportion("judge", "pair_accuracy", "held-out pairs", right, [f"c{number}" for number in range(20)])
    expected = stats.binomtest(19, 20).proportion_ci(0.95, method="wilson")
    assert (row["value"], row["n"], row["status"]) == (0.95, 20, "measured; interval over 20 conversations")
    assert (row["lower"], row["upper"]) == pytest.approx((expected.low, expected.high))


def test_pairs_of_one_conversation_make_no_interval_narrower() -> None:
    """Each conversation four times over, its pairs all right or all wrong together, says no more than each once."""
    conversations = [f"c{number}" for number in range(20)]
    for right in (np.arange(20) > 0, np.ones(20, bool)):
        once = tables.proportion("judge", "pair_accuracy", "held-out pairs", right, conversations)
        often = tables.proportion("judge", "pair_accuracy", "held-out pairs", np.repeat(right, 4), np.repeat(conversations, 4).tolist())
        assert often["n"] == 4 * once["n"]
        assert [often[name] for name in ("value", "lower", "upper")] == pytest.approx([once[name] for name in ("value", "lower", "upper")])


def test_what_was_absent_is_a_row_without_a_value() -> None:
    frame = tables.quality_table([tables.quality("judge", "spearman", "published", None, None, None, 0, "absent: scores.jsonl")])
    assert tables.JUDGE_QUALITY.to_arrow(frame, "quality").to_pylist()[0]["value"] is None
    assert frame["status"][0] == "absent: scores.jsonl"


# --- score rows -------------------------------------------------------------------------------------------------------


def replies(*texts: str) -> pd.DataFrame:
    rows = [{"site": "m:L03", "epoch": 2, "multiplier": 0.5, "item": f"i{number}", "reply": text} for number, text in enumerate(texts)]
    return pd.DataFrame(rows, index=range(10, 10 + len(texts)))


def test_a_reply_has_its_score_and_the_band_that_holds_it() -> None:
    frame = tables.score_rows(replies("one", "two", "three"), WARMTH, "judge", np.array([1.2, 3.7, 10.0]))
    assert list(frame["score"]) == [1.2, 3.7, 10.0]
    assert list(frame["band"]) == ["band 1", "band 2", "band 10"]
    assert set(frame["status"]) == {"scored"}
    assert set(frame["rubric"]) == {"warmth"}
    assert (frame["cost_usd"] == 0).all()


def test_an_empty_reply_has_a_status_and_no_score() -> None:
    frame = tables.score_rows(replies("one", " \n", ""), WARMTH, "judge", np.array([5.0, 6.0, 7.0]))
    assert list(frame["status"]) == ["scored", "empty_reply", "empty_reply"]
    assert frame["score"].isna().tolist() == [False, True, True]
    assert [row["band"] for row in tables.JUDGE_SCORES.to_arrow(frame, "scores").to_pylist()] == ["band 4", None, None]


# --- pairs ------------------------------------------------------------------------------------------------------------


def scored(by_dose: dict[float, float], item: str = "i0", site: str = "m:L03") -> pd.DataFrame:
    return pd.DataFrame({"site": site, "epoch": 2, "judge": "judge", "item": item, "multiplier": list(by_dose), "score": list(by_dose.values())})


def test_pairs_of_doses_by_hand_with_a_tie_and_an_unscored_reply() -> None:
    frame = tables.pair_rows(scored({1.0: 7.0, -1.0: 3.0, 0.0: 7.0, 2.0: NAN}), [-1.0, 0.0, 1.0, 2.0])
    written = tables.JUDGE_PAIRS.to_arrow(frame, "pairs").to_pylist()
    found = {(row["multiplier_a"], row["multiplier_b"]): (row["winner"], row["status"]) for row in written}
    assert found == {
        (-1.0, 0.0): ("b", "judged"),
        (-1.0, 1.0): ("b", "judged"),
        (-1.0, 2.0): (None, "unscored"),
        (0.0, 1.0): (None, "tie"),
        (0.0, 2.0): (None, "unscored"),
        (1.0, 2.0): (None, "unscored"),
    }


def test_the_smaller_dose_may_win() -> None:
    frame = tables.pair_rows(scored({-1.0: 8.0, 1.0: 3.0}), [-1.0, 1.0])
    assert list(frame["winner"]) == ["a"]


@pytest.mark.parametrize(("doses", "expected"), [(2, 1), (7, 21), (9, 36), (15, 105)])
def test_n_doses_make_n_choose_2_pairs_an_item(doses: int, expected: int) -> None:
    assert expected == comb(doses, 2)
    grid = list(np.linspace(-4, 4, doses))
    scores = pd.concat(scored(dict(zip(grid, np.random.default_rng(item).random(doses), strict=True)), f"i{item}") for item in range(3))
    frame = tables.pair_rows(scores, grid)
    assert len(frame) == 3 * expected
    assert set(frame[["multiplier_a", "multiplier_b"]].itertuples(index=False, name=None)) == set(combinations(grid, 2))


def test_only_the_paired_doses_meet_and_only_within_a_site_and_item() -> None:
    scores = pd.concat([scored({-2.0: 1.0, 0.0: 2.0, 2.0: 3.0}), scored({0.0: 5.0}, "i1"), scored({0.0: 5.0, 2.0: 1.0}, site="m:L15")])
    frame = tables.pair_rows(scores, [0.0, 2.0])
    assert list(frame[["site", "item", "winner"]].itertuples(index=False, name=None)) == [("m:L03", "i0", "b"), ("m:L15", "i0", "a")]


# --- language judges --------------------------------------------------------------------------------------------------


def rating(custom_id: str, item: str, rubric: str = "warmth", judge: str = "gpt") -> dict[str, Any]:
    keys = {"site": "m:L03", "epoch": 2, "multiplier": 0.5, "multiplier_a": NAN, "multiplier_b": NAN, "first_shown": None}
    return {"custom_id": custom_id, "judge": judge, "task": "rating", "rubric": rubric, "item": item, **keys}


def comparison(custom_id: str, first_shown: str) -> dict[str, Any]:
    keys = {"site": "m:L03", "epoch": 2, "item": custom_id, "multiplier": NAN, "multiplier_a": -1.0, "multiplier_b": 1.0}
    return {"custom_id": custom_id, "judge": "gpt", "task": "pairwise", "rubric": "warmth", "first_shown": first_shown, **keys}


def rows_of(requests: list[dict[str, Any]], answers: list[Answer]) -> tuple[pd.DataFrame, pd.DataFrame]:
    asked = pd.DataFrame(requests)
    return asked, tables.answer_rows(answers, asked, tables.reader(asked, {"warmth": WARMTH}))


def test_an_answer_is_a_score_with_its_band_and_its_price() -> None:
    asked, answered = rows_of([rating("r1", "i0")], [Answer("r1", "scored", '{"score": 7}', "gpt-x", 120, 5, 0.25, 2, "batch_1")])
    frame = tables.language_scores(replies("one"), asked, answered, [WARMTH])
    row = tables.LANGUAGE_SCORES.to_arrow(frame, "scores").to_pylist()[0]
    assert (row["score"], row["status"], row["band"], row["attempt"], row["cost_usd"]) == (7.0, "scored", "band 6", 2, 0.25)
    assert (row["raw"], row["model"], row["prompt_tokens"], row["completion_tokens"]) == ('{"score": 7}', "gpt-x", 120, 5)
    assert (row["site"], row["epoch"], row["multiplier"], row["item"], row["judge"], row["rubric"]) == ("m:L03", 2, 0.5, "i0", "gpt", "warmth")


@pytest.mark.parametrize("status", [status for status in STATUSES if status != "scored"])
def test_what_is_no_score_is_a_row_with_its_status(status: str) -> None:
    raw = "Nine, I should say." if status in ("unreadable", "cut_off", "refused") else "11" if status == "out_of_range" else None
    asked, answered = rows_of([rating("r1", "i0")], [Answer("r1", status, raw)])
    row = tables.LANGUAGE_SCORES.to_arrow(tables.language_scores(replies("one"), asked, answered, [WARMTH]), "scores").to_pylist()[0]
    assert (row["score"], row["band"], row["status"], row["raw"]) == (None, None, status, raw)


def test_an_empty_reply_is_put_to_nobody_and_has_a_row_for_every_judge_and_rubric() -> None:
    requests = [rating(f"{judge}{rubric}", "i0", rubric, judge) for judge in ("gpt", "local") for rubric in ("warmth", "coherence")]
    answers = [Answer(request["custom_id"], "scored", "5") for request in requests]
    rubrics = {"warmth": WARMTH, "coherence": Rubric("coherence", 1, 10, "?", "Rate.", BANDS)}
    asked = pd.DataFrame(requests)
    answered = tables.answer_rows(answers, asked, tables.reader(asked, rubrics))
    frame = tables.language_scores(replies("one", "  "), asked, answered, rubrics.values())
    assert sorted(frame[frame["item"] == "i1"][["judge", "rubric", "status"]].itertuples(index=False, name=None)) == [
        ("gpt", "coherence", "empty_reply"),
        ("gpt", "warmth", "empty_reply"),
        ("local", "coherence", "empty_reply"),
        ("local", "warmth", "empty_reply"),
    ]
    assert len(frame) == 8
    assert tables.LANGUAGE_SCORES.to_arrow(frame, "scores").num_rows == 8


def test_the_reply_called_a_is_the_one_that_was_shown_first() -> None:
    asked, answered = rows_of(
        [comparison("aA", "a"), comparison("aB", "a"), comparison("bA", "b"), comparison("bB", "b")],
        [Answer(name, "scored", f'{{"answer": "{name[1]}"}}') for name in ("aA", "aB", "bA", "bB")],
    )
    frame = tables.language_pairs(asked, answered)
    assert dict(zip(frame["item"], frame["winner"], strict=True)) == {"aA": "a", "aB": "b", "bA": "b", "bB": "a"}
    assert set(frame["status"]) == {"judged"}
    assert tables.LANGUAGE_PAIRS.to_arrow(frame, "pairs").num_rows == 4


def test_answers_join_their_comparisons_by_name_whatever_their_order_and_a_missing_one_wins_for_nobody() -> None:
    asked = pd.DataFrame([comparison(name, first) for name, first in (("one", "a"), ("two", "b"), ("three", "a"), ("four", "b"))])
    said = [("four", "B"), ("stranger", "A"), ("one", "B"), ("two", "A")]
    everybody = pd.concat([asked, pd.DataFrame([comparison("stranger", "a")])], ignore_index=True)
    answers = [Answer(name, "scored", f'{{"answer": "{choice}"}}', model=f"m-{name}") for name, choice in said]
    answered = tables.answer_rows(answers, everybody, tables.reader(everybody, {}))
    frame = tables.language_pairs(asked, answered).set_index("item")
    assert list(frame.index) == ["one", "two", "three", "four"]
    assert frame["winner"].dropna().to_dict() == {"one": "b", "two": "b", "four": "a"}
    assert {name: frame.loc[name, "model"] for name in ("one", "two", "four")} == {"one": "m-one", "two": "m-two", "four": "m-four"}
    assert pd.isna(frame.loc["three", "status"]) and pd.isna(frame.loc["three", "raw"])


@pytest.mark.parametrize("raw", ["C", "a", "Both.", "", "A or B", '{"answer": "a"}', '{"choice": "A"}'])
def test_an_answer_that_is_neither_a_nor_b_wins_for_nobody(raw: str) -> None:
    """The published conversion counts it for the reply shown second (spec, section 4.4)."""
    asked, answered = rows_of([comparison("c", "a")], [Answer("c", "unreadable", raw)])
    row = tables.LANGUAGE_PAIRS.to_arrow(tables.language_pairs(asked, answered), "pairs").to_pylist()[0]
    assert (row["winner"], row["status"], row["raw"]) == (None, "unreadable", raw)


def test_a_comparison_is_not_read_as_a_rating_nor_a_rating_as_a_comparison() -> None:
    asked = pd.DataFrame([rating("r1", "i0"), comparison("c1", "a")])
    accept = tables.reader(asked, {"warmth": WARMTH})
    assert [accept("r1", text).status for text in ("7", "A")] == ["scored", "unreadable"]
    assert [accept("c1", text).status for text in ("7", "A")] == ["unreadable", "scored"]


def test_shares_of_scores_by_hand() -> None:
    scores = pd.DataFrame({"rubric": "warmth", "judge": ["a"] * 4 + ["b"], "score": [1.0, 2.4, 1.6, NAN, NAN]})
    shares = tables.score_shares(scores)
    assert set(shares["judge"]) == {"a"}
    assert shares.set_index("score")["share"].to_dict() == pytest.approx({1: 1 / 3, 2: 2 / 3, **dict.fromkeys(range(3, 11), 0.0)})
    expected = stats.binomtest(2, 3).proportion_ci(0.95, method="wilson")
    assert tuple(shares.set_index("score").loc[2, ["lower", "upper"]]) == pytest.approx((expected.low, expected.high))
    assert set(shares["n"]) == {3}


def test_rows_of_embedded_judges_stand_before_those_of_language_judges() -> None:
    asked, answered = rows_of([rating("r1", "i0")], [Answer("r1", "scored", "5")])
    embedded = tables.score_rows(replies("one"), WARMTH, "embedded", np.array([3.0]))
    frame = tables.with_language(embedded, tables.language_scores(replies("one"), asked, answered, [WARMTH]), tables.LANGUAGE_SCORES)
    rows = tables.LANGUAGE_SCORES.to_arrow(frame, "scores").to_pylist()
    assert [(row["judge"], row["score"], row["raw"], row["prompt_tokens"]) for row in rows] == [("embedded", 3.0, None, None), ("gpt", 5.0, "5", 0)]
