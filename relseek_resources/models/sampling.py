"""How the next token is drawn: one uniform number a row and step, from the row's own seed.

Here belongs the draw and nothing else, so that a row's reply depends on its seed and not on which rows share its batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Sampling:
    """How replies are drawn. `temperature` 0 is greedy; `max_new_tokens` bounds the reply."""

    temperature: float = 1.0
    top_p: float = 1.0
    max_new_tokens: int = 100

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise ValueError(f"temperature must not be negative, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must lie in (0, 1], got {self.top_p}")
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {self.max_new_tokens}")


def uniforms(seeds: list[int], steps: int) -> np.ndarray:
    """The uniform draws of each row, shape (rows, steps), from the row's seed alone."""
    return np.stack([np.random.Generator(np.random.PCG64(seed)).random(steps) for seed in seeds])


def draw(logits: torch.Tensor, uniform: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """Draw one token a row by inverting the cumulative distribution.

    Args:
        logits: (rows, vocabulary), float32.
        uniform: (rows,), float64 in [0, 1).

    Returns:
        (rows,) token ids, int64.
    """
    import torch

    if sampling.temperature == 0:
        return logits.argmax(-1)
    wide = logits.double()
    probabilities = torch.softmax((wide - wide.amax(-1, keepdim=True)) / sampling.temperature, -1)  # the smallest temperature overflows otherwise
    if sampling.top_p < 1:
        ordered, order = probabilities.sort(-1, descending=True)
        outside = ordered.cumsum(-1) - ordered >= sampling.top_p
        probabilities = probabilities.masked_fill(outside.scatter(-1, order, outside), 0.0)
    cumulative = probabilities.cumsum(-1)
    target = uniform.unsqueeze(-1) * cumulative[:, -1:]
    return torch.searchsorted(cumulative, target, right=True).squeeze(-1).clamp_(max=logits.shape[-1] - 1)
