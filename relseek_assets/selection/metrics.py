"""Dose-response, coherence AUC, slopes and the choice among candidates (spec/pipeline.md, section 4.4), with bootstrap intervals.

A candidate is one vector: a site at an epoch. Prompts (items) are resampled, the same draw for all candidates, so that
differences between candidates keep what they share.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from relseek_resources.storage import Column, StorageError, TableSchema, keyed_seed

SITE = Column("site", "string", "model and layer")
EPOCH = Column("epoch", "integer", "epoch of the vector", low=1)
DOSE = Column("multiplier", "number", "dose λ")
WEIGHTS = tuple(round(0.1 * step, 1) for step in range(11))

DOSE_RESPONSE = TableSchema(
    "dose_response",
    (
        SITE,
        EPOCH,
        DOSE,
        Column("rubric", "string", "what was rated"),
        Column("judge", "string", "who rated"),
        Column("estimate", "number", "mean score over items, 1 to 10"),
        Column("lower", "number", "95% interval"),
        Column("upper", "number", "95% interval"),
        Column("se", "number", "bootstrap standard error", low=0),
        Column("n", "integer", "scored items", low=1),
        Column("unscored", "integer", "replies without a score", low=0),
        Column("method", "string", "how the interval was made"),
    ),
    key=("site", "epoch", "multiplier", "rubric", "judge"),
)

QUANTITIES = ("log10_perplexity", "propensity")

METRIC_DOSE_RESPONSE = TableSchema(
    "metric_dose_response",
    (
        SITE,
        EPOCH,
        DOSE,
        Column("quantity", "string", "log10 of the published perplexity, or the published propensity in nats", choices=QUANTITIES),
        Column("estimate", "number", "mean over items"),
        Column("lower", "number", "95% interval"),
        Column("upper", "number", "95% interval"),
        Column("se", "number", "bootstrap standard error", low=0),
        Column("n", "integer", "items", low=1),
        Column("method", "string", "how the interval was made"),
        Column("source", "string", "`published`"),
    ),
    key=("site", "epoch", "multiplier", "quantity"),
)

CANDIDATE_ITEMS = TableSchema(
    "candidate_items",
    (
        SITE,
        EPOCH,
        DOSE,
        Column("item", "string", "held-out conversation"),
        Column("coherence", "number", "1 to 10", nullable=True),
        Column("rating", "number", "disposition, 1 to 10", nullable=True),
        Column("wins", "number", "pairs won within the selection doses, a tie counting half", nullable=True, low=0),
        Column("matches", "number", "pairs judged or tied within the selection doses", nullable=True, low=0),
    ),
    key=("site", "epoch", "multiplier", "item"),
)

SELECTION = TableSchema(
    "selection",
    (
        SITE,
        EPOCH,
        *(
            Column(f"{metric}{end}", "number", f"{meaning}{what}", unit, nullable=True)
            for metric, meaning, unit in (
                ("coherence_auc", "area under mean coherence by dose", "score × λ"),
                ("rating_slope", "least-squares slope of mean rating by dose", "score per λ"),
                ("pairwise_slope", "least-squares slope of win rate by dose", "share per λ"),
            )
            for end, what in (("", ""), ("_lower", ", 95% lower"), ("_upper", ", 95% upper"))
        ),
        Column("score", "number", "mean of the z-scores of coherence AUC and pairwise slope", nullable=True),
        Column("rating_score", "number", "the same with the rating slope", nullable=True),
        Column("pareto", "boolean", "no other candidate with a score is at least as good on both and better on one", nullable=True),
        Column("selected", "boolean", "highest score (rating_score where there are no pairs); a tie goes to the larger selected_share"),
        Column("selected_share", "number", "share of bootstrap draws in which it is selected", low=0, high=1),
        Column("candidates", "integer", "over how many candidates, those with both figures, the z-scores were taken", low=0),
        Column("n", "integer", "items", low=1),
        Column("reason", "string", "why a score is null, with the doses that lack a figure, or how a tie was broken; empty otherwise"),
    ),
    key=("site", "epoch"),
)

SELECTION_SENSITIVITY = TableSchema(
    "selection_sensitivity",
    (
        Column("weight", "number", "on coherence AUC; the rest is on the slope", low=0, high=1),
        SITE,
        EPOCH,
        Column("score", "number", "weighted sum of z-scores", nullable=True),
        Column("best", "boolean", "highest at this weight"),
        Column("share", "number", "share of bootstrap draws in which it is the highest", low=0, high=1),
    ),
    key=("weight", "site", "epoch"),
)


def resamples(items: Sequence[str], draws: int, seed: int) -> np.ndarray:
    """Bootstrap counts, shape (draws, items): how often each item is drawn. Depends on the seed and the items alone."""
    generator = np.random.Generator(np.random.PCG64(keyed_seed(seed, "bootstrap", *items)))
    return generator.multinomial(len(items), np.full(len(items), 1 / len(items)), size=draws).astype(float)


def weighted_means(values: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Means over items of values (items, columns) under counts (draws, items), NaN cells left out: (draws, columns)."""
    there = ~np.isnan(values)
    total = counts @ np.where(there, values, 0.0)
    weight = counts @ there
    with np.errstate(invalid="ignore", divide="ignore"):
        return total / weight


