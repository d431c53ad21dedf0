"""Asking a judge at once, against a server on a real socket that fails on command."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import pytest
from chat_server import COMPLETION_TOKENS, PROMPT_TOKENS, ChatServer, Says, serving

from relseek_resources.judges.answers import Answer, Request, read_score
from relseek_resources.judges.asking import AnswerJournal, EndpointError, answer_of, ask, async_client_of, client_of, retry_after, run
from relseek_resources.judges.prices import Price
from relseek_resources.storage import StorageError

PRICE = Price(prompt=10.0, completion=100.0, batch_discount=0.5, dated="2024-01-01", source="test", cached=1.0)
COST = (PROMPT_TOKENS * 10 + COMPLETION_TOKENS * 100) / 1e6  # USD of one answer
KEY = "sk-a-secret-that-nobody-may-see"


@pytest.fixture(autouse=True)
def _key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_KEY", KEY)


def question(name: str) -> Request:
    return Request(name, json.dumps({"model": "judge-1", "messages": [{"role": "user", "content": name}], "temperature": 0, "max_tokens": 16}))


def asked(server: ChatServer, *names: str, **settings: Any) -> list[Answer]:
    """Rows of questions whose text is their custom_id."""
    return asked_in_full(server, map(question, names), **settings)


def asked_in_full(server: ChatServer, questions: Iterable[Request], timeout: float = 20.0, **settings: Any) -> list[Answer]:
    """Waits are a hundredth of the real ones."""
    given = {"price": PRICE, "attempts": 3, "concurrency": 4, "key_variable": "JUDGE_KEY", "first_wait": 0.005, **settings}

    async def all_of_them() -> list[Answer]:
        async with async_client_of(server.url, "JUDGE_KEY").with_options(timeout=timeout) as client:
            return await ask(questions, client, lambda _, raw: read_score(raw), **given)

    return asyncio.run(all_of_them())


def reaction(says: Says, **settings: Any) -> tuple[Answer, int]:
    """The row of a question that the server always answers in this way, and how often it was asked."""
    with serving(lambda text, nth: says) as server:
        (row,) = asked(server, "q", **settings)
    return row, len(server.asked)


# --- what an answer says --------------------------------------------------------------------------------------------------


def test_a_score_is_one_row_with_its_text_model_tokens_and_cost() -> None:
    row, times = reaction(Says('{"score": 7}'))
    assert row == Answer("q", "scored", '{"score": 7}', "judge-1-served", PROMPT_TOKENS, COMPLETION_TOKENS, pytest.approx(COST), 1)
    assert times == 1


@pytest.mark.parametrize("content", ["7", '{"score": 7}', '{"score": 7.5}', '{"score": "7"}', " 10 "])
def test_scores_are_taken_at_the_first_attempt(content: str) -> None:
    assert reaction(Says(content))[0].status == "scored"


@pytest.mark.parametrize(
    ("says", "status"),
    [
        (Says("I would give it a 7 out of 10."), "unreadable"),
        (Says('{"score": true}'), "unreadable"),
        (Says('{"score": NaN}'), "unreadable"),
        (Says('{"score": null}'), "unreadable"),
        (Says("[7]"), "unreadable"),
        (Says(""), "unreadable"),
        (Says(None), "unreadable"),
        (Says([{"type": "text", "text": "7"}]), "unreadable"),
        (Says("0"), "out_of_range"),
        (Says('{"score": 11}'), "out_of_range"),
        (Says(None, refusal="I cannot rate this."), "refused"),
        (Says('{"score": 7}', finish="content_filter"), "refused"),
        (Says('{"scor', finish="length"), "cut_off"),
    ],
)
def test_an_answer_that_is_no_score_is_asked_again_alone_and_every_attempt_is_charged(says: Says, status: str) -> None:
    row, times = reaction(says)
    assert (row.status, row.attempt, times) == (status, 3, 3)
    assert (row.prompt_tokens, row.completion_tokens) == (3 * PROMPT_TOKENS, 3 * COMPLETION_TOKENS)
    assert row.cost_usd == pytest.approx(3 * COST)


def test_a_whole_score_at_the_token_limit_is_a_score() -> None:
    assert reaction(Says('{"score": 7}', finish="length"))[0].status == "scored"


def test_the_words_of_a_refusal_are_kept() -> None:
    assert reaction(Says(None, refusal="I cannot rate this."))[0].raw == "I cannot rate this."


def test_the_second_attempt_may_be_a_score_and_the_first_stays_on_the_bill() -> None:
    with serving(lambda text, nth: Says("well") if nth == 0 else Says('{"score": 3}')) as server:
        (row,) = asked(server, "q")
    assert (row.status, row.raw, row.attempt) == ("scored", '{"score": 3}', 2)
    assert row.cost_usd == pytest.approx(2 * COST)


def test_cached_prompt_tokens_cost_their_own_price() -> None:
    row, _ = reaction(Says(cached=60))
    assert row.cost_usd == pytest.approx((40 * 10 + 60 * 1 + COMPLETION_TOKENS * 100) / 1e6)


def test_an_answer_without_usage_says_that_its_cost_is_not_counted() -> None:
    row, _ = reaction(Says(usage=False))
    assert (row.status, row.cost_usd) == ("scored", 0.0)
    assert "no usage" in (row.error or "")


# --- retries --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "failure",
    [Says(status=429), Says(status=500), Says(status=503), Says(cuts=True), Says(hangs=True), Says(body="<html>busy</html>"), Says(body="{}")],
    ids=["429", "500", "503", "cut", "hang", "html", "empty"],
)
def test_what_came_to_nothing_is_tried_again_and_is_no_attempt(failure: Says) -> None:
    with serving(lambda text, nth: failure if nth < 2 else Says()) as server:
        (row,) = asked(server, "q", timeout=0.3)
    assert (row.status, row.attempt, len(server.asked)) == ("scored", 1, 3)
    assert row.cost_usd == pytest.approx(COST)


def test_a_question_that_never_gets_through_is_a_failed_row_and_the_others_are_answered() -> None:
    with serving(lambda text, nth: Says(status=500, message="out of order") if text == "b" else Says()) as server:
        rows = asked(server, "a", "b", "c", first_wait=0.001)
    assert [(row.custom_id, row.status) for row in rows] == [("a", "scored"), ("b", "failed"), ("c", "scored")]
    assert "out of order" in (rows[1].error or "")
    assert server.times["b"] == 9  # once and eight retries


def test_a_bad_request_fails_its_own_row_at_once() -> None:
    says = Says(status=400, code="context_length_exceeded", message="too long")
    with serving(lambda text, nth: says if text == "b" else Says()) as server:
        rows = asked(server, "a", "b")
    assert [row.status for row in rows] == ["scored", "failed"]
    assert (server.times["b"], rows[1].cost_usd, "too long" in (rows[1].error or "")) == (1, 0.0, True)


def test_a_filter_that_answers_with_an_error_is_a_refusal() -> None:
    assert reaction(Says(status=400, code="content_filter"), attempts=1)[0].status == "refused"


@pytest.mark.parametrize("name", ["retry-after", "retry-after-ms"])
def test_everybody_waits_as_long_as_the_endpoint_asks(name: str) -> None:
    wait = {"retry-after": "0.4", "retry-after-ms": "400"}[name]
    limited = Says(status=429, headers={name: wait})
    with serving(lambda text, nth: limited if (text, nth) == ("a", 0) else Says(delay=0.02)) as server:
        rows = asked(server, *"abcdefgh", concurrency=2)
    assert all(row.status == "scored" for row in rows)
    first = server.asked[0][0]
    # The other worker's question may have been on its way when the limit was announced; nobody starts another before it is over.
    assert sum(moment - first < 0.4 for moment, _ in server.asked) <= 2


def test_retry_after_may_be_seconds_milliseconds_or_a_date() -> None:
    assert retry_after({"retry-after": "3"}) == 3
    assert retry_after({"retry-after": "3", "retry-after-ms": "2500"}) == 2.5
    assert retry_after({"retry-after": format_datetime(datetime.now(UTC) + timedelta(seconds=30), usegmt=True)}) == pytest.approx(30, abs=2)
    assert retry_after({"retry-after": "Wed, 21 Oct 2015 07:28:00 GMT"}) == 0
    assert [retry_after(headers) for headers in ({}, {"retry-after": "soon"}, {"retry-after": "nan"})] == [None, None, None]


def test_no_more_questions_are_in_the_air_than_allowed_and_none_are_read_ahead() -> None:
    read: list[str] = []

    with serving(lambda text, nth: Says(delay=0.02)) as server:

        def questions() -> Iterator[Request]:
            for number in range(40):
                read.append(str(number))
                assert len(read) <= len(server.asked) + 5
                yield question(str(number))

        rows = asked_in_full(server, questions(), concurrency=5)
    assert server.most_at_once == 5
    assert [row.custom_id for row in rows] == read


# --- what stops the run ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("says", "words"),
    [
        (Says(status=401, message=f"Incorrect API key: {KEY}"), "JUDGE_KEY"),
        (Says(status=404, message="no such model"), "'judge-1'"),
        (Says(status=429, code="insufficient_quota"), "credit"),
        (Says(status=400, message="response_format of type json_schema is not supported"), "structured outputs"),
        (Says(status=429, headers={"retry-after": "7200"}), "120 minutes"),
    ],
    ids=["key", "model", "quota", "schema", "long wait"],
)
def test_what_no_question_can_get_past_stops_the_run_and_says_what_to_change(says: Says, words: str) -> None:
    with serving(lambda text, nth: says) as server:
        with pytest.raises(EndpointError) as stopped:
            asked(server, *map(str, range(50)))
    assert words in str(stopped.value) and server.url in str(stopped.value)
    assert KEY not in str(stopped.value)
    assert len(server.asked) <= 4  # those in the air


def test_answers_in_the_air_are_received_and_kept_when_the_run_stops() -> None:
    kept: list[str] = []
    with serving(lambda text, nth: Says(status=401) if text == "b" else Says(delay=0.3)) as server:
        with pytest.raises(EndpointError):
            asked(server, "a", "b", "c", "d", "e", on_answer=lambda row: kept.append(row.custom_id), concurrency=4)
    assert sorted(kept) == ["a", "c", "d"]


def test_an_endpoint_that_is_down_stops_the_run_instead_of_failing_every_row() -> None:
    with serving(lambda text, nth: Says(status=502)) as server:
        with pytest.raises(EndpointError, match="in a row"):
            asked(server, *map(str, range(100)), first_wait=0.0001)
    assert len(server.times) <= 16


def test_a_question_that_is_there_twice_is_refused() -> None:
    with serving(lambda text, nth: Says()) as server, pytest.raises(ValueError, match="twice"):
        asked(server, "a", "a")


def test_without_its_key_the_variable_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("JUDGE_KEY")
    for make in (client_of, async_client_of):
        with pytest.raises(EndpointError, match="JUDGE_KEY"):
            make("", "JUDGE_KEY")


def test_the_key_goes_to_the_endpoint_of_the_study_or_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(lambda text, nth: Says()) as server:
        asked(server, "a")
        monkeypatch.setenv("OPENAI_BASE_URL", server.url)
        assert str(client_of("", "JUDGE_KEY").base_url).rstrip("/") == server.url
    assert server.keys == {f"Bearer {KEY}"}


# --- the journal ----------------------------------------------------------------------------------------------------------


def in_journal(path: Path, server: ChatServer, *names: str, attempts: int = 3) -> list[Answer]:
    with AnswerJournal(path) as journal:
        return run(
            map(question, names),
            lambda _, raw: read_score(raw),
            base_url=server.url,
            key_variable="JUDGE_KEY",
            price=PRICE,
            attempts=attempts,
            concurrency=4,
            journal=journal,
        )


def test_what_the_journal_holds_is_not_asked_again(tmp_path: Path) -> None:
    with serving(lambda text, nth: Says()) as server:
        first = in_journal(tmp_path / "answers.jsonl", server, "a", "b")
        again = in_journal(tmp_path / "answers.jsonl", server, "a", "b", "c")
    assert again[:2] == first
    assert server.times == {"a": 1, "b": 1, "c": 1}


def test_attempts_go_on_where_they_stopped(tmp_path: Path) -> None:
    with serving(lambda text, nth: Says("well") if nth < 2 else Says()) as server:
        (once,) = in_journal(tmp_path / "j", server, "a", attempts=1)
        (thrice,) = in_journal(tmp_path / "j", server, "a", attempts=3)
    assert (once.status, once.attempt) == ("unreadable", 1)
    assert (thrice.status, thrice.attempt, thrice.cost_usd) == ("scored", 3, pytest.approx(3 * COST))


def test_a_failed_question_is_asked_anew_and_keeps_what_it_cost_before(tmp_path: Path) -> None:
    script = [Says("well"), Says(status=400), Says()]
    with serving(lambda text, nth: script[nth]) as server:
        (failed,) = in_journal(tmp_path / "j", server, "a")
        (row,) = in_journal(tmp_path / "j", server, "a")
    assert (failed.status, failed.attempt, failed.cost_usd) == ("failed", 2, pytest.approx(COST))
    assert (row.status, row.attempt, row.cost_usd) == ("scored", 2, pytest.approx(2 * COST))


def test_a_torn_last_line_is_dropped_and_another_bad_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "j"
    with AnswerJournal(path) as journal:
        journal.append(Answer("a", "scored", "7"))
        journal.append(Answer("b", "scored", "8"))
    whole = path.read_bytes()
    path.write_bytes(whole[:-5])
    with AnswerJournal(path) as journal:
        assert list(journal.answers) == ["a"]
        journal.append(Answer("b", "scored", "8"))
    assert path.read_bytes() == whole
    path.write_bytes(b"{}\n" + whole)
    with pytest.raises(StorageError, match="line 1"):
        AnswerJournal(path)


def test_a_line_that_found_no_space_is_taken_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "j"
    with AnswerJournal(path) as journal:
        journal.append(Answer("a", "scored", "7"))
        whole = path.read_bytes()
        disk = journal._file

        class Full:
            """A disk with room for ten more bytes, once."""

            def write(self, line: bytes) -> int:
                journal._file = disk
                return disk.write(line[:10])

            def __getattr__(self, name: str) -> Any:
                return getattr(disk, name)

        monkeypatch.setattr(journal, "_file", Full())
        with pytest.raises(StorageError, match="free some space"):
            journal.append(Answer("b", "scored", "8"))
        assert path.read_bytes() == whole
        monkeypatch.undo()
        journal._file = disk
        journal.append(Answer("c", "scored", "9"))
    with AnswerJournal(path) as journal:
        assert list(journal.answers) == ["a", "c"]


@pytest.mark.parametrize(
    ("text", "status"), [("1", "cut_off"), ('{"score": 1', "cut_off"), ('{"score": 1}', "scored"), ('{"score": 11}\n', "out_of_range")]
)
def test_a_text_that_was_cut_off_is_a_score_only_as_a_whole_object(text: str, status: str) -> None:
    completion = {"choices": [{"finish_reason": "length", "message": {"content": text}}], "usage": {"prompt_tokens": 1, "completion_tokens": 1}}
    assert answer_of("a", completion, lambda _, raw: read_score(raw), PRICE).status == status
    completion["choices"][0]["finish_reason"] = "stop"  # type: ignore[index]
    assert (answer_of("a", completion, lambda _, raw: read_score(raw), PRICE).status == "scored") == (text in ("1", '{"score": 1}'))


def test_two_runs_do_not_ask_the_same_questions_at_once(tmp_path: Path) -> None:
    with AnswerJournal(tmp_path / "j"), pytest.raises(StorageError, match="another run"):
        AnswerJournal(tmp_path / "j")


CHILD = """
import json, signal, sys
from pathlib import Path
from relseek_resources.judges.answers import Request, read_score
from relseek_resources.judges.asking import AnswerJournal, run
from relseek_resources.judges.prices import Price
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background job would ignore
body = lambda name: json.dumps({"model": "judge-1", "messages": [{"role": "user", "content": name}]})
with AnswerJournal(Path(sys.argv[2])) as journal:
    run((Request(str(n), body(str(n))) for n in range(120)), lambda _, raw: read_score(raw), base_url=sys.argv[1], key_variable="JUDGE_KEY",
        price=Price(10, 100, 0.5, "", ""), attempts=3, concurrency=4, journal=journal)
