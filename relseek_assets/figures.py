"""Figures of a study: one idea each, axes with units, uncertainty shown, colours that the colour-blind can tell apart.

Here belong drawings of tables that exist; no number is computed here. Every function takes a table as its stage wrote it.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from typing import Any

import matplotlib as mpl
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

# Okabe and Ito's palette
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
MOST_NAMED = 12  # lines or points that a legend has room for
STYLE: Any = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "grid.linewidth": 0.6,
    "svg.hashsalt": "relseek",
    "svg.fonttype": "none",
    "legend.frameon": False,
}
DOSE = "multiplier λ"
DPI = 110  # the resolution of the UI's side panel; figures are laid out at it too, or labels would be cut


def blank(columns: int = 1, width: float = 5.4, height: float = 3.4) -> tuple[Figure, list[Axes]]:
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(width * columns, height), dpi=DPI, layout="constrained")
        FigureCanvasAgg(figure)
        return figure, [figure.add_subplot(1, columns, column + 1) for column in range(columns)]


def png(figure: Figure) -> str:
    """The figure as base64 PNG, at the resolution of the UI's side panel."""
    stream = io.BytesIO()
    with mpl.rc_context(STYLE):
        _lay_out(figure)
        figure.savefig(stream, format="png", metadata={"Software": None})
    return base64.b64encode(stream.getvalue()).decode()


def _lay_out(figure: Figure) -> None:
    """Place the axes once; saving would do it twice."""
    engine = figure.get_layout_engine()
    if engine is not None:
        engine.execute(figure)
        figure.set_layout_engine("none")


def svg(figure: Figure) -> str:
    """The figure as an SVG element to set into a page."""
    stream = io.StringIO()
    with mpl.rc_context(STYLE):
        _lay_out(figure)
        figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": None})
    return stream.getvalue()[stream.getvalue().index("<svg") :]


