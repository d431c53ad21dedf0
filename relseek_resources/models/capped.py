"""`CappedModel`: a language model whose projection on a direction is kept within a bound, behind the published library's four names.

Here belong the published models' settings, their chat formats, and the reading of directions and of capping configurations from files. The
arithmetic of a cap belongs in `interventions.py`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from relseek_resources.models.chat_templates import Conversation
from relseek_resources.models.interventions import Ceiling, Floor
from relseek_resources.models.loading import ModelError, load
from relseek_resources.models.sampling import Sampling
from relseek_resources.models.steered import SteeredModel
from relseek_resources.storage import read_tensors
from relseek_resources.stored_vectors import DIRECTIONS, asset_of, derived_in, epochs_of, study_folder
from relseek_resources.vector_files import SITE_LAYER, named_tensors, one_vector, plain_content, read_vectors

Side = Literal["floor", "ceiling"]
SIDES = {"floor": Floor, "ceiling": Ceiling}


@dataclass(frozen=True)
class PublishedCap:
    """What llm-personality-axes uses for a model key (spec section 11.1): hub name, blocks capped, floor."""

    source: str
    layers: range
    threshold: float


PUBLISHED = {
    "qwen": PublishedCap("Qwen/Qwen2.5-3B-Instruct", range(5, 30), 3.0),
    "llama": PublishedCap("meta-llama/Llama-3.2-3B-Instruct", range(9, 20), 2.0),
}

# How a turn opens and closes; the text of the published prompts has no token of its own at its beginning.
TURNS = {
    "qwen": ("<|im_start|>{role}\n", "<|im_end|>\n"),
    "llama": ("<|start_header_id|>{role}<|end_header_id|>\n\n", "<|eot_id|>"),
}


def format_prompt(system: str, query: str, model_type: str = "qwen") -> str:
    """A system and a user turn with the assistant header that opens the reply, in the published library's chat format.

    `qwen` is ChatML; `llama` is Llama 3's, without the date that the model's own template adds.

    Raises:
        ModelError: another model type; give `generate` a conversation instead, and the model's own template is used.
    """
    if model_type not in TURNS:
        raise ModelError(f"no chat format {model_type!r}; there is {sorted(TURNS)}; for other models give generate() a conversation")
    opening, closing = TURNS[model_type]
    turns = [opening.format(role=role) + text + closing for role, text in (("system", system), ("user", query))]
    return "".join(turns) + opening.format(role="assistant")


class CappedModel:
    """A `SteeredModel` that generates with a cap on every token of prompt and reply.

    Two published systems cap opposite sides. `side="floor"`, as in llm-personality-axes, the library whose names these are: directions point to
    the wanted persona, and where h·v̂ < τ it is raised to τ. `side="ceiling"`, as in assistant-axis: vectors point to what is unwanted, and where
    h·v̂ > τ it is lowered to τ. Directions may have any length; only v̂ counts. Projections are computed in float32 whatever the model's dtype,
    where the published floor is computed in bfloat16.

    >>> capped = CappedModel.from_model_key("qwen")
    >>> text = capped.generate(format_prompt("You are a conspiracy theorist.", "Why is the sky blue?"))

    `with capped.model.intervene(capped.interventions):` caps scores, activations and batches of replies too.
    """

    format_prompt = staticmethod(format_prompt)

    def __init__(
        self,
        model: SteeredModel,
        directions: Mapping[int, Any],
        layers: Sequence[int] | None = None,
        *,
        threshold: float | Sequence[float],
        side: Side = "floor",
    ) -> None:
        """Cap `model` after `layers`, all those in `directions` unless named.

        Args:
            directions: (width,) by 0-indexed block.
            threshold: τ in units of the projection; one for all layers, or one a layer, as `thresholds` gives them.

        Raises:
            ModelError: a layer without direction or unknown to the model, another number of thresholds than layers, an unknown side.
        """
        self.model = model
        self.layers = tuple(sorted(directions) if layers is None else layers)
        missing = [layer for layer in self.layers if layer not in directions]
        if missing or not self.layers:
            raise ModelError(f"no direction for the layers {missing}; there are directions for {sorted(directions)}")
        if np.ndim(threshold) and len(np.atleast_1d(threshold)) != len(self.layers):
            raise ModelError(f"{len(np.atleast_1d(threshold))} thresholds for {len(self.layers)} layers; give one, or one a layer")
        if side not in SIDES:
            raise ModelError(f"side {side!r}: there is {sorted(SIDES)}")
        limits = np.broadcast_to(threshold, len(self.layers)).tolist()
        self.interventions = tuple(SIDES[side](directions[layer], layer, limit) for layer, limit in zip(self.layers, limits, strict=True))
        with model.intervene(self.interventions):
            pass  # what does not fit the model is refused here and not at the first reply

    @classmethod
    def from_model_key(
        cls,
        model_key: str = "qwen",
        *,
        directions: str | Path | Mapping[int, Any] | None = None,
        layers: Sequence[int] | None = None,
        threshold: float | Sequence[float] | None = None,
        side: Side = "floor",
        source: str | None = None,
        dtype: str = "float32",
        device: str = "auto",
    ) -> CappedModel:
        """Load a model with its directions.

        For `qwen` and `llama` the published settings are the defaults: directions of the last prompt token under RELSEEK_RELEASE_AXES, layers 5-29
        and τ 3.0, or layers 9-19 and τ 2.0. Anything else that `load` takes (a local folder, `embedded:NAME`, a hub name) needs `directions` and
        `threshold`.

        Args:
            directions: a file that `read_directions` understands, or vectors by layer.
            source: where the key's model lies, if not on the hub.
            dtype: the published library uses bfloat16.
        """
        published = PUBLISHED.get(model_key)
        if published is None and (directions is None or threshold is None):
            raise ModelError(f"model key {model_key!r}: only {sorted(PUBLISHED)} have published settings; give directions=... and threshold=...")
        if published is not None:
            directions = published_directions(model_key) if directions is None else directions
            layers = published.layers if layers is None else layers
            threshold = published.threshold if threshold is None else threshold
            source = source or published.source
        assert directions is not None and threshold is not None
        found = directions if isinstance(directions, Mapping) else read_directions(directions, layers)
        model = load(source or model_key, dtype=dtype, device=device)
        return cls(model, found, layers, threshold=threshold, side=side)

    @classmethod
    def from_study(
        cls,
        study: str | Path,
        site: str,
        epoch: int | None = None,
        *,
        side: Side,
        threshold: float | Sequence[float],
        layers: Sequence[int] | None = None,
        extraction: str | None = None,
        model: SteeredModel | None = None,
        dtype: str = "float32",
        device: str = "auto",
    ) -> CappedModel:
        """Cap along a study's stored vector, trained or derived, or along the directions of a contrastive study.

        >>> capped = CappedModel.from_study("persona_axes", "smollm2-135m", side="floor", threshold=2.0, layers=range(10, 20))

        `side` has no default: a trained vector points to what its study trained, a contrastive study's direction to the assistant.

        Args:
            study: its name in the store that `relseek` uses (RELSEEK_STORE, or the Dagster home's), or its folder there as a path.
            site: model and layer, `smollm2-135m:L12`; of a contrastive study the model alone will do where `layers` are named.
            epoch: the last one stored unless named; directions have none.
            layers: the site's own unless named. A vector caps all of them, a contrastive study has a direction for each.
            extraction: which of a contrastive study's directions; `response_mean` unless named.
            model: an already loaded one; otherwise the model that the file's header names.

        Raises:
            ModelError: nothing is stored for the site or epoch, or no layer is named; what does not fit the model.
            StorageError: no store, or a file that cannot be read.
        """
        folder = study_folder(study)
        axes = folder / DIRECTIONS / f"{site.partition(':')[0]}.safetensors"
        read = _directions_of(axes, site, layers, extraction, epoch) if axes.is_file() else _vector_of(folder, site, layers, extraction, epoch)
        if model is None:
            if "model" not in read.header:
                raise ModelError(f"{read.file}: its header names no model; give model=...")
            model = load(read.header["model"], dtype=dtype, device=device)
        return cls(model, read.directions, list(read.directions), threshold=threshold, side=side)

    def generate(
        self, prompt: str | Conversation, max_new_tokens: int = 100, *, do_sample: bool = False, seed: int = 0, verbose: bool = False
    ) -> str:
        """Prompt and capped reply as one text, special tokens included, as the published library returns them.

        Args:
            prompt: text with its chat format (`format_prompt`), to which the tokenizer's beginning-of-text token is added where it has one and the
                text does not begin with it; or a conversation, for the model's own template.
            do_sample: draw at temperature 1 from `seed`; greedy otherwise.
            verbose: taken for the published signature; there is nothing to show.
        """
        with self.model.intervene(self.interventions):
            return self.generate_uncapped(prompt, max_new_tokens, do_sample=do_sample, seed=seed, verbose=verbose)

    def generate_uncapped(
        self, prompt: str | Conversation, max_new_tokens: int = 100, *, do_sample: bool = False, seed: int = 0, verbose: bool = False
    ) -> str:
        """`generate` without the cap, for comparison."""
        tokens = self._prompt_tokens(prompt)
        sampling = Sampling(temperature=1.0 if do_sample else 0.0, max_new_tokens=max_new_tokens)
        (reply,) = self.model.generate_tokens([tokens], sampling, seeds=[seed])
        return self.model.tokenizer.decode([*tokens, *reply.tokens], skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def _prompt_tokens(self, prompt: str | Conversation) -> list[int]:
        if not isinstance(prompt, str):
            return self.model.prompt_tokens(prompt)
        tokenizer = self.model.tokenizer
        tokens = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        begin = tokenizer.bos_token_id
        return tokens if begin is None or tokens[:1] == [begin] else [begin, *tokens]


def read_directions(file: str | Path, layers: Sequence[int] | None = None) -> dict[int, np.ndarray]:
    """Vectors by 0-indexed block, float32, from a `.safetensors`, `.gguf` or published `.pt` file, as `read_vectors` reads them.

    Three contents are understood: vectors by layer (in safetensors the tensors' names are the numbers); one array (layers, width), a row a block
    from block 0; one vector (width,), which serves the layer that its header gives, or each of `layers` where the file does not say one.

    Raises:
        ModelError: one vector of which neither the file nor `layers` says the layer.
        VectorFileError: what `read_vectors` refuses; a layer that the file has no vector for.
    """
    found = read_vectors(Path(file), rows=True)
    if layers is not None:
        return {layer: found.at(layer) for layer in layers}
    by_layer = {layer: vector for layer, vector in found.vectors.items() if layer is not None}
    if not by_layer:
        raise ModelError(f"{file}: it holds one vector and does not say for which layer; give layers=[...]")
    return by_layer


def read_capping(file: str | Path) -> dict[str, tuple[Ceiling, ...]]:
    """Interventions by experiment id from a capping configuration of assistant-axis (spec section 11.2).

    Its content is `{vectors: {name: {layer, vector}}, experiments: [{id, interventions: [{vector: name, cap}]}]}`: a torch file, read as plain
    tensors; JSON with the vectors as lists; or safetensors whose tensors have the vectors' names and whose header holds `layers`, JSON by name,
    and `experiments`, JSON. Vectors point to the unwanted side and may have any length: a cap is a ceiling on h·v̂, layers count from 0.

    >>> with model.intervene(read_capping("capping_config.pt")["layers_46:54-p0.25"]):
    ...     replies = model.generate(conversations)

    Raises:
        ModelError: a file that holds anything else, a cap on a vector that it does not hold, an experiment named twice.
        VectorFileError: a file that is not there or cannot be read, a vector that is no row of finite floating-point numbers.
    """
    file = Path(file)
    content = _capping_content(file)
    vectors, experiments = content.get("vectors"), content.get("experiments")
    if not isinstance(vectors, Mapping) or not isinstance(experiments, list):
        raise ModelError(f"{file}: expected `vectors` by name and a list of `experiments`, found {sorted(map(str, content))}")
    found: dict[str, tuple[Ceiling, ...]] = {}
    for number, experiment in enumerate(experiments, 1):
        where = f"{file}, experiment {number}"
        if not isinstance(experiment, Mapping) or not isinstance(experiment.get("interventions"), list) or "id" not in experiment:
            raise ModelError(f"{where}: expected `id` and a list of `interventions`")
        name = str(experiment["id"])
        if name in found:
            raise ModelError(f"{where}: the id {name!r} is there already; each needs one of its own")
        found[name] = tuple(_ceiling(one, vectors, f"{where} ({name})") for one in experiment["interventions"])
    return found


def _ceiling(one: Any, vectors: Mapping[str, Any], where: str) -> Ceiling:
    if not isinstance(one, Mapping) or set(one) != {"vector", "cap"} or isinstance(one["cap"], bool) or not isinstance(one["cap"], int | float):
        raise ModelError(f"{where}: an intervention has a `vector` and a number `cap`, and is {one!r}")
    entry = vectors.get(one["vector"])
    if not isinstance(entry, Mapping) or isinstance(entry.get("layer"), bool) or not isinstance(entry.get("layer"), int) or "vector" not in entry:
        raise ModelError(f"{where}: the vector {one['vector']!r} is not there with a `layer` and a `vector`; there is {sorted(map(str, vectors))}")
    vector = entry["vector"]
    numbers = np.asarray(vector, dtype=np.float32) if isinstance(vector, list) else vector  # JSON writes 1.0 as 1
    return Ceiling(one_vector(numbers, f"{where}: the vector {one['vector']!r}"), entry["layer"], float(one["cap"]))


def _capping_content(file: Path) -> Mapping[str, Any]:
    """The configuration as the torch file has it, from any of the three formats."""
    try:
        if file.suffix == ".json":
            content = json.loads(file.read_text(encoding="utf-8"))
        elif file.suffix == ".safetensors":
            tensors, header = named_tensors(file)
            layers, experiments = (json.loads(header.get(name, "null")) for name in ("layers", "experiments"))
            if not isinstance(layers, dict) or set(layers) != set(tensors):
                raise ModelError(f"{file}: its header must give `layers`, JSON with a layer for each of {sorted(tensors)}")
            content = {"vectors": {name: {"layer": layers[name], "vector": tensors[name]} for name in tensors}, "experiments": experiments}
        else:
            content = plain_content(file)
    except OSError as error:
        raise ModelError(f"{file}: cannot be read ({error.strerror})") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ModelError(f"{file}: not valid JSON ({error})") from error
    if not isinstance(content, Mapping):
        raise ModelError(f"{file}: expected `vectors` and `experiments`, found {type(content).__name__}")
    return content


def published_directions(model_key: str) -> Path:
    """The published last-token directions of a model key, in the release's own layout."""
    root = os.environ.get("RELSEEK_RELEASE_AXES")
    if not root:
        raise ModelError(f"the published directions of {model_key!r} are not here; set RELSEEK_RELEASE_AXES to their release, or give directions=...")
    return Path(root) / "artifacts" / "directions" / f"{model_key}_last_token.pt"


@dataclass(frozen=True)
class _Read:
    """What is capped along by layer, with the file that it came from and that file's header."""

    file: Path
    header: Mapping[str, str]
    directions: dict[int, np.ndarray]


def _vector_of(study: Path, site: str, layers: Sequence[int] | None, extraction: str | None, epoch: int | None) -> _Read:
    """The one vector of a site, for its own layer or for all of `layers`."""
    derived = derived_in(study)
    folder, files = study / asset_of(site, derived) / site, epochs_of(study, site, derived)
    if not files:
        raise ModelError(
            f"{folder}: no stored vector, and there are no {DIRECTIONS} of the model; give the study's name or folder in the store, or run it"
        )
    if extraction is not None:
        raise ModelError(f"{folder}: a vector has no extraction {extraction!r}; that is for the directions of a contrastive study")
    wanted = max(files) if epoch is None else epoch
    if wanted not in files:
        raise ModelError(f"{folder / f'e{wanted:02d}.safetensors'}: no such epoch; there is {[file.stem for file in files.values()]}")
    tensors, header = read_tensors(files[wanted])
    if "vector" not in tensors:
        raise ModelError(f"{files[wanted]}: expected a tensor named vector, found {sorted(tensors)}")
    return _Read(files[wanted], header, dict.fromkeys(_layers_of(site, layers, folder), tensors["vector"]))


def _directions_of(file: Path, site: str, layers: Sequence[int] | None, extraction: str | None, epoch: int | None) -> _Read:
    """Each layer's own direction, for the site's layer or for all of `layers`."""
    if epoch is not None:
        raise ModelError(f"{file}: directions have no epoch {epoch}; leave it out")
    tensors, header = read_tensors(file)
    there = {name: array for name, array in tensors.items() if array.ndim == 2}
    extraction = extraction or "response_mean"
    if extraction not in there:
        raise ModelError(f"{file}: no directions {extraction!r}; there is {', '.join(sorted(there))}")
    rows, wanted = there[extraction], _layers_of(site, layers, file)
    beyond = [layer for layer in wanted if not 0 <= layer < len(rows)]
    if beyond:
        raise ModelError(f"{file}: no direction for the layers {beyond}; there are the blocks 0 to {len(rows) - 1}")
    return _Read(file, header, {layer: rows[layer] for layer in wanted})


def _layers_of(site: str, layers: Sequence[int] | None, where: Path) -> list[int]:
    if layers is not None:
        return list(layers)
    found = SITE_LAYER.fullmatch(site)
    if found is None:
        raise ModelError(f"{where}: the site {site!r} names no layer; give one that does, {site}:L12, or layers=[...]")
    return [int(found[1])]
