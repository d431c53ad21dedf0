"""The `relseek` command: run a study, see what is stale, read its tables, bring in files, compare, open the UI.

Here belong arguments and printing; what a command does belongs in `planning.py`, `exchange.py`, `imports.py`, `difference.py` and the stages.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

# Two torch threads that spin while they wait starve each other as soon as anything else runs; must be set before torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from relseek_assets.arms import arms
from relseek_assets.chat import chat
from relseek_assets.commands import Group as _Group
from relseek_assets.commands import explained as _explained
from relseek_assets.commands import workspace_of as _workspace
from relseek_assets.judging.commands import batches
from relseek_assets.persona_set import read_persona_set
from relseek_assets.serve import serve
from relseek_assets.steer import steer
from relseek_assets.study import Study, load_study, study_names
from relseek_assets.vectors.commands import vectors
from relseek_resources.storage import StorageError

if TYPE_CHECKING:
    import pandas as pd

    from relseek_assets.planning import Task, Workspace
    from relseek_assets.trial import Trial
    from relseek_assets.trials.registration import Ran


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
def main() -> None:
    """Measure what a model's disposition does: train, steer, judge and select, as Dagster assets.

    \b
    A study is one TOML file. The usual round:
      relseek studies                     what there is
      relseek run quickstart --dry-run    what a run would compute, and how long it would take
      relseek run quickstart              compute what is missing or stale
      relseek report quickstart           one HTML page with figures and numbers
      relseek table quickstart selection  any table, as CSV, JSON or parquet
      relseek ui                          everything in the Dagster UI, http://localhost:3000
    """


@main.command()
@_explained
def studies() -> None:
    """List the studies that ship with relseek, and the size of their grids."""
    for name in study_names():
        study = load_study(name)
        if study.trial is not None:
            size = f"{len(study.trial.keys)} outcomes of {len(study.trial.study.values)} studies, {len(study.trial.tables)} files"
            size += f"; published vectors of {len(study.sites)} sites" if study.published.vectors else ""
            click.echo(f"{name:24} {study.kind:6} {size}\n{'':24} {study.title}\n{'':24} {study.path}")
            continue
        if study.contrastive:
            personas = read_persona_set(study.persona_folder)
            size = f"{len(personas.personas)} personas x {len(personas.queries)} queries, {', '.join(model.name for model in study.models)}"
            click.echo(f"{name:24} {study.kind} {size}\n{'':24} {study.title}\n{'':24} {study.path}")
            continue
        epochs = sum(len(model.layers) * len(model.epochs_evaluated) for model in study.models)
        click.echo(
            f"{name:24} {study.kind:6} {study.behaviour:22} {len(study.sites)} sites x {len(study.doses.generated)} doses, {epochs} vectors evaluated"
        )
        click.echo(f"{'':24} {study.title}\n{'':24} {study.path}")


@main.command()
@click.argument("study")
@click.option("--select", "-s", multiple=True, metavar="ASSET", help="Only this asset and what it needs; may be repeated. Default: everything.")
@click.option("--dry-run", is_flag=True, help="Print the plan and stop.")
@_explained
def run(study: str, select: tuple[str, ...], dry_run: bool) -> None:
    """Compute what is missing or stale in STUDY, and nothing that is fresh.

    STUDY is a name that `relseek studies` lists or the path of a .toml file. A killed run loses only what was in flight: run it again.
    """
    workspace = _workspace(study)
    changed = workspace.observe()
    if changed:
        click.echo(f"new versions of: {', '.join(changed)}")
    for line in (*workspace.look(), *workspace.ask_servers(), *workspace.unmet(select)):
        click.echo(line)
    tasks = workspace.plan(select)
    if not tasks:
        waiting = _say_waiting(workspace, select)
        click.echo(f"{workspace.study.name}: {'nothing else to compute' if waiting else 'everything is fresh, nothing to compute'}")
        _say_checks(workspace)
        _say_report(workspace)
        return
    _print_plan(tasks)
    if dry_run:
        return
    try:
        computed = more = workspace.run(select, click.echo)
        while more and workspace.study.judges and workspace.plan(select):
            click.echo("answers came while this ran: going on with what follows from them")
            more = workspace.run(select, click.echo)
            computed += more
    finally:
        _say_checks(workspace)
    click.echo(f"{workspace.study.name}: {computed} partition{'' if computed == 1 else 's'} computed")
    _say_waiting(workspace, select)
    _say_report(workspace)


def _say_checks(workspace: Workspace) -> None:
    for line in workspace.failed_checks():
        click.echo(line)


def _say_waiting(workspace: Workspace, select: Sequence[str]) -> bool:
    """Say what is in flight, what it will cost, and what is left out because of it."""
    if not workspace.study.judges:
        return False
    states = workspace.states([workspace.asset(name).name for name in select] or None)
    waiting = {node: state.reason for node, state in states.items() if state.status == "waiting"}
    if waiting:
        for line in workspace.in_flight():
            click.echo(line)
        name = workspace.study.name
        click.echo(f"{len(waiting)} partitions of {len({asset for asset, _ in waiting})} assets wait for them. The sensor `judge_batches` collects")
        click.echo(f"answers while `relseek ui` is open, and `relseek run {name}` does; `relseek batches {name}` looks at them")
    return bool(waiting)


def _reports(workspace: Workspace) -> list[str]:
    return [name for name in ("report", "trial_report") if name in workspace.catalogue]


def _reported() -> list[str]:
    """The studies that ship with relseek and have a report."""
    found = map(load_study, study_names())
    return [study.name for study in found if study.steered or study.contrastive or study.trial is not None]


def _say_report(workspace: Workspace) -> None:
    for path in (workspace.path(name, None) for name in _reports(workspace)):
        if path.is_file():
            click.echo(f"report: {path}\nthe same in the Dagster UI: relseek ui")


def _print_plan(tasks: list[Task]) -> None:
    click.echo(f"{'asset':24} {'partitions':>10} {'rows':>9} {'seconds':>9} {'MB':>7} {'USD':>6}  why")
    for task in tasks:
        why = ", ".join(f"{reason} ({count})" if len(task.reasons) > 1 else reason for reason, count in task.reasons.items())
        rows = f"{task.rows:9.0f}" if task.rows else f"{'?':>9}"
        size = f"{task.bytes / 1e6:7.1f}" if task.bytes else f"{'?':>7}"
        seconds = f"{'' if task.measured else '~'}{task.seconds:.1f}"
        click.echo(f"{task.asset.name:24} {len(task.partitions):10d} {rows} {seconds:>9} {size} {_usd(task.bill.usd):>6}  {why}")
    total, dollars = sum(task.seconds for task in tasks), sum(task.bill.usd or 0.0 for task in tasks)
    unknown = " and what is not known before the requests are made" if any(task.bill.usd is None for task in tasks) else ""
    click.echo(
        f"about {total / 60:.1f} minutes, {_usd(dollars)} USD{unknown} (seconds from earlier runs here; ~ marks a stated estimate for two cores; "
        "? is not known yet)"
    )
    for task in tasks:
        for line in (*task.bill.lines, *task.bill.refusal.splitlines()):
            click.echo(f"{task.asset.name}: {line}")


def _usd(usd: float | None) -> str:
    """Dollars and cents; of less than a cent two figures, and ? where it is not known."""
    return "?" if usd is None else f"{usd:.2f}" if usd == 0 or usd >= 0.01 else f"{usd:.2g}"


@main.command()
@click.argument("study")
@click.option("--partitions", "-p", is_flag=True, help="List every partition and not only counts.")
@click.option("--format", "form", type=click.Choice(["text", "json"]), default="text", show_default=True)
@_explained
def status(study: str, partitions: bool, form: str) -> None:
    """Say what is missing, stale, waiting, fresh, imported or absent in STUDY, by asset and partition, and which asset checks failed.

    Waiting is what a judge asked by Batch has not answered yet, and what is made from its answers; `relseek run` and the sensor collect it.
    Absent is what would be made from published files that are not here, or from another study that has not been run; no run asks for it.
    Partitions without results were computed and hold nothing; they say why.
    """
    from relseek_assets.planning import without_results

    workspace = _workspace(study)
    workspace.observe()
    workspace.ask_servers()
    states = workspace.states()
    if form == "json":
        rows = [
            {
                "asset": name,
                "partition": partition,
                "status": state.status,
                "reason": state.reason,
                "version": state.version,
                "without_results": state.nothing,
            }
            for (name, partition), state in states.items()
        ]
        click.echo(json.dumps(rows, indent=1))
        return
    shown = ("missing", "stale", "waiting", "fresh", "imported", "absent")
    click.echo(f"{'asset':24} {'missing':>8} {'stale':>8} {'waiting':>8} {'fresh':>8} {'imported':>9} {'absent':>7}  first reason")
    for name in workspace.order():
        mine = {partition: state for (asset, partition), state in states.items() if asset == name}
        missing, stale, waiting, fresh, imported, absent = (sum(state.status == status for state in mine.values()) for status in shown)
        reason = next((state.reason for state in mine.values() if state.reason), "")
        click.echo(f"{name:24} {missing:8d} {stale:8d} {waiting:8d} {fresh:8d} {imported:9d} {absent:7d}  {reason}")
        if partitions:
            for partition, state in mine.items():
                nothing = state.nothing and f"without results: {state.nothing}"
                click.echo(f"    {partition or 'all':32} {state.status:9} {'; '.join(filter(None, (state.reason, nothing)))}")
            continue
        for line in without_results([state.nothing for state in mine.values() if state.nothing]):
            click.echo(f"    {line}")
    _say_checks(workspace)


@main.command()
@click.argument("study")
@click.argument("asset")
@click.option(
    "--partition", "-p", "wanted", multiple=True, metavar="KEY", help="Only this partition, e.g. 'smollm2-135m:L12|e02@0_5'; may be repeated."
)
@click.option("--format", "form", type=click.Choice(["csv", "json", "parquet"]), default="csv", show_default=True)
@click.option("--output", "-o", type=click.Path(dir_okay=False, path_type=Path), help="Write here instead of printing; parquet needs it.")
@_explained
def table(study: str, asset: str, wanted: tuple[str, ...], form: str, output: Path | None) -> None:
    """Print a table asset, all of its partitions by default; what of it is missing or stale is said on stderr."""
    from relseek_assets.exchange import export, read_asset

    workspace = _workspace(study)
    frame = read_asset(workspace, asset, wanted)
    if form == "parquet" and output is None:
        raise click.UsageError("parquet is binary; name a file with -o")
    content = export(frame, form)
    if output is None:
        click.echo(content, nl=False)
    else:
        from relseek_resources.storage import write_bytes

        write_bytes(output, content if isinstance(content, bytes) else content.encode())
        click.echo(f"{len(frame)} rows in {output}")
    _say_unfinished(workspace, study, workspace.asset(asset).name, wanted)


def _say_unfinished(workspace: Workspace, study: str, name: str, wanted: Sequence[str]) -> None:
    """Say on stderr what of an asset's partitions, or of those wanted, is not there or not up to date."""
    workspace.observe()
    states = [state.status for (asset, key), state in workspace.states([name]).items() if asset == name and (not wanted or key in wanted)]
    counts = {status: states.count(status) for status in ("missing", "stale", "waiting") if status in states}
    if counts:
        (first, count), *others = counts.items()
        shown = ", ".join([f"{count} of {len(states)} partitions {first}", *(f"{count} {status}" for status, count in others)])
        made_by = workspace.asset(name).made_by
        by = f"`{made_by} {study}` records" if made_by else f"`relseek run {study} --select {name}` computes"
        click.echo(f"{name}: {shown}; {by} {'them' if sum(counts.values()) > 1 else 'it'}", err=True)


