"""Directions from contrasted personas: pairing, activations, mean differences, their quality by layer, and the geometry of personas.

Here belongs the arithmetic of spec/pipeline.md, section 11, and nothing of Dagster or files. Interventions along a direction belong in `axes/` and
in `relseek_resources.models`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from relseek_assets.persona_set import ASSISTANT, PERSONA_KINDS, PersonaSet, PersonaSetError, Query
from relseek_resources.storage import keyed_order, keyed_seed

if TYPE_CHECKING:
    from relseek_resources.models import SteeredModel

LAST_TOKEN, RESPONSE_MEAN = "last_token", "response_mean"
EXTRACTIONS = (LAST_TOKEN, RESPONSE_MEAN)
SPLITS = ("query", "persona", "both")
MEASURES = ("cohens_d", "accuracy_at_zero", "accuracy_at_midpoint", "auc")
ROWS = ("query", "query_kind", "persona", "persona_kind", "hostile", "system", "text")


# --- who answers what, and what is held out ---------------------------------------------------------------------------


def pairing(personas: PersonaSet, assistants: int, others: int, seed: int) -> pd.DataFrame:
    """Which personas answer each query: columns `ROWS`, queries in the order of the file.

    A query goes to those personas of either kind that have answered least so far, ties by a keyed order of its own. So all personas of a kind answer
    equally often (within one), over all queries and over those of a kind, and no two of them always meet.
    """
    rows = {}
    for of_kind, wanted in ((personas.assistants, assistants), (personas.others, others)):
        answered: Counter[str] = Counter()
        for query in _by_kind(personas.queries, seed):
            ranked = sorted(of_kind, key=lambda one: (answered[one.name], keyed_seed(seed, "pairing", query.query, one.name)))
            for persona in ranked[:wanted]:
                answered[persona.name] += 1
                values = (query.query, query.kind, persona.name, persona.kind, persona.hostile, persona.system, query.text)
                rows[query.query, persona.name] = dict(zip(ROWS, values, strict=True))
    order = [(query.query, persona.name) for query in personas.queries for persona in personas.personas]
    return pd.DataFrame([rows[key] for key in order if key in rows])


def _by_kind(queries: Sequence[Query], seed: int) -> list[Query]:
    """Queries one kind after the other, each in a keyed order."""
    by_id = {query.query: query for query in queries}
    kinds = dict.fromkeys(query.kind for query in queries)
    return [by_id[name] for kind in kinds for name in keyed_order([query.query for query in queries if query.kind == kind], seed, "order")]


def held_out(names: Sequence[str], kinds: Sequence[str], share: float, seed: int) -> set[str]:
    """`share` of the distinct names of each kind by a keyed order, at least one and never all of them."""
    found: set[str] = set()
    of_name = dict(zip(names, kinds, strict=True))
    for kind in dict.fromkeys(kinds):
        mine = [name for name in of_name if of_name[name] == kind]
        count = min(max(1, round(share * len(mine))), len(mine) - 1)
        found.update(keyed_order(mine, seed, "heldout", kind)[:count])
    return found


def split_rows(rows: pd.DataFrame, split: str, queries: Iterable[str], personas: Iterable[str]) -> tuple[np.ndarray, np.ndarray]:
    """(training, held-out) as truth values over `rows`, given the queries and personas held out.

    `query`: no held-out row's query occurs in training; `persona`: no persona; `both`: neither, and rows with one of the two are left out.
    """
    query, persona = rows["query"].isin(set(queries)).to_numpy(), rows["persona"].isin(set(personas)).to_numpy()
    return {"query": (~query, query), "persona": (~persona, persona), "both": (~query & ~persona, query & persona)}[split]


# --- activations ------------------------------------------------------------------------------------------------------


def read_activations(
    model: SteeredModel,
    prompts: Sequence[Sequence[int]],
    replies: Sequence[Sequence[int]],
    *,
    batch_size: int = 16,
    on_batch: Callable[[int], None] = lambda rows: None,
) -> dict[str, np.ndarray]:
    """Residual stream after every block in one pass over prompt and reply: float32 (rows, layers, width) by extraction.

    `last_token` is that of the prompt's last token, which ends the assistant header; `response_mean` is the mean over the reply's tokens, or that of
    the prompt's last token where the reply has none (spec/pipeline.md, 11.1).

    Args:
        replies: tokens drawn, without the one that ends the turn.
    """
    import torch

    from relseek_resources.models.steered import by_length

    layers = range(model.layers)
    found = {name: np.empty((len(prompts), model.layers, model.width), np.float32) for name in EXTRACTIONS}
    for rows in by_length([len(prompt) + len(reply) for prompt, reply in zip(prompts, replies, strict=True)], batch_size):
        with torch.inference_mode():
            streams, _ = model.run_to(model.batch([[*prompts[row], *replies[row]] for row in rows]), layers)
            for place, row in enumerate(rows):
                start, stop = len(prompts[row]), len(prompts[row]) + len(replies[row])
                of_row = torch.stack([streams[layer][place, start - 1 : stop].float() for layer in layers])
                found[LAST_TOKEN][row] = of_row[:, 0].cpu().numpy()
                found[RESPONSE_MEAN][row] = of_row[:, 1 if stop > start else 0 :].mean(1).cpu().numpy()
        on_batch(len(rows))
    return found


# --- directions -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Directions:
    """A direction after every block, pointing to the assistant.

    `unit` is (layers, width) of length one; `length`, (layers,), is that of the mean difference itself; `midpoint`, (layers,), lies halfway between
    the training rows' mean projections of the two kinds.
    """

    unit: np.ndarray
    length: np.ndarray
    midpoint: np.ndarray


def directions(activations: np.ndarray, rows: pd.DataFrame, training: np.ndarray) -> Directions:
    """Mean over the training queries of (mean of the assistants' rows − mean of the others' rows), layer by layer.

    Averaging within a query first keeps what queries do to activations out of the difference, also where personas were left out of some.

    Args:
        activations: (rows, layers, width).
        training: truth values over rows.

    Raises:
        PersonaSetError: no training query was answered by both kinds.
    """
    weights = _contrast_weights(rows[training])
    there = activations[training]
    difference = np.stack([weights @ there[:, layer].astype(np.float64) for layer in range(activations.shape[1])])
    length = np.linalg.norm(difference, axis=1)
    if not length.all():
        raise PersonaSetError(f"the mean difference after block {int(np.argmin(length))} is zero: the model does not tell the personas apart there")
    unit = (difference / length[:, None]).astype(np.float32)
    return Directions(unit, length, _midpoint(project(there, unit), _is_assistant(rows[training])))


def _contrast_weights(rows: pd.DataFrame) -> np.ndarray:
    """Weights (rows,) whose sum with the activations is the mean difference; rows of queries that lack one kind weigh nothing."""
    counts = rows.groupby(["query", "persona_kind"]).size().unstack(fill_value=0).reindex(columns=PERSONA_KINDS, fill_value=0)
    complete = counts[(counts > 0).all(axis=1)]
    if complete.empty:
        raise PersonaSetError("no training query is answered by both kinds of persona; raise contrast.assistants_per_query or others_per_query")
    cells = list(zip(rows["query"], rows["persona_kind"], strict=True))
    signs = np.where(_is_assistant(rows), 1.0, -1.0)
    shares = [1 / complete.loc[query, kind] if query in complete.index else 0.0 for query, kind in cells]
    return signs * np.array(shares) / len(complete)


def _is_assistant(rows: pd.DataFrame) -> np.ndarray:
    return rows["persona_kind"].eq(ASSISTANT).to_numpy()


def project(activations: np.ndarray, units: np.ndarray) -> np.ndarray:
    """h·d̂ of every row and layer: (rows, layers, width) on (layers, width) gives float64 (rows, layers)."""
    return np.stack([activations[:, layer] @ units[layer] for layer in range(len(units))], axis=1).astype(np.float64)


def _midpoint(projections: np.ndarray, assistant: np.ndarray) -> np.ndarray:
    return (projections[assistant].mean(0) + projections[~assistant].mean(0)) / 2


# --- quality ----------------------------------------------------------------------------------------------------------


def direction_quality(
    activations: Mapping[str, np.ndarray],
    rows: pd.DataFrame,
    queries: Iterable[str],
    personas: Iterable[str],
    *,
    draws: int,
    seed: int,
) -> pd.DataFrame:
    """Every measure of every direction on held-out rows, with 95% bootstrap intervals: a row a split, extraction, evaluation and layer.

    A direction is evaluated with the activations that it was made from. `response_mean` is evaluated with `last_token` too, as it was published
    (section 12 names the mismatch). Of a split without held-out rows of one kind the measures are empty.

    Args:
        activations: (rows, layers, width) by extraction.
        queries, personas: those held out.
        draws: of the bootstrap, which resamples queries with all their rows.
    """
    queries, personas = set(queries), set(personas)
    parts = []
    for split in SPLITS:
        training, held = split_rows(rows, split, queries, personas)
        for made_with in EXTRACTIONS:
            found = directions(activations[made_with], rows, training)
            for evaluated_with in dict.fromkeys((made_with, LAST_TOKEN)):
                same = evaluated_with == made_with
                known = project(activations[evaluated_with][training], found.unit)
                midpoint = found.midpoint if same else _midpoint(known, _is_assistant(rows[training]))
                projections = project(activations[evaluated_with][held], found.unit)
                part = quality(projections, _is_assistant(rows[held]), rows["query"][held].to_numpy(), midpoint, draws=draws, seed=seed)
                parts.append(part.assign(split=split, extraction=made_with, evaluated_with=evaluated_with))
    return pd.concat(parts, ignore_index=True)


def quality(projections: np.ndarray, assistant: np.ndarray, queries: np.ndarray, midpoint: np.ndarray, *, draws: int, seed: int) -> pd.DataFrame:
    """Measures of one direction a layer, with 95% percentile intervals of a bootstrap over queries.

    `cohens_d` has population standard deviations (11.1); accuracies are the share of rows on their kind's side of zero, or of `midpoint`; `auc` is
    the chance that an assistant's row projects higher than another's, ties half.

    Args:
        projections: (rows, layers); assistant, queries: (rows,); midpoint: (layers,) from training rows.

    Returns:
        layer, the measures with `_lower` and `_upper`, n and its parts, the two best layers. Empty where a kind has no row.
    """
    layers = projections.shape[1]
    counts = {"n": len(assistant), "n_assistant": int(assistant.sum()), "n_queries": len(set(queries))}
    frame = pd.DataFrame({"layer": range(layers), **counts, "midpoint": midpoint})
    if not 0 < assistant.sum() < len(assistant):
        empty = {f"{name}{bound}": np.nan for name in MEASURES for bound in ("", "_lower", "_upper")}
        return frame.assign(**empty, best_by_accuracy=False, best_by_auc=False)
    sums = _QuerySums.of(projections, assistant, queries, midpoint)
    weights = np.random.default_rng(seed).multinomial(sums.queries, np.full(sums.queries, 1 / sums.queries), size=draws).astype(float)
    estimates, drawn = sums.measures(np.ones((1, sums.queries))), sums.measures(weights)
    for name in MEASURES:
        frame[name] = estimates[name][0]
        frame[f"{name}_lower"], frame[f"{name}_upper"] = np.nanpercentile(drawn[name], [2.5, 97.5], axis=0)
    return frame.assign(
        best_by_accuracy=frame["layer"] == best_layer(frame, "accuracy_at_zero"), best_by_auc=frame["layer"] == best_layer(frame, "auc")
    )


def best_layer(frame: pd.DataFrame, measure: str = "accuracy_at_zero") -> int:
    """The layer with the highest measure, ties by Cohen's d: with the accuracy at zero the published rule (11.1)."""
    return int(frame.sort_values([measure, "cohens_d", "layer"], ascending=[False, False, True])["layer"].iloc[0])


