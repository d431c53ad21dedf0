"""Asset checks of the embedded judge."""

import dagster as dg

from relseek_assets.judging.tables import JUDGE_QUALITY
from relseek_assets.stage import TABLE, Stage
from relseek_resources.storage import read_table

FEWEST_RIGHT = 0.95


def build(stage: Stage) -> list[dg.AssetChecksDefinition]:
    quality = stage.key("judge_quality")

    @dg.asset_check(
        asset=quality,
        name="pair_accuracy",
        description="On held-out conversations the target reply scores higher in at least 95% of pairs.",
        required_resource_keys={"store"},
    )
    def pair_accuracy(context: dg.AssetCheckExecutionContext) -> dg.AssetCheckResult:
        frame = read_table(context.resources.store.path(quality, None, TABLE), JUDGE_QUALITY)
        row = frame[frame["metric"] == "pair_accuracy"].iloc[0]
        return dg.AssetCheckResult(passed=bool(row["value"] >= FEWEST_RIGHT), metadata={"pair_accuracy": float(row["value"]), "n": int(row["n"])})

    return [pair_accuracy]
