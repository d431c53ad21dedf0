"""Trials whose truth is known: tables of any declared trial drawn from stated effects, and what contrasts of them should find.

Here belong randomisation, answers and the truth in closed form. Estimation does not: the truth must share no code with what is tested.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

import numpy as np
import pandas as pd
from scipy import special

from relseek_assets.trial import Baseline, Design, Trial
from relseek_assets.trials.raw import TrialFault


@dataclass(frozen=True)
class Effects:
    """What an outcome follows, in its own unit, or in log-odds where it is a logit.

    dose: coefficients of the dose, its square and its cube. factors: column -> effect of its second level. moderation: column -> how much
    steeper the dose is there. items: how far each lies from the first. time: for each unit; time_dose and time_factors: how much more of it
    for each unit of dose, and at the second level. baseline: for each standard deviation of it. Standard deviations: of participants'
    intercepts, of their slopes over time, and of what is left. dropout: the chance to leave before each time but the first, or to give no
    answer to an outcome that is measured once.
    """

    intercept: float = 0.0
    dose: tuple[float, ...] = ()
    factors: Mapping[str, float] = field(default_factory=dict)
    moderation: Mapping[str, float] = field(default_factory=dict)
    items: tuple[float, ...] = ()
    time: float = 0.0
    time_dose: float = 0.0
    time_factors: Mapping[str, float] = field(default_factory=dict)
    baseline: float = 0.0
    intercept_sd: float = 0.0
    slope_sd: float = 0.0
    correlation: float = 0.0
    residual_sd: float = 1.0
    dropout: float = 0.0

    def of_dose(self, dose: np.ndarray | float) -> np.ndarray | float:
        return sum((coefficient * dose**power for power, coefficient in enumerate(self.dose, 1)), start=0.0 * dose)


@dataclass(frozen=True, eq=False)
class Simulation:
    """A trial drawn once, and its answers as often as wanted.

    tables: raw tables as `raw.read_table` returns them. truth: test_type, contrast, variant, truth; of the contrasts of a model that has
    the right polynomial. expected, person, time: one entry an answer; expected is without what differs between participants.
    """

    tables: dict[str, pd.DataFrame]
    truth: pd.DataFrame
    expected: np.ndarray
    effects: Effects
    logit: bool
    person: np.ndarray
    time: np.ndarray

    def answers(self, replicates: int, seed: int) -> np.ndarray:
        """Answers of the same people to the same items, answers x replicates; item after item, as `frames.outcome_frame` has its rows."""
        draw = np.random.default_rng([seed, 1])  # another stream than that of the randomisation
        if self.logit:
            return (draw.random((len(self.expected), replicates)) < special.expit(self.expected)[:, None]).astype(float)
        one, other = draw.standard_normal((2, int(self.person.max()) + 1, replicates))
        effects = self.effects
        slopes = effects.slope_sd * (effects.correlation * one + np.sqrt(1 - effects.correlation**2) * other)
        noise = effects.residual_sd * draw.standard_normal((len(self.expected), replicates))
        return self.expected[:, None] + effects.intercept_sd * one[self.person] + slopes[self.person] * self.time[:, None] + noise


def simulate(trial: Trial, key: str, effects: Effects, participants: int, *, seed: int) -> Simulation:
    """Draw the tables that the partition `study:outcome` is estimated from.

    Participants are randomised in blocks over the arms and factors; times run from the first to the last of the design's endpoints.

    Raises:
        TrialFault: a logit with random effects, whose marginal contrasts have no closed form.
    """
    study, outcome, design = trial.of_key(key)
    if outcome.model == "logit" and (effects.intercept_sd or effects.slope_sd):
        raise TrialFault(f"{key}: a simulated logit has no random effects; set intercept_sd and slope_sd to zero")
    draw = np.random.default_rng(seed)
    people = _randomised(trial, design, participants, draw).assign(study=study)
    person, time = _visits(design, participants, effects.dropout, draw)
    rows = people.iloc[person].reset_index(drop=True)
    if design.time:
        rows[design.time] = time
    for column, value in design.where.items():
        rows[column] = value
    items = len(outcome.items)
    before = draw.standard_normal((len(rows), items)) if design.baseline else np.zeros((len(rows), items))
    common = effects.intercept + _of_arm(trial, effects, rows, time)
    shifts = np.resize(effects.items, items) if effects.items else np.zeros(items)
    expected = (common[:, None] + shifts + effects.baseline * before).ravel(order="F")
    truth = _truth(trial, key, effects, rows, time)
    found = Simulation(
        {}, truth, expected, effects, outcome.model == "logit", np.unique(np.tile(person, items), return_inverse=True)[1], np.tile(time, items)
    )
    rows[list(outcome.items)] = found.answers(1, seed)[:, 0].reshape(items, -1).T
    if design.baseline:
        rows = _with_baseline(design.baseline, rows, before, list(outcome.items))
    joined = trial.tables[outcome.table].arms == "joined"
    for name, table in {outcome.table: rows, **({trial.arms_table: people} if joined else {})}.items():
        found.tables[name] = _shaped(trial, name, table)
    return found


def raw_rows(trial: Trial, name: str, table: pd.DataFrame) -> pd.DataFrame:
    """A table of `simulate` as a raw file has it: the declared column names, arms, studies and times with their prefix."""
    found = table.rename(columns={"participant": trial.participant, "dose": trial.dose.column})
    if trial.study.column:
        found = found.rename(columns={"study": trial.study.column})
        found[trial.study.column] = found[trial.study.column].map(trial.study.values)
    else:
        found = found.drop(columns="study")
    if isinstance(trial.dose.values, dict) and "dose" in table:
        arms = {dose: arm for arm, dose in trial.dose.values.items()}
        found[trial.dose.column] = found[trial.dose.column].map(arms)
    prefixes = dict(trial.times) | {column: group.prefix for group in trial.tables[name].columns if group.kind == "time" for column in group.names}
    for column, prefix in prefixes.items():
        found[column] = [None if pd.isna(value) else f"{prefix}{value}" for value in found[column]]
    return found


def _randomised(trial: Trial, design: Design, participants: int, draw: np.random.Generator) -> pd.DataFrame:
    """participant, dose and factors: every block has each cell once, in an order of its own."""
    levels = [[design.where[factor.column]] if factor.column in design.where else list(factor.levels) for factor in trial.factors]
    cells = pd.DataFrame(list(itertools.product(trial.dose.doses, *levels)), columns=["dose", *(factor.column for factor in trial.factors)])
    blocks = -(-participants // len(cells))
    order = np.concatenate([draw.permutation(len(cells)) for _ in range(blocks)])[:participants]
    people = cells.iloc[order].reset_index(drop=True)
    people.insert(0, "participant", [f"p{number:05d}" for number in range(participants)])
    return people


def _visits(design: Design, participants: int, dropout: float, draw: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """(whose, when) of every visit; the time is zero where there is none."""
    if design.endpoints is None:
        there = np.flatnonzero(draw.random(participants) >= dropout)
        return there, np.zeros(len(there))
    times = np.arange(design.endpoints[0], design.endpoints[1] + 1)
    stays = np.cumprod(draw.random((participants, len(times))) >= np.r_[0.0, np.full(len(times) - 1, dropout)], axis=1).astype(bool)
    person, place = np.nonzero(stays)
    return person, times[place].astype(float)


def _of_arm(trial: Trial, effects: Effects, rows: pd.DataFrame, time: np.ndarray) -> np.ndarray:
    dose = rows["dose"].to_numpy(float)
    found = effects.of_dose(dose) + time * (effects.time + effects.time_dose * dose)
    for factor in trial.factors:
        name = factor.column
        more = effects.factors.get(name, 0.0) + effects.moderation.get(name, 0.0) * dose + effects.time_factors.get(name, 0.0) * time
        found = found + rows[name].eq(factor.levels[1]).to_numpy(float) * more
    return np.asarray(found)


def _with_baseline(baseline: Baseline, rows: pd.DataFrame, before: np.ndarray, items: list[str]) -> pd.DataFrame:
    """The rows with the column that holds the baseline, or with rows of another time point before them."""
    if baseline.column:
        return rows.assign(**{baseline.column: before[:, 0]})
    earlier = rows.assign(**{item: before[:, place] for place, item in enumerate(items)}, **baseline.where)
    return pd.concat([earlier, rows], ignore_index=True)


def _shaped(trial: Trial, name: str, table: pd.DataFrame) -> pd.DataFrame:
    """The columns of the declared table in their types; those that were not drawn are empty."""
    found = pd.DataFrame(index=pd.RangeIndex(len(table)))
    for column in trial.table_schema(name).columns:
        values = table[column.name].to_numpy() if column.name in table else [None] * len(table)
        found[column.name] = pd.Series(values, dtype={"integer": "Int64", "number": float}.get(column.kind, object))
    return found


def _truth(trial: Trial, key: str, effects: Effects, rows: pd.DataFrame, time: np.ndarray) -> pd.DataFrame:
    """Differences of marginal means: factors at equal weights, time and dose at the mean of the rows drawn where a contrast leaves them open."""
    _, _, design = trial.of_key(key)
    settings, mean_dose, mean_time = trial.dose, float(rows["dose"].mean()), float(time.mean())
    factors = [factor for factor in trial.factors if factor.column not in design.where]
    low, high = settings.low_doses, settings.high_doses
    ranges = {"primary": (low, high), "narrow": ((max(low),), (min(high),)), "full": ((min(low),), (max(high),))}
    steeper = {factor.column: effects.moderation.get(factor.column, 0.0) for factor in factors}
    found: list[tuple[str, str, str, float]] = []

    def of_dose(variant: str = "primary", when: float = mean_time, at: Mapping[str, int] = MappingProxyType({})) -> float:
        """Effect of the dose; `at` are levels of factors, 0 or 1, and the mean over both where it has none."""
        bottom, top = (np.array(doses) for doses in ranges[variant])
        slope = effects.time_dose * when + sum(more * at.get(column, 0.5) for column, more in steeper.items())
        return float(np.mean(effects.of_dose(top)) - np.mean(effects.of_dose(bottom)) + slope * (top.mean() - bottom.mean()))

    apart = float(np.mean(high) - np.mean(low))
    found += [(f"main_effect_{settings.label}", settings.contrast, variant, of_dose(variant)) for variant in ranges]
    growth = {settings.long_label: effects.time_dose * apart}
    for factor in factors:
        first, second = (f"({level})" if "-" in level else level for level in factor.levels)
        growth[factor.label] = effects.time_factors.get(factor.column, 0.0)
        difference = effects.factors.get(factor.column, 0.0) + steeper[factor.column] * mean_dose + growth[factor.label] * mean_time
        found.append((f"main_effect_{factor.test_code}", f"{factor.label}: {second} - {first}", "primary", difference))
        found.append(("moderation", f"{settings.label} × {factor.label}: Interaction", "primary", steeper[factor.column] * apart))
        for place, level in enumerate(factor.levels):
            found.append(("simple_effect", f"{settings.label} at {factor.label} = {level}", "primary", of_dose(at={factor.column: place})))
    if design.endpoints:
        start, end = design.endpoints
        slope = effects.time + effects.time_dose * mean_dose + sum(growth[factor.label] / 2 for factor in factors)
        found.append(("temporal_main", f"Time: S{end} - S{start}", "primary", slope * (end - start)))
        found += [
            ("temporal_interaction", f"{label} × Time: Δ (S{end} - S{start})", "primary", more * (end - start)) for label, more in growth.items()
        ]
        found += [("temporal_simple", f"{settings.long_label} at S{when}", "primary", of_dose(when=when)) for when in (start, end)]
    return pd.DataFrame(found, columns=["test_type", "contrast", "variant", "truth"])
