"""Persona folders: the shipped one keeps its promises, and a faulty one is refused with its file, line and field."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from relseek_assets.persona_set import (
    CONVERSATION_KINDS,
    FILES,
    PERSONAS,
    QUERY_KINDS,
    PersonaSet,
    PersonaSetError,
    persona_folder,
    read_drift_conversations,
    read_persona_set,
    read_personas,
    read_prompts,
    read_queries,
)
from relseek_resources.storage import StorageError

SHIPPED = PERSONAS / "assistant"


@pytest.fixture
def personas() -> PersonaSet:
    return read_persona_set(persona_folder("assistant"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the shipped folder that a test may spoil."""
    return Path(shutil.copytree(SHIPPED, tmp_path / "personas"))


# --- the shipped set --------------------------------------------------------------------------------------------------


def test_the_folder_holds_its_five_files() -> None:
    assert {path.name for path in SHIPPED.iterdir()} == set(FILES.values())


def test_there_are_personas_enough_of_either_kind(personas: PersonaSet) -> None:
    assert len(personas.assistants) >= 4
    assert len(personas.others) >= 16
    assert len(personas.hostile) >= 5
    assert set(personas.hostile) <= set(personas.others)
    assert len({persona.system for persona in personas.personas}) == len(personas.personas)


def test_a_hundred_queries_in_five_kinds(personas: PersonaSet) -> None:
    assert Counter(query.kind for query in personas.queries) == dict.fromkeys(QUERY_KINDS, 20)
    assert len({query.text for query in personas.queries}) == 100


def test_the_prompts_of_interventions_are_no_queries(personas: PersonaSet) -> None:
    assert len(personas.prompts) == 40
    assert not {prompt.text for prompt in personas.prompts} & {query.text for query in personas.queries}
    assert set(Counter(prompt.kind for prompt in personas.prompts)) == set(QUERY_KINDS)


def test_eight_conversations_of_eight_turns(personas: PersonaSet) -> None:
    assert Counter(one.kind for one in personas.conversations) == dict.fromkeys(CONVERSATION_KINDS, 2)
    assert {len(one.turns) for one in personas.conversations} == {8}


def test_assistant_likeness_runs_from_zero_to_ten(personas: PersonaSet) -> None:
    rubric = personas.likeness_rubric
    assert (rubric.scale_min, rubric.scale_max) == (0, 10)
    assert [rubric.band_of(score) for score in (0, 10)] == [rubric.bands[0].label, rubric.bands[-1].label]
    whole = [score for band in rubric.bands for score in range(int(band.low), int(band.high) + 1)]
    assert whole == list(range(11)), "every whole score lies in one band"


def test_no_persona_names_the_axis_that_it_lies_on(personas: PersonaSet) -> None:
    """An assistant may be told that it is one; the others must differ by who they are and not by a word against assistants."""
    assert [persona.name for persona in personas.others if "assistant" in persona.system.lower()] == []


# --- a set of one's own -----------------------------------------------------------------------------------------------


def test_a_folder_is_found_by_name_or_by_path(folder: Path) -> None:
    assert persona_folder("assistant") == SHIPPED
    assert persona_folder(str(folder)) == folder
    with pytest.raises(PersonaSetError, match="'nobody' has no folder under .*; there is assistant"):
        persona_folder("nobody")


PERSONA = '[[persona]]\nname = "a"\nkind = "assistant"\nhostile = false\nsystem = "Help."\n'
OTHER = PERSONA.replace('"a"', '"b"').replace("assistant", "other")
PERSONA_FAULTS = {
    "a field is missing": (PERSONA.replace('system = "Help."\n', "") + OTHER, "persona 1: system is missing; add it"),
    "a field is unknown": (PERSONA + "rude = true\n" + OTHER, "persona 1: rude is unknown; the fields are name, kind, hostile, system"),
    "a text is empty": (PERSONA + OTHER.replace("Help.", " "), "persona 2: system must be a text that is not empty"),
    "hostile is a word": (PERSONA + OTHER.replace("false", '"no"'), "persona 2: hostile must be true or false, and is 'no'"),
    "another kind": (PERSONA + OTHER.replace('"other"', '"pirate"'), "persona 2: kind 'pirate' is none of assistant, other"),
    "a hostile assistant": (PERSONA.replace("false", "true") + OTHER, "persona 1: hostile is true for an assistant persona"),
    "a name twice": (PERSONA + OTHER.replace('"b"', '"a"'), "persona 2: the name 'a' is there already"),
    "no other": (PERSONA, "no persona of the kind 'other'; a direction needs both kinds, add one"),
    "no persona": ('name = "a"\n', "write every persona under [[persona]], and nothing else"),
    "no TOML": ("[[persona\n", "not valid TOML"),
}


