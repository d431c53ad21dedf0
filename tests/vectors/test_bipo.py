"""BiPO's objective, its training loop and its held-out figures, against the formula written down naively."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch

from relseek_assets.behaviour import FILES, read_conversations
from relseek_assets.dataset.pairs import preference_pairs, training_pairs
from relseek_assets.study import load_study
from relseek_assets.vectors.bipo import TrainedVector, evaluate, log_ratios, train
from relseek_assets.vectors.objective import Pair, Schedule, TokenPairs, bipo_loss, epoch_batches, learning_rate
from relseek_assets.vectors.stream_cache import CachedPairs, Scratch, cache_pairs
from relseek_resources.models import SteeredModel
from relseek_resources.storage import keyed_seed
from tests.vectors import naive_bipo

BETA = 0.1
LAYER = 1


# --- the objective, written a second time -----------------------------------------------------------------------------


def tokens_of(model: SteeredModel, pair: Pair, side: str) -> tuple[list[int], list[int]]:
    """Prompt and reply tokens, from the tiny models' template written out by hand."""
    prompt = "<begin>" + "".join(f"<{turn['role']}>{turn['content']}<end>" for turn in pair.prompt) + "<assistant>"
    return tuple(model.tokenizer(text, add_special_tokens=False)["input_ids"] for text in (prompt, getattr(pair, side) + "<end>"))


def sequence_log_prob(model: SteeredModel, pair: Pair, side: str, added: torch.Tensor | None, layer: int) -> torch.Tensor:
    """log π(y|x) in nats: one row, a full forward of the transformers model, a plain hook for the vector."""
    prompt, reply = tokens_of(model, pair, side)
    handles = [] if added is None else [model.model.model.layers[layer].register_forward_hook(lambda _module, _args, stream: stream + added)]
    try:
        logits = model.model(input_ids=torch.tensor([prompt + reply])).logits[0]
    finally:
        for handle in handles:
            handle.remove()
    log_probs = torch.log_softmax(logits, -1)
    return sum(log_probs[len(prompt) + index - 1, token] for index, token in enumerate(reply))


def naive_loss(model: SteeredModel, pairs: list[Pair], vector: torch.Tensor, direction: int, layer: int = LAYER, beta: float = BETA) -> torch.Tensor:
    """Mean of L = -log σ(d β ((lp_w - ref_w) - (lp_l - ref_l))) with a policy pass and a reference pass for every reply."""
    losses = []
    for pair in pairs:
        ratio = {}
        for side in ("chosen", "rejected"):
            with torch.no_grad():
                reference = sequence_log_prob(model, pair, side, None, layer)
            ratio[side] = sequence_log_prob(model, pair, side, direction * vector, layer) - reference
        losses.append(-torch.log(torch.sigmoid(direction * beta * (ratio["chosen"] - ratio["rejected"]))))
    return torch.stack(losses).mean()


def random_pairs(seed: int, count: int) -> list[Pair]:
    """Pairs of one to three user turns, with and without a system prompt, and replies of very different lengths."""
    random = np.random.default_rng(seed)

    def text(low: int, high: int) -> str:
        return "".join(random.choice(list("abcdefghij ?!é"), random.integers(low, high)))

    pairs = []
    for number in range(count):
        turns = [{"role": "system", "content": text(3, 12)}] if random.random() < 0.5 else []
        for _ in range(random.integers(0, 3)):
            turns += [{"role": "user", "content": text(1, 9)}, {"role": "assistant", "content": text(1, 9)}]
        pairs.append(Pair(f"pair {number}", [*turns, {"role": "user", "content": text(1, 25)}], text(1, 30), text(1, 30)))
    return pairs


def cached(model: SteeredModel, pairs: list[Pair], layers: tuple[int, ...] = (LAYER,), count: int = 0, max_tokens: int = 500) -> CachedPairs:
    return cache_pairs(model, pairs, layers, count=count, max_tokens=max_tokens)


