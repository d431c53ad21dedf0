"""Linear mixed models as lme4 defines them, with Kenward-Roger and Satterthwaite inference as pbkrtest and lmerTest define it.

Here belong the model, its estimation, the inference about its fixed effects and its printed summary. Which models a trial fits and which
contrasts it asks for belongs in `trials/`; models without random effects are ordinary regressions and have no place here.

Notation, of Bates et al. (2015) and of spec/human_study.md, sections 3 and 16: y = Xβ + Zb + ε, b = Λu, u ~ N(0, σ²), ε ~ N(0, σ²/w). Λ is block
diagonal, one lower triangle a term, θ its entries column by column, D = ΛΛ'. With rows scaled by √w, S = Z'Z, T = Z'[X y], M = (I + DS)⁻¹D and
N = (I + DS)⁻¹,

    V⁻¹ = I - ZMZ',  Z'V⁻¹[X y] = N'T,  Z'V⁻¹Z = SN,  [X y]'V⁻¹[X y] = [X y]'[X y] - T'MT,

so that nothing of n rows is needed once S and T are there. All derivatives are taken with respect to the variance components G (the entries of
D and the residual); the profiled deviance, lmerTest's and pbkrtest's formulas are made of the same few moments.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, Protocol

import numpy as np
import pandas as pd
from formulaic import Formula
from numpy.typing import ArrayLike, NDArray
from scipy import linalg, sparse, stats

Method = Literal["kenward_roger", "satterthwaite", "residual", "z"]
Array = NDArray[np.float64]
Codes = NDArray[np.intp]

RANK = 1e-7  # R's tolerance: a column of which less than this share is new depends on those before it
SINGULAR = 1e-4  # lme4's tolerance on the diagonal of Λ
FLAT = 1e-8  # curvature, relative to the largest, below which a direction of θ is taken to be flat
TIGHT = 1e-15  # the deviance a Newton step still promises when the search ends
LOOSE = 1e-6  # ... and when it must be said that it has not ended
MEETING = 1e-2  # of θ: a Newton step that comes this near to a minimum would end in it
DIVERGED = 1e6  # standard deviations of a random effect in residual ones
STEPS, HALVINGS = 200, 40
LARGEST = 6000  # random effects of crossed factors, whose cross-products are held as one dense matrix


class MixedModelError(ValueError):
    """A formula, table or matrix from which no mixed model can be estimated."""


class ConvergenceWarning(UserWarning):
    """The search ended where the deviance is not at a minimum."""


@dataclass(frozen=True, eq=False)
class RandomTerm:
    """One random term `(Z | group)` with an unstructured covariance.

    codes (n,) integers 0..levels-1, Z (n, q), names (q,) of the columns of Z, levels the labels of the codes (the codes themselves if None).
    """

    codes: NDArray[np.integer[Any]]
    Z: Array
    names: tuple[str, ...]
    group: str
    levels: Sequence[Any] | None = None


@dataclass(frozen=True, eq=False)
class MixedFit:
    """An estimated model. p coefficients, k = len(theta), n rows used.

    `covariance` (p, p) of the coefficients is not adjusted for the estimation of θ. `theta` is lme4's, terms in the order of the formula.
    `log_likelihood` is that of the criterion fitted, restricted if `reml`. `fitted` and `residuals` (n,) are conditional on the random effects, in
    units and order of the rows used. `dropped` names columns that depend on earlier ones; `omitted` counts rows left out for missing values.
    `singular`: a random effect, or a combination of some, has variance zero.
    """

    names: tuple[str, ...]
    coefficients: Array
    covariance: Array = field(repr=False)
    theta: Array
    sigma: float
    log_likelihood: float
    reml: bool
    n: int
    converged: bool
    singular: bool
    fitted: Array = field(repr=False)
    residuals: Array = field(repr=False)
    dropped: tuple[str, ...]
    omitted: int
    formula: str | None
    _model: _Model = field(repr=False)
    _optimum: _Point = field(repr=False)

    @property
    def parameters(self) -> int:
        """Coefficients, θ and σ."""
        return len(self.coefficients) + len(self.theta) + 1

    @property
    def deviance(self) -> float:
        """-2 log-likelihood of the criterion fitted."""
        return -2 * self.log_likelihood

    @property
    def aic(self) -> float:
        return self.deviance + 2 * self.parameters

    @property
    def bic(self) -> float:
        return self.deviance + float(np.log(self.n)) * self.parameters

    @property
    def rmse(self) -> float:
        """Root mean square of the conditional residuals, rows unweighted."""
        return float(np.sqrt(np.mean(self.residuals**2)))

    @property
    def standard_errors(self) -> Array:
        """Of the coefficients, not adjusted, (p,)."""
        return np.sqrt(np.diag(self.covariance))

    @property
    def variances(self) -> pd.DataFrame:
        """Variance components as lme4's `as.data.frame(VarCorr(fit))`: grp, var1, var2, vcov, sdcor."""
        rows: list[tuple[str, str | None, str | None, float, float]] = []
        for term, D in zip(self._model.terms, self._model.term_covariances(self.theta), strict=True):
            covariance = self.sigma**2 * D
            deviation = np.sqrt(np.diag(covariance))
            rows += [(term.group, name, None, covariance[i, i], deviation[i]) for i, name in enumerate(term.names)]
            with np.errstate(invalid="ignore", divide="ignore"):
                correlation = covariance / np.outer(deviation, deviation)
            pairs = [(i, j) for i in range(len(term.names)) for j in range(i + 1, len(term.names))]
            rows += [(term.group, term.names[i], term.names[j], covariance[i, j], correlation[i, j]) for i, j in pairs]
        rows.append(("Residual", None, None, self.sigma**2, self.sigma))
        return pd.DataFrame(rows, columns=["grp", "var1", "var2", "vcov", "sdcor"])

    def blups(self, group: str | None = None) -> pd.DataFrame:
        """Conditional modes of the random effects of one grouping factor: `level`, and for each effect `NAME` and `NAME_variance`.

        The variance is conditional on data, θ and β, as in lme4's `ranef(condVar=TRUE)`. `group` may be left out where there is but one factor.
        """
        groups = list(dict.fromkeys(term.group for term in self._model.terms))
        if group is None and len(groups) > 1:
            raise MixedModelError(f"group: the model has the grouping factors {', '.join(groups)}; name one")
        if group is not None and group not in groups:
            raise MixedModelError(f"group: no grouping factor {group!r}; there is {', '.join(groups)}")
        columns: dict[str, Any] = {}
        for term, (modes, variances) in zip(self._model.terms, self._model.effects(self._optimum), strict=True):
            if term.group != (group or groups[0]):
                continue
            columns.setdefault("level", range(len(modes)) if term.levels is None else list(term.levels))
            for index, name in enumerate(term.names):
                columns[name] = modes[:, index]
                columns[f"{name}_variance"] = variances[:, index, index]
        return pd.DataFrame(columns)

    def refit(self, *, reml: bool) -> MixedFit:
        """The same model by the other criterion; the cross-products are reused."""
        return self if reml == self.reml else _estimate(self._model, reml, self.formula, self.omitted)

    def contrast(self, L: ArrayLike, method: Method = "kenward_roger", level: float = 0.95) -> pd.DataFrame:
        """Estimate, se, df, statistic, p, lower and upper of each row of L (rows, p), one degree of freedom a row.

        `kenward_roger`: adjusted standard errors and pbkrtest's `Lb_ddf`, of REML fits only. `satterthwaite`: as lmerTest. `residual`: Wald t with
        df = n - p - (k + 1). `z`: normal. The last three use standard errors without adjustment (spec/human_study.md, section 3).
        """
        rows = np.atleast_2d(np.asarray(L, dtype=float))
        if rows.ndim != 2 or rows.shape[1] != len(self.names):
            raise MixedModelError(f"L has {rows.shape[-1]} columns, but the model has {len(self.names)} coefficients: {', '.join(self.names)}")
        covariance = self.covariance
        if method == "kenward_roger":
            covariance, df = self._adjusted.covariance, self._adjusted.df(rows)
        elif method == "satterthwaite":
            df = self._satterthwaite.df(rows)
        elif method == "residual":
            df = np.full(len(rows), float(self.n - self.parameters))
        elif method == "z":
            df = np.full(len(rows), np.inf)
        else:
            raise MixedModelError(f"method: {method!r} is none of kenward_roger, satterthwaite, residual, z")
        estimate = rows @ self.coefficients
        se = np.sqrt(np.einsum("ij,jk,ik->i", rows, covariance, rows))
        with np.errstate(invalid="ignore", divide="ignore"):
            statistic = estimate / se
        half = stats.t.isf((1 - level) / 2, df) * se
        return pd.DataFrame(
            {
                "estimate": estimate,
                "se": se,
                "df": df,
                "statistic": statistic,
                "p": 2 * stats.t.sf(np.abs(statistic), df),
                "lower": estimate - half,
                "upper": estimate + half,
            }
        )

    @cached_property
    def _adjusted(self) -> _KenwardRoger:
        if not self.reml:
            raise MixedModelError("Kenward-Roger is defined for REML: use fit.refit(reml=True).contrast(...), or method='satterthwaite'")
        return _kenward_roger(self._model, self._optimum)

    @cached_property
    def _satterthwaite(self) -> _Satterthwaite:
        return _satterthwaite(self._model, self._optimum)

    def summary(self) -> str:
        """The fit as text: criterion, random effects, fixed effects with Satterthwaite's t tests, n and groups."""
        criterion = "REML" if self.reml else "maximum likelihood"
        notes = ["" if self.converged else "NOT CONVERGED: do not report", "singular: a random effect has variance zero" if self.singular else ""]
        notes.append(f"dropped, as they depend on other columns: {', '.join(self.dropped)}" if self.dropped else "")
        notes.append(f"rows omitted for missing values: {self.omitted}" if self.omitted else "")
        random = self.variances.set_axis(["group", "effect", "with", "(co)variance", "sd or correlation"], axis=1)
        fixed = self.contrast(np.eye(len(self.names)), "satterthwaite").drop(columns=["lower", "upper"])
        fixed = fixed.set_axis(list(self.names)).rename(columns={"statistic": "t"})
        fixed["p"] = [f"{p:.3g}" for p in fixed["p"]]
        groups = {term.group: _levels(term) for term in self._model.terms}
        return "\n".join(
            [
                f"Linear mixed model by {criterion}" + (f": {self.formula}" if self.formula else ""),
                f"log-likelihood {self.log_likelihood:.4f}, deviance {self.deviance:.4f}, AIC {self.aic:.2f}, BIC {self.bic:.2f}",
                *filter(None, notes),
                "",
                "Random effects",
                random.fillna("").to_string(index=False, float_format="{:.4f}".format),
                f"n {self.n}, " + ", ".join(f"{name} {count}" for name, count in groups.items()),
                "",
                "Fixed effects (Satterthwaite)",
                fixed.to_string(float_format="{:.4f}".format),
            ]
        )


