"""What judges say of prompted and attacked replies: the embedded judges, and language judges that are asked at once.

Here belong rows of scores and comparisons. Language judges get the very requests of the judging stage (`judging/requests.py`); fitting the embedded
ones belongs there too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from relseek_assets.behaviour import GradedReply, Rubric
from relseek_assets.judging.requests import PAIRWISE, Comparison, pairwise_requests, rating_requests, requests_of
from relseek_assets.prompting.tables import STEERED
from relseek_assets.settings import LanguageJudge
from relseek_resources.judges import asking
from relseek_resources.judges.answers import Answer, Reading, read_choice, read_score
from relseek_resources.judges.prices import price_of

if TYPE_CHECKING:
    from relseek_resources.models import SteeredModel

UNPAID: dict[str, Any] = {"raw": None, "model": None, "prompt_tokens": 0, "completion_tokens": 0, "cost_usd": 0.0, "attempt": 1, "source": "judged"}
AUTHORED = 1.0  # the author's reply in a request for a comparison, where a sweep has a dose
OF_STEERED = 0.0


def unsaid(replies: pd.DataFrame) -> pd.Series:
    """Why a row has nothing to rate: `no_reply`, `empty_reply`, or nothing."""
    texts = replies["reply"]
    blank = texts.fillna("").str.strip() == ""
    return pd.Series(np.where(texts.isna(), "no_reply", np.where(blank, "empty_reply", "")), index=replies.index)


def embedded_scores(replies: pd.DataFrame, keys: Sequence[str], judge: str, scores: np.ndarray) -> pd.DataFrame:
    """Score rows of an embedded judge; `keys` are the columns of `replies` that are kept."""
    why = unsaid(replies)
    return replies[list(keys)].assign(
        judge=judge, score=pd.Series(scores, index=replies.index).where(why == ""), status=why.where(why != "", "scored"), **UNPAID
    )


def perplexities(
    model: SteeredModel, conversations: Sequence[Sequence[dict[str, str]]], replies: pd.DataFrame, on_batch: Callable[[int], None]
) -> np.ndarray:
    """Perplexity of each reply under the unsteered model given its conversation, infinite for one without tokens, shape (rows,).

    The conversation has the study's plain system prompt whatever the author was told, so that authors are measured alike; the end of a reply that
    ended by itself counts, as it does in `generation_metrics`.
    """
    prompts = [model.prompt_tokens(conversation) for conversation in conversations]
    tokens = [
        model.reply_tokens(text, end=pd.notna(finished) and bool(finished)) if isinstance(text, str) and text else []
        for text, finished in zip(replies["reply"], replies["finished"], strict=True)
    ]
    found = np.full(len(replies), math.inf)
    there = [row for row, ids in enumerate(tokens) if ids]
    for row, value in zip(there, model.score_tokens([prompts[row] for row in there], [tokens[row] for row in there], on_batch=on_batch), strict=True):
        found[row] = math.exp(-value.mean)
    return found


# --- language judges --------------------------------------------------------------------------------------------------


def ratings_asked(
    replies: pd.DataFrame,
    labels: Sequence[str],
    prompts: Sequence[Sequence[dict[str, str]]],
    rubrics: Mapping[str, tuple[Rubric, Sequence[GradedReply]]],
    judge: LanguageJudge,
    seed: int,
) -> pd.DataFrame:
    """The requests of one judge for every reply that is there, a REQUESTS table whose `site`, `epoch` and `item` are author, level and label.

    Args:
        replies: columns author, level, multiplier and reply.
        labels: what tells the replies of an author and level apart.
        prompts: the messages before each reply.
        rubrics: name -> rubric and its graded replies.
    """
    frame = _presented(replies, labels, prompts)
    parts = [rating_requests(frame, rubric, graded, judge, seed) for name, (rubric, graded) in rubrics.items() if name in (judge.rubrics or (name,))]
    return pd.concat(parts, ignore_index=True) if parts else rating_requests(frame.head(0), *next(iter(rubrics.values())), judge, seed)


def comparisons_asked(
    steered: pd.DataFrame, replies: pd.DataFrame, definition: Comparison, graded: Sequence[GradedReply], judge: LanguageJudge, seed: int
) -> pd.DataFrame:
    """The requests of one judge for every level and item of which both replies are there: `a` is the steered reply and `b` the author's.

    Args:
        steered: columns level, item, prompt and reply.
        replies: a table of PROMPTED_GENERATIONS.
    """
    theirs = _presented(replies, list(replies["item"]), list(replies["prompt"])).assign(multiplier=AUTHORED)
    of_both = replies[["author", "level", "item"]].merge(steered, on=["level", "item"])
    ours = _presented(of_both.assign(multiplier=OF_STEERED), list(of_both["item"]), list(of_both["prompt"]))
    return pairwise_requests(pd.concat([ours, theirs], ignore_index=True), definition, graded, (OF_STEERED, AUTHORED), judge, seed)


def _presented(replies: pd.DataFrame, labels: Sequence[str], prompts: Sequence[Sequence[dict[str, str]]]) -> pd.DataFrame:
    frame = pd.DataFrame(
        {
            "site": list(replies["author"]),
            "epoch": list(replies["level"]),
            "multiplier": list(replies["multiplier"]),
            "item": list(labels),
            "prompt": list(prompts),
            "reply": list(replies["reply"]),
        }
    )
    return frame[frame["reply"].notna()]


def ask(
    requests: pd.DataFrame,
    judge: LanguageJudge,
    rubrics: Mapping[str, Rubric],
    journal: Path,
    spare_usd: float,
    on_answer: Callable[[Answer], None],
) -> dict[str, Answer]:
    """Ask what the journal does not hold yet; the answer to every request by its custom_id. Asking again may cost `spare_usd`.

    Raises:
        EndpointError: the endpoint cannot be asked as the study says; answers that came before are kept.
    """
    accept = _reader(requests, rubrics)
    with asking.AnswerJournal(journal) as kept:
        answers = asking.run(
            requests_of(requests),
            accept,
            base_url=judge.base_url,
            key_variable=judge.key_variable,
            price=price_of(judge.model, judge.price),
            attempts=judge.attempts,
            concurrency=judge.concurrency,
            spare_usd=spare_usd,
            journal=kept,
            on_answer=on_answer,
        )
    return {answer.custom_id: answer for answer in answers}


def _reader(requests: pd.DataFrame, rubrics: Mapping[str, Rubric]) -> asking.Accept:
    tasks = dict(zip(requests["custom_id"], zip(requests["task"], requests["rubric"], strict=True), strict=True))

    def accept(custom_id: str, raw: str) -> Reading:
        task, name = tasks[custom_id]
        return read_choice(raw) if task == PAIRWISE else read_score(raw, rubrics[name].scale_min, rubrics[name].scale_max)

    return accept


def language_scores(
    replies: pd.DataFrame,
    keys: Sequence[str],
    labels: Sequence[str],
    requests: pd.DataFrame,
    answers: Mapping[str, Answer],
    rubrics: Mapping[str, Rubric],
) -> pd.DataFrame:
    """Score rows of one language judge: one a reply and rubric asked about; `keys` are the columns of `replies` that are kept."""
    accept = _reader(requests, rubrics)
    asked = requests.set_index(["site", "epoch", "item", "rubric"])["custom_id"].to_dict()
    judge = requests["judge"].iloc[0] if len(requests) else ""
    why = unsaid(replies)
    rows = []
    for rubric in requests["rubric"].unique():
        for place, label in enumerate(labels):
            own = replies.iloc[place]
            custom_id = asked.get((own["author"], own["level"], label, rubric))
            kept = {**{name: own[name] for name in keys}, "rubric": rubric, "judge": judge}
            if custom_id is None:
                rows.append({**kept, "score": None, "status": why.iloc[place], **UNPAID})
                continue
            answer = answers[custom_id]
            reading = accept(custom_id, answer.raw) if answer.status == "scored" and answer.raw is not None else Reading(answer.status)
            rows.append({**kept, "score": reading.score, "status": reading.status, **paid(answer)})
    return pd.DataFrame(rows)


def paid(answer: Answer) -> dict[str, Any]:
    """The columns of an answer that UNPAID fills for judges who are not paid."""
    return {name: getattr(answer, name, "judged") for name in UNPAID}


# --- head to head -----------------------------------------------------------------------------------------------------


def embedded_pairs(replies: pd.DataFrame, ours: pd.DataFrame, theirs: pd.DataFrame, judge: str) -> pd.DataFrame:
    """Comparison rows by the embedded judge's unrounded scores; equal scores tie.

    Args:
        replies: a table of PROMPTED_GENERATIONS, whose rows are compared.
        ours, theirs: scores of the steered model and of the author, indexed by (level, item).
    """
    cells = pd.MultiIndex.from_frame(replies[["level", "item"]])
    steered, author = ours.reindex(cells)["score"].to_numpy(float), theirs.reindex(cells)["score"].to_numpy(float)
    unscored = np.isnan(steered) | np.isnan(author)
    status = np.where(unscored, "unscored", np.where(steered == author, "tie", "judged"))
    winner = [None if why != "judged" else "author" if more else STEERED for why, more in zip(status, author > steered, strict=True)]
    return replies[["author", "level", "multiplier", "item"]].assign(judge=judge, first_shown=None, winner=winner, status=status, **UNPAID)


def language_pairs(replies: pd.DataFrame, requests: pd.DataFrame, answers: Mapping[str, Answer], judge: str) -> pd.DataFrame:
    """Comparison rows of one language judge; a row that was not asked, because a reply is empty or not there, is `unscored`."""
    asked = requests.set_index(["epoch", "item"])
    rows = []
    for own in replies[["author", "level", "multiplier", "item"]].to_dict("records"):
        row = {**own, "judge": judge, "first_shown": None, "winner": None, "status": "unscored", **UNPAID}
        if (own["level"], own["item"]) in asked.index:
            request = asked.loc[(own["level"], own["item"])]
            first, second = (STEERED, "author") if request["first_shown"] == "a" else ("author", STEERED)
            answer = answers[request["custom_id"]]
            reading = read_choice(answer.raw) if answer.status == "scored" else Reading(answer.status)
            winner = {"A": first, "B": second, None: None}[reading.choice]
            row |= {"first_shown": first, "winner": winner, "status": "judged" if winner else reading.status, **paid(answer)}
        rows.append(row)
    return pd.DataFrame(rows)
