"""Streams that are kept, recomputed or taken over from an earlier run: training cannot tell which."""

from __future__ import annotations

import resource
import signal

import pytest
import torch

from relseek_assets.vectors import stream_cache
from relseek_assets.vectors.bipo import log_ratios
from relseek_assets.vectors.objective import Pair
from relseek_assets.vectors.stream_cache import Scratch, cache_pairs
from relseek_resources.models import ModelError
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
    """How many tokens each pass below the trained blocks held, without those of the check of packing."""
    found: list[int] = []
    run_to, check = tiny_llama.run_to, stream_cache._check_packing

    def counted(batch, *arguments, **options):
        found.append(batch.ids.shape[1])
        return run_to(batch, *arguments, **options)

    def unchecked(*arguments):
        before = len(found)
        check(*arguments)
        del found[before:]

    monkeypatch.setattr(tiny_llama, "run_to", counted)
    monkeypatch.setattr(stream_cache, "_check_packing", unchecked)
    return found


def test_streams_on_disk_are_those_in_memory_bit_for_bit(tiny_llama, pairs, tmp_path):
    memory, disk = cached(tiny_llama, pairs, None), cached(tiny_llama, pairs, Scratch(tmp_path, "1", EVERYTHING))
    for layer in LAYERS:
        assert torch.equal(disk.streams[layer].values, memory.streams[layer].values)
        (file,) = tmp_path.glob(f"pairs.*.L{layer:02d}.stream")
        assert file.stat().st_size == disk.streams[layer].values.nbytes
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
    assert passes == [sum(whole.streams[1].ends[pair + 1] - whole.streams[1].ends[pair] for pair in rows if not kept[pair])], "and nothing besides"
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


@pytest.mark.parametrize("change", ["version", "pairs", "layers", "killed before the end", "a stream is gone", "a stream is cut"])
def test_what_was_made_from_something_else_or_only_in_part_is_made_again(tiny_llama, pairs, tmp_path, passes, change):
    cached(tiny_llama, pairs, Scratch(tmp_path, "1", EVERYTHING))
    made = len(passes)
    if change == "killed before the end":
        next(tmp_path.glob("pairs.*.reference.safetensors")).unlink()
    stream = next(tmp_path.glob("pairs.*.L01.stream"))
    if change == "a stream is gone":
        stream.unlink()
    if change == "a stream is cut":
        stream.write_bytes(stream.read_bytes()[:1000])
    wanted = [*pairs[1:], pairs[0]] if change == "pairs" else pairs
    layers = (*LAYERS, 3) if change == "layers" else LAYERS
    pool = cached(tiny_llama, wanted, Scratch(tmp_path, "2" if change == "version" else "1", EVERYTHING), layers)
    assert len(passes) > made
    assert torch.equal(pool.streams[1].values, cached(tiny_llama, wanted, None, layers).streams[1].values)


def test_a_pass_over_other_pairs_that_was_killed_leaves_the_first_one_to_be_made_again(tiny_llama, pairs, tmp_path, monkeypatch):
    """Inputs change, the pass over the new ones is killed, and the inputs change back."""
    first = cached(tiny_llama, pairs, Scratch(tmp_path, "1", EVERYTHING))
    expected = {layer: first.streams[layer].values.clone() for layer in LAYERS}
    with monkeypatch.context() as patched:
        patched.setattr("relseek_assets.vectors.stream_cache._compute", killed)
        with pytest.raises(KeyboardInterrupt):
            cached(tiny_llama, pairs[::-1], Scratch(tmp_path, "1", EVERYTHING))
    again = cached(tiny_llama, pairs, Scratch(tmp_path, "1", EVERYTHING))
    for layer in LAYERS:
        assert torch.equal(again.streams[layer].values, expected[layer])
        assert torch.equal(first.streams[layer].values, expected[layer]), "and a run that maps the old file keeps it"
    assert {path.name.split(".")[1] for path in tmp_path.glob("pairs.*")} == {next(tmp_path.glob("*.reference.safetensors")).name.split(".")[1]}


def killed(_model, pairs, rows) -> None:
    for layer in LAYERS:
        pairs.streams[layer].of(rows[0]).fill_(1.0)
    raise KeyboardInterrupt


