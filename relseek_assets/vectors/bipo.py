"""BiPO in one process: a steering vector from preference pairs, computing only what changes.

Here belong the training loop, its checkpoints and the held-out evaluation. The base weights are frozen and v enters after block l, so activations up
to block l and the reference log-probabilities come from `stream_cache.py`, once for all layers of a model; every step runs only the blocks above, the
prompt once for both replies, without padding, and makes logits of reply tokens only. What is minimised, and in which order, belongs in
`objective.py`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.autograd.function import once_differentiable

from relseek_assets.vectors.objective import Schedule, bipo_loss, direction_of, epoch_batches, learning_rate
from relseek_assets.vectors.stream_cache import CachedPairs, Scratch, pair_totals
from relseek_resources.models import SteeredModel
from relseek_resources.storage import StorageError, content_version, read_tensors, write_tensors

Report = Callable[[int], None]
SAVE_EVERY = 60.0  # seconds between checkpoints within an epoch; each epoch's end has one too


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


class _Steered(torch.autograd.Function):
    """base + v at every token. Unlike a plain sum, v's gradient is added up in float32 whatever the stream's dtype."""

    @staticmethod
    def forward(ctx: Any, base: torch.Tensor, vector: torch.Tensor) -> torch.Tensor:
        return base + vector.to(base.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[None, torch.Tensor]:
        return None, upstream.float().sum((0, 1))


def log_ratios(model: SteeredModel, cached: CachedPairs, layer: int, rows: Sequence[int], steered: torch.Tensor) -> torch.Tensor:
    """log π_v(y|x) - log π_ref(y|x) of both replies of each pair, float32 (pairs, 2), in nats.

    Args:
        steered: (width,) float32, what is added to the stream after block `layer`, d·v; gradients reach it.
    """
    packed = cached.pack(model, rows)
    stream = _Steered.apply(cached.stream(model, layer, rows), steered)
    found = pair_totals(model.packed_log_probs_from(packed, layer, stream), packed)
    return found - cached.reference[list(rows)].to(found)


@dataclass
class _Run:
    """All that a run is: what a checkpoint holds, and nothing that cannot be worked out again. Batches, signs and rates follow from `step`."""

    vector: torch.Tensor
    optimiser: torch.optim.AdamW
    losses: list[float] = field(default_factory=list)
    directions: list[int] = field(default_factory=list)
    vectors: list[np.ndarray] = field(default_factory=list)
    evaluations: list[Evaluation] = field(default_factory=list)

    @property
    def step(self) -> int:
        return len(self.losses)

    def save(self, path: Path, version: str) -> None:
        state = self.optimiser.state[self.vector]
        arrays = {
            "vector": self.vector.detach().cpu().numpy(),
            "exp_avg": state["exp_avg"].cpu().numpy(),
            "exp_avg_sq": state["exp_avg_sq"].cpu().numpy(),
            "losses": np.array(self.losses, dtype=np.float32),
            "vectors": np.array(self.vectors, dtype=np.float32).reshape(-1, len(self.vector)),
        }
        header = {"version": version, "directions": json.dumps(self.directions), "evaluations": json.dumps([asdict(e) for e in self.evaluations])}
        write_tensors(path, arrays, header)

    def restore(self, path: Path, version: str) -> None:
        """Go on from a checkpoint of the same run; without one, or after a change of anything that matters, from the start."""
        try:
            arrays, header = read_tensors(path)
        except StorageError:
            return
        if header.get("version") != version:
            return
        tensors = {name: torch.from_numpy(arrays[name].copy()).to(self.vector.device) for name in ("vector", "exp_avg", "exp_avg_sq")}
        with torch.no_grad():
            self.vector.copy_(tensors.pop("vector"))
        self.losses, self.directions = arrays["losses"].tolist(), json.loads(header["directions"])
        self.optimiser.state[self.vector] = {"step": torch.tensor(float(self.step)), **tensors}
        self.vectors = list(arrays["vectors"])
        self.evaluations = [Evaluation(**found) for found in json.loads(header["evaluations"])]


def train(
    model: SteeredModel,
    layer: int,
    training: CachedPairs,
    heldout: CachedPairs,
    schedule: Schedule,
    *,
    seed: int,
    scratch: Scratch | None = None,
    report: Report = lambda pairs: None,
) -> TrainedVector:
    """Train one layer's vector and keep it after every epoch; vector and optimiser are float32 whatever the model's dtype.

    The direction d of a batch comes from the seed, the epoch and the batch's number, so that layers see the same sequence.

    Args:
        scratch: where checkpoints go; a run of the same version that was killed goes on from the last one and ends with the same bits.
        report: is told the pairs done, evaluation included.
    """
    vector = torch.zeros(model.width, device=model.device, requires_grad=True)
    run = _Run(vector, torch.optim.AdamW([vector], lr=schedule.learning_rate, betas=(0.9, 0.999), eps=1e-8, weight_decay=schedule.weight_decay))
    made_of = [scratch.version if scratch else "", str(model.dtype), training.names, heldout.names, layer, asdict(schedule), seed]
    path, version = (scratch.checkpoint(layer) if scratch else None), content_version(made_of)
    if path is not None:
        run.restore(path, version)
    batches = [epoch_batches(training.names, training.lengths, epoch, schedule.batch_size, seed) for epoch in range(1, schedule.epochs + 1)]
    steps, saved, at = sum(map(len, batches)), time.monotonic(), 0
    for epoch, epoch_rows in enumerate(batches, 1):
        for number, rows in enumerate(epoch_rows):
            at += 1
            if at > run.step:
                _take_step(model, layer, training, rows, run, direction_of(seed, epoch, number), learning_rate(run.step, steps, schedule), schedule)
                if path is not None and time.monotonic() - saved > SAVE_EVERY:
                    run.save(path, version)
                    saved = time.monotonic()
            report(len(rows))
        if len(run.vectors) < epoch:
            evaluations = [evaluate(model, layer, heldout, vector.detach(), epoch, d, schedule, report) for d in (1, -1)]
            run.vectors.append(vector.detach().cpu().numpy().copy())
            run.evaluations += evaluations
            if path is not None:
                run.save(path, version)
        else:
            report(2 * len(heldout.names))
    losses, directions = np.array(run.losses, dtype=np.float32), np.array(run.directions, dtype=np.float32)
    return TrainedVector(np.stack(run.vectors), losses, directions, tuple(run.evaluations))


def _take_step(
    model: SteeredModel, layer: int, training: CachedPairs, rows: Sequence[int], run: _Run, direction: int, rate: float, schedule: Schedule
) -> None:
    for group in run.optimiser.param_groups:
        group["lr"] = rate
    loss = bipo_loss(log_ratios(model, training, layer, rows, direction * run.vector), direction, schedule.beta).mean()
    run.optimiser.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_([run.vector], schedule.max_grad_norm)
    run.optimiser.step()
    run.losses.append(loss.item())
    run.directions.append(direction)


@torch.inference_mode()
def evaluate(
    model: SteeredModel, layer: int, heldout: CachedPairs, vector: torch.Tensor, epoch: int, direction: int, schedule: Schedule, report: Report
) -> Evaluation:
    """Held-out loss, rewards and sign-correct accuracy at d = +1 or -1."""
    order = sorted(range(len(heldout.names)), key=lambda pair: (heldout.lengths[pair], pair))
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
