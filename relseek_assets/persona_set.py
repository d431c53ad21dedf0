"""A persona set: one folder with personas, the queries put to them, further prompts, conversations, and a rubric of assistant-likeness.

Here belongs reading and checking that folder. Pairing personas and what is made of their replies belongs in `vectors/`, drift and interventions
in `axes/`.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from relseek_assets.behaviour import Rubric, read_rubric
from relseek_resources.storage import read_jsonl

PERSONAS = Path(__file__).parent / "personas"
FILES = {
    "personas": "personas.toml",
    "queries": "queries.jsonl",
    "intervention_prompts": "prompts.jsonl",
    "drift_conversations": "conversations.jsonl",
    "likeness_rubric": "likeness_rubric.toml",
}
ASSISTANT, OTHER = "assistant", "other"
PERSONA_KINDS = (ASSISTANT, OTHER)
QUERY_KINDS = ("factual", "how_to", "advice", "creative", "edge_case")
CONVERSATION_KINDS = ("coding", "writing", "therapy", "philosophy")

Row = TypeVar("Row", bound="Persona | Query | Prompt | DriftConversation")


class PersonaSetError(ValueError):
    """A persona folder that cannot be used; the message names the file, the line or the entry, and the field."""


@dataclass(frozen=True)
class Persona:
    """Who the model is asked to be; `hostile` ones work against the assistant character."""

    name: str
    kind: str
    hostile: bool
    system: str


@dataclass(frozen=True)
class Query:
    """A question put to personas, from whose replies directions are made; `query` is its id."""

    query: str
    kind: str
    text: str


@dataclass(frozen=True)
class Prompt:
    """A question that no direction is made from, for interventions; `prompt` is its id."""

    prompt: str
    kind: str
    text: str


@dataclass(frozen=True)
class DriftConversation:
    """The user's turns of a conversation along which the model may leave the assistant character."""

    conversation: str
    kind: str
    turns: tuple[str, ...]


@dataclass(frozen=True)
class PersonaSet:
    """A persona folder, checked. Files are read when they are asked for, apart from the personas and the queries."""

    folder: Path
    personas: tuple[Persona, ...]
    queries: tuple[Query, ...]

    @property
    def assistants(self) -> tuple[Persona, ...]:
        return tuple(persona for persona in self.personas if persona.kind == ASSISTANT)

    @property
    def others(self) -> tuple[Persona, ...]:
        return tuple(persona for persona in self.personas if persona.kind == OTHER)

    @property
    def hostile(self) -> tuple[Persona, ...]:
        return tuple(persona for persona in self.personas if persona.hostile)

    @cached_property
    def prompts(self) -> tuple[Prompt, ...]:
        """Prompts of the interventions.

        Raises:
            PersonaSetError: a faulty line, or a text that is a query too.
        """
        path = self.folder / FILES["intervention_prompts"]
        texts = {query.text: query.query for query in self.queries}
        found = read_prompts(path)
        for prompt in found:
            if prompt.text in texts:
                raise PersonaSetError(f"{path}: the prompt {prompt.prompt!r} is the query {texts[prompt.text]!r} too; reword one of them")
        return found

    @cached_property
    def conversations(self) -> tuple[DriftConversation, ...]:
        return read_drift_conversations(self.folder / FILES["drift_conversations"])

    @cached_property
    def likeness_rubric(self) -> Rubric:
        return read_rubric(self.folder / FILES["likeness_rubric"])


def persona_folder(name_or_path: str, beside: Path = Path()) -> Path:
    """The folder of a persona set given by name (under `personas/`) or by its path from the folder `beside`, where the study's file lies.

    Raises:
        PersonaSetError: neither exists.
    """
    folder = Path(os.path.normpath(beside / name_or_path))
    ships = [] if "/" in name_or_path else [PERSONAS / name_or_path]
    for found in (*ships, folder):
        if (found / FILES["personas"]).is_file():
            return found
    known = sorted(found.name for found in PERSONAS.iterdir() if (found / FILES["personas"]).is_file())
    raise PersonaSetError(f"{name_or_path!r} has no folder under {PERSONAS}, and {folder} has no {FILES['personas']}; there is {', '.join(known)}")


def read_persona_set(folder: Path) -> PersonaSet:
    """Read and check the personas and queries of a folder.

    Raises:
        PersonaSetError: a faulty entry, or no persona of one of the two kinds.
    """
    return PersonaSet(folder, read_personas(folder / FILES["personas"]), read_queries(folder / FILES["queries"]))


