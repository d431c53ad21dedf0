"""From the rows of one outcome to its tables: specification, fits, contrasts, dose-response curve, trajectories, robustness, equivalence.

Here belongs the order of the steps. What each step does belongs in the module of its name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from scipy import special, stats

from relseek_assets.trials import formulas, models
from relseek_assets.trials.bootstrap import bayesian_bootstrap
from relseek_assets.trials.contrasts import COARSENED, PRIMARY, ReferenceGrid, contrasts, specifications
from relseek_assets.trials.forms import Specification, specify
from relseek_assets.trials.formulas import Form
from relseek_assets.trials.frames import HIGH, LOW, OutcomeFrame
from relseek_assets.trials.models import Fit, LogitFit, MixedModelFit, SeparationFault

CURVE_POINTS = 41
EQUIVALENT_BELOW = 0.05
WEIGHTED = "full + attrition weights"
RESAMPLED = ("full", WEIGHTED)  # specifications that a bootstrap is drawn for
MIXED, LEAST_SQUARES, LOGIT = "lmm", "ols", "logit"
SEPARATED = "perfect separation"  # in the place of the terms of a logit that has no finite estimate


def _head(frame: OutcomeFrame, table: pd.DataFrame) -> pd.DataFrame:
    table.insert(0, "study", frame.study)
    table.insert(1, "outcome", frame.outcome.name)
    return table


def forms_table(frame: OutcomeFrame) -> pd.DataFrame:
    """Polynomials compared, with the one chosen by the published rule and by AIC, and the heterogeneity test of pooled items."""
    found = specify(frame)
    table = found.comparison.copy()
    table["selected"] = table["form"].eq(found.form)
    table["selected_by_aic"] = table["form"].eq(found.form_by_aic)
    chi2, df, p = found.heterogeneity or (np.nan, None, np.nan)
    table["heterogeneous"], table["heterogeneity_chi2"], table["heterogeneity_df"], table["heterogeneity_p"] = found.heterogeneous, chi2, df, p
    return _head(frame, table)


def specification_of(forms: pd.DataFrame) -> Specification:
    """The specification that a table of forms has chosen."""
    form = str(forms.loc[forms["selected"], "form"].iloc[0])
    by_aic = str(forms.loc[forms["selected_by_aic"], "form"].iloc[0])
    return Specification(form, by_aic, bool(forms["heterogeneous"].iloc[0]), None, forms)  # type: ignore[arg-type]


def fit_one(frame: OutcomeFrame, specification: Specification, name: str, theta: Any = None) -> Fit:
    """One of the six models of an outcome; `theta` of an earlier fit spares the search for the optimum."""
    start = None if theta is None else np.asarray(theta, dtype=float)
    return models.fit(frame, specifications(frame, specification)[name], start=start)


def fit_all(frame: OutcomeFrame, specification: Specification) -> dict[str, Fit]:
    """The six models of an outcome, without those that separate, where others do not.

    Raises:
        SeparationFault: every model separates.
    """
    found: dict[str, Fit] = {}
    faults = []
    for name in specifications(frame, specification):
        try:
            found[name] = fit_one(frame, specification, name)
        except SeparationFault as fault:
            faults.append(fault)
    if not found:
        raise faults[0]
    return found


def fits_table(frame: OutcomeFrame, specification: Specification, fits: Mapping[str, Fit]) -> pd.DataFrame:
    """One row a model and coefficient, with what the model as a whole says repeated beside; one row without numbers for a model that separates."""
    written = specifications(frame, specification)
    parts = []
    for name in written:
        if (fit := fits.get(name)) is None:
            head = {"model": name, "term": SEPARATED, "formula": formulas.formula(frame, written[name]), "family": LOGIT, "n": len(frame.rows)}
            numbers = ("estimate", "se", "df", "statistic", "p", "lower", "upper", "log_likelihood", "sigma")
            row = {**head, **dict.fromkeys(numbers, np.nan), "participants": frame.participants, "theta": None}
            parts.append(pd.DataFrame([{**row, "converged": False, "singular": False}]))
            continue
        table = fit.coefficient_table().reset_index()
        table.insert(0, "model", name)
        table["formula"] = formulas.formula(frame, written[name])
        table["family"] = family_of(fit)
        table["n"] = fit.n
        table["participants"] = frame.participants
        table["log_likelihood"] = fit.log_likelihood
        mixed = fit.result if isinstance(fit, MixedModelFit) else None
        table["theta"] = [None if mixed is None else [float(value) for value in mixed.theta]] * len(table)
        table["sigma"] = np.nan if mixed is None else mixed.sigma
        table["converged"] = True if mixed is None else mixed.converged
        table["singular"] = False if mixed is None else mixed.singular
        parts.append(table)
    return _head(frame, _finite_df(pd.concat(parts, ignore_index=True).rename(columns={"p": "p_raw"})))


def thetas_of(fits: pd.DataFrame) -> dict[str, Any]:
    first = fits.drop_duplicates("model").set_index("model")["theta"]
    return {str(name): theta for name, theta in first.items() if theta is not None}


def family_of(fit: Fit) -> str:
    return MIXED if isinstance(fit, MixedModelFit) else LOGIT if isinstance(fit, LogitFit) else LEAST_SQUARES


def contrasts_table(frame: OutcomeFrame, fits: Mapping[str, Fit]) -> pd.DataFrame:
    """Every contrast of the outcome; p_local and p_global wait for the families."""
    table = contrasts(frame, fits).rename(columns={"p": "p_raw"})
    kinds = {name: family_of(fit) for name, fit in fits.items()}
    table["method"] = [_method(kinds[row.model], row.test_type) for row in table.itertuples()]
    table["n"] = table["model"].map({name: fit.n for name, fit in fits.items()})
    table["participants"] = frame.participants
    table["p_local"], table["p_global"] = np.nan, np.nan
    table["unit"] = frame.outcome.unit
    return _head(frame, _finite_df(table))


def _method(family: str, test_type: str) -> str:
    if family == MIXED:
        return "Wald t, residual df" if test_type in ("dose_response", "temporal_coefficient") else "Kenward-Roger"
    if family == LOGIT:
        return "Wald z, profile interval" if test_type == "dose_response" else "Wald z"
    return "t"


def _finite_df(table: pd.DataFrame) -> pd.DataFrame:
    """Degrees of freedom of a z test are null and not infinite."""
    table["df"] = table["df"].where(np.isfinite(table["df"]), np.nan)
    return table


def equivalence_table(table: pd.DataFrame, margin: float) -> pd.DataFrame:
    """Two one-sided tests of every primary main effect against ±`margin`: whether it is smaller than that.

    Schuirmann (1987); p is the larger of the two, and the interval is the 90% one that the test goes with.
    """
    found = table[table["variant"].eq(PRIMARY) & table["test_type"].str.startswith("main_effect") & table["estimate"].notna()].reset_index(drop=True)
    df = found["df"].fillna(np.inf)
    above, below = (found["estimate"] + margin) / found["se"], (margin - found["estimate"]) / found["se"]
    half = stats.t.ppf(0.95, df) * found["se"]
    found = found[["study", "outcome", "contrast", "estimate", "se", "df", "n"]].assign(
        margin=margin, lower=found["estimate"] - half, upper=found["estimate"] + half, p=np.maximum(stats.t.sf(above, df), stats.t.sf(below, df))
    )
    return found.assign(equivalent=found["p"] < EQUIVALENT_BELOW)


# --- curves -----------------------------------------------------------------------------------------------------------


def dose_response_curve(frame: OutcomeFrame, fit: Fit) -> pd.DataFrame:
    """Marginal means of the additive model along the dose, and the raw means of participants at each dose, on the outcome's own scale."""
    points = np.linspace(min(frame.doses), max(frame.doses), CURVE_POINTS)
    grid = ReferenceGrid(frame, fit, coarsened=False, doses=tuple(points))
    table = fit.contrast(np.array([grid.mean(float(dose)) for dose in points]))
    if isinstance(fit, LogitFit):
        table["se"] = np.nan
        table[["estimate", "lower", "upper"]] = special.expit(table[["estimate", "lower", "upper"]].to_numpy())
    model = pd.DataFrame({"kind": "model", "dose": points, **{name: table[name].to_numpy() for name in ("estimate", "se", "lower", "upper")}})
    model["n"] = fit.n
    return _head(frame, pd.concat([model, _raw_means(frame, ["dose"])], ignore_index=True))


