"""Steered replies from a server that steers: those of the model with the vector loaded here, of this vector or of none."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from relseek_assets.prompting import authors, served
from relseek_assets.prompting.authors import AuthorError, ModelWriter, Replied
from relseek_assets.settings import Price, SteeredEndpoint
from relseek_resources.judges.asking import AnswerJournal
from relseek_resources.models.sampling import Sampling
from relseek_resources.serving.guard import Settings
from relseek_resources.storage import file_sha256
from tests.judging.chat_server import Says
from tests.judging.chat_server import serving as chatting
from tests.serving.embedded import EmbeddedServer, serving

KEY = "STEERED_KEY"
SAMPLING = Sampling(temperature=0, max_new_tokens=8)
CONVERSATIONS = [[{"role": "system", "content": "Plain."}, {"role": "user", "content": text}] for text in ("Hello", "Hello", "Goodbye", "Hello")]
SOME = served.ServedVector("warm", "1" * 64, 1)
SEEDS, DOSES = [2**62 + 1, 2, 3, 4], [2.0, -2.0, 2.0, 0.0]


@pytest.fixture
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("served")


@pytest.fixture
def server(folder: Path, tiny_llama) -> Iterator[EmbeddedServer]:  # type: ignore[no-untyped-def]
    with serving(tiny_llama, folder, Settings(rate=0, keys=("secret",))) as running:
        yield running


@pytest.fixture(autouse=True)
def _key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY, "secret")


def vector_of(folder: Path, name: str = "warm") -> served.ServedVector:
    return served.ServedVector(name, file_sha256(folder / f"{name}.safetensors"), 1)


def writer_of(journal: AnswerJournal, url: str, vector: served.ServedVector, sampling: Sampling = SAMPLING) -> served.ServedWriter:
    endpoint = SteeredEndpoint(base_url=f"{url}/v1", model="tiny", key_variable=KEY, concurrency=3, attempts=1)
    return served.ServedWriter(served.author_of(endpoint), sampling, journal, "mine", lambda: 0.0, vector=vector)


def texts(replies: list[Replied]) -> list[tuple[str | None, bool | None, str]]:
    return [(reply.text, reply.finished, reply.status) for reply in replies]


@pytest.mark.parametrize("sampling", [SAMPLING, Sampling(temperature=1.0, top_p=0.9, max_new_tokens=8)], ids=["greedy", "drawn"])
def test_replies_are_those_of_the_model_steered_here(tmp_path: Path, folder: Path, server: EmbeddedServer, tiny_llama, sampling: Sampling) -> None:  # type: ignore[no-untyped-def]
    here = ModelWriter(tiny_llama, sampling, 4, server.vectors["warm"][1], 1)(CONVERSATIONS, SEEDS, DOSES)
    with AnswerJournal(tmp_path / "answers.jsonl") as journal:
        there = writer_of(journal, server.url, vector_of(folder), sampling)(CONVERSATIONS, SEEDS, DOSES)
    assert texts(there) == texts(here)
    assert len({reply.text for reply in (there[0], there[1], there[3])}) == 3, "each dose is felt"
    assert {reply.model for reply in there} == {"tiny"} and not any(reply.cost_usd for reply in there)


def test_what_the_journal_holds_is_not_asked_again(tmp_path: Path, folder: Path, server: EmbeddedServer) -> None:
    with AnswerJournal(tmp_path / "answers.jsonl") as journal:
        first = writer_of(journal, server.url, vector_of(folder))(CONVERSATIONS, SEEDS, DOSES)
    with AnswerJournal(tmp_path / "answers.jsonl") as journal:
        gone = writer_of(journal, "http://127.0.0.1:9", vector_of(folder))
        assert gone(CONVERSATIONS, SEEDS, DOSES) == first
        with pytest.raises(AuthorError, match=r"\[prompting.steered_endpoint\]: http://127.0.0.1:9/v1 does not answer"):
            gone(CONVERSATIONS[:1], SEEDS[:1], [1.0])
        assert len(journal.answers) == len(CONVERSATIONS)


def test_a_server_with_another_vector_is_refused_before_anything_is_asked(tmp_path: Path, folder: Path, server: EmbeddedServer) -> None:
    mine = vector_of(folder)
    with AnswerJournal(tmp_path / "answers.jsonl") as journal:
        for vector, dose, fault in (
            (replace(mine, sha256="0" * 64), 1.0, "is another vector: its sha256 is"),
            (replace(mine, name="hot"), 1.0, "offers no vector 'hot'; there is many, warm"),
            (mine, 21.0, "steers by 20 at most, and a dose of 21 is asked for"),
        ):
            with pytest.raises(AuthorError, match=fault) as raised:
                writer_of(journal, server.url, vector)(CONVERSATIONS[:1], [1], [dose])
            assert str(raised.value).startswith("[prompting.steered_endpoint]: ")
        assert journal.answers == {}


def test_every_request_carries_the_hash_so_that_a_vector_changed_under_way_answers_nothing(
    tmp_path: Path, folder: Path, server: EmbeddedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(served, "check_offer", lambda *offered: None)
    other = replace(vector_of(folder), sha256="0" * 64)
    with AnswerJournal(tmp_path / "answers.jsonl") as journal:
        with pytest.raises(AuthorError, match=r"\[prompting.steered_endpoint\]: the server refused to steer 4 of 4 replies: .* was asked for"):
            writer_of(journal, server.url, other)(CONVERSATIONS, SEEDS, DOSES)
        assert {answer.raw for answer in journal.answers.values()} == {None}, "dose 0 among them"
        assert len(writer_of(journal, server.url, vector_of(folder))(CONVERSATIONS, SEEDS, DOSES)) == 4


def test_an_endpoint_that_does_not_steer_is_not_asked(tmp_path: Path) -> None:
    with chatting(lambda text, nth: Says("Unsteered.")) as plain, AnswerJournal(tmp_path / "answers.jsonl") as journal:
        with pytest.raises(AuthorError, match=r"\[prompting.steered_endpoint\]: .*/relseek/vectors answered 501"):
            writer_of(journal, plain.url.removesuffix("/v1"), SOME)(CONVERSATIONS[:1], [1], [1.0])
        assert plain.bodies == []


def test_a_wrong_key_and_a_wrong_model_name_the_setting(
    tmp_path: Path, folder: Path, server: EmbeddedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    with AnswerJournal(tmp_path / "answers.jsonl") as journal:
        writer = writer_of(journal, server.url, vector_of(folder))
        wrong = replace(writer, author=writer.author.model_copy(update={"model": "large"}))
        with pytest.raises(AuthorError, match=r"\[prompting.steered_endpoint\]"):
            wrong(CONVERSATIONS[:1], [1], [1.0])
        monkeypatch.setenv(KEY, "guessed")
        with pytest.raises(AuthorError, match=rf"answered 401\. Correct base_url, which ends on /v1, or the key in {KEY}"):
            writer(CONVERSATIONS[:1], [1], [1.0])
        monkeypatch.delenv(KEY)
        with pytest.raises(AuthorError, match=r"name another variable as key_variable in \[prompting.steered_endpoint\]"):
            writer(CONVERSATIONS[:1], [1], [1.0])


def test_a_server_with_a_price_is_held_to_its_budget(tmp_path: Path, folder: Path, server: EmbeddedServer) -> None:
    endpoint = SteeredEndpoint(base_url=f"{server.url}/v1", model="tiny", key_variable=KEY, price=Price(prompt=0, completion=1e6), budget_usd=8.0)
    with AnswerJournal(tmp_path / "answers.jsonl") as journal:
        author = served.author_of(endpoint)
        writer = served.ServedWriter(author, SAMPLING, journal, "mine", lambda: 0.0, vector=vector_of(folder))
        with pytest.raises(authors.AuthorError, match=r"above its budget_usd of \$8.00; they were not sent. Raise budget_usd in \[prompting.steered"):
            writer(CONVERSATIONS[:2], SEEDS[:2], DOSES[:2])
        assert journal.answers == {}
        assert writer(CONVERSATIONS[:1], SEEDS[:1], DOSES[:1])[0].cost_usd > 0


def test_a_request_says_vector_hash_block_and_dose_in_the_servers_own_form() -> None:
    author = served.author_of(SteeredEndpoint(base_url="http://here/v1", model="tiny"))
    one, other = (served.steered_request(author, SAMPLING, SOME, CONVERSATIONS[0], 5, dose) for dose in (0.0, 1.5))
    [asked] = json.loads(json.loads(other.body)["extra_body"]["vllm_xargs"]["relseek"])
    assert asked == {"vector": "warm", "sha256": SOME.sha256, "layers": [1], "multiplier": 1.5}
    assert one.custom_id != other.custom_id
    changed = served.steered_request(author, SAMPLING, replace(SOME, sha256="0" * 64), CONVERSATIONS[0], 5, 1.5)
    assert changed.custom_id != other.custom_id, "another vector is another question"
