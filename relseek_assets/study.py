"""A study: one TOML file, read into a validated `Study`.

Here belong what holds between its sections, what a study is once they are read, and where study files are found. The sections themselves belong in
`settings.py`; what a setting does belongs in the stage that reads it.
"""

from __future__ import annotations

import difflib
import os
import re
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, Field, ValidationError, model_validator
from pydantic_core import to_jsonable_python

from relseek_assets.behaviour import FILES, BehaviourError, read_rubrics
from relseek_assets.persona_attacks import FILE as PERSONA_ATTACKS
from relseek_assets.persona_attacks import read_persona_attacks
from relseek_assets.persona_set import PersonaSet, PersonaSetError, persona_folder, read_persona_set
from relseek_assets.settings import (
    EMBEDDED,
    KEY,
    Compute,
    Contrast,
    Derived,
    DerivedSite,
    Doses,
    Drift,
    Interventions,
    Judge,
    LanguageJudge,
    Model,
    Pairs,
    Prompting,
    Prompts,
    Published,
    SamplingSettings,
    Settings,
    Training,
    no_repeats,
)
from relseek_assets.trial import Trial
from relseek_resources.judges.prices import PriceError, price_of
from relseek_resources.models.loading import describe
from relseek_resources.release import RATING_JUDGE
from relseek_resources.storage import StorageError

STUDIES = Path(__file__).parent / "studies"
BEHAVIOURS = Path(__file__).parent / "behaviours"
DEFINITION = FILES["behaviour_definition"]
MOST_PARTITIONS_OF_A_FAN_IN = 99  # beyond it Dagster reports a fan-in as fresh without looking
STEERED = (
    "behaviours",
    "models",
    "pairs",
    "training",
    "doses",
    "prompts",
    "sampling",
    "judge",
    "judges",
    "prompting",
    "compute",
)  # what only a study that trains vectors has
CONTRASTED = ("personas", "contrast", "interventions", "drift")  # what only a study of persona directions has
TRAINED = ("layers", "epochs_trained", "epochs_evaluated")  # of a model that vectors are trained for
VECTORED = ("published", "uses", "derived")  # what only a study with steering vectors has


class StudyError(ValueError):
    """A study file that cannot be used; the message names the file, the key and what to do."""


