"""Language judges as assets, of studies that declare `[[judges]]`: what they are asked, what was sent, and what they answered.

Judges that are asked at once and judges that are asked by Batch share everything but the way: `judge_answers` asks the former and collects from the
latter, and has no partition for what is still in flight. Scores and pairs of all judges are made in `assets.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import dagster as dg
import pandas as pd
import pyarrow.parquet as pq

from relseek_assets.behaviour import FILES, Rubric, read_graded_replies, read_rubrics, rubric_files
from relseek_assets.bill import Bill
from relseek_assets.judging import in_flight, tables
from relseek_assets.judging.requests import REQUESTS, estimate, read_comparison
from relseek_assets.judging.requests import pairwise_requests as comparisons_asked
from relseek_assets.judging.requests import rating_requests as ratings_asked
from relseek_assets.partitions import Cell, cell_of, multi_key, step_key
from relseek_assets.settings import LanguageJudge
from relseek_assets.stage import TABLE, Stage, Work
from relseek_resources.judges import asking
from relseek_resources.judges.answers import Answer, Reading
from relseek_resources.judges.batches import settle, submit
from relseek_resources.judges.ledger import Ledger
from relseek_resources.judges.prices import price_of
from relseek_resources.storage import StorageError

GROUP = "judging"
BILLED = ("custom_id", "judge", "prompt_tokens", "counted")  # what a bill is made from


def rubrics_of(judge: LanguageJudge, rubrics: dict[str, Rubric]) -> list[tuple[str, Rubric]]:
    """The rubrics that a judge rates by, each with the name of its source; the first of them is the disposition's."""
    return [(source, rubric) for source, rubric in rubrics.items() if not judge.rubrics or rubric.name in judge.rubrics]


def asks(judge: LanguageJudge) -> dict[str, Any]:
    """The settings of a judge that its requests are made from."""
    return {**judge.model_dump(include={"name", "model", "rubrics", "examples", "max_tokens"}), **judge.unusual}


def build(stage: Stage) -> None:
    """Add requests, submissions and answers."""
    _requests(stage)
    if in_flight.judges_of(stage.study, in_flight.BATCH):
        _submissions(stage)
    _answers(stage)


def _requests(stage: Stage) -> None:
    study, partitions = stage.study, stage.partitions
    folder = study.behaviour_folder
    sources = list(rubric_files(folder))

    @stage.asset(
        group=GROUP,
        version="1",
        description="What language judges are asked about the replies at one dose: a rating of every reply that is not empty by every rubric, "
        "few-shot examples drawn with the study's seed. Each request is named by its content, and is put to the judge once.",
        partitions=partitions.site_by_dose,
        deps={"generations": dg.IdentityPartitionMapping(), **dict.fromkeys(sources), "few_shots": None},
        settings=[[asks(judge) for judge in study.judges], study.seed],
        schema=REQUESTS,
    )
    def rating_requests(work: Work) -> Iterator[dg.AssetMaterialization]:
        graded, rubrics = read_graded_replies(folder / FILES["few_shots"]), read_rubrics(folder)
        with work.progress(len(work.partitions), "partition", "rating requests") as report:
            for partition in work.partitions:
                replies = work.read_table("generations", partition)
                frames = [
                    # the author graded replies for the disposition; other rubrics are explained by their bands alone
                    ratings_asked(replies, rubric, graded if source == sources[0] else [], judge, study.seed)
                    for judge in study.judges
                    for source, rubric in rubrics_of(judge, rubrics)
                ]
                yield work.table(partition, pd.concat(frames, ignore_index=True), _figures(study.judges, frames))
                report()

    comparing = [judge for judge in study.judges if judge.pairwise]
    if not comparing:
        return

    @stage.asset(
        group=GROUP,
        version="1",
        description="What language judges are asked about every pair of doses of every item: which reply shows more of the disposition, the order "
        "of the two drawn with the study's seed and kept beside the request.",
        partitions=partitions.site_by_evaluated_epoch,
        deps={"generations": partitions.of_my_doses(), "pairwise_definition": None, "few_shots": None},
        settings=[[asks(judge) for judge in comparing], study.paired_doses, study.seed],
        schema=REQUESTS,
    )
    def pairwise_requests(work: Work) -> Iterator[dg.AssetMaterialization]:
        graded, definition = read_graded_replies(folder / FILES["few_shots"]), read_comparison(folder / FILES["pairwise_definition"])
        with work.progress(len(work.partitions), "partition", "pairwise requests") as report:
            for partition in work.partitions:
                replies = pd.concat([work.read_table("generations", key) for key in work.upstream("generations", partition)])
                frames = [comparisons_asked(replies, definition, graded, study.paired_doses, judge, study.seed) for judge in comparing]
                yield work.table(partition, pd.concat(frames, ignore_index=True), _figures(comparing, frames))
                report()


