"""What adding a direction and flooring the projection on it do to replies under hostile personas: conditions, rows, summaries, the comparison.

Here belong the conditions of a study and the numbers that are made of judged replies. What an intervention does to the residual stream belongs in
`relseek_resources.models.interventions`, how replies are judged in `likeness.py` and `relseek_resources.judges.coherence`.

An addition's strength is a multiple of the axis' own gap, the distance between the mean projections of assistant and other personas at the layer: at
strength 1 a reply of an average other persona is moved to where the assistants' are. A floor's threshold is a percentile of the projections of
ordinary assistant replies, layer by layer; this is what llm-personality-axes calls capping (spec section 11.1).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from relseek_assets.axes.resampling import METHOD, crossed_draws, interval, weighted_means
from relseek_assets.persona_set import PERSONA_KINDS, PersonaSetError, Prompt
from relseek_resources.storage import Column, TableSchema

if TYPE_CHECKING:
    from relseek_resources.judges.coherence import Damaged
    from relseek_resources.models import Intervention

NONE, ADD, FLOOR = "none", "add", "floor"
KINDS = (NONE, ADD, FLOOR)
OPEN, UNMATCHED = "open", "unmatched"
LOSSES = (0.0, 0.25, 0.5, 1.0, 2.0)  # coherence that an intervention may cost in the comparison, in points
QUANTITIES = ("likeness", "coherence")

MODEL = Column("model", "string", "name of the model in the study")
KEYS = (
    MODEL,
    Column("condition", "string", "`none`, `add 1`: the direction added at that strength, `floor p25`: the projection kept above that percentile"),
    Column("intervention", "string", "its kind", choices=KINDS),
    Column("amount", "number", "strength of an addition in gaps of the axis, percentile of a floor, 0 of none"),
)
ROWS = (
    Column("prompt", "string", "id of the prompt"),
    Column("persona", "string", "hostile persona in the system prompt"),
)
KEY = ("model", "condition", "prompt", "persona")

INTERVENTION_REPLIES = TableSchema(
    "intervention_replies",
    (
        *KEYS,
        *ROWS,
        Column("layers", "json", "blocks after which it works, 0-indexed"),
        Column("multiplier", "number", "what was added, in units of the residual stream along the unit direction"),
        Column("thresholds", "json", "floors by layer, in units of the projection; null where there is none", nullable=True),
        Column("reply", "string", "the model's reply"),
        Column("tokens", "integer", "tokens drawn, end token included", "tokens", low=0),
        Column("seed", "integer", "of the row's own random numbers, the same in all conditions"),
        Column("finished", "boolean", "whether the reply ended by itself"),
    ),
    key=KEY,
)

INTERVENTION_SCORES = TableSchema(
    "intervention_scores",
    (
        *KEYS,
        *ROWS,
        Column("likeness", "number", "assistant-likeness by the embedded judge; null for an empty reply", nullable=True, low=0, high=10),
        Column("coherence", "number", "by perplexity and repetition, 1 to 10", low=1, high=10),
        Column("perplexity", "number", "of the reply under the plain model, asked the prompt without a persona", low=1, nullable=True),
    ),
    key=KEY,
)

COHERENCE_CALIBRATION = TableSchema(
    "coherence_calibration",
    (
        MODEL,
        Column("persona_kind", "string", "whose replies were damaged", choices=PERSONA_KINDS),
        Column("kind", "string", "how the text was damaged"),
        Column("truth", "number", "coherence that the damage leaves, 1 to 10", low=1, high=10),
        Column("mean", "number", "score given", low=1, high=10),
        Column("sd", "number", "of the scores", nullable=True, low=0),
        Column("n", "integer", "texts", low=1),
    ),
    key=("model", "persona_kind", "kind"),
)

INTERVENTION_SUMMARY = TableSchema(
    "intervention_summary",
    (
        *KEYS,
        *(
            Column(f"{quantity}{end}", "number", f"{meaning}{what}", nullable=True)
            for quantity, meaning in (
                ("likeness", "mean assistant-likeness, 0 to 10"),
                ("likeness_change", "the same minus that without intervention, pair by pair"),
                ("coherence", "mean coherence, 1 to 10"),
                ("coherence_change", "the same minus that without intervention, pair by pair"),
            )
            for end, what in (("", ""), ("_lower", ", 95% lower"), ("_upper", ", 95% upper"))
        ),
        Column("n", "integer", "replies", low=1),
        Column("empty", "integer", "replies without text, which have a coherence of 1 and no likeness", low=0),
        Column("prompts", "integer", "prompts among them", low=1),
        Column("personas", "integer", "personas among them", low=1),
        Column("method", "string", "how the intervals were made"),
    ),
    key=("model", "condition"),
)

INTERVENTION_COMPARISON = TableSchema(
    "intervention_comparison",
    (
        MODEL,
        Column("loss", "number", "coherence that may be lost against no intervention", "points", low=0),
        *(
            Column(f"{name}{end}", "number", f"{meaning}{what}", "points", nullable=True)
            for name, meaning in (
                ("floor", "most assistant-likeness that flooring reaches at that loss, interpolated between neighbouring percentiles"),
                ("add", "most assistant-likeness that adding reaches at that loss, interpolated between neighbouring strengths"),
                ("difference", "floor minus add; null where one of them has only empty replies to offer"),
            )
            for end, what in (("", ""), ("_lower", ", 95% lower"), ("_upper", ", 95% upper"))
        ),
        Column(
            "floor_loss", "number", "most coherence that flooring costs at any of its percentiles, those that leave every reply empty apart", "points"
        ),
        Column("add_loss", "number", "most coherence that adding costs at any of its strengths, those that leave every reply empty apart", "points"),
        Column(
            "finding",
            "string",
            "`floor` or `add` where the interval of the difference leaves out 0, else `open`; `unmatched` where one of them never costs so much, so "
            "that stronger ones would have to be tried, or has only empty replies to offer",
            choices=(FLOOR, ADD, OPEN, UNMATCHED),
        ),
        Column("n", "integer", "replies a condition", low=1),
        Column("method", "string", "how the intervals were made"),
    ),
    key=("model", "loss"),
)


@dataclass(frozen=True)
class Condition:
    """One thing that is done to the model, or nothing."""

    intervention: str
    amount: float = 0.0

    @property
    def name(self) -> str:
        return {NONE: NONE, ADD: f"add {self.amount:g}", FLOOR: f"floor p{self.amount:g}"}[self.intervention]


def conditions(strengths: Sequence[float], percentiles: Sequence[float]) -> list[Condition]:
    """No intervention, additions and floors, in the order given."""
    return [Condition(NONE), *(Condition(ADD, value) for value in strengths), *(Condition(FLOOR, value) for value in percentiles)]


def spread(prompts: Sequence[Prompt], count: int) -> list[Prompt]:
    """`count` prompts, as many of each kind as can be, the first of a kind first.

    Raises:
        PersonaSetError: there are fewer.
    """
    if len(prompts) < count:
        raise PersonaSetError(f"interventions.prompts asks for {count} prompts and there are {len(prompts)}; write more or lower it")
    seen: Counter[str] = Counter()
    rank = {}
    for prompt in prompts:
        rank[prompt.prompt] = seen[prompt.kind]
        seen[prompt.kind] += 1
    return sorted(prompts, key=lambda prompt: rank[prompt.prompt])[:count]


@dataclass(frozen=True)
class Axis:
    """A direction at every layer of a model with what is needed to set strengths by.

    Attributes:
        units: (layers, width), unit rows that point to the assistant.
        layer: 0-indexed block of the additions.
        gap: between the mean projections of assistant and other personas at `layer`, in units of the projection.
        ordinary: (rows, layers) projections of ordinary assistant replies.
    """

    units: np.ndarray
    layer: int
    gap: float
    ordinary: np.ndarray


def best_layer(quality: pd.DataFrame, extraction: str) -> int:
    """The block at which a direction tells replies of held-out queries best apart: highest AUC, ties by Cohen's d.

    Args:
        quality: one model's `direction_quality`.

    Raises:
        ValueError: nothing was held out of one kind.
    """
    mine = quality[(quality["split"] == "query") & (quality["extraction"] == extraction) & (quality["evaluated_with"] == extraction)]
    best = mine.loc[mine["best_by_auc"], "layer"]
    if best.empty:
        raise ValueError(f"direction_quality has no best layer of {extraction} by AUC; add queries, or raise contrast.heldout_share")
    return int(best.iloc[0])


def axis_of(units: np.ndarray, layer: int, activations: np.ndarray, assistant: np.ndarray) -> Axis:
    """An axis measured on persona replies.

    Args:
        units: (layers, width).
        activations: (rows, layers, width), as the direction was made of them.
        assistant: (rows,), which rows are ordinary assistant replies.
    """
    projections = np.einsum("rlw,lw->rl", activations.astype(np.float64), units.astype(np.float64))
    gap = float(projections[assistant, layer].mean() - projections[~assistant, layer].mean())
    if not gap > 0:
        raise ValueError(f"layer {layer}: assistant replies do not project further than others (gap {gap:.3g}); choose another layer or extraction")
    return Axis(units, layer, gap, projections[assistant])


@dataclass(frozen=True)
class Setting:
    """A condition in numbers: what is added at the axis' layer, and the floor of each of the layers."""

    condition: Condition
    layers: tuple[int, ...]
    multiplier: float = 0.0
    thresholds: tuple[float, ...] | None = None