def dose_response(scores: pd.DataFrame, draws: int, seed: int) -> pd.DataFrame:
    """Mean score by dose, rubric and judge, with percentile bootstrap intervals over items."""
    found = []
    for (site, epoch, rubric, judge), part in scores.groupby(["site", "epoch", "rubric", "judge"]):
        grid = part.pivot_table(index="item", columns="multiplier", values="score", dropna=False).sort_index()
        values = grid.to_numpy(float)
        counts = resamples(list(grid.index), draws, seed)
        boot = weighted_means(values, counts)
        for column, multiplier in enumerate(grid.columns):
            scored = values[~np.isnan(values[:, column]), column]
            if len(scored):
                low, high = np.nanpercentile(boot[:, column], [2.5, 97.5])
                found.append(
                    {
                        "site": site,
                        "epoch": epoch,
                        "multiplier": multiplier,
                        "rubric": rubric,
                        "judge": judge,
                        "estimate": scored.mean(),
                        "lower": low,
                        "upper": high,
                        "se": float(np.nanstd(boot[:, column], ddof=1)),
                        "n": len(scored),
                        "unscored": len(values) - len(scored),
                        "method": f"percentile bootstrap over items, {draws} draws",
                    }
                )
    return pd.DataFrame(found, columns=list(DOSE_RESPONSE.names))


def metric_dose_response(rows: pd.DataFrame, draws: int, seed: int) -> pd.DataFrame:
    """Mean perplexity and propensity by dose with bootstrap intervals over items; perplexity as log10, since a few replies rule its mean."""
    quantities = rows.assign(log10_perplexity=np.log10(rows["published_perplexity"]), propensity=rows["published_propensity"])
    long = quantities.melt(["site", "epoch", "multiplier", "item", "source"], QUANTITIES, "quantity", "score")
    found = dose_response(long.rename(columns={"quantity": "rubric", "source": "judge"}), draws, seed)
    return found.rename(columns={"rubric": "quantity", "judge": "source"})[list(METRIC_DOSE_RESPONSE.names)]


