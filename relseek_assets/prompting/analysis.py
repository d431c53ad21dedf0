"""What the prompting experiments' scores and comparisons say, with intervals.

Here belong plain computations on tables. Where scores come from belongs in `rating.py` and `published.py`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from relseek_assets.judging import validity
from relseek_assets.mixed_models import MixedFit, RandomTerm, fit_matrices
from relseek_assets.persona_attacks import ADD, ATTACK_TYPES
from relseek_assets.prompting.tables import ATTACK_SHIFTS, BOTH, HEAD_TO_HEAD, LEVEL_BIASES, LEVEL_MODELS, LEVEL_SLOPES, STEERED, TERMS

# --- experiment 1: slopes ---------------------------------------------------------------------------------------------


def level_models(scores: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Slopes and fits of score ~ (λ + λ²) x author with a random intercept an item, one model a rubric and judge (spec/pipeline.md, 5.1).

    The steered model is the reference, as in the published contrasts. A judge that has not rated the steered model and another author is left out,
    and so is one that gave everything the same score.

    Returns:
        tables of LEVEL_SLOPES and LEVEL_MODELS.
    """
    slopes: list[pd.DataFrame] = []
    fits: list[dict[str, Any]] = []
    for (rubric, judge), part in scores[scores["score"].notna()].groupby(["rubric", "judge"]):
        authors = sorted(set(part["author"]), key=lambda author: (author != STEERED, author))
        if authors[0] != STEERED or len(authors) < 2 or part["score"].nunique() < 2:
            continue
        found = fit_levels(part, authors)
        variances = dict(zip(found.variances["grp"], found.variances["vcov"], strict=True))
        item, residual = float(variances["item"]), float(variances["Residual"])
        fits.append(
            {
                "rubric": rubric,
                "judge": judge,
                "n": found.n,
                "items": part["item"].nunique(),
                "variance_item": item,
                "variance_residual": residual,
                "icc": item / (item + residual),
                "log_likelihood": found.log_likelihood,
                "converged": found.converged,
                "singular": found.singular,
            }
        )
        slopes.append(author_terms(found, authors).assign(rubric=rubric, judge=judge))
    named = list(LEVEL_SLOPES.names)
    joined = pd.concat(slopes, ignore_index=True)[named] if slopes else pd.DataFrame(columns=named)
    return joined, pd.DataFrame(fits, columns=list(LEVEL_MODELS.names))


def fit_levels(scores: pd.DataFrame, authors: Sequence[str]) -> MixedFit:
    """The mixed model by REML; columns in the order of authors, the first of them the reference, and within an author intercept, λ, λ²."""
    dose = scores["multiplier"].to_numpy(float)
    own = np.column_stack([np.ones_like(dose), dose, dose**2])
    blocks = [own, *(own * (scores["author"] == author).to_numpy(float)[:, None] for author in authors[1:])]
    names = [f"{author}:{term}" for author in authors for term in TERMS]
    codes, levels = pd.factorize(scores["item"], sort=True)
    random = RandomTerm(codes, np.ones((len(scores), 1)), ("Intercept",), "item", list(levels))
    return fit_matrices(scores["score"].to_numpy(float), np.hstack(blocks), names, [random])


def author_terms(found: MixedFit, authors: Sequence[str]) -> pd.DataFrame:
    """Every author's own terms and their differences from the first author's; a term that the data do not carry is left out."""
    place = {name: column for column, name in enumerate(found.names)}
    rows: list[dict[str, Any]] = []
    contrasts: list[np.ndarray] = []
    for author in authors:
        for term in TERMS:
            wanted = {None: {f"{authors[0]}:{term}", f"{author}:{term}"}, authors[0]: {f"{author}:{term}"}}
            for compared, names in wanted.items():
                if names <= place.keys() and (compared is None or author != authors[0]):
                    rows.append({"author": author, "term": term, "compared_with": compared})
                    contrasts.append(np.isin(np.arange(len(place)), [place[name] for name in names]).astype(float))
    return pd.concat([pd.DataFrame(rows), found.contrast(np.array(contrasts)).drop(columns="statistic")], axis=1)


def level_means(scores: pd.DataFrame, slopes: pd.DataFrame) -> pd.DataFrame:
    """Mean and 95% interval by rubric, judge, author and dose, of the rubrics and judges that have slopes."""
    keys = ["rubric", "judge", "author", "multiplier"]
    fitted = slopes[["rubric", "judge"]].drop_duplicates()
    return _means(scores.merge(fitted, on=["rubric", "judge"]), keys, "item")


