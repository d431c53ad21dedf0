"""The embedded engine behind HTTP, with OpenAI's routes and those of the vLLM plugin.

    POST /v1/chat/completions              streamed or not
    GET  /v1/models
    GET  /v1/relseek/vectors               what is offered, and the declared range
    POST /v1/relseek/vectors               {"name": ..., "file": ...}: offer a safetensors file of the declared folder from now on
    GET  /v1/relseek/health[?vector=NAME]  measures that a dose changes the model's log-probabilities and a dose of 0 does not
    GET  /health                           the server answers and its engine runs

Here belong routes, keys, limits and refusals; bodies and replies in `chat_completions.py`. Under `/v1` a key is needed where the server has any;
routes that are mounted elsewhere guard themselves. Clients see no traceback.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import json
import logging
import math
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import BaseRoute, Route

from relseek_resources.serving import chat_completions, requests
from relseek_resources.serving.engine import Busy, Engine, EngineError, Piece, Request, RequestError, Ticket, whole
from relseek_resources.serving.requests import SteeringError
from relseek_resources.serving.vectors import Registered, ServingError

log = logging.getLogger(__name__)
LOCAL = ("127.0.0.1", "::1", "localhost")
UNCHANGED, CHANGED = 1e-4, 1e-2  # nats, and token ids that every vocabulary has, as in `endpoints.py`
PROBE = tuple(range(10, 26))
DRAINED = 64 << 20  # bytes of a refused body that are read and dropped, so that its sender sees the refusal
KINDS = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}


@dataclass(frozen=True)
class Settings:
    """Who may ask, how often and how much.

    `keys`: any of them opens `/v1`; without one, the server answers this machine alone. `rate`: requests a minute for each key, or for each address
    where there are no keys; 0 for no limit. `body`: bytes. `patience`: seconds in which a body must have come.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    keys: tuple[str, ...] = field(default=(), repr=False)
    rate: int = 600
    body: int = 1 << 20
    patience: float = 30.0

    def __post_init__(self) -> None:
        if self.host not in LOCAL and not self.keys:
            raise ServingError(f"host {self.host}: a server that others can reach needs a key; give one, or stay on 127.0.0.1")
        if any(not key.strip() or not key.isascii() for key in self.keys):
            raise ServingError("a key must be ASCII and not empty")


class Refusal(Exception):
    """An answer other than 200, in words for the client."""

    def __init__(self, status: int, message: str, parameter: str | None = None, code: str | None = None, headers: dict[str, str] | None = None):
        super().__init__(message)
        self.status, self.parameter, self.code, self.headers = status, parameter, code, headers

    def answer(self) -> JSONResponse:
        return JSONResponse({"error": error_of(str(self), self.status, self.parameter, self.code)}, self.status, self.headers)


def error_of(message: str, status: int, parameter: str | None = None, code: str | None = None) -> dict[str, Any]:
    """An error as OpenAI writes it."""
    kind = KINDS.get(status, "server_error" if status >= 500 else "invalid_request_error")
    return {"message": message, "type": kind, "param": parameter, "code": code}


def create_app(engine: Engine, settings: Settings | None = None, extra_routes: Sequence[BaseRoute] = ()) -> Starlette:
    """The server as an ASGI application; `request.app.state.engine` and `.settings` are there for `extra_routes`.

    Closing the engine is its owner's affair. What `extra_routes` have under `/v1` needs a key like the rest; limits on bodies and rate hold for all.
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
    uvicorn.Server(config).run()


# --- before a route -----------------------------------------------------------------------------------------------------


class Guard:
    """Host, key, rate and size, checked before a route sees a request; what it reads is bounded in bytes and time."""

    def __init__(self, app: Any, settings: Settings) -> None:
        self.app, self.settings = app, settings
        self.keys = [hashlib.sha256(key.encode()).digest() for key in settings.keys]
        self.buckets = Buckets(settings.rate)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = {name.lower(): value for name, value in scope["headers"]}
        try:
            self._check_host(headers)
            payer = self._key(scope, headers)
            if payer is not None:
                self.buckets.take(payer)
            body = b""
            if scope["method"] in ("POST", "PUT", "PATCH"):
                if scope["path"].startswith("/v1") and not headers.get(b"content-type", b"").lower().startswith(b"application/json"):
                    raise Refusal(415, "the content type must be application/json")
                body = await read_body(headers, receive, self.settings)
        except Refusal as refusal:
            await refusal.answer()(scope, receive, send)
            return
        except ClientDisconnect:
            return
        await self.app(scope, _replayed(body, receive), send)

    def _check_host(self, headers: dict[bytes, bytes]) -> None:
        """Without keys, answer this machine's own names alone: a page elsewhere could make its own name lead here."""
        host = headers.get(b"host", b"").decode("latin-1")
        name = host.rpartition(":")[0] if not host.endswith("]") and ":" in host else host
        if not self.keys and name.strip("[]").lower() not in LOCAL:
            raise Refusal(403, "a server without keys answers 127.0.0.1 and localhost only")

    def _key(self, scope: Any, headers: dict[bytes, bytes]) -> str | None:
        """Whose rate a request counts against; None where it is not counted."""
        client = scope["client"][0] if scope.get("client") else ""
        if not scope["path"].startswith("/v1"):
            return client if scope["method"] == "POST" else None
        if not self.keys:
            return client
        kind, _, key = headers.get(b"authorization", b"").partition(b" ")
        digest = hashlib.sha256(key.strip()).digest()
        if kind.lower() != b"bearer" or not any(hmac.compare_digest(digest, known) for known in self.keys):
            raise Refusal(401, "this server needs a key: Authorization: Bearer KEY", code="invalid_api_key", headers={"www-authenticate": "Bearer"})
        return digest.hex()


