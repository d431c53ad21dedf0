"""The tables of persona directions: replies, quality, geometry, and what is recomputed of the published artifacts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from relseek_assets.persona_set import PERSONA_KINDS, QUERY_KINDS
from relseek_assets.vectors.contrastive import EXTRACTIONS, MEASURES, SPLITS, best_layer
from relseek_resources.axes_release import JudgedReply, PublishedEvaluation
from relseek_resources.storage import Column, TableSchema

FAILED = -1.0  # what the published judge's score is where its answer could not be read

MODEL = Column("model", "string", "the study's name of the model")
EXTRACTION = Column("extraction", "string", "activations that the direction was made from", choices=EXTRACTIONS)
LAYER = Column("layer", "integer", "0-indexed block after which the stream is read", low=0)
PERSONA = Column("persona", "string", "who the model is asked to be")
PERSONA_KIND = Column("persona_kind", "string", "side of the axis", choices=PERSONA_KINDS)
HOSTILE = Column("hostile", "boolean", "whether the persona works against the assistant character")

PERSONA_REPLIES = TableSchema(
    "persona_replies",
    (
        MODEL,
        Column("query", "string", "id of the question"),
        Column("query_kind", "string", "kind of the question", choices=QUERY_KINDS),
        PERSONA,
        PERSONA_KIND,
        HOSTILE,
        Column("system", "string", "the persona's system prompt"),
        Column("text", "string", "the question"),
        Column("reply", "string", "what the model answered"),
        Column("tokens", "integer", "tokens drawn, end token included", "tokens", low=0),
        Column("finished", "boolean", "whether the reply ended by itself"),
        Column("seed", "integer", "of the row's own random numbers"),
        Column("token_ids", "json", "the tokens drawn"),
    ),
    key=("model", "query", "persona"),
)

MEANINGS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "cohens_d": ("difference of held-out means over the root mean square of population sds", {}),
    "accuracy_at_zero": ("share of held-out rows on their kind's side of 0", {"low": 0, "high": 1}),
    "accuracy_at_midpoint": ("share of held-out rows on their kind's side of the midpoint", {"low": 0, "high": 1}),
    "auc": ("chance that an assistant's row projects higher than another's, ties half", {"low": 0, "high": 1}),
}


def _estimates(name: str) -> tuple[Column, ...]:
    meaning, bounds = MEANINGS[name]
    return (
        Column(name, "number", meaning, nullable=True, **bounds),
        Column(f"{name}_lower", "number", "lower end of its 95% bootstrap interval over queries", nullable=True),
        Column(f"{name}_upper", "number", "upper end of its 95% bootstrap interval over queries", nullable=True),
    )


DIRECTION_QUALITY = TableSchema(
    "direction_quality",
    (
        MODEL,
        Column("split", "string", "what of a held-out row never occurs in training", choices=SPLITS),
        EXTRACTION,
        Column("evaluated_with", "string", "activations of the held-out rows", choices=EXTRACTIONS),
        LAYER,
        *(column for name in MEASURES for column in _estimates(name)),
        Column("midpoint", "number", "halfway between the training rows' mean projections", "stream units"),
        Column("n", "integer", "held-out rows", low=0),
        Column("n_assistant", "integer", "held-out rows of assistants", low=0),
        Column("n_queries", "integer", "queries of the held-out rows, the bootstrap's clusters", low=0),
        Column("best_by_accuracy", "boolean", "highest accuracy at zero, ties by d, as published"),
        Column("best_by_auc", "boolean", "highest AUC, ties by d"),
    ),
    key=("model", "split", "extraction", "evaluated_with", "layer"),
)

PERSONA_GEOMETRY = TableSchema(
    "persona_geometry",
    (
        MODEL,
        EXTRACTION,
        LAYER,
        PERSONA,
        PERSONA_KIND,
        HOSTILE,
        Column("projection", "number", "the persona's mean activation on the axis", "stream units"),
        Column("projection_se", "number", "standard error of that mean over the persona's replies", "stream units", low=0, nullable=True),
        Column("pc1", "number", "its score on the first principal component of all personas' means", "stream units"),
        Column("pc1_share", "number", "of the layer: the component's share of the variance between personas", low=0, high=1),
        Column("pc1_cosine", "number", "of the layer: |cosine| of the component with the axis", low=0, high=1.000001),
        Column("n", "integer", "the persona's replies", low=1),
    ),
    key=("model", "extraction", "layer", "persona"),
)

PUBLISHED_DIRECTION_QUALITY = TableSchema(
    "published_direction_quality",
    (
        Column("model", "string", "published model key"),
        EXTRACTION,
        LAYER,
        Column("cohens_d", "number", "recomputed from the published means and sds"),
        Column("cohens_d_published", "number", "as stored in the artifact"),
        Column("accuracy", "number", "at zero, 40 held-out rows, last-token activations", low=0, high=1),
        Column("assistant_mean", "number", "mean projection of assistants", "stream units"),
        Column("other_mean", "number", "mean projection of other personas", "stream units"),
        Column("assistant_sd", "number", "population sd of the assistants' projections", "stream units", low=0),
        Column("other_sd", "number", "population sd of the other personas' projections", "stream units", low=0),
        Column("norm", "number", "length of the published direction", low=0, nullable=True),
        Column("best", "boolean", "highest accuracy, ties by d, recomputed"),
        Column("best_published", "boolean", "the layer that the artifact names"),
    ),
    key=("model", "extraction", "layer"),
)

PUBLISHED_INTERVENTION_SCORES = TableSchema(
    "published_intervention_scores",
    (
        Column("intervention", "string", "steering adds scale·d̂; capping raises h·d̂ to the threshold"),
        Column("strength", "number", "scale of steering, threshold of capping (0: off)"),
        *(
            Column(f"{score}{suffix}", kind, meaning, low=0, nullable=suffix in ("", "_se"), high=10 if suffix == "" else None)
            for score in ("assistant", "coherence")
            for suffix, kind, meaning in (
                ("", "number", "mean of the judge's 0 to 10, failures left out"),
                ("_se", "number", "standard error of that mean"),
                ("_failed", "integer", "judgements that failed, stored as -1"),
            )
        ),
        Column("n", "integer", "replies", low=1),
    ),
    key=("intervention", "strength"),
)


def published_quality(model: str, extraction: str, found: PublishedEvaluation, norms: Mapping[int, float]) -> pd.DataFrame:
    """One row a layer of a published evaluation, with d recomputed: (μ_a − μ_o) / sqrt((σ_a² + σ_o²) / 2) (spec section 11.1)."""
    layers = pd.DataFrame.from_dict(found.layers, orient="index").rename_axis("layer").reset_index()
    frame = pd.DataFrame(
        {
            "model": model,
            "extraction": extraction,
            "layer": layers["layer"],
            "assistant_mean": layers["assistant_mean"],
            "other_mean": layers["non_assistant_mean"],
            "assistant_sd": layers["assistant_std"],
            "other_sd": layers["non_assistant_std"],
            "accuracy": layers["accuracy"],
            "cohens_d_published": layers["cohens_d"],
            "norm": layers["layer"].map(norms),
            "best_published": layers["layer"] == found.best_layer,
        }
    )
    frame["cohens_d"] = (frame["assistant_mean"] - frame["other_mean"]) / np.sqrt((frame["assistant_sd"] ** 2 + frame["other_sd"] ** 2) / 2)
    return frame.assign(best=frame["layer"] == best_layer(frame, "accuracy"))


def published_scores(replies: Sequence[JudgedReply]) -> pd.DataFrame:
    """Mean scores by intervention and strength; a failed judgement is counted apart, where the published means keep it in the denominator."""
    frame = pd.DataFrame([vars(reply) for reply in replies])
    rows = []
    for (intervention, strength), part in frame.groupby(["intervention", "strength"], sort=True):
        row = {"intervention": intervention, "strength": strength, "n": len(part)}
        for score in ("assistant", "coherence"):
            values = part[f"{score}_score"]
            given = values[values != FAILED]
            row |= {score: given.mean(), f"{score}_se": given.sem(), f"{score}_failed": int(values.eq(FAILED).sum())}
        rows.append(row)
    return pd.DataFrame(rows)
