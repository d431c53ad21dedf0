"""The prompting experiments as assets: levels asked for in words against doses, and persona attacks on both.

The steered model's side of experiment 1 is the sweep and its scores; nothing of it is generated twice. Where a server writes the steered replies, it
is that server's replies to the same prompts.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
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
from relseek_assets.judging.validity import SELF_PREFERENCE
from relseek_assets.partitions import multi_key, step_key
from relseek_assets.persona_attacks import FILE as PERSONA_ATTACKS
from relseek_assets.persona_attacks import Scenario, read_persona_attacks
from relseek_assets.prompting import analysis, attacks, authors, published_assets, rating, served, steerability, tables
from relseek_assets.prompting.levels import Level, examples_of, read_trait
from relseek_assets.prompting.tables import STEERED
from relseek_assets.settings import Author, LanguageJudge, Prompting
from relseek_assets.stage import VECTORS, Stage, Work, plot
from relseek_assets.study import Study, layer_of
from relseek_resources.judges import asking, coherence, embedded
from relseek_resources.models.sampling import Sampling
from relseek_resources.storage import file_sha256

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
        _preferred(stage, wanted)
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
    asked = {"behaviour_definition": None, "few_shots": None, "base_models": partitions.of(wanted.site)}
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
        settings=[*replies, study.prompts.model_dump(), wanted.doses, wanted.examples],
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
        settings=[*replies, wanted.model_dump(include={"doses", "examples", "attacked", "site", "epoch"}), *_server(wanted)],
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

    if wanted.steered_endpoint is not None:

        @stage.asset(
            group=GROUP,
            version="1",
            description="The steered model's replies to the held-out prompts at the dose of every level, from the server of steered_endpoint.",
            deps={vector: partitions.of(multi_key(wanted.site, step_key(wanted.epoch))), "preference_pairs": None, **asked},
            settings=[*replies, study.prompts.model_dump(), wanted.doses, wanted.site, wanted.epoch, *_server(wanted)],
            schema=tables.PROMPTED_GENERATIONS,
            seconds=60,
        )
        def steered_replies(work: Work) -> Iterator[dg.AssetMaterialization]:
            rows = steerability.level_rows(STEERED, asked_items(work), levels_of(wanted), system_prompts(study, wanted))
            with work.progress(len(rows), "reply", "steered replies") as report, ExitStack() as open_files:
                frame = steerability.written(rows, writer_of(work, wanted, STEERED, None, report, open_files))
            yield work.table(None, frame, _reply_figures(frame))


def _server(wanted: Prompting) -> list[Any]:
    """What of a server's declaration its replies depend on, if there is one."""
    return [] if wanted.steered_endpoint is None else [wanted.steered_endpoint.model_dump(include={"base_url", "model"})]


def writer_of(work: Work, wanted: Prompting, author: str, partition: str | None, report: Any, open_files: ExitStack) -> authors.Writer:
    """Who writes an author's replies; what an endpoint is paid for is kept beside the partition's table."""
    study, sampling = work.study, sampling_of(work.study)
    asset = "derived_vectors" if wanted.site in study.derived_sites else "steering_vectors"
    if author == STEERED and wanted.steered_endpoint is not None:
        endpoint, key = wanted.steered_endpoint, work.upstream(asset, partition)[0]
        name = endpoint.vector or f"{wanted.site}@{step_key(wanted.epoch)}"
        vector = served.ServedVector(name, file_sha256(work.store.path(work.key(asset), key, VECTORS)), layer_of(wanted.site))
        declared_as = served.author_of(endpoint)
        journal, paid = _journal_of_author(work, declared_as, partition, open_files)
        return served.ServedWriter(declared_as, sampling, journal, study.name, paid, report, vector=vector)
    declared = next((one for one in wanted.authors if one.name == author), None)
    if declared is not None and declared.kind == "openai":
        journal, paid = _journal_of_author(work, declared, partition, open_files)
        return authors.EndpointWriter(declared, sampling, journal, study.name, paid, report)
    model = work.resources.models.load(study.model_of(wanted.site), work.log)
    if author != STEERED:
        return authors.ModelWriter(model, sampling, study.sampling.batch_size, on_batch=report)
    tensor = work.read_tensors(asset, work.upstream(asset, partition)[0])[0]["vector"]
    return authors.ModelWriter(model, sampling, study.sampling.batch_size, tensor, layer_of(wanted.site), report)


