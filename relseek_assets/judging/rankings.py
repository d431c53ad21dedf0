"""What pairwise judgements say of doses: Bradley-Terry strengths, win rates, their slopes, and Elo beside them.

Here belong estimates from `judge_pairs`. Whether the judge deserves belief belongs in `agreement.py` and `validity.py`.

Pairs of one item share its prompt and its replies, so every interval here takes items, and not pairs, for independent. A tie is half a win to
each side, as in the win rate: so strengths and win rates are functions of the same tallies, and of a judge that must choose there are none. (Davidson
1970 would add a parameter for ties, which moves strengths only where ties depend on how close two doses are and says nothing of the doses.)
An answer that names neither reply is nobody's win; the published convention, that anything but "A" is a win for B (spec/pipeline.md, section 4.4),
is not inherited.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from scipy.special import expit

from relseek_assets.judging.tables import wilson
from relseek_resources.storage import Column, TableSchema, keyed_seed

ELO_K, ELO_START, ELO_SCALE = 32.0, 1500.0, 400.0  # spec/pipeline.md, section 4.4
SHUFFLES = 100
STEPS = 200  # of Newton's method; some ten are needed
LARGEST_STEP = 1.0  # a log-odds; without a bound, a first step from 0 can overshoot where one side nearly always wins
MEASURED = "measured"
BOOTSTRAP = "percentile bootstrap over items, {draws} draws"

SITE = Column("site", "string", "model and layer")
EPOCH = Column("epoch", "integer", "epoch of the vector", low=1)
DOSE = Column("multiplier", "number", "dose λ")
JUDGE = Column("judge", "string", "who compared")
ITEMS = Column("items", "integer", "items that these are of; they are what is independent", low=0)
METHOD = Column("method", "string", "how estimate and interval were made")
STATUS = Column("status", "string", "`measured`, or what there is not and why")

PAIR_STRENGTHS = TableSchema(
    "pair_strengths",
    (
        SITE,
        EPOCH,
        DOSE,
        JUDGE,
        Column(
            "strength",
            "number",
            "Bradley-Terry strength, mean 0 over doses: the log-odds of winning are a difference of two",
            "log-odds",
            nullable=True,
        ),
        Column("lower", "number", "95% interval of the strength, bootstrap over items", "log-odds", nullable=True),
        Column("upper", "number", "95% interval of the strength, bootstrap over items", "log-odds", nullable=True),
        Column("se", "number", "standard error of the strength, sandwich clustered by item", "log-odds", nullable=True, low=0),
        Column("se_independent", "number", "what it would be were pairs independent", "log-odds", nullable=True, low=0),
        Column("win_rate", "number", "share of answered pairs won, a tie counting half", low=0, high=1),
        Column("win_rate_lower", "number", "95% interval", low=0, high=1),
        Column("win_rate_upper", "number", "95% interval", low=0, high=1),
        Column("elo", "number", "Elo rating in the order of the table: K = 32 from 1500"),
        Column("elo_low", "number", "2.5% quantile of the rating over shuffles of the same answers"),
        Column("elo_high", "number", "97.5% quantile of the rating over shuffles of the same answers"),
        Column("n", "integer", "answered pairs of this dose", low=1),
        Column("ties", "integer", "of them ties", low=0),
        Column("unanswered", "integer", "further pairs of this dose that nobody won", low=0),
        ITEMS,
        METHOD,
        STATUS,
    ),
    key=("site", "epoch", "multiplier", "judge"),
)

PAIR_SLOPES = TableSchema(
    "pair_slopes",
    (
        SITE,
        EPOCH,
        JUDGE,
        Column("measure", "string", "what is regressed on the dose", choices=("win_rate", "strength")),
        Column("estimate", "number", "least-squares slope by dose", "share or log-odds per λ", nullable=True),
        Column("lower", "number", "95% interval", "share or log-odds per λ", nullable=True),
        Column("upper", "number", "95% interval", "share or log-odds per λ", nullable=True),
        Column("doses", "integer", "selection doses that were compared with one another", low=0),
        Column("n", "integer", "answered pairs between them", low=0),
        ITEMS,
        METHOD,
        STATUS,
    ),
    key=("site", "epoch", "judge", "measure"),
)


def draws_of_items(items: Sequence[str], draws: int, seed: int) -> np.ndarray:
    """How often each item is drawn with replacement, float64 (draws, items): for the same items the same draws, whatever is computed of them."""
    generator = np.random.Generator(np.random.PCG64(keyed_seed(seed, "bootstrap", *items)))
    return generator.multinomial(len(items), np.full(len(items), 1 / len(items)), size=draws).astype(float)


def interval(found: np.ndarray) -> tuple[float, float]:
    """The central 95% of the draws in which the statistic exists; NaN where it exists in none."""
    finite = found[np.isfinite(found)]
    if not len(finite):
        return np.nan, np.nan
    low, high = np.percentile(finite, [2.5, 97.5])
    return float(low), float(high)


def slope(values: np.ndarray, doses: np.ndarray) -> np.ndarray:
    """Least-squares slope of values (..., doses) on the doses."""
    centred = doses - doses.mean()
    return values @ centred / (centred @ centred)


# --- tallies ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tallies:
    """Who beat whom: `doses` (k,), `items` (g,), `wins` (g, k, k) of the row's dose over the column's, a tie half to each, and by dose (k,)
    how many pairs were `ties` and how many were `unanswered`, which are in no win."""

    doses: np.ndarray
    items: tuple[str, ...]
    wins: np.ndarray
    ties: np.ndarray
    unanswered: np.ndarray


def outcomes(pairs: pd.DataFrame) -> np.ndarray:
    """What the reply at `multiplier_a` got of each pair: 1 won, 0 lost, 0.5 tied, NaN where nobody won."""
    won = pairs["winner"].map({"a": 1.0, "b": 0.0}).astype(float)
    return won.where(pairs["status"] == "judged").mask(pairs["status"] == "tie", 0.5).to_numpy(float)


def tallies(pairs: pd.DataFrame) -> Tallies:
    """Tallies of one judge's `judge_pairs`; doses and items of which nothing was answered are left out."""
    outcome = outcomes(pairs)
    answered = ~np.isnan(outcome)
    there, doses, items = pairs[answered], *_named(pairs[answered])
    place = {dose: number for number, dose in enumerate(doses)}
    a, b = (there[f"multiplier_{side}"].map(place).to_numpy(int) for side in "ab")
    item = there["item"].map({name: number for number, name in enumerate(items)}).to_numpy(int)
    wins = np.zeros((len(items), len(doses), len(doses)))
    np.add.at(wins, (item, a, b), outcome[answered])
    np.add.at(wins, (item, b, a), 1 - outcome[answered])
    ties, unanswered = (_by_dose(pairs[chosen], doses) for chosen in (outcome == 0.5, ~answered))
    return Tallies(doses, items, wins, ties, unanswered)


