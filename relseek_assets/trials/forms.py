"""What decides the specification of an outcome: whether pooled items differ in their effects, and which polynomial of the dose fits.

The published choice is by a performance score over RMSE and weights of information criteria, the paper's text says AIC: both are
reported (spec/human_study.md, sections 2.1 and 2.2). A polynomial that the trial declares is used whatever the comparison says.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy import stats

from relseek_assets.trials import formulas, models
from relseek_assets.trials.formulas import Form
from relseek_assets.trials.frames import OutcomeFrame
from relseek_assets.trials.models import SeparationFault
from relseek_assets.trials.raw import TrialFault

HETEROGENEOUS_BELOW = 0.05


@dataclass(frozen=True)
class Specification:
    """The specification of an outcome: the polynomial declared or chosen by the published rule, by AIC, and whether items keep their own effects."""

    form: Form
    form_by_aic: Form
    heterogeneous: bool
    heterogeneity: tuple[float, int, float] | None  # χ², df, p; None where one item is measured
    comparison: pd.DataFrame  # a row a form: k, n, log_likelihood, aic, aicc, bic, rmse, score


def heterogeneity(frame: OutcomeFrame) -> tuple[float, int, float] | None:
    """(χ², df, p) of the likelihood ratio between items with effects of their own and items with common ones; None for one item."""
    if not frame.pooled:
        return None
    with_terms, without = (
        models.fit(frame, formulas.fixed_terms(frame, "linear", full=True, heterogeneous=terms), reml=False) for terms in (True, False)
    )
    statistic = 2 * (with_terms.log_likelihood - without.log_likelihood)
    df = len(with_terms.coefficients) - len(without.coefficients)
    return float(statistic), df, float(stats.chi2.sf(statistic, df))


def specify(frame: OutcomeFrame) -> Specification:
    """Test heterogeneity, then compare the polynomials of the full model by maximum likelihood."""
    test = heterogeneity(frame)
    differ = test is not None and test[2] < HETEROGENEOUS_BELOW
    rows = []
    declared = frame.outcome.form
    for form in formulas.polynomials(frame):
        try:
            fit = models.fit(frame, formulas.fixed_terms(frame, form, full=True, heterogeneous=differ), reml=False)
        except SeparationFault:
            if declared and form != declared:
                continue  # there is nothing to choose, and the declared form may be finite
            raise
        aic, aicc, bic = models.information_criteria(fit)
        rows.append(
            {
                "form": form,
                "k": fit.parameters,
                "n": fit.n,
                "log_likelihood": fit.log_likelihood,
                "aic": aic,
                "aicc": aicc,
                "bic": bic,
                "rmse": fit.rmse,
            }
        )
    comparison = pd.DataFrame(rows)
    comparison["score"] = performance_score(comparison)
    best = int(comparison["score"].round(10).to_numpy().argmax())  # ties go to the simplest
    by_aic = int(comparison["aic"].to_numpy().argmin())
    names: list[Form] = list(comparison["form"])
    if declared and declared not in names:
        raise TrialFault(f"{frame.key}: the form {declared} is declared, and {len(frame.doses)} doses allow {', '.join(names)}; declare one of them")
    return Specification(declared or names[best], names[by_aic], differ, test, comparison)


def performance_score(comparison: pd.DataFrame) -> np.ndarray:
    """Mean of four quantities scaled to 0..1 over the models: one minus the RMSE, and the weights of AIC, AICc and BIC."""
    parts = [1 - _scaled(comparison["rmse"].to_numpy())]
    for name in ("aic", "aicc", "bic"):
        values = comparison[name].to_numpy()
        weights = np.exp(-(values - values.min()) / 2)
        parts.append(_scaled(weights / weights.sum()))
    return np.mean(parts, axis=0)


def _scaled(values: np.ndarray) -> np.ndarray:
    spread = values.max() - values.min()
    return (values - values.min()) / spread if spread > 0 else np.zeros_like(values)