def settings_of(axis: Axis, wanted: Sequence[Condition], floored: Sequence[int]) -> list[Setting]:
    """Multipliers and thresholds of the conditions; `floored` are the blocks of the floors."""
    from relseek_resources.models import thresholds

    found = []
    for condition in wanted:
        if condition.intervention == FLOOR:
            limits = thresholds(axis.ordinary[:, list(floored)], condition.amount)
            found.append(Setting(condition, tuple(floored), thresholds=tuple(float(limit) for limit in limits)))
        else:
            found.append(Setting(condition, (axis.layer,) if condition.intervention == ADD else (), condition.amount * axis.gap))
    return found


def done(setting: Setting) -> dict[str, Any]:
    """The columns of a reply that say what was done."""
    condition = setting.condition
    return {
        "condition": condition.name,
        "intervention": condition.intervention,
        "amount": condition.amount,
        "layers": list(setting.layers),
        "multiplier": setting.multiplier,
        "thresholds": None if setting.thresholds is None else list(setting.thresholds),
    }


def of_rows(axis: Axis, rows: Sequence[Setting]) -> list[Intervention]:
    """Interventions for one call whose rows are under different conditions: an addition, and a floor at every floored layer."""
    from relseek_resources.models import Add, Floor

    found: list[Intervention] = [Add(axis.units[axis.layer], axis.layer, [row.multiplier for row in rows])]
    for layer in sorted({layer for row in rows if row.thresholds is not None for layer in row.layers}):
        limits = [-math.inf if row.thresholds is None else row.thresholds[row.layers.index(layer)] for row in rows]
        found.append(Floor(axis.units[layer], layer, limits))
    return found


