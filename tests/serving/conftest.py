"""One vLLM server with the plugin for all tests that want one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.serving.served import Server, serving, written_vectors
from tests.serving.stored import fill


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Dagster home with the vectors of both of quickstart's sites and no selection."""
    monkeypatch.setenv("DAGSTER_HOME", str(tmp_path))
    monkeypatch.delenv("RELSEEK_STORE", raising=False)
    return fill(tmp_path)


@pytest.fixture(scope="session")
def vector_folder(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, dict[int, np.ndarray]]]:
    folder = tmp_path_factory.mktemp("vectors")
    return folder, written_vectors(folder)


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory, vector_folder: tuple[Path, Any]) -> Iterator[Server]:
    with serving(tmp_path_factory.mktemp("server"), vector_folder[0], "--enforce-eager") as found:
        yield found
