"""Common factor analysis of a correlation matrix: polychoric correlations, extraction, rotation, scores, fit and number of factors.

Arrays in, arrays out. Which items make an instrument, how answers are coded and what a factor is called do not belong here.
Conventions are those of R's psych (2.x), with which the published factors were made (human_study.md, section 12).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import optimize, special

UNIQUENESS_FLOOR = 0.005
ZERO_CELL = 0.5  # count put into empty cells of a pair's table, as a share of its n
BRENT_TOLERANCE = float(np.finfo(float).eps ** 0.25)  # R's optimize(), where psych leaves it
EIGENVALUE_FLOOR = 1e-10
QUARTIMIN_TOLERANCE = 1e-9
VARIMAX_TOLERANCE = 1e-5  # relative gain at which R's varimax and Python's factor_analyzer stop, short of the optimum


class FactorError(ValueError):
    """Data that no factor analysis can be made of."""


# --- correlations -----------------------------------------------------------------------------------------------------


def bivariate_normal(h: np.ndarray, k: np.ndarray, rho: float) -> np.ndarray:
    """P(X <= h, Y <= k) of standard normals with correlation `rho`, elementwise, through Owen's T (Owen 1956, equation 2.1)."""
    h, k = np.broadcast_arrays(np.asarray(h, dtype=float), np.asarray(k, dtype=float))
    if abs(rho) >= 1:
        joint = np.minimum(special.ndtr(h), special.ndtr(k))
        return joint if rho > 0 else np.maximum(special.ndtr(h) + special.ndtr(k) - 1, 0.0)
    root = np.sqrt(1 - rho**2)
    opposite = (h * k < 0) | ((h * k == 0) & (h + k < 0))
    both_zero = 0.25 + np.arcsin(rho) / (2 * np.pi)
    with np.errstate(divide="ignore", invalid="ignore"):
        terms = special.owens_t(h, (k / h - rho) / root) + special.owens_t(k, (h / k - rho) / root)
        found = 0.5 * (special.ndtr(h) + special.ndtr(k) - opposite) - terms
    return np.where((h == 0) & (k == 0), both_zero, found)


def polychoric_pair(table: np.ndarray) -> float:
    """Two-step polychoric correlation of one pair of items from their counts.

    Unused categories are dropped, empty cells hold half an answer, and thresholds are those of this very table, which psych does
    where items have unequal numbers of categories (`global = FALSE`).
    """
    shares = table / table.sum()
    shares = shares[shares.sum(1) > 0][:, shares.sum(0) > 0]
    if min(shares.shape) < 2:
        return float("nan")
    shares = np.where(shares == 0, ZERO_CELL / table.sum(), shares)
    # The filled cells can bring a rare last category's threshold past 1, where psych has no threshold at all.
    rows, columns = (special.ndtri(np.minimum(np.cumsum(shares.sum(axis))[:-1], 1 - 1e-10)) for axis in (1, 0))

    def deviance(rho: float) -> float:
        below = np.zeros((len(rows) + 2, len(columns) + 2))
        below[1:-1, 1:-1] = bivariate_normal(rows[:, None], columns[None, :], rho)
        below[1:-1, -1], below[-1, 1:-1], below[-1, -1] = special.ndtr(rows), special.ndtr(columns), 1.0
        cells = np.diff(np.diff(below, axis=0), axis=1)
        seen = cells > 0
        return -float(shares[seen] @ np.log(cells[seen]))

    return float(optimize.minimize_scalar(deviance, bounds=(-1, 1), method="bounded", options={"xatol": BRENT_TOLERANCE}).x)


def polychoric(items: np.ndarray) -> np.ndarray:
    """Polychoric correlations (p, p) of ordinal items (n, p), each pair from the rows that hold both; NaN is a missing answer.

    A matrix that is not positive definite is smoothed by lifting its eigenvalues, as psych's cor.smooth does.
    Raises FactorError where a pair of items has fewer than two categories in common rows.
    """
    codes = [np.unique(column[~np.isnan(column)], return_inverse=True)[1] for column in items.T]
    coded = np.full(items.shape, -1, dtype=np.int64)
    for column, code in enumerate(codes):
        coded[~np.isnan(items[:, column]), column] = code
    found = np.eye(items.shape[1])
    for one, other in zip(*np.triu_indices(items.shape[1], 1), strict=True):
        both = (coded[:, one] >= 0) & (coded[:, other] >= 0)
        shape = coded[:, one].max() + 1, coded[:, other].max() + 1
        table = np.bincount(coded[both, one] * shape[1] + coded[both, other], minlength=shape[0] * shape[1]).reshape(shape)
        rho = polychoric_pair(table) if both.any() else float("nan")
        if np.isnan(rho):
            raise FactorError(f"items {one} and {other} (counted from 0) do not vary together in any rows; leave one of them out")
        found[one, other] = found[other, one] = rho
    return _smoothed(found)


