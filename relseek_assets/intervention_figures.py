"""Figures of interventions under hostile personas, of drift along conversations, and of the judge of assistant-likeness.

Here belong drawings of tables that exist; nothing is computed but the mean line of a kind of conversation. What figures share is in `figures.py`,
directions are in `axis_figures.py`.
"""

from __future__ import annotations

from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from relseek_assets.figures import COLOURS, MARKERS, blank

LOOKS: dict[str, dict[str, Any]] = {
    "floor": {"color": COLOURS[0], "marker": "o", "label": "floor, by percentile"},
    "add": {"color": COLOURS[1], "marker": "s", "label": "addition, by strength"},
}
PLAIN: dict[str, Any] = {"color": "black", "marker": "D", "markersize": 7, "zorder": 5}
CROSSED = "bars: 95% bootstrap intervals over personas and prompts"
LIKENESS, COHERENCE = "assistant-likeness (0 to 10)", "coherence (1 to 10)"


def likeness_against_coherence(frame: pd.DataFrame) -> Figure:
    """Mean assistant-likeness against mean coherence: a path a kind of intervention, from none through its strengths."""
    figure, (axes,) = blank(1, 6.0, 4.2)
    plain = frame[frame["intervention"] == "none"].iloc[0]
    for kind, look in LOOKS.items():
        path = pd.concat([frame[frame["intervention"] == "none"], frame[frame["intervention"] == kind].sort_values("amount")])
        axes.plot(path["coherence"], path["likeness"], color=look["color"], linewidth=1)
        for row in path.iloc[1:].itertuples():
            axes.errorbar(row.coherence, row.likeness, **_bars(row), linestyle="none", capsize=2, **{**look, "label": None})
            axes.annotate(_short(row), (row.coherence, row.likeness), xytext=(5, 4), textcoords="offset points", fontsize=7, color=look["color"])
        axes.plot([], [], linestyle="-", **look)
    axes.errorbar(plain.coherence, plain.likeness, **_bars(plain), linestyle="none", capsize=2, label="no intervention", **PLAIN)
    axes.set(xlabel=COHERENCE, ylabel=LIKENESS, title="Replies under hostile personas")
    axes.legend(fontsize=8)
    axes.text(0.99, 0.01, f"{CROSSED}; n = {plain.n} replies each", transform=axes.transAxes, ha="right", fontsize=7, alpha=0.7)
    return figure


def _short(row: Any) -> str:
    return f"p{row.amount:g}" if row.intervention == "floor" else f"{row.amount:g}"


def _bars(row: Any) -> dict[str, Any]:
    return {
        "xerr": [[row.coherence - row.coherence_lower], [row.coherence_upper - row.coherence]],
        "yerr": [[row.likeness - row.likeness_lower], [row.likeness_upper - row.likeness]],
    }


def by_strength(frame: pd.DataFrame) -> Figure:
    """Likeness and coherence by strength, additions beside floors, as the published figures show them; the line across is no intervention."""
    figure, panels = blank(2, 4.4, 3.4)
    plain = frame[frame["intervention"] == "none"].iloc[0]
    names = {"add": "strength of the addition (gaps of the axis)", "floor": "percentile of ordinary assistant replies"}
    for axes, (kind, label) in zip(panels, names.items(), strict=True):
        part = frame[frame["intervention"] == kind].sort_values("amount")
        for number, (quantity, unit) in enumerate((("likeness", "assistant-likeness"), ("coherence", "coherence"))):
            error = [part[quantity] - part[f"{quantity}_lower"], part[f"{quantity}_upper"] - part[quantity]]
            axes.errorbar(part["amount"], part[quantity], yerr=error, color=COLOURS[number], marker=MARKERS[number], capsize=2, label=unit)
            axes.axhline(plain[quantity], color=COLOURS[number], linestyle="--", linewidth=1)
        axes.set(xlabel=label, ylabel="score", ylim=(-0.2, 10.2), title={"add": "Adding", "floor": "Flooring"}[kind])
    panels[0].legend(fontsize=8)
    panels[1].text(0.99, 0.01, f"dashed: no intervention; {CROSSED}", transform=panels[1].transAxes, ha="right", fontsize=6.5, alpha=0.7)
    return figure


