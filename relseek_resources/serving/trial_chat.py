"""How participants of a trial talk to their arm: the route that takes their messages and never says which arm it is.

Here belong the routes, the conversations behind them and whoever replies. Allocation belongs in `trial_arms.py`, the log in `trial_log.py`.

    POST /trial/chat     {"token", "message", "session"?} or {"token", "messages", "session"?}  ->  {"reply", "session", "turn"}
    POST /trial/history  {"token"}  ->  {"sessions": [{"session", "messages"}]}

`messages` is the whole conversation as the client has it, the new message last. The server goes by its own log: a conversation that differs from it
is refused, so that nobody can put words into the model's mouth, and a message that has its reply already is given that reply again.

Every arm is answered in the same form, with the same headers and the same words where something fails.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import math
import re
import secrets
import time
import traceback
from collections import defaultdict, deque
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol
from weakref import WeakValueDictionary

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from relseek_resources.serving import requests
from relseek_resources.serving.guard import Buckets, Guard, Refusal, Settings
from relseek_resources.serving.trial_arms import Allocation, ArmsError, Conduct, Participant, check_offered, read_allocation
from relseek_resources.serving.trial_log import TurnLog
from relseek_resources.storage import StorageError, keyed_seed

if TYPE_CHECKING:
    from relseek_resources.serving.engine import Engine

logger = logging.getLogger(__name__)

SESSION = re.compile(r"[A-Za-z0-9_-]{1,64}")
FAILED = "no reply could be made; try again in a moment, or begin a new session"
FULL = "this conversation is full; begin a new session"
TOO_LONG = "this message is too long to be answered; send a shorter one"
# What the families that are served write around turns, and read so in a message too: Llama 3 and Qwen; Gemma; Mistral and Llama 2; all of them.
CONTROL = re.compile(
    r"<\|[^<>|\s]{1,64}\|>"
    r"|<(?:start|end)_of_[a-z]{1,20}>"
    r"|\[/?(?:INST|SYSTEM_PROMPT|AVAILABLE_TOOLS|TOOL_CALLS|TOOL_RESULTS|TOOL_CONTENT)\]|<</?SYS>>"
    r"|</?s>|<(?:bos|eos|pad|unk|mask)>"
)

WHOLE = ("stop", "length")  # how a reply ends that the model, or the trial's own limit, brought to its end

Message = dict[str, str]


@dataclass(frozen=True)
class Ask:
    """What a speaker is to reply to: the conversation, its new message last, steered as `requests.read` understands it."""

    messages: Sequence[Message]
    steering: Sequence[Mapping[str, Any]]
    conduct: Conduct
    seed: int
    conversation: str  # the same for every turn of a conversation; does not tell whose it is


@dataclass(frozen=True)
class Said:
    """What has been added to a reply. `finish_reason` is given with the last piece, in OpenAI's words."""

    text: str
    finish_reason: str | None = None


class CutOff(Exception):
    """A reply that broke off."""


class Full(Exception):
    """A conversation to which the model's context leaves no room for a reply."""


class Speaker(Protocol):
    """What makes the replies.

    `special`: what its tokenizer reads as other than words, as far as that is known here; `CONTROL` is refused besides.
    """

    model: str
    special: frozenset[str]

    def reply(self, ask: Ask) -> AsyncIterator[Said]:
        """The reply, piece by piece. Any exception is a failed turn, and so is a reply without an end of its own (`WHOLE`).

        Raises:
            Full: no reply has room; the turn is logged as such.
        """
        ...


class Refused(Exception):
    """A request that is not answered; the words are the same for every arm."""

    def __init__(self, status: int, message: str, retry_after: int | None = None) -> None:
        super().__init__(message)
        self.status, self.retry_after = status, retry_after

    def response(self) -> JSONResponse:
        headers = {"retry-after": str(self.retry_after)} if self.retry_after is not None else None
        return JSONResponse({"error": {"message": str(self)}}, self.status, headers)


