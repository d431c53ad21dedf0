"""Scores of several judges are never taken for one curve."""

from __future__ import annotations

import pandas as pd
import pytest

from relseek_assets.judging.one_judge import of_one_judge
from relseek_resources.judges import embedded


def scores(*rated: tuple[str, str, float]) -> pd.DataFrame:
    """A row each (rubric, judge, dose)."""
    return pd.DataFrame(
        [{"site": "m:L1", "epoch": 1, "rubric": rubric, "judge": judge, "multiplier": dose, "score": 5.0} for rubric, judge, dose in rated]
    )


def test_the_judge_of_every_dose_counts_and_one_of_some_doses_does_not() -> None:
    found, fault = of_one_judge(
        scores(("warmth", "a", -1.0), ("warmth", "a", 1.0), ("warmth", "b", 1.0), ("coherence", "c", -1.0), ("coherence", "c", 1.0))
    )
    assert fault == ""
    assert found.groupby("rubric")["judge"].unique().map(list).to_dict() == {"warmth": ["a"], "coherence": ["c"]}
    assert len(found) == 4


def test_of_several_judges_of_every_dose_the_embedded_one_counts() -> None:
    rated = [("warmth", judge, dose) for judge in ("people", embedded.NAME) for dose in (-1.0, 1.0)]
    found, fault = of_one_judge(scores(*rated))
    assert fault == "" and list(found["judge"]) == [embedded.NAME] * 2
    found, fault = of_one_judge(scores(*rated[:3]))
    assert fault == "" and list(found["judge"]) == ["people"] * 2, "who rated every dose, where the embedded one did not"


@pytest.mark.parametrize(
    ("rated", "said"),
    [
        ([("warmth", "a", -1.0), ("warmth", "b", 1.0)], "no judge has rated warmth at every dose (a at -1; b at 1)"),
        (
            [("warmth", judge, dose) for judge in "ab" for dose in (-1.0, 1.0)],
            "several judges have rated warmth at every dose (a at -1, 1; b at -1, 1)",
        ),
    ],
)
def test_without_exactly_one_such_judge_nothing_counts_and_the_judges_are_named(rated: list[tuple[str, str, float]], said: str) -> None:
    found, fault = of_one_judge(scores(("coherence", "c", 1.0), *rated))
    assert found.empty and fault == f"{said}; import the scores of one judge for all of them"


def test_without_scores_there_is_nothing_wrong() -> None:
    found, fault = of_one_judge(scores(("warmth", "a", 1.0)).iloc[:0])
    assert found.empty and fault == ""
