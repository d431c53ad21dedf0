"""What a killed run left is there when the same site is trained again, whatever ran in between and whatever the study says of disk."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import dagster as dg
import numpy as np
import pandas as pd
import pytest

from relseek_assets.stage import Store
from relseek_assets.study import load_study
from relseek_assets.vectors import assets, bipo
from relseek_assets.vectors.launched import HELDOUT, TRAINING, Request, Result, _write_result

PAIRS = pd.DataFrame(
    {
        "pair": [f"p{number}" for number in range(14)],
        "split": ["train"] * 10 + ["heldout"] * 4,
        "prompt": [[{"role": "user", "content": "why " * (1 + number % 4)}] for number in range(14)],
        "chosen": [f"yes {number}" for number in range(14)],
        "rejected": ["no " * (1 + number % 5) for number in range(14)],
    }
)
MODEL: Any = SimpleNamespace(name="m", source="tiny", dtype="float32", device="cpu", epochs_trained=2)


REFERENCE = 10 + 4  # pairs that the reference passes over training and held-out pairs report


class Killed(Exception):
    pass


class Launches:
    """Stands in for `accelerate launch`: every layer's training leaves a checkpoint and, unless `during` ends it, a result."""

    def __init__(self) -> None:
        self.during: Callable[[Request, Path], None] = lambda _request, _path: None

    def run(self, _context: Any, _module: str, path: Path, _processes: int) -> dict[str, Any]:
        request = Request.read(path)
        for layer in request.layers:
            checkpoint = Path(request.folder) / f"L{layer:02d}" / "checkpoint.safetensors"
            checkpoint.parent.mkdir(exist_ok=True)
            checkpoint.write_text("here")
        self.during(request, path)
        vectors = np.zeros((2, 64), dtype=np.float32)
        for layer in request.layers:
            evaluation = bipo.Evaluation(1, 1, 0.5, 1.0, 0.1, 0.1, 0.0, 4)
            _write_result(request.result(layer), Result(bipo.TrainedVector(vectors, vectors[0], vectors[0], (evaluation,)), layer, 0))
        return {}


@pytest.fixture
def work(tiny_llama: Any, tmp_path: Path) -> Any:
    """As much of an asset's work as training looks at; `cache` sets the disk in bytes, `steps` counts training steps."""
    study = load_study("quickstart")
    made: Any = SimpleNamespace(
        store=Store(root=str(tmp_path)),
        context=SimpleNamespace(asset_key=dg.AssetKey(["study", "training_run"])),
        resources=SimpleNamespace(models=SimpleNamespace(load=lambda _settings, _log: tiny_llama), launcher=Launches()),
        log=SimpleNamespace(warning=pytest.fail),
        version=lambda name, _partition=None: f"version of {name}",
        done=lambda _pairs: None,
        progress=lambda *_: contextlib.nullcontext(lambda pairs: made.done(pairs)),
        folder=tmp_path / "study" / "training_run",
    )

    def cache(size: int) -> None:
        pairs = study.pairs.model_copy(update={"training": 0, "evaluation": 0, "max_tokens": 500})
        training = study.training.model_copy(update={"batch_size": 4})
        compute = study.compute.model_copy(update={"cache_gb": size / 1e9})
        made.study = study.model_copy(update={"pairs": pairs, "training": training, "compute": compute})

    made.cache = cache
    cache(2**30)
    return made


def trained(work: Any, *layers: int, train: Any = assets.trained_here) -> dict[str, Result]:
    return {site: result for site, result, _ in train(work, MODEL, [f"m:L{layer:02d}" for layer in layers], PAIRS)}


def killed_after(work: Any, pairs: int, *layers: int) -> None:
    """A run that ends after so many pairs, those of the two reference passes among them."""
    left = pairs

    def end(done: int) -> None:
        nonlocal left
        left -= done
        if left < 0:
            raise Killed

    work.done = end
    with pytest.raises(Killed):
        trained(work, *layers)
    work.done = lambda _pairs: None


def files(work: Any) -> dict[str, int]:
    return {str(path.relative_to(work.folder)): path.stat().st_size for path in work.folder.rglob("*") if path.is_file()}