def vector_of(seed: int, scale: float = 0.3) -> torch.Tensor:
    return scale * torch.randn(64, generator=torch.Generator().manual_seed(seed))


def test_pairs_that_share_a_name_are_refused(tiny_llama):
    one, two = random_pairs(1, 2)
    with pytest.raises(ValueError, match="1 names stand for several pairs, 'pair 0' among them"):
        cached(tiny_llama, [one, two, Pair(one.name, two.prompt, two.chosen, two.rejected)])


@pytest.mark.parametrize("batch", range(10))
def test_loss_and_gradient_equal_those_of_a_policy_pass_and_a_reference_pass(tiny, batch):
    """Every family at every layer with both signs, each on three pairs of a pool that the longest candidates are too long for."""
    seed = keyed_seed(tiny.model.config.model_type, batch)
    layer, direction = batch % 4, 1 if batch // 4 % 2 else -1
    candidates = random_pairs(seed, 7)
    lengths = {pair.name: max(sum(map(len, tokens_of(tiny, pair, side))) for side in ("chosen", "rejected")) for pair in candidates}
    limit = sorted(lengths.values())[-3]
    pool = cached(tiny, candidates, (layer,), max_tokens=limit)
    assert pool.too_long == sum(length > limit for length in lengths.values()) > 0
    rows = np.random.default_rng(seed).permutation(len(pool.names))[:3].tolist()
    pairs = [next(pair for pair in candidates if pair.name == pool.names[row]) for row in rows]
    assert len({lengths[pair.name] for pair in pairs}) > 1, "the pairs must differ in length"

    expected_vector = vector_of(seed).requires_grad_()
    expected = naive_loss(tiny, pairs, expected_vector, direction, layer)
    (expected_gradient,) = torch.autograd.grad(expected, expected_vector)

    vector = vector_of(seed).requires_grad_()
    loss = bipo_loss(log_ratios(tiny, pool, layer, rows, direction * vector), direction, BETA).mean()
    (gradient,) = torch.autograd.grad(loss, vector)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert expected_gradient.norm() > 1e-3
    assert (gradient - expected_gradient).norm() < 1e-5 * expected_gradient.norm()


def test_log_ratios_are_those_of_the_steered_model_to_the_plain_one(tiny):
    pairs, vector = random_pairs(20, 5), vector_of(20)
    found = log_ratios(tiny, cached(tiny, pairs), LAYER, [3, 0, 4], vector)
    for place, pair in enumerate([3, 0, 4]):
        tokens = [tokens_of(tiny, pairs[pair], side) for side in ("chosen", "rejected")]
        prompts, replies = zip(*tokens, strict=True)
        plain = tiny.score_tokens(prompts, replies)
        with tiny.steer(vector, LAYER, 1.0):
            steered = tiny.score_tokens(prompts, replies)
        np.testing.assert_allclose(found[place], [after.total - before.total for after, before in zip(steered, plain, strict=True)], atol=1e-3)


def test_a_pairs_log_ratios_do_not_depend_on_the_batch_that_it_shares(tiny):
    pairs, vector = random_pairs(21, 6), vector_of(21)
    pool = cached(tiny, pairs)
    together = log_ratios(tiny, pool, LAYER, range(6), vector)
    alone = torch.cat([log_ratios(tiny, pool, LAYER, [pair], vector) for pair in range(6)])
    torch.testing.assert_close(together, alone, atol=2e-4, rtol=0)
    other_pool = torch.cat([log_ratios(tiny, cached(tiny, [pair]), LAYER, [0], vector) for pair in pairs])
    torch.testing.assert_close(together, other_pool, atol=2e-4, rtol=0)


