"""Stage 1 as assets: the behaviour's files as they are, and the preference pairs made of them."""

from __future__ import annotations

from collections.abc import Iterator

import dagster as dg
import pandas as pd

from relseek_assets import figures
from relseek_assets.behaviour import FILES, PROMPT_TYPES, read_conversations
from relseek_assets.dataset import pairs as plain
from relseek_assets.dataset import quality
from relseek_assets.stage import Stage, Work, plot
from relseek_assets.study import StudyError
from relseek_resources.storage import Column, TableSchema

GROUP = "dataset"

CONVERSATION_LENGTHS = TableSchema(
    "conversation_lengths",
    (
        Column("prompt_type", "string", "form of the conversation, or `all`", choices=("all", *PROMPT_TYPES)),
        Column("turns", "integer", "user turns", low=1),
        Column("ratio", "number", "mean length of target replies over that of anti-target replies", low=0),
        Column("antitarget_longer", "number", "share of turns whose anti-target reply is the longer", low=0, high=1),
        *(
            Column(f"{side}_{what}", "number", f"{what} of {side} reply lengths", "words", low=0)
            for side in ("target", "antitarget")
            for what in ("mean", "p0", "p25", "p50", "p75", "p100")
        ),
    ),
    key=("prompt_type",),
)


def build(stage: Stage) -> None:
    study = stage.study
    conversations = study.behaviour_folder / FILES["starter_conversations"]

    @stage.asset(
        group=GROUP,
        version="1",
        description="One preference pair a turn and history, with the split by conversation. Counts by type and split are in the metadata.",
        deps={"starter_conversations": None},
        settings=[study.pairs.heldout_share, study.seed],
        schema=plain.PREFERENCE_PAIRS,
    )
    def preference_pairs(work: Work) -> Iterator[dg.AssetMaterialization]:
        frame = plain.preference_pairs(read_conversations(conversations), heldout_share=study.pairs.heldout_share, seed=study.seed)
        counts = frame.groupby("split")["conversation"].nunique().to_dict()
        if not counts.get("heldout"):
            raise StudyError(
                f"study {study.name}: none of {counts['train']} conversations can be held out, since every prompt type has one alone; "
                f"write a second one of a type in {conversations}"
            )
        if not counts.get("train"):
            raise StudyError(
                f"study {study.name}: all {counts['heldout']} conversations are held out and none is left to train on; "
                f"lower pairs.heldout_share ({study.pairs.heldout_share:g}) or write more in {conversations}"
            )
        yield work.table(
            None,
            frame,
            {"training_conversations": counts.get("train", 0), "heldout_conversations": counts.get("heldout", 0), "by_type": by_type(frame)},
        )

    @stage.asset(
        group=GROUP,
        version="1",
        description="Distribution of reply lengths by prompt type, target beside anti-target.",
        deps={"starter_conversations": None},
        schema=CONVERSATION_LENGTHS,
    )
    def conversation_lengths(work: Work) -> Iterator[dg.AssetMaterialization]:
        frame = quality.length_balance(read_conversations(conversations))
        yield work.table(None, frame, {"plot": plot(figures.length_distribution(frame))})


def by_type(pairs: pd.DataFrame) -> dg.MetadataValue:
    table = pairs.groupby(["prompt_type", "split"]).size().unstack(fill_value=0)
    lines = ["| type | what | train | held out |", "|---|---|---|---|"]
    lines += [f"| {name} | {PROMPT_TYPES[str(name)]} | {row.get('train', 0)} | {row.get('heldout', 0)} |" for name, row in table.iterrows()]
    return dg.MetadataValue.md("\n".join(lines))
