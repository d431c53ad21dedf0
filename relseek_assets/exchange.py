"""What crosses a study's border: tables out, files from elsewhere in, and the difference between two studies.

Here belong checks at the door and provenance. An imported partition is recorded as such and no run overwrites it.
"""

from __future__ import annotations

import csv
import hashlib
import importlib.metadata
import io
import json
import os
import re
import tempfile
import time
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import dagster as dg
import numpy as np
import pandas as pd

from relseek_assets.behaviour import FILES, read_rubric
from relseek_assets.dataset.pairs import PREFERENCE_PAIRS, evaluation_items
from relseek_assets.judging.tables import JUDGE_SCORES
from relseek_assets.partitions import multi_key, step_key
from relseek_assets.planning import Workspace
from relseek_assets.stage import StageAsset
from relseek_assets.study import layer_of, study_file
from relseek_assets.sweeps.tables import GENERATIONS
from relseek_assets.vectors.tables import provenance
from relseek_resources import storage
from relseek_resources.models.loading import describe
from relseek_resources.storage import StorageError
from relseek_resources.vector_files import read_vectors, write_vectors

CELL = ("site", "epoch", "multiplier")


class ExchangeError(ValueError):
    """A file or a request that does not fit the study; the message names the file and the field."""


# --- out --------------------------------------------------------------------------------------------------------------


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
    rows = [{name: _plain(value) for name, value in row.items()} for row in frame.to_dict("records")]
    if form == "json":
        return json.dumps(rows, ensure_ascii=False, indent=1, allow_nan=False) + "\n"
    stream_text = io.StringIO()
    writer = csv.DictWriter(stream_text, list(frame.columns), lineterminator="\n")
    writer.writeheader()
    writer.writerows(
        {name: json.dumps(value, ensure_ascii=False) if isinstance(value, list | dict) else value for name, value in row.items()} for row in rows
    )
    return stream_text.getvalue()


def _plain(value: Any) -> Any:
    if isinstance(value, list | dict):
        return value
    if value is None or (isinstance(value, float | np.floating) and not np.isfinite(value)) or value is pd.NA:
        return None
    return value.item() if isinstance(value, np.generic) else value


def export_vector(workspace: Workspace, site: str, epoch: int, form: str, file: Path) -> str:
    """Write a site's vector as a file for other programs: with its whole provenance where the format has a place for it.

    Raises:
        ExchangeError: no such site or epoch, or it has not been computed.
        VectorFileError: the format has no place for it.
    """
    study = workspace.study
    partition = _partition(workspace, "steering_vectors", site, epoch, None, str(file))
    path = workspace.path("steering_vectors", partition)
    state = workspace.state(workspace.lineage(), ("steering_vectors", partition))
    if not path.is_file():
        raise ExchangeError(f"steering_vectors {partition} has not been computed; `relseek run {study.name} --select steering_vectors` does it")
    tensors, header = storage.read_tensors(path)
    vector = tensors["vector"]
    lineage, key = workspace.lineage(), workspace.stage.key("steering_vectors")
    written = {
        **header,
        "study": study.name,
        "layer": str(layer_of(site)),
        "width": str(len(vector)),
        "norm": repr(float(np.linalg.norm(vector))),
        "vector_sha256": hashlib.sha256(vector.tobytes()).hexdigest(),
        "data_version": state.version or "",
        "input_versions": json.dumps(lineage.input_versions(key, partition), sort_keys=True),
        "relseek": importlib.metadata.version("relseek"),
    }
    model = describe(study.model_of(site).source)
    write_vectors(file, form, {layer_of(site): vector}, written, model.model_type if model else header["model"])
    told = f" ({state.status}: {state.reason})" if state.status == "stale" else ""
    return f"{study.name}: steering_vectors {partition}{told}, norm {np.linalg.norm(vector):.3f}, is now {file} ({form})"


# --- in ---------------------------------------------------------------------------------------------------------------