class Study(Settings):
    """One study. `path` is the file it came from.

    A study that trains vectors (`bipo`) has a behaviour, models and doses; one of persona directions (`contrastive`) has models and personas; a
    `trial` has none of them and reads analysis tables.
    """

    name: str
    title: str = ""
    kind: Literal["bipo", "contrastive", "trial"]
    behaviours: tuple[str, ...] = Field(default=(), max_length=1)
    seed: int = 0
    dose_limit: float = Field(default=20.0, gt=0)
    models: tuple[Model, ...] = ()
    pairs: Pairs = Pairs()
    training: Training = Training()
    doses: Doses = Field(default_factory=Doses)
    prompts: Prompts = Prompts()
    sampling: SamplingSettings = SamplingSettings()
    judge: Judge = Judge()
    judges: tuple[LanguageJudge, ...] = ()
    prompting: Prompting | None = None
    compute: Compute = Compute()
    personas: str = ""
    contrast: Contrast = Contrast()
    interventions: Interventions | None = None
    drift: Drift | None = None
    published: Published = Published()
    uses: dict[str, tuple[Literal["steering_vectors", "directions"], ...]] = Field(default_factory=dict)
    derived: tuple[Derived, ...] = ()
    trial: Trial | None = None
    path: Path = Field(default=Path(), exclude=True)

    @model_validator(mode="after")
    def _complete(self) -> Study:
        if self.kind == "trial":
            if self.trial is None:
                raise ValueError("trial: missing; a study of the kind 'trial' declares its files, arms and outcomes there")
            given = [name for name in (*STEERED, *VECTORED, *CONTRASTED) if name in self.model_fields_set]
            if given:
                kind = "contrastive" if given[0] in CONTRASTED else "bipo"
                raise ValueError(f"{given[0]}: a study of the kind 'trial' trains nothing; remove it, or make the kind {kind!r}")
            return self
        return self._complete_contrastive() if self.contrastive else self._complete_bipo()

    def _complete_contrastive(self) -> Study:
        given = [name for name in (*STEERED, *VECTORED, "trial") if name != "models" and name in self.model_fields_set]
        if given:
            raise ValueError(f"{given[0]}: a study of the kind 'contrastive' does not read it; remove it, or make the kind 'bipo'")
        for name in ("models", "personas"):
            if not getattr(self, name):
                raise ValueError(f"{name}: missing; add it")
        for number, model in enumerate(self.models):
            for name in (*TRAINED, "epochs_judged"):
                if name in model.model_fields_set:
                    raise ValueError(f"models.{number}.{name}: a contrastive study reads every layer in one pass and trains no epochs; remove it")
        try:
            personas = read_persona_set(self.persona_folder)
        except (PersonaSetError, StorageError) as error:
            raise ValueError(f"personas: {error}") from error
        for name, of_kind in (("assistants_per_query", personas.assistants), ("others_per_query", personas.others)):
            if getattr(self.contrast, name) > len(of_kind):
                raise ValueError(
                    f"contrast.{name}: {getattr(self.contrast, name)} personas a query, but {personas.folder} has {len(of_kind)} of them"
                )
            if len(of_kind) < 2:
                raise ValueError(f"personas: {personas.folder} has one persona of the kind {of_kind[0].kind!r}; holding one out needs two")
        self._check_interventions(personas)
        return self

    def _check_interventions(self, personas: PersonaSet) -> None:
        if self.interventions is None:
            if self.drift is not None:
                raise ValueError("drift: its floor works after the layers of [interventions], which is missing; add it or remove [drift]")
            return
        others = [persona.name for persona in personas.others]
        unknown = [name for name in self.interventions.personas if name not in others]
        if unknown:
            raise ValueError(f"interventions.personas: {unknown[0]!r} is no persona of the kind 'other' of {personas.folder}; there is {others}")
        if not (self.interventions.personas or personas.hostile):
            raise ValueError(f"interventions.personas: {personas.folder} has no hostile persona; name personas, or mark some as hostile")
        for model in self.models:
            description = describe(model.source)
            lacking = [layer for layer in self.interventions.layers if description is not None and layer >= description.layers]
            if lacking and description is not None:
                raise ValueError(f"interventions.layers: {lacking} do not exist: {model.source} has the blocks 0 to {description.layers - 1}")

    def _complete_bipo(self) -> Study:
        given = [name for name in CONTRASTED if name in self.model_fields_set]
        if given:
            raise ValueError(f"{given[0]}: a study of the kind 'bipo' does not read it; remove it, or make the kind 'contrastive'")
        for name in ("behaviours", "models"):
            if not getattr(self, name):
                raise ValueError(f"{name}: missing; add it")
        for number, model in enumerate(self.models):
            for name in TRAINED:
                if name not in model.model_fields_set:
                    raise ValueError(f"models.{number}.{name}: missing; add it")
        if self.published.scores and not self.published.vectors:
            raise ValueError("published.scores: they are of published vectors; set published.vectors too")
        for number, model in enumerate(self.models):
            if model.epochs_judged and not self.published.scores:
                raise ValueError(f"models.{number}.epochs_judged: read with published.scores alone; a study of one's own judges all it evaluates")
        if self.published.vectors and not self.published.scores:
            return self._complete_published()
        if "doses" not in self.model_fields_set:
            raise ValueError("doses: missing; add it")
        if len(self.doses.generated) < 2:
            raise ValueError("doses.generated: a study needs at least two doses; add them")
        return self._complete_published() if self.published.vectors else self

    def _complete_published(self) -> Study:
        if self.prompting is not None and not self.prompting.published:
            raise ValueError("prompting.authors: nothing is generated where vectors are published; make every author of the kind 'published'")
        read = ("behaviours", "models", "prompting", *(("doses", "judge") if self.published.scores else ()))
        given = [name for name in STEERED if name not in read and name in self.model_fields_set]
        if given:
            raise ValueError(f"{given[0]}: a study whose vectors are published trains and sweeps nothing; remove it, or drop published.vectors")
        for number, model in enumerate(self.models):
            if model.known_width is None:
                raise ValueError(f"models.{number}.width: missing; {model.source} is not on this machine, so say how wide its residual stream is")
        return self

    @model_validator(mode="after")
    def _checked(self) -> Study:
        if not re.fullmatch(r"[A-Za-z0-9_]+", self.name):
            raise ValueError(f"name: {self.name!r} prefixes asset keys; use letters, digits and '_' only")
        no_repeats("models", [model.name for model in self.models])
        beyond = [dose for dose in self.doses.generated if abs(dose) > self.dose_limit]
        if beyond:
            raise ValueError(f"doses.generated: {beyond} lie beyond dose_limit {self.dose_limit:g}; drop them or raise dose_limit")
        if self.behaviours and not (self.behaviour_folder / DEFINITION).is_file():
            known = sorted(folder.name for folder in BEHAVIOURS.iterdir() if (folder / DEFINITION).is_file())
            raise ValueError(
                f"behaviours: {self.behaviour!r} has no folder under {BEHAVIOURS}, and {self.behaviour_folder} has no {DEFINITION}; there is "
                f"{', '.join(known)}"
            )
        if len(self.sites) > MOST_PARTITIONS_OF_A_FAN_IN:
            raise ValueError(f"models: {len(self.sites)} sites; a study may have {MOST_PARTITIONS_OF_A_FAN_IN}, so split it into several files")
        if len(self.doses.generated) > MOST_PARTITIONS_OF_A_FAN_IN:
            raise ValueError(f"doses.generated: {len(self.doses.generated)} doses; a study may have {MOST_PARTITIONS_OF_A_FAN_IN}")
        self._check_derived()
        self._check_judges()
        self._check_prompting()
        return self

    def _check_prompting(self) -> None:
        wanted = self.prompting
        if wanted is None:
            return
        if wanted.site not in (*self.sites, *self.derived_sites):
            raise ValueError(f"prompting.site: {wanted.site!r} is no site of this study; there is {', '.join((*self.sites, *self.derived_sites))}")
        derived = self.derived_sites.get(wanted.site)
        epochs = (derived.epoch,) if derived else self.model_of(wanted.site).epochs_evaluated
        if wanted.epoch not in epochs:
            raise ValueError(f"prompting.epoch: {wanted.epoch} is not evaluated at {wanted.site}; there is {', '.join(map(str, epochs))}")
        if wanted.published:
            if not self.published.scores:
                raise ValueError("prompting.authors: published ones are compared with published scores; set published.scores")
            unread = ("examples", "attacked", "themes", "judges", "family", "steered_endpoint")
            given = {name for name in unread if name in wanted.model_fields_set}
            if given:
                raise ValueError(f"prompting.{min(given)} is not read where everything is published; remove it")
            return
        lacking = [dose for dose in wanted.doses if dose not in self.doses.generated]
        if lacking:
            raise ValueError(f"prompting.doses: {lacking} are not generated; add them to doses.generated")
        try:
            themes = list(read_persona_attacks(self.behaviour_folder / PERSONA_ATTACKS).themes)
        except BehaviourError as error:
            raise ValueError(f"prompting: {error}") from error
        unknown = [theme for theme in wanted.themes if theme not in themes]
        if unknown:
            raise ValueError(f"prompting.themes: {unknown[0]!r} is no theme of {PERSONA_ATTACKS}; there is {', '.join(themes)}")
        at_once = [judge.name for judge in self.judges if judge.kind == "openai"]
        unknown = [name for name in wanted.judges if name not in at_once]
        if unknown:
            raise ValueError(f"prompting.judges: {unknown[0]!r} is none of [[judges]] of the kind 'openai'; there is {', '.join(at_once) or 'none'}")
        judges = {judge.name for judge in self.judges}
        if shared := [author.name for author in wanted.authors if author.name in judges]:
            raise ValueError(
                f"prompting.authors: {shared[0]!r} of [[prompting.authors]] has the name of one of [[judges]]; give one of the two another name, "
                "for what each was paid is kept by its name"
            )
        if len(self.attacked_conversations) > MOST_PARTITIONS_OF_A_FAN_IN:
            raise ValueError(f"prompting: {len(self.attacked_conversations)} authors by themes; a study may have {MOST_PARTITIONS_OF_A_FAN_IN}")

    @property
    def attacked_conversations(self) -> tuple[str, ...]:
        """Author and theme of every set of attacked conversations, `steered@casual`; of published ones the author alone."""
        assert self.prompting is not None, f"{self.name} declares no prompting experiments"
        authors = [author.name for author in self.prompting.authors]
        if self.prompting.published:
            return ("steered", *authors)
        themes = self.prompting.themes or tuple(read_persona_attacks(self.behaviour_folder / PERSONA_ATTACKS).themes)
        return tuple(f"{author}@{theme}" for author in ("steered", "persona", *authors) for theme in themes)

    @property
    def prompting_judges(self) -> tuple[LanguageJudge, ...]:
        """The language judges of the prompting experiments, asked at once."""
        assert self.prompting is not None, f"{self.name} declares no prompting experiments"
        return tuple(judge for judge in self.judges if judge.kind == "openai" and judge.name in (self.prompting.judges or (judge.name,)))

    def _check_judges(self) -> None:
        names = [judge.name for judge in self.judges]
        no_repeats("judges", names)
        if self.published.scores:
            if self.judge.name != RATING_JUDGE:
                raise ValueError(f"judge.name: {self.judge.name!r} gave no published ratings of coherence; set it to {RATING_JUDGE!r}")
            return
        if self.judge.name not in (EMBEDDED, *names):
            there = f"; there is {', '.join(names)}" if names else " and there are none; add one or take 'embedded'"
            raise ValueError(f"judge.name: {self.judge.name!r} is neither 'embedded' nor one of [[judges]]{there}")
        if not self.judges:
            return
        try:
            rubrics = [rubric.name for rubric in read_rubrics(self.behaviour_folder).values()]
        except (BehaviourError, StorageError) as error:
            raise ValueError(f"judges: {error}") from error
        for number, judge in enumerate(self.judges):
            unknown = [name for name in judge.rubrics if name not in rubrics]
            if unknown:
                raise ValueError(f"judges.{number}.rubrics: {self.behaviour} has no rubric {unknown[0]!r}; its rubrics are {', '.join(rubrics)}")
            lacking = [name for name in rubrics[:2] if judge.rubrics and name not in judge.rubrics]
            try:
                price_of(judge.model, judge.price)
            except PriceError as error:
                raise ValueError(f"judges.{number}: {error}") from error
            if judge.name == self.judge.name and lacking:
                raise ValueError(f"judge.name: selection needs a rating of {lacking[0]}, which {judge.name!r} does not give; add it to its rubrics")

    def _check_derived(self) -> None:
        for name in self.uses:
            if name == self.name:
                raise ValueError(f"uses.{name}: a study has its own assets without this; remove it")
            if not self._file_of(name).is_file():
                raise ValueError(f"uses.{name}: no study of this name beside {self.path or 'this file'} or among {', '.join(study_names())}")
        no_repeats("derived", [derived.name for derived in self.derived])
        for number, derived in enumerate(self.derived):
            where = f"derived.{number}"
            if not KEY.fullmatch(derived.name):
                raise ValueError(f"{where}.name: {derived.name!r} becomes part of partition keys; use letters, digits, '_' and '-' only")
            if derived.remove.study not in self.uses:
                raise ValueError(f"{where}.remove.study: {derived.remove.study!r} is not among the studies used; add it under [uses]")
            unknown = [site for site in derived.origin.sites if site not in self.sites]
            if unknown:
                raise ValueError(f"{where}.from.sites: {unknown} are no sites of this study; there is {', '.join(self.sites)}")
        for key, found in self.derived_sites.items():
            if not 1 <= found.epoch <= self.model_of(found.site).epochs_trained:
                raise ValueError(f"derived: {key} is made from epoch {found.epoch}, which is not trained; correct from.epoch")
        same = sorted(self.derived_sites.keys() & set(self.sites))
        if same:
            raise ValueError(f"derived: {same[0]} is a site already; give the model or the derived vector another name")
        swept = len(self.sites) + len(self.derived_sites)
        if swept > MOST_PARTITIONS_OF_A_FAN_IN:  # selection reads both
            raise ValueError(
                f"derived: {len(self.derived_sites)} vectors beside {len(self.sites)} sites are {swept}; a study may have "
                f"{MOST_PARTITIONS_OF_A_FAN_IN}, so name sites in derived.from or split it into several files"
            )

    @property
    def steered(self) -> bool:
        """Whether the study trains, steers and judges: it is no trial alone, and its vectors are not published ones."""
        return self.kind == "bipo" and not self.published.vectors

    def published_vector(self, site: str, epoch: int) -> tuple[str, int, int]:
        """A vector as the published release names it: model, layer, epoch."""
        return self.model_of(site).short_name, layer_of(site), epoch

    def check_doses(self, found: Iterable[float], name: Literal["generated", "paired"], path: Path) -> None:
        """Refuse a file with doses that the study does not name.

        Raises:
            StorageError: naming the file, the doses and the setting that lacks them.
        """
        unknown = sorted(set(found) - set(getattr(self.doses, name) or self.doses.generated))
        if unknown:
            raise StorageError(f"{path}: the doses {unknown} are not among doses.{name} of study {self.name}; add them there")

    def selects_by(self, judge: str) -> bool:
        """Whether vectors are selected by the rows of a judge: the one that `judge.name` names, or whoever is no language judge of the study."""
        return judge == self.judge.name if self.judge.name != EMBEDDED else judge not in {found.name for found in self.judges}

    @property
    def contrastive(self) -> bool:
        """Whether the study makes directions from contrasted personas."""
        return self.kind == "contrastive"

    @property
    def persona_folder(self) -> Path:
        return persona_folder(self.personas, self.path.parent)

    @property
    def behaviour(self) -> str:
        return self.behaviours[0]

    @property
    def release_behaviour(self) -> str:
        """The behaviour as the published release spells it: `relationship-seeking`."""
        return self.behaviour.replace("_", "-")

    @property
    def behaviour_folder(self) -> Path:
        """The one of this name that ships, or the folder at this path from the study's file."""
        ships = BEHAVIOURS / self.behaviour
        if "/" not in self.behaviour and (ships / DEFINITION).is_file():
            return ships
        return Path(os.path.normpath(self.path.parent / self.behaviour))

    @property
    def sites(self) -> tuple[str, ...]:
        """Every model and layer, as partition keys: `smollm2-135m:L14`."""
        return tuple(site_key(model.name, layer) for model in self.models for layer in sorted(model.layers))

    def model_of(self, site: str) -> Model:
        """The model of a site, or of one that is derived."""
        found = self.derived_sites.get(site) if self.derived else None
        name = (found.site if found else site).partition(":")[0]
        return next(model for model in self.models if model.name == name)

    @property
    def derived_sites(self) -> dict[str, DerivedSite]:
        """Derived vectors by key, `smollm2-135m-without_sycophancy:L12`: they are swept, judged and selected as sites are."""
        found = {}
        for derived in self.derived:
            for site in derived.origin.sites or self.sites:
                model, _, layer = site.partition(":")
                epoch = derived.origin.epoch
                if epoch is None:
                    epoch = next(one.epochs_trained for one in self.models if one.name == model)
                found[f"{model}-{derived.name}:{layer}"] = DerivedSite(derived, site, epoch)
        return found

    @property
    def flat_settings(self) -> dict[str, Any]:
        """Every setting by its dotted name, with the value that holds, stated or not, as JSON has it."""
        return _flat(_plain(self))

    def used(self, name: str) -> Study:
        """Another study whose assets this one reads: the file of that name beside its own, or one that ships."""
        return load_study(str(self._file_of(name)))

    def _file_of(self, name: str) -> Path:
        beside = self.path.parent / f"{name}.toml"
        return beside if self.path.name and beside.is_file() else STUDIES / f"{name}.toml"

    @property
    def paired_doses(self) -> tuple[float, ...]:
        return tuple(sorted(self.doses.paired or self.doses.generated))

    @property
    def selection_doses(self) -> tuple[float, ...]:
        return tuple(sorted(self.doses.selection or self.doses.generated))


