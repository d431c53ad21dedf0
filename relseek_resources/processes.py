"""Independent pieces of work on every core of one machine, results in order.

Here belongs how pieces are spread over processes. What a piece is belongs to the stage that has it; work on other machines belongs in `compute.py`.
"""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import cache
from typing import Any, TypeVar

import pandas as pd
from threadpoolctl import ThreadpoolController, threadpool_limits

Piece = TypeVar("Piece")
Result = TypeVar("Result")

FEWEST = 6  # pieces; below it the start of other processes costs more than it saves
PAIR = 2  # pieces; enough for processes that run already
MADE = 50_000  # objects made between two looks for garbage in cycles; the default of 700 costs long work a tenth of its time
AHEAD = 3  # pieces for each process that are made before they are asked for


def cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def collect_seldom() -> None:
    """Look for garbage in cycles less often, and never again among what is there now, which is modules for the most part."""
    gc.freeze()
    gc.set_threshold(MADE, 20, 20)


_pools: list[ProcessPoolExecutor] = []
_preparing: list[threading.Thread] = []


def prepare(*modules: str) -> None:
    """Start the processes now, with `modules` imported, while this one goes on with something else."""
    if cores() > 1 and not _pools and not _preparing:

        def start() -> None:
            pool = _started(modules)
            for _ in range(cores()):
                pool.submit(cores)  # a process starts when there is something to do, once the modules are imported

        _preparing.append(threading.Thread(target=start, daemon=True))
        _preparing[0].start()


def _started(modules: Sequence[str] = ()) -> ProcessPoolExecutor:
    """The processes, which stay until this one ends. One server imports `modules` and forks them, so that each is imported once."""
    if not _pools:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([*modules])
        _pools.append(ProcessPoolExecutor(cores(), mp_context=context, initializer=_of_one_thread))
    return _pools[0]


def _of_one_thread() -> None:
    """Processes that fill the cores have one thread each for linear algebra; more would take turns. Tables that are cut into pieces are small."""
    threadpool_limits(1)
    pd.set_option("mode.string_storage", "python")  # Arrow's texts cost trials' estimates a tenth of their time
    collect_seldom()


def _worth(count: int) -> bool:
    return count >= (PAIR if _pools or _preparing else FEWEST) and cores() > 1


def _ready() -> ProcessPoolExecutor:
    for thread in _preparing:
        thread.join()
    return _started()


_begun: list[Future[Any]] = []


def at_work(work: Callable[[Piece], Result], pieces: Sequence[Piece]) -> Iterator[Result]:
    """`work` of each piece, in order, all of them begun in other processes at once, so that this one may do something else before it asks.

    With one core, or too few pieces to start processes for, each is done when it is asked for.
    """
    if not _worth(len(pieces)):
        return _here(work, pieces)
    pool = _ready()
    with _anew_if_broken(pool):
        futures = [pool.submit(work, piece) for piece in pieces]
    _begun[:] = [*(future for future in _begun if not future.done()), *futures]
    return _results(pool, futures, len(futures))


def in_order(work: Callable[[Piece], Result], pieces: Iterable[Piece], count: int) -> Iterator[Result]:
    """`work` of each of `count` pieces, in order, as they are finished; pieces are asked for a few ahead.

    With several cores and enough pieces they go to processes that stay for the next call; `work` and the pieces must then be picklable.
    """
    if not _worth(count) or sum(not future.done() for future in _begun) >= cores():
        yield from _here(work, pieces)  # what is asked for now is not to wait for all that has been begun
        return
    pool = _ready()
    yield from _results(pool, (pool.submit(work, piece) for piece in pieces), AHEAD * cores())


def _here(work: Callable[[Piece], Result], pieces: Iterable[Piece]) -> Iterator[Result]:
    """In this process, by as many threads of linear algebra as in the others: sums over more are rounded otherwise."""
    for piece in pieces:
        with _threads().limit(limits=1):
            found = work(piece)
        yield found


@cache
def _threads() -> ThreadpoolController:
    return ThreadpoolController()


def _results(pool: ProcessPoolExecutor, futures: Iterable[Future[Result]], ahead: int) -> Iterator[Result]:
    waiting = deque[Future[Result]]()
    try:
        with _anew_if_broken(pool):
            for future in futures:
                waiting.append(future)
                if len(waiting) > ahead:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
    finally:
        for left in waiting:
            left.cancel()


@contextlib.contextmanager
def _anew_if_broken(pool: ProcessPoolExecutor) -> Iterator[None]:
    try:
        yield
    except BrokenProcessPool as error:
        if pool in _pools:
            _pools.remove(pool)  # the next call starts others
        raise BrokenProcessPool(
            "a process that worked for this one was killed, most often for want of memory; free some, and run again: it goes on from there"
        ) from error
