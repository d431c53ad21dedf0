"""When a measurement has reached its target."""

from __future__ import annotations

import time

import pytest

from tests.performance.comparison import Comparison, compare


def found(ratio: float, lower: float, upper: float, target: float, within: float | None = None) -> Comparison:
    return Comparison("one", 1.0, 1.0, ratio, lower, upper, 30, "s", target, "here", within)


@pytest.mark.parametrize(("ratio", "reached"), [(5.0, True), (7.0, True), (4.99, False)])
def test_what_should_be_faster_is_judged_by_its_ratio(ratio: float, reached: bool) -> None:
    one = found(ratio, ratio - 1, ratio + 1, target=5.0)
    assert one.reached == reached
    assert one.line().endswith(f"target 5: {'reached' if reached else 'missed'}")


@pytest.mark.parametrize(
    ("lower", "upper", "reached"),
    [
        (0.99, 1.01, True),
        (0.975, 1.029, True),
        (0.98, 0.99, False),  # dearer, however little
        (1.01, 1.02, False),
        (0.96, 1.01, False),  # too wide to say
        (0.99, 1.04, False),
        (1.2, 1.3, False),
    ],
)
def test_what_should_cost_nothing_has_an_interval_around_one_and_near_it(lower: float, upper: float, reached: bool) -> None:
    one = found((lower + upper) / 2, lower, upper, target=1.0, within=0.03)
    assert one.reached == reached
    assert one.line().endswith(f"target 1 ± 0.03: {'reached' if reached else 'missed'}")


def test_a_comparison_keeps_its_criterion() -> None:
    one = compare("sleep", lambda: time.sleep(0.001), lambda: time.sleep(0.003), pairs=3, amount=1, unit="calls/s", target=1.0, within=0.03)
    assert one.ratio > 1.5 and one.within == 0.03 and not one.reached
    assert compare("sleep", lambda: time.sleep(0.001), lambda: time.sleep(0.003), pairs=3, amount=1, unit="calls/s", target=1.5).reached
