"""Paired, alternated comparisons and how they are printed.

Here belongs measuring; what is compared belongs in a module of its own.
"""

from __future__ import annotations

import json
import math
import os
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import NormalDist, mean, median, stdev

from scipy.stats import t

LATEST = Path(__file__).parent / "latest.json"


@dataclass(frozen=True)
class Comparison:
    """One figure: `ratio` is other / ours for a duration, so that more is better; its interval comes from the pairs.

    The ratio is to be `target` at least. Where `within` is given, the two are to be equal up to it: the interval includes `target` and lies within
    `target` ± `within`.
    """

    name: str
    ours: float
    other: float
    ratio: float
    lower: float
    upper: float
    pairs: int
    unit: str
    target: float
    machine: str
    within: float | None = None

    @property
    def reached(self) -> bool:
        if self.within is None:
            return self.ratio >= self.target
        return self.target - self.within <= self.lower <= self.target <= self.upper <= self.target + self.within

    def line(self) -> str:
        target = f"{self.target:g}" if self.within is None else f"{self.target:g} ± {self.within:g}"
        digits = 2 if self.within is None else 3
        interval = f"[{self.lower:.{digits}f}, {self.upper:.{digits}f}]"
        return (
            f"{self.name:28} ours {self.ours:.4g} {self.unit}, other {self.other:.4g} {self.unit}, "
            f"ratio {self.ratio:.{digits}f} {interval} over {self.pairs} pairs, target {target}: {'reached' if self.reached else 'missed'}"
        )


def machine() -> str:
    """Processor, cores and system, for beside the numbers."""
    model = platform.processor() or platform.machine()
    information = Path("/proc/cpuinfo")
    if information.is_file():
        names = [line.partition(":")[2].strip() for line in information.read_text().splitlines() if line.startswith("model name")]
        model = names[0] if names else model
    return f"{model}, {os.cpu_count()} cores, {platform.system()} {platform.machine()}"


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def compare(
    name: str,
    ours: Callable[[], object],
    other: Callable[[], object],
    *,
    pairs: int,
    amount: float,
    unit: str,
    target: float,
    within: float | None = None,
    turns: int = 1,
) -> Comparison:
    """Time `ours` and `other` in turn, the order changing from pair to pair, after one warm-up of `ours`.

    `amount` is the work in one call; figures are amount per second, the ratio that of the durations pair by pair. A pair's durations are means over
    `turns` calls of each, in turn too, so that what slows the machine for some seconds slows both.
    """
    ours()
    found: list[tuple[float, float]] = []
    for number in range(pairs):
        fast = slow = 0.0
        for turn in range(turns):
            if (number + turn) % 2:
                slow += seconds(other) / turns
                fast += seconds(ours) / turns
            else:
                fast += seconds(ours) / turns
                slow += seconds(other) / turns
        found.append((fast, slow))
    logs = [math.log(slow / fast) for fast, slow in found]
    half = float(t.ppf(NormalDist().cdf(1.959964), pairs - 1)) * stdev(logs) / math.sqrt(pairs) if pairs > 1 else math.inf
    return Comparison(
        name=name,
        ours=amount / median(fast for fast, _ in found),
        other=amount / median(slow for _, slow in found),
        ratio=math.exp(mean(logs)),
        lower=math.exp(mean(logs) - half),
        upper=math.exp(mean(logs) + half),
        pairs=pairs,
        unit=unit,
        target=target,
        machine=machine(),
        within=within,
    )


def save(comparisons: list[Comparison]) -> None:
    LATEST.write_text(json.dumps([asdict(found) for found in comparisons], indent=1) + "\n")
