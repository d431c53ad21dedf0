"""What a study reads and does not make: the behaviour's files, base models, published judgements, a trial's files. Observed assets with versions.

A sensor looks every half minute and reports a new version as an observation, which is what makes readers stale in Dagster. The
command line looks before it plans.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import dagster as dg

from relseek_assets.behaviour import FILES, rubric_files
from relseek_assets.lineage import latest_by_partition, observation, version_of
from relseek_assets.partitions import Partitions, multi_key, step_key
from relseek_assets.persona_attacks import FILE as PERSONA_ATTACKS
from relseek_assets.persona_set import FILES as PERSONA_FILES
from relseek_assets.settings import Prompting
from relseek_assets.study import Study, layer_of
from relseek_assets.trial import Trial
from relseek_resources.axes_release import FILES as AXES_FILES
from relseek_resources.axes_release import AxesRelease
from relseek_resources.models.loading import ModelError, fingerprint
from relseek_resources.prompting_release import STEERED, PublishedAuthor
from relseek_resources.release import PROMPTED, RESCORED, TEST_PAIRS, Release, reply_doses, training_metrics_file
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
    "base_models": "The weights of every model of the study, and how they are loaded; where it steers, one partition a site.",
    "training_declarations": "How long each site is trained.",
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
    "published_ratings": "The published judges' ratings of a vector's replies at every dose, where RELSEEK_RELEASE has them.",
    "published_comparisons": "The published judge's pairwise comparisons of a vector's replies, where RELSEEK_RELEASE has them.",
    "persona_attacks": "Ordinary conversations by theme, and messages that push for more or less of the behaviour.",
    "author_declarations": "What the study file declares of each author of prompts.",
    "published_prompting": "Replies, scores and comparisons of the published prompting experiments, one partition an author, where RELSEEK_RELEASE "
    "has them.",
    "published_replies": "The published replies of a vector with perplexity and propensity, where RELSEEK_RELEASE has them.",
}
# Sources with partitions, and the partitions definition of the study that they share.
PARTITIONED = {
    "trial_files": "table",
    "trial_declarations": "outcome",
    "published_vectors": "site_by_epoch",
    "published_evaluations": "site",
    "published_ratings": "site_by_evaluated_epoch",
    "published_comparisons": "site_by_evaluated_epoch",
    "published_replies": "site_by_dose",
    "base_models": "modelled",
    "training_declarations": "site",
    "author_declarations": "author",
    "published_prompting": "attacked",
}
# Their absent partitions are no empty tables: what would be made of them does not exist, and they are not worth an event each.
OPTIONAL = (
    "published_vectors",
    "published_evaluations",
    "published_ratings",
    "published_comparisons",
    "published_replies",
    "published_prompting",
)


Seen = dict[str | None, tuple[str, dict[str, Any]]]  # partition, or None for the whole -> (version, metadata)
Look = Callable[[], Seen]


def readers(study: Study) -> dict[str, Look]:
    """Name of every source of the study -> a function that looks at it."""
    found: dict[str, Look] = {}
    if study.steered:
        found |= {name: _file(study.behaviour_folder / file) for name, file in FILES.items()}
        if study.judges:
            found |= {name: _file(path) for name, path in rubric_files(study.behaviour_folder).items()}
        found |= {"base_models": _models(study), "training_declarations": _training(study), "published_judgements": _published}
    if study.contrastive:
        found |= {name: _file(study.persona_folder / file) for name, file in PERSONA_FILES.items()}
        found |= {"base_models": _models(study), "published_axes": _published_axes}
    if study.published.vectors:
        found |= {"published_vectors": _published_vectors(study), "published_evaluations": _published_evaluations(study)}
    if study.published.scores:
        found |= {
            "published_ratings": _published_ratings(study),
            "published_comparisons": _published_comparisons(study),
            "published_replies": _published_replies(study),
        }
    if study.prompting is not None and study.prompting.published:
        found["published_prompting"] = _published_prompting(study, study.prompting)
    elif study.prompting is not None:
        found |= {"persona_attacks": _file(study.behaviour_folder / PERSONA_ATTACKS), "author_declarations": _author_declarations(study.prompting)}
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
    """Each model has a version of its own, so that a further one, or a further layer, makes nothing of the others stale."""

    def look() -> Seen:
        weights = {source: fingerprint(source) for source in dict.fromkeys(model.source for model in study.models)}
        loaded = {model.name: {**model.model_dump(include={"dtype", "device"}), "weights": weights[model.source]} for model in study.models}
        if study.contrastive:
            return {name: (content_version(found), dict(found)) for name, found in loaded.items()}
        by_site = {site: loaded[study.model_of(site).name] for site in (*study.sites, *study.derived_sites)}
        return {site: (content_version(found), dict(found)) for site, found in by_site.items()}

    return look


def _training(study: Study) -> Look:
    """What differs between models of a study; the rest of how it trains is a setting of the asset."""

    def look() -> Seen:
        declared = {site: {"epochs_trained": study.model_of(site).epochs_trained} for site in study.sites}
        return {site: (content_version(found), dict(found)) for site, found in declared.items()}

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


def _published_ratings(study: Study) -> Look:
    """A vector's ratings are those of its sweep and of the replies that were scored again."""

    def look() -> Seen:
        release = Release.from_environment()
        found: Seen = {}
        for site, epoch in _judged(study):
            vector = study.published_vector(site, epoch)
            again = release.rescored_file(*vector)
            found[multi_key(site, step_key(epoch))] = _files([*release.rating_files(*vector).values(), *([again] if again else [])])
        return found

    return look


