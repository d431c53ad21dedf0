"""A server that speaks OpenAI's Files and Batches shapes over a loopback socket, counts what it charges, and fails on command.

    with BatchServer() as server:                      # a thread of this process
        client = OpenAI(base_url=server.base_url, api_key="none")

    python tests/judging/batch_server.py --port 8123 [--looks 2] [--seed 7]      # a process; prints its base URL, then serves until it is killed

A batch goes one status along its path at every look (list or retrieve). How it goes is its `Plan`; what becomes of one request is its line's fate;
what becomes of a call is its `Fault`. `Chaos` draws all three from a seed, a limited number of each, so that every schedule comes to an end. A
process is told the same over HTTP: POST /_control {"reset": true, "plans": [...], "fates": {...}, "faults": [...], "seed": 3}, GET /_state.

Everything about the shapes is from OpenAI's public interface description. Only the standard library is used.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import re
import socket
import struct
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from email.parser import BytesParser
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlparse

COMPLETED = ("validating", "in_progress", "finalizing", "completed")
PATHS = {
    "completed": COMPLETED,
    "expired": ("validating", "in_progress", "finalizing", "expired"),
    "cancelled": ("validating", "in_progress", "cancelling", "cancelled"),
    "failed": ("validating", "failed"),  # at validation, without a line to blame
    "no_room": ("validating", "failed"),  # the account's queue is full
    "lost": ("validating", "in_progress", "lost"),  # forgotten
    "scheduling": ("validating", "scheduling", "in_progress", "finalizing", "completed"),  # a status of another server's
}
# What becomes of a request: an answer, a kind of answer that is no score, an error line, or a line that cannot be used.
FATES = (
    "good",
    "prose",  # an answer that is no score
    "refusal",
    "length",  # cut off at the token limit
    "http_500",
    "http_429",
    "http_400",
    "error",  # a top-level error object
    "silent",  # no line at all, charged for nothing
    "torn",  # a line that is no JSON, charged
    "nameless",  # an answer without a custom_id, charged
    "twice",  # two identical lines
)
CHARGED = ("good", "prose", "refusal", "length", "torn", "nameless", "twice")
DELIVERED = ("good", "prose", "refusal", "length", "twice")
# What becomes of a call: before its effect, or after it with the answer lost.
FORGOTTEN = "file_forgotten"  # a fault of creating a batch that no chaos draws: the input file is gone
FAULTS = ("429", "500", "503", "cut_before", "500_after", "cut_after", "cut_upload", "cut_download", "short_download", "slow", "html")


@dataclass
class Plan:
    """How a batch goes: its end, and the share of its requests done by then where it does not complete."""

    end: str = "completed"
    share: float = 0.5
    blamed: tuple[int, ...] = ()  # lines that validation names, counted from 1, when it fails; one may be named more than once
    general: bool = False  # whether it has something to say of the whole file besides


@dataclass
class Fault:
    """What becomes of the next `count` calls whose "METHOD path" matches, after letting `skip` of them pass."""

    kind: str
    route: str = "."
    count: int = 1
    skip: int = 0


@dataclass
class Charge:
    """One request run: by which batch, what was answered, and whether the answer could be read by whoever paid for it."""

    batch: str
    fate: str
    tokens: int
    delivered: bool


@dataclass
class Stored:
    id: str
    filename: str
    purpose: str
    path: Path
    created_at: int

    def shown(self) -> dict[str, Any]:
        size = self.path.stat().st_size
        return {
            "id": self.id,
            "object": "file",
            "bytes": size,
            "created_at": self.created_at,
            "expires_at": None,
            "filename": self.filename,
            "purpose": self.purpose,
            "status": "processed",
            "status_details": None,
        }


@dataclass
class Running:
    """A batch, as far as the server knows it."""

    shown: dict[str, Any]
    plan: Plan
    path: tuple[str, ...]
    step: int = 0
    ran: bool = False
    sha256: str = ""
    done: list[str] = field(default_factory=list)


class Chaos:
    """Draws plans, fates and faults from a seed; after `calls` faults and `plans` bad ends the world is good."""

    def __init__(self, seed: int, *, calls: int = 12, plans: int = 4, bad_lines: float = 0.25, often: float = 0.12) -> None:
        self._draw = random.Random(seed)
        self._calls, self._plans, self._bad_lines, self._often = calls, plans, bad_lines, often

    def plan(self) -> Plan:
        if self._plans > 0 and self._draw.random() < 0.5:
            self._plans -= 1
            end = self._draw.choice([name for name in PATHS if name != "completed"])
            return Plan(end, self._draw.random(), (1,) if end == "failed" and self._draw.random() < 0.5 else ())
        return Plan()

    def fate(self) -> str:
        return self._draw.choice(FATES[1:]) if self._draw.random() < self._bad_lines else "good"

    def fault(self, method: str, path: str) -> str | None:
        if self._calls <= 0 or self._draw.random() > self._often:
            return None
        self._calls -= 1
        content = path.endswith("/content")
        kinds = [kind for kind in FAULTS if ("download" not in kind or content) and (kind != "cut_upload" or (method, path) == ("POST", "/v1/files"))]
        return self._draw.choice([kind for kind in kinds if kind not in ("slow",)])


def hashed_answer(custom_id: str, body: dict[str, Any]) -> str:
    """A score from 1 to 10, or A or B where the schema asks for an `answer`; the same for the same question."""
    digest = hashlib.sha256(custom_id.encode()).digest()
    schema = json.dumps(body.get("response_format", {}))
    return json.dumps({"answer": "AB"[digest[0] % 2]}) if '"answer"' in schema else json.dumps({"score": 1 + digest[0] % 10})


class BatchServer:
    """The server and its books. `charges[custom_id]` are the runs of a request in order, `created` the input SHA-256 and metadata
    of every batch ever created, with its planned end.

    `answer(custom_id, body)` gives an answer's text; `fates[custom_id]` what becomes of that request's runs, one after the other, else what the
    chaos draws, else good; `plans` those of the next batches; `looks` how many looks a batch takes to go one status further.
    """

    def __init__(
        self, answer: Callable[[str, dict[str, Any]], str] = hashed_answer, *, port: int = 0, looks: int = 1, chaos: Chaos | None = None
    ) -> None:
        self.answer, self.looks = answer, looks
        self._folder = tempfile.TemporaryDirectory(prefix="batch-server-")
        self._lock = threading.RLock()
        self.reset(chaos)
        self._server = ThreadingHTTPServer(("127.0.0.1", port), type("Handler", (_Handler,), {"books": self}))
        self._server.daemon_threads = True
        self.base_url = f"http://127.0.0.1:{self._server.server_address[1]}/v1"

    def reset(self, chaos: Chaos | None = None) -> None:
        """Forget everything."""
        with self._lock:
            self.chaos = chaos
            self.files: dict[str, Stored] = {}
            self.batches: dict[str, Running] = {}
            self.charges: dict[str, list[Charge]] = defaultdict(list)
            self.fates: dict[str, list[str]] = {}
            self.plans: list[Plan] = []
            self.faults: list[Fault] = []
            self.calls: list[str] = []
            self.created: list[tuple[str, str]] = []
            self.strangers: list[str] = []  # custom_ids of lines to add to the next output file
            self.dialect: set[str] = set()  # no_metadata, no_counts, no_usage, window, no_file_list
            self.forgotten: dict[str, Running] = {}  # batches that look unknown for now
            self.keys: dict[str, str] = {}  # file or batch -> the key of the account that it belongs to, in which alone it is known
            self._numbers = iter(range(1, 10**9))

    def __enter__(self) -> BatchServer:
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._folder.cleanup()

    def serve(self) -> None:
        self._server.serve_forever(0.05)

    def _new(self, kind: str) -> str:
        return f"{kind}_{next(self._numbers):08d}{hashlib.sha256(str(id(self)).encode()).hexdigest()[:8]}"

    # --- files ----------------------------------------------------------------------------------------------------------

    def store(self, content: bytes, filename: str, purpose: str) -> dict[str, Any]:
        with self._lock:
            file_id = self._new("file")
            path = Path(self._folder.name) / file_id
            path.write_bytes(content)
            self.files[file_id] = Stored(file_id, filename, purpose, path, int(time.time()))
            return self.files[file_id].shown()

    # --- batches --------------------------------------------------------------------------------------------------------

    def create(self, asked: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        with self._lock:
            file = self.files.get(str(asked.get("input_file_id")))
            metadata = asked.get("metadata") or {}
            if file is None:
                return 404, _error(f"No such File object: {asked.get('input_file_id')}", "invalid_request_error", "not_found")
            if file.purpose != "batch" or asked.get("endpoint") not in ("/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses"):
                return 400, _error("The file's purpose must be batch and the endpoint one that takes batches.", "invalid_request_error")
            if len(metadata) > 16 or any(len(name) > 64 or not isinstance(value, str) or len(value) > 512 for name, value in metadata.items()):
                return 400, _error("metadata: 16 pairs, keys of 64 and values of 512 characters at most", "invalid_request_error")
            plan = self.plans.pop(0) if self.plans else (self.chaos.plan() if self.chaos else Plan())
            now, batch_id = int(time.time()), self._new("batch")
            shown = {
                "id": batch_id,
                "object": "batch",
                "endpoint": asked["endpoint"],
                "errors": None,
                "input_file_id": file.id,
                "completion_window": asked["completion_window"],
                "status": "validating",
                "output_file_id": None,
                "error_file_id": None,
                "created_at": now,
                "expires_at": now + 86400,
                **{f"{name}_at": None for name in ("in_progress", "finalizing", "completed", "failed", "expired", "cancelling", "cancelled")},
                "request_counts": {"total": 0, "completed": 0, "failed": 0},
                "metadata": metadata or None,
            }
            sha256 = hashlib.sha256(file.path.read_bytes()).hexdigest()
            self.batches[batch_id] = Running(shown, plan, PATHS[plan.end], sha256=sha256)
            self.created.append((f"{sha256} {json.dumps(metadata, sort_keys=True)}", plan.end))
            return 200, self.show(self.batches[batch_id])

    def show(self, batch: Running) -> dict[str, Any]:
        shown = json.loads(json.dumps(batch.shown))
        if "no_metadata" in self.dialect:
            del shown["metadata"]
        if "no_counts" in self.dialect:
            del shown["request_counts"]
        if "window" in self.dialect:
            shown["completion_window"] = "1d"
        return dict(shown)

    def forget(self, batch_id: str) -> None:
        """Know nothing of a batch until it is remembered."""
        with self._lock:
            self.forgotten[batch_id] = self.batches.pop(batch_id)

    def remember(self, batch_id: str) -> None:
        with self._lock:
            self.batches[batch_id] = self.forgotten.pop(batch_id)

    def look(self, batch_id: str) -> None:
        """One look at a batch: every `looks` of them, it goes one status further."""
        batch = self.batches[batch_id]
        batch.step += 1
        place = min(batch.step // self.looks, len(batch.path) - 1, batch.path.index(batch.shown["status"]) + 1)
        status = batch.path[place]
        if status == batch.shown["status"]:
            return
        batch.shown["status"] = status
        if f"{status}_at" in batch.shown:
            batch.shown[f"{status}_at"] = int(time.time())
        if status == "in_progress":
            problems = self._validate(batch)
            if problems:
                self._fail(batch, problems)
        elif status == "failed":
            room = [{"code": "token_limit_exceeded", "line": None, "message": "Enqueued token limit reached.", "param": None}]
            lines = [
                {"code": "invalid_request", "line": line, "message": f"This line is malformed: fault {number}.", "param": None}
                for number, line in enumerate(batch.plan.blamed, start=1)
            ]
            general = [{"code": "server_error", "line": None, "message": "The batch could not be validated.", "param": None}]
            self._fail(batch, room if batch.plan.end == "no_room" else lines + (general if batch.plan.general else []) or general)
        elif status in ("finalizing", "cancelling", "lost") and not batch.ran:
            self._run(batch)
        if status == "lost":
            del self.batches[batch_id]
        if status in ("completed", "expired", "cancelled"):
            self._publish(batch)

    def _fail(self, batch: Running, problems: list[dict[str, Any]]) -> None:
        batch.shown["status"] = "failed"
        batch.path, batch.step = ("failed",), 0
        batch.shown["errors"] = {"object": "list", "data": problems}

    def _validate(self, batch: Running) -> list[dict[str, Any]]:
        problems, seen, count = [], set(), 0
        with self.files[batch.shown["input_file_id"]].path.open("rb") as stream:
            for number, line in enumerate(stream, start=1):
                count += 1
                try:
                    asked = json.loads(line)
                    custom_id, body = asked["custom_id"], asked["body"]
                    wrong = None if asked["method"] == "POST" and asked["url"] == batch.shown["endpoint"] and body["messages"] else "invalid_url"
                    wrong = "duplicate_custom_id" if custom_id in seen else wrong
                    seen.add(custom_id)
                except (ValueError, KeyError, TypeError):
                    wrong = "invalid_json_line"
                if wrong:
                    problems.append({"code": wrong, "line": number, "message": f"Line {number}: {wrong}", "param": None})
        if count > 50_000:
            problems.append({"code": "too_many_requests", "line": None, "message": f"{count} requests, at most 50000", "param": None})
        batch.shown["request_counts"]["total"] = count
        return problems or ([] if count else [{"code": "empty_file", "line": None, "message": "The file is empty.", "param": None}])

    def _run(self, batch: Running) -> None:
        """Run the requests, as many as the plan lets get done, and write the result lines."""
        batch.ran = True
        output, errors = Path(self._folder.name) / f"{batch.shown['id']}.out", Path(self._folder.name) / f"{batch.shown['id']}.err"
        total = batch.shown["request_counts"]["total"]
        whole = batch.path[-1] == "completed"
        limit = total if whole else int(batch.plan.share * total)
        ended = {"expired": "batch_expired", "cancelled": "batch_cancelled"}.get(batch.path[-1])
        counts = batch.shown["request_counts"]
        with self.files[batch.shown["input_file_id"]].path.open("rb") as stream, output.open("w") as good, errors.open("w") as bad:
            for number, text in enumerate(stream):
                asked = json.loads(text)
                if number >= limit:
                    counts["failed"] += 1
                    error = {"code": ended, "message": "This request could not be executed before the batch ended."}
                    bad.write(_line(asked["custom_id"], None, error) if ended else "")
                    continue
                succeeded, lines = self._answer(batch, asked)
                counts["completed" if succeeded else "failed"] += 1
                (good if succeeded else bad).write(lines)
            for custom_id in self.strangers:
                good.write(_line(custom_id, _response(custom_id, '{"score": 3}', {"model": "m"}), None))
            self.strangers = []

    def _answer(self, batch: Running, asked: dict[str, Any]) -> tuple[bool, str]:
        custom_id, body = asked["custom_id"], asked["body"]
        planned = self.fates.get(custom_id)
        fate = planned.pop(0) if planned else (self.chaos.fate() if self.chaos else "good")
        tokens = max(1, len(json.dumps(body)) // 4)
        if fate in CHARGED:
            delivered = fate in DELIVERED and batch.path[-1] != "lost"
            self.charges[custom_id].append(Charge(batch.shown["id"], fate, tokens, delivered))
        if fate.startswith("http_"):
            code = int(fate.removeprefix("http_"))
            said = {"error": {"message": f"it failed with {code}", "type": "x", "param": None, "code": None}}
            return False, _line(custom_id, {"status_code": code, "request_id": "req_1", "body": said}, None)
        if fate == "error":
            return False, _line(custom_id, None, {"code": "internal_error", "message": "The request failed."})
        if fate == "silent":
            return True, ""
        text = "I would rather describe it." if fate == "prose" else self.answer(custom_id, body)
        finish = "length" if fate == "length" else "stop"
        text = text[: len(text) // 2] if fate == "length" else text
        response = _response(custom_id, text, body, tokens, finish, "I cannot judge that." if fate == "refusal" else None)
        if "no_usage" in self.dialect:
            del response["body"]["usage"]
        line = _line(None if fate == "nameless" else custom_id, response, None)
        return True, {"torn": line[: len(line) // 2] + "\n", "twice": line + line}.get(fate, line)

    def _publish(self, batch: Running) -> None:
        for kind, suffix in (("output", "out"), ("error", "err")):
            path = Path(self._folder.name) / f"{batch.shown['id']}.{suffix}"
            if path.stat().st_size:
                file_id = self._new("file")
                self.files[file_id] = Stored(file_id, f"{batch.shown['id']}_{kind}.jsonl", "batch_output", path, int(time.time()))
                batch.shown[f"{kind}_file_id"] = file_id

    def cancel(self, batch_id: str) -> tuple[int, dict[str, Any]]:
        batch = self.batches[batch_id]
        if batch.shown["status"] not in ("validating", "in_progress", "scheduling", "finalizing"):
            return 400, _error(f"Cannot cancel a batch with status '{batch.shown['status']}'.", "invalid_request_error")
        if not batch.ran:
            self._validate(batch)
        batch.shown["status"] = "cancelling"
        batch.path, batch.step = ("cancelling", "cancelled"), 0
        if not batch.ran:
            self._run(batch)
        return 200, self.show(batch)

    # --- control --------------------------------------------------------------------------------------------------------

    def control(self, told: dict[str, Any]) -> None:
        with self._lock:
            if told.get("reset"):
                self.reset(Chaos(told["seed"]) if "seed" in told else None)
            self.plans += [Plan(**plan) for plan in told.get("plans", [])]
            self.faults += [Fault(**fault) for fault in told.get("faults", [])]
            self.fates.update(told.get("fates", {}))

    def state(self) -> dict[str, Any]:
        with self._lock:
            charges = {custom_id: [asdict(charge) for charge in runs] for custom_id, runs in self.charges.items()}
            return {"charges": charges, "created": self.created, "calls": self.calls, "files": len(self.files)}

    def fault(self, method: str, path: str) -> str | None:
        with self._lock:
            self.calls.append(f"{method} {path}")
            for fault in self.faults:
                if re.search(fault.route, f"{method} {path}"):
                    if fault.skip:
                        fault.skip -= 1
                        continue
                    fault.count -= 1
                    if fault.count <= 0:
                        self.faults.remove(fault)
                    return fault.kind
            return self.chaos.fault(method, path) if self.chaos else None


def _error(message: str, kind: str, code: str | None = None) -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}


def _line(custom_id: str | None, response: dict[str, Any] | None, error: dict[str, Any] | None) -> str:
    named = {"custom_id": custom_id} if custom_id is not None else {}
    return json.dumps({"id": "batch_req_1", **named, "response": response, "error": error}) + "\n"


def _response(custom_id: str, text: str, body: dict[str, Any], tokens: int = 100, finish: str = "stop", refusal: str | None = None) -> dict[str, Any]:
    message = {"role": "assistant", "content": None if refusal else text, "refusal": refusal}
    completion = {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 1,
        "model": body.get("model", "none"),
        "choices": [{"index": 0, "message": message, "logprobs": None, "finish_reason": finish}],
        "usage": {"prompt_tokens": tokens, "completion_tokens": 5, "total_tokens": tokens + 5},
        "system_fingerprint": "fp_1",
    }
    return {"status_code": 200, "request_id": "req_1", "body": completion}


class _Handler(BaseHTTPRequestHandler):
    """Routes, and what goes wrong on them."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    books: BatchServer

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._serve("GET")

    def do_POST(self) -> None:
        self._serve("POST")

    def do_DELETE(self) -> None:
        self._serve("DELETE")

    def _serve(self, method: str) -> None:
        address = urlparse(self.path)
        query = {name: values[0] for name, values in parse_qs(address.query).items()}
        length = int(self.headers.get("Content-Length") or 0)
        if address.path.startswith("/_"):
            told = json.loads(self.rfile.read(length) or b"{}")
            if method == "POST":
                self.books.control(told)
            return self._say(200, self.books.state())
        fault = self.books.fault(method, address.path)
        if fault == "cut_upload":
            self.rfile.read(length // 2)
            return self._cut()
        content = self.rfile.read(length)
        if not self.headers.get("Authorization"):
            return self._say(401, _error("You didn't provide an API key.", "invalid_request_error"))
        if fault in ("429", "500", "503"):
            return self._say(int(fault), _error(f"fault {fault}", "server_error"))
        if fault == "cut_before":
            return self._cut()
        if fault == "html":
            return self._send(200, b"<html>busy</html>", "text/html")
        if fault == "slow":
            time.sleep(0.3)
        if fault == FORGOTTEN:
            self.books.files.clear()
        with self.books._lock:
            code, answer = self._route(method, address.path.removeprefix("/v1").strip("/").split("/"), query, content)
        if fault == "500_after":
            return self._say(500, _error("fault after the effect", "server_error"))
        if fault == "cut_after":
            return self._cut()
        if isinstance(answer, Path):
            return self._content(answer, fault)
        return self._say(code, answer)

    def _route(self, method: str, parts: list[str], query: dict[str, str], content: bytes) -> tuple[int, Any]:
        match (method, parts):
            case (_, [_, name, *_]) if self.books.keys.get(name, self._key) != self._key:
                return 404, _error(f"No such object: {name}", "invalid_request_error", "not_found")
            case ("POST", ["files"]):
                fields = _multipart(self.headers.get("Content-Type", ""), content)
                return 200, self._mine(self.books.store(fields["file"][1], fields["file"][0] or "", fields["purpose"][1].decode()))
            case ("GET", ["files"]):
                if "no_file_list" in self.books.dialect:
                    return 404, _error("no such route", "invalid_request_error")
                wanted = [file for file in reversed(self.books.files.values()) if query.get("purpose") in (None, file.purpose)]
                return 200, _page([file.shown() for file in wanted if self.books.keys.get(file.id, self._key) == self._key], query, 10_000)
            case ("GET", ["files", name]) if name in self.books.files:
                return 200, self.books.files[name].shown()
            case ("GET", ["files", name, "content"]) if name in self.books.files:
                return 200, self.books.files[name].path
            case ("DELETE", ["files", name]) if name in self.books.files:
                del self.books.files[name]
                return 200, {"id": name, "object": "file", "deleted": True}
            case ("POST", ["batches"]):
                asked = json.loads(content)
                if self.books.keys.get(str(asked.get("input_file_id")), self._key) != self._key:
                    return 404, _error(f"No such File object: {asked['input_file_id']}", "invalid_request_error", "not_found")
                code, shown = self.books.create(asked)
                return code, self._mine(shown) if code == 200 else shown
            case ("GET", ["batches"]):
                mine = [batch for name, batch in reversed(self.books.batches.items()) if self.books.keys.get(name, self._key) == self._key]
                shown = _page([self.books.show(batch) for batch in mine], query, 20)
                for batch in shown["data"]:
                    self.books.look(batch["id"])
                shown["data"] = [self.books.show(self.books.batches[batch["id"]]) for batch in shown["data"] if batch["id"] in self.books.batches]
                return 200, shown
            case ("GET", ["batches", name]) if name in self.books.batches:
                self.books.look(name)
                if name in self.books.batches:
                    return 200, self.books.show(self.books.batches[name])
            case ("POST", ["batches", name, "cancel"]) if name in self.books.batches:
                return self.books.cancel(name)
        return 404, _error(f"No such object: {'/'.join(parts)}", "invalid_request_error", "not_found")

    @property
    def _key(self) -> str:
        return str(self.headers.get("Authorization"))

    def _mine(self, shown: dict[str, Any]) -> dict[str, Any]:
        self.books.keys[shown["id"]] = self._key
        return shown

    def _content(self, path: Path, fault: str | None) -> None:
        content = path.read_bytes()
        if fault == "short_download":  # well framed, and not all of it
            return self._send(200, content[: len(content) * 2 // 3], "application/octet-stream")
        if fault != "cut_download":
            return self._send(200, content, "application/octet-stream")
        self.send_response(200)
        self.send_header("Content-Type", "application/octet-stream")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[: len(content) // 2])
        self.wfile.flush()
        return self._cut()

    def _say(self, code: int, content: dict[str, Any]) -> None:
        self._send(code, json.dumps(content).encode(), "application/json")

    def _send(self, code: int, content: bytes, kind: str) -> None:
        self.send_response(code)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        if code in (429, 503):
            self.send_header("retry-after-ms", "5")
        self.end_headers()
        self.wfile.write(content)

    def _cut(self) -> None:
        """Reset the connection without another byte."""
        self.close_connection = True
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()
        self.wfile = self.rfile = open("/dev/null", "r+b")  # noqa: SIM115


def _page(items: list[dict[str, Any]], query: dict[str, str], limit: int) -> dict[str, Any]:
    start = next((place + 1 for place, item in enumerate(items) if item["id"] == query.get("after")), 0)
    page = items[start : start + int(query.get("limit", limit))]
    more = start + len(page) < len(items)
    return {
        "object": "list",
        "data": page,
        "first_id": page[0]["id"] if page else None,
        "last_id": page[-1]["id"] if page else None,
        "has_more": more,
    }


def _multipart(kind: str, content: bytes) -> dict[str, tuple[str | None, bytes]]:
    """The fields of a form, name -> (file name, content)."""
    boundary = b"--" + kind.split("boundary=")[1].strip('"').encode()
    found = {}
    for part in content.split(b"\r\n" + boundary)[0:-1] if content.startswith(boundary) else []:
        head, _, body = part.removeprefix(boundary).removeprefix(b"\r\n").partition(b"\r\n\r\n")
        headers = BytesParser().parsebytes(head + b"\r\n\r\n")
        name = headers.get_param("name", header="content-disposition")
        found[str(name)] = (headers.get_filename(), body)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--looks", type=int, default=1, help="looks that a batch takes to go one status further")
    parser.add_argument("--seed", type=int, help="draw failures from this seed")
    asked = parser.parse_args()
    server = BatchServer(port=asked.port, looks=asked.looks, chaos=None if asked.seed is None else Chaos(asked.seed))
    print(server.base_url, flush=True)
    server.serve()


if __name__ == "__main__":
    main()
