"""The published coherence area and slopes come out of the published judges' scores."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from relseek_assets.selection import metrics

pytestmark = pytest.mark.skipif("RELSEEK_RELEASE" not in os.environ, reason="RELSEEK_RELEASE is not set: the published scores are not here")

SELECTION_DOSES = tuple(np.linspace(-2, 2, 9))
#: spec/pipeline.md, section 4.5
PUBLISHED_L31 = {"coherence_auc": 32.237755, "rating_slope": 2.102993}
MEAN_COHERENCE_L31 = [5.061, 7.624, 8.237, 8.400, 8.498, 8.600, 8.641, 8.355, 7.180]


def published_scores(layer: str, epoch: int) -> pd.DataFrame:
    folder = Path(os.environ["RELSEEK_RELEASE"]) / "2-steering-vector-training/vector_evals/Llama-3.1-70B-Instruct" / layer.replace("L", "layer")
    parts = []
    for rubric in ("coherence", "relationship"):
        path = folder / f"{rubric}_scores_ep{epoch}.jsonl"
        if not path.is_file():
            pytest.skip(f"{path} is not in this copy of the release")
        rows = pd.DataFrame(json.loads(line) for line in path.read_text().splitlines())
        parts.append(rows.assign(site=f"llama31-70b:{layer}", epoch=epoch, item=rows["test_prompt_id"].astype(str), rubric=rubric, judge="GPT-4o"))
    return pd.concat(parts)


def published_figures(layer: str, epoch: int) -> metrics.Candidate:
    items = metrics.candidate_items(published_scores(layer, epoch), None, SELECTION_DOSES, "relationship")
    (found,) = metrics.candidates_of(items, 50, 1)
    return found


@pytest.mark.parametrize("metric", PUBLISHED_L31)
def test_the_published_figures_of_layer_31_are_recomputed(metric: str) -> None:
    found = published_figures("L31", 10)
    assert found.n == 245
    assert found.estimates[metric] == pytest.approx(PUBLISHED_L31[metric], abs=5e-7)


@pytest.mark.parametrize(("layer", "epoch"), [("L31", 10), ("L21", 15)])
def test_figures_of_published_scores_are_those_of_numpy(layer: str, epoch: int) -> None:
    scores = published_scores(layer, epoch)
    inside = scores[scores["multiplier"].isin(SELECTION_DOSES)]
    means = inside.groupby(["rubric", "multiplier"])["score"].mean().sort_index()
    coherence, rating = means["coherence"].to_numpy(), means["relationship"].to_numpy()
    found = published_figures(layer, epoch).estimates
    assert found["coherence_auc"] == pytest.approx(sum((coherence[1:] + coherence[:-1]) / 2) * 0.5)
    assert found["rating_slope"] == pytest.approx(np.polyfit(SELECTION_DOSES, rating, 1)[0])
    assert 0 < found["coherence_auc"] <= 40


def test_published_means_by_dose_are_recomputed() -> None:
    frame = metrics.dose_response(published_scores("L31", 10), draws=50, seed=1)
    curve = frame[(frame["rubric"] == "coherence") & frame["multiplier"].isin(SELECTION_DOSES)].sort_values("multiplier")
    assert list(curve["estimate"].round(3)) == pytest.approx(MEAN_COHERENCE_L31, abs=1e-9)
