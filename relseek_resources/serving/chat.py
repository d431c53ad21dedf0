"""The chat page, and the one route that it needs beyond OpenAI's protocol and the list of vectors.

Here belong the page's routes; the page itself is `chat.html`, one file without anything from elsewhere. Conversations, votes and settings live in the
browser: the server keeps nothing of them, so that nobody meets another's.

    GET  /                       the page
    GET  /v1/relseek/projection  200 where projections can be measured; the page asks before it offers them
    POST /v1/relseek/projection  {"messages": [..., the reply], "vector", "layer"?, "steering"?}  ->  {"projection", "unsteered", "layer"}

`projection` is the mean, over the reply's tokens, of the stream's projection on the vector after a block while the model is steered as it was when it
replied; `unsteered` is the same of the model as it is, reading the same words.
"""

from __future__ import annotations

import base64
import hashlib
import math
import re
from functools import cache
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from relseek_resources.serving import requests
from relseek_resources.serving.requests import shown

PAGE = Path(__file__).with_name("chat.html")
ROLES = ("system", "user", "assistant")


def page_routes() -> list[Route]:
    """The page alone, for a server whose engine cannot measure projections; the page says so."""
    return [Route("/", page)]


def routes() -> list[Route]:
    """Everything, for `server.create_app`."""
    return [*page_routes(), Route("/v1/relseek/projection", measures, methods=["GET"]), Route("/v1/relseek/projection", projection, methods=["POST"])]


@cache
def _page() -> tuple[str, str]:
    """The page and the policy under which nothing runs in it but its own script, and nothing is fetched from elsewhere."""
    text = PAGE.read_text(encoding="utf-8")
    digests = {}
    for tag in ("style", "script"):
        [content] = re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
        digests[tag] = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
    policy = (
        f"default-src 'none'; script-src 'sha256-{digests['script']}'; style-src 'sha256-{digests['style']}'; connect-src 'self'; img-src data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return text, policy


async def page(_request: Request) -> Response:
    text, policy = _page()
    return HTMLResponse(
        text,
        headers={
            "content-security-policy": policy,
            "cache-control": "no-cache",
            "x-content-type-options": "nosniff",
            "referrer-policy": "no-referrer",
        },
    )


async def measures(_request: Request) -> Response:
    return JSONResponse({"measures": True})


async def projection(request: Request) -> Response:
    from relseek_resources.serving.engine import RequestError
    from relseek_resources.serving.server import json_of

    engine = request.app.state.engine
    content = await json_of(request)
    if not isinstance(content, dict) or not {"messages", "vector"} <= set(content) <= {"messages", "vector", "layer", "steering"}:
        raise RequestError("expected messages and a vector, and where they are meant layer and steering")
    messages = _messages(content["messages"])
    steering = requests.canonical(requests.read(content.get("steering", []), engine.vectors))
    vector, layer = content["vector"], content.get("layer")
    block = engine.vectors.layers(engine.vectors.named(vector, "vector"), layer, "layer")[-1]
    reply = messages.pop()["content"]
    steered = await engine.projection(messages, reply, steering, vector, block)
    unsteered = await engine.projection(messages, reply, "", vector, block) if steering else steered
    if not (math.isfinite(steered) and math.isfinite(unsteered)):
        raise RequestError("the stream is not finite under this steering; use smaller doses", "steering")
    return JSONResponse({"projection": steered, "unsteered": unsteered, "layer": block})


def _messages(given: Any) -> list[dict[str, str]]:
    from relseek_resources.serving.engine import RequestError

    if not isinstance(given, list) or len(given) < 2:
        raise RequestError("messages: a list of what was said, and the reply as the last of them", "messages")
    for place, one in enumerate(given):
        if not isinstance(one, dict) or set(one) != {"role", "content"} or one["role"] not in ROLES or not isinstance(one["content"], str):
            raise RequestError(f"messages[{place}]: expected a role of {', '.join(ROLES)} and text as content, got {shown(one)}", "messages")
        try:
            one["content"].encode()
        except UnicodeEncodeError as error:
            raise RequestError(f"messages[{place}]: the text is no valid Unicode ({error.reason})", "messages") from error
    if given[-1]["role"] != "assistant":
        raise RequestError("messages: the last one must be the assistant's reply", "messages")
    return list(given)
