"""Preference pairs: one a turn and history, split by conversation.

Here belong the explosion of conversations into pairs (spec/pipeline.md, section 1.6) and the grouped split (section 1.7). The quality
of the conversations is judged in `quality.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import pandas as pd

from relseek_assets.behaviour import PROMPT_TYPES, StarterConversation
from relseek_resources.storage import Column, TableSchema, keyed_order, keyed_seed

SPLITS = ("train", "heldout")
HISTORIES = ("NA", "chosen", "rejected")

PREFERENCE_PAIRS = TableSchema(
    "preference_pairs",
    (
        Column("pair", "string", "conversation, turn and history, joined"),
        Column("conversation", "string", "id of the starter conversation"),
        Column("prompt_type", "string", "form of the conversation", choices=tuple(PROMPT_TYPES)),
        Column("topic", "string", "topic of the conversation"),
        Column("turn", "integer", "index of the assistant's turn in the flat conversation: 1, 3, 5, ...", low=1),
        Column("history_type", "string", "whose earlier replies the prompt holds", choices=HISTORIES),
        Column("prompt", "json", "messages up to and including the user's turn"),
        Column("chosen", "string", "the target reply"),
        Column("rejected", "string", "the anti-target reply"),
        Column("split", "string", "grouped by conversation", choices=SPLITS),
        Column("is_item", "boolean", "the one pair that stands for its held-out conversation in the sweep"),
    ),
    key=("pair",),
)


def explode(conversation: StarterConversation) -> Iterator[dict[str, Any]]:
    """Yield the 2n - 1 pairs of an n-turn conversation: later turns once with each side's earlier replies."""
    for index, turn in enumerate(conversation.turns):
        for history in ("NA",) if index == 0 else ("chosen", "rejected"):
            prompt: list[dict[str, str]] = []
            for earlier in conversation.turns[:index]:
                reply = earlier.target if history == "chosen" else earlier.antitarget
                prompt += [{"role": "user", "content": earlier.user}, {"role": "assistant", "content": reply}]
            prompt.append({"role": "user", "content": turn.user})
            yield {
                "pair": f"{conversation.id}/{len(prompt)}/{history}",
                "conversation": conversation.id,
                "prompt_type": conversation.prompt_type,
                "topic": conversation.topic,
                "turn": len(prompt),
                "history_type": history,
                "prompt": prompt,
                "chosen": turn.target,
                "rejected": turn.antitarget,
            }


def heldout_conversations(conversations: Iterable[StarterConversation], share: float, seed: int) -> set[str]:
    """Ids of the held-out conversations: `share` of each prompt type, by a keyed order.

    A conversation's rank depends on its own id, so that editing or adding one moves at most one other across the line.
    """
    by_type: dict[str, list[str]] = {}
    for conversation in conversations:
        by_type.setdefault(conversation.prompt_type, []).append(conversation.id)
    held: set[str] = set()
    for prompt_type, ids in by_type.items():
        count = max(1, round(share * len(ids))) if len(ids) > 1 else 0
        held.update(keyed_order(ids, seed, "split", prompt_type)[:count])
    return held


def preference_pairs(conversations: Sequence[StarterConversation], *, heldout_share: float, seed: int) -> pd.DataFrame:
    """All pairs with their split.

    A held-out conversation is represented in the sweep by one pair: of a longer conversation a later turn, drawn by its own
    seed, with the chosen or the rejected history by the flip of a keyed coin (the published split alternates a counter, which
    would tie a row to its neighbours).
    """
    held = heldout_conversations(conversations, heldout_share, seed)
    rows = []
    for conversation in conversations:
        pairs = list(explode(conversation))
        item = pairs[0]
        if len(conversation.turns) > 1:
            draw = keyed_seed(seed, "item", conversation.id)
            later = 1 + draw % (len(conversation.turns) - 1)
            item = pairs[2 * later - 1 + (draw >> 32) % 2]
        for pair in pairs:
            is_held = conversation.id in held
            rows.append({**pair, "split": "heldout" if is_held else "train", "is_item": is_held and pair is item})
    return pd.DataFrame(rows, columns=list(PREFERENCE_PAIRS.names))


def training_pairs(pairs: pd.DataFrame, seed: int) -> pd.DataFrame:
    """The training pairs in a keyed order, so that the first n are a seeded subset of any n."""
    return _in_order(pairs[pairs["split"] == "train"], "pair", seed, "training")


def heldout_pairs(pairs: pd.DataFrame, seed: int) -> pd.DataFrame:
    """Every pair of the held-out conversations in a keyed order, for the trainer's evaluation."""
    return _in_order(pairs[pairs["split"] == "heldout"], "pair", seed, "heldout")


def evaluation_items(pairs: pd.DataFrame, seed: int, max_words: int = 0) -> pd.DataFrame:
    """One pair a held-out conversation, in a keyed order that takes the prompt types in turn.

    With `max_words`, only those whose prompt (all messages together) has at most so many words.
    """
    items = _in_order(pairs[pairs["is_item"]], "conversation", seed, "items")
    if max_words:
        lengths = items["prompt"].map(lambda prompt: sum(len(message["content"].split()) for message in prompt))
        items = items[lengths <= max_words]
    place = items.groupby("prompt_type").cumcount()
    return items.assign(place=place).sort_values(["place", "prompt_type"], kind="stable").drop(columns="place").reset_index(drop=True)


def _in_order(frame: pd.DataFrame, key: str, *seed: Any) -> pd.DataFrame:
    return frame.set_index(key, drop=False).loc[keyed_order(list(frame[key]), *seed)].reset_index(drop=True)
