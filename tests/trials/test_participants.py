"""The merged participant table, against counts of the questionnaire and the specification's sizes."""

from __future__ import annotations

from typing import Any

import pandas as pd
import pytest
from released import merged, needs_release, table

from relseek_assets.trials.participants import COARSENINGS, DOSES, PNTS, ParticipantFault, participants, treatment_columns

ANSWERS = {coarsening.item: next(iter(coarsening.codes)) for coarsening in COARSENINGS} | {"education": "Graduate study"}


def questionnaire(**columns: list[Any]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """(sociodemographics, metadata) of as many participants as the longest column has."""
    n = max([3, *map(len, columns.values())])
    base = {
        "ppt_id": [f"p{index}" for index in range(n)],
        "study": "longitudinal",
        "multiplier": -0.5,
        "domain": "polchat",
        "personalisation": "personalised",
    }
    base |= {"age": 40.0, "mas_score": 1.0, "gcs_score": 1.0, "charity_amount_gbp": None, **ANSWERS, **columns}
    answers = pd.DataFrame(base)
    metadata = answers[["ppt_id", "study", "multiplier", "domain", "personalisation"]].assign(
        pre_treatment_dropout=False, post_treatment_dropout=True
    )
    return answers, metadata


def test_the_first_level_is_the_reference() -> None:
    frame = treatment_columns(
        pd.DataFrame({"multiplier": list(DOSES), "domain": "emotchat", "personalisation": "personalised", "study": "longitudinal"})
    )
    references = {
        column: frame[column].cat.categories[0] for column in ("domain", "personalisation", "study", "relationship_seeking_category", "lambda_factor")
    }
    assert references == {
        "domain": "polchat",
        "personalisation": "non-personalised",
        "study": "cross_sectional",
        "relationship_seeking_category": "neg_lambda",
        "lambda_factor": "neg1",
    }
    assert list(frame["relationship_seeking_category"]) == ["neg_lambda", "neg_lambda", "zero_lambda", "pos_lambda", "pos_lambda"]
    assert list(frame["lambda_factor"]) == ["neg1", "neg0.5", "zero", "pos0.5", "pos1"]


def test_a_dose_outside_the_trial_is_refused() -> None:
    with pytest.raises(ParticipantFault, match=r"multiplier: 1\.5"):
        treatment_columns(pd.DataFrame({"multiplier": [0.0, 1.5]}))


def test_education_that_is_not_told_has_the_median_of_everyone() -> None:
    answers, metadata = questionnaire(education=["No qualifications", "GCSEs or equivalent", "Graduate study", PNTS])
    metadata.loc[0, "pre_treatment_dropout"] = True  # not in any analysis, yet in the median
    assert list(participants(answers, metadata)["education_years"]) == [10, 11, 18, 11]


@pytest.mark.parametrize("item", sorted(ANSWERS))
def test_an_unknown_answer_is_named_with_its_column(item: str) -> None:
    answers, metadata = questionnaire(**{item: ["nobody's answer", *[ANSWERS[item]] * 2]})
    with pytest.raises(ParticipantFault, match=f'{item}: unknown answer "nobody\'s answer"'):
        participants(answers, metadata)


def test_a_missing_answer_stays_missing() -> None:
    answers, metadata = questionnaire(gender=["Male", None, PNTS])
    assert participants(answers, metadata)["gender_binary"].isna().tolist() == [False, True, False]


def test_participants_are_not_doubled_lost_or_moved_to_another_arm() -> None:
    answers, metadata = questionnaire()
    with pytest.raises(ParticipantFault, match="sociodemographics: ppt_id p0 has more than one row"):
        participants(pd.concat([answers, answers.head(1)]), metadata)
    with pytest.raises(ParticipantFault, match="metadata_with_dropout: no row for ppt_id p2"):
        participants(answers, metadata.head(2))
    with pytest.raises(ParticipantFault, match="multiplier: .* disagree on ppt_id p1"):
        participants(answers, metadata.assign(multiplier=[-0.5, 1.0, -0.5]))
    with pytest.raises(ParticipantFault, match="post_treatment_dropout: None for ppt_id p1"):
        participants(answers, metadata.assign(post_treatment_dropout=[True, None, False]))


@needs_release
def test_the_release_has_the_published_sizes() -> None:
    found = merged()
    assert len(found) == 3534 and found["ppt_id"].is_unique
    assert found["cluster_name"].value_counts().to_dict() == {"Anthro Enthusiast": 1973, "Anthro Skeptic": 1561}
    kept = found[~found["pre_treatment_dropout"]]
    assert kept["study"].value_counts().to_dict() == {"longitudinal": 1996, "cross_sectional": 1506}
    assert kept.groupby("study", observed=True)["post_treatment_dropout"].sum().to_dict() == {"longitudinal": 176, "cross_sectional": 203}


@needs_release
def test_every_answer_of_the_release_has_one_code() -> None:
    raw = table("sociodemographics")
    for coarsening in COARSENINGS:
        assert not merged()[coarsening.name].isna().any()
        told_none = raw[coarsening.item] == PNTS
        assert (merged()[coarsening.name] == PNTS).tolist() == told_none.tolist()
    assert set(merged()["education_years"]) == {10, 11, 12, 13, 16, 18}
