"""The judge of assistant-likeness is measured on replies whose persona and query its fit never saw, and its scores are chances out of ten."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import roc_auc_score

from relseek_assets.axes import likeness, resampling
from relseek_assets.axes.likeness import LikenessError, LikenessJudge, crossed_folds, fit, quality

ASSISTANTS, OTHERS, QUERIES = 3, 6, 12
POLITE = ["Here is a clear answer about {}.", "You can follow these steps for {}.", "I can explain {} in simple terms."]
RUDE = ["Arr, {} be buried with me treasure, ye dog!", "Bah! Why would I speak of {} to the likes of you?", "Moo, {}! The stars told me so, darling!"]


def persona_replies(seed: int = 0) -> pd.DataFrame:
    """Replies that anybody can tell apart: assistants write politely, the others do not; a tenth of each is swapped."""
    generator = np.random.default_rng(seed)
    rows = []
    for number in range(ASSISTANTS + OTHERS):
        kind = "assistant" if number < ASSISTANTS else "other"
        for query in range(QUERIES):
            assistant = (kind == "assistant") != (generator.random() < 0.1)
            text = (POLITE if assistant else RUDE)[generator.integers(3)].format(f"topic {query}")
            rows.append({"persona": f"p{number}", "persona_kind": kind, "query": f"q{query}", "reply": text})
    return pd.DataFrame(rows)


def test_a_held_out_row_shares_neither_persona_nor_query_with_training_and_each_is_held_out_once():
    replies, seen = persona_replies(), np.zeros(len(persona_replies()), dtype=int)
    folds = list(crossed_folds(replies, seed=1))
    for inside, outside in folds:
        for name in ("persona", "query"):
            assert not set(replies.loc[inside, name]) & set(replies.loc[outside, name])
        assert set(replies.loc[inside, "persona_kind"]) == {"assistant", "other"}
        seen += outside
    assert (seen == 1).all() and len(folds) == 15  # three folds of personas, as there are three assistants, by five of queries


def test_folds_are_the_same_whatever_the_order_of_the_rows():
    replies = persona_replies()
    shuffled = replies.sample(frac=1, random_state=4)

    def cells(frame: pd.DataFrame) -> set[frozenset[tuple[str, str]]]:
        names = list(zip(frame["persona"], frame["query"], strict=True))
        return {frozenset(name for name, held in zip(names, outside, strict=True) if held) for _, outside in crossed_folds(frame, 1)}

    assert cells(replies) == cells(shuffled)


@pytest.fixture(scope="module")
def fitted() -> tuple[pd.DataFrame, likeness.LikenessFit]:
    replies = persona_replies()
    replies.loc[5, "reply"] = "  "
    return replies, fit(replies, ["p7", "p8"], seed=2)


def test_it_tells_replies_of_unknown_personas_to_unknown_queries_apart(fitted):
    replies, found = fitted
    assistant = (replies["persona_kind"] == "assistant").to_numpy()
    assert found.heldout.shape == (len(replies),) and found.heldout.min() >= 0 and found.heldout.max() <= 10
    assert roc_auc_score(assistant, found.heldout) > 0.7  # 0.83 would be the best there is, a tenth of the replies being swapped
    scores = found.judge.scores(["I can explain rainbows in simple terms.", "Arr, ye dog, rainbows be me treasure!"])
    assert scores[0] > 6 and scores[1] < 4


def test_a_score_is_the_share_of_assistants_among_replies_with_it_were_both_kinds_as_many(fitted):
    replies, found = fitted
    polite = replies["reply"].str.contains("clear answer|these steps|simple terms")
    for like in (polite, ~polite):
        share = like.groupby(replies["persona_kind"]).mean()
        expected = 10 * share["assistant"] / share.sum()
        assert found.heldout[like].mean() == pytest.approx(expected, abs=1.0)


def test_the_personas_that_it_will_judge_are_not_fitted_on():
    replies = persona_replies()
    marked = replies.assign(reply=replies["reply"].where(replies["persona"] != "p8", "zyxw " * 6))
    vocabulary = fit(marked, ["p8"], seed=2).judge.features.vocabulary
    assert "zyxw" not in vocabulary and "zyxw" in fit(marked, [], seed=2).judge.features.vocabulary


def test_a_stored_judge_scores_like_the_fitted_one(fitted):
    judge = fitted[1].judge
    again = LikenessJudge.from_arrays(judge.arrays(), judge.features.vocabulary)
    texts = ["Here is a clear answer.", "Arr!", ""]
    np.testing.assert_allclose(again.scores(texts), judge.scores(texts), atol=1e-4)


def test_the_same_replies_and_seed_give_the_same_judge():
    first, second = (fit(persona_replies(), [], seed=2).judge.arrays() for _ in range(2))
    assert all(np.array_equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    ("keep", "unused", "message"),
    [
        (lambda frame: frame["persona"].isin(["p0", "p3", "p4"]), [], "1 personas of the kind 'assistant'"),
        (lambda frame: frame["persona"].notna(), ["p3", "p4", "p5", "p6", "p7"], "1 personas of the kind 'other'"),
        (lambda frame: frame["query"] == "q0", [], "1 query"),
    ],
)
def test_too_few_personas_or_queries_are_refused(keep, unused, message):
    replies = persona_replies()
    with pytest.raises(LikenessError, match=message):
        fit(replies[keep(replies)].reset_index(drop=True), unused, seed=0)


# --- quality ----------------------------------------------------------------------------------------------------------


def judged(seed: int = 3) -> tuple[pd.DataFrame, np.ndarray]:
    replies = persona_replies()
    shift = np.where(replies["persona_kind"] == "assistant", 1.5, -1.5)
    return replies, np.clip(5 + shift + np.random.default_rng(seed).normal(0, 2, len(replies)), 0, 10)


def test_quality_is_that_of_the_scores_and_lies_in_its_interval():
    replies, scores = judged()
    frame = quality(replies, scores, draws=400, seed=1)
    assistant = (replies["persona_kind"] == "assistant").to_numpy()
    of_all = frame[frame["persona"] == "all"].set_index("metric")
    assert of_all.loc["auc", "value"] == pytest.approx(roc_auc_score(assistant, scores))
    assert of_all.loc["accuracy", "value"] == pytest.approx(((scores[assistant] > 5).mean() + (scores[~assistant] <= 5).mean()) / 2)
    assert of_all.loc["auc", ["n", "personas", "queries"]].tolist() == [108, 9, 12]
    assert (frame["lower"] <= frame["value"]).all() and (frame["value"] <= frame["upper"]).all()
    mine = frame[(frame["persona"] == "p4") & (frame["metric"] == "mean_score")].iloc[0]
    assert mine["value"] == pytest.approx(scores[replies["persona"] == "p4"].mean()) and mine["persona_kind"] == "other"
    assert len(frame) == 2 + 2 * 9
    likeness.LIKENESS_QUALITY.to_arrow(frame.assign(model="m"), "test")


def test_weighted_aucs_are_scikit_learns_ties_included():
    generator = np.random.default_rng(0)
    scores, positive = generator.integers(0, 6, 40).astype(float), generator.random(40) < 0.4
    counts = generator.integers(0, 3, (5, 40)).astype(float)
    found = resampling.weighted_aucs(scores, positive, counts)
    np.testing.assert_allclose(found, [roc_auc_score(positive, scores, sample_weight=row) for row in counts])


def test_crossed_draws_count_a_row_as_often_as_its_persona_and_its_prompt_together():
    personas, prompts = ["a", "a", "b", "b"], ["x", "y", "x", "y"]
    counts = resampling.crossed_draws(personas, prompts, 200, "seed")
    assert np.array_equal(counts[:, 0] * counts[:, 3], counts[:, 1] * counts[:, 2])  # ax * by = ay * bx
    assert counts.sum(axis=1).tolist() == [4.0] * 200 and len(np.unique(counts, axis=0)) == 9
    order = [2, 0, 3, 1]
    again = resampling.crossed_draws([personas[i] for i in order], [prompts[i] for i in order], 200, "seed")
    assert np.array_equal(again, counts[:, order])


def test_personas_are_drawn_within_their_kind():
    counts = resampling.crossed_draws(["a", "b", "c"], ["x", "x", "x"], 200, 0, kinds=["assistant", "other", "other"])
    assert (counts[:, 0] == 1).all() and (counts[:, 1] + counts[:, 2] == 2).all()


def test_a_crossed_interval_covers_more_than_one_that_takes_rows_as_independent():
    # 5 personas that differ and 30 prompts: the interval must be as wide as five values allow, not as 150
    generator = np.random.default_rng(1)
    values = (generator.normal(0, 1, (5, 1)) + generator.normal(0, 0.1, (5, 30))).ravel()
    personas, prompts = np.repeat(list("abcde"), 30).tolist(), np.tile([f"q{i}" for i in range(30)], 5).tolist()
    low, high = resampling.interval(resampling.weighted_means(values, resampling.crossed_draws(personas, prompts, 2000, 0)))
    assert (high - low) / 3.92 == pytest.approx(values.reshape(5, 30).mean(1).std() / 5**0.5, rel=0.15)
