"""Coding of answers by hand; factors and types of simulated participants against the truths they were simulated from."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from relseek_assets.trials import psychometrics
from relseek_assets.trials.psychometrics import SCALES, PsychosocialFactors, QuestionnaireError, Scale, code_answers

PEOPLE = 900
LUBBEN_WORDS = ["None", "One", "Two", "Three or four", "Five thru eight", "Nine or more"]


def answered(mood: np.ndarray, company: np.ndarray, seed: int) -> pd.DataFrame:
    """Raw answers to the 23 items: well-being, distress by `mood`, loneliness by both, social network by `company`."""
    generator = np.random.default_rng(seed)
    answers = {}
    for scale in SCALES:
        cause = {"who": mood, "phq_gad": mood, "ucla": 0.7 * mood + 0.3 * company, "lubben": company}[scale.name]
        for item in scale.items:
            felt = cause + 0.7 * generator.standard_normal(len(cause))
            sign = -1 if item in scale.reversed_items else 1
            if scale.name == "lubben":
                answers[item] = np.array(LUBBEN_WORDS, dtype=object)[np.digitize(felt, [-2.0, -1.2, -0.4, 0.5, 1.3])]
            else:
                cuts = np.linspace(-1.3, 1.3, scale.high - scale.low)
                answers[item] = (scale.low + np.digitize(sign * felt, cuts)).astype(float)
    return pd.DataFrame(answers)


@pytest.fixture(scope="module")
def truth() -> np.ndarray:
    generator = np.random.default_rng(12)
    return generator.multivariate_normal([0, 0], [[1, 0.4], [0.4, 1]], PEOPLE)


@pytest.fixture(scope="module")
def table(truth: np.ndarray) -> pd.DataFrame:
    people = pd.DataFrame({"ppt_id": [f"ppt{number}" for number in range(PEOPLE)], "study": ["longitudinal", "cross_sectional"] * (PEOPLE // 2)})
    pre = pd.concat([people.assign(timepoint="pre"), answered(*truth.T, seed=1)], axis=1)
    later = truth - np.array([0.5, 0.0])
    post = pd.concat([people.assign(timepoint="post"), answered(*later.T, seed=2)], axis=1)
    post.loc[0, list(SCALES[0].items)] = np.nan
    same = [item for scale in SCALES for item in scale.items]
    post.loc[1, same] = pre.loc[1, same]
    return pd.concat([pre, post.iloc[: PEOPLE - 100]], ignore_index=True)


@pytest.fixture(scope="module")
def found(table: pd.DataFrame) -> PsychosocialFactors:
    return psychometrics.psychosocial_factors(table)


# --- coding -----------------------------------------------------------------------------------------------------------


def test_the_instruments_have_23_items_coded_towards_being_better_off() -> None:
    best = {"who": 5, "ucla": 1, "phq_gad": 0, "lubben": "Nine or more"}
    row = {item: best[scale.name] for scale in SCALES for item in scale.items} | {"ucla_3": 4, "ucla_6": 4}
    coded = code_answers(pd.DataFrame([row]), SCALES, "f").iloc[0]
    assert len(coded) == 23
    assert [coded[scale.items[0]] for scale in SCALES] == [5, 4, 3, 5]
    assert {coded[item] for item in SCALES[1].items} == {4}


def test_nobody_at_all_counts_as_missing_in_the_social_network_scale() -> None:
    answers = pd.DataFrame(dict.fromkeys(SCALES[3].items, LUBBEN_WORDS))
    coded = code_answers(answers, SCALES[3:], "f")
    assert coded["lubben_1"].isna().tolist() == [True, False, False, False, False, False]
    assert coded["lubben_1"].tolist()[1:] == [1, 2, 3, 4, 5]


def test_other_instruments_can_be_declared() -> None:
    scale = Scale("mood", ("sad", "glad"), 1, 3, frozenset({"sad"}), answers={"never": 1, "often": 3}, no_answer=frozenset({"skip"}))
    coded = code_answers(pd.DataFrame({"sad": ["never", "2", None], "glad": ["often", "skip", 1]}), [scale], "f")
    np.testing.assert_array_equal(coded.to_numpy(), [[3, 3], [2, np.nan], [np.nan, 1]])


def test_an_unknown_answer_and_a_missing_column_are_named_with_their_file(table: pd.DataFrame) -> None:
    wrong = table.copy()
    wrong.loc[3, "who_2"] = 6.0
    with pytest.raises(QuestionnaireError, match=r"psychosocial\.jsonl: who_2 holds 6\.0; who takes 0 to 5"):
        psychometrics.psychosocial_factors(wrong)
    with pytest.raises(QuestionnaireError, match=r"psychosocial\.jsonl has no column 'ucla_4'"):
        psychometrics.psychosocial_factors(table.drop(columns="ucla_4"))
    with pytest.raises(QuestionnaireError, match="ppt0'? has more than one row"):
        psychometrics.psychosocial_factors(pd.concat([table, table.iloc[:1]]))


# --- psychosocial factors ---------------------------------------------------------------------------------------------


def test_scores_before_treatment_are_standardised_and_correlate_as_the_factors_do(found: PsychosocialFactors) -> None:
    scores = found.scores[["pre_psychosocial_F1", "pre_psychosocial_F2"]].to_numpy()
    np.testing.assert_allclose(scores.mean(0), 0, atol=1e-10)
    np.testing.assert_allclose(np.corrcoef(scores, rowvar=False), found.factor_correlations, atol=1e-8)
    np.testing.assert_allclose(scores.std(0, ddof=1), 1, atol=1e-8)


def test_factors_measure_what_the_answers_were_simulated_from(found: PsychosocialFactors, truth: np.ndarray) -> None:
    assert np.corrcoef(found.scores["pre_psychosocial_F1"], truth[:, 0])[0, 1] > 0.93
    assert np.corrcoef(found.scores["pre_psychosocial_F2"], truth[:, 1])[0, 1] > 0.88
    loadings = found.loadings.set_index("item")
    assert (loadings.filter(like="lubben", axis=0)["F2"] > 0.6).all() and (loadings.filter(like="who", axis=0)["F1"] > 0.6).all()
    assert found.parallel_factors == 2 and found.simple_structure_factors[1] == 2
    assert found.fit.n == PEOPLE and found.fit.dof == 208


def test_scores_after_treatment_keep_the_scale_of_those_before(found: PsychosocialFactors) -> None:
    people = found.scores.set_index("ppt_id")
    complete = people.dropna()
    assert len(people) == PEOPLE and len(complete) == PEOPLE - 100
    change = complete["post_psychosocial_F1"] - complete["pre_psychosocial_F1"]
    assert -0.6 < change.mean() < -0.3  # half a standard deviation, less what answers bounded below can show
    assert abs((complete["post_psychosocial_F2"] - complete["pre_psychosocial_F2"]).mean()) < 0.1
    same = people.loc["ppt1"]
    assert same["post_psychosocial_F1"] == same["pre_psychosocial_F1"] and same["post_psychosocial_F2"] == same["pre_psychosocial_F2"]


def test_missing_answers_count_as_the_mean_before_treatment(found: PsychosocialFactors, table: pd.DataFrame) -> None:
    assert found.missing_share == pytest.approx((table[table["timepoint"] == "pre"] == "None").sum().sum() / (23 * PEOPLE))
    assert np.isfinite(found.scores.set_index("ppt_id").loc["ppt0", "post_psychosocial_F1"])


# --- pre-treatment types ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pre_treatment() -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame, np.ndarray]:
    """Two groups of 200 who answer around 65 and 35, rude_to_ai the other way round; half of each is asked about companionship."""
    generator = np.random.default_rng(9)
    enthusiast = np.repeat([True, False], 200)
    level = np.where(enthusiast, 65.0, 35.0)[:, None]
    values = np.clip(level + 12 * generator.standard_normal((400, 20)), 0, 100)
    people = pd.DataFrame({"ppt_id": [f"p{number}" for number in range(400)], "study": np.tile(["longitudinal", "cross_sectional"], 200)})
    names = [f"{category}:item{number}" for category in ("mental_states", "relationships", "tone") for number in range(4)]
    names[8] = "tone:rude_to_ai"
    attitudes = pd.concat([people, pd.DataFrame(values[:, :12], columns=names)], axis=1)
    attitudes["tone:rude_to_ai"] = 100 - attitudes["tone:rude_to_ai"]
    preferences = pd.concat([people, pd.DataFrame(values[:, 12:19], columns=list(psychometrics.PREFERENCE_ITEMS))], axis=1)
    seeking = people.assign(timepoint="pre", seeking_companionship_likelihood=values[:, 19])
    seeking = pd.concat([seeking, seeking.assign(timepoint="post", seeking_companionship_likelihood=0.0)])
    return attitudes, preferences, seeking[seeking["study"] == "longitudinal"], enthusiast


def test_types_are_the_groups_that_answered_alike(pre_treatment: tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame, np.ndarray]) -> None:
    attitudes, preferences, seeking, enthusiast = pre_treatment
    found = psychometrics.pre_treatment_types(attitudes, preferences.sample(frac=1, random_state=1), seeking)
    assert (found.types["cluster_name"].to_numpy() == np.where(enthusiast, "Anthro Enthusiast", "Anthro Skeptic")).all()
    chosen = found.clusterings[found.clusterings["chosen"]]
    assert list(chosen["k"]) == [2] and chosen["silhouette"].item() == found.clusterings["silhouette"].max()
    assert "tone:polite_to_ai" in set(found.loadings["item"]) and (found.loadings["factor_1"] > 0.3).all()
    means = found.types.groupby("cluster_name")["factor_1_score"].mean()
    assert means["Anthro Enthusiast"] > 0.7 and means["Anthro Skeptic"] < -0.7
    assert len(found.loadings) == 20 and list(found.types["ppt_id"]) == list(attitudes["ppt_id"])


def test_what_the_files_lack_is_named(pre_treatment: tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame, np.ndarray]) -> None:
    attitudes, preferences, seeking, _ = pre_treatment
    with pytest.raises(QuestionnaireError, match=r"anthro_attitudes\.jsonl needs 12 slider columns"):
        psychometrics.pre_treatment_types(attitudes.drop(columns="tone:rude_to_ai"), preferences, seeking)
    with pytest.raises(QuestionnaireError, match=r"stated-preferences\.jsonl has no column 'robot_human'"):
        psychometrics.pre_treatment_types(attitudes, preferences.drop(columns="robot_human"), seeking)
    with pytest.raises(QuestionnaireError, match="cold_warm has no answers"):
        psychometrics.pre_treatment_types(attitudes, preferences.assign(ppt_id="other" + preferences["ppt_id"]), seeking)