def _smoothed(correlation: np.ndarray) -> np.ndarray:
    values, vectors = np.linalg.eigh(correlation)
    if values[0] >= np.finfo(float).eps:
        return correlation
    values = np.maximum(values, EIGENVALUE_FLOOR)
    values *= len(values) / values.sum()
    smooth = (vectors * values) @ vectors.T
    scale = np.sqrt(np.diag(smooth))
    return smooth / np.outer(scale, scale)


# --- extraction and rotation ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Factors:
    """Loadings (pattern, p x m), factor correlations (m x m), uniquenesses (p) and share of variance by factor, largest first."""

    loadings: np.ndarray
    correlations: np.ndarray
    uniquenesses: np.ndarray
    variance: np.ndarray

    @property
    def structure(self) -> np.ndarray:
        """Correlations of items with factors, p x m."""
        return self.loadings @ self.correlations

    @property
    def model(self) -> np.ndarray:
        """Correlations that the factors imply, communalities on the diagonal, p x p."""
        return self.structure @ self.loadings.T


def extract(correlation: np.ndarray, factors: int) -> np.ndarray:
    """Unrotated loadings (p, m) with least squares of the residual correlations (ULS, equally minres), columns with positive sums.

    For given uniquenesses the best loadings are the leading eigenvectors of R - Psi, and half the sum of squares of the other
    eigenvalues is what is left (Harman and Jones 1966); it is minimised over Psi in [0.005, 1].
    """
    p = len(correlation)
    if not 0 < factors < p:
        raise FactorError(f"{factors} factors cannot be extracted from {p} items")

    def left_over(uniquenesses: np.ndarray) -> tuple[float, np.ndarray]:
        values, vectors = np.linalg.eigh(correlation - np.diag(uniquenesses))
        rest = values[: p - factors]
        return 0.5 * float(rest @ rest), -(vectors[:, : p - factors] ** 2 @ rest)

    start = np.clip(1 / np.diag(np.linalg.pinv(correlation)), UNIQUENESS_FLOOR, 1.0)
    options = {"ftol": 1e-15, "gtol": 1e-9, "maxiter": 2000, "maxfun": 20000}
    best = optimize.minimize(left_over, start, jac=True, method="L-BFGS-B", bounds=[(UNIQUENESS_FLOOR, 1.0)] * p, options=options)
    values, vectors = np.linalg.eigh(correlation - np.diag(best.x))
    leading = np.arange(p - 1, p - 1 - factors, -1)
    return _positive(vectors[:, leading] * np.sqrt(np.maximum(values[leading], 0.0)))


def _positive(loadings: np.ndarray) -> np.ndarray:
    return loadings * np.where(loadings.sum(0) < 0, -1.0, 1.0)


def varimax(loadings: np.ndarray) -> np.ndarray:
    """Varimax rotation with Kaiser's normalisation, by singular value decompositions (Kaiser 1958; Horst 1965).

    It stops where the programs stop that made the published factors, third decimals of loadings away from the optimum.
    """
    lengths = np.sqrt((loadings**2).sum(1, keepdims=True))
    lengths[lengths == 0] = 1.0
    rows = loadings / lengths
    rotation, reached = np.eye(loadings.shape[1]), 0.0
    for _ in range(5000):
        turned = rows @ rotation
        left, singular, right = np.linalg.svd(rows.T @ (turned**3 - turned * (turned**2).mean(0)))
        rotation = left @ right
        if singular.sum() < reached * (1 + VARIMAX_TOLERANCE):
            break
        reached = singular.sum()
    return (rows @ rotation) * lengths