def candidate_items(scores: pd.DataFrame, pairs: pd.DataFrame | None, doses: Sequence[float], rating: str) -> pd.DataFrame:
    """One row an item and selection dose: its coherence, its rating, and its pairs won within the selection doses."""
    inside = scores[scores["multiplier"].isin(doses)]
    keys = ["site", "epoch", "multiplier", "item"]
    wide = inside.pivot_table(index=keys, columns="rubric", values="score", dropna=False).reset_index()
    frame = wide.rename(columns={rating: "rating"})
    for name in ("coherence", "rating"):
        if name not in frame:
            frame[name] = np.nan
    frame["wins"] = np.nan
    frame["matches"] = np.nan
    if pairs is not None and len(pairs):
        met = pairs[pairs["multiplier_a"].isin(doses) & pairs["multiplier_b"].isin(doses) & (pairs["winner"].notna() | (pairs["status"] == "tie"))]
        for_a = met.assign(multiplier=met["multiplier_a"], win=np.where(met["status"] == "tie", 0.5, met["winner"] == "a"))
        for_b = met.assign(multiplier=met["multiplier_b"], win=np.where(met["status"] == "tie", 0.5, met["winner"] == "b"))
        tally = pd.concat([for_a, for_b]).groupby(keys)["win"].agg(wins="sum", matches="count").astype(float).reset_index()
        frame = frame.drop(columns=["wins", "matches"]).merge(tally, on=keys, how="left")
    return frame[list(CANDIDATE_ITEMS.names)]


@dataclass(frozen=True)
class Candidate:
    """One vector's figures: the estimates, and each bootstrap draw's. `draws[metric]` has shape (draws,).

    `gaps[metric]` are the doses at which nothing is there to take the metric from, which leaves its estimate NaN.
    """

    site: str
    epoch: int
    estimates: dict[str, float]
    draws: dict[str, np.ndarray]
    n: int
    gaps: Mapping[str, tuple[float, ...]] = field(default_factory=dict)

    def has(self, *metrics: str) -> bool:
        return all(np.isfinite(self.estimates[metric]) for metric in metrics)

    def lacks(self, metric: str) -> str:
        """Which figure is not there, and at which doses."""
        doses = ", ".join(f"{dose:g}" for dose in self.gaps.get(metric, ()))
        return f"no {SUBJECTS[metric]} at λ = {doses}" if doses else f"no {metric.replace('_', ' ')}"


METRICS = ("coherence_auc", "rating_slope", "pairwise_slope")
SUBJECTS = {"coherence_auc": "coherence", "rating_slope": "rating", "pairwise_slope": "pairs"}


def slope(means: np.ndarray, doses: np.ndarray) -> np.ndarray:
    """Least-squares slope of means (..., doses) on the doses."""
    centred = doses - doses.mean()
    return means @ centred / (centred @ centred)


def candidate(part: pd.DataFrame, items: Sequence[str], counts: np.ndarray) -> Candidate:
    """Estimates and bootstrap draws of one vector from its `candidate_items`."""
    doses = np.sort(part["multiplier"].unique())
    grids = {
        name: part.pivot_table(index="item", columns="multiplier", values=name, dropna=False).reindex(index=items, columns=doses).to_numpy(float)
        for name in ("coherence", "rating", "wins", "matches")
    }
    estimates: dict[str, np.ndarray] = {}
    draws: dict[str, np.ndarray] = {}
    there = {
        "coherence_auc": np.isfinite(grids["coherence"]),
        "rating_slope": np.isfinite(grids["rating"]),
        "pairwise_slope": np.nan_to_num(grids["matches"]) > 0,
    }
    gaps = {name: tuple(float(dose) for dose in doses[~cells.any(axis=0)]) for name, cells in there.items()}
    for found, weights in ((estimates, np.ones((1, len(items)))), (draws, counts)):
        with np.errstate(invalid="ignore", divide="ignore"):
            win_rates = (weights @ np.nan_to_num(grids["wins"])) / (weights @ np.nan_to_num(grids["matches"]))
        found["coherence_auc"] = np.trapezoid(weighted_means(grids["coherence"], weights), doses, axis=1)
        found["rating_slope"] = slope(weighted_means(grids["rating"], weights), doses)
        found["pairwise_slope"] = slope(win_rates, doses)
    single = {name: float(values[0]) for name, values in estimates.items()}
    return Candidate(str(part["site"].iloc[0]), int(part["epoch"].iloc[0]), single, draws, part["item"].nunique(), gaps)


