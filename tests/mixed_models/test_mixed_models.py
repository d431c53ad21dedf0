"""Linear mixed models against lme4, lmerTest, pbkrtest and emmeans, against n x n algebra, and by what must leave a fit as it is."""

from __future__ import annotations

import json
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize

from relseek_assets.mixed_models import ConvergenceWarning, MixedFit, MixedModelError, RandomTerm, fit, fit_matrices
from tests.mixed_models import attachment

FOLDER = Path(__file__).parent
DESIGNS = json.loads((FOLDER / "lme4_designs.json").read_text())
CROSSED = json.loads((FOLDER / "lme4_crossed.json").read_text())


def title(design: dict[str, Any]) -> str:
    return f"{design['number']}-{design['kind']}-{'REML' if design['reml'] else 'ML'}"


def ours(design: dict[str, Any]) -> MixedFit:
    data = pd.DataFrame(design["data"])
    return fit(design["formula"], data, reml=design["reml"], weights="w" if design["kind"] == "weighted" else None)


def people(groups: int = 30, rows: int = 4, seed: int = 0) -> pd.DataFrame:
    """A panel with a random intercept and slope, some weeks missing."""
    draw = np.random.default_rng(seed)
    who, week = np.repeat(np.arange(groups), rows), np.tile(np.arange(1, rows + 1), groups)
    arm = np.where(who % 2, "treated", "control")
    y = 40 + 4 * (who % 2) + draw.normal(0, 5, groups)[who] + (1 + draw.normal(0, 2, groups)[who]) * week + draw.normal(0, 3, len(who))
    table = pd.DataFrame({"y": y, "arm": arm, "week": week, "who": [f"p{number:04d}" for number in who], "w": draw.uniform(0.5, 3, len(who))})
    return table[draw.random(len(table)) > 0.15].reset_index(drop=True)


PANEL = "y ~ arm * week + (1 + week | who)"


# --- lme4 -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("design", [*DESIGNS, *CROSSED], ids=title)
def test_estimates_are_those_of_lme4(design: dict[str, Any]) -> None:
    found, lme4 = ours(design), design["found"]
    assert found.converged
    assert found.log_likelihood == pytest.approx(lme4["log_likelihood"], abs=1e-6)
    np.testing.assert_allclose(found.coefficients, lme4["coefficients"], atol=1e-5)
    np.testing.assert_allclose(found.standard_errors, lme4["se"], rtol=1e-5)
    np.testing.assert_allclose(found.fitted, lme4["fitted"], atol=1e-4)
    assert [found.sigma, found.aic, found.bic, found.rmse] == pytest.approx([lme4[name] for name in ("sigma", "aic", "bic", "rmse")], rel=1e-6)
    assert found.singular == lme4["singular"]


@pytest.mark.parametrize("design", [*DESIGNS, *CROSSED], ids=title)
def test_variance_components_and_conditional_modes_are_those_of_lme4(design: dict[str, Any]) -> None:
    found, lme4 = ours(design), design["found"]
    theirs = pd.DataFrame(lme4["variances"])
    theirs["grp"] = theirs["grp"].str.replace(r"\.\d+$", "", regex=True)  # lme4 numbers the second term of a factor
    theirs[["var1", "var2"]] = theirs[["var1", "var2"]].replace("(Intercept)", "Intercept")
    keys = ["grp", "var1", "var2"]
    both = found.variances.merge(theirs, on=keys, suffixes=("", "_lme4"), validate="one_to_one")
    assert len(both) == len(theirs) == len(found.variances)
    np.testing.assert_allclose(both["vcov"].astype(float), both["vcov_lme4"].astype(float), rtol=2e-6, atol=2e-6)
    modes = pd.DataFrame(lme4["modes"]).replace({"term": {"(Intercept)": "Intercept"}})
    for (group, term), part in modes.groupby(["grpvar", "term"]):
        table = found.blups(group).set_index("level").loc[part["grp"]]
        np.testing.assert_allclose(table[term], part["condval"], atol=2e-5)
        np.testing.assert_allclose(np.sqrt(table[f"{term}_variance"]), part["condsd"], atol=2e-5)


