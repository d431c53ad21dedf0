"""How much a study asks of its model, in the quickstart's amounts.

A stated time is the quickstart's on two cores; times what is found here it is the study's own, until a run has measured it. Estimates and no more:
what a behaviour holds is counted in lines, and what a line holds is the mean of ours.
"""

from __future__ import annotations

from relseek_assets.behaviour import FILES
from relseek_assets.study import Study

PAIRS = 3.65  # of a conversation
PAIR, PROMPT, REPLY = 360, 150, 110  # tokens, on average, where no limit holds them short


def training(study: Study) -> float:
    """Passes of pairs through a site, by their tokens: 1 for two epochs of 40 pairs, 16 held out, of at most 140 tokens."""
    conversations, heldout = _conversations(study), study.pairs.heldout_share
    pairs = study.pairs.training or PAIRS * (1 - heldout) * conversations
    evaluated = study.pairs.evaluation or PAIRS * heldout * conversations
    epochs = sum(model.epochs_trained for model in study.models) / max(1, len(study.models))
    return epochs * (pairs + 2 * evaluated) * min(study.pairs.max_tokens, PAIR) / (2 * (40 + 2 * 16) * 140)


def replies(study: Study) -> float:
    """Replies of a dose, by their tokens: 1 for twelve of at most 40."""
    return _prompts(study) * min(study.sampling.max_new_tokens, REPLY) / (12 * 40)


def scores(study: Study) -> float:
    """Replies of a dose with their prompts, by their tokens: 1 for twelve of at most 40 after prompts of at most 60 words."""
    prompt = min(2 * study.prompts.max_words or PROMPT, PROMPT)
    return _prompts(study) * (prompt + min(study.sampling.max_new_tokens, REPLY)) / (12 * (120 + 40))


def _prompts(study: Study) -> float:
    return study.prompts.count or study.pairs.heldout_share * _conversations(study)


def _conversations(study: Study) -> int:
    path = study.behaviour_folder / FILES["starter_conversations"]
    return path.read_bytes().count(b"\n") if path.is_file() else 0
