"""Other people's clients, unchanged, against either engine: the `openai` package, curl and Inspect.

Here belongs what must hold of any OpenAI-compatible server, whatever its model; what a reply says is compared where the model is known.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import openai

CHAT = "/v1/chat/completions"
HELLO = [{"role": "user", "content": "Hello"}]
ANSWERS = [{}, {"n": 3}, {"stop": ["e", "\n"]}, {"custom": {"steer_multiplier": -1}}, {"max_tokens": 60}]  # ways of asking that are also streamed
INSPECT_TASK = """
from inspect_ai import Task, task
from inspect_ai.dataset import Sample
from inspect_ai.model import GenerateConfig
from inspect_ai.scorer import includes

@task
def asked():
    config = GenerateConfig(extra_body={steering!r}, max_tokens=12, temperature=0, seed=3, logprobs=True, top_logprobs=2)
    return Task(dataset=[Sample(input="Say yes.", target="e"), Sample(input="Hello", target="e")], scorer=includes(), config=config)
"""


def client_of(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)


def check_whole_replies(client: openai.OpenAI, model: str) -> None:
    assert [found.id for found in client.models.list()] == [model]
    asked: dict[str, Any] = {"model": model, "messages": HELLO, "max_tokens": 12, "temperature": 0, "logprobs": True, "top_logprobs": 2}
    whole = client.chat.completions.create(**asked)
    [choice] = whole.choices
    assert choice.logprobs is not None and whole.usage is not None
    tokens = choice.logprobs.content
    shown = b"".join(bytes(token.bytes) for token in tokens).decode(errors="replace")
    assert shown.startswith(choice.message.content) if choice.finish_reason == "stop" else shown == choice.message.content
    assert all(token.top_logprobs[0].logprob == token.logprob and len(token.top_logprobs) == 2 for token in tokens)
    assert whole.usage.completion_tokens - len(tokens) in ((0, 1) if choice.finish_reason == "stop" else (0,))
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens


def check_stream(client: openai.OpenAI, model: str, options: dict[str, Any]) -> None:
    """A stream is the whole reply in pieces."""
    asked: dict[str, Any] = {"model": model, "messages": HELLO, "max_tokens": 16, "seed": 3, "logprobs": True, **options}
    custom = {"extra_body": {"custom": asked.pop("custom")}} if "custom" in asked else {}
    whole = client.chat.completions.create(**asked, **custom)
    texts, finished, tokens = [""] * len(whole.choices), [""] * len(whole.choices), [[] for _ in whole.choices]
    usage = None
    for chunk in client.chat.completions.create(**asked, **custom, stream=True, stream_options={"include_usage": True}):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            tokens[choice.index] += choice.logprobs.content if choice.logprobs else []
            finished[choice.index] += choice.finish_reason or ""
    assert texts == [choice.message.content for choice in whole.choices]
    assert finished == [choice.finish_reason for choice in whole.choices]
    assert [[one.bytes for one in found] for found in tokens] == [[one.bytes for one in choice.logprobs.content] for choice in whole.choices]
    assert usage == whole.usage


def check_curl(url: str, model: str, expected: str, dose: float) -> None:
    body = json.dumps({"model": model, "messages": HELLO, "max_tokens": 8, "temperature": 0, "custom": {"steer_multiplier": dose}})
    command = ["curl", "-sS", "--max-time", "120", url + CHAT, "-H", "content-type: application/json", "-d"]
    plain = json.loads(subprocess.run([*command, body], capture_output=True, check=True).stdout)
    assert plain["choices"][0]["message"]["content"] == expected
    streamed = body[:-1] + ', "stream": true}'
    lines = subprocess.run([*command, streamed], capture_output=True, check=True).stdout.decode().split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    pieces = [json.loads(line.removeprefix("data: "))["choices"][0]["delta"].get("content") or "" for line in lines[:-2]]
    assert "".join(pieces) == expected


def inspect_replies(url: str, model: str, steering: dict[str, Any], folder: Path) -> list[str]:
    """The replies to both samples of a task that Inspect's OpenAI-compatible provider ran. At /v1/responses it drops `extra_body`: chats, then."""
    task = folder / "task.py"
    task.write_text(INSPECT_TASK.format(steering=steering))
    environment = {**os.environ, "RELSEEK_API_KEY": "none", "RELSEEK_BASE_URL": f"{url}/v1", "INSPECT_LOG_FORMAT": "json"}
    chat = ["--model", f"openai-api/relseek/{model}", "-M", "responses_api=false"]
    command = [sys.executable, "-m", "inspect_ai", "eval", task.name, *chat, "--log-dir", "logs", "--display", "none"]
    subprocess.run(command, cwd=folder, env=environment, check=True, capture_output=True, timeout=600)
    [log] = (folder / "logs").glob("*.json")
    content = json.loads(log.read_text())
    assert content["status"] == "success", content.get("error")
    return [sample["output"]["choices"][0]["message"]["content"] for sample in sorted(content["samples"], key=lambda sample: sample["id"])]
