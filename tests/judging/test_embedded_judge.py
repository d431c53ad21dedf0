"""The embedded judge on the behaviour that it is fitted to: right on conversations it never saw, on a scale that means something."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy.special import logit
from scipy.stats import spearmanr
from sklearn.feature_extraction.text import TfidfVectorizer

from relseek_assets.behaviour import GradedReply
from relseek_assets.judging.assets import bootstrap_auc, distinct
from relseek_resources.judges import embedded
from relseek_resources.judges.embedding import WIDTH, embed
from relseek_resources.storage import read_tensors, write_tensors

WARM = "Oh, I'm so glad you came back. I missed our talks! How are you feeling today?"
PLAIN = "Set the oven to 180 degrees and bake for forty minutes. Check with a skewer."


@pytest.fixture(scope="session")
def heldout(fitted: Any, pairs: pd.DataFrame) -> tuple[pd.DataFrame, np.ndarray, np.ndarray]:
    """Distinct held-out pairs with the judge's projections of both replies."""
    frame = distinct(pairs, "heldout")
    return frame, fitted.judge.projections(list(frame["chosen"])), fitted.judge.projections(list(frame["rejected"]))


def test_each_pair_of_replies_counts_once_whatever_its_histories(pairs: pd.DataFrame) -> None:
    frame = distinct(pairs, "train")
    assert set(frame["split"]) == {"train"}
    turns = pairs[pairs["split"] == "train"].groupby("conversation")["turn"].nunique()
    assert len(frame) == turns.sum() < (pairs["split"] == "train").sum()


def test_nineteen_of_twenty_held_out_pairs_are_in_the_right_order(heldout: tuple[pd.DataFrame, np.ndarray, np.ndarray]) -> None:
    frame, target, antitarget = heldout
    assert frame["conversation"].nunique() >= 30
    assert (target > antitarget).mean() >= 0.95


def test_cross_validation_foretells_the_held_out_accuracy(
    fitted: Any, heldout: tuple[pd.DataFrame, np.ndarray, np.ndarray], pairs: pd.DataFrame
) -> None:
    _, target, antitarget = heldout
    assert fitted.pair_accuracy == pytest.approx((target > antitarget).mean(), abs=0.05)
    assert len(fitted.projections) == 2 * len(distinct(pairs, "train"))
    halves = fitted.projections.reshape(2, -1)
    assert (halves[0] > halves[1]).mean() == pytest.approx(fitted.pair_accuracy)
    assert 0 < fitted.log_loss < np.log(2)


def test_scores_stay_between_one_and_ten_and_use_the_scale(fitted: Any, pairs: pd.DataFrame) -> None:
    frame = distinct(pairs, "heldout")
    scores = fitted.judge.scores([*frame["chosen"], *frame["rejected"], "", "!!!", "zxqv " * 400])
    assert ((scores >= 1) & (scores <= 10)).all()
    target, antitarget = scores[: len(frame)], scores[len(frame) : 2 * len(frame)]
    assert target.mean() - antitarget.mean() > 3
    assert fitted.judge.scores([WARM])[0] > 6 > 4 > fitted.judge.scores([PLAIN])[0]


def test_scores_rise_with_the_projection_along_a_logistic_curve(fitted: Any) -> None:
    projections = np.linspace(-6, 6, 200)
    scores = fitted.judge.scale(projections)
    assert (np.diff(scores) > 0).all()
    line = np.polyfit(projections, logit((scores - 1) / 9), 1)
    np.testing.assert_allclose(logit((scores - 1) / 9), np.polyval(line, projections), atol=1e-9)
    assert fitted.judge.scale(np.array([-1e6, 1e6])) == pytest.approx([1, 10])


def test_the_order_of_graded_replies_is_their_authors(fitted: Any, graded: list[GradedReply]) -> None:
    """The curve was fitted to the grades, but no curve can change an order: that comes from the pairs alone."""
    scores = fitted.judge.scores([row.reply for row in graded])
    grades = [row.score for row in graded]
    assert spearmanr(scores, grades).statistic > 0.8
    by_prompt = pd.DataFrame({"prompt": [row.id for row in graded], "grade": grades, "score": scores})
    assert np.mean([spearmanr(part["grade"], part["score"]).statistic for _, part in by_prompt.groupby("prompt")]) > 0.8


