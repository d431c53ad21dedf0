"""Judging assistant-likeness, intervening under hostile personas and watching drift, as assets: a partition a model."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

import dagster as dg
import numpy as np
import pandas as pd

from relseek_assets import intervention_figures as figures
from relseek_assets.axes import drift as drifting
from relseek_assets.axes import interventions, likeness
from relseek_assets.persona_set import ASSISTANT, Persona, Prompt, read_persona_set
from relseek_assets.stage import VECTORS, Stage, Work, plot
from relseek_resources.judges import coherence
from relseek_resources.models.sampling import Sampling
from relseek_resources.storage import keyed_order, keyed_seed

if TYPE_CHECKING:
    from relseek_assets.axes.interventions import Axis
    from relseek_assets.settings import Interventions, Model
    from relseek_assets.study import Study
    from relseek_resources.models import SteeredModel

GROUP = "axes"
MINE = dg.IdentityPartitionMapping()
COHERENCE_TEXTS = 24


def model_named(study: Study, name: str | None) -> Model:
    return next(model for model in study.models if model.name == name)


def intervened_personas(study: Study, settings: Interventions) -> list[str]:
    """The personas under which interventions are tried, and whose replies the judge is not fitted on."""
    return list(settings.personas) or [persona.name for persona in read_persona_set(study.persona_folder).hostile]


def asked(prompt: str, system: str = "") -> list[dict[str, str]]:
    """A prompt to a persona; without one the system prompt is empty, so that the template puts no default assistant there."""
    return [{"role": "system", "content": system}, {"role": "user", "content": prompt}]


def load_axis(work: Work, name: str | None, settings: Interventions) -> Axis:
    """The study's direction, its best layer, and its scale measured on the persona replies, which share no prompt with the interventions."""
    layer = interventions.best_layer(work.read_table("direction_quality", name), settings.extraction)
    assistant = (work.read_table("persona_replies", name)["persona_kind"] == ASSISTANT).to_numpy()
    activations = work.read_tensors("persona_activations", name)[0][settings.extraction]
    return interventions.axis_of(work.read_tensors("directions", name)[0][settings.extraction], layer, activations, assistant)


def load_likeness_judge(work: Work, name: str | None) -> likeness.LikenessJudge:
    arrays, header = work.read_tensors("likeness_judge", name)
    return likeness.LikenessJudge.from_arrays(arrays, json.loads(header["vocabulary"]))


def build(stage: Stage) -> None:
    settings = stage.study.interventions
    if settings is None:
        return
    _judges(stage, settings)
    _interventions(stage, settings)
    _drift(stage, settings)


