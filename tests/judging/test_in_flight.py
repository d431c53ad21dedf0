"""What a judge may still be paid: which answers of its journals count as known, whose journals they are, and one asker at a time."""

from __future__ import annotations

import json
import multiprocessing
import socket
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
from batch_server import BatchServer
from openai import OpenAI

from relseek_assets.judging import in_flight, sensors
from relseek_assets.judging.requests import OverBudget
from relseek_assets.settings import LanguageJudge
from relseek_assets.study import STUDIES, StudyError, load_study
from relseek_resources.judges.answers import Answer, Request, read_score
from relseek_resources.judges.asking import AnswerJournal
from relseek_resources.judges.batches import cancel, settle, submit
from relseek_resources.judges.ledger import Batch, Group, Ledger

PARTITION = "m:L01|e02"
PRICED = {"prompt": 1.0, "completion": 1.0}


def judge(**settings: Any) -> LanguageJudge:
    return LanguageJudge.model_validate(
        {"name": "gpt", "kind": "openai", "model": "m", "budget_usd": 1.0, "attempts": 2, "price": PRICED, **settings}
    )


def billed(folder: Path, of: LanguageJudge, *names: str) -> float | None:
    frame = pd.DataFrame({"custom_id": names, "judge": of.name, "prompt_tokens": 10**6, "counted": "exact: m"})
    study: Any = SimpleNamespace(name="tiny", judges=[of])
    return in_flight.bill(study, folder, "openai", [frame]).usd


def one_question(of: LanguageJudge) -> float:
    return 1.0 + of.max_tokens / 1e6


@pytest.mark.parametrize(
    ("status", "attempt", "known"),
    [
        ("scored", 1, True),
        ("unreadable", 1, False),
        ("unreadable", 2, True),
        ("refused", 2, True),
        ("failed", 1, False),
        ("failed", 2, False),
        ("failed", 3, True),
    ],
)
def test_an_answer_is_known_when_its_request_will_not_be_asked_again(tmp_path: Path, status: str, attempt: int, known: bool) -> None:
    mine = judge()
    with AnswerJournal(in_flight.journal_path(tmp_path, mine, PARTITION)) as journal:
        journal.append(Answer("a", "unreadable", "well", attempt=1))
        journal.append(Answer("a", status, "7", attempt=attempt))
    assert billed(tmp_path, mine, "a", "b") == pytest.approx((1 if known else 2) * one_question(mine))


def test_two_endpoints_share_no_answers_whatever_names_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    openai, here, there = judge(), judge(base_url="http://127.0.0.1:1/v1"), judge(base_url="http://127.0.0.1:2/v1")
    paths = [in_flight.journal_path(tmp_path, one, PARTITION) for one in (openai, here, there)]
    assert len(set(paths)) == 3 and paths[0] == tmp_path / "judge_journals" / "gpt" / "m:L01" / "e02.jsonl"
    with AnswerJournal(paths[1]) as journal:
        journal.append(Answer("a", "scored", "7"))
    assert [billed(tmp_path, one, "a") for one in (openai, here, there)] == [one_question(openai), 0.0, one_question(there)]
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:1/v1/")
    assert in_flight.journal_path(tmp_path, openai, PARTITION) == paths[1], "the same endpoint, named by the environment"


def test_a_judges_budget_is_one_whoever_asks_and_wherever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    here, there = judge(), judge(base_url="http://127.0.0.1:2/v1")
    prompting = tmp_path / "attack_scores" / "remote|casual"
    paths = {
        in_flight.journal_path(tmp_path, here, PARTITION): 0.25,
        in_flight.journal_path(tmp_path, there, PARTITION): 0.25,
        prompting / f"all.{in_flight.at_endpoint('gpt', '')}{in_flight.ANSWERS}": 0.125,
        prompting / f"all.{in_flight.at_endpoint('gpt', there.base_url)}{in_flight.ANSWERS}": 0.125,
        prompting / f"all.gpt-4o{in_flight.ANSWERS}": 8.0,  # other judges
        in_flight.journal_path(tmp_path, judge(name="gpt2"), PARTITION): 16.0,
    }
    for path, usd in paths.items():
        with AnswerJournal(path) as journal:
            journal.append(Answer("a", "unreadable", "well", cost_usd=usd / 2, attempt=1))
            journal.append(Answer("a", "scored", "7", cost_usd=usd, attempt=2))
    assert in_flight.paid(tmp_path, "gpt") == 0.75
    assert in_flight.paid(tmp_path, "gpt-4o") == 8.0
    study: Any = SimpleNamespace(name="tiny", judges=[here])
    asked = pd.DataFrame({"custom_id": ["b"], "judge": "gpt", "prompt_tokens": 300_000, "counted": "exact: m"})
    assert "after $0.75 that it was paid" in in_flight.bill(study, tmp_path, "openai", [asked]).refusal


