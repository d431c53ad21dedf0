"""Raw files: whatever form the same trial is written in, the same tables come out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from relseek_assets.trial import Trial
from relseek_assets.trials.raw import AbsentTable, raw_path, read_table
from relseek_assets.trials.simulation import Effects, raw_rows, simulate
from tests.trials.declared import DOSES, trial

EFFECTS = Effects(50, dose=(3.0,), factors={"topic": 2.0}, time=1.0, intercept_sd=4, residual_sd=3, dropout=0.1)


def written(rows: pd.DataFrame, path: Path) -> Path:
    if path.suffix == ".csv":
        rows.to_csv(path, index=False)
    elif path.suffix == ".parquet":
        rows.to_parquet(path)
    else:
        rows.to_json(path, orient="records", lines=True, double_precision=15)
    return path


def drawn(declared: Trial, key: str, table: str) -> pd.DataFrame:
    return simulate(declared, key, EFFECTS, 40, seed=3).tables[table]


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
@pytest.mark.parametrize(("key", "table"), [("main:warmth", "answers"), ("main:mood", "diary"), ("main:pain", "visits")])
def test_a_trial_reads_back_from_every_form_of_file(suffix: str, key: str, table: str, tmp_path: Path) -> None:
    declared = trial()
    expected = drawn(declared, key, table)
    found = read_table(declared, table, written(raw_rows(declared, table, expected), tmp_path / f"file.{suffix}"))
    pd.testing.assert_frame_equal(found, expected, check_dtype=False, rtol=1e-12)
    declared.table_schema(table).to_arrow(found, table)


def test_weeks_of_a_raw_file_carry_their_prefix() -> None:
    declared = trial()
    assert set(raw_rows(declared, "diary", drawn(declared, "main:mood", "diary"))["week"]) == {"w1", "w2", "w3", "w4"}


def test_arms_may_have_names_and_studies_other_names_than_ours(tmp_path: Path) -> None:
    named = {"none": 0.0, "some": 0.5, "much": 1.0}
    declared = trial(dose={"column": "arm", "values": named}, study={"column": "which", "values": {"main": "the main one", "other": "pilot"}})
    expected = drawn(declared, "main:trust", "answers")
    rows = raw_rows(declared, "answers", expected)
    assert set(rows["arm"]) == set(named) and set(rows["which"]) == {"the main one"}
    pilot = rows.tail(5).assign(which="pilot", who=[f"q{number}" for number in range(5)])
    found = read_table(declared, "answers", written(pd.concat([rows, pilot]), tmp_path / "answers.csv"))
    assert found["study"].value_counts().to_dict() == {"main": len(rows), "other": 5}
    assert found["dose"][: len(rows)].tolist() == expected["dose"].tolist()


def test_columns_that_are_not_declared_are_left_out_and_missing_values_stay_missing(tmp_path: Path) -> None:
    declared = trial()
    rows = raw_rows(declared, "answers", drawn(declared, "main:trust", "answers")).assign(comment="none of our business")
    rows.loc[2, "trust"] = None
    found = read_table(declared, "answers", written(rows, tmp_path / "answers.jsonl"))
    assert "comment" not in found and np.isnan(found["trust"][2]) and found["trust"].notna().sum() == len(rows) - 1
    assert set(found["dose"]) <= set(DOSES)


def test_a_file_that_is_not_there_is_absent_and_no_fault_of_the_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NOWHERE", raising=False)
    with pytest.raises(AbsentTable, match=r"absent: answers.jsonl$"):
        raw_path(trial(), "answers", tmp_path / "study.toml")
    with pytest.raises(AbsentTable, match=r"absent: answers.jsonl \(NOWHERE is not set\)"):
        raw_path(trial(root="$NOWHERE/data"), "answers", tmp_path / "study.toml")
    (tmp_path / "data").mkdir()
    there = written(pd.DataFrame({"who": ["a"]}), tmp_path / "data" / "answers.jsonl")
    monkeypatch.setenv("NOWHERE", str(tmp_path))
    assert raw_path(trial(root="$NOWHERE/data"), "answers", tmp_path / "study.toml") == there