# --- formula and table ------------------------------------------------------------------------------------------------


def fit(formula: str, data: pd.DataFrame, *, reml: bool = True, weights: str | ArrayLike | None = None) -> MixedFit:
    """Estimate `y ~ x + (1 + t | g)`; crossed factors as `(1 | a) + (1 | b)`.

    The fixed part and the left side of each bar are formulaic's, so that coefficients have its names; g is a column. Random effects within a bar
    are correlated. `weights`, a column or one number a row, are lme4's: the residual variance of a row is σ²/w. Rows with a missing value in a
    variable that is used are left out and counted in `omitted`. Raises MixedModelError for a formula or data that carry no such model.
    """
    fixed, bars = _read(formula)
    used = sorted({str(name) for part in (fixed, *(effects for effects, _ in bars)) for name in part.required_variables})
    used += [group for _, group in bars] + ([weights] if isinstance(weights, str) else [])
    missing = sorted(set(used) - set(data.columns))
    if missing:
        raise MixedModelError(f"formula {formula!r}: the table has no column {', '.join(missing)}")
    frame = data[list(dict.fromkeys(used))]
    complete = frame.notna().to_numpy().all(1)
    given = frame[weights] if isinstance(weights, str) else weights
    if given is not None:
        given = np.asarray(given, dtype=float)
        if given.shape != (len(data),):
            raise MixedModelError(f"weights: {given.shape} numbers for {len(data)} rows")
        complete &= ~np.isnan(given)
        given = given[complete]
    frame = _as_factors(frame[complete], {group for _, group in bars})
    if len(frame) < 2:
        raise MixedModelError(f"formula {formula!r}: {len(frame)} of {len(data)} rows are complete, which is too few for a model")
    y, X, names = _matrices(fixed, frame)
    terms = [_term(effects, group, frame) for effects, group in bars]
    return _estimate(_prepare(y, X, names, terms, given), reml, formula, int((~complete).sum()))


