"""The vectors that a server offers by name, and the server's configuration of them.

Here belong the configuration, guarded reading of files and the look-ups that a request needs. The tables in which a worker keeps the same vectors
belong in `steering_op.py`.

A name stands for one content as long as the server lives: a second registration under it must be the same vector. So a cached prefix, which is
keyed by content, and a conversation, which is logged by name, cannot come to mean something else.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from relseek_resources.serving.requests import Limits, SteeringError, shown

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.:@+-]{0,99}")
SLACK = 16 << 20  # bytes of a file beyond its numbers
NUMBERS: dict[str, Any] = {
    "dose_limit": int | float,
    "threshold_limit": int | float,
    "capacity": int,
    "rate": int,
    "body": int,
    "patience": int | float,
}


class ServingError(ValueError):
    """A server that cannot be set up as declared. The message names the setting and what to do."""


@dataclass(frozen=True)
class Configuration:
    """What a server offers, as given to vLLM under `relseek` in `--additional-config`.

    `folder`: vectors are read from it and from nowhere else. `vectors`: files in it by name, offered from the start. `default`: what
    `custom.steer_multiplier` doses, `{"vector": name}` and, where its file does not say it, `"layers"`. `layers`: the blocks after which requests may
    steer, all unless given; fewer cost less. `capacity`: vectors that fit, each block of a vector counted. `rate`, `body`, `patience`: as in
    `guard.Settings`, which the embedded engine's server has instead.
    """

    folder: Path | None = None
    vectors: Mapping[str, str] = field(default_factory=dict)
    default: Mapping[str, Any] | None = None
    layers: tuple[int, ...] | None = None
    limits: Limits = field(default_factory=Limits)
    capacity: int = 512
    rate: int = 0
    body: int = 16 << 20
    patience: float = 30.0

    @classmethod
    def from_json(cls, content: Any) -> Configuration:
        """Read `{"folder", "vectors", "default", "layers", "dose_limit", "threshold_limit", "capacity", "rate", "body", "patience"}`, each optional.

        Raises:
            ServingError: an unknown setting, or one of another type.
        """
        known = {"folder", "vectors", "default", "layers", *NUMBERS}
        if not isinstance(content, Mapping) or not set(content) <= known:
            found = sorted(set(content) - known) if isinstance(content, Mapping) else shown(content)
            raise ServingError(f"relseek's configuration is an object of {', '.join(sorted(known))}; got {found}")
        vectors, default, layers = content.get("vectors", {}), content.get("default"), content.get("layers")
        if not isinstance(vectors, Mapping) or not all(isinstance(value, str) for pair in vectors.items() for value in pair):
            raise ServingError("relseek's configuration: `vectors` is an object of files by name")
        if vectors and not isinstance(content.get("folder"), str):
            raise ServingError("relseek's configuration: `vectors` needs the `folder` in which the files lie")
        if default is not None and (not isinstance(default, Mapping) or not {"vector"} <= set(default) <= {"vector", "layers"}):
            raise ServingError("relseek's configuration: `default` has a `vector` by name and, where its file does not name the block, `layers`")
        if layers is not None and not (isinstance(layers, list) and layers and all(type(layer) is int for layer in layers)):
            raise ServingError("relseek's configuration: `layers` is a list of blocks, counted from 0")
        numbers = {name: content[name] for name in NUMBERS if name in content}
        for name, value in numbers.items():
            if isinstance(value, bool) or not isinstance(value, NUMBERS[name]) or not (0 < value < math.inf or (name == "rate" and value == 0)):
                whole = "a whole number" if NUMBERS[name] is int else "a number"
                raise ServingError(f"relseek's configuration: `{name}` must be {whole} above 0, or 0 for no `rate`, got {shown(value)}")
        return cls(
            folder=Path(content["folder"]) if isinstance(content.get("folder"), str) else None,
            vectors=dict(vectors),
            default=dict(default) if default is not None else None,
            layers=tuple(sorted(set(layers))) if layers is not None else None,
            limits=Limits(float(numbers.get("dose_limit", Limits.dose)), float(numbers.get("threshold_limit", Limits.threshold))),
            capacity=numbers.get("capacity", cls.capacity),
            rate=numbers.get("rate", cls.rate),
            body=numbers.get("body", cls.body),
            patience=float(numbers.get("patience", cls.patience)),
        )


@dataclass(frozen=True, eq=False)
class Registered:
    """A vector under its name: float32 (width,) by block, or by None where one vector serves whichever block a request names.

    `home` is the block that the file of a single vector names, where a request that names none steers.
    """

    name: str
    file: str
    sha256: str
    home: tuple[int, ...]
    tensors: Mapping[int | None, np.ndarray]
    digests: Mapping[int | None, str]

    @classmethod
    def of(cls, name: str, file: str, content: bytes, vectors: Mapping[int | None, np.ndarray]) -> Registered:
        """A file's content under a name; `vectors` as `vector_files.VectorFile` has them."""
        home = tuple(block for block in vectors if block is not None)
        tensors: dict[int | None, np.ndarray] = dict(vectors) if len(vectors) > 1 else {None: next(iter(vectors.values()))}
        return cls(name, file, hashlib.sha256(content).hexdigest(), home, tensors, {block: digest_of(one) for block, one in tensors.items()})

    @property
    def anywhere(self) -> bool:
        return None in self.tensors

    def at(self, layer: int) -> np.ndarray:
        return self.tensors[None if self.anywhere else layer]

    def digest(self, layer: int) -> str:
        return self.digests[None if self.anywhere else layer]


