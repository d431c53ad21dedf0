"""Directions beside one another: the arithmetic against closed forms, and derived vectors and cosines as assets of two studies in one store."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import dagster as dg
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from relseek_assets.exchange import export_vector
from relseek_assets.import_fields import ExchangeError
from relseek_assets.imports import import_scores, import_vector
from relseek_assets.planning import Workspace
from relseek_assets.serve import gathered
from relseek_assets.stage import Store
from relseek_assets.steer import of_study
from relseek_assets.study import StudyError, load_study
from relseek_assets.vectors.geometry import GeometryError, Named, compared, every_pair, without
from relseek_resources.models import CappedModel, SteeredModel
from relseek_resources.serving.vectors import Configuration, Vectors
from relseek_resources.storage import read_table, read_tensors, write_tensors
from relseek_resources.vector_files import read_vectors

CHECKOUT = Path(__file__).parents[2]
WIDTH = 16

# --- arithmetic -------------------------------------------------------------------------------------------------------


@given(st.integers(0, 10**6), st.integers(2, 5000), st.floats(0.01, 100), st.booleans())
def test_what_is_left_is_orthogonal_to_what_was_removed(seed: int, width: int, scale: float, rescale: bool) -> None:
    draw = np.random.default_rng(seed)
    vector, direction = draw.normal(size=width).astype(np.float32), (scale * draw.normal(size=width)).astype(np.float32)
    cosine = abs(vector @ direction) / np.linalg.norm(vector) / np.linalg.norm(direction)
    if cosine > 0.999:
        return
    rest = without(vector, direction, rescale).astype(float)
    assert abs(rest @ direction) / np.linalg.norm(rest) / np.linalg.norm(direction) < 1e-6
    # by Pythagoras, of a vector of length one sqrt(1 - cos²) is left
    left = 1.0 if rescale else np.sqrt(1 - cosine**2)
    assert np.linalg.norm(rest) == pytest.approx(np.linalg.norm(vector) * left, rel=1e-3)


def test_removing_takes_out_the_projection_and_nothing_else() -> None:
    np.testing.assert_allclose(without(np.array([3.0, 4.0, 5.0]), np.array([0.0, 7.0, 0.0])), [3, 0, 5])
    np.testing.assert_allclose(without(np.array([3.0, 4.0, 0.0]), np.array([0.0, -1.0, 0.0]), rescale=True), [5, 0, 0])


def test_an_orthogonal_direction_changes_nothing() -> None:
    np.testing.assert_array_equal(without(np.array([3.0, 0.0]), np.array([0.0, 2.0])), np.array([3, 0], np.float32))


@pytest.mark.parametrize(
    ("vector", "direction", "told"),
    [
        (np.ones(3), np.ones(4), "both must be of one model"),
        (np.ones(3), np.zeros(3), "no length"),
        (np.ones(3), -2 * np.ones(3), "nothing is left"),
    ],
)
def test_a_removal_that_means_nothing_is_refused(vector: np.ndarray, direction: np.ndarray, told: str) -> None:
    with pytest.raises(GeometryError, match=told):
        without(vector, direction)


def named(site: str, *values: float, model: str = "m", step: str = "e01") -> Named:
    return Named("s", "bipo", site, step, model, np.array(values, np.float32))


def test_vectors_of_different_models_or_widths_are_not_compared() -> None:
    vectors = [named("a:L01", 1, 0), named("a:L02", 1, 1), named("b:L01", 1, 1, model="other"), named("c:L01", 1, 1, 0)]
    found = compared("vectors", every_pair(vectors))
    assert found[["site_a", "site_b", "layer_a", "layer_b"]].to_numpy().tolist() == [["a:L01", "a:L02", 1, 2]]
    assert found["cosine"].item() == pytest.approx(np.cos(np.pi / 4))


def test_a_vector_without_length_has_no_cosine() -> None:
    assert compared("vectors", every_pair([named("a:L01", 0, 0), named("a:L02", 1, 1)]))["cosine"].isna().all()


# --- assets -----------------------------------------------------------------------------------------------------------

STUDY = """
name = "{name}"
kind = "bipo"
behaviours = ["{behaviour}"]

[published]
vectors = true

