"""`SteeredModel`: a causal language model with a steering vector in its residual stream.

Here belong the hooks that steer and intervene, batched generation, scoring, activations and projections; what an intervention does to the stream
belongs in `interventions.py`. The residual stream after block l (0-indexed) is `hidden_states[l + 1]` in transformers' numbering; a vector
steers there, at every position that is not padding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import nn

from relseek_resources.models import architecture, chat_templates
from relseek_resources.models.chat_templates import Conversation
from relseek_resources.models.interventions import Active, Add, Intervention, unit_vector
from relseek_resources.models.loading import ModelError
from relseek_resources.models.packed import Packed, attention_within, mlp_at, pack, reply_log_probs
from relseek_resources.models.sampling import Sampling, draw, uniforms


@dataclass(frozen=True)
class Reply:
    """One generated reply. `log_probs` are those of its tokens under the steered model, in nats, end token included."""

    text: str
    tokens: tuple[int, ...]
    log_probs: tuple[float, ...]
    finished: bool


@dataclass(frozen=True)
class TokenScores:
    """Log-probabilities of a given reply's tokens, in nats."""

    log_probs: tuple[float, ...]

    @property
    def total(self) -> float:
        return float(np.sum(self.log_probs))

    @property
    def mean(self) -> float:
        return float(np.mean(self.log_probs))


@dataclass
class Batch:
    """Token ids (rows, length), their mask and positions; `padding` says on which side short rows were filled."""

    ids: torch.Tensor
    mask: torch.Tensor
    positions: torch.Tensor


