"""The process that `accelerate launch` starts N times: `python -m relseek_assets.vectors.launched REQUEST.json`.

Here belong the request and the result as files, and what a rank does between them: it loads its shard of the model, trains every layer asked for and,
as rank 0, writes the vectors and tells Dagster how far it is. Nothing here imports Dagster itself, only the client of Dagster Pipes; who writes
requests and reads results is `assets.py`, and who launches is the compute resource.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from relseek_assets.vectors.bipo import Evaluation, TrainedVector
from relseek_assets.vectors.objective import Pair, Schedule, TokenPairs, token_pairs
from relseek_resources.models.loading import EMBEDDED, commit_of, converted, fingerprint, load
from relseek_resources.storage import content_version, read_jsonl, read_tensors, write_tensors, write_text

if TYPE_CHECKING:
    from relseek_resources.models import SteeredModel

MODULE = "relseek_assets.vectors.launched"
LAUNCHER = "RELSEEK_LAUNCHER"  # id of the process that asked for the training; when it is gone, so is the training
TRAINING, HELDOUT, REQUEST = "training.jsonl", "heldout.jsonl", "request.json"


@dataclass(frozen=True)
class Request:
    """What to train. In `folder` each layer has its checkpoint and its result; the request itself, its pairs as JSON Lines, the references and the
    logs lie in `own`, a folder within, so that launches of other layers of the model share `folder`.

    `training_count` and `heldout_count` take the first so many pairs that fit `max_tokens`, 0 all; a process takes `pairs_at_once` through the model
    together, 0 its whole share of a batch; `checkpoint_seconds` lie between two checkpoints.
    """

    folder: str
    source: str
    dtype: str
    device: str
    layers: tuple[int, ...]
    training_count: int
    heldout_count: int
    max_tokens: int
    schedule: Schedule
    seed: int
    pairs_at_once: int = 0
    checkpoint_activations: bool = False
    checkpoint_seconds: float = 30.0

    @property
    def own(self) -> Path:
        return Path(self.folder) / f"request.{content_version(sorted(self.layers))}"

    @property
    def path(self) -> Path:
        return self.own / REQUEST

    def write(self, training: Sequence[Pair], heldout: Sequence[Pair]) -> None:
        """Write the pairs and this request, in place of what killed launches of any of these layers in other company left."""
        for other in Path(self.folder).glob(f"request.*/{REQUEST}"):
            if other != self.path and set(json.loads(other.read_text(encoding="utf-8"))["layers"]) & set(self.layers):
                shutil.rmtree(other.parent)
        for name, pairs in ((TRAINING, training), (HELDOUT, heldout)):
            write_text(self.own / name, "".join(json.dumps(asdict(pair), ensure_ascii=False) + "\n" for pair in pairs))
        write_text(self.path, json.dumps(asdict(self), indent=1))

    @classmethod
    def read(cls, path: Path) -> Request:
        fields = json.loads(path.read_text(encoding="utf-8"))
        return cls(**{**fields, "layers": tuple(fields["layers"]), "schedule": Schedule(**fields["schedule"])})

    def result(self, layer: int) -> Path:
        return Path(self.folder) / f"L{layer:02d}.safetensors"

    def training(self, layer: int) -> Path:
        """The folder of a layer's checkpoint and of each epoch's vector."""
        return Path(self.folder) / f"L{layer:02d}"

    def remove(self, layer: int) -> None:
        """Remove a layer's files; with those of the last, the request and whatever folder is empty then."""
        self.result(layer).unlink(missing_ok=True)
        shutil.rmtree(self.training(layer), ignore_errors=True)
        if not any(self.result(other).exists() for other in self.layers):
            shutil.rmtree(self.own, ignore_errors=True)
        with suppress(OSError):
            Path(self.folder).rmdir()


@dataclass(frozen=True)
class Result:
    """One layer's training: the vectors, how many pairs trained them, and how many were too long."""

    run: TrainedVector
    pairs: int
    too_long: int


