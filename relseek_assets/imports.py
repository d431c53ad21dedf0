"""What comes into a study from elsewhere: vectors, replies and scores.

Here belong checks at the door and provenance. An imported partition is recorded as such and no run overwrites it.
"""

from __future__ import annotations

import csv
import json
import os
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

from relseek_assets import import_fields as fields
from relseek_assets.behaviour import FILES, read_rubric, read_rubrics
from relseek_assets.dataset.pairs import PREFERENCE_PAIRS, evaluation_items
from relseek_assets.exchange import partition_of
from relseek_assets.import_fields import ExchangeError
from relseek_assets.planning import Workspace
from relseek_assets.study import layer_of
from relseek_assets.sweeps.tables import GENERATIONS
from relseek_assets.vectors.tables import provenance
from relseek_resources import storage
from relseek_resources.vector_files import read_vectors

CELL = ("site", "epoch", "multiplier")


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
    partition = partition_of(workspace, "steering_vectors", site, epoch, None, str(file))
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
            fields.require(row, (*CELL, "item", "reply"), where)
            item = fields.text(row, "item", where)
            if item not in prompts:
                raise ExchangeError(
                    f"{where}: item {item!r} is no held-out conversation of the study; generation_metrics needs its target and anti-target replies"
                )
            ids = fields.token_ids(row, where)
            tokens = fields.maybe(row, "tokens", where, fields.count)
            if tokens is not None and ids is not None and tokens != len(ids):
                raise ExchangeError(f"{where}: tokens is {tokens}, and token_ids holds {len(ids)}; correct one or leave tokens out")
            rows.add(
                row,
                where,
                {
                    "item": item,
                    "prompt": prompts[item] if row.get("prompt") is None else fields.messages(row["prompt"], where),
                    "reply": fields.text(row, "reply", where),
                    "tokens": len(ids) if ids is not None else tokens,
                    "seed": fields.maybe(row, "seed", where, fields.whole),
                    "finished": fields.maybe(row, "finished", where, fields.flag),
                    "token_ids": ids,
                    "mean_log_prob": fields.maybe(row, "mean_log_prob", where, fields.log_prob),
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
            fields.require(row, (*CELL, "item", "rubric", "judge"), where)
            if "score" not in row:
                raise ExchangeError(f"{where}: the column score is missing; add it, and leave it empty where there is no score")
            if row["rubric"] not in rubrics:
                raise ExchangeError(f"{where}: rubric {row['rubric']!r} is none of the behaviour's: {', '.join(rubrics)}")
            rubric = rubrics[row["rubric"]]
            score = fields.maybe(row, "score", where, fields.number)
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
            attempt, cost = (fields.maybe(row, name, where, read) for name, read in (("attempt", fields.count), ("cost_usd", fields.usd)))
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
                    **{name: fields.maybe(row, name, where, fields.count) for name in ("prompt_tokens", "completion_tokens")},
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
            self._partitions[cell] = partition_of(self.workspace, self.name, *cell, where)
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
        return fields.text(row, "site", where), fields.whole(row, "epoch", where), fields.number(row, "multiplier", where) + 0.0

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