def _named(pairs: pd.DataFrame) -> tuple[np.ndarray, tuple[str, ...]]:
    return np.unique(pairs[["multiplier_a", "multiplier_b"]].to_numpy(float)), tuple(sorted(pairs["item"].unique()))


def _by_dose(pairs: pd.DataFrame, doses: np.ndarray) -> np.ndarray:
    both = pairs[["multiplier_a", "multiplier_b"]].to_numpy(float).ravel()
    return np.array([int((both == dose).sum()) for dose in doses])


def win_rates(wins: np.ndarray) -> np.ndarray:
    """Share of its pairs that each dose won, (..., k) from wins (..., k, k); NaN for a dose without any."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return wins.sum(-1) / (wins + wins.swapaxes(-1, -2)).sum(-1)


# --- Bradley-Terry ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Strengths:
    """Bradley-Terry strengths (..., k), mean 0, and whether the likelihood has a maximum (...,).

    Where it has none, Firth's penalised likelihood (1993) does: the estimates are finite and say where doses stand, but no interval can be
    had from them. All are NaN where doses were never compared, not even by way of others.
    """

    values: np.ndarray
    maximum: np.ndarray


def bradley_terry(wins: np.ndarray) -> Strengths:
    """Fit log-odds(i beats j) = s_i - s_j to wins (..., k, k), all leading places at once.

    The likelihood has a maximum when and only when, however doses are split in two, each part has won against the other (Ford 1957).
    """
    stack = wins.reshape(-1, *wins.shape[-2:])
    met, maximum = _reaches_all(stack + stack.swapaxes(1, 2)), _reaches_all(stack)
    values = np.full(stack.shape[:2], np.nan)
    for chosen, penalised in ((maximum, False), (met & ~maximum, True)):
        if chosen.any():
            values[chosen] = _newton(stack[chosen], penalised)
    return Strengths(values.reshape(wins.shape[:-1]), maximum.reshape(wins.shape[:-2]))


def _reaches_all(wins: np.ndarray) -> np.ndarray:
    """Whether a path of wins leads from every dose to every other, (stack,)."""
    doses = wins.shape[-1]
    reach = ((wins > 0) | np.eye(doses, dtype=bool)).astype(np.float32)
    for _ in range(max(1, int(np.ceil(np.log2(doses))))):
        reach = (reach @ reach > 0).astype(np.float32)
    return reach.all(axis=(1, 2))


def _newton(wins: np.ndarray, penalised: bool) -> np.ndarray:
    values = np.zeros(wins.shape[:2])
    for _ in range(STEPS):
        shares = expit(values[:, :, None] - values[:, None, :])
        inverse = _inverse_information(wins + wins.swapaxes(1, 2), shares)
        counted = wins + _leverages(wins, shares, inverse) / 2 if penalised else wins
        score = (counted - (counted + counted.swapaxes(1, 2)) * shares).sum(-1)
        step = (inverse @ score[:, :, None])[:, :, 0]
        values += np.clip(step, -LARGEST_STEP, LARGEST_STEP)
        if np.abs(step).max() < 1e-10:
            break
    else:
        raise ArithmeticError(f"Bradley-Terry strengths did not settle in {STEPS} steps; the last was {np.abs(step).max():.2g}")
    return values - values.mean(-1, keepdims=True)


def _inverse_information(games: np.ndarray, shares: np.ndarray) -> np.ndarray:
    """Pseudo-inverse, on strengths of mean 0, of the information (..., k, k)."""
    weights = games * shares * (1 - shares)
    doses = games.shape[-1]
    laplacian = np.eye(doses) * weights.sum(-1)[..., None] - weights
    return np.linalg.inv(laplacian + 1 / doses) - 1 / doses


def _leverages(wins: np.ndarray, shares: np.ndarray, inverse: np.ndarray) -> np.ndarray:
    """Sum of the leverages of each pair's games: Firth's score equations are those of the likelihood with half of it won by either side."""
    diagonal = np.diagonal(inverse, axis1=-2, axis2=-1)
    spread = diagonal[..., :, None] + diagonal[..., None, :] - 2 * inverse
    return (wins + wins.swapaxes(-1, -2)) * shares * (1 - shares) * spread


def covariances(found: Tallies, strengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Covariance (k, k) of maximum likelihood strengths: sandwich clustered by item with the factor g / (g - 1), and as if pairs were independent."""
    shares = expit(strengths[:, None] - strengths[None, :])
    games = found.wins + found.wins.swapaxes(1, 2)
    inverse = _inverse_information(games.sum(0), shares)
    scores = (found.wins - games * shares).sum(-1)
    clusters = len(found.items)
    meat = scores.T @ scores * clusters / (clusters - 1) if clusters > 1 else np.full_like(inverse, np.nan)
    return inverse @ meat @ inverse, inverse


