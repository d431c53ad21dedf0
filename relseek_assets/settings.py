"""The sections of a study's file: what each setting is called, its default, and what it must be by itself.

Here belong settings that can be checked alone. What must hold between sections belongs in `study.py`, what a setting does in the stage that reads it.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from relseek_resources.models.loading import DTYPES, ModelError, describe

KEY = re.compile(r"[A-Za-z0-9_-]+")
EMBEDDED = "embedded"  # the judge that every steered study has


class Settings(BaseModel):
    """A section: unknown keys are refused, and what was read does not change."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Model(Settings):
    """A model of the study, its layers, and which epochs are trained and evaluated; of a contrastive study, all layers and no epochs."""

    name: str
    source: str
    dtype: str = "float32"
    device: str = "auto"
    layers: tuple[Annotated[int, Field(ge=0, le=99)], ...] = Field(default=(), min_length=1)
    epochs_trained: int = Field(default=0, ge=1, le=99)
    epochs_evaluated: tuple[int, ...] = Field(default=(), min_length=1)
    epochs_judged: tuple[int, ...] = Field(default=(), min_length=1, exclude=True)  # by published judges; all evaluated unless named
    width: int | None = Field(default=None, ge=1, exclude=True)  # of the residual stream, for a model that is not here; it changes no result

    @field_validator("source")
    @classmethod
    def _from_the_file(cls, source: str, info: ValidationInfo) -> str:
        """A model's folder is named by its path from the study's file, wherever the command is called; any other source stays what it is."""
        if info.context is None or Path(source).is_absolute():
            return source
        beside = os.path.abspath(info.context["folder"] / source)
        return beside if source.startswith(("./", "../")) or os.path.isdir(beside) else source

    @model_validator(mode="after")
    def _checked(self) -> Model:
        if not KEY.fullmatch(self.name):
            raise ValueError(f"the name {self.name!r} becomes part of partition keys; use letters, digits, '_' and '-' only")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype {self.dtype!r} is unknown; use one of {', '.join(DTYPES)}")
        no_repeats("layers", self.layers)
        no_repeats("epochs_evaluated", self.epochs_evaluated)
        no_repeats("epochs_judged", self.epochs_judged)
        unseen = [epoch for epoch in self.epochs_judged if epoch not in self.epochs_evaluated]
        if unseen:
            raise ValueError(f"epochs_judged {unseen} are not among epochs_evaluated; add them there or drop them")
        beyond = [epoch for epoch in self.epochs_evaluated if not 1 <= epoch <= self.epochs_trained]
        if beyond and "epochs_trained" in self.model_fields_set:  # a study that needs them says that they are missing
            raise ValueError(f"epochs_evaluated {beyond} are not among the {self.epochs_trained} epochs trained; raise epochs_trained or drop them")
        try:
            description = describe(self.source)
        except ModelError as error:
            raise ValueError(f"source: {error}") from error
        if description is not None:
            lacking = [layer for layer in self.layers if layer >= description.layers]
            if lacking:
                raise ValueError(f"layers {lacking} do not exist: {self.source} has the blocks 0 to {description.layers - 1}; correct layers")
            if self.width not in (None, description.width):
                raise ValueError(f"width {self.width}: {self.source} is {description.width} wide; drop width, which is for models that are not here")
        return self

    @property
    def short_name(self) -> str:
        """The source without its owner or folder, as the published release spells it: `Llama-3.1-70B-Instruct`."""
        return self.source.rpartition("/")[2]

    @property
    def judged(self) -> tuple[int, ...]:
        """Epochs whose replies are judged."""
        return self.epochs_judged or self.epochs_evaluated

    @property
    def known_width(self) -> int | None:
        """Entries of a vector of this model; None where neither the model nor the study says."""
        description = describe(self.source)
        return self.width if description is None else description.width


class Pairs(Settings):
    """Which preference pairs train and evaluate; 0 takes all that there are."""

    heldout_share: float = Field(default=0.2, gt=0, lt=1)
    training: int = Field(default=0, ge=0)
    evaluation: int = Field(default=0, ge=0)
    max_tokens: int = Field(default=2048, ge=16)


class Training(Settings):
    """BiPO: spec/pipeline.md, sections 2.1 and 2.3."""

    beta: float = Field(default=0.1, gt=0)
    learning_rate: float = Field(default=5e-4, gt=0)
    weight_decay: float = Field(default=0.0, ge=0)
    batch_size: int = Field(default=4, ge=1)
    warmup_steps: int = Field(default=100, ge=0)
    max_grad_norm: float = Field(default=1.0, gt=0)


