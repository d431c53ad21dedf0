"""The declaration of a trial: its files, arms, outcomes and families, as the `[trial]` table of a study file.

Here belong the settings, their checks and their defaults, for anybody's trial. How outcomes are estimated belongs in `trials/`.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from relseek_resources.storage import Column, TableSchema, content_version

NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]*")
MOST_OUTCOMES = 99  # designs of one trial; a fan-in beyond it is not looked at by Dagster


class _Settings(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ColumnGroup(_Settings):
    """Columns of one kind in a raw file. A `time` is a number behind a prefix, such as `w3`."""

    names: tuple[str, ...] = Field(min_length=1)
    kind: Literal["number", "string", "boolean", "time"] = "number"
    low: float | None = None
    high: float | None = None
    unit: str = ""
    choices: tuple[str, ...] = ()
    prefix: str = ""


class RawTable(_Settings):
    """One raw file: JSON Lines, CSV or parquet. Columns that are not declared are left out."""

    file: str
    columns: tuple[ColumnGroup, ...] = ()
    participants: bool = True  # False where rows are of no participant
    key: tuple[str, ...] | None = None  # what tells a participant's rows apart (nothing: one row each); a repeated key is a fault
    about: str = ""
    arms: Literal["own", "joined", "none"] = "own"  # joined: from `arms_table`; none: participants see several doses, or the file is of nobody


class StudyColumn(_Settings):
    """Which trial a row belongs to: our name -> the value in the files. Without a column all rows are of one study."""

    column: str = ""
    values: dict[str, str] = Field(min_length=1)


class Dose(_Settings):
    """The dose of a participant's arm. `values` are numbers, or names of arms with their dose; `low` and `high` form the primary contrast."""

    column: str
    values: tuple[float, ...] | dict[str, float]
    low: tuple[float, ...] = ()
    high: tuple[float, ...] = ()
    label: str = "RS"
    long_label: str = "Relationship-Seeking"
    symbol: str = "λ"

    @model_validator(mode="after")
    def _checked(self) -> Dose:
        if len(self.doses) < 2:
            raise ValueError("values: a trial needs at least two different doses")
        for name in ("low", "high"):
            beyond = [dose for dose in getattr(self, name) if dose not in self.doses]
            if beyond:
                raise ValueError(f"{name} names {beyond}, which are no doses of the trial; its doses are {list(self.doses)}")
        return self

    @property
    def doses(self) -> tuple[float, ...]:
        return tuple(sorted(set(self.values.values() if isinstance(self.values, dict) else self.values)))

    @property
    def low_doses(self) -> tuple[float, ...]:
        """The doses below zero, or the lowest where none is."""
        return tuple(sorted(self.low)) or tuple(dose for dose in self.doses if dose < 0) or self.doses[:1]

    @property
    def high_doses(self) -> tuple[float, ...]:
        return tuple(sorted(self.high)) or tuple(dose for dose in self.doses if dose > 0 and dose not in self.low_doses) or self.doses[-1:]


class Factor(_Settings):
    """A second treatment with two levels, the reference first; `short` are the names of its levels in labels of slopes."""

    column: str
    label: str
    code: str = ""  # in the names of test types, the label by default
    levels: tuple[str, str]
    short: tuple[str, str] | None = None

    @property
    def test_code(self) -> str:
        return self.code or self.label.replace(" ", "_")

    @property
    def short_levels(self) -> tuple[str, str]:
        return self.short or self.levels


class Baseline(_Settings):
    """Where the covariate `baseline` comes from: another column of the same row, or the same item at another time point."""

    column: str = ""
    where: dict[str, str] = {}
    by: tuple[str, ...] = ()  # columns besides the participant that both rows share

    @model_validator(mode="after")
    def _checked(self) -> Baseline:
        if bool(self.column) == bool(self.where):
            raise ValueError("a baseline is either a column or rows chosen by where; give one of the two")
        return self


