"""The rows that one outcome of one study is estimated from, under canonical names.

Here belongs choosing, melting and joining. Formulas and fits belong in `formulas.py` and `models.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from relseek_assets.trial import Baseline, Factor, Outcome, Trial
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
        TrialFault: no row is left, an item without a value, a constant outcome, too few participants.
    """
    study, outcome, design = trial.of_key(key)
    raw = tables[outcome.table]
    if trial.tables[outcome.table].arms == "joined":
        raw = _with_arms(trial, raw, tables[trial.arms_table], key)
    raw = raw[raw["study"].eq(study)]
    rows = _chosen(raw, design.where, key)
    empty = [item for item in outcome.items if rows[item].isna().all()]
    if empty:
        raise TrialFault(f"{key}: {', '.join(empty)} holds no value in {len(rows)} rows; correct the file or drop the item")
    keep = ["participant", "dose", *(factor.column for factor in trial.factors), *([design.time] if design.time else [])]
    by = list(design.baseline.by) if design.baseline else []
    melted = rows[[*dict.fromkeys([*keep, *by]), *outcome.items]].melt(
        id_vars=list(dict.fromkeys([*keep, *by])), value_vars=list(outcome.items), var_name="item", value_name="value"
    )
    if design.baseline is not None:
        melted["baseline"] = _baseline(design.baseline, rows, raw, melted, outcome)
    melted = melted.dropna(subset=["value", "dose", *(["baseline"] if design.baseline else []), *([design.time] if design.time else [])])
    frame = _canonical(trial, outcome, melted, design.time)
    factors = tuple(factor for factor in trial.factors if frame[factor.column].nunique() > 1)
    _estimable(frame, outcome, key)
    return OutcomeFrame(study, outcome, trial, frame.reset_index(drop=True), factors)


def with_covariates(frame: OutcomeFrame, participants: pd.DataFrame) -> OutcomeFrame:
    """The same rows with the declared covariates beside; texts become factors, levels in the order of the participants' table."""
    table = participants.set_index("participant")
    table = table[[name for name in table.columns if name not in frame.rows and name != "study"]]
    for name in table.columns:
        if not pd.api.types.is_numeric_dtype(table[name]):
            table[name] = pd.Categorical(table[name], list(dict.fromkeys(table[name].dropna())))
    settings = frame.trial.robustness
    wanted = tuple(name for name in (*settings.demographics, *settings.preferences) if name in table and table[name].nunique() > 1)
    return replace(frame, rows=frame.rows.join(table[list(wanted)], on="participant"), covariates=wanted)


def _with_arms(trial: Trial, raw: pd.DataFrame, arms: pd.DataFrame, key: str) -> pd.DataFrame:
    columns = ["study", "dose", *(factor.column for factor in trial.factors)]
    joined = raw.drop(columns="study").join(arms.drop_duplicates("participant").set_index("participant")[columns], on="participant")
    stranger = joined["study"].isna()
    if stranger.any():
        raise TrialFault(f"{key}: participant {joined['participant'][stranger].iloc[0]} is not in {trial.arms_table}; add it or remove the row")
    return joined


def _chosen(raw: pd.DataFrame, where: Mapping[str, str], key: str) -> pd.DataFrame:
    rows = raw
    for column, value in where.items():
        if column not in rows:
            raise TrialFault(f"{key}: where names {column!r}, which the table does not have")
        rows = rows[rows[column].astype(str).eq(value)]
    if rows.empty:
        raise TrialFault(f"{key}: no rows" + (f" where {dict(where)}" if where else " of this study"))
    return rows


def _baseline(baseline: Baseline, rows: pd.DataFrame, raw: pd.DataFrame, melted: pd.DataFrame, outcome: Outcome) -> np.ndarray:
    keys = ["participant", *baseline.by]
    if baseline.column:
        before = rows[[*keys, baseline.column]].rename(columns={baseline.column: "baseline"}).assign(item=outcome.items[0])
    else:
        earlier = raw
        for column, value in baseline.where.items():
            earlier = earlier[earlier[column].astype(str).eq(value)]
        before = earlier[[*keys, *outcome.items]].melt(id_vars=keys, value_vars=list(outcome.items), var_name="item", value_name="baseline")
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


def _estimable(frame: pd.DataFrame, outcome: Outcome, key: str) -> None:
    if frame["participant"].nunique() < FEWEST_PARTICIPANTS:
        raise TrialFault(f"{key}: {frame['participant'].nunique()} participants have values; at least {FEWEST_PARTICIPANTS} are needed")
    if frame["value"].nunique() == 1:
        raise TrialFault(f"{key}: every value is {frame['value'].iloc[0]:g}; a constant outcome has no effect to estimate")
    if frame["category"].nunique() < 2 or len(frame["level"].unique()) < 2:
        raise TrialFault(f"{key}: all rows are of one dose; there is nothing to compare")
    if outcome.model == "logit" and not set(frame["value"].unique()) <= {0.0, 1.0}:
        raise TrialFault(f"{key}: a logit outcome holds 0 and 1 only, found {sorted(set(frame['value'].unique()) - {0.0, 1.0})[:3]}")
