"""The coherence score orders texts by how badly we broke them, on texts that it was not calibrated on."""

from __future__ import annotations

import re
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from relseek_assets.judging.assets import distinct
from relseek_resources.judges import coherence
from relseek_resources.storage import read_tensors, write_tensors

KINDS = ("intact", "shuffled 0.25", "shuffled 0.5", "shuffled 1", "looped")
LOWEST_THIRD = 4.0  # of the scale from 1 to 10


class WordPairModel:
    """A language model small enough to count by hand: add-one smoothed pairs of neighbouring words."""

    def __init__(self, texts: list[str]) -> None:
        sequences = [self.words(text) for text in texts]
        self.pairs = Counter(pair for words in sequences for pair in pairwise(words))
        self.firsts = Counter(word for words in sequences for word in words[:-1])
        self.vocabulary = len({word for words in sequences for word in words}) + 1

    @staticmethod
    def words(text: str) -> list[str]:
        return ["<s>", *re.findall(r"[\w']+", text.lower())]

    def perplexity(self, text: str) -> float:
        words = self.words(text)
        chances = [(self.pairs[pair] + 0.01) / (self.firsts[pair[0]] + 0.01 * self.vocabulary) for pair in pairwise(words)]
        return float(np.exp(-np.mean(np.log(chances))))


@pytest.fixture(scope="module")
def replies(pairs: pd.DataFrame) -> list[str]:
    frame = distinct(pairs, "train")
    return [*frame["chosen"].head(60), *frame["rejected"].head(60)]


@pytest.fixture(scope="module")
def judged(replies: list[str]) -> pd.DataFrame:
    """Scores of damaged texts by a judge calibrated on other ones."""
    model = WordPairModel(replies)
    damaged = coherence.damage(replies, seed=3)
    perplexities = np.array([model.perplexity(item.text) for item in damaged])
    seen = np.array([item.source % 2 == 0 for item in damaged])
    judge = coherence.fit([item for item, mine in zip(damaged, seen, strict=True) if mine], perplexities[seen])
    others = [item for item, mine in zip(damaged, seen, strict=True) if not mine]
    return pd.DataFrame({"kind": [item.kind for item in others], "score": judge.scores([item.text for item in others], perplexities[~seen])})


def test_the_more_words_change_places_the_lower_the_score(judged: pd.DataFrame) -> None:
    means = judged.groupby("kind")["score"].mean()
    intact, quarter, half, wholly = (means[kind] for kind in KINDS[:4])
    assert intact > quarter > half > wholly
    assert intact - wholly > 3


def test_a_loop_scores_in_the_lowest_third(judged: pd.DataFrame) -> None:
    assert judged.loc[judged["kind"] == "looped", "score"].mean() < LOWEST_THIRD


def test_scores_stay_between_one_and_ten(judged: pd.DataFrame) -> None:
    assert judged["score"].between(1, 10).all()


# --- damage -----------------------------------------------------------------------------------------------------------


def test_every_text_is_damaged_in_every_way(replies: list[str]) -> None:
    damaged = coherence.damage(replies[:7], seed=3)
    assert Counter((item.source, item.kind) for item in damaged) == {(source, kind): 1 for source in range(7) for kind in KINDS}


def test_shuffling_keeps_the_words_and_moves_no_more_than_said() -> None:
    text = " ".join(f"w{number}" for number in range(40))
    by_kind = {item.kind: item for item in coherence.damage([text], seed=3)}
    assert by_kind["intact"].text == text
    for share in (0.25, 0.5, 1):
        words = by_kind[f"shuffled {share:g}"].text.split()
        moved = sum(one != two for one, two in zip(words, text.split(), strict=True))
        assert sorted(words) == sorted(text.split())
        assert 0 < moved <= share * 40


def test_a_loop_repeats_four_words_of_the_text_to_its_length() -> None:
    text = " ".join(f"w{number}" for number in range(22))
    words = next(item.text for item in coherence.damage([text], seed=3) if item.kind == "looped").split()
    assert len(words) == 22
    assert words[:18] == words[4:]
    assert " ".join(words[:4]) in text


def test_damage_depends_on_the_seed_and_not_on_the_other_texts(replies: list[str]) -> None:
    def texts(found: list[coherence.Damaged]) -> list[str]:
        return [item.text for item in found]

    few = coherence.damage(replies[:2], seed=3)
    assert texts(coherence.damage(replies[:5], seed=3))[: len(few)] == texts(few)
    assert texts(coherence.damage(replies[:2], seed=4)) != texts(few)


