"""What two studies, or two stores of one, differ in: settings, what made their partitions, data versions, estimates.

Here belong the comparison and its words. What an estimate is belongs in the stage that makes it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from dagster._core.definitions.data_version import CODE_VERSION_TAG

from relseek_assets import sources
from relseek_assets.exchange import cell, read_asset
from relseek_assets.lineage import SOURCE_TAG
from relseek_assets.planning import Workspace

MADE_BY = {"settings": "other settings", "code": "other code", "source": "another version of the source"}
STATED, LAST_RUN = "the study's file", "the last run"


def difference(one: Workspace, two: Workspace) -> dict[str, Any]:
    """Settings, what partitions were made by, data versions and estimates that differ between two workspaces.

    Settings are those that hold, whether a file states them or leaves them as they are; of one study in two stores, whose file is the same, those of
    the last `relseek run` in each, where it has recorded them: `settings_of` says which. `made_by` names assets that settings, code or sources other
    than the other's were used for. An estimate differs when the two values do; `overlap` says whether their intervals do as well, and is null where
    there are no two intervals.
    """
    origins, told = [], []
    for workspace in (one, two):
        recorded = workspace.recorded_settings() if one.study.path == two.study.path else None
        origins.append(STATED if recorded is None else LAST_RUN)
        told.append(workspace.study.flat_settings if recorded is None else recorded)
    first, second = told
    settings = [
        {"setting": name, "a": first.get(name), "b": second.get(name)}
        for name in sorted(first.keys() | second.keys())
        if first.get(name) != second.get(name)
    ]
    versions = []
    found = {label: {node: state.version for node, state in workspace.states().items()} for label, workspace in (("a", one), ("b", two))}
    for name, partition in sorted(found["a"].keys() | found["b"].keys(), key=lambda node: (node[0], str(node[1]))):
        a, b = found["a"].get((name, partition)), found["b"].get((name, partition))
        if a != b:
            versions.append({"asset": name, "partition": None if partition is None else str(partition), "a": a, "b": b})
    return {
        "settings_of": dict(zip("ab", origins, strict=True)),
        "settings": settings,
        "made_by": _made_by(one, two),
        "versions": versions,
        "estimates": _estimates(one, two),
    }


def _made_by(one: Workspace, two: Workspace) -> list[dict[str, Any]]:
    """Assets and sources whose partitions in the two stores are of other settings, other code or, of a source, another version; and of how many.

    What was imported was made by neither.
    """
    a, b = (_makers(workspace) for workspace in (one, two))
    counts: dict[tuple[str, str], int] = {}
    for node in a:
        for what in a[node] if node in b else ():
            if a[node][what] != b[node][what]:
                counts[node[0], what] = counts.get((node[0], what), 0) + 1
    return [{"asset": name, "differs": what, "partitions": count} for (name, what), count in counts.items()]


def _makers(workspace: Workspace) -> dict[tuple[str, str], dict[str, str | None]]:
    """(Asset, partition) -> what its latest version was made by, for every one that is recorded."""
    lineage = workspace.lineage()
    found: dict[tuple[str, str], dict[str, str | None]] = {}
    for key in sources.keys(workspace.study):
        node = workspace.graph.get(key)
        for partition in node.partitions_def.get_partition_keys() if node.is_partitioned else [None]:
            if lineage.record(key, partition) is not None:
                found[key.path[-1], str(partition)] = {"source": lineage.version(key, partition)}
    for name in workspace.order():
        key = workspace.stage.key(name)
        for partition in workspace.partitions(name):
            record = lineage.record(key, partition)
            tags = {} if record is None else record.event_log_entry.asset_materialization.tags or {}
            if CODE_VERSION_TAG in tags and SOURCE_TAG not in tags:
                code, _, settings = tags[CODE_VERSION_TAG].partition("-")
                found[name, str(partition)] = {"code": code, "settings": settings}
    return found


class _Compared(NamedTuple):
    """A table of estimates by which two studies are compared: what tells its rows apart, the columns of its estimates, and a row's name in words."""

    keys: Sequence[str]
    estimates: Sequence[str]
    named: str
    ends: Sequence[str] = ("lower", "upper")