@main.command()
@click.argument("study")
@click.option("--output", "-o", type=click.Path(dir_okay=False, path_type=Path), help="Copy the page here too.")
@_explained
def report(study: str, output: Path | None) -> None:
    """Bring STUDY's report up to date and say where it is: one self-contained HTML page.

    Where it waits for something, an earlier page stays as it is; where there is none, the exit status is 1.
    """
    workspace = _workspace(study)
    names = _reports(workspace)
    if not names:
        raise click.UsageError(f"study {workspace.study.name} has no report; of the studies that ship with relseek {', '.join(_reported())} have one")
    workspace.observe()
    tasks = workspace.plan(names)
    if tasks:
        _print_plan(tasks)
        workspace.run(names, click.echo)
    _say_checks(workspace)
    states = workspace.states(names)
    lacking = []
    for name in names:
        path, state = workspace.path(name, None), states[name, None]
        if not path.is_file():
            lacking.append(f"there is no {name} yet: {state.status}, {state.reason or 'nothing was computed'}")
            continue
        if state.status not in ("fresh", "imported"):
            click.echo(f"{name}: the page is an earlier one, because it is {state.status}: {state.reason}")
        if output is not None:
            from relseek_resources.storage import write_text

            text = path.read_text(encoding="utf-8")
            path = output if len(names) == 1 else output.with_name(f"{output.stem}_{name}{output.suffix}")
            write_text(path, text)
        click.echo(f"report: {path}")
    if lacking:
        raise click.ClickException("\n".join(lacking))


