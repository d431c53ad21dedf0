"""`relseek serve`: which vectors it serves, from where, and what it says of what is missing."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from relseek_assets import serve
from relseek_assets.serving import deployments
from relseek_assets.study import StudyError, load_study
from relseek_resources.serving import chat
from relseek_resources.serving.guard import Settings
from relseek_resources.serving.vectors import Configuration, Vectors
from relseek_resources.storage import write_tensors
from tests.serving.served import NEEDS_VLLM, WIDTH, Server
from tests.serving.stored import SITES, select


def gathered(*given: str, site: str | None = None, every: bool = False) -> serve.Served:
    return serve.gathered("quickstart", None, site, None, every, "response_mean", given)


def test_the_selected_vector_is_served_byte_by_byte(store: Path) -> None:
    select(store, SITES[1])
    served = gathered()
    [vector] = served.vectors
    assert vector.name == "smollm2-135m:L15@e02"
    vectors = Vectors(Configuration.from_json(served.configuration()), 30, WIDTH)
    content = (store / "steering_vectors" / SITES[1] / "e02.safetensors").read_bytes()
    registered = vectors.by_name[vector.name]
    assert registered.sha256 == vector.sha256 == hashlib.sha256(content).hexdigest()
    assert registered.home == (15,) and vectors.default == {"vector": vector.name}
    assert vectors.limits.dose == load_study("quickstart").dose_limit
    assert (served.folder / serve.HASHES).read_text() == f"{vector.sha256}  smollm2-135m_L15@e02.safetensors\n"


def test_others_come_behind_the_selected_one(store: Path, tmp_path: Path) -> None:
    select(store, SITES[1])
    mine = tmp_path / "mine.safetensors"
    write_tensors(mine, {"vector": np.ones(WIDTH, np.float32)}, {"layer": "3"})
    served = gathered(f"mine={mine}", every=True)
    assert [vector.name for vector in served.vectors] == ["smollm2-135m:L15@e02", "smollm2-135m:L12@e02", "mine"]
    assert gathered(site=SITES[0]).vectors[0].name == "smollm2-135m:L12@e02"


@pytest.mark.parametrize(
    ("given", "site", "says"),
    [
        ((), None, "relseek run quickstart --select selection"),  # nothing selected, and nobody to ask
        ((), "smollm2-135m:L13", "there is smollm2-135m:L12 epoch 2, smollm2-135m:L15 epoch 2"),
        (("mine",), SITES[0], "give NAME=FILE"),
        (("mine=none.safetensors",), SITES[0], "is no .safetensors file"),
    ],
)
def test_what_is_missing_is_said(store: Path, given: tuple[str, ...], site: str | None, says: str) -> None:
    with pytest.raises(StudyError, match=says):
        gathered(*given, site=site)


@pytest.mark.parametrize(
    ("names", "says"),
    [
        (("../up",), "a name has"),
        (("a/b",), "a name has"),
        (("..",), "a name has"),
        (("x" * 101,), "a name has"),
        (("a:b", "a_b"), "its file would be that of a:b"),
        (("A", "a"), "its file would be that of A"),
        (("smollm2-135m_L12@e02",), "its file would be that of smollm2-135m:L12@e02"),
    ],
)
def test_a_name_is_checked_before_anything_is_written(store: Path, tmp_path: Path, names: tuple[str, ...], says: str) -> None:
    given = []
    for place, name in enumerate(names):
        file = tmp_path / f"mine{place}.safetensors"
        write_tensors(file, {"vector": np.full(WIDTH, place + 1, np.float32)}, {"layer": "3"})
        given.append(f"{name}={file}")
    with pytest.raises(StudyError, match=says):
        gathered(*given, site=SITES[0])
    assert not (tmp_path / "served").exists() and not (tmp_path / "up.safetensors").exists()


def test_an_empty_store_names_the_command_that_fills_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "dagster.yaml").write_text("")
    monkeypatch.setenv("DAGSTER_HOME", str(tmp_path))
    found = CliRunner().invoke(serve.serve, ["quickstart"])
    assert found.exit_code == 1 and "`relseek run quickstart` makes them" in found.output


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["quickstart", "--host", "0.0.0.0"], "needs a key"),
        (["quickstart", "--", "--dtype", "half"], "only --engine vllm"),
        (["quickstart", "--model", "x"], "not both"),
        (["quickstart", "--engine", "vllm", "--key", "a", "--key", "b"], "give one"),
        (["quickstart", "--engine", "vllm", "--rows", "8"], "-- --max-num-seqs 8"),
        (["--model", "embedded:smollm2-135m-instruct", "--engine", "vllm", "--", "--host", "0.0.0.0"], "give --host before --"),
        (["quickstart", "--engine", "vllm", "--", "--host", "0.0.0.0"], "give --host before --"),
        (["quickstart", "--engine", "vllm", "--", "--seed", "1", "--host=0.0.0.0"], "give --host before --"),
        (["quickstart", "--engine", "vllm", "--", "--hos", "0.0.0.0"], "give --host before --"),
        (["quickstart", "--engine", "vllm", "--", "--port", "80"], "give --port before --"),
        (["quickstart", "--engine", "vllm", "--", "--api_key", "a"], "give --key before --"),
        (["quickstart", "--engine", "vllm", "--", "--additional-config", "{}"], "give --vector, and dose_limit in the study before --"),
        (["quickstart", "--engine", "vllm", "--", "--additional_config.relseek.dose_limit", "99"], "--additional-config is set by relseek"),
        ([], "name a STUDY, or give --model"),
    ],
)
def test_arguments_that_do_not_go_together_are_refused(store: Path, arguments: list[str], says: str) -> None:
    found = CliRunner().invoke(serve.serve, arguments)
    assert found.exit_code and says in found.output


def test_vllm_is_started_with_the_plugins_configuration(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve, "converted", lambda source: Path("/models/smollm2"))
    served = gathered(site=SITES[0])
    command, environment = serve.vllm_command(served, Settings("0.0.0.0", 8001, ("secret",), rate=7), 1024, ["--tensor-parallel-size", "3"])
    configuration = Configuration.from_json(json.loads(command[command.index("--additional-config") + 1])["relseek"])
    assert Vectors(configuration, 30, WIDTH).by_name["smollm2-135m:L12@e02"].home == (12,)
    assert (configuration.rate, configuration.body, configuration.patience) == (7, Settings.body, Settings.patience)
    assert environment["VLLM_API_KEY"] == "secret" and "secret" not in command  # a command line can be read by everybody
    assert environment["VLLM_PLUGINS"] == "relseek" and command[-2:] == ["--tensor-parallel-size", "3"]


def test_the_documented_workers_share_the_models_heads_evenly() -> None:
    page = (Path(__file__).parents[2] / "docs" / "serving.md").read_text(encoding="utf-8")
    sizes = re.findall(r"serve quickstart .*--tensor-parallel-size (\d+)", page + (serve.serve.help or ""))
    assert len(sizes) == 2 and all(9 % int(size) == 0 for size in sizes)  # of quickstart's model


def test_what_is_printed_shows_no_key(store: Path) -> None:
    text = serve.described(gathered(site=SITES[0]), Settings(keys=("secret",)), "embedded")
    assert "secret" not in text and "Bearer KEY" in text and "smollm2-135m:L12@e02" in text and "chat page" in text
    assert "chat page" not in serve.described(gathered(site=SITES[0]), Settings(), "embedded", page=False)


@pytest.mark.parametrize("runs_a_trial", [False, True])
def test_where_a_trial_runs_there_is_no_page_that_shows_doses(
    random_causal_lm: Any,
    byte_tokenizer: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    runs_a_trial: bool,
) -> None:
    """As `relseek arms serve`: participants reach the trial's routes, and nothing at `/` tells them what could be set."""
    from starlette.testclient import TestClient

    from relseek_resources import models
    from relseek_resources.serving import server
    from relseek_resources.serving.trial_arms import Arm, Conduct, allocated, write_once

    monkeypatch.setattr(models, "load", lambda *_, **__: models.SteeredModel(random_causal_lm("llama"), byte_tokenizer))
    write_tensors(tmp_path / "mine.safetensors", {"vector": np.ones(64, np.float32)}, {"layer": "1"})
    [vector] = serve.of_files([f"mine={tmp_path / 'mine.safetensors'}"])
    served = serve.Served(serve.Loaded("tiny"), "tiny", tmp_path / "served", (vector,), 2.0)
    serve.export(served)
    arms = [Arm(f"{dose:g}", "mine", dose, vector.sha256) for dose in (0.0, 1.0)]
    allocation, tokens = allocated("tiny", arms, 2, [2], 5, Conduct())
    write_once(allocation, tokens, tmp_path / "arms.json", tmp_path / "tokens.csv")
    found: dict[str, int] = {}

    def asked(app: Any, settings: Settings) -> None:
        with TestClient(app) as client:
            key = {"authorization": "Bearer sesame"}
            found.update({path: client.get(path, headers=key).status_code for path in ("/", "/v1/relseek/projection", "/v1/models")})
            found["/trial/history"] = client.post("/trial/history", json={"token": tokens["p001"]}).status_code

    monkeypatch.setattr(server, "run", asked)
    trial = (tmp_path / "arms.json", tmp_path / "conversations.jsonl") if runs_a_trial else None
    serve.serve_embedded(served, Settings(keys=("sesame",)), 4, 900, trial)
    assert ("a conversation has 900 tokens" in capsys.readouterr().out) == runs_a_trial
    page, participants = (404, 200) if runs_a_trial else (200, 404)
    assert found == {"/": page, "/v1/relseek/projection": page, "/v1/models": 200, "/trial/history": participants}


