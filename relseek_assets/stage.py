"""How an asset of a stage is declared and recorded: the one door between plain stage code and Dagster.

`study_asset` turns a generator over `Work` into an asset whose partitions are written atomically and recorded one by one, each with
its own data version, as soon as it is finished, so that a killed run loses only what was in flight.
"""

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any

import dagster as dg
import numpy as np
import pandas as pd
from dagster._core.definitions.partitions.utils import MultiPartitionKey
from matplotlib.figure import Figure
from tqdm import tqdm

from relseek_assets import figures, sources
from relseek_assets.bill import Bill
from relseek_assets.lineage import ALREADY_RECORDED, STATUS, Lineage
from relseek_assets.partitions import Partitions, cell_of
from relseek_assets.study import Study
from relseek_resources import storage
from relseek_resources.compute import Launcher, ModelLoader
from relseek_resources.storage import TableSchema, content_version
from relseek_resources.stored_vectors import store_folder

TABLE, VECTORS, PAGE = "parquet", "safetensors", "html"
SAID = "relseek_said"  # attribute of a log record: the line that a terminal shows of it
NOTHING: Any = dg.Nothing  # our results pass through files and not through Dagster

Waits = Callable[[Path], Mapping[str | None, str]]  # from the study's folder: partition -> what it waits for
Bills = Callable[[Path, Sequence[str | None]], Bill]  # from the study's folder and partitions


class Store(dg.ConfigurableResource):
    """The folder of asset files, `STUDY/ASSET/SITE/STEP.parquet`; an empty root means RELSEEK_STORE or the Dagster home."""

    root: str = ""

    def path(self, key: dg.AssetKey, partition: str | None, suffix: str) -> Path:
        parts = ["all"] if partition is None else str(partition).split("|")
        return self._root.joinpath(*key.path, *parts[:-1], f"{parts[-1]}.{suffix}")

    def folder(self, study: str) -> Path:
        """Where all files of a study lie, assets and whatever else it has to remember."""
        return self._root / study

    @property
    def _root(self) -> Path:
        return Path(self.root) if self.root else store_folder()


@dataclass(frozen=True)
class StageAsset:
    """An asset of a study: its Dagster definition and the shape of its files.

    `schema` is None unless they are tables, and a mapping where every partition is a table of its own shape. `view` turns the rows of all
    partitions into what readers are shown, where a column depends on partitions beside. `seconds` is the stated estimate for one
    partition, used until a run has measured it. `optional` names inputs that may be absent without the partition's being so. `waits` says which
    partitions cannot be had yet because somebody outside is at work on them, `bill` what partitions would cost. `made_by` is the command that alone
    makes it, so that no run does.
    """

    name: str
    definition: dg.AssetsDefinition
    form: str
    schema: TableSchema | Mapping[str, TableSchema] | None = None
    seconds: float = 0.1
    view: Callable[[pd.DataFrame], pd.DataFrame] | None = None
    optional: tuple[str, ...] = ()
    waits: Waits | None = None
    bill: Bills | None = None
    made_by: str = ""

    def schema_of(self, partition: str | None) -> TableSchema:
        assert self.schema is not None, f"{self.name} is no table"
        return self.schema if isinstance(self.schema, TableSchema) else self.schema[str(partition)]


