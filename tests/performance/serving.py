"""The embedded engine at 16 clients, each at a dose of its own, against the same engine asked for one reply at a time; and, where there is a GPU, the
op of the vLLM plugin alone against what the GPU's memory can carry."""

from __future__ import annotations

import asyncio
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from relseek_resources import models
from relseek_resources.serving import requests
from relseek_resources.serving.engine import Engine, Request
from relseek_resources.serving.steering_op import Tables
from relseek_resources.serving.vectors import Configuration, digest_of
from relseek_resources.vector_files import write_vectors
from tests.performance.comparison import Comparison, compare

PAIRS, CLIENTS, TOKENS = 8, 16, 32
LAYER, LENGTH = 14, 20.0
TOKENS_OF_A_BATCH, WIDTH, CALLS = 8192, 8192, 50  # a full batch of a 70B model, and ops between two looks at the clock
QUESTIONS = ("Why do leaves turn red in autumn?", "How do I boil an egg?", "What is a prime number?", "Tell me about the moon.")


def comparisons() -> list[Comparison]:
    return [engine_together(), *op_against_bandwidth()]


def engine_together() -> Comparison:
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
            return compare(
                f"serving: embedded engine, {CLIENTS} clients",
                lambda: asyncio.run(together()),
                lambda: asyncio.run(in_turn()),
                pairs=PAIRS,
                amount=CLIENTS,
                unit="replies/s",
                target=4,
            )
        finally:
            engine.close()


def op_against_bandwidth() -> list[Comparison]:
    """The op in bfloat16, every token with a dose, against a copy that moves as many bytes: hidden and residual are read and written once each."""
    if not torch.cuda.is_available():
        print("serving: the op against memory bandwidth: no GPU is here")
        return []
    tables = Tables(tokens=TOKENS_OF_A_BATCH, requests=1, blocks=1, width=WIDTH, capacity=1, device="cuda")
    vector = np.random.default_rng(0).normal(size=WIDTH).astype(np.float32)
    tables.register(digest_of(vector), vector)
    tables.prepare([requests.canonical([requests.Entry(0, "add", digest_of(vector), 2.0**-10)])], np.array([TOKENS_OF_A_BATCH]))
    hidden, residual = (torch.zeros(TOKENS_OF_A_BATCH, WIDTH, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    source = torch.zeros(2 * TOKENS_OF_A_BATCH, WIDTH, dtype=torch.bfloat16, device="cuda")
    target = torch.empty_like(source)

    def steered() -> None:
        for _ in range(CALLS):
            tables.steer(hidden, residual, 0)
        torch.cuda.synchronize()

    def copied() -> None:
        for _ in range(CALLS):
            target.copy_(source)
        torch.cuda.synchronize()

    copied()  # `compare` warms up the op alone
    moved = CALLS * 2 * source.nbytes / 1e9
    found = compare("serving: the op against memory bandwidth", steered, copied, pairs=PAIRS, amount=moved, unit="GB/s", target=0.7)
    return [replace(found, machine=f"{torch.cuda.get_device_name()}, {found.machine}")]


def request(engine: Engine, client: int) -> Request:
    """A client's question at a dose of its own, greedy; the reply ends where the model ends it, or after `TOKENS`."""
    prompt = engine.prompt([{"role": "user", "content": QUESTIONS[client % len(QUESTIONS)]}])
    steering = requests.read([{"vector": "warm", "multiplier": (client - 7.5) / 5}], engine.vectors)
    return Request(prompt, TOKENS, requests.canonical(steering), temperature=0)
