"""What the analyses of the published instruments share: their one table, a part with the raw tables that it needs, parts on every core, rows.

Here belongs what any part may use, also where a table is absent or at fault. The parts themselves belong in `instruments.py`.
"""

from __future__ import annotations

import pickle
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats
from statsmodels.stats.proportion import proportion_confint

from relseek_assets.trials import calibration, frontier, profiles
from relseek_assets.trials.participants import CLUSTERS, COARSENINGS, DROPOUT, treatment_columns
from relseek_assets.trials.raw import FAULTS, said
from relseek_resources.processes import at_work
from relseek_resources.storage import Column, TableSchema

SCHEMA = TableSchema(
    "trial_instruments",
    (
        Column("part", "string", "which analysis"),
        Column("study", "string", "which trial; null where studies are compared", nullable=True),
        Column("grouping", "string", "treatment, model or scope", nullable=True),
        Column("outcome", "string", "what was measured", nullable=True),
        Column("term", "string", "level, comparison or coefficient", nullable=True),
        Column("estimate", "number", "point estimate", "outcome", nullable=True),
        Column("se", "number", "standard error", "outcome", nullable=True, low=0),
        Column("df", "number", "degrees of freedom; null for z", nullable=True, low=0),
        Column("statistic", "number", "of the test", nullable=True),
        Column("p", "number", "two-sided unless the method says otherwise", nullable=True, low=0, high=1),
        Column("p_adjusted", "number", "by Benjamini-Hochberg within the part's family", nullable=True, low=0, high=1),
        Column("lower", "number", "lower end of the 95% interval", "outcome", nullable=True),
        Column("upper", "number", "upper end of the 95% interval", "outcome", nullable=True),
        Column("n", "integer", "rows or participants analysed", nullable=True, low=0),
        Column("method", "string", "how the estimate and its interval were made", nullable=True),
        Column("note", "string", "why a number is missing", nullable=True),
        Column("details", "json", "further numbers of a published table", nullable=True),
    ),
    ("part", "study", "grouping", "outcome", "term"),
)
COLUMNS = SCHEMA.names
NUMBERS = tuple(column.name for column in SCHEMA.columns if column.kind in ("number", "integer"))
PEOPLE = "participants"  # the table of covariates, which is made of several raw tables

Tables = Mapping[str, pd.DataFrame]


@dataclass(frozen=True)
class Part:
    """One analysis of an instrument: the tables without which it cannot be done (`PEOPLE` among them), and its rows."""

    name: str
    needs: tuple[str, ...]
    rows: Callable[[Inputs], pd.DataFrame]
    outcome: str | None = None


class Inputs:
    """Tables under the column names of the raw files, and what several parts make of them."""

    def __init__(self, tables: Tables, covariates: pd.DataFrame | None) -> None:
        self.tables = {name: _as_published(table) for name, table in tables.items()}
        self._covariates = covariates

    def __getitem__(self, name: str) -> pd.DataFrame:
        return self.tables[name]

    def lacks(self, needs: Iterable[str]) -> list[str]:
        wanted = dict.fromkeys(table for name in needs for table in ((PEOPLE, "metadata_with_dropout") if name == PEOPLE else (name,)))
        return [name for name in wanted if (self._covariates is None if name == PEOPLE else name not in self.tables)]

    @cached_property
    def people(self) -> pd.DataFrame:
        """The merged participant table: covariates as levels whose first is the reference, and the arms."""
        assert self._covariates is not None, "lacks() was not asked"
        found = _as_published(self._covariates)
        arms = self["metadata_with_dropout"][["ppt_id", "multiplier", "domain", "personalisation"]]
        found = found.merge(arms, on="ppt_id", how="left", validate="one_to_one")
        levels = {item.name: item.levels for item in COARSENINGS} | {"cluster_name": CLUSTERS}
        for name in found.columns.intersection(list(levels)):
            found[name] = pd.Categorical(found[name].astype(object), categories=list(levels[name]))
        return treatment_columns(found.astype(dict.fromkeys(found.columns.intersection(list(DROPOUT)), bool)))

    @cached_property
    def liking(self) -> pd.Series:
        return profiles.liking_slopes(self["preferences"])

    @cached_property
    def wanting(self) -> dict[str, pd.Series]:
        """By the name of what is wanted: slopes of separation distress, changes of seeking companionship; those whose table is there."""
        found: dict[str, pd.Series] = {}
        if "attachment" in self.tables:
            found["separation_distress"] = profiles.wanting_slopes(self["attachment"])
        if "seeking_companionship" in self.tables:
            found["seeking_companionship"] = profiles.seeking_changes(self["seeking_companionship"])
        return found

    @cached_property
    def profiles(self) -> dict[str, pd.DataFrame]:
        return {name: profiles.profiles(self.liking, slopes, standardised=name != "separation_distress") for name, slopes in self.wanting.items()}

    @cached_property
    def last(self) -> pd.DataFrame:
        return profiles.last_measures(self["attachment"], self["seeking_companionship"], self["goodbye"])

    @cached_property
    def ratings(self) -> pd.DataFrame:
        return calibration.composites(self["calibration_ratings"])

    @cached_property
    def panel(self) -> pd.DataFrame:
        return frontier.panel(frontier.with_releases(self["frontier_scores"], self["frontier_models"]))

    @cached_property
    def vector(self) -> pd.DataFrame:
        return frontier.vector_scores(self["frontier_vector"].rename(columns={"relationship_score": "score"}))