@main.group(cls=_Group)
def trials() -> None:
    """Trials: register a plan before its data, typeset estimates, and compare them with the plan or with what was published."""


@trials.command(name="check")
@click.argument("study")
@click.option("--run", "compute", is_flag=True, help="Compute what is missing or stale first.")
@click.option("--all", "every", is_flag=True, help="Print every number and not only those that differ.")
@click.option("--format", "form", type=click.Choice(["text", "csv", "json"]), default="text", show_default=True)
@_explained
def check_trial(study: str, compute: bool, every: bool, form: str) -> None:
    """Compare STUDY's tables with the published numbers, value by value; exit status 1 where one differs.

    A number agrees up to the rounding of what was published, and is absent where the data that it needs are not there.
    """
    from relseek_assets.exchange import export
    from relseek_assets.trials import published

    workspace = _workspace(study)
    trial = _trial(workspace.study)
    stated = published.published(workspace.study.name, trial.folder(workspace.study.path))
    computed = _computed(workspace, [name for name in stated["asset"].unique() if name in workspace.catalogue], compute, quiet=form != "text")
    rows = dict(zip(computed["trial_tables"]["table"], computed["trial_tables"]["rows"], strict=True))
    found = published.compare(stated, computed, published.incomplete_data(trial, rows, stated))
    differing = found[found["verdict"] == published.DIFFERS]
    shown = found if every else differing
    if form == "text":
        for table in (shown, published.reasons(found), published.summary(found)):
            if len(table):
                click.echo(table.to_string(index=False, na_rep="") + "\n")
    else:
        click.echo(export(shown, form), nl=False)
    agree, differ, absent = ((found["verdict"] == verdict).sum() for verdict in (published.AGREES, published.DIFFERS, published.ABSENT))
    click.echo(f"{workspace.study.name}: of {len(found)} published numbers {agree} agree, {differ} differ, {absent} are absent", err=form != "text")
    if len(differing):
        raise SystemExit(1)


