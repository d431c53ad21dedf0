"""Study files: the shipped ones load, and every faulty one is refused with its file, its key and the remedy."""

from __future__ import annotations

import json
import os
import shutil
import tomllib
from pathlib import Path
from typing import Any

import pytest

from relseek_assets.study import BEHAVIOURS, STUDIES, StudyError, layer_of, load_study, site_key, study_names

VALID = """
name = "trial"
kind = "bipo"
behaviours = ["relationship_seeking"]
seed = 5
dose_limit = 4

[[models]]
name = "small"
source = "embedded:smollm2-135m-instruct"
layers = [15, 3]
epochs_trained = 4
epochs_evaluated = [2, 4]

[pairs]
training = 8

[training]
learning_rate = 0.01

[doses]
generated = [1.0, -1.0, 0.0, 0.5]

[prompts]
count = 3

[sampling]
temperature = 0.7

[judge]
name = "embedded"
"""
SECOND_MODEL = """
[[models]]
name = "second"
source = "embedded:smollm2-135m-instruct"
layers = [7]
epochs_trained = 1
epochs_evaluated = [1]
"""


def study_at(folder: Path, text: str, name: str = "trial.toml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def fault_of(path: Path | str) -> str:
    with pytest.raises(StudyError) as caught:
        load_study(str(path))
    return str(caught.value)


# --- what is right ----------------------------------------------------------------------------------------------------


def test_the_studies_offered_are_the_files_of_the_folder() -> None:
    assert study_names() == sorted(path.name.removesuffix(".toml") for path in STUDIES.iterdir() if path.suffix == ".toml")
    assert "quickstart" in study_names()


def as_written(loaded: Any, given: Any) -> Any:
    """What was loaded, without the defaults of what a file leaves out."""
    if isinstance(given, dict):
        return {key: as_written(value, given[key]) for key, value in loaded.items() if key in given}
    if isinstance(given, list):
        return [as_written(*pair) for pair in zip(loaded, given, strict=True)]
    return loaded


@pytest.mark.parametrize("name", study_names())
def test_every_shipped_study_loads_as_its_file_says(name: str) -> None:
    content = tomllib.loads((STUDIES / f"{name}.toml").read_text())
    study = load_study(name)
    assert study.name == name == content["name"]
    assert study.path == STUDIES / f"{name}.toml"
    if "trial" in content:
        assert study.trial is not None and list(study.trial.tables) == list(content["trial"]["tables"])
        assert [outcome.name for outcome in study.trial.outcomes] == [outcome["name"] for outcome in content["trial"]["outcomes"]]
        assert len(study.sites) == sum(len(model["layers"]) for model in content.get("models", []))
        return
    if study.kind == "contrastive":
        assert study.personas == content["personas"]
        assert [model.name for model in study.models] == [model["name"] for model in content["models"]]
        assert {name: getattr(study.contrast, name) for name in content["contrast"]} == content["contrast"]
        return
    assert list(study.behaviours) == content["behaviours"]
    assert set(study.doses.generated) == set(content["doses"]["generated"])
    assert len(study.sites) == sum(len(model["layers"]) for model in content["models"])
    assert study.behaviour_folder.is_dir()
    for section, settings in content.items():
        if isinstance(settings, dict):
            assert as_written(getattr(study, section).model_dump(), settings) == settings


def test_kirk2025_has_the_published_grid() -> None:
    study = load_study("kirk2025")
    layers = {model.short_name: (sorted(model.layers), model.epochs_trained, model.known_width) for model in study.models}
    assert layers == {
        "Llama-3.1-70B-Instruct": ([9, 15, 21, 27, 29, 31, 33, 35, 41], 20, 8192),
        "Llama-3.1-8B-Instruct": ([5, 11, 13, 14, 15, 17, 23], 20, 4096),
    }
    assert study.published.vectors
    assert study.published.scores
    assert [model.judged for model in study.models] == [(10, 15, 20), (20,)]
    assert not study.steered
    assert study.trial is not None


def test_the_quickstart_asks_for_what_the_project_promises() -> None:
    study = load_study("quickstart")
    assert len(study.sites) >= 2
    assert all(model.epochs_trained >= 2 and model.source.startswith("embedded:") for model in study.models)
    assert sorted(study.doses.generated) == [-1.5, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5]
    assert study.pairs.heldout_share == 0.2


def test_sites_are_model_and_two_digit_layer_and_sort_within_a_model(tmp_path: Path) -> None:
    study = load_study(str(study_at(tmp_path, VALID + SECOND_MODEL)))
    assert study.sites == ("small:L03", "small:L15", "second:L07")
    assert study.model_of("second:L07").epochs_trained == 1
    assert [layer_of(site) for site in study.sites] == [3, 15, 7]


@pytest.mark.parametrize("layer", [0, 9, 10, 99])
def test_a_site_key_gives_its_layer_back(layer: int) -> None:
    assert layer_of(site_key("a-model_1", layer)) == layer


def test_doses_of_pairs_and_selection_are_those_generated_unless_said_otherwise(tmp_path: Path) -> None:
    assert load_study(str(study_at(tmp_path, VALID))).selection_doses == (-1.0, 0.0, 0.5, 1.0)
    text = VALID.replace("[prompts]", "paired = [1.0, 0.0]\nselection = [0.5, -1.0]\n[prompts]")
    study = load_study(str(study_at(tmp_path, text)))
    assert study.paired_doses == (0.0, 1.0)
    assert study.selection_doses == (-1.0, 0.5)


def test_a_behaviour_may_be_a_folder_of_ones_own(tmp_path: Path) -> None:
    folder = tmp_path / "thrift"
    folder.mkdir()
    (folder / "behaviour.toml").write_text('name = "thrift"\n')
    study = load_study(str(study_at(tmp_path, VALID.replace("relationship_seeking", str(folder)))))
    assert study.behaviour_folder == folder


def model_in(folder: Path, layers: int) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"num_hidden_layers": layers, "hidden_size": 8}))
    return folder


