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


def test_chunks_preemption_and_aborts_change_no_reply(tmp_path: Path, vector_folder: tuple[Path, Any]) -> None:
    import concurrent.futures

    model = load("embedded:smollm2-135m-instruct")
    rng = random.Random(6)
    pool = prompts(rng, model.tokenizer)
    asked = [(rng.choice(pool), drawn(rng)) for _ in range(REQUESTS)]
    room = ["--enforce-eager", "--max-model-len", "640", "--max-num-seqs", "16"]

    def replies(server: Server) -> list[tuple[int, Any]]:
        with concurrent.futures.ThreadPoolExecutor(CLIENTS) as clients:
            return list(clients.map(lambda one: server.complete(*one, max_tokens=REPLY, ignore_eos=True), asked))

    with serving(tmp_path, vector_folder[0], *room) as server:
        expected = replies(server)
        assert not server.metric("vllm:num_preemptions_total")
    with serving(tmp_path, vector_folder[0], *room, "--num-gpu-blocks-override", str(BLOCKS), "--max-num-batched-tokens", str(CHUNK)) as server:
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
            answers = replies(server)
        finally:
            stop.set()
            leaving.join()
        preempted = server.metric("vllm:num_preemptions_total")
    moved, short_of = [], []
    for (prompt, interventions), (status, answer), (_, roomy) in zip(asked, answers, expected, strict=True):
        assert status == 200, answer
        choice, whole = answer["choices"][0], roomy["choices"][0]
        assert choice["token_ids"] == whole["token_ids"] and len(whole["token_ids"]) == REPLY
        log_probs = np.array(choice["logprobs"]["token_logprobs"])
        moved.append(abs(log_probs - whole["logprobs"]["token_logprobs"]).max())
        own, short = shortfall(model, prompt, choice["token_ids"], interventions_of(interventions, vector_folder[1]))
        assert short.max() < 1e-4, "every token is the hooks' likeliest one"
        short_of.append(abs(own - log_probs))
    whole_replies = max(found.max() for found in short_of)
    print(f"{REQUESTS} requests, {preempted:.0f} preemptions: log-probabilities moved by {max(moved):.1e}; off the hooks' by {whole_replies:.1e}")
    assert preempted > 0
    assert max(moved) < 1e-4
    # As in test_plugin.py. One token, where a reply leaves a loop of a hundred equal words, is 2.2e-4 off with and without preemption, and just as
    # much on vLLM without the plugin and with the steering added to the weights: until that is no more so, this fails where vLLM is installed.
    assert whole_replies < 1e-4
