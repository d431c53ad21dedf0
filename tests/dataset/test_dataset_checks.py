"""The asset checks of stage 1 pass on the shipped behaviour and fail on bad conversations, each for its own reason."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dagster as dg
import pandas as pd
import pytest

from relseek_assets.behaviour import read_conversations
from relseek_assets.dataset import checks
from relseek_assets.dataset.pairs import PREFERENCE_PAIRS, preference_pairs
from relseek_assets.stage import TABLE, Stage, Store
from relseek_assets.study import BEHAVIOURS, load_study
from relseek_resources.storage import write_table

SHIPPED = BEHAVIOURS / "relationship_seeking"
OF_CONVERSATIONS = {"schema", "duplicates", "variety", "length_balance"}
OF_PAIRS = {"same_user_turns", "grouped_split"}

Rows = list[dict[str, Any]]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A behaviour of one's own: a copy of the shipped one, to be spoilt."""
    return Path(shutil.copytree(SHIPPED, tmp_path / "behaviour"))


@pytest.fixture
def stage(folder: Path) -> Stage:
    study = load_study("quickstart")
    return Stage(study.model_copy(update={"behaviours": (str(folder),)}))


def of_conversations(stage: Stage) -> dict[str, dg.AssetCheckResult]:
    named = {next(iter(check.check_keys)).name: check for check in checks.build(stage)}
    return {name: named[name]() for name in OF_CONVERSATIONS}


def of_pairs(stage: Stage, store: Path) -> dict[str, dg.AssetCheckResult]:
    named = {next(iter(check.check_keys)).name: check for check in checks.build(stage)}
    context = dg.build_asset_check_context(resources={"store": Store(root=str(store))})
    return {name: named[name](context) for name in OF_PAIRS}


def failing(results: dict[str, dg.AssetCheckResult]) -> set[str]:
    return {name for name, result in results.items() if not result.passed}


def spoil(folder: Path, change: Callable[[Rows], None]) -> None:
    path = folder / "conversations.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    change(rows)
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))


def test_there_is_a_check_for_everything_promised(stage: Stage) -> None:
    found = {next(iter(check.check_keys)) for check in checks.build(stage)}
    assert {key.name for key in found} >= OF_CONVERSATIONS | OF_PAIRS
    for name in OF_CONVERSATIONS:
        assert dg.AssetCheckKey(stage.key("starter_conversations"), name) in found


def test_the_shipped_conversations_pass(stage: Stage) -> None:
    results = of_conversations(stage)
    assert failing(results) == set()
    assert results["schema"].metadata["conversations"].value == len((SHIPPED / "conversations.jsonl").read_text().splitlines())


def test_a_repeated_conversation_fails(stage: Stage, folder: Path) -> None:
    spoil(folder, lambda rows: rows.append({**rows[4], "id": "copy"}))
    results = of_conversations(stage)
    assert failing(results) == {"duplicates"}
    assert "copy" in results["duplicates"].metadata["same"].value


def test_a_conversation_with_a_few_words_changed_fails(stage: Stage, folder: Path) -> None:
    def change(rows: Rows) -> None:
        text = json.dumps(rows[4]["turns"])
        words = text.split()
        rows.append({**rows[4], "id": "nearly", "turns": json.loads(text.replace(words[5], "otherwise", 1))})

    spoil(folder, change)
    results = of_conversations(stage)
    assert failing(results) == {"duplicates"}
    assert "nearly" in results["duplicates"].metadata["near"].value
    assert "nearly" not in results["duplicates"].metadata["same"].value


def open_alike(rows: Rows, count: int) -> None:
    for row in rows[:count]:
        row["turns"][0]["user"] = f"Could you please tell me, {row['turns'][0]['user']}"


@pytest.mark.parametrize(("count", "failed"), [(3, set()), (4, {"variety"})])
def test_an_opening_may_be_shared_by_three_conversations(stage: Stage, folder: Path, count: int, failed: set[str]) -> None:
    spoil(folder, lambda rows: open_alike(rows, count))
    results = of_conversations(stage)
    assert failing(results) == failed
    if failed:
        assert results["variety"].metadata["most_shared_opening"].value == "could you please tell me"
        assert results["variety"].metadata["shared_by"].value == 4