[[models]]
name = "{model}"
source = "someone/Tiny-Model"
width = 16
layers = {layers}
epochs_trained = {epochs}
epochs_evaluated = [1]
"""
WARM = STUDY.format(name="warm", behaviour="relationship_seeking", model="m", layers="[1, 2]", epochs=2)
FLATTERY = STUDY.format(name="flattery", behaviour="sycophancy", model="mine", layers="[1, 2]", epochs=3)
USES = """
[uses]
flattery = ["steering_vectors"]

[[derived]]
name = "without_flattery"
from = { sites = ["m:L01"] }
remove = { study = "flattery", epoch = 1 }

[[derived]]
name = "same_length"
from = { sites = ["m:L02"], epoch = 1 }
remove = { study = "flattery", site = "mine:L01", epoch = 3 }
rescale = true
"""
PLAIN, SAME_LENGTH = "m-without_flattery:L01|e02", "m-same_length:L02|e01"


@dataclass(frozen=True)
class Two:
    """Two studies of one model in one Dagster home, their vectors in a release of their own."""

    folder: Path

    def vector(self, behaviour: str, layer: int, epoch: int) -> Path:
        folder = self.folder / "release" / "2-steering-vector-training" / "vector" / f"{behaviour}_Tiny-Model" / f"layer{layer}"
        folder.mkdir(parents=True, exist_ok=True)
        return folder / f"vec_ep{epoch}_layer{layer}_gpu0.pt"

    @contextlib.contextmanager
    def workspace(self, name: str) -> Iterator[Workspace]:
        with dg.DagsterInstance.from_config(str(self.folder / "home")) as instance:
            workspace = Workspace(load_study(str(self.folder / f"{name}.toml")), instance, store=Store(root=str(self.folder / "home" / "store")))
            workspace.observe()
            yield workspace

    def run(self, name: str, *select: str) -> int:
        with self.workspace(name) as workspace:
            return workspace.run(select)

    def stored(self, study: str, asset: str, partition: str) -> tuple[np.ndarray, dict[str, str]]:
        tensors, header = read_tensors(self.folder / "home" / "store" / study / asset / f"{partition.replace('|', '/')}.safetensors")
        return tensors["vector"].astype(float), header

    def table(self, asset: str) -> pd.DataFrame:
        with self.workspace("warm") as workspace:
            return read_table(workspace.path(asset, None), workspace.catalogue[asset].schema_of(None))

    def statuses(self, asset: str) -> dict[str, tuple[str, str]]:
        with self.workspace("warm") as workspace:
            return {str(partition): (state.status, state.reason) for (name, partition), state in workspace.states().items() if name == asset}


def save(path: Path, seed: int) -> None:
    torch.save(torch.from_numpy(np.random.default_rng(seed).normal(size=WIDTH).astype(np.float32)), path)


@pytest.fixture(scope="module")
def computed(tmp_path_factory: pytest.TempPathFactory) -> Two:
    """Both studies, run; copy them before changing anything."""
    two = Two(tmp_path_factory.mktemp("two"))
    (two.folder / "home").mkdir()
    shutil.copy(CHECKOUT / "dagster_home" / "dagster.yaml", two.folder / "home")
    (two.folder / "warm.toml").write_text(WARM + USES)
    (two.folder / "flattery.toml").write_text(FLATTERY)
    for number, behaviour in enumerate(("relationship-seeking", "sycophancy")):
        for layer in (1, 2):
            for epoch in range(1, 3 + number):
                save(two.vector(behaviour, layer, epoch), 100 * number + 10 * layer + epoch)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RELSEEK_RELEASE", str(two.folder / "release"))
        two.run("flattery")
        two.run("warm")
    return two


@pytest.fixture
def two(computed: Two, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Two:
    """Both studies, run, of the test's own."""
    folder = shutil.copytree(computed.folder, tmp_path / "two")
    monkeypatch.setenv("RELSEEK_RELEASE", str(folder / "release"))
    return Two(folder)


def cosine(first: np.ndarray, second: np.ndarray) -> float:
    return float(first @ second / np.linalg.norm(first) / np.linalg.norm(second))


