"""`relseek vectors`: a study's vectors as files that other programs read, and theirs as a study's.

Here belong arguments and printing; the formats belong in `relseek_resources/vector_files.py`, and what a study records in `imports.py`.
"""

from __future__ import annotations

from pathlib import Path

import click

from relseek_assets.commands import Group, explained, workspace_of
from relseek_resources.vector_files import FORMS


@click.group(cls=Group)
def vectors() -> None:
    """Vectors: write a study's for llama.cpp, repeng or torch, bring in theirs, and look into a file.

    Three formats: safetensors, with its provenance in the header; gguf, llama.cpp's control vectors; pt, a plain torch tensor.
    """


@vectors.command(name="export")
@click.argument("study")
@click.argument("site")
@click.option("--epoch", "-e", required=True, type=int, help="The training epoch.")
@click.option("--format", "form", type=click.Choice(FORMS), default="safetensors", show_default=True)
@click.option("--output", "-o", required=True, type=click.Path(dir_okay=False, path_type=Path), help="The file to write.")
@explained
def export_vector(study: str, site: str, epoch: int, form: str, output: Path) -> None:
    """Write the vector of a SITE of STUDY, e.g. smollm2-135m:L12, as a file."""
    from relseek_assets.exchange import export_vector as write

    click.echo(write(workspace_of(study), site, epoch, form, output))


@vectors.command(name="import")
@click.argument("study")
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--site", required=True, help="Model and layer, e.g. smollm2-135m:L12.")
@click.option("--epoch", "-e", required=True, type=int, help="The epoch whose place it takes.")
@click.option("--note", default="", help="Where it comes from, for the record.")
@explained
def import_vector(study: str, file: Path, site: str, epoch: int, note: str) -> None:
    """Put a vector made elsewhere in the place of a site's epoch; no run overwrites it.

    FILE is a .safetensors, .pt or .gguf file with a float vector for the site's block, as wide as the model's residual stream.
    """
    from relseek_assets.imports import import_vector as bring

    click.echo(bring(workspace_of(study), file, site, epoch, note))


@vectors.command(name="show")
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@explained
def show_vectors(file: Path) -> None:
    """Say what a file of vectors holds: width, norm by block, provenance.

    FILE is a .safetensors, .pt or .gguf file of steering vectors; one that a study would refuse is refused here too.
    """
    from relseek_resources.vector_files import described, read_vectors

    click.echo(described(read_vectors(file)))
