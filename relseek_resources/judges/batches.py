"""Asking a judge through an OpenAI-compatible Batch endpoint: nothing here waits for a provider, and nothing is paid twice.

Here belong splitting, sending, looking, collecting and re-asking. What has been sent is remembered in `ledger.py`; what is asked, what an answer
means and which asset calls which function is the stage's business.

    with Ledger(store / "batches.sqlite") as ledger:
        submit(ledger, client, group, requests, window="24h", description={...})     # splits, writes, uploads, creates; unchanged requests: nothing
        poll(ledger, client)                                                         # one list call: what is in flight, what has ended
        settled = settle(ledger, client, group, requests, accept, attempts=3, price=price)   # downloads, joins, re-asks alone
        if settled.complete:                                                         # False while anything wanted is in flight
            rows = settled.answers                                                   # one `Answer` a wanted request, in the order of `requests`

    submit(ledger, client, group, requests, *, endpoint, window, description, usd_per_request, split) -> Submitted(batches, requests, known)
    poll(ledger, client) -> Polled(batches, ended, lost, warnings)
    settle(ledger, client, group, requests, accept, attempts, *, price, split) -> Settled(complete, answers, in_flight, resubmitted, ...)
    cancel(ledger, client, group) -> list[Batch]
    describe(ledger, group=None) -> list[str]
    ledger.batches(group=None) -> list[Batch]
"""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from relseek_resources.judges import provider
from relseek_resources.judges.answers import Answer, Reading, Request
from relseek_resources.judges.batch_files import RequestFile, line_custom_id, read_results, request_line
from relseek_resources.judges.ledger import AT_ONCE, ENDED, UNSENT, Attempt, Batch, Group, Ledger, Reply, Wanted
from relseek_resources.judges.provider import BatchError, Refused

__all__ = ["BatchError", "Polled", "Refused", "Settled", "Split", "Submitted", "cancel", "describe", "free", "poll", "settle", "submit"]

log = logging.getLogger(__name__)

KNOWN = ("validating", "in_progress", "finalizing", "cancelling", *ENDED)  # what OpenAI calls its statuses, and `lost`, which is ours
NO_ROOM = (
    "token_limit_exceeded",
    "rate_limit_exceeded",
    "billing_hard_limit_reached",
    "insufficient_quota",
)  # the batch is sound, the account is full
FIRST_HOLD, LONGEST_HOLD = 60.0, 3600.0  # seconds
LONGEST_VALUE = 512  # characters of a metadata value
MOST_DESCRIPTIONS = 10  # of the 16 pairs of metadata
TEXTS = ("answered", "cut_off")  # outcomes that carry a text for `accept`
EXAMPLES = 3  # named in a warning
WRITTEN_AT_ONCE = 5000  # replies


@dataclass(frozen=True)
class Split:
    """The largest request file: OpenAI's own limits."""

    requests: int = 50_000
    bytes: int = 200_000_000


@dataclass(frozen=True)
class Submitted:
    """What a submission sent: its batches, how many requests they hold, and how many were asked before and were left alone."""

    batches: tuple[Batch, ...]
    requests: int
    known: int


@dataclass(frozen=True)
class Polled:
    """What a look at the provider found: `batches` in flight, those that `ended` since the last look, those it no longer knows, and warnings."""

    batches: tuple[Batch, ...]
    ended: tuple[Batch, ...]
    lost: tuple[Batch, ...]
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class Settled:
    """What has come back for the wanted requests.

    `complete` means that every wanted request has its last answer; then `answers` yields one row each, in the order of the requests, read from
    the ledger as it goes (so the ledger stays open meanwhile). Else `answers` is empty. `in_flight` and `resubmitted` count requests; `strangers`
    (lines that name no request of their batch), `duplicates` (further lines for an answered request) and `unreadable_lines` count lines in the
    results of every batch that holds a wanted request. `batches` are those.
    """

    complete: bool
    answers: Iterator[Answer]
    in_flight: int
    resubmitted: int
    strangers: int
    duplicates: int
    unreadable_lines: int
    warnings: tuple[str, ...]
    batches: tuple[Batch, ...]


