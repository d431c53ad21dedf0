"""A trial as assets: raw tables by file, estimates by study and outcome, adjusted tests by family.

A file that is absent or faulty makes what reads it empty, with a status that says so, and leaves everything else alone.
"""

from __future__ import annotations

import contextlib
import pickle
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import dagster as dg
import pandas as pd

from relseek_assets.stage import Stage, Work, png
from relseek_assets.trial import Trial
from relseek_assets.trials import covariates, estimates, fdr, frames, instruments, raw, steps, tables
from relseek_assets.trials.frames import OutcomeFrame
from relseek_assets.trials.instruments import INSTRUMENTS, Instrument
from relseek_assets.trials.parts import SCHEMA, Begun
from relseek_assets.trials.raw import FAULTS, TrialFault, said
from relseek_resources.processes import FEWEST, in_order, prepare
from relseek_resources.storage import StorageError

GROUP = "trials"
_frames: dict[str, tuple[tuple[Any, ...], OutcomeFrame, bytes]] = {}  # by outcome: what they are made of, its rows, and these pickled
_begun: dict[str, tuple[tuple[Any, ...], Begun]] = {}  # by instrument: what it is made of, and its parts at work


def build(stage: Stage) -> None:
    study, partitions = stage.study, stage.partitions
    trial = study.trial
    assert trial is not None
    own, mine = partitions.of_my_tables(), dg.IdentityPartitionMapping()

    @stage.asset(
        group=GROUP,
        version="1",
        description="The raw files of the trial as tables: known studies and arms, one arm a participant, values within their range.",
        partitions=partitions.table,
        deps={"trial_files": mine},
        schema={name: trial.table_schema(name) for name in trial.tables},
        seconds=0.3,
    )
    def trial_tables(work: Work) -> Iterator[dg.AssetMaterialization]:
        if len(trial.keys) >= FEWEST:
            prepare(steps.__name__, instruments.__name__)  # files are read here, while the processes that will estimate start
        for name in work.partitions:
            assert name is not None
            try:
                path = raw.raw_path(trial, name, study.path)
                frame = raw.read_table(trial, name, path)
                trial.table_schema(name).to_arrow(frame, str(path))
            except (TrialFault, StorageError) as fault:
                yield work.nothing(name, str(fault))
                continue
            yield work.table(name, frame, {"file": str(path)})

    @stage.asset(
        group=GROUP,
        version="2",
        description="Polynomials of the dose compared, the one chosen, and whether pooled items differ in their effects.",
        partitions=partitions.outcome,
        deps={"trial_tables": own, "trial_declarations": mine},
        schema=tables.FORMS,
        seconds=0.3,
    )
    def trial_forms(work: Work) -> Iterator[dg.AssetMaterialization]:
        yield from by_outcome(work, steps.forms)

    @stage.asset(
        group=GROUP,
        version="2",
        description="Six models of each outcome: additive and full, by polynomial, category and level of the dose.",
        partitions=partitions.outcome,
        deps={"trial_tables": own, "trial_declarations": mine, "trial_forms": mine},
        schema=tables.FITS,
        seconds=0.4,
    )
    def trial_fits(work: Work) -> Iterator[dg.AssetMaterialization]:
        yield from by_outcome(work, steps.fits, "trial_forms")

    @stage.asset(
        group=GROUP,
        version="2",
        description="Contrasts of marginal means: main effects, moderation, change over time, dose-response coefficients.",
        partitions=partitions.outcome,
        deps={"trial_tables": own, "trial_declarations": mine, "trial_forms": mine, "trial_fits": mine},
        schema=tables.CONTRASTS,
        view=lambda rows: fdr.adjusted(rows, trial),
        seconds=0.3,
    )
    def trial_contrasts(work: Work) -> Iterator[dg.AssetMaterialization]:
        yield from by_outcome(work, steps.contrasts, "trial_forms", "trial_fits")

    @stage.asset(
        group=GROUP,
        version="1",
        description="Primary contrasts with Benjamini-Hochberg p-values within their local and measure families.",
        partitions=partitions.family,
        deps={"trial_contrasts": partitions.of_my_family()},
        settings=[[outcome.name, outcome.family, outcome.local_family] for outcome in trial.outcomes],
        schema=tables.FDR,
    )
    def trial_fdr(work: Work) -> Iterator[dg.AssetMaterialization]:
        tables: dict[str, pd.DataFrame] = {}
        missing: dict[str, dict[str, str]] = {}
        for family in map(str, work.partitions):
            keys = work.upstream("trial_contrasts", family)
            missing[family] = {str(key): status for key in keys if (status := work.status("trial_contrasts", key))}
            rows = [work.read_table("trial_contrasts", key) for key in keys if str(key) not in missing[family]]
            if rows:
                tables[family] = fdr.family_table(pd.concat(rows, ignore_index=True), trial, family)
        forests = in_order(partial(steps.forest, trial), tables.values(), len(tables))
        for family, absent in missing.items():
            if family in tables:
                shown = {"forest": png(next(forests)), **({"left_out": ", ".join(absent)} if absent else {})}
                yield work.table(family, tables[family], shown)
            else:
                yield work.nothing(family, "; ".join(dict.fromkeys(absent.values())) or "no outcome belongs to this family")

    @stage.asset(
        group=GROUP,
        version="1",
        description="Effects tested against the declared bounds within which they count as none.",
        partitions=partitions.outcome,
        deps={"trial_contrasts": mine, "trial_declarations": mine},
        schema=tables.EQUIVALENCE,
    )
    def trial_equivalence(work: Work) -> Iterator[dg.AssetMaterialization]:
        for key in work.partitions:
            assert key is not None
            status = work.status("trial_contrasts", key)
            margin = trial.of_key(key)[1].equivalence
            if status or margin is None:
                yield work.nothing(key, status or "no margin is declared")
                continue
            yield work.table(key, estimates.equivalence_table(work.read_table("trial_contrasts", key), margin))

    @stage.asset(
        group=GROUP,
        version="1",
        description="Mean outcome along the dose: marginal means of the additive model, and raw means of participants.",
        partitions=partitions.outcome,
        deps={"trial_tables": own, "trial_declarations": mine, "trial_forms": mine, "trial_fits": mine},
        schema=tables.CURVES,
        seconds=0.4,
    )
    def dose_response_curves(work: Work) -> Iterator[dg.AssetMaterialization]:
        yield from by_outcome(work, steps.curve, "trial_forms", "trial_fits")

    @stage.asset(
        group=GROUP,
        version="1",
        description="Mean outcome over time by arm: marginal means of the full model, and raw means of participants.",
        partitions=partitions.outcome,
        deps={"trial_tables": own, "trial_declarations": mine, "trial_forms": mine, "trial_fits": mine},
        schema=tables.TRAJECTORIES,
        seconds=0.3,
    )
    def trajectories(work: Work) -> Iterator[dg.AssetMaterialization]:
        yield from by_outcome(work, steps.trajectories, "trial_forms", "trial_fits")

    if trial.participants:

        @stage.asset(
            group=GROUP,
            version="1",
            description="One row a participant: arm, and covariates as the robustness specifications use them.",
            deps={"trial_tables": partitions.of_tables(*trial.participants)},
            settings=[trial.participants, trial.questionnaire],
            schema=covariates.schema(trial),
            seconds=0.5,
        )
        def trial_participants(work: Work) -> Iterator[dg.AssetMaterialization]:
            statuses = {name: work.status("trial_tables", name) for name in trial.participants}
            try:
                there = tuple(name for name, status in statuses.items() if not status)
                table = covariates.participants_table(trial, read_tables(work, there))
            except TrialFault as fault:
                yield work.nothing(None, str(fault))
                return
            yield work.table(None, table, {"left_out": "; ".join(filter(None, statuses.values())) or "nothing"})

    weights = trial.robustness.weights
    always = [weights.table] if weights else []

    @stage.asset(
        group=GROUP,
        version="2",
        description="The effect of the dose in every specification: covariates, attrition weights, and a Bayesian bootstrap over participants.",
        partitions=partitions.outcome,
        deps={
            "trial_tables": partitions.of_my_tables(*always),
            "trial_declarations": mine,
            "trial_forms": mine,
            "trial_fits": mine,
            **({"trial_participants": dg.AllPartitionMapping()} if trial.participants else {}),
        },
        settings=[study.seed, trial.bootstrap.draws],
        schema=tables.ROBUSTNESS,
        seconds=2.0,
    )
    def trial_robustness(work: Work) -> Iterator[dg.AssetMaterialization]:
        people = work.read_table("trial_participants") if trial.participants else None
        tables = [trial.robustness.weights.table] if trial.robustness.weights else []
        statuses = [work.status("trial_participants")] if trial.participants else []
        left_out = [status for status in (*statuses, *(work.status("trial_tables", name) for name in tables)) if status]
        try:
            of_participants = attrition_weights(work, trial)
        except TrialFault as fault:
            of_participants = None
            left_out.append(str(fault))

        def options(key: str) -> dict[str, Any]:
            return {
                "weights": of_participants if trial.of_key(key)[2].weighted else None,
                "draws": trial.bootstrap.draws,
                "seed": study.seed,
            }

        yield from by_outcome(work, steps.robustness, "trial_forms", "trial_fits", options=options, people=people, left_out=left_out)

    for name in trial.analyses:
        published_instrument(stage, trial, INSTRUMENTS[name])


