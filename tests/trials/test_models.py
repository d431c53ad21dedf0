"""Fits against statsmodels' own formulas and, where R is here, emmeans; designs that cannot show a coefficient; profile intervals."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import statsmodels.api as sm
import statsmodels.formula.api as smf
from scipy import stats

from relseek_assets.trials import models
from relseek_assets.trials.contrasts import ReferenceGrid
from relseek_assets.trials.formulas import fixed_terms
from relseek_assets.trials.frames import OutcomeFrame
from relseek_assets.trials.models import LogitFit, SeparationFault, information_criteria
from relseek_assets.trials.simulation import Effects, simulate
from tests.mixed_models.attachment import by_r, r_is_here
from tests.trials.declared import analysed, frame_of, trial, value

EFFECTS = {
    "trust": Effects(50, dose=(3.0, -2.0), factors={"topic": 4.0}, moderation={"voice": 1.0}, residual_sd=6),
    "stayed": Effects(0.3, dose=(0.8,), factors={"topic": 0.7}),
    "warmth": Effects(50, dose=(3.0,), items=(0.0, 4.0), intercept_sd=5, residual_sd=4),
    "pain": Effects(50, dose=(3.0,), baseline=4.0, residual_sd=5),
    "mood": Effects(50, dose=(3.0, -2.0), time=1.0, time_dose=0.5, intercept_sd=5, slope_sd=2, residual_sd=4, dropout=0.15),
}
FULL = "dose + topic + voice + dose:topic + dose:voice"


@cache
def frame(outcome: str) -> OutcomeFrame:
    key = f"main:{outcome}"
    return frame_of(trial(), key, simulate(trial(), key, EFFECTS[outcome], 150, seed=9).tables)


def terms(outcome: str, form: str = "linear") -> list[str]:
    return fixed_terms(frame(outcome), form, full=True, heterogeneous=False)  # type: ignore[arg-type]


def compared(fit: models.Fit, theirs: object, rtol: float = 1e-7) -> None:
    table = fit.coefficient_table()
    for ours, name in (("estimate", "params"), ("se", "bse"), ("p", "pvalues")):
        np.testing.assert_allclose(table[ours], getattr(theirs, name)[table.index], rtol=rtol, atol=1e-10)
    np.testing.assert_allclose(table[["lower", "upper"]], theirs.conf_int().loc[table.index], rtol=rtol)  # type: ignore[attr-defined]


@pytest.mark.parametrize(("outcome", "written"), [("trust", f"value ~ {FULL} + I(dose ** 2)"), ("pain", f"value ~ {FULL} + I(dose ** 2) + baseline")])
def test_least_squares_is_that_of_statsmodels(outcome: str, written: str) -> None:
    fit, theirs = models.fit(frame(outcome), terms(outcome, "quadratic")), smf.ols(written, frame(outcome).rows).fit()
    compared(fit, theirs)
    assert fit.log_likelihood == pytest.approx(theirs.llf) and fit.rmse == pytest.approx(np.sqrt(np.mean(theirs.resid**2)))


def test_a_logit_is_that_of_statsmodels_on_the_log_odds_scale() -> None:
    fit, theirs = models.fit(frame("stayed"), terms("stayed")), smf.logit(f"value ~ {FULL}", frame("stayed").rows).fit(disp=False)
    compared(fit, theirs, rtol=1e-5)
    assert fit.log_likelihood == pytest.approx(theirs.llf)


def test_weights_are_precision_weights_and_quasibinomial_ones() -> None:
    weights = np.random.default_rng(1).uniform(1, 4, len(frame("trust").rows))
    theirs = smf.wls(f"value ~ {FULL}", frame("trust").rows, weights=weights).fit()
    compared(models.fit(frame("trust"), terms("trust"), weights=weights), theirs)
    rows = frame("stayed").rows
    fit = models.fit(frame("stayed"), terms("stayed"), weights=weights[: len(rows)])
    quasi = smf.glm(f"value ~ {FULL}", rows, family=sm.families.Binomial(), var_weights=weights[: len(rows)]).fit(scale="X2")
    table = fit.coefficient_table()
    np.testing.assert_allclose(table["se"], quasi.bse[table.index], rtol=1e-6)
    assert set(table["df"]) == {len(rows) - 6}, "a quasibinomial has the t distribution of its residual degrees of freedom"


@pytest.mark.parametrize(
    ("outcome", "extra", "random"), [("warmth", " + item", "1"), ("mood", " + time + dose:time + topic:time + voice:time", "time")]
)
def test_mixed_models_are_those_of_statsmodels(outcome: str, extra: str, random: str) -> None:
    rows = frame(outcome).rows
    fit = models.fit(frame(outcome), terms(outcome))
    theirs = smf.mixedlm(f"value ~ {FULL}{extra}", rows, groups=rows["participant"], re_formula=random).fit(reml=True, method="lbfgs")
    table = fit.coefficient_table()
    np.testing.assert_allclose(table["estimate"], theirs.fe_params[table.index], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(table["se"], theirs.bse_fe[table.index], rtol=5e-3)  # theirs are of the joint Hessian with the variances
    assert fit.log_likelihood == pytest.approx(theirs.llf, abs=1e-3)
    assert set(table["df"]) == {len(rows) - fit.parameters}, "coefficients have residual degrees of freedom, as the published ones"


def test_information_criteria_count_the_variance_among_the_parameters() -> None:
    fit, theirs = models.fit(frame("trust"), terms("trust")), smf.ols(f"value ~ {FULL}", frame("trust").rows).fit()
    k, n = 7, len(frame("trust").rows)
    aic, aicc, bic = information_criteria(fit)
    assert (aic, bic) == pytest.approx((theirs.aic + 2, theirs.bic + np.log(n))), "statsmodels leaves the variance out"
    assert aicc - aic == pytest.approx(2 * k * (k + 1) / (n - k - 1))


def test_a_profile_interval_ends_where_the_deviance_has_risen_by_its_quantile() -> None:
    fit = models.fit(frame("stayed"), terms("stayed"))
    assert isinstance(fit, LogitFit)
    table = fit.coefficient_table(profile=True)
    rows, plain = frame("stayed").rows, fit.coefficient_table()
    full = smf.glm(f"value ~ {FULL}", rows, family=sm.families.Binomial())
    others, best = np.delete(full.exog, full.exog_names.index("dose"), axis=1), full.fit().deviance
    for end in ("lower", "upper"):
        held = sm.GLM(rows["value"], others, family=sm.families.Binomial(), offset=table.loc["dose", end] * rows["dose"])
        assert held.fit().deviance - best == pytest.approx(stats.chi2.ppf(0.95, 1), abs=1e-6)
        assert table.loc["topic[T.music]", end] == plain.loc["topic[T.music]", end], "only terms of the dose alone are profiled"
    assert table.loc["dose", "lower"] != pytest.approx(plain.loc["dose", "lower"], abs=1e-5)


# --- what rows cannot show --------------------------------------------------------------------------------------------


def without_cell() -> OutcomeFrame:
    """Nobody hears music at doses above zero."""
    raw = simulate(trial(), "main:trust", EFFECTS["trust"], 150, seed=9).tables
    raw["answers"] = raw["answers"].query("not (topic == 'music' and dose > 0)")
    return frame_of(trial(), "main:trust", raw)


def test_a_coefficient_that_no_row_can_show_is_dropped_as_r_drops_it() -> None:
    found = without_cell()
    fit = models.fit(found, fixed_terms(found, "coarsened", full=True, heterogeneous=False))
    assert "category[T.high]:topic[T.music]" not in fit.design.names
    assert "category[T.middle]:topic[T.music]" in fit.design.names
    grid = ReferenceGrid(found, fit, coarsened=True)
    at_music, at_sport = (grid.mean("high", topic=topic) - grid.mean("low", topic=topic) for topic in ("music", "sport"))
    table = fit.contrast(np.array([at_music, at_sport]))
    assert np.isnan(table["estimate"][0]), "an empty cell has no mean"
    by_category = found.rows[found.rows["topic"].eq("sport")].groupby("category", observed=True)["value"].mean()
    assert table["estimate"][1] == pytest.approx(by_category["high"] - by_category["low"], abs=2.0), "up to the imbalance of voices"


def test_other_contrasts_of_the_same_rows_stay() -> None:
    _, _, table = analysed(without_cell())
    assert np.isnan(value(table, "RS × Topic: Interaction", "coarsened"))
    assert np.isfinite(value(table, "RS × Topic: Interaction")) and np.isfinite(value(table, "Voice: human - (non-human)"))


def arm_of_ones(topic: str | None) -> OutcomeFrame:
    """Everybody of the highest dose stays, or everybody of it in one topic."""
    raw = simulate(trial(), "main:stayed", EFFECTS["stayed"], 300, seed=10).tables
    chosen = raw["answers"]["dose"].eq(1.0) & (raw["answers"]["topic"].eq(topic) if topic else True)
    raw["answers"].loc[chosen, "stayed"] = 1.0
    return frame_of(trial(), "main:stayed", raw)


@pytest.mark.parametrize(("topic", "named"), [(None, "level"), ("music", r"level\[T.1\]:topic")])
def test_separation_is_found_where_it_is_and_nowhere_else(topic: str | None, named: str) -> None:
    """By level of the dose an arm of ones has an infinite log-odds; by a line through all doses it has not."""
    found = arm_of_ones(topic)
    with pytest.raises(SeparationFault, match=f"main:stayed: perfect separation .*{named}"):
        models.fit(found, fixed_terms(found, "levels", full=True, heterogeneous=False))
    assert np.isfinite(models.fit(found, fixed_terms(found, "linear", full=True, heterogeneous=False)).coefficients).all()


def test_a_far_outlier_is_no_separation() -> None:
    """Log-odds of forty are finite as long as some row speaks against them: a rule about their size would refuse the fit."""
    raw = simulate(trial(), "main:stayed", EFFECTS["stayed"], 300, seed=10).tables
    raw["answers"]["trust"] = np.random.default_rng(2).normal(size=300)
    raw["answers"].loc[0, ["trust", "stayed"]] = [60.0, 1.0]
    outcome = [{"name": "stayed", "table": "answers", "items": ["stayed"], "model": "logit", "designs": {"main": {"baseline": {"column": "trust"}}}}]
    raw["answers"]["stayed"] = np.where(raw["answers"]["trust"] + 0.3 * np.random.default_rng(3).logistic(size=300) > 0, 1.0, 0.0)
    found = frame_of(trial(outcomes=outcome), "main:stayed", raw)
    fit = models.fit(found, fixed_terms(found, "linear", full=True, heterogeneous=False))
    assert np.abs(fit.design.X @ fit.coefficients).max() > 25
    assert np.isfinite(fit.coefficient_table().to_numpy()[:, :2]).all()


# --- R ----------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(not r_is_here(), reason="R with lme4, lmerTest, pbkrtest, emmeans and jsonlite is not here")
def test_contrasts_of_a_mixed_model_are_those_of_emmeans(tmp_path: Path) -> None:
    rows: pd.DataFrame = frame("mood").rows
    rows[["value", "dose", "topic", "voice", "time", "participant"]].to_csv(tmp_path / "rows.csv", index=False)
    theirs: Any = by_r(str(Path(__file__).parent / "emmeans_contrasts.R"), str(tmp_path / "rows.csv"), str(tmp_path / "found.json"))
    _, _, table = analysed(frame("mood"), "quadratic")
    labels = ["RS: Avg(Pos) - Avg(Neg)", "Topic: music - sport", "RS × Topic: Interaction", "Relationship-Seeking × Time: Δ (S4 - S1)"]
    labels += ["Time: S4 - S1", "Slope: pos_λ"]
    for column, rtol in (("estimate", 1e-5), ("se", 1e-5), ("df", 1e-4)):
        np.testing.assert_allclose([value(table, label, column=column) for label in labels], theirs[column], rtol=rtol)
