"""Parquet tables and safetensors vectors: written atomically, schema checked, hashed by content.

Here belong the file formats of the store and the one way in which a file comes into being. Paths of particular assets do
not: the Dagster door (`relseek_assets/lineage.py`) knows them.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

SMALL, MOST_KEPT = 100_000, 200  # bytes of a table's file, and tables, that are kept in memory after they were read
FEW = 50_000  # rows, below which texts are Python's own: Arrow's take less room, and several times as long wherever a few are looked at
_kept: OrderedDict[Path, tuple[tuple[int, int, int], pd.DataFrame]] = OrderedDict()


class StorageError(ValueError):
    """A file that cannot be read, or content that must not be written. The message names the file and the remedy."""


def replace_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a temporary file beside `path`, sync it, and move it into place.

    A reader sees the old file or the new one, never a part. On any failure (full disk, read-only store, kill) `path` is
    untouched, and the temporary file is removed unless the process itself died.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    except OSError as error:
        raise StorageError(f"{path}: cannot write here ({error.strerror}); set RELSEEK_STORE to a writable folder") from error
    os.close(handle)
    temporary = Path(name)
    try:
        write(temporary)
        with temporary.open("rb") as stream:
            os.fsync(stream.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except OSError as error:
        raise StorageError(
            f"{path}: not written ({error.strerror or error}); free some space or set RELSEEK_STORE to another disk, then run again"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    def write(temporary: Path) -> None:
        temporary.write_bytes(content)

    replace_atomically(path, write)


def file_sha256(path: Path) -> str:
    """Hex SHA-256 of a file's bytes."""
    try:
        with Path(path).open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise StorageError(f"{path}: cannot be read ({error.strerror})") from error


def content_version(value: Any) -> str:
    """Sixteen hex digits that change when a JSON-able value does, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()[:16]


# --- tables -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Column:
    """One column of a declared table: its type, what it means, its unit, and the values that it may hold."""

    name: str
    kind: str  # string | integer | number | boolean | json
    meaning: str
    unit: str = ""
    nullable: bool = False
    low: float | None = None
    high: float | None = None
    choices: tuple[str, ...] = ()

    @property
    def arrow_type(self) -> pa.DataType:
        return {
            "string": pa.string(),
            "integer": pa.int64(),
            "number": pa.float64(),
            "boolean": pa.bool_(),
            "json": pa.string(),
        }[self.kind]


@dataclass(frozen=True)
class TableSchema:
    """The declared shape of a table asset; `key` names the columns that tell its rows apart."""

    name: str
    columns: tuple[Column, ...]
    key: tuple[str, ...] = ()
    names: tuple[str, ...] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "names", tuple(column.name for column in self.columns))
        unknown = set(self.key) - set(self.names)
        if unknown:
            raise ValueError(f"schema {self.name}: the key names {sorted(unknown)}, which are no columns")

    def to_arrow(self, frame: pd.DataFrame, where: str) -> pa.Table:
        """Check `frame` against the schema and return it as an Arrow table in the declared column order.

        Raises:
            StorageError: a missing or unknown column, a value of another type or outside its range, a null where none may
                be, a repeated key; the message names `where` and the column.
        """
        missing = [name for name in self.names if name not in frame.columns]
        unknown = [name for name in frame.columns if name not in self.names]
        if missing or unknown:
            raise StorageError(f"{where}: table {self.name} lacks the columns {missing} and has unknown columns {unknown}")
        if frame.empty:
            return self.arrow.empty_table()
        arrays = [self._column(frame[column.name], column, where) for column in self.columns]
        if self.key and frame.duplicated(list(self.key)).any():
            first = frame[frame.duplicated(list(self.key))].iloc[0][list(self.key)].to_dict()
            raise StorageError(f"{where}: table {self.name} holds two rows with the key {first}")
        return pa.Table.from_arrays(arrays, schema=self.arrow)

    @cached_property
    def arrow(self) -> pa.Schema:
        """The schema as Arrow's, with meanings and units as metadata of its fields."""
        return pa.schema([pa.field(part.name, part.arrow_type, part.nullable, {"meaning": part.meaning, "unit": part.unit}) for part in self.columns])

    def _column(self, values: pd.Series, column: Column, where: str) -> pa.Array:
        what = f"{where}: column {column.name} of table {self.name}"
        try:
            array = _as_arrow(values, column)
        except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError, OverflowError, TypeError, UnicodeEncodeError) as error:
            raise StorageError(f"{what} is declared as {column.kind}: {error}") from error
        if not column.nullable and array.null_count:
            raise StorageError(f"{what} has {array.null_count} empty or NaN values and may have none")
        if column.choices:
            found = {value for value in array.unique().to_pylist() if value is not None}
            if not found <= set(column.choices):
                raise StorageError(f"{what} holds {sorted(found - set(column.choices))[:3]}; it may hold {list(column.choices)}")
        if column.kind in ("integer", "number") and array.null_count < len(array):
            smallest, largest = pc.min_max(array).as_py().values()
            if not np.isfinite([smallest, largest]).all():
                raise StorageError(f"{what} holds an infinite value")
            if (column.low is not None and smallest < column.low) or (column.high is not None and largest > column.high):
                raise StorageError(f"{what} spans {smallest} to {largest}; it is declared for {column.low} to {column.high}")
        return array


