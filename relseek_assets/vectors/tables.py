"""The tables of stage 2's vectors, and their plain computations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from relseek_resources.storage import Column, TableSchema

if TYPE_CHECKING:
    from relseek_assets.vectors.bipo import TrainedVector

SITE = Column("site", "string", "model and layer")
EPOCH = Column("epoch", "integer", "training epoch", low=1)

TRAINING_METRICS = TableSchema(
    "training_metrics",
    (
        SITE,
        EPOCH,
        Column("direction", "integer", "sign d at which v was added", low=-1, high=1),
        Column("loss", "number", "held-out BiPO loss", "nats", low=0),
        Column("accuracy", "number", "share of held-out pairs whose margin has the sign of d", low=0, high=1),
        Column("margin", "number", "β (log-ratio chosen - log-ratio rejected)", "nats"),
        Column("reward_chosen", "number", "β log-ratio of the chosen reply", "nats"),
        Column("reward_rejected", "number", "β log-ratio of the rejected reply", "nats"),
        Column("training_loss", "number", "mean loss of the epoch's steps at this direction", "nats", nullable=True, low=0),
        Column("n", "integer", "held-out pairs", low=1),
    ),
    key=("site", "epoch", "direction"),
)

VECTOR_SUMMARY = TableSchema(
    "vector_summary",
    (
        SITE,
        EPOCH,
        Column("norm", "number", "Euclidean length of v", low=0),
        Column("cosine_to_last", "number", "cosine with the last epoch's vector of the site", nullable=True, low=-1.000001, high=1.000001),
        Column("width", "integer", "entries of v", low=1),
        Column("source", "string", "`trained` here, `published` in the release, or `imported` from a file"),
        Column("sha256", "string", "of v's float32 bytes"),
    ),
    key=("site", "epoch"),
)


def training_metrics(site: str, run: TrainedVector) -> pd.DataFrame:
    """One row an epoch and direction."""
    steps = len(run.losses) // len(run.vectors)
    rows = []
    for found in run.evaluations:
        part = slice((found.epoch - 1) * steps, found.epoch * steps)
        mine = run.losses[part][run.directions[part] == found.direction]
        rows.append(
            {
                "site": site,
                "epoch": found.epoch,
                "direction": found.direction,
                "loss": found.loss,
                "accuracy": found.accuracy,
                "margin": found.margin,
                "reward_chosen": found.reward_chosen,
                "reward_rejected": found.reward_rejected,
                "training_loss": float(mine.mean()) if len(mine) else None,
                "n": found.pairs,
            }
        )
    return pd.DataFrame(rows)


def vector_summary(site: str, vectors: Mapping[int, np.ndarray], sources: Mapping[int, str], hashes: Mapping[int, str]) -> pd.DataFrame:
    """One row an epoch: the vector's norm and its cosine with the site's last epoch (null for a zero vector)."""
    last = vectors[max(vectors)]
    return pd.DataFrame(
        [
            {
                "site": site,
                "epoch": epoch,
                "norm": float(np.linalg.norm(vector)),
                "cosine_to_last": cosine(vector, last),
                "width": len(vector),
                "source": sources[epoch],
                "sha256": hashes[epoch],
            }
            for epoch, vector in sorted(vectors.items())
        ]
    )


def cosine(first: np.ndarray, second: np.ndarray) -> float | None:
    lengths = float(np.linalg.norm(first) * np.linalg.norm(second))
    return float(first @ second) / lengths if lengths else None


def provenance(site: str, epoch: int, source: str, details: Sequence[tuple[str, str]]) -> dict[str, str]:
    """The header of a vector file."""
    return {"site": site, "epoch": str(epoch), "source": source, **dict(details)}
