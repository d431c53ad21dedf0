"""What a study's language judges have been asked and what of it is on its way: ledgers, journals, bills, and words for people.

Here belongs everything that assets, sensor and command line share about asking. Building requests belongs to `requests.py`, sending and collecting to
`relseek_resources/judges`. Nothing here knows Dagster; a study's folder in the store is handed in.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import pandas as pd

from relseek_assets.bill import Bill
from relseek_assets.judging.requests import Estimate, OverBudget, estimate
from relseek_assets.settings import LanguageJudge
from relseek_assets.study import Study
from relseek_resources.judges.answers import Answer, Request
from relseek_resources.judges.asking import OPENAI, EndpointError, client_of, finished
from relseek_resources.judges.batches import BatchError, cancel, poll
from relseek_resources.judges.ledger import ENDED, Batch, Ledger
from relseek_resources.judges.prices import price_of
from relseek_resources.storage import StorageError, content_version

BATCH, AT_ONCE = "openai_batch", "openai"
LEDGER = "judge_batches"
ANY_LEDGER = re.compile(rf"{LEDGER}(-[0-9a-f]{{8}})?\.sqlite")
JOURNALS = "judge_journals"
LONGEST_ANSWER = 10.0  # seconds that a look waits for one answer where it may not wait
ANSWERS = ".answers.jsonl"  # how the prompting experiments' journals end, after a partition's name and that of a judge or author


def judges_of(study: Study, kind: str) -> list[LanguageJudge]:
    """The study's judges that are asked by Batch, or at once."""
    return [judge for judge in study.judges if judge.kind == kind]


def ledger_path(folder: Path, judge: LanguageJudge) -> Path:
    """The ledger of a judge's endpoint: one list call shows all that an endpoint has in flight, and nothing of another's."""
    where = {name: getattr(judge, name) for name in ("base_url", "key_variable")}
    default = {name: LanguageJudge.model_fields[name].default for name in where}
    return folder / (f"{LEDGER}.sqlite" if where == default else f"{LEDGER}-{content_version(where)[:8]}.sqlite")


def ledgers(study: Study, folder: Path) -> dict[Path, LanguageJudge]:
    """The ledgers that are there, each with a judge of its endpoint."""
    return {path: judge for judge in judges_of(study, BATCH) if (path := ledger_path(folder, judge)).is_file()}


def journals(folder: Path, judge: LanguageJudge) -> Path:
    """Where the answers of a judge that is asked at once are kept."""
    return folder / JOURNALS / at_endpoint(judge.name, judge.base_url)


def at_endpoint(name: str, base_url: str | None) -> str:
    """The name of what keeps the answers of one endpoint alone: with a hash of its address unless it is OpenAI's."""
    where = (base_url or os.environ.get("OPENAI_BASE_URL") or OPENAI).rstrip("/")
    return name if where == OPENAI else f"{name}@{content_version(where)[:8]}"


def journal_path(folder: Path, judge: LanguageJudge, partition: str) -> Path:
    site, _, step = partition.partition("|")
    return journals(folder, judge) / site / f"{step}.jsonl"


def group_of(judge: LanguageJudge, partition: str) -> str:
    """What the ledger calls a judge's requests of a site and epoch: `gpt/smollm2-135m:L12/e02`."""
    return "/".join((judge.name, *partition.split("|")))


