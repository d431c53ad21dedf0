"""Steering vectors as files that other programs read and write: safetensors with provenance, plain tensors (`.pt`), GGUF control vectors.

Here belong the three formats and what is refused at the door. Where a study keeps its vectors, and what it records of an imported one, does not:
that is `relseek_assets/imports.py`.

Blocks are 0-indexed, and a vector steers what its block puts out: the residual stream after block N, `hidden_states[N + 1]` of transformers.
`direction.N` of a GGUF control vector steers the same place. llama.cpp adds it to the output of its layer N, counted from 0, after the feed-forward
network's residual is added (`build_cvec(cur, il)`); it has no place for a layer 0 and its loader refuses a file with `direction.0`. repeng names
`direction.N` by the block whose output it measured and steers, counted from 0 as well. llama.cpp's own cvector-generator, though, measures the
output of layer N - 1 and names it `direction.N`, so that its vectors are measured one block below where llama.cpp adds them. They are read here
as llama.cpp applies them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from relseek_resources.storage import StorageError, replace_atomically, write_tensors

FORMS = ("safetensors", "gguf", "pt")
ALONE = "vector"  # the tensor's name where a safetensors file holds one
ARCHITECTURE = "controlvector"  # of a GGUF file
PROVENANCE = "relseek"  # prefix of the keys under which a GGUF file carries what safetensors carry in their header
SITE_LAYER = re.compile(r".*:L(\d+)")


class VectorFileError(StorageError):
    """A file that holds no steering vector that can be used; the message names the file and the fault."""


@dataclass(frozen=True)
class VectorFile:
    """What a file holds. `vectors` are float32 (width,) by block; the key None is one vector of which the file does not say the block."""

    path: Path
    form: str
    vectors: Mapping[int | None, np.ndarray]
    provenance: Mapping[str, str]

    @property
    def width(self) -> int:
        return len(next(iter(self.vectors.values())))

    def at(self, layer: int, width: int | None = None) -> np.ndarray:
        """The vector that steers the output of block `layer`.

        Raises:
            VectorFileError: the file has none for this block, or one of another width than `width`.
        """
        found = self.vectors.get(layer, self.vectors.get(None))
        if found is None:
            there = ", ".join(str(block) for block in self.vectors)
            raise VectorFileError(
                f"{self.path}: it steers block {there} and not block {layer}; name a site of that block, or give the bare tensor as .pt"
            )
        if width is not None and found.shape != (width,):
            raise VectorFileError(f"{self.path}: the vector has the shape {found.shape}; the model's residual stream needs ({width},)")
        return found


# --- in ---------------------------------------------------------------------------------------------------------------


def read_vectors(path: Path, content: bytes | None = None, *, rows: bool = False) -> VectorFile:
    """Read a safetensors, `.pt` or GGUF file of steering vectors; the suffix says which.

    safetensors: one tensor of any name, its block taken from `layer` or `site` in the header; or tensors named by their block. `.pt`: one tensor,
    or a dictionary from block to tensor, read as plain tensors (`weights_only=True`): code in the file is refused, not run. GGUF: see above. Half
    and double precision become float32.

    Args:
        content: of a safetensors file that has been read already; nothing is read again, so that it is certain what was.
        rows: take one array (blocks, width) of which the file does not say the block as a row a block, from block 0.

    Raises:
        VectorFileError: no such file, another format, a truncated file; integers or truth values; a tensor that is not (width,); different widths in
            one file; NaN or infinity.
    """
    path = Path(path)
    readers: dict[str, Callable[[Path], tuple[dict[int | None, Any], dict[str, str]]]] = {
        ".safetensors": _safetensors,
        ".pt": _plain_tensors,
        ".gguf": _control_vector,
    }
    if not path.is_file():
        raise VectorFileError(f"{path}: no such file")
    if path.suffix not in readers:
        raise VectorFileError(f"{path}: unknown suffix {path.suffix!r}; steering vectors come as {', '.join(readers)}")
    tensors, provenance = readers[path.suffix](path) if content is None else _safetensors(path, content)
    alone: Any = tensors.get(None)
    if rows and getattr(alone, "ndim", 0) == 2 and len(alone) > 1:
        tensors = dict(enumerate(alone))
    vectors = {
        block: _checked(tensor, block, path) for block, tensor in sorted(tensors.items(), key=lambda found: -1 if found[0] is None else found[0])
    }
    widths = sorted({len(vector) for vector in vectors.values()})
    if not vectors:
        raise VectorFileError(f"{path}: it holds no tensor")
    if len(widths) > 1:
        raise VectorFileError(f"{path}: its vectors have the widths {widths}; all blocks of a model have one")
    return VectorFile(path, path.suffix[1:], vectors, provenance)


def named_tensors(path: Path, content: bytes | None = None) -> tuple[dict[str, Any], dict[str, str]]:
    """Torch tensors by name and the header of a safetensors file, in whatever precision.

    Raises:
        VectorFileError: a truncated file, or another format.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load  # numpy has no bfloat16

    try:
        content = path.read_bytes() if content is None else content
        return load(content), dict(json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")]).get("__metadata__") or {})
    except (SafetensorError, OSError, ValueError, TypeError) as error:
        raise VectorFileError(f"{path}: not a readable safetensors file ({error}); it may be truncated: copy it again") from error


def _safetensors(path: Path, content: bytes | None = None) -> tuple[dict[int | None, Any], dict[str, str]]:
    tensors, header = named_tensors(path, content)
    if len(tensors) == 1 and not next(iter(tensors)).isdecimal():
        return {_block_of(header, path): next(iter(tensors.values()))}, header
    if tensors and not all(name.isdecimal() for name in tensors):
        raise VectorFileError(f"{path}: expected one tensor, or tensors named by their block; found {sorted(tensors)}")
    return {int(name): tensor for name, tensor in tensors.items()}, header


def _block_of(header: Mapping[str, str], path: Path) -> int | None:
    if "layer" in header:
        if not header["layer"].isdecimal():
            raise VectorFileError(f"{path}: its header gives the layer {header['layer']!r}; it must be a block counted from 0")
        return int(header["layer"])
    site = SITE_LAYER.fullmatch(header.get("site", ""))
    return int(site[1]) if site else None


def plain_content(path: Path) -> Any:
    """What a torch file holds, if that is tensors, numbers, texts and containers of them; code in it is refused, not run.

    Raises:
        VectorFileError: no such file, a truncated one, or anything else in it.
    """
    import torch

    if not path.is_file():
        raise VectorFileError(f"{path}: no such file")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the restricted unpickler ends in whatever error a stray byte leads it to
        reason = str(error).partition("\n")[0]
        raise VectorFileError(f"{path}: not a readable file of plain tensors ({reason}); it is not opened in any other way") from error


def _plain_tensors(path: Path) -> tuple[dict[int | None, Any], dict[str, str]]:
    content = plain_content(path)
    if not isinstance(content, Mapping):
        return {None: content}, {}
    unknown = [block for block in content if not isinstance(block, int) or isinstance(block, bool) or block < 0]
    if unknown:
        raise VectorFileError(f"{path}: a dictionary of tensors must be keyed by block, counted from 0; found the keys {unknown[:3]}")
    return dict(content), {}


def _control_vector(path: Path) -> tuple[dict[int | None, Any], dict[str, str]]:
    from gguf import GGUFReader

    try:
        reader = GGUFReader(path)
        fields = {name: field.contents() for name, field in reader.fields.items()}
    except (ValueError, OSError, IndexError, KeyError, OverflowError) as error:
        raise VectorFileError(f"{path}: not a readable GGUF file ({error}); it may be truncated: copy it again") from error
    architecture = fields.get("general.architecture")
    if architecture != ARCHITECTURE:
        raise VectorFileError(f"{path}: a GGUF file of the architecture {architecture!r}; a control vector says {ARCHITECTURE!r}")
    tensors: dict[int | None, Any] = {}
    for tensor in reader.tensors:
        name = re.fullmatch(r"direction\.(\d+)", tensor.name)
        if name is None:
            raise VectorFileError(f"{path}: the tensor {tensor.name!r} is no direction.N")
        tensors[int(name[1])] = _from_gguf(tensor, path)
    provenance = {name.removeprefix(f"{PROVENANCE}."): str(value) for name, value in fields.items() if name.startswith(f"{PROVENANCE}.")}
    return tensors, {**provenance, "model_hint": str(fields.get(f"{ARCHITECTURE}.model_hint", ""))}


def _from_gguf(tensor: Any, path: Path) -> np.ndarray:
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    kind = tensor.tensor_type
    if kind.name not in ("F16", "BF16", "F32", "F64"):
        raise VectorFileError(f"{path}: {tensor.name} is stored as {kind.name}; a steering vector is floating point, not quantised and no integer")
    values = dequantize(tensor.data, kind) if kind == GGMLQuantizationType.BF16 else np.array(tensor.data)
    return values.reshape(tuple(int(size) for size in reversed(tensor.shape)))


def _checked(tensor: Any, block: int | None, path: Path) -> np.ndarray:
    return one_vector(tensor, f"{path}: {'the vector' if block is None else f'the vector of block {block}'}")


def one_vector(tensor: Any, what: str) -> np.ndarray:
    """One tensor as float32 (width,); `what` is the file and the vector's name, for the message.

    Raises:
        VectorFileError: no tensor, integers or truth values, another shape, NaN or infinity.
    """
    import torch

    if not isinstance(tensor, torch.Tensor | np.ndarray):
        raise VectorFileError(f"{what} is a {type(tensor).__name__} and no tensor")
    found = torch.as_tensor(tensor)
    if not found.is_floating_point():
        raise VectorFileError(f"{what} has the type {str(found.dtype).removeprefix('torch.')}; a steering vector is floating point")
    if found.ndim != 1 or not len(found):
        raise VectorFileError(f"{what} has the shape {tuple(found.shape)}; a steering vector is one row, (width,)")
    return _finite(found.detach().to(torch.float32).numpy(), what)


def _finite(vector: np.ndarray, what: str) -> np.ndarray:
    bad = int((~np.isfinite(vector)).sum())
    if bad:
        raise VectorFileError(f"{what} holds {bad} NaN or infinite values; it is refused")
    return np.ascontiguousarray(vector)


# --- out --------------------------------------------------------------------------------------------------------------


def write_vectors(path: Path, form: str, vectors: Mapping[int, np.ndarray], provenance: Mapping[str, str], model_hint: str = "unknown") -> None:
    """Write steering vectors by block, float32 (width,), in one of `FORMS`; the file appears whole or not at all.

    One vector is written alone: a safetensors tensor `vector` whose header carries `provenance` and the block, or a `.pt` tensor, which has no place
    for either. Several are written by block. A GGUF file carries `provenance` under `relseek.`.

    Args:
        model_hint: the model's type, `llama`, in a GGUF file: llama.cpp ignores it, repeng reads no file without it.

    Raises:
        VectorFileError: NaN or infinity, another shape, an unknown form, or block 0 in a GGUF file, which llama.cpp refuses.
    """
    if form not in FORMS:
        raise VectorFileError(f"{path}: no format {form!r}; there is {', '.join(FORMS)}")
    checked = {block: _checked(np.asarray(vector), block, path) for block, vector in sorted(vectors.items())}
    if form == "safetensors":
        alone = {ALONE: next(iter(checked.values()))} if len(checked) == 1 else {str(block): vector for block, vector in checked.items()}
        header = {**provenance, **({"layer": str(next(iter(checked)))} if len(checked) == 1 else {})}
        write_tensors(path, alone, header)
    elif form == "pt":
        _write_plain_tensors(path, checked)
    else:
        _write_control_vector(path, checked, provenance, model_hint)


def _write_plain_tensors(path: Path, vectors: Mapping[int, np.ndarray]) -> None:
    import torch

    tensors = {block: torch.from_numpy(vector) for block, vector in vectors.items()}
    content = next(iter(tensors.values())) if len(tensors) == 1 else tensors
    replace_atomically(path, lambda temporary: torch.save(content, temporary))


def _write_control_vector(path: Path, vectors: Mapping[int, np.ndarray], provenance: Mapping[str, str], model_hint: str) -> None:
    from gguf import GGUFWriter

    if 0 in vectors:
        raise VectorFileError(f"{path}: llama.cpp steers the outputs of the blocks 1 and above and refuses direction.0; use safetensors for block 0")

    def write(temporary: Path) -> None:
        writer = GGUFWriter(temporary, ARCHITECTURE)
        writer.add_string(f"{ARCHITECTURE}.model_hint", model_hint)
        writer.add_uint32(f"{ARCHITECTURE}.layer_count", len(vectors))
        for name, value in provenance.items():
            writer.add_string(f"{PROVENANCE}.{name}", value)
        for block, vector in vectors.items():
            writer.add_tensor(f"direction.{block}", vector)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()

    replace_atomically(path, write)


# --- shown ------------------------------------------------------------------------------------------------------------


def described(file: VectorFile) -> str:
    """A file in words: format, width, the norm of each vector, provenance."""
    lines = [f"{file.path}: {file.form}, {len(file.vectors)} vector{'' if len(file.vectors) == 1 else 's'} of width {file.width}"]
    for block, vector in file.vectors.items():
        where = "of which the file does not say the block" if block is None else f"after block {block}"
        lines.append(f"  {where}: norm {np.linalg.norm(vector):.4g}")
    lines += [f"  {name}: {_short(value)}" for name, value in sorted(file.provenance.items())]
    return "\n".join(lines)


def _short(value: str) -> str:
    """A header's value on one line: JSON without its quotes, long texts cut."""
    try:
        found = json.loads(value)
        value = ", ".join(f"{name}={item}" for name, item in found.items()) if isinstance(found, dict) else value
    except json.JSONDecodeError:
        pass
    return value if len(value) <= 200 else f"{value[:197]}..."
