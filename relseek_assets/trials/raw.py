"""Raw files of a trial, read into tables of declared shape: one arm a participant, known labels, times that are numbers.

Here belong reading and its checks. What is estimated from the tables belongs elsewhere.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
from formulaic.errors import FormulaicError

from relseek_assets.mixed_models import MixedModelError
from relseek_assets.trial import Trial, parsed_time
from relseek_resources.storage import StorageError, read_jsonl

ITEMS = ("item", "answer")

EMPTY = ("", "NA", "N/A", "n/a", "<NA>", "NaN", "nan", "null", "NULL", "None", "#N/A")  # what CSV files write where there is nothing


class TrialFault(ValueError):
    """Input that cannot be estimated from; the message names the file or the outcome, the column and what to do."""


# What faulty input makes analyses and their libraries raise; anything else is a mistake of ours and stops the asset.
FAULTS = (ValueError, LookupError, ArithmeticError, FormulaicError)


def said(fault: Exception, where: str = "") -> str:
    """A fault as a status: in our own words, or a library's with its kind and `where` it happened."""
    if isinstance(fault, TrialFault | MixedModelError):
        return str(fault)
    return f"{where}: {type(fault).__name__}: {fault}" if where else f"{type(fault).__name__}: {fault}"


class AbsentTable(TrialFault):
    """A declared file that is not there."""


def raw_path(trial: Trial, name: str, study_file: Path) -> Path:
    """The path of a raw file.

    Raises:
        AbsentTable: it is not there, or the environment variable that names the folder is not set.
    """
    file = trial.tables[name].file
    folder = trial.folder(study_file)
    if folder is None:
        raise AbsentTable(f"absent: {file} ({trial.root.split('/')[0][1:]} is not set)")
    path = folder / file
    if not path.is_file():
        raise AbsentTable(f"absent: {file}")
    return path


def read_table(trial: Trial, name: str, path: Path) -> pd.DataFrame:
    """One raw file with the columns of `trial.table_schema(name)`.

    A table that declares nothing but `item` and `answer` takes a file with a column an item, named `category:item`: a row an answer.

    Raises:
        TrialFault: no row, no such column, an unknown study or arm, a participant in two arms, a time without a number,
            a value of another kind.
    """
    rows = _rows(path, _words(trial, name))
    if rows.empty:
        raise TrialFault(f"{path}: no rows; fetch the file again, or remove tables.{name} from the study file")
    declared = trial.tables[name]
    columns = [column for group in declared.columns for column in group.names]
    if columns == list(ITEMS) and not set(ITEMS) & set(rows.columns):
        rows = _by_item(rows, path)
    wanted = [*([trial.participant] if declared.participants else []), *columns]
    missing = [column for column in wanted if column not in rows]
    if missing:
        raise TrialFault(f"{path}: lacks the columns {', '.join(missing)}; correct the file, or tables.{name} in the study file")
    frame = pd.DataFrame(index=rows.index)
    if declared.participants:
        frame["participant"] = rows[trial.participant].astype("object").map(_text)
        if frame["participant"].isna().any():
            raise TrialFault(f"{path}: {int(frame['participant'].isna().sum())} rows have no {trial.participant}; add it or remove them")
        frame["study"] = _studies(trial, rows, path)
    if declared.arms == "own":
        frame["dose"] = _doses(trial, rows, path)
        for factor in trial.factors:
            frame[factor.column] = _levels(rows, factor.column, factor.levels, path)
        _one_arm_each(frame, [factor.column for factor in trial.factors], path)
    for column, prefix in trial.times.items() if declared.participants else ():
        frame[column] = _times(rows, column, prefix, path)
    for group in declared.columns:
        for column in group.names:
            frame[column] = _times(rows, column, group.prefix, path) if group.kind == "time" else _values(rows[column], group.kind, column, path)
    _one_row_each(frame, declared.key, name, path)
    return frame


def _words(trial: Trial, name: str) -> set[str]:
    """Texts that the declaration gives a meaning: an arm may be called `None`."""
    arms = list(trial.dose.values) if isinstance(trial.dose.values, dict) else []
    levels = [level for factor in trial.factors for level in factor.levels]
    choices = [choice for group in trial.tables[name].columns for choice in group.choices]
    return {*arms, *levels, *choices, *trial.study.values.values()}


def _rows(path: Path, words: set[str]) -> pd.DataFrame:
    try:
        if path.suffix == ".parquet":
            return pd.read_parquet(path)
        if path.suffix == ".csv":
            return pd.read_csv(path, dtype=object, keep_default_na=False, na_values=[text for text in EMPTY if text not in words])
        if path.suffix == ".json":
            return _nested(path)
    except (OSError, ValueError) as error:
        raise TrialFault(f"{path}: cannot be read ({error})") from error
    try:
        return pd.DataFrame([row for _, row in read_jsonl(path)], dtype=object)
    except StorageError as error:
        raise TrialFault(str(error)) from error


