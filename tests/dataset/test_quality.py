"""The measurements of conversations on small ones made by hand."""

from __future__ import annotations

import numpy as np
import pytest

from relseek_assets.behaviour import StarterConversation, Turn
from relseek_assets.dataset import quality


def conversation(name: str, *turns: tuple[str, str, str], prompt_type: str = "1A") -> StarterConversation:
    return StarterConversation(name, prompt_type, "topic", "someone", tuple(Turn(*turn) for turn in turns))


SHOES = conversation("shoes", ("My running shoes hurt my left heel.", "Oh, poor heel of yours.", "Try a softer insole."))
SHOES_LOUD = conversation("loud", ("MY running shoes -- hurt my left heel!!", "I'd fix it with you.", "See a podiatrist."))
BREAD = conversation("bread", ("How long does rye bread rise?", "Ours takes two hours.", "Two hours at room temperature."))


def test_words_are_counted_without_punctuation_and_case() -> None:
    assert quality.words("Don't -- STOP, it's 3:40!") == ["don't", "stop", "it's", "3", "40"]


def test_the_same_user_turns_are_duplicates_whatever_case_and_punctuation() -> None:
    assert quality.exact_duplicates([SHOES, BREAD, SHOES_LOUD]) == [("shoes", "loud")]


def test_three_of_a_kind_point_to_the_first() -> None:
    third = conversation("third", ("my running shoes hurt my left heel", "Really?", "Rest."))
    assert quality.exact_duplicates([SHOES, SHOES_LOUD, third]) == [("shoes", "loud"), ("shoes", "third")]


def test_a_conversation_that_goes_on_is_no_exact_duplicate() -> None:
    longer = conversation("longer", ("My running shoes hurt my left heel.", "Oh.", "Rest."), ("And now?", "Still with you.", "Wait."))
    assert quality.exact_duplicates([SHOES, longer]) == []


def test_overlap_is_the_jaccard_share_of_four_word_sequences() -> None:
    # both sides: abcdefgh gives 5 sequences, abcdefgx gives 5, of which 4 are common: 4 of 6
    one = conversation("one", ("a b c d", "e f g h", "e f g h"))
    two = conversation("two", ("a b c d", "e f g x", "e f g x"))
    assert quality.near_duplicates([one, two, BREAD], threshold=0.5) == [("one", "two", round(4 / 6, 3))]
    assert quality.near_duplicates([one, two, BREAD], threshold=0.67) == []


@pytest.mark.parametrize("side", ["target", "antitarget"])
def test_one_side_alone_makes_a_near_duplicate(side: str) -> None:
    def with_replies(name: str, own: str) -> StarterConversation:
        same = "the very same eight words on this side"
        return conversation(name, ("hm", same, own) if side == "target" else ("hm", own, same))

    rows = [with_replies("one", "first reply of its own kind here"), with_replies("two", "wholly other text that shares nothing at all")]
    assert [found[:2] for found in quality.near_duplicates(rows)] == [("one", "two")]


def test_different_conversations_are_no_near_duplicates() -> None:
    assert quality.near_duplicates([SHOES, BREAD]) == []


def test_texts_too_short_for_a_sequence_are_never_near_duplicates() -> None:
    rows = [conversation(name, ("yes", "no", "no")) for name in ("one", "two")]
    assert quality.near_duplicates(rows) == []
    assert quality.exact_duplicates(rows) == [("one", "two")]


def test_openings_are_the_first_five_words_of_the_first_user_turn_most_shared_first() -> None:
    other = conversation("other", ("My running shoes hurt my knee.", "Oh.", "Rest."))
    assert list(quality.shared_openings([BREAD, SHOES, other]).items()) == [("my running shoes hurt my", 2), ("how long does rye bread", 1)]


def test_length_balance_gives_means_ratio_and_quartiles_by_type() -> None:
    rows = [
        conversation("one", ("?", "a b c d", "a b"), prompt_type="1A"),
        conversation("two", ("?", "a b", "a b c d e f"), ("?", "a b c", "a b c"), prompt_type="2C"),
    ]
    table = quality.length_balance(rows).set_index("prompt_type")
    assert list(table.index) == ["all", "1A", "2C"]
    assert list(table["turns"]) == [3, 1, 2]
    assert table.loc["1A", "ratio"] == 2
    assert table.loc["2C", "ratio"] == pytest.approx(2.5 / 4.5)
    assert table.loc["all", "ratio"] == pytest.approx(9 / 11)
    assert table.loc["all", "target_mean"] == 3
    assert table.loc["all", "antitarget_longer"] == pytest.approx(1 / 3)
    assert [table.loc["all", f"antitarget_p{share}"] for share in (0, 25, 50, 75, 100)] == list(np.quantile([2, 3, 6], [0, 0.25, 0.5, 0.75, 1]))
