"""What the vLLM plugin refuses at the start of a server and at its doors; nothing here needs vLLM."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from functools import reduce
from pathlib import Path
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
    alone = {"prefill_context_parallel_size": 1, "pipeline_parallel_size": 1, "data_parallel_size": 1}
    return Settings(**{"use_ubatching": False, **alone, **changed})


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
        ({"parallel_config": parallel(data_parallel_size=2)}, "put replicas behind a router"),
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


@pytest.mark.parametrize("attached", [[], [Settings(name="another")]])
def test_a_steering_server_without_the_plugins_routes_does_not_start(monkeypatch: pytest.MonkeyPatch, attached: list[Any]) -> None:
    load = plugin._with_endpoints(lambda *_: attached)
    monkeypatch.setitem(plugin._offered, "vectors", None)
    assert load(("generate",)) is attached, "a server that steers nobody needs no routes"
    monkeypatch.setitem(plugin._offered, "vectors", STEERS)
    with pytest.raises(ServingError, match="VLLM_PLUGINS=relseek"):
        load(("generate",))
    attached.append(Settings(name="relseek"))
    assert load(("generate",)) is attached


def test_the_plugin_is_there_to_refuse_where_reading_a_vector_needs_what_is_missing() -> None:
    """vLLM starts without a plugin that it cannot import: what its own image lacks must be missed later than that, aloud."""
    code = """
import sys
sys.modules.update(dict.fromkeys(("pandas", "pyarrow", "torch", "starlette", "safetensors")))  # their import fails
from relseek_resources.serving import plugin
from relseek_resources.serving.vectors import Configuration, Vectors
assert plugin.register
try:
    Vectors(Configuration.from_json({"folder": sys.argv[1], "vectors": {"a": "a.safetensors"}}), 1, 4)
except ImportError as error:
    print(error)
"""
    arguments = [sys.executable, "-c", code, str(Path(__file__).parent)]
    said = subprocess.run(arguments, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2]).stdout
    assert "pandas" in said or "pyarrow" in said


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
        ({"extra_body": {"custom": {"steer_multiplier": 1.5}}}, {}, "custom: write it into"),
        ({"extra_body": {"vllm_xargs": {"relseek": "[]"}}}, {}, "vllm_xargs: write it into"),
        ({"body": [{"extra": {"Steering": 1}}]}, {}, "Steering: write it into"),
        ({"metadata": {"arm": {"relseek": "[]"}}}, {}, "relseek: write it into"),
        ({"steer\ud800": 1}, {}, r"steer\ud800: write it into"),
        ({"x": {"relseek\0": 1}}, {}, r"relseek\x00: write it into"),
        ({}, {"steer\ud800": 1}, r"unknown 'steer\ud800'"),
        ({"x": reduce(lambda held, _: [held], range(5000), {"steer": 1})}, {}, "steer: write it into"),
    ],
)
def test_a_misspelt_request_for_steering_is_refused(beside: dict[str, Any], xargs: dict[str, Any], says: str) -> None:
    with pytest.raises(SteeringError) as refusal:
        plugin.check_words(beside, xargs, STEERS)
    assert says in str(refusal.value)
    str(refusal.value).encode()  # or nothing could be answered


def test_words_that_somebody_reads_are_not_refused() -> None:
    plugin.check_words({"custom": {"steer_multiplier": 1}, "metadata": {"arm": "steered"}}, {"relseek": "[]", "session_id": "a"}, STEERS)
    plugin.check_words({"metadata": {"steer_arm": "high", "custom": "a label"}}, {}, STEERS)
    plugin.check_words({}, {"ngram_size": 3}, STEERS, processors=["a custom logits processor"])
    plugin.check_words({"other": 1}, {"ngram_size": 3}, None)


@pytest.mark.parametrize("word", ["steer_multiplier", "relseeks"])
def test_a_misspelt_word_is_refused_on_every_way_into_the_engine(word: str) -> None:
    with pytest.raises(SteeringError, match=f"unknown '{word}'"):
        plugin.asked({word: "[]"}, None)


# --- before vLLM's own routes -------------------------------------------------------------------------------------------


def hung(*keys: str, **bounds: Any) -> Starlette:
    """A server that answers every request with its body, behind the plugin's doors."""

    async def echo(request: Request) -> PlainTextResponse:
        return PlainTextResponse((await request.body()).decode())

    methods = ["GET", "POST", "PUT", "DELETE"]
    app = Starlette(routes=[Route("/{path:path}", echo, methods=methods)])
    doors.hang(app, keys, Configuration.from_json(bounds))
    return app


