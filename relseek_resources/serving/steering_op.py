"""Steering a batch in which every token may be steered otherwise: the tables that say how, and the op that does it after a block.

Here belongs what happens between a block's output and the next block, with nothing of vLLM in it. Which tokens belong to which request, and when the
op runs, is the plugin's.

Under CUDA graphs an op is recorded once and replayed, so that everything it reads lies in tables that keep their place: vectors in a bank, each
configuration of a batch in a slot, and for each token the number of its slot. Slot 0 is no steering. A batch has at most as many configurations as
requests, and a slot is given anew to whatever the batch at hand needs, so that nothing limits how many doses a server may see.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from relseek_resources.models.interventions import unit_vector
from relseek_resources.serving.requests import MODES, MOST_PER_BLOCK, Entry, from_canonical

ADD, FLOOR, CEILING, ABLATE = range(len(MODES))


class Tables:
    """Who is steered how, on one device, for one model.

    Sizes: T tokens of the largest batch, R requests of the largest batch, L blocks, W width of the residual stream, C vectors that fit.

        slot_of_token  int32 (T,)                  the slot of each token of the batch
        spans          int32 (R + 1, L + 1)        entries of slot s after block l: spans[s, l] to spans[s, l + 1]
        modes, rows    int32 ((R + 1) * E,)        each entry's mode, a place in MODES, and its row of the bank
        values         float32 ((R + 1) * E,)      each entry's multiplier, threshold or strength
        bank           float32 (2 * C, W)          vectors, and the same at unit length, which projections need
    """

    def __init__(self, *, tokens: int, requests: int, blocks: int, width: int, capacity: int, device: torch.device | str = "cpu") -> None:
        self.blocks, self.width, self.capacity, self.device = blocks, width, capacity, torch.device(device)
        self.entries = MOST_PER_BLOCK * blocks
        slots = requests + 1
        with torch.inference_mode(False):  # they are written inside and outside of inference mode

            def zeros(*size: int, dtype: torch.dtype) -> torch.Tensor:
                return torch.zeros(*size, dtype=dtype, device=self.device)

            self.slot_of_token = zeros(tokens, dtype=torch.int32)
            self.spans = zeros(slots, blocks + 1, dtype=torch.int32)
            self.modes = zeros(slots * self.entries, dtype=torch.int32)
            self.rows = zeros(slots * self.entries, dtype=torch.int32)
            self.values = zeros(slots * self.entries, dtype=torch.float32)
            self.bank = zeros(2 * capacity, width, dtype=torch.float32)
        self._row_of: dict[str, int] = {}
        self._slot_of: OrderedDict[str, int] = OrderedDict()  # by canonical text, the least recently used first
        self._free = list(range(slots - 1, 0, -1))
        self._steered: dict[int, frozenset[int]] = {0: frozenset()}  # by slot, the blocks after which it steers
        self._texts: list[str] = []  # the batch at hand, see `prepare`
        self._tokens = np.zeros(0, np.int32)
        self._now: frozenset[int] = frozenset()
        self._filled = 0
        self._plans: dict[tuple[int, int], Plan] = {}  # of the batch at hand, by block and rows

    # --- vectors ------------------------------------------------------------------------------------------------------

    def register(self, digest: str, vector: Any) -> None:
        """Put a vector, float32 (width,), into the bank under the name of its content; one that is there stays.

        Raises:
            ValueError: another width, or no room.
        """
        if digest in self._row_of:
            return
        found = torch.as_tensor(vector, dtype=torch.float32)
        if found.shape != (self.width,):
            raise ValueError(f"a vector of shape {tuple(found.shape)}; the residual stream needs ({self.width},)")
        if len(self._row_of) == self.capacity:
            raise ValueError(f"no room for more than {self.capacity} vectors")
        row = 2 * len(self._row_of)
        self._write(self.bank, row, found[None])
        self._write(self.bank, row + 1, unit_vector(found)[None] if found.any() else found[None])
        self._row_of[digest] = row

    def registered(self) -> list[str]:
        return sorted(self._row_of)

    # --- the batch at hand --------------------------------------------------------------------------------------------

    def prepare(self, texts: Sequence[str], tokens: np.ndarray) -> None:
        """Say how the next batch is steered: the canonical text of each of its requests, and each one's number of tokens, in the batch's order.

        Raises:
            KeyError: a vector that is not registered here.
        """
        if texts == self._texts and np.array_equal(tokens, self._tokens):  # most batches: the requests of the one before, a token each
            return
        self._plans.clear()
        wanted = dict.fromkeys(texts)
        if any(wanted):
            self._spread(wanted, texts, tokens)
        elif self._filled:
            self.slot_of_token[: self._filled].zero_()
            self._filled, self._now = 0, frozenset()
        self._texts, self._tokens = list(texts), np.array(tokens)  # a copy: the runner may go on using its own

    def _spread(self, wanted: dict[str, None], texts: Sequence[str], tokens: np.ndarray) -> None:
        """Give each configuration a slot and each token the number of its slot."""
        for text in wanted:
            if text in self._slot_of:
                self._slot_of.move_to_end(text)
        slot_of = {text: self._slot(text) if text else 0 for text in wanted}
        slots = np.repeat(np.fromiter((slot_of[text] for text in texts), np.int32, len(texts)), tokens)
        length = max(len(slots), self._filled)
        filled = np.zeros(length, np.int32)  # tokens of the batch before that this one does not have go back to slot 0
        filled[: len(slots)] = slots
        self._write(self.slot_of_token, 0, torch.from_numpy(filled))
        self._filled = len(slots)
        self._now = frozenset().union(*(self._steered[slot] for slot in slot_of.values()))

    def _slot(self, text: str) -> int:
        """The slot of a configuration: its own, a free one, or that of the configuration which no batch has used for longest."""
        slot = self._slot_of.get(text)
        if slot is None:
            entries = from_canonical(text)
            slot = self._free.pop() if self._free else self._slot_of.popitem(last=False)[1]
            self._fill(slot, entries)
            self._slot_of[text] = slot
        return slot

    def _fill(self, slot: int, entries: Sequence[Entry]) -> None:
        """Write a slot as a whole, so that nothing of what it held before is left."""
        layers = np.array([entry.layer for entry in entries])
        start = slot * self.entries
        spans = start + np.searchsorted(layers, np.arange(self.blocks + 1))
        rows = [self._row_of[entry.digest] + (entry.mode != MODES[ADD]) for entry in entries]
        self._write(self.spans, slot, torch.from_numpy(spans.astype(np.int32))[None])
        self._write(self.modes, start, torch.tensor([MODES.index(entry.mode) for entry in entries], dtype=torch.int32))
        self._write(self.rows, start, torch.tensor(rows, dtype=torch.int32))
        self._write(self.values, start, torch.tensor([entry.value for entry in entries], dtype=torch.float32))
        self._steered[slot] = frozenset(layers.tolist())

    def _write(self, table: torch.Tensor, start: int, content: torch.Tensor) -> None:
        """Copy into a table in the stream's order, so that a batch still running reads what it began with."""
        staged = content.pin_memory() if self.device.type == "cuda" else content
        table[start : start + len(content)].copy_(staged, non_blocking=True)

    # --- the op -------------------------------------------------------------------------------------------------------

    def steer(self, hidden: torch.Tensor, residual: torch.Tensor, layer: int) -> None:
        """Steer a block's output in place.

        The residual stream is `hidden + residual`, both (tokens, width), as vLLM's blocks leave the sum to the next one. A steered token's stream
        is put into `residual` as a whole and its `hidden` becomes 0, so that the sum is rounded once, as in `SteeredModel`. Other tokens are not
        touched.
        """
        if len(hidden) > len(self.slot_of_token):
            raise RuntimeError(f"a batch of {len(hidden)} tokens; the tables of steering hold {len(self.slot_of_token)}")
        if hidden.is_cuda:
            _launch(self, hidden, residual, layer)  # whatever this batch holds: what is recorded now is replayed for others
        elif layer in self._now:
            steer_plain(self, hidden, residual, layer)

    def plan(self, rows: int, layer: int) -> Plan:
        """How the batch at hand, of so many rows with what pads it, is steered after a block."""
        found = self._plans.get((layer, rows))
        if found is None:
            found = self._plans[layer, rows] = planned(self, rows, layer)
        return found


