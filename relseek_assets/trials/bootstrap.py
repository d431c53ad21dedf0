"""The Bayesian bootstrap over participants: an interval that needs no normal errors and no equal variances.

Every draw gives each participant a weight from the standard exponential and refits, at the variance components of the fit: a weighted
generalised least squares for linear and mixed models, weighted maximum likelihood for logit. Rubin (1981), Annals of Statistics 9.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
from scipy import special

from relseek_assets.trials.models import Fit, LogitFit, MixedModelFit

# Newton's steps from the maximum likelihood estimate, until none is longer than this share of the draws' spread: the next would be its square.
NEWTON_STEPS, SETTLED = 25, 1e-3


def bayesian_bootstrap(rows: pd.DataFrame, fit: Fit, L: np.ndarray, weights: np.ndarray | None, draws: int, seed: int) -> tuple[float, float]:
    """The central 95% of a contrast over `draws` draws; NaN where some draw cannot be solved.

    Args:
        rows: the rows that `fit` analysed, with their participant and value; `weights` are theirs.
        L: one entry a coefficient.
    """
    codes = pd.factorize(rows["participant"])[0]
    drawn = np.random.default_rng(seed).standard_exponential((draws, codes.max() + 1))
    y = rows["value"].to_numpy(float)
    try:
        betas = _logit(fit, y, codes, drawn, weights) if isinstance(fit, LogitFit) else _least_squares(fit, y, codes, drawn, weights)
    except np.linalg.LinAlgError:
        return float("nan"), float("nan")
    lower, upper = np.quantile(betas @ (L / fit.design.lengths), [0.025, 0.975])
    return float(lower), float(upper)


def _least_squares(fit: Fit, y: np.ndarray, codes: np.ndarray, drawn: np.ndarray, weights: np.ndarray | None) -> np.ndarray:
    """Draws x coefficients: participants' own X'V⁻¹X and X'V⁻¹y, weighted and solved."""
    B = np.column_stack([fit.design.scaled, y])
    scale = np.sqrt(weights)[:, None] if weights is not None else np.ones((len(y), 1))
    B = _by_participant(B * scale, codes)
    own = np.swapaxes(B, 1, 2) @ B
    if isinstance(fit, MixedModelFit):
        Z, D = _by_participant(fit.Z * scale, codes), fit.relative_covariance
        S, T = np.swapaxes(Z, 1, 2) @ Z, np.swapaxes(Z, 1, 2) @ B
        own = own - np.swapaxes(T, 1, 2) @ (D @ np.linalg.solve(np.eye(len(D)) + S @ D, T))
    p = fit.design.X.shape[1]
    sums = (drawn @ own.reshape(len(own), -1)).reshape(len(drawn), p + 1, p + 1)
    return np.linalg.solve(sums[:, :p, :p], sums[:, :p, p:])[:, :, 0]


def _by_participant(values: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """Rows x columns as participants x most rows of one x columns, filled up with zeros, which add nothing to a product."""
    order = np.argsort(codes, kind="stable")
    counts = np.bincount(codes)
    within = np.arange(len(codes)) - np.repeat(np.cumsum(counts) - counts, counts)
    found = np.zeros((len(counts), counts.max(), values.shape[1]))
    found[codes[order], within] = values[order]
    return found


def _logit(fit: LogitFit, y: np.ndarray, codes: np.ndarray, drawn: np.ndarray, weights: np.ndarray | None) -> np.ndarray:
    X = fit.design.scaled
    W = drawn[:, codes] * (weights if weights is not None else 1.0)
    outer = (X[:, :, None] * X[:, None, :]).reshape(len(X), -1)
    betas = np.tile(fit.coefficients * fit.design.lengths, (len(drawn), 1))
    for _ in range(NEWTON_STEPS):
        mean = special.expit(betas @ X.T)
        information = ((W * mean * (1 - mean)) @ outer).reshape(len(drawn), X.shape[1], X.shape[1])
        steps = np.linalg.solve(information, ((W * (y - mean)) @ X)[:, :, None])[:, :, 0]
        betas = betas + steps
        if (np.abs(steps) <= SETTLED * betas.std(axis=0)).all():
            break
    return betas
