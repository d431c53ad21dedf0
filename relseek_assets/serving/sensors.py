"""The sensor that asks deployed servers, so that one that was killed is not shown as running."""

from __future__ import annotations

import dagster as dg

from relseek_assets.serving import assets, deployments
from relseek_assets.stage import Stage


def build(stage: Stage) -> list[dg.SensorDefinition]:
    """The sensor of a study whose vectors can be served."""
    if assets.NAME not in stage.catalogue:
        return []

    @dg.sensor(
        name=f"{stage.study.name}_served_models",
        minimum_interval_seconds=60,
        default_status=dg.DefaultSensorStatus.RUNNING,
        description="Asks the servers that are deployed of the study's vectors, and reports those that say something new.",
        asset_selection=dg.AssetSelection.assets(stage.key(assets.NAME)),
        required_resource_keys={"store"},
    )
    def served_models(context: dg.SensorEvaluationContext) -> dg.SensorResult | dg.SkipReason:
        store = context.resources.store
        changed = deployments.look(store.folder(stage.study.name))
        if not changed:
            return dg.SkipReason("nothing new of what is deployed")
        events = assets.events(stage, store, context.instance, changed)
        return dg.SensorResult(asset_events=events, skip_reason="; ".join(map(deployments.told, changed)))

    return [served_models]
