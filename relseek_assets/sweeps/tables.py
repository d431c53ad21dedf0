"""The tables of the sweep, and how a row's seed comes from its key."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import pandas as pd

from relseek_resources.storage import Column, TableSchema, keyed_seed

if TYPE_CHECKING:
    from relseek_resources.models import Reply

KEYS = (
    Column("site", "string", "model and layer"),
    Column("epoch", "integer", "epoch of the vector", low=1),
    Column("multiplier", "number", "dose λ"),
    Column("item", "string", "held-out conversation"),
)
KEY = ("site", "epoch", "multiplier", "item")

GENERATIONS = TableSchema(
    "generations",
    (
        *KEYS,
        Column("prompt", "json", "messages before the reply, system prompt included"),
        Column("reply", "string", "the steered model's reply"),
        Column(
            "tokens", "integer", "tokens drawn, end token included; null where a file from elsewhere does not say", "tokens", nullable=True, low=0
        ),
        Column("seed", "integer", "of the row's own random numbers", nullable=True),
        Column("finished", "boolean", "whether the reply ended by itself", nullable=True),
        Column("token_ids", "json", "the tokens drawn", nullable=True),
        Column(
            "mean_log_prob",
            "number",
            "mean log-probability of the tokens drawn, under the steered model given the prompt",
            "nats",
            nullable=True,
            high=0,
        ),
        Column("source", "string", "`generated` here, or `imported` from a file"),
    ),
    key=KEY,
)

GENERATION_METRICS = TableSchema(
    "generation_metrics",
    (
        *KEYS,
        Column("perplexity", "number", "of the reply under the unsteered model given its prompt", low=1, nullable=True),
        Column("mean_log_prob", "number", "of the reply under the steered model given its prompt", "nats", high=0, nullable=True),
        Column(
            "propensity",
            "number",
            "mean token log-probability of the target reply minus that of the anti-target reply, steered, given the prompt",
            "nats",
        ),
        Column(
            "published_perplexity",
            "number",
            "of tokens 2 to n under the steered model fed the reply alone (spec/pipeline.md, 3)",
            low=1,
            nullable=True,
        ),
        Column("published_chosen_log_prob", "number", "mean token log-probability of the bare target reply, steered", "nats", high=0),
        Column("published_rejected_log_prob", "number", "mean token log-probability of the bare anti-target reply, steered", "nats", high=0),
        Column("published_propensity", "number", "the difference of the two", "nats"),
    ),
    key=KEY,
)


def row_seed(study_seed: int, site: str, epoch: int, multiplier: float, item: str) -> int:
    """The seed of one reply, from its own key."""
    return keyed_seed(study_seed, "reply", site, epoch, repr(float(multiplier)), item)


def generation_row(site: str, epoch: int, multiplier: float, item: str, prompt: Sequence[dict[str, str]], seed: int, reply: Reply) -> dict[str, Any]:
    return {
        "site": site,
        "epoch": epoch,
        "multiplier": float(multiplier),
        "item": item,
        "prompt": list(prompt),
        "reply": reply.text,
        "tokens": len(reply.tokens),
        "seed": seed,
        "finished": reply.finished,
        "token_ids": list(reply.tokens),
        "mean_log_prob": math.fsum(reply.log_probs) / len(reply.log_probs),
        "source": "generated",
    }


def of_cell(frame: pd.DataFrame, multiplier: float) -> pd.DataFrame:
    """The rows of one dose, in the order of their items."""
    return frame[frame["multiplier"] == multiplier].sort_values("item").reset_index(drop=True)


SUMMARISED = ("perplexity", "propensity", "mean_log_prob", "published_perplexity", "published_propensity")

SWEEP_SUMMARY = TableSchema(
    "sweep_summary",
    (
        *KEYS[:3],
        Column("quantity", "string", "column of generation_metrics; perplexities as log10", choices=SUMMARISED),
        Column("mean", "number", "over items"),
        Column("sd", "number", "over items, sample standard deviation", nullable=True, low=0),
        Column("n", "integer", "items", low=1),
    ),
    key=("site", "epoch", "multiplier", "quantity"),
)


def sweep_summary(rows: pd.DataFrame) -> pd.DataFrame:
    """Mean and sd by dose; perplexities as log10, because their means are ruled by a few replies."""
    found = []
    for (site, epoch, multiplier), part in rows.groupby(["site", "epoch", "multiplier"]):
        for quantity in SUMMARISED:
            values = part[quantity].dropna().astype(float)
            values = values.map(math.log10) if "perplexity" in quantity else values
            if len(values):
                keys = {"site": site, "epoch": epoch, "multiplier": multiplier, "quantity": quantity}
                found.append({**keys, "mean": values.mean(), "sd": values.std(ddof=1) if len(values) > 1 else None, "n": len(values)})
    return pd.DataFrame(found, columns=list(SWEEP_SUMMARY.names))
