"""A vLLM server with the plugin, over a real socket, and the forward-hook model that its replies are compared with."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

WIDTH = 576
NEEDS_VLLM = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed; make serve-env adds it")


@dataclass(frozen=True)
class Server:
    """A running server; `vectors` is the folder that it declares, `process` leads the group of its processes."""

    port: int
    vectors: Path
    log: Path
    process: int

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def ask(self, path: str, body: Any = None, headers: dict[str, str] | None = None) -> tuple[int, Any]:
        """Status and JSON (or text) of a POST of `body`, or of a GET where there is none."""
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"content-type": "application/json", **(headers or {})})
        try:
            with urllib.request.urlopen(request, timeout=300) as answer:
                status, text = answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            status, text = error.code, error.read().decode()
        try:
            return status, json.loads(text)
        except ValueError:
            return status, text

    def complete(self, prompt: list[int], interventions: Any = None, **body: Any) -> tuple[int, Any]:
        """A greedy completion of token ids, with its tokens and their log-probabilities."""
        steering = {} if interventions is None else {"vllm_xargs": {"relseek": json.dumps(interventions)}}
        asked = {"model": "smollm2", "prompt": prompt, "max_tokens": 12, "temperature": 0, "logprobs": 1, "return_token_ids": True}
        return self.ask("/v1/completions", {**asked, **steering, **body})

    def metric(self, name: str) -> float:
        """The sum of a Prometheus counter."""
        _, text = self.ask("/metrics")
        return sum(float(line.rsplit(" ", 1)[1]) for line in text.splitlines() if line.startswith(name))


def written_vectors(folder: Path) -> dict[str, dict[int, np.ndarray]]:
    """Three files: one vector of block 14, one of block 20, eight of the blocks 8 to 15; random, of lengths that move this model's replies."""
    from relseek_resources.vector_files import write_vectors

    drawn = np.random.default_rng(0)

    def vector(length: float) -> np.ndarray:
        direction = drawn.normal(size=WIDTH).astype(np.float32)
        return direction * np.float32(length / np.linalg.norm(direction))

    vectors = {"warm": {14: vector(30)}, "cold": {20: vector(60)}, "many": {layer: vector(20) for layer in range(8, 16)}}
    for name, by_block in vectors.items():
        write_vectors(folder / f"{name}.safetensors", "safetensors", by_block, {})
    return vectors


@contextlib.contextmanager
def serving(
    folder: Path, vectors: Path, *options: str, configuration: dict[str, Any] | None = None, plugins: str | None = "relseek"
) -> Iterator[Server]:
    """A vLLM server on a free port; it is stopped on every exit. `plugins` is VLLM_PLUGINS, None to leave it unset."""
    from relseek_resources.models.loading import converted

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = {"folder": str(vectors), "vectors": {"warm": "warm.safetensors", "many": "many.safetensors"}, "default": {"vector": "warm"}}
    additional = {"relseek": {**settings, **(configuration or {})}}
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(converted("embedded:smollm2-135m-instruct"))]
    command += ["--served-model-name", "smollm2", "--dtype", "float32", "--max-model-len", "2048", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--additional-config", json.dumps(additional), *options]
    quiet = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "OMP_WAIT_POLICY": "passive"}
    # Bound by itself, vLLM leaves a core to the front end: the half of a machine with two, and too many for three workers.
    bound = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    others = {name: value for name, value in os.environ.items() if name != "VLLM_PLUGINS"}
    environment = {**others, **quiet, **bound, **({} if plugins is None else {"VLLM_PLUGINS": plugins})}
    log = folder / "server.log"
    with log.open("w") as output:
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
    server = Server(port, vectors, log, process.pid)
    try:
        deadline = time.monotonic() + 480
        while True:
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the server did not start:\n{log.read_text()[-4000:]}")
            with contextlib.suppress(OSError):
                if server.ask("/health")[0] == 200:
                    break
            time.sleep(1)
        yield server
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(30)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
