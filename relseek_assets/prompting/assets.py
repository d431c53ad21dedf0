"""The prompting experiments as assets: levels asked for in words against doses, and persona attacks on both.

The steered model's side of experiment 1 is the sweep and its scores; nothing of it is generated twice.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import dagster as dg
import numpy as np
import pandas as pd

from relseek_assets import prompting_figures as figures
from relseek_assets.behaviour import FILES, GradedReply, Rubric, read_graded_replies, read_rubric, read_rubrics, rubric_files
from relseek_assets.dataset.pairs import evaluation_items
from relseek_assets.judging import in_flight
from relseek_assets.judging.requests import OverBudget, estimate, read_comparison
from relseek_assets.partitions import multi_key, step_key
from relseek_assets.persona_attacks import FILE as PERSONA_ATTACKS
from relseek_assets.persona_attacks import Scenario, read_persona_attacks
from relseek_assets.prompting import analysis, attacks, authors, published_assets, rating, steerability, tables
from relseek_assets.prompting.levels import Level, examples_of, read_trait
from relseek_assets.prompting.tables import STEERED
from relseek_assets.stage import Stage, Work, plot
from relseek_assets.study import LanguageJudge, Prompting, Study, layer_of
from relseek_resources.judges import asking, coherence, embedded
from relseek_resources.models.sampling import Sampling

GROUP = "prompting"
MINE = dg.IdentityPartitionMapping()


def build(stage: Stage) -> None:
    """Published experiments are read, others are carried out; what their figures say is computed alike."""
    wanted = stage.study.prompting
    assert wanted is not None, f"{stage.study.name} declares no prompting experiments"
    if wanted.published:
        published_assets.build(stage, wanted)
    else:
        _generated(stage, wanted)
        _rated(stage, wanted)
    _analysed(stage, wanted)


# --- what is asked ----------------------------------------------------------------------------------------------------


def levels_of(wanted: Prompting, numbers: Sequence[int] | None = None) -> list[Level]:
    """The study's levels with their doses, or those of these numbers."""
    count = len(wanted.doses)
    return [Level(number, count, wanted.doses[number - 1]) for number in numbers or range(1, count + 1)]


def system_prompts(study: Study, wanted: Prompting) -> steerability.SystemPrompts:
    folder = study.behaviour_folder
    examples = examples_of(read_graded_replies(folder / FILES["few_shots"]))
    return steerability.SystemPrompts(read_trait(folder / FILES["behaviour_definition"]), examples, wanted.examples, study.prompts.system, study.seed)


def asked_items(work: Work) -> pd.DataFrame:
    """The held-out prompts of the sweep."""
    items = evaluation_items(work.read_table("preference_pairs"), work.study.seed, work.study.prompts.max_words)
    return items.head(work.study.prompts.count) if work.study.prompts.count else items


def scenarios_of(study: Study, theme: str) -> list[Scenario]:
    return list(read_persona_attacks(study.behaviour_folder / PERSONA_ATTACKS).scenarios(theme))


def author_and_theme(partition: str | None) -> tuple[str, str]:
    author, _, theme = str(partition).partition("@")
    return author, theme


def sampling_of(study: Study) -> Sampling:
    return Sampling(study.sampling.temperature, study.sampling.top_p, study.sampling.max_new_tokens)


