"""Vectors as files of other programs: read back as written, in llama.cpp's and repeng's own layout, and refused when they are no vectors."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from relseek_resources.vector_files import FORMS, VectorFileError, described, read_vectors, write_vectors

WIDTH = 8
VECTOR = np.linspace(-1, 2, WIDTH, dtype=np.float32)
PROVENANCE = {"model": "a-model", "site": "m:L05", "epoch": "3", "settings": '{"beta": 0.1}'}


def gguf_file(path: Path, tensors: dict[str, Any], architecture: str = "controlvector", hint: str | None = "llama", **options: Any) -> Path:
    """A GGUF file written by the gguf package, call by call as repeng's `export_gguf` makes them."""
    writer = gguf.GGUFWriter(path, architecture)
    if hint is not None:
        writer.add_string("controlvector.model_hint", hint)
    writer.add_uint32("controlvector.layer_count", len(tensors))
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor, **options)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def as_llama_cpp_loads_it(path: Path) -> dict[int, np.ndarray]:
    """Layer whose output llama.cpp adds to -> what it adds: its loader's rules, from one flat buffer that begins with layer 1."""
    reader = gguf.GGUFReader(path)
    buffer: list[float] = []
    width = -1
    for tensor in reader.tensors:
        prefix, _, number = tensor.name.partition(".")
        assert prefix == "direction" and int(number) > 0
        assert tensor.tensor_type == gguf.GGMLQuantizationType.F32
        assert len(tensor.shape) == 1
        assert width in (-1, int(tensor.n_elements))
        width = int(tensor.n_elements)
        buffer += [0.0] * max(0, width * int(number) - len(buffer))
        for place, value in enumerate(tensor.data):
            buffer[width * (int(number) - 1) + place] += float(value)
    layers = {layer: np.array(buffer[width * (layer - 1) : width * layer], np.float32) for layer in range(1, len(buffer) // width + 1)}
    return {layer: vector for layer, vector in layers.items() if vector.any()}


# --- written and read back --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_one_vector_comes_back_to_the_bit(tmp_path: Path, form: str) -> None:
    path = tmp_path / f"one.{form}"
    write_vectors(path, form, {5: VECTOR}, PROVENANCE)
    read = read_vectors(path)
    np.testing.assert_array_equal(read.at(5, WIDTH), VECTOR)
    assert (read.form, read.width) == (form, WIDTH)
    assert list(read.vectors) == ([None] if form == "pt" else [5]), "a plain tensor does not say its block"
    if form != "pt":
        assert PROVENANCE.items() <= read.provenance.items()


@pytest.mark.parametrize("form", FORMS)
def test_several_vectors_come_back_by_block(tmp_path: Path, form: str) -> None:
    vectors = {7: VECTOR, 2: -VECTOR, 30: VECTOR * 3}
    path = tmp_path / f"some.{form}"
    write_vectors(path, form, vectors, PROVENANCE)
    read = read_vectors(path)
    assert list(read.vectors) == [2, 7, 30]
    for block, vector in vectors.items():
        np.testing.assert_array_equal(read.at(block), vector)


def test_a_control_vector_is_what_llama_cpp_loads(tmp_path: Path) -> None:
    path = tmp_path / "v.gguf"
    write_vectors(path, "gguf", {31: VECTOR, 2: -VECTOR}, PROVENANCE, "llama")
    loaded = as_llama_cpp_loads_it(path)
    assert list(loaded) == [2, 31]
    np.testing.assert_array_equal(loaded[31], VECTOR)
    np.testing.assert_array_equal(loaded[2], -VECTOR)
    fields = {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}
    assert fields["general.architecture"] == "controlvector"
    assert fields["controlvector.model_hint"] == "llama"
    assert fields["controlvector.layer_count"] == 2
    assert fields["relseek.settings"] == PROVENANCE["settings"]


def test_a_control_vector_of_repeng_steers_what_its_block_puts_out(tmp_path: Path, tiny_llama: Any) -> None:
    """repeng takes negative layers first, `direction.N` for the block whose output it measured: `hidden_states[N + 1]` of transformers."""
    width = tiny_llama.model.config.hidden_size
    directions = {layer: np.random.default_rng(layer).normal(size=width).astype(np.float32) for layer in (3, 2, 1)}
    read = read_vectors(gguf_file(tmp_path / "repeng.gguf", {f"direction.{layer}": vector for layer, vector in directions.items()}))
    assert list(read.vectors) == [1, 2, 3]
    assert read.provenance["model_hint"] == "llama"

    def entering(block: int) -> torch.Tensor:
        """The residual stream that enters a block, hence the output of the one before."""
        seen = []
        hook = tiny_llama.blocks[block].register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0].clone()))
        with torch.no_grad():
            tiny_llama.model(torch.tensor([[5, 9, 14, 20]]))
        hook.remove()
        return seen[0]

    plain = [entering(block) for block in range(4)]
    with tiny_llama.steer(read.at(2, width), 2, 1.0):
        steered = [entering(block) for block in range(4)]
    for block in range(3):
        torch.testing.assert_close(steered[block], plain[block])
    torch.testing.assert_close(steered[3] - plain[3], torch.from_numpy(directions[2]).expand(1, 4, width), atol=1e-5, rtol=1e-5)


