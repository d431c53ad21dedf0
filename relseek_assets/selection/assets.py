"""Dose-response and selection as assets, gathered by stages: doses to an epoch, epochs to a site, sites to the study."""

from __future__ import annotations

from collections.abc import Iterator

import dagster as dg
import pandas as pd

from relseek_assets import figures
from relseek_assets.judging.one_judge import of_one_judge
from relseek_assets.selection import metrics
from relseek_assets.settings import EMBEDDED
from relseek_assets.stage import Stage, Work, plot

GROUP = "selection"


def build(stage: Stage) -> None:
    study, partitions = stage.study, stage.partitions
    bootstrap = [study.judge.bootstrap, study.seed]

    @stage.asset(
        group=GROUP,
        version="1",
        description="Mean judge score by dose, with bootstrap intervals over prompts.",
        partitions=partitions.site_by_evaluated_epoch,
        deps={"judge_scores": partitions.of_my_doses()},
        settings=bootstrap,
        schema=metrics.DOSE_RESPONSE,
    )
    def dose_response(work: Work) -> Iterator[dg.AssetMaterialization]:
        for partition in work.partitions:
            scores = doses_of(work, "judge_scores", partition)
            if scores is None:
                continue  # started from the UI for a vector without scores
            frame = metrics.dose_response(scores, study.judge.bootstrap, study.seed)
            plots = {f"plot_{rubric}": plot(figures.dose_response(frame, rubric)) for rubric in sorted(frame["rubric"].unique())}
            yield work.table(partition, frame, plots)

    if "published_metrics" in stage.catalogue:

        @stage.asset(
            group=GROUP,
            version="1",
            description="Mean perplexity (as log10) and propensity of published replies by dose, with bootstrap intervals over prompts.",
            partitions=partitions.site_by_evaluated_epoch,
            deps={"published_metrics": partitions.of_my_doses()},
            settings=bootstrap,
            schema=metrics.METRIC_DOSE_RESPONSE,
        )
        def metric_dose_response(work: Work) -> Iterator[dg.AssetMaterialization]:
            for partition in work.partitions:
                rows = doses_of(work, "published_metrics", partition)
                if rows is not None:  # it is None where a vector without replies was started from the UI
                    frame = metrics.metric_dose_response(rows, study.judge.bootstrap, study.seed)
                    yield work.table(partition, frame, {"plot": plot(figures.metric_dose_response(frame))})

    @stage.asset(
        group=GROUP,
        version="2",
        description="What selection needs of a candidate vector: coherence, rating and pairs won, by item and dose.",
        partitions=partitions.site_by_evaluated_epoch,
        deps={"judge_scores": partitions.of_my_doses(), "judge_pairs": dg.IdentityPartitionMapping()},
        settings=[study.selection_doses, *([] if study.judge.name == EMBEDDED else [study.judge.name])],
        schema=metrics.CANDIDATE_ITEMS,
        optional=("judge_pairs",) if study.published.scores else (),
    )
    def candidate_items(work: Work) -> Iterator[dg.AssetMaterialization]:
        for partition in work.partitions:
            scores = doses_of(work, "judge_scores", partition)
            if scores is None:
                continue  # started from the UI for a vector without scores
            scores = scores[scores["judge"].map(study.selects_by)]
            rating = next((rubric for rubric in scores["rubric"].unique() if rubric != "coherence"), None)
            if rating is None or "coherence" not in set(scores["rubric"]):
                yield work.nothing(partition, f"no candidate: {study.judge.name} has not rated both the disposition and coherence")
                continue
            scores, fault = of_one_judge(scores)
            if fault:
                yield work.nothing(partition, f"no candidate: {fault}")
                continue
            pairs = [work.read_table("judge_pairs", key) for key in work.upstream("judge_pairs", partition)]
            compared = pairs[0][pairs[0]["judge"].map(study.selects_by)] if pairs else None
            if compared is not None and compared["judge"].nunique() > 1:
                compared = compared[compared["judge"].isin(scores.loc[scores["rubric"] == rating, "judge"])]
            yield work.table(partition, metrics.candidate_items(scores, compared, study.selection_doses, rating))

    @stage.asset(
        group=GROUP,
        version="1",
        description="The candidates of a site, every evaluated epoch.",
        partitions=partitions.swept_site,
        deps={"candidate_items": partitions.of_my_site()},
        schema=metrics.CANDIDATE_ITEMS,
    )
    def site_candidates(work: Work) -> Iterator[dg.AssetMaterialization]:
        for site in work.partitions:
            parts = [work.read_table("candidate_items", key) for key in work.upstream("candidate_items", site)]
            if parts:  # none where a site without scores was started from the UI
                yield work.table(site, pd.concat(parts))

    @stage.asset(
        group=GROUP,
        version="1",
        description="Coherence AUC, rating and pairwise slope of every candidate, their combination, the Pareto set and the one selected.",
        deps={"site_candidates": dg.AllPartitionMapping()},
        settings=bootstrap,
        schema=metrics.SELECTION,
    )
    def selection(work: Work) -> Iterator[dg.AssetMaterialization]:
        frame = metrics.selection(metrics.candidates_of(study_items(work), study.judge.bootstrap, study.seed))
        chosen = frame[frame["selected"]]
        name = f"{chosen['site'].iloc[0]} epoch {chosen['epoch'].iloc[0]}" if len(chosen) else "none"
        yield work.table(None, frame, {"selected": name, "plot": plot(figures.pareto(frame))})

    @stage.asset(
        group=GROUP,
        version="1",
        description="Who would be selected at other weights on coherence, and how surely.",
        deps={"site_candidates": dg.AllPartitionMapping()},
        settings=bootstrap,
        schema=metrics.SELECTION_SENSITIVITY,
    )
    def selection_sensitivity(work: Work) -> Iterator[dg.AssetMaterialization]:
        frame = metrics.sensitivity(metrics.candidates_of(study_items(work), study.judge.bootstrap, study.seed))
        yield work.table(None, frame, {"plot": plot(figures.weight_sensitivity(frame))})


def doses_of(work: Work, asset: str, partition: str | None) -> pd.DataFrame | None:
    """The rows of a vector at all of its doses, None where there are none."""
    parts = [work.read_table(asset, key) for key in work.upstream(asset, partition)]
    return pd.concat(parts) if parts else None


def study_items(work: Work) -> pd.DataFrame:
    """The candidates of all sites; no rows where no vector has been rated."""
    parts = [work.read_table("site_candidates", site) for site in work.upstream("site_candidates", None)]
    return pd.concat(parts) if parts else pd.DataFrame(columns=list(metrics.CANDIDATE_ITEMS.names))
