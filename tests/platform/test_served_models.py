"""What is deployed is an asset: recorded by the server that starts, stale when its vector changes, and never left to say that it runs for ever."""

from __future__ import annotations

import contextlib
import http.server
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from relseek_assets.serving import deployments, witness
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
    return json.loads(shown.stdout) if shown.exit_code == 0 else []


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
        workspace._execute(["served_models"], [SERVED], print, {})
    assert states(finished) == {SERVED: {"silent"}}


def test_another_machines_loopback_is_not_asked_from_here(tmp_path: Any) -> None:
    there = Deployment("d", "s", "vllm", "m", None, "http://127.0.0.1:9", "elsewhere", (ServedVector("v", "0"),), state="running")
    assert not there.reachable and replace(there, address="http://gpu7:8000").reachable
    deployments.write(deployments.record_file(tmp_path, "d"), there)
    assert deployments.look(tmp_path) == [] and deployments.recorded(tmp_path) == [there]


# --- what an answer says, and what it does not ---------------------------------------------------------------------------


@dataclass
class Answering:
    """A server that gives the answer it is told to; a status of 0 is a line that is no HTTP, `key` opens it."""

    url: str
    status: int = 200
    sha256: str = "0" * 64
    key: str | None = None
    asked: int = 0


@pytest.fixture
def there() -> Iterator[Answering]:
    class Answer(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            there.asked += 1
            opened = there.key is None or self.headers.get("authorization") == f"Bearer {there.key}"
            body = json.dumps({"vectors": [{"name": "v", "sha256": there.sha256}]}).encode()
            if there.status == 0:
                self.wfile.write(b"what is HTTP?\r\n\r\n")
                return
            self.send_response(there.status if opened else 401)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answer) as server:
        there = Answering(f"http://127.0.0.1:{server.server_address[1]}")
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield there
        server.shutdown()


def deployed(folder: Path, address: str, name: str = "d", started: str = "2026-01-01T00:00:00Z", state: str = "running") -> Deployment:
    vector = ServedVector("v", "0" * 64)
    one = Deployment(name, "s", "embedded", "m", None, address, socket.gethostname(), (vector,), started, started, state)
    deployments.write(deployments.record_file(folder, name), one)
    return one


def state_of(folder: Path) -> dict[str, str]:
    return {one.deployment: one.state for one in deployments.recorded(folder)}


@pytest.mark.parametrize("status", [302, 400, 408, 413, 429])
def test_an_answer_that_says_nothing_of_the_vector_changes_nothing(there: Answering, tmp_path: Path, status: int) -> None:
    before, there.status = deployed(tmp_path, there.url), status
    assert deployments.look(tmp_path) == [] and deployments.recorded(tmp_path) == [before]


@pytest.mark.parametrize(("status", "sha256"), [(404, "0" * 64), (200, "1" * 64)])
def test_another_server_is_known_by_what_it_lists_or_that_it_lists_nothing(there: Answering, tmp_path: Path, status: int, sha256: str) -> None:
    deployed(tmp_path, there.url)
    assert deployments.look(tmp_path) == [] and state_of(tmp_path) == {"d": "running"}
    there.status, there.sha256 = status, sha256
    assert [one.state for one in deployments.look(tmp_path)] == ["replaced"]


@pytest.mark.parametrize("status", [0, 500, 503])
def test_who_breaks_off_or_fails_is_silent_until_it_answers(there: Answering, tmp_path: Path, status: int) -> None:
    deployed(tmp_path, there.url)
    there.status = status
    assert [one.state for one in deployments.look(tmp_path)] == ["silent"]
    there.status = 200
    assert [one.state for one in deployments.look(tmp_path)] == ["running"]


def test_who_lacks_the_key_does_not_take_back_what_the_key_found(there: Answering, tmp_path: Path) -> None:
    there.key = "K"
    deployed(tmp_path, there.url, state="silent")
    assert [one.state for one in deployments.look(tmp_path)] == ["locked"]
    assert [one.state for one in deployments.look(tmp_path, key="K")] == ["running"]
    for key in (None, "K", "wrong", "K"):
        assert deployments.look(tmp_path, key=key) == [], "no event each time that another one looks"
    [after] = deployments.recorded(tmp_path)
    assert after.state == "running" and after.last_seen > after.started