def read_result(path: Path) -> Result:
    arrays, header = read_tensors(path)
    evaluations = tuple(Evaluation(**row) for row in json.loads(header["evaluations"]))
    run = TrainedVector(arrays["vectors"], arrays["losses"], arrays["directions"], evaluations)
    return Result(run, int(header["pairs"]), int(header["pairs_too_long"]))


def _write_result(path: Path, result: Result) -> None:
    arrays = {"vectors": result.run.vectors, "losses": result.run.losses, "directions": result.run.directions}
    evaluations = json.dumps([asdict(found) for found in result.run.evaluations])
    header = {"evaluations": evaluations, "pairs": str(result.pairs), "pairs_too_long": str(result.too_long)}
    write_tensors(path, arrays, header)


# --- a rank -----------------------------------------------------------------------------------------------------------


def train(request: Request) -> None:
    """Train the request's layers one after another; a layer whose checkpoint is at its end costs nothing again.

    Raises:
        RuntimeError: this process was not started by `accelerate launch`.
    """
    import accelerate
    import torch
    from torch import distributed

    cpu = request.device == "cpu" or (request.device == "auto" and not torch.cuda.is_available())
    state = accelerate.PartialState(cpu=cpu)
    if not distributed.is_initialized():
        raise RuntimeError(f"start this by `accelerate launch --use_fsdp ... -m {MODULE} REQUEST.json`; docs/vectors.md has the whole line")
    with telling(state.is_main_process) as tell:
        model = loaded(request, state, tell.log)
        limit = request.max_tokens
        training = token_pairs(model, list(_pairs(request, TRAINING)), count=request.training_count, max_tokens=limit)
        heldout = token_pairs(model, list(_pairs(request, HELDOUT)), count=request.heldout_count, max_tokens=limit)
        for what, found in (("training", training), ("held-out", heldout)):
            if found.alike:
                tell.log(f"{found.alike} {what} pairs are left out, because their two replies are the same")
        started = time.monotonic()
        for layer in request.layers:
            run = train_layer(request, layer, model, training, heldout, tell)
            if state.is_main_process:
                _write_result(request.result(layer), Result(run, len(training.names), training.too_long))
        on_gpu = state.device.type == "cuda"
        peak = torch.cuda.max_memory_allocated() if on_gpu else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        most = torch.tensor(peak, device=state.device)
        distributed.all_reduce(most, distributed.ReduceOp.MAX)
        tell.message({"processes": state.num_processes, "training_seconds": time.monotonic() - started, "peak_bytes_of_a_process": int(most)})
    state.destroy_process_group()


