"""Assembles the code locations, one a study; nothing else happens here.

`from relseek_assets.definitions import quickstart` builds the location of `studies/quickstart.toml`; a new study is a new file.
"""

from __future__ import annotations

from typing import Any

import dagster as dg

from relseek_assets import sources
from relseek_assets.axes import assets as axes
from relseek_assets.dataset import assets as dataset
from relseek_assets.dataset import checks as dataset_checks
from relseek_assets.judging import agreement_assets as judge_agreement
from relseek_assets.judging import assets as judging
from relseek_assets.judging import checks as judging_checks
from relseek_assets.judging import published_assets as published_judging
from relseek_assets.judging import sensors as judging_sensors
from relseek_assets.prompting import assets as prompting
from relseek_assets.reports import assets as reports
from relseek_assets.selection import assets as selection
from relseek_assets.selection import checks as selection_checks
from relseek_assets.serving import assets as serving
from relseek_assets.serving import sensors as serving_sensors
from relseek_assets.stage import Stage, StageAsset, Store
from relseek_assets.study import Study, load_study, study_names
from relseek_assets.sweeps import assets as sweeps
from relseek_assets.sweeps import published_assets as published_sweeps
from relseek_assets.trials import assets as trials
from relseek_assets.trials import checks as trials_checks
from relseek_assets.vectors import assets as vectors
from relseek_resources.compute import Launcher, ModelLoader

STEERED = (dataset, vectors, sweeps, judging, judge_agreement, selection, serving)
CONTRASTIVE = (vectors, axes, serving)
PUBLISHED_SCORES = (published_sweeps, published_judging, judge_agreement, selection)
STEERED_CHECKS = (dataset_checks, judging_checks, selection_checks)


def build_stage(study: Study) -> Stage:
    """The assets of a study, without Dagster's code location around them."""
    stage = Stage(study)
    published = (*((vectors, serving) if study.published.vectors else ()), *(PUBLISHED_SCORES if study.published.scores else ()))
    modules = STEERED if study.steered else CONTRASTIVE if study.contrastive else published
    modules = (*modules, *((prompting,) if study.prompting is not None else ()))
    for module in (*modules, *((trials,) if study.trial is not None else ()), reports):
        module.build(stage)
    return stage


def build_definitions(study: Study, **overrides: Any) -> dg.Definitions:
    """One code location from one study; `overrides` replace the resources `store`, `models` and `launcher`."""
    stage = build_stage(study)
    checks = (*(STEERED_CHECKS if study.steered else ()), *((trials_checks,) if study.trial is not None else ()))
    batches = judging_sensors.build(stage)
    return dg.Definitions(
        assets=[*(asset.definition for asset in stage.catalogue.values()), *sources.assets(study)],
        asset_checks=[check for module in checks for check in module.build(stage)],
        sensors=[sources.changed_files(study), *batches.sensors, *serving_sensors.build(stage)],
        schedules=batches.schedules,
        jobs=batches.jobs,
        resources={"store": Store(), "models": ModelLoader(), "launcher": Launcher(), **overrides},
        executor=dg.in_process_executor,
    )


def catalogue(study: Study) -> dict[str, StageAsset]:
    return build_stage(study).catalogue


def __getattr__(name: str) -> dg.Definitions:
    if name in study_names():
        return build_definitions(load_study(name))
    raise AttributeError(f"module {__name__} has no study {name!r}; there is {', '.join(study_names())}")
