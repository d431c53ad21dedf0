"""The vLLM plugin on a running server, against the same model with forward hooks.

A server takes minutes to start on two shared cores; all tests but those at the end share one.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest

from relseek_resources.models import load
from relseek_resources.models.steered import SteeredModel
from relseek_resources.serving.trial_arms import Conduct
from relseek_resources.serving.trial_chat import Ask, Full, ServerSpeaker
from relseek_resources.vector_files import write_vectors
from tests.serving.reference import drawn, hooked, prompts, shortfall
from tests.serving.served import NEEDS_VLLM, Server, serving

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600), NEEDS_VLLM]

NEAR_TIE = 1e-4  # nats
REQUESTS = int(os.environ.get("RELSEEK_SERVED_REQUESTS", "200"))
CLIENTS = 32
COMPILED_RATE = 60  # requests a minute
Asked = tuple[list[int], list[dict[str, Any]]]  # a prompt and its interventions


@pytest.fixture(scope="module")
def reference() -> SteeredModel:
    return load("embedded:smollm2-135m-instruct")


def compared(server: Server, model: SteeredModel, vectors: Any, asked: Sequence[Asked], clients: int) -> dict[str, float]:
    """Ask for all completions at once from so many clients, and compare each with the hooks. The largest differences, in nats."""
    with ThreadPoolExecutor(clients) as pool:
        answers = list(pool.map(lambda one: server.complete(*one), asked))
    worst = {"log_prob": 0.0, "short_of_greedy": 0.0}
    for (prompt, interventions), (status, answer) in zip(asked, answers, strict=True):
        assert status == 200, answer
        choice = answer["choices"][0]
        own, short = shortfall(model, prompt, choice["token_ids"], hooked(interventions, vectors))
        worst["log_prob"] = max(worst["log_prob"], float(np.abs(own - choice["logprobs"]["token_logprobs"]).max()))
        worst["short_of_greedy"] = max(worst["short_of_greedy"], float(short.max()))
    print(f"{len(asked)} requests from {clients} clients: {worst}")
    return worst


def random_requests(number: int, seed: int, tokenizer: Any) -> list[Asked]:
    rng = random.Random(seed)
    pool = prompts(rng, tokenizer)
    steerings = [drawn(rng) for _ in range(max(1, number * 3 // 4))]  # some are asked for again, so that their cached prefixes are used
    return [(rng.choice(pool), rng.choice(steerings)) for _ in range(number)]


def test_served_replies_are_those_of_the_forward_hooks(server: Server, reference: SteeredModel, vector_folder: tuple[Path, Any]) -> None:
    before = server.metric("vllm:prefix_cache_hits_total")
    worst = compared(server, reference, vector_folder[1], random_requests(REQUESTS, 1, reference.tokenizer), CLIENTS)
    assert worst["log_prob"] < 1e-4
    assert worst["short_of_greedy"] < NEAR_TIE
    assert server.metric("vllm:prefix_cache_hits_total") > before


def test_a_cached_prefix_is_shared_by_equal_steering_alone(server: Server, reference: SteeredModel, vector_folder: tuple[Path, Any]) -> None:
    rng = random.Random(2)
    prefix = [rng.randrange(20, 49000) for _ in range(140)]
    strong, weak = [{"vector": "warm", "layers": [14], "multiplier": 2.0}], [{"vector": "warm", "layers": [14], "multiplier": 1.0}]
    zero = [{"vector": "warm", "layers": [14], "multiplier": 0}]
    hits = []
    for interventions in ([], strong, [], strong, weak, zero, weak):
        before = server.metric("vllm:prefix_cache_hits_total")
        prompt = [*prefix, *(rng.randrange(20, 49000) for _ in range(5))]
        worst = compared(server, reference, vector_folder[1], [(prompt, interventions)], 1)
        assert max(worst.values()) < 1e-4
        hits.append(server.metric("vllm:prefix_cache_hits_total") - before)
    assert hits == [0, 0, 128, 128, 0, 128, 128]


def test_a_dose_of_zero_is_the_unsteered_model_exactly(server: Server) -> None:
    rng = random.Random(3)
    prompt = [rng.randrange(20, 49000) for _ in range(40)]
    idle = [
        [{"vector": "warm", "multiplier": 0}],
        [{"vector": "many", "mode": "ablate", "strength": 0}],
        [{"vector": "warm", "multiplier": -0.0}, {"vector": "many", "multiplier": 0}],
    ]
    salted = [server.complete(prompt, one, cache_salt=f"{place}")[1]["choices"][0] for place, one in enumerate([None, *idle])]
    for other in salted[1:]:
        assert other["token_ids"] == salted[0]["token_ids"]
        assert other["logprobs"]["token_logprobs"] == salted[0]["logprobs"]["token_logprobs"]


def test_the_published_shape_is_a_dose_of_the_default_vector(server: Server) -> None:
    chat = {
        "model": "smollm2",
        "messages": [{"role": "user", "content": "Hello, who are you?"}],
        "max_tokens": 12,
        "temperature": 0,
        "logprobs": True,
    }
    named = [{"vector": "warm", "layers": [14], "multiplier": 1.5}]
    plain, custom, xargs = (
        server.ask("/v1/chat/completions", {**chat, **more})[1]["choices"][0]["logprobs"]
        for more in ({}, {"custom": {"steer_multiplier": 1.5}}, {"vllm_xargs": {"relseek": json.dumps(named)}})
    )
    assert [token["logprob"] for token in custom["content"]] == pytest.approx([token["logprob"] for token in xargs["content"]], abs=1e-4)
    assert abs(plain["content"][0]["logprob"] - custom["content"][0]["logprob"]) > 1e-2


QUESTIONS = ["Hello, who are you?", "I had a long day. What should I cook?"]
WAYS = [{"custom": {"steer_multiplier": -1.5}}, {"vllm_xargs": {"relseek": json.dumps([{"vector": "warm", "multiplier": -1.5}])}}]


def chats(server: Server, steering: dict[str, Any]) -> list[str]:
    """The likeliest reply to each of the questions."""
    chat = {"model": "smollm2", "max_tokens": 12, "temperature": 0, **steering}
    answers = [server.ask("/v1/chat/completions", {**chat, "messages": [{"role": "user", "content": text}]}) for text in QUESTIONS]
    assert [status for status, _ in answers] == [200, 200], answers
    return [answer["choices"][0]["message"]["content"] for _, answer in answers]


@pytest.mark.parametrize("steering", WAYS)
def test_whatever_route_is_asked_steers_alike(server: Server, steering: dict[str, Any]) -> None:
    """Responses, chats in a batch, and several choices of one chat: as the same chats one by one."""
    expected = chats(server, steering)
    assert not set(expected) & set(chats(server, {}))

    status, answer = server.ask("/v1/responses", {"model": "smollm2", "input": QUESTIONS[0], "max_output_tokens": 12, "temperature": 0, **steering})
    assert status == 200, answer
    assert [part["text"] for one in answer["output"] for part in one["content"]] == expected[:1]

    conversations = [[{"role": "user", "content": text}] for text in QUESTIONS]
    chat = {"model": "smollm2", "max_tokens": 12, **steering}
    status, answer = server.ask("/v1/chat/completions/batch", {**chat, "messages": conversations, "temperature": 0})
    assert status == 200, answer
    assert [choice["message"]["content"] for choice in answer["choices"]] == expected

    likeliest = {"n": 2, "top_k": 1}  # vLLM wants n = 1 at temperature 0
    status, answer = server.ask("/v1/chat/completions", {**chat, "messages": conversations[0], **likeliest})
    assert status == 200, answer
    assert [choice["message"]["content"] for choice in answer["choices"]] == expected[:1] * 2


@pytest.mark.parametrize("path", ["/v1/chat/completions/batch", "/v1/responses"])
@pytest.mark.parametrize(("more", "says"), [({"custom": {"steer_multiplier": 99}}, "outside the declared range"), ({"steering": 1}, "write it into")])
def test_other_routes_refuse_what_cannot_be_met(server: Server, path: str, more: dict[str, Any], says: str) -> None:
    asked = {"messages": [[{"role": "user", "content": "Hello"}]]} if "chat" in path else {"input": "Hello"}
    status, answer = server.ask(path, {"model": "smollm2", **asked, **more})
    assert status == 400 and says in answer["error"]["message"]


@pytest.mark.parametrize("left", [60, 3, 0, -1, -3000])
def test_a_trials_conversation_that_fills_the_context_is_known_to(server: Server, reference: SteeredModel, left: int) -> None:
    """vLLM itself cuts a reply off where the context ends, and says so of a prompt that is longer."""
    context = server.ask("/v1/models")[1]["data"][0]["max_model_len"]
    words = context - left - len(reference.prompt_tokens([{"role": "user", "content": "word"}])) + 1
    messages = [{"role": "user", "content": " ".join(["word"] * words)}]
    assert len(reference.prompt_tokens(messages)) == context - left

    async def reply() -> str:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            ask = Ask(messages, [{"vector": "warm", "multiplier": 1.0}], Conduct(temperature=0, max_tokens=50), 0, "a")
            return "".join([said.text async for said in ServerSpeaker(client, "smollm2").reply(ask)])

    if left >= 50:
        assert asyncio.run(reply())
    else:
        with pytest.raises(Full):
            asyncio.run(reply())


def test_a_request_that_names_the_content_gets_that_content_or_nothing(server: Server) -> None:
    [listed] = [one for one in server.ask("/v1/relseek/vectors")[1]["vectors"] if one["name"] == "warm"]
    plain = [{"vector": "warm", "multiplier": 1.5}]
    status, answer = server.complete([5, 6, 7], [{**plain[0], "sha256": listed["sha256"]}])
    assert status == 200 and answer["choices"][0]["token_ids"] == server.complete([5, 6, 7], plain)[1]["choices"][0]["token_ids"]
    status, answer = server.complete([5, 6, 7], [{**plain[0], "sha256": "0" * 64}])
    assert status == 400 and "was asked for" in answer["error"]["message"]


def test_a_conversation_is_steered_as_the_reference_steers_it(server: Server, reference: SteeredModel, vector_folder: tuple[Path, Any]) -> None:
    conversation = [{"role": "user", "content": "I had a long day. What should I cook?"}]
    chat = {"model": "smollm2", "messages": conversation, "max_tokens": 12, "temperature": 0, "return_token_ids": True}
    _, answer = server.ask("/v1/chat/completions", {**chat, "custom": {"steer_multiplier": -1.25}})
    assert answer["prompt_token_ids"] == reference.prompt_tokens(conversation)
    interventions = [{"vector": "warm", "layers": [14], "multiplier": -1.25}]
    _, short = shortfall(reference, answer["prompt_token_ids"], answer["choices"][0]["token_ids"], hooked(interventions, vector_folder[1]))
    assert short.max() < NEAR_TIE


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("interventions", "says"),
    [
        ('[{"vector": "nobody"}]', "no vector 'nobody'; there is"),
        ('[{"vector": "warm", "multiplier": 20.5}]', "outside the declared range -20 to 20"),
        ('[{"vector": "warm", "multiplier": NaN}]', "outside the declared range"),
        ('[{"vector": "warm", "multiplier": 1e400}]', "outside the declared range"),
        ('[{"vector": "warm", "multiplier": true}]', "must be a number"),
        ('[{"vector": "warm", "layers": [30]}]', "no steering after block 30"),
        ('[{"vector": "many", "layers": [3]}]', "blocks 8 to 15"),
        ('[{"vector": "warm", "dose": 1}]', "unknown 'dose'"),
        ('[{"vector": "warm", "mode": "floor"}]', "needs a threshold"),
        ("[" * 20_000, "not valid JSON"),
        ("nothing", "not valid JSON"),
        ([1, 2], "expected an object"),
        (7, "expected a JSON list"),
    ],
)
def test_what_cannot_be_met_is_refused_and_says_so(server: Server, interventions: Any, says: str, stream: bool) -> None:
    body = {"model": "smollm2", "prompt": [1, 2, 3], "max_tokens": 1, "stream": stream, "vllm_xargs": {"relseek": interventions}}
    status, answer = server.ask("/v1/completions", body)
    assert status == 400, answer
    assert says in answer["error"]["message"]


@pytest.mark.parametrize(
    ("path", "more", "says"),
    [
        ("/v1/chat/completions", {"custom": {"steer_multiplier": 99}}, "outside the declared range"),
        ("/v1/chat/completions", {"custom": {"steer_multiplier": "1"}}, "must be a number"),
        ("/v1/chat/completions", {"custom": {"multiplier": 1}}, "steer_multiplier"),
        ("/v1/chat/completions", {"custom": 1}, "steer_multiplier"),
        ("/v1/chat/completions", {"relseek": []}, "vllm_xargs"),
        ("/v1/chat/completions", {"use_beam_search": True, "n": 2, "custom": {"steer_multiplier": 1}}, "beam search"),
        ("/v1/chat/completions", {"custom": {"steer_multiplier": 1}, "vllm_xargs": {"relseek": "[]"}}, "twice"),
        ("/v1/chat/completions", {"vllm_xargs": {"relseek_steering": "[]"}}, "the server's own"),
        ("/v1/chat/completions", {"vllm_xargs": {"steer_multiplier": 1.5}}, "unknown 'steer_multiplier'"),
        ("/v1/chat/completions", {"vllm_xargs": {"relseeks": "[]"}}, "unknown 'relseeks'"),
        ("/v1/chat/completions", {"vllm_xarg": {"relseek": "[]"}}, "write it into vllm_xargs"),
        ("/v1/chat/completions", {"steer_multiplier": 1.5}, "write it into vllm_xargs"),
        ("/v1/chat/completions", {"extra_body": {"custom": {"steer_multiplier": 1.5}}}, "write it into vllm_xargs"),
        ("/v1/chat/completions", {"extra_body": {"vllm_xargs": {"relseek": "[]"}}}, "write it into vllm_xargs"),
        ("/v1/chat/completions", {"cache_salt": "relseek:1"}, "the server's own"),
        ("/v1/chat/completions", {"stop": ["\ud800"]}, "surrogate"),
        ("/v1/chat/completions", {"vllm_xargs": {"x": "\ud800"}}, "surrogate"),
        ("/v1/messages", {"custom": {"steer_multiplier": 1}}, "cannot be steered"),
        ("/tokenize", {"vllm_xargs": {"relseek": "[]"}}, "cannot be steered"),
        ("/invocations", b'{"vllm_xargs": {"\\u0072elseek": "[]"}}', "cannot be steered"),
    ],
)
def test_no_way_of_asking_is_dropped_without_a_word(server: Server, path: str, more: Any, says: str) -> None:
    chat = {"model": "smollm2", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 2}
    body = more if isinstance(more, bytes) else {**chat, **more}
    status, answer = server.ask(path, body)
    assert status == 400, answer
    assert says in answer["error"]["message"]


def test_a_vector_is_registered_while_the_server_runs(server: Server, reference: SteeredModel, vector_folder: tuple[Path, Any]) -> None:
    steering = [{"vector": "later", "layers": [20], "multiplier": -1.0}]
    assert server.complete([5, 6, 7], steering)[0] == 400
    assert server.ask("/v1/relseek/vectors", {"name": "later", "file": "cold.safetensors"})[0] == 200
    assert server.ask("/v1/relseek/vectors", {"name": "later", "file": "cold.safetensors"})[0] == 200
    worst = compared(server, reference, {"later": vector_folder[1]["cold"]}, [([5, 6, 7, 8], steering)], 1)
    assert max(worst.values()) < 1e-4
    status, answer = server.ask("/v1/relseek/vectors", {"name": "later", "file": "warm.safetensors"})
    assert status == 400 and "stands for another vector" in answer["error"]["message"]
    _, listed = server.ask("/v1/relseek/vectors")
    assert {"later", "warm", "many"} <= {one["name"] for one in listed["vectors"]}


def test_only_safetensors_of_the_declared_folder_are_read(server: Server, tmp_path: Path) -> None:
    import torch

    folder = server.vectors
    (folder / "empty.safetensors").write_bytes(b"")
    torch.save(torch.ones(576), folder / "pickled.pt")
    os.rename(folder / "pickled.pt", folder / "pickled.safetensors")
    torch.save(torch.ones(576), folder / "plain.pt")
    outside = tmp_path / "outside.safetensors"
    outside.write_bytes((folder / "warm.safetensors").read_bytes())
    (folder / "link.safetensors").symlink_to(outside)
    refused = [
        "../x.safetensors",
        str(outside),
        "link.safetensors",
        "empty.safetensors",
        "pickled.safetensors",
        "plain.pt",
        ".",
        "",
        "a\0b",
        3,
        None,
    ]
    for file in refused:
        status, answer = server.ask("/v1/relseek/vectors", {"name": "new", "file": file})
        assert status == 400, (file, answer)
    for body in (b"{", b"[]", b'{"name": "new"}', b'{"name": "../new", "file": "warm.safetensors"}'):
        assert server.ask("/v1/relseek/vectors", body)[0] == 400
    assert "new" not in {one["name"] for one in server.ask("/v1/relseek/vectors")[1]["vectors"]}


@pytest.mark.parametrize(
    ("vector", "says"),
    [(np.ones(7, np.float32), "vectors of width 7; the model's residual stream needs 576"), (np.zeros(576, np.float32), "nothing but zeros")],
)
def test_a_vector_that_could_not_steer_is_refused(server: Server, vector: np.ndarray, says: str) -> None:
    write_vectors(server.vectors / "unfit.safetensors", "safetensors", {14: vector}, {})
    status, answer = server.ask("/v1/relseek/vectors", {"name": "unfit", "file": "unfit.safetensors"})
    assert status == 400 and says in answer["error"]["message"]


def test_health_measures_that_steering_is_live(server: Server) -> None:
    status, found = server.ask("/v1/relseek/health")
    assert status == 200 and found["live"]
    for vector in found["vectors"]:
        assert vector["largest_change"]["0"] < 1e-4 < 1e-2 < vector["largest_change"]["20"]
    assert server.ask("/v1/relseek/health?vector=nobody")[0] == 404


def test_a_reply_is_steered_to_its_end_whatever_joins_its_batch(server: Server, reference: SteeredModel, vector_folder: tuple[Path, Any]) -> None:
    """A long reply at one dose, while others with doses of their own come and go beside it."""
    rng = random.Random(4)
    steering = [{"vector": "warm", "layers": [14], "multiplier": 1.75}]
    prompt = [rng.randrange(20, 49000) for _ in range(20)]
    stop = threading.Event()

    def beside() -> None:
        own = random.Random(threading.get_ident())
        while not stop.is_set():
            server.complete([own.randrange(20, 49000) for _ in range(10)], drawn(own), max_tokens=own.randrange(1, 5))

    others = [threading.Thread(target=beside) for _ in range(4)]
    for other in others:
        other.start()
    try:
        _, answer = server.complete(prompt, steering, max_tokens=80, ignore_eos=True)
    finally:
        stop.set()
        for other in others:
            other.join()
    choice = answer["choices"][0]
    own, short = shortfall(reference, prompt, choice["token_ids"], hooked(steering, vector_folder[1]))
    assert len(own) == 80
    assert np.abs(own - choice["logprobs"]["token_logprobs"]).max() < 1e-4
    assert short.max() < NEAR_TIE


def test_tensor_parallel_serves_the_same(tmp_path: Path, reference: SteeredModel, vector_folder: tuple[Path, Any]) -> None:
    """Three workers: the model has nine heads and three of keys and values."""
    with serving(tmp_path, vector_folder[0], "--enforce-eager", "--tensor-parallel-size", "3") as server:
        worst = compared(server, reference, vector_folder[1], random_requests(REQUESTS, 5, reference.tokenizer), CLIENTS)
        assert max(worst.values()) < 1e-4
        assert server.metric("vllm:prefix_cache_hits_total") > 0
        assert server.ask("/v1/relseek/health")[1]["live"]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory, vector_folder: tuple[Path, Any]) -> Iterator[Server]:
    """A server as it is started on GPUs, its model compiled, with a rate; eager mode is the other tests' affair."""
    with serving(tmp_path_factory.mktemp("compiled"), vector_folder[0], configuration={"rate": COMPILED_RATE}) as found:
        yield found


def test_a_compiled_model_serves_the_same(compiled: Server, reference: SteeredModel, vector_folder: tuple[Path, Any]) -> None:
    assert "enforce_eager=False" in compiled.log.read_text()
    worst = compared(compiled, reference, vector_folder[1], random_requests(16, 6, reference.tokenizer), 16)
    assert max(worst.values()) < 1e-4


def test_a_rate_holds_on_every_way_in_and_large_bodies_are_refused(compiled: Server) -> None:
    body = {"model": "smollm2", "prompt": "Hello", "max_tokens": 1}
    status, answer = compiled.ask("/invocations", b"x" * (50 << 20))
    assert status == 413 and "larger than" in answer["error"]["message"]
    statuses = [compiled.ask(path, body)[0] for _ in range(COMPILED_RATE) for path in ("/v1/completions", "/tokenize")]
    assert set(statuses) == {200, 429}
    assert compiled.ask("/health")[0] == 200


def test_a_server_whose_routes_are_left_out_does_not_start(tmp_path: Path, vector_folder: tuple[Path, Any]) -> None:
    with pytest.raises(RuntimeError, match="set VLLM_PLUGINS=relseek"), serving(tmp_path, vector_folder[0], "--enforce-eager", plugins=None):
        pass
