"""Batches of a language judge in the Dagster UI: the sensor's ticks, a batch in flight, its collection, and the plot of its scores."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.browser.conftest import Ui, serving, window_on
from tests.browser.test_ui import RUN_SECONDS, TICK_SECONDS, choose_partition, expect
from tests.judging.batch_server import BatchServer
from tests.platform.conftest import finished_session, judged_session  # noqa: F401  (fixtures)
from tests.platform.judged_by import KEY_VARIABLE, requests_of, table, with_judge

pytestmark = [pytest.mark.browser, pytest.mark.slow, pytest.mark.xdist_group("browser")]

SITE, STEP = "m:L01", "e02"
GROUP = f"gpt/{SITE}/{STEP}"
TICKS = """
{
  sensorOrError(sensorSelector: {repositoryName: "__repository__", repositoryLocationName: "tiny", sensorName: "judge_batches"}) {
    ... on Sensor { sensorState { status ticks(limit: 20) { status skipReason runIds } } }
  }
}
"""
RUNS = """
{ runsOrError(filter: {pipelineName: "judge_batches_collection"}) { ... on Runs { results { runId status tags { key value } } } } }
"""


@pytest.fixture(scope="module")
def server() -> Iterator[BatchServer]:
    with BatchServer(looks=10**9) as found:  # a batch stays where it is until the test moves it
        yield found


@pytest.fixture(scope="module")
def batched(
    chromium: str,
    server: BatchServer,
    finished_session: Any,  # noqa: F811
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Ui]:
    """The UI on a finished study of one site, epoch and judge whose requests have just been sent."""
    os.environ[KEY_VARIABLE] = "a key"
    platform = finished_session.copy(tmp_path_factory.mktemp("batches") / "platform")
    platform.edit("layers = [1, 2]", "layers = [1]")
    platform.edit("epochs_evaluated = [2, 3]", "epochs_evaluated = [2]")
    done = with_judge(platform, server.base_url).process("run", "STUDY", "--select", "judge_submissions")
    assert done.returncode == 0, done.stdout + done.stderr
    with serving(platform) as found:
        yield found
    del os.environ[KEY_VARIABLE]


@pytest.fixture
def window(browser: Any, batched: Ui, screenshots: Path, request: pytest.FixtureRequest) -> Iterator[Any]:
    with window_on(browser, screenshots, request, batched.url) as found:
        yield found


def ticks(ui: Ui) -> list[Any]:
    found = ui.ask(TICKS)["sensorOrError"]["sensorState"]
    assert found["status"] == "RUNNING", "it is on without anybody's turning it on"
    return list(found["ticks"])


def test_ticks_say_what_is_in_flight_since_when_and_what_it_will_cost(window: Any, batched: Ui, server: BatchServer, screenshots: Path) -> None:
    def in_flight() -> list[str]:
        return [tick["skipReason"] for tick in ticks(batched) if tick["skipReason"] and GROUP in tick["skipReason"]]

    said = batched.wait_for("a tick", in_flight, TICK_SECONDS)[0]
    assert re.fullmatch(rf"{GROUP}: batch_\w+ validating, 0 of 36 answered, sent .+ ago, at most \$0\.0\d+ to come", said)
    window.goto("/locations/tiny/sensors/judge_batches")
    expect(window.get_by_text("Next tick")).to_be_visible()
    told = re.compile(rf"{GROUP}: batch_\w+ validating")
    window.get_by_role("button", name="0 runs requested").first.wait_for()
    window.get_by_text("0 runs requested").first.hover()  # of the latest tick
    expect(window.get_by_text(told)).to_be_visible()
    window.screenshot(path=screenshots / "batches_ticks.png")
    window.get_by_role("button", name="0 runs requested").first.click()
    expect(window.get_by_text("Skip reason:")).to_be_visible()
    expect(window.get_by_role("dialog").get_by_text(told)).to_be_visible()
    window.goto("/assets/tiny/judge_answers?view=partitions")
    expect(window.get_by_text("Missing (1)")).to_be_visible()
    window.screenshot(path=screenshots / "batches_in_flight.png")
    window.goto("/assets/tiny/judge_submissions?view=partitions")
    expect(window.get_by_text("Materialized (1)")).to_be_visible()
    choose_partition(window, SITE)
    choose_partition(window, STEP)
    expect(window.get_by_text("estimated_usd", exact=True).first).to_be_visible()
    window.screenshot(path=screenshots / "batches_submitted.png")
    assert not (batched.platform.files / "judge_answers").exists()


def test_a_batch_that_ends_is_collected_and_what_follows_is_computed(window: Any, batched: Ui, server: BatchServer, screenshots: Path) -> None:
    server.looks = 1
    for batch_id in list(server.batches):
        for step in range(1, 4):
            server.batches[batch_id].step = step - 1
            server.look(batch_id)

    def ended() -> Any:
        runs = batched.ask(RUNS)["runsOrError"]["results"]
        return runs if runs and runs[0]["status"] in ("SUCCESS", "FAILURE", "CANCELED") else None

    (run,) = batched.wait_for("the collection to end", ended, TICK_SECONDS + RUN_SECONDS)
    assert run["status"] == "SUCCESS", batched.text()[-4000:]
    assert {"key": "relseek/follows", "value": f"{SITE}|{STEP}"} in run["tags"]
    assert len([tick for tick in ticks(batched) if run["runId"] in (tick["runIds"] or [])]) == 1
    asked = requests_of(batched.platform).query("site == @SITE and epoch == 2")
    assert set(table(batched.platform, "judge_answers")["custom_id"]) == set(asked["custom_id"])
    assert all(len(charges) == 1 for charges in server.charges.values()) and len(server.charges) == len(asked)
    window.goto(f"/runs/{run['runId']}")
    expect(window.get_by_text("judge_scores: 3 partitions computed")).to_be_visible()
    window.screenshot(path=screenshots / "batches_collection.png")
    window.goto("/locations/tiny/sensors/judge_batches")
    expect(window.get_by_text("1 run requested").first).to_be_visible()
    window.screenshot(path=screenshots / "batches_requested.png")


def test_the_plot_of_the_scores_is_in_the_assets_page(window: Any, batched: Ui, screenshots: Path) -> None:
    window.goto("/assets/tiny/judge_scores?view=partitions")
    expect(window.get_by_text("Materialized (3)")).to_be_visible()
    choose_partition(window, SITE)
    choose_partition(window, f"{STEP}@0_0")
    expect(window.get_by_text("relationship by gpt", exact=True)).to_be_visible()
    window.screenshot(path=screenshots / "batches_scores.png")
    window.get_by_text("[Show Markdown]").last.click()
    picture = window.get_by_role("dialog").get_by_role("img", name="figure")
    expect(picture).to_be_visible()
    assert picture.evaluate("image => image.complete && image.naturalWidth") > 600
    window.screenshot(path=screenshots / "batches_plot.png")
