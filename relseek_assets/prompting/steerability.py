"""Experiment 1: replies to the held-out prompts at every level that is asked for in words (spec/pipeline.md, section 5.1).

Here belongs which rows there are and what each is asked. The steered model's side of the comparison is the sweep.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd

from relseek_assets.prompting.authors import Conversation, Writer
from relseek_assets.prompting.levels import Example, Level, Trait, drawn, level_prompt, persona_prompt
from relseek_assets.prompting.tables import PERSONA, PROMPTED_GENERATIONS, STEERED
from relseek_resources.storage import keyed_seed


@dataclass(frozen=True)
class SystemPrompts:
    """The system prompt of every author and level. Examples are drawn from the row's own key, the same for every author, so that authors compare."""

    trait: Trait
    examples: Sequence[Example]
    count: int
    plain: str
    seed: int

    def of(self, author: str, level: Level, row: str) -> tuple[str, list[str]]:
        """The system prompt of one row and the ids of the examples in it."""
        if author == STEERED:
            return self.plain, []
        if author == PERSONA:
            return persona_prompt(self.trait, level, self.plain), []
        shown = drawn(self.examples, self.count, self.seed, "prompting examples", level.number, level.count, row)
        return level_prompt(self.trait, level, shown), [example.id for example in shown]


@dataclass(frozen=True)
class LevelRow:
    """One reply to be written: level and item, its system prompt, and the seed of its random numbers."""

    author: str
    level: Level
    item: str
    prompt: Conversation
    system: str
    examples: list[str]
    seed: int

    @property
    def conversation(self) -> Conversation:
        return [{"role": "system", "content": self.system}, *self.prompt]


def level_rows(author: str, items: pd.DataFrame, levels: Sequence[Level], prompts: SystemPrompts) -> list[LevelRow]:
    """Every level of every item; `items` has the columns conversation and prompt."""
    rows = []
    for level in levels:
        for item, prompt in zip(items["conversation"], items["prompt"], strict=True):
            system, examples = prompts.of(author, level, item)
            seed = keyed_seed(prompts.seed, "prompted reply", author, level.number, level.count, item)
            rows.append(LevelRow(author, level, item, list(prompt), system, examples, seed))
    return rows


def written(rows: Sequence[LevelRow], writer: Writer) -> pd.DataFrame:
    """The rows with their replies, a table of PROMPTED_GENERATIONS."""
    replies = writer([row.conversation for row in rows], [row.seed for row in rows], [row.level.multiplier for row in rows])
    return pd.DataFrame(
        [
            {
                "author": row.author,
                "level": row.level.number,
                "multiplier": row.level.multiplier,
                "item": row.item,
                "prompt": row.prompt,
                "system_prompt": row.system,
                "examples": row.examples,
                "seed": row.seed,
                "source": "generated",
                **reply.columns,
            }
            for row, reply in zip(rows, replies, strict=True)
        ],
        columns=list(PROMPTED_GENERATIONS.names),
    )
