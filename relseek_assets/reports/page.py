"""The report's page from tables: figures, numbers with their n, example replies, and the lineage of each figure.

Here belongs what the page shows and how; no figure is computed here and no Dagster is known.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from matplotlib.figure import Figure

from relseek_assets import figures
from relseek_assets.judging.one_judge import EMBEDDED_JUDGES

EXAMPLE_DOSES = 5
EXAMPLE_ITEMS = 4


@dataclass(frozen=True)
class Shown:
    """A figure of the page with its caption and what it was drawn from: (asset, partition, data version)."""

    title: str
    svg: str
    caption: str
    inputs: tuple[tuple[str, str, str], ...]


@dataclass(frozen=True)
class Facts:
    """Everything that the page shows, as tables; `versions`: asset -> its (partition, data version) pairs, `key`: site and epoch -> a partition."""

    study: Mapping[str, Any]
    behaviour: Mapping[str, Any]
    tables: Mapping[str, pd.DataFrame]
    versions: Mapping[str, Sequence[tuple[str, str]]]
    key: Callable[[str, int], str]


def inputs_of(facts: Facts, *assets: str, vector: str = "") -> tuple[tuple[str, str, str], ...]:
    """(asset, partition, data version) of everything that is read of these assets, or of one vector's partitions alone, at whatever dose."""
    return tuple(
        (asset, partition, version)
        for asset in assets
        for partition, version in facts.versions[asset]
        if not vector or not partition or partition.partition("@")[0] == vector
    )


def shown(facts: Facts, title: str, figure: Figure, caption: str, *assets: str) -> Shown:
    return Shown(title, figures.svg(figure), caption, inputs_of(facts, *assets))


def example_doses(doses: Sequence[float], count: int = EXAMPLE_DOSES) -> list[float]:
    """`count` doses spread evenly over those there are, both ends and the middle among them."""
    ordered = sorted(doses)
    return [ordered[round(place)] for place in np.linspace(0, len(ordered) - 1, min(count, len(ordered)))]


def examples(generations: pd.DataFrame, scores: pd.DataFrame, site: str, epoch: int) -> tuple[list[float], list[dict[str, Any]]]:
    """Replies of the selected vector side by side: the first prompts by item name, so that nobody picks them."""
    mine = generations[(generations["site"] == site) & (generations["epoch"] == epoch)]
    doses = example_doses(list(mine["multiplier"].unique()))
    rating = scores[(scores["site"] == site) & (scores["epoch"] == epoch)].pivot_table(index=["item", "multiplier"], columns="rubric", values="score")
    rows = []
    for item in sorted(mine["item"].unique())[:EXAMPLE_ITEMS]:
        of_item = mine[mine["item"] == item].set_index("multiplier")
        cells = []
        for dose in doses:
            judged = rating.loc[(item, dose)].to_dict() if (item, dose) in rating.index else {}
            cells.append({"dose": dose, "reply": of_item.loc[dose, "reply"], "scores": judged})
        rows.append({"item": item, "prompt": of_item.iloc[0]["prompt"][-1]["content"], "cells": cells})
    return doses, rows


def headline(response: pd.DataFrame, chosen: pd.Series) -> list[dict[str, Any]]:
    """The selected vector's ends and middle: score at the lowest dose, at zero and at the highest, with intervals and n."""
    mine = response[(response["site"] == chosen["site"]) & (response["epoch"] == chosen["epoch"])]
    doses = sorted(mine["multiplier"].unique())
    wanted = [doses[0], min(doses, key=abs), doses[-1]]
    return mine[mine["multiplier"].isin(wanted)].sort_values(["rubric", "multiplier"], ascending=[False, True]).to_dict("records")


def render(facts: Facts) -> str:
    """The page as HTML text, without links to anything outside it."""
    tables = facts.tables
    chosen = tables["selection"].sort_values("selected", ascending=False).iloc[0]
    rubrics = [rubric for rubric in tables["dose_response"]["rubric"].unique() if rubric != "coherence"]
    drawn = [
        shown(
            facts,
            f"{rubric.capitalize()} by dose",
            figures.dose_response(tables["dose_response"], rubric),
            "Mean judge score of the replies to held-out prompts.",
            "dose_response",
        )
        for rubric in (*rubrics, "coherence")
    ]
    drawn += [
        shown(
            facts,
            "Training",
            figures.training_curves(tables["training_metrics"]),
            "Held-out loss and sign-correct accuracy; dashed lines are d = -1.",
            "training_metrics",
        ),
        shown(facts, "Vector norms", figures.vector_norms(tables["vector_summary"]), "Length of the vector after each epoch.", "vector_summary"),
        shown(facts, "Coherence against steerability", figures.pareto(tables["selection"]), "The ringed vector is the one selected.", "selection"),
        shown(
            facts,
            "Selection by weight",
            figures.weight_sensitivity(tables["selection_sensitivity"]),
            "Which vector would be chosen at other weights.",
            "selection_sensitivity",
        ),
        shown(
            facts,
            "Perplexity and propensity",
            figures.sweep_curves(tables["sweep_summary"]),
            "Of the replies, and of the given target and anti-target replies.",
            "sweep_summary",
        ),
        shown(
            facts,
            "Judge calibration",
            figures.judge_calibration(tables["judge_calibration"]),
            "Cross-validated with whole conversations held out.",
            "judge_calibration",
        ),
        shown(
            facts,
            "Reply lengths of the behaviour",
            figures.length_distribution(tables["conversation_lengths"]),
            "Quartiles and extremes by prompt type.",
            "conversation_lengths",
        ),
    ]
    mine = headline(tables["dose_response"], chosen)
    vector = facts.key(str(chosen["site"]), int(chosen["epoch"]))
    doses, replies = examples(tables["generations"], tables["judge_scores"], str(chosen["site"]), int(chosen["epoch"]))
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["number"] = number
    return environment.get_template("page.html.j2").render(
        study=facts.study,
        behaviour=facts.behaviour,
        chosen=chosen.to_dict(),
        headline=mine,
        imported=sorted({row["judge"] for row in mine} - set(EMBEDDED_JUDGES)),
        inputs={
            "headline": inputs_of(facts, "dose_response", vector=vector),
            "replies": inputs_of(facts, "generations", "judge_scores", vector=vector),
            "selection": inputs_of(facts, "selection"),
            "quality": inputs_of(facts, "judge_quality"),
            "training": inputs_of(facts, "training_metrics", "vector_summary"),
        },
        shown=drawn,
        selection=tables["selection"].to_dict("records"),
        quality=tables["judge_quality"].to_dict("records"),
        metrics=tables["training_metrics"].sort_values(["site", "epoch", "direction"]).to_dict("records"),
        summary=tables["vector_summary"].to_dict("records"),
        doses=doses,
        replies=replies,
    )


def number(value: Any, digits: int = 3) -> str:
    """A number to significant digits, or a dash where there is none."""
    if value is None or (isinstance(value, float) and np.isnan(value)):
        return "–"
    return f"{value:.{digits}g}"