def _figures(judges: Sequence[LanguageJudge], frames: Sequence[pd.DataFrame]) -> dict[str, Any]:
    """Requests, tokens and dollars of a partition, by judge."""
    found = pd.concat(frames, ignore_index=True)
    bills = [estimate(found, judge) for judge in judges]
    return {
        "requests": len(found),
        "prompt_tokens": int(found["prompt_tokens"].sum()),
        "counted": ", ".join(sorted(found["counted"].unique())),
        **{f"estimated_usd_{bill.judge}": bill.usd for bill in bills},
    }


def request_files(stage: Stage, store: Callable[[str, str], Path], partition: str | None) -> list[Path]:
    """The files of all requests of a site and epoch."""
    cell = cell_of(partition)
    assert cell.site is not None and cell.epoch is not None
    keys = [multi_key(cell.site, step_key(cell.epoch, dose)) for dose in sorted(stage.study.doses.generated)]
    files = [store("rating_requests", key) for key in keys]
    return [*files, store("pairwise_requests", str(partition))] if "pairwise_requests" in stage.catalogue else files


def _bills(stage: Stage, kind: str) -> Callable[[Path, Sequence[str | None]], Bill]:
    def bill(folder: Path, partitions: Sequence[str | None]) -> Bill:
        def file(asset: str, key: str) -> Path:
            return folder / asset / f"{key.replace('|', '/')}.{TABLE}"

        files = [path for partition in partitions for path in request_files(stage, file, partition)]
        if not all(path.is_file() for path in files):
            return Bill(None)
        return in_flight.bill(stage.study, folder, kind, (pq.ParquetFile(path).read(list(BILLED)).to_pandas() for path in files))

    return bill


def requests_of(work: Work, partition: str | None) -> pd.DataFrame:
    """All requests of a site and epoch, without the names of their examples, which nobody who sends or collects asks for."""
    unread = ("examples",)
    frames = [work.read_table("rating_requests", key, unread) for key in work.upstream("rating_requests", partition)]
    if "pairwise_requests" in work.catalogue:
        frames.append(work.read_table("pairwise_requests", partition, unread))
    return pd.concat(frames, ignore_index=True)


def _upstream(stage: Stage) -> dict[str, dg.PartitionMapping | None]:
    pairs = {"pairwise_requests": dg.IdentityPartitionMapping()} if "pairwise_requests" in stage.catalogue else {}
    return {"rating_requests": stage.partitions.of_my_doses(), **pairs}


# --- sending --------------------------------------------------------------------------------------------------------------


def _submissions(stage: Stage) -> None:
    study = stage.study
    judges = in_flight.judges_of(study, in_flight.BATCH)
    bills = _bills(stage, in_flight.BATCH)

    @stage.asset(
        group=GROUP,
        version="1",
        description="Batches sent to the judges that are asked by Batch. What was sent before is not sent again; above a judge's budget nothing is. "
        "The sensor `judge_batches` says what is in flight, and `relseek batches` too.",
        partitions=stage.partitions.site_by_evaluated_epoch,
        deps=_upstream(stage),
        settings=[judge.model_dump(include={"name", "base_url"}) for judge in judges],
        schema=tables.JUDGE_SUBMISSIONS,
        seconds=2.0,
        bill=bills,
    )
    def judge_submissions(work: Work) -> Iterator[dg.AssetMaterialization]:
        folder = work.store.folder(study.name)
        bill = bills(folder, work.partitions)
        for line in bill.lines:
            work.log.info(line)
        in_flight.refuse(bill)
        with work.progress(len(work.partitions) * len(judges), "group", "submitting") as report:
            for partition in work.partitions:
                requests = requests_of(work, partition)
                sent: list[dict[str, Any]] = []
                counts = {"sent": 0, "sent_before": 0}
                for judge in judges:
                    submitted, rows = _submit(work, judge, partition, requests)
                    counts = {"sent": counts["sent"] + submitted[0], "sent_before": counts["sent_before"] + submitted[1]}
                    sent += rows
                    report()
                frame = pd.DataFrame(sent, columns=list(tables.JUDGE_SUBMISSIONS.names))
                usd = float(frame["estimated_usd"].sum())
                work.log.info(f"{partition}: {counts['sent']} requests sent, {counts['sent_before']} were before; at most {in_flight.dollars(usd)}")
                yield work.table(partition, frame, {**counts, "estimated_usd": usd})


