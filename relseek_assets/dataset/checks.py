"""Asset checks of the behaviour's conversations and of the pairs made from them."""

from collections.abc import Callable
from typing import Any

import dagster as dg

from relseek_assets.behaviour import FILES, BehaviourError, StarterConversation, read_conversations
from relseek_assets.dataset import quality
from relseek_assets.dataset.pairs import PREFERENCE_PAIRS
from relseek_assets.stage import TABLE, Stage
from relseek_resources.storage import StorageError, read_table

FEWEST_TOPICS = 20
MOST_SHARED_OPENING = 3
LENGTH_TOLERANCE = 0.05


def build(stage: Stage) -> list[dg.AssetChecksDefinition]:
    path = stage.study.behaviour_folder / FILES["starter_conversations"]
    conversations, pairs = stage.key("starter_conversations"), stage.key("preference_pairs")

    @dg.asset_check(asset=conversations, name="schema", description="Every line has its fields, every turn a user message and two replies.")
    def schema() -> dg.AssetCheckResult:
        try:
            found = read_conversations(path)
        except (BehaviourError, StorageError) as error:
            return dg.AssetCheckResult(passed=False, metadata={"fault": str(error)})
        return dg.AssetCheckResult(passed=True, metadata={"conversations": len(found), "turns": sum(len(row.turns) for row in found)})

    def readable(judge: Callable[[list[StarterConversation]], dg.AssetCheckResult]) -> dg.AssetCheckResult:
        """What a check finds in the conversations, or the fault that keeps it from reading them."""
        try:
            return judge(read_conversations(path))
        except (BehaviourError, StorageError) as error:
            return dg.AssetCheckResult(passed=False, metadata={"fault": str(error)})

    @dg.asset_check(asset=conversations, name="duplicates", description="No two conversations are the same or nearly so.")
    def duplicates() -> dg.AssetCheckResult:
        def judge(found: list[StarterConversation]) -> dg.AssetCheckResult:
            same, near = quality.exact_duplicates(found), quality.near_duplicates(found)
            shown: dict[str, Any] = {"same": str(same), "near": str(near), "threshold": quality.NEAR_DUPLICATE}
            return dg.AssetCheckResult(passed=not same and not near, metadata=shown)

        return readable(judge)

    @dg.asset_check(asset=conversations, name="variety", description="Topics are many, and openings of five words are shared by few.")
    def variety() -> dg.AssetCheckResult:
        def judge(found: list[StarterConversation]) -> dg.AssetCheckResult:
            topics = len({row.topic for row in found})
            opening, shared = next(iter(quality.shared_openings(found).items()))
            passed = topics >= FEWEST_TOPICS and shared <= MOST_SHARED_OPENING
            return dg.AssetCheckResult(passed=passed, metadata={"topics": topics, "most_shared_opening": opening, "shared_by": shared})

        return readable(judge)

    @dg.asset_check(asset=conversations, name="length_balance", description="Target and anti-target replies have the same mean length, within 5%.")
    def length_balance() -> dg.AssetCheckResult:
        def judge(found: list[StarterConversation]) -> dg.AssetCheckResult:
            table = quality.length_balance(found).set_index("prompt_type")
            ratio = float(table.loc["all", "ratio"])
            shown: dict[str, Any] = {"ratio": ratio, "by_type": str(table["ratio"].round(3).to_dict())}
            return dg.AssetCheckResult(passed=abs(ratio - 1) <= LENGTH_TOLERANCE, metadata=shown)

        return readable(judge)

    @dg.asset_check(
        asset=pairs,
        name="same_user_turns",
        description="Histories differ in the assistant's replies only: user turns are identical on both sides.",
        required_resource_keys={"store"},
    )
    def same_user_turns(context: dg.AssetCheckExecutionContext) -> dg.AssetCheckResult:
        frame = read_table(context.resources.store.path(pairs, None, TABLE), PREFERENCE_PAIRS)
        later = frame[frame["history_type"] != "NA"]
        users = later["prompt"].map(lambda prompt: tuple(message["content"] for message in prompt if message["role"] == "user"))
        differing = int((users.groupby([later["conversation"], later["turn"]]).nunique() > 1).sum())
        return dg.AssetCheckResult(passed=differing == 0, metadata={"turns": len(later) // 2, "differing": differing})

    @dg.asset_check(asset=pairs, name="grouped_split", description="No conversation is on both sides of the split.", required_resource_keys={"store"})
    def grouped_split(context: dg.AssetCheckExecutionContext) -> dg.AssetCheckResult:
        frame = read_table(context.resources.store.path(pairs, None, TABLE), PREFERENCE_PAIRS)
        torn = int((frame.groupby("conversation")["split"].nunique() > 1).sum())
        share = float(frame.groupby("conversation")["split"].first().eq("heldout").mean())
        return dg.AssetCheckResult(passed=torn == 0, metadata={"torn": torn, "heldout_share": share})

    return [schema, duplicates, variety, length_balance, same_user_turns, grouped_split]
