"""The measurement behind the health route: does a dose change the model's log-probabilities, and does a dose of 0 leave them alone?

Here belongs what is measured and what counts as live, for both engines; how an engine computes log-probabilities belongs to it.
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from relseek_resources.serving.vectors import Registered, Vectors

PROBE = tuple(range(10, 26))  # token ids that every vocabulary has
REPEATS = 4  # of the unsteered model
# Nats by which a batch of another shape may move a log-probability: two steps of a logit between 16 and 32 in numbers of that width; in float32,
# where such a step is 2e-6, what adding up in another order was seen to move.
FLOOR = {"float64": 1e-4, "float32": 1e-4, "float16": 2 * 2.0**-6, "bfloat16": 2 * 2.0**-3}
NOISE = 2  # so many times what the repeats differ by is taken for noise
SIGNAL, CHANGED = 3, 1e-2  # a dose must exceed so many times the noise, and so many nats

LogProbs = dict[int, float]  # of the likeliest next tokens, in nats; empty where they are no numbers
Measure = Callable[[list[dict[str, Any]] | None], Awaitable[LogProbs]]  # after PROBE, under interventions or under none


async def measured(measure: Measure, vectors: Vectors, named: Sequence[Registered], dtype: Any) -> dict[str, Any]:
    """What the health route answers: `live` is whether every vector of `named` changes the model by more than it changes by itself, and a dose of 0
    by no more. A model that hardly repeats itself, beside whatever else is in its batch, shows no change: it is not live.

    Args:
        dtype: of the model, as torch names it; one that is not known is taken to be as coarse as bfloat16.
    """
    unsteered = [await measure(None) for _ in range(REPEATS)]
    again = [distance(unsteered[0], one) for one in unsteered[1:]]
    noise = None if None in again else max(one for one in again if one is not None)
    within = max(FLOOR.get(str(dtype).removeprefix("torch."), max(FLOOR.values())), NOISE * noise) if noise is not None else 0.0
    beyond = max(CHANGED, SIGNAL * within)
    found = [await _of_vector(measure, vectors, one, unsteered, within, beyond) for one in named]
    live = noise is not None and all(one["live"] for one in found)
    return {"live": live, "unsteered_again": noise, "unchanged_within": within, "changed_beyond": beyond, "vectors": found, "unit": "nats"}


async def _of_vector(
    measure: Measure, vectors: Vectors, vector: Registered, unsteered: Sequence[LogProbs], within: float, beyond: float
) -> dict[str, Any]:
    """The largest change of a log-probability at the ends of the declared range and at 0, after the middle one of the vector's blocks at which it is
    not zero, from the nearest of the unsteered readings."""
    blocks = [block for block in vector.home or sorted(vectors.blocks) if vector.at(block).any()]
    layer, limit = blocks[len(blocks) // 2], vectors.limits.dose
    changes: dict[float, float | None] = {}
    for dose in (-limit, 0.0, limit):
        reading = await measure([{"vector": vector.name, "layers": [layer], "multiplier": dose}])
        apart = [change for one in unsteered if (change := distance(one, reading)) is not None]
        changes[dose] = min(apart, default=None)
    live = all(change is not None and (change > beyond if dose else change <= within) for dose, change in changes.items())
    return {"name": vector.name, "layer": layer, "largest_change": {f"{dose:g}": change for dose, change in changes.items()}, "live": live}


def distance(one: LogProbs, other: LogProbs) -> float | None:
    """The largest difference of a log-probability, None where one is no number.

    A token that one of them does not hold is taken to be as likely there as its least likely one, so that the difference is at least this large.
    """
    if not one or not other:
        return None
    least_one, least_other = min(one.values()), min(other.values())
    found = max(abs(one.get(token, least_one) - other.get(token, least_other)) for token in {*one, *other})
    return found if math.isfinite(found) else None
