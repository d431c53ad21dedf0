"""Whether judges of the same replies agree: kappa, alpha, correlations, Bland and Altman's limits; and a judge with itself at two dates.

Here belong comparisons of two judges that take neither for the truth. What is known beside the scores, such as which reply was shown first, how
long it was or what people said of it, belongs in `validity.py`.

Two judges are compared on the rows that both scored: the same site, epoch, dose, item and rubric. A judge that was asked at two dates is two
judges, `NAME` and `NAME@DATE`, and their comparison is the drift. Differences are always the second judge minus the first, in the order of names, so
that of two dates it is the later minus the earlier. Intervals resample items.

All but rank measures are functions of sums over rows (n, a, b, a², b², ab), kept by item: a draw of items is a weighted sum of them, and vectors
are pooled by adding them. Krippendorff's ordinal metric is the squared difference of midranks: his ordinal alpha is the interval alpha of midranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd

from relseek_assets.judging.rankings import BOOTSTRAP, EPOCH, METHOD, SITE, STATUS, draws_of_items, interval
from relseek_resources.storage import Column, TableSchema

CELL = ["site", "epoch", "multiplier", "item", "rubric"]
ALL = "all"  # in the place of both judges: a measure over every judge of the rubric
MEASURED, APART, UNDEFINED = "measured", "no rows in common", "undefined: a judge gave every row the same score"
LIMITS = 1.96  # Bland and Altman 1986: 95% of differences lie within, if they are normal
RANKED_AT_ONCE = 100  # draws whose ranks are held together: 21 doses of 245 items are 4 MB a hundred draws
SUMS = ("n", "a", "b", "aa", "bb", "ab")
ROUNDED = tuple(f"rounded_{name}" for name in SUMS[1:])
MEASURES = {
    "weighted_kappa": "Cohen's kappa with quadratic weights, of scores rounded to the nearest integer, halves up",
    "alpha_interval": "Krippendorff's alpha, interval metric",
    "alpha_ordinal": "Krippendorff's alpha, ordinal metric",
    "pearson": "product-moment correlation",
    "spearman": "rank correlation",
    "pearson_within_doses": "product-moment correlation of deviations from each judge's mean at the dose",
    "bias": "mean difference, second judge minus first",
    "limit_low": "bias less 1.96 standard deviations of the differences",
    "limit_high": "bias and 1.96 standard deviations of the differences",
    "difference_slope": "least-squares slope of the difference on the mean of the two",
    "share_unchanged": "share of rows to which both gave the same score",
}

JUDGES = (
    Column("rubric", "string", "what was rated"),
    Column("judge_a", "string", "who rated, first by name; `all` where a measure is over all judges"),
    Column("judge_b", "string", "who rated, second by name; `all` where a measure is over all judges"),
)
ESTIMATE = (
    Column("comparison", "string", "`judges`, or `dates` of one judge: its drift", choices=("judges", "dates")),
    Column("measure", "string", "; ".join(f"{name}: {meaning}" for name, meaning in MEASURES.items()), choices=tuple(MEASURES)),
    Column("estimate", "number", "the measure; differences in points of the scale", nullable=True),
    Column("lower", "number", "95% interval", nullable=True),
    Column("upper", "number", "95% interval", nullable=True),
    Column("n", "integer", "rows that both scored; over all judges, rows that at least two did", low=0),
    Column("items", "integer", "items that they are of", low=0),
    METHOD,
    STATUS,
)

JUDGE_AGREEMENT = TableSchema("judge_agreement", (SITE, EPOCH, *JUDGES, *ESTIMATE), key=("site", "epoch", "rubric", "judge_a", "judge_b", "measure"))

STUDY_AGREEMENT = TableSchema("study_agreement", (*JUDGES, *ESTIMATE), key=("rubric", "judge_a", "judge_b", "measure"))

AGREEMENT_SUMS = TableSchema(
    "agreement_sums",
    (
        *JUDGES,
        Column("item", "string", "held-out conversation"),
        Column("n", "integer", "rows that both scored", low=1),
        *(Column(name, "number", f"sum of {meaning}") for name, meaning in zip(SUMS[1:], ("a", "b", "a²", "b²", "ab"), strict=True)),
        *(Column(name, "number", f"the same of rounded scores: {name.removeprefix('rounded_')}") for name in ROUNDED),
        Column("unchanged", "number", "rows to which both gave the same score", low=0),
    ),
    key=("rubric", "judge_a", "judge_b", "item"),
)


def rounded(scores: np.ndarray) -> np.ndarray:
    """Scores as kappa takes them: the nearest integer, halves up. Kappa is of categories; a real-valued judge has as many as rows."""
    return np.floor(scores + 0.5)


def comparison(first: str, second: str) -> str:
    """`dates` where two names are one judge's at two dates (`NAME`, `NAME@DATE`), else `judges`."""
    return "dates" if first.partition("@")[0] == second.partition("@")[0] else "judges"


