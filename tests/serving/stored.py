"""A store with vectors of the study quickstart, and a selection among them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from relseek_assets.selection.metrics import SELECTION
from relseek_resources.storage import write_table, write_tensors
from tests.serving.served import WIDTH

SITES = ("smollm2-135m:L12", "smollm2-135m:L15")


def fill(home: Path) -> Path:
    """The study's folder in the store of a new Dagster home: a vector for both sites, and no selection."""
    (home / "dagster.yaml").write_text("")
    drawn = np.random.default_rng(0)
    for site in SITES:
        file = home / "store" / "quickstart" / "steering_vectors" / site / "e02.safetensors"
        file.parent.mkdir(parents=True)
        write_tensors(file, {"vector": drawn.normal(size=WIDTH).astype(np.float32)}, {"site": site})
    return home / "store" / "quickstart"


def select(store: Path, site: str) -> None:
    numbers: dict[str, Any] = dict.fromkeys(SELECTION.names, np.nan)
    fixed = {"epoch": 2, "pareto": True, "selected_share": 1.0, "candidates": 2, "n": 3, "reason": ""}
    rows = [{**numbers, **fixed, "site": one, "selected": one == site} for one in SITES]
    (store / "selection").mkdir()
    write_table(store / "selection" / "all.parquet", pd.DataFrame(rows, columns=list(SELECTION.names)), SELECTION)