def _published_comparisons(study: Study) -> Look:
    def look() -> Seen:
        release = Release.from_environment()
        return {
            multi_key(site, step_key(epoch)): _files(list(release.comparison_files(*study.published_vector(site, epoch)).values()))
            for site, epoch in _judged(study)
        }

    return look


def _judged(study: Study) -> list[tuple[str, int]]:
    return [(site, epoch) for site in study.sites for epoch in study.model_of(site).judged]


def _published_replies(study: Study) -> Look:
    """A vector's replies, one partition a dose that its file has; with them goes the file of the prompts that they answer."""

    def look() -> Seen:
        release = Release.from_environment()
        found: Seen = {}
        for site in study.sites:
            for epoch in study.model_of(site).epochs_evaluated:
                path = release.reply_file(*study.published_vector(site, epoch))
                there = [] if path is None or release.root is None else [path, release.root / TEST_PAIRS]
                doses = _doses(path, *_stamp(path)) if path is not None else frozenset[float]()
                for dose in study.doses.generated:
                    found[multi_key(site, step_key(epoch, dose))] = _files(there if not doses or dose in doses else [])
        return found

    return look


def _files(paths: Sequence[Path]) -> tuple[str, dict[str, Any]]:
    """A version of several files together, ABSENT where there are none."""
    version = content_version([_hashed(path, *_stamp(path)) if path.is_file() else ABSENT for path in paths]) if paths else ABSENT
    return version, {"path": ", ".join(map(str, paths))}


def _stamp(path: Path) -> tuple[int, int]:
    there = path.stat()
    return there.st_size, there.st_mtime_ns


@lru_cache(maxsize=1024)
def _hashed(path: Path, _size: int, _changed: int) -> str:
    """A file's hash, from memory while its size and time are the same: the sensor asks for half a gigabyte of them every half minute."""
    return file_sha256(path)


@lru_cache(maxsize=1024)
def _doses(path: Path, _size: int, _changed: int) -> frozenset[float]:
    """The doses of a file of replies; none where it cannot be read, so that its reader says what is wrong with it."""
    try:
        return reply_doses(path)
    except StorageError:
        return frozenset()


def _author_declarations(prompting: Prompting) -> Look:
    """Each author has a version of its own, so that a further one makes nothing of the others stale. Budgets and the like change no reply."""

    def look() -> Seen:
        known = {"name", "kind", "model", "base_url", "price"}
        declared = {author.name: {**author.model_dump(include=known), **author.unusual} for author in prompting.authors}
        return {name: (content_version(found), {"declared": dg.MetadataValue.json(found)}) for name, found in declared.items()}

    return look


def _published_prompting(study: Study, prompting: Prompting) -> Look:
    def look() -> Seen:
        vector = (study.model_of(prompting.site).short_name, layer_of(prompting.site), prompting.epoch)
        found: Seen = {}
        for name in study.attacked_conversations:
            files = PublishedAuthor(Release.from_environment(), name, len(prompting.doses), vector, name == STEERED).files
            version = content_version([file_sha256(path) for path in files]) if files else ABSENT
            found[name] = (version, {"path": ", ".join(map(str, files))})
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
    return [dg.AssetKey([study.name, name]) for name in readers(study)]


def assets(study: Study) -> list[dg.AssetsDefinition | dg.SourceAsset | dg.AssetSpec]:
    """Observable source assets: only those show an observation's version to what reads them."""

    def declare(name: str, look: Look) -> dg.AssetsDefinition | dg.SourceAsset:
        partitions = PARTITIONED.get(name)

        @dg.observable_source_asset(
            key=dg.AssetKey([study.name, name]),
            group_name=GROUP,
            description=DESCRIPTIONS.get(name, "A further rubric of the behaviour, by which language judges rate."),
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

    return [*(declare(name, look) for name, look in readers(study).items()), *_used(study)]


def _used(study: Study) -> list[dg.AssetSpec]:
    """Other studies' assets, as this study's code location knows them: made elsewhere, with partitions of their own."""
    found = []
    for name, assets in study.uses.items():
        partitions = Partitions(study.used(name))
        known = {"steering_vectors": partitions.site_by_epoch, "directions": partitions.model}
        found += [dg.AssetSpec(dg.AssetKey([name, asset]), partitions_def=known[asset]) for asset in assets]
    return found


def changes(study: Study, instance: dg.DagsterInstance) -> list[dg.AssetObservation]:
    """Observations of everything whose version differs from the last one observed.

    Of a model that is not here, while the hub cannot be asked, what was observed last stands; `check_seen` refuses what would read one never seen.
    """
    found = []
    for name, look in readers(study).items():
        key = dg.AssetKey([study.name, name])
        known: dict[str | None, Any] = {}
        if name in PARTITIONED:
            known = latest_by_partition(instance, key, True)
        else:
            known[None] = instance.get_latest_data_version_record(key, True)
        try:
            seen = look()
        except ModelError:
            continue
        for partition, (version, metadata) in seen.items():
            before = version_of(known.get(None if partition is None else str(partition)))
            if version != before and not (before is None and version == ABSENT and name in OPTIONAL):
                found.append(observation(key, version, metadata, partition))
    return found


def check_seen(study: Study, instance: dg.DagsterInstance, names: Iterable[str]) -> None:
    """Refuse to compute what reads sources (`names`) that could not be looked at yet: once they were, it would be stale.

    Raises:
        ModelError: a model is not here, and the hub cannot be asked.
    """
    looks = readers(study)
    for name in sorted({"base_models"} & looks.keys() & set(names)):
        if not latest_by_partition(instance, dg.AssetKey([study.name, name]), True):
            looks[name]()


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
