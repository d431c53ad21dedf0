"""The embedded judge: a regression on sentence embeddings and word counts, fitted on a behaviour's own pairs.

It is no language model and is never called one: it sees the reply alone and nothing of the conversation. Here belong fitting,
calibration and scoring of the disposition; the coherence score is in `coherence.py`.

Embeddings carry what a reply says and blur how it addresses the reader, so function words, pronouns and exclamation and question
marks enter beside them as TF-IDF weights (measured in docs/decisions.md).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

import numpy as np
from scipy.optimize import minimize
from scipy.special import expit
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GroupKFold

from relseek_resources.judges.embedding import embed

NAME = "minilm-words-regression"
PENALTIES = (0.3, 1.0, 3.0, 10.0, 30.0)  # inverse L2 strengths tried
LOW, HIGH = 1.0, 10.0
WORD = r"(?u)\b\w+\b|[!?]"


@dataclass(frozen=True)
class Features:
    """A reply as numbers: its embedding beside its TF-IDF weights, each of unit length."""

    vocabulary: tuple[str, ...]
    rarity: np.ndarray  # inverse document frequency, one a word

    def __call__(self, texts: Sequence[str], embeddings: np.ndarray | None = None) -> np.ndarray:
        """(texts, 384 + words), float64; `embeddings` are those of the texts where somebody has them already."""
        return np.hstack([embed(texts) if embeddings is None else embeddings, self._weights(texts)])

    def _weights(self, texts: Sequence[str]) -> np.ndarray:
        place = {word: column for column, word in enumerate(self.vocabulary)}
        found = np.zeros((len(texts), len(self.vocabulary)))
        for row, text in enumerate(texts):
            for word in re.findall(WORD, text.lower()):
                if word in place:
                    found[row, place[word]] += 1
        found = np.where(found > 0, 1 + np.log(np.maximum(found, 1)), 0) * self.rarity
        lengths = np.linalg.norm(found, axis=1, keepdims=True)
        return found / np.where(lengths > 0, lengths, 1)


@dataclass(frozen=True)
class EmbeddedJudge:
    """A direction in feature space and the curve that turns its projection into 1 to 10, or from another `lowest` score.

    score = lowest + (10 - lowest) σ(slope (weights · features + intercept) + offset)
    """

    lowest: ClassVar[float] = LOW

    features: Features
    weights: np.ndarray
    intercept: float
    slope: float
    offset: float

    def projections(self, texts: Sequence[str], embeddings: np.ndarray | None = None) -> np.ndarray:
        """Log-odds of 'target' before calibration, shape (texts,)."""
        return self.features(texts, embeddings) @ self.weights + self.intercept

    def scale(self, projections: np.ndarray) -> np.ndarray:
        """Scores from the lowest (anti-target) to 10 (target) of projections, shape (texts,)."""
        return self.lowest + (HIGH - self.lowest) * expit(self.slope * projections + self.offset)

    def scores(self, texts: Sequence[str], embeddings: np.ndarray | None = None) -> np.ndarray:
        return self.scale(self.projections(texts, embeddings))

    def arrays(self) -> dict[str, np.ndarray]:
        curve = np.array([self.intercept, self.slope, self.offset], dtype=np.float32)
        return {"weights": self.weights.astype(np.float32), "rarity": self.features.rarity.astype(np.float32), "curve": curve}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray], vocabulary: Sequence[str]) -> Self:
        intercept, slope, offset = (float(value) for value in arrays["curve"])
        return cls(Features(tuple(vocabulary), arrays["rarity"]), arrays["weights"], intercept, slope, offset)


@dataclass(frozen=True)
class Fit:
    """A fitted judge with its cross-validated figures; folds hold whole conversations out.

    `projections` are those of chosen then rejected replies, each from the fold that had not seen it.
    """

    judge: EmbeddedJudge
    pair_accuracy: float
    log_loss: float
    penalty: float
    projections: np.ndarray


def fit(
    chosen: Sequence[str],
    rejected: Sequence[str],
    conversations: Sequence[str],
    graded: Sequence[str] = (),
    grades: Sequence[float] = (),
    on_batch: Callable[[int], None] = lambda rows: None,
) -> Fit:
    """Fit the judge on the chosen and rejected reply of each pair; `conversations` says which pairs belong together.

    The L2 penalty is chosen by cross-validated log-loss. The curve is fitted by least squares on the 1-10 scale to the graded
    replies where there are any, else to the cross-validated projections with chosen at 10 and rejected at 1.
    """
    vectoriser = TfidfVectorizer(token_pattern=WORD, min_df=2, sublinear_tf=True).fit([*chosen, *rejected])
    features = Features(tuple(vectoriser.get_feature_names_out()), vectoriser.idf_)
    texts = [*chosen, *rejected]
    rows = features(texts, embed(texts, on_batch=on_batch))
    labels = np.repeat([1, 0], [len(chosen), len(rejected)])
    owners = np.array([*conversations, *conversations])
    folds = list(GroupKFold(min(5, len(set(conversations)))).split(rows, labels, owners))
    trials = {penalty: _cross_validated(rows, labels, folds, penalty) for penalty in PENALTIES}
    losses = {penalty: _log_loss(projections, labels) for penalty, projections in trials.items()}
    best = min(losses, key=losses.__getitem__)
    model = _regression(best).fit(rows, labels)
    weights, intercept = model.coef_[0].astype(np.float64), float(model.intercept_[0])
    if graded:
        slope, offset = _fit_curve(features(graded) @ weights + intercept, np.asarray(grades))
    else:
        slope, offset = _fit_curve(trials[best], np.where(labels == 1, HIGH, LOW))
    halves = trials[best].reshape(2, -1)
    judge = EmbeddedJudge(features, weights, intercept, slope, offset)
    return Fit(judge, float((halves[0] > halves[1]).mean()), losses[best], best, trials[best])


def _regression(penalty: float) -> LogisticRegression:
    return LogisticRegression(C=penalty, max_iter=2000)


def _cross_validated(rows: np.ndarray, labels: np.ndarray, folds: list[tuple[np.ndarray, np.ndarray]], penalty: float) -> np.ndarray:
    projections = np.empty(len(labels))
    for inside, outside in folds:
        projections[outside] = _regression(penalty).fit(rows[inside], labels[inside]).decision_function(rows[outside])
    return projections


def _log_loss(projections: np.ndarray, labels: np.ndarray) -> float:
    return float(np.logaddexp(0, np.where(labels == 1, -projections, projections)).mean())


def _fit_curve(projections: np.ndarray, grades: np.ndarray) -> tuple[float, float]:
    def squared_error(parameters: np.ndarray) -> float:
        predicted = LOW + (HIGH - LOW) * expit(np.exp(parameters[0]) * projections + parameters[1])
        return float(((predicted - grades) ** 2).mean())

    found = minimize(squared_error, np.zeros(2), method="Nelder-Mead")
    return float(np.exp(found.x[0])), float(found.x[1])