def test_a_published_tensor_and_a_dictionary_by_layer_are_read(tmp_path: Path) -> None:
    torch.save(torch.from_numpy(VECTOR), tmp_path / "vec_ep1_layer31_gpu3.pt")
    np.testing.assert_array_equal(read_vectors(tmp_path / "vec_ep1_layer31_gpu3.pt").at(31), VECTOR)
    torch.save({0: torch.ones(WIDTH, dtype=torch.bfloat16), 4: torch.zeros(WIDTH)}, tmp_path / "directions.pt")
    assert list(read_vectors(tmp_path / "directions.pt").vectors) == [0, 4]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_become_float32(tmp_path: Path, dtype: torch.dtype) -> None:
    values = torch.tensor([0.5, -2.0, 3.25])  # exact in every one of them
    save_file({"v": values.to(dtype)}, tmp_path / "v.safetensors")
    torch.save(values.to(dtype), tmp_path / "v.pt")
    for name in ("v.safetensors", "v.pt"):
        read = read_vectors(tmp_path / name).at(1)
        assert read.dtype == np.float32
        np.testing.assert_array_equal(read, values.numpy())


def test_half_precision_of_a_control_vector_is_read(tmp_path: Path) -> None:
    kind = gguf.GGMLQuantizationType.BF16
    half = gguf_file(tmp_path / "f16.gguf", {"direction.1": np.array([0.5, -2.0], np.float16)})
    brain = gguf_file(tmp_path / "bf16.gguf", {"direction.1": gguf.quants.quantize(np.array([0.5, -2.0], np.float32), kind)}, raw_dtype=kind)
    for path in (half, brain):
        np.testing.assert_array_equal(read_vectors(path).at(1), np.array([0.5, -2.0], np.float32))


def test_the_block_of_a_lone_tensor_comes_from_the_header(tmp_path: Path) -> None:
    for header, block in (({"layer": "4"}, 4), ({"site": "m:L12"}, 12), ({"made_by": "hand"}, None)):
        save_file({"v": torch.ones(3)}, tmp_path / "v.safetensors", metadata=header)
        assert list(read_vectors(tmp_path / "v.safetensors").vectors) == [block]


def test_a_vector_for_another_block_is_not_given(tmp_path: Path) -> None:
    write_vectors(tmp_path / "v.gguf", "gguf", {5: VECTOR}, {})
    with pytest.raises(VectorFileError, match=r"v\.gguf: it steers block 5 and not block 6"):
        read_vectors(tmp_path / "v.gguf").at(6)


def test_what_is_in_a_file_is_told_in_words(tmp_path: Path) -> None:
    write_vectors(tmp_path / "v.safetensors", "safetensors", {5: VECTOR}, PROVENANCE)
    told = described(read_vectors(tmp_path / "v.safetensors"))
    for words in (str(tmp_path / "v.safetensors"), "width 8", "after block 5", f"norm {np.linalg.norm(VECTOR):.4g}", "model: a-model", "beta=0.1"):
        assert words in told


# --- refused ----------------------------------------------------------------------------------------------------------


def safetensors(**tensors: torch.Tensor) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        save_file(tensors, folder / "v.safetensors")
        return folder / "v.safetensors"

    return make


def plain(content: Any) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        torch.save(content, folder / "v.pt")
        return folder / "v.pt"

    return make


def control(tensors: dict[str, Any], **options: Any) -> Callable[[Path], Path]:
    return lambda folder: gguf_file(folder / "v.gguf", tensors, **options)


def cut(make: Callable[[Path], Path], by: int) -> Callable[[Path], Path]:
    def shorter(folder: Path) -> Path:
        path = make(folder)
        path.write_bytes(path.read_bytes()[:-by])
        return path

    return shorter


