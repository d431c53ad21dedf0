"""What came back: result files downloaded, read into the ledger, and put together as one row a request.

Here belong downloads, the joining of lines with requests, and what a request's attempts come to. What to ask again is decided in `batches.py`, a line
by itself is read in `batch_files.py`.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from relseek_resources.judges import provider
from relseek_resources.judges.answers import Answer, Reading, status_of
from relseek_resources.judges.batch_files import LONGEST_ERROR, read_results, request_lines
from relseek_resources.judges.batch_sending import called, record
from relseek_resources.judges.ledger import ENDED, Attempt, Batch, Ledger, Reply, Wanted

TEXTS = ("answered", "cut_off")  # outcomes that carry a text for `accept`
EXAMPLES = 3  # named in a warning
WRITTEN_AT_ONCE = 5000  # replies
RELEASES = 3  # times that a request is asked anew because validation refused other lines of its file


def collected(ledger: Ledger, client: Any, custom_ids: Sequence[str]) -> dict[str, list[Attempt]]:
    """The attempts at each request, after the results of every ended batch that they wait for have been read."""
    while True:
        found = ledger.attempts(custom_ids)
        waiting = {tries[-1].batch for tries in found.values() if tries[-1].outcome is None}
        if not waiting or not collect(ledger, client, [batch for batch in ledger.batches() if batch.number in waiting]):
            return found


def collect(ledger: Ledger, client: Any, batches: Sequence[Batch]) -> int:
    """Read the results of those batches that have ended and were not collected; returns how many they are."""
    ended = [batch for batch in batches if batch.status in ENDED and not batch.collected]
    for batch in ended:
        with ledger.lock(f"batch {batch.number}"):
            if not ledger.batch(batch.number).collected:
                _collect(ledger, client, batch)
    return len(ended)


def _collect(ledger: Ledger, client: Any, batch: Batch) -> None:
    """Download a batch's results and write down what they say; what they do not mention gets the status in which the batch ended."""
    warnings: list[str] = []
    if batch.completed and not batch.output_file_id and batch.status not in ("failed", "lost"):
        with provider.speaking(f"looking at {called(batch)}"):
            item = provider.retrieve(client, str(batch.batch_id))
        batch = batch if item is None else record(ledger, batch, item)
    files, gone = [], False
    for kind, file_id, lines in (("output", batch.output_file_id, batch.completed), ("errors", batch.error_file_id, batch.failed)):
        file = ledger.result_file(batch.number, kind)
        if file_id is None or batch.status == "lost":
            continue
        if file.exists() or provider.download(client, file_id, file, lines):
            files.append(file)
        else:
            gone = gone or kind == "output"
            warnings.append(f"{called(batch)}: its {kind} file {file_id} is gone; what it said is asked again, and charged again")
    if batch.completed and batch.status != "lost" and not batch.output_file_id:
        warnings.append(f"{called(batch)} counts {batch.completed} answers and has no output file; they are asked again, and charged again")
    with ledger.transaction():
        reading = _Results(ledger, batch)
        for file in files:
            reading.read(file)
        _close(ledger, batch, [*warnings, *reading.warnings()], reading, unread=gone or batch.status == "lost")
    ledger.request_file(batch.number).unlink(missing_ok=True)  # it can be written again from the requests; the results cannot


