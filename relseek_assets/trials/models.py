"""Least squares, logit and mixed models behind one face: named coefficients, their covariance, and contrasts with the field's inference.

Here belongs what a fit can answer. Formulas belong in `formulas.py`, the mixed model itself in `relseek_assets/mixed_models.py`.
Inference follows spec/human_study.md, section 3: Kenward-Roger for contrasts of mixed models, residual degrees of freedom for their
coefficients, t for least squares, z for logit with profile-likelihood intervals of its coefficients.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, Protocol

import numpy as np
import pandas as pd
from formulaic import ModelSpec, model_matrix
from scipy import optimize, special, stats
from statsmodels.genmod.families import Binomial
from statsmodels.genmod.generalized_linear_model import GLM
from statsmodels.regression.linear_model import OLS, WLS

from relseek_assets import mixed_models
from relseek_assets.trials.formulas import every_term
from relseek_assets.trials.frames import OutcomeFrame
from relseek_assets.trials.raw import TrialFault

ESTIMATES = ("estimate", "se", "df", "statistic", "p", "lower", "upper")
ALIASED = 1e-7  # R's tolerance for a column that others explain
SAFE = 1e-10  # of the normalised columns: when the least eigenvalue of their products is above it, none is explained by others
EXTREME_PROBABILITY = 1e-6  # a separated fit stops far beyond it
SOLVER_TOLERANCE = 1e-7  # of the linear programme that looks for separation


class SeparationFault(TrialFault):
    """A logit whose likelihood has no maximum."""


@dataclass(frozen=True)
class DesignSpace:
    """Every column that some specification of an outcome may need, made by formulaic once."""

    values: np.ndarray  # rows x columns
    names: tuple[str, ...]
    terms: dict[str, list[int]]  # term -> its columns
    spec: ModelSpec

    def columns(self, terms: Sequence[str]) -> list[int]:
        return [place for term in ("1", *terms) for place in self.terms[term]]


@lru_cache(maxsize=64)
def design_space(frame: OutcomeFrame) -> DesignSpace:
    rows = frame.rows
    if frame.covariates:  # rows that lack a covariate take part in the specifications without it
        rows = rows.copy()
        for name in frame.covariates:
            rows[name] = rows[name].fillna(_typical(rows[name]))
    matrix = model_matrix(" + ".join(every_term(frame)), rows, na_action="raise")
    terms = {str(term).replace("`", ""): places for term, places in matrix.model_spec.term_indices.items()}
    return DesignSpace(matrix.to_numpy(float), tuple(str(name) for name in matrix.columns), terms, matrix.model_spec)


def _typical(values: pd.Series) -> Any:
    """A covariate's value in the reference grid: its mean, or its reference level, which differences do not depend on."""
    return values.cat.categories[0] if isinstance(values.dtype, pd.CategoricalDtype) else float(values.mean())


@dataclass(frozen=True)
class Design:
    """The fixed part of a model: its matrix without aliased columns, and where they stand in the outcome's design space."""

    X: np.ndarray  # rows x columns
    names: tuple[str, ...]
    places: np.ndarray  # of the kept columns in the space
    wanted: np.ndarray  # of all columns of the terms
    null: np.ndarray  # wanted columns x aliased ones: combinations that no row can show

    @staticmethod
    def of(terms: Sequence[str], frame: OutcomeFrame, analysed: np.ndarray) -> Design:
        space = design_space(frame)
        wanted = np.array(space.columns(terms))
        values = space.values[:, wanted] if analysed.all() else space.values[np.ix_(analysed, wanted)]
        kept, null = independent_columns(values)
        return Design(values[:, kept], tuple(space.names[place] for place in wanted[kept]), wanted[kept], wanted, null)

    @cached_property
    def lengths(self) -> np.ndarray:
        """Of the columns. What is solved has columns of length 1: a pseudo-inverse takes an intercept beside doses of thousands for noise."""
        return np.linalg.norm(self.X, axis=0)

    @property
    def scaled(self) -> np.ndarray:
        return self.X / self.lengths

    def rows(self, grid: np.ndarray) -> np.ndarray:
        """Rows of this design from rows of the whole space; NaN where an aliased column makes the point inestimable."""
        found = grid[:, self.places]
        if self.null.shape[1]:
            found[np.abs(grid[:, self.wanted] @ self.null).max(axis=1) > 1e-6] = np.nan
        return found


def grid_rows(frame: OutcomeFrame, points: pd.DataFrame) -> np.ndarray:
    """Rows of the design space at points; columns that the points lack stand at their typical value."""
    grid = points.copy()
    for name, values in frame.rows.items():
        if name in ("participant", "value"):
            continue
        typical = 0.0 if name == "dose" else _typical(values)
        grid[name] = grid[name].fillna(typical) if name in grid else typical
        if isinstance(values.dtype, pd.CategoricalDtype):
            grid[name] = pd.Categorical(grid[name], values.cat.categories)
    return np.asarray(design_space(frame).spec.get_model_matrix(grid, output="numpy"), dtype=float)


