"""Figures of a study of persona directions: quality by layer, personas along the axis, published scores.

Here belong drawings of tables that exist; no number is computed here. What figures share is in `figures.py`.
"""

from __future__ import annotations

from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from relseek_assets.figures import COLOURS, MARKERS, blank

NAMES = {"last_token": "last prompt token", "response_mean": "mean of the reply"}
GROUPS = {"assistant": COLOURS[0], "other": COLOURS[2], "hostile": COLOURS[1]}
PANELS = (
    ("cohens_d", "Cohen's d (population sds)", "Separation"),
    ("accuracy_at_midpoint", "share on the right side", "Accuracy"),
    ("auc", "area under the ROC curve", "ROC AUC"),
)
LAYER = "block (0-indexed)"
INTERVALS = "bands: 95% bootstrap intervals over queries"


def direction_quality(frame: pd.DataFrame, split: str) -> Figure:
    """Cohen's d, accuracy and AUC by layer on the held-out rows of one split, one line an extraction with its own activations.

    Accuracy is solid at the midpoint and dotted at zero; the published mismatch is the thin dashed line.
    """
    figure, panels = blank(3, 4.4, 3.8)
    rows = frame[frame["split"] == split]
    for axes, (measure, unit, title) in zip(panels, PANELS, strict=True):
        for number, ((made, read), part) in enumerate(rows.groupby(["extraction", "evaluated_with"])):
            part = part.sort_values("layer")
            if made != read:
                axes.plot(
                    part["layer"], part[measure], color=COLOURS[2], linestyle="--", linewidth=1, label=f"{NAMES[made]}, read at the {NAMES[read]}"
                )
                continue
            style: Any = {"color": COLOURS[min(number, 1)]}
            axes.plot(part["layer"], part[measure], marker=MARKERS[min(number, 1)], markersize=3.5, label=NAMES[made], **style)
            axes.fill_between(part["layer"], part[f"{measure}_lower"], part[f"{measure}_upper"], alpha=0.18, linewidth=0, **style)
            if measure == "accuracy_at_midpoint":
                axes.plot(part["layer"], part["accuracy_at_zero"], linestyle=":", linewidth=1.4, **style)
        axes.set(xlabel=LAYER, ylabel=unit, title=title)
        if measure == "cohens_d":
            axes.set_ylim(bottom=min(0, axes.get_ylim()[0]))
        else:
            axes.set_ylim(min(0.45, axes.get_ylim()[0]), 1.02)
    panels[2].axhline(0.5, color="grey", linewidth=0.8, linestyle=(0, (1, 3)))
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    panels[1].text(0.99, 0.02, "solid: at the midpoint; dotted: at zero", transform=panels[1].transAxes, ha="right", fontsize=7, alpha=0.7)
    panels[2].text(0.99, 0.02, INTERVALS, transform=panels[2].transAxes, ha="right", fontsize=7, alpha=0.7)
    held = {"query": "queries held out", "persona": "personas held out", "both": "queries and personas held out"}[split]
    figure.suptitle(f"Directions on held-out rows: {held}", fontsize=11)
    return figure


def _group(row: pd.Series) -> str:
    return "hostile" if row["hostile"] else str(row["persona_kind"])


def persona_projections(frame: pd.DataFrame, extraction: str, layer: int) -> Figure:
    """Each persona's mean on the axis of one layer with its 95% interval over replies, in order."""
    rows = frame[(frame["extraction"] == extraction) & (frame["layer"] == layer)].sort_values("projection").reset_index(drop=True)
    figure, (axes,) = blank(1, 6.0, 0.8 + 0.2 * len(rows))
    groups = rows.apply(_group, axis=1)
    for number, (name, colour) in enumerate(GROUPS.items()):
        mine = rows[groups == name]
        style: Any = {"marker": MARKERS[number], "color": colour, "linestyle": "none", "capsize": 2}
        axes.errorbar(mine["projection"], mine.index, xerr=1.96 * mine["projection_se"], label=name, **style)
    axes.set_yticks(rows.index, [name.replace("_", " ") for name in rows["persona"]], fontsize=7)
    axes.set(xlabel="mean projection on the axis, ± 1.96 standard errors (stream units)")
    axes.set_title(f"Personas along the axis, {NAMES[extraction]}, block {layer}", fontsize=10)
    axes.legend(fontsize=8, loc="lower right", frameon=False)
    return figure


def persona_geometry(frame: pd.DataFrame) -> Figure:
    """By layer: the share of the variance between personas on the first component, and its |cosine| with the axis."""
    figure, panels = blank(2, 4.4, 3.4)
    rows = frame.drop_duplicates(["extraction", "layer"]).sort_values("layer")
    for axes, column, unit, title in zip(
        panels,
        ("pc1_share", "pc1_cosine"),
        ("share of variance between personas", "|cosine| of component and axis"),
        ("First component", "Its alignment with the axis"),
        strict=True,
    ):
        for number, (name, part) in enumerate(rows.groupby("extraction")):
            axes.plot(part["layer"], part[column], color=COLOURS[number], marker=MARKERS[number], markersize=3.5, label=NAMES[str(name)])
        axes.set(xlabel=LAYER, ylabel=unit, title=title, ylim=(0, 1.02))
    panels[0].legend(fontsize=8, frameon=False)
    return figure


def published_quality(frame: pd.DataFrame) -> Figure:
    """Published Cohen's d by layer, a line a model and extraction; the recomputed best layer is ringed."""
    figure, (axes,) = blank(1, 6.0, 3.6)
    for number, ((model, extraction), part) in enumerate(frame.groupby(["model", "extraction"])):
        part = part.sort_values("layer")
        colour = COLOURS[number % len(COLOURS)]
        axes.plot(part["layer"], part["cohens_d"], color=colour, marker=MARKERS[number], markersize=3.5, label=f"{model}, {NAMES[str(extraction)]}")
        best = part[part["best"]]
        axes.plot(best["layer"], best["cohens_d"], linestyle="none", marker="o", markersize=12, markerfacecolor="none", markeredgecolor=colour)
    axes.set(xlabel=LAYER, ylabel="Cohen's d (population sds)", title="Published directions, recomputed; ringed: best layer")
    axes.legend(fontsize=8, frameon=False)
    return figure


def published_scores(frame: pd.DataFrame) -> Figure:
    """Published judge scores by strength, mean ± standard error, additions beside floors; strengths stand at equal distances."""
    names = {"steering": "scale of the addition (stream units)", "capping": "floor τ (stream units; 0 is off)"}
    figure, panels = blank(2, 4.4, 3.4)
    for axes, (intervention, label) in zip(panels, names.items(), strict=True):
        part = frame[frame["intervention"] == intervention].sort_values("strength")
        places = range(len(part))
        for number, score in enumerate(("assistant", "coherence")):
            style: Any = {"color": COLOURS[number], "marker": MARKERS[number]}
            axes.errorbar(places, part[score], yerr=part[f"{score}_se"], capsize=2, label=score, **style)
        axes.set_xticks(places, [f"{strength:g}" for strength in part["strength"]])
        axes.set(xlabel=label, ylabel="judge score (0 to 10)", ylim=(-0.3, 10.6), title=f"Published {intervention}")
    panels[0].legend(fontsize=8, frameon=False)
    return figure