class Doses(Settings):
    """Multipliers λ generated; those compared in pairs and those used in selection default to all generated."""

    generated: tuple[float, ...] = ()
    paired: tuple[float, ...] = ()
    selection: tuple[float, ...] = ()

    @model_validator(mode="after")
    def _checked(self) -> Doses:
        for name in ("generated", "paired", "selection"):
            doses = getattr(self, name)
            no_repeats(name, doses)
            if any(dose != dose for dose in doses):
                raise ValueError(f"{name} holds NaN; give numbers")
            outside = [dose for dose in doses if dose not in self.generated]
            if outside:
                raise ValueError(f"{name} names the doses {outside}, which are not generated; add them to generated or drop them")
            finer = [dose for dose in doses if round(dose, 4) != dose]
            if finer:
                raise ValueError(f"{name} holds {finer}; a dose has at most four decimals, because it becomes a partition key")
        return self


class Prompts(Settings):
    """The held-out prompts of the sweep and the system prompt that precedes every conversation; 0 sets no limit."""

    system: str = "You are a conversational assistant."
    count: int = Field(default=0, ge=0)
    max_words: int = Field(default=0, ge=0)


class SamplingSettings(Settings):
    """How replies are drawn, and how many rows share a batch."""

    temperature: float = Field(default=1.0, ge=0)
    top_p: float = Field(default=1.0, gt=0, le=1)
    max_new_tokens: int = Field(default=100, ge=1)
    batch_size: int = Field(default=32, ge=1)


class Judge(Settings):
    """Whose scores select: `embedded`, an embedding regression fitted on the behaviour's own pairs that is no language model, or one of `[[judges]]`.

    `reference` names the judge whose scores are taken for the truth where it has any, such as people whose ratings were imported.
    """

    name: str = EMBEDDED
    bootstrap: int = Field(default=1000, ge=100)
    reference: str = ""


class Price(Settings):
    """What an endpoint charges, in USD for a million tokens; for models that the price table does not list."""

    prompt: float = Field(ge=0)
    completion: float = Field(ge=0)


class _Asked(Settings):
    """How a model behind an endpoint is asked. `default_sampling` leaves temperature, top_p and seed to it; some refuse these, or `max_tokens`."""

    token_limit: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    default_sampling: bool = False

    @property
    def unusual(self) -> dict[str, Any]:
        """What of this is not as it is unless said otherwise."""
        return self.model_dump(include={"token_limit", "default_sampling"}, exclude_defaults=True)


class LanguageJudge(_Asked):
    """A language model that rates and compares beside the embedded judge, behind an OpenAI-compatible endpoint.

    `openai` asks at once, `openai_batch` by Batch. An empty `base_url` is OPENAI_BASE_URL or OpenAI's own; the key is read from the environment
    variable `key_variable`. No `rubrics` are all of the behaviour's. Nothing is sent while what it was paid, what is in flight and the estimate
    of what would be sent are together above `budget_usd`. `family` is who made it, in a word that authors of the same house share.
    """

    name: str
    kind: Literal["openai", "openai_batch"]
    model: str
    family: str = ""
    base_url: str = ""
    key_variable: str = "OPENAI_API_KEY"
    rubrics: tuple[str, ...] = ()
    pairwise: bool = True
    examples: int = Field(default=2, ge=0)
    max_tokens: int = Field(default=16, ge=1)
    attempts: int = Field(default=3, ge=1)
    concurrency: int = Field(default=16, ge=1)
    window: str = "24h"
    price: Price | None = None
    budget_usd: float = Field(ge=0)

    @model_validator(mode="after")
    def _checked(self) -> LanguageJudge:
        if not KEY.fullmatch(self.name) or self.name == EMBEDDED:
            raise ValueError(f"the name {self.name!r} becomes part of file names, and `embedded` is taken; use letters, digits, '_' and '-'")
        no_repeats("rubrics", self.rubrics)
        unread = {"openai": "window", "openai_batch": "concurrency"}[self.kind]
        if unread in self.model_fields_set:
            raise ValueError(f"{unread} is not read by a judge of the kind {self.kind!r}; remove it")
        return self


