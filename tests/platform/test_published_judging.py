"""Published scores as assets: the release's figures come out, and what is absent, arrives, is faulty or names unknown doses is said so."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

import dagster as dg
import numpy as np
import pandas as pd
import pytest

from relseek_assets.planning import PlanError, Workspace
from relseek_assets.stage import Store
from relseek_assets.study import Study, StudyError, load_study
from relseek_resources.storage import read_table

CHECKOUT = Path(__file__).parents[2]
ROOT = os.environ.get("RELSEEK_RELEASE", "")
released = pytest.mark.skipif(not ROOT, reason="RELSEEK_RELEASE is not set: the published scores are not here")
SCORED = ("selection", "dose_response", "metric_dose_response", "generations")
L31, L21 = "llama31-70b:L31", "llama31-70b:L21"

STUDY = """
name = "echo"
kind = "bipo"
behaviours = ["relationship_seeking"]

[published]
vectors = true
scores = true

[[models]]
name = "big"
source = "someone/Big-Model"
width = 4
layers = [1, 2]
epochs_trained = 3
epochs_evaluated = [2, 3]
epochs_judged = [3]

[[models]]
name = "small"
source = "someone/Small-Model"
width = 4
layers = [1]
epochs_trained = 3
epochs_evaluated = [2]

[doses]
generated = [-2.0, -1.0, 0.0, 1.0]
paired = [-1.0, 0.0, 1.0]
selection = [-1.0, 0.0, 1.0]

