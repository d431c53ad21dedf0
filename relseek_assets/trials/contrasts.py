"""Contrasts of estimated marginal means as linear maps of a model's coefficients (spec/human_study.md, section 3).

A marginal mean gives equal weight to the levels of factors and items and sets numbers to the mean of the analysed rows; the dose is
set by each contrast, and its powers follow. Here belong the contrasts and their labels; what a model answers belongs in `models.py`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import pandas as pd

from relseek_assets.trial import Factor
from relseek_assets.trials.forms import Specification
from relseek_assets.trials.formulas import fixed_terms
from relseek_assets.trials.frames import HIGH, LOW, OutcomeFrame
from relseek_assets.trials.models import ESTIMATES, Fit, grid_rows

PRIMARY, COARSENED, NARROW, FULL = "primary", "coarsened", "narrow", "full"
POWERS = (("dose", "{0} (linear)"), ("I(dose ** 2)", "{0}² (quadratic)"), ("I(dose ** 3)", "{0}³ (cubic)"))


@dataclass(frozen=True)
class Contrast:
    """One linear map of the coefficients of one model."""

    test_type: str
    label: str
    variant: str
    weights: np.ndarray


def specifications(frame: OutcomeFrame, specification: Specification) -> dict[str, list[str]]:
    """The six models of an outcome: additive and full, by the polynomial, by category and by level of the dose; name -> fixed terms."""
    forms = {"continuous": specification.form, "coarsened": "coarsened", "levels": "levels"}
    return {
        f"{'full' if full else 'additive'}_{name}": fixed_terms(frame, form, full=full, heterogeneous=specification.heterogeneous)
        for full in (False, True)
        for name, form in forms.items()
    }


@lru_cache(maxsize=64)
def _reference_grids(frame: OutcomeFrame, doses: tuple[float, ...]) -> dict[bool, tuple[pd.DataFrame, np.ndarray]]:
    """Every combination of dose point, factor level, item and time, and its rows of the design space: by dose (False) and by category (True)."""
    rows = frame.rows
    shared: dict[str, Sequence[object]] = {factor.column: list(factor.levels) for factor in frame.factors}
    if frame.pooled:
        shared["item"] = list(rows["item"].cat.categories)
    if frame.timed:
        shared["time"] = list(map(float, frame.endpoints))
    points = list(dict.fromkeys([*(doses or frame.doses), float(rows["dose"].mean())]))  # a mean that is a dose must not count twice
    grids = [_combinations({"dose": points, **shared}), _combinations({"category": list(rows["category"].cat.categories), **shared})]
    found = grid_rows(frame, pd.concat(grids, ignore_index=True))  # one call for both: most of what a call takes does not depend on its rows
    return {bool(place): (grid, part) for place, (grid, part) in enumerate(zip(grids, np.split(found, [len(grids[0])]), strict=True))}


def _combinations(axes: Mapping[str, Sequence[object]]) -> pd.DataFrame:
    return pd.DataFrame(list(itertools.product(*axes.values())), columns=list(axes))


class ReferenceGrid:
    """Rows of a model's design at every reference point, averaged at will. Time enters linearly, so that its two ends give every other."""

    def __init__(self, frame: OutcomeFrame, fit: Fit, *, coarsened: bool, doses: tuple[float, ...] = (), analysed: np.ndarray | None = None) -> None:
        points, rows = _reference_grids(frame, doses)[coarsened]
        self._points = {str(name): values.to_numpy() for name, values in points.items()}
        self._rows = fit.design.rows(rows)
        self._coarsened = coarsened
        self._mean_dose = float(frame.rows["dose"].mean())
        self._ends = tuple(map(float, frame.endpoints)) if frame.timed else None
        times = frame.rows["time"] if frame.timed else None
        self._mean_time = None if times is None else float((times if analysed is None else times[analysed]).mean())

    def mean(self, dose: object = None, **at: object) -> np.ndarray:
        """The row of a marginal mean.

        Args:
            dose: a dose, several to average over, or a category; None is the mean dose, or the average over categories.
            at: levels of factors, or `time`; None is the average over levels, or the mean time of the rows analysed.
        """
        chosen = np.ones(len(self._rows), dtype=bool)
        if self._coarsened:
            if dose is not None:
                chosen &= self._points["category"] == dose
        else:
            wanted = self._mean_dose if dose is None else dose
            chosen &= np.isin(self._points["dose"], np.atleast_1d(np.asarray(wanted, dtype=float)))
        for name, level in at.items():
            if level is not None and name != "time":
                chosen &= self._points[name] == level
        if self._ends is None:
            return self._rows[chosen].mean(axis=0)
        time = at.get("time")
        first, last = (self._rows[chosen & (self._points["time"] == end)].mean(axis=0) for end in self._ends)
        moment = self._mean_time if time is None else float(str(time))
        assert moment is not None
        return first + (last - first) * (moment - self._ends[0]) / (self._ends[1] - self._ends[0])


