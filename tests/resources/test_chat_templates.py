"""Prompts and replies are what the model's chat template makes of them, whichever roles it knows and whatever token ends its turns."""

from __future__ import annotations

from typing import Any

import pytest

from relseek_resources.models import ModelError, Sampling, SteeredModel

SYSTEM, USER, ASSISTANT = ({"role": role, "content": text} for role, text in (("system", "Be kind."), ("user", "Why?"), ("assistant", "So.")))
REPLY = "It rains. Yes, it does."
END_OF_TURN = {"gemma": "<end_of_turn>", "mistral": "<end>", "qwen": "<|im_end|>", "llama3": "<|eot_id|>", "open": "<end>"}


def templated(model: SteeredModel, conversation: list[dict[str, str]], **options: Any) -> list[int]:
    """The conversation as transformers itself writes it with the template, in tokens."""
    text = model.tokenizer.apply_chat_template(conversation, tokenize=False, date_string="26 Jul 2024", **options)
    return model.tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("family", ["gemma", "mistral"])
def test_a_template_that_refuses_a_system_message_gets_its_text_in_the_first_user_turn(family_model, family):
    model = family_model(family)
    opened = [{"role": "user", "content": "Be kind.\n\nWhy?"}, ASSISTANT, USER]
    assert model.prompt_tokens([SYSTEM, USER, ASSISTANT, USER]) == templated(model, opened, add_generation_prompt=True)
    for empty in ("", "\n"):
        assert model.prompt_tokens([{"role": "system", "content": empty}, USER]) == templated(model, [USER], add_generation_prompt=True)


@pytest.mark.parametrize("family", ["qwen", "llama3"])
@pytest.mark.parametrize("text", ["Be kind.", ""])
def test_a_template_that_takes_a_system_message_gets_it_as_it_is(family_model, family, text):
    model = family_model(family)
    conversation = [{"role": "system", "content": text}, USER, ASSISTANT, USER]
    assert model.prompt_tokens(conversation) == templated(model, conversation, add_generation_prompt=True)


@pytest.mark.parametrize("family", sorted(END_OF_TURN))
def test_a_reply_ends_on_the_token_that_closes_a_turn_of_the_template(family_model, family):
    model = family_model(family)
    assert model.tokenizer.decode(model.reply_tokens(REPLY)) == REPLY + END_OF_TURN[family]
    assert model.reply_tokens(REPLY, end=False) == model.tokenizer(REPLY)["input_ids"]
    if family != "open":  # whose turns no token ends
        whole = templated(model, [USER, {"role": "assistant", "content": REPLY}])
        known = model.prompt_tokens([USER]) + model.reply_tokens(REPLY)
        assert whole[: len(known)] == known and not model.tokenizer.decode(whole[len(known) :]).strip()


def test_a_generated_reply_stops_where_the_template_ends_a_turn(family_model):
    model, greedy = family_model("gemma"), Sampling(temperature=0, max_new_tokens=8)
    likeliest = model.generate([[SYSTEM, USER]], greedy)[0].tokens[0]
    head = model.model.get_output_embeddings().weight
    head[model.tokenizer.convert_tokens_to_ids("<end_of_turn>")] = 2 * head[likeliest]  # now twice its logit
    (reply,) = model.generate([[SYSTEM, USER]], greedy)
    assert reply.finished and reply.text == "" and model.tokenizer.decode(reply.tokens) == "<end_of_turn>"


def test_a_conversation_that_a_template_refuses_is_refused_by_the_name_of_the_model(family_model, monkeypatch):
    model = family_model("gemma")
    monkeypatch.setattr(model.tokenizer, "name_or_path", "someone/gemma-tiny")
    for conversation in ([USER, USER], [SYSTEM, ASSISTANT, USER]):
        with pytest.raises(ModelError, match="someone/gemma-tiny.*Turns must alternate"):
            model.prompt_tokens(conversation)


def test_the_embedded_models_prompts_and_replies_are_the_tokens_that_they_were(embedded_model):
    turns = [SYSTEM, USER, ASSISTANT, {"role": "user", "content": REPLY}]
    prompt = "".join(f"<|im_start|>{turn['role']}\n{turn['content']}<|im_end|>\n" for turn in turns) + "<|im_start|>assistant\n"
    tokenizer = embedded_model.tokenizer
    assert embedded_model.prompt_tokens(turns) == tokenizer(prompt, add_special_tokens=False)["input_ids"]
    plain = tokenizer(REPLY, add_special_tokens=False)["input_ids"]
    assert embedded_model.reply_tokens(REPLY) == [*plain, tokenizer.eos_token_id]
    assert tokenizer.convert_ids_to_tokens(embedded_model.reply_tokens(REPLY)[-1]) == "<|im_end|>"
    assert embedded_model.ends == {tokenizer.eos_token_id}