class Trial:
    """The conversations of a trial, resumed from its log."""

    def __init__(self, allocation: Allocation, speaker: Speaker, log: TurnLog, rate: int = 0) -> None:
        """Take up every conversation of the log.

        Args:
            log: of this allocation, or an empty one.
            rate: requests a minute with a wrong token for each address, 0 for no limit. Whoever has a right one is not held up by them.

        Raises:
            ArmsError: a turn of the log was spoken under another allocation, whose participants may have the same names.
        """
        self.allocation, self.speaker, self.log = allocation, speaker, log
        self._said: dict[tuple[str, str], list[Message]] = {}
        self._turns: dict[tuple[str, str], int] = defaultdict(int)
        self._answered_turn: dict[tuple[str, str], int] = {}  # failed turns have numbers too
        self._speaking: WeakValueDictionary[tuple[str, str], asyncio.Lock] = WeakValueDictionary()  # while somebody speaks
        self._recent: dict[str, deque[float]] = defaultdict(deque)
        self._strangers = Buckets(rate)
        self._digest = allocation.digest
        for turn in log.turns:
            self._check_own(turn)
            self._remember(turn)

    def routes(self) -> list[Route]:
        return [
            Route("/trial/chat", self._answered(self.chat), methods=["POST"]),
            Route("/trial/history", self._answered(self.history), methods=["POST"]),
        ]

    async def chat(self, participant: Participant, content: dict[str, Any], received: float) -> dict[str, Any]:
        session = self._session(participant, content)
        message, before = _asked(content, self.allocation.conduct.longest_message)
        _check_words(message["content"], self.speaker.special)
        key = (participant.name, session)
        speaking = self._speaking.setdefault(key, asyncio.Lock())
        async with speaking:
            said = self._said.get(key, [])
            if before is not None and before != said:
                if [*before, message] == said[:-1]:
                    return {"reply": said[-1]["content"], "session": session, "turn": self._answered_turn[key]}
                raise Refused(409, "the conversation is not as it was; ask for its history")
            turn = await self._speak(participant, session, message, said, received)
        if turn["status"] == "full":
            raise Refused(422, FULL if said else TOO_LONG)
        if turn["status"] != "ok":
            raise Refused(503, FAILED, retry_after=5)
        return {"reply": turn["reply"], "session": session, "turn": turn["turn"]}

    async def history(self, participant: Participant, content: dict[str, Any], received: float) -> dict[str, Any]:
        mine = [{"session": session, "messages": said} for (name, session), said in self._said.items() if name == participant.name]
        return {"sessions": mine}

    # --- speaking -----------------------------------------------------------------------------------------------------

    async def _speak(self, participant: Participant, session: str, message: Message, said: list[Message], received: float) -> dict[str, Any]:
        """Make a reply, log the turn, and then take it into the conversation."""
        conduct, arm = self.allocation.conduct, participant.arm
        number = self._turns[participant.name, session] + 1
        seed = keyed_seed(self.allocation.seed, "reply", participant.name, session, number) >> 11  # whole as a float, too
        arrived = datetime.now(UTC).timestamp() - (time.monotonic() - received)
        opening = [{"role": "system", "content": conduct.system}] if conduct.system else []
        shown = [_as_words(turn, self.speaker.special) for turn in said]
        ask = Ask([*opening, *shown, message], arm.steering, conduct, seed, self._conversation(participant, session))
        pieces: list[str] = []
        first: float | None = None
        finish_reason: str | None = None
        status = "ok"
        error: str | None = None
        ending: asyncio.CancelledError | None = None
        try:
            async for piece in self.speaker.reply(ask):
                if piece.text:
                    first = first if first is not None else time.monotonic()
                    pieces.append(piece.text)
                finish_reason = piece.finish_reason or finish_reason
            if finish_reason not in WHOLE:
                raise CutOff(f"the reply broke off with the finish_reason {finish_reason}")
        except Full as fault:
            status, error = "full", str(fault)[:2000]
        except Exception as fault:  # whatever it is, the participant may not see it: its words may name the arm
            status, error = "failed", f"{type(fault).__name__}: {fault}"[:2000]
        except asyncio.CancelledError as fault:
            ending, status, error = fault, "failed", "the server ended before the reply was whole"
        finished = time.monotonic()
        turn = {
            "allocation": self._digest,
            "participant": participant.name,
            **arm.logged,
            "session": session,
            "turn": number,
            "status": status,
            "message": message["content"],
            "reply": "".join(pieces) if status == "ok" else None,
            "error": error,
            "finish_reason": finish_reason,
            "system": conduct.system,
            "model": self.speaker.model,
            "temperature": conduct.temperature,
            "top_p": conduct.top_p,
            "max_tokens": conduct.max_tokens,
            "seed": seed,
            "received": _moment(arrived),
            "first_token": None if first is None else _moment(arrived + first - received),
            "finished": _moment(arrived + finished - received),
            "seconds_to_first_token": None if first is None else round(first - received, 6),
            "seconds": round(finished - received, 6),
        }
        if ending is not None:
            self.log.append(turn)  # at once: the event loop is closing
            self._remember(turn)
            raise ending
        # a turn that is being written is written, though the loop be closing; it may not be left half done
        await asyncio.shield(asyncio.get_running_loop().run_in_executor(None, self.log.append, turn))
        self._remember(turn)
        return turn

    def _conversation(self, participant: Participant, session: str) -> str:
        return hashlib.sha256(json.dumps([self._digest, participant.name, session]).encode()).hexdigest()

    def _check_own(self, turn: Mapping[str, Any]) -> None:
        """Refuse a turn that this allocation's participant cannot have spoken in their arm."""
        name = turn["participant"]
        where = f"{self.log.file}: turn {turn['turn']} of {name}"
        if name not in self.allocation.arm_of:
            raise ArmsError(f"{where}: this trial has no such participant; begin another log with --conversations")
        due = {**self.allocation.arms[self.allocation.arm_of[name]].logged, "allocation": self._digest}
        other = [field for field, value in due.items() if turn[field] != value]
        if other:
            raise ArmsError(f"{where}: spoken under another allocation ({', '.join(other)}); begin another log with --conversations")

    def _remember(self, turn: Mapping[str, Any]) -> None:
        key = (turn["participant"], turn["session"])
        self._turns[key] = max(self._turns[key], turn["turn"])
        if turn["status"] == "ok":
            self._answered_turn[key] = turn["turn"]
            self._said.setdefault(key, []).extend([{"role": "user", "content": turn["message"]}, {"role": "assistant", "content": turn["reply"]}])

    # --- at the door --------------------------------------------------------------------------------------------------

    def _answered(self, action: Any) -> Any:
        async def answer(request: Request) -> JSONResponse:
            received = time.monotonic()
            try:
                content = _object(await request.body())
                participant = self.allocation.participant(content.get("token"))
                if participant is None:
                    self._strangers.take(request.client.host if request.client else "")
                    raise Refused(403, "not allowed")
                self._count(participant, received)
                return JSONResponse(await action(participant, content, received))
            except Refused as refused:
                return refused.response()
            except Refusal as too_often:
                return too_often.answer()
            except Exception as error:  # a log that cannot be written, too: nothing about it is for a participant's eyes
                _report(request.url.path, error)
                return Refused(503, FAILED, retry_after=5).response()

        return answer

    def _count(self, participant: Participant, now: float) -> None:
        """Refuse more than so many requests of one token in any minute."""
        recent, most = self._recent[participant.name], self.allocation.conduct.per_minute
        while recent and now - recent[0] >= 60:
            recent.popleft()
        if len(recent) >= most:
            raise Refused(429, f"at most {most} messages a minute", retry_after=math.ceil(60 - (now - recent[0])))
        recent.append(now)

    def _session(self, participant: Participant, content: Mapping[str, Any]) -> str:
        given = content.get("session")
        if given is None:
            return secrets.token_hex(8)
        if not isinstance(given, str) or not SESSION.fullmatch(given):
            raise Refused(400, "session: 1 to 64 letters, digits, - and _")
        return given


