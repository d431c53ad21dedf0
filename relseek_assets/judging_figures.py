"""Figures of judging: strengths and ratings of doses, agreement of judges, biases, and the dose-response with a reference.

Here belong drawings of tables that exist; no number is computed here. What figures share is in `figures.py`.
"""

from __future__ import annotations

from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from relseek_assets.figures import COLOURS, DOSE, MARKERS, blank

#: What is drawn of an agreement: all of it is 1 at perfect agreement and 0 at none.
COEFFICIENTS = {
    "weighted_kappa": "weighted κ",
    "alpha_ordinal": "α, ordinal",
    "alpha_interval": "α, interval",
    "pearson": "Pearson",
    "spearman": "Spearman",
    "pearson_within_doses": "Pearson within doses",
}
CURVES = {"judge": "judge alone", "reference": "reference alone", "ppi++": "judge corrected (PPI++)"}
ZERO: Any = {"color": "grey", "linewidth": 0.8, "linestyle": (0, (1, 3))}
#: The panels of biases: measures, what they are called, and what no bias is.
BIAS_PANELS = (
    (("share_first",), "share won by the reply shown first", 0.5),
    (("log_odds_per_doubling",), "log-odds of winning for twice the words", 0.0),
    (("points_per_doubling", "points_per_doubling_beyond_reference"), "points for twice the words", 0.0),
)
BEYOND = {"points_per_doubling_beyond_reference": "\nbeyond the reference"}


def _style(number: int) -> dict[str, Any]:
    return {"color": COLOURS[number % len(COLOURS)], "marker": MARKERS[number % len(MARKERS)]}


def _noted(axes: Axes, text: str) -> None:
    axes.text(0.99, 0.02, text, transform=axes.transAxes, ha="right", fontsize=7, alpha=0.7)


def pair_strengths(frame: pd.DataFrame) -> Figure:
    """Bradley-Terry strength and win rate by dose with their intervals, one line a judge; a hollow mark has no interval."""
    figure, (left, right) = blank(2, 4.4, 3.4)
    for number, (judge, part) in enumerate(frame.groupby("judge")):
        part, style = part.sort_values("multiplier"), _style(number)
        left.plot(part["multiplier"], part["strength"], label=judge, markerfacecolor="none" if part["lower"].isna().any() else None, **style)
        left.fill_between(part["multiplier"], part["lower"], part["upper"], color=style["color"], alpha=0.18, linewidth=0)
        right.plot(part["multiplier"], part["win_rate"], label=judge, **style)
        right.fill_between(part["multiplier"], part["win_rate_lower"], part["win_rate_upper"], color=style["color"], alpha=0.18, linewidth=0)
    left.axhline(0, **ZERO)
    right.axhline(0.5, **ZERO)
    left.set(xlabel=DOSE, ylabel="strength (log-odds, mean 0)", title="Bradley-Terry strength")
    right.set(xlabel=DOSE, ylabel="share of pairs won", ylim=(-0.02, 1.02), title="Win rate")
    left.legend(fontsize=8)
    _noted(right, "bands: 95% bootstrap over items")
    return figure


def elo_order(frame: pd.DataFrame) -> Figure:
    """Elo by dose in the order of the table, and where it lies over shuffles of the same answers."""
    figure, (axes,) = blank()
    for number, (judge, part) in enumerate(frame.groupby("judge")):
        part, style = part.sort_values("multiplier"), _style(number)
        axes.fill_between(part["multiplier"], part["elo_low"], part["elo_high"], color=style["color"], alpha=0.25, linewidth=0)
        axes.plot(part["multiplier"], part["elo"], label=f"{judge}, order of the table", linestyle="--", **style)
    axes.set(xlabel=DOSE, ylabel="Elo rating (K = 32, from 1500)", title="Elo depends on the order of the answers")
    axes.legend(fontsize=8)
    _noted(axes, "bands: 95% of shuffles of the same answers; no uncertainty of the answers is in them")
    return figure