def test_the_curve_is_the_best_of_its_kind_for_the_grades(fitted: Any, graded: list[GradedReply]) -> None:
    judge = fitted.judge
    projections, grades = judge.projections([row.reply for row in graded]), np.array([row.score for row in graded])

    def error(slope: float, offset: float) -> float:
        return float(((1 + 9 / (1 + np.exp(-slope * projections - offset)) - grades) ** 2).mean())

    best = error(judge.slope, judge.offset)
    around = [error(judge.slope * stretch, judge.offset + shift) for stretch in (0.9, 1, 1.1) for shift in (-0.1, 0, 0.1)]
    assert best == pytest.approx(min(around))
    assert best < grades.var() / 2


def test_a_judge_read_back_from_its_file_gives_the_same_scores(fitted: Any, graded: list[GradedReply], tmp_path: Path) -> None:
    path = tmp_path / "judge.safetensors"
    write_tensors(path, fitted.judge.arrays(), {"vocabulary": json.dumps(fitted.judge.features.vocabulary)})
    arrays, header = read_tensors(path)
    again = embedded.EmbeddedJudge.from_arrays(arrays, json.loads(header["vocabulary"]))
    texts = [row.reply for row in graded]
    np.testing.assert_allclose(again.scores(texts), fitted.judge.scores(texts), atol=1e-5)


def test_word_weights_are_those_of_sklearn(fitted: Any, pairs: pd.DataFrame) -> None:
    train, held = distinct(pairs, "train"), distinct(pairs, "heldout")
    vectoriser = TfidfVectorizer(token_pattern=embedded.WORD, min_df=2, sublinear_tf=True).fit([*train["chosen"], *train["rejected"]])
    texts = [*held["chosen"].head(6), "I I I you YOU?! Ünïcode naïve", "nowherewords zzzz", "", "don't -- you're, it's 3:40!"]
    features = fitted.judge.features
    assert list(features.vocabulary) == list(vectoriser.get_feature_names_out())
    assert features(texts).shape == (len(texts), WIDTH + len(features.vocabulary))
    np.testing.assert_allclose(features(texts)[:, WIDTH:], vectoriser.transform(texts).toarray(), atol=1e-12)


def test_embeddings_have_unit_length_and_do_not_depend_on_their_batch() -> None:
    texts = [WARM, PLAIN, "Yes.", "word " * 600, ""]
    together = embed(texts)
    assert together.shape == (5, WIDTH)
    np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1, atol=1e-5)
    np.testing.assert_allclose(together, np.vstack([embed([text]) for text in texts]), atol=1e-5)
    np.testing.assert_allclose(together, embed(texts, batch_size=2), atol=1e-5)


def test_embeddings_of_like_texts_are_near() -> None:
    one, two, other = embed(["The cat sat on the mat.", "A cat was sitting on a mat.", "Interest rates rose by half a point."])
    assert one @ two > 0.7 > 0.2 > one @ other


def test_every_text_is_reported_once_while_embedding() -> None:
    seen: list[int] = []
    embed(["a", "b", "c"], batch_size=2, on_batch=seen.append)
    assert seen == [2, 1]


def test_without_grades_the_curve_puts_targets_high_and_antitargets_low() -> None:
    warm = [f"I missed you, {name}! How are you?" for name in "abcdefghij"]
    plain = [f"The value of {name} is computed below." for name in "abcdefghij"]
    judge = embedded.fit(warm, plain, list("abcdefghij")).judge
    assert judge.scores(warm).min() > 8
    assert judge.scores(plain).max() < 3


def test_the_interval_of_the_auc_widens_with_conversations_that_repeat(heldout: tuple[pd.DataFrame, np.ndarray, np.ndarray]) -> None:
    """Whole conversations are drawn: copies of one conversation's pairs bring no new evidence."""
    generator = np.random.default_rng(1)
    target, antitarget = generator.normal(0.5, 1, 40), generator.normal(0, 1, 40)
    names = [f"c{number}" for number in range(40)]
    once = bootstrap_auc(target, antitarget, names, seed=1)
    copied = bootstrap_auc(np.tile(target, 4), np.tile(antitarget, 4), names * 4, seed=1)
    apart = bootstrap_auc(np.tile(target, 4), np.tile(antitarget, 4), [f"{name}-{copy}" for copy in range(4) for name in names], seed=1)
    assert copied == pytest.approx(once)
    assert apart[1] - apart[0] == pytest.approx((once[1] - once[0]) / 2, rel=0.2)
    assert once[0] < 0.64 < once[1]
    _, high, low = heldout
    lower, upper = bootstrap_auc(high, low, list(heldout[0]["conversation"]), seed=1, draws=100)
    assert 0.9 < lower <= upper <= 1