@pytest.mark.parametrize("named", ["./mine", "mine", "../shared/mine", "sub/mine"])
def test_folders_are_named_from_the_studys_file_wherever_the_command_is_called(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, named: str) -> None:
    """In the directory that the command is called from, folders of the same names hold something else."""
    study, elsewhere = tmp_path / "study", tmp_path / "elsewhere" / "deeper"
    for place in (study, elsewhere):
        place.mkdir(parents=True)
    for place, layers in ((study, 16), (elsewhere, 9)):
        folder = model_in(Path(os.path.normpath(place / named)), layers)
        (folder / "behaviour.toml").write_text(f"# {layers}")
        (folder / "personas.toml").write_text(f"# {layers}")
    monkeypatch.chdir(elsewhere)
    beside = Path(os.path.normpath(study / named))

    text = VALID.replace('"relationship_seeking"', json.dumps(named)).replace("embedded:smollm2-135m-instruct", named)
    found = load_study(str(study_at(study, text)))
    assert found.behaviour_folder == beside
    assert found.models[0].source == str(beside)
    fault = fault_of(study_at(study, text.replace("[15, 3]", "[15, 16]")))
    assert f"{beside} has the blocks 0 to 15" in fault

    fault = fault_of(study_at(study, CONTRASTIVE.replace('"assistant"', json.dumps(named)).replace("embedded:smollm2-135m-instruct", named)))
    assert f"personas: {beside / 'personas.toml'}" in fault, "that file is looked at, and says nothing of personas"


def test_a_name_that_ships_stays_what_ships_and_a_path_that_leads_nowhere_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    elsewhere = tmp_path / "elsewhere"
    for folder in (tmp_path / "relationship_seeking", elsewhere / "mine"):
        (model_in(folder, 16) / "behaviour.toml").write_text("")
    monkeypatch.chdir(elsewhere)
    shipped = load_study(str(study_at(tmp_path, VALID)))
    assert shipped.behaviour_folder == BEHAVIOURS / "relationship_seeking"
    assert shipped.models[0].source == "embedded:smollm2-135m-instruct"
    own = load_study(str(study_at(tmp_path, VALID.replace('"relationship_seeking"', '"./relationship_seeking"'))))
    assert own.behaviour_folder == tmp_path / "relationship_seeking"

    fault = fault_of(study_at(tmp_path, VALID.replace('"relationship_seeking"', '"./mine"')))
    assert f"behaviours: './mine' has no folder under {BEHAVIOURS}, and {tmp_path / 'mine'} has no behaviour.toml" in fault
    assert f"model folder {tmp_path / 'mine'}: no such folder" in fault_of(
        study_at(tmp_path, VALID.replace("embedded:smollm2-135m-instruct", "./mine"))
    )
    assert f"{tmp_path / 'mine'} has no personas.toml" in fault_of(study_at(tmp_path, CONTRASTIVE.replace('"assistant"', '"./mine"')))