@pytest.mark.parametrize("design", [*DESIGNS, *CROSSED], ids=title)
def test_satterthwaite_is_that_of_lmertest(design: dict[str, Any]) -> None:
    found = ours(design)
    table = found.contrast(np.eye(len(found.names)), "satterthwaite")
    np.testing.assert_allclose(table["df"], design["found"]["satterthwaite"], rtol=1e-4)  # theirs has numerical derivatives
    np.testing.assert_allclose(table["se"], found.standard_errors)


@pytest.mark.parametrize("design", [design for design in [*DESIGNS, *CROSSED] if "kr_df" in design["found"]], ids=title)
def test_kenward_roger_is_that_of_pbkrtest(design: dict[str, Any]) -> None:
    found = ours(design)
    table = found.contrast(np.eye(len(found.names)))
    np.testing.assert_allclose(table["df"], design["found"]["kr_df"], atol=1e-3)
    np.testing.assert_allclose(table["se"], design["found"]["kr_se"], rtol=1e-5)


@pytest.mark.slow
@pytest.mark.skipif(not attachment.r_is_here(), reason="R with lme4, lmerTest, pbkrtest, emmeans and jsonlite is not here")
def test_no_fit_of_200_designs_is_worse_than_lme4s(tmp_path: Path) -> None:
    designs = attachment.by_r("lme4_fixtures.R", "designs", "100", "299", str(tmp_path / "designs.json"))
    assert len(designs) == 200
    for design in designs:
        with warnings.catch_warnings():
            warnings.simplefilter("error", ConvergenceWarning)
            found = ours(design)
        assert found.converged, title(design)
        assert found.log_likelihood > design["found"]["log_likelihood"] - 1e-4, title(design)
        assert found.log_likelihood == pytest.approx(design["found"]["log_likelihood"], abs=1e-4), title(design)
        if "kr_df" in design["found"]:
            np.testing.assert_allclose(found.contrast(np.eye(len(found.names)))["df"], design["found"]["kr_df"], rtol=1e-4, err_msg=title(design))


# --- the attachment measures ------------------------------------------------------------------------------------------


@attachment.needs_release
def test_the_published_contrast_of_separation_distress_is_recomputed() -> None:
    rows = attachment.long_rows(attachment.panel(), "separation_distress")
    found = fit(attachment.formula("separation_distress", "cubic", full=True), rows)
    assert (found.n, len(found.blups())) == (7501, 1939)
    assert found.deviance == pytest.approx(67469.343492, abs=1e-6)
    L = attachment.contrast_rows(found, rows)[:1]
    (kenward_roger,) = found.contrast(L).itertuples()
    assert [kenward_roger.se, kenward_roger.df] == pytest.approx([1.3850889, 1949.19], abs=5e-3)
    assert [kenward_roger.lower, kenward_roger.upper] == pytest.approx([3.321291, 8.754113], abs=1e-6)
    assert found.contrast(L, "satterthwaite")[["lower", "upper"]].iloc[0].tolist() == pytest.approx([3.321434, 8.753970], abs=2e-6)
    assert found.contrast(L, "z")[["lower", "upper"]].iloc[0].tolist() == pytest.approx([3.3231, 8.7523], abs=6e-5)


@attachment.needs_release
def test_wald_intervals_of_coefficients_are_the_published_ones() -> None:
    rows = attachment.long_rows(attachment.panel(), "separation_distress")
    found = fit(attachment.formula("separation_distress", "cubic", full=False), rows)
    table = found.contrast(np.eye(len(found.names)), "residual").set_axis(list(found.names))
    published = {"lam": (9.4817, 4.513, 14.4504), "I(lam ** 2)": (-4.002, -6.8091, -1.1949), "I(lam ** 3)": (-7.9697, -13.4874, -2.4521)}
    for name, figures in published.items():
        assert table.loc[name, ["estimate", "lower", "upper"]].tolist() == pytest.approx(figures, abs=6e-5)


