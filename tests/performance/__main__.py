"""`python -m tests.performance [AREA ...]`: run the measurements and write latest.json beside this file."""

from __future__ import annotations

import sys

from tests.performance import bipo, interventions, judging, lmm, serving, sweep, trials, vllm_serving
from tests.performance.comparison import machine, save

AREAS = {
    "bipo": bipo,
    "sweep": sweep,
    "interventions": interventions,
    "lmm": lmm,
    "trials": trials,
    "judging": judging,
    "serving": serving,
    "vllm": vllm_serving,
}


def main(wanted: list[str]) -> None:
    unknown = sorted(set(wanted) - AREAS.keys())
    if unknown:
        raise SystemExit(f"no measurement {', '.join(unknown)}; there is {', '.join(AREAS)}")
    print(machine())
    found = []
    for name in wanted or AREAS:
        for comparison in AREAS[name].comparisons():
            print(comparison.line(), flush=True)
            found.append(comparison)
    if found:  # what is not installed has nothing to say
        save(found)


if __name__ == "__main__":
    main(sys.argv[1:])