def _submit(work: Work, judge: LanguageJudge, partition: str | None, requests: pd.DataFrame) -> tuple[tuple[int, int], list[dict[str, Any]]]:
    """Send one group; (sent, known) requests and the rows of its first batches."""
    group, cell = in_flight.group_of(judge, str(partition)), cell_of(partition)
    client = asking.client_of(judge.base_url, judge.key_variable)
    with Ledger(in_flight.ledger_path(work.store.folder(work.study.name), judge)) as ledger:
        done = submit(
            ledger,
            client,
            group,
            in_flight.requests_to(requests, judge),
            window=judge.window,
            description={"study": work.study.name, "judge": judge.name, "site": str(cell.site), "epoch": str(cell.epoch)},
            allow=in_flight.allowance(work.study, judge, ledger),
        )
        # attempts after the first are made while answers are collected, and would make what was sent look different
        first = [batch for batch in ledger.batches(group) if batch.attempt == 1]
    names = ("number", "batch_id", "requests", "bytes", "fingerprint", "estimated_usd")
    rows = [{name: getattr(batch, name) for name in names} for batch in first]
    return (done.requests, done.known), [{"site": cell.site, "epoch": cell.epoch, "judge": judge.name, "group": group, **row} for row in rows]


# --- answers --------------------------------------------------------------------------------------------------------------


def _answers(stage: Stage) -> None:
    study = stage.study
    rubrics = {rubric.name: rubric for rubric in read_rubrics(study.behaviour_folder).values()}
    batch, at_once = (in_flight.judges_of(study, kind) for kind in (in_flight.BATCH, in_flight.AT_ONCE))

    @stage.asset(
        group=GROUP,
        version="1",
        description="What the judges answered, one row a request: the last attempt, with tokens and dollars of all. Judges that are asked at once "
        "are asked here; of those that are asked by Batch, answers are collected as soon as nothing of the site and epoch is in flight.",
        partitions=stage.partitions.site_by_evaluated_epoch,
        deps={**_upstream(stage), **({"judge_submissions": dg.IdentityPartitionMapping()} if batch else {})},
        settings=[judge.model_dump(include={"name", "base_url", "attempts"}) for judge in study.judges],
        schema=tables.JUDGE_ANSWERS,
        seconds=5.0,
        waits=(lambda folder: in_flight.waiting(study, folder)) if batch else None,
        bill=_bills(stage, in_flight.AT_ONCE) if at_once else None,
    )
    def judge_answers(work: Work) -> Iterator[dg.AssetMaterialization]:
        folder = work.store.folder(study.name)
        if at_once:
            bill = _bills(stage, in_flight.AT_ONCE)(folder, work.partitions)
            for line in bill.lines:
                work.log.info(line)
            in_flight.refuse(bill)
        for line in in_flight.look(study, folder):
            work.log.warning(line)
        for partition in work.partitions:
            if batch and (state := work.lineage.state(work.key("judge_submissions"), partition)).status != "fresh":
                work.log.warning(f"{partition} left out: its judge_submissions are {state.status}; `relseek run {study.name}` sends them")
                continue
            requests = requests_of(work, partition)
            accept = tables.reader(requests, rubrics)
            answers: list[Answer] | None = []
            notes: dict[str, int] = {}
            for judge in batch:
                collected = _collect(work, judge, partition, requests, accept, notes)
                answers = None if answers is None or collected is None else [*answers, *collected]
            if answers is None:
                continue
            for judge in at_once:
                answers += _ask(work, judge, partition, requests, accept)
            frame = tables.answer_rows(answers, requests, accept)
            figures = {"cost_usd": float(frame["cost_usd"].sum()), "asked_again": int((frame["attempt"] > 1).sum())}
            yield work.table(partition, frame, {**in_flight.statuses(frame), **figures, **notes})


