"""A trial that is nobody's of ours, from one TOML file and four CSV files to contrasts, figures and report, in a Dagster home of its own.

The example under `example_trial/` has other arms, labels and outcomes than the trials that ship, three doses, one factor, no questionnaire.
"""

from __future__ import annotations

import contextlib
import doctest
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import statsmodels.formula.api as smf
from click.testing import CliRunner, Result

CHECKOUT = Path(__file__).parents[2]
FILES = Path(__file__).parent / "example_trial"
EFFECT = "Warmth: Avg(High) - Avg(Low)"
BY_OUTCOME = ("trial_forms", "trial_fits", "trial_contrasts", "trial_equivalence", "dose_response_curves", "trajectories", "trial_robustness")
pytestmark = pytest.mark.slow
OUTCOMES = {f"coaching:{name}" for name in ("closeness", "comfort", "returned", "wellbeing")}


@dataclass(frozen=True)
class Example:
    """A folder with the example's files, and the Dagster home in which it is computed."""

    folder: Path

    @contextlib.contextmanager
    def workspace(self, study: str = "warmth") -> Iterator[Any]:
        import dagster as dg

        from relseek_assets.planning import Workspace
        from relseek_assets.stage import Store
        from relseek_assets.study import load_study

        home = self.folder / "home"
        with dg.DagsterInstance.from_config(str(home)) as instance:
            workspace = Workspace(load_study(str(self.folder / f"{study}.toml")), instance, store=Store(root=str(home / "store")))
            workspace.observe()
            yield workspace

    def run(self, study: str = "warmth") -> int:
        with self.workspace(study) as workspace:
            return int(workspace.run((), lambda line: None))

    def table(self, asset: str, study: str = "warmth") -> pd.DataFrame:
        from relseek_assets.exchange import read_asset

        with self.workspace(study) as workspace:
            return read_asset(workspace, asset)

    def contrast(self, outcome: str, label: str = EFFECT, variant: str = "primary") -> pd.Series:
        found = self.table("trial_contrasts")
        chosen = found[found["outcome"].eq(outcome) & found["contrast"].eq(label) & found["variant"].eq(variant)]
        assert len(chosen) == 1
        return chosen.iloc[0]

    def waiting(self) -> dict[str, set[str | None]]:
        """Asset -> its partitions that are missing or stale."""
        found: dict[str, set[str | None]] = {}
        with self.workspace() as workspace:
            for (asset, partition), state in workspace.states().items():
                if state.status != "fresh":
                    found.setdefault(asset, set()).add(None if partition is None else str(partition))
        return found

    def statuses(self, asset: str, study: str = "warmth") -> dict[str, str]:
        """Partition -> what it says of itself, for those that are empty."""
        from relseek_assets.stage import STATUS

        found = {}
        with self.workspace(study) as workspace:
            lineage, key = workspace.lineage(), workspace.stage.key(asset)
            for partition in workspace.partitions(asset):
                said = lineage.record(key, partition).event_log_entry.asset_materialization.metadata.get(STATUS)
                if said is not None:
                    found[str(partition)] = str(said.value)
        return found

    def page(self, study: str = "warmth") -> str:
        with self.workspace(study) as workspace:
            return str(workspace.path("trial_report", None).read_text(encoding="utf-8"))

    def edit(self, file: str, old: str, new: str) -> None:
        path = self.folder / file
        text = path.read_text(encoding="utf-8")
        assert text.count(old) == 1
        path.write_text(text.replace(old, new), encoding="utf-8")

    def command(self, *arguments: object) -> Result:
        """`relseek ARGUMENTS`; the word STUDY stands for the study's file."""
        from relseek_assets.cli import main

        given = [str(self.folder / "warmth.toml") if argument == "STUDY" else str(argument) for argument in arguments]
        environment = {"DAGSTER_HOME": str(self.folder / "home"), "RELSEEK_STORE": None, "RELSEEK_RELEASE": None}
        return CliRunner().invoke(main, given, env=environment)


