"""A finished tiny study given language judges, and what its loopback server says was asked of it."""

from __future__ import annotations

import json
from typing import Any

import pandas as pd

from relseek_assets.judging.requests import REQUESTS
from relseek_resources.storage import read_table
from tests.judging.batch_server import BatchServer

KEY_VARIABLE = "TINY_JUDGE_KEY"
JUDGE = """
[[judges]]
name = "{name}"
kind = "{kind}"
model = "gpt-4o-2024-08-06"
base_url = {url}
key_variable = "{key}"
budget_usd = {budget}
"""
#: What ends at the selection: agreement and the report have tests of their own.
SELECT = ("--select", "selection")


def with_judge(platform: Any, url: str, *, name: str = "gpt", kind: str = "openai_batch", budget: float = 5.0, more: str = "") -> Any:
    """The study file with one more judge."""
    judge = JUDGE.format(name=name, kind=kind, url=json.dumps(url), key=KEY_VARIABLE, budget=budget)
    platform.study_file.write_text(platform.study_file.read_text() + judge + more)
    return platform


def requests_of(platform: Any) -> pd.DataFrame:
    """Every request of the study."""
    files = [*(platform.files / "rating_requests").rglob("*.parquet"), *(platform.files / "pairwise_requests").rglob("*.parquet")]
    return pd.concat([read_table(path, REQUESTS) for path in files], ignore_index=True)


def table(platform: Any, asset: str) -> pd.DataFrame:
    return pd.concat([pd.read_parquet(path) for path in sorted((platform.files / asset).rglob("*.parquet"))], ignore_index=True)


def counts(platform: Any) -> dict[str, dict[str, int]]:
    """Asset -> status -> partitions, as `relseek status` tells it."""
    done = platform.command("status", "STUDY", "--format", "json")
    assert done.exit_code == 0, done.output
    found: dict[str, dict[str, int]] = {}
    for row in json.loads(done.stdout):
        of_asset = found.setdefault(row["asset"], {})
        of_asset[row["status"]] = of_asset.get(row["status"], 0) + 1
    return found


def run_until_collected(platform: Any, most: int = 8) -> list[str]:
    """`relseek run` again and again, as a user does who has no daemon; the server goes one status further at every look."""
    said = []
    for _ in range(most):
        done = platform.command("run", "STUDY", *SELECT)
        assert done.exit_code == 0, done.output
        said.append(done.output)
        if "wait for them" not in done.output:  # also where the last batch ended while the run went on
            assert counts(platform)["selection"] == {"fresh": 1}, done.output
            return said
    raise AssertionError(f"still in flight after {most} runs: {said[-1]}")


def complete_all(server: BatchServer) -> None:
    """Let every batch run to its end, without a look of ours."""
    for batch_id in list(server.batches):
        while server.batches[batch_id].shown["status"] != "completed":
            server.look(batch_id)
