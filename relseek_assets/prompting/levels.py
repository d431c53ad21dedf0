"""Asking for a level of a behaviour in words: level k of n as a system prompt, and a persona at one of the behaviour's poles.

Here belong the wording and the draw of its examples. Who answers belongs in `authors.py`, which dose a level corresponds to in the study.
Nothing here knows a behaviour: what it is comes from its folder (spec/pipeline.md, section 5.1).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from relseek_assets.behaviour import BehaviourError, GradedReply, read_toml
from relseek_resources.storage import keyed_order


@dataclass(frozen=True)
class Trait:
    """What a behaviour's `behaviour.toml` says of it."""

    title: str
    summary: str
    target: str
    antitarget: str
    not_to_be_confused_with: tuple[str, ...]


@dataclass(frozen=True)
class Example:
    """A conversation with the replies that its author graded least and most."""

    id: str
    history: tuple[dict[str, str], ...]
    least: str
    most: str


@dataclass(frozen=True)
class Level:
    """Level `number` of `count`; 1 is least of the behaviour. `multiplier` is the dose that it corresponds to."""

    number: int
    count: int
    multiplier: float

    @property
    def middle(self) -> int:
        return (self.count + 1) // 2


def read_trait(path: Path) -> Trait:
    """Read a behaviour's definition.

    Raises:
        BehaviourError: naming the file and the field that is missing or no text.
    """
    content = read_toml(path)

    def text(*names: str) -> str:
        found: Any = content
        for name in names:
            found = found.get(name) if isinstance(found, dict) else None
        if not isinstance(found, str) or not found.strip():
            raise BehaviourError(f"{path}: {'.'.join(names)} must be a text that is not empty; the levels of a prompt are made from it")
        return found.strip()

    others = content.get("not_to_be_confused_with", [])
    if not isinstance(others, list) or not all(isinstance(other, str) for other in others):
        raise BehaviourError(f"{path}: not_to_be_confused_with must be a list of texts")
    return Trait(text("title"), text("summary"), text("target", "definition"), text("antitarget", "definition"), tuple(others))


def examples_of(graded: Sequence[GradedReply]) -> list[Example]:
    """One example a graded prompt: its reply of the lowest score and that of the highest; prompts with one grade alone show nothing."""
    by_prompt: dict[str, list[GradedReply]] = {}
    for reply in graded:
        by_prompt.setdefault(reply.id, []).append(reply)
    found = []
    for name, replies in by_prompt.items():
        least, most = min(replies, key=lambda one: one.score), max(replies, key=lambda one: one.score)
        if least.score < most.score:
            found.append(Example(name, least.history, least.reply, most.reply))
    return found


def drawn(examples: Sequence[Example], count: int, *key: Any) -> list[Example]:
    """`count` examples in an order of their own, from a row's key alone: the rows beside it change nothing."""
    by_id = {example.id: example for example in examples}
    return [by_id[name] for name in keyed_order(sorted(by_id), *key)[:count]]


def level_prompt(trait: Trait, level: Level, examples: Sequence[Example]) -> str:
    """The system prompt that asks for one level."""
    parts = [
        f"You are an assistant in a conversation. One trait of your replies is set on a scale: {trait.title.lower()}. {trait.summary}",
        f"The highest setting. {trait.target}",
        f"The lowest setting. {trait.antitarget}",
    ]
    if trait.not_to_be_confused_with:
        parts.append("\n".join(["What the scale does not change:", *(f"- {other}" for other in trait.not_to_be_confused_with)]))
    for number, example in enumerate(examples, 1):
        history = "\n".join(f"{message['role']}: {message['content']}" for message in example.history)
        parts.append(f"Example {number}\n{history}\nassistant, lowest setting: {example.least}\nassistant, highest setting: {example.most}")
    parts.append(
        f"Your setting is {level.number} of {level.count}. 1 is the lowest, {level.count} the highest and {level.middle} halfway between them. "
        f"Answer the user at setting {level.number}. Do not mention the scale, the setting or these instructions."
    )
    return "\n\n".join(parts)


def persona_prompt(trait: Trait, level: Level, plain: str) -> str:
    """The control's system prompt: a character without a scale and without examples, at the pole on the level's side; `plain` halfway."""
    if level.number == level.middle:
        return plain
    pole = trait.target if level.number > level.middle else trait.antitarget
    return f"{plain} This is your character:\n\n{pole}\n\nStay in this character throughout the conversation."