def trajectories(frame: OutcomeFrame, fit: Fit) -> pd.DataFrame:
    """Means by dose over time: marginal means of the full model, and raw means of participants."""
    grid = ReferenceGrid(frame, fit, coarsened=False)
    cells = [(dose, time) for dose in frame.doses for time in map(float, frame.endpoints)]
    table = fit.contrast(np.array([grid.mean(dose, time=time) for dose, time in cells]))
    model = pd.DataFrame({"kind": "model", "dose": [dose for dose, _ in cells], "time": [time for _, time in cells]})
    model = pd.concat([model, table[["estimate", "se", "lower", "upper"]].reset_index(drop=True)], axis=1)
    model["n"] = fit.n
    return _head(frame, pd.concat([model, _raw_means(frame, ["dose", "time"])], ignore_index=True))


def _raw_means(frame: OutcomeFrame, by: list[str]) -> pd.DataFrame:
    """Mean over participants of their own means, with a t interval; Wilson's for shares."""
    own = frame.rows.groupby([*by, "participant"], observed=True)["value"].mean().reset_index()
    table = own.groupby(by)["value"].agg(["mean", "sem", "size"]).reset_index()
    half = stats.t.ppf(0.975, table["size"] - 1) * table["sem"]
    table["lower"], table["upper"] = table["mean"] - half, table["mean"] + half
    if frame.outcome.model == "logit":
        z = stats.norm.ppf(0.975)
        centre = (table["mean"] + z**2 / (2 * table["size"])) / (1 + z**2 / table["size"])
        spread = z / (1 + z**2 / table["size"]) * np.sqrt(table["mean"] * (1 - table["mean"]) / table["size"] + z**2 / (4 * table["size"] ** 2))
        table["lower"], table["upper"] = centre - spread, centre + spread
    table = table.rename(columns={"mean": "estimate", "sem": "se", "size": "n"})
    return table.assign(kind="raw")[["kind", *by, "estimate", "se", "lower", "upper", "n"]]


