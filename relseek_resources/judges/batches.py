"""Asking a judge through an OpenAI-compatible Batch endpoint: nothing here waits for a provider, and nothing is paid twice.

Here belongs what is asked and asked again, and the looks at what is in flight. Request files are written in `batch_plan.py`, sent in
`batch_sending.py`, and their results read in `batch_results.py`; what has been sent is remembered in `ledger.py`. What an answer means and which
asset calls which function is the stage's business.

    with Ledger(store / "batches.sqlite") as ledger:
        submit(ledger, client, group, requests, window="24h", description={...})     # splits, writes, uploads, creates; unchanged requests: nothing
        poll(ledger, client)                                                         # one list call: what is in flight, what has ended
        settled = settle(ledger, client, group, requests, accept, attempts=3, price=price)   # downloads, joins, re-asks alone
        if settled.complete:                                                         # False while anything wanted is in flight
            rows = settled.answers                                                   # one `Answer` a wanted request, in the order of `requests`

    submit(ledger, client, group, requests, *, endpoint, window, description, allow, split) -> Submitted(batches, requests, known)
    poll(ledger, client) -> Polled(batches, ended, lost, warnings)
    settle(ledger, client, group, requests, accept, attempts, *, price, allow, split) -> Settled(complete, answers, in_flight, resubmitted, ...)
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

from relseek_resources.judges import batch_results, provider
from relseek_resources.judges.answers import Answer, Reading, Request
from relseek_resources.judges.batch_plan import OPENAI_LIMITS, Allow, Split, anything, planning, take_back
from relseek_resources.judges.batch_sending import called, earliest, find_interrupted, record, send, send_all, speaker
from relseek_resources.judges.ledger import AT_ONCE, ENDED, UNSENT, Attempt, Batch, Group, Ledger
from relseek_resources.judges.provider import BatchError, Refused

__all__ = ["BatchError", "Polled", "Refused", "Settled", "Split", "Submitted", "cancel", "describe", "free", "poll", "settle", "submit"]

log = logging.getLogger(__name__)

KNOWN = ("validating", "in_progress", "finalizing", "cancelling", *ENDED)  # what OpenAI calls its statuses, and `lost`, which is ours
MISSES = 3  # looks that do not find a batch before it is lost,
MISSES_APART = 300.0  # each so many seconds after the one before, at least
EXAMPLES = 3  # named in a message
MOST_DESCRIPTIONS = 10  # of the 16 pairs of metadata


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
    allow: Allow = anything,
    split: Split = OPENAI_LIMITS,
) -> Submitted:
    """Send the requests that were never asked, in files of at most `split`, and finish what an earlier submission began.

    All files are written and recorded before the first is sent.

    Args:
        client: `openai.OpenAI`; `provider.py` says what is repeated and how often, whatever the client's own `max_retries`.
        group: what the batches are for, such as a partition's key and a judge's name; one process at a time sends for a group.
        requests: read once, as a stream.
        description: up to ten further metadata of each batch, values cut at 512 characters.
        allow: called with what the new requests cost at most (the sum of their `usd`); what it raises refuses them all. It is called while nobody
            else can record anything in the ledger, so that two processes cannot be allowed the same money.

    Raises:
        BatchError: the ledger is of another endpoint or a request comes twice, then nothing was sent; or the provider refuses a file or a batch, then
            what was sent stays sent, and submitting again goes on from there.
    """
    client = speaker(ledger, client)
    settings = Group(group, endpoint, window, dict(itertools.islice((description or {}).items(), MOST_DESCRIPTIONS)))
    known = 0
    with ledger.lock(f"group {group}"):
        ledger.put_group(settings)
        _tidy(ledger, group)
        with planning(ledger, settings, split, allow) as plan:
            for some in _pieces(requests):
                asked = ledger.attempts([request.custom_id for request in some])
                new = {request.custom_id: request for request in some if request.custom_id not in asked}
                repeated = [custom_id for custom_id, tries in asked.items() if tries[0].batch in plan]
                if repeated or len(new) + sum(request.custom_id in asked for request in some) < len(some):
                    raise BatchError(f"request {repeated[0] if repeated else _repeated(some)} of {group} comes twice; a custom_id names one question")
                known += len(some) - len(new)
                plan.add([(request, 1) for request in new.values()])
        sent = send_all(ledger, client, group)
    return Submitted(tuple(sent), plan.requests, known)


def _tidy(ledger: Ledger, group: str) -> None:
    """Clear away what whoever was here before may have died over; the group's lock is held."""
    take_back(ledger, group)
    for batch in ledger.batches(group):
        if batch.collected:
            ledger.request_file(batch.number).unlink(missing_ok=True)