def independent_columns(X: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(indices of the columns that no earlier ones explain, null space): which columns R would keep, in R's order."""
    lengths = np.linalg.norm(X, axis=0)
    if (lengths > 0).all():
        scaled = X / lengths
        if np.linalg.eigvalsh(scaled.T @ scaled)[0] > SAFE:  # a lower bound of the squares of the diagonal below, to 1e-14
            return np.arange(X.shape[1]), np.empty((X.shape[1], 0))
        triangle = np.abs(np.diag(np.linalg.qr(scaled, mode="r")))
        if len(triangle) == X.shape[1] and triangle.min() > ALIASED:
            return np.arange(X.shape[1]), np.empty((X.shape[1], 0))
    kept: list[int] = []
    basis = np.empty((len(X), 0))
    null: list[np.ndarray] = []
    for place in range(X.shape[1]):
        column = X[:, place]
        left = column - basis @ (basis.T @ column)
        left -= basis @ (basis.T @ left)  # twice is enough
        size, whole = np.linalg.norm(left), np.linalg.norm(column)
        if whole > 0 and size > ALIASED * whole:
            basis = np.column_stack([basis, left / size])
            kept.append(place)
            continue
        combination = np.zeros(X.shape[1])
        combination[place] = -1.0
        if kept:
            combination[kept] = np.linalg.lstsq(X[:, kept], column, rcond=None)[0]
        null.append(combination)
    return np.array(kept, dtype=int), np.array(null).T.reshape(X.shape[1], len(null))


def separating_direction(X: np.ndarray, y: np.ndarray) -> np.ndarray | None:
    """A direction d with (2y - 1) X d >= 0 in every row and > 0 in some, or None: separation, complete or quasi-complete.

    X: (n, p) of full rank. y: (n,), 0 or 1. By the linear programme of Konis (2007, section 4.4).
    """
    signed = (2 * y - 1)[:, None] * X
    scale = np.abs(X).max(axis=0)
    found = optimize.linprog(-(signed / scale).sum(axis=0), A_ub=-(signed / scale), b_ub=np.zeros(len(y)), bounds=(-1, 1), method="highs")
    if found.status != 0 or -found.fun < SOLVER_TOLERANCE:
        return None
    return np.where(np.abs(found.x) < SOLVER_TOLERANCE, 0.0, found.x) / scale


class Fit(Protocol):
    """What every model of an outcome answers."""

    @property
    def design(self) -> Design: ...
    @property
    def coefficients(self) -> np.ndarray: ...
    @property
    def n(self) -> int: ...
    @property
    def log_likelihood(self) -> float: ...
    @property
    def parameters(self) -> int: ...
    @property
    def rmse(self) -> float: ...
    def contrast(self, L: np.ndarray) -> pd.DataFrame: ...
    def coefficient_table(self, profile: bool = False) -> pd.DataFrame: ...


def _table(estimate: np.ndarray, se: np.ndarray, df: np.ndarray | float) -> pd.DataFrame:
    df = np.broadcast_to(np.asarray(df, dtype=float), estimate.shape)
    statistic = estimate / se
    quantile = stats.t.ppf(0.975, df)
    return pd.DataFrame(
        {
            "estimate": estimate,
            "se": se,
            "df": df,
            "statistic": statistic,
            "p": 2 * stats.t.sf(np.abs(statistic), df),
            "lower": estimate - quantile * se,
            "upper": estimate + quantile * se,
        }
    )


def information_criteria(fit: Fit) -> tuple[float, float, float]:
    """(AIC, AICc, BIC) of a model fitted by maximum likelihood."""
    k, n = fit.parameters, fit.n
    if n <= k + 1:
        raise TrialFault(f"{n} rows for {k} parameters; too few to compare polynomials, so collect more or declare fewer factors")
    aic = 2 * k - 2 * fit.log_likelihood
    return aic, aic + 2 * k * (k + 1) / (n - k - 1), k * np.log(n) - 2 * fit.log_likelihood


def _standard_errors(fit: LinearFit | LogitFit, L: np.ndarray) -> np.ndarray:
    rows = L / fit.design.lengths
    return np.sqrt(np.einsum("ij,jk,ik->i", rows, np.asarray(fit.result.cov_params()), rows))


@dataclass(frozen=True)
class LinearFit:
    """Ordinary or weighted least squares; t with n - p degrees of freedom. `result` is of the scaled columns."""

    design: Design
    result: Any

    @property
    def coefficients(self) -> np.ndarray:
        return np.asarray(self.result.params) / self.design.lengths

    @property
    def n(self) -> int:
        return int(self.result.nobs)

    @property
    def log_likelihood(self) -> float:
        return float(self.result.llf)

    @property
    def parameters(self) -> int:
        return len(self.coefficients) + 1

    @property
    def rmse(self) -> float:
        return float(np.sqrt(np.mean(np.asarray(self.result.resid) ** 2)))

    def contrast(self, L: np.ndarray) -> pd.DataFrame:
        return _table(L @ self.coefficients, _standard_errors(self, L), self.result.df_resid)

    def coefficient_table(self, profile: bool = False) -> pd.DataFrame:
        return self.contrast(np.eye(len(self.coefficients))).set_index(pd.Index(self.design.names, name="term"))


@dataclass(frozen=True)
class LogitFit:
    """Logistic regression on the log-odds scale: z without weights, a quasibinomial t with them. `result` is of the scaled columns."""

    design: Design
    y: np.ndarray
    result: Any
    weighted: bool

    @property
    def coefficients(self) -> np.ndarray:
        return np.asarray(self.result.params) / self.design.lengths

    @property
    def n(self) -> int:
        return int(self.result.nobs)

    @property
    def log_likelihood(self) -> float:
        return float(self.result.llf)

    @property
    def parameters(self) -> int:
        return len(self.coefficients)

    @property
    def rmse(self) -> float:
        return float(np.sqrt(np.mean(np.asarray(self.result.resid_deviance) ** 2)))

    def contrast(self, L: np.ndarray) -> pd.DataFrame:
        return _table(L @ self.coefficients, _standard_errors(self, L), self.result.df_resid if self.weighted else np.inf)

    def coefficient_table(self, profile: bool = False) -> pd.DataFrame:
        """Coefficients; with `profile`, the intervals of the dose terms are where the profile deviance crosses its χ² quantile."""
        table = self.contrast(np.eye(len(self.coefficients))).set_index(pd.Index(self.design.names, name="term"))
        if profile:
            for place, name in enumerate(self.design.names):
                if "dose" in name and ":" not in name:
                    table.loc[name, ["lower", "upper"]] = self.profile_interval(place)
        return table

    def profile_interval(self, place: int, level: float = 0.95) -> tuple[float, float]:
        """The profile-likelihood interval of one coefficient."""
        scaled, unit, params = self.design.scaled, self.design.lengths[place], np.asarray(self.result.params)
        X, rest, start = scaled[:, place], np.delete(scaled, place, axis=1), np.delete(params, place)
        estimate, se = params[place], float(np.sqrt(np.asarray(self.result.cov_params())[place, place]))
        best, threshold = 2 * _logit_log_likelihood(self.y, scaled @ params), stats.chi2.ppf(level, 1)

        def excess(value: float) -> float:
            return best - 2 * _logit_maximum(self.y, rest, X * value, start) - threshold

        ends = []
        for sign in (-1.0, 1.0):
            reach = 2.0 * se
            while excess(estimate + sign * reach) < 0:
                reach *= 1.6
                if reach > 1e4 * se:
                    raise SeparationFault(f"the profile likelihood of {self.design.names[place]} has no end")
            ends.append(optimize.brentq(lambda step, sign=sign: excess(estimate + sign * step), 0.0, reach, xtol=1e-9 * max(1.0, se)))
        return (estimate - ends[0]) / unit, (estimate + ends[1]) / unit


def _logit_log_likelihood(y: np.ndarray, eta: np.ndarray) -> float:
    return float(np.sum(y * eta - np.logaddexp(0, eta)))


def _logit_maximum(y: np.ndarray, X: np.ndarray, offset: np.ndarray, start: np.ndarray) -> float:
    """The log-likelihood at its maximum over the coefficients of X, by Newton's method; a step that would lower it is halved until it does not."""
    beta, eta = start, X @ start + offset
    value = _logit_log_likelihood(y, eta)
    for _ in range(100):
        mean = special.expit(eta)
        try:
            step = np.linalg.solve((X * (mean * (1 - mean))[:, None]).T @ X, X.T @ (y - mean))
        except np.linalg.LinAlgError:
            break
        for _ in range(60):
            eta = X @ (beta + step) + offset
            found = _logit_log_likelihood(y, eta)
            if found >= value - 1e-12 * (abs(value) + 1):
                break
            step = step / 2
        beta = beta + step
        if abs(found - value) < 1e-10 * (abs(value) + 1):
            return found
        value = found
    raise SeparationFault("the profile likelihood does not converge")


@dataclass(frozen=True)
class MixedModelFit:
    """A linear mixed model with one grouping factor, the participant."""

    design: Design
    result: mixed_models.MixedFit
    Z: np.ndarray  # rows x effects

    @property
    def relative_covariance(self) -> np.ndarray:
        """The covariance of a participant's random effects over the residual variance: ΛΛ' of θ."""
        effects = self.Z.shape[1]
        factor = np.zeros((effects, effects))
        factor[_column_major(effects)] = self.result.theta
        return factor @ factor.T

    @property
    def coefficients(self) -> np.ndarray:
        return self.result.coefficients

    @property
    def n(self) -> int:
        return self.result.n

    @property
    def log_likelihood(self) -> float:
        return self.result.log_likelihood

    @property
    def parameters(self) -> int:
        return self.result.parameters

    @property
    def rmse(self) -> float:
        return self.result.rmse

    def contrast(self, L: np.ndarray) -> pd.DataFrame:
        return self.result.contrast(L, method="kenward_roger")[list(ESTIMATES)]

    def coefficient_table(self, profile: bool = False) -> pd.DataFrame:
        table = self.result.contrast(np.eye(len(self.coefficients)), method="residual")
        return table[list(ESTIMATES)].set_index(pd.Index(self.design.names, name="term"))


def fit(
    frame: OutcomeFrame,
    terms: Sequence[str],
    *,
    reml: bool = True,
    weights: np.ndarray | None = None,
    start: np.ndarray | None = None,
    analysed: np.ndarray | None = None,
) -> Fit:
    """Fit one specification to the rows of an outcome; repeated measures make it a mixed model.

    Args:
        terms: the fixed part, as `formulas.fixed_terms` writes it.
        weights: one a row; precision weights of a mixed model or of least squares, quasibinomial weights of a logit.
        analysed: which rows take part, all by default.
        start: θ of an earlier fit of the same model, or of one close to it.

    Raises:
        TrialFault: fewer rows than coefficients, a logit that separates perfectly, or a mixed model that the rows do not carry.
    """
    analysed = np.ones(len(frame.rows), dtype=bool) if analysed is None else analysed
    if not analysed.any():
        raise TrialFault(f"{frame.key}: no row has every covariate and weight that this specification asks for; compare the participants' names")
    if weights is not None and not (weights[analysed] > 0).all():
        raise TrialFault(f"{frame.key}: a weight is {weights[analysed].min():g}; weights are above 0, so leave out whoever is not to count")
    design = Design.of(terms, frame, analysed)
    y = frame.rows["value"].to_numpy(float)[analysed]
    weights = None if weights is None else weights[analysed]
    if len(y) <= len(design.names):
        raise TrialFault(f"{frame.key}: {len(y)} rows for {len(design.names)} coefficients; it takes more participants, or fewer factors and doses")
    if frame.repeated:
        return _mixed(frame, design, y, analysed, reml=reml, weights=weights, start=start)
    if frame.outcome.model == "logit":
        return _logit(frame, design, y, weights)
    result = OLS(y, design.scaled).fit() if weights is None else WLS(y, design.scaled, weights=weights).fit()
    return LinearFit(design, result)


def _mixed(
    frame: OutcomeFrame,
    design: Design,
    y: np.ndarray,
    analysed: np.ndarray,
    *,
    reml: bool,
    weights: np.ndarray | None,
    start: np.ndarray | None,
) -> MixedModelFit:
    codes = pd.factorize(frame.rows["participant"][analysed])[0]
    ones = np.ones(len(y))
    Z = np.column_stack([ones, frame.rows["time"].to_numpy(float)[analysed]]) if frame.timed else ones[:, None]
    names = ("(Intercept)", "time") if frame.timed else ("(Intercept)",)
    term = mixed_models.RandomTerm(codes, Z, names, "participant")
    try:
        result = mixed_models.fit_matrices(y, design.X, design.names, [term], reml=reml, weights=weights, start=start)
    except mixed_models.MixedModelError as error:
        raise TrialFault(f"{frame.key}: {error}") from error
    return MixedModelFit(design, result, Z)


def _column_major(effects: int) -> tuple[np.ndarray, np.ndarray]:
    """Where θ goes in a lower triangle: column after column, as lme4 counts."""
    columns, rows = np.triu_indices(effects)
    return rows, columns


def _logit(frame: OutcomeFrame, design: Design, y: np.ndarray, weights: np.ndarray | None) -> LogitFit:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # separation is looked for below, and said in our words
        model = GLM(y, design.scaled, family=Binomial(), var_weights=weights)
        result = model.fit(tol=1e-12, maxiter=60, scale="X2" if weights is not None else None)
    means = np.asarray(result.fittedvalues)
    inside = (means > EXTREME_PROBABILITY) & (means < 1 - EXTREME_PROBABILITY)
    direction = None if inside.all() else separating_direction(design.X, y)
    if direction is not None:
        names = ", ".join(np.array(design.names)[direction != 0])
        raise SeparationFault(f"{frame.key}: perfect separation ({names}): a logit has no finite estimate; make the outcome linear or drop a factor")
    return LogitFit(design, y, result, weights is not None)