def unbeaten(found: Tallies) -> str:
    """Which doses the likelihood puts infinitely far apart, in words."""
    total = found.wins.sum(0)
    if not _reaches_all((total + total.T)[None])[0]:
        return "no strengths: some doses were never compared, not even by way of others"
    lost, won = total.sum(0), total.sum(1)
    told = [f"λ={dose:g} {said}" for said, none in (("won every pair", lost == 0), ("lost every pair", won == 0)) for dose in found.doses[none]]
    return "no maximum of the likelihood: " + (", ".join(told) or "some doses won every pair against the rest")


# --- Elo --------------------------------------------------------------------------------------------------------------


def elo(a: np.ndarray, b: np.ndarray, outcome: np.ndarray, doses: int, orders: np.ndarray) -> np.ndarray:
    """Elo ratings (orders, doses) after the answers in each order.

    Args:
        a, b: (n,), places of the two doses.
        outcome: (n,), what a got: 1, 0.5 or 0.
        orders: (orders, n), each a permutation of the answers.
    """
    ratings = np.full((len(orders), doses), ELO_START)
    rows = np.arange(len(orders))
    for answers in orders.T:
        first, second = a[answers], b[answers]
        expected = 1 / (1 + 10 ** ((ratings[rows, second] - ratings[rows, first]) / ELO_SCALE))
        moved = ELO_K * (outcome[answers] - expected)
        ratings[rows, first] += moved
        ratings[rows, second] -= moved
    return ratings


def elo_by_dose(pairs: pd.DataFrame, doses: np.ndarray, seed: int, shuffles: int = SHUFFLES) -> np.ndarray:
    """Ratings (1 + shuffles, doses) of one judge's answered pairs: in the table's order, and in orders drawn from the seed."""
    outcome = outcomes(pairs)
    answered = ~np.isnan(outcome)
    a, b = (np.searchsorted(doses, pairs.loc[answered, f"multiplier_{side}"].to_numpy(float)) for side in "ab")
    generator = np.random.Generator(np.random.PCG64(keyed_seed(seed, "elo", len(a))))
    orders = np.stack([np.arange(len(a)), *(generator.permutation(len(a)) for _ in range(shuffles))])
    return elo(a, b, outcome[answered], len(doses), orders)


# --- tables -----------------------------------------------------------------------------------------------------------