def published_instrument(stage: Stage, trial: Trial, instrument: Instrument) -> None:
    """An analysis of the published instruments as an asset; parts whose files are absent say so in their row."""
    declared = declared_tables(trial, instrument)

    def body(work: Work) -> Iterator[dg.AssetMaterialization]:
        table = instrument.table(trial, begun(work, trial, instrument))
        figures = {f"plot_{title}": png(figure) for title, figure in instrument.figures(table, trial).items()}
        faults = "; ".join(status for name in declared if (status := work.status("trial_tables", name)))
        yield work.table(None, table, {**figures, "left_out": faults or "nothing"})

    body.__name__ = instrument.name
    stage.asset(
        group=GROUP,
        version="1",
        description=instrument.description,
        deps={
            "trial_tables": stage.partitions.of_tables(*declared),
            **({"trial_participants": None} if trial.participants else {}),
        },
        settings=[trial.study.values, declared],
        schema=SCHEMA,
        seconds=instrument.seconds,
    )(body)


def declared_tables(trial: Trial, instrument: Instrument) -> tuple[str, ...]:
    """Those raw tables of an instrument that the trial has."""
    return tuple(name for name in instrument.tables if name in trial.tables)


def begun(work: Work, trial: Trial, instrument: Instrument) -> Begun:
    """An instrument's parts at work. Those of the instruments that the same run computes after it are begun too, so that no core waits while one
    instrument is drawn and recorded; what was begun of other inputs than there are now is begun again.
    """

    def made_of(one: Instrument) -> tuple[Any, ...]:
        tables = [work.version("trial_tables", name) for name in declared_tables(trial, one)]
        return (work.context.run_id, *tables, work.version("trial_participants") if trial.participants else None)

    def begin(one: Instrument) -> tuple[tuple[Any, ...], Begun]:
        there = tuple(name for name in declared_tables(trial, one) if not work.status("trial_tables", name))
        people = work.read_table("trial_participants") if trial.participants else None
        return made_of(one), one.begin(read_tables(work, there), people if people is not None and len(people) else None)

    if not any(made[0] == work.context.run_id for made, _ in _begun.values()):
        _begun.clear()
        for name in sorted(work.beside.intersection(trial.analyses)):  # the order in which Dagster goes through them
            with contextlib.suppress(StorageError):  # of its own tables, which it will say itself
                _begun[name] = begin(INSTRUMENTS[name])
    made, found = _begun.pop(instrument.name, ((), None))
    return found if found is not None and made == made_of(instrument) else begin(instrument)[1]