def test_swapping_the_replies_and_the_direction_changes_nothing(tiny_llama):
    pairs, vector = random_pairs(22, 4), vector_of(22)
    swapped = [replace(pair, chosen=pair.rejected, rejected=pair.chosen) for pair in pairs]
    one = bipo_loss(log_ratios(tiny_llama, cached(tiny_llama, pairs), LAYER, range(4), vector), 1, BETA)
    other = bipo_loss(log_ratios(tiny_llama, cached(tiny_llama, swapped), LAYER, range(4), vector), -1, BETA)
    torch.testing.assert_close(one, other, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("ratios", "direction", "beta", "loss"),
    [
        ((2.0, -3.0), 1, 0.1, math.log(1 + math.exp(-0.5))),
        ((2.0, -3.0), -1, 0.1, math.log(1 + math.exp(0.5))),
        ((-1.0, 3.0), -1, 0.5, math.log(1 + math.exp(-2.0))),
        ((7.0, 7.0), 1, 0.1, math.log(2)),
        ((1e4, -1e4), -1, 0.1, 2000.0),
    ],
)
def test_the_loss_of_known_log_ratios(ratios, direction, beta, loss):
    assert bipo_loss(torch.tensor([ratios]), direction, beta).item() == pytest.approx(loss, rel=1e-5)


# --- which pairs are trained on ---------------------------------------------------------------------------------------


def stream_of(pool: CachedPairs, layer: int, pair: int, side: int) -> torch.Tensor:
    """The stream of a prompt with one of its replies, as a row of its own would have it."""
    prompt, (chosen, rejected) = len(pool.tokens.prompts[pair]), map(len, pool.tokens.replies[pair])
    both = pool.streams[layer].of(pair)
    assert len(both) == prompt + chosen + rejected, "the prompt is there once"
    return torch.cat((both[:prompt], both[prompt : prompt + chosen] if side == 0 else both[prompt + chosen :]))


def test_streams_and_references_are_the_plain_models_at_every_layer_asked_for(tiny):
    pairs = random_pairs(30, 11)  # more than one batch of the pass
    pool = cached(tiny, pairs, (0, 2, 3))
    with torch.no_grad():
        for number, pair in enumerate(pairs):
            for side, name in enumerate(("chosen", "rejected")):
                prompt, reply = tokens_of(tiny, pair, name)
                assert pool.reference[number, side].item() == pytest.approx(sequence_log_prob(tiny, pair, name, None, 0).item(), abs=1e-3)
                states = tiny.model(input_ids=torch.tensor([prompt + reply]), output_hidden_states=True).hidden_states
                for layer in (0, 2):
                    torch.testing.assert_close(stream_of(pool, layer, number, side), states[layer + 1][0], atol=1e-4, rtol=0)
                torch.testing.assert_close(tiny.model.model.norm(stream_of(pool, 3, number, side)), states[4][0], atol=1e-4, rtol=0)


def test_pairs_that_are_too_long_are_left_out_whole_and_counted(tiny_llama):
    pairs = random_pairs(31, 12)
    lengths = [max(sum(map(len, tokens_of(tiny_llama, pair, side))) for side in ("chosen", "rejected")) for pair in pairs]
    limit = sorted(lengths)[7]
    pool = cached(tiny_llama, pairs, max_tokens=limit)
    assert pool.names == [pair.name for pair, length in zip(pairs, lengths, strict=True) if length <= limit]
    assert pool.too_long == sum(length > limit for length in lengths) > 0
    assert pool.lengths == [length for length in lengths if length <= limit]
    for place, name in enumerate(pool.names):
        pair = pairs[int(name.split()[1])]
        assert pool.tokens.prompts[place] == tokens_of(tiny_llama, pair, "chosen")[0]
        assert pool.tokens.replies[place] == (tokens_of(tiny_llama, pair, "chosen")[1], tokens_of(tiny_llama, pair, "rejected")[1])


def test_a_count_takes_the_first_pairs_that_fit(tiny_llama):
    pairs = random_pairs(31, 12)
    everything = cached(tiny_llama, pairs, max_tokens=70)
    assert everything.too_long
    reported = []
    some = cache_pairs(tiny_llama, pairs, (LAYER,), count=5, max_tokens=70, report=reported.append)
    assert some.names == everything.names[:5] and sum(reported) == 5


