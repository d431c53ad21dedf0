"""vLLM short of memory: prompts computed in pieces, requests put back and computed anew, clients that go away; all of it steered as ever."""

from __future__ import annotations

import random
import socket
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from relseek_resources.models import load
from tests.serving import hostile
from tests.serving.reference import drawn, prompts, shortfall
from tests.serving.reference import hooked as interventions_of
from tests.serving.served import NEEDS_VLLM, Server, serving

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600), NEEDS_VLLM]

REQUESTS, CLIENTS, REPLY = 16, 12, 140  # a reply is longer than a block of 128 tokens, so that it needs one more as it grows
BLOCKS = 9  # of the cache: three or four requests fit when they begin, two when they end
CHUNK = 48  # tokens of a batch


@pytest.fixture(scope="module")
def asked() -> list[tuple[list[int], list[dict[str, Any]]]]:
    rng = random.Random(6)
    pool = prompts(rng, load("embedded:smollm2-135m-instruct").tokenizer)
    return [(rng.choice(pool), drawn(rng)) for _ in range(REQUESTS)]


@pytest.fixture(scope="module")
def with_room_and_without(tmp_path_factory: pytest.TempPathFactory, vector_folder: tuple[Path, Any], asked: list[Any]) -> tuple[list[Any], list[Any]]:
    """The answers of a server with room for all, and of one that has to put requests back while other clients go away."""
    import concurrent.futures

    room = ["--enforce-eager", "--max-model-len", "640", "--max-num-seqs", "16"]

    def replies(server: Server) -> list[Any]:
        with concurrent.futures.ThreadPoolExecutor(CLIENTS) as clients:
            found = list(clients.map(lambda one: server.complete(*one, max_tokens=REPLY, ignore_eos=True), asked))
        assert {status for status, _ in found} == {200}, found
        return [answer["choices"][0] for _, answer in found]

    with serving(tmp_path_factory.mktemp("room"), vector_folder[0], *room) as server:
        expected = replies(server)
        assert not server.metric("vllm:num_preemptions_total")
    short = ["--num-gpu-blocks-override", str(BLOCKS), "--max-num-batched-tokens", str(CHUNK)]
    with serving(tmp_path_factory.mktemp("short"), vector_folder[0], *room, *short) as server:
        stop = threading.Event()

        def leave_early() -> None:
            while not stop.is_set():
                body = b'{"model": "smollm2", "prompt": "Once upon a time", "max_tokens": 400, "stream": true, "custom": {"steer_multiplier": 2}}'
                with socket.create_connection(("127.0.0.1", server.port), timeout=60) as connection:
                    connection.sendall(hostile.head(len(body), "/v1/completions") + body)
                    connection.recv(2000)
                stop.wait(1)

        leaving = threading.Thread(target=leave_early)
        leaving.start()
        try:
            found = replies(server)
        finally:
            stop.set()
            leaving.join()
        assert server.metric("vllm:num_preemptions_total") > 0
    return expected, found


@pytest.fixture(scope="module")
def off_the_hooks(asked: list[Any], with_room_and_without: tuple[list[Any], list[Any]], vector_folder: tuple[Path, Any]) -> np.ndarray:
    """How far each token's log-probability is from the hooks', (requests, tokens), once every token is seen to be the hooks' likeliest one."""
    model, found = load("embedded:smollm2-135m-instruct"), []
    for (prompt, interventions), choice in zip(asked, with_room_and_without[1], strict=True):
        own, short = shortfall(model, prompt, choice["token_ids"], interventions_of(interventions, vector_folder[1]))
        assert short.max() < 1e-4
        found.append(abs(own - log_probs_of(choice)))
    return np.array(found)


def log_probs_of(choice: Any) -> np.ndarray:
    return np.array(choice["logprobs"]["token_logprobs"])


def test_chunks_preemption_and_aborts_change_no_reply(with_room_and_without: tuple[list[Any], list[Any]]) -> None:
    for roomy, choice in zip(*with_room_and_without, strict=True):
        assert choice["token_ids"] == roomy["token_ids"] and len(choice["token_ids"]) == REPLY
        assert abs(log_probs_of(choice) - log_probs_of(roomy)).max() < 1e-4


def test_all_but_one_token_in_a_thousand_is_within_the_bound_of_the_hooks(off_the_hooks: np.ndarray) -> None:
    assert (off_the_hooks < 1e-4).mean() > 0.999


@pytest.mark.xfail(strict=True, reason="2.2e-4 at one token that ends a loop of a hundred equal words; vLLM without the plugin is as far off there")
def test_whole_replies_are_within_the_bound_of_the_hooks(off_the_hooks: np.ndarray) -> None:
    """As in test_plugin.py. The distance is that of vLLM without the plugin, its weights changed to add the same vectors, and is there without
    preemption too."""
    assert off_the_hooks.max() < 1e-4
