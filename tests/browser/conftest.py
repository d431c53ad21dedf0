"""A real Dagster UI with its daemon on a study whose vectors are trained and whose sweep is not, and a headless browser in front of it.

`relseek ui` runs as a user starts it, in a process of its own with a Dagster home of its own. Screenshots go to the folder that
RELSEEK_SCREENSHOTS names, or else to a temporary one.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import requests

from tests.platform.conftest import CHECKOUT, Platform, _new, tiny_model_folder  # noqa: F401  (the last is a fixture)

WIDTH, HEIGHT = 1400, 900
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
FLAGS = [
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
WAIT_MS = 60_000  # for anything to appear: a busy machine takes its time
START_SECONDS = 240  # about 25 on an idle machine, with a code location for every study


READY = """
{
  workspaceOrError { ... on Workspace { locationEntries { name loadStatus } } }
  instance { daemonHealth { allDaemonStatuses { daemonType healthy } } }
}
"""


@dataclass
class Ui:
    """The UI of a study: its address, its log, and questions to it in GraphQL."""

    platform: Platform
    url: str
    log: Path

    def ask(self, query: str, **variables: Any) -> Any:
        answer = requests.post(f"{self.url}/graphql", json={"query": query, "variables": variables}, timeout=60).json()
        assert "errors" not in answer, answer["errors"]
        return answer["data"]

    @staticmethod
    def wait_for(what: str, found: Callable[[], Any], seconds: float) -> Any:
        """The first true answer; fails saying what was waited for."""
        end = time.monotonic() + seconds
        while not (answer := found()):
            if time.monotonic() > end:
                pytest.fail(f"waited {seconds:.0f} s in vain for {what}")
            time.sleep(0.5)
        return answer

    def is_ready(self) -> bool:
        """Whether every code location has loaded and the daemon is at work."""
        try:
            answer = self.ask(READY)
        except requests.RequestException:
            return False
        entries = answer["workspaceOrError"].get("locationEntries", [])
        daemons = answer["instance"]["daemonHealth"]["allDaemonStatuses"]
        return (
            bool(entries)
            and all(entry["loadStatus"] == "LOADED" for entry in entries)
            and any(daemon["daemonType"] == "SENSOR" and daemon["healthy"] for daemon in daemons)
        )

    def text(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")


@contextlib.contextmanager
def serving(platform: Platform) -> Iterator[Ui]:
    """`relseek ui` on a free port until the block ends, whatever ends it; then nothing that it started is left."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = platform.folder / "ui.log"
    with log.open("w") as stream:
        process = subprocess.Popen(
            [sys.executable, "-m", "relseek_assets.cli", "ui", str(platform.study_file), "--port", str(port)],
            env=platform.environment(),
            cwd=CHECKOUT,
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    ui = Ui(platform, f"http://127.0.0.1:{port}", log)
    try:
        end = time.monotonic() + START_SECONDS
        while not ui.is_ready():
            assert process.poll() is None and time.monotonic() < end, f"the UI did not start:\n{ui.text()[-4000:]}"
            time.sleep(0.5)
        assert ui.ask("{ shouldShowNux }") == {"shouldShowNux": False}, "a pop-up about Dagster's community covers the page"
        yield ui
    finally:
        end_all(process)


def end_all(process: subprocess.Popen[bytes]) -> None:
    """End the UI and everything that it started: webserver, daemon, code servers and runs."""
    started = []
    with contextlib.suppress(psutil.NoSuchProcess):
        started = psutil.Process(process.pid).children(recursive=True)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGINT)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout=15)
    _, alive = psutil.wait_procs(started, timeout=3)
    for child in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait(timeout=15)


@pytest.fixture(scope="session")
def ui(chromium: str, tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ui]:  # noqa: F811
    """The UI on a tiny study of which only the pairs, their lengths, the vectors and each site's summary of them are there."""
    platform = _new(Platform(tmp_path_factory.mktemp("browser"), tiny_model_folder))
    done = platform.process("run", "STUDY", "--select", "conversation_lengths", "--select", "site_vector_summary")
    assert done.returncode == 0, done.stdout + done.stderr
    with serving(platform) as found:
        yield found


@pytest.fixture(scope="session")
def chromium() -> str:
    """The program; without it, or without the package that drives it, the browser tests are skipped."""
    pytest.importorskip("playwright.sync_api", reason="the browser tests need the package playwright")
    program = next(filter(None, map(shutil.which, BROWSERS)), None)
    if program is None:
        pytest.skip("the browser tests need Chromium on the PATH")
    return program


@pytest.fixture(scope="module")
def browser(chromium: str) -> Iterator[Any]:
    """One a module: while it is there, an event loop runs in this process, and other modules' `asyncio.run` would be refused."""
    from playwright import sync_api

    sync_api.expect.set_options(timeout=WAIT_MS)
    with sync_api.sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=chromium, args=FLAGS)
        yield found
        found.close()


@pytest.fixture(scope="session")
def screenshots(tmp_path_factory: pytest.TempPathFactory) -> Path:
    configured = os.environ.get("RELSEEK_SCREENSHOTS")
    folder = Path(configured) if configured else tmp_path_factory.mktemp("screenshots")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@contextlib.contextmanager
def window_on(browser: Any, screenshots: Path, request: pytest.FixtureRequest, base_url: str) -> Iterator[Any]:
    """A new window. Where a test fails, its last sight is among the screenshots."""
    context = browser.new_context(viewport={"width": WIDTH, "height": HEIGHT}, base_url=base_url, locale="en-GB")
    context.set_default_timeout(WAIT_MS)
    found = context.new_page()
    failed = request.session.testsfailed
    yield found
    if request.session.testsfailed > failed:
        found.screenshot(path=screenshots / f"failed_{request.node.name}.png")
    context.close()


@pytest.fixture
def page(browser: Any, ui: Ui, screenshots: Path, request: pytest.FixtureRequest) -> Iterator[Any]:
    with window_on(browser, screenshots, request, ui.url) as found:
        yield found