def quartimin(loadings: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Oblimin rotation with gamma 0 and without Kaiser's normalisation: pattern loadings (p, m) and factor correlations (m, m).

    Gradient projection from the unrotated axes (Jennrich 2002; Bernaards and Jennrich 2005).
    """
    m = loadings.shape[1]
    axes, step = np.eye(m), 1.0
    others = 1 - np.eye(m)

    def rotated(frame: np.ndarray) -> tuple[np.ndarray, float]:
        turned = loadings @ np.linalg.inv(frame).T
        return turned, float((turned**2 * (turned**2 @ others)).sum() / 4)

    turned, value = rotated(axes)
    for _ in range(5000):
        gradient = -(turned.T @ (turned * (turned**2 @ others)) @ np.linalg.inv(axes)).T
        tangent = gradient - axes * (axes * gradient).sum(0)
        slope = float((tangent**2).sum())
        if np.sqrt(slope) < QUARTIMIN_TOLERANCE:
            break
        step *= 2
        for _ in range(40):
            moved = axes - step * tangent
            moved /= np.sqrt((moved**2).sum(0))
            candidate, reached = rotated(moved)
            if value - reached > 0.5 * slope * step:
                break
            step /= 2
        else:
            break  # no step improves in floating point: this is the minimum
        axes, turned, value = moved, candidate, reached
    return turned, axes.T @ axes


def factor_analysis(correlation: np.ndarray, factors: int, rotation: str) -> Factors:
    """Extract and rotate ("quartimin" or "varimax"); factors by the sum of squares of their loadings, columns with positive sums."""
    raw = extract(correlation, factors)
    phi = np.eye(factors)
    turned = raw
    if factors > 1 and rotation == "quartimin":
        turned, phi = quartimin(raw)
    elif factors > 1:
        turned = varimax(raw)
    signs = np.where(turned.sum(0) < 0, -1.0, 1.0)
    order = np.argsort(-(turned**2).sum(0), kind="stable")
    turned = (turned * signs)[:, order]
    phi = (phi * np.outer(signs, signs))[np.ix_(order, order)]
    variance = np.diag(phi @ turned.T @ turned) / len(correlation)
    uniquenesses = 1 - np.diag(turned @ phi @ turned.T)
    return Factors(turned, phi, uniquenesses, variance)


# --- scores -----------------------------------------------------------------------------------------------------------


def ten_berge_weights(correlation: np.ndarray, factors: Factors) -> np.ndarray:
    """Weights (p, m) of standardised items for scores that correlate exactly as the factors do (ten Berge et al. 1999)."""
    inverse = np.linalg.inv(correlation)
    root = _root(inverse)
    loadings = factors.loadings @ _root(factors.correlations)
    directions = root @ loadings @ np.linalg.inv(_root(loadings.T @ inverse @ loadings))
    return root @ directions @ _root(factors.correlations)


def regression_weights(correlation: np.ndarray, factors: Factors) -> np.ndarray:
    """Weights (p, m) of standardised items for Thurstone's regression scores."""
    return np.linalg.solve(correlation, factors.structure)


def _root(matrix: np.ndarray) -> np.ndarray:
    values, vectors = np.linalg.eigh(matrix)
    return (vectors * np.sqrt(np.maximum(values, 0.0))) @ vectors.T


# --- fit --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FactorFit:
    """How well factors reproduce a correlation matrix of `n` rows; `dof` and `chi_square` are of the maximum likelihood discrepancy."""

    kmo: float
    bartlett_chi_square: float
    bartlett_dof: int
    chi_square: float
    dof: int
    rmsr: float
    rmsea: float
    tli: float
    bic: float
    n: int


def kaiser_meyer_olkin(correlation: np.ndarray) -> float:
    """Sampling adequacy: squared correlations against squared partial correlations, overall."""
    inverse = np.linalg.inv(correlation)
    scale = np.sqrt(np.diag(inverse))
    partial = inverse / np.outer(scale, scale)
    off = ~np.eye(len(correlation), dtype=bool)
    return float((correlation[off] ** 2).sum() / ((correlation[off] ** 2).sum() + (partial[off] ** 2).sum()))


def bartlett_sphericity(correlation: np.ndarray, n: int) -> tuple[float, int]:
    """Chi-square and its degrees of freedom of the hypothesis that no items correlate."""
    p = len(correlation)
    return float(-np.linalg.slogdet(correlation)[1] * (n - 1 - (2 * p + 5) / 6)), p * (p - 1) // 2


def rmsea(chi_square: float, dof: int, n: int) -> float:
    """Root mean square error of approximation, with n in the one and n - 1 in the other place, as psych has it."""
    return float(np.sqrt(max(chi_square / (dof * n) - 1 / (n - 1), 0.0)))


def tucker_lewis(chi_square: float, dof: int, null_chi_square: float, null_dof: int) -> float:
    """Tucker-Lewis index against the model without factors."""
    null = null_chi_square / null_dof
    return float((null - chi_square / dof) / (null - 1))


def bayesian_criterion(chi_square: float, dof: int, n: int) -> float:
    """BIC against the saturated model, chi-square less dof log n."""
    return float(chi_square - dof * np.log(n))


def factor_fit(correlation: np.ndarray, factors: Factors, n: int) -> FactorFit:
    """Fit of factors to the matrix they were extracted from; raises FactorError where they leave no degrees of freedom."""
    p, m = factors.loadings.shape
    dof = p * (p - 1) // 2 - p * m + m * (m - 1) // 2
    if dof < 1:
        raise FactorError(f"{m} factors of {p} items leave {dof} degrees of freedom: there is no fit to judge")
    implied = factors.model.copy()
    np.fill_diagonal(implied, 1.0)
    ratio = np.linalg.solve(implied, correlation)
    discrepancy = np.trace(ratio) - np.linalg.slogdet(ratio)[1] - p
    multiplier = n - 1 - (2 * p + 5) / 6 - 2 * m / 3
    chi_square = float(discrepancy * multiplier)
    null, null_dof = bartlett_sphericity(correlation, n)
    # In the Tucker-Lewis index psych scales both discrepancies by the multiplier of the model with factors.
    null_scaled = float(-np.linalg.slogdet(correlation)[1] * multiplier)
    return FactorFit(
        kmo=kaiser_meyer_olkin(correlation),
        bartlett_chi_square=null,
        bartlett_dof=null_dof,
        chi_square=chi_square,
        dof=dof,
        rmsr=float(np.sqrt(((correlation - implied) ** 2).sum() / (p * (p - 1)))),
        rmsea=rmsea(chi_square, dof, n),
        tli=tucker_lewis(chi_square, dof, null_scaled, null_dof),
        bic=bayesian_criterion(chi_square, dof, n),
        n=n,
    )


# --- number of factors ------------------------------------------------------------------------------------------------


def common_eigenvalues(correlation: np.ndarray) -> np.ndarray:
    """Eigenvalues, largest first, of the matrix with the communalities of one common factor on its diagonal."""
    loadings = extract(correlation, 1)
    reduced = correlation.copy()
    np.fill_diagonal(reduced, (loadings**2).sum(1))
    return np.linalg.eigvalsh(reduced)[::-1]


def parallel_analysis(correlation: np.ndarray, n: int, *, draws: int = 20, seed: int = 0) -> int:
    """Factors whose common eigenvalue exceeds the mean of those of uncorrelated normal data of the same shape (Horn 1965)."""
    generator = np.random.default_rng(seed)
    p = len(correlation)
    noise = [common_eigenvalues(np.corrcoef(generator.standard_normal((n, p)), rowvar=False)) for _ in range(draws)]
    above = common_eigenvalues(correlation) > np.mean(noise, axis=0)
    return p if above.all() else int(np.argmin(above))


def very_simple_structure(correlation: np.ndarray, complexity: int, largest: int = 8) -> int:
    """Number of factors whose varimax loadings, the `complexity` largest of each item kept, fit best (Revelle and Rocklin 1979).

    The diagonal counts, although psych's argument says that it does not: that is how the published numbers were made.
    """
    fits = []
    for factors in range(complexity, largest + 1):
        loadings = factor_analysis(correlation, factors, "varimax").loadings
        kept = np.argsort(-np.abs(loadings), axis=1)[:, :complexity]
        simple = np.zeros_like(loadings)
        np.put_along_axis(simple, kept, np.take_along_axis(loadings, kept, 1), 1)
        fits.append(1 - ((correlation - simple @ simple.T) ** 2).sum() / (correlation**2).sum())
    return complexity + int(np.argmax(fits))
