"""Published checkpoints as assets: the release's numbers, and what happens where files are absent, arrive, change, vanish or are faulty."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import dagster as dg
import numpy as np
import pytest
import torch
from safetensors import safe_open

from relseek_assets.planning import PlanError, Workspace
from relseek_assets.stage import Store
from relseek_assets.study import Study, StudyError, load_study
from relseek_resources.release import Absent, Release
from relseek_resources.storage import read_table

CHECKOUT = Path(__file__).parents[2]
ROOT = os.environ.get("RELSEEK_RELEASE", "")
released = pytest.mark.skipif(not ROOT, reason="RELSEEK_RELEASE is not set")
ASSETS = ("vector_summary", "training_metrics")

STUDY = """
name = "echo"
kind = "bipo"
behaviours = ["relationship_seeking"]

[published]
vectors = true

[[models]]
name = "big"
source = "someone/Big-Model"
width = 4
layers = [1, 2]
epochs_trained = 3
epochs_evaluated = [3]
"""


@contextlib.contextmanager
def workspace_of(home: Path, study: Study) -> Iterator[Workspace]:
    home.mkdir(exist_ok=True)
    shutil.copy(CHECKOUT / "dagster_home" / "dagster.yaml", home)
    with dg.DagsterInstance.from_config(str(home)) as instance:
        yield Workspace(study, instance, store=Store(root=str(home / "store")))


def statuses(workspace: Workspace, name: str) -> dict[str, str]:
    return {str(partition): state.status for (asset, partition), state in workspace.states().items() if asset == name}


def planned(workspace: Workspace) -> dict[str, list[str]]:
    return {task.asset.name: [str(partition) for partition in task.partitions] for task in workspace.plan()}


# --- the release ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def kirk2025(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workspace]:
    """The vector assets of kirk2025, computed from the release."""
    with pytest.MonkeyPatch.context() as patch, workspace_of(tmp_path_factory.mktemp("kirk2025") / "home", load_study("kirk2025")) as workspace:
        patch.setenv("RELSEEK_RELEASE", ROOT)
        workspace.observe()
        workspace.run(ASSETS)
        yield workspace


@released
def test_the_norms_and_cosines_are_the_published_ones(kirk2025: Workspace) -> None:
    schema = kirk2025.catalogue["vector_summary"].schema_of(None)
    found = read_table(kirk2025.path("vector_summary", None), schema).set_index(["site", "epoch"])
    norms = {1: "2.80", 5: "4.54", 10: "5.419", 15: "5.82", 20: "5.90"}
    for epoch, norm in norms.items():
        assert f"{found.loc[('llama31-70b:L31', epoch), 'norm']:.{len(norm) - 2}f}" == norm
    assert f"{found.loc[('llama31-8b:L14', 20), 'norm']:.2f}" == "3.31"
    assert f"{found.loc[('llama31-70b:L31', 10), 'cosine_to_last']:.3f}" == "0.989"
    assert set(found["source"]) == {"published"}
    assert {site: set(part["width"]) for site, part in found.groupby("site")} == {"llama31-70b:L31": {8192}, "llama31-8b:L14": {4096}}


@released
def test_the_losses_and_margins_are_the_published_ones_and_accuracy_counts_by_the_sign(kirk2025: Workspace) -> None:
    site = "llama31-70b:L31"
    schema = kirk2025.catalogue["training_metrics"].schema_of(site)
    found = read_table(kirk2025.path("training_metrics", site), schema).set_index(["epoch", "direction"])
    assert len(found) == 40
    for epoch, direction, loss, margin in ((1, 1, ".0289", 5.23), (10, 1, ".0027", 14.67), (20, -1, ".00034", -16.29)):
        row = found.loc[(epoch, direction)]
        assert round(row["loss"], len(loss) - 1) == float(loss)
        assert row["margin"] == pytest.approx(margin, abs=0.005)
        assert row["margin"] == pytest.approx(row["reward_chosen"] - row["reward_rejected"], abs=1e-4)
    assert (found["accuracy"] == 1).all(), "every margin has the sign of its direction"
    assert found.groupby("direction")["published_accuracy"].mean().to_dict() == {-1: 0.0, 1: 1.0}
    assert (np.sign(found["margin"]) == found.index.get_level_values("direction")).all()


@released
def test_a_published_vector_says_where_it_comes_from(kirk2025: Workspace) -> None:
    path = kirk2025.path("steering_vectors", "llama31-70b:L31|e10")
    original = next(Path(ROOT).rglob("vec_ep10_layer31_gpu*.pt"))
    with safe_open(path, framework="np") as file:
        header, vector = file.metadata(), file.get_tensor("vector")
    np.testing.assert_array_equal(vector, torch.load(original, weights_only=True).numpy())
    assert (header["source"], header["release_file"]) == ("published", original.name)
    assert header["model"] == "meta-llama/Llama-3.1-70B-Instruct"


@released
def test_what_the_copy_lacks_is_absent_and_never_planned(kirk2025: Workspace) -> None:
    assert planned_of(kirk2025, ASSETS) == {}
    found = statuses(kirk2025, "steering_vectors")
    assert len(found) == 320
    here = {f"{site}|e{epoch:02d}" for site in ("llama31-70b:L31", "llama31-8b:L14") for epoch in range(1, 21)}
    assert {partition for partition, status in found.items() if status == "fresh"} == here
    assert {status for partition, status in found.items() if partition not in here} == {"absent"}
    assert sorted(statuses(kirk2025, "training_metrics").values()) == ["absent"] * 14 + ["fresh"] * 2


def planned_of(workspace: Workspace, names: tuple[str, ...]) -> dict[str, int]:
    return {task.asset.name: len(task.partitions) for task in workspace.plan(names)}


@released
def test_an_estimate_of_the_trial_asks_for_no_vector(kirk2025: Workspace) -> None:
    asked = planned_of(kirk2025, ("trial_contrasts",))
    assert asked["trial_contrasts"] == 43
    assert not {"steering_vectors", "training_metrics", "vector_summary"} & asked.keys()
    assert {name for name, _ in kirk2025.states(["trial_contrasts"])} <= {"trial_tables", "trial_forms", "trial_fits", "trial_contrasts"}


def test_nothing_of_kirk2025_can_load_or_look_for_a_model() -> None:
    """The base models need not be on the machine: no vector is trained, replies and scores are published ones, and no source watches weights."""
    from relseek_assets import sources
    from relseek_assets.definitions import build_stage

    stage = build_stage(load_study("kirk2025"))
    assert {"training_run", "generation_metrics", "embedded_judge", "coherence_judge", "rating_requests"}.isdisjoint(stage.catalogue)
    assert all(asset.definition.op.pool is None for asset in stage.catalogue.values())
    assert "base_models" not in {key.path[-1] for key in sources.keys(stage.study)}


# --- a release of one's own -------------------------------------------------------------------------------------------


def vector_path(root: Path, layer: int, epoch: int, rank: int = 3) -> Path:
    folder = root / "2-steering-vector-training" / "vector" / "relationship-seeking_Big-Model" / f"layer{layer}"
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"vec_ep{epoch}_layer{layer}_gpu{rank}.pt"


def save(path: Path, *values: float) -> None:
    torch.save(torch.tensor(values), path)


def evaluation(epoch: int, direction: int, margin: float, accuracy: float) -> dict[str, float]:
    side = "add" if direction == 1 else "sub"
    return {
        f"eval_test_dataset_{side}_loss": 0.3,
        "eval_rewards/chosen": margin / 2,
        "eval_rewards/rejected": -margin / 2,
        "eval_rewards/accuracies": accuracy,
        "eval_rewards/margins": margin,
        "eval_logps/chosen": -150.0,
        "eval_logps/rejected": -180.0,
        "eval_multiplier": float(direction),
        "epoch": float(epoch),
    }


def first_release(root: Path) -> None:
    """Epochs 1 and 3 of one of two sites, of different ranks."""
    save(vector_path(root, 1, 1), 3.0, 0.0, 4.0, 0.0)
    save(vector_path(root, 1, 3, rank=0), 0.0, 0.0, 2.0, 0.0)
    lines = [evaluation(1, 1, 2.0, 0.75), evaluation(1, -1, -1.0, 0.25)]
    (vector_path(root, 1, 1).parent / "evaluation_metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture(scope="module")
def computed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a release and its study, computed; copy it before changing anything."""
    folder = tmp_path_factory.mktemp("computed")
    first_release(folder / "release")
    (folder / "echo.toml").write_text(STUDY)
    with pytest.MonkeyPatch.context() as patch, workspace_of(folder / "home", load_study(str(folder / "echo.toml"))) as workspace:
        patch.setenv("RELSEEK_RELEASE", str(folder / "release"))
        assert workspace.observe() == ["published_vectors (2)", "published_evaluations (1)"]
        assert workspace.run() == 7
    return folder


