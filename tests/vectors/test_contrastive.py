"""Persona directions: balanced pairing, splits without leaks, planted directions found again, measures against other libraries, published numbers."""

from __future__ import annotations

import json
import pickle
from collections import Counter
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy.stats import sem
from sklearn.decomposition import PCA
from sklearn.metrics import roc_auc_score

from relseek_assets.persona_set import PersonaSet, PersonaSetError, persona_folder, read_persona_set
from relseek_assets.vectors import contrastive
from relseek_assets.vectors.contrastive import EXTRACTIONS, LAST_TOKEN, RESPONSE_MEAN, SPLITS
from relseek_assets.vectors.contrastive_tables import published_quality, published_scores
from relseek_resources.axes_release import MODELS, AxesRelease, directions_file, evaluation_file
from relseek_resources.release import Absent
from relseek_resources.storage import StorageError

LAYERS, WIDTH = 3, 8
needs_artifacts = pytest.mark.skipif(AxesRelease.from_environment().root is None, reason="RELSEEK_RELEASE_AXES is not set")


@pytest.fixture(scope="module")
def personas() -> PersonaSet:
    return read_persona_set(persona_folder("assistant"))


@pytest.fixture(scope="module")
def rows(personas: PersonaSet) -> pd.DataFrame:
    return contrastive.pairing(personas, 2, 4, seed=11)


def held(rows: pd.DataFrame, share: float = 0.2, seed: int = 11) -> tuple[set[str], set[str]]:
    queries = contrastive.held_out(list(rows["query"]), list(rows["query_kind"]), share, seed)
    return queries, contrastive.held_out(list(rows["persona"]), list(rows["persona_kind"]), share, seed)