@trials.command(name="register")
@click.argument("study")
@click.option("--output", "-o", required=True, type=click.Path(dir_okay=False, path_type=Path), help="Write here; a file that is there is kept.")
@_explained
def register_trial(study: str, output: Path) -> None:
    """Write STUDY's plan down before its data: arms, outcomes, models, families, margins and seed, with a hash and the date."""
    from datetime import UTC, datetime
    from importlib.metadata import version

    from relseek_assets.trials import registration
    from relseek_resources.storage import write_text

    found = load_study(study)
    text = registration.register(found.name, found.seed, _trial(found), version("relseek"), datetime.now(UTC))
    if output.exists():
        raise click.UsageError(f"{output} is there already; a registration is kept as it is, so give another name")
    write_text(output, text)
    written = registration.read(output)
    click.echo(f"{found.name}: {len(written.trial.keys)} outcomes registered in {output}\nsha256 {written.sha256}\nfingerprint {written.fingerprint}")


@trials.command(name="registered")
@click.argument("study")
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--format", "form", type=click.Choice(["text", "csv", "json"]), default="text", show_default=True)
@_explained
def registered_trial(study: str, file: Path, form: str) -> None:
    """Compare a registration with what STUDY declares now and with what was run; exit status 1 where something differs.

    FILE is a registration that `relseek trials register` wrote; one that was edited is refused.
    """
    from relseek_assets.exchange import export
    from relseek_assets.trials import registration

    plan = registration.read(file)
    workspace = _workspace(study)
    ran = _ran(workspace)
    found = registration.compared(plan, workspace.study.name, workspace.study.seed, _trial(workspace.study), ran)
    if form != "text":
        click.echo(export(found, form), nl=False)
    elif len(found):
        click.echo(found.to_string(index=False))
    said = f"{len(found)} differences" if len(found) else "nothing differs"
    beside = "" if ran else "; nothing has been run yet, so that only declarations were compared"
    click.echo(f"{workspace.study.name}: registered {plan.at:%Y-%m-%d %H:%M} UTC, sha256 {plan.sha256}: {said}{beside}", err=form != "text")
    if len(found):
        raise SystemExit(1)


