"""BiPO as the published trainers compute it: the honest alternative that ours is compared with, in results by the tests and in time by `make bench`.

A policy pass and a reference pass of whole padded sequences, chosen and rejected one above the other, logits of every token. Pairs, their order,
signs and rates are those of `objective.py`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from relseek_assets.vectors.objective import Schedule, TokenPairs, bipo_loss, direction_of, epoch_batches, learning_rate
from relseek_resources.models import SteeredModel
from relseek_resources.models.steered import Batch


def batch_of(model: SteeredModel, tokens: TokenPairs, rows: Sequence[int]) -> tuple[Batch, torch.Tensor]:
    """Chosen above rejected, padded, and which tokens are a reply's."""
    both = [(tokens.prompts[pair], tokens.replies[pair][side]) for side in (0, 1) for pair in rows]
    batch = model.batch([[*prompt, *reply] for prompt, reply in both])
    labelled = torch.zeros_like(batch.ids, dtype=torch.bool)
    for row, (prompt, reply) in enumerate(both):
        labelled[row, len(prompt) : len(prompt) + len(reply)] = True
    return batch, labelled


def reply_log_probs(model: SteeredModel, batch: Batch, labelled: torch.Tensor) -> torch.Tensor:
    """log π(y|x) of every row, from the logits of every token."""
    logits = model.model(input_ids=batch.ids, attention_mask=batch.mask).logits[:, :-1].float()
    found = logits.log_softmax(-1).gather(-1, batch.ids[:, 1:, None]).squeeze(-1)
    return (found * labelled[:, 1:]).sum(-1)


def loss_of(
    model: SteeredModel, tokens: TokenPairs, rows: Sequence[int], layer: int, vector: torch.Tensor, direction: int, beta: float
) -> torch.Tensor:
    batch, labelled = batch_of(model, tokens, rows)
    with torch.no_grad():
        reference = reply_log_probs(model, batch, labelled)
    handle = model.blocks[layer].register_forward_hook(lambda _module, _inputs, stream: stream + (direction * vector).to(stream.dtype))
    try:
        ratios = reply_log_probs(model, batch, labelled) - reference
    finally:
        handle.remove()
    return bipo_loss(ratios.view(2, len(rows)).T, direction, beta).mean()


def train(model: SteeredModel, layer: int, tokens: TokenPairs, schedule: Schedule, seed: int) -> tuple[np.ndarray, list[float]]:
    """The vector after the last epoch, float32 (width,), and the loss of every step."""
    vector = torch.zeros(model.width, device=model.device, requires_grad=True)
    optimiser = torch.optim.AdamW([vector], lr=schedule.learning_rate, weight_decay=schedule.weight_decay)
    epochs = range(1, schedule.epochs + 1)
    batches = [
        (epoch, number, rows)
        for epoch in epochs
        for number, rows in enumerate(epoch_batches(tokens.names, tokens.lengths, epoch, schedule.batch_size, seed))
    ]
    losses: list[float] = []
    for epoch, number, rows in batches:
        optimiser.param_groups[0]["lr"] = learning_rate(len(losses), len(batches), schedule)
        loss = loss_of(model, tokens, rows, layer, vector, direction_of(seed, epoch, number), schedule.beta)
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_([vector], schedule.max_grad_norm)
        optimiser.step()
        losses.append(loss.item())
    return vector.detach().cpu().numpy(), losses
