"""Judging at the published size: 34 vectors of 10,290 ratings and 25,725 comparisons each, by way of a Batch endpoint on loopback.

A child process goes the way of the assets: requests built and stored, split into files and sent, results collected, read as scores and pairs, and
aggregated. Its peak memory and its time for each judgement are held against limits. Beside that the join by custom_id is compared with one that finds
out which reply was which by matching texts, as section 4.3 of the spec describes. All texts are invented.
"""

from __future__ import annotations

import contextlib
import json
import math
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd

from relseek_assets.behaviour import FILES, Rubric, read_graded_replies, read_rubrics
from relseek_assets.judging import rankings, tables
from relseek_assets.judging.requests import QUESTION, REQUESTS, pairwise_requests, rating_requests, read_comparison, requests_of
from relseek_assets.selection.metrics import dose_response
from relseek_assets.settings import LanguageJudge
from relseek_assets.study import load_study
from relseek_resources.judges.batches import poll, settle, submit
from relseek_resources.judges.ledger import Ledger
from relseek_resources.storage import read_table, write_table
from tests.performance.comparison import Comparison, compare, machine

STUDY = load_study("kirk2025")
FOLDER = STUDY.behaviour_folder
JUDGE = LanguageJudge(name="gpt", kind="openai_batch", model="gpt-4o-2024-08-06", budget_usd=1e9)
VECTORS, FEWER = 34, 9  # 1.2 million judgements, and 0.3 million
ITEMS, SEED = 245, 11
PROMPT_WORDS, REPLY_WORDS = (20, 120), (60, 96)  # a reply of 78 words has about 100 tokens
MEMORY = 1.5  # GiB
GROWTH = 1.25  # times the processor's seconds for each judgement that 34 vectors may take over 9
PAIRS, FASTER = 7, 20.0
WORDS = (
    "the a of to and in that it you we for is on with as this be are not but can from one more about what when how there which some time just like "
    "people know think make good well first way even new want because any give day most us feel help question answer evening garden letter morning "
    "weather recipe travel window story music village number colour family project weekend journey lesson reason kitchen bridge season teacher river"
)


def comparisons() -> list[Comparison]:
    few, many = measured(FEWER), measured(VECTORS)
    each = [sum(found["work"].values()) / found["judgements"] for found in (few, many)]
    return [
        _limited("judging: peak memory", many["peak_gib"], MEMORY, "GiB"),
        _limited("judging: work for each of 1.2 M over 0.3 M", each[1] / each[0], GROWTH, "x"),
        joined(),
    ]


def _limited(name: str, found: float, limit: float, unit: str) -> Comparison:
    """A figure against a limit: one measurement, so that its interval is open."""
    return Comparison(name, found, limit, limit / found, 0.0, math.inf, 1, unit, 1.0, machine())


# --- at scale -------------------------------------------------------------------------------------------------------------


def measured(vectors: int) -> dict[str, Any]:
    """What a child process found that judged so many vectors; prints the throughput of each step."""
    with tempfile.TemporaryDirectory() as folder, endpoint() as address:
        command = [sys.executable, "-m", "tests.performance.judging", str(vectors), address, folder]
        found: dict[str, Any] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    count, clock, work = found["judgements"], sum(found["clock"].values()), sum(found["work"].values())
    steps = ", ".join(f"{name} {count / seconds:,.0f}/s" for name, seconds in found["clock"].items())
    print(f"judging: {count:,} judgements in {clock:.0f} s, {work:.0f} s of work; peak {found['peak_gib']:.2f} GiB; {steps}", flush=True)
    return found


@contextlib.contextmanager
def endpoint() -> Iterator[str]:
    """The loopback endpoint in a process of its own; yields its address."""
    with tempfile.TemporaryDirectory() as folder:
        process = subprocess.Popen([sys.executable, "-m", "tests.performance.batch_endpoint", folder], stdout=subprocess.PIPE, text=True)
        try:
            assert process.stdout is not None
            yield process.stdout.readline().strip()
        finally:
            process.terminate()
            process.wait()


class Steps:
    """Seconds by step, by the clock and of this process's own work; what is not inside a step (inventing the replies) is not counted."""

    def __init__(self) -> None:
        self.clock: dict[str, float] = {}
        self.work: dict[str, float] = {}

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        clock, work = time.perf_counter(), time.process_time()
        yield
        self.clock[name] = self.clock.get(name, 0.0) + time.perf_counter() - clock
        self.work[name] = self.work.get(name, 0.0) + time.process_time() - work