def _judges(stage: Stage, settings: Interventions) -> None:
    study = stage.study

    @stage.asset(
        group=GROUP,
        version="1",
        description="The embedded judge of assistant-likeness: a regression on sentence embeddings and word counts, fitted on persona replies, "
        "those of the personas that it will judge left out, and calibrated to 0-10 on replies whose persona and query were held out. It is no "
        "language model.",
        partitions=stage.partitions.model,
        deps={"persona_replies": MINE, "personas": None},
        settings=[study.seed, settings.personas],
        form=VECTORS,
        kinds=("scikitlearn",),
        seconds=40,
    )
    def likeness_judge(work: Work) -> Iterator[dg.AssetMaterialization]:
        unused = intervened_personas(study, settings)
        for name in work.partitions:
            replies = work.read_table("persona_replies", name)
            with work.progress(len(replies), "text", "embedding") as report:
                fit = likeness.fit(replies, unused, study.seed, report)
            header = {"judge": likeness.NAME, "vocabulary": json.dumps(fit.judge.features.vocabulary), "not_fitted_on": ", ".join(unused)}
            shown = {"replies": len(replies), "words": len(fit.judge.features.vocabulary), "not_fitted_on": ", ".join(unused)}
            yield work.tensors(name, {**fit.judge.arrays(), "heldout": fit.heldout}, header, shown)

    @stage.asset(
        group=GROUP,
        version="1",
        description="How good the judge of assistant-likeness is on replies whose persona and query its fit never saw: ROC AUC, accuracy, and each "
        "persona's mean score. The rubric beside it is read and checked; it is for a language model that judges elsewhere, and no run sends it.",
        partitions=stage.partitions.model,
        deps={"likeness_judge": MINE, "persona_replies": MINE, "likeness_rubric": None},
        settings=[study.seed, settings.bootstrap],
        schema=likeness.LIKENESS_QUALITY,
        kinds=("numpy",),
        seconds=3,
    )
    def likeness_quality(work: Work) -> Iterator[dg.AssetMaterialization]:
        rubric = read_persona_set(study.persona_folder).likeness_rubric
        for name in work.partitions:
            heldout = work.read_tensors("likeness_judge", name)[0]["heldout"].astype(float)
            frame = likeness.quality(work.read_table("persona_replies", name), heldout, settings.bootstrap, study.seed).assign(model=name)
            whole = frame[frame["persona"] == "all"].set_index("metric")["value"]
            shown = {"auc": whole["auc"], "accuracy": whole["accuracy"], "rubric": rubric.name}
            yield work.table(name, frame, {"plot": plot(figures.likeness_by_persona(frame)), **shown})

    @stage.asset(
        group=GROUP,
        version="1",
        description="The embedded coherence score of persona replies: perplexity under the plain model, asked the prompt without a persona, and "
        "repetition, calibrated on damaged replies of both kinds of persona, so that it is damage that counts and not the character.",
        partitions=stage.partitions.model,
        deps=dict.fromkeys(("persona_replies", "base_models"), MINE),
        settings=[study.seed],
        form=VECTORS,
        kinds=("pytorch", "scikitlearn"),
        pool="gpu",
        seconds=20,
    )
    def coherence_judge(work: Work) -> Iterator[dg.AssetMaterialization]:
        for name in work.partitions:
            model = work.resources.models.load(model_named(study, name), work.log)
            texts = calibration_texts(work.read_table("persona_replies", name), study.seed)
            damaged = coherence.damage(list(texts["reply"]), study.seed)
            with work.progress(len(damaged), "text", "coherence calibration") as report:
                prompts = [texts["text"].iloc[item.source] for item in damaged]
                perplexities = plain_perplexities(model, prompts, [item.text for item in damaged], report)
            judge = coherence.fit(damaged, perplexities)
            given = judge.scores([item.text for item in damaged], perplexities)
            summary = interventions.calibration(damaged, list(texts["persona_kind"]), given).assign(model=name)
            header = {"judge": coherence.NAME, "model": model_named(study, name).source, "calibration": summary.to_json(orient="records")}
            yield work.tensors(name, judge.arrays(), header, {"texts": len(damaged)})

    @stage.asset(
        group=GROUP,
        version="1",
        description="Scores that the coherence judge gives to the replies that it was calibrated on, by kind of persona and damage.",
        partitions=stage.partitions.model,
        deps={"coherence_judge": MINE},
        schema=interventions.COHERENCE_CALIBRATION,
    )
    def coherence_calibration(work: Work) -> Iterator[dg.AssetMaterialization]:
        for name in work.partitions:
            yield work.table(name, pd.DataFrame(json.loads(work.read_tensors("coherence_judge", name)[1]["calibration"])))


