"""A trial's plan written down before its data, and what differs from it afterwards.

A registration is a TOML file whose hash stands in its head, so that it can be verified with nothing but `tail` and `sha256sum`. Here belong
writing it, verifying it and comparing it. What a plan is belongs in `relseek_assets/trial.py`.
"""

from __future__ import annotations

import hashlib
import json
import re
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pandas as pd
from pydantic import ValidationError

from relseek_assets.trial import Trial
from relseek_assets.trials.raw import TrialFault
from relseek_resources.storage import content_version

HEAD = """\
# Registration of the trial {name}, written by `relseek trials register`. Edited, it is refused: register again under another file name.
# The hash is of everything below its own line: tail -n +4 FILE | sha256sum
sha256 = "{sha256}"
"""
HASHED = re.compile(r'\A(?:#[^\n]*\n)*sha256 = "([0-9a-f]{64})"\n')
DECLARED, RUN = "declared now", "run"
COLUMNS = ("compared", "what", "registered", "found")
NOT_DECLARED = "not declared"


class RegistrationFault(TrialFault):
    """A registration that is edited, of another shape or of another study; the message names the file and what to do."""


@dataclass(frozen=True)
class Registration:
    """A plan as it was registered. `sha256` is of the file below its head, `relseek` the version that wrote it, `at` in UTC."""

    study: str
    seed: int
    trial: Trial
    fingerprint: str
    sha256: str
    relseek: str
    at: datetime


@dataclass(frozen=True)
class Ran:
    """What a run left behind.

    statuses: partition key -> why it is empty, or an empty text where it was estimated; keys that were never computed are not there.
    forms, equivalence, fdr: rows of `trial_forms`, `trial_equivalence` and `trial_fdr` over all partitions.
    """

    statuses: Mapping[str, str] = field(default_factory=dict)
    forms: pd.DataFrame = field(default_factory=pd.DataFrame)
    equivalence: pd.DataFrame = field(default_factory=pd.DataFrame)
    fdr: pd.DataFrame = field(default_factory=pd.DataFrame)


def register(study: str, seed: int, trial: Trial, relseek: str, at: datetime) -> str:
    """The text of a registration: its hash, who wrote it when, and the plan."""
    facts = {"study": study, "seed": seed, "fingerprint": trial.fingerprint, "relseek": relseek, "registered": _utc(at)}
    body = "\n".join(["", *(f"{name} = {_value(value)}" for name, value in facts.items()), *_lines("trial", trial.plan), ""])
    return HEAD.format(name=study, sha256=_sha256(body)) + body


def read(path: Path) -> Registration:
    """A registration, verified.

    Raises:
        RegistrationFault: no registration, edited since it was written, or a plan that this version of relseek does not know.
    """
    try:
        text = path.read_text(encoding="utf-8").replace("\r\n", "\n")  # a checkout may have changed line ends, which is no edit
    except (OSError, UnicodeDecodeError) as error:
        raise RegistrationFault(f"{path}: cannot be read ({error}); name a file that `relseek trials register` wrote") from error
    head = HASHED.match(text)
    if head is None:
        raise RegistrationFault(f"{path}: no registration; the first line after comments must hold sha256, as `relseek trials register` writes it")
    body = text[head.end() :]
    if _sha256(body) != head[1]:
        raise RegistrationFault(f"{path}: edited since it was registered: its hash is {_sha256(body)} and not {head[1]}; fetch the original")
    try:
        found = tomllib.loads(body)
        trial = Trial.model_validate(found["trial"])
        if content_version(found["trial"]) != found["fingerprint"]:
            raise RegistrationFault(f"{path}: its fingerprint {found['fingerprint']} is not of its plan; fetch the original")
        return Registration(found["study"], found["seed"], trial, found["fingerprint"], head[1], found["relseek"], found["registered"])
    except (tomllib.TOMLDecodeError, KeyError, ValidationError) as error:
        by = re.search(r'^relseek = "(.*)"$', body, re.MULTILINE)
        wrote = f"relseek {by[1]}" if by else "another version of relseek"
        raise RegistrationFault(f"{path}: this version cannot read its plan ({error}); compare it with {wrote}, which wrote it") from error


def compared(registration: Registration, study: str, seed: int, trial: Trial, ran: Ran | None = None) -> pd.DataFrame:
    """Every difference between a registration, what is declared now, and what was run; `COLUMNS`, no row where there is none.

    Args:
        ran: None compares the declarations alone.

    Raises:
        RegistrationFault: the registration is of another study.
    """
    if registration.study != study:
        raise RegistrationFault(f"the registration is of the study {registration.study!r} and not of {study!r}; name the one that it belongs to")
    planned = {"seed": registration.seed, "trial": _by_name(registration.trial.plan)}
    now = {"seed": seed, "trial": _by_name(trial.plan)}
    rows = [(DECLARED, *row) for row in _differences("", planned, now)]
    if ran is not None:
        rows += [(RUN, *row) for row in _run_differences(registration.trial, ran)]
    return pd.DataFrame(rows, columns=list(COLUMNS), dtype=object)


