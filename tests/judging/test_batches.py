"""The Batch engine against a server that speaks OpenAI's shapes over a socket: every status, every line, every way of failing."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from batch_server import FORGOTTEN, BatchServer, Fault, Plan
from openai import OpenAI

from relseek_resources.judges import batch_results, provider
from relseek_resources.judges.answers import Answer, Reading, Request, read_score
from relseek_resources.judges.batches import MISSES_APART, BatchError, Settled, Split, Submitted, cancel, describe, poll, settle, submit
from relseek_resources.judges.ledger import Ledger

GROUP = "judge/quickstart/smollm2-135m:L12/2"


def accept(custom_id: str, raw: str) -> Reading:
    return read_score(raw)


def price(prompt_tokens: int, completion_tokens: int) -> float:
    return prompt_tokens * 1e-6 + completion_tokens * 1e-5


def questions(count: int, start: int = 0) -> list[Request]:
    return [
        Request(f"r{number:031x}", json.dumps({"model": "judge-1", "messages": [{"role": "user", "content": f"Rate reply {number}."}]}))
        for number in range(start, start + count)
    ]


def names(requests: list[Request]) -> list[str]:
    return [request.custom_id for request in requests]


@pytest.fixture(autouse=True)
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """How long each pause would have been."""
    waited: list[float] = []
    monkeypatch.setattr(provider, "pause", waited.append)
    monkeypatch.setattr("openai._base_client.BaseClient._calculate_retry_timeout", lambda *arguments: 0.001)
    return waited


@pytest.fixture
def server() -> Iterator[BatchServer]:
    with BatchServer() as running:
        yield running


@pytest.fixture
def client(server: BatchServer) -> OpenAI:
    return OpenAI(base_url=server.base_url, api_key="none", timeout=10)


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    with Ledger(tmp_path / "batches.sqlite") as opened:
        yield opened


Send = Callable[..., Submitted]
Finish = Callable[..., Settled]


@pytest.fixture
def send(ledger: Ledger, client: OpenAI) -> Send:
    return lambda requests, **more: submit(ledger, client, more.pop("group", GROUP), requests, **more)


@pytest.fixture
def finish(ledger: Ledger, client: OpenAI) -> Finish:
    """Look and settle until everything is there."""

    def until_complete(requests: list[Request], attempts: int = 3, group: str = GROUP) -> Settled:
        for _ in range(40):
            poll(ledger, client)
            settled = settle(ledger, client, group, requests, accept, attempts, price=price)
            if settled.complete:
                return settled
        raise AssertionError("never complete")

    return until_complete


def rows(settled: Settled) -> dict[str, Answer]:
    found = list(settled.answers)
    assert len({row.custom_id for row in found}) == len(found)
    return {row.custom_id: row for row in found}


# --- sending ------------------------------------------------------------------------------------------------------------


def test_every_request_gets_one_row_in_its_place(server: BatchServer, send: Send, finish: Finish) -> None:
    asked = questions(25)
    sent = send(iter(asked))
    assert (sent.requests, sent.known, len(sent.batches)) == (25, 0, 1)
    found = list(finish(asked).answers)
    assert [row.custom_id for row in found] == names(asked)
    assert {row.status for row in found} == {"scored"}
    for row in found:
        assert row.raw == server.answer(row.custom_id, {}) and row.model == "judge-1" and row.attempt == 1
        assert row.cost_usd == price(row.prompt_tokens, row.completion_tokens) > 0
        assert row.batch in server.batches


def test_files_are_split_by_requests_and_by_bytes(ledger: Ledger, server: BatchServer, send: Send) -> None:
    by_count = send(questions(10), split=Split(requests=4))
    assert [batch.requests for batch in by_count.batches] == [4, 4, 2]
    size = by_count.batches[0].bytes // 4
    by_bytes = send(questions(10, start=100), split=Split(bytes=3 * size + 20))
    assert [batch.requests for batch in by_bytes.batches] == [3, 3, 3, 1]
    for batch in (*by_count.batches, *by_bytes.batches):
        uploaded = server.files[str(batch.input_file_id)].path.read_bytes()
        assert len(uploaded) == batch.bytes and uploaded.count(b"\n") == batch.requests
        metadata = server.batches[str(batch.batch_id)].shown["metadata"]
        assert metadata["relseek_fingerprint"] == batch.fingerprint == server.batches[str(batch.batch_id)].sha256
    with pytest.raises(BatchError, match="request long takes"):
        send([Request("long", questions(1)[0].body)], split=Split(bytes=50))


def test_unchanged_requests_are_not_sent_again_and_new_ones_alone(server: BatchServer, send: Send, finish: Finish) -> None:
    send(questions(6))
    calls = len(server.calls)
    again = send(questions(6))
    assert (again.requests, again.known, again.batches, len(server.calls)) == (0, 6, (), calls)
    more = send(questions(9))
    assert (more.requests, more.known) == (3, 6)
    other = send(questions(9), group="another group")
    assert other.requests == 0
    assert set(rows(finish(questions(9), group="another group"))) == set(names(questions(9)))
    assert all(len(runs) == 1 for runs in server.charges.values())


def test_a_body_with_line_breaks_stays_one_line(server: BatchServer, send: Send, finish: Finish) -> None:
    body = json.dumps({"model": "m", "messages": [{"role": "user", "content": "a\nb \u2028 ü"}]}, indent=1, ensure_ascii=False)
    assert rows(send([Request("r1", body)]) and finish([Request("r1", body)]))["r1"].status == "scored"


def test_a_custom_id_that_comes_twice_is_refused(send: Send, ledger: Ledger, client: OpenAI) -> None:
    with pytest.raises(BatchError, match="comes twice"):
        send([*questions(3), *questions(1)])
    with pytest.raises(BatchError, match="comes twice"):
        send([*questions(1200, start=50), *questions(1, start=50)])
    with pytest.raises(BatchError, match="wanted twice"):
        settle(ledger, client, GROUP, [*questions(3), *questions(1)], accept, 3)


def test_metadata_keeps_to_the_providers_limits(server: BatchServer, send: Send) -> None:
    described = {f"key {number} {'k' * 80}": "v" * 2000 for number in range(20)}
    sent = send(questions(1), description=described, group="g" * 900)
    metadata = server.batches[str(sent.batches[0].batch_id)].shown["metadata"]
    assert len(metadata) <= 16 and max(map(len, metadata)) <= 64 and max(map(len, metadata.values())) <= 512


def test_settling_what_was_never_submitted_says_so(ledger: Ledger, client: OpenAI) -> None:
    with pytest.raises(BatchError, match="submit it first"):
        settle(ledger, client, GROUP, questions(1), accept, 3)


# --- calls that fail ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["429", "500", "503", "cut_before", "500_after", "cut_after", "html"])
@pytest.mark.parametrize("route", ["POST /v1/files$", "POST /v1/batches$"])
def test_a_failing_call_creates_each_batch_once(server: BatchServer, send: Send, finish: Finish, kind: str, route: str) -> None:
    server.faults = [Fault(kind, route, count=2)]
    asked = questions(5)
    send(asked)
    assert [end for _, end in server.created] == ["completed"]
    assert len(rows(finish(asked))) == 5 and all(len(runs) == 1 for runs in server.charges.values())


@pytest.mark.parametrize("kind", ["429", "500", "cut_before", "cut_after", "html"])
def test_a_failing_look_changes_nothing(server: BatchServer, send: Send, finish: Finish, kind: str) -> None:
    server.faults = [Fault(kind, "GET /v1/batches", count=1 if kind == "html" else 3)]
    send(questions(5))
    if kind == "html":
        with pytest.raises(BatchError, match="cannot be read"):
            finish(questions(5))
    assert len(rows(finish(questions(5)))) == 5


@pytest.mark.parametrize("kind", ["cut_download", "short_download", "429", "500", "cut_before", "html"])
def test_a_torn_download_is_never_read(ledger: Ledger, server: BatchServer, send: Send, finish: Finish, kind: str) -> None:
    server.faults = [Fault(kind, "/content", count=3)]
    send(questions(40))
    settled = finish(questions(40))
    assert len(rows(settled)) == 40 and settled.unreadable_lines == 0
    assert all(len(runs) == 1 for runs in server.charges.values())


def test_a_download_that_stays_torn_is_an_error_and_nothing_is_asked_again(
    ledger: Ledger, server: BatchServer, send: Send, finish: Finish, client: OpenAI
) -> None:
    server.faults = [Fault("short_download", "/content", count=provider.RETRIES + 1)]
    send(questions(40))
    with pytest.raises(BatchError, match="not whole after"):
        finish(questions(40))
    assert not list((ledger.folder / "results").iterdir())
    assert len(rows(finish(questions(40)))) == 40 and len(server.created) == 1


def test_an_upload_that_is_cut_is_sent_again(server: BatchServer, send: Send, finish: Finish) -> None:
    server.faults = [Fault("cut_upload", "POST /v1/files", count=2)]
    send(questions(400))
    assert len(rows(finish(questions(400)))) == 400 and len(server.created) == 1


def test_an_upload_whose_answer_was_lost_is_found_again(server: BatchServer, send: Send) -> None:
    server.faults = [Fault("cut_after", "POST /v1/files")]
    send(questions(3))
    assert len(server.files) == 1
    server.dialect = {"no_file_list"}
    server.faults = [Fault("cut_after", "POST /v1/files")]
    send(questions(6))
    assert len(server.files) == 3  # where files cannot be listed the file goes up twice; the batch is created once
    assert len(server.created) == 2


def test_a_batch_whose_answer_was_lost_is_found_by_its_file_where_metadata_is_not_kept(server: BatchServer, send: Send) -> None:
    server.dialect = {"no_metadata", "no_counts", "window"}
    server.faults = [Fault("cut_after", "POST /v1/batches")]
    send(questions(3))
    assert len(server.created) == 1


def test_an_interrupted_repetition_is_not_taken_for_the_first_batch_with_the_same_content(server: BatchServer, send: Send, finish: Finish) -> None:
    server.plans = [Plan("expired", 0.0)]
    send(questions(3))
    server.faults = [Fault("cut_after", "POST /v1/batches")]
    assert {(row.status, row.attempt) for row in rows(finish(questions(3))).values()} == {("scored", 2)}
    assert len(server.created) == 2


def test_retry_after_is_honoured_and_an_unsure_creation_waits_before_it_looks(server: BatchServer, send: Send, waits: list[float]) -> None:
    server.faults = [Fault("429", "POST /v1/batches")]
    send(questions(1))
    assert waits == [0.005]
    server.faults = [Fault("cut_after", "POST /v1/batches")]
    send(questions(2))
    assert waits == [0.005, provider.SETTLING]


def test_a_provider_that_stays_down_is_an_error_and_the_next_submission_goes_on(server: BatchServer, send: Send, ledger: Ledger) -> None:
    server.faults = [Fault("500_after", "POST /v1/batches", count=99)]
    server.faults += [Fault("500", "GET /v1/batches", count=99)]
    with pytest.raises(BatchError, match="again"):
        send(questions(4))
    assert ledger.batches()[0].status == "creating"
    server.faults = []
    assert [batch.batch_id for batch in send(questions(4)).batches] == list(server.batches)
    assert len(server.created) == 1


def test_a_refusal_is_an_error_with_the_providers_words(server: BatchServer, send: Send, client: OpenAI, ledger: Ledger) -> None:
    with pytest.raises(BatchError, match=r"refused \(400\): The file's purpose must be batch"):
        send(questions(1), endpoint="/v1/judgements")
    assert ledger.batches()[0].status == "uploaded"
    with pytest.raises(BatchError, match="401.*API key"):
        submit(ledger, client.with_options(default_headers={"Authorization": ""}), "other", questions(1, start=5))


# --- statuses -----------------------------------------------------------------------------------------------------------


def test_each_status_is_seen_and_nothing_is_settled_before_the_end(server: BatchServer, send: Send, ledger: Ledger, client: OpenAI) -> None:
    send(questions(3))
    seen = []
    for _ in range(3):
        seen.append([batch.status for batch in poll(ledger, client).batches])
        assert settle(ledger, client, GROUP, questions(3), accept, 3).complete == (seen[-1] == [])
    assert seen == [["in_progress"], ["finalizing"], []]
    calls = len(server.calls)
    assert poll(ledger, client).ended == () and len(server.calls) == calls  # nothing in flight, nothing asked


def test_a_look_is_one_call_while_all_batches_are_on_the_page(
    server: BatchServer, send: Send, ledger: Ledger, client: OpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(provider, "PAGE", 4)
    send(questions(3), split=Split(requests=1))
    server.calls.clear()
    poll(ledger, client)
    assert server.calls == ["GET /v1/batches"]
    send(questions(10), split=Split(requests=1))
    server.calls.clear()
    assert len(poll(ledger, client).batches) == 10
    assert server.calls == ["GET /v1/batches"] * 3


def test_pages_end_where_the_oldest_batch_in_flight_is(
    server: BatchServer, send: Send, finish: Finish, ledger: Ledger, client: OpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(provider, "PAGE", 2)
    send(questions(5), split=Split(requests=1))
    finish(questions(5))
    for running in server.batches.values():
        running.shown["created_at"] -= 9000
    forgotten, newest = send(questions(7)[5:], split=Split(requests=1)).batches
    server.forget(str(forgotten.batch_id))
    server.calls.clear()
    assert [batch.number for batch in poll(ledger, client).batches] == [forgotten.number, newest.number]
    assert server.calls == ["GET /v1/batches", f"GET /v1/batches/{forgotten.batch_id}"]


@pytest.mark.parametrize("end", ["expired", "cancelled"])
def test_a_batch_that_ends_early_keeps_what_it_finished(server: BatchServer, send: Send, finish: Finish, end: str) -> None:
    server.plans = [Plan(end, 0.6)]
    send(questions(10))
    found = rows(finish(questions(10)))
    assert {row.status for row in found.values()} == {"scored"}
    assert sorted(row.attempt for row in found.values()) == [1] * 6 + [2] * 4
    assert all(len(runs) == 1 for runs in server.charges.values())


@pytest.mark.parametrize("end", ["expired", "cancelled"])
def test_what_never_finishes_has_the_status_of_its_end(server: BatchServer, send: Send, finish: Finish, end: str) -> None:
    server.plans = [Plan(end, 0.5), Plan(end, 0.0)]
    send(questions(4))
    found = rows(finish(questions(4), attempts=2))
    assert [row.status for row in found.values()] == ["scored", "scored", end, end]
    assert [row.cost_usd > 0 for row in found.values()] == [True, True, False, False]


def test_a_status_of_another_server_counts_as_in_flight_and_is_reported(
    server: BatchServer, send: Send, finish: Finish, ledger: Ledger, client: OpenAI
) -> None:
    server.plans = [Plan("scheduling")]
    send(questions(2))
    assert any("'scheduling'" in warning for warning in poll(ledger, client).warnings)
    assert len(rows(finish(questions(2)))) == 2 and len(server.created) == 1


@pytest.fixture
def moment(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Lets seconds go by on the clock that looks are counted by."""
    offset = [0.0]
    now = time.time
    monkeypatch.setattr("relseek_resources.judges.batches.time.time", lambda: now() + offset[0])

    def later(seconds: float) -> None:
        offset[0] += seconds

    return later


