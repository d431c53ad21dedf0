"""Interventions and drift on a tiny model, from the study file to the page: what is made, that it agrees with itself, and what makes it stale."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from relseek_assets.exchange import read_asset
from relseek_assets.persona_set import FILES
from relseek_assets.study import StudyError, load_study
from tests.platform.conftest import CHECKOUT, Platform, _once, _session_folder
from tests.platform.test_contrastive_study import small_personas

HOSTILE = ["sneering_critic", "crime_boss"]
STUDY = """
name = "tiny"
title = "A tiny axis with interventions"
kind = "contrastive"
personas = {personas}
seed = 3

[[models]]
name = "m"
source = {model}
device = "cpu"

[contrast]
assistants_per_query = 2
others_per_query = 3
max_new_tokens = 24
temperature = 1.0
bootstrap = 100

[interventions]
prompts = 5
personas = ["sneering_critic", "crime_boss"]
layers = [1, 2]
strengths = [1, 3]
percentiles = [50, 95]
max_new_tokens = 6
bootstrap = 100

[drift]
percentile = 50
turns = 2
max_new_tokens = 4
"""
CONDITIONS = {"none", "add 1", "add 3", "floor p50", "floor p95"}
REPLIES = {"intervention_replies", "intervention_scores", "intervention_summary", "intervention_comparison", "report"}


class Intervened(Platform):
    """A platform whose study intervenes and whose `behaviour` is a persona folder."""

    def study_text(self) -> str:
        return STUDY.format(personas=json.dumps(str(self.behaviour)), model=json.dumps(str(self.model)))

    def copy(self, folder: Path) -> Intervened:
        copied = Intervened(super().copy(folder).folder, self.model)
        copied.study_file.write_text(copied.study_text())
        return copied


@pytest.fixture(scope="session")
def intervened_session(tmp_path_factory: pytest.TempPathFactory, tiny_model_folder: Path) -> Intervened:
    """The finished tiny study. Read it, or copy it before changing anything."""

    def make(folder: Path) -> None:
        made = Intervened(folder, tiny_model_folder)
        made.home.mkdir(parents=True)
        shutil.copy(CHECKOUT / "dagster_home" / "dagster.yaml", made.home)
        small_personas(made.behaviour)
        made.study_file.write_text(made.study_text())
        done = made.process("run", "STUDY")
        assert done.returncode == 0, done.stdout + done.stderr

    return Intervened(_once(_session_folder(tmp_path_factory) / "intervened", make), tiny_model_folder)


@pytest.fixture
def intervened(intervened_session: Intervened, tmp_path: Path) -> Intervened:
    return intervened_session.copy(tmp_path / "platform")


def table(platform: Platform, name: str) -> Any:
    with platform.workspace() as workspace:
        return read_asset(workspace, name)


def stale(platform: Platform) -> set[str]:
    with platform.workspace() as workspace:
        workspace.observe()
        return {task.asset.name for task in workspace.plan()}


def test_every_prompt_meets_every_hostile_persona_under_every_condition(intervened_session: Intervened) -> None:
    replies, scores = table(intervened_session, "intervention_replies"), table(intervened_session, "intervention_scores")
    assert set(replies["condition"]) == CONDITIONS and set(replies["persona"]) == set(HOSTILE)
    assert len(replies) == len(scores) == 5 * 2 * 5
    assert (replies.groupby(["prompt", "persona"])["condition"].nunique() == 5).all()
    assert (replies.groupby(["prompt", "persona"])["seed"].nunique() == 1).all(), "conditions share a prompt's draws"
    assert replies["prompt"].str.replace(r"-\d+", "", regex=True).nunique() == 5, "a prompt of every kind"
    plain = replies[replies["condition"] == "none"]
    assert (plain["multiplier"] == 0).all() and plain["thresholds"].isna().all()


def test_strengths_and_thresholds_are_those_of_the_stored_axis(intervened_session: Intervened) -> None:
    from relseek_resources.storage import read_tensors

    replies, rows = table(intervened_session, "intervention_replies"), table(intervened_session, "persona_replies")
    quality = table(intervened_session, "direction_quality")
    units = read_tensors(intervened_session.files / "directions" / "m.safetensors")[0]["response_mean"]
    stored = read_tensors(intervened_session.files / "persona_activations" / "m.safetensors")[0]["response_mean"]
    own = (quality["extraction"] == "response_mean") & (quality["evaluated_with"] == "response_mean") & (quality["split"] == "query")
    layer = int(quality.loc[own & quality["best_by_auc"], "layer"].iloc[0])
    assistant = (rows["persona_kind"] == "assistant").to_numpy()
    on_axis = stored[:, layer].astype(float) @ units[layer]
    added = replies[replies["condition"] == "add 3"].iloc[0]
    assert added["layers"] == [layer]
    assert added["multiplier"] == pytest.approx(3 * (on_axis[assistant].mean() - on_axis[~assistant].mean()), rel=1e-4)
    floored = replies[replies["condition"] == "floor p95"].iloc[0]
    assert floored["layers"] == [1, 2]
    assert floored["thresholds"] == pytest.approx([np.percentile(stored[assistant, block] @ units[block], 95) for block in (1, 2)], abs=1e-3)


def test_summary_and_comparison_are_of_the_scores(intervened_session: Intervened) -> None:
    scores, summary = table(intervened_session, "intervention_scores"), table(intervened_session, "intervention_summary")
    means = scores.groupby("condition")[["likeness", "coherence"]].mean()
    for row in summary.itertuples():
        assert (row.likeness, row.coherence) == pytest.approx(tuple(means.loc[row.condition]))
        assert row.n == 10 and row.prompts == 5 and row.personas == 2
    comparison = table(intervened_session, "intervention_comparison")
    best = means["likeness"].drop("none").groupby(lambda name: name.split()[0]).max()
    wide = comparison.set_index("loss").iloc[-1]
    assert wide["floor"] <= max(best["floor"], means.loc["none", "likeness"]) + 1e-9
    assert (comparison["difference"] == comparison["floor"] - comparison["add"]).all()


def test_the_judge_never_saw_whom_it_judges(intervened_session: Intervened) -> None:
    from relseek_resources.storage import read_tensors

    arrays, header = read_tensors(intervened_session.files / "likeness_judge" / "m.safetensors")
    assert header["not_fitted_on"] == ", ".join(HOSTILE)
    quality = table(intervened_session, "likeness_quality")
    assert quality[quality["persona"] == "all"].set_index("metric")["n"].to_dict() == {
        "auc": len(arrays["heldout"]),
        "accuracy": len(arrays["heldout"]),
    }
    assert set(HOSTILE) <= set(quality["persona"])


def test_conversations_are_played_with_and_without_a_floor(intervened_session: Intervened) -> None:
    drift, trends = table(intervened_session, "drift"), table(intervened_session, "drift_trends")
    assert set(drift["condition"]) == {"none", "floor p50"}
    assert (drift.groupby(["conversation", "condition"])["turn"].max() == 2).all() and drift["conversation"].nunique() == 8
    assert drift["percentile"].dropna().between(0, 100).all()
    assert set(trends["condition"]) == {"none", "floor p50", "floor p50 − none"} and "all" in set(trends["kind"])


def test_the_page_shows_what_was_found(intervened_session: Intervened) -> None:
    with intervened_session.workspace() as workspace:
        page = workspace.path("report", None).read_text(encoding="utf-8")
    for words in (
        "likeness against coherence",
        "flooring against adding",
        "judge of likeness",
        "drift along conversations",
        "floor p95",
        "<h2>Drift</h2>",
    ):
        assert words in page


def test_a_second_run_computes_nothing_and_the_same_bytes_come_again(intervened: Intervened) -> None:
    assert stale(intervened) == set()
    before = intervened.stored()
    for name in ("intervention_replies", "intervention_scores", "drift"):
        (intervened.files / name / "m.parquet").unlink()
    done = intervened.command("run", "STUDY")
    assert done.exit_code == 0, done.output
    assert intervened.stored() == before


def test_what_is_changed_reaches_what_it_feeds(intervened: Intervened) -> None:
    intervened.edit("strengths = [1, 3]", "strengths = [1, 2]")
    assert stale(intervened) == REPLIES
    intervened.edit("strengths = [1, 2]", "strengths = [1, 3]")
    intervened.edit("Why do cats purr?", "Why does a cat purr?", f"behaviour/{FILES['intervention_prompts']}")
    assert stale(intervened) == REPLIES
    intervened.edit("Why does a cat purr?", "Why do cats purr?", f"behaviour/{FILES['intervention_prompts']}")
    intervened.edit("turns = 2", "turns = 1")
    assert stale(intervened) == {"drift", "drift_trends", "report"}


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"crime_boss"]', '"crime_bos"]', "interventions.personas: 'crime_bos' is no persona"),
        ('"crime_boss"]', '"assistant"]', "interventions.personas: 'assistant' is no persona of the kind 'other'"),
        ("layers = [1, 2]", "layers = [1, 4]", r"interventions.layers: \[4\] do not exist.*0 to 3"),
        ("layers = [1, 2]", "layers = [1, 1]", "interventions: layers holds \\[1\\] more than once"),
        ("percentiles = [50, 95]", "percentiles = [0.5]", "interventions.percentiles.0"),
        ("strengths = [1, 3]", "strengths = [-1]", "interventions.strengths.0"),
        ("strengths = [1, 3]", "strength = [1]", "interventions.strength: unknown key; did you mean 'strengths'"),
    ],
)
def test_a_faulty_setting_is_refused_by_its_key(intervened: Intervened, old: str, new: str, message: str) -> None:
    intervened.edit(old, new)
    with pytest.raises(StudyError, match=message):
        load_study(str(intervened.study_file))


def test_drift_needs_the_layers_of_its_floor(intervened: Intervened) -> None:
    text = intervened.study_file.read_text()
    start, end = text.index("[interventions]"), text.index("[drift]")
    intervened.study_file.write_text(text[:start] + text[end:])
    with pytest.raises(StudyError, match=r"drift: its floor works after the layers of \[interventions\]"):
        load_study(str(intervened.study_file))


def test_more_prompts_than_there_are_is_said(intervened: Intervened) -> None:
    intervened.edit("prompts = 5", "prompts = 60")
    done = intervened.command("run", "STUDY")
    assert done.exit_code == 1 and "interventions.prompts asks for 60 prompts and there are 40" in done.output
