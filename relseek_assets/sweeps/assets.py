"""The sweep as assets: replies at every dose, and their perplexity and propensity.

Doses of one site and epoch share batches, since multipliers are per row. A batch is composed from the keys of the selected
partitions alone, so the same selection gives the same bytes again.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from itertools import groupby
from typing import TYPE_CHECKING

import dagster as dg
import numpy as np
import pandas as pd

from relseek_assets import amounts, figures
from relseek_assets.dataset.pairs import evaluation_items
from relseek_assets.partitions import cell_of, multi_key, step_key
from relseek_assets.stage import Stage, Work, plot
from relseek_assets.study import StudyError, layer_of
from relseek_assets.sweeps import tables
from relseek_resources.models.sampling import Sampling
from relseek_resources.storage import StorageError

if TYPE_CHECKING:
    from relseek_resources.models import SteeredModel

GROUP = "sweeps"


def sweep_items(work: Work) -> pd.DataFrame:
    """The held-out prompts of the sweep, with their target and anti-target replies.

    Raises:
        StudyError: `prompts.max_words` leaves none.
    """
    pairs, most = work.read_table("preference_pairs"), work.study.prompts.max_words
    items = evaluation_items(pairs, work.study.seed, most)
    if items.empty:
        held = int(pairs["is_item"].sum())
        raise StudyError(f"study {work.study.name}: none of the {held} held-out prompts has at most {most} words; raise prompts.max_words")
    return items.head(work.study.prompts.count) if work.study.prompts.count else items


def heldout_items(work: Work) -> pd.DataFrame:
    """Those of the sweep, and after them every other held-out prompt: replies from elsewhere may answer any."""
    swept = sweep_items(work)
    every = evaluation_items(work.read_table("preference_pairs"), work.study.seed)
    return pd.concat([swept, every[~every["conversation"].isin(swept["conversation"])]], ignore_index=True)


def answered_items(items: pd.DataFrame, replies: Mapping[str | None, pd.DataFrame]) -> pd.DataFrame:
    """Those of `items`, by conversation, that any of the replies (by partition) answers.

    Raises:
        StorageError: a reply to none of them.
    """
    for partition, frame in replies.items():
        unknown = sorted(set(frame["item"]) - set(items.index))
        if unknown:
            raise StorageError(
                f"generations {partition}: item {unknown[0]!r} is no held-out conversation of the study any more; import replies to those that are"
            )
    return items[items.index.isin({item for frame in replies.values() for item in frame["item"]})]


def by_vector(work: Work) -> Iterator[tuple[str, int, list[tuple[float, str | None]]]]:
    """The wanted partitions grouped by vector: (site, epoch, [(dose, partition), ...])."""
    cells = [(cell_of(partition), partition) for partition in work.partitions]
    for (site, epoch), group in groupby(cells, key=lambda found: (found[0].site, found[0].epoch)):
        assert site is not None and epoch is not None
        yield site, epoch, [(cell.multiplier, partition) for cell, partition in group if cell.multiplier is not None]


def vector_of(work: Work, site: str, epoch: int) -> np.ndarray:
    """The vector of a site, trained or derived."""
    asset = "derived_vectors" if site in work.study.derived_sites else "steering_vectors"
    return work.read_tensors(asset, multi_key(site, step_key(epoch)))[0]["vector"]


def build(stage: Stage) -> None:
    study, partitions = stage.study, stage.partitions
    vectors = {"steering_vectors": partitions.of_my_epoch()}
    if study.derived:
        vectors["derived_vectors"] = partitions.of_my_derived_vector()
    system = {"role": "system", "content": study.prompts.system}
    sampling = Sampling(study.sampling.temperature, study.sampling.top_p, study.sampling.max_new_tokens)

    @stage.asset(
        group=GROUP,
        version="1",
        description="Replies to the held-out prompts at one dose of one vector. Doses of a vector that run together share batches.",
        partitions=partitions.site_by_dose,
        deps={**vectors, "preference_pairs": None, "base_models": partitions.of_my_site()},
        settings=[study.sampling.model_dump(exclude={"batch_size"}), study.prompts.model_dump(), study.seed],
        schema=tables.GENERATIONS,
        kinds=("pytorch",),
        pool="gpu",
        seconds=8 * amounts.replies(study),
    )
    def generations(work: Work) -> Iterator[dg.AssetMaterialization]:
        items = sweep_items(work).sort_values("conversation")
        if len(items) < study.prompts.count:
            short = f" of at most {study.prompts.max_words} words" if study.prompts.max_words else ""
            work.warn(f"prompts.count asks for {study.prompts.count} held-out prompts; {len(items)}{short} are there, and are used")
        with work.progress(len(work.partitions) * len(items), "reply", "generations") as report:
            for site, epoch, doses in by_vector(work):
                model = work.resources.models.load(study.model_of(site), work.log)
                vector = vector_of(work, site, epoch)
                rows = [(dose, item) for dose, _ in doses for item in items.itertuples()]
                prompts = [[system, *item.prompt] for _, item in rows]
                seeds = [tables.row_seed(study.seed, site, epoch, dose, item.conversation) for dose, item in rows]
                with model.steer(vector, layer_of(site), [dose for dose, _ in rows]):
                    replies = model.generate(prompts, sampling, seeds=seeds, batch_size=study.sampling.batch_size, on_batch=report)
                found = pd.DataFrame(
                    tables.generation_row(site, epoch, dose, item.conversation, prompt, seed, reply)
                    for (dose, item), prompt, seed, reply in zip(rows, prompts, seeds, replies, strict=True)
                )
                for dose, partition in doses:
                    cell = tables.of_cell(found, dose)
                    yield work.table(
                        partition,
                        cell,
                        {"replies": len(cell), "tokens": int(cell["tokens"].sum()), "mean_log_prob": float(cell["mean_log_prob"].mean())},
                    )

    @stage.asset(
        group=GROUP,
        version="1",
        description="Perplexity of each reply under the unsteered model given its prompt, propensity given the prompt, and the published "
        "context-free variants under their own names.",
        partitions=partitions.site_by_dose,
        deps={
            "generations": dg.IdentityPartitionMapping(),
            **vectors,
            "preference_pairs": None,
            "base_models": partitions.of_my_site(),
        },
        settings=[study.prompts.model_dump(), study.seed],
        schema=tables.GENERATION_METRICS,
        kinds=("pytorch",),
        pool="gpu",
        seconds=16 * amounts.scores(study),
    )
    def generation_metrics(work: Work) -> Iterator[dg.AssetMaterialization]:
        heldout = heldout_items(work).set_index("conversation")
        with work.progress(len(work.partitions) * len(sweep_items(work)) * 6, "score", "generation metrics") as report:
            for site, epoch, doses in by_vector(work):
                model = work.resources.models.load(study.model_of(site), work.log)
                vector = vector_of(work, site, epoch)
                layer, multipliers = layer_of(site), [dose for dose, _ in doses]
                replies_at = {partition: work.read_table("generations", partition) for _, partition in doses}
                items = answered_items(heldout, replies_at)
                sides = {}
                for side in ("chosen", "rejected"):
                    texts = [model.reply_tokens(text) for text in items[side]]
                    prompts = [model.prompt_tokens([system, *prompt]) for prompt in items["prompt"]]
                    bare = [model.bare_tokens(text) for text in items[side]]
                    sides[side] = (
                        model.score_doses(prompts, texts, vector, layer, multipliers, on_batch=report),
                        model.score_doses([ids[:1] for ids in bare], [ids[1:] for ids in bare], vector, layer, multipliers, on_batch=report),
                    )
                for dose, partition in doses:
                    replies = replies_at[partition]
                    tokens = [
                        ids if isinstance(ids, list) else model.reply_tokens(text, end=False)
                        for ids, text in zip(replies["token_ids"], replies["reply"], strict=True)
                    ]
                    given = [model.prompt_tokens(prompt) for prompt in replies["prompt"]]
                    unsteered = scores_of(model, given, tokens)
                    report(len(replies))
                    with model.steer(vector, layer, dose):
                        alone = scores_of(model, [ids[:1] for ids in tokens], [ids[1:] for ids in tokens])
                        steered = scores_of(model, given, tokens) if replies["mean_log_prob"].isna().any() else list(replies["mean_log_prob"])
                    report(len(replies))
                    order = [items.index.get_loc(item) for item in replies["item"]]
                    with_prompt = {side: np.array([sides[side][0][dose][row].mean for row in order]) for side in sides}
                    bare_means = {side: np.array([sides[side][1][dose][row].mean for row in order]) for side in sides}
                    frame = replies[list(tables.KEY)].assign(
                        perplexity=[perplexity(value) for value in unsteered],
                        mean_log_prob=steered,
                        propensity=with_prompt["chosen"] - with_prompt["rejected"],
                        published_perplexity=[perplexity(value) for value in alone],
                        published_chosen_log_prob=bare_means["chosen"],
                        published_rejected_log_prob=bare_means["rejected"],
                        published_propensity=bare_means["chosen"] - bare_means["rejected"],
                    )
                    shown = {"propensity": float(frame["propensity"].mean()), "median_perplexity": float(frame["perplexity"].median())}
                    yield work.table(partition, frame, shown)

    @stage.asset(
        group=GROUP,
        version="1",
        description="Means of perplexity and propensity by dose, with the published variants beside them.",
        partitions=partitions.site_by_evaluated_epoch,
        deps={"generation_metrics": partitions.of_my_doses()},
        schema=tables.SWEEP_SUMMARY,
    )
    def sweep_summary(work: Work) -> Iterator[dg.AssetMaterialization]:
        for partition in work.partitions:
            rows = pd.concat([work.read_table("generation_metrics", key) for key in work.upstream("generation_metrics", partition)])
            frame = tables.sweep_summary(rows)
            yield work.table(partition, frame, {"plot": plot(figures.sweep_curves(frame))})


def scores_of(model: SteeredModel, prompts: list[list[int]], replies: list[list[int]]) -> list[float | None]:
    """Mean log-probability of each reply, None where prompt or reply has no tokens."""
    there = [row for row, (prompt, reply) in enumerate(zip(prompts, replies, strict=True)) if prompt and reply]
    found: list[float | None] = [None] * len(prompts)
    for row, value in zip(there, model.score_tokens([prompts[row] for row in there], [replies[row] for row in there]), strict=True):
        found[row] = value.mean
    return found


def perplexity(mean_log_prob: float | None) -> float | None:
    return None if mean_log_prob is None else math.exp(-mean_log_prob)
