"""Published ratings and comparisons, as tables of this project.

Here belongs what a published judgement means beside ours; where the release keeps it belongs in `relseek_resources/release.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations

import numpy as np
import pandas as pd

from relseek_assets.judging.tables import LANGUAGE_PAIRS
from relseek_resources.judges.answers import read_choice
from relseek_resources.release import RATING_JUDGE, RESCORING_JUDGE
from relseek_resources.storage import Column, TableSchema

SOURCE = "published"
SCALE = (1, 10)
PAIRS = TableSchema("judge_pairs", (*LANGUAGE_PAIRS.columns, Column("source", "string", "`published`")), key=LANGUAGE_PAIRS.key)
RESCORED_RUBRIC = "relationship"  # the frontier panel's rubric of the same disposition, worded otherwise (spec/pipeline.md, section 8)


def ratings_by_dose(site: str, epoch: int, ratings: Mapping[str, pd.DataFrame], rescores: pd.DataFrame | None) -> pd.DataFrame:
    """Rows of `judge_scores` of one vector, every dose.

    Args:
        ratings: rubric -> `read_ratings` of its file, by the judge of the study.
        rescores: `read_rescores` of the replies that another judge rated again; None where there are none.
    """
    parts = [_scored(frame, rubric, RATING_JUDGE) for rubric, frame in _completed(ratings).items()]
    if rescores is not None:
        again = rescores[["item", "multiplier"]].assign(score=rescores["relationship_score"])
        parts.append(_scored(again, RESCORED_RUBRIC, RESCORING_JUDGE))
    return pd.concat(parts, ignore_index=True).assign(site=site, epoch=epoch)


def _completed(ratings: Mapping[str, pd.DataFrame]) -> dict[str, pd.DataFrame]:
    """Every rubric's rows with one for each reply that another rubric or dose shows to have been there."""
    everything = pd.concat(ratings.values()) if ratings else pd.DataFrame(columns=["item", "multiplier"])
    grid = pd.MultiIndex.from_product([everything["item"].unique(), everything["multiplier"].unique()], names=["item", "multiplier"])
    cells = grid.to_frame(index=False)
    return {rubric: cells.merge(frame, on=["item", "multiplier"], how="outer") for rubric, frame in ratings.items()}


def _scored(frame: pd.DataFrame, rubric: str, judge: str) -> pd.DataFrame:
    """A score off the scale keeps its published value, because the published means count it; the status says that it is off."""
    score = frame["score"]
    statuses = np.where(score.isna(), "missing", np.where(score.between(*SCALE), "scored", "out_of_range"))
    return _paid(frame, judge).assign(item=frame["item"], multiplier=frame["multiplier"], rubric=rubric, score=score, status=statuses, band=None)


def _paid(frame: pd.DataFrame, judge: str) -> pd.DataFrame:
    """Who judged and at what price. The release has list prices; what it does not say is null."""
    columns = {"prompt_tokens": "prompt_tokens", "completion_tokens": "completion_tokens", "total_cost": "cost_usd"}
    found = {ours: frame.get(theirs, np.nan) for theirs, ours in columns.items()}
    return pd.DataFrame(found, index=frame.index).assign(judge=judge, model=judge, attempt=1, raw=None, source=SOURCE)


def comparison_rows(site: str, epoch: int, comparisons: pd.DataFrame, doses: Sequence[float]) -> pd.DataFrame:
    """Rows of `judge_pairs` of one vector; the file's `a` is the reply shown first, ours the one of the smaller dose.

    Only A and B win; any other answer is `unreadable`. A pair of `doses` that the file lacks, of an item that it has, is `missing`.
    """
    choices = {answer: read_choice(answer).choice for answer in comparisons["model_response"].unique()}
    chosen = comparisons["model_response"].map(choices)
    smaller_first = comparisons["multiplier_a"] < comparisons["multiplier_b"]
    first = smaller_first.map({True: "a", False: "b"})
    second = smaller_first.map({True: "b", False: "a"})
    found = _paid(comparisons, RATING_JUDGE).assign(
        item=comparisons["item"],
        multiplier_a=comparisons[["multiplier_a", "multiplier_b"]].min(axis=1),
        multiplier_b=comparisons[["multiplier_a", "multiplier_b"]].max(axis=1),
        first_shown=first,
        winner=first.where(chosen == "A", second.where(chosen == "B")),
        status=np.where(chosen.isna(), "unreadable", "judged"),
        raw=comparisons["model_response"],
    )
    return pd.concat([found, _missing_pairs(found, doses)], ignore_index=True).assign(site=site, epoch=epoch)


def _missing_pairs(found: pd.DataFrame, doses: Sequence[float]) -> pd.DataFrame:
    pairs = pd.DataFrame(combinations(sorted(doses), 2), columns=["multiplier_a", "multiplier_b"])
    wanted = pd.DataFrame({"item": found["item"].unique()}).merge(pairs, how="cross")
    keys = ["item", "multiplier_a", "multiplier_b"]
    there = pd.MultiIndex.from_frame(found[keys])
    missing = wanted[~pd.MultiIndex.from_frame(wanted[keys]).isin(there)]
    return _paid(missing, RATING_JUDGE).assign(**{key: missing[key] for key in keys}, first_shown=None, winner=None, status="missing")


def pairwise_slopes(pairs: pd.DataFrame, doses: Sequence[float]) -> dict[str, float]:
    """The slope of win rates by dose as we count and as was published: there an answer other than exactly `A` wins for the reply shown second.

    Args:
        pairs: rows of `judge_pairs` with the raw answers.
        doses: those of selection; only pairs with both count (spec/pipeline.md, section 4.4).
    """
    inside = pairs[pairs["multiplier_a"].isin(doses) & pairs["multiplier_b"].isin(doses) & (pairs["status"] != "missing")]
    shown_second = inside["first_shown"].map({"a": "b", "b": "a"})
    rules = {"pairwise_slope": inside["winner"], "pairwise_slope_as_published": inside["first_shown"].where(inside["raw"] == "A", shown_second)}
    return {name: _slope_of_win_rates(inside, winner) for name, winner in rules.items()}


def _slope_of_win_rates(pairs: pd.DataFrame, winner: pd.Series) -> float:
    counted = winner.notna()
    wins = pd.concat(
        [
            pd.DataFrame({"multiplier": pairs.loc[counted, f"multiplier_{side}"], "win": (winner[counted] == side).astype(float)})
            for side in ("a", "b")
        ]
    )
    rates = wins.groupby("multiplier")["win"].mean()
    return float(np.polyfit(rates.index.to_numpy(float), rates.to_numpy(), 1)[0]) if len(rates) > 1 else float("nan")