def _report(path: str, error: Exception) -> None:
    """Tell whoever runs the trial what failed and where, on the server's standard error unless logging is set up otherwise.

    Only the words of a file's fault are repeated: those of any other may quote what a participant sent.
    """
    words = f": {error}" if isinstance(error, StorageError | OSError) else ""
    logger.error("%s failed with %s%s\n%s", path, type(error).__name__, words, "".join(traceback.format_tb(error.__traceback__)))


def _object(body: bytes) -> dict[str, Any]:
    try:
        content = json.loads(body)
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        raise Refused(400, "expected a JSON object with token and message")
    return content


def _asked(content: Mapping[str, Any], longest: int) -> tuple[Message, list[Message] | None]:
    """The new message, and the conversation before it where the client sent it."""
    if ("message" in content) == ("messages" in content):
        raise Refused(400, "give either message or messages")
    unknown = set(content) - {"token", "session", "message", "messages"}
    if unknown:
        raise Refused(400, "there is token, session, message and messages; nothing else is read")
    if "message" in content:
        return _message(content["message"], longest), None
    given = content["messages"]
    if not isinstance(given, list) or not given or not all(isinstance(one, dict) and set(one) == {"role", "content"} for one in given):
        raise Refused(400, "messages: a list of objects with role and content")
    if given[-1]["role"] != "user":
        raise Refused(400, "messages: the last one is the user's")
    return _message(given[-1]["content"], longest), given[:-1]


def _message(text: Any, longest: int) -> Message:
    if not isinstance(text, str) or not text.strip() or len(text) > longest:
        raise Refused(400, f"a message is a text of 1 to {longest} characters")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise Refused(400, "a message is Unicode text without lone surrogates") from error
    return {"role": "user", "content": text}


def _check_words(text: str, special: frozenset[str]) -> None:
    """Refuse a message in which the model would read more than words, as the end of the participant's turn and the beginning of another's."""
    found = CONTROL.search(text)
    sign = found.group() if found else next((one for one in special if one in text), None)
    if sign is not None:
        raise Refused(400, f"the message contains {sign}, which the model does not read as text; leave it out or write it in another way")