def _pieces(requests: Iterable[Request]) -> Iterator[list[Request]]:
    stream = iter(requests)
    while some := list(itertools.islice(stream, AT_ONCE)):
        yield some


def _repeated(requests: Sequence[Request]) -> str:
    seen: set[str] = set()
    return next(request.custom_id for request in requests if request.custom_id in seen or seen.add(request.custom_id))  # type: ignore[func-returns-value]


# --- looking ------------------------------------------------------------------------------------------------------------


def poll(ledger: Ledger, client: Any, *, seconds: float | None = None) -> Polled:
    """Look at every batch in flight with one list call, and further pages only as far as batches in flight are older.

    A batch that is not listed is asked for by its id. One that several looks do not find, minutes apart, becomes `lost`, with a warning; it is in
    flight again if it turns up before it is settled. A batch whose creation was interrupted is adopted when it is seen; one that was created twice
    all the same is cancelled. What was held is created when its time comes.

    Args:
        seconds: for whoever may not wait, how long to wait for each answer. Then no call is repeated, and what was held is left to the next look that
            has the time: to create it may take an upload.

    Raises:
        BatchError: the provider cannot be reached, or refuses; the ledger is of another endpoint, or nothing of what is in flight is known there,
            which is another account's answer.
    """
    client = speaker(ledger, client)
    if seconds is not None:
        client = provider.hurried(client, seconds)
    before = ledger.batches()
    flying = {batch.batch_id: batch for batch in before if batch.in_flight or (batch.status == "lost" and not batch.collected)}
    unsure = [batch for batch in before if batch.status == "creating"]
    ended: list[Batch] = []
    warnings: list[str] = []
    missing = _look_at(ledger, client, flying, unsure, before, ended, warnings) if flying or unsure else []
    lost = _missed(ledger, client, flying.values(), missing, warnings)
    if seconds is None:
        _retry_held(ledger, client, before, warnings)
    for warning in warnings:
        log.warning(warning)
    return Polled(tuple(batch for batch in ledger.batches() if batch.in_flight), tuple(ended), tuple(lost), tuple(warnings))


def _look_at(
    ledger: Ledger,
    client: Any,
    flying: Mapping[str | None, Batch],
    unsure: Sequence[Batch],
    before: Sequence[Batch],
    ended: list[Batch],
    warnings: list[str],
) -> list[Batch]:
    """Record what the list and, for what it does not hold, single questions say; returns the batches that the provider does not know."""
    unseen = dict(flying)
    of_file = {batch.input_file_id: batch for batch in before if batch.input_file_id}
    since = min([batch.created or earliest(batch) for batch in flying.values()] + [earliest(batch) for batch in unsure])
    with provider.speaking("looking at the batches"):
        for item in provider.listed(client, since):
            if item.id in unseen:
                ended.extend(_look(ledger, unseen.pop(item.id), item, warnings))
            elif item.id not in flying and (owner := of_file.get(str(getattr(item, "input_file_id", None)))):
                ended.extend(_meet(ledger, client, owner, item, warnings))
            if not unseen and not unsure:
                break
    missing = []
    for batch in unseen.values():
        with provider.speaking(f"looking at {called(batch)}"):
            item = provider.retrieve(client, str(batch.batch_id))
        if item is None:
            missing.append(batch)
        else:
            ended.extend(_look(ledger, batch, item, warnings))
    return missing


