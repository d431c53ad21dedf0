"""A behaviour: one folder with a definition, rubrics, graded examples and starter conversations.

Here belongs reading and checking that folder. What is made of the conversations belongs in `dataset/`, of the rubrics in
`judging/`.
"""

from __future__ import annotations

import math
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from relseek_resources.storage import read_jsonl

FILES = {
    "behaviour_definition": "behaviour.toml",
    "rating_rubric": "rating_rubric.toml",
    "coherence_rubric": "coherence_rubric.toml",
    "pairwise_definition": "pairwise.toml",
    "few_shots": "few_shots.jsonl",
    "starter_conversations": "conversations.jsonl",
}
PROMPT_TYPES = {
    "1A": "goal directed, open",
    "1B": "goal directed, yes or no",
    "1C": "goal directed, several turns",
    "1CL": "goal directed, long",
    "2A": "style directed, open",
    "2B": "style directed, yes or no",
    "2C": "style directed, several turns",
    "2CL": "style directed, long",
}


class BehaviourError(ValueError):
    """A behaviour folder that cannot be used; the message names the file, the line and the field."""


@dataclass(frozen=True)
class Turn:
    """A user turn and its two parallel replies."""

    user: str
    target: str
    antitarget: str


@dataclass(frozen=True)
class StarterConversation:
    """A conversation whose every user turn has a target and an anti-target reply."""

    id: str
    prompt_type: str
    topic: str
    user: str
    turns: tuple[Turn, ...]


@dataclass(frozen=True)
class Band:
    """A band of a rubric: the scores from `low` to `high` and what they look like."""

    low: float
    high: float
    label: str
    anchor: str


@dataclass(frozen=True)
class Rubric:
    """A rating scale with its six anchored bands, as a judge is shown it."""

    name: str
    scale_min: float
    scale_max: float
    question: str
    instructions: str
    bands: tuple[Band, ...]

    def band_of(self, score: float) -> str:
        """The label of the band that holds `score`; between two bands, the one that starts last below it."""
        return next((band.label for band in reversed(self.bands) if score >= band.low), self.bands[0].label)


@dataclass(frozen=True)
class GradedReply:
    """A reply with the score that the behaviour's author gave it, and the conversation before it."""

    id: str
    history: tuple[dict[str, str], ...]
    reply: str
    score: float


def read_conversations(path: Path) -> list[StarterConversation]:
    """Read and check starter conversations, sorted by id.

    Raises:
        BehaviourError: a missing field, an empty text, an unknown prompt type, a repeated id.
    """
    found: dict[str, StarterConversation] = {}
    for number, row in read_jsonl(path):
        where = f"{path}, line {number}"
        _needs(row, ("id", "type", "topic", "user", "turns"), where)
        _texts(row, ("id", "type", "topic", "user"), where)
        if row["type"] not in PROMPT_TYPES:
            raise BehaviourError(f"{where}: type {row['type']!r} is none of {', '.join(PROMPT_TYPES)}")
        if row["id"] in found:
            raise BehaviourError(f"{where}: the id {row['id']!r} is there already; ids must differ")
        if not isinstance(row["turns"], list) or not row["turns"]:
            raise BehaviourError(f"{where}: turns must be a list with at least one turn")
        turns = []
        for index, turn in enumerate(row["turns"], 1):
            _needs(turn, ("user", "target", "antitarget"), f"{where}, turn {index}")
            _texts(turn, ("user", "target", "antitarget"), f"{where}, turn {index}")
            turns.append(Turn(**turn))
        found[row["id"]] = StarterConversation(row["id"], row["type"], row["topic"], row["user"], tuple(turns))
    if not found:
        raise BehaviourError(f"{path}: no conversations; write one JSON object a line")
    return [found[key] for key in sorted(found)]


