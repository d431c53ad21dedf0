"""The measurement behind the health route: does a dose change the model's log-probabilities, and does a dose of 0 leave them alone?

Here belongs what is measured and what counts as live, for both engines; how an engine computes log-probabilities belongs to it.
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from relseek_resources.serving.vectors import Registered, Vectors

UNCHANGED = 1e-4  # nats; what a batch of another shape may move
CHANGED = 1e-2
PROBE = tuple(range(10, 26))  # token ids that every vocabulary has

LogProbs = dict[int, float]  # of the likeliest next tokens, in nats; empty where they are no numbers
Measure = Callable[[list[dict[str, Any]] | None], Awaitable[LogProbs]]  # after PROBE, under interventions or under none


async def measured(measure: Measure, vectors: Vectors, named: Sequence[Registered]) -> dict[str, Any]:
    """What the health route answers: `live` is whether the unsteered model repeats itself and every vector of `named` works."""
    unsteered = await measure(None)
    again = distance(unsteered, await measure(None))
    found = [await _of_vector(measure, vectors, one, unsteered) for one in named]
    live = again is not None and again < UNCHANGED and all(one["live"] for one in found)
    return {"live": live, "unsteered_again": again, "vectors": found, "unit": "nats"}


async def _of_vector(measure: Measure, vectors: Vectors, vector: Registered, unsteered: LogProbs) -> dict[str, Any]:
    """The largest change of a log-probability at the ends of the declared range and at 0, after the middle one of the vector's blocks."""
    blocks = list(vector.home) or sorted(vectors.blocks)
    layer, limit = blocks[len(blocks) // 2], vectors.limits.dose
    changes = {
        dose: distance(unsteered, await measure([{"vector": vector.name, "layers": [layer], "multiplier": dose}])) for dose in (-limit, 0.0, limit)
    }
    zero = not vector.at(layer).any()
    live = all(change is not None and (change > CHANGED if dose and not zero else change < UNCHANGED) for dose, change in changes.items())
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
