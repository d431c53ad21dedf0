"""The cache and the attention of decoding give what transformers' own give, without their copies."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache, FalconConfig, FalconForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from relseek_resources.models import Sampling, SteeredModel, decoding


@settings(max_examples=60, deadline=None)
@given(
    prompt=st.integers(1, 9),
    steps=st.lists(st.integers(1, 2), max_size=12),
    drops=st.lists(st.integers(0, 4), max_size=12),
    spare=st.integers(0, 4),
)
def test_a_growing_cache_holds_what_transformers_own_does(prompt: int, steps: list[int], drops: list[int], spare: int) -> None:
    generator = torch.Generator().manual_seed(prompt)
    ours, theirs = decoding._Growing(), DynamicCache().layer_class_to_replicate()
    rows = 5
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decoding, "SPARE", spare)
        for number, length in enumerate([prompt, *steps]):
            new = [torch.randn(rows, 2, length, size, generator=generator) for size in (4, 3)]
            for found, expected in zip(ours.update(*new), theirs.update(*new), strict=True):
                assert torch.equal(found, expected)
            if number < len(drops) and rows > 1:
                keep = torch.tensor([row for row in range(rows) if row != drops[number] % rows])
                rows -= 1
                ours.batch_select_indices(keep)
                theirs.batch_select_indices(keep)
            assert ours.get_seq_length() == theirs.get_seq_length()
            assert torch.equal(ours.keys, theirs.keys) and torch.equal(ours.values, theirs.values)


def test_a_step_leaves_the_past_where_it_is() -> None:
    layer = decoding._Growing()
    keys, _ = layer.update(torch.ones(2, 1, 7, 4), torch.ones(2, 1, 7, 4))
    for _ in range(decoding.SPARE):
        longer, _ = layer.update(torch.ones(2, 1, 1, 4), torch.ones(2, 1, 1, 4))
        assert longer.data_ptr() == keys.data_ptr()
    moved, _ = layer.update(torch.ones(2, 1, 1, 4), torch.ones(2, 1, 1, 4))
    assert moved.data_ptr() != keys.data_ptr() and moved.shape[2] == 7 + decoding.SPARE + 1


@pytest.mark.parametrize("heads", [2, 6])
@pytest.mark.parametrize("queries", [1, 3])
@pytest.mark.parametrize("masked", [False, True])
def test_queries_that_share_keys_attend_as_if_each_had_its_own(heads: int, queries: int, masked: bool) -> None:
    generator = torch.Generator().manual_seed(heads)
    query = torch.randn(3, heads, queries, 8, generator=generator)
    key, value = (torch.randn(3, 2, 11, 8, generator=generator) for _ in range(2))
    mask = (torch.rand(3, 1, queries, 11, generator=generator) < 0.7) | (torch.arange(11) == 10) if masked or queries > 1 else None
    module = SimpleNamespace(num_key_value_groups=heads // 2)
    with decoding.grouped_attention():
        found, _ = decoding._attend(module, query, key, value, mask, scaling=0.3)
    expected, _ = sdpa_attention_forward(module, query, key, value, mask, scaling=0.3)
    assert torch.allclose(found, expected, atol=1e-6)


def test_generation_decodes_with_both_and_leaves_the_model_as_it_was(tiny_llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    attended, grown = [], []
    attend, update = decoding._attend, decoding._Growing.update

    def seen(module: Any, query: Any, *more: Any, **options: Any) -> Any:
        attended.append((query.shape[2], decoding._grouped.get()))
        return attend(module, query, *more, **options)

    monkeypatch.setitem(decoding.AttentionInterface._global_mapping, "sdpa", seen)
    monkeypatch.setattr(decoding._Growing, "update", lambda *a, **k: grown.append(a[1].shape[2]) or update(*a, **k))
    tiny_llama.generate([[{"role": "user", "content": "Hi"}]] * 2, Sampling(temperature=0, max_new_tokens=3))
    assert attended[-1] == (1, True) and grown[-1] == 1 and len(attended) == len(grown) == 3 * tiny_llama.layers
    assert not decoding._grouped.get()


@pytest.mark.parametrize("settings", [{}, {"multi_query": False}, {"new_decoder_architecture": True, "num_kv_heads": 2}])
def test_a_model_that_asks_for_its_attention_by_name_replies_as_in_transformers(settings: dict[str, Any], byte_tokenizer: Any) -> None:
    """Falcon computes attention itself, otherwise where its name is not sdpa: under another name its replies were others, without an error."""
    torch.manual_seed(0)
    config = FalconConfig(vocab_size=262, hidden_size=64, num_hidden_layers=3, num_attention_heads=4, alibi=False, pad_token_id=0, **settings)
    falcon = FalconForCausalLM(config).eval()
    falcon.generation_config.eos_token_id = falcon.generation_config.pad_token_id = 0
    model = SteeredModel(falcon, byte_tokenizer)
    prompts = [[9, 33, 120], list(range(20, 90)), [7]]
    found = model.generate_tokens(prompts, Sampling(temperature=0, max_new_tokens=12))
    for prompt, reply in zip(prompts, found, strict=True):
        alone = falcon.generate(torch.tensor([prompt]), max_new_tokens=len(reply.tokens), do_sample=False)[0, len(prompt) :]
        assert list(reply.tokens) == alone.tolist()
