"""A reply is what its row alone would have got: the batch, the cache and the neighbours leave no trace in it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from relseek_resources.models import ModelError, Reply, Sampling, SteeredModel

# Prompts from shorter than the tiny models' sliding window (6 tokens) to many times as long.
TEXTS = ["", "Hi", "Tell me about rain.", "How do I bake bread? " * 4, "x", "Why is the sky blue at noon?", "ab" * 35, "No."]
STEPS = 12
GREEDY = Sampling(temperature=0, max_new_tokens=STEPS)


def asked(*texts: str) -> list[list[dict[str, str]]]:
    return [[{"role": "user", "content": text}] for text in texts]


@torch.inference_mode()
def next_logits(model: SteeredModel, tokens: Sequence[int]) -> torch.Tensor:
    """Logits of the next token: one row, no cache, no padding."""
    return model.model(input_ids=torch.tensor([list(tokens)])).logits[0, -1].double()


def naive_greedy(model: SteeredModel, prompt: list[int], ends: set[int], steps: int) -> list[int]:
    reply: list[int] = []
    while len(reply) < steps and not ends & set(reply):
        reply.append(int(next_logits(model, prompt + reply).argmax()))
    return reply


def assert_same_up_to_a_near_tie(model: SteeredModel, prompt: list[int], found: Sequence[int], expected: Sequence[int]) -> None:
    """Greedy replies may part only where the two likeliest tokens are closer than 1e-4, which rounding decides."""
    for place, (one, other) in enumerate(zip(found, expected, strict=False)):
        if one != other:
            first, second = next_logits(model, prompt + list(expected[:place])).topk(2).values.tolist()
            assert first - second < 1e-4, f"token {place} differs although the likeliest leads by {first - second:.2g}"
            return
    assert len(found) == len(expected)


@pytest.fixture(params=["llama", "mistral", "gemma2", "gemma3"])
def stopping(request, random_causal_lm, byte_tokenizer) -> SteeredModel:
    """A tiny model for which every ninth token ends a reply, so that rows of a batch finish at different steps."""
    model = random_causal_lm(request.param)
    model.generation_config.eos_token_id = list(range(6, 262, 9))
    return SteeredModel(model, byte_tokenizer)


# --- greedy -----------------------------------------------------------------------------------------------------------


def test_greedy_replies_are_the_argmax_of_whole_forwards_without_a_cache(tiny):
    replies = tiny.generate(asked(*TEXTS), GREEDY, batch_size=5)
    for conversation, reply in zip(asked(*TEXTS), replies, strict=True):
        prompt = tiny.prompt_tokens(conversation)
        assert_same_up_to_a_near_tie(tiny, prompt, reply.tokens, naive_greedy(tiny, prompt, {tiny.tokenizer.eos_token_id}, STEPS))


def test_greedy_replies_equal_transformers_own_generate(tiny):
    for conversation, reply in zip(asked(*TEXTS[1:4]), tiny.generate(asked(*TEXTS[1:4]), GREEDY), strict=True):
        ids = torch.tensor([tiny.prompt_tokens(conversation)])
        expected = tiny.model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=STEPS)[0, ids.shape[1] :]
        assert_same_up_to_a_near_tie(tiny, ids[0].tolist(), reply.tokens, expected.tolist())


def test_rows_that_finish_early_are_dropped_and_the_others_go_on_undisturbed(stopping):
    ends, sizes = set(range(6, 262, 9)) | {stopping.tokenizer.eos_token_id}, []
    handle = stopping.model.model.register_forward_pre_hook(lambda _module, _args, kwargs: sizes.append(len(kwargs["input_ids"])), with_kwargs=True)
    sampling = Sampling(max_new_tokens=30)
    replies = stopping.generate(asked(*TEXTS), sampling, seeds=range(8), batch_size=8)
    handle.remove()
    lengths = [len(reply.tokens) for reply in replies]
    assert len(set(lengths)) > 3, "the rows must end at different steps for this test to say anything"
    assert sizes == [sum(length > step for length in lengths) for step in range(max(lengths))]
    for row, reply in enumerate(replies):
        (alone,) = stopping.generate([asked(*TEXTS)[row]], sampling, seeds=[row])
        assert reply.tokens == alone.tokens
        np.testing.assert_allclose(reply.log_probs, alone.log_probs, atol=1e-4)
        assert reply.finished == (reply.tokens[-1] in ends) and not ends & set(reply.tokens[:-1])


def test_greedy_replies_that_stop_equal_naive_ones(stopping):
    ends = set(range(6, 262, 9)) | {stopping.tokenizer.eos_token_id}
    for conversation, reply in zip(asked(*TEXTS), stopping.generate(asked(*TEXTS), GREEDY), strict=True):
        prompt = stopping.prompt_tokens(conversation)
        assert_same_up_to_a_near_tie(stopping, prompt, reply.tokens, naive_greedy(stopping, prompt, ends, STEPS))


def test_a_finished_replys_text_leaves_out_the_token_that_ended_it(random_causal_lm, byte_tokenizer):
    model = SteeredModel(random_causal_lm("llama"), byte_tokenizer)
    (long,) = model.generate(asked("Hi"), GREEDY)
    assert not long.finished and len(long.tokens) == STEPS
    last = next(index for index in range(3, STEPS) if long.tokens[index] not in long.tokens[:index])
    model.model.generation_config.eos_token_id = long.tokens[last]
    (short,) = SteeredModel(model.model, byte_tokenizer).generate(asked("Hi"), GREEDY)
    assert short.finished and short.tokens == long.tokens[: last + 1]
    assert short.text == byte_tokenizer.decode(long.tokens[:last])


def test_padding_takes_no_position(tiny_llama):
    rows = [[7, 8, 9], [7], [7, 8]]
    right, left = tiny_llama.batch(rows), tiny_llama.batch(rows, left=True)
    assert right.mask.tolist() == [[1, 1, 1], [1, 0, 0], [1, 1, 0]] and left.mask.tolist() == [[1, 1, 1], [0, 0, 1], [0, 1, 1]]
    for batch in (right, left):
        for row, ids, mask, positions in zip(rows, batch.ids, batch.mask.bool(), batch.positions, strict=True):
            assert ids[mask].tolist() == row and positions[mask].tolist() == list(range(len(row)))
            assert set(ids[~mask].tolist()) <= {tiny_llama.tokenizer.pad_token_id}


def test_absolute_positions_are_right_in_a_padded_batch_too(byte_tokenizer):
    # Rotary families see distances only, so a shift by the padding would not show in them.
    import transformers

    config = transformers.GPT2Config(vocab_size=262, n_embd=32, n_layer=2, n_head=2, initializer_range=0.3, bos_token_id=1, eos_token_id=2)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = SteeredModel(transformers.GPT2LMHeadModel(config), byte_tokenizer)
    for conversation, reply in zip(asked(*TEXTS), model.generate(asked(*TEXTS), GREEDY), strict=True):
        prompt = model.prompt_tokens(conversation)
        assert_same_up_to_a_near_tie(model, prompt, reply.tokens, naive_greedy(model, prompt, {2}, STEPS))


# --- sampling ---------------------------------------------------------------------------------------------------------


def by_seed(model: SteeredModel, rows: Sequence[int], batch_size: int, **sampling: float) -> dict[int, Reply]:
    """Replies of eight rows with the seeds 100 to 107, asked for in the order `rows`."""
    conversations = asked(*(TEXTS[row] for row in rows))
    replies = model.generate(conversations, Sampling(max_new_tokens=15, **sampling), seeds=[100 + row for row in rows], batch_size=batch_size)
    return dict(zip(rows, replies, strict=True))


def test_a_sampled_reply_depends_on_its_own_seed_and_not_on_order_or_batch_size(tiny):
    expected = by_seed(tiny, range(8), batch_size=8, top_p=0.95)
    for rows, batch_size in ((range(8), 3), ([5, 2, 7, 0, 1, 6, 4, 3], 8), ([6, 1], 1)):
        found = by_seed(tiny, rows, batch_size, top_p=0.95)
        assert {row: reply.tokens for row, reply in found.items()} == {row: expected[row].tokens for row in rows}


def test_equal_rows_differ_by_seed_and_agree_with_equal_seeds(tiny_llama):
    replies = tiny_llama.generate(asked("Hi", "Hi", "Hi"), Sampling(max_new_tokens=15), seeds=[1, 2, 1])
    assert replies[0].tokens != replies[1].tokens and replies[0].tokens == replies[2].tokens


def test_a_shorter_limit_gives_the_beginning_of_the_longer_reply(tiny_llama):
    (long,), (short,) = (tiny_llama.generate(asked("Hi"), Sampling(max_new_tokens=most), seeds=[3]) for most in (15, 6))
    assert short.tokens == long.tokens[:6] and len(long.tokens) > 6


def test_first_tokens_over_many_seeds_follow_the_models_softmax(tiny_llama):
    from scipy.stats import chisquare

    replies = tiny_llama.generate(asked("Hi") * 2000, Sampling(max_new_tokens=1), seeds=range(2000), batch_size=500)
    expected = torch.softmax(next_logits(tiny_llama, tiny_llama.prompt_tokens(asked("Hi")[0])), -1).numpy()
    counts = np.bincount([reply.tokens[0] for reply in replies], minlength=262)
    rare = expected * 2000 < 5
    pooled = lambda values: np.append(values[~rare], values[rare].sum())  # noqa: E731
    assert chisquare(pooled(counts), pooled(expected) * 2000).pvalue > 0.01


def test_log_probs_of_generated_tokens_are_those_that_scoring_gives_them(stopping):
    vector = torch.randn(64, generator=torch.Generator().manual_seed(3))
    prompts = [stopping.prompt_tokens(conversation) for conversation in asked(*TEXTS)]
    with stopping.steer(vector, 1, np.linspace(-2, 2, 8)):
        replies = stopping.generate(asked(*TEXTS), Sampling(temperature=0.7, top_p=0.9, max_new_tokens=25), seeds=range(8), batch_size=3)
        scores = stopping.score_tokens(prompts, [reply.tokens for reply in replies])
    for reply, score in zip(replies, scores, strict=True):
        assert sum(reply.log_probs) == pytest.approx(score.total, abs=1e-3)
        np.testing.assert_allclose(reply.log_probs, score.log_probs, atol=1e-4)


def test_sampling_without_seeds_is_refused_and_greedy_needs_none(tiny_llama):
    with pytest.raises(ModelError, match="one seed a row.*temperature=0"):
        tiny_llama.generate(asked("Hi"))
    assert tiny_llama.generate(asked("Hi"), GREEDY)[0].tokens


@pytest.mark.parametrize("seeds", [[1, 2], [1, 2, 3, 4]])
def test_another_number_of_seeds_than_rows_is_refused(tiny_llama, seeds):
    with pytest.raises(ModelError, match="seed"):
        tiny_llama.generate(asked("a", "b", "c"), Sampling(max_new_tokens=1), seeds=seeds)


def test_every_reply_is_reported_once_and_no_rows_give_no_replies(tiny_llama):
    reported = []
    tiny_llama.generate(asked(*TEXTS), Sampling(temperature=0, max_new_tokens=1), batch_size=3, on_batch=reported.append)
    assert reported == [3, 3, 2]
    assert tiny_llama.generate([], GREEDY) == []


# --- a real model -----------------------------------------------------------------------------------------------------

on_one_worker = pytest.mark.xdist_group("embedded_model")

QUESTIONS = [
    "Hi",
    "What is the capital of France?",
    "Write a haiku about rain.",
    "List three fruits.",
    "Explain photosynthesis to a child of five.",
    "Translate 'good morning' into Spanish, Italian and German, please.",
    "Why?",
    "Here is a story. " + "A fox went over the hill and met a crow. " * 3 + "What did the fox meet?",
    "Count to five.",
    "Summarise this. " + "The council met on Tuesday and spoke of bins. " * 6,
    "Is water wet?",
    "Repeat the word 'blue'. " + "blue " * 30,
]
QUESTIONED = [[{"role": "system", "content": "Be brief."}, *conversation] for conversation in asked(*QUESTIONS)]


@pytest.fixture(scope="module")
def embedded_replies(embedded_model) -> list[Reply]:
    """Twelve greedy replies to prompts of very different lengths, in one batch."""
    prompts = [embedded_model.prompt_tokens(conversation) for conversation in QUESTIONED]
    assert max(map(len, prompts)) > 4 * min(map(len, prompts))
    return embedded_model.generate(QUESTIONED, Sampling(temperature=0, max_new_tokens=8), batch_size=12)


@on_one_worker
@pytest.mark.slow
def test_an_embedded_models_reply_is_the_same_alone_and_among_longer_and_shorter_prompts(embedded_model, embedded_replies):
    for conversation, reply in zip(QUESTIONED, embedded_replies, strict=True):
        (alone,) = embedded_model.generate([conversation], Sampling(temperature=0, max_new_tokens=8))
        assert_same_up_to_a_near_tie(embedded_model, embedded_model.prompt_tokens(conversation), reply.tokens, alone.tokens)


@on_one_worker
def test_an_embedded_models_greedy_reply_is_transformers_own(embedded_model, embedded_replies):
    for row in (0, 5, 7):
        ids = torch.tensor([embedded_model.prompt_tokens(QUESTIONED[row])])
        expected = embedded_model.model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=8)
        assert_same_up_to_a_near_tie(embedded_model, ids[0].tolist(), embedded_replies[row].tokens, expected[0, ids.shape[1] :].tolist())


@on_one_worker
def test_an_embedded_models_log_probs_are_those_that_scoring_gives(embedded_model, embedded_replies):
    replies = embedded_replies[:6]
    prompts = [embedded_model.prompt_tokens(conversation) for conversation in QUESTIONED[:6]]
    for reply, score in zip(replies, embedded_model.score_tokens(prompts, [reply.tokens for reply in replies]), strict=True):
        assert sum(reply.log_probs) == pytest.approx(score.total, abs=1e-3)


@on_one_worker
def test_the_embedded_model_answers_in_english_and_a_vector_changes_its_answer(embedded_model, embedded_replies):
    assert "Paris" in embedded_replies[1].text
    away = -embedded_model.activations([QUESTIONED[1]], [14])[0, 0]
    with embedded_model.steer(away, 14, 1.0):
        (steered,) = embedded_model.generate([QUESTIONED[1]], Sampling(temperature=0, max_new_tokens=8))
    assert steered.text != embedded_replies[1].text


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_dose_that_overflows_the_model_is_refused_and_draws_no_token(tiny_llama, temperature):
    vector = np.full(tiny_llama.width, 3e38, dtype=np.float32)
    sampling = Sampling(temperature=temperature, max_new_tokens=2)
    with (
        tiny_llama.steer(vector, 1, [0.0, 1e3]),
        pytest.raises(ModelError, match="row 1: the model's logits are not finite"),
    ):
        tiny_llama.generate(asked("Hi", "No."), sampling, seeds=[1, 2])