def behind(*keys: str, **bounds: Any) -> TestClient:
    return TestClient(hung(*keys, **bounds))


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/invocations"])
def test_a_body_that_is_too_large_is_refused_on_every_route(path: str) -> None:
    client = behind(body=1000)
    assert client.post(path, content="x" * 1000).text == "x" * 1000
    answer = client.post(path, content="x" * 1001)
    assert answer.status_code == 413 and "larger than 1000 bytes" in answer.json()["error"]["message"]
    assert behind().post(path, content="x" * (Configuration.body + 1)).status_code == 413


def test_a_rate_is_that_of_a_key_or_of_an_address_and_what_a_machine_asks_by_the_clock_is_free() -> None:
    client = behind("one", "two", rate=2)
    statuses = [client.post("/v1/chat/completions", headers={"authorization": f"Bearer {key}"}).status_code for key in ("one", "one", "one", "two")]
    assert statuses == [200, 200, 429, 200]
    refusal = client.get("/v1/relseek/health", headers={"authorization": "Bearer one"})
    assert refusal.status_code == 429 and 1 <= int(refusal.headers["retry-after"]) <= 30
    keyless = behind(rate=2)
    assert [keyless.post("/invocations").status_code for _ in range(3)] == [200, 200, 429]
    assert {keyless.get(path).status_code for path in ("/health", "/metrics", "/") for _ in range(3)} == {200}
    assert {behind().post("/v1/chat/completions").status_code for _ in range(20)} == {200}


def test_a_body_that_does_not_come_is_not_waited_for() -> None:
    sent: list[Any] = []

    async def never() -> Any:
        await asyncio.Event().wait()

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/v1/chat/completions", "headers": [], "client": ("127.0.0.1", 1), "query_string": b""}
    asyncio.run(hung(patience=0.05)(scope, never, send))
    assert sent[0]["status"] == 408


def test_a_server_that_steers_nobody_is_bounded_by_nobody() -> None:
    app = Starlette()
    doors.hang(app, (), None)
    assert doors.Bounds not in [layer.cls for layer in app.user_middleware]


@pytest.mark.parametrize("bound", [{"rate": -1}, {"rate": 1.5}, {"rate": True}, {"body": 0}, {"body": "1"}, {"patience": float("inf")}])
def test_a_bound_that_is_none_is_refused(bound: dict[str, Any]) -> None:
    with pytest.raises(ServingError, match=f"`{next(iter(bound))}` must be"):
        Configuration.from_json(bound)


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
        '{"extra_body": {"custom": {"steer_multiplier": 1.5}}}',
        '{"extra_body": {"vllm_xargs": {"relseek": "[]"}}}',
    ],
)
def test_a_route_that_cannot_steer_refuses_however_it_is_asked(body: str) -> None:
    answer = behind().post("/invocations", content=body)
    assert answer.status_code == 400 and "/invocations cannot be steered" in answer.json()["error"]["message"]
    assert behind().post("/v1/chat/completions", content=body).text == body, "there the request classes read it"


@pytest.mark.parametrize(
    "body",
    [
        "",
        "{",
        "[1]",
        '{"messages": "a relseek that can steer"}',
        '{"vllm_xargs": {"session_id": "a"}}',
        '{"tools": [{"type": "custom", "custom": {"steering_angle": "number"}}]}',
    ],
)
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
