"""Routes beside vLLM's own: which vectors there are, registering one, and proof that steering is live.

Here belong the HTTP routes of the vLLM plugin, an entry point of `vllm.endpoint_plugins`: vLLM attaches them when VLLM_PLUGINS names relseek. Under
`/v1` they are guarded by vLLM's API key like the rest; the page is not, and asks for the key.

    GET  /                                 the chat page, without projections: vLLM does not give its stream away
    GET  /v1/relseek/vectors               what is offered, and the declared range
    POST /v1/relseek/vectors               {"name": ..., "file": ...}: offer a safetensors file of the declared folder from now on
    GET  /v1/relseek/health[?vector=NAME]  measures that a dose changes the model's log-probabilities and a dose of 0 does not
"""

from __future__ import annotations

import asyncio
import json
import uuid
from typing import Any

import numpy as np
from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import JSONResponse

from relseek_resources.serving import chat, liveness
from relseek_resources.serving.plugin import ASKED
from relseek_resources.serving.requests import SteeringError
from relseek_resources.serving.vectors import Vectors

ROUTED = ("/v1/chat/completions", "/v1/completions", "/v1/responses")  # where plugin.py sees both ways of asking

router = APIRouter(prefix="/v1/relseek")


class Endpoints:
    """The plugin as vLLM wants it (`vllm.plugins.endpoint_plugins.interface.EndpointPlugin`)."""

    name = "relseek"
    required_tasks = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        app.include_router(router)
        app.router.routes.extend(chat.page_routes())
        app.add_middleware(NoSteeringElsewhere)

    async def init_state(self, engine_client: Any, state: Any, args: Any) -> None:
        """Check that the workers hold the vectors that the front end offers; a file that changed during the start would part them."""
        state.relseek_engine, state.relseek_lock = engine_client, asyncio.Lock()
        vectors = _vectors(engine_client)
        if vectors is not None:
            offered = sorted(vectors.by_digest())
            for worker in await engine_client.collective_rpc("relseek_registered"):
                if worker != offered:
                    raise RuntimeError("a worker holds other vectors than the front end: a file changed while the server started; start it again")


def _vectors(engine: Any) -> Vectors | None:
    return getattr(engine.input_processor, "relseek_vectors", None)


def _refused(message: str, status: int = 400) -> JSONResponse:
    """A refusal in the shape of vLLM's own."""
    return JSONResponse({"error": {"message": message, "type": "BadRequestError", "param": None, "code": status}}, status_code=status)


NOT_STEERING = "this server offers no vectors: it was started without a configuration of relseek"


@router.get("/vectors")
async def offered(request: Request) -> JSONResponse:
    vectors = _vectors(request.app.state.relseek_engine)
    if vectors is None:
        return _refused(NOT_STEERING, 404)
    limits = {"multiplier": vectors.limits.dose, "threshold": vectors.limits.threshold, "strength": 1.0}
    return JSONResponse({"vectors": vectors.described(), "limits": limits, "default": vectors.default, "layers": sorted(vectors.blocks)})


@router.post("/vectors")
async def register(request: Request) -> JSONResponse:
    engine = request.app.state.relseek_engine
    vectors = _vectors(engine)
    if vectors is None:
        return _refused(NOT_STEERING, 404)
    try:
        content = json.loads(await request.body())
        if not isinstance(content, dict) or set(content) != {"name", "file"}:
            return _refused('expected {"name": ..., "file": ...}')
        async with request.app.state.relseek_lock:
            new = await asyncio.to_thread(vectors.read, content["name"], content["file"])
            sent = {digest: np.ascontiguousarray(new.tensors[block], dtype="<f4").tobytes() for block, digest in new.digests.items()}
            await engine.collective_rpc("relseek_register", args=(sent,))  # every worker has it before the first request may name it
            vectors.add(new)
    except (ValueError, RecursionError) as error:
        return _refused(str(error))
    return JSONResponse({"registered": next(one for one in vectors.described() if one["name"] == new.name)})


@router.get("/health")
async def health(request: Request, vector: str | None = None) -> JSONResponse:
    """200 where every vector asked about changes the model as it should, 503 where one does not."""
    engine = request.app.state.relseek_engine
    vectors = _vectors(engine)
    if vectors is None:
        return _refused(NOT_STEERING, 404)
    try:
        named = [vectors.named(vector, "vector")] if vector is not None else list(vectors.by_name.values())
    except SteeringError as error:
        return _refused(str(error), 404)
    found = await liveness.measured(lambda interventions: _likeliest(engine, interventions), vectors, named)
    return JSONResponse(found, status_code=200 if found["live"] else 503)


async def _likeliest(engine: Any, interventions: list[dict[str, Any]] | None) -> dict[int, float]:
    """Log-probabilities of the likeliest next tokens, in nats, computed anew: a salt of its own keeps cached prefixes out of it."""
    from vllm import SamplingParams

    extra = {ASKED: json.dumps(interventions)} if interventions is not None else None
    params = SamplingParams(temperature=0, max_tokens=1, logprobs=20, extra_args=extra)
    prompt = {"prompt_token_ids": list(liveness.PROBE), "cache_salt": uuid.uuid4().hex}
    found: dict[int, float] = {}
    async for output in engine.generate(prompt, params, f"relseek-health-{uuid.uuid4().hex}"):
        found = {token: likely.logprob for token, likely in output.outputs[0].logprobs[0].items()}
    return found


class NoSteeringElsewhere:
    """Refuses a request for steering on a route that would drop it without a word."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        path = scope.get("path", "")
        if scope["type"] != "http" or scope["method"] != "POST" or path.startswith(ROUTED) or path.startswith(router.prefix):
            await self.app(scope, receive, send)
            return
        messages, body, more = [], b"", True
        while more:
            message = await receive()
            messages.append(message)
            body += message.get("body", b"")
            more = message["type"] == "http.request" and message.get("more_body", False)
        if _asks(body):
            await _refused(f"steering: {path} cannot be steered; use {', '.join(ROUTED)}")(scope, receive, send)
            return
        pending = iter(messages)

        async def replay() -> Any:
            return next(pending, None) or await receive()

        await self.app(scope, replay, send)


def _asks(body: bytes) -> bool:
    if b"steer_multiplier" not in body and b'"relseek"' not in body:
        return False
    try:
        content = json.loads(body)
    except (ValueError, RecursionError):
        return False  # whoever reads it refuses it
    if not isinstance(content, dict):
        return False
    xargs = content.get("vllm_xargs")
    custom = content.get("custom")
    return ASKED in content or (isinstance(xargs, dict) and ASKED in xargs) or (isinstance(custom, dict) and "steer_multiplier" in custom)
