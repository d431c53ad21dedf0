"""The vLLM plugin: carries per-request steering into stock vLLM, in whichever of its processes it is loaded.

Here belongs everything that knows vLLM's insides but its HTTP routes, which are in `endpoints.py`. It changes nothing until a server is started with
`--additional-config '{"relseek": {...}}'` (`vectors.Configuration`); without that, a request that asks for steering is refused.

Three places are touched, each by wrapping a method or registering a hook:

    the front end       `InputProcessor.process_inputs` reads and checks `vllm_xargs.relseek`, replaces it by its canonical form, and salts the
                        request's cached prefix with it, so that no block is shared by requests that are steered otherwise
    a worker's runner   before each batch: which token is steered how (`Tables.prepare`)
    a worker's model    after each block: the op, on the block's own output

An API server that was started without the plugin's routes (`endpoints.py`) is refused, and so are vLLM's settings by which tokens reach a block in
another order, or blocks are reused without regard to the salt.

Imported by this module is nothing that may be missing beside vLLM: it logs a plugin that cannot be imported, and starts without it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import wraps
from typing import Any

import numpy as np

from relseek_resources.serving import requests
from relseek_resources.serving.requests import SteeringError
from relseek_resources.serving.vectors import Configuration, ServingError, Vectors

ASKED = "relseek"  # in vllm_xargs, what the client writes; under additional_config, the server's configuration
STEERED = "relseek_steering"  # in extra_args, the canonical form that a worker reads; a client may not write it
WAYS = ("custom", "vllm_xargs")  # the fields of a body under which steering is asked for
OTHERS = ("session_id",)  # in vllm_xargs, what vLLM itself reads

# Blocks that return (hidden, residual) with the stream as their sum. Another kind may scale or norm what it returns.
DEFERRED = {
    "LlamaDecoderLayer",
    "MistralDecoderLayer",
    "MixtralDecoderLayer",
    "Qwen2DecoderLayer",
    "Qwen3DecoderLayer",
    "Qwen3MoeDecoderLayer",
    "Gemma2DecoderLayer",
    "Gemma3DecoderLayer",
}


def register() -> None:
    """The entry point `vllm.general_plugins`. Called in every process, more than once in some."""
    import vllm.plugins
    from vllm.v1.engine.input_processor import InputProcessor
    from vllm.v1.worker.worker_base import WorkerWrapperBase

    if getattr(InputProcessor, "relseek", None) is None:
        InputProcessor.relseek = True
        _wrap(InputProcessor, "__init__", _set_up_front_end)
        _wrap(InputProcessor, "process_inputs", _process_inputs)
        _wrap(WorkerWrapperBase, "init_device", _init_device)  # `init_worker` is running when it loads plugins
        vllm.plugins.load_endpoint_plugins = _with_endpoints(vllm.plugins.load_endpoint_plugins)


def _wrap(owner: Any, name: str, around: Callable[..., Any]) -> None:
    """Put `around(original, self, ...)` in a method's place."""
    original = getattr(owner, name)

    @wraps(original)
    def method(self: Any, *arguments: Any, **options: Any) -> Any:
        return around(original, self, *arguments, **options)

    setattr(owner, name, method)


def configured(vllm_config: Any) -> Configuration | None:
    """The server's configuration, None where it declares no steering.

    Raises:
        ServingError: a fault in it, or a setting of vLLM beside which steering would be wrong.
    """
    additional = vllm_config.additional_config
    if not isinstance(additional, dict) or ASKED not in additional:
        return None
    refused = [reason for met, reason in _unsupported(vllm_config) if met]
    if refused:
        raise ServingError("relseek steers no server with " + "; nor one with ".join(refused))
    return Configuration.from_json(additional[ASKED])


def _unsupported(vllm_config: Any) -> list[tuple[bool, str]]:
    parallel, cache = vllm_config.parallel_config, vllm_config.cache_config
    return [
        (vllm_config.use_v2_model_runner, "the V2 model runner: set VLLM_USE_V2_MODEL_RUNNER=0"),
        (parallel.use_ubatching, "dual batch overlap (--enable-dbo), which splits a batch in two"),
        (parallel.prefill_context_parallel_size > 1, "prefill context parallelism, which spreads a prompt's tokens over workers"),
        (vllm_config.kv_transfer_config is not None, "a KV connector, which may store blocks without the salt that sets steered ones apart"),
        (bool(cache.kv_sharing_fast_prefill), "--kv-sharing-fast-prefill, which drops tokens between blocks"),
        (parallel.pipeline_parallel_size > 1, "pipeline parallelism, with which it has not been tried"),
        (parallel.data_parallel_size > 1, "data parallelism (--data-parallel-size), with which it has not been tried: put replicas behind a router"),
        (vllm_config.speculative_config is not None, "speculative decoding, with which it has not been tried"),
        (vllm_config.lora_config is not None, "LoRA adapters (--enable-lora), with which it has not been tried"),
    ]


