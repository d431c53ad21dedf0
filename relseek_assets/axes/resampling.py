"""Bootstrap of rows that share two things, as replies share a persona and a query: both are drawn, and a row counts as often as the two together.

Here belong draws and weighted statistics. What they are the statistics of belongs in `likeness.py`, `interventions.py` and `drift.py`.

Source: Owen 2007, "The pigeonhole bootstrap". Its intervals are somewhat too wide and never too narrow for crossed effects.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from relseek_resources.storage import keyed_seed

METHOD = "percentile, pigeonhole bootstrap over personas and prompts, {draws} draws"


def draws_of(owners: Sequence[str], draws: int, *seed: object) -> np.ndarray:
    """How often each row counts when the distinct owners are drawn with replacement, float64 (draws, rows)."""
    names, place = np.unique(np.asarray(owners, dtype=object).astype(str), return_inverse=True)
    generator = np.random.Generator(np.random.PCG64(keyed_seed(*seed, *names)))
    return generator.multinomial(len(names), np.full(len(names), 1 / len(names)), size=draws).astype(float)[:, place]


def crossed_draws(personas: Sequence[str], prompts: Sequence[str], draws: int, *seed: object, kinds: Sequence[str] | None = None) -> np.ndarray:
    """Counts of rows under the pigeonhole bootstrap, float64 (draws, rows); personas are drawn within their `kinds` where those are given."""
    inside = np.zeros(len(personas), dtype=object) if kinds is None else np.asarray(kinds, dtype=object)
    of_personas = np.empty((draws, len(personas)))
    for kind in dict.fromkeys(inside):
        rows = np.flatnonzero(inside == kind)
        of_personas[:, rows] = draws_of([personas[row] for row in rows], draws, *seed, "persona", kind)
    return of_personas * draws_of(prompts, draws, *seed, "prompt")


def weighted_means(values: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Mean of values (rows,) under each draw of counts (draws, rows); NaN where a draw holds none of the rows."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return (counts @ values) / counts.sum(axis=1)


def weighted_aucs(scores: np.ndarray, positive: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Area under the ROC curve under each draw, ties counting half.

    Args:
        scores: (rows,).
        positive: (rows,), truth.
        counts: (draws, rows).
    """
    order = np.argsort(scores, kind="stable")
    starts = np.flatnonzero(np.diff(scores[order], prepend=-np.inf))
    ups, downs = (np.add.reduceat(counts[:, order] * side[order], starts, axis=1) for side in (positive.astype(float), 1.0 - positive))
    below = np.cumsum(downs, axis=1) - downs
    with np.errstate(invalid="ignore", divide="ignore"):
        return (ups * (below + downs / 2)).sum(axis=1) / (ups.sum(axis=1) * downs.sum(axis=1))


def interval(found: np.ndarray) -> tuple[float | None, float | None]:
    """The central 95% of the draws in which the statistic exists; nothing where it exists in none."""
    finite = found[np.isfinite(found)]
    if not len(finite):
        return None, None
    low, high = np.percentile(finite, [2.5, 97.5])
    return float(low), float(high)