@pytest.fixture(scope="module")
def computed(tmp_path_factory: pytest.TempPathFactory) -> Example:
    """The example, computed. Copy it before changing anything."""
    folder = tmp_path_factory.mktemp("trial")
    for path in (*FILES.glob("*.toml"), *FILES.glob("*.csv")):
        shutil.copy(path, folder)
    (folder / "home").mkdir()
    shutil.copy(CHECKOUT / "dagster_home" / "dagster.yaml", folder / "home")
    example = Example(folder)
    assert example.run() == 36  # 4 tables, 7 assets by outcome, participants, 2 families, the page
    return example


@pytest.fixture
def changed(computed: Example, tmp_path: Path) -> Example:
    """A copy of the test's own."""
    return Example(Path(shutil.copytree(computed.folder, tmp_path / "trial")))


def csv(name: str) -> pd.DataFrame:
    table = pd.read_csv(FILES / f"{name}.csv")
    return table.assign(dose=table["arm"].map({"control": 0.0, "gentle": 0.5, "warm": 1.0}), voice=table["channel"].eq("voice").astype(float) - 0.5)


def same(row: pd.Series, contrast: Any, rel: float = 1e-6) -> None:
    """A contrast of ours and one of statsmodels agree in estimate, standard error, p and interval."""
    lower, upper = np.ravel(contrast.conf_int())
    theirs = [float(np.squeeze(value)) for value in (contrast.effect, contrast.sd, contrast.pvalue, lower, upper)]
    assert row[["estimate", "se", "p_raw", "lower", "upper"]].tolist() == pytest.approx(theirs, rel=rel)


# --- estimates --------------------------------------------------------------------------------------------------------


def test_the_files_are_what_the_script_writes() -> None:
    import importlib.util

    found = importlib.util.spec_from_file_location("simulate", FILES / "simulate.py")
    assert found is not None
    assert found.loader is not None
    script = importlib.util.module_from_spec(found)
    found.loader.exec_module(script)
    for stem, table in script.simulate().items():
        assert table.to_csv(index=False, lineterminator="\n") == (FILES / f"{stem}.csv").read_text(encoding="utf-8")


def test_an_outcome_with_a_baseline_is_least_squares(computed: Example) -> None:
    """With a factor coded -1/2 and 1/2, a marginal mean over its levels leaves its terms out."""
    theirs = smf.ols("wellbeing_after ~ dose + I(dose ** 2) + voice + wellbeing_before + dose:voice", csv("ending")).fit()
    ours = computed.contrast("wellbeing")
    same(ours, theirs.t_test("0.75 * dose + 0.625 * I(dose ** 2) = 0"))  # means of 0.5 and 1, and of their squares
    assert ours["df"] == theirs.df_resid == 144
    same(computed.contrast("wellbeing", "Warmth × Channel: Interaction"), theirs.t_test("0.75 * dose:voice = 0"))
    same(computed.contrast("wellbeing", "Channel: voice - text"), theirs.t_test(f"voice + {csv('ending')['dose'].mean()} * dose:voice = 0"))


def test_a_binary_outcome_is_a_logit(computed: Example) -> None:
    theirs = smf.logit("returned ~ dose + voice + dose:voice", csv("ending")).fit(disp=False)
    same(computed.contrast("returned"), theirs.t_test("0.75 * dose = 0"))
    assert np.isnan(computed.contrast("returned")["df"])


def test_pooled_items_of_complete_data_are_least_squares_on_their_means(computed: Example) -> None:
    """Balanced, a random intercept takes nothing away: contrasts between people are those of their means, with the same degrees of freedom."""
    people = csv("ending").assign(mean=lambda table: table[["at_ease", "heard"]].mean(axis=1))
    theirs = smf.ols("mean ~ dose + voice + dose:voice", people).fit()
    ours = computed.contrast("comfort")
    same(ours, theirs.t_test("0.75 * dose = 0"), rel=1e-5)
    assert ours["df"] == pytest.approx(theirs.df_resid, rel=1e-5)
    assert ours["n"] == 2 * ours["participants"] == 300