@dataclass
class Work:
    """What an asset's body sees: the partitions to compute, its inputs, and where results go."""

    study: Study
    context: dg.AssetExecutionContext
    store: Store
    resources: Any
    lineage: Lineage
    catalogue: Mapping[str, StageAsset]
    me: StageAsset
    partitions: list[str | None]
    _inputs: dict[str | None, dict[str, str]] = field(default_factory=dict)
    _clock: float = field(default_factory=time.monotonic)
    _statuses: dict[str, int] = field(default_factory=dict)

    @property
    def log(self) -> Any:
        return self.context.log

    @property
    def beside(self) -> set[str]:
        """Names of the study's assets that the same run computes, mine among them."""
        keys = self.context.job_def.asset_layer.executable_asset_keys
        return {name for name in self.catalogue if self.key(name) in keys}

    def key(self, asset: str) -> dg.AssetKey:
        return key_of(self.study, asset)

    def read_table(self, asset: str, partition: str | None = None, without: Sequence[str] = ()) -> pd.DataFrame:
        """One partition of an upstream table; columns `without` are not read."""
        return storage.read_table(self.store.path(self.key(asset), partition, TABLE), self.catalogue[asset].schema_of(partition), without)

    def status(self, asset: str, partition: str | None = None) -> str:
        """What an upstream partition says of itself where it could not be computed: `absent: FILE`, or a fault; empty where all is well."""
        return self.lineage.nothing(self.key(asset), partition)

    def read_tensors(self, asset: str, partition: str | None = None) -> tuple[dict[str, np.ndarray], dict[str, str]]:
        return storage.read_tensors(self.store.path(self.key(asset), partition, VECTORS))

    def upstream(self, asset: str, partition: str | None) -> list[str | None]:
        """The partitions of `asset` that `partition` reads and that are there, in the order of site, epoch and dose."""
        found = [key for parent, key in self.lineage.read(self.context.asset_key, partition) if parent == self.key(asset)]
        return sorted(found, key=partition_order)

    def by_vector(self) -> Iterator[tuple[str, int, list[str | None]]]:
        """The wanted partitions grouped by vector: (site, epoch, partitions)."""
        for (site, epoch), found in groupby(self.partitions, key=lambda key: (cell_of(key).site, cell_of(key).epoch)):
            assert site is not None and epoch is not None, f"{self.me.name} has partitions without a site or an epoch"
            yield site, epoch, list(found)

    def version(self, asset: str, partition: str | None = None) -> str | None:
        return self.lineage.version(self.key(asset), partition)

    def remember_inputs(self) -> None:
        """Note the input versions of every partition before anything is read."""
        self._inputs = {partition: self.lineage.input_tags(self.context.asset_key, partition) for partition in self.partitions}

    def table(
        self, partition: str | None, frame: pd.DataFrame, metadata: Mapping[str, Any] | None = None, status: str = ""
    ) -> dg.AssetMaterialization:
        """Write one partition's table and say so.

        Args:
            status: why there is nothing, where nothing could be computed; it is part of the data version.
        """
        schema = self.me.schema_of(partition)
        path = self.store.path(self.context.asset_key, partition, TABLE)
        version = storage.write_table(path, frame[list(schema.names)], schema)
        shown: dict[str, Any] = {"dagster/row_count": len(frame), "preview": preview(frame)}
        if status:
            version = content_version([version, status])
            shown[STATUS] = status
            self._statuses[status] = self._statuses.get(status, 0) + 1
        if not isinstance(self.me.schema, TableSchema):
            shown |= _column_metadata(schema)
        return self._recorded(partition, path, version, {**shown, **(metadata or {})})

    def nothing(self, partition: str | None, status: str) -> dg.AssetMaterialization:
        """Write an empty table that says why it is empty."""
        return self.table(partition, pd.DataFrame(columns=list(self.me.schema_of(partition).names), dtype=object), status=status)

    def tensors(
        self,
        partition: str | None,
        arrays: Mapping[str, np.ndarray],
        provenance: Mapping[str, str],
        metadata: Mapping[str, Any] | None = None,
    ) -> dg.AssetMaterialization:
        """Write one partition's arrays as safetensors with their provenance in the header, and say so."""
        path = self.store.path(self.context.asset_key, partition, VECTORS)
        version = storage.write_tensors(path, arrays, provenance)
        return self._recorded(partition, path, version, metadata or {})

    def page(self, partition: str | None, text: str, metadata: Mapping[str, Any] | None = None) -> dg.AssetMaterialization:
        """Write one partition's HTML page, and say so."""
        path = self.store.path(self.context.asset_key, partition, PAGE)
        storage.write_text(path, text)
        return self._recorded(partition, path, content_version(text), metadata or {})

    def _recorded(self, partition: str | None, path: Path, version: str, metadata: Mapping[str, Any]) -> dg.AssetMaterialization:
        seconds = time.monotonic() - self._clock
        self._clock = time.monotonic()
        shown = {"path": dg.MetadataValue.path(str(path)), "seconds": round(seconds, 3), "bytes": path.stat().st_size, **metadata}
        plain = {name: value.item() if isinstance(value, np.generic) else value for name, value in shown.items()}  # Dagster wants plain numbers
        return self.lineage.materialisation(self.context.asset_key, partition, version, self._inputs[partition], plain)

    def warn(self, text: str) -> None:
        """Log a warning that `relseek run` shows in the terminal too, once an asset however many runs it takes."""
        self.log.warning(text, extra={SAID: f"{self.me.name}: {text}"})

    def say_statuses(self) -> None:
        """Log once why partitions hold nothing, and how many."""
        for status, count in self._statuses.items():
            self.log.warning(f"{self.me.name}: {count} partition{'' if count == 1 else 's'} without results: {status}")

    def progress(self, total: int, unit: str, what: str = "") -> "Progress":
        """A bar in the terminal and a line in the run's log every few seconds."""
        return Progress(self.log, total, unit, what or self.me.name)


