"""The embedded engine: many requests at once on one transformers model, for machines without vLLM.

Here belong requests and their replies, the draw of each token, and the one thread that lets rows join and leave the running batch between two tokens.
The batch itself belongs in `running.py`, HTTP in `server.py`.

A reply depends on its own request alone: each row has its own seed, steering and sampling. What else is in the batch changes its log-probabilities by
rounding, about 1e-5.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import math
import secrets
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch

from relseek_resources.models.interventions import unit_vector
from relseek_resources.models.sampling import Sampling, draw
from relseek_resources.models.steered import SteeredModel
from relseek_resources.serving.running import CHUNK, Prompts, RunningBatch
from relseek_resources.serving.vectors import Configuration, Registered, Vectors

log = logging.getLogger(__name__)
Found = TypeVar("Found")
STOP, LENGTH = "stop", "length"


class RequestError(ValueError):
    """A request that cannot be answered as it was made. The message says why; `parameter` names what is at fault."""

    def __init__(self, message: str, parameter: str | None = None) -> None:
        super().__init__(message)
        self.parameter = parameter


class TooLong(RequestError):
    """A prompt that does not fit the context with its reply."""

    def __init__(self, message: str) -> None:
        super().__init__(message, "messages")


class Busy(RuntimeError):
    """More requests wait than the engine holds. `seconds`: when it is worth trying again."""

    def __init__(self, waiting: int, seconds: int) -> None:
        super().__init__(f"{waiting} requests are waiting already; try again in {seconds} s")
        self.seconds = seconds


class EngineError(RuntimeError):
    """The engine failed at this request, or has stopped."""


@dataclass(frozen=True)
class Request:
    """What is asked of the engine.

    `steering`: the canonical text (`requests.canonical`), empty for none. `seed`: None draws one. `top_log_probs`: how many alternatives to name at
    each token, None for no log-probabilities at all.
    """

    prompt: tuple[int, ...]
    max_tokens: int
    steering: str = ""
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    top_log_probs: int | None = None


@dataclass(frozen=True)
class Token:
    """A drawn token with its log-probability in nats under the steered model at temperature 1, and the likeliest ones beside it."""

    id: int
    log_prob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Piece:
    """What has been added to a reply. `tokens` are filled where log-probabilities were asked for. `finished` is stop or length on the last piece."""

    text: str
    tokens: tuple[Token, ...] = ()
    finished: str = ""
    completion_tokens: int = 0


@dataclass(frozen=True)
class Reply:
    text: str
    tokens: tuple[Token, ...]
    finished: str
    completion_tokens: int


class Ticket:
    """A request on its way: an asynchronous iterator of pieces. `cancel` frees its row."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.cancelled = False
        self._loop = asyncio.get_running_loop()
        self._pieces: asyncio.Queue[Piece | Exception] = asyncio.Queue()

    def cancel(self) -> None:
        self.cancelled = True

    def deliver(self, piece: Piece | Exception) -> None:
        """Hand a piece over from the engine's thread."""
        try:
            self._loop.call_soon_threadsafe(self._pieces.put_nowait, piece)
        except RuntimeError:
            self.cancelled = True  # the loop that waited is closed

    async def __aiter__(self) -> AsyncIterator[Piece]:
        try:
            while True:
                piece = await self._pieces.get()
                if isinstance(piece, Exception):
                    raise piece
                yield piece
                if piece.finished:
                    return
        finally:
            self.cancel()


