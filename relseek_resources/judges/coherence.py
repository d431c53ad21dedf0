"""The embedded coherence score: how ordinary a reply is to the unsteered model, and how much it repeats itself.

Here belong the two signs and their calibration on texts whose coherence is known because we damaged them: intact, partly and wholly
shuffled, and looped. It is no language model's judgement of sense.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import expit
from sklearn.linear_model import LogisticRegression

NAME = "perplexity-repetition"
LOW, HIGH = 1.0, 10.0
SHUFFLED = (0.25, 0.5, 1.0)  # shares of words that change places in the damaged texts
LOOP = 4  # words that a looped text repeats


@dataclass(frozen=True)
class Damaged:
    """A text made from an intact one; `coherence` is 1 for intact, 0 for wholly shuffled or looped.

    In between it is the share of word pairs that neither member of which has moved, (1 - share)^2.
    """

    source: int
    kind: str
    text: str
    coherence: float


def damage(texts: Sequence[str], seed: int) -> list[Damaged]:
    """Each text of two words or more intact, with a quarter, half and all of its words shuffled, and looped to the same length.

    Raises:
        ValueError: no text has two words, so that there is nothing to calibrate on.
    """
    found = []
    for source, text in enumerate(texts):
        words = text.split()
        if len(words) < 2:
            continue  # one word has no order to lose
        generator = np.random.Generator(np.random.PCG64([seed, source]))
        found.append(Damaged(source, "intact", text, 1.0))
        for share in SHUFFLED:
            places = np.sort(generator.choice(len(words), max(2, round(share * len(words))), replace=False))
            moved = list(words)
            for place, origin in zip(places, generator.permutation(places), strict=True):
                moved[place] = words[origin]
            found.append(Damaged(source, f"shuffled {share:g}", " ".join(moved), (1 - share) ** 2))
        start = int(generator.integers(max(1, len(words) - LOOP)))
        loop = (words[start : start + LOOP] * (len(words) // LOOP + 1))[: len(words)]
        found.append(Damaged(source, "looped", " ".join(loop), 0.0))
    if not found:
        raise ValueError(f"none of the {len(texts)} replies to calibrate coherence on has two words with a space between; write longer ones")
    return found


def repetition(text: str) -> float:
    """Share of three-word sequences that occurred before in the text, 0 to 1."""
    words = re.findall(r"[\w']+", text.lower())
    triples = [tuple(words[start : start + 3]) for start in range(len(words) - 2)]
    return 1 - len(set(triples)) / len(triples) if triples else 0.0


def signs(texts: Sequence[str], perplexities: np.ndarray) -> np.ndarray:
    """log perplexity, and repetition once and squared, shape (texts, 3)."""
    repeated = np.array([repetition(text) for text in texts])
    return np.column_stack([np.log(perplexities), repeated, repeated**2])


@dataclass(frozen=True)
class CoherenceJudge:
    """score = 1 + 9 σ(weights · signs + intercept)."""

    weights: np.ndarray
    intercept: float

    def scores(self, texts: Sequence[str], perplexities: np.ndarray) -> np.ndarray:
        """Scores from 1 (word salad or a loop) to 10 (as coherent as written text); an empty reply scores 1."""
        found = LOW + (HIGH - LOW) * expit(signs(texts, perplexities) @ self.weights + self.intercept)
        return np.where([bool(text.strip()) for text in texts], found, LOW)

    def arrays(self) -> dict[str, np.ndarray]:
        return {"weights": self.weights.astype(np.float32), "intercept": np.array([self.intercept], dtype=np.float32)}

    @staticmethod
    def from_arrays(arrays: Mapping[str, np.ndarray]) -> CoherenceJudge:
        return CoherenceJudge(arrays["weights"], float(arrays["intercept"][0]))


def fit(damaged: Sequence[Damaged], perplexities: np.ndarray) -> CoherenceJudge:
    """Logistic regression with fractional targets: a text of coherence c counts c as intact and 1 - c as broken.

    Args:
        perplexities: of each text under the unsteered model given its prompt, shape (texts,).
    """
    rows = signs([item.text for item in damaged], perplexities)
    coherence = np.array([item.coherence for item in damaged])
    labels = np.repeat([1, 0], len(damaged))
    model = LogisticRegression(C=10.0, max_iter=2000).fit(np.vstack([rows, rows]), labels, sample_weight=np.concatenate([coherence, 1 - coherence]))
    return CoherenceJudge(model.coef_[0].astype(np.float64), float(model.intercept_[0]))
