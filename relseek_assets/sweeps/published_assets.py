"""Published replies as assets, where a study takes them instead of sweeping (`published.scores`).

Here belongs only the way from the release to tables that the stages behind read; nothing is generated and no model is loaded.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import dagster as dg
import pandas as pd

from relseek_assets.partitions import cell_of
from relseek_assets.stage import Stage, Work
from relseek_assets.sweeps import published
from relseek_assets.sweeps.tables import GENERATIONS
from relseek_resources.release import TEST_PAIRS, Absent, Release, read_replies

GROUP = "sweeps"


def replies_of(work: Work, path: Path, site: str, epoch: int, wanted: Sequence[str | None]) -> Iterator[tuple[str | None, pd.DataFrame]]:
    """The published replies of one vector by wanted partition, without the doses that the file lacks."""
    replies = read_replies(path, *work.study.published_vector(site, epoch))
    work.study.check_doses(replies["multiplier"], "generated", path)
    of_dose = dict(tuple(replies.groupby("multiplier")))
    for partition in wanted:
        dose = cell_of(partition).multiplier
        if dose in of_dose:  # it is not where a dose that the file lacks was started from the UI
            yield partition, of_dose[dose]


def build(stage: Stage) -> None:
    study, partitions = stage.study, stage.partitions

    @stage.asset(
        group=GROUP,
        version="1",
        description="The published replies at one dose of one vector: the whole sweep, or those that were scored again.",
        partitions=partitions.site_by_dose,
        deps={"published_replies": dg.IdentityPartitionMapping()},
        settings=[study.prompts.system],
        schema=GENERATIONS,
        seconds=0.02,
    )
    def generations(work: Work) -> Iterator[dg.AssetMaterialization]:
        release = Release.from_environment()
        for site, epoch, wanted in work.by_vector():
            path = release.reply_file(*study.published_vector(site, epoch))
            if path is None:
                continue  # started from the UI for a vector that the release has no replies of
            try:
                prompts = release.prompts()
            except Absent:
                yield from (work.nothing(partition, f"absent: {TEST_PAIRS}") for partition in wanted)
                continue
            for partition, replies in replies_of(work, path, site, epoch, wanted):
                rows = published.reply_rows(site, epoch, replies, prompts, study.prompts.system)
                yield work.table(partition, rows, {"replies": len(rows)})

    @stage.asset(
        group=GROUP,
        version="1",
        description="Perplexity and propensity of every published reply, as published: without the prompt.",
        partitions=partitions.site_by_dose,
        deps={"published_replies": dg.IdentityPartitionMapping()},
        schema=published.PUBLISHED_METRICS,
        seconds=0.02,
    )
    def published_metrics(work: Work) -> Iterator[dg.AssetMaterialization]:
        release = Release.from_environment()
        for site, epoch, wanted in work.by_vector():
            path = release.reply_file(*study.published_vector(site, epoch))
            if path is None:
                continue  # started from the UI for a vector that the release has no replies of
            for partition, replies in replies_of(work, path, site, epoch, wanted):
                frame = published.metrics_rows(site, epoch, replies)
                shown = {
                    "propensity": float(frame["published_propensity"].mean()),
                    "median_perplexity": float(frame["published_perplexity"].median()),
                }
                yield work.table(partition, frame, shown)
