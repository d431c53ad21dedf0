"""BiPO: a steering vector from preference pairs, both directions at once (spec/pipeline.md, sections 2.1 and 2.3).

Here belong the objective, the training loop and the held-out evaluation. The base weights are frozen and v enters after block l, so
activations up to block l and the reference log-probabilities are computed once, for all layers of a model in one pass, and every
epoch runs only the blocks above.

Source: Cao et al. 2024, "Personalized steering of large language models: versatile steering vectors through bi-directional preference
optimization", equation 3. Unlike the published trainers the prompt ends with the assistant header, as it does in generation, and v
is not added to padding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from relseek_resources.models import SteeredModel
from relseek_resources.models.steered import Conversation
from relseek_resources.storage import keyed_order, keyed_seed

Report = Callable[[int], None]
BUCKET = 4  # batches whose pairs are sorted by length together: less padding, still a random order


@dataclass(frozen=True)
class Pair:
    """A prompt with the reply to prefer and the reply to avoid, as text."""

    name: str
    prompt: Conversation
    chosen: str
    rejected: str


@dataclass(frozen=True)
class Schedule:
    """The optimiser's settings; the fields are those of a study's `[training]`."""

    beta: float
    learning_rate: float
    weight_decay: float
    batch_size: int
    warmup_steps: int
    max_grad_norm: float
    epochs: int


@dataclass
class CachedPairs:
    """What training needs of each pair and never changes: tokens, the stream entering the trained blocks, and reference log-probs.

    `streams[layer]` holds for each pair the stream after that block of its two sequences, each (length, width).
    `reference` is (pairs, 2): log-probability of the chosen and of the rejected reply without v, in nats.
    """

    names: list[str]
    prompts: list[list[int]]
    replies: list[tuple[list[int], list[int]]]
    streams: dict[int, list[tuple[torch.Tensor, torch.Tensor]]]
    reference: torch.Tensor
    too_long: int

    def length(self, pair: int) -> int:
        return len(self.prompts[pair]) + max(len(reply) for reply in self.replies[pair])


@dataclass(frozen=True)
class Evaluation:
    """Held-out figures after one epoch at one direction d; rewards are β times log-ratios, in nats.

    `accuracy` is sign-correct: the share of pairs whose margin has the sign of d, 1.0 being ideal for both directions.
    """

    epoch: int
    direction: int
    loss: float
    accuracy: float
    margin: float
    reward_chosen: float
    reward_rejected: float
    pairs: int


@dataclass(frozen=True)
class TrainedVector:
    """Every epoch's vector, shape (epochs, width), with the loss and direction of each step and the held-out evaluations."""

    vectors: np.ndarray
    losses: np.ndarray
    directions: np.ndarray
    evaluations: tuple[Evaluation, ...]


@torch.inference_mode()
def cache_pairs(
    model: SteeredModel, pairs: Sequence[Pair], layers: Sequence[int], *, count: int, max_tokens: int, report: Report = lambda pairs: None
) -> CachedPairs:
    """Run the first `count` pairs (0: all) that fit `max_tokens` once through the model without v.

    A pair whose prompt and longer reply exceed `max_tokens` is left out and counted, never truncated.

    Raises:
        ValueError: two pairs of one name, which the order of batches could not tell apart, or no pair that fits.
    """
    names = [candidate.name for candidate in pairs]
    repeated = sorted({name for name in names if names.count(name) > 1}) if len(set(names)) < len(names) else []
    if repeated:
        raise ValueError(f"{len(repeated)} names stand for several pairs, {repeated[0]!r} among them; give every pair a name of its own")
    kept: list[Pair] = []
    prompts: list[list[int]] = []
    replies: list[tuple[list[int], list[int]]] = []
    too_long = 0
    for candidate in pairs:
        if count and len(kept) == count:
            break
        prompt = model.prompt_tokens(candidate.prompt)
        both = (model.reply_tokens(candidate.chosen), model.reply_tokens(candidate.rejected))
        if len(prompt) + max(map(len, both)) > max_tokens:
            too_long += 1
            continue
        kept.append(candidate)
        prompts.append(prompt)
        replies.append(both)
    if not kept:
        raise ValueError(f"none of {len(pairs)} pairs fits {max_tokens} tokens; raise pairs.max_tokens in the study")
    cached = CachedPairs([pair.name for pair in kept], prompts, replies, {layer: [] for layer in layers}, torch.empty(len(kept), 2), too_long)
    found: dict[int, dict[int, tuple[torch.Tensor, torch.Tensor]]] = {layer: {} for layer in layers}
    order = sorted(range(len(kept)), key=lambda pair: (cached.length(pair), pair))
    for start in range(0, len(order), 8):
        rows = order[start : start + 8]
        twice = [(pair, side) for pair in rows for side in (0, 1)]
        sequences = [[*prompts[pair], *replies[pair][side]] for pair, side in twice]
        streams, hidden = model.run_to(model.batch(sequences), layers, to_end=True)
        assert hidden is not None
        log_probs = model.reply_log_probs(hidden, [prompts[pair] for pair, _ in twice], [replies[pair][side] for pair, side in twice])
        for place, (pair, side) in enumerate(twice):
            cached.reference[pair, side] = log_probs[place].sum().item()
        for layer in layers:
            for place, pair in enumerate(rows):
                first, second = 2 * place, 2 * place + 1
                found[layer][pair] = (
                    streams[layer][first, : len(sequences[first])].clone(),
                    streams[layer][second, : len(sequences[second])].clone(),
                )
        report(len(rows))
    cached.streams = {layer: [found[layer][pair] for pair in range(len(kept))] for layer in layers}
    return cached


