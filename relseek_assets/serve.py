"""`relseek serve`: a study's vectors behind an OpenAI-compatible server, any dose per request.

Here belong which vectors are served, the folder that they are served from, and what is printed. The servers themselves are in
`relseek_resources.serving`.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import socket
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from relseek_assets.commands import explained
from relseek_assets.steer import Loaded, of_study
from relseek_assets.study import Study, StudyError, load_study, site_key
from relseek_resources.models.loading import DTYPES, EMBEDDED, ModelError, commit_of, converted
from relseek_resources.storage import file_sha256, read_table, write_bytes, write_text
from relseek_resources.stored_vectors import epochs_of

if TYPE_CHECKING:
    from relseek_resources.compute import ModelSettings
    from relseek_resources.serving.guard import Settings

DOSE_LIMIT = 20.0  # of vectors that no study declares a range for
HASHES = "SHA256SUMS"
EMBEDDED_ENGINE = "embedded"
ROWS = 32
# vLLM's options that relseek sets itself, and where it is told what to set: given again, they would win over what was checked and is printed.
SET_HERE = {
    "--host": "--host",
    "--port": "--port",
    "--api-key": "--key",
    "--additional-config": "--vector, and dose_limit in the study",
}


@dataclass(frozen=True)
class Vector:
    """A vector to serve: its name, the file that it is copied from, and the partition of the study's asset that it is, if it is one."""

    name: str
    source: Path
    sha256: str
    partition: str | None = None


@dataclass(frozen=True)
class Served:
    """A model and its vectors by name, in `folder`; the first is the default. `dose_limit` is the declared range of multipliers, `study` whose
    vectors they are, None where all of them are files from elsewhere."""

    model: ModelSettings
    name: str
    folder: Path
    vectors: tuple[Vector, ...]
    dose_limit: float
    study: Study | None = None

    def configuration(self) -> dict[str, Any]:
        """What `vectors.Configuration.from_json` reads, and vLLM under `relseek` in `--additional-config`."""
        files = {vector.name: f"{file_name(vector.name)}.safetensors" for vector in self.vectors}
        return {"folder": str(self.folder), "vectors": files, "default": {"vector": self.vectors[0].name}, "dose_limit": self.dose_limit}


# --- which vectors ------------------------------------------------------------------------------------------------------


def file_name(name: str) -> str:
    """A vector's name as a file's: a colon is none on every system."""
    return name.replace(":", "_")


def candidates(study: Study) -> dict[tuple[str, int], Path]:
    """The files of a study's stored vectors by site and epoch, in the order of its sites, derived ones behind them."""
    from relseek_resources.stored_vectors import store_folder

    folder, derived = store_folder() / study.name, study.derived_sites
    return {(site, epoch): file for site in (*study.sites, *derived) for epoch, file in epochs_of(folder, site, derived).items()}


def selected(study: Study) -> tuple[str, int] | None:
    """The site and epoch that the study selected, None where it has not."""
    from relseek_assets.selection.metrics import SELECTION
    from relseek_resources.stored_vectors import store_folder

    file = store_folder() / study.name / "selection" / "all.parquet"
    if not file.is_file():
        return None
    table = read_table(file, SELECTION)
    chosen = table[table["selected"]]
    return (str(chosen["site"].iloc[0]), int(chosen["epoch"].iloc[0])) if len(chosen) else None


def wanted_of(study: Study, site: str | None, epoch: int | None) -> tuple[str, int]:
    """Site and epoch of the stored vector that a study selected, or of the one named.

    Raises:
        StudyError: nothing is stored, or nothing is selected and none is named.
    """
    if not study.steered and not study.published.vectors:
        raise StudyError(f"study {study.name} is a trial and has no vectors; `relseek studies` says which have")
    there = candidates(study)
    if not there:
        raise StudyError(f"study {study.name} has no stored vectors; `relseek run {study.name}` makes them")
    return _wanted(study, there, site, epoch)


def of_a_study(study: Study, site: str | None, epoch: int | None, every: bool) -> list[Vector]:
    """The vector of `wanted_of` first; with `every`, all others of its model behind it.

    Raises:
        StudyError: as `wanted_of`.
    """
    wanted, there = wanted_of(study, site, epoch), candidates(study)
    first = (wanted, *(found for found in there if every and found != wanted and study.model_of(found[0]) == study.model_of(wanted[0])))
    return [_vector(study, at, number, there[at, number]) for at, number in first]