def _record(workspace: Workspace, name: str, partition: str | None, version: str, file: Path, note: str, **more: Any) -> None:
    """Record an imported partition, with what it stands on now, so that it is not stale the moment it arrives."""
    lineage = workspace.lineage()
    key = workspace.stage.key(name)
    metadata = {
        "imported_from": str(file.resolve()),
        "sha256": storage.file_sha256(file),
        "imported_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "note": note,
        "path": dg.MetadataValue.path(str(workspace.path(name, partition))),
        **more,
    }
    event = lineage.materialisation(key, partition, version, lineage.input_tags(key, partition), metadata, source="imported")
    workspace.instance.report_runless_asset_event(event)


def import_vector(workspace: Workspace, file: Path, site: str, epoch: int, note: str = "") -> str:
    """Put a vector made elsewhere in the place of a site's epoch: a safetensors, `.pt` or GGUF file.

    Raises:
        VectorFileError: truncated, no floating point, NaN, another width or shape, or a vector for another block than the site's.
        ExchangeError: no such site or epoch.
    """
    partition = _partition(workspace, "steering_vectors", site, epoch, None, str(file))
    read = read_vectors(file)
    model = workspace.study.model_of(site)
    vector = read.at(layer_of(site), model.known_width)
    details = [
        ("model", model.source),
        ("imported_from", str(file.resolve())),
        ("sha256", storage.file_sha256(file)),
        ("note", note),
        ("original_header", json.dumps(dict(read.provenance))),
    ]
    version = storage.write_tensors(workspace.path("steering_vectors", partition), {"vector": vector}, provenance(site, epoch, "imported", details))
    _record(workspace, "steering_vectors", partition, version, file, note, norm=float(np.linalg.norm(vector)))
    name, maker = workspace.study.name, read.provenance.get("model", model.source)
    told = f"{file.name} (norm {np.linalg.norm(vector):.3f}" + (")" if maker == model.source else f"; made for {maker}, used with {model.source})")
    return f"{name}: steering_vectors {partition} is now {told}; `relseek run {name}` computes what follows"


def import_generations(workspace: Workspace, file: Path, note: str = "") -> str:
    """Put replies made elsewhere in the place of whole partitions of `generations`."""
    study = workspace.study
    known = workspace.path("preference_pairs", None)
    if not known.is_file():
        raise ExchangeError(f"the study's items are not known yet; `relseek run {study.name} --select preference_pairs` first")
    prompts = {
        row.conversation: [{"role": "system", "content": study.prompts.system}, *row.prompt]
        for row in evaluation_items(storage.read_table(known, PREFERENCE_PAIRS), study.seed).itertuples()
    }
    rows = []
    for number, row in storage.read_jsonl(file):
        where = f"{file}, line {number}"
        _require(row, (*CELL, "item", "reply"), where)
        if row["item"] not in prompts:
            raise ExchangeError(
                f"{where}: item {row['item']!r} is no held-out conversation of the study; generation_metrics needs its target and anti-target replies"
            )
        if not isinstance(row["reply"], str):
            raise ExchangeError(f"{where}: reply must be text")
        rows.append(
            {
                "site": row["site"],
                "epoch": _number(row["epoch"], int, "epoch", where),
                "multiplier": _number(row["multiplier"], float, "multiplier", where),
                "item": row["item"],
                "prompt": row.get("prompt") or prompts[row["item"]],
                "reply": row["reply"],
                "tokens": int(row.get("tokens") or 0),
                "seed": row.get("seed"),
                "finished": row.get("finished"),
                "token_ids": row.get("token_ids"),
                "mean_log_prob": row.get("mean_log_prob"),
                "source": "imported",
            }
        )
    return _import_cells(workspace, "generations", pd.DataFrame(rows, columns=list(GENERATIONS.names)), file, note)


