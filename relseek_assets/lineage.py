"""Data versions: which bytes each partition came from, and what is missing, stale or fresh.

Here belong reading and writing of Dagster's version tags and the judgement of staleness, one partition at a time. One Dagster run
computes one data version for all its partitions, so partitions record their own (docs/decisions.md). What to run because of
it belongs in `planning.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import dagster as dg
from dagster._core.definitions.data_version import (
    CODE_VERSION_TAG,
    DATA_VERSION_IS_USER_PROVIDED_TAG,
    DATA_VERSION_TAG,
    NULL_DATA_VERSION,
    CachingStaleStatusResolver,
    StaleStatus,
    extract_data_version_from_entry,
    get_input_data_version_tag,
    get_input_event_pointer_tag,
)
from dagster._core.definitions.partitions.context import partition_loading_context
from dagster._core.definitions.partitions.utils import MultiPartitionKey, get_tags_from_multi_partition_key
from dagster._core.definitions.source_asset import SYSTEM_METADATA_KEY_SOURCE_ASSET_OBSERVATION
from dagster._core.loader import LoadingContext

from relseek_resources.storage import content_version

STATUS = "status"  # metadata of a partition that holds nothing, and why
SOURCE_TAG = "relseek/source"  # `imported` on partitions that came from a file instead of a run, `deployed` on those that a server recorded
NO_EVENT = "-1"  # before every event; with Dagster's own word, NULL, the resolver takes an input that arrives later for unchanged
MOST_IDS_OF_A_QUERY = 500  # SQLite allows 999 variables in a statement

#: Metadata that keeps Dagster from adding an event of its own to an output: ours, with its own version, is there already.
ALREADY_RECORDED = {SYSTEM_METADATA_KEY_SOURCE_ASSET_OBSERVATION: True}


class Loading(LoadingContext):
    """What Dagster's resolver wants of its surroundings: the instance and a cache that lives as long as one question."""

    def __init__(self, instance: dg.DagsterInstance) -> None:
        self._instance = instance
        self._loaders: dict[Any, Any] = {}

    @property
    def instance(self) -> dg.DagsterInstance:
        return self._instance

    @property
    def loaders(self) -> dict[Any, Any]:
        return self._loaders


class _LatestRecords:
    """The latest record of every partition of an asset, fetched together and kept for as long as one question lasts.

    Stands in for the instance and for its queryer inside Dagster's resolver of staleness.
    """

    def __init__(self, instance: dg.DagsterInstance, graph: Any) -> None:
        self._instance = instance
        self._graph = graph
        self._found: dict[dg.AssetKey, dict[str | None, Any]] = {}

    def of(self, key: dg.AssetKey, partition: str | None) -> Any:
        if key not in self._found:
            node = self._graph.get(key)
            self._found[key] = latest_by_partition(self._instance, key, self._observed(key)) if node.is_partitioned else {}
        known = self._found[key]
        if partition is None and None not in known:
            known[None] = self._instance.get_latest_data_version_record(key, self._observed(key))
        return known.get(None if partition is None else str(partition))

    def _observed(self, key: dg.AssetKey) -> bool:
        """Whether an asset's versions come from observations; an external asset that is not observed is another study's, and materialised there."""
        return self._graph.get(key).is_observable

    def get_latest_materialization_or_observation_record(self, asset_partition: Any) -> Any:
        return self.of(asset_partition.asset_key, asset_partition.partition_key)

    def get_latest_data_version_record(
        self,
        key: dg.AssetKey,
        is_source: bool | None = None,
        partition_key: str | None = None,
        before_cursor: int | None = None,
        after_cursor: int | None = None,
    ) -> Any:
        if before_cursor is not None:
            return self._instance.get_latest_data_version_record(key, self._observed(key), partition_key, before_cursor, after_cursor)
        found = self.of(key, partition_key)
        return None if found is None or (after_cursor is not None and found.storage_id <= after_cursor) else found


def latest_by_partition(instance: dg.DagsterInstance, key: dg.AssetKey, observed: bool) -> dict[str | None, Any]:
    """Partition -> its latest observation or materialisation, in two queries."""
    kind = dg.DagsterEventType.ASSET_OBSERVATION if observed else dg.DagsterEventType.ASSET_MATERIALIZATION
    storage = instance.event_log_storage
    places = list(storage.get_latest_storage_id_by_partition(key, kind).values())
    found: dict[str | None, Any] = {}
    for start in range(0, len(places), MOST_IDS_OF_A_QUERY):
        chosen = places[start : start + MOST_IDS_OF_A_QUERY]
        for record in storage.get_event_records(dg.EventRecordsFilter(event_type=kind, asset_key=key, storage_ids=chosen)):
            found[record.partition_key] = record
    return found


