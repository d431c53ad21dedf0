"""Every partitions definition and every mapping of a study, side by side, and how keys are written and read.

Keys use `[A-Za-z0-9_:@-]` only, because other characters break the UI's selection grammar. `site` sorts before `step`, so the
site is the dimension that a user clicks.
"""

from __future__ import annotations

import re
import warnings
from dataclasses import dataclass

import dagster as dg

from relseek_assets.study import Study
from relseek_assets.trial import Trial

# Multi-dimensional mappings and backfill policies are marked beta in 1.13; tests pin what we rely on.
warnings.filterwarnings("ignore", category=dg.BetaWarning)


@dataclass(frozen=True)
class Cell:
    """A partition taken apart: site, epoch and dose, each None where the partition does not carry it."""

    site: str | None = None
    epoch: int | None = None
    multiplier: float | None = None


def epoch_key(epoch: int) -> str:
    return f"e{epoch:02d}"


def dose_text(multiplier: float) -> str:
    """A dose in key characters: -1.5 -> `-1_5`, 2 -> `2_0`."""
    return repr(float(multiplier) + 0.0).replace(".", "_")


def step_key(epoch: int, multiplier: float | None = None) -> str:
    """`e10`, or `e10@-1_5` at a dose."""
    return epoch_key(epoch) if multiplier is None else f"{epoch_key(epoch)}@{dose_text(multiplier)}"


def cell_of(key: str | None) -> Cell:
    """Read a partition key: `site`, `site|step`, or None for an unpartitioned asset."""
    if key is None:
        return Cell()
    site, _, step = str(key).partition("|")
    if not step:
        return Cell(site)
    found = re.fullmatch(r"e(\d+)(?:@(-?\d+_\d+))?", step)
    if found is None:
        raise ValueError(f"partition {key!r}: the step {step!r} is none of e10 and e10@-1_5")
    dose = found[2]
    return Cell(site, int(found[1]), None if dose is None else float(dose.replace("_", ".")))


def multi_key(site: str, step: str) -> dg.MultiPartitionKey:
    return dg.MultiPartitionKey({"site": site, "step": step})


def step_order(key: str) -> tuple[str, float]:
    epoch, _, dose = key.partition("@")
    return epoch, float(dose.replace("_", ".")) if dose else 0.0


class Partitions:
    """The partitions definitions of one study."""

    def __init__(self, study: Study) -> None:
        trained = sorted({epoch for model in study.models for epoch in range(1, model.epochs_trained + 1)})
        evaluated = sorted({epoch for model in study.models for epoch in model.epochs_evaluated})
        doses = sorted(study.doses.generated)
        self.site = dg.StaticPartitionsDefinition(list(study.sites))
        self.site_by_epoch = self._multi([step_key(epoch) for epoch in trained])
        self.site_by_evaluated_epoch = self._multi([step_key(epoch) for epoch in evaluated])
        self.site_by_dose = self._multi([step_key(epoch, dose) for epoch in evaluated for dose in doses])
        self.step_to_doses = {step_key(epoch): {step_key(epoch, dose) for dose in doses} for epoch in evaluated}
        self._evaluated = [step_key(epoch) for epoch in evaluated]
        self._study = study

        if study.trial is not None:
            self._of_trial(study.trial)

    def _of_trial(self, trial: Trial) -> None:
        self.table = dg.StaticPartitionsDefinition(list(trial.tables))
        self.outcome = dg.StaticPartitionsDefinition(list(trial.keys))
        self.family = dg.StaticPartitionsDefinition(list(trial.families) or ["none"])

    def _multi(self, steps: list[str]) -> dg.MultiPartitionsDefinition:
        return dg.MultiPartitionsDefinition({"site": self.site, "step": dg.StaticPartitionsDefinition(steps)})

    # --- mappings, named by what the downstream asset sees ------------------------------------------------------------

    def of_my_site(self) -> dg.PartitionMapping:
        """The one partition of my site, or from a site all of its steps."""
        return dg.MultiToSingleDimensionPartitionMapping(partition_dimension_name="site")

    def of_my_epoch(self) -> dg.PartitionMapping:
        """At a dose: the vector of my site and epoch."""
        return self._steps(dg.StaticPartitionMapping(self.step_to_doses))

    def of_my_doses(self) -> dg.PartitionMapping:
        """At an epoch: every dose of my site and epoch."""
        return self._steps(dg.StaticPartitionMapping({dose: step for step, doses in self.step_to_doses.items() for dose in doses}))

    def of_my_evaluated_epoch(self) -> dg.PartitionMapping:
        """At an evaluated epoch: the same epoch among those trained."""
        return self._steps(dg.StaticPartitionMapping({step: step for step in self._evaluated}))

    def of_my_tables(self, *always: str) -> dg.PartitionMapping:
        """At an outcome: the raw tables that it reads, and those that every outcome does."""
        trial = self._trial
        read = {name: {key for key in trial.keys if name in trial.tables_of(key)} for name in trial.tables}
        return dg.StaticPartitionMapping({name: set(trial.keys) if name in always else keys for name, keys in read.items() if keys or name in always})

    def of_my_family(self) -> dg.PartitionMapping:
        """At a family: the outcomes that belong to it, in every study."""
        trial = self._trial
        return dg.StaticPartitionMapping({key: trial.of_key(key)[1].family for key in trial.keys if trial.of_key(key)[1].family})

    def of_tables(self, *names: str) -> dg.PartitionMapping:
        """In an asset without partitions: these raw tables."""
        return dg.SpecificPartitionsPartitionMapping(list(names))

    @property
    def _trial(self) -> Trial:
        assert self._study.trial is not None, f"{self._study.name} declares no trial"
        return self._study.trial

    def _steps(self, mapping: dg.PartitionMapping) -> dg.PartitionMapping:
        return dg.MultiPartitionMapping(
            {
                "site": dg.DimensionPartitionMapping("site", dg.IdentityPartitionMapping()),
                "step": dg.DimensionPartitionMapping("step", mapping),
            }
        )

    def exists(self, key: str | None) -> bool:
        """Whether the study asks for a partition: models may train and evaluate different epochs."""
        cell = cell_of(key)
        if cell.site is None or cell.epoch is None:
            return True
        model = self._study.model_of(cell.site)
        return cell.epoch <= model.epochs_trained if cell.multiplier is None else cell.epoch in model.epochs_evaluated
