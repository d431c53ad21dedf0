"""Drift: how far along the assistant axis a model's replies lie as a conversation goes on, turn by turn.

Here belong playing conversations, the projection of each reply, and trends over turns. A reply is read by the plain model, whatever it was made
under, so that conversations with and without a floor are measured with one ruler.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from relseek_resources.storage import Column, TableSchema, keyed_seed

if TYPE_CHECKING:
    from relseek_assets.axes.interventions import Axis, Setting
    from relseek_assets.persona_set import DriftConversation
    from relseek_resources.models import Sampling, SteeredModel

MODEL = Column("model", "string", "name of the model in the study")
CONDITION = Column("condition", "string", "`none`, or the floor under which the conversation was played: `floor p25`")

DRIFT = TableSchema(
    "drift",
    (
        MODEL,
        Column("conversation", "string", "whose user turns were put to the model"),
        Column("kind", "string", "coding, writing, therapy or philosophy"),
        CONDITION,
        Column("turn", "integer", "of the user, from 1", low=1),
        Column("user", "string", "what the user said"),
        Column("reply", "string", "what the model answered, all turns before being its context"),
        Column("tokens", "integer", "tokens drawn, end token included", "tokens", low=0),
        Column("seed", "integer", "of the row's own random numbers, the same in all conditions"),
        Column("layer", "integer", "block after which the projection was read, 0-indexed", low=0),
        Column("projection", "number", "mean over the reply's tokens, read by the plain model; null for an empty reply", nullable=True),
        Column("percentile", "number", "share of ordinary assistant replies that project lower", "percent", nullable=True, low=0, high=100),
    ),
    key=("model", "conversation", "condition", "turn"),
)

DRIFT_TRENDS = TableSchema(
    "drift_trends",
    (
        MODEL,
        Column("kind", "string", "of conversation, or `all`"),
        Column("condition", "string", "as in `drift`, or the difference of a floor and none over the same conversations"),
        Column("slope", "number", "mean over conversations of the least-squares slope of the projection", "projection a turn"),
        Column("lower", "number", "95% interval", nullable=True),
        Column("upper", "number", "95% interval", nullable=True),
        Column("se", "number", "standard error", nullable=True, low=0),
        Column("df", "integer", "degrees of freedom: conversations less one", low=0),
        Column("n", "integer", "conversations", low=1),
        Column("method", "string", "how the interval was made"),
    ),
    key=("model", "kind", "condition"),
)


@dataclass(frozen=True)
class Played:
    """One conversation under one setting, as far as it has gone; `history` is what the model is asked with."""

    conversation: DriftConversation
    setting: Setting
    history: tuple[dict[str, str], ...]


def play(
    model: SteeredModel,
    axis: Axis,
    conversations: Sequence[DriftConversation],
    settings: Sequence[Setting],
    sampling: Sampling,
    *,
    system: str,
    turns: int,
    seed: int,
    on_batch: Callable[[int], None] = lambda rows: None,
) -> pd.DataFrame:
    """Play every conversation under every setting; the rows of `DRIFT` without the model's name.

    A turn of all conversations and settings is one call. A row's draws depend on its conversation and turn alone.
    """
    from relseek_assets.axes.interventions import of_rows

    opening = ({"role": "system", "content": system},)
    states = [Played(conversation, setting, opening) for conversation in conversations for setting in settings]
    rows: list[dict[str, Any]] = []
    for turn in range(1, turns + 1):
        states = [state for state in states if turn <= len(state.conversation.turns)]
        if not states:
            break
        asked = [[*state.history, {"role": "user", "content": state.conversation.turns[turn - 1]}] for state in states]
        seeds = [keyed_seed(seed, "drift", state.conversation.conversation, turn) for state in states]
        with model.intervene(of_rows(axis, [state.setting for state in states])):
            replies = model.generate(asked, sampling, seeds=seeds, on_batch=on_batch)
        projections = reply_projections(model, axis, asked, [reply.text for reply in replies])
        for state, row_seed, reply, projection in zip(states, seeds, replies, projections, strict=True):
            rows.append(
                {
                    "conversation": state.conversation.conversation,
                    "kind": state.conversation.kind,
                    "condition": state.setting.condition.name,
                    "turn": turn,
                    "user": state.conversation.turns[turn - 1],
                    "reply": reply.text,
                    "tokens": len(reply.tokens),
                    "seed": row_seed,
                    "layer": axis.layer,
                    "projection": projection,
                    "percentile": None if np.isnan(projection) else 100 * float((axis.ordinary[:, axis.layer] < projection).mean()),
                }
            )
        states = [
            Played(state.conversation, state.setting, (*question, {"role": "assistant", "content": reply.text}))
            for state, question, reply in zip(states, asked, replies, strict=True)
        ]
    return pd.DataFrame(rows)


def reply_projections(model: SteeredModel, axis: Axis, asked: Sequence[Sequence[dict[str, str]]], replies: Sequence[str]) -> np.ndarray:
    """Mean projection of each reply at the axis' layer, with everything before it as context; NaN for a reply without tokens."""
    there = [row for row, reply in enumerate(replies) if model.reply_tokens(reply, end=False)]
    found = np.full(len(replies), np.nan)
    if there:
        read = model.projections([asked[row] for row in there], axis.units[axis.layer], [axis.layer], [replies[row] for row in there])
        found[there] = read[:, 0]
    return found


def trends(frame: pd.DataFrame) -> pd.DataFrame:
    """Slopes over turns by kind of conversation and of all, and those under a floor minus those without, as `DRIFT_TRENDS` without the model's name.

    Conversations are the units: each has one slope, and intervals are Student's t over them.
    """
    slopes = pd.DataFrame(
        [
            {"kind": kind, "conversation": conversation, "condition": condition, "slope": _slope(part)}
            for (kind, conversation, condition), part in frame.groupby(["kind", "conversation", "condition"])
        ]
    ).dropna()
    wide = slopes.pivot_table(index=["kind", "conversation"], columns="condition", values="slope")
    for name in [name for name in wide if name != "none"]:
        wide[f"{name} − none"] = wide[name] - wide["none"]
    rows = []
    for condition in wide:
        values = wide[condition].dropna()
        for kind, part in (*values.groupby(level="kind"), ("all", values)):
            rows.append({"kind": kind, "condition": condition, **_mean_row(part.to_numpy())})
    return pd.DataFrame(rows)


def _slope(part: pd.DataFrame) -> float:
    there = part.dropna(subset="projection")
    if there["turn"].nunique() < 2:
        return float("nan")
    return float(np.polyfit(there["turn"].to_numpy(float), there["projection"].to_numpy(float), 1)[0])


def _mean_row(values: np.ndarray) -> dict[str, Any]:
    from scipy.stats import t

    n = len(values)
    mean = float(values.mean())
    row = {"slope": mean, "df": n - 1, "n": n}
    if n == 1:
        return {**row, "lower": None, "upper": None, "se": None, "method": "one conversation: no interval"}
    se = float(values.std(ddof=1) / n**0.5)
    half = float(t.ppf(0.975, n - 1)) * se
    return {**row, "lower": mean - half, "upper": mean + half, "se": se, "method": "Student's t over conversations"}
