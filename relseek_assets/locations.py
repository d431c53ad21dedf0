"""Dagster's workspace file for a set of studies: one code location each.

Here belongs the file that `relseek ui` starts from. What a location holds belongs in `definitions.py`.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path

from relseek_assets.study import study_file
from relseek_resources import storage


def write_locations(home: Path, names: Sequence[str]) -> Path:
    """A workspace file for `dagster dev` with one code location a study; studies given by path get a module of their own."""
    folder = Path(tempfile.mkdtemp(prefix="relseek-locations-")) if not os.access(home, os.W_OK) else home / ".locations"
    folder.mkdir(exist_ok=True)
    entries = []
    for name in names:
        path = study_file(name)
        module = folder / f"{re.sub(r'[^A-Za-z0-9_]', '_', path.stem)}.py"
        storage.write_text(
            module,
            "from relseek_assets.definitions import build_definitions\n"
            "from relseek_assets.study import load_study\n\n"
            f"definitions = build_definitions(load_study({str(path)!r}))\n",
        )
        entries.append(
            f"  - python_file:\n      relative_path: {json.dumps(str(module))}\n      attribute: definitions\n      location_name: {path.stem}\n"
        )
    workspace = folder / "workspace.yaml"
    storage.write_text(workspace, "load_from:\n" + "".join(entries))
    return workspace