class Author(_Asked):
    """Who answers when a level of the behaviour is asked for in words: the study's own model unsteered (`model`), or one behind an OpenAI-compatible
    endpoint (`openai`), of which the fields say what they say of a judge. `published` ones have answered already.
    """

    name: str
    kind: Literal["model", "openai", "published"]
    model: str = ""
    family: str = ""
    base_url: str = ""
    key_variable: str = "OPENAI_API_KEY"
    attempts: int = Field(default=3, ge=1)
    concurrency: int = Field(default=16, ge=1)
    price: Price | None = None
    budget_usd: float = Field(default=0.0, ge=0)

    @model_validator(mode="after")
    def _checked(self) -> Author:
        if not KEY.fullmatch(self.name) or self.name in ("steered", "persona"):
            raise ValueError(f"the name {self.name!r} becomes part of partition keys; use letters, digits, '_', '-', and not `steered` or `persona`")
        if self.kind == "openai":
            for name in ("model", "budget_usd"):
                if name not in self.model_fields_set:
                    raise ValueError(f"{name}: missing; an author behind an endpoint needs it")
            return self
        unread = sorted(self.model_fields_set - {"name", "kind"})
        if unread:
            raise ValueError(f"{unread[0]} is not read by an author of the kind {self.kind!r}; remove it")
        return self


class SteeredEndpoint(Settings):
    """A server that steers, of `relseek serve` or vLLM with the plugin: it writes the steered model's replies instead of a model loaded here.

    `base_url` ends on `/v1`. `vector` is the server's name of the vector, `SITE@eNN` as `relseek serve` calls it unless given. Nothing is charged
    unless a `price` is stated, and then `budget_usd` bounds it.
    """

    base_url: str = Field(min_length=1)
    model: str = Field(min_length=1)
    vector: str = ""
    key_variable: str = "OPENAI_API_KEY"
    attempts: int = Field(default=3, ge=1)
    concurrency: int = Field(default=16, ge=1)
    price: Price | None = None
    budget_usd: float = Field(default=0.0, ge=0)

    @model_validator(mode="after")
    def _checked(self) -> SteeredEndpoint:
        if self.price is not None and "budget_usd" not in self.model_fields_set:
            raise ValueError("budget_usd: missing; a server with a price needs it")
        if self.price is None and "budget_usd" in self.model_fields_set:
            raise ValueError("budget_usd is not read of a server without a price; state its price or remove it")
        return self