def _as_arrow(values: pd.Series, column: Column) -> pa.Array:
    """The column as Arrow stores it: plain numbers and strings at once, anything else value by value."""
    plain = getattr(values.dtype, "kind", "O") if isinstance(values.dtype, np.dtype) else ""
    if column.kind == "string" and plain == "O" and pd.api.types.infer_dtype(values, skipna=True) == "string":
        return pa.array(values.where(values.notna(), None).to_numpy(), column.arrow_type)
    if (column.kind == "number" and plain in "fiu" and plain) or (column.kind == "integer" and plain in "iu" and plain):
        return pa.array(values.to_numpy(), column.arrow_type, from_pandas=True)
    if column.kind == "string" and isinstance(values.dtype, pd.StringDtype):
        return pa.array(values.array, column.arrow_type, from_pandas=True)
    items = [None if _is_null(value) else _of_kind(value, column.kind) for value in values.tolist()]
    return pa.array(items, column.arrow_type)


def _is_null(value: Any) -> bool:
    return value is None or value is pd.NA or (isinstance(value, float | np.floating) and bool(np.isnan(value)))


def _of_kind(value: Any, kind: str) -> Any:
    """`value` as Arrow should store it, refusing what Arrow would quietly turn into something else."""
    if kind == "json":
        try:
            return json.dumps(value, ensure_ascii=False, sort_keys=True, allow_nan=False)
        except ValueError as error:
            raise TypeError(f"found NaN or infinity in {str(value)[:60]}") from error
    if kind in ("integer", "number") and isinstance(value, bool | np.bool_):
        raise TypeError(f"found the truth value {value}")
    if kind == "integer" and isinstance(value, float | np.floating):
        if value != int(value):
            raise TypeError(f"found {value}")
        return int(value)
    return value


def table_version(table: pa.Table) -> str:
    """Hash of a table's names, types and values, independent of the file format and of how rows lie in memory."""
    digest = hashlib.sha256()
    for part in table.schema:
        column = table.column(part.name).combine_chunks()
        digest.update(f"{part.name}:{part.type}:{len(column)}".encode())
        digest.update(np.asarray(column.is_null().to_numpy(zero_copy_only=False)).tobytes())
        if pa.types.is_string(part.type):
            texts = column.fill_null("")
            digest.update(pc.binary_length(texts).to_numpy().astype(np.int64).tobytes())
            digest.update(_text_of(texts))
        else:
            digest.update(column.fill_null(False if pa.types.is_boolean(part.type) else 0).to_numpy(zero_copy_only=False).tobytes())
    return digest.hexdigest()[:16]


def _text_of(texts: pa.StringArray) -> memoryview:
    """The UTF-8 of all texts in one, where it lies: a table of requests holds hundreds of megabytes."""
    _, offsets, data = texts.buffers()
    if data is None:
        return memoryview(b"")
    first, last = (int(np.frombuffer(offsets, np.int32, 1, 4 * place)[0]) for place in (texts.offset, texts.offset + len(texts)))
    return memoryview(data)[first:last]


def write_table(path: Path, frame: pd.DataFrame, schema: TableSchema) -> str:
    """Write `frame` as parquet after checking it against `schema`; return its data version.

    Raises:
        StorageError: the frame does not fit the schema, or the file cannot be written. Nothing is left behind.
    """
    table = schema.to_arrow(frame, str(path))
    replace_atomically(path, lambda temporary: pq.write_table(table, temporary, compression="zstd"))
    return table_version(table)


def read_table(path: Path, schema: TableSchema, without: Sequence[str] = ()) -> pd.DataFrame:
    """Read a table written by `write_table`; json columns come back as Python values, empty numbers as NaN (as NA beside whole
    numbers beyond 2^53). Columns `without` are not read.

    Small tables are read by one asset after the other, and parsing one takes longer than its arithmetic: those that were read last are kept, and
    given out as copies for as long as the file is the same.
    """
    try:
        there = os.stat(path)
        small = there.st_size <= SMALL and not without
        same = (there.st_ino, there.st_mtime_ns, there.st_size)
        kept = _kept.pop(path, None)
        if small and kept and kept[0] == same:
            _kept[path] = kept  # the last one now
            frame = kept[1].copy(deep=False)  # shares memory until either is written to
        else:
            file = pq.ParquetFile(path)
            found = file.read([name for name in file.schema_arrow.names if name not in without] if without else None)
            with pd.option_context("mode.string_storage", "python" if found.num_rows < FEW else "pyarrow"):
                frame = found.to_pandas()
            for name in _beyond_floats(found):
                frame[name] = found[name].to_pandas(types_mapper={pa.int64(): pd.Int64Dtype()}.get)
            if small:
                _kept[path] = same, frame.copy(deep=False)
                while len(_kept) > MOST_KEPT:
                    _kept.popitem(last=False)
    except FileNotFoundError as error:
        raise StorageError(f"{path}: no such file; materialise the asset that writes it") from error
    except (pa.ArrowInvalid, OSError) as error:
        raise StorageError(f"{path}: not a readable parquet file ({error}); delete it and materialise it again") from error
    for column in schema.columns:
        if column.kind == "json" and column.name in frame:
            frame[column.name] = [None if _is_null(value) else json.loads(value) for value in frame[column.name]]
    return frame


