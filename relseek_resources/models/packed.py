"""Prompts with their replies in one row without padding, each prompt computed once however many replies follow it.

Here belong the layout of such a row, the attention that keeps its prompts apart, and the log-probabilities of its replies. Every other part of a
decoder block works token by token and stays the model's own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import scaled_dot_product_attention

from relseek_resources.models import architecture
from relseek_resources.models.loading import ModelError

IMPLEMENTATION = "relseek_packed"  # under which transformers finds the attention below
LOGITS_AT_ONCE = 2**24  # entries of logits that exist at a time, 64 MiB in float32; the products of smaller pieces are slower


@dataclass(frozen=True)
class Tree:
    """Where a prompt and its replies lie in the row: `start` of the prompt, its length, and each reply's length, one after the other."""

    start: int
    prompt: int
    replies: tuple[int, ...]

    @property
    def tokens(self) -> int:
        return self.prompt + sum(self.replies)

    @property
    def starts(self) -> list[int]:
        """Where each reply begins in the row."""
        starts, at = [], self.start + self.prompt
        for length in self.replies:
            starts.append(at)
            at += length
        return starts


@dataclass(frozen=True)
class Packed:
    """One row of token ids (1, tokens) with their positions; a reply's first token stands right after its prompt's last."""

    ids: torch.Tensor
    positions: torch.Tensor
    trees: tuple[Tree, ...]
    targets: torch.Tensor  # (reply tokens,) ids of all reply tokens, in the row's order
    sources: torch.Tensor  # (reply tokens,) the place in the row whose logits predict each of them

    @property
    def reply_lengths(self) -> list[int]:
        return [length for tree in self.trees for length in tree.replies]


def pack(prompts: Sequence[Sequence[int]], replies: Sequence[Sequence[Sequence[int]]], device: torch.device) -> Packed:
    """Lay out prompts and the replies to each of them.

    Raises:
        ModelError: an empty prompt or reply, from which nothing could be predicted.
    """
    ids: list[int] = []
    positions: list[int] = []
    targets: list[int] = []
    sources: list[int] = []
    trees: list[Tree] = []
    for prompt, several in zip(prompts, replies, strict=True):
        if not prompt or not all(several):
            raise ModelError("a packed prompt and each of its replies need a token")
        tree = Tree(len(ids), len(prompt), tuple(map(len, several)))
        ids += prompt
        positions += range(len(prompt))
        for start, reply in zip(tree.starts, several, strict=True):
            sources += [tree.start + tree.prompt - 1, *range(start, start + len(reply) - 1)]
            targets += reply
            ids += reply
            positions += range(len(prompt), len(prompt) + len(reply))
        trees.append(tree)
    row = torch.tensor([ids, positions], device=device)
    where = torch.tensor([targets, sources], device=device)
    return Packed(row[:1], row[1:], tuple(trees), where[0], where[1])


# --- attention --------------------------------------------------------------------------------------------------------

#: The trees of the row that is being computed, and whether the model's own attention caps its scores.
_row: ContextVar[tuple[tuple[Tree, ...], bool]] = ContextVar("packed row")


@contextmanager
def attention_within(model: Any, packed: Packed) -> Iterator[None]:
    """Inside, `model` attends within each prompt and from each reply to its prompt and itself."""
    _register()
    config = architecture.text_config(model)
    before = config._attn_implementation
    token = _row.set((packed.trees, before != "sdpa"))  # transformers' sdpa leaves Gemma 2's cap out, and so must what stands in for it
    config._attn_implementation = IMPLEMENTATION
    try:
        yield
    finally:
        config._attn_implementation = before
        _row.reset(token)


def _register() -> None:
    from transformers import AttentionInterface

    if IMPLEMENTATION not in AttentionInterface._global_mapping:
        AttentionInterface.register(IMPLEMENTATION, _attention)