def _nested(path: Path) -> pd.DataFrame:
    """A JSON object of lists of objects as rows; the name of a row's list is in the column `group`.

    Raises:
        ValueError: no JSON, or another shape.
    """
    lists = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(lists, dict) or not all(isinstance(rows, list) and all(isinstance(row, dict) for row in rows) for rows in lists.values()):
        raise ValueError("a .json file is one object whose values are lists of objects; use .jsonl for rows")
    return pd.DataFrame([{**row, "group": group} for group, rows in lists.items() for row in rows], dtype=object)


def _by_item(rows: pd.DataFrame, path: Path) -> pd.DataFrame:
    items = [column for column in rows.columns if ":" in column]
    if not items:
        raise TrialFault(f"{path}: no column is named category:item; correct the file, or declare its columns")
    others = [column for column in rows.columns if column not in items]
    return rows.melt(others, items, *ITEMS).astype(object)


def _text(value: Any) -> str | None:
    return None if value is None or value != value else str(value)


def _values(values: pd.Series, kind: str, column: str, path: Path) -> pd.Series:
    if kind == "string":
        return values.astype(object).map(_text).astype(object)
    if kind == "boolean":
        known = {True: True, False: False, "True": True, "False": False, "true": True, "false": False}
        found = values.astype(object).map(lambda value: None if _text(value) is None or isinstance(value, list | dict) else known.get(value))
        wrong = found.isna() & values.notna()
        if wrong.any():
            raise TrialFault(f"{path}: {column} holds {values[wrong].iloc[0]!r}, which is neither true nor false")
        return found.astype(object)
    numbers = pd.to_numeric(values.astype(object), errors="coerce")
    wrong = numbers.isna() & values.notna()
    if wrong.any():
        raise TrialFault(f"{path}: {column} holds {values[wrong].iloc[0]!r}, which is no number")
    return numbers.astype(float)


def _studies(trial: Trial, rows: pd.DataFrame, path: Path) -> pd.Series:
    if not trial.study.column:
        return pd.Series(next(iter(trial.study.values)), index=rows.index, dtype=object)
    if trial.study.column not in rows:
        return pd.Series(None, index=rows.index, dtype=object)
    names = {raw: ours for ours, raw in trial.study.values.items()}
    found = rows[trial.study.column].astype(object).map(_text).map(names)
    if found.isna().any():
        unknown = rows[trial.study.column][found.isna()].iloc[0]
        raise TrialFault(f"{path}: {trial.study.column} holds {unknown!r}; the studies are {', '.join(names)} (trial.study.values)")
    return found.astype(object)


def _doses(trial: Trial, rows: pd.DataFrame, path: Path) -> pd.Series:
    """The dose of each row; NaN where the file has no arms."""
    column = trial.dose.column
    if column not in rows:
        return pd.Series(float("nan"), index=rows.index)
    if isinstance(trial.dose.values, dict):
        found = rows[column].astype(object).map(_text).map(trial.dose.values)
    else:
        numbers = _values(rows[column], "number", column, path)
        found = numbers.where(numbers.isin(trial.dose.doses))
    wrong = found.isna() & rows[column].notna()
    if wrong.any():
        known = trial.dose.values if isinstance(trial.dose.values, dict) else trial.dose.doses
        raise TrialFault(f"{path}: {column} holds {rows[column][wrong].iloc[0]!r}; the arms are {', '.join(map(str, known))} (trial.dose.values)")
    return found.astype(float)


def _levels(rows: pd.DataFrame, column: str, levels: tuple[str, ...], path: Path) -> pd.Series:
    if column not in rows:
        return pd.Series(None, index=rows.index, dtype=object)
    found = rows[column].astype(object).map(_text)
    wrong = found.notna() & ~found.isin(levels)
    if wrong.any():
        raise TrialFault(f"{path}: {column} holds {found[wrong].iloc[0]!r}; its levels are {', '.join(levels)} (trial.factors)")
    return found.astype(object)


def _times(rows: pd.DataFrame, column: str, prefix: str, path: Path) -> pd.Series:
    if column not in rows:
        return pd.Series(None, index=rows.index, dtype="Int64")
    try:
        return pd.Series([parsed_time(value, prefix) for value in rows[column]], index=rows.index, dtype="Int64")
    except (ValueError, TypeError) as error:  # a list or an object cannot be looked up
        raise TrialFault(f"{path}: {column}: {error}; correct the file") from error


def _one_arm_each(frame: pd.DataFrame, factors: list[str], path: Path) -> None:
    arms = frame[["participant", "dose", *factors]].drop_duplicates().dropna(subset=["dose"])
    twice = arms["participant"][arms["participant"].duplicated()]
    if len(twice):
        found = arms[arms["participant"] == twice.iloc[0]].drop(columns="participant").to_dict("records")
        raise TrialFault(f"{path}: participant {twice.iloc[0]} is in {len(found)} arms ({found[0]} and {found[1]}); a participant has one arm")


def _one_row_each(frame: pd.DataFrame, key: tuple[str, ...] | None, name: str, path: Path) -> None:
    if key is None:
        return
    twice = frame.duplicated(["participant", *key])
    if twice.any():
        row = frame[twice].iloc[0]
        what = "".join(f" with {column} {row[column]}" for column in key)
        raise TrialFault(f"{path}: participant {row['participant']} has two rows{what}; keep one (tables.{name}.key)")