def _journal_of_author(work: Work, author: Author, partition: str | None, open_files: ExitStack) -> tuple[asking.AnswerJournal, Callable[[], float]]:
    """The journal of an author's answers beside the partition's table, and what the author was paid for the study."""
    name, folder = in_flight.at_endpoint(author.name, author.base_url) + in_flight.ANSWERS, work.store.folder(work.study.name)
    journal = open_files.enter_context(asking.AnswerJournal(work.store.path(work.context.asset_key, partition, name)))
    return journal, lambda: in_flight.paid(folder, author.name)


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
    return [study.seed, study.prompts.system, [{**judge.model_dump(include=wording), **judge.unusual} for judge in study.prompting_judges]]


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
    judging = {"embedded_judge": None, "few_shots": None, **dict.fromkeys(("coherence_judge", "base_models"), partitions.of(wanted.site))}

    @stage.asset(
        group=GROUP,
        version="1",
        description="Scores of every prompted reply on the disposition and on coherence, by the embedded judges and by every language judge that is "
        "asked at once. Those of the steered model are in judge_scores.",
        partitions=partitions.author,
        deps={"prompted_generations": MINE, **judging, **rubric_sources},
        settings=_judge_settings(study),
        schema=tables.LEVEL_SCORES,
        kinds=("pytorch", "scikitlearn"),
        pool="gpu",
        seconds=20,
    )
    def level_scores(work: Work) -> Iterator[dg.AssetMaterialization]:
        yield from _scored(work, wanted, {name: work.read_table("prompted_generations", name) for name in work.partitions})

    if wanted.steered_endpoint is not None:

        @stage.asset(
            group=GROUP,
            version="1",
            description="Scores of every reply of the steering server, by those who score the prompted replies.",
            deps={"steered_replies": None, **judging, **rubric_sources},
            settings=_judge_settings(study),
            schema=tables.LEVEL_SCORES,
            kinds=("pytorch", "scikitlearn"),
            pool="gpu",
            seconds=20,
        )
        def steered_level_scores(work: Work) -> Iterator[dg.AssetMaterialization]:
            yield from _scored(work, wanted, {None: work.read_table("steered_replies")})

    @stage.asset(
        group=GROUP,
        version="1",
        description="Every prompted reply against the steered model's to the same prompt at the level's dose: which has more of the disposition.",
        partitions=partitions.author,
        deps={
            "prompted_generations": MINE,
            "level_scores": MINE,
            **steered_side(stage, wanted, "generations", "judge_scores"),
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
SERVED = {"generations": "steered_replies", "judge_scores": "steered_level_scores"}  # what stands for the sweep where a server writes


def steered_side(stage: Stage, wanted: Prompting, *names: str) -> dict[str, dg.PartitionMapping | None]:
    """The steered model's replies or scores at the doses of the levels, as inputs: the sweep's, or those of the server."""
    if wanted.steered_endpoint is not None:
        return {SERVED[name]: None for name in names}
    doses = [multi_key(wanted.site, step_key(wanted.epoch, dose)) for dose in wanted.doses]
    return {name: stage.partitions.of(*doses) for name in names}


def _scored(work: Work, wanted: Prompting, replies: Frames) -> Iterator[dg.AssetMaterialization]:
    """Tables of LEVEL_SCORES from tables of PROMPTED_GENERATIONS by partition."""
    study, keys = work.study, ["author", "level", "multiplier", "item"]
    judge, fluency = embedded_judge(work), coherence.CoherenceJudge.from_arrays(work.read_tensors("coherence_judge", wanted.site)[0])
    disposition = read_rubric(study.behaviour_folder / FILES["rating_rubric"]).name
    sense = read_rubric(study.behaviour_folder / FILES["coherence_rubric"]).name
    model = work.resources.models.load(study.model_of(wanted.site), work.log)
    conversations = {name: plain_conversations(study, frame["prompt"]) for name, frame in replies.items()}
    said = language_ratings(work, replies, {name: list(frame["item"]) for name, frame in replies.items()}, conversations, rubrics_of(study), keys)
    for name, frame in replies.items():
        texts = list(frame["reply"].fillna(""))
        with work.progress(len(frame), "reply", f"perplexity of {name or STEERED}") as report:
            perplexities = rating.perplexities(model, conversations[name], frame, report)
        parts = [
            rating.embedded_scores(frame, keys, embedded.NAME, judge.scores(texts)).assign(rubric=disposition),
            rating.embedded_scores(frame, keys, coherence.NAME, fluency.scores(texts, perplexities)).assign(rubric=sense),
        ]
        yield work.table(name, pd.concat([*parts, *said[name]], ignore_index=True), _score_figures([*parts, *said[name]]))


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
    if wanted.steered_endpoint is not None:
        written = work.read_table("steered_replies")
    else:
        written = pd.concat([work.read_table("generations", key) for key in work.upstream("generations", next(iter(replies)))])
    steered = written.assign(level=level_numbers(written, wanted))[["level", "item", "prompt", "reply"]]
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


def _refuse_judge(work: Work, judge: LanguageJudge, asked: Mapping[str | None, pd.DataFrame]) -> float:
    """Refuse a judge whose new requests, and all that it was paid for this study, are above its budget; what the budget leaves beside them."""
    new = [
        frame[~frame["custom_id"].isin(list(in_flight.answered([_journal(work, judge, partition)], judge.attempts)))]
        for partition, frame in asked.items()
    ]
    there = [frame for frame in new if len(frame)]
    if not there:
        return 0.0
    found, paid = estimate(pd.concat(there, ignore_index=True), judge), in_flight.paid(work.store.folder(work.study.name), judge.name)
    work.log.info(found.describe())
    if refusal := in_flight.refusal(work.study.name, judge, found.usd, paid):
        raise OverBudget(f"{refusal}\n{found.describe()}")
    return judge.budget_usd - paid - found.usd


def _journal(work: Work, judge: LanguageJudge, partition: str | None) -> Path:
    return work.store.path(work.context.asset_key, partition, in_flight.at_endpoint(judge.name, judge.base_url) + in_flight.ANSWERS)


def _ask(work: Work, judge: LanguageJudge, partition: str | None, requests: pd.DataFrame, rubrics: Mapping[str, Rubric]) -> dict[str, Any]:
    with (
        in_flight.alone(work.store.folder(work.study.name), judge),
        work.progress(len(requests), "answer", f"{work.me.name} by {judge.name}") as report,
    ):
        spare = _refuse_judge(work, judge, {partition: requests})  # again, for another run may have spent what was left
        return rating.ask(requests, judge, rubrics, _journal(work, judge, partition), spare, lambda answer: report())


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
    if wanted.steered_endpoint is not None:
        frame = work.read_table("steered_level_scores")
    else:
        frame = pd.concat([work.read_table("judge_scores", key) for key in work.upstream("judge_scores", work.partitions[0])], ignore_index=True)
    return frame.assign(author=STEERED, level=level_numbers(frame, wanted))[["author", "level", "multiplier", "item", "rubric", "judge", "score"]]


def all_scores(work: Work, wanted: Prompting) -> pd.DataFrame:
    """Scores of the steered model and of every author that is there."""
    ours = steered_scores(work, wanted)
    theirs = [work.read_table("level_scores", key)[list(ours.columns)] for key in work.upstream("level_scores", None)]
    return pd.concat([ours, *theirs], ignore_index=True)


def all_pairs(work: Work) -> pd.DataFrame:
    """Comparisons of every author that is there with the steered model."""
    return pd.concat([work.read_table("level_pairs", key) for key in work.upstream("level_pairs", None)], ignore_index=True)


def _estimates(frame: pd.DataFrame) -> dict[str, Any]:
    """Each judge's measures that could be had, for the asset's page."""
    there = frame[frame["estimate"].notna()]
    return {f"{row.judge} {row.measure}": float(row.estimate) for row in there.itertuples()}


def _preferred(stage: Stage, wanted: Prompting) -> None:
    study = stage.study
    judges = {judge.name: judge.family for judge in study.prompting_judges if judge.family}

    @stage.asset(
        group=GROUP,
        version="1",
        description="Whether a judge prefers replies of its own family: the share that it gives them, that beyond what other language judges give "
        "them on the same comparisons, and its log-odds for them where the embedded judge rates both replies alike.",
        deps={"level_pairs": None, "level_scores": None, **steered_side(stage, wanted, "judge_scores"), "rating_rubric": None},
        settings=[wanted.doses, judges, wanted.families],
        schema=SELF_PREFERENCE,
        kinds=("numpy",),
    )
    def self_preference(work: Work) -> Iterator[dg.AssetMaterialization]:
        scores = all_scores(work, wanted)
        disposition = read_rubric(study.behaviour_folder / FILES["rating_rubric"]).name
        quality = scores[(scores["rubric"] == disposition) & (scores["judge"] == embedded.NAME)]
        pairs = all_pairs(work)  # the embedded judge makes no errors of choice to compare shares with; it is the quality
        frame = analysis.self_preference(pairs[pairs["judge"] != embedded.NAME], quality, judges, wanted.families)
        if len(frame):
            yield work.table(None, frame, _estimates(frame))
        else:
            yield work.nothing(
                None, "no judge that compares shares a family with an author: name families in [[judges]], [[prompting.authors]] and [prompting]"
            )


def _analysed(stage: Stage, wanted: Prompting) -> None:
    scored = {"level_scores": None, **steered_side(stage, wanted, "judge_scores")}

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
            work.warn(f"no slopes of {rubric} by {judge}: it has not rated both the steered model and an author, or all its scores are one number")
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
        frame = analysis.head_to_head(all_pairs(work), (len(wanted.doses) + 1) // 2)
        yield work.table(None, frame, {"plot": plot(figures.head_to_head(frame))} if len(frame) else None)

    @stage.asset(
        group=GROUP,
        version="1",
        description="What a judge's choice between a steered and a prompted reply owes to the order shown, given authors and level.",
        deps={"level_pairs": None},
        schema=tables.LEVEL_BIASES,
        kinds=("numpy",),
    )
    def level_biases(work: Work) -> Iterator[dg.AssetMaterialization]:
        frame = analysis.level_biases(all_pairs(work))
        yield work.table(None, frame, _estimates(frame))

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
