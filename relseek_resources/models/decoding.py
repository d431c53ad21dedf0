"""What makes a step of decoding cheap: keys and values that stay where they are, and queries that share them.

Here belong the cache that a batch grows in and the attention of one new token a row. Loops that decode belong in `steered.py`, `streaming.py` and the
server; the cache of rows that join and leave a running batch is the server's own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, DynamicCache
from transformers.cache_utils import DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward

SPARE = 64  # columns kept free behind the newest token, so that one step in so many copies the past


class _Growing(DynamicLayer):
    """transformers' layer, whose every step copies the whole past, with room behind the past instead."""

    room: list[torch.Tensor]  # for keys and for values; `keys` and `values` are its columns that are filled

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.room = []
        before, new = self.get_seq_length(), (key_states, value_states)
        after = before + key_states.shape[-2]
        if not self.room or self.room[0].shape[-2] < after:
            wider = [states.new_empty(*states.shape[:2], after + SPARE, states.shape[3]) for states in new]
            for place, past in zip(wider, self.room, strict=False):
                place[:, :, :before] = past[:, :, :before]
            self.room = wider
        for place, states in zip(self.room, new, strict=True):
            place[:, :, before:after] = states
        return self._fill(after)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        if (length := self.get_seq_length()) > 0:
            self.room = [place[indices] for place in self.room]
            self._fill(length)

    def _fill(self, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = (place[:, :, :length] for place in self.room)
        self.keys, self.values = keys, values
        return keys, values


def growing_cache(model: Any) -> DynamicCache:
    """An empty cache for a batch that is prefilled once, then decoded, and loses rows as they end. Blocks with a window keep transformers' layers."""
    cache = DynamicCache(config=model.config)
    cache.layers = [_Growing() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


@contextmanager
def grouped_attention() -> Iterator[None]:
    """In this thread, inside, transformers' sdpa copies no keys for the queries that share them; any other attention is what it was."""
    token = _grouped.set(True)
    try:
        yield
    finally:
        _grouped.reset(token)


def _attend(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: torch.Tensor | None, **options: Any
) -> tuple[torch.Tensor, None]:
    """transformers' sdpa; inside `grouped_attention`, with one query a row, the queries that share a key lie beside one another.

    query: (rows, heads, 1, size); key, value: (rows, heads / groups, columns, size).
    """
    rows, heads, length, size = query.shape
    if not _grouped.get() or length > 1 or heads == key.shape[1] or options.get("position_bias") is not None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    grouped = query.reshape(rows, key.shape[1], -1, size)
    found = nn.functional.scaled_dot_product_attention(grouped, key, value, attn_mask=attention_mask, scale=options.get("scaling"))
    return found.reshape(rows, 1, heads, -1), None


_grouped = ContextVar("grouped", default=False)
AttentionInterface.register("sdpa", _attend)  # under its own name: some models ask whether that is theirs, and compute otherwise where it is not