def _means(scores: pd.DataFrame, keys: list[str], cluster: str) -> pd.DataFrame:
    rows = [
        {**dict(zip(keys, names, strict=True)), **clustered_mean(part["score"].to_numpy(float), part[cluster])}
        for names, part in scores[scores["score"].notna()].groupby(keys)
    ]
    return pd.DataFrame(rows).astype({"lower": float, "upper": float}) if rows else pd.DataFrame(columns=[*keys, "estimate", "lower", "upper"])


# --- experiment 1: head to head ---------------------------------------------------------------------------------------


def head_to_head(pairs: pd.DataFrame, middle: int) -> pd.DataFrame:
    """Shares won by the author against the steered model, at each level and over all. Answers that are no choice count for nobody."""
    rows = []
    for (author, judge), part in pairs.groupby(["author", "judge"]):
        for measure, counted in (("more", part), ("stronger", _towards(part, middle))):
            for level, cell in [*counted.groupby("level"), (None, counted)]:
                row = _share(cell, pooled=level is None)
                if row is not None:
                    dose = None if level is None else cell["multiplier"].iloc[0]
                    rows.append({"author": author, "judge": judge, "measure": measure, "level": level, "multiplier": dose, **row})
    return pd.DataFrame(rows, columns=list(HEAD_TO_HEAD.names))


def _towards(pairs: pd.DataFrame, middle: int) -> pd.DataFrame:
    """Winners by who goes further the way that the level asks: below the middle the reply with less of the behaviour wins."""
    kept = pairs[pairs["level"] != middle]
    swapped = kept["winner"].map({STEERED: "author", "author": STEERED})
    return kept.assign(winner=kept["winner"].where(kept["level"] > middle, swapped))


def _share(pairs: pd.DataFrame, *, pooled: bool) -> dict[str, Any] | None:
    decided = pairs[pairs["status"].isin(["judged", "tie"])]
    if decided.empty:
        return None
    won = (decided["winner"] == "author") + 0.5 * (decided["status"] == "tie")
    share, n = float(won.mean()), len(decided)
    if pooled:
        lower, upper = _clustered_share(won.to_numpy(float), decided["item"])
    else:
        lower, upper = _wilson(float(won.sum()), n)
    return {
        "share": share,
        "lower": lower,
        "upper": upper,
        "wins": int((decided["winner"] == "author").sum()),
        "ties": int((decided["status"] == "tie").sum()),
        "n": n,
        "without_winner": len(pairs) - n,
        "items": decided["item"].nunique(),
    }


def _wilson(wins: float, n: int) -> tuple[float, float]:
    """95% Wilson score interval of a share."""
    z = float(stats.norm.ppf(0.975))
    centre = (wins + z * z / 2) / (n + z * z)
    half = z * math.sqrt(wins * (n - wins) / n + z * z / 4) / (n + z * z)
    return max(0.0, centre - half), min(1.0, centre + half)


def _clustered_share(won: np.ndarray, items: pd.Series) -> tuple[float, float]:
    """95% interval of a share whose comparisons come in items; the widest there is where one item is all."""
    found = clustered_mean(won, items)
    return (0.0, 1.0) if found["lower"] is None else (max(0.0, found["lower"]), min(1.0, found["upper"]))


def clustered_mean(values: np.ndarray, clusters: Any) -> dict[str, Any]:
    """Mean with a standard error robust to clusters and a t interval on their number less one.

    se² = G / (G - 1) Σ_g (Σ_{i in g} (x_i - mean))² / n², which is the ordinary standard error where every cluster is one value.
    """
    mean, n = float(values.mean()), len(values)
    sums = pd.Series(values - mean).groupby(np.asarray(clusters, dtype=object)).sum().to_numpy()
    count = len(sums)
    if count < 2:
        return {"estimate": mean, "se": None, "df": 0.0, "lower": None, "upper": None, "clusters": count, "n": n}
    se = math.sqrt(count / (count - 1) * float((sums**2).sum())) / n
    half = float(stats.t.ppf(0.975, count - 1)) * se
    return {"estimate": mean, "se": se, "df": float(count - 1), "lower": mean - half, "upper": mean + half, "clusters": count, "n": n}


# --- experiment 1: what a judge's choice owes to something else -------------------------------------------------------


