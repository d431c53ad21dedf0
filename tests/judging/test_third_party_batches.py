"""Batches on servers that other people wrote, on loopback: first by the official client alone, then by our engine.

They show what a fake of our own cannot: that the exchange of files, batches and results works with somebody else's reading of the protocol, and where
dialects differ. Failures on command belong to the tests' own server.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import openai
import pytest

from relseek_resources.judges.answers import Answer, Reading, Request, read_score
from relseek_resources.judges.batches import BatchError, Settled, cancel, poll, settle, submit
from relseek_resources.judges.ledger import Ledger
from relseek_resources.models.loading import cache_folder
from tests.judging import third_party
from tests.judging.third_party import FAILS, PROSE, WAITS, ChatBackend, score_of

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

ENDED = {"completed", "failed", "expired", "cancelled"}
ENDPOINT = "/v1/chat/completions"
QUICK = 6  # requests that are answered at once in a batch whose others wait
MANY = 120  # more than a server asks the backend at the same time


@dataclass
class Server:
    """A batch server with the backend that answers for it; `expiring` has a batch of each way of sending whose window is a minute."""

    client: openai.OpenAI
    backend: ChatBackend
    model: str
    expiring: dict[str, Any] = field(default_factory=dict)

    def requests(self, name: str, texts: Iterable[str]) -> list[Request]:
        return [Request(f"{name}-{number}", json.dumps(self.body(text))) for number, text in enumerate(texts)]

    def body(self, text: str) -> dict[str, Any]:
        return {"model": self.model, "temperature": 0, "max_tokens": 10, "messages": [{"role": "user", "content": text}]}

    def send(self, requests: Iterable[Request], window: str = "24h") -> Any:
        """Upload a file of requests and create its batch, by the official client."""
        lines = [
            json.dumps({"custom_id": request.custom_id, "method": "POST", "url": ENDPOINT, "body": json.loads(request.body)}) for request in requests
        ]
        file = self.client.files.create(file=("requests.jsonl", "\n".join(lines).encode()), purpose="batch")
        return self.client.batches.create(input_file_id=file.id, endpoint=ENDPOINT, completion_window=window, metadata={"sent_by": "client"})  # type: ignore[arg-type]

    def batch(self, batch: str, reached: Callable[[Any], bool] = lambda batch: batch.status in ENDED) -> Any:
        """The batch once it has `reached` what is waited for."""
        return until(lambda: self.client.batches.retrieve(batch), reached)

    def lines(self, file: str | None) -> list[dict[str, Any]]:
        return [] if file is None else [json.loads(line) for line in self.client.files.content(file).text.splitlines()]

    def asked(self, requests: Iterable[Request]) -> Counter[int]:
        """How many of `requests` the backend was asked for how many times."""
        times = Counter(self.backend.asked)
        return Counter(times[text_of(request)] for request in requests)


def text_of(request: Request) -> str:
    return str(json.loads(request.body)["messages"][-1]["content"])


def until(look: Callable[[], Any], reached: Callable[[Any], bool], seconds: float = 120.0) -> Any:
    deadline = time.monotonic() + seconds
    while not reached(found := look()):
        assert time.monotonic() < deadline, f"after {seconds:.0f} s there is still {found}"
        time.sleep(0.2)
    return found


def texts(name: str, count: int, mark: Callable[[int], str] = lambda number: "") -> list[str]:
    return [f"{name}: the reply numbered {number} {mark(number)}".strip() for number in range(count)]


def waiting(gate: str) -> Callable[[int], str]:
    """All but the first requests wait at `gate`."""
    return lambda number: "" if number < QUICK else WAITS.format(gate)


def accept(custom_id: str, raw: str) -> Reading:
    return read_score(raw)


@pytest.fixture(scope="module")
def backend() -> Iterator[ChatBackend]:
    with third_party.chat_backend() as served:
        yield served


@pytest.fixture(scope="module")
def ledgers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Ledger]]:
    """Ledgers by name, closed at the end."""
    opened: dict[str, Ledger] = {}
    folder = tmp_path_factory.mktemp("ledgers")

    def ledger(name: str) -> Ledger:
        return opened.setdefault(name, Ledger(folder / f"{name}.sqlite"))

    yield ledger
    for one in opened.values():
        one.close()


@pytest.fixture(scope="module")
def aibrix(backend: ChatBackend, ledgers: Callable[[str], Ledger], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """AIBrix with two batches that expire in a minute: they are sent first, so that the other tests use the time."""
    try:
        with third_party.aibrix(tmp_path_factory.mktemp("aibrix"), cache_folder(), backend.address) as address:
            server = Server(openai.OpenAI(base_url=address, api_key="none", max_retries=0), backend, third_party.MODEL)
            server.expiring["client"] = server.send(server.requests("expiring", texts("expiring by client", MANY, waiting("expiry"))), window="1m")
            requests = server.requests("ours-expiring", texts("expiring by us", MANY, waiting("expiry")))
            submit(ledgers("expiring"), server.client, "expiring", requests, window="1m")
            server.expiring["ours"] = requests
            yield server
            backend.gates["expiry"].set()
    except third_party.Unavailable as reason:
        pytest.skip(str(reason))


@pytest.fixture(scope="module")
def ogx(backend: ChatBackend, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    try:
        with third_party.ogx(tmp_path_factory.mktemp("ogx"), cache_folder(), backend.address) as address:
            yield Server(openai.OpenAI(base_url=address, api_key="none", max_retries=0), backend, third_party.OGX_MODEL)
    except third_party.Unavailable as reason:
        pytest.skip(str(reason))


@pytest.fixture(params=["aibrix", "ogx"])
def server(request: pytest.FixtureRequest) -> Server:
    found: Server = request.getfixturevalue(request.param)
    return found


def settled(ledger: Ledger, server: Server, group: str, requests: list[Request], attempts: int = 2) -> tuple[Settled, list[Answer]]:
    """Look and settle, as the sensor and the asset do in turn, until everything is answered; what was said last, and the rows."""
    deadline = time.monotonic() + 120
    while True:
        poll(ledger, server.client)
        found = settle(ledger, server.client, group, requests, accept, attempts)
        if found.complete:
            return found, list(found.answers)
        assert time.monotonic() < deadline, ledger.batches(group)
        time.sleep(0.2)


# the official client alone


def test_client_gets_results_and_errors_of_a_batch(server: Server) -> None:
    name = f"client on {server.model}"
    requests = server.requests("plain", texts(name, 8, lambda number: FAILS if number == 3 else ""))
    created = server.send(requests)
    ended = server.batch(created.id)
    assert ended.status == "completed" and ended.metadata == {"sent_by": "client"}
    assert (ended.request_counts.total, ended.request_counts.completed, ended.request_counts.failed) == (8, 7, 1)
    bodies = {line["custom_id"]: line["response"]["body"] for line in server.lines(ended.output_file_id)}
    said = {custom_id: body if isinstance(body, dict) else json.loads(body) for custom_id, body in bodies.items()}
    assert {custom_id: json.loads(body["choices"][0]["message"]["content"])["score"] for custom_id, body in said.items()} == {
        request.custom_id: score_of(text_of(request)) for request in requests if FAILS not in text_of(request)
    }
    assert [line["custom_id"] for line in server.lines(ended.error_file_id)] == ["plain-3"]


def test_aibrix_writes_the_window_in_its_own_words_and_answers_a_repeated_custom_id_twice(aibrix: Server) -> None:
    requests = aibrix.requests("repeated", texts("repeated", 2))
    ended = aibrix.batch(aibrix.send([*requests, requests[0]]).id)
    assert ended.completion_window == "1d"
    assert Counter(line["custom_id"] for line in aibrix.lines(ended.output_file_id)) == {"repeated-0": 2, "repeated-1": 1}


def test_ogx_writes_the_body_of_a_response_as_text_and_both_files_always(ogx: Server) -> None:
    ended = ogx.batch(ogx.send(ogx.requests("form", texts("form", 1))).id)
    assert isinstance(ogx.lines(ended.output_file_id)[0]["response"]["body"], str)
    assert ended.error_file_id is not None and ogx.lines(ended.error_file_id) == []


def test_cancelled_batch_of_aibrix_keeps_what_was_finished(aibrix: Server) -> None:
    requests = aibrix.requests("cancel", texts("cancelled by client", MANY, waiting("cancel")))
    created = aibrix.send(requests)
    aibrix.batch(created.id, lambda batch: batch.request_counts is not None and batch.request_counts.completed == QUICK)
    assert aibrix.client.batches.cancel(created.id).status == "cancelling"
    aibrix.backend.gates["cancel"].set()
    ended = aibrix.batch(created.id)
    assert ended.status == "cancelled"
    kept = {line["custom_id"] for line in aibrix.lines(ended.output_file_id)}
    assert {f"cancel-{number}" for number in range(QUICK)} <= kept < {request.custom_id for request in requests}


# our engine


def test_engine_settles_every_request_and_asks_again_alone(server: Server, ledgers: Callable[[str], Ledger]) -> None:
    marks = {2: FAILS, 5: PROSE}
    requests = server.requests("mixed", texts(f"mixed on {server.model}", 12, lambda number: marks.get(number, "")))
    ledger = ledgers(f"mixed-{server.model.replace('/', '-')}")
    sent = submit(ledger, server.client, "mixed", requests)
    assert sent.requests == 12 and len(sent.batches) == 1
    assert submit(ledger, server.client, "mixed", requests).requests == 0
    found, rows = settled(ledger, server, "mixed", requests)
    assert [row.custom_id for row in rows] == [request.custom_id for request in requests]
    assert {number: row.status for number, row in enumerate(rows) if row.status != "scored"} == {2: "failed", 5: "unreadable"}
    for request, row in zip(requests, rows, strict=True):
        if row.status == "scored":
            assert row.raw is not None and read_score(row.raw).score == score_of(text_of(request))
            assert row.model == server.model and row.attempt == 1 and row.prompt_tokens == len(text_of(request).split())
        else:
            assert row.attempt == 2
    assert rows[5].raw == "somewhere around seven" and rows[2].raw is None and rows[2].error
    assert server.asked(requests) == {1: 10, 2: 2}
    assert (found.strangers, found.duplicates, found.unreadable_lines) == (0, 0, 0)


def test_engine_never_sends_one_custom_id_twice(aibrix: Server, ledgers: Callable[[str], Ledger]) -> None:
    requests = aibrix.requests("twice", texts("twice", 3))
    with pytest.raises(BatchError, match="twice-0"):
        submit(ledgers("twice"), aibrix.client, "twice", [*requests, requests[0]])
    assert aibrix.asked(requests) == {0: 3}


def test_batch_that_aibrix_is_scheduling_is_in_flight(aibrix: Server, ledgers: Callable[[str], Ledger]) -> None:
    blocking = [aibrix.send(aibrix.requests("block", texts(f"block {number}", 10, waiting("block")))) for number in range(third_party.AIBRIX_POOL)]
    requests = aibrix.requests("queued", texts("queued", 4))
    ledger = ledgers("queued")
    submit(ledger, aibrix.client, "queued", requests)
    batch_id = ledger.batches("queued")[0].batch_id
    assert aibrix.client.batches.retrieve(str(batch_id)).status == "scheduling"
    polled = poll(ledger, aibrix.client)
    assert [batch.batch_id for batch in polled.batches] == [batch_id] and not polled.ended and not polled.lost
    assert not settle(ledger, aibrix.client, "queued", requests, accept, 2).complete
    aibrix.backend.gates["block"].set()
    _, rows = settled(ledger, aibrix, "queued", requests)
    assert [row.status for row in rows] == ["scored"] * 4
    assert aibrix.asked(requests) == {1: 4}
    assert {aibrix.batch(batch.id).status for batch in blocking} == {"completed"}


def test_engine_keeps_what_was_finished_when_it_cancels(aibrix: Server, ledgers: Callable[[str], Ledger]) -> None:
    requests = aibrix.requests("withdrawn", texts("withdrawn", MANY, waiting("withdrawn")))
    ledger = ledgers("withdrawn")
    sent = submit(ledger, aibrix.client, "withdrawn", requests)
    aibrix.batch(str(sent.batches[0].batch_id), lambda batch: batch.request_counts is not None and batch.request_counts.completed == QUICK)
    cancel(ledger, aibrix.client, "withdrawn")
    aibrix.backend.gates["withdrawn"].set()
    _, rows = settled(ledger, aibrix, "withdrawn", requests)
    statuses = Counter(row.status for row in rows)
    assert set(statuses) == {"scored", "cancelled"} and [row.status for row in rows[:QUICK]] == ["scored"] * QUICK
    assert aibrix.asked(requests) == {1: statuses["scored"], 0: statuses["cancelled"]}


def test_batch_that_ogx_cancels_keeps_nothing_and_every_request_has_a_row(ogx: Server, ledgers: Callable[[str], Ledger]) -> None:
    requests = ogx.requests("withdrawn", texts("withdrawn at OGX", 20, waiting("ogx")))
    ledger = ledgers("withdrawn-ogx")
    sent = submit(ledger, ogx.client, "withdrawn", requests)
    ogx.batch(str(sent.batches[0].batch_id), lambda batch: batch.request_counts is not None and batch.request_counts.completed > 0)
    cancel(ledger, ogx.client, "withdrawn")
    ogx.backend.gates["ogx"].set()
    _, rows = settled(ledger, ogx, "withdrawn", requests)
    assert [row.custom_id for row in rows] == [request.custom_id for request in requests]
    assert {row.status for row in rows} == {"cancelled"}


# last, when the minute is nearly over


def test_expired_batch_keeps_what_was_finished(aibrix: Server) -> None:
    created = aibrix.expiring["client"]
    assert created.completion_window == "1min" and created.expires_at - created.created_at == 60
    time.sleep(max(0.0, created.expires_at + 3 - time.time()))
    aibrix.backend.gates["expiry"].set()
    ended = aibrix.batch(created.id)
    assert ended.status == "expired" and ended.expired_at >= ended.expires_at
    finished = {line["custom_id"] for line in aibrix.lines(ended.output_file_id)}
    assert {f"expiring-{number}" for number in range(QUICK)} <= finished
    assert len(finished) == ended.request_counts.completed < MANY == ended.request_counts.total


def test_engine_asks_for_the_rest_of_an_expired_batch(aibrix: Server, ledgers: Callable[[str], Ledger]) -> None:
    requests, ledger = aibrix.expiring["ours"], ledgers("expiring")
    first = ledger.batches("expiring")[0]
    ended = aibrix.batch(str(first.batch_id))
    assert ended.status == "expired"
    _, rows = settled(ledger, aibrix, "expiring", requests)
    assert [row.status for row in rows] == ["scored"] * MANY
    attempts = Counter(row.attempt for row in rows)
    assert attempts == {1: ended.request_counts.completed, 2: MANY - ended.request_counts.completed}
    assert aibrix.asked(requests) == {1: MANY}
    second = [batch for batch in ledger.batches("expiring") if batch.attempt == 2]
    assert sum(batch.requests for batch in second) == attempts[2]
