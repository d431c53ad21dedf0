"""Mixed models of the calibration study's ratings by dose: composites, the six models, and their comparison.

Rankings are in rankings.py, the fitting itself in mixed_models.py. Source: human_study.md, section 14 and appendix A.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd

from relseek_assets import mixed_models
from relseek_assets.trials.raw import TrialFault

#: Composite and the prefix of its items; willingness to pay (wtp:) is in pounds and no part of preference.
COMPOSITES = {"coherence": "coherence:", "relationship-seeking": "steerability:", "preference": "preference:"}
EXTREME_DOSE = 1.5
MODES = ("pre-populated", "dynamic")
REPORTED = "truncated quadratic"


class CalibrationError(TrialFault):
    """Calibration ratings that lack a column or hold an unknown conversation mode."""


@dataclass(frozen=True)
class ModelSpecification:
    """One of the six models: its fixed part after the conversation mode, and whether doses beyond ±1 are left out."""

    name: str
    dose_terms: str
    truncated: bool


MODELS = (
    ModelSpecification("null", "", False),
    ModelSpecification("linear", " + multiplier", False),
    ModelSpecification("truncated linear", " + multiplier", True),
    ModelSpecification("quadratic", " + multiplier + multiplier_squared", False),
    ModelSpecification(REPORTED, " + multiplier + multiplier_squared", True),
    ModelSpecification("factor", " + dose", False),
)


def composites(calibration_ratings: pd.DataFrame) -> pd.DataFrame:
    """ppt_id, conversation_mode, multiplier and, 0 to 100, the mean rating of each composite's items, a row a conversation.

    Raises CalibrationError naming the composite without items, or a conversation mode that is not one of `MODES`.
    """
    keys = ["ppt_id", "conversation_mode", "multiplier"]
    if missing := [column for column in keys if column not in calibration_ratings]:
        raise CalibrationError(f"calibration_ratings has no column {missing[0]!r}")
    found = calibration_ratings[keys].copy()
    if unknown := set(found["conversation_mode"]) - set(MODES):
        raise CalibrationError(f"calibration_ratings: conversation_mode is one of {list(MODES)}, not {sorted(map(str, unknown))}")
    for composite, prefix in COMPOSITES.items():
        items = [column for column in calibration_ratings.columns if column.startswith(prefix)]
        if not items:
            raise CalibrationError(f"calibration_ratings has no item of {composite}: no column starts with {prefix!r}")
        found[composite] = calibration_ratings[items].mean(axis=1)
    return found


def fit_model(ratings: pd.DataFrame, composite: str, specification: ModelSpecification) -> mixed_models.MixedFit:
    """REML fit of one composite on the table of `composites`, with a random intercept by participant."""
    if composite not in COMPOSITES:
        raise CalibrationError(f"composite is one of {list(COMPOSITES)}, not {composite!r}")
    kept = ratings[ratings["multiplier"].abs() < EXTREME_DOSE] if specification.truncated else ratings
    doses = sorted(kept["multiplier"].unique(), key=lambda dose: (dose != 0, dose))
    data = pd.DataFrame(
        {
            "rating": kept[composite],
            "mode": pd.Categorical(kept["conversation_mode"].astype(object), categories=list(MODES)),
            "multiplier": kept["multiplier"].astype(float),
            "multiplier_squared": kept["multiplier"].astype(float) ** 2,
            "dose": pd.Categorical(kept["multiplier"].map("{:g}".format).astype(object), categories=[f"{dose:g}" for dose in doses]),
            "ppt_id": kept["ppt_id"],
        }
    ).dropna(subset=["rating"])
    return mixed_models.fit(f"rating ~ mode{specification.dose_terms} + (1 | ppt_id)", data.reset_index(drop=True), reml=True)


def coefficients(ratings: pd.DataFrame, composite: str, specification: ModelSpecification) -> pd.DataFrame:
    """composite, model, term, estimate, se, df (Satterthwaite), statistic, p, lower, upper, n."""
    return _coefficient_table(fit_model(ratings, composite, specification), composite, specification)


def _coefficient_table(fitted: mixed_models.MixedFit, composite: str, specification: ModelSpecification) -> pd.DataFrame:
    tested = fitted.contrast(np.eye(len(fitted.names)), method="satterthwaite").reset_index(drop=True)
    keys = pd.DataFrame({"composite": composite, "model": specification.name, "term": fitted.names})
    return pd.concat([keys, tested], axis=1).assign(n=fitted.n)


def calibration_models(ratings: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Coefficients and comparison of all six models of all composites.

    The first table is that of `coefficients`; the second has composite, model, aic, bic (both of the REML criterion, k = p + 2),
    rmse (of conditional residuals), n, singular, reported. Criteria compare only models of the same rows.
    """
    terms, comparison = [], []
    for composite in COMPOSITES:
        for specification in MODELS:
            fitted = fit_model(ratings, composite, specification)
            terms.append(_coefficient_table(fitted, composite, specification))
            comparison.append(
                {
                    "composite": composite,
                    "model": specification.name,
                    "aic": fitted.aic,
                    "bic": fitted.bic,
                    "rmse": fitted.rmse,
                    "n": fitted.n,
                    "singular": fitted.singular,
                    "reported": specification.name == REPORTED,
                }
            )
    return pd.concat(terms, ignore_index=True), pd.DataFrame(comparison)