def test_a_derived_vector_is_its_origin_without_the_other_studys_direction(two: Two) -> None:
    origin, _ = two.stored("warm", "steering_vectors", "m:L01|e02")
    removed, _ = two.stored("flattery", "steering_vectors", "mine:L01|e01")
    vector, header = two.stored("warm", "derived_vectors", PLAIN)
    assert abs(cosine(vector, removed)) < 1e-6
    assert abs(cosine(origin, removed)) > 0.01, "there was something to remove"
    np.testing.assert_allclose(vector + (origin @ removed) / (removed @ removed) * removed, origin, atol=1e-6)
    assert header["from"] == "warm/steering_vectors m:L01|e02"
    assert header["removed"] == "flattery/steering_vectors mine:L01|e01"
    assert (header["source"], header["site"], header["epoch"]) == ("derived", "m-without_flattery:L01", "2")
    for parent in ("from", "removed"):
        assert len(header[f"{parent}_sha256"]) == 64
        assert len(header[f"{parent}_version"]) == 16


def test_a_derived_vector_keeps_its_length_where_the_study_says_so(two: Two) -> None:
    origin, _ = two.stored("warm", "steering_vectors", "m:L02|e01")
    removed, _ = two.stored("flattery", "steering_vectors", "mine:L01|e03")
    vector, header = two.stored("warm", "derived_vectors", SAME_LENGTH)
    assert abs(cosine(vector, removed)) < 1e-6
    assert np.linalg.norm(vector) == pytest.approx(np.linalg.norm(origin), rel=1e-6)
    assert "old length kept" in header["made_by"]


def test_only_the_declared_epochs_of_derived_vectors_exist(two: Two) -> None:
    assert two.statuses("derived_vectors") == {PLAIN: ("fresh", ""), SAME_LENGTH: ("fresh", "")}


def test_a_derived_vector_is_stale_when_the_other_studys_vector_changes_and_only_then(two: Two) -> None:
    save(two.vector("sycophancy", 2, 3), 7)  # removed from nothing
    two.run("flattery")
    assert {status for status, _ in two.statuses("derived_vectors").values()} == {"fresh"}
    before = {key: two.stored("warm", "derived_vectors", key)[0] for key in (PLAIN, SAME_LENGTH)}

    save(two.vector("sycophancy", 1, 1), 8)
    assert two.statuses("derived_vectors")[PLAIN][0] == "fresh", "the other study has not computed it yet"
    two.run("flattery", "steering_vectors")
    found = two.statuses("derived_vectors")
    assert found[PLAIN][0] == "stale"
    assert "data version" in found[PLAIN][1] and "steering_vectors" in found[PLAIN][1]
    assert two.statuses("vector_geometry")["None"][0] == "stale"

    two.run("warm")
    removed, _ = two.stored("flattery", "steering_vectors", "mine:L01|e01")
    after = {key: two.stored("warm", "derived_vectors", key)[0] for key in before}
    assert abs(cosine(after[PLAIN], removed)) < 1e-6
    assert not np.array_equal(after[PLAIN], before[PLAIN])
    np.testing.assert_array_equal(after[SAME_LENGTH], before[SAME_LENGTH])
    assert {status for status, _ in two.statuses("derived_vectors").values()} == {"fresh"}


def test_a_derived_vector_is_stale_when_its_origin_or_its_declaration_changes(two: Two) -> None:
    save(two.vector("relationship-seeking", 1, 2), 9)
    with two.workspace("warm") as workspace:
        planned = {task.asset.name: [str(partition) for partition in task.partitions] for task in workspace.plan(["derived_vectors"])}
    assert planned == {"steering_vectors": ["m:L01|e02"], "derived_vectors": [PLAIN]}
    file = two.folder / "warm.toml"
    file.write_text(file.read_text().replace("rescale = true", "rescale = false"))
    assert two.statuses("derived_vectors")[SAME_LENGTH][0] == "stale"


def test_the_same_vector_computed_again_leaves_the_derived_one_fresh(two: Two) -> None:
    (two.folder / "home" / "store" / "flattery" / "steering_vectors" / "mine:L01" / "e01.safetensors").unlink()
    assert two.run("flattery", "steering_vectors") == 1
    assert {status for status, _ in two.statuses("derived_vectors").values()} == {"fresh"}


