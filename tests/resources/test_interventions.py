"""Each intervention leaves the projection that its definition says and nothing else changed, row by row, at every token."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import pytest
import torch

from relseek_resources.models import Ablate, Add, Ceiling, Floor, Intervention, MeanAblate, ModelError, Sampling, SteeredModel, thresholds

TEXTS = ["Hi", "How do I bake bread without an oven at home?", "Tell me about rain."]
GREEDY = Sampling(temperature=0, max_new_tokens=10)
Change = Callable[[torch.Tensor], torch.Tensor]


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


def projecting(vector: torch.Tensor, becomes: Change) -> Change:
    """The definition in float64: h split into its part across the vector, which stays, and its projection p, which `becomes` another."""
    unit = vector.double() / vector.double().norm()

    def change(stream: torch.Tensor) -> torch.Tensor:
        projection = stream.double() @ unit
        across = stream.double() - projection.unsqueeze(-1) * unit
        return (across + becomes(projection).unsqueeze(-1) * unit).to(stream.dtype)

    return change


@contextmanager
def by_hand(model: SteeredModel, *changes: tuple[int, Change]) -> Iterator[None]:
    """Plain forward hooks, in the order given, on blocks found by transformers' own attribute path."""

    def hook(change: Change):
        return lambda _module, _inputs, output: (change(output[0]), *output[1:]) if isinstance(output, tuple) else change(output)

    handles = [model.model.model.layers[layer].register_forward_hook(hook(change)) for layer, change in changes]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


V = random_vector()
# Each kind with numbers that change the tiny models' projections (some tens in size), beside its definition on the projection.
KINDS: dict[str, tuple[Callable[[Sequence[int]], Intervention], Change]] = {
    "add": (lambda layers: Add(V, layers, 2.5), lambda p: p + 2.5 * V.double().norm()),
    "floor": (lambda layers: Floor(V, layers, 4.0), lambda p: torch.where(p < 4.0, 4.0, p)),
    "ceiling": (lambda layers: Ceiling(V, layers, -4.0), lambda p: torch.where(p > -4.0, -4.0, p)),
    "ablate": (lambda layers: Ablate(V, layers), torch.zeros_like),
    "half ablated": (lambda layers: Ablate(V, layers, 0.5), lambda p: 0.5 * p),
    "mean": (lambda layers: MeanAblate(V, layers, 7.0), lambda p: torch.full_like(p, 7.0)),
    "half mean": (lambda layers: MeanAblate(V, layers, 7.0, strength=0.5), lambda p: 0.5 * p + 3.5),
}


# --- the definitions --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_under_an_intervention_answers_like_one_with_plain_hooks(tiny, kind):
    build, becomes = KINDS[kind]
    with by_hand(tiny, *((layer, projecting(V, becomes)) for layer in (0, 2))):
        expected = logits_now(tiny)
    with tiny.intervene(build([0, 2])):
        found = logits_now(tiny)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    assert (found - logits_now(tiny)).abs().max() > 0.01, "the intervention changes nothing that this test could see"


@pytest.mark.parametrize("kind", KINDS)
def test_at_every_token_the_projection_becomes_what_is_defined_and_the_rest_stays(tiny, kind):
    build, becomes = KINDS[kind]
    batch, unit = tiny.batch(tokens_of(tiny).tolist()), (V / V.norm()).double()
    with torch.no_grad():
        before = tiny.run_to(batch, [1])[0][1].double()
        with tiny.intervene(build([1])):
            after = tiny.run_to(batch, [1])[0][1].double()
    torch.testing.assert_close(after @ unit, becomes(before @ unit), atol=1e-4, rtol=0)
    moved = after - before
    torch.testing.assert_close(moved, (moved @ unit).unsqueeze(-1) * unit, atol=1e-4, rtol=0)


