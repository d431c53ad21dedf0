"""What a judge charges: a dated table of public prices, and the cost of an answer.

Here belong prices and the arithmetic of a bill. How many tokens a request has is in `counting.py`; whether a study may spend it is for the stage.
"""

from __future__ import annotations

import difflib
import tomllib
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Protocol

TABLE = Path(__file__).with_name("prices.toml")
MILLION = 1_000_000


class PriceError(ValueError):
    """A model whose price nobody has stated; the message says where to state it."""


class Stated(Protocol):
    """A study's own price, in USD for a million tokens: `[judges.price]`."""

    @property
    def prompt(self) -> float: ...

    @property
    def completion(self) -> float: ...


@dataclass(frozen=True)
class Price:
    """USD for a million tokens; `batch_discount` is the share that a batch takes off, `dated` the ISO date of the price list.

    `cached` is the price of prompt tokens that the provider had in its cache, None where it has none.
    """

    prompt: float
    completion: float
    batch_discount: float
    dated: str
    source: str
    cached: float | None = None

    def cost(self, prompt_tokens: int, completion_tokens: int, batch: bool = False, cached_tokens: int = 0) -> float:
        """USD of so many tokens; `cached_tokens` are those of the prompt that usage reports as cached.

        The two discounts are not combined: in a batch all prompt tokens count in full before the batch's share is taken off, so that the figure is
        never below the bill.
        """
        cached = 0 if batch or self.cached is None else min(cached_tokens, prompt_tokens)
        usd = (prompt_tokens - cached) * self.prompt + cached * (self.cached or 0.0) + completion_tokens * self.completion
        return usd * (1 - self.batch_discount if batch else 1) / MILLION


def price_of(model: str, override: Stated | None = None) -> Price:
    """The price of a model: the study's own figures as they stand, for batches too, else the table's.

    Raises:
        PriceError: the model is not in the table by exactly this name, and the study states no price.
    """
    if override is not None:
        return Price(override.prompt, override.completion, 0.0, "", "[judges.price] of the study")
    table = _table()
    if model not in table:
        close = difflib.get_close_matches(model, table, 1)
        raise PriceError(
            f"the price of {model!r} is not in {TABLE.name}" + (f" (that of {close[0]!r} is)" if close else "") + "; set prompt and completion, in "
            "USD for a million tokens, in [judges.price] below the judge (both 0 for an endpoint that charges nothing)"
        )
    entry = table[model]
    return Price(
        entry["prompt"],
        entry["completion"],
        entry["batch_discount"],
        entry["dated"].isoformat(),
        f"prices.toml: {entry['source']}",
        entry.get("cached"),
    )


@cache
def _table() -> dict[str, dict[str, Any]]:
    return tomllib.loads(TABLE.read_text(encoding="utf-8"))