class Engine:
    """One model, its vectors, and the thread that answers requests.

    >>> engine = Engine(models.load("embedded:smollm2-135m-instruct"), Configuration(folder, {"warm": "warm.safetensors"}), name="smollm2")
    >>> reply = await engine.reply(Request(prompt=engine.prompt(messages), max_tokens=100))
    """

    def __init__(
        self, model: SteeredModel, configuration: Configuration, *, name: str, rows: int = 32, length: int = 2048, waiting: int = 256
    ) -> None:
        """Start the thread; `close` ends it.

        Args:
            name: what clients call the model.
            rows: requests that are answered at once; the rest wait, `waiting` of them.
            length: tokens of prompt and reply together, at most the model's own context.

        Raises:
            ServingError: a configuration that does not fit the model.
        """
        self.model, self.name, self.limit, self.most_waiting = model, name, rows, waiting
        self.length = min(length, getattr(model.model.config.get_text_config(), "max_position_embeddings", length))
        self.vectors = Vectors(configuration, model.layers, model.width)
        self._batch = RunningBatch(model, rows=rows, capacity=configuration.capacity)
        for digest, vector in self.vectors.by_digest().items():
            self._batch.tables.register(digest, vector)
        self._waiting: deque[Ticket] = deque()
        self._jobs: deque[tuple[Future[Any], Callable[[], Any]]] = deque()
        self._changed = threading.Condition()
        self._closing = False
        self._live: list[_Row] = []  # in the order of the batch's rows
        self._prompts: tuple[Prompts, list[_Row]] | None = None
        self._seconds = 10.0  # what a request has taken lately
        self._tokenizing = threading.Lock()
        self._byte_of = _byte_alphabet(model.tokenizer)
        self._thread = threading.Thread(target=self._work, name="relseek engine", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive() and not self._closing

    def close(self) -> None:
        """Stop, failing what is under way, and give the model back without hooks."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()
        self._batch.close()

    # --- asking -------------------------------------------------------------------------------------------------------

    def prompt(self, messages: Sequence[dict[str, str]]) -> tuple[int, ...]:
        """A conversation's tokens, with the header that opens the reply.

        Raises:
            RequestError: the model's chat template refuses it.
        """
        from jinja2 import TemplateError

        try:
            with self._tokenizing:
                return tuple(self.model.prompt_tokens(messages))
        except (ValueError, TemplateError) as error:
            raise RequestError(f"messages: {error}", "messages") from error

    def bytes_of(self, token: int) -> bytes:
        """A token's text as bytes; it may be part of a character."""
        text = self.model.tokenizer.convert_ids_to_tokens(token) or ""
        if self._byte_of and all(character in self._byte_of for character in text):
            return bytes(self._byte_of[character] for character in text)
        return self.model.tokenizer.decode([token]).encode()

    def submit(self, requests: Sequence[Request]) -> list[Ticket]:
        """Queue requests, all of them or none.

        Raises:
            RequestError: a prompt without tokens.
            TooLong: a prompt that does not fit with its reply.
            Busy: too many are waiting.
            EngineError: the engine has stopped.
        """
        for request in requests:
            self._check(request)
        tickets = [Ticket(request) for request in requests]
        with self._changed:
            if not self.alive:
                raise EngineError("the engine has stopped")
            if len(self._waiting) + len(tickets) > self.most_waiting:
                raise Busy(len(self._waiting), math.ceil(self._seconds * (1 + len(self._waiting) / self.limit)))
            self._waiting.extend(tickets)
            self._changed.notify()
        return tickets

    def _check(self, request: Request) -> None:
        if not request.prompt:
            raise RequestError("a prompt without tokens cannot be answered", "messages")
        if not 1 <= request.max_tokens <= self.length - len(request.prompt):
            raise TooLong(
                f"the prompt has {len(request.prompt)} tokens and the reply may have {request.max_tokens}; together at most {self.length} fit"
            )

    async def reply(self, request: Request) -> Reply:
        """The whole reply at once. Cancelling frees its row."""
        return await whole(self.submit([request])[0])

    async def register(self, name: Any, file: Any) -> Registered:
        """Offer a safetensors file of the declared folder under a name from now on.

        Raises:
            SteeringError: see `Vectors.read`.
        """
        new = await asyncio.to_thread(self.vectors.read, name, file)

        def hold() -> None:
            for block, vector in new.tensors.items():
                self._batch.tables.register(new.digests[block], vector)

        await self._between_steps(hold)
        self.vectors.add(new)
        return new

    async def projection(self, messages: Sequence[dict[str, str]], reply: str, steering: str, vector: str, layer: int | None = None) -> float:
        """Mean projection of a reply's stream on a vector after a block, the vector's own unless named, while it is steered as given.

        Raises:
            SteeringError: an unknown vector or block, a zero vector.
            RequestError: a conversation that does not fit, a reply without tokens.
        """
        found = self.vectors.named(vector, "projection")
        block = self.vectors.layers(found, layer, "projection")[-1]
        self.vectors.check_direction(found, [block], "projection")
        prompt = await asyncio.to_thread(self.prompt, messages)
        tokens = await asyncio.to_thread(self.model.reply_tokens, reply, end=False)
        if not tokens or len(prompt) + len(tokens) > self.length:
            raise RequestError(f"a reply of {len(tokens)} tokens; its projection needs one or more, with the prompt at most {self.length}", "reply")
        unit = unit_vector(self.model.check_vector(found.at(block)))
        return await self._between_steps(lambda: float(self._batch.projections(prompt, tokens, steering, unit, block).mean()))

    async def _between_steps(self, work: Callable[[], Found]) -> Found:
        """Run `work` in the engine's thread, which alone may touch the model."""
        future: Future[Found] = Future()
        with self._changed:
            if not self.alive:
                raise EngineError("the engine has stopped")
            if len(self._jobs) >= self.most_waiting:
                raise Busy(len(self._jobs), math.ceil(self._seconds))
            self._jobs.append((future, work))
            self._changed.notify()
        return await asyncio.wrap_future(future)

    # --- the thread ---------------------------------------------------------------------------------------------------

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closing or self._waiting or self._jobs or self._live or self._prompts)
                if self._closing:
                    break
                jobs, self._jobs = self._jobs, deque()
            for future, work in jobs:
                _settle(future, work)
            try:
                self._forget_cancelled()
                self._begin()
                self._advance()
                self._step()
            except Exception:
                log.exception("the engine failed at a step")
                self._abandon(EngineError("the engine failed at this request"))
        self._abandon(EngineError("the engine has stopped"))
        with self._changed:
            for ticket in self._waiting:
                ticket.deliver(EngineError("the engine has stopped"))
            for future, _ in self._jobs:
                future.set_exception(EngineError("the engine has stopped"))

    def _abandon(self, error: Exception) -> None:
        """Fail all that is under way and begin with an empty batch."""
        for row in (*self._live, *(self._prompts[1] if self._prompts else ())):
            row.ticket.deliver(error)
        self._live, self._prompts = [], None
        self._batch.clear()

    def _forget_cancelled(self) -> None:
        for row in [row for row in self._live if row.ticket.cancelled]:
            self._leave(row)
        with self._changed:
            if any(ticket.cancelled for ticket in self._waiting):
                self._waiting = deque(ticket for ticket in self._waiting if not ticket.cancelled)
        if self._prompts is not None and all(row.ticket.cancelled for row in self._prompts[1]):
            self._prompts = None

    def _begin(self) -> None:
        """Take waiting requests up, first come first served, as many as one piece of work holds; a long prompt goes alone."""
        if self._prompts is not None:
            return
        taken: list[Ticket] = []
        with self._changed:
            while self._waiting and len(self._live) + len(taken) < self.limit:
                longest = max(len(ticket.request.prompt) for ticket in (*taken, self._waiting[0]))
                if taken and longest * (len(taken) + 1) > CHUNK:
                    break
                ticket = self._waiting.popleft()
                if not ticket.cancelled:
                    taken.append(ticket)
        if taken:
            rows = [_Row(ticket, self.model) for ticket in taken]
            self._prompts = Prompts([row.request.prompt for row in rows], [row.request.steering for row in rows]), rows

    def _advance(self) -> None:
        if self._prompts is None:
            return
        prompts, rows = self._prompts
        logits = self._batch.advance(prompts)
        if logits is not None:
            self._live += rows
            self._prompts = None
            self._draw(rows, logits)

    def _step(self) -> None:
        if self._live:
            self._draw(list(self._live), self._batch.step([row.newest for row in self._live]))

    @torch.inference_mode()
    def _draw(self, rows: list[_Row], logits: torch.Tensor) -> None:
        """Give each row its next token; those that are finished leave."""
        sound = torch.isfinite(logits).all(-1).tolist()
        drawn = _drawn(rows, logits)
        log_probs = _log_probs(rows, logits, drawn)
        for place, (row, token) in enumerate(zip(rows, drawn.tolist(), strict=True)):
            if not sound[place]:
                row.ticket.deliver(RequestError("the model's logits are not finite under this steering; use smaller doses", "vllm_xargs.relseek"))
                self._leave(row)
                continue
            row.add(token, log_probs.get(place))
            if row.finished:
                self._seconds += 0.1 * (time.monotonic() - row.start - self._seconds)
                self._leave(row)

    def _leave(self, row: _Row) -> None:
        place = self._live.index(row)
        self._batch.leave(place)
        last = self._live.pop()
        if place < len(self._live):
            self._live[place] = last