@pytest.mark.slow
@attachment.needs_release
@pytest.mark.skipif(not attachment.r_is_here(), reason="R with lme4, lmerTest, pbkrtest, emmeans and jsonlite is not here")
def test_the_48_attachment_fits_are_those_of_lme4_and_their_contrasts_those_of_emmeans(tmp_path: Path) -> None:
    theirs = attachment.by_r("lme4_attachment.R", str(attachment.measures()), str(tmp_path / "fits.json"))
    expected = {(row["construct"], row["dose"], row["full"], row["reml"]): row for row in theirs}
    assert len(expected) == 48
    for construct, dose, full, restricted, contrasts in attachment.all_fits(attachment.panel()):
        for found in (restricted, restricted.refit(reml=False)):
            lme4 = expected[construct, dose, full, found.reml]
            assert found.converged
            assert found.log_likelihood == pytest.approx(lme4["log_likelihood"], abs=1e-6)
            np.testing.assert_allclose(found.coefficients, lme4["coefficients"], atol=1e-5)
            np.testing.assert_allclose(found.standard_errors, lme4["se"], rtol=1e-5)
        emmeans = expected[construct, dose, full, True]["contrasts"]
        np.testing.assert_allclose(contrasts["estimate"], emmeans["estimate"], atol=1e-5)
        np.testing.assert_allclose(contrasts["se"], emmeans["se"], rtol=1e-5)
        np.testing.assert_allclose(contrasts["df"], emmeans["df"], rtol=1e-4)


# --- definitions ------------------------------------------------------------------------------------------------------


COMPONENTS = ("var1 == 'week'", "var1 == 'Intercept' and var2.isna()", "var2 == 'week'", "grp == 'Residual'")


def marginal(table: pd.DataFrame, found: MixedFit) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """X, y, V (n, n) and its derivatives by the variance components, of a PANEL fit weighted by w."""
    treated = (table["arm"] == "treated").to_numpy(float)
    week = table["week"].to_numpy(float)
    X = np.column_stack([np.ones(len(table)), treated, week, treated * week])
    same = table["who"].to_numpy()[:, None] == table["who"].to_numpy()[None]
    derivatives = np.array([same * 1.0, same * (week[:, None] + week[None]), same * np.outer(week, week), np.diag(1 / table["w"])])
    slope, intercept, both, residual = (found.variances.query(text)["vcov"].item() for text in COMPONENTS)
    components = np.array([intercept, both, slope, residual])
    return X, table["y"].to_numpy(), np.tensordot(components, derivatives, 1), derivatives


def test_weighted_log_likelihood_and_coefficients_are_those_of_the_marginal_normal() -> None:
    table = people()
    for reml in (True, False):
        found = fit(PANEL, table, reml=reml, weights="w")
        X, y, V, _ = marginal(table, found)
        information = X.T @ np.linalg.solve(V, X)
        beta = np.linalg.solve(information, X.T @ np.linalg.solve(V, y))
        left = y - X @ beta
        deviance = np.linalg.slogdet(V)[1] + left @ np.linalg.solve(V, left) + (len(y) - 4 * reml) * np.log(2 * np.pi)
        deviance += np.linalg.slogdet(information)[1] * reml
        assert found.deviance == pytest.approx(deviance, rel=1e-10)
        np.testing.assert_allclose(found.coefficients, beta, rtol=1e-8)
        np.testing.assert_allclose(found.covariance, np.linalg.inv(information), rtol=1e-8)


def test_weighted_kenward_roger_is_that_of_the_marginal_normal() -> None:
    """pbkrtest takes every weight to be one, so that the truth here is its definition written out with n x n matrices."""
    table = people()
    found = fit(PANEL, table, weights="w")
    X, _, V, derivatives = marginal(table, found)
    inverse = np.linalg.inv(V)
    phi = np.linalg.inv(X.T @ inverse @ X)
    GV = [inverse @ G for G in derivatives]
    P = [-X.T @ A @ inverse @ X for A in GV]
    Q = [[X.T @ A @ B @ inverse @ X for B in GV] for A in GV]
    information = [[np.trace(GV[r] @ GV[s]) - 2 * np.trace(phi @ Q[r][s]) + np.trace(phi @ P[r] @ phi @ P[s]) for s in range(4)] for r in range(4)]
    W = 2 * np.linalg.inv(information)
    inner = sum(W[r, s] * (Q[r][s] - P[r] @ phi @ P[s]) for r in range(4) for s in range(4))
    np.testing.assert_allclose(found.contrast(np.eye(4))["se"], np.sqrt(np.diag(phi + 2 * phi @ inner @ phi)), rtol=1e-7)
    c = np.array([0.0, 1, 0, 4])
    t = np.array([c @ phi @ A @ phi @ c / (c @ phi @ c) for A in P])
    A2 = t @ W @ t
    (row,) = found.contrast(c).itertuples()
    assert row.df == pytest.approx(_lb_ddf(A2), rel=1e-6)


