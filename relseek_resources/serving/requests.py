"""What a request asks for: which vectors, after which blocks, how much. Read from JSON, checked, and written in one canonical form.

Here belong the form of a request, the limits on it and its refusals. Where the vectors come from belongs in `vectors.py`; what is done to the
stream in `steering_op.py`, with the meaning that `relseek_resources.models.interventions` gives to the same names.

A request is a JSON list of interventions, each an object:

    {"vector": "warm", "layers": [12], "multiplier": 1.5}                              h + λv
    {"vector": "assistant", "layers": [12, 13], "mode": "floor", "threshold": [3, 2]}  the projection on v̂ is kept from falling below τ
    {"vector": "harm", "layers": 20, "mode": "ceiling", "threshold": 4.5}              the projection is kept from rising above τ
    {"vector": "accent", "mode": "ablate", "strength": 1}                              the share of the projection that is taken out

They work in the order given, each on what the one before it left, at every token of prompt and reply. Without `layers` a vector works after the
blocks that its file names. Any of them may also say `"sha256"`, that of the vector's file: a server that offers another content under the name
refuses it, so that whoever logs the hash knows what replied.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from relseek_resources.serving.vectors import Vectors

MODES = ("add", "floor", "ceiling", "ablate")  # an entry's mode is its place in this list
NUMBER_OF = {"add": "multiplier", "floor": "threshold", "ceiling": "threshold", "ablate": "strength"}
DEFAULT = {"add": 1.0, "ablate": 1.0}  # as in `Add` and `Ablate`; a bound has no default
MOST_PER_BLOCK = 8
LONGEST = 65_536  # characters of JSON; 8 interventions after each of 126 blocks, one by one, take about as many
SALT = "relseek:"


class SteeringError(ValueError):
    """A request for steering that cannot be met. The message says what is wrong and what there is."""


@dataclass(frozen=True)
class Limits:
    """The declared range of a server: |multiplier| and |threshold| at most. A strength is a share, 0 to 1."""

    dose: float = 20.0
    threshold: float = 10_000.0


@dataclass(frozen=True)
class Entry:
    """One intervention after one block. `digest` names the vector by its content; `value` has been rounded to float32."""

    layer: int
    mode: str
    digest: str
    value: float


def read(text: Any, vectors: Vectors) -> tuple[Entry, ...]:
    """The interventions of a request by block, in the order in which they work; none where all of them leave the model alone.

    Args:
        text: JSON text, or what it parses to.

    Raises:
        SteeringError: anything that is not as described above, an unknown vector or block, a number outside the declared range.
    """
    wanted = _parsed(text)
    entries = [entry for place, one in enumerate(wanted, 1) for entry in _entries(one, f"intervention {place}", vectors)]
    entries = sorted((entry for entry in entries if not _idle(entry)), key=lambda entry: entry.layer)  # stable: the order given stays within a block
    for layer in {entry.layer for entry in entries}:
        number = sum(entry.layer == layer for entry in entries)
        if number > MOST_PER_BLOCK:
            raise SteeringError(f"{number} interventions after block {layer}; at most {MOST_PER_BLOCK} work after one block")
    return tuple(entries)


def read_custom(custom: Any, vectors: Vectors) -> list[dict[str, Any]]:
    """The published request shape (spec section 6), `{"steer_multiplier": λ}`, as interventions: a dose of the server's default vector."""
    if not isinstance(custom, Mapping) or set(custom) != {"steer_multiplier"}:
        found = f"an object of {shown(', '.join(map(str, custom)))}" if isinstance(custom, Mapping) else shown(custom)
        raise SteeringError(f'custom: expected {{"steer_multiplier": number}}, got {found}')
    if vectors.default is None:
        raise SteeringError("custom.steer_multiplier: this server declares no default vector; name one in vllm_xargs.relseek")
    return [{**vectors.default, "multiplier": custom["steer_multiplier"]}]


def canonical(entries: Sequence[Entry]) -> str:
    """One text for one effect: equal for requests that steer alike, empty for none."""
    if not entries:
        return ""
    return json.dumps([[entry.layer, MODES.index(entry.mode), entry.digest, entry.value] for entry in entries], separators=(",", ":"))


