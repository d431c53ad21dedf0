"""The graph of the quickstart as reviewers see it change, and the borders between the project's modules."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from relseek_assets import sources
from relseek_assets.definitions import build_definitions, build_stage
from relseek_assets.lineage import fan_ins_beyond
from relseek_assets.stage import Stage
from relseek_assets.study import Study, load_study

CHECKOUT = Path(__file__).parents[2]
SNAPSHOT = Path(__file__).parent / "snapshots" / "quickstart.json"
UPDATE = "RELSEEK_UPDATE_SNAPSHOTS"
KEY_CHARACTERS = re.compile(r"[A-Za-z0-9_:@|-]+")
DOORS = ("assets.py", "checks.py", "sensors.py")  # or names that end so, where a stage has several
#: Modules at the root of relseek_assets that assemble what the stages declare, and the resource that Dagster configures.
ASSEMBLY = {
    f"relseek_assets/{name}.py"
    for name in (
        "cli",
        "commands",
        "definitions",
        "difference",
        "event_log",
        "exchange",
        "imports",
        "lineage",
        "partitions",
        "planning",
        "sources",
        "stage",
    )
}
RESOURCES_THAT_KNOW_DAGSTER = {"relseek_resources/compute.py"}
#: What a stage may take from another besides its assets. The pairs are stage 1's product, and the keyed order in which stage 2
#: takes them is part of it; the door of exchange reads no stage. What a language judge is asked is one wording, whoever's replies it rates, and its
#: biases are one computation.
SHARED_BETWEEN_STAGES = {"dataset.pairs", "judging.requests", "judging.validity", "judging.in_flight", "judging.one_judge"}  # a judge has one budget

#: ARCHITECTURE.md, "Tables that others read": names and columns are a contract.
PROMISED = {
    "vector_summary": "site epoch norm cosine_to_last width source sha256",
    "generations": "site epoch multiplier item reply tokens seed",
    "judge_scores": "site epoch multiplier item rubric judge score status cost_usd attempt",
    "judge_pairs": "site epoch item multiplier_a multiplier_b first_shown judge winner status cost_usd",
    "dose_response": "site epoch multiplier rubric judge estimate lower upper n",
    "selection": "site epoch coherence_auc rating_slope pairwise_slope score rating_score pareto candidates reason",
}
KINDS = {"site": "string", "epoch": "integer", "multiplier": "number", "item": "string", "score": "number", "n": "integer", "estimate": "number"}
UNITS = {"cost_usd": "USD", "tokens": "tokens"}


@pytest.fixture(scope="module")
def stage() -> Stage:
    return build_stage(load_study("quickstart"))


def described(stage: Stage) -> dict[str, Any]:
    """Every asset of the study as plain values, without versions: what a change of the graph would change."""
    definitions = build_definitions(stage.study)
    graph = stage.graph
    assets = {}
    for key in sorted(graph.get_all_asset_keys()):
        node = graph.get(key)
        keys = node.partitions_def.get_partition_keys() if node.partitions_def else []
        mine = stage.catalogue.get(key.path[-1])
        assets[key.to_user_string()] = {
            "group": node.group_name,
            "external": node.is_external,
            "deps": sorted(parent.to_user_string() for parent in node.parent_keys),
            "partitions": len(keys),
            "first": str(keys[0]) if keys else None,
            "last": str(keys[-1]) if keys else None,
            "kinds": sorted(node.kinds),
            "owners": sorted(node.owners),
            "pool": mine.definition.op.pool if mine else None,
            "files": mine.form if mine else None,
        }
    checks = sorted(f"{check.asset_key.to_user_string()}: {check.name}" for check in definitions.resolve_asset_graph().asset_check_keys)
    return {"assets": assets, "checks": checks, "sensors": sorted(sensor.name for sensor in definitions.sensors or [])}


def test_the_graph_of_the_quickstart_is_the_one_that_was_reviewed(stage: Stage) -> None:
    found = json.dumps(described(stage), indent=1, sort_keys=True) + "\n"
    if os.environ.get(UPDATE):
        SNAPSHOT.parent.mkdir(exist_ok=True)
        SNAPSHOT.write_text(found, encoding="utf-8")
    told = f"if the change is meant, run `{UPDATE}=1 pytest tests/platform/test_graph.py` and commit {SNAPSHOT.relative_to(CHECKOUT)}"
    assert SNAPSHOT.is_file(), told
    assert json.loads(found) == json.loads(SNAPSHOT.read_text(encoding="utf-8")), f"the graph of quickstart has changed; {told}"


def test_no_partition_reads_so_many_of_one_asset_that_dagster_would_stop_looking(stage: Stage) -> None:
    with dg.DagsterInstance.ephemeral() as instance:
        assert list(fan_ins_beyond(stage.graph, instance, 99)) == []
        widest = {name.partition(" <- ")[0] for name, _, _ in fan_ins_beyond(stage.graph, instance, 5)}
    assert "quickstart/dose_response" in widest, "the walk sees the fan-ins that there are: seven doses and more"


def test_partition_keys_use_only_what_the_ui_can_select(stage: Stage) -> None:
    keys = {str(key) for name in stage.catalogue if (found := stage.graph.get(stage.key(name)).partitions_def) for key in found.get_partition_keys()}
    assert keys
    assert [key for key in keys if not KEY_CHARACTERS.fullmatch(key)] == []


def test_every_table_says_what_its_columns_mean_and_shows_it_in_the_ui(stage: Stage) -> None:
    tables = {name: asset for name, asset in stage.catalogue.items() if asset.schema}
    assert len(tables) > 15
    for name, asset in tables.items():
        assert asset.schema is not None
        assert asset.schema.key, f"{name} does not say which columns tell its rows apart"
        shown = stage.graph.get(stage.key(name)).metadata["dagster/column_schema"].columns
        assert [column.name for column in shown] == list(asset.schema.names)
        for column, text in zip(asset.schema.columns, shown, strict=True):
            assert len(column.meaning) > 3, f"{name}.{column.name} has no meaning"
            assert text.description.startswith(column.meaning)
            assert column.unit in text.description


def test_quantities_with_a_unit_declare_it(stage: Stage) -> None:
    for name, asset in stage.catalogue.items():
        for column in asset.schema.columns if asset.schema else ():
            if column.kind not in ("number", "integer"):
                continue
            if re.search(r"log_prob|propensity|margin|reward|loss", column.name):
                assert column.unit == "nats", f"{name}.{column.name}"
            if column.name in UNITS:
                assert column.unit == UNITS[column.name], f"{name}.{column.name}"


@pytest.mark.parametrize("name", PROMISED)
def test_tables_that_others_read_have_the_promised_columns(stage: Stage, name: str) -> None:
    schema = stage.catalogue[name].schema
    assert schema is not None
    columns = {column.name: column.kind for column in schema.columns}
    assert set(PROMISED[name].split()) <= columns.keys()
    for column, kind in KINDS.items():
        assert columns.get(column, kind) == kind, f"{name}.{column}"


# --- borders between modules ------------------------------------------------------------------------------------------


def modules() -> list[Path]:
    return sorted(path for package in ("relseek_assets", "relseek_resources") for path in (CHECKOUT / package).rglob("*.py"))


def imported(path: Path) -> Iterator[str]:
    """Dotted names that a module imports anywhere in it; `from a import b` counts as a.b."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def knows_dagster(path: Path) -> bool:
    name = str(path.relative_to(CHECKOUT))
    return path.name.endswith(DOORS) or name in ASSEMBLY or name in RESOURCES_THAT_KNOW_DAGSTER


