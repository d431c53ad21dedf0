"""Least squares and logit of one outcome without repeated measures: designs as R builds them, fits, coefficient tables, contrasts.

Here belong columns that depend on earlier ones, and outcomes for which no coefficient is finite. Mixed models do not
(`relseek_assets/mixed_models.py`), nor do the questions that a study asks.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
import statsmodels.api as sm
from formulaic import Formula, ModelSpec
from scipy import stats

from relseek_assets.trials.models import EXTREME_PROBABILITY, SOLVER_TOLERANCE, independent_columns, separating_direction
from relseek_assets.trials.raw import TrialFault

COEFFICIENT_COLUMNS = ("outcome", "term", "estimate", "se", "df", "statistic", "p", "lower", "upper", "method", "n", "note")
SEPARATED = "separated: the likelihood has no maximum in this term"


class RegressionFault(TrialFault):
    """An outcome that cannot be regressed; the message names the outcome and what to do."""


@dataclass(frozen=True)
class Design:
    """Complete rows of a formula.

    y: (n,). X: (n, p), of full column rank. names: p terms. rows: (n,) index of the rows in the data that were given. dropped: terms that depend on
    earlier ones, which R reports as NA.
    """

    outcome: str
    y: np.ndarray
    X: np.ndarray
    names: tuple[str, ...]
    rows: pd.Index
    dropped: tuple[str, ...]
    specification: ModelSpec

    def at(self, frame: pd.DataFrame) -> np.ndarray:
        """Design rows of new data, (len(frame), p); levels are those of the rows fitted."""
        matrix = self.specification.get_model_matrix(frame)
        return np.asarray(matrix[list(self.names)], dtype=float)


@dataclass(frozen=True)
class Regression:
    """A fit. coefficients: (p,). covariance: (p, p). df: n - p, or infinity for a logit. fitted: (n,) means. separated: term -> direction, ±1."""

    design: Design
    method: str
    coefficients: np.ndarray
    covariance: np.ndarray
    df: float
    fitted: np.ndarray
    separated: Mapping[str, float] = field(default_factory=dict)

    @property
    def n(self) -> int:
        return len(self.design.y)

    @property
    def r_squared(self) -> float:
        """Share of the variance about the mean that a least-squares fit explains."""
        y = self.design.y
        return float(1 - np.sum((y - self.fitted) ** 2) / np.sum((y - y.mean()) ** 2))

    def contrast(self, L: np.ndarray, labels: Sequence[str], *, level: float = 0.95) -> pd.DataFrame:
        """Linear combinations of coefficients, `COEFFICIENT_COLUMNS`; L: (k, p). One that needs a separated term has no finite estimate."""
        L = np.atleast_2d(np.asarray(L, dtype=float))
        lost = np.array([name in self.separated for name in self.design.names])
        se = np.sqrt(np.einsum("ki,ij,kj->k", L[:, ~lost], self.covariance[np.ix_(~lost, ~lost)], L[:, ~lost]))
        touching = (L[:, lost] != 0).sum(axis=1)
        touched = touching > 0
        signs = np.array([self.separated.get(name, 0.0) for name in self.design.names])
        # One separated term runs off in its direction; a sum of several has none that the coefficients alone would tell.
        away = np.where(touching == 1, np.where(L != 0, np.sign(L) * signs, 0).sum(axis=1), np.nan) * np.inf
        estimate = np.where(touched, away, L[:, ~lost] @ self.coefficients[~lost])
        se = np.where(touched, np.nan, se)
        statistic = np.where(touched, np.nan, estimate / se)
        reach = stats.t.ppf((1 + level) / 2, self.df) * se
        return pd.DataFrame(
            {
                "outcome": self.design.outcome,
                "term": list(labels),
                "estimate": estimate,
                "se": se,
                "df": self.df,
                "statistic": statistic,
                "p": 2 * stats.t.sf(np.abs(statistic), self.df),
                "lower": np.where(touched, np.nan, estimate - reach),
                "upper": np.where(touched, np.nan, estimate + reach),
                "method": self.method,
                "n": self.n,
                "note": np.where(touched, SEPARATED, ""),
            },
            columns=list(COEFFICIENT_COLUMNS),
        )

    def table(self) -> pd.DataFrame:
        """The coefficients, one row a term."""
        return self.contrast(np.eye(len(self.design.names)), self.design.names)


def design(formula: str, data: pd.DataFrame, *, outcome: str = "") -> Design:
    """Complete rows of `data` under a formula `y ~ terms`, treatment coded; columns that depend on earlier ones are dropped as R drops them.

    Raises:
        RegressionFault: no complete row, or an outcome that is the same everywhere.
    """
    parsed = Formula(formula)
    name = outcome or str(parsed.lhs)
    complete = data[sorted(parsed.required_variables)].dropna()
    if complete.empty:
        raise RegressionFault(f"{name}: no row has a value in every column of {formula!r}; look for a column that is missing throughout")
    for column in complete:
        values = complete[column]
        if isinstance(values.dtype, pd.CategoricalDtype):
            complete = complete.assign(**{column: values.cat.remove_unused_categories()})
        elif pd.api.types.is_numeric_dtype(values) or pd.api.types.is_bool_dtype(values):
            complete = complete.assign(**{column: values.astype(float)})
    left, right = parsed.get_model_matrix(complete)
    y = np.asarray(left, dtype=float)[:, 0]
    if np.ptp(y) == 0:
        raise RegressionFault(f"{name}: all {len(y)} values are {y[0]:g}; a constant outcome cannot be modelled, leave it out")
    X = np.asarray(right, dtype=float)
    kept = [int(index) for index in independent_columns(X)[0]]
    names = list(right.columns)
    dropped = tuple(term for index, term in enumerate(names) if index not in kept)
    return Design(name, y, X[:, kept], tuple(names[index] for index in kept), complete.index, dropped, right.model_spec)


def ols(formula: str, data: pd.DataFrame, *, outcome: str = "") -> Regression:
    """Ordinary least squares; t tests with df n - p.

    Raises:
        RegressionFault: see `design`; also when rows do not outnumber terms.
    """
    found = design(formula, data, outcome=outcome)
    n, p = found.X.shape
    if n <= p:
        raise RegressionFault(f"{found.outcome}: {n} rows for {p} terms; more rows than terms are needed")
    lengths = np.linalg.norm(found.X, axis=0)  # columns of length 1: a pseudo-inverse takes an intercept beside numbers of thousands for noise
    fit = sm.OLS(found.y, found.X / lengths).fit()
    return Regression(found, "ols", fit.params / lengths, fit.cov_params() / np.outer(lengths, lengths), float(n - p), fit.fittedvalues)


def logit(formula: str, data: pd.DataFrame, *, outcome: str = "") -> Regression:
    """Logistic regression of a 0/1 outcome; z tests on the log-odds scale.

    Terms along which the likelihood rises for ever are named in `separated`; the others are estimated from the rows that separation leaves
    undecided, which is the limit that they tend to.

    Raises:
        RegressionFault: see `design`; also for an outcome with other values than 0 and 1.
    """
    found = design(formula, data, outcome=outcome)
    if not np.isin(found.y, (0, 1)).all():
        raise RegressionFault(f"{found.outcome}: a logit needs 0 and 1, found {found.y[~np.isin(found.y, (0, 1))][0]:g}")
    n, p = found.X.shape
    coefficients, covariance, fitted = np.full(p, np.nan), np.full((p, p), np.nan), found.y.copy()
    undecided, columns = np.ones(n, dtype=bool), np.arange(p)
    separated: dict[str, float] = {}
    while undecided.any():
        X, y = found.X[undecided][:, columns], found.y[undecided]
        lengths = np.linalg.norm(X, axis=0)
        fit = _binomial(y, X / lengths)
        means = fit.fittedvalues
        direction = separating_direction(X, y) if min(means.min(), 1 - means.max()) < EXTREME_PROBABILITY else None
        if direction is None:
            coefficients[columns], fitted[undecided] = fit.params / lengths, means
            covariance[np.ix_(columns, columns)] = fit.cov_params() / np.outer(lengths, lengths)
            break
        running = direction != 0
        separated |= {found.names[column]: float(np.sign(step)) for column, step in zip(columns[running], direction[running], strict=True)}
        undecided[undecided] = np.abs(X @ direction) < SOLVER_TOLERANCE
        # Among the rows that are left the running terms depend on one another; they go last, so that they are the ones that alias.
        ordered = np.r_[columns[~running], columns[running]]
        columns = ordered[independent_columns(found.X[undecided][:, ordered])[0]] if undecided.any() else ordered
    if not undecided.any():
        separated |= {name: separated.get(name, np.nan) for name in found.names}
    return Regression(found, "logit", coefficients, covariance, np.inf, fitted, separated)


def _binomial(y: np.ndarray, X: np.ndarray) -> sm.regression.linear_model.RegressionResultsWrapper:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # separation and its overflow are looked for by `separating_direction`
        return sm.GLM(y, X, family=sm.families.Binomial()).fit(maxiter=100, tol=1e-12)
