"""What a request for steering may say, and that anything else is refused by name."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from relseek_resources.serving import requests
from relseek_resources.serving.requests import Entry, SteeringError, cache_salt, canonical, from_canonical, read
from relseek_resources.serving.vectors import Configuration, ServingError, Vectors
from relseek_resources.vector_files import write_vectors

WIDTH, BLOCKS = 8, 6


@pytest.fixture(scope="module")
def vectors(tmp_path_factory: pytest.TempPathFactory) -> Vectors:
    folder = tmp_path_factory.mktemp("offered")
    drawn = np.random.default_rng(0)
    write_vectors(folder / "one.safetensors", "safetensors", {2: drawn.normal(size=WIDTH).astype(np.float32)}, {})
    write_vectors(folder / "many.safetensors", "safetensors", {layer: drawn.normal(size=WIDTH).astype(np.float32) for layer in (1, 2, 3)}, {})
    write_vectors(folder / "zero.safetensors", "safetensors", {4: np.zeros(WIDTH, np.float32), 5: np.ones(WIDTH, np.float32)}, {})
    files = {name: f"{name}.safetensors" for name in ("one", "many", "zero")}
    return Vectors(Configuration.from_json({"folder": str(folder), "vectors": files, "default": {"vector": "one"}}), BLOCKS, WIDTH)


def test_interventions_are_read_block_by_block_in_the_order_given(vectors: Vectors) -> None:
    asked = [
        {"vector": "one", "layers": [3, 1], "multiplier": 0.5},
        {"vector": "many", "mode": "floor", "threshold": [1, 2, 3]},
        {"vector": "one", "mode": "ablate", "layers": 3},
    ]
    one, many = vectors.by_name["one"], vectors.by_name["many"]
    assert read(json.dumps(asked), vectors) == (
        Entry(1, "add", one.digest(1), 0.5),
        Entry(1, "floor", many.digest(1), 1.0),
        Entry(2, "floor", many.digest(2), 2.0),
        Entry(3, "add", one.digest(3), 0.5),
        Entry(3, "floor", many.digest(3), 3.0),
        Entry(3, "ablate", one.digest(3), 1.0),
    )


def test_requests_that_steer_alike_are_one_text_and_others_are_not(vectors: Vectors) -> None:
    def text(*interventions: dict[str, Any]) -> str:
        return canonical(read(list(interventions), vectors))

    same = text({"vector": "one", "multiplier": 0.1})
    assert text({"vector": "one", "layers": [2], "multiplier": 0.1, "mode": "add"}) == same
    assert text({"vector": "one", "multiplier": 0.1 + 1e-12}) == same  # equal as float32, in which it works
    assert text({"vector": "zero", "multiplier": 0}, {"vector": "one", "multiplier": 0.1}) == same
    others = [
        {"vector": "one", "multiplier": 0.11},
        {"vector": "one", "multiplier": -0.1},
        {"vector": "one", "layers": 3, "multiplier": 0.1},
        {"vector": "many", "layers": 2, "multiplier": 0.1},
        {"vector": "one", "mode": "floor", "threshold": 0.1},
        {"vector": "one", "mode": "ceiling", "threshold": 0.1},
        {"vector": "one", "mode": "ablate", "strength": 0.1},
    ]
    assert len({same, *(text(other) for other in others)}) == 1 + len(others)
    first, second = {"vector": "one", "multiplier": 1}, {"vector": "one", "mode": "ablate"}
    assert text(first, second) != text(second, first)


def test_a_request_may_say_which_content_it_means(vectors: Vectors) -> None:
    one, many = vectors.by_name["one"], vectors.by_name["many"]
    for mode in ({"multiplier": 1}, {"mode": "floor", "threshold": 1}, {"mode": "ablate"}):
        assert read([{"vector": "one", "sha256": one.sha256, **mode}], vectors) == read([{"vector": "one", **mode}], vectors)
        with pytest.raises(SteeringError, match=f"sha256 {one.sha256} here, and '{many.sha256[:20]}.* was asked for"):
            read([{"vector": "one", "sha256": many.sha256, **mode}], vectors)
    with pytest.raises(SteeringError, match="was asked for"):  # also where nothing is done
        read([{"vector": "one", "sha256": many.sha256, "multiplier": 0}], vectors)


def test_nothing_to_do_is_the_empty_text(vectors: Vectors) -> None:
    idle = [{"vector": "one", "multiplier": -0.0}, {"vector": "one", "multiplier": 1e-60}, {"vector": "many", "mode": "ablate", "strength": 0}]
    assert canonical(read(idle, vectors)) == canonical(read("[]", vectors)) == ""
    assert canonical(read([{"vector": "one", "mode": "floor", "threshold": 0}], vectors)) != ""


@given(st.lists(st.tuples(st.sampled_from([1, 2, 3]), st.floats(-2, 2, width=32)), max_size=8))
def test_the_canonical_text_says_all_that_is_done(vectors: Vectors, doses: list[tuple[int, float]]) -> None:
    entries = read([{"vector": "many", "layers": layer, "multiplier": dose} for layer, dose in doses], vectors)
    assert from_canonical(canonical(entries)) == entries
    assert [entry.value for entry in entries] == [dose for layer in (1, 2, 3) for at, dose in doses if at == layer and dose != 0]


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ("{", "not valid JSON"),
        ("[" * 30_000, "not valid JSON"),
        (" " * 70_000, "at most 65536"),
        ({}, "a JSON list"),
        ([None], "expected an object"),
        ([{}], "no vector None"),
        ([{"vector": ["one"]}], "no vector list"),
        ([{"vector": "two"}], "there is many, one, zero"),
        ([{"vector": "one", "sha256": "0" * 64}], "was asked for"),
        ([{"vector": "one", "sha256": None}], "and None was asked for"),
        ([{"vector": "one", "multiplier": float("nan")}], "outside the declared range -20 to 20"),
        ([{"vector": "one", "multiplier": float("inf")}], "outside"),
        ([{"vector": "one", "multiplier": 10**400}], "an integer of more than 20 digits"),
        ([{"vector": "one", "multiplier": 20.0001}], "outside"),
        ([{"vector": "one", "multiplier": None}], "must be a number"),
        ([{"vector": "one", "multiplier": [1]}], "must be a number"),
        ([{"vector": "one", "mode": "floor"}], "needs a threshold"),
        ([{"vector": "one", "mode": "floor", "threshold": 1e5}], "-10000 to 10000"),
        ([{"vector": "many", "mode": "ceiling", "threshold": [1, 2]}], "2 thresholds for 3 layers"),
        ([{"vector": "one", "mode": "ablate", "strength": 1.1}], "0 to 1"),
        ([{"vector": "one", "mode": "floor", "multiplier": 1}], "mode floor takes vector, sha256, layers and threshold"),
        ([{"vector": "one", "mode": "cap"}], "there is add, floor, ceiling, ablate"),
        ([{"vector": "one", "mode": ["add"]}], "mode list"),
        ([{"vector": "zero", "mode": "floor", "threshold": 1}], "is zero at block 4"),
        ([{"vector": "one", "layers": []}], "a block or a list of blocks"),
        ([{"vector": "one", "layers": [1, 1]}], "each once"),
        ([{"vector": "one", "layers": [1.0]}], "counted from 0"),
        ([{"vector": "one", "layers": -1}], "after block -1"),
        ([{"vector": "one", "layers": 6}], "0 to 5"),
        ([{"vector": "many", "layers": 4}], "the blocks 1 to 3"),
        ([{"vector": "one", "layers": {"2": 1}}], "a block or a list"),
        ([{"vector": "one"}] * 9, "at most 8 work after one block"),
    ],
)
def test_a_fault_is_refused_by_name(vectors: Vectors, asked: Any, says: str) -> None:
    with pytest.raises(SteeringError) as refusal:
        read(asked, vectors)
    assert says in str(refusal.value) and len(str(refusal.value)) < 300


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)
    )
)
def test_whatever_is_sent_is_read_or_refused(vectors: Vectors, asked: Any) -> None:
    for content in (asked, [asked], [{"vector": "one", "multiplier": asked}], [{"vector": "one", "layers": asked}], [{"vector": asked}]):
        try:
            entries = read(content, vectors)
        except SteeringError:
            continue
        assert all(np.isfinite(entry.value) for entry in entries)


def test_the_published_shape_doses_the_default_vector(vectors: Vectors) -> None:
    assert read(requests.read_custom({"steer_multiplier": 1.5}, vectors), vectors) == read([{"vector": "one", "multiplier": 1.5}], vectors)
    for wrong in (None, 1, {}, {"steer_multiplier": 1, "layer": 2}):
        with pytest.raises(SteeringError, match="steer_multiplier"):
            requests.read_custom(wrong, vectors)


def test_the_default_vector_says_its_blocks_as_a_list(vectors: Vectors) -> None:
    configuration = vectors.configuration
    for layers in (3, [3]):
        declared = dataclasses.replace(configuration, default={"vector": "one", "layers": layers})
        assert Vectors(declared, BLOCKS, WIDTH).default == {"vector": "one", "layers": [3]}


def test_salts_part_steering_and_senders() -> None:
    salts = [cache_salt(text, given) for text in ("a", "b") for given in (None, "", "a")]
    assert len(set(salts)) == len(salts)
    with pytest.raises(SteeringError, match="choose another"):
        requests.check_salt(salts[0])
    requests.check_salt("mine")


# --- the vectors that a server offers -----------------------------------------------------------------------------------


def test_a_file_outside_the_folder_is_not_read(vectors: Vectors, tmp_path: Path) -> None:
    folder = vectors.configuration.folder
    assert folder is not None
    outside = tmp_path / "outside.safetensors"
    outside.write_bytes((folder / "one.safetensors").read_bytes())
    (folder / "link.safetensors").symlink_to(outside)
    (folder / "loop.safetensors").symlink_to(folder / "loop.safetensors")
    (folder / "inside.safetensors").symlink_to(folder / "one.safetensors")
    names = ["link.safetensors", "loop.safetensors", str(outside), "../one.safetensors", "", ".", "a\0b", "x" * 5000, "/dev/zero", None, 3]
    for file in names:
        with pytest.raises(SteeringError):
            vectors.read("new", file)
    assert vectors.read("new", "inside.safetensors").digests == vectors.by_name["one"].digests


def test_a_name_keeps_its_vector(tmp_path: Path) -> None:
    offered = Vectors(Configuration(folder=tmp_path, capacity=2), BLOCKS, WIDTH)
    write_vectors(tmp_path / "a.safetensors", "safetensors", {1: np.ones(WIDTH, np.float32)}, {})
    write_vectors(tmp_path / "b.safetensors", "safetensors", {1: np.full(WIDTH, 2, np.float32)}, {})
    write_vectors(tmp_path / "c.safetensors", "safetensors", {1: np.full(WIDTH, 3, np.float32)}, {})
    offered.add(offered.read("a", "a.safetensors"))
    offered.add(offered.read("a", "a.safetensors"))
    with pytest.raises(SteeringError, match="stands for another vector"):
        offered.read("a", "b.safetensors")
    offered.add(offered.read("again", "a.safetensors"))  # the same content takes no room
    offered.add(offered.read("b", "b.safetensors"))
    with pytest.raises(SteeringError, match="`capacity` 2"):
        offered.read("c", "c.safetensors")


def test_a_name_keeps_the_block_of_its_vector(tmp_path: Path) -> None:
    offered = Vectors(Configuration(folder=tmp_path), BLOCKS, WIDTH)
    for file, layer in (("a", 1), ("b", 2)):
        write_vectors(tmp_path / f"{file}.safetensors", "safetensors", {layer: np.ones(WIDTH, np.float32)}, {})
    offered.add(offered.read("a", "a.safetensors"))
    with pytest.raises(SteeringError, match=r"stands for another vector .*blocks \[1\]"):
        offered.read("a", "b.safetensors")
    assert offered.by_name["a"].home == (1,)


def test_the_hash_is_of_the_bytes_that_were_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that is exchanged meanwhile: hash and numbers are of one content."""
    file, other = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    write_vectors(file, "safetensors", {1: np.ones(WIDTH, np.float32)}, {})
    write_vectors(other, "safetensors", {1: np.full(WIDTH, 2, np.float32)}, {})
    before, after, real = file.read_bytes(), other.read_bytes(), Path.read_bytes

    def exchanged(path: Path) -> bytes:
        content = real(path)
        path.write_bytes(after)
        return content

    offered = Vectors(Configuration(folder=tmp_path), BLOCKS, WIDTH)
    monkeypatch.setattr(Path, "read_bytes", exchanged)
    new = offered.read("a", "a.safetensors")
    monkeypatch.undo()
    assert new.sha256 == hashlib.sha256(before).hexdigest() and (new.at(1) == 1).all() and file.read_bytes() == after


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ([], "is an object"),
        ({"folders": "x"}, "folders"),
        ({"vectors": {"a": "a.safetensors"}}, "needs the `folder`"),
        ({"folder": "/nowhere", "vectors": {"a": "a.safetensors"}}, "none in the declared folder"),
        ({"vectors": ["a"]}, "files by name"),
        ({"default": "a"}, "`default` has a `vector`"),
        ({"default": {"vector": "a"}}, "no vector 'a'"),
        ({"layers": []}, "list of blocks"),
        ({"layers": [6]}, "the model has the blocks 0 to 5"),
        ({"dose_limit": 0}, "dose_limit"),
        ({"capacity": 1.5}, "capacity"),
        ({"threshold_limit": float("inf")}, "threshold_limit"),
    ],
)
def test_a_server_that_cannot_be_set_up_says_why(content: Any, says: str) -> None:
    with pytest.raises(ServingError) as refusal:
        Vectors(Configuration.from_json(content), BLOCKS, WIDTH)
    assert says in str(refusal.value)


def test_blocks_that_a_server_does_not_steer_are_refused(tmp_path: Path) -> None:
    write_vectors(tmp_path / "a.safetensors", "safetensors", {1: np.ones(WIDTH, np.float32)}, {})
    configuration = Configuration.from_json({"folder": str(tmp_path), "vectors": {"a": "a.safetensors"}, "layers": [1, 3]})
    offered = Vectors(configuration, BLOCKS, WIDTH)
    assert [entry.layer for entry in read([{"vector": "a", "layers": [3, 1]}], offered)] == [1, 3]
    with pytest.raises(SteeringError, match="the blocks 1, 3"):
        read([{"vector": "a", "layers": 2}], offered)
