"""Fields of rows that were made elsewhere: what each must be, with a fault that names the file, the line and the field.

Here belong single fields, and the fault of everything that crosses a study's border. What a row means for a study, and where it goes, belongs in
`imports.py`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np


class ExchangeError(ValueError):
    """A file or a request that does not fit the study; the message names the file and the field."""


def require(row: dict[str, Any], names: Sequence[str], where: str) -> None:
    missing = [name for name in names if row.get(name) is None]
    if missing:
        raise ExchangeError(f"{where}: {', '.join(missing)} is missing; add it")


def maybe(row: dict[str, Any], name: str, where: str, read: Callable[[dict[str, Any], str, str], Any]) -> Any:
    """A field that may be absent, or null."""
    return None if row.get(name) is None else read(row, name, where)


def text(row: dict[str, Any], name: str, where: str) -> str:
    if not writable(row[name]):
        raise ExchangeError(f"{where}: {name} must be text, found {row[name]!r:.60}")
    return str(row[name])


def writable(value: Any) -> bool:
    """Whether a value is text that UTF-8 can hold; JSON may spell half a character."""
    try:
        return isinstance(value, str) and value.encode() is not None
    except UnicodeEncodeError:
        return False


def flag(row: dict[str, Any], name: str, where: str) -> bool:
    if not isinstance(row[name], bool):
        raise ExchangeError(f"{where}: {name} must be true or false, found {row[name]!r:.60}")
    return bool(row[name])


def number(row: dict[str, Any], name: str, where: str) -> float:
    value = row[name]
    try:
        found = float("" if isinstance(value, bool) else value)
    except (TypeError, ValueError, OverflowError) as error:
        raise ExchangeError(f"{where}: {name} {value!r:.60} is no number") from error
    if not np.isfinite(found):
        raise ExchangeError(f"{where}: {name} must be finite")
    return found


def whole(row: dict[str, Any], name: str, where: str) -> int:
    """A whole number, which `3.0` is; to the last digit where it is written without a point."""
    value = row[name]
    if isinstance(value, str) and re.fullmatch(r"\s*[+-]?\d{1,19}\s*", value, re.ASCII):
        value = int(value)
    near = number(row, name, where)
    found = value if isinstance(value, int) else int(near)
    if not near.is_integer() or not -(2**63) <= found < 2**63:
        raise ExchangeError(f"{where}: {name} must be a whole number of at most 64 bits, found {value!r:.60}")
    return found


def count(row: dict[str, Any], name: str, where: str) -> int:
    found = whole(row, name, where)
    if found < 0:
        raise ExchangeError(f"{where}: {name} must be 0 or more, found {found}")
    return found


def usd(row: dict[str, Any], name: str, where: str) -> float:
    found = number(row, name, where)
    if found < 0:
        raise ExchangeError(f"{where}: {name} must be 0 or more, found {found:g}")
    return found


def log_prob(row: dict[str, Any], name: str, where: str) -> float:
    found = number(row, name, where)
    if found > 0:
        raise ExchangeError(f"{where}: {name} is a mean log-probability and at most 0, found {found:g}")
    return found


def token_ids(row: dict[str, Any], where: str) -> list[int] | None:
    ids = row.get("token_ids")
    if ids is not None and not (
        isinstance(ids, list) and all(isinstance(token, int) and not isinstance(token, bool) and token >= 0 for token in ids)
    ):
        raise ExchangeError(f"{where}: token_ids must be a list of token numbers, found {ids!r:.60}")
    return ids


def messages(prompt: Any, where: str) -> list[dict[str, str]]:
    """Messages before a reply as a chat template takes them: a system message if any, then user and assistant in turn, the user last."""
    messages: list[Any] = prompt if isinstance(prompt, list) else [None]
    for number, message in enumerate(messages, 1):
        if not isinstance(message, dict) or message.keys() != {"role", "content"} or not writable(message["content"]):
            raise ExchangeError(f"{where}: prompt must be a list of messages, each with role and content as text; message {number} is none")
    turns = [message["role"] for message in messages]
    turns = turns[1:] if turns[:1] == ["system"] else turns
    if len(turns) % 2 == 0 or turns != ["user", "assistant"] * (len(turns) // 2) + ["user"]:
        raise ExchangeError(f"{where}: prompt must hold a system message if any, then user and assistant in turn, and end on the user's")
    return messages