def streams(work: Any) -> dict[str, int]:
    return {name: size for name, size in files(work).items() if name.endswith(".stream")}


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The layers of the training steps taken, with a checkpoint after each."""
    taken: list[int] = []
    step = bipo._take_step

    def counted(model: Any, layer: int, *arguments: Any) -> None:
        taken.append(layer)
        step(model, layer, *arguments)

    monkeypatch.setattr(bipo, "_take_step", counted)
    monkeypatch.setattr(bipo, "SAVE_EVERY", 0.0)
    return taken


@pytest.mark.parametrize("share", [0.0, 0.4, 0.9])
def test_a_smaller_cache_is_kept_to_by_the_run_that_goes_on(work: Any, share: float) -> None:
    whole = trained(work, 1)["m:L01"]
    killed_after(work, REFERENCE + 10, 1)
    needed = sum(streams(work).values())
    assert len(streams(work)) == 2
    for path in work.folder.rglob("heldout.*"):
        path.unlink()
    work.cache(int(share * needed))
    most = []
    work.done = lambda _pairs: most.append(sum(streams(work).values()))
    found = trained(work, 1)["m:L01"]
    assert most and max(most) <= share * needed
    np.testing.assert_allclose(found.run.vectors, whole.run.vectors, atol=1e-4)


def test_a_site_that_finishes_leaves_the_checkpoint_of_another_to_go_on_from(work: Any, steps: list[int]) -> None:
    whole = trained(work, 1)["m:L01"]
    in_all = steps.count(1)
    killed_after(work, REFERENCE + 7, 1)  # two steps
    left = files(work)
    assert any("checkpoint" in name for name in left) and len([name for name in left if name.endswith(".stream")]) == 2
    trained(work, 2)
    assert files(work) == left, "of layer 2 nothing is left, of layer 1 all"
    steps.clear()
    found = trained(work, 1)["m:L01"]
    assert 0 < steps.count(1) < in_all, "it goes on and does not begin again"
    assert found.run.vectors.tobytes() == whole.run.vectors.tobytes() and found.run.losses.tobytes() == whole.run.losses.tobytes()
    assert not list(work.folder.iterdir())


def test_a_site_that_is_done_leaves_nothing_when_the_next_one_of_its_run_is_killed(work: Any, steps: list[int]) -> None:
    del steps
    one_site = 2 * (10 + 2 * 4)
    killed_after(work, REFERENCE + one_site + 5, 1, 2)
    assert files(work) and not [name for name in files(work) if "L01" in name]
    trained(work, 2)
    assert not list(work.folder.iterdir())


def test_each_reference_pass_has_a_bar_that_reaches_its_end(work: Any) -> None:
    bars: list[list[Any]] = []

    def progress(total: int, _unit: str, what: str) -> Any:
        bars.append([what, total, 0])
        return contextlib.nullcontext(lambda pairs: bars[-1].__setitem__(2, bars[-1][2] + pairs))

    work.progress = progress
    trained(work, 1)
    assert bars[:2] == [["reference pass", 10, 10], ["held-out reference pass", 4, 4]]


def test_launches_of_two_sites_of_a_model_do_not_meet(work: Any) -> None:
    """The second is made, and ends, while the first runs."""
    launches = work.resources.launcher

    def beside(request: Request, path: Path) -> None:
        launches.during = lambda _request, _path: None
        before = files(work)
        assert trained(work, 2, train=assets.trained_by_launcher)["m:L02"].pairs == 2
        assert files(work) == before
        assert Request.read(path) == request
        assert all(len((path.parent / name).read_text().splitlines()) == count for name, count in ((TRAINING, 10), (HELDOUT, 4)))

    launches.during = beside
    assert trained(work, 1, train=assets.trained_by_launcher)["m:L01"].pairs == 1
    assert not list(work.folder.iterdir())


def test_a_killed_launch_keeps_its_checkpoints_until_its_sites_are_done(work: Any) -> None:
    launches = work.resources.launcher

    def end(_request: Request, _path: Path) -> None:
        raise Killed

    launches.during = end
    with pytest.raises(Killed):
        trained(work, 1, 2, train=assets.trained_by_launcher)
    launches.during = lambda _request, _path: None
    trained(work, 3, train=assets.trained_by_launcher)
    assert {Path(name).parts[1] for name in files(work) if "checkpoint" in name} == {"L01", "L02"}
    trained(work, 2, train=assets.trained_by_launcher)
    assert [Path(name).parts[1:] for name in files(work)] == [("L01", "checkpoint.safetensors")], "nor a request that nobody will take up"
    trained(work, 1, train=assets.trained_by_launcher)
    assert not list(work.folder.iterdir())
