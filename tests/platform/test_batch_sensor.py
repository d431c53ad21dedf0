"""The sensor and the schedule of batches: what their ticks say and start, and that each collection happens once."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from relseek_assets.definitions import build_definitions
from relseek_assets.stage import Store
from relseek_assets.study import load_study
from tests.judging.batch_server import BatchServer, Fault
from tests.platform.judged_by import KEY_VARIABLE, complete_all, counts, requests_of, table, with_judge

CHECKOUT = Path(__file__).parents[2]
LISTS = "GET /v1/batches"
SITE_AND_EPOCH = "m:L01|e02"
#: What follows from the answers about one site and epoch, as far as other epochs and sites are not waited for.
FOLLOWS = {"judge_answers": 1, "judge_scores": 3, "judge_pairs": 1, "dose_response": 1, "candidate_items": 1}


@pytest.fixture(autouse=True)
def _key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY_VARIABLE, "a key")


@pytest.fixture
def server() -> Iterator[BatchServer]:
    with BatchServer(looks=2) as found:
        yield found


@pytest.fixture
def sent(finished: Any, server: BatchServer) -> Any:
    """A study whose four groups are in flight."""
    done = with_judge(finished, server.base_url).command("run", "STUDY", "--select", "judge_submissions")
    assert done.exit_code == 0, done.output
    return finished


class Location:
    """The study's code location in this process, its sensor and its schedule asked as the daemon asks them."""

    def __init__(self, platform: Any, instance: dg.DagsterInstance) -> None:
        study = load_study(str(platform.study_file))
        self.instance = instance
        self.store = Store(root=str(platform.home / "store"))
        self.repository = build_definitions(study, store=self.store).get_repository_def()

    def tick(self) -> Any:
        with dg.build_sensor_context(instance=self.instance, repository_def=self.repository, resources={"store": self.store}) as context:
            return self.repository.get_sensor_def("judge_batches").evaluate_tick(context)

    def hourly(self, hour: int) -> Any:
        moment = datetime(2026, 1, 1, hour, 7)
        resources = {"store": self.store}
        with dg.build_schedule_context(
            self.instance, scheduled_execution_time=moment, repository_def=self.repository, resources=resources
        ) as context:
            return self.repository.get_schedule_def("judge_batches_hourly").evaluate_tick(context)

    def execute(self, request: dg.RunRequest) -> Any:
        job = self.repository.get_job("judge_batches_collection")
        return job.execute_in_process(instance=self.instance, run_config=request.run_config, tags=request.tags, raise_on_error=False)


@contextlib.contextmanager
def location(platform: Any) -> Iterator[Location]:
    with dg.DagsterInstance.from_config(str(platform.home)) as instance:
        yield Location(platform, instance)


def test_both_are_on_by_default_and_only_where_a_judge_is_asked_by_batch(finished: Any) -> None:
    names = [sensor.name for sensor in build_definitions(load_study("quickstart")).sensors or []]
    assert "judge_batches" not in names and "quickstart_changed_sources" in names
    at_once = build_definitions(load_study(str(with_judge(finished, "http://127.0.0.1:9/v1", name="now", kind="openai").study_file)))
    assert not at_once.schedules and not at_once.jobs
    found = build_definitions(load_study(str(with_judge(finished, "http://127.0.0.1:9/v1").study_file)))
    by_name = {sensor.name: sensor for sensor in found.sensors or [] if isinstance(sensor, dg.SensorDefinition)}
    assert by_name["judge_batches"].default_status == dg.DefaultSensorStatus.RUNNING
    (schedule,) = found.schedules or []
    assert isinstance(schedule, dg.ScheduleDefinition)
    assert (schedule.name, schedule.default_status) == ("judge_batches_hourly", dg.DefaultScheduleStatus.RUNNING)


@pytest.mark.slow
def test_ticks_say_what_is_in_flight_and_start_each_collection_once(sent: Any, server: BatchServer) -> None:
    with location(sent) as here:
        server.calls.clear()
        first = here.tick()
        assert server.calls == [LISTS], "one list call a tick, however many batches are in flight"
        assert not first.run_requests
        head, *lines = first.skip_message.splitlines()
        assert head.startswith("4 groups in flight, at most $0.")
        assert len(lines) == 4
        assert lines[0].startswith(f"gpt/{SITE_AND_EPOCH.replace('|', '/')}: batch_")
        assert "0 of 36 answered, sent" in lines[0] and "at most $0.0" in lines[0]

        ticks = [here.tick() for _ in range(7)]
        ready = [tick for tick in ticks if tick.run_requests]
        assert ready, ticks[-1].skip_message
        again = here.tick()
        keys = [request.run_key for request in ready[0].run_requests]
        assert len(set(keys)) == len(keys) == 4
        assert [request.run_key for request in again.run_requests] == keys, "the daemon starts a run for a key once"

        request = ready[0].run_requests[0]
        assert request.tags["relseek/follows"] == SITE_AND_EPOCH
        assert here.execute(request).success
        made = {name: len(here.instance.get_materialized_partitions(dg.AssetKey(["tiny", name]))) for name in ("judge_answers",)}
        assert made == {"judge_answers": 1}
        rest = here.tick().run_requests
        assert [found.run_key for found in rest] == keys[1:], "what is collected is not ready any more"

        nightly, next_hour = here.hourly(3).run_requests, here.hourly(4).run_requests
        assert [found.tags["relseek/follows"] for found in nightly] == [found.tags["relseek/follows"] for found in rest]
        assert not {found.run_key for found in nightly} & {found.run_key for found in next_hour}, "one that failed is tried again in an hour"
        assert here.execute(request).success, "harmless twice"

    states = counts(sent)
    for asset, count in FOLLOWS.items():
        assert states[asset]["fresh"] == count, asset
    assert "fresh" not in states["site_candidates"], "the other epoch of the site is not there"
    mine = requests_of(sent).query("site == 'm:L01' and epoch == 2")
    assert set(table(sent, "judge_answers")["custom_id"]) == set(mine["custom_id"])
    assert all(len(charges) == 1 for charges in server.charges.values())


