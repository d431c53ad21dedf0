"""What a run of a study will compute, and computing it: missing and stale partitions of a selection and upstream of it, nothing fresh.

Here belong the plan, its estimate and its execution in this process. How staleness is judged belongs in `lineage.py`.
"""

from __future__ import annotations

import difflib
import fcntl
import json
import logging
import os
import re
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import dagster as dg
from dagster._core.storage.tags import ASSET_PARTITION_RANGE_END_TAG, ASSET_PARTITION_RANGE_START_TAG

from relseek_assets import sources
from relseek_assets.bill import Bill
from relseek_assets.definitions import build_definitions, build_stage
from relseek_assets.event_log import kept_open
from relseek_assets.judging import in_flight
from relseek_assets.lineage import STATUS, Lineage, State
from relseek_assets.partitions import Cell, cell_of, step_order
from relseek_assets.serving import assets as serving
from relseek_assets.serving.deployments import told
from relseek_assets.stage import SAID, StageAsset, Store, multi, partition_order
from relseek_assets.study import Study
from relseek_resources.processes import collect_seldom

Node = tuple[str, str | None]
ASKING = ("EndpointError", "BatchError", "OverBudget", "PriceError", "AuthorError")
# errors that say what to do; what they were raised from does not
EXPLAINED = ("StorageError", "VectorFileError", "GeometryError", "BehaviourError", "PersonaSetError", "ModelError", "TrialFault", *ASKING)
SHORT = 30.0  # seconds that an asset may be expected to take to share a run with others
PROCESS_TAG = "relseek/process"  # host:pid:start of the `relseek run` that a run lives in
MOST_OF_A_CHECK = 160  # characters of what a failed check found that a terminal is told


class PlanError(ValueError):
    """A selection that cannot be planned, or a run that failed; the message names the asset."""


@dataclass
class Task:
    """One asset of a plan: the partitions to compute and why, and how many more wait for an upstream result."""

    asset: StageAsset
    partitions: list[str | None] = field(default_factory=list)
    reasons: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    bytes: float = 0.0
    rows: float = 0.0
    measured: bool = False
    bill: Bill = field(default_factory=lambda: Bill(0.0))

    def add(self, partition: str | None, reason: str) -> None:
        self.partitions.append(partition)
        self.reasons[reason] = self.reasons.get(reason, 0) + 1


