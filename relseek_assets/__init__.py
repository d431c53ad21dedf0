"""What relseek computes: one folder a stage, one TOML file a study, one folder a behaviour.

Dagster is known to `assets.py`, `checks.py` and `sensors.py` of a stage and to the modules at this root that assemble them
(`definitions`, `partitions`, `lineage`, `planning`, `cli`); every other module is plain Python.
"""