@pytest.mark.parametrize(("text", "told"), PERSONA_FAULTS.values(), ids=PERSONA_FAULTS)
def test_a_faulty_persona_is_named(tmp_path: Path, text: str, told: str) -> None:
    path = tmp_path / "personas.toml"
    path.write_text(text)
    with pytest.raises(PersonaSetError) as caught:
        read_personas(path)
    assert str(caught.value).startswith(str(path))
    assert told in str(caught.value)


def test_a_folder_without_personas_says_what_it_should_hold(tmp_path: Path) -> None:
    with pytest.raises(PersonaSetError, match=r"personas.toml: cannot be read .*; a persona folder holds personas.toml, queries.jsonl"):
        read_personas(tmp_path / "personas.toml")


QUERY = {"query": "q-1", "kind": "factual", "text": "Why?"}
CONVERSATION = {"conversation": "c-1", "kind": "coding", "turns": ["One.", "Two."]}
LINE_FAULTS: dict[str, tuple[Callable[[Path], Any], list[Any], str]] = {
    "a query without text": (read_queries, [QUERY, {**QUERY, "query": "q-2", "text": ""}], "line 2: text must be a text that is not empty"),
    "a query of another kind": (read_queries, [{**QUERY, "kind": "rude"}], "line 1: kind 'rude' is none of factual, how_to"),
    "a query twice": (read_queries, [QUERY, QUERY], "line 2: the query 'q-1' is there already"),
    "a query without id": (read_queries, [{"kind": "factual", "text": "Why?"}], "line 1: query is missing; add it"),
    "a prompt with a query's id": (read_prompts, [QUERY], "line 1: prompt is missing; add it"),
    "a turn that is a number": (read_drift_conversations, [{**CONVERSATION, "turns": ["One.", 2]}], "line 1, turn 2: expected a text"),
    "no turns": (read_drift_conversations, [{**CONVERSATION, "turns": []}], "line 1: turns must be a list that is not empty"),
    "turns in one text": (read_drift_conversations, [{**CONVERSATION, "turns": "One."}], "line 1: turns must be a list"),
    "another kind of conversation": (read_drift_conversations, [{**CONVERSATION, "kind": "banter"}], "line 1: kind 'banter' is none of coding"),
    "nothing": (read_queries, [], "empty; write one JSON object a line"),
}


@pytest.mark.parametrize(("read", "rows", "told"), LINE_FAULTS.values(), ids=LINE_FAULTS)
def test_a_faulty_line_is_named(tmp_path: Path, read: Callable[[Path], Any], rows: list[Any], told: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(PersonaSetError) as caught:
        read(path)
    assert str(caught.value).startswith(str(path))
    assert told in str(caught.value)


def test_a_line_that_is_no_json_is_named(folder: Path) -> None:
    path = folder / FILES["queries"]
    path.write_text(path.read_text() + "{\n")
    with pytest.raises(StorageError, match=r"queries.jsonl, line 101: not valid JSON"):
        read_persona_set(folder)


def test_a_prompt_that_directions_have_seen_is_refused(folder: Path) -> None:
    with (folder / FILES["intervention_prompts"]).open("a") as stream:
        stream.write(json.dumps({"prompt": "seen", "kind": "factual", "text": "What causes the tides?"}) + "\n")
    with pytest.raises(PersonaSetError, match="the prompt 'seen' is the query 'factual-01' too; reword one of them"):
        read_persona_set(folder).prompts  # noqa: B018 (reading is what is tested)