@pytest.mark.slow
def test_a_dead_endpoint_and_a_missing_key_are_words_of_the_tick(sent: Any, server: BatchServer, monkeypatch: pytest.MonkeyPatch) -> None:
    with location(sent) as here:
        server.faults.append(Fault("500", LISTS, count=100))
        monkeypatch.setattr("relseek_resources.judges.provider.pause", lambda seconds: None)
        dead = here.tick()
        assert not dead.run_requests
        assert "gpt: looking at the batches" in dead.skip_message
        assert "4 groups in flight" in dead.skip_message
        server.faults.clear()
        monkeypatch.delenv(KEY_VARIABLE)
        keyless = here.tick()
        assert f"gpt: the environment variable {KEY_VARIABLE} is not set" in keyless.skip_message
        monkeypatch.setenv(KEY_VARIABLE, "a key")
        assert KEY_VARIABLE not in here.tick().skip_message


@pytest.mark.slow
def test_a_group_is_cancelled_from_the_terminal_once_it_is_confirmed(sent: Any, server: BatchServer) -> None:
    told = sent.command("batches", "STUDY")
    assert told.exit_code == 0, told.output
    assert "4 of 4 groups in flight, $0.00 paid, at most $0." in told.output
    declined = sent.command("batches", "STUDY", "--cancel", "gpt/m:L01/e02")
    assert declined.exit_code == 1 and "Aborted" in declined.output
    assert not [call for call in server.calls if call.endswith("/cancel")]
    done = sent.command("batches", "STUDY", "--cancel", "gpt/m:L01/e02", "--yes")
    assert done.exit_code == 0, done.output
    assert len([call for call in server.calls if call.endswith("/cancel")]) == 1
    unknown = sent.command("batches", "STUDY", "--cancel", "gpt/m:L09/e02", "--yes")
    assert unknown.exit_code == 2 and "no group 'gpt/m:L09/e02'; there is gpt/m:L01/e02" in unknown.output


@pytest.mark.slow
def test_what_is_in_flight_is_left_out_of_a_run_from_the_ui_and_fails_nothing(sent: Any, server: BatchServer) -> None:
    chosen = [dg.AssetKey(["tiny", name]) for name in ("judge_answers", "judge_pairs", "dose_response")]
    before = sent.stored()
    with location(sent) as here:
        job = here.repository.get_implicit_global_asset_job_def().get_subset(asset_selection=set(chosen))
        tags = {"dagster/asset_partition_range_start": SITE_AND_EPOCH, "dagster/asset_partition_range_end": SITE_AND_EPOCH}
        made = job.execute_in_process(instance=here.instance, tags=tags, raise_on_error=False)
        assert made.success
        assert not [event for event in made.all_events if event.is_step_materialization]
        said = [record.user_message for record in here.instance.all_logs(made.run_id)]
    assert any("36 requests are in flight" in text for text in said)
    assert any("judge_pairs: 1 of 1 partitions left out: waits for batch batch_" in text for text in said)
    changed = {path for path, sha256 in sent.stored().items() if before.get(path) != sha256}
    assert not [path for path in changed if path.endswith(".parquet")]


#: A daemon's run that is killed when it has uploaded what is to be asked again and nobody knows.
DYING = """
import os, signal, sys
from pathlib import Path
from relseek_resources.judges import provider
from tests.platform.conftest import Platform
from tests.platform.test_batch_sensor import location
upload = provider.upload
def dying(*arguments, **options):
    upload(*arguments, **options)
    os.kill(os.getpid(), signal.SIGKILL)
provider.upload = dying
with location(Platform(Path(sys.argv[1]), Path(sys.argv[2]))) as here:
    for request in here.tick().run_requests:
        here.execute(request)
"""


@pytest.mark.slow
def test_a_collection_killed_while_it_asks_again_is_taken_up_by_the_sensor(sent: Any, server: BatchServer) -> None:
    hit = min(requests_of(sent).query("site == 'm:L01' and epoch == 2")["custom_id"])
    server.fates[hit] = ["prose"]
    complete_all(server)
    environment = {**sent.environment(), KEY_VARIABLE: "a key"}
    died = subprocess.run(
        [sys.executable, "-c", DYING, str(sent.folder), str(sent.model)], env=environment, cwd=CHECKOUT, capture_output=True, text=True
    )
    assert died.returncode == -signal.SIGKILL, died.stdout + died.stderr
    with location(sent) as here:
        for run in here.instance.get_runs(dg.RunsFilter(statuses=[dg.DagsterRunStatus.STARTED])):
            here.instance.report_run_failed(run)  # as the daemon's monitor does with a run whose process is gone
        for _ in range(12):
            tick = here.tick()
            for request in tick.run_requests or ():
                assert here.execute(request).success
        assert not tick.run_requests, "nothing is left to collect"
        assert len(here.instance.get_materialized_partitions(dg.AssetKey(["tiny", "judge_answers"]))) == 4
    asked = requests_of(sent)["custom_id"]
    assert {name: len(runs) for name, runs in server.charges.items()} == dict.fromkeys(asked, 1) | {hit: 2}
    assert len(server.created) == 5