def free(prompt_tokens: int, completion_tokens: int) -> float:
    """The price of an endpoint that charges nothing."""
    return 0.0


# --- sending ------------------------------------------------------------------------------------------------------------


def submit(
    ledger: Ledger,
    client: Any,
    group: str,
    requests: Iterable[Request],
    *,
    endpoint: str = "/v1/chat/completions",
    window: str = "24h",
    description: Mapping[str, str] | None = None,
    usd_per_request: float = 0.0,
    split: Split = Split(),
) -> Submitted:
    """Send the requests that were never asked, in files of at most `split`; finish first what an earlier submission began.

    Args:
        client: `openai.OpenAI`; `provider.py` says what is repeated and how often, whatever the client's own `max_retries`.
        group: what the batches are for, such as a partition's key and a judge's name; one process at a time sends for a group.
        requests: read once, as a stream.
        description: up to ten further metadata of each batch, values cut at 512 characters.
        usd_per_request: the estimate shown for what is in flight.

    Raises:
        BatchError: the provider refuses a file or a batch, or a request comes twice. What was sent stays sent; submitting again goes on from there.
    """
    client = provider.patient(client)
    settings = Group(group, endpoint, window, dict(itertools.islice((description or {}).items(), MOST_DESCRIPTIONS)), usd_per_request)
    with ledger.lock(f"group {group}"):
        ledger.put_group(settings)
        finished = _finish(ledger, client, group)
        known = 0
        with _Sender(ledger, client, settings, split) as sender:
            for some in _pieces(requests):
                asked = ledger.attempts([request.custom_id for request in some])
                new = {request.custom_id: request for request in some if request.custom_id not in asked}
                repeated = [custom_id for custom_id, tries in asked.items() if tries[0].batch in sender.numbers]
                if repeated or len(new) + sum(request.custom_id in asked for request in some) < len(some):
                    raise BatchError(f"request {repeated[0] if repeated else _repeated(some)} of {group} comes twice; a custom_id names one question")
                known += len(some) - len(new)
                sender.add([(request, 1) for request in new.values()])
    return Submitted((*finished, *sender.sent), sender.requests, known)


def _pieces(requests: Iterable[Request]) -> Iterator[list[Request]]:
    stream = iter(requests)
    while some := list(itertools.islice(stream, AT_ONCE)):
        yield some


def _repeated(requests: Sequence[Request]) -> str:
    seen: set[str] = set()
    return next(request.custom_id for request in requests if request.custom_id in seen or seen.add(request.custom_id))  # type: ignore[func-returns-value]


