"""What a researcher does in the Dagster UI, done with clicks: materialise, backfill a layer, look at a plot, see what an edit made stale."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.browser.conftest import Ui, wait_for

GROUPS = ("sources", "dataset", "vectors", "sweeps", "judging", "selection", "reports")
SITE, OTHER_SITE = "m:L01", "m:L02"
RUN_SECONDS = 120  # a run takes about 15 on an idle machine

RUNS = "{ runsOrError { ... on Runs { results { runId status assetSelection { path } } } } }"
VERDICT = """
query ($key: AssetKeyInput!) {
  assetNodeOrError(assetKey: $key) { ... on AssetNode { staleStatus staleCauses { reason dependency { path } } } }
}
"""
SENSOR = """
query ($name: String!) {
  sensorOrError(sensorSelector: {repositoryName: "__repository__", repositoryLocationName: "tiny", sensorName: $name}) {
    ... on Sensor { sensorState { status ticks(limit: 5) { status timestamp } } }
  }
}
"""


def asset_address(name: str, view: str) -> str:
    return f"/assets/tiny/{name}?view={view}"


def versions(ui: Ui, name: str) -> dict[str, Any]:
    """Partition -> (run, data version, sha of the bytes' own version tag) of each partition's latest materialisation."""
    import dagster as dg

    with dg.DagsterInstance.from_config(str(ui.platform.home)) as instance:
        records = instance.fetch_materializations(dg.AssetKey(["tiny", name]), limit=1000).records
    found: dict[str, Any] = {}
    for record in records:  # the newest first
        found.setdefault(str(record.partition_key), record)
    return found
