"""Independent pieces of work on every core of one machine, results in order.

Here belongs how pieces are spread over processes. What a piece is belongs to the stage that has it; work on other machines belongs in `compute.py`.
"""

from __future__ import annotations

import importlib
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

Piece = TypeVar("Piece")
Result = TypeVar("Result")

FEWEST = 6  # pieces; below it the start of other processes costs more than it saves


def cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


_preparing: list[threading.Thread] = []


def prepare(module: str) -> None:
    """Start the processes now and let them import `module`, while this one goes on with something else."""
    if cores() == 1 or _preparing:
        return
    from joblib import Parallel, delayed

    def start() -> None:
        Parallel(n_jobs=cores())(delayed(_imported)(module) for _ in range(cores()))

    _preparing.append(threading.Thread(target=start, daemon=True))
    _preparing[0].start()


def _imported(module: str) -> None:
    importlib.import_module(module)


def in_order(work: Callable[[Piece], Result], pieces: Iterable[Piece], count: int) -> Iterator[Result]:
    """`work` of each of `count` pieces, in order, as they are finished; pieces are asked for a few ahead.

    With several cores and enough pieces they go to processes that stay for the next call; `work` and the pieces must then be picklable.
    """
    if count < FEWEST or cores() == 1:
        yield from map(work, pieces)
        return
    from joblib import Parallel, delayed

    for thread in _preparing:
        thread.join()
    yield from Parallel(n_jobs=min(cores(), count), return_as="generator", batch_size=1)(delayed(work)(piece) for piece in pieces)
