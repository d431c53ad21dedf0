"""A packed row gives every prompt and reply the numbers that rows of their own would give them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers

from relseek_resources.models import ModelError, SteeredModel
from relseek_resources.models.packed import Tree, mlp_at

PROMPTS = ["Hi", "How do I bake bread without an oven at home?", "Tell me about rain."]
REPLIES = [("Hello there!", "What?"), ("Use a pan.", "No idea, sorry about that, ask a baker.", "Buy it"), ("It falls.",)]


def tokens(model, replies=REPLIES):
    prompts = [model.prompt_tokens([{"role": "user", "content": text}]) for text in PROMPTS]
    return prompts, [[model.reply_tokens(text) for text in several] for several in replies]


def alone(model, prompts, replies):
    """Log-probabilities of every reply's tokens, each reply in a row of its own by the transformers model itself."""
    found = []
    for prompt, several in zip(prompts, replies, strict=True):
        for reply in several:
            logits = model.model(input_ids=torch.tensor([[*prompt, *reply]])).logits[0].log_softmax(-1)
            found += [logits[len(prompt) + place - 1, token] for place, token in enumerate(reply)]
    return torch.stack(found)


@torch.no_grad()
def test_log_probs_of_replies_that_share_a_prompt_are_those_of_rows_of_their_own(tiny):
    prompts, replies = tokens(tiny)
    packed = tiny.pack(prompts, replies)
    assert packed.ids.shape[1] == sum(map(len, prompts)) + sum(len(reply) for several in replies for reply in several), "no padding, each prompt once"
    found = tiny.packed_log_probs(tiny.hidden(packed), packed)
    torch.testing.assert_close(found, alone(tiny, prompts, replies), atol=1e-4, rtol=0)


@torch.no_grad()
def test_steering_reaches_every_token_of_a_packed_row(tiny):
    prompts, replies = tokens(tiny)
    packed, vector = tiny.pack(prompts, replies), torch.randn(64, generator=torch.Generator().manual_seed(3))
    with tiny.steer(vector, 1, 1.5):
        found = tiny.packed_log_probs(tiny.hidden(packed), packed)
        expected = alone(tiny, prompts, replies)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    assert (found - tiny.packed_log_probs(tiny.hidden(packed), packed)).abs().max() > 0.1


@torch.no_grad()
def test_a_packed_row_can_be_taken_up_after_any_block(tiny):
    packed = tiny.pack(*tokens(tiny))
    streams, hidden = tiny.run_to(packed, [0, 2], to_end=True)
    for layer in (0, 2):
        torch.testing.assert_close(tiny.run_from(packed, layer, streams[layer]), hidden, atol=1e-5, rtol=0)


@pytest.mark.parametrize("layer", [0, 2, 3])
def test_the_last_mlp_can_leave_out_what_no_reply_token_needs(tiny, layer):
    packed, vector = tiny.pack(*tokens(tiny)), torch.full((64,), 0.1, requires_grad=True)
    stream = tiny.run_to(packed, [layer])[0][layer].detach() + vector
    weights, mlp, seen = torch.linspace(-1, 1, len(packed.targets)), tiny.blocks[-1].mlp, []
    handle = mlp.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0].shape[1]))
    try:
        whole = tiny.packed_log_probs(tiny.run_from(packed, layer, stream), packed)
        found = tiny.packed_log_probs_from(packed, layer, stream)
    finally:
        handle.remove()
    torch.testing.assert_close(found, whole, atol=1e-5, rtol=0)
    expected, gradient = (torch.autograd.grad((each * weights).sum(), vector)[0] for each in (whole, found))
    assert expected.norm() > 1e-2
    assert (gradient - expected).norm() < 1e-5 * expected.norm()
    # each prompt's last token and all tokens of a reply but its last
    if layer < 3:
        assert seen == [packed.ids.shape[1], len(PROMPTS) + sum(length - 1 for length in packed.reply_lengths)]
    assert tiny.blocks[-1].mlp is mlp


