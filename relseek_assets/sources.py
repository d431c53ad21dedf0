"""What a study reads and does not make: the behaviour's files, base models, published judgements, a trial's files. Observed assets with versions.

A sensor looks every half minute and reports a new version as an observation, which is what makes readers stale in Dagster. The
command line looks before it plans.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import dagster as dg
from dagster._core.definitions.data_version import extract_data_version_from_entry

from relseek_assets.behaviour import FILES
from relseek_assets.lineage import observation
from relseek_assets.partitions import Partitions
from relseek_assets.study import Study
from relseek_assets.trial import Trial
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
    "trial_files": "The raw files of the trial, one partition a file.",
    "trial_declarations": "What the study file declares of each outcome.",
    "published_judgements": "Replies of the published study with their judges' scores, where RELSEEK_RELEASE has them.",
}


Seen = dict[str | None, tuple[str, dict[str, Any]]]  # partition, or None for the whole -> (version, metadata)
Look = Callable[[], Seen]


def _readers(study: Study) -> dict[str, Look]:
    """Name -> a function that looks at the source."""
    found: dict[str, Look] = {}
    if study.steered:
        found |= {name: _file(study.behaviour_folder / file) for name, file in FILES.items()}
        found |= {"base_models": _models(study), "published_judgements": _published}
    if study.trial is not None:
        found["trial_files"] = _trial_files(study, study.trial)
        found["trial_declarations"] = _trial_declarations(study.trial)
    return found


def _file_version(path: Path) -> tuple[str, dict[str, Any]]:
    try:
        return file_sha256(path)[:16], {"path": dg.MetadataValue.path(str(path)), "bytes": path.stat().st_size}
    except StorageError:
        return ABSENT, {"path": dg.MetadataValue.path(str(path))}


def _file(path: Path) -> Look:
    return lambda: {None: _file_version(path)}


def _models(study: Study) -> Look:
    def look() -> Seen:
        found = {model.name: fingerprint(model.source) for model in study.models}
        return {None: (content_version(found), dict(found))}

    return look


def _published() -> Seen:
    release = Release.from_environment()
    return {None: (release.version(PUBLISHED), {"RELSEEK_RELEASE": str(release.root or "not set")})}


def _trial_files(study: Study, trial: Trial) -> Look:
    """A file's version holds what the study declares of it, so that a wider range or a new column is a new version too."""
    arms = [trial.participant, trial.study.model_dump(), trial.dose.model_dump(), [factor.model_dump() for factor in trial.factors], trial.times]

    def look() -> Seen:
        folder = trial.folder(study.path)
        found: Seen = {}
        for name, table in trial.tables.items():
            version, metadata = (ABSENT, {"path": f"{trial.root}/{table.file}"}) if folder is None else _file_version(folder / table.file)
            found[name] = (version if version == ABSENT else content_version([version, arms, table.model_dump()]), metadata)
        return found

    return look


def _trial_declarations(trial: Trial) -> Look:
    def look() -> Seen:
        arms = [trial.dose.model_dump(), [factor.model_dump() for factor in trial.factors], trial.arms_table, trial.robustness.model_dump()]
        found: Seen = {}
        for key in trial.keys:
            _, outcome, design = trial.of_key(key)
            declared = [outcome.model_dump(exclude={"designs"}), design.model_dump(), *arms]
            found[key] = (content_version(declared), {"declared": dg.MetadataValue.json(declared[:2])})
        return found

    return look


def keys(study: Study) -> list[dg.AssetKey]:
    return [dg.AssetKey([study.name, name]) for name in _readers(study)]


def assets(study: Study) -> list[dg.AssetsDefinition | dg.SourceAsset]:
    """Observable source assets: only those show an observation's version to what reads them."""

    def declare(name: str, look: Look) -> dg.AssetsDefinition | dg.SourceAsset:
        partitions = {"trial_files": "table", "trial_declarations": "outcome"}.get(name)

        @dg.observable_source_asset(
            key=dg.AssetKey([study.name, name]),
            group_name=GROUP,
            description=DESCRIPTIONS[name],
            tags={"dagster/kind/file": ""},
            partitions_def=getattr(Partitions(study), partitions) if partitions else None,
        )
        def observe() -> dg.DataVersion | dg.DataVersionsByPartition:
            found = look()
            if partitions:
                return dg.DataVersionsByPartition({str(partition): version for partition, (version, _) in found.items()})
            return dg.DataVersion(found[None][0])

        return observe

    return [declare(name, look) for name, look in _readers(study).items()]


def changes(study: Study, instance: dg.DagsterInstance) -> list[dg.AssetObservation]:
    """Observations of everything whose version differs from the last one observed."""
    found = []
    for name, look in _readers(study).items():
        key = dg.AssetKey([study.name, name])
        for partition, (version, metadata) in look().items():
            record = instance.get_latest_data_version_record(key, True, partition)
            known = None if record is None else extract_data_version_from_entry(record.event_log_entry)
            if known is None or version != known.value:
                found.append(observation(key, version, metadata, partition))
    return found


def observe(study: Study, instance: dg.DagsterInstance) -> list[str]:
    """Record what changed, and name it."""
    found = changes(study, instance)
    for event in found:
        instance.report_runless_asset_event(event)
    return [_named(event) for event in found]


def _named(event: dg.AssetObservation) -> str:
    return event.asset_key.path[-1] if event.partition is None else event.partition


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
        return dg.SensorResult(asset_events=found, skip_reason=f"new versions of {', '.join(map(_named, found))}")

    return look