def test_floor_and_ceiling_touch_only_the_tokens_beyond_them(tiny):
    batch, unit = tiny.batch(tokens_of(tiny).tolist()), V / V.norm()
    with torch.no_grad():
        before = tiny.run_to(batch, [1])[0][1]
        projection = (before @ unit)[0]
        middle = float(projection.median()) + 1e-3
        for kind, beyond in ((Floor, projection < middle), (Ceiling, projection > middle)):
            with tiny.intervene(kind(V, 1, middle)):
                after = tiny.run_to(batch, [1])[0][1]
            assert 0 < beyond.sum() < len(beyond)
            assert torch.equal((after != before).any(-1)[0], beyond)


def test_a_floor_is_a_ceiling_of_the_opposite_vector_at_the_opposite_threshold(tiny):
    # The two published systems' capping, one on vectors that point to the assistant, the other on vectors that point away.
    with tiny.intervene(Floor(V, [1, 2], 4.0)):
        floor = logits_now(tiny)
    with tiny.intervene(Ceiling(-V, [1, 2], -4.0)):
        ceiling = logits_now(tiny)
    with tiny.intervene(Ceiling(V, [1, 2], 4.0)):
        other_side = logits_now(tiny)
    assert torch.equal(floor, ceiling) and not torch.allclose(floor, other_side, atol=0.01)


@pytest.mark.parametrize(
    "build", [lambda v: Floor(v, 1, 4.0), lambda v: Ceiling(v, 1, -4.0), lambda v: Ablate(v, 1), lambda v: MeanAblate(v, 1, 3.0)]
)
def test_the_vectors_length_does_not_count_where_a_projection_does(tiny_llama, build):
    answers = []
    for vector in (V, 100 * V, (1e-6 * V.double()).numpy()):
        with tiny_llama.intervene(build(vector)):
            answers.append(logits_now(tiny_llama))
    torch.testing.assert_close(answers[1], answers[0], atol=1e-4, rtol=0)
    torch.testing.assert_close(answers[2], answers[0], atol=1e-4, rtol=0)


def test_steering_is_the_additive_intervention_bit_for_bit(tiny):
    doses, ids = [2.0, -1.5, 0.0], tokens_of(tiny).expand(3, -1)
    with tiny.steer(V, 1, doses):
        steered = logits_now(tiny, ids)
    with tiny.intervene(Add(V, 1, doses)):
        assert torch.equal(logits_now(tiny, ids), steered)


@pytest.mark.parametrize("kind", ["floor", "ceiling", "ablate", "mean"])
def test_in_bfloat16_the_result_is_the_exact_one_rounded_once(random_causal_lm, byte_tokenizer, kind):
    model = SteeredModel(random_causal_lm("llama").to(torch.bfloat16), byte_tokenizer)
    vector = random_vector(5)  # far thresholds: rounding the projection or the correction on the way would show
    build = {
        "floor": Floor(vector, 1, 333.3),
        "ceiling": Ceiling(vector, 1, -333.3),
        "ablate": Ablate(vector, 1, 40.3),
        "mean": MeanAblate(vector, 1, 333.3),
    }[kind]
    becomes = {
        "floor": lambda p: p.clamp(min=333.3),
        "ceiling": lambda p: p.clamp(max=-333.3),
        "ablate": lambda p: p - 40.3 * p,
        "mean": lambda p: torch.full_like(p, 333.3),
    }[kind]
    batch = model.batch(tokens_of(model).tolist())
    with torch.no_grad():
        before = model.run_to(batch, [1])[0][1]
        exact = projecting(vector, becomes)(before.double())
        with model.intervene(build):
            found = model.run_to(batch, [1])[0][1]
    assert found.dtype == torch.bfloat16
    same = found == exact.to(torch.bfloat16)
    assert same.float().mean() > 0.99, "more than ties differ from the exact result's nearest bfloat16"
    assert not torch.equal(found, before)


# --- doing nothing ----------------------------------------------------------------------------------------------------

IDLE = [Floor(V, [0, 1], -math.inf), Ceiling(V, [0, 1], math.inf), Ablate(V, 1, 0.0), MeanAblate(V, 1, 9.0, strength=0.0), Add(V, [1, 2], 0.0)]


