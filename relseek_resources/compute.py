"""Where models run: in this process, loaded once and kept as long as it lives, or in several that `accelerate launch` starts.

Here belongs how processes are started, heard and ended. What they compute belongs to the stage whose module is launched.
"""

from __future__ import annotations

import gc
import json
import os
import shutil
import sys
import warnings
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import dagster as dg
from dagster._core.errors import DagsterPipesExecutionError

from relseek_resources import models
from relseek_resources.models.loading import EMBEDDED, converted
from relseek_resources.processes import cores

if TYPE_CHECKING:
    from relseek_resources.models import SteeredModel

warnings.filterwarnings("ignore", category=dg.PreviewWarning)  # of Pipes itself, about a part that is not used here


class ModelSettings(Protocol):
    """What a study says of a model."""

    @property
    def source(self) -> str: ...
    @property
    def dtype(self) -> str: ...
    @property
    def device(self) -> str: ...


class ModelLoader(dg.ConfigurableResource):
    """Loads a study's models into this process; steps that use it share the pool `gpu`."""

    def load(self, settings: ModelSettings, log: Any = None) -> SteeredModel:
        progress: Callable[[str], None] = log.info if log is not None else lambda message: None

        def tell(message: str) -> None:
            progress(message)
            print(message, file=sys.stderr, flush=True)  # a run's log is not on the terminal, and half a minute without a word looks like a fault

        if settings.source.startswith(EMBEDDED):
            converted(settings.source, tell)
        return _load(settings.source, settings.dtype, settings.device, _Ignored(progress))


class _Ignored:
    """A callable that the cache does not look at: all compare equal."""

    def __init__(self, call: Callable[[str], None]) -> None:
        self.call = call

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Ignored)

    def __hash__(self) -> int:
        return 0


def release() -> None:
    """Let go of the model of this process, so that others have the memory of the devices."""
    import torch

    _load.cache_clear()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@lru_cache(maxsize=1)
def _load(source: str, dtype: str, device: str, progress: _Ignored) -> SteeredModel:
    return models.load(source, dtype=dtype, device=device, progress=progress.call)


class LaunchError(RuntimeError):
    """Launched processes that failed. The message holds the first rank's error and the last lines of its log."""


class Launcher(dg.ConfigurableResource):
    """Runs a module in several processes by `accelerate launch`, heard through Dagster Pipes.

    Lines and figures that rank 0 reports show in the run's log as they come. When the step is cancelled the processes are ended with it.
    """

    def run(self, context: dg.AssetExecutionContext, module: str, request: Path, processes: int) -> dict[str, Any]:
        """Run `python -m MODULE REQUEST` in `processes` ranks, weights to be sharded by FSDP; return the figures that rank 0 reported.

        Logs of every rank go to a folder beside the request, and to the step's own output.

        Raises:
            LaunchError: a rank failed or was killed.
        """
        release()
        logs = request.parent / "logs"
        shutil.rmtree(logs, ignore_errors=True)
        threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, cores() // processes))
        command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", str(processes), *LAUNCH_OPTIONS]
        command += ["--num_cpu_threads_per_process", threads, "--log_dir", str(logs), "-m", module, str(request)]
        # torch's launcher gives its ranks 30 s to end before it kills them
        client = dg.PipesSubprocessClient(termination_timeout_seconds=60)
        try:
            done = client.run(context=context, command=command, env={"RELSEEK_LAUNCHER": str(os.getpid())})
        except DagsterPipesExecutionError:  # says only that the exit code was not 0
            raise LaunchError(f"{module} on {processes} processes failed.\n{failure(logs)}") from None
        return {name: value for message in done.get_custom_messages() for name, value in message.items()}


# One machine, a free port, the model loaded by what is launched, every rank's output in a file and on the terminal.
LAUNCH_OPTIONS = (
    *("--num_machines", "1", "--main_process_port", "0", "--mixed_precision", "no", "--dynamo_backend", "no"),
    *("--use_fsdp", "--fsdp_version", "2", "--fsdp_cpu_ram_efficient_loading", "false", "--tee", "3"),
)


def failure(logs: Path, lines: int = 15) -> str:
    """What the rank that failed first says of it, with the last lines of its log; of all ranks where none could say anything (killed)."""
    errors = {path.parent: json.loads(path.read_text())["message"] for path in logs.rglob("error.json")}
    first = sorted(errors, key=lambda rank: errors[rank]["extraInfo"]["timestamp"])[:1]
    parts = [f"Rank {rank.name}: {errors[rank]['message']}" for rank in first] or [
        "No rank left an error: one was killed, or ended while it started."
    ]
    for rank in first or sorted(path.parent for path in logs.rglob("stderr.log")):
        tail = (rank / "stderr.log").read_text(errors="replace").splitlines()[-lines:]
        parts.append("\n".join([f"The last lines of rank {rank.name}'s log, {rank / 'stderr.log'}:", *tail]))
    return "\n".join(parts)
