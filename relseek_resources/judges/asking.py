"""Asking a language judge at once, over any OpenAI-compatible endpoint, with a bounded number of questions in the air.

Here belong the clients, retries and waits, what a chat completion says as an `Answer`, and the journal that keeps paid answers over a crash. Batches
belong to `batches.py`, prompts and scores to the stage.

Two kinds of asking again are kept apart. A *retry* repeats a request that came to nothing (429, 5xx, timeouts, cut connections) and costs nothing; an
*attempt* is an answer that was paid for, and the next one is made because the answer before was no score.
"""

from __future__ import annotations

import asyncio
import email.utils
import errno
import fcntl
import json
import math
import os
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from relseek_resources.judges.answers import Answer, Reading, Request, read_completion, status_of
from relseek_resources.judges.prices import Price
from relseek_resources.storage import StorageError

if TYPE_CHECKING:
    from openai import AsyncOpenAI, OpenAI

Accept = Callable[[str, str], Reading]

OPENAI = "https://api.openai.com/v1"
TIMEOUT = 60.0  # seconds to wait for one answer
RETRIES = 8  # of one attempt
FIRST_WAIT, LONGEST_WAIT = 0.5, 60.0  # seconds, of the backoff
LONGEST_ASKED_WAIT = 600.0  # seconds that an endpoint may ask us to wait
OUTAGE = 8  # questions in a row that came to nothing after all retries, at least, before the run stops
KEPT = ("scored", "unreadable", "out_of_range", "refused", "cut_off")  # what was answered, and need not be asked anew


class EndpointError(ValueError):
    """An endpoint that cannot be asked as the study says; the message names the setting to change. Answers that came before are kept."""


# --- clients --------------------------------------------------------------------------------------------------------------


def client_of(base_url: str, key_variable: str) -> OpenAI:
    """The official client of an endpoint; an empty `base_url` is OPENAI_BASE_URL or OpenAI's own. It retries nothing by itself.

    Raises:
        EndpointError: the environment variable `key_variable` is not set.
    """
    from openai import OpenAI

    return OpenAI(api_key=_key(key_variable), base_url=base_url or None, max_retries=0, timeout=TIMEOUT)


def async_client_of(base_url: str, key_variable: str) -> AsyncOpenAI:
    """As `client_of`, for `ask`."""
    from openai import AsyncOpenAI

    return AsyncOpenAI(api_key=_key(key_variable), base_url=base_url or None, max_retries=0, timeout=TIMEOUT)


def _key(variable: str) -> str:
    key = os.environ.get(variable, "").strip()
    if not key:
        raise EndpointError(
            f"the environment variable {variable} is not set; put the endpoint's key in it, or any word where the endpoint asks for none, or name "
            "another variable as key_variable in [[judges]]"
        )
    return key


# --- what a chat completion says ------------------------------------------------------------------------------------------


def answer_of(custom_id: str, completion: Mapping[str, Any], accept: Accept, price: Price, *, batch: bool = False, attempt: int = 1) -> Answer:
    """The row of one attempt from a chat completion as decoded JSON.

    A refusal and a content filter come before what the text may say; `cut_off` is a text that ran into max_tokens before it was a whole JSON object.
    """
    said = read_completion(completion)
    status: str = said.outcome
    if said.text is not None and said.outcome in ("answered", "cut_off"):
        status = status_of(custom_id, said.text, accept, cut_off=said.outcome == "cut_off")
    return Answer(
        custom_id,
        status,
        raw=said.text,
        model=said.model,
        prompt_tokens=said.prompt_tokens,
        completion_tokens=said.completion_tokens,
        cost_usd=price.cost(said.prompt_tokens, said.completion_tokens, batch, said.cached_tokens),
        attempt=attempt,
        error=said.error,
    )


