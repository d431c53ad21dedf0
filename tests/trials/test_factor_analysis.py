"""Factor analysis against R's psych on simulated answers (fixtures/psych.R), scipy, closed forms and the published fit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from relseek_assets.trials import factor_analysis as fa
from relseek_assets.trials.factor_analysis import FactorError

FIXTURES = Path(__file__).parent / "fixtures"
N = 700


@pytest.fixture(scope="module")
def answers() -> np.ndarray:
    return pd.read_csv(FIXTURES / "psych_items.csv").to_numpy(float)


@pytest.fixture(scope="module")
def psych() -> dict[str, Any]:
    return json.loads((FIXTURES / "psych.json").read_text())


@pytest.fixture(scope="module")
def rho(psych: dict[str, Any]) -> np.ndarray:
    return np.array(psych["rho"])


@pytest.mark.parametrize("correlation", [-0.97, -0.4, 0.0, 0.3, 0.9])
def test_the_bivariate_normal_is_scipys(correlation: float) -> None:
    points = np.array([-2.1, -0.5, 0.0, 0.4, 1.7])
    found = fa.bivariate_normal(points[:, None], points[None, :], correlation)
    joint = stats.multivariate_normal([0, 0], [[1, correlation], [correlation, 1]])
    for i, h in enumerate(points):
        for j, k in enumerate(points):
            assert found[i, j] == pytest.approx(joint.cdf([h, k]), abs=2e-6), (h, k)
    assert found[2, 2] == pytest.approx(0.25 + np.arcsin(correlation) / (2 * np.pi), abs=1e-15)


def test_polychoric_correlations_are_psychs(answers: np.ndarray, rho: np.ndarray) -> None:
    np.testing.assert_allclose(fa.polychoric(answers), rho, atol=1e-8)


def test_a_fourfold_table_split_at_the_medians_has_sheppards_correlation() -> None:
    # Sheppard (1899): P(both above) = 1/4 + arcsin(rho) / 2 pi.
    share = 0.25 + np.arcsin(0.5) / (2 * np.pi)
    found = fa.polychoric_pair(np.array([[share, 0.5 - share], [0.5 - share, share]]) * 1e6)
    assert found == pytest.approx(0.5, abs=2e-4)


def test_items_that_never_vary_together_are_named() -> None:
    items = np.array([[1, 2, np.nan], [2, 1, np.nan], [1, 1, 3.0], [2, np.nan, 4.0]])
    with pytest.raises(FactorError, match="items 1 and 2"):
        fa.polychoric(items)


def test_an_improper_matrix_is_smoothed_to_a_correlation_matrix() -> None:
    generator = np.random.default_rng(1)
    latent = generator.standard_normal((60, 1)) + 0.15 * generator.standard_normal((60, 8))
    found = fa.polychoric(np.digitize(latent, [-0.8, 0.2, 1.0]).astype(float))
    assert np.linalg.eigvalsh(found)[0] > 0
    np.testing.assert_allclose(np.diag(found), 1.0)


def test_oblique_factors_are_psychs(rho: np.ndarray, psych: dict[str, Any]) -> None:
    found, expected = fa.factor_analysis(rho, 2, "quartimin"), psych["oblique"]
    # GPArotation stops at a gradient of 1e-5.
    np.testing.assert_allclose(found.loadings, expected["loadings"], atol=1e-5)
    np.testing.assert_allclose(found.correlations, expected["phi"], atol=1e-5)
    np.testing.assert_allclose(found.variance, expected["variance"], atol=1e-5)


def test_varimax_factors_are_psychs(rho: np.ndarray, psych: dict[str, Any]) -> None:
    # The rotation stops early, and psych's starts from loadings that differ in the sixth decimal.
    np.testing.assert_allclose(fa.factor_analysis(rho, 3, "varimax").loadings, psych["varimax"], atol=2e-4)


def test_fit_is_psychs(rho: np.ndarray, psych: dict[str, Any]) -> None:
    found, expected = fa.factor_fit(rho, fa.factor_analysis(rho, 2, "quartimin"), N), psych["oblique"]
    for name in ("chi_square", "dof", "rmsr", "rmsea", "tli", "bic"):
        assert getattr(found, name) == pytest.approx(expected[name], rel=1e-5), name
    assert found.kmo == pytest.approx(psych["kmo"], abs=1e-8)
    assert (found.bartlett_chi_square, found.bartlett_dof) == (pytest.approx(psych["bartlett"]), 66)


def test_the_published_indices_follow_from_the_published_chi_squares() -> None:
    # human_study.md, section 12: 23 items, 2 factors, 3,534 participants, 208 degrees of freedom.
    n, dof, bartlett = 3534, 208, 72144.01
    chi_square = 20099.1 + dof * np.log(n)
    assert fa.bayesian_criterion(chi_square, dof, n) == pytest.approx(20099.1)
    assert round(fa.rmsea(chi_square, dof, n), 3) == 0.171
    assert round(fa.tucker_lewis(chi_square, dof, bartlett, 253), 3) == 0.635


def test_scores_are_psychs(answers: np.ndarray, rho: np.ndarray, psych: dict[str, Any]) -> None:
    filled = np.where(np.isnan(answers), np.nanmean(answers, axis=0), answers)
    items = (filled - filled.mean(0)) / filled.std(0, ddof=1)
    correlation = np.corrcoef(items, rowvar=False)
    weights = fa.ten_berge_weights(correlation, fa.factor_analysis(rho, 2, "quartimin"))
    np.testing.assert_allclose(weights, psych["ten_berge_weights"], atol=1e-5)
    np.testing.assert_allclose((items @ weights)[:20], psych["ten_berge_scores"], atol=5e-5)
    regression = fa.regression_weights(correlation, fa.factor_analysis(rho, 3, "varimax"))
    np.testing.assert_allclose(regression, psych["thurstone_weights"], atol=3e-4)


def test_ten_berge_scores_correlate_as_the_factors_do(rho: np.ndarray) -> None:
    factors = fa.factor_analysis(rho, 2, "quartimin")
    weights = fa.ten_berge_weights(rho, factors)
    np.testing.assert_allclose(weights.T @ rho @ weights, factors.correlations, atol=1e-10)


def test_an_exact_factor_model_is_recovered() -> None:
    loadings = np.zeros((8, 2))
    loadings[:4, 0], loadings[4:, 1] = [0.8, 0.7, 0.6, 0.5], [0.75, 0.65, 0.55, 0.45]
    phi = np.array([[1, 0.35], [0.35, 1]])
    correlation = loadings @ phi @ loadings.T
    np.fill_diagonal(correlation, 1)
    found = fa.factor_analysis(correlation, 2, "quartimin")
    np.testing.assert_allclose(found.loadings, loadings, atol=1e-5)
    np.testing.assert_allclose(found.correlations, phi, atol=1e-5)
    np.testing.assert_allclose(found.uniquenesses, 1 - (loadings**2).sum(1), atol=1e-5)
    assert fa.factor_fit(correlation, found, 500).chi_square == pytest.approx(0, abs=1e-6)


def test_negative_factors_are_turned_and_sorted_by_size() -> None:
    loadings = np.zeros((9, 2))
    loadings[:3, 0], loadings[3:, 1] = -0.6, -0.8
    correlation = loadings @ loadings.T
    np.fill_diagonal(correlation, 1)
    for rotation in ("quartimin", "varimax"):
        found = fa.factor_analysis(correlation, 2, rotation)
        np.testing.assert_allclose(found.loadings, -loadings[:, ::-1], atol=1e-5)
        np.testing.assert_allclose(found.variance, [6 * 0.64 / 9, 3 * 0.36 / 9], atol=1e-5)


def test_numbers_of_factors_are_psychs(rho: np.ndarray, psych: dict[str, Any]) -> None:
    np.testing.assert_allclose(fa.common_eigenvalues(rho), psych["common_eigenvalues"], atol=1e-6)
    assert fa.very_simple_structure(rho, 1, 6) == 1 + int(np.argmax(psych["vss_1"]))
    assert fa.very_simple_structure(rho, 2, 6) == 1 + int(np.argmax(psych["vss_2"]))


def test_parallel_analysis_finds_the_simulated_factors(rho: np.ndarray) -> None:
    assert fa.parallel_analysis(rho, N) == 2


def test_too_many_factors_are_refused(rho: np.ndarray) -> None:
    with pytest.raises(FactorError, match="12 factors"):
        fa.extract(rho, 12)
    with pytest.raises(FactorError, match="degrees of freedom"):
        fa.factor_fit(rho[:3, :3], fa.factor_analysis(rho[:3, :3], 1, "varimax"), N)