def _read(formula: str) -> tuple[Formula, list[tuple[Formula, str]]]:
    """The formula without random terms, and (effects, group) of each of these."""
    response, tilde, right = formula.partition("~")
    if not tilde or not response.strip():
        raise MixedModelError(f"formula {formula!r}: write response ~ fixed terms + (effects | group)")
    parts, depth = [""], 0
    for letter in right:
        depth += (letter in "([") - (letter in ")]")
        if letter == "+" and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    terms = [part.strip() for part in parts]
    bars = []
    for term in terms:
        if "|" in term:
            effects, _, group = term[1:-1].partition("|")
            if not (term.startswith("(") and term.endswith(")")) or not effects.strip() or not group.strip() or "|" in group:
                raise MixedModelError(
                    f"formula {formula!r}: cannot read the random term {term!r}; write (1 + t | group), or (1 | group) + (0 + t | group)"
                )
            bars.append((Formula(effects.strip()), group.strip()))
    if not bars:
        raise MixedModelError(f"formula {formula!r}: there is no random term such as (1 | group); without one this is an ordinary regression")
    return Formula(f"{response.strip()} ~ {' + '.join(term for term in terms if '|' not in term) or '1'}"), bars


def _as_factors(frame: pd.DataFrame, groups: set[str]) -> pd.DataFrame:
    """Texts as factors with sorted levels, and factors without the levels that no row has, as R's model frame does."""
    changed = {}
    for name in frame.columns.difference(list(groups)):
        column = frame[name]
        if isinstance(column.dtype, pd.CategoricalDtype):
            changed[name] = column.cat.remove_unused_categories()
        elif not (pd.api.types.is_numeric_dtype(column) or pd.api.types.is_bool_dtype(column)):
            changed[name] = column.astype(object).astype("category")
        elif pd.api.types.is_extension_array_dtype(column.dtype):
            changed[name] = column.astype(bool if pd.api.types.is_bool_dtype(column) else float)
    return frame.assign(**changed)


def _matrices(fixed: Formula, frame: pd.DataFrame) -> tuple[Array, Array, tuple[str, ...]]:
    found = fixed.get_model_matrix(frame, output="numpy", na_action="ignore")
    y = np.asarray(found.lhs, dtype=float)
    if y.ndim != 2 or y.shape[1] != 1:
        raise MixedModelError(f"response {fixed.lhs} is {y.shape[-1]} columns; it must be one number a row")
    return y[:, 0], np.asarray(found.rhs, dtype=float), tuple(found.rhs.model_spec.column_names)


def _term(effects: Formula, group: str, frame: pd.DataFrame) -> RandomTerm:
    found = effects.get_model_matrix(frame, output="numpy", na_action="ignore")
    codes, levels = pd.factorize(frame[group], sort=True)
    return RandomTerm(codes, np.asarray(found, dtype=float), tuple(found.model_spec.column_names), group, list(levels))


# --- matrices ---------------------------------------------------------------------------------------------------------


def fit_matrices(
    y: ArrayLike,
    X: ArrayLike,
    names: Sequence[str],
    random: Sequence[RandomTerm],
    *,
    reml: bool = True,
    weights: ArrayLike | None = None,
    start: ArrayLike | None = None,
) -> MixedFit:
    """`fit` from matrices: y (n,), X (n, p) with an intercept of its own if there is to be one, names (p,). Nothing may be missing.

    `start` is θ of an earlier fit of this model or of one close to it; the search begins there, and only where it does not end in the inside of the
    parameter space are the other starts tried.
    """
    model = _prepare(np.asarray(y, dtype=float), np.asarray(X, dtype=float), tuple(names), random, weights)
    return _estimate(model, reml, None, 0, None if start is None else np.asarray(start, dtype=float))


@dataclass(frozen=True, eq=False)
class _Model:
    """Data reduced to cross-products.

    X is replaced by the orthogonal Q of √w X = QR, y by what least squares leave of it, divided by `scale`, and √w Z of each term by an orthogonal
    matrix times its lower triangular `units`, so that numbers are of order one whatever units and origins are, and Λ remains lower triangular.
    """

    y: Array
    X: Array
    names: tuple[str, ...]
    dropped: tuple[str, ...]
    terms: tuple[RandomTerm, ...]
    weights: Array
    R: Array
    least_squares: Array
    scale: float
    units: tuple[Array, ...]
    layout: _Layout
    products: _Products

    def covariance(self, D: Array) -> Array:
        """(rows of X) a matrix in the coordinates of Q, in those of X."""
        inverse = linalg.solve_triangular(self.R, np.eye(len(self.R)))
        return np.asarray(inverse @ D @ inverse.T)

    def to_q(self, L: Array) -> Array:
        """Contrasts of X's coefficients as contrasts of Q's."""
        return np.asarray(linalg.solve_triangular(self.R, L.T, trans="T").T)

    def term_covariances(self, theta: Array) -> list[Array]:
        """D of each term, in the units of Z."""
        factor = self.layout.factor(theta)
        return [(factor @ factor.T)[part, part] for part in self.layout.parts]

    def theta(self, optimum: _Point) -> Array:
        """θ in the units of Z."""
        Lambda = linalg.solve_triangular(linalg.block_diag(*self.units), self.layout.factor(optimum.theta), lower=True)
        return np.asarray(Lambda[self.layout.rows, self.layout.cols])

    def internal(self, theta: Array) -> Array:
        """θ in the units of Z as the search counts it."""
        return np.asarray((linalg.block_diag(*self.units) @ self.layout.factor(theta))[self.layout.rows, self.layout.cols])

    def effects(self, optimum: _Point) -> list[tuple[Array, Array]]:
        """(levels, q) conditional modes and (levels, q, q) conditional variances of each term."""
        found = []
        for (modes, M), unit in zip(self.products.effects(optimum.D, optimum.direction), self.units, strict=True):
            inverse = np.linalg.inv(unit)
            found.append((self.scale * modes @ inverse.T, self.scale**2 * optimum.variance * inverse @ M @ inverse.T))
        return found


