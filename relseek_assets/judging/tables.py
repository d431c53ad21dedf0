"""The tables of the judges, and their plain computations."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import combinations
from statistics import NormalDist
from typing import Any

import numpy as np
import pandas as pd

from relseek_assets.behaviour import Rubric
from relseek_resources.storage import Column, TableSchema

KEYS = (
    Column("site", "string", "model and layer"),
    Column("epoch", "integer", "epoch of the vector", low=1),
    Column("multiplier", "number", "dose λ"),
    Column("item", "string", "held-out conversation"),
)
COST = Column("cost_usd", "number", "paid for the judgement", "USD", low=0)

JUDGE_SCORES = TableSchema(
    "judge_scores",
    (
        *KEYS,
        Column("rubric", "string", "what is rated: `relationship`, `coherence`, ..."),
        Column("judge", "string", "who rated"),
        Column("score", "number", "1 to 10", nullable=True, low=0, high=10),
        Column("status", "string", "`scored`, or why there is no score", choices=("scored", "empty_reply")),
        COST,
        Column("attempt", "integer", "how often the judge was asked", low=1),
        Column("band", "string", "the rubric's band that holds the score", nullable=True),
        Column("source", "string", "`judged` here, or `imported` from a file"),
    ),
    key=("site", "epoch", "multiplier", "item", "rubric", "judge"),
)

JUDGE_PAIRS = TableSchema(
    "judge_pairs",
    (
        KEYS[0],
        KEYS[1],
        KEYS[3],
        Column("multiplier_a", "number", "the smaller dose"),
        Column("multiplier_b", "number", "the larger dose"),
        Column("first_shown", "string", "which reply the judge saw first; null for a judge that sees no order", nullable=True, choices=("a", "b")),
        Column("judge", "string", "who compared"),
        Column("winner", "string", "the reply with more of the disposition; null where there is none", nullable=True, choices=("a", "b")),
        Column("status", "string", "`judged`, `tie`, or `unscored` where a reply has no score", choices=("judged", "tie", "unscored")),
        COST,
    ),
    key=("site", "epoch", "item", "multiplier_a", "multiplier_b", "judge"),
)

JUDGE_QUALITY = TableSchema(
    "judge_quality",
    (
        Column("judge", "string", "the judge and what it was fitted on"),
        Column("metric", "string", "what was measured"),
        Column("against", "string", "the truth that it was measured against"),
        Column("value", "number", "the figure", nullable=True),
        Column("lower", "number", "95% interval", nullable=True),
        Column("upper", "number", "95% interval", nullable=True),
        Column("n", "integer", "cases", low=0),
        Column("status", "string", "`measured`, or what was absent"),
    ),
    key=("judge", "metric", "against"),
)

JUDGE_CALIBRATION = TableSchema(
    "judge_calibration",
    (
        Column("low", "number", "lower edge of the bin of predicted probability", low=0, high=1),
        Column("predicted", "number", "mean predicted probability of target", low=0, high=1),
        Column("observed", "number", "share of target replies", low=0, high=1),
        Column("lower", "number", "95% Wilson interval", low=0, high=1),
        Column("upper", "number", "95% Wilson interval", low=0, high=1),
        Column("n", "integer", "replies in the bin", low=1),
    ),
    key=("low",),
)

COHERENCE_CALIBRATION = TableSchema(
    "coherence_calibration",
    (
        Column("kind", "string", "how the text was damaged"),
        Column("truth", "number", "coherence that the damage leaves, 1 to 10", low=1, high=10),
        Column("mean", "number", "score given", low=1, high=10),
        Column("sd", "number", "of the scores", low=0),
        Column("n", "integer", "texts", low=1),
    ),
    key=("kind",),
)


def score_rows(replies: pd.DataFrame, rubric: Rubric, judge: str, scores: np.ndarray) -> pd.DataFrame:
    """Judge score rows of an embedded judge: an empty reply has a status and no score."""
    empty = replies["reply"].str.strip() == ""
    found = pd.Series(scores, index=replies.index).where(~empty)
    return replies[["site", "epoch", "multiplier", "item"]].assign(
        rubric=rubric.name,
        judge=judge,
        score=found,
        status=np.where(empty, "empty_reply", "scored"),
        cost_usd=0.0,
        attempt=1,
        band=[None if np.isnan(score) else rubric.band_of(score) for score in found],
        source="judged",
    )


def pair_rows(scores: pd.DataFrame, doses: Sequence[float]) -> pd.DataFrame:
    """Every pair of doses of every item, won by the higher unrounded score of one judge on one rubric; equal scores tie."""
    found: list[dict[str, Any]] = []
    for (site, epoch, judge, item), part in scores.groupby(["site", "epoch", "judge", "item"]):
        by_dose = dict(zip(part["multiplier"], part["score"], strict=True))
        for first, second in combinations(sorted(dose for dose in doses if dose in by_dose), 2):
            one, two = by_dose[first], by_dose[second]
            status = "unscored" if np.isnan(one) or np.isnan(two) else "tie" if one == two else "judged"
            found.append(
                {
                    "site": site,
                    "epoch": epoch,
                    "item": item,
                    "multiplier_a": first,
                    "multiplier_b": second,
                    "first_shown": None,
                    "judge": judge,
                    "winner": ("a" if one > two else "b") if status == "judged" else None,
                    "status": status,
                    "cost_usd": 0.0,
                }
            )
    return pd.DataFrame(found, columns=list(JUDGE_PAIRS.names))


def wilson(successes: float, n: int) -> tuple[float, float]:
    """95% Wilson score interval of a proportion."""
    z = NormalDist().inv_cdf(0.975)
    centre = (successes + z * z / 2) / (n + z * z)
    half = z * np.sqrt(successes * (n - successes) / n + z * z / 4) / (n + z * z)
    return max(0.0, float(centre - half)), min(1.0, float(centre + half))


def calibration_curve(probabilities: np.ndarray, labels: np.ndarray, bins: int = 10) -> pd.DataFrame:
    """Observed share by equal-width bin of predicted probability; empty bins are left out."""
    place = np.minimum((probabilities * bins).astype(int), bins - 1)
    rows = []
    for index in np.unique(place):
        inside = place == index
        lower, upper = wilson(labels[inside].sum(), int(inside.sum()))
        share = float(labels[inside].mean())
        rows.append(
            {
                "low": index / bins,
                "predicted": probabilities[inside].mean(),
                "observed": share,
                "lower": lower,
                "upper": upper,
                "n": int(inside.sum()),
            }
        )
    return pd.DataFrame(rows)


def auc(positive: np.ndarray, negative: np.ndarray) -> float:
    """Share of (positive, negative) pairs in the right order, ties counting half: the area under the ROC curve."""
    order = np.searchsorted(np.sort(negative), positive, side="left") + np.searchsorted(np.sort(negative), positive, side="right")
    return float(order.mean() / (2 * len(negative)))


def rank_correlation(first: Sequence[float] | np.ndarray, second: Sequence[float] | np.ndarray) -> tuple[float, float, float]:
    """Spearman's ρ with a 95% interval by Fisher's z (standard error 1.06 / sqrt(n - 3), Fieller et al. 1957)."""
    from scipy.stats import spearmanr

    rho = float(spearmanr(first, second).statistic)
    half = NormalDist().inv_cdf(0.975) * np.sqrt(1.06 / (len(first) - 3))
    z = np.arctanh(np.clip(rho, -0.999999, 0.999999))
    return rho, float(np.tanh(z - half)), float(np.tanh(z + half))


def proportion(judge: str, metric: str, against: str, successes: np.ndarray) -> dict[str, Any]:
    lower, upper = wilson(float(successes.sum()), len(successes))
    return quality(judge, metric, against, float(successes.mean()), lower, upper, len(successes))


def quality(
    judge: str, metric: str, against: str, value: float | None, lower: float | None, upper: float | None, n: int, status: str = "measured"
) -> dict[str, Any]:
    return {"judge": judge, "metric": metric, "against": against, "value": value, "lower": lower, "upper": upper, "n": n, "status": status}


def quality_table(rows: Iterable[dict[str, Any]]) -> pd.DataFrame:
    return pd.DataFrame(list(rows), columns=list(JUDGE_QUALITY.names))