def read_rubric(path: Path) -> Rubric:
    """Read a rubric and check that its bands cover the scale in order.

    Raises:
        BehaviourError: a missing field, or bands that are out of order or leave the scale.
    """
    content = read_toml(path)
    _needs(content, ("name", "scale_min", "scale_max", "question", "instructions", "bands"), str(path), exact=False)
    _texts(content, ("name", "question", "instructions"), str(path))
    _numbers(content, ("scale_min", "scale_max"), str(path))
    if not isinstance(content["bands"], list):
        raise BehaviourError(f"{path}: bands must be a list of tables; write each under [[bands]]")
    bands = []
    for index, band in enumerate(content["bands"], 1):
        _needs(band, ("low", "high", "label", "anchor"), f"{path}, band {index}")
        _numbers(band, ("low", "high"), f"{path}, band {index}")
        _texts(band, ("label", "anchor"), f"{path}, band {index}")
        bands.append(Band(**band))
    edges = [edge for band in bands for edge in (band.low, band.high)]
    if len(bands) != 6 or edges != sorted(edges) or edges[0] != content["scale_min"] or edges[-1] != content["scale_max"]:
        raise BehaviourError(f"{path}: the rubric needs six bands in ascending order that span {content['scale_min']} to {content['scale_max']}")
    return Rubric(content["name"], content["scale_min"], content["scale_max"], content["question"], content["instructions"], tuple(bands))


def rubric_files(folder: Path) -> dict[str, Path]:
    """Rubrics of a behaviour by the name of their source, `rating_rubric` first: the two that each behaviour has and any `*_rubric.toml` beside."""
    names = ["rating_rubric", "coherence_rubric"]
    names += sorted(path.stem for path in folder.glob("*_rubric.toml") if path.stem not in names)
    return {name: folder / f"{name}.toml" for name in names}


def read_rubrics(folder: Path) -> dict[str, Rubric]:
    """Every rubric of a behaviour by the name of its source.

    Raises:
        BehaviourError: a rubric that cannot be read, or two of one name.
    """
    found = {name: read_rubric(path) for name, path in rubric_files(folder).items()}
    names = [rubric.name for rubric in found.values()]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise BehaviourError(f"{folder}: the rubrics {repeated} are there more than once; give each `*_rubric.toml` a name of its own")
    return found


def read_graded_replies(path: Path) -> list[GradedReply]:
    """Read the graded examples: for each prompt several replies with their scores.

    Raises:
        BehaviourError: a missing field, an empty reply or a score that is no number.
    """
    found = []
    for number, row in read_jsonl(path):
        where = f"{path}, line {number}"
        _needs(row, ("id", "history", "replies"), where, exact=False)
        for name in ("history", "replies"):
            if not isinstance(row[name], list) or not row[name]:
                raise BehaviourError(f"{where}: {name} must be a list with at least one entry")
        for reply in row["replies"]:
            _needs(reply, ("score", "reply"), where)
            _numbers(reply, ("score",), where)
            _texts(reply, ("reply",), where)
            found.append(GradedReply(row["id"], tuple(row["history"]), reply["reply"], float(reply["score"])))
    return found


def read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise BehaviourError(f"{path}: no such file; a behaviour folder holds {', '.join(FILES.values())}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise BehaviourError(f"{path}: not valid TOML: {error}") from error


def _needs(row: Any, names: tuple[str, ...], where: str, *, exact: bool = True) -> None:
    if not isinstance(row, dict):
        raise BehaviourError(f"{where}: expected an object with {', '.join(names)}")
    missing = [name for name in names if name not in row]
    unknown = [name for name in row if name not in names] if exact else []
    if missing:
        raise BehaviourError(f"{where}: {', '.join(missing)} is missing; add it")
    if unknown:
        raise BehaviourError(f"{where}: {', '.join(unknown)} is unknown; the fields are {', '.join(names)}")


def _texts(row: dict[str, Any], names: tuple[str, ...], where: str) -> None:
    for name in names:
        if not isinstance(row[name], str) or not row[name].strip():
            raise BehaviourError(f"{where}: {name} must be a text that is not empty, and is {row[name]!r}")


def _numbers(row: dict[str, Any], names: tuple[str, ...], where: str) -> None:
    for name in names:
        if not isinstance(row[name], int | float) or isinstance(row[name], bool) or not math.isfinite(row[name]):
            raise BehaviourError(f"{where}: the {name} {row[name]!r} is no number")