def test_a_batch_is_lost_after_looks_minutes_apart_and_then_asked_again_with_a_warning(
    server: BatchServer, send: Send, finish: Finish, ledger: Ledger, client: OpenAI, moment: Callable[[float], None]
) -> None:
    server.looks = 10
    gone, there = send(questions(2), split=Split(requests=1)).batches
    server.forget(str(gone.batch_id))
    for _ in range(5):
        assert poll(ledger, client).lost == (), "five looks within a minute are one"
    moment(MISSES_APART)
    assert poll(ledger, client).lost == ()
    moment(MISSES_APART)
    third = poll(ledger, client)
    assert [batch.number for batch in third.lost] == [gone.number]
    assert any("not known to the provider any more: its 1 requests are asked again" in warning for warning in third.warnings)
    server.looks = 1
    found = rows(finish(questions(2)))
    assert [(row.status, row.attempt) for row in found.values()] == [("scored", 2), ("scored", 1)]
    assert there.batch_id in server.batches


def test_a_look_that_finds_a_batch_again_begins_the_count_anew(
    server: BatchServer, send: Send, ledger: Ledger, client: OpenAI, moment: Callable[[float], None]
) -> None:
    server.looks = 20
    gone = str(send(questions(2), split=Split(requests=1)).batches[0].batch_id)
    for _ in range(3):
        server.forget(gone)
        for _ in range(2):
            assert poll(ledger, client).lost == ()
            moment(MISSES_APART)
        server.remember(gone)
        poll(ledger, client)
    assert len(server.created) == 2


