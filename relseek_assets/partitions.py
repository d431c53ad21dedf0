"""Every partitions definition and every mapping of a study, side by side, and how keys are written and read.

Keys use `[A-Za-z0-9_:@-]` only, because other characters break the UI's selection grammar. `site` sorts before `step`, so the
site is the dimension that a user clicks.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass

import dagster as dg

from relseek_assets.settings import DerivedSite, Prompting
from relseek_assets.study import Study, StudyError, layer_of
from relseek_assets.trial import Trial
from relseek_resources.axes_release import EXTRACTIONS, MODELS

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


def removed_from(found: DerivedSite, used: Study) -> tuple[str, int]:
    """The site and epoch of `used` whose vector a derived one is without.

    Raises:
        StudyError: `used` has no such site or epoch, or another model there.
    """
    remove, study = found.declared.remove, found.declared.name
    site = remove.site or next((site for site in used.sites if layer_of(site) == layer_of(found.site)), "")
    if site not in used.sites:
        raise StudyError(f"derived {study}: study {used.name} has no site {remove.site or found.site}; its sites are {', '.join(used.sites)}")
    trained = used.model_of(site).epochs_trained
    epoch = trained if remove.epoch is None else remove.epoch
    if not 1 <= epoch <= trained:
        raise StudyError(f"derived {study}: study {used.name} trains {trained} epochs; correct remove.epoch {epoch}")
    return site, epoch


class Partitions:
    """The partitions definitions of one study."""

    def __init__(self, study: Study) -> None:
        trained = sorted({epoch for model in study.models for epoch in range(1, model.epochs_trained + 1)})
        changed = {found.epoch for found in study.derived_sites.values()}
        evaluated = sorted({epoch for model in study.models for epoch in model.epochs_evaluated} | changed)
        doses = sorted(study.doses.generated)
        self.site = dg.StaticPartitionsDefinition(list(study.sites))
        # derived vectors are swept, judged and selected beside the others
        self.swept_site = dg.StaticPartitionsDefinition([*study.sites, *study.derived_sites])
        self.derived_site = dg.StaticPartitionsDefinition(list(study.derived_sites))
        self.site_by_epoch = self._multi(self.site, [step_key(epoch) for epoch in trained])
        self.derived_by_epoch = self._multi(self.derived_site, [step_key(epoch) for epoch in sorted(changed)])
        self.site_by_evaluated_epoch = self._multi(self.swept_site, [step_key(epoch) for epoch in evaluated])
        self.site_by_dose = self._multi(self.swept_site, [step_key(epoch, dose) for epoch in evaluated for dose in doses])
        self.step_to_doses = {step_key(epoch): {step_key(epoch, dose) for dose in doses} for epoch in evaluated}
        self._evaluated = [step_key(epoch) for epoch in evaluated]
        self.model = dg.StaticPartitionsDefinition([model.name for model in study.models])
        # of models where a study steers: by site, from which mappings to sites and doses exist
        self.modelled = self.model if study.contrastive else self.swept_site
        self.swept_by_epoch = self._multi(self.swept_site, [step_key(epoch) for epoch in trained])
        self.published_axis = dg.StaticPartitionsDefinition([f"{model}:{extraction}" for model in MODELS for extraction in EXTRACTIONS])
        self._study = study

        if study.trial is not None:
            self._of_trial(study.trial)
        if study.prompting is not None:
            self._of_prompting(study.prompting)

    def _of_trial(self, trial: Trial) -> None:
        self.table = dg.StaticPartitionsDefinition(list(trial.tables))
        self.outcome = dg.StaticPartitionsDefinition(list(trial.keys))
        self.family = dg.StaticPartitionsDefinition(list(trial.families) or ["none"])

    def _of_prompting(self, prompting: Prompting) -> None:
        self.author = dg.StaticPartitionsDefinition([author.name for author in prompting.authors])
        self.attacked = dg.StaticPartitionsDefinition(list(self._study.attacked_conversations))

    def _multi(self, sites: dg.StaticPartitionsDefinition, steps: list[str]) -> dg.MultiPartitionsDefinition:
        return dg.MultiPartitionsDefinition({"site": sites, "step": dg.StaticPartitionsDefinition(steps)})

    # --- mappings, named by what the downstream asset sees ------------------------------------------------------------

    def of_my_site(self) -> dg.PartitionMapping:
        """The one partition of my site, or from a site all of its steps."""
        return dg.MultiToSingleDimensionPartitionMapping(partition_dimension_name="site")

    def of_my_epoch(self) -> dg.PartitionMapping:
        """At a dose: the vector of my site and epoch, where my site is a trained one."""
        if not self._study.derived:
            return self._steps(dg.StaticPartitionMapping(self.step_to_doses))
        return self._sites_and_steps({site: {site} for site in self._study.sites}, self.step_to_doses)

    def of_my_trained_vector(self) -> dg.PartitionMapping:
        """At a vector's site and epoch: the vector, where my site is a trained one."""
        if not self._study.derived:
            return dg.IdentityPartitionMapping()
        steps = {key: {key} for key in self.swept_by_epoch.get_partitions_def_for_dimension("step").get_partition_keys()}
        return self._sites_and_steps({site: {site} for site in self._study.sites}, steps)

    def of_my_trained_site(self) -> dg.PartitionMapping:
        """At a trained site: the same among those that are trained or derived."""
        return dg.StaticPartitionMapping({site: {site} for site in self._study.sites})

    def of_my_swept_epoch(self) -> dg.PartitionMapping:
        """At a dose: my site and epoch, where sites are trained or derived."""
        return self._steps(dg.StaticPartitionMapping(self.step_to_doses))

    def of_my_derived_vector(self) -> dg.PartitionMapping:
        """At a dose: the vector of my site and epoch, where my site is a derived one."""
        steps = {step_key(found.epoch): self.step_to_doses[step_key(found.epoch)] for found in self._study.derived_sites.values()}
        return self._sites_and_steps({site: {site} for site in self._study.derived_sites}, steps)

    def of_my_origin(self) -> dg.PartitionMapping:
        """At a derived vector: the vector that it was made from."""
        sites: dict[str, set[str]] = {}
        for key, found in self._study.derived_sites.items():
            sites.setdefault(found.site, set()).add(key)
        steps = {step_key(found.epoch): {step_key(found.epoch)} for found in self._study.derived_sites.values()}
        return self._sites_and_steps(sites, steps)

    def of_what_is_removed(self, used: Study) -> dg.PartitionMapping:
        """At a derived vector: the vectors of another study that are taken out of it. Where two of one site take out different epochs, both."""
        sites: dict[str, set[str]] = {}
        steps: dict[str, set[str]] = {}
        for key, found in self._study.derived_sites.items():
            if found.declared.remove.study == used.name:
                site, epoch = removed_from(found, used)
                sites.setdefault(site, set()).add(key)
                steps.setdefault(step_key(epoch), set()).add(step_key(found.epoch))
        return self._sites_and_steps(sites, steps)

    def of(self, *keys: str) -> dg.PartitionMapping:
        """In an asset whose partitions do not say which: these."""
        return dg.SpecificPartitionsPartitionMapping(list(keys))

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

    def of_my_author(self) -> dg.PartitionMapping:
        """At attacked conversations: their author, where it is one that the study declares."""
        attacked = self._study.attacked_conversations
        authors = self._study.prompting.authors if self._study.prompting is not None else ()
        return dg.StaticPartitionMapping({author.name: {key for key in attacked if key.partition("@")[0] == author.name} for author in authors})

    @property
    def _trial(self) -> Trial:
        assert self._study.trial is not None, f"{self._study.name} declares no trial"
        return self._study.trial

    def _sites_and_steps(self, sites: Mapping[str, set[str]], steps: Mapping[str, set[str]]) -> dg.PartitionMapping:
        """From sites and steps upstream to those downstream."""
        return dg.MultiPartitionMapping(
            {
                "site": dg.DimensionPartitionMapping("site", dg.StaticPartitionMapping(dict(sites))),
                "step": dg.DimensionPartitionMapping("step", dg.StaticPartitionMapping(dict(steps))),
            }
        )

    def _steps(self, mapping: dg.PartitionMapping) -> dg.PartitionMapping:
        return dg.MultiPartitionMapping(
            {
                "site": dg.DimensionPartitionMapping("site", dg.IdentityPartitionMapping()),
                "step": dg.DimensionPartitionMapping("step", mapping),
            }
        )

    def exists(self, key: str | None, evaluated: bool = False) -> bool:
        """Whether the study asks for a partition: models may train and evaluate different epochs.

        Args:
            evaluated: it is one of an asset whose epochs are those evaluated.
        """
        cell = cell_of(key)
        if cell.site is None or cell.epoch is None:
            return True
        derived = self._study.derived_sites.get(cell.site)
        if derived is not None:
            return cell.epoch == derived.epoch
        model = self._study.model_of(cell.site)
        return cell.epoch in model.epochs_evaluated if evaluated or cell.multiplier is not None else cell.epoch <= model.epochs_trained
