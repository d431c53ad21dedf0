"""What is asked of a language judge and what comes back, whoever carries it: the shared rows of every way of asking.

Here belong requests, answers and the reading of an answer as a score or a choice. Building prompts belongs to the stage, sending to `asking.py`
and `batches.py`.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

Status = Literal[
    "scored",  # the answer is a score on the scale, or A or B
    "unreadable",  # there is an answer, and it is no score
    "out_of_range",  # a number outside the scale
    "refused",  # the model declined, or a content filter cut it off
    "cut_off",  # the answer ran into the token limit before it was whole
    "failed",  # the request failed; `error` says how
    "expired",  # the batch ended before the request was answered
    "cancelled",  # the batch was cancelled before the request was answered
    "missing",  # the batch ended and says nothing of the request
]
STATUSES: tuple[str, ...] = (
    "scored",
    "unreadable",
    "out_of_range",
    "refused",
    "cut_off",
    "failed",
    "expired",
    "cancelled",
    "missing",
)


NUMBER = re.compile(r"[+-]?\d{1,300}(\.\d*)?", re.ASCII)


@dataclass(frozen=True)
class Request:
    """One question: `body` is the chat completion's, as JSON text; `custom_id` names it for good, because it is made from its content.

    `usd` is what asking it once costs at most, for whoever keeps to a budget.
    """

    custom_id: str
    body: str
    usd: float = 0.0


@dataclass(frozen=True)
class Answer:
    """One row for one attempt at one request. `raw` is the text that came back, None where none did; tokens and cost are what was charged."""

    custom_id: str
    status: str
    raw: str | None = None
    model: str | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost_usd: float = 0.0
    attempt: int = 1
    batch: str | None = None
    error: str | None = None


@dataclass(frozen=True)
class Reading:
    """What an answer says: a number for a rating, `A` or `B` for a comparison, or neither, with the status that says why."""

    status: str
    score: float | None = None
    choice: str | None = None


def read_score(raw: str | None, low: float = 1.0, high: float = 10.0) -> Reading:
    """A rating from the text of an answer: `{"score": 7}`, as the schema asks, or a bare number; nothing is searched for inside prose.

    Booleans, NaN and infinities are no scores. A number outside [low, high] has a status of its own and no score.
    """
    value = _field(raw, "score")
    if isinstance(value, str):
        if not NUMBER.fullmatch(value.strip()):  # `float` would take 1_0 and infinity
            return Reading("unreadable")
        value = float(value)
    if isinstance(value, bool) or not isinstance(value, int | float) or not -math.inf < value < math.inf:
        return Reading("unreadable")
    return Reading("scored", score=float(value)) if low <= value <= high else Reading("out_of_range")


def read_choice(raw: str | None) -> Reading:
    """A comparison from the text of an answer: `{"answer": "A"}` or the bare letter, spaces aside; anything else wins for nobody."""
    value = _field(raw, "answer")
    if isinstance(value, str) and value.strip() in ("A", "B"):
        return Reading("scored", choice=value.strip())
    return Reading("unreadable")


@dataclass(frozen=True)
class Completion:
    """What a chat completion says: `answered`, `refused`, `cut_off` by the token limit, or `unreadable` where it holds no text."""

    outcome: Literal["answered", "refused", "cut_off", "unreadable"]
    text: str | None
    model: str | None
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    error: str | None


def read_completion(body: Mapping[str, Any]) -> Completion:
    """The first choice of a chat completion, whatever it holds. A refusal comes before the text; what was cut off or refused keeps its words."""
    try:
        choice = body["choices"][0]
        message, reason = choice["message"], choice.get("finish_reason")
        text, refusal = message.get("content"), message.get("refusal")
    except (LookupError, TypeError, AttributeError):
        reason = text = refusal = None
    usage, error = body.get("usage"), None
    if not isinstance(usage, dict):
        usage, error = {}, "the endpoint reports no usage: tokens and cost are not counted"
    details = usage.get("prompt_tokens_details")
    outcome: Literal["answered", "refused", "cut_off", "unreadable"] = "answered"
    if refusal or reason == "content_filter":
        outcome, text = "refused", text or refusal
    elif reason == "length":
        outcome = "cut_off"
    elif not isinstance(text, str):
        outcome, error = "unreadable", "the answer holds no text"
    model = body.get("model")
    return Completion(
        outcome,
        storable(text) if isinstance(text, str) else None,
        storable(model) if isinstance(model, str) else None,
        _count(usage.get("prompt_tokens")),
        _count(usage.get("completion_tokens")),
        _count(details.get("cached_tokens")) if isinstance(details, dict) else 0,
        error,
    )


def _count(value: Any) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**53 else 0


def storable(text: str) -> str:
    """The text without lone surrogates, which JSON can carry and no file can hold."""
    if text.isascii():
        return text
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode(errors="replace").decode()
    return text


def status_of(custom_id: str, raw: str, accept: Callable[[str, str], Reading], *, cut_off: bool) -> str:
    """The status of an answer's text. One that ran into the token limit counts only as a whole JSON object: a bare `1` may be the half of a `10`."""
    return "cut_off" if cut_off and not _whole(raw) else accept(custom_id, raw).status


def _whole(raw: str) -> bool:
    try:
        return isinstance(json.loads(raw), dict)
    except (ValueError, RecursionError):
        return False


def _field(raw: str | None, name: str) -> Any:
    """The field of a JSON object, or the whole text where it is no object."""
    if raw is None:
        return None
    try:
        content = json.loads(raw)
    except (ValueError, RecursionError):
        return raw.strip()
    return content.get(name) if isinstance(content, dict) else content
