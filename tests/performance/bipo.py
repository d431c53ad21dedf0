"""One epoch of BiPO against the naive loop on the same batches, and against the arithmetic that it cannot do without.

On a CPU the embedded model and pairs of the quickstart's behaviour; with a GPU a Llama of 1.2 billion random weights in bfloat16 and random pairs of
the published lengths.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np
import torch

from relseek_assets.behaviour import FILES, read_conversations
from relseek_assets.dataset.pairs import preference_pairs, training_pairs
from relseek_assets.study import load_study
from relseek_assets.vectors import bipo, objective, stream_cache
from relseek_resources import models
from relseek_resources.models import SteeredModel
from tests.performance.comparison import Comparison, compare, machine, seconds
from tests.vectors import naive_bipo

TARGETS = {14 / 30: 3.5, 24 / 30: 5.0}  # by the depth of the steered block
PAIRS, MOST_TOKENS, BATCH, SEED, REPEATS = 16, 256, 8, 11, 3
EPOCHS = 10  # over which the pass that fills the cache is spread
FLOOR = 1.5


def comparisons() -> list[Comparison]:
    model, tokens = (on_gpu if torch.cuda.is_available() else on_cpu)()
    found = []
    for depth, target in TARGETS.items():
        found += at_layer(model, tokens, round(depth * model.layers), target)
    return found


def on_cpu() -> tuple[SteeredModel, objective.TokenPairs]:
    study = load_study("quickstart")
    model = models.load(study.models[0].source, device="cpu")
    conversations = read_conversations(study.behaviour_folder / FILES["starter_conversations"])
    frame = training_pairs(preference_pairs(conversations, heldout_share=study.pairs.heldout_share, seed=study.seed), study.seed)
    system = {"role": "system", "content": study.prompts.system}
    pairs = [objective.Pair(row.pair, [system, *row.prompt], row.chosen, row.rejected) for row in frame.itertuples()]
    return model, objective.token_pairs(model, pairs, count=PAIRS, max_tokens=MOST_TOKENS)


def on_gpu() -> tuple[SteeredModel, objective.TokenPairs]:
    """A Llama of the 1B's shape; prompts of 40 to 400 tokens, replies of the published mean lengths."""
    from transformers import LlamaConfig, LlamaForCausalLM

    settings = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8}
    torch.manual_seed(SEED)
    weights = LlamaForCausalLM(LlamaConfig(vocab_size=128256, max_position_embeddings=4096, head_dim=64, **settings)).to("cuda", torch.bfloat16)
    model = SteeredModel(weights, models.load("embedded:smollm2-135m-instruct", device="cpu").tokenizer)
    draw = np.random.default_rng(SEED)

    def tokens(low: int, high: int) -> list[int]:
        return draw.integers(1000, 120000, draw.integers(low, high)).tolist()

    count = 16 * PAIRS
    replies = [(tokens(60, 240), tokens(40, 180)) for _ in range(count)]
    return model, objective.TokenPairs([str(n) for n in range(count)], [tokens(40, 400) for _ in range(count)], replies, 0)


def at_layer(model: SteeredModel, tokens: objective.TokenPairs, layer: int, target: float) -> list[Comparison]:
    with tempfile.TemporaryDirectory() as folder:
        begin = time.perf_counter()
        pairs = stream_cache.cached(model, tokens, [layer], scratch=stream_cache.Scratch(Path(folder), "", 2**40))
        return measured_at(model, pairs, layer, target, (time.perf_counter() - begin) / EPOCHS)


