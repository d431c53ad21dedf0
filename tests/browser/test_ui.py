"""What a researcher does in the Dagster UI, done with clicks: materialise, backfill a layer, look at a plot, see what an edit made stale."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import pyarrow.parquet as parquet
import pytest

from tests.browser.conftest import HEIGHT, WIDTH

if TYPE_CHECKING:
    from tests.browser.conftest import Ui

pytestmark = [pytest.mark.browser, pytest.mark.slow, pytest.mark.xdist_group("browser")]

SITE, OTHER_SITE = "m:L01", "m:L02"
STEPS = ("e02@-1_0", "e02@0_0", "e02@1_0", "e03@-1_0", "e03@0_0", "e03@1_0")
GROUPS = ("sources", "dataset", "vectors", "sweeps", "judging", "selection", "serving", "reports")
RUN_SECONDS = 180  # a run takes about 15 on an idle machine, a backfill about 30 because its daemon looks that often
ROWS, COLUMNS = 4, 5  # places of the window, a third of it apart, from which all of the lineage is seen
TICK_SECONDS = 120  # two ticks, 30 apart, and what a busy machine adds

RUNS = "{ runsOrError { ... on Runs { results { runId status assetSelection { path } } } } }"
BACKFILLS = "{ partitionBackfillsOrError { ... on PartitionBackfills { results { id status numPartitions runs { runId } } } } }"
STALENESS = """
query ($keys: [AssetKeyInput!]!) {
  assetNodes(assetKeys: $keys) { assetKey { path } staleStatus staleCauses { key { path } } }
}
"""
SENSOR = """
{
  sensorOrError(sensorSelector: {repositoryName: "__repository__", repositoryLocationName: "tiny", sensorName: "tiny_changed_sources"}) {
    ... on Sensor { sensorState { status ticks(limit: 20) { status skipReason } } }
  }
}
"""


def expect(locator: Any) -> Any:
    from playwright.sync_api import expect as expect_

    return expect_(locator)


def button(page: Any, text: str) -> Any:
    """A button by its text, whatever icon stands before it."""
    return page.get_by_role("button", name=re.compile(rf"(^|\s){re.escape(text)}$"))


def of_icon(page: Any, icon: str) -> Any:
    """The last button that shows nothing but an icon."""
    return page.locator(f'button:has([aria-label="{icon}"])').last


def choose_partition(page: Any, key: str) -> None:
    """Click a partition in the list of an asset's page, where each key stands twice: cut to fit, and hidden to measure it."""
    page.locator("span").filter(has_text=re.compile(rf"^{re.escape(key)}$")).first.click()


def records(ui: Ui, asset: str) -> list[Any]:
    """Every materialisation of an asset in the instance."""
    import dagster as dg

    with dg.DagsterInstance.from_config(str(ui.platform.home)) as instance:
        return list(instance.fetch_materializations(dg.AssetKey(["tiny", asset]), limit=1000).records)


def stale(ui: Ui, *assets: str) -> dict[str, tuple[str, list[str]]]:
    """Asset -> its staleness as the UI is told it, and the root causes."""
    nodes = ui.ask(STALENESS, keys=[{"path": ["tiny", asset]} for asset in assets])["assetNodes"]
    return {node["assetKey"]["path"][1]: (node["staleStatus"], [cause["key"]["path"][1] for cause in node["staleCauses"] or []]) for node in nodes}


def test_an_asset_is_materialised_from_its_page(page: Any, ui: Ui) -> None:
    page.goto("/assets/tiny/vector_summary?view=overview")
    expect(page.get_by_text("Never materialized")).to_be_visible()
    button(page, "Materialize").click()
    expect(page.get_by_text("Launched run")).to_be_visible()

    def ended() -> list[str]:
        runs = ui.ask(RUNS)["runsOrError"]["results"]
        mine = [run["status"] for run in runs if {"path": ["tiny", "vector_summary"]} in (run["assetSelection"] or [])]
        return mine if mine and mine[0] in ("SUCCESS", "FAILURE", "CANCELED") else []

    assert ui.wait_for("the run to end", ended, RUN_SECONDS) == ["SUCCESS"], ui.text()[-4000:]
    expect(page.get_by_text("Never materialized")).to_be_hidden()
    summary = pd.read_parquet(ui.platform.files / "vector_summary" / "all.parquet")
    assert set(zip(summary["site"], summary["epoch"], strict=True)) == {(site, epoch) for site in (SITE, OTHER_SITE) for epoch in (1, 2, 3)}
    assert (summary["norm"] > 0).all()


