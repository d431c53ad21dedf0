"""What is served as an asset: a server that starts records it with the data versions of the vectors that it serves, and no run does."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import dagster as dg

from relseek_assets.lineage import Lineage
from relseek_assets.partitions import cell_of
from relseek_assets.serving import deployments
from relseek_assets.serving.deployments import Deployment
from relseek_assets.stage import Stage, Store, Work, multi, preview
from relseek_resources.storage import StorageError, file_sha256, write_table

GROUP = "serving"
NAME = "served_models"
BY = "relseek serve"


def vectors_of(stage: Stage) -> str:
    """The asset that a study's servers take vectors from; its partitions are those of `served_models`."""
    return "directions" if stage.study.contrastive else "steering_vectors"


def build(stage: Stage) -> None:
    study, partitions = stage.study, stage.partitions
    mine = dg.IdentityPartitionMapping() if study.contrastive else partitions.of_my_trained_vector()
    models: dict[str, dg.PartitionMapping | None] = {}
    if study.steered or study.contrastive:
        models["base_models"] = mine if study.contrastive else partitions.of_my_site()

    @stage.asset(
        group=GROUP,
        version="1",
        description="What is deployed of each vector: servers by engine, model and address, since when, and whether they run. `relseek serve` "
        "records it; materialising asks the servers again. Stale: the vector or the model has changed since a server took it.",
        partitions=partitions.model if study.contrastive else partitions.swept_by_epoch,
        deps={vectors_of(stage): mine, **models},
        schema=deployments.SERVED_MODELS,
        made_by=BY,
    )
    def served_models(work: Work) -> Iterator[dg.AssetMaterialization]:
        folder = work.store.folder(study.name)
        deployments.look(folder, measure=True)
        found = deployments.recorded(folder)
        for partition in work.partitions:
            if any(one.of(str(partition)) for one in found):  # none where a vector that nobody serves was started from the UI
                yield recorded(stage, work.store, work.lineage, str(partition), found)


def recorded(stage: Stage, store: Store, lineage: Lineage, partition: str, found: Sequence[Deployment]) -> dg.AssetMaterialization:
    """Write one vector's table, and the event that says so, with the versions that its deployments stand on and not those of now."""
    key, cell = stage.key(NAME), cell_of(partition)
    assert cell.site is not None
    path, frame = store.path(key, partition, "parquet"), deployments.rows(partition, cell.site, cell.epoch, found)
    write_table(path, frame, deployments.SERVED_MODELS)
    shown = {
        "path": dg.MetadataValue.path(str(path)),
        "dagster/row_count": len(frame),
        "running": int((frame["state"] == deployments.RUNNING).sum()),
        "preview": preview(frame[["address", "engine", "model", "state", "live", "started", "last_seen"]]),
    }
    stands_on = deployments.stands_on(partition, found)
    return lineage.materialisation(key, multi(partition), deployments.version(partition, found), stands_on, shown, source="deployed")


def report(stage: Stage, store: Store, instance: dg.DagsterInstance, changed: Sequence[Deployment]) -> None:
    """Record anew every vector of deployments that say something new."""
    for event in events(stage, store, instance, changed):
        instance.report_runless_asset_event(event)


def events(stage: Stage, store: Store, instance: dg.DagsterInstance, changed: Sequence[Deployment]) -> list[dg.AssetMaterialization]:
    partitions = dict.fromkeys(vector.partition for one in changed for vector in one.vectors if vector.partition)
    found = deployments.recorded(store.folder(stage.study.name)) if partitions else []
    return [recorded(stage, store, Lineage(instance, stage.graph), partition, found) for partition in partitions]


def versioned(stage: Stage, store: Store, instance: dg.DagsterInstance, deployment: Deployment, files: dict[str, Path]) -> Deployment:
    """The deployment with the data versions that its vectors have now, by whose change it will be stale.

    Args:
        files: name -> the file that the server took a copy of; where it holds something else by now, the version stays unknown and the deployment
            is stale from its beginning.
    """
    lineage, key, upstream = Lineage(instance, stage.graph), stage.key(NAME), stage.key(vectors_of(stage))
    vectors = []
    for vector in deployment.vectors:
        if vector.partition is not None:
            inputs, partition = lineage.input_tags(key, multi(vector.partition)), multi(vector.partition)
            same = _sha256(files.get(vector.name)) == vector.sha256
            unknown = {tag: "unknown" for tag in inputs if tag.endswith(f"data_version/{upstream.to_user_string()}")} if not same else {}
            vector = replace(vector, inputs={**inputs, **unknown}, version=lineage.version(upstream, partition) if same else None)
        vectors.append(vector)
    return replace(deployment, vectors=tuple(vectors))


def _sha256(file: Path | None) -> str | None:
    try:
        return None if file is None else file_sha256(file)
    except StorageError:
        return None


def asked(stage: Stage, store: Store, instance: dg.DagsterInstance, **options: Any) -> list[Deployment]:
    """Ask the study's servers what they serve, and record those that say something new."""
    changed = deployments.look(store.folder(stage.study.name), **options)
    report(stage, store, instance, changed)
    return changed
