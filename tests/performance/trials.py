"""All assets of the published trials from raw files to figures within a limit of time, and how estimation grows with the number of participants."""

from __future__ import annotations

import math
import os
import shutil
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from relseek_assets.study import load_study
from relseek_assets.trial import Trial
from relseek_assets.trials import estimates, raw
from relseek_assets.trials.frames import outcome_frame
from tests.performance.comparison import Comparison, machine, seconds

STUDY = "kirk2025"
LIMIT = 45.0  # seconds on two cores
MANY, GROWTH = 10, 12.0  # times the participants, and times the seconds that they may take
HOME = Path(__file__).parents[2] / "dagster_home"
#: One outcome of each kind: pooled and timed, timed, with a baseline, and a logit.
KEYS = (
    "longitudinal:reliance",
    "longitudinal:separation_distress",
    "longitudinal:seeking_companionship_likelihood",
    "longitudinal:goodbye_action",
)


def comparisons() -> list[Comparison]:
    """None where there is no release to measure on."""
    if "RELSEEK_RELEASE" not in os.environ:
        print("trials: left out, because RELSEEK_RELEASE is not set")
        return []
    return [_limited("trials", whole_study(), LIMIT, "s"), _limited("trials, 10 x participants", growth(), GROWTH, "x the seconds")]


def _limited(name: str, measured: float, limit: float, unit: str) -> Comparison:
    """A figure against a limit: one measurement, so that its interval is open."""
    return Comparison(name, measured, limit, limit / measured, 0.0, math.inf, 1, unit, 1.0, machine())


def whole_study() -> float:
    """Seconds of every asset in a home of its own; prints what Dagster takes before the first of them."""
    with tempfile.TemporaryDirectory() as folder:
        begin = time.perf_counter()
        workspace = started(Path(folder))
        print(f"trials: imports, instance and observation of the files took {time.perf_counter() - begin:.1f} s before the first asset")
        # stage 8 and its report; the study's published vectors are another stage's
        stage_8 = [name for name, asset in workspace.catalogue.items() if set(asset.definition.group_names_by_key.values()) == {"trials"}]
        return seconds(lambda: workspace.run([*stage_8, "trial_report"]))


def started(home: Path) -> Any:
    """The study on a new Dagster instance, its files observed and nothing computed."""
    import dagster as dg

    from relseek_assets.planning import Workspace
    from relseek_assets.stage import Store

    shutil.copy(HOME / "dagster.yaml", home)
    workspace = Workspace(load_study(STUDY), dg.DagsterInstance.from_config(str(home)), store=Store(root=str(home / "store")))
    workspace.observe()
    return workspace


def growth() -> float:
    """Seconds of estimation with every participant ten times over those with each once."""
    study = load_study(STUDY)
    trial = study.trial
    assert trial is not None
    names = {name for key in KEYS for name in trial.tables_of(key)}
    tables = {name: raw.read_table(trial, name, raw.raw_path(trial, name, study.path)) for name in names}
    many = {name: repeated(table, MANY) for name, table in tables.items()}
    estimated(trial, tables)
    return seconds(lambda: estimated(trial, many)) / seconds(lambda: estimated(trial, tables))


def repeated(table: pd.DataFrame, times: int) -> pd.DataFrame:
    return pd.concat([table.assign(participant=table["participant"] + f"~{copy}") for copy in range(times)], ignore_index=True)


def estimated(trial: Trial, tables: Mapping[str, pd.DataFrame]) -> None:
    """Every estimate of the outcomes, one after the other in this process."""
    for key in KEYS:
        frame = outcome_frame(trial, key, tables)
        specification = estimates.specification_of(estimates.forms_table(frame))
        fits = estimates.fit_all(frame, specification)
        thetas = estimates.thetas_of(estimates.fits_table(frame, specification, fits))
        estimates.contrasts_table(frame, fits)
        estimates.dose_response_curve(frame, fits["additive_continuous"])
        if frame.timed:
            estimates.trajectories(frame, fits["full_continuous"])
        estimates.robustness_table(frame, specification, np.ones(len(frame.rows)), trial.bootstrap.draws, 1, thetas)
