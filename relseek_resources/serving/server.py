"""The embedded engine behind HTTP, with OpenAI's routes and those of the vLLM plugin.

    POST /v1/chat/completions              streamed or not
    GET  /v1/models
    GET  /v1/relseek/vectors               what is offered, and the declared range
    POST /v1/relseek/vectors               {"name": ..., "file": ...}: offer a safetensors file of the declared folder from now on
    GET  /v1/relseek/health[?vector=NAME]  measures that a dose changes the model's log-probabilities and a dose of 0 does not
    GET  /health                           the server answers and its engine runs

Here belong routes and what errors become; keys and limits in `guard.py`, bodies and replies in `chat_completions.py`. Under `/v1` a key is needed
where the server has any; routes that are mounted elsewhere guard themselves. Clients see no traceback.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import BaseRoute, Route

from relseek_resources.serving import chat_completions, liveness, requests
from relseek_resources.serving.engine import Busy, Engine, EngineError, Piece, Request, RequestError, Ticket, TooLong, whole
from relseek_resources.serving.guard import Guard, Refusal, Settings, error_of
from relseek_resources.serving.requests import SteeringError

log = logging.getLogger(__name__)


def create_app(engine: Engine, settings: Settings | None = None, extra_routes: Sequence[BaseRoute] = ()) -> Starlette:
    """The server as an ASGI application; `request.app.state.engine` and `.settings` are there for `extra_routes`.

    Closing the engine is its owner's affair. What `extra_routes` have under `/v1` needs a key and is counted like the rest; limits on bodies hold
    for all.
    """
    settings = settings or Settings()
    routes = [
        Route("/v1/chat/completions", chat, methods=["POST"]),
        Route("/v1/models", models),
        Route("/v1/models/{name:path}", model),
        Route("/v1/relseek/vectors", offered, methods=["GET"]),
        Route("/v1/relseek/vectors", register, methods=["POST"]),
        Route("/v1/relseek/health", live),
        Route("/health", health),
        *extra_routes,
    ]
    handlers: dict[Any, Any] = {Refusal: _refused, HTTPException: _http_error, ClientDisconnect: _nobody, Exception: _failed}
    handlers |= dict.fromkeys((RequestError, SteeringError, Busy, EngineError), _engine_error)
    app = Starlette(routes=routes, exception_handlers=handlers)
    app.add_middleware(Guard, settings=settings)
    app.state.engine, app.state.settings, app.state.registering = engine, settings, asyncio.Lock()
    app.state.started = int(time.time())
    return app


def run(app: Starlette, settings: Settings) -> None:
    """Serve until SIGINT or SIGTERM."""
    import uvicorn

    config = uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_keep_alive=15,
        timeout_graceful_shutdown=5,
        limit_concurrency=1000,
    )
    with contextlib.suppress(KeyboardInterrupt):  # uvicorn raises the signal again when all is closed
        uvicorn.Server(config).run()


# --- errors -------------------------------------------------------------------------------------------------------------


def refusal_of(error: Exception) -> Refusal:
    """What a client is told of an error of the engine."""
    if isinstance(error, Busy):
        return Refusal(429, str(error), code="server_busy", headers={"retry-after": str(error.seconds)})
    if isinstance(error, TooLong):
        return Refusal(400, str(error), error.parameter, "context_length_exceeded")
    if isinstance(error, RequestError):
        missing = error.parameter == "model"
        return Refusal(404 if missing else 400, str(error), error.parameter, "model_not_found" if missing else None)
    if isinstance(error, SteeringError):
        return Refusal(400, str(error))
    return Refusal(
        503 if isinstance(error, EngineError) else 500, str(error) if isinstance(error, EngineError) else "the server failed at this request"
    )


async def _refused(_request: HttpRequest, error: Exception) -> Response:
    assert isinstance(error, Refusal)
    return error.answer()


async def _engine_error(_request: HttpRequest, error: Exception) -> Response:
    return refusal_of(error).answer()


async def _http_error(request: HttpRequest, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    words = {404: f"there is no {request.url.path[:200]}", 405: f"{request.method} is not for {request.url.path[:200]}"}
    return Refusal(error.status_code, words.get(error.status_code, error.detail), headers=dict(error.headers or {})).answer()


async def _nobody(_request: HttpRequest, _error: Exception) -> Response:
    return Response(status_code=499)  # nobody reads it


async def _failed(request: HttpRequest, error: Exception) -> Response:
    log.error("%s %s failed", request.method, request.url.path, exc_info=error)
    return refusal_of(error).answer()


async def json_of(request: HttpRequest) -> Any:
    """A body's JSON, or a refusal."""
    try:
        return json.loads(await request.body())
    except (ValueError, RecursionError) as error:
        raise Refusal(400, f"the body is not valid JSON ({str(error)[:200]})") from error


# --- routes -------------------------------------------------------------------------------------------------------------


async def chat(request: HttpRequest) -> Response:
    engine: Engine = request.app.state.engine
    asked = await asyncio.to_thread(chat_completions.read, await json_of(request), engine)
    tickets = engine.submit(asked.requests)
    if asked.stream:
        return StreamingResponse(_events(asked, tickets, engine), media_type="text/event-stream", headers={"cache-control": "no-cache"})
    replies = await unless_gone(request, asyncio.gather(*(whole(ticket) for ticket in tickets)), tickets)
    return JSONResponse(chat_completions.completion(asked, replies, engine))


