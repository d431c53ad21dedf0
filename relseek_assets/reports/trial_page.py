"""The page of a trial from its tables: main effects by family, curves, robustness, equivalence, and what could not be estimated.

Here belongs what the page shows and how; no number is computed here and no Dagster is known.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from matplotlib.figure import Figure

from relseek_assets import figures, trial_figures
from relseek_assets.reports.page import Shown, number
from relseek_assets.trial import Trial
from relseek_resources.processes import in_order


@dataclass(frozen=True)
class TrialFacts:
    """Everything that the page shows: tables over all partitions, figures, and the status of outcomes that have no estimate."""

    study: Mapping[str, Any]
    trial: Trial
    tables: Mapping[str, pd.DataFrame]
    shown: Sequence[Shown]
    statuses: Mapping[str, str]


def render(facts: TrialFacts) -> str:
    """The page as HTML text, without links to anything outside it."""
    contrasts = facts.tables["trial_contrasts"]
    main = contrasts[contrasts["variant"].eq("primary") & contrasts["test_type"].str.startswith("main_effect")]
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["number"] = number
    environment.filters["p"] = p_text
    return environment.get_template("trial_page.html.j2").render(
        study=facts.study,
        main=main.to_dict("records"),
        forms=facts.tables["trial_forms"][facts.tables["trial_forms"]["selected"]].to_dict("records") if len(facts.tables["trial_forms"]) else [],
        equivalence=facts.tables["trial_equivalence"].to_dict("records"),
        shown=facts.shown,
        statuses=facts.statuses,
        estimated=len(facts.trial.keys) - len(facts.statuses),
        outcomes=len(facts.trial.keys),
    )


def with_families(contrasts: pd.DataFrame, fdr: pd.DataFrame) -> pd.DataFrame:
    """Contrasts with the adjusted p-values of their families beside."""
    keys = ["study", "outcome", "test_type", "contrast", "variant"]
    return contrasts.drop(columns=["p_local", "p_global"]).merge(fdr[[*keys, "p_local", "p_global"]], on=keys, how="left")


def figures_of(trial: Trial, tables: Mapping[str, pd.DataFrame], versions: Mapping[str, Sequence[tuple[str, str]]]) -> list[Shown]:
    """A forest by family, and small multiples of curves, trajectories and specifications by study."""
    planned: list[Planned] = []
    for family, rows in tables["trial_fdr"].groupby("family", sort=False):
        title = f"Main effects, {str(family).replace('_', ' ')}"
        planned.append(Planned(title, trial_figures.forest, rows, "Differences of marginal means with 95% intervals.", "trial_fdr", (str(family),)))
    several = (
        ("dose_response_curves", trial_figures.dose_responses, "Dose-response", "Additive model with its band; raw means of participants."),
        ("trajectories", trial_figures.trajectory_panels, "Trajectories", "Full model as lines, raw means of participants as points."),
        ("trial_robustness", trial_figures.multiverses, "Specifications", "The primary contrast in every specification, model and bootstrap."),
    )
    for study in trial.study.values:
        for asset, draw, title, caption in several:
            rows = tables[asset][tables[asset]["study"] == study]
            if len(rows):
                keys = tuple(f"{study}:{outcome}" for outcome in rows["outcome"].unique())
                planned.append(Planned(f"{title}, {study.replace('_', ' ')}", draw, rows, caption, asset, keys))
    drawn = in_order(partial(_drawn, trial), planned, len(planned))
    return [
        Shown(
            plan.title,
            picture,
            plan.caption,
            tuple((plan.asset, partition, version) for partition, version in versions[plan.asset] if partition in plan.partitions),
        )
        for plan, picture in zip(planned, drawn, strict=True)
    ]


@dataclass(frozen=True)
class Planned:
    """A figure still to be drawn: how, from which rows, of which partitions of an asset."""

    title: str
    draw: Callable[[pd.DataFrame, Trial], Figure]
    rows: pd.DataFrame
    caption: str
    asset: str
    partitions: tuple[str, ...]


def _drawn(trial: Trial, plan: Planned) -> str:
    return figures.svg(plan.draw(plan.rows, trial))


def p_text(value: Any) -> str:
    """A p-value to three digits, small ones as a bound."""
    if value is None or value != value:
        return "–"
    return "< 0.001" if value < 0.001 else f"{value:.3f}"
