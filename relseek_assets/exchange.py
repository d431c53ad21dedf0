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
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import dagster as dg
import numpy as np
import pandas as pd
from dagster._core.definitions.data_version import CODE_VERSION_TAG

from relseek_assets import sources
from relseek_assets.behaviour import FILES, read_rubric, read_rubrics
from relseek_assets.dataset.pairs import PREFERENCE_PAIRS, evaluation_items
from relseek_assets.lineage import SOURCE_TAG
from relseek_assets.partitions import multi_key, step_key
from relseek_assets.planning import Workspace
from relseek_assets.stage import StageAsset
from relseek_assets.study import layer_of, study_file
from relseek_assets.sweeps.tables import GENERATIONS
from relseek_assets.vectors.tables import provenance
from relseek_resources import storage
from relseek_resources.models.loading import describe
from relseek_resources.stored_vectors import DERIVED, asset_of
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
    """Write a site's vector, trained or derived, as a file for other programs: with its whole provenance where the format has a place for it.

    Raises:
        ExchangeError: no such site or epoch, or it has not been computed.
        VectorFileError: the format has no place for it.
    """
    study = workspace.study
    asset = asset_of(site, study.derived_sites)
    partition = _partition(workspace, asset, site, epoch, None, str(file))
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


# --- in ---------------------------------------------------------------------------------------------------------------


class _Part(NamedTuple):
    """What an import brings to a partition: `write` fills a file and returns its data version, `shown` is for the partition's page."""

    write: Callable[[Path], str]
    shown: Mapping[str, Any]


@dataclass
class _Arrival:
    """A file that lies beside its place, ready to take it; the event that speaks of it, and the one that spoke of what was there before."""

    place: Path
    event: dg.AssetMaterialization
    before: dg.AssetMaterialization | None
    recorded: bool = False

    def settle(self, instance: dg.DagsterInstance) -> None:
        """Take the place: after the event, and with the old file gone before it, so that no file is ever under another's event."""
        new, old = _beside(self.place)
        if self.place.is_file():
            os.replace(self.place, old)
            storage._sync_folder(self.place.parent)
        instance.report_runless_asset_event(self.event)
        self.recorded = True
        os.replace(new, self.place)

    def put_back(self, instance: dg.DagsterInstance) -> None:
        """Undo `settle`, however far it came. No event can be taken back: that of before is recorded anew; where this fails the new file stays."""
        if self.recorded:
            if self.before is not None:
                instance.report_runless_asset_event(self.before)
            self.place.unlink(missing_ok=True)
        _, old = _beside(self.place)
        if old.is_file() and (self.before is not None or not self.recorded):
            os.replace(old, self.place)


def _beside(place: Path) -> tuple[Path, Path]:
    """Where an import keeps a partition's new file before it takes its place, and the old one while it does."""
    return place.with_name(f".{place.name}.import.tmp"), place.with_name(f".{place.name}.before.tmp")


def _place(workspace: Workspace, name: str, parts: Mapping[str, _Part], file: Path, note: str) -> None:
    """Put imported partitions in place and record them, with what they stand on now, so that they are not stale the moment they arrive.

    All files are written before the first takes its place, and on an exception all is as it was. A process that dies in between leaves at most one
    missing partition, which a run computes and the same import finishes.
    """
    lineage, key = workspace.lineage(), workspace.stage.key(name)
    told = {
        "imported_from": str(file.resolve()),
        "sha256": storage.file_sha256(file),
        "imported_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "note": note,
    }
    arrivals = []
    with ExitStack() as leftovers:
        for partition, part in parts.items():
            place = workspace.path(name, partition)
            for path in _beside(place):
                path.unlink(missing_ok=True)  # of an import that was killed
                leftovers.callback(path.unlink, missing_ok=True)
            version = part.write(_beside(place)[0])
            metadata = {**told, "path": dg.MetadataValue.path(str(place)), **part.shown}
            event = lineage.materialisation(key, partition, version, lineage.input_tags(key, partition), metadata, source="imported")
            before = lineage.record(key, partition)
            arrivals.append(_Arrival(place, event, None if before is None else before.event_log_entry.asset_materialization))
        with ExitStack() as undo:
            for arrival in arrivals:
                undo.callback(arrival.put_back, workspace.instance)
                arrival.settle(workspace.instance)
            undo.pop_all()


