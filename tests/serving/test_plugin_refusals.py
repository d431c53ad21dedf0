"""What the vLLM plugin refuses at the start of a server and at its doors; nothing here needs vLLM."""

from __future__ import annotations

from types import SimpleNamespace as Settings
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from starlette.testclient import TestClient

from relseek_resources.serving import doors, plugin
from relseek_resources.serving.requests import SteeringError
from relseek_resources.serving.vectors import Configuration, ServingError


def parallel(**changed: Any) -> Any:
    return Settings(**{"use_ubatching": False, "prefill_context_parallel_size": 1, "pipeline_parallel_size": 1, **changed})


def vllm_config(**changed: Any) -> Any:
    settings = {
        "additional_config": {"relseek": {}},
        "use_v2_model_runner": False,
        "parallel_config": parallel(),
        "lora_config": None,
        "cache_config": Settings(kv_sharing_fast_prefill=False),
        "kv_transfer_config": None,
        "speculative_config": None,
    }
    return Settings(**{**settings, **changed})


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"use_v2_model_runner": True}, "VLLM_USE_V2_MODEL_RUNNER=0"),
        ({"parallel_config": parallel(use_ubatching=True)}, "--enable-dbo"),
        ({"parallel_config": parallel(prefill_context_parallel_size=2)}, "prefill context parallelism"),
        ({"parallel_config": parallel(pipeline_parallel_size=2)}, "pipeline parallelism"),
        ({"lora_config": object()}, "--enable-lora"),
        ({"cache_config": Settings(kv_sharing_fast_prefill=True)}, "--kv-sharing-fast-prefill"),
        ({"kv_transfer_config": object()}, "KV connector"),
        ({"speculative_config": object()}, "speculative decoding"),
        ({"additional_config": {"relseek": {"vector": "a"}}}, "vector"),
    ],
)
def test_a_server_on_which_steering_would_be_wrong_does_not_start(changed: dict[str, Any], says: str) -> None:
    with pytest.raises(ServingError) as refusal:
        plugin.configured(vllm_config(**changed))
    assert says in str(refusal.value)


def test_without_a_configuration_any_setting_goes_and_steering_is_refused() -> None:
    assert plugin.configured(vllm_config(additional_config={}, use_v2_model_runner=True)) is None
    assert plugin.configured(vllm_config()) == Configuration()
    assert plugin.asked({}, None) == plugin.asked({"session_id": "a"}, None) == ""
    for extra in ({"relseek": "[]"}, {"relseek": {"custom": {"steer_multiplier": 1}}}):
        with pytest.raises(SteeringError, match="offers no vectors"):
            plugin.asked(extra, None)


def test_a_request_that_a_worker_finds_unread_is_not_served() -> None:
    assert plugin.steered(None) == plugin.steered(Settings(extra_args=None)) == plugin.steered(Settings(extra_args={"a": 1})) == ""
    assert plugin.steered(Settings(extra_args={"relseek_steering": "[]"})) == "[]"
    with pytest.raises(RuntimeError, match="unread"):
        plugin.steered(Settings(extra_args={"relseek": "[]"}))


def test_half_a_surrogate_pair_is_refused_in_words() -> None:
    plugin.check_text([["end", "\U0001f600"], {"relseek": "[]", "other": 1.5}])
    for said in ([["\ud800"], None], [None, {"x": "a\udfff"}], [[], {"\ud800": 1}]):
        with pytest.raises(SteeringError, match="surrogate"):
            plugin.check_text(said)


STEERS: Any = object()  # stands for a server's vectors, of which `check_words` asks only whether there are any


@pytest.mark.parametrize(
    ("beside", "xargs", "says"),
    [
        ({}, {"steer_multiplier": 1.5}, "unknown 'steer_multiplier'"),
        ({}, {"relseeks": "[]"}, "unknown 'relseeks'"),
        ({}, {"relseek": "[]", "dose": 1}, "unknown 'dose'"),
        ({"steer_multiplier": 1.5}, {}, "steer_multiplier: write it into vllm_xargs.relseek"),
        ({"relseek": []}, {}, "relseek: write it into"),
        ({"Steering": 1}, {}, "Steering: write it into"),
        ({"vllm_xarg": {"relseek": "[]"}}, {}, "relseek: write it into"),
        ({"customs": {"steer_multiplier": 1}}, {}, "steer_multiplier: write it into"),
    ],
)
def test_a_misspelt_request_for_steering_is_refused(beside: dict[str, Any], xargs: dict[str, Any], says: str) -> None:
    with pytest.raises(SteeringError) as refusal:
        plugin.check_words(beside, xargs, STEERS)
    assert says in str(refusal.value)