class Progress:
    """Progress of long work: a terminal bar, and for the UI a log line at most every ten seconds."""

    def __init__(self, log: Any, total: int, unit: str, what: str) -> None:
        self._bar = tqdm(total=total, unit=unit, desc=what, file=sys.stderr, mininterval=1.0 if sys.stderr.isatty() else 15.0, leave=False)
        self._log, self._total, self._unit, self._what = log, total, unit, what
        self._start = self._said = time.monotonic()
        self._done = 0

    def __call__(self, count: int = 1) -> None:
        self._done += count
        self._bar.update(count)
        now = time.monotonic()
        if now - self._said > 10:
            rate = self._done / (now - self._start)
            left = (self._total - self._done) / rate
            self._log.info(f"{self._what}: {self._done} of {self._total} {self._unit}, {rate:.2f} a second, about {left:.0f} s left")
            self._said = now

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()


def partition_order(key: str | None) -> tuple[str, int, float]:
    cell = cell_of(key)
    return cell.site or "", cell.epoch or 0, cell.multiplier or 0.0


def plot(figure: Figure) -> dg.MetadataValue:
    """A figure for the asset's page: Markdown with the picture inside."""
    return png(figures.png(figure))


def png(encoded: str) -> dg.MetadataValue:
    """The same from a PNG in base64, drawn elsewhere."""
    return dg.MetadataValue.md(f"![figure](data:image/png;base64,{encoded})")


def preview(frame: pd.DataFrame, rows: int = 5) -> dg.MetadataValue:
    """The first rows as a Markdown table, long texts cut."""
    lines = ["| " + " | ".join(map(str, frame.columns)) + " |", "|" + "---|" * len(frame.columns)]
    columns = [frame[name].iloc[:rows].tolist() for name in frame.columns] if len(frame) else []
    lines += ["| " + " | ".join(map(_cell, row)) + " |" for row in zip(*columns, strict=True)]
    return dg.MetadataValue.md("\n".join(lines))


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value).replace("\n", " ")[:60].replace("|", "/")


def key_of(study: Study, asset: str) -> dg.AssetKey:
    """The key of an asset of `study`, or of another study's, written `STUDY/ASSET`."""
    return dg.AssetKey(asset.split("/") if "/" in asset else [study.name, asset])


