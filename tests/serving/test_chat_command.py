"""`relseek chat` answers each line at its own dose, of a server or of a study, and says which dose it was and how long it took."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from relseek_assets import serve, steer
from relseek_assets.chat import Loaded, Served, converse, endpoint, vector_of
from relseek_assets.cli import main
from relseek_assets.study import StudyError, load_study
from relseek_resources.models import Add, Sampling, SteeredModel
from relseek_resources.serving import chat as page
from relseek_resources.serving.engine import Engine
from relseek_resources.serving.guard import Settings
from relseek_resources.serving.server import create_app
from relseek_resources.storage import read_tensors
from tests.serving.sockets import listening, two_vectors
from tests.serving.stored import SITES, select

GREEDY = Sampling(temperature=0, max_new_tokens=8)


@pytest.fixture
def engine(random_causal_lm: Any, byte_tokenizer: Any, tmp_path: Path) -> Iterator[Engine]:
    """A server's engine on weights of its own, equal to those of `tiny_llama`."""
    found = Engine(SteeredModel(random_causal_lm("llama"), byte_tokenizer), two_vectors(tmp_path), name="tiny")
    yield found
    found.close()


@pytest.fixture
def server(engine: Engine) -> Iterator[str]:
    with listening(create_app(engine, Settings(), page.routes())) as url:
        yield url


def heard(talk: Any, *lines: str) -> tuple[str, list[str]]:
    written: list[str] = []
    notes: list[str] = []
    converse(talk, lines, written.append, notes.append)
    return "".join(written), notes


def reply_at(model: Any, vector: np.ndarray, layer: int, dose: float, *turns: str) -> str:
    """What the forward-hook model answers greedily to a conversation whose turns are user, assistant, user, ..."""
    messages = [{"role": ("user", "assistant")[place % 2], "content": text} for place, text in enumerate(turns)]
    with model.intervene([Add(vector, layer, dose)]):
        return model.generate([messages], GREEDY, seeds=[0])[0].text


def served(url: str, vector: str | None = None, multiplier: float = 0.0) -> Served:
    found = endpoint(url)
    chosen = found.vector(vector)
    return Served(found.client, found.model, chosen, multiplier, GREEDY, layers=found.layers(chosen) if chosen else None)


def test_each_line_is_answered_by_the_server_at_its_own_dose(server, engine, tiny_llama):
    warm = engine.vectors.by_name["warm"].at(1)
    written, notes = heard(served(server, multiplier=1.0), "Hello || -1.5", "And now?")
    first = reply_at(tiny_llama, warm, 1, -1.5, "Hello")
    second = reply_at(tiny_llama, warm, 1, 1.0, "Hello", first, "And now?")
    assert written == f"{first}\n{second}\n" and first != reply_at(tiny_llama, warm, 1, 0.0, "Hello")
    assert [note.split(";")[0] for note in notes] == ["[λ -1.5", "[λ 1"]
    assert all("first token after" in note and "tokens in" in note for note in notes)


def test_a_vector_that_was_exchanged_behind_its_name_does_not_answer(server, engine):
    talk = served(server)
    assert talk.vector is not None
    talk.vector["sha256"] = "0" * 64  # as the server listed it when the conversation began
    written, notes = heard(talk, "Hello || 1", "Hello || 0")
    assert "was asked for" in notes[0] and len(talk.turns) == 1 and talk.turns[0]["multiplier"] == 0 and written.strip()


def test_the_default_vector_works_after_the_blocks_that_the_server_declares(server, engine, tiny_llama):
    engine.vectors.default = {"vector": "warm", "layers": [2]}
    warm = engine.vectors.by_name["warm"].at(2)
    expected = reply_at(tiny_llama, warm, 2, 1.5, "Hello")
    talk = served(server)
    assert heard(talk, "Hello || 1.5")[0] == expected + "\n" != reply_at(tiny_llama, warm, 1, 1.5, "Hello") + "\n"
    assert list(talk.turns[0]["layers"]) == [2]
    assert run(server, "--temperature", "0", "--max-tokens", "8", lines="Hello || 1.5\n").stdout == expected + "\n"
    assert list(served(server, "cold").layers or ()) == []


def test_a_conversation_names_itself_to_a_router(engine):
    sessions = []
    app = create_app(engine, Settings())

    async def noted(scope: Any, receive: Any, send: Any) -> None:
        sessions.extend(value for name, value in scope.get("headers", ()) if name == b"x-session-id")
        await app(scope, receive, send)

    with listening(noted) as url:
        heard(served(url), "Hello", "And now?")
        heard(served(url), "Hello")
    assert sessions[0] == sessions[1] != sessions[2] and len(sessions[0]) == 32


def test_a_study_in_this_process_and_a_server_of_the_same_vector_answer_alike(server, engine, tiny_llama):
    vector = engine.vectors.by_name["cold"].at(2)
    session = steer.Session(tiny_llama, {2: vector}, 2, steer.Strengths(scale=1.0), GREEDY)
    lines = ("Hello", "More || 2", "/reset", "Hello || 0.5")
    of_study, notes = heard(Loaded(session), *lines)
    of_server, _ = heard(served(server, "cold", 1.0), *lines)
    assert of_study == of_server
    assert notes[0].startswith("[λ 1; ") and "projection" in notes[0] and notes[1].startswith("[λ 2; ")


