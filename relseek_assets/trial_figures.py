"""Figures of a trial: one idea each, uncertainty shown, drawn from tables that exist.

Here belong drawings; no number is computed here. Colours and sizes come from `relseek_assets/figures.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from relseek_assets.figures import COLOURS, DPI, MARKERS, STYLE
from relseek_assets.trial import Trial

Draw = Callable[[Axes, pd.DataFrame, Trial], None]

MOST_INTERVALS = 60  # in one panel of trajectories; more hide the means


def _name(outcome: str) -> str:
    return outcome.replace("_", " ")


def _unit(trial: Trial, table: pd.DataFrame) -> str:
    outcome = trial.outcome(str(table["outcome"].iloc[0]))
    return "share of participants" if outcome.model == "logit" else outcome.unit or "units"


def panels(table: pd.DataFrame, draw: Draw, trial: Trial, width: float = 3.4, height: float = 2.7, left: float = 0.6) -> Figure:
    """Small multiples, one panel an outcome, three in a row.

    Margins are given in inches and not found by a layout engine, which would take longer than all the drawing.
    """
    outcomes = list(dict.fromkeys(table["outcome"]))
    columns, rows = min(3, len(outcomes)), math.ceil(len(outcomes) / 3)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(width * columns, height * rows), dpi=DPI)
        FigureCanvasAgg(figure)
        grid = figure.add_gridspec(rows, columns, **margins(columns, rows, width, height, left))
        for place, outcome in enumerate(outcomes):
            axes = figure.add_subplot(grid[place // 3, place % 3])
            draw(axes, table[table["outcome"] == outcome], trial)
            if place and (legend := axes.get_legend()) is not None:
                legend.remove()
            axes.title.set_fontsize(9)
            axes.xaxis.label.set_fontsize(8)
            axes.yaxis.label.set_fontsize(7)
            axes.tick_params(labelsize=7)
    return figure


def margins(columns: int, rows: int, width: float, height: float, left: float) -> dict[str, float]:
    """A grid whose panels of `width` by `height` inches leave `left` for tick labels, and room for titles and axis labels."""
    right, top, bottom = 0.12, 0.28, 0.45
    inner_width, inner_height = width - left - right, height - top - bottom
    return {
        "left": left / (width * columns),
        "right": 1 - right / (width * columns),
        "bottom": bottom / (height * rows),
        "top": 1 - top / (height * rows),
        "wspace": (left + right) / inner_width,
        "hspace": (top + bottom) / inner_height,
    }


def dose_responses(table: pd.DataFrame, trial: Trial) -> Figure:
    """Every outcome's dose-response."""
    return panels(table, _dose_response, trial)


def trajectory_panels(table: pd.DataFrame, trial: Trial) -> Figure:
    """Every outcome's trajectories."""
    return panels(table, _trajectories, trial)


def multiverses(table: pd.DataFrame, trial: Trial) -> Figure:
    """Every outcome's specifications."""
    return panels(table, _multiverse, trial, 4.2, 3.2, 1.9)


def dose_response(table: pd.DataFrame, trial: Trial) -> Figure:
    """Marginal means along the dose with their band, and raw means of participants with theirs."""
    return _alone(_dose_response, table, trial)


