"""Figures of the published instruments: one idea each, uncertainty shown, drawn from an instrument's table alone.

Here belong drawings; no number is computed here. A figure whose rows are not there is left out. Colours and sizes come from
`relseek_assets/figures.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from relseek_assets.figures import COLOURS, MARKERS, blank, png
from relseek_assets.trial import Trial
from relseek_resources.processes import in_order

Drawing = Callable[[pd.DataFrame, Trial], Figure]

CATEGORY = {"neg_lambda": "{} < 0", "zero_lambda": "{} = 0", "pos_lambda": "{} > 0"}
DOSE_LEVELS = {"neg1": -1.0, "neg0.5": -0.5, "zero": 0.0, "pos0.5": 0.5, "pos1": 1.0}
COMPARED = {"relationship_seeking_category": "{0} > 0 against {0} < 0", "domain": "emotchat against polchat", "companionship_condition": "both"}
SIGNIFICANT = 0.05
# name, right end and top, as shares of the axes
QUADRANTS = (
    ("aligned engagement", 0.97, 0.97),
    ("decoupled dependency", 0.49, 0.97),
    ("decoupled satiation", 0.97, 0.06),
    ("aligned disengagement", 0.49, 0.06),
)
BELOW = 0.2  # rows of room below the last, for the note


def _drawn(table: pd.DataFrame, trial: Trial, drawings: Mapping[str, tuple[str, Drawing]]) -> dict[str, str]:
    """Name -> base64 PNG of the rows of one part, those with an estimate or with details."""
    there = table[table["estimate"].notna() | table["details"].notna()]
    found = {name: there[there["part"] == part] for name, (part, _) in drawings.items()}
    pieces = {name: (drawings[name][1], rows, trial) for name, rows in found.items() if len(rows)}
    return dict(zip(pieces, in_order(_picture, pieces.values(), len(pieces)), strict=True))


def _picture(piece: tuple[Drawing, pd.DataFrame, Trial]) -> str:
    draw, rows, trial = piece
    return png(draw(rows, trial))


def _words(name: Any) -> str:
    return str(name).replace("_", " ")


def _note(axes: Axes, text: str) -> None:
    axes.text(0.99, 0.02, text, transform=axes.transAxes, ha="right", fontsize=7, alpha=0.7)


def _reach(rows: pd.DataFrame) -> list[pd.Series]:
    """Distances from the estimates to the ends of their intervals; none where an interval is missing."""
    estimate = rows["estimate"].astype(float)
    return [(estimate - rows["lower"].astype(float)).clip(lower=0).fillna(0), (rows["upper"].astype(float) - estimate).clip(lower=0).fillna(0)]


def _number(column: pd.Series) -> np.ndarray:
    return column.astype(float).to_numpy()


def _doses(trial: Trial) -> str:
    return f"{trial.dose.long_label} {trial.dose.symbol}"


def _forest(axes: Axes, rows: pd.DataFrame, labels: list[str], null: float) -> None:
    """Estimates with their intervals from top to bottom, filled where the adjusted (else the raw) p is below .05."""
    p = rows["p_adjusted"].where(rows["p_adjusted"].notna(), rows["p"]).astype(float)
    sure, places = (p < SIGNIFICANT).to_numpy(), np.arange(len(rows))
    for chosen, colour, face in ((sure, COLOURS[0], COLOURS[0]), (~sure, "#777777", "white")):
        part = rows[chosen]
        axes.errorbar(
            _number(part["estimate"]), places[chosen], xerr=_reach(part), color=colour, marker="o", markerfacecolor=face, capsize=2, linestyle="none"
        )
    axes.axvline(null, color="black", linewidth=0.8)
    axes.set_yticks(places, labels, fontsize=7)
    axes.set_ylim(len(rows) + BELOW, -0.5)


# --- comparisons ------------------------------------------------------------------------------------------------------


def comparisons(table: pd.DataFrame, trial: Trial) -> dict[str, str]:
    return _drawn(table, trial, {"goodbye_by_dose": ("goodbye by dose", _goodbye), "competency": ("competency changes", _competency)})


def _goodbye(rows: pd.DataFrame, trial: Trial) -> Figure:
    figure, (axes,) = blank()
    for number, (study, part) in enumerate(rows.groupby("study")):
        doses = part["term"].map(DOSE_LEVELS).to_numpy(float) + 0.03 * (number - 0.5)
        style: dict[str, Any] = {"color": COLOURS[number], "marker": MARKERS[number], "capsize": 2}
        axes.errorbar(doses, _number(part["estimate"]), yerr=_reach(part), label=_words(study), **style)
    axes.set(xlabel=_doses(trial), ylabel="probability of saying goodbye", ylim=(0, None), title="Goodbye by dose")
    axes.legend(fontsize=8)
    _note(axes, "full logit over levels of the dose, 95%")
    return figure


def _competency(rows: pd.DataFrame, trial: Trial) -> Figure:
    figure, (axes,) = blank(1, 5.4, 0.9 + 0.3 * len(rows))
    scopes = rows["grouping"].map(lambda scope: f", {scope}", na_action="ignore").fillna("")
    labels = [_words(outcome).removesuffix(" diff") + scope for outcome, scope in zip(rows["outcome"], scopes, strict=True)]
    _forest(axes, rows, labels, 0)
    axes.set(xlabel="change after - before (slider points)", title="Change of competency")
    _note(axes, "filled: p < 0.05; bars: 95%")
    return figure


# --- profiles ---------------------------------------------------------------------------------------------------------


def profiles(table: pd.DataFrame, trial: Trial) -> dict[str, str]:
    return _drawn(
        table,
        trial,
        {"quadrants": ("slope density", _quadrants), "harm": ("profile comparisons", _harm), "slopes": ("slopes", _slopes)},
    )


def _quadrants(rows: pd.DataFrame, trial: Trial) -> Figure:
    """Participants by weekly change of liking and of wanting, a panel a category of the dose; the diamond is their mean."""
    figure, panels = blank(len(rows), 3.1, 3.3)
    largest = max(np.max(details["counts"]) for details in rows["details"])
    for axes, row in zip(panels, rows.itertuples(), strict=True):
        x, y = np.array(row.details["liking_edges"]), np.array(row.details["wanting_edges"])
        counts = np.ma.masked_equal(np.array(row.details["counts"]).T, 0)
        mesh = axes.pcolormesh(x, y, counts, cmap="cividis_r", vmin=0, vmax=largest)
        axes.axhline(0, color="black", linewidth=0.8)
        axes.axvline(0, color="black", linewidth=0.8)
        axes.plot(*row.details["means"], marker="D", color=COLOURS[1], markeredgecolor="white")
        axes.set(xlabel="liking (points a week)", title=f"{CATEGORY[row.grouping].format(trial.dose.symbol)}, n = {row.n:.0f}")
        for name, across, up in QUADRANTS:
            axes.text(across, up, name, transform=axes.transAxes, fontsize=6, ha="right", va="top")
    panels[0].set_ylabel("separation distress (points a week)")
    figure.colorbar(mesh, ax=panels, label="participants", shrink=0.8)
    return figure


def _harm(rows: pd.DataFrame, trial: Trial) -> Figure:
    """Rise of decoupled dependency between arms, with the number needed to harm beside it."""
    rows = rows[rows["term"] == "risk_difference"]
    figure, (axes,) = blank(1, 5.8, 1.1 + 0.36 * len(rows))
    compared = [COMPARED[name].format(trial.dose.symbol) for name in rows["grouping"]]
    labels = [f"{_words(outcome)}: {comparison}" for outcome, comparison in zip(rows["outcome"], compared, strict=True)]
    _forest(axes, rows, labels, 0)
    for place, details in enumerate(rows["details"]):
        if details["nnh"] is not None:
            axes.annotate(f"NNH {details['nnh']:.1f}", (rows["upper"].iloc[place], place), (4, -3), textcoords="offset points", fontsize=7)
    axes.margins(x=0.16)
    axes.set(xlabel="rise of decoupled dependency (share)", title="Number needed to harm")
    _note(axes, "filled: one-sided p < 0.05; bars: 95%")
    return figure


def _slopes(rows: pd.DataFrame, trial: Trial) -> Figure:
    outcomes = list(dict.fromkeys(rows["outcome"]))
    units = {"liking": "points a session", "separation_distress": "points a week", "seeking_companionship": "points, after - before"}
    figure, panels = blank(len(outcomes), 3.0, 2.4)
    for axes, outcome in zip(panels, outcomes, strict=True):
        part = rows[rows["outcome"] == outcome]
        _forest(axes, part, [CATEGORY[term].format(trial.dose.symbol) if term in CATEGORY else term for term in part["term"]], 0)
        axes.set(xlabel=units[outcome], title=_words(outcome))
    _note(panels[-1], "means of participants, 95%")
    return figure


# --- vulnerability ----------------------------------------------------------------------------------------------------


def vulnerability(table: pd.DataFrame, trial: Trial) -> dict[str, str]:
    return _drawn(table, trial, {"vulnerability": ("vulnerability", _vulnerability)})


def _vulnerability(rows: pd.DataFrame, trial: Trial) -> Figure:
    """Interactions with the companionship condition, a panel an outcome; estimates in units of their standard errors, as outcomes' units differ."""
    rows = rows[(rows["grouping"] == "interaction") & rows["se"].notna()]
    terms = list(dict.fromkeys(rows["term"]))
    places = {term: place for place, term in enumerate(terms)}
    outcomes = list(dict.fromkeys(rows["outcome"]))
    figure, (axes,) = blank(1, 7.4, 1.4 + 0.3 * len(terms))
    spread = np.linspace(-0.32, 0.32, max(2, len(outcomes)))
    palette = mpl.colormaps["cividis"](np.linspace(0, 0.9, max(2, len(outcomes))))
    for number, outcome in enumerate(outcomes):
        part = rows[rows["outcome"] == outcome]
        se, at = _number(part["se"]), np.array([places[term] for term in part["term"]]) + spread[number]
        scaled, reach = _number(part["estimate"]) / se, [half.to_numpy() / se for half in _reach(part)]
        style: dict[str, Any] = {"color": palette[number], "marker": MARKERS[number % len(MARKERS)], "markersize": 4, "elinewidth": 0.8}
        axes.errorbar(scaled, at, xerr=reach, linestyle="none", label=_words(outcome), **style)
        sure = _number(part["p_adjusted"]) < SIGNIFICANT
        axes.plot(scaled[sure], at[sure], marker="o", markersize=10, markerfacecolor="none", markeredgecolor=COLOURS[1], linestyle="none")
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_yticks(range(len(terms)), [_characteristic(term) for term in terms], fontsize=7)
    axes.set(ylim=(len(terms) + BELOW, -0.5), xlabel="interaction with the companionship condition (standard errors)", title="Vulnerability")
    axes.legend(fontsize=6, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    _note(axes, "ringed: adjusted p < 0.05 within the outcome; bars: 95%")
    return figure


def _characteristic(term: str) -> str:
    name = term.split(":", 1)[-1]
    return _words(name.replace("[T.", ": ").replace("]", "").replace("_binary", "").replace("_coarsened", ""))


# --- attrition --------------------------------------------------------------------------------------------------------


def attrition(table: pd.DataFrame, trial: Trial) -> dict[str, str]:
    return _drawn(table, trial, {"dropout_rates": ("dropout rates", _dropout), "balance": ("balance", _balance)})


def _dropout(rows: pd.DataFrame, trial: Trial) -> Figure:
    """Share that left, by arm; the dotted line is the share of everyone."""
    studies = list(dict.fromkeys(rows["study"]))
    figure, panels = blank(len(studies), 3.6, 1.0 + 0.3 * len(rows) / len(studies))
    for axes, study in zip(panels, studies, strict=True):
        part = rows[rows["study"] == study]
        named = zip(part["grouping"], part["term"], strict=True)
        labels = [f"{trial.dose.symbol} = {term}" if group == "multiplier" else str(term) for group, term in named]
        places, reach = np.arange(len(part)), [100 * half for half in _reach(part)]
        axes.errorbar(100 * _number(part["estimate"]), places, xerr=reach, color=COLOURS[0], marker="o", capsize=2, linestyle="none")
        axes.axvline(100 * float(part["estimate"].iloc[0]), color="grey", linestyle=":")
        axes.set_yticks(places, labels if axes is panels[0] else [], fontsize=7)
        axes.set(ylim=(len(part) + BELOW, -0.5), xlim=(0, None), xlabel="left after treatment began (%)", title=_words(study))
    _note(panels[-1], "bars: exact 95%")
    return figure


def _balance(rows: pd.DataFrame, trial: Trial) -> Figure:
    """p-values of covariates by treatment against the line on which those of random assignment lie."""
    figure, (axes,) = blank(1, 4.2, 3.4)
    for number, (study, part) in enumerate(rows[rows["p"].notna()].groupby("study")):
        p = np.sort(_number(part["p"]))
        axes.plot((np.arange(len(p)) + 0.5) / len(p), p, color=COLOURS[number], marker=MARKERS[number], linestyle="none", label=_words(study))
    axes.plot([0, 1], [0, 1], color="grey", linestyle=":")
    axes.set(xlabel="rank of the test", ylabel="p of the balance test", xlim=(0, 1), ylim=(0, 1), title="Balance of the arms")
    axes.legend(fontsize=8)
    return figure


# --- psychometrics ----------------------------------------------------------------------------------------------------


def psychometrics(table: pd.DataFrame, trial: Trial) -> dict[str, str]:
    return _drawn(
        table,
        trial,
        {
            "psychosocial_loadings": ("psychosocial loadings", _loadings),
            "type_loadings": ("type loadings", _loadings),
            "psychosocial_scores": ("psychosocial scores", _scores),
        },
    )


def _loadings(rows: pd.DataFrame, trial: Trial) -> Figure:
    items, factors = list(dict.fromkeys(rows["outcome"])), list(dict.fromkeys(rows["term"]))
    values = rows.pivot(index="outcome", columns="term", values="estimate").astype(float).loc[items, factors].to_numpy()
    figure, (axes,) = blank(1, 2.6 + 0.55 * len(factors), 1.0 + 0.22 * len(items))
    axes.grid(False)
    drawn = axes.imshow(values, cmap="PuOr", vmin=-1, vmax=1, aspect="auto")
    for (row, column), value in np.ndenumerate(values):
        axes.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=6, color="white" if abs(value) > 0.5 else "black")
    axes.set_xticks(range(len(factors)), [_words(factor) for factor in factors], fontsize=8)
    axes.set_yticks(range(len(items)), [_words(item) for item in items], fontsize=7)
    axes.set_title("Loadings")
    figure.colorbar(drawn, ax=axes, label="loading")
    return figure


