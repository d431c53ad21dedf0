"""Where a model comes from: what is known of it before its weights are here stays true once they are."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import huggingface_hub.utils
import pytest
from transformers.utils import logging as transformers_logging

from relseek_resources import compute
from relseek_resources.models import ModelError, describe, load
from relseek_resources.models.loading import commit_of, fingerprint

NAME, FIRST, SECOND = "someone/tiny-llama", "1" * 40, "2" * 40
CHECKOUT = Path(__file__).parents[2]
VISIT = """
import json
import sys
from relseek_resources.models import describe, load
from relseek_resources.models.loading import fingerprint

found = [describe(sys.argv[1]) is None, fingerprint(sys.argv[1]), describe(sys.argv[1]).layers]
model = load(sys.argv[1], device="cpu")
print(json.dumps([*found, model.layers, fingerprint(sys.argv[1])]))
"""


class Hub(ThreadingHTTPServer):
    """The hub's protocol for one model. A new commit is published as soon as somebody has fetched config.json."""

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Visit)
        self.folder, self.main, self.taken = folder, FIRST, set[tuple[str, str]]()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Visit(BaseHTTPRequestHandler):
    server: Hub

    def do_HEAD(self) -> None:
        self._answer(b"")

    def do_GET(self) -> None:
        self._answer(None)

    def _answer(self, body: bytes | None) -> None:
        _, _, place = self.path.partition(f"/{NAME}/resolve/")
        revision, _, file = place.partition("/")
        path = self.server.folder / file
        if not place or not path.is_file():
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        content = path.read_bytes()
        commit = self.server.main if revision == "main" else revision
        self.send_response(200)
        headers = {"X-Repo-Commit": commit, "ETag": f'"{sha256(content).hexdigest()}"', "Content-Length": str(len(content))}
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if body is None:
            self.wfile.write(content)
            self.server.taken.add((commit, file))
            if file == "config.json":
                self.server.main = SECOND

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def hub(tmp_path: Path, random_causal_lm: Any, byte_tokenizer: Any) -> Iterator[Hub]:
    random_causal_lm("llama").save_pretrained(tmp_path / "published")
    byte_tokenizer.save_pretrained(tmp_path / "published")
    with Hub(tmp_path / "published") as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def visit(folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """What a process finds that has `folder` for its cache: the hub's address is read when its library is imported."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    own = {"HF_HOME": str(folder), "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "127.0.0.1", "PYTHONPATH": str(CHECKOUT), **environment}
    return subprocess.run([sys.executable, "-c", VISIT, NAME], env={**inherited, **own}, cwd=folder, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_a_hub_models_version_is_the_same_before_its_download_and_after_whatever_the_hub_publishes(hub: Hub, tmp_path: Path) -> None:
    first = visit(tmp_path, HF_ENDPOINT=hub.address)
    assert first.returncode == 0, first.stderr
    unknown, before, described, layers, after = json.loads(first.stdout)
    assert unknown and described == layers == 4
    assert before == after == sha256(f"{NAME}@{FIRST}".encode()).hexdigest()[:16]
    assert {commit for commit, _ in hub.taken} == {FIRST} and hub.main == SECOND
    assert (FIRST, "model.safetensors") in hub.taken
    again = visit(tmp_path, HF_ENDPOINT=hub.address, HF_HUB_OFFLINE="1")
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout) == [False, before, 4, 4, before]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of a machine that is offline."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return tmp_path


def test_a_hub_model_that_nobody_can_look_at_has_no_version_and_says_what_to_do(cache: Path) -> None:
    assert describe(NAME) is None, "a study that names it can be read all the same"
    for ask in (fingerprint, commit_of, load):
        with pytest.raises(ModelError, match=f"{NAME} is not in the local cache.*hf download {NAME}"):
            ask(NAME)
    assert not list(cache.iterdir())
    for ask in (describe, fingerprint, load):
        with pytest.raises(ModelError, match="model folder ./models/mine: no such folder"):
            ask("./models/mine")


def test_the_commit_of_a_hub_model_is_the_one_that_the_cache_calls_main(cache: Path) -> None:
    model = cache / "models--someone--tiny-llama"
    (model / "refs").mkdir(parents=True)
    found = []
    for commit in (FIRST, SECOND):
        (model / "snapshots" / commit).mkdir(parents=True)
        (model / "snapshots" / commit / "config.json").write_text('{"num_hidden_layers": 7, "hidden_size": 8}')
        (model / "refs" / "main").write_text(commit)
        assert commit_of(NAME) == commit
        found.append(fingerprint(NAME))
    assert len(set(found)) == 2
    described = describe(NAME)
    assert described is not None and (described.layers, described.width) == (7, 8)


def test_a_folder_has_no_commit_and_another_version_when_its_weights_are_written_anew(tmp_path: Path) -> None:
    assert commit_of("embedded:smollm2-135m-instruct") is None and commit_of(str(tmp_path)) is None
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(b"one")
    before = fingerprint(str(tmp_path))
    assert fingerprint(str(tmp_path)) == before
    os.utime(weights, ns=(1, 1))
    assert fingerprint(str(tmp_path)) != before


@pytest.mark.parametrize("shown", [True, False])
def test_bars_of_a_download_stay_as_they_are_while_a_model_loads(
    shown: bool, tmp_path: Path, random_causal_lm: Any, byte_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import transformers

    random_causal_lm("llama").save_pretrained(tmp_path)
    byte_tokenizer.save_pretrained(tmp_path)
    seen, read = [], transformers.AutoModelForCausalLM.from_pretrained

    def from_pretrained(*arguments: Any, **options: Any) -> Any:
        seen.append((not huggingface_hub.utils.are_progress_bars_disabled(), transformers_logging.is_progress_bar_enabled()))
        return read(*arguments, **options)

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", from_pretrained)
    (huggingface_hub.utils.enable_progress_bars if shown else huggingface_hub.utils.disable_progress_bars)()
    try:
        load(str(tmp_path), device="cpu")
        assert seen == [(shown, False)]
        assert huggingface_hub.utils.are_progress_bars_disabled() == (not shown)
    finally:
        huggingface_hub.utils.enable_progress_bars()


def test_a_run_says_on_the_terminal_that_the_embedded_model_is_converted_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_llama: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    def saved(folder: Path) -> None:
        (folder / "model.safetensors").write_bytes(b"")

    monkeypatch.setenv("RELSEEK_CACHE", str(tmp_path))
    for kind in ("AutoTokenizer", "AutoModelForCausalLM"):
        monkeypatch.setattr(f"transformers.{kind}.from_pretrained", lambda *_, **__: SimpleNamespace(save_pretrained=saved))
    monkeypatch.setattr(compute.models, "load", lambda *_, **__: tiny_llama)
    settings = SimpleNamespace(source="embedded:smollm2-135m-instruct", dtype="float32", device="cpu")
    logged: list[str] = []
    try:
        for expected in (1, 0):
            compute.release()
            compute.ModelLoader().load(settings, SimpleNamespace(info=logged.append))
            captured = capsys.readouterr()
            assert captured.out == "" and len(captured.err.splitlines()) == expected
            assert captured.err == "" or ("converting" in captured.err and "once" in captured.err)
        assert len(logged) == 1
    finally:
        compute.release()