def test_without_the_other_study_a_derived_vector_waits_and_nothing_fails(two: Two) -> None:
    shutil.rmtree(two.folder / "home")
    (two.folder / "home").mkdir()
    shutil.copy(CHECKOUT / "dagster_home" / "dagster.yaml", two.folder / "home")
    with two.workspace("warm") as workspace:
        (line,) = workspace.unmet()
        assert line.startswith("derived_vectors: 2 partitions left out: needs flattery/steering_vectors mine:L01|e03; `relseek run flattery`")
        workspace.run()
    assert {status for status, _ in two.statuses("derived_vectors").values()} == {"absent"}
    two.run("flattery")
    assert {status for status, _ in two.statuses("derived_vectors").values()} == {"missing"}
    two.run("warm")
    assert {status for status, _ in two.statuses("derived_vectors").values()} == {"fresh"}
    assert set(two.table("vector_geometry")["kind_a"]) == {"bipo", "derived"}


def test_the_geometry_holds_epochs_sites_derived_vectors_and_the_other_study(two: Two) -> None:
    found = two.table("vector_geometry")
    assert found["relation"].value_counts().to_dict() == {
        "epochs": 2,  # e01 with e02, at two sites
        "vectors": 6 + 8,  # two sites and two derived vectors with each other; each of the four with the other study's two sites
    }
    vectors = {("warm", f"m:L0{layer}", f"e0{epoch}"): f"m:L0{layer}|e0{epoch}" for layer in (1, 2) for epoch in (1, 2)}
    for row in found[found["relation"] == "epochs"].itertuples():
        parents = [two.stored("warm", "steering_vectors", vectors["warm", row.site_a, step])[0] for step in (row.step_a, row.step_b)]
        assert row.cosine == pytest.approx(cosine(*parents), abs=1e-6)
    other = found[(found["study_b"] == "flattery") & (found["site_a"] == "m:L02")]
    assert {(row.step_a, row.site_b, row.step_b) for row in other.itertuples()} == {("e02", "mine:L01", "e03"), ("e02", "mine:L02", "e03")}
    origin = found[(found["site_a"] == "m:L01") & (found["site_b"] == "m-without_flattery:L01")].iloc[0]
    first, second = two.stored("warm", "steering_vectors", "m:L01|e02")[0], two.stored("warm", "derived_vectors", PLAIN)[0]
    assert origin["cosine"] == pytest.approx(cosine(first, second), abs=1e-6)
    assert origin["cosine"] > 0.5


# --- where a trained vector is taken, a derived one is too ------------------------------------------------------------

DERIVED = "m-without_flattery:L01"


@pytest.fixture
def stored(two: Two, monkeypatch: pytest.MonkeyPatch) -> Two:
    """Both studies, where the commands look for them."""
    monkeypatch.delenv("RELSEEK_STORE", raising=False)
    monkeypatch.setenv("DAGSTER_HOME", str(two.folder / "home"))
    return two


def test_a_derived_vector_is_steered_with(stored: Two) -> None:
    study = load_study(str(stored.folder / "warm.toml"))
    chosen = of_study(study, DERIVED, None, None, "response_mean")
    assert (list(chosen.vectors), chosen.read_at, chosen.model) == ([1], 1, study.models[0])
    np.testing.assert_array_equal(chosen.vectors[1], stored.stored("warm", "derived_vectors", PLAIN)[0])
    with pytest.raises(StudyError, match=r"m-without_flattery:L01, epoch 1 has not been computed \(there is e02\).*--select derived_vectors"):
        of_study(study, DERIVED, 1, None, "response_mean")
    with pytest.raises(StudyError, match="there is m:L01, m:L02, m-without_flattery:L01, m-same_length:L02"):
        of_study(study, "m:L03", None, None, "response_mean")


def test_a_derived_vector_is_served_and_recorded_as_no_partition_of_the_trained_ones(stored: Two) -> None:
    served = gathered(str(stored.folder / "warm.toml"), None, DERIVED, None, True, "response_mean", ())
    assert [vector.name for vector in served.vectors] == [
        f"{DERIVED}@e02",
        "m:L01@e01",
        "m:L01@e02",
        "m:L02@e01",
        "m:L02@e02",
        "m-same_length:L02@e01",
    ]
    assert [vector.partition for vector in served.vectors] == [None, "m:L01|e01", "m:L01|e02", "m:L02|e01", "m:L02|e02", None]
    registered = Vectors(Configuration.from_json(served.configuration()), 3, WIDTH).by_name[f"{DERIVED}@e02"]
    assert registered.home == (1,) and registered.sha256 == served.vectors[0].sha256


