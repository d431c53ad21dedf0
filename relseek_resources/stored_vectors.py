"""Where a study's vectors lie in the store: `STUDY/steering_vectors/SITE/eNN.safetensors`, those made of two vectors under `derived_vectors`, and
the directions of a contrastive study in `STUDY/directions/MODEL.safetensors`.

Here belong paths. What the files hold belongs in `vector_files.py`, which sites a study declares in `relseek_assets/study.py`.
"""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path

from relseek_resources.storage import StorageError

TRAINED, DERIVED, DIRECTIONS = "steering_vectors", "derived_vectors", "directions"
CHECKOUT = Path(__file__).parents[1]


def dagster_home() -> Path:
    """DAGSTER_HOME, or the `dagster_home` folder of the checkout that this package runs from.

    Raises:
        StorageError: a home without dagster.yaml.
    """
    home = Path(os.environ.get("DAGSTER_HOME") or CHECKOUT / "dagster_home")
    if not (home / "dagster.yaml").is_file():
        raise StorageError(
            f"{home}: no dagster.yaml there; set DAGSTER_HOME to a folder that holds one, as dagster_home/ of the repository, or RELSEEK_STORE to "
            "the store"
        )
    return home.resolve()


def store_folder() -> Path:
    """Where asset files go: RELSEEK_STORE, or `store` in the Dagster home."""
    configured = os.environ.get("RELSEEK_STORE")
    return Path(configured) if configured else dagster_home() / "store"


def study_folder(study: str | Path) -> Path:
    """A study's files: a name is looked up in the store, anything with a slash and every `Path` is the folder itself."""
    return Path(study) if isinstance(study, Path) or len(Path(study).parts) > 1 else store_folder() / study


def asset_of(site: str, derived: Collection[str]) -> str:
    """The asset that has the vectors of a site; `derived` are the study's sites whose vectors are made of two."""
    return DERIVED if site in derived else TRAINED


def derived_in(study: Path) -> set[str]:
    """The derived sites of which a study's folder has vectors, for readers who have the folder and not the study."""
    return {folder.name for folder in (study / DERIVED).glob("*") if folder.is_dir()}


def epochs_of(study: Path, site: str, derived: Collection[str]) -> dict[int, Path]:
    """The files of a site's stored vectors by epoch, the last one last; `study` is the study's folder."""
    files = (study / asset_of(site, derived) / site).glob("e[0-9]*.safetensors")
    return dict(sorted((int(file.stem[1:]), file) for file in files))
