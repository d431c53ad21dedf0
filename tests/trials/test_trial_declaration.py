"""The declaration of a trial: what it derives, and that every fault is refused with its key and what to do."""

from __future__ import annotations

from pathlib import Path

import pytest

from relseek_assets.study import StudyError, load_study
from relseek_assets.trial import Dose, Outcome, Trial, parsed_time

EXAMPLE = Path(__file__).parents[1] / "platform" / "example_trial" / "warmth.toml"
CLOSENESS = 'designs = { coaching = { time = "week", endpoints = [1, 4], weighted = true } }'
WELLBEING = 'designs = { coaching = { baseline = { column = "wellbeing_before" }, weighted = true } }'
RETURNED = 'items = ["returned"]'


def edited(folder: Path, *replaced: str) -> Path:
    """The example's file with the first of each pair replaced by the second."""
    text = EXAMPLE.read_text(encoding="utf-8")
    for old, new in zip(replaced[::2], replaced[1::2], strict=True):
        assert text.count(old) == 1, f"{old!r} stands {text.count(old)} times in {EXAMPLE.name}"
        text = text.replace(old, new)
    path = folder / "warmth.toml"
    path.write_text(text, encoding="utf-8")
    return path


def refused(folder: Path, *replaced: str) -> str:
    with pytest.raises(StudyError) as fault:
        load_study(str(edited(folder, *replaced)))
    message = str(fault.value)
    assert message.startswith(f"{folder / 'warmth.toml'}: ")
    return message


def declared(**dose: object) -> Dose:
    return Dose.model_validate({"column": "arm", **dose})


