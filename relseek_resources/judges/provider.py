"""Calls to an OpenAI-compatible Files and Batches interface: what is retried, what is looked up before it is repeated, what is refused.

Here belong single conversations with the provider through the official `openai` client. Which of them to hold, and what to remember of them,
belongs to `batches.py`, `batch_sending.py` and `ledger.py`.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from relseek_resources.judges.batch_files import sync_folder

log = logging.getLogger(__name__)
pause = time.sleep

RETRIES = 5  # of one call; the client's own backoff between them, or what Retry-After says
TRANSFER = 600.0  # seconds without a byte before a transfer of a file counts as cut
PAGE = 100  # batches in a page of the list, the most that OpenAI gives
FILE_PAGES = 20
LONGEST_WAIT = 60.0
SETTLING = 5.0  # seconds after which a call whose answer we did not get has had its effect or never will
SKEW = 3600.0  # how far the provider's clock may be from ours, in seconds
TRANSIENT = (408, 409, 425, 429)

Made = TypeVar("Made")


class BatchError(ValueError):
    """The provider refuses, cannot be reached, or answers in a way that cannot be read. The message carries its words and says what to do."""

    def __init__(self, message: str, *, code: int | None = None) -> None:
        super().__init__(message)
        self.code = code


class Refused(BatchError):
    """The provider has understood and will not: repeating the same call is pointless, and it had no effect. `param` is what it objects to."""

    def __init__(self, message: str, *, code: int | None = None, param: str | None = None) -> None:
        super().__init__(message, code=code)
        self.param = param


def address(client: Any) -> str:
    """The endpoint that a client speaks to."""
    return str(client.base_url).rstrip("/")


def account(client: Any) -> str:
    """What tells one key from another, without saying it."""
    return hashlib.sha256(str(client.api_key).encode()).hexdigest()[:12]


def patient(client: Any) -> Any:
    """The client, with retries for calls that may be repeated freely; the others are made through `find_or_make` and `download`."""
    return client.with_options(max_retries=RETRIES)


def hurried(client: Any, seconds: float) -> Any:
    """The client for somebody who may not wait: so many seconds for each answer, and no call is repeated."""
    return client.with_options(max_retries=0, timeout=seconds)


@contextlib.contextmanager
def speaking(what: str) -> Iterator[None]:
    """Turn what the client raises into a `BatchError` that says what was being done."""
    import openai

    try:
        yield
    except openai.APIStatusError as error:
        remedy = "; run again to go on from here" if error.status_code >= 500 or error.status_code in TRANSIENT else ""
        raise BatchError(f"{what}: the provider answers {error.status_code}: {said(error)}{remedy}", code=error.status_code) from error
    except openai.APIConnectionError as error:
        raise BatchError(f"{what}: the provider cannot be reached ({error.__cause__ or error}); run again to go on from here") from error
    except _broken() as error:
        raise BatchError(f"{what}: the provider's answer cannot be read ({error}); run again to go on from here") from error


def _broken() -> tuple[type[Exception], ...]:
    """What no answer, or half of one, raises: the client wraps only what happens before an answer's first byte."""
    import httpx2
    import openai

    return (openai.OpenAIError, httpx2.HTTPError, httpx2.StreamError, ConnectionError, json.JSONDecodeError)


def _page(ask: Callable[..., Any], **asked: Any) -> Any:
    """A page of a list. The client trips over an answer that is no JSON, such as a gateway's HTML."""
    try:
        return ask(**asked)
    except AttributeError as error:
        raise ConnectionError("the answer is no list") from error


def _batch(item: Any) -> Any:
    if not getattr(item, "id", None):
        raise ConnectionError(f"the answer is no batch: {str(item)[:200]!r}")
    return item


def said(error: Any) -> str:
    """The provider's own words."""
    body = error.body
    if isinstance(body, dict):
        body = body.get("error", body)
    return str(body.get("message") or body) if isinstance(body, dict) else str(body or error)