def measured_at(model: SteeredModel, pairs: stream_cache.CachedPairs, layer: int, target: float, filling: float) -> list[Comparison]:
    """`filling` is an epoch's share, in seconds, of the pass that fills the cache."""
    tokens, losses = pairs.tokens, {"ours": 0.0, "naive": 0.0}
    batches = objective.epoch_batches(tokens.names, tokens.lengths, 1, BATCH, SEED)
    signs = [objective.direction_of(SEED, 1, number) for number in range(len(batches))]
    vector = torch.full((model.width,), 0.05, device=model.device, requires_grad=True)

    def epoch(name: str, loss_of: Callable[[list[int], int], torch.Tensor]) -> None:
        total = 0.0
        for rows, sign in zip(batches, signs, strict=True):
            loss = loss_of(rows, sign)
            loss.backward()
            total += loss.item()
        losses[name] = total / len(batches)

    def ours() -> None:
        epoch("ours", lambda rows, sign: objective.bipo_loss(bipo.log_ratios(model, pairs, layer, rows, sign * vector), sign, 0.1).mean())

    def naive() -> None:
        epoch("naive", lambda rows, sign: naive_bipo.loss_of(model, tokens, rows, layer, vector, sign, 0.1))

    def ours_with_its_share() -> None:
        ours()
        time.sleep(filling)

    naive_bipo.loss_of(model, tokens, batches[0], layer, vector, 1, 0.1).backward()  # warm, as `compare` warms ours
    speed_up = compare(
        f"bipo: layer {layer} of {model.layers}", ours_with_its_share, naive, pairs=REPEATS, amount=len(tokens.names), unit="pairs/s", target=target
    )
    if not math.isclose(losses["ours"], losses["naive"], rel_tol=1e-4 if model.dtype == torch.float32 else 2e-2):
        raise AssertionError(f"layer {layer}: the loss is {losses['ours']} here and {losses['naive']} in the naive loop")
    arithmetic = Arithmetic.of(model, tokens, layer)
    measured, floor = zip(*((seconds(ours), arithmetic.seconds(model)) for _ in range(2 * REPEATS)), strict=True)
    ratios = [FLOOR * best / took for took, best in zip(measured, floor, strict=True)]
    words = sum(map(len, tokens.prompts)) + sum(len(reply) for both in tokens.replies for reply in both)
    share = median(floor) / median(measured)
    print(
        f"layer {layer}: {words / median(measured):.0f} tokens/s, {share:.0%} of a large matrix product's rate; loss {losses['ours']:.6f} both ways"
    )
    limit = Comparison(
        name=f"floor: bipo layer {layer} of {model.layers}",
        ours=median(measured),
        other=FLOOR * median(floor),
        ratio=median(ratios),
        lower=min(ratios),
        upper=max(ratios),
        pairs=len(ratios),
        unit="s",
        target=1.0,
        machine=machine(),
    )
    return [speed_up, limit]


@dataclass(frozen=True)
class Arithmetic:
    """Floating-point operations of the products that one epoch cannot do without: blocks above v forward and backward, logits of reply tokens."""

    operations: float

    @classmethod
    def of(cls, model: SteeredModel, tokens: objective.TokenPairs, layer: int) -> Arithmetic:
        above = model.blocks[layer + 1 :]
        weights = sum(weight.numel() for block in above for weight in block.parameters() if weight.ndim == 2)
        head = model.model.get_output_embeddings().weight.numel()
        config = model.model.config
        size = config.num_attention_heads * getattr(config, "head_dim", config.hidden_size // config.num_attention_heads)
        operations = 0.0
        inner = {"k_proj", "v_proj"}  # of the last block, all that prompt tokens are needed for
        last = sum(w.numel() for name, w in model.blocks[-1].named_parameters() if w.ndim == 2 and not inner & set(name.split("."))) if above else 0
        for prompt, (chosen, rejected) in zip(tokens.prompts, tokens.replies, strict=True):
            p, c, r = len(prompt), len(chosen) - 1, len(rejected) - 1  # a reply's last token predicts nothing
            scores = (p + c) * (p + c + 1) / 2 + r * p + r * (r + 1) / 2
            # weights are frozen, so that their products are two in all, one forward and one backward; of scores and weighted values there are six
            operations += 2 * 2 * ((p + c + r) * weights - (p - 1) * last + (c + r + 2) * head) + len(above) * 2 * scores * size * 6
        return cls(operations)

    def seconds(self, model: SteeredModel) -> float:
        """How long the machine would take at the rate of a large matrix product, measured now."""
        size = 2048 if model.device.type == "cpu" else 8192
        one, other = (torch.randn(size, size, device=model.device, dtype=model.dtype) for _ in range(2))
        repeats = 8 if model.device.type == "cpu" else 50

        def products() -> None:
            for _ in range(repeats):
                one @ other
            if one.is_cuda:
                torch.cuda.synchronize()

        products()
        return self.operations / (2 * repeats * size**3 / seconds(products))