# --- by Batch -------------------------------------------------------------------------------------------------------------


def by_batch(**settings: Any) -> LanguageJudge:
    return judge(kind="openai_batch", **settings)


def study_of(*judges: LanguageJudge) -> Any:
    return SimpleNamespace(name="tiny", judges=list(judges))


def questions(count: int, usd: float) -> list[Request]:
    body = json.dumps({"model": "m", "messages": [{"role": "user", "content": "Rate it."}]})
    return [Request(f"r{number}", body, usd) for number in range(count)]


def client_at(server: BatchServer) -> OpenAI:
    return OpenAI(base_url=server.base_url, api_key="none")


def send(folder: Path, of: LanguageJudge, server: BatchServer, asked: list[Request], group: str = PARTITION) -> None:
    with Ledger(in_flight.ledger_path(folder, of)) as ledger:
        allow = in_flight.allowance(study_of(of), of, ledger)
        submit(ledger, client_at(server), in_flight.group_of(of, group), asked, allow=allow)


def test_a_lost_batch_is_money_that_asking_again_is_held_against(tmp_path: Path) -> None:
    with BatchServer() as server:
        mine, asked = by_batch(base_url=server.base_url), questions(2, 0.4)
        group = in_flight.group_of(mine, PARTITION)
        send(tmp_path, mine, server, asked)
        with Ledger(in_flight.ledger_path(tmp_path, mine)) as ledger:
            server.forget(next(iter(server.batches)))
            assert [batch.status for batch in cancel(ledger, client_at(server), group)] == ["lost"]
            send(tmp_path, mine, server, asked)  # wanted after all

            def settled(of: LanguageJudge) -> Any:
                allow = in_flight.allowance(study_of(of), of, ledger)
                return settle(ledger, client_at(server), group, asked, lambda name, raw: read_score(raw), 3, allow=allow)

            with pytest.raises(OverBudget, match=r"would cost \$0.80, after \$0.80 that it was paid or may charge"):
                settled(mine)
            assert len(server.created) == 1
            assert in_flight.committed(tmp_path, mine) == pytest.approx(0.8)
            assert settled(by_batch(base_url=server.base_url, budget_usd=1.7)).resubmitted == 2


@pytest.mark.parametrize("other", ["base_url", "key_variable"])
def test_what_is_in_flight_at_a_judges_former_endpoint_is_held_against_the_next(tmp_path: Path, other: str) -> None:
    with BatchServer() as first, BatchServer() as second:
        before = by_batch(base_url=first.base_url)
        after = by_batch(**{"base_url": first.base_url, other: {"base_url": second.base_url, "key_variable": "OTHER_KEY"}[other]})
        send(tmp_path, before, first, questions(2, 0.4))
        with pytest.raises(OverBudget, match=r"would cost \$0.80, after \$0.80"):
            send(tmp_path, after, second, questions(2, 0.4))
        assert second.calls == []
        frame = pd.DataFrame({"custom_id": ["new"], "judge": "gpt", "prompt_tokens": 300_000, "counted": "exact: m"})
        assert "after $0.80" in in_flight.bill(study_of(after), tmp_path, in_flight.BATCH, [frame]).refusal
        backup = in_flight.ledger_path(tmp_path, before).with_name("judge_batches-of last week.sqlite")
        backup.write_bytes(b"")
        send(tmp_path, after.model_copy(update={"budget_usd": 1.7}), second, questions(2, 0.4))
        assert in_flight.committed(tmp_path, after) == pytest.approx(1.6)
        assert in_flight.committed(tmp_path, by_batch(name="another")) == 0.0


