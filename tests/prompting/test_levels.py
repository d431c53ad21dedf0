"""What is asked for in words: the definition and the setting in the prompt, and examples that depend on the row's own key alone."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from relseek_assets.behaviour import BehaviourError, read_graded_replies
from relseek_assets.prompting.levels import Level, drawn, examples_of, level_prompt, persona_prompt, read_trait
from relseek_assets.prompting.steerability import SystemPrompts, level_rows
from relseek_assets.prompting.tables import PERSONA, STEERED
from relseek_assets.study import BEHAVIOURS

FOLDERS = sorted(folder for folder in BEHAVIOURS.iterdir() if (folder / "behaviour.toml").is_file())
LEVELS = [Level(number, 7, (number - 4) / 2) for number in range(1, 8)]


def prompts_of(folder: Path, count: int = 3, seed: int = 11) -> SystemPrompts:
    return SystemPrompts(read_trait(folder / "behaviour.toml"), examples_of(read_graded_replies(folder / "few_shots.jsonl")), count, "Plain.", seed)


def items(*names: str) -> pd.DataFrame:
    return pd.DataFrame({"conversation": names, "prompt": [[{"role": "user", "content": f"Hello from {name}"}] for name in names]})


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_a_level_prompt_holds_the_behaviour_and_says_which_of_how_many_levels(folder: Path) -> None:
    prompts = prompts_of(folder)
    text, shown = prompts.of("anyone", LEVELS[2], "item")
    for part in (prompts.trait.target, prompts.trait.antitarget, prompts.trait.summary):
        assert part in text
    assert "3 of 7" in text
    assert len(shown) == len(set(shown)) == 3
    by_id = {example.id: example for example in prompts.examples}
    assert all(by_id[name].least in text and by_id[name].most in text for name in shown)
    assert sum(example.most in text for example in prompts.examples) == 3


def test_prompts_of_two_levels_differ_in_their_setting_and_examples_alone() -> None:
    trait = read_trait(FOLDERS[0] / "behaviour.toml")
    low, high = (level_prompt(trait, Level(number, 9, 0.0), []) for number in (2, 8))
    assert low != high
    assert low.replace("2 of 9", "8 of 9").replace("setting 2", "setting 8") == high
    assert "5 halfway" in low


def test_a_rows_prompt_and_seed_are_the_same_whatever_rows_are_beside_it() -> None:
    prompts = prompts_of(FOLDERS[0])
    all_of_them = level_rows("one", items("a", "b", "c"), LEVELS, prompts)
    alone = level_rows("one", items("b"), LEVELS[5:6], prompts)[0]
    beside = next(row for row in all_of_them if (row.item, row.level.number) == ("b", 6))
    assert (alone.system, alone.examples, alone.seed) == (beside.system, beside.examples, beside.seed)
    assert len({row.seed for row in all_of_them}) == len(all_of_them)
    assert len({tuple(row.examples) for row in all_of_them}) > 10


def test_authors_are_shown_the_same_examples_and_draw_their_own_numbers() -> None:
    prompts = prompts_of(FOLDERS[0])
    one, other = (level_rows(author, items("a"), LEVELS, prompts) for author in ("one", "other"))
    assert [row.system for row in one] == [row.system for row in other]
    assert all(first.seed != second.seed for first, second in zip(one, other, strict=True))
    assert [row.examples for row in one] != [row.examples for row in level_rows("one", items("a"), LEVELS, prompts_of(FOLDERS[0], seed=12))]


def test_an_added_example_moves_no_two_others() -> None:
    examples = prompts_of(FOLDERS[0]).examples
    order = [example.id for example in drawn(examples[:-1], 99, 1, "row")]
    longer = [example.id for example in drawn(examples, 99, 1, "row") if example.id != examples[-1].id]
    assert order == longer


def test_the_steered_model_gets_the_plain_prompt_and_the_control_a_character() -> None:
    prompts = prompts_of(FOLDERS[0])
    assert all(prompts.of(STEERED, level, "x") == ("Plain.", []) for level in LEVELS)
    low, middle, high = (prompts.of(PERSONA, LEVELS[place], "x")[0] for place in (0, 3, 6))
    assert middle == "Plain."
    assert prompts.trait.antitarget in low
    assert prompts.trait.target not in low
    assert prompts.trait.target in high
    assert high == persona_prompt(prompts.trait, LEVELS[5], "Plain.")


def test_a_prompt_graded_once_shows_no_difference_and_is_no_example(tmp_path: Path) -> None:
    file = tmp_path / "few_shots.jsonl"
    file.write_text('{"id": "x", "history": [{"role": "user", "content": "Hi"}], "replies": [{"score": 3, "reply": "Yes."}]}\n')
    assert examples_of(read_graded_replies(file)) == []


def test_a_definition_without_its_texts_is_refused_by_field(tmp_path: Path) -> None:
    file = tmp_path / "behaviour.toml"
    file.write_text('name = "x"\ntitle = "X"\nsummary = "About X."\n[target]\ndefinition = "Much."\n')
    with pytest.raises(BehaviourError, match=r"behaviour\.toml: antitarget\.definition must be a text"):
        read_trait(file)
