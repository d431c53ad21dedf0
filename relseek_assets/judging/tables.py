"""The tables of the judges, and their plain computations."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from itertools import combinations
from statistics import NormalDist
from typing import Any

import numpy as np
import pandas as pd

from relseek_assets.behaviour import Rubric
from relseek_resources.judges.answers import STATUSES, Answer, Reading, read_choice, read_score
from relseek_resources.storage import Column, TableSchema

KEYS = (
    Column("site", "string", "model and layer"),
    Column("epoch", "integer", "epoch of the vector", low=1),
    Column("multiplier", "number", "dose λ"),
    Column("item", "string", "held-out conversation"),
)
COST = Column("cost_usd", "number", "paid for the judgement; null where a published file does not say", "USD", nullable=True, low=0)
UNANSWERED = STATUSES[1:]  # of a language judge: why its answer is no score and no choice
ANSWERED = (
    Column("raw", "string", "the judge's answer as it came; null where none did", nullable=True),
    Column("model", "string", "the model that answered, as it names itself", nullable=True),
    Column("prompt_tokens", "integer", "charged for the question, all attempts together", "tokens", nullable=True, low=0),
    Column("completion_tokens", "integer", "charged for the answer, all attempts together", "tokens", nullable=True, low=0),
)

JUDGE_SCORES = TableSchema(
    "judge_scores",
    (
        *KEYS,
        Column("rubric", "string", "what is rated: `relationship`, `coherence`, ..."),
        Column("judge", "string", "who rated"),
        Column("score", "number", "1 to 10", nullable=True, low=0, high=10),
        Column("status", "string", "`scored`, or why there is no score", choices=("scored", "empty_reply", *UNANSWERED)),
        COST,
        Column("attempt", "integer", "how often the judge was asked", low=0),
        Column("band", "string", "the rubric's band that holds the score", nullable=True),
        Column("source", "string", "`judged` here, or `imported` from a file"),
    ),
    key=("site", "epoch", "multiplier", "item", "rubric", "judge"),
)

JUDGE_PAIRS = TableSchema(
    "judge_pairs",
    (
        KEYS[0],
        KEYS[1],
        KEYS[3],
        Column("multiplier_a", "number", "the smaller dose"),
        Column("multiplier_b", "number", "the larger dose"),
        Column("first_shown", "string", "which reply the judge saw first; null for a judge that sees no order", nullable=True, choices=("a", "b")),
        Column("judge", "string", "who compared"),
        Column("winner", "string", "the reply with more of the disposition; null where there is none", nullable=True, choices=("a", "b")),
        Column(
            "status",
            "string",
            "`judged`, `tie`, `unscored` where a reply has no score, or why a language judge chose none",
            choices=("judged", "tie", "unscored", *UNANSWERED),
        ),
        COST,
    ),
    key=("site", "epoch", "item", "multiplier_a", "multiplier_b", "judge"),
)

# the same where language judges rate and compare beside the embedded one
LANGUAGE_SCORES = TableSchema("judge_scores", (*JUDGE_SCORES.columns, *ANSWERED), key=JUDGE_SCORES.key)
LANGUAGE_PAIRS = TableSchema(
    "judge_pairs", (*JUDGE_PAIRS.columns, Column("attempt", "integer", "how often the judge was asked", low=0), *ANSWERED), key=JUDGE_PAIRS.key
)

JUDGE_SUBMISSIONS = TableSchema(
    "judge_submissions",
    (
        KEYS[0],
        KEYS[1],
        Column("judge", "string", "who is asked"),
        Column("group", "string", "what `relseek batches` calls it"),
        Column("number", "integer", "of the batch, in the order in which the study's were sent", low=0),
        Column("batch_id", "string", "the provider's name for it; null where it has no room yet", nullable=True),
        Column("requests", "integer", "requests in it", low=1),
        Column("bytes", "integer", "of its request file", "bytes", low=0),
        Column("fingerprint", "string", "sha256 of its request file, by which a lost batch is found again"),
        Column("estimated_usd", "number", "upper estimate made before it was sent", "USD", low=0),
    ),
    key=("group", "number"),
)

JUDGE_ANSWERS = TableSchema(
    "judge_answers",
    (
        Column("custom_id", "string", "the request, in `rating_requests` or `pairwise_requests`"),
        Column("judge", "string", "who was asked"),
        Column("task", "string", "what was asked", choices=("rating", "pairwise")),
        Column("status", "string", "`scored`, or why there is no score and no choice", choices=STATUSES),
        Column("score", "number", "of a rating", nullable=True),
        Column("choice", "string", "of a comparison: the reply called A or the one called B", nullable=True, choices=("A", "B")),
        COST,
        Column("attempt", "integer", "how often the judge was asked", low=0),
        Column("batch", "string", "the batch that brought the answer", nullable=True),
        Column("error", "string", "what the provider said where there is no answer", nullable=True),
        *ANSWERED,
    ),
    key=("custom_id",),
)

JUDGE_QUALITY = TableSchema(
    "judge_quality",
    (
        Column("judge", "string", "the judge and what it was fitted on"),
        Column("metric", "string", "what was measured"),
        Column("against", "string", "the truth that it was measured against"),
        Column("value", "number", "the figure", nullable=True),
        Column("lower", "number", "95% interval: Wilson's of a pair accuracy, a bootstrap's of an AUC, Fisher's of a ρ", nullable=True),
        Column("upper", "number", "95% interval", nullable=True),
        Column("n", "integer", "cases", low=0),
        Column("status", "string", "`measured`, and of how many conversations where the interval is over them; or what was absent"),
    ),
    key=("judge", "metric", "against"),
)

JUDGE_CALIBRATION = TableSchema(
    "judge_calibration",
    (
        Column("low", "number", "lower edge of the bin of predicted probability", low=0, high=1),
        Column("predicted", "number", "mean predicted probability of target", low=0, high=1),
        Column("observed", "number", "share of target replies", low=0, high=1),
        Column("lower", "number", "95% Wilson interval over the conversations", low=0, high=1),
        Column("upper", "number", "95% Wilson interval over the conversations", low=0, high=1),
        Column("n", "integer", "replies in the bin", low=1),
        Column("conversations", "integer", "conversations that they are of", low=1),
    ),
    key=("low",),
)

COHERENCE_CALIBRATION = TableSchema(
    "coherence_calibration",
    (
        Column("model", "string", "under which texts were perplexing"),
        Column("kind", "string", "how the text was damaged"),
        Column("truth", "number", "coherence that the damage leaves, 1 to 10", low=1, high=10),
        Column("mean", "number", "score given", low=1, high=10),
        Column("sd", "number", "of the scores", low=0),
        Column("n", "integer", "texts", low=1),
    ),
    key=("model", "kind"),
)


def score_rows(replies: pd.DataFrame, rubric: Rubric, judge: str, scores: np.ndarray) -> pd.DataFrame:
    """Judge score rows of an embedded judge: an empty reply has a status and no score."""
    empty = replies["reply"].str.strip() == ""
    found = pd.Series(scores, index=replies.index).where(~empty)
    return replies[["site", "epoch", "multiplier", "item"]].assign(
        rubric=rubric.name,
        judge=judge,
        score=found,
        status=np.where(empty, "empty_reply", "scored"),
        cost_usd=0.0,
        attempt=1,
        band=[None if np.isnan(score) else rubric.band_of(score) for score in found],
        source="judged",
    )


def pair_rows(scores: pd.DataFrame, doses: Sequence[float]) -> pd.DataFrame:
    """Every pair of doses of every item, won by the higher unrounded score of one judge on one rubric; equal scores tie."""
    found: list[dict[str, Any]] = []
    for (site, epoch, judge, item), part in scores.groupby(["site", "epoch", "judge", "item"]):
        by_dose = dict(zip(part["multiplier"], part["score"], strict=True))
        for first, second in combinations(sorted(dose for dose in doses if dose in by_dose), 2):
            one, two = by_dose[first], by_dose[second]
            status = "unscored" if np.isnan(one) or np.isnan(two) else "tie" if one == two else "judged"
            found.append(
                {
                    "site": site,
                    "epoch": epoch,
                    "item": item,
                    "multiplier_a": first,
                    "multiplier_b": second,
                    "first_shown": None,
                    "judge": judge,
                    "winner": ("a" if one > two else "b") if status == "judged" else None,
                    "status": status,
                    "cost_usd": 0.0,
                }
            )
    return pd.DataFrame(found, columns=list(JUDGE_PAIRS.names))


# --- language judges --------------------------------------------------------------------------------------------------


def reader(requests: pd.DataFrame, rubrics: Mapping[str, Rubric]) -> Callable[[str, str], Reading]:
    """Reads the answer to one of `requests`, given its custom_id: a rating on the scale of its rubric, or a choice."""
    tasks = dict(zip(requests["custom_id"], zip(requests["task"], requests["rubric"], strict=True), strict=True))

    @lru_cache(maxsize=1000)  # a million answers are mostly a dozen texts
    def read(task: str, name: str, raw: str) -> Reading:
        return read_choice(raw) if task == "pairwise" else read_score(raw, rubrics[name].scale_min, rubrics[name].scale_max)

    def accept(custom_id: str, raw: str) -> Reading:
        return read(*tasks[custom_id], raw)

    return accept


def answer_rows(answers: Iterable[Answer], requests: pd.DataFrame, accept: Callable[[str, str], Reading]) -> pd.DataFrame:
    """Answers with what they say; whatever is not scored has a status and neither score nor choice."""
    asked = dict(zip(requests["custom_id"], zip(requests["judge"], requests["task"], strict=True), strict=True))
    rows = []
    for answer in answers:
        judge, task = asked[answer.custom_id]
        reading = accept(answer.custom_id, answer.raw) if answer.status == "scored" and answer.raw is not None else Reading(answer.status)
        rows.append({**vars(answer), "judge": judge, "task": task, "score": reading.score, "choice": reading.choice})
    return pd.DataFrame(rows, columns=list(JUDGE_ANSWERS.names))


def language_scores(replies: pd.DataFrame, requests: pd.DataFrame, answers: pd.DataFrame, rubrics: Iterable[Rubric]) -> pd.DataFrame:
    """Judge score rows of the language judges at one dose: one a reply, rubric and judge; an empty reply was put to nobody and says so."""
    by_name = {rubric.name: rubric for rubric in rubrics}
    found = _with_answers(requests, answers)
    found["band"] = [None if pd.isna(row.score) else by_name[row.rubric].band_of(row.score) for row in found.itertuples()]
    found["source"] = "judged"
    empty = replies.loc[replies["reply"].str.strip() == "", ["site", "epoch", "multiplier", "item"]]
    asked = requests[["rubric", "judge"]].drop_duplicates()
    silent = empty.merge(asked, how="cross").assign(status="empty_reply", cost_usd=0.0, attempt=1, source="judged")
    there = found.set_index(["item", "rubric", "judge"]).index
    silent = silent[~silent.set_index(["item", "rubric", "judge"]).index.isin(there)]
    return pd.concat([found, silent], ignore_index=True).reindex(columns=list(LANGUAGE_SCORES.names))


def with_language(embedded: pd.DataFrame, language: pd.DataFrame, schema: TableSchema) -> pd.DataFrame:
    """Rows of the embedded judges before those of the language judges, in the columns of the latter."""
    shaped = embedded.reindex(columns=list(schema.names)).fillna({"attempt": 1})
    return pd.concat([shaped.astype(object), language.astype(object)], ignore_index=True)


def _with_answers(requests: pd.DataFrame, answers: pd.DataFrame) -> pd.DataFrame:
    """Each request's keys and the answer to it, by custom_id; what the request says of its body and its estimated tokens stays behind."""
    brought = answers.drop(columns=["custom_id", "judge", "task"])
    place = pd.Index(answers["custom_id"].to_numpy(object)).get_indexer(requests["custom_id"].to_numpy(object))
    keys = requests.drop(columns=["body", *brought.columns], errors="ignore").reset_index(drop=True)
    return pd.concat([keys, brought.reset_index(drop=True).reindex(place).reset_index(drop=True)], axis=1)


