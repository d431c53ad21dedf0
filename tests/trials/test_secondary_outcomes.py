"""Secondary outcomes, against the published statistics, the answers of the questionnaires, and what odds ratios must obey."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pandas as pd
import pytest
from released import made_up, merged, needs_release, published, same, table

from relseek_assets.trials import secondary_outcomes
from relseek_assets.trials.participants import DOSES, PNTS
from relseek_assets.trials.regressions import RegressionFault


def goodbyes(n: int = 600) -> pd.DataFrame:
    people = made_up(n)
    draw = np.random.default_rng(4)
    return people.assign(goodbye_action=(draw.random(n) < 0.3 + 0.2 * (people["multiplier"] > 0)).astype(float))


def test_answers_outside_the_published_list_are_missing_and_kept_in_the_full_recoding() -> None:
    answers = ["Much less likely than before", "Somewhat less likely than before", "No change from before", "Somewhat more likely than before", None]
    found = secondary_outcomes.recoded(pd.DataFrame({"multiplier": 0.0, "perceived_change_seeking_companionship_likelihood": answers}))
    assert found["change_recoded"].fillna("-").tolist() == ["Less likely", "-", "No change", "-", "-"]
    assert found["change_recoded_all_answers"].fillna("-").tolist() == ["Less likely", "Less likely", "No change", "More likely", "-"]


def test_odds_ratios_chain_and_agree_with_the_log_odds_of_the_margins() -> None:
    means, ratios = secondary_outcomes.goodbye_by_dose(goodbyes())
    assert len(means) == 5 and len(ratios) == 10
    log_odds, ratio = means.set_index("lambda_factor")["log_odds"], ratios.set_index("contrast")["estimate"]
    for one, other in combinations(DOSES.values(), 2):
        assert np.log(ratio[f"{one} / {other}"]) == pytest.approx(log_odds[one] - log_odds[other])
    assert ((means["lower"] < means["estimate"]) & (means["estimate"] < means["upper"])).all()
    assert (ratios["p_adjusted"] >= ratios["p"]).all() and (ratios["lower"] > 0).all()


def test_a_dose_at_which_everyone_says_goodbye_is_flagged() -> None:
    data = goodbyes()
    data.loc[data["multiplier"] == 1, "goodbye_action"] = 1.0
    means, ratios = secondary_outcomes.goodbye_by_dose(data)
    last = means.set_index("lambda_factor").loc["pos1"]
    assert "separated" in last["note"] and np.isnan(last["se"])
    touched = ratios["contrast"].str.contains("pos1")
    assert (ratios["note"] != "").equals(touched) and ratios.loc[touched, "p"].isna().all() and (ratios.loc[touched, "p_adjusted"] == 1).all()
    assert np.isfinite(ratios.loc[~touched, "estimate"]).all()


def test_goodbye_that_nobody_says_is_named() -> None:
    with pytest.raises(RegressionFault, match="goodbye_action: all 600 values are 0"):
        secondary_outcomes.goodbye_by_dose(goodbyes().assign(goodbye_action=0.0))


def competency_rows() -> pd.DataFrame:
    rows = made_up(60)[["ppt_id", "study", "multiplier", "domain", "personalisation"]]
    draw = np.random.default_rng(5)
    both = pd.concat([rows.assign(timepoint="pre"), rows.assign(timepoint="post")], ignore_index=True)
    return both.assign(**{item: draw.uniform(0, 100, len(both)) for item in secondary_outcomes.COMPETENCY_ITEMS})


def test_a_competency_is_the_mean_of_the_items_that_were_answered() -> None:
    rows = competency_rows()
    rows.loc[rows["ppt_id"] == "ppt3", "emotchat_satis"] = np.nan
    found = secondary_outcomes.competency_scores(rows).set_index("ppt_id")
    one = rows[rows["ppt_id"] == "ppt3"].set_index("timepoint")
    assert found.loc["ppt3", "post_emotional_competency"] == one.loc["post", "emotchat_effectiveness"]
    assert found.loc["ppt3", "emotional_competency_diff"] == pytest.approx(
        one["emotchat_effectiveness"]["post"] - one["emotchat_effectiveness"]["pre"]
    )
    assert np.isnan(found.loc["ppt3", "emotchat_satis_diff"])


def closeness(first: dict[int, float], second: dict[int, float]) -> pd.DataFrame:
    people = made_up(40)[["ppt_id", "study", "multiplier", "domain", "personalisation"]]
    weeks = [people.assign(week=week, ios_scale=first[week] + np.arange(40) % 3, personalisation_sensecheck=50.0 + np.arange(40)) for week in first]
    rows = pd.concat(weeks, ignore_index=True).astype({"week": "Int64"})
    rows.loc[rows["domain"] == "emotchat", "ios_scale"] += rows["week"].map(second).astype(float)
    return rows


def test_a_change_of_closeness_counts_only_who_has_both_weeks() -> None:
    rows = closeness({1: 2.0, 2: 9.0, 4: 3.0}, {1: 0.0, 2: 0.0, 4: 1.5})
    rows = rows[~((rows["ppt_id"] == "ppt0") & (rows["week"] == 4))]
    one, two = secondary_outcomes.closeness_change(rows)
    overall = one.set_index("scope")["mean"]
    assert overall["longitudinal polchat"] == pytest.approx(1.0) and overall["longitudinal emotchat"] == pytest.approx(2.5)
    assert one["n"].iloc[0] == 39
    assert two.set_index("treatment").loc["domain", "estimate"] == pytest.approx(-1.5)


def test_weekly_rows_are_also_tested_with_their_dependence() -> None:
    found = secondary_outcomes.relational_tests(closeness({1: 2.0, 4: 3.0}, {1: 0.0, 4: 1.0}))
    assert found["method"].nunique() == 2
    plain, clustered = (found[found["method"].str.startswith(name)].reset_index(drop=True) for name in ("Welch", "CR2"))
    pd.testing.assert_series_equal(plain["estimate"], clustered["estimate"])
    assert (clustered["clusters"] == clustered["n"] / 2).all()
    # The check of personalisation repeats itself every week, so that two rows hold the information of one.
    repeated = clustered["outcome"] == "personalisation_sensecheck"
    assert (clustered["se"] > 1.3 * plain["se"])[repeated].all()


def test_the_studies_are_compared_given_the_value_before() -> None:
    draw = np.random.default_rng(6)
    people = pd.concat([made_up(300), made_up(300, seed=2, study="cross_sectional")], ignore_index=True)
    people["study"] = pd.Categorical(people["study"], categories=["cross_sectional", "longitudinal"])
    people["post_psychosocial_F1"] = (
        0.7 * people["pre_psychosocial_F1"] + 0.5 * (people["study"] == "longitudinal") + 0.01 * draw.standard_normal(600)
    )
    found = secondary_outcomes.cross_study_change(people, {"F1": ("pre_psychosocial_F1", "post_psychosocial_F1")}).set_index(["model", "term"])
    assert found.loc[("study", "study[T.longitudinal]"), "estimate"] == pytest.approx(0.5, abs=0.005)
    assert found.loc[("study", "pre"), "estimate"] == pytest.approx(0.7, abs=0.005)
    assert found.loc[("study by domain", "domain[T.emotchat]:study[T.longitudinal]"), "estimate"] == pytest.approx(0.0, abs=0.01)


@needs_release
def test_goodbye_probabilities_and_odds_ratios_are_the_published_ones() -> None:
    means, ratios = secondary_outcomes.goodbye_by_dose(table("goodbye"))
    names = (
        {"estimate": "prob", "se": "SE", "lower": "asymp.LCL", "upper": "asymp.UCL"},
        {"estimate": "odds.ratio", "se": "SE", "statistic": "z.ratio", "p_adjusted": "p.value"},
    )
    compared = 0
    for study, by_study in published("goodbye_pairwise").items():
        for ours, theirs, key, columns in ((means, "marginal_means", "lambda_factor", names[0]), (ratios, "pairwise", "contrast", names[1])):
            rows = ours[ours["study"] == study].set_index(key)
            for row in by_study[theirs]:
                for mine, other in columns.items():
                    assert same(rows.loc[row[key], mine], row[other]), (study, row[key], mine)
                    compared += 1
    assert compared == 120


@needs_release
def test_competency_tests_are_the_published_ones() -> None:
    one, two = secondary_outcomes.competency_tests(secondary_outcomes.competency_scores(table("domain_competency")))
    one, two = one.set_index(["scope", "outcome"]), two.set_index(["outcome", "treatment"])
    shared = {"df": "df", "statistic": "t_stat", "p": "p_value", "lower": "ci_lower", "upper": "ci_upper"}
    compared = 0
    for row in published("domain_competency_one_sample_ttest") + published("domain_competency_one_sample_by_domain"):
        ours = one.loc[(row["study"].lower(), f"{row['outcome']}_diff")]
        for mine, other in {"n": "n", "mean": "mean_change", "sd": "sd_change", **shared}.items():
            assert same(ours[mine], row[other]), (row["outcome"], mine)
            compared += 1
    for row in published("domain_competency_two_sample_ttest"):
        ours = two.loc[(row["outcome"] if row["outcome"].endswith("_diff") else f"post_{row['outcome']}", row["treatment"])]
        assert (ours["group1"], ours["group2"]) == (row["group1"], row["group2"])
        for mine, other in {**{name: name for name in ("n1", "n2", "mean1", "mean2", "sd1", "sd2")}, **shared}.items():
            assert same(ours[mine], row[other]), (row["outcome"], row["treatment"], mine)
            compared += 1
    assert compared == 212


@needs_release
def test_the_effect_of_treatment_by_assistant_on_wellbeing_is_the_published_one() -> None:
    outcomes = {name: (f"pre_psychosocial_{name}", f"post_psychosocial_{name}") for name in ("F1", "F2")}
    found = secondary_outcomes.cross_study_change(merged(), outcomes)
    found = found[(found["model"] == "study") & (found["term"] == "study[T.longitudinal]")].set_index("outcome")
    for outcome, expected in {"F1": (0.0504, 0.0135, 0.0874, 0.0075), "F2": (-0.0301, -0.0723, 0.0121, 0.1622)}.items():
        for column, value in zip(("estimate", "lower", "upper", "p"), expected, strict=True):
            assert same(found.loc[outcome, column], value), (outcome, column)


@needs_release
def test_the_studies_differ_in_goodbyes_as_their_shares_do() -> None:
    found = secondary_outcomes.cross_study_goodbye(table("goodbye")).set_index("term").loc["study[T.longitudinal]"]
    assert found["estimate"] == pytest.approx(np.log(799 / 1021 / (421 / 1085)), abs=1e-8)


@needs_release
def test_companionship_users_leave_out_terms_that_say_nothing() -> None:
    found = secondary_outcomes.companionship_users(table("seeking_companionship"), merged()).set_index("term")
    told_none = found.index.str.contains(PNTS, regex=False)
    assert found["p_adjusted"].isna().tolist() == ((found.index == "Intercept") | told_none).tolist()
    assert (found["n"] == 2027).all()  # one of 2028 gave no age
    # Nobody who kept their gender to themselves was a user: that coefficient has no finite value, the others do.
    assert found.loc[found["note"] != ""].index.tolist() == [f"gender_binary[T.{PNTS}]"]
