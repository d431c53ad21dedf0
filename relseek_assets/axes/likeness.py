"""The embedded judge of assistant-likeness: is a reply one of an assistant, or of somebody else?

Here belong its fit, its calibration to 0 to 10, and its quality on replies whose persona and query it never saw. It is no language model: it sees the
reply alone, as an embedding beside word weights (`judges/embedded.py`). The rubric for judges that are language models is the persona
set's own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression

from relseek_assets.axes.resampling import crossed_draws, interval, weighted_aucs, weighted_means
from relseek_assets.persona_set import ASSISTANT, OTHER
from relseek_resources.judges.embedded import WORD, EmbeddedJudge, Features
from relseek_resources.judges.embedding import embed
from relseek_resources.storage import Column, TableSchema, keyed_order

NAME = "minilm-words-likeness"
LOW, HIGH = 0.0, 10.0
MIDDLE = (LOW + HIGH) / 2
PENALTY = 1.0  # inverse L2 strength
FOLDS = 5  # of queries, and of personas where there are as many of both kinds
FEWEST = 2  # of each kind of persona, and of queries: one of each is held out

LIKENESS_QUALITY = TableSchema(
    "likeness_quality",
    (
        Column("model", "string", "name of the model in the study whose replies were judged"),
        Column("judge", "string", "who judged"),
        Column("persona", "string", "whose replies, or `all`"),
        Column("persona_kind", "string", "assistant, other, or `all`", choices=(ASSISTANT, OTHER, "all")),
        Column(
            "metric",
            "string",
            "`auc`: share of (assistant, other) reply pairs in the right order; `accuracy`: share on the right side of 5, the mean of both kinds "
            "where all are meant; `mean_score`, 0 to 10",
            choices=("auc", "accuracy", "mean_score"),
        ),
        Column("value", "number", "the figure, each reply judged by a fit that saw neither its persona nor its query"),
        Column("lower", "number", "95% interval", nullable=True),
        Column("upper", "number", "95% interval", nullable=True),
        Column("n", "integer", "replies", low=1),
        Column("personas", "integer", "personas among them", low=1),
        Column("queries", "integer", "queries among them", low=1),
        Column("method", "string", "how the interval was made"),
    ),
    key=("model", "judge", "persona", "metric"),
)


class LikenessError(ValueError):
    """Replies that a judge of assistant-likeness cannot be fitted on; the message says what is lacking."""


class LikenessJudge(EmbeddedJudge):
    """Target is an assistant, anti-target somebody else: a score is the chance, out of 10, that an assistant persona wrote the reply."""

    lowest = LOW


@dataclass(frozen=True)
class LikenessFit:
    """A fitted judge, and the held-out scores (rows,) of the replies it was given, each from a fit that saw neither its persona nor its query."""

    judge: LikenessJudge
    heldout: np.ndarray


def fit(replies: pd.DataFrame, unused: Sequence[str], seed: int, on_batch: Callable[[int], None] = lambda rows: None) -> LikenessFit:
    """Fit the judge on replies of assistant and other personas.

    The kinds weigh the same whatever their numbers. The curve to 0-10 is fitted on the held-out log-odds, so that a score says how often a reply of
    an unknown persona to an unknown query is an assistant's. Empty replies are left out of the fits and score like any text without words.

    Args:
        replies: columns persona, persona_kind (assistant or other), query, reply.
        unused: personas that the judge itself is not fitted on, because it will judge them; they count in the held-out scores.

    Raises:
        LikenessError: fewer than two personas of a kind, or two queries.
    """
    _check(replies, unused)
    texts = list(replies["reply"])
    embeddings = embed(texts, on_batch=on_batch)
    labels = (replies["persona_kind"] == ASSISTANT).to_numpy()
    written = np.array([bool(text.strip()) for text in texts])
    projections = np.empty(len(texts))
    for inside, outside in crossed_folds(replies, seed):
        model = _regression(texts, embeddings, labels, np.flatnonzero(inside & written))
        rows = np.flatnonzero(outside)
        projections[rows] = model.projections([texts[row] for row in rows], embeddings[rows])
    slope, offset = _curve(projections[written], labels[written])
    judge = _regression(texts, embeddings, labels, np.flatnonzero(written & ~replies["persona"].isin(unused).to_numpy()))
    calibrated = LikenessJudge(judge.features, judge.weights, judge.intercept, slope, offset)
    return LikenessFit(calibrated, calibrated.scale(projections))


def crossed_folds(replies: pd.DataFrame, seed: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(training rows, held-out rows) as masks: the held-out share neither persona nor query with training, and every row is held out once.

    Rows that share one of the two with the held-out are in neither.
    """
    kinds = replies.drop_duplicates("persona").set_index("persona")["persona_kind"]
    of_query = _fold_of(replies["query"].unique(), seed, "query", FOLDS)
    smallest = int(kinds.value_counts().min())
    of_persona: dict[str, int] = {}
    for kind in (ASSISTANT, OTHER):
        of_persona |= _fold_of(kinds.index[kinds == kind], seed, "persona", min(FOLDS, smallest))
    queries, personas = replies["query"].map(of_query).to_numpy(), replies["persona"].map(of_persona).to_numpy()
    for query_fold in np.unique(queries):
        for persona_fold in np.unique(personas):
            outside = (queries == query_fold) & (personas == persona_fold)
            if outside.any():
                yield (queries != query_fold) & (personas != persona_fold), outside


