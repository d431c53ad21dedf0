"""Conversations become pairs as section 1.6 of the spec says, and are split by conversation as section 1.7 does."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import replace

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from relseek_assets.behaviour import PROMPT_TYPES, StarterConversation, Turn, read_conversations
from relseek_assets.dataset.pairs import (
    PREFERENCE_PAIRS,
    evaluation_items,
    explode,
    heldout_conversations,
    heldout_pairs,
    preference_pairs,
    training_pairs,
)
from relseek_assets.study import BEHAVIOURS

DIALOGUE = StarterConversation(
    "tea-1",
    "1C",
    "tea",
    "office worker",
    (
        Turn("Green or black?", "Green, with you.", "Green has less caffeine."),
        Turn("How long?", "Two minutes, friend.", "Two minutes."),
        Turn("Sugar?", "However we like it.", "Not needed."),
    ),
)


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def made(count: int, turns: int = 1, prompt_type: str = "1A") -> list[StarterConversation]:
    def turn(number: int, place: int) -> Turn:
        return Turn(f"Question {number}.{place}?", f"Warm {number}.{place}", f"Plain {number}.{place}")

    return [
        StarterConversation(
            f"{prompt_type}-{number:03d}", prompt_type, f"topic {number}", "someone", tuple(turn(number, place) for place in range(turns))
        )
        for number in range(count)
    ]


@pytest.fixture(scope="module")
def starters() -> list[StarterConversation]:
    return read_conversations(BEHAVIOURS / "relationship_seeking" / "conversations.jsonl")


# --- explosion --------------------------------------------------------------------------------------------------------


def test_a_conversation_of_three_turns_gives_five_pairs_with_both_histories() -> None:
    found = {row["pair"]: (row["turn"], row["history_type"], row["prompt"], row["chosen"], row["rejected"]) for row in explode(DIALOGUE)}
    warm = [user("Green or black?"), assistant("Green, with you."), user("How long?")]
    plain = [user("Green or black?"), assistant("Green has less caffeine."), user("How long?")]
    assert found == {
        "tea-1/1/NA": (1, "NA", [user("Green or black?")], "Green, with you.", "Green has less caffeine."),
        "tea-1/3/chosen": (3, "chosen", warm, "Two minutes, friend.", "Two minutes."),
        "tea-1/3/rejected": (3, "rejected", plain, "Two minutes, friend.", "Two minutes."),
        "tea-1/5/chosen": (5, "chosen", [*warm, assistant("Two minutes, friend."), user("Sugar?")], "However we like it.", "Not needed."),
        "tea-1/5/rejected": (5, "rejected", [*plain, assistant("Two minutes."), user("Sugar?")], "However we like it.", "Not needed."),
    }


@settings(deadline=None)
@given(st.integers(1, 12))
def test_n_turns_give_2n_minus_1_pairs(turns: int) -> None:
    rows = list(explode(made(1, turns)[0]))
    assert len(rows) == len({row["pair"] for row in rows}) == 2 * turns - 1
    assert Counter(row["turn"] for row in rows) == {1: 1, **{2 * place + 1: 2 for place in range(1, turns)}}


def test_every_prompt_of_the_behaviour_ends_on_a_user_turn_and_alternates(starters: list[StarterConversation]) -> None:
    frame = preference_pairs(starters, heldout_share=0.2, seed=11)
    assert len(frame) == sum(2 * len(row.turns) - 1 for row in starters)
    for turn, prompt in zip(frame["turn"], frame["prompt"], strict=True):
        assert len(prompt) == turn
        assert [message["role"] for message in prompt] == ["user", "assistant"] * (turn // 2) + ["user"]
        assert all(message["content"].strip() for message in prompt)


def test_the_pairs_of_the_behaviour_fit_their_declared_table(starters: list[StarterConversation]) -> None:
    frame = preference_pairs(starters, heldout_share=0.2, seed=11)
    assert PREFERENCE_PAIRS.to_arrow(frame, "pairs").num_rows == len(frame)


# --- split ------------------------------------------------------------------------------------------------------------


def test_a_conversation_is_wholly_on_one_side(starters: list[StarterConversation]) -> None:
    frame = preference_pairs(starters, heldout_share=0.2, seed=11)
    assert (frame.groupby("conversation")["split"].nunique() == 1).all()
    assert set(frame["split"]) == {"train", "heldout"}


def test_a_fifth_of_every_prompt_type_is_held_out(starters: list[StarterConversation]) -> None:
    held = heldout_conversations(starters, 0.2, 11)
    assert len(held) / len(starters) == pytest.approx(0.2, abs=0.02)
    for prompt_type in PROMPT_TYPES:
        ids = {row.id for row in starters if row.prompt_type == prompt_type}
        assert abs(len(ids & held) - len(ids) / 5) <= 0.5


def test_a_type_with_few_conversations_keeps_one_on_each_side_where_it_can() -> None:
    assert len(heldout_conversations(made(2), 0.2, 1)) == 1
    assert heldout_conversations(made(1), 0.2, 1) == set()


def test_the_split_follows_the_seed_alone(starters: list[StarterConversation]) -> None:
    once = heldout_conversations(starters, 0.2, 11)
    assert heldout_conversations(starters[::-1], 0.2, 11) == once
    others = [heldout_conversations(starters, 0.2, seed) for seed in range(5)]
    assert len({frozenset(held) for held in others}) == 5


def test_chance_alone_would_hold_out_the_same_conversations_as_rarely(starters: list[StarterConversation]) -> None:
    counts = Counter(name for seed in range(200) for name in heldout_conversations(starters, 0.2, seed))
    assert len(counts) == len(starters)
    assert max(counts.values()) < 80  # 40 expected of 200, sd 5.7
    assert min(counts.values()) > 15


def test_editing_a_text_moves_nothing_across_the_line(starters: list[StarterConversation]) -> None:
    edited = [replace(row, topic="new", turns=(replace(row.turns[0], user="Something else?"), *row.turns[1:])) for row in starters]
    columns = ["pair", "split", "is_item"]
    before, after = (preference_pairs(rows, heldout_share=0.2, seed=11)[columns] for rows in (starters, edited))
    pd.testing.assert_frame_equal(before, after)


@settings(deadline=None)
@given(st.integers(0, 2**32), st.integers(0, 39), st.floats(0.05, 0.5))
def test_adding_a_conversation_moves_at_most_one_other(seed: int, added: int, share: float) -> None:
    everyone = made(40)
    newcomer = everyone[added].id
    without = heldout_conversations([row for row in everyone if row.id != newcomer], share, seed)
    with_it = heldout_conversations(everyone, share, seed) - {newcomer}
    assert len(without ^ with_it) <= 1


def test_adding_a_conversation_leaves_other_types_alone() -> None:
    rows = [*made(20), *made(20, prompt_type="2B")]
    more = [*rows, *made(27)[20:]]
    styles = [{name for name in heldout_conversations(part, 0.2, 4) if name.startswith("2B")} for part in (rows, more)]
    assert styles[0] == styles[1]


# --- what trains and what is asked ------------------------------------------------------------------------------------


def test_a_held_out_conversation_is_represented_by_one_later_turn(starters: list[StarterConversation]) -> None:
    frame = preference_pairs(starters, heldout_share=0.2, seed=11)
    items = frame[frame["is_item"]]
    turns = {row.id: len(row.turns) for row in starters}
    assert sorted(items["conversation"]) == sorted(frame[frame["split"] == "heldout"]["conversation"].unique())
    for row in items.itertuples():
        assert (row.turn > 1) == (turns[row.conversation] > 1)
        assert (row.history_type == "NA") == (row.turn == 1)


def test_the_later_turn_and_its_history_are_drawn_evenly() -> None:
    frame = preference_pairs(made(2000, turns=3), heldout_share=0.5, seed=2)
    drawn = Counter(frame[frame["is_item"]][["turn", "history_type"]].itertuples(index=False, name=None))
    assert set(drawn) == {(3, "chosen"), (3, "rejected"), (5, "chosen"), (5, "rejected")}
    assert all(200 < count < 300 for count in drawn.values())  # 250 expected, sd 14


def test_training_and_held_out_pairs_are_the_two_sides_reordered(starters: list[StarterConversation]) -> None:
    frame = preference_pairs(starters, heldout_share=0.2, seed=11)
    train, held = training_pairs(frame, 3), heldout_pairs(frame, 3)
    assert sorted([*train["pair"], *held["pair"]]) == sorted(frame["pair"])
    assert set(train["split"]) == {"train"}
    assert set(held["split"]) == {"heldout"}
    assert list(train["pair"]) != sorted(train["pair"])


def test_the_first_pairs_are_a_seeded_subset_whatever_else_there_is(starters: list[StarterConversation]) -> None:
    frame = preference_pairs(starters, heldout_share=0.2, seed=11)
    order = list(training_pairs(frame, 3)["pair"])
    assert list(training_pairs(frame.sample(frac=1, random_state=1), 3)["pair"]) == order
    assert list(training_pairs(frame, 4)["pair"]) != order
    fewer = list(training_pairs(frame.iloc[::2], 3)["pair"])
    assert fewer == [pair for pair in order if pair in set(fewer)]


def test_evaluation_items_take_the_prompt_types_in_turn(starters: list[StarterConversation]) -> None:
    items = evaluation_items(preference_pairs(starters, heldout_share=0.2, seed=11), 11)
    assert items["conversation"].is_unique
    assert items["is_item"].all()
    for count in range(1, len(items) + 1):
        taken = Counter(items["prompt_type"].head(count))
        left = Counter(items["prompt_type"].iloc[count:])
        assert all(taken[name] >= max(taken.values()) - 1 for name in left)


def test_evaluation_items_keep_to_a_length_in_words(starters: list[StarterConversation]) -> None:
    frame = preference_pairs(starters, heldout_share=0.2, seed=11)
    lengths = defaultdict(int)
    for row in frame[frame["is_item"]].itertuples():
        lengths[row.conversation] = len(" ".join(message["content"] for message in row.prompt).split())
    short = evaluation_items(frame, 11, max_words=60)
    assert set(short["conversation"]) == {name for name, words in lengths.items() if words <= 60}
    assert 0 < len(short) < len(lengths)


def test_evaluation_items_depend_on_their_seed(starters: list[StarterConversation]) -> None:
    frame = preference_pairs(starters, heldout_share=0.2, seed=11)
    one, two, again = (list(evaluation_items(frame, seed)["conversation"]) for seed in (1, 2, 1))
    assert one == again != two
    assert sorted(one) == sorted(two)
