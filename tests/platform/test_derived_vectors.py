"""Vectors leave a study and come into one, and a vector without another study's direction is swept and judged as a site: on tiny models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import load_file

CHECKOUT = Path(__file__).parents[2]
OTHER = """
[uses]
other = ["steering_vectors"]

[[derived]]
name = "without_sycophancy"
from = { sites = ["m:L02"] }
remove = { study = "other" }
"""
DERIVED = "m-without_sycophancy:L02"


def states(platform: Any, name: str) -> dict[str, str]:
    with platform.workspace() as workspace:
        return {str(partition): state.status for (asset, partition), state in workspace.states().items() if asset == name}


# --- out and in -------------------------------------------------------------------------------------------------------


def exported(platform: Any, form: str) -> Path:
    path = platform.folder / f"out.{form}"
    done = platform.command("vectors", "export", "STUDY", "m:L02", "--epoch", 3, "--format", form, "-o", path)
    assert done.exit_code == 0, done.output
    assert str(path) in done.output
    return path


@pytest.mark.parametrize("form", ["safetensors", "gguf", "pt"])
def test_a_vector_leaves_one_study_and_comes_into_another_to_the_bit(finished_session: Any, finished: Any, form: str) -> None:
    file = exported(finished_session, form)
    finished.edit("seed = 3", "seed = 4")  # another training
    vector = load_file(finished_session.files / "steering_vectors" / "m:L02" / "e03.safetensors")["vector"]
    done = finished.command("vectors", "import", "STUDY", file, "--site", "m:L02", "--epoch", 2)
    assert done.exit_code == 0, done.output
    np.testing.assert_array_equal(load_file(finished.files / "steering_vectors" / "m:L02" / "e02.safetensors")["vector"], vector)
    assert states(finished, "steering_vectors")["m:L02|e02"] == "imported"
    with finished.workspace() as workspace:
        planned = {task.asset.name: [str(key) for key in task.partitions] for task in workspace.plan(["steering_vectors"])}
    assert "m:L02|e02" not in planned["steering_vectors"]


def test_an_exported_vector_carries_its_whole_provenance(finished_session: Any) -> None:
    with safe_open(exported(finished_session, "safetensors"), framework="np") as file:
        header, vector = file.metadata(), file.get_tensor("vector")
    with finished_session.workspace() as workspace:
        version = workspace.lineage().version(workspace.stage.key("steering_vectors"), "m:L02|e03")
    assert (header["study"], header["site"], header["layer"], header["epoch"]) == ("tiny", "m:L02", "2", "3")
    assert (header["source"], header["data_version"], header["width"]) == ("trained", version, "32")
    assert header["model"] == str(finished_session.model)
    assert json.loads(header["settings"])["learning_rate"] == 0.01
    assert set(json.loads(header["input_versions"])) == {"training_run"}
    assert float(header["norm"]) == pytest.approx(float(np.linalg.norm(vector)))
    summary = finished_session.command("table", "STUDY", "vector_summary", "--format", "json").output
    row = next(row for row in json.loads(summary) if (row["site"], row["epoch"]) == ("m:L02", 3))
    assert header["vector_sha256"] == row["sha256"]


def test_an_exported_control_vector_names_the_model_type_and_the_block(finished_session: Any) -> None:
    reader = gguf.GGUFReader(exported(finished_session, "gguf"))
    assert [tensor.name for tensor in reader.tensors] == ["direction.2"]
    assert reader.fields["controlvector.model_hint"].contents() == "llama"


def test_a_file_is_shown_with_width_norm_and_provenance(finished_session: Any) -> None:
    done = finished_session.command("vectors", "show", exported(finished_session, "gguf"))
    assert done.exit_code == 0, done.output
    for words in ("1 vector of width 32", "after block 2: norm", "study: tiny", "site: m:L02"):
        assert words in done.output


def test_a_vector_that_was_not_computed_is_not_exported(blank: Any) -> None:
    done = blank.command("vectors", "export", "STUDY", "m:L02", "--epoch", 3, "-o", blank.folder / "v.pt")
    assert done.exit_code == 1
    assert "relseek run tiny --select steering_vectors" in done.output
    assert not (blank.folder / "v.pt").exists()
    unknown = blank.command("vectors", "export", "STUDY", "m:L09", "--epoch", 3, "-o", blank.folder / "v.pt")
    assert "its sites are m:L01, m:L02" in unknown.output


BAD = {
    "a vector for another block": ("control.gguf", "it steers block 1 and not block 2"),
    "integers": ("integers.pt", "has the type int64"),
    "another width": ("wide.pt", "needs (32,)"),
}


@pytest.mark.parametrize("fault", BAD)
def test_a_bad_vector_is_refused_and_changes_nothing(finished: Any, tmp_path: Path, fault: str) -> None:
    name, told = BAD[fault]
    writer = gguf.GGUFWriter(tmp_path / "control.gguf", "controlvector")
    writer.add_tensor("direction.1", np.ones(32, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    torch.save(torch.ones(32, dtype=torch.int64), tmp_path / "integers.pt")
    torch.save(torch.ones(33), tmp_path / "wide.pt")
    with finished.untouched():
        done = finished.command("vectors", "import", "STUDY", tmp_path / name, "--site", "m:L02", "--epoch", 3)
    assert done.exit_code == 1
    assert str(tmp_path / name) in done.output
    assert told in done.output


# --- a vector without another study's direction -----------------------------------------------------------------------


@pytest.mark.slow
def test_a_vector_without_sycophancy_is_swept_judged_and_selected_beside_the_others(finished: Any) -> None:
    sycophancy = CHECKOUT / "relseek_assets" / "behaviours" / "sycophancy"
    other = finished.folder / "other.toml"
    text = finished.study_text().replace('name = "tiny"', 'name = "other"').replace(json.dumps(str(finished.behaviour)), json.dumps(str(sycophancy)))
    other.write_text(text.replace("layers = [1, 2]", "layers = [2]").replace("max_tokens = 150", "max_tokens = 180"))
    finished.study_file.write_text(finished.study_text().replace("\n[pairs]", f"{OTHER}\n[pairs]"))
    before = finished.stored()

    waiting = finished.command("run", "STUDY")
    assert waiting.exit_code == 0, waiting.output
    assert "needs other/steering_vectors m:L02|e03; `relseek run other` computes it" in waiting.output
    assert {status for key, status in states(finished, "generations").items() if key.startswith(DERIVED)} == {"absent"}
    assert finished.command("run", other, "--select", "steering_vectors").exit_code == 0
    done = finished.command("run", "STUDY")
    assert done.exit_code == 0, done.output

    vector, origin, removed = (
        load_file(path)["vector"].astype(float)
        for path in (
            finished.files / "derived_vectors" / DERIVED / "e03.safetensors",
            finished.files / "steering_vectors" / "m:L02" / "e03.safetensors",
            finished.home / "store" / "other" / "steering_vectors" / "m:L02" / "e03.safetensors",
        )
    )
    assert abs(vector @ removed) < 1e-6 * np.linalg.norm(vector) * np.linalg.norm(removed)
    assert abs(origin @ removed) > 1e-3 * np.linalg.norm(origin) * np.linalg.norm(removed)

    for name in ("generations", "generation_metrics", "judge_scores"):
        assert {key: status for key, status in states(finished, name).items() if key.startswith(DERIVED)} == {
            f"{DERIVED}|e03@{dose}": "fresh" for dose in ("-1_0", "0_0", "1_0")
        }
    chosen = json.loads(finished.command("table", "STUDY", "selection", "--format", "json").output)
    assert {(row["site"], row["epoch"]) for row in chosen} == {(site, epoch) for site in ("m:L01", "m:L02") for epoch in (2, 3)} | {(DERIVED, 3)}
    after = finished.stored()
    kept = [name for name in before if name.startswith("tiny/") and name.split("/")[1] in ("training_run", "generations", "judge_scores")]
    assert kept
    assert {name: after[name] for name in kept} == {name: before[name] for name in kept}, "what was there is not computed again"

    assert finished.command("run", "STUDY", "--dry-run").output.count("everything is fresh") == 1
    other.write_text(other.read_text().replace("learning_rate = 0.01", "learning_rate = 0.02"))
    assert finished.command("run", other, "--select", "steering_vectors").exit_code == 0
    found = {name: states(finished, name) for name in ("derived_vectors", "generations")}
    assert found["derived_vectors"] == {f"{DERIVED}|e03": "stale"}
    assert {key.partition("|")[0] for key, status in found["generations"].items() if status == "stale"} == {DERIVED}