class _Sender:
    """Writes requests into files, claims them in the ledger, and sends each file when it is full; the last one on leaving."""

    def __init__(self, ledger: Ledger, client: Any, group: Group, split: Split) -> None:
        self._ledger, self._client, self._group, self._split = ledger, client, group, split
        self._file: RequestFile | None = None
        self._batch: Batch | None = None
        self.numbers: set[int] = set()
        self.sent: list[Batch] = []
        self.requests = 0

    def __enter__(self) -> _Sender:
        return self

    def __exit__(self, failed: type[BaseException] | None, *error: object) -> None:
        if failed is None:
            self._send()
        elif self._file is not None:
            self._file.abandon()  # its claims are taken back by the next submission, as after a crash

    def add(self, wanted: Sequence[tuple[Request, int]]) -> None:
        """Ask each request as the given attempt, unless somebody else has claimed that attempt."""
        piece: list[tuple[Request, int, bytes]] = []
        size = 0
        for request, attempt in wanted:
            line = request_line(request, self._group.endpoint)
            if len(line) > self._split.bytes:
                raise BatchError(f"request {request.custom_id} takes {len(line)} bytes, a request file may have {self._split.bytes}; shorten it")
            requests, written = (self._file.requests, self._file.bytes) if self._file else (0, 0)
            if requests + len(piece) >= self._split.requests or written + size + len(line) > self._split.bytes:
                self._write(piece)
                self._send()
                piece, size = [], 0
            piece.append((request, attempt, line))
            size += len(line)
        self._write(piece)

    def _write(self, piece: Sequence[tuple[Request, int, bytes]]) -> None:
        if not piece:
            return
        if self._batch is None or self._file is None:
            self._batch = self._ledger.begin_batch(self._group, piece[0][1])
            self._file = RequestFile(self._ledger.request_file(self._batch.number))
            self.numbers.add(self._batch.number)
        claimed = self._ledger.claim(self._batch.number, [(request.custom_id, attempt) for request, attempt, _ in piece])
        for request, _, line in piece:
            if request.custom_id in claimed:
                self._file.add(line)
        self.requests += len(claimed)

    def _send(self) -> None:
        batch, file = self._batch, self._file
        if batch is None or file is None:
            return
        self._batch = self._file = None
        if not file.requests:
            file.abandon()
            self._ledger.discard_batch(batch.number)
            return
        fingerprint = file.seal()
        estimated = self._group.usd_per_request * file.requests
        self._ledger.update_batch(
            batch.number, status="written", fingerprint=fingerprint, requests=file.requests, bytes=file.bytes, estimated_usd=estimated
        )
        current = self._ledger.group(self._group.name)
        if current is not None and current.stopped:
            raise BatchError(f"{self._group.name} was cancelled meanwhile; what was sent before is being cancelled")
        self.sent.append(_send(self._ledger, self._client, self._ledger.batch(batch.number)))


def _finish(ledger: Ledger, client: Any, group: str) -> list[Batch]:
    """Send what an earlier submission wrote and did not send, and take back what it did not finish writing; the group's lock is held."""
    for batch in ledger.batches():
        if batch.status == "writing" and batch.group == group:
            _discard(ledger, batch)
        elif batch.status == "writing":
            with ledger.lock(f"group {batch.group}", wait=False) as ours:
                if ours:  # whoever was writing it has died, and its claims would keep others waiting for nothing
                    _discard(ledger, ledger.batch(batch.number))
    for batch in ledger.batches(group):
        if batch.collected:
            ledger.request_file(batch.number).unlink(missing_ok=True)  # whoever collected it may have died before this
    now = time.time()
    unsent = [batch for batch in ledger.batches(group) if batch.status in UNSENT and not (batch.status == "held" and (batch.held_until or 0) > now)]
    return [_send(ledger, client, batch) for batch in unsent]


def _discard(ledger: Ledger, batch: Batch) -> None:
    if batch.status == "writing":
        RequestFile.remove(ledger.request_file(batch.number))
        ledger.discard_batch(batch.number)


def _send(ledger: Ledger, client: Any, batch: Batch) -> Batch:
    """Bring a written batch to the provider, from wherever an earlier try got to."""
    if batch.status in ("written", "uploading"):
        unsure = batch.status == "uploading"
        ledger.update_batch(batch.number, status="uploading")
        file_id = provider.upload(client, ledger.request_file(batch.number), _file_name(ledger, batch), unsure=unsure)
        batch = ledger.update_batch(batch.number, status="uploaded", input_file_id=file_id)
    return _create(ledger, client, batch)


def _file_name(ledger: Ledger, batch: Batch) -> str:
    return f"relseek-{ledger.id[:12]}-{batch.number:06d}-{(batch.fingerprint or '')[:16]}.jsonl"