def _as_words(turn: Message, special: frozenset[str]) -> Message:
    """A turn of a conversation as the model is shown it again: a sign that it spelled itself is parted by a space, lest it bound a turn now."""
    words = turn["content"]
    while found := CONTROL.search(words):  # one at a time: a sign may hold another
        words = words[: found.start() + 1] + " " + words[found.start() + 1 :]
    for one in sorted(special, key=len, reverse=True):
        while one in words and one not in _parted(one):  # a sign of one character has no middle
            words = words.replace(one, _parted(one))
    return {**turn, "content": words}


def _parted(sign: str) -> str:
    return f"{sign[:1]} {sign[1:]}"


def _moment(timestamp: float) -> str:
    return datetime.fromtimestamp(timestamp, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


# --- who replies ----------------------------------------------------------------------------------------------------------


class EngineSpeaker:
    """The embedded engine of the same process."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.model, tokenizer = engine, engine.name, engine.model.tokenizer
        added = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
        self.special = frozenset(token for token in (*tokenizer.all_special_tokens, *added) if token.strip())

    async def reply(self, ask: Ask) -> AsyncIterator[Said]:
        from relseek_resources.serving.engine import Request as Asked
        from relseek_resources.serving.engine import TooLong

        wanted = requests.canonical(requests.read(list(ask.steering), self.engine.vectors))
        prompt = await asyncio.to_thread(self.engine.prompt, list(ask.messages))
        conduct = ask.conduct
        try:
            [ticket] = self.engine.submit([Asked(prompt, conduct.max_tokens, wanted, conduct.temperature, conduct.top_p, ask.seed)])
        except TooLong as error:
            raise Full(str(error)) from error
        async for piece in ticket:
            yield Said(piece.text, piece.finished or None)


class ServerSpeaker:
    """Another server of OpenAI's protocol that steers: vLLM with the plugin, or `relseek serve`."""

    # How they say that a prompt leaves no room: the one in OpenAI's code, vLLM in the parameter that it blames.
    NO_ROOM = ("context_length_exceeded", "input_tokens", "input_text", "max_tokens")
    special: frozenset[str] = frozenset()

    def __init__(self, client: Any, model: str) -> None:
        """`client`: an `openai.AsyncOpenAI`."""
        self.client, self.model = client, model

    async def reply(self, ask: Ask) -> AsyncIterator[Said]:
        import openai

        try:
            events = await self.client.chat.completions.create(
                model=self.model,
                messages=list(ask.messages),
                temperature=ask.conduct.temperature,
                top_p=ask.conduct.top_p,
                max_tokens=ask.conduct.max_tokens,
                seed=ask.seed,
                stream=True,
                stream_options={"include_usage": True},
                extra_headers={"x-session-id": ask.conversation},
                extra_body={"vllm_xargs": {"relseek": json.dumps(list(ask.steering))}},
            )
        except openai.BadRequestError as error:
            if {error.code, error.param} & set(self.NO_ROOM):
                raise Full(str(error)) from error
            raise
        finish_reason, tokens = None, None
        async with events:
            async for event in events:
                tokens = event.usage.completion_tokens if event.usage else tokens
                if event.choices:
                    finish_reason = event.choices[0].finish_reason or finish_reason
                    yield Said(event.choices[0].delta.content or "", event.choices[0].finish_reason)
        if finish_reason == "length" and tokens is not None and tokens < ask.conduct.max_tokens:  # vLLM gives a reply what room there is
            raise Full(f"the end of the context cut the reply off after {tokens} of {ask.conduct.max_tokens} tokens")


# --- servers ------------------------------------------------------------------------------------------------------------


def engine_routes(engine: Engine, settings: Settings, arms: Path, log: Path) -> list[Route]:
    """The trial's routes beside the embedded engine's own, for `server.create_app`.

    Raises:
        ArmsError: an arms file that this server cannot serve, or a server without a key: its participants could ask for any dose.
        StorageError: a log that cannot be written or resumed.
    """
    if not settings.keys:
        raise ArmsError("a server that runs a trial needs a key, or its participants could read the list of vectors and ask for any dose")
    allocation = read_allocation(arms)
    check_offered(allocation, {"vectors": engine.vectors.described(), "limits": {"multiplier": engine.vectors.limits.dose}}, engine.length)
    return Trial(allocation, EngineSpeaker(engine), TurnLog(log), settings.rate).routes()


def create_app(trial: Trial) -> Starlette:
    """A server of a trial's routes and nothing else, to stand before the one that replies.

    Participants prove who they are by their tokens, whose own rate limit holds; there are no other routes that a key could guard.
    """
    app = Starlette(routes=[*trial.routes(), Route("/health", _health)])
    app.add_middleware(Guard, settings=Settings(keys=(secrets.token_hex(),), rate=0))
    return app


async def _health(_request: Request) -> JSONResponse:
    return JSONResponse({"status": "ok"})
