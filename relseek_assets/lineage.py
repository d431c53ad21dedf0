"""Data versions: which bytes each partition came from, and what is missing, stale or fresh.

Here belong reading and writing of Dagster's version tags and the judgement of staleness, one partition at a time. One Dagster run
computes one data version for all its partitions, so partitions record their own (docs/decisions.md). What to run because of
it belongs in `planning.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
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
    """Whether one partition is `missing`, `stale`, `fresh` or `imported`, or `absent`: what it is made from is not here; and why."""

    status: str
    reason: str = ""
    version: str | None = None


class Lineage:
    """Versions and staleness of a graph's partitions in one instance, as they are at the moment of the first question."""

    def __init__(self, instance: dg.DagsterInstance, graph: Any) -> None:
        self.instance = instance
        self.graph = graph
        self._latest = _LatestRecords(instance, graph)

    @cached_property
    def _resolver(self) -> CachingStaleStatusResolver:
        resolver = CachingStaleStatusResolver(self.instance, self.graph, Loading(self.instance))
        # it asks for one partition after the other, 4 to 8 ms each; ours answers from two queries an asset
        resolver._instance = resolver._instance_queryer = self._latest  # type: ignore[assignment]
        return resolver

    def parents(self, key: dg.AssetKey, partition: str | None) -> list[tuple[dg.AssetKey, str | None]]:
        """Every upstream partition that this one reads."""
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

    def state(self, key: dg.AssetKey, partition: str | None) -> State:
        """Dagster's own verdict on one partition, one hop upstream, with the first reason in words."""
        status = self._resolver.get_status(key, partition)
        if status == StaleStatus.MISSING or self._resolver.get_current_data_version(key, partition) == NULL_DATA_VERSION:
            return State("missing")
        version = self.version(key, partition)
        if self.imported(key, partition):
            return State("imported", version=version)
        if status == StaleStatus.FRESH:
            return State("fresh", version=version)
        cause = self._resolver.get_stale_causes(key, partition)[0]
        what = "" if cause.dependency is None else f" ({'/'.join(cause.dependency.asset_key.path[1:])})"
        return State("stale", cause.reason + what, version)

    def input_tags(self, key: dg.AssetKey, partition: str | None) -> dict[str, str]:
        """The version tags of everything that a partition reads, as they are now: call it before reading.

        Where several upstream partitions feed one, their versions are hashed together and the newest event is the pointer, which
        is what Dagster compares later events with.
        """
        read: dict[dg.AssetKey, list[tuple[str, int]]] = {}
        for parent, upstream in self.parents(key, partition):
            record = self.record(parent, upstream)
            version = None if record is None else extract_data_version_from_entry(record.event_log_entry)
            read.setdefault(parent, []).append((version.value if version else "", record.storage_id if record else 0))
        tags = {}
        for parent, found in read.items():
            versions = [version for version, _ in found]
            newest = max(pointer for _, pointer in found)
            joined = versions[0] if len(versions) == 1 else content_version(versions)
            tags[get_input_data_version_tag(parent)] = joined or NULL_DATA_VERSION.value
            tags[get_input_event_pointer_tag(parent)] = str(newest) if newest else NO_EVENT
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