@dataclass(frozen=True)
class _QuerySums:
    """What the measures need of each query, so that a bootstrap draw is a weighted sum over queries.

    Index 0 of `count`, `total` and `square` is the assistants, 1 the others: (2, queries), and (2, queries, layers) about the kind's mean.
    `correct_*` are numbers of rows, (queries, layers); `wins`, (layers, queries, queries), counts the pairs of an assistant's row of one query and
    another's row of a second in which the assistant's is higher.
    """

    count: np.ndarray
    total: np.ndarray
    square: np.ndarray
    means: np.ndarray
    correct_at_zero: np.ndarray
    correct_at_midpoint: np.ndarray
    wins: np.ndarray

    @property
    def queries(self) -> int:
        return self.count.shape[1]

    @staticmethod
    def of(projections: np.ndarray, assistant: np.ndarray, queries: np.ndarray, midpoint: np.ndarray) -> _QuerySums:
        names, place = np.unique(queries.astype(str), return_inverse=True)
        of_query = np.eye(len(names))[place]  # (rows, queries)
        kinds = (assistant, ~assistant)
        means = np.stack([projections[mine].mean(0) for mine in kinds])
        centred = [projections[mine] - mean for mine, mean in zip(kinds, means, strict=True)]
        belongs = [of_query[mine] for mine in kinds]
        sign = np.where(assistant, 1, -1)[:, None]
        high, low = (projections[mine] for mine in kinds)
        wins = []
        for layer in range(projections.shape[1]):
            above = high[:, None, layer] - low[None, :, layer]
            wins.append(belongs[0].T @ ((above > 0) + 0.5 * (above == 0)) @ belongs[1])
        return _QuerySums(
            count=np.stack([one.sum(0) for one in belongs]),
            total=np.stack([one.T @ values for one, values in zip(belongs, centred, strict=True)]),
            square=np.stack([one.T @ values**2 for one, values in zip(belongs, centred, strict=True)]),
            means=means,
            correct_at_zero=of_query.T @ (sign * projections > 0),
            correct_at_midpoint=of_query.T @ (sign * (projections - midpoint) > 0),
            wins=np.stack(wins),
        )

    def measures(self, weights: np.ndarray) -> dict[str, np.ndarray]:
        """Every measure under weights (draws, queries): (draws, layers), NaN in a draw without rows of one kind."""
        with np.errstate(divide="ignore", invalid="ignore"):
            counts = weights @ self.count.T  # (draws, 2)
            shift = np.stack([weights @ self.total[kind] / counts[:, kind, None] for kind in (0, 1)])
            variance = np.stack([weights @ self.square[kind] / counts[:, kind, None] for kind in (0, 1)]) - shift**2
            spread = np.sqrt(np.maximum(variance, 0).mean(0))
            mean = shift + self.means[:, None]
            pairs = counts[:, 0, None] * counts[:, 1, None]
            won = np.stack([((weights @ of_layer) * weights).sum(1) for of_layer in self.wins], axis=1)
            found = {
                "cohens_d": (mean[0] - mean[1]) / spread,
                "accuracy_at_zero": weights @ self.correct_at_zero / counts.sum(1, keepdims=True),
                "accuracy_at_midpoint": weights @ self.correct_at_midpoint / counts.sum(1, keepdims=True),
                "auc": won / pairs,
            }
        return {name: np.where(np.isfinite(values), values, np.nan) for name, values in found.items()}