def _create(ledger: Ledger, client: Any, batch: Batch) -> Batch:
    """Create the batch of an uploaded file, once: after a crash or a lost answer the provider's list is searched before anything is repeated."""
    unsure = batch.status == "creating"
    if not unsure:
        batch = ledger.update_batch(batch.number, status="creating", intended=time.time())
    what = f"creating batch {batch.number} of {batch.group}"

    def find() -> Any:
        return next((item for item in provider.listed(client, _intent(batch)) if _is_ours(ledger, batch, item)), None)

    def make(once: Any) -> Any:
        return once.batches.create(
            input_file_id=batch.input_file_id, endpoint=batch.endpoint, completion_window=batch.window, metadata=_metadata(ledger, batch)
        )

    found = None
    if unsure:
        provider.pause(max(0.0, (batch.intended or 0.0) + provider.SETTLING - time.time()))
        with provider.speaking(what):
            found = find()
    try:
        made = found or provider.find_or_make(client, what, find, make)
    except Refused as error:
        # An uploaded file that the provider has forgotten meanwhile is uploaded again.
        ledger.update_batch(batch.number, status="written" if error.code == 404 else "uploaded", errors=[{"message": str(error)}])
        raise
    return _record(ledger, batch, made)


def _metadata(ledger: Ledger, batch: Batch) -> dict[str, str]:
    """What the batch carries. Its number tells it from an earlier one with the same content, all of which is being asked again."""
    ours = {"relseek_ledger": ledger.id, "relseek_batch": str(batch.number), "relseek_fingerprint": batch.fingerprint or ""}
    described = {**batch.description, "group": batch.group, **ours}
    return {name[:64]: str(value)[:LONGEST_VALUE] for name, value in described.items()}


def _is_ours(ledger: Ledger, batch: Batch, item: Any) -> bool:
    """Whether a listed batch is this one: by its input file, which only this one has, or by its fingerprint where a file was uploaded twice."""
    if item.id in batch.former:
        return False
    metadata = getattr(item, "metadata", None) or {}
    ours = {"relseek_ledger": ledger.id, "relseek_batch": str(batch.number), "relseek_fingerprint": batch.fingerprint}
    return ours.items() <= metadata.items() or (batch.input_file_id is not None and getattr(item, "input_file_id", None) == batch.input_file_id)


def _record(ledger: Ledger, batch: Batch, item: Any) -> Batch:
    """Write down what the provider says of a batch. One that it had no room for is held, to be created again."""
    counts = getattr(item, "request_counts", None)
    listed = getattr(getattr(item, "errors", None), "data", None) or []
    errors = [{name: getattr(error, name, None) for name in ("code", "line", "message")} for error in listed]
    if item.status == "failed" and errors and all(error["code"] in NO_ROOM for error in errors):
        wait = min(LONGEST_HOLD, FIRST_HOLD * 2 ** len(batch.former))
        return ledger.update_batch(
            batch.number, status="held", batch_id=None, former=[*batch.former, item.id], errors=errors, held_until=time.time() + wait
        )
    return ledger.update_batch(
        batch.number,
        status=item.status,
        batch_id=item.id,
        output_file_id=getattr(item, "output_file_id", None),
        error_file_id=getattr(item, "error_file_id", None),
        completed=getattr(counts, "completed", None) or 0,
        failed=getattr(counts, "failed", None) or 0,
        created=getattr(item, "created_at", None),
        ended=time.time() if item.status in ENDED else None,
        errors=errors,
    )


# --- looking ------------------------------------------------------------------------------------------------------------


def poll(ledger: Ledger, client: Any) -> Polled:
    """Look at every batch in flight with one list call, and further pages only as far as batches in flight are older.

    A batch that is not listed is asked for by its id; one that the provider does not know becomes `lost`, with a warning. A batch whose creation
    was interrupted is adopted when it is seen; one that was created twice all the same is cancelled. What was held is created when its time comes.

    Raises:
        BatchError: the provider cannot be reached, or refuses.
    """
    client = provider.patient(client)
    before = ledger.batches()
    unseen = {batch.batch_id: batch for batch in before if batch.in_flight}
    flying = dict(unseen)
    unsure = [batch for batch in before if batch.status == "creating"]
    ended: list[Batch] = []
    warnings: list[str] = []
    if flying or unsure:
        of_file = {batch.input_file_id: batch for batch in before if batch.input_file_id}
        since = min([batch.created or _intent(batch) for batch in flying.values()] + [_intent(batch) for batch in unsure])
        with provider.speaking("looking at the batches"):
            for item in provider.listed(client, since):
                if item.id in unseen:
                    ended.extend(_look(ledger, unseen.pop(item.id), item, warnings))
                elif item.id not in flying and (owner := of_file.get(str(getattr(item, "input_file_id", None)))):
                    ended.extend(_meet(ledger, client, owner, item, warnings))
                if not unseen and not unsure:
                    break
    lost = _look_alone(ledger, client, unseen.values(), ended, warnings)
    _retry_held(ledger, client, before, warnings)
    for warning in warnings:
        log.warning(warning)
    return Polled(tuple(batch for batch in ledger.batches() if batch.in_flight), tuple(ended), tuple(lost), tuple(warnings))