def calibration(damaged: Sequence[Damaged], persona_kinds: Sequence[str], given: np.ndarray) -> pd.DataFrame:
    """Scores of damaged texts by kind of persona and damage, as `COHERENCE_CALIBRATION` without the model's name.

    Args:
        persona_kinds: of the texts that were damaged, by `source`.
    """
    frame = pd.DataFrame(
        {
            "persona_kind": [persona_kinds[item.source] for item in damaged],
            "kind": [item.kind for item in damaged],
            "truth": [1 + 9 * item.coherence for item in damaged],
            "given": given,
        }
    )
    return frame.groupby(["persona_kind", "kind", "truth"])["given"].agg(mean="mean", sd="std", n="count").reset_index()


# --- from scores to estimates -----------------------------------------------------------------------------------------


def _grid(scores: pd.DataFrame, draws: int, seed: int) -> tuple[pd.DataFrame, dict[str, pd.DataFrame], np.ndarray, str]:
    """Conditions; likeness and coherence as (prompt and persona, condition); bootstrap counts of those rows; how they were drawn."""
    wanted = scores.drop_duplicates("condition")[["model", "condition", "intervention", "amount"]].reset_index(drop=True)
    wide = {
        name: scores.pivot_table(index=["prompt", "persona"], columns="condition", values=name, dropna=False)[list(wanted["condition"])]
        for name in QUANTITIES
    }
    index = wide["likeness"].index
    counts = crossed_draws(list(index.get_level_values("persona")), list(index.get_level_values("prompt")), draws, seed, "interventions")
    return wanted, wide, counts, METHOD.format(draws=draws)


def _estimate(values: np.ndarray, counts: np.ndarray) -> tuple[float | None, float | None, float | None]:
    """Mean of the values that are there, and its interval."""
    there = np.isfinite(values)
    if not there.any():
        return None, None, None
    return float(values[there].mean()), *interval(weighted_means(values[there], counts[:, there]))


def summary(scores: pd.DataFrame, draws: int, seed: int) -> pd.DataFrame:
    """One row a condition: means, and differences from no intervention over the same prompts and personas, as `INTERVENTION_SUMMARY`."""
    wanted, wide, counts, method = _grid(scores, draws, seed)
    rows: list[dict[str, Any]] = []
    for condition in wanted.to_dict("records"):
        mine = scores[scores["condition"] == condition["condition"]]
        row = dict(condition)
        for quantity in QUANTITIES:
            values, plain = (wide[quantity][name].to_numpy(float) for name in (condition["condition"], NONE))
            for name, taken in ((quantity, values), (f"{quantity}_change", values - plain)):
                row |= dict(zip((name, f"{name}_lower", f"{name}_upper"), _estimate(taken, counts), strict=True))
        row |= {
            "n": len(mine),
            "empty": int(mine["likeness"].isna().sum()),
            "prompts": mine["prompt"].nunique(),
            "personas": mine["persona"].nunique(),
            "method": method,
        }
        rows.append(row)
    return _numeric(pd.DataFrame(rows), INTERVENTION_SUMMARY)


