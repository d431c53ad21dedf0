"""Intervals that hold the truth in 95 of 100 trials, and tests that err in 5 of 100, over thousands of simulated trials of each kind of model.

Every trial goes through the rows, fits and contrasts of users. The people of a kind are drawn once and answer anew in each replicate, because
intervals are conditional on the design; so the design is made once, and a replicate costs a fit.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
import pandas as pd
import pytest

from relseek_assets.trials import formulas, models
from relseek_assets.trials.contrasts import ReferenceGrid
from relseek_assets.trials.exact import binomial_interval
from relseek_assets.trials.frames import OutcomeFrame
from relseek_assets.trials.models import MixedModelFit
from relseek_assets.trials.simulation import Effects, Simulation, simulate
from tests.trials.declared import analysed, frame_of, trial, value

pytestmark = pytest.mark.slow

EFFECT = "RS: Avg(Pos) - Avg(Neg)"
LOW, HIGH = (-1.0, -0.5), (0.5, 1.0)


@dataclass(frozen=True)
class Kind:
    """One kind of model: what is simulated, how often, and which contrast has the truth zero there."""

    outcome: str
    participants: int
    replicates: int
    effects: Effects
    null: str = "RS × Topic: Interaction"
    theta: tuple[float, ...] | None = None  # of the truth; a search that begins there ends sooner and at the same optimum


KINDS = {
    "least squares": Kind("trust", 40, 5000, Effects(50, dose=(3.0,), factors={"topic": 4.0}, residual_sd=8)),
    # Wald intervals of a logit hold as the sample grows: with 400 people and probabilities of 0.3 to 0.8 they are exact to half a per cent.
    "logit": Kind("stayed", 400, 5000, Effects(0.2, dose=(0.5,), factors={"topic": 0.4, "voice": -0.3})),
    "mixed, pooled items": Kind("warmth", 24, 5000, Effects(50, dose=(3.0,), items=(0.0, 5.0), intercept_sd=6, residual_sd=5), theta=(1.2,)),
    "mixed, slopes and dropout": Kind(
        "mood",
        24,
        1000,
        Effects(50, dose=(3.0,), time=1.0, time_factors={"topic": 1.0}, intercept_sd=6, slope_sd=2, correlation=-0.3, residual_sd=4, dropout=0.1),
        null="Relationship-Seeking × Time: Δ (S4 - S1)",
        theta=(1.5, -0.15, 0.477),
    ),
}


def simulated(kind: Kind) -> tuple[Simulation, OutcomeFrame]:
    declared, key = trial(), f"main:{kind.outcome}"
    simulation = simulate(declared, key, kind.effects, kind.participants, seed=20)
    return simulation, frame_of(declared, key, simulation.tables)


def contrast_rows(frame: OutcomeFrame, null: str) -> np.ndarray:
    """The rows of the effect of the dose and of the contrast that has the truth zero, checked against those of the table that users see."""
    _, fits, table = analysed(frame)
    grid = ReferenceGrid(frame, fits["full_continuous"], coarsened=False)

    def effect(**at: object) -> np.ndarray:
        return grid.mean(HIGH, **at) - grid.mean(LOW, **at)

    start, end = ({"time": 1}, {"time": 4}) if frame.timed else ({"topic": "sport"}, {"topic": "music"})
    L = np.array([effect(), effect(**end) - effect(**start)])
    found = fits["full_continuous"].contrast(L)
    np.testing.assert_allclose(found["estimate"], [value(table, EFFECT), value(table, null)], rtol=1e-9)
    return L


@dataclass(frozen=True)
class Counts:
    """In how many replicates the interval held the effect, a normal interval would have, and the test rejected what is zero."""

    covered: int
    covered_by_normal: int
    rejected: int


@cache
def counts(name: str) -> Counts:
    kind = KINDS[name]
    simulation, frame = simulated(kind)
    L, terms = contrast_rows(frame, kind.null), formulas.fixed_terms(frame, "linear", full=True, heterogeneous=False)
    true, zero = value(simulation.truth, EFFECT, column="truth"), value(simulation.truth, kind.null, column="truth")
    assert true != 0 and zero == 0
    start = None if kind.theta is None else np.array(kind.theta)
    rows = []
    for answers in simulation.answers(kind.replicates, seed=21).T:
        frame.rows["value"] = answers
        fit = models.fit(frame, terms, start=start)
        plain = np.sqrt(L[0] @ fit.result.covariance @ L[0]) if isinstance(fit, MixedModelFit) else np.nan
        rows.append([*fit.contrast(L).to_numpy().ravel(), plain])
    table = pd.DataFrame(rows, columns=[*models.ESTIMATES, *(f"{name} of the null" for name in models.ESTIMATES), "plain"])
    estimate, lower, upper, p, se = (table[name].to_numpy() for name in ("estimate", "lower", "upper", "p of the null", "plain"))
    return Counts(int(((lower <= true) & (true <= upper)).sum()), int((np.abs(estimate - true) < 1.959964 * se).sum()), int((p < 0.05).sum()))


def interval(count: int, name: str) -> tuple[float, float]:
    return binomial_interval(count, KINDS[name].replicates, 1 - 0.05 / len(KINDS))


@pytest.mark.parametrize("name", KINDS)
def test_intervals_hold_the_truth_and_tests_reject_it_as_often_as_they_say(name: str) -> None:
    found = counts(name)
    coverage, errors = interval(found.covered, name), interval(found.rejected, name)
    assert coverage[0] <= 0.95 <= coverage[1]
    assert errors[0] <= 0.05 <= errors[1]


def test_of_few_people_normal_intervals_would_hold_the_truth_too_seldom() -> None:
    """What Kenward-Roger is for, and that the test above can tell."""
    name = "mixed, pooled items"
    assert interval(counts(name).covered_by_normal, name)[1] < 0.95