FURTHER = {
    "PhiForCausalLM": ("PhiConfig", {}),  # attention and MLP beside each other
    "GPTNeoXForCausalLM": ("GPTNeoXConfig", {}),
    "Qwen3MoeForCausalLM": ("Qwen3MoeConfig", {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 16}),
    "MixtralForCausalLM": ("MixtralConfig", {"num_local_experts": 4, "num_experts_per_tok": 2}),
}


@pytest.mark.parametrize("family", FURTHER)
def test_blocks_of_other_shapes_leave_out_no_more_than_that(family, byte_tokenizer):
    config, special = FURTHER[family]
    settings = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2}
    ends = {"pad_token_id": byte_tokenizer.pad_token_id, "bos_token_id": byte_tokenizer.bos_token_id, "eos_token_id": byte_tokenizer.eos_token_id}
    with torch.random.fork_rng():
        torch.manual_seed(20)
        settings |= {"vocab_size": len(byte_tokenizer), "initializer_range": 0.15, **ends, **special}
        model = SteeredModel(getattr(transformers, family)(getattr(transformers, config)(**settings)).eval(), byte_tokenizer)
    prompts, replies = tokens(model)
    packed = model.pack(prompts, replies)
    stream = model.run_to(packed, [0])[0][0].detach().requires_grad_()
    whole, found = model.packed_log_probs(model.run_from(packed, 0, stream), packed), model.packed_log_probs_from(packed, 0, stream)
    torch.testing.assert_close(found.detach(), alone(model, prompts, replies).detach(), atol=1e-4, rtol=0)
    expected, gradient = (torch.autograd.grad(each.sum(), stream)[0] for each in (whole, found))
    assert expected.norm() > 1e-2
    assert (gradient - expected).norm() < 1e-5 * expected.norm()


class Scaled(torch.nn.Module):
    """An MLP with more to take and to give than the stream: one number a token, one for all, and a tuple."""

    def forward(self, stream, a_token, *, everywhere):
        return stream * a_token * everywhere, "routing"


@pytest.mark.parametrize("shape", [(1, 6, 4), (6, 4)])
def test_an_mlp_with_further_arguments_gets_the_part_of_its_tokens_and_may_return_a_tuple(shape):
    stream, a_token = torch.randn(shape), torch.arange(1.0, 7.0).reshape(*shape[:-1], 1)
    block, places = torch.nn.Module(), torch.tensor([1, 4, 5])
    block.mlp = Scaled()
    with mlp_at(block, places):
        found, beside = block.mlp(stream, a_token, everywhere=3.0)
    expected = torch.zeros(shape)
    expected[..., places, :] = (stream * a_token * 3.0)[..., places, :]
    assert torch.equal(found, expected) and beside == "routing"


def test_the_last_mlp_is_the_models_own_again_after_an_error(tiny):
    mlp = tiny.blocks[-1].mlp
    with pytest.raises(RuntimeError, match="stop"):
        tiny.packed_log_probs_from(tiny.pack(*tokens(tiny)), 1, Failing())
    assert tiny.blocks[-1].mlp is mlp


def test_the_gradient_with_respect_to_the_stream_is_that_of_rows_of_their_own(tiny):
    prompts, replies = tokens(tiny)
    packed, vector = tiny.pack(prompts, replies), torch.zeros(64, requires_grad=True)
    weights = torch.linspace(-1, 1, len(packed.targets))
    handle = tiny.blocks[1].register_forward_hook(lambda _module, _inputs, stream: stream + vector)
    try:
        (expected,) = torch.autograd.grad((alone(tiny, prompts, replies) * weights).sum(), vector)
        (found,) = torch.autograd.grad((tiny.packed_log_probs(tiny.hidden(packed), packed) * weights).sum(), vector)
    finally:
        handle.remove()
    assert expected.norm() > 1e-2
    assert (found - expected).norm() < 1e-5 * expected.norm()


