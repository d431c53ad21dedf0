"""Other people's clients, unchanged, against vLLM with the plugin: the `openai` package, curl and Inspect's OpenAI provider."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.serving import clients
from tests.serving.served import NEEDS_VLLM, Server

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600), NEEDS_VLLM]

DOSE = 1.5
WAYS: list[dict[str, Any]] = [
    {"custom": {"steer_multiplier": DOSE}},
    {"vllm_xargs": {"relseek": json.dumps([{"vector": "warm", "layers": [14], "multiplier": DOSE}])}},
]


@pytest.fixture
def client(server: Server) -> Iterator[openai.OpenAI]:
    with clients.client_of(server.url) as found:
        yield found


def greedy(server: Server, content: str = "Hello", tokens: int = 12, **more: Any) -> str:
    body = {"model": "smollm2", "messages": [{"role": "user", "content": content}], "max_tokens": tokens, "temperature": 0, **more}
    status, answer = server.ask(clients.CHAT, body)
    assert status == 200, answer
    return answer["choices"][0]["message"]["content"]


def test_the_openai_client_talks_to_it(client: openai.OpenAI) -> None:
    clients.check_whole_replies(client, "smollm2")


@pytest.mark.parametrize("options", clients.ANSWERS)
def test_a_stream_is_the_whole_reply_in_pieces(client: openai.OpenAI, options: dict[str, Any]) -> None:
    clients.check_stream(client, "smollm2", options)


@pytest.mark.parametrize("way", WAYS)
def test_the_openai_client_steers_by_extra_body(client: openai.OpenAI, server: Server, way: dict[str, Any]) -> None:
    asked: dict[str, Any] = {"model": "smollm2", "messages": clients.HELLO, "max_tokens": 12, "temperature": 0}
    steered = client.chat.completions.create(**asked, extra_body=way).choices[0].message.content
    assert steered == greedy(server, **WAYS[0]) != greedy(server)
    with pytest.raises(openai.BadRequestError, match="outside the declared range"):
        client.chat.completions.create(**asked, extra_body=json.loads(json.dumps(way).replace(str(DOSE), "99")))


def test_curl_talks_to_it(server: Server) -> None:
    clients.check_curl(server.url, "smollm2", greedy(server, tokens=8, custom={"steer_multiplier": DOSE}), DOSE)


@pytest.mark.parametrize("way", WAYS)
def test_inspect_talks_to_it(server: Server, tmp_path: Path, way: dict[str, Any]) -> None:
    replies = clients.inspect_replies(server.url, "smollm2", way, tmp_path)
    assert replies == [greedy(server, content, **way) for content in ("Say yes.", "Hello")]
    assert replies != [greedy(server, content) for content in ("Say yes.", "Hello")]