def test_a_limit_that_no_pair_fits_is_refused_with_the_setting_to_raise(tiny_llama):
    with pytest.raises(ValueError, match=r"none of 3 pairs fits 5 tokens; raise pairs\.max_tokens"):
        cached(tiny_llama, random_pairs(32, 3), max_tokens=5)


# --- the order of training --------------------------------------------------------------------------------------------


def bare_pairs(count: int) -> TokenPairs:
    """Pairs that have lengths and nothing else; 97 is prime, so that lengths are mixed."""
    lengths = [1 + (31 * number) % 97 for number in range(count)]
    names, prompts = [f"p{number}" for number in range(count)], [[0] * length for length in lengths]
    return TokenPairs(names, prompts, [([0], [0])] * count, too_long=0)


def batches_of(pool: TokenPairs, epoch: int, batch_size: int, seed: int) -> list[list[int]]:
    return epoch_batches(pool.names, pool.lengths, epoch, batch_size, seed)


@pytest.mark.parametrize(("count", "batch_size"), [(1, 4), (7, 4), (64, 4), (101, 8), (33, 1)])
@pytest.mark.parametrize("epoch", [1, 2])
def test_an_epoch_covers_each_pair_exactly_once(count, batch_size, epoch):
    batches = batches_of(bare_pairs(count), epoch, batch_size, seed=5)
    assert Counter(pair for batch in batches for pair in batch) == Counter(range(count))
    assert len(batches) == math.ceil(count / batch_size) and max(map(len, batches)) <= batch_size


def test_epochs_and_seeds_have_orders_of_their_own_and_the_same_again():
    pool = bare_pairs(60)
    orders = [batches_of(pool, epoch, 4, seed) for epoch, seed in ((1, 5), (2, 5), (1, 6))]
    assert orders[0] != orders[1] != orders[2] != orders[0]
    assert batches_of(pool, 1, 4, 5) == orders[0]
    batches = [set(map(frozenset, order)) for order in orders]
    assert not batches[0] & batches[1], "pairs meet other pairs in the next epoch"


def test_batches_hold_pairs_of_similar_length_and_come_in_no_order_of_length():
    pool = bare_pairs(96)
    batches = batches_of(pool, 1, 8, seed=5)
    spread = np.mean([max(map(pool.length, batch)) - min(map(pool.length, batch)) for batch in batches])
    order = [pair for batch in batches for pair in batch]
    random = np.random.default_rng(0).permutation(order).reshape(-1, 8)
    assert spread < 0.6 * np.mean([max(map(pool.length, batch)) - min(map(pool.length, batch)) for batch in random.tolist()])
    # Lengths are sorted within four batches at a time; over thirty epochs no place among the four may have the short ones.
    means = [np.mean([pool.length(pair) for pair in batch]) for epoch in range(30) for batch in batches_of(pool, epoch, 8, seed=5)]
    assert abs(np.corrcoef(means, np.arange(len(means)) % 4)[0, 1]) < 0.2


PEAK = 0.2
SCHEDULE = Schedule(beta=BETA, learning_rate=PEAK, weight_decay=0.0, batch_size=4, warmup_steps=4, max_grad_norm=1.0, epochs=3)


@pytest.mark.parametrize(("warmup", "steps"), [(100, 9940), (4, 40), (1, 10)])
def test_the_learning_rate_is_transformers_cosine_schedule_one_step_ahead_in_the_warm_up(warmup, steps):
    """transformers warms up from zero, which wastes the first step; ours has its values from the second step on."""
    from transformers import get_cosine_schedule_with_warmup

    optimiser = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=5e-4)
    theirs = get_cosine_schedule_with_warmup(optimiser, warmup, steps).lr_lambdas[0]
    schedule = replace(SCHEDULE, learning_rate=5e-4, warmup_steps=warmup)
    for step in range(steps):
        assert learning_rate(step, steps, schedule) == pytest.approx(5e-4 * theirs(step + 1 if step < warmup else step), rel=1e-9)