def _intent(batch: Batch) -> float:
    """Before this, by the provider's clock, a batch cannot have been created."""
    return (batch.intended or 0.0) - provider.SKEW


def _look(ledger: Ledger, batch: Batch, item: Any, warnings: list[str]) -> list[Batch]:
    """Record what was seen; returns the batch where it has ended."""
    batch = _record(ledger, batch, item)
    if batch.status == "held":
        warnings.append(f"{_name(batch)}: the provider has no room ({batch.errors_text}); it is created again later, nothing was charged")
    elif batch.status == "failed":
        warnings.append(f"{_name(batch)} was refused at validation, nothing was charged: {batch.errors_text or 'the provider gives no reason'}")
    elif batch.status not in KNOWN:
        warnings.append(f"{_name(batch)} has the status {batch.status!r}, which is not one of OpenAI's; it counts as in flight")
    return [batch] if batch.status in ENDED else []


def _meet(ledger: Ledger, client: Any, owner: Batch, item: Any, warnings: list[str]) -> list[Batch]:
    """A listed batch made of one of our files that the ledger does not have: ours whose answer was lost, or a second one of the same file."""
    owner = ledger.batch(owner.number)
    if owner.batch_id == item.id or item.id in owner.former:
        return []
    if owner.status == "creating":
        return _look(ledger, owner, item, warnings)
    if item.status not in ENDED and item.status != "cancelling":
        warnings.append(f"{_name(owner)} was created a second time as {item.id}; the second one is cancelled")
        provider.cancel(client, item.id)
    return []


def _look_alone(ledger: Ledger, client: Any, batches: Iterable[Batch], ended: list[Batch], warnings: list[str]) -> list[Batch]:
    """Ask for each batch that was not listed; returns those that the provider does not know."""
    lost = []
    for batch in batches:
        with provider.speaking(f"looking at {_name(batch)}"):
            item = provider.retrieve(client, str(batch.batch_id))
        if item is not None:
            ended.extend(_look(ledger, batch, item, warnings))
            continue
        lost.append(ledger.update_batch(batch.number, status="lost", ended=time.time()))
        warnings.append(
            f"{_name(batch)} is not known to the provider any more: its {batch.requests} requests are asked again, and may be charged a second time"
        )
    return lost


def _retry_held(ledger: Ledger, client: Any, batches: Iterable[Batch], warnings: list[str]) -> None:
    now = time.time()
    for batch in batches:
        if batch.status != "held" or (batch.held_until or 0) > now:
            continue
        with ledger.lock(f"group {batch.group}", wait=False) as ours:
            if not ours or ledger.batch(batch.number).status != "held":
                continue
            try:
                _create(ledger, client, batch)
            except BatchError as error:
                warnings.append(str(error))


def _name(batch: Batch) -> str:
    return f"batch {batch.number} of {batch.group} ({batch.batch_id or 'not created'})"


# --- collecting ---------------------------------------------------------------------------------------------------------


