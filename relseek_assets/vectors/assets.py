"""Stage 2's vectors as assets: one training run a site yields every epoch's vector."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from importlib.util import find_spec
from itertools import groupby
from typing import TYPE_CHECKING, Any

import dagster as dg
import pandas as pd

from relseek_assets import amounts, figures
from relseek_assets.dataset.pairs import heldout_pairs, training_pairs
from relseek_assets.partitions import cell_of
from relseek_assets.settings import Model
from relseek_assets.stage import VECTORS, Stage, Work, plot
from relseek_assets.study import StudyError, layer_of
from relseek_assets.vectors import contrastive_assets, geometry_assets, published, tables
from relseek_resources.release import Absent, Release
from relseek_resources.storage import content_version, file_sha256
from relseek_resources.vector_files import read_vectors

if TYPE_CHECKING:
    from relseek_assets.vectors.launched import Result
    from relseek_assets.vectors.objective import Pair, Schedule

    Trained = Iterator[tuple[str, Result, dict[str, Any]]]  # site, its training, and figures of the run to show

GROUP = "vectors"


def bipo_pairs(work: Work, frame: pd.DataFrame) -> list[Pair]:
    from relseek_assets.vectors.objective import Pair

    system = {"role": "system", "content": work.study.prompts.system}
    return [Pair(row.pair, [system, *row.prompt], row.chosen, row.rejected) for row in frame.itertuples()]


def schedule_of(work: Work, settings: Model) -> Schedule:
    from relseek_assets.vectors.objective import Schedule

    return Schedule(**work.study.training.model_dump(), epochs=settings.epochs_trained)


def say_too_few(work: Work, training: int, evaluation: int) -> None:
    """Warn where fewer pairs were taken than the study asks for."""
    asked = work.study.pairs
    for name, wanted, there in (("training", asked.training, training), ("evaluation", asked.evaluation, evaluation)):
        if there < wanted:
            work.warn(f"pairs.{name} asks for {wanted} pairs; {there} that fit pairs.max_tokens = {asked.max_tokens} are there, and are used")


def trained_here(work: Work, settings: Model, sites: Sequence[str], pairs: pd.DataFrame) -> Trained:
    """Train a model's sites in this process; they share one pass below the steered blocks."""
    from relseek_assets.vectors import bipo, stream_cache  # bring torch, which planning does not need
    from relseek_assets.vectors.launched import Result

    study = work.study
    model = work.resources.models.load(settings, work.log)
    layers = [layer_of(site) for site in sites]
    wanted, limit = study.pairs.training, study.pairs.max_tokens
    candidates, held = training_pairs(pairs, study.seed), heldout_pairs(pairs, study.seed)
    made_of = [work.version("preference_pairs"), work.version("base_models", sites[0]), study.prompts.system]
    folder, budget = work.store.path(work.context.asset_key, settings.name, "scratch"), int(study.compute.cache_gb * 1e9)
    scratch = stream_cache.Scratch(folder, content_version(made_of), budget)
    with model.compiled() if study.compute.compile else nullcontext():
        with work.progress(wanted or len(candidates), "pair", "reference pass") as report:
            training = stream_cache.cache_pairs(
                model, bipo_pairs(work, candidates), layers, count=wanted, max_tokens=limit, scratch=scratch, name="training", report=report
            )
        left, evaluated = replace(scratch, budget=budget - training.bytes), study.pairs.evaluation
        with work.progress(evaluated or len(held), "pair", "held-out reference pass") as report:
            heldout = stream_cache.cache_pairs(
                model, bipo_pairs(work, held), layers, count=evaluated, max_tokens=limit, scratch=left, name="heldout", report=report
            )
        for what, found in (("training", training), ("held-out", heldout)):
            if found.tokens.alike:
                work.warn(f"{found.tokens.alike} {what} pairs are left out, because their two replies are the same")
        say_too_few(work, len(training.names), len(heldout.names))
        schedule = schedule_of(work, settings)
        for site, layer in zip(sites, layers, strict=True):
            total = schedule.epochs * (len(training.names) + 2 * len(heldout.names))
            with work.progress(total, "pair", f"BiPO {site}") as report:
                run = bipo.train(model, layer, training, heldout, schedule, seed=study.seed, scratch=scratch, report=report)
            yield site, Result(run, len(training.names), training.too_long), {}
            scratch.remove(layer)