def _lb_ddf(A2: float) -> float:
    """Kenward and Roger (1997), section 3, with l = 1: E and V of the scaled statistic, from these ρ and m."""
    B = 0.5 * (A2 + 6 * A2)
    g = (2 * A2 - 5 * A2) / (3 * A2)
    c1, c2, c3 = g / (3 + 2 * (1 - g)), (1 - g) / (3 + 2 * (1 - g)), (3 - g) / (3 + 2 * (1 - g))
    expectation = 1 / (1 - A2)
    variance = 2 * (1 + c1 * B) / ((1 - c2 * B) ** 2 * (1 - c3 * B))
    return 4 + 3 / (variance / (2 * expectation**2) - 1)


def test_a_balanced_random_intercept_has_the_closed_form() -> None:
    draw = np.random.default_rng(4)
    table = pd.DataFrame({"y": (draw.normal(0, 3, (20, 1)) + draw.normal(0, 2, (20, 5))).ravel(), "g": np.repeat(np.arange(20), 5)})
    found = fit("y ~ 1 + (1 | g)", table)
    means = table.groupby("g")["y"].mean()
    within = table.groupby("g")["y"].var().mean()
    assert found.sigma**2 == pytest.approx(within, rel=1e-7)
    assert found.variances["vcov"][0] == pytest.approx(means.var() - within / 5, rel=1e-7)
    (row,) = found.contrast([1]).itertuples()
    assert [row.estimate, row.se, row.df] == pytest.approx([means.mean(), np.sqrt(means.var() / 20), 19], rel=1e-7)


def test_two_rows_a_person_are_a_paired_t_test() -> None:
    draw = np.random.default_rng(5)
    person = draw.normal(0, 2, 25)
    table = pd.DataFrame({"y": np.r_[person + draw.normal(0, 1, 25), person + 0.7 + draw.normal(0, 1, 25)], "g": np.tile(np.arange(25), 2)})
    table["after"] = np.repeat([0, 1], 25)
    differences = table["y"][25:].to_numpy() - table["y"][:25].to_numpy()
    for method in ("kenward_roger", "satterthwaite"):
        (row,) = fit("y ~ after + (1 | g)", table).contrast([0, 1], method).itertuples()
        assert [row.estimate, row.se, row.df] == pytest.approx([differences.mean(), differences.std(ddof=1) / 5, 24], rel=1e-6)


