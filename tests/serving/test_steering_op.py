"""The op on a batch of tokens, against the interventions of `SteeredModel` one request at a time."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from relseek_resources.models import Ablate, Add, Ceiling, Floor
from relseek_resources.serving.requests import Entry, canonical
from relseek_resources.serving.steering_op import Tables, steer_plain
from relseek_resources.serving.vectors import digest_of

WIDTH, BLOCKS, LAYER = 48, 5, 3
KINDS = {"add": Add, "floor": Floor, "ceiling": Ceiling, "ablate": Ablate}


def tables(vectors: np.ndarray, requests: int = 8, tokens: int = 256, device: str = "cpu") -> Tables:
    made = Tables(tokens=tokens, requests=requests, blocks=BLOCKS, width=WIDTH, capacity=16, device=device)
    for vector in vectors:
        made.register(digest_of(vector), vector)
    return made


def drawn_entries(rng: np.random.Generator, vectors: np.ndarray) -> tuple[Entry, ...]:
    def one(layer: int) -> Entry:
        mode = str(rng.choice(list(KINDS)))
        value = rng.uniform(0, 1) if mode == "ablate" else rng.uniform(-3, 3)
        return Entry(layer, mode, digest_of(vectors[rng.integers(len(vectors))]), float(np.float32(value)))

    layers = sorted(rng.integers(BLOCKS, size=rng.integers(0, 7)).tolist())
    return tuple(one(layer) for layer in layers)


def hooked(stream: torch.Tensor, entries: tuple[Entry, ...], vectors: np.ndarray, layer: int) -> torch.Tensor:
    """The interventions of `SteeredModel` on one request's stream, (tokens, width)."""
    by_digest = {digest_of(vector): torch.from_numpy(vector) for vector in vectors}
    stream = stream[None]
    for entry in entries:
        if entry.layer == layer:
            vector = by_digest[entry.digest]
            stream = KINDS[entry.mode](vector, layer, entry.value).active(vector, stream.dtype).on(stream, None)
    return stream[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_mixed_batch_is_steered_as_each_request_alone(dtype: torch.dtype) -> None:
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(4, WIDTH)).astype(np.float32)
    made = tables(vectors)
    for _ in range(60):  # more configurations than slots, so that slots are given anew
        requests = [drawn_entries(rng, vectors) for _ in range(rng.integers(1, 9))]
        counts = rng.integers(1, 20, size=len(requests))
        hidden, residual = (torch.from_numpy(rng.normal(size=(counts.sum() + 3, WIDTH)).astype(np.float32)).to(dtype) for _ in range(2))
        before = hidden.clone(), residual.clone()
        made.prepare([canonical(one) for one in requests], counts)
        made.steer(hidden, residual, LAYER)
        start = 0
        for entries, count in zip(requests, counts, strict=True):
            here = slice(start, start + count)
            if any(entry.layer == LAYER for entry in entries):
                expected = hooked(before[0][here] + before[1][here], entries, vectors, LAYER)
                torch.testing.assert_close(hidden[here] + residual[here], expected, rtol=0, atol=1e-5 if dtype == torch.float32 else 0.07)
            else:
                assert torch.equal(hidden[here], before[0][here]) and torch.equal(residual[here], before[1][here])
            start += count
        assert torch.equal(hidden[start:], before[0][start:])  # what pads the batch


def test_a_slot_given_anew_keeps_nothing_of_what_it_held() -> None:
    vectors = np.random.default_rng(1).normal(size=(1, WIDTH)).astype(np.float32)
    made, digest = tables(vectors, requests=1), digest_of(vectors[0])
    many = canonical([Entry(layer, "add", digest, 1.0) for layer in range(BLOCKS) for _ in range(3)])
    for text, blocks in ((many, range(BLOCKS)), (canonical([Entry(1, "add", digest, 2.0)]), [1]), ("", []), (many, range(BLOCKS)), ("", [])):
        made.prepare([text], np.array([2]))
        for layer in range(BLOCKS):
            hidden, residual = torch.zeros(4, WIDTH), torch.zeros(4, WIDTH)
            made.steer(hidden, residual, layer)
            expected = {many: 3.0}.get(text, 2.0) if layer in blocks else 0.0
            torch.testing.assert_close(residual[:2], expected * torch.from_numpy(vectors).expand(2, -1))
            assert not residual[2:].any()


