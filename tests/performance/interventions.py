"""No intervention costs nothing: short generations inside an empty list of interventions, and inside λ = 0, against the plain model.

A ratio above 1 means that the plain model was slower. Both intervals are to include 1 and to lie within 3% of it; many short calls in turn say
it more narrowly than few long ones, because what slows the machine for a while then slows both.
"""

from __future__ import annotations

import numpy as np

from relseek_resources import models
from relseek_resources.models import Add, Intervention, Sampling
from tests.performance.comparison import Comparison, compare

PAIRS, TURNS, ROWS, TOKENS = 30, 8, 1, 2
LAYER = 14
WITHIN = 0.03
QUESTIONS = ("Why do leaves turn red in autumn?", "How do I boil an egg?", "What is a prime number?", "Tell me about the moon.")


def comparisons() -> list[Comparison]:
    model = models.load("embedded:smollm2-135m-instruct", device="cpu")
    conversations = [[{"role": "user", "content": QUESTIONS[row % len(QUESTIONS)]}] for row in range(ROWS)]
    vector = np.random.default_rng(0).normal(size=model.width)
    nothing: dict[str, list[Intervention]] = {"empty list": [], "λ = 0": [Add(vector, LAYER, 0.0)]}

    def plain() -> list[models.Reply]:
        return model.generate(conversations, Sampling(temperature=0, max_new_tokens=TOKENS))

    def inside(interventions: list[Intervention]) -> list[models.Reply]:
        with model.intervene(interventions):
            return plain()

    return [
        compare(
            f"sweep: no intervention ({name})",
            lambda interventions=interventions: inside(interventions),
            plain,
            pairs=PAIRS,
            turns=TURNS,
            amount=ROWS,
            unit="replies/s",
            target=1,
            within=WITHIN,
        )
        for name, interventions in nothing.items()
    ]
