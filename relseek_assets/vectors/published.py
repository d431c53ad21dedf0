"""Published vectors and their training metrics, as tables of this project.

Here belongs what a published number means beside ours; where the release keeps it belongs in `relseek_resources/release.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import pandas as pd

from relseek_assets.vectors import tables
from relseek_resources.release import PublishedEvaluation
from relseek_resources.storage import Column, StorageError, TableSchema

# The reward and log-prob means are those of one of eight ranks: its share of the 245 held-out pairs (spec/pipeline.md, section 2.4).
RANK_0_PAIRS = 31

TRAINING_METRICS = TableSchema(
    "training_metrics",
    (
        *(column for column in tables.TRAINING_METRICS.columns if column.name != "n"),
        Column("n", "integer", "held-out pairs behind accuracy, margin, rewards and log-probs: rank 0's share; the loss covers all ranks", low=1),
        Column("published_accuracy", "number", "as published: share with the greater reward for chosen, whatever d", low=0, high=1),
        Column("log_prob_chosen", "number", "log-prob of the chosen reply with v, summed over its tokens", "nats"),
        Column("log_prob_rejected", "number", "log-prob of the rejected reply with v, summed over its tokens", "nats"),
    ),
    key=("site", "epoch", "direction"),
)


def training_metrics(site: str, evaluations: Sequence[PublishedEvaluation]) -> pd.DataFrame:
    """One row an epoch and direction, accuracy counted by the sign of the direction as our own training counts it."""
    frame = pd.DataFrame([asdict(found) for found in evaluations]).rename(columns={"accuracy": "published_accuracy"})
    right = frame["published_accuracy"].where(frame["direction"] == 1, 1 - frame["published_accuracy"])
    return frame.assign(site=site, accuracy=right, training_loss=None, n=RANK_0_PAIRS)


def only_file(files: Sequence[Path]) -> Path:
    """The one file of an epoch's vector.

    Raises:
        StorageError: several ranks wrote one, so that each may hold a part of the vector.
    """
    if len(files) > 1:
        names = ", ".join(path.name for path in files)
        raise StorageError(f"{files[0].parent}: {names}: several ranks wrote the vector, so that each may hold a part of it; keep the whole one")
    return files[0]