def z_scores(values: np.ndarray) -> np.ndarray:
    """z-scores over candidates (first axis) with the population sd; NaN where all candidates are equal."""
    equal = values.max(axis=0) == values.min(axis=0)  # the sd of equal numbers need not round to 0
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(equal, np.nan, (values - values.mean(axis=0)) / values.std(axis=0))


def combined(candidates: Sequence[Candidate], slope_name: str, weight: float, *, of_draws: bool = False) -> np.ndarray:
    """weight z(coherence AUC) + (1 - weight) z(slope), shape (candidates,) or (candidates, draws).

    z-scores are taken over the candidates that have both figures; the others are NaN. A figure that is the same for all of them tells none apart
    and counts zero; NaN where that is so of both, and in a draw that leaves one of them without a figure.
    """
    usable = [place for place, found in enumerate(candidates) if found.has("coherence_auc", slope_name)]
    drawn = (len(candidates[0].draws["coherence_auc"]),) if of_draws else ()
    scores = np.full((len(candidates), *drawn), np.nan)
    if usable:
        mine = [candidates[place] for place in usable]
        scores[usable] = _weighted(mine, slope_name, weight, of_draws)
    return scores


def _weighted(candidates: Sequence[Candidate], slope_name: str, weight: float, of_draws: bool) -> np.ndarray:
    """`combined` of candidates that have both figures."""
    names = ("coherence_auc", slope_name)
    values = np.array([[found.draws[name] if of_draws else found.estimates[name] for found in candidates] for name in names])
    auc, steer = map(z_scores, values)
    complete = np.isfinite(values).all(axis=(0, 1))
    undefined = np.logical_or(~complete, np.logical_and(np.isnan(auc), np.isnan(steer)))
    return np.where(undefined, np.nan, weight * np.nan_to_num(auc) + (1 - weight) * np.nan_to_num(steer))


def pareto_set(points: np.ndarray) -> np.ndarray:
    """Which of the points (candidates, 2) no other weakly dominates: at least as large on both, larger on one."""
    at_least = np.all(points[None, :, :] >= points[:, None, :], axis=-1)
    larger = np.any(points[None, :, :] > points[:, None, :], axis=-1)
    return np.logical_not(np.any(np.logical_and(at_least, larger), axis=1))


def winners(scores: np.ndarray) -> np.ndarray:
    """Share of draws (second axis) that each candidate wins, a tie shared out; a draw without finite scores counts for nobody."""
    usable = scores[:, np.isfinite(scores).all(0)]
    if usable.shape[1] == 0:
        return np.zeros(len(scores))
    best = tied(usable)
    return (best / best.sum(0)).sum(1) / scores.shape[1]


def tied(scores: np.ndarray) -> np.ndarray:
    """Which candidates (first axis) are best up to rounding. Two candidates of which each leads on one figure always tie: z = 1 and -1."""
    return scores >= np.nanmax(scores, axis=0) - 1e-9


def candidates_of(items: pd.DataFrame, draws: int, seed: int) -> list[Candidate]:
    """Every candidate of a study, on the same bootstrap draws.

    Raises:
        StorageError: no candidate at all.
    """
    if items.empty:
        raise StorageError(
            "no candidate: no vector has a rating and a coherence score, by the judge that selects, at the selection doses; "
            "the status of `candidate_items` says what each lacks. Score both rubrics, or import scores of both (`relseek import scores`)"
        )
    names = sorted(items["item"].unique())
    counts = resamples(names, draws, seed)
    return [candidate(part, names, counts) for _, part in items.groupby(["site", "epoch"])]


def deciding_slope(candidates: Sequence[Candidate]) -> str:
    """The pairwise slope where every candidate that has a coherence AUC (every one, where none has) has one, else the rating slope."""
    coherent = [found for found in candidates if found.has("coherence_auc")] or candidates
    return "pairwise_slope" if all(found.has("pairwise_slope") for found in coherent) else "rating_slope"