class Design(_Settings):
    """How one study measured an outcome: which rows, over which time, with which baseline, and whether attrition weights apply."""

    where: dict[str, str] = {}
    time: str = ""
    endpoints: tuple[int, int] | None = None
    baseline: Baseline | None = None
    weighted: bool = False

    @model_validator(mode="after")
    def _checked(self) -> Design:
        if bool(self.time) != (self.endpoints is not None):
            raise ValueError("time and endpoints go together: the column, and its first and last value that contrasts compare")
        return self


class Outcome(_Settings):
    """An outcome, measured by one item or pooled over several; the first item is the reference."""

    name: str
    table: str
    items: tuple[str, ...] = Field(min_length=1)
    model: Literal["linear", "logit"] = "linear"
    family: str = ""
    local_family: str = ""
    unit: str = ""
    equivalence: Annotated[float, Field(gt=0)] | None = None  # ± bounds within which an effect counts as none
    designs: dict[str, Design] = Field(min_length=1)

    @model_validator(mode="after")
    def _checked(self) -> Outcome:
        if not NAME.fullmatch(self.name):
            raise ValueError(f"name: {self.name!r} becomes part of partition keys; use letters, digits and '_' only")
        if bool(self.family) != bool(self.local_family):
            raise ValueError("family and local_family go together; give both or neither")
        return self


class Weights(_Settings):
    """Inverse-probability weights of participants."""

    table: str
    column: str


class Robustness(_Settings):
    """What the robustness specifications add to the full model: covariates of the participants, and weights."""

    demographics: tuple[str, ...] = ()
    preferences: tuple[str, ...] = ()
    weights: Weights | None = None


class Bootstrap(_Settings):
    """How often intervals are resampled."""

    draws: int = Field(default=999, ge=99)


Analysis = Literal["comparisons", "profiles", "vulnerability", "attrition", "psychometrics", "topics", "calibration", "frontier_trend"]


