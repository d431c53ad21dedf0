"""Dropout tests and weights, against the published values, the definition of a weight and the score equations of a logit."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from released import made_up, merged, needs_release, table
from scipy import stats

from relseek_assets.trials import attrition
from relseek_assets.trials.attrition import AttritionFault


def with_measures(people: pd.DataFrame) -> pd.DataFrame:
    """What `dropout_covariates` adds, made up."""
    draw = np.random.default_rng(7)
    names = ("seeking_companionship_likelihood", "emotional_competency", "political_competency")
    return people.assign(**{name: draw.uniform(0, 100, len(people)) for name in names})


def test_two_arms_have_fishers_test() -> None:
    people = made_up()
    found = attrition.differential_attrition(people).set_index("treatment")
    for treatment in ("personalisation", "domain"):
        counts = pd.crosstab(people[treatment], people["post_treatment_dropout"])
        assert found.loc[treatment, "p"] == pytest.approx(stats.fisher_exact(counts).pvalue)
    np.testing.assert_allclose(found["p_adjusted"], stats.false_discovery_control(found["p"]))


def test_who_left_before_treatment_is_in_no_analysis() -> None:
    people = made_up()
    people.loc[:99, "pre_treatment_dropout"] = True
    people.loc[:99, "post_treatment_dropout"] = True
    assert (attrition.differential_attrition(people)["n"] == 300).all() and (attrition.balance_tests(people)["n"] == 300).all()
    pd.testing.assert_frame_equal(attrition.differential_attrition(people), attrition.differential_attrition(people.iloc[100:]))


def test_a_study_that_nobody_left_has_no_test_and_no_weights() -> None:
    people = with_measures(made_up()).assign(post_treatment_dropout=False)
    found = attrition.differential_attrition(people)
    assert found[["p", "p_adjusted"]].isna().all(axis=None) and (found["note"] == "a table of 2 x 1: nothing to compare").sum() == 2
    with pytest.raises(AttritionFault, match="longitudinal: of 400 participants 0 left"):
        attrition.inverse_probability_weights(people, ["longitudinal"])


def test_dropout_that_depends_on_the_arm_is_found() -> None:
    people = made_up()
    people["post_treatment_dropout"] = people["domain"] == "emotchat"
    found = attrition.differential_attrition(people).set_index("treatment")
    assert found.loc["domain", "estimate"] == 1 and found.loc["domain", "p_adjusted"] < 1e-50


def test_balance_is_lost_when_an_arm_is_older() -> None:
    people = made_up()
    before = attrition.balance_tests(people).set_index(["treatment", "covariate"])
    older = people.assign(age=people["age"] + 40 * (people["multiplier"] == 1))
    after = attrition.balance_tests(older).set_index(["treatment", "covariate"])
    assert before.loc[("multiplier", "age"), "p"] > 0.01 and after.loc[("multiplier", "age"), "p"] < 1e-6
    assert after.loc[("multiplier", "age"), "df"] == 4
    pd.testing.assert_series_equal(before["p"].drop("age", level="covariate"), after["p"].drop("age", level="covariate"))


def test_weights_are_inverse_probabilities_of_what_happened() -> None:
    people = with_measures(made_up())
    found = attrition.inverse_probability_weights(people, ["longitudinal"]).set_index("ppt_id")
    left = people.set_index("ppt_id").loc[found.index, "post_treatment_dropout"]
    happened = found["dropout_prob"].where(left, 1 - found["dropout_prob"])
    np.testing.assert_allclose(found["ipw_weight"] * happened, 1)
    assert found["ipw_weight_truncated"].max() <= 10 and (found["ipw_weight"] >= found["ipw_weight_truncated"]).all()
    # A logit predicts as many dropouts as there are, in all and in every level of a covariate.
    gap = left.astype(float) - found["dropout_prob"]
    assert gap.sum() == pytest.approx(0, abs=1e-6)
    assert gap[(people["gender_binary"] == "Male").to_numpy()].sum() == pytest.approx(0, abs=1e-6)


def test_an_incomplete_case_has_no_weight_and_an_amount_that_is_missing_is_nothing_given() -> None:
    people = made_up(200)
    people.loc[0, "age"] = np.nan
    people.loc[1, "charity_amount_gbp"] = np.nan
    seeking = pd.DataFrame({"ppt_id": people["ppt_id"], "timepoint": "pre", "seeking_companionship_likelihood": np.arange(200.0)})
    items = {item: np.arange(200.0) % 7 for item in ("emotchat_satis", "emotchat_effectiveness", "polchat_knowledge")}
    draw = np.random.default_rng(8)
    competency = pd.DataFrame({"ppt_id": people["ppt_id"], "timepoint": "pre", **items, "polchat_confidence": draw.uniform(0, 9, 200)})
    covariates = attrition.dropout_covariates(people, seeking, competency)
    assert covariates.loc[1, "charity_amount_gbp"] == 0
    assert set(people["ppt_id"]) - set(attrition.inverse_probability_weights(covariates, ["longitudinal"])["ppt_id"]) == {"ppt0"}


@needs_release
def test_differential_attrition_is_the_published_one() -> None:
    found = attrition.differential_attrition(merged()).set_index(["study", "treatment"])["p"]
    expected = {"longitudinal": (0.2701, 0.4776, 0.7765), "cross_sectional": (0.0496, 0.2908, 0.8852)}
    for study, values in expected.items():
        assert found[study][list(attrition.ARMS)].tolist() == pytest.approx(values, abs=6e-5)


@needs_release
def test_weights_are_those_of_the_release_to_its_rounding() -> None:
    covariates = attrition.dropout_covariates(merged(), table("seeking_companionship"), table("domain_competency"))
    ours, theirs = attrition.inverse_probability_weights(covariates).set_index("ppt_id"), table("ipw_weights").set_index("ppt_id")
    assert set(ours.index) == set(theirs.index) and len(ours) == 3501
    for column in ("dropout_prob", "ipw_weight", "ipw_weight_truncated"):
        np.testing.assert_allclose(ours[column], theirs.loc[ours.index, column], rtol=0, atol=5.01e-6)
    means = ours.groupby("study")["ipw_weight_truncated"].mean()
    assert means["cross_sectional"] == pytest.approx(1.953, abs=5e-4) and means["longitudinal"] == pytest.approx(1.701, abs=5e-4)