def _fold_of(names: Sequence[str], seed: int, what: str, folds: int) -> dict[str, int]:
    return {name: place % folds for place, name in enumerate(keyed_order(sorted(names), seed, "likeness fold", what))}


def _check(replies: pd.DataFrame, unused: Sequence[str]) -> None:
    used = replies[~replies["persona"].isin(unused)]
    for kind in (ASSISTANT, OTHER):
        count = used.loc[used["persona_kind"] == kind, "persona"].nunique()
        if count < FEWEST:
            raise LikenessError(f"{count} personas of the kind {kind!r} are left to fit on; a held-out persona needs {FEWEST}, so add some")
    if replies["query"].nunique() < FEWEST:
        raise LikenessError(f"{replies['query'].nunique()} query; a held-out query needs {FEWEST}, so add some")


def _regression(texts: Sequence[str], embeddings: np.ndarray, labels: np.ndarray, rows: np.ndarray) -> LikenessJudge:
    """A judge without calibration, its vocabulary taken from `rows` alone."""
    mine = [texts[row] for row in rows]
    vectoriser = TfidfVectorizer(token_pattern=WORD, min_df=2, sublinear_tf=True).fit(mine)
    features = Features(tuple(vectoriser.get_feature_names_out()), vectoriser.idf_)
    model = LogisticRegression(C=PENALTY, max_iter=2000, class_weight="balanced").fit(features(mine, embeddings[rows]), labels[rows])
    return LikenessJudge(features, model.coef_[0].astype(np.float64), float(model.intercept_[0]), 1.0, 0.0)


def _curve(projections: np.ndarray, labels: np.ndarray) -> tuple[float, float]:
    """Slope and offset of Platt's curve, both kinds weighing the same."""
    model = LogisticRegression(C=1e6, class_weight="balanced").fit(projections[:, None], labels)
    return float(model.coef_[0, 0]), float(model.intercept_[0])


def quality(replies: pd.DataFrame, heldout: np.ndarray, draws: int, seed: int) -> pd.DataFrame:
    """AUC, accuracy and mean score of all replies, and accuracy and mean score persona by persona, as `LIKENESS_QUALITY` without the model's
    name.

    Args:
        heldout: (rows,) scores of `replies`, 0 to 10.
    """
    assistant = (replies["persona_kind"] == ASSISTANT).to_numpy()
    right = (heldout > MIDDLE) == assistant
    counts = crossed_draws(list(replies["persona"]), list(replies["query"]), draws, seed, "likeness", kinds=list(replies["persona_kind"]))
    both = f"percentile, pigeonhole bootstrap over personas within their kind and over queries, {draws} draws"
    one = np.ones((1, len(replies)))

    def accuracy(weights: np.ndarray) -> np.ndarray:
        return (weighted_means(right[assistant], weights[:, assistant]) + weighted_means(right[~assistant], weights[:, ~assistant])) / 2

    rows = [
        _row(replies, "all", "all", "auc", weighted_aucs(heldout, assistant, one), weighted_aucs(heldout, assistant, counts), both),
        _row(replies, "all", "all", "accuracy", accuracy(one), accuracy(counts), both),
    ]
    by_query = f"percentile, bootstrap over queries, {draws} draws"
    for (kind, persona), part in replies.reset_index(drop=True).groupby(["persona_kind", "persona"]):
        weights = crossed_draws(list(part["persona"]), list(part["query"]), draws, seed, "likeness")
        for metric, values in (("accuracy", right[part.index].astype(float)), ("mean_score", heldout[part.index])):
            rows.append(_row(part, persona, kind, metric, np.array([values.mean()]), weighted_means(values, weights), by_query))
    return pd.DataFrame(rows)


def _row(part: pd.DataFrame, persona: str, kind: str, metric: str, value: np.ndarray, drawn: np.ndarray, method: str) -> dict[str, object]:
    lower, upper = interval(drawn)
    return {
        "judge": NAME,
        "persona": persona,
        "persona_kind": kind,
        "metric": metric,
        "value": float(value[0]),
        "lower": lower,
        "upper": upper,
        "n": len(part),
        "personas": part["persona"].nunique(),
        "queries": part["query"].nunique(),
        "method": method,
    }