def test_a_lost_batch_that_turns_up_before_it_is_settled_is_in_flight_again_and_is_not_paid_twice(
    server: BatchServer, send: Send, finish: Finish, ledger: Ledger, client: OpenAI, moment: Callable[[float], None]
) -> None:
    server.looks = 10
    gone = str(send(questions(2), split=Split(requests=1)).batches[0].batch_id)
    server.forget(gone)
    for _ in range(3):
        poll(ledger, client)
        moment(MISSES_APART)
    assert ledger.batches()[0].status == "lost"
    server.remember(gone)
    assert gone in [batch.batch_id for batch in poll(ledger, client).batches]
    server.looks = 1
    assert {row.attempt for row in rows(finish(questions(2))).values()} == {1}
    assert all(len(runs) == 1 for runs in server.charges.values())


def test_another_accounts_key_loses_nothing_and_says_so(
    server: BatchServer, send: Send, finish: Finish, ledger: Ledger, client: OpenAI, moment: Callable[[float], None]
) -> None:
    send(questions(4), split=Split(requests=2))
    other = client.with_options(api_key="another account's")
    for _ in range(5):
        with pytest.raises(BatchError, match="knows none of 2 batches in flight.*not the key that they were sent with"):
            poll(ledger, other)
        moment(MISSES_APART)
    # with something of the other account's own in flight, a look finds that, and still says nothing of these
    submit(ledger, other, "another group", questions(2, start=50))
    server.looks = 20
    for _ in range(5):
        looked = poll(ledger, other)
        assert looked.lost == () and any("another account's" in warning for warning in looked.warnings)
        moment(MISSES_APART)
    server.looks = 1
    for _ in range(3):
        with contextlib.suppress(BatchError):
            poll(ledger, client)
    assert {row.attempt for row in rows(settle(ledger, client, GROUP, questions(4), accept, 3)).values()} == {1}
    assert all(len(runs) == 1 for runs in server.charges.values())


