"""The page of a study of persona directions: quality by layer, personas along the axis, replies, and the published artifacts recomputed.

Here belongs what the page shows and how; no number is computed here and no Dagster is known. A further table of the study gets a function that draws
it, named in `FIGURES`, and its asset in `AXIS_TABLES` of `assets.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from matplotlib.figure import Figure

from relseek_assets import axis_figures, figures, intervention_figures
from relseek_assets.persona_set import ASSISTANT
from relseek_assets.reports.page import Shown, number

Tables = Mapping[str, pd.DataFrame]
SPLITS = {"query": "queries held out", "persona": "personas held out", "both": "queries and personas held out"}


@dataclass(frozen=True)
class AxisFacts:
    """Everything that the page shows: tables over all partitions, figures, and the status of assets that hold nothing."""

    study: Mapping[str, Any]
    tables: Tables
    shown: Sequence[Shown]
    statuses: Mapping[str, str]


@dataclass(frozen=True)
class Drawn:
    """A figure with its words and the assets that it was drawn from."""

    title: str
    figure: Figure
    caption: str
    assets: tuple[str, ...]


def render(facts: AxisFacts) -> str:
    """The page as HTML text, without links to anything outside it."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["number"] = number
    published = facts.tables["published_direction_quality"]
    return environment.get_template("axis_page.html.j2").render(
        study=facts.study,
        shown=facts.shown,
        best=best_rows(facts.tables["direction_quality"]).to_dict("records"),
        headline=headline(facts.tables["direction_quality"]).to_dict("records"),
        replies=examples(facts.tables["persona_replies"]),
        published=published[published["best"].astype(bool)].to_dict("records"),
        published_scores=facts.tables["published_intervention_scores"].to_dict("records"),
        judged=rows_of(facts.tables, "likeness_quality", "persona", "all"),
        interventions=rows_of(facts.tables, "intervention_summary"),
        comparison=rows_of(facts.tables, "intervention_comparison"),
        trends=rows_of(facts.tables, "drift_trends"),
        splits=SPLITS,
        statuses=facts.statuses,
    )


def rows_of(tables: Tables, name: str, column: str = "", value: str = "") -> list[dict[str, Any]]:
    """Rows of a table, those with a value in a column where one is named; none where the study does not make the table."""
    frame = tables.get(name, pd.DataFrame())
    return (frame[frame[column] == value] if column and len(frame) else frame).to_dict("records")


def best_rows(quality: pd.DataFrame) -> pd.DataFrame:
    """The best layers of every direction, split and evaluation, by AUC and by the published rule."""
    return quality[quality["best_by_auc"] | quality["best_by_accuracy"]].sort_values(["model", "split", "extraction", "evaluated_with", "layer"])


def headline(quality: pd.DataFrame) -> pd.DataFrame:
    """Of each model and extraction the stored direction's best layer by AUC, read with its own activations."""
    own = quality["extraction"] == quality["evaluated_with"]
    return quality[own & quality["split"].eq("query") & quality["best_by_auc"]]


def examples(replies: pd.DataFrame) -> list[dict[str, Any]]:
    """The first query of each kind by name, unpicked, with the replies of all its personas, assistants first."""
    found: list[dict[str, Any]] = []
    for (_, query), part in replies.groupby(["model", "query"], sort=True):
        if part["query_kind"].iloc[0] not in [row["kind"] for row in found]:
            ordered = part.assign(place=part["persona_kind"].ne(ASSISTANT)).sort_values(["place", "persona"])
            found.append({"kind": part["query_kind"].iloc[0], "query": query, "text": part["text"].iloc[0], "cells": ordered.to_dict("records")})
    return found


def figures_of(tables: Tables, versions: Mapping[str, Sequence[tuple[str, str]]]) -> list[Shown]:
    """Every figure of the page with its lineage; what has no rows is not drawn."""
    drawn = [one for draw in FIGURES for one in draw(tables)]
    return [
        Shown(
            one.title,
            figures.svg(one.figure),
            one.caption,
            tuple((asset, partition, version) for asset in one.assets for partition, version in versions[asset]),
        )
        for one in drawn
    ]


def _quality(tables: Tables) -> Iterator[Drawn]:
    for model, rows in tables["direction_quality"].groupby("model"):
        for split, words in SPLITS.items():
            mine = rows[rows["split"] == split]
            if mine["auc"].notna().any():
                caption = f"n = {mine['n'].iloc[0]} replies to {mine['n_queries'].iloc[0]} queries."
                yield Drawn(f"{model}: {words}", axis_figures.direction_quality(rows, split), caption, ("direction_quality",))


def _geometry(tables: Tables) -> Iterator[Drawn]:
    for model, rows in tables["persona_geometry"].groupby("model"):
        caption = "Principal components of the personas' mean activations; the axis is made from the same personas."
        yield Drawn(f"{model}: geometry of personas", axis_figures.persona_geometry(rows), caption, ("persona_geometry",))
        best = headline(tables["direction_quality"])
        for row in best[best["model"] == model].itertuples():
            figure = axis_figures.persona_projections(rows, row.extraction, row.layer)
            title = f"{model}: personas along the axis, {axis_figures.NAMES[row.extraction]}"
            yield Drawn(title, figure, "At the best layer by AUC on held-out queries.", ("persona_geometry", "direction_quality"))


def _published(tables: Tables) -> Iterator[Drawn]:
    quality, scores = tables["published_direction_quality"], tables["published_intervention_scores"]
    if len(quality):
        caption = "d from the published means and sds; every direction is read with last-token activations there."
        yield Drawn("Published directions", axis_figures.published_quality(quality), caption, ("published_direction_quality",))
    if len(scores):
        caption = "Mean of the published judge ± standard error; failed judgements are left out."
        yield Drawn("Published interventions", axis_figures.published_scores(scores), caption, ("published_intervention_scores",))


def _interventions(tables: Tables) -> Iterator[Drawn]:
    if "intervention_summary" not in tables:
        return
    for model, rows in tables["intervention_summary"].groupby("model"):
        summary, drawn = ("intervention_summary",), intervention_figures
        caption = "Each point is a condition; a path goes from no intervention through the strengths of one kind."
        yield Drawn(f"{model}: likeness against coherence", drawn.likeness_against_coherence(rows), caption, summary)
        caption = "An addition's strength is in distances between the mean projections of assistants and others."
        yield Drawn(f"{model}: interventions by strength", drawn.by_strength(rows), caption, summary)
    for model, rows in tables["intervention_comparison"].groupby("model"):
        caption = "The most likeness that each reaches at a given loss of coherence, straight between neighbouring strengths."
        yield Drawn(f"{model}: flooring against adding", intervention_figures.matched_coherence(rows), caption, ("intervention_comparison",))
    for model, rows in tables["likeness_quality"].groupby("model"):
        caption = "Judged by fits that saw neither the persona nor the query."
        yield Drawn(f"{model}: judge of likeness", intervention_figures.likeness_by_persona(rows), caption, ("likeness_quality",))


def _drift(tables: Tables) -> Iterator[Drawn]:
    if "drift" not in tables:
        return
    for model, rows in tables["drift"].groupby("model"):
        caption = f"Read by the plain model after block {rows['layer'].iloc[0]}, all turns before being context."
        yield Drawn(f"{model}: drift along conversations", intervention_figures.drift(rows), caption, ("drift",))


FIGURES: tuple[Callable[[Tables], Iterator[Drawn]], ...] = (_quality, _geometry, _interventions, _drift, _published)