def matched_coherence(frame: pd.DataFrame) -> Figure:
    """Most likeness at a given loss of coherence, by flooring and by adding, and their difference."""
    figure, (left, right) = blank(2, 4.4, 3.4)
    part = frame.sort_values("loss")
    for kind, look in LOOKS.items():
        left.plot(part["loss"], part[kind], color=look["color"], marker=look["marker"], label={"floor": "flooring", "add": "adding"}[kind])
        left.fill_between(part["loss"], part[f"{kind}_lower"], part[f"{kind}_upper"], color=look["color"], alpha=0.15, linewidth=0)
    for matched, colour, face in ((True, "black", "black"), (False, "grey", "white")):
        mine = part[(part["finding"] != "unmatched") == matched]
        error = [mine["difference"] - mine["difference_lower"], mine["difference_upper"] - mine["difference"]]
        right.errorbar(mine["loss"], mine["difference"], yerr=error, color=colour, marker="D", markerfacecolor=face, capsize=2, linestyle="none")
    note = "hollow: one of the two never costs so much coherence"
    right.text(0.99, 0.01, note, transform=right.transAxes, ha="right", fontsize=7, alpha=0.7)
    right.axhline(0, color="grey", linewidth=0.8)
    left.set(xlabel="coherence that may be lost (points)", ylabel=f"most {LIKENESS}", title="At matched coherence")
    right.set(xlabel="coherence that may be lost (points)", ylabel="flooring minus adding (points)", title="Difference, 95% interval")
    left.legend(fontsize=8)
    return figure


def drift(frame: pd.DataFrame) -> Figure:
    """Projection of the reply by turn: a panel a condition, a colour a kind of conversation, thin lines single conversations."""
    conditions = list(dict.fromkeys(frame["condition"]))
    figure, panels = blank(len(conditions), 4.6, 3.6)
    low, high = frame["projection"].min(), frame["projection"].max()
    margin = 0.05 * (high - low)
    for axes, condition in zip(panels, conditions, strict=True):
        for number, (kind, part) in enumerate(frame[frame["condition"] == condition].groupby("kind")):
            colour = COLOURS[number % len(COLOURS)]
            for _, one in part.groupby("conversation"):
                axes.plot(one["turn"], one["projection"], color=colour, linewidth=0.7, alpha=0.5)
            mean = part.groupby("turn")["projection"].mean()
            axes.plot(mean.index, mean, color=colour, marker=MARKERS[number % len(MARKERS)], markersize=4, label=str(kind))
        title = "no intervention" if condition == "none" else str(condition)
        axes.set(xlabel="turn", ylabel="projection of the reply (stream units)", title=title, ylim=(low - margin, high + margin))
    panels[0].legend(fontsize=8)
    panels[-1].text(0.99, 0.01, "thick: mean of a kind; thin: conversations", transform=panels[-1].transAxes, ha="right", fontsize=7, alpha=0.7)
    return figure


def likeness_by_persona(frame: pd.DataFrame) -> Figure:
    """Mean score of each persona's replies, judged by fits that saw neither the persona nor the query."""
    rows = frame[frame["metric"] == "mean_score"].sort_values("value").reset_index(drop=True)
    figure, (axes,) = blank(1, 6.0, 0.8 + 0.2 * len(rows))
    for number, kind in enumerate(("assistant", "other")):
        mine = rows[rows["persona_kind"] == kind]
        error = [mine["value"] - mine["lower"], mine["upper"] - mine["value"]]
        axes.errorbar(mine["value"], mine.index, xerr=error, linestyle="none", color=COLOURS[number], marker=MARKERS[number], capsize=2, label=kind)
    axes.set_yticks(rows.index, [name.replace("_", " ") for name in rows["persona"]], fontsize=7)
    axes.set(xlabel=f"{LIKENESS}, held out; bars: 95% bootstrap over queries", xlim=(0, 10), title="Judged likeness by persona")
    axes.legend(fontsize=8, loc="lower right")
    return figure
