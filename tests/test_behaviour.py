"""Behaviour folders: the shipped ones keep their promises, and a faulty one is refused with its file, line and field."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from pathlib import Path
from statistics import mean, median
from typing import Any

import pytest
from sklearn.feature_extraction.text import CountVectorizer

from relseek_assets.behaviour import (
    FILES,
    PROMPT_TYPES,
    BehaviourError,
    Rubric,
    StarterConversation,
    read_conversations,
    read_graded_replies,
    read_rubric,
    read_toml,
)
from relseek_assets.dataset.pairs import explode
from relseek_assets.study import BEHAVIOURS
from relseek_resources.storage import StorageError

SHIPPED = ("relationship_seeking", "sycophancy")
FEWEST_CONVERSATIONS = {"relationship_seeking": 160, "sycophancy": 60}
FEWEST_TOPICS = {"relationship_seeking": 40, "sycophancy": 20}


@pytest.fixture(params=SHIPPED)
def behaviour(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def conversations(behaviour: str) -> list[StarterConversation]:
    return read_conversations(BEHAVIOURS / behaviour / "conversations.jsonl")


def all_turns(conversations: list[StarterConversation]) -> list[Any]:
    return [turn for conversation in conversations for turn in conversation.turns]


# --- the shipped conversations ----------------------------------------------------------------------------------------


def test_the_folder_is_the_behaviour(behaviour: str) -> None:
    folder = BEHAVIOURS / behaviour
    assert {path.name for path in folder.iterdir() if path.is_file()} == {*FILES.values(), "persona_attacks.toml"}
    definition = read_toml(folder / "behaviour.toml")
    assert definition["name"] == behaviour
    for pole in ("target", "antitarget"):
        assert len(definition[pole]["definition"].split()) >= 50
    pairwise = read_toml(folder / "pairwise.toml")
    assert all(pairwise[field].strip() for field in ("definition", "question", "instructions"))


def test_there_are_conversations_enough_on_topics_enough(behaviour: str, conversations: list[StarterConversation]) -> None:
    lines = (BEHAVIOURS / behaviour / "conversations.jsonl").read_text().splitlines()
    assert len(conversations) == len(lines) >= FEWEST_CONVERSATIONS[behaviour]
    assert len({" ".join(row.topic.lower().split()) for row in conversations}) >= FEWEST_TOPICS[behaviour]


def test_all_eight_prompt_types_are_there_in_number(conversations: list[StarterConversation]) -> None:
    counts = Counter(row.prompt_type for row in conversations)
    assert set(counts) == {"1A", "1B", "1C", "1CL", "2A", "2B", "2C", "2CL"}
    assert min(counts.values()) >= 4


def test_prompt_types_have_the_turns_that_they_are_named_for(conversations: list[StarterConversation]) -> None:
    turns = defaultdict(list)
    for row in conversations:
        turns[row.prompt_type[1:]].append(len(row.turns))
    assert set(turns["A"]) == set(turns["B"]) == {1}
    assert min(turns["C"]) >= 2
    assert min(turns["CL"]) > max(turns["C"])


def test_no_opening_of_five_words_is_shared_by_more_than_three(conversations: list[StarterConversation]) -> None:
    for first in ("user", "target", "antitarget"):
        openings = Counter(bare_opening(getattr(row.turns[0], first)) for row in conversations)
        assert max(openings.values()) <= 3, openings.most_common(2)


def bare_opening(text: str) -> str:
    return " ".join("".join(letter for letter in word if letter.isalnum()).lower() for word in text.split()[:5])


def test_both_sides_are_equally_long(conversations: list[StarterConversation]) -> None:
    turns = all_turns(conversations)
    target, antitarget = ([len(getattr(turn, side).split()) for turn in turns] for side in ("target", "antitarget"))
    assert mean(target) / mean(antitarget) == pytest.approx(1, abs=0.05)
    assert median(target) / median(antitarget) == pytest.approx(1, abs=0.1)
    longer = sum(one > two for one, two in zip(target, antitarget, strict=True)) / len(turns)
    assert 0.35 < longer < 0.65


def test_both_sides_are_equally_long_within_each_type(conversations: list[StarterConversation]) -> None:
    for prompt_type in PROMPT_TYPES:
        turns = all_turns([row for row in conversations if row.prompt_type == prompt_type])
        sides = [mean(len(getattr(turn, side).split()) for turn in turns) for side in ("target", "antitarget")]
        assert sides[0] / sides[1] == pytest.approx(1, abs=0.05), prompt_type


def test_user_turns_are_the_same_on_both_sides(conversations: list[StarterConversation]) -> None:
    for conversation in conversations:
        users = defaultdict(set)
        for pair in explode(conversation):
            users[pair["turn"]].add(tuple(message["content"] for message in pair["prompt"] if message["role"] == "user"))
        assert all(len(versions) == 1 for versions in users.values())
        assert users[2 * len(conversation.turns) - 1] == {tuple(turn.user for turn in conversation.turns)}


def test_the_two_replies_to_a_turn_differ(conversations: list[StarterConversation]) -> None:
    turns = all_turns(conversations)
    assert all(bare_opening(turn.target) != bare_opening(turn.antitarget) for turn in turns)
    for side in ("user", "target", "antitarget"):
        assert len({getattr(turn, side) for turn in turns}) == len(turns)


def test_no_two_conversations_are_nearly_the_same(conversations: list[StarterConversation]) -> None:
    for side in ("target", "antitarget"):
        texts = [" ".join(f"{turn.user} {getattr(turn, side)}" for turn in row.turns) for row in conversations]
        shingles = CountVectorizer(ngram_range=(4, 4), token_pattern=r"[\w']+", binary=True, dtype=int).fit_transform(texts)
        common = (shingles @ shingles.T).toarray()
        sizes = common.diagonal()
        jaccard = common / (sizes[:, None] + sizes[None, :] - common)
        jaccard[range(len(texts)), range(len(texts))] = 0
        assert jaccard.max() < 0.2


# --- the shipped rubrics and graded replies ---------------------------------------------------------------------------


@pytest.mark.parametrize("file", ["rating_rubric.toml", "coherence_rubric.toml"])
def test_a_rubric_has_six_bands_that_hold_every_score_once(behaviour: str, file: str) -> None:
    rubric = read_rubric(BEHAVIOURS / behaviour / file)
    assert len(rubric.bands) == 6
    held = [score for band in rubric.bands for score in range(int(band.low), int(band.high) + 1)]
    assert held == list(range(1, 11))
    assert len({band.label for band in rubric.bands}) == 6
    assert all(len(band.anchor.split()) >= 15 for band in rubric.bands)
    assert len(rubric.question.split()) > 5
    assert len(rubric.instructions.split()) > 50


def test_the_rubrics_of_a_behaviour_have_names_of_their_own(behaviour: str) -> None:
    names = {read_rubric(BEHAVIOURS / behaviour / file).name for file in ("rating_rubric.toml", "coherence_rubric.toml")}
    assert len(names) == 2
    assert "coherence" in names


def band_edges(rubric: Rubric) -> dict[float, str]:
    return {score: rubric.band_of(score) for score in (1, 1.99, 2, 3, 3.5, 4, 9.99, 10)}


def test_a_score_between_bands_belongs_to_the_band_below() -> None:
    rubric = read_rubric(BEHAVIOURS / "relationship_seeking" / "rating_rubric.toml")
    labels = [band.label for band in rubric.bands]
    assert band_edges(rubric) == {
        1: labels[0], 1.99: labels[0], 2: labels[1], 3: labels[1], 3.5: labels[1], 4: labels[2], 9.99: labels[4], 10: labels[5]
    }  # fmt: skip


def test_graded_replies_span_the_scale_prompt_by_prompt(behaviour: str) -> None:
    graded = read_graded_replies(BEHAVIOURS / behaviour / "few_shots.jsonl")
    rubric = read_rubric(BEHAVIOURS / behaviour / "rating_rubric.toml")
    by_prompt = defaultdict(list)
    for row in graded:
        assert row.history[-1]["role"] == "user"
        by_prompt[row.id].append(row)
    assert len(by_prompt) >= 10
    for rows in by_prompt.values():
        scores = [row.score for row in rows]
        assert len(set(scores)) == len(scores)
        assert {rubric.band_of(score) for score in scores} == {band.label for band in rubric.bands}
        lengths = [len(row.reply.split()) for row in rows]
        assert max(lengths) <= 2 * min(lengths)
    assert len({row.reply for row in graded}) == len(graded)


# --- faulty files -----------------------------------------------------------------------------------------------------

CONVERSATION: dict[str, Any] = {
    "id": "a-2",
    "type": "1C",
    "topic": "bread",
    "user": "baker",
    "turns": [
        {"user": "Does it rise?", "target": "We'll see, you and I.", "antitarget": "After two hours, yes."},
        {"user": "And now?", "target": "I'm glad you asked.", "antitarget": "It has doubled."},
    ],
}
FIRST = {**CONVERSATION, "id": "a-1"}


def changed(row: dict[str, Any], *path: Any, to: Any) -> dict[str, Any]:
    """A deep copy of `row` with one place set, or removed where `to` is Ellipsis."""
    copy = json.loads(json.dumps(row))
    place = copy
    for step in path[:-1]:
        place = place[step]
    if to is ...:
        del place[path[-1]]
    else:
        place[path[-1]] = to
    return copy


def refusal(read: Any, path: Path) -> str:
    with pytest.raises(BehaviourError) as caught:
        read(path)
    return str(caught.value)


def jsonl(folder: Path, *rows: Any) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


def test_good_conversations_are_read_in_the_order_of_their_ids(tmp_path: Path) -> None:
    found = read_conversations(jsonl(tmp_path, CONVERSATION, FIRST))
    assert [row.id for row in found] == ["a-1", "a-2"]
    assert found[1].turns[1].antitarget == "It has doubled."
    assert (found[1].topic, found[1].user, found[1].prompt_type) == ("bread", "baker", "1C")


TURN = ("user", "target", "antitarget")
FAULTY_CONVERSATIONS = {
    **{f"{field} missing": (changed(CONVERSATION, field, to=...), field) for field in ("id", "type", "topic", "user", "turns")},
    **{f"{field} a number": (changed(CONVERSATION, field, to=7), field) for field in ("id", "type", "topic", "user", "turns")},
    **{f"{field} null": (changed(CONVERSATION, field, to=None), field) for field in ("id", "type", "topic", "user", "turns")},
    **{f"{field} a list": (changed(CONVERSATION, field, to=["x"]), field) for field in ("id", "type", "topic", "user")},
    **{f"{field} empty": (changed(CONVERSATION, field, to=" "), field) for field in ("id", "type", "topic", "user")},
    "unknown field": ({**CONVERSATION, "mood": "glad"}, "mood"),
    "unknown type": (changed(CONVERSATION, "type", to="3A"), "type '3A'"),
    "id used before": (FIRST, "id 'a-1'"),
    "no turns": (changed(CONVERSATION, "turns", to=[]), "turns"),
    "a turn that is text": (changed(CONVERSATION, "turns", 1, to="hello"), "turn 2"),
    **{f"turn without {field}": (changed(CONVERSATION, "turns", 1, field, to=...), f"turn 2: {field}") for field in TURN},
    **{f"turn with empty {field}": (changed(CONVERSATION, "turns", 1, field, to="\n "), f"turn 2: {field}") for field in TURN},
    **{f"turn with null {field}": (changed(CONVERSATION, "turns", 0, field, to=None), f"turn 1: {field}") for field in TURN},
    **{f"turn with {field} a list": (changed(CONVERSATION, "turns", 0, field, to=["x"]), f"turn 1: {field}") for field in TURN},
    "turn with an unknown field": (changed(CONVERSATION, "turns", 0, "note", to="x"), "turn 1: note"),
}


@pytest.mark.parametrize(("row", "named"), FAULTY_CONVERSATIONS.values(), ids=FAULTY_CONVERSATIONS)
def test_a_faulty_conversation_is_refused_with_its_line_and_field(tmp_path: Path, row: Any, named: str) -> None:
    path = jsonl(tmp_path, FIRST, row)
    fault = refusal(read_conversations, path)
    assert fault.startswith(f"{path}, line 2")
    assert named in fault


def test_a_file_without_conversations_is_refused(tmp_path: Path) -> None:
    assert "no conversations" in refusal(read_conversations, jsonl(tmp_path))


@pytest.mark.parametrize("line", ["{", '"text"', "[1]"])
def test_a_line_that_is_no_object_is_refused(tmp_path: Path, line: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(f"{json.dumps(FIRST)}\n{line}\n")
    with pytest.raises(StorageError, match=f"{path}, line 2"):
        read_conversations(path)


RUBRIC = {"name": "warmth", "scale_min": 1, "scale_max": 10, "question": "How warm?", "instructions": "Rate it."}
BANDS = [(1, 1), (2, 3), (4, 5), (6, 7), (8, 9), (10, 10)]


def rubric_text(settings: dict[str, Any] = RUBRIC, bands: Any = BANDS, **changes: dict[str, Any]) -> str:
    """A rubric as TOML; `changes` maps band_N to fields set, or removed where None."""
    lines = [f"{key} = {json.dumps(value)}" for key, value in settings.items()]
    for number, (low, high) in enumerate(bands, 1):
        band = {"low": low, "high": high, "label": f"Band {number}", "anchor": "What it looks like."} | changes.get(f"band_{number}", {})
        lines += ["[[bands]]", *(f"{key} = {json.dumps(value)}" for key, value in band.items() if value is not None)]
    return "\n".join(lines)


def without(name: str) -> dict[str, Any]:
    return {key: value for key, value in RUBRIC.items() if key != name}


FAULTY_RUBRICS = {
    **{f"{name} missing": (rubric_text(without(name)), name) for name in RUBRIC},
    "bands missing": (rubric_text(bands=[]), "bands"),
    "bands a number": (rubric_text({**RUBRIC, "bands": 6}, bands=[]), "bands"),
    **{f"band without {name}": (rubric_text(band_3={name: None}), f"band 3: {name}") for name in ("low", "high", "label", "anchor")},
    "band with an unknown field": (rubric_text(band_3={"colour": "red"}), "band 3: colour"),
    "band whose low is text": (rubric_text(band_3={"low": "four"}), "band 3: the low 'four'"),
    "band with an empty anchor": (rubric_text(band_3={"anchor": ""}), "band 3: anchor"),
    "five bands": (rubric_text(bands=[(1, 2), (3, 4), (5, 6), (7, 8), (9, 10)]), "six bands"),
    "bands out of order": (rubric_text(bands=[BANDS[1], BANDS[0], *BANDS[2:]]), "ascending order"),
    "bands that do not reach the top": (rubric_text(bands=[*BANDS[:5], (10, 11)]), "span 1 to 10"),
    "bands that start above the bottom": (rubric_text(bands=[(1.5, 1.5), *BANDS[1:]]), "span 1 to 10"),
    "scale as text": (rubric_text({**RUBRIC, "scale_min": "one"}), "scale_min"),
}


def test_a_good_rubric_is_read(tmp_path: Path) -> None:
    path = tmp_path / "rubric.toml"
    path.write_text(rubric_text())
    rubric = read_rubric(path)
    assert (rubric.name, rubric.scale_min, rubric.scale_max, rubric.question) == ("warmth", 1, 10, "How warm?")
    assert [(band.low, band.high) for band in rubric.bands] == BANDS


@pytest.mark.parametrize(("text", "named"), FAULTY_RUBRICS.values(), ids=FAULTY_RUBRICS)
def test_a_faulty_rubric_is_refused_with_its_file_and_field(tmp_path: Path, text: str, named: str) -> None:
    path = tmp_path / "rubric.toml"
    path.write_text(text)
    fault = refusal(read_rubric, path)
    assert fault.startswith(str(path))
    assert named in fault


def test_a_rubric_that_is_no_toml_or_not_there_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "rubric.toml"
    assert f"{path}: no such file" in refusal(read_rubric, path)
    path.write_text("name = ")
    assert f"{path}: not valid TOML" in refusal(read_rubric, path)


GRADED: dict[str, Any] = {
    "id": "fs-1",
    "history": [{"role": "user", "content": "Hello?"}],
    "replies": [{"score": 1, "reply": "Ready."}, {"score": 10, "reply": "There you are!"}],
}

FAULTY_GRADES = {
    **{f"{field} missing": (changed(GRADED, field, to=...), field) for field in ("id", "history", "replies")},
    "replies a number": (changed(GRADED, "replies", to=3), "replies"),
    "replies empty": (changed(GRADED, "replies", to=[]), "replies"),
    "history a text": (changed(GRADED, "history", to="Hello?"), "history"),
    "reply without score": (changed(GRADED, "replies", 1, "score", to=...), "score"),
    "reply without text": (changed(GRADED, "replies", 1, "reply", to=...), "reply"),
    "reply that is empty": (changed(GRADED, "replies", 1, "reply", to=" "), "reply"),
    "reply that is a number": (changed(GRADED, "replies", 1, "reply", to=5), "reply"),
    "score that is text": (changed(GRADED, "replies", 1, "score", to="ten"), "score 'ten'"),
    "score that is null": (changed(GRADED, "replies", 1, "score", to=None), "score None"),
    "score that is true": (changed(GRADED, "replies", 1, "score", to=True), "score True"),
    "score that is NaN": (changed(GRADED, "replies", 1, "score", to=float("nan")), "score nan"),
    "unknown field of a reply": (changed(GRADED, "replies", 1, "mood", to="glad"), "mood"),
}


def test_good_graded_replies_are_read_with_their_history(tmp_path: Path) -> None:
    found = read_graded_replies(jsonl(tmp_path, GRADED))
    assert [(row.id, row.reply, row.score) for row in found] == [("fs-1", "Ready.", 1.0), ("fs-1", "There you are!", 10.0)]
    assert found[0].history == ({"role": "user", "content": "Hello?"},)


@pytest.mark.parametrize(("row", "named"), FAULTY_GRADES.values(), ids=FAULTY_GRADES)
def test_a_faulty_grade_is_refused_with_its_line_and_field(tmp_path: Path, row: Any, named: str) -> None:
    path = jsonl(tmp_path, GRADED, row)
    fault = refusal(read_graded_replies, path)
    assert fault.startswith(f"{path}, line 2")
    assert named in fault
