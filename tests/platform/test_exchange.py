"""Files from elsewhere become partitions with their provenance and flow on; tables leave in three forms; two studies are compared."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import shutil
import sqlite3
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from relseek_assets.imports import import_generations
from relseek_assets.sweeps.assets import answered_items
from relseek_resources.storage import StorageError

CELL = "m:L01|e03@1_0"


def rows_of(platform: Any, asset: str, *more: str) -> list[dict[str, Any]]:
    shown = platform.command("table", "STUDY", asset, "--format", "json", *more)
    assert shown.exit_code == 0, shown.output
    return json.loads(shown.output)


def items_of(platform: Any) -> list[str]:
    return sorted(pd.read_parquet(platform.files / "generations" / "m:L01" / "e03@1_0.parquet")["item"])


def states(platform: Any) -> dict[tuple[str, str | None], str]:
    with platform.workspace() as workspace:
        return {(name, None if partition is None else str(partition)): state.status for (name, partition), state in workspace.states().items()}


def metadata(platform: Any, asset: str, partition: str) -> dict[str, Any]:
    with platform.workspace() as workspace:
        record = workspace.lineage().record(workspace.stage.key(asset), partition)
    return {name: entry.value for name, entry in record.event_log_entry.asset_materialization.metadata.items()}


def bring(platform: Any, *arguments: object) -> str:
    done = platform.command("import", *arguments)
    assert done.exit_code == 0, done.output
    assert "relseek run tiny" in done.output, "it says how to compute what follows"
    return str(done.output)


# --- in ---------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_vector_from_elsewhere_takes_its_place_with_its_provenance_and_flows_on(finished: Any, tmp_path: Path) -> None:
    vector = np.random.default_rng(7).normal(size=32).astype(np.float32)
    file = tmp_path / "mine.safetensors"
    save_file({"v": vector}, file, metadata={"made_by": "a colleague"})
    replies = {row["item"]: row["reply"] for row in rows_of(finished, "generations", "--partition", CELL)}

    bring(finished, "vector", "STUDY", file, "--site", "m:L01", "--epoch", 3, "--note", "trained by hand")
    kept = finished.files / "steering_vectors" / "m:L01" / "e03.safetensors"
    np.testing.assert_array_equal(load_file(kept)["vector"], vector)
    with safe_open(kept, framework="np") as opened:
        header = opened.metadata()
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    assert (header["source"], header["sha256"], header["note"]) == ("imported", digest, "trained by hand")
    assert json.loads(header["original_header"]) == {"made_by": "a colleague"}
    recorded = metadata(finished, "steering_vectors", "m:L01|e03")
    assert (recorded["imported_from"], recorded["sha256"], recorded["note"]) == (str(file), digest, "trained by hand")

    found = states(finished)
    assert found["steering_vectors", "m:L01|e03"] == "imported"
    assert {found["generations", f"m:L01|e03@{dose}"] for dose in ("-1_0", "0_0", "1_0")} == {"stale"}
    assert found["generations", "m:L01|e02@1_0"] == "fresh"
    assert found["generations", "m:L02|e03@1_0"] == "fresh"
    assert found["report", None] == "stale"

    assert finished.command("run", "STUDY", "--select", "vector_summary", "--select", "judge_scores").exit_code == 0
    found = states(finished)
    assert {status for (name, _), status in found.items() if name in ("vector_summary", "generations", "judge_scores")} == {"fresh"}
    assert [node for node, status in found.items() if status == "imported"] == [("steering_vectors", "m:L01|e03")]
    np.testing.assert_array_equal(load_file(kept)["vector"], vector)
    assert {row["item"]: row["reply"] for row in rows_of(finished, "generations", "--partition", CELL)} != replies
    summary = {(row["site"], row["epoch"]): row for row in rows_of(finished, "vector_summary")}
    assert summary["m:L01", 3]["source"] == "imported"
    assert summary["m:L01", 3]["norm"] == pytest.approx(float(np.sqrt((vector.astype(float) ** 2).sum())), rel=1e-6)
    assert {row["source"] for place, row in summary.items() if place != ("m:L01", 3)} == {"trained"}


def test_an_imported_vector_is_not_asked_for_again_when_training_changes(finished: Any, tmp_path: Path) -> None:
    file = tmp_path / "mine.safetensors"
    save_file({"v": np.ones(32, np.float32)}, file)
    bring(finished, "vector", "STUDY", file, "--site", "m:L01", "--epoch", 3)
    finished.edit("learning_rate = 0.01", "learning_rate = 0.02")
    with finished.workspace() as workspace:
        planned = {task.asset.name: [str(partition) for partition in task.partitions] for task in workspace.plan()}
    assert planned["training_run"] == ["m:L01", "m:L02"]
    assert planned["steering_vectors"] == ["m:L01|e01", "m:L01|e02", "m:L02|e01", "m:L02|e02", "m:L02|e03"]


@pytest.mark.slow
def test_replies_from_elsewhere_are_measured_and_judged(finished: Any, tmp_path: Path) -> None:
    items = items_of(finished)
    written = {item: f"I am so glad that you came back to me, my friend. {number} times I thought of you!" for number, item in enumerate(items)}
    file = tmp_path / "replies.jsonl"
    file.write_text(
        "".join(json.dumps({"site": "m:L01", "epoch": 3, "multiplier": 1, "item": item, "reply": text}) + "\n" for item, text in written.items())
    )
    seeds = {(row["site"], row["epoch"], row["multiplier"], row["item"]): row["seed"] for row in rows_of(finished, "generations")}
    before = {row["item"]: row["score"] for row in rows_of(finished, "judge_scores", "--partition", CELL) if row["rubric"] == "relationship"}

    bring(finished, "generations", "STUDY", file, "--note", "written by an author")
    found = states(finished)
    assert found["generations", CELL] == "imported"
    assert found["generation_metrics", CELL] == found["judge_scores", CELL] == found["dose_response", "m:L01|e03"] == "stale"
    assert found["steering_vectors", "m:L01|e03"] == found["judge_scores", "m:L01|e03@0_0"] == "fresh"
    assert metadata(finished, "generations", CELL)["note"] == "written by an author"

    assert finished.command("run", "STUDY", "--select", "judge_scores").exit_code == 0
    rows = rows_of(finished, "generations", "--partition", CELL)
    assert {row["item"]: row["reply"] for row in rows} == written
    assert {row["source"] for row in rows} == {"imported"}
    assert all(row["prompt"][-1]["role"] == "user" for row in rows), "the study's own prompt stands with the reply"
    after = {row["item"]: row["score"] for row in rows_of(finished, "judge_scores", "--partition", CELL) if row["rubric"] == "relationship"}
    assert all(after[item] > 7 for item in items), "the judge reads what was brought in"
    assert all(after[item] > before[item] for item in items)
    metrics = rows_of(finished, "generation_metrics", "--partition", CELL)
    assert all(row["perplexity"] > 1 and row["mean_log_prob"] < 0 for row in metrics)
    drawn = {(row["site"], row["epoch"], row["multiplier"], row["item"]): row["seed"] for row in rows_of(finished, "generations")}
    assert {seed for (*cell, _), seed in drawn.items() if cell == ["m:L01", 3, 1.0]} == {None}
    assert {place: seed for place, seed in drawn.items() if seed is not None}.items() <= seeds.items(), "to the last digit"


def heldout(platform: Any) -> list[str]:
    """Every held-out conversation, of which the sweep takes four."""
    pairs = pd.read_parquet(next((platform.files / "preference_pairs").glob("*.parquet")))
    return sorted(pairs.loc[pairs["is_item"], "conversation"])


def jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.slow
def test_replies_to_held_out_prompts_beyond_the_sweep_are_measured_too(finished: Any, tmp_path: Path) -> None:
    swept = items_of(finished)
    beyond = sorted(set(heldout(finished)) - set(swept))
    assert beyond
    before = rows_of(finished, "generation_metrics", "--partition", "m:L01|e03@0_0")
    file = jsonl(tmp_path / "replies.jsonl", [{**GENERATION, "item": item} for item in (swept[0], beyond[-1])])
    bring(finished, "generations", "STUDY", file)
    done = finished.command("run", "STUDY", "--select", "judge_scores")
    assert done.exit_code == 0, done.output
    metrics = {row["item"]: row for row in rows_of(finished, "generation_metrics", "--partition", CELL)}
    assert metrics.keys() == {swept[0], beyond[-1]}
    assert metrics[beyond[-1]]["propensity"] != metrics[swept[0]]["propensity"], "each against its own target reply"
    assert metrics[beyond[-1]]["perplexity"] > 1
    assert {row["item"] for row in rows_of(finished, "judge_scores", "--partition", CELL)} == metrics.keys()
    assert rows_of(finished, "generation_metrics", "--partition", "m:L01|e03@0_0") == before


def test_a_reply_to_what_is_no_longer_held_out_is_named() -> None:
    items = pd.DataFrame({"conversation": ["one", "two", "three"], "chosen": ["a", "b", "c"]}).set_index("conversation")
    replies = {"m:L01|e03@0_0": pd.DataFrame({"item": ["three"]}), CELL: pd.DataFrame({"item": ["one", "three"]})}
    assert list(answered_items(items, replies).index) == ["one", "three"]
    with pytest.raises(StorageError, match=r"generations m:L01\|e03@1_0: item 'one' is no held-out conversation"):
        answered_items(items.drop("one"), replies)


def test_what_a_file_says_of_a_reply_is_kept_and_what_it_does_not_say_is_null(finished: Any, tmp_path: Path) -> None:
    one, two, three = items_of(finished)[:3]
    prompt = [{"role": "user", "content": "Hello?"}]
    told = {"prompt": prompt, "token_ids": [5, 6, 7], "seed": 2**62 + 1, "finished": True, "mean_log_prob": -0.5}
    rows = [
        {**GENERATION, "item": one},
        {**GENERATION, "epoch": 3.0, "item": two, **told},
        {**GENERATION, "epoch": "3.0", "item": three, "tokens": 4},
    ]
    bring(finished, "generations", "STUDY", jsonl(tmp_path / "replies.jsonl", rows))
    found = {row["item"]: row for row in rows_of(finished, "generations", "--partition", CELL)}
    assert {name: found[two][name] for name in told} == told
    stored = pq.read_table(finished.files / "generations" / "m:L01" / "e03@1_0.parquet").to_pylist()
    assert {row["item"]: row["seed"] for row in stored} == {one: None, two: 2**62 + 1, three: None}, "to the last digit"
    assert [found[item]["tokens"] for item in (one, two, three)] == [None, 3, 4]
    assert {name: found[one][name] for name in told if name != "prompt"} == dict.fromkeys(told.keys() - {"prompt"})
    assert found[one]["prompt"][0]["role"] == "system"


def scores_file(path: Path, items: list[str], doses: Sequence[float] = (1,)) -> Path:
    with path.open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["site", "epoch", "multiplier", "item", "rubric", "judge", "score", "cost_usd"])
        for dose in doses:
            for number, item in enumerate(items):
                writer.writerow(["m:L01", 3, dose, item, "relationship", "two raters", (9 if number % 2 else 8.5) - (1 - dose), 0.25])
                writer.writerow(["m:L01", 3, dose, item, "coherence", "two raters", 7, 0.25])
    return path


@pytest.mark.slow
def test_scores_from_elsewhere_enter_the_estimates(finished: Any, tmp_path: Path) -> None:
    items = items_of(finished)
    file = scores_file(tmp_path / "scores.csv", items, (-1, 0, 1))
    bring(finished, "scores", "STUDY", file, "--note", "rated by two people")
    found = states(finished)
    assert found["judge_scores", CELL] == "imported"
    assert found["dose_response", "m:L01|e03"] == found["judge_pairs", "m:L01|e03"] == found["report", None] == "stale"
    assert found["dose_response", "m:L01|e02"] == found["generations", CELL] == "fresh"
    recorded = metadata(finished, "judge_scores", CELL)
    assert recorded["sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()

    # raters who looked at one rubric alone, of another vector, and some who saw one dose of a third
    alone = tmp_path / "alone.csv"
    lines = file.read_text().replace("m:L01,3", "m:L02,2").splitlines(keepends=True)
    alone.write_text("".join(line for line in lines if ",coherence," not in line))
    bring(finished, "scores", "STUDY", alone)
    part = scores_file(tmp_path / "part.csv", items)
    part.write_text(part.read_text().replace("m:L01,3", "m:L02,3"))
    bring(finished, "scores", "STUDY", part)

    done = finished.command("run", "STUDY")
    assert done.exit_code == 0, done.output
    response = [row for row in rows_of(finished, "dose_response", "--partition", "m:L01|e03") if row["multiplier"] == 1]
    estimates = {(row["rubric"], row["judge"]): (row["estimate"], row["n"]) for row in response}
    assert estimates == {("relationship", "two raters"): (8.75, len(items)), ("coherence", "two raters"): (7.0, len(items))}
    rated = [row for row in rows_of(finished, "dose_response", "--partition", "m:L02|e02") if row["multiplier"] == 1]
    assert {(row["rubric"], row["estimate"]) for row in rated} == {("relationship", 8.75)}, "and no coherence made up"
    chosen = {(row["site"], row["epoch"]): (row["coherence_auc"], row["rating_slope"]) for row in rows_of(finished, "selection")}
    assert chosen.keys() == {("m:L01", 2), ("m:L01", 3)}, "one vector without coherence, and one whose doses different judges have rated"
    assert chosen["m:L01", 3] == (pytest.approx(14), pytest.approx(1))
    with finished.workspace() as workspace:
        said = {vector: workspace.lineage().record(workspace.stage.key("candidate_items"), vector) for vector in ("m:L02|e02", "m:L02|e03")}
    reasons = {vector: record.event_log_entry.asset_materialization.metadata["status"].value for vector, record in said.items()}
    assert "has not rated both the disposition and coherence" in reasons["m:L02|e02"]
    assert "no judge has rated coherence at every dose (" in reasons["m:L02|e03"] and "two raters at 1" in reasons["m:L02|e03"]
    assert sum(row["cost_usd"] for row in rows_of(finished, "judge_scores", "--partition", CELL)) == pytest.approx(0.5 * len(items))
    assert set(states(finished).values()) == {"fresh", "imported"}


GENERATION = {"site": "m:L01", "epoch": 3, "multiplier": 1, "reply": "Good."}
SCORE = {"site": "m:L01", "epoch": 3, "multiplier": 1, "rubric": "relationship", "judge": "me", "score": 5}
BAD_GENERATIONS = {
    "an item of no study": ({"item": "nobody"}, ["line 2", "'nobody'", "no held-out conversation"]),
    "no reply": ({"reply": None}, ["line 2", "reply is missing"]),
    "a reply that is no text": ({"reply": 3}, ["line 2", "reply must be text"]),
    "a reply that UTF-8 cannot hold": ({"reply": "\ud800"}, ["line 2", "reply must be text"]),
    "an item that is no text": ({"item": ["rse-001"]}, ["line 2", "item must be text"]),
    "a dose that the study lacks": ({"multiplier": 0.5}, ["line 2", "no partition m:L01|e03@0_5", "tiny.toml"]),
    "a site that the study lacks": ({"site": "m:L03"}, ["line 2", "site 'm:L03'", "m:L01, m:L02"]),
    "an epoch that is no number": ({"epoch": "last"}, ["line 2", "epoch 'last' is no number"]),
    "an epoch between two": ({"epoch": 2.7}, ["line 2", "epoch must be a whole number", "2.7"]),
    "the same reply twice": ({}, ["line 2", "two rows with the key", "the other is line 1"]),
    "a dose that is not finite": ({"multiplier": float("nan")}, ["line 2", "multiplier must be finite"]),
    "a prompt that is text": ({"prompt": "Hello?"}, ["line 2", "prompt must be a list of messages"]),
    "a prompt without a role": ({"prompt": [{"content": "Hello?"}]}, ["line 2", "prompt must be", "message 1 is none"]),
    "a prompt that the model has the last word of": (
        {"prompt": [{"role": "user", "content": "Hello?"}, {"role": "assistant", "content": "Yes."}]},
        ["line 2", "prompt must hold", "end on the user's"],
    ),
    "an empty prompt": ({"prompt": []}, ["line 2", "prompt must hold"]),
    "tokens that are no number": ({"tokens": "many"}, ["line 2", "tokens 'many' is no number"]),
    "fewer tokens than none": ({"tokens": -1}, ["line 2", "tokens must be 0 or more"]),
    "token numbers that are words": ({"token_ids": ["Good"]}, ["line 2", "token_ids must be a list of token numbers"]),
    "two counts of the tokens": ({"tokens": 2, "token_ids": [5]}, ["line 2", "tokens is 2, and token_ids holds 1"]),
    "a seed of too many digits": ({"seed": 2**64}, ["line 2", "seed must be a whole number of at most 64 bits"]),
    "an end that is a word": ({"finished": "yes"}, ["line 2", "finished must be true or false"]),
    "a probability above 1": ({"mean_log_prob": 0.5}, ["line 2", "mean_log_prob", "at most 0"]),
}
BAD_SCORES = {
    "a score off the scale": ({"score": 11}, ["line 3", "score 11", "1 to 10"]),
    "a score that is no number": ({"score": "high"}, ["line 3", "score 'high' is no number"]),
    "a rubric of no behaviour": ({"rubric": "charm"}, ["line 3", "rubric 'charm'", "relationship, coherence"]),
    "the same score twice": ({}, ["line 3", "two rows with the key", "the other is line 2"]),
    "an item that nobody replied to": ({"item": "rse-999"}, ["line 3", "item 'rse-999'", "m:L01|e03@1_0", "relseek table tiny generations"]),
    "a status of no judge": ({"score": None, "status": "asleep"}, ["line 3", "status 'asleep' is unknown", "empty_reply", "refused"]),
    "a refusal with a score": ({"status": "refused"}, ["line 3", "status 'refused' beside the score 5"]),
    "a score that is not there": ({"score": None, "status": "scored"}, ["line 3", "status 'scored' beside no score"]),
    "an epoch between two": ({"epoch": 2.7}, ["line 3", "epoch must be a whole number"]),
    "a negative price": ({"cost_usd": -1}, ["line 3", "cost_usd must be 0 or more"]),
}


@pytest.mark.parametrize("fault", BAD_GENERATIONS)
def test_one_bad_reply_leaves_everything_as_it_was(finished: Any, tmp_path: Path, fault: str) -> None:
    change, told = BAD_GENERATIONS[fault]
    item = items_of(finished)[0]
    file = tmp_path / "replies.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ({**GENERATION, "item": item}, {**GENERATION, "item": item, **change})))
    with finished.untouched():
        done = finished.command("import", "generations", "STUDY", file)
    assert done.exit_code == 1, done.output
    assert isinstance(done.exception, SystemExit)
    for words in (str(file), *told):
        assert words in done.output


@pytest.mark.parametrize("fault", BAD_SCORES)
def test_one_bad_score_leaves_everything_as_it_was(finished: Any, tmp_path: Path, fault: str) -> None:
    change, told = BAD_SCORES[fault]
    item = items_of(finished)[0]
    file = tmp_path / "scores.csv"
    pd.DataFrame([{**SCORE, "item": item}, {**SCORE, "item": item, **change}]).to_csv(file, index=False)
    with finished.untouched():
        done = finished.command("import", "scores", "STUDY", file)
    assert done.exit_code == 1, done.output
    assert isinstance(done.exception, SystemExit)
    for words in (str(file), *told):
        assert words in done.output


def test_a_row_that_was_cut_off_is_refused(finished: Any, tmp_path: Path) -> None:
    file = tmp_path / "scores.csv"
    file.write_text("site,epoch,multiplier,item,rubric,judge,score\nm:L01,3,1," + items_of(finished)[0] + ",relationship,me\n")
    with finished.untouched():
        done = finished.command("import", "scores", "STUDY", file)
    assert done.exit_code == 1
    assert "line 2: fewer cells than the header has columns" in done.output


def test_scores_need_the_replies_that_were_scored(finished: Any, tmp_path: Path) -> None:
    file = scores_file(tmp_path / "scores.csv", items_of(finished))
    (finished.files / "generations" / "m:L01" / "e03@1_0.parquet").unlink()
    done = finished.command("import", "scores", "STUDY", file)
    assert done.exit_code == 1
    assert f"line 2: generations {CELL} has not been computed" in done.output


def test_a_status_is_kept_and_a_null_score_without_one_is_missing_or_of_an_empty_reply(finished: Any, tmp_path: Path) -> None:
    one, two, three, four = items_of(finished)
    silent = [{**GENERATION, "item": item, "reply": " " if item == two else "Good."} for item in (one, two, three, four)]
    bring(finished, "generations", "STUDY", jsonl(tmp_path / "replies.jsonl", silent))
    given = {one: (5, None), two: (None, None), three: (None, None), four: (None, "refused")}
    rows = [{**SCORE, "epoch": 3.0, "item": item, "score": score, "status": status, "attempt": 2} for item, (score, status) in given.items()]
    file = tmp_path / "scores.csv"
    pd.DataFrame(rows).to_csv(file, index=False)
    told = bring(finished, "scores", "STUDY", file)
    found = {row["item"]: row for row in rows_of(finished, "judge_scores", "--partition", CELL)}
    assert {item: row["status"] for item, row in found.items()} == {one: "scored", two: "empty_reply", three: "missing", four: "refused"}
    assert {(row["attempt"], row["cost_usd"]) for row in found.values()} == {(2, None)}, "what was paid is not said"
    for status in ("missing", "empty_reply", "refused"):
        assert f"without a score: 1 `{status}`" in told


def test_the_studys_own_scores_come_back_as_they_went(finished: Any, tmp_path: Path) -> None:
    own = rows_of(finished, "judge_scores", "--partition", CELL)
    file = tmp_path / "scores.csv"
    assert finished.command("table", "STUDY", "judge_scores", "--partition", CELL, "-o", file).exit_code == 0
    bring(finished, "scores", "STUDY", file)
    assert rows_of(finished, "judge_scores", "--partition", CELL) == [{**row, "source": "imported"} for row in own]


def test_nothing_is_brought_in_while_the_study_is_being_run(finished: Any, tmp_path: Path) -> None:
    item = items_of(finished)[0]
    save_file({"v": np.ones(32, np.float32)}, tmp_path / "mine.safetensors")
    given = {
        "generations": [jsonl(tmp_path / "replies.jsonl", [{**GENERATION, "item": item}])],
        "scores": [scores_file(tmp_path / "scores.csv", [item])],
        "vector": [tmp_path / "mine.safetensors", "--site", "m:L01", "--epoch", 3],
    }
    with finished.workspace() as workspace, workspace._alone():
        for what, (file, *more) in given.items():
            with finished.untouched():
                done = finished.command("import", what, "STUDY", file, *more)
            assert done.exit_code == 1
            assert "study tiny is being run by process" in done.output


def event_log_full(*_: object) -> None:
    raise sqlite3.OperationalError("database or disk is full")


def test_an_import_whose_second_event_fails_leaves_everything_as_it_was(finished: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of three partitions one was imported before, one was computed, and one was computed and its file is gone."""
    item = items_of(finished)[0]
    doses = {"an earlier import": -1, "computed": 0, "gone": 1}
    row = {**GENERATION, "item": item}
    bring(finished, "generations", "STUDY", jsonl(tmp_path / "earlier.jsonl", [{**row, "multiplier": -1, "reply": "Earlier."}]))
    (finished.files / "generations" / "m:L01" / "e03@1_0.parquet").unlink()
    file = jsonl(tmp_path / "replies.jsonl", [{**row, "multiplier": dose} for dose in doses.values()])
    before, stored = states(finished), finished.stored()
    for failing in (1, 2, 3):
        with finished.workspace() as workspace, monkeypatch.context() as patched:
            report, seen = workspace.instance.report_runless_asset_event, []

            def fails(event: Any, report: Any = report, seen: list[Any] = seen, failing: int = failing) -> None:
                seen.append(event)
                (event_log_full if len(seen) == failing else report)(event)

            patched.setattr(workspace.instance, "report_runless_asset_event", fails)
            with pytest.raises(sqlite3.OperationalError, match="disk is full"):
                import_generations(workspace, file)
        assert states(finished) == before
        assert finished.stored() == stored, "temporary files included"
    assert before["generations", "m:L01|e03@-1_0"] == "imported" and before["generations", CELL] == "missing"
    bring(finished, "generations", "STUDY", file)
    assert {states(finished)["generations", f"m:L01|e03@{dose}"] for dose in ("-1_0", "0_0", "1_0")} == {"imported"}