def test_a_derived_vector_caps(stored: Two, tiny_llama: SteeredModel) -> None:
    wide = {"vector": np.ones(64, np.float32)}  # as wide as the model that is here
    write_tensors(stored.folder / "home" / "store" / "warm" / "derived_vectors" / DERIVED / "e02.safetensors", wide, {"model": "someone/Tiny-Model"})
    capped = CappedModel.from_study("warm", DERIVED, side="ceiling", threshold=1.0, model=tiny_llama)
    assert capped.layers == (1,)


def test_a_derived_vector_leaves_the_study_with_its_provenance(stored: Two, tmp_path: Path) -> None:
    with stored.workspace("warm") as workspace:
        told = export_vector(workspace, DERIVED, 2, "safetensors", tmp_path / "v.safetensors")
        assert told.startswith(f"warm: derived_vectors {PLAIN}, norm")
        with pytest.raises(ExchangeError, match="m-without_flattery:L01 has the epoch 2 alone"):
            export_vector(workspace, DERIVED, 1, "safetensors", tmp_path / "w.safetensors")
        with pytest.raises(ExchangeError, match=r"v\.safetensors: m-without_flattery:L01 is made from m:L01.*import a vector for m:L01"):
            import_vector(workspace, tmp_path / "v.safetensors", DERIVED, 2)
        workspace.path("derived_vectors", "m-same_length:L02|e01").unlink()
        with pytest.raises(ExchangeError, match=r"derived_vectors m-same_length:L02\|e01 has not been.*--select derived_vectors"):
            export_vector(workspace, "m-same_length:L02", 1, "safetensors", tmp_path / "w.safetensors")
    left = read_vectors(tmp_path / "v.safetensors")
    np.testing.assert_array_equal(left.at(1, WIDTH), stored.stored("warm", "derived_vectors", PLAIN)[0])
    assert left.provenance["removed"] == "flattery/steering_vectors mine:L01|e01" and len(left.provenance["data_version"]) == 16
    parents = json.loads(left.provenance["input_versions"])
    assert parents.keys() == {"warm/steering_vectors m:L01|e02", "flattery/steering_vectors mine:L01|e01"} and len(set(parents.values())) == 2


# --- a persona axis ---------------------------------------------------------------------------------------------------

AXIS = """
name = "axis"
kind = "contrastive"
personas = "{personas}"

[[models]]
name = "small"
source = "someone/Tiny-Model"
"""
ALONG = """
[uses]
axis = ["directions"]

[[derived]]
name = "off_axis"
from = { sites = ["m:L02"] }
remove = { study = "axis", extraction = "last_token" }
"""


def record_directions(two: Two, seed: int) -> dict[str, np.ndarray]:
    """A contrastive study's directions of a three-block model, in the store and in Dagster as its own run records them."""
    arrays = {name: np.random.default_rng(seed + number).normal(size=(3, WIDTH)) for number, name in enumerate(("last_token", "response_mean"))}
    with two.workspace("axis") as workspace:
        version = write_tensors(workspace.path("directions", "small"), arrays, {})
        lineage, key = workspace.lineage(), workspace.stage.key("directions")
        event = lineage.materialisation(key, "small", version, lineage.input_tags(key, "small"), {})
        workspace.instance.report_runless_asset_event(event)
    return arrays


def test_a_study_of_directions_takes_no_scores_and_says_so(two: Two, tmp_path: Path) -> None:
    (two.folder / "axis.toml").write_text(AXIS.format(personas=load_study("persona_axes").personas))
    with two.workspace("axis") as workspace, pytest.raises(ExchangeError, match=r"scores\.csv: study axis has no judge_scores"):
        import_scores(workspace, tmp_path / "scores.csv")


