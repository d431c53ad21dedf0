"""Faulty files and outcomes: each is refused with its file or outcome, its column and what to do, and no other is harmed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from relseek_assets.trials import estimates, forms
from relseek_assets.trials.frames import OutcomeFrame
from relseek_assets.trials.models import SeparationFault
from relseek_assets.trials.raw import TrialFault, read_table
from relseek_assets.trials.simulation import Effects, raw_rows, simulate
from relseek_resources.storage import StorageError
from tests.trials.declared import TABLES, frame_of, trial

EFFECTS = Effects(50, dose=(3.0,), intercept_sd=4, residual_sd=3)
LINEAR = forms.Specification("linear", "linear", False, None, pd.DataFrame())
Change = Callable[[pd.DataFrame], pd.DataFrame]


def drawn(key: str, **changes: Any) -> dict[str, pd.DataFrame]:
    effects = Effects(dose=(1.0,)) if key == "main:stayed" else EFFECTS
    return simulate(trial(**changes), key, effects, 60, seed=14).tables


def read(table: str, key: str, folder: Path, change: Change) -> pd.DataFrame:
    """A file with a change, read as an asset reads it: columns first, then the range of their values."""
    declared, path = trial(), folder / f"{table}.jsonl"
    rows = change(raw_rows(declared, table, drawn(key)[table]).astype(object))
    path.write_text(
        "".join(json.dumps({name: None if value != value else value for name, value in row.items()}) + "\n" for row in rows.to_dict("records"))
    )
    found = read_table(declared, table, path)
    declared.table_schema(table).to_arrow(found, str(path))
    return found


def at(row: int, column: str, value: Any) -> Change:
    def change(rows: pd.DataFrame) -> pd.DataFrame:
        rows.at[rows.index[row], column] = value
        return rows

    return change


# --- files ------------------------------------------------------------------------------------------------------------

FILES = {
    "a participant in two arms": (
        "diary",
        lambda rows: at(1, "arm", 1.0 if rows["arm"].iloc[1] < 1 else -1.0)(rows),
        r"diary.jsonl: participant p00000 is in 2 arms .*a participant has one arm",
    ),
    "an unknown arm": ("answers", at(3, "arm", 0.7), r"answers.jsonl: arm holds 0.7; the arms are -1.0, -0.5, 0.0, 0.5, 1.0 \(trial.dose.values\)"),
    "an arm that is no number": ("answers", at(3, "arm", "placebo"), r"answers.jsonl: arm holds 'placebo', which is no number"),
    "an unknown level": ("answers", at(3, "topic", "film"), r"answers.jsonl: topic holds 'film'; its levels are sport, music \(trial.factors\)"),
    "a week without a number": ("diary", at(5, "week", "w"), r"diary.jsonl: week: 'w' is no wNUMBER; correct the file"),
    "a week that is a word": ("diary", at(5, "week", "last"), r"diary.jsonl: week: 'last' is no wNUMBER"),
    "a week twice": (
        "diary",
        lambda rows: pd.concat([rows, rows.tail(1)]),
        r"diary.jsonl: participant p00059 has two rows with week 4; keep one \(tables.diary.key\)",
    ),
    "a missing column": (
        "answers",
        lambda rows: rows.drop(columns=["warmth", "ease"]),
        r"answers.jsonl: lacks the columns warmth, ease; correct the file, or tables.answers in the study file",
    ),
    "nobody": ("answers", at(7, "who", None), r"answers.jsonl: 1 rows have no who; add it or remove them"),
    "words for numbers": ("answers", at(2, "trust", "very much"), r"answers.jsonl: trust holds 'very much', which is no number"),
    "lists for numbers": ("answers", at(2, "trust", [1, 2]), r"answers.jsonl: trust holds \[1, 2\], which is no number"),
    "objects for levels": ("answers", at(2, "topic", {"name": "sport"}), r"answers.jsonl: topic holds .*name.*; its levels are sport, music"),
    "lists for truth values": ("answers", at(2, "proud", [True]), r"answers.jsonl: proud holds \[True\], which is neither true nor false"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_faulty_file_is_refused_with_its_name_its_column_and_what_to_do(name: str, tmp_path: Path) -> None:
    table, change, message = FILES[name]
    key = {"answers": "main:trust", "diary": "main:mood"}[table]
    assert len(read(table, key, tmp_path, lambda rows: rows)) > 0, "without the change it is sound"
    with pytest.raises(TrialFault, match=message):
        read(table, key, tmp_path, change)


def test_a_value_beyond_its_range_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"answers.jsonl: column trust .* spans .* to 900.0; it is declared for -500.0 to 500.0"):
        read("answers", "main:trust", tmp_path, at(9, "trust", 900.0))
    with pytest.raises(StorageError, match="infinite"):
        read("answers", "main:trust", tmp_path, at(9, "trust", float("inf")))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("answers.jsonl", b"", "no rows; fetch the file again"),
        ("answers.jsonl", b"\n\n", "no rows; fetch the file again"),
        ("answers.csv", b"", r"answers.csv: cannot be read"),
        ("answers.csv", b"who,arm\n", "no rows"),
        ("answers.parquet", b"PAR1 and nothing more", r"answers.parquet: cannot be read"),
        ("answers.jsonl", b"who;arm\na;1\n", "line 1: not valid JSON"),
        ("answers.jsonl", b'{"who": "a"}\n[1, 2]\n', "line 2: expected an object"),
        ("answers.jsonl", b'{"who": "a", "arm":', "line 1: not valid JSON"),
        ("answers.jsonl", b"\xff\xfe\x00\x01", "not UTF-8 text"),
    ],
)
def test_what_is_no_table_is_refused_with_its_name(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(TrialFault, match=message) as refused:
        read_table(trial(), "answers", tmp_path / name)
    assert str(tmp_path / name) in str(refused.value)


# --- outcomes ---------------------------------------------------------------------------------------------------------


def without(rows: pd.DataFrame, **values: Any) -> pd.DataFrame:
    for column, value in values.items():
        rows[column] = value
    return rows


OUTCOME_FAULTS: dict[str, tuple[str, Change, str]] = {
    "three participants": ("trust", lambda rows: rows.head(3), "main:trust: 3 participants have values; at least 8 are needed"),
    "a constant outcome": ("trust", lambda rows: without(rows, trust=7.0), "main:trust: every value is 7; a constant outcome .* leave it out"),
    "an item without values": ("warmth", lambda rows: without(rows, ease=np.nan), "main:warmth: ease holds no value in 60 rows; .* drop the item"),
    "one dose": ("trust", lambda rows: rows[rows["dose"].eq(0.5)].copy(), "main:trust: all rows are of the dose 0.5; there is nothing to compare"),
    "no low dose": ("trust", lambda rows: rows[rows["dose"].ge(0)].copy(), r"main:trust: nobody has a dose of the low end \(-1, -0.5\) .* dose.low"),
    "no arms": (
        "trust",
        lambda rows: without(rows, dose=np.nan),
        r'main:trust: answers.jsonl has no value of arm; correct it, or set tables.answers.arms = "joined"',
    ),
    "no factor": ("trust", lambda rows: without(rows, topic=None), "main:trust: answers.jsonl has no value of topic; correct it"),
    "a level missing": (
        "trust",
        lambda rows: at(0, "topic", None)(rows),
        "main:trust: 1 values have no topic, the first of participant p00000; add it",
    ),
    "another study": ("trust", lambda rows: without(rows, study="pilot"), "main:trust: no rows of the study main; correct the file, or the design"),
    "no such moment": ("pain", lambda rows: without(rows, moment="before"), r"main:pain: no rows where \{'moment': 'after'\}"),
    "two baselines": ("pain", lambda rows: pd.concat([rows, rows.head(1)]), "pain: participant p00000 has two baselines"),
    "a value twice": ("trust", lambda rows: pd.concat([rows, rows.head(1)]), "main:trust: participant p00000 has two values of trust; keep one"),
    "a week twice": (
        "mood",
        lambda rows: pd.concat([rows, rows.head(1)]),
        "main:mood: participant p00000 has two values of mood in week 1; keep one",
    ),
    "a week missing": ("mood", lambda rows: at(2, "week", None)(rows), "main:mood: 1 values have no week, the first of participant p00000"),
    "no last week": (
        "mood",
        lambda rows: rows[rows["week"] < 4].copy(),
        "main:mood: no value at week 4, an endpoint .* span 1 to 3, so correct endpoints",
    ),
    "shares for a logit": (
        "stayed",
        lambda rows: at(0, "stayed", 0.4)(rows),
        "main:stayed: a logit outcome holds 0 and 1 only, found 0.4; make it linear",
    ),
}


def changed(outcome: str, change: Change) -> OutcomeFrame:
    key = f"main:{outcome}"
    raw = drawn(key)
    table = trial().outcome(outcome).table
    return frame_of(trial(), key, raw | {table: change(raw[table].copy())})


@pytest.mark.parametrize("name", OUTCOME_FAULTS)
def test_an_outcome_that_cannot_be_estimated_says_why_and_what_to_do(name: str) -> None:
    outcome, change, message = OUTCOME_FAULTS[name]
    assert changed(outcome, lambda rows: rows).participants == 60, "without the change it can"
    with pytest.raises(TrialFault, match=message):
        changed(outcome, change)


def test_a_fault_of_one_outcome_harms_no_other_of_the_same_file() -> None:
    raw = drawn("main:warmth")
    raw["answers"]["trust"] = 7.0
    with pytest.raises(TrialFault, match="main:trust: every value is 7"):
        frame_of(trial(), "main:trust", raw)
    assert frame_of(trial(), "main:warmth", raw).participants == 60


def test_an_unknown_participant_of_a_joined_table_is_named() -> None:
    changes: dict[str, Any] = {"tables": TABLES | {"answers": TABLES["answers"] | {"arms": "joined"}, "people": {"file": "people.csv"}}}
    changes["arms_table"] = "people"
    raw = drawn("main:trust", **changes)
    raw["people"] = raw["people"].query("participant != 'p00009'")
    with pytest.raises(TrialFault, match="main:trust: participant p00009 is not in people; add it or remove the row"):
        frame_of(trial(**changes), "main:trust", raw)


# --- models -----------------------------------------------------------------------------------------------------------


def test_perfect_separation_is_named_and_not_estimated() -> None:
    found = changed("stayed", lambda rows: without(rows, stayed=(rows["dose"] > 0).astype(float)))
    with pytest.raises(SeparationFault, match="main:stayed: perfect separation .*dose.*no finite estimate; make the outcome linear or drop a factor"):
        forms.specify(found)


def test_more_coefficients_than_rows_are_refused() -> None:
    found = changed("trust", lambda rows: rows.groupby("dose").head(2))
    with pytest.raises(TrialFault, match="main:trust: 10 rows for 1[0-9] coefficients; it takes more participants, or fewer factors and doses"):
        estimates.fit_all(found, LINEAR)


def test_answers_that_a_mixed_model_cannot_carry_are_refused_with_their_outcome() -> None:
    """Everybody is seen in one week, each in another."""
    once = changed("mood", lambda rows: rows[rows["week"].eq(rows["participant"].str[1:].astype(int) % 4 + 1)])
    with pytest.raises(TrialFault, match="main:mood: random term .*participant"):
        forms.specify(once)


def test_answers_that_do_not_differ_within_people_are_flagged() -> None:
    """Two items that always agree leave nothing to estimate the residual variance from."""
    found = changed("warmth", lambda rows: without(rows, ease=rows["warmth"]))
    try:
        with pytest.warns(UserWarning, match="do not report this fit"):
            table = estimates.fits_table(found, LINEAR, estimates.fit_all(found, LINEAR))
    except TrialFault as fault:
        assert "main:warmth" in str(fault) and "residual variance" in str(fault)
    else:
        assert not table["converged"].any()