def selected_shares(candidates: Sequence[Candidate], steer: str, weight: float) -> np.ndarray:
    """Share of bootstrap draws that each candidate wins; none for one without both figures, all for the only one that has them."""
    usable = np.array([found.has("coherence_auc", steer) for found in candidates])
    if usable.sum() <= 1:
        return usable.astype(float)
    shares = np.zeros(len(candidates))
    shares[usable] = winners(combined(candidates, steer, weight, of_draws=True)[usable])
    return shares


def selection(candidates: Sequence[Candidate]) -> pd.DataFrame:
    """The candidates with their figures, scores, Pareto set and the one selected.

    A candidate that lacks coherence or the deciding slope at a dose has no score, belongs to no Pareto set and is not selected.
    """
    steer = deciding_slope(candidates)
    paired = steer == "pairwise_slope"
    rating_scores = combined(candidates, "rating_slope", 0.5)
    scores = combined(candidates, "pairwise_slope", 0.5) if paired else np.full(len(candidates), np.nan)
    deciding = scores if paired else rating_scores
    usable = np.flatnonzero([found.has("coherence_auc", steer) for found in candidates])
    front = np.zeros(len(candidates), dtype=bool)
    front[usable] = pareto_set(
        np.array([[candidates[place].estimates[name] for name in ("coherence_auc", steer)] for place in usable]).reshape(-1, 2)
    )
    shares = selected_shares(candidates, steer, 0.5)
    best = int(usable[0]) if len(usable) == 1 else -1
    reasons = []
    if len(usable) == 1:
        reasons.append("one candidate: there is nothing to take z-scores over")
    elif not np.isfinite(deciding).any():
        reasons.append("all candidates have the same figures: z-scores are undefined")
    else:
        leaders = tied(deciding)
        best = int(np.where(leaders, shares, -1.0).argmax())
        if leaders.sum() > 1:
            reasons.append("tie on the score, broken by the share of bootstrap draws")
    if not paired:
        reasons.append("no pairwise slopes: score and pareto are null, see rating_score")
    rows: list[dict[str, Any]] = []
    for place, found in enumerate(candidates):
        lacking = [found.lacks(metric) for metric in ("coherence_auc", steer) if not found.has(metric)]
        row: dict[str, Any] = {"site": found.site, "epoch": found.epoch}
        for metric in METRICS:
            estimate = found.estimates[metric]
            finite = found.draws[metric][np.isfinite(found.draws[metric])]
            low, high = np.percentile(finite, [2.5, 97.5]) if len(finite) and np.isfinite(estimate) else (np.nan, np.nan)
            row |= {metric: estimate, f"{metric}_lower": low, f"{metric}_upper": high}
        row |= {
            "score": scores[place],
            "rating_score": rating_scores[place],
            "pareto": bool(front[place]) if paired and not lacking else None,
            "selected": place == best,
            "selected_share": float(shares[place]),
            "candidates": len(usable),
            "n": found.n,
            "reason": f"{'; '.join(lacking)}: not a candidate" if lacking else "; ".join(reasons),
        }
        rows.append(row)
    return pd.DataFrame(rows, columns=list(SELECTION.names))


def sensitivity(candidates: Sequence[Candidate]) -> pd.DataFrame:
    """Who is best at each weight on coherence, and in which share of bootstrap draws; nobody where no candidate has both figures."""
    steer = deciding_slope(candidates)
    usable = [place for place, found in enumerate(candidates) if found.has("coherence_auc", steer)]
    rows = []
    for weight in WEIGHTS:
        scores = combined(candidates, steer, weight)
        shares = selected_shares(candidates, steer, weight)
        best = usable[0] if len(usable) == 1 else int(np.nanargmax(scores)) if np.isfinite(scores).any() else -1
        for place, found in enumerate(candidates):
            keys = {"weight": weight, "site": found.site, "epoch": found.epoch}
            rows.append({**keys, "score": scores[place], "best": place == best, "share": float(shares[place])})
    return pd.DataFrame(rows, columns=list(SELECTION_SENSITIVITY.names))