def _prepare(y: Array, X: Array, names: tuple[str, ...], random: Sequence[RandomTerm], weights: ArrayLike | None) -> _Model:
    w = np.ones(len(y)) if weights is None else np.asarray(weights, dtype=float)
    _check(y, X, names, random, w)
    root = np.sqrt(w)
    scaled = X * root[:, None]
    kept, R = _independent(scaled)
    Q = linalg.solve_triangular(R, scaled[:, kept].T, trans="T").T
    least_squares = Q.T @ (root * y)
    left = root * y - Q @ least_squares
    scale = float(np.sqrt(np.mean(left**2)))
    if scale < 1e-10 * float(np.sqrt(np.mean(w * y**2))):
        raise MixedModelError("response: the fixed effects reproduce every value, which leaves nothing to estimate a variance from")
    B = np.column_stack([Q, left / scale])
    columns = [np.asarray(term.Z, dtype=float) * root[:, None] for term in random]
    units = tuple(_unit(Z, term) for Z, term in zip(columns, random, strict=True))
    columns = [linalg.solve_triangular(unit, Z.T, trans="T", lower=True).T for Z, unit in zip(columns, units, strict=True)]
    layout = _Layout.of([Z.shape[1] for Z in columns])
    shared = all(np.array_equal(term.codes, random[0].codes) for term in random)
    products: _Products = _Blocks.of(random[0], np.hstack(columns), B, layout) if shared else _Crossed.of(random, columns, B, layout)
    chosen = set(kept.tolist())
    return _Model(
        y=y,
        X=X[:, kept],
        names=tuple(names[index] for index in kept),
        dropped=tuple(name for index, name in enumerate(names) if index not in chosen),
        terms=tuple(random),
        weights=w,
        R=R,
        least_squares=least_squares,
        scale=scale,
        units=units,
        layout=layout,
        products=products,
    )


def _check(y: Array, X: Array, names: tuple[str, ...], random: Sequence[RandomTerm], w: Array) -> None:
    n = len(y)
    if y.ndim != 1 or X.ndim != 2 or len(X) != n or X.shape[1] != len(names) or w.shape != (n,):
        raise MixedModelError(f"y has shape {y.shape}, X {X.shape}, weights {w.shape}, and there are {len(names)} names: they do not belong together")
    if n < 2:
        raise MixedModelError(f"y has {n} observations: a mixed model needs several in each of several groups")
    for label, values in [("y", y), ("weights", w), *((f"column {name!r} of X", X[:, index]) for index, name in enumerate(names))]:
        if not np.isfinite(values).all():
            raise MixedModelError(f"{label} has {int((~np.isfinite(values)).sum())} values that are missing or infinite: leave these rows out")
    if (w <= 0).any():
        raise MixedModelError("weights must be above 0: leave rows without weight out")
    if not random:
        raise MixedModelError("random: there is no random term")
    for term in random:
        _check_term(term, n)
    if np.ptp(y) == 0:
        raise MixedModelError(f"response: all {n} values are {y[0]:g}; a constant has no variance to divide")
    if not 0 < X.shape[1] < n:
        raise MixedModelError(f"X has {X.shape[1]} columns for {n} rows: a model needs at least one and fewer than rows")


def _check_term(term: RandomTerm, n: int) -> None:
    name = f"random term ({' + '.join(term.names)} | {term.group})"
    Z = np.asarray(term.Z)
    if Z.shape != (n, len(term.names)) or np.shape(term.codes) != (n,):
        raise MixedModelError(f"{name}: Z has shape {Z.shape}, codes {np.shape(term.codes)}, for {n} rows and {len(term.names)} names")
    if not np.isfinite(Z).all():
        raise MixedModelError(f"{name}: Z has values that are missing or infinite: leave these rows out")
    if (np.abs(Z).max(0) == 0).any():
        raise MixedModelError(f"{name}: a column of Z is zero in every row")
    levels = _levels(term)
    if term.codes.min() < 0 or (term.levels is not None and levels > len(term.levels)) or len(np.unique(term.codes)) < levels:
        raise MixedModelError(f"{name}: codes must be 0 to {levels - 1}, each of them used, with a label each")
    if levels < 2:
        raise MixedModelError(f"{name}: {term.group} has one level; a variance between groups needs at least two")
    if levels >= n:
        raise MixedModelError(f"{name}: {levels} levels of {term.group} for {n} rows; with one row a level their variance is also the residual's")
    if levels * len(term.names) >= n:
        raise MixedModelError(f"{name}: {levels * len(term.names)} random effects for {n} rows; their variances cannot be told from the residual's")


def _levels(term: RandomTerm) -> int:
    return int(term.codes.max()) + 1


def _unit(Z: Array, term: RandomTerm) -> Array:
    """Lower triangular R of Z'Z/n = R'R, by the Cholesky factorisation from the last column to the first."""
    norms = np.sqrt(np.mean(Z**2, axis=0))
    try:
        return np.asarray(np.linalg.cholesky((Z / norms).T[::-1] @ (Z / norms)[:, ::-1] / len(Z)).T[::-1, ::-1] * norms)
    except np.linalg.LinAlgError as fault:
        raise MixedModelError(f"random term ({' + '.join(term.names)} | {term.group}): its columns depend on each other; leave one out") from fault


def _independent(X: Array) -> tuple[Codes, Array]:
    """Columns that do not depend on earlier ones, in their order as R keeps them, and R of their QR factorisation."""
    norms = np.sqrt((X**2).sum(0))
    unit = X / np.where(norms > 0, norms, 1)
    try:
        R = np.linalg.cholesky(unit.T @ unit).T
        if np.diag(R).min() > 1e-3:  # far from dependent, where the cross-products are precise enough
            return np.arange(X.shape[1]), R * norms
    except np.linalg.LinAlgError:
        pass
    basis: list[Array] = []
    kept = []
    for index, column in enumerate(np.asarray(np.linalg.qr(unit, mode="r")).T):
        rest = column.copy()
        for _ in range(2):  # the second pass removes what rounding left of the first
            for direction in basis:
                rest -= (direction @ rest) * direction
        if (length := np.linalg.norm(rest)) > RANK:
            basis.append(rest / length)
            kept.append(index)
    return np.array(kept), np.linalg.qr(unit[:, kept], mode="r") * norms[kept]