# --- the front end ------------------------------------------------------------------------------------------------------

_offered: dict[str, Vectors | None] = {}  # what this process's server offers, for the request classes, which know no server
_processors: list[Any] = []  # vLLM's custom logits processors, which read words of their own in vllm_xargs


def configuration_here() -> Configuration | None:
    """The configuration of this process's server, None where it steers nobody; an API server has its engine before its routes."""
    vectors = _offered.get("vectors")
    return vectors.configuration if vectors is not None else None


def _set_up_front_end(original: Callable[..., None], self: Any, vllm_config: Any, *arguments: Any, **options: Any) -> None:
    original(self, vllm_config, *arguments, **options)
    configuration = configured(vllm_config)
    text = vllm_config.model_config.hf_text_config
    self.relseek_vectors = _offered["vectors"] = Vectors(configuration, text.num_hidden_layers, text.hidden_size) if configuration else None
    _processors[:] = vllm_config.model_config.logits_processors or []
    if configuration and vllm_config.parallel_config._api_process_count > 1:
        raise ServingError("relseek steers no server with several front-end processes (--api-server-count): one alone knows what is registered")
    _prepare_request_classes()


def _with_endpoints(original: Callable[..., list[Any]]) -> Callable[..., list[Any]]:
    """vLLM's loading of an API server's endpoint plugins, and then the check; the engine is there by then."""

    @wraps(original)
    def load(*arguments: Any, **options: Any) -> list[Any]:
        found = original(*arguments, **options)
        check_endpoints(found)
        return found

    return load


def check_endpoints(attached: Iterable[Any]) -> None:
    """Refuse a steering API server without the plugin's endpoints: other routes would drop a request for steering, and nothing checks the workers.

    Raises:
        ServingError: vLLM attached others alone; it attaches none that VLLM_PLUGINS does not name.
    """
    if _offered.get("vectors") is not None and ASKED not in {getattr(one, "name", None) for one in attached}:
        raise ServingError(
            "this server is configured for steering, and vLLM has not attached relseek's endpoints to it: set VLLM_PLUGINS=relseek, beside other "
            "plugins where there are any; where it names relseek already, vLLM's log says above why they could not be loaded"
        )


def _process_inputs(original: Callable[..., Any], self: Any, request_id: str, prompt: Any, params: Any, *arguments: Any, **options: Any) -> Any:
    """Check and translate what a request asks for; refuse it, as vLLM refuses other parameters, with HTTP 400."""
    from vllm.exceptions import VLLMValidationError

    extra = dict(getattr(params, "extra_args", None) or {})
    try:
        text = asked(extra, self.relseek_vectors)
        if text and options.get("resumable"):
            raise SteeringError("a prompt that is sent in parts cannot be steered")
        request = original(self, request_id, prompt, params, *arguments, **options)
        requests.check_salt(request.cache_salt)
    except SteeringError as error:
        raise VLLMValidationError(f"steering: {error}", parameter=f"vllm_xargs.{ASKED}") from error
    if request.sampling_params is not None and extra:
        extra.pop(ASKED, None)
        request.sampling_params.extra_args = {**extra, STEERED: text} if text else extra or None
    if text:
        request.cache_salt = requests.cache_salt(text, request.cache_salt)
    return request


def asked(extra: dict[str, Any], vectors: Vectors | None) -> str:
    """The canonical form of what a request's extra arguments ask for, empty for no steering.

    Raises:
        SteeringError: it cannot be met, or this server does not steer.
    """
    if STEERED in extra:
        raise SteeringError(f"vllm_xargs.{STEERED} is the server's own; ask in vllm_xargs.{ASKED}")
    if word := misread(extra, ASKED):
        raise SteeringError(f"vllm_xargs: unknown {requests.shown(word)}; ask in vllm_xargs.{ASKED}")
    if ASKED not in extra:
        return ""
    if vectors is None:
        raise SteeringError("this server offers no vectors: it was started without a configuration of relseek")
    wanted = extra[ASKED]
    if isinstance(wanted, dict):  # put there by `_with_custom`
        wanted = requests.read_custom(wanted.get("custom"), vectors)
    return requests.canonical(requests.read(wanted, vectors))


