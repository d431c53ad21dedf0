"""Scores, partial forward passes and activations are those of the plain transformers model, whatever the batch."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from relseek_resources.models import ModelError, SteeredModel

SYSTEM = {"role": "system", "content": "Be brief."}
CONVERSATIONS = [
    [{"role": "user", "content": "Hi"}],
    [SYSTEM, {"role": "user", "content": "How do I bake bread?"}, {"role": "assistant", "content": "Slowly."}, {"role": "user", "content": "Why?"}],
    [SYSTEM, {"role": "user", "content": "Rain?"}],
]
REPLIES = ["Hello to you, my friend.", "It rises.", "é\n"]


def template(conversation: list[dict[str, str]]) -> str:
    """The tiny models' prompt, written out by hand."""
    return "<begin>" + "".join(f"<{turn['role']}>{turn['content']}<end>" for turn in conversation) + "<assistant>"


def tokens(model: SteeredModel, text: str) -> list[int]:
    return model.tokenizer(text, add_special_tokens=False)["input_ids"]


@torch.no_grad()
def naive_log_probs(model: SteeredModel, prompt: list[int], reply: list[int]) -> list[float]:
    """Log-probability of each reply token: one row, one full forward of the transformers model, a log-softmax in float64."""
    logits = model.model(input_ids=torch.tensor([prompt + reply])).logits[0].double()
    return [torch.log_softmax(logits[len(prompt) + index - 1], -1)[token].item() for index, token in enumerate(reply)]


def random_rows(seed: int, rows: int = 6) -> tuple[list[list[int]], list[list[int]]]:
    """Random prompts of 3 to 40 tokens and replies of 1 to 12."""
    random = np.random.default_rng(seed)
    return tuple([random.integers(6, 262, random.integers(low, high)).tolist() for _ in range(rows)] for low, high in ((3, 41), (1, 13)))


def random_vector(seed: int = 0) -> torch.Tensor:
    return torch.randn(64, generator=torch.Generator().manual_seed(seed))


# --- scores -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("end", [True, False])
def test_a_score_is_the_log_softmax_of_the_models_own_logits(tiny, end):
    scores = tiny.score(CONVERSATIONS, REPLIES, end=end, batch_size=2)
    for conversation, reply, score in zip(CONVERSATIONS, REPLIES, scores, strict=True):
        expected = naive_log_probs(tiny, tokens(tiny, template(conversation)), tokens(tiny, reply + "<end>" * end))
        np.testing.assert_allclose(score.log_probs, expected, atol=1e-4)
        assert score.total == pytest.approx(sum(expected), abs=1e-3)
        assert score.mean == pytest.approx(sum(expected) / len(expected), abs=1e-4)


def test_scores_do_not_depend_on_the_batch_that_a_row_shares(tiny):
    prompts, replies = random_rows(1, rows=7)
    for batch_size in (1, 3, 7):
        scores = tiny.score_tokens(prompts, replies, batch_size=batch_size)
        for prompt, reply, score in zip(prompts, replies, scores, strict=True):
            np.testing.assert_allclose(score.log_probs, naive_log_probs(tiny, prompt, reply), atol=1e-4)


def test_every_scored_row_is_reported_once(tiny_llama):
    reported = []
    tiny_llama.score_tokens(*random_rows(2, rows=7), batch_size=3, on_batch=reported.append)
    assert reported == [3, 3, 1]


@pytest.mark.parametrize(
    ("prompts", "replies", "message"), [([[7]], [[]], "row 0: a reply without tokens"), ([[7], []], [[7], [7]], "row 1: a prompt without tokens")]
)
def test_rows_without_tokens_are_refused_by_number(tiny_llama, prompts, replies, message):
    with pytest.raises(ModelError, match=message):
        tiny_llama.score_tokens(prompts, replies)
    with pytest.raises(ModelError, match=message):
        tiny_llama.score_doses(prompts, replies, random_vector(), 1, [1.0])


@pytest.mark.parametrize("conversation", [[], [SYSTEM], [*CONVERSATIONS[0], {"role": "assistant", "content": "Hello"}]])
def test_a_prompt_that_does_not_end_on_a_user_turn_is_refused(tiny_llama, conversation):
    with pytest.raises(ModelError, match="must end on a user turn"):
        tiny_llama.score([conversation], ["x"])


# --- all doses at once ------------------------------------------------------------------------------------------------

DOSES = [0.0, 1.0, -2.5, 20.0]


@pytest.mark.parametrize("layer", [0, 2, 3])
def test_scores_at_all_doses_equal_those_of_a_steered_model_dose_by_dose(tiny, layer):
    prompts, replies = random_rows(3)
    vector = random_vector()
    found = tiny.score_doses(prompts, replies, vector, layer, DOSES, batch_size=4)
    assert list(found) == DOSES
    for dose in DOSES:
        with tiny.steer(vector, layer, dose):
            expected = tiny.score_tokens(prompts, replies, batch_size=4)
        for row, score in enumerate(found[dose]):
            np.testing.assert_allclose(score.log_probs, expected[row].log_probs, atol=1e-4)
    assert abs(found[1.0][0].total - found[0.0][0].total) > 1e-2, "the dose changes nothing that this test could see"


