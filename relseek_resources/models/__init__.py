"""Language models: loading, steering and other interventions, batched generation, scoring and activations.

`from relseek_resources.models import SteeredModel` is the notebook's door. BiPO training lives in `relseek_assets.vectors`. Names are looked
up when they are used, so that what needs no model does not wait for torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from relseek_resources.models.capped import CappedModel, format_prompt, read_capping, read_directions
    from relseek_resources.models.interventions import Ablate, Add, Ceiling, Floor, Intervention, MeanAblate, thresholds
    from relseek_resources.models.loading import ModelDescription, ModelError, describe, load
    from relseek_resources.models.sampling import Sampling
    from relseek_resources.models.steered import Reply, SteeredModel, TokenScores

HOMES = {
    **dict.fromkeys(("CappedModel", "format_prompt", "read_capping", "read_directions"), "capped"),
    **dict.fromkeys(("Ablate", "Add", "Ceiling", "Floor", "Intervention", "MeanAblate", "thresholds"), "interventions"),
    **dict.fromkeys(("ModelDescription", "ModelError", "describe", "load"), "loading"),
    "Sampling": "sampling",
    **dict.fromkeys(("Reply", "SteeredModel", "TokenScores"), "steered"),
}

__all__ = [
    "Ablate",
    "Add",
    "CappedModel",
    "Ceiling",
    "Floor",
    "Intervention",
    "MeanAblate",
    "ModelDescription",
    "ModelError",
    "Reply",
    "Sampling",
    "SteeredModel",
    "TokenScores",
    "describe",
    "format_prompt",
    "load",
    "read_capping",
    "read_directions",
    "thresholds",
]


def __getattr__(name: str) -> Any:
    if name not in HOMES:
        raise AttributeError(f"module {__name__} has no {name!r}; it offers {', '.join(__all__)}")
    return getattr(import_module(f"{__name__}.{HOMES[name]}"), name)