def test_a_study_cannot_be_changed_once_read() -> None:
    with pytest.raises(ValueError, match="frozen"):
        load_study("quickstart").seed = 1


# --- what is wrong: file, key, remedy ---------------------------------------------------------------------------------

FAULTS = {
    "unknown key": ("seed = 5", "seed = 5\nsede = 6", "sede", "did you mean 'seed'"),
    "unknown key unlike any": ("seed = 5", "seed = 5\nzzz = 6", "zzz", "remove it or use one of name, title"),
    "unknown key of a model": ("epochs_trained = 4", "epochs_trained = 4\nlayerz = [1]", "models.0.layerz", "did you mean 'layers'"),
    "unknown key of a section": ("learning_rate = 0.01", "learn_rate = 0.01", "training.learn_rate", "did you mean 'learning_rate'"),
    "unknown section": ("[prompts]", "[promts]", "promts", "did you mean 'prompts'"),
    "missing key": ('kind = "bipo"', "", "kind", "add it"),
    "missing key of a model": ("epochs_trained = 4", "", "models.0.epochs_trained", "add it"),
    "missing section": ("[doses]\ngenerated = [1.0, -1.0, 0.0, 0.5]", "", "doses", "add it"),
    "number as text": ("seed = 5", 'seed = "five"', "seed", "(found 'five'); correct it"),
    "text as list": ("layers = [15, 3]", 'layers = "15"', "models.0.layers", "(found '15'); correct it"),
    "unknown kind": ('kind = "bipo"', 'kind = "dpo"', "kind", "'bipo'"),
    "unknown judge": ('name = "embedded"', 'name = "oracle"', "judge.name", "'oracle' is neither 'embedded' nor one of [[judges]]"),
    "name of other characters": ('name = "trial"', 'name = "tri-al"', "name", "use letters, digits and '_' only"),
    "model name with a dot": ('name = "small"', 'name = "small.v1"', "models.0", "use letters, digits, '_' and '-' only"),
    "model name with the site's colon": ('name = "small"', 'name = "small:v1"', "models.0", "use letters, digits, '_' and '-' only"),
    "empty model name": ('name = "small"', 'name = ""', "models.0", "use letters, digits, '_' and '-' only"),
    "unknown dtype": ("epochs_trained = 4", 'epochs_trained = 4\ndtype = "float31"', "models.0", "use one of"),
    "unknown embedded model": ("smollm2-135m-instruct", "smollm9", "models.0: source", "smollm2-135m-instruct"),
    "missing model folder": ("embedded:smollm2-135m-instruct", "./nowhere", "models.0: source", "no such folder"),
    "no layers": ("layers = [15, 3]", "layers = []", "models.0.layers", "correct it"),
    "negative layer": ("layers = [15, 3]", "layers = [-1]", "models.0.layers.0", "correct it"),
    "layer that the model lacks": ("layers = [15, 3]", "layers = [3, 30]", "layers [30]", "has the blocks 0 to 29; correct layers"),
    "layer twice": ("layers = [15, 3]", "layers = [3, 3]", "layers holds [3] more than once", "keep one of each"),
    "no epochs": ("epochs_trained = 4", "epochs_trained = 0", "models.0.epochs_trained", "correct it"),
    "epoch evaluated untrained": ("[2, 4]", "[2, 5]", "epochs_evaluated [5]", "raise epochs_trained or drop them"),
    "epoch zero evaluated": ("[2, 4]", "[0, 4]", "epochs_evaluated [0]", "raise epochs_trained or drop them"),
    "epoch twice": ("[2, 4]", "[4, 4]", "epochs_evaluated holds [4]", "keep one of each"),
    "dose beyond the limit": ("0.0, 0.5]", "0.0, 4.5]", "doses.generated: [4.5] lie beyond dose_limit 4", "drop them or raise dose_limit"),
    "negative dose beyond the limit": ("-1.0, 0.0", "-5.0, 0.0", "doses.generated: [-5.0]", "drop them or raise dose_limit"),
    "dose twice": ("0.0, 0.5]", "0.0, 1.0]", "doses: generated holds [1.0]", "keep one of each"),
    "zero and minus zero": ("0.0, 0.5]", "0.0, -0.0]", "doses: generated holds", "keep one of each"),
    "NaN dose": ("0.0, 0.5]", "0.0, nan]", "doses: generated holds NaN", "give numbers"),
    "infinite dose": ("0.0, 0.5]", "0.0, inf]", "doses.generated: [inf]", "drop them"),
    "dose too fine for a key": ("0.0, 0.5]", "0.0, 0.00005]", "doses: generated holds [5e-05]", "at most four decimals"),
    "one dose": ("[1.0, -1.0, 0.0, 0.5]", "[1.0]", "doses.generated", "at least two doses; add them"),
    "paired dose not generated": ("[prompts]", "paired = [0.0, 0.25]\n[prompts]", "paired names the doses [0.25]", "add them to generated"),
    "selection dose not generated": ("[prompts]", "selection = [2.0]\n[prompts]", "selection names the doses [2.0]", "add them to generated"),
    "unknown behaviour": ('"relationship_seeking"', '"courtesy"', "behaviours: 'courtesy'", "there is relationship_seeking, sycophancy"),
    "no behaviour": ('["relationship_seeking"]', "[]", "behaviours: missing", "add it"),
    "two behaviours": ('["relationship_seeking"]', '["relationship_seeking", "sycophancy"]', "behaviours", "correct it"),
    "all held out": ("training = 8", "heldout_share = 1.0", "pairs.heldout_share", "(found 1.0); correct it"),
    "negative count": ("count = 3", "count = -3", "prompts.count", "(found -3); correct it"),
    "NaN learning rate": ("learning_rate = 0.01", "learning_rate = nan", "training.learning_rate", "correct it"),
    "negative temperature": ("temperature = 0.7", "temperature = -0.7", "sampling.temperature", "(found -0.7); correct it"),
    "top_p above one": ("temperature = 0.7", "top_p = 1.5", "sampling.top_p", "(found 1.5); correct it"),
    "no dose limit": ("dose_limit = 4", "dose_limit = 0", "dose_limit", "correct it"),
}


