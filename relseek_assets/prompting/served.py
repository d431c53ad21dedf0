"""The steered model's replies from a server that steers: `relseek serve`, or vLLM with the plugin, instead of a model loaded here.

Here belongs what such a request says beside an author's, and that the server has the study's vector. Asking, the journal and budgets are those of
`authors.py`; what the server makes of a request is in `relseek_resources.serving`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from relseek_assets.prompting.authors import AuthorError, Conversation, EndpointWriter, Replied
from relseek_assets.prompting.tables import STEERED
from relseek_assets.settings import Author, Price, SteeredEndpoint
from relseek_resources.judges import asking
from relseek_resources.judges.answers import Request
from relseek_resources.models.sampling import Sampling

SETTING = "[prompting.steered_endpoint]"
REFUSED = "intervention 1:"  # how servers begin what is wrong with the one intervention of a request
FREE = Price(prompt=0.0, completion=0.0)


@dataclass(frozen=True)
class ServedVector:
    """A vector by its name on the server, the SHA-256 of its file, and the block after which it works."""

    name: str
    sha256: str
    layer: int


def author_of(endpoint: SteeredEndpoint) -> Author:
    """The server as an author, by the name that the study keeps for the steered model."""
    fields = endpoint.model_dump(include={"model", "base_url", "key_variable", "attempts", "concurrency", "budget_usd"})
    return Author.model_construct(name=STEERED, kind="openai", price=endpoint.price or FREE, **fields)


@dataclass(frozen=True, kw_only=True)
class ServedWriter(EndpointWriter):
    """The steered model behind a server: every request names its dose, 0 included, and the SHA-256 of the vector that it is a dose of."""

    vector: ServedVector

    def __call__(self, conversations: Sequence[Conversation], seeds: Sequence[int], multipliers: Sequence[float]) -> list[Replied]:
        """
        Raises:
            AuthorError: the server cannot be asked, has not this vector or not these doses, or would cost too much; answers that came before are
                kept.
        """
        rows = list(zip(conversations, seeds, multipliers, strict=True))
        requests = [steered_request(self.author, self.sampling, self.vector, *row) for row in rows]
        new = [row for row, request in zip(rows, requests, strict=True) if not self._known(request)]
        try:
            spare = self._spare([conversation for conversation, _, _ in new])
            if new:
                check_offer(self.author, self.vector, max(abs(dose) for _, _, dose in new))
            answers = self._answers(requests, spare)
        except (asking.EndpointError, AuthorError) as error:
            said = str(error).replace("[[judges]]", SETTING).replace("[[prompting.authors]]", SETTING)
            raise AuthorError(said if SETTING in said else f"{SETTING}: {said}") from error
        refused = [answer.error for answer in answers if answer.status == "failed" and REFUSED in (answer.error or "")]
        if refused:
            raise AuthorError(
                f"{SETTING}: the server refused to steer {len(refused)} of {len(answers)} replies: {refused[0]}. {_remedy(self.vector)}"
            )
        return [self._replied(answer) for answer in answers]


def steered_request(author: Author, sampling: Sampling, vector: ServedVector, conversation: Conversation, seed: int, multiplier: float) -> Request:
    """The request for one steered reply, named by its content as an author's is."""
    asked = {"vector": vector.name, "sha256": vector.sha256, "layers": [vector.layer], "multiplier": multiplier}
    body: dict[str, Any] = {
        "model": author.model,
        "messages": conversation,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "max_tokens": sampling.max_new_tokens,
        "seed": seed,
        "extra_body": {"vllm_xargs": {"relseek": json.dumps([asked])}},  # the official client sends what it does not know from here alone
    }
    text = json.dumps(body)
    digest = hashlib.sha256("\x1f".join([STEERED, text]).encode()).hexdigest()
    return Request(f"r{digest[:31]}", text)


def check_offer(author: Author, vector: ServedVector, most: float) -> None:
    """Let a server pass that offers this very vector, and doses up to `most` either way. One that does not steer at all might answer unsteered.

    Raises:
        AuthorError: saying what the server offers.
        EndpointError: no key is set.
    """
    import openai

    with asking.client_of(author.base_url, author.key_variable) as client:
        try:
            said: Any = client.get("/relseek/vectors", cast_to=object)
        except openai.APIStatusError as error:
            raise AuthorError(
                f"{SETTING}: {author.base_url}/relseek/vectors answered {error.status_code}. Correct base_url, which ends on /v1, or the key in "
                f"{author.key_variable}; the server is one of `relseek serve`, or vLLM with the plugin"
            ) from error
        except openai.APIConnectionError as error:
            raise AuthorError(f"{SETTING}: {author.base_url} does not answer ({error}). Start the server, or correct base_url") from error
    try:
        there, limit = {one["name"]: one["sha256"] for one in said["vectors"]}, float(said["limits"]["multiplier"])
    except (TypeError, KeyError, ValueError) as error:
        raise AuthorError(f"{SETTING}: {author.base_url}/relseek/vectors says nothing of vectors; the server does not steer") from error
    if vector.name not in there:
        raise AuthorError(f"{SETTING}: {author.base_url} offers no vector {vector.name!r}; there is {', '.join(there) or 'none'}. {_remedy(vector)}")
    if there[vector.name] != vector.sha256:
        raise AuthorError(
            f"{SETTING}: what {author.base_url} offers as {vector.name!r} is another vector: its sha256 is {there[vector.name]}, the study's is "
            f"{vector.sha256}. {_remedy(vector)}"
        )
    if most > limit:
        raise AuthorError(f"{SETTING}: {author.base_url} steers by {limit:g} at most, and a dose of {most:g} is asked for; raise its dose_limit")


def _remedy(vector: ServedVector) -> str:
    return (
        "Serve the vector as the study has it now (`relseek serve STUDY --site SITE --epoch N`), or correct vector, the server's name of it, "
        f"which is {vector.name!r}"
    )
