"""The published prompting experiments as tables of this project, `source = published`.

Here belongs what a published row means beside ours; where the release keeps it belongs in `relseek_resources/prompting_release.py`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from relseek_assets.persona_attacks import ATTACK_TYPES
from relseek_assets.prompting import tables
from relseek_assets.prompting.tables import REPLIED, STEERED
from relseek_resources.judges.answers import read_choice
from relseek_resources.prompting_release import PublishedAuthor, paid, rows_of
from relseek_resources.release import RATING_JUDGE
from relseek_resources.storage import StorageError, TableSchema

SOURCE = "published"


def prompted_generations(author: PublishedAuthor) -> pd.DataFrame:
    """Replies at every level. Their system prompts and examples were drawn afresh a row and are not published."""
    fields = ("test_prompt_id", "multiplier", "level", "num_levels", "response_str")
    rows = []
    for where, row in _rows([author.generations_file], fields):
        if int(row["num_levels"]) != author.levels:
            raise StorageError(f"{where}: num_levels is {row['num_levels']}, and the study declares {author.levels} doses")
        rows.append(
            {
                "author": author.name,
                "level": int(row["level"]),
                "multiplier": float(row["multiplier"]),
                "item": str(row["test_prompt_id"]),
                "reply": row["response_str"],
                "status": REPLIED,
                "model": row.get("model_name"),
                "source": SOURCE,
                **paid(row),
            }
        )
    return _frame(rows, tables.PROMPTED_GENERATIONS)


def level_scores(author: PublishedAuthor, doses: Sequence[float]) -> pd.DataFrame:
    """Ratings of those replies on every rubric that is there."""
    rows = []
    for rubric, path in author.rating_files.items():
        for where, row in rows_of(path, ("test_prompt_id", "multiplier", "score")):
            rows.append(
                {
                    "author": author.name,
                    "level": _level(row["multiplier"], doses, where),
                    "multiplier": float(row["multiplier"]),
                    "item": str(row["test_prompt_id"]),
                    "rubric": rubric,
                    **_scored(row),
                }
            )
    return _frame(rows, tables.LEVEL_SCORES)


def level_pairs(author: PublishedAuthor, doses: Sequence[float]) -> pd.DataFrame:
    """Comparisons with the steered model. An answer that is neither A nor B wins for nobody; the published count gives it to the steering vector."""
    rows = []
    for where, row in _rows([author.ranking_file], ("test_prompt_id", "steering_multiplier", "is_baseline_A", "model_response")):
        reading = read_choice(row["model_response"])
        first, second = ("author", STEERED) if row["is_baseline_A"] else (STEERED, "author")
        rows.append(
            {
                "author": author.name,
                "level": _level(row["steering_multiplier"], doses, where),
                "multiplier": float(row["steering_multiplier"]),
                "item": str(row["test_prompt_id"]),
                "judge": RATING_JUDGE,
                "first_shown": first,
                "winner": {"A": first, "B": second, None: None}[reading.choice],
                "status": "judged" if reading.choice else reading.status,
                "raw": row["model_response"],
                "model": RATING_JUDGE,
                "source": SOURCE,
                **paid(row),
            }
        )
    return _frame(rows, tables.LEVEL_PAIRS)


def attack_conversations(author: PublishedAuthor, doses: Sequence[float]) -> pd.DataFrame:
    """Every turn of every attacked conversation, of all themes that are there."""
    rows: list[dict[str, Any]] = []
    for path in author.attack_files(""):
        for where, row in rows_of(path, ("scenario_name", "multiplier", "conversation_history")):
            scenario = _scenario(row["scenario_name"], where)
            spoken = [message for message in row["conversation_history"] if message["role"] != "system"]
            system = next((message["content"] for message in row["conversation_history"] if message["role"] == "system"), None)
            turns = list(zip(spoken[::2], spoken[1::2], strict=False))
            if not turns or any((asked["role"], told["role"]) != ("user", "assistant") for asked, told in turns):
                raise StorageError(f"{where}: conversation_history does not take turns between user and assistant; mend or remove the line")
            for turn, (asked, told) in enumerate(turns):
                rows.append(
                    {
                        "author": _name(author),
                        **scenario,
                        "level": _level(row["multiplier"], doses, where),
                        "multiplier": float(row["multiplier"]),
                        "turn": turn,
                        "is_attack": turn == len(turns) - 1,
                        "user": asked["content"],
                        "reply": told["content"],
                        "system_prompt": system,
                        "status": REPLIED,
                        "model": row.get("model_type"),
                        "source": SOURCE,
                        # a conversation states one cost, for all of its turns together (spec/pipeline.md, 12)
                        **paid({}),
                    }
                )
    return _frame(rows, tables.ATTACK_CONVERSATIONS)


def attack_scores(author: PublishedAuthor, doses: Sequence[float]) -> pd.DataFrame:
    """The relationship score of every turn, of all themes that are there."""
    rows: list[dict[str, Any]] = []
    for path in author.attack_files("scores_"):
        for where, row in rows_of(path, ("experiment_id", "theme", "multiplier", "attack_type", "turn_index", "score")):
            name = re.fullmatch(rf"{re.escape(author.attack_name)}_(.+)_-?[\d.]+_\d+", row["experiment_id"])
            if name is None:
                raise StorageError(f"{where}: experiment_id {row['experiment_id']!r} does not begin with {author.attack_name}; correct it")
            rows.append(
                {
                    "author": _name(author),
                    **_scenario(name[1], where),
                    "level": _level(row["multiplier"], doses, where),
                    "multiplier": float(row["multiplier"]),
                    "turn": int(row["turn_index"]),
                    **_scored(row),
                }
            )
    found = pd.DataFrame(rows)
    if rows:
        found["is_attack"] = found["turn"] == found.groupby(["level", "scenario"])["turn"].transform("max")
    return _frame(found, tables.ATTACK_SCORES)


def _rows(paths: Iterable[Path | None], fields: tuple[str, ...]) -> Iterator[tuple[str, dict[str, Any]]]:
    for path in paths:
        if path is not None:
            yield from rows_of(path, fields)


def _frame(rows: Any, schema: TableSchema) -> pd.DataFrame:
    return pd.DataFrame(rows).reindex(columns=list(schema.names))


def _name(author: PublishedAuthor) -> str:
    return STEERED if author.steered else author.name


def _level(multiplier: Any, doses: Sequence[float], where: str) -> int:
    if float(multiplier) not in doses:
        raise StorageError(f"{where}: the dose {multiplier} is none of prompting.doses {list(doses)}; declare the doses of these files")
    return list(doses).index(float(multiplier)) + 1


def _scenario(name: str, where: str) -> dict[str, Any]:
    """`add_1_casual_chat` -> its theme and attack type."""
    found = re.fullmatch(rf"({'|'.join(ATTACK_TYPES)})_\d+_(.+)", name)
    if found is None:
        raise StorageError(f"{where}: the scenario {name!r} is not named TYPE_NUMBER_THEME; correct it")
    return {"scenario": name, "theme": found[2], "attack_type": found[1]}


def _scored(row: dict[str, Any]) -> dict[str, Any]:
    return {
        "judge": RATING_JUDGE,
        "score": float(row["score"]),
        "status": "scored" if 1 <= float(row["score"]) <= 10 else "out_of_range",
        "model": RATING_JUDGE,
        "source": SOURCE,
        **paid(row),
    }
