"""Language judges in a study: what a run sends, leaves out, collects and pays, through the platform and over a loopback socket."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from relseek_assets.definitions import build_stage
from relseek_assets.study import load_study
from relseek_resources.storage import content_version
from tests.judging.batch_server import BatchServer, hashed_answer
from tests.judging.chat_server import Says, serving
from tests.platform.judged_by import KEY_VARIABLE, SELECT, complete_all, counts, requests_of, run_until_collected, table, with_judge

CHECKOUT = Path(__file__).parents[2]
ASKING = {"rating_requests", "pairwise_requests", "judge_submissions", "judge_answers"}
GROUPS = 4  # two sites and two evaluated epochs
REQUESTS = GROUPS * (4 * 3 * 2 + 4 * 3)  # four items, three doses, two rubrics; three pairs of doses
PRICE = {"prompt": 2.50, "completion": 10.00}  # of gpt-4o, in USD for a million tokens, of which Batch takes half


@pytest.fixture(autouse=True)
def _key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY_VARIABLE, "a key")


@pytest.fixture
def server() -> Iterator[BatchServer]:
    with BatchServer() as found:
        yield found


# --- what a study without them is -------------------------------------------------------------------------------------


def test_a_study_without_language_judges_has_the_graph_and_the_versions_that_it_always_had() -> None:
    study = load_study("quickstart")
    stage = build_stage(study)
    assert not ASKING & stage.catalogue.keys()
    assert not any(asset.waits or asset.bill for asset in stage.catalogue.values())
    versions = {name: next(iter(asset.definition.code_versions_by_key.values())) for name, asset in stage.catalogue.items()}
    assert versions["judge_scores"] == f"1-{content_version(['embedded'])}"
    assert versions["judge_pairs"] == f"1-{content_version([study.paired_doses])}"
    assert versions["candidate_items"] == f"2-{content_version([study.selection_doses])}"
    assert "raw" not in stage.catalogue["judge_scores"].schema.names  # type: ignore[union-attr]


def test_judges_add_requests_submissions_and_answers_and_nothing_else(finished: Any) -> None:
    before = build_stage(load_study(str(finished.study_file)))
    with_judge(finished, "http://127.0.0.1:9/v1")
    stage = build_stage(load_study(str(finished.study_file)))
    assert stage.catalogue.keys() - before.catalogue.keys() == ASKING

    def read_by(name: str) -> set[str]:
        return {key.path[-1] for key in stage.graph.get(stage.key(name)).parent_keys}

    assert read_by("rating_requests") == {"generations", "rating_rubric", "coherence_rubric", "few_shots"}
    assert read_by("pairwise_requests") == {"generations", "pairwise_definition", "few_shots"}
    assert read_by("judge_submissions") == {"rating_requests", "pairwise_requests"}
    assert read_by("judge_answers") == {"rating_requests", "pairwise_requests", "judge_submissions"}
    assert {"rating_requests", "judge_answers"} <= read_by("judge_scores")
    assert {"pairwise_requests", "judge_answers"} <= read_by("judge_pairs")


def test_a_judge_that_is_asked_at_once_submits_nothing(finished: Any) -> None:
    stage = build_stage(load_study(str(with_judge(finished, "http://127.0.0.1:9/v1", kind="openai", more="pairwise = false\n").study_file)))
    assert ASKING & stage.catalogue.keys() == {"rating_requests", "judge_answers"}
    assert stage.catalogue["judge_answers"].waits is None


# --- by Batch ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_sends_leaves_out_what_is_in_flight_and_a_later_one_collects_it(finished: Any, server: BatchServer) -> None:
    with_judge(finished, server.base_url)
    scores_before = (finished.files / "judge_scores" / "m:L01" / "e02@0_0.parquet").read_bytes()
    first = finished.command("run", "STUDY", *SELECT)
    assert first.exit_code == 0, first.output
    assert len(server.created) == GROUPS
    assert "judge_answers: 4 partitions left out: waits for batch batch_" in first.output
    assert f"gpt/m:L01/e02: batch_{1:08d}"[:16] in first.output
    assert "at most $0.0" in first.output
    states = counts(finished)
    assert states["judge_submissions"] == {"fresh": GROUPS}
    assert states["judge_answers"] == {"waiting": GROUPS}
    assert states["judge_scores"] == {"waiting": 12}
    assert states["selection"] == {"waiting": 1}
    assert (finished.files / "judge_scores" / "m:L01" / "e02@0_0.parquet").read_bytes() == scores_before, "nothing pretends to be finished"
    assert not (finished.files / "judge_answers").exists()

    run_until_collected(finished)
    asked = requests_of(finished).set_index("custom_id")
    assert len(asked) == REQUESTS
    assert {custom_id: len(charges) for custom_id, charges in server.charges.items()} == dict.fromkeys(asked.index, 1)
    assert counts(finished)["selection"] == {"fresh": 1}

    scores = table(finished, "judge_scores").query("judge == 'gpt'").set_index(["site", "epoch", "multiplier", "item", "rubric"])
    pairs = table(finished, "judge_pairs").query("judge == 'gpt'").set_index(["site", "epoch", "item", "multiplier_a", "multiplier_b"])
    for custom_id, row in asked.iterrows():
        said = json.loads(hashed_answer(str(custom_id), json.loads(row["body"])))
        if row["task"] == "rating":
            found = scores.loc[(row["site"], row["epoch"], row["multiplier"], row["item"], row["rubric"])]
            assert (found["score"], found["status"], json.loads(found["raw"])) == (said["score"], "scored", said)
        else:
            found = pairs.loc[(row["site"], row["epoch"], row["item"], row["multiplier_a"], row["multiplier_b"])]
            second = {"a": "b", "b": "a"}[row["first_shown"]]
            assert found["winner"] == (row["first_shown"] if said["answer"] == "A" else second)
    tokens = sum(charge.tokens for charges in server.charges.values() for charge in charges)
    assert int(scores["prompt_tokens"].sum() + pairs["prompt_tokens"].sum()) == tokens
    paid = (tokens * PRICE["prompt"] + (scores["completion_tokens"].sum() + pairs["completion_tokens"].sum()) * PRICE["completion"]) / 2e6
    assert scores["cost_usd"].sum() + pairs["cost_usd"].sum() == pytest.approx(paid)
    told = json.loads(finished.command("batches", "STUDY", "--json").stdout)
    assert sum(row["paid_usd"] for row in told) == pytest.approx(paid)
    assert {row["state"] for row in told} == {"collected"}
    assert sum(row["to_come_usd"] for row in told) == 0

    assert "everything is fresh" in finished.command("run", "STUDY", *SELECT).output
    rubric_makes_exactly_what_follows_stale(finished, server)


def test_a_report_that_waits_for_answers_says_for_what_instead_of_where_it_is(finished: Any, server: BatchServer) -> None:
    with_judge(finished, server.base_url)
    stored, copied = finished.files / "report" / "all.html", finished.folder / "page.html"
    page = stored.read_bytes()
    stored.unlink()
    shown = finished.command("report", "STUDY", "-o", copied)
    assert shown.exit_code == 1 and isinstance(shown.exception, SystemExit)
    assert "there is no report yet: waiting, waits for batch batch_" in shown.output
    assert not any(line.startswith("report: ") for line in shown.output.splitlines()) and not copied.exists()

    stored.write_bytes(page)
    earlier = finished.command("report", "STUDY", "-o", copied)
    assert earlier.exit_code == 0, earlier.output
    assert "report: the page is an earlier one, because it is waiting: waits for batch batch_" in earlier.output
    assert copied.read_bytes() == page


def rubric_makes_exactly_what_follows_stale(platform: Any, server: BatchServer) -> None:
    """A new wording of one rubric is asked, the other rubric and the pairs are not asked again."""
    platform.edit("Rate the assistant's final reply only", "Rate the final reply of the assistant only", "behaviour/rating_rubric.toml")
    states = counts(platform)
    for asset in ("generations", "generation_metrics", "pairwise_requests", "embedded_judge"):
        assert set(states[asset]) == {"fresh"}, asset
    for asset in ("rating_requests", "judge_submissions", "judge_answers", "judge_scores", "judge_pairs", "dose_response", "selection"):
        assert set(states[asset]) == {"stale"}, asset
    paid_before = set(server.charges)
    dry = platform.command("run", "STUDY", *SELECT, "--dry-run")
    assert "judge_submissions" in dry.output and "USD" in dry.output
    run_until_collected(platform)
    asked = requests_of(platform).set_index("custom_id")
    new = asked.loc[sorted(set(server.charges) - paid_before)]
    assert set(new["rubric"]) == {"relationship"}
    assert set(new["task"]) == {"rating"}
    assert len(new) == GROUPS * 4 * 3
    assert all(len(charges) == 1 for charges in server.charges.values())
    assert counts(platform)["selection"] == {"fresh": 1}


@pytest.mark.slow
def test_an_answer_that_is_no_score_is_asked_again_alone_and_stays_a_row_with_a_status(finished: Any, server: BatchServer) -> None:
    with_judge(finished, server.base_url, more="attempts = 2\n")
    assert finished.command("run", "STUDY", "--select", "rating_requests", "--select", "pairwise_requests").exit_code == 0
    asked = requests_of(finished).set_index("custom_id")
    ratings, comparisons = (sorted(asked[asked["task"] == task].index) for task in ("rating", "pairwise"))
    server.fates = {
        ratings[0]: ["prose", "prose"],
        ratings[1]: ["prose", "good"],
        comparisons[0]: ["refusal", "refusal"],
        comparisons[1]: ["http_500"],
    }
    said = run_until_collected(finished)
    assert any("asked again" in text or "left out" in text for text in said[1:])
    answers = table(finished, "judge_answers").set_index("custom_id")
    assert answers.loc[ratings[0], ["status", "attempt"]].tolist() == ["unreadable", 2]
    assert answers.loc[ratings[1], ["status", "attempt"]].tolist() == ["scored", 2]
    assert answers.loc[comparisons[0], ["status", "attempt"]].tolist() == ["refused", 2]
    assert answers.loc[comparisons[1], ["status", "attempt"]].tolist() == ["scored", 2]
    assert {custom_id for custom_id, charges in server.charges.items() if len(charges) > 1} == {*ratings[:2], comparisons[0]}
    scores, pairs = (table(finished, name).query("judge == 'gpt'") for name in ("judge_scores", "judge_pairs"))
    assert scores["status"].value_counts().to_dict() == {"scored": len(ratings) - 1, "unreadable": 1}
    assert scores.set_index("status").loc["unreadable", ["score", "band"]].isna().all()
    assert pairs.set_index("status").loc["refused", "winner"] is None or pairs.set_index("status").isna().loc["refused", "winner"]
    matches = table(finished, "candidate_items")["matches"].sum()
    assert matches > 0


def test_above_the_budget_nothing_is_sent(finished: Any, server: BatchServer) -> None:
    with_judge(finished, server.base_url, budget=0.01)
    done = finished.command("run", "STUDY", *SELECT)
    assert done.exit_code == 1
    assert "judge 'gpt' of study tiny would cost $0." in done.output
    assert "above its budget_usd of $0.01; nothing was sent. Raise budget_usd" in done.output
    assert server.calls == []
    dry = finished.command("run", "STUDY", *SELECT, "--dry-run")
    assert dry.exit_code == 0
    assert f"{REQUESTS} requests" in dry.output and "nothing was sent" in dry.output


def test_a_missing_key_and_a_dead_endpoint_are_said_and_what_was_made_is_kept(
    finished: Any, server: BatchServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_judge(finished, server.base_url)
    monkeypatch.delenv(KEY_VARIABLE)
    done = finished.command("run", "STUDY", *SELECT)
    assert done.exit_code == 1
    assert f"the environment variable {KEY_VARIABLE} is not set" in done.output
    assert server.calls == []
    assert counts(finished)["rating_requests"] == {"fresh": 12}


# --- at once ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_judge_that_is_asked_at_once_answers_in_the_run_and_is_not_asked_twice(finished: Any) -> None:
    def answer(text: str, nth: int) -> Says:
        return Says('{"answer": "B"}' if '"answer"' in text else '{"score": 4}')

    with serving(answer) as server:
        with_judge(finished, server.url, kind="openai", more="concurrency = 4\n")
        done = finished.command("run", "STUDY", *SELECT)
        assert done.exit_code == 0, done.output
        asked = requests_of(finished)
        assert len(asked) == REQUESTS == len(server.bodies)
        assert counts(finished)["selection"] == {"fresh": 1}
        scores = table(finished, "judge_scores").query("judge == 'gpt'")
        assert (set(scores["status"]), set(scores["score"])) == ({"scored"}, {4.0})
        (finished.files / "judge_answers" / "m:L01" / "e02.parquet").unlink()
        again = finished.command("run", "STUDY", *SELECT)
        assert again.exit_code == 0, again.output
        assert len(server.bodies) == REQUESTS, "the journal has the answers of a file that is gone"


# --- killed -----------------------------------------------------------------------------------------------------------

#: `relseek` ends itself by SIGKILL at a moment that is too short to be met from outside, once: before and after each call that costs money.
KILLED = """
import os, signal, sys
from relseek_resources.judges import provider, batches
from relseek_resources.judges.ledger import Ledger
seen = 0
def killing(module, name, after):
    real = getattr(module, name)
    def wrapped(*arguments, **options):
        global seen
        seen += 1
        if not after and seen == {number}:
            os.kill(os.getpid(), signal.SIGKILL)
        found = real(*arguments, **options)
        if after and seen == {number}:
            os.kill(os.getpid(), signal.SIGKILL)
        return found
    setattr(module, name, wrapped)