def test_few_topics_fail(stage: Stage, folder: Path) -> None:
    def change(rows: Rows) -> None:
        for number, row in enumerate(rows):
            row["topic"] = f"topic {number % 5}"

    spoil(folder, change)
    assert failing(of_conversations(stage)) == {"variety"}


def lengthen(rows: Rows, words: int) -> None:
    for row in rows:
        for turn in row["turns"]:
            turn["target"] += " indeed" * words


@pytest.mark.parametrize(("words", "failed"), [(1, set()), (4, {"length_balance"})])
def test_target_replies_more_than_a_twentieth_longer_fail(stage: Stage, folder: Path, words: int, failed: set[str]) -> None:
    spoil(folder, lambda rows: lengthen(rows, words))  # replies have 48 words on average
    assert failing(of_conversations(stage)) == failed


def test_an_empty_reply_fails_the_schema_with_its_line(stage: Stage, folder: Path) -> None:
    spoil(folder, lambda rows: rows[6]["turns"][0].update(target=" "))
    named = {next(iter(check.check_keys)).name: check for check in checks.build(stage)}
    result = named["schema"]()
    assert not result.passed
    assert "line 7, turn 1: target" in result.metadata["fault"].value


@pytest.mark.parametrize("name", ["duplicates", "variety", "length_balance"])
def test_every_check_of_a_file_that_cannot_be_read_fails_with_its_fault(stage: Stage, folder: Path, name: str) -> None:
    spoil(folder, lambda rows: rows[6]["turns"][0].update(target=" "))
    named = {next(iter(check.check_keys)).name: check for check in checks.build(stage)}
    result = named[name]()
    assert not result.passed
    assert "line 7, turn 1: target" in result.metadata["fault"].value


def test_a_missing_file_fails_the_schema(stage: Stage, folder: Path) -> None:
    (folder / "conversations.jsonl").unlink()
    named = {next(iter(check.check_keys)).name: check for check in checks.build(stage)}
    assert not named["schema"]().passed


# --- pairs ------------------------------------------------------------------------------------------------------------


def stored_pairs(stage: Stage, store: Path, change: Callable[[pd.DataFrame], None] = lambda frame: None) -> None:
    frame = preference_pairs(read_conversations(SHIPPED / "conversations.jsonl"), heldout_share=0.2, seed=1)
    change(frame)
    write_table(Store(root=str(store)).path(stage.key("preference_pairs"), None, TABLE), frame, PREFERENCE_PAIRS)


def test_the_pairs_of_the_shipped_conversations_pass(stage: Stage, tmp_path: Path) -> None:
    stored_pairs(stage, tmp_path)
    results = of_pairs(stage, tmp_path)
    assert failing(results) == set()
    assert results["grouped_split"].metadata["heldout_share"].value == pytest.approx(0.2, abs=0.02)


def test_another_user_turn_in_one_history_fails(stage: Stage, tmp_path: Path) -> None:
    def change(frame: pd.DataFrame) -> None:
        row = frame.index[frame["history_type"] == "rejected"][0]
        frame.at[row, "prompt"] = [{**frame.at[row, "prompt"][0], "content": "Something else."}, *frame.at[row, "prompt"][1:]]

    stored_pairs(stage, tmp_path, change)
    results = of_pairs(stage, tmp_path)
    assert failing(results) == {"same_user_turns"}
    assert results["same_user_turns"].metadata["differing"].value == 1


def test_a_conversation_on_both_sides_of_the_split_fails(stage: Stage, tmp_path: Path) -> None:
    def change(frame: pd.DataFrame) -> None:
        row = frame.index[frame["history_type"] == "chosen"][0]
        frame.at[row, "split"] = "train" if frame.at[row, "split"] == "heldout" else "heldout"

    stored_pairs(stage, tmp_path, change)
    results = of_pairs(stage, tmp_path)
    assert failing(results) == {"grouped_split"}
    assert results["grouped_split"].metadata["torn"].value == 1
