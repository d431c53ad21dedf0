"""What a study reads and does not make: the behaviour's files, base models, published judgements, a trial's files. Observed assets with versions.

A sensor looks every half minute and reports a new version as an observation, which is what makes readers stale in Dagster. The
command line looks before it plans.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import dagster as dg

from relseek_assets.behaviour import FILES
from relseek_assets.lineage import latest_by_partition, observation, version_of
from relseek_assets.partitions import Partitions, multi_key, step_key
from relseek_assets.persona_set import FILES as PERSONA_FILES
from relseek_assets.study import Study, layer_of
from relseek_assets.trial import Trial
from relseek_resources.axes_release import FILES as AXES_FILES
from relseek_resources.axes_release import AxesRelease
from relseek_resources.models.loading import fingerprint
from relseek_resources.release import PROMPTED, RESCORED, TEST_PAIRS, Release, training_metrics_file
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
    "personas": "Who the model is asked to be: assistants, others, and which of them are hostile.",
    "queries": "The questions put to personas, from whose replies directions are made.",
    "intervention_prompts": "Questions that no direction is made from.",
    "drift_conversations": "The user's turns of conversations along which the model may leave the assistant character.",
    "likeness_rubric": "The scale of assistant-likeness, 0 to 10, in six anchored bands.",
    "published_axes": "Directions, evaluations and judged replies of llm-personality-axes, where RELSEEK_RELEASE_AXES has them.",
    "published_vectors": "Vectors of the published study, one partition a site and epoch, where RELSEEK_RELEASE has them.",
    "published_evaluations": "Held-out evaluations of the published training, one partition a site, where RELSEEK_RELEASE has them.",
}
# Sources with partitions, and the partitions definition of the study that they share.
PARTITIONED = {
    "trial_files": "table",
    "trial_declarations": "outcome",
    "published_vectors": "site_by_epoch",
    "published_evaluations": "site",
}
# Their absent partitions are no empty tables: what would be made of them does not exist, and they are not worth an event each.
OPTIONAL = ("published_vectors", "published_evaluations")


Seen = dict[str | None, tuple[str, dict[str, Any]]]  # partition, or None for the whole -> (version, metadata)
Look = Callable[[], Seen]


def _readers(study: Study) -> dict[str, Look]:
    """Name -> a function that looks at the source."""
    found: dict[str, Look] = {}
    if study.steered:
        found |= {name: _file(study.behaviour_folder / file) for name, file in FILES.items()}
        found |= {"base_models": _models(study), "published_judgements": _published}
    if study.contrastive:
        found |= {name: _file(study.persona_folder / file) for name, file in PERSONA_FILES.items()}
        found |= {"base_models": _models(study), "published_axes": _published_axes}
    if study.published.vectors:
        found |= {"published_vectors": _published_vectors(study), "published_evaluations": _published_evaluations(study)}
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


def _published_axes() -> Seen:
    release = AxesRelease.from_environment()
    return {None: (release.version(AXES_FILES), {AxesRelease.variable: str(release.root or "not set")})}


def _published_vectors(study: Study) -> Look:
    def look() -> Seen:
        release = Release.from_environment()
        found: Seen = {}
        for site in study.sites:
            files = release.vector_files(study.release_behaviour, study.model_of(site).short_name, layer_of(site))
            for epoch in range(1, study.model_of(site).epochs_trained + 1):
                paths = files.get(epoch, [])
                version = content_version([file_sha256(path) for path in paths]) if paths else ABSENT
                found[multi_key(site, step_key(epoch))] = (version, {"path": ", ".join(map(str, paths))})
        return found

    return look


def _published_evaluations(study: Study) -> Look:
    def look() -> Seen:
        release = Release.from_environment()
        found: Seen = {}
        for site in study.sites:
            name = training_metrics_file(study.release_behaviour, study.model_of(site).short_name, layer_of(site))
            found[site] = (ABSENT, {"path": name}) if release.root is None else _file_version(release.root / name)
        return found

    return look


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


def assets(study: Study) -> list[dg.AssetsDefinition | dg.SourceAsset | dg.AssetSpec]:
    """Observable source assets: only those show an observation's version to what reads them."""

    def declare(name: str, look: Look) -> dg.AssetsDefinition | dg.SourceAsset:
        partitions = PARTITIONED.get(name)

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
                there = {str(partition): version for partition, (version, _) in found.items() if name not in OPTIONAL or version != ABSENT}
                return dg.DataVersionsByPartition(there)
            return dg.DataVersion(found[None][0])

        return observe

    return [*(declare(name, look) for name, look in _readers(study).items()), *_used(study)]


def _used(study: Study) -> list[dg.AssetSpec]:
    """Other studies' assets, as this study's code location knows them: made elsewhere, with partitions of their own."""
    found = []
    for name, assets in study.uses.items():
        partitions = Partitions(study.used(name))
        known = {"steering_vectors": partitions.site_by_epoch, "directions": partitions.model}
        found += [dg.AssetSpec(dg.AssetKey([name, asset]), partitions_def=known[asset]) for asset in assets]
    return found


def changes(study: Study, instance: dg.DagsterInstance) -> list[dg.AssetObservation]:
    """Observations of everything whose version differs from the last one observed."""
    found = []
    for name, look in _readers(study).items():
        key = dg.AssetKey([study.name, name])
        known: dict[str | None, Any] = {}
        if name in PARTITIONED:
            known = latest_by_partition(instance, key, True)
        else:
            known[None] = instance.get_latest_data_version_record(key, True)
        for partition, (version, metadata) in look().items():
            before = version_of(known.get(None if partition is None else str(partition)))
            if version != before and not (before is None and version == ABSENT and name in OPTIONAL):
                found.append(observation(key, version, metadata, partition))
    return found


def observe(study: Study, instance: dg.DagsterInstance) -> list[str]:
    """Record what changed, and name it."""
    found = changes(study, instance)
    for event in found:
        instance.report_runless_asset_event(event)
    return _named(found)


def _named(events: Sequence[dg.AssetObservation]) -> list[str]:
    """Sources by name and files of a trial by theirs; published files, of which there are hundreds, counted."""
    counts = {name: sum(event.asset_key.path[-1] == name for event in events) for name in OPTIONAL}
    alone = [event for event in events if event.asset_key.path[-1] not in OPTIONAL]
    names = [event.asset_key.path[-1] if event.partition is None else str(event.partition) for event in alone]
    return [*(f"{name} ({count})" for name, count in counts.items() if count), *names]


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
        return dg.SensorResult(asset_events=found, skip_reason=f"new versions of {', '.join(_named(found))}")

    return look
