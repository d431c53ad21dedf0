"""Tables and statistics of the published release for tests, and made-up participants for the tests that do without it."""

from __future__ import annotations

import json
import os
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from relseek_assets.trials import participants

ROOT = os.environ.get("RELSEEK_RELEASE", "")
needs_release = pytest.mark.skipif(not ROOT, reason="RELSEEK_RELEASE is not set")
ANALYSIS = "8-human-studies-analysis/outputs"


def path_of(name: str) -> Path:
    """The raw or generated file of a table, whether it is there or not."""
    stem, studies = name.replace("_", "-"), Path(ROOT) / "data/human_study/main_studies"
    places = [
        studies / f"{stem}.jsonl",
        studies / f"participant_characteristics/{name}.jsonl",
        Path(ROOT) / ANALYSIS / f"generated_data_files/{name}.jsonl",
    ]
    return next((place for place in places if place.exists()), places[0])


@cache
def table(name: str) -> pd.DataFrame:
    rows = pd.DataFrame([json.loads(line) for line in path_of(name).read_text().splitlines()]).rename(columns={"study_id": "study"})
    rows["study"] = rows["study"].str.replace("-", "_")
    for column in {"week", "day", "session"} & set(rows):
        rows[column] = rows[column].str[1:].astype("Int64")
    return rows


@cache
def merged() -> pd.DataFrame:
    extra = {"types": table("pre_treatment_preference_types"), "factors": table("psychosocial_factors")}
    return participants.participants(table("sociodemographics"), table("metadata_with_dropout"), **extra)


def published(name: str) -> Any:
    return json.loads((Path(ROOT) / ANALYSIS / f"stats/{name}.json").read_text())


def same(ours: float, theirs: float) -> bool:
    """Equal up to the published rounding: four decimals, and of small numbers five significant digits."""
    return abs(ours - theirs) <= 6e-5 or (abs(theirs) < 1e-3 and abs(ours - theirs) <= 2e-4 * abs(theirs))


def made_up(n: int = 400, *, seed: int = 1, study: str = "longitudinal") -> pd.DataFrame:
    """A merged participant table of one study: independent covariates, balanced arms, a fifth of participants lost after treatment."""
    draw = np.random.default_rng(seed)
    frame = pd.DataFrame({"ppt_id": [f"ppt{index}" for index in range(n)], "study": study})
    frame["multiplier"] = np.resize([-1.0, -0.5, 0.0, 0.5, 1.0], n)
    frame["domain"], frame["personalisation"] = (
        np.resize(["polchat"] * 5 + ["emotchat"] * 5, n),
        draw.permutation(np.resize(list(participants.PERSONALISATION), n)),
    )
    frame["age"], frame["education_years"] = draw.integers(18, 80, n).astype(float), draw.choice([11.0, 13.0, 16.0, 18.0], n)
    for coarsening in participants.COARSENINGS:
        levels = [level for level in coarsening.levels if level != participants.PNTS]
        frame[coarsening.name] = pd.Categorical(draw.choice(levels, n), categories=list(coarsening.levels))
    frame["cluster_name"] = pd.Categorical(draw.choice(participants.CLUSTERS, n), categories=list(participants.CLUSTERS))
    for column in (*participants.FACTOR_SCORES, "mas_score", "gcs_score", "charity_amount_gbp"):
        frame[column] = draw.standard_normal(n)
    frame["pre_treatment_dropout"], frame["post_treatment_dropout"] = False, draw.random(n) < 0.2
    return participants.treatment_columns(frame)
