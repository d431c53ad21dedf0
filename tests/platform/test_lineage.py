"""What becomes stale when something changes, what a run then computes, and what each partition says of its origin: in a real instance."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import dagster as dg
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from dagster._core.storage.tags import ASSET_PARTITION_RANGE_END_TAG, ASSET_PARTITION_RANGE_START_TAG
from safetensors.numpy import load_file

from relseek_assets import sources
from relseek_resources.models.loading import ModelError

FROM_THE_PAIRS = {"pair_strengths", "pair_slopes", "judge_biases"}
FROM_THE_SCORES = FROM_THE_PAIRS | {
    "judge_agreement",
    "agreement_sums",
    "site_agreement_sums",
    "study_agreement",
    "corrected_dose_response",
    "judge_scores",
    "judge_pairs",
    "dose_response",
    "candidate_items",
    "site_candidates",
    "selection",
    "selection_sensitivity",
    "report",
}
FROM_TRAINING = {
    "training_run",
    "training_metrics",
    "steering_vectors",
    "site_vector_summary",
    "vector_summary",
    "site_geometry",
    "vector_geometry",
    "generations",
    "generation_metrics",
    "sweep_summary",
} | FROM_THE_SCORES
RUBRIC_LINE = 'label = "Neutral service"'


def statuses(workspace: Any) -> dict[str, set[str]]:
    """Asset -> the statuses of its partitions."""
    found: dict[str, set[str]] = {}
    for (name, _), state in workspace.states().items():
        found.setdefault(name, set()).add(state.status)
    return found


def only_stale(workspace: Any) -> set[str]:
    """The assets that are stale, after making sure that they are so in every partition and that all others are fresh in every one."""
    found = statuses(workspace)
    assert all(len(values) == 1 for values in found.values()), found
    assert {status for values in found.values() for status in values} <= {"fresh", "stale"}
    return {name for name, values in found.items() if values == {"stale"}}


def events(workspace: Any) -> dict[tuple[str, str | None], Any]:
    """The latest materialisation record of every partition that a run makes."""
    lineage = workspace.lineage()
    return {
        (name, partition): lineage.record(workspace.stage.key(name), partition)
        for name, asset in workspace.catalogue.items()
        if not asset.made_by
        for partition in workspace.partitions(name)
    }


def event_ids(workspace: Any) -> dict[tuple[str, str | None], int]:
    return {node: record.storage_id for node, record in events(workspace).items()}


def tags(record: Any) -> dict[str, str]:
    return record.event_log_entry.asset_materialization.tags


def moved(before: dict[Any, int], after: dict[Any, int]) -> set[str]:
    """Assets of which some partition was materialised between two looks."""
    return {name for (name, partition), number in after.items() if before[name, partition] != number}


def test_a_finished_study_is_fresh_and_a_second_run_computes_nothing(finished: Any) -> None:
    with finished.workspace() as workspace:
        assert workspace.observe() == []
        assert {state.status for state in workspace.states().values()} == {"fresh"}
        before = event_ids(workspace)
    bytes_before = finished.stored()
    second = finished.command("run", "STUDY")
    assert second.exit_code == 0
    assert "nothing to compute" in second.output
    assert finished.stored() == bytes_before
    with finished.workspace() as workspace:
        assert event_ids(workspace) == before


@pytest.mark.slow
def test_one_line_of_the_rating_rubric_makes_the_judge_tables_and_what_follows_stale_and_nothing_else(finished: Any) -> None:
    finished.edit(RUBRIC_LINE, 'label = "Plain service"', "behaviour/rating_rubric.toml")
    with finished.workspace() as workspace:
        assert workspace.observe() == ["rating_rubric"]
        assert only_stale(workspace) == FROM_THE_SCORES

        lineage = workspace.lineage()
        for partition in workspace.partitions("judge_scores"):
            verdict = lineage.state(workspace.stage.key("judge_scores"), partition)
            assert verdict.status == "stale"
            assert "rating_rubric" in verdict.reason
        assert {task.asset.name for task in workspace.plan()} == FROM_THE_SCORES

        before = event_ids(workspace)
        workspace.run()
        after = event_ids(workspace)
        assert {state.status for state in workspace.states().values()} == {"fresh"}

    computed = moved(before, after)
    assert computed <= FROM_THE_SCORES
    assert {"judge_scores", "judge_pairs", "dose_response"} <= computed
    bands = {band for path in (finished.files / "judge_scores").rglob("*.parquet") for band in pq.read_table(path)["band"].to_pylist()}
    assert "Plain service" in bands
    assert "Neutral service" not in bands


def test_one_starter_conversation_makes_everything_after_the_pairs_stale(finished: Any) -> None:
    file = finished.behaviour / "conversations.jsonl"
    lines = file.read_text(encoding="utf-8").splitlines()
    first = json.loads(lines[0])
    first["turns"][0]["target"] += " I would like that."
    file.write_text("\n".join([json.dumps(first, ensure_ascii=False), *lines[1:], ""]), encoding="utf-8")
    with finished.workspace() as workspace:
        assert workspace.observe() == ["starter_conversations"]
        # the whole pipeline follows from the conversations, the embedded judge with it, because it is fitted on them
        assert only_stale(workspace) == set(workspace.catalogue) - {"served_models"}, "which nobody has deployed"
        reasons = {name: state.reason for (name, _), state in workspace.states().items()}
    readers = {name for name, reason in reasons.items() if "starter_conversations" in reason}
    assert readers == {"preference_pairs", "conversation_lengths"}


@pytest.mark.parametrize(
    ("file", "source", "follows"),
    [
        ("behaviour.toml", "behaviour_definition", {"report"}),
        (
            "pairwise.toml",
            "pairwise_definition",
            {"judge_pairs", "candidate_items", "site_candidates", "selection", "selection_sensitivity", "report"} | FROM_THE_PAIRS,
        ),
        ("coherence_rubric.toml", "coherence_rubric", FROM_THE_SCORES),
        ("few_shots.jsonl", "few_shots", {"embedded_judge", "judge_calibration", "judge_quality"} | FROM_THE_SCORES),
    ],
)
def test_a_behaviour_file_makes_stale_what_reads_it_and_what_follows(finished: Any, file: str, source: str, follows: set[str]) -> None:
    with (finished.behaviour / file).open("a", encoding="utf-8") as stream:
        stream.write("\n")
    with finished.workspace() as workspace:
        assert workspace.observe() == [source]
        assert only_stale(workspace) == follows


def test_a_training_setting_makes_the_vectors_and_what_follows_stale_but_no_judge_fit(finished: Any) -> None:
    finished.edit("learning_rate = 0.01", "learning_rate = 0.02")
    with finished.workspace() as workspace:
        assert workspace.observe() == []
        assert only_stale(workspace) == FROM_TRAINING
        verdict = workspace.lineage().state(workspace.stage.key("training_run"), "m:L01")
    assert "code version" in verdict.reason.lower()


OF_ALL_SITES = {"vector_summary", "vector_geometry", "coherence_calibration", "study_agreement", "selection", "selection_sensitivity", "report"}


def stored_column(platform: Any, name: str, column: str) -> set[Any]:
    """The values of a column in a table of one partition, as it lies in the store."""
    return set(pd.read_parquet(platform.files / name / "all.parquet")[column])


def test_a_layer_that_is_removed_or_put_back_makes_what_reads_all_sites_stale_and_nothing_else(finished: Any) -> None:
    removed = ("layers = [1, 2]", "layers = [1]")
    finished.edit(*removed)
    with finished.workspace() as workspace:
        assert only_stale(workspace) == OF_ALL_SITES
        assert workspace.states()["selection", None].reason == "has other upstream partitions (site_candidates)"
        workspace.run()
        assert only_stale(workspace) == set()
    assert stored_column(finished, "selection", "site") == stored_column(finished, "vector_summary", "site") == {"m:L01"}
    assert "m:L02" not in (finished.files / "report" / "all.html").read_text()

    finished.edit(*reversed(removed))
    with finished.workspace() as workspace:
        assert only_stale(workspace) == OF_ALL_SITES, "its partitions are older than what was made without them"
        before = event_ids(workspace)
        workspace.run()
        assert only_stale(workspace) == set()
        assert moved(before, event_ids(workspace)) <= OF_ALL_SITES, "nothing of the layer is computed again"
    assert stored_column(finished, "selection", "site") == stored_column(finished, "vector_summary", "site") == {"m:L01", "m:L02"}


def test_a_dose_that_is_removed_or_put_back_makes_what_reads_all_doses_stale(finished: Any) -> None:
    removed = ("generated = [-1.0, 0.0, 1.0]", "generated = [0.0, 1.0]")

    def doses() -> set[float]:
        return set(pd.concat([pd.read_parquet(path) for path in (finished.files / "dose_response").rglob("*.parquet")])["multiplier"])

    for edit, expected in ((removed, {0.0, 1.0}), (removed[::-1], {-1.0, 0.0, 1.0})):
        finished.edit(*edit)
        with finished.workspace() as workspace:
            states = workspace.states()
            stale = {name for (name, _), state in states.items() if state.status == "stale"}
            assert {"dose_response", "sweep_summary", "report"} <= stale
            assert not stale & {"steering_vectors", "generations", "generation_metrics", "judge_scores"}
            reasons = {state.reason for (name, _), state in states.items() if name in ("dose_response", "sweep_summary")}
            assert reasons == {"has other upstream partitions (judge_scores)", "has other upstream partitions (generation_metrics)"}
            workspace.run(["dose_response", "sweep_summary"])
            assert {state.status for state in workspace.states(["dose_response", "sweep_summary"]).values()} == {"fresh"}
        assert doses() == expected


SECOND_MODEL = """
[[models]]
name = "n"
source = {source}
device = "cpu"
layers = [1]
epochs_trained = {trained}
epochs_evaluated = {evaluated}
"""


def test_of_models_with_other_epochs_what_is_asked_for_counts_and_not_what_was(blank: Any) -> None:
    """Partitions have the epochs of all models, of which a model of fewer has not all; events of what it had once stay in the log."""
    text = blank.study_text()
    source = json.dumps(str(blank.model))

    def with_second(trained: int, evaluated: list[int]) -> None:
        blank.study_file.write_text(text + SECOND_MODEL.format(source=source, trained=trained, evaluated=evaluated))

    def record(workspace: Any, name: str) -> None:
        key = workspace.stage.key(name)
        for partition in workspace.partitions(name):
            lineage = workspace.lineage()
            inputs = lineage.input_tags(key, partition)
            workspace.instance.report_runless_asset_event(lineage.materialisation(key, partition, f"version of {partition}", inputs, {}))

    def status(workspace: Any, name: str) -> dict[str, str]:
        lineage = workspace.lineage()
        return {str(partition): lineage.state(workspace.stage.key(name), partition).status for partition in workspace.partitions(name)}

    with_second(3, [2, 3])
    with blank.workspace() as workspace:
        for name in ("steering_vectors", "candidate_items", "site_vector_summary", "site_candidates"):
            record(workspace, name)
        assert set(status(workspace, "site_candidates").values()) == {"fresh"}
    with_second(3, [2])
    with blank.workspace() as workspace:
        assert status(workspace, "site_candidates") == {"m:L01": "fresh", "m:L02": "fresh", "n:L01": "stale"}
    with_second(5, [2, 3])
    with blank.workspace() as workspace:
        found = status(workspace, "site_vector_summary")
        assert {found["m:L01"], found["m:L02"]} == {"fresh"}, "a model that is trained for longer is another's affair"


def test_every_partition_has_a_version_of_its_own_and_says_what_it_came_from(finished: Any) -> None:
    with finished.workspace() as workspace:
        found = events(workspace)
        for (name, partition), record in found.items():
            version = tags(record)["dagster/data_version"]
            assert tags(record)["dagster/code_version"] == workspace.graph.get(workspace.stage.key(name)).code_version
            assert len(version) == 16, (name, partition)
        for name in ("steering_vectors", "generations", "generation_metrics", "judge_scores", "judge_pairs", "dose_response"):
            versions = [tags(record)["dagster/data_version"] for (asset, _), record in found.items() if asset == name]
            assert len(set(versions)) == len(versions), f"partitions of {name} share versions"
        for (name, partition), record in found.items():
            if name != "generations":
                continue
            vector = found["steering_vectors", partition.partition("@")[0]]
            assert tags(record)["dagster/input_data_version/tiny/steering_vectors"] == tags(vector)["dagster/data_version"]
            assert tags(record)["dagster/input_event_pointer/tiny/steering_vectors"] == str(vector.storage_id)
            assert tags(record)["dagster/partition/site"] == partition.partition("|")[0]
        joined = tags(found["dose_response", "m:L01|e02"])
        doses = [found["judge_scores", f"m:L01|e02@{dose}"] for dose in ("-1_0", "0_0", "1_0")]
        assert joined["dagster/input_event_pointer/tiny/judge_scores"] == str(max(record.storage_id for record in doses))
        assert joined["dagster/input_data_version/tiny/judge_scores"] not in {tags(record)["dagster/data_version"] for record in doses}


def test_a_vector_of_an_epoch_is_that_epoch_of_its_training_run(finished_session: Any) -> None:
    run = load_file(finished_session.files / "training_run" / "m:L02.safetensors")["vectors"]
    summary = pq.read_table(finished_session.files / "vector_summary" / "all.parquet").to_pandas().set_index(["site", "epoch"])
    for epoch in (1, 2, 3):
        vector = load_file(finished_session.files / "steering_vectors" / "m:L02" / f"e{epoch:02d}.safetensors")["vector"]
        np.testing.assert_array_equal(vector, run[epoch - 1])
        assert summary.loc[("m:L02", epoch), "sha256"] == hashlib.sha256(vector.tobytes()).hexdigest()


@pytest.mark.slow
def test_recomputing_one_partition_leaves_its_siblings_alone(finished: Any) -> None:
    gone = ("generations", "m:L02|e03@1_0")
    with finished.workspace() as workspace:
        before = event_ids(workspace)
        workspace.path(*gone).unlink()
        states = workspace.states()
        assert (states[gone].status, states[gone].reason) == ("missing", "its file is gone from the store")
        assert all(state.status == "fresh" for (name, partition), state in states.items() if name == "generations" and partition != gone[1])
        assert states["judge_scores", "m:L02|e03@1_0"].status == "stale"
        assert states["judge_scores", "m:L02|e03@0_0"].status == "fresh"

        assert workspace.run(["generations"]) == 1
        after = event_ids(workspace)
        states = workspace.states()
    assert {node for node, number in after.items() if before[node] != number} == {gone}
    assert {node for node, state in states.items() if node[0] == "generations" and state.status != "fresh"} == set()
    touched = {node for node, state in states.items() if state.status == "stale" and node[0] == "generation_metrics"}
    assert touched <= {("generation_metrics", gone[1])}


@pytest.mark.slow
def test_the_same_selection_gives_the_same_bytes_and_versions_again(finished: Any) -> None:
    with finished.workspace() as workspace:
        nodes = [(name, partition) for name in ("training_run", "generations") for partition in workspace.partitions(name)]
        before = {node: (workspace.lineage().version(workspace.stage.key(node[0]), node[1]), workspace.path(*node).read_bytes()) for node in nodes}
        ids = event_ids(workspace)
        for node in nodes:
            workspace.path(*node).unlink()
        assert workspace.run() == len(nodes), "nothing downstream is computed again where the new version is the old one"
        again = {node: (workspace.lineage().version(workspace.stage.key(node[0]), node[1]), workspace.path(*node).read_bytes()) for node in nodes}
        assert moved(ids, event_ids(workspace)) == {"training_run", "generations"}
        assert {state.status for state in workspace.states().values()} == {"fresh"}
    for node in nodes:
        assert again[node] == before[node], node


def test_a_file_taken_from_the_store_is_missing_again_and_what_reads_it_waits(finished: Any) -> None:
    with finished.workspace() as workspace:
        workspace.path("embedded_judge", None).unlink()
        states = workspace.states()
        assert states["embedded_judge", None].status == "missing"
        stale = {name for (name, _), state in states.items() if state.status == "stale"}
        assert stale == {"judge_calibration", "judge_quality"} | FROM_THE_SCORES
        assert all(state.reason == "waits for embedded_judge" for (name, _), state in states.items() if name == "judge_scores")


@pytest.mark.slow
def test_a_run_started_from_the_ui_over_several_assets_records_versions_and_skips_nothing(finished: Any) -> None:
    """The UI runs a range of partitions of several assets in one run, with tags for the range's ends."""
    names = ("generations", "generation_metrics", "judge_scores")
    with finished.workspace() as workspace:
        inside = [partition for partition in workspace.partitions("generations") if partition.startswith("m:L01|")]
        before = event_ids(workspace)
        keys = {workspace.stage.key(name) for name in names}
        job = workspace.definitions.resolve_implicit_global_asset_job_def().get_subset(asset_selection=keys)
        ends = {ASSET_PARTITION_RANGE_START_TAG: str(inside[0]), ASSET_PARTITION_RANGE_END_TAG: str(inside[-1])}
        result = job.execute_in_process(instance=workspace.instance, tags=ends, raise_on_error=True)
        assert result.success
        after = events(workspace)
        for name in names:
            for partition in workspace.partitions(name):
                record = after[name, partition]
                if partition in inside:
                    assert record.run_id == result.run_id, (name, partition)
                else:
                    assert record.storage_id == before[name, partition], (name, partition)
            recorded = workspace.instance.fetch_materializations(
                dg.AssetRecordsFilter(workspace.stage.key(name), after_storage_id=max(before.values())), limit=100
            )
            assert sorted(record.partition_key for record in recorded.records) == sorted(inside), "one event a partition, and none besides"
        for partition in inside:
            made = after["generations", partition]
            read = tags(after["generation_metrics", partition])
            assert read["dagster/input_event_pointer/tiny/generations"] == str(made.storage_id)
            assert read["dagster/input_data_version/tiny/generations"] == tags(made)["dagster/data_version"]
        states = workspace.states(["judge_scores"])
        assert {states[name, partition].status for name in names for partition in inside} == {"fresh"}


def unreachable(source: str) -> str:
    raise ModelError(f"model {source} is not in the local cache")


def test_a_model_that_cannot_be_looked_at_is_what_it_was_when_it_was_seen_last(finished: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "fingerprint", unreachable)
    with finished.workspace() as workspace:
        assert workspace.observe() == []
        assert {state.status for (name, _), state in workspace.states().items() if name != "served_models"} == {"fresh"}


def test_nothing_is_computed_with_a_model_that_was_never_seen(blank: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "fingerprint", unreachable)
    with blank.workspace() as workspace:
        workspace.observe()
        assert workspace.run(["conversation_lengths"]), "which reads no model"
        with pytest.raises(ModelError, match="not in the local cache"):
            workspace.run(["training_run"])
        assert {state.status for (name, _), state in workspace.states().items() if name == "training_run"} == {"missing"}
