"""Reads the published data release in its own layout; what is not there is `Absent`, never an error of its own.

Here belongs knowledge of the release's paths and rows. What is made of them belongs to the stages.
"""

from __future__ import annotations

import hashlib
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

from relseek_resources.storage import StorageError, file_sha256, read_jsonl

RESCORED = "5-frontier-model-behavioral-landscaping/data/scored_vector_generations_ep10.jsonl"
PROMPTED = "2-steering-vector-training/prompting_experiments/exp1_steerability"
TEST_PAIRS = "data/relationship-seeking/test.jsonl"
VECTORS = "2-steering-vector-training/vector"
TRAINING_METRICS = "evaluation_metrics.jsonl"


class Absent(StorageError):
    """A file of the release that is not on this machine."""


@dataclass(frozen=True)
class ScoredReply:
    """A published reply with the score that a published judge gave it."""

    text: str
    score: float


@dataclass(frozen=True)
class PublishedEvaluation:
    """A published held-out evaluation of one epoch (spec/pipeline.md, section 2.4).

    `loss` is the mean over the whole test set; rewards, margin, accuracy and log-probs are means over the share of rank 0 alone. `accuracy` is as it
    was published, the share of pairs with a greater reward for the chosen reply, whatever the direction: at d = -1 a perfect vector has 0.
    """

    epoch: int
    direction: int
    loss: float
    accuracy: float
    margin: float
    reward_chosen: float
    reward_rejected: float
    log_prob_chosen: float
    log_prob_rejected: float


@dataclass(frozen=True)
class Release:
    """The release's root folder, or None where RELSEEK_RELEASE is not set."""

    root: Path | None
    variable: ClassVar[str] = "RELSEEK_RELEASE"

    @classmethod
    def from_environment(cls) -> Self:
        configured = os.environ.get(cls.variable)
        return cls(Path(configured) if configured else None)

    def file(self, name: str) -> Path:
        """The path of a file of the release.

        Raises:
            Absent: the variable is not set, or the file is not there.
        """
        if self.root is None:
            raise Absent(f"absent: {name} ({self.variable} is not set)")
        path = self.root / name
        if not path.is_file():
            raise Absent(f"absent: {path}")
        return path

    def version(self, names: tuple[str, ...]) -> str:
        """A data version of several files, counting those that are absent."""
        digest = hashlib.sha256()
        for name in names:
            try:
                digest.update(f"{name}={file_sha256(self.file(name))}".encode())
            except Absent:
                digest.update(f"{name}=absent".encode())
        return digest.hexdigest()[:16]

    def rescored_generations(self) -> list[ScoredReply]:
        """Steered replies of the published vector with their GPT-4.1-mini scores; unscored rows are left out."""
        rows = [row for _, row in read_jsonl(self.file(RESCORED))]
        return [ScoredReply(row["response_str"], float(row["relationship_score"])) for row in rows if row["relationship_score"] is not None]

    def prompted_generations(self) -> list[ScoredReply]:
        """Prompted replies of experiment 1 with their GPT-4o relationship scores, every model that is there."""
        if self.root is None or not (self.root / PROMPTED).is_dir():
            raise Absent(f"absent: {PROMPTED}")
        found = []
        for folder in sorted((self.root / PROMPTED).iterdir()):
            generations, scores = folder / "generations.jsonl", folder / "relationship_scores.jsonl"
            if generations.is_file() and scores.is_file():
                texts = {row["generation_id"]: row["response_str"] for _, row in read_jsonl(generations)}
                found += [
                    ScoredReply(texts[row["generation_id"]], float(row["score"])) for _, row in read_jsonl(scores) if row["generation_id"] in texts
                ]
        if not found:
            raise Absent(f"absent: generations with scores under {self.root / PROMPTED}")
        return found

    def test_replies(self) -> list[tuple[str, str, str]]:
        """(conversation, chosen reply, rejected reply) of the published test split."""
        rows = [row for _, row in read_jsonl(self.file(TEST_PAIRS))]
        return [(str(row["prompt_id"]), row["chosen_arr"][0]["content"], row["rejected_arr"][0]["content"]) for row in rows]

    # --- vectors ------------------------------------------------------------------------------------------------------

    def vector_files(self, behaviour: str, model: str, layer: int) -> dict[int, list[Path]]:
        """Epoch -> the files of one layer's vector, one for each rank of the training that wrote one; empty where the release has none.

        Args:
            behaviour, model: as the release spells them, `relationship-seeking` and `Llama-3.1-70B-Instruct`.
        """
        found: dict[int, list[Path]] = {}
        folder = None if self.root is None else self.root / _vector_folder(behaviour, model, layer)
        for path in sorted(folder.glob(f"vec_ep*_layer{layer}_gpu*.pt")) if folder is not None else ():
            name = re.fullmatch(rf"vec_ep(\d+)_layer{layer}_gpu\d+\.pt", path.name)
            if name is not None:
                found.setdefault(int(name[1]), []).append(path)
        return found

    def training_evaluations(self, behaviour: str, model: str, layer: int) -> list[PublishedEvaluation]:
        """The published held-out evaluations of one layer, by epoch and direction.

        Raises:
            Absent: RELSEEK_RELEASE is not set, or the file is not there.
            StorageError: naming the file and the line that cannot be read.
        """
        path = self.file(training_metrics_file(behaviour, model, layer))
        return [_evaluation(row, f"{path}, line {number}") for number, row in read_jsonl(path)]


def training_metrics_file(behaviour: str, model: str, layer: int) -> str:
    return f"{_vector_folder(behaviour, model, layer)}/{TRAINING_METRICS}"


def _vector_folder(behaviour: str, model: str, layer: int) -> str:
    return f"{VECTORS}/{behaviour}_{model}/layer{layer}"


def _evaluation(row: dict[str, Any], where: str) -> PublishedEvaluation:
    try:
        direction = int(row["eval_multiplier"])
        side = {1: "add", -1: "sub"}[direction]
        return PublishedEvaluation(
            epoch=int(row["epoch"]),
            direction=direction,
            loss=float(row[f"eval_test_dataset_{side}_loss"]),
            accuracy=float(row["eval_rewards/accuracies"]),
            margin=float(row["eval_rewards/margins"]),
            reward_chosen=float(row["eval_rewards/chosen"]),
            reward_rejected=float(row["eval_rewards/rejected"]),
            log_prob_chosen=float(row["eval_logps/chosen"]),
            log_prob_rejected=float(row["eval_logps/rejected"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise StorageError(f"{where}: no published evaluation ({error!r}); mend or remove the line") from error
