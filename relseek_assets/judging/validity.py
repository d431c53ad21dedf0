"""What a judge's answers hold besides the disposition, and what is left of its dose-response against a reference.

Here belong biases that need something known beside the answers (which reply was shown first, how long it was, who wrote it) and corrections by a
reference judge, such as people whose ratings were imported. Comparisons that take no judge for the truth belong in `agreement.py`.

Every standard error is a sandwich clustered by item, with the factor g / (g - 1) over g items and a t quantile of g - 1 degrees of freedom.

A correction is prediction-powered inference (Angelopoulos, Bates, Fannjiang, Jordan and Zrnic 2023): the judge's estimate on rows without a
reference score, and the reference's less the judge's on rows with one. PPI++ (Angelopoulos, Duchi and Zrnic 2023) weighs the judge by what it is
worth. Both rest on one assumption: that the items with reference scores are a random part of all items. Nothing is assumed of the judge.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from scipy.special import expit
from scipy.stats import t as student

from relseek_assets.judging.agreement import CELL
from relseek_assets.judging.rankings import EPOCH, METHOD, SITE, STATUS, outcomes
from relseek_resources.storage import Column, TableSchema

LEVEL = 0.975
STEPS = 200
LARGEST_STEP = 4.0  # in the linear predictor's units at the largest row; without a bound Newton's first steps can overshoot
SEPARATED = 15.0  # a linear predictor that far out means probabilities that differ from 0 or 1 by 3e-7: the estimate is on its way to infinity
CLUSTERED = "{model}, clustered by item"
MEASURED = "measured"
NO_ORDER = "not measurable: this judge is shown no order"
NO_LENGTHS = "lengths unknown: the study has no replies"
TOO_FEW = "too few items: an interval needs two"

BIASES = {
    "share_first": "share of decided pairs in which the reply shown first won; 0.5 without a bias",
    "first_log_odds": "log-odds that the reply shown first wins, given both doses (Davidson and Beaver 1977)",
    "log_odds_per_doubling": "log-odds of winning for twice the words, given both doses",
    "points_per_doubling": "points of the scale for twice the words, within doses",
    "points_per_doubling_beyond_reference": "the same of the score less the reference's: the part that the reference does not share",
}

JUDGE_BIASES = TableSchema(
    "judge_biases",
    (
        SITE,
        EPOCH,
        Column("judge", "string", "who rated or compared"),
        Column("rubric", "string", "what was rated; `pairs` for comparisons"),
        Column("bias", "string", "what the answer should not depend on", choices=("position", "length")),
        Column("measure", "string", "; ".join(f"{name}: {meaning}" for name, meaning in BIASES.items()), choices=tuple(BIASES)),
        Column("estimate", "number", "the measure", nullable=True),
        Column("lower", "number", "95% interval", nullable=True),
        Column("upper", "number", "95% interval", nullable=True),
        Column("se", "number", "standard error, clustered by item; of share_first on the scale of log-odds", nullable=True, low=0),
        Column("n", "integer", "pairs or ratings", low=0),
        Column("items", "integer", "items that they are of", low=0),
        METHOD,
        STATUS,
    ),
    key=("site", "epoch", "judge", "rubric", "measure"),
)

SELF_PREFERENCE = TableSchema(
    "self_preference",
    (
        Column("judge", "string", "who compared"),
        Column("family", "string", "the judge's family"),
        Column(
            "measure",
            "string",
            "own_share: share won by the judge's own family; beyond_other_judges: that less the share that judges of other families give it on the "
            "same comparisons; at_equal_quality: log-odds that it wins where an independent quality is equal",
            choices=("own_share", "beyond_other_judges", "at_equal_quality"),
        ),
        Column("estimate", "number", "the measure", nullable=True),
        Column("lower", "number", "95% interval", nullable=True),
        Column("upper", "number", "95% interval", nullable=True),
        Column("se", "number", "standard error, clustered by item", nullable=True, low=0),
        Column("n", "integer", "comparisons", low=0),
        Column("items", "integer", "items that they are of", low=0),
        METHOD,
        STATUS,
    ),
    key=("judge", "measure"),
)

CORRECTED_DOSE_RESPONSE = TableSchema(
    "corrected_dose_response",
    (
        SITE,
        EPOCH,
        Column("rubric", "string", "what was rated"),
        Column("judge", "string", "who rated all rows"),
        Column("reference", "string", "whose scores are taken for the truth; empty where the study names nobody"),
        Column(
            "quantity",
            "string",
            "mean score at a dose, least-squares slope of the means by dose, or the share of the judge's slope that is the judge's own",
            choices=("mean", "slope", "judge_share"),
        ),
        Column("multiplier", "number", "dose λ; null for what is over doses", nullable=True),
        Column(
            "estimator",
            "string",
            "judge: its scores alone; reference: its scores alone; rectifier: reference less judge; ppi and ppi++: the judge corrected",
            choices=("judge", "reference", "rectifier", "ppi", "ppi++"),
        ),
        Column("estimate", "number", "points of the scale, per λ of a slope; a share", nullable=True),
        Column("lower", "number", "95% interval", nullable=True),
        Column("upper", "number", "95% interval", nullable=True),
        Column("se", "number", "standard error, clustered by item", nullable=True, low=0),
        Column("df", "number", "degrees of freedom of the interval", nullable=True, low=1),
        Column("weight", "number", "on the judge's scores: 1 of ppi, tuned of ppi++", nullable=True, low=0, high=1),
        Column("n", "integer", "rows that the estimate is of; a dose in the middle of a slope has no part in it", low=0),
        Column("unlabelled", "integer", "further rows of the judge without a reference score", low=0),
        METHOD,
        STATUS,
    ),
    key=("site", "epoch", "rubric", "judge", "quantity", "multiplier", "estimator"),
)


# --- regressions clustered by item ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Regression:
    """Coefficients (p,) with their clustered covariance (p, p), from `n` rows in `clusters`; `model` says how they were had."""

    coefficients: np.ndarray
    covariance: np.ndarray
    n: int
    clusters: int
    model: str

    def row(self, place: int = 0) -> dict[str, Any]:
        """Estimate, 95% interval and standard error of one coefficient, as columns of a table."""
        estimate = float(self.coefficients[place])
        se = max(float(self.covariance[place, place]), 0.0) ** 0.5  # of a perfect fit it is 0 up to rounding, to either side
        counts = {"n": self.n, "items": self.clusters, "method": CLUSTERED.format(model=self.model)}
        if self.clusters < 2:
            return {"estimate": estimate, "lower": None, "upper": None, "se": None, **counts, "status": TOO_FEW}
        half = float(student.ppf(LEVEL, self.clusters - 1)) * se
        return {"estimate": estimate, "lower": estimate - half, "upper": estimate + half, "se": se, **counts, "status": MEASURED}


def least_squares(outcome: np.ndarray, design: np.ndarray, clusters: np.ndarray) -> Regression:
    """Least squares of outcome (n,) on design (n, p); columns that others explain get the shortest solution."""
    bread = np.linalg.pinv(design.T @ design)
    coefficients = bread @ design.T @ outcome
    residuals = outcome - design @ coefficients
    return Regression(coefficients, *_sandwich(bread, design * residuals[:, None], clusters), "least squares")


def logit(outcome: np.ndarray, design: np.ndarray, clusters: np.ndarray) -> Regression:
    """Logistic regression of outcome (n,) in 0, 1 on design (n, p), by maximum likelihood; by Firth's (1993) penalised likelihood where that has no
    maximum, because some doses won every pair, say. Columns that others explain get the shortest solution."""
    for penalised in (False, True):
        found = _scores(outcome, design, penalised)
        if found is not None:
            coefficients, bread, scores = found
            return Regression(coefficients, *_sandwich(bread, scores, clusters), f"logit{', Firth' if penalised else ''}")
    raise ArithmeticError(f"a logit of {len(outcome)} rows did not settle in {STEPS} steps")


def _scores(outcome: np.ndarray, design: np.ndarray, penalised: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """Coefficients, inverse information and scores (n, p) by Newton's method; None where it runs away."""
    coefficients = np.zeros(design.shape[1])
    for _ in range(STEPS):
        predictor = design @ coefficients
        if not penalised and np.abs(predictor).max(initial=0.0) > SEPARATED:
            return None
        shares = expit(predictor)
        weights = shares * (1 - shares)
        bread = np.linalg.pinv(design.T @ (design * weights[:, None]), hermitian=True)
        leverage = weights * np.einsum("np,pq,nq->n", design, bread, design) if penalised else 0.0
        scores = design * (outcome - shares + leverage * (0.5 - shares))[:, None]
        step = bread @ scores.sum(0)
        reach = float(np.abs(design @ step).max(initial=0.0))
        coefficients = coefficients + step * min(1.0, LARGEST_STEP / reach if reach else 1.0)
        if reach < 1e-9:
            return coefficients, bread, scores
    return None


