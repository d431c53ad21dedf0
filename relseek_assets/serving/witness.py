"""The process that stands beside a server: it records the deployment once the server answers, looks at it from time to time, and records its end.

    python -m relseek_assets.serving.witness FILE    (a draft of the record; RELSEEK_KEY opens the server)

The server holds the other end of the pipe that is this process's standard input, so that it ends with the server, however that ended. Here belongs
when to look; what is recorded belongs in `deployments.py` and `assets.py`. Where a witness is killed as well, whoever asks next finds the server
silent.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path

from relseek_assets.serving import deployments
from relseek_assets.serving.deployments import Deployment, ServedVector

EVERY = 30.0  # seconds between two looks
FIRST = 1.0  # until the server answers for the first time


def start(deployment: Deployment, study_file: Path, files: Mapping[str, Path], key: str | None) -> None:
    """Have a witness stand beside this process from now on, also when it becomes another program.

    Args:
        deployment: a draft; the witness adds the versions of its vectors and the times.
        files: name -> the file of the store that a vector was copied from.
        key: opens the server, where it has one.
    """
    draft = {"deployment": asdict(deployment), "study_file": str(study_file), "files": {name: str(file) for name, file in files.items()}}
    handle, path = tempfile.mkstemp(prefix="relseek-deployment-", suffix=".json")
    with os.fdopen(handle, "w", encoding="utf-8") as stream:
        json.dump(draft, stream)
    reading, writing = os.pipe()
    os.set_inheritable(writing, True)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **({deployments.KEY: key} if key else {})}
    command = [sys.executable, "-m", "relseek_assets.serving.witness", path]
    # a session of its own, so that the Ctrl-C that ends the server does not end its witness first
    subprocess.Popen(command, stdin=reading, stdout=subprocess.DEVNULL, env=environment, start_new_session=True)
    os.close(reading)


def witness(deployment: Deployment, study_file: Path, files: Mapping[str, Path], every: float = EVERY) -> None:
    """Record the server when it answers, and its end; return after that."""
    from relseek_assets.commands import workspace_of
    from relseek_assets.serving import assets

    workspace = workspace_of(str(study_file))
    stage, store, instance = workspace.stage, workspace.store, workspace.instance
    workspace.observe()
    draft = assets.versioned(stage, store, instance, deployment, dict(files))
    key = os.environ.get(deployments.KEY)
    seen = deployments.asked(draft, key)
    while seen.state not in (deployments.RUNNING, deployments.LOCKED):
        if _ended(FIRST):
            return  # it never answered: nothing was deployed
        seen = deployments.asked(draft, key)
    seen = deployments.asked(replace(seen, started=deployments.now()), key, measure=True)
    if _ended(FIRST):
        return  # it was another server that answered: this one found its port taken
    folder = store.folder(stage.study.name)
    with deployments.locked(folder):
        deployments.write(deployments.record_file(folder, seen.deployment), seen)
    assets.report(stage, store, instance, [seen])
    while not _ended(every):
        assets.asked(stage, store, instance, only=seen.deployment)
    assets.report(stage, store, instance, [deployments.end(folder, seen.deployment)])


def _ended(patience: float) -> bool:
    """Whether the server's end of the pipe is closed, or closes within `patience` seconds."""
    readable, _, _ = select.select([sys.stdin], [], [], patience)
    return bool(readable)


def main() -> None:
    path = Path(sys.argv[1])
    draft = json.loads(path.read_text(encoding="utf-8"))
    path.unlink()
    content = draft["deployment"]
    vectors = tuple(ServedVector(**vector) for vector in content["vectors"])
    files = {name: Path(file) for name, file in draft["files"].items()}
    witness(Deployment(**{**content, "vectors": vectors}), Path(draft["study_file"]), files)


if __name__ == "__main__":
    main()
