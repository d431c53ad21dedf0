"""The published prompting experiments, from the release where RELSEEK_RELEASE has it: the figures of spec/pipeline.md, section 5."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pandas as pd
import pytest

from relseek_assets.prompting import analysis, published
from relseek_assets.prompting.tables import ATTACK_SCORES, LEVEL_PAIRS, LEVEL_SCORES, PROMPTED_GENERATIONS, STEERED
from relseek_resources.prompting_release import FOLDER, PublishedAuthor
from relseek_resources.release import Release, read_ratings
from relseek_resources.storage import StorageError

DOSES = (-1.5, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5)
VECTOR = ("Llama-3.1-70B-Instruct", 31, 10)
released = pytest.mark.skipif(not os.environ.get("RELSEEK_RELEASE"), reason="RELSEEK_RELEASE is not set")


def author(name: str, root: Path | None = None) -> PublishedAuthor:
    return PublishedAuthor(Release(root) if root else Release(Path(os.environ["RELSEEK_RELEASE"])), name, 7, VECTOR, name == STEERED)


@pytest.fixture(scope="module")
def scores() -> pd.DataFrame:
    """The vector's ratings at the doses of the levels, and both authors'."""
    steered = read_ratings(Release(Path(os.environ["RELSEEK_RELEASE"])).rating_files(*VECTOR)["relationship"])
    ours = steered[steered["multiplier"].isin(DOSES)].assign(author=STEERED, rubric="relationship", judge="gpt-4o-2024-08-06")
    theirs = [published.level_scores(author(name), DOSES) for name in ("claude", "gpt")]
    return pd.concat([ours, *(frame[frame["rubric"] == "relationship"] for frame in theirs)], ignore_index=True)


@released
def test_slopes_of_the_vector_claude_and_gpt_are_the_published_ones(scores: pd.DataFrame) -> None:
    slopes, models = analysis.level_models(scores)
    own = {(row.author, row.term): row.estimate for row in slopes[slopes["compared_with"].isna()].itertuples()}
    against = {(row.author, row.term): row.estimate for row in slopes[slopes["compared_with"].notna()].itertuples()}
    assert own[STEERED, "slope"] == pytest.approx(2.3863, abs=5e-5)
    assert own["claude", "slope"] == pytest.approx(1.8268, abs=5e-5)
    assert own["gpt", "slope"] == pytest.approx(0.7723, abs=5e-5)
    assert own[STEERED, "intercept"] == pytest.approx(5.0117, abs=5e-5)
    assert own[STEERED, "curvature"] == pytest.approx(0.0029, abs=5e-5)
    published_differences = {
        ("claude", "slope"): -0.5595,
        ("gpt", "slope"): -1.6140,
        ("claude", "intercept"): -1.4492,
        ("gpt", "intercept"): 0.4826,
        ("claude", "curvature"): 0.5868,
        ("gpt", "curvature"): -0.0587,
    }
    assert against == {key: pytest.approx(value, abs=5e-5) for key, value in published_differences.items()}
    model = models.iloc[0]
    assert model["n"] == 5145
    assert model["items"] == 245
    assert model["icc"] == pytest.approx(0.418, abs=5e-4)
    assert model["variance_item"] == pytest.approx(1.7233, abs=5e-4)  # published from another optimiser: 1.7235 here and in lme4
    assert model["variance_residual"] == pytest.approx(2.3975, abs=5e-5)
    assert model["log_likelihood"] == pytest.approx(-9905.248, abs=5e-4)


@released
def test_intervals_of_the_slopes_hold_the_estimates_and_tell_the_authors_apart(scores: pd.DataFrame) -> None:
    slopes, _ = analysis.level_models(scores)
    assert ((slopes["lower"] < slopes["estimate"]) & (slopes["estimate"] < slopes["upper"])).all()
    differences = slopes[(slopes["compared_with"] == STEERED) & (slopes["term"] == "slope")]
    assert (differences["upper"] < 0).all()


@released
def test_every_published_comparison_is_counted_once_and_an_answer_that_is_none_for_nobody() -> None:
    claude, gpt = published.level_pairs(author("claude"), DOSES), published.level_pairs(author("gpt"), DOSES)
    assert (len(claude), len(gpt)) == (1715, 1714)
    assert list(gpt.loc[gpt["winner"].isna(), "raw"]) == ["Neither A nor B"]
    shares = analysis.head_to_head(pd.concat([claude, gpt], ignore_index=True), 4)
    whole = shares[shares["level"].isna() & (shares["measure"] == "more")].set_index("author")
    # The published files count 787 of 1715 for Claude and 956 of 1714 for GPT: an answer with a space before its letter, which names the author
    # once in each file, was not recognised and went to the vector, as did the one that is none.
    assert whole.loc["claude", ["wins", "n", "without_winner"]].tolist() == [787 + 1, 1715, 0]
    assert whole.loc["gpt", ["wins", "n", "without_winner"]].tolist() == [956 + 1, 1713, 1]
    at_the_ends = shares[(shares["measure"] == "more") & shares["level"].isin([1, 7])].set_index(["author", "level"])
    assert at_the_ends.loc[("gpt", 1), "wins"] == 221
    assert at_the_ends.loc[("gpt", 7), "wins"] == 25
    stronger = shares[shares["level"].isna() & (shares["measure"] == "stronger")].set_index("author")["share"]
    assert stronger["gpt"] < 0.2, "GPT hardly goes as far as the vector either way"


@released
def test_published_winners_agree_with_the_answers_read_strictly() -> None:
    found = published.level_pairs(author("gpt"), DOSES).set_index(["item", "level"])
    path = author("gpt").ranking_file
    assert path is not None
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    ours = [found.loc[(str(row["test_prompt_id"]), row["baseline_level"]), "winner"] for row in rows]
    theirs = ["author" if row["winner"] == "gpt" else STEERED for row in rows]
    differing = [row["model_response"] for row, mine, others in zip(rows, ours, theirs, strict=True) if mine != others]
    assert sorted(differing) == [" A", "Neither A nor B"]


@released
def test_shifts_of_the_published_attacks_are_means_of_their_scores() -> None:
    frames = [published.attack_scores(author(name), DOSES) for name in (STEERED, "claude", "gpt")]
    assert [len(frame) for frame in frames] == [96, 96, 0]  # of five themes and three authors the copy holds these
    shifts = analysis.attack_shifts(pd.concat(frames[:2], ignore_index=True))
    own = shifts[shifts["compared_with"].isna()].set_index(["author", "level", "attack_type"])
    # means by turn at dose 0: vector 7.25 5.5 5.75 then 8.25 under `add`; Claude 4.5 2.25 3.25 then 1.5 under `subtract`
    assert own.loc[(STEERED, 4, "add"), "estimate"] == pytest.approx(8.25 - (7.25 + 5.5 + 5.75) / 3)
    assert own.loc[("claude", 4, "subtract"), "estimate"] == pytest.approx(1.5 - (4.5 + 2.25 + 3.25) / 3)
    assert own.loc[("claude", 7, "subtract"), "estimate"] == pytest.approx(4.5 - (8.75 + 9 + 9) / 3)
    assert own.loc[(STEERED, 4, "add"), ["scenarios", "n", "df"]].tolist() == [4, 4, 3]


@released
def test_tables_hold_what_their_schemas_promise() -> None:
    for name in ("claude", "gpt"):
        assert len(PROMPTED_GENERATIONS.to_arrow(published.prompted_generations(author(name)), name)) == 1715
        assert len(LEVEL_SCORES.to_arrow(published.level_scores(author(name), DOSES), name)) == 2 * 1715
        LEVEL_PAIRS.to_arrow(published.level_pairs(author(name), DOSES), name)
    conversations = published.attack_conversations(author(STEERED), DOSES)
    assert len(conversations) == 96
    assert set(conversations.loc[conversations["is_attack"], "turn"]) == {3}
    ATTACK_SCORES.to_arrow(published.attack_scores(author(STEERED), DOSES), "steered")


# --- without a release ------------------------------------------------------------------------------------------------


def written(root: Path, place: str, *rows: dict[str, object]) -> None:
    path = root / FOLDER / place
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_every_theme_in_the_format_is_read_whatever_its_name(tmp_path: Path) -> None:
    for theme in ("casual_chat", "a_theme_of_tomorrow"):
        fixed = {"theme": theme, "multiplier": -1.5, "attack_type": "add", "experiment_id": f"gpt_add_1_{theme}_-1.5_0"}
        rows = [{**fixed, "turn_index": turn, "score": 2.0 + turn} for turn in range(4)]
        written(tmp_path, f"exp2_stability/levels_7/persona_stability_scores_gpt_{theme}.jsonl", *rows)
    found = published.attack_scores(author("gpt", tmp_path), DOSES)
    assert sorted(found["theme"].unique()) == ["a_theme_of_tomorrow", "casual_chat"]
    assert set(found["scenario"]) == {"add_1_casual_chat", "add_1_a_theme_of_tomorrow"}
    assert found.loc[found["is_attack"], "score"].tolist() == [5.0, 5.0]


def test_what_is_not_there_is_no_row_and_no_error(tmp_path: Path) -> None:
    for read in (published.prompted_generations,):
        assert read(author("gpt", tmp_path)).empty
    for read_at in (published.level_scores, published.level_pairs, published.attack_conversations, published.attack_scores):
        assert read_at(author("gpt", tmp_path), DOSES).empty
    assert author("gpt", tmp_path).files == []


def test_a_row_of_a_level_that_the_study_does_not_declare_is_refused_by_name(tmp_path: Path) -> None:
    written(tmp_path, "exp1_steerability/gpt_levels_7/relationship_scores.jsonl", {"test_prompt_id": 1, "multiplier": 2.0, "score": 5})
    with pytest.raises(StorageError, match=r"relationship_scores\.jsonl, line 1: the dose 2\.0 is none of prompting\.doses"):
        published.level_scores(author("gpt", tmp_path), DOSES)


def test_nine_levels_have_files_of_their_own(tmp_path: Path) -> None:
    written(tmp_path, "exp1_steerability/gpt_levels_9/relationship_scores.jsonl", {"test_prompt_id": 1, "multiplier": 2.0, "score": 5})
    nine = PublishedAuthor(Release(tmp_path), "gpt", 9, VECTOR)
    assert published.level_scores(nine, (-2.0, *DOSES, 2.0))["level"].tolist() == [9]
