"""Request files and result files of a Batch endpoint, line by line.

Here belong what is written into the one and what is read from the other. Nothing here knows a provider or a ledger.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from relseek_resources.judges.answers import Request, read_completion, storable
from relseek_resources.judges.ledger import Reply
from relseek_resources.storage import StorageError

POINTLESS = (400, 404, 413, 422)  # HTTP statuses that the same request will meet again
FILTERED = ("content_filter", "content_policy_violation")
ENDINGS = {"batch_expired": "expired", "batch_cancelled": "cancelled"}
LONGEST_ERROR = 500

_decode = json.JSONDecoder().decode


def request_line(request: Request, endpoint: str) -> bytes:
    """The line of a request file that asks for a chat completion."""
    body = request.body if "\n" not in request.body and "\r" not in request.body else request.body.replace("\n", " ").replace("\r", " ")
    line = f'{{"custom_id": {json.dumps(request.custom_id)}, "method": "POST", "url": {json.dumps(endpoint)}, "body": {body}}}\n'
    try:
        return line.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"the body of request {request.custom_id} is no valid text ({error}); remove the lone surrogate") from error


class RequestFile:
    """A request file that grows line by line beside `path` and appears there, synced, when it is sealed."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.requests = 0
        self.bytes = 0
        self._hash = hashlib.sha256()
        self._temporary = self._beside(path)
        self._stream = self._temporary.open("wb")

    @staticmethod
    def _beside(path: Path) -> Path:
        return path.with_name(f".{path.name}.tmp")

    @staticmethod
    def remove(path: Path) -> None:
        """Remove a request file, finished or not."""
        RequestFile._beside(path).unlink(missing_ok=True)
        path.unlink(missing_ok=True)

    def add(self, line: bytes) -> None:
        self._stream.write(line)
        self._hash.update(line)
        self.requests += 1
        self.bytes += len(line)

    def seal(self) -> str:
        """Put the file in its place; returns its SHA-256, in hex."""
        try:
            self._stream.flush()
            os.fsync(self._stream.fileno())
            self._stream.close()
            os.replace(self._temporary, self.path)
            sync_folder(self.path.parent)
        except OSError as error:
            raise StorageError(f"{self.path}: not written ({error.strerror}); free some space, then run again") from error
        return self._hash.hexdigest()

    def abandon(self) -> None:
        self._stream.close()
        self._temporary.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def request_lines(path: Path) -> Iterator[tuple[int, str, int]]:
    """Number (from 1), custom_id and bytes of every line of a request file."""
    with path.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            yield number, str(_decode(line.decode())["custom_id"]), len(line)


def read_results(path: Path) -> Iterator[tuple[str | None, Reply] | None]:
    """What each line of a result file says: whose it is and the reply; None for the owner where it names none, None for a line that is no JSON."""
    with path.open("rb") as stream:
        for line in stream:
            if line.strip():
                yield read_result(line)


def read_result(line: bytes) -> tuple[str | None, Reply] | None:
    """One line of an output or error file, in any of the shapes that OpenAI documents."""
    try:
        content = _decode(line.decode())
    except (ValueError, RecursionError):
        return None
    if not isinstance(content, dict):
        return None
    custom_id = content.get("custom_id")
    return (custom_id if isinstance(custom_id, str) and custom_id else None), _reply(content)


def _reply(content: dict[str, Any]) -> Reply:
    response = content.get("response")
    if isinstance(response, dict):
        code, body = response.get("status_code"), response.get("body")
        if isinstance(body, str):  # OGX writes the completion as JSON text
            with contextlib.suppress(ValueError, RecursionError):
                body = json.loads(body)
        if isinstance(code, int) and code >= 400:
            return _http_failure(code, body)
        if isinstance(body, dict) and not content.get("error"):
            return _completion(body)
    error = content.get("error")
    if not error:
        return Reply("failed", error="the line holds neither an answer nor an error")
    code = error.get("code") if isinstance(error, dict) else None
    return Reply(ENDINGS.get(str(code), "failed"), error=_error_text(error))


def _http_failure(code: int, body: Any) -> Reply:
    error = body.get("error", body) if isinstance(body, dict) else body
    kind = error.get("code") if isinstance(error, dict) else None
    if kind in FILTERED:
        return Reply("refused", error=_error_text(error, code))
    return Reply("failed", final=code in POINTLESS, error=_error_text(error, code))


def _error_text(error: Any, code: int | None = None) -> str:
    if isinstance(error, dict):
        parts = [str(error[name]) for name in ("code", "message") if error.get(name)]
        said = ": ".join(parts) or json.dumps(error)
    else:
        said = str(error)
    return storable(said if code is None else f"HTTP {code} {said}")[:LONGEST_ERROR]


def _completion(body: dict[str, Any]) -> Reply:
    said = read_completion(body)
    return Reply(said.outcome, False, said.text, said.model, said.prompt_tokens, said.completion_tokens, said.error)