class SteeredModel:
    """A frozen model and its tokenizer.

    >>> model = relseek_resources.models.load("embedded:smollm2-135m-instruct")
    >>> with model.steer(vector, layer=14, multiplier=1.0):
    ...     replies = model.generate([[{"role": "user", "content": "Hello"}]])
    """

    def __init__(self, model: Any, tokenizer: Any) -> None:
        architecture.check_plain_logits(model)
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.blocks = architecture.decoder_blocks(model)
        self.layers = len(self.blocks)
        self.width = int(architecture.text_config(model).hidden_size)
        self.closing = chat_templates.closing_tokens(tokenizer)
        self.ends = architecture.end_tokens(model, tokenizer).union(self.closing)
        self.pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else min(self.ends, default=0)
        self._active: list[Active] = []
        self._rows: torch.Tensor | None = None
        self._resumed_after = -1

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.model.parameters()).dtype

    # --- steering -----------------------------------------------------------------------------------------------------

    def steer(self, vector: Any, layer: int, multiplier: float | Sequence[float]) -> AbstractContextManager[SteeredModel]:
        """Add `multiplier * vector` to the residual stream after block `layer` until the block ends, however it ends.

        Args:
            vector: (width,), finite.
            layer: 0-indexed decoder block.
            multiplier: one dose, or one for each row of the call made inside. Contexts nest; their additions sum.

        Raises:
            ModelError: a layer that the model lacks, a vector of another width, NaN in either.
        """
        return self.intervene(Add(vector, [layer], multiplier))

    @contextmanager
    def intervene(self, interventions: Intervention | Sequence[Intervention]) -> Iterator[SteeredModel]:
        """Change the residual stream after the named blocks until the `with` block ends, however it ends.

        Several interventions at one block work in the order given, each on what the one before it left; those of an inner context come after
        those of an outer one. They reach prompts and replies alike, in `generate`, `score`, `activations`, `run_to` and `run_from`.

        >>> with model.intervene([Add(joy, 10, 2.0), Floor(assistant, range(12, 20), [1.5, -math.inf])]):
        ...     replies = model.generate(two_conversations, Sampling(temperature=0))

        Raises:
            ModelError: a block that the model lacks, a vector of another width, NaN, a zero vector where a projection is needed. A call inside raises
                it when it has another number of rows than a multiplier, threshold, mean or strength that was given one a row.
        """
        wanted = [interventions] if isinstance(interventions, Intervention) else interventions
        active = [self._ready(intervention) for intervention in wanted]
        handles = []
        try:
            for one in active:
                if not one.idle:  # λ = 0 is the unsteered model: no hook at all
                    handles += [self.blocks[layer].register_forward_hook(self._hook(one, layer)) for layer in one.layers]
            self._active += active
            yield self
        finally:
            self._active = [one for one in self._active if one not in active]
            for handle in handles:
                handle.remove()

    def _ready(self, intervention: Intervention) -> Active:
        for layer in intervention.blocks:
            self.check_layer(layer)
        return intervention.active(self.check_vector(intervention.vector), self.dtype)

    def _hook(self, active: Active, layer: int) -> Callable[..., Any]:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> Any:
            if layer <= self._resumed_after:
                return output  # the stream that was handed in has felt this intervention already
            return architecture.with_stream(output, active.on(architecture.stream_of(output), self._rows))

        return hook

    def check_layer(self, layer: int) -> None:
        if not 0 <= layer < self.layers:
            raise ModelError(f"layer {layer}: the model has the blocks 0 to {self.layers - 1}")

    def check_vector(self, vector: Any) -> torch.Tensor:
        """`vector` as float32 (width,) on the model's device, refusing another width and NaN."""
        direction = torch.as_tensor(vector, dtype=torch.float32, device=self.device)
        if direction.shape != (self.width,):
            raise ModelError(f"the vector has the shape {tuple(direction.shape)}; the model's residual stream needs ({self.width},)")
        if not torch.isfinite(direction).all():
            raise ModelError("the vector holds NaN or infinite values; it is refused")
        return direction

    def _check_rows(self, rows: int) -> None:
        for active in self._active:
            if active.rows not in (None, rows):
                raise ModelError(f"steered with {active.rows} {active.number}s but called with {rows} rows; give one {active.number} a row")

    @contextmanager
    def _on_rows(self, rows: Sequence[int] | torch.Tensor) -> Iterator[None]:
        """Tell the hooks which rows of the call the current batch holds."""
        before, self._rows = self._rows, torch.as_tensor(rows, device=self.device)
        try:
            yield
        finally:
            self._rows = before

    # --- tokens -------------------------------------------------------------------------------------------------------

    def prompt_tokens(self, conversation: Conversation) -> list[int]:
        """Token ids of a conversation that ends on a user turn, with the assistant header that opens the reply.

        Where the chat template refuses a system message (Gemma 1 and 2, the first Mistral), its text stands before that of the first user turn, an
        empty line between them; an empty one is left out.

        Raises:
            ModelError: a conversation that ends on another turn, or that the template refuses.
        """
        if not conversation or conversation[-1]["role"] != "user":
            raise ModelError("a prompt must end on a user turn; the reply is what is generated or scored")
        if conversation[0]["role"] == "system" and not self._takes_system:
            conversation = chat_templates.folded(conversation)
        text = chat_templates.rendered(self.tokenizer, conversation, reply_follows=True)
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def reply_tokens(self, reply: str, *, end: bool = True) -> list[int]:
        """Token ids of a reply, closed when `end` by the token that ends a turn in the chat template."""
        tokens = self.tokenizer(reply, add_special_tokens=False)["input_ids"]
        return [*tokens, *self.closing] if end else tokens

    @cached_property
    def _takes_system(self) -> bool:
        return chat_templates.takes_system(self.tokenizer)

    def cut(self, text: str, tokens: int) -> str:
        """The text's first `tokens` tokens, as text."""
        return self.tokenizer.decode(self.tokenizer(text, add_special_tokens=False)["input_ids"][:tokens], skip_special_tokens=True)

    def bare_tokens(self, text: str) -> list[int]:
        """Token ids of a text without prompt or template, with the special tokens that the tokenizer itself adds."""
        return self.tokenizer(text)["input_ids"]

    def batch(self, rows: Sequence[Sequence[int]], *, left: bool = False) -> Batch:
        """Pad token rows to one length; positions count real tokens only, so padding shifts nothing."""
        length = max(len(row) for row in rows)
        ids = torch.full((len(rows), length), self.pad)
        mask = torch.zeros((len(rows), length), dtype=torch.long)
        for index, row in enumerate(rows):
            place = slice(length - len(row), length) if left else slice(0, len(row))
            ids[index, place] = torch.as_tensor(row)
            mask[index, place] = 1
        positions = (mask.cumsum(-1) - 1).clamp_(min=0)
        return Batch(ids.to(self.device), mask.to(self.device), positions.to(self.device))

    def pack(self, prompts: Sequence[Sequence[int]], replies: Sequence[Sequence[Sequence[int]]]) -> Packed:
        """Prompts with one or more replies each in one row without padding, for `hidden`, `run_to`, `run_from` and `packed_log_probs`."""
        return pack(prompts, replies, self.device)

    @contextmanager
    def compiled(self, backend: str = "inductor") -> Iterator[SteeredModel]:
        """Inside, what works token by token in every block, its norms and its MLP, is compiled, which pays in long runs on a GPU.

        The first pass then takes a minute or more. Attention, hooks and the layout of rows stay as they are, so results differ by rounding alone.
        """
        parts = [part for block in self.blocks for part in block.children() if "Attention" not in type(part).__name__]
        try:
            for part in parts:
                part.compile(backend=backend, dynamic=True)
            yield self
        finally:
            for part in parts:
                part._compiled_call_impl = None  # torch has no name for this

    # --- forward passes -----------------------------------------------------------------------------------------------

    def hidden(self, batch: Batch | Packed) -> torch.Tensor:
        """Final hidden states, after the last norm, shape (rows, length, width)."""
        if isinstance(batch, Packed):
            self._check_rows(1)
            with attention_within(self.model, batch):
                return self.model.base_model(input_ids=batch.ids, position_ids=batch.positions, use_cache=False).last_hidden_state
        return self.model.base_model(input_ids=batch.ids, attention_mask=batch.mask, position_ids=batch.positions, use_cache=False).last_hidden_state

    def run_to(self, batch: Batch | Packed, layers: Sequence[int], *, to_end: bool = False) -> tuple[dict[int, torch.Tensor], torch.Tensor | None]:
        """Residual stream after each of `layers`, each (rows, length, width), and the final hidden states when `to_end`.

        The pass stops after the last named block unless `to_end`.
        """
        for layer in layers:
            self.check_layer(layer)
        streams: dict[int, torch.Tensor] = {}
        last = max(layers)

        def keep(layer: int) -> Callable[..., None]:
            def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
                streams[layer] = architecture.stream_of(output)
                if layer == last and not to_end:
                    raise _Reached

            return hook

        handles = [self.blocks[layer].register_forward_hook(keep(layer)) for layer in set(layers)]
        try:
            return streams, self.hidden(batch)
        except _Reached:
            return streams, None
        finally:
            for handle in handles:
                handle.remove()

    def run_from(self, batch: Batch | Packed, layer: int, stream: torch.Tensor) -> torch.Tensor:
        """Final hidden states when the residual stream after block `layer` is `stream`, shape (rows, length, width).

        Blocks up to `layer` are passed over, so masks, rotary positions and per-layer settings stay the model's own; interventions there are
        taken to be in `stream` already. Gradients reach `stream`.
        """
        with self._resumed(layer, stream):
            return self.hidden(batch)

    def packed_log_probs_from(self, packed: Packed, layer: int, stream: torch.Tensor) -> torch.Tensor:
        """`packed_log_probs` of what `run_from` finds, without the work of the last block that no reply token needs."""
        with self._resumed(layer, stream), mlp_at(self.blocks[-1], packed.sources.unique()):
            return self.packed_log_probs(self.hidden(packed), packed)

    @contextmanager
    def _resumed(self, layer: int, stream: torch.Tensor) -> Iterator[None]:
        """Inside, a pass starts from `stream` after block `layer`."""
        self.check_layer(layer)
        skipped = list(self.blocks[: layer + 1])
        try:
            for block in skipped[:-1]:
                block.forward = _pass_through
            skipped[-1].forward = lambda *_args, **_kwargs: stream
            self._resumed_after = layer
            yield
        finally:
            self._resumed_after = -1
            for block in skipped:
                block.__dict__.pop("forward", None)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return architecture.logits_of(self.model, hidden)

    def reply_log_probs(self, hidden: torch.Tensor, prompts: Sequence[Sequence[int]], replies: Sequence[Sequence[int]]) -> list[torch.Tensor]:
        """Log-probability of each reply token from right-padded hidden states; logits are made for those tokens only."""
        rows: list[int] = []
        places: list[int] = []
        targets: list[int] = []
        for row, (prompt, reply) in enumerate(zip(prompts, replies, strict=True)):
            rows += [row] * len(reply)
            places += range(len(prompt) - 1, len(prompt) + len(reply) - 1)
            targets += reply
        chosen = hidden[torch.as_tensor(rows, device=hidden.device), torch.as_tensor(places, device=hidden.device)]
        logits = self.logits(chosen)
        picked = logits.gather(-1, torch.as_tensor(targets, device=logits.device).unsqueeze(-1)).squeeze(-1)
        return list((picked - logits.logsumexp(-1)).split([len(reply) for reply in replies]))

    def packed_log_probs(self, hidden: torch.Tensor, packed: Packed) -> torch.Tensor:
        """Log-probability in nats of every reply token of a packed row, float32 (reply tokens,); gradients reach `hidden`."""
        return reply_log_probs(self.model, hidden, packed)

    # --- scoring ------------------------------------------------------------------------------------------------------

    def score(self, conversations: Sequence[Conversation], replies: Sequence[str], *, end: bool = True, batch_size: int = 16) -> list[TokenScores]:
        """Log-probabilities of given replies after their prompts, under whatever steering is active.

        `end` counts the end-of-turn token as the reply's last.
        """
        prompts = [self.prompt_tokens(conversation) for conversation in conversations]
        return self.score_tokens(prompts, [self.reply_tokens(reply, end=end) for reply in replies], batch_size=batch_size)

    @torch.inference_mode()
    def score_tokens(
        self,
        prompts: Sequence[Sequence[int]],
        replies: Sequence[Sequence[int]],
        *,
        batch_size: int = 16,
        on_batch: Callable[[int], None] = lambda rows: None,
    ) -> list[TokenScores]:
        """`score` on token ids. A prompt needs at least one token and a reply at least one."""
        self._check_rows(len(prompts))
        check_tokens(prompts, replies)
        scores: dict[int, TokenScores] = {}
        for rows in by_length([len(p) + len(r) for p, r in zip(prompts, replies, strict=True)], batch_size):
            with self._on_rows(rows):
                hidden = self.hidden(self.batch([[*prompts[row], *replies[row]] for row in rows]))
            values = self.reply_log_probs(hidden, [prompts[row] for row in rows], [replies[row] for row in rows])
            scores.update({row: TokenScores(tuple(value.tolist())) for row, value in zip(rows, values, strict=True)})
            on_batch(len(rows))
        return [scores[row] for row in range(len(prompts))]

    @torch.inference_mode()
    def score_doses(
        self,
        prompts: Sequence[Sequence[int]],
        replies: Sequence[Sequence[int]],
        vector: Any,
        layer: int,
        multipliers: Sequence[float],
        *,
        batch_size: int = 16,
        on_batch: Callable[[int], None] = lambda rows: None,
    ) -> dict[float, list[TokenScores]]:
        """Scores of the same replies at every dose. Blocks up to `layer` do not feel the vector and run once for all doses."""
        direction = self.check_vector(vector)
        if not np.isfinite(list(multipliers)).all():
            raise ModelError(f"the multipliers must be finite numbers, got {list(multipliers)}")
        self._check_rows(len(prompts))
        check_tokens(prompts, replies)
        scores: dict[float, dict[int, TokenScores]] = {multiplier: {} for multiplier in multipliers}
        for rows in by_length([len(p) + len(r) for p, r in zip(prompts, replies, strict=True)], batch_size):
            batch = self.batch([[*prompts[row], *replies[row]] for row in rows])
            with self._on_rows(rows):
                stream = self.run_to(batch, [layer])[0][layer]
                for multiplier in multipliers:
                    hidden = self.run_from(batch, layer, stream + (multiplier * direction).to(stream.dtype))
                    values = self.reply_log_probs(hidden, [prompts[row] for row in rows], [replies[row] for row in rows])
                    scores[multiplier].update({row: TokenScores(tuple(value.tolist())) for row, value in zip(rows, values, strict=True)})
                    on_batch(len(rows))
        return {multiplier: [found[row] for row in range(len(prompts))] for multiplier, found in scores.items()}

    @torch.inference_mode()
    def activations(
        self, conversations: Sequence[Conversation], layers: Sequence[int], replies: Sequence[str] | None = None, *, batch_size: int = 16
    ) -> np.ndarray:
        """Residual stream after each layer, float32 (rows, layers, width), under whatever steering is active.

        Without `replies` it is read at the last prompt token (after the assistant header); with them it is the mean over
        the reply's tokens.

        Raises:
            ModelError: a reply without tokens.
        """
        found = np.empty((len(conversations), len(layers), self.width), dtype=np.float32)
        for row, reading in self._readings(conversations, layers, replies, batch_size):
            found[row] = reading.cpu().numpy()
        return found

    @torch.inference_mode()
    def projections(
        self,
        conversations: Sequence[Conversation],
        vector: Any,
        layers: Sequence[int],
        replies: Sequence[str] | None = None,
        *,
        batch_size: int = 16,
    ) -> np.ndarray:
        """Projection of `activations` onto the unit vector, float32 (rows, layers), without keeping the activations.

        Args:
            vector: (width,) for every layer, or (layers, width), one a layer. Its length does not count.

        Raises:
            ModelError: a reply without tokens, a vector of another shape, zero or NaN.
        """
        vectors = [vector] * len(layers) if np.ndim(vector) == 1 else list(vector)
        if len(vectors) != len(layers):
            raise ModelError(f"{len(vectors)} vectors for {len(layers)} layers; give one vector, or one a layer")
        units = torch.stack([unit_vector(self.check_vector(one)) for one in vectors])
        found = np.empty((len(conversations), len(layers)), dtype=np.float32)
        for row, reading in self._readings(conversations, layers, replies, batch_size):
            found[row] = (reading * units).sum(-1).cpu().numpy()
        return found

    def _readings(
        self, conversations: Sequence[Conversation], layers: Sequence[int], replies: Sequence[str] | None, batch_size: int
    ) -> Iterator[tuple[int, torch.Tensor]]:
        """Row number and float32 (layers, width) of every row, in batches of similar length."""
        self._check_rows(len(conversations))
        prompts = [self.prompt_tokens(conversation) for conversation in conversations]
        answers = [[] for _ in prompts] if replies is None else [self.reply_tokens(reply, end=False) for reply in replies]
        if replies is not None:
            check_tokens(prompts, answers)
        for rows in by_length([len(p) + len(a) for p, a in zip(prompts, answers, strict=True)], batch_size):
            with self._on_rows(rows):
                streams, _ = self.run_to(self.batch([[*prompts[row], *answers[row]] for row in rows]), layers)
            for place, row in enumerate(rows):
                start, stop = len(prompts[row]), len(prompts[row]) + len(answers[row])
                window = slice(start, stop) if answers[row] else slice(start - 1, start)
                yield row, torch.stack([streams[layer][place, window].float().mean(0) for layer in layers])

    # --- generation ---------------------------------------------------------------------------------------------------

    def generate(
        self,
        conversations: Sequence[Conversation],
        sampling: Sampling | None = None,
        *,
        seeds: Sequence[int] | None = None,
        batch_size: int = 32,
        on_batch: Callable[[int], None] = lambda rows: None,
    ) -> list[Reply]:
        """Generate one reply a conversation, in batches of similar prompt length, under whatever steering is active.

        Args:
            sampling: temperature, nucleus and length; the default samples at temperature 1 for at most 100 tokens.
            seeds: one a row; a row's draw depends on its seed alone. Needed unless greedy.
            on_batch: called with the number of replies that a batch has finished.
        """
        prompts = [self.prompt_tokens(conversation) for conversation in conversations]
        return self.generate_tokens(prompts, sampling, seeds=seeds, batch_size=batch_size, on_batch=on_batch)

    @torch.inference_mode()
    def generate_tokens(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling | None = None,
        *,
        seeds: Sequence[int] | None = None,
        batch_size: int = 32,
        on_batch: Callable[[int], None] = lambda rows: None,
    ) -> list[Reply]:
        """`generate` on token ids. A prompt needs at least one token."""
        sampling = sampling or Sampling()
        if seeds is None:
            if sampling.temperature > 0:
                raise ModelError("sampling needs one seed a row; give seeds=[...], or Sampling(temperature=0) for greedy replies")
            seeds = [0] * len(prompts)
        if len(seeds) != len(prompts):
            raise ModelError(f"{len(seeds)} seeds for {len(prompts)} conversations; give one seed a row")
        if not all(map(len, prompts)):
            raise ModelError(f"row {[len(prompt) for prompt in prompts].index(0)}: a prompt without tokens cannot be answered")
        self._check_rows(len(prompts))
        replies: dict[int, Reply] = {}
        for rows in by_length([len(prompt) for prompt in prompts], batch_size):
            found = self._generate_batch(rows, [prompts[row] for row in rows], [seeds[row] for row in rows], sampling)
            replies.update(zip(rows, found, strict=True))
            on_batch(len(rows))
        return [replies[row] for row in range(len(prompts))]

    def _generate_batch(self, rows: list[int], prompts: list[Sequence[int]], seeds: list[int], sampling: Sampling) -> list[Reply]:
        from relseek_resources.models.decoding import grouped_attention, growing_cache  # with transformers, which takes seconds to import

        batch = self.batch(prompts, left=True)
        draws = torch.from_numpy(uniforms(seeds, sampling.max_new_tokens)).to(self.device)
        tokens: list[list[int]] = [[] for _ in rows]
        log_probs: list[list[float]] = [[] for _ in rows]
        active = torch.arange(len(rows))
        cache = growing_cache(self.model)
        ids, mask, positions = batch.ids, batch.mask, batch.positions
        for step in range(sampling.max_new_tokens):
            with self._on_rows(torch.as_tensor(rows)[active]), grouped_attention():
                hidden = self.model.base_model(
                    input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
                ).last_hidden_state[:, -1]
            logits = self.logits(hidden)
            broken = (~torch.isfinite(logits).all(-1)).nonzero().flatten().tolist()
            if broken:
                raise ModelError(f"row {rows[int(active[broken[0]])]}: the model's logits are not finite; use a smaller multiplier or a wider dtype")
            chosen = draw(logits, draws[active.to(self.device), step], sampling)
            picked = logits.gather(-1, chosen.unsqueeze(-1)).squeeze(-1) - logits.logsumexp(-1)
            unfinished = []
            for place, (row, token, value) in enumerate(zip(active.tolist(), chosen.tolist(), picked.tolist(), strict=True)):
                tokens[row].append(token)
                log_probs[row].append(value)
                if token not in self.ends:
                    unfinished.append(place)
            if not unfinished:
                break
            keep = torch.as_tensor(unfinished, device=self.device)
            if len(unfinished) < len(active):
                cache.batch_select_indices(keep)
                active, mask, positions, chosen = active[keep.cpu()], mask[keep], positions[keep], chosen[keep]
            ids = chosen.unsqueeze(-1)
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], -1)
            positions = positions[:, -1:] + 1
        return [self._reply(found, values) for found, values in zip(tokens, log_probs, strict=True)]

    def _reply(self, tokens: list[int], log_probs: list[float]) -> Reply:
        finished = tokens[-1] in self.ends
        text = self.tokenizer.decode(tokens[:-1] if finished else tokens, skip_special_tokens=True)
        return Reply(text, tuple(tokens), tuple(log_probs), finished)


class _Reached(Exception):
    """Ends a forward pass once the last wanted block has run."""


def _pass_through(hidden_states: torch.Tensor, *_args: Any, **_kwargs: Any) -> torch.Tensor:
    return hidden_states


def check_tokens(prompts: Sequence[Sequence[int]], replies: Sequence[Sequence[int]]) -> None:
    for row, (prompt, reply) in enumerate(zip(prompts, replies, strict=True)):
        if not prompt or not reply:
            raise ModelError(f"row {row}: a {'prompt' if not prompt else 'reply'} without tokens cannot be scored")


def by_length(lengths: Sequence[int], batch_size: int) -> Iterator[list[int]]:
    """Row numbers in batches of similar length, so that little is padding; the order depends on the lengths alone."""
    order = sorted(range(len(lengths)), key=lambda row: (lengths[row], row))
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]