class Stage:
    """Collects the assets of one study; each stage's `assets.py` adds its own."""

    def __init__(self, study: Study, owners: Sequence[str] = ("team:relseek",)) -> None:
        self.study = study
        self.partitions = Partitions(study)
        self.catalogue: dict[str, StageAsset] = {}
        self._owners = owners

    def key(self, asset: str) -> dg.AssetKey:
        return key_of(self.study, asset)

    @cached_property
    def graph(self) -> Any:
        """The study's whole asset graph, whatever part of it a run selects."""
        assets = [*(asset.definition for asset in self.catalogue.values()), *sources.assets(self.study)]
        return (
            dg.Definitions(assets=assets, resources={"store": Store(), "models": ModelLoader(), "launcher": Launcher()})
            .get_repository_def()
            .asset_graph
        )

    def lineage(self, instance: dg.DagsterInstance) -> Lineage:
        """Versions and staleness of the study's partitions in an instance."""
        return Lineage(instance, self.graph, self._asks_for)

    def _asks_for(self, key: dg.AssetKey, partition: str | None) -> bool:
        if key.path[0] != self.study.name:
            return True
        mine = self.catalogue.get(key.path[-1])
        evaluated = mine is not None and mine.definition.partitions_def is self.partitions.site_by_evaluated_epoch
        return self.partitions.exists(partition, evaluated)

    def asset(
        self,
        *,
        group: str,
        version: str,
        description: str,
        deps: Mapping[str, dg.PartitionMapping | None],
        partitions: dg.PartitionsDefinition | None = None,
        settings: Any = None,
        schema: TableSchema | Mapping[str, TableSchema] | None = None,
        view: Callable[[pd.DataFrame], pd.DataFrame] | None = None,
        form: str = TABLE,
        kinds: Sequence[str] = (),
        pool: str | None = None,
        seconds: float = 0.1,
        optional: Sequence[str] = (),
        waits: Waits | None = None,
        bill: Bills | None = None,
        made_by: str = "",
    ) -> Callable[[Callable[[Work], Iterator[dg.AssetMaterialization]]], StageAsset]:
        """Declare an asset of the study.

        Args:
            version: of the code; raise it when results would differ.
            deps: upstream asset, `STUDY/ASSET` for another study's -> how my partitions map onto its own.
            settings: the settings that the body reads; changing them makes the asset stale, as a new `version` does.
            form: what its files are: tables, vectors or a page.
            schema: of its tables, or one for each partition.
            view: from the rows of all partitions to what readers are shown.
            seconds: a stated estimate for one partition on two cores; `amounts.py` knows how much a study asks for beside the quickstart.
            optional: those of `deps` that are read where they are there: published files or other studies' assets, and what is made from them.
            waits: which partitions somebody outside is at work on; what is made from them is left out of a run.
            bill: what partitions would cost in dollars.
            made_by: the command whose doing it records; `relseek run` leaves it alone, and of its partitions only those that were made have a state.
        """

        def declare(body: Callable[[Work], Iterator[dg.AssetMaterialization]]) -> StageAsset:
            name = body.__name__

            @dg.asset(
                key=self.key(name),
                deps=[dg.AssetDep(self.key(upstream), partition_mapping=mapping) for upstream, mapping in deps.items()],
                partitions_def=partitions,
                backfill_policy=dg.BackfillPolicy.single_run() if partitions is not None else None,
                code_version=f"{version}-{content_version(settings)}",
                group_name=group,
                description=description,
                kinds={"python", form, *kinds},
                owners=list(self._owners),
                pool=pool,
                dagster_type=NOTHING,
                required_resource_keys={"store", "models", "launcher"},
                metadata=_column_metadata(schema) if isinstance(schema, TableSchema) else {},
            )
            def definition(context: dg.AssetExecutionContext) -> Iterator[Any]:
                lineage = self.lineage(context.instance)
                store = context.resources.store
                keys: list[str | None] = (
                    sorted(context.partition_keys, key=partition_order) if context.has_partition_key or context.has_partition_key_range else [None]
                )
                wanted = [key for key in map(multi, keys) if self.partitions.exists(key)]
                if any(asset.waits for asset in self.catalogue.values()):
                    wanted = self._ready(wanted, found, lineage, store.folder(self.study.name), context.log)
                if wanted:
                    work = Work(self.study, context, store, context.resources, lineage, self.catalogue, found, wanted)
                    work.remember_inputs()
                    yield from body(work)
                    work.say_statuses()
                yield dg.Output(None, metadata=ALREADY_RECORDED)

            found = StageAsset(name, definition, form, schema, seconds, view, tuple(optional), waits, bill, made_by)
            self.catalogue[name] = found
            return found

        return declare

    def _ready(self, wanted: Sequence[str | None], asset: StageAsset, lineage: Lineage, folder: Path, log: Any) -> list[str | None]:
        """Those of the wanted partitions whose inputs are there; the others wait for somebody outside, and a line says for whom."""
        waits = {name: other.waits(folder) for name, other in self.catalogue.items() if other.waits}
        known: dict[tuple[str, str | None], str] = {}

        def lacking(name: str, partition: str | None) -> str:
            """What a partition that reads what may be waited for lacks."""
            node = (name, partition)
            if node not in known:
                known[node] = ""
                for parent, key in lineage.parents(self.key(name), partition) if self._awaited(name) else ():
                    upstream = parent.path[-1]
                    made_here = parent.path[0] == self.study.name and upstream in self.catalogue and self.partitions.exists(key)
                    if not made_here or upstream in self.catalogue[name].optional:
                        continue
                    gone = "" if lineage.version(parent, key) else f"{upstream} {key or ''} is not there yet"
                    known[node] = waits.get(upstream, {}).get(None if key is None else str(key), "") or gone or lacking(upstream, key)
                    if known[node]:
                        break
            return known[node]

        reasons = {partition: lacking(asset.name, partition) for partition in wanted}
        left_out = [reason for reason in reasons.values() if reason]
        if left_out:
            log.warning(f"{asset.name}: {len(left_out)} of {len(wanted)} partitions left out: {left_out[0]}")
        return [partition for partition in wanted if not reasons[partition]]

    def _awaited(self, name: str) -> bool:
        """Whether an asset is made, at whatever remove, from one that may be waited for."""
        return name in self._downstream_of_waits

    @cached_property
    def _downstream_of_waits(self) -> set[str]:
        found: set[str] = set()
        for level in self.graph.toposorted_asset_keys_by_level:
            for key in level:
                parents = {parent.path[-1] for parent in self.graph.get(key).parent_keys if parent.path[0] == self.study.name}
                if key.path[-1] in self.catalogue and any(name in found or self.catalogue[name].waits for name in parents & self.catalogue.keys()):
                    found.add(key.path[-1])
        return found

    def followers(self) -> list[str]:
        """What is made, at whatever remove, from answers that somebody outside gives, and they themselves, upstream first."""
        order = [key.path[-1] for level in self.graph.toposorted_asset_keys_by_level for key in level]
        return [name for name in order if name in self.catalogue and (self.catalogue[name].waits or self._awaited(name))]


def multi(key: str | None) -> str | None:
    """Partition keys as Dagster's own kind, so that their dimensions are tagged."""
    if key is None or "|" not in key or isinstance(key, MultiPartitionKey):
        return key
    site, _, step = key.partition("|")
    return MultiPartitionKey({"site": site, "step": step})


def _column_metadata(schema: TableSchema) -> dict[str, Any]:
    columns = [
        dg.TableColumn(
            column.name,
            column.kind,
            f"{column.meaning}{f' ({column.unit})' if column.unit else ''}",
            dg.TableColumnConstraints(nullable=column.nullable),
        )
        for column in schema.columns
    ]
    return {"dagster/column_schema": dg.TableSchema(columns)}
