"""Which participant of a trial is in which arm: allocation, tokens and the file that holds both.

Here belong the arms, block randomisation and the file. What participants say belongs in `trial_log.py`, how they say it in `trial_chat.py`.

A participant has a token, a random 256-bit secret. The arms file holds its SHA-256 alone, so that whoever reads the file learns who is in which arm
but can speak for nobody. The tokens are written once, without arms, for whoever hands them out and is to stay blind.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import random
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from relseek_resources.storage import StorageError, keyed_seed

FORM = "relseek arms 1"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.:@+-]{0,99}")
TOKEN_BYTES = 32


class ArmsError(StorageError):
    """An allocation that cannot be made, read or served. The message names the file or setting and what to do."""


@dataclass(frozen=True)
class Arm:
    """What participants of an arm talk to: λ times a vector that the server offers, after the blocks of its file unless others are given.

    `sha256` is of the vector's file: a server that offers another content under the name refuses to start, and every request says it again.
    """

    name: str
    vector: str
    multiplier: float
    sha256: str
    layers: tuple[int, ...] | None = None

    @property
    def logged(self) -> dict[str, Any]:
        """The arm as each turn of the log has it."""
        layers = None if self.layers is None else list(self.layers)
        return {"arm": self.name, "vector": self.vector, "vector_sha256": self.sha256, "layers": layers, "multiplier": self.multiplier}

    @property
    def steering(self) -> list[dict[str, Any]]:
        """The arm as a request asks for it (`requests.read`)."""
        blocks = {} if self.layers is None else {"layers": list(self.layers)}
        return [{"vector": self.vector, "sha256": self.sha256, "multiplier": self.multiplier, **blocks}]


@dataclass(frozen=True)
class Conduct:
    """What is the same for everybody: the system prompt, how replies are drawn, and how much a participant may say."""

    system: str = ""
    temperature: float = 1.0
    top_p: float = 1.0
    max_tokens: int = 300
    longest_message: int = 8_000  # characters
    per_minute: int = 20  # messages of one token


@dataclass(frozen=True)
class Participant:
    name: str
    arm: Arm


@dataclass(frozen=True)
class Allocation:
    """The content of an arms file. `arm_of` has arms by participant, `tokens` participants by the SHA-256 of their token."""

    study: str
    seed: int
    blocks: tuple[int, ...]
    arms: Mapping[str, Arm]
    arm_of: Mapping[str, str]
    tokens: Mapping[str, str]
    conduct: Conduct = Conduct()

    @property
    def digest(self) -> str:
        """SHA-256 of what sets this allocation apart from any other: arms, participants, tokens. Conduct may be mended meanwhile."""
        content = {name: value for name, value in _content(self).items() if name != "conduct"}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def participant(self, token: Any) -> Participant | None:
        """Whoever the token was given to, None for any other."""
        if not isinstance(token, str):
            return None
        name = self.tokens.get(_hashed(token))
        return Participant(name, self.arms[self.arm_of[name]]) if name is not None else None


# --- making -------------------------------------------------------------------------------------------------------------


def randomised(arms: Sequence[str], participants: int, blocks: Sequence[int], seed: int) -> list[str]:
    """The arm of each participant in the order of enrolment, by permuted blocks.

    In every whole block each arm stands equally often; its size is drawn from `blocks`. The last block is cut where the participants end.

    Args:
        blocks: sizes, each a multiple of the number of arms. With several sizes the end of a block cannot be guessed.

    Raises:
        ArmsError: fewer than two arms, one named twice, a size that does not hold each arm equally often.
    """
    if len(arms) < 2 or len(set(arms)) < len(arms):
        raise ArmsError(f"arms {', '.join(arms) or 'none'}: a trial has at least two, each with a name of its own")
    wrong = [size for size in blocks if size < 1 or size % len(arms)]
    if wrong or not blocks:
        raise ArmsError(f"blocks {', '.join(map(str, blocks)) or 'none'}: each size must be a multiple of the {len(arms)} arms")
    if participants < 1:
        raise ArmsError(f"{participants} participants; there must be at least one")
    drawn = random.Random(keyed_seed(seed, "arms"))
    found: list[str] = []
    while len(found) < participants:
        block = list(arms) * (drawn.choice(sorted(set(blocks))) // len(arms))
        drawn.shuffle(block)
        found += block
    return found[:participants]


def allocated(
    study: str, arms: Sequence[Arm], participants: int, blocks: Sequence[int], seed: int, conduct: Conduct | None = None
) -> tuple[Allocation, dict[str, str]]:
    """An allocation, and the token of each participant. The seed decides who is in which arm; tokens are never repeated.

    Raises:
        ArmsError: see `randomised`.
    """
    order = randomised([arm.name for arm in arms], participants, blocks, seed)
    digits = max(3, len(str(participants)))
    names = [f"p{number:0{digits}d}" for number in range(1, participants + 1)]
    tokens = {name: secrets.token_urlsafe(TOKEN_BYTES) for name in names}
    allocation = Allocation(
        study=study,
        seed=seed,
        blocks=tuple(blocks),
        arms={arm.name: arm for arm in arms},
        arm_of=dict(zip(names, order, strict=True)),
        tokens={_hashed(token): name for name, token in tokens.items()},
        conduct=conduct or Conduct(),
    )
    return allocation, tokens


def write_once(allocation: Allocation, tokens: Mapping[str, str], arms_file: Path, tokens_file: Path) -> None:
    """Write the arms file and, as CSV, the tokens by participant. Only their owner may read them.

    Raises:
        ArmsError: a file is there already; nothing is overwritten, for its tokens may have been handed out.
    """
    for file in (arms_file, tokens_file):
        if file.exists():
            raise ArmsError(f"{file}: is there already and is never overwritten, for its tokens may be in use; give another name")
    table = io.StringIO()
    rows = csv.writer(table, lineterminator="\n")
    rows.writerow(["participant", "token"])
    rows.writerows(tokens.items())
    _write_new(tokens_file, table.getvalue())
    _write_new(arms_file, json.dumps(_content(allocation), indent=1, ensure_ascii=False) + "\n")


def _write_new(file: Path, text: str) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with os.fdopen(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
    except OSError as error:
        raise ArmsError(f"{file}: cannot be written ({error.strerror})") from error


def _content(allocation: Allocation) -> dict[str, Any]:
    arms = {
        arm.name: {"vector": arm.vector, "multiplier": arm.multiplier, "sha256": arm.sha256, "layers": arm.layers and list(arm.layers)}
        for arm in allocation.arms.values()
    }
    hashes = {name: digest for digest, name in allocation.tokens.items()}
    participants = {name: {"arm": arm, "token_sha256": hashes[name]} for name, arm in allocation.arm_of.items()}
    return {
        "form": FORM,
        "study": allocation.study,
        "seed": allocation.seed,
        "blocks": list(allocation.blocks),
        "conduct": vars(allocation.conduct),
        "arms": arms,
        "participants": participants,
    }


def _hashed(token: str) -> str:
    return hashlib.sha256(token.encode("utf-8", "surrogatepass")).hexdigest()


# --- reading and checking -----------------------------------------------------------------------------------------------


def read_allocation(file: Path) -> Allocation:
    """An arms file.

    Raises:
        ArmsError: it cannot be read, or is not as `write_once` writes it.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ArmsError(f"{file}: cannot be read ({error.strerror}); `relseek arms make` writes one") from error
    except ValueError as error:
        raise ArmsError(f"{file}: not valid JSON ({error})") from error
    if not isinstance(content, dict) or content.get("form") != FORM:
        raise ArmsError(f"{file}: no arms file of the form {FORM!r}; `relseek arms make` writes one")
    try:
        arms = {name: _arm(name, one) for name, one in content["arms"].items()}
        people = content["participants"]
        found = Allocation(
            study=str(content["study"]),
            seed=int(content["seed"]),
            blocks=tuple(content["blocks"]),
            arms=arms,
            arm_of={name: one["arm"] for name, one in people.items()},
            tokens={one["token_sha256"]: name for name, one in people.items()},
            conduct=Conduct(**content["conduct"]),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ArmsError(f"{file}: not as `relseek arms make` writes it ({type(error).__name__}: {error})") from error
    lost = sorted({arm for arm in found.arm_of.values() if arm not in arms})
    if lost:
        raise ArmsError(f"{file}: participants are in the arm {lost[0]!r}, which it does not describe")
    if len(found.tokens) < len(found.arm_of):
        raise ArmsError(f"{file}: two participants have one token")
    return found


def _arm(name: str, one: Mapping[str, Any]) -> Arm:
    return Arm(name, one["vector"], float(one["multiplier"]), one["sha256"], None if one["layers"] is None else tuple(one["layers"]))


def room(conduct: Conduct, context: int) -> str:
    """How long a conversation can be on a server whose context has so many tokens, in words for whoever runs the trial."""
    return (
        f"a conversation has {context} tokens for system prompt, messages and replies: at most {context // conduct.max_tokens} replies of "
        f"{conduct.max_tokens} tokens, fewer with what is said between them. Then it is full, and its participant is told to begin a new session"
    )


def check_offered(allocation: Allocation, offered: Mapping[str, Any], context: int | None = None) -> None:
    """Refuse a server that could not give every arm what it is due.

    Args:
        offered: what the server's `GET /v1/relseek/vectors` says.
        context: the server's tokens of prompt and reply together, None where it does not say.

    Raises:
        ArmsError: a vector that is not offered, another content under its name, no block to steer after, a dose outside the declared range, a context
            in which no reply fits.
    """
    if context is not None and allocation.conduct.max_tokens >= context:
        raise ArmsError(
            f"replies of {allocation.conduct.max_tokens} tokens do not fit the server's context of {context} with what they answer; start it with "
            "more (--context, vLLM's --max-model-len), or make arms with fewer --max-tokens"
        )
    vectors = {one["name"]: one for one in offered["vectors"]}
    if not vectors:
        raise ArmsError("the server offers no vectors; start it with a relseek configuration, or with `relseek serve`")
    most = offered["limits"]["multiplier"]
    for arm in allocation.arms.values():
        there = vectors.get(arm.vector)
        if there is None:
            raise ArmsError(f"arm {arm.name}: the server offers no vector {arm.vector!r}; there is {', '.join(sorted(vectors)) or 'none'}")
        if there["sha256"] != arm.sha256:
            found, planned = there["sha256"][:16], arm.sha256[:16]
            raise ArmsError(f"arm {arm.name}: the server's vector {arm.vector!r} has the sha256 {found}, the trial was planned with {planned}")
        if arm.layers is None and not there["layers"]:
            raise ArmsError(
                f"arm {arm.name}: neither the arm nor the file of vector {arm.vector!r} names a block; give the server's `default` its `layers`, "
                "then `relseek arms make` takes them"
            )
        if not -most <= arm.multiplier <= most:
            raise ArmsError(f"arm {arm.name}: multiplier {arm.multiplier:g} is outside the server's range of {-most:g} to {most:g}")