@trials.command(name="tables")
@click.argument("study")
@click.option("--output", "-o", required=True, type=click.Path(file_okay=False, path_type=Path), help="The folder to write into.")
@_explained
def trial_tables(study: str, output: Path) -> None:
    """Write STUDY's estimates as they stand in a paper: each table as CSV and as LaTeX, and `tables.tex`, which includes them all."""
    from relseek_assets.trials import typeset
    from relseek_resources.storage import write_text

    workspace = _workspace(study)
    trial = _trial(workspace.study)
    names = ("trial_contrasts", "trial_fdr", "trial_forms", "trial_equivalence", "trial_robustness")
    tables = typeset.typeset(trial, _stored(workspace, names))
    if not tables:
        raise click.ClickException(f"{workspace.study.name}: nothing has been estimated; `relseek run {study}` does it")
    for table in tables:
        write_text(output / f"{table.name}.csv", table.csv())
        write_text(output / f"{table.name}.tex", table.latex())
    write_text(output / "tables.tex", typeset.document(tables))
    click.echo(f"{len(tables)} tables in {output}: {', '.join(table.name for table in tables)}\nall in one document: {output / 'tables.tex'}")


def _stored(workspace: Workspace, names: Iterable[str]) -> dict[str, pd.DataFrame]:
    """The named tables as stored, those of which nothing was computed left out."""
    from relseek_assets.exchange import read_asset

    there = [name for name in names if any(workspace.path(name, key).is_file() for key in workspace.partitions(name))]
    return {name: read_asset(workspace, name) for name in there}


def _ran(workspace: Workspace) -> Ran | None:
    """What was run of a trial, or None where nothing was."""
    from relseek_assets.trials.registration import Ran

    tables = _stored(workspace, ("trial_forms", "trial_contrasts", "trial_equivalence", "trial_fdr"))
    if "trial_contrasts" not in tables:
        return None
    lineage, key = workspace.lineage(), workspace.stage.key("trial_contrasts")
    statuses = {}
    for partition in workspace.partitions("trial_contrasts"):
        if lineage.record(key, partition) is not None and workspace.path("trial_contrasts", partition).is_file():
            statuses[str(partition)] = lineage.nothing(key, partition)
    return Ran(statuses, **{name.removeprefix("trial_"): table for name, table in tables.items() if name != "trial_contrasts"})


def _trial(study: Study) -> Trial:
    if study.trial is None:
        raise click.UsageError(f"study {study.name} is no trial; `relseek studies` says which are")
    return study.trial


def _computed(workspace: Workspace, names: list[str], compute: bool, quiet: bool) -> dict[str, pd.DataFrame]:
    """The named tables as stored, all raw tables as one of their row counts; what is missing or stale is computed first if wanted."""
    import pandas as pd

    from relseek_assets.exchange import read_asset

    workspace.observe()
    tasks = workspace.plan(names)
    if compute and tasks:
        workspace.run(names, lambda line: click.echo(line, err=quiet))
    elif tasks:
        waiting = ", ".join(task.asset.name for task in tasks)
        click.echo(f"missing or stale: {waiting}; `relseek trials check {workspace.study.name} --run` computes them first", err=True)
    tables = [str(name) for name in workspace.partitions("trial_tables")]
    rows = pd.DataFrame({"table": tables, "rows": [len(read_asset(workspace, "trial_tables", [table])) for table in tables]})
    return {name: read_asset(workspace, name) for name in names if name != "trial_tables"} | {"trial_tables": rows}


@main.command()
@click.argument("study_a")
@click.argument("study_b")
@click.option("--store-b", type=click.Path(exists=True, file_okay=False, path_type=Path), help="Read STUDY_B from the Dagster home in this folder.")
@click.option("--format", "form", type=click.Choice(["text", "json"]), default="text", show_default=True)
@_explained
def diff(study_a: str, study_b: str, store_b: Path | None, form: str) -> None:
    """Say what differs between two studies, or between one study in two stores: settings, versions, estimates with intervals.

    Estimates are the dose-response, coherence AUC and slopes of the selection, the quality of the judge, and a trial's contrasts.
    """
    from relseek_assets.difference import difference, difference_text

    a, b = _workspace(study_a), _workspace_in(study_b, store_b)
    found = difference(a, b)
    if form == "json":
        click.echo(json.dumps(found, indent=1))
        return
    for label, workspace in (("A", a), ("B", b)):
        click.echo(f"{label}: {workspace.study.name} in {workspace.store.folder(workspace.study.name)}")
    click.echo(difference_text(found))


