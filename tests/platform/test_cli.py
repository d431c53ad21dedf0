"""The `relseek` command: what it says of itself, of studies and of what a run would do."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import click
import pandas as pd
import pytest
from click.testing import CliRunner

from relseek_assets.cli import main
from relseek_assets.definitions import build_stage
from relseek_assets.planning import without_results
from relseek_assets.study import load_study, study_names


def commands(group: click.Group, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    for name, command in group.commands.items():
        yield (*path, name), command
        if isinstance(command, click.Group):
            yield from commands(command, (*path, name))


ALL = dict(commands(main))


def test_the_first_screen_shows_the_usual_round() -> None:
    shown = CliRunner().invoke(main, ["--help"]).output
    for line in (
        "relseek studies",
        "relseek run quickstart --dry-run",
        "relseek report quickstart",
        "relseek table quickstart selection",
        "relseek ui",
    ):
        assert line in shown
    assert "http://localhost:3000" in shown


@pytest.mark.parametrize("path", ALL, ids=" ".join)
def test_every_command_teaches_its_use(path: tuple[str, ...]) -> None:
    """A line of what it does ends in a full stop; every option says what it is for or what it may be; every file argument is described."""
    command = ALL[path]
    shown = CliRunner().invoke(main, [*path, "--help"])
    assert shown.exit_code == 0
    assert command.help
    assert command.help.splitlines()[0].rstrip().endswith(".")
    for parameter in command.params:
        if isinstance(parameter, click.Option):
            assert parameter.help or parameter.show_default or isinstance(parameter.type, click.Choice), f"{' '.join(path)} {parameter.opts}"
        else:
            assert (parameter.metavar or parameter.human_readable_name).strip("[].").upper() in shown.output
    if any(argument.human_readable_name == "FILE" for argument in command.params):
        assert "FILE is" in command.help, "what the file must hold"


def test_every_command_that_the_first_screen_names_exists() -> None:
    assert {("studies",), ("run",), ("status",), ("table",), ("report",), ("diff",), ("ui",)} <= ALL.keys()
    assert {("import", "vector"), ("import", "generations"), ("import", "scores")} <= ALL.keys()


def test_studies_lists_what_ships_with_the_size_of_its_grid() -> None:
    shown = CliRunner().invoke(main, ["studies"])
    study = load_study("quickstart")
    line = next(line for line in shown.output.splitlines() if line.startswith("quickstart "))
    assert f"{len(study.sites)} sites x {len(study.doses.generated)} doses" in line
    assert study.title in shown.output
    assert str(study.path) in shown.output


def test_an_unknown_study_suggests_the_one_that_was_meant(blank: Any) -> None:
    shown = blank.command("status", "quickstrat")
    assert shown.exit_code == 1
    assert "did you mean 'quickstart'?" in shown.output
    absent = blank.command("run", blank.folder / "absent.toml")
    assert absent.exit_code == 1
    assert "absent.toml: no such study file" in absent.output


def test_an_unknown_asset_suggests_the_one_that_was_meant(blank: Any) -> None:
    shown = blank.command("run", "STUDY", "--select", "generation")
    assert shown.exit_code == 1
    assert "no asset 'generation'" in shown.output
    assert "did you mean 'generations'?" in shown.output


def test_a_home_without_its_configuration_is_named(blank: Any) -> None:
    (blank.home / "dagster.yaml").unlink()
    shown = blank.command("status", "STUDY")
    assert shown.exit_code == 1
    assert str(blank.home) in shown.output
    assert "DAGSTER_HOME" in shown.output


def test_a_dry_run_prints_the_plan_and_writes_no_asset(blank: Any) -> None:
    shown = blank.command("run", "STUDY", "--dry-run")
    assert shown.exit_code == 0, shown.output
    rows = {
        line.split()[0]: line.split()[1]
        for line in shown.output.splitlines()
        if line and line.split()[0] in ("training_run", "generations", "report")
    }
    # two sites; two sites x two epochs x three doses; one page
    assert rows == {"training_run": "2", "generations": "12", "report": "1"}
    assert "USD" in shown.output
    assert "a stated estimate" in shown.output
    assert blank.stored() == {}
    with blank.workspace() as workspace:
        assert workspace.instance.get_runs() == []
        assert {state.status for state in workspace.states().values()} == {"missing"}


def test_a_selection_plans_what_it_needs_and_no_more(blank: Any) -> None:
    shown = blank.command("run", "STUDY", "--dry-run", "--select", "steering_vectors")
    planned = {line.split()[0] for line in shown.output.splitlines() if line.endswith("missing")}
    assert planned == {"preference_pairs", "training_run", "steering_vectors"}


def test_status_as_json_has_a_row_for_every_partition(finished: Any) -> None:
    rows = json.loads(finished.command("status", "STUDY", "--format", "json").output)
    assert set(rows[0]) == {"asset", "partition", "status", "reason", "version", "without_results"}
    assert {row["status"] for row in rows} == {"fresh"}
    generations = [row["partition"] for row in rows if row["asset"] == "generations"]
    assert len(generations) == len(set(generations)) == 12
    assert "m:L01|e02@-1_0" in generations
    assert all(len(row["version"]) == 16 for row in rows)


def test_status_in_words_counts_by_asset_and_lists_partitions_when_asked(finished: Any) -> None:
    next((finished.files / "selection").iterdir()).unlink()
    plain = finished.command("status", "STUDY").output.splitlines()
    counts = {line.split()[0]: line.split()[1:6] for line in plain[1:]}
    assert counts["generations"] == ["0", "0", "0", "12", "0"]
    assert counts["selection"] == ["1", "0", "0", "0", "0"]
    assert counts["report"] == ["0", "1", "0", "0", "0"]
    assert "m:L02|e03@1_0" in finished.command("status", "STUDY", "--partitions").output


NOTHING_TO_COMPARE = "without results: one judge a rubric: nothing to compare"


def test_partitions_without_results_are_said_by_run_once_an_asset_and_by_status(finished: Any) -> None:
    for partition in ("m:L01/e02", "m:L02/e03"):  # two ranges of partitions, and so two Dagster runs
        (finished.files / "judge_agreement" / f"{partition}.parquet").unlink()
    done = finished.command("run", "STUDY", "--select", "judge_agreement")
    assert done.exit_code == 0, done.output
    said = [line for line in done.output.splitlines() if "without results" in line]
    assert said == [f"[1/1] judge_agreement: 2 partitions {NOTHING_TO_COMPARE}"]

    counted = finished.command("status", "STUDY").output.splitlines()
    place = next(number for number, line in enumerate(counted) if line.startswith("judge_agreement "))
    assert counted[place + 1] == f"    4 partitions {NOTHING_TO_COMPARE}"
    listed = finished.command("status", "STUDY", "-p").output
    assert sum(NOTHING_TO_COMPARE in line and line.split()[1] == "fresh" for line in listed.splitlines()) >= 4
    assert f"4 partitions {NOTHING_TO_COMPARE}" not in listed
    rows = json.loads(finished.command("status", "STUDY", "--format", "json").output)
    assert {row["without_results"] for row in rows if row["asset"] == "judge_agreement"} == {"one judge a rubric: nothing to compare"}
    assert {row["without_results"] for row in rows if row["asset"] == "judge_scores"} == {""}


def test_reasons_that_are_alike_are_counted_in_one_line() -> None:
    absent = [f"absent: no rating in the files of m:L01, epoch {epoch}" for epoch in (1, 2, 3)]
    faults = ["layer 3 has 2 personas", "layer 12 has 2 personas"]
    assert without_results([absent[0], faults[0], *absent[1:], faults[1], "no scores"]) == [
        f"3 partitions without results: {absent[0]} and the like",
        f"2 partitions without results: {faults[0]} and the like",
        "1 partition without results: no scores",
    ]


def test_counts_beyond_what_there_is_are_said_once_and_what_there_is_is_used(judged: Any) -> None:
    for name, few, many in (("training", 12, 4000), ("evaluation", 4, 400), ("count", 4, 400)):
        judged.edit(f"{name} = {few}\n", f"{name} = {many}\n")

    def said() -> list[str]:
        done = judged.command("run", "STUDY", "--select", "generations")
        assert done.exit_code == 0, done.output
        return [line for line in done.stdout.splitlines() if " asks for " in line]

    training, evaluation, prompts = said()
    pairs = pd.read_parquet(judged.files / "preference_pairs" / "all.parquet")
    for line, name, asked, split in ((training, "training", 4000, "train"), (evaluation, "evaluation", 400, "heldout")):
        assert line.startswith(f"training_run: pairs.{name} asks for {asked} pairs; ")
        assert "that fit pairs.max_tokens = 150 are there, and are used" in line
        assert 0 < int(line.split("; ")[1].split()[0]) <= (pairs["split"] == split).sum()
    replies = pd.read_parquet(judged.files / "generations" / "m:L01" / "e02@0_0.parquet")
    assert prompts == f"generations: prompts.count asks for 400 held-out prompts; {len(replies)} of at most 60 words are there, and are used"
    for partition in ("m:L01/e02@0_0", "m:L02/e03@1_0"):  # two ranges of partitions, and so two Dagster runs
        (judged.files / "generations" / f"{partition}.parquet").unlink()
    assert said() == [prompts]


def test_a_table_says_on_stderr_what_of_it_is_missing_or_stale_and_nothing_of_one_that_is_whole(finished: Any) -> None:
    whole = finished.command("table", "STUDY", "generations")
    assert whole.stderr == ""
    finished.edit("learning_rate = 0.01", "learning_rate = 0.02")
    stale = finished.command("table", "STUDY", "generations")
    by = f"`relseek run {finished.study_file} --select generations` computes"
    assert stale.stdout == whole.stdout
    assert stale.stderr == f"generations: 12 of 12 partitions stale; {by} them\n"
    (finished.files / "generations" / "m:L01" / "e02@0_0.parquet").unlink()
    partial = finished.command("table", "STUDY", "generations")
    assert partial.stderr == f"generations: 1 of 12 partitions missing, 11 stale; {by} them\n"
    assert len(partial.stdout) < len(whole.stdout)
    one = finished.command("table", "STUDY", "generations", "-p", "m:L02|e03@1_0")
    assert one.stderr == f"generations: 1 of 1 partitions stale; {by} it\n"


def test_the_report_is_one_page_that_needs_nothing_from_outside(finished: Any) -> None:
    page = finished.folder / "page.html"
    shown = finished.command("report", "STUDY", "--output", page)
    assert shown.exit_code == 0, shown.output
    assert f"report: {page}" in shown.output
    text = page.read_text(encoding="utf-8")
    assert text.lstrip().lower().startswith("<!doctype html>")
    for outside in ('src="http', "src='http", "@import", '<link rel="stylesheet"', "<script src"):
        assert outside not in text
    with finished.workspace() as workspace:
        version = workspace.lineage().version(workspace.stage.key("selection"), None)
    assert version in text, "the page names the data version of what it shows"


def test_a_failed_check_is_said_by_run_and_status_until_it_passes(blank: Any) -> None:
    file = blank.behaviour / "conversations.jsonl"
    balanced = file.read_text(encoding="utf-8")
    rows = [json.loads(line) for line in balanced.splitlines()]
    for row in rows:
        for turn in row["turns"]:
            turn["target"] += " indeed" * 20
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    first = blank.command("run", "STUDY", "--select", "preference_pairs")
    assert first.exit_code == 0, first.output
    again = blank.command("run", "STUDY", "--select", "preference_pairs")
    assert "nothing to compute" in again.output
    for shown in (first, again, blank.command("status", "STUDY")):
        (line,) = [line for line in shown.output.splitlines() if "length_balance" in line]
        assert line.startswith("check failed: starter_conversations length_balance: Target and anti-target replies have the same mean length")
        assert "ratio: 1." in line
    file.write_text(balanced, encoding="utf-8")
    assert "length_balance" not in blank.command("run", "STUDY", "--select", "preference_pairs").output


NO_REPORT = """
name = "borrowed"
kind = "bipo"
behaviours = ["relationship_seeking"]

[[models]]
name = "m"
source = "someone/Tiny-Model"
width = 32
layers = [1]
epochs_trained = 1
epochs_evaluated = [1]

[published]
vectors = true
"""


def test_a_study_without_a_report_is_refused_with_those_that_have_one(blank: Any) -> None:
    file = blank.folder / "borrowed.toml"
    file.write_text(NO_REPORT)
    shown = blank.command("report", file)
    assert shown.exit_code == 2
    stages = {name: build_stage(load_study(name)) for name in study_names()}
    having = [name for name, stage in stages.items() if {"report", "trial_report"} & stage.catalogue.keys()]
    assert f"study borrowed has no report; of the studies that ship with relseek {', '.join(having)} have one" in shown.output
    assert blank.stored() == {}
    with blank.workspace() as workspace:
        assert workspace.instance.get_runs() == []
