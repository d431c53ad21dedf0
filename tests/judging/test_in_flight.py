"""What a judge may still be paid: which answers of its journals count as known, whose journals they are, and one asker at a time."""

from __future__ import annotations

import multiprocessing
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest

from relseek_assets.judging import in_flight
from relseek_assets.study import LanguageJudge
from relseek_resources.judges.answers import Answer
from relseek_resources.judges.asking import AnswerJournal

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