@pytest.mark.parametrize("idle", IDLE, ids=lambda idle: type(idle).__name__)
def test_what_bounds_or_takes_nothing_registers_no_hook_and_answers_bit_for_bit_like_the_plain_model(tiny, idle):
    plain, hooks = logits_now(tiny), hooks_of(tiny)
    with tiny.intervene(idle):
        assert hooks_of(tiny) == hooks
        assert torch.equal(logits_now(tiny), plain)
    with tiny.intervene([]):
        assert torch.equal(logits_now(tiny), plain)


@pytest.mark.parametrize("nothing", ["an empty list", "λ = 0", "λ = 0 in every row", "steered at λ = 0"])
def test_replies_scores_and_readings_without_an_intervention_are_the_plain_models_bit_for_bit_and_no_hook_is_called(tiny, nothing):
    conversations, replies, sampling = asked(*TEXTS), ["so", "it rains", "well"], Sampling(max_new_tokens=10)

    def everything() -> list[object]:
        generated = tiny.generate(conversations, sampling, seeds=[1, 2, 3], batch_size=3)
        readings = tiny.activations(conversations, [0, 3], replies), tiny.projections(conversations, V, [1], replies)
        return [
            *((reply.text, reply.tokens, reply.log_probs, reply.finished) for reply in generated),
            *(scores.log_probs for scores in tiny.score(conversations, replies)),
            *(reading.tobytes() for reading in readings),
        ]

    context = {
        "an empty list": lambda: tiny.intervene([]),
        "λ = 0": lambda: tiny.intervene(Add(V, [0, 1, 2, 3], 0.0)),
        "λ = 0 in every row": lambda: tiny.intervene([Add(V, 1, [0.0, 0.0, -0.0])]),
        "steered at λ = 0": lambda: tiny.steer(V, 2, 0.0),
    }[nothing]
    plain, hooks = everything(), hooks_of(tiny)
    with context():
        assert hooks_of(tiny) == hooks
        assert everything() == plain
    with tiny.intervene(Add(V, 1, 1.0)):
        assert everything() != plain


@pytest.mark.parametrize(
    "mixed",
    [
        Floor(V, [0, 2], [5.0, -math.inf, 9.0]),
        Ceiling(V, [0, 2], [-5.0, math.inf, -9.0]),
        Ablate(V, [0, 2], [1.0, 0.0, 0.5]),
        MeanAblate(V, [0, 2], 9.0, strength=[1.0, 0.0, 0.5]),
    ],
    ids=lambda mixed: type(mixed).__name__,
)
def test_a_row_that_is_left_alone_in_a_mixed_batch_is_bit_for_bit_the_plain_models(tiny, mixed):
    conversations, replies = asked(*TEXTS), ["so", "it rains", "well"]
    plain = tiny.score(conversations, replies, batch_size=3)
    with tiny.intervene(mixed):
        found = tiny.score(conversations, replies, batch_size=3)
    assert found[1].log_probs == plain[1].log_probs
    assert found[0].log_probs != plain[0].log_probs and found[2].log_probs != plain[2].log_probs


def test_a_bound_that_no_projection_reaches_changes_no_bit(tiny):
    plain = logits_now(tiny)
    with tiny.intervene([Floor(V, [0, 1, 2, 3], -1e6), Ceiling(V, [0, 1, 2, 3], 1e6)]):
        assert torch.equal(logits_now(tiny), plain)


# --- several at once --------------------------------------------------------------------------------------------------


