"""The ledger of batches: what has been sent to a provider, written down before each call and after it.

Here belong the tables, the questions put to them, and the locks that keep two processes from sending for the same group. Calling the provider
belongs to `provider.py`, deciding what to send to `batch_plan.py`, sending it to `batch_sending.py`.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import itertools
import json
import sqlite3
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple, Self

from relseek_resources.storage import StorageError

PLANNED = ("writing", "written")  # nothing of it has left this machine
UNSENT = ("writing", "written", "uploading", "uploaded", "creating", "held")  # in this order; the provider knows no batch yet, or may not
ENDED = ("completed", "expired", "cancelled", "failed", "lost")
FORMAT = 3
AT_ONCE = 1000  # custom_ids in one question

TABLES = """
CREATE TABLE about (ledger TEXT NOT NULL);
CREATE TABLE groups (
    name TEXT PRIMARY KEY, endpoint TEXT NOT NULL, "window" TEXT NOT NULL, description TEXT NOT NULL,
    stopped INTEGER NOT NULL DEFAULT 0
) WITHOUT ROWID;
CREATE TABLE batches (
    number INTEGER PRIMARY KEY AUTOINCREMENT, "group" TEXT NOT NULL, status TEXT NOT NULL, attempt INTEGER NOT NULL DEFAULT 1,
    requests INTEGER NOT NULL DEFAULT 0, bytes INTEGER NOT NULL DEFAULT 0, estimated_usd REAL NOT NULL DEFAULT 0, fingerprint TEXT,
    endpoint TEXT NOT NULL, "window" TEXT NOT NULL, description TEXT NOT NULL, batch_id TEXT, input_file_id TEXT, output_file_id TEXT,
    error_file_id TEXT, completed INTEGER NOT NULL DEFAULT 0, failed INTEGER NOT NULL DEFAULT 0, written REAL NOT NULL, intended REAL, created REAL,
    ended REAL, held_until REAL, base_url TEXT, account TEXT, missed INTEGER NOT NULL DEFAULT 0, missed_at REAL,
    prompt_tokens INTEGER NOT NULL DEFAULT 0, completion_tokens INTEGER NOT NULL DEFAULT 0, collected INTEGER NOT NULL DEFAULT 0,
    former TEXT NOT NULL DEFAULT '[]', errors TEXT NOT NULL DEFAULT '[]', strangers INTEGER NOT NULL DEFAULT 0,
    duplicates INTEGER NOT NULL DEFAULT 0, unreadable_lines INTEGER NOT NULL DEFAULT 0, warnings TEXT NOT NULL DEFAULT '[]',
    unaccounted_usd REAL NOT NULL DEFAULT 0
);
CREATE INDEX batches_of_group ON batches ("group");
CREATE TABLE requests (
    batch INTEGER NOT NULL, custom_id TEXT NOT NULL, attempt INTEGER NOT NULL, outcome TEXT, final INTEGER NOT NULL DEFAULT 0, raw TEXT, model TEXT,
    prompt_tokens INTEGER NOT NULL DEFAULT 0, completion_tokens INTEGER NOT NULL DEFAULT 0, error TEXT, PRIMARY KEY (batch, custom_id)
) WITHOUT ROWID;
CREATE UNIQUE INDEX attempts ON requests (custom_id, attempt);
CREATE TABLE released (custom_id TEXT PRIMARY KEY, times INTEGER NOT NULL) WITHOUT ROWID;
"""

# From each earlier format to the next: a ledger says what was paid for, so that an old one is read on.
MIGRATIONS = {
    2: """
