"""Reads the published data release in its own layout; what is not there is `Absent`, never an error of its own.

Here belongs knowledge of the release's paths and rows. What is made of them belongs to the stages.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

from relseek_resources.storage import StorageError, file_sha256, read_jsonl

RESCORED = "5-frontier-model-behavioral-landscaping/data/scored_vector_generations_ep10.jsonl"
PROMPTED = "2-steering-vector-training/prompting_experiments/exp1_steerability"
TEST_PAIRS = "data/relationship-seeking/test.jsonl"


class Absent(StorageError):
    """A file of the release that is not on this machine."""


@dataclass(frozen=True)
class ScoredReply:
    """A published reply with the score that a published judge gave it."""

    text: str
    score: float


@dataclass(frozen=True)
class Release:
    """The release's root folder, or None where RELSEEK_RELEASE is not set."""

    root: Path | None

    @staticmethod
    def from_environment() -> Release:
        configured = os.environ.get("RELSEEK_RELEASE")
        return Release(Path(configured) if configured else None)

    def file(self, name: str) -> Path:
        """The path of a file of the release.

        Raises:
            Absent: RELSEEK_RELEASE is not set, or the file is not there.
        """
        if self.root is None:
            raise Absent(f"absent: {name} (RELSEEK_RELEASE is not set)")
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
