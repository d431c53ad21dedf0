"""Asset checks of the dose-response that selection rests on."""

from itertools import pairwise

import dagster as dg
import numpy as np
import pandas as pd

from relseek_assets.partitions import epoch_key
from relseek_assets.selection.metrics import DOSE_RESPONSE, SELECTION
from relseek_assets.stage import TABLE, Stage
from relseek_resources.storage import read_table


def inversions(curve: pd.DataFrame) -> list[tuple[float, float, bool]]:
    """Neighbouring doses at which the score falls: (dose, next dose, whether the fall lies within the next dose's interval)."""
    rows = curve.sort_values("multiplier").to_dict("records")
    return [
        (one["multiplier"], two["multiplier"], two["upper"] >= one["estimate"]) for one, two in pairwise(rows) if two["estimate"] < one["estimate"]
    ]


def build(stage: Stage) -> list[dg.AssetChecksDefinition]:
    selection, response = stage.key("selection"), stage.key("dose_response")

    @dg.asset_check(
        asset=selection,
        name="monotone_dose_response",
        description="At the selected vector the disposition rises with the dose, with at most one inversion, inside its interval.",
        required_resource_keys={"store"},
    )
    def monotone_dose_response(context: dg.AssetCheckExecutionContext) -> dg.AssetCheckResult:
        store = context.resources.store
        chosen = read_table(store.path(selection, None, TABLE), SELECTION).query("selected")
        if chosen.empty:
            return dg.AssetCheckResult(passed=False, metadata={"fault": "no vector is selected"})
        site, epoch = chosen["site"].iloc[0], int(chosen["epoch"].iloc[0])
        curve = read_table(store.path(response, f"{site}|{epoch_key(epoch)}", TABLE), DOSE_RESPONSE).query("rubric != 'coherence'")
        falls = inversions(curve)
        span = float(np.ptp(curve["estimate"]))
        passed = not falls or (len(falls) == 1 and falls[0][2])
        return dg.AssetCheckResult(passed=passed, severity=dg.AssetCheckSeverity.WARN, metadata={"inversions": str(falls), "span": span})

    return [monotone_dose_response]
