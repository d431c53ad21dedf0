"""The embedded engine's server over real sockets: OpenAI's clients, refusals in words, limits, and nothing that breaks it."""

from __future__ import annotations

import concurrent.futures
import json
import os
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest

from relseek_resources import models
from relseek_resources.models import Sampling, SteeredModel
from relseek_resources.serving.guard import Buckets, Refusal, Settings
from relseek_resources.serving.vectors import ServingError
from tests.serving import clients
from tests.serving.embedded import CHAT, HELLO, EmbeddedServer, serving, steered
from tests.serving.hostile import ask_fuzzed


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, random_causal_lm: Any, byte_tokenizer: Any) -> Iterator[EmbeddedServer]:
    model = SteeredModel(random_causal_lm("llama"), byte_tokenizer)
    with serving(model, tmp_path_factory.mktemp("offered"), Settings(rate=0, body=1 << 18, patience=1.0)) as found:
        yield found


@pytest.fixture
def client(server: EmbeddedServer) -> Iterator[openai.OpenAI]:
    with clients.client_of(server.url) as found:
        yield found


def reply(server: EmbeddedServer, **body: Any) -> str:
    status, content, _ = server.chat(**body)
    assert status == 200, content
    return content["choices"][0]["message"]["content"]


def hooked(server: EmbeddedServer, dose: float, messages: list[dict[str, str]] = HELLO, tokens: int = 8) -> str:
    """The greedy reply of the same model with a hook."""
    model, [(layer, vector)] = server.engine.model, server.vectors["warm"].items()
    with model.steer(vector, layer, dose):
        return model.generate([messages], Sampling(temperature=0, max_new_tokens=tokens))[0].text


# --- clients ------------------------------------------------------------------------------------------------------------


def test_the_openai_client_talks_to_it(client: openai.OpenAI) -> None:
    clients.check_whole_replies(client, "tiny")
    assert client.models.retrieve("tiny").id == "tiny"


@pytest.mark.parametrize("options", clients.ANSWERS)
def test_a_stream_is_the_whole_reply_in_pieces(client: openai.OpenAI, options: dict[str, Any]) -> None:
    clients.check_stream(client, "tiny", options)


def test_curl_talks_to_it(server: EmbeddedServer) -> None:
    clients.check_curl(server.url, "tiny", hooked(server, 0.5), 0.5)


def test_inspect_talks_to_it(server: EmbeddedServer, tmp_path: Path) -> None:
    asked = [[{"role": "user", "content": content}] for content in ("Say yes.", "Hello")]
    for way in ({"custom": {"steer_multiplier": 0.5}}, steered({"vector": "warm", "multiplier": 0.5})):
        folder = tmp_path / next(iter(way))
        folder.mkdir()
        assert clients.inspect_replies(server.url, "tiny", way, folder) == [hooked(server, 0.5, turns, 12) for turns in asked]


# --- steering -----------------------------------------------------------------------------------------------------------


def test_both_ways_of_asking_are_the_hooked_model(server: EmbeddedServer) -> None:
    for dose in (-1, 0.5, 2):
        expected = hooked(server, dose)
        assert reply(server, custom={"steer_multiplier": dose}) == expected
        assert reply(server, **steered({"vector": "warm", "multiplier": dose})) == expected
    assert len({hooked(server, dose) for dose in (-1, 0, 0.5, 2)}) == 4
    assert reply(server, **steered({"vector": "warm", "multiplier": 0})) == reply(server) == hooked(server, 0)


def test_thirty_two_conversations_at_doses_of_their_own_never_cross(server: EmbeddedServer) -> None:
    rng = random.Random(0)
    conversations = []
    for tag in range(32):
        turns = [{"role": "user", "content": f"[{tag}] " + "word " * rng.randrange(1, 40)}]
        conversations.append((turns, rng.choice([-1, -0.5, 0, 0.5, 1]), rng.choice([9, 14, 24])))
    expected = [hooked(server, dose, turns, tokens) for turns, dose, tokens in conversations]
    assert len(set(expected)) > 28  # a random model says the same to some

    def ask(one: tuple[list[dict[str, str]], float, int]) -> str:
        turns, dose, tokens = one
        return reply(server, messages=turns, max_tokens=tokens, custom={"steer_multiplier": dose})

    for _ in range(3):
        with concurrent.futures.ThreadPoolExecutor(32) as pool:
            assert list(pool.map(ask, conversations)) == expected


