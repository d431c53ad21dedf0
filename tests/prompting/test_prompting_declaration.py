"""The `[prompting]` section of a study file: what it accepts, and what it refuses with the key and the remedy."""

from __future__ import annotations

from pathlib import Path

import pytest

from relseek_assets.definitions import build_stage
from relseek_assets.study import STUDIES, Study, StudyError, load_study

SHIPPED = (STUDIES / "prompting.toml").read_text(encoding="utf-8")
ENDPOINT = """
[[prompting.authors]]
name = "far"
kind = "openai"
model = "m"
budget_usd = 1.0
"""


def study_of(folder: Path, *changes: tuple[str, str], added: str = "") -> Study:
    text = SHIPPED
    for old, new in changes:
        assert text.count(old) == 1, f"{old!r} is there {text.count(old)} times"
        text = text.replace(old, new)
    path = folder / "prompting.toml"
    path.write_text(text + added, encoding="utf-8")
    return load_study(str(path))


def test_the_shipped_study_attacks_the_ends_and_the_middle_by_every_author(tmp_path: Path) -> None:
    study = study_of(tmp_path, added=ENDPOINT)
    assert study.prompting is not None
    assert study.prompting.attacked_levels == (1, 4, 7)
    assert set(study.attacked_conversations) == {f"{author}@casual" for author in ("steered", "persona", "prompted", "far")}


def test_no_theme_named_is_every_theme_and_no_level_the_ends_and_the_middle(tmp_path: Path) -> None:
    study = study_of(tmp_path, ('themes = ["casual"] ', ""), ("attacked = [1, 4, 7]", ""))
    assert study.prompting is not None
    assert study.prompting.attacked_levels == (1, 4, 7)
    assert len(study.attacked_conversations) == 3 * 5


@pytest.mark.parametrize(
    ("old", "new", "fault"),
    [
        (
            "doses = [-1.5, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5]   #",
            "doses = [-1.0, 0.0, 1.0]  #",
            "doses: 3 doses; levels come in sevens or nines",
        ),
        ("doses = [-1.5, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5]   #", "doses = [1.5, 1.0, 0.5, 0.0, -0.5, -1.0, -1.5]  #", "give them in ascending order"),
        ("doses = [-1.5, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5]   #", "doses = [-3, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5]  #", "[-3.0] are not generated"),
        ('site = "smollm2-135m:L12"', 'site = "smollm2-135m:L13"', "prompting.site: 'smollm2-135m:L13' is no site of this study"),
        (':L12"\nepoch = 2', ':L12"\nepoch = 1', "prompting.epoch: 1 is not evaluated"),
        ("attacked = [1, 4, 7]", "attacked = [8]", "attacked: [8] are no levels"),
        ('themes = ["casual"]', 'themes = ["casul"]', "prompting.themes: 'casul' is no theme of persona_attacks.toml"),
        ('name = "prompted"', 'name = "steered"', "not `steered` or `persona`"),
        ('kind = "model"', 'kind = "openai"', "model: missing; an author behind an endpoint needs it"),
        ('kind = "model"', 'kind = "model"\nbudget_usd = 3.0', "budget_usd is not read by an author of the kind 'model'"),
        ('kind = "model"', 'kind = "published"', "published ones are compared with published scores"),
        ("examples = 1", "exmples = 1", "did you mean 'examples'?"),
        ('kind = "model"', 'kind = "model"\nfamily = "llama"', "family is not read by an author of the kind 'model'"),
        ("examples = 1", 'steered_endpoint = { base_url = "http://here/v1" }', "prompting.steered_endpoint.model: missing"),
        ("examples = 1", 'steered_endpoint = { base_url = "", model = "m" }', "prompting.steered_endpoint.base_url"),
        (
            "examples = 1",
            'steered_endpoint = { base_url = "http://here/v1", model = "m", price = { prompt = 1, completion = 1 } }',
            "prompting.steered_endpoint: budget_usd: missing; a server with a price needs it",
        ),
        (
            "examples = 1",
            'steered_endpoint = { base_url = "http://here/v1", model = "m", budget_usd = 1 }',
            "prompting.steered_endpoint: budget_usd is not read of a server without a price",
        ),
    ],
)
def test_a_faulty_section_is_refused_with_its_key_and_the_remedy(tmp_path: Path, old: str, new: str, fault: str) -> None:
    with pytest.raises(StudyError) as raised:
        study_of(tmp_path, (old, new))
    assert fault in str(raised.value)


def test_authors_published_and_made_here_do_not_mix(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match="declare them in a study of their own"):
        study_of(tmp_path, added='\n[[prompting.authors]]\nname = "gpt"\nkind = "published"\n')


def test_only_a_study_that_trains_or_takes_vectors_has_the_section(tmp_path: Path) -> None:
    path = tmp_path / "persona_axes.toml"
    section = SHIPPED[SHIPPED.index("[prompting]") :]
    path.write_text((STUDIES / "persona_axes.toml").read_text(encoding="utf-8") + section, encoding="utf-8")
    with pytest.raises(StudyError, match="prompting: a study of the kind 'contrastive' does not read it"):
        load_study(str(path))


def test_every_asset_of_the_experiments_is_in_the_graph_of_both_kinds_of_study() -> None:
    names = {"prompted_generations", "level_scores", "level_pairs", "level_slopes", "level_models", "head_to_head", "level_biases"}
    names |= {"attack_conversations", "attack_scores", "attack_shifts"}
    made, published = build_stage(load_study("prompting")), build_stage(load_study("kirk2025"))
    assert names | {"prompting_estimates", "self_preference"} <= made.catalogue.keys()
    assert names <= published.catalogue.keys()
    assert not names & build_stage(load_study("quickstart")).catalogue.keys()
    for stage in (made, published):
        for name in names:
            assert stage.graph.get(stage.key(name)).group_name == "prompting"
            schema = stage.catalogue[name].schema
            assert schema is not None


def test_the_steered_model_and_authors_of_its_kind_share_a_family(tmp_path: Path) -> None:
    study = study_of(tmp_path, ("examples = 1", 'family = "small"'), added=ENDPOINT + 'family = "gpt"\n')
    assert study.prompting is not None
    assert study.prompting.families == {"steered": "small", "prompted": "small", "far": "gpt"}
    plain = study_of(tmp_path, added=ENDPOINT).prompting
    assert plain is not None and plain.families == {}


def test_where_a_server_steers_both_experiments_read_its_replies_and_not_the_sweep(tmp_path: Path) -> None:
    here = build_stage(study_of(tmp_path))
    there = build_stage(study_of(tmp_path, ("examples = 1", 'steered_endpoint = { base_url = "http://here/v1", model = "m" }')))
    assert there.catalogue.keys() - here.catalogue.keys() == {"steered_replies", "steered_level_scores"}
    for name in ("level_pairs", "level_slopes", "level_models", "self_preference"):
        parents = {stage: {key.path[-1] for key in stage.graph.get(stage.key(name)).parent_keys} for stage in (here, there)}
        assert "judge_scores" in parents[here] and "steered_level_scores" in parents[there]
        assert not parents[there] & {"generations", "judge_scores"}
    versions = [stage.graph.get(stage.key("attack_conversations")).code_version for stage in (here, there)]
    assert versions[0] != versions[1]
