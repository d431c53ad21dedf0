"""vLLM short of memory: prompts computed in pieces, requests put back and computed anew, clients that go away; all of it steered as ever."""

from __future__ import annotations

import random
import socket
import threading
from pathlib import Path
from typing import Any

import pytest

from relseek_resources.models import load
from tests.serving import hostile
from tests.serving.reference import drawn, prompts, shortfall
from tests.serving.reference import hooked as interventions_of
from tests.serving.served import NEEDS_VLLM, serving

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
    tight = ["--max-model-len", "640", "--num-gpu-blocks-override", str(BLOCKS), "--max-num-batched-tokens", str(CHUNK), "--max-num-seqs", "16"]
    with serving(tmp_path, vector_folder[0], "--enforce-eager", *tight) as server:
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
            with concurrent.futures.ThreadPoolExecutor(CLIENTS) as clients:
                answers = list(clients.map(lambda one: server.complete(*one, max_tokens=REPLY, ignore_eos=True), asked))
        finally:
            stop.set()
            leaving.join()
        preempted = server.metric("vllm:num_preemptions_total")
    worst = 0.0
    for (prompt, interventions), (status, answer) in zip(asked, answers, strict=True):
        assert status == 200, answer
        choice = answer["choices"][0]
        own, short = shortfall(model, prompt, choice["token_ids"], interventions_of(interventions, vector_folder[1]))
        assert len(own) == REPLY and short.max() < 1e-4
        worst = max(worst, float(abs(own - choice["logprobs"]["token_logprobs"]).max()))
    print(f"{REQUESTS} requests, {preempted:.0f} preemptions, log-probabilities within {worst:.1e}")
    # As in test_plugin.py. 2.2e-4 was measured here, every token the likeliest one: until the cause is known this fails where vLLM is installed.
    assert worst < 1e-4
    assert preempted > 0