def test_steering_is_proved_by_measuring_it(server: EmbeddedServer) -> None:
    status, found, _ = server.ask("/v1/relseek/health")
    assert (status, found["live"]) == (200, True)
    assert {one["name"]: one["layer"] for one in found["vectors"]} == {"many": 2, "warm": 1}
    assert all(one["largest_change"]["0"] < 1e-4 < 1e-2 < one["largest_change"]["20"] for one in found["vectors"])
    assert server.ask("/v1/relseek/health?vector=none")[0] == 404


def test_steering_that_is_dead_is_not_called_live(server: EmbeddedServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server.engine._batch.tables, "prepare", lambda texts, tokens: None)
    status, found, _ = server.ask("/v1/relseek/health?vector=warm")
    assert (status, found["live"]) == (503, False)


def test_a_vector_is_offered_while_the_server_runs(server: EmbeddedServer) -> None:
    from relseek_resources.vector_files import write_vectors

    folder = server.engine.vectors.configuration.folder
    assert folder is not None
    cold = np.random.default_rng(9).normal(size=server.engine.model.width).astype(np.float32)
    write_vectors(folder / "cold.safetensors", "safetensors", {0: cold}, {})
    write_vectors(folder / "narrow.safetensors", "safetensors", {0: np.ones(7, np.float32)}, {})
    write_vectors(folder / "zero.safetensors", "safetensors", {0: np.zeros(server.engine.model.width, np.float32)}, {})
    wanted = steered({"vector": "cold", "multiplier": 1})
    assert server.chat(**wanted)[0] == 400
    status, found, _ = server.ask("/v1/relseek/vectors", {"name": "cold", "file": "cold.safetensors"})
    assert (status, found["registered"]["layers"]) == (200, [0])
    with server.engine.model.steer(cold, 0, 1):
        expected = server.engine.model.generate([HELLO], Sampling(temperature=0, max_new_tokens=8))[0].text
    assert reply(server, **wanted) == expected
    assert "cold" in {one["name"] for one in server.ask("/v1/relseek/vectors")[1]["vectors"]}
    for body, says in (
        ({"name": "narrow", "file": "narrow.safetensors"}, "vectors of width 7; the model's residual stream needs 64"),
        ({"name": "zero", "file": "zero.safetensors"}, "nothing but zeros"),
        ({"name": "warm", "file": "cold.safetensors"}, "stands for another vector"),
        ({"name": "x", "file": "../../etc/passwd"}, "there is none in the declared folder"),
        ({"name": "x", "file": "/etc/passwd"}, "there is none in the declared folder"),
        ({"name": "../x", "file": "cold.safetensors"}, "1 to 100 letters"),
        ({"name": "x"}, "expected"),
        ([], "expected"),
    ):
        status, found, _ = server.ask("/v1/relseek/vectors", body)
        assert status == 400 and says in found["error"]["message"], found
        assert "passwd" not in found["error"]["message"].replace(str(body), "").partition(":")[2], found


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (steered({"vector": "none"}), "no vector 'none'; there is"),
        (steered({"vector": "warm", "multiplier": 21}), "outside the declared range -20 to 20"),
        (steered({"vector": "warm", "layers": [9]}), "no steering after block 9"),
        ({"vllm_xargs": {"relseek": '[{"vector": "warm", "multiplier": NaN}]'}}, "outside the declared range"),
        ({"vllm_xargs": {"relseek": "{"}}, "not valid JSON"),
        ({"vllm_xargs": {"relsek": "[]"}}, "unknown 'relsek'"),
        ({"vllm_xargs": []}, None),
        ({"vllm_xargs": [1]}, "expected an object"),
        ({"custom": {"steer_multiplier": "1"}}, "must be a number"),
        ({"custom": {"steer_multipler": 1}}, "steer_multiplier"),
        ({"custom": {"steer_multiplier": 1}, **steered()}, "asked for twice"),
        ({"relseek": "[]"}, "vllm_xargs.relseek"),
        ({"steer_multiplier": 1}, "custom.steer_multiplier"),
        ({"temprature": 1}, "unknown 'temprature'"),
        ({"frequency_penalty": 0.5}, "frequency_penalty is not offered"),
        ({"frequency_penalty": 0, "tools": [], "response_format": {"type": "text"}, "logit_bias": {}, "user": "me"}, None),
        ({"response_format": {"type": "json_object"}}, "response_format is not offered"),
        ({"tools": [{"type": "function"}]}, "tools is not offered"),
        ({"temperature": -1}, "temperature must be a number from 0 to 2"),
        ({"temperature": True}, "temperature"),
        ({"top_p": 0}, "above 0"),
        ({"n": 17}, "n must be an integer from 1 to 16"),
        ({"seed": 1.5}, "seed must be an integer"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 10**30}, "more than 20 digits"),
        ({"max_tokens": 5, "max_completion_tokens": 6}, "different things"),
        ({"max_tokens": 600}, "together at most 512"),
        ({"messages": [{"role": "user", "content": "x" * 600}]}, "at most 512"),
        ({"messages": []}, "one message or more"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "user turn"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "role 'robot'"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "parts of the type text"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "Hello"}]}]}, None),
        ({"messages": [{"role": "user", "content": "x", "tool_calls": [{}]}]}, "tool_calls"),
        ({"stop": ["a"] * 17}, "up to 16"),
        ({"stop": ""}, "stop must be"),
        ({"top_logprobs": 2}, "goes with logprobs"),
        ({"stream_options": {"include_usage": True}, "stream": False}, "goes with stream"),
        ({"stream": 1}, "true or false"),
        ({"model": "other"}, "no model 'other'"),
    ],
)
def test_what_is_not_done_is_refused_by_name_and_what_asks_for_nothing_is_not(server: EmbeddedServer, body: dict[str, Any], says: str | None) -> None:
    for stream in (False, True) if says else (False,):  # a stream that is refused has not begun
        status, found, _ = server.ask(CHAT, {"model": "tiny", "messages": HELLO, "max_tokens": 4, "stream": stream, **body})
        if says is None:
            assert status == 200, found
        else:
            assert status == (404 if "model" in body else 400)
            assert says in found["error"]["message"] and set(found["error"]) == {"message", "type", "param", "code"}


