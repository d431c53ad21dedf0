"""The judges as assets: what they were fitted on, how good they are, and what they say of the replies."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import Any

import dagster as dg
import numpy as np
import pandas as pd
from scipy.special import expit

from relseek_assets import figures
from relseek_assets.behaviour import FILES, read_graded_replies, read_rubric, read_rubrics, rubric_files
from relseek_assets.dataset.pairs import training_pairs
from relseek_assets.judging import in_flight, language_assets, tables
from relseek_assets.judging.requests import QUESTION
from relseek_assets.partitions import cell_of
from relseek_assets.settings import EMBEDDED
from relseek_assets.stage import VECTORS, Stage, Work, plot
from relseek_resources.judges import coherence, embedded, embedding
from relseek_resources.release import Absent, Release, ScoredReply

GROUP = "judging"
COHERENCE_TEXTS = 24


def load_judge(work: Work) -> embedded.EmbeddedJudge:
    arrays, header = work.read_tensors("embedded_judge")
    return embedded.EmbeddedJudge.from_arrays(arrays, json.loads(header["vocabulary"]))


def distinct(pairs: pd.DataFrame, split: str) -> pd.DataFrame:
    """Pairs of one split, each reply pair once: histories repeat the same replies."""
    return pairs[pairs["split"] == split].drop_duplicates(["chosen", "rejected"])


def build(stage: Stage) -> None:
    study, partitions = stage.study, stage.partitions
    folder = study.behaviour_folder
    # a study without language judges has the graph and the versions that it always had
    asked_by_dose: dict[str, dg.PartitionMapping | None] = {}
    compared: dict[str, dg.PartitionMapping | None] = {}
    if study.judges:
        language_assets.build(stage)
        asked_by_dose = {"rating_requests": dg.IdentityPartitionMapping(), "judge_answers": partitions.of_my_swept_epoch()}
        asked_by_dose |= dict.fromkeys(name for name in rubric_files(folder) if name not in FILES)
    if "pairwise_requests" in stage.catalogue:
        compared = {"pairwise_requests": dg.IdentityPartitionMapping(), "judge_answers": dg.IdentityPartitionMapping()}

    @stage.asset(
        group=GROUP,
        version="1",
        description="The embedded judge: a regression on sentence embeddings and word counts, fitted on the training pairs and calibrated to 1-10 "
        "on the graded replies. It is no language model.",
        deps={"preference_pairs": None, "few_shots": None},
        form=VECTORS,
        kinds=("scikitlearn",),
        seconds=20,
    )
    def embedded_judge(work: Work) -> Iterator[dg.AssetMaterialization]:
        pairs = distinct(work.read_table("preference_pairs"), "train")
        graded = read_graded_replies(folder / FILES["few_shots"])
        with work.progress(2 * len(pairs) + len(graded), "text", "embedding") as report:
            fit = embedded.fit(
                list(pairs["chosen"]),
                list(pairs["rejected"]),
                list(pairs["conversation"]),
                [row.reply for row in graded],
                [row.score for row in graded],
                report,
            )
        header = {
            "judge": embedded.NAME,
            "vocabulary": json.dumps(fit.judge.features.vocabulary),
            "pair_accuracy": repr(fit.pair_accuracy),
            "log_loss": repr(fit.log_loss),
            "penalty": repr(fit.penalty),
            "pairs": str(len(pairs)),
        }
        arrays = {**fit.judge.arrays(), "cross_validated": fit.projections}
        yield work.tensors(
            None,
            arrays,
            header,
            {"pair_accuracy": fit.pair_accuracy, "log_loss": fit.log_loss, "pairs": len(pairs), "words": len(fit.judge.features.vocabulary)},
        )

    @stage.asset(
        group=GROUP,
        version="2",
        description="The embedded coherence score of a site's model: perplexity under it without steering and repetition, calibrated on damaged "
        "text. Sites of one model have the same.",
        partitions=partitions.swept_site,
        deps={"preference_pairs": None, "base_models": dg.IdentityPartitionMapping()},
        settings=[study.seed, study.sampling.max_new_tokens, study.prompts.system],
        form=VECTORS,
        kinds=("pytorch", "scikitlearn"),
        pool="gpu",
        seconds=25,
    )
    def coherence_judge(work: Work) -> Iterator[dg.AssetMaterialization]:
        pairs = training_pairs(work.read_table("preference_pairs"), study.seed)
        chosen = pairs[pairs["turn"] == 1].head(COHERENCE_TEXTS)
        sides = ["chosen" if number % 2 else "rejected" for number in range(len(chosen))]
        system = {"role": "system", "content": study.prompts.system}
        for settings in study.models:
            sites = [site for site in work.partitions if site and study.model_of(site) == settings]
            if not sites:
                continue
            model = work.resources.models.load(settings, work.log)
            texts = [model.cut(row[side], study.sampling.max_new_tokens) for side, (_, row) in zip(sides, chosen.iterrows(), strict=True)]
            damaged = coherence.damage(texts, study.seed)
            prompts = [model.prompt_tokens([system, *prompt]) for prompt in chosen["prompt"]]
            with work.progress(len(damaged), "text", f"coherence calibration of {settings.name}") as report:
                scores = model.score_tokens(
                    [prompts[item.source] for item in damaged], [model.reply_tokens(item.text, end=False) for item in damaged], on_batch=report
                )
            perplexities = np.exp([-score.mean for score in scores])
            judge = coherence.fit(damaged, perplexities)
            given = judge.scores([item.text for item in damaged], perplexities)
            frame = pd.DataFrame({"kind": [item.kind for item in damaged], "truth": [1 + 9 * item.coherence for item in damaged], "given": given})
            summary = frame.groupby(["kind", "truth"])["given"].agg(mean="mean", sd="std", n="count").reset_index().assign(model=settings.name)
            header = {"judge": coherence.NAME, "model": settings.source, "calibration": summary.to_json(orient="records")}
            shown = {"texts": len(damaged), **{f"mean_{row.kind}": row.mean for row in summary.itertuples()}}
            for site in sites:
                yield work.tensors(site, judge.arrays(), header, shown)

    @stage.asset(
        group=GROUP,
        version="2",
        description="Scores that the coherence judge gives to the texts that it was calibrated on.",
        deps={"coherence_judge": dg.AllPartitionMapping()},
        schema=tables.COHERENCE_CALIBRATION,
    )
    def coherence_calibration(work: Work) -> Iterator[dg.AssetMaterialization]:
        sites = {study.model_of(str(site)).name: site for site in work.upstream("coherence_judge", None)}
        parts = [pd.DataFrame(json.loads(work.read_tensors("coherence_judge", site)[1]["calibration"])) for site in sites.values()]
        yield work.table(None, pd.concat(parts))

    @stage.asset(
        group=GROUP,
        version="2",
        description="Observed against predicted share of target replies, cross-validated with whole conversations held out.",
        deps={"embedded_judge": None, "preference_pairs": None},
        schema=tables.JUDGE_CALIBRATION,
    )
    def judge_calibration(work: Work) -> Iterator[dg.AssetMaterialization]:
        projections = work.read_tensors("embedded_judge")[0]["cross_validated"]
        labels = np.repeat([1.0, 0.0], len(projections) // 2)
        owners = list(distinct(work.read_table("preference_pairs"), "train")["conversation"])
        frame = tables.calibration_curve(expit(projections.astype(float)), labels, [*owners, *owners])
        yield work.table(None, frame, {"plot": plot(figures.judge_calibration(frame))})

    @stage.asset(
        group=GROUP,
        version="2",
        description="How good the embedded judge is: pair accuracy and AUC on held-out conversations, agreement with the graded replies, and rank "
        "correlation with published judges where the release is there, beside the same judge fitted on the published test pairs.",
        deps={"embedded_judge": None, "preference_pairs": None, "few_shots": None, "published_judgements": None},
        schema=tables.JUDGE_QUALITY,
        seconds=15,
    )
    def judge_quality(work: Work) -> Iterator[dg.AssetMaterialization]:
        judge = load_judge(work)
        heldout = distinct(work.read_table("preference_pairs"), "heldout")
        target, antitarget = judge.projections(list(heldout["chosen"])), judge.projections(list(heldout["rejected"]))
        mine = f"{embedded.NAME} on training pairs"
        owners = list(heldout["conversation"])
        area, (low, high) = tables.auc(target, antitarget), bootstrap_auc(target, antitarget, owners, study.seed)
        rows = [
            tables.proportion(mine, "pair_accuracy", "held-out pairs", target > antitarget, owners),
            tables.quality(mine, "auc", "held-out replies", area, low, high, 2 * len(heldout), tables.measured_over(owners)),
        ]
        graded = read_graded_replies(folder / FILES["few_shots"])
        judged = judge.scores([row.reply for row in graded])
        rho = tables.rank_correlation(judged, [row.score for row in graded])
        rows.append(tables.quality(mine, "spearman", "graded replies (calibration set)", *rho, len(graded)))
        release = Release.from_environment()
        published = {
            "GPT-4.1-mini, re-scored steered replies": release.rescored_generations,
            "GPT-4o, prompted replies of experiment 1": release.prompted_generations,
        }
        judges = {mine: judge}
        try:
            replies = release.test_replies()
            conversations, chosen, rejected = (list(column) for column in zip(*replies, strict=True))
            judges[f"{embedded.NAME} on published test pairs (never saved)"] = embedded.fit(chosen, rejected, conversations).judge
        except Absent as absent:
            work.log.info(str(absent))
        for against, read in published.items():
            scored: list[ScoredReply] | None = None
            status = ""
            try:
                scored = read()
            except Absent as absent:
                status = str(absent)
            texts = [row.text for row in scored or []]
            with work.progress(len(texts), "text", "published replies") as report:
                embeddings = embedding.embed(texts, on_batch=report)
            for name, candidate in judges.items():
                if scored is None:
                    rows.append(tables.quality(name, "spearman", against, None, None, None, 0, status))
                else:
                    rho = tables.rank_correlation(candidate.scores(texts, embeddings), [row.score for row in scored])
                    rows.append(tables.quality(name, "spearman", against, *rho, len(scored)))
        drawn = pd.DataFrame({"author": [row.score for row in graded], "judged": judged})
        yield work.table(None, tables.quality_table(rows), {"plot": plot(figures.graded_replies(drawn))})

    @stage.asset(
        group=GROUP,
        version="1",
        description="Score of every reply on the disposition and on coherence, with the rubric's band.",
        partitions=partitions.site_by_dose,
        deps={
            "generations": dg.IdentityPartitionMapping(),
            "generation_metrics": dg.IdentityPartitionMapping(),
            "embedded_judge": None,
            "coherence_judge": partitions.of_my_site(),
            "rating_rubric": None,
            "coherence_rubric": None,
            **asked_by_dose,
        },
        settings=[EMBEDDED],
        schema=tables.LANGUAGE_SCORES if study.judges else tables.JUDGE_SCORES,
        kinds=("scikitlearn",),
        seconds=0.5,
    )
    def judge_scores(work: Work) -> Iterator[dg.AssetMaterialization]:
        judge = load_judge(work)
        rating, sense = read_rubric(folder / FILES["rating_rubric"]), read_rubric(folder / FILES["coherence_rubric"])
        rubrics, answered = (read_rubrics(folder).values() if study.judges else ()), language_assets.Answered(work)
        with work.progress(len(work.partitions), "partition", "judging") as report:
            for partition in work.partitions:
                replies = work.read_table("generations", partition)
                metrics = work.read_table("generation_metrics", partition).set_index("item").loc[replies["item"]]
                fluency = coherence.CoherenceJudge.from_arrays(work.read_tensors("coherence_judge", cell_of(partition).site)[0])
                texts = list(replies["reply"])
                perplexities = metrics["perplexity"].fillna(math.inf).to_numpy()
                frame = pd.concat(
                    [
                        tables.score_rows(replies, rating, embedded.NAME, judge.scores(texts)),
                        tables.score_rows(replies, sense, coherence.NAME, fluency.scores(texts, perplexities)),
                    ]
                )
                if study.judges:
                    requests = work.read_table("rating_requests", partition, without=QUESTION)
                    answers = answered.to(requests, partition)
                    if answers is None:
                        continue
                    frame = tables.with_language(frame, tables.language_scores(replies, requests, answers, rubrics), tables.LANGUAGE_SCORES)
                yield work.table(partition, frame, shown_of(frame, plotted=bool(study.judges)))
                report()

    @stage.asset(
        group=GROUP,
        version="1",
        description="Every pair of doses of every item: which reply shows more of the disposition, by the judge's unrounded scores.",
        partitions=partitions.site_by_evaluated_epoch,
        deps={"judge_scores": partitions.of_my_doses(), "pairwise_definition": None, **compared},
        settings=[study.paired_doses],
        schema=tables.LANGUAGE_PAIRS if compared else tables.JUDGE_PAIRS,
    )
    def judge_pairs(work: Work) -> Iterator[dg.AssetMaterialization]:
        rubric = read_rubric(folder / FILES["rating_rubric"]).name
        language = [judge.name for judge in study.judges]
        answered = language_assets.Answered(work)
        for partition in work.partitions:
            scores = pd.concat([work.read_table("judge_scores", key) for key in work.upstream("judge_scores", partition)])
            frame = tables.pair_rows(scores[(scores["rubric"] == rubric) & ~scores["judge"].isin(language)], study.paired_doses)
            if compared:
                requests = work.read_table("pairwise_requests", partition, without=QUESTION)
                answers = answered.to(requests, partition)
                if answers is None:
                    continue
                frame = tables.with_language(frame, tables.language_pairs(requests, answers), tables.LANGUAGE_PAIRS)
            yield work.table(partition, frame, {"ties": int((frame["status"] == "tie").sum()), **(in_flight.statuses(frame) if compared else {})})


def shown_of(frame: pd.DataFrame, plotted: bool) -> dict[str, Any]:
    """Figures of a partition of scores for its page: means, by judge where there are several of a rubric, what has no score, and dollars."""
    by = ["rubric", "judge"] if plotted else ["rubric"]
    means = {" by ".join(names if isinstance(names, tuple) else (names,)): value for names, value in frame.groupby(by)["score"].mean().items()}
    shown = {**means, "unscored": int(frame["score"].isna().sum()), "cost_usd": float(frame["cost_usd"].sum())}
    return {**shown, **in_flight.statuses(frame), "plot": plot(figures.judge_scores(tables.score_shares(frame)))} if plotted else shown


def bootstrap_auc(target: np.ndarray, antitarget: np.ndarray, conversations: list[str], seed: int, draws: int = 1000) -> tuple[float, float]:
    """95% interval of the AUC, resampling whole conversations."""
    owners = np.array(conversations)
    places = {name: np.flatnonzero(owners == name) for name in dict.fromkeys(conversations)}
    names = list(places)
    generator = np.random.Generator(np.random.PCG64(seed))
    found = []
    for _ in range(draws):
        rows = np.concatenate([places[names[place]] for place in generator.integers(len(names), size=len(names))])
        found.append(tables.auc(target[rows], antitarget[rows]))
    low, high = np.percentile(found, [2.5, 97.5])
    return float(low), float(high)