def _generated(stage: Stage, wanted: Prompting) -> None:
    study, partitions = stage.study, stage.partitions
    sampling = sampling_of(study)
    replies = [study.sampling.model_dump(exclude={"batch_size"}), study.seed, study.prompts.system]
    asked = {"behaviour_definition": None, "few_shots": None, "base_models": None}
    vector = "derived_vectors" if wanted.site in study.derived_sites else "steering_vectors"

    @stage.asset(
        group=GROUP,
        version="1",
        description="What each author of prompts will be asked, and what it will cost, before anything is sent.",
        partitions=partitions.author,
        deps={"author_declarations": MINE, "preference_pairs": None, "persona_attacks": None, "behaviour_definition": None, "few_shots": None},
        settings=[*replies, study.prompts.model_dump(), wanted.doses, wanted.examples, wanted.attacked_levels, wanted.themes],
        schema=tables.PROMPTING_ESTIMATES,
    )
    def prompting_estimates(work: Work) -> Iterator[dg.AssetMaterialization]:
        prompts, items = system_prompts(study, wanted), asked_items(work)
        themes = wanted.themes or tuple(read_persona_attacks(study.behaviour_folder / PERSONA_ATTACKS).themes)
        for name in work.partitions:
            author = wanted.author(str(name))
            rows = steerability.level_rows(author.name, items, levels_of(wanted), prompts)
            played = [
                one
                for theme in themes
                for one in attacks.started(author.name, scenarios_of(study, theme), levels_of(wanted, wanted.attacked_levels), prompts)
            ]
            frame = pd.DataFrame(
                [
                    authors.estimate(author, "levels", [(row.conversation, 0) for row in rows], sampling),
                    authors.estimate(author, "attacks", [(one.asked_at(turn), turn) for one in played for turn in range(one.turns)], sampling),
                ]
            )
            usd = float(frame["usd"].sum())
            work.log.info(f"{author.name}: {int(frame['requests'].sum())} replies, at most ${usd:,.2f} of ${author.budget_usd:,.2f}")
            yield work.table(name, frame, {"usd": usd, "budget_usd": author.budget_usd, "requests": int(frame["requests"].sum())})

    @stage.asset(
        group=GROUP,
        version="1",
        description="Replies to the held-out prompts at every level that is asked for in words. An author that would cost more than "
        "its budget is refused before anything is sent to its endpoint.",
        partitions=partitions.author,
        deps={"author_declarations": MINE, "prompting_estimates": MINE, "preference_pairs": None, **asked},
        settings=[*replies, study.prompts.model_dump(), wanted.doses, wanted.examples, study.model_of(wanted.site).model_dump(exclude={"layers"})],
        schema=tables.PROMPTED_GENERATIONS,
        kinds=("pytorch",),
        pool="gpu",
        seconds=60,
    )
    def prompted_generations(work: Work) -> Iterator[dg.AssetMaterialization]:
        prompts, items = system_prompts(study, wanted), asked_items(work)
        _refuse_authors(work, wanted, [str(name) for name in work.partitions])
        for name in work.partitions:
            rows = steerability.level_rows(str(name), items, levels_of(wanted), prompts)
            with work.progress(len(rows), "reply", f"levels of {name}") as report, ExitStack() as open_files:
                frame = steerability.written(rows, writer_of(work, wanted, str(name), name, report, open_files))
            yield work.table(name, frame, _reply_figures(frame))

    @stage.asset(
        group=GROUP,
        version="1",
        description="Conversations that end in an attack on the persona, every reply by its author: the steered model at doses, prompted models "
        "at the levels of these doses, and the unsteered model under a persona prompt.",
        partitions=partitions.attacked,
        deps={
            "author_declarations": partitions.of_my_author(),
            "prompting_estimates": partitions.of_my_author(),
            vector: partitions.of(multi_key(wanted.site, step_key(wanted.epoch))),
            "persona_attacks": None,
            **asked,
        },
        settings=[*replies, wanted.model_dump(include={"doses", "examples", "attacked", "site", "epoch"})],
        schema=tables.ATTACK_CONVERSATIONS,
        kinds=("pytorch",),
        pool="gpu",
        seconds=60,
    )
    def attack_conversations(work: Work) -> Iterator[dg.AssetMaterialization]:
        prompts = system_prompts(study, wanted)
        _refuse_authors(work, wanted, list(dict.fromkeys(author_and_theme(key)[0] for key in work.partitions)))
        for partition in work.partitions:
            author, theme = author_and_theme(partition)
            played = attacks.started(author, scenarios_of(study, theme), levels_of(wanted, wanted.attacked_levels), prompts)
            with work.progress(sum(one.turns for one in played), "reply", f"attacks on {partition}") as report, ExitStack() as open_files:
                frame = attacks.play(author, played, writer_of(work, wanted, author, partition, report, open_files), study.seed)
            yield work.table(partition, frame, _reply_figures(frame))


