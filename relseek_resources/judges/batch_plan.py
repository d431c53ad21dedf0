"""What is about to be asked by Batch: request files and claims in the ledger, allowed or refused as a whole before any of it leaves the machine.

Here belong splitting, writing and claiming. What is to be asked is decided in `batches.py`, sending belongs to `batch_sending.py`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from relseek_resources.judges.answers import Request
from relseek_resources.judges.batch_files import RequestFile, request_line
from relseek_resources.judges.ledger import PLANNED, Batch, Group, Ledger
from relseek_resources.judges.provider import BatchError

Allow = Callable[[float], None]


@dataclass(frozen=True)
class Split:
    """The largest request file."""

    requests: int = 50_000
    bytes: int = 200_000_000


OPENAI_LIMITS = Split()


def anything(usd: float) -> None:
    """No budget."""


@contextlib.contextmanager
def planning(ledger: Ledger, group: Group, split: Split, allow: Allow) -> Iterator[Plan]:
    """A plan to fill, which is recorded on leaving: it will be sent, now or after a crash. The group's lock is held.

    An error inside, or what `allow` raises at the plan's estimate in USD, takes all of it back.
    """
    plan = Plan(ledger, group, split)
    try:
        yield plan
        plan.record(allow)
    except Exception:
        plan.abandon()
        raise


class Plan:
    """Writes requests into files of at most `split` and claims them in the ledger."""

    def __init__(self, ledger: Ledger, group: Group, split: Split) -> None:
        self._ledger, self._group, self._split = ledger, group, split
        self._file: RequestFile | None = None
        self._batch: Batch | None = None
        self._estimates: dict[int, float] = {}  # batch number -> USD
        self.requests = 0

    def __contains__(self, number: int) -> bool:
        """Whether a batch is this plan's."""
        return number in self._estimates

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
                self._seal()
                piece, size = [], 0
            piece.append((request, attempt, line))
            size += len(line)
        self._write(piece)

    def _write(self, piece: Sequence[tuple[Request, int, bytes]]) -> None:
        if not piece:
            return
        if self._batch is None or self._file is None:
            self._batch = self._ledger.begin_batch(self._group, piece[0][1])
            self._estimates[self._batch.number] = 0.0
            self._file = RequestFile(self._ledger.request_file(self._batch.number))
        claimed = self._ledger.claim(self._batch.number, [(request.custom_id, attempt) for request, attempt, _ in piece])
        for request, _, line in piece:
            if request.custom_id in claimed:
                self._file.add(line)
                self._estimates[self._batch.number] += request.usd
        self.requests += len(claimed)

    def _seal(self) -> None:
        batch, file = self._batch, self._file
        if batch is None or file is None:
            return
        self._batch = self._file = None
        if file.requests:
            self._ledger.update_batch(batch.number, fingerprint=file.seal(), requests=file.requests, bytes=file.bytes)
        else:
            file.abandon()
            self._ledger.discard_batch(batch.number)
            del self._estimates[batch.number]

    def record(self, allow: Allow) -> None:
        """Let it be sent."""
        self._seal()
        if self._estimates:
            self._ledger.start(self._estimates, allow)

    def abandon(self) -> None:
        """Take it back."""
        if self._file is not None:
            self._file.abandon()
        for number in self._estimates:
            _discard(self._ledger, number)


def take_back(ledger: Ledger, group: str) -> None:
    """Forget what was planned and not sent: it is planned anew from what is wanted now. The group's lock is held.

    Likewise in other groups that nobody is at work on, whose claims would keep this one waiting for nothing.
    """
    for name in {batch.group for batch in ledger.batches() if batch.status in PLANNED}:
        with contextlib.nullcontext(True) if name == group else ledger.lock(f"group {name}", wait=False) as ours:
            for batch in ledger.batches(name) if ours else ():
                if batch.status in PLANNED:
                    _discard(ledger, batch.number)


def _discard(ledger: Ledger, number: int) -> None:
    RequestFile.remove(ledger.request_file(number))
    ledger.discard_batch(number)
