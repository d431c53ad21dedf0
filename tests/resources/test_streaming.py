"""A streamed reply is the one that a batch would have given, token by token and character by character."""

from __future__ import annotations

import pytest
import torch

from relseek_resources.models import Add, ModelError, Sampling, SteeredModel
from relseek_resources.models.streaming import stream_text, stream_tokens

VECTOR = torch.randn(64, generator=torch.Generator().manual_seed(0))


def prompt_of(model: SteeredModel, text: str = "How do I bake bread?") -> list[int]:
    return model.prompt_tokens([{"role": "user", "content": text}])


@pytest.mark.parametrize("sampling", [Sampling(temperature=0, max_new_tokens=12), Sampling(temperature=0.9, top_p=0.8, max_new_tokens=12)])
@pytest.mark.parametrize("scale", [0.0, 3.0])
def test_tokens_and_text_are_those_of_generate(tiny, sampling, scale):
    with tiny.intervene(Add(VECTOR, 1, scale)):
        (expected,) = tiny.generate_tokens([prompt_of(tiny)], sampling, seeds=[7])
        drawn: list[int] = []
        text = "".join(stream_text(tiny, stream_tokens(tiny, prompt_of(tiny), sampling, 7), drawn))
    assert tuple(drawn) == expected.tokens
    assert text == expected.text


def test_a_reply_ends_with_its_end_token(random_causal_lm, byte_tokenizer):
    plain = random_causal_lm("llama")
    plain.generation_config.eos_token_id = list(range(6, 262, 9))
    model = SteeredModel(plain, byte_tokenizer)
    sampling = Sampling(max_new_tokens=60)
    lengths = set()
    for seed in range(4):
        (expected,) = model.generate_tokens([prompt_of(model)], sampling, seeds=[seed])
        drawn: list[int] = []
        assert "".join(stream_text(model, stream_tokens(model, prompt_of(model), sampling, seed), drawn)) == expected.text
        assert tuple(drawn) == expected.tokens
        lengths.add(len(drawn))
    assert max(lengths) < 60 and len(lengths) > 1, "replies must end by themselves for this test to say anything"


def test_a_character_of_several_tokens_comes_as_a_whole(tiny_llama):
    text = "naïve, 日本, 👍!"
    tokens = tiny_llama.tokenizer(text, add_special_tokens=False)["input_ids"]
    assert len(tokens) > len(text)
    pieces = list(stream_text(tiny_llama, iter(tokens), []))
    assert "".join(pieces) == text and not any("\ufffd" in piece for piece in pieces)
    assert len(pieces) == len(text)


def test_a_text_that_breaks_off_inside_a_character_keeps_what_generate_keeps(tiny_llama):
    tokens = tiny_llama.tokenizer("yes 👍", add_special_tokens=False)["input_ids"][:-2]
    assert "".join(stream_text(tiny_llama, iter(tokens), [])) == tiny_llama.tokenizer.decode(tokens, skip_special_tokens=True)


def test_tokens_come_one_by_one(tiny_llama):
    seen = []
    handle = tiny_llama.blocks[0].register_forward_hook(lambda *_: seen.append(1))
    stream = stream_tokens(tiny_llama, prompt_of(tiny_llama), Sampling(temperature=0, max_new_tokens=5))
    for number in range(1, 4):
        next(stream)
        assert len(seen) == number
    stream.close()
    handle.remove()


def test_a_prompt_without_tokens_is_refused(tiny_llama):
    with pytest.raises(ModelError, match="without tokens"):
        next(stream_tokens(tiny_llama, [], Sampling()))