def test_what_an_account_has_forgotten_altogether_is_given_up_by_a_person(
    server: BatchServer, send: Send, finish: Finish, ledger: Ledger, client: OpenAI
) -> None:
    gone = str(send(questions(2)).batches[0].batch_id)
    server.forget(gone)
    with pytest.raises(BatchError, match=f"if the provider has forgotten them for good, cancel {GROUP} and submit again"):
        poll(ledger, client)
    assert [batch.status for batch in cancel(ledger, client, GROUP)] == ["lost"]
    send(questions(2))
    assert {(row.status, row.attempt) for row in rows(finish(questions(2))).values()} == {("scored", 2)}


def test_a_ledger_speaks_to_no_other_endpoint(server: BatchServer, send: Send, finish: Finish, ledger: Ledger) -> None:
    send(questions(2))
    with BatchServer() as elsewhere:
        client = OpenAI(base_url=elsewhere.base_url, api_key="none")
        for speak in (
            lambda: poll(ledger, client),
            lambda: submit(ledger, client, "another group", questions(1, start=9)),
            lambda: settle(ledger, client, GROUP, questions(2), accept, 3),
            lambda: cancel(ledger, client, GROUP),
        ):
            with pytest.raises(BatchError, match=f"holds batches of {server.base_url}, and the endpoint asked now is {elsewhere.base_url}"):
                speak()
        assert elsewhere.calls == []
    assert {row.attempt for row in rows(finish(questions(2))).values()} == {1}


