"""Asset checks of the dose-response that selection rests on."""

from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any

import dagster as dg
import numpy as np
import pandas as pd

from relseek_assets.behaviour import FILES, read_rubric
from relseek_assets.judging.one_judge import of_one_judge
from relseek_assets.partitions import epoch_key
from relseek_assets.selection.metrics import DOSE_RESPONSE, SELECTION
from relseek_assets.stage import TABLE, Stage
from relseek_resources.storage import read_table

LEAST_SPAN = 3.0  # of the ten points of the scale, between the lowest and the highest mean
MOST_COHERENCE_LOST = 1.0  # points of the scale
SMALL_DOSE = 1.0  # λ up to which a vector should leave coherence alone

Found = tuple[bool, Mapping[str, Any]]  # whether a curve passes, and what was found


def inversions(curve: pd.DataFrame) -> list[tuple[float, float, bool]]:
    """Neighbouring doses at which the score falls: (dose, next dose, whether the fall lies within the next dose's interval)."""
    rows = curve.sort_values("multiplier").to_dict("records")
    return [
        (one["multiplier"], two["multiplier"], two["upper"] >= one["estimate"]) for one, two in pairwise(rows) if two["estimate"] < one["estimate"]
    ]


def monotone(curve: pd.DataFrame) -> Found:
    """Whether the disposition rises with the dose, with at most one inversion, inside its interval."""
    falls = inversions(curve)
    return not falls or (len(falls) == 1 and falls[0][2]), {"inversions": str(falls)}


def spans(curve: pd.DataFrame) -> Found:
    """Whether the mean disposition moves by at least `LEAST_SPAN` points between doses on either side of zero."""
    doses = curve["multiplier"]
    if doses.empty or doses.min() >= 0 or doses.max() <= 0:
        return True, {"not applicable": "the study has no scored doses on either side of λ = 0"}
    span = float(np.ptp(curve["estimate"]))
    return span >= LEAST_SPAN, {"span": span, "least": LEAST_SPAN}


def stays_coherent(curve: pd.DataFrame) -> Found:
    """Whether mean coherence at small doses lies within `MOST_COHERENCE_LOST` points of that at λ = 0."""
    near = curve[curve["multiplier"].abs() <= SMALL_DOSE].set_index("multiplier")["estimate"]
    if 0.0 not in near.index or len(near) < 2:
        return True, {"not applicable": f"the study has no coherence at λ = 0 and another dose of at most {SMALL_DOSE:g}"}
    away = (near - near[0.0]).abs()
    return bool(away.max() <= MOST_COHERENCE_LOST), {"furthest": float(away.max()), "at": float(away.idxmax()), "most": MOST_COHERENCE_LOST}


def build(stage: Stage) -> list[dg.AssetChecksDefinition]:
    study, selection, response = stage.study, stage.key("selection"), stage.key("dose_response")

    def selected(store: Any, rubric: str) -> pd.DataFrame | None:
        """Mean scores by dose of the selected vector, by the judge that selects; None where no vector is selected."""
        chosen = read_table(store.path(selection, None, TABLE), SELECTION).query("selected")
        if chosen.empty:
            return None
        site, epoch = chosen["site"].iloc[0], int(chosen["epoch"].iloc[0])
        curve = read_table(store.path(response, f"{site}|{epoch_key(epoch)}", TABLE), DOSE_RESPONSE)
        return of_one_judge(curve[curve["judge"].map(study.selects_by) & (curve["rubric"] == rubric)])[0]

    def checked(name: str, description: str, judge: Callable[[pd.DataFrame], Found], rubric: Callable[[], str]) -> dg.AssetChecksDefinition:
        @dg.asset_check(asset=selection, name=name, description=description, required_resource_keys={"store"})
        def check(context: dg.AssetCheckExecutionContext) -> dg.AssetCheckResult:
            curve = selected(context.resources.store, rubric())
            passed, found = (False, {"fault": "no vector is selected"}) if curve is None else judge(curve)
            return dg.AssetCheckResult(passed=passed, severity=dg.AssetCheckSeverity.WARN, metadata=dict(found))

        return check

    def disposition() -> str:
        return read_rubric(study.behaviour_folder / FILES["rating_rubric"]).name

    return [
        checked(
            "monotone_dose_response",
            "At the selected vector the disposition rises with the dose, with at most one inversion, inside its interval.",
            monotone,
            disposition,
        ),
        checked(
            "disposition_span",
            f"At the selected vector the mean disposition moves by at least {LEAST_SPAN:g} of 10 points over the doses.",
            spans,
            disposition,
        ),
        checked(
            "coherence_at_small_doses",
            f"At the selected vector mean coherence stays within {MOST_COHERENCE_LOST:g} point of that at λ = 0 while |λ| is at most {SMALL_DOSE:g}.",
            stays_coherent,
            lambda: "coherence",
        ),
    ]