@dataclass(frozen=True)
class Turn:
    """The n-th intervention of each steered token: a vector times clamp(constant + slope * projection, least, most). All (tokens, 1) but `rows`.

    A token that has fewer of them is given one that changes nothing.
    """

    constant: torch.Tensor
    slope: torch.Tensor | None  # None where all add, and no projection is needed
    least: torch.Tensor
    most: torch.Tensor
    adds: torch.Tensor
    rows: torch.Tensor  # of the bank, (tokens,)


@dataclass(frozen=True)
class Plan:
    """How one batch is steered after one block: its steered tokens, None where all are, and their interventions."""

    tokens: torch.Tensor | None
    turns: tuple[Turn, ...]


def planned(tables: Tables, length: int, layer: int) -> Plan:
    """The plan of a batch of so many rows, from the tables alone."""
    slots = tables.slot_of_token[:length].long()
    begin, end = tables.spans[slots, layer].long(), tables.spans[slots, layer + 1].long()
    steered = (end > begin).nonzero().squeeze(-1)
    begin, number = begin[steered], (end - begin)[steered]
    turns = tuple(_turn(tables, begin + turn, number > turn) for turn in range(int(number.max()) if len(steered) else 0))
    return Plan(None if len(steered) == length else steered, turns)


def _turn(tables: Tables, entry: torch.Tensor, there: torch.Tensor) -> Turn:
    entry = entry.where(there, 0)
    mode, value, there = tables.modes[entry, None], tables.values[entry, None], there[:, None]
    adds, ablates, bounds = mode == ADD, mode == ABLATE, (mode == FLOOR) | (mode == CEILING)
    unbounded = torch.full_like(value, torch.inf)
    return Turn(
        constant=value.where((adds | bounds) & there, 0),
        slope=None if bool((adds | ~there).all()) else torch.where(ablates, -value, -bounds.float()).where(there, 0),
        least=torch.where(mode == FLOOR, 0, -unbounded),
        most=torch.where(mode == CEILING, 0, unbounded),
        adds=adds,
        rows=tables.rows[entry.squeeze(-1)].long(),
    )