def _variants(frame: OutcomeFrame) -> dict[str, tuple[object, object]]:
    """Variant -> (low, high) of the dose contrast."""
    dose = frame.trial.dose
    low = tuple(value for value in dose.low_doses if value in frame.doses)
    high = tuple(value for value in dose.high_doses if value in frame.doses)
    return {PRIMARY: (low, high), COARSENED: (LOW, HIGH), NARROW: ((max(low),), (min(high),)), FULL: ((min(low),), (max(high),))}


def contrasts(frame: OutcomeFrame, fits: Mapping[str, Fit]) -> pd.DataFrame:
    """Every contrast that the design of an outcome allows, estimated.

    Args:
        fits: by the names of `specifications`; `full_continuous`, `full_coarsened` and `additive_continuous` are read.

    Returns:
        test_type, contrast, variant, model, estimate, se, df, statistic, p, lower, upper.
    """
    found = []
    for coarsened, name in ((False, "full_continuous"), (True, "full_coarsened")):
        fit = fits[name]
        grid = ReferenceGrid(frame, fit, coarsened=coarsened)
        declared = list(_declared(frame, grid, coarsened))
        if declared:
            table = fit.contrast(np.array([contrast.weights for contrast in declared]))
            found.append(_labelled(declared, table, name))
    additive = fits["additive_continuous"]
    found.append(_coefficients(frame, additive, "dose_response", "additive_continuous", _dose_labels(frame), profile=True))
    if frame.timed:
        found.append(_coefficients(frame, fits["full_continuous"], "temporal_coefficient", "full_continuous", _time_labels(frame)))
    return pd.concat(found, ignore_index=True)


def _labelled(declared: Sequence[Contrast], table: pd.DataFrame, model: str) -> pd.DataFrame:
    head = pd.DataFrame(
        {
            "test_type": [contrast.test_type for contrast in declared],
            "contrast": [contrast.label for contrast in declared],
            "variant": [contrast.variant for contrast in declared],
            "model": model,
        }
    )
    return pd.concat([head, table[list(ESTIMATES)].reset_index(drop=True)], axis=1)


def _dose_labels(frame: OutcomeFrame) -> dict[str, str]:
    return {term: "Polynomial: " + label.format(frame.trial.dose.symbol) for term, label in POWERS}


def _time_labels(frame: OutcomeFrame) -> dict[str, str]:
    labels = {"time": "Coefficient: Time", "dose:time": f"Coefficient: {frame.trial.dose.long_label} × Time"}
    for factor in frame.factors:
        labels[f"{factor.column}[T.{factor.levels[1]}]:time"] = f"Coefficient: {factor.label} × Time"
    return labels


def _coefficients(frame: OutcomeFrame, fit: Fit, test_type: str, model: str, labels: Mapping[str, str], *, profile: bool = False) -> pd.DataFrame:
    table = fit.coefficient_table(profile)
    terms = [term for term in labels if term in table.index]
    head = pd.DataFrame({"test_type": test_type, "contrast": [labels[term] for term in terms], "variant": PRIMARY, "model": model})
    return pd.concat([head, table.loc[terms, list(ESTIMATES)].reset_index(drop=True)], axis=1)


