"""The prompting experiments of a tiny study whose steered replies a server of `relseek serve` writes, and what judges of a family make of them."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from relseek_resources.judges import embedded
from relseek_resources.storage import write_tensors
from tests.judging.chat_server import serving
from tests.platform.conftest import CHECKOUT
from tests.platform.test_prompting_study import ATTACKED, DOSES, ITEMS, KEY, LEVELS, SECTIONS, Prompting, answers, swept

__all__ = ["swept"]  # a fixture of that module
ANALYSES = ("level_slopes", "head_to_head", "attack_shifts", "self_preference", "level_biases")
SERVER = '\n[prompting.steered_endpoint]\nbase_url = "{url}/v1"\nmodel = "{model}"\nkey_variable = "{key}"\n'


@contextlib.contextmanager
def served(study: Prompting, *options: str) -> Iterator[tuple[str, str]]:
    """`relseek serve` of the study's vector: its address and the name of its model."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url, command = f"http://127.0.0.1:{port}", [sys.executable, "-m", "relseek_assets.cli", "serve", *options, "--port", str(port)]
    with (study.folder / "server.log").open("w") as log:
        process = subprocess.Popen(command, env=study.environment(), cwd=CHECKOUT, stdout=log, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + 120
        while True:
            assert process.poll() is None and time.monotonic() < deadline, (study.folder / "server.log").read_text()
            with contextlib.suppress(OSError):
                with urllib.request.urlopen(f"{url}/v1/models", timeout=5) as answer:
                    yield url, json.loads(answer.read())["data"][0]["id"]
                    break
            time.sleep(0.2)
    finally:
        os.kill(process.pid, signal.SIGINT)
        process.wait(60)


def run(study: Prompting, *assets: str) -> subprocess.CompletedProcess[str]:
    return study.process("run", "STUDY", *(part for name in assets for part in ("--select", name)))


@pytest.mark.slow
def test_a_server_writes_the_steered_side_of_both_experiments_and_families_are_compared(swept: Prompting, tmp_path: Path) -> None:
    study = Prompting(swept.copy(tmp_path / "p").folder, swept.model)
    study.study_file.write_text(study.study_text())
    with serving(answers) as far, served(study, str(study.study_file), "--site", "m:L01", "--epoch", "2") as (url, model):
        families = SECTIONS.replace('model = "far-away"', 'model = "far-away"\nfamily = "far"')
        families = families.replace('model = "far-judge"', 'model = "far-judge"\nfamily = "far"')
        sections = families.format(doses=DOSES, url=json.dumps(far.url), key=KEY, budget=1.0)
        study.study_file.write_text(study.study_text() + sections + SERVER.format(url=url, model=model, key=KEY))
        done = run(study, *ANALYSES)
        assert done.returncode == 0, done.stdout + done.stderr
        replies = study.table("steered_replies")
        assert len(replies) == LEVELS * ITEMS and set(replies["status"]) == {"replied"} and set(replies["model"]) == {model}
        scores = study.table("steered_level_scores")
        assert {"asked", embedded.NAME} < set(scores["judge"]) and set(scores["author"]) == {"steered"}
        attacked = study.table("attack_conversations")
        steered = attacked[attacked["author"] == "steered"]
        assert len(steered) == ATTACKED and set(steered["model"]) == {model}
        assert "steered" in set(study.table("level_slopes")["author"])
    shares = study.table("self_preference").set_index("measure")
    assert set(shares["judge"]) == {"asked"} and set(shares["family"]) == {"far"}
    pairs = study.table("level_pairs")
    own = pairs[(pairs["judge"] == "asked") & (pairs["author"] == "remote") & pairs["winner"].notna()]
    assert shares.loc["own_share", "estimate"] == pytest.approx((own["winner"] == "author").mean())
    assert shares.loc["at_equal_quality", "status"] == "measured"
    assert shares.loc["beyond_other_judges", "status"] == "no judge of another family made the same comparisons"
    biases = study.table("level_biases").set_index(["judge", "measure"])
    assert biases.loc[("asked", "share_first"), "estimate"] == 1, "it always says A"
    again = run(study, *ANALYSES)
    assert again.returncode == 0, "nothing is stale, and the server is gone"


@pytest.mark.slow
def test_without_a_family_in_common_and_with_another_vector_on_the_server_the_study_says_so(swept: Prompting, tmp_path: Path) -> None:
    study = Prompting(swept.copy(tmp_path / "p").folder, swept.model)
    with serving(answers) as far:
        study.with_endpoint(far.url)
        done = run(study, "self_preference")
        assert done.returncode == 0, done.stdout + done.stderr
        assert study.table("self_preference").empty
        with study.workspace() as workspace:
            event = workspace.lineage().record(workspace.stage.key("self_preference"), None).event_log_entry.asset_materialization
        assert event.metadata["status"].value.startswith("no judge that compares shares a family with an author: name families in")
        write_tensors(study.folder / "other.safetensors", {"vector": np.ones(32, np.float32)}, {"layer": "1"})
        elsewhere = ("--model", str(study.model), "--vector", f"m:L01@e02={study.folder / 'other.safetensors'}")
        with served(study, *elsewhere) as (url, model):
            study.study_file.write_text(study.study_file.read_text() + SERVER.format(url=url, model=model, key=KEY))
            done = run(study, "steered_replies")
    assert done.returncode == 1
    said = done.stdout + done.stderr
    assert "[prompting.steered_endpoint]: what" in said and "is another vector: its sha256 is" in said
    assert not list(study.files.rglob("steered_replies/*.parquet"))