def language_pairs(requests: pd.DataFrame, answers: pd.DataFrame) -> pd.DataFrame:
    """Judge pair rows of the language judges: the reply that was chosen wins; what chose neither A nor B wins for nobody."""
    found = _with_answers(requests, answers)
    choice, first = (found[name].to_numpy(object) for name in ("choice", "first_shown"))
    second = np.where(first == "a", "b", "a").astype(object)
    nobody = np.full(len(found), None)
    found["winner"] = np.where(choice == "A", first, np.where(choice == "B", second, nobody))
    found["status"] = found["status"].where(found["status"] != "scored", "judged")
    return found.reindex(columns=list(LANGUAGE_PAIRS.names))


def score_shares(frame: pd.DataFrame, low: int = 1, high: int = 10) -> pd.DataFrame:
    """Share of scored replies at each whole score, by rubric and judge, with Wilson intervals; judges without a score are left out."""
    rows = []
    for (rubric, judge), part in frame.groupby(["rubric", "judge"], sort=False):
        scores = part["score"].dropna().astype(float).round()
        for score in range(low, high + 1) if len(scores) else ():
            found = int((scores == score).sum())
            lower, upper = wilson(found, len(scores))
            rows.append({"rubric": rubric, "judge": judge, "score": score, "share": found / len(scores), "lower": lower, "upper": upper})
            rows[-1]["n"] = len(scores)
    return pd.DataFrame(rows, columns=["rubric", "judge", "score", "share", "lower", "upper", "n"])