# --- θ, Λ and variance components -------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Layout:
    """Where the entries of θ lie in Λ (q, q), q over all terms; the variance components lie at the same places of D."""

    parts: tuple[slice, ...]
    rows: Codes
    cols: Codes
    basis: Array  # (k, q, q): dΛ/dθ
    second: Array  # (k, k, k): second derivatives of the components by θ

    @classmethod
    def of(cls, sizes: Sequence[int]) -> _Layout:
        ends = np.cumsum(sizes)
        parts = tuple(slice(end - size, end) for size, end in zip(sizes, ends, strict=True))
        places = [(row, col) for part in parts for col in range(part.start, part.stop) for row in range(col, part.stop)]
        rows, cols = (np.array(side, dtype=np.intp) for side in zip(*places, strict=True))
        basis = np.zeros((len(rows), ends[-1], ends[-1]))
        basis[np.arange(len(rows)), rows, cols] = 1
        product = basis[:, None] @ basis.mT[None]
        return cls(parts, rows, cols, basis, (product + product.mT)[..., rows, cols])

    @property
    def on_diagonal(self) -> NDArray[np.bool_]:
        return self.rows == self.cols

    @cached_property
    def components(self) -> Array:
        """(k, q, q) symmetric: G of each variance component."""
        return np.maximum(self.basis, self.basis.mT)

    def factor(self, theta: Array) -> Array:
        Lambda = np.zeros(self.basis.shape[1:])
        Lambda[self.rows, self.cols] = theta
        return Lambda

    def canonical(self, theta: Array) -> Array:
        """The same D with a non-negative diagonal of Λ."""
        Lambda = self.factor(theta)
        return (Lambda * np.where(np.diag(Lambda) < 0, -1.0, 1.0))[self.rows, self.cols]

    def starts(self) -> Iterator[Array]:
        """Where searches begin: the deviance can have several minima, and a single start missed the best in 2 of 48 fits (spec, section 16)."""
        diagonal = self.on_diagonal.astype(float)
        yield diagonal
        yield 0.1 * diagonal
        if not self.on_diagonal.all():
            yield 0.5 * diagonal + 0.8 * ~self.on_diagonal
            yield 0.5 * diagonal - 0.8 * ~self.on_diagonal
        if diagonal.sum() > 1:
            for place in np.flatnonzero(self.on_diagonal):
                yield np.where(np.arange(len(diagonal)) == place, 1.0, 0.1) * diagonal


# --- cross-products ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Moments:
    """What the data say at one D, with residual variance one; k components, P = p + 1 columns of [X y].

    logdet = log|I + DS|; cross = [X y]'V⁻¹[X y]; first = [X y]'V⁻¹GV⁻¹[X y] (k, P, P); second = [X y]'V⁻¹GV⁻¹HV⁻¹[X y] (k, k, P, P), symmetrised;
    trace = tr V⁻¹G (k,); traces = tr V⁻¹GV⁻¹H (k, k).
    """

    logdet: float
    cross: Array
    first: Array
    second: Array
    trace: Array
    traces: Array


class _Products(Protocol):
    @property
    def n(self) -> int: ...

    def moments(self, D: Array) -> _Moments: ...

    def residual_moments(self, D: Array) -> tuple[Array, Array, Array]:
        """With I for the residual as last component: first (P, P), second (k + 1, P, P) and traces (k + 1,) of it with each component."""
        ...

    def effects(self, D: Array, direction: Array) -> list[tuple[Array, Array]]:
        """(levels, q) MT'direction and (levels, q, q) M of each term."""
        ...


def _symmetric(matrices: Array) -> Array:
    return (matrices + matrices.mT) / 2


@dataclass(frozen=True, eq=False)
class _Blocks:
    """One grouping factor: S is block diagonal, and groups with the same block are one pattern.

    S (patterns, q, q), counts (patterns,), pattern (groups,), T (groups, q, P). All sums over groups are ΣT'WT with W the same within a pattern:
    products of W's upper triangles with `outer`, whose cost does not depend on the number of groups.
    """

    n: int
    layout: _Layout
    S: Array
    counts: Array
    pattern: Codes
    T: Array
    gram: Array
    outer: Array  # (patterns * q(q+1)/2, P(P+1)/2)

    @classmethod
    def of(cls, term: RandomTerm, Z: Array, B: Array, layout: _Layout) -> _Blocks:
        n, levels = len(B), _levels(term)
        codes = np.asarray(term.codes, dtype=np.int32)
        both = np.hstack([Z, B])
        pointer = np.arange(n + 1, dtype=np.int32)
        sums = np.stack([sparse.csc_array((column, codes, pointer), shape=(levels, n)) @ both for column in Z.T], axis=1)
        q = Z.shape[1]
        S, T = _symmetric(sums[..., :q]), np.ascontiguousarray(sums[..., q:])
        upper = np.round(S[(slice(None), *np.triu_indices(q))], 9)
        order = np.lexsort(upper.T)
        begins = np.flatnonzero(np.r_[True, (np.diff(upper[order], axis=0) != 0).any(1)])
        counts = np.diff(np.r_[begins, levels])
        pattern = np.empty(levels, dtype=np.intp)
        pattern[order] = np.repeat(np.arange(len(begins)), counts)
        outer = cls._outer(T[order], begins)
        S = np.add.reduceat(S[order], begins, axis=0) / counts[:, None, None]
        return cls(n, layout, S, counts.astype(float), pattern, T, B.T @ B, outer)

    @staticmethod
    def _outer(T: Array, begins: Codes) -> Array:
        """ΣT_a'T_b over the groups of each pattern, for each pair a <= b of effects, upper triangles only."""
        left, right = np.triu_indices(T.shape[2])
        found = []
        for a, b in zip(*np.triu_indices(T.shape[1]), strict=True):
            product = T[:, a, left] * T[:, b, right]
            if a != b:
                product += T[:, b, left] * T[:, a, right]
            found.append(np.add.reduceat(product, begins, axis=0))
        return np.stack(found, axis=1).reshape(len(begins) * len(found), -1)

    def _sandwich(self, W: Array) -> Array:
        """ΣT'WT of symmetric W (..., patterns, q, q), as (..., P, P)."""
        a, b = self._upper[0]
        flat = W[..., a, b].reshape(*W.shape[:-3], -1) @ self.outer
        return flat[..., self._unpacked]

    @cached_property
    def _upper(self) -> tuple[tuple[Codes, Codes], tuple[Codes, Codes]]:
        """Upper triangles of pairs of effects, and of components."""
        return np.triu_indices(self.S.shape[-1]), np.triu_indices(len(self.layout.rows))

    @cached_property
    def _unpacked(self) -> Codes:
        """(P, P) where each entry of a symmetric matrix is in its upper triangle."""
        places = np.empty(self.gram.shape, dtype=np.intp)
        left, right = np.triu_indices(len(self.gram))
        places[left, right] = places[right, left] = np.arange(len(left))
        return places

    def moments(self, D: Array) -> _Moments:
        G = self.layout.components[:, None]
        N, logdet = _inverse(np.eye(len(D)) + D @ self.S)
        SN = self.S @ N
        NG, SNG = N @ G, SN @ G
        k = len(G)
        one, other = self._upper[1]
        stacked = np.concatenate([(N @ D)[None], NG @ N.mT, (NG @ SN)[one] @ NG[other].mT])
        sums = self._sandwich(_symmetric(stacked))
        second = np.empty((k, k, *self.gram.shape))
        second[one, other] = second[other, one] = sums[k + 1 :]
        weighted = SNG * self.counts[:, None, None]
        return _Moments(
            logdet=float(self.counts @ logdet),
            cross=self.gram - sums[0],
            first=sums[1 : k + 1],
            second=second,
            trace=np.trace(weighted, axis1=-2, axis2=-1).sum(-1),
            traces=weighted.reshape(k, -1) @ SNG.mT.reshape(k, -1).T,
        )

    def residual_moments(self, D: Array) -> tuple[Array, Array, Array]:
        G = self.layout.components[:, None]
        N, _ = _inverse(np.eye(len(D)) + D @ self.S)
        M, outside = N @ D, D @ N.mT @ N.mT
        with_components = N @ G @ N.mT @ N.mT
        sums = self._sandwich(_symmetric(np.concatenate([with_components, (N @ outside)[None], M[None], (N @ D @ N.mT)[None]])))
        first = self.gram - sums[-2] - sums[-1]
        traces = np.einsum("k,kab,rba->r", self.counts, N.mT @ self.S @ N, G[:, 0])
        own = self.n - self.counts.sum() * len(D) + self.counts @ np.einsum("kab,kba->k", N, N)
        return first, np.concatenate([sums[:-3], (first - sums[-3])[None]]), np.append(traces, own)

    def effects(self, D: Array, direction: Array) -> list[tuple[Array, Array]]:
        M = (_inverse(np.eye(len(D)) + D @ self.S)[0] @ D)[self.pattern]
        modes = np.einsum("gab,gb->ga", M, self.T @ direction)
        return [(modes[:, part], M[:, part, part]) for part in self.layout.parts]


