"""Contrasts of marginal means: closed forms on balanced designs, the truth as noise vanishes, and the published labels."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from relseek_assets.study import load_study
from relseek_assets.trials.simulation import Effects, simulate
from tests.trials.declared import analysed, frame_of, trial, value

EFFECT = "RS: Avg(Pos) - Avg(Neg)"
NOISY = Effects(50, dose=(3.0, 1.0), factors={"topic": 4.0}, moderation={"topic": 2.0}, residual_sd=6)


@cache
def balanced() -> tuple[pd.DataFrame, pd.DataFrame]:
    """(rows, contrasts) of an outcome measured once, with as many people in each of the twenty cells."""
    frame = frame_of(trial(), "main:trust", simulate(trial(), "main:trust", NOISY, 80, seed=4).tables)
    assert (frame.rows.groupby(["dose", "topic", "voice"], observed=True).size() == 4).all()
    return frame.rows, analysed(frame)[2]


def slope(rows: pd.DataFrame) -> float:
    return float(stats.linregress(rows["dose"], rows["value"]).slope)


@pytest.mark.parametrize(("variant", "reach"), [("primary", 1.5), ("narrow", 1.0), ("full", 2.0)])
def test_a_linear_effect_is_the_slope_times_the_distance_of_the_doses(variant: str, reach: float) -> None:
    rows, found = balanced()
    assert value(found, EFFECT, variant) == pytest.approx(reach * slope(rows), rel=1e-9)


def test_coarsened_effects_and_factors_are_differences_of_means() -> None:
    rows, found = balanced()
    by_category = rows.groupby("category", observed=True)["value"].mean()
    assert value(found, EFFECT, "coarsened") == pytest.approx(by_category["high"] - by_category["low"], rel=1e-9)
    for factor, contrast in (("topic", "Topic: music - sport"), ("voice", "Voice: human - (non-human)")):
        first, second = rows[factor].cat.categories
        by_level, by_cell = (
            rows.groupby(names, observed=True)["value"].mean().unstack(factor) for names in ([factor, "participant"], ["category", factor])
        )
        assert value(found, contrast) == pytest.approx(by_level[second].mean() - by_level[first].mean(), rel=1e-9)
        difference = (by_cell[second] - by_cell[first]).mean()  # each category weighs alike, however many doses it has
        assert value(found, contrast, "coarsened") == pytest.approx(difference, rel=1e-9)


def test_moderation_is_the_difference_of_the_simple_effects() -> None:
    rows, found = balanced()
    simple = {topic: 1.5 * slope(part) for topic, part in rows.groupby("topic", observed=True)}
    for topic, effect in simple.items():
        assert value(found, f"RS at Topic = {topic}") == pytest.approx(effect, rel=1e-9)
    assert value(found, "RS × Topic: Interaction") == pytest.approx(simple["music"] - simple["sport"], rel=1e-9)


def test_dose_response_is_of_the_additive_model() -> None:
    rows, found = balanced()
    assert found[found["test_type"].eq("dose_response")]["contrast"].tolist() == ["Polynomial: λ (linear)"]
    assert value(found, "Polynomial: λ (linear)") == pytest.approx(slope(rows), rel=1e-9)
    assert set(found.loc[found["test_type"].eq("dose_response"), "model"]) == {"additive_continuous"}


EVERYTHING = Effects(
    50,
    dose=(3.0, -2.0, 1.5),
    factors={"topic": 4.0, "voice": -1.0},
    moderation={"topic": 2.0, "voice": 0.7},
    items=(0.0, 5.0),
    time=1.0,
    time_dose=0.4,
    time_factors={"topic": -0.6, "voice": 0.2},
    baseline=2.0,
    intercept_sd=2e-2,
    slope_sd=5e-3,
    residual_sd=1e-2,
    dropout=0.1,
)


# The model by category does not fit what is all but exact, and says so.
unfitting = pytest.mark.filterwarnings("ignore:mixed model:relseek_assets.mixed_models.ConvergenceWarning")


@unfitting
@pytest.mark.parametrize(("outcome", "contrasts"), [("trust", 11), ("warmth", 11), ("pain", 11), ("mood", 17)])
def test_every_contrast_finds_the_truth_as_noise_vanishes(outcome: str, contrasts: int) -> None:
    key = f"main:{outcome}"
    simulation = simulate(trial(), key, EVERYTHING, 90, seed=5)
    found = analysed(frame_of(trial(), key, simulation.tables), "cubic")[2]
    both = simulation.truth.merge(found, on=["test_type", "contrast", "variant"], validate="one_to_one")
    assert len(both) == len(simulation.truth) == contrasts
    np.testing.assert_allclose(both["estimate"], both["truth"], atol=2e-2)


@unfitting
def test_slopes_over_time_are_those_at_the_ends_of_the_dose() -> None:
    simulation = simulate(trial(), "main:mood", EVERYTHING, 90, seed=5)
    found = analysed(frame_of(trial(), "main:mood", simulation.tables), "cubic")[2]
    of_topic, of_voice = EVERYTHING.time_factors["topic"], EVERYTHING.time_factors["voice"]
    middle = EVERYTHING.time + of_topic / 2 + of_voice / 2
    for variant, dose in (("primary", 0.75), ("narrow", 0.5), ("full", 1.0)):
        assert value(found, "Slope: pos_λ", variant) == pytest.approx(middle + 0.4 * dose, abs=2e-2)
        assert value(found, "Slope: neg_λ × music", variant) == pytest.approx(middle + of_topic / 2 - 0.4 * dose, abs=2e-2)
        expected = EVERYTHING.time + of_voice + 0.4 * dose
        assert value(found, "Slope: pos_λ × sport × hum", variant) == pytest.approx(expected, abs=2e-2)
    assert value(found, "Slope: music × non") == pytest.approx(EVERYTHING.time + of_topic, abs=2e-2), (
        "at the mean dose of the rows, which is near zero"
    )
    assert value(found, "Coefficient: Topic × Time") == pytest.approx(of_topic, abs=2e-2)
    assert value(found, "Coefficient: Time") == pytest.approx(EVERYTHING.time, abs=2e-2), "at the dose zero and the first levels"


def test_pooled_items_weigh_alike_however_often_each_was_answered() -> None:
    raw = simulate(trial(), "main:warmth", EVERYTHING, 90, seed=5).tables
    differ = raw["answers"]["ease"] + 3 * raw["answers"]["dose"]  # the second item has a steeper dose
    raw["answers"]["ease"] = differ.where(raw["answers"].index % 3 > 0)
    found = analysed(frame_of(trial(), "main:warmth", raw), "cubic", heterogeneous=True)[2]
    truth = simulate(trial(), "main:warmth", EVERYTHING, 90, seed=5).truth
    assert value(found, EFFECT) == pytest.approx(value(truth, EFFECT, column="truth") + 1.5 * 3 / 2, abs=2e-2)


# --- labels -----------------------------------------------------------------------------------------------------------

CROSSED = [
    ["neg_λ", "pos_λ"],
    ["polchat", "emotchat"],
    ["non-pers", "pers"],
]


def slopes() -> set[str]:
    """Slopes in every crossing of dose, domain and personalisation, in this order (spec/human_study.md, section 3)."""
    found: set[tuple[str, ...]] = {()}
    for levels in CROSSED:
        found |= {(*names, level) for names in found for level in levels}
    return {f"Slope: {' × '.join(names)}" for names in found if names}


@pytest.mark.parametrize(("key", "start", "end"), [("longitudinal:separation_distress", 1, 4), ("longitudinal:likeability", 1, 20)])
def test_labels_are_the_published_ones(key: str, start: int, end: int) -> None:
    declared = load_study("kirk2025").trial
    assert declared is not None
    simulation = simulate(declared, key, Effects(50, dose=(3.0,), intercept_sd=5, slope_sd=1, residual_sd=5), 60, seed=6)
    found = analysed(frame_of(declared, key, simulation.tables), "cubic")[2]
    expected: dict[str, set[str]] = {
        "main_effect_RS": {"RS: Avg(Pos) - Avg(Neg)"},
        "main_effect_Domain": {"Domain: emotchat - polchat"},
        "main_effect_Pers": {"Personalisation: personalised - (non-personalised)"},
        "dose_response": {"Polynomial: λ (linear)", "Polynomial: λ² (quadratic)", "Polynomial: λ³ (cubic)"},
        "moderation": {"RS × Domain: Interaction", "RS × Personalisation: Interaction"},
        "simple_effect": {
            "RS at Domain = polchat",
            "RS at Domain = emotchat",
            "RS at Personalisation = non-personalised",
            "RS at Personalisation = personalised",
        },
        "temporal_main": {f"Time: S{end} - S{start}"},
        "temporal_interaction": {f"{what} × Time: Δ (S{end} - S{start})" for what in ("Relationship-Seeking", "Domain", "Personalisation")},
        "temporal_simple": {f"{what} at S{time}" for what in ("Relationship-Seeking", "Domain", "Personalisation") for time in (start, end)},
        "temporal_coefficient": {
            "Coefficient: Time",
            "Coefficient: Relationship-Seeking × Time",
            "Coefficient: Personalisation × Time",
            "Coefficient: Domain × Time",
        },
        "temporal_slope": slopes(),
    }
    assert {name: set(part["contrast"]) for name, part in found.groupby("test_type")} == expected
    assert len(slopes()) == 26
    variants = {name: set(part["variant"]) for name, part in found.groupby("test_type")}
    four = {"primary", "coarsened", "narrow", "full"}
    assert variants["main_effect_RS"] == variants["temporal_slope"] == four
    for name in ("main_effect_Domain", "main_effect_Pers", "moderation", "temporal_main", "temporal_interaction"):
        assert variants[name] == {"primary", "coarsened"}
    for name in ("dose_response", "simple_effect", "temporal_simple", "temporal_coefficient"):
        assert variants[name] == {"primary"}
    assert not found.duplicated(["test_type", "contrast", "variant"]).any()


def test_an_outcome_measured_once_has_no_contrast_over_time() -> None:
    _, found = balanced()
    assert not found["test_type"].str.startswith("temporal").any()


# --- other trials -----------------------------------------------------------------------------------------------------


def of_doses(values: Any, form: str = "linear", **changes: Any) -> pd.DataFrame:
    changes |= {"dose": {"column": "arm", "values": values, "label": "Dose"}}
    effects = Effects(10, dose=(2.0,), residual_sd=1e-6)
    return analysed(frame_of(trial(**changes), "main:trust", simulate(trial(**changes), "main:trust", effects, 60, seed=7).tables), form)[2]


@pytest.mark.parametrize(
    ("doses", "primary"),
    [((0.0, 1.0), 1.0), ({"control": 0.0, "treated": 1.0}, 1.0), ((0.0, 1.0, 2.0), 1.5), ((-1.0, 0.0, 1.0), 2.0), ((5.0, 20.0), 15.0)],
)
def test_any_doses_are_compared_at_their_distance(doses: Any, primary: float) -> None:
    found = of_doses(doses)
    effect = found[found["test_type"].eq("main_effect_Dose")].set_index("variant")["estimate"]
    assert effect["primary"] == pytest.approx(2 * primary, abs=1e-4)
    assert set(effect.index) == {"primary", "coarsened", "narrow", "full"}


@pytest.mark.parametrize("factors", [0, 1])
def test_a_trial_with_fewer_factors_has_the_contrasts_that_are_left(factors: int) -> None:
    declared = trial().factors[:factors]
    found = of_doses((-1.0, 0.0, 1.0), "quadratic", factors=[factor.model_dump(exclude_none=True) for factor in declared])
    kinds = set(found["test_type"])
    assert kinds == {"main_effect_Dose", "dose_response"} | ({"main_effect_Topic", "moderation", "simple_effect"} if factors else set())
    assert value(found, "Polynomial: λ² (quadratic)") == pytest.approx(0, abs=1e-4)


def test_a_missing_dose_leaves_the_others_to_compare() -> None:
    raw = simulate(trial(), "main:trust", Effects(10, dose=(2.0,), residual_sd=1e-6), 80, seed=8).tables
    raw["answers"] = raw["answers"][raw["answers"]["dose"] != 1.0]
    found = analysed(frame_of(trial(), "main:trust", raw), "cubic")[2]
    assert value(found, EFFECT) == pytest.approx(2 * (0.5 + 0.75), abs=1e-4)
    assert value(found, EFFECT, "full") == pytest.approx(2 * 1.5, abs=1e-4)