@dataclass(frozen=True)
class Asked:
    """All batches of one group: one judge's requests of one site and epoch, in the order in which they were sent."""

    group: str
    batches: tuple[Batch, ...]

    @property
    def judge(self) -> str:
        return self.group.partition("/")[0]

    @property
    def partition(self) -> str:
        return self.group.partition("/")[2].replace("/", "|")

    @property
    def open(self) -> tuple[Batch, ...]:
        """Batches that have not ended, those included that the provider does not have yet."""
        return tuple(batch for batch in self.batches if batch.status not in ENDED)

    @property
    def awaited(self) -> tuple[Batch, ...]:
        """Those of which there is nothing to do but wait: the provider is at work on them, or has no room yet. The others are for us to send."""
        return tuple(batch for batch in self.batches if batch.in_flight or batch.held)

    @property
    def due(self) -> tuple[Batch, ...]:
        """Those for which the provider had no room, and which it is time to create again."""
        return tuple(batch for batch in self.batches if batch.status == "held" and not batch.held)

    @property
    def uncollected(self) -> tuple[Batch, ...]:
        return tuple(batch for batch in self.batches if not batch.collected)

    @property
    def to_come_usd(self) -> float:
        """The estimate, an upper one, of what is in flight or has ended and was not collected: charged perhaps, and not among what was paid yet."""
        return sum(batch.estimated_usd for batch in self.batches if not batch.collected)

    @property
    def since(self) -> float:
        """When the oldest batch that is in flight was sent, in Unix seconds; of none in flight, the last."""
        return min(sent(batch) for batch in self.open) if self.open else sent(self.batches[-1])

    def text(self) -> str:
        """One line: what is in flight, how far, since when and what it will cost; or that it has ended."""
        shown = self.open or self.batches[-1:]
        names = ", ".join(f"{batch.batch_id or 'not created yet:'} {batch.status}" for batch in shown)
        done, total = sum(batch.completed + batch.failed for batch in shown), sum(batch.requests for batch in shown)
        if not self.open:
            return f"{self.group}: {names}, {done} of {total} answered, {'not collected' if self.uncollected else 'collected'}"
        since = duration(time.time() - self.since)
        return f"{self.group}: {names}, {done} of {total} answered, sent {since} ago, at most {dollars(self.to_come_usd)} to come"


def sent(batch: Batch) -> float:
    return batch.created or batch.written


