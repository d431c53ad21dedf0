"""The rows that one outcome of one study is estimated from, under canonical names.

Here belongs choosing, melting and joining. Formulas and fits belong in `formulas.py` and `models.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from relseek_assets.trial import Baseline, Design, Factor, Outcome, Trial
from relseek_assets.trials.raw import TrialFault

LOW, MIDDLE, HIGH = "low", "middle", "high"
FEWEST_PARTICIPANTS = 8  # below it no model of ours leaves a degree of freedom worth the name


@dataclass(frozen=True, eq=False)  # a frame is itself: designs are remembered by it
class OutcomeFrame:
    """Rows of one outcome and study.

    Columns of `rows`: participant, value, dose, category (dose below, at or above the middle, the lowest the reference), level (dose as a
    factor), one column a factor, item where several are pooled, time, baseline.
    """

    study: str
    outcome: Outcome
    trial: Trial
    rows: pd.DataFrame
    factors: tuple[Factor, ...]
    covariates: tuple[str, ...] = ()  # columns that robustness specifications add
    unplaced: int = 0  # values left out because their row has no arm

    @property
    def key(self) -> str:
        return f"{self.study}:{self.outcome.name}"

    @property
    def pooled(self) -> bool:
        return "item" in self.rows

    @property
    def timed(self) -> bool:
        return "time" in self.rows

    @property
    def endpoints(self) -> tuple[int, int]:
        found = self.outcome.designs[self.study].endpoints
        assert found is not None, f"{self.key} has no time"
        return found

    @property
    def repeated(self) -> bool:
        """Whether participants have several rows, so that a mixed model is due."""
        return self.pooled or self.timed

    @property
    def participants(self) -> int:
        return int(self.rows["participant"].nunique())

    @property
    def doses(self) -> tuple[float, ...]:
        return tuple(float(dose) for dose in sorted(self.rows["dose"].unique()))


def outcome_frame(trial: Trial, key: str, tables: Mapping[str, pd.DataFrame]) -> OutcomeFrame:
    """The rows of a partition `study:outcome`.

    Args:
        tables: raw tables by name, the outcome's own and the arms table where the outcome's has no arms.

    Raises:
        TrialFault: arms or times that are missing, two values where one is due, no row left, an item without
            a value, a constant outcome, too few participants, no arm at one end of the primary contrast.
    """
    study, outcome, design = trial.of_key(key)
    raw = tables[outcome.table]
    if trial.tables[outcome.table].arms == "joined":
        raw = _with_arms(trial, raw, tables[trial.arms_table], key)
    _in_arms(trial, outcome, raw, key)
    raw = raw[raw["study"].eq(study)]
    rows = _chosen(raw, design.where, key)
    empty = [item for item in outcome.items if rows[item].isna().all()]
    if empty:
        raise TrialFault(f"{key}: {', '.join(empty)} holds no value in {len(rows)} rows; correct the file or drop the item")
    keep = ["participant", "dose", *(factor.column for factor in trial.factors), *([design.time] if design.time else [])]
    melted = _by_item(rows, [*keep, *(design.baseline.by if design.baseline else ())], outcome, "value")
    if design.baseline is not None:
        melted["baseline"] = _baseline(design.baseline, rows, raw, melted, outcome)
    melted = melted.dropna(subset=["value", *(["baseline"] if design.baseline else [])])
    unplaced = int(melted["dose"].isna().sum())
    melted = melted.dropna(subset=["dose"])
    _placed(trial, design, melted, key)
    frame = _canonical(trial, outcome, melted, design.time)
    factors = tuple(factor for factor in trial.factors if frame[factor.column].nunique() > 1)
    _estimable(frame, trial, outcome, design, key)
    return OutcomeFrame(study, outcome, trial, frame.reset_index(drop=True), factors, unplaced=unplaced)


def covariates_table(participants: pd.DataFrame) -> pd.DataFrame:
    """Covariates by participant; texts become factors, levels in the order of the participants' table."""
    table = participants.set_index("participant").drop(columns="study", errors="ignore")
    factors = {
        name: pd.Categorical(table[name], list(dict.fromkeys(table[name].dropna())))
        for name in table.columns
        if not pd.api.types.is_numeric_dtype(table[name])
    }
    return table.assign(**factors)


