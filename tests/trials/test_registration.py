"""A registration is the plan, verifiable by itself; every way in which plan, declaration and run differ is named."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import tomllib
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from relseek_assets.study import load_study
from relseek_assets.trial import Trial
from relseek_assets.trials.registration import COLUMNS, Ran, Registration, RegistrationFault, compared, read, register

EXAMPLE = Path(__file__).parents[1] / "platform" / "example_trial" / "warmth.toml"
AT = datetime(2026, 3, 1, 12, 30, 5, 987, tzinfo=timezone(timedelta(hours=2)))


def declared(**changes: Any) -> Trial:
    trial = load_study(str(EXAMPLE)).trial
    assert trial is not None
    return Trial.model_validate({**trial.model_dump(), **changes})


def outcome(name: str, **changes: Any) -> Trial:
    """The example with some settings of one outcome replaced."""
    outcomes = [{**found.model_dump(), **(changes if found.name == name else {})} for found in declared().outcomes]
    return declared(outcomes=outcomes)


def written(folder: Path, trial: Trial) -> Path:
    path = folder / "registration.toml"
    path.write_text(register("warmth", 11, trial, "0.1.0", AT), encoding="utf-8")
    return path


def differences(registration: Registration, trial: Trial, ran: Ran | None = None, seed: int = 11) -> set[tuple[str, ...]]:
    found = compared(registration, "warmth", seed, trial, ran)
    assert tuple(found.columns) == COLUMNS
    return set(found.itertuples(index=False, name=None))


@pytest.fixture
def plan(tmp_path: Path) -> Registration:
    return read(written(tmp_path, declared()))


def test_a_registration_is_read_back_as_it_was_declared(plan: Registration) -> None:
    trial = declared()
    assert plan.trial.plan == trial.plan
    assert (plan.study, plan.seed, plan.fingerprint, plan.relseek) == ("warmth", 11, trial.fingerprint, "0.1.0")
    assert plan.at == datetime(2026, 3, 1, 10, 30, 5, tzinfo=UTC)
    assert differences(plan, trial) == set()


def test_every_study_that_ships_can_be_registered(tmp_path: Path) -> None:
    study = load_study("kirk2025")
    assert study.trial is not None
    path = tmp_path / "registration.toml"
    path.write_text(register(study.name, study.seed, study.trial, "0.1.0", AT), encoding="utf-8")
    assert read(path).trial.plan == study.trial.plan
    assert compared(read(path), study.name, study.seed, study.trial).empty


def test_a_plain_toml_reader_finds_what_matters(tmp_path: Path) -> None:
    found = tomllib.loads(written(tmp_path, declared()).read_text(encoding="utf-8"))
    assert found["registered"] == datetime(2026, 3, 1, 10, 30, 5, tzinfo=UTC)
    trial = found["trial"]
    assert trial["dose"]["values"] == {"control": 0.0, "gentle": 0.5, "warm": 1.0}
    assert (trial["dose"]["low"], trial["dose"]["high"]) == ([0.0], [0.5, 1.0]), "the ends of the primary contrast are spelt out"
    assert trial["factors"] == [{"column": "channel", "label": "Channel", "code": "", "levels": ["text", "voice"]}]
    wellbeing = next(outcome for outcome in trial["outcomes"] if outcome["name"] == "wellbeing")
    assert wellbeing["equivalence"] == 2.0
    assert wellbeing["designs"]["coaching"]["baseline"]["column"] == "wellbeing_before"
    assert trial["robustness"]["weights"] == {"table": "weights", "column": "weight"}


def test_the_hash_is_of_everything_below_its_line(tmp_path: Path, plan: Registration) -> None:
    """With what every machine has: `tail -n +4 FILE | sha256sum`."""
    path = tmp_path / "registration.toml"
    below = path.read_bytes().split(b"\n", 3)[3]
    assert hashlib.sha256(below).hexdigest() == plan.sha256
    assert f'tail -n +4 FILE | sha256sum\nsha256 = "{plan.sha256}"\n' in path.read_text(encoding="utf-8")
    if shutil.which("sha256sum"):
        shown = subprocess.run(f"tail -n +4 '{path}' | sha256sum", shell=True, capture_output=True, text=True, check=True).stdout
        assert shown.split()[0] == plan.sha256


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("equivalence = 2.0", "equivalence = 3.0"),
        ("2026-03-01T10:30:05Z", "2025-03-01T10:30:05Z"),
        ('relseek = "0.1.0"', 'relseek = "0.1.1"'),
        ("seed = 11", "seed = 12"),
    ],
)
def test_an_edited_registration_is_refused(tmp_path: Path, old: str, new: str) -> None:
    path = written(tmp_path, declared())
    text = path.read_text(encoding="utf-8")
    assert text.count(old) == 1
    path.write_text(text.replace(old, new), encoding="utf-8")
    with pytest.raises(RegistrationFault, match=r"registration\.toml: edited since it was registered: .* fetch the original"):
        read(path)


def test_line_ends_of_a_checkout_are_no_edit(tmp_path: Path) -> None:
    path = written(tmp_path, declared())
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    assert read(path).trial.plan == declared().plan


def test_what_is_no_registration_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RegistrationFault, match="no registration; the first line after comments must hold sha256"):
        read(EXAMPLE)
    with pytest.raises(RegistrationFault, match="cannot be read"):
        read(tmp_path / "nowhere.toml")


def test_a_plan_of_another_version_is_refused_with_the_version_that_wrote_it(tmp_path: Path) -> None:
    path = written(tmp_path, declared())
    body = (
        path.read_text(encoding="utf-8")
        .split("\n", 3)[3]
        .replace('relseek = "0.1.0"', 'relseek = "9.9"')
        .replace("[trial]\n", "[trial]\nnovelty = 1\n")
    )
    path.write_text(f'sha256 = "{hashlib.sha256(body.encode()).hexdigest()}"\n{body}', encoding="utf-8")
    with pytest.raises(RegistrationFault, match=r"(?s)novelty.*compare it with relseek 9\.9"):
        read(path)


def test_a_registration_of_another_study_is_refused(plan: Registration) -> None:
    with pytest.raises(RegistrationFault, match="of the study 'warmth' and not of 'other'"):
        compared(plan, "other", 11, declared())


# --- what is declared now ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("trial", "difference"),
    [
        (outcome("wellbeing", equivalence=3.0), ("trial.outcomes.wellbeing.equivalence", "2", "3")),
        (outcome("wellbeing", equivalence=None), ("trial.outcomes.wellbeing.equivalence", "2", "not declared")),
        (outcome("comfort", items=("heard", "at_ease")), ("trial.outcomes.comfort.items", "at_ease, heard", "heard, at_ease")),
        (outcome("comfort", form="linear"), ("trial.outcomes.comfort.form", "none", "linear")),
        (declared(outcomes=declared().outcomes[1:]), ("trial.outcomes.closeness", "declared", "not declared")),
        (declared(dose={**declared().dose.model_dump(), "high": (1.0,)}), ("trial.dose.high", "0.5, 1", "1")),
        (declared(bootstrap={"draws": 999}), ("trial.bootstrap.draws", "199", "999")),
        (declared(factors=()), ("trial.factors", "declared", "none")),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_every_difference_in_the_declaration_is_a_row(plan: Registration, trial: Trial, difference: tuple[str, str, str]) -> None:
    assert differences(plan, trial) == {("declared now", *difference)}


def test_another_seed_is_a_difference(plan: Registration) -> None:
    assert differences(plan, declared(), seed=12) == {("declared now", "seed", "11", "12")}


def test_the_order_of_outcomes_and_the_place_of_files_are_no_difference(plan: Registration) -> None:
    assert differences(plan, declared(outcomes=tuple(reversed(declared().outcomes)), root="elsewhere")) == set()


# --- what was run -----------------------------------------------------------------------------------------------------


def forms(**chosen: str) -> pd.DataFrame:
    rows = [
        {"study": "coaching", "outcome": name, "form": form, "selected": form == found}
        for name, found in chosen.items()
        for form in ("linear", "quadratic")
    ]
    return pd.DataFrame(rows)


ALL = dict.fromkeys(declared().keys, "")


def test_a_run_as_registered_differs_in_nothing(plan: Registration) -> None:
    assert differences(plan, declared(), Ran(ALL, forms(comfort="quadratic", wellbeing="linear"))) == set(), "a form that nobody declared is free"


def test_outcomes_that_were_not_estimated_are_rows_with_their_reason(plan: Registration) -> None:
    statuses = {**ALL, "coaching:returned": "absent: ending.csv"}
    del statuses["coaching:comfort"]
    assert differences(plan, declared(), Ran(statuses)) == {
        ("run", "coaching:returned", "to be estimated", "absent: ending.csv"),
        ("run", "coaching:comfort", "to be estimated", "not computed"),
    }


def test_outcomes_that_were_estimated_and_not_registered_are_rows(plan: Registration) -> None:
    statuses = {**ALL, "coaching:mood": "", "coaching:sleep": "absent: night.csv"}
    assert differences(plan, declared(), Ran(statuses)) == {("run", "coaching:mood", "not registered", "estimated")}


def test_another_form_than_the_registered_one_is_a_row(tmp_path: Path) -> None:
    trial = outcome("comfort", form="linear")
    registered = read(written(tmp_path, trial))
    assert differences(registered, trial, Ran(ALL, forms(comfort="linear"))) == set()
    assert differences(registered, trial, Ran(ALL, forms(comfort="quadratic"))) == {("run", "coaching:comfort, form", "linear", "quadratic")}


def test_other_margins_and_families_than_the_registered_ones_are_rows(plan: Registration) -> None:
    equivalence = pd.DataFrame({"study": ["coaching"] * 2, "outcome": ["wellbeing", "comfort"], "margin": [2.5, 1.0]})
    fdr = pd.DataFrame({"study": "coaching", "outcome": ["closeness", "returned"], "family": ["bond", "bond"], "local_family": ["bond", "use"]})
    assert differences(plan, declared(), Ran(ALL, equivalence=equivalence, fdr=fdr)) == {
        ("run", "coaching:wellbeing, equivalence", "2", "2.5"),
        ("run", "coaching:comfort, equivalence", "not declared", "1"),
        ("run", "coaching:returned, family", "use", "bond"),
    }