def settle(
    ledger: Ledger,
    client: Any,
    group: str,
    requests: Iterable[Request],
    accept: Callable[[str, str], Reading],
    attempts: int,
    *,
    price: Callable[[int, int], float] = free,
    split: Split = Split(),
) -> Settled:
    """Collect what has ended, and ask again, alone, what has no answer that `accept` calls scored, until `attempts` are used up.

    Args:
        requests: all wanted requests, read once, as a stream; the answers come in their order.
        accept: reads an answer's text, given its custom_id; a status other than `scored` asks again.
        price: USD for (prompt tokens, completion tokens); the costs and tokens of all attempts are added up in a request's row.

    Does not look at the provider's list: `poll` before it. A request that the endpoint calls malformed is not asked again.

    Raises:
        BatchError: a request is wanted twice, the group was never submitted, or a file cannot be downloaded whole.
    """
    client = provider.patient(client)
    in_flight = 0
    with ledger.lock(f"group {group}"):
        settings = ledger.group(group)
        if settings is None:
            raise BatchError(f"{group} was never submitted; submit it first")
        if not settings.stopped:
            _finish(ledger, client, group)
        wanted = ledger.wanted()
        numbers: set[int] = set()
        with _Sender(ledger, client, settings, split) as sender:
            for some in _pieces(requests):
                repeated = wanted.add([request.custom_id for request in some])
                if repeated is not None:
                    raise BatchError(f"request {repeated} of {group} is wanted twice; a custom_id names one question")
                found = _collected(ledger, client, [request.custom_id for request in some])
                numbers.update(attempt.batch for tries in found.values() for attempt in tries)
                in_flight += sum(tries[-1].outcome is None for tries in found.values())
                if not settings.stopped:
                    again = [(request, _next_attempt(found.get(request.custom_id, []), accept, attempts)) for request in some]
                    before = sender.requests
                    again = [(request, attempt) for request, attempt in again if attempt]
                    sender.add(again)
                    in_flight += len(again) - (sender.requests - before)  # claimed by another group meanwhile
    complete = not in_flight and not sender.requests
    if not complete:
        wanted.drop()
    batches = tuple(batch for batch in ledger.batches() if batch.number in numbers)
    return Settled(
        complete,
        _answers(wanted, {batch.number: batch.batch_id for batch in batches}, accept, price) if complete else iter(()),
        in_flight,
        sender.requests,
        sum(batch.strangers for batch in batches),
        sum(batch.duplicates for batch in batches),
        sum(batch.unreadable_lines for batch in batches),
        tuple(warning for batch in batches for warning in batch.warnings),
        batches,
    )


def _next_attempt(tries: Sequence[Attempt], accept: Callable[[str, str], Reading], attempts: int) -> int:
    """The number of the attempt to make now, 0 for none."""
    if not tries:
        return 1
    last = tries[-1]
    if last.outcome is None or last.final or last.attempt >= attempts or _status(last, accept) == "scored":
        return 0
    return last.attempt + 1


def _status(attempt: Attempt, accept: Callable[[str, str], Reading]) -> str:
    """The status of an attempt's row; a text that was cut off and can be read all the same is scored."""
    if attempt.outcome in TEXTS and attempt.raw is not None:
        status = accept(attempt.custom_id, attempt.raw).status
        return "cut_off" if status == "unreadable" and attempt.outcome == "cut_off" else status
    return str(attempt.outcome)


def _answers(
    wanted: Wanted, batch_ids: Mapping[int, str | None], accept: Callable[[str, str], Reading], price: Callable[[int, int], float]
) -> Iterator[Answer]:
    """One row a wanted request: its last attempt, with the tokens and costs of all."""
    for custom_id, tries in wanted.attempts():
        if not tries:
            yield Answer(custom_id, "cancelled", attempt=0, error="the group was cancelled before the request was sent")
            continue
        last = tries[-1]
        yield Answer(
            custom_id,
            _status(last, accept),
            last.raw,
            last.model,
            sum(attempt.prompt_tokens for attempt in tries),
            sum(attempt.completion_tokens for attempt in tries),
            sum(price(attempt.prompt_tokens, attempt.completion_tokens) for attempt in tries),
            last.attempt,
            batch_ids.get(last.batch),
            last.error,
        )
    wanted.drop()