def test_a_backfill_of_one_layer_makes_its_partitions_and_no_others(page: Any, ui: Ui, screenshots: Path) -> None:
    from relseek_resources.storage import table_version

    page.goto("/assets/tiny/generations?view=partitions")
    expect(page.get_by_text("Missing (12)")).to_be_visible()
    button(page, "Materialize…").click()
    page.get_by_text("Select a partition or create one").first.click()  # of the site, which comes first
    page.get_by_role("menuitem").filter(has_text=SITE).click()
    page.keyboard.press("Escape")
    page.get_by_role("button", name="All", exact=True).last.click()  # steps
    expect(page.get_by_text("6 partitions selected")).to_be_visible()
    expect(page.get_by_text("Backfills all partitions in a single run.")).to_be_visible()
    page.screenshot(path=screenshots / "backfill_dialog.png")
    page.get_by_role("button", name="Launch backfill").click()

    def ended() -> Any:
        found = ui.ask(BACKFILLS)["partitionBackfillsOrError"]["results"]
        return found[0] if found and found[0]["status"].startswith(("COMPLETED", "FAILED", "CANCELED")) else None

    backfill = ui.wait_for("the backfill to end", ended, RUN_SECONDS)
    assert (backfill["status"], backfill["numPartitions"], len(backfill["runs"])) == ("COMPLETED_SUCCESS", 6, 1), ui.text()[-4000:]

    made = {str(record.partition_key): record.event_log_entry for record in records(ui, "generations")}
    assert sorted(made) == [f"{SITE}|{step}" for step in STEPS]
    assert len(records(ui, "generations")) == 6, "Dagster added a materialisation of its own, with one version for all partitions"
    vectors = {str(record.partition_key): record.asset_materialization.tags["dagster/data_version"] for record in records(ui, "steering_vectors")}
    for key, event in made.items():
        tags = event.asset_materialization.tags
        site, step = key.split("|")
        content = parquet.read_table(ui.platform.files / "generations" / site / f"{step}.parquet")
        assert tags["dagster/data_version"] == table_version(content)
        assert tags["dagster/input_data_version/tiny/steering_vectors"] == vectors[f"{site}|{step.partition('@')[0]}"]
        assert event.run_id == backfill["runs"][0]["runId"]
    assert len({event.asset_materialization.tags["dagster/data_version"] for event in made.values()}) == 6

    page.goto(f"/runs/b/{backfill['id']}")
    expect(page.get_by_text("100% completed")).to_be_visible()
    page.screenshot(path=screenshots / "backfill.png")
    page.goto("/assets/tiny/generations?view=partitions")
    expect(page.get_by_text("Materialized (6)")).to_be_visible()
    expect(page.get_by_text("Missing (6)")).to_be_visible()
    choose_partition(page, SITE)
    choose_partition(page, STEPS[-1])
    expect(page.get_by_text("mean_log_prob", exact=True)).to_be_visible()
    page.screenshot(path=screenshots / "backfilled_partition.png")


def test_the_plot_is_in_the_assets_page(page: Any, ui: Ui, screenshots: Path) -> None:
    page.goto("/assets/tiny/training_run?view=partitions")
    expect(page.get_by_text("Materialized (2)")).to_be_visible()
    choose_partition(page, SITE)
    page.get_by_text("[Show Markdown]").click()
    picture = page.get_by_role("dialog").get_by_role("img", name="figure")
    expect(picture).to_be_visible()
    assert picture.evaluate("image => image.complete && image.naturalWidth") > 600
    page.screenshot(path=screenshots / "plot.png")


def test_a_group_shows_its_assets_with_description_kinds_and_owners(page: Any, ui: Ui, screenshots: Path) -> None:
    page.goto("/locations/__repository__@tiny/asset-groups/vectors")
    names = page.locator('[class*="AssetNode_assetName"]')
    expect(names).to_have_count(7)  # training, its metrics, vectors, two summaries and two of geometry
    page.get_by_text("training_run", exact=True).first.click()
    expect(page.get_by_text("BiPO training of one site").first).to_be_visible()
    expect(page.get_by_text("Backfills all partitions in a single run")).to_be_visible()
    page.screenshot(path=screenshots / "group.png")

    page.goto("/assets/tiny/training_run?view=overview")
    for text in ("BiPO training of one site", "Owners", "relseek", "Kinds", "PyTorch", "safetensors", "vectors"):
        expect(page.get_by_text(text).first).to_be_visible()


def test_checks_of_a_run_from_the_command_line_show_in_the_lineage(page: Any, ui: Ui) -> None:
    page.goto("/locations/__repository__@tiny/asset-groups/dataset")
    expect(page.get_by_text("2 / 2 Passed")).to_be_visible()


def test_the_lineage_shows_the_whole_study(page: Any, ui: Ui, screenshots: Path) -> None:
    from relseek_assets import sources
    from relseek_assets.definitions import catalogue
    from relseek_assets.study import load_study

    page.goto("/asset-groups~code_location%3Atiny/")
    for group in GROUPS:
        expect(page.get_by_text(group, exact=True).first).to_be_visible()
    whole_lineage(page)
    page.screenshot(path=screenshots / "lineage.png")
    names = names_across(page)
    study = load_study(str(ui.platform.study_file))
    assert len(names) == len(catalogue(study)) + len(sources.keys(study)), names
    assert {"preference_pairs", "training_run", "generations", "judge_scores", "dose_response", "report"} <= names


