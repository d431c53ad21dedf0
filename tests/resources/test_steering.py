"""A steering vector enters the residual stream where it should, at every token, and leaves the model as it found it."""

from __future__ import annotations

from copy import deepcopy

import numpy as np
import pytest
import torch
from torch import nn

from relseek_resources.models import ModelError, Sampling, SteeredModel

TEXTS = ["Hi", "How do I bake bread without an oven at home?", "Tell me about rain."]


def asked(*texts: str) -> list[list[dict[str, str]]]:
    return [[{"role": "user", "content": text}] for text in texts]


def random_vector(seed: int = 0, width: int = 64) -> torch.Tensor:
    return torch.randn(width, generator=torch.Generator().manual_seed(seed))


def tokens_of(model: SteeredModel, text: str = TEXTS[1]) -> torch.Tensor:
    return torch.tensor([model.prompt_tokens(asked(text)[0])])


@torch.no_grad()
def logits_now(model: SteeredModel, ids: torch.Tensor | None = None) -> torch.Tensor:
    """What the transformers model itself answers at this moment, hooks and all."""
    return model.model(input_ids=tokens_of(model) if ids is None else ids).logits


def hooks_of(model: SteeredModel) -> list[list[int]]:
    return [list(module._forward_hooks) for module in model.model.modules()]


class Shift(nn.Module):
    def __init__(self, by: torch.Tensor) -> None:
        super().__init__()
        self.by = by

    def forward(self, stream: torch.Tensor) -> torch.Tensor:
        return stream + self.by


def with_vector_built_in(model: nn.Module, layer: int, added: torch.Tensor) -> nn.Module:
    """A copy of a model that was trained, so to say, with `added` as the bias of block `layer`'s MLP: there is no hook in it."""
    copy = deepcopy(model)
    block = copy.model.layers[layer]
    if hasattr(block, "post_feedforward_layernorm"):  # Gemma normalises the MLP's output before it joins the stream
        block.post_feedforward_layernorm = nn.Sequential(block.post_feedforward_layernorm, Shift(added))
    else:
        block.mlp.down_proj.bias = nn.Parameter(added)
    return copy


# --- where the vector enters ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("layer", "multiplier"), [(0, 1.0), (1, -2.5), (3, 4.0)])
def test_a_steered_model_answers_like_one_with_the_vector_as_a_bias_of_its_block(tiny, layer, multiplier):
    vector = random_vector()
    with torch.no_grad():
        expected = with_vector_built_in(tiny.model, layer, multiplier * vector)(input_ids=tokens_of(tiny)).logits
    with tiny.steer(vector, layer, multiplier):
        found = logits_now(tiny)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    assert (found - logits_now(tiny)).abs().max() > 0.1, "the vector changes nothing that this test could see"


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_the_next_block_reads_hidden_states_l_plus_one_plus_the_vector_at_every_token(tiny, layer):
    ids, vector, entering = tokens_of(tiny), random_vector(), {}
    with torch.no_grad():
        plain = tiny.model(input_ids=ids, output_hidden_states=True).hidden_states

    def remember(block: int):
        return lambda _module, args, kwargs: entering.update({block: args[0] if args else kwargs["hidden_states"]})

    handles = [tiny.model.model.layers[block].register_forward_pre_hook(remember(block), with_kwargs=True) for block in range(layer + 2)]
    try:
        with tiny.steer(vector, layer, 1.5):
            logits_now(tiny, ids)
    finally:
        for handle in handles:
            handle.remove()
    assert torch.equal(entering[layer], plain[layer]), "blocks up to l do not feel the vector"
    torch.testing.assert_close(entering[layer + 1], plain[layer + 1] + 1.5 * vector, atol=1e-6, rtol=0)


def test_vectors_are_taken_as_arrays_tensors_and_lists_alike(tiny_llama):
    vector = random_vector()
    answers = []
    for form in (vector, vector.double().numpy(), vector.tolist()):
        with tiny_llama.steer(form, 1, 2.0):
            answers.append(logits_now(tiny_llama))
    assert torch.equal(answers[0], answers[1]) and torch.equal(answers[0], answers[2])
    assert not torch.equal(answers[0], logits_now(tiny_llama))


def test_padding_does_not_reach_the_real_tokens_of_a_steered_row(tiny):
    prompts = [tiny.prompt_tokens(conversation) for conversation in asked(*TEXTS)]
    with tiny.steer(random_vector(), 1, 3.0):
        together = tiny.score_tokens(prompts, [[9, 10, 11]] * 3, batch_size=3)
        alone = [tiny.score_tokens([prompt], [[9, 10, 11]])[0] for prompt in prompts]
    np.testing.assert_allclose([row.log_probs for row in together], [row.log_probs for row in alone], atol=1e-4)


# --- multiplier zero --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("zero", [0, 0.0, -0.0, [0.0]])
def test_multiplier_zero_registers_no_hook_and_answers_bit_for_bit_like_the_plain_model(tiny, zero):
    plain = logits_now(tiny)
    hooks = hooks_of(tiny)
    with tiny.steer(random_vector(), 1, zero):
        assert hooks_of(tiny) == hooks
        assert torch.equal(logits_now(tiny), plain)
    with tiny.steer(random_vector(), 1, 1e-3):
        assert hooks_of(tiny) != hooks