@NEEDS_VLLM
@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_command_becomes_a_vllm_server_that_steers_is_recorded_and_ends_on_ctrl_c(store: Path, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shutil.copy(Path(__file__).parents[2] / "dagster_home" / "dagster.yaml", tmp_path)
    quiet = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "RELSEEK_KEYS": "sesame"}
    command = [sys.executable, "-m", "relseek_assets.cli", "serve", "quickstart", "--engine", "vllm", "--site", SITES[0], "--port", str(port)]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(command, env={**os.environ, **quiet}, stdout=log, stderr=subprocess.STDOUT, process_group=0)
    server = Server(port, store, tmp_path / "log", process.pid)
    key = {"authorization": "Bearer sesame"}
    try:
        records = tmp_path / "store" / "quickstart" / "deployments"
        deadline = time.monotonic() + 1200
        while not (list(records.glob("*.json")) if records.is_dir() else []):
            assert process.poll() is None and time.monotonic() < deadline, (tmp_path / "log").read_text()[-4000:]
            time.sleep(1)
        [record] = deployments.recorded(records.parent)
        assert (record.engine, record.state, record.vectors[0].live) == ("vllm", "running", True)
        assert record.vectors[0].partition == f"{SITES[0]}|e02"

        status, health = server.ask("/v1/relseek/health", headers=key)
        assert status == 200 and health["live"]
        asked = {"model": "smollm2-135m", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 12, "temperature": 0}
        replies = []
        for dose in (0.0, 2.0):
            status, answer = server.ask("/v1/chat/completions", {**asked, "custom": {"steer_multiplier": dose}}, key)
            assert status == 200
            replies.append(answer["choices"][0]["message"]["content"])
        assert replies[0] != replies[1]
        status, answer = server.ask("/v1/chat/completions", {**asked, "custom": {"steer_multiplier": 9}}, key)
        assert status == 400 and "outside the declared range" in answer["error"]["message"]
        status, page = server.ask("/")
        assert status == 200 and page == chat.PAGE.read_text(encoding="utf-8")
        assert server.ask("/v1/relseek/vectors")[0] == 401

        process.send_signal(signal.SIGINT)
        process.wait(60)
        while deployments.recorded(records.parent)[0].state != "ended":
            assert time.monotonic() < deadline
            time.sleep(0.5)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
