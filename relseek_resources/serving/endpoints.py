"""Routes beside vLLM's own: which vectors there are, registering one, and proof that steering is live.

Here belong the HTTP routes of the vLLM plugin, an entry point of `vllm.endpoint_plugins`: vLLM attaches them when VLLM_PLUGINS names relseek. Under
`/v1` they are guarded by vLLM's API key like the rest; the page is not, and asks for the key. What is checked before vLLM's
routes belongs in `doors.py`.

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
from relseek_resources.serving.doors import OWN, hang, keys_of, refused
from relseek_resources.serving.plugin import ASKED, configuration_here
from relseek_resources.serving.requests import SteeringError
from relseek_resources.serving.vectors import Vectors

router = APIRouter(prefix=OWN)


class Endpoints:
    """The plugin as vLLM wants it (`vllm.plugins.endpoint_plugins.interface.EndpointPlugin`)."""

    name = "relseek"
    required_tasks = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        app.include_router(router)
        app.router.routes.extend(chat.page_routes())
        hang(app, keys_of(getattr(app.state, "args", None)), configuration_here())

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


NOT_STEERING = "this server offers no vectors: it was started without a configuration of relseek"


@router.get("/vectors")
async def offered(request: Request) -> JSONResponse:
    vectors = _vectors(request.app.state.relseek_engine)
    if vectors is None:
        return refused(NOT_STEERING, 404)
    limits = {"multiplier": vectors.limits.dose, "threshold": vectors.limits.threshold, "strength": 1.0}
    return JSONResponse({"vectors": vectors.described(), "limits": limits, "default": vectors.default, "layers": sorted(vectors.blocks)})


@router.post("/vectors")
async def register(request: Request) -> JSONResponse:
    engine = request.app.state.relseek_engine
    vectors = _vectors(engine)
    if vectors is None:
        return refused(NOT_STEERING, 404)
    try:
        content = json.loads(await request.body())
        if not isinstance(content, dict) or set(content) != {"name", "file"}:
            return refused('expected {"name": ..., "file": ...}')
        async with request.app.state.relseek_lock:
            new = await asyncio.to_thread(vectors.read, content["name"], content["file"])
            sent = {digest: np.ascontiguousarray(new.tensors[block], dtype="<f4").tobytes() for block, digest in new.digests.items()}
            await engine.collective_rpc("relseek_register", args=(sent,))  # every worker has it before the first request may name it
            vectors.add(new)
    except (ValueError, RecursionError) as error:
        return refused(str(error))
    return JSONResponse({"registered": next(one for one in vectors.described() if one["name"] == new.name)})


@router.get("/health")
async def health(request: Request, vector: str | None = None) -> JSONResponse:
    """200 where every vector asked about changes the model as it should, 503 where one does not."""
    engine = request.app.state.relseek_engine
    vectors = _vectors(engine)
    if vectors is None:
        return refused(NOT_STEERING, 404)
    try:
        named = [vectors.named(vector, "vector")] if vector is not None else list(vectors.by_name.values())
    except SteeringError as error:
        return refused(str(error), 404)
    found = await liveness.measured(lambda interventions: _likeliest(engine, interventions), vectors, named, engine.model_config.dtype)
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
