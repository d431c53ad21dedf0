"""Trials unlike the published ones: large doses, few people, events in some arms only, names and labels that meet."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy import special

from relseek_assets.trials import bootstrap, estimates, lmm, models, tables
from relseek_assets.trials.forms import Specification, specify
from relseek_assets.trials.formulas import fixed_terms
from relseek_assets.trials.frames import OutcomeFrame, covariates_table, with_covariates
from relseek_assets.trials.models import LogitFit, SeparationFault
from relseek_assets.trials.raw import TrialFault
from relseek_assets.trials.simulation import Effects, simulate
from tests.trials.declared import DOSES, FACTORS, OUTCOMES, TABLES, analysed, frame_of, trial, value

EFFECT = "RS: Avg(Pos) - Avg(Neg)"
LINEAR = Specification("linear", "linear", False, None, pd.DataFrame())
JOINED = {**TABLES, "answers": {**TABLES["answers"], "arms": "joined"}, "people": {"file": "people.csv", "key": [], "columns": []}}


def simulated(outcome: str, effects: Effects, participants: int = 200) -> pd.DataFrame:
    return simulate(trial(), f"main:{outcome}", effects, participants, seed=5).tables["answers"]


@pytest.mark.parametrize("form", ["linear", "quadratic", "cubic"])
@pytest.mark.parametrize(
    ("outcome", "effects"), [("trust", Effects(50, dose=(3.0,), residual_sd=6)), ("stayed", Effects(0.4, dose=(0.6,)))], ids=["ols", "logit"]
)
@pytest.mark.parametrize("unit", [10.0, 1e5])
def test_the_unit_of_the_dose_changes_no_contrast(form: str, outcome: str, effects: Effects, unit: float) -> None:
    answers = simulated(outcome, effects)
    scaled = trial(dose={"column": "arm", "values": [dose * unit for dose in DOSES]})
    _, fits, small = analysed(frame_of(trial(), f"main:{outcome}", {"answers": answers}), form)
    _, others, large = analysed(frame_of(scaled, f"main:{outcome}", {"answers": answers.assign(dose=answers["dose"] * unit)}), form)
    for column in ("estimate", "se", "lower", "upper"):
        assert value(large, EFFECT, column=column) == pytest.approx(value(small, EFFECT, column=column), rel=1e-6, abs=1e-8)
    linear = f"Polynomial: {trial().dose.symbol} (linear)"
    if form == "linear":  # with its profile interval where the outcome is a logit
        for column in ("estimate", "lower", "upper"):
            assert value(large, linear, column=column) * unit == pytest.approx(value(small, linear, column=column), rel=1e-5)
    assert {name: fit.log_likelihood for name, fit in others.items()} == pytest.approx({name: fit.log_likelihood for name, fit in fits.items()})


def test_four_people_in_two_arms_have_two_degrees_of_freedom() -> None:
    """Balanced, and the intercepts vary: Kenward and Roger's answer is exactly that of four means."""
    found = []
    for seed in range(40):
        drawn = np.random.default_rng(seed)
        people = np.repeat(np.arange(4), 5)
        y = drawn.normal(size=4)[people] * 2 + drawn.normal(size=20)
        fit = lmm.fit("y ~ arm + (1|person)", pd.DataFrame({"y": y, "arm": people % 2, "person": people}))
        if not fit.singular:
            found += list(fit.contrast([[0, 1]], method="kenward_roger")["df"])
    assert len(found) > 30
    assert found == pytest.approx([2.0] * len(found), abs=1e-6)


def joined(answers: pd.DataFrame, people: pd.DataFrame) -> OutcomeFrame:
    declared = trial(tables=JOINED, arms_table="people", outcomes=[outcome for outcome in OUTCOMES if outcome["table"] == "answers"])
    arms = ["dose", "topic", "voice"]
    return frame_of(declared, "main:trust", {"answers": answers.drop(columns=arms).assign(study=None), "people": people})


def people_of(answers: pd.DataFrame) -> pd.DataFrame:
    return answers[["participant", "study", "dose", "topic", "voice"]]


def test_whoever_has_a_row_without_an_arm_is_in_the_arm_of_the_other_row() -> None:
    answers = simulated("trust", Effects(50, dose=(3.0,), residual_sd=6))
    people = people_of(answers)
    unassigned = people.assign(dose=np.where(np.arange(len(people)) % 2, np.nan, people["dose"]))
    whole, found = joined(answers, people), joined(answers, pd.concat([unassigned, people]))
    pd.testing.assert_frame_equal(found.rows, whole.rows)
    fewer = joined(answers, unassigned)
    assert fewer.unplaced == len(people) // 2 and fewer.participants == len(people) - len(people) // 2


def test_one_name_in_two_studies_is_refused() -> None:
    answers = simulated("trust", Effects(50, dose=(3.0,), residual_sd=6))
    with pytest.raises(TrialFault, match="is in two studies of people"):
        joined(answers, pd.concat([people_of(answers), people_of(answers).iloc[3:4].assign(study="other")]))


@pytest.mark.parametrize("changed", [{"label": "RS"}, {"label": "Relationship-Seeking"}, {"code": "RS"}])
def test_a_factor_is_not_called_what_the_dose_is(changed: dict[str, Any]) -> None:
    factors = copy.deepcopy(FACTORS)
    factors[0] |= changed
    with pytest.raises(ValueError, match=r"which is the dose's \(trial.dose\)"):
        trial(factors=factors)