def test_several_vectors_and_layers_work_together_each_where_it_was_put(tiny):
    first, second = random_vector(1), random_vector(2)
    with by_hand(
        tiny,
        (0, projecting(first, lambda p: p.clamp(min=3.0))),
        (2, projecting(first, lambda p: p.clamp(min=3.0))),
        (2, projecting(second, torch.zeros_like)),
        (3, lambda stream: stream - 1.5 * second),
    ):
        expected = logits_now(tiny)
    with tiny.intervene([Floor(first, range(0, 3, 2), 3.0), Ablate(second, np.int64(2)), Add(second, (3,), -1.5)]):
        torch.testing.assert_close(logits_now(tiny), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("nested", [False, True])
def test_at_one_block_they_work_in_the_order_given_and_inner_ones_after_outer_ones(tiny, nested):
    add, cap = Add(V, 1, 3.0), Ceiling(V, 1, 0.0)
    adding, capping = (1, lambda stream: stream + 3.0 * V), (1, projecting(V, lambda p: p.clamp(max=0.0)))
    answers = []
    for one, other, *changes in ((add, cap, adding, capping), (cap, add, capping, adding)):
        with by_hand(tiny, *changes):
            expected = logits_now(tiny)
        if nested:
            with tiny.intervene(one), tiny.intervene(other):
                found = logits_now(tiny)
        else:
            with tiny.intervene([one, other]):
                found = logits_now(tiny)
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
        answers.append(found)
    assert (answers[0] - answers[1]).abs().max() > 0.01, "the order must matter for this test to say anything"


def test_nested_interventions_leave_one_by_one(tiny_llama):
    plain = logits_now(tiny_llama)
    with tiny_llama.intervene(Floor(V, 1, 5.0)):
        outer = logits_now(tiny_llama)
        with tiny_llama.steer(random_vector(2), 1, 1.0), tiny_llama.intervene([Ablate(V, 2), Ceiling(V, 3, -1.0)]):
            assert not torch.equal(logits_now(tiny_llama), outer)
        assert torch.equal(logits_now(tiny_llama), outer)
    assert torch.equal(logits_now(tiny_llama), plain) and not torch.equal(outer, plain)


# --- one number a row -------------------------------------------------------------------------------------------------


def row_of(mixed: Sequence[Intervention], row: int) -> list[Intervention]:
    """What a mixture does to one row, as interventions with single numbers."""
    pick = lambda number: number if np.ndim(number) == 0 else number[row]  # noqa: E731
    alone: list[Intervention] = []
    for one in mixed:
        match one:
            case Add():
                alone.append(Add(one.vector, one.layers, pick(one.multiplier)))
            case Floor() | Ceiling():
                alone.append(type(one)(one.vector, one.layers, pick(one.threshold)))
            case Ablate():
                alone.append(Ablate(one.vector, one.layers, pick(one.strength)))
            case MeanAblate():
                alone.append(MeanAblate(one.vector, one.layers, pick(one.mean), pick(one.strength)))
    return alone


def mixture() -> list[Intervention]:
    """For seven rows, every row another treatment."""
    return [
        Add(random_vector(1), 0, [0.0, 2.0, -2.0, 0.0, 1.0, 0.0, 0.5]),
        Floor(V, [1, 2], [5.0, -math.inf, 2.0, -math.inf, -3.0, 9.0, -math.inf]),
        Ceiling(random_vector(2), 2, [math.inf, -5.0, math.inf, 0.0, 4.0, -2.0, math.inf]),
        Ablate(random_vector(3), [0, 3], [0.0, 1.0, 0.5, 0.0, 0.0, 0.0, 1.0]),
        MeanAblate(random_vector(4), 3, [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0], strength=[1.0, 0.0, 1.0, 0.5, 0.0, 0.0, 1.0]),
        Ceiling(V, 3, 6.0),
    ]


@pytest.mark.parametrize("batch_size", [1, 2, 16])
def test_a_mixture_of_rows_scores_like_separate_calls(tiny, batch_size):
    # Scoring sorts rows by length; every third row is long, so that a number that stayed at its place would be seen.
    conversations, replies = asked(*(TEXTS[row % 3] + "!" * row for row in range(7))), [f"reply {row}" for row in range(7)]
    plain = tiny.score(conversations, replies)
    with tiny.intervene(mixture()):
        together = tiny.score(conversations, replies, batch_size=batch_size)
    for row in range(7):
        with tiny.intervene(row_of(mixture(), row)):
            (alone,) = tiny.score([conversations[row]], [replies[row]])
        np.testing.assert_allclose(together[row].log_probs, alone.log_probs, atol=1e-5)
        assert np.abs(np.subtract(together[row].log_probs, plain[row].log_probs)).max() > 0.01


def test_a_mixture_of_rows_reads_like_separate_calls(tiny):
    conversations, replies = asked(*(TEXTS[row % 3] + "!" * row for row in range(7))), [f"reply {row}" for row in range(7)]
    with tiny.intervene(mixture()):
        together = tiny.activations(conversations, [0, 2, 3], replies, batch_size=3)
    for row in range(7):
        with tiny.intervene(row_of(mixture(), row)):
            (alone,) = tiny.activations([conversations[row]], [0, 2, 3], [replies[row]])
        np.testing.assert_allclose(together[row], alone, atol=1e-4, rtol=1e-5)


def test_a_mixture_of_rows_generates_like_separate_calls_on_a_model_that_stops_early(random_causal_lm, byte_tokenizer):
    plain = random_causal_lm("llama")
    plain.generation_config.eos_token_id = list(range(6, 262, 9))  # rows of a batch end at different steps
    model = SteeredModel(plain, byte_tokenizer)
    conversations, sampling = asked(*(TEXTS[row % 3] + "!" * row for row in range(7))), Sampling(max_new_tokens=25)
    with model.intervene(mixture()):
        together = model.generate(conversations, sampling, seeds=range(7), batch_size=4)
    assert len({len(reply.tokens) for reply in together}) > 2
    for row in range(7):
        with model.intervene(row_of(mixture(), row)):
            (alone,) = model.generate([conversations[row]], sampling, seeds=[row])
        assert together[row].tokens == alone.tokens
        np.testing.assert_allclose(together[row].log_probs, alone.log_probs, atol=1e-4)


@pytest.mark.parametrize("kind", ["floor", "ceiling", "mean"])
def test_padding_that_is_moved_far_does_not_reach_the_real_tokens(tiny, kind):
    far = {"floor": Floor(V, [0, 1, 2], 1e3), "ceiling": Ceiling(V, [0, 1, 2], -1e3), "mean": MeanAblate(V, [0, 1, 2], 1e3)}[kind]
    conversations, replies = asked(*TEXTS), ["so", "it rains", "well"]
    with tiny.intervene(far):
        together, alone = tiny.score(conversations, replies, batch_size=3), tiny.score(conversations, replies, batch_size=1)
        generated, singly = tiny.generate(conversations, GREEDY, batch_size=3), tiny.generate(conversations, GREEDY, batch_size=1)
    for row in range(3):
        np.testing.assert_allclose(together[row].log_probs, alone[row].log_probs, atol=1e-4)
        np.testing.assert_allclose(generated[row].log_probs[0], singly[row].log_probs[0], atol=1e-4)


@pytest.mark.parametrize(
    ("intervention", "message"),
    [
        (Floor(V, 1, [1.0, 2.0]), "2 thresholds.*3 rows.*one threshold a row"),
        (Ceiling(V, 1, [1.0] * 4), "4 thresholds.*3 rows"),
        (Ablate(V, 1, [0.0, 0.0]), "2 strengths.*3 rows"),
        (MeanAblate(V, 1, [1.0, 2.0]), "2 means.*3 rows"),
        (MeanAblate(V, 1, 1.0, [1.0, 2.0]), "2 strengths.*3 rows"),
    ],
)
@pytest.mark.parametrize("call", ["score", "generate", "activations", "projections"])
def test_another_number_of_numbers_than_rows_is_refused(tiny_llama, call, intervention, message):
    calls = {
        "score": lambda: tiny_llama.score(asked(*TEXTS), ["a", "b", "c"]),
        "generate": lambda: tiny_llama.generate(asked(*TEXTS), GREEDY),
        "activations": lambda: tiny_llama.activations(asked(*TEXTS), [1]),
        "projections": lambda: tiny_llama.projections(asked(*TEXTS), V, [1]),
    }
    with tiny_llama.intervene(intervention), pytest.raises(ModelError, match=message):
        calls[call]()


# --- prompts and replies, cache and resumption ------------------------------------------------------------------------


def assert_greedy_by_hand(model: SteeredModel, prompt: list[int], found: Sequence[int]) -> None:
    """Each token is the argmax of a whole forward, one row, no cache, no padding; up to near-ties."""
    for place, token in enumerate(found):
        logits = logits_now(model, torch.tensor([[*prompt, *found[:place]]]))[0, -1]
        assert logits.max() - logits[token] < 1e-4, f"token {place} is not the likeliest"


@pytest.mark.parametrize("kind", KINDS)
def test_replies_under_an_intervention_are_the_argmax_of_whole_forwards_with_plain_hooks(tiny, kind):
    build, becomes = KINDS[kind]
    plain = tiny.generate(asked(*TEXTS), GREEDY)
    with tiny.intervene(build([0, 2])):
        replies = tiny.generate(asked(*TEXTS), GREEDY, batch_size=3)
    with by_hand(tiny, *((layer, projecting(V, becomes)) for layer in (0, 2))):
        for conversation, reply in zip(asked(*TEXTS), replies, strict=True):
            assert_greedy_by_hand(tiny, tiny.prompt_tokens(conversation), reply.tokens)
    assert [reply.log_probs for reply in replies] != [reply.log_probs for reply in plain]


def test_every_token_of_prompt_and_reply_obeys_a_floor_while_it_is_generated(tiny_llama):
    seen: list[torch.Tensor] = []
    with tiny_llama.intervene(Floor(V, 2, 8.0)):
        handle = tiny_llama.blocks[3].register_forward_pre_hook(
            lambda _module, args, kwargs: seen.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
        )
        (reply,) = tiny_llama.generate(asked(TEXTS[1]), GREEDY)
        handle.remove()
    projections = torch.cat([stream[0] @ (V / V.norm()) for stream in seen])
    assert len(projections) == tokens_of(tiny_llama).shape[1] + len(reply.tokens) - 1
    assert projections.min() > 8.0 - 1e-4


def test_a_pass_resumed_in_the_middle_equals_the_whole_pass(tiny):
    # MeanAblate at half strength and Add would show if they were applied to the resumed stream a second time.
    batch = tiny.batch([tiny.prompt_tokens(conversation) for conversation in asked(*TEXTS)])
    with torch.no_grad(), tiny.intervene([Add(V, [0, 1], 2.0), MeanAblate(V, [1, 2], 5.0, strength=0.5), Floor(random_vector(1), [1, 3], 4.0)]):
        streams, whole = tiny.run_to(batch, [1], to_end=True)
        assert torch.equal(tiny.run_from(batch, 1, streams[1]), whole)


def test_scores_at_several_doses_under_an_intervention_equal_steering_inside_it(tiny_llama):
    prompts = [tiny_llama.prompt_tokens(conversation) for conversation in asked(*TEXTS)]
    replies, vector = [[9, 10, 11]] * 3, random_vector(7)
    with tiny_llama.intervene([Floor(V, [1, 2], [5.0, -math.inf, 3.0]), Ablate(vector, 1)]):
        found = tiny_llama.score_doses(prompts, replies, vector, 1, [-2.0, 0.0, 2.0])
        for dose, scores in found.items():
            with tiny_llama.steer(vector, 1, dose):
                expected = tiny_llama.score_tokens(prompts, replies)
            np.testing.assert_allclose([row.log_probs for row in scores], [row.log_probs for row in expected], atol=1e-5)


# --- the model is restored --------------------------------------------------------------------------------------------


class Stop(Exception):
    pass


@pytest.mark.parametrize("ending", [None, Stop, KeyboardInterrupt, GeneratorExit])
def test_the_model_is_restored_however_the_block_ends(tiny_llama, ending):
    before, hooks = logits_now(tiny_llama), hooks_of(tiny_llama)
    try:
        with tiny_llama.intervene([Floor(V, [0, 1, 2], 5.0), Ablate(random_vector(1), [1, 3], [1.0])]):
            assert not torch.equal(logits_now(tiny_llama), before)
            if ending is not None:
                raise ending
    except (Stop, KeyboardInterrupt, GeneratorExit) as error:
        assert type(error) is ending
    assert torch.equal(logits_now(tiny_llama), before)
    assert hooks_of(tiny_llama) == hooks
    assert len(tiny_llama.score(asked("Hi", "Ho"), ["a", "b"])) == 2, "the row of one strength is forgotten too"


def test_where_one_of_several_is_refused_none_is_left_behind(tiny_llama):
    hooks = hooks_of(tiny_llama)
    with pytest.raises(ModelError, match="layer 4"), tiny_llama.intervene([Floor(V, 1, 5.0), Ablate(V, [3, 4])]):
        pytest.fail("the block ran although nothing can be ablated there")
    assert hooks_of(tiny_llama) == hooks
    assert len(tiny_llama.score(asked("Hi"), ["a"])) == 1


# --- projections and thresholds ---------------------------------------------------------------------------------------


@torch.no_grad()
def hidden_states(model: SteeredModel, tokens: list[int]) -> list[torch.Tensor]:
    """transformers' own residual stream after each block, one row without padding, float64 (length, width)."""
    return [state[0].double() for state in model.model(input_ids=torch.tensor([tokens]), output_hidden_states=True).hidden_states[1:]]


def test_projections_are_those_of_transformers_hidden_states(tiny):
    layers, vectors, replies = [0, 2], torch.stack([V, random_vector(1)]), ["so", "it rains a lot", "w"]
    # the last hidden state that transformers returns has been through the final norm, so block 3 is left out
    units = torch.nn.functional.normalize(vectors.double(), dim=-1)
    last, mean, one = [], [], []
    for conversation, reply in zip(asked(*TEXTS), replies, strict=True):
        prompt, answer = tiny.prompt_tokens(conversation), tiny.tokenizer(reply, add_special_tokens=False)["input_ids"]
        states = hidden_states(tiny, [*prompt, *answer])
        last.append([float(states[layer][len(prompt) - 1] @ unit) for layer, unit in zip(layers, units, strict=True)])
        mean.append([float((states[layer][len(prompt) :] @ unit).mean()) for layer, unit in zip(layers, units, strict=True)])
        one.append([float(states[layer][len(prompt) - 1] @ units[0]) for layer in layers])
    np.testing.assert_allclose(tiny.projections(asked(*TEXTS), vectors, layers, batch_size=2), last, atol=1e-4)
    np.testing.assert_allclose(tiny.projections(asked(*TEXTS), 3 * vectors, layers, replies), mean, atol=1e-4)
    np.testing.assert_allclose(tiny.projections(asked(*TEXTS), V.tolist(), layers), one, atol=1e-4)


@pytest.mark.parametrize("replies", [None, ["so", "it rains a lot", "w"]])
def test_projections_read_under_a_bound_lie_within_it(tiny, replies):
    with tiny.intervene(Floor(V, [0, 2], [4.0, 6.0, 8.0])):
        floored = tiny.projections(asked(*TEXTS), V, [0, 2], replies)
    assert (floored > np.array([[4.0], [6.0], [8.0]]) - 1e-4).all()
    with tiny.intervene(Ceiling(V, [0, 2], [-4.0, -6.0, -8.0])):
        lowered = tiny.projections(asked(*TEXTS), V, [0, 2], replies)
    assert (lowered < np.array([[-4.0], [-6.0], [-8.0]]) + 1e-4).all()
    with tiny.intervene([Ablate(V, 0), MeanAblate(V, 2, [3.0, -2.0, 1.0])]):
        replaced = tiny.projections(asked(*TEXTS), V, [0, 2], replies)
    np.testing.assert_allclose(replaced, [[0.0, 3.0], [0.0, -2.0], [0.0, 1.0]], atol=1e-4)


def test_a_floor_at_a_percentile_of_ordinary_prompts_moves_that_share_of_them(tiny_llama):
    conversations = asked(*(f"{text} {number}" for text in TEXTS for number in range(7)))
    ordinary = tiny_llama.projections(conversations, V, [2])
    (quarter,) = thresholds(ordinary, 25)
    plain = tiny_llama.activations(conversations, [2])
    with tiny_llama.intervene(Floor(V, 2, float(quarter) - 1e-4)):
        floored = tiny_llama.activations(conversations, [2])
    assert (floored != plain).any((1, 2)).sum() == 5  # of 21 rows: the sixth smallest is the 25th percentile itself


def test_thresholds_are_percentiles_layer_by_layer():
    values = np.random.default_rng(0).permutation(101).astype(float)
    found = thresholds(np.stack([values, -2 * values], axis=1), 25)
    np.testing.assert_allclose(found, [25.0, -150.0])
    np.testing.assert_allclose(thresholds(values[:, None], 0), [0.0])
    np.testing.assert_allclose(thresholds([[1.0], [2.0]], 50), [1.5])


@pytest.mark.parametrize(
    ("projections", "percentile", "message"),
    [
        ([[1.0], [2.0]], 0.25, "in percent.*quarter give 25"),
        ([[1.0], [2.0]], 101, "in percent"),
        ([[1.0], [2.0]], math.nan, "in percent"),
        ([[1.0], [math.nan]], 25, "finite"),
        ([1.0, 2.0], 25, r"shape \(2,\)"),
        (np.empty((0, 3)), 25, r"shape \(0, 3\)"),
    ],
)
def test_thresholds_of_what_is_no_traffic_or_no_percentile_are_refused(projections, percentile, message):
    with pytest.raises(ModelError, match=message):
        thresholds(projections, percentile)


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("intervention", "message"),
    [
        (Floor(V, 4, 1.0), "layer 4: the model has the blocks 0 to 3"),
        (Floor(V, [], 1.0), "one block or more"),
        (Add(V, [1, 1], 1.0), "each once"),
        (Ablate(V[:63], 1), r"shape \(63,\).*needs \(64,\)"),
        (Ablate(torch.zeros(64), 1), "vector is zero"),
        (MeanAblate(torch.full((64,), math.nan), 1, 0.0), "vector holds NaN"),
        (Floor(V, 1, math.inf), "threshold must be a finite number.*-inf leaves a row alone"),
        (Ceiling(V, 1, [1.0, -math.inf]), "threshold must be a finite number.*inf leaves a row alone"),
        (Floor(V, 1, math.nan), "threshold must be a finite number"),
        (Ablate(V, 1, [[1.0]]), "strength must be a finite number or a row"),
        (MeanAblate(V, 1, math.inf), "mean must be a finite number"),
        (MeanAblate(V, 1, [1.0, 2.0], [1.0, 1.0, 1.0]), "2 means but 3 strengths"),
    ],
)
def test_what_cannot_intervene_is_refused_with_the_reason(tiny_llama, intervention, message):
    with pytest.raises(ModelError, match=message), tiny_llama.intervene(intervention):
        pytest.fail("the block ran although nothing can be done")


@pytest.mark.parametrize(
    ("vectors", "layers", "message"),
    [(torch.stack([V, V]), [1, 2, 3], "2 vectors for 3 layers"), (torch.zeros(64), [1], "zero"), (V[:5], [1], r"shape \(5,\)"), (V, [7], "layer 7")],
)
def test_projections_on_what_does_not_fit_are_refused(tiny_llama, vectors, layers, message):
    with pytest.raises(ModelError, match=message):
        tiny_llama.projections(asked("Hi"), vectors, layers)