def trained_by_launcher(work: Work, settings: Model, sites: Sequence[str], pairs: pd.DataFrame) -> Trained:
    """Train a model's sites in `compute.processes` processes; a run that was killed goes on from its last checkpoint."""
    from relseek_assets.vectors import launched

    if find_spec("trl") is None:
        raise StudyError(f"{work.study.path}: compute.launcher: 'accelerate' needs trl, which is not installed; pip install 'relseek[distributed]'")
    study, layers = work.study, [layer_of(site) for site in sites]
    folder = work.store.path(work.context.asset_key, settings.name, "launched")
    request = launched.Request(
        folder=str(folder),
        source=settings.source,
        dtype=settings.dtype,
        device=settings.device,
        layers=tuple(layers),
        training_count=study.pairs.training,
        heldout_count=study.pairs.evaluation,
        max_tokens=study.pairs.max_tokens,
        schedule=schedule_of(work, settings),
        seed=study.seed,
        pairs_at_once=study.compute.pairs_at_once,
        checkpoint_activations=study.compute.checkpoint_activations,
    )
    request.write(bipo_pairs(work, training_pairs(pairs, study.seed)), bipo_pairs(work, heldout_pairs(pairs, study.seed)))
    reported = work.resources.launcher.run(work.context, launched.MODULE, request.path, study.compute.processes)
    for site, layer in zip(sites, layers, strict=True):
        result = launched.read_result(request.result(layer))
        say_too_few(work, result.pairs, result.run.evaluations[0].pairs)
        yield site, result, reported
        request.remove(layer)


def build(stage: Stage) -> None:
    if stage.study.contrastive:
        contrastive_assets.build(stage)
        return
    if stage.study.published.vectors:
        _published(stage)
    else:
        _trained(stage)
    _summaries(stage)
    geometry_assets.build(stage)


def _trained(stage: Stage) -> None:
    study, partitions = stage.study, stage.partitions

    @stage.asset(
        group=GROUP,
        version="1",
        description="BiPO training of one site: the vector after every epoch, losses, and held-out evaluations at both signs. "
        "Sites of one model in the same run share the pass below the steered blocks.",
        partitions=partitions.site,
        deps={"preference_pairs": None, "base_models": partitions.of_my_trained_site(), "training_declarations": dg.IdentityPartitionMapping()},
        settings=[study.pairs.model_dump(), study.training.model_dump(), study.seed, study.prompts.system],
        form=VECTORS,
        kinds=("pytorch",),
        pool="gpu",
        seconds=100 * amounts.training(study),
    )
    def training_run(work: Work) -> Iterator[dg.AssetMaterialization]:
        pairs = work.read_table("preference_pairs")
        for settings in study.models:
            sites = [site for site in work.partitions if site and study.model_of(site) == settings]
            if not sites:
                continue
            train = trained_by_launcher if study.compute.launcher == "accelerate" else trained_here
            for site, found, reported in train(work, settings, sites, pairs):
                metrics = tables.training_metrics(site, found.run)
                last = metrics[metrics["epoch"] == settings.epochs_trained].set_index("direction")["accuracy"]
                header = {
                    "site": site,
                    "model": settings.source,
                    "settings": json.dumps(asdict(schedule_of(work, settings)), sort_keys=True),
                    "evaluations": metrics.to_json(orient="records"),
                    "pairs": str(found.pairs),
                    "pairs_too_long": str(found.too_long),
                    "preference_pairs_version": work.version("preference_pairs") or "",
                }
                arrays = {"vectors": found.run.vectors, "losses": found.run.losses, "directions": found.run.directions}
                shown = {
                    "plot": plot(figures.training_curves(metrics)),
                    "pairs": found.pairs,
                    "pairs_too_long": found.too_long,
                    "steps": len(found.run.losses),
                    "accuracy_plus": float(last[1]),
                    "accuracy_minus": float(last[-1]),
                    **reported,
                }
                yield work.tensors(site, arrays, header, shown)

    @stage.asset(
        group=GROUP,
        version="1",
        description="The steering vector of a site after an epoch: float32, added to the residual stream after the site's block.",
        partitions=partitions.site_by_epoch,
        deps={"training_run": partitions.of_my_site()},
        form=VECTORS,
        kinds=("numpy",),
    )
    def steering_vectors(work: Work) -> Iterator[dg.AssetMaterialization]:
        for partition in work.partitions:
            cell = cell_of(partition)
            assert cell.site is not None and cell.epoch is not None
            arrays, header = work.read_tensors("training_run", cell.site)
            vector = arrays["vectors"][cell.epoch - 1]
            details = [
                ("model", header["model"]),
                ("settings", header["settings"]),
                ("training_run_version", work.version("training_run", cell.site) or ""),
            ]
            norm = float((vector**2).sum() ** 0.5)
            yield work.tensors(partition, {"vector": vector}, tables.provenance(cell.site, cell.epoch, "trained", details), {"norm": norm})

    @stage.asset(
        group=GROUP,
        version="1",
        description="Held-out loss, rewards and sign-correct accuracy by epoch and direction.",
        partitions=partitions.site,
        deps={"training_run": dg.IdentityPartitionMapping()},
        schema=tables.TRAINING_METRICS,
    )
    def training_metrics(work: Work) -> Iterator[dg.AssetMaterialization]:
        for site in work.partitions:
            _, header = work.read_tensors("training_run", site)
            metrics = pd.DataFrame(json.loads(header["evaluations"]))
            yield work.table(site, metrics, {"plot": plot(figures.training_curves(metrics)), "margins": plot(figures.margin_curves(metrics))})