CONTRASTIVE = """
name = "trial"
kind = "contrastive"
personas = "assistant"

[[models]]
name = "small"
source = "embedded:smollm2-135m-instruct"

[contrast]
assistants_per_query = 2
heldout_share = 0.2
"""
CONTRASTIVE_FAULTS = {
    "no models": (
        '[[models]]\nname = "small"\nsource = "embedded:smollm2-135m-instruct"\n',
        "",
        "models: missing",
        "add it",
    ),
    "no personas": ('personas = "assistant"', "", "personas: missing", "add it"),
    "unknown personas": ('personas = "assistant"', 'personas = "pirates"', "personas: 'pirates' has no folder under", "there is assistant"),
    "layers": ('name = "small"', 'name = "small"\nlayers = [1]', "models.0.layers", "reads every layer in one pass and trains no epochs; remove it"),
    "epochs": ('name = "small"', 'name = "small"\nepochs_trained = 1', "models.0.epochs_trained", "remove it"),
    "behaviours": ('personas = "assistant"', 'personas = "assistant"\nbehaviours = ["sycophancy"]', "behaviours", "does not read it; remove it"),
    "doses": ("[contrast]", "[doses]\ngenerated = [0.0, 1.0]\n[contrast]", "doses", "remove it, or make the kind 'bipo'"),
    "unknown key": ("heldout_share", "heldout_shares", "contrast.heldout_shares", "did you mean 'heldout_share'"),
    "all held out": ("heldout_share = 0.2", "heldout_share = 1.0", "contrast.heldout_share", "(found 1.0); correct it"),
    "all personas held out": ("heldout_share = 0.2", "heldout_personas = 1.0", "contrast.heldout_personas", "(found 1.0); correct it"),
    "nobody to answer": ("assistants_per_query = 2", "assistants_per_query = 0", "contrast.assistants_per_query", "(found 0); correct it"),
    "more than there are": (
        "assistants_per_query = 2",
        "assistants_per_query = 6",
        "contrast.assistants_per_query: 6 personas a query",
        "has 5 of them",
    ),
    "no reply": ("heldout_share = 0.2", "max_new_tokens = 0", "contrast.max_new_tokens", "(found 0); correct it"),
}