def test_words_that_somebody_reads_are_not_refused() -> None:
    plugin.check_words({"custom": {"steer_multiplier": 1}, "metadata": {"arm": "steered"}}, {"relseek": "[]", "session_id": "a"}, STEERS)
    plugin.check_words({}, {"ngram_size": 3}, STEERS, processors=["a custom logits processor"])
    plugin.check_words({"other": 1}, {"ngram_size": 3}, None)


@pytest.mark.parametrize("word", ["steer_multiplier", "relseeks"])
def test_a_misspelt_word_is_refused_on_every_way_into_the_engine(word: str) -> None:
    with pytest.raises(SteeringError, match=f"unknown '{word}'"):
        plugin.asked({word: "[]"}, None)


# --- before vLLM's own routes -------------------------------------------------------------------------------------------


def behind(*keys: str) -> TestClient:
    """A server that answers every request with its body, behind the plugin's doors."""

    async def echo(request: Request) -> PlainTextResponse:
        return PlainTextResponse((await request.body()).decode())

    methods = ["GET", "POST", "PUT", "DELETE"]
    app = Starlette(routes=[Route("/{path:path}", echo, methods=methods)])
    app.add_middleware(doors.NoSteeringElsewhere)
    app.add_middleware(doors.KeyEverywhere, keys=keys)
    return TestClient(app)


@pytest.mark.parametrize(
    "body",
    [
        '{"vllm_xargs": {"relseek": "[]"}}',
        r'{"vllm_xargs": {"\u0072elseek": "[]"}}',
        r'{"custom": {"steer\u005fmultiplier": 1}}',
        '{"vllm_xargs": {"steer_multiplier": 1}}',
        '{"vllm_xargs": {"relseeks": "[]"}}',
        '{"steer_multiplier": 1.5}',
        '{"relseek": []}',
    ],
)
def test_a_route_that_cannot_steer_refuses_however_it_is_asked(body: str) -> None:
    answer = behind().post("/invocations", content=body)
    assert answer.status_code == 400 and "/invocations cannot be steered" in answer.json()["error"]["message"]
    assert behind().post("/v1/chat/completions", content=body).text == body, "there the request classes read it"


@pytest.mark.parametrize("body", ["", "{", "[1]", '{"messages": "a relseek that can steer"}', '{"vllm_xargs": {"session_id": "a"}}'])
def test_other_bodies_reach_their_route_whole(body: str) -> None:
    assert behind().post("/tokenize", content=body).text == body


@pytest.mark.parametrize(
    ("path", "method"), [("/invocations", "POST"), ("/scale_elastic_ep", "POST"), ("/v1/chat/completions", "POST"), ("/x", "DELETE")]
)
def test_whatever_does_something_needs_the_key_where_there_is_one(path: str, method: str) -> None:
    client = behind("one", "two")
    for header in (None, "Bearer", "Bearer three", "Basic one", "one"):
        answer = client.request(method, path, headers={"authorization": header} if header else {})
        assert answer.status_code == 401 and "needs a key" in answer.json()["error"]["message"], header
    assert [client.request(method, path, headers={"authorization": one}).status_code for one in ("Bearer one", "bearer two")] == [200, 200]
    assert behind().request(method, path).status_code == 200 == client.get("/health").status_code


def test_the_keys_are_those_that_vllm_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "environment")
    assert doors.keys_of(Settings(api_key=["a", "b"])) == ["a", "b"]
    assert doors.keys_of(Settings(api_key=None)) == doors.keys_of(None) == ["environment"]
    monkeypatch.delenv("VLLM_API_KEY")
    assert doors.keys_of(Settings(api_key=None)) == []