def by_outcome(
    work: Work,
    step: steps.Step,
    *upstream: str,
    options: Callable[[str], Mapping[str, Any]] = lambda key: {},
    people: pd.DataFrame | None = None,
    left_out: Sequence[str] = (),
) -> Iterator[dg.AssetMaterialization]:
    """Make each outcome's partition; one that cannot be estimated says why and harms no other.

    Args:
        upstream: assets by outcome whose tables the step reads.
        people: covariates that the rows are to have beside.
        left_out: why specifications are missing, to be shown with every table.
    """
    trial = work.study.trial
    assert trial is not None
    keys = [str(key) for key in work.partitions]
    table = frames.covariates_table(people) if people is not None and len(people) else None
    plan = trial.fingerprint
    tasks = (task_of(work, trial, plan, key, step, upstream, options(key), table) for key in keys)
    with work.progress(len(keys), "outcome") as done:
        for partition, made in zip(work.partitions, in_order(steps.do, tasks, len(keys)), strict=True):
            if made.table is None:
                yield work.nothing(partition, made.fault)
            else:
                lacking = "; ".join(filter(None, (*left_out, made.left_out)))
                shown = {**({"plot": png(made.figure)} if made.figure else {}), **({"left_out": lacking} if lacking else {})}
                yield work.table(partition, made.table, shown)
            done()