def test_a_shorter_batch_leaves_no_steered_token_behind() -> None:
    vectors = np.random.default_rng(2).normal(size=(1, WIDTH)).astype(np.float32)
    made = tables(vectors)
    text = canonical([Entry(LAYER, "add", digest_of(vectors[0]), 1.0)])
    for texts, counts in (([text], [9]), ([text, ""], [1, 2]), ([""], [9]), (["", text], [1, 1])):
        made.prepare(texts, np.array(counts))
        steered = [bool(text) for text, count in zip(texts, counts, strict=True) for _ in range(count)]
        assert made.slot_of_token.bool().tolist() == steered + [False] * (256 - len(steered))


def test_a_vector_that_is_not_there_is_no_silent_nothing() -> None:
    with pytest.raises(KeyError):
        tables(np.empty((0, WIDTH), np.float32)).prepare([canonical([Entry(1, "add", "unknown", 1.0)])], np.array([1]))


def test_the_op_works_inside_a_compiled_function() -> None:
    from relseek_resources.serving.steering_op import TABLES

    vectors = np.random.default_rng(3).normal(size=(1, WIDTH)).astype(np.float32)
    number = len(TABLES)
    TABLES[number] = made = tables(vectors)

    def block(x: torch.Tensor) -> torch.Tensor:
        hidden, residual = x * 2, x + 1
        torch.ops.relseek.steer(hidden, residual, LAYER, number)
        return hidden + residual

    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    x = torch.randn(5, WIDTH)
    for dose in (0.0, 1.0, -2.0):
        text = canonical([Entry(LAYER, "add", digest_of(vectors[0]), dose)]) if dose else ""
        made.prepare([text], np.array([5]))
        torch.testing.assert_close(compiled(x), x * 3 + 1 + dose * torch.from_numpy(vectors))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU is here")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_recorded_graph_steers_by_the_tables_of_its_replay(dtype: torch.dtype) -> None:
    from relseek_resources.serving.steering_op import TABLES

    rng = np.random.default_rng(5)
    vectors = rng.normal(size=(4, WIDTH)).astype(np.float32)
    on_cpu, on_gpu = tables(vectors), tables(vectors, device="cuda")
    number = len(TABLES)
    TABLES[number] = on_gpu
    hidden, residual = (torch.zeros(32, WIDTH, dtype=dtype, device="cuda") for _ in range(2))
    torch.ops.relseek.steer(hidden, residual, LAYER, number)  # compiled before it is recorded
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        torch.ops.relseek.steer(hidden, residual, LAYER, number)
    steered = 0
    for _ in range(20):
        requests = [drawn_entries(rng, vectors) for _ in range(rng.integers(1, 9))]
        counts = rng.integers(1, 5, size=len(requests))
        plain = tuple(torch.from_numpy(rng.normal(size=(32, WIDTH)).astype(np.float32)).to(dtype) for _ in range(2))
        hidden.copy_(plain[0])
        residual.copy_(plain[1])
        for one in (on_cpu, on_gpu):
            one.prepare([canonical(request) for request in requests], counts)
        graph.replay()
        before = plain[0].clone()
        on_cpu.steer(*plain, LAYER)
        steered += int((plain[0] != before).any(-1).sum())
        assert torch.equal(hidden.cpu(), plain[0])
        near = {"rtol": 0, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 2**-6, "atol": 2**-4}
        torch.testing.assert_close(residual.cpu(), plain[1], **near)
    assert steered > 20


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed; vLLM brings it")
def test_the_kernel_computes_what_torch_computes() -> None:
    """In Triton's interpreter, which needs no GPU but an environment variable set before triton is imported."""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    subprocess.run([sys.executable, "-m", "tests.serving.interpreted"], env=environment, check=True, cwd=Path(__file__).parents[2])


def compare_kernel() -> None:
    """The kernel against `steer_plain`, on batches of mixed requests."""
    from relseek_resources.serving.steering_op import _launch

    rng = np.random.default_rng(4)
    vectors = rng.normal(size=(4, WIDTH)).astype(np.float32)
    for dtype in (torch.float32, torch.float16):  # the interpreter cuts bfloat16 off where a GPU rounds it
        made, steered = tables(vectors), 0
        for _ in range(8):
            requests = [drawn_entries(rng, vectors) for _ in range(4)]
            counts = rng.integers(1, 4, size=4)
            made.prepare([canonical(one) for one in requests], counts)
            hidden, residual = (torch.from_numpy(rng.normal(size=(counts.sum() + 2, WIDTH)).astype(np.float32)).to(dtype) for _ in range(2))
            plain = hidden.clone(), residual.clone()
            steer_plain(made, *plain, LAYER)
            steered += int((plain[0] != hidden).any(-1).sum())
            _launch(made, hidden, residual, LAYER)
            assert torch.equal(hidden, plain[0])
            torch.testing.assert_close(residual, plain[1], rtol=0, atol=1e-5 if dtype == torch.float32 else 2**-7)
        assert steered > 10