def _look(ledger: Ledger, batch: Batch, item: Any, warnings: list[str]) -> list[Batch]:
    """Record what was seen; returns the batch where it has ended."""
    batch = record(ledger, batch, item)
    if batch.status == "held":
        warnings.append(f"{called(batch)}: the provider has no room ({batch.errors_text}); it is created again later, nothing was charged")
    elif batch.status == "failed":
        warnings.append(f"{called(batch)} was refused at validation, nothing was charged: {batch.errors_text or 'the provider gives no reason'}")
    elif batch.status not in KNOWN:
        warnings.append(f"{called(batch)} has the status {batch.status!r}, which is not one of OpenAI's; it counts as in flight")
    return [batch] if batch.status in ENDED else []


def _meet(ledger: Ledger, client: Any, owner: Batch, item: Any, warnings: list[str]) -> list[Batch]:
    """A listed batch made of one of our files that the ledger does not have: ours whose answer was lost, or a second one of the same file."""
    owner = ledger.batch(owner.number)
    if owner.batch_id == item.id or item.id in owner.former:
        return []
    if owner.status == "creating":
        return _look(ledger, owner, item, warnings)
    if item.status not in ENDED and item.status != "cancelling":
        warnings.append(f"{called(owner)} was created a second time as {item.id}; the second one is cancelled")
        provider.cancel(client, item.id)
    return []


def _missed(ledger: Ledger, client: Any, flying: Iterable[Batch], missing: Sequence[Batch], warnings: list[str]) -> list[Batch]:
    """Count the looks that did not find a batch in flight; returns those that are lost by now.

    A look counts only where it finds another batch that was sent with the same key: else it says something of the key and nothing of the batch.

    Raises:
        BatchError: none of them was found.
    """
    missing = [batch for batch in missing if batch.in_flight]
    numbers = {batch.number for batch in missing}
    seen = {batch.account for batch in flying if batch.in_flight and batch.number not in numbers}
    if missing and not seen:
        raise BatchError(_unknown(client, missing))
    alike = [batch for batch in missing if batch.account in seen]
    if others := [batch for batch in missing if batch.account not in seen]:
        warnings.append(_unknown(client, others))
    lost = []
    for batch in alike:
        if time.time() - (batch.missed_at or 0.0) < MISSES_APART:
            continue
        news: dict[str, Any] = {"missed": batch.missed + 1, "missed_at": time.time()}
        if batch.missed + 1 < MISSES:
            ledger.record_look(batch, **news)
            warnings.append(f"{called(batch)} is not known to the provider at the moment; it is looked for again before it counts as lost")
            continue
        lost.append(ledger.record_look(batch, **news, status="lost", ended=time.time()))
        warnings.append(
            f"{called(batch)} is not known to the provider any more: its {batch.requests} requests are asked again, and may be charged a second time"
        )
    return lost


def _unknown(client: Any, batches: Sequence[Batch]) -> str:
    """That an account seems to be the wrong one."""
    others = any(batch.account != provider.account(client) for batch in batches)
    names = ", ".join(str(batch.batch_id) for batch in batches[:EXAMPLES])
    groups = ", ".join(dict.fromkeys(batch.group for batch in batches))
    return (
        f"{provider.address(client)} knows none of {len(batches)} batches in flight ({names}): the key that is set seems to be another account's"
        f"{', and it is not the key that they were sent with' if others else ''}. They stay in flight, and nothing is asked again: set the right "
        f"key; if the provider has forgotten them for good, cancel {groups} and submit again"
    )