@pytest.mark.parametrize(
    ("name", "parameter"), [("temprature", "temprature"), ("\ud800", "\\ud800"), ("a\0b", "a\\x00b"), ("x" * 500, "x" * 56 + "...")]
)
def test_an_unknown_field_is_named_whatever_it_is_called(server: EmbeddedServer, name: str, parameter: str) -> None:
    status, found, _ = server.chat(**{name: 1})
    assert (status, found["error"]["param"]) == (400, parameter) and "unknown" in found["error"]["message"]


def test_a_prompt_that_leaves_no_room_is_told_from_one_that_is_malformed(server: EmbeddedServer) -> None:
    codes = {more: server.chat(messages=[{"role": "user", "content": "x" * more}])[1]["error"]["code"] for more in (504, 600)}
    malformed = server.chat(messages=[{"role": "robot", "content": "x"}])[1]["error"]["code"]
    assert (codes, malformed) == ({504: "context_length_exceeded", 600: "context_length_exceeded"}, None)


# --- limits -------------------------------------------------------------------------------------------------------------


def test_a_body_that_is_too_large_is_refused(server: EmbeddedServer) -> None:
    status, found, _ = server.ask(CHAT, b" " * (1 << 19))
    assert status == 413 and "larger than 262144 bytes" in found["error"]["message"]
    assert reply(server) == hooked(server, 0)


def test_a_body_that_does_not_come_is_not_waited_for(server: EmbeddedServer) -> None:
    start = time.monotonic()
    head = f"POST {CHAT} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: 500\r\n\r\n"
    answer = server.raw(head.encode() + b'{"model"')
    assert b" 408 " in answer.split(b"\r\n")[0] and time.monotonic() - start < 10


def test_a_client_that_goes_away_leaves_no_row_behind(server: EmbeddedServer) -> None:
    for streamed in (False, True):
        body = json.dumps({"model": "tiny", "messages": HELLO, "max_tokens": 480, "n": 8, "stream": streamed}).encode()
        head = f"POST {CHAT} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
        server.raw(head.encode() + body, wait=0.2)
        deadline = time.monotonic() + 5
        while server.engine._live or server.engine._waiting:
            assert time.monotonic() < deadline, "the rows of a client that went away are still running"
            time.sleep(0.02)


@pytest.mark.parametrize("content_type", ["text/plain", "application/x-www-form-urlencoded"])
def test_a_form_of_another_page_is_refused(server: EmbeddedServer, content_type: str) -> None:
    assert server.ask(CHAT, {"model": "tiny", "messages": HELLO}, {"content-type": content_type})[0] == 415


def test_without_keys_another_name_for_this_machine_is_refused(server: EmbeddedServer) -> None:
    assert server.ask("/v1/models", headers={"host": "evil.example:80"})[0] == 403
    assert server.ask("/v1/models", headers={"host": "localhost:1"})[0] == 200