def test_a_study_answers_with_the_vector_that_it_is_served_with(store):
    study = load_study("quickstart")
    with pytest.raises(StudyError, match="relseek run quickstart --select selection"):
        vector_of(study, None, None)
    select(store, SITES[1])
    for site in (None, *SITES):
        [served] = serve.gathered("quickstart", None, site, None, False, "response_mean", ()).vectors
        [(layer, vector)] = vector_of(study, site, None).vectors.items()
        assert np.array_equal(vector, read_tensors(served.source)[0]["vector"]) and served.name == f"smollm2-135m:L{layer}@e02"


def test_a_dose_beyond_the_studys_range_is_refused_as_its_server_refuses_it(store, tiny_llama, monkeypatch):
    monkeypatch.setattr("relseek_resources.models.load", lambda *_, **__: pytest.fail("the model is loaded for nothing"))
    select(store, SITES[0])
    for dose in ("5", "-5"):
        found = run("quickstart", "--multiplier", dose)
        assert found.exit_code == 2 and "outside the declared range -4 to 4" in found.output
    session = steer.Session(tiny_llama, {2: np.ones(64, np.float32)}, 2, steer.Strengths(scale=0.0), GREEDY)
    talk = Loaded(session, dose_limit=4.0)
    _, notes = heard(talk, "Hello || 5", "/dose -5", "Hello", "Hello || -4")
    assert ["outside the declared range -4 to 4" in note for note in notes] == [True, False, True, False]
    assert [turn["multiplier"] for turn in talk.turns] == [-4.0]


def test_commands_change_what_follows_and_faulty_lines_end_nothing(server, engine, tiny_llama, tmp_path):
    warm = engine.vectors.by_name["warm"].at(1)
    talk = served(server)
    written, notes = heard(
        talk,
        "/dose 2",
        "Hello",
        "/reset",
        "Hello",
        "|| 1",
        "hi || much",
        "hi || 9",
        "/nothing",
        "/save",
        "/dose",
        f"/save {tmp_path}/out.jsonl",
        "/quit",
        "Hello",
    )
    assert written == f"{reply_at(tiny_llama, warm, 1, 2.0, 'Hello')}\n" * 2
    assert "outside the declared range -2 to 2" in "".join(notes)
    assert len([note for note in notes if "finite number" in note]) == 2 and any("no command /nothing" in note for note in notes)
    saved = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [(turn["user"], turn["multiplier"], turn["vector"]) for turn in saved] == [("Hello", 2.0, "warm")] * 2
    assert saved[0]["vector_sha256"] == engine.vectors.by_name["warm"].sha256 and saved[0]["seconds"] >= saved[0]["seconds_to_first_token"] > 0


@pytest.mark.parametrize("ended", ["stop", "length", "abort", None])
def test_a_reply_without_an_end_of_its_own_does_not_count(ended):
    """The connection ends after half a reply, without `[DONE]`, as a router closes it whose replica has gone."""
    import openai
    from starlette.applications import Starlette
    from starlette.responses import StreamingResponse
    from starlette.routing import Route

    async def reply(_request: Any) -> StreamingResponse:
        choices = [{"index": 0, "delta": {"content": "Half a"}, "finish_reason": None}, {"index": 0, "delta": {}, "finish_reason": ended}]
        events = [{"id": "x", "object": "chat.completion.chunk", "created": 0, "model": "m", "choices": [one]} for one in choices]
        return StreamingResponse((f"data: {json.dumps(one)}\n\n" for one in events), media_type="text/event-stream")

    with listening(Starlette(routes=[Route("/v1/chat/completions", reply, methods=["POST"])])) as url:
        talk = Served(openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0), "m", None, 0.0, GREEDY)
        written, notes = heard(talk, "Hello")
    assert written.strip() == "Half a"
    if ended in ("stop", "length"):
        assert [turn["reply"] for turn in talk.turns] == ["Half a"] and notes[0].startswith("[λ 0; ")
    else:
        assert talk.turns == talk.history == [] and "the reply broke off" in notes[0]


def test_the_system_prompt_opens_what_follows(server, tiny_llama):
    written, _ = heard(served(server), "/system Be brief", "Hello")
    messages = [{"role": "system", "content": "Be brief"}, {"role": "user", "content": "Hello"}]
    assert written == tiny_llama.generate([messages], GREEDY, seeds=[0])[0].text + "\n"


def run(*arguments: str, lines: str = "Hello || 1\n") -> Result:
    return CliRunner().invoke(main, ["chat", *arguments], input=lines)


def test_the_command_writes_replies_to_the_output_and_all_else_beside(server, engine, tiny_llama):
    found = run(server, "--temperature", "0", "--max-tokens", "8")
    assert found.exit_code == 0 and found.stdout == reply_at(tiny_llama, engine.vectors.by_name["warm"].at(1), 1, 1.0, "Hello") + "\n"
    assert "tiny at http" in found.stderr and "[λ 1; first token after" in found.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--vector", "hot"], "no vector 'hot'; there is cold, warm"),
        (["--model", "gpt"], "no model 'gpt'; there is tiny"),
        (["--site", "a:L1"], "go with a STUDY"),
    ],
)
def test_what_the_server_does_not_have_is_said_before_anything_is_typed(server, arguments, words):
    found = run(server, *arguments)
    assert found.exit_code != 0 and words in found.stderr and found.stdout == ""


def test_a_server_that_is_not_there_or_wants_a_key_is_explained(engine):
    assert "relseek serve" in run("http://127.0.0.1:9").stderr
    with listening(create_app(engine, Settings(keys=("sesame",)))) as url:
        refused = run(url)
        assert refused.exit_code == 1 and "needs a key" in refused.stderr
        assert run(url, "--key", "sesame", "--max-tokens", "2").exit_code == 0
