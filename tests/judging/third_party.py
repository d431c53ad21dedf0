"""Batch servers that other people wrote, each on loopback in an environment of its own, and the small chat backend that answers for them.

Here belong making an environment, starting and stopping a server, and the backend; what is asked of a server belongs in the tests. The environment's
Python runs this file too (`python third_party.py PORT BACKEND`), so that outside of functions it imports the standard library alone.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

LOOPBACK = "127.0.0.1"
MODEL = "hash-judge"
AIBRIX = "aibrix==0.8.0"
AIBRIX_POOL = 4  # batches at work at once; further ones wait as `scheduling`
OGX = "ogx==1.5.0"
OGX_MODEL = f"tests/{MODEL}"  # OGX puts the provider's name before it
READY_SECONDS = 90.0
INSTALL_SECONDS = 900.0

# What a request's text may hold to make the backend do something other than answer with a score; WAITS takes the name of a gate.
FAILS, PROSE, WAITS = "[fails]", "[prose]", "[waits at {}]"


class Unavailable(RuntimeError):
    """The server cannot be had on this machine; the message says why."""


def score_of(text: str) -> int:
    """The score, 1 to 10, that the backend gives to a request whose last message is `text`."""
    return 1 + int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") % 10


@dataclass
class ChatBackend:
    """A chat-completions server in threads of this process.

    `asked` holds the text of every request in the order of arrival; a request that waits at a gate is answered when the test sets it.
    """

    address: str
    asked: list[str] = field(default_factory=list)
    gates: defaultdict[str, threading.Event] = field(default_factory=lambda: defaultdict(threading.Event))

    def answer(self, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        """Status and body of the reply to a chat completion's body."""
        text = body["messages"][-1]["content"]
        self.asked.append(text)
        if gate := re.search(r"\[waits at (\w+)\]", text):
            self.gates[gate[1]].wait()
        if FAILS in text:
            return 400, {
                "error": {"message": "this request is not to be answered", "type": "invalid_request_error", "param": None, "code": "refused"}
            }
        said = "somewhere around seven" if PROSE in text else json.dumps({"score": score_of(text)})
        prompt, completion = len(text.split()), len(said.split())
        return 200, {
            "id": f"chatcmpl-{len(self.asked)}",
            "object": "chat.completion",
            "created": int(time.time()),
            "model": body["model"],
            "choices": [{"index": 0, "finish_reason": "stop", "logprobs": None, "message": {"role": "assistant", "content": said}}],
            "usage": {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion},
        }


@contextmanager
def chat_backend() -> Iterator[ChatBackend]:
    """Serve `ChatBackend` on loopback; every gate opens at the end."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self.reply(200, {"object": "list", "data": [{"id": MODEL, "object": "model", "created": 0, "owned_by": "tests"}]})

        def do_POST(self) -> None:
            self.reply(*backend.answer(json.loads(self.rfile.read(int(self.headers["Content-Length"])))))

        def reply(self, status: int, body: dict[str, Any]) -> None:
            content = json.dumps(body).encode()
            try:
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)
            except ConnectionError:
                self.close_connection = True  # the server gave up waiting

        def log_message(self, format: str, *args: Any) -> None:
            """Nothing: the tests' output is no access log."""

    class Server(ThreadingHTTPServer):
        daemon_threads = True

    with Server((LOOPBACK, 0), Handler) as server:
        backend = ChatBackend(f"http://{LOOPBACK}:{server.server_port}")
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield backend
        finally:
            for gate in list(backend.gates.values()):
                gate.set()
            server.shutdown()
            thread.join()


def environment(requirement: str, interpreter: str, cache: Path) -> Path:
    """Python of the virtual environment that holds `requirement`, made on first use and kept in `cache`.

    Raises `Unavailable` with the end of pip's output where it cannot be installed. Another process that makes the same one is waited for.
    """
    folder = cache / "third-party" / f"{requirement.replace('==', '-')}-{_version(interpreter)}"
    python, finished = folder / "bin" / "python", folder / "finished"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if finished.exists():
            return python
        shutil.rmtree(folder, ignore_errors=True)
        pip = [str(python), "-m", "pip", "--disable-pip-version-check", "--no-input", "install", "--quiet", requirement]
        for command in ([interpreter, "-m", "venv", str(folder)], pip):
            try:
                done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=INSTALL_SECONDS)
            except subprocess.TimeoutExpired as late:
                raise Unavailable(f"{requirement} cannot be installed: {' '.join(command)} took more than {INSTALL_SECONDS:.0f} s") from late
            if done.returncode:
                raise Unavailable(f"{requirement} cannot be installed: {done.stdout.strip()[-500:]}")
        finished.touch()
    return python


def interpreter_of(*versions: str) -> str:
    """A Python of one of `versions` ("3.12"): the one that runs this, one on the PATH, or one of pyenv's; raises `Unavailable` if there is none."""
    if "{}.{}".format(*sys.version_info) in versions:
        return sys.executable
    pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv") / "versions"
    for version in versions:
        for candidate in (f"python{version}", *map(str, sorted(pyenv.glob(f"{version}.*/bin/python")))):
            # a name on the PATH may be a shim with nothing behind it
            if shutil.which(candidate) and _version(candidate) == version:
                return candidate
    raise Unavailable(f"there is no Python {' or '.join(versions)} on this machine")