def writer_of(work: Work, wanted: Prompting, author: str, partition: str | None, report: Any, open_files: ExitStack) -> authors.Writer:
    """Who writes an author's replies; what an endpoint is paid for is kept beside the partition's table."""
    study, sampling = work.study, sampling_of(work.study)
    declared = next((one for one in wanted.authors if one.name == author), None)
    if declared is not None and declared.kind == "openai":
        name = in_flight.at_endpoint(author, declared.base_url) + in_flight.ANSWERS
        journal = open_files.enter_context(asking.AnswerJournal(work.store.path(work.context.asset_key, partition, name)))
        folder = work.store.folder(study.name)
        return authors.EndpointWriter(declared, sampling, journal, study.name, lambda: in_flight.paid(folder, author), report)
    model = work.resources.models.load(study.model_of(wanted.site), work.log)
    if author != STEERED:
        return authors.ModelWriter(model, sampling, study.sampling.batch_size, on_batch=report)
    asset = "derived_vectors" if wanted.site in study.derived_sites else "steering_vectors"
    vector = work.read_tensors(asset, work.upstream(asset, partition)[0])[0]["vector"]
    return authors.ModelWriter(model, sampling, study.sampling.batch_size, vector, layer_of(wanted.site), report)


def _refuse_authors(work: Work, wanted: Prompting, names: Sequence[str]) -> None:
    """Refuse before the first of them is asked."""
    for author in wanted.authors:
        if author.name in names:
            authors.refuse(author, work.read_table("prompting_estimates", author.name), work.study.name)


def _reply_figures(frame: pd.DataFrame) -> dict[str, Any]:
    missing = frame["status"] != tables.REPLIED
    return {"replies": int((~missing).sum()), "without_reply": int(missing.sum()), "cost_usd": float(frame["cost_usd"].sum())}


# --- what judges say --------------------------------------------------------------------------------------------------


def _judge_settings(study: Study) -> list[Any]:
    wording = {"name", "model", "base_url", "rubrics", "pairwise", "examples", "max_tokens"}
    return [study.seed, study.prompts.system, [judge.model_dump(include=wording) for judge in study.prompting_judges]]


def rubrics_of(study: Study) -> dict[str, tuple[Rubric, Sequence[GradedReply]]]:
    """Every rubric by its own name with its graded replies; only the disposition has any, and it comes first."""
    graded = read_graded_replies(study.behaviour_folder / FILES["few_shots"])
    found = read_rubrics(study.behaviour_folder)
    return {rubric.name: (rubric, graded if source == "rating_rubric" else []) for source, rubric in found.items()}


def embedded_judge(work: Work) -> embedded.EmbeddedJudge:
    arrays, header = work.read_tensors("embedded_judge")
    return embedded.EmbeddedJudge.from_arrays(arrays, json.loads(header["vocabulary"]))


def plain_conversations(study: Study, prompts: Sequence[Any]) -> list[list[dict[str, str]]]:
    """The messages before replies as the sweep has them: under the study's plain system prompt, whatever the author was told."""
    return [[{"role": "system", "content": study.prompts.system}, *prompt] for prompt in prompts]