class _Results:
    """Reads the result files of one batch into the ledger: the first line of each request counts, everything else is counted and reported."""

    def __init__(self, ledger: Ledger, batch: Batch) -> None:
        self._ledger, self._batch = ledger, batch
        self._seen: dict[str, int | None] = dict.fromkeys(ledger.custom_ids(batch.number))  # None until there is a line
        self._replies: dict[str, Reply] = {}
        self._strangers: list[str] = []
        self._without_usage: set[str] = set()
        self._counted = self._nameless = 0  # requests whose tokens are known, and lines that name nobody
        self.strangers = self.duplicates = self.differing = self.unreadable_lines = 0

    def read(self, file: Any) -> None:
        for line in read_results(file):
            if line is None:
                self.unreadable_lines += 1
                continue
            custom_id, reply = line
            if custom_id is None or custom_id not in self._seen:
                self.strangers += 1
                self._nameless += custom_id is None
                if len(self._strangers) < EXAMPLES:
                    self._strangers.append(custom_id or "no custom_id")
            elif self._seen[custom_id] is None:
                self._seen[custom_id] = hash(reply)
                self._replies[custom_id] = reply
                if reply.prompt_tokens or reply.completion_tokens:
                    self._counted += 1
                elif reply.raw is not None or reply.outcome == "unreadable":
                    self._without_usage.add(custom_id)
                if len(self._replies) >= WRITTEN_AT_ONCE:
                    self._write()
            else:
                self.duplicates += 1
                self.differing += self._seen[custom_id] != hash(reply)
        self._write()

    def _write(self) -> None:
        self._ledger.record_replies(self._batch.number, self._replies)
        self._replies = {}

    def unaccounted(self, *, unread: bool) -> tuple[int, float]:
        """How many requests may have been charged without a count of tokens that says so, and what they cost at most, in USD.

        They are among those that have no line, or an answer without usage: all where what was answered could not be read, else as many as the
        provider counts as completed beyond the counted ones, or as there are torn and nameless lines. Which ones is not known, so it is the longest.
        """
        batch, file = self._batch, self._ledger.request_file(self._batch.number)
        possible = {custom_id for custom_id, line in self._seen.items() if line is None} | self._without_usage
        known = max(batch.completed - self._counted, self._nameless + self.unreadable_lines + len(self._without_usage))
        count = len(possible) if unread else min(len(possible), known)
        if not count or not batch.estimated_usd:
            return count, 0.0
        if count >= batch.requests or not file.exists():
            return count, batch.estimated_usd
        # An estimate is so much for a byte of the prompt, and the same for every answer: no share of it is above the larger of these two.
        longest = heapq.nlargest(count, (size for _, custom_id, size in request_lines(file) if custom_id in possible))
        return count, batch.estimated_usd * max(count / batch.requests, sum(longest) / batch.bytes)

    def warnings(self) -> Iterator[str]:
        name = called(self._batch)
        if self.strangers:
            yield f"{name}: {self.strangers} lines answer no request of this batch ({', '.join(self._strangers)}); they are not used"
        if self.duplicates:
            yield f"{name}: {self.duplicates} lines answer a request once more, {self.differing} of them otherwise; the first line counts"
        if self.unreadable_lines:
            yield f"{name}: {self.unreadable_lines} lines are no JSON objects; what they may have answered is asked again"


def _close(ledger: Ledger, batch: Batch, warnings: list[str], reading: _Results, *, unread: bool) -> None:
    """Give what has no line an outcome, and say what of it may be on the bill.

    Where validation named lines, the others are taken back and asked anew: nothing was wrong with them, as far as the provider says. One that stops
    at its first so many errors does not say all, so that this has an end.
    """
    if batch.status == "failed":
        blamed = _blamed(ledger, batch)
        ledger.record_replies(batch.number, blamed)
        if blamed:
            ledger.release(batch.number, RELEASES)
    said = {"failed": batch.errors_text[:LONGEST_ERROR] or "the batch failed", "lost": "the provider does not know the batch any more"}
    outcome = batch.status if batch.status in ("failed", "expired", "cancelled") else "missing"
    rest = ledger.record_rest(batch.number, Reply(outcome, error=said.get(batch.status, f"the batch is {batch.status} and holds no line for it")))
    if rest and batch.status == "completed":
        warnings.append(f"{called(batch)} is completed and says nothing of {rest} requests; they are asked again")
    uncounted, usd = reading.unaccounted(unread=unread)
    if usd:
        warnings.append(f"{called(batch)}: {uncounted} requests may have been charged, and no count of their tokens came; ${usd:.2g} count as spent")
    ledger.mark_collected(
        batch.number,
        strangers=reading.strangers,
        duplicates=reading.duplicates,
        unreadable_lines=reading.unreadable_lines,
        warnings=warnings,
        unaccounted_usd=usd,
    )


def _blamed(ledger: Ledger, batch: Batch) -> dict[str, Reply]:
    """The requests whose lines the provider refused at validation, each with all that it says of its line."""
    file = ledger.request_file(batch.number)
    said: dict[int, list[str]] = {}
    for error in batch.errors:
        if isinstance(error.get("line"), int):
            said.setdefault(error["line"], []).append(str(error.get("message") or error.get("code")))
    if not said or not file.exists():
        return {}
    blamed = {custom_id: "; ".join(dict.fromkeys(said[line])) for line, custom_id, _ in request_lines(file) if line in said}
    if len(blamed) < len(said):  # a number that the file does not have: the provider counts otherwise, and which lines it means is not known
        return {}
    return {custom_id: Reply("failed", final=True, error=message[:LONGEST_ERROR]) for custom_id, message in blamed.items()}


def status(attempt: Attempt, accept: Callable[[str, str], Reading]) -> str:
    """The status of an attempt's row."""
    if attempt.outcome in TEXTS and attempt.raw is not None:
        return status_of(attempt.custom_id, attempt.raw, accept, cut_off=attempt.outcome == "cut_off")
    return str(attempt.outcome)


def answers(
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
            status(last, accept),
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
