"""Ranks, matches and counts by hand; the published ones come out of the release."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pandas as pd
import pytest

from relseek_assets.trials import topics
from relseek_assets.trials.topics import TopicError

POLITICAL, EMOTIONAL = topics.DOMAIN_TOPICS["polchat"], topics.DOMAIN_TOPICS["emotchat"]
MAIN = "data/human_study/main_studies"


def ranked(person: str, domain: str, order: list[str], study: str = "longitudinal") -> dict[str, str]:
    return {"ppt_id": person, "study": study, "domain": domain} | dict(zip(topics.RANK_COLUMNS, order, strict=True))


@pytest.fixture
def wishes() -> pd.DataFrame:
    return pd.DataFrame(
        [
            ranked("a", "polchat", [POLITICAL, EMOTIONAL, "write", "code", "learn"]),
            ranked("b", "polchat", ["write", "code", EMOTIONAL, POLITICAL, "learn"]),
            ranked("c", "emotchat", ["write", "code", EMOTIONAL, POLITICAL, "learn"]),
            ranked("d", "emotchat", ["write", "code", POLITICAL, EMOTIONAL, "learn"], study="cross_sectional"),
        ]
    )


def test_the_most_wanted_topic_has_five_points(wishes: pd.DataFrame) -> None:
    found = topics.topic_ranks(wishes).set_index("topic")
    assert found["mean"].to_dict() == {"write": 4.5, "code": 3.5, POLITICAL: 3.0, EMOTIONAL: 3.0, "learn": 1.0}
    assert (found["n"] == 4).all() and found.loc["learn", "se"] == 0
    assert found.loc[POLITICAL, "sd"] == pytest.approx(pd.Series([5, 2, 2, 3]).std())


def test_a_match_is_absolute_when_first_and_relative_when_above_the_other_domain(wishes: pd.DataFrame) -> None:
    found = topics.topic_groups(wishes).set_index("ppt_id")
    assert found["received_absolute_pref_topic_match"].to_dict() == {"a": True, "b": False, "c": False, "d": False}
    assert found["received_pref_topic_relative_match"].to_dict() == {"a": True, "b": False, "c": True, "d": False}


def test_shares_are_by_study_and_domain(wishes: pd.DataFrame) -> None:
    found = topics.match_shares(topics.topic_groups(wishes)).set_index(["study", "domain", "match"])
    row = found.loc[("longitudinal", "polchat", "absolute")]
    assert row[["share", "matched", "n"]].tolist() == [0.5, 1, 2]
    assert [row["lower"], row["upper"]] == pytest.approx([1 - 0.975**0.5, 0.975**0.5])  # Clopper-Pearson of 1 in 2
    assert found.loc[("cross_sectional", "emotchat", "relative"), "share"] == 0 and len(found) == 6


def test_refusals_name_the_participant_or_the_column(wishes: pd.DataFrame) -> None:
    groups = topics.topic_groups(wishes).drop(columns="study")
    with pytest.raises(TopicError, match="no column study"):
        topics.match_shares(groups)
    with pytest.raises(TopicError, match="lacks d"):
        topics.match_shares(groups, wishes[wishes["ppt_id"] != "d"])
    with pytest.raises(TopicError, match="b did not rank"):
        topics.topic_groups(wishes.assign(rank_4_topic=["code", "code", POLITICAL, EMOTIONAL]))
    with pytest.raises(TopicError, match="openchat"):
        topics.topic_groups(wishes.assign(domain="openchat"))
    with pytest.raises(TopicError, match="rank_2_topic"):
        topics.topic_ranks(wishes.drop(columns="rank_2_topic"))


def test_counts_are_by_study_and_leave_out_who_did_not_answer() -> None:
    one = pd.DataFrame({"ppt_id": ["a", "b", "c"], "study": "longitudinal", "gender": ["Male", "Female", None], "education": "GCSEs or equivalent"})
    other = pd.DataFrame({"ppt_id": ["a"], "study": "calibration", "gender": ["Male"]})
    found = topics.sociodemographic_counts([one, other]).set_index(["study", "characteristic", "answer"])
    assert found["n"].to_dict() == {
        ("calibration", "gender", "Male"): 1,
        ("longitudinal", "education", "GCSEs"): 3,
        ("longitudinal", "gender", "Female"): 1,
        ("longitudinal", "gender", "Male"): 1,
    }
    assert found.loc[("longitudinal", "gender", "Male"), "share"] == 0.5


def release(path: str) -> Path:
    if "RELSEEK_RELEASE" not in os.environ:
        pytest.skip("RELSEEK_RELEASE is not set: the participants are not here")
    return Path(os.environ["RELSEEK_RELEASE"]) / path


def rows(path: str) -> pd.DataFrame:
    table = pd.DataFrame(json.loads(line) for line in release(path).read_text().splitlines())
    return table.assign(study=table["study_id"].str.replace("-", "_")) if "study_id" in table else table


def test_the_published_ranks_and_groups_are_recomputed() -> None:
    wishes = rows(f"{MAIN}/usecase-preferences.jsonl")
    assert topics.topic_ranks(wishes)["mean"].round(2).tolist() == [3.69, 3.55, 2.68, 2.67, 2.41]
    published = rows("8-human-studies-analysis/outputs/generated_data_files/topic_groups.jsonl").sort_values("ppt_id")
    found = topics.topic_groups(wishes).sort_values("ppt_id")[list(published.columns)]
    pd.testing.assert_frame_equal(found.reset_index(drop=True), published.reset_index(drop=True), check_dtype=False)


def test_the_published_match_shares_are_recomputed() -> None:
    groups = rows("8-human-studies-analysis/outputs/generated_data_files/topic_groups.jsonl")
    found = topics.match_shares(groups, rows(f"{MAIN}/usecase-preferences.jsonl"))
    percent = {key: round(100 * part["share"].item(), 1) for key, part in found.groupby(["study", "domain", "match"])}
    assert percent == {
        ("cross_sectional", "emotchat", "absolute"): 13.3,
        ("cross_sectional", "polchat", "absolute"): 10.9,
        ("longitudinal", "emotchat", "absolute"): 15.5,
        ("longitudinal", "polchat", "absolute"): 13.7,
        ("cross_sectional", "emotchat", "relative"): 36.7,
        ("cross_sectional", "polchat", "relative"): 63.7,
        ("longitudinal", "emotchat", "relative"): 41.2,
        ("longitudinal", "polchat", "relative"): 61.2,
    }


def test_the_published_sociodemographic_counts_are_recomputed() -> None:
    published = json.loads(release("8-human-studies-analysis/outputs/stats/sociodemographics_participant_counts.json").read_text())
    tables = [rows(f"{MAIN}/sociodemographics.jsonl"), rows("data/human_study/calibration_study/sociodemographics.jsonl")]
    found = topics.sociodemographic_counts(tables)
    for characteristic in topics.CHARACTERISTICS:
        counts = found[found["characteristic"] == characteristic].groupby("answer")["n"].sum().to_dict()
        assert counts == published[f"{characteristic}_distribution"], characteristic
    sizes = found[found["characteristic"] == "gender"].groupby("study")["n"].sum().to_dict()
    assert sizes == {name.replace("-", "_"): n for name, n in published["study_sizes"].items()}


def test_the_published_condition_sizes_are_recomputed() -> None:
    published = json.loads(release("8-human-studies-analysis/outputs/stats/sample_sizes_per_condition.json").read_text())
    found = topics.condition_sizes(rows(f"{MAIN}/participant_characteristics/metadata_with_dropout.jsonl"))
    for study in ("longitudinal", "cross_sectional"):
        part = found[found["study"] == study].set_index(["multiplier", "domain", "personalisation"])["n"].to_dict()
        assert part == {(row["multiplier"], row["domain"], row["personalisation"]): row["n"] for row in published[f"factorial_{study}"]}
