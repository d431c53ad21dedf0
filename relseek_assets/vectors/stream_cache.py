"""What training needs of each pair and never changes: the stream entering the trained blocks, and reference log-probabilities.

Here belong the pass that computes them, the memory-mapped files that hold them, and going on from files that are there already. Streams beyond the
budget are not kept and are computed again for each batch.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from relseek_assets.vectors.objective import Pair, TokenPairs, token_pairs
from relseek_resources.models import ModelError, SteeredModel
from relseek_resources.models.packed import Packed
from relseek_resources.storage import StorageError, content_version, read_tensors, write_tensors

Report = Callable[[int], None]
TOKENS_AT_ONCE = 2048  # of one pass: enough for full speed, little enough memory


@dataclass(frozen=True)
class Scratch:
    """Where a run keeps what it can go on from after a kill: `version` says what it was made from, `budget` the bytes that streams may take.

    Every file is one layer's, so that layers which are trained in runs of their own share the folder.
    """

    folder: Path
    version: str
    budget: int

    def checkpoint(self, layer: int) -> Path:
        return self.folder / f"L{layer:02d}.checkpoint.safetensors"

    def remove(self, layer: int) -> None:
        """Remove the layer's files, and the folder once it is empty."""
        for path in (*self.folder.glob(f"L{layer:02d}.*"), *self.folder.glob(f"*.L{layer:02d}.*")):
            path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            self.folder.rmdir()


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

    @property
    def bytes(self) -> int:
        """What the streams take, of all layers."""
        return sum(kept.values.nbytes for kept in self.streams.values())

    def pack(self, model: SteeredModel, rows: Sequence[int]) -> Packed:
        return model.pack([self.tokens.prompts[pair] for pair in rows], [self.tokens.replies[pair] for pair in rows])

    def stream(self, model: SteeredModel, layer: int, rows: Sequence[int]) -> torch.Tensor:
        """The stream after block `layer` of the pairs `rows` as `pack` lays them out, (1, tokens, width): read, or computed where it was not kept."""
        kept, made = self.streams[layer], {}
        missing = [pair for pair in rows if pair not in kept]
        if missing:
            packed = self.pack(model, missing)
            with torch.inference_mode():
                found = model.run_to(packed, [layer])[0][layer][0]
            made = {pair: found[tree.start : tree.start + tree.tokens] for pair, tree in zip(missing, packed.trees, strict=True)}
        parts = [made[pair] if pair in made else kept.of(pair).to(model.device, non_blocking=True) for pair in rows]
        return torch.cat(parts).unsqueeze(0).clone() if made else torch.cat(parts).unsqueeze(0)  # a clone leaves inference mode


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
        scratch: where streams and references go, of each layer a file; without it they stay in memory, all of them. Files of the same `name` that
            were made from something else are removed, and so are streams of these layers that take more than the budget.

    Raises:
        ValueError: as `token_pairs`.
        StorageError: the scratch folder cannot be written, or the disk is full.
        ModelError: a family whose packed rows differ from rows of their own.
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
    _check_packing(model, tokens)
    sizes = [len(prompt) + sum(map(len, both)) for prompt, both in zip(tokens.prompts, tokens.replies, strict=True)]
    version = content_version([scratch.version if scratch else "", tokens.prompts, tokens.replies, str(model.dtype)])
    files = None if scratch is None else _Files(scratch.folder, name, version, scratch.budget // (model.width * model.dtype.itemsize))
    if files is not None:
        known = files.known(layers, model.width * model.dtype.itemsize)
        files.remove_others(() if known else layers)
        if known:
            report(len(sizes))
            reference, kept = known
            return CachedPairs(
                tokens, {layer: Streams(_values(model, ends[-1], files.stream(layer)), ends) for layer, ends in kept.items()}, reference
            )
    ends = _kept_ends(sizes, None if files is None else files.most // len(set(layers)))
    streams = {layer: Streams(_values(model, ends[-1], None if files is None else files.stream(layer)), ends) for layer in layers}
    pairs = CachedPairs(tokens, streams, torch.empty(len(sizes), 2))
    for rows in _passes(sizes):
        _compute(model, pairs, rows)
        report(len(rows))
    if files is not None:
        files.finish(pairs.reference, layers, ends)
    return pairs


def _check_packing(model: SteeredModel, tokens: TokenPairs) -> None:
    """Refuse families that mix tokens elsewhere than in the attention that transformers hands over, by state spaces or convolutions say.

    Whole rows and rows taken up after block 0, as training takes them up, must both give the log-probabilities of rows of their own.
    """
    rows = range(min(2, len(tokens.names)))
    prompts, replies = [tokens.prompts[pair] for pair in rows], [tokens.replies[pair] for pair in rows]
    alone = model.score_tokens([prompt for prompt in prompts for _ in (0, 1)], [reply for both in replies for reply in both])
    expected = torch.tensor([value for score in alone for value in score.log_probs])
    packed = model.pack(prompts, replies)
    try:
        with torch.inference_mode():
            streams, hidden = model.run_to(packed, [0], to_end=True)
            assert hidden is not None
            found = torch.stack([model.packed_log_probs(hidden, packed), model.packed_log_probs_from(packed, 0, streams[0])])
        apart = (found.cpu() - expected).abs().mean(1).max().item()
    except torch.OutOfMemoryError:
        raise
    except (TypeError, AttributeError, IndexError, RuntimeError) as error:
        raise ModelError(f"{type(model.model).__name__}: its blocks do not run on packed rows ({error}); train a model of another family") from error
    if apart > (1e-3 if model.dtype == torch.float32 else 0.1):
        raise ModelError(
            f"{type(model.model).__name__}: log-probabilities in packed rows differ by {apart:.2g} nats a token from those of rows of their own, "
            "because its blocks mix tokens outside attention; train a model of another family"
        )


def _kept_ends(sizes: Sequence[int], most: int | None) -> list[int]:
    """Where each pair that is kept ends, after a leading 0: as many pairs as fit `most` tokens (None: all)."""
    ends = np.concatenate([[0], np.cumsum(sizes)])
    return [int(end) for end in ends if most is None or end <= most]


def _values(model: SteeredModel, tokens: int, path: Path | None) -> torch.Tensor:
    """(tokens, width) of the model's dtype, in memory or mapped from a file whose place on the disk is taken first: a full disk is an error then."""
    if path is None or not tokens:
        return torch.empty((tokens, model.width), dtype=model.dtype)
    size = tokens * model.width * model.dtype.itemsize
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab") as file:
            os.posix_fallocate(file.fileno(), 0, size)
        return torch.from_file(str(path), shared=True, size=tokens * model.width, dtype=model.dtype).view(tokens, model.width)
    except (OSError, RuntimeError) as error:
        with contextlib.suppress(OSError):
            path.unlink()
        hint = "free space there, or lower compute.cache_gb in the study"
        raise StorageError(f"{path}: cannot hold {size / 1e9:.1f} GB of streams ({error}); {hint}") from error


@dataclass(frozen=True)
class _Files:
    """The files of one pass, two a layer; the streams hold `most` tokens in all. Names carry what they were made from, so that no other pass writes
    into them."""

    folder: Path
    name: str
    version: str
    most: int

    def stream(self, layer: int) -> Path:
        return self.folder / f"{self.name}.{self.version}.L{layer:02d}.stream"

    def reference(self, layer: int) -> Path:
        return self.folder / f"{self.name}.{self.version}.L{layer:02d}.reference.safetensors"

    def known(self, layers: Sequence[int], bytes_a_token: int) -> tuple[torch.Tensor, dict[int, list[int]]] | None:
        """References and each layer's ends of earlier passes over the same pairs, where the streams of all layers are there and are not too many."""
        kept: dict[int, list[int]] = {}
        for layer in layers:
            try:
                arrays, header = read_tensors(self.reference(layer))
            except StorageError:
                return None
            kept[layer] = json.loads(header["ends"])
            if _size(self.stream(layer)) < kept[layer][-1] * bytes_a_token:
                return None
        if sum(ends[-1] for ends in kept.values()) > self.most:
            return None
        return torch.from_numpy(arrays["reference"].copy()), kept

    def finish(self, reference: torch.Tensor, layers: Sequence[int], ends: Sequence[int]) -> None:
        """Write the references, once the streams are on the disk: that they are there says that the streams are complete."""
        for layer in layers if ends[-1] else ():
            with self.stream(layer).open("rb") as file:
                os.fsync(file.fileno())
        for layer in layers:
            write_tensors(self.reference(layer), {"reference": reference.numpy()}, {"ends": json.dumps(list(ends))})

    def remove_others(self, layers: Sequence[int]) -> None:
        """Remove what killed runs over other pairs left, and what is left of `layers`; a run that still maps such a file keeps what it maps."""
        again = {path.name for layer in layers for path in (self.reference(layer), self.stream(layer))}
        for path in self.folder.glob(f"{self.name}.*"):
            if path.name in again or not path.name.startswith(f"{self.name}.{self.version}."):
                path.unlink(missing_ok=True)


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


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
