"""A study whose vectors are trained by two processes: the same asset, heard while it runs, and ended with its run."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import dagster as dg
import numpy as np
import psutil
import pytest

from relseek_resources.storage import read_tensors

CHECKOUT = Path(__file__).parents[2]
PATIENCE = 240
COMPUTE = "\n[compute]\nlauncher = 'accelerate'\nprocesses = 2\npairs_at_once = 1\n"
RUN = ("run", "STUDY", "--select", "training_run")

pytestmark = pytest.mark.slow


def on_two_processes(platform: Any) -> Any:
    platform.study_file.write_text(platform.study_text() + COMPUTE)
    return platform


def training_events(platform: Any) -> list[dg.EventLogEntry]:
    """Everything that the run of `training_run` logged."""
    with dg.DagsterInstance.from_config(str(platform.home)) as instance:
        record = instance.fetch_materializations(dg.AssetKey(["tiny", "training_run"]), limit=1).records[0]
        return list(instance.all_logs(record.run_id))


def test_two_processes_make_the_asset_of_one_and_are_heard(blank: Any, finished_session: Any) -> None:
    done = on_two_processes(blank).process(*RUN)
    assert done.returncode == 0, done.stdout + done.stderr
    for site in ("m:L01", "m:L02"):
        arrays, header = read_tensors(blank.files / "training_run" / f"{site}.safetensors")
        expected, expected_header = read_tensors(finished_session.files / "training_run" / f"{site}.safetensors")
        assert set(header) == set(expected_header)
        for vector, other in zip(arrays["vectors"], expected["vectors"], strict=True):
            assert vector @ other / (np.linalg.norm(vector) * np.linalg.norm(other)) > 0.9999
            assert np.linalg.norm(vector) == pytest.approx(np.linalg.norm(other), rel=1e-3)
        assert arrays["losses"] == pytest.approx(expected["losses"], abs=1e-4)
        for row, other in zip(json.loads(header["evaluations"]), json.loads(expected_header["evaluations"]), strict=True):
            assert row == pytest.approx(other, abs=1e-4)
    assert not list((blank.files / "training_run").glob("*.launched")), "what passed between the processes is gone"

    events = training_events(blank)
    lines = [event.user_message for event in events]
    assert any("sharded over 2 processes" in line for line in lines)
    assert sum("held out at d = +1 and -1" in line for line in lines) == 6, "three epochs of two sites"
    made = [event.asset_materialization for event in events if event.asset_materialization is not None]
    assert sorted(str(one.partition) for one in made) == ["m:L01", "m:L02"]
    for one in made:
        assert one.metadata["processes"].value == 2
        assert one.metadata["training_seconds"].value > 0


def test_where_it_is_computed_makes_nothing_stale(finished: Any) -> None:
    on_two_processes(finished)
    with finished.workspace() as workspace:
        assert workspace.plan() == []


def test_an_error_of_a_rank_is_the_error_of_the_run(blank: Any) -> None:
    on_two_processes(blank)
    blank.edit("max_tokens = 150", "max_tokens = 16")
    done = blank.process(*RUN)
    assert done.returncode != 0
    said = done.stdout + done.stderr
    assert "failed" in said and "fits 16 tokens" in said and "log" in said


@pytest.mark.parametrize("ending", [signal.SIGINT, signal.SIGKILL])
def test_the_processes_end_with_their_run(blank: Any, ending: signal.Signals) -> None:
    on_two_processes(blank)
    blank.edit("epochs_trained = 3", "epochs_trained = 99")
    log = (blank.folder / "run.log").open("wb")
    command = [sys.executable, "-m", "relseek_assets.cli", "run", str(blank.study_file), "--select", "training_run"]
    process = subprocess.Popen(command, env=blank.environment(), cwd=CHECKOUT, stdout=log, stderr=log)
    limit = time.monotonic() + PATIENCE
    while not list(blank.files.glob("training_run/*.launched/L01/e01/vector.safetensors")):
        assert process.poll() is None and time.monotonic() < limit, (blank.folder / "run.log").read_text()[-3000:]
        time.sleep(0.2)
    started = psutil.Process(process.pid).children(recursive=True)
    assert len([one for one in started if "relseek_assets.vectors.launched" in one.cmdline()]) >= 3, "the launcher and its two ranks"
    process.send_signal(ending)
    process.wait(PATIENCE)
    _, alive = psutil.wait_procs(started, timeout=60)
    assert not alive