def import_vector(workspace: Workspace, file: Path, site: str, epoch: int, note: str = "") -> str:
    """Put a vector made elsewhere in the place of a site's epoch: a safetensors, `.pt` or GGUF file.

    Raises:
        VectorFileError: truncated, no floating point, NaN, another width or shape, or a vector for another block than the site's.
        ExchangeError: no such site or epoch, or a derived one.
    """
    derived = workspace.study.derived_sites.get(site)
    if derived is not None:
        raise ExchangeError(f"{file}: {site} is made from {derived.site} without another study's direction; import a vector for {derived.site}")
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
    header = provenance(site, epoch, "imported", details)
    part = _Part(lambda path: storage.write_tensors(path, {"vector": vector}, header), {"norm": float(np.linalg.norm(vector))})
    with workspace._alone():
        _place(workspace, "steering_vectors", {partition: part}, file, note)
    name, maker = workspace.study.name, read.provenance.get("model", model.source)
    told = f"{file.name} (norm {np.linalg.norm(vector):.3f}" + (")" if maker == model.source else f"; made for {maker}, used with {model.source})")
    return f"{name}: steering_vectors {partition} is now {told}; `relseek run {name}` computes what follows"


def import_generations(workspace: Workspace, file: Path, note: str = "") -> str:
    """Put replies made elsewhere in the place of whole partitions of `generations`. What the file does not say of a reply is null.

    Raises:
        ExchangeError: a study without replies of its own, an unknown site, dose or item, a field that is not what it should be, a reply twice.
    """
    study = workspace.study
    if "preference_pairs" not in workspace.catalogue:
        raise ExchangeError(f"{file}: study {study.name} has no replies of its own; import them into a study that trains and sweeps vectors")
    with workspace._alone():
        known = workspace.path("preference_pairs", None)
        if not known.is_file():
            raise ExchangeError(f"the study's items are not known yet; `relseek run {study.name} --select preference_pairs` first")
        prompts = {
            row.conversation: [{"role": "system", "content": study.prompts.system}, *row.prompt]
            for row in evaluation_items(storage.read_table(known, PREFERENCE_PAIRS), study.seed).itertuples()
        }
        rows = _Rows(workspace, "generations")
        for number, row in storage.read_jsonl(file):
            where = f"{file}, line {number}"
            _require(row, (*CELL, "item", "reply"), where)
            item = _text(row, "item", where)
            if item not in prompts:
                raise ExchangeError(
                    f"{where}: item {item!r} is no held-out conversation of the study; generation_metrics needs its target and anti-target replies"
                )
            ids = _token_ids(row, where)
            tokens = _maybe(row, "tokens", where, _count)
            if tokens is not None and ids is not None and tokens != len(ids):
                raise ExchangeError(f"{where}: tokens is {tokens}, and token_ids holds {len(ids)}; correct one or leave tokens out")
            rows.add(
                row,
                where,
                {
                    "item": item,
                    "prompt": prompts[item] if row.get("prompt") is None else _messages(row["prompt"], where),
                    "reply": _text(row, "reply", where),
                    "tokens": len(ids) if ids is not None else tokens,
                    "seed": _maybe(row, "seed", where, _whole),
                    "finished": _maybe(row, "finished", where, _flag),
                    "token_ids": ids,
                    "mean_log_prob": _maybe(row, "mean_log_prob", where, _log_prob),
                    "source": "imported",
                },
            )
        return _import_cells(rows, file, note)


