"""The prompting experiments of a tiny study over a real instance: a local author and a remote one, a language judge, money and interruptions."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pytest

from relseek_assets.exchange import read_asset
from relseek_assets.prompting import authors
from relseek_assets.settings import Author
from relseek_resources.judges.asking import AnswerJournal
from relseek_resources.models.sampling import Sampling
from tests.judging.chat_server import ChatServer, Says, serving
from tests.platform.conftest import CHECKOUT, Platform, _once, _session_folder

DOSES = "[-1.5, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5]"
KEY = "TINY_KEY"
SECTIONS = """
[prompting]
site = "m:L01"
epoch = 2
doses = {doses}
examples = 1
attacked = [1, 7]
themes = ["casual"]

[[prompting.authors]]
name = "local"
kind = "model"

[[prompting.authors]]
name = "remote"
kind = "openai"
model = "far-away"
base_url = {url}
key_variable = "{key}"
concurrency = 2
price = {{ prompt = 1.0, completion = 2.0 }}
budget_usd = {budget}

[[judges]]
name = "asked"
kind = "openai"
model = "far-judge"
base_url = {url}
key_variable = "{key}"
rubrics = ["relationship"]
concurrency = 4
price = {{ prompt = 0.0, completion = 0.0 }}
budget_usd = 0.0
"""
ATTACKED, ITEMS, LEVELS = 2 * 8 * 4, 4, 7


class Prompting(Platform):
    """A tiny study of one site with seven doses and the prompting experiments."""

    def study_text(self) -> str:
        text = super().study_text()
        for old, new in (
            ("layers = [1, 2]", "layers = [1]"),
            ("epochs_trained = 3", "epochs_trained = 2"),
            ("epochs_evaluated = [2, 3]", "epochs_evaluated = [2]"),
            ("generated = [-1.0, 0.0, 1.0]", f"generated = {DOSES}"),
        ):
            assert text.count(old) == 1
            text = text.replace(old, new)
        return text

    def with_endpoint(self, url: str, budget: float = 1.0) -> Prompting:
        self.study_file.write_text(self.study_text() + SECTIONS.format(doses=DOSES, url=json.dumps(url), key=KEY, budget=budget))
        return self

    def environment(self) -> dict[str, str]:
        return {**super().environment(), KEY: "secret"}

    def table(self, asset: str) -> pd.DataFrame:
        with self.workspace() as workspace:
            return read_asset(workspace, asset)


def answers(text: str, nth: int) -> Says:
    """A score or a choice where a judge is asked, and prose where an author is."""
    if '"score"' in text:
        return Says('{"score": 7}')
    return Says('{"answer": "A"}') if '"answer"' in text else Says(f"I heard: {text[:40]}")


def authored(server: ChatServer) -> Counter[str]:
    """How often each request of the author came in, by its content."""
    return Counter(json.dumps(body) for body in server.bodies if body["model"] == "far-away")


@pytest.fixture(scope="module")
def server() -> Iterator[ChatServer]:
    with serving(answers) as running:
        yield running


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory, judged_session: Platform) -> Prompting:
    """The tiny study up to its sweep and scores; the experiments are not carried out."""

    def make(folder: Path) -> None:
        copied = Prompting(judged_session.copy(folder).folder, judged_session.model)
        copied.study_file.write_text(copied.study_text())
        done = copied.process("run", "STUDY", "--select", "judge_scores")
        assert done.returncode == 0, done.stdout + done.stderr

    return Prompting(_once(_session_folder(tmp_path_factory) / "prompting", make), judged_session.model)


@pytest.fixture(scope="module")
def finished_prompting(tmp_path_factory: pytest.TempPathFactory, swept: Prompting, server: ChatServer) -> Prompting:
    copied = Prompting(swept.copy(tmp_path_factory.mktemp("finished")).folder, swept.model).with_endpoint(server.url)
    done = copied.process("run", "STUDY", *(part for name in ANALYSES for part in ("--select", name)))
    assert done.returncode == 0, done.stdout + done.stderr
    return copied


ANALYSES = ("level_slopes", "level_models", "head_to_head", "attack_shifts")


@pytest.mark.slow
def test_a_whole_run_makes_every_table_of_both_experiments(finished_prompting: Prompting) -> None:
    replies = finished_prompting.table("prompted_generations")
    assert replies.groupby("author").size().to_dict() == {"local": LEVELS * ITEMS, "remote": LEVELS * ITEMS}
    assert set(replies["status"]) == {"replied"}
    assert replies.loc[replies["author"] == "local", "cost_usd"].eq(0).all()
    assert replies.loc[replies["author"] == "remote", "cost_usd"].sum() == pytest.approx(LEVELS * ITEMS * (100 * 1.0 + 5 * 2.0) / 1e6)
    scores = finished_prompting.table("level_scores")
    assert set(scores.loc[scores["judge"] == "asked", "score"]) == {7.0}
    assert set(scores["rubric"]) == {"relationship", "coherence"}
    slopes = finished_prompting.table("level_slopes")
    assert {"steered", "local", "remote"} == set(slopes["author"])
    assert "asked" not in set(slopes["judge"]), "a judge that says 7 to everything measures no slope"
    shares = finished_prompting.table("head_to_head")
    assert {"asked"} < set(shares["judge"])
    conversations = finished_prompting.table("attack_conversations")
    assert conversations.groupby("author").size().to_dict() == dict.fromkeys(("steered", "persona", "local", "remote"), ATTACKED)
    shifts = finished_prompting.table("attack_shifts")
    assert set(shifts["author"]) == {"steered", "persona", "local", "remote"}
    assert shifts.loc[(shifts["judge"] == "asked") & shifts["compared_with"].isna(), "estimate"].eq(0).all()


@pytest.mark.slow
def test_the_judge_that_always_says_a_prefers_neither_side_but_what_it_saw_first(finished_prompting: Prompting) -> None:
    pairs = finished_prompting.table("level_pairs")
    asked = pairs[(pairs["judge"] == "asked") & (pairs["status"] == "judged")]
    assert len(asked) > 20
    assert (asked["winner"] == asked["first_shown"]).all()
    assert set(asked["first_shown"]) == {"steered", "author"}, "the order is a coin of the row's own key"


@pytest.mark.slow
def test_nothing_is_asked_twice_and_a_second_run_asks_nothing(finished_prompting: Prompting, server: ChatServer) -> None:
    before = len(server.bodies)
    assert set(authored(server).values()) == {1}
    done = finished_prompting.process("run", "STUDY", *(part for name in ANALYSES for part in ("--select", name)))
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(server.bodies) == before


@pytest.mark.slow
def test_an_author_sees_its_level_and_a_judge_never_does(finished_prompting: Prompting, server: ChatServer) -> None:
    systems = [body["messages"][0]["content"] for body in server.bodies if body["model"] == "far-away"]
    assert all(any(f"{level} of 7" in system for level in range(1, 8)) for system in systems)
    judged = [body["messages"] for body in server.bodies if body["model"] == "far-judge"]
    assert judged
    assert not any("Your setting is" in message["content"] for messages in judged for message in messages)


@pytest.mark.slow
def test_an_author_above_its_budget_is_refused_before_anything_is_sent(swept: Prompting, tmp_path: Path) -> None:
    with serving(answers) as own:
        copied = Prompting(swept.copy(tmp_path / "p").folder, swept.model).with_endpoint(own.url, budget=0.0001)
        done = copied.process("run", "STUDY", "--select", "prompted_generations")
        assert done.returncode == 1
        assert "author 'remote' would cost $" in done.stderr + done.stdout
        assert "budget_usd" in done.stderr + done.stdout
        assert own.bodies == []


@pytest.mark.slow
def test_a_killed_run_pays_for_no_reply_twice(swept: Prompting, tmp_path: Path) -> None:
    answered, order, mended = 9, itertools.count(), threading.Event()

    def hangs(text: str, nth: int) -> Says:
        return answers(text, nth) if mended.is_set() or next(order) < answered else Says(hangs=True)

    copied = Prompting(swept.copy(tmp_path / "p").folder, swept.model)
    with serving(hangs) as server:  # one address: what another endpoint answered would be asked anew
        copied.with_endpoint(server.url)
        command = [sys.executable, "-m", "relseek_assets.cli", "run", str(copied.study_file), "--select", "prompted_generations"]
        running = subprocess.Popen(command, env=copied.environment(), cwd=CHECKOUT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        limit = time.monotonic() + 500
        while len(server.bodies) < answered + 2 and running.poll() is None and time.monotonic() < limit:
            time.sleep(0.05)
        assert len(server.bodies) == answered + 2, "both workers wait for an answer that does not come"
        os.kill(running.pid, signal.SIGKILL)
        running.wait()
        before = authored(server)
        mended.set()
        done = copied.process("run", "STUDY", "--select", "prompted_generations")
        assert done.returncode == 0, done.stdout + done.stderr
        after = authored(server) - before
    assert sum(after.values()) == LEVELS * ITEMS - answered
    assert len(before | after) == LEVELS * ITEMS


def test_an_author_is_not_asked_beyond_what_its_budget_has_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY, "secret")
    sampling = Sampling(temperature=1.0, max_new_tokens=100)
    conversations = [[{"role": "user", "content": f"Say {number}"}] for number in range(3)]
    with serving(answers) as own, AnswerJournal(tmp_path / "answers.jsonl") as journal:
        settings = {"name": "remote", "kind": "openai", "model": "far-away", "base_url": own.url, "key_variable": KEY, "budget_usd": 0.001}
        author = Author.model_validate({**settings, "price": {"prompt": 0.0, "completion": 2.0}})  # 100 tokens are 0.0002 USD
        spent = [0.0]
        writer = authors.EndpointWriter(author, sampling, journal, "mine", lambda: spent[0])
        assert len(writer(conversations, [1, 2, 3], [0.0] * 3)) == 3
        spent[0] = 0.0009
        assert len(writer(conversations, [1, 2, 3], [0.0] * 3)) == 3, "what is known costs nothing"
        with pytest.raises(authors.AuthorError, match=r"was paid \$0.00, and 1 replies more would cost \$0.00, which is above its budget_usd"):
            writer(conversations, [1, 2, 4], [0.0] * 3)
        assert len(own.bodies) == 3


def test_a_reply_that_ran_into_the_token_limit_is_a_reply_and_is_paid_for_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY, "secret")
    conversations = [[{"role": "user", "content": text}] for text in ("Tell me more", "Goodbye")]

    def answered(text: str, nth: int) -> Says:
        return Says("Once upon a time there", finish="length") if text == "Tell me more" else Says("Bye.")

    settings = {"name": "remote", "kind": "openai", "model": "far-away", "key_variable": KEY, "budget_usd": 1}
    with serving(answered) as own, AnswerJournal(tmp_path / "answers.jsonl") as journal:
        author = Author.model_validate({**settings, "base_url": own.url, "price": {"prompt": 1.0, "completion": 2.0}})
        writer = authors.EndpointWriter(author, Sampling(temperature=1.0, max_new_tokens=40), journal, "mine", lambda: 0.0)
        cut, whole = writer(conversations, [1, 2], [0.0] * 2)
        again, _ = writer(conversations, [1, 2], [0.0] * 2)
    assert (cut.text, cut.finished, cut.status, cut.attempt) == ("Once upon a time there", False, "replied", 1)
    assert (whole.text, whole.finished) == ("Bye.", True)
    assert again == cut and len(own.bodies) == 2


def test_a_model_that_refuses_the_usual_settings_is_asked_without_them() -> None:
    settings = {"name": "remote", "kind": "openai", "model": "thinks", "budget_usd": 1}
    usual, other = (Author.model_validate({**settings, **more}) for more in ({}, {"token_limit": "max_completion_tokens", "default_sampling": True}))
    conversation = [{"role": "user", "content": "Hello"}]
    bodies = [json.loads(authors.request_of(author, Sampling(temperature=0.7, max_new_tokens=40), conversation, 3).body) for author in (usual, other)]
    assert set(bodies[0]) == {"model", "messages", "temperature", "top_p", "max_tokens", "seed"}
    assert bodies[1] == {"model": "thinks", "messages": conversation, "max_completion_tokens": 40}
    assert usual.unusual == {}