def _rated(stage: Stage, wanted: Prompting) -> None:
    study, partitions = stage.study, stage.partitions
    rubric_sources = dict.fromkeys(rubric_files(study.behaviour_folder))
    doses = [multi_key(wanted.site, step_key(wanted.epoch, dose)) for dose in wanted.doses]

    @stage.asset(
        group=GROUP,
        version="1",
        description="Scores of every prompted reply on the disposition and on coherence, by the embedded judges and by every language judge that is "
        "asked at once. Those of the steered model are in judge_scores.",
        partitions=partitions.author,
        deps={"prompted_generations": MINE, **dict.fromkeys(("embedded_judge", "coherence_judge", "base_models", "few_shots")), **rubric_sources},
        settings=_judge_settings(study),
        schema=tables.LEVEL_SCORES,
        kinds=("pytorch", "scikitlearn"),
        pool="gpu",
        seconds=20,
    )
    def level_scores(work: Work) -> Iterator[dg.AssetMaterialization]:
        keys = ["author", "level", "multiplier", "item"]
        judge, fluency = embedded_judge(work), coherence.CoherenceJudge.from_arrays(work.read_tensors("coherence_judge")[0])
        disposition = read_rubric(study.behaviour_folder / FILES["rating_rubric"]).name
        sense = read_rubric(study.behaviour_folder / FILES["coherence_rubric"]).name
        model = work.resources.models.load(study.model_of(wanted.site), work.log)
        replies = {name: work.read_table("prompted_generations", name) for name in work.partitions}
        conversations = {name: plain_conversations(study, frame["prompt"]) for name, frame in replies.items()}
        said = language_ratings(work, replies, {name: list(frame["item"]) for name, frame in replies.items()}, conversations, rubrics_of(study), keys)
        for name, frame in replies.items():
            texts = list(frame["reply"].fillna(""))
            with work.progress(len(frame), "reply", f"perplexity of {name}") as report:
                perplexities = rating.perplexities(model, conversations[name], frame, report)
            parts = [
                rating.embedded_scores(frame, keys, embedded.NAME, judge.scores(texts)).assign(rubric=disposition),
                rating.embedded_scores(frame, keys, coherence.NAME, fluency.scores(texts, perplexities)).assign(rubric=sense),
            ]
            yield work.table(name, pd.concat([*parts, *said[name]], ignore_index=True), _score_figures([*parts, *said[name]]))

    @stage.asset(
        group=GROUP,
        version="1",
        description="Every prompted reply against the steered model's to the same prompt at the level's dose: which has more of the disposition.",
        partitions=partitions.author,
        deps={
            "prompted_generations": MINE,
            "level_scores": MINE,
            "generations": partitions.of(*doses),
            "judge_scores": partitions.of(*doses),
            **dict.fromkeys(("pairwise_definition", "rating_rubric", "few_shots")),
        },
        settings=[*_judge_settings(study), wanted.doses],
        schema=tables.LEVEL_PAIRS,
        seconds=0.2,
    )
    def level_pairs(work: Work) -> Iterator[dg.AssetMaterialization]:
        disposition = read_rubric(study.behaviour_folder / FILES["rating_rubric"]).name
        ours = steered_scores(work, wanted)
        ours = ours[(ours["rubric"] == disposition) & (ours["judge"] == embedded.NAME)].set_index(["level", "item"])
        replies = {name: work.read_table("prompted_generations", name) for name in work.partitions}
        compared = language_comparisons(work, wanted, replies)
        for name, frame in replies.items():
            scores = work.read_table("level_scores", name)
            theirs = scores[(scores["rubric"] == disposition) & (scores["judge"] == embedded.NAME)].set_index(["level", "item"])
            found = pd.concat([rating.embedded_pairs(frame, ours, theirs, embedded.NAME), *compared[name]], ignore_index=True)
            yield work.table(name, found, {**found["status"].value_counts().to_dict(), "cost_usd": float(found["cost_usd"].sum())})

    @stage.asset(
        group=GROUP,
        version="1",
        description="The disposition in every reply of the attacked conversations, by the embedded judge and the language judges asked at once.",
        partitions=partitions.attacked,
        deps={"attack_conversations": MINE, **dict.fromkeys(("embedded_judge", "rating_rubric", "few_shots"))},
        settings=_judge_settings(study),
        schema=tables.ATTACK_SCORES,
        kinds=("scikitlearn",),
        seconds=1,
    )
    def attack_scores(work: Work) -> Iterator[dg.AssetMaterialization]:
        keys = [column.name for column in tables.SCENARIO]
        judge = embedded_judge(work)
        disposition, *_ = rubrics_of(study).items()
        turns = {key: work.read_table("attack_conversations", key) for key in work.partitions}
        labels = {key: [f"{row.scenario}/{row.turn}" for row in frame.itertuples()] for key, frame in turns.items()}
        before = {key: plain_conversations(study, attacks.histories(frame)) for key, frame in turns.items()}
        said = language_ratings(work, turns, labels, before, dict([disposition]), keys)
        for partition, frame in turns.items():
            rows = rating.embedded_scores(frame, keys, embedded.NAME, judge.scores(list(frame["reply"].fillna(""))))
            found = [rows, *(part.drop(columns="rubric") for part in said[partition])]
            yield work.table(partition, pd.concat(found, ignore_index=True), _score_figures(found))


Frames = Mapping[str | None, pd.DataFrame]


