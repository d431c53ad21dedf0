"""Who may ask a server, how often and how much: checked before a route sees a request.

Here belong keys, rates, sizes and the shape of a refusal, for the embedded engine's server, the one of a trial's arms and vLLM's alike. This module
needs no model and no torch.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import math
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse

from relseek_resources.serving.vectors import ServingError

LOCAL = ("127.0.0.1", "::1", "localhost")
READING = ("GET", "HEAD", "OPTIONS")
DRAINED = 64 << 20  # bytes of a refused body that are read and dropped, so that its sender sees the refusal
KINDS = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}


@dataclass(frozen=True)
class Settings:
    """Who may ask, how often and how much.

    `keys`: any of them opens `/v1`; without one, the server answers this machine alone. `rate`: requests a minute for each key, or for each address
    where there are no keys, and a trial's requests with a wrong token for each address; 0 for no limit. `body`: bytes. `patience`: seconds in which a
    body must have come.
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


class Guard:
    """Host, key, rate and size, checked before a route sees a request; what it reads is bounded in bytes and time.

    Outside `/v1` nothing is counted: a trial's participants may share an address with whoever sends junk, and only the trial knows their tokens.
    """

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
        if not scope["path"].startswith("/v1"):
            return None
        if not self.keys:
            return scope["client"][0] if scope.get("client") else ""
        found = key_of(headers, self.keys)
        if found is None:
            raise Refusal(401, "this server needs a key: Authorization: Bearer KEY", code="invalid_api_key", headers={"www-authenticate": "Bearer"})
        return found


def key_of(headers: dict[bytes, bytes], known: Sequence[bytes]) -> str | None:
    """What stands for the key that a request carries; None where it carries none whose digest is known."""
    kind, _, key = headers.get(b"authorization", b"").partition(b" ")
    digest = hashlib.sha256(key.strip()).digest()
    return digest.hex() if kind.lower() == b"bearer" and any(hmac.compare_digest(digest, one) for one in known) else None


class Bounds:
    """Rate, size and time alone, before a server that checks keys and content by itself. What only reads, and not under `/v1`, is not counted:
    a machine asks for health and metrics by the clock."""

    def __init__(self, app: Any, settings: Settings) -> None:
        self.app, self.settings, self.buckets = app, settings, Buckets(settings.rate)
        self.keys = [hashlib.sha256(key.encode()).digest() for key in settings.keys]

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = {name.lower(): value for name, value in scope["headers"]}
        reading = scope["method"] in READING
        try:
            if not reading or scope["path"].startswith("/v1"):
                self.buckets.take(key_of(headers, self.keys) or (scope["client"][0] if scope.get("client") else ""))
            if not reading:
                receive = _replayed(await read_body(headers, receive, self.settings), receive)
        except Refusal as refusal:
            await refusal.answer()(scope, receive, send)
            return
        except ClientDisconnect:
            return
        await self.app(scope, receive, send)


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
