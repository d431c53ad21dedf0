"""A second judge and people's ratings brought into a study are compared with its own judge and correct its dose-response."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from relseek_assets.definitions import build_stage
from relseek_assets.study import load_study
from relseek_resources.judges.embedded import NAME

VECTOR = "m:L01|e03"
MADE = ("pair_strengths", "pair_slopes", "judge_agreement", "study_agreement", "judge_biases", "corrected_dose_response")


def table(platform: Any, asset: str, *more: str) -> pd.DataFrame:
    shown = platform.command("table", "STUDY", asset, "--format", "json", *more)
    assert shown.exit_code == 0, shown.output
    return pd.DataFrame(json.loads(shown.output))


def ratings(platform: Any, path: Path) -> pd.DataFrame:
    """The scores of one vector by its own judges, by `second`, who gives a point more, and for every other item by `people`, who give two less."""
    own = table(platform, "judge_scores")
    own = own[(own["site"] == "m:L01") & (own["epoch"] == 3)]
    rated = own[own["rubric"] == "relationship"]
    items = sorted(rated["item"].unique())
    second = rated.assign(judge="second", score=(rated["score"] + 1).clip(upper=10))
    people = rated[rated["item"].isin(items[::2])].assign(judge="people", score=lambda rows: (rows["score"] - 2 * rows["multiplier"]).clip(1, 10))
    found = pd.concat([own, second, people])[["site", "epoch", "multiplier", "item", "rubric", "judge", "score"]]
    found.to_csv(path, index=False)
    return found


def test_published_scores_are_ranked_compared_and_corrected_too() -> None:
    stage = build_stage(load_study("kirk2025"))
    assert set(MADE) <= stage.catalogue.keys()
    read = {key.path[-1] for key in stage.graph.get(stage.key("judge_biases")).parent_keys}
    assert read == {"judge_scores", "judge_pairs", "generations"}
    assert "pair_strengths" not in build_stage(load_study("persona_axes")).catalogue, "a study without judgements has none of it"


@pytest.mark.slow
def test_judges_from_elsewhere_are_compared_and_people_correct_the_dose_response(finished: Any, tmp_path: Path) -> None:
    alone = table(finished, "corrected_dose_response", "--partition", VECTOR)
    assert set(alone.loc[alone["estimate"].isna(), "status"]) == {"no reference: [judge] reference names nobody"}
    assert set(alone.loc[alone["estimate"].notna(), "estimator"]) == {"judge"}
    assert table(finished, "judge_agreement").empty, "each rubric has one judge"

    scores = ratings(finished, tmp_path / "ratings.csv")
    done = finished.command("import", "scores", "STUDY", tmp_path / "ratings.csv", "--note", "a second judge and two people")
    assert done.exit_code == 0, done.output
    finished.edit("bootstrap = 100", 'bootstrap = 100\nreference = "people"')
    done = finished.command("run", "STUDY", *(part for name in MADE for part in ("--select", name)))
    assert done.exit_code == 0, done.output

    agreed = table(finished, "judge_agreement")
    assert set(agreed["site"] + agreed["epoch"].astype(str)) == {"m:L013"}, "other vectors have one judge"
    bias = agreed[(agreed["judge_a"] == NAME) & (agreed["judge_b"] == "second") & (agreed["measure"] == "bias")].iloc[0]
    wide = scores[scores["rubric"] == "relationship"].pivot_table(index=["multiplier", "item"], columns="judge", values="score")
    assert bias["estimate"] == pytest.approx((wide["second"] - wide[NAME]).mean())
    assert (bias["n"], bias["items"]) == (12, 4)
    assert set(agreed.loc[agreed["judge_a"] == "all", "measure"]) == {"alpha_interval", "alpha_ordinal"}
    pooled = table(finished, "study_agreement")
    again = pooled[(pooled["judge_b"] == "second") & (pooled["measure"] == "bias")].iloc[0]
    assert again["estimate"] == pytest.approx(bias["estimate"])

    corrected = table(finished, "corrected_dose_response", "--partition", VECTOR)
    mine = corrected[(corrected["judge"] == NAME) & (corrected["rubric"] == "relationship") & (corrected["quantity"] == "mean")]
    both = wide.dropna(subset=["people"])
    for dose, part in mine[mine["estimator"] == "rectifier"].groupby("multiplier"):
        assert part["estimate"].iloc[0] == pytest.approx((both["people"] - both[NAME])[dose].mean())
        assert part["n"].iloc[0] == 2
    assert set(mine["estimator"]) == {"judge", "reference", "rectifier", "ppi", "ppi++"}
    assert set(corrected.loc[corrected["rubric"] == "coherence", "status"]) == {"measured", "no reference: 'people' scored none of these rows"}
    assert "people" not in set(corrected["judge"])

    biases = table(finished, "judge_biases", "--partition", VECTOR)
    assert set(biases.loc[biases["bias"] == "position", "status"]) == {"not measurable: this judge is shown no order"}
    lengths = biases[biases["bias"] == "length"]
    assert {"points_per_doubling", "points_per_doubling_beyond_reference", "log_odds_per_doubling"} == set(lengths["measure"])
    assert lengths["estimate"].notna().any(), "the replies of this study are there"

    strengths = table(finished, "pair_strengths", "--partition", VECTOR)
    assert set(strengths["multiplier"]) == {-1.0, 0.0, 1.0}
    pairs = table(finished, "judge_pairs", "--partition", VECTOR)
    assert set(strengths["judge"]) <= set(pairs["judge"])
    assert strengths["win_rate"].between(0, 1).all() and (strengths["items"] <= 4).all()
    with finished.workspace() as workspace:
        record = workspace.lineage().record(workspace.stage.key("corrected_dose_response"), VECTOR)
    shown = record.event_log_entry.asset_materialization.metadata
    assert shown[f"plot_relationship_{NAME}"].value.startswith("![figure](data:image/png;base64,")
    states = {name for (name, _), state in _states(finished).items() if state.status not in ("fresh", "imported") and name in MADE}
    assert not states


def _states(platform: Any) -> Any:
    with platform.workspace() as workspace:
        return workspace.states()
