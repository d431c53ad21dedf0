"""The embedded engine at 16 clients, each at a dose of its own, against the same engine asked for one reply at a time."""

from __future__ import annotations

import asyncio
import tempfile
from pathlib import Path

import numpy as np

from relseek_resources import models
from relseek_resources.serving import requests
from relseek_resources.serving.engine import Engine, Request
from relseek_resources.serving.vectors import Configuration
from relseek_resources.vector_files import write_vectors
from tests.performance.comparison import Comparison, compare

PAIRS, CLIENTS, TOKENS = 8, 16, 32
LAYER, LENGTH = 14, 20.0
QUESTIONS = ("Why do leaves turn red in autumn?", "How do I boil an egg?", "What is a prime number?", "Tell me about the moon.")


def comparisons() -> list[Comparison]:
    model = models.load("embedded:smollm2-135m-instruct", device="cpu")
    vector = np.random.default_rng(0).normal(size=model.width)
    with tempfile.TemporaryDirectory() as folder:
        write_vectors(Path(folder) / "warm.safetensors", "safetensors", {LAYER: (vector * LENGTH / np.linalg.norm(vector)).astype(np.float32)}, {})
        engine = Engine(model, Configuration(Path(folder), {"warm": "warm.safetensors"}), name="smollm2")
        asked = [request(engine, client) for client in range(CLIENTS)]

        async def together() -> None:
            await asyncio.gather(*(engine.reply(one) for one in asked))

        async def in_turn() -> None:
            for one in asked:
                await engine.reply(one)

        try:
            return [
                compare(
                    f"embedded engine, {CLIENTS} clients",
                    lambda: asyncio.run(together()),
                    lambda: asyncio.run(in_turn()),
                    pairs=PAIRS,
                    amount=CLIENTS,
                    unit="replies/s",
                    target=4,
                )
            ]
        finally:
            engine.close()


def request(engine: Engine, client: int) -> Request:
    """A client's question at a dose of its own, greedy; the reply ends where the model ends it, or after `TOKENS`."""
    prompt = engine.prompt([{"role": "user", "content": QUESTIONS[client % len(QUESTIONS)]}])
    steering = requests.read([{"vector": "warm", "multiplier": (client - 7.5) / 5}], engine.vectors)
    return Request(prompt, TOKENS, requests.canonical(steering), temperature=0)
