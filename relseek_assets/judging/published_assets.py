"""The published judges' scores as assets, where a study takes them instead of judging (`published.scores`).

Here belongs only the way from the release to tables that the stages behind read; nothing is judged and no model is loaded.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import dagster as dg
import pandas as pd

from relseek_assets.judging import published, tables
from relseek_assets.partitions import cell_of
from relseek_assets.stage import Stage, Work
from relseek_resources.release import Release, read_comparisons, read_ratings, read_rescores
from relseek_resources.storage import StorageError

GROUP = "judging"


def one_rubric(files: dict[str, Path]) -> Path:
    """The one file of a vector's comparisons.

    Raises:
        StorageError: there are comparisons on several rubrics, which one table of pairs cannot tell apart.
    """
    if len(files) > 1:
        names = ", ".join(path.name for path in files.values())
        raise StorageError(f"{next(iter(files.values())).parent}: {names}: comparisons on several rubrics; keep those on the disposition")
    return next(iter(files.values()))


def build(stage: Stage) -> None:
    study, partitions = stage.study, stage.partitions
    doses = list(study.doses.generated)

    @stage.asset(
        group=GROUP,
        version="1",
        description="The published judges' score of every reply on every rubric. A score off the scale keeps its value and has a status, a reply "
        "that the file lacks is missing. Costs are the published ones: list prices, without the half that a batch costs less.",
        partitions=partitions.site_by_dose,
        deps={"published_ratings": partitions.of_my_epoch()},
        settings=[doses],
        schema=tables.LANGUAGE_SCORES,
        seconds=0.02,
    )
    def judge_scores(work: Work) -> Iterator[dg.AssetMaterialization]:
        release = Release.from_environment()
        with work.progress(len(work.partitions), "partition", "published ratings") as report:
            for site, epoch, wanted in work.by_vector():
                vector = study.published_vector(site, epoch)
                files, again = release.rating_files(*vector), release.rescored_file(*vector)
                if epoch not in study.model_of(site).judged or not (files or again):
                    continue  # started from the UI for a vector that the release has no scores of
                ratings = {rubric: read_ratings(path) for rubric, path in files.items()}
                for rubric, path in files.items():
                    study.check_doses(ratings[rubric]["multiplier"], "generated", path)
                scores = published.ratings_by_dose(site, epoch, ratings, read_rescores(again, *vector) if again else None)
                of_dose = dict(tuple(scores.groupby("multiplier")))
                for partition in wanted:
                    frame = of_dose.get(cell_of(partition).multiplier)
                    if frame is None:
                        yield work.nothing(partition, f"absent: no rating at this dose in the files of {site}, epoch {epoch}")
                    else:
                        yield work.table(partition, frame, shown_of(frame))
                report(len(wanted))

    @stage.asset(
        group=GROUP,
        version="1",
        description="The published judge's comparisons of every pair of doses of every item. An answer that is neither A nor B wins for nobody; the "
        "published figures count it for the reply shown second, and the page shows both slopes.",
        partitions=partitions.site_by_evaluated_epoch,
        deps={"published_comparisons": dg.IdentityPartitionMapping()},
        settings=[study.paired_doses, study.selection_doses],
        schema=published.PAIRS,
        seconds=1.0,
    )
    def judge_pairs(work: Work) -> Iterator[dg.AssetMaterialization]:
        release = Release.from_environment()
        with work.progress(len(work.partitions), "vector", "published comparisons") as report:
            for site, epoch, (partition,) in work.by_vector():
                files = release.comparison_files(*study.published_vector(site, epoch))
                if epoch not in study.model_of(site).judged or not files:
                    continue  # started from the UI for a vector that the release has no comparisons of
                path = one_rubric(files)
                comparisons = read_comparisons(path)
                study.check_doses([*comparisons["multiplier_a"], *comparisons["multiplier_b"]], "paired", path)
                frame = published.comparison_rows(site, epoch, comparisons, study.paired_doses)
                counts = frame["status"].value_counts().to_dict()
                shown = {**counts, "cost_usd": float(frame["cost_usd"].sum()), **published.pairwise_slopes(frame, study.selection_doses)}
                yield work.table(partition, frame, shown)
                report()


def shown_of(frame: pd.DataFrame) -> dict[str, float]:
    """Figures of a partition of scores for its page: means by rubric and judge, rows without a score on the scale, and the list price."""
    means = {f"{rubric} ({judge})": float(part["score"].mean()) for (rubric, judge), part in frame.groupby(["rubric", "judge"])}
    return {**means, "not scored": int((frame["status"] != "scored").sum()), "cost_usd": float(frame["cost_usd"].sum())}