def test_a_locked_door_is_no_news_of_a_server_that_was_opened_while_it_was_asked(there: Answering, tmp_path: Path, monkeypatch: Any) -> None:
    """Two look at once: the one without the key read the record before the other one wrote it, and writes after that."""
    there.key = "K"
    deployed(tmp_path, there.url, state="locked")
    ask = deployments.asked

    def overtaken(before: Deployment, key: str | None, measure: bool = False) -> Deployment:
        monkeypatch.setattr(deployments, "asked", ask)
        assert [one.state for one in deployments.look(tmp_path, key="K")] == ["running"]
        return ask(before, key, measure)

    monkeypatch.setattr(deployments, "asked", overtaken)
    assert deployments.look(tmp_path) == [] and state_of(tmp_path) == {"d": "running"}


def test_who_reads_and_writes_a_record_has_it_alone(tmp_path: Path) -> None:
    deployed(tmp_path, "http://127.0.0.1:9")
    ender = threading.Thread(target=deployments.end, args=(tmp_path, "d"))
    with deployments.locked(tmp_path):
        ender.start()
        ender.join(0.3)
        assert state_of(tmp_path) == {"d": "running"}
    ender.join(30)
    assert state_of(tmp_path) == {"d": "ended"}


def test_a_witness_asks_its_own_server_alone(there: Answering, tmp_path: Path) -> None:
    deployed(tmp_path, there.url, "mine")
    deployed(tmp_path, f"http://127.0.0.1:{free_port()}", "gone")
    deployments.look(tmp_path, only="mine")
    assert state_of(tmp_path) == {"mine": "running", "gone": "running"} and there.asked == 1


@pytest.mark.parametrize("state", ["ended", "replaced"])
def test_a_later_start_that_came_to_nothing_takes_no_servers_place(there: Answering, tmp_path: Path, state: str) -> None:
    deployed(tmp_path, there.url, "first")
    deployed(tmp_path, there.url, "second", "2026-01-02T00:00:00Z", state)
    assert deployments.look(tmp_path) == [] and state_of(tmp_path) == {"first": "running", "second": state}
    deployed(tmp_path, there.url, "third", "2026-01-03T00:00:00Z")
    deployments.look(tmp_path)
    assert state_of(tmp_path) == {"first": "replaced", "second": state, "third": "running"}


@pytest.fixture
def witnessing(tmp_path: Path, monkeypatch: Any) -> Iterator[tuple[list[str], int]]:
    """A witness's surroundings without a Dagster instance: the states that it reports, and the server's end of its standard input."""
    from types import SimpleNamespace

    from relseek_assets import commands
    from relseek_assets.serving import assets

    stage, reported = SimpleNamespace(study=SimpleNamespace(name="s")), []
    store = SimpleNamespace(folder=lambda _name: tmp_path)
    workspace = SimpleNamespace(stage=stage, store=store, instance=None, observe=lambda: None)
    monkeypatch.setattr(commands, "workspace_of", lambda _study: workspace)
    monkeypatch.setattr(assets, "versioned", lambda _stage, _store, _instance, deployment, _files: deployment)
    monkeypatch.setattr(assets, "report", lambda *given: reported.extend(one.state for one in given[-1]))
    monkeypatch.setattr(witness, "FIRST", 0.1)
    reading, writing = os.pipe()
    with os.fdopen(reading) as standard_input:
        monkeypatch.setattr(sys, "stdin", standard_input)
        yield reported, writing


def test_a_start_on_a_taken_port_is_not_recorded(there: Answering, tmp_path: Path, witnessing: tuple[list[str], int]) -> None:
    """Its witness is answered by the server that has the port; its own server has ended by then."""
    reported, server_end = witnessing
    first = deployed(tmp_path, there.url, "first")
    os.close(server_end)
    witness.witness(replace(first, deployment="second", started="", last_seen="", state="silent"), tmp_path, {})
    assert state_of(tmp_path) == {"first": "running"} and reported == []


def test_a_server_is_recorded_from_its_first_answer_to_its_end(there: Answering, tmp_path: Path, witnessing: tuple[list[str], int]) -> None:
    reported, server_end = witnessing
    there.status = 503
    draft = Deployment("d", "s", "embedded", "m", None, there.url, socket.gethostname(), (ServedVector("v", "0" * 64),))
    beside = threading.Thread(target=witness.witness, args=(draft, tmp_path, {}, 0.1))
    beside.start()
    wait_for("a second question", lambda: there.asked > 1, 30)
    assert not (tmp_path / "deployments").exists()
    there.status = 200
    wait_for("the record", lambda: reported == ["running"], 30)
    os.close(server_end)
    beside.join(30)
    assert state_of(tmp_path) == {"d": "ended"} and reported == ["running", "ended"]