def test_a_row_with_multiplier_zero_in_a_mixed_batch_is_bit_for_bit_the_plain_models(tiny):
    conversations, replies = asked(*TEXTS), ["so", "it rains", "well"]
    plain = tiny.score(conversations, replies, batch_size=3)
    with tiny.steer(random_vector(), 1, [2.0, 0.0, -2.0]):
        mixed = tiny.score(conversations, replies, batch_size=3)
    assert mixed[1].log_probs == plain[1].log_probs
    assert mixed[0].log_probs != plain[0].log_probs and mixed[2].log_probs != plain[2].log_probs


# --- one multiplier a row ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 2, 16])
def test_per_row_multipliers_score_like_runs_at_one_dose(tiny, batch_size):
    # Scoring sorts rows by length; every third row is long, so that a multiplier that stayed at its place would be seen.
    conversations = asked(*(TEXTS[index % 3] + "!" * index for index in range(7)))
    replies = [f"reply {index}" for index in range(7)]
    doses, vector = [2.0, -2.0, 0.0, 1.0, -1.0, 5.0, 0.5], random_vector()
    with tiny.steer(vector, 1, doses):
        mixed = tiny.score(conversations, replies, batch_size=batch_size)
    for row, dose in enumerate(doses):
        with tiny.steer(vector, 1, dose):
            (alone,) = tiny.score([conversations[row]], [replies[row]])
        np.testing.assert_allclose(mixed[row].log_probs, alone.log_probs, atol=1e-4)


def test_per_row_multipliers_generate_like_runs_at_one_dose(tiny):
    conversations, doses, vector = asked(*TEXTS, "Why?"), [4.0, 0.0, -4.0, 2.0], random_vector()
    sampling = Sampling(max_new_tokens=12)
    with tiny.steer(vector, 2, doses):
        mixed = tiny.generate(conversations, sampling, seeds=[5, 6, 7, 8], batch_size=3)
    for row, dose in enumerate(doses):
        with tiny.steer(vector, 2, dose):
            (alone,) = tiny.generate([conversations[row]], sampling, seeds=[5 + row])
        assert mixed[row].tokens == alone.tokens
        np.testing.assert_allclose(mixed[row].log_probs, alone.log_probs, atol=1e-4)
    assert tiny.generate(conversations[:1], sampling, seeds=[5])[0].log_probs != mixed[0].log_probs


def test_per_row_multipliers_reach_their_rows_in_activations(tiny_llama):
    vector, doses = random_vector(), [3.0, -1.0, 0.0]
    plain = tiny_llama.activations(asked(*TEXTS), [1])
    with tiny_llama.steer(vector, 1, doses):
        steered = tiny_llama.activations(asked(*TEXTS), [1], batch_size=2)
    np.testing.assert_allclose(steered[:, 0] - plain[:, 0], np.outer(doses, vector), atol=1e-5)


def test_after_a_call_in_small_batches_multipliers_belong_to_rows_in_their_given_order_again(tiny_llama):
    ids = tokens_of(tiny_llama).expand(3, -1)
    with tiny_llama.steer(random_vector(), 1, [3.0, -1.0, 0.5]):
        before = logits_now(tiny_llama, ids)
        tiny_llama.score(asked(*TEXTS), ["a", "b", "c"], batch_size=2)
        torch.testing.assert_close(logits_now(tiny_llama, ids), before)


# --- the model is restored --------------------------------------------------------------------------------------------


class Stop(Exception):
    pass


@pytest.mark.parametrize("ending", [None, Stop, KeyboardInterrupt, GeneratorExit])
def test_the_model_is_restored_however_the_block_ends(tiny_llama, ending):
    before, hooks = logits_now(tiny_llama), hooks_of(tiny_llama)
    try:
        with tiny_llama.steer(random_vector(), 1, 2.0):
            assert not torch.equal(logits_now(tiny_llama), before)
            if ending is not None:
                raise ending
    except (Stop, KeyboardInterrupt, GeneratorExit) as error:
        assert type(error) is ending
    assert torch.equal(logits_now(tiny_llama), before)
    assert hooks_of(tiny_llama) == hooks


def test_an_interrupt_in_the_middle_of_generation_leaves_the_model_plain_and_usable(tiny_llama):
    before = logits_now(tiny_llama)
    steps = iter(range(5))

    def interrupt(*_: object) -> None:
        if next(steps) == 4:
            raise KeyboardInterrupt

    handle = tiny_llama.model.model.norm.register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt), tiny_llama.steer(random_vector(), 1, [2.0, 1.0]):
        tiny_llama.generate(asked("Hi", "Ho"), Sampling(temperature=0, max_new_tokens=20))
    handle.remove()
    assert torch.equal(logits_now(tiny_llama), before)
    with tiny_llama.steer(random_vector(), 1, [2.0, 1.0, 0.5]):  # the interrupted batch's rows are forgotten too
        assert len(tiny_llama.generate(asked("a", "b", "c"), Sampling(temperature=0, max_new_tokens=2))) == 3


