"""Published replies with their perplexity and propensity, as tables of this project.

Here belongs what a published number means beside ours; where the release keeps it belongs in `relseek_resources/release.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd

from relseek_assets.sweeps.tables import KEY, KEYS
from relseek_resources.storage import Column, StorageError, TableSchema

SOURCE = "published"

PUBLISHED_METRICS = TableSchema(
    "published_metrics",
    (
        *KEYS,
        Column("tokens", "integer", "tokens of the reply", "tokens", low=0),
        Column("published_mean_log_prob", "number", "of tokens 2 to n under the steered model fed the reply alone", "nats", high=0),
        Column("published_perplexity", "number", "of the same tokens (spec/pipeline.md, 3)", low=1),
        Column("published_chosen_log_prob", "number", "mean token log-probability of the bare target reply, steered", "nats", high=0),
        Column("published_rejected_log_prob", "number", "mean token log-probability of the bare anti-target reply, steered", "nats", high=0),
        Column("published_propensity", "number", "the difference of the two", "nats"),
        Column("source", "string", "`published`"),
    ),
    key=KEY,
)
METRICS = {
    "avg_log_prob": "published_mean_log_prob",
    "perplexity": "published_perplexity",
    "chosen_logprob": "published_chosen_log_prob",
    "rejected_logprob": "published_rejected_log_prob",
    "propensity": "published_propensity",
}


def metrics_rows(site: str, epoch: int, replies: pd.DataFrame) -> pd.DataFrame:
    """Rows of `published_metrics` of one vector from `read_replies`."""
    frame = replies.rename(columns=METRICS)
    return frame.assign(site=site, epoch=epoch, tokens=replies["response_tokens"].map(len), source=SOURCE)[list(PUBLISHED_METRICS.names)]


def reply_rows(site: str, epoch: int, replies: pd.DataFrame, prompts: Mapping[str, list[dict[str, str]]], system: str) -> pd.DataFrame:
    """Rows of `generations` of one vector; what the release does not say of a reply is null.

    Raises:
        StorageError: a reply to a prompt that the published test split lacks.
    """
    unknown = sorted(set(replies["item"]) - prompts.keys())
    if unknown:
        raise StorageError(f"published replies of {site}, epoch {epoch}: the test split of the release has no prompts {unknown[:3]}; complete it")
    first: list[dict[str, Any]] = [{"role": "system", "content": system}]
    return pd.DataFrame(
        {
            "site": site,
            "epoch": epoch,
            "multiplier": replies["multiplier"],
            "item": replies["item"],
            "prompt": [first + prompts[item] for item in replies["item"]],
            "reply": replies["response_str"],
            "tokens": replies["response_tokens"].map(len),
            "seed": None,
            "finished": None,
            "token_ids": [list(map(int, ids)) for ids in replies["response_tokens"]],
            "mean_log_prob": None,
            "source": SOURCE,
        }
    )