def language_ratings(
    work: Work,
    replies: Frames,
    labels: Mapping[str | None, list[str]],
    conversations: Mapping[str | None, list[list[dict[str, str]]]],
    rubrics: dict[str, tuple[Rubric, Sequence[GradedReply]]],
    keys: Sequence[str],
) -> dict[str | None, list[pd.DataFrame]]:
    """Partition -> score rows of each language judge. All requests are made and a judge above its budget refused before the first is sent."""
    study = work.study
    scales = {name: rubric for name, (rubric, _) in rubrics.items()}
    asked = {
        (judge.name, key): rating.ratings_asked(frame, labels[key], conversations[key], rubrics, judge, study.seed)
        for judge in study.prompting_judges
        for key, frame in replies.items()
    }
    _refuse_judges(work, study.prompting_judges, asked)
    found: dict[str | None, list[pd.DataFrame]] = {key: [] for key in replies}
    for judge in study.prompting_judges:
        for key, frame in replies.items():
            requests = asked[judge.name, key]
            if len(requests):
                answers = _ask(work, judge, key, requests, scales)
                found[key].append(rating.language_scores(frame, keys, labels[key], requests, answers, scales))
    return found


def language_comparisons(work: Work, wanted: Prompting, replies: Frames) -> dict[str | None, list[pd.DataFrame]]:
    """Partition -> comparison rows of each language judge that compares."""
    study = work.study
    judges = [judge for judge in study.prompting_judges if judge.pairwise]
    found: dict[str | None, list[pd.DataFrame]] = {key: [] for key in replies}
    if not judges:
        return found
    definition = read_comparison(study.behaviour_folder / FILES["pairwise_definition"])
    graded = read_graded_replies(study.behaviour_folder / FILES["few_shots"])
    swept = pd.concat([work.read_table("generations", key) for key in work.upstream("generations", next(iter(replies)))])
    steered = swept.assign(level=level_numbers(swept, wanted))[["level", "item", "prompt", "reply"]]
    asked = {
        (judge.name, key): rating.comparisons_asked(steered, frame, definition, graded, judge, study.seed)
        for judge in judges
        for key, frame in replies.items()
    }
    _refuse_judges(work, judges, asked)
    for judge in judges:
        for key, frame in replies.items():
            answers = _ask(work, judge, key, asked[judge.name, key], {})
            found[key].append(rating.language_pairs(frame, asked[judge.name, key], answers, judge.name))
    return found


def _refuse_judges(work: Work, judges: Sequence[LanguageJudge], asked: Mapping[tuple[str, str | None], pd.DataFrame]) -> None:
    for judge in judges:
        _refuse_judge(work, judge, {partition: frame for (name, partition), frame in asked.items() if name == judge.name})


def _refuse_judge(work: Work, judge: LanguageJudge, asked: Mapping[str | None, pd.DataFrame]) -> None:
    """Refuse a judge whose requests that are new, and all that it was paid for this study, are above its budget."""
    new = [
        frame[~frame["custom_id"].isin(list(in_flight.answered([_journal(work, judge, partition)], judge.attempts)))]
        for partition, frame in asked.items()
    ]
    there = [frame for frame in new if len(frame)]
    if there:
        found = estimate(pd.concat(there, ignore_index=True), judge)
        work.log.info(found.describe())
        if refusal := in_flight.refusal(work.study.name, judge, found.usd, in_flight.paid(work.store.folder(work.study.name), judge.name)):
            raise OverBudget(f"{refusal}\n{found.describe()}")


def _journal(work: Work, judge: LanguageJudge, partition: str | None) -> Path:
    return work.store.path(work.context.asset_key, partition, in_flight.at_endpoint(judge.name, judge.base_url) + in_flight.ANSWERS)


def _ask(work: Work, judge: LanguageJudge, partition: str | None, requests: pd.DataFrame, rubrics: Mapping[str, Rubric]) -> dict[str, Any]:
    with (
        in_flight.alone(work.store.folder(work.study.name), judge),
        work.progress(len(requests), "answer", f"{work.me.name} by {judge.name}") as report,
    ):
        _refuse_judge(work, judge, {partition: requests})  # again, for another run may have spent what was left
        return rating.ask(requests, judge, rubrics, _journal(work, judge, partition), lambda answer: report())


def _score_figures(parts: Sequence[pd.DataFrame]) -> dict[str, Any]:
    frame = pd.concat(parts, ignore_index=True)
    means = frame.groupby("judge")["score"].mean().dropna().to_dict()
    return {**means, "not_scored": int(frame["score"].isna().sum()), "cost_usd": float(frame["cost_usd"].sum())}


# --- what the figures say ---------------------------------------------------------------------------------------------


