"""A chat-completions server over a real loopback socket that does what a test tells it to.

Here belong OpenAI's shapes of answers and errors, and ways to fail. What is asked and expected belongs in the tests.
"""

from __future__ import annotations

import json
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

PROMPT_TOKENS, COMPLETION_TOKENS = 100, 5  # charged for every answer


@dataclass(frozen=True)
class Says:
    """One reaction of the server: an answer by default, an error with a `status`, or nothing (`hangs`, `cuts`)."""

    content: Any = '{"score": 7}'
    refusal: str | None = None
    finish: str = "stop"
    usage: bool = True
    cached: int = 0
    status: int = 200
    code: str | None = None
    message: str = "said no"
    headers: Mapping[str, str] = field(default_factory=dict)
    body: str | None = None  # in place of everything else
    delay: float = 0.0
    hangs: bool = False  # keeps the connection open and says nothing
    cuts: bool = False  # closes the connection in the middle of the body

    def payload(self, model: str) -> bytes:
        if self.body is not None:
            return self.body.encode()
        if self.status >= 400:
            return json.dumps({"error": {"message": self.message, "type": "error", "param": None, "code": self.code}}).encode()
        message = {"role": "assistant", "content": self.content, "refusal": self.refusal}
        completion: dict[str, Any] = {
            "id": "chatcmpl-1",
            "object": "chat.completion",
            "created": 1,
            "model": f"{model}-served",
            "choices": [{"index": 0, "message": message, "finish_reason": self.finish, "logprobs": None}],
        }
        if self.usage:
            completion["usage"] = {
                "prompt_tokens": PROMPT_TOKENS,
                "completion_tokens": COMPLETION_TOKENS,
                "total_tokens": PROMPT_TOKENS + COMPLETION_TOKENS,
                "prompt_tokens_details": {"cached_tokens": self.cached},
            }
        return json.dumps(completion).encode()


@dataclass
class ChatServer:
    """`script(text, nth)` is the reaction to the nth request (from 0) whose message is `text`; `asked` holds (arrival, text) of every request."""

    script: Callable[[str, int], Says]
    url: str = ""
    asked: list[tuple[float, str]] = field(default_factory=list)
    bodies: list[dict[str, Any]] = field(default_factory=list)
    keys: set[str] = field(default_factory=set)
    most_at_once: int = 0
    at_once: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)
    closing: threading.Event = field(default_factory=threading.Event)

    @property
    def times(self) -> Counter[str]:
        """How often each text was asked."""
        return Counter(text for _, text in self.asked)

    def arrived(self, body: dict[str, Any], key: str) -> Says:
        text = body["messages"][-1]["content"]
        with self.lock:
            nth = self.times[text]
            self.asked.append((time.monotonic(), text))
            self.bodies.append(body)
            self.keys.add(key)
            self.at_once += 1
            self.most_at_once = max(self.most_at_once, self.at_once)
        return self.script(text, nth)

    def left(self) -> None:
        with self.lock:
            self.at_once -= 1


@contextmanager
def serving(script: Callable[[str, int], Says]) -> Iterator[ChatServer]:
    """The server while the block runs; its `url` is a client's base_url."""
    state = ChatServer(script)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            says = state.arrived(body, self.headers["authorization"])
            with suppress(OSError):
                self._react(says, body["model"])

        def _react(self, says: Says, model: str) -> None:
            state.closing.wait(3600 if says.hangs else says.delay)
            payload = b"" if says.hangs else says.payload(model)
            state.left()  # before the answer is out: the client may send its next request at once
            if says.hangs:
                self.close_connection = True
                return
            self.send_response(says.status)
            for name, value in {"content-type": "application/json", "content-length": str(len(payload)), **says.headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(payload[: len(payload) // 2] if says.cuts else payload)
            if says.cuts:
                self.wfile.flush()
                self.connection.shutdown(socket.SHUT_RDWR)
                self.close_connection = True

        def log_message(self, format: str, *args: Any) -> None:
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True
        request_queue_size = 128

    server = Server(("127.0.0.1", 0), Handler)
    state.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield state
    finally:
        state.closing.set()
        server.shutdown()
        server.server_close()
        thread.join()
