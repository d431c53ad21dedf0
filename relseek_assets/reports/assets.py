"""The report as an asset, stale when any number on it is."""

from __future__ import annotations

from collections.abc import Iterator

import dagster as dg
import pandas as pd

from relseek_assets.behaviour import FILES, read_toml
from relseek_assets.judging.one_judge import of_one_judge
from relseek_assets.partitions import multi_key, step_key
from relseek_assets.reports import axis_page, page, trial_page
from relseek_assets.settings import EMBEDDED
from relseek_assets.stage import PAGE, Stage, Work

GROUP = "reports"
PARTITIONED = ("dose_response", "training_metrics", "sweep_summary")
TRIAL_TABLES = ("trial_contrasts", "trial_forms", "trial_equivalence", "trial_fdr", "dose_response_curves", "trajectories", "trial_robustness")
AXIS_PARTITIONED = ("direction_quality", "persona_geometry", "persona_replies", "published_direction_quality")
AXIS_TABLES = (*AXIS_PARTITIONED, "published_intervention_scores")
INTERVENED = ("likeness_quality", "intervention_summary", "intervention_comparison", "drift", "drift_trends")  # where the study declares them
WHOLE = ("vector_summary", "selection", "selection_sensitivity", "judge_quality", "judge_calibration", "conversation_lengths")


def build(stage: Stage) -> None:
    if stage.study.steered:
        _report(stage)
    if stage.study.contrastive:
        _axis_report(stage)
    if stage.study.trial is not None:
        _trial_report(stage)


def _report(stage: Stage) -> None:
    study = stage.study

    @stage.asset(
        group=GROUP,
        version="1",
        description="One self-contained HTML page: figures with their lineage, numbers with their n, replies side by side.",
        deps={
            **dict.fromkeys((*PARTITIONED, "generations", "judge_scores"), dg.AllPartitionMapping()),
            **dict.fromkeys((*WHOLE, "behaviour_definition")),
        },
        settings=[study.title],
        form=PAGE,
    )
    def report(work: Work) -> Iterator[dg.AssetMaterialization]:
        definition = read_toml(study.behaviour_folder / FILES["behaviour_definition"])
        tables: dict[str, pd.DataFrame] = {}
        versions: dict[str, list[tuple[str, str]]] = {}
        for name in (*PARTITIONED, "generations", "judge_scores", *WHOLE):
            keys = work.upstream(name, None)
            tables[name] = pd.concat([work.read_table(name, key) for key in keys], ignore_index=True)
            versions[name] = [("" if key is None else str(key), work.version(name, key) or "") for key in keys]
        for name in ("judge_scores", "dose_response"):  # of several judges the one by whom the vector was selected
            tables[name] = _by_who_selects(tables[name][tables[name]["judge"].map(study.selects_by)])
        facts = page.Facts(
            study={
                "name": study.name,
                "title": study.title,
                "seed": study.seed,
                "sites": len(study.sites),
                "doses": len(study.doses.generated),
                "items": tables["generations"]["item"].nunique(),
                "judge": "" if study.judge.name == EMBEDDED else study.judge.name,
            },
            behaviour=definition,
            tables=tables,
            versions=versions,
            key=lambda site, epoch: multi_key(site, step_key(epoch)),
        )
        yield work.page(None, page.render(facts))


def _by_who_selects(scores: pd.DataFrame) -> pd.DataFrame:
    """Of each vector the rows of the judge that counted; of a vector that was no candidate because of its judges, all."""
    found = [scores.iloc[:0]]
    for _, part in scores.groupby(["site", "epoch"]):
        counted, fault = of_one_judge(part)
        found.append(part if fault else counted)
    return pd.concat(found, ignore_index=True)


def _axis_report(stage: Stage) -> None:
    study = stage.study
    intervened = [name for name in INTERVENED if name in stage.catalogue]
    names = (*AXIS_TABLES, *intervened)

    @stage.asset(
        group=GROUP,
        version="1",
        description="One self-contained HTML page: the quality of every direction, personas along the axis, replies, and the published artifacts.",
        deps={name: dg.AllPartitionMapping() if name in (*AXIS_PARTITIONED, *intervened) else None for name in names},
        settings=[study.title],
        form=PAGE,
        seconds=10.0,
    )
    def report(work: Work) -> Iterator[dg.AssetMaterialization]:
        tables: dict[str, pd.DataFrame] = {}
        versions: dict[str, list[tuple[str, str]]] = {}
        statuses: dict[str, str] = {}
        for name in names:
            keys = work.upstream(name, None)
            tables[name] = pd.concat([work.read_table(name, key) for key in keys], ignore_index=True)
            versions[name] = [("" if key is None else str(key), work.version(name, key) or "") for key in keys]
            statuses |= {f"{name} {key or ''}".strip(): status for key in keys if (status := work.status(name, key))}
        replies = tables["persona_replies"]
        personas = replies.drop_duplicates("persona")["persona_kind"].value_counts()
        facts = axis_page.AxisFacts(
            study={
                "name": study.name,
                "title": study.title,
                "seed": study.seed,
                "assistants": int(personas["assistant"]),
                "others": int(personas["other"]),
                "queries": replies["query"].nunique(),
                "replies": len(replies),
            },
            tables=tables,
            shown=axis_page.figures_of(tables, versions),
            statuses=statuses,
        )
        yield work.page(None, axis_page.render(facts))


def _trial_report(stage: Stage) -> None:
    study, trial = stage.study, stage.study.trial
    assert trial is not None

    @stage.asset(
        group=GROUP,
        version="1",
        description="One self-contained HTML page of the trial: main effects by family, curves, robustness, equivalence, and what has no estimate.",
        deps=dict.fromkeys(TRIAL_TABLES, dg.AllPartitionMapping()),
        settings=[study.title],
        form=PAGE,
        seconds=5.0,
    )
    def trial_report(work: Work) -> Iterator[dg.AssetMaterialization]:
        tables: dict[str, pd.DataFrame] = {}
        versions: dict[str, list[tuple[str, str]]] = {}
        for name in TRIAL_TABLES:
            keys = work.upstream(name, None)
            tables[name] = pd.concat([work.read_table(name, key) for key in keys], ignore_index=True)
            versions[name] = [(str(key), work.version(name, key) or "") for key in keys]
        tables["trial_contrasts"] = trial_page.with_families(tables["trial_contrasts"], tables["trial_fdr"])
        statuses = {str(key): status for key in work.upstream("trial_contrasts", None) if (status := work.status("trial_contrasts", key))}
        facts = trial_page.TrialFacts(
            study={"name": study.name, "title": study.title, "seed": study.seed, "fingerprint": trial.fingerprint},
            trial=trial,
            tables=tables,
            shown=trial_page.figures_of(trial, tables, versions),
            statuses=statuses,
        )
        yield work.page(None, trial_page.render(facts))