class Workspace:
    """One study in one instance: its graph, its states, its plan and its runs."""

    def __init__(self, study: Study, instance: dg.DagsterInstance, **overrides: Any) -> None:
        self.study = study
        self.instance = instance
        self.stage = build_stage(study)
        self.catalogue = self.stage.catalogue
        self.store: Store = overrides.get("store") or Store()
        self.definitions = build_definitions(study, **overrides)

    @property
    def graph(self) -> Any:
        return self.stage.graph

    def lineage(self) -> Lineage:
        """Versions and waits as they are now."""
        self._awaited: dict[str, Mapping[str | None, str]] = {}
        return self.stage.lineage(self.instance)

    def asset(self, name: str) -> StageAsset:
        """An asset by name, without the study's prefix.

        Raises:
            PlanError: with the closest name.
        """
        name = name.removeprefix(f"{self.study.name}/")
        if name not in self.catalogue:
            close = difflib.get_close_matches(name, self.catalogue, 1)
            raise PlanError(
                f"study {self.study.name} has no asset {name!r}; "
                + (f"did you mean {close[0]!r}?" if close else f"there is {', '.join(self.catalogue)}")
            )
        return self.catalogue[name]

    def partitions(self, name: str) -> list[str | None]:
        """The partitions of an asset that the study asks for, in the order of site, epoch and dose."""
        definition = self.graph.get(self.stage.key(name)).partitions_def
        keys: Sequence[str | None] = definition.get_partition_keys() if definition else [None]
        return sorted((multi(key) for key in keys if self.stage.partitions.exists(key)), key=partition_order)

    def order(self) -> list[str]:
        """Asset names, upstream first."""
        levels = self.graph.toposorted_asset_keys_by_level
        declared = list(self.catalogue)
        return [name for level in levels for name in sorted(self._mine(level), key=declared.index)]

    def _mine(self, keys: Iterable[dg.AssetKey]) -> set[str]:
        """Names of the study's own assets among keys; another study's may have the same name."""
        return {key.path[-1] for key in keys if key.path[0] == self.study.name} & self.catalogue.keys()

    def state(self, lineage: Lineage, node: Node) -> State:
        """A partition's state; one whose file is gone is missing whatever the event log says."""
        name, partition = node
        found = lineage.state(self.stage.key(name), partition)
        if found.status != "missing" and not self.path(name, partition).is_file():
            found = State("missing", "its file is gone from the store")
        awaited = self.awaited(name).get(None if partition is None else str(partition)) if found.status in ("missing", "stale") else None
        return replace(found, status="waiting", reason=awaited) if awaited else found

    def awaited(self, name: str) -> Mapping[str | None, str]:
        """Which partitions of an asset somebody outside is at work on, as far as is known here, and what they wait for."""
        waits = self.catalogue[name].waits
        if waits is None:
            return {}
        if name not in self._awaited:
            self._awaited[name] = waits(self.store.folder(self.study.name))
        return self._awaited[name]

    def look(self) -> list[str]:
        """Ask providers what became of the study's batches in flight; what went wrong, in words."""
        return in_flight.look(self.study, self.store.folder(self.study.name)) if self.study.judges else []

    def ask_servers(self) -> list[str]:
        """Ask the servers that the study's vectors are deployed on what they serve; a line for each that says something new."""
        return [told(found) for found in serving.asked(self.stage, self.store, self.instance)] if serving.NAME in self.catalogue else []

    def path(self, name: str, partition: str | None) -> Path:
        return self.store.path(self.stage.key(name), partition, self.catalogue[name].form)

    def states(self, names: Sequence[str] | None = None) -> dict[Node, State]:
        """The state of every partition of the named assets and of all upstream of them.

        A partition that is fresh by itself but reads one that is missing or stale is stale because of it. One that somebody outside is at work
        on, such as a provider of batches, is waiting, and so is what reads it; neither is ever planned. Upstream of an imported partition nothing
        is asked for. A partition is absent, and never planned, where what it is made from is not here: a
        published file, another study's asset, or all that it reads of one of the study's own assets. Of what a command records (`made_by`), the
        partitions that it has recorded are judged, and none is ever planned.
        """
        lineage = self.lineage()
        found: dict[Node, State] = {}

        def judged(node: Node) -> State:
            state = self.state(lineage, node)
            if state.status == "imported":
                return state
            inputs = lineage.parents(self.stage.key(node[0]), node[1])
            lacking = self._lacking(lineage, node[0], inputs)
            if lacking:
                return State("absent", lacking)
            read: dict[str, list[State]] = {}
            mine = [(key.path[-1], partition) for key, partition in inputs if self._mine([key])]
            for name, partition in mine:
                if self.stage.partitions.exists(partition):
                    read.setdefault(name, []).append(visit((name, multi(partition))))
            for name, _ in mine:  # of an epoch that this model is not evaluated at there is no dose
                if name not in read and name not in self.catalogue[node[0]].optional:
                    return State("absent", f"no {name} of it are asked for")
            for name, states in read.items() if state.status == "missing" else ():
                if name not in self.catalogue[node[0]].optional and {found.status for found in states} == {"absent"}:
                    return State("absent", states[0].reason)
            held = [found for states in read.values() for found in states if found.status == "waiting"]
            if held and state.status in ("missing", "stale", "fresh"):
                return replace(state, status="waiting", reason=held[0].reason)
            waiting = [name for name, states in read.items() if {"missing", "stale"} & {found.status for found in states}]
            if state.status == "fresh" and waiting:
                return replace(state, status="stale", reason=f"waits for {waiting[0]}")
            return state

        def visit(node: Node) -> State:
            if node not in found:
                found[node] = judged(node)
            return found[node]

        for name in names or self.order():
            for partition in self.partitions(name):
                if not self.catalogue[name].made_by or self.path(name, partition).is_file():
                    visit((name, partition))
        return found

    def _lacking(self, lineage: Lineage, name: str, inputs: Sequence[tuple[dg.AssetKey, str | None]]) -> str:
        """Why a partition of `name` cannot be made: the first published file or other study's asset among its inputs that is not here, or nothing."""
        for key, upstream in inputs:
            elsewhere = key.path[0] != self.study.name
            if elsewhere and key.to_user_string() not in self.catalogue[name].optional and lineage.version(key, upstream) is None:
                return f"needs {key.to_user_string()} {upstream or ''}; `relseek run {key.path[0]}` computes it"
            if not elsewhere and key.path[-1] in sources.OPTIONAL and lineage.version(key, upstream) in (None, sources.ABSENT):
                return f"absent from {key.path[-1]}"
        return ""

    def unmet(self, select: Sequence[str] = ()) -> list[str]:
        """What of the selection waits for another study, a line an asset."""
        lineage = self.lineage()
        lines = []
        for name in [self.asset(chosen).name for chosen in select] or self.order():
            key = self.stage.key(name)
            if any(parent.path[0] != self.study.name for parent in self.graph.get(key).parent_keys):
                found = [self._lacking(lineage, name, lineage.parents(key, partition)) for partition in self.partitions(name)]
                reasons = list(filter(None, found))
                lines += [f"{name}: {_count(len(reasons), 'partition')} left out: {reasons[0]}"] if reasons else []
        return lines

    def in_flight(self) -> list[str]:
        """What the study's judges have in flight, a line a group: how far, since when, and what it will cost."""
        return [group.text() for group in in_flight.asked(self.study, self.store.folder(self.study.name)) if group.open]

    # --- plan ---------------------------------------------------------------------------------------------------------

    def plan(self, select: Sequence[str] = ()) -> list[Task]:
        """What a run of the selection (default: everything) would compute, upstream first.

        Partitions that wait for a stale one are counted: they are computed only if its result comes out different.
        """
        for name in select:
            self.asset(name)
        states = self.states([self.asset(name).name for name in select] or None)
        tasks: dict[str, Task] = {}
        for name in self.order():
            for (asset, partition), state in sorted(states.items(), key=lambda found: partition_order(found[0][1])):
                if asset == name and state.status in ("missing", "stale") and not self.catalogue[name].made_by:
                    tasks.setdefault(name, Task(self.catalogue[name])).add(partition, state.reason or state.status)
        for task in tasks.values():
            self._estimate(task)
        return list(tasks.values())

    def _estimate(self, task: Task) -> None:
        records = self.instance.fetch_materializations(self.stage.key(task.asset.name), limit=50).records
        events = [record.asset_materialization for record in records if record.asset_materialization]
        figures = {
            name: [float(event.metadata[key].value) for event in events if key in event.metadata]  # type: ignore[arg-type]
            for name, key in (("seconds", "seconds"), ("bytes", "bytes"), ("rows", "dagster/row_count"))
        }
        count = len(task.partitions)
        task.measured = bool(figures["seconds"])
        task.seconds = count * (sum(figures["seconds"]) / len(figures["seconds"]) if task.measured else task.asset.seconds)
        for name in ("bytes", "rows"):
            if figures[name]:
                setattr(task, name, count * sum(figures[name]) / len(figures[name]))
        if task.asset.bill:
            task.bill = task.asset.bill(self.store.folder(self.study.name), task.partitions)

    # --- execution ----------------------------------------------------------------------------------------------------

    def run(self, select: Sequence[str] = (), say: Callable[[str], None] = lambda line: None) -> int:
        """Compute what is missing or stale in the selection and upstream of it; return the number of partitions computed.

        Raises:
            PlanError: a step failed; what was finished before it is kept, and a second call goes on from there.
        """
        collect_seldom()
        with self._alone(), kept_open(self.instance):
            return self._run(select, say)

    def recorded_settings(self) -> dict[str, Any] | None:
        """The settings of the last run here, by their dotted names; None where none has recorded them."""
        return json.loads(self._settings_file.read_text(encoding="utf-8")) if self._settings_file.is_file() else None

    def _record_settings(self) -> None:
        """Keep them beside the event log, for a comparison with another store. Not by `storage`, whose errors speak of the store's disk."""
        beside = self._settings_file.with_suffix(".tmp")
        beside.parent.mkdir(exist_ok=True)
        beside.write_text(json.dumps(self.study.flat_settings, indent=1), encoding="utf-8")
        os.replace(beside, self._settings_file)

    @property
    def _settings_file(self) -> Path:
        return Path(self.instance.root_directory) / ".settings" / f"{self.study.name}.json"

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Hold the study's lock, which dies with the process, so that two runs do not compute the same partitions."""
        folder = Path(self.instance.root_directory) / ".locks"
        folder.mkdir(exist_ok=True)
        with (folder / self.study.name).open("a+") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                lock.seek(0)
                raise PlanError(f"study {self.study.name} is being run by process {lock.read().strip() or '?'}; wait for it or end it") from error
            lock.truncate(0)
            lock.write(str(os.getpid()))
            lock.flush()
            yield

    def _run(self, select: Sequence[str], say: Callable[[str], None]) -> int:
        self.end_dead_runs()
        planned = self.plan(select)
        read = {key.path[-1] for task in planned for key in self.graph.get(self.stage.key(task.asset.name)).parent_keys}
        sources.check_seen(self.study, self.instance, read)
        self._record_settings()
        title = {task.asset.name: f"[{number}/{len(planned)}] {task.asset.name}" for number, task in enumerate(planned, 1)}
        done = 0
        held: dict[Node, str] = {}  # partitions that wait since this run began, and for what
        for tasks in self._together(planned):
            wanted: dict[str, list[str | None]] = {}
            for task in tasks:
                name = task.asset.name
                found, left_out = self._wanted(name, task.partitions, held)
                if left_out:
                    say(f"{title[name]}: {_count(len(left_out), 'partition')} left out: {left_out[0]}")
                if not found:
                    if not left_out:
                        say(f"{title[name]}: unchanged after all")
                    continue
                if task.asset.bill and (refusal := task.asset.bill(self.store.folder(self.study.name), found).refusal):
                    raise PlanError(f"{name}: {refusal}")
                say(f"{title[name]}: {_count(len(found), 'partition')} ...")
                wanted[name] = found
            start = time.monotonic()
            once, nothing = _Once(say), dict[str, list[str]]()
            try:
                for names, box in self._runs(wanted):
                    for line in self.held_pools(names):
                        say(line)
                    self._execute(names, box, once, nothing)
            finally:
                for name, reasons in nothing.items():
                    for line in without_results(reasons):
                        say(f"{title[name]}: {line}")
            for name in wanted:
                say(f"{title[name]}: done in {time.monotonic() - start:.1f} s{' with those beside it' if len(wanted) > 1 else ''}")
            done += sum(map(len, wanted.values()))
            for task in tasks:
                name = task.asset.name
                if name in wanted and task.asset.waits:  # what came back may have been asked again
                    undone, left_out = self._wanted(name, wanted[name], held)
                    done -= len(undone) + len(left_out)
                    if left_out:
                        say(f"{title[name]}: {_count(len(left_out), 'partition')} left out: {left_out[0]}")
        return done

    def _together(self, planned: Sequence[Task]) -> Iterator[list[Task]]:
        """A plan in the parts that share a Dagster run, which costs nearly half a second: short neighbours of one partition, none read by another.

        Whatever lies between two assets of a plan is in the plan too, so that what an asset reads itself is all to look at.
        """
        shared: list[Task] = []
        for task in planned:
            alone = task.partitions != [None] or task.seconds > SHORT or task.asset.waits is not None
            read = {key.path[-1] for key in self.graph.get(self.stage.key(task.asset.name)).parent_keys if self._mine([key])}
            if shared and (alone or read & {other.asset.name for other in shared}):
                yield shared
                shared = []
            if alone:
                yield [task]
            else:
                shared.append(task)
        if shared:
            yield shared

    def _runs(self, wanted: Mapping[str, Sequence[str | None]]) -> Iterator[tuple[list[str], list[str | None]]]:
        """The runs that compute what is wanted: (assets, partitions); several assets only where none has partitions."""
        if len(wanted) > 1:
            yield list(wanted), [None]
        for name, partitions in wanted.items() if len(wanted) == 1 else ():
            for box in self._boxes(name, partitions):
                yield [name], box

    def follow(self, target: str, say: Callable[[str], None] = lambda line: None) -> int:
        """Compute what is missing or stale of the answers about one site and epoch (a partition key) and of all that follows from them.

        What lacks anything else is left out: a selection among epochs of which some wait, a step whose other inputs are stale. Takes no lock, so that
        it may go on beside a `relseek run`: both write the same files.

        Raises:
            PlanError: a step failed; what was finished before it is kept.
        """
        followers, cell = self.stage.followers(), cell_of(target)
        states = self.states(followers)
        settled = {node for node, state in states.items() if state.status in ("fresh", "imported", "absent")}
        computed = 0
        for name in followers:
            unsettled = [partition for partition in self._of(name, cell) if states[(name, partition)].status in ("missing", "stale")]
            lineage = self.lineage()
            ready = [partition for partition in unsettled if self._read(lineage, name, partition) <= settled]
            wanted, _ = self._wanted(name, ready, {})
            for box in self._boxes(name, wanted) if wanted else ():
                self._execute([name], box, _Once(say), {})
            undone, left_out = self._wanted(name, wanted, {})
            if ready:
                settled |= {(name, partition) for partition in ready} - {(name, partition) for partition in undone} if not left_out else set()
                computed += len(wanted) - len(undone) - len(left_out)
                say(f"{name}: {_count(len(wanted), 'partition')} computed{f', left out: {left_out[0]}' if left_out else ''}")
        return computed

    def _of(self, name: str, target: Cell) -> list[str | None]:
        """The partitions of an asset that follow from one site and epoch; none of assets that have other partitions than sites."""
        mine = (None, self.stage.partitions.site_by_dose, self.stage.partitions.site_by_evaluated_epoch, self.stage.partitions.swept_site)
        if self.graph.get(self.stage.key(name)).partitions_def not in mine:
            return []
        found = [(cell_of(partition), partition) for partition in self.partitions(name)]
        return [partition for cell, partition in found if cell.site in (None, target.site) and cell.epoch in (None, target.epoch)]

    def _read(self, lineage: Lineage, name: str, partition: str | None) -> set[Node]:
        """What a partition reads of the study's own assets and cannot do without."""
        inputs = lineage.parents(self.stage.key(name), partition)
        mine = [(key.path[-1], multi(upstream)) for key, upstream in inputs if self._mine([key]) and self.stage.partitions.exists(upstream)]
        return {node for node in mine if node[0] not in self.catalogue[name].optional}

    def _wanted(self, name: str, partitions: Iterable[str | None], held: dict[Node, str]) -> tuple[list[str | None], list[str]]:
        """Of some partitions of an asset those that are missing or stale, and why others are left out: they wait, or read one that does (`held`)."""
        lineage = self.lineage()
        wanted: list[str | None] = []
        left_out = []
        for partition in partitions:
            state = self.state(lineage, (name, partition))
            inputs = [(key.path[-1], multi(upstream)) for key, upstream in lineage.parents(self.stage.key(name), partition)] if held else []
            reason = state.reason if state.status == "waiting" else next((held[node] for node in inputs if node in held), "")
            if reason and state.status != "imported":
                held[(name, partition)] = reason
                left_out.append(reason)
            elif state.status in ("missing", "stale"):
                wanted.append(partition)
        return wanted, left_out

    def _boxes(self, name: str, wanted: Sequence[str | None]) -> Iterator[list[str | None]]:
        """`wanted` as ranges that Dagster can run: neighbouring sites that want the same neighbouring steps."""
        if wanted == [None]:
            yield [None]
            return
        steps: dict[str, list[str]] = {}
        for partition in wanted:
            site, _, step = str(partition).partition("|")
            steps.setdefault(site, []).append(step)
        keys = [str(key) for key in self.graph.get(self.stage.key(name)).partitions_def.get_partition_keys()]
        all_sites = list(dict.fromkeys(key.partition("|")[0] for key in keys))
        all_steps: list[str] = sorted({key.partition("|")[2] for key in keys}, key=step_order)
        for sites in _neighbours(list(steps), all_sites, lambda one, two: steps[one] == steps[two]):
            for part in _neighbours(sorted(steps[sites[0]], key=step_order), all_steps):
                yield [multi(f"{site}|{step}" if step else site) for site in sites for step in part]

    def _execute(self, names: Sequence[str], box: Sequence[str | None], say: Callable[[str], None], nothing: dict[str, list[str]]) -> None:
        """Compute a box of partitions in a Dagster run; what assets warn of goes to `say`, why partitions hold nothing into `nothing`, by asset."""
        keys = {self.stage.key(name) for name in names}
        tags = {}
        if box[0] is not None:
            tags = {ASSET_PARTITION_RANGE_START_TAG: str(box[0]), ASSET_PARTITION_RANGE_END_TAG: str(box[-1])}
        checked = keys.union(*map(self._checked_sources, keys))
        checks = {check for check in self.definitions.resolve_asset_graph().asset_check_keys if check.asset_key in checked}
        job = self.definitions.resolve_implicit_global_asset_job_def().get_subset(asset_selection=keys, asset_check_selection=checks)
        result = job.with_logger_defs({"console": _terminal(say)}).execute_in_process(
            instance=self.instance,
            run_config={"loggers": {"console": {"config": {"log_level": "CRITICAL"}}}},
            tags={**tags, PROCESS_TAG: process_tag()},
            raise_on_error=False,
        )
        for event in result.get_asset_materialization_events():
            found = event.step_materialization_data.materialization
            if STATUS in found.metadata:
                nothing.setdefault(found.asset_key.path[-1], []).append(str(found.metadata[STATUS].value))
        if not result.success:
            failures = [event for event in result.all_events if event.is_step_failure]
            error = failures[0].step_failure_data.error if failures else None
            while error is not None and error.cause is not None and error.cls_name not in EXPLAINED:
                error = error.cause
            message = error.message.strip() if error else "see the run in the UI"
            failed = failures[0].step_key.removeprefix(f"{self.study.name}__") if failures and failures[0].step_key else ", ".join(names)
            raise PlanError(f"{failed} failed: {message}\n(run {result.run_id}; `relseek run` again goes on from here)")

    def failed_checks(self) -> list[str]:
        """A line for each of the study's asset checks that failed when it was last evaluated: which, what it asks for and what it found."""
        graph = self.definitions.resolve_asset_graph()
        keys = sorted(graph.asset_check_keys, key=lambda key: (key.asset_key.path, key.name))
        latest = self.instance.event_log_storage.get_latest_asset_check_execution_by_key(keys)
        lines = []
        for key in keys:
            event = latest[key].event if key in latest else None
            if event is None or event.dagster_event_type != dg.DagsterEventType.ASSET_CHECK_EVALUATION:
                continue  # planned, and its run died
            found = event.get_dagster_event().asset_check_evaluation_data
            if not found.passed:
                shown = ", ".join(f"{name}: {value.value}" for name, value in found.metadata.items())
                shown = f"{shown[:MOST_OF_A_CHECK]} ..." if len(shown) > MOST_OF_A_CHECK else shown
                where = f" {found.partition}" if found.partition else ""
                asks = found.description or graph.get_check_spec(key).description or ""
                lines.append(f"check failed: {key.asset_key.path[-1]}{where} {key.name}: {asks} Found {shown or 'no more about it'}")
        return lines

    def held_pools(self, names: Sequence[str]) -> list[str]:
        """Who holds the pools that steps of the named assets wait for, a line a run, with the way to free them; nothing where a slot is free."""
        storage = self.instance.event_log_storage
        lines = []
        for pool in sorted({pool for name in names if (pool := self.catalogue[name].definition.op.pool)}):
            info = storage.get_concurrency_info(pool)
            if info.claimed_slots and len(info.claimed_slots) >= info.slot_count:
                for run_id in sorted({slot.run_id for slot in info.claimed_slots}):
                    run = self.instance.get_run_by_id(run_id)
                    process = run.tags.get(PROCESS_TAG, "") if run else ""
                    holder = f" of process {process}" if process else ""
                    lines.append(
                        f"{', '.join(names)}: waiting for the pool {pool}, held by run {run_id}{holder}. If nothing runs there any more, terminate "
                        "that run in `relseek ui`, whose daemon frees the pool within a minute"
                    )
        return lines

    def _checked_sources(self, key: dg.AssetKey) -> list[dg.AssetKey]:
        return [parent for parent in self.graph.get(key).parent_keys if self.graph.get(parent).is_external and key.path[-1] == "preference_pairs"]

    def observe(self) -> list[str]:
        """Look at the study's sources and record what changed."""
        return sources.observe(self.study, self.instance)

    def end_dead_runs(self) -> int:
        """Mark runs of a killed `relseek run` as failed and give back the pool slots that they held; return how many.

        Temporary files that they left are cleared away, unless another run lives that may be writing one.
        """
        dead = alive = 0
        for run in self.instance.get_runs(dg.RunsFilter(statuses=[dg.DagsterRunStatus.STARTED, dg.DagsterRunStatus.STARTING])):
            host, _, process = run.tags.get(PROCESS_TAG, "").partition(":")
            number, _, started = process.partition(":")
            if host == socket.gethostname() and not _alive(int(number), started):
                self.instance.report_run_failed(run, "the process that ran this was killed; `relseek run` goes on from there")
                self.instance.event_log_storage.free_concurrency_slots_for_run(run.run_id)
                dead += 1
            else:
                alive += 1
        if dead and not alive:
            for leftover in self.path(next(iter(self.catalogue)), None).parent.parent.rglob(".*.tmp"):
                leftover.unlink(missing_ok=True)
        return dead


