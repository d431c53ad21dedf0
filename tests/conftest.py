"""Fixtures that several test folders share: tiny random models of each family, and the embedded model.

The tiny models have four blocks of width 64 and a tokenizer of single bytes, so that a forward pass takes milliseconds and every
text can be written. Their weights are drawn wide enough for logits to differ clearly between tokens.
"""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Before torch is imported: on a machine that others share, OpenMP threads that wait by spinning make a forward pass ten times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest

WIDTH, BLOCKS, WINDOW = 64, 4, 6
FAMILIES = ("llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3")
SPECIAL_TOKENS = ["<pad>", "<begin>", "<end>", "<system>", "<user>", "<assistant>"]
CHAT_TEMPLATE = (
    "<begin>{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
# Shaped as those of the families are: what each refuses, trims and puts after a turn.
FAMILY_TEMPLATES = {
    "gemma": "{{ bos_token }}{% for turn in messages %}"
    "{% if turn['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% if (turn['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Turns must alternate') }}{% endif %}"
    "<start_of_turn>{{ 'model' if turn['role'] == 'assistant' else 'user' }}\n{{ turn['content'] | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}",
    "mistral": "{{ bos_token }}{% for turn in messages %}"
    "{% if (turn['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Turns must alternate') }}{% endif %}"
    "{% if turn['role'] == 'user' %}[INST] {{ turn['content'] }} [/INST]{% else %}{{ turn['content'] }}{{ eos_token }}{% endif %}{% endfor %}",
    "qwen": "{% for turn in messages %}<|im_start|>{{ turn['role'] }}\n{{ turn['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "llama3": "{{ bos_token }}{% for turn in messages %}"
    "<|start_header_id|>{{ turn['role'] }}<|end_header_id|>\n\n{{ turn['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}",
    "open": "{% for turn in messages %}{{ turn['role'] }}: {{ turn['content'] }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}",
}
FAMILY_ENDS = {"qwen": "<|im_end|>", "llama3": "<|eot_id|>"}  # eos_token, where it is none that only ends a text
FAMILY_TOKENS = ["<start_of_turn>", "<end_of_turn>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "slow: takes more than ten seconds on two cores")


@cache
def byte_tokenizer(family: str = "") -> Any:
    """A chat tokenizer whose tokens are single bytes and six special tokens; padding and end of turn differ.

    With a `family` it has that one's chat template, and seven more special tokens.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*SPECIAL_TOKENS, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL_TOKENS)
    if family:
        tokenizer.add_special_tokens(FAMILY_TOKENS)
    marked = {"pad_token": "<pad>", "bos_token": "<begin>", "eos_token": FAMILY_ENDS.get(family, "<end>")}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **marked, chat_template=FAMILY_TEMPLATES.get(family, CHAT_TEMPLATE))


def random_causal_lm(family: str, **overrides: Any) -> Any:
    """A random transformers model of `family`, the same weights on each call.

    Sliding windows are shorter than the tests' prompts and Gemma 2's soft cap is low, so that both change the logits.
    """
    import torch
    import transformers

    model_class, config_class, special = {
        "llama": ("LlamaForCausalLM", "LlamaConfig", {"head_dim": 16}),
        "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", {}),
        "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", {"head_dim": 16}),
        "mistral": ("MistralForCausalLM", "MistralConfig", {"head_dim": 16, "sliding_window": WINDOW}),
        "gemma2": (
            "Gemma2ForCausalLM",
            "Gemma2Config",
            {"head_dim": 16, "sliding_window": WINDOW, "query_pre_attn_scalar": 16, "final_logit_softcapping": 4.0, "attn_logit_softcapping": 5.0},
        ),
        "gemma3": (
            "Gemma3ForCausalLM",
            "Gemma3TextConfig",
            {
                "head_dim": 16,
                "sliding_window": WINDOW,
                "query_pre_attn_scalar": 16,
                "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
            },
        ),
    }[family]
    tokenizer = byte_tokenizer()
    settings = {
        "vocab_size": len(tokenizer),
        "hidden_size": WIDTH,
        "intermediate_size": 96,
        "num_hidden_layers": BLOCKS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 1024,
        "initializer_range": 0.15,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    config = getattr(transformers, config_class)(**{**settings, **special, **overrides})
    with torch.random.fork_rng():
        torch.manual_seed(20)
        return getattr(transformers, model_class)(config).eval()


@cache
def _weights(family: str) -> Any:
    return random_causal_lm(family)


def _lent(family: str) -> Iterator[Any]:
    """Lend one test a model whose weights others share; it must give it back without hooks, patches or gradients."""
    from relseek_resources.models import SteeredModel

    model = SteeredModel(_weights(family), byte_tokenizer())
    yield model
    for block in model.blocks:
        hooks = [*block._forward_hooks.values(), *block._forward_pre_hooks.values()]
        # transformers leaves hooks of its own behind once hidden states have been asked for
        assert all(hook.__module__.startswith("transformers.") for hook in hooks), "the test left a hook on the shared model"
        assert "forward" not in vars(block), "the test left a patched forward on the shared model"
    assert all(weight.grad is None and not weight.requires_grad for weight in model.model.parameters())


@pytest.fixture(params=FAMILIES)
def tiny(request: pytest.FixtureRequest) -> Iterator[Any]:
    """A tiny random `SteeredModel` of each family in turn."""
    yield from _lent(request.param)


@pytest.fixture
def tiny_llama() -> Iterator[Any]:
    """The tiny random Llama alone, for what does not depend on the family."""
    yield from _lent("llama")


@pytest.fixture(name="byte_tokenizer", scope="session")
def _byte_tokenizer() -> Any:
    return byte_tokenizer()


@pytest.fixture(scope="session")
def family_model() -> Any:
    """`family_model(name)`: a tiny random `SteeredModel` behind the chat template of a family, `FAMILY_TEMPLATES`."""
    from relseek_resources.models import SteeredModel

    def model(family: str) -> Any:
        tokenizer = byte_tokenizer(family)
        return SteeredModel(random_causal_lm("llama", vocab_size=len(tokenizer)), tokenizer)

    return model


@pytest.fixture(name="random_causal_lm", scope="session")
def _random_causal_lm() -> Any:
    """`random_causal_lm(family, **config)`: a fresh transformers model that a test may change."""
    return random_causal_lm


@pytest.fixture(scope="session")
def embedded_model() -> Any:
    """SmolLM2-135M-Instruct in float32 on the CPU; converted on the machine's first use."""
    from relseek_resources.models import load

    return load("embedded:smollm2-135m-instruct", device="cpu")