"""


def test_a_killed_run_goes_on_and_pays_for_no_answer_twice(tmp_path: Path) -> None:
    path = tmp_path / "j"
    with serving(lambda text, nth: Says(delay=0.01)) as server:
        child = subprocess.Popen(
            [sys.executable, "-c", CHILD, server.url, str(path)], env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
        )
        deadline = time.monotonic() + 60
        while len(server.asked) < 40 and time.monotonic() < deadline:
            time.sleep(0.005)
        child.send_signal(signal.SIGKILL)
        child.wait()
        assert 40 <= len(server.asked) < 120
        with AnswerJournal(path) as journal:
            answered = set(journal.answers)
        rows = in_journal(path, server, *map(str, range(120)))
    assert [row.status for row in rows] == ["scored"] * 120
    assert all(server.times[name] == 1 for name in answered)
    twice = [name for name, times in server.times.items() if times > 1]
    assert len(twice) <= 4 and len(answered) >= 35  # only what was in the air when the process died


def test_an_interrupted_run_sends_nothing_more_and_keeps_what_is_in_the_air(tmp_path: Path) -> None:
    path = tmp_path / "j"
    with serving(lambda text, nth: Says(delay=0.05)) as server:
        child = subprocess.Popen(
            [sys.executable, "-c", CHILD, server.url, str(path)],
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
            stderr=subprocess.PIPE,
        )
        deadline = time.monotonic() + 60
        while len(server.asked) < 20 and time.monotonic() < deadline:
            time.sleep(0.005)
        child.send_signal(signal.SIGINT)
        _, said = child.communicate(timeout=30)
        asked_before = len(server.asked)
        with AnswerJournal(path) as journal:
            assert set(journal.answers) == set(server.times), "every question that was sent was answered and kept"
    assert child.returncode != 0 and b"KeyboardInterrupt" in said
    assert 20 <= asked_before <= 20 + 8


# --- texts for whom any will do, and what asking again may cost -----------------------------------------------------------


def test_where_any_text_will_do_one_that_was_cut_off_is_asked_for_once() -> None:
    with serving(lambda text, nth: Says("Once upon a", finish="length")) as server:
        (row,) = asked(server, "q", enough=("scored", "cut_off"))
    assert (row.status, row.raw, row.attempt, len(server.asked)) == ("cut_off", "Once upon a", 1, 1)


def test_a_token_limit_that_left_no_text_is_asked_again_even_there() -> None:
    with serving(lambda text, nth: Says(None if nth == 0 else "8", finish="length" if nth == 0 else "stop")) as server:
        (row,) = asked(server, "q", enough=("scored", "cut_off"))
    assert (row.raw, row.attempt) == ("8", 2)


def test_asking_again_keeps_to_what_the_budget_leaves() -> None:
    most = (PROMPT_TOKENS * 10 + 16 * 100) / 1e6  # USD of an answer of max_tokens
    saved = most - COST
    with serving(lambda text, nth: Says("I would give it a 7.")) as server:
        rows: list[Answer] = []
        with pytest.raises(EndpointError, match="asking again .* budget_usd"):
            asked(server, "a", "b", concurrency=1, spare_usd=most - saved, on_answer=rows.append)
        assert server.times == {"a": 2}, "once as planned, once from what was spare"
        assert [row.cost_usd for row in rows] == pytest.approx([COST, 2 * COST])
    with serving(lambda text, nth: Says("I would give it a 7.")) as server:
        asked(server, "a", concurrency=1, spare_usd=2 * most)
        assert server.times == {"a": 3}


def test_an_endpoint_that_refuses_every_question_alike_stops_the_run() -> None:
    no = Says(status=400, code="unsupported_parameter", message="Use max_completion_tokens")
    with serving(lambda text, nth: no) as server:
        with pytest.raises(EndpointError, match="first 8 questions were all refused.*max_completion_tokens"):
            asked(server, *map(str, range(100)))
        assert len(server.asked) < 16
    with serving(lambda text, nth: no if int(text) % 10 else Says()) as server:
        assert len(asked(server, *map(str, range(100)))) == 100, "questions of their own that fail are rows"


@pytest.mark.parametrize(
    "completion",
    [
        {"choices": [None]},
        {"choices": [{"message": "text"}]},
        {"choices": [{"message": {"content": {"score": 7}}}], "usage": "many"},
        {"choices": [], "usage": {"prompt_tokens": "7", "prompt_tokens_details": 3}},
        {"choices": [{"message": {"content": "\ud800"}}], "model": 7, "usage": {}},
    ],
)
def test_a_completion_is_read_whatever_it_holds_and_can_be_stored(completion: dict[str, Any]) -> None:
    (row, times) = reaction(Says(body=json.dumps(completion)))
    assert (row.status, times) == ("unreadable", 3)
    assert json.dumps(row.raw).encode() and (row.raw or "").encode() is not None
