"""BiPO on several processes: the vector, figures and files of one process, sharded weights, and a kill that changes no bit."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from pydantic import ValidationError

from relseek_assets.settings import Compute
from relseek_assets.vectors import bipo, stream_cache
from relseek_assets.vectors.launched import MODULE, Request, Result, read_result
from relseek_assets.vectors.objective import Pair, Schedule, token_pairs
from relseek_assets.vectors.trl_trainer import CHECKPOINT, BiPOTrainer, passes
from relseek_resources.compute import LAUNCH_OPTIONS, failure
from relseek_resources.models import SteeredModel, load
from relseek_resources.storage import read_tensors

CHECKOUT = Path(__file__).parents[2]
LIMIT = 500
SCHEDULE = Schedule(beta=0.1, learning_rate=0.05, weight_decay=0.01, batch_size=4, warmup_steps=3, max_grad_norm=0.1, epochs=2)
PATIENCE = 240


def conversation(number: int) -> list[dict[str, str]]:
    turns = [{"role": "system", "content": "be"}, {"role": "user", "content": "why " * (1 + number % 4)}]
    return [*turns, {"role": "assistant", "content": "so"}, {"role": "user", "content": "and?"}] if number % 3 == 0 else turns


TRAINING = [Pair(f"t{number}", conversation(number), f"yes {number}", "no " * (1 + number % 5)) for number in range(11)]  # batches of 4, 4 and 3
HELDOUT = [Pair(f"h{number}", conversation(number + 1), "yes", f"no {number}") for number in range(5)]


def here(model: SteeredModel, layer: int, schedule: Schedule = SCHEDULE) -> Any:
    """The same training in one process, by the trainer that caches."""
    training, heldout = (stream_cache.cache_pairs(model, pairs, [layer], count=0, max_tokens=LIMIT) for pairs in (TRAINING, HELDOUT))
    return bipo.train(model, layer, training, heldout, schedule, seed=5)


def assert_same_training(found: Any, expected: Any) -> None:
    """The same vectors after every epoch, step by step the same losses and signs, and the same held-out figures."""
    for vector, other in zip(found.vectors, expected.vectors, strict=True):
        assert vector @ other / (np.linalg.norm(vector) * np.linalg.norm(other)) > 0.9999
        assert np.linalg.norm(vector) == pytest.approx(np.linalg.norm(other), rel=1e-3)
    assert found.directions.tolist() == expected.directions.tolist()
    assert found.losses == pytest.approx(expected.losses, abs=1e-4)
    for one, other in zip(found.evaluations, expected.evaluations, strict=True):
        assert asdict(one) == pytest.approx(asdict(other), abs=1e-4)


# --- dealing batches to ranks -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
@pytest.mark.parametrize("at_once", [0, 1, 2])
@pytest.mark.parametrize("count", [1, 3, 4, 7, 32])
def test_every_pair_counts_once_and_all_ranks_make_as_many_passes(count: int, at_once: int, ranks: int) -> None:
    rows = list(range(100, 100 + count))
    dealt = [passes(rows, rank, ranks, at_once) for rank in range(ranks)]
    assert sorted(row for mine in dealt for part, counts in mine if counts for row in part) == rows
    assert len({len(mine) for mine in dealt}) == 1
    assert all(part and len(part) <= (at_once or count) for mine in dealt for part, _ in mine)


# --- one process ------------------------------------------------------------------------------------------------------


@pytest.fixture
def model(random_causal_lm: Any, byte_tokenizer: Any) -> SteeredModel:
    return SteeredModel(random_causal_lm("llama"), byte_tokenizer)


def trainer_of(model: SteeredModel, folder: Path, **settings: Any) -> BiPOTrainer:
    training, heldout = (token_pairs(model, pairs, count=0, max_tokens=LIMIT) for pairs in (TRAINING, HELDOUT))
    return BiPOTrainer(model, 1, training, heldout, SCHEDULE, seed=5, folder=folder / "L01", shared=folder, version="weights", **settings)


def test_the_vector_is_that_of_the_trainer_that_caches(tiny: SteeredModel, tmp_path: Path) -> None:
    trainer = trainer_of(tiny, tmp_path)
    trainer.train()
    trainer.close()
    assert_same_training(trainer.trained, here(tiny, 1))


@pytest.mark.parametrize("settings", [{"at_once": 3}, {"at_once": 1, "checkpoint_activations": True}])
def test_a_batch_in_parts_or_recomputed_gives_the_same_vector(model: SteeredModel, tmp_path: Path, settings: dict[str, Any]) -> None:
    trainer = trainer_of(model, tmp_path, **settings)
    trainer.train()
    trainer.close()
    assert_same_training(trainer.trained, here(model, 1))


def test_a_closed_trainer_leaves_the_model_as_it_was(model: SteeredModel, tmp_path: Path) -> None:
    batch = model.batch([[5, 6, 7]])
    before = model.model(batch.ids).logits
    trainer = trainer_of(model, tmp_path)
    trainer.train()
    trainer.close()
    assert torch.equal(model.model(batch.ids).logits, before)
    assert "forward" not in vars(model.model) and not model.blocks[1]._forward_hooks
    assert not any(weight.requires_grad for weight in model.model.parameters())


def test_rewards_at_both_signs_are_those_of_the_steered_model(model: SteeredModel, tmp_path: Path) -> None:
    """Chosen stays chosen at d = -1: its reward is β times its own log-ratio, and accuracy is of the sign."""
    trainer = trainer_of(model, tmp_path)
    trainer.train()
    trainer.close()
    prompts = [pair.prompt for pair in HELDOUT]
    vector = trainer.trained.vectors[-1]
    for found in trainer.trained.evaluations[-2:]:
        rewards = {}
        for side in ("chosen", "rejected"):
            replies = [getattr(pair, side) for pair in HELDOUT]
            with model.steer(vector, 1, found.direction):
                steered = model.score(prompts, replies)
            rewards[side] = [0.1 * (one.total - other.total) for one, other in zip(steered, model.score(prompts, replies), strict=True)]
        margins = np.subtract(rewards["chosen"], rewards["rejected"])
        assert (found.reward_chosen, found.reward_rejected) == pytest.approx((np.mean(rewards["chosen"]), np.mean(rewards["rejected"])), abs=1e-4)
        assert found.accuracy == np.mean(found.direction * margins > 0)
    steps = [row for row in trainer.state.log_history if "rewards/margins" in row]
    last = {direction: next(row for row in reversed(steps) if row["direction"] == direction) for direction in (1, -1)}
    for direction, row in last.items():
        assert np.sign(row["rewards/margins"]) == direction, "a trained vector's margin has the sign of d"
        assert row["rewards/margins"] == pytest.approx(row["rewards/chosen"] - row["rewards/rejected"], abs=1e-5)
        assert row["rewards/accuracies"] == 1.0


class Stopped(Exception):
    pass


# of the reference pass's 16: after the first step, before the first evaluation, within it, and in the second epoch
@pytest.mark.parametrize("pairs", [20, 27, 31, 41])
def test_a_trainer_that_resumes_ends_with_the_same_bits(model: SteeredModel, tmp_path: Path, pairs: int) -> None:
    whole = trainer_of(model, tmp_path / "whole")
    whole.train()
    whole.close()
    done = 0

    def stop(count: int) -> None:
        nonlocal done
        done += count
        if done >= pairs:
            raise Stopped

    broken = trainer_of(model, tmp_path / "broken", every=0.0, report=stop)
    with pytest.raises(Stopped):
        broken.train()
    broken.close()
    again = trainer_of(model, tmp_path / "broken", every=0.0)
    again.train()
    again.close()
    assert len([row for row in again.state.log_history if "loss" in row]) < len(whole.losses), "it went on and did not begin again"
    assert again.trained.vectors.tobytes() == whole.trained.vectors.tobytes()
    assert again.trained.losses.tobytes() == whole.trained.losses.tobytes()
    assert again.trained.evaluations == whole.trained.evaluations


def test_a_checkpoint_of_other_settings_is_not_resumed(model: SteeredModel, tmp_path: Path) -> None:
    trainer = trainer_of(model, tmp_path)
    trainer.train()
    trainer.close()
    training, heldout = (token_pairs(model, pairs, count=0, max_tokens=LIMIT) for pairs in (TRAINING, HELDOUT))
    slower = replace(SCHEDULE, learning_rate=0.01)
    other = BiPOTrainer(model, 1, training, heldout, slower, seed=5, folder=tmp_path / "L01", shared=tmp_path, version="weights")
    other.train()
    other.close()
    assert_same_training(other.trained, here(model, 1, slower))


# --- two processes ----------------------------------------------------------------------------------------------------


def launch(request: Request) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2", *LAUNCH_OPTIONS]
    command += ["--log_dir", str(Path(request.folder) / "logs"), "-m", MODULE, str(request.path)]
    environment = {**os.environ, "PYTHONPATH": str(CHECKOUT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(command, env=environment, cwd=CHECKOUT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def launched(request: Request) -> None:
    assert launch(request).wait(PATIENCE) == 0, failure(Path(request.folder) / "logs")


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory, random_causal_lm: Any, byte_tokenizer: Any) -> Path:
    folder = tmp_path_factory.mktemp("model")
    random_causal_lm("llama").save_pretrained(folder)
    byte_tokenizer.save_pretrained(folder)
    return folder


def request_in(folder: Path, model_folder: Path, **settings: Any) -> Request:
    folder.mkdir(exist_ok=True)
    request = Request(str(folder), str(model_folder), "float32", "cpu", (1, 2), 0, 0, LIMIT, SCHEDULE, 5, **settings)
    request.write(TRAINING, HELDOUT)
    return request


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> Request:
    """A finished training of two layers by two processes."""
    request = request_in(tmp_path_factory.mktemp("two"), model_folder)
    launched(request)
    return request


@pytest.mark.slow
def test_two_processes_give_the_vectors_and_figures_of_one(two: Request, model_folder: Path) -> None:
    model = load(str(model_folder), device="cpu")
    for layer in two.layers:
        found = read_result(two.result(layer))
        assert found == Result(found.run, pairs=len(TRAINING), too_long=0)
        assert {one.pairs for one in found.run.evaluations} == {len(HELDOUT)}, "held-out figures are of every rank's pairs"
        assert_same_training(found.run, here(model, layer))


@pytest.mark.slow
def test_each_epoch_leaves_one_whole_vector(two: Request) -> None:
    run = read_result(two.result(1)).run
    for epoch in (1, 2):
        folder = Path(two.folder) / "L01" / f"e{epoch:02d}"
        assert [path.name for path in folder.iterdir()] == ["vector.safetensors"]
        arrays, header = read_tensors(folder / "vector.safetensors")
        assert arrays["vector"].tobytes() == run.vectors[epoch - 1].tobytes()
        assert (header["layer"], header["epoch"]) == ("1", str(epoch))


@pytest.mark.slow
def test_a_launch_killed_with_sigkill_ends_with_the_same_bits(two: Request, model_folder: Path, tmp_path: Path) -> None:
    request = request_in(tmp_path / "killed", model_folder, checkpoint_seconds=0.0)
    process = launch(request)
    checkpoint = Path(request.folder) / "L01" / CHECKPOINT
    limit = time.monotonic() + PATIENCE
    while not checkpoint.is_file() or len(read_tensors(checkpoint)[0]["losses"]) < 4:  # of six, so in the second epoch
        assert process.poll() is None and time.monotonic() < limit, failure(Path(request.folder) / "logs")
    ranks = psutil.Process(process.pid).children(recursive=True)
    for one in (*ranks, process):
        one.kill()
    process.wait()
    psutil.wait_procs(ranks, timeout=20)
    assert not request.result(1).exists()
    launched(request)
    for layer in request.layers:
        assert request.result(layer).read_bytes() == two.result(layer).read_bytes()


SHARDS = """
import sys, accelerate, torch
from pathlib import Path
from torch.distributed.tensor import DTensor
from relseek_assets.vectors import launched, trl_trainer
from relseek_resources.models import load
state = accelerate.PartialState(cpu=True)
sharded = trl_trainer.shard
def shard(model, device):
    on_meta = {weight.is_meta for weight in model.model.parameters()}
    assert on_meta == {state.process_index != 0}, "rank 0 alone reads the weights"
    sharded(model, device)
