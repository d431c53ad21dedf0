"""What computing partitions costs in dollars, before it is done: what a stage tells the plan and the plan tells people.

Here belongs the answer alone. Prices belong to `relseek_resources/judges/prices.py`, what is asked to the stage that asks.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Bill:
    """`usd` is None where it is not known yet; `lines` are for people, one a judge; `refusal` says why it must not be spent, and is empty else."""

    usd: float | None
    lines: tuple[str, ...] = ()
    refusal: str = ""