def misread(words: Mapping[str, Any], *known: str) -> str:
    """The first word that speaks of steering and that nobody reads, empty for none."""
    return next((word for word in words if word not in known and any(part in word.lower() for part in ("relseek", "steer"))), "")


def buried(fields: Mapping[str, Any]) -> str:
    """The first word, at whatever depth below fields that nobody reads, with which steering is asked for; empty for none.

    Labels, strings under `metadata`, ask for nothing. No recursion: JSON may be nested deeper than Python's own stack.
    """
    waiting = [_unlabelled(name, value) for name, value in fields.items()]
    while waiting:
        value = waiting.pop()
        if isinstance(value, list):
            waiting += value
        elif isinstance(value, Mapping):
            if word := next((word for word in value if word in WAYS), "") or misread(value):
                return word
            waiting += [_unlabelled(name, held) for name, held in value.items()]
    return ""


def _unlabelled(name: str, value: Any) -> Any:
    if name == "metadata" and isinstance(value, Mapping):
        return {label: held for label, held in value.items() if not isinstance(held, str)}
    return value


def check_words(beside: Mapping[str, Any], xargs: Mapping[str, Any], vectors: Vectors | None, processors: Sequence[Any] = ()) -> None:
    """Refuse what vLLM would drop without a word, so that a misspelt request is not answered by the plain model.

    Args:
        beside: the fields of a body that vLLM does not know.
        xargs: what the client wrote into `vllm_xargs`.
        vectors: None on a server that steers nobody, where other words are nobody's business.
        processors: custom logits processors, whose words cannot be told from misspelt ones.

    Raises:
        SteeringError: naming the word.
    """
    if word := misread(beside) or buried({name: value for name, value in beside.items() if name != "custom"}):
        name = requests.shown_name(word)
        raise SteeringError(f"{name}: write it into vllm_xargs.{ASKED}, as JSON text, or into custom.steer_multiplier, either at the top of the body")
    unknown = sorted(set(xargs) - {ASKED, STEERED, *OTHERS})
    if unknown and vectors is not None and not processors:
        raise SteeringError(f"vllm_xargs: unknown {', '.join(map(requests.shown, unknown[:5]))}; steering is asked for in vllm_xargs.{ASKED}")