def _scores(rows: pd.DataFrame, trial: Trial) -> Figure:
    rows = rows[rows["term"] == "mean"]
    figure, (axes,) = blank(1, 5.0, 1.0 + 0.3 * len(rows))
    _forest(axes, rows, [f"{_words(outcome)}, {source}" for outcome, source in zip(rows["outcome"], rows["grouping"], strict=True)], 0)
    axes.set(xlabel="mean score (SD of pre)", title="Psychosocial factors")
    _note(axes, "bars: 95%")
    return figure


# --- topics -----------------------------------------------------------------------------------------------------------


def topics(table: pd.DataFrame, trial: Trial) -> dict[str, str]:
    return _drawn(table, trial, {"topic_ranks": ("topic ranks", _ranks)})


def _ranks(rows: pd.DataFrame, trial: Trial) -> Figure:
    figure, (axes,) = blank(1, 6.4, 1.0 + 0.34 * len(rows))
    axes.errorbar(_number(rows["estimate"]), np.arange(len(rows)), xerr=_reach(rows), color=COLOURS[0], marker="o", capsize=2, linestyle="none")
    axes.set_yticks(range(len(rows)), [" ".join(str(term).split())[:52] for term in rows["term"]], fontsize=7)
    axes.set(ylim=(len(rows) - 0.5, -0.5), xlim=(1, 5), xlabel="mean reversed rank (5: most wanted)", title="Topics wanted")
    _note(axes, "bars: 95%")
    return figure


