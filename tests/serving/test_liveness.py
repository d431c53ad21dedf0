"""The health route tells steering from the noise of a model's own numbers, whatever their width."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from relseek_resources.serving import liveness
from relseek_resources.serving.requests import SteeringError
from relseek_resources.serving.vectors import Configuration, ServingError, Vectors
from relseek_resources.vector_files import write_vectors


@pytest.fixture
def vectors(tmp_path: Path) -> Vectors:
    write_vectors(tmp_path / "warm.safetensors", "safetensors", {1: np.ones(8, dtype=np.float32)}, {})
    ones, zeros = np.ones(8, dtype=np.float32), np.zeros(8, dtype=np.float32)
    write_vectors(tmp_path / "holed.safetensors", "safetensors", {0: ones, 1: zeros, 2: zeros, 3: ones}, {})
    return Vectors(Configuration(tmp_path, {"warm": "warm.safetensors", "holed": "holed.safetensors"}), blocks=4, width=8)


def found(vectors: Vectors, dtype: str, noise: float, effect: float, at_zero: float = 0.0, name: str = "warm") -> dict[str, Any]:
    """What is measured of a model whose log-probabilities move by +-`noise` from one time to the next, and by up to `effect` at a dose of 20."""
    drawn = np.random.default_rng(0)

    async def measure(interventions: list[dict[str, Any]] | None) -> dict[int, float]:
        dose = interventions[0]["multiplier"] if interventions else None
        shift = 0.0 if dose is None else at_zero if dose == 0 else effect * dose / 20
        numbers = -np.arange(20) / 4 + drawn.choice([-noise, noise], 20) + shift * np.linspace(-1, 1, 20)
        return dict(enumerate(numbers.tolist()))

    return asyncio.run(liveness.measured(measure, vectors, [vectors.by_name[name]], dtype))


@pytest.mark.parametrize(
    ("dtype", "noise", "effect", "at_zero", "live"),
    [
        ("torch.float32", 1e-5, 0.1, 0.0, True),
        ("torch.float32", 1e-5, 0.0, 0.0, False),
        ("torch.float32", 1e-5, 0.1, 1e-2, False),
        ("torch.float32", 0.0, 5e-3, 0.0, False),
        ("torch.bfloat16", 0.0625, 2.0, 0.0, True),  # a step of a logit near 20, as in a busy batch
        ("torch.bfloat16", 0.125, 4.0, 0.0, True),
        ("torch.bfloat16", 0.0, 2.0, 0.125, True),  # the repeats agreed, and the batch at dose 0 had another shape
        ("torch.bfloat16", 0.0625, 0.0, 0.0, False),
        ("torch.bfloat16", 0.0625, 2.0, 1.0, False),
        ("torch.float16", 0.0078, 0.5, 0.0, True),
        ("torch.float16", 0.0078, 0.5, 0.2, False),
        ("of another kind", 0.0625, 2.0, 0.0, True),
        ("torch.float32", 1.0, 2.0, 0.0, False),  # it does not repeat itself: nothing can be said of a dose
    ],
)
def test_a_dose_must_stand_out_from_the_noise_and_zero_must_not(
    vectors: Vectors, dtype: str, noise: float, effect: float, at_zero: float, live: bool
) -> None:
    said = found(vectors, dtype, noise, effect, at_zero)
    assert (said["live"], said["vectors"][0]["live"]) == (live, live), said


def test_a_vector_is_measured_at_a_block_where_it_is_not_zero(vectors: Vectors) -> None:
    """At the others no dose could show that it steers."""
    said = found(vectors, "torch.bfloat16", 0.0625, 2.0, name="holed")
    assert said["live"] and said["vectors"][0]["layer"] in (0, 3)
    assert not found(vectors, "torch.bfloat16", 0.0625, 0.0, name="holed")["live"]


def test_a_vector_of_zeros_is_not_offered(vectors: Vectors) -> None:
    folder = vectors.configuration.folder
    assert folder is not None
    for blocks in ((1,), (0, 1, 2)):
        write_vectors(folder / "none.safetensors", "safetensors", dict.fromkeys(blocks, np.zeros(8, dtype=np.float32)), {})
        with pytest.raises(SteeringError, match="nothing but zeros"):
            vectors.read("none", "none.safetensors")
        with pytest.raises(ServingError, match="nothing but zeros"):
            Vectors(Configuration(folder, {"none": "none.safetensors"}), blocks=4, width=8)


def test_what_is_no_number_is_not_live(vectors: Vectors) -> None:
    assert not found(vectors, "torch.float32", float("nan"), 1.0)["live"]

    async def nothing(_interventions: Any) -> dict[int, float]:
        return {}

    said = asyncio.run(liveness.measured(nothing, vectors, [], "torch.float32"))
    assert said["live"] is False and said["unsteered_again"] is None