def level_numbers(frame: pd.DataFrame, wanted: Prompting) -> np.ndarray:
    """The level of each row's dose."""
    return np.searchsorted(wanted.doses, frame["multiplier"].to_numpy(float)) + 1


def steered_scores(work: Work, wanted: Prompting) -> pd.DataFrame:
    """Scores of the steered model at the doses of the levels, in the columns that scores of levels share with them."""
    parts = [work.read_table("judge_scores", key) for key in work.upstream("judge_scores", work.partitions[0])]
    frame = pd.concat(parts, ignore_index=True)
    return frame.assign(author=STEERED, level=level_numbers(frame, wanted))[["author", "level", "multiplier", "item", "rubric", "judge", "score"]]


def all_scores(work: Work, wanted: Prompting) -> pd.DataFrame:
    """Scores of the steered model and of every author that is there."""
    ours = steered_scores(work, wanted)
    theirs = [work.read_table("level_scores", key)[list(ours.columns)] for key in work.upstream("level_scores", None)]
    return pd.concat([ours, *theirs], ignore_index=True)


def _analysed(stage: Stage, wanted: Prompting) -> None:
    partitions = stage.partitions
    doses = [multi_key(wanted.site, step_key(wanted.epoch, dose)) for dose in wanted.doses]
    scored = {"level_scores": None, "judge_scores": partitions.of(*doses)}

    @stage.asset(
        group=GROUP,
        version="1",
        description="How scores depend on dose and on the level asked for: score ~ (λ + λ²) x author with a random intercept an item, by REML.",
        deps=scored,
        settings=wanted.doses,
        schema=tables.LEVEL_SLOPES,
        kinds=("numpy",),
        seconds=3,
    )
    def level_slopes(work: Work) -> Iterator[dg.AssetMaterialization]:
        scores = all_scores(work, wanted)
        frame, _ = analysis.level_models(scores)
        for rubric, judge in sorted(
            set(zip(scores["rubric"], scores["judge"], strict=True)) - set(zip(frame["rubric"], frame["judge"], strict=True))
        ):
            work.log.warning(
                f"no slopes of {rubric} by {judge}: it has not rated both the steered model and an author, or all its scores are one number"
            )
        drawings = {f"plot_{rubric}": plot(figures.levels(analysis.level_means(scores, frame), rubric)) for rubric in frame["rubric"].unique()}
        yield work.table(None, frame, drawings)

    @stage.asset(
        group=GROUP,
        version="1",
        description="The mixed models behind level_slopes: variances, the share of the items in them, and the restricted log-likelihood.",
        deps=scored,
        settings=wanted.doses,
        schema=tables.LEVEL_MODELS,
        kinds=("numpy",),
        seconds=3,
    )
    def level_models(work: Work) -> Iterator[dg.AssetMaterialization]:
        yield work.table(None, analysis.level_models(all_scores(work, wanted))[1])

    @stage.asset(
        group=GROUP,
        version="1",
        description="Shares of the comparisons that each author wins against the steered model, at each level and over all.",
        deps={"level_pairs": None},
        settings=wanted.doses,
        schema=tables.HEAD_TO_HEAD,
        kinds=("numpy",),
    )
    def head_to_head(work: Work) -> Iterator[dg.AssetMaterialization]:
        pairs = pd.concat([work.read_table("level_pairs", key) for key in work.upstream("level_pairs", None)], ignore_index=True)
        frame = analysis.head_to_head(pairs, (len(wanted.doses) + 1) // 2)
        yield work.table(None, frame, {"plot": plot(figures.head_to_head(frame))} if len(frame) else None)

    @stage.asset(
        group=GROUP,
        version="1",
        description="How far an attack on the persona moves each author: score of the reply to it minus the mean of those before it.",
        deps={"attack_scores": None},
        schema=tables.ATTACK_SHIFTS,
        kinds=("numpy",),
    )
    def attack_shifts(work: Work) -> Iterator[dg.AssetMaterialization]:
        scores = pd.concat([work.read_table("attack_scores", key) for key in work.upstream("attack_scores", None)], ignore_index=True)
        frame = analysis.attack_shifts(scores)
        drawings = {"plot": plot(figures.attack_shifts(frame)), "plot_turns": plot(figures.turns(analysis.turn_means(scores)))}
        yield work.table(None, frame, drawings if len(frame) else None)
