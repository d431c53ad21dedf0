"""What steering costs in vLLM: the plugin steering, the plugin idle and no plugin, by turns; and many configurations against one.

Two engines stay resident, one with the plugin and one without, and answer short bursts of equal requests in turn, so that what slows the machine
slows both. Only one computes at a time. Beside the time by the clock stands the processor's, which other people's work disturbs less.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from relseek_resources.vector_files import write_vectors
from tests.performance.comparison import Comparison, machine

WIDTH, BLOCKS = 576, 30
ROUNDS, REQUESTS, TOKENS = 20, 16, 24
MANY, MANY_TOKENS, MANY_ROUNDS = 256, 6, 6
CONFIGURATIONS = (8, 32, 256)
LENGTH = 20.0  # of a vector; the stream's own after block 14 is about 100
TARGET, TARGET_MANY = 0.97, 0.9
RESAMPLED = 5000
Steering = list[dict[str, Any]]
Way = Callable[[], dict[str, float]]


def comparisons() -> list[Comparison]:
    if importlib.util.find_spec("vllm") is None:
        print("serving: vLLM is not installed: make serve-env")
        return []
    with tempfile.TemporaryDirectory() as folder:
        files = written(Path(folder))
        with running(folder, files, plugin=True) as ours, running(folder, files, plugin=False) as plain:
            return [*overhead(ours, plain), *configurations(ours)]


def overhead(ours: Engine, plain: Engine) -> list[Comparison]:
    """Steered requests, each at a dose of its own, and unsteered ones with the plugin, and unsteered ones without it."""
    rng = random.Random(0)
    doses = [[{"vector": "v0", "multiplier": round(rng.uniform(-2, 2), 3)}] for _ in range(REQUESTS)]
    mixed = [mix(rng) for _ in range(REQUESTS)]
    nothing: list[Steering] = [[] for _ in range(REQUESTS)]
    ways = {
        "steered, a dose each": ours.ready(doses, TOKENS),
        "steered, all modes and blocks": ours.ready(mixed, TOKENS),
        "unsteered": ours.ready(nothing, TOKENS),
        "no plugin": plain.ready(nothing, TOKENS),
    }
    pairs = [(one, other) for one, other in (("steered, a dose each", "unsteered"), ("steered, a dose each", "no plugin"))]
    pairs += [("steered, all modes and blocks", "no plugin"), ("unsteered", "no plugin")]
    return compared(ways, pairs, rounds=ROUNDS, tokens=REQUESTS * TOKENS, steps=TOKENS, target=TARGET)


def configurations(ours: Engine) -> list[Comparison]:
    """The same number of requests, in so many configurations: vectors by doses by blocks."""
    several = {number: distinct(number) for number in (1, *CONFIGURATIONS)}
    ways = {
        f"{number} configurations": ours.ready([found[place % number] for place in range(MANY)], MANY_TOKENS) for number, found in several.items()
    }
    pairs = [(f"{number} configurations", "1 configurations") for number in CONFIGURATIONS]
    return compared(ways, pairs, rounds=MANY_ROUNDS, tokens=MANY * MANY_TOKENS, steps=MANY_TOKENS, target=TARGET_MANY)


def compared(ways: Mapping[str, Way], pairs: Sequence[tuple[str, str]], *, rounds: int, tokens: int, steps: int, target: float) -> list[Comparison]:
    """All ways once a round, in an order drawn for each round; ratios of medians, with intervals from resampled rounds."""
    rng = random.Random(1)
    found: dict[str, list[dict[str, float]]] = {name: [] for name in ways}
    for number in range(-1, rounds):  # one to warm up
        for name in rng.sample(list(ways), len(ways)):
            took = ways[name]()
            if number >= 0:
                found[name].append(took)
    for name, bursts in found.items():
        each = np.median([took["seconds"] for took in bursts]) / steps
        print(f"  {name:32} {tokens / steps / each:7.1f} tokens/s, {1000 * each:6.1f} ms a token of each request")
    ratios = [_ratio(found, one, other, clock, tokens, target) for one, other in pairs for clock in ("seconds", "processor")]
    return [*ratios, *(_each_token(ratio, tokens / steps) for ratio in ratios[::2])]


def _each_token(throughput: Comparison, requests: float) -> Comparison:
    """The same by the time that a token of each of so many requests takes; `ratio` stays other / ours, so that more is better."""
    ours, other = (1000 * requests / rate for rate in (throughput.ours, throughput.other))
    return replace(throughput, name=throughput.name.replace("(wall)", "(a token of each)"), ours=ours, other=other, unit="ms")


def _ratio(found: Mapping[str, list[dict[str, float]]], one: str, other: str, clock: str, tokens: int, target: float) -> Comparison:
    """Throughput of one over the other, tokens for each second of a clock."""
    ours, theirs = (np.array([took[clock] for took in found[name]]) for name in (one, other))
    drawn = np.random.default_rng(0).integers(len(ours), size=(RESAMPLED, len(ours)))  # rounds: both of a round are drawn together
    lower, upper = np.quantile(np.median(theirs[drawn], axis=1) / np.median(ours[drawn], axis=1), [0.025, 0.975])
    return Comparison(
        name=f"serving: vLLM {one} / {other} ({'wall' if clock == 'seconds' else clock})",
        ours=tokens / float(np.median(ours)),
        other=tokens / float(np.median(theirs)),
        ratio=float(np.median(theirs) / np.median(ours)),
        lower=float(lower),
        upper=float(upper),
        pairs=len(ours),
        unit="tokens/s",
        target=target,
        machine=machine(),
    )


def distinct(number: int) -> list[Steering]:
    """Vectors, doses and blocks in turn, so that a few configurations already differ in all three."""
    return [
        [{"vector": f"v{place % 8}", "multiplier": 0.25 * (1 + place // 32), "layers": [8 + place % 4 * 4 + place // 8 % 4]}]
        for place in range(number)
    ]


def mix(rng: random.Random) -> Steering:
    """One to three interventions of any mode, each after one block or four."""

    def one() -> dict[str, Any]:
        how: dict[str, Any] = {"vector": f"v{rng.randrange(8)}", "layers": sorted(rng.sample(range(BLOCKS), rng.choice([1, 4])))}
        mode = rng.choice(["add", "floor", "ceiling", "ablate"])
        number = {"add": ("multiplier", rng.uniform(-2, 2)), "ablate": ("strength", rng.random())}.get(mode, ("threshold", rng.uniform(-8, 8)))
        return {**how, "mode": mode, number[0]: number[1]}

    return [one() for _ in range(rng.choice([1, 2, 3]))]


def written(folder: Path) -> dict[str, str]:
    drawn = np.random.default_rng(0)
    for number in range(8):
        vector = drawn.normal(size=WIDTH)
        write_vectors(folder / f"v{number}.safetensors", "safetensors", {14: (vector * LENGTH / np.linalg.norm(vector)).astype(np.float32)}, {})
    return {f"v{number}": f"v{number}.safetensors" for number in range(8)}


@dataclass
class Engine:
    """An engine in a process of its own; see `vllm_engine`."""

    process: subprocess.Popen[str]
    bursts: int = 0

    def ready(self, steering: Sequence[Steering], tokens: int) -> Way:
        return lambda: self.ask({"steering": list(steering), "tokens": tokens})

    def ask(self, asked: dict[str, Any]) -> dict[str, float]:
        assert self.process.stdin is not None
        self.bursts += 1
        self.process.stdin.write(json.dumps({**asked, "seed": self.bursts}) + "\n")
        self.process.stdin.flush()
        return self.hear()

    def hear(self) -> dict[str, float]:
        assert self.process.stdout is not None
        for line in self.process.stdout:  # vLLM prints beside it
            if line.startswith("{"):
                return json.loads(line)
        raise RuntimeError(f"the engine ended with {self.process.wait()}; run `python -m tests.performance.vllm_engine` to see why")


@contextlib.contextmanager
def running(folder: str, files: dict[str, str], *, plugin: bool) -> Iterator[Engine]:
    settings = {"plugin": plugin, "vectors": folder, "files": files, "eager": True, "requests": MANY}
    environment = {
        **os.environ,
        "VLLM_PLUGINS": "relseek" if plugin else "",
        "VLLM_USE_V2_MODEL_RUNNER": "0",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # one process, of which all processor time is the burst's
        "VLLM_CPU_KVCACHE_SPACE": "2",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_WAIT_POLICY": "passive",  # a thread that waits does not count as work
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
    }
    command = [sys.executable, "-m", "tests.performance.vllm_engine", json.dumps(settings)]
    process = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    engine = Engine(process)
    try:
        engine.hear()
        yield engine
    finally:
        process.kill()
        process.wait()
