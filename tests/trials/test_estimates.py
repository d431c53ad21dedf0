"""Tables of an outcome: equivalence against statsmodels, the bootstrap against the sandwich, curves against means, robustness against refits."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pandas as pd
import pytest
import statsmodels.api as sm
import statsmodels.formula.api as smf
from scipy import stats
from statsmodels.stats.proportion import proportion_confint
from statsmodels.stats.weightstats import ttost_ind

from relseek_assets.trials import estimates, models, tables
from relseek_assets.trials.bootstrap import bayesian_bootstrap
from relseek_assets.trials.contrasts import ReferenceGrid
from relseek_assets.trials.forms import Specification
from relseek_assets.trials.formulas import fixed_terms
from relseek_assets.trials.frames import OutcomeFrame, covariates_table, with_covariates
from relseek_assets.trials.models import Fit, MixedModelFit
from relseek_assets.trials.simulation import Effects, simulate
from relseek_resources.storage import TableSchema
from tests.trials.declared import TABLES, analysed, frame_of, trial, value

EFFECT = "RS: Avg(Pos) - Avg(Neg)"
EFFECTS = {
    "trust": Effects(50, dose=(3.0,), factors={"topic": 4.0}, residual_sd=6),
    "stayed": Effects(0.3, dose=(0.8,), factors={"topic": 0.7}),
    "warmth": Effects(50, dose=(3.0,), items=(0.0, 4.0), intercept_sd=5, residual_sd=4),
    "pain": Effects(50, dose=(3.0,), baseline=4.0, residual_sd=5),
    "mood": Effects(50, dose=(3.0,), time=1.0, time_dose=0.5, intercept_sd=5, slope_sd=2, residual_sd=4, dropout=0.15),
}
LINEAR = Specification("linear", "linear", False, None, pd.DataFrame())


@cache
def frame(outcome: str, participants: int = 120) -> OutcomeFrame:
    key = f"main:{outcome}"
    return frame_of(trial(), key, simulate(trial(), key, EFFECTS[outcome], participants, seed=11).tables)


def stored(table: pd.DataFrame, schema: TableSchema) -> None:
    """What the store would refuse is refused here."""
    schema.to_arrow(table[list(schema.names)], schema.name)


# --- every table ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("outcome", EFFECTS)
def test_the_tables_of_an_outcome_have_their_declared_shape_and_agree(outcome: str) -> None:
    forms = estimates.forms_table(frame(outcome))
    stored(forms, tables.FORMS)
    assert forms["selected"].sum() == forms["selected_by_aic"].sum() == 1
    specification = estimates.specification_of(forms)
    fits = estimates.fit_all(frame(outcome), specification)
    written, contrasts = estimates.fits_table(frame(outcome), specification, fits), estimates.contrasts_table(frame(outcome), fits)
    stored(written, tables.FITS)
    stored(contrasts, tables.CONTRASTS)
    assert len(set(written["model"])) == 6
    thetas = estimates.thetas_of(written)
    for name in ("full_continuous", "additive_continuous"):
        again = estimates.fit_one(frame(outcome), specification, name, thetas.get(name))
        table = written[written["model"].eq(name)]
        np.testing.assert_allclose(table["estimate"], again.coefficients, rtol=1e-6, atol=1e-7)
    family = {"stayed": "logit", "trust": "ols", "pain": "ols"}.get(outcome, "lmm")
    methods = {"ols": {"t"}, "logit": {"Wald z", "Wald z, profile interval"}, "lmm": {"Kenward-Roger", "Wald t, residual df"}}
    assert set(written["family"]) == {family} and set(contrasts["method"]) == methods[family]
    assert contrasts["df"].isna().all() == (family == "logit")


def test_a_contrast_that_rows_cannot_show_is_null_and_the_table_is_written() -> None:
    raw = simulate(trial(), "main:trust", EFFECTS["trust"], 120, seed=11).tables
    raw["answers"] = raw["answers"].query("not (topic == 'music' and dose > 0)")
    found = frame_of(trial(), "main:trust", raw)
    table = estimates.contrasts_table(found, estimates.fit_all(found, LINEAR))
    lost = table[table["estimate"].isna()]
    assert set(lost["variant"]) == {"coarsened"} and lost["p_raw"].isna().all()
    stored(table, tables.CONTRASTS)


# --- equivalence ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("margin", [1.0, 3.0, 8.0])
def test_equivalence_of_two_arms_is_that_of_two_one_sided_t_tests(margin: float) -> None:
    declared = trial(dose={"column": "arm", "values": {"control": 0.0, "treated": 1.0}}, factors=[])
    raw = simulate(declared, "main:trust", Effects(50, dose=(1.0,), residual_sd=6), 90, seed=12).tables
    found = frame_of(declared, "main:trust", raw)
    table = estimates.contrasts_table(found, estimates.fit_all(found, LINEAR))
    (row,) = estimates.equivalence_table(table, margin).itertuples()
    stored(estimates.equivalence_table(table, margin), tables.EQUIVALENCE)
    arms = [part["value"].to_numpy() for _, part in found.rows.groupby("dose")]
    p, lower, upper = ttost_ind(arms[1], arms[0], -margin, margin, usevar="pooled")
    assert row.p == pytest.approx(p) == pytest.approx(max(lower[1], upper[1]))
    assert row.equivalent == (p < 0.05) == (-margin < row.lower and row.upper < margin), "the 90% interval says the same"
    interval = stats.ttest_ind(arms[1], arms[0]).confidence_interval(0.9)
    assert (row.lower, row.upper) == pytest.approx((interval.low, interval.high))


def test_equivalence_is_tested_of_primary_main_effects_with_their_own_degrees_of_freedom() -> None:
    table = estimates.contrasts_table(frame("warmth"), estimates.fit_all(frame("warmth"), LINEAR))
    found = estimates.equivalence_table(table, 2.0).set_index("contrast")
    assert set(found.index) == {EFFECT, "Topic: music - sport", "Voice: human - (non-human)"}
    row = found.loc[EFFECT]
    assert row["df"] == value(table, EFFECT, column="df") and row["df"] < 120, "of participants and not of rows"
    assert row["upper"] - row["estimate"] == pytest.approx(stats.t.ppf(0.95, row["df"]) * row["se"])


# --- bootstrap --------------------------------------------------------------------------------------------------------


def heteroscedastic(outcome: str) -> tuple[OutcomeFrame, Fit, np.ndarray]:
    """Answers that spread five times as far at the ends of the dose as at its middle, which least squares does not know."""
    key = f"main:{outcome}"
    simulation = simulate(trial(), key, EFFECTS[outcome], 400, seed=13)
    found = frame_of(trial(), key, simulation.tables)
    if outcome != "stayed":
        found.rows["value"] = simulation.expected + (1 + 4 * np.abs(found.rows["dose"])) * (found.rows["value"] - simulation.expected)
    fit = models.fit(found, fixed_terms(found, "linear", full=True, heterogeneous=False))
    grid = ReferenceGrid(found, fit, coarsened=False)
    return found, fit, grid.mean((0.5, 1.0)) - grid.mean((-1.0, -0.5))


def sandwich(found: OutcomeFrame, fit: Fit) -> np.ndarray:
    """The covariance of the coefficients that needs no equal variances; of people for a mixed model, at its own weights of their rows."""
    y, X = found.rows["value"].to_numpy(), fit.design.X
    if isinstance(fit, MixedModelFit):
        bread, meat = np.zeros((X.shape[1], X.shape[1])), np.zeros((X.shape[1], X.shape[1]))
        for rows in found.rows.groupby("participant").indices.values():
            Z = fit.Z[rows]
            weight = np.linalg.inv(np.eye(len(rows)) + Z @ fit.relative_covariance @ Z.T)
            score = X[rows].T @ weight @ (y[rows] - X[rows] @ fit.coefficients)
            bread, meat = bread + X[rows].T @ weight @ X[rows], meat + np.outer(score, score)
        return np.linalg.solve(bread, np.linalg.solve(bread, meat).T)
    family = sm.families.Binomial() if found.outcome.model == "logit" else sm.families.Gaussian()
    return np.asarray(sm.GLM(y, X, family=family).fit(cov_type="HC0").cov_params())


@pytest.mark.parametrize("outcome", ["trust", "warmth", "mood", "stayed"])
def test_the_bootstrap_has_the_width_of_the_sandwich(outcome: str) -> None:
    found, fit, L = heteroscedastic(outcome)
    lower, upper = bayesian_bootstrap(found.rows, fit, L, None, 4000, seed=1)
    robust = float(np.sqrt(L @ sandwich(found, fit) @ L))
    assert upper - lower == pytest.approx(2 * 1.96 * robust, rel=0.06)
    assert (lower + upper) / 2 == pytest.approx(float(L @ fit.coefficients), abs=0.3 * robust)
    if outcome == "trust":
        plain = fit.contrast(L[None, :])["se"].item()
        assert robust > 1.2 * plain, "an interval of equal variances would be too short"


def test_the_bootstrap_of_weighted_rows_is_around_the_weighted_estimate() -> None:
    found = frame("trust", 400)
    weights = np.where(found.rows["topic"].eq("music"), 1.0, 5.0) * np.where(found.rows["dose"] > 0, 2.0, 1.0)
    fit = models.fit(found, fixed_terms(found, "linear", full=True, heterogeneous=False), weights=weights)
    grid = ReferenceGrid(found, fit, coarsened=False)
    L = grid.mean((0.5, 1.0)) - grid.mean((-1.0, -0.5))
    lower, upper = bayesian_bootstrap(found.rows, fit, L, weights, 4000, seed=1)
    robust = sm.WLS(found.rows["value"], fit.design.X, weights=weights).fit(cov_type="HC0")
    assert (lower + upper) / 2 == pytest.approx(float(L @ np.asarray(robust.params)), abs=0.2)
    assert upper - lower == pytest.approx(2 * 1.96 * np.sqrt(L @ np.asarray(robust.cov_params()) @ L), rel=0.06)


def test_the_same_seed_draws_the_same_interval() -> None:
    found, fit, L = heteroscedastic("trust")
    one, same, other = (bayesian_bootstrap(found.rows, fit, L, None, 200, seed=seed) for seed in (1, 1, 2))
    assert one == same != other


# --- robustness -------------------------------------------------------------------------------------------------------


def people(found: OutcomeFrame, declared: Any) -> OutcomeFrame:
    names = sorted(set(found.rows["participant"]))
    draw = np.random.default_rng(5)
    table = pd.DataFrame({"participant": names, "age": draw.normal(40, 10, len(names)), "school": draw.choice(["long", "short"], len(names))})
    table.loc[3, "age"] = np.nan
    return with_covariates(OutcomeFrame(found.study, found.outcome, declared, found.rows, found.factors), covariates_table(table))


@cache
def declared_with_covariates() -> Any:
    columns = [{"names": ["age", "weight"]}, {"names": ["school"], "kind": "string"}]
    settings = {"demographics": ["age"], "preferences": ["school"], "weights": {"table": "people", "column": "weight"}}
    return trial(tables=TABLES | {"people": {"file": "people.csv", "arms": "none", "columns": columns}}, participants=["people"], robustness=settings)


@pytest.mark.parametrize("outcome", ["trust", "warmth"])
def test_specifications_differ_by_what_they_add_and_are_compared_with_the_full_one(outcome: str) -> None:
    found = people(frame(outcome), declared_with_covariates())
    draw = np.random.default_rng(6).uniform(1, 3, 120)
    weights = draw[pd.factorize(found.rows["participant"])[0]]
    table = estimates.robustness_table(found, LINEAR, weights, 99, 1, {})
    stored(table, tables.ROBUSTNESS)
    names = ["additive", "full", "full + demographics", "full + preferences", "full + attrition weights"]
    assert list(dict.fromkeys(table["specification"])) == names
    primary = table[table["term"].eq(EFFECT) & table["form"].eq("linear")].set_index("specification")
    contrasts = estimates.contrasts_table(found, estimates.fit_all(found, LINEAR))
    for column in ("estimate", "se", "df"):
        assert primary.loc["full", column] == pytest.approx(value(contrasts, EFFECT, column=column), rel=1e-6)
    assert primary.loc["full", "change_percent"] == 0
    demographics = primary.loc["full + demographics"]
    assert demographics["participants"] == 119, "who does not say her age is left out of this specification alone"
    assert demographics["change_percent"] == pytest.approx(100 * (demographics["estimate"] / primary.loc["full", "estimate"] - 1))
    resampled = table["bootstrap_lower"].notna()
    assert set(table.loc[resampled, "specification"]) == {"full", "full + attrition weights"} and set(table.loc[resampled, "term"]) == {EFFECT}
    if outcome == "trust":
        full = "dose + topic + voice + dose:topic + dose:voice"
        theirs = smf.wls(f"value ~ {full}", found.rows, weights=weights).fit()
        row = table[table["specification"].eq(names[4]) & table["term"].eq("dose") & table["form"].eq("linear")].iloc[0]
        assert (row["estimate"], row["se"]) == pytest.approx((theirs.params["dose"], theirs.bse["dose"]))
        aged = smf.ols(f"value ~ {full} + age", found.rows).fit()
        row = table[table["specification"].eq(names[2]) & table["term"].eq("dose") & table["form"].eq("linear")].iloc[0]
        assert (row["estimate"], row["se"]) == pytest.approx((aged.params["dose"], aged.bse["dose"]))


def test_weights_of_one_are_the_full_specification() -> None:
    table = estimates.robustness_table(frame("warmth"), LINEAR, np.ones(240), 99, 1, {}).set_index(["specification", "form", "term"])
    columns = ["estimate", "se", "df", "lower", "upper", "bootstrap_lower"]
    pd.testing.assert_frame_equal(table.loc["full + attrition weights", columns], table.loc["full", columns], rtol=1e-6)


# --- curves -----------------------------------------------------------------------------------------------------------


def test_a_curve_has_the_means_of_the_arms_and_their_t_intervals() -> None:
    table = estimates.dose_response_curve(frame("trust"), estimates.fit_one(frame("trust"), LINEAR, "additive_continuous"))
    stored(table, tables.CURVES)
    raw = table[table["kind"].eq("raw")].set_index("dose")
    for dose, part in frame("trust").rows.groupby("dose"):
        interval = stats.ttest_1samp(part["value"], 0).confidence_interval()
        assert raw.loc[dose, ["estimate", "lower", "upper"]].tolist() == pytest.approx([part["value"].mean(), interval.low, interval.high])
    model = table[table["kind"].eq("model")].set_index("dose")["estimate"]
    theirs = smf.ols("value ~ dose + topic + voice", frame("trust").rows).fit().params
    assert (model.iloc[-1] - model.iloc[0]) / 2 == pytest.approx(theirs["dose"])
    halves = theirs["topic[T.music]"] / 2 + theirs["voice[T.human]"] / 2
    assert model.iloc[0] == pytest.approx(theirs["Intercept"] - theirs["dose"] + halves)


def test_a_curve_of_a_logit_is_on_the_scale_of_shares_with_wilsons_interval() -> None:
    table = estimates.dose_response_curve(frame("stayed"), estimates.fit_one(frame("stayed"), LINEAR, "additive_continuous"))
    stored(table, tables.CURVES)
    raw = table[table["kind"].eq("raw")].set_index("dose")
    for dose, part in frame("stayed").rows.groupby("dose"):
        lower, upper = proportion_confint(part["value"].sum(), len(part), method="wilson")
        assert raw.loc[dose, ["estimate", "lower", "upper"]].tolist() == pytest.approx([part["value"].mean(), lower, upper])
    model = table[table["kind"].eq("model")]
    assert model["estimate"].between(model["lower"], model["upper"]).all() and model["lower"].gt(0).all() and model["upper"].lt(1).all()


def test_trajectories_grow_by_the_slopes_of_their_dose() -> None:
    table = estimates.trajectories(frame("mood"), estimates.fit_one(frame("mood"), LINEAR, "full_continuous"))
    stored(table, tables.TRAJECTORIES)
    _, _, contrasts = analysed(frame("mood"))
    means = table[table["kind"].eq("model")].set_index(["dose", "time"])["estimate"]
    assert (means[1.0, 4.0] - means[1.0, 1.0]) / 3 == pytest.approx(value(contrasts, "Slope: pos_λ", "full"))
    raw = table[table["kind"].eq("raw")].set_index(["dose", "time"])
    cell = frame("mood").rows.query("dose == 0.5 and time == 3")["value"]
    assert raw.loc[(0.5, 3.0), "estimate"] == pytest.approx(cell.mean()) and raw.loc[(0.5, 3.0), "n"] == len(cell)
