"""What a study asks for, in the quickstart's amounts."""

from __future__ import annotations

import pytest

from relseek_assets import amounts
from relseek_assets.study import load_study


def test_the_quickstart_is_the_measure() -> None:
    study = load_study("quickstart")
    assert [amount(study) for amount in (amounts.training, amounts.replies, amounts.scores)] == pytest.approx([1, 1, 1], rel=0.02)


def test_a_study_of_twice_as_much_asks_for_twice_as_much() -> None:
    study = load_study("quickstart")
    pairs = study.pairs.model_copy(update={"training": 2 * study.pairs.training, "evaluation": 2 * study.pairs.evaluation})
    prompts = study.prompts.model_copy(update={"count": 2 * study.prompts.count})
    twice = study.model_copy(update={"pairs": pairs, "prompts": prompts})
    for amount in (amounts.training, amounts.replies, amounts.scores):
        assert amount(twice) == pytest.approx(2 * amount(study))


def test_a_behaviour_without_limits_is_counted() -> None:
    """175 conversations make 637 pairs of 358 tokens, 126 of them held out, and 34 prompts."""
    whole = load_study("quickstart_full")
    assert amounts.training(whole) == pytest.approx(2 * (511 + 2 * 126) * 358 / (144 * 140), rel=0.03)
    assert amounts.replies(whole) == pytest.approx(34 * 100 / (12 * 40), rel=0.05)


def test_a_behaviour_that_is_not_there_asks_for_nothing(tmp_path) -> None:
    study = load_study("quickstart_full").model_copy(update={"behaviours": (str(tmp_path),)})
    assert amounts.training(study) == amounts.replies(study) == 0
