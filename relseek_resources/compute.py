"""Where models run. Here: in this process, loaded once and kept as long as it lives."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Protocol

import dagster as dg

from relseek_resources import models

if TYPE_CHECKING:
    from relseek_resources.models import SteeredModel


class ModelSettings(Protocol):
    """What a study says of a model."""

    @property
    def source(self) -> str: ...
    @property
    def dtype(self) -> str: ...
    @property
    def device(self) -> str: ...


class ModelLoader(dg.ConfigurableResource):
    """Loads a study's models into this process; steps that use it share the pool `gpu`."""

    def load(self, settings: ModelSettings, log: Any = None) -> SteeredModel:
        progress: Callable[[str], None] = log.info if log is not None else lambda message: None
        return _load(settings.source, settings.dtype, settings.device, _Ignored(progress))


class _Ignored:
    """A callable that the cache does not look at: all compare equal."""

    def __init__(self, call: Callable[[str], None]) -> None:
        self.call = call

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Ignored)

    def __hash__(self) -> int:
        return 0


@lru_cache(maxsize=1)
def _load(source: str, dtype: str, device: str, progress: _Ignored) -> SteeredModel:
    return models.load(source, dtype=dtype, device=device, progress=progress.call)