def _declared(frame: OutcomeFrame, grid: ReferenceGrid, coarsened: bool) -> Iterator[Contrast]:
    dose, variants = frame.trial.dose, _variants(frame)
    main = COARSENED if coarsened else PRIMARY
    mine = {name: ends for name, ends in variants.items() if (name == COARSENED) == coarsened}
    low, high = variants[main]

    def effect(**at: object) -> np.ndarray:
        return grid.mean(high, **at) - grid.mean(low, **at)

    for variant, (bottom, top) in mine.items():
        yield Contrast(f"main_effect_{dose.label}", dose.contrast, variant, grid.mean(top) - grid.mean(bottom))
    for factor in frame.factors:
        first, second = factor.levels
        difference = grid.mean(**{factor.column: second}) - grid.mean(**{factor.column: first})
        yield Contrast(f"main_effect_{factor.test_code}", f"{factor.label}: {_bracketed(second)} - {_bracketed(first)}", main, difference)
        moderation = effect(**{factor.column: second}) - effect(**{factor.column: first})
        yield Contrast("moderation", f"{dose.label} × {factor.label}: Interaction", main, moderation)
        if not coarsened:
            for level in factor.levels:
                yield Contrast("simple_effect", f"{dose.label} at {factor.label} = {level}", main, effect(**{factor.column: level}))
    if frame.timed:
        yield from _temporal(frame, grid, coarsened, effect)
        yield from _slopes(frame, grid, coarsened, mine, main)


def _temporal(frame: OutcomeFrame, grid: ReferenceGrid, coarsened: bool, effect) -> Iterator[Contrast]:  # type: ignore[no-untyped-def]
    main = COARSENED if coarsened else PRIMARY
    start, end = frame.endpoints
    change = f"S{end} - S{start}"
    yield Contrast("temporal_main", f"Time: {change}", main, grid.mean(time=end) - grid.mean(time=start))
    effects = {frame.trial.dose.long_label: effect}
    for factor in frame.factors:

        def difference(time: object, column: str = factor.column, levels: tuple[str, str] = factor.levels) -> np.ndarray:
            return grid.mean(**{column: levels[1], "time": time}) - grid.mean(**{column: levels[0], "time": time})

        effects[factor.label] = difference
    for label, of in effects.items():
        yield Contrast("temporal_interaction", f"{label} × Time: Δ ({change})", main, of(time=end) - of(time=start))
        if not coarsened:
            for time in (start, end):
                yield Contrast("temporal_simple", f"{label} at S{time}", main, of(time=time))


def _slopes(
    frame: OutcomeFrame, grid: ReferenceGrid, coarsened: bool, variants: Mapping[str, tuple[object, object]], main: str
) -> Iterator[Contrast]:
    """Change for each unit of time at ends of the dose and levels of the factors, in every crossing."""
    start, end = frame.endpoints
    names_of_ends = [f"{end}_{frame.trial.dose.symbol}" for end in frame.trial.dose.ends]

    def slope(dose: object, at: Mapping[str, object]) -> np.ndarray:
        return (grid.mean(dose, time=end, **at) - grid.mean(dose, time=start, **at)) / (end - start)

    short = [name for factor in frame.factors for name in factor.short_levels]

    def name_of(factor: Factor, place: int) -> str:
        name = factor.short_levels[place]
        return name if short.count(name) == 1 else f"{factor.label} {name}"

    for size in range(len(frame.factors) + 1):
        for crossed in itertools.combinations(frame.factors, size):
            for places in itertools.product((0, 1), repeat=size):
                at = {factor.column: factor.levels[place] for factor, place in zip(crossed, places, strict=True)}
                names = [name_of(factor, place) for factor, place in zip(crossed, places, strict=True)]
                if size:
                    yield Contrast("temporal_slope", f"Slope: {' × '.join(names)}", main, slope(None, at))
                for variant, ends in variants.items():
                    for name, dose in zip(names_of_ends, ends, strict=True):
                        yield Contrast("temporal_slope", f"Slope: {' × '.join([name, *names])}", variant, slope(dose, at))


def _bracketed(level: str) -> str:
    """A level as it stands in a difference: in brackets where it holds a minus sign itself."""
    return f"({level})" if "-" in level else level
