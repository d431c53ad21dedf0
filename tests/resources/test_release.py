"""The published release is read in its own layout; what is absent is named, and versions follow content."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from relseek_resources.release import PROMPTED, RESCORED, TEST_PAIRS, Absent, Release, ScoredReply, read_ratings
from relseek_resources.storage import StorageError


def write(root: Path, name: str, *rows: dict[str, Any]) -> Path:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


@pytest.fixture
def release(tmp_path: Path) -> Release:
    """A release of a few rows in the published layout."""
    write(tmp_path, RESCORED, {"response_str": "Hi", "relationship_score": 7}, {"response_str": "So", "relationship_score": None})
    folder = f"{PROMPTED}/claude_levels_7"
    write(tmp_path, f"{folder}/generations.jsonl", {"generation_id": 1, "response_str": "one"}, {"generation_id": 2, "response_str": "two"})
    write(tmp_path, f"{folder}/relationship_scores.jsonl", {"generation_id": 2, "score": 4}, {"generation_id": 9, "score": 1})
    write(
        tmp_path,
        TEST_PAIRS,
        {"prompt_id": 15, "chosen_arr": [{"role": "assistant", "content": "warm"}], "rejected_arr": [{"role": "assistant", "content": "plain"}]},
    )
    return Release(tmp_path)


def test_the_environment_says_where_the_release_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RELSEEK_RELEASE", str(tmp_path))
    assert Release.from_environment().root == tmp_path
    for unset in ("", None):
        monkeypatch.delenv("RELSEEK_RELEASE", raising=False)
        if unset is not None:
            monkeypatch.setenv("RELSEEK_RELEASE", unset)
        assert Release.from_environment().root is None


READERS = {"rescored_generations": RESCORED, "prompted_generations": PROMPTED, "test_replies": TEST_PAIRS}


@pytest.mark.parametrize(("reader", "name"), READERS.items())
def test_without_a_release_everything_is_absent_by_name(reader: str, name: str) -> None:
    with pytest.raises(Absent) as caught:
        getattr(Release(None), reader)()
    assert str(caught.value).startswith("absent: ")
    assert name in str(caught.value)


@pytest.mark.parametrize(("reader", "name"), READERS.items())
def test_a_file_that_the_copy_lacks_is_absent_by_name(tmp_path: Path, reader: str, name: str) -> None:
    with pytest.raises(Absent, match=name):
        getattr(Release(tmp_path), reader)()


def test_an_unset_release_says_what_to_set() -> None:
    with pytest.raises(Absent, match="RELSEEK_RELEASE is not set"):
        Release(None).file(TEST_PAIRS)


def test_a_missing_file_is_named_with_its_whole_path(tmp_path: Path) -> None:
    with pytest.raises(Absent) as caught:
        Release(tmp_path).file("data/other.jsonl")
    assert str(tmp_path / "data/other.jsonl") in str(caught.value)


def test_rescored_replies_leave_the_unscored_out(release: Release) -> None:
    assert release.rescored_generations() == [ScoredReply("Hi", 7.0)]


def test_prompted_replies_join_scores_by_generation(release: Release) -> None:
    assert release.prompted_generations() == [ScoredReply("two", 4.0)]


def test_prompted_replies_gather_every_model_that_is_complete(release: Release) -> None:
    assert release.root is not None
    folder = f"{PROMPTED}/gpt_levels_7"
    write(release.root, f"{folder}/generations.jsonl", {"generation_id": 1, "response_str": "three"})
    assert release.prompted_generations() == [ScoredReply("two", 4.0)]
    write(release.root, f"{folder}/relationship_scores.jsonl", {"generation_id": 1, "score": 9})
    assert release.prompted_generations() == [ScoredReply("two", 4.0), ScoredReply("three", 9.0)]


def test_generations_without_any_scores_are_absent(release: Release) -> None:
    assert release.root is not None
    (release.root / PROMPTED / "claude_levels_7" / "relationship_scores.jsonl").unlink()
    with pytest.raises(Absent, match="generations with scores"):
        release.prompted_generations()


def test_test_replies_are_the_chosen_and_the_rejected(release: Release) -> None:
    assert release.test_replies() == [("15", "warm", "plain")]


def test_a_torn_line_is_an_error_and_not_absence(release: Release) -> None:
    path = release.file(RESCORED)
    path.write_text('{"response_str": "Hi"')
    with pytest.raises(StorageError, match="line 1") as caught:
        release.rescored_generations()
    assert not isinstance(caught.value, Absent)


def test_the_version_follows_content_and_presence_and_nothing_else(release: Release, tmp_path_factory: pytest.TempPathFactory) -> None:
    names = (RESCORED, TEST_PAIRS)
    first = release.version(names)
    assert release.version(names) == first
    path = release.file(TEST_PAIRS)
    text = path.read_text()
    path.write_text(text.replace("warm", "warmer"))
    changed = release.version(names)
    path.unlink()
    absent = release.version(names)
    assert len({first, changed, absent, Release(None).version(names)}) == 4
    path.write_text(text)
    assert release.version(names) == first
    copy = tmp_path_factory.mktemp("copy")
    for name in names:
        (copy / name).parent.mkdir(parents=True)
        (copy / name).write_bytes(release.file(name).read_bytes())
    assert Release(copy).version(names) == first


def test_the_version_tells_which_file_holds_the_content(release: Release) -> None:
    assert release.root is not None
    before = release.version((RESCORED, TEST_PAIRS))
    one, two = release.file(RESCORED), release.file(TEST_PAIRS)
    first, second = one.read_bytes(), two.read_bytes()
    one.write_bytes(second)
    two.write_bytes(first)
    assert release.version((RESCORED, TEST_PAIRS)) != before


# --- judgements of the sweep ------------------------------------------------------------------------------------------

EVALS = "2-steering-vector-training/vector_evals/Big-Model/layer7"
PAID = {"token_usage": {"prompt_tokens": 10, "completion_tokens": 2}, "cost": {"prompt_cost": 0.1, "total_cost": 0.25}}


def test_ratings_and_comparisons_of_a_vector_are_told_apart_by_their_names(tmp_path: Path) -> None:
    for name in (
        "coherence_scores_ep1",
        "relationship_scores_ep1",
        "raw_relationship_scores_ep1",
        "pairwise_relationship_scores_ep1",
        "coherence_scores_ep11",
    ):
        write(tmp_path, f"{EVALS}/{name}.jsonl", {})
    found = Release(tmp_path)
    assert {rubric: path.name for rubric, path in found.rating_files("Big-Model", 7, 1).items()} == {
        "coherence": "coherence_scores_ep1.jsonl",
        "relationship": "relationship_scores_ep1.jsonl",
    }
    assert [path.name for path in found.comparison_files("Big-Model", 7, 1).values()] == ["pairwise_relationship_scores_ep1.jsonl"]
    assert found.rating_files("Big-Model", 8, 1) == Release(None).rating_files("Big-Model", 7, 1) == {}


def test_a_rating_brings_its_tokens_and_list_price_and_nulls_where_the_file_says_nothing(tmp_path: Path) -> None:
    rows = ({"test_prompt_id": 15, "multiplier": -1, "score": 3, "extra": "x", **PAID}, {"test_prompt_id": 16, "multiplier": 0.5, "score": 0})
    frame = read_ratings(write(tmp_path, f"{EVALS}/coherence_scores_ep1.jsonl", *rows))
    assert frame[["item", "multiplier", "score"]].to_numpy().tolist() == [["15", -1.0, 3.0], ["16", 0.5, 0.0]]
    assert frame.loc[0, ["prompt_tokens", "completion_tokens", "total_cost"]].tolist() == [10, 2, 0.25]
    assert frame.loc[1, ["prompt_tokens", "completion_tokens", "total_cost"]].isna().all()


def test_rescored_replies_belong_to_the_vector_of_their_first_row(tmp_path: Path) -> None:
    name = str(Path(RESCORED).with_name("scored_vector_generations_ep3.jsonl"))
    path = write(tmp_path, name, {"model_name": "Big-Model", "layer": 7, "epoch": 3})
    found = Release(tmp_path)
    assert found.rescored_file("Big-Model", 7, 3) == found.reply_file("Big-Model", 7, 3) == path
    assert found.rescored_file("Big-Model", 8, 3) is None
    assert found.rescored_file("Big-Model", 7, 4) is None
    sweep = write(tmp_path, f"{EVALS}/generations_ep3.jsonl", {})
    assert found.reply_file("Big-Model", 7, 3) == sweep, "the whole sweep holds them too"