def finished(answer: Answer, attempts: int, enough: Sequence[str] = ("scored",)) -> bool:
    """Whether a row is its request's last: a text with a status that is `enough`, or the last of its attempts."""
    return (answer.status in enough and answer.raw is not None) or _answered(answer) >= attempts


def _answered(answer: Answer) -> int:
    """How often a request was answered: an attempt that came to nothing is made anew."""
    return answer.attempt if answer.status in KEPT else answer.attempt - 1


def after(earlier: Answer | None, answer: Answer) -> Answer:
    """`answer` as the last attempt of its request, with the tokens and the cost of the attempts before it added."""
    if earlier is None:
        return answer
    return replace(
        answer,
        attempt=_answered(earlier) + 1,
        prompt_tokens=earlier.prompt_tokens + answer.prompt_tokens,
        completion_tokens=earlier.completion_tokens + answer.completion_tokens,
        cost_usd=earlier.cost_usd + answer.cost_usd,
    )


# --- asking ---------------------------------------------------------------------------------------------------------------


def run(
    requests: Iterable[Request],
    accept: Accept,
    *,
    base_url: str,
    key_variable: str,
    price: Price,
    attempts: int,
    concurrency: int,
    enough: Sequence[str] = ("scored",),
    spare_usd: float = math.inf,
    journal: AnswerJournal | None = None,
    on_answer: Callable[[Answer], None] = lambda answer: None,
) -> list[Answer]:
    """`ask` from code that is not async; what the journal holds is not asked again, and every answer goes into it before `on_answer` sees it.

    Interrupted, it sends no further question, receives and keeps what is in the air, and then lets the interruption go on.
    """
    leave = threading.Event()
    stop: list[Callable[[], object]] = []

    def keep(answer: Answer) -> None:
        if journal is not None:
            journal.append(answer)
        on_answer(answer)

    async def asked() -> list[Answer]:
        async with async_client_of(base_url, key_variable) as client:
            questions = _Questions(
                client,
                accept,
                price,
                attempts,
                concurrency,
                key_variable,
                earlier={} if journal is None else dict(journal.answers),
                on_answer=keep,
                enough=enough,
                spare_usd=spare_usd,
            )
            stop.append(partial(asyncio.get_running_loop().call_soon_threadsafe, questions.stop.set))
            if leave.is_set():
                questions.stop.set()
            return await questions.ask(requests)

    with ThreadPoolExecutor(1) as thread:  # of its own, because a notebook's has a loop already, in which none can be run
        answers = thread.submit(asyncio.run, asked())
        try:
            return answers.result()
        except BaseException:
            leave.set()
            if stop and not answers.done():
                stop[0]()
            raise


async def ask(
    requests: Iterable[Request],
    client: AsyncOpenAI,
    accept: Accept,
    *,
    price: Price,
    attempts: int,
    concurrency: int,
    key_variable: str = "OPENAI_API_KEY",
    enough: Sequence[str] = ("scored",),
    spare_usd: float = math.inf,
    earlier: Mapping[str, Answer] | None = None,
    on_answer: Callable[[Answer], None] = lambda answer: None,
    first_wait: float = FIRST_WAIT,
) -> list[Answer]:
    """Ask every request until `accept` calls an answer scored or `attempts` answers were none; one row each, in the order of `requests`.

    A row is the last attempt's, with tokens and cost of all attempts added up. `requests` is read as a stream, `concurrency` ahead at most.

    Args:
        client: see `async_client_of`; it must not retry by itself.
        accept: reads an answer's text, given its custom_id.
        enough: statuses of texts that end a request; for whom any text will do, `cut_off` beside `scored`.
        spare_usd: what asking again may cost, beyond one answer to every question; what first answers cost less than they might is added.
        earlier: the last row of what an earlier run asked; answered ones are taken as they are or go on at their next attempt.
        on_answer: called with the row so far after every attempt, as it comes in.
        first_wait: seconds before the first retry; each further one waits twice as long, at most a minute. An endpoint's own Retry-After goes before.

    Raises:
        EndpointError: the endpoint refuses the key, does not know the model, cannot answer by a schema, has no credit left, asks to wait for longer
            than ten minutes, fails for many questions in a row, or refuses all of the first ones in the same words; or asking again would cost more
            than is left. What is in the air is still received and kept first.
    """
    questions = _Questions(
        client,
        accept,
        price,
        attempts,
        concurrency,
        key_variable,
        earlier or {},
        on_answer,
        enough=enough,
        spare_usd=spare_usd,
        first_wait=first_wait,
    )
    return await questions.ask(requests)