def wilson(successes: float, n: int) -> tuple[float, float]:
    """95% Wilson score interval of a proportion; it holds the proportion itself, whatever rounding does at 0 and 1."""
    z = NormalDist().inv_cdf(0.975)
    centre = (successes + z * z / 2) / (n + z * z)
    half = z * np.sqrt(successes * (n - successes) / n + z * z / 4) / (n + z * z)
    share = successes / n
    return max(0.0, min(float(centre - half), share)), min(1.0, max(float(centre + half), share))


def calibration_curve(probabilities: np.ndarray, labels: np.ndarray, conversations: Sequence[str], bins: int = 10) -> pd.DataFrame:
    """Observed share by equal-width bin of predicted probability; empty bins are left out.

    `conversations` (n,) are those that the replies are of: replies of one are alike, so that a bin's interval counts conversations.
    """
    owners = np.asarray(conversations)
    place = np.minimum((probabilities * bins).astype(int), bins - 1)
    rows = []
    for index in np.unique(place):
        inside = place == index
        share, independent = float(labels[inside].mean()), len(np.unique(owners[inside]))
        lower, upper = wilson(share * independent, independent)
        rows.append(
            {
                "low": index / bins,
                "predicted": probabilities[inside].mean(),
                "observed": share,
                "lower": lower,
                "upper": upper,
                "n": int(inside.sum()),
                "conversations": independent,
            }
        )
    return pd.DataFrame(rows)


