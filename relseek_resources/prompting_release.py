"""Reads the prompting experiments of the published release in their own layout (spec/pipeline.md, section 5); what is not there is left out.

Here belongs knowledge of paths and rows. What a published number means beside ours belongs in `relseek_assets/prompting/published.py`.

    exp1_steerability/{author}_levels_{n}/generations.jsonl
                                          {rubric}_scores.jsonl
                                          ranking_{author}_vs_steering_{Model}_layer{L}_ep{E}.jsonl
    exp2_stability/levels_{n}/persona_stability_[scores_]{author}_{theme}.jsonl
                   vector_results/persona_stability_[scores_]llama_{size}-layer{L}-ep{E}_{theme}.jsonl
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from relseek_resources.release import Release
from relseek_resources.storage import StorageError, read_jsonl

STEERED = "steered"  # the author whose files are the vector's
FOLDER = "2-steering-vector-training/prompting_experiments"


@dataclass(frozen=True)
class PublishedAuthor:
    """One author's files: of one vector (`vector` is model, layer, epoch, as the release spells them), or of a prompted model by its name."""

    release: Release
    name: str
    levels: int
    vector: tuple[str, int, int]
    steered: bool = False

    @property
    def files(self) -> list[Path]:
        """Every file of this author that is here."""
        found = [self.generations_file, *self.rating_files.values(), self.ranking_file, *self.attack_files(""), *self.attack_files("scores_")]
        return [path for path in found if path is not None]

    @property
    def generations_file(self) -> Path | None:
        return self._steerability("generations.jsonl")

    @property
    def rating_files(self) -> dict[str, Path]:
        """Rubric -> file."""
        folder = self._folder()
        return {} if folder is None else {path.name.removesuffix("_scores.jsonl"): path for path in sorted(folder.glob("*_scores.jsonl"))}

    @property
    def ranking_file(self) -> Path | None:
        model, layer, epoch = self.vector
        return self._steerability(f"ranking_{self.name}_vs_steering_{model}_layer{layer}_ep{epoch}.jsonl")

    def attack_files(self, part: str) -> list[Path]:
        """Files of experiment 2, one a theme; `part` is empty for the conversations and `scores_` for their scores."""
        if self.release.root is None:
            return []
        start = f"persona_stability_{part}{self.attack_name}_"
        folder = self.release.root / FOLDER / "exp2_stability" / ("vector_results" if self.steered else f"levels_{self.levels}")
        return sorted(path for path in folder.glob("*.jsonl") if path.name.startswith(start))

    @property
    def attack_name(self) -> str:
        """The author as experiment 2 spells it: `claude`, or `llama_70B-layer31-ep10`."""
        if not self.steered:
            return self.name
        model, layer, epoch = self.vector
        size = re.search(r"\d+B", model)
        return f"{model.partition('-')[0].lower()}_{size[0] if size else model}-layer{layer}-ep{epoch}"

    def _folder(self) -> Path | None:
        return (
            None
            if self.release.root is None or self.steered
            else self.release.root / FOLDER / "exp1_steerability" / f"{self.name}_levels_{self.levels}"
        )

    def _steerability(self, name: str) -> Path | None:
        folder = self._folder()
        return folder / name if folder is not None and (folder / name).is_file() else None


def rows_of(path: Path, fields: tuple[str, ...]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where, row) of a file whose rows have at least these fields.

    Raises:
        StorageError: naming the file, the line and the field that is missing.
    """
    for number, row in read_jsonl(path):
        where = f"{path}, line {number}"
        lacking = [name for name in fields if name not in row]
        if lacking:
            raise StorageError(f"{where}: {', '.join(lacking)} is missing; mend or remove the line")
        yield where, row


def paid(row: dict[str, Any]) -> dict[str, Any]:
    """Tokens and list price of a published row; zeros where it says nothing of them."""
    usage, cost = row.get("token_usage") or {}, row.get("cost") or {}
    return {
        "prompt_tokens": int(usage.get("prompt_tokens", 0)),
        "completion_tokens": int(usage.get("completion_tokens", 0)),
        "cost_usd": float(cost.get("total_cost", 0.0)),
        "attempt": 1,
    }