def find_or_make(client: Any, what: str, find: Callable[[], Made | None], make: Callable[[Any], Made]) -> Made:
    """Call `make` until it is answered; wherever it may have had its effect all the same, `find` looks before it is called again.

    Raises:
        Refused: `make` was refused; `code` is the HTTP status.
        BatchError: repetitions brought no answer, so whether it had its effect is not known.
    """
    import openai

    once = client.with_options(max_retries=0)
    for tries in range(RETRIES + 1):
        if tries:
            with speaking(what):
                found = find()
            if found is not None:
                return found
        failure: Exception | None = None
        unsure = True
        try:
            made = make(once)
            if getattr(made, "id", None):
                return made
        except openai.APIStatusError as error:
            if error.status_code < 500 and error.status_code not in TRANSIENT:
                raise Refused(f"{what}: refused ({error.status_code}): {said(error)}", code=error.status_code, param=error.param) from error
            failure, unsure = error, error.status_code != 429
        except _broken() as error:
            failure = error
        if tries < RETRIES:
            pause(max(_delay(failure, tries), SETTLING if unsure else 0))
    raise BatchError(f"{what}: no answer after {RETRIES + 1} tries ({failure}); run again to go on from here") from failure


def _delay(error: Exception | None, tries: int) -> float:
    """What the provider asks for, else half a second, doubled with every try."""
    headers = getattr(getattr(error, "response", None), "headers", {})
    for name, unit in (("retry-after-ms", 1000.0), ("retry-after", 1.0)):
        with contextlib.suppress(KeyError, ValueError):
            return min(max(float(headers[name]) / unit, 0.0), LONGEST_WAIT)
    return float(min(0.5 * 2**tries, 8.0))


# --- request files ------------------------------------------------------------------------------------------------------


def upload(client: Any, path: Path, name: str, *, unsure: bool) -> str:
    """Upload a request file and return its id; `unsure` says that an earlier upload of it may have arrived."""
    what = f"uploading {path.name}"
    size = path.stat().st_size

    def find() -> Any:
        return _uploaded(client, name, size)

    def make(once: Any) -> Any:
        with path.open("rb") as stream:
            made = once.files.create(file=(name, stream), purpose="batch", timeout=TRANSFER)
        if (getattr(made, "bytes", None) or size) != size:
            discard_file(client, made.id)
            raise ConnectionError(f"{made.bytes} of {size} bytes arrived")
        return made

    found = None
    if unsure:
        with speaking(what):
            found = find()
    return str((found or find_or_make(client, what, find, make)).id)


def _uploaded(client: Any, name: str, size: int) -> Any:
    """The uploaded file of that name, whole; parts of it, and second copies, are deleted. None too where the provider lists no files."""
    import openai

    found = None
    after: str | None = None
    for _ in range(FILE_PAGES):
        try:
            page = _page(client.files.list, purpose="batch", limit=1000, order="desc", **({"after": after} if after else {}))
        except (openai.NotFoundError, openai.BadRequestError) as error:
            log.warning("the provider lists no files (%s); the request file is uploaded once more", said(error))
            return found
        files = list(page.data or [])
        for file in files:
            if getattr(file, "filename", None) != name:
                continue
            if found is None and (getattr(file, "bytes", None) or size) == size:
                found = file
            else:
                discard_file(client, file.id)
        if not files or not getattr(page, "has_more", False) or files[-1].id == after:
            break
        after = files[-1].id
    return found


def discard_file(client: Any, file_id: str) -> None:
    """Delete a file of ours that no batch uses; one that stays costs nothing and expires."""
    try:
        client.files.delete(file_id)
    except _broken() as error:
        log.warning("the unused request file %s stays with the provider (%s)", file_id, error)


# --- batches ------------------------------------------------------------------------------------------------------------


