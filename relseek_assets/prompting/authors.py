"""Who answers: the study's own model, steered or not, or a model behind an endpoint.

Here belongs the way from conversations to replies, and what it will cost. What is asked for belongs in `levels.py`, in which conversations in
`steerability.py` and `attacks.py`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import pandas as pd

from relseek_assets.prompting.tables import REPLIED
from relseek_assets.settings import Author
from relseek_resources.judges import asking
from relseek_resources.judges.answers import Answer, Reading, Request
from relseek_resources.judges.counting import counter_of
from relseek_resources.judges.prices import Price, PriceError, price_of
from relseek_resources.models.sampling import Sampling

if TYPE_CHECKING:
    from relseek_resources.models import SteeredModel

Conversation = list[dict[str, str]]
# A message costs four tokens around its text and the beginning of the reply three (OpenAI's cookbook, "How to count tokens").
MESSAGE_TOKENS, REPLY_TOKENS = 4, 3
ENOUGH = ("scored", "cut_off")  # a reply that ran into the token limit is a reply, as it is of the study's own model


class AuthorError(ValueError):
    """An author that cannot be asked, or that would cost more than the study allows; the message names the setting to change."""


@dataclass(frozen=True)
class Replied:
    """What came of one conversation. `text` is None where nothing did; tokens and cost are what an endpoint charged for all attempts."""

    text: str | None
    finished: bool | None
    status: str = REPLIED
    model: str | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost_usd: float = 0.0
    attempt: int = 1

    @property
    def columns(self) -> dict[str, Any]:
        paid = ("model", "prompt_tokens", "completion_tokens", "cost_usd", "attempt")
        return {"reply": self.text, "finished": self.finished, "status": self.status, **{name: getattr(self, name) for name in paid}}


class Writer(Protocol):
    """Answers conversations that end on a user turn, one reply each, from each row's own seed; `multipliers` are read by a steered one."""

    def __call__(self, conversations: Sequence[Conversation], seeds: Sequence[int], multipliers: Sequence[float]) -> list[Replied]: ...


@dataclass(frozen=True)
class ModelWriter:
    """The study's own model: with `vector` steered after block `layer` at each row's dose, without it as it is."""

    model: SteeredModel
    sampling: Sampling
    batch_size: int
    vector: np.ndarray | None = None
    layer: int = 0
    on_batch: Callable[[int], None] = lambda rows: None

    def __call__(self, conversations: Sequence[Conversation], seeds: Sequence[int], multipliers: Sequence[float]) -> list[Replied]:
        vector = np.zeros(self.model.width, dtype=np.float32) if self.vector is None else self.vector
        doses = [0.0] * len(multipliers) if self.vector is None else list(multipliers)
        with self.model.steer(vector, self.layer, doses):
            replies = self.model.generate(conversations, self.sampling, seeds=seeds, batch_size=self.batch_size, on_batch=self.on_batch)
        return [Replied(reply.text, reply.finished) for reply in replies]


@dataclass(frozen=True)
class EndpointWriter:
    """A model behind an OpenAI-compatible endpoint. What the journal holds was paid for and is not asked again."""

    author: Author
    sampling: Sampling
    journal: asking.AnswerJournal
    study: str
    paid: Callable[[], float]  # USD, for this study
    on_answer: Callable[[int], None] = lambda rows: None

    def __call__(self, conversations: Sequence[Conversation], seeds: Sequence[int], multipliers: Sequence[float]) -> list[Replied]:
        """
        Raises:
            AuthorError: the endpoint cannot be asked as the study says, or not within the author's budget; answers that came before are kept.
        """
        requests = [request_of(self.author, self.sampling, conversation, seed) for conversation, seed in zip(conversations, seeds, strict=True)]
        spare = self._spare([conversation for conversation, request in zip(conversations, requests, strict=True) if not self._known(request)])
        try:
            answers = self._answers(requests, spare)
        except (asking.EndpointError, PriceError) as error:
            raise AuthorError(f"author {self.author.name!r} of [[prompting.authors]]: {error}") from error
        return [self._replied(answer) for answer in answers]

    def _answers(self, requests: Sequence[Request], spare: float) -> list[Answer]:
        """The answers to requests, in order; asking again may cost `spare` USD."""
        return asking.run(
            requests,
            any_text,
            base_url=self.author.base_url,
            key_variable=self.author.key_variable,
            price=price_of(self.author.model, self.author.price),
            attempts=self.author.attempts,
            concurrency=self.author.concurrency,
            enough=ENOUGH,
            spare_usd=spare,
            journal=self.journal,
            on_answer=lambda answer: self.on_answer(1),
        )

    def _known(self, request: Request) -> bool:
        answer = self.journal.answers.get(request.custom_id)
        return answer is not None and asking.finished(answer, self.author.attempts, ENOUGH)

    def _spare(self, conversations: Sequence[Conversation]) -> float:
        """What the author's budget leaves for asking again, in USD; what would cost more than the budget at once is refused."""
        if not conversations:
            return 0.0
        found, before = estimate(self.author, "", [(conversation, 0) for conversation in conversations], self.sampling), self.paid()
        if found["usd"] + before > self.author.budget_usd:
            raise AuthorError(
                f"study {self.study!r}: author {self.author.name!r} was paid ${before:,.2f}, and {found['requests']:,} replies more would cost "
                f"${found['usd']:,.2f}, which is above its budget_usd of ${self.author.budget_usd:,.2f}; they were not sent. Raise budget_usd in "
                "[[prompting.authors]]; what is there is kept"
            )
        return self.author.budget_usd - before - found["usd"]

    def _replied(self, answer: Answer) -> Replied:
        there = answer.status in ENOUGH and answer.raw is not None
        return Replied(
            text=answer.raw if there else None,
            finished=answer.status == "scored" if there else None,
            status=REPLIED if there else answer.status,
            model=answer.model,
            prompt_tokens=answer.prompt_tokens,
            completion_tokens=answer.completion_tokens,
            cost_usd=answer.cost_usd,
            attempt=answer.attempt,
        )