def _numeric(frame: pd.DataFrame, schema: TableSchema) -> pd.DataFrame:
    """Numbers as floats also where a whole column is missing, so that figures can reckon with them."""
    return frame.astype({column.name: float for column in schema.columns if column.kind == "number"})


def comparison(scores: pd.DataFrame, draws: int, seed: int, losses: Sequence[float] = LOSSES) -> pd.DataFrame:
    """At matched coherence, does flooring keep more assistant-likeness than adding? As `INTERVENTION_COMPARISON`.

    Both are paths from no intervention through their strengths, straight between neighbours in the plane of coherence and likeness. At a loss of
    coherence of at most δ points, each offers the most likeness that its path reaches with a coherence of at least that without intervention minus δ.
    No intervention lies on both paths. A strength whose replies are all empty has no likeness and offers nothing, nor do the lines to it. A path
    that never costs δ where it has text could have gone on: nothing is found there, nor where a path offers nothing
    at all, nor where no intervention leaves no text to be compared with.
    """
    wanted, wide, counts, method = _grid(scores, draws, seed)
    one = np.ones((1, counts.shape[1]))
    paths = {kind: [NONE, *wanted[wanted["intervention"] == kind].sort_values("amount")["condition"]] for kind in (FLOOR, ADD)}
    means = {
        weights is counts: {name: {c: _present_means(wide[name][c].to_numpy(float), weights) for c in wide[name]} for name in QUANTITIES}
        for weights in (one, counts)
    }
    coherence, likeness = means[False]["coherence"], means[False]["likeness"]
    costs = {
        kind: max([0.0, *(float(coherence[NONE][0] - coherence[name][0]) for name in path if np.isfinite(likeness[name][0]))])
        for kind, path in paths.items()
    }
    rows: list[dict[str, Any]] = []
    for loss in losses:
        offered = {
            (kind, drawn): most_at_loss(np.stack([found["coherence"][c] for c in path], 1), np.stack([found["likeness"][c] for c in path], 1), loss)
            for kind, path in paths.items()
            for drawn, found in means.items()
        }
        row: dict[str, Any] = {"model": wanted["model"].iloc[0], "loss": loss}
        for name, value, drawn in (
            *((kind, offered[kind, False], offered[kind, True]) for kind in (FLOOR, ADD)),
            ("difference", offered[FLOOR, False] - offered[ADD, False], offered[FLOOR, True] - offered[ADD, True]),
        ):
            lower, upper = interval(drawn)
            row |= {name: float(value[0]), f"{name}_lower": lower, f"{name}_upper": upper}
        row |= {f"{kind}_loss": cost for kind, cost in costs.items()}
        unmatched = min(costs.values()) < loss or not np.isfinite(likeness[NONE][0])
        row["finding"] = UNMATCHED if unmatched else _decided(row["difference_lower"], row["difference_upper"])
        rows.append({**row, "n": len(wide["likeness"]), "method": method})
    return _numeric(pd.DataFrame(rows), INTERVENTION_COMPARISON)


def _decided(lower: float | None, upper: float | None) -> str:
    """What an interval of the difference says; there is none where one of the two offers nothing."""
    if lower is None or upper is None:
        return UNMATCHED
    return FLOOR if lower > 0 else ADD if upper < 0 else OPEN


def _present_means(values: np.ndarray, counts: np.ndarray) -> np.ndarray:
    there = np.isfinite(values)
    return weighted_means(values[there], counts[:, there])


def most_at_loss(coherence: np.ndarray, likeness: np.ndarray, loss: float) -> np.ndarray:
    """The most likeness on paths whose coherence is at least that of the first point minus `loss`.

    Args:
        coherence, likeness: (draws, points) of paths that are straight between neighbouring points. A point with NaN as its likeness offers
            nothing, nor do the lines to it.

    Returns:
        (draws,), NaN where no point offers anything.
    """
    least = coherence[:, :1] - loss
    inside, there = coherence >= least, np.isfinite(likeness)
    best = np.where(inside & there, likeness, -np.inf).max(axis=1)
    first, second = coherence[:, :-1], coherence[:, 1:]
    crossing = (inside[:, :-1] != inside[:, 1:]) & there[:, :-1] & there[:, 1:]
    with np.errstate(invalid="ignore", divide="ignore"):
        share = (least - first) / (second - first)
        between = likeness[:, :-1] + share * (likeness[:, 1:] - likeness[:, :-1])
    found = np.maximum(best, np.where(crossing, between, -np.inf).max(axis=1))
    return np.where(np.isfinite(found), found, np.nan)