def _sandwich(bread: np.ndarray, scores: np.ndarray, clusters: np.ndarray) -> tuple[np.ndarray, int, int]:
    """Covariance clustered by `clusters`, how many rows, and how many clusters."""
    _, place = np.unique(np.asarray(clusters, dtype=object).astype(str), return_inverse=True)
    count = int(place.max(initial=-1)) + 1
    summed = np.zeros((count, scores.shape[1]))
    np.add.at(summed, place, scores)
    meat = summed.T @ summed * (count / (count - 1) if count > 1 else np.nan)
    return bread @ meat @ bread, len(scores), count


def _contrasts(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """1 at the first dose and -1 at the second, (n, doses)."""
    doses = np.unique(np.concatenate([first, second]))
    return (first[:, None] == doses).astype(float) - (second[:, None] == doses)


# --- position and length ----------------------------------------------------------------------------------------------


def position_bias(pairs: pd.DataFrame) -> dict[str, dict[str, Any]]:
    """share_first and first_log_odds of one judge's `judge_pairs`; ties and what nobody won are left out."""
    shown = pairs[pairs["first_shown"].notna() & pairs["winner"].notna() & (pairs["status"] == "judged")]
    if shown.empty:
        status = NO_ORDER if pairs["first_shown"].isna().all() else "no decided pairs"
        return {measure: nothing(status) for measure in ("share_first", "first_log_odds")}
    won = (shown["winner"] == shown["first_shown"]).to_numpy(float)
    first, second = (shown["multiplier_a"].where(shown["first_shown"] == side, shown["multiplier_b"]).to_numpy(float) for side in "ab")
    items, ones = shown["item"].to_numpy(), np.ones((len(shown), 1))
    share = logit(won, ones, items).row()
    share |= {end: None if share[end] is None else float(expit(share[end])) for end in ("lower", "upper")}
    return {
        "share_first": {**share, "estimate": float(won.mean())},
        "first_log_odds": logit(won, np.hstack([ones, _contrasts(first, second)]), items).row(),
    }


def length_bias_of_pairs(pairs: pd.DataFrame, lengths: pd.DataFrame) -> dict[str, Any]:
    """log_odds_per_doubling of one judge's `judge_pairs`; `lengths` as `words_of` gives them."""
    decided = pairs[pairs["winner"].notna() & (pairs["status"] == "judged")]
    keys = ["site", "epoch", "item"]
    for side in "ab":
        mine = lengths.rename(columns={"multiplier": f"multiplier_{side}", "words": f"words_{side}"})
        decided = decided.merge(mine, on=[*keys, f"multiplier_{side}"])
    decided = decided[(decided["words_a"] > 0) & (decided["words_b"] > 0)]
    if decided.empty:
        return nothing("no decided pairs of replies with words")
    longer = np.log2(decided["words_a"].to_numpy(float) / decided["words_b"].to_numpy(float))
    if not longer.any():
        return nothing("undefined: both replies of every pair have the same length")
    won = (outcomes(decided) == 1.0).astype(float)
    design = np.column_stack([longer, _contrasts(decided["multiplier_a"].to_numpy(float), decided["multiplier_b"].to_numpy(float))])
    return logit(won, design, decided["item"].to_numpy()).row()


def length_bias_of_ratings(scores: pd.DataFrame, lengths: pd.DataFrame, against: pd.DataFrame | None = None) -> dict[str, Any]:
    """points_per_doubling of one judge's `judge_scores` on one rubric, or of their difference from the reference's scores `against`."""
    rated = scores.loc[scores["score"].notna(), [*CELL, "score"]].merge(lengths, on=CELL[:-1])
    rated = rated[rated["words"] > 0]
    if against is not None:
        true = against.loc[against["score"].notna(), [*CELL, "score"]].rename(columns={"score": "true"})
        rated = rated.merge(true, on=CELL)
        rated = rated.assign(score=rated["score"] - rated["true"])
    if rated.empty:
        return nothing("no scored replies with words" if against is None else "no replies that the reference scored too")
    doses = rated["multiplier"].to_numpy(float)
    longer = np.log2(rated["words"].to_numpy(float))
    within = longer - pd.Series(longer).groupby(doses).transform("mean").to_numpy()
    if np.abs(within).max() < 1e-12:
        return nothing("undefined: all replies of a dose have the same length")
    design = np.column_stack([longer, doses[:, None] == np.unique(doses)])
    return least_squares(rated["score"].to_numpy(float), design, rated["item"].to_numpy()).row()


def words_of(replies: pd.DataFrame) -> pd.DataFrame:
    """site, epoch, multiplier, item and words, of `generations`."""
    return replies[CELL[:-1]].assign(words=replies["reply"].str.split().str.len())


def nothing(status: str) -> dict[str, Any]:
    return {"estimate": None, "lower": None, "upper": None, "se": None, "n": 0, "items": 0, "method": "none", "status": status}


def judge_biases(scores: pd.DataFrame, pairs: pd.DataFrame | None, lengths: pd.DataFrame | None, reference: str = "") -> pd.DataFrame:
    """JUDGE_BIASES of one vector.

    Args:
        scores: `judge_scores`.
        pairs: `judge_pairs`; None where the study has none.
        lengths: of `words_of`; None where the study has no replies.
        reference: the judge whose scores are taken for the truth; empty for none.
    """
    rows: list[dict[str, Any]] = []
    for judge, part in pairs.groupby("judge") if pairs is not None else ():
        keys = {"judge": judge, "rubric": "pairs"}
        rows += [{**keys, "bias": "position", "measure": measure, **found} for measure, found in position_bias(part).items()]
        found = nothing(NO_LENGTHS) if lengths is None else length_bias_of_pairs(part, lengths)
        rows.append({**keys, "bias": "length", "measure": "log_odds_per_doubling", **found})
    for (judge, rubric), part in scores.groupby(["judge", "rubric"]):
        true = scores[(scores["judge"] == reference) & (scores["rubric"] == rubric)]
        asked: dict[str, pd.DataFrame | None] = {"points_per_doubling": None}
        if len(true) and judge != reference:
            asked["points_per_doubling_beyond_reference"] = true
        for measure, against in asked.items():
            found = nothing(NO_LENGTHS) if lengths is None else length_bias_of_ratings(part, lengths, against)
            rows.append({"judge": judge, "rubric": rubric, "bias": "length", "measure": measure, **found})
    frame = pd.DataFrame(rows, columns=[name for name in JUDGE_BIASES.names if name not in ("site", "epoch")])
    return frame.assign(site=scores["site"].iloc[0], epoch=scores["epoch"].iloc[0])[list(JUDGE_BIASES.names)]


# --- self-preference --------------------------------------------------------------------------------------------------


def self_preference(
    rows: pd.DataFrame, judges: Mapping[str, str], authors: Mapping[str, str], match: Sequence[str] = ("item", "author_a", "author_b")
) -> pd.DataFrame:
    """SELF_PREFERENCE of head-to-head judgements, by every judge that shares a family with an author; no rows where none does.

    Whether a judge favours its own family or the family is better, its own answers do not tell. Two comparisons do: with judges of other
    families on the same replies, and at equal quality by somebody else's measure.

    Args:
        rows: item, judge, author_a, author_b, winner (`a`, `b`, or null where nobody won), the columns of `match`, and where an independent quality
            is known, quality_a and quality_b.
        judges: judge -> family. One that is not there has none, and counts as of another family than everybody.
        authors: author -> family, likewise.
        match: what makes two judges' rows the same comparison.
    """
    decided = rows[rows["winner"].notna()]
    sides = {side: decided[f"author_{side}"].map(authors) for side in "ab"}
    shared = set(authors.values())
    found: list[dict[str, Any]] = []
    for judge in sorted(rows["judge"].unique()):
        family = judges.get(judge)
        if not family or family not in shared:
            continue
        own = {side: sides[side] == family for side in "ab"}
        concerned = decided[own["a"] ^ own["b"]].assign(own=np.where(own["a"], "a", "b")[(own["a"] ^ own["b"]).to_numpy()])
        concerned = concerned.assign(won=(concerned["winner"] == concerned["own"]).astype(float))
        mine, others = concerned[concerned["judge"] == judge], concerned[concerned["judge"].map(judges) != family]
        measured = {
            "own_share": _mean(mine["won"], mine["item"], "the judge compared nobody of its own family with others"),
            "beyond_other_judges": _beyond(mine, others, list(match)),
            "at_equal_quality": _at_equal_quality(mine),
        }
        found += [{"judge": judge, "family": family, "measure": measure, **row} for measure, row in measured.items()]
    return pd.DataFrame(found, columns=list(SELF_PREFERENCE.names))


def _mean(values: pd.Series, items: pd.Series, lacking: str) -> dict[str, Any]:
    return least_squares(values.to_numpy(float), np.ones((len(values), 1)), items.to_numpy()).row() if len(values) else nothing(lacking)


def _beyond(mine: pd.DataFrame, others: pd.DataFrame, match: list[str]) -> dict[str, Any]:
    same = mine.merge(others.groupby(match, as_index=False)["won"].mean().rename(columns={"won": "elsewhere"}), on=match)
    return _mean(same["won"] - same["elsewhere"], same["item"], "no judge of another family made the same comparisons")


def _at_equal_quality(mine: pd.DataFrame) -> dict[str, Any]:
    if not {"quality_a", "quality_b"} <= set(mine.columns):
        return nothing("no independent quality")
    gap = (mine["quality_a"] - mine["quality_b"]).where(mine["own"] == "a", mine["quality_b"] - mine["quality_a"])
    known = mine[gap.notna()]
    if known.empty:
        return nothing("no independent quality")
    design = np.column_stack([np.ones(len(known)), gap[gap.notna()].to_numpy(float)])
    return logit(known["won"].to_numpy(float), design, known["item"].to_numpy()).row()


# --- prediction-powered inference -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Means:
    """Means (doses,) of a sample of rows, the influence of each item on them (items, doses), and rows by dose `n` (doses,).

    The sum over items of an influence squared is the variance of that mean; of a linear combination of means, that of the same combination
    of influences.
    """

    values: np.ndarray
    influence: np.ndarray
    n: np.ndarray


def means(scores: np.ndarray) -> Means:
    """Means over items of scores (items, doses), NaN where there are none; NaN at doses with fewer than two."""
    there = ~np.isnan(scores)
    n = there.sum(0)
    with np.errstate(invalid="ignore", divide="ignore"):
        values = np.where(n > 1, np.nansum(scores, axis=0) / n, np.nan)
        influence = np.where(there, scores - values, 0.0) / np.sqrt(n * (n - 1.0))
    return Means(values, influence, n)


@dataclass(frozen=True)
class Estimate:
    """A linear combination of means: `value`, and the influence of each item on it (items,); `weight` is that of the judge's scores."""

    value: float
    influence: np.ndarray
    df: float
    n: int
    unlabelled: int = 0
    weight: float | None = None

    @property
    def se(self) -> float:
        return float(np.sqrt((self.influence**2).sum()))

    @property
    def interval(self) -> tuple[float, float]:
        half = float(student.ppf(LEVEL, self.df)) * self.se
        return self.value - half, self.value + half


def combined(found: Means, along: np.ndarray) -> Estimate:
    """The combination `along` (doses,) of means; doses with a 0 there may be without any."""
    used = along != 0
    influence = found.influence[:, used] @ along[used]
    contributing = int((found.influence[:, used] != 0).any(axis=1).sum())
    return Estimate(float(found.values[used] @ along[used]), influence, max(contributing - 1, 1), int(found.n[used].sum()))


def corrected(judge: np.ndarray, reference: np.ndarray, along: np.ndarray) -> dict[str, Estimate]:
    """Estimates of a combination of mean scores by dose: `judge` and `reference` alone, the `rectifier`, `ppi` and `ppi++`.

    PPI adds to the reference's estimate w times the difference of the judge's on rows without and with a reference score: w = 1 in ppi, and in
    ppi++ the w in [0, 1] of the smallest estimated variance. At a dose where every row has a reference score there is nothing to add.

    Args:
        judge, reference: scores (items, doses), NaN where there are none.
        along: (doses,): 1 at a dose for its mean, `slope_along` for a slope.

    Raises:
        ValueError: a dose in `along` has fewer than two rows with both scores.
    """
    both = ~(np.isnan(judge) | np.isnan(reference))
    lacking = (both.sum(0) < 2) & (along != 0)
    if lacking.any():
        raise ValueError(f"{int(lacking.sum())} doses have fewer than two rows with both a judge's and a reference score")
    true, labelled = means(np.where(both, reference, np.nan)), means(np.where(both, judge, np.nan))
    rest = means(np.where(~both, judge, np.nan))
    used = (along != 0) & (rest.n > 1)
    part = np.where(used, along, 0.0)
    truth = combined(true, along)
    added = _difference(combined(rest, part), combined(labelled, part))
    power = float((added.influence**2).sum())
    tuned = float(np.clip(-(truth.influence @ added.influence) / power, 0.0, 1.0)) if power > 0 else 0.0
    unlabelled = int(rest.n[used].sum())
    alone = combined(means(reference), along)
    return {
        "judge": combined(means(judge), along),
        "reference": alone,
        "rectifier": _difference(truth, combined(labelled, along)),
        **{
            name: Estimate(truth.value + weight * added.value, truth.influence + weight * added.influence, truth.df, truth.n, unlabelled, weight)
            for name, weight in (("ppi", 1.0), ("ppi++", tuned))
        },
    }


def _difference(one: Estimate, other: Estimate) -> Estimate:
    return Estimate(one.value - other.value, one.influence - other.influence, one.df, one.n)


def slope_along(doses: np.ndarray, used: np.ndarray) -> np.ndarray:
    """The combination of means by dose that is their least-squares slope over the doses `used` (doses, boolean)."""
    centred = np.where(used, doses - doses[used].mean(), 0.0)
    return centred / (centred @ centred)


def judge_share(naive: Estimate, right: Estimate) -> Estimate:
    """1 - corrected slope / judge's slope: which share of the judge's slope the reference does not confirm. Its interval is by the delta method."""
    ratio = right.value / naive.value
    return Estimate(1 - ratio, (ratio * naive.influence - right.influence) / naive.value, right.df, right.n, right.unlabelled, right.weight)


# --- the corrected dose-response --------------------------------------------------------------------------------------


def corrected_dose_response(scores: pd.DataFrame, reference: str, doses: Iterable[float] = ()) -> pd.DataFrame:
    """CORRECTED_DOSE_RESPONSE of one vector's `judge_scores`: every judge and rubric but the reference itself.

    Args:
        reference: the judge whose scores are taken for the truth; empty where the study names nobody, which is said in `status`.
        doses: those that slopes are taken over; all unless given.
    """
    wanted = set(doses)
    rows: list[dict[str, Any]] = []
    for (rubric, judge), part in scores[scores["judge"] != reference].groupby(["rubric", "judge"]):
        true = scores[(scores["judge"] == reference) & (scores["rubric"] == rubric)]
        keys = {"rubric": rubric, "judge": judge, "reference": reference}
        rows += [{**keys, **row} for row in _of_judge(part, true, reference, wanted)]
    frame = pd.DataFrame(rows, columns=[name for name in CORRECTED_DOSE_RESPONSE.names if name not in ("site", "epoch")])
    return frame.assign(site=scores["site"].iloc[0], epoch=scores["epoch"].iloc[0])[list(CORRECTED_DOSE_RESPONSE.names)]


def _of_judge(part: pd.DataFrame, true: pd.DataFrame, reference: str, wanted: set[float]) -> list[dict[str, Any]]:
    items, at = np.array(sorted(part["item"].unique()), dtype=object), np.sort(part["multiplier"].unique())
    judge, truth = (
        one.pivot_table(index="item", columns="multiplier", values="score", dropna=False).reindex(index=items, columns=at).to_numpy(float)
        if len(one)
        else np.full((len(items), len(at)), np.nan)
        for one in (part, true)
    )
    both = (~(np.isnan(judge) | np.isnan(truth))).sum(0)
    inside = np.isin(at, list(wanted)) if wanted else np.ones(len(at), dtype=bool)
    used = inside & (both > 1)
    if not reference or true.empty or not used.any():
        if not reference:
            status = "no reference: [judge] reference names nobody"
        else:
            status = (
                f"no reference: {reference!r} scored none of these rows"
                if true.empty
                else "too few rows have a reference score: a mean needs two items"
            )
        return _uncorrected(judge, at, inside & ((~np.isnan(judge)).sum(0) > 1), status)
    rows: list[dict[str, Any]] = []
    for place, dose in enumerate(at):
        keys = {"quantity": "mean", "multiplier": dose}
        if both[place] < 2:
            lacking = "fewer than two items have a reference score at this dose"
            rows += (
                [{**keys, "estimator": "judge", **_row(combined(means(judge), np.eye(len(at))[place]))}]
                if (~np.isnan(judge[:, place])).sum() > 1
                else []
            )
            rows.append({**keys, "estimator": "ppi++", **_no_row(lacking)})
        else:
            rows += [{**keys, "estimator": name, **_row(found)} for name, found in corrected(judge, truth, np.eye(len(at))[place]).items()]
    return rows + _slopes(judge, truth, at, used)


def _slopes(judge: np.ndarray, truth: np.ndarray, at: np.ndarray, used: np.ndarray) -> list[dict[str, Any]]:
    keys = {"quantity": "slope", "multiplier": None}
    if used.sum() < 2:
        return [{**keys, "estimator": "ppi++", **_no_row("a slope needs two doses with reference scores")}]
    found = corrected(judge, truth, slope_along(at, used))
    rows = [{**keys, "estimator": name, **_row(estimate)} for name, estimate in found.items()]
    low, high = found["judge"].interval
    if low <= 0 <= high:
        share = _no_row("the judge's own slope may be 0: its share is undefined")
    else:
        share = _row(judge_share(found["judge"], found["ppi++"]))
    return [*rows, {"quantity": "judge_share", "multiplier": None, "estimator": "ppi++", **share}]


def _uncorrected(judge: np.ndarray, at: np.ndarray, used: np.ndarray, status: str) -> list[dict[str, Any]]:
    """The judge's own slope, and why there is no other."""
    keys = {"quantity": "slope", "multiplier": None}
    own = [{**keys, "estimator": "judge", **_row(combined(means(judge), slope_along(at, used)))}] if used.sum() > 1 else []
    return [*own, {**keys, "estimator": "ppi++", **_no_row(status)}]


def _row(found: Estimate) -> dict[str, Any]:
    low, high = found.interval
    counts = {"weight": found.weight, "n": found.n, "unlabelled": found.unlabelled}
    method = CLUSTERED.format(model="mean over items" if found.weight is None else "prediction-powered inference")
    return {"estimate": found.value, "lower": low, "upper": high, "se": found.se, "df": found.df, **counts, "method": method, "status": MEASURED}


def _no_row(status: str) -> dict[str, Any]:
    none = dict.fromkeys(("estimate", "lower", "upper", "se", "df", "weight"))
    return {**none, "n": 0, "unlabelled": 0, "method": "none", "status": status}