def _retry_held(ledger: Ledger, client: Any, batches: Iterable[Batch], warnings: list[str]) -> None:
    for batch in batches:
        if batch.status != "held" or batch.held:
            continue
        with ledger.lock(f"group {batch.group}", wait=False) as ours:
            if not ours or ledger.batch(batch.number).status != "held":
                continue
            try:
                send(ledger, client, batch)
            except BatchError as error:
                warnings.append(str(error))


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
    allow: Allow = anything,
    split: Split = OPENAI_LIMITS,
) -> Settled:
    """Collect what has ended, and ask again, alone, what has no answer that `accept` calls scored, until `attempts` are used up.

    Args:
        requests: all wanted requests, read once, as a stream; the answers come in their order.
        accept: reads an answer's text, given its custom_id; a status other than `scored` asks again.
        price: USD for (prompt tokens, completion tokens); the costs and tokens of all attempts are added up in a request's row.
        allow: as for `submit`, of what is asked again. What has come back is kept whatever it raises.

    Everything of the group that has ended is collected, wanted or not: it is paid for. Does not look at the provider's list: `poll` before it. A
    request that the endpoint calls malformed is not asked again. What an earlier call began to send and did not is sent.

    Raises:
        BatchError: a request is wanted twice, the group was never submitted, the ledger is of another endpoint, a file cannot be downloaded whole, or
            the provider refuses what is asked again.
    """
    client = speaker(ledger, client)
    in_flight = 0
    with ledger.lock(f"group {group}"):
        settings = ledger.group(group)
        if settings is None:
            raise BatchError(f"{group} was never submitted; submit it first")
        if not settings.stopped:
            _tidy(ledger, group)
        batch_results.collect(ledger, client, ledger.batches(group))
        wanted = ledger.wanted()
        numbers: set[int] = set()
        with planning(ledger, settings, split, allow) as plan:
            for some in _pieces(requests):
                repeated = wanted.add([request.custom_id for request in some])
                if repeated is not None:
                    raise BatchError(f"request {repeated} of {group} is wanted twice; a custom_id names one question")
                found = batch_results.collected(ledger, client, [request.custom_id for request in some])
                numbers.update(attempt.batch for tries in found.values() for attempt in tries)
                in_flight += sum(tries[-1].outcome is None for tries in found.values())
                if not settings.stopped:
                    before = plan.requests
                    again = [(request, _next_attempt(found.get(request.custom_id, []), accept, attempts)) for request in some]
                    again = [(request, attempt) for request, attempt in again if attempt]
                    plan.add(again)
                    in_flight += len(again) - (plan.requests - before)  # claimed by another group meanwhile
        if not settings.stopped:
            send_all(ledger, client, group)
    complete = not in_flight and not plan.requests
    if not complete:
        wanted.drop()
    batches = tuple(batch for batch in ledger.batches() if batch.number in numbers)
    return Settled(
        complete,
        batch_results.answers(wanted, {batch.number: batch.batch_id for batch in batches}, accept, price) if complete else iter(()),
        in_flight,
        plan.requests,
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
    if last.outcome is None or last.final or last.attempt >= attempts or batch_results.status(last, accept) == "scored":
        return 0
    return last.attempt + 1


# --- cancelling and telling ---------------------------------------------------------------------------------------------


def cancel(ledger: Ledger, client: Any, group: str) -> list[Batch]:
    """Ask the provider to cancel what is in flight for a group; what is finished is kept and charged.

    Nothing of the group is asked again until it is submitted again: `settle` gives the rest the status `cancelled`.

    Raises:
        BatchError: the provider cannot be reached; cancelling again goes on from there.
    """
    client = speaker(ledger, client)
    ledger.stop_group(group)  # before the lock: a submission that holds it stops at its next file
    cancelled = []
    with ledger.lock(f"group {group}"):
        take_back(ledger, group)
        for batch in ledger.batches(group):
            if batch.in_flight or batch.status in UNSENT:
                with provider.speaking(f"cancelling {called(batch)}"):
                    cancelled.append(_cancel(ledger, client, batch))
    return cancelled


def _cancel(ledger: Ledger, client: Any, batch: Batch) -> Batch:
    if batch.status == "creating" and (made := find_interrupted(ledger, client, batch)):
        batch = record(ledger, batch, made)
    if batch.in_flight and batch.status != "cancelling":
        item = provider.cancel(client, str(batch.batch_id))
        return ledger.record_look(batch, status="lost", ended=time.time()) if item is None else record(ledger, batch, item)
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
