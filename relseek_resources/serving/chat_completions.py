"""OpenAI's chat completions: a body as requests to the engine, and replies as OpenAI writes them.

Here belongs the wire format and its refusals. Whatever would change a reply and is not done here is refused by name: nothing is ignored that a client
could take for done. Sockets, keys and limits belong in `server.py`.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from relseek_resources.serving import requests
from relseek_resources.serving.engine import Engine, Piece, Reply, Request, RequestError, Token
from relseek_resources.serving.requests import SteeringError, shown, shown_name
from relseek_resources.serving.vectors import Vectors

ASKED = "relseek"  # in vllm_xargs, as in the vLLM plugin
MOST_CHOICES, MOST_STOPS, LONGEST_STOP, MOST_TOP = 16, 16, 1000, 20
# What says nothing of the reply itself.
WITHOUT_EFFECT = frozenset({"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "cache_salt"})
# What would change the reply and is not offered, with the values that ask for nothing.
NOT_OFFERED: dict[str, tuple[Any, ...]] = {
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "repetition_penalty": (1,),
    "top_k": (0, -1),
    "min_p": (0,),
    "logit_bias": ({},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
}
SAMPLING = ("max_tokens", "max_completion_tokens", "temperature", "top_p", "n", "seed", "stop")
READ = frozenset({"model", "messages", *SAMPLING, "stream", "stream_options", "logprobs", "top_logprobs", "vllm_xargs", "custom"})
ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}


@dataclass(frozen=True)
class Asked:
    """A body that has been read: one request a choice, which differ in their seeds alone."""

    requests: tuple[Request, ...]
    stream: bool
    usage_in_stream: bool
    log_probs: bool
    id: str = field(default_factory=lambda: f"chatcmpl-{uuid.uuid4().hex}")
    created: int = field(default_factory=lambda: int(time.time()))


# --- a body -------------------------------------------------------------------------------------------------------------


def read(body: Any, engine: Engine) -> Asked:
    """Read and check a body, and turn its messages into tokens, which takes a while for long ones.

    Raises:
        RequestError: anything that cannot be met; a refused steering comes with the parameter that asked for it.
    """
    if not isinstance(body, Mapping):
        raise RequestError(f"expected a JSON object, got {shown(body)}")
    given = {name: value for name, value in body.items() if value is not None}
    _check_known(given)
    if given.get("model") != engine.name:
        raise RequestError(f"no model {shown(given.get('model'))}; there is {engine.name!r}", "model")
    steering = read_steering(given, engine.vectors)
    stream, log_probs = _flag(given, "stream"), _flag(given, "logprobs")
    options = given.get("stream_options", {})
    if not isinstance(options, Mapping) or not set(options) <= {"include_usage", "include_obfuscation"} or (options and not stream):
        raise RequestError("stream_options may say include_usage, and goes with stream", "stream_options")
    if "top_logprobs" in given and not log_probs:
        raise RequestError("top_logprobs goes with logprobs: true", "top_logprobs")
    top = _integer(given, "top_logprobs", 0, MOST_TOP, 0) if log_probs else None
    temperature, top_p = _number(given, "temperature", 0, 2, 1), _number(given, "top_p", 0, 1, 1)
    if top_p == 0:
        raise RequestError("top_p must be above 0", "top_p")
    choices, seed = _integer(given, "n", 1, MOST_CHOICES, 1), _integer(given, "seed", -(2**63), 2**63 - 1, None)
    stop = _stop(given.get("stop"))
    limit = _max_tokens(given)
    prompt = engine.prompt(_messages(given.get("messages")))
    most = limit if limit is not None else max(1, engine.length - len(prompt))
    asked = tuple(
        Request(prompt, most, steering, temperature, top_p, seed if seed is None else seed + choice, stop, top) for choice in range(choices or 1)
    )
    return Asked(asked, stream, bool(options.get("include_usage")), log_probs)


def read_steering(given: Mapping[str, Any], vectors: Vectors) -> str:
    """The canonical text of what `vllm_xargs.relseek` or `custom.steer_multiplier` asks for, as the vLLM plugin reads them.

    Raises:
        RequestError: it cannot be met.
    """
    extra, parameter = given.get("vllm_xargs") or {}, f"vllm_xargs.{ASKED}"
    if not isinstance(extra, Mapping):
        raise RequestError(f"vllm_xargs: expected an object, got {shown(extra)}", "vllm_xargs")
    unknown = sorted(set(extra) - {ASKED})
    if unknown:
        raise RequestError(f"vllm_xargs: unknown {', '.join(map(shown, unknown))}; steering is asked for in vllm_xargs.{ASKED}", "vllm_xargs")
    custom = given.get("custom")
    if custom is not None and ASKED in extra:
        raise RequestError(f"steering is asked for twice, in custom and in vllm_xargs.{ASKED}", "custom")
    try:
        wanted: Any = extra.get(ASKED, [])
        if custom is not None:
            parameter, wanted = "custom", requests.read_custom(custom, vectors)
        return requests.canonical(requests.read(wanted, vectors))
    except SteeringError as error:
        raise RequestError(f"steering: {error}", parameter) from error


def _check_known(given: Mapping[str, Any]) -> None:
    if ASKED in given or "steer_multiplier" in given:
        name = ASKED if ASKED in given else "steer_multiplier"
        raise RequestError(f"{name}: steering is asked for in vllm_xargs.{ASKED}, as JSON text, or in custom.steer_multiplier", name)
    unknown = sorted(set(given) - READ - WITHOUT_EFFECT - set(NOT_OFFERED))
    if unknown:
        raise RequestError(f"unknown {', '.join(map(shown, unknown[:5]))}", shown_name(unknown[0]))
    for name, nothing in NOT_OFFERED.items():
        if name in given and not any(given[name] == value and isinstance(given[name], bool) == isinstance(value, bool) for value in nothing):
            raise RequestError(f"{name} is not offered by the embedded engine; leave it out", name)


def _messages(given: Any) -> list[dict[str, str]]:
    if not isinstance(given, list) or not given:
        raise RequestError("messages must be a list of one message or more", "messages")
    return [_message(one, f"messages[{place}]") for place, one in enumerate(given)]


def _message(one: Any, where: str) -> dict[str, str]:
    if not isinstance(one, Mapping):
        raise RequestError(f"{where}: expected an object, got {shown(one)}", "messages")
    held = {name for name, value in one.items() if value not in (None, [])}
    if not held <= {"role", "content", "name", "refusal", "annotations"}:
        raise RequestError(f"{where}: unknown {', '.join(map(shown, sorted(held - {'role', 'content', 'name'})))}; messages are text", "messages")
    role, content = one.get("role"), one.get("content")
    if not isinstance(role, str) or role not in ROLES:
        raise RequestError(f"{where}: role {shown(role)}; there is {', '.join(ROLES)}", "messages")
    if isinstance(content, list):
        content = "".join(_text_part(part, where) for part in content)
    if not isinstance(content, str):
        raise RequestError(f"{where}: content must be text, got {shown(content)}", "messages")
    return {"role": ROLES[role], "content": _encodable(content, where)}


def _text_part(part: Any, where: str) -> str:
    if not isinstance(part, Mapping) or part.get("type") != "text" or not isinstance(part.get("text"), str):
        raise RequestError(f"{where}: only parts of the type text are read", "messages")
    return part["text"]


def _encodable(text: str, where: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:  # half a surrogate pair, which JSON can write
        raise RequestError(f"{where}: the text is no valid Unicode ({error.reason})", "messages") from error
    return text


def _flag(given: Mapping[str, Any], name: str) -> bool:
    value = given.get(name, False)
    if not isinstance(value, bool):
        raise RequestError(f"{name} must be true or false, got {shown(value)}", name)
    return value


def _number(given: Mapping[str, Any], name: str, least: float, most: float, default: float) -> float:
    value = given.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
        raise RequestError(f"{name} must be a number from {least:g} to {most:g}, got {shown(value)}", name)
    return float(value)


def _integer(given: Mapping[str, Any], name: str, least: int, most: int, default: int | None) -> Any:
    value = given.get(name, default)
    if name in given and (isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most):
        raise RequestError(f"{name} must be an integer from {least} to {most}, got {shown(value)}", name)
    return value


def _max_tokens(given: Mapping[str, Any]) -> int | None:
    names = [name for name in ("max_completion_tokens", "max_tokens") if name in given]
    if len(names) == 2 and given[names[0]] != given[names[1]]:
        raise RequestError("max_tokens and max_completion_tokens say different things; give one", "max_tokens")
    return _integer(given, names[0], 1, 2**31, None) if names else None


def _stop(given: Any) -> tuple[str, ...]:
    if given is None:
        return ()
    found = [given] if isinstance(given, str) else given
    if not isinstance(found, list) or len(found) > MOST_STOPS or not all(isinstance(one, str) and 0 < len(one) <= LONGEST_STOP for one in found):
        raise RequestError(f"stop must be a text or up to {MOST_STOPS} of them, each of 1 to {LONGEST_STOP} characters", "stop")
    return tuple(found)


# --- replies ------------------------------------------------------------------------------------------------------------


def completion(asked: Asked, replies: Sequence[Reply], engine: Engine) -> dict[str, Any]:
    """The whole answer, `chat.completion`."""
    choices = [
        {
            "index": index,
            "message": {"role": "assistant", "content": reply.text, "refusal": None},
            "logprobs": log_probs(reply.tokens, engine) if asked.log_probs else None,
            "finish_reason": reply.finished,
        }
        for index, reply in enumerate(replies)
    ]
    return {**_head(asked, engine, "chat.completion"), "choices": choices, "usage": usage(asked, [reply.completion_tokens for reply in replies])}


def opening(asked: Asked, engine: Engine) -> list[dict[str, Any]]:
    """The chunks that open each choice of a stream."""
    return [_chunk(asked, engine, index, {"role": "assistant", "content": ""}) for index in range(len(asked.requests))]


def chunk(asked: Asked, index: int, piece: Piece, engine: Engine) -> dict[str, Any]:
    """A piece of a choice as a chunk of a stream."""
    found = log_probs(piece.tokens, engine) if asked.log_probs and piece.tokens else None
    return _chunk(asked, engine, index, {"content": piece.text} if piece.text or piece.tokens else {}, found, piece.finished or None)


def last(asked: Asked, counts: Sequence[int], engine: Engine) -> dict[str, Any]:
    """The chunk that carries the usage of a stream."""
    return {**_head(asked, engine, "chat.completion.chunk"), "choices": [], "usage": usage(asked, counts)}


def _head(asked: Asked, engine: Engine, kind: str) -> dict[str, Any]:
    return {"id": asked.id, "object": kind, "created": asked.created, "model": engine.name, "system_fingerprint": None}


def _chunk(asked: Asked, engine: Engine, index: int, delta: dict[str, Any], found: Any = None, finished: str | None = None) -> dict[str, Any]:
    choice = {"index": index, "delta": delta, "logprobs": found, "finish_reason": finished}
    return {**_head(asked, engine, "chat.completion.chunk"), "choices": [choice], **({"usage": None} if asked.usage_in_stream else {})}


def usage(asked: Asked, counts: Sequence[int]) -> dict[str, int]:
    prompt = len(asked.requests[0].prompt)
    return {"prompt_tokens": prompt, "completion_tokens": sum(counts), "total_tokens": prompt + sum(counts)}


def log_probs(tokens: Sequence[Token], engine: Engine) -> dict[str, Any]:
    """Tokens as OpenAI writes their log-probabilities. The token that ends a reply is no part of its text and is left out."""

    def written(token: int, value: float) -> dict[str, Any]:
        content = engine.bytes_of(token)
        return {"token": content.decode(errors="replace"), "logprob": max(value, -9999.0), "bytes": list(content)}

    content = [
        {**written(one.id, one.log_prob), "top_logprobs": [written(*rival) for rival in one.top]} for one in tokens if one.id not in engine.model.ends
    ]
    return {"content": content, "refusal": None}
