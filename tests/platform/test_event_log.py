"""The event log with open connections records what Dagster's own does, and leaves nothing open behind."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import dagster as dg
import pytest

from relseek_assets.event_log import kept_open

HOME = Path(__file__).parents[2] / "dagster_home"


@dg.asset(partitions_def=dg.StaticPartitionsDefinition(["a", "b"]))
def numbers() -> None:
    """An asset to materialise."""


@pytest.fixture
def instance(tmp_path: Path):
    shutil.copy(HOME / "dagster.yaml", tmp_path)
    with dg.DagsterInstance.from_config(str(tmp_path)) as found:
        yield found


def open_databases() -> int:
    """Descriptors of this process that lead to SQLite files."""
    links = [Path("/proc/self/fd", name) for name in os.listdir("/proc/self/fd")]
    return sum(".db" in os.readlink(link) for link in links if link.is_symlink())


def test_runs_inside_are_seen_outside_by_dagsters_own_connections(instance, tmp_path):
    with kept_open(instance):
        assert dg.materialize([numbers], instance=instance, partition_key="a").success
    assert dg.materialize([numbers], instance=instance, partition_key="b").success
    with dg.DagsterInstance.from_config(str(tmp_path)) as other:
        assert other.get_materialized_partitions(numbers.key) == {"a", "b"}
        assert len(other.get_runs()) == 2


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="counts this process's open files under /proc")
def test_open_files_do_not_grow_with_runs_and_none_is_left(instance):
    before = open_databases()
    with kept_open(instance):
        counts = []
        for _ in range(4):
            assert dg.materialize([numbers], instance=instance, partition_key="a").success
            counts.append(open_databases())
    assert counts[-1] == counts[1] > before
    assert open_databases() == before


def test_one_inside_another_and_an_error_inside_leave_the_storage_as_it_was(instance):
    storage = instance.event_log_storage
    before = dict(vars(getattr(storage, "_event_log_storage", storage)))
    with pytest.raises(RuntimeError, match="mine"), kept_open(instance):
        two_runs_and_an_error(instance)
    assert vars(getattr(storage, "_event_log_storage", storage)).keys() == before.keys()
    assert instance.get_materialized_partitions(numbers.key) == {"a", "b"}


def two_runs_and_an_error(instance: dg.DagsterInstance) -> None:
    with kept_open(instance):
        assert dg.materialize([numbers], instance=instance, partition_key="a").success
    assert dg.materialize([numbers], instance=instance, partition_key="b").success
    raise RuntimeError("mine")


def test_a_storage_in_memory_is_left_alone():
    with dg.DagsterInstance.ephemeral() as instance, kept_open(instance):
        assert dg.materialize([numbers], instance=instance, partition_key="a").success
        assert instance.get_materialized_partitions(numbers.key) == {"a"}