def _attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    position_bias: torch.Tensor | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of one packed row: query (1, heads, tokens, size), key and value (1, key heads, tokens, size); returns (1, tokens, heads, size)."""
    if s_aux is not None or position_bias is not None:
        raise ModelError(f"{type(module).__name__} has attention sinks or a position bias, which packed rows do not know")
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    trees, capped = _row.get()
    rule = _Rule(scaling, sliding_window, softcap if capped else None)
    # split once: the gradient of a slice would be a whole row of zeros each time
    lengths = [length for tree in trees for length in (tree.prompt, *tree.replies)]
    pieces = zip(*(each.split(lengths, 2) for each in (query, key, value)), strict=True)
    parts = []
    for tree in trees:
        prompt = next(pieces)
        replies = [next(pieces) for _ in tree.replies]
        # the prompt and its first reply are an ordinary causal sequence; each further reply looks at the prompt and itself
        parts.append(rule.attend(*(torch.cat(each, 2) for each in zip(prompt, *replies[:1], strict=True))))
        for own, keys, values in replies[1:]:
            parts.append(rule.attend(own, torch.cat((prompt[1], keys), 2), torch.cat((prompt[2], values), 2)))
    return torch.cat(parts, 2).transpose(1, 2).contiguous(), None


@dataclass(frozen=True)
class _Rule:
    scaling: float | None
    window: int | None
    softcap: float | None

    def attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Causal attention of the last `queries` of `keys` tokens."""
        queries, keys = query.shape[2], key.shape[2]
        window = keys if self.window is None else min(self.window, keys)
        if queries == keys == window and self.softcap is None:
            return scaled_dot_product_attention(query, key, value, is_causal=True, scale=self.scaling)
        place = torch.arange(keys, device=query.device)
        behind = place[keys - queries :, None] - place[None, :]
        seen = (behind >= 0) & (behind < window)
        if self.softcap is None:
            return scaled_dot_product_attention(query, key, value, attn_mask=seen, scale=self.scaling)
        scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if self.scaling is None else self.scaling)
        scores = torch.tanh(scores / self.softcap) * self.softcap
        weights = scores.masked_fill(~seen, -torch.inf).softmax(-1, dtype=torch.float32).to(query.dtype)
        return weights @ value


# --- the last block ---------------------------------------------------------------------------------------------------


@contextmanager
def mlp_at(block: nn.Module, places: torch.Tensor) -> Iterator[None]:
    """Inside, the block's MLP runs on the tokens at `places` only and adds nothing to the others.

    After the last block nothing is read but what predicts a reply's token, so that the prompts' share of its MLP is work for nothing. A family
    that calls it something else than `mlp` does that work.
    """
    inner = getattr(block, "mlp", None)
    if inner is None:
        yield
        return
    block.mlp = _At(inner, places)
    try:
        yield
    finally:
        block.mlp = inner


class _At(nn.Module):
    """`inner` at some tokens of the stream, (tokens, width) or (1, tokens, width), and of whatever else it is given one a token."""

    def __init__(self, inner: nn.Module, places: torch.Tensor) -> None:
        super().__init__()
        self.inner, self.places = inner, places

    def forward(self, stream: torch.Tensor, *arguments: Any, **named: Any) -> Any:
        tokens = stream.dim() - 2

        def at_places(value: Any) -> Any:
            a_token = isinstance(value, torch.Tensor) and value.shape[: tokens + 1] == stream.shape[:-1]
            return value.index_select(tokens, self.places) if a_token else value

        output = self.inner(at_places(stream), *map(at_places, arguments), **{name: at_places(value) for name, value in named.items()})
        found = architecture.stream_of(output)
        return architecture.with_stream(output, found.new_zeros(stream.shape).index_copy(tokens, self.places, found))


# --- log-probabilities ------------------------------------------------------------------------------------------------


def reply_log_probs(model: Any, hidden: torch.Tensor, packed: Packed) -> torch.Tensor:
    """Log-probability in nats of every reply token, float32 (reply tokens,), from final hidden states (1, tokens, width).

    Where the output layer is a plain matrix, logits are made in pieces and never kept: the gradient with respect to
    the hidden states is worked out beside them.
    """
    head = model.get_output_embeddings()
    chosen = hidden[0, packed.sources]
    if getattr(architecture.text_config(model), "final_logit_softcapping", None) is None and getattr(head, "bias", None) is None:
        return _LogProbs.apply(chosen, head.weight, packed.targets)
    logits = architecture.logits_of(model, chosen)
    return logits.gather(-1, packed.targets.unsqueeze(-1)).squeeze(-1) - logits.logsumexp(-1)


class _LogProbs(torch.autograd.Function):
    """log softmax(h Wᵀ)[target] with d/dh = W[target] - softmax(h Wᵀ) W; W is frozen."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        wanted = ctx.needs_input_grad[0]
        found = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        gradient = torch.empty_like(hidden) if wanted else None
        size = max(1, LOGITS_AT_ONCE // len(weight)) if hidden.device.type == "cpu" else 4096
        for at in range(0, len(hidden), size):
            part = slice(at, at + size)
            logits = (hidden[part] @ weight.T).float()
            logits.sub_(logits.amax(-1, keepdim=True))
            picked = logits.gather(-1, targets[part, None])
            total = logits.exp_().sum(-1, keepdim=True)
            found[part] = (picked - total.log()).squeeze(-1)
            if gradient is not None:
                gradient[part] = weight[targets[part]] - ((logits.to(weight.dtype) @ weight).float() / total).to(weight.dtype)
        ctx.save_for_backward(gradient)
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * upstream[:, None].to(gradient.dtype), None, None
