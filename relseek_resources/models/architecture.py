"""The parts of a causal language model that steering touches, found by structure and not by name.

Here belongs knowledge of how model families are laid out. A family whose logits are scaled in a way that we do not apply is
refused rather than scored wrongly.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from relseek_resources.models.loading import ModelError


def text_config(model: Any) -> Any:
    return model.config.get_text_config()


def decoder_blocks(model: Any) -> nn.ModuleList:
    """The list of decoder blocks: the one ModuleList with as many entries as the configuration has hidden layers.

    Raises:
        ModelError: none or several lists fit.
    """
    wanted = text_config(model).num_hidden_layers
    found = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == wanted and len({type(block) for block in module}) == 1
    }
    if len(found) != 1:
        raise ModelError(
            f"{type(model).__name__}: expected one list of {wanted} decoder blocks, found {sorted(found) or 'none'}; "
            "this architecture cannot be steered yet"
        )
    return next(iter(found.values()))


def check_plain_logits(model: Any) -> None:
    """Refuse families that scale logits by a factor of their own (Cohere, Granite), which `logits_of` does not apply."""
    config = text_config(model)
    for name in ("logit_scale", "logits_scaling"):
        if getattr(config, name, None) not in (None, 1, 1.0):
            raise ModelError(f"{type(model).__name__}: its {name} is not supported; log-probabilities would be wrong")


def logits_of(model: Any, hidden: torch.Tensor) -> torch.Tensor:
    """Float32 logits (..., vocabulary) of final hidden states (..., width), with Gemma's soft cap where it is set."""
    logits = model.get_output_embeddings()(hidden).float()
    cap = getattr(text_config(model), "final_logit_softcapping", None)
    return logits if cap is None else torch.tanh(logits / cap) * cap


def stream_of(output: Any) -> torch.Tensor:
    """The residual stream in a block's output: the tensor itself, or the first element of a tuple."""
    return output[0] if isinstance(output, tuple) else output


def with_stream(output: Any, stream: torch.Tensor) -> Any:
    """A block's output with its residual stream replaced."""
    return (stream, *output[1:]) if isinstance(output, tuple) else stream


def end_tokens(model: Any, tokenizer: Any) -> set[int]:
    """Every token id that ends a reply: the tokenizer's and the generation configuration's."""
    ends: set[int] = set()
    for value in (tokenizer.eos_token_id, getattr(model.generation_config, "eos_token_id", None)):
        if value is not None:
            ends.update(value if isinstance(value, list) else [value])
    return ends