def _inverse(A: Array) -> tuple[Array, Array]:
    """Inverses and log-determinants of (..., q, q) matrices with positive determinants; in closed form for q < 3, where LAPACK's calls cost more."""
    if A.shape[-1] == 1:
        return 1 / A, np.log(A[..., 0, 0])
    if A.shape[-1] == 2:
        determinant = A[..., 0, 0] * A[..., 1, 1] - A[..., 0, 1] * A[..., 1, 0]
        adjugate = np.empty_like(A)
        adjugate[..., 0, 0], adjugate[..., 1, 1] = A[..., 1, 1], A[..., 0, 0]
        adjugate[..., 0, 1], adjugate[..., 1, 0] = -A[..., 0, 1], -A[..., 1, 0]
        return adjugate / determinant[..., None, None], np.log(determinant)
    return np.asarray(np.linalg.inv(A)), np.asarray(np.linalg.slogdet(A)[1])


@dataclass(frozen=True, eq=False)
class _Crossed:
    """Several grouping factors: S (Q, Q) is one dense matrix over all random effects, T (Q, P).

    Component r joins the effects `left[r]` with the effects `right[r]`, level by level.
    """

    n: int
    layout: _Layout
    S: Array
    T: Array
    gram: Array
    left: tuple[Codes, ...]
    right: tuple[Codes, ...]
    places: tuple[Codes, ...]  # (levels, q) of each term, in S

    @classmethod
    def of(cls, terms: Sequence[RandomTerm], columns: Sequence[Array], B: Array, layout: _Layout) -> _Crossed:
        total = sum(_levels(term) * Z.shape[1] for term, Z in zip(terms, columns, strict=True))
        if total > LARGEST:
            raise MixedModelError(f"crossed factors with {total} random effects in all: more than {LARGEST} do not fit one dense matrix")
        places, entries, start = [], [], 0
        for term, Z in zip(terms, columns, strict=True):
            place = start + np.arange(_levels(term) * Z.shape[1]).reshape(-1, Z.shape[1])
            entries += [(column, place[term.codes, index]) for index, column in enumerate(Z.T)]
            places.append(place)
            start = place[-1, -1] + 1
        rows = np.tile(np.arange(len(B)), len(entries))
        values, cols = (np.concatenate(side) for side in zip(*entries, strict=True))
        Z_all = sparse.csc_array((values, (rows, cols)), shape=(len(B), total))
        column_of = [place[:, index] for place in places for index in range(place.shape[1])]
        left = tuple(column_of[row] for row in layout.rows)
        right = tuple(column_of[col] for col in layout.cols)
        return cls(len(B), layout, (Z_all.T @ Z_all).toarray(), Z_all.T @ B, B.T @ B, left, right, tuple(places))

    def _joined(self, component: int, A: Array) -> Array:
        """GA."""
        found = np.zeros_like(A)
        found[self.left[component]] = A[self.right[component]]
        found[self.right[component]] = A[self.left[component]]
        return found

    def _times(self, D: Array, A: Array) -> Array:
        """DA, D of all levels."""
        weights = D[self.layout.rows, self.layout.cols]
        return np.sum([weight * self._joined(index, A) for index, weight in enumerate(weights)], axis=0)

    def _at(self, D: Array) -> tuple[Array, float, Array]:
        N, logdet = _inverse(np.eye(len(self.S)) + self._times(D, self.S))
        return N, float(logdet), N.T @ self.T

    def moments(self, D: Array) -> _Moments:
        N, logdet, Y = self._at(D)
        SN = self.S @ N
        k = range(len(self.left))
        GY = [self._joined(index, Y) for index in k]
        GSN = [self._joined(index, SN) for index in k]
        return _Moments(
            logdet=logdet,
            cross=self.gram - _symmetric(self.T.T @ self._times(D, Y)),
            first=np.stack([Y.T @ GY[index] for index in k]),
            second=np.stack([[_symmetric(GY[one].T @ SN @ GY[other]) for other in k] for one in k]),
            trace=np.array([np.trace(product) for product in GSN]),
            traces=np.array([[np.sum(GSN[one] * GSN[other].T) for other in k] for one in k]),
        )

    def residual_moments(self, D: Array) -> tuple[Array, Array, Array]:
        N, _, Y = self._at(D)
        DY, twice, NSN = self._times(D, Y), N.T @ Y, N.T @ self.S @ N
        first = self.gram - _symmetric(self.T.T @ DY) - Y.T @ DY
        k = range(len(self.left))
        second = [_symmetric(self._joined(index, Y).T @ twice) for index in k]
        traces = [np.trace(self._joined(index, NSN)) for index in k]
        return first, np.stack([*second, first - _symmetric(twice.T @ DY)]), np.array([*traces, self.n - len(N) + np.sum(N * N.T)])

    def effects(self, D: Array, direction: Array) -> list[tuple[Array, Array]]:
        N, _, Y = self._at(D)
        modes, M = self._times(D, Y @ direction), self._times(D, np.ascontiguousarray(N.T))
        return [(modes[place], M[place[:, :, None], place[:, None, :]]) for place in self.places]


