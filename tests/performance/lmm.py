"""The 48 mixed models of the attachment measures with Kenward-Roger contrasts, against R's lme4 and emmeans on the same rows."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from tests.mixed_models import attachment
from tests.performance.comparison import Comparison, compare

PAIRS = 2  # R needs minutes


def comparisons() -> list[Comparison]:
    """None where there is no R or no release to measure on."""
    if "RELSEEK_RELEASE" not in os.environ or not attachment.r_is_here():
        print("lmm: left out, because RELSEEK_RELEASE is not set or there is no Rscript with lme4, lmerTest, pbkrtest, emmeans and jsonlite")
        return []

    def here() -> None:
        for *_, found, _ in attachment.all_fits(attachment.panel()):
            found.refit(reml=False)

    def in_r() -> None:
        with tempfile.TemporaryDirectory() as folder:
            attachment.by_r("lme4_attachment.R", str(attachment.measures()), str(Path(folder) / "fits.json"))

    return [compare("lmm", here, in_r, pairs=PAIRS, amount=48, unit="fits/s", target=25.0)]
