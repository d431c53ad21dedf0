"""What nobody should send, sent to vLLM with the plugin: it refuses in words, goes on answering, and grows no larger."""

from __future__ import annotations

import concurrent.futures
import json
import os
import random
import socket
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from relseek_resources.models import load
from tests.serving import hostile
from tests.serving.reference import WORDS, hooked, shortfall
from tests.serving.served import NEEDS_VLLM, Server

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600), NEEDS_VLLM]

REQUESTS = int(os.environ.get("RELSEEK_HOSTILE_REQUESTS", "2000"))
LARGE = 50 << 20  # bytes
NEAR_TIE = 1e-4  # nats


def memory(server: Server) -> int:
    """Resident bytes of the server's processes."""
    leader = psutil.Process(server.process)
    return sum(process.memory_info().rss for process in [leader, *leader.children(recursive=True)])


def answers(server: Server) -> str:
    body = {"model": "smollm2", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 6, "temperature": 0}
    status, answer = server.ask(hostile.CHAT, {**body, "custom": {"steer_multiplier": 1}})
    assert status == 200, answer
    return answer["choices"][0]["message"]["content"]


def large_bodies() -> dict[str, bytes]:
    chat = {"model": "smollm2", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 1}
    return {
        "no JSON": b"x" * LARGE,
        "a long message": json.dumps({**chat, "messages": [{"role": "user", "content": "a" * LARGE}]}).encode(),
        "a long list of interventions": json.dumps({**chat, "vllm_xargs": {"relseek": "[" + "1," * (LARGE // 2) + "1]"}}).encode(),
        "a long vector's name": json.dumps({**chat, "vllm_xargs": {"relseek": json.dumps([{"vector": "v" * LARGE}])}}).encode(),
        "a long published dose": json.dumps({**chat, "custom": {"steer_multiplier": "9" * LARGE}}).encode(),
    }


def test_two_thousand_malformed_requests_leave_it_as_it_was(server: Server) -> None:
    before = answers(server)
    quarter = REQUESTS // 4
    found = hostile.ask_fuzzed(server.port, "smollm2", range(quarter))
    for what, body in large_bodies().items():
        assert server.ask(hostile.CHAT, body)[0] == 413, what
    first = memory(server)
    found += hostile.ask_fuzzed(server.port, "smollm2", range(quarter, REQUESTS))
    for what, body in large_bodies().items():
        assert server.ask(hostile.CHAT, body)[0] == 413, what
    last = memory(server)
    print(f"{REQUESTS} malformed requests: {dict(found)}; resident {first / 2**20:.0f} MiB, then {last / 2**20:.0f} MiB")
    assert found[400] > REQUESTS // 2
    assert last < 1.05 * first
    assert answers(server) == before


def test_clients_that_never_finish_their_bodies_hold_nobody_up(server: Server) -> None:
    before = answers(server)
    slow = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(64)]
    try:
        for place, connection in enumerate(slow):
            connection.sendall(hostile.head(5000) + b'{"model": "smollm2", "messages": ['[: place % 30])
        start = time.monotonic()
        assert answers(server) == before
        assert time.monotonic() - start < 60
    finally:
        for connection in slow:
            connection.close()
    assert answers(server) == before


PATHS = ["../warm", "/etc/passwd", "warm/../warm", "warm\0", "~/warm", "%2e%2e/warm", "w" * 100_000]


@pytest.mark.parametrize("name", PATHS)
def test_a_vectors_name_is_never_a_path(server: Server, name: str) -> None:
    refusals = [
        server.complete([1, 2, 3], [{"vector": name}], max_tokens=1),
        server.ask("/v1/relseek/vectors", {"name": name, "file": "warm.safetensors"}),
        server.ask("/v1/relseek/vectors", {"name": "new", "file": name}),
    ]
    for status, answer in refusals:
        assert status == 400 and answer["error"]["message"]
        assert "root:" not in json.dumps(answer) and len(json.dumps(answer)) < 2000


def test_thirty_two_conversations_at_doses_of_their_own_never_cross(server: Server, vector_folder: tuple[Path, Any]) -> None:
    """Each conversation carries a tag in its words and a dose, over three turns; every turn is what the reference says to that very conversation."""
    reference = load("embedded:smollm2-135m-instruct")

    def converse(tag: int) -> list[tuple[list[int], list[int], list[dict[str, Any]]]]:
        rng = random.Random(tag)
        dose = round(rng.uniform(-2, 2), 2)
        turns: list[dict[str, str]] = []
        found = []
        for _ in range(3):
            turns.append({"role": "user", "content": f"tag {tag} " + " ".join(rng.choice(WORDS) for _ in range(rng.randrange(2, 40)))})
            body = {"model": "smollm2", "messages": turns, "max_tokens": rng.randrange(4, 12), "temperature": 0, "return_token_ids": True}
            status, answer = server.ask(hostile.CHAT, {**body, "custom": {"steer_multiplier": dose}})
            assert status == 200, answer
            assert answer["prompt_token_ids"] == reference.prompt_tokens(turns)
            found.append((answer["prompt_token_ids"], answer["choices"][0]["token_ids"], [{"vector": "warm", "layers": [14], "multiplier": dose}]))
            turns.append({"role": "assistant", "content": answer["choices"][0]["message"]["content"]})
        return found

    with concurrent.futures.ThreadPoolExecutor(32) as pool:
        conversations = list(pool.map(converse, range(32)))
    for prompt, reply, interventions in (turn for turns in conversations for turn in turns):
        _, short = shortfall(reference, prompt, reply, hooked(interventions, vector_folder[1]))
        assert short.max() < NEAR_TIE
