"""Benjamini-Hochberg adjustment within the declared families (spec/human_study.md, section 3).

A family is a group of test types, within a study: locally over the outcomes of a local family, globally over every local family of the
measure family. Primary contrasts only; simple effects are descriptions and stay unadjusted.
"""

from __future__ import annotations

import numpy as np
import pandas as pd

from relseek_assets.trial import Trial
from relseek_assets.trials.contrasts import PRIMARY
from relseek_assets.trials.exact import benjamini_hochberg

TOGETHER = {"temporal_main": "temporal", "temporal_interaction": "temporal"}  # types that share a family
UNADJUSTED = ("simple_effect", "temporal_simple")


def adjusted(contrasts: pd.DataFrame, trial: Trial) -> pd.DataFrame:
    """The contrasts with p_local and p_global filled in, rows in the same order; null where no family is declared."""
    found = contrasts.copy()
    found["p_local"] = np.nan
    found["p_global"] = np.nan
    declared = {outcome.name: outcome for outcome in trial.outcomes}
    family = found["outcome"].map(lambda name: declared[name].family)
    local = found["outcome"].map(lambda name: declared[name].local_family)
    group = found["test_type"].replace(TOGETHER)
    tested = found["variant"].eq(PRIMARY) & ~found["test_type"].isin(UNADJUSTED) & family.ne("")
    for column, by in (("p_local", [found["study"], group, family, local]), ("p_global", [found["study"], group, family])):
        for _, places in found[tested].groupby([values[tested] for values in by]).groups.items():
            found.loc[places, column] = benjamini_hochberg(found.loc[places, "p_raw"].to_numpy(float))
    return found


def family_table(contrasts: pd.DataFrame, trial: Trial, family: str) -> pd.DataFrame:
    """The adjusted tests of one measure family: one row a test, with the size of the families that it was adjusted in."""
    names = [name for names in trial.families[family].values() for name in names]
    found = adjusted(contrasts[contrasts["outcome"].isin(names)].reset_index(drop=True), trial)
    found = found[found["p_global"].notna()].copy()
    declared = {outcome.name: outcome for outcome in trial.outcomes}
    found["family"] = family
    found["local_family"] = found["outcome"].map(lambda name: declared[name].local_family)
    group = found["test_type"].replace(TOGETHER)
    found["tests_local"] = found.groupby([found["study"], group, found["local_family"]])["p_raw"].transform("size")
    found["tests_global"] = found.groupby([found["study"], group])["p_raw"].transform("size")
    return found
