"""How far the embedded judge agrees with the published language-model judges on replies that it never saw."""

from __future__ import annotations

import os
from typing import Any

import pytest
from scipy.stats import spearmanr

from relseek_resources.release import Release

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif("RELSEEK_RELEASE" not in os.environ, reason="RELSEEK_RELEASE is not set: the published scores are not here"),
]


@pytest.mark.parametrize(
    ("reader", "replies", "fewest"),
    [("rescored_generations", 500, 0.70), ("prompted_generations", 3430, 0.75)],
    ids=["GPT-4.1-mini on steered replies", "GPT-4o on prompted replies"],
)
def test_the_judge_ranks_published_replies_as_the_published_judge_does(fitted: Any, reader: str, replies: int, fewest: float) -> None:
    scored = getattr(Release.from_environment(), reader)()
    assert len(scored) == replies
    assert spearmanr(fitted.judge.scores([row.text for row in scored]), [row.score for row in scored]).statistic >= fewest