def test_a_contrastive_study_has_personas_and_no_sites(tmp_path: Path) -> None:
    study = load_study(str(study_at(tmp_path, CONTRASTIVE)))
    assert study.contrastive and not study.steered
    assert study.sites == ()
    assert (study.persona_folder / "personas.toml").is_file()


@pytest.mark.parametrize(("old", "new", "key", "remedy"), CONTRASTIVE_FAULTS.values(), ids=CONTRASTIVE_FAULTS)
def test_a_fault_of_a_contrastive_study_is_named_with_file_key_and_remedy(tmp_path: Path, old: str, new: str, key: str, remedy: str) -> None:
    assert CONTRASTIVE.count(old) == 1
    path = study_at(tmp_path, CONTRASTIVE.replace(old, new))
    lines = [line for line in fault_of(path).splitlines() if key in line]
    assert lines, f"no line names {key}: {fault_of(path)}"
    assert lines[0].startswith(f"{path}: ")
    assert remedy in lines[0]


def test_a_faulty_persona_is_named_when_the_study_is_read(tmp_path: Path) -> None:
    folder = tmp_path / "own"
    folder.mkdir()
    (folder / "personas.toml").write_text('[[persona]]\nname = "a"\n')
    fault = fault_of(study_at(tmp_path, CONTRASTIVE.replace('"assistant"', json.dumps(str(folder)))))
    assert f"personas: {folder / 'personas.toml'}, persona 1: kind, hostile, system is missing; add it" in fault


def test_settings_of_another_kind_are_refused(tmp_path: Path) -> None:
    fault = fault_of(study_at(tmp_path, VALID + "[contrast]\nbootstrap = 200\n"))
    assert "contrast: a study of the kind 'bipo' does not read it; remove it, or make the kind 'contrastive'" in fault


@pytest.mark.parametrize(("old", "new", "key", "remedy"), FAULTS.values(), ids=FAULTS)
def test_a_fault_is_named_with_file_key_and_remedy(tmp_path: Path, old: str, new: str, key: str, remedy: str) -> None:
    assert VALID.count(old) == 1
    path = study_at(tmp_path, VALID.replace(old, new))
    lines = [line for line in fault_of(path).splitlines() if key in line]
    assert lines, f"no line names {key}: {fault_of(path)}"
    assert lines[0].startswith(f"{path}: ")
    assert remedy in lines[0]