def judge_agreement(frame: pd.DataFrame) -> Figure:
    """Coefficients of agreement with their intervals, one mark a rubric and pair of judges."""
    figure, (axes,) = blank(1, 6.4, 3.8)
    shown = frame[frame["measure"].isin(list(COEFFICIENTS)) & frame["estimate"].notna()]
    names = [name for name in COEFFICIENTS if (shown["measure"] == name).any()]
    groups = list(shown.groupby(["rubric", "judge_a", "judge_b"]))
    for number, ((rubric, first, second), part) in enumerate(groups):
        part = part.set_index("measure").reindex(names)
        places = [place + (number - (len(groups) - 1) / 2) * 0.8 / max(len(groups), 1) for place in range(len(names))]
        errors = [part["estimate"] - part["lower"], part["upper"] - part["estimate"]]
        label = f"{rubric}: {'all judges' if first == second else f'{first}, {second}'}"
        axes.errorbar(part["estimate"], places, xerr=errors, linestyle="none", capsize=2, label=label, **_style(number))
    axes.axvline(0, **ZERO)
    axes.set_yticks(range(len(names)), [COEFFICIENTS[name] for name in names])
    axes.invert_yaxis()
    axes.set(xlabel="agreement (1: perfect), 95% bootstrap over items", xlim=(min(-0.05, axes.get_xlim()[0]), 1.05), title="Agreement of judges")
    figure.legend(loc="outside lower center", ncols=2, fontsize=8, frameon=False)
    return figure


def judge_biases(frame: pd.DataFrame) -> Figure:
    """Biases that could be measured with their intervals, given the doses: a panel a kind and a mark a judge and rubric."""
    shown = frame[frame["estimate"].notna()].astype({"lower": float, "upper": float})  # of one item there is no interval
    kinds = [kind for kind in BIAS_PANELS if shown["measure"].isin(kind[0]).any()]
    figure, panels = blank(max(len(kinds), 1), 4.0, 3.0)
    for axes, (measures, label, none) in zip(panels, kinds, strict=False):
        part = shown[shown["measure"].isin(measures)].reset_index(drop=True)
        names = part["judge"] + " (" + part["rubric"] + ")" + part["measure"].map(BEYOND).fillna("")
        for place, row in part.iterrows():
            errors = [[row["estimate"] - row["lower"]], [row["upper"] - row["estimate"]]]
            axes.errorbar(row["estimate"], place, xerr=errors, capsize=3, **_style(int(place)))
        axes.axvline(none, **ZERO)
        axes.set_yticks(part.index, names, fontsize=8)
        axes.set(xlabel=f"{label}, 95% interval", ylim=(len(part) - 0.5, -0.5))
    return figure


def corrected_dose_response(frame: pd.DataFrame, rubric: str, judge: str) -> Figure:
    """The judge's dose-response, the reference's, and the judge's corrected by the reference; beside them what the correction adds at each dose."""
    figure, (left, right) = blank(2, 4.6, 3.4)
    means = frame[(frame["rubric"] == rubric) & (frame["judge"] == judge) & (frame["quantity"] == "mean") & frame["estimate"].notna()]
    for number, (name, label) in enumerate(CURVES.items()):
        part, style = means[means["estimator"] == name].sort_values("multiplier"), _style(number)
        left.plot(part["multiplier"], part["estimate"], label=label, **style)
        left.fill_between(part["multiplier"], part["lower"], part["upper"], color=style["color"], alpha=0.18, linewidth=0)
    part = means[means["estimator"] == "rectifier"].sort_values("multiplier")
    errors = [part["estimate"] - part["lower"], part["upper"] - part["estimate"]]
    right.errorbar(part["multiplier"], part["estimate"], yerr=errors, capsize=2, **_style(3))
    right.axhline(0, **ZERO)
    left.set(xlabel=DOSE, ylabel=f"{rubric} score", title=f"{rubric.replace('_', ' ').capitalize()} by dose")
    right.set(xlabel=DOSE, ylabel="reference less judge (points)", title=f"What {judge} lacks")
    left.legend(fontsize=8)
    _noted(left, "bands and bars: 95%, clustered by item")
    return figure
