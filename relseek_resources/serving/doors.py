"""What the vLLM plugin checks before vLLM's own routes see a request: a key wherever something is done, rate and size, and no steering where it would
be dropped.

Here belong the ASGI layers of the plugin; its own routes are in `endpoints.py`, and what a request may say where it can be steered in `plugin.py`.
This module needs no vLLM.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

from starlette.responses import JSONResponse

from relseek_resources.serving.guard import READING, Bounds, Settings
from relseek_resources.serving.plugin import ASKED, buried, misread
from relseek_resources.serving.vectors import Configuration

ROUTED = ("/v1/chat/completions", "/v1/completions", "/v1/responses")  # where plugin.py sees both ways of asking
OWN = "/v1/relseek"
# Fields that routes read and in which others' words stand: texts, the schemas of tools and of replies.
CONTENT = frozenset(
    {"messages", "input", "prompt", "tools", "tool_choice", "functions", "response_format", "structured_outputs", "output_config", "text"}
)
CONTENT |= {"chat_template_kwargs", "mm_processor_kwargs", "media_io_kwargs", "documents"}


def hang(app: Any, keys: Sequence[str], configuration: Configuration | None) -> None:
    """Put the doors before an application's routes, the outermost last. Without a configuration, on a server that steers nobody, rate and size are
    vLLM's own affair."""
    app.add_middleware(NoSteeringElsewhere)
    if configuration is not None:
        settings = Settings(keys=tuple(keys), rate=configuration.rate, body=configuration.body, patience=configuration.patience)
        app.add_middleware(Bounds, settings=settings)
    app.add_middleware(KeyEverywhere, keys=keys)


def refused(message: str, status: int = 400) -> JSONResponse:
    """A refusal in the shape of vLLM's own."""
    kind = "AuthenticationError" if status == 401 else "BadRequestError"
    return JSONResponse({"error": {"message": message, "type": kind, "param": None, "code": status}}, status_code=status)


def keys_of(arguments: Any) -> list[str]:
    """The keys that a vLLM server was started with, as vLLM finds them: those of its command line, or VLLM_API_KEY."""
    return [key for key in (getattr(arguments, "api_key", None) or [os.environ.get("VLLM_API_KEY")]) if key]


class KeyEverywhere:
    """Asks for the server's key, where it has one, on every route that does something. vLLM guards `/v1` and a few others, and leaves out
    `/invocations`, which is all of them, and `/scale_elastic_ep`."""

    def __init__(self, app: Any, keys: Sequence[str]) -> None:
        self.app, self.keys = app, [hashlib.sha256(key.encode()).digest() for key in keys]

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http" or scope["method"] in READING or not self.keys or self._opens(scope["headers"]):
            await self.app(scope, receive, send)
            return
        await refused("this server needs a key: Authorization: Bearer KEY", 401)(scope, receive, send)

    def _opens(self, headers: Sequence[tuple[bytes, bytes]]) -> bool:
        given = next((value for name, value in headers if name.lower() == b"authorization"), b"")
        scheme, _, key = given.partition(b" ")
        digest = hashlib.sha256(key).digest()
        return scheme.lower() == b"bearer" and any(hmac.compare_digest(digest, known) for known in self.keys)


class NoSteeringElsewhere:
    """Refuses a request for steering on a route that would drop it without a word."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        path = scope.get("path", "")
        if scope["type"] != "http" or scope["method"] != "POST" or path.startswith(ROUTED) or path.startswith(OWN):
            await self.app(scope, receive, send)
            return
        messages, more = [], True
        while more:
            message = await receive()
            messages.append(message)
            more = message["type"] == "http.request" and message.get("more_body", False)
        if asks(b"".join(message.get("body", b"") for message in messages)):
            await refused(f"steering: {path} cannot be steered; use {', '.join(ROUTED)}")(scope, receive, send)
            return
        pending = iter(messages)

        async def replay() -> Any:
            return next(pending, None) or await receive()

        await self.app(scope, replay, send)


def asks(body: bytes) -> bool:
    """Whether a body asks for steering, in any spelling that a reader of JSON would take for it."""
    try:
        content = json.loads(body)
    except (ValueError, RecursionError):
        return False  # whoever reads it refuses it
    if not isinstance(content, dict):
        return False
    xargs = content.get("vllm_xargs")
    words = xargs if isinstance(xargs, Mapping) else {}
    if content.get("custom") is not None or ASKED in words or misread(content) or misread(words):
        return True
    return bool(buried({name: value for name, value in content.items() if name not in CONTENT}))