def check_text(said: Any) -> None:
    """Refuse half of a surrogate pair, which JSON can write and no process can be sent: vLLM would answer with HTTP 500 and no word."""
    try:
        json.dumps(said, ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError as error:
        raise SteeringError(f"stop and vllm_xargs must be text, and hold half of a surrogate pair ({error.reason})") from error


def _prepare_request_classes() -> None:
    """Let vLLM's request classes carry `custom`, which they would drop, and refuse at once what cannot be met.

    Refused here, a request is answered with HTTP 400; in `process_inputs` a streamed one has been answered with 200 already.
    """
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest
    from vllm.entrypoints.openai.responses.protocol import ResponsesRequest

    for owner in (ChatCompletionRequest, CompletionRequest, ResponsesRequest):
        if not hasattr(owner.to_sampling_params, "__wrapped__"):
            _wrap(owner, "to_sampling_params", _with_custom)
            if hasattr(owner, "to_beam_search_params"):
                _wrap(owner, "to_beam_search_params", _without_steering)


def _with_custom(original: Callable[..., Any], self: Any, *arguments: Any, **options: Any) -> Any:
    from vllm.exceptions import VLLMValidationError

    xargs = dict(self.vllm_xargs or {})  # before vLLM adds words of its own to it
    params = original(self, *arguments, **options)
    beside = self.model_extra or {}
    if beside.get("custom") is not None:
        if ASKED in (params.extra_args or {}):
            raise VLLMValidationError(f"steering is asked for twice, in custom and in vllm_xargs.{ASKED}", parameter="custom")
        params.extra_args = {**(params.extra_args or {}), ASKED: {"custom": beside["custom"]}}
    try:
        check_text([params.stop, params.extra_args])
        check_words(beside, xargs, _offered.get("vectors"), _processors)
        asked(params.extra_args or {}, _offered.get("vectors"))
        requests.check_salt(self.cache_salt)
    except SteeringError as error:
        raise VLLMValidationError(f"steering: {error}", parameter=f"vllm_xargs.{ASKED}") from error
    return params


def _without_steering(original: Callable[..., Any], self: Any, *arguments: Any, **options: Any) -> Any:
    from vllm.exceptions import VLLMValidationError

    beside, xargs = self.model_extra or {}, self.vllm_xargs or {}
    if ASKED in xargs or "custom" in beside or misread(beside) or misread(xargs) or buried(beside):
        raise VLLMValidationError("steering: beam search cannot be steered", parameter="use_beam_search")
    return original(self, *arguments, **options)


# --- a worker -----------------------------------------------------------------------------------------------------------


def _init_device(original: Callable[..., None], self: Any, *arguments: Any, **options: Any) -> None:
    original(self, *arguments, **options)
    configuration = configured(self.vllm_config)
    if configuration is not None:
        worker, load = self.worker, self.worker.load_model

        def load_model(*loading: Any, **how: Any) -> None:
            load(*loading, **how)
            worker.relseek = Steering(worker.model_runner, configuration)

        worker.load_model = load_model
        worker.relseek_register = lambda vectors: worker.relseek.register(vectors)
        worker.relseek_registered = lambda: worker.relseek.tables.registered()


class Steering:
    """Steering attached to one worker's model and runner."""

    def __init__(self, runner: Any, configuration: Configuration) -> None:
        """Put the op behind the model's blocks and the filling of its tables before each batch.

        Raises:
            ServingError: a model of which it is not known how its blocks return the stream.
        """
        from relseek_resources.serving.steering_op import TABLES, Tables

        text = runner.vllm_config.model_config.hf_text_config
        scheduler = runner.vllm_config.scheduler_config
        vectors = Vectors(configuration, text.num_hidden_layers, text.hidden_size)
        self.tables = Tables(
            tokens=max(scheduler.max_num_batched_tokens, scheduler.max_num_seqs),
            requests=scheduler.max_num_seqs,
            blocks=text.num_hidden_layers,
            width=text.hidden_size,
            capacity=configuration.capacity,
            device=runner.device,
        )
        self.number = len(TABLES)
        TABLES[self.number] = self.tables
        for digest, vector in vectors.by_digest().items():
            self.tables.register(digest, vector)
        for layer, block in blocks_of(runner.model, text.num_hidden_layers).items():
            if layer in vectors.blocks:
                block.register_forward_hook(self._hook(layer))
        self._follow(runner)

    def register(self, vectors: dict[str, bytes]) -> int:
        """Add vectors, as float32 bytes by digest, while the server runs."""
        for digest, content in vectors.items():
            self.tables.register(digest, np.frombuffer(content, dtype="<f4").copy())
        return len(self.tables.registered())

    def _hook(self, layer: int) -> Callable[..., None]:
        import torch

        number = self.number

        def steer(_module: Any, _inputs: Any, output: Any) -> None:
            hidden, residual = output
            torch.ops.relseek.steer(hidden, residual, layer, number)

        return steer

    def _follow(self, runner: Any) -> None:
        """Fill the tables whenever the runner prepares a batch."""
        prepare, tables = runner._prepare_inputs, self.tables

        @wraps(prepare)
        def prepare_inputs(scheduler_output: Any, num_scheduled_tokens: np.ndarray, *arguments: Any, **options: Any) -> Any:
            tables.prepare([steered(runner.requests[request].sampling_params) for request in runner.input_batch.req_ids], num_scheduled_tokens)
            return prepare(scheduler_output, num_scheduled_tokens, *arguments, **options)

        runner._prepare_inputs = prepare_inputs


def steered(params: Any) -> str:
    """The canonical form of a request's steering that reached a worker."""
    extra = params.extra_args if params is not None else None
    if not extra:
        return ""
    if ASKED in extra:  # it came by a way on which `process_inputs` did not see it; better to stop than to serve it unsteered
        raise RuntimeError(f"a request for steering reached a worker unread: {json.dumps(str(extra[ASKED]))[:200]}")
    return extra.get(STEERED, "")


def blocks_of(model: Any, number: int) -> dict[int, Any]:
    """The decoder blocks that this worker holds, by number; under pipeline parallelism the others are placeholders."""
    from torch import nn
    from vllm.model_executor.models.utils import PPMissingLayer

    found = []
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == number:
            here = {layer: block for layer, block in enumerate(module) if not isinstance(block, PPMissingLayer)}
            if here and {type(block).__name__ for block in here.values()} <= DEFERRED:
                found.append(here)
    if len(found) != 1:
        known = ", ".join(sorted(DEFERRED))
        raise ServingError(
            f"relseek cannot steer {type(model).__name__}: {len(found)} lists of {number} blocks are of a kind that it knows ({known})"
        )
    return found[0]
