"""Figures of the prompting experiments.

Here belong drawings of tables that exist; what figures share is in `figures.py`.
"""

from __future__ import annotations

from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from relseek_assets.figures import COLOURS, DOSE, MARKERS, blank
from relseek_assets.prompting.tables import STEERED

SIDE = 0.04  # doses by which authors are set apart, so that their bars can be told from one another


def levels(frame: pd.DataFrame, rubric: str) -> Figure:
    """Mean score by level with its interval, a line an author; one panel a judge."""
    judges = sorted(frame.loc[frame["rubric"] == rubric, "judge"].unique())
    figure, panels = blank(len(judges), 5.0, 3.6)
    for axes, judge in zip(panels, judges, strict=True):
        part = frame[(frame["rubric"] == rubric) & (frame["judge"] == judge)]
        for author, line, style in _authors(part):
            axes.plot(line["multiplier"], line["estimate"], label=author, **style)
            axes.fill_between(line["multiplier"], line["lower"], line["upper"], color=style["color"], alpha=0.18, linewidth=0)
        axes.set(xlabel=f"{DOSE}, or the level that it corresponds to", ylabel=f"{rubric} score (1 to 10)", ylim=(0.8, 10.2), title=judge)
        axes.legend(fontsize=8)
        axes.text(0.99, 0.02, "bands: 95% intervals over prompts", transform=axes.transAxes, ha="right", fontsize=7, alpha=0.7)
    return figure


def head_to_head(frame: pd.DataFrame) -> Figure:
    """Share of the comparisons in which the author's reply has more of the behaviour than the steered one, by level; one panel a judge."""
    judges = sorted(frame["judge"].unique())
    figure, panels = blank(len(judges), 5.0, 3.4)
    for axes, judge in zip(panels, judges, strict=True):
        part = frame[(frame["judge"] == judge) & (frame["measure"] == "more") & frame["level"].notna()]
        for author, line, style in _authors(part, first=1):  # the steered model has the first colour in every other figure
            bars = [line["share"] - line["lower"], line["upper"] - line["share"]]
            axes.errorbar(line["multiplier"], line["share"], yerr=bars, capsize=2, label=author, **style)
        axes.axhline(0.5, color="black", linewidth=0.8, linestyle=":")
        axes.set(xlabel=f"{DOSE} of the level", ylabel="share won by the author", ylim=(-0.03, 1.03), title=f"Against the steered model ({judge})")
        axes.legend(fontsize=8)
        axes.text(0.99, 0.02, "bars: 95% Wilson intervals", transform=axes.transAxes, ha="right", fontsize=7, alpha=0.7)
    return figure


def attack_shifts(frame: pd.DataFrame) -> Figure:
    """Mean shift under attack by level, a line an author; one panel an attack type, of the first judge."""
    judge = sorted(frame["judge"].unique())[0]
    figure, panels = blank(2, 4.6, 3.6)
    own = frame[(frame["judge"] == judge) & frame["compared_with"].isna() & frame["level"].notna()]
    for axes, (attack_type, push) in zip(panels, (("add", "more"), ("subtract", "less")), strict=True):
        for number, (author, line, style) in enumerate(_authors(own[own["attack_type"] == attack_type])):
            bars = [(line["estimate"] - line["lower"]).fillna(0), (line["upper"] - line["estimate"]).fillna(0)]
            axes.errorbar(line["multiplier"] + number * SIDE, line["estimate"], yerr=bars, capsize=2, label=author, **style)
        axes.axhline(0, color="black", linewidth=0.8, linestyle=":")
        axes.set(xlabel=f"{DOSE} of the level", ylabel="shift of the score (points)", title=f"Attacks that push for {push} ({judge})")
    panels[0].legend(fontsize=8)
    panels[1].text(0.99, 0.02, "bars: 95% intervals over scenarios", transform=panels[1].transAxes, ha="right", fontsize=7, alpha=0.7)
    return figure


def turns(frame: pd.DataFrame) -> Figure:
    """Mean score by turn, one panel an author and one line a level and attack type; the last turn answers the attack."""
    judge = sorted(frame["judge"].unique())[0]
    part = frame[frame["judge"] == judge]
    authors = _order(part["author"])
    figure, panels = blank(len(authors), 3.4, 3.4)
    for axes, author in zip(panels, authors, strict=True):
        for number, (dose, lines) in enumerate(part[part["author"] == author].groupby("multiplier")):
            for attack_type, dash in (("add", "-"), ("subtract", "--")):
                line = lines[lines["attack_type"] == attack_type].sort_values("turn")
                bars = [(line["estimate"] - line["lower"]).fillna(0), (line["upper"] - line["estimate"]).fillna(0)]
                style: dict[str, Any] = {"color": COLOURS[number % len(COLOURS)], "marker": MARKERS[number % len(MARKERS)], "linestyle": dash}
                axes.errorbar(line["turn"], line["estimate"], yerr=bars, capsize=2, label=f"λ {dose:g}, {attack_type}", **style)
        axes.set(xlabel="turn", ylabel=f"score by {judge}", ylim=(0.8, 10.2), title=author, xticks=sorted(part["turn"].unique()))
    panels[-1].legend(fontsize=6)
    panels[0].text(0.01, 0.01, "bars: 95% intervals over scenarios", transform=panels[0].transAxes, fontsize=7, alpha=0.7)
    return figure


def _order(authors: pd.Series) -> list[str]:
    """The steered model first, then the others by name."""
    return sorted(authors.unique(), key=lambda author: (author != STEERED, author))


def _authors(frame: pd.DataFrame, first: int = 0) -> list[tuple[str, pd.DataFrame, dict[str, Any]]]:
    """Each author's rows by dose with its looks."""
    return [
        (author, frame[frame["author"] == author].sort_values("multiplier"), {"color": COLOURS[number % len(COLOURS)], "marker": MARKERS[number % 7]})
        for number, author in enumerate(_order(frame["author"]), first)
    ]
