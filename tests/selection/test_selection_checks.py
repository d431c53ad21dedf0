"""The asset checks of selection judge the selected vector's curve, each for its own reason."""

from __future__ import annotations

from pathlib import Path

import dagster as dg
import pandas as pd
import pytest

from relseek_assets.selection import checks, metrics
from relseek_assets.stage import TABLE, Stage, Store
from relseek_assets.study import load_study
from relseek_resources.storage import write_table

SITE, OTHER = "smollm2-135m:L12", "smollm2-135m:L15"
DOSES = (-1.0, 0.0, 1.0)
CHECKS = {"monotone_dose_response", "disposition_span", "coherence_at_small_doses"}


def failing(store: Path, selected: str = SITE, coherence: float = 9.0, top: float = 7.0) -> set[str]:
    """Names of the checks that fail for a vector with such coherence at λ = 1 and such a highest disposition."""
    stage = Stage(load_study("quickstart"))
    place = Store(root=str(store))
    figures = {name: value for metric in metrics.METRICS for name, value in ((metric, 1.0), (f"{metric}_lower", 0.9), (f"{metric}_upper", 1.1))}
    rest = {"score": 1.0, "rating_score": 1.0, "pareto": True, "selected_share": 1.0, "candidates": 2, "n": 4, "reason": ""}
    rows = pd.DataFrame([{"site": site, "epoch": 2, **figures, **rest, "selected": site == selected} for site in (SITE, OTHER)])
    write_table(place.path(stage.key("selection"), None, TABLE), rows, metrics.SELECTION)
    curves = {"relationship": (3.0, 5.0, top), "coherence": (9.0, 9.0, coherence)}
    scores = [
        {"site": SITE, "epoch": 2, "multiplier": dose, "item": f"i{item}", "rubric": rubric, "judge": "embedded", "score": score}
        for rubric, values in curves.items()
        for dose, score in zip(DOSES, values, strict=True)
        for item in range(4)
    ]
    frame = metrics.dose_response(pd.DataFrame(scores), 20, 1)
    write_table(place.path(stage.key("dose_response"), f"{SITE}|e02", TABLE), frame, metrics.DOSE_RESPONSE)
    context = dg.build_asset_check_context(resources={"store": place})
    results = {next(iter(check.check_keys)).name: check(context) for check in checks.build(stage)}
    assert results.keys() == CHECKS
    assert all(result.severity == dg.AssetCheckSeverity.WARN for result in results.values())
    return {name for name, result in results.items() if not result.passed}


@pytest.mark.parametrize(
    ("coherence", "top", "failed"),
    [
        (9.0, 7.0, set()),
        (7.5, 7.0, {"coherence_at_small_doses"}),
        (9.0, 5.5, {"disposition_span"}),
        (9.0, 4.0, {"monotone_dose_response", "disposition_span"}),
    ],
)
def test_each_check_fails_for_its_own_reason(tmp_path: Path, coherence: float, top: float, failed: set[str]) -> None:
    assert failing(tmp_path, coherence=coherence, top=top) == failed


def test_without_a_selected_vector_every_check_fails(tmp_path: Path) -> None:
    assert failing(tmp_path, selected="none") == CHECKS