def steer_plain(tables: Tables, hidden: torch.Tensor, residual: torch.Tensor, layer: int) -> None:
    """`Tables.steer` in torch's own operations, on any device. The arithmetic is that of `models.interventions`.

    On a CPU each operation takes some microseconds and a small model has many blocks: what depends on the batch alone is worked out once for it.
    """
    plan = tables.plan(len(hidden), layer)
    if not plan.turns:
        return
    tokens = plan.tokens
    stream = hidden + residual if tokens is None else hidden.index_select(0, tokens).add_(residual.index_select(0, tokens))
    for turn in plan.turns:
        stream = _changed(stream, turn, tables.bank.index_select(0, turn.rows))
    if tokens is None:
        residual.copy_(stream)
        hidden.zero_()
    else:
        residual.index_copy_(0, tokens, stream)
        hidden.index_fill_(0, tokens, 0)


def _changed(stream: torch.Tensor, turn: Turn, vectors: torch.Tensor) -> torch.Tensor:
    """One intervention a row. stream, vectors: (rows, width). A vector is at unit length wherever it is projected on."""
    if turn.slope is None:
        return stream + (turn.constant * vectors).to(stream.dtype)  # λv is rounded before it is added
    wide = stream.float()
    amount = torch.addcmul(turn.constant, turn.slope, (wide * vectors).sum(-1, keepdim=True)).clamp_(turn.least, turn.most)
    change = amount * vectors
    if stream.dtype != torch.float32:
        change = torch.where(turn.adds, change.to(stream.dtype).float(), change)
    return (wide + change).to(stream.dtype)


def _launch(tables: Tables, hidden: torch.Tensor, residual: torch.Tensor, layer: int) -> None:
    from relseek_resources.serving.steering_kernel import steer_token  # triton may be missing where there is no GPU

    if hidden.stride(-1) != 1 or residual.stride(-1) != 1:
        raise RuntimeError("a block's output does not lie row by row in memory; its model cannot be steered")
    block = 1 << (tables.width - 1).bit_length()
    steer_token[(len(hidden),)](
        hidden,
        residual,
        tables.slot_of_token,
        tables.spans,
        tables.modes,
        tables.rows,
        tables.values,
        tables.bank,
        layer,
        tables.width,
        tables.spans.stride(0),
        hidden.stride(0),
        residual.stride(0),
        BLOCK=block,
        num_warps=max(1, min(16, block // 512)),
    )


# --- as a torch op, opaque to torch.compile -----------------------------------------------------------------------------

TABLES: dict[int, Tables] = {}  # by the number that a compiled graph carries


def _steer(hidden: torch.Tensor, residual: torch.Tensor, layer: int, tables: int) -> None:
    TABLES[tables].steer(hidden, residual, layer)


def _steer_fake(hidden: torch.Tensor, residual: torch.Tensor, layer: int, tables: int) -> None:
    return None


_library = torch.library.Library("relseek", "DEF")
_library.define("steer(Tensor(a!) hidden, Tensor(b!) residual, int layer, int tables) -> ()")
_library.impl("steer", _steer, "CPU")
_library.impl("steer", _steer, "CUDA")
_library._register_fake("steer", _steer_fake)
