"""What training needs of each pair and never changes: the stream entering the trained blocks, and reference log-probabilities.

Here belong the pass that computes them, the memory-mapped files that hold them, and going on from files that are there already. Streams beyond the
budget are not kept and are computed again for each batch.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from relseek_assets.vectors.objective import Pair, TokenPairs, token_pairs
from relseek_resources.models import SteeredModel
from relseek_resources.models.packed import Packed
from relseek_resources.storage import StorageError, content_version, read_tensors, write_tensors

Report = Callable[[int], None]
TOKENS_AT_ONCE = 2048  # of one pass: enough for full speed, little enough memory


@dataclass(frozen=True)
class Scratch:
    """Where a run keeps what it can go on from after a kill: `version` says what it was made from, `budget` the bytes that streams may take."""

    folder: Path
    version: str
    budget: int


@dataclass
class Streams:
    """The stream after one block: the first `len(ends) - 1` pairs one after the other, (tokens, width) in the model's dtype."""

    values: torch.Tensor
    ends: list[int]

    def __contains__(self, pair: int) -> bool:
        return pair < len(self.ends) - 1

    def of(self, pair: int) -> torch.Tensor:
        """(tokens, width): the pair's prompt, chosen and rejected reply."""
        return self.values[self.ends[pair] : self.ends[pair + 1]]


@dataclass
class CachedPairs:
    """Pairs with their streams by layer and the log-probabilities of both replies without v, float32 (pairs, 2), in nats."""

    tokens: TokenPairs
    streams: dict[int, Streams]
    reference: torch.Tensor
    lengths: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self.lengths = self.tokens.lengths

    @property
    def names(self) -> list[str]:
        return self.tokens.names

    @property
    def too_long(self) -> int:
        return self.tokens.too_long

    def pack(self, model: SteeredModel, rows: Sequence[int]) -> Packed:
        return model.pack([self.tokens.prompts[pair] for pair in rows], [self.tokens.replies[pair] for pair in rows])

    def stream(self, model: SteeredModel, layer: int, rows: Sequence[int], packed: Packed) -> torch.Tensor:
        """The stream after block `layer` of the packed pairs `rows`, (1, tokens, width): read, or computed where it was not kept."""
        kept = self.streams[layer]
        if not all(pair in kept for pair in rows):
            with torch.inference_mode():
                found = model.run_to(packed, [layer])[0][layer]
            return found.clone()  # outside inference mode, so that gradients may pass
        return torch.cat([kept.of(pair) for pair in rows]).unsqueeze(0).to(model.device, non_blocking=True)


def cache_pairs(
    model: SteeredModel,
    pairs: Sequence[Pair],
    layers: Sequence[int],
    *,
    count: int,
    max_tokens: int,
    scratch: Scratch | None = None,
    name: str = "pairs",
    report: Report = lambda pairs: None,
) -> CachedPairs:
    """Run the first `count` pairs (0: all) that fit `max_tokens` once through the model without v, for all `layers` in one pass.

    Args:
        scratch: where streams go, as `NAME.L14.stream` beside the references; without it they stay in memory, all of them.

    Raises:
        ValueError: as `token_pairs`.
        StorageError: the scratch folder cannot be written.
    """
    return cached(model, token_pairs(model, pairs, count=count, max_tokens=max_tokens), layers, scratch=scratch, name=name, report=report)


