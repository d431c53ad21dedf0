"""What a study reads and does not make: the behaviour's files, base models, published judgements. Observed assets with versions.

A sensor looks every half minute and reports a new version as an observation, which is what makes readers stale in Dagster. The
command line looks before it plans.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import dagster as dg
from dagster._core.definitions.data_version import extract_data_version_from_entry

from relseek_assets.behaviour import FILES
from relseek_assets.lineage import observation
from relseek_assets.study import Study
from relseek_resources.models.loading import fingerprint
from relseek_resources.release import PROMPTED, RESCORED, TEST_PAIRS, Release
from relseek_resources.storage import StorageError, content_version, file_sha256

GROUP = "sources"
ABSENT = "absent"
PUBLISHED = (
    RESCORED,
    TEST_PAIRS,
    *(f"{PROMPTED}/{model}_levels_7/{name}.jsonl" for model in ("claude", "gpt") for name in ("generations", "relationship_scores")),
)
DESCRIPTIONS = {
    "behaviour_definition": "What the behaviour is, its target and its anti-target.",
    "rating_rubric": "The scale of the disposition, 1 to 10, in six anchored bands.",
    "coherence_rubric": "The scale of coherence, 1 to 10, in six anchored bands.",
    "pairwise_definition": "What it means for one reply to show more of the disposition than another.",
    "few_shots": "Prompts with replies graded by the behaviour's author.",
    "starter_conversations": "Conversations with a target and an anti-target reply to every user turn.",
    "base_models": "The weights of every model of the study.",
    "published_judgements": "Replies of the published study with their judges' scores, where RELSEEK_RELEASE has them.",
}


def _readers(study: Study) -> dict[str, Callable[[], tuple[str, dict[str, Any]]]]:
    """Name -> a function that looks and returns (version, metadata)."""

    def file(name: str) -> Callable[[], tuple[str, dict[str, Any]]]:
        path = study.behaviour_folder / FILES[name]

        def look() -> tuple[str, dict[str, Any]]:
            try:
                return file_sha256(path)[:16], {"path": dg.MetadataValue.path(str(path)), "bytes": path.stat().st_size}
            except StorageError:
                return ABSENT, {"path": dg.MetadataValue.path(str(path))}

        return look

    def models() -> tuple[str, dict[str, Any]]:
        found = {model.name: fingerprint(model.source) for model in study.models}
        return content_version(found), dict(found)

    def published() -> tuple[str, dict[str, Any]]:
        release = Release.from_environment()
        return release.version(PUBLISHED), {"RELSEEK_RELEASE": str(release.root or "not set")}

    return {**{name: file(name) for name in FILES}, "base_models": models, "published_judgements": published}


def keys(study: Study) -> list[dg.AssetKey]:
    return [dg.AssetKey([study.name, name]) for name in _readers(study)]


def assets(study: Study) -> list[dg.AssetsDefinition | dg.SourceAsset]:
    """Observable source assets: only those show an observation's version to what reads them."""

    def declare(name: str, look: Callable[[], tuple[str, dict[str, Any]]]) -> dg.AssetsDefinition | dg.SourceAsset:
        @dg.observable_source_asset(
            key=dg.AssetKey([study.name, name]), group_name=GROUP, description=DESCRIPTIONS[name], tags={"dagster/kind/file": ""}
        )
        def observe() -> dg.DataVersion:
            return dg.DataVersion(look()[0])

        return observe

    return [declare(name, look) for name, look in _readers(study).items()]


def changes(study: Study, instance: dg.DagsterInstance) -> list[dg.AssetObservation]:
    """Observations of everything whose version differs from the last one observed."""
    found = []
    for name, look in _readers(study).items():
        key = dg.AssetKey([study.name, name])
        version, metadata = look()
        record = instance.get_latest_data_version_record(key, True)
        known = None if record is None else extract_data_version_from_entry(record.event_log_entry)
        if known is None or version != known.value:
            found.append(observation(key, version, metadata))
    return found


def observe(study: Study, instance: dg.DagsterInstance) -> list[str]:
    """Record what changed, and name it."""
    found = changes(study, instance)
    for event in found:
        instance.report_runless_asset_event(event)
    return [event.asset_key.path[-1] for event in found]


def changed_files(study: Study) -> dg.SensorDefinition:
    """Looks at the study's sources every half minute and reports new versions."""

    @dg.sensor(
        name=f"{study.name}_changed_sources",
        minimum_interval_seconds=30,
        default_status=dg.DefaultSensorStatus.RUNNING,
        description="Reports new versions of behaviour files, models and the published release, so that what was made from the old shows as stale.",
        asset_selection=dg.AssetSelection.assets(*keys(study)),
    )
    def look(context: dg.SensorEvaluationContext) -> dg.SensorResult | dg.SkipReason:
        found = changes(study, context.instance)
        if not found:
            return dg.SkipReason("no source has changed")
        # a tick that requests no run counts as skipped; the reason is what its page shows
        return dg.SensorResult(asset_events=found, skip_reason=f"new versions of {', '.join(event.asset_key.path[-1] for event in found)}")

    return look
