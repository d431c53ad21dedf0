"""Figures of a trial: what is drawn is what was estimated, and axes say what they measure."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from relseek_assets import trial_figures
from relseek_assets.study import load_study
from relseek_assets.trial import Trial


@pytest.fixture(scope="module")
def trial() -> Trial:
    found = load_study("kirk2025").trial
    assert found is not None
    return found


def test_a_specification_that_was_not_resampled_has_no_bootstrap_point(trial: Trial) -> None:
    resampled = np.array([False, True, False])
    rows = pd.DataFrame({"specification": ["additive", "full", "full + demographics"], "estimate": [1.0, 2.0, 3.0]})
    rows = rows.assign(study="longitudinal", outcome="tool_friend", form="cubic", term="RS: Avg(Pos) - Avg(Neg)")
    rows = rows.assign(lower=rows["estimate"] - 1, upper=rows["estimate"] + 1)
    rows = rows.assign(bootstrap_lower=np.where(resampled, 1.2, np.nan), bootstrap_upper=np.where(resampled, 2.9, np.nan))
    (axes,) = trial_figures.multiverses(rows, trial).axes
    model, bootstrap = axes.containers
    assert model[0].get_xdata().tolist() == [1.0, 2.0, 3.0]
    assert bootstrap[0].get_xdata().tolist() == [2.0]
    assert round(float(bootstrap[0].get_ydata()[0])) == 1  # in the row of its specification


@pytest.mark.parametrize(("outcome", "unit", "times"), [("tool_friend", "week", range(1, 5)), ("likeability", "session", range(1, 21))])
def test_trajectories_are_over_the_time_of_their_design_in_whole_numbers(trial: Trial, outcome: str, unit: str, times: range) -> None:
    ends = pd.DataFrame([(dose, time, "model") for dose in (-1.0, 1.0) for time in (times[0], times[-1])], columns=["dose", "time", "kind"])
    means = pd.DataFrame([(dose, time, "raw") for dose in (-1.0, 1.0) for time in times], columns=["dose", "time", "kind"])
    rows = pd.concat([ends, means]).assign(study="longitudinal", outcome=outcome, lower=40.0, upper=60.0, estimate=50.0)
    (axes,) = trial_figures.trajectory_panels(rows.astype({"time": float}), trial).axes
    assert axes.get_xlabel() == unit
    assert all(float(tick).is_integer() for tick in axes.get_xticks())