def _collect(
    work: Work,
    judge: LanguageJudge,
    partition: str | None,
    requests: pd.DataFrame,
    accept: Callable[[str, str], Reading],
    notes: dict[str, int],
) -> list[Answer] | None:
    """The answers to one group, None while any of it is in flight.

    Raises:
        OverBudget: asking again what has no score would exceed the judge's budget; what came back is kept.
    """
    group, path = in_flight.group_of(judge, str(partition)), in_flight.ledger_path(work.store.folder(work.study.name), judge)
    client = asking.client_of(judge.base_url, judge.key_variable)
    if not path.is_file():
        raise StorageError(
            f"{path} is gone, which says what was sent and paid for; restore it from a backup. To ask and pay again, materialise judge_submissions "
            f"of {partition} in the UI"
        )
    with Ledger(path) as ledger:
        wanted, price = in_flight.requests_to(requests, judge), in_flight.batch_price(judge)
        allow = in_flight.allowance(work.study, judge, ledger)
        settled = settle(ledger, client, group, wanted, accept, judge.attempts, price=price, allow=allow)
        for warning in settled.warnings:
            work.warn(warning)
        if not settled.complete:
            again = f", {settled.resubmitted} of them asked again now" if settled.resubmitted else ""
            work.log.warning(f"{group} left out: {settled.in_flight + settled.resubmitted} requests are in flight{again}")
            return None
        for name in ("strangers", "duplicates", "unreadable_lines"):
            if getattr(settled, name):
                notes[name] = notes.get(name, 0) + getattr(settled, name)
        return list(settled.answers)


def _ask(work: Work, judge: LanguageJudge, partition: str | None, requests: pd.DataFrame, accept: Callable[[str, str], Reading]) -> list[Answer]:
    """Ask a judge at once, if its budget still allows; what its journal holds is not asked again."""
    folder = work.store.folder(work.study.name)
    with (
        in_flight.alone(folder, judge),
        asking.AnswerJournal(in_flight.journal_path(folder, judge, str(partition))) as journal,
        work.progress(int((requests["judge"] == judge.name).sum()), "question", f"{judge.name} {partition}") as report,
    ):
        bill = in_flight.bill(work.study, folder, in_flight.AT_ONCE, [requests[requests["judge"] == judge.name]])
        in_flight.refuse(bill)
        return asking.run(
            in_flight.requests_to(requests, judge),
            accept,
            base_url=judge.base_url,
            key_variable=judge.key_variable,
            price=price_of(judge.model, judge.price),
            attempts=judge.attempts,
            concurrency=judge.concurrency,
            spare_usd=judge.budget_usd - in_flight.paid(folder, judge.name) - (bill.usd or 0.0),
            journal=journal,
            on_answer=lambda answer: report() if answer.attempt == 1 else None,
        )


# --- what was answered ----------------------------------------------------------------------------------------------------


class Answered:
    """The answers of one site and epoch after the other, read once however many doses ask for them."""

    def __init__(self, work: Work) -> None:
        self._work = work
        self._cell: Cell | None = None
        self._answers = pd.DataFrame()

    def to(self, requests: pd.DataFrame, partition: str | None) -> pd.DataFrame | None:
        """The answers to requests of a partition; None, with a line in the log, where some are not there yet."""
        cell = cell_of(partition)
        assert cell.site is not None and cell.epoch is not None
        found = Cell(cell.site, cell.epoch)
        if found != self._cell:
            self._answers, self._cell = self._work.read_table("judge_answers", multi_key(cell.site, step_key(cell.epoch))), found
        answers = self._answers[self._answers["custom_id"].isin(requests["custom_id"])]
        if len(answers) < len(requests):
            told = "materialise judge_answers first"
            self._work.log.warning(f"{partition} left out: {len(requests) - len(answers)} of its requests have no answers yet; {told}")
            return None
        return answers