class _Once:
    """Says each line once."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._said: set[str] = set()

    def __call__(self, line: str) -> None:
        if line not in self._said:
            self._said.add(line)
            self._say(line)


class _Terminal(logging.Handler):
    """Says what assets warn of for people at a terminal, and nothing else of a run's log."""

    def __init__(self, say: Callable[[str], None]) -> None:
        super().__init__()
        self._say = say

    def emit(self, record: logging.LogRecord) -> None:
        if line := getattr(record, SAID, ""):
            self._say(line)


def _terminal(say: Callable[[str], None]) -> dg.LoggerDefinition:
    """In place of Dagster's own console, with the same configuration, so that a run can be started again from the UI."""

    def made(_: dg.InitLoggerContext) -> logging.Logger:
        logger = logging.Logger("relseek")
        logger.addHandler(_Terminal(say))
        return logger

    return dg.LoggerDefinition(made, config_schema={"log_level": str})


def without_results(reasons: Sequence[str]) -> list[str]:
    """Why partitions hold nothing, counted; those that say the same up to the first colon, numbers aside, in one line with the first of them."""
    kinds: dict[str, list[str]] = {}
    for reason in reasons:
        kinds.setdefault(re.sub(r"\d+", "", reason.partition(":")[0]), []).append(reason)
    return [
        f"{_count(len(found), 'partition')} without results: {found[0]}{' and the like' if len(set(found)) > 1 else ''}" for found in kinds.values()
    ]