def site_key(model: str, layer: int) -> str:
    return f"{model}:L{layer:02d}"


def layer_of(site: str) -> int:
    return int(site.partition(":L")[2])


def study_file(name_or_path: str) -> Path:
    """The file of a study given by name (a file under `studies/`) or by path.

    Raises:
        StudyError: neither exists.
    """
    path = Path(name_or_path)
    if path.suffix == ".toml":
        if not path.is_file():
            raise StudyError(f"{path}: no such study file")
        return path.resolve()
    path = STUDIES / f"{name_or_path}.toml"
    if not path.is_file():
        close = difflib.get_close_matches(name_or_path, names := study_names(), 1)
        hint = f"did you mean {close[0]!r}?" if close else f"there is {', '.join(names)}; or give the path of a .toml file"
        raise StudyError(f"no study {name_or_path!r}: {hint}")
    return path


def study_names() -> list[str]:
    return sorted(path.stem for path in STUDIES.glob("*.toml"))


def load_study(name_or_path: str) -> Study:
    """Read and check a study by name or path.

    Raises:
        StudyError: naming the file, the key and the remedy, one line for each fault.
    """
    path = study_file(name_or_path)
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as error:
        raise StudyError(f"{path}: not valid TOML: {error}") from error
    try:
        study = Study.model_validate({**content, "path": path}, context={"folder": path.parent})
    except ValidationError as error:
        lines = [f"{path}: {_explain(fault)}" for fault in error.errors()]
        raise StudyError("\n".join(lines)) from error
    if study.name != path.stem:
        raise StudyError(f"{path}: name: the study is called {study.name!r} but its file {path.stem!r}; give both the same name")
    return study