def with_covariates(frame: OutcomeFrame, table: pd.DataFrame) -> OutcomeFrame:
    """The same rows with the declared covariates of a `covariates_table` beside."""
    settings = frame.trial.robustness
    declared = dict.fromkeys((*settings.demographics, *settings.preferences))
    there = [name for name in declared if name in table and name not in frame.rows]
    mine = table[there].reindex(frame.rows["participant"]).set_axis(frame.rows.index)
    wanted = tuple(name for name in there if mine[name].nunique() > 1)
    beside = mine[list(wanted)]
    return replace(frame, rows=pd.concat([frame.rows, beside], axis=1), covariates=wanted)


def _with_arms(trial: Trial, raw: pd.DataFrame, arms: pd.DataFrame, key: str) -> pd.DataFrame:
    columns = ["study", "dose", *(factor.column for factor in trial.factors)]
    known = arms.dropna(subset=["dose"])
    of_two = known.groupby("participant")["study"].nunique().loc[lambda studies: studies > 1]
    if len(of_two):
        raise TrialFault(f"{key}: participant {of_two.index[0]} is in two studies of {trial.arms_table}; a name stands for one person")
    placed = pd.concat([known, arms]).drop_duplicates("participant")  # whoever has rows with and without an arm is in that arm
    joined = raw.drop(columns="study").join(placed.set_index("participant")[columns], on="participant")
    stranger = joined["study"].isna()
    if stranger.any():
        raise TrialFault(f"{key}: participant {joined['participant'][stranger].iloc[0]} is not in {trial.arms_table}; add it or remove the row")
    return joined


def _in_arms(trial: Trial, outcome: Outcome, raw: pd.DataFrame, key: str) -> None:
    """Refuse a file whose rows are of no study or of no arm at all."""
    own = {"study": trial.study.column, "dose": trial.dose.column, **{factor.column: factor.column for factor in trial.factors}}
    empty = [of_file for name, of_file in own.items() if raw[name].isna().all()]
    if empty:
        file = trial.tables[outcome.table].file
        raise TrialFault(f'{key}: {file} has no value of {", ".join(empty)}; correct it, or set tables.{outcome.table}.arms = "joined"')


def _placed(trial: Trial, design: Design, melted: pd.DataFrame, key: str) -> None:
    """Refuse values that belong to no time or level, and two values of a participant where one is due."""
    for name in [*([design.time] if design.time else []), *(factor.column for factor in trial.factors if melted[factor.column].notna().any())]:
        lost = melted[name].isna()
        if lost.any():
            who = melted["participant"][lost].iloc[0]
            raise TrialFault(f"{key}: {int(lost.sum())} values have no {name}, the first of participant {who}; add it to the file or remove them")
    twice = melted.duplicated(["participant", "item", *([design.time] if design.time else [])])
    if twice.any():
        row = melted[twice].iloc[0]
        when = f" in {design.time} {row[design.time]}" if design.time else ""
        raise TrialFault(
            f"{key}: participant {row['participant']} has two values of {row['item']}{when}; keep one, or name a time or where in the design"
        )


def _chosen(raw: pd.DataFrame, where: Mapping[str, str], key: str) -> pd.DataFrame:
    rows = raw
    for column, value in where.items():
        rows = rows[_equal(rows[column], value)]
    if rows.empty:
        raise TrialFault(
            f"{key}: no rows"
            + (f" where {dict(where)}" if where else f" of the study {key.split(':')[0]}")
            + "; correct the file, or the design in the study file"
        )
    return rows


def _equal(values: pd.Series, text: str) -> pd.Series:
    """Which values a text of the declaration means: numbers whatever their decimals, truth values in any case."""
    if pd.api.types.is_numeric_dtype(values):
        return values.eq(pd.to_numeric(text, errors="coerce")).fillna(False).astype(bool)
    truth = values.map(lambda value: isinstance(value, bool))
    return values.astype(str).eq(text) | truth & values.astype(str).str.lower().eq(text.lower())


