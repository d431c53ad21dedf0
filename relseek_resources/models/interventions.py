"""What may be done to the residual stream after a block: add a vector, hold a projection within bounds, or take it out.

Here belong the kinds of intervention, their arithmetic, and thresholds read off ordinary traffic. Which hooks carry them to which rows
belongs in `steered.py`; a ready-made capped model in `capped.py`.

Two published systems call opposite things "capping". llm-personality-axes keeps the projection from falling: a `Floor`. assistant-axis keeps it
from rising, with vectors stored so that the unwanted side is positive: a `Ceiling`. `Floor(v, layers, τ)` and `Ceiling(-v, layers, -τ)` are
the same intervention.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from operator import index
from typing import Any

import numpy as np
import torch

from relseek_resources.models.loading import ModelError

Number = float | Sequence[float]  # one for all rows of a call, or one a row


@dataclass(frozen=True, eq=False)
class Active:
    """An intervention made ready for one model.

    `values` are tensors that broadcast over a stream (rows, length, width), their first axis 1 or `rows` long; `change(stream, *values)` is the
    new stream. `number` names what was given one a row; `rows` is None where nothing was. An idle one changes no row.
    """

    layers: tuple[int, ...]
    number: str
    rows: int | None
    idle: bool
    values: tuple[torch.Tensor, ...]
    change: Callable[..., torch.Tensor]

    def on(self, stream: torch.Tensor, rows: torch.Tensor | None) -> torch.Tensor:
        """The changed stream, where `rows` says which rows of the call the stream holds (None: all, in order)."""
        chosen = self.values if self.rows is None or rows is None else (value[rows] for value in self.values)
        return self.change(stream, *chosen)


@dataclass(frozen=True, eq=False)
class Intervention(ABC):
    """A vector (width,) and the 0-indexed block or blocks after which it works, at every token of prompt and reply."""

    vector: Any = field(repr=False)
    layers: int | Sequence[int]

    @property
    def blocks(self) -> tuple[int, ...]:
        """The blocks by number.

        Raises:
            ModelError: no block, or one named twice.
        """
        blocks = (self.layers,) if isinstance(self.layers, int | np.integer) else tuple(self.layers)
        if not blocks or len(set(blocks)) < len(blocks):
            raise ModelError(f"{type(self).__name__}: layers must name one block or more, each once, got {self.layers!r}")
        return tuple(index(block) for block in blocks)

    @abstractmethod
    def active(self, direction: torch.Tensor, dtype: torch.dtype) -> Active:
        """Make ready for a model of `dtype`; `direction` is the vector as float32 (width,) on its device."""


@dataclass(frozen=True, eq=False)
class Add(Intervention):
    """Add `multiplier * vector`: h + λv. The vector's length counts. λv is rounded to the model's dtype before it is added."""

    multiplier: Number = 1.0

    def active(self, direction: torch.Tensor, dtype: torch.dtype) -> Active:
        doses = _numbers("multiplier", self.multiplier, direction)
        added = (doses.reshape(-1, 1, 1) * direction).to(dtype)
        return Active(self.blocks, "multiplier", _rows(doses), not doses.any(), (added,), torch.add)


@dataclass(frozen=True, eq=False)
class Floor(Intervention):
    """Keep the projection p = h·v̂ from falling below `threshold`: h + max(τ - p, 0) v̂, with v̂ = v / ‖v‖.

    What llm-personality-axes calls capping (spec section 11.1). For vectors that point to the wanted side. -inf leaves a row alone.
    """

    threshold: Number

    def active(self, direction: torch.Tensor, dtype: torch.dtype) -> Active:
        limits, unit = _numbers("threshold", self.threshold, direction, off=-math.inf), unit_vector(direction)

        def raised(stream: torch.Tensor, limit: torch.Tensor) -> torch.Tensor:
            return _moved(stream, unit, (limit - _projection(stream, unit)).clamp(min=0))

        return Active(self.blocks, "threshold", _rows(limits), bool(torch.isinf(limits).all()), (limits.reshape(-1, 1, 1),), raised)


@dataclass(frozen=True, eq=False)
class Ceiling(Intervention):
    """Keep the projection p = h·v̂ from rising above `threshold`: h - max(p - τ, 0) v̂, with v̂ = v / ‖v‖.

    What assistant-axis calls capping (spec section 11.2). For vectors that point to the unwanted side. inf leaves a row alone.
    """

    threshold: Number

    def active(self, direction: torch.Tensor, dtype: torch.dtype) -> Active:
        limits, unit = _numbers("threshold", self.threshold, direction, off=math.inf), unit_vector(direction)

        def lowered(stream: torch.Tensor, limit: torch.Tensor) -> torch.Tensor:
            return _moved(stream, unit, (limit - _projection(stream, unit)).clamp(max=0))

        return Active(self.blocks, "threshold", _rows(limits), bool(torch.isinf(limits).all()), (limits.reshape(-1, 1, 1),), lowered)


@dataclass(frozen=True, eq=False)
class Ablate(Intervention):
    """Take the projection out: h - s (h·v̂) v̂. `strength` s is the share taken: 1 all of it, 0 leaves a row alone."""

    strength: Number = 1.0

    def active(self, direction: torch.Tensor, dtype: torch.dtype) -> Active:
        shares, unit = _numbers("strength", self.strength, direction), unit_vector(direction)

        def removed(stream: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
            return _moved(stream, unit, -share * _projection(stream, unit))

        return Active(self.blocks, "strength", _rows(shares), not shares.any(), (shares.reshape(-1, 1, 1),), removed)


@dataclass(frozen=True, eq=False)
class MeanAblate(Intervention):
    """Put the mean of ordinary traffic in the projection's place: h + s (mean - h·v̂) v̂. `strength` as in `Ablate`.

    `mean` is a projection, as `SteeredModel.projections(...).mean(0)` gives it. assistant-axis adds a whole mean activation instead, which also
    moves the stream across v̂; where that activation is the projection's mean along v̂, the two are the same.
    """

    mean: Number
    strength: Number = 1.0

    def active(self, direction: torch.Tensor, dtype: torch.dtype) -> Active:
        means, shares = _numbers("mean", self.mean, direction), _numbers("strength", self.strength, direction)
        unit = unit_vector(direction)
        if means.ndim and shares.ndim and len(means) != len(shares):
            raise ModelError(f"MeanAblate: {len(means)} means but {len(shares)} strengths; give one of each a row")

        def replaced(stream: torch.Tensor, mean: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
            return _moved(stream, unit, share * (mean - _projection(stream, unit)))

        number, rows = ("mean", len(means)) if means.ndim else ("strength", _rows(shares))
        values = tuple(value.reshape(-1, 1, 1) for value in torch.broadcast_tensors(means, shares))
        return Active(self.blocks, number, rows, not shares.any(), values, replaced)


def thresholds(projections: Any, percentile: float) -> np.ndarray:
    """The percentile of ordinary traffic's projections at each layer, float64 (layers,), interpolated linearly.

    A low percentile makes a `Floor` that ordinary replies seldom touch, a high one such a `Ceiling`. assistant-axis's `p0.25` is 25 here.

    Args:
        projections: (rows, layers), as `SteeredModel.projections` gives them.
        percentile: in percent, 0 to 100.

    Raises:
        ModelError: no rows, NaN among them, or a percentile that is none. Between 0 and 1 it is refused as a share given for percent.
    """
    found = np.asarray(projections, dtype=np.float64)
    if found.ndim != 2 or not len(found) or not np.isfinite(found).all():
        raise ModelError(f"thresholds need finite projections of shape (rows, layers) with one row or more, got the shape {found.shape}")
    if not 0 <= percentile <= 100 or 0 < percentile < 1:
        raise ModelError(f"the percentile is given in percent, 0 or 1 to 100, got {percentile}; for a share of a quarter give 25")
    return np.percentile(found, percentile, axis=0)


def unit_vector(direction: torch.Tensor) -> torch.Tensor:
    """v / ‖v‖ in float32, refusing a zero vector, which has no direction to project on."""
    norm = direction.double().norm()
    if norm == 0:
        raise ModelError("the vector is zero: there is no direction to project on")
    return (direction.double() / norm).float()


def _projection(stream: torch.Tensor, unit: torch.Tensor) -> torch.Tensor:
    """h·v̂, float32 (rows, length, 1). A sum of products: unlike a matrix product it ignores the batch's shape, autocast and TF32."""
    return (stream.float() * unit).sum(-1, keepdim=True)


def _moved(stream: torch.Tensor, unit: torch.Tensor, amount: torch.Tensor) -> torch.Tensor:
    """h + amount v̂, computed in float32 and rounded to the stream's dtype once; where the amount is 0, h itself."""
    return (stream.float() + amount * unit).to(stream.dtype)


def _numbers(name: str, value: Number, direction: torch.Tensor, off: float = math.nan) -> torch.Tensor:
    """`value` as float32, () or (rows,); finite, or `off` where that stands for doing nothing."""
    numbers = torch.as_tensor(value, dtype=torch.float32, device=direction.device)
    if numbers.ndim > 1 or not (torch.isfinite(numbers) | (numbers == off)).all():
        besides = "" if math.isnan(off) else f" ({off} leaves a row alone)"
        raise ModelError(f"the {name} must be a finite number or a row of them{besides}, got {value!r}")
    return numbers


def _rows(numbers: torch.Tensor) -> int | None:
    return len(numbers) if numbers.ndim else None
