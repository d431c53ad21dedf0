"""Rankings, agreement and validity as assets: what judges' answers are worth, gathered by stages from doses to the study.

They read `judge_scores`, `judge_pairs` and `generations` of whatever stage the study has them from, judged here or published.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import dagster as dg
import pandas as pd

from relseek_assets import judging_figures as figures
from relseek_assets.judging import agreement, rankings, validity
from relseek_assets.stage import Stage, Work, plot

GROUP = "judging"


def build(stage: Stage) -> None:
    """Add what can be made of the judgements that the study has; nothing where it has none."""
    if "judge_pairs" in stage.catalogue:
        _rankings(stage)
    if "judge_scores" in stage.catalogue:
        _agreement(stage)
        _validity(stage)


def _of_doses(work: Work, asset: str, partition: str | None) -> pd.DataFrame | None:
    """Rows of every dose that is there; None where there are none, of a published vector that the release lacks, say."""
    parts = [part for key in work.upstream(asset, partition) if len(part := work.read_table(asset, key))]
    return pd.concat(parts, ignore_index=True) if parts else None


def _rankings(stage: Stage) -> None:
    study, partitions = stage.study, stage.partitions
    bootstrap = [study.judge.bootstrap, study.seed]

    @stage.asset(
        group=GROUP,
        version="1",
        description="Bradley-Terry strength, win rate and Elo of every dose by every judge, with intervals over items and Elo's range over shuffles.",
        partitions=partitions.site_by_evaluated_epoch,
        deps={"judge_pairs": dg.IdentityPartitionMapping()},
        settings=bootstrap,
        schema=rankings.PAIR_STRENGTHS,
        seconds=1.5,
    )
    def pair_strengths(work: Work) -> Iterator[dg.AssetMaterialization]:
        for partition in work.partitions:
            pairs = _of_doses(work, "judge_pairs", partition)
            frame = None if pairs is None else rankings.pair_strengths(pairs, study.judge.bootstrap, study.seed)
            if frame is None or frame.empty:
                yield work.nothing(partition, "no pair was answered")
            else:
                shown = {"plot": plot(figures.pair_strengths(frame)), "plot_elo": plot(figures.elo_order(frame))}
                yield work.table(partition, frame, shown)

    @stage.asset(
        group=GROUP,
        version="1",
        description="Slope of win rate and of Bradley-Terry strength over the selection doses, by every judge.",
        partitions=partitions.site_by_evaluated_epoch,
        deps={"judge_pairs": dg.IdentityPartitionMapping()},
        settings=[*bootstrap, study.selection_doses],
        schema=rankings.PAIR_SLOPES,
    )
    def pair_slopes(work: Work) -> Iterator[dg.AssetMaterialization]:
        for partition in work.partitions:
            pairs = _of_doses(work, "judge_pairs", partition)
            if pairs is None:
                yield work.nothing(partition, "no pairs")
            else:
                frame = rankings.pair_slopes(pairs, study.selection_doses, study.judge.bootstrap, study.seed)
                yield work.table(partition, frame, _figures(frame, "measure"))


def _agreement(stage: Stage) -> None:
    study, partitions = stage.study, stage.partitions
    bootstrap = [study.judge.bootstrap, study.seed]

    @stage.asset(
        group=GROUP,
        version="1",
        description="Agreement of every two judges of the same replies, and of a judge with itself at two dates, by rubric.",
        partitions=partitions.site_by_evaluated_epoch,
        deps={"judge_scores": partitions.of_my_doses()},
        settings=bootstrap,
        schema=agreement.JUDGE_AGREEMENT,
    )
    def judge_agreement(work: Work) -> Iterator[dg.AssetMaterialization]:
        for partition in work.partitions:
            scores = _of_doses(work, "judge_scores", partition)
            frame = None if scores is None else agreement.judge_agreement(scores, study.judge.bootstrap, study.seed)
            if frame is None or frame.empty:
                yield work.nothing(partition, "one judge a rubric: nothing to compare")
            else:
                yield work.table(partition, frame, {"plot": plot(figures.judge_agreement(frame))})

    @stage.asset(
        group=GROUP,
        version="1",
        description="Sums of scores by item for every two judges: what agreement over several vectors is added up from.",
        partitions=partitions.site_by_evaluated_epoch,
        deps={"judge_scores": partitions.of_my_doses()},
        schema=agreement.AGREEMENT_SUMS,
    )
    def agreement_sums(work: Work) -> Iterator[dg.AssetMaterialization]:
        for partition in work.partitions:
            scores = _of_doses(work, "judge_scores", partition)
            yield work.table(partition, agreement.pooled([]) if scores is None else agreement.agreement_sums(scores))

    @stage.asset(
        group=GROUP,
        version="1",
        description="The same sums over the epochs of a site.",
        partitions=partitions.swept_site,
        deps={"agreement_sums": partitions.of_my_site()},
        schema=agreement.AGREEMENT_SUMS,
    )
    def site_agreement_sums(work: Work) -> Iterator[dg.AssetMaterialization]:
        for site in work.partitions:
            yield work.table(site, agreement.pooled([work.read_table("agreement_sums", key) for key in work.upstream("agreement_sums", site)]))

    @stage.asset(
        group=GROUP,
        version="1",
        description="Agreement of every two judges over all vectors of the study.",
        deps={"site_agreement_sums": dg.AllPartitionMapping()},
        settings=bootstrap,
        schema=agreement.STUDY_AGREEMENT,
    )
    def study_agreement(work: Work) -> Iterator[dg.AssetMaterialization]:
        sums = agreement.pooled([work.read_table("site_agreement_sums", site) for site in work.upstream("site_agreement_sums", None)])
        if sums.empty:
            yield work.nothing(None, "one judge a rubric: nothing to compare")
        else:
            frame = agreement.study_agreement(sums, study.judge.bootstrap, study.seed)
            yield work.table(None, frame, {"plot": plot(figures.judge_agreement(frame))})


def _validity(stage: Stage) -> None:
    study, partitions = stage.study, stage.partitions
    beside = {
        name: mapping
        for name, mapping in (("judge_pairs", dg.IdentityPartitionMapping()), ("generations", partitions.of_my_doses()))
        if name in stage.catalogue
    }

    @stage.asset(
        group=GROUP,
        version="1",
        description="What a judge's answers owe to the order in which replies were shown and to their length, given the doses.",
        partitions=partitions.site_by_evaluated_epoch,
        deps={"judge_scores": partitions.of_my_doses(), **beside},
        optional=list(beside),
        settings=[study.judge.reference],
        schema=validity.JUDGE_BIASES,
    )
    def judge_biases(work: Work) -> Iterator[dg.AssetMaterialization]:
        for partition in work.partitions:
            scores = _of_doses(work, "judge_scores", partition)
            if scores is None:
                yield work.nothing(partition, "no scores")
                continue
            pairs, replies = (_of_doses(work, name, partition) if name in beside else None for name in ("judge_pairs", "generations"))
            lengths = None if replies is None else validity.words_of(replies)
            frame = validity.judge_biases(scores, pairs, lengths, study.judge.reference)
            yield work.table(partition, frame, {"plot": plot(figures.judge_biases(frame))} if frame["estimate"].notna().any() else {})

    @stage.asset(
        group=GROUP,
        version="1",
        description="The dose-response of every judge corrected by the reference's scores, beside the judge's own and the reference's own; how much "
        "of the slope is the judge.",
        partitions=partitions.site_by_evaluated_epoch,
        deps={"judge_scores": partitions.of_my_doses()},
        settings=[study.judge.reference, study.selection_doses],
        schema=validity.CORRECTED_DOSE_RESPONSE,
    )
    def corrected_dose_response(work: Work) -> Iterator[dg.AssetMaterialization]:
        for partition in work.partitions:
            scores = _of_doses(work, "judge_scores", partition)
            frame = None if scores is None else validity.corrected_dose_response(scores, study.judge.reference, study.selection_doses)
            if frame is None or frame.empty:
                yield work.nothing(partition, "no scores of a judge other than the reference")
                continue
            corrected = frame[(frame["quantity"] == "mean") & (frame["estimator"] == "ppi++") & frame["estimate"].notna()]
            shown: dict[str, Any] = {
                f"plot_{rubric}_{judge}": plot(figures.corrected_dose_response(frame, rubric, judge))
                for rubric, judge in corrected[["rubric", "judge"]].drop_duplicates().itertuples(index=False)
            }
            yield work.table(partition, frame, {**shown, "statuses": ", ".join(sorted(frame["status"].unique()))})


def _figures(frame: pd.DataFrame, name: str) -> dict[str, float]:
    """Estimates that exist, as figures of a partition."""
    there = frame[frame["estimate"].notna()]
    return {f"{row['judge']} {row[name]}": float(row["estimate"]) for row in there.to_dict("records")}
