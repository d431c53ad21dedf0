"""Rows of an outcome: items one below the other, baselines beside their answers, arms as numbers, categories and levels."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest

from relseek_assets.trials.frames import covariates_table, with_covariates
from relseek_assets.trials.simulation import Effects, simulate
from tests.trials.declared import DOSES, FACTORS, OUTCOMES, TABLES, frame_of, trial

EFFECTS = Effects(50, dose=(3.0,), intercept_sd=4, residual_sd=3)


def tables(key: str, effects: Effects = EFFECTS, **changes: Any) -> dict[str, pd.DataFrame]:
    return simulate(trial(**changes), key, effects, 40, seed=3).tables


def test_pooled_items_stand_below_each_other_and_missing_answers_are_left_out() -> None:
    raw = tables("main:warmth")
    raw["answers"].loc[4, "ease"] = np.nan
    rows = frame_of(trial(), "main:warmth", raw).rows
    assert rows["item"].tolist() == ["warmth"] * 40 + ["ease"] * 39
    assert list(rows["item"].cat.categories) == ["warmth", "ease"], "the first item is the reference"
    one = rows[rows["participant"].eq("p00007")].set_index("item")["value"]
    assert one.to_dict() == raw["answers"].set_index("participant").loc["p00007", ["warmth", "ease"]].to_dict()


def test_arms_are_a_number_a_category_and_a_level() -> None:
    rows = frame_of(trial(), "main:trust", tables("main:trust")).rows
    by_dose = rows.groupby("dose")[["category", "level"]].agg(lambda values: set(values))
    assert by_dose["category"].tolist() == [{"low"}, {"low"}, {"middle"}, {"high"}, {"high"}]
    assert by_dose["level"].tolist() == [{"-1"}, {"-0.5"}, {"0"}, {"0.5"}, {"1"}]
    assert list(rows["category"].cat.categories) == ["low", "middle", "high"]
    assert list(rows["level"].cat.categories) == ["-1", "-0.5", "0", "0.5", "1"], "the lowest dose is the reference"


@pytest.mark.parametrize(
    ("doses", "categories"),
    [((0.0, 1.0), ["low", "high"]), ((0.0, 0.5, 1.0), ["low", "high"]), ((-1.0, 0.0, 1.0), ["low", "middle", "high"]), ((2.0, 5.0), ["low", "high"])],
)
def test_without_doses_below_zero_the_lowest_is_what_the_others_are_compared_with(doses: tuple[float, ...], categories: list[str]) -> None:
    dose = {"column": "arm", "values": doses}
    rows = frame_of(trial(dose=dose), "main:trust", tables("main:trust", dose=dose)).rows
    assert list(rows["category"].cat.categories) == categories
    assert set(rows.loc[rows["category"].eq("low"), "dose"]) == {doses[0]}


def test_a_declaration_may_name_the_doses_of_the_primary_contrast() -> None:
    dose = {"column": "arm", "values": DOSES, "low": [0.0], "high": [1.0]}
    rows = frame_of(trial(dose=dose), "main:trust", tables("main:trust")).rows
    assert rows.groupby("dose")["category"].first().tolist() == ["middle", "middle", "low", "middle", "high"]


def test_a_baseline_is_the_same_persons_answer_before() -> None:
    raw = tables("main:pain")
    rows = frame_of(trial(), "main:pain", raw).rows
    before = raw["visits"].query("moment == 'before'").set_index("participant")["pain"]
    assert len(rows) == 40 and rows["baseline"].tolist() == before[rows["participant"]].tolist()
    assert rows["value"].tolist() == raw["visits"].query("moment == 'after'")["pain"].tolist()
    without = raw | {"visits": raw["visits"].drop(index=raw["visits"].query("moment == 'before' and participant == 'p00003'").index)}
    assert "p00003" not in set(frame_of(trial(), "main:pain", without).rows["participant"]), "no baseline, no row"


def test_a_baseline_may_be_a_column_beside() -> None:
    outcomes = [{"name": "trust", "table": "answers", "items": ["trust"], "designs": {"main": {"baseline": {"column": "ease"}}}}]
    raw = tables("main:trust", outcomes=outcomes)
    rows = frame_of(trial(outcomes=outcomes), "main:trust", raw).rows
    assert rows["baseline"].tolist() == raw["answers"]["ease"].tolist()


def test_a_baseline_of_the_same_week_is_joined_by_week() -> None:
    diary = TABLES["diary"] | {"key": ["week", "moment"]}
    diary["columns"] = [*diary["columns"], {"names": ["moment"], "kind": "string"}]
    design = {"where": {"moment": "after"}, "time": "week", "endpoints": [1, 4], "baseline": {"where": {"moment": "before"}, "by": ["week"]}}
    changes: dict[str, Any] = {
        "tables": TABLES | {"diary": diary},
        "outcomes": [{"name": "mood", "table": "diary", "items": ["mood"], "designs": {"main": design}}],
    }
    raw = tables("main:mood", **changes)
    rows = frame_of(trial(**changes), "main:mood", raw).rows
    before = raw["diary"].query("moment == 'before'").set_index(["participant", "week"])["mood"]
    assert len(rows) == 160
    assert rows["baseline"].tolist() == [before[who, int(week)] for who, week in zip(rows["participant"], rows["time"], strict=True)]


def test_a_factor_that_does_not_vary_is_no_factor() -> None:
    raw = tables("main:trust")
    raw["answers"]["topic"] = "sport"
    frame = frame_of(trial(), "main:trust", raw)
    assert [factor.column for factor in frame.factors] == ["voice"]
    design = [{"name": "trust", "table": "answers", "items": ["trust"], "designs": {"main": {"where": {"topic": "sport"}}}}]
    assert [factor.column for factor in frame_of(trial(outcomes=design), "main:trust", tables("main:trust")).factors] == ["voice"]


@pytest.mark.parametrize("factors", [[], FACTORS[:1]])
def test_a_trial_may_have_fewer_factors(factors: list[dict[str, Any]]) -> None:
    frame = frame_of(trial(factors=factors), "main:warmth", tables("main:warmth", factors=factors))
    assert len(frame.factors) == len(factors) and frame.participants == 40


def test_arms_may_stand_in_a_table_of_their_own() -> None:
    changes: dict[str, Any] = {"tables": TABLES | {"answers": TABLES["answers"] | {"arms": "joined"}, "people": {"file": "people.csv"}}}
    raw = tables("main:trust", arms_table="people", **changes)
    assert "dose" not in raw["answers"]
    joined, own = frame_of(trial(arms_table="people", **changes), "main:trust", raw), frame_of(trial(), "main:trust", tables("main:trust"))
    pd.testing.assert_frame_equal(joined.rows, own.rows)


def test_covariates_keep_the_rows_and_the_order_of_their_levels() -> None:
    columns = [{"names": ["age"]}, {"names": ["school", "same"], "kind": "string"}]
    tables_too = TABLES | {"people": {"file": "people.csv", "arms": "none", "columns": columns}}
    declared = trial(tables=tables_too, participants=["people"], robustness={"demographics": ["age", "school"], "preferences": ["same"]})
    frame = frame_of(declared, "main:warmth", tables("main:warmth"))
    people = pd.DataFrame(
        {"participant": sorted(set(frame.rows["participant"]), reverse=True), "study": "main", "age": np.arange(40.0), "same": "yes"}
    )
    people["school"] = np.where(people["age"] > 20, "long", "short")
    people.loc[5, "age"] = np.nan
    found = with_covariates(frame, covariates_table(people))
    assert found.covariates == ("age", "school"), "what does not vary is left out"
    pd.testing.assert_frame_equal(found.rows[frame.rows.columns], frame.rows)
    assert list(found.rows["school"].cat.categories) == ["short", "long"]
    assert found.rows["age"].isna().sum() == 2, "one person, two items"


def test_outcomes_are_conserved() -> None:
    """What a frame holds are the values of the file, each once."""
    for outcome in OUTCOMES:
        key = f"main:{outcome['name']}"
        effects = EFFECTS if outcome.get("model") != "logit" else Effects(dose=(1.0,))
        raw = tables(key, effects)[outcome["table"]]
        raw = raw[raw["moment"].eq("after")] if outcome["table"] == "visits" else raw
        expected = raw[outcome["items"]].to_numpy().ravel(order="F")
        np.testing.assert_array_equal(frame_of(trial(), key, tables(key, effects)).rows["value"], expected)