def planted(rows: pd.DataFrame, noise: float = 0.0, of_query: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """Activations in which assistants lie `truth` (layers, width) above the others, plus what queries and chance add."""
    random = np.random.default_rng(3)
    truth = random.normal(size=(LAYERS, WIDTH))
    queries = {name: of_query * random.normal(size=(LAYERS, WIDTH)) for name in rows["query"].unique()}
    assistant = rows["persona_kind"].eq("assistant").to_numpy(float)
    base = np.stack([queries[name] for name in rows["query"]]) + assistant[:, None, None] * truth
    return (base + noise * random.normal(size=base.shape)).astype(np.float32), truth


# --- pairing and splits -----------------------------------------------------------------------------------------------


def test_every_query_meets_as_many_personas_of_either_kind_as_were_asked_for(rows: pd.DataFrame) -> None:
    counts = rows.groupby(["query", "persona_kind"]).size().unstack()
    assert len(counts) == 100
    assert set(counts["assistant"]) == {2}
    assert set(counts["other"]) == {4}
    assert not rows.duplicated(["query", "persona"]).any()


def test_all_personas_of_a_kind_answer_equally_often_and_over_all_kinds_of_query(rows: pd.DataFrame) -> None:
    for _, part in rows.groupby("persona_kind"):
        assert part["persona"].value_counts().nunique() == 1
        assert part.groupby(["persona", "query_kind"]).size().nunique() == 1


@pytest.mark.parametrize(("assistants", "others"), [(1, 1), (3, 7), (5, 20)])
def test_counts_that_do_not_divide_differ_by_one(personas: PersonaSet, assistants: int, others: int) -> None:
    for _, part in contrastive.pairing(personas, assistants, others, seed=2).groupby("persona_kind"):
        counts = part["persona"].value_counts()
        assert counts.max() - counts.min() <= 1


def test_no_two_personas_always_meet(rows: pd.DataFrame) -> None:
    meetings: Counter[tuple[str, ...]] = Counter()
    for _, part in rows.groupby("query"):
        meetings.update(combinations(sorted(part["persona"]), 2))
    replies = rows["persona"].value_counts()
    assert all(count < 0.75 * min(replies[one], replies[two]) for (one, two), count in meetings.items())


def test_the_pairing_depends_on_the_seed_and_not_on_chance(personas: PersonaSet, rows: pd.DataFrame) -> None:
    assert contrastive.pairing(personas, 2, 4, seed=11).equals(rows)
    assert not contrastive.pairing(personas, 2, 4, seed=12).equals(rows)


def test_a_fifth_of_each_kind_is_held_out(rows: pd.DataFrame) -> None:
    queries, others = held(rows)
    kinds = rows.drop_duplicates("query").set_index("query")["query_kind"]
    assert set(kinds[list(queries)].value_counts()) == {4}
    assert rows[rows["persona"].isin(others)].drop_duplicates("persona")["persona_kind"].value_counts().to_dict() == {"assistant": 1, "other": 4}


def test_something_is_always_held_out_and_never_everything() -> None:
    assert len(contrastive.held_out(["a", "b"], ["x", "x"], 0.01, 1)) == 1
    assert len(contrastive.held_out(["a", "b"], ["x", "x"], 0.99, 1)) == 1


def test_what_a_split_holds_out_never_occurs_in_training(rows: pd.DataFrame) -> None:
    queries, others = held(rows)
    for split, columns in {"query": ["query"], "persona": ["persona"], "both": ["query", "persona"]}.items():
        training, test = contrastive.split_rows(rows, split, queries, others)
        assert training.any() and test.any()
        assert not (training & test).any()
        for column in columns:
            assert not set(rows[column][training]) & set(rows[column][test])


# --- directions -------------------------------------------------------------------------------------------------------


def test_the_planted_direction_is_found_with_its_length_and_sign(rows: pd.DataFrame) -> None:
    activations, truth = planted(rows)
    found = contrastive.directions(activations, rows, np.ones(len(rows), bool))
    np.testing.assert_allclose(found.length, np.linalg.norm(truth, axis=1), rtol=1e-5)
    np.testing.assert_allclose(found.unit, truth / np.linalg.norm(truth, axis=1, keepdims=True), atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(found.unit, axis=1), 1, rtol=1e-6)
    # the others lie at zero and the assistants at the truth
    np.testing.assert_allclose(found.midpoint, found.length / 2, rtol=1e-4)


def test_queries_cancel_also_where_personas_are_left_out(rows: pd.DataFrame) -> None:
    activations, truth = planted(rows, of_query=50.0)
    training, _ = contrastive.split_rows(rows, "persona", *held(rows))
    assert rows[training].groupby("query").size().nunique() > 1, "some queries lost a persona"
    found = contrastive.directions(activations, rows, training)
    np.testing.assert_allclose(found.unit * found.length[:, None], truth, atol=1e-3)


def test_rows_outside_training_do_not_touch_the_direction(rows: pd.DataFrame) -> None:
    activations, _ = planted(rows, noise=1.0)
    training, test = contrastive.split_rows(rows, "query", *held(rows))
    before = contrastive.directions(activations, rows, training)
    activations[test] = 1e6
    after = contrastive.directions(activations, rows, training)
    assert (before.unit == after.unit).all() and (before.midpoint == after.midpoint).all()


def test_personas_that_never_meet_on_a_query_give_no_direction(rows: pd.DataFrame) -> None:
    activations, _ = planted(rows)
    with pytest.raises(PersonaSetError, match="no training query is answered by both kinds"):
        contrastive.directions(activations, rows, rows["persona_kind"].eq("other").to_numpy())
    with pytest.raises(PersonaSetError, match="the mean difference after block 0 is zero"):
        contrastive.directions(np.zeros_like(activations), rows, np.ones(len(rows), bool))


# --- measures ---------------------------------------------------------------------------------------------------------


def sample(rows_a_query: int = 6, queries: int = 20, seed: int = 5) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Projections (rows, layers) with ties among them, kinds and queries; a third of the rows are assistants."""
    random = np.random.default_rng(seed)
    of_query = np.repeat([f"q{number}" for number in range(queries)], rows_a_query)
    assistant = np.tile(np.arange(rows_a_query) < rows_a_query // 3, queries)
    shared = np.repeat(random.normal(size=(queries, LAYERS)), rows_a_query, axis=0)
    values = shared + random.normal(size=(len(assistant), LAYERS)) + assistant[:, None] * np.arange(1, LAYERS + 1) * 0.6 - 0.4
    return values.round(1), assistant, of_query


def by_hand(values: np.ndarray, assistant: np.ndarray, midpoint: float) -> dict[str, float]:
    high, low = values[assistant], values[~assistant]
    return {
        "cohens_d": (high.mean() - low.mean()) / np.sqrt((high.var() + low.var()) / 2),
        "accuracy_at_zero": float(np.r_[high > 0, low < 0].mean()),
        "accuracy_at_midpoint": float(np.r_[high > midpoint, low < midpoint].mean()),
        "auc": roc_auc_score(assistant, values),
    }


def test_measures_are_those_of_the_formulas_and_of_scikit_learn() -> None:
    values, assistant, queries = sample()
    midpoint = np.array([0.05, 0.31, 0.52])
    found = contrastive.quality(values, assistant, queries, midpoint, draws=100, seed=1).set_index("layer")
    for layer in range(LAYERS):
        for name, expected in by_hand(values[:, layer], assistant, midpoint[layer]).items():
            assert found.loc[layer, name] == pytest.approx(expected, abs=1e-12), name
    assert (found[["n", "n_assistant", "n_queries"]].to_numpy() == [120, 40, 20]).all()


def test_intervals_are_those_of_drawing_whole_queries_anew() -> None:
    values, assistant, queries = sample(queries=12)
    midpoint, draws = np.full(LAYERS, 0.3), 200
    found = contrastive.quality(values, assistant, queries, midpoint, draws=draws, seed=9).set_index("layer")
    names = sorted(set(queries))
    rows = {name: np.flatnonzero(queries == name) for name in names}
    drawn: list[dict[str, float]] = []
    for times in np.random.default_rng(9).multinomial(12, np.full(12, 1 / 12), size=draws):
        chosen = np.concatenate([np.tile(rows[name], count) for name, count in zip(names, times, strict=True)]).astype(int)
        drawn.append(by_hand(values[chosen, 1], assistant[chosen], 0.3))
    for name in contrastive.MEASURES:
        expected = np.percentile([one[name] for one in drawn], [2.5, 97.5])
        np.testing.assert_allclose(found.loc[1, [f"{name}_lower", f"{name}_upper"]].to_numpy(float), expected, atol=1e-9)


def test_copies_of_a_querys_rows_tell_nothing_new() -> None:
    """The unit is the query: three copies of every row leave estimates and intervals as they are."""
    values, assistant, queries = sample()
    midpoint = np.zeros(LAYERS)
    once = contrastive.quality(values, assistant, queries, midpoint, draws=100, seed=1)
    thrice = contrastive.quality(*(np.repeat(one, 3, axis=0) for one in (values, assistant, queries)), midpoint, draws=100, seed=1)
    measured = [f"{name}{bound}" for name in contrastive.MEASURES for bound in ("", "_lower", "_upper")]
    np.testing.assert_allclose(once[measured], thrice[measured], rtol=1e-9)


def test_the_other_sign_mirrors_every_measure() -> None:
    values, assistant, queries = sample()
    there = contrastive.quality(values, assistant, queries, np.zeros(LAYERS), draws=100, seed=1)
    back = contrastive.quality(-values, assistant, queries, np.zeros(LAYERS), draws=100, seed=1)
    np.testing.assert_allclose(back["cohens_d"], -there["cohens_d"], rtol=1e-9)
    np.testing.assert_allclose(back["auc"], 1 - there["auc"], rtol=1e-9)


def test_a_split_without_one_of_the_kinds_has_no_measures() -> None:
    values, assistant, queries = sample()
    found = contrastive.quality(values, np.zeros_like(assistant), queries, np.zeros(LAYERS), draws=100, seed=1)
    assert found[["cohens_d", "auc", "auc_lower", "auc_upper"]].isna().all().all()
    assert not found[["best_by_accuracy", "best_by_auc"]].any().any()
    assert (found["n"] == 120).all() and (found["n_assistant"] == 0).all()


def test_the_best_layer_has_the_highest_accuracy_and_then_the_highest_d() -> None:
    frame = pd.DataFrame(
        {"layer": [0, 1, 2, 3], "accuracy_at_zero": [0.9, 1.0, 1.0, 0.95], "cohens_d": [9.0, 2.0, 3.0, 8.0], "auc": [1, 1, 0.9, 0.9]}
    )
    assert contrastive.best_layer(frame) == 2
    assert contrastive.best_layer(frame, "auc") == 0


def test_quality_reports_every_split_with_its_own_activations_and_the_published_mismatch(rows: pd.DataFrame) -> None:
    activations, _ = planted(rows, noise=2.0, of_query=1.0)
    # the same axis elsewhere: only the mismatch tells the two apart
    both = {LAST_TOKEN: activations, RESPONSE_MEAN: activations + 7}
    found = contrastive.direction_quality(both, rows, *held(rows), draws=100, seed=1)
    kinds = found.groupby(["split", "extraction", "evaluated_with"]).size()
    assert set(kinds) == {LAYERS}
    assert {key[1:] for key in kinds.index} == {(LAST_TOKEN, LAST_TOKEN), (RESPONSE_MEAN, RESPONSE_MEAN), (RESPONSE_MEAN, LAST_TOKEN)}
    assert {key[0] for key in kinds.index} == set(SPLITS)
    cells = found.set_index(["split", "extraction", "evaluated_with", "layer"]).sort_index()
    mismatched, own = cells.loc["query", RESPONSE_MEAN, LAST_TOKEN], cells.loc["query", LAST_TOKEN, LAST_TOKEN]
    np.testing.assert_allclose(mismatched["auc"], own["auc"], atol=1e-3)
    np.testing.assert_allclose(mismatched["midpoint"], own["midpoint"], atol=1e-3)
    assert set(found[found["split"] == "query"]["n"]) == {120}
    assert (found[found["split"] == "both"]["n"] < 40).all()


def test_an_axis_that_is_not_there_is_not_found_on_held_out_rows(rows: pd.DataFrame) -> None:
    """Directions fit their training rows whatever these hold; held-out rows of pure noise are at chance."""
    random = np.random.default_rng(8)
    noise = {name: random.normal(size=(len(rows), 20, 64)).astype(np.float32) for name in EXTRACTIONS}
    found = contrastive.direction_quality(noise, rows, *held(rows), draws=100, seed=1)
    assert found[found["split"] != "both"].groupby(["split", "extraction", "evaluated_with"])["auc"].mean().between(0.42, 0.58).all()
    training, _ = contrastive.split_rows(rows, "query", *held(rows))
    fitted = contrastive.directions(noise[LAST_TOKEN], rows, training)
    projections = contrastive.project(noise[LAST_TOKEN][training], fitted.unit)
    assert roc_auc_score(rows["persona_kind"].eq("assistant")[training], projections[:, 0]) > 0.6


# --- activations ------------------------------------------------------------------------------------------------------


def test_activations_are_the_models_hidden_states(tiny: Any) -> None:
    import torch

    prompts, replies = [[5, 9, 23, 7], [40, 41], [8, 30, 12]], [[60, 61, 62], [70], []]
    found = contrastive.read_activations(tiny, prompts, replies, batch_size=2)
    for row, (prompt, reply) in enumerate(zip(prompts, replies, strict=True)):
        with torch.no_grad():
            states = tiny.model(torch.tensor([[*prompt, *reply]]), output_hidden_states=True).hidden_states
        # transformers norms the last entry, so it is no residual stream
        for layer in range(tiny.layers - 1):
            stream = states[layer + 1][0].numpy()
            np.testing.assert_allclose(found[LAST_TOKEN][row, layer], stream[len(prompt) - 1], atol=1e-4)
            mean = stream[len(prompt) :].mean(0) if reply else stream[len(prompt) - 1]
            np.testing.assert_allclose(found[RESPONSE_MEAN][row, layer], mean, atol=1e-4)


def test_activations_are_those_that_the_model_reads_for_texts(tiny_llama: Any) -> None:
    conversations = [[{"role": "system", "content": "Be brief."}, {"role": "user", "content": text}] for text in ("Why?", "How so, then?")]
    texts = ["Because.", "Like this."]
    prompts, replies = [tiny_llama.prompt_tokens(one) for one in conversations], [tiny_llama.reply_tokens(one, end=False) for one in texts]
    found = contrastive.read_activations(tiny_llama, prompts, replies, batch_size=1)
    layers = range(tiny_llama.layers)
    np.testing.assert_allclose(found[LAST_TOKEN], tiny_llama.activations(conversations, layers), atol=1e-5)
    np.testing.assert_allclose(found[RESPONSE_MEAN], tiny_llama.activations(conversations, layers, texts), atol=1e-5)


# --- geometry ---------------------------------------------------------------------------------------------------------


def test_personas_on_a_line_lie_on_one_component_along_the_axis(rows: pd.DataFrame) -> None:
    truth = np.random.default_rng(1).normal(size=(LAYERS, WIDTH))
    place = {name: float(number) for number, name in enumerate(rows["persona"].unique())}
    activations = np.stack([place[name] * truth for name in rows["persona"]]).astype(np.float32)
    units = truth / np.linalg.norm(truth, axis=1, keepdims=True)
    found = contrastive.persona_geometry(activations, rows, units)
    np.testing.assert_allclose(found[["pc1_share", "pc1_cosine"]], 1, rtol=1e-6)
    first = found[found["layer"] == 0].set_index("persona")
    np.testing.assert_allclose(first["projection"], first.index.map(place) * np.linalg.norm(truth[0]), rtol=1e-5)
    assert (first["pc1"].rank() == first["projection"].rank()).all(), "the component points the way of the axis"
    np.testing.assert_allclose(first["projection_se"], 0, atol=1e-6)
    assert first["n"].to_dict() == rows["persona"].value_counts().to_dict()


def test_a_personas_place_has_its_standard_error(rows: pd.DataFrame) -> None:
    activations, truth = planted(rows, noise=1.0)
    units = truth / np.linalg.norm(truth, axis=1, keepdims=True)
    found = contrastive.persona_geometry(activations, rows, units).set_index(["layer", "persona"])
    mine = activations[rows["persona"].eq("tutor").to_numpy(), 1] @ units[1]
    assert found.loc[(1, "tutor"), "projection"] == pytest.approx(mine.mean(), rel=1e-5)
    assert found.loc[(1, "tutor"), "projection_se"] == pytest.approx(sem(mine), rel=1e-4)


def test_components_are_those_of_scikit_learn(rows: pd.DataFrame) -> None:
    activations, truth = planted(rows, noise=1.0)
    units = truth / np.linalg.norm(truth, axis=1, keepdims=True)
    found = contrastive.persona_geometry(activations, rows, units)
    for layer in range(LAYERS):
        means = pd.DataFrame(activations[:, layer].astype(float)).groupby(rows["persona"].to_numpy(), sort=False).mean()
        pca = PCA(n_components=1).fit(means)
        mine = found[found["layer"] == layer].set_index("persona").loc[means.index]
        np.testing.assert_allclose(mine["pc1_share"], pca.explained_variance_ratio_[0], rtol=1e-6)
        np.testing.assert_allclose(mine["pc1_cosine"], abs(pca.components_[0] @ units[layer]), rtol=1e-6)
        np.testing.assert_allclose(abs(mine["pc1"]), abs(pca.transform(means)[:, 0]), atol=1e-6)


# --- published artifacts ----------------------------------------------------------------------------------------------

PUBLISHED = [  # spec/pipeline.md, 11.1
    ("qwen", LAST_TOKEN, 10, 11.031, 1.0),
    ("qwen", RESPONSE_MEAN, 28, 3.656, 0.975),
    ("llama", LAST_TOKEN, 13, 5.539, 0.975),
    ("llama", RESPONSE_MEAN, 12, 5.943, 1.0),
]
JUDGED = {
    "steering": {0: (3.6, 8.2), 5: (4.2, 7.8), 10: (4.4, 8.6), 20: (5.4, 8.4), 50: (9.2, 8.8), 100: (0, 0.2), 200: (0, 0)},
    "capping": {0: (3.8, 8.4), 1: (6.6, 8.0), 3: (6.8, 8.4), 5: (7.0, 9.0), 10: (9.4, 8.4), 20: (8.8, 7.2), 50: (0, 0)},
}


@needs_artifacts
@pytest.mark.parametrize(("model", "extraction", "layer", "d", "accuracy"), PUBLISHED)
def test_the_published_table_of_axes_is_reproduced(model: str, extraction: str, layer: int, d: float, accuracy: float) -> None:
    release = AxesRelease.from_environment()
    found = published_quality(model, extraction, release.evaluation(model, extraction), release.norms(model, extraction))
    assert len(found) == {"qwen": 36, "llama": 28}[model]
    (best,) = found[found["best"]].to_dict("records")
    assert best["layer"] == layer
    assert best["best_published"]
    assert round(best["cohens_d"], 3) == d
    assert best["accuracy"] == pytest.approx(accuracy)
    np.testing.assert_allclose(found["cohens_d"], found["cohens_d_published"], rtol=1e-9)
    if model == "qwen":
        assert found["norm"].between(0.996, 1.004).all()


@needs_artifacts
def test_the_layer_with_the_highest_d_is_another_than_the_published_best() -> None:
    """The published findings name layer 17 of llama's response_mean, which has the highest d and not the highest accuracy."""
    release = AxesRelease.from_environment()
    found = published_quality("llama", RESPONSE_MEAN, release.evaluation("llama", RESPONSE_MEAN), {})
    highest = found.loc[found["cohens_d"].idxmax()]
    assert (highest["layer"], round(highest["cohens_d"], 2), highest["accuracy"]) == (17, 6.58, 0.975)


@needs_artifacts
@pytest.mark.parametrize("intervention", JUDGED)
def test_the_published_judge_tables_are_reproduced(intervention: str) -> None:
    found = published_scores(AxesRelease.from_environment().judged_replies())
    mine = found[found["intervention"] == intervention].set_index("strength")
    assert {strength: (row["assistant"], row["coherence"]) for strength, row in mine.iterrows()} == {
        strength: pytest.approx(scores) for strength, scores in JUDGED[intervention].items()
    }
    assert (mine["n"] == 5).all()
    assert (mine["assistant_failed"] == 0).all()


def written(folder: Path, scores: list[tuple[int, int]]) -> AxesRelease:
    records = [
        {"intervention": "steering", "query": "q", "persona": "p", "scale": 5, "scores": {"assistant_score": one, "coherence_score": two}}
        for one, two in scores
    ]
    path = folder / "artifacts" / "evaluations" / "intervention_scores.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"model": "qwen", "experiments": records}))
    return AxesRelease(folder)


def test_a_failed_judgement_is_counted_apart_and_not_averaged(tmp_path: Path) -> None:
    (row,) = published_scores(written(tmp_path, [(4, 8), (-1, -1), (6, 6), (8, -1)]).judged_replies()).to_dict("records")
    assert (row["assistant"], row["coherence"]) == (6, 7)
    assert (row["assistant_failed"], row["coherence_failed"], row["n"]) == (1, 2, 4)
    assert row["assistant_se"] == pytest.approx(2 / 3**0.5)


def test_absent_artifacts_are_absent_and_broken_ones_are_named(tmp_path: Path) -> None:
    release = AxesRelease(tmp_path)
    for read in (release.judged_replies, lambda: release.norms("qwen", LAST_TOKEN), lambda: release.evaluation("qwen", LAST_TOKEN)):
        with pytest.raises(Absent, match=r"^absent: .*artifacts/"):
            read()
    with pytest.raises(Absent, match=r"absent: .* \(RELSEEK_RELEASE_AXES is not set\)"):
        AxesRelease(None).judged_replies()
    broken = written(tmp_path, [(1, 1)])
    path = tmp_path / "artifacts" / "evaluations" / "intervention_scores.json"
    path.write_text(path.read_text().replace("assistant_score", "score"))
    with pytest.raises(StorageError, match=r"intervention_scores.json: no judged replies as they were published \(KeyError\('assistant_score'\)\)"):
        broken.judged_replies()


class Ran:
    """An object whose unpickling runs code."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("ran"),))


def test_code_in_an_artifact_is_refused_and_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in (directions_file(MODELS[0], LAST_TOKEN), evaluation_file(MODELS[0], LAST_TOKEN)):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_bytes(pickle.dumps({"all_results": Ran()}, protocol=2))
    release = AxesRelease(tmp_path)
    with pytest.raises(StorageError, match="not a readable file of plain tensors"):
        release.norms(MODELS[0], LAST_TOKEN)
    with pytest.raises(StorageError, match="no evaluation of directions as it was published"):
        release.evaluation(MODELS[0], LAST_TOKEN)
    assert not (tmp_path / "ran").exists()
