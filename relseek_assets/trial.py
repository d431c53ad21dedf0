"""The declaration of a trial: its files, arms, outcomes and families, as the `[trial]` table of a study file.

Here belong the settings, their checks and their defaults, for anybody's trial. How outcomes are estimated belongs in `trials/`.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Hashable
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from relseek_resources.storage import Column, TableSchema, content_version

NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]*")
CANONICAL = ("participant", "value", "dose", "category", "level", "item", "time", "baseline")  # columns of an outcome's rows (trials/frames.py)
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

    @model_validator(mode="after")
    def _checked(self) -> ColumnGroup:
        if self.low is not None and self.high is not None and self.low > self.high:
            raise ValueError(f"{', '.join(self.names)}: low {self.low:g} is above high {self.high:g}; exchange them")
        if self.choices and self.kind != "string":
            raise ValueError(f"{', '.join(self.names)}: choices are for the kind 'string'; remove them, or give low and high")
        if self.prefix and self.kind != "time":
            raise ValueError(f"{', '.join(self.names)}: a prefix is for the kind 'time'; remove it, or make the kind 'time'")
        return self


class RawTable(_Settings):
    """One raw file: JSON Lines, CSV or parquet. Columns that are not declared are left out."""

    file: str
    columns: tuple[ColumnGroup, ...] = ()
    participants: bool = True  # False where rows are of no participant
    key: tuple[str, ...] | None = None  # what tells a participant's rows apart (nothing: one row each); a repeated key is a fault
    about: str = ""
    arms: Literal["own", "joined", "none"] = "own"  # joined: from `arms_table`; none: participants see several doses, or the file is of nobody

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(name for group in self.columns for name in group.names)

    def kind_of(self, column: str) -> str:
        """The declared kind of a column, empty where it is not declared."""
        return next((group.kind for group in self.columns if column in group.names), "")


class StudyColumn(_Settings):
    """Which trial a row belongs to: our name -> the value in the files. Without a column all rows are of one study."""

    column: str = ""
    values: dict[str, str] = Field(default={"trial": "trial"}, min_length=1)

    @model_validator(mode="after")
    def _checked(self) -> StudyColumn:
        if len(set(self.values.values())) < len(self.values):
            raise ValueError(f"values: two studies have the same value in {list(self.values.values())}; keep one of each")
        if len(self.values) > 1 and not self.column:
            raise ValueError(f"column: missing; {', '.join(self.values)} cannot be told apart without a column that names the study of a row")
        return self


class Dose(_Settings):
    """The dose of a participant's arm. `values` are numbers, or names of arms with their dose; `low` and `high` form the primary contrast."""

    column: str
    values: tuple[float, ...] | dict[str, float]
    low: tuple[float, ...] = ()
    high: tuple[float, ...] = ()
    label: str = "RS"
    long_label: str = "Relationship-Seeking"
    symbol: str = "λ"

    @field_validator("values", mode="before")
    @classmethod
    def _numbers(cls, values: Any) -> Any:
        doses = values.values() if isinstance(values, dict) else values if isinstance(values, list | tuple) else [values]
        wrong = [dose for dose in doses if isinstance(dose, bool) or not isinstance(dose, int | float) or not math.isfinite(dose)]
        if wrong:
            raise ValueError(f"{wrong[0]!r} is no dose; give numbers, or names of arms with their dose: {{ control = 0, treated = 1 }}")
        return values

    @model_validator(mode="after")
    def _checked(self) -> Dose:
        if len(self.doses) < 2:
            raise ValueError("values: a trial needs at least two different doses")
        for name in ("low", "high"):
            beyond = [dose for dose in getattr(self, name) if dose not in self.doses]
            if beyond:
                raise ValueError(f"{name} names {beyond}, which are no doses of the trial; its doses are {list(self.doses)}")
        both = sorted(set(self.low_doses) & set(self.high_doses))
        if both:
            raise ValueError(f"low and high both hold {both}; the primary contrast is between different doses")
        return self

    @property
    def doses(self) -> tuple[float, ...]:
        return tuple(sorted(set(self.values.values() if isinstance(self.values, dict) else self.values)))

    @property
    def low_doses(self) -> tuple[float, ...]:
        """The doses below zero, or the lowest where none is; never the highest."""
        return tuple(sorted(self.low)) or tuple(dose for dose in self.doses[:-1] if dose < 0) or self.doses[:1]

    @property
    def high_doses(self) -> tuple[float, ...]:
        return tuple(sorted(self.high)) or tuple(dose for dose in self.doses if dose > 0 and dose not in self.low_doses) or self.doses[-1:]

    @property
    def ends(self) -> tuple[str, str]:
        """What low and high doses are called in labels: negative and positive where they are."""
        return ("neg", "pos") if max(self.low_doses) < 0 < min(self.high_doses) else ("low", "high")

    @property
    def contrast(self) -> str:
        """The label of the primary contrast."""
        low, high = self.ends
        return f"{self.label}: Avg({high.title()}) - Avg({low.title()})"


