"""What is deployed of a study's vectors: a record for each server, and what the server says when it is asked.

Here belong the records, the asking and the rows of `served_models`. Which process writes a record belongs in `witness.py`, how it becomes an asset in
`assets.py`, starting servers in `relseek_assets/serve.py`.

A record is a file of its own, so that servers that run side by side do not write over one another. It says what the server said when it was last
asked; nothing is taken to run because it once did.
"""

from __future__ import annotations

import contextlib
import fcntl
import http.client
import json
import os
import socket
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import pandas as pd

from relseek_resources.storage import Column, StorageError, TableSchema, content_version, write_text

RUNNING, LOCKED, SILENT, REPLACED, ENDED = "running", "locked", "silent", "replaced", "ended"
STATES = (RUNNING, LOCKED, SILENT, REPLACED, ENDED)
LOCAL = ("127.0.0.1", "::1", "localhost")
QUICK, THOROUGH = 5.0, 120.0  # seconds for an answer from memory, and for a measurement through the whole engine
KEY = "RELSEEK_KEY"

SERVED_MODELS = TableSchema(
    "served_models",
    (
        Column("site", "string", "model and layer; of persona directions the model"),
        Column("epoch", "integer", "epoch of the vector; null for a direction", nullable=True, low=1),
        Column("vector", "string", "the vector's name on the server"),
        Column("sha256", "string", "of the file that is served"),
        Column("vector_version", "string", "data version of the vector that was deployed; null where another took its place before", nullable=True),
        Column("model", "string", "the model's name on the server"),
        Column("source", "string", "where the model was loaded from; null where the server was started by other means", nullable=True),
        Column("engine", "string", "`embedded` or `vllm`"),
        Column("address", "string", "where the server answers"),
        Column("machine", "string", "the machine that the server was started on"),
        Column("deployment", "string", "which start of which server"),
        Column("started", "string", "when it first answered, ISO 8601 in UTC"),
        Column("last_seen", "string", "when it last answered, ISO 8601 in UTC"),
        Column(
            "state",
            "string",
            "what it said when it was last asked: `running` with this very vector; `locked`: somebody answers and RELSEEK_KEY has never opened; "
            "`silent`; `replaced`: another server, or one without this vector, answers there; `ended`: its process is gone",
            choices=STATES,
        ),
        Column("live", "boolean", "whether a dose was measured to change the model and 0 not to; null where it could not be asked", nullable=True),
    ),
    key=("deployment", "vector"),
)


@dataclass(frozen=True)
class ServedVector:
    """A vector on a server: the partition that it was taken from, None for a file from elsewhere, and the data versions that it stands on, as
    Dagster's tags."""

    name: str
    sha256: str
    partition: str | None = None
    version: str | None = None
    inputs: dict[str, str] = field(default_factory=dict)
    live: bool | None = None


@dataclass(frozen=True)
class Deployment:
    """One start of one server. `source` is where its model was loaded from, where that is known."""

    deployment: str
    study: str
    engine: str
    model: str
    source: str | None
    address: str
    machine: str
    vectors: tuple[ServedVector, ...]
    started: str = ""
    last_seen: str = ""
    state: str = SILENT

    @property
    def may_run(self) -> bool:
        return self.state in (RUNNING, LOCKED)

    @property
    def reachable(self) -> bool:
        """Whether this machine can ask: another one's loopback address would lead to a server of our own."""
        return self.machine == socket.gethostname() or urllib.parse.urlsplit(self.address).hostname not in LOCAL

    def of(self, partition: str) -> list[ServedVector]:
        return [vector for vector in self.vectors if vector.partition == partition]


def now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def new_name() -> str:
    return f"{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}-{os.urandom(3).hex()}"


# --- records ------------------------------------------------------------------------------------------------------------


