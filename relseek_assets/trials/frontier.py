"""Trend of judged behaviour over models' release dates, and the dose of a vector that a score is worth.

Takes judged scores; asking models, judging them and finding out when they were released belong to other stages.
Source: human_study.md, section 15.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy import stats

from relseek_assets import mixed_models
from relseek_assets.trials.raw import TrialFault

SCORE_COLUMNS = ("model_name", "provider", "entry_id", "score", "released")
DAYS_PER_YEAR = 365.25
#: The catalogue lists it by a later day than that of its release (section 15).
RELEASED = {"openai/gpt-3.5-turbo": "2023-03-01"}
LEVEL = 0.95
BOOTSTRAP_DRAWS = 10_000


class FrontierError(TrialFault):
    """Scores that no trend or dose can be estimated from."""


@dataclass(frozen=True)
class DoseEquivalent:
    """Doses at which the vector scores as the models of one year do.

    `mean` is over responses (published under the name of a median), `median` over models' means; each with its dose. The interval
    is that of the median's dose, over resampled models. A dose is NaN where the score is outside of those measured.
    """

    year: int
    mean: float
    mean_dose: float
    median: float
    median_dose: float
    lower: float
    upper: float
    models: int
    n: int
    draws: int


def with_releases(responses: pd.DataFrame, catalogue: pd.DataFrame) -> pd.DataFrame:
    """The columns of `SCORE_COLUMNS`: responses with their model's release date, missing where the catalogue does not list it.

    `responses` has model_id (provider/model), entry_id and relationship_score; `catalogue` id and created_timestamp (s, UTC).
    """
    catalogue = catalogue.drop_duplicates("id").set_index("id")
    released = pd.to_datetime(catalogue["created_timestamp"].astype(float), unit="s")
    for model, day in RELEASED.items():
        if model in released.index:
            released[model] = pd.Timestamp(day)
    models = responses["model_id"]
    columns = (models, models.str.split("/").str[0], responses["entry_id"], responses["relationship_score"], models.map(released))
    return pd.DataFrame(dict(zip(SCORE_COLUMNS, columns, strict=True)))


def panel(scores: pd.DataFrame) -> pd.DataFrame:
    """Scored responses with `years` since the earliest release in the table.

    `scores` has model_name, provider, entry_id, score, released (dates). Rows without a score or a release date are left out.
    Raises FrontierError for a missing column, or a model with two release dates or providers.
    """
    if missing := [column for column in SCORE_COLUMNS if column not in scores]:
        raise FrontierError(f"scores has no column {missing[0]!r}; it has {list(scores.columns)}")
    kept = scores.dropna(subset=["score", "released"]).reset_index(drop=True)
    if kept.empty:
        raise FrontierError("scores has no row with both a score and a release date")
    for column in ("released", "provider"):
        counts = kept.groupby("model_name")[column].nunique(dropna=False)
        if (counts > 1).any():
            raise FrontierError(f"{counts.index[counts > 1][0]} has {counts.max()} values of {column}; a model has one")
    released = pd.to_datetime(kept["released"])
    # Dates, not times of day: a release counts in whole days.
    days = (released.dt.normalize() - released.min().normalize()).dt.days
    if not days.any():
        raise FrontierError("all models were released on the same day: there is no trend over time")
    return kept.assign(years=days / DAYS_PER_YEAR, released=released)


def trend(scores: pd.DataFrame) -> pd.DataFrame:
    """Change of the score per year by three models: model, estimate, se, df, statistic, p, lower, upper, r_squared, n, models, providers.

    `ols` ignores that responses come from models and prompts; `provider_fixed_effects` compares models of the same provider;
    `mixed` crosses random intercepts of models and prompts (maximum likelihood, Satterthwaite's p, 1.96 standard errors either
    side). r_squared of the last is 1 - SS(residual) / SS(total) with random effects among the fitted. Source: section 15.
    """
    table = panel(scores)
    years = table["years"].to_numpy()
    intercept = np.ones((len(table), 1))
    providers = pd.get_dummies(table["provider"].astype(object), dtype=float).to_numpy()
    rows = {
        "ols": _least_squares(table["score"].to_numpy(float), np.column_stack([years, intercept])),
        "provider_fixed_effects": _least_squares(table["score"].to_numpy(float), np.column_stack([years, providers])),
        "mixed": _crossed(table),
    }
    found = pd.DataFrame([{"model": name, **row} for name, row in rows.items()])
    return found.assign(n=len(table), models=table["model_name"].nunique(), providers=table["provider"].nunique())


def _least_squares(y: np.ndarray, design: np.ndarray) -> dict[str, float]:
    """Estimate and t-test of the first column of `design`, and R squared against the mean."""
    if np.linalg.matrix_rank(design) < design.shape[1]:
        raise FrontierError("release dates do not vary within any provider: their trend cannot be told from the providers' differences")
    coefficients, *_ = np.linalg.lstsq(design, y, rcond=None)
    residuals = y - design @ coefficients
    df = len(y) - design.shape[1]
    se = float(np.sqrt(residuals @ residuals / df * np.linalg.inv(design.T @ design)[0, 0]))
    estimate = float(coefficients[0])
    half = se * float(stats.t.ppf((1 + LEVEL) / 2, df))
    p = 2 * float(stats.t.sf(abs(estimate / se), df))
    r_squared = 1 - float(residuals @ residuals) / float(((y - y.mean()) ** 2).sum())
    return _row(estimate, se, df, p, half, r_squared)


def _crossed(table: pd.DataFrame) -> dict[str, float]:
    data = table[["score", "years", "model_name", "entry_id"]].astype({"score": float})
    fitted = mixed_models.fit("score ~ years + (1 | model_name) + (1 | entry_id)", data, reml=False)
    (tested,) = fitted.contrast(np.array([[0.0, 1.0]]), method="satterthwaite").to_dict("records")
    y = data["score"].to_numpy()
    r_squared = 1 - float(fitted.residuals @ fitted.residuals) / float(((y - y.mean()) ** 2).sum())
    return _row(tested["estimate"], tested["se"], tested["df"], tested["p"], 1.96 * tested["se"], r_squared)


def _row(estimate: float, se: float, df: float, p: float, half: float, r_squared: float) -> dict[str, float]:
    ends = {"lower": estimate - half, "upper": estimate + half}
    return {"estimate": estimate, "se": se, "df": df, "statistic": estimate / se, "p": p, **ends, "r_squared": r_squared}


def vector_scores(vector_scores: pd.DataFrame) -> pd.DataFrame:
    """Mean score of a vector's generations by dose with a t-interval: multiplier, mean, sd, se, df, lower, upper, n.

    `vector_scores` has multiplier and score; rows without a score are left out. Raises FrontierError where a dose has one row.
    """
    found = vector_scores.dropna(subset=["score"]).groupby("multiplier")["score"].agg(["mean", "std", "count"]).reset_index()
    found.columns = pd.Index(["multiplier", "mean", "sd", "n"])
    if (found["n"] < 2).any():
        raise FrontierError(f"dose {found.loc[found['n'] < 2, 'multiplier'].iloc[0]} has a single score: no interval can be made")
    se, df = found["sd"] / np.sqrt(found["n"]), found["n"] - 1
    half = se * stats.t.ppf((1 + LEVEL) / 2, df)
    found = found.assign(se=se, df=df, lower=found["mean"] - half, upper=found["mean"] + half)
    return found[["multiplier", "mean", "sd", "se", "df", "lower", "upper", "n"]]


def equivalent_dose(score: np.ndarray | float, dose_means: pd.DataFrame) -> np.ndarray:
    """Dose at which the vector's mean score equals `score`, by straight lines between the means of neighbouring doses.

    `dose_means` has multiplier and mean. NaN outside of the means. Between doses 0 and 0.5 this is the published two-point rule.
    Raises FrontierError where the means do not rise with the dose, so that a score would have several doses.
    """
    ordered = dose_means.sort_values("multiplier")
    means = ordered["mean"].to_numpy(float)
    if len(means) < 2 or not (np.diff(means) > 0).all():
        raise FrontierError(f"mean scores {means.round(3).tolist()} do not rise with the dose: a score has no single dose")
    return np.interp(np.asarray(score, dtype=float), means, ordered["multiplier"].to_numpy(float), left=np.nan, right=np.nan)


def dose_equivalent(scores: pd.DataFrame, dose_means: pd.DataFrame, year: int, *, draws: int = BOOTSTRAP_DRAWS, seed: int = 42) -> DoseEquivalent:
    """The dose of the models released in `year`, by the mean of their responses and by the median of their means."""
    table = panel(scores)
    chosen = table[table["released"].dt.year == year]
    if chosen.empty:
        raise FrontierError(f"scores has no model released in {year}; years are {sorted(table['released'].dt.year.unique().tolist())}")
    means = chosen.groupby("model_name")["score"].mean().to_numpy(float)
    drawn = np.random.default_rng(seed).integers(0, len(means), (draws, len(means)))
    doses = equivalent_dose(np.median(means[drawn], axis=1), dose_means)
    mean, median = float(chosen["score"].mean()), float(np.median(means))
    lower, upper = np.quantile(doses, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return DoseEquivalent(
        year=year,
        mean=mean,
        mean_dose=float(equivalent_dose(mean, dose_means)),
        median=median,
        median_dose=float(equivalent_dose(median, dose_means)),
        lower=float(lower),
        upper=float(upper),
        models=len(means),
        n=len(chosen),
        draws=draws,
    )
