"""Asset checks of a trial: every file is there and sound, and every mixed model reached its optimum."""

import dagster as dg

from relseek_assets.stage import STATUS, TABLE, Stage
from relseek_assets.trials.tables import FITS
from relseek_resources.storage import read_table


def build(stage: Stage) -> list[dg.AssetChecksDefinition]:
    trial = stage.study.trial
    assert trial is not None
    tables, fits = stage.key("trial_tables"), stage.key("trial_fits")

    @dg.asset_check(asset=tables, name="sound", description="No raw file has a fault; those that are absent are named.")
    def sound(context: dg.AssetCheckExecutionContext) -> dg.AssetCheckResult:
        absent: list[str] = []
        faults: list[str] = []
        for name in trial.tables:
            event = context.instance.get_latest_data_version_record(tables, False, name)
            found = event.event_log_entry.asset_materialization.metadata.get(STATUS) if event else None
            if found is not None:
                (absent if str(found.value).startswith("absent") else faults).append(str(found.value))
        return dg.AssetCheckResult(passed=not faults, metadata={"faults": "\n".join(faults) or "none", "absent": "\n".join(absent) or "none"})

    @dg.asset_check(asset=fits, name="converged", description="Every model reached an optimum.", required_resource_keys={"store"})
    def converged(context: dg.AssetCheckExecutionContext) -> dg.AssetCheckResult:
        failed, models = [], 0
        for key in trial.keys:
            path = context.resources.store.path(fits, key, TABLE)
            if path.is_file():
                frame = read_table(path, FITS).drop_duplicates("model")
                models += len(frame)
                failed += [f"{key} {row.model}" for row in frame.itertuples() if not row.converged]
        return dg.AssetCheckResult(passed=not failed, metadata={"models": models, "failed": ", ".join(failed) or "none"})

    return [sound, converged]