def _vector(study: Study, site: str, epoch: int, file: Path) -> Vector:
    """A stored vector; a derived one is no partition of the asset whose partitions `served_models` has."""
    partition = None if site in study.derived_sites else f"{site}|e{epoch:02d}"
    return Vector(f"{site}@e{epoch:02d}", file, file_sha256(file), partition)


def _wanted(study: Study, there: Mapping[tuple[str, int], Path], site: str | None, epoch: int | None) -> tuple[str, int]:
    chosen = selected(study)
    if chosen is not None and site is None and epoch is None and chosen in there:
        return chosen
    fitting = [found for found in there if site in (None, found[0]) and epoch in (None, found[1])]
    listed = ", ".join(f"{at} epoch {number}" for at, number in there)
    if not fitting:
        raise StudyError(f"study {study.name}: no vector of {site or 'any site'}, epoch {epoch or 'any'}, is stored; there is {listed}")
    if len(fitting) == 1 or site is not None:
        return fitting[-1]  # of a site's epochs, the last one
    if not sys.stdin.isatty():
        raise StudyError(
            f"study {study.name} has selected no vector that is stored; `relseek run {study.name} --select selection` selects one, or give --site "
            f"and --epoch: there is {listed}"
        )
    click.echo(f"{study.name} has selected no vector. Stored are:")
    for number, (at, step) in enumerate(fitting, 1):
        click.echo(f"  {number}  {at} epoch {step}")
    return fitting[click.prompt("Which one", type=click.IntRange(1, len(fitting)), default=1) - 1]


def directions(study: Study, site: str | None, extraction: str, folder: Path) -> tuple[ModelSettings, list[Vector]]:
    """A contrastive study's direction at a site, by default at the block where it tells best apart, written into `folder`."""
    from relseek_resources.vector_files import write_vectors

    chosen = of_study(study, site, None, None, extraction)
    model = next(model for model in study.models if model == chosen.model)
    name = f"{site_key(model.name, chosen.read_at)}@{extraction}"
    file = folder / f"{file_name(name)}.safetensors"
    write_vectors(file, "safetensors", {chosen.read_at: chosen.vectors[chosen.read_at]}, {"study": study.name, "extraction": extraction})
    return model, [Vector(name, file, file_sha256(file), model.name)]


def of_files(given: Sequence[str]) -> list[Vector]:
    """Vectors given as NAME=FILE.

    Raises:
        StudyError: another form, a file that is not there or no safetensors file, no name that a server takes, a name given twice.
    """
    from relseek_resources.serving.vectors import NAME

    found: list[Vector] = []
    for one in given:
        name, equals, path = one.partition("=")
        file = Path(path)
        if not equals or not name:
            raise StudyError(f"--vector {one}: give NAME=FILE")
        if not file.is_file() or file.suffix != ".safetensors":
            raise StudyError(f"--vector {one}: {file} is no .safetensors file; `relseek vectors import` brings other formats into a study")
        if not NAME.fullmatch(name):
            raise StudyError(f"--vector {one}: a name has 1 to 100 letters, digits and _ . : @ + -, the first a letter or digit")
        if name in {vector.name for vector in found}:
            raise StudyError(f"--vector {one}: the name {name} is given twice")
        found.append(Vector(name, file, file_sha256(file)))
    return found


def export(served: Served) -> None:
    """Copy the vectors into the folder that they are served from, byte by byte, with their hashes beside them.

    Raises:
        StudyError: two names that are one file's.
    """
    names: dict[str, str] = {}
    for vector in served.vectors:
        other = names.setdefault(file_name(vector.name).casefold(), vector.name)  # some systems take a and A for one file
        if other != vector.name:
            raise StudyError(f"--vector {vector.name}: its file would be that of {other}; give another name")
    for vector in served.vectors:
        target = served.folder / f"{file_name(vector.name)}.safetensors"
        if vector.source != target:
            write_bytes(target, vector.source.read_bytes())
    hashes = "".join(f"{vector.sha256}  {file_name(vector.name)}.safetensors\n" for vector in served.vectors)
    write_text(served.folder / HASHES, hashes)