def test_factors_whose_levels_have_the_same_names_have_slopes_of_their_own() -> None:
    factors = [{"column": name, "label": name.title(), "levels": ["no", "yes"]} for name in ("topic", "voice")]
    declared = trial(factors=factors)
    made = simulate(declared, "main:mood", Effects(50, dose=(3.0,), time=1.0, intercept_sd=5, residual_sd=4), 80, seed=3).tables
    contrasts = analysed(frame_of(declared, "main:mood", made))[2]
    assert not contrasts.duplicated(["test_type", "contrast", "variant"]).any()
    assert {"Slope: Topic no", "Slope: Voice no", "Slope: Topic yes × Voice no"} <= set(contrasts["contrast"])


def few_events(events: list[int], each: int = 60) -> OutcomeFrame:
    """A logit with so many events in each arm, of a linear form that is declared."""
    stayed = {**next(outcome for outcome in OUTCOMES if outcome["name"] == "stayed"), "form": "linear"}
    rows = [(f"{arm}-{place}", dose, float(place < events[arm])) for arm, dose in enumerate(DOSES) for place in range(each)]
    answers = pd.DataFrame(rows, columns=["participant", "dose", "stayed"]).assign(study="main")
    return frame_of(trial(factors=[], outcomes=[stayed]), "main:stayed", {"answers": answers})


def test_an_arm_without_events_leaves_the_models_that_can_be_fitted() -> None:
    found = few_events([0, 3, 4, 6, 9])
    with pytest.raises(SeparationFault):
        estimates.fit_one(found, LINEAR, "full_levels")
    specification = specify(found)
    assert specification.form == "linear"
    fits = estimates.fit_all(found, specification)
    table = estimates.fits_table(found, specification, fits)
    tables.FITS.to_arrow(table[list(tables.FITS.names)], "fits")
    separated = table[table["term"] == estimates.SEPARATED]
    assert set(separated["model"]) == {"additive_levels", "full_levels"} and not separated["converged"].any()
    assert separated["estimate"].isna().all()
    contrasts = estimates.contrasts_table(found, fits)
    assert np.isfinite(value(contrasts, EFFECT)) and 0 < value(contrasts, EFFECT, column="se") < 2


@pytest.mark.parametrize("outcome", ["trust", "stayed", "warmth"])
def test_weights_that_are_not_above_zero_and_rows_that_are_not_there_are_said(outcome: str) -> None:
    effects = Effects(0.4, dose=(0.6,)) if outcome == "stayed" else Effects(50, dose=(3.0,), residual_sd=6, items=(0.0, 1.0), intercept_sd=2)
    if outcome == "trust":
        effects = Effects(50, dose=(3.0,), residual_sd=6)
    found = frame_of(trial(), f"main:{outcome}", {"answers": simulated(outcome, effects)})
    terms, ones = fixed_terms(found, "linear", full=True, heterogeneous=False), np.ones(len(found.rows))
    for least in (0.0, -0.5):
        with pytest.raises(TrialFault, match=f"a weight is {least:g}; weights are above 0"):
            models.fit(found, terms, weights=np.where(np.arange(len(ones)) == 4, least, ones))
    with pytest.raises(TrialFault, match="no row has every covariate and weight"):
        models.fit(found, terms, analysed=np.zeros(len(ones), dtype=bool))


def test_a_covariate_that_this_study_did_not_ask_for_is_left_out_of_it() -> None:
    asked = {"demographics": ["age", "city"]}
    declared = trial(
        tables={
            **TABLES,
            "people": {"file": "people.csv", "key": [], "arms": "none", "columns": [{"names": ["age"]}, {"names": ["city"], "kind": "string"}]},
        },
        participants=["people"],
        robustness=asked,
    )
    found = frame_of(declared, "main:trust", {"answers": simulated("trust", Effects(50, dose=(3.0,), residual_sd=6))})
    names = [*found.rows["participant"], "somebody", "somebody else"]  # of another study
    people = pd.DataFrame({"participant": names, "age": [np.nan] * (len(names) - 2) + [20.0, 30.0], "city": [None] * (len(names) - 2) + ["A", "B"]})
    beside = with_covariates(found, covariates_table(people))
    assert beside.covariates == ()
    table = estimates.robustness_table(beside, LINEAR, None, 0, 1, {})
    assert set(table["specification"]) == {"additive", "full"}


def test_every_draw_of_the_logits_bootstrap_is_at_its_maximum() -> None:
    found = few_events([1, 0, 2, 3, 4], each=12)
    fit = models.fit(found, fixed_terms(found, "linear", full=False, heterogeneous=False))
    assert isinstance(fit, LogitFit)
    y, codes = found.rows["value"].to_numpy(float), pd.factorize(found.rows["participant"])[0]
    drawn = np.random.default_rng(0).standard_exponential((200, len(y)))
    betas = bootstrap._logit(fit, y, codes, drawn, None)
    slopes = (drawn[:, codes] * (y - special.expit(betas @ fit.design.scaled.T))) @ fit.design.scaled
    assert np.abs(slopes).max() < 1e-6