# --- estimation -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Point:
    """The profiled deviance at one θ with its derivatives, less the constants of the units; p columns of Q.

    `gamma` (p,) are coefficients of Q, `unscaled` (p, p) their covariance over the residual `variance`; rss_1 (k,) and unscaled_1 (k, p, p) are
    derivatives by θ.
    """

    theta: Array
    D: Array
    deviance: float
    gradient: Array
    hessian: Array
    gamma: Array
    unscaled: Array
    rss: float
    variance: float
    rss_1: Array
    unscaled_1: Array

    @property
    def direction(self) -> Array:
        """[Q y] times this is what the fixed effects leave of y."""
        return np.append(-self.gamma, 1.0)

    @cached_property
    def curvature(self) -> tuple[Array, Array]:
        values, axes = np.linalg.eigh(self.hessian)
        return values, axes

    @cached_property
    def newton_step(self) -> tuple[Array, float]:
        """The step against the absolute curvature, which goes downhill from saddles too, and the deviance it promises."""
        values, axes = self.curvature
        size = np.maximum(np.abs(values), FLAT * np.abs(values).max())
        slope = axes.T @ self.gradient
        return -axes @ (slope / size), float(np.sum(slope**2 / size))

    def is_saddle(self) -> bool:
        values, _ = self.curvature
        return bool(values[0] < -FLAT * 100 * np.abs(values).max())


def _criterion(model: _Model, reml: bool) -> Callable[[Array], _Point | None]:
    """The profiled deviance as a function of θ; None where rounding leaves no positive residual sum of squares."""
    layout, products = model.layout, model.products
    p = len(model.names)
    m = products.n - p * reml

    def at(theta: Array) -> _Point | None:
        Lambda = layout.factor(theta)
        D = Lambda @ Lambda.T
        D1 = layout.basis @ Lambda.T
        A = (D1 + D1.mT)[:, layout.rows, layout.cols]  # dG/dθ
        moments = products.moments(D)
        E1 = -np.tensordot(A, moments.first, 1)
        E2 = 2 * np.tensordot(A, np.tensordot(A, moments.second, (1, 0)), (1, 1)) - np.tensordot(layout.second, moments.first, 1)
        XX = moments.cross[:p, :p]
        try:
            root = np.linalg.cholesky(XX)
        except np.linalg.LinAlgError:
            return None
        unscaled = np.asarray(np.linalg.inv(XX))
        gamma = unscaled @ moments.cross[:p, p]
        v = np.append(-gamma, 1.0)
        rss = float(v @ moments.cross @ v)
        if not rss > 1e-14 * products.n:
            return None
        E1v = E1 @ v
        rss_1 = E1v @ v
        rss_2 = E2 @ v @ v - 2 * E1v[:, :p] @ unscaled @ E1v[:, :p].T
        deviance = moments.logdet + m * (1 + np.log(2 * np.pi * rss / m))
        gradient = A @ moments.trace + m * rss_1 / rss
        hessian = layout.second @ moments.trace - A @ moments.traces @ A.T + m * (rss_2 / rss - np.outer(rss_1, rss_1) / rss**2)
        UE1 = unscaled @ E1[:, :p, :p]
        if reml:
            deviance += 2 * np.log(np.diag(root)).sum()
            gradient += np.trace(UE1, axis1=-2, axis2=-1)
            hessian += np.tensordot(E2[..., :p, :p], unscaled, 2) - np.einsum("jab,kba->jk", UE1, UE1)
        return _Point(theta, D, float(deviance), gradient, _symmetric(hessian), gamma, unscaled, rss, rss / m, rss_1, -UE1 @ unscaled)

    return at


def _descend(
    criterion: Callable[[Array], _Point | None], start: Array, canonical: Callable[[Array], Array], known: Sequence[_Point] = ()
) -> _Point | None:
    """Newton's method from `start`, each step shortened until the deviance falls; a search whose next step meets an end that is known ends there."""
    point = criterion(start)
    for _ in range(STEPS):
        if point is None:
            return None
        step, promise = point.newton_step
        for end in known:
            apart = np.abs(canonical(point.theta + step) - canonical(end.theta)).max()
            if apart < MEETING * (1 + np.abs(end.theta).max()) and not point.is_saddle():
                return end
        if promise < TIGHT:
            if not point.is_saddle():
                return point
            step = 0.1 * point.curvature[1][:, 0]  # a variance of zero is stationary, even where a larger one is better
        whole = min(1.0, 2 * (1 + float(np.linalg.norm(point.theta))) / max(float(np.linalg.norm(step)), 1e-300))
        for halving in range(HALVINGS):
            share = whole / 2**halving
            trial = criterion(point.theta + share * step)
            if trial is not None and trial.deviance <= point.deviance - 1e-4 * share * promise + 1e-13 * abs(point.deviance):
                break
        else:
            return point
        if TIGHT <= promise < LOOSE and trial.newton_step[1] >= promise:  # as near as rounding allows
            return point
        point = trial
        if np.abs(point.theta).max() > DIVERGED:
            return point
    return point


def _ends(model: _Model, criterion: Callable[[Array], _Point | None], theta: Array | None) -> list[_Point]:
    """Where the searches end: one from `theta` where that is inside, all starts otherwise."""
    if theta is not None and theta[model.layout.on_diagonal].min() >= SINGULAR:
        end = _descend(criterion, model.internal(theta), model.layout.canonical)
        if end is not None and end.newton_step[1] < TIGHT and not end.is_saddle() and end.theta[model.layout.on_diagonal].min() >= SINGULAR:
            return [end]
    ends: list[_Point] = []
    for start in model.layout.starts():
        end = _descend(criterion, start, model.layout.canonical, ends)
        if end is not None:
            ends.append(end)
    return ends


