"""What BiPO minimises and in which order it sees pairs: the parts that every way of training shares.

Here belong pairs and their tokens, the settings of the optimiser, the loss, the learning rate, and the keyed order of batches and signs. How the
log-ratios come about belongs to the trainers: one process in `bipo.py`, many in `trl_trainer.py`.

Source: Cao et al. 2024, "Personalized steering of large language models: versatile steering vectors through bi-directional preference
optimization", equation 3 (spec/pipeline.md, sections 2.1 to 2.3). Unlike the published trainers the prompt ends with the assistant header, as it
does in generation, and v is not added to padding.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from relseek_resources.storage import keyed_order, keyed_seed

if TYPE_CHECKING:
    from relseek_resources.models import SteeredModel
    from relseek_resources.models.steered import Conversation

BUCKET = 4  # batches whose pairs are sorted by length together: less padding, still a random order


@dataclass(frozen=True)
class Pair:
    """A prompt with the reply to prefer and the reply to avoid, as text."""

    name: str
    prompt: Conversation
    chosen: str
    rejected: str


@dataclass(frozen=True)
class TokenPairs:
    """Pairs as token ids; `replies` holds chosen and rejected, end token included.

    `too_long` and `alike` count the pairs left out: those beyond the limit, and those whose two replies are the same.
    """

    names: list[str]
    prompts: list[list[int]]
    replies: list[tuple[list[int], list[int]]]
    too_long: int
    alike: int = 0

    def length(self, pair: int) -> int:
        """Tokens of the prompt and the longer reply."""
        return len(self.prompts[pair]) + max(map(len, self.replies[pair]))

    @property
    def lengths(self) -> list[int]:
        return [self.length(pair) for pair in range(len(self.names))]


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


def token_pairs(model: SteeredModel, pairs: Sequence[Pair], *, count: int, max_tokens: int) -> TokenPairs:
    """The first `count` pairs (0: all) that fit `max_tokens`, as tokens.

    A pair whose prompt and longer reply exceed `max_tokens` is left out and counted, never truncated; so is one whose replies are the same, which
    prefers nothing.

    Raises:
        ValueError: two pairs of one name, which the order of batches could not tell apart, or no pair that fits.
    """
    names = [candidate.name for candidate in pairs]
    repeated = sorted({name for name in names if names.count(name) > 1}) if len(set(names)) < len(names) else []
    if repeated:
        raise ValueError(f"{len(repeated)} names stand for several pairs, {repeated[0]!r} among them; give every pair a name of its own")
    kept = TokenPairs([], [], [], 0)
    too_long = alike = 0
    for candidate in pairs:
        if count and len(kept.names) == count:
            break
        prompt = model.prompt_tokens(candidate.prompt)
        both = (model.reply_tokens(candidate.chosen), model.reply_tokens(candidate.rejected))
        if both[0] == both[1]:
            alike += 1
            continue
        if len(prompt) + max(map(len, both)) > max_tokens:
            too_long += 1
            continue
        kept.names.append(candidate.name)
        kept.prompts.append(prompt)
        kept.replies.append(both)
    if not kept.names:
        raise ValueError(f"none of {len(pairs)} pairs fits {max_tokens} tokens; raise pairs.max_tokens in the study")
    return TokenPairs(kept.names, kept.prompts, kept.replies, too_long, alike)


def bipo_loss(ratios: torch.Tensor, direction: int, beta: float) -> torch.Tensor:
    """-log σ(d β (Δ_w - Δ_l)), one value a pair, from log-ratios (pairs, 2) in nats."""
    return -torch.nn.functional.logsigmoid(direction * beta * (ratios[:, 0] - ratios[:, 1]))


def epoch_batches(names: Sequence[str], lengths: Sequence[int], epoch: int, batch_size: int, seed: int) -> list[list[int]]:
    """Batches of pair numbers in a keyed random order, pairs of similar length together. Epochs count from 1."""
    place = {name: pair for pair, name in enumerate(names)}
    order = [place[name] for name in keyed_order(names, seed, "epoch", epoch)]
    batches = []
    for start in range(0, len(order), BUCKET * batch_size):
        bucket = sorted(order[start : start + BUCKET * batch_size], key=lambda pair: (lengths[pair], pair))
        batches += [bucket[at : at + batch_size] for at in range(0, len(bucket), batch_size)]
    shuffled = keyed_order([str(index) for index in range(len(batches))], seed, "batches", epoch)
    return [batches[int(index)] for index in shuffled]


def direction_of(seed: int, epoch: int, batch: int) -> int:
    """The sign d of an epoch's batch, +1 or -1: from the seed and the batch's number alone, so that layers see the same sequence."""
    return 1 if keyed_seed(seed, "direction", epoch, batch) % 2 else -1


def learning_rate(step: int, steps: int, schedule: Schedule) -> float:
    """Linear warm-up, then a cosine to zero; `step` counts from 0."""
    warmup = min(schedule.warmup_steps, max(1, steps // 4))
    if step < warmup:
        return schedule.learning_rate * (step + 1) / warmup
    return schedule.learning_rate * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))