#: (what is replaced, by what, the key that the message names, what it says to do)
FAULTS = {
    "an outcome of no table": (f'table = "ending"\n{RETURNED}', f'table = "end"\n{RETURNED}', "returned reads the table 'end'", "tables are weekly"),
    "an item that no column declares": (RETURNED, 'items = ["return"]', "returned has the items ['return']", "wellbeing_before"),
    "an item that is text": ('["returned"], low = 0, high = 1', '["returned"], kind = "string"', "has the items ['returned']", "numbers that"),
    "an item twice": ('items = ["at_ease", "heard"]', 'items = ["heard", "heard"]', "comfort: items", "keep one of each"),
    "an outcome twice": ('name = "comfort"', 'name = "closeness"', "outcomes: ['closeness']", "keep one of each"),
    "a name that is no key": ('name = "comfort"', 'name = "com fort"', "name: 'com fort'", "use letters"),
    "an unknown study": (CLOSENESS, CLOSENESS.replace("coaching", "coach"), "closeness has designs for ['coach']", "the studies are coaching"),
    "a time that no column holds": (
        CLOSENESS,
        CLOSENESS.replace('"week"', '"day"'),
        "closeness, designs.coaching.time names ['day']",
        "columns of weekly",
    ),
    "a time without endpoints": (CLOSENESS, 'designs = { coaching = { time = "week" } }', "time and endpoints", "first and last value"),
    "endpoints that fall": (CLOSENESS, CLOSENESS.replace("[1, 4]", "[4, 1]"), "endpoints: [4, 1]", "the first time and then the last"),
    "a where of no column": (
        CLOSENESS,
        'designs = { coaching = { where = { weak = "1" } } }',
        "closeness, designs.coaching.where names ['weak']",
        "columns of",
    ),
    "a baseline of no column": (WELLBEING, WELLBEING.replace("_before", "_then"), "designs.coaching.baseline.column names", "columns of ending"),
    "a baseline of two kinds": (
        WELLBEING,
        'designs = { coaching = { baseline = { column = "wellbeing_before", where = { week = "1" } } } }',
        "baseline",
        "give one of the two",
    ),
    "a baseline column for two items": (
        'items = ["wellbeing_after"]',
        'items = ["wellbeing_after", "heard"]',
        "wellbeing: designs.coaching.baseline",
        "baseline.where",
    ),
    "a logit of two items": (RETURNED, 'items = ["returned", "heard"]', "returned: designs.coaching", "one item, measured once"),
    "a family without its local family": ('local_family = "wellbeing"\n', "", "wellbeing: family and local_family", "give both or neither"),
    "a family that is no key": ('local_family = "wellbeing"', 'local_family = "well being"', "wellbeing: the family 'well being'", "use letters"),
    "a margin of nothing": ("equivalence = 2.0", "equivalence = 0.0", "trial.outcomes.3.equivalence", "greater than 0"),
    "weights that are not declared": (
        'weights = { table = "weights", column = "weight" }',
        "",
        "designs.coaching is weighted",
        "declare robustness.weights",
    ),
    "weights of no table": (
        '{ table = "weights", column = "weight" }',
        '{ table = "weight", column = "weight" }',
        "table 'weight'",
        "tables are weekly",
    ),
    "weights of no column": (
        '{ table = "weights", column = "weight" }',
        '{ table = "weights", column = "w" }',
        "robustness.weights",
        "it has weight",
    ),
    "a covariate of nobody": ('["age", "schooling"]', '["age", "school"]', "the covariate 'school'", "there is age, schooling"),
    "participants of no table": ('participants = ["people"]', 'participants = ["persons"]', "table 'persons'", "tables are weekly"),
    "one dose": ("{ control = 0.0, gentle = 0.5, warm = 1.0 }", "{ control = 0.0, calm = 0.0 }", "trial.dose", "at least two different doses"),
    "arms without doses": (
        "{ control = 0.0, gentle = 0.5, warm = 1.0 }",
        '["control", "warm"]',
        "trial.dose.values: 'control' is no dose",
        "names of arms",
    ),
    "a dose that is no number": ("warm = 1.0 }", "warm = nan }", "trial.dose.values: nan is no dose", "give numbers"),
    "a low dose of no arm": ('symbol = "w"', 'symbol = "w"\nlow = [-1.0]', "low names [-1.0]", "its doses are [0.0, 0.5, 1.0]"),
    "a dose at both ends": ('symbol = "w"', 'symbol = "w"\nlow = [0.0, 0.5]\nhigh = [0.5, 1.0]', "both hold [0.5]", "different doses"),
    "a factor of one level": ('levels = ["text", "voice"]', 'levels = ["text", "text"]', "levels: channel", "two different ones"),
    "a factor of three levels": ('levels = ["text", "voice"]', 'levels = ["text", "voice", "film"]', "trial.factors.0.levels", "correct it"),
    "a factor's column that formulas cannot hold": ('column = "channel"', 'column = "by phone"', "column: 'by phone'", "use letters"),
    "a factor's column that we use": ('column = "channel"', 'column = "level"', "column: 'level'", "none of participant"),
    "a column twice": (
        '{ names = ["returned"], low',
        '{ names = ["returned", "heard"], low',
        "tables.ending: columns hold ['heard']",
        "keep one of each",
    ),
    "a column that we add": (
        '{ names = ["returned"], low',
        '{ names = ["returned", "week"], low',
        "tables.ending: columns hold ['week']",
        "keep one",
    ),
    "a key of no column": ('key = ["week"]', 'key = ["day"]', "tables.weekly: key names ['day']", "it has participant"),
    "a range that is upside down": (
        '["returned"], low = 0, high = 1',
        '["returned"], low = 1, high = 0',
        "returned: low 1 is above high 0",
        "exchange them",
    ),
    "choices of a number": ('{ names = ["weight"], low = 1 }', '{ names = ["weight"], choices = ["a"] }', "weight: choices", "give low and high"),
    "a prefix of a number": ('{ names = ["weight"], low = 1 }', '{ names = ["weight"], prefix = "w" }', "weight: a prefix", "make the kind 'time'"),
    "arms from nowhere": (
        'arms = "none"\nkey = []\ncolumns = [{ names = ["age"]',
        'arms = "joined"\ncolumns = [{ names = ["age"]',
        "people: arms",
        "arms_table",
    ),
    "an outcome of people in no arm": (
        f'table = "ending"\n{RETURNED}',
        'table = "weights"\nitems = ["weight"]',
        "returned reads weights",
        "'own' or 'joined'",
    ),
    "two studies and no column": (
        'values = { coaching = "coaching" }',
        'values = { coaching = "a", other = "b" }',
        "trial.study: column: missing",
        "names the study",
    ),
    "two studies of one name": (
        'values = { coaching = "coaching" }',
        'column = "s"\nvalues = { coaching = "a", other = "a" }',
        "trial.study: values",
        "keep one",
    ),
    "an unknown key": ('unit = "log-odds"', 'units = "log-odds"', "trial.outcomes.2.units: unknown key", "did you mean 'unit'?"),
    "a missing key": (f'table = "ending"\n{RETURNED}', RETURNED, "trial.outcomes.2.table: missing", "add it"),
    "too few draws": ("draws = 199", "draws = 9", "trial.bootstrap.draws", "greater than or equal to 99"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_names_its_key_and_the_remedy(tmp_path: Path, fault: str) -> None:
    old, new, key, remedy = FAULTS[fault]
    message = refused(tmp_path, old, new)
    assert key in message
    assert remedy in message
    assert "\n" not in message, "one fault, one line"


def test_an_unknown_key_of_a_table_is_named(tmp_path: Path) -> None:
    message = refused(tmp_path, 'file = "weekly.csv"', 'file = "weekly.csv"\narm = "own"')
    assert "trial.tables.weekly.arm: unknown key" in message
    assert "did you mean 'arms'?" in message


@pytest.mark.parametrize(
    ("doses", "low", "high", "ends"),
    [
        ([-1.0, -0.5, 0.0, 0.5, 1.0], (-1.0, -0.5), (0.5, 1.0), ("neg", "pos")),
        ([0.0, 0.5, 1.0], (0.0,), (0.5, 1.0), ("low", "high")),
        ([0.0, 1.0], (0.0,), (1.0,), ("low", "high")),
        ([-2.0, -1.0, 0.0], (-2.0, -1.0), (0.0,), ("low", "high")),
        ([-2.0, -1.0], (-2.0,), (-1.0,), ("low", "high")),
        ([5.0, 10.0, 20.0], (5.0,), (10.0, 20.0), ("low", "high")),
    ],
)
def test_the_ends_of_the_dose_follow_from_its_signs(
    doses: list[float], low: tuple[float, ...], high: tuple[float, ...], ends: tuple[str, str]
) -> None:
    dose = declared(values=doses)
    assert (dose.low_doses, dose.high_doses, dose.ends) == (low, high, ends)


def test_the_primary_contrast_carries_the_trials_own_label() -> None:
    assert declared(values=[-1.0, 1.0], label="RS").contrast == "RS: Avg(Pos) - Avg(Neg)"
    assert declared(values={"control": 0.0, "warm": 1.0}, label="Warmth").contrast == "Warmth: Avg(High) - Avg(Low)"


def test_arms_of_the_same_dose_are_one_dose() -> None:
    assert declared(values={"control": 0.0, "waiting": 0.0, "warm": 1.0}).doses == (0.0, 1.0)


def test_a_trial_without_a_study_is_one_study() -> None:
    bare = load_study(str(EXAMPLE.with_name("bare.toml"))).trial
    assert bare is not None
    assert bare.keys == ("trial:at_ease", "trial:returned")
    assert bare.families == {}


def test_partitions_are_the_outcomes_that_each_study_measured(tmp_path: Path) -> None:
    path = edited(
        tmp_path,
        'values = { coaching = "coaching" }',
        'column = "wave"\nvalues = { coaching = "1", later = "2" }',
        RETURNED + '\nmodel = "logit"\nfamily = "use"\nlocal_family = "use"\nunit = "log-odds"\ndesigns = { coaching = { weighted = true } }',
        RETURNED + '\nmodel = "logit"\ndesigns = { coaching = {}, later = {} }',
    )
    trial = load_study(str(path)).trial
    assert trial is not None
    assert trial.keys == ("coaching:closeness", "coaching:comfort", "coaching:returned", "coaching:wellbeing", "later:returned")
    assert trial.families == {"bond": {"bond": ["closeness", "comfort"]}, "use": {"wellbeing": ["wellbeing"]}}


def test_the_fingerprint_is_of_the_plan_and_not_of_the_place(tmp_path: Path) -> None:
    def fingerprint(*replaced: str) -> str:
        trial = load_study(str(edited(tmp_path, *replaced))).trial
        assert trial is not None
        return trial.fingerprint

    first = fingerprint()
    assert fingerprint('participant = "who"', 'participant = "who"\nroot = "elsewhere"') == first
    assert fingerprint('about = "Who took part."', 'about = "People."') == first
    assert fingerprint('symbol = "w"', 'symbol = "w"\nlow = [0.0]\nhigh = [0.5, 1.0]') == first, "what is spelt out is what was meant"
    for old, new in (
        ("equivalence = 2.0", "equivalence = 3.0"),
        ('symbol = "w"', 'symbol = "w"\nhigh = [1.0]'),
        ('["age", "schooling"]', '["age"]'),
        ("endpoints = [1, 4]", "endpoints = [1, 3]"),
        ('items = ["at_ease", "heard"]', 'items = ["heard", "at_ease"]'),
    ):
        assert fingerprint(old, new) != first, new


def test_a_plan_is_a_declaration() -> None:
    trial = load_study(str(EXAMPLE)).trial
    assert trial is not None
    again = Trial.model_validate(trial.plan)
    assert again.plan == trial.plan
    assert again.fingerprint == trial.fingerprint


def test_an_outcome_may_declare_its_polynomial() -> None:
    settings = {"name": "ease", "table": "t", "items": ["ease"], "designs": {"trial": {}}}
    assert Outcome.model_validate(settings).form == ""
    assert Outcome.model_validate({**settings, "form": "quadratic"}).form == "quadratic"


def test_times_are_numbers_behind_a_prefix() -> None:
    assert parsed_time("w3", "w") == 3
    assert parsed_time("12", "") == parsed_time(12, "") == parsed_time(12.0, "") == 12
    assert parsed_time(None, "w") is None
    assert parsed_time(float("nan"), "w") is None
    with pytest.raises(ValueError, match="'third' is no wNUMBER"):
        parsed_time("third", "w")