def _run_differences(planned: Trial, ran: Ran) -> Iterator[tuple[str, str, str]]:
    for key in planned.keys:
        if why := ran.statuses.get(key, "not computed"):
            yield key, "to be estimated", why
    for key, why in ran.statuses.items():
        if not why and key not in planned.keys:
            yield key, "not registered", "estimated"
    chosen = ran.forms[ran.forms["selected"].astype(bool)] if len(ran.forms) else ran.forms
    for table, column, setting in (
        (chosen, "form", "form"),
        (ran.equivalence, "margin", "equivalence"),
        (ran.fdr, "family", "family"),
        (ran.fdr, "local_family", "local_family"),
    ):
        yield from _otherwise(planned, table, column, setting)


def _otherwise(planned: Trial, table: pd.DataFrame, column: str, setting: str) -> Iterator[tuple[str, str, str]]:
    """Registered settings of outcomes that the tables of a run show otherwise; a form that is not registered is free to be chosen."""
    if table.empty:
        return
    for (study, name), values in table.groupby(["study", "outcome"], sort=False)[column]:
        outcome = next((outcome for outcome in planned.outcomes if outcome.name == name and study in outcome.designs), None)
        if outcome is None:
            continue
        registered, found = getattr(outcome, setting), values.iloc[0]
        if registered != found and not (setting == "form" and not registered):
            yield f"{study}:{name}, {setting.replace('_', ' ')}", _shown(registered or NOT_DECLARED), _shown(found)


# --- comparing --------------------------------------------------------------------------------------------------------


def _by_name(value: Any) -> Any:
    """Lists of settings as mappings by their name, column or columns: their order decides about nothing."""
    if isinstance(value, dict):
        return {name: _by_name(inner) for name, inner in value.items()}
    if isinstance(value, list) and value and isinstance(value[0], dict):
        named: dict[str, Any] = {}
        for item in value:
            key = "name" if "name" in item else "names" if "names" in item else "column"
            inner = _by_name({name: setting for name, setting in item.items() if name != key})
            named |= dict.fromkeys(item[key] if key == "names" else [item[key]], inner)
        return named
    return value


def _differences(place: str, registered: Any, found: Any) -> Iterator[tuple[str, str, str]]:
    if isinstance(registered, dict) and isinstance(found, dict):
        for name in dict.fromkeys([*registered, *found]):
            yield from _differences(f"{place}.{name}".strip("."), registered.get(name, NOT_DECLARED), found.get(name, NOT_DECLARED))
    elif registered != found:
        yield place, _shown(registered), _shown(found)


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return "declared"
    if isinstance(value, list):
        return ", ".join(map(_shown, value)) or "none"
    if isinstance(value, float):
        return f"{value:g}"
    return str(value) if value != "" else "none"


# --- TOML -------------------------------------------------------------------------------------------------------------


def _sha256(body: str) -> str:
    return hashlib.sha256(body.encode()).hexdigest()


def _utc(at: datetime) -> datetime:
    return at.astimezone(UTC).replace(microsecond=0)


def _lines(place: str, table: Mapping[str, Any]) -> Iterator[str]:
    """A table as TOML: its values first, then the tables in it, each under its own header."""
    yield from ("", f"[{place}]")
    yield from _content(place, table)


def _content(place: str, table: Mapping[str, Any]) -> Iterator[str]:
    several = {name: value for name, value in table.items() if isinstance(value, list) and value and isinstance(value[0], dict)}
    inner = {name: value for name, value in table.items() if isinstance(value, dict)}
    yield from (f"{_key(name)} = {_value(value)}" for name, value in table.items() if name not in several and name not in inner)
    for name, value in inner.items():
        yield from _lines(f"{place}.{_key(name)}", value)
    for name, items in several.items():
        for item in items:
            yield from ("", f"[[{place}.{_key(name)}]]")
            yield from _content(f"{place}.{_key(name)}", item)


def _key(name: str) -> str:
    return name if re.fullmatch(r"[A-Za-z0-9_-]+", name) else _value(name)


def _value(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(_value, value))}]"
    if isinstance(value, datetime):
        return value.isoformat().replace("+00:00", "Z")
    if isinstance(value, float):
        return repr(value)
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")  # JSON's escapes of texts are TOML's, but for this character
