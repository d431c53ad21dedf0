"""The sensor and the schedule that look after batches: a look at what is in flight, and a run for every site and epoch whose answers are there.

Here belongs when to look and what to start. Looking belongs to `in_flight.py`, collecting to the asset `judge_answers`.
"""

from dataclasses import dataclass
from pathlib import Path

import dagster as dg

from relseek_assets.judging import in_flight
from relseek_assets.lineage import Lineage
from relseek_assets.partitions import multi_key
from relseek_assets.stage import Stage
from relseek_assets.study import Study
from relseek_resources.storage import StorageError, content_version

NAME = "judge_batches"
OP = "collect_answers"
FOLLOWS = "relseek/follows"  # tag of a run: the site and epoch whose answers it collects
PATIENCE = 20.0  # seconds that a tick waits for endpoints that do not answer; Dagster ends a tick after 60
ABOUT = "collects answers that are there and computes what follows from them"
UNFINISHED = [
    dg.DagsterRunStatus.QUEUED,
    dg.DagsterRunStatus.NOT_STARTED,
    dg.DagsterRunStatus.STARTING,
    dg.DagsterRunStatus.STARTED,
    dg.DagsterRunStatus.CANCELING,
]


@dataclass(frozen=True)
class Seen:
    """What a look found: partitions whose answers can be collected, each with what tells its collection from others; and lines for people."""

    ready: dict[str, str]
    lines: tuple[str, ...]


def looked(study: Study, folder: Path, instance: dg.DagsterInstance, stage: Stage) -> Seen:
    """Ask the endpoints what became of the study's batches, one list call each, and say so in words.

    A partition is ready when what it asks was sent, nothing of it is in flight, and its answers are not fresh: they were never collected, or a run
    died over it, or was about to ask again. One is ready too when it is time to create a batch again for which the provider had no room: a tick
    sends nothing. An endpoint that is dead or does not answer and a key that is not set are lines: the next look tries again.
    """
    try:
        faults = in_flight.look(study, folder, seconds=PATIENCE)
        groups = in_flight.asked(study, folder)
    except StorageError as error:
        return Seen({}, (str(error),))
    lineage = Lineage(instance, stage.graph)
    ready = {}
    for partition in dict.fromkeys(group.partition for group in groups):
        mine = [group for group in groups if group.partition == partition]
        if (any(group.due for group in mine) or not any(group.awaited for group in mine)) and _unanswered(lineage, stage, partition):
            known = lineage.version(stage.key("judge_answers"), _multi(partition))
            # one that was held and is held again has to look different, or its key is taken for a run that was started
            batches = [batch.batch_id or [batch.number, len(batch.former)] for group in mine for batch in group.batches]
            ready[partition] = content_version([partition, known, *batches])
    shown = [group.text() for group in groups if group.open or group.uncollected]
    if len(open_ := [group for group in groups if group.open]) > 1:
        shown.insert(0, f"{len(open_)} groups in flight, at most {in_flight.dollars(sum(group.to_come_usd for group in open_))} to come")
    return Seen(ready, (*faults, *shown))


def _unanswered(lineage: Lineage, stage: Stage, partition: str) -> bool:
    """Whether what is asked now was sent, and its answers are no asset yet."""
    sent, answered = (lineage.state(stage.key(name), _multi(partition)).status for name in ("judge_submissions", "judge_answers"))
    return sent == "fresh" and answered in ("missing", "stale")


def _multi(partition: str) -> dg.MultiPartitionKey:
    site, _, step = partition.partition("|")
    return multi_key(site, step)


def requests_for(seen: Seen, instance: dg.DagsterInstance, again: str = "") -> list[dg.RunRequest]:
    """A run for every ready partition that none is at work on."""
    found = []
    for partition, fingerprint in seen.ready.items():
        if not instance.get_runs(dg.RunsFilter(tags={FOLLOWS: partition}, statuses=UNFINISHED), limit=1):
            config = {"ops": {OP: {"config": {"partition": partition}}}}
            found.append(dg.RunRequest(run_key=f"{partition} {fingerprint} {again}".strip(), run_config=config, tags={FOLLOWS: partition}))
    return found


def collection(study: Study) -> dg.JobDefinition:
    """The job that a settled batch starts. A run has partitions of one kind, and what follows from answers has four, so that each step is a run of
    its own, as in `relseek run`; they stand beside this one in the list of runs.
    """

    @dg.op(name=OP, config_schema={"partition": str}, required_resource_keys={"store"}, description=ABOUT.capitalize() + ".")
    def collect(context: dg.OpExecutionContext) -> None:
        from relseek_assets.planning import Workspace  # which assembles this module

        partition = context.op_config["partition"]
        workspace = Workspace(study, context.instance, store=context.resources.store)
        for line in workspace.look():  # which has the time that a tick has not, and creates what was held
            context.log.warning(line)
        computed = workspace.follow(partition, context.log.info)
        context.log.info(f"{partition}: {computed} partitions computed")

    @dg.job(name=f"{NAME}_collection", executor_def=dg.in_process_executor, description=ABOUT.capitalize() + ", for one site and epoch.")
    def collected() -> None:
        collect()

    return collected


@dataclass(frozen=True)
class Watch:
    """What looks after the batches of a study; empty where no judge is asked by Batch."""

    sensors: tuple[dg.SensorDefinition, ...] = ()
    schedules: tuple[dg.ScheduleDefinition, ...] = ()
    jobs: tuple[dg.JobDefinition, ...] = ()


def build(stage: Stage) -> Watch:
    """The sensor, the schedule and the job of a study with judges that are asked by Batch."""
    study = stage.study
    if not in_flight.judges_of(study, in_flight.BATCH):
        return Watch()
    job = collection(study)

    @dg.sensor(
        name=NAME,
        job=job,
        minimum_interval_seconds=30,
        default_status=dg.DefaultSensorStatus.RUNNING,
        description=f"Looks at the judges' batches, one list call a tick, and {ABOUT}. Ticks say what is in flight and what it will cost.",
        required_resource_keys={"store"},
    )
    def judge_batches(context: dg.SensorEvaluationContext) -> dg.SensorResult | dg.SkipReason:
        seen = looked(study, context.resources.store.folder(study.name), context.instance, stage)
        for line in seen.lines:
            context.log.info(line)
        requests = requests_for(seen, context.instance)
        return dg.SensorResult(run_requests=requests) if requests else dg.SkipReason("\n".join(seen.lines) or "nothing is in flight")

    @dg.schedule(
        name=f"{NAME}_hourly",
        job=job,
        cron_schedule="7 * * * *",
        default_status=dg.DefaultScheduleStatus.RUNNING,
        description=f"Once an hour does what the sensor {NAME} does every half minute: {ABOUT}. Tries again where a collection has failed.",
        required_resource_keys={"store"},
    )
    def judge_batches_hourly(context: dg.ScheduleEvaluationContext) -> list[dg.RunRequest] | dg.SkipReason:
        seen = looked(study, context.resources.store.folder(study.name), context.instance, stage)
        for line in seen.lines:
            context.log.info(line)
        requests = requests_for(seen, context.instance, again=f"{context.scheduled_execution_time:%Y-%m-%dT%H}")
        return requests or dg.SkipReason("\n".join(seen.lines) or "nothing is in flight")

    return Watch((judge_batches,), (judge_batches_hourly,), (job,))
