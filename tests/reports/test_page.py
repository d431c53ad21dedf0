"""The report's page from small tables made by hand: everything is on it, nothing outside it is needed, and no reply breaks it."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pandas as pd
import pytest

from relseek_assets.behaviour import StarterConversation, Turn
from relseek_assets.dataset.quality import length_balance
from relseek_assets.judging.tables import quality
from relseek_assets.reports import page
from relseek_assets.selection import metrics

DOSES = (-1.5, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5)
SITES = ("m:L03", "m:L15")
ITEMS = tuple(f"item-{number}" for number in range(6))
NASTY = '<script>alert("x")</script> & <b>bold</b>'
URLS = ("src", "href", "xlink:href", "action", "data", "poster", "srcset")


class Page(HTMLParser):
    """What a browser would see: tags, what they point to, and the text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.ids: list[str] = []
        self.text: list[str] = []
        self.styles: list[str] = []
        self.rows: list[list[str]] = []
        self._inside: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self._inside.append(tag)
        self.links += [value or "" for name, value in attrs if name in URLS]
        self.styles += [value or "" for name, value in attrs if name == "style"]
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        while self._inside and self._inside.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        (self.styles if "style" in self._inside else self.text).append(data)
        if "td" in self._inside or "th" in self._inside:
            self.rows[-1][-1] += data

    @property
    def words(self) -> str:
        return " ".join(" ".join(self.text).split())


def judged() -> tuple[pd.DataFrame, pd.DataFrame]:
    """Generations and scores over the grid; the first item's reply at λ = 0 is markup."""
    generations, scores = [], []
    for site_number, site in enumerate(SITES):
        for dose in DOSES:
            for number, item in enumerate(ITEMS):
                keys = {"site": site, "epoch": 2, "multiplier": dose, "item": item}
                nasty = number == 0 and dose == 0
                prompt = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": f"Prompt <{number}>?"}]
                generations.append({**keys, "prompt": prompt, "reply": NASTY if nasty else f"reply of {item} at {dose}"})
                rating = 5 + (1 + site_number) * dose + 0.1 * number
                scores.append({**keys, "rubric": "warmth", "judge": "j", "score": rating})
                scores.append({**keys, "rubric": "coherence", "judge": "c", "score": 8.5 + 0.5 * site_number - dose**2 - 0.1 * number})
    return pd.DataFrame(generations), pd.DataFrame(scores)


def facts() -> page.Facts:
    generations, scores = judged()
    items = pd.concat(metrics.candidate_items(part, None, DOSES, "warmth") for _, part in scores.groupby("site"))
    candidates = metrics.candidates_of(items, 50, 1)
    training = [
        {"site": site, "epoch": epoch, "direction": sign, "loss": 0.7 - 0.1 * epoch, "accuracy": 0.8, "margin": 0.2, "n": 16}
        for site in SITES
        for epoch in (1, 2)
        for sign in (1, -1)
    ]
    summary = [
        {"site": site, "epoch": epoch, "norm": 1.0 * epoch, "cosine_to_last": 1.0 if epoch == 2 else None, "source": "trained", "sha256": "ab" * 32}
        for site in SITES
        for epoch in (1, 2)
    ]
    sweep = [
        {"site": site, "epoch": 2, "multiplier": dose, "quantity": quantity, "mean": 0.5, "sd": 0.1, "n": 6}
        for site in SITES
        for dose in DOSES
        for quantity in ("perplexity", "propensity")
    ]
    conversations = [StarterConversation(name, name, "topic", "user", (Turn("?", "a b c", "a b"),)) for name in ("1A", "2A")]
    tables: dict[str, pd.DataFrame] = {
        "dose_response": metrics.dose_response(scores, 50, 1),
        "training_metrics": pd.DataFrame(training),
        "sweep_summary": pd.DataFrame(sweep),
        "generations": generations,
        "judge_scores": scores,
        "vector_summary": pd.DataFrame(summary),
        "selection": metrics.selection(candidates),
        "selection_sensitivity": metrics.sensitivity(candidates),
        "judge_quality": pd.DataFrame(
            [
                quality("wordy", "pair_accuracy", "held-out pairs", 0.9712, 0.9, 0.99, 73),
                quality("wordy", "spearman", "elsewhere", None, None, None, 0, "absent: scores.jsonl"),
            ]
        ),
        "judge_calibration": pd.DataFrame([{"low": 0.0, "predicted": 0.1, "observed": 0.05, "lower": 0.01, "upper": 0.2, "n": 20}]),
        "conversation_lengths": length_balance(conversations),
    }
    versions = {name: [("", f"version-of-{name}")] for name in tables}
    versions["dose_response"] = [(f"{site}|e02", f"version-of-{site}") for site in SITES]
    study: dict[str, Any] = {"name": "trial", "title": "Trial & error", "seed": 11, "sites": 2, "doses": len(DOSES), "items": len(ITEMS)}
    return page.Facts(study, {"summary": "How <warm> it is."}, tables, versions, "{}|e{:02d}".format)


@pytest.fixture(scope="module")
def html() -> str:
    return page.render(facts())


@pytest.fixture(scope="module")
def seen(html: str) -> Page:
    return Page(html)


def test_nothing_outside_the_page_is_needed(seen: Page) -> None:
    assert all(link.startswith(("#", "data:")) for link in seen.links), seen.links
    assert not {"script", "link", "iframe", "img", "object", "embed"} & set(seen.tags)
    styles = " ".join(seen.styles)
    assert "@import" not in styles
    assert all(target.startswith("#") for target in re.findall(r"url\(['\"]?([^)'\"]*)", styles))