killing({module}, {name!r}, {after})
from relseek_assets.cli import main
main(sys.argv[1:])
"""
#: In this order: what each death leaves is where the next process begins.
ASKING_AGAIN = {
    "what to ask again is written down and not sent": ("Ledger", "start", 1, True),
    "its file is uploaded and nobody knows": ("provider", "upload", 1, True),
    "its batch is created and nobody knows": ("provider", "find_or_make", 1, True),
}
#: Where, at which call of the process, and whether before or after it.
SENDING = {
    "a file is uploaded and nobody knows": ("provider", "upload", 1, True),
    "a file is to be uploaded": ("provider", "upload", 1, False),
    "a batch is to be created": ("provider", "find_or_make", 2, False),
    "a batch is created and nobody knows": ("provider", "find_or_make", 2, True),
}
COLLECTING = {
    "results are downloaded and not read": ("provider", "download", 2, True),
    "results are read and are no asset yet": ("Ledger", "mark_collected", 3, True),
}


def kill_itself(platform: Any, moment: tuple[str, str, int, bool], asset: str) -> None:
    module, name, number, after = moment
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            KILLED.format(module=module, name=name, number=number, after=after),
            "run",
            str(platform.study_file),
            "--select",
            asset,
        ],
        env={**platform.environment(), KEY_VARIABLE: "a key"},
        cwd=CHECKOUT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL, done.stdout + done.stderr


@pytest.mark.slow
def test_a_run_killed_while_it_sends_and_while_it_collects_pays_nothing_twice(finished: Any, server: BatchServer) -> None:
    with_judge(finished, server.base_url)
    for moment in SENDING.values():
        kill_itself(finished, moment, "judge_submissions")
    done = finished.command("run", "STUDY", "--select", "judge_submissions")
    assert done.exit_code == 0, done.output
    assert len(server.created) == len({sha256 for sha256, _ in server.created}) == GROUPS
    complete_all(server)
    for moment in COLLECTING.values():
        kill_itself(finished, moment, "judge_answers")
    done = finished.command("run", "STUDY", "--select", "judge_answers")
    assert done.exit_code == 0, done.output
    asked = set(requests_of(finished)["custom_id"])
    assert {custom_id: len(charges) for custom_id, charges in server.charges.items()} == dict.fromkeys(asked, 1)
    assert len(server.created) == GROUPS
    answers = table(finished, "judge_answers")
    assert set(answers["custom_id"]) == asked
    assert set(answers["status"]) == {"scored"}


@pytest.mark.slow
def test_a_run_killed_while_it_asks_again_leaves_a_study_that_ends(finished: Any, server: BatchServer) -> None:
    with_judge(finished, server.base_url, more="attempts = 2\n")
    assert finished.command("run", "STUDY", "--select", "judge_submissions").exit_code == 0
    asked = requests_of(finished)
    hit = min(asked.query("site == 'm:L01' and epoch == 2")["custom_id"])
    server.fates[hit] = ["prose"]
    complete_all(server)
    for moment in ASKING_AGAIN.values():
        kill_itself(finished, moment, "judge_answers")
        assert counts(finished)["judge_answers"] == {"missing": GROUPS}, "nothing is in flight that could be waited for"
    run_until_collected(finished)
    assert counts(finished)["selection"] == {"fresh": 1}
    assert {name: len(runs) for name, runs in server.charges.items()} == dict.fromkeys(asked["custom_id"], 1) | {hit: 2}
    assert len(server.created) == GROUPS + 1
    assert set(table(finished, "judge_answers")["status"]) == {"scored"}


# --- money and endpoints ----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_asking_again_keeps_to_the_budget_and_goes_on_when_it_is_raised(finished: Any, server: BatchServer) -> None:
    with_judge(finished, server.base_url, more="attempts = 2\n")
    assert finished.command("run", "STUDY", "--select", "judge_submissions").exit_code == 0
    hit = min(requests_of(finished)["custom_id"])
    server.fates[hit] = ["prose"]
    complete_all(server)
    finished.edit("budget_usd = 5.0", "budget_usd = 0.001")
    done = finished.command("run", "STUDY", "--select", "judge_answers")
    assert done.exit_code == 1
    assert "judge 'gpt' of study tiny would cost $0.0" in done.output and "above its budget_usd of $0.001; nothing was sent" in done.output
    assert len(server.created) == GROUPS and len(server.charges[hit]) == 1
    finished.edit("budget_usd = 0.001", "budget_usd = 5.0")
    run_until_collected(finished)
    assert len(server.charges[hit]) == 2 and len(server.created) == GROUPS + 1


@pytest.mark.slow
def test_another_endpoint_is_not_asked_about_batches_of_the_first_and_shares_no_answers(
    finished: Any, server: BatchServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_BASE_URL", server.base_url)
    with_judge(finished, "")
    assert finished.command("run", "STUDY", "--select", "judge_submissions").exit_code == 0
    with BatchServer() as elsewhere:
        monkeypatch.setenv("OPENAI_BASE_URL", elsewhere.base_url)
        told = finished.command("batches", "STUDY")
        assert f"holds batches of {server.base_url}, and the endpoint asked now is {elsewhere.base_url}" in told.output
        assert "4 of 4 groups in flight" in told.output
        assert elsewhere.calls == []

        monkeypatch.setenv("OPENAI_BASE_URL", server.base_url)
        monkeypatch.setenv(KEY_VARIABLE, "another account's key")
        for _ in range(3):
            assert "the key that is set seems to be another account's" in finished.command("batches", "STUDY").output
        monkeypatch.setenv(KEY_VARIABLE, "a key")
        run_until_collected(finished)
        asked = set(requests_of(finished)["custom_id"])
        assert {name: len(runs) for name, runs in server.charges.items()} == dict.fromkeys(asked, 1)

        finished.edit('base_url = ""', f'base_url = "{elsewhere.base_url}"')
        states = counts(finished)
        assert (states["rating_requests"], states["judge_submissions"], states["judge_answers"]) == ({"fresh": 12}, {"stale": 4}, {"stale": 4})
        run_until_collected(finished)
        assert {name: len(runs) for name, runs in elsewhere.charges.items()} == dict.fromkeys(asked, 1)


@pytest.mark.slow
def test_without_its_ledger_nothing_is_asked_until_a_person_says_so(finished: Any, server: BatchServer) -> None:
    with_judge(finished, server.base_url)
    assert finished.command("run", "STUDY", "--select", "judge_submissions").exit_code == 0
    for path in finished.files.glob("judge_batches*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    done = finished.command("run", "STUDY", *SELECT)
    assert done.exit_code == 1
    assert "which says what was sent and paid for; restore it from a backup" in done.output
    assert len(server.created) == GROUPS