def test_the_optimum_is_not_beaten_by_a_general_optimiser() -> None:
    for design in DESIGNS:
        found, data = ours(design), pd.DataFrame(design["data"])
        if "(1 | g)" in design["formula"] or design["kind"] == "weighted":
            continue
        dummies = pd.get_dummies(data["arm"]).to_numpy(float)[:, 1:]
        t = data["t"].to_numpy(float)[:, None]
        X = np.column_stack([np.ones(len(t)), data["x"], dummies, t, dummies * t])
        Z = np.hstack([same := pd.get_dummies(data["g"]).to_numpy(float), same * t])
        m = len(t) - X.shape[1] * design["reml"]

        def deviance(theta: np.ndarray, X: np.ndarray = X, Z: np.ndarray = Z, m: int = m, data: pd.DataFrame = data, design: dict = design) -> float:
            Lambda = np.array([[theta[0], 0], [theta[1], theta[2]]])
            V = np.eye(len(X)) + Z @ np.kron(Lambda @ Lambda.T, np.eye(Z.shape[1] // 2)) @ Z.T
            information = X.T @ np.linalg.solve(V, X)
            left = data["y"] - X @ np.linalg.solve(information, X.T @ np.linalg.solve(V, data["y"]))
            rss = left @ np.linalg.solve(V, left)
            return np.linalg.slogdet(V)[1] + m * (1 + np.log(2 * np.pi * rss / m)) + design["reml"] * np.linalg.slogdet(information)[1]

        assert deviance(found.theta) == pytest.approx(found.deviance, abs=1e-7)
        if design["number"] in (4, 13):
            best = min(optimize.minimize(deviance, start, method="Nelder-Mead").fun for start in ([1, 0, 1], [1, 0.3, 0.01], [0.1, 0.0, 0.1]))
            assert found.deviance <= best + 1e-8


# --- what leaves a fit as it is ---------------------------------------------------------------------------------------


@settings(max_examples=12, deadline=None)
@given(
    shift=st.floats(-1e4, 1e4),
    scale=st.floats(1e-3, 1e3),
    unit=st.floats(1e-2, 1e3),
    origin=st.floats(-50, 50),
    seed=st.integers(0, 5),
    reml=st.booleans(),
)
def test_units_and_origin_of_response_and_time_change_only_what_they_must(
    shift: float, scale: float, unit: float, origin: float, seed: int, reml: bool
) -> None:
    table = people(seed=seed)
    moved = table.assign(y=shift + scale * table["y"], week=unit * (table["week"] + origin))
    one, other = fit(PANEL, table, reml=reml), fit(PANEL, moved, reml=reml)
    m = one.n - 4 * reml
    jacobian = -m * np.log(scale) - reml * 2 * np.log(unit)
    assert other.log_likelihood == pytest.approx(one.log_likelihood + jacobian, abs=1e-6)
    assert other.sigma == pytest.approx(scale * one.sigma, rel=1e-5)
    assert other.singular == one.singular
    for method in ("satterthwaite", "kenward_roger")[: 1 + reml]:
        at_week_two = one.contrast([0, 1, 0, 2], method).iloc[0]
        again = other.contrast([0, 1, 0, unit * (2 + origin)], method).iloc[0]
        assert [again["estimate"], again["se"]] == pytest.approx([scale * at_week_two["estimate"], scale * at_week_two["se"]], rel=1e-4, abs=1e-8)
        assert [again["df"], again["p"]] == pytest.approx([at_week_two["df"], at_week_two["p"]], rel=1e-4)


def test_the_order_of_rows_does_not_matter() -> None:
    table = people()
    one, other = fit(PANEL, table), fit(PANEL, table.sample(frac=1, random_state=3))
    assert other.log_likelihood == pytest.approx(one.log_likelihood, abs=1e-9)
    np.testing.assert_allclose(other.coefficients, one.coefficients, rtol=1e-7)
    pd.testing.assert_frame_equal(other.blups(), one.blups(), rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(other.fitted, one.fitted[table.sample(frac=1, random_state=3).index], rtol=1e-6)


def test_weights_of_one_are_no_weights_and_a_common_factor_goes_into_sigma() -> None:
    table = people()
    one, ones = fit(PANEL, table), fit(PANEL, table, weights=np.ones(len(table)))
    np.testing.assert_array_equal(ones.coefficients, one.coefficients)
    four = fit(PANEL, table, weights=np.full(len(table), 4.0))
    assert four.sigma == pytest.approx(2 * one.sigma, rel=1e-7)
    assert four.log_likelihood == pytest.approx(one.log_likelihood, abs=1e-8)
    assert four.contrast([0, 1, 0, 4]).iloc[0].tolist() == pytest.approx(one.contrast([0, 1, 0, 4]).iloc[0].tolist(), rel=1e-6)


def test_a_weight_of_two_is_the_mean_of_two_rows() -> None:
    """The differences within pairs are made to estimate the same σ, so that pairs and weighted means have their optimum in common."""
    table = people()
    mean = fit(PANEL, table, weights=np.full(len(table), 2.0))
    apart = mean.sigma / np.sqrt(2)
    pairs = fit(PANEL, pd.concat([table.assign(y=table["y"] - apart), table.assign(y=table["y"] + apart)]))
    assert pairs.sigma == pytest.approx(mean.sigma, rel=1e-6)
    np.testing.assert_allclose(pairs.theta, mean.theta, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(pairs.coefficients, mean.coefficients, rtol=1e-6)
    np.testing.assert_allclose(pairs.covariance, mean.covariance, rtol=1e-5)


def _panel(table: pd.DataFrame) -> tuple[np.ndarray, np.ndarray, list[str], list[RandomTerm]]:
    treated, week = (table["arm"] == "treated").to_numpy(float), table["week"].to_numpy(float)
    codes, _ = pd.factorize(table["who"], sort=True)
    X = np.column_stack([np.ones(len(table)), treated, week, treated * week])
    term = RandomTerm(codes, np.column_stack([np.ones(len(table)), week]), ("Intercept", "week"), "who")
    return table["y"].to_numpy(), X, ["1", "treated", "week", "treated:week"], [term]


def test_crossed_algebra_and_block_algebra_agree() -> None:
    """The same model as two terms of one factor (blocks) and of two factors that are the same up to the numbering of levels (dense)."""
    y, X, names, (term,) = _panel(people())
    reverse = term.codes.max() - term.codes
    slopes = RandomTerm(term.codes, term.Z[:, 1:], ("week",), "who")
    crossed = RandomTerm(reverse, term.Z[:, 1:], ("week",), "who again")
    intercepts = RandomTerm(term.codes, term.Z[:, :1], ("Intercept",), "who")
    block, dense = fit_matrices(y, X, names, [intercepts, slopes]), fit_matrices(y, X, names, [intercepts, crossed])
    assert dense.log_likelihood == pytest.approx(block.log_likelihood, abs=1e-9)
    for method in ("kenward_roger", "satterthwaite"):
        pd.testing.assert_frame_equal(dense.contrast(np.eye(4), method), block.contrast(np.eye(4), method), rtol=1e-7)


def test_refitting_is_fitting_by_the_other_criterion() -> None:
    table = people()
    one, other = fit(PANEL, table, reml=False), fit(PANEL, table).refit(reml=False)
    assert (other.reml, other.log_likelihood) == (False, one.log_likelihood)
    np.testing.assert_array_equal(other.coefficients, one.coefficients)


# --- tables -----------------------------------------------------------------------------------------------------------


def test_columns_that_depend_on_earlier_ones_are_dropped_and_named() -> None:
    table = people()
    table["month"], table["nothing"] = table["week"] / 4 + 1, 0.0
    found = fit("y ~ arm + week + month + nothing + arm:week + (1 | who)", table)
    assert found.dropped == ("month", "nothing")
    assert found.names == ("Intercept", "arm[T.treated]", "week", "arm[T.treated]:week")
    clean = fit("y ~ arm + week + arm:week + (1 | who)", table)
    np.testing.assert_allclose(found.coefficients, clean.coefficients, rtol=1e-8)
    assert found.parameters == clean.parameters


def test_rows_with_missing_values_are_left_out_and_counted() -> None:
    table = people().convert_dtypes()
    table["unused"] = np.nan
    holes = table.copy()
    holes.loc[[1, 5], "y"], holes.loc[[5, 9], "week"], holes.loc[12, "arm"], holes.loc[20, "who"] = pd.NA, pd.NA, pd.NA, pd.NA
    found, expected = fit(PANEL, holes), fit(PANEL, table.drop(index=[1, 5, 9, 12, 20]))
    assert (found.omitted, expected.omitted) == (5, 0)
    assert found.n == len(table) - 5 == len(found.residuals)
    np.testing.assert_array_equal(found.coefficients, expected.coefficients)


def test_levels_without_rows_do_not_count() -> None:
    table = people()
    table["arm"] = pd.Categorical(table["arm"], ["absent", "control", "treated"])
    table["who"] = pd.Categorical(table["who"], [*sorted(set(table["who"])), "nobody"])
    found = fit(PANEL, table)
    assert found.names == ("Intercept", "arm[T.treated]", "week", "arm[T.treated]:week")
    assert "nobody" not in set(found.blups()["level"])


@pytest.mark.parametrize(
    ("formula", "change", "message"),
    [
        ("y ~ week", {}, "no random term"),
        ("week + (1 | who)", {}, "response ~ fixed terms"),
        ("y ~ week + (week || who)", {}, r"cannot read the random term"),
        ("y ~ week + 1 | who", {}, r"cannot read the random term"),
        ("y ~ month + (1 | who)", {}, "no column month"),
        ("y ~ week + (1 | school)", {}, "no column school"),
        ("y ~ week + (1 | who)", {"y": 3.0}, "all .* values are 3"),
        ("y ~ week + (1 | who)", {"y": lambda table: 2.0 * table["week"] + 1}, "fixed effects reproduce every value"),
        ("arm ~ week + (1 | who)", {}, "must be one number a row"),
        ("y ~ week + (1 | who)", {"who": "p1"}, "one level"),
        ("y ~ week + (1 | who)", {"who": lambda table: np.arange(len(table))}, "with one row a level"),
        ("y ~ week + (1 + week | who)", {"who": lambda table: np.arange(len(table)) // 2}, "random effects for"),
        ("y ~ week + (1 | who)", {"y": np.nan}, "0 of .* rows are complete"),
        ("y ~ np.log(week - 1) + (1 | who)", {}, "missing or infinite"),
    ],
)
def test_what_carries_no_such_model_is_refused(formula: str, change: dict[str, Any], message: str) -> None:
    with pytest.raises(MixedModelError, match=message), np.errstate(divide="ignore"):
        fit(formula, people().assign(**change))


def test_matrices_that_carry_no_model_are_refused() -> None:
    y, X, names, terms = _panel(people())
    with pytest.raises(MixedModelError, match="column 'week' of X has 1 values"):
        fit_matrices(y, np.where((np.arange(len(y)) == 3)[:, None] & (np.arange(4) == 2), np.nan, X), names, terms)
    with pytest.raises(MixedModelError, match="weights must be above 0"):
        fit_matrices(y, X, names, terms, weights=np.arange(len(y)))
    with pytest.raises(MixedModelError, match="fewer than rows"):
        fit_matrices(y[:4], X[:4], names, [RandomTerm(np.array([0, 0, 1, 1]), np.ones((4, 1)), ("Intercept",), "g")])
    with pytest.raises(MixedModelError, match="1 observations"):
        fit_matrices(y[:1], X[:1], names, terms)
    with pytest.raises(MixedModelError, match="do not belong together"):
        fit_matrices(y, X, names[:3], terms)
    with pytest.raises(MixedModelError, match="each of them used"):
        fit_matrices(y, X, names, [RandomTerm(terms[0].codes * 2, terms[0].Z, terms[0].names, "who")])


def test_kenward_roger_is_refused_to_maximum_likelihood() -> None:
    with pytest.raises(MixedModelError, match=r"refit\(reml=True\)"):
        fit(PANEL, people(), reml=False).contrast(np.eye(4))


def test_a_response_that_groups_reproduce_is_not_fitted_in_silence() -> None:
    table = people()
    table["y"] = table.groupby("who")["y"].transform("mean")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            found = fit("y ~ 1 + (1 | who)", table)
        except MixedModelError as fault:
            assert "residual variance" in str(fault)
        else:
            assert not found.converged
            assert any(issubclass(warning.category, ConvergenceWarning) for warning in caught)


def test_the_summary_says_what_was_fitted_and_what_was_left_out() -> None:
    table = people().assign(month=lambda rows: rows["week"] / 4)
    table.loc[0, "y"] = np.nan
    found = fit("y ~ week + month + (1 + week | who)", table)
    text = found.summary()
    expected = [
        "REML",
        "y ~ week + month + (1 + week | who)",
        f"{found.aic:.2f}",
        "other columns: month",
        "missing values: 1",
        f"n {found.n}, who 30",
    ]
    for part in expected:
        assert part in text
    assert f"{found.contrast([0, 1], 'satterthwaite')['df'][0]:.4f}" in text


# --- scaling ----------------------------------------------------------------------------------------------------------


def test_ten_times_the_participants_take_less_than_twelve_times_as_long() -> None:
    def seconds(groups: int) -> float:
        table = people(groups)
        spent = []
        for _ in range(5):
            begin = time.process_time()
            fit(PANEL, table).contrast([0, 1, 0, 4])
            spent.append(time.process_time() - begin)
        return min(spent)

    seconds(200)
    assert seconds(20_000) < 12 * seconds(2_000)
