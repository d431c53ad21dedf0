"""The sweep: doses mixed in one batch against one reply at a time, on the same rows of the quickstart."""

from __future__ import annotations

import numpy as np

from relseek_assets.behaviour import FILES, read_conversations
from relseek_assets.dataset.pairs import evaluation_items, preference_pairs
from relseek_assets.study import layer_of, load_study
from relseek_assets.sweeps.tables import row_seed
from relseek_resources import models
from relseek_resources.models import Sampling
from tests.performance.comparison import Comparison, compare

PROMPTS = 4
PAIRS = 8


def comparisons() -> list[Comparison]:
    study = load_study("quickstart")
    site = study.sites[0]
    settings = study.model_of(site)
    model = models.load(settings.source, dtype=settings.dtype, device=settings.device)
    pairs = preference_pairs(
        read_conversations(study.behaviour_folder / FILES["starter_conversations"]), heldout_share=study.pairs.heldout_share, seed=study.seed
    )
    items = evaluation_items(pairs, study.seed, study.prompts.max_words).head(PROMPTS)
    rows = [(dose, item) for dose in study.doses.generated for item in items.itertuples()]
    prompts = [[{"role": "system", "content": study.prompts.system}, *item.prompt] for _, item in rows]
    seeds = [row_seed(study.seed, site, 1, dose, item.conversation) for dose, item in rows]
    vector = np.random.default_rng(study.seed).normal(size=model.width).astype(np.float32)
    vector *= 5 / np.linalg.norm(vector)
    sampling = Sampling(study.sampling.temperature, study.sampling.top_p, study.sampling.max_new_tokens)

    def replies(batch_size: int) -> list[models.Reply]:
        with model.steer(vector, layer_of(site), [dose for dose, _ in rows]):
            return model.generate(prompts, sampling, seeds=seeds, batch_size=batch_size)

    return [
        compare(
            "sweep",
            lambda: replies(study.sampling.batch_size),
            lambda: replies(1),
            pairs=PAIRS,
            amount=len(rows),
            unit="replies/s",
            target=5.0,
        )
    ]