def log_ratios(model: SteeredModel, cached: CachedPairs, layer: int, rows: Sequence[int], steered: torch.Tensor) -> torch.Tensor:
    """log π_v(y|x) - log π_ref(y|x) of both replies of each pair, shape (pairs, 2), in nats.

    Args:
        steered: (width,) what is added to the stream after block `layer`, d·v; gradients reach it.
    """
    twice = [(pair, side) for pair in rows for side in (0, 1)]
    prompts = [cached.prompts[pair] for pair, _ in twice]
    replies = [cached.replies[pair][side] for pair, side in twice]
    batch = model.batch([[*prompt, *reply] for prompt, reply in zip(prompts, replies, strict=True)])
    streams = [cached.streams[layer][pair][side].clone() for pair, side in twice]
    base = torch.nn.utils.rnn.pad_sequence(streams, batch_first=True)
    stream = base + steered.to(base.dtype) * batch.mask.unsqueeze(-1).to(base.dtype)
    hidden = model.run_from(batch, layer, stream)
    totals = torch.stack([values.sum() for values in model.reply_log_probs(hidden, prompts, replies)])
    return totals.view(len(rows), 2) - cached.reference[list(rows)].to(totals)


def bipo_loss(ratios: torch.Tensor, direction: int, beta: float) -> torch.Tensor:
    """-log σ(d β (Δ_w - Δ_l)), one value a pair, from log-ratios (pairs, 2)."""
    return -torch.nn.functional.logsigmoid(direction * beta * (ratios[:, 0] - ratios[:, 1]))


def epoch_batches(cached: CachedPairs, epoch: int, batch_size: int, seed: int) -> list[list[int]]:
    """Batches of pair numbers in a keyed random order, pairs of similar length together."""
    place = {name: pair for pair, name in enumerate(cached.names)}
    order = [place[name] for name in keyed_order(cached.names, seed, "epoch", epoch)]
    batches = []
    for start in range(0, len(order), BUCKET * batch_size):
        bucket = sorted(order[start : start + BUCKET * batch_size], key=lambda pair: (cached.length(pair), pair))
        batches += [bucket[at : at + batch_size] for at in range(0, len(bucket), batch_size)]
    shuffled = keyed_order([str(index) for index in range(len(batches))], seed, "batches", epoch)
    return [batches[int(index)] for index in shuffled]


def learning_rate(step: int, steps: int, schedule: Schedule) -> float:
    """Linear warm-up, then a cosine to zero; `step` counts from 0."""
    warmup = min(schedule.warmup_steps, max(1, steps // 4))
    if step < warmup:
        return schedule.learning_rate * (step + 1) / warmup
    return schedule.learning_rate * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def train(
    model: SteeredModel,
    layer: int,
    training: CachedPairs,
    heldout: CachedPairs,
    schedule: Schedule,
    *,
    seed: int,
    report: Report = lambda pairs: None,
) -> TrainedVector:
    """Train one layer's vector and keep it after every epoch.

    The direction d of a batch comes from the seed, the epoch and the batch's number, so that layers see the same sequence.
    `report` is told the pairs done, evaluation included.
    """
    vector = torch.zeros(model.width, device=model.device, requires_grad=True)
    optimiser = torch.optim.AdamW([vector], lr=schedule.learning_rate, betas=(0.9, 0.999), eps=1e-8, weight_decay=schedule.weight_decay)
    batches = [epoch_batches(training, epoch, schedule.batch_size, seed) for epoch in range(1, schedule.epochs + 1)]
    steps = sum(map(len, batches))
    vectors: list[np.ndarray] = []
    losses: list[float] = []
    directions: list[int] = []
    evaluations: list[Evaluation] = []
    for epoch, epoch_rows in enumerate(batches, 1):
        for number, rows in enumerate(epoch_rows):
            direction = 1 if keyed_seed(seed, "direction", epoch, number) % 2 else -1
            for group in optimiser.param_groups:
                group["lr"] = learning_rate(len(losses), steps, schedule)
            loss = bipo_loss(log_ratios(model, training, layer, rows, direction * vector), direction, schedule.beta).mean()
            optimiser.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_([vector], schedule.max_grad_norm)
            optimiser.step()
            losses.append(loss.item())
            directions.append(direction)
            report(len(rows))
        vectors.append(vector.detach().float().cpu().numpy().copy())
        evaluations += [evaluate(model, layer, heldout, vector.detach(), epoch, d, schedule, report) for d in (1, -1)]
    return TrainedVector(np.stack(vectors), np.array(losses, dtype=np.float32), np.array(directions, dtype=np.float32), tuple(evaluations))


@torch.inference_mode()
def evaluate(
    model: SteeredModel, layer: int, heldout: CachedPairs, vector: torch.Tensor, epoch: int, direction: int, schedule: Schedule, report: Report
) -> Evaluation:
    """Held-out loss, rewards and sign-correct accuracy at d = +1 or -1."""
    order = sorted(range(len(heldout.names)), key=lambda pair: (heldout.length(pair), pair))
    found = []
    for start in range(0, len(order), schedule.batch_size):
        rows = order[start : start + schedule.batch_size]
        found.append(log_ratios(model, heldout, layer, rows, direction * vector))
        report(len(rows))
    ratios = torch.cat(found).float()
    margins = schedule.beta * (ratios[:, 0] - ratios[:, 1])
    return Evaluation(
        epoch=epoch,
        direction=direction,
        loss=bipo_loss(ratios, direction, schedule.beta).mean().item(),
        accuracy=(direction * margins > 0).float().mean().item(),
        margin=margins.mean().item(),
        reward_chosen=schedule.beta * ratios[:, 0].mean().item(),
        reward_rejected=schedule.beta * ratios[:, 1].mean().item(),
        pairs=len(order),
    )