class Factor(_Settings):
    """A second treatment with two levels, the reference first; `short` are the names of its levels in labels of slopes."""

    column: str
    label: str
    code: str = ""  # in the names of test types, the label by default
    levels: tuple[str, str]
    short: tuple[str, str] | None = None

    @model_validator(mode="after")
    def _checked(self) -> Factor:
        if not NAME.fullmatch(self.column) or self.column in CANONICAL:
            raise ValueError(f"column: {self.column!r} becomes part of formulas; use letters, digits and '_', and none of {', '.join(CANONICAL)}")
        if self.levels[0] == self.levels[1]:
            raise ValueError(f"levels: {self.column} has the level {self.levels[0]!r} twice; a factor has two different ones")
        return self

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
        if self.endpoints is not None and self.endpoints[0] >= self.endpoints[1]:
            raise ValueError(f"endpoints: {list(self.endpoints)} do not rise; give the first time and then the last")
        return self

    @property
    def columns(self) -> dict[str, tuple[str, ...]]:
        """Setting -> the columns of the outcome's table that it names."""
        baseline = self.baseline or Baseline.model_construct()
        found = {"where": tuple(self.where), "time": (self.time,) if self.time else ()}
        own = (baseline.column,) if baseline.column else ()
        return {**found, "baseline.column": own, "baseline.where": tuple(baseline.where), "baseline.by": baseline.by}


