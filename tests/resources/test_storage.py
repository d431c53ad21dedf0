"""Files of the store come into being whole or not at all, hold what their schema declares, and are known by their content."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file
from scipy.stats import chisquare

from relseek_resources.storage import (
    Column,
    StorageError,
    TableSchema,
    check_finite,
    content_version,
    file_sha256,
    keyed_order,
    keyed_seed,
    read_jsonl,
    read_table,
    read_tensors,
    replace_atomically,
    replaced_folder,
    table_version,
    write_table,
    write_tensors,
    write_text,
)

ROOT = Path(__file__).parents[2]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def process(code: str, *arguments: object) -> subprocess.Popen[str]:
    """A Python process of its own, for what would end or cripple this one."""
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


def answer(code: str, *arguments: object) -> list[dict[str, str]]:
    """What a process printed, one JSON object a line."""
    running = process(code, *arguments)
    printed, complaints = running.communicate(timeout=60)
    assert running.returncode == 0, complaints
    return [json.loads(line) for line in printed.splitlines()]


# --- one way of coming into being -------------------------------------------------------------------------------------


def test_a_new_content_replaces_the_old_and_leaves_no_other_file(tmp_path):
    path = tmp_path / "made" / "on the way" / "notes.txt"
    for text in ("old", "new ✓"):
        write_text(path, text)
        assert path.read_text(encoding="utf-8") == text
    assert names(path.parent) == ["notes.txt"]
    assert path.stat().st_mode & 0o777 == 0o644


def test_a_reader_sees_the_old_content_until_the_new_one_is_whole(tmp_path):
    path = tmp_path / "notes.txt"
    write_text(path, "old")

    def write_in_two_goes(temporary: Path) -> None:
        temporary.write_text("ne")
        assert path.read_text() == "old"
        temporary.write_text("new")

    with path.open() as reader:
        replace_atomically(path, write_in_two_goes)
        assert reader.read() == "old", "a reader who opened the old file goes on reading it"
    assert path.read_text() == "new"


@pytest.mark.parametrize("failure", [ValueError("bad content"), KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_a_writer_that_fails_leaves_the_old_file_and_no_temporary_one(tmp_path, failure):
    path = tmp_path / "notes.txt"
    path.write_text("old")

    def fail_half_way(temporary: Path) -> None:
        temporary.write_text("half of the ne")
        raise failure

    with pytest.raises(StorageError if isinstance(failure, OSError) else type(failure)) as caught:
        replace_atomically(path, fail_half_way)
    assert path.read_text() == "old" and names(tmp_path) == ["notes.txt"]
    if isinstance(failure, OSError):
        assert str(path) in str(caught.value) and "No space left" in str(caught.value) and "RELSEEK_STORE" in str(caught.value)


def test_a_process_killed_in_the_middle_of_writing_leaves_the_old_content(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("old")
    writer = process(
        """
        import sys, time
        from pathlib import Path
        from relseek_resources.storage import replace_atomically

        def write(temporary):
            temporary.write_text("half of the ne")
            print("half", flush=True)
            time.sleep(60)

        replace_atomically(Path(sys.argv[1]), write)
        """,
        path,
    )
    assert writer.stdout.readline() == "half\n"
    writer.send_signal(signal.SIGKILL)
    assert writer.wait(30) == -signal.SIGKILL
    assert path.read_text() == "old"
    writer.communicate()
    write_text(path, "new")
    assert path.read_text() == "new"


WRITERS = """
    import json, os, sys
    from pathlib import Path
    import numpy as np, pandas as pd
    import safetensors.numpy
    from relseek_resources.storage import Column, StorageError, TableSchema, write_table, write_tensors, write_text

    noise = np.random.default_rng(0).normal(size=100_000)
    schema = TableSchema("noise", (Column("x", "number", "noise"),))
    writers = {
        "text": lambda path: write_text(path, str(noise.tolist())),
        "table": lambda path: write_table(path, pd.DataFrame({"x": noise}), schema),
        "tensors": lambda path: write_tensors(path, {"x": noise}, {}),
    }

    def try_all(folder):
        for name, write in writers.items():
            try:
                write(folder / name)
                outcome = "written"
            except BaseException as error:
                outcome = type(error).__name__ + ": " + str(error)
            print(json.dumps({"name": name, "outcome": outcome}), flush=True)
