"""The embedded judge of the shipped behaviour, fitted once a session on its training conversations."""

from __future__ import annotations

from typing import Any

import pandas as pd
import pytest

from relseek_assets.behaviour import GradedReply, read_conversations, read_graded_replies
from relseek_assets.dataset.pairs import preference_pairs
from relseek_assets.judging.assets import distinct
from relseek_assets.study import BEHAVIOURS
from relseek_resources.judges import embedded

FOLDER = BEHAVIOURS / "relationship_seeking"


@pytest.fixture(scope="session")
def pairs() -> pd.DataFrame:
    return preference_pairs(read_conversations(FOLDER / "conversations.jsonl"), heldout_share=0.2, seed=11)


@pytest.fixture(scope="session")
def graded() -> list[GradedReply]:
    return read_graded_replies(FOLDER / "few_shots.jsonl")


@pytest.fixture(scope="session")
def fitted(pairs: pd.DataFrame, graded: list[GradedReply]) -> Any:
    """The `Fit` of the embedded judge, about 15 s."""
    train = distinct(pairs, "train")
    return embedded.fit(
        list(train["chosen"]), list(train["rejected"]), list(train["conversation"]), [row.reply for row in graded], [row.score for row in graded]
    )
