"""The ledger outlives us: killed after every single commit, call and file, it knows what was paid for; and it holds as many rows as a study has."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import openai
import pytest

from relseek_resources.judges import provider
from relseek_resources.judges.answers import Reading, Request, read_score
from relseek_resources.judges.batches import Split, poll, settle, submit
from relseek_resources.judges.ledger import Group, Ledger, Reply
from relseek_resources.storage import StorageError

SERVER = Path(__file__).with_name("batch_server.py")
GROUP = Group("g", "/v1/chat/completions", "24h", {"study": "quickstart"})


def accept(custom_id: str, raw: str) -> Reading:
    return read_score(raw)


def questions(count: int) -> list[Request]:
    return [Request(f"r{number:031x}", json.dumps({"model": "m", "messages": [{"role": "user", "content": f"{number}"}]})) for number in range(count)]


# --- killed after every step --------------------------------------------------------------------------------------------


@pytest.fixture
def base_url() -> Iterator[str]:
    """A server of another process: this one forks, which a process with threads must not."""
    running = subprocess.Popen([sys.executable, str(SERVER)], stdout=subprocess.PIPE, text=True)
    assert running.stdout is not None
    try:
        yield running.stdout.readline().strip()
    finally:
        running.kill()
        running.wait()


def books(base_url: str, **told: Any) -> dict[str, Any]:
    address = base_url.removesuffix("/v1") + ("/_control" if told else "/_state")
    with urllib.request.urlopen(address, data=json.dumps(told).encode() if told else None) as answer:
        return dict(json.load(answer))


def in_child(work: Callable[[], None]) -> int:
    """Run `work` in a forked process; returns how it ended, as `os.waitstatus_to_exitcode` says it."""
    return os.waitstatus_to_exitcode(os.waitpid(forked(work), 0)[1])


def forked(work: Callable[[], None]) -> int:
    child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(0)
        except BaseException as error:
            os.write(2, f"{error!r}\n".encode())
        finally:
            os._exit(1)
    return child


def life(folder: Path, base_url: str, kill_at: int) -> None:
    """A whole process; it kills itself after step `kill_at` and writes down the rows, and how many steps there were, where it lives to do so."""
    steps = 0

    def step() -> None:
        nonlocal steps
        steps += 1
        if steps == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    def stepping(wrapped: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            answer = wrapped(*arguments, **named)
            step()
            return answer

        return call

    provider.SETTLING = 0.0
    begin = Ledger.transaction

    class Transaction:
        def __init__(self, ledger: Ledger) -> None:
            self._inner = begin(ledger)

        def __enter__(self) -> None:
            self._inner.__enter__()

        def __exit__(self, *error: Any) -> None:
            self._inner.__exit__(*error)
            step()

    Ledger.transaction = lambda ledger: Transaction(ledger)  # type: ignore[assignment, return-value]
    openai.OpenAI._send_request = stepping(openai.OpenAI._send_request)  # type: ignore[method-assign]
    os.replace, os.fsync, Path.unlink = stepping(os.replace), stepping(os.fsync), stepping(Path.unlink)  # type: ignore[method-assign]

    asked = questions(3)
    client = openai.OpenAI(base_url=base_url, api_key="none")
    with Ledger(folder / "batches.sqlite") as ledger:
        submit(ledger, client, "g", asked, split=Split(requests=2))
        while True:
            poll(ledger, client)
            settled = settle(ledger, client, "g", asked, accept, 3)
            if settled.complete:
                rows = [[row.custom_id, row.status, row.prompt_tokens] for row in settled.answers]
                (folder / "rows.json").write_text(json.dumps({"rows": rows, "steps": steps}))
                return


@pytest.mark.slow
def test_killed_after_every_step_each_batch_is_created_once_and_each_request_paid_once(base_url: str, tmp_path: Path) -> None:
    asked = questions(3)

    def world(name: str, kill_at: int) -> dict[str, Any]:
        # The second request has no score at first, so that asking again is among the steps.
        books(base_url, reset=True, fates={asked[1].custom_id: ["prose"]})
        folder = tmp_path / name
        folder.mkdir()
        if kill_at:
            assert in_child(lambda: life(folder, base_url, kill_at)) == -signal.SIGKILL
            assert not (folder / "rows.json").exists()
        assert in_child(lambda: life(folder, base_url, 0)) == 0
        found: dict[str, Any] = json.loads((folder / "rows.json").read_text())
        state = books(base_url)
        taken = [content for content, _ in state["created"]]
        assert len(taken) == len(set(taken)) == 3, f"killed after step {kill_at}: {taken}"
        paid = {name: [run["fate"] for run in runs] for name, runs in state["charges"].items()}
        expected = {request.custom_id: ["good"] for request in asked} | {asked[1].custom_id: ["prose", "good"]}
        assert paid == expected, f"killed after step {kill_at}"
        tokens = {name: sum(run["tokens"] for run in runs) for name, runs in state["charges"].items()}
        assert found["rows"] == [[request.custom_id, "scored", tokens[request.custom_id]] for request in asked], f"killed after step {kill_at}"
        left = list((folder / "batches" / "requests").iterdir())
        assert not left, f"killed after step {kill_at}: {left}"
        return found

    steps = world("whole", 0)["steps"]
    assert steps > 40
    for kill_at in range(1, steps):
        world(f"killed {kill_at}", kill_at)


# --- two at once --------------------------------------------------------------------------------------------------------


def test_two_processes_together_keep_to_a_budget(base_url: str, tmp_path: Path) -> None:
    """Each alone is within it. Whoever asks for leave takes its time, so that without a lock both would read the same figures."""
    path = tmp_path / "batches.sqlite"
    Ledger(path).close()

    def send(group: str, start: int) -> None:
        asked = [replace(question, usd=1.0) for question in questions(8)[start : start + 4]]
        client = openai.OpenAI(base_url=base_url, api_key="none")
        with Ledger(path) as ledger:

            def allow(usd: float) -> None:
                before = sum(total.to_come_usd for total in ledger.totals())
                time.sleep(0.5)
                if before + usd > 6.0:
                    raise ValueError("above the budget")

            submit(ledger, client, group, asked, split=Split(requests=2), allow=allow)

    both = [forked(lambda group=group, start=start: send(group, start)) for group, start in (("one", 0), ("two", 4))]  # type: ignore[misc]
    assert sorted(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in both) == [0, 1]
    assert len(books(base_url)["created"]) == 2
    with Ledger(path) as ledger:
        assert [total.to_come_usd for total in ledger.totals()] == [4.0]


# --- the ledger itself --------------------------------------------------------------------------------------------------


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    with Ledger(tmp_path / "batches.sqlite") as opened:
        yield opened


def test_a_ledger_keeps_its_identity_and_its_rows(tmp_path: Path) -> None:
    with Ledger(tmp_path / "a.sqlite") as first:
        first.put_group(GROUP)
        batch = first.begin_batch(GROUP, attempt=1)
        first.claim(batch.number, [("r1", 1)])
    with Ledger(tmp_path / "a.sqlite") as second:
        assert second.id == first.id and second.group("g") == GROUP and second.batches("g") == [batch] and second.custom_ids(1) == ["r1"]
    with Ledger(tmp_path / "b.sqlite") as other:
        assert other.id != first.id and other.batches() == [] and other.group("g") is None


def test_commits_outlive_a_power_cut(ledger: Ledger) -> None:
    assert ledger._value("PRAGMA synchronous") == 2 and ledger._value("PRAGMA journal_mode") == "wal"


def test_an_attempt_is_claimed_once_whoever_asks(ledger: Ledger) -> None:
    one, two = ledger.begin_batch(GROUP, 1), ledger.begin_batch(GROUP, 1)
    assert ledger.claim(one.number, [("a", 1), ("b", 1)]) == {"a", "b"}
    with Ledger(ledger.path) as another:
        assert another.claim(two.number, [("b", 1), ("c", 1), ("a", 2)]) == {"c", "a"}
    assert [(attempt.batch, attempt.attempt) for attempt in ledger.attempts(["a"])["a"]] == [(1, 1), (2, 2)]
    ledger.discard_batch(one.number)
    assert "b" not in ledger.attempts(["a", "b"])
    assert ledger.begin_batch(GROUP, 1).number == 3  # a number is never used again: the provider may know it


def test_an_ended_batch_is_not_revived_by_a_late_look(ledger: Ledger) -> None:
    before = ledger.update_batch(ledger.begin_batch(GROUP, 1).number, status="in_progress", batch_id="batch_1")
    assert ledger.record_look(before, status="completed", completed=5).status == "completed"
    assert ledger.record_look(before, status="in_progress", completed=3).completed == 5
    assert ledger.record_look(before, status="lost").status == "completed"


def test_a_late_look_changes_nothing_of_a_batch_that_was_created_again(ledger: Ledger) -> None:
    number = ledger.begin_batch(GROUP, 1).number
    before = ledger.update_batch(number, status="validating", batch_id="batch_1")
    held = ledger.record_look(before, status="held", batch_id=None, former=["batch_1"], held_until=0.0)
    assert (held.status, held.batch_id) == ("held", None)
    assert ledger.record_look(before, status="held", batch_id=None, former=["batch_1", "batch_1"]) == held
    creating = ledger.update_batch(number, status="creating")
    assert ledger.record_look(before, status="failed", batch_id="batch_1") == creating
    again = ledger.record_look(creating, status="validating", batch_id="batch_2")
    assert (again.status, again.batch_id) == ("validating", "batch_2")
    for late in (before, creating):
        assert ledger.record_look(late, status="held", batch_id=None) == again


def test_a_lost_batch_may_turn_up_until_it_is_collected(ledger: Ledger) -> None:
    lost = ledger.update_batch(ledger.begin_batch(GROUP, 1).number, status="lost", batch_id="batch_1")
    assert ledger.record_look(lost, status="in_progress").status == "in_progress"
    ledger.update_batch(lost.number, status="lost")
    with ledger.transaction():
        ledger.mark_collected(lost.number, warnings=[])
    assert ledger.record_look(lost, status="completed").status == "lost"


def test_a_failed_transaction_leaves_nothing(ledger: Ledger) -> None:
    batch = ledger.begin_batch(GROUP, 1)
    ledger.claim(batch.number, [("a", 1)])

    def half() -> None:
        with ledger.transaction():
            ledger.record_replies(batch.number, {"a": Reply("answered", raw="7")})
            raise RuntimeError

    with pytest.raises(RuntimeError):
        half()
    assert ledger.attempts(["a"])["a"][0].outcome is None


def test_a_lock_is_held_by_one_and_let_go_by_the_dead(ledger: Ledger) -> None:
    with ledger.lock("group g") as held, Ledger(ledger.path) as another:
        assert held
        with another.lock("group g", wait=False) as also, another.lock("group h", wait=False) as other:
            assert (also, other) == (False, True)

    def die() -> None:
        with ledger.lock("group g"):
            os.kill(os.getpid(), signal.SIGKILL)

    assert in_child(die) == -signal.SIGKILL
    with ledger.lock("group g", wait=False) as held:
        assert held


def test_wanted_requests_come_back_in_their_order_with_all_attempts(ledger: Ledger) -> None:
    names = [f"{number * 7919 % 2503:05d}" for number in range(2503)]
    first, second = ledger.begin_batch(GROUP, 1), ledger.begin_batch(GROUP, 2)
    ledger.claim(first.number, [(name, 1) for name in names[:-1]])
    ledger.claim(second.number, [(name, 2) for name in names[:100]])
    wanted = ledger.wanted()
    for start in range(0, len(names), 1000):
        assert wanted.add(names[start : start + 1000]) is None
    assert wanted.add(["new", "new"]) == "new" and wanted.add(["newer", names[5]]) == names[5]
    found = list(wanted.attempts())
    assert [name for name, _ in found] == names
    assert [len(tries) for _, tries in found] == [2] * 100 + [1] * 2402 + [0]


def test_a_file_that_is_no_ledger_is_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "batches.sqlite"
    path.write_text("a shopping list " * 100)
    with pytest.raises(StorageError, match="no ledger of batches"):
        Ledger(path)
    assert path.read_text().startswith("a shopping list")
    newer = tmp_path / "newer.sqlite"
    Ledger(newer).close()
    sqlite3.connect(newer).execute("PRAGMA user_version = 99").connection.close()
    with pytest.raises(StorageError, match="format 99"):
        Ledger(newer)


def test_an_old_ledger_is_read_on_and_what_it_lost_is_money(tmp_path: Path) -> None:
    path = tmp_path / "batches.sqlite"
    with Ledger(path) as ledger:
        for status in ("lost", "completed"):
            number = ledger.begin_batch(GROUP, 1).number
            ledger.claim(number, [(status, 1)])
            ledger.update_batch(number, status=status, estimated_usd=2.0, collected=1)
        was = ledger.id
    old = sqlite3.connect(path)
    for statement in ("ALTER TABLE batches DROP COLUMN unaccounted_usd", "DROP TABLE released", "PRAGMA user_version = 2"):
        old.execute(statement)
    old.close()
    with Ledger(path) as ledger:
        assert ledger.id == was and ledger.attempts(["lost", "completed"]).keys() == {"lost", "completed"}
        assert [batch.unaccounted_usd for batch in ledger.batches()] == [2.0, 0.0]
        with ledger.transaction():
            assert ledger.release(1, most=1) == 1


def test_what_a_group_cost_is_read_while_another_process_writes(ledger: Ledger) -> None:
    """Two processes, each allowed money in its own ledger, would else wait for one another's."""
    with ledger.transaction(), Ledger(ledger.path) as another:
        assert another.totals() == []


def test_rows_are_claimed_in_linear_time(ledger: Ledger) -> None:
    """A quarter of a batch file costs no more when the ledger holds ten of them; the factor allows for a busy machine."""

    def claim(start: int) -> float:
        batch = ledger.begin_batch(GROUP, 1)
        began = time.process_time()
        for chunk in range(start, start + 10_000, 1000):
            ledger.claim(batch.number, [(f"r{number * 2654435761 % 2**32:08x}{number:023x}", 1) for number in range(chunk, chunk + 1000)])
        return time.process_time() - began

    times = [claim(start) for start in range(0, 100_000, 10_000)]
    assert min(times[-3:]) < 4 * min(times[:3])