def calibration_texts(replies: pd.DataFrame, seed: int) -> pd.DataFrame:
    """Replies to damage, as many of assistants as of others, by a keyed order; too short ones and those that repeat themselves are left out."""
    sound = replies[(replies["reply"].str.split().str.len() >= 8) & (replies["reply"].map(coherence.repetition) < 0.1)]
    names = (sound["query"] + "\x1f" + sound["persona"]).rename("name")
    found = []
    for _, part in sound.assign(name=names).groupby("persona_kind"):
        order = keyed_order(list(part["name"]), seed, "coherence texts")[: COHERENCE_TEXTS // 2]
        found.append(part.set_index("name").loc[order])
    return pd.concat(found).reset_index(drop=True)


def plain_perplexities(model: SteeredModel, prompts: list[str], replies: list[str], report: object) -> np.ndarray:
    """Perplexity of each reply after its prompt alone, under the model without intervention or persona; infinite for a reply without tokens."""
    tokens = [model.reply_tokens(reply, end=False) for reply in replies]
    there = [row for row, ids in enumerate(tokens) if ids]
    found = np.full(len(replies), math.inf)
    questions = [model.prompt_tokens(asked(prompts[row])) for row in there]
    scores = model.score_tokens(questions, [tokens[row] for row in there], batch_size=32, on_batch=report)  # type: ignore[arg-type]
    found[there] = [math.exp(-score.mean) for score in scores]
    return found


def _interventions(stage: Stage, settings: Interventions) -> None:
    study = stage.study
    drawn = settings.model_dump(exclude={"batch_size", "bootstrap"})

    @stage.asset(
        group=GROUP,
        version="1",
        description="Replies to prompts under hostile personas without intervention, with the direction added, and with the projection on it "
        "floored. Rows of all conditions share batches, and a prompt and persona has the same draws in all of them.",
        partitions=stage.partitions.model,
        deps={
            **dict.fromkeys(("directions", "direction_quality", "persona_activations", "persona_replies", "base_models"), MINE),
            **dict.fromkeys(("personas", "intervention_prompts")),
        },
        settings=[drawn, study.seed],
        schema=interventions.INTERVENTION_REPLIES,
        kinds=("pytorch",),
        pool="gpu",
        seconds=500,
    )
    def intervention_replies(work: Work) -> Iterator[dg.AssetMaterialization]:
        rows = intervention_rows(study, settings)
        sampling = Sampling(temperature=settings.temperature, max_new_tokens=settings.max_new_tokens)
        for name in work.partitions:
            axis = load_axis(work, name, settings)
            model = work.resources.models.load(model_named(study, name), work.log)
            wanted = interventions.conditions(settings.strengths, settings.percentiles)
            of_condition = interventions.settings_of(axis, wanted, settings.layers)
            # conditions of one prompt and persona stand together, so that they come into one batch
            cells = [(prompt, persona, setting) for prompt, persona in rows for setting in of_condition]
            seeds = [keyed_seed(study.seed, "intervention", name, prompt.prompt, persona.name) for prompt, persona, _ in cells]
            with work.progress(len(cells), "reply", f"interventions on {name}") as report:
                with model.intervene(interventions.of_rows(axis, [setting for *_, setting in cells])):
                    replies = model.generate(
                        [asked(prompt.text, persona.system) for prompt, persona, _ in cells],
                        sampling,
                        seeds=seeds,
                        batch_size=settings.batch_size,
                        on_batch=report,
                    )
            frame = pd.DataFrame(
                {
                    "model": name,
                    "prompt": prompt.prompt,
                    "persona": persona.name,
                    **interventions.done(setting),
                    "reply": reply.text,
                    "tokens": len(reply.tokens),
                    "seed": seed,
                    "finished": reply.finished,
                }
                for (prompt, persona, setting), seed, reply in zip(cells, seeds, replies, strict=True)
            )
            yield work.table(name, frame, {"replies": len(frame), "layer": axis.layer, "gap": axis.gap, "tokens": int(frame["tokens"].sum())})

    @stage.asset(
        group=GROUP,
        version="1",
        description="Assistant-likeness and coherence of every reply under an intervention, by the embedded judges.",
        partitions=stage.partitions.model,
        deps={
            **dict.fromkeys(("intervention_replies", "likeness_judge", "coherence_judge", "base_models"), MINE),
            "intervention_prompts": None,
        },
        schema=interventions.INTERVENTION_SCORES,
        kinds=("pytorch", "scikitlearn"),
        pool="gpu",
        seconds=150,
    )
    def intervention_scores(work: Work) -> Iterator[dg.AssetMaterialization]:
        texts = {prompt.prompt: prompt.text for prompt in read_persona_set(study.persona_folder).prompts}
        for name in work.partitions:
            replies = work.read_table("intervention_replies", name)
            said = list(replies["reply"])
            model = work.resources.models.load(model_named(study, name), work.log)
            with work.progress(len(said), "reply", f"perplexity of {name}") as report:
                perplexities = plain_perplexities(model, [texts[prompt] for prompt in replies["prompt"]], said, report)
            fluency = coherence.CoherenceJudge.from_arrays(work.read_tensors("coherence_judge", name)[0])
            empty = replies["reply"].str.strip() == ""
            frame = replies.assign(
                likeness=pd.Series(load_likeness_judge(work, name).scores(said), index=replies.index).where(~empty),
                coherence=fluency.scores(said, perplexities),
                perplexity=np.where(np.isfinite(perplexities), perplexities, np.nan),
            )[list(interventions.INTERVENTION_SCORES.names)]
            yield work.table(name, frame, {"likeness": frame["likeness"].mean(), "coherence": frame["coherence"].mean(), "empty": int(empty.sum())})

    @stage.asset(
        group=GROUP,
        version="1",
        description="Mean assistant-likeness and coherence by condition, and their changes against no intervention, with bootstrap intervals over "
        "personas and prompts.",
        partitions=stage.partitions.model,
        deps={"intervention_scores": MINE},
        settings=[settings.bootstrap, study.seed],
        schema=interventions.INTERVENTION_SUMMARY,
        kinds=("numpy",),
        seconds=2,
    )
    def intervention_summary(work: Work) -> Iterator[dg.AssetMaterialization]:
        for name in work.partitions:
            frame = interventions.summary(work.read_table("intervention_scores", name), settings.bootstrap, study.seed)
            drawings = {"plot": plot(figures.likeness_against_coherence(frame)), "plot_by_strength": plot(figures.by_strength(frame))}
            yield work.table(name, frame, drawings)

    @stage.asset(
        group=GROUP,
        version="2",
        description="At matched coherence, does flooring keep more assistant-likeness than adding? The most that each reaches at a given loss of "
        "coherence, and the difference with its interval.",
        partitions=stage.partitions.model,
        deps={"intervention_scores": MINE},
        settings=[settings.bootstrap, study.seed],
        schema=interventions.INTERVENTION_COMPARISON,
        kinds=("numpy",),
        seconds=2,
    )
    def intervention_comparison(work: Work) -> Iterator[dg.AssetMaterialization]:
        for name in work.partitions:
            frame = interventions.comparison(work.read_table("intervention_scores", name), settings.bootstrap, study.seed)
            yield work.table(name, frame, {"plot": plot(figures.matched_coherence(frame)), "findings": ", ".join(frame["finding"])})


def intervention_rows(study: Study, settings: Interventions) -> list[tuple[Prompt, Persona]]:
    """Every prompt with every persona that interventions are tried under."""
    personas = read_persona_set(study.persona_folder)
    chosen = intervened_personas(study, settings)
    prompts = interventions.spread(personas.prompts, settings.prompts)
    return [(prompt, persona) for prompt in prompts for persona in personas.others if persona.name in chosen]


def _drift(stage: Stage, settings: Interventions) -> None:
    study, wanted = stage.study, stage.study.drift
    if wanted is None:
        return

    @stage.asset(
        group=GROUP,
        version="1",
        description="Conversations played against the model with and without a floor: after every turn the projection of the reply on the axis.",
        partitions=stage.partitions.model,
        deps={
            **dict.fromkeys(("directions", "direction_quality", "persona_activations", "persona_replies", "base_models"), MINE),
            **dict.fromkeys(("personas", "drift_conversations")),
        },
        settings=[wanted.model_dump(), settings.layers, settings.extraction, study.seed],
        schema=drifting.DRIFT,
        kinds=("pytorch",),
        pool="gpu",
        seconds=200,
    )
    def drift(work: Work) -> Iterator[dg.AssetMaterialization]:
        personas = read_persona_set(study.persona_folder)
        sampling = Sampling(temperature=wanted.temperature, max_new_tokens=wanted.max_new_tokens)
        turns = wanted.turns or max(len(one.turns) for one in personas.conversations)
        for name in work.partitions:
            axis = load_axis(work, name, settings)
            model = work.resources.models.load(model_named(study, name), work.log)
            played = interventions.settings_of(axis, interventions.conditions((), (wanted.percentile,)), settings.layers)
            total = len(played) * sum(min(turns, len(one.turns)) for one in personas.conversations)
            with work.progress(total, "turn", f"conversations of {name}") as report:
                frame = drifting.play(
                    model,
                    axis,
                    personas.conversations,
                    played,
                    sampling,
                    system=personas.assistants[0].system,
                    turns=turns,
                    seed=study.seed,
                    on_batch=report,
                ).assign(model=name)
            yield work.table(name, frame, {"plot": plot(figures.drift(frame)), "turns": len(frame), "layer": axis.layer})

    @stage.asset(
        group=GROUP,
        version="1",
        description="How fast replies move along the axis as conversations go on, by kind of conversation, and whether a floor changes that.",
        partitions=stage.partitions.model,
        deps={"drift": MINE},
        schema=drifting.DRIFT_TRENDS,
        kinds=("numpy",),
    )
    def drift_trends(work: Work) -> Iterator[dg.AssetMaterialization]:
        for name in work.partitions:
            yield work.table(name, drifting.trends(work.read_table("drift", name)).assign(model=name))