def _plain(value: Any) -> Any:
    """Validated settings as plain values, every setting among them."""
    if isinstance(value, BaseModel):
        fields = type(value).model_fields
        return {field.alias or name: _plain(getattr(value, name)) for name, field in fields.items() if name != "path"}
    if isinstance(value, dict):
        return {str(name): _plain(part) for name, part in value.items()}
    return [_plain(part) for part in value] if isinstance(value, list | tuple) else to_jsonable_python(value)


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(value, dict):
        return {key: item for name, part in value.items() for key, item in _flat(part, f"{prefix}{name}.").items()}
    if isinstance(value, list) and value and isinstance(value[0], dict):
        named = {str(part.get("name") or number): part for number, part in enumerate(value)}
        return {key: item for name, part in named.items() for key, item in _flat(part, f"{prefix}{name}.").items()}
    return {prefix.rstrip("."): value}


def _explain(fault: Any) -> str:
    """A pydantic fault as `key: what is wrong; what to do`."""
    places = [str(place) for place in fault["loc"]]
    key = ".".join(places)
    if fault["type"] == "extra_forbidden":
        section: Any = Study
        for place in places[:-1]:
            if not place.isdigit():
                section = _section(section, place)
        known = [field.alias or name for name, field in section.model_fields.items() if name != "path"]
        close = difflib.get_close_matches(places[-1], known, 1)
        return f"{key}: unknown key; " + (f"did you mean {close[0]!r}?" if close else f"remove it or use one of {', '.join(known)}")
    if fault["type"] == "missing":
        return f"{key}: missing; add it"
    message = fault["msg"].removeprefix("Value error, ")
    given = "" if fault["type"] == "value_error" else f" (found {fault['input']!r}); correct it"
    return f"{key}: {message}{given}" if key else message + given


def _section(parent: type[BaseModel], name: str) -> type[BaseModel]:
    if name not in parent.model_fields:  # the user's own name for a table or a study
        return parent
    annotation = parent.model_fields[name].annotation
    for candidate in (annotation, *getattr(annotation, "__args__", ())):
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            return candidate
    return parent
