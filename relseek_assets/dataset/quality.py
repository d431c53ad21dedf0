"""Whether starter conversations are fit to train on: duplicates, near-duplicates, shared openings, balanced lengths.

Here belong plain measurements; `checks.py` turns them into asset checks with their thresholds.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from itertools import combinations

import numpy as np
import pandas as pd

from relseek_assets.behaviour import StarterConversation

SHINGLE = 4  # words
NEAR_DUPLICATE = 0.5  # Jaccard similarity of four-word shingles


def words(text: str) -> list[str]:
    return re.findall(r"[\w']+", text.lower())


def opening(text: str, count: int = 5) -> str:
    return " ".join(words(text)[:count])


def shared_openings(conversations: Sequence[StarterConversation]) -> dict[str, int]:
    """Five-word openings of first user turns and how many conversations begin so, most shared first."""
    return dict(Counter(opening(conversation.turns[0].user) for conversation in conversations).most_common())


def exact_duplicates(conversations: Sequence[StarterConversation]) -> list[tuple[str, str]]:
    """Pairs of conversations with the same user turns, whatever their case and punctuation."""
    seen: dict[tuple[str, ...], str] = {}
    found = []
    for conversation in conversations:
        key = tuple(" ".join(words(turn.user)) for turn in conversation.turns)
        if key in seen:
            found.append((seen[key], conversation.id))
        seen.setdefault(key, conversation.id)
    return found


def near_duplicates(conversations: Sequence[StarterConversation], threshold: float = NEAR_DUPLICATE) -> list[tuple[str, str, float]]:
    """Pairs of conversations whose four-word shingles overlap by more than `threshold` (Jaccard), on either side."""
    sides = {
        side: [_shingles(" ".join(f"{turn.user} {getattr(turn, side)}" for turn in conversation.turns)) for conversation in conversations]
        for side in ("target", "antitarget")
    }
    found = []
    for first, second in combinations(range(len(conversations)), 2):
        overlap = max(_jaccard(texts[first], texts[second]) for texts in sides.values())
        if overlap > threshold:
            found.append((conversations[first].id, conversations[second].id, round(overlap, 3)))
    return found


def _shingles(text: str) -> set[tuple[str, ...]]:
    found = words(text)
    return {tuple(found[start : start + SHINGLE]) for start in range(len(found) - SHINGLE + 1)}


def _jaccard(first: set[tuple[str, ...]], second: set[tuple[str, ...]]) -> float:
    common = len(first & second)
    return common / (len(first) + len(second) - common) if common else 0.0


def length_balance(conversations: Sequence[StarterConversation]) -> pd.DataFrame:
    """Reply lengths in words by prompt type and over all: n, means, their ratio, quartiles and extremes of both sides."""
    rows = [
        {"prompt_type": conversation.prompt_type, "target": len(words(turn.target)), "antitarget": len(words(turn.antitarget))}
        for conversation in conversations
        for turn in conversation.turns
    ]
    lengths = pd.DataFrame(rows)
    found = []
    for name, part in [("all", lengths), *lengths.groupby("prompt_type")]:
        row: dict[str, object] = {"prompt_type": name, "turns": len(part), "ratio": part["target"].mean() / part["antitarget"].mean()}
        row["antitarget_longer"] = float((part["antitarget"] > part["target"]).mean())
        for side in ("target", "antitarget"):
            row[f"{side}_mean"] = part[side].mean()
            row |= {f"{side}_p{q}": float(np.percentile(part[side], q)) for q in (0, 25, 50, 75, 100)}
        found.append(row)
    return pd.DataFrame(found)
