"""Streams that are kept, recomputed or taken over from an earlier run: training cannot tell which."""

from __future__ import annotations

import pytest
import torch

from relseek_assets.vectors.bipo import log_ratios
from relseek_assets.vectors.objective import Pair
from relseek_assets.vectors.stream_cache import Scratch, cache_pairs
from relseek_resources.storage import StorageError

LAYERS = (1, 2)
EVERYTHING = 2**40


@pytest.fixture
def pairs() -> list[Pair]:
    prompts = ["Hi", "What is rain made of, and why?", "Help me", "One more?", "Is it late?"]
    return [
        Pair(f"p{number}", [{"role": "user", "content": text}], "Gladly, my friend!" * (number + 1), "No.") for number, text in enumerate(prompts)
    ]


def cached(model, pairs, scratch, layers=LAYERS):
    return cache_pairs(model, pairs, layers, count=0, max_tokens=500, scratch=scratch)


def gradient(model, pool, rows, layer=1):
    vector = torch.linspace(-0.3, 0.3, 64).requires_grad_()
    ratios = log_ratios(model, pool, layer, rows, vector)
    return ratios.detach(), torch.autograd.grad(ratios[:, 0].sum() - ratios[:, 1].sum(), vector)[0]


@pytest.fixture
def passes(tiny_llama, monkeypatch) -> list[int]:
    """How many tokens each pass below the trained blocks held."""
    found: list[int] = []
    run_to = tiny_llama.run_to

    def counted(batch, *arguments, **options):
        found.append(batch.ids.shape[1])
        return run_to(batch, *arguments, **options)

    monkeypatch.setattr(tiny_llama, "run_to", counted)
    return found


def test_streams_on_disk_are_those_in_memory_bit_for_bit(tiny_llama, pairs, tmp_path):
    memory, disk = cached(tiny_llama, pairs, None), cached(tiny_llama, pairs, Scratch(tmp_path, "1", EVERYTHING))
    for layer in LAYERS:
        assert torch.equal(disk.streams[layer].values, memory.streams[layer].values)
        assert (tmp_path / f"pairs.L{layer:02d}.stream").stat().st_size == disk.streams[layer].values.nbytes
    assert torch.equal(disk.reference, memory.reference)


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_what_the_budget_leaves_out_is_recomputed_to_the_same_gradient(tiny_llama, pairs, tmp_path, passes, share):
    whole = cached(tiny_llama, pairs, None)
    needed = sum(whole.streams[layer].values.nbytes for layer in LAYERS)
    pool = cached(tiny_llama, pairs, Scratch(tmp_path, "1", int(share * needed)))
    kept = [pair in pool.streams[1] for pair in range(len(pairs))]
    assert sum(path.stat().st_size for path in tmp_path.glob("*.stream")) <= share * needed
    assert any(kept) == (share > 0) and not all(kept)
    passes.clear()
    rows = [4, 0, 2]
    ratios, found = gradient(tiny_llama, pool, rows)
    assert len(passes) == 1
    expected_ratios, expected = gradient(tiny_llama, whole, rows)
    torch.testing.assert_close(ratios, expected_ratios, atol=1e-4, rtol=0)
    assert expected.norm() > 1e-2 and (found - expected).norm() < 1e-5 * expected.norm()


def test_a_second_run_takes_over_what_is_there(tiny_llama, pairs, tmp_path, passes):
    first = cached(tiny_llama, pairs, Scratch(tmp_path, "1", EVERYTHING))
    made = len(passes)
    assert made
    again = cached(tiny_llama, pairs, Scratch(tmp_path, "1", EVERYTHING))
    one_layer = cached(tiny_llama, pairs, Scratch(tmp_path, "1", EVERYTHING), layers=(2,))
    assert len(passes) == made, "no pass is made again"
    assert torch.equal(again.reference, first.reference) and torch.equal(one_layer.streams[2].values, first.streams[2].values)


@pytest.mark.parametrize("change", ["version", "pairs", "layers", "killed before the end"])
def test_what_was_made_from_something_else_or_only_in_part_is_made_again(tiny_llama, pairs, tmp_path, passes, change):
    cached(tiny_llama, pairs, Scratch(tmp_path, "1", EVERYTHING))
    made = len(passes)
    if change == "killed before the end":
        (tmp_path / "pairs.reference.safetensors").unlink()
    wanted = [*pairs[1:], pairs[0]] if change == "pairs" else pairs
    layers = (*LAYERS, 3) if change == "layers" else LAYERS
    pool = cached(tiny_llama, wanted, Scratch(tmp_path, "2" if change == "version" else "1", EVERYTHING), layers)
    assert len(passes) > made
    assert torch.equal(pool.streams[1].values, cached(tiny_llama, wanted, None, layers).streams[1].values)


def test_a_scratch_folder_that_cannot_be_made_is_an_error_that_names_it(tiny_llama, pairs, tmp_path):
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(StorageError, match="taken.*cannot hold"):
        cached(tiny_llama, pairs, Scratch(tmp_path / "taken", "1", EVERYTHING))


def test_streams_of_a_half_precision_model_are_kept_as_they_are_and_the_gradient_is_float32(random_causal_lm, byte_tokenizer, pairs, tmp_path):
    from relseek_resources.models import SteeredModel

    plain = SteeredModel(random_causal_lm("llama"), byte_tokenizer)
    half = SteeredModel(random_causal_lm("llama").bfloat16(), byte_tokenizer)
    pool = cached(half, pairs, Scratch(tmp_path, "1", EVERYTHING))
    assert pool.streams[1].values.dtype == torch.bfloat16
    _, found = gradient(half, pool, [0, 1, 2])
    _, expected = gradient(plain, cached(plain, pairs, None), [0, 1, 2])
    assert found.dtype == torch.float32
    assert torch.nn.functional.cosine_similarity(found, expected, dim=0) > 0.99
