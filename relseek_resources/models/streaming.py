"""One reply, token by token, for a person who waits for it.

Here belongs the loop over one row with its cache and nothing of a terminal. Batches of replies belong in `steered.py`, whose tokens these are.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from relseek_resources.models.loading import ModelError
from relseek_resources.models.sampling import Sampling, draw, uniforms
from relseek_resources.models.steered import SteeredModel


@torch.inference_mode()
def stream_tokens(model: SteeredModel, prompt: Sequence[int], sampling: Sampling, seed: int = 0) -> Iterator[int]:
    """Yield the tokens of `model.generate_tokens([prompt], sampling, seeds=[seed])` as they are drawn, the end token included.

    Raises:
        ModelError: a prompt without tokens, logits that are not finite.
    """
    from relseek_resources.models.decoding import grouped_attention, growing_cache

    if not prompt:
        raise ModelError("a prompt without tokens cannot be answered")
    cache = growing_cache(model.model)
    chances = torch.from_numpy(uniforms([seed], sampling.max_new_tokens)).to(model.device)
    ids = torch.tensor([list(prompt)], device=model.device)
    for step in range(sampling.max_new_tokens):
        with grouped_attention():
            hidden = model.model.base_model(input_ids=ids, past_key_values=cache, use_cache=True).last_hidden_state[:, -1]
        logits = model.logits(hidden)
        if not torch.isfinite(logits).all():
            raise ModelError("the model's logits are not finite; use a smaller multiplier or a wider dtype")
        ids = draw(logits, chances[:, step], sampling).unsqueeze(-1)
        yield int(ids)
        if int(ids) in model.ends:
            return


def stream_text(model: SteeredModel, tokens: Iterator[int], drawn: list[int]) -> Iterator[str]:
    """The text of streamed tokens piece by piece; joined, it is the reply's text. A character that is not whole yet is held back.

    Args:
        drawn: an empty list, to which every token is added as it comes, the end token included.
    """
    said = ""
    for token in tokens:
        drawn.append(token)
        if token in model.ends:
            break
        text = model.tokenizer.decode(drawn, skip_special_tokens=True)
        if not text.endswith("�") and text.startswith(said):
            yield text[len(said) :]
            said = text
    whole = model.tokenizer.decode(drawn[:-1] if drawn and drawn[-1] in model.ends else drawn, skip_special_tokens=True)
    if len(whole) > len(said):
        yield whole[len(said) :]
