"""Directions beside one another: cosines between vectors, a vector along an axis of many layers, a vector without another's direction.

Here belongs the arithmetic; which vectors a study compares belongs in `assets.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import pandas as pd

from relseek_assets.vectors.tables import cosine
from relseek_resources.storage import Column, TableSchema

SIDES = ("a", "b")
GEOMETRY = TableSchema(
    "vector_geometry",
    (
        Column("relation", "string", "what the two are to each other", choices=("epochs", "vectors", "axis")),
        Column("model", "string", "the model whose residual stream both live in"),
        *(
            Column(f"{name}_{side}", "string", f"{meaning} of the {'first' if side == 'a' else 'second'}")
            for side in SIDES
            for name, meaning in (
                ("study", "study"),
                ("kind", "`bipo`, `derived` or `contrastive`"),
                ("site", "model and layer"),
                ("step", "epoch `e10`, or extraction"),
            )
        ),
        Column("layer_a", "integer", "layer of the first", low=0),
        Column("layer_b", "integer", "layer of the second", low=0),
        Column("cosine", "number", "of the angle between them; empty where one has no length", nullable=True, low=-1.000001, high=1.000001),
        Column("width", "integer", "entries of either", low=1),
    ),
    key=("study_a", "site_a", "step_a", "study_b", "site_b", "step_b"),
)


class GeometryError(ValueError):
    """Vectors that have no common geometry, or a direction that leaves nothing; the message names them."""


@dataclass(frozen=True, eq=False)
class Named:
    """A vector and what it is called: (width,) float32, of a study, at a site, of an epoch or an extraction. `model` is the model's source."""

    study: str
    kind: str
    site: str
    step: str
    model: str
    values: np.ndarray

    @property
    def layer(self) -> int:
        return int(self.site.rpartition(":L")[2])


def comparable(first: Named, second: Named) -> bool:
    """Whether two vectors live in one residual stream: the same model and the same width."""
    return first.model == second.model and first.values.shape == second.values.shape


def compared(relation: str, pairs: Iterable[tuple[Named, Named]]) -> pd.DataFrame:
    """A row a pair, pairs of different models left out."""
    rows = []
    for first, second in pairs:
        if not comparable(first, second):
            continue
        row = {"relation": relation, "model": first.model, "cosine": cosine(first.values, second.values), "width": len(first.values)}
        for side, one in zip(SIDES, (first, second), strict=True):
            row |= {f"{name}_{side}": getattr(one, name) for name in ("study", "kind", "site", "step", "layer")}
        rows.append(row)
    return pd.DataFrame(rows, columns=list(GEOMETRY.names))


def every_pair(vectors: Sequence[Named]) -> Iterator[tuple[Named, Named]]:
    return combinations(vectors, 2)


def without(vector: np.ndarray, direction: np.ndarray, rescale: bool = False) -> np.ndarray:
    """v - (v·d̂) d̂, computed in double precision: what is left of a vector where another's direction is taken out.

    Args:
        vector, direction: (width,); of any length.
        rescale: give the rest the length that the vector had, so that a multiplier means as large a step as before.

    Raises:
        GeometryError: two widths, a direction without length, or nothing left.
    """
    if vector.shape != direction.shape:
        raise GeometryError(f"a vector of shape {vector.shape} and a direction of shape {direction.shape}; both must be of one model")
    whole, unit = vector.astype(float), direction.astype(float)
    length = np.linalg.norm(unit)
    if not length:
        raise GeometryError("the direction to be removed has no length")
    unit /= length
    rest = whole - (whole @ unit) * unit
    before, after = np.linalg.norm(whole), np.linalg.norm(rest)
    if after <= 1e-6 * before:
        raise GeometryError("nothing is left: the vector lies along the direction to be removed")
    return np.asarray(rest * (before / after if rescale else 1.0), dtype=np.float32)
