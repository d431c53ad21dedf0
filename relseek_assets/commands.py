"""What every command of `relseek` needs: the study's workspace, errors in one readable line, commands in the order in which a user meets them.

Commands themselves belong in `cli.py` and, where a stage has several, in its `commands.py`.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import wraps
from typing import TYPE_CHECKING, Any

import click

from relseek_assets.behaviour import BehaviourError
from relseek_assets.judging.requests import OverBudget
from relseek_assets.persona_set import PersonaSetError
from relseek_assets.study import Study, StudyError, load_study
from relseek_resources.judges.asking import EndpointError
from relseek_resources.judges.batches import BatchError
from relseek_resources.judges.prices import PriceError
from relseek_resources.models.loading import ModelError
from relseek_resources.storage import StorageError

if TYPE_CHECKING:
    from relseek_assets.planning import Workspace

OWN = (StudyError, BehaviourError, PersonaSetError, StorageError, ModelError)
ASKING = (EndpointError, BatchError, PriceError, OverBudget)


def explained(function: Callable[..., Any]) -> Callable[..., Any]:
    """Turn the project's own errors into one readable line and exit status 1."""

    @wraps(function)
    def wrapped(*arguments: Any, **options: Any) -> Any:
        from relseek_assets.exchange import ExchangeError
        from relseek_assets.planning import PlanError
        from relseek_assets.trials.raw import TrialFault

        try:
            return function(*arguments, **options)
        except (*OWN, *ASKING, PlanError, ExchangeError, TrialFault) as error:
            raise click.ClickException(str(error)) from error

    return wrapped


def workspace_of(study: Study | str) -> Workspace:
    from dagster import DagsterInstance

    from relseek_assets.planning import Workspace
    from relseek_resources.stored_vectors import dagster_home

    os.environ["DAGSTER_HOME"] = str(dagster_home())
    return Workspace(load_study(study) if isinstance(study, str) else study, DagsterInstance.get())


class Group(click.Group):
    """Keeps commands in the order in which a user meets them."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)