def process_tag() -> str:
    """This process, so that no later one is taken for it: host:pid:start, or host:pid where there is no /proc."""
    return ":".join(filter(None, (socket.gethostname(), str(os.getpid()), _started(os.getpid()))))


def _started(process: int) -> str:
    """When a process began, in clock ticks after boot (proc(5), field 22 of stat); empty where nothing says so."""
    try:
        stat = Path(f"/proc/{process}/stat").read_text(errors="replace")
    except OSError:
        return ""
    return stat.rpartition(")")[2].split()[19]  # the name before it, in brackets, may hold spaces


def _alive(process: int, started: str) -> bool:
    """Whether a process lives; after a restart another one may have its number, which its start tells. `started` is empty in older records."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    now = _started(process)
    return not (started and now and started != now)


def _neighbours(values: Sequence[str], order: Sequence[str], alike: Callable[[str, str], bool] = lambda one, two: True) -> Iterator[list[str]]:
    """Runs of values that stand next to each other in `order` and are alike."""
    place = {value: index for index, value in enumerate(order)}
    part: list[str] = []
    for value in sorted(values, key=lambda found: place.get(found, 0)):
        if part and (place.get(value, 0) != place.get(part[-1], 0) + 1 or not alike(part[-1], value)):
            yield part
            part = []
        part.append(value)
    if part:
        yield part


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