def from_canonical(text: str) -> tuple[Entry, ...]:
    return tuple(Entry(layer, MODES[mode], digest, value) for layer, mode, digest, value in json.loads(text)) if text else ()


def cache_salt(text: str, given: str | None) -> str:
    """What sets the cached prefix of a steered request apart: its steering and the salt that its sender gave."""
    return SALT + hashlib.sha256(json.dumps([text, given]).encode()).hexdigest()


def check_salt(given: str | None) -> None:
    """Refuse a sender's salt that could name the cached prefix of somebody's steered request."""
    if given is not None and given.startswith(SALT):
        raise SteeringError(f"cache_salt: salts that begin with {SALT!r} are the server's own; choose another")


def _parsed(text: Any) -> list[Any]:
    if isinstance(text, str):
        if len(text) > LONGEST:
            raise SteeringError(f"{len(text)} characters of interventions; at most {LONGEST} are read")
        try:
            text = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise SteeringError(f"not valid JSON ({error})") from error
    if not isinstance(text, list):
        raise SteeringError(f"expected a JSON list of interventions, got {shown(text)}")
    return text


def _entries(one: Any, where: str, vectors: Vectors) -> list[Entry]:
    if not isinstance(one, Mapping):
        raise SteeringError(f"{where}: expected an object with `vector`, got {shown(one)}")
    mode = one.get("mode", "add")
    if not isinstance(mode, str) or mode not in MODES:
        raise SteeringError(f"{where}: mode {shown(mode)}; there is {', '.join(MODES)}")
    unknown = sorted(set(one) - {"vector", "sha256", "layers", "mode", NUMBER_OF[mode]})
    if unknown:
        raise SteeringError(f"{where}: unknown {', '.join(map(shown, unknown))}; mode {mode} takes vector, sha256, layers and {NUMBER_OF[mode]}")
    vector = vectors.named(one.get("vector"), where)
    if "sha256" in one and one["sha256"] != vector.sha256:
        raise SteeringError(f"{where}: vector {vector.name!r} has the sha256 {vector.sha256} here, and {shown(one['sha256'])} was asked for")
    layers = vectors.layers(vector, one.get("layers"), where)
    values = _values(one, mode, len(layers), where, vectors.limits)
    if mode != "add":
        vectors.check_direction(vector, layers, where)
    return [Entry(layer, mode, vector.digest(layer), value) for layer, value in zip(layers, values, strict=True)]


def _values(one: Mapping[str, Any], mode: str, layers: int, where: str, limits: Limits) -> list[float]:
    name = NUMBER_OF[mode]
    if name not in one and mode not in DEFAULT:
        raise SteeringError(f"{where}: mode {mode} needs a {name}")
    given = one.get(name, DEFAULT.get(mode))
    numbers = given if isinstance(given, list) and name == "threshold" else [given] * layers
    if len(numbers) != layers:
        raise SteeringError(f"{where}: {len(numbers)} thresholds for {layers} layers; give one, or one a layer")
    least, most = {"multiplier": (-limits.dose, limits.dose), "threshold": (-limits.threshold, limits.threshold), "strength": (0.0, 1.0)}[name]
    return [_number(number, f"{where}: {name}", least, most) for number in numbers]


def _number(value: Any, what: str, least: float, most: float) -> float:
    """`value` rounded to float32, refusing what is no number, not finite or outside the declared range."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise SteeringError(f"{what} must be a number, got {shown(value)}")
    if not least <= value <= most:  # false for NaN as well; integers of any length compare
        raise SteeringError(f"{what} {shown(value)} is outside the declared range {least:g} to {most:g}")
    return float(np.float32(value))


def _idle(entry: Entry) -> bool:
    return entry.value == 0 and entry.mode in ("add", "ablate")


def shown_name(name: str) -> str:
    """A field's name as `shown`, without the quotes; a name of letters is itself."""
    return shown(name).strip("'\"")


def shown(value: Any) -> str:
    """A value of a request in a message: short, whatever was sent."""
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 10**20:
        return "an integer of more than 20 digits"
    text = repr(value) if isinstance(value, str | int | float | bool | None) else type(value).__name__
    return text if len(text) <= 60 else f"{text[:57]}..."