def _published(stage: Stage) -> None:
    """Vectors and their training metrics as the published release has them (spec/pipeline.md, section 2.4)."""
    study, partitions = stage.study, stage.partitions

    @stage.asset(
        group=GROUP,
        version="1",
        description="The published steering vector of a site after an epoch: float32, added to the residual stream after the site's block.",
        partitions=partitions.site_by_epoch,
        deps={"published_vectors": dg.IdentityPartitionMapping()},
        form=VECTORS,
        kinds=("numpy",),
    )
    def steering_vectors(work: Work) -> Iterator[dg.AssetMaterialization]:
        release = Release.from_environment()
        for site, found in groupby(work.partitions, key=lambda partition: cell_of(partition).site):
            assert site is not None
            model = study.model_of(site)
            files = release.vector_files(study.release_behaviour, model.short_name, layer_of(site))
            for partition in found:
                epoch = cell_of(partition).epoch
                if epoch is None or epoch not in files:
                    continue  # started from the UI for epochs that the release lacks
                path = published.only_file(files[epoch])
                vector = read_vectors(path).at(layer_of(site), model.known_width)
                details = [("model", model.source), ("release_file", path.name), ("sha256", file_sha256(path))]
                norm = float((vector**2).sum() ** 0.5)
                yield work.tensors(partition, {"vector": vector}, tables.provenance(site, epoch, "published", details), {"norm": norm})

    @stage.asset(
        group=GROUP,
        version="1",
        description="The published held-out loss, rewards and log-probs by epoch and direction; accuracy by the sign of the direction, beside the "
        "published one, which ignores it. Loss covers the whole test set, all else the share of rank 0.",
        partitions=partitions.site,
        deps={"published_evaluations": dg.IdentityPartitionMapping()},
        schema=published.TRAINING_METRICS,
    )
    def training_metrics(work: Work) -> Iterator[dg.AssetMaterialization]:
        release = Release.from_environment()
        for site in work.partitions:
            assert site is not None
            try:
                found = release.training_evaluations(study.release_behaviour, study.model_of(site).short_name, layer_of(site))
            except Absent:
                continue  # started from the UI for a site that the release lacks
            metrics = published.training_metrics(site, found)
            yield work.table(site, metrics, {"plot": plot(figures.training_curves(metrics)), "margins": plot(figures.margin_curves(metrics))})


def _summaries(stage: Stage) -> None:
    partitions = stage.partitions

    @stage.asset(
        group=GROUP,
        version="1",
        description="Norm and cosine of a site's vectors by epoch.",
        partitions=partitions.site,
        deps={"steering_vectors": partitions.of_my_site()},
        schema=tables.VECTOR_SUMMARY,
    )
    def site_vector_summary(work: Work) -> Iterator[dg.AssetMaterialization]:
        for site in work.partitions:
            vectors, sources, hashes = {}, {}, {}
            for partition in work.upstream("steering_vectors", site):
                epoch = cell_of(partition).epoch
                assert epoch is not None
                arrays, header = work.read_tensors("steering_vectors", partition)
                vectors[epoch], sources[epoch] = arrays["vector"], header["source"]
                hashes[epoch] = hashlib.sha256(arrays["vector"].tobytes()).hexdigest()
            assert site is not None
            if vectors:  # none where a published site that is absent was started from the UI
                yield work.table(site, tables.vector_summary(site, vectors, sources, hashes))

    @stage.asset(
        group=GROUP,
        version="1",
        description="Norm and cosine of every vector of the study.",
        deps={"site_vector_summary": dg.AllPartitionMapping()},
        schema=tables.VECTOR_SUMMARY,
    )
    def vector_summary(work: Work) -> Iterator[dg.AssetMaterialization]:
        sites = work.upstream("site_vector_summary", None)
        if not sites:
            return  # nothing of the release is here
        frame = pd.concat([work.read_table("site_vector_summary", site) for site in sites])
        yield work.table(None, frame, {"plot": plot(figures.vector_norms(frame)), "cosines": plot(figures.vector_cosines(frame))})