def test_an_endpoint_where_nothing_could_be_created_binds_nobody(server: BatchServer, send: Send, ledger: Ledger, finish: Finish) -> None:
    with BatchServer() as elsewhere:
        elsewhere.faults = [Fault("500", "POST /v1/files", count=99)]
        with pytest.raises(BatchError, match="no answer"):
            submit(ledger, OpenAI(base_url=elsewhere.base_url, api_key="none"), GROUP, questions(2))
    send(questions(2))
    assert len(rows(finish(questions(2)))) == 2


def test_a_forgotten_input_file_is_uploaded_again_but_not_for_ever(server: BatchServer, send: Send, finish: Finish, ledger: Ledger) -> None:
    server.faults = [Fault(FORGOTTEN, "POST /v1/batches")]
    send(questions(3))
    assert len(rows(finish(questions(3)))) == 3 and len(server.created) == 1
    server.faults = [Fault(FORGOTTEN, "POST /v1/batches", count=99)]
    server.calls.clear()
    with pytest.raises(BatchError, match="No such File object"):
        send(questions(5))
    assert server.calls.count("POST /v1/batches") == 2
    assert ledger.batches()[-1].status == "written"
    server.faults = []
    send(questions(5))
    assert len(rows(finish(questions(5)))) == 5 and all(len(runs) == 1 for runs in server.charges.values())


def test_a_failed_validation_blames_its_lines_and_asks_the_others_anew(server: BatchServer, send: Send, finish: Finish) -> None:
    bad = Request("r-bad", json.dumps({"model": "m", "messages": []}))
    asked = [*questions(3), bad, *questions(3, start=3)]
    send(asked)
    found = rows(finish(asked, attempts=1))
    assert found["r-bad"].status == "failed" and "Line 4" in str(found["r-bad"].error)
    assert {row.status for name, row in found.items() if name != "r-bad"} == {"scored"}
    assert list(found) == names(asked)


@pytest.mark.parametrize(
    ("plan", "said"),
    [
        (Plan("failed", blamed=(2, 2)), "This line is malformed: fault 1.; This line is malformed: fault 2."),
        (Plan("failed", blamed=(2,), general=True), "This line is malformed: fault 1."),
    ],
    ids=["two errors of one line", "one of a line and one of the file"],
)
def test_one_bad_line_fails_alone_whatever_else_validation_says(server: BatchServer, send: Send, finish: Finish, plan: Plan, said: str) -> None:
    server.plans = [plan]
    asked = questions(5)
    send(asked)
    found = rows(finish(asked, attempts=1))
    assert [row.status for row in found.values()] == ["scored", "failed", "scored", "scored", "scored"]
    assert found[asked[1].custom_id].error == said and len(server.created) == 2


def test_a_provider_that_names_one_line_at_a_time_is_not_asked_for_ever(server: BatchServer, send: Send, finish: Finish) -> None:
    """As where no line can be answered, an unknown model say, and validation stops at its first error."""
    server.plans = [Plan("failed", blamed=(1,)) for _ in range(30)]
    asked = questions(12)
    send(asked)
    found = rows(finish(asked, attempts=2))
    assert {row.status for row in found.values()} == {"failed"} and {row.attempt for row in found.values()} == {1, 2}
    assert len(server.created) == batch_results.RELEASES + 2


def test_a_failed_validation_without_a_line_is_shown_and_tried_again(
    server: BatchServer, send: Send, finish: Finish, ledger: Ledger, client: OpenAI
) -> None:
    server.plans = [Plan("failed"), Plan("failed")]
    send(questions(2))
    assert any("could not be validated" in warning for warning in poll(ledger, client).warnings)
    assert "could not be validated" in describe(ledger)[0]
    found = rows(finish(questions(2), attempts=2))
    assert {(row.status, row.attempt) for row in found.values()} == {("failed", 2)}
    assert rows(finish(questions(2), attempts=3))[names(questions(1))[0]].status == "scored"  # more attempts go on from there