class Vectors:
    """The vectors that a server offers.

    >>> vectors = Vectors(configuration, blocks=30, width=576)
    >>> entries = requests.read('[{"vector": "warm", "multiplier": 1.5}]', vectors)
    """

    def __init__(self, configuration: Configuration, blocks: int, width: int) -> None:
        """Read the vectors that the configuration names.

        Raises:
            ServingError: a layer that the model lacks, a default vector that is not there, a file that is refused (see `read`).
        """
        self.configuration, self.limits, self.width = configuration, configuration.limits, width
        missing = [layer for layer in configuration.layers or () if not 0 <= layer < blocks]
        if missing:
            raise ServingError(f"relseek's configuration: layers {missing}; the model has the blocks 0 to {blocks - 1}")
        self.blocks = frozenset(range(blocks) if configuration.layers is None else configuration.layers)
        self.by_name: dict[str, Registered] = {}
        self.default = configuration.default
        try:
            for name, file in configuration.vectors.items():
                self.add(self.read(name, file))
            if self.default is not None:
                layers = self.layers(self.named(self.default["vector"], "default"), self.default.get("layers"), "default")
                self.default = {**self.default, "layers": layers} if "layers" in self.default else self.default
        except SteeringError as error:
            raise ServingError(f"relseek's configuration: {error}") from error

    # --- registering --------------------------------------------------------------------------------------------------

    def read(self, name: Any, file: Any) -> Registered:
        """Read a file of the declared folder under a name, without offering it yet.

        Raises:
            SteeringError: a file outside the folder (links followed) or of another kind than safetensors, an unreadable one, another width, NaN,
                nothing but zeros, a name that stands for something else already, more vectors than fit.
        """
        from relseek_resources.vector_files import VectorFileError, read_vectors  # needs pandas and pyarrow: see `plugin.py`

        if not isinstance(name, str) or not NAME.fullmatch(name):
            raise SteeringError(f"name {shown(name)}: 1 to 100 letters, digits and _ . : @ + -, the first a letter or digit")
        path = self._inside(file)
        try:
            content = path.read_bytes()
            found = read_vectors(path, content)
        except OSError as error:
            raise SteeringError(f"file {shown(file)}: cannot be read ({error.strerror})") from error
        except VectorFileError as error:
            raise SteeringError(str(error).replace(str(path), f"file {shown(file)}")) from error
        if found.width != self.width:
            raise SteeringError(f"file {shown(file)}: vectors of width {found.width}; the model's residual stream needs {self.width}")
        if not any(vector.any() for vector in found.vectors.values()):
            raise SteeringError(f"file {shown(file)}: nothing but zeros; no dose of it would steer")
        new = Registered.of(name, str(file), content, found.vectors)
        outside = sorted(set(new.home) - self.blocks)
        if outside:
            raise SteeringError(f"file {shown(file)}: vectors for the blocks {outside}, after which this server does not steer")
        self._check_room(new)
        return new

    def add(self, new: Registered) -> None:
        """Offer a vector under its name. What is there already stays as it is."""
        self._check_room(new)
        self.by_name.setdefault(new.name, new)

    def _check_room(self, new: Registered) -> None:
        there = self.by_name.get(new.name)
        if there is not None and (dict(there.digests), there.home) != (dict(new.digests), new.home):
            held = f"sha256 {there.sha256[:16]}, blocks {list(there.home)}"
            raise SteeringError(f"name {new.name!r} stands for another vector ({held}) as long as this server runs; choose another name")
        digests = {digest for one in (*self.by_name.values(), new) for digest in one.digests.values()}
        room = self.configuration.capacity
        if len(digests) > room:
            raise SteeringError(f"{len(digests)} vectors, each block counted, do not fit: this server was started with `capacity` {room}")

    def _inside(self, file: Any) -> Path:
        folder = self.configuration.folder
        if folder is None:
            raise SteeringError("this server declares no folder of vectors; start it with one")
        if not isinstance(file, str) or not file or "\0" in file or len(file) > 1000:
            raise SteeringError(f"file {shown(file)}: name a safetensors file of the declared folder")
        try:
            root = folder.resolve(strict=True)
            path = (root / file).resolve(strict=True)
        except (OSError, RuntimeError) as error:
            raise SteeringError(f"file {shown(file)}: there is none in the declared folder") from error
        if not path.is_relative_to(root) or not path.is_file():
            raise SteeringError(f"file {shown(file)}: there is none in the declared folder")
        if path.suffix != ".safetensors":
            raise SteeringError(f"file {shown(file)}: only .safetensors files are read")
        if path.stat().st_size > self.configuration.capacity * self.width * 8 + SLACK:
            raise SteeringError(f"file {shown(file)}: larger than all vectors that fit this server")
        return path

    # --- looking up ---------------------------------------------------------------------------------------------------

    def named(self, name: Any, where: str) -> Registered:
        found = self.by_name.get(name) if isinstance(name, str) else None
        if found is None:
            raise SteeringError(f"{where}: no vector {shown(name)}; there is {', '.join(sorted(self.by_name)) or 'none'}")
        return found

    def layers(self, vector: Registered, given: Any, where: str) -> list[int]:
        """The blocks that a request names, or those of the vector's file."""
        if given is None:
            if not vector.home:
                raise SteeringError(f"{where}: the file of vector {vector.name!r} names no block; give layers")
            return list(vector.home)
        layers: Sequence[Any] = given if isinstance(given, list) else [given]
        if not layers or not all(type(layer) is int for layer in layers) or len(set(layers)) < len(layers):
            raise SteeringError(f"{where}: layers must be a block or a list of blocks, each once, counted from 0")
        there = self.blocks if vector.anywhere else self.blocks & set(vector.home)
        outside = [layer for layer in layers if layer not in there]
        if outside:
            raise SteeringError(
                f"{where}: there is no steering after block {shown(outside[0])}; vector {vector.name!r} can steer after the blocks {_ranges(there)}"
            )
        return list(layers)

    def check_direction(self, vector: Registered, layers: Sequence[int], where: str) -> None:
        """Refuse a vector that is zero at a block where a projection is needed: it has no direction there."""
        for layer in layers:
            if not vector.at(layer).any():
                raise SteeringError(f"{where}: vector {vector.name!r} is zero at block {layer}: there is no direction to project on")

    def by_digest(self) -> dict[str, np.ndarray]:
        """Every vector once, by the digest of its content."""
        return {digest: one.tensors[block] for one in self.by_name.values() for block, digest in one.digests.items()}

    def described(self) -> list[dict[str, Any]]:
        """The vectors as the server lists them."""
        return [
            {
                "name": one.name,
                "file": one.file,
                "sha256": one.sha256,
                "width": self.width,
                "layers": list(one.home),
                "any_layer": one.anywhere,
                "norms": [float(np.linalg.norm(tensor)) for tensor in one.tensors.values()],
            }
            for _, one in sorted(self.by_name.items())
        ]


def digest_of(vector: np.ndarray) -> str:
    """The name of a vector by its content, 32 hex digits."""
    return hashlib.sha256(np.ascontiguousarray(vector, dtype="<f4").tobytes()).hexdigest()[:32]


def _ranges(blocks: frozenset[int]) -> str:
    """Blocks in words: 0 to 29, or 3, 5 to 7."""
    ordered = sorted(blocks)
    starts = [block for block in ordered if block - 1 not in blocks]
    ends = [block for block in ordered if block + 1 not in blocks]
    return ", ".join(str(start) if start == end else f"{start} to {end}" for start, end in zip(starts, ends, strict=True))