def _collected(ledger: Ledger, client: Any, custom_ids: Sequence[str]) -> dict[str, list[Attempt]]:
    """The attempts at each request, after the results of every ended batch that they wait for have been read."""
    while True:
        found = ledger.attempts(custom_ids)
        waiting = {tries[-1].batch for tries in found.values() if tries[-1].outcome is None}
        ended = [batch for batch in map(ledger.batch, sorted(waiting)) if batch.status in ENDED and not batch.collected]
        if not ended:
            return found
        for batch in ended:
            with ledger.lock(f"batch {batch.number}"):
                if not ledger.batch(batch.number).collected:
                    _collect(ledger, client, batch)


def _collect(ledger: Ledger, client: Any, batch: Batch) -> None:
    """Download a batch's results and write down what they say; what they do not mention gets the status in which the batch ended."""
    warnings: list[str] = []
    if batch.completed and not batch.output_file_id and batch.status not in ("failed", "lost"):
        with provider.speaking(f"looking at {_name(batch)}"):
            item = provider.retrieve(client, str(batch.batch_id))
        batch = batch if item is None else _record(ledger, batch, item)
    files = []
    for kind, file_id, lines in (("output", batch.output_file_id, batch.completed), ("errors", batch.error_file_id, batch.failed)):
        file = ledger.result_file(batch.number, kind)
        if file_id is None or batch.status == "lost":
            continue
        if file.exists() or provider.download(client, file_id, file, lines):
            files.append(file)
        else:
            warnings.append(f"{_name(batch)}: its {kind} file {file_id} is gone; what it said is asked again, and charged again")
    if batch.completed and batch.status != "lost" and not batch.output_file_id:
        warnings.append(f"{_name(batch)} counts {batch.completed} answers and has no output file; they are asked again, and charged again")
    with ledger.transaction():
        reading = _Results(ledger, batch)
        for file in files:
            reading.read(file)
        _close(ledger, batch, [*warnings, *reading.warnings()], reading)
    ledger.request_file(batch.number).unlink(missing_ok=True)  # it can be written again from the requests; the results cannot


class _Results:
    """Reads the result files of one batch into the ledger: the first line of each request counts, everything else is counted and reported."""

    def __init__(self, ledger: Ledger, batch: Batch) -> None:
        self._ledger, self._batch = ledger, batch
        self._seen: dict[str, int | None] = dict.fromkeys(ledger.custom_ids(batch.number))  # None until there is a line
        self._replies: dict[str, Reply] = {}
        self._strangers: list[str] = []
        self.strangers = self.duplicates = self.differing = self.unreadable_lines = 0

    def read(self, file: Any) -> None:
        for line in read_results(file):
            if line is None:
                self.unreadable_lines += 1
                continue
            custom_id, reply = line
            if custom_id is None or custom_id not in self._seen:
                self.strangers += 1
                if len(self._strangers) < EXAMPLES:
                    self._strangers.append(custom_id or "no custom_id")
            elif self._seen[custom_id] is None:
                self._seen[custom_id] = hash(reply)
                self._replies[custom_id] = reply
                if len(self._replies) >= WRITTEN_AT_ONCE:
                    self._write()
            else:
                self.duplicates += 1
                self.differing += self._seen[custom_id] != hash(reply)
        self._write()

    def _write(self) -> None:
        self._ledger.record_replies(self._batch.number, self._replies)
        self._replies = {}

    def warnings(self) -> Iterator[str]:
        name = _name(self._batch)
        if self.strangers:
            yield f"{name}: {self.strangers} lines answer no request of this batch ({', '.join(self._strangers)}); they are not used"
        if self.duplicates:
            yield f"{name}: {self.duplicates} lines answer a request once more, {self.differing} of them otherwise; the first line counts"
        if self.unreadable_lines:
            yield f"{name}: {self.unreadable_lines} lines are no JSON objects; what they may have answered is asked again"


