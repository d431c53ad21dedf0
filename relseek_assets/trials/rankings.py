"""Worths and win rates of doses from participants' rankings of assistants.

Ratings on scales, and what the ranked assistants were like, do not belong here. Source: human_study.md, section 14.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import pandas as pd
from scipy import optimize, special

from relseek_assets.trials.raw import TrialFault

POSITIONS = ("A", "B", "C", "D")
SUBTASK = "multi-chat"
PSEUDO_RANKINGS = 0.5  # default of R's PlackettLuce
BOOTSTRAP_DRAWS = 1000
LEVEL = 0.95


class RankingError(TrialFault):
    """Rankings that no worth can be estimated from."""


@dataclass(frozen=True)
class PlackettLuce:
    """Log-worths of items against the reference item: `items` (k), `log_worth` (k), `covariance` (k, k; zero for the reference),

    `quasi_variance` (k; NaN with fewer than three items), `reference`, `rankings`: how many lists they come from.
    """

    items: tuple[float, ...]
    log_worth: np.ndarray
    covariance: np.ndarray
    quasi_variance: np.ndarray
    reference: float
    rankings: int

    def table(self) -> pd.DataFrame:
        """multiplier, log_worth, se (against the reference), quasi_se, n."""
        with np.errstate(invalid="ignore"):
            quasi = np.sqrt(self.quasi_variance)
        columns = {"multiplier": self.items, "log_worth": self.log_worth, "se": np.sqrt(np.diag(self.covariance)), "quasi_se": quasi}
        return pd.DataFrame({**columns, "n": self.rankings})


def long_rankings(calibration_rankings: pd.DataFrame, ranking_type: str, *, doses: Sequence[float] | None = None) -> pd.DataFrame:
    """One row an assistant ranked in the four-way chats: ppt_id, multiplier, place (1 best).

    `doses` keeps only these; the order of what remains in a list stays (the truncated variant). Raises RankingError where there
    are no such rankings or a list has ties.
    """
    columns = ["ppt_id", "ranking_type", "subtask", *(f"{position}:{what}" for position in POSITIONS for what in ("multiplier", "rank"))]
    if missing := [column for column in columns if column not in calibration_rankings]:
        raise RankingError(f"calibration_rankings has no column {missing[0]!r}")
    chosen = calibration_rankings[(calibration_rankings["subtask"] == SUBTASK) & (calibration_rankings["ranking_type"] == ranking_type)]
    if chosen.empty:
        types = sorted(calibration_rankings["ranking_type"].unique())
        raise RankingError(f"calibration_rankings has no {SUBTASK!r} rankings of type {ranking_type!r}; types are {types}")
    parts = [
        pd.DataFrame({"ppt_id": chosen["ppt_id"], "multiplier": chosen[f"{position}:multiplier"], "rank": chosen[f"{position}:rank"]})
        for position in POSITIONS
    ]
    long = pd.concat(parts, ignore_index=True).dropna()
    if doses is not None:
        long = long[long["multiplier"].isin(list(doses))]
    if long.duplicated(["ppt_id", "rank"]).any() or long.duplicated(["ppt_id", "multiplier"]).any():
        raise RankingError(f"a participant ranks every assistant once and without ties; {ranking_type!r} has a list that does not")
    # Rank 4 is best (section 14).
    place = long.groupby("ppt_id")["rank"].rank(ascending=False).astype(int)
    return long[["ppt_id", "multiplier"]].assign(place=place).sort_values(["ppt_id", "place"], ignore_index=True)


def plackett_luce(rankings: pd.DataFrame, *, reference: float = 0.0, pseudo: float = PSEUDO_RANKINGS) -> PlackettLuce:
    """Plackett-Luce worths of items from lists of `long_rankings`, relative to `reference`.

    Every item also wins and loses `pseudo` times against a ghost of worth 1, so that an item which never won has a finite worth.
    The covariance is the inverse information of the participants' own choices at those worths, as R's PlackettLuce has it.
    Raises RankingError where `reference` was not ranked or an item has no list with another in it.
    """
    items, choices = _choices(rankings)
    if reference not in items:
        raise RankingError(f"the reference {reference} was never ranked; ranked were {items}")

    def loss(worth: np.ndarray) -> tuple[float, np.ndarray]:
        value = pseudo * float((2 * np.logaddexp(0, worth) - worth).sum())
        gradient = pseudo * (2 * special.expit(worth) - 1)
        for winners, sets in choices:
            logits = worth[sets]
            value += float((special.logsumexp(logits, axis=1) - worth[winners]).sum())
            np.add.at(gradient, sets, special.softmax(logits, axis=1))
            np.subtract.at(gradient, winners, 1.0)
        return value, gradient

    best = optimize.minimize(loss, np.zeros(len(items)), jac=True, method="BFGS", options={"gtol": 1e-8})
    at = items.index(reference)
    covariance = _covariance(best.x, choices, at)
    return PlackettLuce(items, best.x - best.x[at], covariance, quasi_variances(covariance), reference, int(rankings["ppt_id"].nunique()))


def _choices(rankings: pd.DataFrame) -> tuple[tuple[float, ...], list[tuple[np.ndarray, np.ndarray]]]:
    """The items, and for every size of a choice set the winners (n) and the sets (n, size), as positions among the items."""
    items = tuple(sorted(float(item) for item in rankings["multiplier"].unique()))
    position = {item: index for index, item in enumerate(items)}
    by_size: dict[int, list[list[int]]] = {}
    for _, one in rankings.sort_values("place").groupby("ppt_id", sort=False):
        order = [position[float(item)] for item in one["multiplier"]]
        for start in range(len(order) - 1):
            by_size.setdefault(len(order) - start, []).append(order[start:])
    compared = {index for sets in by_size.values() for one in sets for index in one}
    if alone := [item for item in items if position[item] not in compared]:
        raise RankingError(f"{alone} are in no list with another item; leave them out")
    return items, [(np.array(sets)[:, 0], np.array(sets)) for _, sets in sorted(by_size.items())]


def _covariance(worth: np.ndarray, choices: list[tuple[np.ndarray, np.ndarray]], reference: int) -> np.ndarray:
    information = np.zeros((len(worth), len(worth)))
    for _, sets in choices:
        shares = special.softmax(worth[sets], axis=1)
        cells = -shares[:, :, None] * shares[:, None, :] + shares[:, :, None] * np.eye(sets.shape[1])
        np.add.at(information, (sets[:, :, None], sets[:, None, :]), cells)
    others = np.arange(len(worth)) != reference
    among = information[np.ix_(others, others)]
    if np.linalg.matrix_rank(among, hermitian=True) < len(among):
        raise RankingError("the lists fall into groups of items that are never compared; their worths have no common scale")
    covariance = np.zeros_like(information)
    covariance[np.ix_(others, others)] = np.linalg.inv(among)
    return covariance


def quasi_variances(covariance: np.ndarray) -> np.ndarray:
    """Quasi-variances q (k) such that q_i + q_j is nearly the variance of every contrast i - j, least squares of logs.

    Invariant to the reference (Firth and de Menezes 2004); NaN with fewer than three items, where they are not determined.
    """
    k = len(covariance)
    if k < 3:
        return np.full(k, np.nan)
    one, other = np.array(list(combinations(range(k), 2))).T
    contrasts = covariance[one, one] + covariance[other, other] - 2 * covariance[one, other]
    design = np.zeros((len(one), k))
    design[np.arange(len(one)), one] = design[np.arange(len(one)), other] = 1

    def residuals(quasi: np.ndarray) -> np.ndarray:
        # A sum that is not positive has no logarithm; the optimiser steps back from so large a residual.
        return np.log(np.maximum(design @ quasi, 1e-300)) - np.log(contrasts)

    def slopes(quasi: np.ndarray) -> np.ndarray:
        return design / np.maximum(design @ quasi, 1e-300)[:, None]

    # The least-squares solution on the variances themselves can have sums below zero; half the mean contrast cannot.
    start = np.full(k, contrasts.mean() / 2)
    tolerances = {"xtol": 1e-14, "ftol": 1e-14, "gtol": 1e-14}
    return optimize.least_squares(residuals, start, slopes, x_scale="jac", method="lm", **tolerances).x


def win_rates(rankings: pd.DataFrame, *, draws: int = BOOTSTRAP_DRAWS, seed: int = 0) -> pd.DataFrame:
    """Mean over opponents of the share of participants who preferred the item: multiplier, win_rate, lower, upper, n.

    Only participants who ranked both count for a pair; n is how many ranked the item. Intervals are percentiles over resampled
    participants, where one drawn twice counts twice (the published bootstrap lost them, section 14).
    """
    items, wins = _wins(rankings)
    found = _mean_over_opponents(wins.sum(0)[None])[0]
    generator = np.random.default_rng(seed)
    counts = generator.multinomial(len(wins), np.full(len(wins), 1 / len(wins)), size=draws)
    resampled = _mean_over_opponents(np.einsum("bp,pij->bij", counts, wins, optimize=True))
    lower, upper = np.nanquantile(resampled, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0)
    n = rankings.groupby("multiplier")["ppt_id"].nunique().reindex(list(items)).to_numpy()
    return pd.DataFrame({"multiplier": items, "win_rate": found, "lower": lower, "upper": upper, "n": n})


def pairwise_wins(rankings: pd.DataFrame) -> pd.DataFrame:
    """Every ordered pair of items that somebody compared: multiplier, opponent, share, n."""
    items, wins = _wins(rankings)
    total = wins.sum(0)
    rows = [
        (items[i], items[j], total[i, j] / (total[i, j] + total[j, i]), int(total[i, j] + total[j, i]))
        for i in range(len(items))
        for j in range(len(items))
        if total[i, j] + total[j, i] > 0
    ]
    return pd.DataFrame(rows, columns=["multiplier", "opponent", "share", "n"])


def _wins(rankings: pd.DataFrame) -> tuple[tuple[float, ...], np.ndarray]:
    """The items, and whether each participant placed the one before the other, participants x items x items."""
    places = rankings.pivot(index="ppt_id", columns="multiplier", values="place").sort_index(axis=1)
    values = places.to_numpy(dtype=float)
    return tuple(float(item) for item in places.columns), (values[:, :, None] < values[:, None, :]).astype(float)


def _mean_over_opponents(wins: np.ndarray) -> np.ndarray:
    """Win rates (draws, items) from wins (draws, items, items); opponents never met are left out."""
    met = wins + wins.transpose(0, 2, 1)
    shares = np.divide(wins, met, out=np.zeros_like(wins), where=met > 0)
    opponents = (met > 0).sum(2)
    return np.divide(shares.sum(2), opponents, out=np.full(opponents.shape, np.nan), where=opponents > 0)