def test_a_full_disk_is_an_error_that_names_the_file_and_leaves_none(tiny_llama, pairs, tmp_path):
    """The limit on a file's size stands in for the disk's; the process that feels it is another one, since SIGXFSZ is for the whole of it."""
    limit, before = 2000, resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
        with pytest.raises(StorageError, match=r"L01\.stream: cannot hold .* GB of streams .* lower compute\.cache_gb"):
            cached(tiny_llama, pairs, Scratch(tmp_path, "1", EVERYTHING))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_streams_that_take_more_than_a_smaller_budget_make_room(tiny_llama, pairs, tmp_path, passes, share):
    whole = cached(tiny_llama, pairs, Scratch(tmp_path, "1", EVERYTHING))
    budget, made = int(share * whole.bytes), len(passes)
    pool = cached(tiny_llama, pairs, Scratch(tmp_path, "1", budget))
    assert len(passes) > made and pool.bytes <= budget
    assert sum(path.stat().st_size for path in tmp_path.glob("*.stream")) == pool.bytes
    assert torch.equal(pool.reference, whole.reference)
    made = len(passes)
    again = cached(tiny_llama, pairs, Scratch(tmp_path, "1", budget))
    assert len(passes) == made and again.bytes == pool.bytes, "and what is left is taken over"


def test_a_family_that_mixes_tokens_outside_attention_is_refused(byte_tokenizer, pairs):
    from transformers import MambaConfig, MambaForCausalLM

    from relseek_resources.models import SteeredModel

    torch.manual_seed(1)
    settings = {"vocab_size": len(byte_tokenizer), "hidden_size": 64, "num_hidden_layers": 4, "initializer_range": 0.5, "pad_token_id": 0}
    mamba = SteeredModel(MambaForCausalLM(MambaConfig(**settings)), byte_tokenizer)
    with pytest.raises(ModelError, match="MambaForCausalLM: .*(packed rows|mix tokens)"):
        cached(mamba, pairs, None)


class Neighbours(torch.nn.Module):
    """An MLP that adds a part of the token before."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, stream: torch.Tensor) -> torch.Tensor:
        return self.inner(stream) + 0.5 * stream.roll(1, dims=1)


def test_an_mlp_that_cannot_leave_tokens_out_is_refused(random_causal_lm, byte_tokenizer, pairs):
    """Replies of one token let a whole packed row pass: what the MLP of the last block looks at is where it looks for it."""
    from relseek_resources.models import SteeredModel

    short = [Pair(pair.name, pair.prompt, pair.chosen, "") for pair in pairs]
    model = SteeredModel(random_causal_lm("llama"), byte_tokenizer)
    cached(model, short, None)
    model.blocks[-1].mlp = Neighbours(model.blocks[-1].mlp)
    prompts, replies = ([model.prompt_tokens(pair.prompt) for pair in short[:2]], [[[7, 8, 9], [5]]] * 2)
    packed = model.pack(prompts, replies)
    alone = model.score_tokens([prompts[0], prompts[0], prompts[1], prompts[1]], [reply for both in replies for reply in both])
    whole = model.packed_log_probs(model.hidden(packed), packed)
    torch.testing.assert_close(whole.detach(), torch.tensor([value for score in alone for value in score.log_probs]), atol=1e-3, rtol=0)
    with pytest.raises(ModelError, match="LlamaForCausalLM: .* differ by .* nats a token"):
        cached(model, short, None)


def test_an_mlp_that_knows_how_many_tokens_there_are_is_refused(random_causal_lm, byte_tokenizer, pairs):
    from relseek_resources.models import SteeredModel

    model = SteeredModel(random_causal_lm("llama"), byte_tokenizer)
    mlp = model.blocks[-1].mlp
    prepared = model.blocks[-1].post_attention_layernorm

    def remember(_module, inputs):
        mlp.tokens = inputs[0].shape[1]

    prepared.register_forward_pre_hook(remember)
    forward = mlp.forward
    mlp.forward = lambda stream: forward(stream) + torch.zeros(mlp.tokens, 64)
    with pytest.raises(ModelError, match="LlamaForCausalLM: its blocks do not run on packed rows"):
        cached(model, pairs, None)


def test_pairs_whose_replies_are_the_same_are_left_out_and_counted(tiny_llama, pairs):
    same = Pair("same", pairs[0].prompt, "Yes", "Yes")
    pool = cached(tiny_llama, [pairs[0], same, *pairs[1:]], None)
    assert pool.names == [pair.name for pair in pairs] and pool.tokens.alike == 1 and pool.too_long == 0


def test_a_scratch_folder_that_cannot_be_made_is_an_error_that_names_it(tiny_llama, pairs, tmp_path):
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(StorageError, match=r"taken.*cannot hold"):
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
