"""Dagster's SQLite event log with its connections kept open, for a process that records many partitions.

Dagster 1.13 opens the database, and compiles every statement, anew for each event: some 20 ms an event, several events a partition. Here
belongs only that; what the events say belongs in `lineage.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import dagster as dg
from dagster._core.storage.event_log.sqlite.sqlite_event_log import INDEX_SHARD_NAME, SqliteEventLogStorage
from sqlalchemy import Connection, Engine, create_engine, event
from sqlalchemy.pool import QueuePool

from relseek_resources.storage import replace_atomically

WAIT = 60  # seconds for another process, a daemon say, to finish writing


@contextmanager
def kept_open(instance: dg.DagsterInstance) -> Iterator[None]:
    """Inside, this process keeps its connections to the event log; any other storage than SQLite files is left as it is."""
    storage = getattr(instance.event_log_storage, "_event_log_storage", instance.event_log_storage)  # Dagster wraps it where all is in one place
    if not isinstance(storage, SqliteEventLogStorage):
        yield
        return
    engines: dict[str, Engine] = {}
    empty: list[bytes] = []  # a run's database as Dagster makes it

    def prepare(shard: str) -> None:
        """Make a shard's database, a run's by copying the first: Dagster takes a fifth of a second, most of it to read its migrations."""
        path = Path(storage.path_for_shard(shard))
        new = not path.exists()
        if new and empty and shard != INDEX_SHARD_NAME:
            replace_atomically(path, lambda temporary: _write(temporary, empty[0]))
            return
        storage._initdb(engines[shard])
        if new and shard != INDEX_SHARD_NAME:
            with engines[shard].connect() as connection:
                connection.exec_driver_sql("PRAGMA wal_checkpoint(TRUNCATE)")
            empty.append(path.read_bytes())

    @contextmanager
    def connect(shard: str) -> Iterator[Connection]:
        with storage._db_lock:
            if shard not in engines:
                for run in [other for other in engines if other not in (INDEX_SHARD_NAME, shard)]:
                    engines.pop(run).dispose()  # each run has a file of its own, and this process runs one after the other
                engines[shard] = _engine(storage.conn_string_for_shard(shard))
            if shard not in storage._initialized_dbs:
                prepare(shard)
                storage._initialized_dbs.add(shard)
            with engines[shard].connect() as connection, connection.begin():
                yield connection

    asks = ("has_table", "_has_asset_key_col_on_connection")
    own = {"_connect": connect, **{name: _once(getattr(storage, name)) for name in asks}}
    before = {name: vars(storage)[name] for name in own if name in vars(storage)}
    vars(storage).update(own)
    try:
        yield
    finally:
        for name in own:
            vars(storage).pop(name)
        vars(storage).update(before)
        for engine in engines.values():
            engine.dispose()


def _once(has: Callable[..., bool]) -> Callable[..., bool]:
    """`has`, asked only until it says yes: Dagster looks for its tables and columns at each event, and they do not go away. The name comes last."""
    there: set[str] = set()

    def remembered(*asked: Any) -> bool:
        if asked[-1] not in there and has(*asked):
            there.add(asked[-1])
        return asked[-1] in there

    return remembered


def _write(path: Path, content: bytes) -> None:
    path.write_bytes(content)


def _engine(address: str) -> Engine:
    engine = create_engine(address, poolclass=QueuePool, pool_size=1, max_overflow=-1, connect_args={"timeout": WAIT, "check_same_thread": False})

    @event.listens_for(engine, "connect")
    def quick(connection: Any, _record: Any) -> None:
        # with a write-ahead log, as Dagster sets it, NORMAL loses nothing when a process dies; a power cut may lose the last records, never the file
        connection.execute("PRAGMA synchronous=NORMAL")

    return engine