class Buckets:
    """Requests a minute for each payer; a minute's worth may come at once."""

    MOST = 10_000

    def __init__(self, rate: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.rate, self.clock = rate, clock
        self.held: dict[str, tuple[float, float]] = {}  # what is left, and when that was counted

    def take(self, payer: str) -> None:
        if self.rate <= 0:
            return
        now = self.clock()
        left, then = self.held.pop(payer, (float(self.rate), now))
        left = min(self.rate, left + (now - then) * self.rate / 60)
        self.held[payer] = (left - 1 if left >= 1 else left, now)
        if len(self.held) > self.MOST:
            self.held.pop(next(iter(self.held)))  # the one that has not asked for longest
        if left < 1:
            wait = math.ceil((1 - left) * 60 / self.rate)
            raise Refusal(429, f"more than {self.rate} requests a minute; try again in {wait} s", headers={"retry-after": str(wait)})


async def read_body(headers: dict[bytes, bytes], receive: Callable[[], Awaitable[Any]], settings: Settings) -> bytes:
    """The whole body.

    Raises:
        Refusal: too large, or too slow.
        ClientDisconnect: the sender went away.
    """
    too_large = Refusal(413, f"the body is larger than {settings.body} bytes")
    parts: list[bytes] = []
    size = 0
    try:
        async with asyncio.timeout(settings.patience):
            more = True
            while more:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ClientDisconnect
                size += len(message.get("body", b""))
                if size <= settings.body:
                    parts.append(message.get("body", b""))
                elif size > DRAINED:
                    raise too_large
                more = message.get("more_body", False)
    except TimeoutError:
        raise Refusal(408, f"the body had not come after {settings.patience:g} s", headers={"connection": "close"}) from None
    if size > settings.body:
        raise too_large
    return b"".join(parts)


def _replayed(body: bytes, receive: Callable[[], Awaitable[Any]]) -> Callable[[], Awaitable[Any]]:
    pending = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Any:
        return pending.pop() if pending else await receive()

    return replay


# --- errors -------------------------------------------------------------------------------------------------------------


def refusal_of(error: Exception) -> Refusal:
    """What a client is told of an error of the engine."""
    if isinstance(error, Busy):
        return Refusal(429, str(error), code="server_busy", headers={"retry-after": str(error.seconds)})
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
    unsteered = await _measure(engine, "")
    again = _distance(unsteered, await _measure(engine, ""))
    measured = [await _measured(engine, one, unsteered) for one in named]
    found = again is not None and again < UNCHANGED and all(one["live"] for one in measured)
    return JSONResponse({"live": found, "unsteered_again": again, "vectors": measured, "unit": "nats"}, 200 if found else 503)


async def _measured(engine: Engine, vector: Registered, unsteered: dict[int, float]) -> dict[str, Any]:
    """The largest change of a log-probability at the ends of the declared range and at 0, after the middle one of the vector's blocks."""
    blocks = list(vector.home) or sorted(engine.vectors.blocks)
    layer, limit = blocks[len(blocks) // 2], engine.vectors.limits.dose
    changes = {}
    for dose in (-limit, 0.0, limit):
        entries = requests.read([{"vector": vector.name, "layers": [layer], "multiplier": dose}], engine.vectors)
        changes[dose] = _distance(unsteered, await _measure(engine, requests.canonical(entries)))
    zero = not vector.at(layer).any()
    lively = all(change is not None and (change > CHANGED if dose and not zero else change < UNCHANGED) for dose, change in changes.items())
    return {"name": vector.name, "layer": layer, "largest_change": {f"{dose:g}": change for dose, change in changes.items()}, "live": lively}


async def _measure(engine: Engine, steering: str) -> dict[int, float]:
    """Log-probabilities of the likeliest next tokens, in nats, through the whole engine; empty where they are no numbers."""
    try:
        reply = await engine.reply(Request(PROBE, 1, steering, temperature=0, top_log_probs=20))
    except RequestError:
        return {}
    return dict(reply.tokens[0].top)


def _distance(one: dict[int, float], other: dict[int, float]) -> float | None:
    """The largest difference of a log-probability, None where one is no number.

    A token that one of them does not hold is taken to be as likely there as its least likely one, so that the difference is at least this large.
    """
    if not one or not other:
        return None
    least_one, least_other = min(one.values()), min(other.values())
    return max(abs(one.get(token, least_one) - other.get(token, least_other)) for token in {*one, *other})
