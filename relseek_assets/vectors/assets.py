"""Stage 2's vectors as assets: one training run a site yields every epoch's vector."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING

import dagster as dg
import pandas as pd

from relseek_assets import figures
from relseek_assets.dataset.pairs import heldout_pairs, training_pairs
from relseek_assets.partitions import cell_of
from relseek_assets.stage import VECTORS, Stage, Work, plot
from relseek_assets.study import layer_of
from relseek_assets.vectors import tables

if TYPE_CHECKING:
    from relseek_assets.vectors.bipo import Pair

GROUP = "vectors"


def bipo_pairs(work: Work, frame: pd.DataFrame) -> list[Pair]:
    from relseek_assets.vectors.bipo import Pair

    system = {"role": "system", "content": work.study.prompts.system}
    return [Pair(row.pair, [system, *row.prompt], row.chosen, row.rejected) for row in frame.itertuples()]


def build(stage: Stage) -> None:
    study, partitions = stage.study, stage.partitions

    @stage.asset(
        group=GROUP,
        version="1",
        description="BiPO training of one site: the vector after every epoch, losses, and held-out evaluations at both signs. "
        "Sites of one model in the same run share the pass below the steered blocks.",
        partitions=partitions.site,
        deps={"preference_pairs": None, "base_models": None},
        settings=[study.pairs.model_dump(), study.training.model_dump(), study.seed, study.prompts.system, [m.model_dump() for m in study.models]],
        form=VECTORS,
        kinds=("pytorch",),
        pool="gpu",
        seconds=120,
    )
    def training_run(work: Work) -> Iterator[dg.AssetMaterialization]:
        from relseek_assets.vectors import bipo  # brings torch, which planning does not need

        pairs = work.read_table("preference_pairs")
        for model_settings in study.models:
            sites = [site for site in work.partitions if site and study.model_of(site) == model_settings]
            if not sites:
                continue
            model = work.resources.models.load(model_settings, work.log)
            layers = [layer_of(site) for site in sites]
            wanted, limit = study.pairs.training, study.pairs.max_tokens
            candidates, held = training_pairs(pairs, study.seed), heldout_pairs(pairs, study.seed)
            with work.progress(wanted or len(candidates), "pair", "reference pass") as report:
                training = bipo.cache_pairs(model, bipo_pairs(work, candidates), layers, count=wanted, max_tokens=limit, report=report)
                heldout = bipo.cache_pairs(model, bipo_pairs(work, held), layers, count=study.pairs.evaluation, max_tokens=limit)
            schedule = bipo.Schedule(**study.training.model_dump(), epochs=model_settings.epochs_trained)
            for site, layer in zip(sites, layers, strict=True):
                total = schedule.epochs * (len(training.names) + 2 * len(heldout.names))
                with work.progress(total, "pair", f"BiPO {site}") as report:
                    run = bipo.train(model, layer, training, heldout, schedule, seed=study.seed, report=report)
                metrics = tables.training_metrics(site, run)
                last = metrics[metrics["epoch"] == schedule.epochs].set_index("direction")["accuracy"]
                header = {
                    "site": site,
                    "model": model_settings.source,
                    "settings": json.dumps(asdict(schedule), sort_keys=True),
                    "evaluations": metrics.to_json(orient="records"),
                    "pairs": str(len(training.names)),
                    "pairs_too_long": str(training.too_long),
                    "preference_pairs_version": work.version("preference_pairs") or "",
                }
                arrays = {"vectors": run.vectors, "losses": run.losses, "directions": run.directions}
                shown = {
                    "plot": plot(figures.training_curves(metrics)),
                    "pairs": len(training.names),
                    "pairs_too_long": training.too_long,
                    "steps": len(run.losses),
                    "accuracy_plus": float(last[1]),
                    "accuracy_minus": float(last[-1]),
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
            yield work.table(site, metrics, {"plot": plot(figures.training_curves(metrics))})

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
            yield work.table(site, tables.vector_summary(site, vectors, sources, hashes))

    @stage.asset(
        group=GROUP,
        version="1",
        description="Norm and cosine of every vector of the study.",
        deps={"site_vector_summary": dg.AllPartitionMapping()},
        schema=tables.VECTOR_SUMMARY,
    )
    def vector_summary(work: Work) -> Iterator[dg.AssetMaterialization]:
        frame = pd.concat([work.read_table("site_vector_summary", site) for site in work.upstream("site_vector_summary", None)])
        yield work.table(None, frame, {"plot": plot(figures.vector_norms(frame))})