def test_a_judge_and_an_author_have_two_names_because_what_they_are_paid_is_kept_by_name(tmp_path: Path) -> None:
    path = tmp_path / "prompting.toml"
    both = """
[[judges]]
name = "gpt"
kind = "openai"
model = "gpt-4o-2024-08-06"
budget_usd = 1.0

[[prompting.authors]]
name = "AUTHOR"
kind = "openai"
model = "gpt-4o-2024-08-06"
budget_usd = 1.0
"""
    text = (STUDIES / "prompting.toml").read_text(encoding="utf-8") + both
    path.write_text(text.replace("AUTHOR", "gpt"), encoding="utf-8")
    with pytest.raises(StudyError, match=r"'gpt' of \[\[prompting.authors\]\] has the name of one of \[\[judges\]\]"):
        load_study(str(path))
    path.write_text(text.replace("AUTHOR", "far"), encoding="utf-8")
    assert load_study(str(path)).prompting is not None


def begun(folder: Path, of: LanguageJudge, **values: Any) -> Batch:
    with Ledger(in_flight.ledger_path(folder, of)) as ledger:
        batch = ledger.begin_batch(Group(in_flight.group_of(of, PARTITION), "/v1/chat/completions", "24h", {}), 1)
        return ledger.update_batch(batch.number, **values)


def test_an_endpoint_that_takes_a_call_and_never_answers_is_words_within_seconds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        base_url = f"http://127.0.0.1:{silent.getsockname()[1]}/v1"
        mine = by_batch(base_url=base_url)
        begun(tmp_path, mine, status="in_progress", batch_id="batch_1", base_url=base_url)
        asked = time.monotonic()
        (said,) = in_flight.look(study_of(mine), tmp_path, seconds=0.5)
        assert said.startswith("gpt: looking at the batches: the provider cannot be reached") and time.monotonic() - asked < 10


def test_a_tick_leaves_what_was_held_to_a_run_and_starts_one_for_every_time_it_is_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = by_batch()
    there = begun(tmp_path, mine, status="in_progress", batch_id="batch_1")
    held = replace(there, number=2, status="held", batch_id=None, held_until=0.0, former=["batch_2"])

    def ready(*batches: Batch) -> dict[str, str]:
        monkeypatch.setattr(in_flight, "asked", lambda study, folder: [in_flight.Asked(in_flight.group_of(mine, PARTITION), batches)])
        stage: Any = SimpleNamespace(graph=None, key=lambda name: name)
        return sensors.looked(study_of(mine), tmp_path, None, stage).ready  # type: ignore[arg-type]

    monkeypatch.setattr(in_flight, "look", lambda study, folder, seconds: [])
    monkeypatch.setattr(sensors, "Lineage", lambda *about: SimpleNamespace(version=lambda key, partition: None))
    monkeypatch.setattr(sensors, "_unanswered", lambda *about: True)
    assert ready(there) == ready(there, replace(held, held_until=time.time() + 60)) == {}
    once, twice = ready(there, held), ready(there, replace(held, former=["batch_2", "batch_3"]))
    assert once.keys() == twice.keys() == {PARTITION} and once != twice


# --- one asker at a time --------------------------------------------------------------------------------------------------


def _hold(folder: Path, of: LanguageJudge, told: Any) -> None:
    with in_flight.alone(folder, of):
        told.send("held")
        time.sleep(60)


def test_one_process_at_a_time_asks_a_judge_and_a_killed_one_lets_go(tmp_path: Path) -> None:
    here, there = multiprocessing.get_context("spawn").Pipe()
    process = multiprocessing.get_context("spawn").Process(target=_hold, args=(tmp_path, judge(), there))
    process.start()
    assert here.recv() == "held"
    with in_flight.alone(tmp_path, judge(name="another")):
        pass  # another judge's lock is another one
    killed = time.monotonic()
    process.kill()
    with in_flight.alone(tmp_path, judge()):
        process.join()
        assert process.exitcode == -9 and time.monotonic() - killed < 50