def duration(seconds: float) -> str:
    """`40 s`, `12 min` or `3 h 05 min`."""
    minutes = int(seconds // 60)
    return f"{max(0, int(seconds))} s" if minutes < 1 else f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def dollars(usd: float) -> str:
    """Cents, and of less than ten cents two figures: a small study costs hundredths of a cent."""
    return f"${usd:,.2f}" if usd == 0 or usd >= 0.1 else f"${usd:.2g}"


# --- what is in flight ----------------------------------------------------------------------------------------------------


def asked(study: Study, folder: Path) -> list[Asked]:
    """Every group of the study's ledgers, as the last look left them; no provider is asked."""
    found = []
    for path in ledgers(study, folder):
        with Ledger(path) as ledger:
            batches = sorted(ledger.batches(), key=lambda batch: (batch.group, batch.number))
        found += [Asked(group, tuple(some)) for group, some in groupby(batches, key=lambda batch: batch.group)]
    return found


def waiting(study: Study, folder: Path) -> dict[str | None, str]:
    """Partition (site and epoch) -> why its answers cannot be had yet, where something is in flight. What is only to be sent is no reason to wait."""
    found: dict[str | None, str] = {}
    for group in asked(study, folder):
        if group.awaited:
            batch = group.awaited[0]
            name = batch.batch_id or f"{batch.number} ({batch.status})"
            done, total = sum(batch.completed for batch in group.awaited), sum(batch.requests for batch in group.awaited)
            found.setdefault(group.partition, f"waits for batch {name} of {group.judge}: {done} of {total} answered")
    return found


def look(study: Study, folder: Path, *, seconds: float | None = None) -> list[str]:
    """Ask every endpoint that has something in flight what became of it, one list call each; returns what went wrong, in words.

    An endpoint that cannot be reached, one that knows nothing of it, and a key that is not set are such lines and no errors: what is in flight stays
    so until the next look. With `seconds`, endpoints that do not answer are waited for that long in all, and nothing is sent.
    """
    said: list[str] = []
    found = ledgers(study, folder)
    each = None if seconds is None else min(LONGEST_ANSWER, seconds / max(1, len(found)))
    for path, judge in found.items():
        with Ledger(path) as ledger:
            if all(batch.status in ENDED and (batch.collected or batch.status != "lost") for batch in ledger.batches()):
                continue
            try:
                said += poll(ledger, client_of(judge.base_url, judge.key_variable), seconds=each).warnings
            except (EndpointError, BatchError) as error:
                said.append(f"{judge.name}: {error}")
    return said


def spent(study: Study, folder: Path) -> dict[str, float]:
    """Group -> what its collected answers cost by their tokens, in USD."""
    prices = {judge.name: batch_price(judge) for judge in judges_of(study, BATCH)}
    found: dict[str, float] = {}
    for path in ledgers(study, folder):
        with Ledger(path) as ledger:
            for total in ledger.totals():
                if price := prices.get(total.group.partition("/")[0]):
                    found[total.group] = price(total.prompt_tokens, total.completion_tokens)
    return found


def cancel_group(study: Study, folder: Path, group: str) -> list[Batch]:
    """Ask the provider to cancel what is in flight for a group; what is finished is kept and charged.

    Raises:
        EndpointError, BatchError: the provider cannot be asked.
    """
    for path, judge in ledgers(study, folder).items():
        with Ledger(path) as ledger:
            if ledger.batches(group):
                return cancel(ledger, client_of(judge.base_url, judge.key_variable), group)
    return []


# --- bills ----------------------------------------------------------------------------------------------------------------


def bill(study: Study, folder: Path, kind: str, requests: Iterable[pd.DataFrame]) -> Bill:
    """What the study's judges of a kind would be paid for `requests` (tables with custom_id, judge, prompt_tokens and counted), known ones left out.

    Refused where a judge's new requests, what it has in flight and what it was paid before are together above its budget.
    """
    judges = judges_of(study, kind)
    journaled = {judge.name: _journaled(folder, judge) for judge in judges if kind == AT_ONCE}
    totals: dict[str, Estimate] = {}
    for frame in requests:
        for judge in judges:
            mine = frame[frame["judge"] == judge.name]
            known = _in_ledger(folder, judge, mine) if kind == BATCH else journaled[judge.name].finished
            found = estimate(mine[~mine["custom_id"].isin(list(known))], judge)
            totals[judge.name] = totals[judge.name] + found if judge.name in totals else found
    lines, refusals = [], []
    for judge in judges:
        if judge.name not in totals or not totals[judge.name].requests:
            continue
        found = totals[judge.name]
        lines.append(found.describe())
        before = journaled[judge.name].paid_usd if kind == AT_ONCE else committed(folder, judge)
        if words := refusal(study.name, judge, found.usd, before):
            refusals.append(f"{words}\n{found.describe()}")
    return Bill(sum(found.usd for found in totals.values()), tuple(lines), "\n".join(refusals))


def refuse(found: Bill) -> None:
    """Let a bill pass that is within the budgets.

    Raises:
        OverBudget: naming the judge and the figures. Nothing has been sent.
    """
    if found.refusal:
        raise OverBudget(found.refusal)


def allowance(study: Study, judge: LanguageJudge, ledger: Ledger) -> Callable[[float], None]:
    """What refuses to have a judge asked by Batch above its budget; for `submit` and `settle`, so that asking again counts too."""

    def allow(usd: float) -> None:
        if words := refusal(study.name, judge, usd, committed(ledger.path.parent, judge)):
            raise OverBudget(words)

    return allow


def committed(folder: Path, judge: LanguageJudge) -> float:
    """What a judge was paid by Batch for this study, may still charge, and may have charged for what never came, in USD: by whatever endpoint."""
    price, mine = batch_price(judge), []
    for path in sorted(path for path in folder.glob(f"{LEDGER}*.sqlite") if ANY_LEDGER.fullmatch(path.name)):
        with Ledger(path) as ledger:
            mine += [total for total in ledger.totals() if total.group.partition("/")[0] == judge.name]
    return sum(price(total.prompt_tokens, total.completion_tokens) + total.to_come_usd + total.unaccounted_usd for total in mine)


def refusal(study: str, judge: LanguageJudge, usd: float, before: float) -> str:
    """Why so much more may not be spent on a judge; nothing where it may."""
    if usd + before <= judge.budget_usd:
        return ""
    paid = f", after {dollars(before)} that it was paid or may charge for what it was asked, by whatever endpoint" if before else ""
    return (
        f"judge {judge.name!r} of study {study} would cost {dollars(usd)}{paid}, which is above its budget_usd of {dollars(judge.budget_usd)}; "
        "nothing was sent. Raise budget_usd in [[judges]], or ask less: fewer doses, rubrics, examples or attempts, pairwise = false, a cheaper "
        'model, or kind = "openai_batch".'
    )


@contextlib.contextmanager
def alone(folder: Path, judge: LanguageJudge) -> Iterator[None]:
    """Hold a lock on asking a judge at once, which dies with the process: from the reading of a bill until what it allows is paid."""
    path = journals(folder, judge) / ".lock"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        stream = path.open("w")
    except OSError as error:
        raise StorageError(f"{path}: cannot write here ({error.strerror}); set RELSEEK_STORE to a writable folder") from error
    with stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def _in_ledger(folder: Path, judge: LanguageJudge, requests: pd.DataFrame) -> set[str]:
    """Those of a judge's requests that were sent before."""
    path = ledger_path(folder, judge)
    if not path.is_file():
        return set()
    with Ledger(path) as ledger:
        return set(ledger.attempts(list(requests["custom_id"])))


@dataclass(frozen=True)
class Journaled:
    """What a judge's journals hold: the custom_ids that will not be asked again, and what was paid for all."""

    finished: frozenset[str]
    paid_usd: float


def _journaled(folder: Path, judge: LanguageJudge) -> Journaled:
    done = answered(journals(folder, judge).rglob("*.jsonl"), judge.attempts)
    return Journaled(done, paid(folder, judge.name))


def answered(paths: Iterable[Path], attempts: int) -> frozenset[str]:
    """The custom_ids in journals that will not be asked again."""
    return frozenset(name for path in paths for name, answer in _last(path).items() if finished(answer, attempts))


def paid(folder: Path, name: str) -> float:
    """What a judge, or an author, that is asked at once was paid for this study: by whatever endpoint, and in the prompting experiments too."""
    mine = re.compile(rf"{re.escape(name)}(@[0-9a-f]{{8}})?")
    of_judging = [path for home in (folder / JOURNALS).glob("*") if mine.fullmatch(home.name) for path in home.rglob("*.jsonl")]
    of_prompting = [path for path in folder.rglob(f"*{ANSWERS}") if mine.fullmatch(path.name.removesuffix(ANSWERS).rpartition(".")[2])]
    return sum(answer.cost_usd for path in (*of_judging, *of_prompting) for answer in _last(path).values())


def _last(path: Path) -> dict[str, Answer]:
    """The last answer of each custom_id; a run that writes the journal is not disturbed, its torn last line left out."""
    if not path.is_file():
        return {}
    with path.open("rb") as lines:
        found = (Answer(**json.loads(line)) for line in lines if line.endswith(b"\n"))
        return {answer.custom_id: answer for answer in found}


def batch_price(judge: LanguageJudge) -> Callable[[int, int], float]:
    """USD of an answer by Batch from its tokens."""
    price = price_of(judge.model, judge.price)
    return lambda prompt, completion: price.cost(prompt, completion, batch=True)


def requests_to(frame: pd.DataFrame, judge: LanguageJudge) -> Iterator[Request]:
    """A judge's requests among those of a partition, each with what asking it by Batch costs at most."""
    mine, price = frame[frame["judge"] == judge.name], batch_price(judge)
    columns = (mine[name] for name in ("custom_id", "body", "prompt_tokens"))
    return (Request(custom_id, body, price(int(tokens), judge.max_tokens)) for custom_id, body, tokens in zip(*columns, strict=True))


def statuses(frame: pd.DataFrame) -> dict[str, int]:
    """How many rows have each status, for the page of a partition."""
    return {str(name): int(count) for name, count in frame["status"].value_counts().items()}