def test_a_repeated_outcome_is_a_mixed_model(computed: Example) -> None:
    weekly = csv("weekly")
    formula = "closeness ~ dose + voice + week + dose:voice + dose:week + voice:week"
    theirs = smf.mixedlm(formula, weekly, groups="who", re_formula="~week").fit(reml=True, method=["lbfgs"])
    names = list(theirs.fe_params.index)
    L = np.zeros(len(names))
    L[names.index("dose")], L[names.index("dose:week")] = 0.75, 0.75 * weekly["week"].mean()
    ours = computed.contrast("closeness")
    assert ours["estimate"] == pytest.approx(L @ theirs.fe_params, rel=1e-3)
    # Kenward and Roger add the uncertainty of the variances, which is small beside 150 people
    assert ours["se"] == pytest.approx(np.sqrt(L @ theirs.cov_params().loc[names, names] @ L), rel=0.01)
    assert 140 < ours["df"] < 150


@pytest.mark.parametrize(("outcome", "highest"), [("closeness", 8.0), ("wellbeing", 4.0), ("returned", 1.6), ("comfort", 6.0)])
def test_intervals_hold_the_simulated_truth(computed: Example, outcome: str, highest: float) -> None:
    row = computed.contrast(outcome)
    assert row["lower"] < 0.75 * highest < row["upper"]
    assert row["p_raw"] < 0.01


def test_every_specification_of_robustness_is_there(computed: Example) -> None:
    table = computed.table("trial_robustness")
    of_outcome = table.groupby("outcome")["specification"].unique().map(set)
    common = {"additive", "full", "full + demographics"}
    assert of_outcome["comfort"] == common, "it is not weighted"
    assert of_outcome["closeness"] == of_outcome["returned"] == of_outcome["wellbeing"] == common | {"full + attrition weights"}
    people = csv("ending").merge(pd.read_csv(FILES / "people.csv"), on="who").merge(pd.read_csv(FILES / "weights.csv"), on="who")
    formula = "wellbeing_after ~ dose + I(dose ** 2) + voice + wellbeing_before + dose:voice"
    wanted = {
        "full + demographics": smf.ols(f"{formula} + age + schooling", people).fit(),
        "full + attrition weights": smf.wls(formula, people, weights=people["weight"]).fit(),
    }
    linear = table[table["outcome"].eq("wellbeing") & table["term"].eq("dose") & table["form"].eq("quadratic")].set_index("specification")
    for specification, theirs in wanted.items():
        assert linear.loc[specification, "estimate"] == pytest.approx(theirs.params["dose"] - 0.5 * theirs.params["dose:voice"], rel=1e-6), (
            "the effect at the factor's reference level"
        )


def test_equivalence_is_tested_where_a_margin_is_declared(computed: Example) -> None:
    table = computed.table("trial_equivalence")
    assert set(table["outcome"]) == {"wellbeing"}
    row = table[table["contrast"] == EFFECT].iloc[0]
    assert not row["equivalent"]
    assert row["lower"] < row["estimate"] < row["upper"]
    assert set(computed.statuses("trial_equivalence").values()) == {"no margin is declared"}


def test_families_adjust_what_they_declare(computed: Example) -> None:
    table = computed.table("trial_fdr")
    main = table[table["test_type"] == "main_effect_Warmth"].set_index("outcome")
    assert main["family"].to_dict() == {"closeness": "bond", "comfort": "bond", "returned": "use", "wellbeing": "use"}
    assert main["tests_global"].tolist() == [2, 2, 2, 2]
    assert main["tests_local"].to_dict() == {"closeness": 2, "comfort": 2, "returned": 1, "wellbeing": 1}
    raw = main.loc[["returned", "wellbeing"], "p_raw"]
    assert main.loc[raw.idxmax(), "p_global"] == pytest.approx(raw.max())
    assert main.loc[raw.idxmin(), "p_global"] == pytest.approx(min(2 * raw.min(), raw.max()))