def judge(vectors: int, address: str, folder: Path) -> dict[str, Any]:
    """Judge so many vectors, as the assets do it, and report judgements, seconds by step and peak memory."""
    from openai import OpenAI

    client, rubrics, steps = OpenAI(base_url=address, api_key="none", max_retries=1), read_rubrics(FOLDER), Steps()
    names = [(f"llama-70b:L{vector:02d}", 10) for vector in range(vectors)]
    judgements = 0
    with Ledger(folder / "judge_batches.sqlite") as ledger:
        for site, epoch in names:
            replies = generations(site, epoch)
            with steps("built"):
                build(replies, rubrics, folder / site)
            with steps("sent"):
                judgements += submit(ledger, client, site, requests_of(requests(folder / site)), description={"site": site}).requests
        waiting = list(names)
        while waiting:
            with steps("collected"):
                poll(ledger, client)
                waiting = [(site, epoch) for site, epoch in waiting if not collect(ledger, client, site, rubrics, folder / site)]
        for site, epoch in names:
            replies = generations(site, epoch)
            with steps("scored"):
                score(replies, rubrics, folder / site)
            with steps("aggregated"):
                aggregate(folder / site)
    return {"judgements": judgements, "clock": steps.clock, "work": steps.work, "peak_gib": peak_gib()}


def generations(site: str, epoch: int) -> pd.DataFrame:
    """Invented replies of one vector at every dose, with conversations of one to four questions before them."""
    draw, known = random.Random(f"{SEED}/{site}/{epoch}"), WORDS.split()

    def words(low: int, high: int) -> str:
        return " ".join(draw.choices(known, k=draw.randint(low, high))).capitalize() + "."

    prompts = []
    for _ in range(ITEMS):
        turns = draw.randint(1, 4)
        roles = ["user", "assistant"] * turns
        prompts.append([{"role": role, "content": words(*PROMPT_WORDS)} for role in roles[: 2 * turns - 1]])
    rows = [(site, epoch, dose, f"item-{item:03d}", prompts[item], words(*REPLY_WORDS)) for dose in STUDY.doses.generated for item in range(ITEMS)]
    return pd.DataFrame(rows, columns=["site", "epoch", "multiplier", "item", "prompt", "reply"])


def build(replies: pd.DataFrame, rubrics: dict[str, Rubric], folder: Path) -> None:
    """The tables of requests: ratings by dose, comparisons of the whole vector."""
    folder.mkdir()
    graded = read_graded_replies(FOLDER / FILES["few_shots"])
    first, *others = rubrics.values()
    for dose, part in replies.groupby("multiplier"):
        rated = [rating_requests(part, first, graded, JUDGE, SEED), *(rating_requests(part, rubric, [], JUDGE, SEED) for rubric in others)]
        write_table(folder / f"rating {dose:g}.parquet", pd.concat(rated, ignore_index=True), REQUESTS)
    definition = read_comparison(FOLDER / "pairwise.toml")
    write_table(folder / "pairwise.parquet", pairwise_requests(replies, definition, graded, STUDY.paired_doses, JUDGE, SEED), REQUESTS)


def requests(folder: Path) -> pd.DataFrame:
    paths = [*(folder / f"rating {dose:g}.parquet" for dose in STUDY.doses.generated), folder / "pairwise.parquet"]
    return pd.concat([read_table(path, REQUESTS, without=("examples",)) for path in paths], ignore_index=True)


def collect(ledger: Ledger, client: Any, site: str, rubrics: dict[str, Rubric], folder: Path) -> bool:
    """Whether every request of a vector has its answer; then they are stored."""
    asked = requests(folder)
    accept = tables.reader(asked, {rubric.name: rubric for rubric in rubrics.values()})
    found = settle(ledger, client, site, requests_of(asked), accept, JUDGE.attempts)
    if found.complete:
        write_table(folder / "answers.parquet", tables.answer_rows(found.answers, asked, accept), tables.JUDGE_ANSWERS)
    return found.complete


def score(replies: pd.DataFrame, rubrics: dict[str, Rubric], folder: Path) -> None:
    """Scores and pairs of a vector from its answers."""
    answers = read_table(folder / "answers.parquet", tables.JUDGE_ANSWERS)
    for dose, part in replies.groupby("multiplier"):
        asked = read_table(folder / f"rating {dose:g}.parquet", REQUESTS, without=QUESTION)
        mine = answers[answers["custom_id"].isin(asked["custom_id"])]
        found = tables.language_scores(part, asked, mine, rubrics.values())
        write_table(folder / f"scores {dose:g}.parquet", found, tables.LANGUAGE_SCORES)
    asked = read_table(folder / "pairwise.parquet", REQUESTS, without=QUESTION)
    found = tables.language_pairs(asked, answers[answers["task"] == "pairwise"])
    write_table(folder / "pairs.parquet", found, tables.LANGUAGE_PAIRS)


