"""What the assets run on: models, judges, storage and the published release.

Nothing here knows a study, a partition or Dagster; `relseek_assets` imports this package and never the other way round.
"""