def test_the_dose_zero_is_bit_for_bit_the_plain_model(tiny):
    prompts, replies = random_rows(4)
    assert tiny.score_doses(prompts, replies, random_vector(), 1, [3.0, 0.0])[0.0] == tiny.score_tokens(prompts, replies)


def test_every_row_is_reported_once_a_dose(tiny_llama):
    reported = []
    tiny_llama.score_doses(*random_rows(5, rows=5), random_vector(), 1, [1.0, 2.0, 3.0], batch_size=2, on_batch=reported.append)
    assert sum(reported) == 15


@pytest.mark.parametrize(
    ("vector", "layer", "dose", "message"),
    [
        (torch.full((64,), torch.nan), 1, 1.0, "NaN"),
        (torch.ones(63), 1, 1.0, r"needs \(64,\)"),
        (torch.ones(64), 4, 1.0, "blocks 0 to 3"),
        (torch.ones(64), 1, float("nan"), "finite"),
    ],
)
def test_doses_of_what_cannot_steer_are_refused(tiny_llama, vector, layer, dose, message):
    with pytest.raises(ModelError, match=message):
        tiny_llama.score_doses([[7, 8]], [[9]], vector, layer, [dose])


@pytest.mark.parametrize("active_layer", [0, 1, 2])
def test_doses_come_on_top_of_a_vector_that_is_active_already(tiny_llama, active_layer):
    prompts, replies = random_rows(6)
    active, vector = random_vector(1), random_vector(2)
    with tiny_llama.steer(active, active_layer, 2.0):
        found = tiny_llama.score_doses(prompts, replies, vector, 1, [1.5])[1.5]
    shifts = {active_layer: 2.0 * active}
    shifts[1] = shifts.get(1, 0) + 1.5 * vector
    handles = [tiny_llama.model.model.layers[layer].register_forward_hook(lambda _m, _a, out, by=by: out + by) for layer, by in shifts.items()]
    expected = [naive_log_probs(tiny_llama, prompt, reply) for prompt, reply in zip(prompts, replies, strict=True)]
    for handle in handles:
        handle.remove()
    for score, values in zip(found, expected, strict=True):
        np.testing.assert_allclose(score.log_probs, values, atol=1e-4)


def test_doses_on_top_of_per_row_multipliers_keep_each_multiplier_at_its_row(tiny_llama):
    prompts, replies = random_rows(7, rows=3)
    active, vector, multipliers = random_vector(1), random_vector(2), [3.0, 0.0, -3.0]
    with tiny_llama.steer(active, 0, multipliers):
        found = tiny_llama.score_doses(prompts, replies, vector, 1, [1.0])[1.0]
    for row, multiplier in enumerate(multipliers):
        with tiny_llama.steer(active, 0, multiplier), tiny_llama.steer(vector, 1, 1.0):
            expected = naive_log_probs(tiny_llama, prompts[row], replies[row])
        np.testing.assert_allclose(found[row].log_probs, expected, atol=1e-4)


# --- partial forward passes -------------------------------------------------------------------------------------------


@pytest.fixture
def padded(tiny):
    prompts, _ = random_rows(8, rows=4)
    return tiny.batch(prompts)


@torch.no_grad()
def test_the_stream_after_a_block_is_transformers_hidden_state_bit_for_bit(tiny, padded):
    expected = tiny.model(input_ids=padded.ids, attention_mask=padded.mask, position_ids=padded.positions, output_hidden_states=True).hidden_states
    streams, end = tiny.run_to(padded, [2, 0, 3], to_end=True)
    assert torch.equal(streams[0], expected[1]) and torch.equal(streams[2], expected[3])
    assert torch.equal(tiny.model.model.norm(streams[3]), expected[4])  # transformers' last hidden state is normalised
    assert torch.equal(end, expected[4])


@torch.no_grad()
@pytest.mark.parametrize("layer", [0, 1, 3])
def test_running_to_a_block_and_from_it_is_the_whole_forward_bit_for_bit(tiny, padded, layer):
    streams, end = tiny.run_to(padded, [layer])
    assert end is None
    assert torch.equal(tiny.run_from(padded, layer, streams[layer]), tiny.hidden(padded))


@torch.no_grad()
def test_running_to_a_block_runs_nothing_above_it_and_running_from_it_nothing_below(random_causal_lm, byte_tokenizer):
    model = SteeredModel(random_causal_lm("gemma3"), byte_tokenizer)
    batch = model.batch([[7, 8, 9]])
    whole, stream = model.hidden(batch), model.run_to(batch, [1])[0][1]

    def forbid(blocks: slice) -> None:
        for block in model.model.model.layers:
            vars(block.self_attn).pop("forward", None)
        for block in model.model.model.layers[blocks]:
            block.self_attn.forward = lambda *_args, **_kwargs: pytest.fail("a block ran for nothing")

    forbid(slice(2, None))
    assert torch.equal(model.run_to(batch, [0, 1])[0][1], stream)
    forbid(slice(0, 2))
    assert torch.equal(model.run_from(batch, 1, stream), whole)