ALTER TABLE batches ADD COLUMN unaccounted_usd REAL NOT NULL DEFAULT 0;
UPDATE batches SET unaccounted_usd = estimated_usd WHERE collected AND status = 'lost';
CREATE TABLE released (custom_id TEXT PRIMARY KEY, times INTEGER NOT NULL) WITHOUT ROWID
""",
}


@dataclass(frozen=True)
class Batch:
    """One batch. `status` is the provider's, or one of UNSENT before the provider knows it, or `lost` when it no longer does.

    Times are Unix seconds: `intended` when its creation was first tried, `created` by the provider's clock. `completed` and `failed` are the
    provider's counts of requests, `estimated_usd` is ours, tokens are those of its answers once it is collected, and `unaccounted_usd` is the part of
    the estimate that may have been charged without a count of tokens that says so. `base_url` and `account` (a hash of the key) say where its
    creation was tried, `missed` how many looks did not find it, the last of them at `missed_at`. A batch that the provider had no room for is `held`
    until `held_until` and created again; `former` are the ids of its earlier creations.
    """

    number: int
    group: str
    status: str
    attempt: int
    requests: int
    bytes: int
    estimated_usd: float
    fingerprint: str | None
    endpoint: str
    window: str
    description: dict[str, str]
    batch_id: str | None
    input_file_id: str | None
    output_file_id: str | None
    error_file_id: str | None
    completed: int
    failed: int
    written: float
    intended: float | None
    created: float | None
    ended: float | None
    held_until: float | None
    base_url: str | None
    account: str | None
    missed: int
    missed_at: float | None
    prompt_tokens: int
    completion_tokens: int
    collected: bool
    former: list[str]
    errors: list[dict[str, Any]]
    strangers: int
    duplicates: int
    unreadable_lines: int
    warnings: list[str]
    unaccounted_usd: float

    @property
    def in_flight(self) -> bool:
        """Whether the provider has it and has not ended it; a status that we do not know is in flight."""
        return self.status not in ENDED and self.status not in UNSENT

    @property
    def held(self) -> bool:
        """Whether it is to be created again, and not yet."""
        return self.status == "held" and (self.held_until or 0.0) > time.time()

    @property
    def errors_text(self) -> str:
        """What the provider says of the whole batch, in its own words."""
        return "; ".join(
            f"{'line ' + str(error['line']) + ': ' if error.get('line') is not None else ''}{error.get('message') or error.get('code') or error}"
            for error in self.errors
        )


class Attempt(NamedTuple):
    """One attempt at one request; `outcome` is None until its batch is collected, `final` says that asking again is pointless."""

    custom_id: str
    batch: int
    attempt: int
    outcome: str | None
    final: bool
    raw: str | None
    model: str | None
    prompt_tokens: int
    completion_tokens: int
    error: str | None


class Reply(NamedTuple):
    """What a result file says of one request."""

    outcome: str
    final: bool = False
    raw: str | None = None
    model: str | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    error: str | None = None


@dataclass(frozen=True)
class Group:
    """How the requests of a group are sent; `stopped` after a cancellation, until it is submitted again."""

    name: str
    endpoint: str
    window: str
    description: dict[str, str]
    stopped: bool = False


class Total(NamedTuple):
    """What a group has cost, in tokens of collected answers; what it may still cost, the estimates of its batches that are not collected, in USD; and
    what collected batches may have cost beyond those tokens.
    """

    group: str
    prompt_tokens: int
    completion_tokens: int
    to_come_usd: float
    unaccounted_usd: float


JSON_FIELDS = ("description", "former", "errors", "warnings")
COLUMNS = ", ".join(f'"{field.name}"' for field in fields(Batch))
ATTEMPT = ", ".join(f"requests.{name}" for name in Attempt._fields)


class Ledger:
    """The ledger at `path` (SQLite); its request files, result files and locks lie in the folder beside it, named alike without the suffix.

    Several processes of one machine may use a ledger at once. An instance belongs to the thread that opened it.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self.folder = self.path.with_suffix("")
        try:
            for name in ("requests", "results", "locks"):
                (self.folder / name).mkdir(parents=True, exist_ok=True)
            self._connection = sqlite3.connect(self.path, isolation_level=None, timeout=120)
        except (OSError, sqlite3.Error) as error:
            raise StorageError(f"{self.path}: cannot be opened ({error}); set RELSEEK_STORE to a writable folder") from error
        try:
            self._open()
        except sqlite3.OperationalError as error:
            raise self._unusable(error) from error
        except sqlite3.DatabaseError as error:
            raise StorageError(f"{self.path}: no ledger of batches ({error}); it says what was paid for, so restore it from a backup") from error

    def _open(self) -> None:
        # WAL lets the sensor read while a run writes; FULL makes every commit outlive a power cut.
        for setting in ("journal_mode = WAL", "synchronous = FULL", "cache_size = -65536"):
            self._connection.execute(f"PRAGMA {setting}")
        if self._value("PRAGMA user_version") != FORMAT:  # else nothing is locked: a budget is added up while another ledger's lock is held
            with self.transaction():
                self._bring_up(int(self._value("PRAGMA user_version")))
        self.id = str(self._value("SELECT ledger FROM about"))

    def _bring_up(self, version: int) -> None:
        """Make the tables, or those of an earlier format into this one's; inside a transaction of the caller's."""
        if version == 0:
            for statement in TABLES.split(";"):
                self._connection.execute(statement)
            self._connection.execute("INSERT INTO about VALUES (?)", (uuid.uuid4().hex,))
        elif version != FORMAT and version not in MIGRATIONS:
            raise StorageError(f"{self.path}: written in format {version}, read here in format {FORMAT}; use the relseek that wrote it")
        for earlier in range(version or FORMAT, FORMAT):
            for statement in MIGRATIONS[earlier].split(";"):
                self._connection.execute(statement)
        self._connection.execute(f"PRAGMA user_version = {FORMAT}")

    def _unusable(self, error: sqlite3.OperationalError) -> StorageError:
        return StorageError(f"{self.path}: cannot be used ({error}); its folder has to be writable and to have space")

    def close(self) -> None:
        self._connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        """All of what is written inside, or nothing; on disk when it ends."""
        try:
            self._connection.execute("BEGIN IMMEDIATE")
        except sqlite3.OperationalError as error:
            raise self._unusable(error) from error
        try:
            yield
        except BaseException:
            self._connection.execute("ROLLBACK")
            raise
        self._connection.execute("COMMIT")

    @contextlib.contextmanager
    def lock(self, name: str, *, wait: bool = True) -> Iterator[bool]:
        """Hold a named lock of this ledger, which a process that dies lets go of; yields whether it is held (always, when waiting)."""
        file = self.folder / "locks" / f"{hashlib.sha256(name.encode()).hexdigest()[:24]}.lock"
        with file.open("w") as stream:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
                return
            yield True  # closing the file lets go

    def _value(self, query: str, values: Sequence[Any] = ()) -> Any:
        found = self._connection.execute(query, values).fetchone()
        return None if found is None else found[0]

    # --- groups ---------------------------------------------------------------------------------------------------------

    def put_group(self, group: Group) -> None:
        with self.transaction():
            self._connection.execute(
                "INSERT OR REPLACE INTO groups VALUES (?, ?, ?, ?, ?)",
                (group.name, group.endpoint, group.window, json.dumps(group.description), group.stopped),
            )

    def group(self, name: str) -> Group | None:
        row = self._connection.execute('SELECT name, endpoint, "window", description, stopped FROM groups WHERE name = ?', (name,)).fetchone()
        return Group(row[0], row[1], row[2], json.loads(row[3]), bool(row[4])) if row else None

    def stop_group(self, name: str) -> None:
        with self.transaction():
            self._connection.execute("UPDATE groups SET stopped = 1 WHERE name = ?", (name,))

    # --- batches --------------------------------------------------------------------------------------------------------

    def batches(self, group: str | None = None) -> list[Batch]:
        """Every batch, or those of a group, oldest first."""
        query = f"SELECT {COLUMNS} FROM batches" + ("" if group is None else ' WHERE "group" = ?') + " ORDER BY number"
        return [_batch(row) for row in self._connection.execute(query, () if group is None else (group,))]

    def batch(self, number: int) -> Batch:
        return _batch(self._connection.execute(f"SELECT {COLUMNS} FROM batches WHERE number = ?", (number,)).fetchone())

    def begin_batch(self, group: Group, attempt: int) -> Batch:
        """The intent to write a request file; its requests are claimed piece by piece."""
        with self.transaction():
            number = self._connection.execute(
                'INSERT INTO batches ("group", status, attempt, endpoint, "window", description, written) VALUES (?, ?, ?, ?, ?, ?, ?)',
                (group.name, "writing", attempt, group.endpoint, group.window, json.dumps(group.description), time.time()),
            ).lastrowid
        assert number is not None
        return self.batch(number)

    def start(self, estimates: Mapping[int, float], allow: Callable[[float], None]) -> None:
        """Turn written files (number -> estimated USD) into batches that will be sent, unless `allow` raises at their sum.

        One transaction, in which `allow` may read the ledger: of two processes the second reads what the first has added.
        """
        with self.transaction():
            allow(sum(estimates.values()))
            self._connection.executemany(
                "UPDATE batches SET status = 'written', estimated_usd = ? WHERE number = ?", [(usd, number) for number, usd in estimates.items()]
            )

    def update_batch(self, number: int, **values: Any) -> Batch:
        """Write down a fact or an intent of ours; the group's lock is held."""
        with self.transaction():
            self._connection.execute(f"UPDATE batches SET {_assignments(values)} WHERE number = ?", (*_stored(values), number))
        return self.batch(number)

    def record_look(self, batch: Batch, **values: Any) -> Batch:
        """Write down what a look at a batch found, unless that is no news of it any more; returns the batch as it is.

        It is none where the batch has another id meanwhile (it was held and created again), where it is not being created any more, was collected, or
        has ended: a late look revives nothing, but a batch that was lost may turn up.
        """
        with self.transaction():
            self._connection.execute(
                f"UPDATE batches SET {_assignments(values)} WHERE number = ? AND batch_id IS ? AND NOT collected"
                f" AND (batch_id IS NOT NULL OR status = 'creating') AND (status NOT IN {ENDED} OR status IN ('lost', ?))",
                (*_stored(values), batch.number, batch.batch_id, values.get("status", batch.status)),
            )
        return self.batch(batch.number)

    def discard_batch(self, number: int) -> None:
        """Forget a batch whose file was never finished, with its claims: nothing of it has left this machine."""
        with self.transaction():
            self._connection.execute("DELETE FROM requests WHERE batch = ?", (number,))
            self._connection.execute("DELETE FROM batches WHERE number = ?", (number,))

    def addresses(self) -> list[str]:
        """Every endpoint at which a batch was created, or may have been."""
        return [row[0] for row in self._connection.execute("SELECT DISTINCT base_url FROM batches WHERE base_url IS NOT NULL ORDER BY base_url")]

    def totals(self) -> list[Total]:
        """What every group has cost, may still cost and may have cost."""
        query = '''SELECT "group", sum(prompt_tokens), sum(completion_tokens), total(CASE WHEN collected THEN 0.0 ELSE estimated_usd END),
            total(unaccounted_usd) FROM batches GROUP BY "group" ORDER BY "group"'''
        return [Total._make(row) for row in self._connection.execute(query)]

    def request_file(self, number: int) -> Path:
        return self.folder / "requests" / f"{number:06d}.jsonl"

    def result_file(self, number: int, kind: str) -> Path:
        return self.folder / "results" / f"{number:06d}.{kind}.jsonl"

    # --- requests -------------------------------------------------------------------------------------------------------

    def claim(self, number: int, wanted: Sequence[tuple[str, int]]) -> set[str]:
        """Claim (custom_id, attempt) pairs for a batch; returns the custom_ids that nobody had claimed."""
        with self.transaction():
            taken = {(found.custom_id, found.attempt) for found in self._attempts([custom_id for custom_id, _ in wanted])}
            fresh = sorted(pair for pair in wanted if pair not in taken)
            self._connection.executemany("INSERT INTO requests (batch, custom_id, attempt) VALUES (?, ?, ?)", [(number, *pair) for pair in fresh])
        return {custom_id for custom_id, _ in fresh}

    def attempts(self, custom_ids: Sequence[str]) -> dict[str, list[Attempt]]:
        """Every attempt at each of the custom_ids that was ever asked, in order."""
        found: dict[str, list[Attempt]] = {}
        for attempt in self._attempts(custom_ids):
            found.setdefault(attempt.custom_id, []).append(attempt)
        return found

    def _attempts(self, custom_ids: Sequence[str]) -> Iterator[Attempt]:
        for start in range(0, len(custom_ids), AT_ONCE):
            some = custom_ids[start : start + AT_ONCE]
            query = f"SELECT {ATTEMPT} FROM requests WHERE custom_id IN ({','.join('?' * len(some))}) ORDER BY custom_id, attempt"
            yield from map(Attempt._make, self._connection.execute(query, some).fetchall())

    def custom_ids(self, number: int) -> list[str]:
        """The requests of a batch."""
        return [row[0] for row in self._connection.execute("SELECT custom_id FROM requests WHERE batch = ?", (number,))]

    def record_replies(self, number: int, replies: Mapping[str, Reply]) -> None:
        """Write down what came back for some requests of a batch; inside a transaction of the caller's."""
        self._connection.executemany(
            "UPDATE requests SET outcome = ?, final = ?, raw = ?, model = ?, prompt_tokens = ?, completion_tokens = ?, error = ?"
            " WHERE batch = ? AND custom_id = ?",
            [(*reply, number, custom_id) for custom_id, reply in sorted(replies.items())],
        )

    def record_rest(self, number: int, reply: Reply) -> int:
        """Give the requests of a batch of which nothing was said an outcome; returns how many; inside a transaction of the caller's."""
        return self._connection.execute(
            "UPDATE requests SET outcome = ?, error = ? WHERE batch = ? AND outcome IS NULL", (reply.outcome, reply.error, number)
        ).rowcount

    def release(self, number: int, most: int) -> int:
        """Take back the claims of a batch that have no outcome, so that they may be asked anew, but of no request more than `most` times; returns how
        many were; inside a transaction of the caller's.
        """
        query = """SELECT custom_id FROM requests WHERE batch = ? AND outcome IS NULL
            AND custom_id NOT IN (SELECT custom_id FROM released WHERE times >= ?)"""
        mine = self._connection.execute(query, (number, most)).fetchall()
        count = "INSERT INTO released VALUES (?, 1) ON CONFLICT (custom_id) DO UPDATE SET times = times + 1"
        self._connection.executemany(count, mine)
        self._connection.executemany("DELETE FROM requests WHERE custom_id = ? AND batch = ?", [(*row, number) for row in mine])
        return len(mine)

    def mark_collected(self, number: int, **values: Any) -> None:
        """Close a batch; inside the transaction that wrote its outcomes."""
        tokens = "(SELECT coalesce(sum({0}), 0) FROM requests WHERE batch = batches.number)"
        sums = ", ".join(f"{name} = {tokens.format(name)}" for name in ("prompt_tokens", "completion_tokens"))
        self._connection.execute(f"UPDATE batches SET collected = 1, {sums}, {_assignments(values)} WHERE number = ?", (*_stored(values), number))

    # --- what is wanted -------------------------------------------------------------------------------------------------

    def wanted(self) -> Wanted:
        """An empty list of wanted requests, kept on disk however long it gets."""
        return Wanted(self._connection)