# --- calibration ------------------------------------------------------------------------------------------------------


def calibration(table: pd.DataFrame, trial: Trial) -> dict[str, str]:
    return _drawn(
        table,
        trial,
        {"ratings": ("rating means", _ratings), "worths": ("log-worths", _worths), "win_rates": ("win rates", _win_rates)},
    )


def _by_dose(rows: pd.DataFrame, trial: Trial, groups: list[str], what: str, title: str, note: str) -> Figure:
    """Estimates along the dose, a line a group."""
    figure, (axes,) = blank()
    for number, (names, part) in enumerate(rows.groupby(groups, sort=False)):
        part = part.assign(dose=part["term"].astype(float)).sort_values("dose")
        style: dict[str, Any] = {"color": COLOURS[number % len(COLOURS)], "marker": MARKERS[number % len(MARKERS)], "capsize": 2}
        offset = 0.025 * (number - 0.5)
        axes.errorbar(part["dose"] + offset, _number(part["estimate"]), yerr=_reach(part), label=", ".join(map(str, names)), **style)
    axes.set(xlabel=_doses(trial), ylabel=what, title=title)
    axes.legend(fontsize=7)
    _note(axes, note)
    return figure


def _ratings(rows: pd.DataFrame, trial: Trial) -> Figure:
    return _by_dose(rows, trial, ["outcome"], "mean rating (0 to 100)", "Ratings by dose", "means of participants, 95%")