class Trial(_Settings):
    """One or several randomised studies that share arms and outcomes."""

    root: str = "."
    participant: str = "participant"
    arms_table: str = ""  # the table that gives the arms of participants in files without arm columns
    study: StudyColumn
    dose: Dose
    factors: tuple[Factor, ...] = Field(default=(), max_length=2)
    times: dict[str, str] = {}  # columns that hold a time in any file -> its prefix
    tables: dict[str, RawTable] = Field(min_length=1)
    outcomes: tuple[Outcome, ...] = Field(min_length=1)
    participants: tuple[str, ...] = ()  # tables with covariates of participants, one row each
    questionnaire: Literal["", "uk_sociodemographics"] = ""  # answers that `trials/participants.py` knows how to coarsen
    analyses: tuple[Analysis, ...] = ()
    robustness: Robustness = Robustness()
    bootstrap: Bootstrap = Bootstrap()

    @model_validator(mode="after")
    def _checked(self) -> Trial:
        for name in (*self.tables, *self.study.values):
            if not NAME.fullmatch(name):
                raise ValueError(f"{name!r} becomes a partition key; use letters, digits and '_' only")
        names = [outcome.name for outcome in self.outcomes]
        repeated = sorted({name for name in names if names.count(name) > 1})
        if repeated:
            raise ValueError(f"outcomes: {repeated} are declared more than once; keep one of each")
        for outcome in self.outcomes:
            if outcome.table not in self.tables:
                raise ValueError(
                    f"outcomes: {outcome.name} reads the table {outcome.table!r}, which is not declared; tables are {', '.join(self.tables)}"
                )
            unknown = [study for study in outcome.designs if study not in self.study.values]
            if unknown:
                raise ValueError(f"outcomes: {outcome.name} has designs for {unknown}; the studies are {', '.join(self.study.values)}")
        joined = [name for name, table in self.tables.items() if table.arms == "joined"]
        if joined and not self.arms_table:
            raise ValueError(f"tables.{joined[0]}: arms are joined, but no arms_table says from where; name the table that has them")
        wanted = [self.arms_table, *self.participants, self.robustness.weights.table if self.robustness.weights else ""]
        for name in wanted:
            if name and name not in self.tables:
                raise ValueError(f"the table {name!r} is not declared; tables are {', '.join(self.tables)}")
        if len(self.keys) > MOST_OUTCOMES or len(self.tables) > MOST_OUTCOMES:
            raise ValueError(f"{len(self.keys)} outcomes over {len(self.tables)} tables; a trial may have {MOST_OUTCOMES} of each")
        return self

    @property
    def keys(self) -> tuple[str, ...]:
        """Partition keys, one a study and outcome: `longitudinal:separation_distress`."""
        return tuple(outcome_key(study, outcome.name) for study in self.study.values for outcome in self.outcomes if study in outcome.designs)

    @property
    def families(self) -> dict[str, dict[str, list[str]]]:
        """Measure family -> local family -> outcomes."""
        found: dict[str, dict[str, list[str]]] = {}
        for outcome in self.outcomes:
            if outcome.family:
                found.setdefault(outcome.family, {}).setdefault(outcome.local_family, []).append(outcome.name)
        return found

    @property
    def fingerprint(self) -> str:
        """A hash of everything declared, to be written down before the data."""
        return content_version(self.model_dump(mode="json"))

    def outcome(self, name: str) -> Outcome:
        return next(outcome for outcome in self.outcomes if outcome.name == name)

    def tables_of(self, key: str) -> tuple[str, ...]:
        """The raw tables that an outcome's own estimates read."""
        name = self.of_key(key)[1].table
        return (name, self.arms_table) if self.tables[name].arms == "joined" else (name,)

    def of_key(self, key: str) -> tuple[str, Outcome, Design]:
        """(study, outcome, design) of a partition key."""
        study, _, name = key.partition(":")
        outcome = self.outcome(name)
        return study, outcome, outcome.designs[study]

    def folder(self, study_file: Path) -> Path | None:
        """Where the raw files lie; `$NAME` at the start is an environment variable, None where that is not set."""
        if self.root.startswith("$"):
            name, _, rest = self.root[1:].partition("/")
            configured = os.environ.get(name)
            return Path(configured) / rest if configured else None
        return (study_file.parent / self.root).resolve()

    def table_schema(self, table: str) -> TableSchema:
        """The declared shape of a raw table once read: common columns first, then its own."""
        declared = self.tables[table]
        columns: list[Column] = []
        if declared.participants:
            columns.append(Column("participant", "string", "who"))
            columns.append(Column("study", "string", "which trial", choices=tuple(self.study.values), nullable=True))
        if declared.arms == "own":
            columns.append(Column("dose", "number", f"{self.dose.long_label} of the arm", self.dose.symbol, nullable=True))
            columns += [Column(factor.column, "string", factor.label, choices=factor.levels, nullable=True) for factor in self.factors]
        if declared.participants:
            columns += [Column(name, "integer", f"the {name}", f"{name}s", nullable=True, low=0) for name in self.times]
        for group in declared.columns:
            kind = {"time": "integer"}.get(group.kind, group.kind)
            columns += [
                Column(name, kind, name.replace("_", " "), group.unit, nullable=True, low=group.low, high=group.high, choices=group.choices)
                for name in group.names
            ]
        return TableSchema(f"trial_tables:{table}", tuple(columns))


def outcome_key(study: str, outcome: str) -> str:
    return f"{study}:{outcome}"


def parsed_time(value: Any, prefix: str) -> int | None:
    """`w3` -> 3 with the prefix `w`; None where there is nothing.

    Raises:
        ValueError: something else.
    """
    if value is None or value != value:
        return None
    text = str(value)
    found = re.fullmatch(rf"{re.escape(prefix)}(\d+)(\.0)?", text)
    if found is None:
        raise ValueError(f"{text!r} is no {prefix}NUMBER" if prefix else f"{text!r} is no whole number")
    return int(found[1])
