"""The cache and the attention of decoding give what transformers' own give, without their copies."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from relseek_resources.models import Sampling, decoding


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
    found, _ = decoding._attend(module, query, key, value, mask, scaling=0.3)
    expected, _ = sdpa_attention_forward(module, query, key, value, mask, scaling=0.3)
    assert torch.allclose(found, expected, atol=1e-6)


def test_generation_decodes_with_both_and_leaves_the_model_as_it_was(tiny_llama, monkeypatch) -> None:
    attended, grown = [], []
    attend, update = decoding._attend, decoding._Growing.update
    monkeypatch.setitem(
        decoding.AttentionInterface._global_mapping, decoding.ATTENTION, lambda *a, **k: attended.append(a[1].shape[2]) or attend(*a, **k)
    )
    monkeypatch.setattr(decoding._Growing, "update", lambda *a, **k: grown.append(a[1].shape[2]) or update(*a, **k))
    before = tiny_llama.model.config._attn_implementation
    tiny_llama.generate([[{"role": "user", "content": "Hi"}]] * 2, Sampling(temperature=0, max_new_tokens=3))
    assert before == tiny_llama.model.config._attn_implementation == "sdpa"
    assert attended[-1] == grown[-1] == 1 and len(attended) == len(grown) == 3 * tiny_llama.layers