@pytest.mark.parametrize("inner_layer", [1, 2])
def test_nested_vectors_add_up_and_leave_one_by_one(tiny_llama, inner_layer):
    first, second, plain = random_vector(1), random_vector(2), logits_now(tiny_llama)
    with torch.no_grad():
        one = with_vector_built_in(tiny_llama.model, 1, 2 * first)
        both = with_vector_built_in(one, inner_layer, (2 * first if inner_layer == 1 else 0) - 3 * second)
        only_first, expected = (model(input_ids=tokens_of(tiny_llama)).logits for model in (one, both))
    with tiny_llama.steer(first, 1, 2.0):
        with tiny_llama.steer(second, inner_layer, -3.0):
            torch.testing.assert_close(logits_now(tiny_llama), expected, atol=1e-4, rtol=0)
        torch.testing.assert_close(logits_now(tiny_llama), only_first, atol=1e-4, rtol=0)
    assert torch.equal(logits_now(tiny_llama), plain)


def test_after_nested_vectors_have_left_no_count_of_multipliers_is_asked_for(tiny_llama):
    with tiny_llama.steer(random_vector(1), 1, [1.0, 2.0]), tiny_llama.steer(random_vector(2), 1, [1.0, 3.0]):
        assert len(tiny_llama.score(asked("Hi", "Ho"), ["a", "b"])) == 2
    assert len(tiny_llama.score(asked("Hi", "Ho", "Hey"), ["a", "b", "c"])) == 3


def test_the_same_vector_twice_counts_twice(tiny_llama):
    vector = random_vector()
    with tiny_llama.steer(vector, 1, 1.0), tiny_llama.steer(vector, 1, 1.0):
        twice = logits_now(tiny_llama)
    with tiny_llama.steer(vector, 1, 2.0):
        torch.testing.assert_close(twice, logits_now(tiny_llama), atol=1e-4, rtol=0)


# --- what is refused --------------------------------------------------------------------------------------------------

GOOD = [1.0] * 64


@pytest.mark.parametrize(
    ("vector", "layer", "multiplier", "message"),
    [
        ([float("nan")] * 64, 1, 1.0, "vector holds NaN"),
        ([1.0] * 63 + [float("inf")], 1, 1.0, "vector holds NaN or infinite"),
        ([1.0] * 63, 1, 1.0, r"shape \(63,\).*needs \(64,\)"),
        ([GOOD], 1, 1.0, r"shape \(1, 64\).*needs \(64,\)"),
        (GOOD, 4, 1.0, "layer 4: the model has the blocks 0 to 3"),
        (GOOD, -1, 1.0, "layer -1: the model has the blocks 0 to 3"),
        (GOOD, 1, float("nan"), "multiplier must be a finite number"),
        (GOOD, 1, [1.0, float("inf")], "multiplier must be a finite number"),
        (GOOD, 1, [[1.0], [2.0]], "multiplier must be a finite number or a row"),
    ],
)
def test_what_cannot_steer_is_refused_with_the_reason(tiny_llama, vector, layer, multiplier, message):
    with pytest.raises(ModelError, match=message), tiny_llama.steer(vector, layer, multiplier):
        pytest.fail("the block ran although nothing can be steered")


@pytest.mark.parametrize("doses", [[1.0, 2.0], [1.0, 2.0, 3.0, 4.0], [0.0, 0.0]])
@pytest.mark.parametrize("call", ["score", "generate", "activations"])
def test_another_number_of_multipliers_than_rows_is_refused(tiny_llama, call, doses):
    calls = {
        "score": lambda: tiny_llama.score(asked(*TEXTS), ["a", "b", "c"]),
        "generate": lambda: tiny_llama.generate(asked(*TEXTS), Sampling(temperature=0, max_new_tokens=1)),
        "activations": lambda: tiny_llama.activations(asked(*TEXTS), [1]),
    }
    with tiny_llama.steer(random_vector(), 1, doses), pytest.raises(ModelError, match=f"{len(doses)} multipliers.*3 rows"):
        calls[call]()


@pytest.mark.parametrize(("family", "name"), [("Cohere", "logit_scale"), ("Granite", "logits_scaling")])
def test_families_that_scale_their_logits_are_refused_instead_of_scored_wrongly(family, name, byte_tokenizer):
    import transformers

    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
    config = getattr(transformers, f"{family}Config")(vocab_size=262, pad_token_id=0, **shape, **{name: 0.25})
    with pytest.raises(ModelError, match=f"{name} is not supported"):
        SteeredModel(getattr(transformers, f"{family}ForCausalLM")(config), byte_tokenizer)


def test_a_model_without_one_clear_list_of_blocks_is_refused(random_causal_lm, byte_tokenizer):
    model = random_causal_lm("llama")
    model.model.second_list = nn.ModuleList(nn.Identity() for _ in range(4))
    with pytest.raises(ModelError, match="one list of 4 decoder blocks.*second_list.*cannot be steered"):
        SteeredModel(model, byte_tokenizer)
