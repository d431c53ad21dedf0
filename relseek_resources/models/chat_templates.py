"""How a conversation becomes text, and what the chat templates of model families differ in: the system role, and the token that ends a turn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from relseek_resources.models.loading import ModelError

Conversation = Sequence[dict[str, str]]
LAST_DATE = "26 Jul 2024"  # Llama 3's template prints a date; a fixed one keeps prompts the same from day to day


def rendered(tokenizer: Any, conversation: Conversation, *, reply_follows: bool) -> str:
    """The conversation as the tokenizer's chat template writes it, with the assistant header at its end when `reply_follows`.

    Raises:
        ModelError: the template refuses the conversation, or there is none.
    """
    from jinja2 import TemplateError

    try:
        return tokenizer.apply_chat_template(list(conversation), tokenize=False, add_generation_prompt=reply_follows, date_string=LAST_DATE)
    except (TemplateError, ValueError) as error:
        refused = f"model {tokenizer.name_or_path or type(tokenizer).__name__}: its chat template refuses the conversation: {error}"
        raise ModelError(f"{refused}; ask in turns that it knows, or use another model") from error


def takes_system(tokenizer: Any) -> bool:
    """Whether the chat template has a place for a system message; those of Gemma 1 and 2 and the first of Mistral raise an error."""
    try:
        rendered(tokenizer, [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Well?"}], reply_follows=True)
    except ModelError:
        return False
    return True


def folded(conversation: Conversation) -> list[dict[str, str]]:
    """A conversation that opens with a system message and has a user turn, with that message's text and an empty line before the first user turn's.

    An empty message is left out.
    """
    system, *turns = conversation
    if system["content"].strip():
        first = next(place for place, turn in enumerate(turns) if turn["role"] == "user")
        turns[first] = {**turns[first], "content": f"{system['content']}\n\n{turns[first]['content']}"}
    return turns


def closing_tokens(tokenizer: Any) -> tuple[int, ...]:
    """The special token that follows a reply's text in the chat template; the tokenizer's `eos_token_id` where none does, nothing where it has none.

    Gemma's turns end on another token than its eos_token. What comes after the token, such as ChatML's newline, is no part of a reply.
    """
    said = "Yes."
    ending = () if tokenizer.eos_token_id is None else (tokenizer.eos_token_id,)
    try:
        text = rendered(tokenizer, [{"role": "user", "content": "Well?"}, {"role": "assistant", "content": said}], reply_follows=False)
    except ModelError:
        return ending
    _, found, after = text.rpartition(said)
    tokens = tokenizer(after.lstrip(), add_special_tokens=False)["input_ids"] if found else []
    special = tokens and tokens[0] in tokenizer.added_tokens_decoder and tokenizer.added_tokens_decoder[tokens[0]].special
    return (tokens[0],) if special else ending