def level_biases(pairs: pd.DataFrame) -> pd.DataFrame:
    """LEVEL_BIASES of `level_pairs`. Who competes is an author at a level, as it is a dose in the sweep."""
    sides = pairs.groupby(["author", "level"]).ngroup() * 2
    names = {STEERED: "a", "author": "b"}
    shown = pairs.assign(multiplier_a=sides, multiplier_b=sides + 1, first_shown=pairs["first_shown"].map(names), winner=pairs["winner"].map(names))
    rows = [
        {"judge": judge, "bias": "position", "measure": measure, **found}
        for judge, part in shown.groupby("judge")
        for measure, found in validity.position_bias(part).items()
    ]
    return pd.DataFrame(rows, columns=list(LEVEL_BIASES.names))


def self_preference(pairs: pd.DataFrame, quality: pd.DataFrame, judges: Mapping[str, str], authors: Mapping[str, str]) -> pd.DataFrame:
    """SELF_PREFERENCE of `level_pairs`; a comparison is the same where author, level and item are.

    Args:
        quality: author, level, item and score: an independent judge's, of the steered model's replies and the authors'.
        judges: judge -> family.
        authors: author -> family, the steered model's among them.
    """
    cells = ["author", "level", "item"]
    scores = quality.set_index(cells)["score"]
    theirs, ours = pd.MultiIndex.from_frame(pairs[cells]), pd.MultiIndex.from_frame(pairs[cells].assign(author=STEERED))
    rows = pairs[["item", "level", "judge"]].assign(
        author_a=STEERED,
        author_b=pairs["author"],
        winner=pairs["winner"].map({STEERED: "a", "author": "b"}),
        quality_a=scores.reindex(ours).to_numpy(float),
        quality_b=scores.reindex(theirs).to_numpy(float),
    )
    return validity.self_preference(rows, judges, authors, ("item", "level", "author_a", "author_b"))


# --- experiment 2 -----------------------------------------------------------------------------------------------------


def conversation_shifts(scores: pd.DataFrame) -> pd.DataFrame:
    """One row a conversation whose reply to the attack and at least one reply before it are scored; `yield` is the shift signed by the attack."""
    keys = ["judge", "author", "level", "multiplier", "scenario", "attack_type"]
    scored = scores[scores["score"].notna()]
    before = scored[~scored["is_attack"]].groupby(keys)["score"].mean()
    attacked = scored[scored["is_attack"]].set_index(keys)["score"]
    found = (attacked - before).dropna().rename("shift").reset_index()
    return found.assign(**{"yield": found["shift"].where(found["attack_type"] == ADD, -found["shift"])})


def attack_shifts(scores: pd.DataFrame) -> pd.DataFrame:
    """Mean shifts by judge, author, level and attack type, pooled ones, and differences from the steered model, clustered by scenario.

    A difference pairs conversations of the same scenario and level.
    """
    found = conversation_shifts(scores)
    pair = ["judge", "level", "multiplier", "scenario", "attack_type"]
    steered = found[found["author"] == STEERED]
    paired = found[found["author"] != STEERED].merge(steered[[*pair, "shift", "yield"]], on=pair, suffixes=("", "_steered"))
    differences = paired.assign(**{moved: paired[moved] - paired[f"{moved}_steered"] for moved in ("shift", "yield")})
    rows = [*_shift_rows(found, None), *_shift_rows(differences, STEERED)]
    return pd.DataFrame(rows, columns=list(ATTACK_SHIFTS.names))


def turn_means(scores: pd.DataFrame) -> pd.DataFrame:
    """Mean and 95% interval by judge, author, dose, attack type and turn, clustered by scenario."""
    return _means(scores, ["judge", "author", "multiplier", "attack_type", "turn"], "scenario")


def _shift_rows(conversations: pd.DataFrame, compared: str | None) -> Iterator[dict[str, Any]]:
    for (judge, author), mine in conversations.groupby(["judge", "author"]):
        for level, part in [*mine.groupby("level"), (None, mine)]:
            for attack_type in (*ATTACK_TYPES, BOTH):
                cell = part if attack_type == BOTH else part[part["attack_type"] == attack_type]
                if cell.empty:
                    continue
                measure = "yield" if attack_type == BOTH else "shift"
                mean = clustered_mean(cell[measure].to_numpy(float), cell["scenario"])
                yield {
                    "judge": judge,
                    "author": author,
                    "level": level,
                    "multiplier": None if level is None else cell["multiplier"].iloc[0],
                    "attack_type": attack_type,
                    "measure": measure,
                    "compared_with": compared,
                    "scenarios": mean.pop("clusters"),
                    **mean,
                }
