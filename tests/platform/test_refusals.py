"""Bad input and bad disks: a clear error that names the file and the field, nothing written, and a good run afterwards."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import random
import resource
import shutil
import sqlite3
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import sqlalchemy
from safetensors.numpy import save_file

from relseek_assets.commands import disk_fault
from relseek_assets.exchange import read_asset
from relseek_assets.study import StudyError, load_study
from relseek_assets.sweeps.assets import sweep_items

WIDTH = 32  # of the tiny model's residual stream


def refused(platform: Any, *arguments: object) -> str:
    """The one message of a command that must fail without a traceback, on one line."""
    result = platform.command(*arguments)
    assert result.exit_code == 1, result.output
    assert isinstance(result.exception, SystemExit), f"a traceback instead of a message: {result.exception!r}"
    message = str(result.output)
    assert "Error: " in message
    return " ".join(message.split())


# --- vectors ----------------------------------------------------------------------------------------------------------


def vector_file(path: Path, values: np.ndarray, **more: np.ndarray) -> Path:
    save_file({"v": values.astype(np.float32), **more}, path)
    return path


def truncated(folder: Path) -> Path:
    path = vector_file(folder / "vector.safetensors", np.ones(WIDTH))
    path.write_bytes(path.read_bytes()[:-20])
    return path


BAD_VECTORS = {
    "truncated": (truncated, ["not a readable safetensors file", "truncated"]),
    "no safetensors at all": (lambda folder: _text(folder / "vector.safetensors", "a vector"), ["not a readable safetensors file"]),
    "NaN": (lambda folder: vector_file(folder / "vector.safetensors", np.where(np.arange(WIDTH) == 5, np.nan, 1)), ["1 NaN or infinite values"]),
    "infinite": (lambda folder: vector_file(folder / "vector.safetensors", np.where(np.arange(WIDTH) < 2, np.inf, 1)), ["2 NaN or infinite values"]),
    "another width": (lambda folder: vector_file(folder / "vector.safetensors", np.ones(WIDTH + 1)), ["(33,)", "(32,)"]),
    "two vectors": (
        lambda folder: vector_file(folder / "vector.safetensors", np.ones(WIDTH), w=np.ones(WIDTH, np.float32)),
        ["expected one tensor", "'v'", "'w'"],
    ),
}


def _text(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("fault", BAD_VECTORS)
def test_a_bad_vector_is_refused(finished: Any, tmp_path: Path, fault: str) -> None:
    make, told = BAD_VECTORS[fault]
    file = make(tmp_path)
    with finished.untouched():
        message = refused(finished, "import", "vector", "STUDY", file, "--site", "m:L01", "--epoch", 3)
    assert str(file) in message
    for words in told:
        assert words in message


@pytest.mark.parametrize(("site", "epoch", "told"), [("m:L09", 3, "its sites are m:L01, m:L02"), ("m:L01", 4, "no partition m:L01|e04")])
def test_a_vector_without_a_place_in_the_study_is_refused(finished: Any, tmp_path: Path, site: str, epoch: int, told: str) -> None:
    file = vector_file(tmp_path / "vector.safetensors", np.ones(WIDTH))
    with finished.untouched():
        message = refused(finished, "import", "vector", "STUDY", file, "--site", site, "--epoch", epoch)
    assert told in message
    assert "tiny.toml" in message


def test_a_truncated_vector_in_the_store_is_named_by_the_run_that_reads_it(finished: Any) -> None:
    file = finished.files / "training_run" / "m:L01.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-100])
    vectors = finished.files / "steering_vectors" / "m:L01" / "e01.safetensors"
    good = vectors.read_bytes()
    vectors.unlink()
    message = refused(finished, "run", "STUDY", "--select", "steering_vectors")
    assert str(file) in message
    assert not vectors.exists()
    file.write_bytes(whole)
    assert finished.command("run", "STUDY").exit_code == 0
    assert vectors.read_bytes() == good


# --- behaviours -------------------------------------------------------------------------------------------------------


def without_reply(row: dict[str, Any]) -> None:
    del row["turns"][0]["antitarget"]


def with_empty_reply(row: dict[str, Any]) -> None:
    row["turns"][0]["target"] = "  "


def of_unknown_type(row: dict[str, Any]) -> None:
    row["type"] = "3Z"


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (without_reply, "antitarget is missing"),
        (with_empty_reply, "target must be a text that is not empty"),
        (of_unknown_type, "type '3Z' is none of 1A"),
    ],
)
def test_a_conversation_that_is_no_pair_is_refused_and_the_mended_file_is_the_one_that_was_there(finished: Any, spoil: Any, told: str) -> None:
    file = finished.behaviour / "conversations.jsonl"
    whole = file.read_text(encoding="utf-8")
    lines = whole.splitlines()
    row = json.loads(lines[2])
    spoil(row)
    file.write_text("\n".join([*lines[:2], json.dumps(row), *lines[3:], ""]), encoding="utf-8")
    with finished.untouched():
        message = refused(finished, "run", "STUDY", "--select", "preference_pairs")
    assert f"{file}, line 3" in message
    assert told in message
    file.write_text(whole, encoding="utf-8")
    mended = finished.command("run", "STUDY")
    assert mended.exit_code == 0
    assert "nothing to compute" in mended.output


def test_a_rubric_whose_bands_leave_the_scale_is_refused(finished: Any) -> None:
    finished.edit("scale_max = 10", "scale_max = 12", "behaviour/rating_rubric.toml")
    with finished.untouched():
        message = refused(finished, "run", "STUDY", "--select", "judge_scores")
    assert "rating_rubric.toml" in message
    assert "six bands" in message


# --- study files ------------------------------------------------------------------------------------------------------

BAD_STUDIES = {
    "a dose twice": ("generated = [-1.0, 0.0, 1.0]", "generated = [-1.0, 0.0, 0.0, 1.0]", ["doses", "generated holds [0.0] more than once"]),
    "a dose twice in other words": ("generated = [-1.0, 0.0, 1.0]", "generated = [-1.0, 0.0, 1, 1.0]", ["doses", "more than once"]),
    "a dose beyond the limit": ("seed = 3", "seed = 3\ndose_limit = 0.5", ["doses.generated", "[-1.0, 1.0]", "dose_limit 0.5"]),
    "a dose that no key can hold": ("generated = [-1.0, 0.0, 1.0]", "generated = [-1.0, 0.0, 0.123456]", ["doses", "[0.123456]", "four decimals"]),
    "an unknown key": ("learning_rate = 0.01", "lerning_rate = 0.01", ["training.lerning_rate", "did you mean 'learning_rate'?"]),
    "an unknown section": ("[sampling]", "[samplings]", ["samplings", "did you mean 'sampling'?"]),
    "an unknown key of a model": ('device = "cpu"', 'devise = "cpu"', ["models.0.devise", "did you mean 'device'?"]),
    "a layer that the model lacks": ("layers = [1, 2]", "layers = [1, 4]", ["models.0", "layers [4] do not exist", "blocks 0 to 3"]),
    "a layer twice": ("layers = [1, 2]", "layers = [2, 2]", ["models.0", "layers holds [2] more than once"]),
    "an epoch that is not trained": (
        "epochs_evaluated = [2, 3]",
        "epochs_evaluated = [2, 5]",
        ["models.0", "epochs_evaluated [5]", "3 epochs trained"],
    ),
    "a name that the UI cannot select": ('name = "m"', 'name = "m+1"', ["models.0", "'m+1'", "letters, digits"]),
    "a study name that is no key": ('name = "tiny"', 'name = "tiny-study"', ["name", "'tiny-study'"]),
    "a name that is not its file's": ('name = "tiny"', 'name = "small"', ["name", "'small'", "'tiny'"]),
    "a value of another type": ("seed = 3", 'seed = "three"', ["seed", "found 'three'"]),
    "a missing setting": ("epochs_trained = 3\n", "", ["models.0.epochs_trained", "missing; add it"]),
    "no TOML": ("[doses]", "[doses", ["not valid TOML"]),
}


@pytest.mark.parametrize("fault", BAD_STUDIES)
def test_a_bad_study_file_is_refused_by_file_and_key(blank: Any, fault: str) -> None:
    old, new, told = BAD_STUDIES[fault]
    load_study(str(blank.study_file))  # the file is good until it is spoiled
    blank.edit(old, new)
    with pytest.raises(StudyError) as error:
        load_study(str(blank.study_file))
    for words in (str(blank.study_file), *told):
        assert words in str(error.value)
    assert str(blank.study_file) in refused(blank, "run", "STUDY")
    assert blank.stored() == {}
    assert sorted(path.name for path in blank.home.iterdir()) == ["dagster.yaml"], "not even the instance is set up"


def test_a_study_file_tells_all_its_faults_at_once(blank: Any) -> None:
    blank.edit("learning_rate = 0.01", "lerning_rate = 0.01")
    blank.edit("count = 4", "count = -4")
    with pytest.raises(StudyError) as error:
        load_study(str(blank.study_file))
    assert len(str(error.value).splitlines()) == 2


def test_a_missing_behaviour_or_model_is_named(blank: Any) -> None:
    text = blank.study_text()
    blank.study_file.write_text(text.replace(str(blank.behaviour), "kindliness"))
    with pytest.raises(StudyError, match=r"'kindliness' has no folder .* relationship_seeking, sycophancy"):
        load_study(str(blank.study_file))
    blank.study_file.write_text(text.replace(str(blank.model), "/no/such/model"))
    with pytest.raises(StudyError, match=r"models\.0: source: model folder /no/such/model: no such folder"):
        load_study(str(blank.study_file))


# --- disks ------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def small_disk(folder: Path, megabytes: int) -> Iterator[None]:
    """A disk of its own at `folder`, or a skipped test where mounting is not allowed."""
    folder.mkdir(parents=True, exist_ok=True)
    if shutil.which("mount") is None or os.geteuid() != 0:
        pytest.skip("needs the right to mount")
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(folder)], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"needs the right to mount: {done.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.fixture
def on_small_disk(finished: Any) -> Iterator[Any]:
    """A finished study whose store is a disk of 16 MB."""
    store = finished.home / "store"
    aside = finished.home / "aside"
    store.rename(aside)
    with small_disk(store, 16):
        shutil.copytree(aside, store, dirs_exist_ok=True)
        yield finished


def test_a_full_disk_ends_the_run_with_a_message_and_space_lets_it_go_on(on_small_disk: Any) -> None:
    whole = on_small_disk.stored()
    (on_small_disk.files / "selection" / "all.parquet").unlink()
    (on_small_disk.files / "vector_summary" / "all.parquet").unlink()
    filler = on_small_disk.home / "store" / "filler"
    with contextlib.suppress(OSError), filler.open("wb", buffering=0) as stream:
        while stream.write(bytes(4096)):
            pass
    with on_small_disk.untouched():
        message = refused(on_small_disk, "run", "STUDY")
    assert "No space left on device" in message
    assert "RELSEEK_STORE" in message
    filler.unlink()
    assert on_small_disk.command("run", "STUDY").exit_code == 0
    assert on_small_disk.stored() == whole


def test_a_store_mounted_read_only_ends_the_run_with_a_message(on_small_disk: Any) -> None:
    whole = on_small_disk.stored()
    store = on_small_disk.home / "store"
    (on_small_disk.files / "selection" / "all.parquet").unlink()
    subprocess.run(["mount", "-o", "remount,ro", str(store)], check=True)
    with on_small_disk.untouched():
        message = refused(on_small_disk, "run", "STUDY", "--select", "selection")
    assert "Read-only file system" in message
    assert "RELSEEK_STORE" in message
    subprocess.run(["mount", "-o", "remount,rw", str(store)], check=True)
    assert on_small_disk.command("run", "STUDY").exit_code == 0
    assert on_small_disk.stored() == whole


def test_a_store_that_cannot_be_made_ends_the_run_with_a_message(blank: Any) -> None:
    """Where nothing may be mounted: a store under what is no folder. A change of rights does not stop root."""
    (blank.home / "store").write_text("a file")
    message = refused(blank, "run", "STUDY", "--select", "conversation_lengths")
    assert "cannot write here" in message
    assert "RELSEEK_STORE" in message
    (blank.home / "store").unlink()
    assert blank.command("run", "STUDY", "--select", "conversation_lengths").exit_code == 0
    assert (blank.files / "conversation_lengths" / "all.parquet").is_file()


def test_a_file_size_limit_leaves_the_partition_as_it_was(finished: Any, tmp_path: Path) -> None:
    """A limit on file size where no disk can be mounted: the instance's own files stay below it, the table does not."""
    with finished.workspace() as workspace:
        item = sorted(read_asset(workspace, "generations")["item"])[0]
    letters = random.Random(0)
    row = {"site": "m:L01", "epoch": 2, "multiplier": 1.0, "item": item}
    long = tmp_path / "long.jsonl"
    long.write_text(json.dumps({**row, "reply": letters.randbytes(12_000_000).hex()}) + "\n")
    limit = 8_000_000
    with finished.untouched():
        done = finished.process("import", "generations", "STUDY", long, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "File too large" in done.stderr
    assert "e02@1_0.parquet" in done.stderr
    short = tmp_path / "short.jsonl"
    short.write_text(json.dumps({**row, "reply": "Short."}) + "\n")
    assert finished.command("import", "generations", "STUDY", short).exit_code == 0


def test_an_import_that_the_disk_takes_half_of_changes_nothing(finished: Any, tmp_path: Path) -> None:
    """Of three partitions the second is above the limit on file size; the first was imported before."""
    with finished.workspace() as workspace:
        item = sorted(read_asset(workspace, "generations")["item"])[0]
    row = {"site": "m:L01", "epoch": 2, "item": item}
    earlier, file = tmp_path / "earlier.jsonl", tmp_path / "replies.jsonl"
    earlier.write_text(json.dumps({**row, "multiplier": -1.0, "reply": "Earlier."}) + "\n")
    assert finished.command("import", "generations", "STUDY", earlier).exit_code == 0
    replies = {-1.0: "Short.", 0.0: random.Random(0).randbytes(12_000_000).hex(), 1.0: "Short too."}
    file.write_text("".join(json.dumps({**row, "multiplier": dose, "reply": reply}) + "\n" for dose, reply in replies.items()))
    limit = 8_000_000
    with finished.untouched():
        done = finished.process("import", "generations", "STUDY", file, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "e02@0_0.parquet" in done.stderr and "File too large" in done.stderr
    with finished.workspace() as workspace:
        assert list(read_asset(workspace, "generations", ["m:L01|e02@-1_0"])["reply"]) == ["Earlier."]
    assert finished.command("import", "generations", "STUDY", file).exit_code == 0


# --- disks under Dagster's home ---------------------------------------------------------------------------------------


@pytest.fixture
def home_on_small_disk(finished: Any) -> Iterator[Any]:
    """A finished study whose Dagster home is a disk of 32 MB, its store elsewhere, and of which two tables are gone."""
    store, aside = finished.folder / "store", finished.folder / "aside"
    (finished.home / "store").rename(store)
    finished.home.rename(aside)
    with small_disk(finished.home, 32):
        shutil.copytree(aside, finished.home, dirs_exist_ok=True)
        (finished.home / "store").symlink_to(store)
        yield finished


def without_tables(platform: Any) -> dict[str, str]:
    """Take two tables of the store away, and return what there was."""
    whole = platform.stored()
    for name in ("selection", "vector_summary"):
        (platform.files / name / "all.parquet").unlink()
    return whole


@pytest.mark.parametrize("kilobytes", [0, 50, 300])
def test_a_full_disk_under_dagsters_home_ends_the_run_with_a_message(home_on_small_disk: Any, kilobytes: int) -> None:
    """Full from the first byte on, or as the run goes on."""
    home = home_on_small_disk.home
    whole = without_tables(home_on_small_disk)
    filler = home / "filler"
    with contextlib.suppress(OSError), filler.open("wb", buffering=0) as stream:
        while stream.write(bytes(4096)):
            pass
    os.truncate(filler, filler.stat().st_size - 1024 * kilobytes)
    message = refused(home_on_small_disk, "run", "STUDY")
    assert f"DAGSTER_HOME {home}" in message
    assert "free some space on its disk" in message
    filler.unlink()
    done = home_on_small_disk.command("run", "STUDY")
    assert done.exit_code == 0, done.output
    assert home_on_small_disk.stored() == whole


def test_a_home_mounted_read_only_ends_the_run_with_a_message(home_on_small_disk: Any) -> None:
    home = home_on_small_disk.home
    whole = without_tables(home_on_small_disk)
    subprocess.run(["mount", "-o", "remount,ro", str(home)], check=True)
    message = refused(home_on_small_disk, "run", "STUDY")
    assert f"DAGSTER_HOME {home}" in message
    assert "set DAGSTER_HOME to a copy of that folder which may be written" in message
    subprocess.run(["mount", "-o", "remount,rw", str(home)], check=True)
    assert home_on_small_disk.command("run", "STUDY").exit_code == 0
    assert home_on_small_disk.stored() == whole


@pytest.mark.parametrize("limit", [0, 16_384])
def test_an_event_log_at_the_limit_of_file_size_ends_the_run_with_a_message(finished: Any, limit: int) -> None:
    """Where no disk can be mounted."""
    whole = without_tables(finished)
    done = finished.process(
        "run", "STUDY", "--select", "vector_summary", preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    )
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "DAGSTER_HOME" in done.stderr and str(finished.home) in done.stderr
    assert "free some space on its disk" in done.stderr
    assert finished.command("run", "STUDY").exit_code == 0
    assert finished.stored() == whole


def test_only_a_disks_own_faults_are_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DAGSTER_HOME", "/homes/dagster")
    full, locks = sqlite3.OperationalError("database or disk is full"), "/homes/dagster/.locks"
    told = (
        full,
        sqlalchemy.exc.OperationalError("INSERT", {}, full),
        OSError(errno.ENOSPC, "No space left"),
        OSError(errno.EROFS, "Read-only", locks),
    )
    assert all("DAGSTER_HOME" in disk_fault(error) for error in told)
    elsewhere = OSError(errno.ENOSPC, "No space left", "/elsewhere/file")
    assert "/elsewhere/file" in disk_fault(elsewhere)
    bugs = (
        sqlite3.OperationalError("no such column: event"),
        PermissionError(errno.EACCES, "Permission denied", "/elsewhere/file"),
        FileNotFoundError(errno.ENOENT, "No such file", locks),
        ValueError("database or disk is full"),
    )
    assert [disk_fault(error) for error in bugs] == [""] * len(bugs)


# --- studies too small ------------------------------------------------------------------------------------------------


def keep_conversations(platform: Any, a_type: int, types: int) -> None:
    file = platform.behaviour / "conversations.jsonl"
    by_type: dict[str, list[str]] = {}
    for line in file.read_text(encoding="utf-8").splitlines():
        by_type.setdefault(json.loads(line)["type"], []).append(line)
    file.write_text("".join(f"{line}\n" for lines in list(by_type.values())[:types] for line in lines[:a_type]), encoding="utf-8")


def test_a_study_that_can_hold_no_conversation_out_says_what_to_write(blank: Any) -> None:
    keep_conversations(blank, a_type=1, types=8)
    message = refused(blank, "run", "STUDY", "--select", "preference_pairs")
    assert "study tiny: none of 8 conversations can be held out" in message
    assert "conversations.jsonl" in message


def test_a_study_that_holds_every_conversation_out_names_the_share(blank: Any) -> None:
    keep_conversations(blank, a_type=2, types=3)
    blank.edit("[pairs]\n", "[pairs]\nheldout_share = 0.9\n")
    message = refused(blank, "run", "STUDY", "--select", "preference_pairs")
    assert "study tiny: all 6 conversations are held out" in message
    assert "lower pairs.heldout_share (0.9)" in message


def test_a_sweep_without_a_prompt_short_enough_names_the_limit(blank: Any) -> None:
    assert blank.command("run", "STUDY", "--select", "preference_pairs").exit_code == 0
    with blank.workspace() as workspace:
        pairs = read_asset(workspace, "preference_pairs")
        short = workspace.study.model_copy(update={"prompts": workspace.study.prompts.model_copy(update={"max_words": 1})})
    with pytest.raises(StudyError, match=r"study tiny: none of the 8 held-out prompts has at most 1 words; raise prompts\.max_words"):
        sweep_items(SimpleNamespace(study=short, read_table=lambda name: pairs))