def test_a_partial_pass_that_fails_leaves_the_model_whole(tiny_llama):
    batch = tiny_llama.batch([[7, 8, 9]])
    before = tiny_llama.hidden(batch)
    with pytest.raises(RuntimeError):
        tiny_llama.run_from(batch, 1, torch.zeros(1, 3, 63))
    with pytest.raises(ModelError, match="layer 4"):
        tiny_llama.run_to(batch, [1, 4])
    with pytest.raises(ModelError, match="layer 4"):
        tiny_llama.run_from(batch, 4, torch.zeros(1, 3, 64))
    assert torch.equal(tiny_llama.hidden(batch), before)


@pytest.mark.parametrize("layer", [0, 1, 3])
def test_gradients_through_the_upper_blocks_equal_those_of_a_whole_forward_with_a_hook(tiny, padded, layer):
    weights = torch.randn(*padded.ids.shape, 262, generator=torch.Generator().manual_seed(9)) * padded.mask.unsqueeze(-1)

    def gradient(logits: torch.Tensor, vector: torch.Tensor) -> torch.Tensor:
        return torch.autograd.grad((torch.log_softmax(logits, -1) * weights).sum(), vector)[0]

    hooked = random_vector().requires_grad_()
    handle = tiny.model.model.layers[layer].register_forward_hook(lambda _module, _args, output: output + hooked)
    logits = tiny.model(input_ids=padded.ids, attention_mask=padded.mask, position_ids=padded.positions).logits
    handle.remove()
    expected = gradient(logits, hooked)

    vector = random_vector().requires_grad_()
    with torch.no_grad():
        stream = tiny.run_to(padded, [layer])[0][layer]
    found = gradient(tiny.logits(tiny.run_from(padded, layer, stream + vector)), vector)
    assert expected.norm() > 1
    assert (found - expected).norm() < 1e-5 * expected.norm()


# --- activations ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def naive_hidden_states(model: SteeredModel, ids: list[int]) -> tuple[torch.Tensor, ...]:
    return tuple(state[0] for state in model.model(input_ids=torch.tensor([ids]), output_hidden_states=True).hidden_states)


def test_activations_are_hidden_states_at_the_last_prompt_token(tiny):
    found = tiny.activations(CONVERSATIONS, [2, 0], batch_size=2)
    assert found.shape == (3, 2, 64) and found.dtype == np.float32
    for row, conversation in enumerate(CONVERSATIONS):
        prompt = tokens(tiny, template(conversation))
        assert prompt[-1] == tiny.tokenizer.convert_tokens_to_ids("<assistant>")
        states = naive_hidden_states(tiny, prompt)
        for place, layer in enumerate([2, 0]):
            np.testing.assert_allclose(found[row, place], states[layer + 1][-1], atol=1e-4)


def test_activations_of_replies_are_means_over_the_replies_tokens(tiny):
    found = tiny.activations(CONVERSATIONS, [0, 2], REPLIES, batch_size=2)
    for row, (conversation, reply) in enumerate(zip(CONVERSATIONS, REPLIES, strict=True)):
        prompt, answer = tokens(tiny, template(conversation)), tokens(tiny, reply)
        states = naive_hidden_states(tiny, prompt + answer)
        for place, layer in enumerate([0, 2]):
            np.testing.assert_allclose(found[row, place], states[layer + 1][-len(answer) :].mean(0), atol=1e-4)


def test_activations_of_the_last_block_are_read_before_the_final_norm(tiny):
    found = tiny.activations(CONVERSATIONS[:1], [3])[0, 0]
    normed = naive_hidden_states(tiny, tokens(tiny, template(CONVERSATIONS[0])))[4][-1]
    with torch.no_grad():
        torch.testing.assert_close(tiny.model.model.norm(torch.from_numpy(found)), normed, atol=1e-4, rtol=0)
    assert np.abs(found - normed.numpy()).max() > 0.1


def test_activations_under_steering_shift_by_the_vector_at_its_block_and_not_below(tiny_llama):
    vector = random_vector()
    plain = tiny_llama.activations(CONVERSATIONS, [0, 1, 2])
    with tiny_llama.steer(vector, 1, 2.0):
        steered = tiny_llama.activations(CONVERSATIONS, [0, 1, 2])
    assert np.array_equal(steered[:, 0], plain[:, 0])
    np.testing.assert_allclose(steered[:, 1] - plain[:, 1], np.tile(2.0 * vector, (3, 1)), atol=1e-5)
    assert np.abs(steered[:, 2] - plain[:, 2] - 2.0 * vector.numpy()).max() > 0.1


def test_activations_of_a_reply_without_tokens_are_refused(tiny_llama):
    with pytest.raises(ModelError, match="row 1: a reply without tokens"):
        tiny_llama.activations(CONVERSATIONS[:2], [1], ["There is one.", ""])
