"""A run killed with SIGKILL, five times over, ends like one left alone."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dagster as dg
import numpy as np
import pandas as pd
import pytest
from safetensors.numpy import load_file, save_file

from relseek_assets.exchange import read_asset
from relseek_assets.planning import PROCESS_TAG, process_tag
from relseek_resources.storage import tensors_version

PATIENCE = 240  # seconds until a moment must have come
CHECKOUT = Path(__file__).parents[2]

#: A write takes a millisecond, too short to be met from outside. These two let `relseek` end itself, by the same signal, in the
#: middle of one: when the temporary file is filled but not synced and moved, and when it is moved and no event says so.
WHILE_WRITING = """
real = os.fsync
def fsync(descriptor):
    path = os.readlink(f"/proc/self/fd/{descriptor}")
    if path.endswith(".tmp") and "/generation_metrics/" in path:
        os.truncate(path, os.path.getsize(path) // 2)
        os.kill(os.getpid(), signal.SIGKILL)
    real(descriptor)
os.fsync = fsync
"""
AFTER_PLACING = """
real = os.replace
def replace(source, target):
    real(source, target)
    if "/judge_scores/m:L01/e03@0_0" in str(target):
        os.kill(os.getpid(), signal.SIGKILL)
os.replace = replace
"""
LAUNCHER = "import os, signal, sys\n{}\nfrom relseek_assets.cli import main\nmain(sys.argv[1:])\n"


def start(platform: Any, hook: str = "", *arguments: object) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", LAUNCHER.format(hook)] if hook else [sys.executable, "-m", "relseek_assets.cli"]
    given = map(str, arguments or ("run", platform.study_file))
    log = (platform.folder / "run.log").open("ab")
    return subprocess.Popen([*command, *given], env=platform.environment(), cwd=CHECKOUT, stdout=log, stderr=log)


def kill_when(platform: Any, moment: Callable[[], bool]) -> None:
    """Start a run and kill it with SIGKILL as soon as `moment` has come."""
    process = start(platform)
    limit = time.monotonic() + PATIENCE
    try:
        while not moment():
            assert process.poll() is None, f"the run ended before the moment came:\n{said(platform)}"
            assert time.monotonic() < limit, f"the moment did not come:\n{said(platform)}"
            time.sleep(0.002)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == -signal.SIGKILL


def kill_itself(platform: Any, hook: str, *arguments: object) -> None:
    process = start(platform, hook, *arguments)
    process.wait(PATIENCE)
    assert process.returncode == -signal.SIGKILL, said(platform)


def said(platform: Any) -> str:
    return (platform.folder / "run.log").read_text(errors="replace")[-3000:]


def files(platform: Any, asset: str) -> list[Path]:
    return [path for path in (platform.files / asset).rglob("*") if path.suffix in (".parquet", ".safetensors", ".html")]


def temporary(platform: Any) -> list[Path]:
    return list((platform.home / "store").rglob("*.tmp"))


def unfinished_runs(instance: dg.DagsterInstance) -> list[dg.DagsterRun]:
    return list(instance.get_runs(dg.RunsFilter(statuses=[dg.DagsterRunStatus.STARTED, dg.DagsterRunStatus.STARTING])))


def claimed_slots(instance: dg.DagsterInstance) -> int:
    storage = instance.event_log_storage
    return sum(len(storage.get_concurrency_info(pool).claimed_slots) for pool in storage.get_concurrency_keys())


def events(platform: Any, asset: str) -> int:
    with platform.workspace() as workspace:
        return len(workspace.instance.get_materialized_partitions(workspace.stage.key(asset)))


def assert_same(one: pd.DataFrame, two: pd.DataFrame, what: str) -> None:
    """Equal words and whole numbers; numbers to 1e-3, because a run that goes on composes other batches, and log-probabilities of
    the same row agree to 1e-4 across batches."""
    pd.testing.assert_frame_equal(
        one.drop(columns=["sha256"], errors="ignore"), two.drop(columns=["sha256"], errors="ignore"), rtol=1e-3, atol=1e-3, obj=what
    )


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="finds a descriptor's file in /proc")
def test_a_run_killed_at_five_points_ends_like_one_left_alone(judged: Any, finished_session: Any) -> None:
    # 1: in a training step, which holds the pool's one slot
    with dg.DagsterInstance.from_config(str(judged.home)) as instance:
        kill_when(judged, lambda: claimed_slots(instance) > 0)
        assert len(unfinished_runs(instance)) == 1
        assert claimed_slots(instance) == 1, "the dead process still holds the slot that the next run needs"
    assert files(judged, "training_run") == []

    # 2: between two vectors' partitions of one step
    kill_when(judged, lambda: len(files(judged, "generations")) > 0)
    assert len(files(judged, "training_run")) == 2
    there = {path.relative_to(judged.files): path.stat().st_mtime_ns for path in files(judged, "generations")}
    assert 0 < len(there) < 12
    recorded = events(judged, "generations")
    assert recorded in (len(there), len(there) - 1), "each partition is recorded as soon as its file is in place"

    # 3: while a table is written
    kill_itself(judged, WHILE_WRITING)
    assert len(temporary(judged)) == 1
    assert files(judged, "generation_metrics") == [], "the half-written table is in nobody's way"
    with judged.workspace() as workspace:
        kept = [place for place in there if (judged.files / place).stat().st_mtime_ns == there[place]]
        assert len(kept) >= recorded, "what was recorded before the kill is not computed again"
        assert not any(state.status == "fresh" for (name, _), state in workspace.states().items() if name == "generation_metrics")

    # 4: a file in place, and no event that says so
    kill_itself(judged, AFTER_PLACING)
    orphan = judged.files / "judge_scores" / "m:L01" / "e03@0_0.parquet"
    assert orphan.is_file()
    with judged.workspace() as workspace:
        states = workspace.states()
        assert states["judge_scores", "m:L01|e03@0_0"].status == "missing", "a file that no event vouches for does not count"
        assert states["judge_scores", "m:L01|e03@-1_0"].status == "fresh"

    # 5: in the report
    with dg.DagsterInstance.from_config(str(judged.home)) as instance:
        kill_when(judged, lambda: "report: 1 partition" in said(judged) and len(unfinished_runs(instance)) == 1)
        assert len(unfinished_runs(instance)) == 1
    assert files(judged, "report") == []

    # and left alone at last
    done = judged.process("run", "STUDY")
    assert done.returncode == 0, done.stdout + done.stderr
    with judged.workspace() as workspace, finished_session.workspace() as undisturbed:
        assert {state.status for state in workspace.states().values()} == {"fresh"}
        assert unfinished_runs(workspace.instance) == []
        assert claimed_slots(workspace.instance) == 0
        for name, asset in workspace.catalogue.items():
            expected = {path.relative_to(finished_session.files) for path in files(finished_session, name)}
            assert {path.relative_to(judged.files) for path in files(judged, name)} == expected
            if asset.schema is not None and not asset.made_by:
                assert_same(read_asset(workspace, name), read_asset(undisturbed, name), name)
        for name in ("training_run", "steering_vectors"):
            for partition in workspace.partitions(name):
                key = workspace.stage.key(name)
                assert workspace.lineage().version(key, partition) == undisturbed.lineage().version(key, partition)
    assert temporary(judged) == [], "what a killed write left behind is cleared away"
    again = judged.process("run", "STUDY")
    assert "nothing to compute" in again.stdout


#: Where an import is killed: its old file gone, its event recorded and its new file not there, all of it done.
IMPORTED = "/steering_vectors/m:L01/e03"
MOMENTS = {
    "the old file gone": """
real = os.replace
def replace(source, target):
    real(source, target)
    if "IMPORTED" in str(source):
        os.kill(os.getpid(), signal.SIGKILL)
os.replace = replace
""",
    "before the new file is placed": """
real = os.replace
def replace(source, target):
    if "IMPORTED" in str(target):
        os.kill(os.getpid(), signal.SIGKILL)
    real(source, target)
os.replace = replace
""",
    "after the new file is placed": AFTER_PLACING.replace("/judge_scores/m:L01/e03@0_0", "IMPORTED"),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_an_import_that_is_killed_leaves_no_file_under_the_event_of_another(finished: Any, tmp_path: Path, moment: str) -> None:
    vector = np.random.default_rng(7).normal(size=32).astype(np.float32)
    save_file({"v": vector}, tmp_path / "mine.safetensors")
    command = ("import", "vector", finished.study_file, tmp_path / "mine.safetensors", "--site", "m:L01", "--epoch", 3)
    kept = finished.files / "steering_vectors" / "m:L01" / "e03.safetensors"

    def state() -> Any:
        with finished.workspace() as workspace:
            return workspace.states(["steering_vectors"])["steering_vectors", "m:L01|e03"]

    trained = state()
    kill_itself(finished, MOMENTS[moment].replace("IMPORTED", IMPORTED), *command)
    found = state()
    if kept.is_file():
        assert (found.status, found.version) == ("imported", tensors_version(load_file(kept)))
    else:
        assert found.status == "missing"
    if moment == "before the new file is placed":  # and its event is there
        done = finished.command("run", "STUDY", "--select", "steering_vectors")
        assert done.exit_code == 0, done.output
        assert (state().status, state().version) == ("fresh", trained.version)
    done = finished.command(*command)
    assert done.exit_code == 0, done.output
    assert (state().status, state().version) == ("imported", tensors_version({"vector": vector}))
    np.testing.assert_array_equal(load_file(kept)["vector"], vector)
    assert temporary(finished) == [], "what the killed import left is taken up by the next"


def test_a_run_that_is_still_alive_is_not_taken_for_dead(finished: Any) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    here = socket.gethostname()
    processes = {
        "alive": process_tag(),
        "alive, older record": f"{here}:{os.getpid()}",
        "elsewhere": "another-machine:1:1",
        "from the UI": None,
        "dead": f"{here}:{ended.pid}",
    }
    with finished.workspace() as workspace:
        for name, process in processes.items():
            tags = {"name": name, **({PROCESS_TAG: process} if process else {})}
            workspace.instance.add_run(dg.DagsterRun(job_name="job", status=dg.DagsterRunStatus.STARTED, tags=tags))
        (finished.files / "generations" / ".being_written.tmp").write_bytes(b"PAR1")
        assert workspace.end_dead_runs() == 1
        assert {run.tags["name"] for run in unfinished_runs(workspace.instance)} == {"alive", "alive, older record", "elsewhere", "from the UI"}
    assert len(temporary(finished)) == 1, "a run that lives may be writing it"


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="a process says in /proc when it started")
def test_a_run_of_an_earlier_process_with_the_same_number_is_dead(blank: Any) -> None:
    """After a restart of the container the next run may have the very number of the one that was killed."""
    with blank.workspace() as workspace:
        host, number, started = process_tag().split(":")
        run = dg.DagsterRun(job_name="job", status=dg.DagsterRunStatus.STARTED, tags={PROCESS_TAG: f"{host}:{number}:{int(started) - 1}"})
        workspace.instance.add_run(run)
        storage = workspace.instance.event_log_storage
        storage.initialize_concurrency_limit_to_default("gpu")
        storage.claim_concurrency_slot("gpu", run.run_id, "step")
        (held,) = workspace.held_pools(["training_run"])
        assert run.run_id in held
        assert f"process {host}:{number}:" in held
        assert "terminate that run in `relseek ui`" in held
        assert workspace.held_pools(["preference_pairs"]) == []
        assert workspace.end_dead_runs() == 1
        assert claimed_slots(workspace.instance) == 0
        assert workspace.held_pools(["training_run"]) == []
