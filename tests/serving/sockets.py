"""An ASGI application on a real socket, in a thread of the test's own process."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from relseek_resources.serving.requests import Limits
from relseek_resources.serving.vectors import Configuration
from relseek_resources.vector_files import write_vectors

DOSES = Limits(dose=2.0)


@contextlib.contextmanager
def listening(app: Any, log_level: str = "warning") -> Iterator[str]:
    """The application's address until the block ends."""
    import uvicorn

    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(app, log_level=log_level, server_header=False, timeout_graceful_shutdown=2))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]}, daemon=True)
        thread.start()
        while not server.started:
            assert thread.is_alive(), "the server did not start"
            time.sleep(0.01)
        try:
            yield f"http://127.0.0.1:{bound.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(30)


def two_vectors(folder: Path, width: int = 64) -> Configuration:
    """A configuration of two random vectors after the blocks 1 and 2 of a tiny model, `warm` the default."""
    drawn = np.random.default_rng(4)
    for name, layer in (("warm", 1), ("cold", 2)):
        write_vectors(folder / f"{name}.safetensors", "safetensors", {layer: 3 * drawn.normal(size=width).astype(np.float32)}, {})
    return Configuration(folder, {"warm": "warm.safetensors", "cold": "cold.safetensors"}, {"vector": "warm"}, limits=DOSES)