def read_personas(path: Path) -> tuple[Persona, ...]:
    """Read and check `[[persona]]` tables, in the order of the file.

    Raises:
        PersonaSetError: a field that is missing or of another type, a repeated name, no persona of one of the two kinds.
    """
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise PersonaSetError(f"{path}: cannot be read ({error.strerror}); a persona folder holds {', '.join(FILES.values())}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise PersonaSetError(f"{path}: not valid TOML: {error}") from error
    rows = content.get("persona")
    if not isinstance(rows, list) or len(content) > 1:
        raise PersonaSetError(f"{path}: write every persona under [[persona]], and nothing else")
    found = _distinct(path, "name", ((f"persona {number}", _persona(row, f"{path}, persona {number}")) for number, row in enumerate(rows, 1)))
    for kind in PERSONA_KINDS:
        if all(persona.kind != kind for persona in found):
            raise PersonaSetError(f"{path}: no persona of the kind {kind!r}; a direction needs both kinds, add one")
    return found


def _persona(row: Any, where: str) -> Persona:
    _fields(row, {"name": str, "kind": str, "hostile": bool, "system": str}, where)
    _among(row["kind"], PERSONA_KINDS, where)
    if row["hostile"] and row["kind"] == ASSISTANT:
        raise PersonaSetError(f"{where}: hostile is true for an assistant persona; a hostile one is of the kind {OTHER!r}")
    return Persona(**row)


def read_queries(path: Path) -> tuple[Query, ...]:
    """Read and check the queries, in the order of the file.

    Raises:
        PersonaSetError: a field that is missing or of another type, an unknown kind, a repeated id.
    """

    def query(row: dict[str, Any], where: str) -> Query:
        _fields(row, {"query": str, "kind": str, "text": str}, where)
        _among(row["kind"], QUERY_KINDS, where)
        return Query(**row)

    return _lines(path, "query", query)


def read_prompts(path: Path) -> tuple[Prompt, ...]:
    """Read and check the prompts of the interventions, in the order of the file; faults as those of queries."""

    def prompt(row: dict[str, Any], where: str) -> Prompt:
        _fields(row, {"prompt": str, "kind": str, "text": str}, where)
        _among(row["kind"], QUERY_KINDS, where)
        return Prompt(**row)

    return _lines(path, "prompt", prompt)


def read_drift_conversations(path: Path) -> tuple[DriftConversation, ...]:
    """Read and check the conversations, in the order of the file; faults as those of queries, and turns that are no texts."""

    def conversation(row: dict[str, Any], where: str) -> DriftConversation:
        _fields(row, {"conversation": str, "kind": str, "turns": list}, where)
        _among(row["kind"], CONVERSATION_KINDS, where)
        for number, turn in enumerate(row["turns"], 1):
            if not isinstance(turn, str) or not turn.strip():
                raise PersonaSetError(f"{where}, turn {number}: expected a text that is not empty, found {turn!r}")
        return DriftConversation(row["conversation"], row["kind"], tuple(row["turns"]))

    return _lines(path, "conversation", conversation)


def _lines(path: Path, identity: str, made: Callable[[dict[str, Any], str], Row]) -> tuple[Row, ...]:
    found = _distinct(path, identity, ((f"line {number}", made(row, f"{path}, line {number}")) for number, row in read_jsonl(path)))
    if not found:
        raise PersonaSetError(f"{path}: empty; write one JSON object a line")
    return found


def _distinct(path: Path, identity: str, rows: Iterator[tuple[str, Row]]) -> tuple[Row, ...]:
    found: dict[str, Row] = {}
    for place, row in rows:
        name = getattr(row, identity)
        if name in found:
            raise PersonaSetError(f"{path}, {place}: the {identity} {name!r} is there already; each needs one of its own")
        found[name] = row
    return tuple(found.values())


def _fields(row: Any, fields: dict[str, type], where: str) -> None:
    if not isinstance(row, dict):
        raise PersonaSetError(f"{where}: expected an object with {', '.join(fields)}")
    missing = [name for name in fields if name not in row]
    if missing:
        raise PersonaSetError(f"{where}: {', '.join(missing)} is missing; add it")
    unknown = [name for name in row if name not in fields]
    if unknown:
        raise PersonaSetError(f"{where}: {', '.join(unknown)} is unknown; the fields are {', '.join(fields)}")
    for name, kind in fields.items():
        value = row[name]
        empty = kind is not bool and isinstance(value, kind) and not (value.strip() if isinstance(value, str) else value)
        if not isinstance(value, kind) or empty:
            wanted = {str: "a text that is not empty", list: "a list that is not empty", bool: "true or false"}[kind]
            raise PersonaSetError(f"{where}: {name} must be {wanted}, and is {value!r}")


def _among(value: str, kinds: tuple[str, ...], where: str) -> None:
    if value not in kinds:
        raise PersonaSetError(f"{where}: kind {value!r} is none of {', '.join(kinds)}")
