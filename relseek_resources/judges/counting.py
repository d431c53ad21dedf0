"""How many tokens a text is for a judge's model: exactly where a package ships the model's own tables, else a bound that always holds.

Here belongs counting. Nothing is downloaded: a count must come out the same behind a firewall.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

ENCODINGS = {"gpt-4o": "o200k_base", "gpt-4.1": "o200k_base"}  # by the name of the model's family
PACKAGE = "quicktok"
UPPER_BOUND = "upper bound"
BYTES_A_TOKEN = 4.4  # of English prose in o200k_base; measured on the shipped behaviours


@dataclass(frozen=True)
class Counter:
    """`count(text)` tokens; `how` is `exact: o200k_base`, or `upper bound` for one token a byte of UTF-8.

    No byte-level vocabulary can need more tokens than bytes; English prose needs about one for 4.4 bytes, so that the bound is four times too high.
    """

    count: Callable[[str], int]
    how: str


def counter_of(model: str) -> Counter:
    """The counter of a model: exact with the extra `tokens` installed and for a family whose tables it has, else the upper bound."""
    encoding = next((name for family, name in ENCODINGS.items() if model == family or model.startswith(f"{family}-")), None)
    if encoding is None or importlib.util.find_spec(PACKAGE) is None:
        return Counter(lambda text: len(text.encode()), UPPER_BOUND)
    import quicktok

    return Counter(quicktok.get_encoding(encoding).count, f"exact: {encoding}")