def _worths(rows: pd.DataFrame, trial: Trial) -> Figure:
    figure = _by_dose(rows, trial, ["outcome", "grouping"], "log-worth against dose 0", "Plackett-Luce worths", "quasi-variance intervals, 95%")
    figure.axes[0].axhline(0, color="black", linewidth=0.8)
    return figure


def _win_rates(rows: pd.DataFrame, trial: Trial) -> Figure:
    figure = _by_dose(rows, trial, ["outcome"], "share of comparisons won", "Win rates by dose", "bootstrap over participants, 95%")
    figure.axes[0].axhline(0.5, color="black", linewidth=0.8)
    return figure


# --- frontier ---------------------------------------------------------------------------------------------------------


def frontier_trend(table: pd.DataFrame, trial: Trial) -> dict[str, str]:
    vector = table[(table["part"] == "vector scores") & table["estimate"].notna()]
    found = _drawn(table, trial, {"vector_scores": ("vector scores", _vector)})
    models = table[(table["part"] == "model means") & table["estimate"].notna()]
    if len(models):
        trend = table[(table["part"] == "trend") & (table["grouping"] == "mixed") & table["estimate"].notna()]
        found["trend"] = png(_trend(models, trend, vector, trial))
    return found


def _vector(rows: pd.DataFrame, trial: Trial) -> Figure:
    return _by_dose(rows, trial, ["outcome"], "mean score (1 to 10)", "Scores of the vector", "t intervals, 95%")