def _estimate(model: _Model, reml: bool, formula: str | None, omitted: int, theta: Array | None = None) -> MixedFit:
    criterion = _criterion(model, reml)
    ends = _ends(model, criterion, theta)
    if not ends:
        raise MixedModelError("the random effects reproduce every value of the response, which leaves no residual variance to estimate")
    best = min(ends, key=lambda end: end.deviance)
    best = criterion(model.layout.canonical(best.theta)) or best
    _, promise = best.newton_step
    converged = promise < LOOSE and not best.is_saddle() and np.abs(best.theta).max() < DIVERGED
    if not converged:
        warnings.warn(
            f"mixed model {formula or ''}: the search did not reach a minimum of the deviance (a Newton step still promises {promise:.2g}); "
            "do not report this fit, and simplify its random terms",
            ConvergenceWarning,
            stacklevel=3,
        )
    p, n = len(model.names), len(model.y)
    m = n - p * reml
    constant = 2 * m * np.log(model.scale) - np.log(model.weights).sum() + 2 * reml * np.log(np.abs(np.diag(model.R))).sum()
    coefficients = linalg.solve_triangular(model.R, model.least_squares + model.scale * best.gamma)
    sigma = model.scale * np.sqrt(best.variance)
    fitted = model.X @ coefficients
    for term, (modes, _) in zip(model.terms, model.effects(best), strict=True):
        fitted = fitted + np.einsum("na,na->n", term.Z, modes[term.codes])
    return MixedFit(
        names=model.names,
        coefficients=coefficients,
        covariance=sigma**2 * model.covariance(best.unscaled),
        theta=model.theta(best),
        sigma=float(sigma),
        log_likelihood=float(-(best.deviance + constant) / 2),
        reml=reml,
        n=n,
        converged=bool(converged),
        singular=bool(best.theta[model.layout.on_diagonal].min() < SINGULAR),
        fitted=fitted,
        residuals=model.y - fitted,
        dropped=model.dropped,
        omitted=omitted,
        formula=formula,
        _model=model,
        _optimum=best,
    )


# --- inference --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Satterthwaite:
    """Covariance of the coefficients and its derivatives by (θ, σ), and the covariance of the estimates of these."""

    model: _Model
    unscaled: Array
    gradient: Array  # (k + 1, p, p)
    uncertainty: Array  # (k + 1, k + 1)

    def df(self, L: Array) -> Array:
        """2 Var² / (g'Ag) for each row of L."""
        rows = self.model.to_q(L)
        variance = np.einsum("ia,ab,ib->i", rows, self.unscaled, rows)
        g = np.einsum("ia,rab,ib->ir", rows, self.gradient, rows)
        with np.errstate(divide="ignore"):
            return np.asarray(2 * variance**2 / np.einsum("ir,rs,is->i", g, self.uncertainty, g))


def _satterthwaite(model: _Model, optimum: _Point) -> _Satterthwaite:
    """lmerTest's, with exact derivatives of the deviance in (θ, σ), σ in units of its estimate; directions without curvature count as known."""
    k, rss = len(optimum.theta), optimum.rss
    m = rss / optimum.variance
    hessian = np.empty((k + 1, k + 1))
    hessian[:k, :k] = optimum.hessian + m / rss**2 * np.outer(optimum.rss_1, optimum.rss_1)
    hessian[:k, k] = hessian[k, :k] = -2 * m * optimum.rss_1 / rss
    hessian[k, k] = 4 * m
    values, axes = np.linalg.eigh(hessian)
    curved = values > FLAT * values.max()
    uncertainty = 2 * (axes[:, curved] / values[curved]) @ axes[:, curved].T
    return _Satterthwaite(model, optimum.unscaled, np.concatenate([optimum.unscaled_1, 2 * optimum.unscaled[None]]), uncertainty)


@dataclass(frozen=True, eq=False)
class _KenwardRoger:
    """Adjusted covariance, and what the degrees of freedom need: Φ (p, p), ΦPΦ (k + 1, p, p), W (k + 1, k + 1), in the coordinates of Q."""

    model: _Model
    covariance: Array
    unscaled: Array
    change: Array
    W: Array

    def df(self, L: Array) -> Array:
        """pbkrtest's `Lb_ddf` of each row of L. For one degree of freedom, where A1 = A2, Kenward and Roger's (1997) formula is 2 / A2; written out,
        it is 0 / 0 at df 2.
        """
        rows = self.model.to_q(L)
        variance = np.einsum("ia,ab,ib->i", rows, self.unscaled, rows)
        with np.errstate(divide="ignore", invalid="ignore"):
            t = np.einsum("ia,rab,ib->ir", rows, self.change, rows) / variance[:, None]
            A2 = np.einsum("ir,rs,is->i", t, self.W, t)
            return np.asarray(2 / A2)


def _kenward_roger(model: _Model, optimum: _Point) -> _KenwardRoger:
    """Φ_A = Φ + 2Φ[ΣW(Q - PΦP)]Φ with W twice the inverse of the expected information (spec/human_study.md, section 3)."""
    p, k = len(model.names), len(optimum.theta)
    moments = model.products.moments(optimum.D)
    first, second, traces = model.products.residual_moments(optimum.D)
    P = -np.concatenate([moments.first, first[None]])[:, :p, :p]
    Q = np.empty((k + 1, k + 1, p, p))
    Q[:k, :k] = moments.second[..., :p, :p]
    Q[k, :] = Q[:, k] = second[:, :p, :p]
    K = np.empty((k + 1, k + 1))
    K[:k, :k] = moments.traces
    K[k, :] = K[:, k] = traces
    phi = optimum.unscaled
    phi_P = phi @ P
    information = K - 2 * np.einsum("ab,rsba->rs", phi, Q) + np.einsum("rab,sba->rs", phi_P, phi_P)
    unit = np.sqrt(np.abs(np.diag(information)))
    W = 2 * np.linalg.pinv(information / np.outer(unit, unit), rcond=1e-10, hermitian=True) / np.outer(unit, unit)
    change = phi_P @ phi
    inner = np.einsum("rs,rsab->ab", W, Q - np.einsum("rab,sbc->rsac", P, phi_P))
    adjusted = phi + 2 * phi @ inner @ phi
    return _KenwardRoger(model, model.scale**2 * optimum.variance * model.covariance(_symmetric(adjusted)), phi, change, W)