def rated_by_both(scores: pd.DataFrame, first: str, second: str) -> pd.DataFrame:
    """The rows of `judge_scores` of one rubric that both judges scored: CELL, `a` and `b`."""
    sides = [scores.loc[(scores["judge"] == judge) & scores["score"].notna(), [*CELL, "score"]] for judge in (first, second)]
    return sides[0].rename(columns={"score": "a"}).merge(sides[1].rename(columns={"score": "b"}), on=CELL).sort_values(CELL, ignore_index=True)


def pairs_of_judges(scores: pd.DataFrame) -> list[tuple[str, str, str]]:
    """(rubric, first, second) for every two judges that scored replies on the same rubric."""
    judges = scores[scores["score"].notna()].groupby("rubric")["judge"].unique()
    return [(str(rubric), first, second) for rubric, names in judges.items() for first, second in combinations(sorted(names), 2)]


# --- measures from sums -----------------------------------------------------------------------------------------------


def sums(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """SUMS of each row, (rows, 6)."""
    return np.stack([np.ones_like(a), a, b, a * a, b * b, a * b], axis=-1)


def _moments(found: np.ndarray) -> tuple[np.ndarray, ...]:
    """n, means of a and b, population variances and covariance from sums (..., 6)."""
    n, a, b, aa, bb, ab = np.moveaxis(found, -1, 0)
    return n, a / n, b / n, _settled(aa / n, (a / n) ** 2), _settled(bb / n, (b / n) ** 2), _settled(ab / n, a * b / n**2)


def _settled(mean: np.ndarray, square: np.ndarray) -> np.ndarray:
    """mean - square, and 0 where that is rounding alone."""
    difference = mean - square
    return np.where(np.abs(difference) <= 1e-12 * np.maximum(np.abs(mean), np.abs(square)), 0.0, difference)


def pearson(found: np.ndarray) -> np.ndarray:
    _, _, _, var_a, var_b, cov = _moments(found)
    with np.errstate(invalid="ignore", divide="ignore"):
        return cov / np.sqrt(var_a * var_b)


def weighted_kappa(found: np.ndarray) -> np.ndarray:
    """Cohen's kappa with quadratic weights (Cohen 1968): 1 - E(a - b)² / E(a - b')², where b' is of another row."""
    _, mean_a, mean_b, var_a, var_b, cov = _moments(found)
    gap = (mean_a - mean_b) ** 2
    with np.errstate(invalid="ignore", divide="ignore"):
        return 1 - (var_a + var_b - 2 * cov + gap) / (var_a + var_b + gap)


def alpha_of_two(found: np.ndarray) -> np.ndarray:
    """Krippendorff's interval alpha of two judges without missing scores."""
    n, mean_a, mean_b, var_a, var_b, cov = _moments(found)
    observed = var_a + var_b - 2 * cov + (mean_a - mean_b) ** 2
    values = 2 * n
    pooled = (var_a + var_b) / 2 + (mean_a - mean_b) ** 2 / 4
    with np.errstate(invalid="ignore", divide="ignore"):
        return 1 - observed / (2 * pooled * values / (values - 1))


def bland_altman(found: np.ndarray) -> dict[str, np.ndarray]:
    """Bias, limits of agreement and slope of the difference b - a on the mean of the two (Bland and Altman 1986, 1999)."""
    n, mean_a, mean_b, var_a, var_b, cov = _moments(found)
    with np.errstate(invalid="ignore", divide="ignore"):
        sd = np.sqrt(np.maximum(var_a + var_b - 2 * cov, 0.0) * n / (n - 1))
        slope = (var_b - var_a) / 2 / ((var_a + var_b + 2 * cov) / 4)
    bias = mean_b - mean_a
    return {"bias": bias, "limit_low": bias - LIMITS * sd, "limit_high": bias + LIMITS * sd, "difference_slope": slope}


def of_sums(plain: np.ndarray, whole: np.ndarray, unchanged: np.ndarray) -> dict[str, np.ndarray]:
    """Every measure that sums (..., 6) of scores, sums of rounded scores and counts of equal ones (...) suffice for."""
    return {
        "weighted_kappa": weighted_kappa(whole),
        "alpha_interval": alpha_of_two(plain),
        "pearson": pearson(plain),
        **bland_altman(plain),
        "share_unchanged": unchanged / plain[..., 0],
    }


def within_doses(a: np.ndarray, b: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Correlation of deviations from each dose's mean under weights (draws, items); a, b (items, doses), NaN where either is missing."""
    there = ~(np.isnan(a) | np.isnan(b))
    parts = np.where(there[..., None], sums(np.nan_to_num(a), np.nan_to_num(b)), 0.0)
    total = np.tensordot(weights, parts, 1)  # (draws, doses, 6)
    n, sum_a, sum_b, aa, bb, ab = np.moveaxis(total, -1, 0)
    with np.errstate(invalid="ignore", divide="ignore"):
        spread = [np.nansum(square - one * two / n, axis=1) for square, one, two in ((aa, sum_a, sum_a), (bb, sum_b, sum_b), (ab, sum_a, sum_b))]
        return spread[2] / np.sqrt(spread[0] * spread[1])


# --- measures from ranks ----------------------------------------------------------------------------------------------


def midranks(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Midranks of values (rows,) where each counts weights (draws, rows) times, (draws, rows)."""
    _, place = np.unique(values, return_inverse=True)
    order = np.argsort(place, kind="stable")
    starts = np.flatnonzero(np.diff(place[order], prepend=-1))
    counts = np.add.reduceat(weights[:, order], starts, axis=1)
    return (np.cumsum(counts, axis=1) - counts / 2)[:, place]


def of_ranks(a: np.ndarray, b: np.ndarray, weights: np.ndarray) -> dict[str, np.ndarray]:
    """Spearman's rank correlation and Krippendorff's ordinal alpha under weights (draws, rows)."""
    spearman, alpha = np.empty(len(weights)), np.empty(len(weights))
    for start in range(0, len(weights), RANKED_AT_ONCE):
        part = slice(start, start + RANKED_AT_ONCE)
        some = weights[part]
        spearman[part] = pearson(_weighted_sums(midranks(a, some), midranks(b, some), some))
        pooled = midranks(np.concatenate([a, b]), np.concatenate([some, some], axis=1))
        alpha[part] = alpha_of_two(_weighted_sums(pooled[:, : len(a)], pooled[:, len(a) :], some))
    return {"spearman": spearman, "alpha_ordinal": alpha}


def _weighted_sums(a: np.ndarray, b: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Sums (draws, 6) of a, b (draws, rows), taken from their middle so that squares of ranks lose no digits."""
    middle = (a.max() + a.min()) / 2
    return np.einsum("dr,drs->ds", weights, sums(a - middle, b - middle))


def krippendorff_alpha(scores: np.ndarray, metric: str, weights: np.ndarray | None = None) -> np.ndarray:
    """Krippendorff's alpha of any number of judges with missing scores (Krippendorff 2019, chapter 12).

    Args:
        scores: (judges, rows), NaN where a judge gave none; rows with fewer than two scores are left out.
        metric: `interval` or `ordinal`.
        weights: (draws, rows), how often each row counts; once unless given.
    """
    scores = scores[:, (~np.isnan(scores)).sum(0) >= 2]
    if weights is None:
        weights = np.ones((1, scores.shape[1]))
    there = ~np.isnan(scores)
    judged = there.sum(0)
    found = np.empty(len(weights))
    for draw, counts in enumerate(weights):
        values = np.nan_to_num(scores)
        if metric == "ordinal":
            values[there] = midranks(scores[there], np.broadcast_to(counts, scores.shape)[there][None])[0]
        values = np.where(there, values - values[there].mean(), 0.0) if there.any() else values
        total, squares = values.sum(0), (values**2).sum(0)
        n = counts @ judged
        observed = counts @ (2 * (judged * squares - total**2) / (judged - 1)) / n
        expected = 2 * (n * (counts @ squares) - (counts @ total) ** 2) / (n * (n - 1))
        found[draw] = 1 - observed / expected if expected > 0 else np.nan
    return found


# --- tables -----------------------------------------------------------------------------------------------------------


def judge_agreement(scores: pd.DataFrame, draws: int, seed: int) -> pd.DataFrame:
    """JUDGE_AGREEMENT of one vector's `judge_scores`; no rows where no rubric has two judges."""
    rows: list[dict[str, Any]] = []
    for rubric, part in scores.groupby("rubric"):
        pairs = pairs_of_judges(part)
        for _, first, second in pairs:
            keys = {"rubric": rubric, "judge_a": first, "judge_b": second, "comparison": comparison(first, second)}
            rows += [{**keys, **row} for row in _of_two(rated_by_both(part, first, second), draws, seed)]
        if len({name for _, *names in pairs for name in names}) > 2:
            keys = {"rubric": rubric, "judge_a": ALL, "judge_b": ALL, "comparison": "judges"}
            rows += [{**keys, **row} for row in _of_all(part, draws, seed)]
    found = pd.DataFrame(rows, columns=[name for name in JUDGE_AGREEMENT.names if name not in ("site", "epoch")])
    return found.assign(site=scores["site"].iloc[0], epoch=scores["epoch"].iloc[0])[list(JUDGE_AGREEMENT.names)]


def _of_two(both: pd.DataFrame, draws: int, seed: int) -> list[dict[str, Any]]:
    if both.empty:
        nothing = {"estimate": None, "lower": None, "upper": None, "n": 0, "items": 0, "method": "none", "status": APART}
        return [{"measure": measure, **nothing} for measure in MEASURES]
    items, owner = np.unique(both["item"].to_numpy(object).astype(str), return_inverse=True)
    a, b = both["a"].to_numpy(float), both["b"].to_numpy(float)
    weights = np.concatenate([np.ones((1, len(items))), draws_of_items(list(items), draws, seed)])
    grid_a, grid_b = (both.pivot_table(index="item", columns="multiplier", values=side).reindex(items).to_numpy(float) for side in "ab")
    found = {
        **of_sums(*(weights @ _by_item(values, owner, len(items)) for values in (sums(a, b), sums(rounded(a), rounded(b)), (a == b).astype(float)))),
        **of_ranks(a, b, weights[:, owner]),
        "pearson_within_doses": within_doses(grid_a, grid_b, weights),
    }
    return _measured(found, len(both), len(items), draws)


def _by_item(values: np.ndarray, owner: np.ndarray, items: int) -> np.ndarray:
    found = np.zeros((items, *values.shape[1:]))
    np.add.at(found, owner, values)
    return found


def _of_all(part: pd.DataFrame, draws: int, seed: int) -> list[dict[str, Any]]:
    """Alpha over every judge of a rubric, on rows that at least two of them scored."""
    wide = part.pivot_table(index=CELL[:-1], columns="judge", values="score")
    wide = wide[wide.notna().sum(axis=1) >= 2]
    items, owner = np.unique(wide.index.get_level_values("item").to_numpy(object).astype(str), return_inverse=True)
    weights = np.concatenate([np.ones((1, len(items))), draws_of_items(list(items), draws, seed)])[:, owner]
    found = {f"alpha_{metric}": krippendorff_alpha(wide.to_numpy(float).T, metric, weights) for metric in ("interval", "ordinal")}
    return _measured(found, len(wide), len(items), draws)


def _measured(found: dict[str, np.ndarray], n: int, items: int, draws: int) -> list[dict[str, Any]]:
    """Rows of measures: the first entry of each is the estimate, the others are draws."""
    rows = []
    for measure in MEASURES:
        if measure in found:
            value, (low, high) = float(found[measure][0]), interval(found[measure][1:])
            there = np.isfinite(value)
            ends = {"lower": low if there else None, "upper": high if there else None}
            counts = {"n": n, "items": items, "method": BOOTSTRAP.format(draws=draws), "status": MEASURED if there else UNDEFINED}
            rows.append({"measure": measure, "estimate": value if there else None, **ends, **counts})
    return rows


def agreement_sums(scores: pd.DataFrame) -> pd.DataFrame:
    """AGREEMENT_SUMS of one vector's `judge_scores`."""
    found = []
    for rubric, first, second in pairs_of_judges(scores):
        both = rated_by_both(scores[scores["rubric"] == rubric], first, second)
        a, b = both["a"].to_numpy(float), both["b"].to_numpy(float)
        columns = np.column_stack([sums(a, b), sums(rounded(a), rounded(b))[:, 1:], a == b])
        rows = pd.DataFrame(columns, columns=[*SUMS, *ROUNDED, "unchanged"])
        found.append(rows.assign(rubric=rubric, judge_a=first, judge_b=second, item=both["item"]))
    return pooled(found)


def pooled(parts: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """AGREEMENT_SUMS of several vectors added up."""
    keys = list(AGREEMENT_SUMS.key)
    there = [part for part in parts if len(part)]
    if not there:
        return pd.DataFrame({name: pd.Series(dtype=object) for name in AGREEMENT_SUMS.names})
    found = pd.concat(there).groupby(keys, as_index=False).sum()
    return found.astype({"n": int})[list(AGREEMENT_SUMS.names)]


def study_agreement(parts: pd.DataFrame, draws: int, seed: int) -> pd.DataFrame:
    """STUDY_AGREEMENT from AGREEMENT_SUMS of all vectors: the measures that sums suffice for. An item is the same in all vectors and drawn once."""
    rows: list[dict[str, Any]] = []
    for (rubric, first, second), part in parts.groupby(["rubric", "judge_a", "judge_b"]):
        weights = np.concatenate([np.ones((1, len(part))), draws_of_items(list(part["item"]), draws, seed)])
        plain, whole = part[list(SUMS)].to_numpy(float), part[["n", *ROUNDED]].to_numpy(float)
        found = of_sums(weights @ plain, weights @ whole, weights @ part["unchanged"].to_numpy(float))
        keys = {"rubric": rubric, "judge_a": first, "judge_b": second, "comparison": comparison(first, second)}
        rows += [{**keys, **row} for row in _measured(found, int(part["n"].sum()), len(part), draws)]
    return pd.DataFrame(rows, columns=list(STUDY_AGREEMENT.names))