def _close(ledger: Ledger, batch: Batch, warnings: list[str], reading: _Results) -> None:
    """Give what has no line an outcome. Where validation named lines, the others are taken back and asked anew: nothing was wrong with them."""
    if batch.status == "failed":
        blamed = _blamed(ledger, batch)
        ledger.record_replies(batch.number, blamed)
        if blamed:
            ledger.release(batch.number)
    said = {"failed": batch.errors_text or "the batch failed", "lost": "the provider does not know the batch any more"}
    outcome = batch.status if batch.status in ("failed", "expired", "cancelled") else "missing"
    rest = ledger.record_rest(batch.number, Reply(outcome, error=said.get(batch.status, f"the batch is {batch.status} and holds no line for it")))
    if rest and batch.status == "completed":
        warnings.append(f"{_name(batch)} is completed and says nothing of {rest} requests; they are asked again")
    ledger.mark_collected(
        batch.number, strangers=reading.strangers, duplicates=reading.duplicates, unreadable_lines=reading.unreadable_lines, warnings=warnings
    )


def _blamed(ledger: Ledger, batch: Batch) -> dict[str, Reply]:
    """The requests whose lines the provider refused at validation."""
    file = ledger.request_file(batch.number)
    named = {error["line"]: error for error in batch.errors if isinstance(error.get("line"), int)}
    if len(named) < len(batch.errors) or not file.exists():
        return {}
    blamed = {line_custom_id(file, line): str(error.get("message") or error.get("code")) for line, error in named.items()}
    return {} if None in blamed else {str(custom_id): Reply("failed", final=True, error=message) for custom_id, message in blamed.items()}


# --- cancelling and telling ---------------------------------------------------------------------------------------------


def cancel(ledger: Ledger, client: Any, group: str) -> list[Batch]:
    """Ask the provider to cancel what is in flight for a group; what is finished is kept and charged.

    Nothing of the group is asked again until it is submitted again: `settle` gives the rest the status `cancelled`.

    Raises:
        BatchError: the provider cannot be reached; cancelling again goes on from there.
    """
    client = provider.patient(client)
    ledger.stop_group(group)  # before the lock: a submission that holds it stops at its next file
    cancelled = []
    with ledger.lock(f"group {group}"):
        for batch in ledger.batches(group):
            if batch.status == "writing":
                _discard(ledger, batch)
            elif batch.in_flight or batch.status in UNSENT:
                with provider.speaking(f"cancelling {_name(batch)}"):
                    cancelled.append(_cancel(ledger, client, batch))
    return cancelled


def _cancel(ledger: Ledger, client: Any, batch: Batch) -> Batch:
    if batch.status == "creating":
        item = next((item for item in provider.listed(client, _intent(batch)) if _is_ours(ledger, batch, item)), None)
        batch = batch if item is None else _record(ledger, batch, item)
    if batch.in_flight and batch.status != "cancelling":
        item = provider.cancel(client, str(batch.batch_id))
        return ledger.update_batch(batch.number, status="lost", ended=time.time()) if item is None else _record(ledger, batch, item)
    return ledger.update_batch(batch.number, status="cancelled", ended=time.time()) if batch.status in UNSENT else batch


def describe(ledger: Ledger, group: str | None = None) -> list[str]:
    """For people, a line a batch: what it is for, its status, how long since, how many requests are answered, and what it will cost."""
    return [_describe(batch) for batch in ledger.batches(group)]


def _describe(batch: Batch) -> str:
    since = batch.created or batch.written
    until = batch.ended or time.time()
    parts = [
        f"{batch.number}. {batch.group}",
        f"{batch.status} {'after' if batch.status in ENDED else 'for'} {_duration(until - since)} (window {batch.window})",
        f"{batch.completed} of {batch.requests} requests answered" + (f", {batch.failed} failed" if batch.failed else ""),
        f"attempt {batch.attempt}",
        f"about ${batch.estimated_usd:.2f}",
        batch.batch_id or "not created yet",
    ]
    if batch.status in ENDED:
        parts.append("collected" if batch.collected else "not collected")
    if batch.errors_text:
        parts.append(batch.errors_text)
    return " · ".join(parts)


def _duration(seconds: float) -> str:
    minutes = max(0, round(seconds / 60))
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
