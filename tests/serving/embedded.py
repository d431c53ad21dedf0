"""The embedded engine's server over a real socket, and requests to it as they are written by hand."""

from __future__ import annotations

import contextlib
import json
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from relseek_resources.models import SteeredModel
from relseek_resources.serving.engine import Engine
from relseek_resources.serving.guard import Settings
from relseek_resources.serving.server import create_app
from relseek_resources.serving.vectors import Configuration
from relseek_resources.vector_files import write_vectors
from tests.serving import hostile
from tests.serving.sockets import listening

CHAT = "/v1/chat/completions"
HELLO = [{"role": "user", "content": "Hello"}]


@dataclass(frozen=True)
class EmbeddedServer:
    port: int
    engine: Engine
    vectors: dict[str, dict[int, np.ndarray]]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def ask(self, path: str, body: Any = None, headers: dict[str, str] | None = None) -> tuple[int, Any, dict[str, str]]:
        """Status, JSON and headers of a POST of `body`, or of a GET where there is none."""
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"content-type": "application/json", **(headers or {})})
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return answer.status, json.loads(answer.read()), dict(answer.headers)
        except urllib.error.HTTPError as error:
            return error.code, json.loads(error.read()), dict(error.headers)

    def chat(self, **body: Any) -> tuple[int, Any, dict[str, str]]:
        return self.ask(CHAT, {"model": "tiny", "messages": HELLO, "max_tokens": 8, "temperature": 0, **body})

    def raw(self, content: bytes, *, wait: float = 20.0) -> bytes:
        """What comes back for bytes sent as they are, until the server closes or `wait` is over."""
        return hostile.raw(self.port, content, wait=wait)


def steered(*interventions: dict[str, Any]) -> dict[str, Any]:
    return {"vllm_xargs": {"relseek": json.dumps(list(interventions))}}


def written_vectors(folder: Path, width: int, layers: Sequence[int]) -> dict[str, dict[int, np.ndarray]]:
    """Two files: `warm`, one vector of the first of `layers`, and `many`, one for each."""
    drawn = np.random.default_rng(1)
    vectors = {
        "warm": {layers[0]: drawn.normal(size=width).astype(np.float32)},
        "many": {layer: drawn.normal(size=width).astype(np.float32) for layer in layers},
    }
    for name, by_block in vectors.items():
        write_vectors(folder / f"{name}.safetensors", "safetensors", by_block, {})
    return vectors


@contextlib.contextmanager
def serving(
    model: SteeredModel, folder: Path, settings: Settings | None = None, layers: Sequence[int] = (1, 2), **options: Any
) -> Iterator[EmbeddedServer]:
    """A server of `model` on a free port, for as long as the context lasts."""
    vectors = written_vectors(folder, model.width, layers)
    files = {name: f"{name}.safetensors" for name in vectors}
    with engine_of(model, Configuration(folder, files, {"vector": "warm"}), **options) as engine:
        with listening(create_app(engine, settings or Settings(rate=0)), "critical") as url:
            yield EmbeddedServer(int(url.rpartition(":")[2]), engine, vectors)


@contextlib.contextmanager
def engine_of(model: SteeredModel, configuration: Configuration, **options: Any) -> Iterator[Engine]:
    engine = Engine(model, configuration, **{"name": "tiny", "length": 512, **options})
    try:
        yield engine
    finally:
        engine.close()