def test_a_text_of_one_word_is_not_damaged_and_the_others_keep_their_place(replies: list[str]) -> None:
    found = coherence.damage(["Sure!", "", replies[2]], seed=3)
    assert found == [item for item in coherence.damage(replies[:3], seed=3) if item.source == 2]
    with pytest.raises(ValueError, match="none of the 2 replies to calibrate coherence on has two words"):
        coherence.damage(["Sure!", ""], seed=3)


def test_the_truth_is_one_for_intact_and_nothing_for_the_worst() -> None:
    truth = {item.kind: item.coherence for item in coherence.damage(["a b c d e f g h"], seed=1)}
    assert truth == {"intact": 1, "shuffled 0.25": 0.75**2, "shuffled 0.5": 0.25, "shuffled 1": 0, "looped": 0}


# --- signs and scores -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "share"),
    [("a b c d e", 0), ("a b a b a b", 0.5), ("Go on, go on, go on!", 0.5), ("a a a a a a", 0.75), ("a b", 0), ("", 0)],
)
def test_repetition_is_the_share_of_three_word_sequences_seen_before(text: str, share: float) -> None:
    assert coherence.repetition(text) == pytest.approx(share)


def judge() -> coherence.CoherenceJudge:
    return coherence.CoherenceJudge(np.array([-1.0, -2.0, -3.0]), 3.0)


def test_the_score_is_the_stated_curve() -> None:
    found = judge().scores(["a b c d", "a b a b a b"], np.array([np.e**3, np.e**2]))
    # 3 - 3 = 0 gives the middle; 3 - 2 - 2/2 - 3/4 = -0.75
    assert found == pytest.approx([5.5, 1 + 9 / (1 + np.exp(0.75))])


def test_an_empty_reply_scores_one_whatever_its_perplexity() -> None:
    assert list(judge().scores(["", " \n", "fine words here"], np.array([1.0, np.inf, np.inf]))) == [1, 1, 1]
    assert judge().scores(["fine words here"], np.array([1.0]))[0] > 9


def test_a_judge_read_back_from_its_file_gives_the_same_scores(tmp_path: Path) -> None:
    fitted = coherence.CoherenceJudge(np.array([-1.234567891, 0.1, -2.0]), 1 / 3)
    write_tensors(tmp_path / "judge.safetensors", fitted.arrays(), {})
    again = coherence.CoherenceJudge.from_arrays(read_tensors(tmp_path / "judge.safetensors")[0])
    texts, perplexities = ["a b c", "a b a b a", "one two"], np.array([3.0, 20.0, 500.0])
    np.testing.assert_allclose(again.scores(texts, perplexities), fitted.scores(texts, perplexities), atol=1e-5)


@pytest.mark.slow
def test_the_embedded_model_tells_intact_from_shuffled_and_looped(embedded_model: Any, pairs: pd.DataFrame) -> None:
    """As the asset calibrates it, on 16 replies; scored on 8 others."""
    frame = distinct(pairs, "train").query("turn == 1").head(24)
    texts = [embedded_model.cut(text, 40) for text in [*frame["chosen"].head(12), *frame["rejected"].tail(12)]]
    damaged = coherence.damage(texts, seed=3)
    prompts = [embedded_model.prompt_tokens(prompt) for prompt in frame["prompt"]]
    scores = embedded_model.score_tokens(
        [prompts[item.source] for item in damaged], [embedded_model.reply_tokens(item.text, end=False) for item in damaged]
    )
    perplexities = np.exp([-score.mean for score in scores])
    seen = np.array([item.source % 3 > 0 for item in damaged])
    fitted = coherence.fit([item for item, mine in zip(damaged, seen, strict=True) if mine], perplexities[seen])
    others = [item for item, mine in zip(damaged, seen, strict=True) if not mine]
    found = pd.DataFrame({"kind": [item.kind for item in others], "score": fitted.scores([item.text for item in others], perplexities[~seen])})
    means = found.groupby("kind")["score"].mean()
    assert means["intact"] > means["shuffled 0.25"] > means["shuffled 0.5"] > means["shuffled 1"]
    assert means["looped"] < LOWEST_THIRD
    assert means["intact"] > 7
