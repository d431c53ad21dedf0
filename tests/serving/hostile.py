"""What either server is sent that it cannot serve: bodies wrong in one place or several, bodies that do not end, names that are paths.

Both engines are asked the same. What differs between them is the model's name and the routes, which are arguments.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import random
import socket
from collections import Counter
from collections.abc import Iterable
from typing import Any

CHAT = "/v1/chat/completions"
WRONG = [
    None,
    True,
    -1,
    0,
    1e308,
    10**400,
    float("nan"),
    float("inf"),
    "",
    "x",
    "\ud800",
    "[" * 2000,
    [],
    [[]],
    {},
    {"a": {}},
    [None] * 50,
    "\0",
    "../../x",
    "/etc/passwd",
]
NAMES = ["model", "messages", "max_tokens", "temperature", "top_p", "n", "seed", "stop", "stream", "logprobs", "top_logprobs", "custom"]
UNKNOWN = ["x", "", "\ud800", "steer\ud800", "relseek\udfff", "a\0b", "\U0001f600", "x" * 2000, "__proto__"]  # a field's name
ANSWERS = (200, 400, 404)


def fuzzed(rng: random.Random, model: str) -> bytes:
    """A body that is wrong in one place or several."""
    body: dict[str, Any] = {"model": model, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 2, "temperature": 0}
    one: dict[str, Any] = {"vector": "warm", "multiplier": 1}
    for _ in range(rng.choice([1, 1, 2, 3])):
        place, value = rng.randrange(7), rng.choice(WRONG)
        if place < 3:
            body[rng.choice([*NAMES, "vllm_xargs", "tools", *UNKNOWN])] = rng.choice([value, {rng.choice(UNKNOWN): value}])
        elif place == 3 and isinstance(body["messages"], list):
            strange = {"role": "user", "content": "x", rng.choice(UNKNOWN): value}
            body["messages"] = [*body["messages"], rng.choice([value, {"role": value, "content": "x"}, {"role": "user", "content": value}, strange])]
        elif place == 4:
            one[rng.choice(["vector", "layers", "multiplier", "mode", "threshold", "strength", *UNKNOWN])] = value
        elif place == 5:
            body["vllm_xargs"] = {rng.choice(["relseek", "relseek", *UNKNOWN]): rng.choice([json.dumps([one]), [one], value, json.dumps(value)])}
        else:
            body["custom"] = rng.choice([{"steer_multiplier": value}, {rng.choice(UNKNOWN): value}, value])
    content = json.dumps(body).encode()
    cut = rng.random()
    if cut < 0.1:
        return content[: rng.randrange(len(content))]
    return bytes(rng.randbytes(20)) + content if cut < 0.15 else content


def head(length: int, path: str = CHAT) -> bytes:
    return (
        f"POST {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\ncontent-type: application/json\r\ncontent-length: {length}\r\n\r\n".encode()
    )


def raw(port: int, content: bytes, *, wait: float = 20.0) -> bytes:
    """What comes back for bytes sent as they are, until the server closes or `wait` is over."""
    with socket.create_connection(("127.0.0.1", port), timeout=wait) as connection:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            connection.sendall(content)
        found = b""
        with contextlib.suppress(TimeoutError, ConnectionResetError):
            while piece := connection.recv(65536):
                found += piece
        return found


def ask_fuzzed(port: int, model: str, seeds: Iterable[int], *, clients: int = 8, wait: float = 120.0) -> Counter[int]:
    """Send a body for each seed; how often each status came. Every answer is a status of `ANSWERS`, and a refusal says what it is.

    FastAPI, in front of vLLM, says it in `detail` where a body is not even text, and all else in `error`.
    """

    def ask(seed: int) -> int:
        content = fuzzed(random.Random(seed), model)
        answer = raw(port, head(len(content)) + content, wait=wait)
        assert answer, (seed, f"no answer in {wait} s")
        status = int(answer.split(b" ", 2)[1])
        assert status in ANSWERS, (seed, content[:300], answer[:500])
        assert b"Traceback" not in answer and (status == 200 or b'"error"' in answer or b'"detail"' in answer), (seed, answer[:500])
        return status

    with concurrent.futures.ThreadPoolExecutor(clients) as pool:
        return Counter(pool.map(ask, seeds))