def test_a_full_account_holds_the_batch_and_uses_no_attempt(
    server: BatchServer, send: Send, finish: Finish, ledger: Ledger, client: OpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.plans = [Plan("no_room"), Plan("no_room")]
    send(questions(2))
    assert "no room" in poll(ledger, client).warnings[0]
    held = ledger.batches()[0]
    assert held.status == "held" and held.held_until is not None and "Enqueued token limit" in describe(ledger)[0]
    poll(ledger, client)
    assert len(server.created) == 1  # its time has not come
    monkeypatch.setattr("relseek_resources.judges.batch_sending.FIRST_HOLD", 0.0)
    ledger.update_batch(held.number, held_until=0.0)
    server.calls.clear()
    poll(ledger, client, seconds=5.0)
    assert server.calls == [], "who may not wait creates nothing"
    found = rows(finish(questions(2), attempts=1))
    assert {(row.status, row.attempt) for row in found.values()} == {("scored", 1)}
    assert len(server.created) == 3 and len(server.files) == 2  # one upload, one output


def test_a_second_creation_of_the_same_file_is_cancelled(server: BatchServer, send: Send, ledger: Ledger, client: OpenAI) -> None:
    sent = send(questions(2)).batches[0]
    double = client.batches.create(input_file_id=str(sent.input_file_id), endpoint="/v1/chat/completions", completion_window="24h")
    looked = poll(ledger, client)
    assert any(double.id in warning and "second" in warning for warning in looked.warnings)
    assert server.batches[double.id].shown["status"] == "cancelling"
    assert server.batches[str(sent.batch_id)].shown["status"] == "in_progress"


# --- lines --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fate", ["prose", "refusal", "length", "http_500", "http_429", "error", "silent", "torn", "nameless"])
def test_what_is_no_score_is_asked_again_alone(server: BatchServer, send: Send, finish: Finish, fate: str) -> None:
    asked = questions(6)
    hit = asked[2].custom_id
    server.fates[hit] = [fate]
    send(asked)
    settled = finish(asked)
    found = rows(settled)
    assert list(found) == names(asked)
    assert (found[hit].status, found[hit].attempt) == ("scored", 2)
    assert [row.attempt for name, row in found.items() if name != hit] == [1] * 5
    assert (settled.strangers, settled.unreadable_lines) == (int(fate == "nameless"), int(fate == "torn"))
    paid = [run for run in server.charges[hit] if run.delivered]
    assert found[hit].prompt_tokens == sum(run.tokens for run in paid)
    assert found[hit].cost_usd == pytest.approx(sum(price(run.tokens, 5) for run in paid))
    second = json.loads(server.files[str(settled.batches[-1].input_file_id)].path.read_text())
    assert second["custom_id"] == hit


@pytest.mark.parametrize(("text", "status"), [('{"score": 1}  ', "scored"), ("1", "cut_off"), ('"10"', "cut_off")])
def test_a_text_that_was_cut_off_counts_only_as_a_whole_object(server: BatchServer, send: Send, finish: Finish, text: str, status: str) -> None:
    """Half of an answer is what the server cuts off: `1` may have been going to be `10`."""
    server.answer = lambda custom_id, body: text * 2 if text[0] != "{" else text + " " * len(text)
    asked = questions(1)
    server.fates[asked[0].custom_id] = ["length"]
    send(asked)
    (row,) = rows(finish(asked, attempts=1)).values()
    assert (row.status, row.raw) == (status, text)


@pytest.mark.parametrize(
    ("fate", "status", "raw", "error"),
    [
        ("prose", "unreadable", "I would rather describe it.", None),
        ("refusal", "refused", "I cannot judge that.", None),
        ("length", "cut_off", '{"scor', None),
        ("http_500", "failed", None, "HTTP 500 it failed with 500"),
        ("error", "failed", None, "internal_error: The request failed."),
        ("silent", "missing", None, "the batch is completed and holds no line for it"),
        ("torn", "missing", None, "the batch is completed and holds no line for it"),
    ],
)
def test_a_request_without_a_score_ends_as_a_row_with_its_status(
    server: BatchServer, send: Send, finish: Finish, fate: str, status: str, raw: str | None, error: str | None
) -> None:
    asked = questions(3)
    server.fates[asked[1].custom_id] = [fate] * 2
    send(asked)
    row = rows(finish(asked, attempts=2))[asked[1].custom_id]
    assert (row.status, row.error, row.attempt) == (status, error, 2)
    assert row.raw == raw or (raw is not None and str(row.raw).startswith(raw))


def test_a_malformed_request_is_not_asked_again(server: BatchServer, send: Send, finish: Finish) -> None:
    server.fates[questions(1)[0].custom_id] = ["http_400"]
    send(questions(2))
    found = list(rows(finish(questions(2))).values())
    assert (found[0].status, found[0].attempt, found[0].error) == ("failed", 1, "HTTP 400 it failed with 400")
    assert len(server.created) == 1


def test_a_completed_batch_may_have_errors_alone(server: BatchServer, send: Send, finish: Finish) -> None:
    server.fates.update({name: ["http_500"] for name in names(questions(4))})
    send(questions(4))
    assert {(row.status, row.attempt) for row in rows(finish(questions(4))).values()} == {("scored", 2)}


def test_strangers_and_duplicates_are_counted_and_the_first_line_counts(server: BatchServer, send: Send, finish: Finish) -> None:
    asked = questions(4)
    server.fates[asked[0].custom_id] = ["twice"]
    server.strangers = ["somebody else's", asked[1].custom_id]
    send(asked)
    settled = finish(asked)
    found = rows(settled)
    assert (settled.strangers, settled.duplicates) == (1, 2)
    assert found[asked[1].custom_id].raw == server.answer(asked[1].custom_id, {})
    assert any("somebody else's" in warning for warning in settled.warnings)
    assert any("2 lines answer a request once more, 1 of them otherwise" in warning for warning in settled.warnings)
    again = finish(asked)
    assert (again.strangers, again.duplicates) == (1, 2)  # counted once, however often it is settled


def test_an_output_file_that_is_gone_is_asked_again_with_a_warning(server: BatchServer, send: Send, finish: Finish, ledger: Ledger) -> None:
    send(questions(3))
    server.looks = 1
    for _ in range(3):
        poll(ledger, OpenAI(base_url=server.base_url, api_key="none"))
    del server.files[str(ledger.batches()[0].output_file_id)]
    settled = finish(questions(3))
    assert {(row.status, row.attempt) for row in rows(settled).values()} == {("scored", 2)}
    assert any("is gone" in warning for warning in settled.warnings)


# --- cancelling and telling ---------------------------------------------------------------------------------------------


def test_cancelling_keeps_what_is_done_and_asks_nothing_until_it_is_submitted_again(
    server: BatchServer, send: Send, finish: Finish, ledger: Ledger, client: OpenAI
) -> None:
    send(questions(10))
    poll(ledger, client)
    assert [batch.status for batch in cancel(ledger, client, GROUP)] == ["cancelling"]
    found = rows(finish(questions(10)))
    assert [row.status for row in found.values()] == ["scored"] * 5 + ["cancelled"] * 5
    assert len(server.created) == 1
    send(questions(10))
    assert {row.status for row in rows(finish(questions(10))).values()} == {"scored"}
    assert all(len(runs) == 1 for runs in server.charges.values())


def test_cancelling_what_was_not_sent_yet_and_what_has_ended(server: BatchServer, send: Send, finish: Finish, ledger: Ledger, client: OpenAI) -> None:
    server.faults = [Fault("cut_after", "POST /v1/batches"), Fault("500", "GET /v1/batches", count=99)]
    with pytest.raises(BatchError):
        send(questions(2))
    server.faults = []
    assert [batch.status for batch in cancel(ledger, client, GROUP)] == ["cancelling"]  # found, though its creation was never answered
    finish(questions(2))
    assert cancel(ledger, client, GROUP) == []


def test_cancelling_waits_for_a_creation_that_may_still_arrive(
    server: BatchServer, send: Send, ledger: Ledger, client: OpenAI, waits: list[float]
) -> None:
    server.faults = [Fault("500", "POST /v1/batches", count=99), Fault("500", "GET /v1/batches", count=99)]
    with pytest.raises(BatchError):
        send(questions(2))
    server.faults = []
    ledger.update_batch(1, intended=time.time())
    waits.clear()
    assert [batch.status for batch in cancel(ledger, client, GROUP)] == ["cancelled"]
    assert len(waits) == 1 and provider.SETTLING - 1 < waits[0] <= provider.SETTLING


# --- money --------------------------------------------------------------------------------------------------------------


class Broke(ValueError):
    pass


def up_to(budget: float, ledger: Ledger) -> Callable[[float], None]:
    """Allows what is, with all that the ledger may still cost, within a budget."""

    def allow(usd: float) -> None:
        if usd + sum(total.to_come_usd for total in ledger.totals()) > budget:
            raise Broke(usd)

    return allow


def test_what_is_not_allowed_is_not_sent_at_all(server: BatchServer, send: Send, ledger: Ledger) -> None:
    asked = [replace(question, usd=0.25) for question in questions(9)]
    with pytest.raises(Broke, match="2.25"):
        send(asked, split=Split(requests=2), allow=up_to(2.0, ledger))
    assert server.calls == [] and ledger.batches() == [] and not list((ledger.folder / "requests").iterdir())
    assert send(asked[:8], allow=up_to(2.0, ledger)).requests == 8
    with pytest.raises(Broke, match="0.25"):
        send(asked, allow=up_to(2.0, ledger))
    assert len(server.created) == 1


def test_asking_again_has_to_be_allowed_too_and_what_came_back_is_kept(
    server: BatchServer, send: Send, finish: Finish, ledger: Ledger, client: OpenAI
) -> None:
    asked = [replace(question, usd=0.25) for question in questions(4)]
    server.fates[asked[2].custom_id] = ["prose"]
    send(asked)
    for _ in range(3):
        poll(ledger, client)
    with pytest.raises(Broke, match="0.25"):
        settle(ledger, client, GROUP, asked, accept, 3, allow=up_to(0.2, ledger))
    assert len(server.created) == 1 and [batch.collected for batch in ledger.batches()] == [True]
    assert [row.status for row in rows(settle(ledger, client, GROUP, asked, accept, 1)).values()] == ["scored", "scored", "unreadable", "scored"]
    assert settle(ledger, client, GROUP, asked, accept, 3, allow=up_to(0.3, ledger)).resubmitted == 1
    assert rows(finish(asked))[asked[2].custom_id].attempt == 2


def test_what_has_ended_is_collected_though_nobody_wants_it_any_more(server: BatchServer, send: Send, finish: Finish, ledger: Ledger) -> None:
    send(questions(3))
    send(questions(3, start=7))
    finish(questions(3, start=7))
    assert [batch.collected for batch in ledger.batches()] == [True, True]
    (total,) = ledger.totals()
    charged = [run for runs in server.charges.values() for run in runs]
    assert (total.prompt_tokens, total.completion_tokens, total.to_come_usd) == (sum(run.tokens for run in charged), 5 * len(charged), 0.0)


@pytest.mark.parametrize(
    ("fate", "end", "unaccounted"),
    [
        ("good", "completed", 0),
        ("prose", "completed", 0),
        ("http_500", "completed", 0),
        ("good", "expired", 0),
        ("good", "cancelled", 0),
        ("good", "failed", 0),
        ("torn", "completed", 1),
        ("nameless", "completed", 1),
        ("silent", "completed", 1),
        ("torn", "expired", 1),
        ("good", "lost", 4),
        ("good", "gone", 4),
    ],
)
def test_the_ledger_knows_of_all_that_the_provider_charged(
    server: BatchServer, ledger: Ledger, send: Send, client: OpenAI, fate: str, end: str, unaccounted: int
) -> None:
    """The bill is in the server's books, the answers that we never got included; a request's estimate is what it costs."""

    def question(number: int) -> Request:
        body = {"model": "m", "messages": [{"role": "user", "content": "why " * 40 * number}]}
        return Request(f"r{number}", json.dumps(body), usd=price(len(json.dumps(body)) // 4, 5))

    asked = [question(number) for number in (3, 1, 2, 0)]
    server.fates[asked[0].custom_id] = [fate]  # the longest
    server.plans = [Plan("completed" if end == "gone" else end, 0.5)]
    send(asked)
    for _ in range(4):
        with contextlib.suppress(BatchError):
            poll(ledger, client)
    if end == "lost":
        cancel(ledger, client, GROUP)
    if end == "gone":
        del server.files[str(ledger.batches()[0].output_file_id)]
    settled = settle(ledger, client, GROUP, asked, accept, 1)
    assert settled.complete
    (total,) = ledger.totals()
    charged = sum(price(run.tokens, 5) for runs in server.charges.values() for run in runs)
    known = price(total.prompt_tokens, total.completion_tokens) + total.to_come_usd
    assert known + total.unaccounted_usd >= charged - 1e-12
    estimates = sum(request.usd for request in asked)
    if unaccounted == 1:
        assert asked[0].usd <= total.unaccounted_usd < estimates
        assert any("1 requests may have been charged" in warning for warning in settled.warnings)
    else:
        assert total.unaccounted_usd == pytest.approx(estimates if unaccounted else 0.0)


def test_answers_without_usage_count_by_their_estimate(server: BatchServer, ledger: Ledger, send: Send, finish: Finish) -> None:
    server.dialect = {"no_usage", "no_counts"}
    asked = [replace(question, usd=0.25) for question in questions(4)]
    send(asked)
    assert {row.status for row in rows(finish(asked)).values()} == {"scored"}
    assert [total.unaccounted_usd for total in ledger.totals()] == [1.0]


def test_people_read_what_is_in_flight(send: Send, ledger: Ledger, client: OpenAI) -> None:
    send([replace(question, usd=0.25) for question in questions(4)])
    poll(ledger, client)
    (line,) = describe(ledger, GROUP)
    assert line.startswith(f"1. {GROUP} · in_progress for 0 min (window 24h) · 0 of 4 requests answered · attempt 1 · about $1.00 · batch_")
    assert describe(ledger, "another") == []


def test_a_provider_that_echoes_little_is_understood(server: BatchServer, send: Send, finish: Finish) -> None:
    server.dialect = {"no_metadata", "no_counts", "window", "no_file_list"}
    send(questions(5))
    assert {row.status for row in rows(finish(questions(5))).values()} == {"scored"}


def test_a_result_line_is_read_whatever_it_holds(tmp_path: Path) -> None:
    from relseek_resources.judges.batch_files import read_result

    def read(content: Any) -> Any:
        return read_result(json.dumps(content).encode())

    assert read([1]) is None and read_result(b"\xff\n") is None and read_result(b'{"custom_id": ') is None
    body = {"choices": [{"message": {"content": "7 \ud800"}}], "usage": {"prompt_tokens": 10**30, "completion_tokens": True}, "model": 3}
    name, reply = read({"custom_id": "a", "response": {"status_code": 200, "body": body}, "error": None})
    assert (name, reply.outcome, reply.raw, reply.prompt_tokens, reply.completion_tokens, reply.model) == ("a", "answered", "7 ?", 0, 0, None)
    for body in ({}, {"choices": []}, {"choices": [None]}, {"choices": [{"message": {"content": ["x"]}}]}, {"choices": "x"}):
        assert read({"custom_id": "a", "response": {"status_code": 200, "body": body}})[1].outcome == "unreadable"
    completion = {"choices": [{"message": {"content": "7"}}], "usage": {"prompt_tokens": 3, "completion_tokens": 1}, "model": "m"}
    (_, as_text), (_, as_object) = (
        read({"custom_id": "a", "response": {"status_code": 200, "body": body}}) for body in (json.dumps(completion), completion)
    )
    assert as_text == as_object and (as_text.raw, as_text.prompt_tokens) == ("7", 3), "OGX writes the body as JSON text"
    assert read({"custom_id": "a", "response": {"status_code": 400, "body": json.dumps({"error": {"message": "no"}})}})[1].error == "HTTP 400 no"
    assert read({"custom_id": "a", "response": {"status_code": 200, "body": "half of {"}})[1].outcome == "failed"
    for line in (
        {"custom_id": "a"},
        {"custom_id": "a", "response": None, "error": "plain"},
        {"custom_id": "a", "response": "x", "error": {"odd": 1}},
    ):
        assert read(line)[1].outcome == "failed"
    filtered = {"status_code": 400, "body": {"error": {"code": "content_filter", "message": "no"}}}
    assert read({"custom_id": "a", "response": filtered, "error": None})[1].outcome == "refused"
    assert read({"custom_id": 7, "response": None, "error": {"code": "batch_expired"}}) == (None, read({"error": {"code": "batch_expired"}})[1])
