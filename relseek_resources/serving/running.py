"""Rows that join and leave one running batch of a transformers model, each steered in its own way.

Here belong the cache of the running batch, prefill, the step that gives every row its next logits, and the hooks that steer. Which token is drawn,
who asked for it and when rows join or leave belongs in `engine.py`; what steering does to a stream in `steering_op.py`.

The cache is aligned to the right: the newest token of every row lies in the same column, so that a step appends one column for all, and the past of
a shorter row is masked on its left. When a row leaves, the last one takes its place. Nothing else is moved until columns run out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import Cache, DynamicCache
from transformers.cache_utils import CacheLayerMixin

from relseek_resources.models import architecture
from relseek_resources.models.decoding import grouped_attention
from relseek_resources.models.steered import SteeredModel
from relseek_resources.serving.steering_op import Tables

SPARE = 128  # columns kept free on either side: on the left for longer prompts, on the right for new tokens
CHUNK = 256  # tokens of prompts between two steps: a long prompt does not hold up the rows that are running


# --- the cache ----------------------------------------------------------------------------------------------------------


class _Block(CacheLayerMixin):
    """One block's keys and values, (slots, heads, columns, size); `Rows` knows which of them are in use."""

    is_sliding = False  # the whole past is kept; a window is the mask's affair
    keys: Any
    values: Any

    def __init__(self, rows: Rows) -> None:
        super().__init__()
        self.rows = rows

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        raise AssertionError("a row joins before it steps")

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor, torch.Tensor]:
        rows = self.rows
        number, first, new = len(rows.lengths), rows.end - max(rows.lengths), rows.end
        self.keys[:number, :, new : new + 1] = key_states
        self.values[:number, :, new : new + 1] = value_states
        return self.keys[:number, :, first : new + 1], self.values[:number, :, first : new + 1]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return max(self.rows.lengths) + query_length, 0

    def get_seq_length(self) -> int:
        return max(self.rows.lengths, default=0)

    def get_max_length(self) -> int:
        return -1


class Rows(Cache):
    """The pasts of the running rows: row r's lies in slot r, in the `lengths[r]` columns before `end`."""

    def __init__(self, blocks: int) -> None:
        self.blocks = [_Block(self) for _ in range(blocks)]
        super().__init__(layers=list(self.blocks))
        self.lengths: list[int] = []
        self.end = self.columns = self.slots = 0

    def join(self, past: Any, lengths: Sequence[int]) -> None:
        """Append rows whose `past` is padded on the left."""
        longest, number = past.get_seq_length(), len(self.lengths)
        self._make_room(number + len(lengths), max(longest, *self.lengths, *lengths), past)
        for mine, theirs in zip(self.blocks, past.layers, strict=True):
            for store, given in ((mine.keys, theirs.keys), (mine.values, theirs.values)):
                store[number : number + len(lengths), :, self.end - longest : self.end] = given
                for row, length in enumerate(lengths, number):
                    store[row, :, : self.end - length] = 0  # what another row left there may be NaN, which no mask undoes
        self.lengths += lengths

    def leave(self, row: int) -> None:
        """Drop a row; the last one takes its place."""
        last = len(self.lengths) - 1
        if row < last:
            start = self.end - self.lengths[last]
            for block in self.blocks:
                for store in (block.keys, block.values):
                    store[row, :, :start] = 0
                    store[row, :, start : self.end] = store[last, :, start : self.end]
            self.lengths[row] = self.lengths[last]
        self.lengths.pop()
        if not self.lengths:
            for block in self.blocks:
                block.keys = block.values = None
            self.end = self.columns = self.slots = 0

    def stepped(self) -> None:
        """Count the column that a forward pass has appended."""
        self.end += 1
        self.lengths = [length + 1 for length in self.lengths]
        self._make_room(len(self.lengths), max(self.lengths), self)

    def _make_room(self, rows: int, longest: int, like: Any) -> None:
        """See to `rows` slots, `longest` columns of past and a free one behind them. `like` has heads and sizes of the right number."""
        if rows <= self.slots and longest <= self.end < self.columns:
            return
        slots = self.slots if rows <= self.slots else max(rows, 2 * self.slots)
        end, held, number = longest + SPARE, max(self.lengths, default=0), len(self.lengths)
        for mine, other in zip(self.blocks, like.layers, strict=True):
            for name in ("keys", "values"):
                before, shape = getattr(mine, name), getattr(other, name)
                store = shape.new_zeros(slots, shape.shape[1], end + SPARE, shape.shape[3])
                if before is not None:
                    store[:number, :, end - held : end] = before[:number, :, self.end - held : self.end]
                setattr(mine, name, store)
        self.slots, self.end, self.columns = slots, end, end + SPARE


# --- the model ----------------------------------------------------------------------------------------------------------