class Outcome(_Settings):
    """An outcome, measured by one item or pooled over several; the first item is the reference."""

    name: str
    table: str
    items: tuple[str, ...] = Field(min_length=1)
    model: Literal["linear", "logit"] = "linear"
    form: Literal["", "linear", "quadratic", "cubic"] = ""  # of the dose; chosen by comparison where it is not declared
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
            raise ValueError(f"{self.name}: family and local_family go together; give both or neither")
        for name in (self.family, self.local_family):
            if name and not NAME.fullmatch(name):
                raise ValueError(f"{self.name}: the family {name!r} becomes a partition key; use letters, digits and '_' only")
        if len(set(self.items)) < len(self.items):
            raise ValueError(f"{self.name}: items hold one more than once; keep one of each")
        for study, design in self.designs.items():
            where = f"{self.name}: designs.{study}"
            if self.model == "logit" and (design.time or len(self.items) > 1):
                raise ValueError(f"{where}: a logit has one item, measured once; drop the time and other items, or make the model 'linear'")
            if design.baseline is not None and design.baseline.column and len(self.items) > 1:
                raise ValueError(f"{where}.baseline: a column is the baseline of one item; for several choose rows with baseline.where")
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
    study: StudyColumn = StudyColumn()
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
        wanted = [self.arms_table, *self.participants, self.robustness.weights.table if self.robustness.weights else ""]
        for name in wanted:
            if name and name not in self.tables:
                raise ValueError(f"the table {name!r} is not declared; tables are {', '.join(self.tables)}")
        self._check_factors()
        for name, table in self.tables.items():
            self._check_table(name, table)
        for outcome in self.outcomes:
            self._check_outcome(outcome)
        self._check_robustness()
        if len(self.keys) > MOST_OUTCOMES or len(self.tables) > MOST_OUTCOMES:
            raise ValueError(f"{len(self.keys)} outcomes over {len(self.tables)} tables; a trial may have {MOST_OUTCOMES} of each")
        return self

    def _check_factors(self) -> None:
        for name in ("column", "label", "test_code"):
            found = [getattr(factor, name) for factor in self.factors]
            if len(set(found)) < len(found):
                raise ValueError(f"factors: both have the {name.replace('_', ' ')} {found[0]!r}; give them different ones")
            taken = sorted({self.dose.label, self.dose.long_label}.intersection(found))
            if taken:
                raise ValueError(f"factors: one has the {name.replace('_', ' ')} {taken[0]!r}, which is the dose's (trial.dose); give it another")

    def _check_table(self, name: str, table: RawTable) -> None:
        if table.arms == "joined":
            if not self.arms_table:
                raise ValueError(f"tables.{name}: arms are joined, but no arms_table says from where; name the table that has them")
            if not table.participants or self.tables[self.arms_table].arms != "own" or not self.tables[self.arms_table].participants:
                raise ValueError(
                    f"tables.{name}: arms come from {self.arms_table} by participant; both need participants, and that one arms of its own"
                )
        columns = [column.name for column in self.table_schema(name).columns]
        repeated = sorted({column for column in columns if columns.count(column) > 1})
        if repeated:
            raise ValueError(f"tables.{name}: columns hold {repeated} more than once, or name what relseek adds itself; keep one of each")
        unknown = [column for column in table.key or () if column not in columns]
        if unknown or (table.key is not None and not table.participants):
            what = unknown or "rows of participants"
            raise ValueError(f"tables.{name}: key names {what}, which the table does not have; it has {', '.join(columns)}")

    def _check_outcome(self, outcome: Outcome) -> None:
        if outcome.table not in self.tables:
            raise ValueError(
                f"outcomes: {outcome.name} reads the table {outcome.table!r}, which is not declared; tables are {', '.join(self.tables)}"
            )
        unknown = [study for study in outcome.designs if study not in self.study.values]
        if unknown:
            raise ValueError(f"outcomes: {outcome.name} has designs for {unknown}; the studies are {', '.join(self.study.values)}")
        table = self.tables[outcome.table]
        if not table.participants or table.arms == "none":
            raise ValueError(f"outcomes: {outcome.name} reads {outcome.table}, which has no participants in arms; make its arms 'own' or 'joined'")
        numbers = [name for name in table.names if table.kind_of(name) == "number"]
        lacking = [item for item in outcome.items if item not in numbers]
        if lacking:
            raise ValueError(f"outcomes: {outcome.name} has the items {lacking}; the numbers that {outcome.table} declares are {', '.join(numbers)}")
        known = [column.name for column in self.table_schema(outcome.table).columns] + [factor.column for factor in self.factors]
        for study, design in outcome.designs.items():
            for setting, names in design.columns.items():
                lacking = [name for name in names if name not in known]
                if lacking:
                    place = f"outcomes: {outcome.name}, designs.{study}.{setting}"
                    raise ValueError(f"{place} names {lacking}; the columns of {outcome.table} are {', '.join(known)}")
            if design.weighted and self.robustness.weights is None:
                raise ValueError(f"outcomes: {outcome.name}, designs.{study} is weighted; declare robustness.weights or drop weighted")

    def _check_robustness(self) -> None:
        weights = self.robustness.weights
        if weights is not None and self.tables[weights.table].kind_of(weights.column) != "number":
            numbers = [name for name in self.tables[weights.table].names if self.tables[weights.table].kind_of(name) == "number"]
            raise ValueError(f"robustness.weights: {weights.table} declares no number {weights.column!r}; it has {', '.join(numbers)}")
        if self.questionnaire:  # its covariates are coarsened from answers, so that they are no columns of a file
            return
        known = [name for table in self.participants for name in self.tables[table].names]
        for name in (*self.robustness.demographics, *self.robustness.preferences):
            if name not in known:
                there = ", ".join(known) or "none: name tables in participants"
                raise ValueError(f"robustness: the covariate {name!r} is in no table of participants; there is {there}")
            if not NAME.fullmatch(name) or name in CANONICAL:
                raise ValueError(f"robustness: the covariate {name!r} becomes part of formulas; use letters, digits and '_' in its name")

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
    def plan(self) -> dict[str, Any]:
        """Everything declared that decides about results, with the doses of the primary contrast spelt out.

        Where files lie and what is said about them is left out. JSON-able, without nulls, and a valid `[trial]` by itself.
        """
        unsaid: Any = {"root": True, "tables": {name: {"about"} for name in self.tables}}
        found = self.model_dump(mode="json", exclude_none=True, exclude=unsaid)
        found["dose"] |= {"low": list(self.dose.low_doses), "high": list(self.dose.high_doses)}
        return found

    @property
    def fingerprint(self) -> str:
        """A hash of the plan, to be written down before the data."""
        return content_version(self.plan)

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


@lru_cache(maxsize=4096, typed=True)
def parsed_time(value: Hashable, prefix: str) -> int | None:
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
