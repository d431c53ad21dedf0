"""What a served reply is compared with: the same model with forward hooks, run on the reply that the server gave."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from relseek_resources.models import Ablate, Add, Ceiling, Floor, SteeredModel
from relseek_resources.models.interventions import Intervention

KINDS = {"add": (Add, "multiplier"), "floor": (Floor, "threshold"), "ceiling": (Ceiling, "threshold"), "ablate": (Ablate, "strength")}
WORDS = (  # noqa: SIM905 (a hundred quotes read worse)
    "the a my your our this every no of in on with without and but so because when please tell me about how why friend sister teacher garden river "
    "kitchen letter morning evening week question answer plan walk music bread soup map train word night window small quiet old new warm honest busy "
    "tired happy worried think feel know want ask help write learn bring begin end keep"
).split()
Vectors = Mapping[str, Mapping[int, np.ndarray]]


def hooked(interventions: Sequence[Mapping[str, Any]], vectors: Vectors) -> list[Intervention]:
    """Interventions as a request writes them, for the hooks: one a block, as each block may have a vector and a threshold of its own."""
    found: list[Intervention] = []
    for one in interventions:
        kind, number = KINDS[one.get("mode", "add")]
        layers, value = one["layers"], one[number]
        for place, layer in enumerate(layers):
            by_block = vectors[one["vector"]]
            vector = by_block[layer] if len(by_block) > 1 else next(iter(by_block.values()))
            found.append(kind(vector, layer, value[place] if isinstance(value, list) else value))
    return found


@torch.inference_mode()
def shortfall(model: SteeredModel, prompt: list[int], reply: list[int], interventions: Sequence[Intervention]) -> tuple[np.ndarray, np.ndarray]:
    """For each token of the reply, its log-probability in nats, and by how much it falls short of the likeliest token's; 0 for a greedy reply."""
    with model.intervene(list(interventions)):
        hidden = model.hidden(model.batch([[*prompt, *reply]]))[0, len(prompt) - 1 : -1]
        log_probs = model.logits(hidden).log_softmax(-1)
    own = log_probs.gather(-1, torch.tensor(reply).unsqueeze(-1)).squeeze(-1)
    return own.numpy(), (log_probs.max(-1).values - own).numpy()


def drawn(rng: random.Random) -> list[dict[str, Any]]:
    """A random request: none to three interventions of every mode, after one block or several, doses in [-2, 2], some of them 0."""

    def one() -> dict[str, Any]:
        name = rng.choice(["warm", "many"])
        blocks = range(8, 16) if name == "many" else range(30)
        layers = sorted(rng.sample(blocks, rng.choice([1, 1, 1, 2, 4])))
        mode = rng.choice(["add", "add", "add", "floor", "ceiling", "ablate"])
        if mode == "add":
            return {"vector": name, "layers": layers, "multiplier": rng.choice([0, -2, 2, rng.uniform(-2, 2), rng.uniform(-2, 2)])}
        if mode == "ablate":
            return {"vector": name, "layers": layers, "mode": mode, "strength": rng.choice([0, 1, rng.random()])}
        return {"vector": name, "layers": layers, "mode": mode, "threshold": [rng.uniform(-8, 8) for _ in layers]}

    return [one() for _ in range(rng.choice([0, 1, 1, 1, 2, 3]))]


def prompts(rng: random.Random, tokenizer: Any) -> list[list[int]]:
    """Twelve prompts of token ids: short ones, and long ones of which four each share more than a block of 128 tokens."""

    def words(tokens: int) -> list[int]:
        text = " ".join(rng.choice(WORDS) for _ in range(tokens))
        return tokenizer(text, add_special_tokens=False)["input_ids"][:tokens]

    short = [words(rng.randrange(1, 60)) for _ in range(4)]
    shared = [words(length) for length in (150, 290)]
    return short + [[*prefix, *words(rng.randrange(5, 40))] for prefix in shared for _ in range(4)]