def test_a_key_opens_the_door_and_its_rate_closes_it(tmp_path: Path, tiny_llama: Any) -> None:
    with serving(tiny_llama, tmp_path, Settings(keys=("first", "second"), rate=3)) as server:
        for headers in ({}, {"authorization": "Bearer third"}, {"authorization": "Basic first"}, {"authorization": "Bearer"}):
            status, found, _ = server.ask("/v1/models", headers=headers)
            assert (status, found["error"]["code"]) == (401, "invalid_api_key")
        assert server.ask("/health")[0] == 200
        statuses = [server.ask("/v1/models", headers={"authorization": "Bearer first"})[0] for _ in range(4)]
        assert statuses == [200, 200, 200, 429]
        status, _, headers = server.ask("/v1/models", headers={"authorization": "Bearer first"})
        assert status == 429 and 1 <= int(headers["retry-after"]) <= 20
        assert server.ask("/v1/models", headers={"authorization": "Bearer second"})[0] == 200


def test_a_rate_is_regained_with_time() -> None:
    now = 0.0
    buckets = Buckets(60, clock=lambda: now)
    for _ in range(60):
        buckets.take("me")
    with pytest.raises(Refusal):
        buckets.take("me")
    buckets.take("you")
    now = 1.0
    buckets.take("me")
    with pytest.raises(Refusal):
        buckets.take("me")


def test_elsewhere_than_on_this_machine_a_key_is_needed() -> None:
    with pytest.raises(ServingError, match="needs a key"):
        Settings(host="0.0.0.0")
    assert Settings(host="0.0.0.0", keys=("secret",)).port == 8000
    assert "secret" not in repr(Settings(keys=("secret",)))


def test_a_full_engine_says_when_to_come_back(server: EmbeddedServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server.engine, "most_waiting", 0)
    status, found, headers = server.chat()
    assert (status, found["error"]["code"]) == (429, "server_busy") and int(headers["retry-after"]) >= 1


def test_a_fault_of_ours_shows_no_traceback(server: EmbeddedServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server.engine, "prompt", lambda messages: {}["secret"])
    status, found, _ = server.chat()
    assert status == 500 and "secret" not in json.dumps(found)


@pytest.mark.parametrize(
    ("path", "method", "status"), [("/v1/nothing", "GET", 404), ("/v1/models", "POST", 405), ("/v1/models/../../etc", "GET", 404)]
)
def test_what_is_not_there_is_said_in_openais_shape(server: EmbeddedServer, path: str, method: str, status: int) -> None:
    found, content, _ = server.ask(path, {} if method == "POST" else None)
    assert found == status and set(content["error"]) == {"message", "type", "param", "code"}


# --- whatever comes -----------------------------------------------------------------------------------------------------


def test_three_hundred_malformed_bodies_are_refused_and_the_next_one_is_answered(server: EmbeddedServer) -> None:
    counts = ask_fuzzed(server.port, "tiny", range(300))
    assert counts[400] > 150 and counts[200] > 5
    assert reply(server, custom={"steer_multiplier": 1}) == hooked(server, 1)


@pytest.mark.slow
def test_memory_is_steady_over_two_thousand_malformed_requests(server: EmbeddedServer) -> None:
    import psutil

    process = psutil.Process(os.getpid())
    ask_fuzzed(server.port, "tiny", range(10_000, 10_500))
    server.ask(CHAT, b"x" * (50 << 20))
    first = process.memory_info().rss
    ask_fuzzed(server.port, "tiny", range(10_500, 12_000))
    assert server.ask(CHAT, b"x" * (50 << 20))[0] == 413
    assert process.memory_info().rss < 1.05 * first
    assert reply(server, custom={"steer_multiplier": 1}) == hooked(server, 1)


# --- the embedded model -------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_embedded_model_at_mixed_doses_is_the_hooked_one(tmp_path: Path) -> None:
    model = models.load("embedded:smollm2-135m-instruct", device="cpu")
    questions = ["Why do leaves turn red?", "How do I boil an egg?", "What is a prime number?", "I feel lonely today.", "Tell me about the moon."]
    with serving(model, tmp_path, layers=(14, 20), name="smollm2") as server:
        asked = [([{"role": "user", "content": questions[n % 5]}], (n % 4 - 1.5) / 2) for n in range(10)]

        def ask(one: tuple[list[dict[str, str]], float]) -> Any:
            turns, dose = one
            body = {"model": "smollm2", "messages": turns, "max_tokens": 12, "temperature": 0, "logprobs": True}
            return server.ask(CHAT, {**body, "custom": {"steer_multiplier": dose}})[1]["choices"][0]

        with concurrent.futures.ThreadPoolExecutor(10) as pool:
            found = list(pool.map(ask, asked))
        for (turns, dose), choice in zip(asked, found, strict=True):
            with model.steer(server.vectors["warm"][14], 14, dose):
                scored = model.score([turns], [choice["message"]["content"]], end=False)[0]
            assert [token["logprob"] for token in choice["logprobs"]["content"]] == pytest.approx(scored.log_probs, abs=1e-3)