def loaded(request: Request, state: Any, log: Callable[[str], None]) -> SteeredModel:
    """The model, sharded over the ranks. Only rank 0 reads the weights; the others know their shapes until they get their shards."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    from relseek_assets.vectors.trl_trainer import shard
    from relseek_resources.models import SteeredModel

    log(f"loading {request.source} as {request.dtype}, sharded over {state.num_processes} processes")
    with state.main_process_first():  # who comes first converts an embedded model and reads its files
        if state.is_main_process:
            model = load(request.source, dtype=request.dtype, device="cpu", progress=log)
        else:
            where = str(converted(request.source)) if request.source.startswith(EMBEDDED) else request.source
            commit = commit_of(request.source)
            at = {"revision": commit} if commit else {}
            with torch.device("meta"):
                shapes = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(where, **at), dtype=getattr(torch, request.dtype))
            model = SteeredModel(shapes, AutoTokenizer.from_pretrained(where, **at))
    shard(model, state.device)
    return model


def train_layer(request: Request, layer: int, model: SteeredModel, training: TokenPairs, heldout: TokenPairs, tell: Tell) -> TrainedVector:
    from transformers import TrainerCallback

    from relseek_assets.vectors.trl_trainer import BiPOTrainer

    class Figures(TrainerCallback):
        def on_evaluate(self, args: Any, state: Any, control: Any, **given: Any) -> None:
            metrics = given["metrics"]
            pairs = {name: [metrics[f"eval_{direction}_{name}"] for direction in ("add", "sub")] for name in ("loss", "accuracy", "margin")}
            shown = ", ".join(f"{name} {plus:.4g} and {minus:.4g}" for name, (plus, minus) in pairs.items())
            tell.log(f"layer {layer}, epoch {round(state.epoch)}, held out at d = +1 and -1: {shown}")

    pairs, held = len(training.names), len(heldout.names)
    total = pairs + held + request.schedule.epochs * (pairs + 2 * held)  # the reference pass, then training and evaluation at both signs
    with closing(
        BiPOTrainer(
            model,
            layer,
            training,
            heldout,
            request.schedule,
            seed=request.seed,
            folder=request.training(layer),
            shared=request.own,
            version=content_version([fingerprint(request.source), request.dtype]),
            at_once=request.pairs_at_once,
            checkpoint_activations=request.checkpoint_activations,
            every=request.checkpoint_seconds,
            report=Progress(tell.log, f"BiPO layer {layer}", total),
            callbacks=[Figures()],
        )
    ) as trainer:
        trainer.train()
        return trainer.trained


def _pairs(request: Request, name: str) -> Iterator[Pair]:
    return (Pair(**row) for _, row in read_jsonl(request.own / name))


# --- what Dagster and the terminal are told ---------------------------------------------------------------------------


class Tell:
    """Rank 0's lines for the terminal, and with its figures for Dagster where that is listening; other ranks say nothing."""

    def __init__(self, pipes: Any, aloud: bool) -> None:
        self._pipes, self._aloud = pipes, aloud

    def log(self, line: str) -> None:
        if self._pipes is not None:
            self._pipes.log.info(line)
        if self._aloud:
            print(line, flush=True)

    def message(self, figures: Mapping[str, Any]) -> None:
        if self._pipes is not None:
            self._pipes.report_custom_message(dict(figures))
        else:
            self.log(json.dumps(figures))


@contextmanager
def telling(main: bool) -> Iterator[Tell]:
    from dagster_pipes import DAGSTER_PIPES_CONTEXT_ENV_VAR, open_dagster_pipes

    if main and DAGSTER_PIPES_CONTEXT_ENV_VAR in os.environ:
        with open_dagster_pipes() as pipes:
            yield Tell(pipes, True)
    else:
        yield Tell(None, main)


class Progress:
    """A line every ten seconds: how far, how fast, how much longer."""

    def __init__(self, log: Callable[[str], None], what: str, total: int) -> None:
        self._log, self._what, self._total = log, what, total
        self._start = self._said = time.monotonic()
        self._done = 0

    def __call__(self, pairs: int) -> None:
        self._done += pairs
        now = time.monotonic()
        if now - self._said > 10:
            rate = self._done / (now - self._start)
            left = (self._total - self._done) / rate
            self._log(f"{self._what}: {self._done} of {self._total} pairs, {rate:.2f} a second, about {left:.0f} s left")
            self._said = now


# --- the process ------------------------------------------------------------------------------------------------------


def _end_with(*processes: int) -> None:
    """End this process soon after one of `processes` has ended: nobody waits for the result any more, and a rerun would write beside us."""

    def watch() -> None:
        while all(_alive(process) for process in processes):
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


def main() -> None:
    from torch.distributed.elastic.multiprocessing.errors import record

    if len(sys.argv) != 2:
        sys.exit(f"usage: accelerate launch [options] -m {MODULE} REQUEST.json")
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Python's own handler waits for a collective that may never end
    _end_with(os.getppid(), *(int(process) for process in os.environ.get(LAUNCHER, "").split()))
    record(lambda: train(Request.read(Path(sys.argv[1]))))()


if __name__ == "__main__":
    main()