def import_scores(workspace: Workspace, file: Path, note: str = "") -> str:
    """Put scores made elsewhere in the place of whole partitions of `judge_scores`."""
    folder = workspace.study.behaviour_folder
    rubrics = {rubric.name: rubric for rubric in (read_rubric(folder / FILES["rating_rubric"]), read_rubric(folder / FILES["coherence_rubric"]))}
    try:
        with file.open(encoding="utf-8", newline="") as stream:
            table = list(csv.DictReader(stream))
    except (OSError, UnicodeDecodeError) as error:
        raise ExchangeError(f"{file}: cannot be read as CSV ({error})") from error
    rows = []
    for number, row in enumerate(table, 2):
        where = f"{file}, line {number}"
        _require(row, (*CELL, "item", "rubric", "judge", "score"), where)
        if row["rubric"] not in rubrics:
            raise ExchangeError(f"{where}: rubric {row['rubric']!r} is none of the behaviour's: {', '.join(rubrics)}")
        score = _number(row["score"], float, "score", where) if row["score"] not in ("", None) else None
        rubric = rubrics[row["rubric"]]
        if score is not None and not rubric.scale_min <= score <= rubric.scale_max:
            raise ExchangeError(f"{where}: score {score:g} lies outside the rubric's {rubric.scale_min:g} to {rubric.scale_max:g}")
        rows.append(
            {
                "site": row["site"],
                "epoch": _number(row["epoch"], int, "epoch", where),
                "multiplier": _number(row["multiplier"], float, "multiplier", where),
                "item": row["item"],
                "rubric": row["rubric"],
                "judge": row["judge"],
                "score": score,
                "status": "scored" if score is not None else "empty_reply",
                "cost_usd": _number(row.get("cost_usd") or 0, float, "cost_usd", where),
                "attempt": 1,
                "band": None if score is None else rubric.band_of(score),
                "source": "imported",
            }
        )
    return _import_cells(workspace, "judge_scores", pd.DataFrame(rows, columns=list(JUDGE_SCORES.names)), file, note)


def _import_cells(workspace: Workspace, name: str, frame: pd.DataFrame, file: Path, note: str) -> str:
    """Check every cell first and write afterwards, so that a bad file changes nothing."""
    if frame.empty:
        raise ExchangeError(f"{file}: no rows")
    schema = workspace.catalogue[name].schema_of(None)
    frame = frame.reindex(columns=list(schema.names))  # what a file does not say of a language judge's answers is null
    parts = {
        _partition(workspace, name, str(site), int(epoch), float(multiplier), str(file)): part
        for (site, epoch, multiplier), part in frame.groupby(list(CELL))
    }
    for part in parts.values():
        schema.to_arrow(part, str(file))
    for partition, part in parts.items():
        version = storage.write_table(workspace.path(name, partition), part, schema)
        _record(workspace, name, partition, version, file, note, **{"dagster/row_count": len(part)})
    study = workspace.study.name
    return f"{study}: {len(frame)} rows are now {len(parts)} partitions of {name}; `relseek run {study}` computes what follows"


def _partition(workspace: Workspace, name: str, site: str, epoch: int, multiplier: float | None, where: str) -> str:
    study = workspace.study
    sites = [*study.sites, *study.derived_sites]
    if site not in sites:
        raise ExchangeError(f"{where}: site {site!r} is not in {study.path}; its sites are {', '.join(sites)}")
    key = multi_key(site, step_key(epoch, multiplier))
    if str(key) not in [str(found) for found in workspace.partitions(name)]:
        raise ExchangeError(f"{where}: {name} of {study.name} has no partition {key}; add the epoch or dose to {study.path}")
    return key


def _require(row: dict[str, Any], names: Sequence[str], where: str) -> None:
    missing = [name for name in names if row.get(name) is None]
    if missing:
        raise ExchangeError(f"{where}: {', '.join(missing)} is missing; add it")


def _number(value: Any, kind: type, name: str, where: str) -> Any:
    try:
        found = kind(value)
    except (TypeError, ValueError) as error:
        raise ExchangeError(f"{where}: {name} {value!r} is no number") from error
    if not np.isfinite(found):
        raise ExchangeError(f"{where}: {name} must be finite")
    return found


# --- difference -------------------------------------------------------------------------------------------------------


def difference(one: Workspace, two: Workspace) -> dict[str, list[dict[str, Any]]]:
    """Settings, data versions and dose-response estimates that differ between two workspaces.

    An estimate differs when the two values do; `overlap` says whether their intervals do as well.
    """
    first, second = _flat(tomllib.loads(one.study.path.read_text())), _flat(tomllib.loads(two.study.path.read_text()))
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
    return {"settings": settings, "versions": versions, "estimates": _estimates(one, two)}