[judge]
name = "gpt-4o-2024-08-06"
bootstrap = 100
"""


@contextlib.contextmanager
def workspace_of(home: Path, study: Study) -> Iterator[Workspace]:
    home.mkdir(exist_ok=True)
    shutil.copy(CHECKOUT / "dagster_home" / "dagster.yaml", home)
    with dg.DagsterInstance.from_config(str(home)) as instance:
        yield Workspace(study, instance, store=Store(root=str(home / "store")))


def table(workspace: Workspace, name: str, partition: str | None = None) -> pd.DataFrame:
    return read_table(workspace.path(name, partition), workspace.catalogue[name].schema_of(partition))


def planned(workspace: Workspace, *names: str) -> dict[str, int]:
    return {task.asset.name: len(task.partitions) for task in workspace.plan(names)}


# --- the release ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def kirk2025(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workspace]:
    """The published scores of kirk2025 and all that is made of them."""
    with pytest.MonkeyPatch.context() as patch, workspace_of(tmp_path_factory.mktemp("kirk2025") / "home", load_study("kirk2025")) as workspace:
        patch.setenv("RELSEEK_RELEASE", ROOT)
        workspace.observe()
        workspace.run(SCORED)
        yield workspace


@released
@pytest.mark.slow
def test_coherence_area_and_rating_slope_are_the_published_ones(kirk2025: Workspace) -> None:
    found = table(kirk2025, "selection").set_index(["site", "epoch"])
    assert set(found.index) == {(L31, 10), (L21, 15)}
    assert found.loc[(L31, 10), "coherence_auc"] == pytest.approx(32.237755, abs=6e-7)
    assert found.loc[(L31, 10), "rating_slope"] == pytest.approx(2.102993, abs=6e-7)
    assert found["pairwise_slope"].isna().all(), "the files of comparisons are not in this copy"
    assert (found["coherence_auc_lower"] < found["coherence_auc"]).all()


@released
@pytest.mark.slow
@pytest.mark.parametrize(("site", "epoch"), [(L31, 10), (L21, 15)])
def test_figures_are_those_that_numpy_makes_of_the_files(kirk2025: Workspace, site: str, epoch: int) -> None:
    folder = Path(ROOT) / "2-steering-vector-training/vector_evals/Llama-3.1-70B-Instruct" / f"layer{site[-2:]}"
    means = {}
    for rubric in ("coherence", "relationship"):
        rows = [json.loads(line) for line in (folder / f"{rubric}_scores_ep{epoch}.jsonl").read_text().splitlines()]
        doses = np.linspace(-2, 2, 9)
        means[rubric] = np.array([np.mean([row["score"] for row in rows if row["multiplier"] == dose]) for dose in doses])
    found = table(kirk2025, "selection").set_index("site").loc[site]
    assert found["coherence_auc"] == pytest.approx(np.trapezoid(means["coherence"], doses))
    assert found["rating_slope"] == pytest.approx(np.polyfit(doses, means["relationship"], 1)[0])


@released
@pytest.mark.slow
def test_the_five_hundred_replies_scored_again_have_the_published_means_and_two_judges(kirk2025: Workspace) -> None:
    curve = table(kirk2025, "dose_response", f"{L31}|e10").query("judge == 'gpt-4.1-mini'").set_index("multiplier")["estimate"]
    assert curve.round(2).to_dict() == {-1.0: 2.17, -0.5: 3.04, 0.0: 4.11, 0.5: 5.50, 1.0: 7.16}
    for dose in ("-1_0", "-0_5", "0_0", "0_5", "1_0"):
        scores = table(kirk2025, "judge_scores", f"{L31}|e10@{dose}").query("rubric == 'relationship'")
        both = scores.pivot_table(index="item", columns="judge", values="score").dropna()
        assert len(both) == 100
        assert set(both.columns) == {"gpt-4o-2024-08-06", "gpt-4.1-mini"}
        replies = table(kirk2025, "generations", f"{L31}|e10@{dose}")
        assert set(replies["item"]) == set(both.index)
        assert (replies["token_ids"].map(len) == replies["tokens"]).all()


@released
@pytest.mark.slow
def test_perplexity_and_propensity_by_dose_are_the_published_ones(kirk2025: Workspace) -> None:
    found = table(kirk2025, "metric_dose_response", f"{L31}|e10")
    published = {"propensity": [-0.247, 0.406, 0.608, 0.773, 1.215], "log10_perplexity": [0.598, 0.518, 0.498, 0.552, 0.679]}
    for quantity, means in published.items():
        part = found[found["quantity"] == quantity].sort_values("multiplier")
        assert list(part["estimate"].round(3)) == means
        assert set(part["n"]) == {100}
        assert (part["lower"] < part["estimate"]).all()
        assert (part["estimate"] < part["upper"]).all()


@released
@pytest.mark.slow
def test_vectors_without_files_are_absent_without_an_event_and_never_planned(kirk2025: Workspace) -> None:
    assert planned(kirk2025, *SCORED) == {}
    states = kirk2025.states(["judge_scores", "judge_pairs", "candidate_items"])
    here = {partition for (name, partition), state in states.items() if name == "judge_scores" and state.status == "fresh"}
    assert {str(partition).partition("@")[0] for partition in here} == {f"{L31}|e10", f"{L21}|e15"}
    assert {state.status for (name, _), state in states.items() if name == "judge_pairs"} == {"absent"}
    for name, events in (("published_ratings", 2), ("published_replies", 5), ("published_comparisons", 0)):
        assert len(kirk2025.instance.fetch_observations(kirk2025.stage.key(name), limit=1000).records) == events


def test_the_grid_is_the_published_one() -> None:
    study = load_study("kirk2025")
    assert [len(doses) for doses in (study.doses.generated, study.paired_doses, study.selection_doses)] == [21, 15, 9]
    assert sum(len(study.model_of(site).judged) for site in study.sites) == 34
    assert len(list(combinations(study.paired_doses, 2))) == 105


# --- a release of one's own -------------------------------------------------------------------------------------------

ITEMS = (4, 9, 11)
DOSES = (-2.0, -1.0, 0.0, 1.0)
PAID = {"token_usage": {"prompt_tokens": 10, "completion_tokens": 2, "total_tokens": 12}, "cost": {"total_cost": 0.25}}


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


def evaluations(root: Path, model: str = "Big-Model", layer: int = 1) -> Path:
    return root / "2-steering-vector-training" / "vector_evals" / model / f"layer{layer}"


def rate(root: Path, rubric: str, slope: float, model: str = "Big-Model", layer: int = 1, epoch: int = 3) -> Path:
    rows = [
        {"generation_id": number, "test_prompt_id": item, "multiplier": dose, "score": round(5 + slope * dose + place), **PAID}
        for number, (place, item, dose) in enumerate((place, item, dose) for place, item in enumerate(ITEMS) for dose in DOSES)
    ]
    return write(evaluations(root, model, layer) / f"{rubric}_scores_ep{epoch}.jsonl", rows)


def compare(root: Path, answers: dict[int, str], layer: int = 1) -> Path:
    """Of every pair the larger dose is shown second and wins, except on the items of `answers`."""
    rows = [
        {"test_prompt_id": item, "multiplier_a": low, "multiplier_b": high, "model_response": answers.get(item, "B"), **PAID}
        for item in ITEMS
        for low, high in combinations((-1.0, 0.0, 1.0), 2)
    ]
    return write(evaluations(root, layer=layer) / "pairwise_relationship_scores_ep3.jsonl", rows)


def reply(item: int, dose: float, layer: int = 1) -> dict[str, Any]:
    log_probs = {
        "avg_log_prob": -0.5,
        "perplexity": float(np.exp(0.5)),
        "chosen_logprob": -2.0,
        "rejected_logprob": -2.5 - dose,
        "propensity": 0.5 + dose,
    }
    named = {"test_prompt_id": item, "model_name": "Big-Model", "epoch": 3, "layer": layer, "multiplier": dose, "generation_id": 1}
    return {**named, "response_str": f"{item} at {dose}", "response_tokens": [5, 6, 7], **log_probs, "relationship_score": 4.0}


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two vectors rated, one of them compared in pairs."""
    root = tmp_path / "release"
    for layer in (1, 2):
        rate(root, "coherence", 0.0, layer=layer)
        rate(root, "relationship", float(layer), layer=layer)
    compare(root, {4: "tie"})
    monkeypatch.setenv("RELSEEK_RELEASE", str(root))
    return root


