"""Reads the published artifacts of llm-personality-axes in their own layout; what is not there is `Absent`, never an error of its own.

Here belong their paths and fields (spec/pipeline.md, section 11.1). What is recomputed from them belongs to the stages.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from relseek_resources.release import Release
from relseek_resources.storage import StorageError
from relseek_resources.vector_files import read_vectors

MODELS = ("qwen", "llama")
EXTRACTIONS = ("last_token", "response_mean")
SCORES = "artifacts/evaluations/intervention_scores.json"
MOMENTS = ("assistant_mean", "non_assistant_mean", "assistant_std", "non_assistant_std", "cohens_d", "accuracy")


def directions_file(model: str, extraction: str) -> str:
    return f"artifacts/directions/{model}_{extraction}.pt"


def evaluation_file(model: str, extraction: str) -> str:
    return f"artifacts/evaluations/direction_eval_{model}_{extraction}.pt"


FILES = (
    *(file(model, extraction) for model in MODELS for extraction in EXTRACTIONS for file in (directions_file, evaluation_file)),
    SCORES,
)


@dataclass(frozen=True)
class PublishedEvaluation:
    """A published evaluation: the layer named best, and by layer the held-out projections' moments, d and accuracy (`MOMENTS`)."""

    best_layer: int
    layers: Mapping[int, Mapping[str, float]]


@dataclass(frozen=True)
class JudgedReply:
    """A published reply under an intervention; `scale` of an addition, `threshold` of a floor, and the judge's scores, -1 where it failed."""

    intervention: str
    strength: float
    query: str
    persona: str
    assistant_score: float
    coherence_score: float


@dataclass(frozen=True)
class AxesRelease(Release):
    """The artifacts' root folder, or None where RELSEEK_RELEASE_AXES is not set."""

    variable: ClassVar[str] = "RELSEEK_RELEASE_AXES"

    def norms(self, model: str, extraction: str) -> dict[int, float]:
        """Length of each layer's published direction, in float64.

        Raises:
            Absent: no such file. StorageError: anything but plain tensors by layer.
        """
        found = read_vectors(self.file(directions_file(model, extraction)))
        return {layer: float(np.linalg.norm(vector.astype(np.float64))) for layer, vector in found.vectors.items() if layer is not None}

    def evaluation(self, model: str, extraction: str) -> PublishedEvaluation:
        """The published evaluation of a model's directions.

        Raises:
            Absent: no such file. StorageError: a file that is no plain data, or lacks a field.
        """
        import torch

        path = self.file(evaluation_file(model, extraction))
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
            layers = {int(layer): {name: float(row[name]) for name in MOMENTS} for layer, row in content["all_results"].items()}
            return PublishedEvaluation(int(content["best_layer"]), layers)
        except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, TypeError, AttributeError) as error:
            reason = str(error).partition("\n")[0]
            raise StorageError(f"{path}: no evaluation of directions as it was published ({reason}); copy it again") from error

    def judged_replies(self) -> list[JudgedReply]:
        """The published replies with their scores.

        Raises:
            Absent: no such file. StorageError: no JSON, or a record that lacks a field.
        """
        path = self.file(SCORES)
        try:
            return [_judged(record) for record in json.loads(path.read_text(encoding="utf-8"))["experiments"]]
        except (ValueError, KeyError, TypeError) as error:
            raise StorageError(f"{path}: no judged replies as they were published ({error!r}); copy it again") from error


def _judged(record: Mapping[str, Any]) -> JudgedReply:
    scores = record["scores"]
    strength = record["scale"] if "scale" in record else record["threshold"]
    return JudgedReply(
        record["intervention"],
        float(strength),
        record["query"],
        record["persona"],
        float(scores["assistant_score"]),
        float(scores["coherence_score"]),
    )