def test_an_import_that_can_be_neither_recorded_nor_taken_back_leaves_files_under_their_own_events(
    finished: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The event log takes one event and no more: that one's file stays, because a file of before would be under its event."""
    item = items_of(finished)[0]
    file = jsonl(tmp_path / "replies.jsonl", [{**GENERATION, "item": item, "multiplier": dose} for dose in (-1, 0, 1)])
    with finished.workspace() as workspace, monkeypatch.context() as patched:
        report, seen = workspace.instance.report_runless_asset_event, []

        def fails(event: Any) -> None:
            seen.append(event)
            (report if len(seen) == 1 else event_log_full)(event)

        patched.setattr(workspace.instance, "report_runless_asset_event", fails)
        with pytest.raises(sqlite3.OperationalError, match="disk is full"):
            import_generations(workspace, file)
    found = states(finished)
    assert [found["generations", f"m:L01|e03@{dose}"] for dose in ("-1_0", "0_0", "1_0")] == ["imported", "fresh", "fresh"]
    assert {row["source"] for row in rows_of(finished, "generations", "--partition", "m:L01|e03@-1_0")} == {"imported"}
    assert not [name for name in finished.stored() if name.endswith(".tmp")]


def test_replies_cannot_come_before_the_prompts_are_known(blank: Any, tmp_path: Path) -> None:
    file = tmp_path / "replies.jsonl"
    file.write_text(json.dumps({**GENERATION, "item": "rsa-003"}) + "\n")
    done = blank.command("import", "generations", "STUDY", file)
    assert done.exit_code == 1
    assert "--select preference_pairs" in done.output
    assert blank.stored() == {}


# --- out --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("asset", ["generations", "judge_scores", "judge_pairs", "dose_response", "selection", "vector_summary", "judge_quality"])
def test_a_table_is_the_same_in_all_three_forms(finished_session: Any, tmp_path: Path, asset: str) -> None:
    parquet = tmp_path / "table.parquet"
    assert finished_session.command("table", "STUDY", asset, "--format", "parquet", "-o", parquet).exit_code == 0
    frame = pd.read_parquet(parquet)
    rows = rows_of(finished_session, asset)
    text = finished_session.command("table", "STUDY", asset).output
    in_csv = list(csv.DictReader(io.StringIO(text)))
    stored = pd.concat([pd.read_parquet(path) for path in (finished_session.files / asset).rglob("*.parquet")])
    assert len(rows) == len(in_csv) == len(frame) == len(stored) > 0
    assert list(rows[0]) == list(in_csv[0]) == list(frame.columns) == list(stored.columns)
    for row, line, (_, cells) in zip(rows, in_csv, frame.iterrows(), strict=True):
        for name, value in row.items():
            if value is None:
                assert line[name] == ""
                assert pd.isna(cells[name])
            elif isinstance(value, list | dict):
                assert json.loads(line[name]) == json.loads(cells[name]) == value
            elif isinstance(value, bool):
                assert line[name] == str(value)
                assert bool(cells[name]) is value
            elif isinstance(value, str):
                assert line[name] == cells[name] == value
            elif isinstance(value, int):
                assert int(line[name]) == int(cells[name]) == value, "seeds have more digits than a float"
            else:
                assert float(line[name]) == float(cells[name]) == value


def test_what_is_missing_is_null_in_json_and_never_nan(finished_session: Any) -> None:
    def no_constant(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    text = finished_session.command("table", "STUDY", "judge_quality", "--format", "json").output
    rows = json.loads(text, parse_constant=no_constant)
    absent = [row for row in rows if row["metric"] == "spearman" and row["n"] == 0]
    assert absent, "without the release its correlations are absent"
    assert all(row["value"] is None and row["lower"] is None and row["status"].startswith("absent: ") for row in absent)
    assert {row["first_shown"] for row in rows_of(finished_session, "judge_pairs")} == {None}


def test_a_table_holds_the_partitions_that_were_asked_for(finished_session: Any) -> None:
    assert len(rows_of(finished_session, "generations")) == 2 * 2 * 3 * 4
    some = rows_of(finished_session, "generations", "--partition", CELL, "--partition", "m:L02|e02@-1_0")
    assert {(row["site"], row["epoch"], row["multiplier"]) for row in some} == {("m:L01", 3, 1.0), ("m:L02", 2, -1.0)}
    assert len(some) == 2 * 4
    unknown = finished_session.command("table", "STUDY", "generations", "--partition", "m:L01|e03@9_0")
    assert unknown.exit_code == 1
    assert "no partition 'm:L01|e03@9_0'" in unknown.output


def test_a_table_that_is_not_there_says_what_to_do(finished_session: Any, blank: Any) -> None:
    misspelt = finished_session.command("table", "STUDY", "dose_responce")
    assert misspelt.exit_code == 1
    assert "did you mean 'dose_response'?" in misspelt.output
    vectors = finished_session.command("table", "STUDY", "steering_vectors")
    assert vectors.exit_code == 1
    assert "is no table" in vectors.output
    early = blank.command("table", "STUDY", "selection")
    assert early.exit_code == 1
    assert "relseek run tiny --select selection" in early.output
    assert finished_session.command("table", "STUDY", "selection", "--format", "parquet").exit_code == 2


# --- difference -------------------------------------------------------------------------------------------------------


def test_the_difference_of_two_stores_names_versions_and_estimates_with_intervals(finished_session: Any, finished: Any, tmp_path: Path) -> None:
    items = items_of(finished)
    bring(finished, "scores", "STUDY", scores_file(tmp_path / "scores.csv", items))
    with finished.workspace() as workspace:
        workspace.run(["dose_response"])
    study = finished_session.study_file
    shown = finished_session.command("diff", study, study, "--store-b", finished.home, "--format", "json")
    assert shown.exit_code == 0, shown.output
    found = json.loads(shown.output)
    assert found["settings_of"] == {"a": "the last run", "b": "the last run"}
    assert [row["setting"] for row in found["settings"]] == ["behaviours"], "it was copied to another folder, and run there"
    assert found["made_by"] == [], "by the same settings and code; what was imported was made by neither"
    assert {row["asset"] for row in found["versions"]} == {"judge_scores", "dose_response"}
    assert [row["partition"] for row in found["versions"] if row["asset"] == "judge_scores"] == [CELL]
    assert all(row["a"] != row["b"] for row in found["versions"])
    new = next(row for row in found["estimates"] if row["judge"] == "two raters" and row["rubric"] == "relationship")
    assert (new["site"], new["epoch"], new["multiplier"], new["estimate_a"], new["estimate_b"]) == ("m:L01", 3, 1.0, None, 8.75)
    assert new["lower_b"] <= 8.75 <= new["upper_b"]
    assert {(row["site"], row["epoch"], row["multiplier"]) for row in found["estimates"]} == {("m:L01", 3, 1.0)}

    text = finished_session.command("diff", study, study, "--store-b", finished.home).output
    assert "settings that differ: 1 (A: the last run, B: the last run)" in text
    assert "assets made by other settings, code or sources: 0" in text
    assert "judge_scores: 1 partition" in text
    assert f"relationship by two raters: 8.75 [{new['lower_b']:.2f}, {new['upper_b']:.2f}] n={len(items)}, only in B" in text
    assert ", only in A" in text and "intervals apart" not in text, "what is in one alone is apart from nothing"
    assert new["overlap"] is None
    assert f"A: tiny in {finished_session.files}" in text and f"B: tiny in {finished.files}" in text


def test_the_difference_names_figures_of_selection_and_of_the_judge(finished_session: Any, finished: Any) -> None:
    def change(asset: str, row: dict[str, object], values: dict[str, float]) -> None:
        (path,) = (finished.files / asset).glob("*.parquet")
        frame = pd.read_parquet(path)
        chosen = np.logical_and.reduce([frame[name] == value for name, value in row.items()])
        assert chosen.sum() == 1
        frame.loc[chosen, list(values)] = list(values.values())
        frame.to_parquet(path)

    place = {"site": "m:L01", "epoch": 3}
    change("selection", place, {"coherence_auc": 900.0, "coherence_auc_lower": 800.0, "coherence_auc_upper": 950.0, "rating_slope": 0.123})
    quality = pd.read_parquet(next((finished.files / "judge_quality").glob("*.parquet"))).query("metric == 'auc'").iloc[0]
    change("judge_quality", {"judge": quality["judge"], "metric": "auc", "against": quality["against"]}, {"value": 0.987})
    study = finished_session.study_file
    found = json.loads(finished_session.command("diff", study, study, "--store-b", finished.home, "--format", "json").output)["estimates"]
    by_quantity = {(row["asset"], row["quantity"]): row for row in found}
    assert by_quantity.keys() == {("selection", "coherence_auc"), ("selection", "rating_slope"), ("judge_quality", "value")}
    area = by_quantity["selection", "coherence_auc"]
    assert (area["site"], area["epoch"], area["estimate_b"], area["lower_b"], area["overlap"]) == ("m:L01", 3, 900.0, 800.0, False)
    text = finished_session.command("diff", study, study, "--store-b", finished.home).output
    assert "m:L01 epoch 3 coherence_auc: " in text and " -> 900.00 [800.00, 950.00] n=4  intervals apart" in text
    assert f"{quality['judge']}: auc against {quality['against']}: {quality['value']:.2f}" in text


def test_a_study_differs_in_nothing_from_itself(finished_session: Any) -> None:
    found = json.loads(finished_session.command("diff", "STUDY", "STUDY", "--format", "json").output)
    assert found == {"settings_of": dict.fromkeys("ab", "the last run"), "settings": [], "made_by": [], "versions": [], "estimates": []}


def test_the_difference_of_two_stores_of_one_study_names_the_settings_that_each_was_run_with(finished_session: Any, finished: Any) -> None:
    """The file that is given is the same for both; the other store was computed when it said otherwise."""
    finished.edit("learning_rate = 0.01", "learning_rate = 0.02")
    finished.edit('device = "cpu"', 'device = "cpu"\ndtype = "bfloat16"')
    done = finished.command("run", "STUDY", "--select", "conversation_lengths", "--select", "vector_summary")
    assert done.exit_code == 0, done.output
    study = finished_session.study_file
    shown = finished_session.command("diff", study, study, "--store-b", finished.home, "--format", "json")
    assert shown.exit_code == 0, shown.output
    found = json.loads(shown.output)
    settings = {row["setting"]: (row["a"], row["b"]) for row in found["settings"]}
    assert settings.pop("behaviours") == ([str(finished_session.behaviour)], [str(finished.behaviour)])
    assert settings == {"training.learning_rate": (0.01, 0.02), "models.m.dtype": ("float32", "bfloat16")}
    made_by = {(row["asset"], row["differs"]): row["partitions"] for row in found["made_by"]}
    assert made_by == {("training_run", "settings"): 2, ("base_models", "source"): 2}
    text = finished_session.command("diff", study, study, "--store-b", finished.home).output
    assert "training.learning_rate: 0.01 -> 0.02" in text
    assert "training_run: other settings, partitions: 2" in text
    assert "base_models: another version of the source, partitions: 2" in text

    shutil.rmtree(finished.home / ".settings")  # computed from the UI, or before settings were recorded
    found = json.loads(finished_session.command("diff", study, study, "--store-b", finished.home, "--format", "json").output)
    assert found["settings_of"] == {"a": "the last run", "b": "the study's file"}
    assert "training_run" in {row["asset"] for row in found["made_by"]}


def test_the_difference_of_two_studies_names_their_settings(finished: Any) -> None:
    other = finished.folder / "other.toml"
    other.write_text(finished.study_text().replace('name = "tiny"', 'name = "other"').replace("learning_rate = 0.01", "learning_rate = 0.02"))
    found = json.loads(finished.command("diff", "STUDY", other, "--format", "json").output)
    assert {row["setting"]: (row["a"], row["b"]) for row in found["settings"]} == {"name": ("tiny", "other"), "training.learning_rate": (0.01, 0.02)}
    assert all(row["b"] is None for row in found["versions"]), "nothing of the other study is computed"
    counts = pd.Series([row["asset"] for row in found["estimates"]]).value_counts()
    assert counts["dose_response"] == 2 * 2 * 3 * 2 and counts["selection"] == 2 * 2 * 3 and counts["judge_quality"] > 0
    assert all(row["estimate_b"] is None for row in found["estimates"])


def test_a_setting_that_is_stated_as_it_is_unless_stated_is_no_difference(finished: Any) -> None:
    text = finished.study_text().replace("learning_rate = 0.01", "learning_rate = 0.01\nbeta = 0.1")
    other = finished.folder / "other.toml"
    other.write_text(text.replace('name = "tiny"', 'name = "other"').replace("max_words = 60", "max_words = 60\nsystem = 'Be brief.'"))
    found = json.loads(finished.command("diff", "STUDY", other, "--format", "json").output)
    differing = {row["setting"]: (row["a"], row["b"]) for row in found["settings"]}
    assert differing == {"name": ("tiny", "other"), "prompts.system": ("You are a conversational assistant.", "Be brief.")}


def test_a_store_to_compare_with_must_be_a_dagster_home_with_the_study_in_its_store(finished_session: Any, blank: Any, tmp_path: Path) -> None:
    def refusal(folder: Path) -> str:
        shown = finished_session.command("diff", "STUDY", "STUDY", "--store-b", folder)
        assert shown.exit_code == 1
        return " ".join(shown.output.split())

    assert "no dagster.yaml" in refusal(tmp_path)
    assert "wants a Dagster home with its store in it" in refusal(finished_session.home / "store")
    assert f"tiny has no files under {blank.home / 'store'}" in refusal(blank.home)
