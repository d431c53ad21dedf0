"""Pieces of work in other processes: in order, begun ahead, and anew after a process was killed."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures.process import BrokenProcessPool

import pytest

from relseek_resources import processes


@pytest.fixture(autouse=True)
def two_cores(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Processes of this test alone, as on a machine of two cores."""
    monkeypatch.setattr(processes, "cores", lambda: 2)
    monkeypatch.setattr(processes, "_pools", [])
    monkeypatch.setattr(processes, "_begun", [])
    yield
    for pool in processes._pools:
        pool.shutdown()


def where(piece: int) -> tuple[int, int]:
    return piece, os.getpid()


def slowly(seconds: float) -> float:
    time.sleep(seconds)
    return seconds


def killed(piece: int) -> int:
    if piece == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return piece


def test_results_come_in_the_order_of_the_pieces_and_from_other_processes() -> None:
    found = list(processes.in_order(where, iter(range(20)), 20))
    assert [piece for piece, _ in found] == list(range(20))
    assert os.getpid() not in {process for _, process in found}


def test_few_pieces_start_no_process() -> None:
    assert [process for _, process in processes.in_order(where, range(3), 3)] == [os.getpid()] * 3
    assert [process for _, process in processes.at_work(where, range(3))] == [os.getpid()] * 3
    assert not processes._pools


def test_what_is_begun_goes_on_before_it_is_asked_for() -> None:
    list(processes.in_order(where, range(6), 6))  # the processes are there
    begun = processes.at_work(slowly, [0.05] * 8)
    deadline = time.monotonic() + 60
    while not all(future.done() for future in processes._begun):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert list(begun) == [0.05] * 8


def test_what_is_asked_for_now_does_not_wait_for_all_that_was_begun() -> None:
    list(processes.in_order(where, range(6), 6))
    begun = processes.at_work(slowly, [1.0] * 6)
    assert [process for _, process in processes.in_order(where, range(6), 6)] == [os.getpid()] * 6
    assert sum(future.done() for future in processes._begun) < 6, "three seconds of it were still to do"
    assert list(begun) == [1.0] * 6
    assert os.getpid() not in {process for _, process in processes.in_order(where, range(6), 6)}


@pytest.mark.parametrize("call", [lambda: processes.in_order(killed, range(8), 8), lambda: processes.at_work(killed, range(8))])
def test_a_killed_process_is_an_error_and_the_next_call_starts_others(call) -> None:
    with pytest.raises(BrokenProcessPool):
        list(call())
    assert [piece for piece, _ in processes.in_order(where, range(8), 8)] == list(range(8))