def import_scores(workspace: Workspace, file: Path, note: str = "") -> str:
    """Put scores made elsewhere in the place of whole partitions of `judge_scores`.

    A row's status is kept. A row with neither score nor status says `empty_reply` where the reply is empty, and `missing` where it is not.

    Raises:
        ExchangeError: a study without them, an unknown rubric, site or dose, an item that no reply of the partition answers, a score outside the
            rubric's scale, a status that is unknown or contradicts the score.
    """
    study = workspace.study
    if "judge_scores" not in workspace.catalogue:
        raise ExchangeError(f"{file}: study {study.name} has no judge_scores; only a study with a behaviour does")
    folder = study.behaviour_folder
    found = read_rubrics(folder).values() if study.judges else [read_rubric(folder / FILES[name]) for name in ("rating_rubric", "coherence_rubric")]
    rubrics = {rubric.name: rubric for rubric in found}
    with workspace._alone():
        rows = _Rows(workspace, "judge_scores")
        statuses = next(column.choices for column in rows.schema.columns if column.name == "status")
        replies: dict[str, dict[str, str | None]] = {}
        for number, row in _read_csv(file):
            where = f"{file}, line {number}"
            _require(row, (*CELL, "item", "rubric", "judge"), where)
            if "score" not in row:
                raise ExchangeError(f"{where}: the column score is missing; add it, and leave it empty where there is no score")
            if row["rubric"] not in rubrics:
                raise ExchangeError(f"{where}: rubric {row['rubric']!r} is none of the behaviour's: {', '.join(rubrics)}")
            rubric = rubrics[row["rubric"]]
            score = _maybe(row, "score", where, _number)
            if score is not None and not rubric.scale_min <= score <= rubric.scale_max:
                raise ExchangeError(f"{where}: score {score:g} lies outside the rubric's {rubric.scale_min:g} to {rubric.scale_max:g}")
            partition = rows.partition(row, where)
            if partition not in replies:
                replies[partition] = _rated(workspace, partition, where)
            if row["item"] not in replies[partition]:
                raise ExchangeError(
                    f"{where}: item {row['item']!r} is none that a reply of {partition} answers; `relseek table {study.name} generations -p "
                    f"'{partition}'` lists them"
                )
            attempt, cost = (_maybe(row, name, where, read) for name, read in (("attempt", _count), ("cost_usd", _usd)))
            rows.add(
                row,
                where,
                {
                    **{name: row[name] for name in ("item", "rubric", "judge")},
                    "score": score,
                    "status": _status(row, score, replies[partition][row["item"]], statuses, where),
                    "cost_usd": cost,
                    "attempt": 1 if attempt is None else attempt,
                    "band": None if score is None else rubric.band_of(score),
                    "source": "imported",
                    **{name: row.get(name) for name in ("raw", "model")},
                    **{name: _maybe(row, name, where, _count) for name in ("prompt_tokens", "completion_tokens")},
                },
            )
        told = _import_cells(rows, file, note)
    unscored = pd.Series([row["status"] for row in rows.rows if row["score"] is None]).value_counts()
    return told + "".join(f"\nwithout a score: {count} `{status}`" for status, count in unscored.items())


def _read_csv(file: Path) -> list[tuple[int, dict[str, str | None]]]:
    """The rows of a CSV with their line numbers; an empty cell is None."""
    found = []
    try:
        with file.open(encoding="utf-8", newline="") as stream:
            reader = csv.DictReader(stream)
            for row in reader:
                if None in row or None in row.values():
                    beside = "more" if None in row else "fewer"
                    raise ExchangeError(f"{file}, line {reader.line_num}: {beside} cells than the header has columns; quote cells that hold commas")
                found.append((reader.line_num, {name: cell or None for name, cell in row.items()}))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ExchangeError(f"{file}: cannot be read as CSV ({error})") from error
    return found