def any_text(custom_id: str, raw: str) -> Reading:
    """Whatever an author writes is its reply, nothing included: only an answer that is none is asked for again."""
    return Reading("scored")


def request_of(author: Author, sampling: Sampling, conversation: Conversation, seed: int) -> Request:
    """The request for one reply; its name is made of author, seed and content, so that the same question is the same request."""
    drawn = {"temperature": sampling.temperature, "top_p": sampling.top_p}
    body = {
        "model": author.model,
        "messages": conversation,
        **({} if author.default_sampling else drawn),
        author.token_limit: sampling.max_new_tokens,
        **({} if author.default_sampling else {"seed": seed % 2**31}),  # some servers read it as a 32-bit number
    }
    text = json.dumps(body)
    digest = hashlib.sha256("\x1f".join([author.name, str(seed), text]).encode()).hexdigest()
    return Request(f"r{digest[:31]}", text)


# --- what it will cost ----------------------------------------------------------------------------------------------------


def prompt_tokens(model: str, conversation: Conversation, before: int = 0) -> tuple[int, str]:
    """Tokens of a conversation as a prompt, with `before` for replies that are not written yet, and how they were counted."""
    counter = counter_of(model)
    return sum(counter.count(message["content"]) + MESSAGE_TOKENS for message in conversation) + REPLY_TOKENS + before, counter.how


def estimate(author: Author, experiment: str, conversations: Sequence[tuple[Conversation, int]], sampling: Sampling) -> dict[str, Any]:
    """A row of PROMPTING_ESTIMATES: what asking every conversation once will cost at most; nothing for the study's own model.

    Args:
        conversations: each with the number of assistant replies that it will hold by then, which count as long as replies may be.

    Raises:
        AuthorError: nobody has stated the price of the author's model.
    """
    price = Price(0, 0, 0, "", "the study's own model")
    counted, total = "not charged", 0
    if author.kind == "openai":
        try:
            price = price_of(author.model, author.price)
        except PriceError as error:
            raise AuthorError(f"author {author.name!r} of [[prompting.authors]]: {error}") from error
        for conversation, replies in conversations:
            tokens, counted = prompt_tokens(author.model, conversation, replies * (sampling.max_new_tokens + MESSAGE_TOKENS))
            total += tokens
    written = len(conversations) * sampling.max_new_tokens
    return {
        "author": author.name,
        "experiment": experiment,
        "requests": len(conversations),
        "prompt_tokens": total,
        "completion_tokens": written if author.kind == "openai" else 0,
        "usd": price.cost(total, written),
        "counted": counted,
        "dated": price.dated or None,
        "price_source": price.source,
    }


def refuse(author: Author, estimates: pd.DataFrame, study: str) -> None:
    """Let an author pass whose two experiments together cost no more than its budget.

    Raises:
        AuthorError: naming the study, the author, both figures and what to change. Nothing has been sent.
    """
    usd = float(estimates["usd"].sum())
    if author.kind != "openai" or usd <= author.budget_usd:
        return
    tokens = int(estimates["prompt_tokens"].sum())
    raise AuthorError(
        f"study {study!r}: author {author.name!r} would cost ${usd:,.2f} for {int(estimates['requests'].sum()):,} requests of {tokens:,} prompt "
        f"tokens ({estimates['counted'].iloc[0]}), which is above its budget_usd of ${author.budget_usd:,.2f}; nothing was sent. Raise budget_usd in "
        "[[prompting.authors]], or ask less: fewer prompts.count, themes, attacked levels or examples, or a cheaper model"
    )