def test_the_manual_shows_what_its_examples_print(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(FILES)
    found = doctest.testfile(str(CHECKOUT / "docs" / "trials.md"), module_relative=False)
    assert found.attempted > 10
    assert found.failed == 0


# --- labels, figures, report ------------------------------------------------------------------------------------------


def test_contrasts_carry_the_trials_own_labels(computed: Example) -> None:
    table = computed.table("trial_contrasts")
    assert set(table[table["outcome"] == "returned"]["contrast"]) == {
        EFFECT,
        "Channel: voice - text",
        "Warmth × Channel: Interaction",
        "Warmth at Channel = text",
        "Warmth at Channel = voice",
        "Polynomial: w (linear)",
    }
    timed = set(table[table["outcome"] == "closeness"]["contrast"])
    assert {"Time: S4 - S1", "Warmth of the coach × Time: Δ (S4 - S1)", "Slope: low_w", "Slope: high_w × voice"} <= timed
    assert set(table["unit"]) == {"points", "log-odds"}
    assert not table["contrast"].str.contains("RS|Relationship|λ|Pos|Neg").any()


def test_robustness_names_the_same_contrast(computed: Example) -> None:
    assert EFFECT in set(computed.table("trial_robustness")["term"])


def test_the_report_names_outcomes_labels_and_figures(computed: Example) -> None:
    page = computed.page()
    assert "A warmer writing coach: one randomised trial of three arms" in page
    assert "4 of 4 declared outcomes estimated, seed 11" in page
    for text in (EFFECT, "Channel: voice - text", "closeness", "comfort", "returned", "wellbeing", "Warmth of the coach w"):
        assert text in page
    for title in ("Main effects, bond", "Main effects, use", "Dose-response, coaching", "Trajectories, coaching", "Specifications, coaching"):
        assert f'aria-label="{title}"' in page
    assert "Relationship" not in page


# --- staleness --------------------------------------------------------------------------------------------------------


def test_nothing_is_stale_after_a_run(computed: Example) -> None:
    assert computed.waiting() == {}


def test_a_changed_outcome_makes_its_own_partitions_stale_and_no_other(changed: Example) -> None:
    before = changed.table("trial_contrasts")
    changed.edit("warmth.toml", 'items = ["at_ease", "heard"]', 'items = ["heard"]')
    waiting = changed.waiting()
    assert waiting == {**{asset: {"coaching:comfort"} for asset in BY_OUTCOME}, "trial_fdr": {"bond"}, "trial_report": {None}}
    assert changed.run() == len(BY_OUTCOME) + 2
    after = changed.table("trial_contrasts")
    kept = before["outcome"].ne("comfort")
    pd.testing.assert_frame_equal(before[kept][["contrast", "estimate"]], after[after["outcome"].ne("comfort")][["contrast", "estimate"]])
    alone = after[after["outcome"].eq("comfort") & after["contrast"].eq(EFFECT) & after["variant"].eq("primary")]
    assert set(alone["method"]) == {"t"}, "one item, measured once, is least squares"


def test_a_declared_polynomial_is_used(changed: Example) -> None:
    changed.edit("warmth.toml", 'items = ["wellbeing_after"]', 'items = ["wellbeing_after"]\nform = "linear"')
    changed.run()
    theirs = smf.ols("wellbeing_after ~ dose + voice + wellbeing_before + dose:voice", csv("ending")).fit()
    same(changed.contrast("wellbeing"), theirs.t_test("0.75 * dose = 0"))


def test_a_new_file_leaves_outcomes_of_other_files_fresh(changed: Example) -> None:
    path = changed.folder / "weekly.csv"
    lines = path.read_text(encoding="utf-8").splitlines()
    path.write_text("\n".join(lines[:-1]) + "\n", encoding="utf-8")
    waiting = changed.waiting()
    assert waiting.pop("trial_tables") == {"weekly"}
    assert waiting == {**{asset: {"coaching:closeness"} for asset in BY_OUTCOME}, "trial_fdr": {"bond"}, "trial_report": {None}}


def test_new_weights_concern_robustness_alone(changed: Example) -> None:
    table = pd.read_csv(changed.folder / "weights.csv")
    table.assign(weight=table["weight"] + 0.1).to_csv(changed.folder / "weights.csv", index=False)
    assert changed.waiting() == {"trial_tables": {"weights"}, "trial_robustness": OUTCOMES, "trial_report": {None}}


# --- absent and faulty files ------------------------------------------------------------------------------------------


def test_the_difference_between_two_stores_names_the_contrasts_of_the_outcomes_that_changed(computed: Example, changed: Example) -> None:
    changed.edit("warmth.toml", 'items = ["wellbeing_after"]', 'items = ["wellbeing_after"]\nform = "linear"')
    changed.run()
    from relseek_assets.difference import difference, difference_text

    with computed.workspace() as one, changed.workspace() as two:
        assert difference(one, one)["estimates"] == []
        found = difference(one, two)
    assert {row["outcome"] for row in found["estimates"]} == {"wellbeing"}
    assert [row["setting"] for row in found["settings"]] == ["trial.outcomes.wellbeing.form"]
    assert "coaching wellbeing Warmth: Avg(High) - Avg(Low) (primary): " in difference_text(found)


def test_an_absent_file_empties_its_outcomes_and_nothing_else(changed: Example) -> None:
    (changed.folder / "ending.csv").unlink()
    before = changed.contrast("closeness")
    changed.run()
    why = "absent: ending.csv"
    lost = dict.fromkeys(OUTCOMES - {"coaching:closeness"}, why)
    assert changed.statuses("trial_tables") == {"ending": why}
    for asset in ("trial_forms", "trial_fits", "trial_contrasts", "dose_response_curves", "trial_robustness"):
        assert changed.statuses(asset) == lost
    assert changed.statuses("trial_fdr") == {"use": why}
    pd.testing.assert_series_equal(changed.contrast("closeness")[["estimate", "se"]], before[["estimate", "se"]])
    assert set(changed.table("trial_fdr")["outcome"]) == {"closeness"}, "the family goes on without the outcome that is lost"
    page = changed.page()
    assert "1 of 4 declared outcomes estimated" in page
    assert page.count(why) == 3
    assert changed.waiting() == {}, "what is absent is known, and not asked for again"


@pytest.mark.parametrize(
    ("column", "value", "said"),
    [
        ("arm", "cold", "arm holds 'cold'; the arms are control, gentle, warm (trial.dose.values)"),
        ("returned", "2", "column returned of table trial_tables:ending spans 0.0 to 2.0; it is declared for 0.0 to 1.0"),
        ("who", "p002", "participant p002 is in 2 arms"),
    ],
)
def test_a_faulty_file_is_a_fault_of_its_outcomes_alone(changed: Example, column: str, value: str, said: str) -> None:
    table = pd.read_csv(changed.folder / "ending.csv", dtype=str)
    table.loc[0, column] = value
    table.to_csv(changed.folder / "ending.csv", index=False)
    changed.run()
    found = changed.statuses("trial_contrasts")
    assert set(found) == OUTCOMES - {"coaching:closeness"}
    assert len(set(found.values())) == 1
    why = next(iter(found.values()))
    assert "ending.csv" in why
    assert said in why
    assert changed.contrast("closeness")["n"] == len(csv("weekly"))


def test_a_lacking_column_is_named_with_the_remedy(changed: Example) -> None:
    table = pd.read_csv(changed.folder / "weekly.csv").rename(columns={"closeness": "nearness"})
    table.to_csv(changed.folder / "weekly.csv", index=False)
    changed.run()
    found = changed.statuses("trial_contrasts")
    assert set(found) == {"coaching:closeness"}
    assert "lacks the columns closeness; correct the file, or tables.weekly in the study file" in found["coaching:closeness"]


@pytest.mark.parametrize(("file", "lost"), [("people.csv", "full + demographics"), ("weights.csv", "full + attrition weights")])
def test_without_covariates_or_weights_their_specification_is_left_out(changed: Example, file: str, lost: str) -> None:
    (changed.folder / file).unlink()
    changed.run()
    assert changed.statuses("trial_contrasts") == {}
    found = changed.table("trial_robustness")
    assert set(found["outcome"]) == {"closeness", "comfort", "returned", "wellbeing"}
    assert lost not in set(found["specification"])


# --- the least that a trial may declare -------------------------------------------------------------------------------


def test_a_trial_may_have_no_factor_family_margin_covariate_or_weight(computed: Example) -> None:
    computed.run("bare")
    assert computed.statuses("trial_contrasts", "bare") == {}
    table = computed.table("trial_contrasts", "bare")
    row = table[table["outcome"].eq("at_ease") & table["test_type"].str.startswith("main_effect") & table["variant"].eq("coarsened")].iloc[0]
    means = csv("ending").assign(high=lambda table: table["dose"].gt(0)).groupby("high")["at_ease"].mean()
    assert row["estimate"] == pytest.approx(means[True] - means[False])
    assert table["p_local"].isna().all()
    assert computed.statuses("trial_fdr", "bare") == {"none": "no outcome belongs to this family"}
    assert computed.table("trial_fdr", "bare").empty
    page = computed.page("bare")
    assert "2 of 2 declared outcomes estimated" in page
    assert 'aria-label="Dose-response, trial"' in page
    assert 'aria-label="Main effects' not in page


# --- registration and typeset tables ----------------------------------------------------------------------------------


def test_a_registration_finds_what_was_declared_and_run_otherwise(changed: Example) -> None:
    file = changed.folder / "registration.toml"
    assert changed.command("trials", "register", "STUDY", "-o", file).exit_code == 0
    again = changed.command("trials", "register", "STUDY", "-o", file)
    assert again.exit_code != 0
    assert "is kept as it is" in again.output
    same_plan = changed.command("trials", "registered", "STUDY", file)
    assert (same_plan.exit_code, "nothing differs" in same_plan.output) == (0, True)

    changed.edit("warmth.toml", "equivalence = 2.0", "equivalence = 5.0")
    (changed.folder / "weekly.csv").unlink()
    changed.run()
    found = changed.command("trials", "registered", "STUDY", file, "--format", "json")
    assert found.exit_code == 1
    rows = {(row["compared"], row["what"], row["registered"], row["found"]) for row in json.loads(found.stdout)}
    assert rows == {
        ("declared now", "trial.outcomes.wellbeing.equivalence", "2", "5"),
        ("run", "coaching:wellbeing, equivalence", "2", "5"),
        ("run", "coaching:closeness", "to be estimated", "absent: weekly.csv"),
    }

    file.write_text(file.read_text(encoding="utf-8").replace("equivalence = 2.0", "equivalence = 5.0"), encoding="utf-8")
    edited = changed.command("trials", "registered", "STUDY", file)
    assert edited.exit_code == 1
    assert "edited since it was registered" in edited.output


def test_estimates_are_written_as_tables_of_a_paper(computed: Example, tmp_path: Path) -> None:
    shown = computed.command("trials", "tables", "STUDY", "-o", tmp_path / "tables")
    assert shown.exit_code == 0, shown.output
    names = {"family_bond", "family_use", "forms", "equivalence", "robustness"}
    files = {f"{name}.{ending}" for name in names for ending in ("csv", "tex")} | {"tables.tex"}
    assert {path.name for path in (tmp_path / "tables").iterdir()} == files
    table = pd.read_csv(tmp_path / "tables" / "family_use.csv")
    row = table[table["outcome"].eq("wellbeing") & table["contrast"].eq(EFFECT)].iloc[0]
    assert float(row["estimate"]) == pytest.approx(computed.contrast("wellbeing")["estimate"], abs=0.005)
    document = (tmp_path / "tables" / "tables.tex").read_text(encoding="utf-8")
    assert all(f"\\input{{{name}}}" in document for name in names)