def test_dagster_is_imported_at_the_doors_and_where_studies_are_assembled_only() -> None:
    # a script that is launched reports through dagster_pipes, which is no Dagster
    guilty = [
        str(path.relative_to(CHECKOUT))
        for path in modules()
        if not knows_dagster(path) and any(re.match(r"dagster(\W|$|_(?!pipes))", name) for name in imported(path))
    ]
    assert guilty == []


# Two modules are imported inside vLLM alone, and import what comes with it.
IMPORTED_ONE_BY_ONE = """
import importlib, sys
for name in sys.argv[1:]:
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as lacking:
        if lacking.name not in ("vllm", "fastapi", "triton"):
            raise
    "dagster" in sys.modules and sys.exit(name)
"""


def test_no_plain_module_reaches_dagster_through_another() -> None:
    plain = [".".join(path.relative_to(CHECKOUT).with_suffix("").parts).removesuffix(".__init__") for path in modules() if not knows_dagster(path)]
    assert {"relseek_resources.models", "relseek_assets.vectors.bipo", "relseek_assets.study"} <= set(plain)
    done = subprocess.run([sys.executable, "-c", IMPORTED_ONE_BY_ONE, *plain], cwd=CHECKOUT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"importing {done.stderr.strip()} imports dagster"


def test_resources_know_nothing_of_the_assets_built_on_them() -> None:
    resources = [path for path in modules() if path.is_relative_to(CHECKOUT / "relseek_resources")]
    assert resources
    assert [path for path in resources if any(name.startswith("relseek_assets") for name in imported(path))] == []


def test_stages_take_nothing_from_one_another_but_assets_and_the_pairs() -> None:
    root = CHECKOUT / "relseek_assets"
    stages = {folder.name for folder in root.iterdir() if (folder / "__init__.py").is_file()}
    taken = set()
    for path in modules():
        mine = path.relative_to(root).parts[0] if path.is_relative_to(root) else None
        if mine not in stages:
            continue
        for name in imported(path):
            parts = name.split(".")
            if parts[0] == "relseek_assets" and parts[1] in stages - {mine}:
                taken.add(".".join(parts[1:3]))
    assert taken <= SHARED_BETWEEN_STAGES


def source_versions(study: Study, name: str) -> dict[str | None, str]:
    return {partition: version for partition, (version, _) in sources.readers(study)[name]().items()}


@pytest.mark.parametrize("of", ["quickstart", "prompting", "persona_axes"])
def test_a_further_model_layer_or_evaluated_epoch_makes_nothing_of_the_others_stale(of: str) -> None:
    study = load_study(of)
    model = study.models[0]
    more, longer = ({}, {}) if study.contrastive else ({"layers": (*model.layers, 18), "epochs_evaluated": (1, 2)}, {"epochs_trained": 5})
    second = model.model_copy(update={"name": "second", "dtype": "bfloat16", **longer})
    wider = study.model_copy(update={"models": (model.model_copy(update=more), second)})

    def code(found: Study) -> dict[str, str]:
        return {name: asset.definition.code_versions_by_key[asset.definition.key] for name, asset in build_stage(found).catalogue.items()}

    before, after = code(study), code(wider)
    assert {name for name in before if before[name] != after[name]} == set()
    for name in ("base_models", *(["training_declarations"] if study.steered else [])):
        known, now = source_versions(study, name), source_versions(wider, name)
        assert known.items() <= now.items() and len(now) > len(known)


def test_a_model_loaded_otherwise_or_trained_for_longer_is_another_one() -> None:
    study = load_study("quickstart")
    model = study.models[0]
    sites = set(study.sites)
    for change, name in (({"dtype": "bfloat16"}, "base_models"), ({"epochs_trained": 3}, "training_declarations")):
        other = study.model_copy(update={"models": (model.model_copy(update=change),)})
        changed = {
            source
            for source in ("base_models", "training_declarations")
            if source_versions(other, source).items().isdisjoint(source_versions(study, source).items())
        }
        assert changed == {name} and set(source_versions(other, name)) == sites