COMPARED = {
    "dose_response": _Compared(
        ["site", "epoch", "multiplier", "rubric", "judge"], ["estimate"], "{site} epoch {epoch} λ={multiplier:g} {rubric} by {judge}"
    ),
    "selection": _Compared(
        ["site", "epoch"],
        ["coherence_auc", "rating_slope", "pairwise_slope"],
        "{site} epoch {epoch} {quantity}",
        ("{quantity}_lower", "{quantity}_upper"),
    ),
    "judge_quality": _Compared(["judge", "metric", "against"], ["value"], "{judge}: {metric} against {against}"),
    "trial_contrasts": _Compared(["study", "outcome", "test_type", "contrast", "variant"], ["estimate"], "{study} {outcome} {contrast} ({variant})"),
}
NUMBERS = ("estimate", "lower", "upper", "n")


def _estimates(one: Workspace, two: Workspace) -> list[dict[str, Any]]:
    found = []
    for asset, compared in COMPARED.items():
        keys = [*compared.keys, "quantity"]
        tables = [_estimates_of(workspace, asset) for workspace in (one, two)]
        there = [table for table in tables if table is not None]
        if not there:
            continue
        a, b = (there[0].iloc[:0] if table is None else table for table in tables)
        merged = a.merge(b, on=keys, how="outer", suffixes=("_a", "_b"))
        merged = merged[merged["estimate_a"].ne(merged["estimate_b"]) & (merged["estimate_a"].notna() | merged["estimate_b"].notna())]
        merged["difference"] = merged["estimate_b"] - merged["estimate_a"]
        for row in merged.to_dict("records"):
            bounds = [row[f"{end}_{side}"] for end in ("lower", "upper") for side in ("a", "b")]
            overlap = None if any(map(np.isnan, bounds)) else row["lower_a"] <= row["upper_b"] and row["lower_b"] <= row["upper_a"]
            found.append({"asset": asset, **{str(name): cell(value) for name, value in row.items()}, "overlap": overlap})
    return found


def _estimates_of(workspace: Workspace, asset: str) -> pd.DataFrame | None:
    """A table's estimates one below the other, each with its interval; None where there are none."""
    compared = COMPARED[asset]
    if asset not in workspace.catalogue or not any(workspace.path(asset, key).is_file() for key in workspace.partitions(asset)):
        return None
    table = read_asset(workspace, asset)
    parts = []
    for quantity in compared.estimates:
        names = [quantity, *(end.format(quantity=quantity) for end in compared.ends), "n"]
        parts.append(
            table[compared.keys].assign(quantity=quantity, **{name: table[old].astype(float) for name, old in zip(NUMBERS, names, strict=True)})
        )
    return pd.concat(parts, ignore_index=True)


def difference_text(found: dict[str, Any]) -> str:
    """The difference for the terminal."""
    origins = found["settings_of"]
    told = f" (A: {origins['a']}, B: {origins['b']})" if LAST_RUN in origins.values() else ""
    lines = [f"settings that differ: {len(found['settings'])}{told}"]
    lines += [f"  {row['setting']}: {row['a']} -> {row['b']}" for row in found["settings"]]
    lines.append(f"assets made by other settings, code or sources: {len({row['asset'] for row in found['made_by']})}")
    lines += [f"  {row['asset']}: {MADE_BY[row['differs']]}, partitions: {row['partitions']}" for row in found["made_by"]]
    lines.append(f"data versions that differ: {len(found['versions'])}")
    by_asset: dict[str, int] = {}
    for row in found["versions"]:
        by_asset[row["asset"]] = by_asset.get(row["asset"], 0) + 1
    lines += [f"  {name}: {count} partitions" for name, count in by_asset.items()]
    lines.append(f"estimates that differ: {len(found['estimates'])}")
    for row in found["estimates"]:
        there = {side: _estimate_text(row, side) for side in ("a", "b") if row[f"estimate_{side}"] is not None}
        if len(there) == 2:
            said = f"{there['a']} -> {there['b']}" + ("  intervals apart" if row["overlap"] is False else "")
        else:
            said = " ".join(f"{text}, only in {side.upper()}" for side, text in there.items())
        lines.append(f"  {COMPARED[row['asset']].named.format(**row)}: {said}")
    return "\n".join(lines)


def _estimate_text(row: dict[str, Any], side: str) -> str:
    """`8.75 [8.50, 9.00] n=4`, without an interval where there is none."""
    estimate, lower, upper, n = (row[f"{name}_{side}"] for name in NUMBERS)
    interval = "" if lower is None or upper is None else f" [{lower:.2f}, {upper:.2f}]"
    return f"{estimate:.2f}{interval}" + ("" if n is None else f" n={n:.0f}")