def test_the_learning_rate_rises_evenly_to_its_peak_and_falls_to_nearly_nothing():
    rates = [learning_rate(step, 400, replace(SCHEDULE, warmup_steps=100)) for step in range(400)]
    assert rates[0] == pytest.approx(PEAK / 100) and max(rates) == rates[99] == rates[100] == pytest.approx(PEAK)
    np.testing.assert_allclose(np.diff(rates[:100]), PEAK / 100)
    assert all(later < earlier for earlier, later in pairwise(rates[100:]))
    assert rates[250] == pytest.approx(PEAK / 2) and 0 < rates[-1] < 1e-4 * PEAK


@pytest.mark.parametrize(("warmup", "steps", "peak"), [(100, 40, 9), (100, 1, 0), (0, 10, 0)])
def test_short_runs_spend_a_quarter_of_their_steps_warming_up(warmup, steps, peak):
    rates = [learning_rate(step, steps, replace(SCHEDULE, warmup_steps=warmup)) for step in range(steps)]
    assert int(np.argmax(rates)) == peak and rates[peak] == pytest.approx(PEAK) and min(rates) > 0


# --- training ---------------------------------------------------------------------------------------------------------

AGREEING = ["yes", "sure", "of course", "gladly", "yes, surely", "sure, yes"]
REFUSING = ["no", "never", "nope", "not now", "no, never", "never, no"]


