"""What the vLLM plugin refuses at the start of a server and at its doors; nothing here needs vLLM."""

from __future__ import annotations

from types import SimpleNamespace as Settings
from typing import Any

import pytest

from relseek_resources.serving import plugin
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