"""


def test_a_full_disk_is_a_storage_error_and_leaves_the_old_files_alone(tmp_path):
    for name in ("text", "table", "tensors"):
        (tmp_path / name).write_text("old")
    found = answer(
        WRITERS
        + """
    import resource
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))  # no file may grow beyond 50 kB
    try_all(Path(sys.argv[1]))
    """,
        tmp_path,
    )
    assert names(tmp_path) == ["table", "tensors", "text"]
    assert {path.read_text() for path in tmp_path.iterdir()} == {"old"}
    for row in found:
        assert row["outcome"].startswith("StorageError"), row
        assert str(tmp_path / row["name"]) in row["outcome"] and "space" in row["outcome"]
    assert len(found) == 3


def test_a_folder_that_may_not_be_written_is_a_storage_error_that_names_the_setting():
    # Root may write anywhere, so the process becomes somebody else; pytest's own folders are closed to others.
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o555)
    try:
        found = answer(
            WRITERS
            + """
    if os.geteuid() == 0:
        os.seteuid(65534)
    try_all(Path(sys.argv[1]))
    try_all(Path(sys.argv[1]) / "deeper")
    """,
            folder,
        )
        assert names(folder) == []
    finally:
        folder.chmod(0o755)
        shutil.rmtree(folder)
    assert len(found) == 6
    for row in found:
        assert row["outcome"].startswith(f"StorageError: {folder}") and "RELSEEK_STORE" in row["outcome"], row


# --- folders ----------------------------------------------------------------------------------------------------------


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    def be_interrupted() -> None:
        with replaced_folder(tmp_path / "model") as inner:
            (inner / "weights").write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        be_interrupted()
    assert names(tmp_path) == []
    with replaced_folder(tmp_path / "model") as inner:
        (inner / "weights").write_text("whole")
        assert not (tmp_path / "model").exists()
    assert names(tmp_path) == ["model"] and (tmp_path / "model" / "weights").read_text() == "whole"


def test_of_two_processes_that_make_the_same_folder_the_first_wins_and_nothing_is_left_over(tmp_path):
    with replaced_folder(tmp_path / "model") as late:
        (late / "weights").write_text("late")
        with replaced_folder(tmp_path / "model") as early:
            (early / "weights").write_text("early")
    assert names(tmp_path) == ["model"] and (tmp_path / "model" / "weights").read_text() == "early"


# --- what a table may hold --------------------------------------------------------------------------------------------

RATINGS = TableSchema(
    "ratings",
    (
        Column("item", "string", "the prompt's key"),
        Column("score", "number", "the judge's score", unit="points", low=0, high=10, nullable=True),
        Column("attempt", "integer", "which attempt", low=1),
        Column("rubric", "string", "what was rated", choices=("coherence", "relationship")),
        Column("valid", "boolean", "whether the answer could be read"),
        Column("raw", "json", "the judge's answer", nullable=True),
    ),
    key=("item", "attempt"),
)


def ratings(**columns: list[object]) -> pd.DataFrame:
    good: dict[str, list[object]] = {
        "item": ["a", "b", "c"],
        "score": [0.0, None, 10.0],
        "attempt": [1, 1, 2],
        "rubric": ["coherence", "relationship", "coherence"],
        "valid": [True, False, True],
        "raw": [{"z": [1, None], "é": "ü"}, None, "text"],
    }
    return pd.DataFrame({name: pd.Series(values, dtype=object) for name, values in {**good, **columns}.items()})


def test_a_table_comes_back_as_it_was_written(tmp_path):
    write_table(tmp_path / "r.parquet", ratings(), RATINGS)
    found = read_table(tmp_path / "r.parquet", RATINGS)
    assert list(found.columns) == list(RATINGS.names)
    assert found["raw"].tolist() == [{"z": [1, None], "é": "ü"}, None, "text"]
    assert found["attempt"].tolist() == [1, 1, 2] and found["valid"].tolist() == [True, False, True]
    assert np.array_equal(found["score"], [0.0, np.nan, 10.0], equal_nan=True)


@pytest.mark.parametrize("others", [[None], [3], [None, 2**62 + 3]])
def test_whole_numbers_keep_their_last_digit_beside_empty_cells(tmp_path, others):
    schema = TableSchema("seeds", (Column("row", "integer", "its place"), Column("seed", "integer", "of its draws", nullable=True)))
    seeds = [2**62 + 1, *others]
    frame = pd.DataFrame({"row": range(len(seeds)), "seed": pd.array(seeds, dtype="Int64")})
    path = tmp_path / "seeds.parquet"
    version = write_table(path, frame, schema)
    for _ in range(2):  # the second time from memory
        found = read_table(path, schema)
        assert [None if pd.isna(seed) else int(seed) for seed in found["seed"]] == seeds
    assert write_table(tmp_path / "again.parquet", found, schema) == version


def test_small_whole_numbers_beside_empty_cells_are_floats_with_nan(tmp_path):
    schema = TableSchema("tokens", (Column("tokens", "integer", "how many", nullable=True),))
    write_table(tmp_path / "tokens.parquet", pd.DataFrame({"tokens": [5, None]}), schema)
    found = read_table(tmp_path / "tokens.parquet", schema)["tokens"]
    assert found.dtype == float and found[0] == 5 and np.isnan(found[1])


def test_a_written_file_carries_its_columns_meanings_and_units(tmp_path):
    write_table(tmp_path / "r.parquet", ratings()[list(reversed(RATINGS.names))], RATINGS)
    schema = pq.read_schema(tmp_path / "r.parquet")
    assert schema.names == list(RATINGS.names)
    assert schema.field("score").metadata[b"unit"] == b"points" and schema.field("score").metadata[b"meaning"] == b"the judge's score"
    assert schema.field("score").nullable and not schema.field("attempt").nullable


@pytest.mark.parametrize(
    ("column", "values", "reason"),
    [
        ("item", ["a", None, "c"], "1 empty or NaN"),
        ("attempt", [1, float("nan"), 2], "1 empty or NaN"),
        ("valid", [True, pd.NA, pd.NA], "2 empty or NaN"),
        ("score", [0.0, 10.5, 1.0], "spans 0.0 to 10.5; it is declared for 0 to 10"),
        ("score", [-1.0, 1.0, 1.0], "spans -1.0 to 1.0"),
        ("attempt", [0, 1, 2], "spans 0 to 2; it is declared for 1"),
        ("score", [float("inf"), 1.0, 2.0], "infinite"),
        ("score", [float("-inf"), None, 2.0], "infinite"),
        ("rubric", ["coherence", "warmth", "coherence"], r"holds \['warmth'\]; it may hold \['coherence', 'relationship'\]"),
        ("item", ["a", 2, "c"], "declared as string"),
        ("score", ["high", 1.0, 2.0], "declared as number"),
        ("attempt", [1, 1.5, 2], "declared as integer"),
        ("attempt", [1, "2", 2], "declared as integer"),
        ("attempt", [True, 1, 2], "declared as integer"),
        ("score", [True, 1.0, 2.0], "declared as number"),
        ("valid", [1, 0, 1], "declared as boolean"),
        ("attempt", [1, 2**63, 2], "declared as integer"),
        ("raw", [{1, 2}, None, None], "declared as json"),
        ("raw", [{"score": [1.0, float("nan")]}, None, None], "declared as json: found NaN or infinity"),
        ("item", ["a", "half of a pair: \ud83d", "c"], "declared as string"),
        ("raw", ["half of a pair: \ud83d", None, None], "declared as json"),
    ],
)
def test_values_that_the_schema_does_not_allow_are_refused_and_nothing_is_written(tmp_path, column, values, reason):
    path = tmp_path / "r.parquet"
    with pytest.raises(StorageError, match=rf"{path}: column {column} of table ratings.*{reason}"):
        write_table(path, ratings(**{column: values}), RATINGS)
    assert names(tmp_path) == []


def test_a_nan_among_numpy_scalars_is_no_number_either(tmp_path):
    frame = ratings(score=[np.float32(1.0), np.float32("nan"), np.float32(2.0)])
    strict = TableSchema("ratings", tuple(Column("score", "number", "", low=0, high=10) if c.name == "score" else c for c in RATINGS.columns))
    with pytest.raises(StorageError, match="column score of table ratings has 1 empty or NaN"):
        write_table(tmp_path / "r.parquet", frame, strict)


@pytest.mark.parametrize(
    ("frame", "reason"),
    [
        (ratings().drop(columns="valid"), r"lacks the columns \['valid'\]"),
        (ratings().assign(colour="red"), r"has unknown columns \['colour'\]"),
        (ratings().rename(columns={"valid": "colour"}), r"lacks the columns \['valid'\] and has unknown columns \['colour'\]"),
    ],
)
def test_missing_and_unknown_columns_are_named(tmp_path, frame, reason):
    with pytest.raises(StorageError, match=rf"r\.parquet: table ratings.*{reason}"):
        write_table(tmp_path / "r.parquet", frame, RATINGS)


def test_two_rows_with_one_key_are_refused_and_the_key_is_shown(tmp_path):
    with pytest.raises(StorageError, match=r"r\.parquet: table ratings holds two rows with the key {'item': 'a', 'attempt': 1}"):
        write_table(tmp_path / "r.parquet", ratings(item=["a", "a", "a"]), RATINGS)
    write_table(tmp_path / "r.parquet", ratings(item=["a", "b", "a"]), RATINGS)  # attempts 1, 1, 2: no key twice


def test_a_schema_whose_key_is_no_column_is_refused():
    with pytest.raises(ValueError, match=r"schema ratings: the key names \['prompt'\]"):
        TableSchema("ratings", RATINGS.columns, key=("prompt",))


def test_a_table_that_is_refused_leaves_the_old_one(tmp_path):
    path = tmp_path / "r.parquet"
    version = write_table(path, ratings(), RATINGS)
    with pytest.raises(StorageError):
        write_table(path, ratings(score=[99.0, 1.0, 1.0]), RATINGS)
    assert table_version(pq.read_table(path)) == version and names(tmp_path) == ["r.parquet"]


def test_a_table_cut_short_anywhere_or_absent_is_refused_by_name(tmp_path):
    path = tmp_path / "r.parquet"
    write_table(path, ratings(), RATINGS)
    content = path.read_bytes()
    for length in (0, 1, 3, 4, 12, len(content) // 2, len(content) - 8, len(content) - 1):
        path.write_bytes(content[:length])
        with pytest.raises(StorageError, match=rf"{path}: not a readable parquet file.*materialise it again"):
            read_table(path, RATINGS)
    with pytest.raises(StorageError, match=r"none\.parquet: no such file; materialise"):
        read_table(tmp_path / "none.parquet", RATINGS)


# --- versions ---------------------------------------------------------------------------------------------------------

BASE = ratings()
CHANGES: dict[str, list[object]] = {
    "item": ["a", "b", "C"],
    "score": [0.0, None, np.nextafter(10.0, 0.0)],
    "attempt": [1, 2, 2],
    "rubric": ["relationship", "relationship", "coherence"],
    "valid": [True, True, True],
    "raw": [{"z": [1, None], "é": "u"}, None, "text"],
}


@pytest.mark.parametrize("column", CHANGES)
def test_a_tables_version_changes_with_any_value(tmp_path, column):
    version = write_table(tmp_path / "r.parquet", BASE, RATINGS)
    assert write_table(tmp_path / "r.parquet", ratings(**{column: CHANGES[column]}), RATINGS) != version
    assert write_table(tmp_path / "r.parquet", BASE, RATINGS) == version


def test_a_tables_version_tells_nothing_from_zero_and_from_empty_and_rows_from_their_order():
    def version(**columns: list[object]) -> str:
        return table_version(RATINGS.to_arrow(ratings(**columns), "here"))

    versions = [version(), version(score=[0.0, 0.0, 10.0]), version(score=[None, None, 10.0]), version(raw=[{"z": [1, None], "é": "ü"}, "", "text"])]
    reordered = table_version(RATINGS.to_arrow(ratings().iloc[::-1], "here"))
    shorter = table_version(RATINGS.to_arrow(ratings().iloc[:2], "here"))
    assert len({*versions, reordered, shorter}) == 6


def test_the_version_of_a_table_counts_neither_the_order_of_columns_nor_that_of_json_keys():
    frame = ratings(raw=[{"é": "ü", "z": [1, None]}, None, "text"])[list(reversed(RATINGS.names))]
    assert table_version(RATINGS.to_arrow(frame, "here")) == table_version(RATINGS.to_arrow(ratings(), "here"))


TEXT = st.text(st.characters(codec="utf-8"), max_size=6)
CELLS = {"number": st.floats(-1e6, 1e6), "integer": st.integers(-9, 9), "string": TEXT, "boolean": st.booleans()}
ROWS = st.lists(st.fixed_dictionaries({kind: st.none() | cells for kind, cells in CELLS.items()}), max_size=40)
ANY = TableSchema("any", tuple(Column(kind, kind, "", nullable=True) for kind in CELLS))


@settings(deadline=None, max_examples=30)
@given(ROWS, st.sampled_from(["none", "snappy", "gzip"]), st.sampled_from([1, 7, 1000]), st.booleans())
def test_a_tables_version_survives_any_compression_and_row_groups_of_its_file(rows, compression, group, dictionary):
    frame = pd.DataFrame({name: pd.Series([row[name] for row in rows], dtype=object) for name in ANY.names})
    with tempfile.TemporaryDirectory() as folder:
        version = write_table(Path(folder) / "ours.parquet", frame, ANY)
        table = pq.read_table(Path(folder) / "ours.parquet")
        pq.write_table(table, Path(folder) / "other.parquet", compression=compression, row_group_size=group, use_dictionary=dictionary)
        assert table_version(table) == version
        assert table_version(pq.read_table(Path(folder) / "other.parquet")) == version
    assert table_version(pa.concat_tables([table.slice(0, 3), table.slice(3)])) == version, "nor does it see how rows lie in memory"


def test_a_files_hash_is_its_sha256_and_an_absent_file_is_refused(tmp_path):
    (tmp_path / "f").write_bytes(b"abc")
    assert file_sha256(tmp_path / "f") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-2, appendix B.1
    with pytest.raises(StorageError, match="none: cannot be read"):
        file_sha256(tmp_path / "none")


def test_the_version_of_settings_ignores_the_order_of_keys_and_sees_every_value():
    assert content_version({"a": 1, "b": {"c": [1, 2], "d": None}}) == content_version({"b": {"d": None, "c": [1, 2]}, "a": 1})
    different = [{"a": 1}, {"a": 1.5}, {"a": "1"}, {"a": None}, {"a": True}, {"b": 1}, {"a": [1]}, {"a": 1, "b": None}]
    assert len({content_version(value) for value in different}) == len(different)


# --- JSON Lines -------------------------------------------------------------------------------------------------------


def test_a_cache_that_cannot_be_written_says_which_variable_moves_it(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError, match=r"model: cannot write here .*set RELSEEK_CACHE"), replaced_folder(tmp_path / "file" / "model"):
        pytest.fail("nothing should be asked for where nothing can be kept")


def test_json_lines_come_with_their_line_numbers_and_blank_lines_are_passed_over(tmp_path):
    (tmp_path / "f.jsonl").write_text('{"a": 1}\n\n  \n{"b": "é"}', encoding="utf-8")
    assert list(read_jsonl(tmp_path / "f.jsonl")) == [(1, {"a": 1}), (4, {"b": "é"})]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b'{"a": 1}\n{"a": \n', "line 2: not valid JSON"),
        (b'{"a": 1}\n\n[1]\n', "line 3: expected an object with fields, found list"),
        (b'{"a": "\xff"}', "not UTF-8"),
    ],
)
def test_a_line_that_is_no_object_is_refused_by_number(tmp_path, content, reason):
    (tmp_path / "f.jsonl").write_bytes(content)
    with pytest.raises(StorageError, match=rf"f\.jsonl.*{reason}"):
        list(read_jsonl(tmp_path / "f.jsonl"))


def test_an_absent_json_lines_file_is_refused_by_name(tmp_path):
    with pytest.raises(StorageError, match=r"none\.jsonl: cannot be read"):
        list(read_jsonl(tmp_path / "none.jsonl"))


# --- vectors ----------------------------------------------------------------------------------------------------------


def test_vectors_come_back_as_float32_with_their_metadata_and_other_programs_read_them(tmp_path):
    path = tmp_path / "v.safetensors"
    vectors = {"e01": np.arange(6.0), "e02": np.linspace(-1, 1, 6)}
    write_tensors(path, vectors, {"layer": "14"})
    found, metadata = read_tensors(path)
    assert metadata == {"layer": "14"}
    for name, values in load_file(path).items():
        assert found[name].dtype == values.dtype == np.float32
        assert np.array_equal(found[name], vectors[name].astype(np.float32)) and np.array_equal(values, found[name])
    assert set(found) == set(vectors) and names(tmp_path) == ["v.safetensors"]


def test_slices_and_transposed_arrays_are_written_as_they_look(tmp_path):
    array = np.arange(12, dtype=np.float32).reshape(3, 4)
    write_tensors(tmp_path / "v", {"transposed": array.T, "every second": array[:, ::2]}, {})
    found, _ = read_tensors(tmp_path / "v")
    assert np.array_equal(found["transposed"], array.T) and np.array_equal(found["every second"], array[:, ::2])


def test_the_version_of_vectors_depends_on_names_shapes_and_values_alone(tmp_path):
    def version(tensors: dict[str, np.ndarray], metadata: dict[str, str] | None = None) -> str:
        return write_tensors(tmp_path / "v", tensors, metadata or {})

    one, two = np.array([1.0, 2.0]), np.array([3.0])
    assert version({"a": one, "b": two}) == version({"b": two, "a": one.astype(np.float32)}, {"note": "x"})
    others = [{"a": one, "b": two + 1e-6}, {"a": one, "c": two}, {"a": one}, {"a": one.reshape(1, 2), "b": two}, {"a": two, "b": one}]
    assert len({version(tensors) for tensors in [{"a": one, "b": two}, *others]}) == 6


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e300])
def test_vectors_that_are_not_finite_in_float32_are_neither_written_nor_read(tmp_path, bad):
    path = tmp_path / "v.safetensors"
    with np.errstate(over="ignore"):
        with pytest.raises(StorageError, match=r"v\.safetensors: e01 holds 1 NaN or infinite"):
            write_tensors(path, {"e01": np.array([0.0, bad, 1.0])}, {})
        assert names(tmp_path) == []
        save_file({"e01": np.array([0.0, bad, 1.0])}, path)
        with pytest.raises(StorageError, match=r"v\.safetensors: e01 holds 1 NaN or infinite"):
            read_tensors(path)


def test_a_vector_file_cut_short_anywhere_or_absent_is_refused_by_name(tmp_path):
    path = tmp_path / "v.safetensors"
    write_tensors(path, {"e01": np.arange(64.0)}, {"layer": "14"})
    content = path.read_bytes()
    for length in (0, 4, 8, 20, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:length])
        with pytest.raises(StorageError, match=rf"{path}: not a readable safetensors file.*truncated"):
            read_tensors(path)
    with pytest.raises(StorageError, match="none: no such file"):
        read_tensors(tmp_path / "none")


def test_a_vector_of_another_width_than_the_models_is_refused():
    assert check_finite(np.ones(64), "v", width=64).dtype == np.float32
    for shape in ((63,), (1, 64), ()):
        with pytest.raises(StorageError, match=r"v has the shape .*needs \(64,\)"):
            check_finite(np.ones(shape), "v", width=64)


# --- randomness from keys ---------------------------------------------------------------------------------------------

KEYS = st.lists(TEXT, max_size=20, unique=True)


@settings(deadline=None)
@given(KEYS, TEXT, st.integers())
def test_adding_a_key_moves_no_other_two(keys, added, seed):
    without = [key for key in keys if key != added]
    assert [key for key in keyed_order([*without, added], seed) if key != added] == keyed_order(without, seed)


@settings(deadline=None)
@given(KEYS, st.randoms(), st.integers())
def test_a_keyed_order_holds_every_key_once_and_forgets_how_they_were_given(keys, random, seed):
    shuffled = list(keys)
    random.shuffle(shuffled)
    assert sorted(keyed_order(keys, seed)) == sorted(keys)
    assert keyed_order(shuffled, seed) == keyed_order(keys, seed)


def test_over_many_seeds_every_order_is_equally_likely():
    orders = [" ".join(keyed_order(["a", "b", "c"], seed)) for seed in range(3000)]
    _, counts = np.unique(orders, return_counts=True)
    assert len(counts) == 6 and chisquare(counts).pvalue > 0.01


def test_a_keyed_seed_is_63_bits_of_a_sha256_and_tells_its_parts_apart():
    assert keyed_seed("abc") == int(hashlib.sha256(b"abc").hexdigest()[:16], 16) // 2
    assert len({keyed_seed(*parts) for parts in ((1, 2), (12,), (2, 1), (1, 2, ""), ("1 2",))}) == 5
    assert all(0 <= keyed_seed(number) < 2**63 for number in range(1000))