@pytest.fixture
def workspace(tmp_path: Path) -> Iterator[Workspace]:
    path = tmp_path / "echo.toml"
    path.write_text(STUDY)
    with workspace_of(tmp_path / "home", load_study(str(path))) as found:
        yield found


def test_a_release_without_scores_asks_for_nothing(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RELSEEK_RELEASE", raising=False)
    assert workspace.observe() == []
    assert planned(workspace) == {}
    assert workspace.run() == 0


@pytest.mark.slow
def test_pairs_are_optional_and_change_selection_where_they_arrive(workspace: Workspace, root: Path) -> None:
    workspace.observe()
    assert planned(workspace, "selection") == {"judge_scores": 8, "judge_pairs": 1, "candidate_items": 2, "site_candidates": 2, "selection": 1}
    workspace.run(["selection"])
    before = table(workspace, "selection").set_index("site")
    assert before.loc["big:L01", "pairwise_slope"] == pytest.approx(0.5), "win rates 0, 1/2, 1: the unreadable item counts for nobody"
    assert np.isnan(before.loc["big:L02", "pairwise_slope"])
    assert before["score"].isna().all()
    assert dict(before["rating_slope"].round(6)) == {"big:L01": 1.0, "big:L02": 2.0}
    shown = workspace.lineage().record(workspace.stage.key("judge_pairs"), "big:L01|e03").event_log_entry.asset_materialization.metadata
    assert shown["unreadable"].value == 3
    assert shown["pairwise_slope_as_published"].value == pytest.approx(0.5), "as published they win for the reply shown second, the larger dose"
    compare(root, {}, layer=2)
    workspace.observe()
    assert planned(workspace, "selection")["judge_pairs"] == 1
    workspace.run(["selection"])
    after = table(workspace, "selection")
    assert after["pairwise_slope"].tolist() == pytest.approx([0.5, 0.5])
    assert not after["reason"].str.contains("no pairwise slopes").any()
    assert planned(workspace, "selection") == {}


def test_epochs_that_are_not_judged_count_for_nothing(workspace: Workspace, root: Path) -> None:
    for rubric in ("coherence", "relationship"):
        rate(root, rubric, 1.0, epoch=2)
    workspace.observe()
    assert planned(workspace, "judge_scores") == {"judge_scores": 8}


def test_an_epoch_that_only_another_model_has_is_absent(workspace: Workspace, root: Path) -> None:
    workspace.observe()
    found = workspace.states(["dose_response"])
    assert found[("dose_response", "small:L01|e03")].status == "absent"


@pytest.mark.slow
def test_replies_of_some_doses_are_partitions_of_those_doses(workspace: Workspace, root: Path) -> None:
    write(
        root / "5-frontier-model-behavioral-landscaping" / "data" / "scored_vector_generations_ep3.jsonl",
        [reply(item, dose) for item in ITEMS for dose in (0, 1)],
    )
    write(
        root / "data" / "relationship-seeking" / "test.jsonl",
        [{"prompt_id": item, "prompt_arr": [{"role": "user", "content": "Hi"}]} for item in ITEMS],
    )
    workspace.observe()
    asked = planned(workspace, "generations", "metric_dose_response", "judge_scores")
    assert asked == {"generations": 2, "published_metrics": 2, "metric_dose_response": 1, "judge_scores": 8}
    workspace.run(["generations", "metric_dose_response", "judge_scores", "dose_response"])
    assert planned(workspace, "generations", "metric_dose_response", "judge_scores") == {}
    replies = table(workspace, "generations", "big:L01|e03@1_0")
    assert list(replies["reply"]) == ["4 at 1", "9 at 1", "11 at 1"]
    assert [message["role"] for message in replies["prompt"][0]] == ["system", "user"]
    curve = table(workspace, "metric_dose_response", "big:L01|e03").set_index(["quantity", "multiplier"])["estimate"]
    assert curve["propensity"].to_dict() == {0.0: 0.5, 1.0: 1.5}
    assert curve["log10_perplexity"].to_numpy() == pytest.approx(0.5 / np.log(10))
    judges = table(workspace, "dose_response", "big:L01|e03").query("rubric == 'relationship'").groupby("judge")["multiplier"].apply(list).to_dict()
    assert judges == {"gpt-4.1-mini": [0.0, 1.0], "gpt-4o-2024-08-06": list(DOSES)}
    candidates = table(workspace, "candidate_items", "big:L01|e03") if workspace.run(["candidate_items"]) else pd.DataFrame()
    assert candidates.groupby("multiplier")["rating"].mean().to_dict() == {-1.0: 5.0, 0.0: 6.0, 1.0: 7.0}, "by the study's judge alone"


def test_the_whole_sweep_is_read_where_it_is_there(workspace: Workspace, root: Path) -> None:
    write(evaluations(root) / "generations_ep3.jsonl", [reply(item, dose) for item in ITEMS for dose in DOSES])
    workspace.observe()
    assert planned(workspace, "generations", "published_metrics") == {"generations": 4, "published_metrics": 4}
    workspace.run(["generations"])
    lineage = workspace.lineage()
    said = lineage.record(workspace.stage.key("generations"), "big:L01|e03@0_0").event_log_entry.asset_materialization.metadata["status"].value
    assert said == "absent: data/relationship-seeking/test.jsonl"


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ('{"test_prompt_id": 4, "multiplier": 7.5, "score": 3}', ["doses [7.5]", "doses.generated"]),
        ('{"test_prompt_id": 4, "multiplier": 1.0, "sco', ["line 13"]),
        ('{"test_prompt_id": 4, "multiplier": 1.0}', ["row 13", "score is missing"]),
        ('{"test_prompt_id": 4, "multiplier": 1.0, "score": "high"}', ["score", "mend or remove"]),
        ('{"test_prompt_id": 4, "multiplier": 1.0, "score": 3}', ["item 4", "more than once", "coherence_scores_ep3"]),
        ('{"test_prompt_id": 4, "multiplier": 1.0, "score": 11}', ["score"]),
    ],
    ids=["unknown dose", "torn line", "no score", "a word for a score", "twice", "beyond the scale"],
)
def test_a_faulty_file_is_named_with_what_is_wrong(workspace: Workspace, root: Path, line: str, named: list[str]) -> None:
    path = evaluations(root) / "coherence_scores_ep3.jsonl"
    path.write_text(path.read_text() + line + "\n")
    workspace.observe()
    with pytest.raises(PlanError) as caught:
        workspace.run(["judge_scores"])
    for text in (*named, "coherence_scores_ep3" if "doses" in named[0] or "line" in named[0] or "row " in named[0] else "judge_scores"):
        assert text in str(caught.value)