def _rated(workspace: Workspace, partition: str, where: str) -> dict[str, str | None]:
    """Item -> reply of what a partition's scores are about; no reply is known where published scores are there and their replies are not."""
    path = workspace.path("generations", partition)
    if path.is_file():
        frame = storage.read_table(path, GENERATIONS)
        return dict(zip(frame["item"], frame["reply"], strict=True))
    scored = workspace.path("judge_scores", partition)
    if workspace.study.published.scores and scored.is_file():
        schema = workspace.catalogue["judge_scores"].schema_of(partition)
        return dict.fromkeys(storage.read_table(scored, schema)["item"])
    raise ExchangeError(
        f"{where}: generations {partition} has not been computed, so that the items are not known; import the replies that were scored, or "
        f"`relseek run {workspace.study.name} --select generations`, first"
    )


def _status(row: dict[str, Any], score: float | None, reply: str | None, known: Sequence[str], where: str) -> str:
    status = row.get("status")
    if status is None:
        return "scored" if score is not None else "empty_reply" if reply is not None and not reply.strip() else "missing"
    if status not in known:
        raise ExchangeError(f"{where}: status {status!r} is unknown; it is one of {', '.join(known)}")
    if (status == "scored") != (score is not None):
        beside = "no score" if score is None else f"the score {score:g}"
        raise ExchangeError(f"{where}: status {status!r} beside {beside}; correct one of the two")
    return str(status)


class _Rows:
    """Rows of a file on their way into partitions of an asset: none twice, each of a partition that the study has."""

    def __init__(self, workspace: Workspace, name: str) -> None:
        self.workspace = workspace
        self.name = name
        self.schema = workspace.catalogue[name].schema_of(None)
        self.rows: list[dict[str, Any]] = []
        self._partitions: dict[tuple[Any, ...], str] = {}
        self._places: dict[tuple[Any, ...], str] = {}

    def partition(self, row: dict[str, Any], where: str) -> str:
        """The partition that a row belongs to."""
        cell = self._cell(row, where)
        if cell not in self._partitions:
            self._partitions[cell] = _partition(self.workspace, self.name, *cell, where)
        return self._partitions[cell]

    def add(self, row: dict[str, Any], where: str, values: dict[str, Any]) -> None:
        self.partition(row, where)
        whole = {**dict(zip(CELL, self._cell(row, where), strict=True)), **values}
        key = tuple(whole[name] for name in self.schema.key)
        if key in self._places:
            named = ", ".join(f"{name} {value}" for name, value in zip(self.schema.key, key, strict=True))
            raise ExchangeError(f"{where}: two rows with the key {named}; the other is {self._places[key]}")
        self._places[key] = where.rpartition(", ")[2]
        self.rows.append(whole)

    def _cell(self, row: dict[str, Any], where: str) -> tuple[str, int, float]:
        return _text(row, "site", where), _whole(row, "epoch", where), _number(row, "multiplier", where) + 0.0

    def parts(self) -> dict[str, pd.DataFrame]:
        """Partition -> its rows, in the columns of the asset; what a file does not say is null."""
        frame = pd.DataFrame(self.rows, dtype=object).reindex(columns=list(self.schema.names))
        return {self._partitions[cell]: part for cell, part in frame.groupby(list(CELL))}


def _import_cells(rows: _Rows, file: Path, note: str) -> str:
    """Check every cell first and write afterwards, so that a bad file changes nothing."""
    if not rows.rows:
        raise ExchangeError(f"{file}: no rows")
    workspace, name, schema = rows.workspace, rows.name, rows.schema
    parts = rows.parts()
    for part in parts.values():
        schema.to_arrow(part, str(file))
    brought = {
        partition: _Part(partial(storage.write_table, frame=part, schema=schema), {"dagster/row_count": len(part)})
        for partition, part in parts.items()
    }
    _place(workspace, name, brought, file, note)
    study = workspace.study.name
    return f"{study}: {len(rows.rows)} rows are now {len(parts)} partitions of {name}; `relseek run {study}` computes what follows"


def _partition(workspace: Workspace, name: str, site: str, epoch: int, multiplier: float | None, where: str) -> str:
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


def _require(row: dict[str, Any], names: Sequence[str], where: str) -> None:
    missing = [name for name in names if row.get(name) is None]
    if missing:
        raise ExchangeError(f"{where}: {', '.join(missing)} is missing; add it")