# Tables of estimates that two studies can be compared by, and what tells their rows apart.
COMPARED = {
    "dose_response": ["site", "epoch", "multiplier", "rubric", "judge"],
    "trial_contrasts": ["study", "outcome", "test_type", "contrast", "variant"],
}


def _estimates(one: Workspace, two: Workspace) -> list[dict[str, Any]]:
    found = []
    for asset, keys in COMPARED.items():
        columns = [*keys, "estimate", "lower", "upper", "n"]
        frames = []
        for workspace in (one, two):
            try:
                frames.append(read_asset(workspace, asset)[columns] if asset in workspace.catalogue else pd.DataFrame(columns=columns))
            except (ExchangeError, StorageError):
                frames.append(pd.DataFrame(columns=columns))
        merged = frames[0].merge(frames[1], on=keys, how="outer", suffixes=("_a", "_b"))
        merged = merged[merged["estimate_a"].ne(merged["estimate_b"]) & (merged["estimate_a"].notna() | merged["estimate_b"].notna())]
        merged["difference"] = merged["estimate_b"] - merged["estimate_a"]
        merged["overlap"] = (merged["lower_a"] <= merged["upper_b"]) & (merged["lower_b"] <= merged["upper_a"])
        found += [{"asset": asset, **{name: _plain(value) for name, value in row.items()}} for row in merged.to_dict("records")]
    return found


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(value, dict):
        return {key: item for name, part in value.items() for key, item in _flat(part, f"{prefix}{name}.").items()}
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return {key: item for part in value for key, item in _flat(part, f"{prefix}{part.get('name', '')}.").items()}
    return {prefix.rstrip("."): value}


def difference_text(found: dict[str, list[dict[str, Any]]]) -> str:
    """The difference for the terminal."""
    lines = [f"settings that differ: {len(found['settings'])}"]
    lines += [f"  {row['setting']}: {row['a']} -> {row['b']}" for row in found["settings"]]
    lines.append(f"data versions that differ: {len(found['versions'])}")
    by_asset: dict[str, int] = {}
    for row in found["versions"]:
        by_asset[row["asset"]] = by_asset.get(row["asset"], 0) + 1
    lines += [f"  {name}: {count} partitions" for name, count in by_asset.items()]
    lines.append(f"estimates that differ: {len(found['estimates'])}")
    for row in found["estimates"]:
        a, b = (
            "absent"
            if row[f"estimate_{side}"] is None
            else f"{row[f'estimate_{side}']:.2f} [{row[f'lower_{side}']:.2f}, {row[f'upper_{side}']:.2f}] n={row[f'n_{side}']:.0f}"
            for side in ("a", "b")
        )
        apart = "" if row["overlap"] else "  intervals apart"
        lines.append(f"  {_named(row)}: {a} -> {b}{apart}")
    return "\n".join(lines)


def _named(row: dict[str, Any]) -> str:
    if row["asset"] == "dose_response":
        return f"{row['site']} epoch {row['epoch']} λ={row['multiplier']:g} {row['rubric']}"
    return f"{row['study']} {row['outcome']} {row['contrast']} ({row['variant']})"


# --- code locations ---------------------------------------------------------------------------------------------------


def write_locations(home: Path, names: Sequence[str]) -> Path:
    """A workspace file for `dagster dev` with one code location a study; studies given by path get a module of their own."""
    folder = Path(tempfile.mkdtemp(prefix="relseek-locations-")) if not os.access(home, os.W_OK) else home / ".locations"
    folder.mkdir(exist_ok=True)
    entries = []
    for name in names:
        path = study_file(name)
        module = folder / f"{re.sub(r'[^A-Za-z0-9_]', '_', path.stem)}.py"
        storage.write_text(
            module,
            "from relseek_assets.definitions import build_definitions\n"
            "from relseek_assets.study import load_study\n\n"
            f"definitions = build_definitions(load_study({str(path)!r}))\n",
        )
        entries.append(
            f"  - python_file:\n      relative_path: {json.dumps(str(module))}\n      attribute: definitions\n      location_name: {path.stem}\n"
        )
    workspace = folder / "workspace.yaml"
    storage.write_text(workspace, "load_from:\n" + "".join(entries))
    return workspace