def text(name: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        (folder / name).write_text("a vector")
        return folder / name

    return make


ONES, NAN = torch.ones(WIDTH), torch.tensor([1.0, float("nan"), float("inf")])
BAD: dict[str, tuple[Callable[[Path], Path], str]] = {
    "integers": (safetensors(v=torch.ones(WIDTH, dtype=torch.int64)), "has the type int64; a steering vector is floating point"),
    "bytes": (plain(torch.ones(WIDTH, dtype=torch.uint8)), "has the type uint8"),
    "truth values": (plain(torch.ones(WIDTH, dtype=torch.bool)), "has the type bool"),
    "complex numbers": (plain(torch.ones(WIDTH, dtype=torch.complex64)), "has the type complex64"),
    "integers of GGUF": (control({"direction.1": np.ones(WIDTH, np.int32)}), "direction.1 is stored as I32"),
    "quantised": (
        control(
            {"direction.1": gguf.quants.quantize(np.ones(32, np.float32), gguf.GGMLQuantizationType.Q8_0)}, raw_dtype=gguf.GGMLQuantizationType.Q8_0
        ),
        "direction.1 is stored as Q8_0",
    ),
    "NaN": (safetensors(v=NAN), "holds 2 NaN or infinite values"),
    "NaN in a dictionary": (plain({3: torch.ones(3), 4: NAN}), "the vector of block 4 holds 2 NaN"),
    "NaN in GGUF": (control({"direction.2": np.array([np.nan], np.float32)}), "the vector of block 2 holds 1 NaN"),
    "infinite in float32 only": (plain(torch.tensor([1e300], dtype=torch.float64)), "holds 1 NaN or infinite values"),
    "a matrix": (plain(torch.ones(2, WIDTH)), "has the shape (2, 8); a steering vector is one row"),
    "a row in a matrix": (safetensors(v=torch.ones(1, WIDTH)), "has the shape (1, 8)"),
    "a number": (plain(torch.tensor(1.0)), "has the shape ()"),
    "an empty vector": (plain(torch.ones(0)), "has the shape (0,)"),
    "a matrix of GGUF": (control({"direction.1": np.ones((2, WIDTH), np.float32)}), "has the shape (2, 8)"),
    "two widths": (plain({1: torch.ones(3), 2: torch.ones(4)}), "widths [3, 4]"),
    "two tensors of no block": (safetensors(v=ONES, w=ONES.clone()), "expected one tensor, or tensors named by their block; found ['v', 'w']"),
    "a block that is no number": (plain({"late": ONES}), "keyed by block, counted from 0; found the keys ['late']"),
    "a block below zero": (plain({-1: ONES}), "found the keys [-1]"),
    "no tensor in a dictionary": (plain({}), "holds no tensor"),
    "no tensor in GGUF": (control({}), "holds no tensor"),
    "a list": (plain([1.0, 2.0]), "is a list and no tensor"),
    "a model": (
        control({"direction.1": np.ones(2, np.float32)}, architecture="llama"),
        "architecture 'llama'; a control vector says 'controlvector'",
    ),
    "a tensor of another name": (control({"blk.1.weight": np.ones(2, np.float32)}), "the tensor 'blk.1.weight' is no direction.N"),
    "a cut safetensors file": (cut(safetensors(v=ONES), 5), "not a readable safetensors file"),
    "a cut GGUF file": (cut(control({"direction.1": VECTOR}), 60), "not a readable GGUF file"),
    "a cut torch file": (cut(plain(ONES), 200), "not a readable file of plain tensors"),
    "text as safetensors": (text("v.safetensors"), "not a readable safetensors file"),
    "text as GGUF": (text("v.gguf"), "not a readable GGUF file"),
    "text as a torch file": (text("v.pt"), "not a readable file of plain tensors"),
    "another suffix": (text("v.npy"), "unknown suffix '.npy'; steering vectors come as .safetensors, .pt, .gguf"),
    "nothing": (lambda folder: folder / "v.pt", "no such file"),
}


@pytest.mark.parametrize("fault", BAD)
def test_what_is_no_vector_is_refused_by_name(tmp_path: Path, fault: str) -> None:
    make, told = BAD[fault]
    path = make(tmp_path)
    with pytest.raises(VectorFileError) as caught:
        read_vectors(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert told in str(caught.value)


def test_another_width_than_the_models_is_refused(tmp_path: Path) -> None:
    path = plain(ONES)(tmp_path)
    with pytest.raises(VectorFileError, match=r"has the shape \(8,\); the model's residual stream needs \(9,\)"):
        read_vectors(path).at(3, 9)


class _Trap:
    """Runs a command wherever it is unpickled without care."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.mark}",)


def test_code_in_a_torch_file_is_refused_and_not_run(tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    torch.save({1: _Trap(mark)}, tmp_path / "v.pt")
    (tmp_path / "old.pt").write_bytes(pickle.dumps(_Trap(mark)))
    for name in ("v.pt", "old.pt"):
        with pytest.raises(VectorFileError, match="it is not opened in any other way"):
            read_vectors(tmp_path / name)
    assert not mark.exists()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("vector", [np.full(4, np.nan), np.ones((2, 2)), np.arange(4)], ids=["NaN", "matrix", "integers"])
def test_nothing_is_written_of_what_would_be_refused(tmp_path: Path, form: str, vector: np.ndarray) -> None:
    with pytest.raises(VectorFileError):
        write_vectors(tmp_path / f"v.{form}", form, {1: vector}, {})
    assert list(tmp_path.iterdir()) == []


def test_block_zero_is_not_written_for_llama_cpp(tmp_path: Path) -> None:
    with pytest.raises(VectorFileError, match=r"refuses direction\.0; use safetensors"):
        write_vectors(tmp_path / "v.gguf", "gguf", {0: VECTOR}, {})
    write_vectors(tmp_path / "v.safetensors", "safetensors", {0: VECTOR}, {})
    np.testing.assert_array_equal(read_vectors(tmp_path / "v.safetensors").at(0), VECTOR)