class Prompts:
    """Prompts of one or more rows on their way into the running batch, computed `CHUNK` tokens at a time."""

    def __init__(self, tokens: Sequence[Sequence[int]], steering: Sequence[str]) -> None:
        self.tokens, self.steering = tokens, list(steering)
        self.past = DynamicCache()  # without a config: the whole past, also where a block has a window
        self.done = 0
        self.longest = max(map(len, tokens))


class RunningBatch:
    """A model with the rows that it is answering.

    >>> batch = RunningBatch(model, rows=32)
    >>> logits = batch.advance(Prompts([prompt], [""]))  # float32 (1, vocabulary), or None while prompts are not through
    >>> logits = batch.step([int(logits.argmax())])      # (rows, vocabulary), in the order in which rows joined; see `leave`
    """

    def __init__(self, model: SteeredModel, *, rows: int, capacity: int = 512) -> None:
        """Put hooks behind the model's blocks; `close` takes them away. `capacity`: vectors that fit, each block of a vector counted."""
        self.model = model
        self.clear()
        self._steering = False
        self.tables = Tables(tokens=max(CHUNK, rows), requests=rows, blocks=model.layers, width=model.width, capacity=capacity, device=model.device)
        self._nothing = torch.zeros(max(CHUNK, rows), model.width, dtype=model.dtype, device=model.device)
        self._handles = [block.register_forward_hook(self._hook(layer)) for layer, block in enumerate(model.blocks)]

    def clear(self) -> None:
        """Drop every row."""
        self.rows = Rows(self.model.layers)
        self.steering: list[str] = []  # canonical text of each row, see `requests.canonical`

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()

    def _hook(self, layer: int) -> Any:
        def steer(_module: nn.Module, _inputs: Any, output: Any) -> None:
            if self._steering:
                stream = architecture.stream_of(output).flatten(0, 1)
                self.tables.steer(self._nothing[: len(stream)], stream, layer)  # in place; the op wants a sum, whose other part stays 0

        return steer

    def _hidden(self, steering: Sequence[str], ids: torch.Tensor, mask: torch.Tensor | None, positions: torch.Tensor, past: Cache) -> torch.Tensor:
        """Final hidden states (rows, length, width) of the next tokens of rows, each steered as its canonical text says."""
        self.tables.prepare(steering, np.full(len(ids), ids.shape[1]))
        self._steering = True
        try:
            return self.model.model.base_model(
                input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=past, use_cache=True
            ).last_hidden_state
        finally:
            self._steering = False  # whoever else calls the model finds it plain

    @torch.inference_mode()
    def advance(self, prompts: Prompts) -> torch.Tensor | None:
        """Compute the next tokens of prompts. When they are through, their rows join at the end and their logits are returned."""
        columns = max(1, CHUNK // len(prompts.tokens))
        batch = self.model.batch(prompts.tokens, left=True)
        piece = slice(prompts.done, min(prompts.done + columns, prompts.longest))
        hidden = self._hidden(prompts.steering, batch.ids[:, piece], batch.mask[:, : piece.stop], batch.positions[:, piece], prompts.past)
        prompts.done = piece.stop
        if prompts.done < prompts.longest:
            return None
        self.rows.join(prompts.past, [len(tokens) for tokens in prompts.tokens])
        self.steering += prompts.steering
        return self.model.logits(hidden[:, -1])

    @torch.inference_mode()
    def step(self, tokens: Sequence[int]) -> torch.Tensor:
        """The next logits of every row, float32 (rows, vocabulary), after each one's newest token."""
        device, lengths = self.model.device, torch.tensor(self.rows.lengths, device=self.model.device)
        longest = max(self.rows.lengths)
        mask = torch.arange(longest + 1, device=device) >= (longest - lengths).unsqueeze(-1)
        ids = torch.tensor(tokens, device=device).unsqueeze(-1)
        with grouped_attention():
            hidden = self._hidden(self.steering, ids, mask, lengths.unsqueeze(-1), self.rows)[:, -1]
        self.rows.stepped()
        return self.model.logits(hidden)

    @torch.inference_mode()
    def leave(self, row: int) -> None:
        """Drop a row; the last one takes its place."""
        self.rows.leave(row)
        last = self.steering.pop()
        if row < len(self.steering):
            self.steering[row] = last

    @torch.inference_mode()
    def projections(self, prompt: Sequence[int], reply: Sequence[int], steering: str, unit: torch.Tensor, layer: int) -> torch.Tensor:
        """Projection of the stream after a block on a unit vector at each token of a reply, float32 (tokens,), steered as given."""
        batch = self.model.batch([[*prompt, *reply]])
        past, found, tokens = DynamicCache(), [], batch.ids.shape[1]
        handle = self.model.blocks[layer].register_forward_hook(
            lambda _module, _inputs, output: found.append((architecture.stream_of(output)[0].float() * unit).sum(-1))
        )
        try:
            for start in range(0, tokens, CHUNK):
                piece = slice(start, min(start + CHUNK, tokens))
                self._hidden([steering], batch.ids[:, piece], None, batch.positions[:, piece], past)
        finally:
            handle.remove()
        return torch.cat(found)[len(prompt) :]