def task_of(
    work: Work,
    trial: Trial,
    plan: str,
    key: str,
    step: steps.Step,
    upstream: tuple[str, ...],
    options: Mapping[str, Any],
    covariates: pd.DataFrame | None,
) -> steps.Task | steps.Made:
    """What is to be done for an outcome, or why nothing can be; `plan` is the trial's fingerprint."""
    read = [("trial_tables", table) for table in trial.tables_of(key)] + [(asset, key) for asset in upstream]
    if status := next((status for asset, partition in read if (status := work.status(asset, partition))), ""):
        return steps.Made(fault=status)
    try:
        token, frame, pickled = remembered_frame(work, trial, plan, key)
        if covariates is not None:
            pickled = pickle.dumps(frames.with_covariates(frame, covariates), pickle.HIGHEST_PROTOCOL)
            token = (*token, work.version("trial_participants"))
    except FAULTS as fault:
        return steps.Made(fault=said(fault, key))
    return steps.Task(step, token, pickled, {asset: work.read_table(asset, key) for asset in upstream}, options)


def remembered_frame(work: Work, trial: Trial, plan: str, key: str) -> tuple[tuple[Any, ...], OutcomeFrame, bytes]:
    """(what they are made of, an outcome's rows, the same pickled); kept in memory for the assets of the same process until that changes."""
    names = trial.tables_of(key)
    made_of = (
        key,
        plan,
        str(work.store.path(work.key("trial_tables"), None, "")),
        *(work.version("trial_tables", name) for name in names),
    )
    if (found := _frames.get(key)) is None or found[0] != made_of:
        frame = frames.outcome_frame(trial, key, read_tables(work, names))
        found = _frames[key] = (made_of, frame, pickle.dumps(frame, pickle.HIGHEST_PROTOCOL))
    return found


def read_tables(work: Work, names: tuple[str, ...]) -> Mapping[str, pd.DataFrame]:
    return {name: work.read_table("trial_tables", name) for name in names}


def attrition_weights(work: Work, trial: Trial) -> pd.Series | None:
    """Weights by participant, or None where none are declared or there."""
    weights = trial.robustness.weights
    if weights is None or work.status("trial_tables", weights.table):
        return None
    found = work.read_table("trial_tables", weights.table)[["participant", weights.column]].dropna().drop_duplicates()
    twice = found["participant"].duplicated()
    if twice.any():
        who = found["participant"][twice].iloc[0]
        raise TrialFault(f"{weights.table}: participant {who} has two values of {weights.column}; a participant has one weight")
    return found.set_index("participant")[weights.column]