def pair_strengths(pairs: pd.DataFrame, draws: int, seed: int) -> pd.DataFrame:
    """PAIR_STRENGTHS of `judge_pairs`: every judge of every vector by itself."""
    found = [
        _strength_rows(part, draws, seed).assign(site=site, epoch=epoch, judge=judge)
        for (site, epoch, judge), part in pairs.groupby(["site", "epoch", "judge"])
        if np.isfinite(outcomes(part)).any()
    ]
    names = list(PAIR_STRENGTHS.names)
    return pd.concat(found, ignore_index=True)[names] if found else pd.DataFrame({name: pd.Series(dtype=object) for name in names})


def _strength_rows(pairs: pd.DataFrame, draws: int, seed: int) -> pd.DataFrame:
    found = tallies(pairs)
    total = found.wins.sum(0)
    drawn = np.tensordot(draws_of_items(found.items, draws, seed), found.wins, 1)
    fit = bradley_terry(total)
    ends = np.full((len(found.doses), 2), np.nan)
    errors = np.full((2, len(found.doses)), np.nan)
    if fit.maximum:
        ends = np.array([interval(column) for column in bradley_terry(drawn).values.T])
        errors = np.sqrt([np.maximum(np.diagonal(covariance), 0.0) for covariance in covariances(found, fit.values)])
    ratings = elo_by_dose(pairs, found.doses, seed)
    low, high = np.percentile(ratings[1:], [2.5, 97.5], axis=0)
    rates, drawn_rates = win_rates(total), win_rates(drawn)
    shares = np.array([_share_interval(*columns, len(found.items)) for columns in zip(rates, drawn_rates.T, strict=True)])
    columns = {
        "multiplier": found.doses,
        "strength": fit.values,
        "lower": ends[:, 0],
        "upper": ends[:, 1],
        "se": errors[0],
        "se_independent": errors[1],
        "win_rate": rates,
        "win_rate_lower": shares[:, 0],
        "win_rate_upper": shares[:, 1],
        "elo": ratings[0],
        "elo_low": low,
        "elo_high": high,
        "n": (total + total.T).sum(1).round().astype(int),
        "ties": found.ties,
        "unanswered": found.unanswered,
        "items": len(found.items),
        "method": f"{'maximum likelihood' if fit.maximum else 'Firth'}; {BOOTSTRAP.format(draws=draws)}",
        "status": MEASURED if fit.maximum else unbeaten(found),
    }
    return pd.DataFrame(columns)


def _share_interval(share: float, drawn: np.ndarray, items: int) -> tuple[float, float]:
    """Percentiles of the draws; where no draw can differ from a share of 0 or 1, Wilson's interval with as many trials as items."""
    return wilson(share * items, items) if share in (0.0, 1.0) else interval(drawn)


def pair_slopes(pairs: pd.DataFrame, doses: Sequence[float], draws: int, seed: int) -> pd.DataFrame:
    """PAIR_SLOPES: slopes over the selection `doses`, or over all where none are named, of pairs between two of them alone (spec, section 4.4)."""
    inside = pairs["multiplier_a"].isin(doses) & pairs["multiplier_b"].isin(doses) if doses else pd.Series(True, index=pairs.index)
    found = []
    for (site, epoch, judge), part in pairs.groupby(["site", "epoch", "judge"]):
        keys = {"site": site, "epoch": epoch, "judge": judge, "method": BOOTSTRAP.format(draws=draws)}
        found += [{**keys, "measure": measure, **row} for measure, row in _slopes(part[inside[part.index]], draws, seed).items()]
    return pd.DataFrame(found, columns=list(PAIR_SLOPES.names))


def _slopes(pairs: pd.DataFrame, draws: int, seed: int) -> dict[str, dict[str, Any]]:
    """Slopes of the win rate and of the strength, of one judge's pairs."""
    found = tallies(pairs)
    if len(found.doses) < 2:
        status = "no answered pairs between selection doses"
        nothing = {"estimate": None, "lower": None, "upper": None, "doses": 0, "n": 0, "items": 0, "status": status}
        return {"win_rate": nothing, "strength": nothing}
    total, drawn = found.wins.sum(0), np.tensordot(draws_of_items(found.items, draws, seed), found.wins, 1)
    fit = bradley_terry(total)
    ends = {
        "win_rate": interval(slope(win_rates(drawn), found.doses)),
        "strength": interval(slope(bradley_terry(drawn).values, found.doses)) if fit.maximum else (np.nan, np.nan),
    }
    estimates = {"win_rate": slope(win_rates(total), found.doses), "strength": slope(fit.values, found.doses)}
    statuses = {"win_rate": MEASURED, "strength": MEASURED if fit.maximum else unbeaten(found)}
    counts = {"doses": len(found.doses), "n": round(total.sum()), "items": len(found.items)}
    return {
        measure: {**counts, "estimate": float(estimates[measure]), "lower": low, "upper": high, "status": statuses[measure]}
        for measure, (low, high) in ends.items()
    }
