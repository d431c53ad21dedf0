"""The 48 mixed models of the longitudinal attachment measures (spec/human_study.md, sections 2 and 16), fitted here and by lme4_attachment.R."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from relseek_assets.mixed_models import MixedFit, fit

FOLDER = Path(__file__).parent
ITEMS = {
    "reliance": ("behavioural_reliance", "cognitive_reliance"),
    "perceived_understanding": ("connection", "responsiveness", "understanding"),
    "self_disclosure": ("self_disclosure",),
    "separation_distress": ("separation_distress",),
}
DOSES = {"linear": "lam", "quadratic": "lam + I(lam**2)", "cubic": "lam + I(lam**2) + I(lam**3)"}
#: What lme4_attachment.R has contrasts of: the difference of the settings' means.
CONTRASTS: list[list[dict[str, tuple[float, ...]]]] = [
    [{"lam": (0.5, 1.0)}, {"lam": (-0.5, -1.0)}],
    [{"domain[T.emotchat]": (1.0,)}, {"domain[T.emotchat]": (0.0,)}],
    [{"pers[T.personalised]": (1.0,)}, {"pers[T.personalised]": (0.0,)}],
]
needs_release = pytest.mark.skipif("RELSEEK_RELEASE" not in os.environ, reason="RELSEEK_RELEASE is not set: the attachment measures are not here")


def r_is_here() -> bool:
    """Whether there is an R that has what the scripts load."""
    if shutil.which("Rscript") is None:
        return False
    wanted = "for (name in c('lme4', 'lmerTest', 'pbkrtest', 'emmeans', 'jsonlite')) loadNamespace(name)"
    return subprocess.run(["Rscript", "-e", wanted], capture_output=True, check=False).returncode == 0


def by_r(script: str, *arguments: str) -> list[dict]:
    """What an R script of this folder writes to the file that is its last argument."""
    subprocess.run(["Rscript", str(FOLDER / script), *arguments], check=True, capture_output=True)
    return json.loads(Path(arguments[-1]).read_text())


def measures() -> Path:
    return Path(os.environ["RELSEEK_RELEASE"]) / "data/human_study/main_studies/attachment.jsonl"


def panel() -> pd.DataFrame:
    rows = pd.DataFrame(json.loads(line) for line in measures().read_text().splitlines())
    rows = rows[rows["study_id"] == "longitudinal"]
    return rows.assign(
        week=rows["week"].str[1:].astype(int),
        lam=rows["multiplier"].astype(float),
        domain=pd.Categorical(rows["domain"], ["polchat", "emotchat"]),
        pers=pd.Categorical(rows["personalisation"], ["non-personalised", "personalised"]),
    )


def long_rows(rows: pd.DataFrame, construct: str) -> pd.DataFrame:
    items = list(ITEMS[construct])
    found = rows.melt(id_vars=["ppt_id", "week", "lam", "domain", "pers"], value_vars=items, var_name="item", value_name="y").dropna(subset="y")
    return found.assign(item=pd.Categorical(found["item"], items))


def formula(construct: str, dose: str, *, full: bool) -> str:
    pooled = len(ITEMS[construct]) > 1
    parts = [f"y ~ {DOSES[dose]} + pers", "item" * pooled, "domain", "lam:item + pers:item + domain:item" * pooled, "week", "week:item" * pooled]
    parts += ["lam:pers + lam:domain + lam:week + pers:week + domain:week" * full, "(1 + week | ppt_id)"]
    return " + ".join(filter(None, parts))


def marginal_row(names: Sequence[str], setting: dict[str, tuple[float, ...]], means: dict[str, float]) -> np.ndarray:
    """The estimated marginal mean as a row: factors at equal weights, numbers at their means, and the average over the points of `setting`."""

    def column(name: str, values: dict[str, float]) -> float:
        return math.prod(values[part] if "**" not in part else values["lam"] ** int(part[-2]) for part in name.split(":") if part != "Intercept")

    (key, points), *_ = setting.items()
    return np.mean([[column(name, {**means, key: point}) for name in names] for point in points], axis=0)


def contrast_rows(found: MixedFit, rows: pd.DataFrame) -> np.ndarray:
    means = {"lam": rows["lam"].mean(), "week": rows["week"].mean()}
    for factor in ("pers", "domain", "item"):
        levels = list(rows[factor].cat.categories)
        means |= {f"{factor}[T.{level}]": 1 / len(levels) for level in levels}
    return np.array([marginal_row(found.names, upper, means) - marginal_row(found.names, lower, means) for upper, lower in CONTRASTS])


def all_fits(rows: pd.DataFrame) -> Iterator[tuple[str, str, bool, MixedFit, pd.DataFrame]]:
    """Each of the 24 specifications by REML with its contrasts; `fit.refit(reml=False)` is the other 24."""
    for construct in ITEMS:
        long = long_rows(rows, construct)
        for dose in DOSES:
            for full in (False, True):
                found = fit(formula(construct, dose, full=full), long)
                yield construct, dose, full, found, found.contrast(contrast_rows(found, long))