class Prompting(Settings):
    """Levels of the behaviour asked for in words against doses of one vector, and persona attacks on both (spec/pipeline.md, section 5).

    Level k corresponds to the k-th of `doses`. `attacked` are the levels that are attacked, the ends and the middle unless named; `themes` those of
    the behaviour's persona_attacks.toml, all unless named. `judges` are names of [[judges]] that are asked at once, all of them unless named.
    `family` is that of the study's own model, steered or not. With `steered_endpoint` a server writes what the steered model says.
    """

    site: str
    epoch: int
    doses: tuple[float, ...]
    authors: tuple[Author, ...] = Field(min_length=1)
    examples: int = Field(default=3, ge=0)
    attacked: tuple[int, ...] = ()
    themes: tuple[str, ...] = ()
    judges: tuple[str, ...] = ()
    family: str = ""
    steered_endpoint: SteeredEndpoint | None = None

    @model_validator(mode="after")
    def _checked(self) -> Prompting:
        if len(self.doses) not in (7, 9):
            raise ValueError(f"doses: {len(self.doses)} doses; levels come in sevens or nines, one a dose")
        if list(self.doses) != sorted(set(self.doses)):
            raise ValueError("doses: level 1 is the smallest dose, and every level has one of its own; give them in ascending order")
        no_repeats("authors", [author.name for author in self.authors])
        for name in ("attacked", "themes", "judges"):
            no_repeats(name, getattr(self, name))
        beyond = [level for level in self.attacked if not 1 <= level <= len(self.doses)]
        if beyond:
            raise ValueError(f"attacked: {beyond} are no levels; there are levels 1 to {len(self.doses)}")
        published = [author.kind == "published" for author in self.authors]
        if any(published) and not all(published):
            raise ValueError("authors: published ones have no vector of this study to be compared with; declare them in a study of their own")
        return self

    @property
    def published(self) -> bool:
        """Whether everything comes from the published release."""
        return self.authors[0].kind == "published"

    @property
    def attacked_levels(self) -> tuple[int, ...]:
        count = len(self.doses)
        return tuple(sorted(self.attacked)) or (1, (count + 1) // 2, count)

    def author(self, name: str) -> Author:
        return next(author for author in self.authors if author.name == name)

    @property
    def families(self) -> dict[str, str]:
        """Author -> family, the steered model among them; only those that have one."""
        own = {author.name: self.family if author.kind == "model" else author.family for author in self.authors}
        return {name: family for name, family in {"steered": self.family, **own}.items() if family}


class Compute(Settings):
    """Where vectors are trained: in this process, or in several that `accelerate launch` starts, the model sharded over them.

    Nothing here changes a result beyond rounding, and changing it makes none stale. A process takes `pairs_at_once` pairs through the model together,
    its whole share of a batch at 0; `checkpoint_activations` recomputes activations in the backward pass instead of keeping them. `cache_gb` is
    the disk that the launcher 'here' may take, while it trains, for the streams entering the trained blocks; what does not fit is recomputed.
    `compile` has torch compile the blocks' token-wise parts first, which pays on a GPU and in long runs.
    """

    launcher: Literal["here", "accelerate"] = "here"
    processes: int = Field(default=1, ge=1)
    pairs_at_once: int = Field(default=0, ge=0)
    checkpoint_activations: bool = False
    cache_gb: float = Field(default=16.0, ge=0)
    compile: bool = False

    @model_validator(mode="after")
    def _checked(self) -> Compute:
        here = {"cache_gb", "compile"}
        given = self.model_fields_set - {"launcher"}
        unread = sorted(given - here if self.launcher == "here" else given & here)
        if unread:
            reader = "accelerate" if self.launcher == "here" else "here"
            raise ValueError(f'{unread[0]} is read by the launcher {reader!r} alone; set launcher = "{reader}" or remove {unread[0]}')
        return self


class Contrast(Settings):
    """Persona directions: who answers each query, how long, and which part is held out (spec/pipeline.md, section 11.1)."""

    assistants_per_query: int = Field(default=2, ge=1)
    others_per_query: int = Field(default=4, ge=1)
    max_new_tokens: int = Field(default=40, ge=1)
    temperature: float = Field(default=0.0, ge=0)
    batch_size: int = Field(default=32, ge=1)
    heldout_share: float = Field(default=0.2, gt=0, lt=1)
    heldout_personas: float = Field(default=0.2, gt=0, lt=1)
    bootstrap: int = Field(default=1000, ge=100)


class Interventions(Settings):
    """What is done to replies under hostile personas: additions of the direction and floors of the projection on it (spec/pipeline.md, section 11).

    A strength is a multiple of the distance between the mean projections of assistant and other replies; a percentile is one of ordinary assistant
    replies' projections, layer by layer. Additions work after the best layer of `direction_quality`, floors after `layers`.
    """

    prompts: int = Field(default=30, ge=2)
    personas: tuple[str, ...] = ()  # all hostile ones of the persona set unless named
    extraction: Literal["last_token", "response_mean"] = "response_mean"
    layers: tuple[Annotated[int, Field(ge=0, le=99)], ...] = Field(min_length=1)
    strengths: tuple[Annotated[float, Field(gt=0)], ...] = Field(min_length=1)
    percentiles: tuple[Annotated[float, Field(ge=1, le=100)], ...] = Field(min_length=1)
    max_new_tokens: int = Field(default=32, ge=1)
    temperature: float = Field(default=0.7, ge=0)
    batch_size: int = Field(default=45, ge=1)
    bootstrap: int = Field(default=1000, ge=100)

    @model_validator(mode="after")
    def _checked(self) -> Interventions:
        for name in ("personas", "layers", "strengths", "percentiles"):
            no_repeats(name, getattr(self, name))
        return self


class Drift(Settings):
    """Conversations played with and without a floor at this percentile, over the layers of `[interventions]`; 0 turns are all."""

    percentile: float = Field(default=25, ge=1, le=100)
    turns: int = Field(default=0, ge=0)
    max_new_tokens: int = Field(default=40, ge=1)
    temperature: float = Field(default=0.7, ge=0)


class Published(Settings):
    """What the published release (RELSEEK_RELEASE) provides instead of its being computed.

    `scores` are the published judges' ratings and comparisons of the published vectors' replies, at the doses and epochs that the study names.
    """

    vectors: bool = False
    scores: bool = False


class Origin(Settings):
    """Which vectors are taken to be changed: these sites' at this epoch; every site's and the last epoch unless named."""

    sites: tuple[str, ...] = ()
    epoch: int | None = None


class Removed(Settings):
    """The direction taken out: of a study of vectors, one of a site (the changed vector's own unless named) and epoch (the last); of persona
    directions, one of the changed vector's layer and an extraction."""

    study: str
    site: str = ""
    epoch: int | None = None
    extraction: Literal["last_token", "response_mean"] = "response_mean"


class Derived(Settings):
    """A vector made of two: one of this study without another's direction, at its old length where `rescale` says so."""

    name: str
    origin: Origin = Field(default=Origin(), alias="from")
    remove: Removed
    rescale: bool = False


class DerivedSite(NamedTuple):
    """Where a derived vector comes from: its declaration, and the site and epoch of the vector that was changed."""

    declared: Derived
    site: str
    epoch: int


def no_repeats(name: str, values: Any) -> None:
    repeated = sorted({value for value in values if list(values).count(value) > 1})
    if repeated:
        raise ValueError(f"{name} holds {repeated} more than once; keep one of each")
