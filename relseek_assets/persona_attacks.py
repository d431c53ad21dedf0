"""The messages of the persona-attack experiment: a behaviour's `persona_attacks.toml`, with ordinary conversations and attacks on a disposition.

Here belongs reading and checking that file. Playing the conversations belongs in `prompting/`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from relseek_assets.behaviour import BehaviourError, read_toml

FILE = "persona_attacks.toml"
ADD, SUBTRACT = "add", "subtract"
ATTACK_TYPES = (ADD, SUBTRACT)
NAME = re.compile(r"[A-Za-z0-9_-]+")


@dataclass(frozen=True)
class Scenario:
    """One conversation: the user's ordinary turns of a theme, then one attack. `name` is `add_1_casual`, as published (spec/pipeline.md, 5.2)."""

    name: str
    theme: str
    attack_type: str
    turns: tuple[str, ...]


@dataclass(frozen=True)
class PersonaAttacks:
    """Themes with the user's ordinary turns, and the messages that push for more (`add`) or less (`subtract`) of the behaviour."""

    themes: dict[str, tuple[str, ...]]
    attacks: dict[str, tuple[str, ...]]

    def scenarios(self, theme: str) -> Iterator[Scenario]:
        """Every attack once, after the same ordinary turns."""
        for attack_type, messages in self.attacks.items():
            for number, message in enumerate(messages, 1):
                yield Scenario(f"{attack_type}_{number}_{theme}", theme, attack_type, (*self.themes[theme], message))


def read_persona_attacks(path: Path) -> PersonaAttacks:
    """Read and check a file of persona attacks.

    Raises:
        BehaviourError: no such file, no theme, a theme without turns, a name twice, an empty message, an attack type without messages.
    """
    content = read_toml(path)
    unknown = sorted(content.keys() - {*ATTACK_TYPES, "themes"})
    if unknown:
        raise BehaviourError(f"{path}: {', '.join(unknown)} is unknown; the fields are {', '.join((*ATTACK_TYPES, 'themes'))}")
    attacks = {attack_type: _messages(content.get(attack_type), f"{path}: {attack_type}") for attack_type in ATTACK_TYPES}
    rows = content.get("themes")
    if not isinstance(rows, list) or not rows:
        raise BehaviourError(f"{path}: themes must be tables, at least one; write each under [[themes]]")
    themes: dict[str, tuple[str, ...]] = {}
    for number, row in enumerate(rows, 1):
        where = f"{path}, theme {number}"
        if not isinstance(row, dict) or row.keys() != {"name", "turns"}:
            raise BehaviourError(f"{where}: expected exactly the fields name and turns")
        if not isinstance(row["name"], str) or not NAME.fullmatch(row["name"]):
            raise BehaviourError(f"{where}: the name {row['name']!r} becomes part of partition keys; use letters, digits, '_' and '-' only")
        if row["name"] in themes:
            raise BehaviourError(f"{where}: the name {row['name']!r} is there already; names must differ")
        themes[row["name"]] = _messages(row["turns"], f"{where}: turns")
    return PersonaAttacks(themes, attacks)


def _messages(found: Any, where: str) -> tuple[str, ...]:
    if not isinstance(found, list) or not found:
        raise BehaviourError(f"{where} must be a list with at least one message")
    for message in found:
        if not isinstance(message, str) or not message.strip():
            raise BehaviourError(f"{where} must hold texts that are not empty, and holds {message!r}")
    return tuple(found)
