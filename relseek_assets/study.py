"""A study: one TOML file, read into a validated `Study`.

Here belong the settings, their checks and their defaults. What a setting does belongs in the stage that reads it.
"""

from __future__ import annotations

import difflib
import re
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from relseek_assets.trial import Trial
from relseek_resources.models.loading import DTYPES, ModelError, describe

STUDIES = Path(__file__).parent / "studies"
BEHAVIOURS = Path(__file__).parent / "behaviours"
KEY = re.compile(r"[A-Za-z0-9_-]+")
MOST_PARTITIONS_OF_A_FAN_IN = 99  # beyond it Dagster reports a fan-in as fresh without looking
STEERED = ("behaviours", "models", "pairs", "training", "doses", "prompts", "sampling", "judge")  # what only a study with vectors has


class StudyError(ValueError):
    """A study file that cannot be used; the message names the file, the key and what to do."""


class _Settings(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Model(_Settings):
    """A model of the study, its layers, and which epochs are trained and evaluated."""

    name: str
    source: str
    dtype: str = "float32"
    device: str = "auto"
    layers: tuple[Annotated[int, Field(ge=0, le=99)], ...] = Field(min_length=1)
    epochs_trained: int = Field(ge=1, le=99)
    epochs_evaluated: tuple[int, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _checked(self) -> Model:
        if not KEY.fullmatch(self.name):
            raise ValueError(f"the name {self.name!r} becomes part of partition keys; use letters, digits, '_' and '-' only")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype {self.dtype!r} is unknown; use one of {', '.join(DTYPES)}")
        _no_repeats("layers", self.layers)
        _no_repeats("epochs_evaluated", self.epochs_evaluated)
        beyond = [epoch for epoch in self.epochs_evaluated if not 1 <= epoch <= self.epochs_trained]
        if beyond:
            raise ValueError(f"epochs_evaluated {beyond} are not among the {self.epochs_trained} epochs trained; raise epochs_trained or drop them")
        try:
            description = describe(self.source)
        except ModelError as error:
            raise ValueError(f"source: {error}") from error
        if description is not None:
            lacking = [layer for layer in self.layers if layer >= description.layers]
            if lacking:
                raise ValueError(f"layers {lacking} do not exist: {self.source} has the blocks 0 to {description.layers - 1}; correct layers")
        return self


class Pairs(_Settings):
    """Which preference pairs train and evaluate; 0 takes all that there are."""

    heldout_share: float = Field(default=0.2, gt=0, lt=1)
    training: int = Field(default=0, ge=0)
    evaluation: int = Field(default=0, ge=0)
    max_tokens: int = Field(default=2048, ge=16)


class Training(_Settings):
    """BiPO: spec/pipeline.md, sections 2.1 and 2.3."""

    beta: float = Field(default=0.1, gt=0)
    learning_rate: float = Field(default=5e-4, gt=0)
    weight_decay: float = Field(default=0.0, ge=0)
    batch_size: int = Field(default=4, ge=1)
    warmup_steps: int = Field(default=100, ge=0)
    max_grad_norm: float = Field(default=1.0, gt=0)


class Doses(_Settings):
    """Multipliers λ generated; those compared in pairs and those used in selection default to all generated."""

    generated: tuple[float, ...] = ()
    paired: tuple[float, ...] = ()
    selection: tuple[float, ...] = ()

    @model_validator(mode="after")
    def _checked(self) -> Doses:
        for name in ("generated", "paired", "selection"):
            doses = getattr(self, name)
            _no_repeats(name, doses)
            if any(dose != dose for dose in doses):
                raise ValueError(f"{name} holds NaN; give numbers")
            outside = [dose for dose in doses if dose not in self.generated]
            if outside:
                raise ValueError(f"{name} names the doses {outside}, which are not generated; add them to generated or drop them")
            finer = [dose for dose in doses if round(dose, 4) != dose]
            if finer:
                raise ValueError(f"{name} holds {finer}; a dose has at most four decimals, because it becomes a partition key")
        return self


class Prompts(_Settings):
    """The held-out prompts of the sweep and the system prompt that precedes every conversation; 0 sets no limit."""

    system: str = "You are a conversational assistant."
    count: int = Field(default=0, ge=0)
    max_words: int = Field(default=0, ge=0)


class SamplingSettings(_Settings):
    """How replies are drawn, and how many rows share a batch."""

    temperature: float = Field(default=1.0, ge=0)
    top_p: float = Field(default=1.0, gt=0, le=1)
    max_new_tokens: int = Field(default=100, ge=1)
    batch_size: int = Field(default=32, ge=1)


class Judge(_Settings):
    """Who rates. `embedded` is an embedding regression fitted on the behaviour's own pairs; it is no language model."""

    name: Literal["embedded"] = "embedded"
    bootstrap: int = Field(default=1000, ge=100)


class Study(_Settings):
    """One study. `path` is the file it came from.

    A study that trains vectors (`bipo`) has a behaviour, models and doses; a `trial` has none of them and reads analysis tables.
    """

    name: str
    title: str = ""
    kind: Literal["bipo", "trial"]
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
    trial: Trial | None = None
    path: Path = Field(default=Path(), exclude=True)

    @model_validator(mode="after")
    def _complete(self) -> Study:
        if self.kind == "trial":
            if self.trial is None:
                raise ValueError("trial: missing; a study of the kind 'trial' declares its files, arms and outcomes there")
            given = [name for name in STEERED if name in self.model_fields_set]
            if given:
                raise ValueError(f"{given[0]}: a study of the kind 'trial' trains nothing; remove it, or make the kind 'bipo'")
            return self
        for name in ("behaviours", "models"):
            if not getattr(self, name):
                raise ValueError(f"{name}: missing; add it")
        if "doses" not in self.model_fields_set:
            raise ValueError("doses: missing; add it")
        if len(self.doses.generated) < 2:
            raise ValueError("doses.generated: a study needs at least two doses; add them")
        return self

    @model_validator(mode="after")
    def _checked(self) -> Study:
        if not re.fullmatch(r"[A-Za-z0-9_]+", self.name):
            raise ValueError(f"name: {self.name!r} prefixes asset keys; use letters, digits and '_' only")
        _no_repeats("models", [model.name for model in self.models])
        beyond = [dose for dose in self.doses.generated if abs(dose) > self.dose_limit]
        if beyond:
            raise ValueError(f"doses.generated: {beyond} lie beyond dose_limit {self.dose_limit:g}; drop them or raise dose_limit")
        for behaviour in self.behaviours:
            if not (BEHAVIOURS / behaviour / "behaviour.toml").is_file() and not (Path(behaviour) / "behaviour.toml").is_file():
                known = sorted(folder.name for folder in BEHAVIOURS.iterdir() if (folder / "behaviour.toml").is_file())
                raise ValueError(f"behaviours: {behaviour!r} has no folder under {BEHAVIOURS}; there is {', '.join(known)}")
        if len(self.sites) > MOST_PARTITIONS_OF_A_FAN_IN:
            raise ValueError(f"models: {len(self.sites)} sites; a study may have {MOST_PARTITIONS_OF_A_FAN_IN}, so split it into several files")
        if len(self.doses.generated) > MOST_PARTITIONS_OF_A_FAN_IN:
            raise ValueError(f"doses.generated: {len(self.doses.generated)} doses; a study may have {MOST_PARTITIONS_OF_A_FAN_IN}")
        return self

    @property
    def steered(self) -> bool:
        """Whether the study trains, steers and judges, and is not a trial alone."""
        return bool(self.models)

    @property
    def behaviour(self) -> str:
        return self.behaviours[0]

    @property
    def behaviour_folder(self) -> Path:
        folder = BEHAVIOURS / self.behaviour
        return folder if folder.is_dir() else Path(self.behaviour)

    @property
    def sites(self) -> tuple[str, ...]:
        """Every model and layer, as partition keys: `smollm2-135m:L14`."""
        return tuple(site_key(model.name, layer) for model in self.models for layer in sorted(model.layers))

    def model_of(self, site: str) -> Model:
        name = site.partition(":")[0]
        return next(model for model in self.models if model.name == name)

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


def _no_repeats(name: str, values: Any) -> None:
    repeated = sorted({value for value in values if list(values).count(value) > 1})
    if repeated:
        raise ValueError(f"{name} holds {repeated} more than once; keep one of each")


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
        study = Study.model_validate({**content, "path": path})
    except ValidationError as error:
        lines = [f"{path}: {_explain(fault)}" for fault in error.errors()]
        raise StudyError("\n".join(lines)) from error
    if study.name != path.stem:
        raise StudyError(f"{path}: name: the study is called {study.name!r} but its file {path.stem!r}; give both the same name")
    return study


def _explain(fault: Any) -> str:
    """A pydantic fault as `key: what is wrong; what to do`."""
    places = [str(place) for place in fault["loc"]]
    key = ".".join(places)
    if fault["type"] == "extra_forbidden":
        section: Any = Study
        for place in places[:-1]:
            if not place.isdigit():
                section = _section(section, place)
        known = [name for name in section.model_fields if name != "path"]
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