# --- geometry ---------------------------------------------------------------------------------------------------------


def persona_geometry(activations: np.ndarray, rows: pd.DataFrame, units: np.ndarray) -> pd.DataFrame:
    """Where each persona's mean lies on the axis and on the first principal component of all personas' means: a row a layer and persona.

    Every persona weighs the same whatever its number of replies; the component points the way that the axis does.

    Args:
        activations: (rows, layers, width); units: the axis, (layers, width).

    Returns:
        layer, persona, persona_kind, hostile, n, projection (on the axis) and its standard error over replies, pc1 (score, centred), and of the layer
        `pc1_share` of the variance between personas and `pc1_cosine`, |cosine| of the component with the axis.
    """
    personas = rows.groupby("persona", sort=False).agg(persona_kind=("persona_kind", "first"), hostile=("hostile", "first"), n=("query", "size"))
    means = np.stack([activations[rows["persona"].eq(name).to_numpy()].astype(np.float64).mean(0) for name in personas.index])
    errors = pd.DataFrame(project(activations, units)).groupby(rows["persona"].to_numpy(), sort=False).sem().loc[personas.index].to_numpy()
    parts = []
    for layer, unit in enumerate(units.astype(np.float64)):
        centred = means[:, layer] - means[:, layer].mean(0)
        _, sizes, components = np.linalg.svd(centred, full_matrices=False)
        cosine = float(components[0] @ unit / np.linalg.norm(unit))
        parts.append(
            personas.reset_index().assign(
                layer=layer,
                projection=means[:, layer] @ unit,
                projection_se=errors[:, layer],
                pc1=centred @ components[0] * (1 if cosine >= 0 else -1),
                pc1_share=float(sizes[0] ** 2 / (sizes**2).sum()),
                pc1_cosine=abs(cosine),
            )
        )
    return pd.concat(parts, ignore_index=True)