def _trend(models: pd.DataFrame, trend: pd.DataFrame, vector: pd.DataFrame, trial: Trial) -> Figure:
    """Models' mean scores by release, the mixed model's slope through their centre, and the vector's mean scores as a second axis."""
    figure, (axes,) = blank(1, 6.4, 3.8)
    years, means = np.array([details["years"] for details in models["details"]]), _number(models["estimate"])
    start = min(details["released"] for details in models["details"])
    axes.errorbar(
        years, means, yerr=_reach(models), color=COLOURS[0], marker="o", markersize=3, elinewidth=0.5, alpha=0.6, linestyle="none", label="models"
    )
    for row in trend.itertuples():
        line = np.array([years.min(), years.max()])
        around = line - years.mean()
        axes.plot(line, means.mean() + row.estimate * around, color=COLOURS[1], label=f"mixed model: {row.estimate:+.2f} a year")
        ends = [means.mean() + slope * around for slope in (row.lower, row.upper)]
        axes.fill_between(line, np.minimum(*ends), np.maximum(*ends), color=COLOURS[1], alpha=0.18, linewidth=0)
    for row in vector.itertuples():
        axes.axhline(row.estimate, color="grey", linewidth=0.6, linestyle=":")
        axes.annotate(f"{trial.dose.symbol} = {row.term}", (1.0, row.estimate), xycoords=("axes fraction", "data"), fontsize=7, va="center")
    axes.set(xlabel=f"years since {start}", ylabel="mean score (1 to 10)", title="Scores of models by release date")
    axes.legend(fontsize=7, loc="upper left")
    _note(axes, "bars and band: 95% (band: of the slope)")
    return figure
