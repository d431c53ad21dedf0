"""One vLLM server with the plugin for all tests that want one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.serving.served import Server, serving, written_vectors


@pytest.fixture(scope="session")
def vector_folder(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, dict[int, np.ndarray]]]:
    folder = tmp_path_factory.mktemp("vectors")
    return folder, written_vectors(folder)


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory, vector_folder: tuple[Path, Any]) -> Iterator[Server]:
    with serving(tmp_path_factory.mktemp("server"), vector_folder[0], "--enforce-eager") as found:
        yield found
