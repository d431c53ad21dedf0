"""Composites by hand; the published coefficients and criteria of the calibration study come out of its ratings."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from relseek_assets.trials import calibration
from relseek_assets.trials.calibration import CalibrationError

#: human_study.md, appendix A: estimate and standard error by term, then AIC, BIC and RMSE
PUBLISHED = {
    "coherence": ([(88.129, 0.719), (-0.841, 0.797), (-0.455, 0.556), (-3.422, 0.842)], (7318.5, 7347.6, 8.72)),
    "relationship-seeking": ([(61.926, 1.056), (1.446, 1.212), (22.126, 0.845), (-2.756, 1.278)], (8073.1, 8102.1, 13.36)),
    "preference": ([(69.300, 1.218), (-0.329, 1.541), (10.116, 1.071), (-7.940, 1.615)], (8447.5, 8476.5, 17.42)),
}


def simulated(people: int = 300, seed: int = 6) -> pd.DataFrame:
    """Ratings of four conversations each: 60 + 10 λ - 5 λ² up to λ = 1, a cliff at 1.5, people differing by 5 points."""
    generator = np.random.default_rng(seed)
    dose = generator.choice([-1.5, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5], (people, 4))
    rating = 60 + 10 * dose - 5 * dose**2 - 30 * (np.abs(dose) > 1) + generator.normal(0, 5, (people, 1)) + generator.normal(0, 4, (people, 4))
    return pd.DataFrame(
        {
            "ppt_id": np.repeat([f"p{person}" for person in range(people)], 4),
            "conversation_mode": np.tile(["pre-populated", "pre-populated", "pre-populated", "dynamic"], people),
            "multiplier": dose.ravel(),
            "coherence": rating.ravel(),
        }
    )


def test_a_composite_is_the_mean_of_its_items_and_leaves_out_what_is_paid() -> None:
    row = {"ppt_id": "p", "conversation_mode": "dynamic", "multiplier": 0.5, "wtp:£0-£30": 25.0}
    row |= {"coherence:a-b": 10.0, "coherence:c-d": 30.0, "coherence:e-f": np.nan, "steerability:g-h": 40.0}
    row |= {"preference:i": 50.0, "preference:j": 70.0}
    found = calibration.composites(pd.DataFrame([row])).iloc[0]
    assert [found[name] for name in calibration.COMPOSITES] == [20.0, 40.0, 60.0]


def test_the_truncated_model_is_blind_to_the_largest_doses() -> None:
    ratings = simulated()
    specification = next(model for model in calibration.MODELS if model.name == calibration.REPORTED)
    found = calibration.coefficients(ratings, "coherence", specification).set_index("term")
    assert found["n"].iloc[0] == (ratings["multiplier"].abs() < 1.5).sum()
    for term, truth in (("Intercept", 60), ("multiplier", 10), ("multiplier_squared", -5)):
        assert abs(found.loc[term, "estimate"] - truth) < 3.5 * found.loc[term, "se"]
    whole = calibration.coefficients(ratings, "coherence", next(model for model in calibration.MODELS if model.name == "quadratic"))
    assert whole.set_index("term").loc["multiplier_squared", "estimate"] < -12  # the cliff bends the parabola


def test_doses_as_levels_are_compared_with_dose_zero() -> None:
    factor = next(model for model in calibration.MODELS if model.name == "factor")
    found = calibration.coefficients(simulated(), "coherence", factor).set_index("term")
    doses = found.filter(like="dose", axis=0)
    assert len(doses) == 6 and not doses.index.str.contains(r"\[T\.0\]").any()
    extreme = found.loc["dose[T.1.5]"]
    assert abs(extreme["estimate"] - (15 - 11.25 - 30)) < 3.5 * extreme["se"]


def test_refusals_name_the_column_or_the_mode() -> None:
    ratings = pd.DataFrame([{"ppt_id": "p", "conversation_mode": "dynamic", "multiplier": 0.5, "coherence:a": 1.0, "preference:a": 1.0}])
    with pytest.raises(CalibrationError, match="relationship-seeking"):
        calibration.composites(ratings)
    with pytest.raises(CalibrationError, match="multiplier"):
        calibration.composites(ratings.drop(columns="multiplier"))
    with pytest.raises(CalibrationError, match="live"):
        calibration.composites(ratings.assign(conversation_mode="live"))
    with pytest.raises(CalibrationError, match="warmth"):
        calibration.fit_model(simulated(), "warmth", calibration.MODELS[0])


@pytest.fixture(scope="module")
def published() -> tuple[pd.DataFrame, pd.DataFrame]:
    if "RELSEEK_RELEASE" not in os.environ:
        pytest.skip("RELSEEK_RELEASE is not set: the ratings are not here")
    path = Path(os.environ["RELSEEK_RELEASE"]) / "data/human_study/calibration_study/combined_rating_tasks.jsonl"
    return calibration.calibration_models(calibration.composites(pd.DataFrame(json.loads(line) for line in path.read_text().splitlines())))


@pytest.mark.parametrize("composite", PUBLISHED)
def test_the_published_models_are_recomputed(published: tuple[pd.DataFrame, pd.DataFrame], composite: str) -> None:
    terms, comparison = published
    coefficients, (aic, bic, rmse) = PUBLISHED[composite]
    found = terms[(terms["composite"] == composite) & (terms["model"] == calibration.REPORTED)]
    np.testing.assert_allclose(found[["estimate", "se"]], coefficients, atol=5.1e-4)
    assert set(found["n"]) == {933}
    (row,) = comparison[(comparison["composite"] == composite) & comparison["reported"]].to_dict("records")
    assert (row["aic"], row["bic"], row["rmse"]) == (pytest.approx(aic, abs=0.051), pytest.approx(bic, abs=0.051), pytest.approx(rmse, abs=0.0051))


def test_all_six_models_of_all_composites_are_compared(published: tuple[pd.DataFrame, pd.DataFrame]) -> None:
    _, comparison = published
    assert len(comparison) == 18 and set(comparison["n"]) == {933, 1188}
    assert comparison.groupby("model")["n"].first().to_dict()["truncated linear"] == 933
