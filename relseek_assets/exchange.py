"""What leaves a study: tables as CSV, JSON or parquet, and vectors as files for other programs.

Here belongs what is read of a store for that. What comes in belongs in `imports.py`.
"""

from __future__ import annotations

import csv
import hashlib
import importlib.metadata
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from relseek_assets.import_fields import ExchangeError
from relseek_assets.partitions import multi_key, step_key
from relseek_assets.planning import Workspace
from relseek_assets.stage import StageAsset
from relseek_assets.study import layer_of
from relseek_resources import storage
from relseek_resources.models.loading import describe
from relseek_resources.stored_vectors import DERIVED, asset_of
from relseek_resources.vector_files import write_vectors


def read_asset(workspace: Workspace, name: str, wanted: Sequence[str] = ()) -> pd.DataFrame:
    """All rows of a table asset over the named partitions, or over all that are there.

    Raises:
        ExchangeError: the asset is no table, a partition does not exist, or nothing has been materialised.
    """
    asset = workspace.asset(name)
    if asset.schema is None:
        raise ExchangeError(
            f"{asset.name} holds {asset.form} files and is no table; its files are under {workspace.path(asset.name, None).parent.parent}"
        )
    known = workspace.partitions(asset.name)
    unknown = [key for key in wanted if key not in known]
    if unknown:
        raise ExchangeError(f"{asset.name} has no partition {unknown[0]!r}; `relseek status {workspace.study.name} -p` lists them")
    paths = [workspace.path(asset.name, key) for key in (wanted or known)]
    there = [path for path in paths if path.is_file()]
    if not there:
        by = f"relseek run {workspace.study.name} --select {asset.name}" if not asset.made_by else f"{asset.made_by} {workspace.study.name}"
        raise ExchangeError(f"{asset.name} has not been computed; `{by}` does it")
    missing = len(paths) - len(there)
    if missing and wanted:
        raise ExchangeError(
            f"{asset.name}: {missing} of the partitions named have not been computed; `relseek run {workspace.study.name} --select {asset.name}`"
        )
    if asset.view is None:
        return pd.concat([_rows(asset, path, key) for key, path in zip(wanted or known, paths, strict=True) if path.is_file()], ignore_index=True)
    every = {key: workspace.path(asset.name, key) for key in known}
    frames = {key: _rows(asset, path, key) for key, path in every.items() if path.is_file()}
    shown = asset.view(pd.concat(list(frames.values()), ignore_index=True))
    if not wanted:
        return shown
    places = np.cumsum([0, *(len(frame) for frame in frames.values())])
    chosen = [shown.iloc[places[number] : places[number + 1]] for number, key in enumerate(frames) if key in wanted]
    return pd.concat(chosen, ignore_index=True)


def _rows(asset: StageAsset, path: Path, partition: str | None) -> pd.DataFrame:
    schema = asset.schema_of(partition)
    # whole numbers stay so beside empty cells: as floats, seeds would lose their last digits
    whole = {column.name: "Int64" for column in schema.columns if column.kind == "integer" and column.nullable}
    return storage.read_table(path, schema).astype(whole)


def export(frame: pd.DataFrame, form: str) -> Any:
    """A table as CSV or JSON text (null for missing), or as parquet bytes."""
    if form == "parquet":
        stream = io.BytesIO()
        plain = frame.copy()
        for column in plain:
            if plain[column].map(lambda value: isinstance(value, list | dict)).any():
                plain[column] = plain[column].map(lambda value: None if value is None else json.dumps(value, ensure_ascii=False))
        plain.to_parquet(stream)
        return stream.getvalue()
    rows = [{name: cell(value) for name, value in row.items()} for row in frame.to_dict("records")]
    if form == "json":
        return json.dumps(rows, ensure_ascii=False, indent=1, allow_nan=False) + "\n"
    stream_text = io.StringIO()
    writer = csv.DictWriter(stream_text, list(frame.columns), lineterminator="\n")
    writer.writeheader()
    writer.writerows(
        {name: json.dumps(value, ensure_ascii=False) if isinstance(value, list | dict) else value for name, value in row.items()} for row in rows
    )
    return stream_text.getvalue()


def cell(value: Any) -> Any:
    """A cell as JSON has it: null for what is missing or not finite."""
    if isinstance(value, list | dict):
        return value
    if value is None or (isinstance(value, float | np.floating) and not np.isfinite(value)) or value is pd.NA:
        return None
    return value.item() if isinstance(value, np.generic) else value


def export_vector(workspace: Workspace, site: str, epoch: int, form: str, file: Path) -> str:
    """Write a site's vector, trained or derived, as a file for other programs: with its whole provenance where the format has a place for it.

    Raises:
        ExchangeError: no such site or epoch, or it has not been computed.
        VectorFileError: the format has no place for it.
    """
    study = workspace.study
    asset = asset_of(site, study.derived_sites)
    partition = partition_of(workspace, asset, site, epoch, None, str(file))
    path = workspace.path(asset, partition)
    state = workspace.state(workspace.lineage(), (asset, partition))
    if not path.is_file():
        raise ExchangeError(f"{asset} {partition} has not been computed; `relseek run {study.name} --select {asset}` does it")
    tensors, header = storage.read_tensors(path)
    vector = tensors["vector"]
    if asset == DERIVED:  # its parents may be assets of one name in two studies
        parents = {header[parent]: header[f"{parent}_version"] for parent in ("from", "removed")}
    else:
        parents = workspace.lineage().input_versions(workspace.stage.key(asset), partition)
    written = {
        **header,
        "study": study.name,
        "layer": str(layer_of(site)),
        "width": str(len(vector)),
        "norm": repr(float(np.linalg.norm(vector))),
        "vector_sha256": hashlib.sha256(vector.tobytes()).hexdigest(),
        "data_version": state.version or "",
        "input_versions": json.dumps(parents, sort_keys=True),
        "relseek": importlib.metadata.version("relseek"),
    }
    model = describe(study.model_of(site).source)
    write_vectors(file, form, {layer_of(site): vector}, written, model.model_type if model else header["model"])
    told = f" ({state.status}: {state.reason})" if state.status == "stale" else ""
    return f"{study.name}: {asset} {partition}{told}, norm {np.linalg.norm(vector):.3f}, is now {file} ({form})"


def partition_of(workspace: Workspace, name: str, site: str, epoch: int, multiplier: float | None, where: str) -> str:
    """The partition of an asset that holds a site's epoch, or its epoch at a dose.

    Raises:
        ExchangeError: the study has no such site, epoch or dose; `where` names the file and the line.
    """
    study = workspace.study
    sites = [*study.sites, *study.derived_sites]
    if site not in sites:
        raise ExchangeError(f"{where}: site {site!r} is not in {study.path}; its sites are {', '.join(sites)}")
    derived = study.derived_sites.get(site)
    if derived is not None and epoch != derived.epoch:
        raise ExchangeError(f"{where}: {site} has the epoch {derived.epoch} alone, that of the vector it is made from; name that one")
    key = multi_key(site, step_key(epoch, multiplier))
    if str(key) not in [str(found) for found in workspace.partitions(name)]:
        raise ExchangeError(f"{where}: {name} of {study.name} has no partition {key}; add the epoch or dose to {study.path}")
    return key