# --- what is printed ----------------------------------------------------------------------------------------------------


def address(settings: Settings) -> str:
    """Where this machine reaches the server."""
    host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(settings.host, settings.host)
    return f"http://{f'[{host}]' if ':' in host.strip('[]') and not host.startswith('[') else host}:{settings.port}"


def described(served: Served, settings: Settings, engine: str, *, page: bool = True) -> str:
    """What is served and how to call it; `page` says whether the chat page is there."""
    url = address(settings)
    first, key = served.vectors[0].name, "KEY" if settings.keys else "none"
    header = " -H 'authorization: Bearer KEY'" if settings.keys else ""
    lines = [f"serving {served.name} ({served.model.source}, {engine} engine) on {url}, doses from -{served.dose_limit:g} to {served.dose_limit:g}"]
    lines += [
        f"  {vector.name}{' (custom.steer_multiplier doses this one)' if vector.name == first else ''}\n    sha256 {vector.sha256}"
        for vector in served.vectors
    ]
    steering = json.dumps([{"vector": first, "multiplier": 1.0}])
    body = {"model": served.name, "messages": [{"role": "user", "content": "Hello"}], "custom": {"steer_multiplier": 1.0}}
    return "\n".join(
        [
            *lines,
            "",
            "curl",
            f"  curl {url}/v1/chat/completions -H 'content-type: application/json'{header} -d '{json.dumps(body)}'",
            "Python",
            "  import json, openai",
            f'  client = openai.OpenAI(base_url="{url}/v1", api_key="{key}")',
            f"  steering = json.dumps({steering})",
            f'  client.chat.completions.create(model="{served.name}", messages=[{{"role": "user", "content": "Hello"}}],',
            '                                 extra_body={"vllm_xargs": {"relseek": steering}})',
            "Inspect",
            f"  RELSEEK_BASE_URL={url}/v1 RELSEEK_API_KEY={key} inspect eval TASK --model openai-api/relseek/{served.name}",
            '  and in the task GenerateConfig(extra_body={"custom": {"steer_multiplier": 1.0}})',
            "",
            f"is it steering?  curl {url}/v1/relseek/health{header}",
            *([f"chat page        {url}/"] if page else []),
            "Ctrl-C ends it.",
        ]
    )


# --- the servers --------------------------------------------------------------------------------------------------------


def serve_embedded(served: Served, settings: Settings, rows: int, length: int, trial: tuple[Path, Path] | None) -> None:
    """Load the model and serve until interrupted. `trial`: an arms file and the log of its conversations."""
    from relseek_resources import models
    from relseek_resources.serving import chat
    from relseek_resources.serving.engine import Engine
    from relseek_resources.serving.server import create_app, run
    from relseek_resources.serving.trial_arms import read_allocation, room
    from relseek_resources.serving.trial_chat import engine_routes
    from relseek_resources.serving.vectors import Configuration

    model = models.load(served.model.source, dtype=served.model.dtype, device=served.model.device, progress=click.echo)
    engine = Engine(model, Configuration.from_json(served.configuration()), name=served.name, rows=rows, length=length)
    try:
        routes = engine_routes(engine, settings, *trial) if trial else chat.routes()  # participants find no page whose sliders tell of doses
        app = create_app(engine, settings, routes)
        click.echo(described(served, settings, EMBEDDED_ENGINE, page=trial is None))
        if trial:
            click.echo(room(read_allocation(trial[0]).conduct, engine.length))
        witnessed(served, settings, EMBEDDED_ENGINE)
        run(app, settings)
    finally:
        engine.close()


def witnessed(served: Served, settings: Settings, engine: str) -> None:
    """Have the deployment recorded as `served_models` of its study, from the server's first answer to its end."""
    from relseek_assets.serving import witness
    from relseek_assets.serving.deployments import Deployment, ServedVector, new_name

    if served.study is None:
        return
    vectors = tuple(ServedVector(vector.name, vector.sha256, vector.partition) for vector in served.vectors)
    where, machine = address(settings), socket.gethostname()
    draft = Deployment(new_name(), served.study.name, engine, served.name, served.model.source, where, machine, vectors)
    files = {vector.name: vector.source for vector in served.vectors if vector.partition}
    witness.start(draft, served.study.path, files, settings.keys[0] if settings.keys else None)