def auc(positive: np.ndarray, negative: np.ndarray) -> float:
    """Share of (positive, negative) pairs in the right order, ties counting half: the area under the ROC curve."""
    order = np.searchsorted(np.sort(negative), positive, side="left") + np.searchsorted(np.sort(negative), positive, side="right")
    return float(order.mean() / (2 * len(negative)))


def rank_correlation(first: Sequence[float] | np.ndarray, second: Sequence[float] | np.ndarray) -> tuple[float, float, float]:
    """Spearman's ρ with a 95% interval by Fisher's z (standard error 1.06 / sqrt(n - 3), Fieller et al. 1957)."""
    from scipy.stats import spearmanr

    rho = float(spearmanr(first, second).statistic)
    half = NormalDist().inv_cdf(0.975) * np.sqrt(1.06 / (len(first) - 3))
    z = np.arctanh(np.clip(rho, -0.999999, 0.999999))
    return rho, float(np.tanh(z - half)), float(np.tanh(z + half))


def proportion(judge: str, metric: str, against: str, successes: np.ndarray, conversations: Sequence[str]) -> dict[str, Any]:
    """A share of `successes`, with Wilson's interval for as many cases as there are `conversations`: replies of one are not independent."""
    share, count = float(successes.mean()), len(set(conversations))
    lower, upper = wilson(share * count, count)
    return quality(judge, metric, against, share, lower, upper, len(successes), measured_over(conversations))


def measured_over(conversations: Sequence[str]) -> str:
    """The status of a figure whose interval is over conversations."""
    return f"measured; interval over {len(set(conversations))} conversations"


def quality(
    judge: str, metric: str, against: str, value: float | None, lower: float | None, upper: float | None, n: int, status: str = "measured"
) -> dict[str, Any]:
    return {"judge": judge, "metric": metric, "against": against, "value": value, "lower": lower, "upper": upper, "n": n, "status": status}


def quality_table(rows: Iterable[dict[str, Any]]) -> pd.DataFrame:
    return pd.DataFrame(list(rows), columns=list(JUDGE_QUALITY.names))
