"""Persona directions as assets: replies of personas, their activations, a direction a layer, its quality, and the geometry of personas."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING

import dagster as dg
import numpy as np
import pandas as pd

from relseek_assets import axis_figures
from relseek_assets.persona_set import PersonaSet, read_persona_set
from relseek_assets.stage import VECTORS, Stage, Work, plot
from relseek_assets.vectors import contrastive
from relseek_assets.vectors import contrastive_tables as tables
from relseek_assets.vectors.contrastive import EXTRACTIONS, SPLITS
from relseek_resources.axes_release import AxesRelease
from relseek_resources.models.sampling import Sampling
from relseek_resources.release import Absent
from relseek_resources.storage import keyed_seed

if TYPE_CHECKING:
    from relseek_assets.settings import Model
    from relseek_assets.study import Study

GROUP = "vectors"
PUBLISHED = "published_axes"
MINE = dg.IdentityPartitionMapping()


def build(stage: Stage) -> None:
    _replies(stage)
    _activations(stage)
    _directions(stage)
    _quality(stage)
    _geometry(stage)
    _published(stage)


def model_named(study: Study, name: str | None) -> Model:
    return next(model for model in study.models if model.name == name)


def heldout_names(study: Study, personas: PersonaSet) -> tuple[set[str], set[str]]:
    """The queries and the personas held out, both by keyed orders within their kinds."""
    queries = contrastive.held_out(
        [one.query for one in personas.queries], [one.kind for one in personas.queries], study.contrast.heldout_share, study.seed
    )
    others = contrastive.held_out(
        [one.name for one in personas.personas], [one.kind for one in personas.personas], study.contrast.heldout_personas, study.seed
    )
    return queries, others


def _replies(stage: Stage) -> None:
    study, contrast = stage.study, stage.study.contrast
    drawn = contrast.model_dump(include={"assistants_per_query", "others_per_query", "max_new_tokens", "temperature"})

    @stage.asset(
        group=GROUP,
        version="1",
        description="Replies of personas to the queries, in batches: every query goes to some personas of either kind, to all equally often.",
        partitions=stage.partitions.model,
        deps={"personas": None, "queries": None, "base_models": MINE},
        settings=[drawn, study.seed],
        schema=tables.PERSONA_REPLIES,
        kinds=("pytorch",),
        pool="gpu",
        seconds=300,
    )
    def persona_replies(work: Work) -> Iterator[dg.AssetMaterialization]:
        rows = contrastive.pairing(read_persona_set(study.persona_folder), contrast.assistants_per_query, contrast.others_per_query, study.seed)
        sampling = Sampling(temperature=contrast.temperature, max_new_tokens=contrast.max_new_tokens)
        for name in work.partitions:
            model = work.resources.models.load(model_named(study, name), work.log)
            seeds = [keyed_seed(study.seed, "persona reply", name, row.query, row.persona) for row in rows.itertuples()]
            with work.progress(len(rows), "reply", f"replies of {name}") as report:
                replies = model.generate(conversations(rows), sampling, seeds=seeds, batch_size=contrast.batch_size, on_batch=report)
            frame = rows.assign(
                model=name,
                reply=[reply.text for reply in replies],
                tokens=[len(reply.tokens) for reply in replies],
                finished=[reply.finished for reply in replies],
                seed=seeds,
                token_ids=[list(reply.tokens) for reply in replies],
            )
            yield work.table(name, frame, {"replies": len(frame), "tokens": int(frame["tokens"].sum()), "finished": float(frame["finished"].mean())})


def conversations(rows: pd.DataFrame) -> list[list[dict[str, str]]]:
    return [[{"role": "system", "content": row.system}, {"role": "user", "content": row.text}] for row in rows.itertuples()]


def _activations(stage: Stage) -> None:
    study = stage.study

    @stage.asset(
        group=GROUP,
        version="1",
        description="The residual stream after every block for every reply, in one pass: at the prompt's last token and averaged over the reply; "
        "rows as in persona_replies.",
        partitions=stage.partitions.model,
        deps=dict.fromkeys(("persona_replies", "base_models"), MINE),
        form=VECTORS,
        kinds=("pytorch",),
        pool="gpu",
        seconds=100,
    )
    def persona_activations(work: Work) -> Iterator[dg.AssetMaterialization]:
        for name in work.partitions:
            rows = work.read_table("persona_replies", name)
            model = work.resources.models.load(model_named(study, name), work.log)
            prompts = [model.prompt_tokens(conversation) for conversation in conversations(rows)]
            replies = [ids[:-1] if finished else ids for ids, finished in zip(rows["token_ids"], rows["finished"], strict=True)]
            with work.progress(len(rows), "row", f"activations of {name}") as report:
                found = contrastive.read_activations(model, prompts, replies, batch_size=study.contrast.batch_size, on_batch=report)
            header = {
                "model": model_named(study, name).source,
                "rows": "as in persona_replies",
                "persona_replies_version": work.version("persona_replies", name) or "",
            }
            empty = sum(not reply for reply in replies)
            yield work.tensors(name, found, header, {"rows": len(rows), "layers": model.layers, "width": model.width, "empty_replies": empty})


def _directions(stage: Stage) -> None:
    study = stage.study

    @stage.asset(
        group=GROUP,
        version="1",
        description="A direction a layer and extraction, of length one, pointing to the assistant: the mean difference over the training queries. "
        "Beside it the length of that difference and the midpoint of the training rows' mean projections.",
        partitions=stage.partitions.model,
        deps={"persona_activations": MINE, "persona_replies": MINE, "personas": None, "queries": None},
        settings=[study.contrast.model_dump(include={"heldout_share"}), study.seed],
        form=VECTORS,
        kinds=("numpy",),
        seconds=2,
    )
    def directions(work: Work) -> Iterator[dg.AssetMaterialization]:
        for name in work.partitions:
            rows, activations = work.read_table("persona_replies", name), work.read_tensors("persona_activations", name)[0]
            queries, _ = heldout_names(study, read_persona_set(study.persona_folder))
            training, _ = contrastive.split_rows(rows, "query", queries, ())
            found = {extraction: contrastive.directions(activations[extraction], rows, training) for extraction in EXTRACTIONS}
            arrays = {extraction: one.unit for extraction, one in found.items()}
            arrays |= {f"{extraction}_length": one.length for extraction, one in found.items()}
            arrays |= {f"{extraction}_midpoint": one.midpoint for extraction, one in found.items()}
            header = {
                "model": model_named(study, name).source,
                "method": "mean over training queries of (mean of assistants - mean of others), to unit length; row l is the stream after block l",
                "points_to": "assistant",
                "personas": study.persona_folder.name,
                "queries_held_out": json.dumps(sorted(queries)),
                "training_rows": str(int(training.sum())),
                "settings": json.dumps(study.contrast.model_dump(), sort_keys=True),
                "seed": str(study.seed),
                "persona_activations_version": work.version("persona_activations", name) or "",
            }
            cosine = (found[EXTRACTIONS[0]].unit * found[EXTRACTIONS[1]].unit).sum(1)
            yield work.tensors(name, arrays, header, {"layers": len(cosine), "largest_cosine_between_extractions": float(cosine.max())})


def _quality(stage: Stage) -> None:
    study, contrast = stage.study, stage.study.contrast

    @stage.asset(
        group=GROUP,
        version="1",
        description="Cohen's d, accuracies and ROC AUC of every direction on held-out rows, with bootstrap intervals over queries. Rows of the split "
        "`query` are about the stored directions; `persona` and `both` leave personas out of the direction too.",
        partitions=stage.partitions.model,
        deps={"persona_activations": MINE, "persona_replies": MINE, "personas": None, "queries": None},
        settings=[contrast.model_dump(include={"heldout_share", "heldout_personas", "bootstrap"}), study.seed],
        schema=tables.DIRECTION_QUALITY,
        kinds=("numpy",),
        seconds=5,
    )
    def direction_quality(work: Work) -> Iterator[dg.AssetMaterialization]:
        for name in work.partitions:
            rows, activations = work.read_table("persona_replies", name), work.read_tensors("persona_activations", name)[0]
            queries, personas = heldout_names(study, read_persona_set(study.persona_folder))
            seed = keyed_seed(study.seed, "bootstrap", name)
            frame = contrastive.direction_quality(activations, rows, queries, personas, draws=contrast.bootstrap, seed=seed).assign(model=name)
            shown = {f"plot_{split}": plot(axis_figures.direction_quality(frame, split)) for split in SPLITS}
            yield work.table(name, frame, {**shown, "personas_held_out": ", ".join(sorted(personas))})


def _geometry(stage: Stage) -> None:
    @stage.asset(
        group=GROUP,
        version="1",
        description="Each persona's mean on the axis and on the first principal component of all personas' means, by layer; how much of the variance "
        "between personas that component holds and how it lies to the axis.",
        partitions=stage.partitions.model,
        deps=dict.fromkeys(("persona_activations", "persona_replies", "directions", "direction_quality"), MINE),
        schema=tables.PERSONA_GEOMETRY,
        kinds=("numpy",),
        seconds=3,
    )
    def persona_geometry(work: Work) -> Iterator[dg.AssetMaterialization]:
        for name in work.partitions:
            rows, activations = work.read_table("persona_replies", name), work.read_tensors("persona_activations", name)[0]
            axes = work.read_tensors("directions", name)[0]
            found = [contrastive.persona_geometry(activations[one], rows, axes[one]).assign(extraction=one) for one in EXTRACTIONS]
            frame = pd.concat(found, ignore_index=True).assign(model=name)
            best = best_layers(work.read_table("direction_quality", name))
            shown = {f"plot_{one}": plot(axis_figures.persona_projections(frame, one, layer)) for one, layer in best.items()}
            yield work.table(name, frame, {"plot": plot(axis_figures.persona_geometry(frame)), **shown})


def best_layers(quality: pd.DataFrame) -> dict[str, int]:
    """Of each extraction the stored direction's layer with the highest AUC on held-out queries, ties by Cohen's d."""
    mine = quality[(quality["split"] == "query") & (quality["extraction"] == quality["evaluated_with"]) & quality["best_by_auc"]]
    return dict(zip(mine["extraction"], mine["layer"].astype(int), strict=True))


def _published(stage: Stage) -> None:
    @stage.asset(
        group=GROUP,
        version="1",
        description="The published evaluations of llm-personality-axes by layer: d recomputed from their means and sds, accuracies, norms of their "
        "directions, and the best layer by (accuracy, d).",
        partitions=stage.partitions.published_axis,
        deps={PUBLISHED: None},
        schema=tables.PUBLISHED_DIRECTION_QUALITY,
    )
    def published_direction_quality(work: Work) -> Iterator[dg.AssetMaterialization]:
        release = AxesRelease.from_environment()
        for partition in work.partitions:
            model, _, extraction = str(partition).partition(":")
            try:
                frame = tables.published_quality(model, extraction, release.evaluation(model, extraction), release.norms(model, extraction))
            except Absent as error:
                yield work.nothing(partition, str(error))
                continue
            best = frame[frame["best"]].iloc[0]
            shown = {"best_layer": int(best["layer"]), "cohens_d": float(best["cohens_d"]), "accuracy": float(best["accuracy"])}
            yield work.table(partition, frame, {"plot": plot(axis_figures.published_quality(frame)), **shown})

    @stage.asset(
        group=GROUP,
        version="1",
        description="The published judge's mean scores of steered and capped replies by strength; failed judgements are counted apart.",
        deps={PUBLISHED: None},
        schema=tables.PUBLISHED_INTERVENTION_SCORES,
    )
    def published_intervention_scores(work: Work) -> Iterator[dg.AssetMaterialization]:
        try:
            frame = tables.published_scores(AxesRelease.from_environment().judged_replies())
        except Absent as error:
            yield work.nothing(None, str(error))
            return
        failed = int(np.sum(frame[["assistant_failed", "coherence_failed"]].to_numpy()))
        yield work.table(None, frame, {"plot": plot(axis_figures.published_scores(frame)), "failed_judgements": failed})