@pytest.fixture
def release(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A release of the test's own."""
    root = tmp_path / "own" / "release"
    monkeypatch.setenv("RELSEEK_RELEASE", str(root))
    if not root.exists():
        first_release(root)
    return root


@pytest.fixture
def echo(tmp_path: Path, computed: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Workspace]:
    """The computed study of that release, of the test's own; ask for it before `release`."""
    folder = shutil.copytree(computed, tmp_path / "own")
    monkeypatch.setenv("RELSEEK_RELEASE", str(folder / "release"))
    with workspace_of(folder / "home", load_study(str(folder / "echo.toml"))) as workspace:
        yield workspace


def summary(workspace: Workspace) -> dict[tuple[str, int], tuple[float, float]]:
    frame = read_table(workspace.path("vector_summary", None), workspace.catalogue["vector_summary"].schema_of(None))
    return {(row.site, row.epoch): (row.norm, row.cosine_to_last) for row in frame.itertuples()}


def test_files_of_any_rank_are_read_and_the_rest_is_absent(echo: Workspace) -> None:
    assert summary(echo) == {("big:L01", 1): (5.0, pytest.approx(0.8)), ("big:L01", 3): (2.0, 1.0)}
    assert statuses(echo, "steering_vectors") == {
        "big:L01|e01": "fresh",
        "big:L01|e02": "absent",
        "big:L01|e03": "fresh",
        **{f"big:L02|e0{epoch}": "absent" for epoch in (1, 2, 3)},
    }
    assert statuses(echo, "site_vector_summary") == {"big:L01": "fresh", "big:L02": "absent"}
    assert statuses(echo, "training_metrics") == {"big:L01": "fresh", "big:L02": "absent"}
    assert planned(echo) == {}
    assert echo.observe() == []


def test_accuracy_at_the_negative_direction_is_turned_round(echo: Workspace) -> None:
    frame = read_table(echo.path("training_metrics", "big:L01"), echo.catalogue["training_metrics"].schema_of("big:L01"))
    rows = {row.direction: (row.accuracy, row.published_accuracy, row.margin) for row in frame.itertuples()}
    assert rows == {1: (0.75, 0.75, 2.0), -1: (0.75, 0.25, -1.0)}


def test_a_file_that_arrives_is_computed_with_what_follows(echo: Workspace, release: Path) -> None:
    save(vector_path(release, 2, 2), 1.0, 0.0, 0.0, 0.0)
    assert echo.observe() == ["published_vectors (1)"]
    assert planned(echo)["steering_vectors"] == ["big:L02|e02"]
    echo.run()
    assert summary(echo)["big:L02", 2] == (1.0, 1.0)
    assert set(statuses(echo, "vector_summary").values()) == {"fresh"}


def test_a_file_that_changes_makes_its_vector_stale_and_no_other(echo: Workspace, release: Path) -> None:
    save(vector_path(release, 1, 1), 6.0, 0.0, 8.0, 0.0)
    echo.observe()
    assert planned(echo)["steering_vectors"] == ["big:L01|e01"]
    echo.run()
    assert summary(echo)["big:L01", 1][0] == 10.0


def test_what_was_read_stays_when_its_file_is_taken_away(echo: Workspace, release: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = summary(echo)
    monkeypatch.delenv("RELSEEK_RELEASE")
    assert echo.observe() == ["published_vectors (2)", "published_evaluations (1)"]
    assert set(statuses(echo, "steering_vectors").values()) == {"absent"}
    assert planned(echo) == {}
    assert summary(echo) == before
    monkeypatch.setenv("RELSEEK_RELEASE", str(release))
    echo.observe()
    echo.run()
    assert statuses(echo, "steering_vectors")["big:L01|e01"] == "fresh"
    assert summary(echo) == before


def test_without_a_release_nothing_is_planned_and_nothing_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RELSEEK_RELEASE", raising=False)
    (tmp_path / "echo.toml").write_text(STUDY)
    with workspace_of(tmp_path / "home", load_study(str(tmp_path / "echo.toml"))) as workspace:
        assert workspace.observe() == []
        assert planned(workspace) == {}
        assert {state.status for state in workspace.states().values()} == {"absent"}
        assert workspace.run() == 0


def test_absent_partitions_that_the_ui_starts_are_passed_over(echo: Workspace) -> None:
    job = echo.definitions.resolve_implicit_global_asset_job_def().get_subset(asset_selection={echo.stage.key("steering_vectors")})
    ends = {"dagster/asset_partition_range_start": "big:L01|e01", "dagster/asset_partition_range_end": "big:L02|e03"}
    result = job.execute_in_process(instance=echo.instance, tags=ends, raise_on_error=True)
    made = echo.instance.get_records_for_run(result.run_id, of_type=dg.DagsterEventType.ASSET_MATERIALIZATION).records
    assert sorted(str(record.partition_key) for record in made) == ["big:L01|e01", "big:L01|e03"]


FAULTS = {
    "another width": (lambda path: save(path, 1.0, 2.0), ["shape (2,)", "needs (4,)"]),
    "integers": (lambda path: torch.save(torch.arange(4), path), ["has the type int64"]),
    "NaN": (lambda path: save(path, 1.0, float("nan"), 0.0, 0.0), ["1 NaN"]),
    "no tensor": (lambda path: path.write_text("nothing"), ["not a readable file of plain tensors"]),
    "a second rank's": (lambda path: save(path.with_name("vec_ep2_layer1_gpu5.pt"), 1.0, 2.0, 3.0, 4.0), ["vec_ep2_layer1_gpu3.pt", "several ranks"]),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_file_stops_the_run_by_name_and_costs_no_other_vector(echo: Workspace, release: Path, fault: str) -> None:
    make, told = FAULTS[fault]
    path = vector_path(release, 1, 2)
    save(path, 1.0, 0.0, 0.0, 0.0)
    make(path)
    echo.observe()
    with pytest.raises(PlanError) as caught:
        echo.run()
    for words in (str(path.parent), *told):
        assert words in str(caught.value)
    assert statuses(echo, "steering_vectors")["big:L01|e01"] == "fresh"


@pytest.mark.parametrize("line", ['{"epoch": 1}', '{"epoch": 1, "eval_multiplier": 2}', "[]"])
def test_a_faulty_line_of_metrics_is_named(release: Path, line: str) -> None:
    file = vector_path(release, 1, 1).parent / "evaluation_metrics.jsonl"
    file.write_text(file.read_text() + line + "\n")
    with pytest.raises(ValueError, match=rf"{file}, line 3: "):
        Release(release).training_evaluations("relationship-seeking", "Big-Model", 1)


def test_a_layer_without_metrics_is_absent_by_name(release: Path) -> None:
    with pytest.raises(Absent, match="layer9/evaluation_metrics.jsonl"):
        Release(release).training_evaluations("relationship-seeking", "Big-Model", 9)
    assert Release(release).vector_files("relationship-seeking", "Big-Model", 9) == {}
    assert Release(None).vector_files("relationship-seeking", "Big-Model", 1) == {}


# --- the study file ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("width = 4\n", "", "models.0.width: missing; someone/Big-Model is not on this machine"),
        ("[published]", "[training]\nbeta = 0.2\n\n[published]", "training: a study whose vectors are published trains and sweeps nothing"),
        ("[published]", "[doses]\ngenerated = [0.0, 1.0]\n\n[published]", "doses: a study whose vectors are published"),
        ("someone/Big-Model", "embedded:smollm2-135m-instruct", "width 4: embedded:smollm2-135m-instruct is 576 wide; drop width"),
        ("vectors = true", "vectorz = true", "published.vectorz: unknown key; did you mean 'vectors'?"),
    ],
)
def test_a_study_of_published_vectors_is_checked(tmp_path: Path, old: str, new: str, told: str) -> None:
    file = tmp_path / "echo.toml"
    assert STUDY.count(old) == 1
    file.write_text(STUDY.replace(old, new))
    with pytest.raises(StudyError) as caught:
        load_study(str(file))
    assert told in str(caught.value)
