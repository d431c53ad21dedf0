"""Covariates of participants for the robustness specifications, from any trial's own tables or from the published questionnaire.

Here belongs joining them to one row a participant. The questionnaire's answers and codes belong in `participants.py`.
"""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd

from relseek_assets.trial import Trial
from relseek_assets.trials import participants
from relseek_assets.trials.raw import AbsentTable, TrialFault
from relseek_resources.storage import Column, TableSchema

SOCIODEMOGRAPHICS, METADATA, TYPES, FACTORS = "sociodemographics", "metadata_with_dropout", "pre_treatment_preference_types", "psychosocial_factors"


def schema(trial: Trial) -> TableSchema:
    """The columns of the participant table that the declaration asks for; every covariate may be missing."""
    columns = [Column("participant", "string", "who"), Column("study", "string", "which trial", nullable=True)]
    if trial.questionnaire:
        columns += [Column(item.name, "string", f"{item.item}, coarsened", nullable=True, choices=item.levels) for item in participants.COARSENINGS]
        columns += [Column(name, "number", name.replace("_", " "), nullable=True) for name in (*participants.CARRIED, "education_years")]
        columns += [Column(name, "boolean", name.replace("_", " ")) for name in participants.DROPOUT]
        columns += [Column("cluster_name", "string", "attitude type before treatment", nullable=True, choices=participants.CLUSTERS)]
        columns += [Column(name, "number", name.replace("_", " "), "SD", nullable=True) for name in ("factor_1_score", *participants.FACTOR_SCORES)]
    else:
        taken = {"participant", "study"}
        for table in trial.participants:
            for column in trial.table_schema(table).columns:
                if column.name not in taken:
                    columns.append(column)
                    taken.add(column.name)
    return TableSchema("trial_participants", tuple(columns), ("participant",))


def participants_table(trial: Trial, tables: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """One row a participant with the columns of `schema`.

    Raises:
        TrialFault: a participant with two rows, or an answer that nobody knows.
    """
    names = schema(trial).names
    if trial.questionnaire:
        absent = [name for name in (SOCIODEMOGRAPHICS, METADATA) if name not in tables]
        if absent:
            raise AbsentTable(f"absent: {trial.tables[absent[0]].file}")
        raw = {name: as_published(trial, table) for name, table in tables.items()}
        found = participants.participants(raw[SOCIODEMOGRAPHICS], raw[METADATA], types=raw.get(TYPES), factors=raw.get(FACTORS))
        found = found.rename(columns={"ppt_id": "participant"}).reindex(columns=names)
        return found.astype({name: object for name in found.columns if isinstance(found[name].dtype, pd.CategoricalDtype)})
    joined: pd.DataFrame | None = None
    for name, table in tables.items():
        twice = table["participant"].duplicated()
        if twice.any():
            raise TrialFault(f"{name}: participant {table['participant'][twice].iloc[0]} has two rows; a table of participants has one each")
        mine = table.set_index("participant")
        joined = mine if joined is None else joined.combine_first(mine)  # of two tables that know something, the first
    if joined is None:
        raise AbsentTable("absent: " + ", ".join(trial.tables[name].file for name in trial.participants))
    return joined.reset_index().reindex(columns=names)


def as_published(trial: Trial, table: pd.DataFrame) -> pd.DataFrame:
    """A table under the column names of the raw files, which the analyses of the published instruments use."""
    return table.rename(columns={"participant": trial.participant, "dose": trial.dose.column})