def _workspace_in(study: str, home: Path | None) -> Workspace:
    if home is None:
        return _workspace(study)
    from dagster import DagsterInstance

    from relseek_assets.planning import Workspace
    from relseek_assets.stage import Store

    home = home.resolve()
    if not (home / "dagster.yaml").is_file():
        raise StorageError(
            f"{home}: no dagster.yaml there; --store-b wants a Dagster home with its store in it, for files alone do not say which versions they are"
        )
    found = Workspace(load_study(study), DagsterInstance.from_config(str(home)), store=Store(root=str(home / "store")))
    if not found.store.folder(found.study.name).is_dir():
        raise StorageError(
            f"{home}: {found.study.name} has no files under {home / 'store'}; --store-b looks for them there: copy or link what RELSEEK_STORE had"
        )
    return found


@main.group(name="import", cls=_Group)
def import_() -> None:
    """Bring in a vector, generations or scores made elsewhere; they become partitions with their provenance and flow on.

    An imported partition is never overwritten by a run; `relseek run` computes what follows from it.
    """


@import_.command(name="vector")
@click.argument("study")
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--site", required=True, help="Model and layer, e.g. smollm2-135m:L12.")
@click.option("--epoch", required=True, type=int, help="The epoch whose place it takes.")
@click.option("--note", default="", help="Where it comes from, for the record.")
@_explained
def import_vector(study: str, file: Path, site: str, epoch: int, note: str) -> None:
    """FILE is a .safetensors, .pt or .gguf file with a float vector as wide as the model's residual stream; `relseek vectors import` is the same."""
    from relseek_assets.imports import import_vector as bring

    click.echo(bring(_workspace(study), file, site, epoch, note))


@import_.command(name="generations")
@click.argument("study")
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--note", default="", help="Where they come from, for the record.")
@_explained
def import_generations(study: str, file: Path, note: str) -> None:
    """FILE is JSON Lines with site, epoch, multiplier, item (any held-out conversation of the study's) and reply.

    A row may say more: `prompt` (messages) where it was not the study's own for the item; token_ids, tokens, seed, finished, mean_log_prob.
    """
    from relseek_assets.imports import import_generations as bring

    click.echo(bring(_workspace(study), file, note))


@import_.command(name="scores")
@click.argument("study")
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--note", default="", help="Where they come from, for the record.")
@_explained
def import_scores(study: str, file: Path, note: str) -> None:
    """FILE is a CSV with the columns site, epoch, multiplier, item, rubric, judge, score; status, attempt and cost_usd if there are any.

    Items are those of the partition's generations. A row with neither score nor status says `empty_reply` where the reply is empty, else `missing`.
    """
    from relseek_assets.imports import import_scores as bring

    click.echo(bring(_workspace(study), file, note))


main.add_command(batches)
main.add_command(vectors)
main.add_command(steer)
main.add_command(serve)
main.add_command(chat)
main.add_command(arms)


@main.command()
@click.argument("names", nargs=-1, metavar="[STUDY]...")
@click.option("--port", default=3000, show_default=True)
@click.option("--host", default="127.0.0.1", show_default=True)
@_explained
def ui(names: tuple[str, ...], port: int, host: str) -> None:
    """Open the Dagster UI, its daemon running, on the studies that ship with relseek and on any STUDY named besides (a .toml path)."""
    from relseek_assets.locations import write_locations
    from relseek_resources.stored_vectors import dagster_home

    home = dagster_home()
    locations = write_locations(home, [*study_names(), *names])
    click.echo(f"starting http://{host}:{port} (ready in about 15 s; Ctrl-C ends it)")
    environment = {**os.environ, "DAGSTER_HOME": str(home)}
    command = [sys.executable, "-m", "dagster", "dev", "-w", str(locations), "-p", str(port), "-h", host]
    raise SystemExit(subprocess.call(command, env=environment))


if __name__ == "__main__":
    main()