@torch.no_grad()
def test_the_models_own_attention_is_back_afterwards_even_after_an_error(tiny):
    before = tiny.model.config._attn_implementation
    batch = tiny.batch([tokens(tiny)[0][1]])
    expected = tiny.hidden(batch)
    tiny.hidden(tiny.pack(*tokens(tiny)))
    with pytest.raises(RuntimeError, match="stop"):
        tiny.run_from(tiny.pack(*tokens(tiny)), 1, Failing())
    assert tiny.model.config._attn_implementation == before
    assert torch.equal(tiny.hidden(batch), expected)


class Failing:
    """A stream that fails as soon as a block looks at it."""

    def __getattr__(self, name: str):
        raise RuntimeError("stop")


@pytest.mark.slow
def test_a_compiled_model_gives_the_same_numbers_and_gradient_and_is_itself_again_afterwards(tiny_llama):
    def found():
        packed, vector = tiny_llama.pack(*tokens(tiny_llama)), torch.full((64,), 0.1, requires_grad=True)
        stream = tiny_llama.run_to(packed, [1])[0][1].detach() + vector
        log_probs = tiny_llama.packed_log_probs_from(packed, 1, stream)
        return log_probs.detach(), torch.autograd.grad(log_probs.sum(), vector)[0]

    def compiled() -> set[str]:
        return {name for block in tiny_llama.blocks for name, part in block.named_children() if part._compiled_call_impl is not None}

    plain, plain_gradient = found()
    with tiny_llama.compiled(backend="aot_eager"):
        assert compiled() == {"mlp", "input_layernorm", "post_attention_layernorm"}
        quick, quick_gradient = found()
    assert not compiled()
    torch.testing.assert_close(quick, plain, atol=1e-5, rtol=0)
    torch.testing.assert_close(quick_gradient, plain_gradient, atol=1e-4, rtol=1e-5)


def test_the_logits_of_long_replies_are_made_in_pieces(tiny_llama, monkeypatch):
    packed = tiny_llama.pack(*tokens(tiny_llama))
    hidden = tiny_llama.hidden(packed).detach().requires_grad_()
    whole = tiny_llama.packed_log_probs(hidden, packed)
    (expected,) = torch.autograd.grad(whole.square().sum(), hidden)
    monkeypatch.setattr("relseek_resources.models.packed.LOGITS_AT_ONCE", 5 * len(tiny_llama.model.get_output_embeddings().weight))
    pieces = tiny_llama.packed_log_probs(hidden, packed)
    (found,) = torch.autograd.grad(pieces.square().sum(), hidden)
    torch.testing.assert_close(pieces, whole, atol=1e-6, rtol=0)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_log_probs_of_very_sure_logits_neither_overflow_nor_vanish(tiny_llama):
    packed = tiny_llama.pack(*tokens(tiny_llama))
    hidden = 1e4 * tiny_llama.hidden(packed).detach()
    found = tiny_llama.packed_log_probs(hidden, packed)
    logits = tiny_llama.model.get_output_embeddings()(hidden[0, packed.sources]).double().log_softmax(-1)
    expected = logits[torch.arange(len(packed.targets)), packed.targets]
    assert torch.isfinite(found).all()
    np.testing.assert_allclose(found.detach().numpy(), expected.detach().numpy(), rtol=1e-4)


def test_where_a_tree_says_its_replies_begin():
    assert Tree(start=7, prompt=3, replies=(4, 2, 5)).starts == [10, 14, 16]


@pytest.mark.parametrize(("prompts", "replies"), [([[]], [[[1]]]), ([[1]], [[[1], []]])])
def test_empty_prompts_and_replies_are_refused(tiny_llama, prompts, replies):
    with pytest.raises(ModelError, match="need a token"):
        tiny_llama.pack(prompts, replies)


def test_numbers_that_are_given_one_a_row_are_refused_because_all_is_one_row(tiny_llama):
    packed = tiny_llama.pack(*tokens(tiny_llama))
    with tiny_llama.steer(torch.ones(64), 1, [1.0, 2.0, 3.0]), pytest.raises(ModelError, match="3 multipliers but called with 1 rows"):
        tiny_llama.hidden(packed)