def aggregate(folder: Path) -> None:
    """Dose means with their intervals, win rates, Bradley-Terry strengths and slopes of a vector."""
    scores = pd.concat([read_table(folder / f"scores {dose:g}.parquet", tables.LANGUAGE_SCORES) for dose in STUDY.doses.generated])
    pairs = read_table(folder / "pairs.parquet", tables.LANGUAGE_PAIRS)
    draws = STUDY.judge.bootstrap
    means, strengths = dose_response(scores, draws, SEED), rankings.pair_strengths(pairs, draws, SEED)
    slopes = rankings.pair_slopes(pairs, STUDY.doses.selection, draws, SEED)
    if len(means) != 2 * len(STUDY.doses.generated) or len(strengths) != len(STUDY.paired_doses) or slopes["estimate"].isna().any():
        raise AssertionError(f"{folder.name}: judgements are missing from the aggregates")


def peak_gib() -> float:
    """The largest resident memory of this process so far, by the kernel's own mark (not that of the process that started it)."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) / 2**20  # type: ignore[index]


# --- the join -------------------------------------------------------------------------------------------------------------

TEXTS = {label: re.compile(rf".*<reply {label} (\d+)>\n(.*)\n</reply {label} \1>", re.DOTALL) for label in "AB"}


def joined() -> Comparison:
    """One vector's comparisons: answers with their doses and order, by custom_id from the table of requests, and by matching texts."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        replies = generations("llama-70b:L31", 10)
        build(replies, read_rubrics(FOLDER), folder / "vector")
        sidecar, file = folder / "vector" / "pairwise.parquet", folder / "batch_pairwise_ep10.jsonl"
        asked = read_table(sidecar, REQUESTS)
        numbers = {key: number for number, key in enumerate(zip(replies["item"], replies["multiplier"], strict=True))}
        pair_ids = [
            "{}-{}".format(*sorted((numbers[item, a], numbers[item, b])))
            for item, a, b in zip(asked["item"], asked["multiplier_a"], asked["multiplier_b"], strict=True)
        ]
        with file.open("w") as stream:
            for pair_id, body in zip(pair_ids, asked["body"], strict=True):
                stream.write(f'{{"custom_id": "{pair_id}", "method": "POST", "url": "/v1/chat/completions", "body": {body}}}\n')
        chosen = ["AB"[int(custom_id[1:9], 16) & 1] for custom_id in asked["custom_id"]]
        answers = answers_table(asked, chosen)
        said = dict(zip(pair_ids, chosen, strict=True))
        texts = dict(enumerate(replies["reply"]))
        found: dict[str, Any] = {}

        def ours() -> None:
            found["ours"] = tables.language_pairs(read_table(sidecar, REQUESTS, without=QUESTION), answers)

        def other() -> None:
            found["other"] = by_text(file, said, texts, replies)

        print(f"judging: the join's request file has {file.stat().st_size / len(asked):,.0f} bytes a request", flush=True)
        comparison = compare("judging: join", ours, other, pairs=PAIRS, amount=len(asked), unit="pairs/s", target=FASTER)
        if sorted(rows_of(found["ours"])) != sorted(found["other"]):
            raise AssertionError("the two joins give different winners")
        return comparison


def answers_table(asked: pd.DataFrame, chosen: list[str]) -> pd.DataFrame:
    columns = {"status": "scored", "choice": chosen, "cost_usd": 0.0, "attempt": 1, "raw": chosen, "model": JUDGE.model}
    return asked[["custom_id", "judge", "task"]].assign(**columns, prompt_tokens=1500, completion_tokens=5)


def rows_of(pairs: pd.DataFrame) -> list[tuple[Any, ...]]:
    columns = (pairs[name] for name in ("item", "multiplier_a", "multiplier_b", "first_shown", "winner"))
    return list(zip(*columns, strict=True))


def by_text(file: Path, said: dict[str, str], texts: dict[int, str], replies: pd.DataFrame) -> list[tuple[Any, ...]]:
    """The join of section 4.3: the texts between the last A tags and the last B tags of each request's body say which reply was which.

    Each is compared with the two replies that the pair's id names, as it stands and then with every run of white space as one space; a pair that
    matches neither way is dropped. Rows are (item, smaller dose, larger dose, first shown, winner).
    """
    doses, items = list(replies["multiplier"]), list(replies["item"])
    found = []
    with file.open() as lines:
        for line in lines:
            request = json.loads(line)
            content = request["body"]["messages"][-1]["content"]
            one, two = sorted((int(number) for number in request["custom_id"].split("-")), key=doses.__getitem__)
            a, b = (match[2] if (match := TEXTS[label].match(content)) else None for label in "AB")
            if a is None or b is None:
                continue
            order = _order(a, b, texts[one], texts[two]) or _order(*(" ".join(text.split()) for text in (a, b, texts[one], texts[two])))
            if order:
                first, second = order
                found.append((items[one], doses[one], doses[two], first, first if said[request["custom_id"]] == "A" else second))
    return found


def _order(a: str, b: str, one: str, two: str) -> tuple[str, str] | None:
    return ("a", "b") if (a, b) == (one, two) else ("b", "a") if (a, b) == (two, one) else None


if __name__ == "__main__":
    print(json.dumps(judge(int(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))))