def _beyond_floats(table: pa.Table) -> list[str]:
    """Columns of whole numbers with empty cells that a float would not hold to the last digit, seeds for one."""
    some = [part.name for part in table.schema if pa.types.is_int64(part.type) and 0 < table[part.name].null_count < table.num_rows]
    return [name for name in some if max(abs(bound) for bound in pc.min_max(table[name]).as_py().values()) > 2**53]


def read_jsonl(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line number from 1, object) of a JSON Lines file, refusing lines that are no objects."""
    try:
        with Path(path).open(encoding="utf-8") as stream:
            for number, line in enumerate(stream, 1):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except json.JSONDecodeError as error:
                    raise StorageError(f"{path}, line {number}: not valid JSON ({error.msg}); mend or remove the line") from error
                if not isinstance(row, dict):
                    raise StorageError(f"{path}, line {number}: expected an object with fields, found {type(row).__name__}")
                yield number, row
    except UnicodeDecodeError as error:
        raise StorageError(f"{path}: not UTF-8 text ({error.reason})") from error
    except OSError as error:
        raise StorageError(f"{path}: cannot be read ({error.strerror})") from error


# --- vectors ----------------------------------------------------------------------------------------------------------


def write_tensors(path: Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> str:
    """Write float32 arrays with string metadata as safetensors; return the hash of names, shapes and values.

    Raises:
        StorageError: an array with NaN or infinity, or a file that cannot be written.
    """
    from safetensors.numpy import save

    checked = {name: check_finite(array, f"{path}: {name}") for name, array in sorted(tensors.items())}
    write_bytes(path, _in_order(save(checked, metadata=dict(metadata))))
    return tensors_version(checked)


def _in_order(content: bytes) -> bytes:
    """A safetensors file with its header's keys sorted: the library leaves their order to chance, and the same tensors should be the same bytes."""
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.dumps(json.loads(content[8:start]), sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + content[start:]


def tensors_version(tensors: Mapping[str, np.ndarray]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        array = np.ascontiguousarray(tensors[name], dtype=np.float32)
        digest.update(f"{name}{array.shape}".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()[:16]


def check_finite(array: np.ndarray, what: str, width: int | None = None) -> np.ndarray:
    """Return `array` as contiguous float32, refusing NaN, infinity and (for vectors) another width than `width`."""
    array = np.ascontiguousarray(array, dtype=np.float32)
    if not np.isfinite(array).all():
        raise StorageError(f"{what} holds {int((~np.isfinite(array)).sum())} NaN or infinite values; it is refused")
    if width is not None and array.shape != (width,):
        raise StorageError(f"{what} has the shape {array.shape}; the model's residual stream needs ({width},)")
    return array


def read_tensors(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Read (arrays, metadata) of a safetensors file, refusing truncated files, NaN and infinity."""
    from safetensors import SafetensorError, safe_open

    if not Path(path).is_file():
        raise StorageError(f"{path}: no such file")
    try:
        with safe_open(str(path), framework="np") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (safe_open is no mapping)
            metadata = dict(file.metadata() or {})
    except (SafetensorError, OSError, ValueError, TypeError) as error:
        raise StorageError(f"{path}: not a readable safetensors file ({error}); it may be truncated: copy it again") from error
    return {name: check_finite(array, f"{path}: {name}") for name, array in tensors.items()}, metadata


@contextlib.contextmanager
def replaced_folder(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder beside `folder` and move it into place when the block succeeds.

    If another process was first, its folder stays and ours is dropped: both hold the same content by construction.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        beside = tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.", ignore_cleanup_errors=True)
    except OSError as error:
        raise StorageError(f"{folder}: cannot write here ({error.strerror}); set RELSEEK_CACHE to a writable folder") from error
    with beside as name:
        inner = Path(name) / folder.name
        inner.mkdir()
        yield inner
        try:
            os.replace(inner, folder)
        except OSError:
            if not folder.is_dir():
                raise


def keyed_seed(*parts: Any) -> int:
    """A 63-bit seed from the study's seed and a row's own key, independent of every other row."""
    text = "\x1f".join(str(part) for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def keyed_order(keys: Sequence[str], *seed: Any) -> list[str]:
    """`keys` in a random order that depends on each key and the seed alone: adding a key moves no other two."""
    return sorted(keys, key=lambda key: (keyed_seed(*seed, key), key))
