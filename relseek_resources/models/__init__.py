"""Language models: loading, steering, batched generation, scoring and activations.

`from relseek_resources.models import SteeredModel` is the notebook's door. BiPO training lives in `relseek_assets.vectors`.
"""

from relseek_resources.models.loading import ModelDescription, ModelError, describe, load
from relseek_resources.models.sampling import Sampling
from relseek_resources.models.steered import Reply, SteeredModel, TokenScores

__all__ = ["ModelDescription", "ModelError", "Reply", "Sampling", "SteeredModel", "TokenScores", "describe", "load"]