def vllm_command(served: Served, settings: Settings, length: int, more: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """The command that starts vLLM's own server with the plugin, and what it needs in its environment."""
    source = str(converted(served.model.source)) if served.model.source.startswith(EMBEDDED) else served.model.source
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", source, "--served-model-name", served.name]
    command += ["--dtype", served.model.dtype, "--max-model-len", str(length), "--host", settings.host, "--port", str(settings.port)]
    bounds = {"rate": settings.rate, "body": settings.body, "patience": settings.patience}
    command += ["--additional-config", json.dumps({"relseek": {**served.configuration(), **bounds}})]
    environment = {"VLLM_PLUGINS": "relseek", "VLLM_USE_V2_MODEL_RUNNER": "0"}
    if settings.keys:
        [environment["VLLM_API_KEY"]] = settings.keys  # on the command line every user of the machine could read it
    if commit := commit_of(served.model.source):
        command += ["--revision", commit]
    if served.model.device == "cpu":
        command.append("--enforce-eager")
        environment["VLLM_CPU_KVCACHE_SPACE"] = os.environ.get("VLLM_CPU_KVCACHE_SPACE", "1")
    return [*command, *more], environment


def check_vllms_own(more: Sequence[str]) -> None:
    """Refuse options of vLLM's that are relseek's to set, however vLLM lets them be written: =, underscores, a beginning, a part of their JSON.

    Raises:
        click.UsageError: it names relseek's own.
    """
    for one in more:
        name = re.split("[=.]", one, maxsplit=1)[0].replace("_", "-")
        for option, ours in SET_HERE.items():
            if len(name) > len("--") and option.startswith(name):
                raise click.UsageError(f"{name}: vLLM's {option} is set by relseek; give {ours} before --")


def serve_vllm(served: Served, settings: Settings, length: int, more: Sequence[str]) -> None:
    """Become vLLM's server.

    Raises:
        ModelError: vLLM is not installed.
    """
    if importlib.util.find_spec("vllm") is None:
        raise ModelError(
            "vLLM is not installed: `make serve-env` adds it on a machine without a GPU, `pip install '.[serve-gpu]'` on one with; "
            "or serve with --engine embedded"
        )
    command, environment = vllm_command(served, settings, length, more)
    click.echo(described(served, settings, "vllm"))
    witnessed(served, settings, "vllm")
    sys.stdout.flush()
    os.execve(command[0], command, {**os.environ, **environment})


# --- the command --------------------------------------------------------------------------------------------------------


def gathered(
    study: str | None, source: Loaded | None, site: str | None, epoch: int | None, every: bool, extraction: str, given: Sequence[str]
) -> Served:
    """What the command's arguments ask to serve, its vectors copied into the served folder.

    Raises:
        StudyError: nothing to serve, or not clear what; see `of_a_study` and `of_files`.
    """
    from relseek_resources.stored_vectors import dagster_home

    files = of_files(given)
    if study is None:
        if source is None or not files:
            raise StudyError("name a STUDY, or give --model SOURCE with --vector NAME=FILE")
        model: ModelSettings = source
        name = source.source.removeprefix(EMBEDDED).rstrip("/").rpartition("/")[2]
        served = Served(model, name, dagster_home() / "served" / name, tuple(files), DOSE_LIMIT)
    else:
        found = load_study(study)
        folder = dagster_home() / "served" / found.name
        if found.contrastive:
            model, own = directions(found, site, extraction, folder)
        else:
            own = of_a_study(found, site, epoch, every)
            model = found.model_of(own[0].name.rpartition("@")[0])
        taken = {vector.name for vector in own} & {vector.name for vector in files}
        if taken:
            raise StudyError(f"--vector {taken.pop()}: the study has a vector of that name; give another")
        served = Served(model, getattr(model, "name", found.name), folder, (*own, *files), found.dose_limit, found)
    export(served)
    return served


@click.command()
@click.argument("study", required=False)
@click.option("--engine", type=click.Choice(["embedded", "vllm"]), default="embedded", show_default=True)
@click.option("--site", help="Model and block, e.g. smollm2-135m:L12. Default: what STUDY selected.")
@click.option("--epoch", type=int, help="Default: what STUDY selected, or the site's last one.")
@click.option("--all", "every", is_flag=True, help="Every stored vector of that model besides.")
@click.option("--extraction", default="response_mean", show_default=True, help="Which of a contrastive STUDY's directions.")
@click.option("--model", "source", metavar="SOURCE", help="Instead of STUDY: embedded:NAME, a local folder or a hub name.")
@click.option("--dtype", type=click.Choice(DTYPES), default="float32", show_default=True, help="With --model.")
@click.option("--device", default="auto", show_default=True, help="With --model: cpu, cuda, cuda:1, ...")
@click.option("--vector", "given", multiple=True, metavar="NAME=FILE", help="A .safetensors file to offer besides; may be repeated.")
@click.option("--host", default="127.0.0.1", show_default=True, help="Elsewhere than on this machine a key is needed.")
@click.option("--port", type=click.IntRange(1, 65535), default=8000, show_default=True)
@click.option("--key", "keys", multiple=True, envvar="RELSEEK_KEYS", help="Clients must send one of these; may be repeated. Default: RELSEEK_KEYS.")
@click.option("--rate", type=click.IntRange(min=0), default=600, show_default=True, help="Requests a minute for each key; 0 for no limit.")
@click.option("--rows", type=click.IntRange(min=1), show_default=str(ROWS), help="Requests answered at once. Embedded engine.")
@click.option("--context", type=click.IntRange(min=16), default=2048, show_default=True, help="Tokens of prompt and reply together at most.")
@click.option("--arms", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="Run the trial of this file; see `relseek arms`.")
@click.option("--conversations", type=click.Path(dir_okay=False, path_type=Path), default="conversations.jsonl", show_default=True, help="Its log.")
@click.argument("more", nargs=-1, type=click.UNPROCESSED)
@explained
def serve(
    study: str | None,
    engine: str,
    site: str | None,
    epoch: int | None,
    every: bool,
    extraction: str,
    source: str | None,
    dtype: str,
    device: str,
    given: tuple[str, ...],
    host: str,
    port: int,
    keys: tuple[str, ...],
    rate: int,
    rows: int | None,
    context: int,
    arms: Path | None,
    conversations: Path,
    more: tuple[str, ...],
) -> None:
    """Serve STUDY's selected vector, any dose per request, to OpenAI clients and on a chat page.

    \b
      relseek serve quickstart
      relseek serve quickstart --all --vector mine=mine.safetensors
      relseek serve quickstart --engine vllm -- --tensor-parallel-size 3
      relseek serve --model embedded:smollm2-135m-instruct --vector mine=mine.safetensors
    """
    from relseek_resources.serving.guard import Settings
    from relseek_resources.serving.trial_arms import ArmsError
    from relseek_resources.serving.vectors import ServingError

    if study is not None and study.startswith("-"):  # no STUDY, but the first of vLLM's options behind --
        more, study = (study, *more), None
    if study is not None and source is not None:
        raise click.UsageError("name a STUDY or give --model, not both")
    if engine != "vllm" and more:
        raise click.UsageError(f"{' '.join(more)}: only --engine vllm takes further options")
    if engine == "vllm" and arms is not None:
        raise click.UsageError("--arms goes with the embedded engine; `relseek arms serve` stands before vLLM")
    if engine == "vllm" and rows is not None:
        raise click.UsageError(f"--rows goes with the embedded engine; vLLM decides that itself, or as told behind --: -- --max-num-seqs {rows}")
    if engine == "vllm" and len(keys) > 1:
        raise click.UsageError("vLLM takes several keys on its command line alone, where everybody on the machine can read them; give one")
    check_vllms_own(more)
    try:
        settings = Settings(host, port, keys, rate)
        served = gathered(study, Loaded(source, dtype, device) if source else None, site, epoch, every, extraction, given)
        if engine == "vllm":
            serve_vllm(served, settings, context, more)
        else:
            serve_embedded(served, settings, rows or ROWS, context, (arms, conversations) if arms else None)
    except (ServingError, ArmsError) as error:
        raise click.ClickException(str(error)) from error