def _styled(frame: pd.DataFrame, by: list[str]) -> Iterator[tuple[str, pd.DataFrame, dict[str, Any]]]:
    for number, (names, part) in enumerate(frame.groupby(by)):
        label = " ".join(f"epoch {name}" if isinstance(name, int) else str(name) for name in (names if isinstance(names, tuple) else (names,)))
        marker = MARKERS[(number + number // len(COLOURS)) % len(MARKERS)]  # the eighth line has the first's colour and another marker
        yield label, part, {"color": COLOURS[number % len(COLOURS)], "marker": marker}


def _epoch_ticks(axes: Axes, frame: pd.DataFrame) -> None:
    """A tick an epoch; of more than ten epochs every second or further one, the last among them."""
    epochs = sorted(frame["epoch"].unique(), reverse=True)
    axes.set_xticks(epochs[:: -(-len(epochs) // 10)])


def dose_response(frame: pd.DataFrame, rubric: str) -> Figure:
    """Mean score by dose with its interval, one line a site and epoch, and a judge where there are several."""
    figure, (axes,) = blank()
    part = frame[frame["rubric"] == rubric]
    by = ["site", "epoch", *(["judge"] if part["judge"].nunique() > 1 else [])]
    for label, line, style in _styled(part, by):
        line = line.sort_values("multiplier")
        axes.plot(line["multiplier"], line["estimate"], label=label, **style)
        axes.fill_between(line["multiplier"], line["lower"], line["upper"], color=style["color"], alpha=0.18, linewidth=0)
    axes.set(xlabel=DOSE, ylabel=f"{rubric} score (1 to 10)", ylim=(0.8, 10.2), title=f"{rubric.replace('_', ' ').capitalize()} by dose")
    axes.legend(fontsize=8)
    axes.text(0.99, 0.02, "bands: 95% bootstrap intervals over prompts", transform=axes.transAxes, ha="right", fontsize=7, alpha=0.7)
    return figure


def judge_scores(frame: pd.DataFrame) -> Figure:
    """Share of replies at each score with its interval, one panel a rubric and one line a judge."""
    rubrics = list(dict.fromkeys(frame["rubric"]))
    figure, panels = blank(len(rubrics), 4.2, 3.2)
    for axes, rubric in zip(panels, rubrics, strict=True):
        of_rubric = frame[frame["rubric"] == rubric]
        judges = of_rubric["judge"].nunique()
        for number, (name, line, style) in enumerate(_styled(of_rubric, ["judge"])):
            beside = line["score"] + 0.16 * (number - (judges - 1) / 2)  # or the bars of one judge would hide another's
            error = [line["share"] - line["lower"], line["upper"] - line["share"]]
            axes.errorbar(beside, line["share"], yerr=error, capsize=2, linewidth=1, markersize=4, label=f"{name}, n = {line['n'].iloc[0]}", **style)
        axes.set(xlabel=f"{rubric} score, rounded", ylabel="share of replies, 95% interval", ylim=(-0.03, 1.25), title=rubric.capitalize())
        axes.set_xticks(sorted(of_rubric["score"].unique()))
        axes.legend(fontsize=7)
    return figure


def training_curves(frame: pd.DataFrame) -> Figure:
    """Held-out loss and sign-correct accuracy by epoch, at both signs of d."""
    figure, (left, right) = blank(2, 4.2, 3.2)
    for label, line, style in _styled(frame, ["site"]):
        for sign, dash in ((1, "-"), (-1, "--")):
            part = line[line["direction"] == sign].sort_values("epoch")
            left.plot(part["epoch"], part["loss"], linestyle=dash, label=f"{label} d={sign:+d}", **style)
            error = (part["accuracy"] * (1 - part["accuracy"]) / part["n"]) ** 0.5
            right.errorbar(part["epoch"], part["accuracy"], yerr=error, linestyle=dash, capsize=2, **style)
    for axes in (left, right):
        _epoch_ticks(axes, frame)
    left.set(xlabel="epoch", ylabel="held-out loss (nats)", ylim=(0, 1.08 * frame["loss"].max()), title="BiPO loss")
    right.set(xlabel="epoch", ylabel="sign-correct accuracy", ylim=(0, 1.05), title="Accuracy ± standard error")
    left.legend(fontsize=7)
    return figure


def margin_curves(frame: pd.DataFrame) -> Figure:
    """Held-out margin of rewards by epoch, at both signs of d."""
    figure, (axes,) = blank()
    for label, line, style in _styled(frame, ["site"]):
        for sign, dash in ((1, "-"), (-1, "--")):
            part = line[line["direction"] == sign].sort_values("epoch")
            axes.plot(part["epoch"], part["margin"], linestyle=dash, label=f"{label} d={sign:+d}", **style)
    axes.axhline(0, color="grey", linewidth=0.6)
    _epoch_ticks(axes, frame)
    axes.set(xlabel="epoch", ylabel="β (log-ratio chosen - rejected) (nats)", title="Held-out margin")
    axes.legend(fontsize=7)
    return figure


def vector_cosines(frame: pd.DataFrame) -> Figure:
    """Cosine of each epoch's vector with the last, one line a site."""
    figure, (axes,) = blank()
    for label, line, style in _styled(frame.dropna(subset=["cosine_to_last"]), ["site"]):
        axes.plot(line["epoch"], line["cosine_to_last"], label=label, **style)
    axes.set(xlabel="epoch", ylabel="cosine with the last epoch's vector", title="Direction by epoch")
    axes.set_ylim(top=1.02)
    _epoch_ticks(axes, frame)
    axes.legend(fontsize=8)
    return figure


def cosine_matrix(frame: pd.DataFrame) -> Figure:
    """Cosine of every pair of vectors, as a square a pair."""
    figure, (axes,) = blank(1, 6.0, 5.2)
    ends = [frame[f"site_{side}"] + " " + frame[f"step_{side}"] for side in "ab"]
    studies = {*frame["study_a"], *frame["study_b"]}
    if len(studies) > 1:
        ends = [frame[f"study_{side}"] + " " + end for side, end in zip("ab", ends, strict=True)]
    if len({*frame["site_a"], *frame["site_b"]}) == 1:
        ends = [frame["step_a"], frame["step_b"]]
    names = list(dict.fromkeys([*ends[0], *ends[1]]))
    matrix = pd.DataFrame(float("nan"), names, names)
    for first, second, cosine in zip(*ends, frame["cosine"], strict=True):
        matrix.loc[first, second] = matrix.loc[second, first] = cosine
    for name in names:
        matrix.loc[name, name] = 1.0
    picture = axes.imshow(matrix.to_numpy(), vmin=-1, vmax=1, cmap=mpl.colormaps["PuOr_r"].with_extremes(bad="0.85"))
    axes.grid(visible=False)
    axes.set_xticks(range(len(names)), names, rotation=90, fontsize=7)
    axes.set_yticks(range(len(names)), names, fontsize=7)
    if len(names) <= 10:
        for row, first in enumerate(names):
            for column, second in enumerate(names):
                value = matrix.loc[first, second]
                if value == value:
                    axes.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=7, color="white" if abs(value) > 0.7 else "black")
    figure.colorbar(picture, ax=axes, label="cosine")
    axes.set_title("Cosine between vectors (grey: not compared)")
    return figure


def axis_alignment(frame: pd.DataFrame) -> Figure:
    """Cosine of each vector with a persona axis by the axis's layer, a line a vector and extraction; the vector's own layer is marked."""
    figure, (axes,) = blank(1, 6.4, 3.6)
    for label, line, style in _styled(frame, ["site_a", "step_a", "step_b"]):
        line = line.sort_values("layer_b")
        own = line[line["layer_b"] == line["layer_a"]]
        axes.plot(line["layer_b"], line["cosine"], color=style["color"], label=label)
        axes.plot(own["layer_b"], own["cosine"], linestyle="none", **style)
    axes.axhline(0, color="grey", linewidth=0.6)
    axes.set(xlabel="layer of the axis", ylabel="cosine with the axis", title="Vectors along the persona axis (marked: own layer)")
    axes.legend(fontsize=7)
    return figure


def vector_norms(frame: pd.DataFrame) -> Figure:
    """Norm of the vector by epoch, one line a site."""
    figure, (axes,) = blank()
    for label, line, style in _styled(frame, ["site"]):
        axes.plot(line["epoch"], line["norm"], label=label, **style)
    axes.set(xlabel="epoch", ylabel="norm of v (residual-stream units)", ylim=(0, 1.08 * frame["norm"].max()), title="Vector norm by epoch")
    _epoch_ticks(axes, frame)
    axes.legend(fontsize=8)
    return figure


def sweep_curves(frame: pd.DataFrame) -> Figure:
    """log10 perplexity and propensity by dose, mean ± sd over items."""
    figure, panels = blank(2, 4.2, 3.2)
    for axes, quantity, unit in zip(panels, ("perplexity", "propensity"), ("log10, unsteered model", "nats a token"), strict=True):
        for label, line, style in _styled(frame[frame["quantity"] == quantity], ["site", "epoch"]):
            line = line.sort_values("multiplier")
            axes.errorbar(line["multiplier"], line["mean"], yerr=line["sd"], capsize=2, label=label, **style)
        axes.set(xlabel=DOSE, ylabel=f"{quantity} ({unit})", title=f"{quantity.capitalize()}, mean ± sd")
    panels[0].legend(fontsize=7)
    return figure


def metric_dose_response(frame: pd.DataFrame) -> Figure:
    """Perplexity and propensity by dose with their intervals, one line a site and epoch."""
    figure, panels = blank(2, 4.2, 3.2)
    for axes, quantity, label in zip(panels, ("log10_perplexity", "propensity"), ("log10 perplexity", "propensity (nats a token)"), strict=True):
        for name, line, style in _styled(frame[frame["quantity"] == quantity], ["site", "epoch"]):
            line = line.sort_values("multiplier")
            axes.plot(line["multiplier"], line["estimate"], label=name, **style)
            axes.fill_between(line["multiplier"], line["lower"], line["upper"], color=style["color"], alpha=0.18, linewidth=0)
        axes.set(xlabel=DOSE, ylabel=label, title=f"{quantity.replace('_', ' ').capitalize()} of published replies")
    panels[0].legend(fontsize=7)
    return figure


def pareto(frame: pd.DataFrame) -> Figure:
    """Candidates by coherence and steerability; the Pareto set filled, the chosen one ringed."""
    figure, (axes,) = blank()
    slope = "pairwise_slope" if frame["pairwise_slope"].notna().any() else "rating_slope"
    few = len(frame) <= MOST_NAMED  # of many candidates the legend names those that matter
    for number, row in enumerate(frame.itertuples()):
        x, y = row.coherence_auc, getattr(row, slope)
        colour = COLOURS[number % len(COLOURS)]
        axes.errorbar(
            x,
            y,
            xerr=[[x - row.coherence_auc_lower], [row.coherence_auc_upper - x]],
            yerr=[[y - getattr(row, f"{slope}_lower")], [getattr(row, f"{slope}_upper") - y]],
            color=colour,
            marker=MARKERS[number % len(MARKERS)],
            markerfacecolor=colour if row.pareto else "white",
            markersize=8,
            capsize=2,
            linestyle="none",
            label=f"{row.site} epoch {row.epoch}" + (" (selected)" if row.selected else "") if row.pareto or row.selected or few else None,
        )
        if row.selected:
            axes.plot(x, y, marker="o", markersize=16, markerfacecolor="none", markeredgecolor=colour)
    axes.set(xlabel="coherence AUC (score × λ)", ylabel=f"{slope.replace('_', ' ')} (per λ)", title="Coherence against steerability")
    axes.legend(fontsize=7)
    axes.text(0.99, 0.02, "filled: Pareto set; bars: 95% bootstrap over prompts", transform=axes.transAxes, ha="right", fontsize=7, alpha=0.7)
    return figure


def weight_sensitivity(frame: pd.DataFrame) -> Figure:
    """Share of bootstrap draws in which each candidate wins, by the weight on coherence."""
    figure, (axes,) = blank()
    few = len(frame.groupby(["site", "epoch"])) <= MOST_NAMED
    for label, line, style in _styled(frame, ["site", "epoch"]):
        line = line.sort_values("weight")
        axes.plot(line["weight"], line["share"], label=label if few or line["share"].any() else None, **style)
    axes.set(xlabel="weight on coherence", ylabel="share of bootstrap draws won", ylim=(-0.02, 1.02), title="Selection by weight")
    axes.legend(fontsize=7)
    return figure


def judge_calibration(frame: pd.DataFrame) -> Figure:
    """Observed share of target replies by predicted probability, with Wilson intervals over conversations."""
    figure, (axes,) = blank(1, 4.2, 3.6)
    axes.plot([0, 1], [0, 1], color="grey", linestyle=":", label="perfect calibration")
    errors = [frame["observed"] - frame["lower"], frame["upper"] - frame["observed"]]
    axes.errorbar(frame["predicted"], frame["observed"], yerr=errors, color=COLOURS[0], marker="o", capsize=2, label="cross-validated")
    axes.set(xlabel="predicted probability of target", ylabel="observed share of target", xlim=(0, 1), ylim=(0, 1.02), title="Judge calibration")
    axes.legend(fontsize=8)
    return figure


def graded_replies(frame: pd.DataFrame) -> Figure:
    """The judge's score of each graded reply by its author's score."""
    figure, (axes,) = blank(1, 4.2, 3.6)
    axes.plot([1, 10], [1, 10], color="grey", linestyle=":")
    groups = [(score, part["judged"].to_numpy()) for score, part in frame.groupby("author")]
    axes.boxplot([values for _, values in groups], positions=[score for score, _ in groups], widths=0.6, manage_ticks=False, showfliers=True)
    axes.set(xlabel="author's score", ylabel="judge's score", xlim=(0, 11), ylim=(0.5, 10.5), title="Graded replies")
    return figure


def length_distribution(frame: pd.DataFrame) -> Figure:
    """Quartiles of reply length by prompt type, target beside anti-target."""
    figure, (axes,) = blank(1, 6.4, 3.4)
    for offset, side, colour in ((-0.17, "target", COLOURS[0]), (0.17, "antitarget", COLOURS[1])):
        boxes = [
            {
                "label": row["prompt_type"],
                "whislo": row[f"{side}_p0"],
                "q1": row[f"{side}_p25"],
                "med": row[f"{side}_p50"],
                "q3": row[f"{side}_p75"],
                "whishi": row[f"{side}_p100"],
            }
            for row in frame.to_dict("records")
        ]
        drawn = axes.bxp(
            boxes, positions=[place + offset for place in range(len(boxes))], widths=0.28, showfliers=False, patch_artist=True, manage_ticks=False
        )
        for box in drawn["boxes"]:
            box.set(facecolor=colour, alpha=0.45)
        drawn["boxes"][0].set_label(side)
    axes.set_xticks(range(len(frame)), frame["prompt_type"])
    axes.set(xlabel="prompt type", ylabel="reply length (words)", title="Reply length by prompt type")
    axes.legend(fontsize=8)
    return figure