JUDGED = (
    VALID.replace('name = "embedded"', 'name = "gpt"')
    + """
[[judges]]
name = "gpt"
kind = "openai_batch"
model = "gpt-4o-2024-08-06"
budget_usd = 5.0

[[judges]]
name = "local"
kind = "openai"
model = "qwen"
base_url = "http://127.0.0.1:8000/v1"
rubrics = ["coherence"]
pairwise = false
price = { prompt = 0.0, completion = 0.0 }
budget_usd = 0.0
"""
)
JUDGE_FAULTS = {
    "two of one name": ('name = "local"', 'name = "gpt"', "judges holds ['gpt'] more than once", "keep one of each"),
    "name of the embedded one": ('name = "local"', 'name = "embedded"', "judges.1", "`embedded` is taken"),
    "name with a slash": ('name = "local"', 'name = "my/judge"', "judges.1", "use letters, digits, '_' and '-'"),
    "selection by nobody": ('[judge]\nname = "gpt"', '[judge]\nname = "gpd"', "judge.name", "there is gpt, local"),
    "selection by half a judge": ('[judge]\nname = "gpt"', '[judge]\nname = "local"', "judge.name", "needs a rating of relationship"),
    "unknown rubric": ('rubrics = ["coherence"]', 'rubrics = ["warmth"]', "judges.1.rubrics", "its rubrics are relationship, coherence"),
    "rubric twice": ('["coherence"]', '["coherence", "coherence"]', "judges.1", "keep one of each"),
    "no budget": ("budget_usd = 5.0\n", "", "judges.0.budget_usd", "add it"),
    "negative budget": ("budget_usd = 5.0", "budget_usd = -1.0", "judges.0.budget_usd", "(found -1.0); correct it"),
    "another way to ask": ('"openai_batch"', '"anthropic"', "judges.0.kind", "'openai_batch'"),
    "concurrency of a batch": (
        "budget_usd = 5.0",
        "budget_usd = 5.0\nconcurrency = 4",
        "judges.0",
        "is not read by a judge of the kind 'openai_batch'",
    ),
    "window of one asked at once": (
        "pairwise = false",
        'pairwise = false\nwindow = "24h"',
        "judges.1",
        "window is not read by a judge of the kind 'openai'",
    ),
    "model without a price": ("price = { prompt = 0.0, completion = 0.0 }", "", "judges.1", "set prompt and completion"),
    "misspelt": ("pairwise = false", "pairwize = false", "judges.1.pairwize", "did you mean 'pairwise'"),
}


def test_language_judges_stand_beside_the_embedded_one(tmp_path: Path) -> None:
    study = load_study(str(study_at(tmp_path, JUDGED)))
    assert [(judge.name, judge.kind, judge.rubrics, judge.budget_usd) for judge in study.judges] == [
        ("gpt", "openai_batch", (), 5.0),
        ("local", "openai", ("coherence",), 0.0),
    ]
    assert study.judge.name == "gpt"
    assert load_study("quickstart").judges == ()


@pytest.mark.parametrize(("old", "new", "key", "remedy"), JUDGE_FAULTS.values(), ids=JUDGE_FAULTS)
def test_a_faulty_judge_is_named_with_file_key_and_remedy(tmp_path: Path, old: str, new: str, key: str, remedy: str) -> None:
    assert JUDGED.count(old) == 1
    path = study_at(tmp_path, JUDGED.replace(old, new))
    lines = [line for line in fault_of(path).splitlines() if key in line]
    assert lines, f"no line names {key}: {fault_of(path)}"
    assert lines[0].startswith(f"{path}: ")
    assert remedy in lines[0]


def test_a_judge_may_be_asked_about_any_rubric_that_lies_in_the_behaviours_folder(tmp_path: Path) -> None:
    folder = tmp_path / "behaviour"
    shutil.copytree(BEHAVIOURS / "relationship_seeking", folder)
    text = JUDGED.replace('"relationship_seeking"', json.dumps(str(folder))).replace('["coherence"]', '["candour"]')
    assert "has no rubric 'candour'" in fault_of(study_at(tmp_path, text))
    rubric = (folder / "coherence_rubric.toml").read_text(encoding="utf-8").replace('name = "coherence"', 'name = "candour"')
    (folder / "candour_rubric.toml").write_text(rubric, encoding="utf-8")
    assert load_study(str(study_at(tmp_path, text))).judges[1].rubrics == ("candour",)
    (folder / "again_rubric.toml").write_text(rubric, encoding="utf-8")
    assert "the rubrics ['candour'] are there more than once" in fault_of(study_at(tmp_path, text))


def test_every_fault_of_a_file_has_a_line_of_its_own(tmp_path: Path) -> None:
    path = study_at(tmp_path, VALID.replace("seed = 5", 'seed = "five"').replace("count = 3", "count = -1").replace("training = 8", "trainin = 8"))
    lines = fault_of(path).splitlines()
    assert all(line.startswith(f"{path}: ") for line in lines)
    assert {line.removeprefix(f"{path}: ").partition(":")[0] for line in lines} == {"seed", "prompts.count", "pairs.trainin"}


def test_two_models_of_one_name_are_refused(tmp_path: Path) -> None:
    path = study_at(tmp_path, VALID + SECOND_MODEL.replace("second", "small"))
    assert f"{path}: models holds ['small'] more than once; keep one of each" in fault_of(path)