def _alone(draw: Draw, table: pd.DataFrame, trial: Trial) -> Figure:
    """One panel in the size of the UI's side panel."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(5.4, 3.4), dpi=DPI)
        FigureCanvasAgg(figure)
        draw(figure.add_subplot(figure.add_gridspec(1, 1, **margins(1, 1, 5.4, 3.4, 0.7))[0]), table, trial)
    return figure


def _dose_response(axes: Axes, table: pd.DataFrame, trial: Trial) -> None:
    model, raw = table[table["kind"] == "model"], table[table["kind"] == "raw"]
    axes.plot(model["dose"], model["estimate"], color=COLOURS[0], label="additive model")
    axes.fill_between(model["dose"], model["lower"], model["upper"], color=COLOURS[0], alpha=0.18, linewidth=0)
    error = [raw["estimate"] - raw["lower"], raw["upper"] - raw["estimate"]]
    axes.errorbar(raw["dose"], raw["estimate"], yerr=error, color=COLOURS[1], marker="o", linestyle="none", capsize=2, label="raw means")
    study = str(table["study"].iloc[0]).replace("_", " ")
    axes.set(xlabel=f"{trial.dose.long_label} {trial.dose.symbol}", ylabel=_unit(trial, table), title=f"{_name(table['outcome'].iloc[0])}, {study}")
    axes.set_xticks(trial.dose.doses)
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.legend(fontsize=8)
    axes.text(0.99, 0.02, "95% intervals", transform=axes.transAxes, ha="right", fontsize=7, alpha=0.7)


def trajectories(table: pd.DataFrame, trial: Trial) -> Figure:
    """Means over time, one colour an arm: points are raw, lines the model."""
    return _alone(_trajectories, table, trial)


def _trajectories(axes: Axes, table: pd.DataFrame, trial: Trial) -> None:
    doses = sorted(table["dose"].unique())
    palette = mpl.colormaps["cividis"](np.linspace(0.0, 0.9, len(doses)))
    spread = 0.06 * (table["time"].max() - table["time"].min()) / max(1, len(doses) - 1)
    crowded = table["time"].nunique() * len(doses) > MOST_INTERVALS
    for place, dose in enumerate(doses):
        model = table[(table["dose"] == dose) & (table["kind"] == "model")].sort_values("time")
        raw = table[(table["dose"] == dose) & (table["kind"] == "raw")].sort_values("time")
        axes.plot(model["time"], model["estimate"], color=palette[place], label=f"{trial.dose.symbol} = {dose:g}")
        times = raw["time"] + (place - (len(doses) - 1) / 2) * spread
        error = None if crowded else [raw["estimate"] - raw["lower"], raw["upper"] - raw["estimate"]]
        axes.errorbar(times, raw["estimate"], yerr=error, color=palette[place], marker=MARKERS[place % len(MARKERS)], markersize=4, linestyle="none")
    study, outcome = str(table["study"].iloc[0]), str(table["outcome"].iloc[0])
    axes.set(xlabel=_name(trial.outcome(outcome).designs[study].time), ylabel=_unit(trial, table), title=f"{_name(outcome)} over time")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.legend(fontsize=7)
    caption = f"lines: full model; points: raw means{'' if crowded else ', 95%'}"
    axes.text(0.99, 0.02, caption, transform=axes.transAxes, ha="right", fontsize=7, alpha=0.7)


def forest(table: pd.DataFrame, trial: Trial) -> Figure:
    """Main effects of a family, one row an outcome and study, divided by the width of its interval's scale where units differ."""
    main = table[table["test_type"].str.startswith("main_effect")]
    types = list(dict.fromkeys(main["test_type"]))
    labels = list(dict.fromkeys(zip(main["outcome"], main["study"], strict=True)))
    names = [f"{_name(outcome)}, {study.replace('_', ' ')}" for outcome, study in labels]
    labelled, inner, right, height = 0.2 + 0.06 * max(map(len, names)), 2.7, 0.15, 1.2 + 0.34 * len(labels)  # inches; fixed, as in `panels`
    width = labelled + (inner + right) * len(types)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(width, height), dpi=DPI)
        FigureCanvasAgg(figure)
        edges = {"left": labelled / width, "right": 1 - right / width, "bottom": 0.45 / height, "top": 1 - 0.5 / height, "wspace": right / inner}
        grid = figure.add_gridspec(1, len(types), **edges)
        panels = [figure.add_subplot(grid[place]) for place in range(len(types))]
    for axes, test_type in zip(panels, types, strict=True):
        part = main[main["test_type"] == test_type]
        places = np.array([labels.index(label) for label in zip(part["outcome"], part["study"], strict=True)])
        sure = (part["p_global"] < 0.05).to_numpy()
        for chosen, colour, face in ((sure, COLOURS[0], COLOURS[0]), (~sure, "#777777", "white")):
            rows = part[chosen]
            error = [rows["estimate"] - rows["lower"], rows["upper"] - rows["estimate"]]
            axes.errorbar(rows["estimate"], places[chosen], xerr=error, color=colour, marker="o", markerfacecolor=face, capsize=2, linestyle="none")
        axes.axvline(0, color="black", linewidth=0.8)
        axes.set_yticks(range(len(labels)), names if axes is panels[0] else [], fontsize=8)
        axes.set(ylim=(len(labels) - 0.5, -0.5), xlabel="difference (outcome's unit)", title=str(part["contrast"].iloc[0]).replace(": ", "\n"))
        axes.title.set_fontsize(8)
    panels[-1].text(0.99, 0.02, "filled: adjusted p < 0.05", transform=panels[-1].transAxes, ha="right", fontsize=7, alpha=0.7)
    return figure


def _multiverse(axes: Axes, table: pd.DataFrame, trial: Trial) -> None:
    rows = table[table["term"].str.contains(" - ", regex=False)].reset_index(drop=True)
    places = np.arange(len(rows))
    for offset, prefix, colour, label in ((-0.12, "", COLOURS[0], "model"), (0.12, "bootstrap_", COLOURS[1], "Bayesian bootstrap over participants")):
        made = rows[f"{prefix}lower"].notna()  # few specifications are resampled
        found = rows[made]
        error = [(found["estimate"] - found[f"{prefix}lower"]).clip(lower=0), (found[f"{prefix}upper"] - found["estimate"]).clip(lower=0)]
        axes.errorbar(
            found["estimate"], places[made] + offset, xerr=error, color=colour, marker="o", markersize=4, capsize=2, linestyle="none", label=label
        )
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_yticks(range(len(rows)), [f"{row.specification}, {row.form}" for row in rows.itertuples()])
    axes.set(ylim=(len(rows) - 0.5, -0.5), xlabel=f"{trial.dose.label}: high minus low", title=_name(rows["outcome"].iloc[0]))
    axes.legend(fontsize=7)