def test_comparisons_on_two_rubrics_are_refused(workspace: Workspace, root: Path) -> None:
    shutil.copy(evaluations(root) / "pairwise_relationship_scores_ep3.jsonl", evaluations(root) / "pairwise_warmth_scores_ep3.jsonl")
    workspace.observe()
    with pytest.raises(PlanError, match="comparisons on several rubrics"):
        workspace.run(["judge_pairs"])


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("vectors = true\n", "", "published.scores: they are of published vectors"),
        ("epochs_judged = [3]", "epochs_judged = [1]", "epochs_judged [1] are not among epochs_evaluated"),
        ('name = "gpt-4o-2024-08-06"', 'name = "gpt-4.1-mini"', "gave no published ratings of coherence"),
        ("scores = true", "", "epochs_judged: read with published.scores alone"),
        ("[doses]", "[pairs]\ntraining = 3\n[doses]", "pairs: a study whose vectors are published"),
    ],
    ids=["no vectors", "an epoch not evaluated", "a judge of one rubric", "no scores", "training"],
)
def test_settings_that_nothing_reads_are_refused(tmp_path: Path, old: str, new: str, said: str) -> None:
    assert STUDY.count(old) == 1
    path = tmp_path / "echo.toml"
    path.write_text(STUDY.replace(old, new))
    with pytest.raises(StudyError) as caught:
        load_study(str(path))
    assert said in str(caught.value)
