"""The formula grammar of a trial: which terms each specification of an outcome has (spec/human_study.md, section 2).

Here belong formulas as text and the reference grid of marginal means. Fitting belongs in `models.py`.
"""

from __future__ import annotations

from typing import Literal

from relseek_assets.trials.frames import OutcomeFrame

Form = Literal["linear", "quadratic", "cubic", "coarsened", "levels"]
POLYNOMIALS: tuple[Form, ...] = ("linear", "quadratic", "cubic")
DOSE_TERMS: dict[str, tuple[str, ...]] = {
    "linear": ("dose",),
    "quadratic": ("dose", "I(dose ** 2)"),
    "cubic": ("dose", "I(dose ** 2)", "I(dose ** 3)"),
    "coarsened": ("category",),
    "levels": ("level",),
}


def polynomials(frame: OutcomeFrame) -> tuple[Form, ...]:
    """The polynomials that the doses can tell apart: degree below their number."""
    return POLYNOMIALS[: len(frame.doses) - 1]


def fixed_terms(frame: OutcomeFrame, form: Form, *, full: bool, heterogeneous: bool, covariates: tuple[str, ...] = ()) -> list[str]:
    """Fixed terms of a specification; interactions use only the first-order dose (or its category or level)."""
    dose = DOSE_TERMS[form][0]
    factors = [factor.column for factor in frame.factors]
    time = ["time"] if frame.timed else []
    terms = [*DOSE_TERMS[form], *factors]
    if frame.pooled:
        terms.append("item")
        if heterogeneous:
            terms += [f"{term}:item" for term in (dose, *factors)]
    if "baseline" in frame.rows:
        terms.append("baseline")
    terms += time
    if heterogeneous and frame.pooled:
        terms += [f"{term}:item" for term in time]
    if full:
        terms += [f"{dose}:{factor}" for factor in factors]
        terms += [f"{term}:time" for term in (dose, *factors) if time]
    return [*terms, *covariates]


def every_term(frame: OutcomeFrame) -> list[str]:
    """All fixed terms that some specification of an outcome may have; main effects first, so that interactions are coded alike in each."""
    factors = [factor.column for factor in frame.factors]
    first = ["dose", "category", "level", *factors, *(["time"] if frame.timed else []), *(["item"] if frame.pooled else [])]
    terms = [*first, *DOSE_TERMS["cubic"][1:], *(["baseline"] if "baseline" in frame.rows else []), *frame.covariates]
    leading = ["dose", "category", "level"]
    terms += [f"{one}:{factor}" for factor in factors for one in leading]
    if frame.timed:
        terms += [f"{one}:time" for one in (*leading, *factors)]
    if frame.pooled:
        terms += [f"{one}:item" for one in (*leading, *factors, *(["time"] if frame.timed else []))]
    return terms


def random_term(frame: OutcomeFrame) -> str:
    """The random part: intercept and slope of time where there is time, an intercept for pooled items, none otherwise."""
    if frame.timed:
        return "(1 + time | participant)"
    return "(1 | participant)" if frame.pooled else ""


def formula(frame: OutcomeFrame, terms: list[str]) -> str:
    """A specification as the field writes it."""
    return "value ~ " + " + ".join(term for term in (*terms, random_term(frame)) if term)
