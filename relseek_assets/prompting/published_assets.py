"""The published prompting experiments as assets, where a study's authors are published ones; nothing is generated and no model is loaded.

Here belongs only the way from the release to tables. A file that the copy of the release lacks is absent, and its rows are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import dagster as dg
import pandas as pd

from relseek_assets.prompting import published, tables
from relseek_assets.prompting.tables import STEERED
from relseek_assets.settings import Prompting
from relseek_assets.stage import Stage, Work
from relseek_assets.study import Study, layer_of
from relseek_resources.prompting_release import PublishedAuthor
from relseek_resources.release import Release

GROUP = "prompting"


def published_author(study: Study, wanted: Prompting, name: str) -> PublishedAuthor:
    """Where the release keeps an author's files."""
    vector = (study.model_of(wanted.site).short_name, layer_of(wanted.site), wanted.epoch)
    return PublishedAuthor(Release.from_environment(), name, len(wanted.doses), vector, name == STEERED)


def build(stage: Stage, wanted: Prompting) -> None:
    partitions = stage.partitions
    source = {"published_prompting": partitions.of_my_author()}
    of_level: Mapping[str, Any] = {"group": GROUP, "version": "1", "partitions": partitions.author, "deps": source, "settings": wanted.doses}
    of_attack = {**of_level, "partitions": partitions.attacked, "deps": {"published_prompting": dg.IdentityPartitionMapping()}}

    @stage.asset(**of_level, description="The published replies at every level that was asked for in words.", schema=tables.PROMPTED_GENERATIONS)
    def prompted_generations(work: Work) -> Iterator[dg.AssetMaterialization]:
        yield from _read(work, wanted, published.prompted_generations)

    @stage.asset(**of_level, description="The published judge's scores of these replies.", schema=tables.LEVEL_SCORES)
    def level_scores(work: Work) -> Iterator[dg.AssetMaterialization]:
        yield from _read(work, wanted, lambda author: published.level_scores(author, wanted.doses))

    @stage.asset(
        **of_level,
        description="The published judge's comparisons with the steered model. An answer that is neither A nor B wins for nobody.",
        schema=tables.LEVEL_PAIRS,
    )
    def level_pairs(work: Work) -> Iterator[dg.AssetMaterialization]:
        yield from _read(work, wanted, lambda author: published.level_pairs(author, wanted.doses))

    @stage.asset(**of_attack, description="The published conversations that end in an attack on the persona.", schema=tables.ATTACK_CONVERSATIONS)
    def attack_conversations(work: Work) -> Iterator[dg.AssetMaterialization]:
        yield from _read(work, wanted, lambda author: published.attack_conversations(author, wanted.doses))

    @stage.asset(**of_attack, description="The published judge's scores of every reply in these conversations.", schema=tables.ATTACK_SCORES)
    def attack_scores(work: Work) -> Iterator[dg.AssetMaterialization]:
        yield from _read(work, wanted, lambda author: published.attack_scores(author, wanted.doses))


def _read(work: Work, wanted: Prompting, rows: Callable[[PublishedAuthor], pd.DataFrame]) -> Iterator[dg.AssetMaterialization]:
    for name in work.partitions:
        frame = rows(published_author(work.study, wanted, str(name)))
        if len(frame):
            yield work.table(name, frame, {"cost_usd": float(frame["cost_usd"].sum())})
        else:
            yield work.nothing(name, f"absent: no published file of {work.me.name} for {name}")