def _version(interpreter: str) -> str:
    """`3.12`, or nothing where the interpreter does not run."""
    asked = subprocess.run([interpreter, "-c", "import sys; print('{}.{}'.format(*sys.version_info))"], capture_output=True, text=True)
    return asked.stdout.strip()


@contextmanager
def served(command: list[str], address: str, health: str, folder: Path, environ: dict[str, str]) -> Iterator[str]:
    """Run a server in `folder` until the end, from when `address`/`health` answers; yields the address of its API. Its output goes to server.log."""
    log = folder / "server.log"
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("OPENAI_", "AWS_", "PYTHON"))}
    with open(log, "w") as output:
        process = subprocess.Popen(command, cwd=folder, env={**inherited, **environ}, stdout=output, stderr=subprocess.STDOUT)
        try:
            _wait_until_ready(process, f"{address}/{health}", log)
            yield f"{address}/v1"
        finally:
            process.terminate()
            try:
                process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _wait_until_ready(process: subprocess.Popen[Any], url: str, log: Path) -> None:
    deadline = time.monotonic() + READY_SECONDS
    while True:
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except (urllib.error.URLError, OSError):
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{url} does not answer; the end of {log}:\n{log.read_text()[-3000:]}") from None
            time.sleep(0.1)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        return int(probe.getsockname()[1])


@contextmanager
def aibrix(folder: Path, cache: Path, backend: str) -> Iterator[str]:
    """AIBrix's metadata service with files in `folder`; yields the address that an OpenAI client takes as `base_url`."""
    python, port = environment(AIBRIX, interpreter_of("3.11", "3.12", "3.10"), cache), _free_port()
    environ = {
        "STORAGE_TYPE": "local",
        "METASTORE_TYPE": "local",
        "STORAGE_LOCAL_PATH": str(folder / "storage"),
        "AIBRIX_BATCH_JOB_POOL_SIZE": str(AIBRIX_POOL),
    }
    command = [str(python), str(Path(__file__).resolve()), str(port), backend]
    with served(command, f"http://{LOOPBACK}:{port}", "healthz", folder, environ) as address:
        yield address


@contextmanager
def ogx(folder: Path, cache: Path, backend: str) -> Iterator[str]:
    """OGX with its reference batches over `backend`; yields the address that an OpenAI client takes as `base_url`. Needs Python 3.12."""
    python, port = environment(OGX, interpreter_of("3.12"), cache), _free_port()
    store = {"table_name": "files", "backend": "sql"}
    provided = {
        "inference": ("remote::openai", {"base_url": f"{backend}/v1", "api_key": "none"}),
        "files": ("inline::localfs", {"storage_dir": str(folder / "files"), "metadata_store": store}),
        "batches": ("inline::reference", {"sqlstore": {"table_name": "batches", "backend": "sql"}, "max_concurrent_requests_per_batch": 4}),
    }
    settings = {
        "version": 2,
        "distro_name": "tests",
        "apis": list(provided),
        "providers": {api: [{"provider_id": "tests", "provider_type": kind, "config": config}] for api, (kind, config) in provided.items()},
        "storage": {
            "backends": {
                "kv": {"type": "kv_sqlite", "db_path": str(folder / "kv.db")},
                "sql": {"type": "sql_sqlite", "db_path": str(folder / "sql.db")},
            },
            "stores": {
                "metadata": {"namespace": "registry", "backend": "kv"},
                "inference": {"table_name": "inference", "backend": "sql", "enabled": False},
                "conversations": {"table_name": "conversations", "backend": "sql"},
                "prompts": {"table_name": "prompts", "backend": "sql"},
                "connectors": {"table_name": "connectors", "backend": "sql"},
            },
        },
        "server": {"host": LOOPBACK, "port": port},
    }
    configuration = folder / "ogx.yaml"  # JSON is YAML
    configuration.write_text(json.dumps(settings))
    command = [str(python.parent / "ogx"), "run", str(configuration), "--port", str(port), "--insecure"]
    with served(command, f"http://{LOOPBACK}:{port}", "v1/health", folder, {"HOME": str(folder)}) as address:
        yield address


def serve_aibrix(port: int, backend: str) -> None:
    """Inside AIBrix's environment: its own app without Kubernetes, whose requests go to `backend` four at a time."""
    import uvicorn
    from aibrix.batch.client import GatewayEndpointSource
    from aibrix.metadata import app as metadata

    # A dry run is how AIBrix runs alone on local files; it answers by echoing the request, and here by asking the backend.
    metadata.NoopEndpointSource = lambda: GatewayEndpointSource(backend, capacity=4, timeout=600)
    uvicorn.run(metadata.build_app(metadata.build_app_args(dry_run=True)), host=LOOPBACK, port=port)


if __name__ == "__main__":
    serve_aibrix(int(sys.argv[1]), sys.argv[2])
