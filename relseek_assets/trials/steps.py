"""One outcome's step of a trial as a task that any process can do: rows and upstream tables in, a table and its figure out.

Here belongs what crosses between processes. What the steps compute belongs in `estimates.py`, what they record in `assets.py`.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pandas as pd

from relseek_assets import figures, trial_figures
from relseek_assets.trial import Trial
from relseek_assets.trials import estimates
from relseek_assets.trials.frames import OutcomeFrame
from relseek_assets.trials.models import Fit
from relseek_assets.trials.raw import FAULTS, said

CONTRASTED = ("full_continuous", "full_coarsened", "additive_continuous")

Tables = Mapping[str, pd.DataFrame]
Step = Callable[..., "Made"]


@dataclass(frozen=True)
class Made:
    """What a step made: a table, its figure as base64 PNG, or why there is nothing; and what the table leaves out."""

    table: pd.DataFrame | None = None
    figure: str = ""
    fault: str = ""
    left_out: str = ""


@dataclass(frozen=True)
class Task:
    """A step to do on an outcome's rows: an `OutcomeFrame`, pickled. `token` names them, so that a process that has them unpickles nothing and keeps
    the designs that it made of them.
    """

    step: Step
    token: tuple[Any, ...]
    frame: bytes
    upstream: Tables
    options: Mapping[str, Any] = field(default_factory=dict)


def forms(frame: OutcomeFrame, upstream: Tables) -> Made:
    return Made(estimates.forms_table(frame), left_out=f"{frame.unplaced} values whose rows have no arm" if frame.unplaced else "")


def fits(frame: OutcomeFrame, upstream: Tables) -> Made:
    specification = estimates.specification_of(upstream["trial_forms"])
    return Made(estimates.fits_table(frame, specification, estimates.fit_all(frame, specification)))


def contrasts(frame: OutcomeFrame, upstream: Tables) -> Made:
    return Made(estimates.contrasts_table(frame, {name: _again(frame, upstream, name) for name in CONTRASTED}))


def curve(frame: OutcomeFrame, upstream: Tables) -> Made:
    table = estimates.dose_response_curve(frame, _again(frame, upstream, "additive_continuous"))
    return Made(table, figures.png(trial_figures.dose_response(table, frame.trial)))


def trajectories(frame: OutcomeFrame, upstream: Tables) -> Made:
    if not frame.timed:
        return Made(fault="measured once")
    table = estimates.trajectories(frame, _again(frame, upstream, "full_continuous"))
    return Made(table, figures.png(trial_figures.trajectories(table, frame.trial)))


def robustness(frame: OutcomeFrame, upstream: Tables, *, weights: pd.Series | None, draws: int, seed: int) -> Made:
    of_rows = None if weights is None else frame.rows["participant"].map(weights).to_numpy(float)
    specification, thetas = estimates.specification_of(upstream["trial_forms"]), estimates.thetas_of(upstream["trial_fits"])
    return Made(estimates.robustness_table(frame, specification, of_rows, draws, seed, thetas))


def forest(trial: Trial, table: pd.DataFrame) -> str:
    """A family's forest plot as base64 PNG."""
    return figures.png(trial_figures.forest(table, trial))


def _again(frame: OutcomeFrame, upstream: Tables, name: str) -> Fit:
    """A model of `trial_fits` again, from the optimum that is on record."""
    thetas = estimates.thetas_of(upstream["trial_fits"])
    return estimates.fit_one(frame, estimates.specification_of(upstream["trial_forms"]), name, thetas.get(name))


_known: dict[Any, tuple[tuple[Any, ...], OutcomeFrame]] = {}  # by outcome, and whether with covariates: what its rows are made of, and they


def do(task: Task | Made) -> Made:
    """Do a task; a fault of the data is a result, because it harms no other outcome."""
    if isinstance(task, Made):
        return task
    place = (task.token[0], len(task.token))
    if (known := _known.get(place)) is None or known[0] != task.token:
        known = _known[place] = (task.token, pickle.loads(task.frame))
    frame = known[1]
    try:
        return task.step(frame, task.upstream, **task.options)
    except FAULTS as fault:
        return Made(fault=said(fault, frame.key))
