"""A hundred worlds drawn from seeds: calls, batches and lines fail at random and our process dies at random, and every request is paid once."""

from __future__ import annotations

import contextlib
import json
import random
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from batch_server import BatchServer, Chaos
from openai import OpenAI

from relseek_resources.judges import batch_sending, batches, provider
from relseek_resources.judges.answers import Answer, Reading, Request, read_score
from relseek_resources.judges.batches import BatchError, Settled, Split, cancel, poll, settle, submit
from relseek_resources.judges.ledger import Ledger

SEEDS = 100
ATTEMPTS = 4


class Died(BaseException):
    """Our process is gone: nothing catches it, nothing tidies up after it but what the operating system would."""


class Dying:
    """Dies before or after every so many commits and calls, at random."""

    def __init__(self, seed: int, deaths: int) -> None:
        self._draw, self._deaths = random.Random(seed), deaths

    def step(self) -> None:
        if self._deaths and self._draw.random() < 0.04:
            self._deaths -= 1
            raise Died


@pytest.fixture(scope="module")
def server() -> Iterator[BatchServer]:
    with BatchServer() as running:
        yield running


@pytest.fixture
def folder() -> Iterator[Path]:
    """In memory where that is to be had: a hundred schedules sync thousands of times, and what a power cut leaves is not their subject."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as name:
        yield Path(name)


def accept(custom_id: str, raw: str) -> Reading:
    return read_score(raw)


def questions(count: int) -> list[Request]:
    body = {"model": "judge-1", "messages": [{"role": "user", "content": "Rate it."}]}
    return [Request(f"r{number:031x}", json.dumps({**body, "seed": number})) for number in range(count)]


def patch(monkeypatch: pytest.MonkeyPatch, dying: Dying) -> None:
    monkeypatch.setattr(provider, "pause", lambda seconds: None)
    monkeypatch.setattr("openai._base_client.BaseClient._calculate_retry_timeout", lambda *arguments: 0.0)
    monkeypatch.setattr(batch_sending, "FIRST_HOLD", 0.0)
    monkeypatch.setattr(batches, "MISSES_APART", 0.0)
    commit, send = Ledger.transaction, openai.OpenAI._send_request

    class Step:
        def __init__(self, ledger: Ledger) -> None:
            self._inner = commit(ledger)

        def __enter__(self) -> None:
            dying.step()
            self._inner.__enter__()

        def __exit__(self, *error: Any) -> None:
            self._inner.__exit__(*error)
            dying.step()

    def sending(client: OpenAI, *arguments: Any, **named: Any) -> Any:
        dying.step()
        answer = send(client, *arguments, **named)
        dying.step()
        return answer

    monkeypatch.setattr(Ledger, "transaction", lambda ledger: Step(ledger))
    monkeypatch.setattr(openai.OpenAI, "_send_request", sending)


def life(path: Path, client: OpenAI, asked: list[Request], groups: tuple[str, ...]) -> list[Answer]:
    """One process: submit, look and settle, until everything is there."""
    found: dict[str, list[Answer]] = {}
    with Ledger(path) as ledger:
        for group in groups:
            submit(ledger, client, group, asked, split=Split(requests=5))
        for _ in range(200):
            poll(ledger, client)
            for group in groups:
                settled: Settled = settle(ledger, client, group, asked, accept, ATTEMPTS, price=lambda prompt, written: 1.0 * (prompt + written))
                if settled.complete:
                    found[group] = list(settled.answers)
            if len(found) == len(groups):
                assert all(rows == found[groups[0]] for rows in found.values())
                return found[groups[0]]
    raise AssertionError("the schedule does not end")


@pytest.mark.parametrize("decade", range(SEEDS // 10))
def test_each_batch_is_created_once_and_each_request_paid_once(
    server: BatchServer, folder: Path, monkeypatch: pytest.MonkeyPatch, decade: int
) -> None:
    for seed in range(10 * decade, 10 * decade + 10):
        with monkeypatch.context() as patched:
            check(seed, server, folder / f"{seed}", patched)


def check(seed: int, server: BatchServer, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.mkdir()
    draw = random.Random(1000 + seed)
    server.reset(Chaos(seed, bad_lines=draw.choice((0.0, 0.2, 0.5))))
    asked = questions(draw.randint(1, 23))
    groups = ("one", "two")[: draw.randint(1, 2)]
    patch(monkeypatch, Dying(seed, deaths=draw.choice((0, 3, 8))))
    client = OpenAI(base_url=server.base_url, api_key="none", timeout=20)
    rows: list[Answer] = []
    for _ in range(60):
        try:
            rows = life(folder / "batches.sqlite", client, asked, groups)
            break
        except Died:  # the next process goes on from what is on disk
            continue
        except BatchError as error:
            if "knows none of" in str(error):  # all that was in flight was forgotten, and a person has to say so
                with contextlib.suppress(Died, BatchError), Ledger(folder / "batches.sqlite") as ledger:
                    for group in groups:
                        cancel(ledger, client, group)
    where = f"seed {seed}"
    assert [row.custom_id for row in rows] == [request.custom_id for request in asked], where

    # Each file became a batch once; a second creation follows only a refusal for want of room, which costs nothing.
    taken = [content for content, end in server.created if end != "no_room"]
    assert len(taken) == len(set(taken)), where

    for row in rows:
        runs = server.charges.get(row.custom_id, [])
        delivered = [run for run in runs if run.delivered]
        scores = [run for run in delivered if run.fate in ("good", "twice")]
        assert len(scores) <= 1, f"{where}: {row} was paid for again after it had an answer"
        assert (row.status == "scored") == (len(scores) == 1), f"{where}: {row}, {runs}"
        assert not scores or delivered[-1] is scores[0], where
        assert row.prompt_tokens == sum(run.tokens for run in delivered) and row.completion_tokens == 5 * len(delivered), f"{where}: {row}, {runs}"
        assert row.cost_usd == row.prompt_tokens + row.completion_tokens, where
        assert row.status == "scored" or row.attempt == ATTEMPTS or "HTTP 400" in str(row.error) or "malformed" in str(row.error), f"{where}: {row}"
        assert len({run.batch for run in runs}) == len(runs) <= ATTEMPTS, where