def _as_published(table: pd.DataFrame) -> pd.DataFrame:
    # A table without studies of its own has an empty column; the analyses then take the study from the participants.
    empty = [name for name in ("study",) if name in table and table[name].isna().all()]
    return table.drop(columns=empty).rename(columns={"participant": "ppt_id", "dose": "multiplier"})


# --- rows -------------------------------------------------------------------------------------------------------------


def rows_of(part: str, found: pd.DataFrame | Iterable[Mapping[str, Any]], details: Sequence[str] = ()) -> pd.DataFrame:
    """`found` as rows of a part; columns named in `details` go there, others that the schema lacks are left out."""
    table = (found if isinstance(found, pd.DataFrame) else pd.DataFrame(list(found))).reset_index(drop=True)
    if details:
        table = table.assign(details=pd.Series(table[list(details)].to_dict("records"), dtype=object, index=table.index))
    return table.assign(part=part).reindex(columns=list(COLUMNS)).astype(object)


def tidied(rows: pd.DataFrame) -> pd.DataFrame:
    """Texts or null, numbers or null: an infinite number becomes null, and the note says so."""
    table = rows.reset_index(drop=True).copy()
    for name in set(COLUMNS) - set(NUMBERS) - {"details"}:
        table[name] = objects(None if is_missing(value) or value == "" else text_of(value) for value in table[name])
    numbers = table[list(NUMBERS)].astype(float)
    endless = np.isinf(numbers.drop(columns="df")).any(axis=1)  # a z test has infinitely many degrees of freedom: null by the schema
    table.loc[endless & table["note"].isna(), "note"] = "infinite"
    table[list(NUMBERS)] = numbers.replace([np.inf, -np.inf], np.nan)
    table["details"] = objects(None if is_missing(value) else _plain(value) for value in table["details"])
    return table


def objects(values: Iterable[Any]) -> pd.Series:
    """A column that keeps None, which pandas would make NaN beside texts."""
    return pd.Series(list(values), dtype=object)


def text_of(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def is_missing(value: Any) -> bool:
    return value is None or value is pd.NA or (isinstance(value, float) and not np.isfinite(value))


def _plain(value: Any) -> Any:
    """A value that JSON can hold, numbers that it cannot as null."""
    if isinstance(value, Mapping):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple | np.ndarray):
        return [_plain(item) for item in value]
    value = value.item() if isinstance(value, np.generic) else value
    return None if is_missing(value) else value


def nothing(part: Part, note: str) -> pd.DataFrame:
    return rows_of(part.name, [{"outcome": part.outcome, "note": note}])


class Begun:
    """An instrument's parts at work on every core; `rows` waits for them.

    Args:
        parts: what there is to make.
        tables: raw tables by name; a part of which one is absent becomes a row that says so.
        people: the table of covariates, where there is one.
    """

    def __init__(self, parts: Sequence[Part], tables: Tables, people: pd.DataFrame | None) -> None:
        inputs = Inputs(tables, people)
        self._parts = parts
        self._absent = {part: absent for part in parts if (absent := inputs.lacks(part.needs))}
        self._folder = tempfile.TemporaryDirectory()
        file = Path(self._folder.name) / "inputs"  # read once by each process; with every part it would be sent as often as there are parts
        file.write_bytes(pickle.dumps(inputs, pickle.HIGHEST_PROTOCOL))
        self._made = at_work(_part_rows, [(file, part) for part in parts if part not in self._absent])

    def rows(self) -> pd.DataFrame:
        """All parts' rows, `SCHEMA`; a part that is at fault is one row that says so. To be asked for once."""
        with self._folder:
            found = [nothing(part, f"absent: {', '.join(self._absent[part])}") if part in self._absent else next(self._made) for part in self._parts]
        return tidied(pd.concat(found, ignore_index=True))


def _part_rows(piece: tuple[Path, Part]) -> pd.DataFrame:
    """A part's rows in any process, which keeps what it makes of the inputs for its next part."""
    file, part = piece
    try:
        return part.rows(_inputs_of(file))
    except FAULTS as fault:
        return nothing(part, said(fault))


@lru_cache(maxsize=1)
def _inputs_of(file: Path) -> Inputs:
    found: Inputs = pickle.loads(file.read_bytes())
    return found


def shares_of(counts: Iterable[Any], sizes: Iterable[Any]) -> Iterator[dict[str, Any]]:
    """Each count's share of its size, with its exact interval; all at once, because one call for each takes a hundred times as long."""
    count, n = np.array(list(counts), dtype=int), np.array(list(sizes), dtype=int)
    share, (lower, upper) = count / n, proportion_confint(count, n, method="beta")
    table = {"estimate": share, "se": np.sqrt(share * (1 - share) / n), "lower": lower, "upper": upper, "n": n}
    for row in pd.DataFrame(table).to_dict("records"):
        yield {**row, "method": "share, Clopper-Pearson"}


def mean_of(values: pd.Series | np.ndarray) -> dict[str, Any]:
    numbers = np.asarray(values, dtype=float)
    n, mean, sd = len(numbers), float(numbers.mean()), float(numbers.std(ddof=1)) if len(numbers) > 1 else np.nan
    se = sd / np.sqrt(n)
    reach = stats.t.ppf(0.975, n - 1) * se if n > 1 else np.nan
    described = {"sd": sd, "min": float(numbers.min()), "max": float(numbers.max())}
    return {"estimate": mean, "se": se, "df": n - 1, "lower": mean - reach, "upper": mean + reach, "n": n, "method": "mean, t", "details": described}