def version_of(record: Any) -> str | None:
    """The data version that an event carries, or None where there is no event."""
    found = None if record is None else extract_data_version_from_entry(record.event_log_entry)
    return None if found is None else found.value


@dataclass(frozen=True)
class State:
    """Whether one partition is `missing`, `stale`, `fresh` or `imported`, or `absent`: what it is made from is not here; and why.

    `nothing` is what a partition that holds nothing says of that.
    """

    status: str
    reason: str = ""
    version: str | None = None
    nothing: str = ""


def joined(versions: Sequence[str]) -> str:
    """One version for those of all the partitions that are read, empty ones left out, since a partition that is not there is not read."""
    there = [version for version in versions if version]
    return there[0] if len(there) == 1 else content_version(there) if there else NULL_DATA_VERSION.value


class Lineage:
    """Versions and staleness of a graph's partitions in one instance, as they are at the moment of the first question.

    `asked` says whether the study asks for a partition: of what it asked for once, the event log still has events.
    """

    def __init__(
        self, instance: dg.DagsterInstance, graph: Any, asked: Callable[[dg.AssetKey, str | None], bool] = lambda key, partition: True
    ) -> None:
        self.instance = instance
        self.graph = graph
        self._asked = asked
        self._latest = _LatestRecords(instance, graph)
        self._parents: dict[tuple[dg.AssetKey, str | None], list[tuple[dg.AssetKey, str | None]]] = {}

    @cached_property
    def _resolver(self) -> CachingStaleStatusResolver:
        resolver = CachingStaleStatusResolver(self.instance, self.graph, Loading(self.instance))
        # it asks for one partition after the other, 4 to 8 ms each; ours answers from two queries an asset
        resolver._instance = resolver._instance_queryer = self._latest  # type: ignore[assignment]
        return resolver

    def parents(self, key: dg.AssetKey, partition: str | None) -> list[tuple[dg.AssetKey, str | None]]:
        """Every upstream partition that is mapped onto this one."""
        if (key, partition) not in self._parents:
            self._parents[key, partition] = self._mapped(key, partition)
        return self._parents[key, partition]

    def read(self, key: dg.AssetKey, partition: str | None) -> list[tuple[dg.AssetKey, str | None]]:
        """The upstream partitions that this one reads: those that are there and that the study asks for."""
        return [found for found in self.parents(key, partition) if self._asked(*found) and self.record(*found) is not None]

    def _mapped(self, key: dg.AssetKey, partition: str | None) -> list[tuple[dg.AssetKey, str | None]]:
        found: list[tuple[dg.AssetKey, str | None]] = []
        with partition_loading_context(dynamic_partitions_store=self.instance):
            for parent in sorted(self.graph.get(key).parent_keys):
                if not self.graph.get(parent).is_partitioned:
                    found.append((parent, None))
                    continue
                subset = self.graph.get_parent_partition_keys_for_child(partition, parent, key).partitions_subset
                found += [(parent, upstream) for upstream in sorted(subset.get_partition_keys())]
        return found

    def record(self, key: dg.AssetKey, partition: str | None) -> Any:
        """The latest event of a partition that carries a data version, or None."""
        return self._latest.of(key, partition)

    def version(self, key: dg.AssetKey, partition: str | None) -> str | None:
        """The data version of a partition, or None where it was never materialised or observed."""
        return version_of(self.record(key, partition))

    def imported(self, key: dg.AssetKey, partition: str | None) -> bool:
        """Whether a partition came from a file instead of a run."""
        record = self.record(key, partition)
        event = None if record is None else record.event_log_entry.asset_materialization
        return event is not None and (event.tags or {}).get(SOURCE_TAG) == "imported"

    def nothing(self, key: dg.AssetKey, partition: str | None) -> str:
        """What a partition that holds nothing says of that: `absent: FILE`, or a fault; empty where all is well."""
        record = self.record(key, partition)
        event = None if record is None else record.event_log_entry.asset_materialization
        found = event.metadata.get(STATUS) if event else None
        return "" if found is None else str(found.value)

    def state(self, key: dg.AssetKey, partition: str | None) -> State:
        """Dagster's own verdict on one partition, one hop upstream, with the first reason in words.

        Dagster looks at the upstream partitions that there are and not at those that there were, so that of those the versions are compared here.
        """
        status = self._resolver.get_status(key, partition)
        if status == StaleStatus.MISSING or self._resolver.get_current_data_version(key, partition) == NULL_DATA_VERSION:
            return State("missing")
        version, nothing = self.version(key, partition), self.nothing(key, partition)
        if self.imported(key, partition):
            return State("imported", version=version, nothing=nothing)
        if status == StaleStatus.FRESH:
            others = self._reads_others(key, partition)
            return State("stale" if others else "fresh", others, version, nothing)
        cause = self._resolver.get_stale_causes(key, partition)[0]
        what = "" if cause.dependency is None else f" ({'/'.join(cause.dependency.asset_key.path[1:])})"
        return State("stale", cause.reason + what, version, nothing)

    def _reads_others(self, key: dg.AssetKey, partition: str | None) -> str:
        """Of which asset a partition would read others than those that it was made from, in words; empty where of none."""
        event = self.record(key, partition).event_log_entry.asset_materialization
        recorded = (event.tags or {}) if event else {}
        for parent, versions in self._versions(key, partition).items():
            known = recorded.get(get_input_data_version_tag(parent)) if self.graph.get(parent).is_partitioned else None
            # once, those that are not there were joined with the others
            if known is not None and known != joined(versions) and known != content_version(versions):
                return f"has other upstream partitions ({'/'.join(parent.path[1:])})"
        return ""

    def _versions(self, key: dg.AssetKey, partition: str | None) -> dict[dg.AssetKey, list[str]]:
        """Every asset upstream of a partition -> the versions of its partitions, empty where it is not there or not asked for."""
        found: dict[dg.AssetKey, list[str]] = {}
        for parent, upstream in self.parents(key, partition):
            version = self.version(parent, upstream) if self._asked(parent, upstream) else None
            found.setdefault(parent, []).append(version or "")
        return found

    def input_tags(self, key: dg.AssetKey, partition: str | None) -> dict[str, str]:
        """The version tags of everything that a partition reads, as they are now: call it before reading.

        Where several upstream partitions feed one, their versions are hashed together and the newest event is the pointer, which
        is what Dagster compares later events with.
        """
        newest: dict[dg.AssetKey, int] = {}
        for parent, upstream in self.parents(key, partition):
            record = self.record(parent, upstream)
            newest[parent] = max(newest.get(parent, 0), record.storage_id if record else 0)
        tags = {}
        for parent, versions in self._versions(key, partition).items():
            tags[get_input_data_version_tag(parent)] = joined(versions)
            tags[get_input_event_pointer_tag(parent)] = str(newest[parent]) if newest[parent] else NO_EVENT
        return tags

    def input_versions(self, key: dg.AssetKey, partition: str | None) -> dict[str, str]:
        """Input name -> version of a partition's latest materialisation, for reports."""
        record = self.record(key, partition)
        event = None if record is None else record.event_log_entry.asset_materialization
        tags = (event.tags or {}) if event else {}
        prefix = "dagster/input_data_version/"
        return {tag.removeprefix(prefix).partition("/")[2]: value for tag, value in tags.items() if tag.startswith(prefix)}

    def materialisation(
        self,
        key: dg.AssetKey,
        partition: str | None,
        version: str,
        inputs: Mapping[str, str],
        metadata: Mapping[str, Any],
        source: str | None = None,
    ) -> dg.AssetMaterialization:
        """The event that says: this partition now holds `version`, made by this code from these inputs."""
        dimensions = get_tags_from_multi_partition_key(partition) if isinstance(partition, MultiPartitionKey) else {}
        tags = {
            **inputs,
            **dimensions,
            CODE_VERSION_TAG: self.graph.get(key).code_version or "",
            DATA_VERSION_TAG: version,
            DATA_VERSION_IS_USER_PROVIDED_TAG: "true",
            **({SOURCE_TAG: source} if source else {}),
        }
        return dg.AssetMaterialization(key, partition=partition, metadata=dict(metadata), tags=tags)