class Wanted:
    """The custom_ids that somebody wants, in their order, in a temporary table: 1.2 million would not be a small list in memory."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection
        self._table = f"temp.wanted_{uuid.uuid4().hex}"
        connection.execute(f"CREATE TEMP TABLE {self._table} (position INTEGER PRIMARY KEY, custom_id TEXT NOT NULL UNIQUE)")

    def add(self, custom_ids: Sequence[str]) -> str | None:
        """Append; returns the first custom_id that is there twice, None where all are new."""
        self._connection.execute("BEGIN")
        try:
            self._connection.executemany(f"INSERT INTO {self._table} (custom_id) VALUES (?)", [(custom_id,) for custom_id in custom_ids])
        except sqlite3.IntegrityError:
            self._connection.execute("ROLLBACK")
            return self._first_repeated(custom_ids)
        self._connection.execute("COMMIT")
        return None

    def _first_repeated(self, custom_ids: Sequence[str]) -> str:
        seen: set[str] = set()
        for custom_id in custom_ids:
            there = self._connection.execute(f"SELECT 1 FROM {self._table} WHERE custom_id = ?", (custom_id,)).fetchone()
            if custom_id in seen or there:
                return custom_id
            seen.add(custom_id)
        raise AssertionError("no repeated custom_id")

    def attempts(self) -> Iterator[tuple[str, list[Attempt]]]:
        """Each wanted custom_id with the attempts at it, in the order in which they were added."""
        last = self._connection.execute(f"SELECT max(position) FROM {self._table}").fetchone()[0] or 0
        for start in range(0, last, AT_ONCE):
            rows = self._connection.execute(
                f"SELECT wanted.custom_id, {ATTEMPT} FROM {self._table} AS wanted LEFT JOIN requests ON requests.custom_id = wanted.custom_id"
                " WHERE position > ? AND position <= ? ORDER BY position, attempt",
                (start, start + AT_ONCE),
            ).fetchall()
            for custom_id, group in itertools.groupby(rows, key=itemgetter(0)):
                yield custom_id, [Attempt._make(row[1:]) for row in group if row[1] is not None]

    def drop(self) -> None:
        self._connection.execute(f"DROP TABLE IF EXISTS {self._table}")


def _batch(row: Sequence[Any]) -> Batch:
    values = dict(zip((field.name for field in fields(Batch)), row, strict=True))
    values.update({name: json.loads(values[name]) for name in JSON_FIELDS}, collected=bool(values["collected"]))
    return Batch(**values)


def _assignments(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} = ?" for name in values)


def _stored(values: Mapping[str, Any]) -> list[Any]:
    return [json.dumps(value) if name in JSON_FIELDS else value for name, value in values.items()]