class _NoAnswer(Exception):
    """A request that came to nothing; `wait` seconds are what the endpoint asked for."""

    def __init__(self, message: str, *, again: bool, wait: float | None = None, limited: bool = False):
        super().__init__(message)
        self.again, self.wait, self.limited = again, wait, limited


class _Stopped(Exception):
    """The run is stopping for another question's sake."""


@dataclass
class _Questions:
    """One run of `ask`: what its workers share."""

    client: AsyncOpenAI
    accept: Accept
    price: Price
    attempts: int
    concurrency: int
    key_variable: str
    earlier: Mapping[str, Answer]
    on_answer: Callable[[Answer], None]
    enough: Sequence[str] = ("scored",)
    spare_usd: float = math.inf
    first_wait: float = FIRST_WAIT

    def __post_init__(self) -> None:
        self.rows: dict[str, Answer | None] = {}
        self.fault: Exception | None = None
        self.stop = asyncio.Event()
        self.not_before = 0.0  # on the clock of time.monotonic; the endpoint limits all of us, not one question
        self.failed_in_a_row = 0
        self.refused_alike: Counter[str] | None = Counter()  # until there is an answer

    async def ask(self, requests: Iterable[Request]) -> list[Answer]:
        waiting = iter(requests)
        await asyncio.gather(*(self._work(waiting) for _ in range(self.concurrency)))
        if self.fault is not None:
            raise self.fault
        return [row for row in self.rows.values() if row is not None]

    async def _work(self, waiting: Iterator[Request]) -> None:
        """Take one question after the other until there are no more or the run stops. The first fault stops every worker after its question."""
        try:
            while not self.stop.is_set():
                request = next(waiting, None)
                if request is None:
                    return
                if request.custom_id in self.rows:
                    raise ValueError(f"the request {request.custom_id} is there twice; ask each once")
                self.rows[request.custom_id] = None  # keeps the order of the requests
                await self._until_scored(request)
        except _Stopped:
            return
        except Exception as error:
            self.fault = self.fault or error
            self.stop.set()

    async def _until_scored(self, request: Request) -> None:
        row, again = self.earlier.get(request.custom_id), False
        while row is None or not finished(row, self.attempts, self.enough):
            if again:
                self._take(request, row)
            try:
                answer = await self._one_attempt(request)
            except _NoAnswer as failure:
                answer = Answer(request.custom_id, "failed", error=str(failure))
                row = after(row, answer)
                self.on_answer(row)
                self._outage(failure)
                break
            self.spare_usd += self._at_most(request, answer) - answer.cost_usd
            row = after(row, answer)
            self.failed_in_a_row, self.refused_alike, again = 0, None, True
            self.on_answer(row)
        self.rows[request.custom_id] = row

    def _at_most(self, request: Request, answer: Answer) -> float:
        """What one answer to a question may cost, in USD, from the tokens that it was seen to have."""
        body = json.loads(request.body)
        most = body.get("max_tokens") or body.get("max_completion_tokens") or answer.completion_tokens
        return max(answer.cost_usd, self.price.cost(answer.prompt_tokens, most))

    def _take(self, request: Request, row: Answer | None) -> None:
        """Set aside what asking again may cost."""
        assert row is not None
        usd = self._at_most(request, replace(row, prompt_tokens=row.prompt_tokens // row.attempt, completion_tokens=0, cost_usd=0.0))
        if usd > self.spare_usd:
            raise EndpointError(
                f"{self.client.base_url}: asking again what has no score may cost more than the budget leaves "
                f"(${max(0.0, self.spare_usd):,.4f}); the last answer was {row.status}. What came is kept. Raise budget_usd, or lower attempts"
            )
        self.spare_usd -= usd

    def _outage(self, failure: _NoAnswer) -> None:
        self.failed_in_a_row = self.failed_in_a_row + 1 if failure.again else 0
        if self.failed_in_a_row >= max(OUTAGE, self.concurrency):
            self._end(
                f"{self.failed_in_a_row} questions in a row came to nothing, each tried {RETRIES + 1} times; the last with: {failure}. "
                "See whether the endpoint is up and base_url is right, then run again: what was answered is kept"
            )
        if self.refused_alike is not None and not failure.again:
            self.refused_alike[str(failure)] += 1
            if self.refused_alike[str(failure)] >= max(OUTAGE, self.concurrency):
                self._end(
                    f"the first {self.refused_alike[str(failure)]} questions were all refused with: {failure}. Correct the model or its settings"
                )

    def _end(self, words: str) -> None:
        self.fault = self.fault or EndpointError(f"{self.client.base_url}: {words}")
        self.stop.set()

    async def _one_attempt(self, request: Request) -> Answer:
        """The next answer to a request, after as many retries as it takes and is allowed."""
        retry = 0
        while True:
            await self._pause(self.not_before - time.monotonic())
            try:
                return await self._send(request)
            except _NoAnswer as failure:
                if not failure.again or retry == RETRIES:
                    raise
                wait = failure.wait
                if wait is None:
                    # Full waits would come back in step; between half and all of each spreads them.
                    wait = min(LONGEST_WAIT, self.first_wait * 2**retry) * random.uniform(0.5, 1.0)
                elif failure.limited:
                    self.not_before = max(self.not_before, time.monotonic() + wait)
                await self._pause(wait)
                retry += 1

    async def _pause(self, seconds: float) -> None:
        if self.stop.is_set():
            raise _Stopped
        if seconds > 0:
            try:
                await asyncio.wait_for(self.stop.wait(), seconds)
            except TimeoutError:
                return
            raise _Stopped

    async def _send(self, request: Request) -> Answer:
        import openai

        body = json.loads(request.body)
        try:
            response = await self.client.chat.completions.with_raw_response.create(**body)
            completion = json.loads(response.text)
            if not isinstance(completion, dict) or not isinstance(completion.get("choices"), list):
                raise _NoAnswer(f"the answer is no chat completion: {response.text[:200]!r}", again=True)
        except openai.APIStatusError as error:
            return self._refused_by_filter(request, error) or self._raise(error, body["model"])
        except openai.APIConnectionError as error:
            raise _NoAnswer(self._clean(f"{error} ({error.__cause__ or 'no answer'})"), again=True) from error
        except ValueError as error:
            raise _NoAnswer(f"the answer is not JSON: {error}", again=True) from error
        return answer_of(request.custom_id, completion, self.accept, self.price)

    def _refused_by_filter(self, request: Request, error: Any) -> Answer | None:
        """Some providers' filters refuse a question with an HTTP error instead of an answer."""
        if error.status_code == 400 and error.code == "content_filter":
            return Answer(request.custom_id, "refused", error=self._clean(error.message))
        return None

    def _raise(self, error: Any, model: str) -> Answer:
        """An HTTP error as what follows from it: the run stops, the question fails, or it is tried again."""
        status, said = error.status_code, self._clean(error.message)
        where = f"{self.client.base_url} answered {status}: {said}"
        if status in (401, 403):
            raise EndpointError(
                f"{where}. The key is in the environment variable {self.key_variable}; correct it, or key_variable or base_url"
            ) from error
        if status == 404:
            raise EndpointError(f"{where}. Correct the model {model!r} or base_url in [[judges]]") from error
        if error.code == "insufficient_quota":
            raise EndpointError(f"{where}. The account of the key in {self.key_variable} has no credit left; add some and run again") from error
        if status == 400 and ("response_format" in f"{error.param} {said}" or "json_schema" in said):
            raise EndpointError(f"{where}. Judges answer by a JSON schema; take a model and an endpoint with structured outputs") from error
        wait = retry_after(error.response.headers)
        if wait is not None and wait > LONGEST_ASKED_WAIT:
            raise EndpointError(f"{where}. It asks to wait for {wait / 60:,.0f} minutes; run again then: what was answered is kept") from error
        raise _NoAnswer(f"{status}: {said}", again=status in (408, 409, 429) or status >= 500, wait=wait, limited=status == 429) from error

    def _clean(self, text: str) -> str:
        """An endpoint's words without our key, should it have repeated it."""
        return text.replace(self.client.api_key, "[key]")[:1000]


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds that an endpoint asks us to wait: retry-after-ms, or Retry-After in seconds or as a date; None where it says nothing usable."""
    for name, unit in (("retry-after-ms", 1000), ("retry-after", 1)):
        try:
            seconds = float(headers[name]) / unit
        except (KeyError, ValueError):
            continue
        if math.isfinite(seconds):
            return max(0.0, seconds)
    try:
        moment = email.utils.parsedate_to_datetime(headers["retry-after"])
    except (KeyError, ValueError):
        return None
    return max(0.0, moment.timestamp() - time.time())


# --- what was paid for is kept --------------------------------------------------------------------------------------------


class AnswerJournal:
    """Answers as they came in, a JSON line each, so that a run that was killed does not pay again; the last line of a custom_id holds.

    Every answer is handed to the system at once (a killed process loses none) and forced to the disk with every `GROUP`th and at the end (a power cut
    loses fewer than that). A question that was in the air when the process died is asked again, for its answer is not known.

    Raises:
        StorageError: another process has the journal open, or a line other than a torn last one cannot be read.
    """

    GROUP = 32

    def __init__(self, path: Path):
        self.path = Path(path)
        self.answers: dict[str, Answer] = {}
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("a+b", buffering=0)
        except OSError as error:
            raise StorageError(f"{path}: cannot write here ({error.strerror}); set RELSEEK_STORE to a writable folder") from error
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._read()
        except BlockingIOError as error:
            self._file.close()
            raise StorageError(f"{path}: another run is asking the same questions; let it finish") from error
        except StorageError:
            self._file.close()
            raise
        self._unsynced = 0

    def _read(self) -> None:
        self._file.seek(0)
        whole = 0
        with self.path.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                if not line.endswith(b"\n"):
                    self._file.truncate(whole)  # torn: the process died while it wrote
                    break
                try:
                    answer = Answer(**json.loads(line))
                except (ValueError, TypeError) as error:
                    raise StorageError(
                        f"{self.path}, line {number}: no answer ({error}); remove the line, its question is then asked again"
                    ) from error
                self.answers[answer.custom_id] = answer
                whole += len(line)

    def append(self, answer: Answer) -> None:
        line = json.dumps(asdict(answer)).encode() + b"\n"
        whole = os.fstat(self._file.fileno()).st_size
        try:
            if self._file.write(line) != len(line):
                self._file.truncate(whole)  # else the next answer would go on in the middle of this one
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self._unsynced += 1
            if self._unsynced >= self.GROUP:
                self._sync()
        except OSError as error:
            raise StorageError(f"{self.path}: an answer was not kept ({error.strerror}); free some space and run again") from error
        self.answers[answer.custom_id] = answer

    def _sync(self) -> None:
        os.fsync(self._file.fileno())
        self._unsynced = 0

    def close(self) -> None:
        self._sync()
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *fault: object) -> None:
        self.close()