def cached(
    model: SteeredModel,
    tokens: TokenPairs,
    layers: Sequence[int],
    *,
    scratch: Scratch | None = None,
    name: str = "pairs",
    report: Report = lambda pairs: None,
) -> CachedPairs:
    """`cache_pairs` for pairs that are tokens already."""
    sizes = [len(prompt) + sum(map(len, both)) for prompt, both in zip(tokens.prompts, tokens.replies, strict=True)]
    version = content_version([scratch.version if scratch else "", tokens.prompts, tokens.replies, str(model.dtype)])
    known = _known(scratch, name, version, layers)
    ends = _kept_ends(sizes, model.width * model.dtype.itemsize * len(set(layers)), scratch) if known is None else known[1]
    streams = {layer: Streams(_values(model, ends[-1], layer, scratch, name), ends) for layer in layers}
    if known is not None:
        report(len(sizes))
        return CachedPairs(tokens, streams, known[0])
    pairs = CachedPairs(tokens, streams, torch.empty(len(sizes), 2))
    for rows in _passes(sizes):
        _compute(model, pairs, rows)
        report(len(rows))
    if scratch is not None:
        header = {"version": version, "layers": json.dumps(sorted(streams)), "ends": json.dumps(ends)}
        write_tensors(scratch.folder / f"{name}.reference.safetensors", {"reference": pairs.reference.numpy()}, header)
    return pairs


def _kept_ends(sizes: Sequence[int], bytes_a_token: int, scratch: Scratch | None) -> list[int]:
    """Where each pair that is kept ends, as many as the budget allows, after a leading 0."""
    ends = np.concatenate([[0], np.cumsum(sizes)])
    most = int(ends[-1]) if scratch is None else scratch.budget // bytes_a_token
    return [int(end) for end in ends if end <= most]


def _values(model: SteeredModel, tokens: int, layer: int, scratch: Scratch | None, name: str) -> torch.Tensor:
    if scratch is None or not tokens:
        return torch.empty((tokens, model.width), dtype=model.dtype)
    path = scratch.folder / f"{name}.L{layer:02d}.stream"
    try:
        scratch.folder.mkdir(parents=True, exist_ok=True)
        return torch.from_file(str(path), shared=True, size=tokens * model.width, dtype=model.dtype).view(tokens, model.width)
    except (OSError, RuntimeError) as error:
        raise StorageError(f"{path}: cannot hold {tokens * model.width * model.dtype.itemsize / 1e9:.1f} GB of streams ({error})") from error


def _known(scratch: Scratch | None, name: str, version: str, layers: Sequence[int]) -> tuple[torch.Tensor, list[int]] | None:
    """References and ends of an earlier pass over the same pairs and layers; its streams are complete, because this file is written last."""
    if scratch is None:
        return None
    try:
        arrays, header = read_tensors(scratch.folder / f"{name}.reference.safetensors")
    except StorageError:
        return None
    if header.get("version") != version or not set(layers) <= set(json.loads(header["layers"])):
        return None
    return torch.from_numpy(arrays["reference"].copy()), json.loads(header["ends"])


def _passes(sizes: Sequence[int]) -> list[list[int]]:
    """Pairs in order, as many at a time as fit a pass."""
    passes: list[list[int]] = []
    filled = TOKENS_AT_ONCE
    for pair, size in enumerate(sizes):
        if filled + size > TOKENS_AT_ONCE:
            passes.append([])
            filled = 0
        passes[-1].append(pair)
        filled += size
    return passes


@torch.inference_mode()
def _compute(model: SteeredModel, pairs: CachedPairs, rows: Sequence[int]) -> None:
    packed = pairs.pack(model, rows)
    streams, hidden = model.run_to(packed, list(pairs.streams), to_end=True)
    assert hidden is not None
    pairs.reference[list(rows)] = pair_totals(model.packed_log_probs(hidden, packed), packed).cpu()
    for layer, kept in pairs.streams.items():
        for pair, tree in zip(rows, packed.trees, strict=True):
            if pair in kept:
                kept.of(pair).copy_(streams[layer][0, tree.start : tree.start + tree.tokens])


def pair_totals(log_probs: torch.Tensor, packed: Packed) -> torch.Tensor:
    """Log-probability of each reply, float32 (pairs, 2), from that of its tokens."""
    return torch.stack([part.sum() for part in log_probs.split(packed.reply_lengths)]).view(-1, 2)