async def unless_gone(request: HttpRequest, work: asyncio.Future[Any], tickets: Sequence[Ticket]) -> Any:
    """The result of `work`; when the client goes away first, its rows are freed.

    Raises:
        ClientDisconnect: it went away.
    """
    gone = asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
        if work.done():
            return work.result()
        raise ClientDisconnect
    finally:
        for ticket in tickets:
            ticket.cancel()
        gone.cancel()
        work.cancel()


async def _gone(request: HttpRequest) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _events(asked: chat_completions.Asked, tickets: Sequence[Ticket], engine: Engine) -> AsyncIterator[bytes]:
    """A stream's events. Choices are written as their pieces come."""

    def event(content: Any) -> bytes:
        return b"data: " + json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"

    counts = [0] * len(tickets)
    try:
        for content in chat_completions.opening(asked, engine):
            yield event(content)
        async with contextlib.aclosing(_merged(tickets)) as pieces:
            async for index, piece in pieces:
                counts[index] = piece.completion_tokens
                if piece.text or piece.tokens or piece.finished:
                    yield event(chat_completions.chunk(asked, index, piece, engine))
        if asked.usage_in_stream:
            yield event(chat_completions.last(asked, counts, engine))
    except (RequestError, EngineError) as error:
        refusal = refusal_of(error)
        yield event({"error": error_of(str(refusal), refusal.status, refusal.parameter, refusal.code)})
    except Exception:
        log.exception("a stream failed")
        yield event({"error": error_of("the server failed at this request", 500)})
    finally:
        for ticket in tickets:
            ticket.cancel()
    yield b"data: [DONE]\n\n"


async def _merged(tickets: Sequence[Ticket]) -> AsyncGenerator[tuple[int, Piece]]:
    """The pieces of all tickets as they come, each with its ticket's place."""
    sources = [aiter(ticket) for ticket in tickets]
    waiting: dict[asyncio.Future[Any], int] = {asyncio.ensure_future(anext(source)): place for place, source in enumerate(sources)}
    try:
        while waiting:
            done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for future in done:
                place = waiting.pop(future)
                piece = future.result()
                yield place, piece
                if not piece.finished:
                    waiting[asyncio.ensure_future(anext(sources[place]))] = place
    finally:
        for future in waiting:
            future.cancel()


async def models(request: HttpRequest) -> Response:
    return JSONResponse({"object": "list", "data": [_model(request)]})


async def model(request: HttpRequest) -> Response:
    if request.path_params["name"] != request.app.state.engine.name:
        raise Refusal(404, f"there is no model {request.path_params['name'][:100]!r}", "model", "model_not_found")
    return JSONResponse(_model(request))


def _model(request: HttpRequest) -> dict[str, Any]:
    engine: Engine = request.app.state.engine
    return {"id": engine.name, "object": "model", "created": request.app.state.started, "owned_by": "relseek", "max_model_len": engine.length}


async def health(request: HttpRequest) -> Response:
    alive = request.app.state.engine.alive
    return JSONResponse({"status": "ok" if alive else "the engine has stopped"}, 200 if alive else 503)


# --- vectors ------------------------------------------------------------------------------------------------------------


async def offered(request: HttpRequest) -> Response:
    vectors = request.app.state.engine.vectors
    limits = {"multiplier": vectors.limits.dose, "threshold": vectors.limits.threshold, "strength": 1.0}
    return JSONResponse({"vectors": vectors.described(), "limits": limits, "default": vectors.default, "layers": sorted(vectors.blocks)})


async def register(request: HttpRequest) -> Response:
    engine: Engine = request.app.state.engine
    content = await json_of(request)
    if not isinstance(content, dict) or set(content) != {"name", "file"}:
        raise Refusal(400, 'expected {"name": ..., "file": ...}')
    async with request.app.state.registering:
        new = await engine.register(content["name"], content["file"])
    return JSONResponse({"registered": next(one for one in engine.vectors.described() if one["name"] == new.name)})


async def live(request: HttpRequest) -> Response:
    """200 where every vector asked about changes the model as it should, 503 where one does not."""
    engine: Engine = request.app.state.engine
    wanted = request.query_params.get("vector")
    try:
        named = [engine.vectors.named(wanted, "vector")] if wanted is not None else list(engine.vectors.by_name.values())
    except SteeringError as error:
        raise Refusal(404, str(error)) from error
    found = await liveness.measured(lambda interventions: _likeliest(engine, interventions), engine.vectors, named, engine.model.dtype)
    return JSONResponse(found, 200 if found["live"] else 503)


async def _likeliest(engine: Engine, interventions: list[dict[str, Any]] | None) -> dict[int, float]:
    """Log-probabilities of the likeliest next tokens, in nats, through the whole engine; empty where they are no numbers."""
    steering = requests.canonical(requests.read(interventions or [], engine.vectors))
    try:
        reply = await engine.reply(Request(liveness.PROBE, 1, steering, temperature=0, top_log_probs=20))
    except RequestError:
        return {}
    return dict(reply.tokens[0].top)
