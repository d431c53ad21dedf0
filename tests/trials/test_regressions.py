"""Least squares and logit, against closed forms, least squares of numpy, and the limits that separated likelihoods tend to."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from relseek_assets.trials.regressions import RegressionFault, design, logit, ols, separating_direction


def two_by_two(a: int, b: int, c: int, d: int) -> pd.DataFrame:
    """Outcome y by group x: a, b of group 0 with y = 1, 0; c, d of group 1."""
    return pd.DataFrame({"y": [1.0] * a + [0.0] * b + [1.0] * c + [0.0] * d, "x": [0.0] * (a + b) + [1.0] * (c + d)})


def test_a_logit_of_a_two_by_two_table_is_its_log_odds_ratio() -> None:
    table = logit("y ~ x", two_by_two(20, 30, 45, 15)).table().set_index("term")
    assert table.loc["x", "estimate"] == pytest.approx(np.log(45 * 30 / (15 * 20)), abs=1e-9)
    se = np.sqrt(1 / 20 + 1 / 30 + 1 / 45 + 1 / 15)
    assert table.loc["x", "se"] == pytest.approx(se, abs=1e-8)
    assert table.loc["x", "p"] == pytest.approx(2 * stats.norm.sf(table.loc["x", "estimate"] / se), rel=1e-6)
    assert table.loc["x", "lower"] == pytest.approx(table.loc["x", "estimate"] - stats.norm.ppf(0.975) * se, abs=1e-7)


def test_least_squares_of_a_line() -> None:
    draw = np.random.default_rng(0)
    data = pd.DataFrame({"x": draw.standard_normal(40)})
    data["y"] = 2 + 3 * data["x"] + draw.standard_normal(40)
    fit, line = ols("y ~ x", data), stats.linregress(data["x"], data["y"])
    slope = fit.table().set_index("term").loc["x"]
    assert (slope["estimate"], slope["se"], slope["p"]) == pytest.approx((line.slope, line.stderr, line.pvalue))
    assert slope["df"] == 38 and fit.r_squared == pytest.approx(line.rvalue**2)


def test_the_later_of_dependent_columns_is_dropped_and_changes_nothing() -> None:
    draw = np.random.default_rng(1)
    data = pd.DataFrame(draw.standard_normal((60, 3)), columns=["a", "b", "y"]).assign(double=lambda frame: 2 * frame["a"], zero=0.0)
    full, plain = ols("y ~ a + double + zero + b", data), ols("y ~ a + b", data)
    assert full.design.dropped == ("double", "zero")
    pd.testing.assert_frame_equal(full.table(), plain.table())


def test_a_level_that_nobody_complete_has_is_no_column() -> None:
    data = pd.DataFrame({"y": [1.0, 2.0, 4.0, 3.0, 9.0], "x": [1.0, 2.0, 3.0, 4.0, np.nan], "g": pd.Categorical(list("aabbc"))})
    assert design("y ~ g + x", data).names == ("Intercept", "g[T.b]", "x")


def test_terms_beside_a_separated_one_have_the_limit_of_their_estimates() -> None:
    overlap = two_by_two(20, 30, 45, 15).assign(level=0.0)
    fit = logit("y ~ x + level", pd.concat([overlap, pd.DataFrame({"y": [0.0] * 4, "x": [0.0, 1.0, 1.0, 1.0], "level": 1.0})]))
    table = fit.table().set_index("term")
    assert table.loc["level", "estimate"] == -np.inf and np.isnan(table.loc["level", "p"]) and "separated" in table.loc["level", "note"]
    finite = logit("y ~ x", overlap).table().set_index("term")
    np.testing.assert_allclose(table.loc["x", ["estimate", "se"]].astype(float), finite.loc["x", ["estimate", "se"]].astype(float), rtol=1e-8)
    assert fit.n == 114 and np.all(fit.fitted[-4:] == 0)
    both = fit.contrast(np.array([[0.0, 1.0, 1.0]]), ["x and level"])
    assert both["estimate"].item() == -np.inf and both["note"].item() == table.loc["level", "note"]


def test_complete_separation_leaves_no_coefficient() -> None:
    table = logit("y ~ x", pd.DataFrame({"y": [0.0, 0.0, 0.0, 1.0, 1.0, 1.0], "x": [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]})).table().set_index("term")
    assert table.loc["x", "estimate"] == np.inf
    assert table["p"].isna().all() and (table["note"] != "").all()


@pytest.mark.parametrize("seed", range(5))
def test_a_direction_separates_exactly_when_labels_follow_a_plane(seed: int) -> None:
    draw = np.random.default_rng(seed)
    X = np.c_[np.ones(80), draw.standard_normal((80, 3))]
    plane = draw.standard_normal(4)
    y = (X @ plane > 0).astype(float)
    direction = separating_direction(X, y)
    assert direction is not None and np.all((2 * y - 1) * (X @ direction) >= -1e-9)
    # A point of either kind at the same place admits no direction along which both improve.
    mixed = np.r_[X, X], np.r_[y, 1 - y]
    assert separating_direction(*mixed) is None


@pytest.mark.parametrize("fit", [ols, logit])
def test_an_outcome_that_cannot_be_modelled_is_named(fit: object) -> None:
    assert callable(fit)
    data = pd.DataFrame({"gone": [1.0, 1.0, 1.0], "x": [1.0, 2.0, 4.0], "empty": [np.nan] * 3})
    with pytest.raises(RegressionFault, match=r"gone: all 3 values are 1;"):
        fit("gone ~ x", data)
    with pytest.raises(RegressionFault, match="gone: no row"):
        fit("gone ~ empty", data)


def test_least_squares_needs_more_rows_than_terms_and_a_logit_two_values() -> None:
    data = pd.DataFrame({"y": [1.0, 2.0], "x": [1.0, 3.0]})
    with pytest.raises(RegressionFault, match="y: 2 rows for 2 terms"):
        ols("y ~ x", data)
    with pytest.raises(RegressionFault, match="y: a logit needs 0 and 1, found 2"):
        logit("y ~ x", data)