def _by_item(rows: pd.DataFrame, columns: list[str], outcome: Outcome, name: str) -> pd.DataFrame:
    """One row a row and item: the columns, `item`, and the item's value under `name`. Items may have any names, also these two."""
    head = rows[list(dict.fromkeys(columns))]
    return pd.concat([head.assign(**{"item": item, name: rows[item]}) for item in outcome.items], ignore_index=True)


def _baseline(baseline: Baseline, rows: pd.DataFrame, raw: pd.DataFrame, melted: pd.DataFrame, outcome: Outcome) -> np.ndarray:
    keys = ["participant", *baseline.by]
    if baseline.column:
        before = rows[[*keys, baseline.column]].rename(columns={baseline.column: "baseline"}).assign(item=outcome.items[0])
    else:
        earlier = raw
        for column, value in baseline.where.items():
            earlier = earlier[_equal(earlier[column], value)]
        before = _by_item(earlier, keys, outcome, "baseline")
    before = before.dropna(subset=["baseline"])
    if before.duplicated([*keys, "item"]).any():
        who = before[before.duplicated([*keys, "item"])]["participant"].iloc[0]
        raise TrialFault(f"{outcome.name}: participant {who} has two baselines; name in baseline.by what tells them apart")
    return melted[[*keys, "item"]].merge(before, on=[*keys, "item"], how="left")["baseline"].to_numpy(float)


def _canonical(trial: Trial, outcome: Outcome, melted: pd.DataFrame, time: str) -> pd.DataFrame:
    dose = melted["dose"].to_numpy(float)
    doses = sorted(set(dose))
    frame = pd.DataFrame({"participant": melted["participant"].to_numpy(object), "value": melted["value"].to_numpy(float), "dose": dose})
    low, high = np.isin(dose, trial.dose.low_doses), np.isin(dose, trial.dose.high_doses)
    category = np.where(low, LOW, np.where(high, HIGH, MIDDLE))
    frame["category"] = pd.Categorical(category, [name for name in (LOW, MIDDLE, HIGH) if name in category])
    frame["level"] = pd.Categorical([f"{value:g}" for value in dose], [f"{value:g}" for value in doses])
    for factor in trial.factors:
        frame[factor.column] = pd.Categorical(melted[factor.column].to_numpy(object), list(factor.levels))
    if len(outcome.items) > 1:
        frame["item"] = pd.Categorical(melted["item"].to_numpy(object), list(outcome.items))
    if time:
        frame["time"] = melted[time].to_numpy(float)
    if "baseline" in melted:
        frame["baseline"] = melted["baseline"].to_numpy(float)
    return frame


def _estimable(frame: pd.DataFrame, trial: Trial, outcome: Outcome, design: Design, key: str) -> None:
    if frame["participant"].nunique() < FEWEST_PARTICIPANTS:
        raise TrialFault(f"{key}: {frame['participant'].nunique()} participants have values; at least {FEWEST_PARTICIPANTS} are needed")
    if frame["value"].nunique() == 1:
        raise TrialFault(f"{key}: every value is {frame['value'].iloc[0]:g}; a constant outcome has no effect to estimate, so leave it out")
    if frame["level"].nunique() < 2:
        raise TrialFault(f"{key}: all rows are of the dose {frame['dose'].iloc[0]:g}; there is nothing to compare, so remove this design")
    for end, doses in (("low", trial.dose.low_doses), ("high", trial.dose.high_doses)):
        if not frame["dose"].isin(doses).any():
            named = ", ".join(f"{dose:g}" for dose in doses)
            raise TrialFault(f"{key}: nobody has a dose of the {end} end ({named}) of the primary contrast; name doses of this study in dose.{end}")
    absent = [time for time in design.endpoints or () if not frame["time"].eq(time).any()]
    if absent:
        spans = f"{frame['time'].min():g} to {frame['time'].max():g}"
        raise TrialFault(f"{key}: no value at {design.time} {absent[0]}, an endpoint of the design; the rows span {spans}, so correct endpoints")
    if outcome.model == "logit" and not set(frame["value"].unique()) <= {0.0, 1.0}:
        found = sorted(set(frame["value"].unique()) - {0.0, 1.0})[:3]
        raise TrialFault(
            f"{key}: a logit outcome holds 0 and 1 only, found {', '.join(f'{value:g}' for value in found)}; make it linear, or recode it"
        )
