"""Geometry of a study's vectors as assets: vectors without another's direction, and cosines of all that can be compared."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from itertools import product
from typing import Any

import dagster as dg
import numpy as np
import pandas as pd

from relseek_assets import figures
from relseek_assets.partitions import cell_of, multi_key, removed_from, step_key
from relseek_assets.settings import DerivedSite
from relseek_assets.stage import VECTORS, Stage, Work, plot
from relseek_assets.study import Study, StudyError, layer_of, site_key
from relseek_assets.vectors import geometry, tables
from relseek_assets.vectors.geometry import Named
from relseek_resources.storage import StorageError

GROUP = "vectors"
EXTRACTIONS = ("last_token", "response_mean")  # arrays (layers, width) of a contrastive study's directions


def build(stage: Stage) -> None:
    used = {name: stage.study.used(name) for name in stage.study.uses}
    if stage.study.derived:
        _derived(stage, used)
    _geometry(stage, used)


# --- derived vectors --------------------------------------------------------------------------------------------------


def _derived(stage: Stage, used: Mapping[str, Study]) -> None:
    study, partitions = stage.study, stage.partitions
    removed = {}
    for name in dict.fromkeys(derived.remove.study for derived in study.derived):
        other = used[name]
        asset = "directions" if other.contrastive else "steering_vectors"
        if asset not in study.uses[name]:
            raise StudyError(f'{study.path}: uses.{name}: a derived vector removes its {asset}; add "{asset}"')
        mapping = partitions.of(*dict.fromkeys(model.name for model in other.models)) if other.contrastive else partitions.of_what_is_removed(other)
        removed[f"{name}/{asset}"] = mapping
    for key, found in study.derived_sites.items():
        _check_model(study, key, found, used[found.declared.remove.study])

    @stage.asset(
        group=GROUP,
        version="1",
        description="A vector of this study without the direction of another's: what a behaviour's vector does beyond what it shares with a second "
        "behaviour. Swept, judged and selected as a site of its own.",
        partitions=partitions.derived_by_epoch,
        deps={"steering_vectors": partitions.of_my_origin(), **removed},
        settings=[derived.model_dump() for derived in study.derived],
        form=VECTORS,
        kinds=("numpy",),
    )
    def derived_vectors(work: Work) -> Iterator[dg.AssetMaterialization]:
        for partition in work.partitions:
            cell = cell_of(partition)
            assert cell.site is not None and cell.epoch is not None
            found = study.derived_sites[cell.site]
            origin, header = work.read_tensors("steering_vectors", multi_key(found.site, step_key(found.epoch)))
            direction, taken = _direction(work, found, used[found.declared.remove.study])
            vector = geometry.without(origin["vector"], direction, found.declared.rescale)
            details = {
                "model": header["model"],
                "made_by": f"removing the direction of {taken['removed']}{', old length kept' if found.declared.rescale else ''}",
                "from": f"{study.name}/steering_vectors {found.site}|{step_key(found.epoch)}",
                "from_sha256": hashlib.sha256(origin["vector"].tobytes()).hexdigest(),
                "from_version": work.version("steering_vectors", multi_key(found.site, step_key(found.epoch))) or "",
                **taken,
            }
            shown = {
                "norm": float(np.linalg.norm(vector)),
                "cosine_of_parents": tables.cosine(origin["vector"], direction) or 0.0,
                "cosine_to_origin": tables.cosine(vector, origin["vector"]) or 0.0,
            }
            yield work.tensors(partition, {"vector": vector}, tables.provenance(cell.site, cell.epoch, "derived", list(details.items())), shown)


def _check_model(study: Study, key: str, found: DerivedSite, other: Study) -> None:
    mine = study.model_of(found.site).source
    theirs = other.models if other.contrastive else (other.model_of(removed_from(found, other)[0]),)
    if mine not in [model.source for model in theirs]:
        there = ", ".join(model.source for model in theirs)
        raise StudyError(f"{study.path}: derived {key}: its model is {mine}, that of study {other.name} {there}; vectors of two models do not mix")


def _direction(work: Work, found: DerivedSite, other: Study) -> tuple[np.ndarray, dict[str, str]]:
    """The direction that is taken out, and its provenance."""
    if other.contrastive:
        model = next(model.name for model in other.models if model.source == work.study.model_of(found.site).source)
        asset, partition, extraction = f"{other.name}/directions", model, found.declared.remove.extraction
        arrays, _ = work.read_tensors(asset, partition)
        layers = arrays[extraction]
        if layer_of(found.site) >= len(layers):
            raise StorageError(f"{asset} {partition}: {extraction} has {len(layers)} layers and none for {found.site}")
        direction, place = layers[layer_of(found.site)], f"{model} {extraction} layer {layer_of(found.site)}"
    else:
        site, epoch = removed_from(found, other)
        asset, partition = f"{other.name}/steering_vectors", multi_key(site, step_key(epoch))
        direction, place = work.read_tensors(asset, partition)[0]["vector"], str(partition)
    return direction, {
        "removed": f"{asset} {place}",
        "removed_sha256": hashlib.sha256(np.ascontiguousarray(direction).tobytes()).hexdigest(),
        "removed_version": work.version(asset, partition) or "",
    }


# --- cosines ----------------------------------------------------------------------------------------------------------


def last_epochs(study: Study) -> list[str]:
    """The last trained epoch of every site, as partition keys."""
    return [multi_key(site, step_key(study.model_of(site).epochs_trained)) for site in study.sites]


def _geometry(stage: Stage, used: Mapping[str, Study]) -> None:
    study, partitions = stage.study, stage.partitions

    @stage.asset(
        group=GROUP,
        version="1",
        description="Cosines between the epochs of a site's training.",
        partitions=partitions.site,
        deps={"steering_vectors": partitions.of_my_site()},
        schema=geometry.GEOMETRY,
    )
    def site_geometry(work: Work) -> Iterator[dg.AssetMaterialization]:
        for site in work.partitions:
            vectors = [_steering_vector(work, study, key) for key in work.upstream("steering_vectors", site)]
            if vectors:  # none where a published site that is absent was started from the UI
                frame = geometry.compared("epochs", geometry.every_pair(vectors))
                yield work.table(site, frame, _shown(frame))

    others: dict[str, dg.PartitionMapping] = {}
    for name, assets in study.uses.items():
        if "steering_vectors" in assets:
            others[f"{name}/steering_vectors"] = partitions.of(*last_epochs(used[name]))
        if "directions" in assets:
            others[f"{name}/directions"] = dg.AllPartitionMapping()
    derived = [multi_key(key, step_key(found.epoch)) for key, found in study.derived_sites.items()]

    @stage.asset(
        group=GROUP,
        version="1",
        description="Cosines of everything that lives in one residual stream: a site's epochs, the last epochs of all sites, derived vectors, the "
        "vectors of the studies used, and each of them with a persona axis at every layer.",
        deps={
            "site_geometry": dg.AllPartitionMapping(),
            "steering_vectors": partitions.of(*last_epochs(study)),
            **({"derived_vectors": partitions.of(*derived)} if derived else {}),
            **others,
        },
        optional=["derived_vectors", *others],
        schema=geometry.GEOMETRY,
    )
    def vector_geometry(work: Work) -> Iterator[dg.AssetMaterialization]:
        within = [work.read_table("site_geometry", site) for site in work.upstream("site_geometry", None)]
        mine = [_steering_vector(work, study, key) for key in work.upstream("steering_vectors", None)]
        if derived:
            mine += [_steering_vector(work, study, key, "derived_vectors") for key in work.upstream("derived_vectors", None)]
        theirs, axes = [], []
        for asset in others:
            name, _, what = asset.partition("/")
            for key in work.upstream(asset, None):
                if what == "directions":
                    axes += _axis(work, used[name], str(key))
                else:
                    theirs.append(_steering_vector(work, used[name], key, asset))
        between = geometry.compared("vectors", [*geometry.every_pair(mine), *product(mine, theirs)])
        along = geometry.compared("axis", product(mine, axes))
        parts = [part for part in (*within, between, along) if len(part)]
        frame = pd.concat(parts, ignore_index=True) if parts else between
        yield work.table(None, frame, {**_shown(between), **({"axis": plot(figures.axis_alignment(along))} if len(along) else {})})


def _shown(frame: pd.DataFrame) -> dict[str, Any]:
    return {"plot": plot(figures.cosine_matrix(frame))} if len(frame) else {}


def _steering_vector(work: Work, study: Study, key: str | None, asset: str = "steering_vectors") -> Named:
    cell = cell_of(key)
    assert cell.site is not None and cell.epoch is not None
    vector = work.read_tensors(asset, key)[0]["vector"]
    kind = "derived" if cell.site in study.derived_sites else study.kind
    return Named(study.name, kind, cell.site, step_key(cell.epoch), study.model_of(cell.site).source, vector)


def _axis(work: Work, study: Study, model: str) -> list[Named]:
    """A contrastive study's directions of a model, a vector a layer and extraction."""
    source = next(one.source for one in study.models if one.name == model)
    arrays, _ = work.read_tensors(f"{study.name}/directions", model)
    return [
        Named(study.name, study.kind, site_key(model, layer), extraction, source, vector)
        for extraction in EXTRACTIONS
        for layer, vector in enumerate(arrays[extraction])
    ]