def test_the_first_lines_say_what_was_studied_and_on_how_much(seen: Page) -> None:
    assert "Study trial : 2 sites, 7 doses, 6 held-out prompts, seed 11." in seen.words
    assert "built-in" not in seen.words


def test_the_same_facts_give_the_same_page(html: str) -> None:
    assert page.render(facts()) == html


def test_every_figure_is_drawn_into_the_page_with_a_caption(seen: Page) -> None:
    assert seen.tags.count("figure") == seen.tags.count("svg") == seen.tags.count("figcaption") == 9
    for title in ("Warmth by dose", "Coherence by dose", "Training.", "Vector norms", "Coherence against steerability", "Judge calibration"):
        assert title in seen.words


def test_every_figure_names_the_data_versions_of_its_inputs(seen: Page) -> None:
    drawn = {"training_metrics", "vector_summary", "selection", "selection_sensitivity", "sweep_summary", "judge_calibration", "conversation_lengths"}
    for name in drawn:
        assert f"{name} version-of-{name}" in seen.words
    for site, headlines in zip(SITES, (0, 1), strict=True):  # of the vector that is selected
        assert seen.words.count(f"dose_response {site}|e02 version-of-{site}") == 2 + headlines  # the disposition's figure and coherence's
    for name in ("generations", "judge_scores", "judge_quality"):  # of the replies and tables
        assert seen.words.count(f"{name} version-of-{name}") == 1
    assert all(seen.words.count(f"{name} version-of-{name}") == 2 for name in ("selection", "training_metrics", "vector_summary"))
    assert "lineage: 2 data versions" in seen.words
    assert "lineage: 1 data version " in seen.words


def test_the_headline_has_the_ends_and_the_middle_with_intervals_and_n(seen: Page) -> None:
    for rubric, value in (("warmth", "2.25"), ("warmth", "5.25"), ("warmth", "8.25"), ("coherence", "6.5"), ("coherence", "8.75")):
        assert re.search(rf"{re.escape(value)} ?{rubric} at λ = ", seen.words), (rubric, value)
    assert len(re.findall(r"95% \[[\d.]+, [\d.]+\], n = 6", seen.words)) == 6


def test_the_selected_vector_is_named_and_marked(html: str, seen: Page) -> None:
    """L15 is the more coherent and the more steerable."""
    assert "The selected vector is m:L15 , epoch 2" in seen.words
    assert html.count('class="chosen"') == 1
    assert "no pairwise slopes" in seen.words


def test_numbers_of_judges_training_and_vectors_have_their_n_and_gaps_a_dash(seen: Page) -> None:
    rows = [[cell.strip() for cell in row] for row in seen.rows]
    assert ["wordy", "pair_accuracy", "held-out pairs", "0.971", "[0.9, 0.99]", "73", "measured"] in rows
    assert ["wordy", "spearman", "elsewhere", "–", "[–, –]", "0", "absent: scores.jsonl"] in rows
    assert ["m:L03", "1", "+1", "0.6", "0.8", "0.2", "16"] in rows
    assert ["m:L03", "1", "1", "–", "trained", "ab" * 8] in rows


def test_without_pairs_the_pareto_column_is_empty_and_not_a_no(seen: Page) -> None:
    (row,) = [[cell.strip() for cell in row] for row in seen.rows if row[0] == "m:L03" and "z over" in row[-1]]
    assert row[4].startswith("–")  # pairwise slope
    assert row[5:7] == ["–", "–"]  # score and Pareto


def test_markup_in_a_reply_stays_text(html: str, seen: Page) -> None:
    assert "<script" not in html
    assert "<b>bold</b>" not in html
    assert NASTY in seen.words
    assert "Prompt <0>?" in seen.words
    assert "How <warm> it is." in seen.words
    assert "Trial & error" in seen.words


def test_replies_stand_side_by_side_at_five_doses(seen: Page) -> None:
    (header,) = [row for row in seen.rows if row[0] == "prompt"]
    assert len(header) == 1 + 5
    assert header[1::2] == ["λ = -1.5", "λ = 0", "λ = 1.5"]
    rows = [row for row in seen.rows if row[0].startswith("Prompt <")]
    assert [row[0].split("item-")[1] for row in rows] == ["0", "1", "2", "3"]
    assert rows[1][1].startswith("reply of item-1 at -1.5")
    assert rows[1][1].endswith("warmth 2.1")  # 5 - 2 · 1.5 + 0.1
    assert rows[1][3].endswith("coherence 8.9, warmth 5.1")


@pytest.mark.parametrize(
    ("doses", "shown"),
    [((0.0, 1.0, -1.0), [-1.0, 0.0, 1.0]), (tuple(np.linspace(2, -2, 9)), [-2, -1, 0, 1, 2]), ((1.0,), [1.0])],
)
def test_example_doses_hold_both_ends_and_the_middle(doses: tuple[float, ...], shown: list[float]) -> None:
    assert page.example_doses(doses) == shown


@pytest.mark.parametrize(("value", "text"), [(1 / 3, "0.333"), (12345, "1.23e+04"), (0, "0"), (None, "–"), (float("nan"), "–"), (np.nan, "–")])
def test_numbers_have_three_digits_and_a_gap_a_dash(value: float | None, text: str) -> None:
    assert page.number(value) == text