def test_vectors_are_set_beside_a_persona_axis_layer_by_layer_and_taken_off_it(two: Two) -> None:
    personas = load_study("persona_axes").personas
    (two.folder / "axis.toml").write_text(AXIS.format(personas=personas))
    (two.folder / "warm.toml").write_text(WARM + ALONG)
    arrays = record_directions(two, 50)
    two.run("warm")
    vector, header = two.stored("warm", "derived_vectors", "m-off_axis:L02|e02")
    assert abs(cosine(vector, arrays["last_token"][2])) < 1e-6
    assert header["removed"] == "axis/directions small last_token layer 2"

    found = two.table("vector_geometry")
    along = found[found["relation"] == "axis"].set_index(["site_a", "step_b", "layer_b"])["cosine"]
    assert len(along) == 3 * 2 * 3, "two sites and a derived vector, two extractions, three layers"
    for site in ("m:L01", "m:L02"):
        mine = two.stored("warm", "steering_vectors", f"{site}|e02")[0]
        for extraction, layers in arrays.items():
            for layer, direction in enumerate(layers):
                assert along[site, extraction, layer] == pytest.approx(cosine(mine, direction), abs=1e-6)
    assert along["m-off_axis:L02", "last_token", 2] == pytest.approx(0, abs=1e-6)

    record_directions(two, 60)
    assert two.statuses("derived_vectors")["m-off_axis:L02|e02"][0] == "stale"


# --- what is declared -------------------------------------------------------------------------------------------------

FAULTS = {
    "a study that is not used": ('[uses]\nflattery = ["steering_vectors"]', "", "derived.0.remove.study: 'flattery' is not among the studies used"),
    "a study that is not there": ("flattery = [", "flatery = [", "uses.flatery: no study of this name"),
    "itself": ("flattery = [", "warm = [", "uses.warm: a study has its own assets"),
    "an asset of no use": ('"steering_vectors"', '"generations"', "uses.flattery.0"),
    "a site that it lacks": ('sites = ["m:L01"]', 'sites = ["m:L07"]', "derived.0.from.sites: ['m:L07'] are no sites of this study"),
    "an epoch that is not trained": ('sites = ["m:L01"] }', 'sites = ["m:L01"], epoch = 3 }', "made from epoch 3, which is not trained"),
    "one name twice": ('"same_length"', '"without_flattery"', "derived holds ['without_flattery'] more than once"),
    "a name of other characters": ('"same_length"', '"same length"', "derived.1.name: 'same length' becomes part of partition keys"),
    "an unknown key": ("rescale = true", "rescaled = true", "derived.1.rescaled: unknown key; did you mean 'rescale'?"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_derived_vector_that_cannot_be_is_refused_when_the_study_is_read(tmp_path: Path, fault: str) -> None:
    old, new, told = FAULTS[fault]
    text = WARM + USES
    assert text.count(old) == 1
    (tmp_path / "flattery.toml").write_text(FLATTERY)
    (tmp_path / "warm.toml").write_text(text.replace(old, new))
    with pytest.raises(StudyError) as caught:
        load_study(str(tmp_path / "warm.toml"))
    assert told in str(caught.value)


OTHERS_FAULTS = {
    "a site that the other lacks": (USES.replace('"mine:L01"', '"mine:L05"'), FLATTERY, "study flattery has no site mine:L05"),
    "an epoch that the other lacks": (USES.replace("epoch = 3", "epoch = 4"), FLATTERY, "study flattery trains 3 epochs; correct remove.epoch 4"),
    "another model": (USES, FLATTERY.replace("Tiny-Model", "Other-Model"), "vectors of two models do not mix"),
    "an asset that is not used": (USES.replace('"steering_vectors"', '"directions"'), FLATTERY, 'add "steering_vectors"'),
}


@pytest.mark.parametrize("fault", OTHERS_FAULTS)
def test_a_derived_vector_that_the_other_study_cannot_give_is_refused_when_the_graph_is_built(tmp_path: Path, fault: str) -> None:
    from relseek_assets.definitions import build_stage

    uses, other, told = OTHERS_FAULTS[fault]
    (tmp_path / "flattery.toml").write_text(other)
    (tmp_path / "warm.toml").write_text(WARM + uses)
    with pytest.raises(StudyError) as caught:
        build_stage(load_study(str(tmp_path / "warm.toml")))
    assert told in str(caught.value)