def observation(key: dg.AssetKey, version: str, metadata: Mapping[str, Any], partition: str | None = None) -> dg.AssetObservation:
    """The event that gives an external file its data version; only observations make its readers stale."""
    dimensions = get_tags_from_multi_partition_key(partition) if isinstance(partition, MultiPartitionKey) else {}
    tags = {**dimensions, DATA_VERSION_TAG: version, DATA_VERSION_IS_USER_PROVIDED_TAG: "true"}
    return dg.AssetObservation(key, partition=partition, metadata=dict(metadata), tags=tags)


def fan_ins_beyond(graph: Any, instance: dg.DagsterInstance, limit: int) -> Iterable[tuple[str, str | None, int]]:
    """Partitions that read more than `limit` partitions of one asset: Dagster would call them fresh without looking."""
    lineage = Lineage(instance, graph)
    for key in graph.materializable_asset_keys:
        definition = graph.get(key).partitions_def
        for partition in definition.get_partition_keys() if definition else [None]:
            counts: dict[dg.AssetKey, int] = {}
            for parent, _ in lineage.parents(key, partition):
                counts[parent] = counts.get(parent, 0) + 1
            for parent, count in counts.items():
                if count > limit:
                    yield f"{key.to_user_string()} <- {parent.to_user_string()}", partition, count