def record_file(folder: Path, deployment: str) -> Path:
    """Where a deployment is recorded; `folder` holds all files of its study."""
    return folder / "deployments" / f"{deployment}.json"


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """The records of a study for this process alone, to read and write without another one's words getting lost in between."""
    (folder / "deployments").mkdir(parents=True, exist_ok=True)
    with (folder / "deployments" / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def end(folder: Path, deployment: str) -> Deployment:
    """Record that a deployment's process is gone."""
    path = record_file(folder, deployment)
    with locked(folder):
        ended = replace(read(path), state=ENDED)
        write(path, ended)
    return ended


def write(path: Path, deployment: Deployment) -> None:
    write_text(path, json.dumps(asdict(deployment), indent=1) + "\n")


def read(path: Path) -> Deployment:
    """A record.

    Raises:
        StorageError: no record.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return Deployment(**{**content, "vectors": tuple(ServedVector(**vector) for vector in content["vectors"])})
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise StorageError(f"{path} is no record of a deployment ({error}); remove it") from error


def recorded(folder: Path) -> list[Deployment]:
    """Every deployment of a study, the oldest first."""
    return sorted((read(path) for path in (folder / "deployments").glob("*.json")), key=lambda found: (found.started, found.deployment))


# --- asking -------------------------------------------------------------------------------------------------------------


def get(address: str, path: str, key: str | None, patience: float) -> tuple[int | None, Any]:
    """Status and JSON of a server's answer; status None where nobody answers, or breaks off."""
    asked = urllib.request.Request(address + path, headers={"authorization": f"Bearer {key}"} if key else {})
    loopback = urllib.parse.urlsplit(address).hostname in LOCAL
    opener = urllib.request.build_opener(*([urllib.request.ProxyHandler({})] if loopback else []))
    try:
        try:
            answer = opener.open(asked, timeout=patience)
        except urllib.error.HTTPError as error:
            answer = error
        with answer:
            status, content = answer.status, answer.read()
    except (OSError, http.client.HTTPException):
        return None, None
    try:
        return status, json.loads(content)
    except ValueError:
        return status, None


def offered(content: Any) -> dict[str, str]:
    """Name -> SHA-256 of what a server lists at `/v1/relseek/vectors`; nothing where the answer is another server's."""
    try:
        return {one["name"]: one["sha256"] for one in content["vectors"]}
    except (KeyError, TypeError):
        return {}


def asked(deployment: Deployment, key: str | None, measure: bool = False) -> Deployment:
    """The deployment as its server describes itself now; with `measure`, the server also measures whether it steers."""
    status, content = get(deployment.address, "/v1/relseek/vectors", key, QUICK)
    if status is None or status >= 500:
        return replace(deployment, state=SILENT)
    if status in (401, 403):  # whoever has the key may have been let in; without it nothing is known against that
        return replace(deployment, state=RUNNING if deployment.state == RUNNING else LOCKED, last_seen=now())
    if status not in (200, 404):  # too many requests, say: somebody is there who will not talk now
        return deployment
    there = offered(content) if status == 200 else {}
    if any(there.get(vector.name) != vector.sha256 for vector in deployment.vectors):
        return replace(deployment, state=REPLACED)
    vectors = tuple(replace(vector, live=_live(deployment, vector, key)) for vector in deployment.vectors) if measure else deployment.vectors
    return replace(deployment, state=RUNNING, last_seen=now(), vectors=vectors)


def _live(deployment: Deployment, vector: ServedVector, key: str | None) -> bool | None:
    status, content = get(deployment.address, f"/v1/relseek/health?vector={urllib.parse.quote(vector.name)}", key, THOROUGH)
    return bool(content["live"]) if status in (200, 503) and isinstance(content, dict) and "live" in content else None


def look(folder: Path, key: str | None = None, measure: bool = False, only: str | None = None) -> list[Deployment]:
    """Ask every server that has not ended and that this machine can reach, keep what it says, and return those that say something new.

    Args:
        key: of the servers; RELSEEK_KEY unless given.
        only: the one deployment to ask, whose key a witness has; all unless given.
    """
    key, changed, there = key or os.environ.get(KEY), [], recorded(folder)
    last = {(one.machine, one.address): one.deployment for one in there if one.state not in (ENDED, REPLACED)}
    for before in there:
        if before.state in (ENDED, REPLACED) or not before.reachable or only not in (None, before.deployment):
            continue
        superseded = last[before.machine, before.address] != before.deployment
        after = replace(before, state=REPLACED) if superseded else asked(before, key, measure)
        with locked(folder):  # taken after the answer, which may be long in coming
            changed += _kept(record_file(folder, before.deployment), after, measure)
    return changed


def _kept(path: Path, said: Deployment, measured: bool) -> list[Deployment]:
    """Write what a server said over what is recorded by now: nothing against an end, which its witness alone knows, and a locked door is no news of
    a server that somebody has let in meanwhile. The record where it says something new."""
    there = read(path)
    if there.state in (ENDED, REPLACED):
        return []
    state = RUNNING if (said.state, there.state) == (LOCKED, RUNNING) else said.state
    new = replace(there, state=state, last_seen=max(said.last_seen, there.last_seen), vectors=said.vectors if measured else there.vectors)
    if new == there:
        return []
    write(path, new)
    return [] if replace(new, last_seen=there.last_seen) == there else [new]


# --- the table ----------------------------------------------------------------------------------------------------------


def rows(partition: str, site: str, epoch: int | None, deployments: Sequence[Deployment]) -> pd.DataFrame:
    """The rows of `served_models` for one vector, that of `site` and `epoch`: a row a deployment, the oldest first."""
    found = [
        {
            "site": site,
            "epoch": epoch,
            "vector": vector.name,
            "vector_version": vector.version,
            **{name: getattr(vector, name) for name in ("sha256", "live")},
            **{
                name: getattr(one, name)
                for name in ("model", "source", "engine", "address", "machine", "deployment", "started", "last_seen", "state")
            },
        }
        for one in deployments
        for vector in one.of(partition)
    ]
    return pd.DataFrame(found, columns=list(SERVED_MODELS.names), dtype=object)


def version(partition: str, deployments: Sequence[Deployment]) -> str:
    """The data version: which files were served by which models. When a server was last seen is no part of it."""
    return content_version([[one.deployment, one.engine, one.model, vector.sha256] for one in deployments for vector in one.of(partition)])


def stands_on(partition: str, deployments: Sequence[Deployment]) -> Mapping[str, str]:
    """The input versions that speak for a vector's deployments: of those that may run the oldest one's, so that one server that is behind shows as
    stale; where none does, the last one's."""
    mine = [one for one in deployments if one.of(partition)]
    speaks = next((one for one in mine if one.may_run), mine[-1])
    return speaks.of(partition)[0].inputs


def told(deployment: Deployment) -> str:
    """A deployment in one line."""
    names = ", ".join(vector.name for vector in deployment.vectors)
    return f"{deployment.address} ({deployment.engine}, {deployment.model}, {names}): {deployment.state}, last seen {deployment.last_seen}"