def _maybe(row: dict[str, Any], name: str, where: str, read: Callable[[dict[str, Any], str, str], Any]) -> Any:
    """A field that may be absent, or null."""
    return None if row.get(name) is None else read(row, name, where)


def _text(row: dict[str, Any], name: str, where: str) -> str:
    if not _writable(row[name]):
        raise ExchangeError(f"{where}: {name} must be text, found {row[name]!r:.60}")
    return str(row[name])


def _writable(value: Any) -> bool:
    """Whether a value is text that UTF-8 can hold; JSON may spell half a character."""
    try:
        return isinstance(value, str) and value.encode() is not None
    except UnicodeEncodeError:
        return False


def _flag(row: dict[str, Any], name: str, where: str) -> bool:
    if not isinstance(row[name], bool):
        raise ExchangeError(f"{where}: {name} must be true or false, found {row[name]!r:.60}")
    return bool(row[name])


def _number(row: dict[str, Any], name: str, where: str) -> float:
    value = row[name]
    try:
        found = float("" if isinstance(value, bool) else value)
    except (TypeError, ValueError, OverflowError) as error:
        raise ExchangeError(f"{where}: {name} {value!r:.60} is no number") from error
    if not np.isfinite(found):
        raise ExchangeError(f"{where}: {name} must be finite")
    return found


def _whole(row: dict[str, Any], name: str, where: str) -> int:
    """A whole number, which `3.0` is; to the last digit where it is written without a point."""
    value = row[name]
    if isinstance(value, str) and re.fullmatch(r"\s*[+-]?\d{1,19}\s*", value, re.ASCII):
        value = int(value)
    number = _number(row, name, where)
    found = value if isinstance(value, int) else int(number)
    if not number.is_integer() or not -(2**63) <= found < 2**63:
        raise ExchangeError(f"{where}: {name} must be a whole number of at most 64 bits, found {value!r:.60}")
    return found


def _count(row: dict[str, Any], name: str, where: str) -> int:
    found = _whole(row, name, where)
    if found < 0:
        raise ExchangeError(f"{where}: {name} must be 0 or more, found {found}")
    return found


def _usd(row: dict[str, Any], name: str, where: str) -> float:
    found = _number(row, name, where)
    if found < 0:
        raise ExchangeError(f"{where}: {name} must be 0 or more, found {found:g}")
    return found


def _log_prob(row: dict[str, Any], name: str, where: str) -> float:
    found = _number(row, name, where)
    if found > 0:
        raise ExchangeError(f"{where}: {name} is a mean log-probability and at most 0, found {found:g}")
    return found


def _token_ids(row: dict[str, Any], where: str) -> list[int] | None:
    ids = row.get("token_ids")
    if ids is not None and not (
        isinstance(ids, list) and all(isinstance(token, int) and not isinstance(token, bool) and token >= 0 for token in ids)
    ):
        raise ExchangeError(f"{where}: token_ids must be a list of token numbers, found {ids!r:.60}")
    return ids


def _messages(prompt: Any, where: str) -> list[dict[str, str]]:
    """Messages before a reply as a chat template takes them: a system message if any, then user and assistant in turn, the user last."""
    messages: list[Any] = prompt if isinstance(prompt, list) else [None]
    for number, message in enumerate(messages, 1):
        if not isinstance(message, dict) or message.keys() != {"role", "content"} or not _writable(message["content"]):
            raise ExchangeError(f"{where}: prompt must be a list of messages, each with role and content as text; message {number} is none")
    turns = [message["role"] for message in messages]
    turns = turns[1:] if turns[:1] == ["system"] else turns
    if len(turns) % 2 == 0 or turns != ["user", "assistant"] * (len(turns) // 2) + ["user"]:
        raise ExchangeError(f"{where}: prompt must hold a system message if any, then user and assistant in turn, and end on the user's")
    return messages


# --- difference -------------------------------------------------------------------------------------------------------


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
            found.append({"asset": asset, **{str(name): _plain(value) for name, value in row.items()}, "overlap": overlap})
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