def _settle(future: Future[Any], work: Callable[[], Any]) -> None:
    if future.set_running_or_notify_cancel():
        try:
            future.set_result(work())
        except Exception as error:
            future.set_exception(error)


async def whole(ticket: Ticket) -> Reply:
    """A ticket's reply when it is finished."""
    pieces = [piece async for piece in ticket]
    tokens = tuple(token for piece in pieces for token in piece.tokens)
    return Reply("".join(piece.text for piece in pieces), tokens, pieces[-1].finished, pieces[-1].completion_tokens)


# --- a row --------------------------------------------------------------------------------------------------------------


class _Row:
    """A request that is being answered."""

    def __init__(self, ticket: Ticket, model: SteeredModel) -> None:
        self.ticket, self.request, self.ends = ticket, ticket.request, model.ends
        seed = secrets.randbits(63) if ticket.request.seed is None else ticket.request.seed
        self.chances = np.random.Generator(np.random.PCG64(seed % 2**64))
        self.text = Text(functools.partial(model.tokenizer.decode, skip_special_tokens=True), ticket.request.stop)
        self.start = time.monotonic()
        self.newest, self.drawn, self.finished = -1, 0, ""

    def add(self, token: int, log_probs: Token | None) -> None:
        self.newest, self.drawn = token, self.drawn + 1
        if token in self.ends or self.text.add(token):
            self.finished = STOP
        elif self.drawn == self.request.max_tokens:
            self.finished = LENGTH
        tokens = () if log_probs is None else (log_probs,)
        self.ticket.deliver(Piece(self.text.given(whole=bool(self.finished)), tokens, self.finished, self.drawn))


