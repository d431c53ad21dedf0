"""What is deployed is an asset: recorded by the server that starts, stale when its vector changes, and never left to say that it runs for ever."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import psutil
import pytest

from relseek_assets.serving import deployments
from relseek_assets.serving.deployments import Deployment, ServedVector
from relseek_resources.storage import file_sha256
from relseek_resources.vector_files import write_vectors

SERVED, OTHER = "m:L01|e03", "m:L02|e03"


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def wait_for(what: str, there: Callable[[], Any], seconds: float = 400) -> Any:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        found = there()
        if found:
            return found
        time.sleep(0.2)
    raise AssertionError(f"{what} did not come about in {seconds:g} s")


@contextlib.contextmanager
def serving(platform: Any, *options: str) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """`relseek serve` of the tiny study as a process of its own, and its address."""
    port = free_port()
    command = [sys.executable, "-m", "relseek_assets.cli", "serve", str(platform.study_file), "--port", str(port), *options]
    process = subprocess.Popen(command, env=platform.environment(), stdout=subprocess.DEVNULL)
    try:
        yield process, f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


def rows(platform: Any) -> list[dict[str, Any]]:
    shown = platform.command("table", "STUDY", "served_models", "--format", "json")
    return json.loads(shown.output) if shown.exit_code == 0 else []


def states(platform: Any) -> dict[str, set[str]]:
    """Partition -> deployment states in the table."""
    found: dict[str, set[str]] = {}
    for row in rows(platform):
        found.setdefault(f"{row['site']}|e{row['epoch']:02d}", set()).add(row["state"])
    return found


def verdicts(platform: Any) -> dict[tuple[str, str | None], Any]:
    with platform.workspace() as workspace:
        return {(name, None if key is None else str(key)): state for (name, key), state in workspace.states().items()}


def names(found: dict[tuple[str, str | None], Any], *statuses: str) -> set[str]:
    return {name for (name, _), state in found.items() if state.status in statuses}


def test_of_what_nobody_serves_nothing_is_asked_for(finished: Any) -> None:
    assert names(verdicts(finished), "fresh") and "served_models" not in names(verdicts(finished), "missing", "stale", "fresh", "absent")
    said = finished.command("table", "STUDY", "served_models")
    assert said.exit_code == 1 and "`relseek serve tiny` does it" in said.output


@pytest.mark.slow
def test_a_server_is_recorded_with_the_versions_it_serves_and_a_changed_vector_makes_that_one_stale(finished: Any) -> None:
    file = finished.files / "steering_vectors" / "m:L01" / "e03.safetensors"
    with serving(finished, "--site", "m:L01", "--epoch", "3", "--all") as (process, address):
        wait_for("the record", lambda: states(finished).get(OTHER) == {"running"})
        found = verdicts(finished)
        assert {found["served_models", partition].status for partition in (SERVED, OTHER)} == {"fresh"}
        [row] = [row for row in rows(finished) if (row["site"], row["epoch"]) == ("m:L01", 3)]
        assert row["sha256"] == file_sha256(file) and row["vector_version"] == found["steering_vectors", SERVED].version
        assert (row["engine"], row["address"], row["vector"], row["live"]) == ("embedded", address, "m:L01@e03", True)
        assert row["started"] <= row["last_seen"] and row["machine"] == socket.gethostname()
        with finished.workspace() as workspace:
            inputs = workspace.lineage().input_versions(workspace.stage.key("served_models"), SERVED)
        assert inputs == {"steering_vectors": found["steering_vectors", SERVED].version, "base_models": inputs["base_models"]}

        other = finished.folder / "other.safetensors"
        write_vectors(other, "safetensors", {1: np.random.default_rng(5).normal(size=32).astype(np.float32)}, {})
        assert finished.command("import", "vector", "STUDY", other, "--site", "m:L01", "--epoch", "3").exit_code == 0
        found = verdicts(finished)
        stale = found["served_models", SERVED]
        assert stale.status == "stale" and "steering_vectors" in stale.reason
        assert [key for (name, key), state in found.items() if name == "served_models" and state.status != "fresh"] == [SERVED]
        by_itself = {name for (name, _), state in found.items() if state.status == "stale" and not state.reason.startswith("waits for")}
        with finished.workspace() as workspace:
            readers = {key.path[-1] for key in workspace.graph.get(workspace.stage.key("steering_vectors")).child_keys}
        assert "served_models" in by_itself <= readers, "and nothing that does not read that vector"
        assert "served_models" not in finished.command("run", "STUDY", "--dry-run").output

        with serving(finished, "--site", "m:L01", "--epoch", "3") as (_, second):
            wait_for("the second record", lambda: {second, address} == {row["address"] for row in rows(finished)})
            assert verdicts(finished)["served_models", SERVED].status == "stale", "as long as one server runs that is behind"
            process.send_signal(signal.SIGINT)
            assert process.wait(30) == 0
            wait_for("the end of the first", lambda: states(finished)[OTHER] == {"ended"})
            assert states(finished)[SERVED] == {"ended", "running"}
            assert verdicts(finished)["served_models", SERVED].status == "fresh", "the server that runs has the new vector"


@pytest.mark.slow
def test_a_server_that_is_killed_with_its_witness_is_found_silent_by_whoever_asks(finished: Any) -> None:
    with serving(finished, "--site", "m:L02") as (process, _):
        wait_for("the record", lambda: states(finished) == {OTHER: {"running"}})
        for one in [*psutil.Process(process.pid).children(), process]:
            os.kill(one.pid, signal.SIGKILL)
        process.wait()
    [before] = rows(finished)
    assert before["state"] == "running", "nobody has asked yet"
    shown = finished.command("status", "STUDY").output
    assert next(line for line in shown.splitlines() if line.startswith("served_models")).split()[1:6] == ["0", "0", "0", "1", "0"]
    [after] = rows(finished)
    assert after["state"] == "silent" and after["last_seen"] == before["last_seen"]


@pytest.mark.slow
def test_the_sensor_and_a_materialisation_from_the_ui_say_the_same(finished: Any) -> None:
    import dagster as dg

    from relseek_assets.definitions import build_definitions
    from relseek_assets.stage import Store

    folder = finished.files
    vector = ServedVector("m:L01@e03", "0" * 64, SERVED, "v", {})
    gone = Deployment("d", "tiny", "vllm", "m", None, f"http://127.0.0.1:{free_port()}", socket.gethostname(), (vector,), "t", "t", "running")
    deployments.write(deployments.record_file(folder, "d"), gone)
    with finished.workspace() as workspace:
        store = Store(root=str(finished.home / "store"))
        definitions = build_definitions(workspace.study, store=store)
        sensor = definitions.get_sensor_def("tiny_served_models")
        context = dg.build_sensor_context(workspace.instance, resources={"store": store}, definitions=definitions)
        found = sensor.evaluate_tick(context)
        assert [event.asset_key.path for event in found.asset_events] == [["tiny", "served_models"]] and "silent" in found.skip_message
        assert sensor.evaluate_tick(context).asset_events == [], "it says a thing once"
    assert states(finished) == {SERVED: {"silent"}}
    deployments.write(deployments.record_file(folder, "d"), gone)
    with finished.workspace() as workspace:
        workspace._execute(*([["served_models"]] if "names" in workspace._execute.__code__.co_varnames else ["served_models"]), [SERVED])
    assert states(finished) == {SERVED: {"silent"}}


def test_another_machines_loopback_is_not_asked_from_here(tmp_path: Any) -> None:
    there = Deployment("d", "s", "vllm", "m", None, "http://127.0.0.1:9", "elsewhere", (ServedVector("v", "0"),), state="running")
    assert not there.reachable and replace(there, address="http://gpu7:8000").reachable
    deployments.write(deployments.record_file(tmp_path, "d"), there)
    assert deployments.look(tmp_path) == [] and deployments.recorded(tmp_path) == [there]
