"""A study of persona directions on a tiny model, from its files to its page: what it makes, what it reruns, what it says of what is absent."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from relseek_assets.exchange import read_asset
from relseek_assets.lineage import fan_ins_beyond
from relseek_assets.persona_set import FILES, PERSONAS
from tests.platform.conftest import CHECKOUT, Platform, _once, _session_folder

LAYERS, WIDTH, QUERIES = 4, 32, 25
STUDY = """
name = "tiny"
title = "A tiny axis"
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
max_new_tokens = 4
bootstrap = 100
"""
PROMISED = {"model", "extraction", "layer", "cohens_d", "accuracy_at_zero", "accuracy_at_midpoint", "auc", "n"}
DOWNSTREAM = {"persona_replies", "persona_activations", "directions", "direction_quality", "persona_geometry", "report"}


class Axis(Platform):
    """A platform whose study is contrastive and whose `behaviour` is a persona folder."""

    def study_text(self) -> str:
        return STUDY.format(personas=json.dumps(str(self.behaviour)), model=json.dumps(str(self.model)))

    def copy(self, folder: Path) -> Axis:
        return Axis(super().copy(folder).folder, self.model)._written()

    def _written(self) -> Axis:
        self.study_file.write_text(self.study_text())
        return self


def small_personas(folder: Path) -> None:
    """The shipped personas with every fourth query."""
    shutil.copytree(PERSONAS / "assistant", folder)
    path = folder / FILES["queries"]
    path.write_text("".join(path.read_text(encoding="utf-8").splitlines(keepends=True)[::4]), encoding="utf-8")


@pytest.fixture(scope="session")
def axis_session(tmp_path_factory: pytest.TempPathFactory, tiny_model_folder: Path) -> Axis:
    """The finished tiny study. Read it, or copy it before changing anything."""

    def make(folder: Path) -> None:
        axis = Axis(folder, tiny_model_folder)
        axis.home.mkdir(parents=True)
        shutil.copy(CHECKOUT / "dagster_home" / "dagster.yaml", axis.home)
        small_personas(axis.behaviour)
        done = axis._written().process("run", "STUDY")
        assert done.returncode == 0, done.stdout + done.stderr

    return Axis(_once(_session_folder(tmp_path_factory) / "axis", make), tiny_model_folder)


@pytest.fixture
def axis(axis_session: Axis, tmp_path: Path) -> Axis:
    return axis_session.copy(tmp_path / "platform")


def stale(platform: Any) -> set[str]:
    with platform.workspace() as workspace:
        workspace.observe()
        return {task.asset.name for task in workspace.plan()}


def test_a_second_run_computes_nothing(axis: Axis) -> None:
    with axis.workspace() as workspace:
        assert {state.status for state in workspace.states().values()} == {"fresh"}
    with axis.untouched():
        again = axis.command("run", "STUDY")
        assert again.exit_code == 0, again.output
        assert "everything is fresh, nothing to compute" in again.output


def test_every_query_has_its_replies_and_every_reply_its_activations(axis_session: Axis) -> None:
    with axis_session.workspace() as workspace:
        replies = read_asset(workspace, "persona_replies")
        activations, header = workspace_tensors(workspace, "persona_activations")
    assert len(replies) == QUERIES * 5
    assert replies["tokens"].between(1, 4).all()
    assert set(activations) == {"last_token", "response_mean"}
    assert {array.shape for array in activations.values()} == {(QUERIES * 5, LAYERS, WIDTH)}
    assert not np.allclose(activations["last_token"], activations["response_mean"])
    assert header["persona_replies_version"]


def workspace_tensors(workspace: Any, asset: str) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    from relseek_resources.storage import read_tensors

    return read_tensors(workspace.path(asset, "m"))


def test_directions_are_units_with_their_provenance(axis_session: Axis) -> None:
    with axis_session.workspace() as workspace:
        found, header = workspace_tensors(workspace, "directions")
    for extraction in ("last_token", "response_mean"):
        assert found[extraction].shape == (LAYERS, WIDTH)
        np.testing.assert_allclose(np.linalg.norm(found[extraction], axis=1), 1, rtol=1e-5)
        assert found[f"{extraction}_length"].shape == found[f"{extraction}_midpoint"].shape == (LAYERS,)
    assert header["points_to"] == "assistant"
    assert len(json.loads(header["queries_held_out"])) == 5
    assert {"model", "settings", "seed", "persona_activations_version"} <= header.keys()


def test_quality_has_the_promised_columns_and_every_split(axis_session: Axis) -> None:
    with axis_session.workspace() as workspace:
        quality, geometry = read_asset(workspace, "direction_quality"), read_asset(workspace, "persona_geometry")
        schema = workspace.catalogue["direction_quality"].schema_of("m")
    assert set(quality.columns) >= PROMISED
    assert schema.key == ("model", "split", "extraction", "evaluated_with", "layer")
    assert set(quality["split"]) == {"query", "persona", "both"}
    assert len(quality) == 3 * 3 * LAYERS
    inside = quality["auc"].between(quality["auc_lower"], quality["auc_upper"])
    assert inside[quality["auc"].notna()].all()
    assert len(geometry) == 2 * LAYERS * geometry["persona"].nunique()


def test_published_artifacts_that_are_not_here_are_absent_and_no_failure(axis_session: Axis) -> None:
    with axis_session.workspace() as workspace:
        assert read_asset(workspace, "published_direction_quality").empty
        assert read_asset(workspace, "published_intervention_scores").empty
        key = workspace.stage.key("published_direction_quality")
        for partition in workspace.partitions("published_direction_quality"):
            event = workspace.lineage().record(key, partition).event_log_entry.asset_materialization
            model, _, extraction = str(partition).partition(":")
            assert event.metadata["status"].value.startswith(f"absent: artifacts/evaluations/direction_eval_{model}_{extraction}.pt")
        page = workspace.path("report", None).read_text(encoding="utf-8")
    assert "Not there" in page
    assert "RELSEEK_RELEASE_AXES is not set" in page


def test_the_page_shows_every_split_and_points_nowhere(axis_session: Axis) -> None:
    with axis_session.workspace() as workspace:
        page = workspace.path("report", None).read_text(encoding="utf-8")
    for words in ("A tiny axis", "m: queries held out", "m: personas held out", "m: queries and personas held out", "personas along the axis"):
        assert words in page
    assert 'src="' not in page and "http-equiv" not in page
    assert not [link for link in page.split('href="')[1:] if not link.startswith("#")]


def test_a_query_that_is_reworded_reaches_the_page_and_nothing_beside_it(axis: Axis) -> None:
    axis.edit("What causes the tides?", "What makes the tides rise?", f"behaviour/{FILES['queries']}")
    assert stale(axis) == DOWNSTREAM


def test_what_directions_do_not_read_leaves_them_fresh(axis: Axis) -> None:
    axis.edit('label = "Plain assistant"', 'label = "Assistant"', f"behaviour/{FILES['likeness_rubric']}")
    axis.edit("Why do cats purr?", "Why does a cat purr?", f"behaviour/{FILES['intervention_prompts']}")
    assert not stale(axis) & DOWNSTREAM - {"report"}


@pytest.mark.slow
def test_more_draws_rerun_the_measures_alone(axis: Axis) -> None:
    axis.edit("bootstrap = 100", "bootstrap = 200")
    assert stale(axis) == {"direction_quality", "persona_geometry", "report"}
    done = axis.command("run", "STUDY", "--select", "direction_quality")
    assert "direction_quality: 1 partition" in done.output
    assert "persona_replies" not in done.output


@pytest.mark.slow
def test_replies_do_not_change_when_they_are_made_again(axis: Axis) -> None:
    before = {path: axis.stored()[path] for path in axis.stored() if "/persona_" in path or "/directions/" in path}
    for name in ("persona_replies", "persona_activations", "directions", "persona_geometry"):
        (axis.files / name / f"m.{'parquet' if name in ('persona_replies', 'persona_geometry') else 'safetensors'}").unlink()
    done = axis.command("run", "STUDY")
    assert done.exit_code == 0, done.output
    assert {path: axis.stored()[path] for path in before} == before


def test_no_partition_reads_more_than_dagster_follows(axis_session: Axis) -> None:
    with axis_session.workspace() as workspace:
        assert list(fan_ins_beyond(workspace.graph, workspace.instance, 99)) == []