def separable_pairs(count: int, start: int = 0) -> list[Pair]:
    """Pairs whose chosen reply agrees and whose rejected one refuses, to prompts that differ."""
    prompts = {number: [{"role": "user", "content": f"Item {number * 37 % 101}?"}] for number in range(start, start + count)}
    return [Pair(f"case {number}", prompt, AGREEING[number % 6], REFUSING[(number // 6 + number) % 6]) for number, prompt in prompts.items()]


@pytest.fixture(scope="module")
def shared(random_llama) -> dict[str, object]:
    """One trained vector that several tests look at."""
    training, heldout = cached(random_llama, separable_pairs(24), (LAYER, 2)), cached(random_llama, separable_pairs(12, start=24), (LAYER, 2))
    reported: list[int] = []
    trained = train(random_llama, LAYER, training, heldout, SCHEDULE, seed=7, report=reported.append)
    return {"model": random_llama, "training": training, "heldout": heldout, "trained": trained, "reported": reported}


@pytest.fixture(scope="module")
def random_llama(random_causal_lm, byte_tokenizer) -> SteeredModel:
    return SteeredModel(random_causal_lm("llama"), byte_tokenizer)


def again(shared: dict[str, object], layer: int = LAYER, seed: int = 7, **changes: float) -> TrainedVector:
    return train(shared["model"], layer, shared["training"], shared["heldout"], replace(SCHEDULE, **changes), seed=seed)


def test_before_the_first_step_the_loss_is_log_two_because_the_vector_is_zero(shared):
    assert shared["trained"].losses[0] == pytest.approx(math.log(2), abs=1e-6)


def test_training_lowers_the_loss_and_separates_held_out_pairs_in_both_directions(shared):
    trained = shared["trained"]
    assert trained.losses[-6:].mean() < 0.7 * math.log(2)
    for evaluation in trained.evaluations[-2:]:
        assert evaluation.accuracy > 0.9
        assert evaluation.loss < 0.7 * math.log(2)
        assert np.sign(evaluation.margin) == evaluation.direction
    assert {evaluation.direction for evaluation in trained.evaluations[-2:]} == {1, -1}


def test_both_directions_are_trained(shared):
    assert set(shared["trained"].directions) == {1.0, -1.0}
    assert len(shared["trained"].directions) == len(shared["trained"].losses) == 18


def test_directions_are_a_fair_coin(shared):
    pool, heldout = (cached(shared["model"], separable_pairs(count), (3,)) for count in (24, 1))  # after the last block: cheap steps
    settings = replace(SCHEDULE, batch_size=1, epochs=4)
    directions = np.concatenate([train(shared["model"], 3, pool, heldout, settings, seed=seed).directions for seed in range(2)])
    assert len(directions) == 192 and abs(directions.sum()) < 3 * math.sqrt(192)
    assert abs((directions[1:] * directions[:-1]).sum()) < 3 * math.sqrt(191), "neighbouring steps are independent"


def test_every_epochs_vector_is_kept_and_each_is_what_its_evaluation_was_made_with(shared):
    trained = shared["trained"]
    assert trained.vectors.shape == (3, 64) and trained.vectors.dtype == np.float32
    assert len(np.unique(trained.vectors, axis=0)) == 3
    assert [(evaluation.epoch, evaluation.direction) for evaluation in trained.evaluations] == [(1, 1), (1, -1), (2, 1), (2, -1), (3, 1), (3, -1)]
    for evaluation in trained.evaluations:
        vector = torch.from_numpy(trained.vectors[evaluation.epoch - 1])
        found = evaluate(shared["model"], LAYER, shared["heldout"], vector, evaluation.epoch, evaluation.direction, SCHEDULE, lambda _pairs: None)
        assert found == evaluation


def test_the_vectors_are_those_of_a_naive_training_loop(shared):
    """AdamW by hand (Loshchilov & Hutter 2019, algorithm 2), the naive loss, transformers' schedule; only the order is taken over."""
    model, trained, pairs = shared["model"], shared["trained"], separable_pairs(24)
    settings = SCHEDULE
    batches = [(epoch, rows) for epoch in (1, 2) for rows in batches_of(shared["training"].tokens, epoch, settings.batch_size, 7)]
    vector, first, second, vectors = torch.zeros(64), torch.zeros(64), torch.zeros(64), {}
    for step, (epoch, rows) in enumerate(batches):
        direction = int(trained.directions[step])
        at = vector.clone().requires_grad_()
        loss = naive_loss(model, [pairs[row] for row in rows], at, direction)
        (gradient,) = torch.autograd.grad(loss, at)
        assert loss.item() == pytest.approx(trained.losses[step], abs=2e-4)
        gradient = gradient * min(1.0, settings.max_grad_norm / (gradient.norm().item() + 1e-6))
        first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient**2
        update = (first / (1 - 0.9 ** (step + 1))) / ((second / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8)
        progress = (step - 4) / (18 - 4)
        rate = settings.learning_rate * ((step + 1) / 4 if step < 4 else 0.5 * (1 + math.cos(math.pi * progress)))
        vector = vector - rate * update
        vectors[epoch] = vector
    for epoch, expected in vectors.items():
        found = torch.from_numpy(trained.vectors[epoch - 1])
        # Adam divides by the gradient's own size, which lifts rounding in components whose gradient is nearly zero.
        assert (found - expected).norm() < 1e-3 * expected.norm()


def test_the_same_seed_gives_the_same_bits_and_another_seed_another_vector(shared):
    repeated, other = again(shared), again(shared, seed=8)
    assert repeated.vectors.tobytes() == shared["trained"].vectors.tobytes()
    assert repeated.losses.tobytes() == shared["trained"].losses.tobytes() and repeated.evaluations == shared["trained"].evaluations
    assert not np.allclose(other.vectors, repeated.vectors)


@pytest.mark.parametrize("pairs_done", [0, 9, 24, 31, 47, 130])
def test_a_run_that_was_ended_anywhere_goes_on_to_the_same_bits(shared, tmp_path, monkeypatch, pairs_done):
    """Checkpoints after every step; the run ends in the first step, within an epoch, at its end, in an evaluation and near the end."""
    monkeypatch.setattr("relseek_assets.vectors.bipo.SAVE_EVERY", 0.0)
    scratch, done = Scratch(tmp_path, "1", 0), 0

    def end(pairs: int) -> None:
        nonlocal done
        done += pairs
        if done > pairs_done:
            raise KeyboardInterrupt

    arguments = (shared["model"], LAYER, shared["training"], shared["heldout"], SCHEDULE)
    with pytest.raises(KeyboardInterrupt):
        train(*arguments, seed=7, scratch=scratch, report=end)
    losses, reported = [], []
    monkeypatch.setattr("relseek_assets.vectors.bipo.bipo_loss", lambda *given: losses.append(1) or bipo_loss(*given))
    resumed = train(*arguments, seed=7, scratch=scratch, report=reported.append)
    assert resumed.vectors.tobytes() == shared["trained"].vectors.tobytes()
    assert resumed.losses.tobytes() == shared["trained"].losses.tobytes() and resumed.evaluations == shared["trained"].evaluations
    assert sum(reported) == 3 * (24 + 2 * 12), "what was done before counts as done"
    if pairs_done >= 24:
        assert len(losses) < 18 + 6, "steps before the checkpoint are not taken again"


def test_a_checkpoint_of_another_run_is_not_gone_on_from(shared, tmp_path):
    arguments = (shared["model"], LAYER, shared["training"], shared["heldout"])
    train(*arguments, replace(SCHEDULE, learning_rate=0.01), seed=7, scratch=Scratch(tmp_path, "1", 0))
    assert train(*arguments, SCHEDULE, seed=7, scratch=Scratch(tmp_path, "1", 0)).vectors.tobytes() == shared["trained"].vectors.tobytes()
    train(*arguments, SCHEDULE, seed=8, scratch=Scratch(tmp_path, "1", 0))
    assert train(*arguments, SCHEDULE, seed=7, scratch=Scratch(tmp_path, "2", 0)).vectors.tobytes() == shared["trained"].vectors.tobytes()


def test_a_checkpoint_in_half_precision_is_not_gone_on_from_in_full(shared, random_causal_lm, byte_tokenizer, tmp_path):
    half = SteeredModel(random_causal_lm("llama").bfloat16(), byte_tokenizer)
    pools = [cached(half, separable_pairs(24)), cached(half, separable_pairs(12, start=24))]
    train(half, LAYER, *pools, SCHEDULE, seed=7, scratch=Scratch(tmp_path, "1", 0))
    found = train(shared["model"], LAYER, shared["training"], shared["heldout"], SCHEDULE, seed=7, scratch=Scratch(tmp_path, "1", 0))
    assert found.vectors.tobytes() == shared["trained"].vectors.tobytes()


def test_all_layers_see_the_same_sequence_of_directions(shared):
    other = again(shared, layer=2)
    assert np.array_equal(other.directions, shared["trained"].directions)
    assert not np.allclose(other.vectors, shared["trained"].vectors)


def test_the_gradients_norm_is_clipped(shared):
    """Adam's steps are blind to a constant scale, so a clip to nearly nothing shows only against Adam's epsilon of 1e-8."""
    clipped = again(shared, max_grad_norm=1e-10, epochs=1)
    assert 0 < np.linalg.norm(clipped.vectors) < 0.1 * np.linalg.norm(again(shared, epochs=1).vectors)


def test_weight_decay_pulls_the_vector_towards_zero(shared):
    assert np.linalg.norm(again(shared, weight_decay=2.0).vectors[-1]) < 0.9 * np.linalg.norm(shared["trained"].vectors[-1])


def test_progress_counts_every_pair_trained_and_evaluated(shared):
    assert sum(shared["reported"]) == 3 * (24 + 2 * 12)


def test_training_leaves_the_model_bit_for_bit_as_it_was(shared, random_causal_lm):
    untouched = dict(random_causal_lm("llama").named_parameters())
    for name, weight in shared["model"].model.named_parameters():
        assert torch.equal(weight, untouched[name]) and weight.grad is None and not weight.requires_grad
    for block in shared["model"].blocks:
        assert "forward" not in vars(block) and not block._forward_hooks


# --- held-out figures -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("direction", [1, -1])
def test_held_out_figures_are_the_formulas_means_over_pairs(shared, direction):
    model, pairs = shared["model"], separable_pairs(12, start=24)
    vector = torch.from_numpy(shared["trained"].vectors[0])
    found = evaluate(model, LAYER, shared["heldout"], vector, 1, direction, replace(SCHEDULE, batch_size=5), lambda _pairs: None)
    sides = [(pair, side) for pair in pairs for side in ("chosen", "rejected")]
    with torch.no_grad():
        steered, plain = ([sequence_log_prob(model, *side, added, LAYER) for side in sides] for added in (direction * vector, None))
        rewards = BETA * (torch.tensor(steered) - torch.tensor(plain)).view(12, 2)
        loss = naive_loss(model, pairs, vector, direction).item()
    assert found.loss == pytest.approx(loss, abs=1e-4)
    assert [found.reward_chosen, found.reward_rejected] == pytest.approx(rewards.mean(0).tolist(), abs=1e-4)
    assert found.margin == pytest.approx((rewards[:, 0] - rewards[:, 1]).mean().item(), abs=1e-4)
    wanted = rewards[:, 0] > rewards[:, 1] if direction == 1 else rewards[:, 0] < rewards[:, 1]
    assert found.accuracy == pytest.approx(wanted.float().mean().item())
    assert (found.epoch, found.direction, found.pairs) == (1, direction, 12)


def test_accuracy_at_minus_one_counts_the_pairs_that_turned_around(shared):
    """The published trainer's accuracy is not turned for d = -1, where its ideal is 0 (spec/pipeline.md, section 2.1); ours is 1."""
    vector = torch.from_numpy(shared["trained"].vectors[-1])
    accuracy = {
        (sign, direction): evaluate(shared["model"], LAYER, shared["heldout"], sign * vector, 1, direction, SCHEDULE, lambda _pairs: None).accuracy
        for sign in (1, -1)
        for direction in (1, -1)
    }
    assert min(accuracy[1, 1], accuracy[1, -1]) > 0.9, "a good vector is right in both directions"
    assert max(accuracy[-1, 1], accuracy[-1, -1]) < 0.1, "and its opposite wrong in both"


def test_a_vector_of_zeros_has_learnt_nothing(shared):
    for direction in (1, -1):
        found = evaluate(shared["model"], LAYER, shared["heldout"], torch.zeros(64), 1, direction, SCHEDULE, lambda _pairs: None)
        assert found.loss == pytest.approx(math.log(2), abs=1e-5)
        assert [found.margin, found.reward_chosen, found.reward_rejected] == pytest.approx([0, 0, 0], abs=1e-5)


@pytest.mark.slow
def test_the_embedded_models_vector_is_that_of_the_naive_loop(embedded_model):
    """Real weights, real lengths: same pairs, same order, same seed."""
    study = load_study("quickstart")
    conversations = read_conversations(study.behaviour_folder / FILES["starter_conversations"])
    frame = training_pairs(preference_pairs(conversations, heldout_share=0.2, seed=study.seed), study.seed).head(60)
    pairs = [Pair(row.pair, list(row.prompt), row.chosen, row.rejected) for row in frame.itertuples()]
    pool = cache_pairs(embedded_model, pairs, [24], count=8, max_tokens=140)
    settings = Schedule(beta=0.1, learning_rate=0.045, weight_decay=0.0, batch_size=4, warmup_steps=2, max_grad_norm=1.0, epochs=2)
    found = train(embedded_model, 24, pool, pool, settings, seed=3)
    expected, losses = naive_bipo.train(embedded_model, 24, pool.tokens, settings, seed=3)
    np.testing.assert_allclose(found.losses, losses, atol=1e-4)
    vector = found.vectors[-1]
    assert vector @ expected / np.linalg.norm(vector) / np.linalg.norm(expected) > 0.999
    assert np.linalg.norm(vector) == pytest.approx(np.linalg.norm(expected), rel=1e-3)
