"""What participants of a trial said and were answered: one line of JSON a turn, appended and synced before the reply is sent.

Here belong the log's schema, writing and reading it. Who may speak belongs in `trial_arms.py`, the route in `trial_chat.py`.
"""

from __future__ import annotations

import fcntl
import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd

from relseek_resources.storage import Column, StorageError, TableSchema

STATUSES = ("ok", "failed", "full")  # only a turn that is ok has a reply and is part of the conversation; full: the context had no room for one

TURNS = TableSchema(
    "trial_turns",
    (
        Column("allocation", "string", "SHA-256 of arms, participants and hashed tokens: which arms file allocated the participant"),
        Column("participant", "string", "who spoke, as the arms file names them"),
        Column("arm", "string", "the participant's arm"),
        Column("session", "string", "the conversation"),
        Column("turn", "integer", "number of the message within its session, those without a reply counted", low=1),
        Column("status", "string", "whether there was a reply", choices=STATUSES),
        Column("message", "string", "what the participant wrote"),
        Column("reply", "string", "what the model answered", nullable=True),
        Column("error", "string", "why there was no reply; the participant is not told", nullable=True),
        Column(
            "finish_reason",
            "string",
            "how the reply ended; stop or length where it is whole",
            nullable=True,
        ),
        Column("system", "string", "the system prompt, empty for none"),
        Column("model", "string", "the model, as the server names it"),
        Column("vector", "string", "the vector, as the server names it"),
        Column("vector_sha256", "string", "SHA-256 of the vector's file"),
        Column("layers", "json", "the blocks that the arm names; null for those of the vector's file", nullable=True),
        Column("multiplier", "number", "λ of the arm"),
        Column("temperature", "number", "of the sampling", low=0),
        Column("top_p", "number", "of the sampling", low=0, high=1),
        Column("max_tokens", "integer", "the most tokens that a reply may have", low=1),
        Column("seed", "integer", "of the sampling"),
        Column("received", "string", "when the message arrived", "ISO 8601, UTC"),
        Column("first_token", "string", "when the reply began", "ISO 8601, UTC", nullable=True),
        Column("finished", "string", "when the reply was whole, or had failed", "ISO 8601, UTC"),
        Column("seconds_to_first_token", "number", "from `received`, by a clock that is never set", "s", nullable=True, low=0),
        Column("seconds", "number", "from `received` to `finished`, by the same clock", "s", low=0),
    ),
    key=("participant", "session", "turn"),
)


class TurnLog:
    """The log of a running server, the only one that writes it. Blocking, and safe to call from several threads.

    A line that was being written when the machine stopped was answered to nobody. It is moved to FILE.torn when the log is opened next, so that
    every reader finds whole lines.
    """

    def __init__(self, file: Path) -> None:
        """Open the log or begin one.

        Raises:
            StorageError: it cannot be written, another server writes it, or a line before the last is damaged.
        """
        self.file = file
        self._writing = threading.Lock()
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            self._stream = os.open(file, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
        except OSError as error:
            raise StorageError(f"{file}: cannot be written ({error.strerror})") from error
        try:
            fcntl.flock(self._stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._set_torn_line_apart()
            self.turns = list(_lines(file))
        except BlockingIOError as error:
            self.close()
            raise StorageError(f"{file}: another server writes this log; give each its own") from error
        except BaseException:
            self.close()
            raise

    def append(self, turn: dict[str, Any]) -> None:
        """Write a turn whole, on the disk when this returns.

        Raises:
            StorageError: it could not be written; the log is as it was.
        """
        line = (json.dumps({name: turn[name] for name in TURNS.names}, ensure_ascii=False, allow_nan=False) + "\n").encode()
        with self._writing:
            size = os.fstat(self._stream).st_size
            try:
                written = os.write(self._stream, line)
                if written < len(line):
                    raise OSError(28, "no space left on the device")
                os.fsync(self._stream)
            except OSError as error:
                os.ftruncate(self._stream, size)
                raise StorageError(f"{self.file}: not written ({error.strerror})") from error

    def close(self) -> None:
        os.close(self._stream)

    def _set_torn_line_apart(self) -> None:
        content = self.file.read_bytes()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            with os.fdopen(os.open(f"{self.file}.torn", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "ab") as torn:
                torn.write(content[whole:] + b"\n")
                torn.flush()
                os.fsync(torn.fileno())
            os.ftruncate(self._stream, whole)
            os.fsync(self._stream)


def read_turns(file: Path) -> pd.DataFrame:
    """The turns of a log, checked against `TURNS`, `layers` as lists. A last line that is being written, or was torn, is left out.

    Raises:
        StorageError: the file cannot be read, a line before the last is damaged, a row is not as declared.
    """
    rows = list(_lines(file))
    frame = pd.DataFrame(rows, columns=None if rows else list(TURNS.names), dtype=object)
    TURNS.to_arrow(frame, str(file))
    return frame


def _lines(file: Path) -> Iterator[dict[str, Any]]:
    try:
        content = file.read_bytes()
    except OSError as error:
        raise StorageError(f"{file}: cannot be read ({error.strerror})") from error
    for number, line in enumerate(content.split(b"\n")[:-1], 1):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise StorageError(f"{file}, line {number}: not valid JSON ({error}); mend the line") from error
        if not isinstance(row, dict) or set(row) != set(TURNS.names):
            raise StorageError(f"{file}, line {number}: not a turn as this version writes it; begin another log")
        yield row
