"""A small trial of nobody's, declared for tests: an outcome of each kind of model, arms of five doses and two factors."""

from __future__ import annotations

from typing import Any

import pandas as pd

from relseek_assets.trial import Trial
from relseek_assets.trials import contrasts, estimates, frames
from relseek_assets.trials.forms import Specification
from relseek_assets.trials.frames import OutcomeFrame

DOSES = [-1.0, -0.5, 0.0, 0.5, 1.0]
FACTORS: list[dict[str, Any]] = [
    {"column": "topic", "label": "Topic", "levels": ["sport", "music"]},
    {"column": "voice", "label": "Voice", "code": "Sound", "levels": ["non-human", "human"], "short": ["non", "hum"]},
]
TABLES: dict[str, dict[str, Any]] = {
    "answers": {
        "file": "answers.jsonl",
        "key": [],
        "columns": [
            {"names": ["trust", "warmth", "ease"], "low": -500, "high": 500},
            {"names": ["stayed"], "low": 0, "high": 1},
            {"names": ["proud"], "kind": "boolean"},
        ],
    },
    "diary": {"file": "diary.jsonl", "key": ["week"], "columns": [{"names": ["mood", "sleep"], "low": -500, "high": 500}]},
    "visits": {
        "file": "visits.csv",
        "key": ["moment"],
        "columns": [{"names": ["moment"], "kind": "string", "choices": ["before", "after"]}, {"names": ["pain"], "low": -500, "high": 500}],
    },
}
OUTCOMES: list[dict[str, Any]] = [
    {
        "name": "trust",
        "table": "answers",
        "items": ["trust"],
        "designs": {"main": {}},
        "family": "views",
        "local_family": "trust",
        "equivalence": 2.0,
    },
    {"name": "warmth", "table": "answers", "items": ["warmth", "ease"], "designs": {"main": {}}, "family": "views", "local_family": "warmth"},
    {"name": "stayed", "table": "answers", "items": ["stayed"], "model": "logit", "designs": {"main": {}}},
    {"name": "mood", "table": "diary", "items": ["mood"], "designs": {"main": {"time": "week", "endpoints": [1, 4]}}},
    {
        "name": "pain",
        "table": "visits",
        "items": ["pain"],
        "designs": {"main": {"where": {"moment": "after"}, "baseline": {"where": {"moment": "before"}}}},
    },
]


def trial(**changes: Any) -> Trial:
    """The declaration, with some of its settings replaced."""
    settings = {
        "participant": "who",
        "times": {"week": "w"},
        "study": {"values": {"main": "main"}},
        "dose": {"column": "arm", "values": DOSES},
        "factors": FACTORS,
        "tables": TABLES,
        "outcomes": OUTCOMES,
    }
    return Trial.model_validate(settings | changes)


def analysed(frame: OutcomeFrame, form: str = "linear", heterogeneous: bool = False) -> tuple[Specification, dict[str, Any], pd.DataFrame]:
    """(specification, fits, contrasts) of a frame with a polynomial that is given and not chosen."""
    specification = Specification(form, form, heterogeneous, None, pd.DataFrame())  # type: ignore[arg-type]
    fits = estimates.fit_all(frame, specification)
    return specification, fits, contrasts.contrasts(frame, fits)


def frame_of(declared: Trial, key: str, tables: dict[str, pd.DataFrame]) -> OutcomeFrame:
    return frames.outcome_frame(declared, key, tables)


def value(table: pd.DataFrame, contrast: str, variant: str = "primary", column: str = "estimate") -> float:
    """One figure of a table of contrasts."""
    return float(table.set_index(["contrast", "variant"]).loc[(contrast, variant), column])