class Text:
    """Tokens as text, given out piece by piece: what may be the beginning of a stop string or half a character is held back."""

    def __init__(self, decode: Callable[[list[int]], str], stop: Sequence[str]) -> None:
        self.decode, self.stop = decode, stop
        self.tokens: list[int] = []
        self.before = self.read = 0  # a token's text depends on the one before it: decoding starts at `before`
        self.text, self.out, self.stopped = "", 0, False

    def add(self, token: int) -> bool:
        """Whether a stop string has come up; the text then ends before it."""
        self.tokens.append(token)
        found = self.decode(self.tokens[self.before :])
        if not found.endswith("\ufffd"):
            self._read(found)
        return self.stopped

    def _read(self, found: str) -> None:
        searched = max(0, len(self.text) - max(map(len, self.stop), default=0))
        self.text += found[len(self.decode(self.tokens[self.before : self.read])) :]
        self.before, self.read = self.read, len(self.tokens)
        places = [place for place in (self.text.find(one, searched) for one in self.stop) if place >= 0]
        if places and not self.stopped:
            self.text, self.stopped = self.text[: min(places)], True

    def given(self, *, whole: bool) -> str:
        """What has not been given out yet; all of it once the reply is `whole`."""
        if whole and not self.stopped and self.read < len(self.tokens):
            self._read(self.decode(self.tokens[self.before :]))
        end = len(self.text) - (0 if whole else max((_begun(self.text, one) for one in self.stop), default=0))
        piece = self.text[self.out : end]
        self.out = max(self.out, end)
        return piece


def _begun(text: str, stop: str) -> int:
    """How many characters at the text's end are the beginning of `stop`."""
    return next((length for length in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:length])), 0)


def _byte_alphabet(tokenizer: Any) -> dict[str, int]:
    """The byte that each character of a token stands for, empty where a tokenizer does not write bytes as characters."""
    from tokenizers import decoders
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    decoder = getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", None)
    return {character: byte for byte, character in bytes_to_unicode().items()} if isinstance(decoder, decoders.ByteLevel) else {}


# --- the draw -----------------------------------------------------------------------------------------------------------


def _drawn(rows: Sequence[_Row], logits: torch.Tensor) -> torch.Tensor:
    """A token for each row, int64 (rows,), from its own chance; the same as `SteeredModel.generate` draws from the same seed."""
    alike: dict[tuple[float, float], list[int]] = {}
    for place, row in enumerate(rows):
        alike.setdefault((row.request.temperature, row.request.top_p), []).append(place)
    found = torch.zeros(len(rows), dtype=torch.int64, device=logits.device)
    for (temperature, top_p), places in alike.items():
        at = torch.tensor(places, device=logits.device)
        chances = torch.tensor([rows[place].chances.random() for place in places], dtype=torch.float64, device=logits.device)
        found[at] = draw(logits[at], chances, Sampling(temperature, top_p))
    return found


def _log_probs(rows: Sequence[_Row], logits: torch.Tensor, drawn: torch.Tensor) -> dict[int, Token]:
    """The drawn token and its likeliest rivals, by row, for the rows that asked for them."""
    asked = {place: row.request.top_log_probs for place, row in enumerate(rows) if row.request.top_log_probs is not None}
    if not asked:
        return {}
    at = torch.tensor(list(asked), device=logits.device)
    log_probs, own = logits[at].log_softmax(-1), drawn[at]
    values = log_probs.gather(-1, own.unsqueeze(-1)).squeeze(-1).tolist()
    likeliest = log_probs.topk(max(asked.values()), -1)
    found = {}
    for number, (place, wanted) in enumerate(asked.items()):
        top = zip(likeliest.indices[number, :wanted].tolist(), likeliest.values[number, :wanted].tolist(), strict=True)
        found[place] = Token(int(own[number]), values[number], tuple(top))
    return found
