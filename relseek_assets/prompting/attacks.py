"""Experiment 2: ordinary conversations that end in an attack on the persona, every reply by the author (spec/pipeline.md, section 5.2).

Here belongs how conversations are played. Their messages come from the behaviour's folder (`persona_attacks.py`), how far an attack moves its author
is computed in `analysis.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pandas as pd

from relseek_assets.persona_attacks import Scenario
from relseek_assets.prompting.authors import Conversation, Writer
from relseek_assets.prompting.levels import Level
from relseek_assets.prompting.steerability import SystemPrompts
from relseek_assets.prompting.tables import ATTACK_CONVERSATIONS, NOT_REACHED
from relseek_resources.storage import keyed_seed

UNANSWERED = {"reply": None, "finished": None, "seed": None, "status": NOT_REACHED, "model": None, "attempt": 1}
UNPAID = {"prompt_tokens": 0, "completion_tokens": 0, "cost_usd": 0.0}


@dataclass
class Played:
    """A conversation under way; it ends where a turn stays without a reply."""

    scenario: Scenario
    level: Level
    system: str
    examples: list[str]
    history: Conversation = field(default_factory=list)
    ended: bool = False

    @property
    def turns(self) -> int:
        return len(self.scenario.turns)

    def asked_at(self, turn: int) -> Conversation:
        """The user's messages up to a turn after the system prompt, without the replies between them, which nobody has written yet."""
        return [{"role": "system", "content": self.system}, *({"role": "user", "content": text} for text in self.scenario.turns[: turn + 1])]


def started(author: str, scenarios: Sequence[Scenario], levels: Sequence[Level], prompts: SystemPrompts) -> list[Played]:
    """Every scenario at every level, before its first turn. A prompted model keeps one system prompt throughout a conversation."""
    return [Played(scenario, level, *prompts.of(author, level, scenario.name)) for level in levels for scenario in scenarios]


def play(author: str, conversations: Sequence[Played], writer: Writer, seed: int) -> pd.DataFrame:
    """Play conversations turn by turn, all of them together, and return a table of ATTACK_CONVERSATIONS."""
    rows: list[dict[str, Any]] = []
    for turn in range(max(played.turns for played in conversations)):
        there = [played for played in conversations if turn < played.turns]
        going = [played for played in there if not played.ended]
        for played in going:
            played.history.append({"role": "user", "content": played.scenario.turns[turn]})
        seeds = [keyed_seed(seed, "attacked reply", author, played.level.number, played.level.count, played.scenario.name, turn) for played in going]
        asked = [[{"role": "system", "content": played.system}, *played.history] for played in going]
        replies = writer(asked, seeds, [played.level.multiplier for played in going]) if going else []
        found = {id(played): (own, reply) for played, own, reply in zip(going, seeds, replies, strict=True)}
        for played in there:
            row = _row(author, played, turn)
            if id(played) in found:
                own, reply = found[id(played)]
                row |= {"seed": own, **reply.columns}
                played.ended = reply.text is None
                played.history.append({"role": "assistant", "content": reply.text or ""})
            rows.append(row)
    return pd.DataFrame(rows, columns=list(ATTACK_CONVERSATIONS.names))


def _row(author: str, played: Played, turn: int) -> dict[str, Any]:
    return {
        "author": author,
        "theme": played.scenario.theme,
        "level": played.level.number,
        "multiplier": played.level.multiplier,
        "scenario": played.scenario.name,
        "attack_type": played.scenario.attack_type,
        "turn": turn,
        "is_attack": turn == played.turns - 1,
        "user": played.scenario.turns[turn],
        "system_prompt": played.system,
        "examples": played.examples,
        "source": "generated",
        **UNANSWERED,
        **UNPAID,
    }


def histories(turns: pd.DataFrame) -> list[Conversation]:
    """The messages before each reply, without the system prompt, in the order of the rows."""
    said: dict[tuple[int, str], Conversation] = {}
    found: dict[Any, Conversation] = {}
    for row in turns.sort_values("turn").itertuples():
        before = said.setdefault((row.level, row.scenario), [])
        found[row.Index] = [*before, {"role": "user", "content": row.user}]
        said[row.level, row.scenario] = [*found[row.Index], {"role": "assistant", "content": row.reply if isinstance(row.reply, str) else ""}]
    return [found[index] for index in turns.index]