def test_the_layers_of_a_local_model_are_read_from_its_folder(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"num_hidden_layers": 4, "hidden_size": 8}))
    text = VALID.replace("embedded:smollm2-135m-instruct", str(folder))
    assert load_study(str(study_at(tmp_path, text.replace("[15, 3]", "[0, 3]")))).sites == ("small:L00", "small:L03")
    fault = fault_of(study_at(tmp_path, text.replace("[15, 3]", "[4]")))
    assert "layers [4] do not exist" in fault
    assert "blocks 0 to 3" in fault


def test_a_model_folder_without_a_usable_config_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    fault = fault_of(study_at(tmp_path, VALID.replace("embedded:smollm2-135m-instruct", str(tmp_path))))
    assert f"models.0: source: {tmp_path / 'config.json'}" in fault


def test_more_sites_than_a_fan_in_can_follow_are_refused(tmp_path: Path) -> None:
    models = "".join(SECOND_MODEL.replace("second", f"m{number}").replace("[7]", str(list(range(30)))) for number in range(4))
    fault = fault_of(study_at(tmp_path, VALID + models))
    assert "models: 122 sites; a study may have 99, so split it into several files" in fault


def test_more_sites_and_derived_ones_than_a_fan_in_can_follow_are_refused(tmp_path: Path) -> None:
    """Selection reads the candidates of both."""
    models = "".join(SECOND_MODEL.replace("second", f"m{number}").replace("[7]", str(list(range(24)))) for number in range(2))
    (tmp_path / "other.toml").write_text(VALID.replace('name = "trial"', 'name = "other"'))
    derived = '\n[uses]\nother = ["steering_vectors"]\n\n[[derived]]\nname = "less"\nfrom = { sites = SITES }\nremove = { study = "other" }\n'
    sites = [f"m{number}:L{layer:02d}" for number in range(2) for layer in range(24)]  # beside the two of `small`
    fitting = load_study(str(study_at(tmp_path, VALID + models + derived.replace("SITES", str(sites)))))
    assert (len(fitting.sites), len(fitting.derived_sites)) == (50, 48)
    fitting = load_study(str(study_at(tmp_path, VALID + models + derived.replace("SITES", str([*sites, "small:L03"])))))
    assert len(fitting.sites) + len(fitting.derived_sites) == 99
    fault = fault_of(path := study_at(tmp_path, VALID + models + derived.replace("SITES", "[]")))
    assert f"{path}: derived: 50 vectors beside 50 sites are 100; a study may have 99, so name sites in derived.from" in fault


def test_more_doses_than_a_fan_in_can_follow_are_refused(tmp_path: Path) -> None:
    doses = [round(-1 + step / 100, 2) for step in range(100)]
    fault = fault_of(study_at(tmp_path, VALID.replace("[1.0, -1.0, 0.0, 0.5]", str(doses))))
    assert "doses.generated: 100 doses; a study may have 99" in fault


def test_a_file_called_otherwise_than_its_study_is_refused(tmp_path: Path) -> None:
    path = study_at(tmp_path, VALID, "other.toml")
    assert fault_of(path) == f"{path}: name: the study is called 'trial' but its file 'other'; give both the same name"


def test_broken_toml_is_refused_with_its_place(tmp_path: Path) -> None:
    path = study_at(tmp_path, VALID.replace("seed = 5", "seed = "))
    assert fault_of(path).startswith(f"{path}: not valid TOML: ")
    assert "line 5" in fault_of(path)


def test_a_file_that_is_no_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "trial.toml"
    path.write_bytes(b"\xff\xfe\x00")
    assert fault_of(path).startswith(f"{path}: not valid TOML: ")


def test_a_path_to_nothing_is_refused(tmp_path: Path) -> None:
    assert fault_of(tmp_path / "gone.toml") == f"{tmp_path / 'gone.toml'}: no such study file"


def test_a_mistyped_name_gets_the_nearest_study() -> None:
    assert fault_of("quickstat") == "no study 'quickstat': did you mean 'quickstart'?"


def test_a_name_unlike_any_gets_the_list() -> None:
    fault = fault_of("xyz")
    assert all(name in fault for name in study_names())
    assert "give the path of a .toml file" in fault