trl_trainer.shard = shard
model = launched.loaded(launched.Request.read(Path(sys.argv[1])), state, print)
whole = load(sys.argv[2], device="cpu")
there = list(zip(model.model.parameters(), whole.model.parameters(), strict=True))
for weight, expected in there:
    assert isinstance(weight, DTensor) and not weight.requires_grad
    assert weight.to_local().numel() <= -(-weight.shape[0] // 2) * weight[0].numel()
    assert torch.equal(weight.full_tensor(), expected)
for buffer, expected in zip(model.model.buffers(), whole.model.buffers(), strict=True):
    assert torch.equal(buffer, expected)
state.destroy_process_group()
"""


@pytest.mark.slow
@pytest.mark.parametrize("tied", [False, True])
def test_weights_are_read_once_and_each_rank_keeps_half(random_causal_lm: Any, byte_tokenizer: Any, tmp_path: Path, tied: bool) -> None:
    folder = tmp_path / "model"
    random_causal_lm("llama", tie_word_embeddings=tied).save_pretrained(folder)
    byte_tokenizer.save_pretrained(folder)
    request = request_in(tmp_path / "request", folder)
    script = tmp_path / "shards.py"
    script.write_text(SHARDS)
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2", *LAUNCH_OPTIONS, "--log_dir", str(tmp_path / "logs")]
    environment = {**os.environ, "PYTHONPATH": str(CHECKOUT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [*command, str(script), str(request.path), str(folder)], env=environment, cwd=CHECKOUT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


# --- the launched module ----------------------------------------------------------------------------------------------


def test_the_launched_module_imports_no_dagster() -> None:
    code = f"import sys, {MODULE}; assert 'torch' in sys.modules and 'dagster' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], cwd=CHECKOUT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_failure_shows_the_first_rank_s_error_and_the_end_of_its_log(tmp_path: Path) -> None:
    for rank, moment in ((0, 20), (1, 10)):
        folder = tmp_path / "run" / "attempt_0" / str(rank)
        folder.mkdir(parents=True)
        (folder / "error.json").write_text(f'{{"message": {{"message": "fault of {rank}", "extraInfo": {{"timestamp": "{moment}"}}}}}}')
        (folder / "stderr.log").write_text("".join(f"line {number} of {rank}\n" for number in range(40)))
    shown = failure(tmp_path)
    assert "fault of 1" in shown and "line 39 of 1" in shown
    assert "of 0" not in shown and "line 3 of 1" not in shown


def test_processes_without_the_launcher_are_refused() -> None:
    with pytest.raises(ValidationError, match="processes is read by the launcher 'accelerate' alone"):
        Compute(processes=2)
    assert Compute(launcher="accelerate", processes=2).processes == 2


def test_a_failure_without_an_error_shows_every_rank(tmp_path: Path) -> None:
    for rank in (0, 1):
        folder = tmp_path / str(rank)
        folder.mkdir()
        (folder / "stderr.log").write_text(f"last words of {rank}\n")
    shown = failure(tmp_path)
    assert "killed" in shown and "last words of 0" in shown and "last words of 1" in shown
