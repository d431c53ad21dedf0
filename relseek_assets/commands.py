"""What every command of `relseek` needs: the study's workspace, errors in one readable line, commands in the order in which a user meets them.

Commands themselves belong in `cli.py` and, where a stage has several, in its `commands.py`.
"""

from __future__ import annotations

import errno
import os
import sqlite3
from collections.abc import Callable
from functools import wraps
from pathlib import Path
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
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
CLOSED = (errno.EROFS, errno.EACCES, errno.EPERM)
REMEDY = "free some space on its disk, or set DAGSTER_HOME to a copy of that folder which may be written, then run again"
REFUSED = ("disk is full", "readonly database", "unable to open database", "disk I/O error")  # SQLite's words; its other errors are ours


def explained(function: Callable[..., Any]) -> Callable[..., Any]:
    """Turn the project's own errors into one readable line and exit status 1."""

    @wraps(function)
    def wrapped(*arguments: Any, **options: Any) -> Any:
        from relseek_assets.import_fields import ExchangeError
        from relseek_assets.planning import PlanError
        from relseek_assets.trials.raw import TrialFault

        try:
            return function(*arguments, **options)
        except (*OWN, *ASKING, PlanError, ExchangeError, TrialFault) as error:
            raise click.ClickException(str(error)) from error
        except Exception as error:
            told = disk_fault(error)
            if not told:
                raise
            raise click.ClickException(told) from error

    return wrapped


def disk_fault(error: Exception) -> str:
    """What a full disk or one that may not be written keeps a command from, and what to do; empty where the error is any other.

    Files of the store have errors of their own (`StorageError`): what is left are the files of Dagster's home.
    """
    home = os.environ.get("DAGSTER_HOME", "")
    found = getattr(error, "orig", error)  # SQLAlchemy's errors carry SQLite's
    if isinstance(found, sqlite3.OperationalError) and any(words in str(found) for words in REFUSED):
        return f"DAGSTER_HOME {home}: its event log cannot be written ({found}); {REMEDY}"
    if isinstance(found, OSError) and found.errno in (*FULL, *CLOSED):
        place = str(found.filename or "")
        if home and Path(place).is_relative_to(home):
            return f"{place}, in DAGSTER_HOME: cannot be written ({found.strerror}); {REMEDY}"
        if found.errno in FULL:
            return f"{place or f'DAGSTER_HOME {home}'}: cannot be written ({found.strerror}); {REMEDY}"
    return ""


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