def names_across(page: Any) -> set[str]:
    """The names of all nodes of a graph in the middle of the window, which is moved across it: what it does not show is not in the page."""
    found: set[str] = set()
    page.mouse.move(WIDTH / 2, HEIGHT / 2)
    for place in range(ROWS * COLUMNS):
        row, column = divmod(place, COLUMNS)
        if not place:
            across, down = -(COLUMNS - 1) / 2, -(ROWS - 1) / 2
        else:
            across, down = (0, 1) if not column else (1 if row % 2 == 0 else -1, 0)
        page.mouse.wheel(across * WIDTH / 3, down * HEIGHT / 3)
        page.wait_for_timeout(700)
        found |= set(page.locator('[class*="AssetNode_assetName"]').all_inner_texts())
    return found


def whole_lineage(page: Any) -> None:
    """Every group open, from top to bottom, in the middle of a window without side panels, the mouse off it and statuses loaded."""
    page.get_by_role("button", name="Hide navigation").click()
    page.keyboard.press("Alt+KeyE")
    of_icon(page, "panel_show_right").click()
    of_icon(page, "settings").click()
    page.get_by_text("Change graph to vertical orientation").click()
    page.keyboard.press("Escape")
    page.mouse.move(WIDTH / 2, HEIGHT / 2)
    for _ in range(10):  # nodes outside the window are not in the page, so their place is known only once they are near
        page.wait_for_timeout(700)
        left, top, right, bottom = page.locator('[class*="AssetNode_assetName"]').evaluate_all(
            """nodes => { const boxes = nodes.map(node => node.getBoundingClientRect());
            return [Math.min(...boxes.map(b => b.left)), Math.min(...boxes.map(b => b.top)),
                    Math.max(...boxes.map(b => b.right)), Math.max(...boxes.map(b => b.bottom))]; }"""
        )
        across, down = (left + right) / 2 - WIDTH / 2, (top + bottom) / 2 - HEIGHT / 2
        if abs(across) < 8 and abs(down) < 8:
            break
        page.mouse.wheel(across, down)
    page.mouse.move(WIDTH / 2, 20)
    page.wait_for_timeout(3000)


def test_an_edited_file_shows_what_it_made_stale(page: Any, ui: Ui, screenshots: Path) -> None:
    """The sensor sees the edit; what reads the file is stale, what does not is not, and the pages say so."""
    readers, others = ("preference_pairs", "conversation_lengths"), ("training_run", "steering_vectors")
    page.goto("/locations/tiny/sensors/tiny_changed_sources")
    expect(page.get_by_text("Next tick")).to_be_visible()
    expect(page.locator('input[type="checkbox"]').first).to_be_checked()
    assert ui.ask(SENSOR)["sensorOrError"]["sensorState"]["status"] == "RUNNING"
    ui.wait_for("the sensor's first tick", lambda: ui.ask(SENSOR)["sensorOrError"]["sensorState"]["ticks"], TICK_SECONDS)
    assert {status for status, _ in stale(ui, *readers, *others).values()} == {"FRESH"}

    file = ui.platform.behaviour / "conversations.jsonl"
    first, *rest = file.read_text(encoding="utf-8").splitlines(keepends=True)
    conversation = json.loads(first)
    conversation["turns"][0]["target"] += " I mean it."
    file.write_text("".join([json.dumps(conversation, ensure_ascii=False) + "\n", *rest]), encoding="utf-8")

    def seen() -> bool:
        ticks = ui.ask(SENSOR)["sensorOrError"]["sensorState"]["ticks"]
        return any(tick["skipReason"] == "new versions of starter_conversations" for tick in ticks)

    ui.wait_for("a tick that reports the edit", seen, TICK_SECONDS)
    assert stale(ui, *readers, *others) == {
        **dict.fromkeys(readers, ("STALE", ["starter_conversations"])),
        **dict.fromkeys(others, ("FRESH", [])),
    }
    page.goto("/locations/__repository__@tiny/asset-groups/dataset")
    expect(page.get_by_text(re.compile("Unsynced"))).to_have_count(2)
    page.mouse.move(WIDTH / 2, 20)
    page.wait_for_timeout(1000)
    page.screenshot(path=screenshots / "unsynced.png")
    page.goto("/assets/tiny/preference_pairs?view=overview")
    expect(page.get_by_text("Unsynced").first).to_be_visible()
    page.goto("/assets/tiny/vector_summary?view=overview")
    expect(page.get_by_text("Norm and cosine of every vector of the study.")).to_be_visible()
    expect(page.get_by_text("Unsynced")).to_be_hidden()


def test_the_ui_starts_and_works_without_a_complaint(ui: Ui) -> None:
    """Code locations load, the daemon ticks and runs end without warnings, errors or tracebacks of ours in the log."""
    known = ("SupersessionWarning",)  # `dagster dev` recommends `dg dev`, which relseek does not need
    found = re.compile(r"WARNING|ERROR|Warning:|Traceback|Error:")
    complaints = [line for line in ui.text().splitlines() if found.search(line) and not any(word in line for word in known)]
    assert complaints == []
