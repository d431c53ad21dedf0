"""Exact tests of tables, exact intervals of shares, and adjustment for many tests.

Here belongs what is counted rather than modelled: the Fisher-Freeman-Halton test, the Clopper-Pearson interval, Benjamini-Hochberg.
Pearson's test, which is approximate, and the forming of families of tests do not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from scipy import special, stats

PARTIAL_TABLES = 6_000_000  # about half a gigabyte while they are sorted
RANDOM_TABLES = 100_000
# Tables whose probabilities differ by less than rounding error are equally likely; R's fisher.test has the same allowance.
TIE = 1e-7
# Cells are bounded so that what is left out is below this share of the observed table's own probability, hence of the p-value.
NEGLIGIBLE = 1e-10


class ContingencyError(ValueError):
    """A table or share to which no exact method applies."""


@dataclass(frozen=True)
class ExactTest:
    """p-value of a table; `se` is 0 where every table was counted and the Monte Carlo error of `p` otherwise."""

    p: float
    method: Literal["enumeration", "monte_carlo"]
    se: float
    n: int
    random_tables: int


def fisher_freeman_halton(table: Any, *, seed: int = 0) -> ExactTest:
    """Exact test of independence: the probability, margins fixed, of tables no likelier than this one.

    `table` is r x c counts; empty rows and columns are dropped. Enumeration meets in the middle: partial tables over one half of the
    rows are matched with those over the other half through their column sums, so 5 x 2 tables of thousands take milliseconds. Where
    a half has more than `PARTIAL_TABLES`, `RANDOM_TABLES` tables are drawn instead, with a generator seeded by `seed`.
    Raises ContingencyError for what is no table of counts with two rows and two columns. Source: human_study.md, section 10.
    """
    counts = _counts(table)
    halves = _halves(counts)
    if halves is None:
        return _monte_carlo(counts, seed)
    threshold = _log_weight(counts) + TIE
    mass = _mass_below(*halves, threshold)
    return ExactTest(float(min(1.0, mass)), "enumeration", 0.0, int(counts.sum()), 0)


def _counts(table: Any) -> np.ndarray:
    """The table without empty rows and columns, its columns the shorter side and the largest column last."""
    values = np.asarray(table, dtype=float)
    if values.ndim != 2 or not np.isfinite(values).all() or (values < 0).any() or (values != np.round(values)).any():
        raise ContingencyError(f"a contingency table holds whole counts in rows and columns, not {values.tolist()}")
    counts = values.astype(np.int64)
    counts = counts[counts.sum(1) > 0][:, counts.sum(0) > 0]
    if min(counts.shape) < 2:
        raise ContingencyError(f"after empty rows and columns are dropped the table is {counts.shape[0]} x {counts.shape[1]}: nothing to compare")
    if counts.shape[1] > counts.shape[0]:
        counts = counts.T
    return counts[:, np.argsort(counts.sum(0), kind="stable")]


def _log_factorial(counts: np.ndarray) -> np.ndarray:
    return special.gammaln(np.asarray(counts) + 1.0)


def _log_constant(counts: np.ndarray) -> float:
    margins = _log_factorial(counts.sum(0)).sum() + _log_factorial(counts.sum(1)).sum()
    return float(margins - _log_factorial(counts.sum()))


def _log_weight(counts: np.ndarray) -> float:
    """Log-probability of the table given its margins."""
    return float(_log_constant(counts) - _log_factorial(counts).sum())


def _cell_values(total: int, row: int, column: int, tail: float) -> np.ndarray:
    """Values of one cell outside of which its hypergeometric distribution has less than `tail` on either side."""
    values = np.arange(max(0, row + column - total), min(row, column) + 1)
    mass = np.exp(stats.hypergeom.logpmf(values, total, column, row))
    return values[(np.cumsum(mass) >= tail) & (np.cumsum(mass[::-1])[::-1] >= tail)]


def _rows_of(counts: np.ndarray, tail: float) -> list[np.ndarray] | None:
    """For every row, what its cells can hold, combinations x columns; None where a row alone has too many."""
    rows, columns, total = counts.sum(1), counts.sum(0), int(counts.sum())
    found = []
    for row in rows:
        cells = [_cell_values(total, int(row), int(column), tail) for column in columns]
        if np.prod([float(len(cell)) for cell in cells[:-1]]) > PARTIAL_TABLES:
            return None
        free = np.stack(np.meshgrid(*cells[:-1], indexing="ij"), -1).reshape(-1, len(columns) - 1)
        last = row - free.sum(1)
        keep = (last >= cells[-1][0]) & (last <= cells[-1][-1])
        found.append(np.column_stack([free, last])[keep])
    return found


def _halves(counts: np.ndarray) -> tuple[dict[int, np.ndarray], dict[int, np.ndarray]] | None:
    """Log-weights of the partial tables over either half of the rows, by the column sums that the first half takes up.

    The first half has the more tables and the constant of the margins; the second is in ascending order. None where there are too
    many partial tables.
    """
    tail = NEGLIGIBLE * float(np.exp(_log_weight(counts))) / counts.size
    options = _rows_of(counts, tail)
    if options is None:
        return None
    sides: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
    for row in sorted(options, key=len, reverse=True):
        sizes = [np.prod([float(len(other)) for other in side]) for side in sides]
        sides[int(sizes[1] < sizes[0])].append(row)
    columns = counts.sum(0)
    large, small = (_partial_tables(side, columns) for side in sides)
    if large is None or small is None:
        return None
    if len(large[1]) < len(small[1]):
        large, small = small, large
    radix = np.concatenate([[1], np.cumprod(columns[:-2] + 1)])
    first = _grouped(large[0] @ radix, large[1] + _log_constant(counts))
    second = _grouped((columns[:-1] - small[0]) @ radix, small[1])
    return first, {key: np.sort(group) for key, group in second.items()}


def _partial_tables(rows: Sequence[np.ndarray], columns: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """Sums of all columns but the last, and log-weights, of all tables made of `rows` within `columns`; None where there are too many."""
    sums, weights, total = np.zeros((1, len(columns) - 1), dtype=np.int64), np.zeros(1), 0
    for row in rows:
        if len(sums) * len(row) > PARTIAL_TABLES:
            return None
        total += int(row[0].sum())
        sums = (sums[:, None, :] + row[None, :, :-1]).reshape(-1, len(columns) - 1)
        weights = (weights[:, None] - _log_factorial(row).sum(1)[None, :]).ravel()
        keep = (sums <= columns[:-1]).all(1) & (total - sums.sum(1) <= columns[-1])
        if not keep.all():
            sums, weights = sums[keep], weights[keep]
    return sums, weights


def _grouped(keys: np.ndarray, weights: np.ndarray) -> dict[int, np.ndarray]:
    """Weights by key."""
    order = np.argsort(keys, kind="stable")
    keys = keys[order]
    starts = np.flatnonzero(np.diff(keys, prepend=keys[0] - 1))
    return dict(zip(keys[starts].tolist(), np.split(weights[order], starts[1:]), strict=True))


def _mass_below(first: dict[int, np.ndarray], second: dict[int, np.ndarray], threshold: float) -> float:
    """Probability of all pairs of partial tables that fit together and whose log-weights add up to at most `threshold`."""
    mass = 0.0
    for key, weights in first.items():
        if (others := second.get(key)) is None:
            continue
        # Log-weights of one half alone may exceed the range of exp: the largest is taken out and given back.
        largest = others[-1]
        below = np.concatenate([[0.0], np.cumsum(np.exp(others - largest))])
        mass += float(np.exp(weights + largest) @ below[np.searchsorted(others, threshold - weights, side="right")])
    return mass


def _monte_carlo(counts: np.ndarray, seed: int) -> ExactTest:
    drawn = stats.random_table(counts.sum(1), counts.sum(0)).rvs(RANDOM_TABLES, random_state=np.random.default_rng(seed))
    weights = -_log_factorial(drawn).sum((1, 2))
    rarer = int((weights <= -_log_factorial(counts).sum() + TIE).sum())
    p = (1 + rarer) / (1 + RANDOM_TABLES)
    return ExactTest(p, "monte_carlo", float(np.sqrt(p * (1 - p) / RANDOM_TABLES)), int(counts.sum()), RANDOM_TABLES)


def benjamini_hochberg(p_values: Any) -> np.ndarray:
    """Adjusted p-values of one family, in the order given; a missing p counts as 1 (human_study.md, section 3)."""
    values = np.asarray(p_values, dtype=float)
    values = np.where(np.isnan(values), 1.0, values)
    if ((values < 0) | (values > 1)).any():
        raise ContingencyError(f"p-values lie between 0 and 1; these do not: {values[(values < 0) | (values > 1)].tolist()}")
    return stats.false_discovery_control(values, method="bh") if values.size else values


def binomial_interval(successes: int, n: int, level: float = 0.95) -> tuple[float, float]:
    """Clopper-Pearson interval of a share. Raises ContingencyError unless 0 <= successes <= n and n >= 1."""
    if not 0 <= successes <= n or n < 1:
        raise ContingencyError(f"{successes} successes out of {n} are no share: give 0 <= successes <= n with n at least 1")
    interval = stats.binomtest(int(successes), int(n)).proportion_ci(level, method="exact")
    return float(interval.low), float(interval.high)