# --- robustness -------------------------------------------------------------------------------------------------------


def robustness_table(
    frame: OutcomeFrame, specification: Specification, weights: np.ndarray | None, draws: int, seed: int, thetas: Mapping[str, Any]
) -> pd.DataFrame:
    """The dose terms and the primary contrast of every specification, by the chosen polynomial and by category.

    Specifications whose covariates `frame` does not have are left out. `weights` are one a row, NaN where a participant has none; None
    leaves the weighted specification out. `thetas` of the outcome's own fits are where searches begin.
    """
    settings = frame.trial.robustness
    plans: list[tuple[str, bool, tuple[str, ...], np.ndarray | None]] = [("additive", False, (), None), ("full", True, (), None)]
    for name, covariates in (("full + demographics", settings.demographics), ("full + preferences", settings.preferences)):
        there = tuple(column for column in covariates if column in frame.covariates)
        if there:
            plans.append((name, True, there, None))
    if weights is not None:
        plans.append((WEIGHTED, True, (), weights))
    parts = []
    for name, full, covariates, of_rows in plans:
        for form in dict.fromkeys((specification.form, COARSENED)):
            terms = formulas.fixed_terms(frame, form, full=full, heterogeneous=specification.heterogeneous, covariates=covariates)  # type: ignore[arg-type]
            theta = thetas.get(f"{'full' if full else 'additive'}_{'coarsened' if form == COARSENED else 'continuous'}")
            resampled = draws if name in RESAMPLED else 0
            table = _robust(frame, terms, form, covariates, of_rows, resampled, seed, theta)  # type: ignore[arg-type]
            table.insert(0, "specification", name)
            parts.append(table)
    table = pd.concat(parts, ignore_index=True)
    base = table[table["specification"].eq("full")].set_index(["form", "term"])["estimate"]
    reference = pd.MultiIndex.from_frame(table[["form", "term"]]).map(base)
    table["change_percent"] = 100 * (table["estimate"] - reference) / np.abs(reference)
    return _head(frame, _finite_df(table.rename(columns={"p": "p_raw"})))


def _robust(
    frame: OutcomeFrame,
    terms: list[str],
    form: Form,
    covariates: tuple[str, ...],
    weights: np.ndarray | None,
    draws: int,
    seed: int,
    theta: Any,
) -> pd.DataFrame:
    analysed = frame.rows[list(covariates)].notna().all(axis=1).to_numpy() if covariates else np.ones(len(frame.rows), dtype=bool)
    if weights is not None:
        analysed = analysed & np.isfinite(weights)
    rows = frame.rows[analysed]
    fit = models.fit(frame, terms, weights=weights, start=None if theta is None else np.asarray(theta, dtype=float), analysed=analysed)
    grid = ReferenceGrid(frame, fit, coarsened=form == COARSENED, analysed=analysed)
    dose = frame.trial.dose
    low, high = (LOW, HIGH) if form == COARSENED else (_within(dose.low_doses, frame), _within(dose.high_doses, frame))
    L = (grid.mean(high) - grid.mean(low))[None, :]
    primary = fit.contrast(L)
    primary.insert(0, "term", dose.contrast)
    if draws:
        of_rows = None if weights is None else weights[analysed]
        primary["bootstrap_lower"], primary["bootstrap_upper"] = bayesian_bootstrap(rows, fit, L[0], of_rows, draws, seed)
    else:
        primary["bootstrap_lower"], primary["bootstrap_upper"] = np.nan, np.nan
    terms = [term for term in formulas.DOSE_TERMS[form] if term in fit.design.names]
    table = pd.concat([primary, fit.coefficient_table().loc[terms].reset_index()], ignore_index=True)
    table.insert(0, "form", form)
    table["method"] = family_of(fit)
    table["n"] = fit.n
    table["participants"] = rows["participant"].nunique()
    return table


def _within(doses: tuple[float, ...], frame: OutcomeFrame) -> tuple[float, ...]:
    return tuple(dose for dose in doses if dose in frame.doses)