def listed(client: Any, since: float) -> Iterator[Any]:
    """The provider's batches, newest first, page by page, as far as those created at `since` (Unix seconds, its clock)."""
    after: str | None = None
    seen: set[str] = set()
    while True:
        page = _page(client.batches.list, limit=PAGE, **({"after": after} if after else {}))
        batches = [batch for batch in page.data or [] if batch.id not in seen]
        yield from batches
        seen.update(batch.id for batch in batches)
        if not batches or not getattr(page, "has_more", False) or (batches[-1].created_at or 0) < since:
            return
        after = batches[-1].id


def cancel(client: Any, batch_id: str) -> Any:
    """Cancel a batch, and return what it is then; None where the provider does not know it. One that has ended stays as it is."""
    import openai

    try:
        return _batch(client.batches.cancel(batch_id))
    except (openai.BadRequestError, openai.ConflictError, openai.NotFoundError):
        return retrieve(client, batch_id)


def retrieve(client: Any, batch_id: str) -> Any:
    """The batch, or None where the provider does not know it."""
    import openai

    try:
        return _batch(client.batches.retrieve(batch_id))
    except openai.NotFoundError:
        return None


# --- results ------------------------------------------------------------------------------------------------------------


def download(client: Any, file_id: str, target: Path, lines: int) -> bool:
    """Stream a result file to `target`, which appears only when it is whole; returns whether the provider still has it.

    Whole means: as long as the provider says the file is; where it does not say, or says otherwise, ended by a whole line and at least `lines`
    lines (what the batch counted), or twice the same without a stated length.

    Raises:
        BatchError: no try brought the whole file.
    """
    import openai

    once = client.with_options(max_retries=0)
    what = f"downloading {target.name} ({file_id})"
    temporary = target.with_name(f".{target.name}.tmp")
    before: tuple[int, int] | None = None
    trouble = ""
    for tries in range(RETRIES + 1):
        failure: Exception | None = None
        try:
            size = _size(client, file_id)
            got = _stream(once, file_id, temporary)
            if got[0] == size or (_ends(temporary) and (got[1] >= lines > 0 or (size is None and got in ((0, 0), before)))):
                os.replace(temporary, target)
                sync_folder(target.parent)
                return True
            before, trouble = got, f"{got[0]} bytes in {got[1]} lines came, {'an unknown number' if size is None else size} are there"
        except openai.NotFoundError:
            return False
        except _broken() as error:
            code = getattr(error, "status_code", None)
            if code is not None and code < 500 and code not in TRANSIENT:
                raise Refused(f"{what}: refused ({code}): {said(error)}", code=code) from error
            failure, trouble = error, str(error.__cause__ or error)
        if tries < RETRIES:
            pause(_delay(failure, tries))
    temporary.unlink(missing_ok=True)
    raise BatchError(f"{what}: not whole after {RETRIES + 1} tries ({trouble}); run again to go on from here")


def _size(client: Any, file_id: str) -> int | None:
    """How long the provider says the file is."""
    import openai

    try:
        size = getattr(client.files.retrieve(file_id), "bytes", None)
    except (openai.NotFoundError, openai.BadRequestError):
        return None  # some list no result files; the download itself says whether it is there
    return size if isinstance(size, int) and size > 0 else None


def _stream(once: Any, file_id: str, temporary: Path) -> tuple[int, int]:
    """Write the content as it comes; returns bytes and lines."""
    size = lines = 0
    with once.files.with_streaming_response.content(file_id, timeout=TRANSFER) as response, temporary.open("wb") as stream:
        for piece in response.iter_bytes(1 << 20):
            stream.write(piece)
            size += len(piece)
            lines += piece.count(b"\n")
        stream.flush()
        os.fsync(stream.fileno())
    return size, lines


def _ends(path: Path) -> bool:
    """Whether the file ends with a whole line."""
    with path.open("rb") as stream:
        size = stream.seek(0, os.SEEK_END)
        stream.seek(max(0, size - 1))
        return size == 0 or stream.read() == b"\n"
