"""`relseek steer`: a conversation in the terminal with a model under an intervention.

Here belong the session, its commands and the terminal. What an intervention does belongs in `relseek_resources.models.interventions`, replies token
by token in `relseek_resources.models.streaming`.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np

from relseek_assets.commands import explained
from relseek_assets.study import Study, StudyError, layer_of, load_study, site_key
from relseek_resources.models.loading import DTYPES, ModelError
from relseek_resources.models.sampling import Sampling
from relseek_resources.storage import keyed_seed, read_table, read_tensors, write_text
from relseek_resources.stored_vectors import asset_of, epochs_of

if TYPE_CHECKING:
    from relseek_resources.compute import ModelSettings
    from relseek_resources.models import Intervention, SteeredModel

OVERRIDE = "||"
STRENGTHS = ("scale", "floor", "cap")
HELP = (
    "TEXT says something, TEXT || 1.5 says it at another strength for this turn; /scale S, /floor T, /cap T change one for good (`off` takes it "
    "away); /system TEXT, /reset, /save FILE, /quit"
)


# --- the session ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Strengths:
    """What is done along the vector: `scale` times it is added, then its projection is kept above `floor` and below `cap`; None does nothing."""

    scale: float | None = None
    floor: float | None = None
    cap: float | None = None

    def with_(self, name: str, value: float | None) -> Strengths:
        return Strengths(**{**self.given, name: value})

    @property
    def given(self) -> dict[str, float | None]:
        return {name: getattr(self, name) for name in STRENGTHS}

    @property
    def overridden(self) -> str:
        """The strength that a number behind `||` takes the place of: the scale unless only a floor or a cap is set."""
        return next((name for name in STRENGTHS if getattr(self, name) is not None), "scale")

    def __str__(self) -> str:
        return ", ".join(f"{name} {value:g}" for name, value in self.given.items() if value is not None) or "no intervention"


@dataclass
class Session:
    """A conversation. `vectors` are (width,) by 0-indexed block; projections are read at `read_at`, one of those blocks."""

    model: SteeredModel
    vectors: Mapping[int, np.ndarray]
    read_at: int
    strengths: Strengths
    sampling: Sampling
    seed: int = 0
    system: str = ""
    history: list[dict[str, str]] = field(default_factory=list)
    turns: list[dict[str, Any]] = field(default_factory=list)

    def interventions(self, strengths: Strengths) -> list[Intervention]:
        from relseek_resources.models import Add, Ceiling, Floor

        found: list[Intervention] = []
        for layer, vector in sorted(self.vectors.items()):
            if strengths.scale is not None:
                found.append(Add(vector, layer, strengths.scale))
            if strengths.floor is not None:
                found.append(Floor(vector, layer, strengths.floor))
            if strengths.cap is not None:
                found.append(Ceiling(vector, layer, strengths.cap))
        return found

    def say(self, text: str, override: float | None = None, write: Callable[[str], None] = lambda piece: None) -> str:
        """The reply to `text`, given to `write` piece by piece. One that Ctrl-C breaks off belongs to the history as far as it went."""
        from relseek_resources.models.streaming import stream_text, stream_tokens

        strengths = self.strengths if override is None else self.strengths.with_(self.strengths.overridden, override)
        opening = [{"role": "system", "content": self.system}] if self.system else []
        asked = [*opening, *self.history, {"role": "user", "content": text}]
        seed = keyed_seed(self.seed, "steer", len(self.turns))
        pieces: list[str] = []
        drawn: list[int] = []
        start = time.monotonic()
        with self.model.intervene(self.interventions(strengths)):
            try:
                for piece in stream_text(self.model, stream_tokens(self.model, self.model.prompt_tokens(asked), self.sampling, seed), drawn):
                    pieces.append(piece)
                    write(piece)
            except KeyboardInterrupt:
                pass  # the person has read enough
            seconds, reply = time.monotonic() - start, "".join(pieces)
            projection = None
            if self.model.reply_tokens(reply, end=False):
                projection = float(self.model.projections([asked], self.vectors[self.read_at], [self.read_at], [reply])[0, 0])
        self.history += [asked[-1], {"role": "assistant", "content": reply}]
        figures = {"tokens": len(drawn), "seconds": round(seconds, 3), "projection": projection, "layer": self.read_at}
        self.turns.append({"system": self.system, "user": text, "reply": reply, **strengths.given, **figures, "seed": seed})
        return reply

    def figures(self) -> str:
        """The last turn's projection, latency and strength in one line."""
        turn = self.turns[-1]
        projection = "no text" if turn["projection"] is None else f"projection {turn['projection']:.3f} after block {turn['layer']}"
        strengths = Strengths(**{name: turn[name] for name in STRENGTHS})
        rate = turn["tokens"] / max(turn["seconds"], 1e-9)
        return f"[{projection}; {turn['tokens']} tokens in {turn['seconds']:.2f} s, {rate:.1f} a second; {strengths}]"

    def reset(self) -> None:
        """Forget the conversation; strengths and the system prompt stay, and so do the turns that are to be saved."""
        self.history.clear()


class CommandError(ValueError):
    """A line that cannot be carried out; the message says why. The conversation goes on."""


def obey(session: Session, line: str) -> str:
    """Carry out a `/command` and say what was done.

    Raises:
        CommandError: an unknown command, or one without what it needs.
    """
    name, _, rest = line[1:].partition(" ")
    rest = rest.strip()
    if name in STRENGTHS:
        session.strengths = session.strengths.with_(name, None if rest == "off" else number_of(rest, f"/{name}"))
        return str(session.strengths)
    return obey_any(session, name, rest, HELP)


def obey_any(talk: Any, name: str, rest: str, help_text: str) -> str:
    """A command that every conversation has: /system, /reset, /save, /help. `talk` has `system`, `reset()` and `turns`.

    Raises:
        CommandError: another command, or /save without a file.
    """
    if name == "system":
        talk.system = rest
        return f"system prompt: {rest}" if rest else "no system prompt"
    if name == "reset":
        talk.reset()
        return "the conversation begins anew"
    if name == "save":
        if not rest:
            raise CommandError("/save needs a file: /save FILE")
        write_text(Path(rest), "".join(json.dumps(turn, ensure_ascii=False) + "\n" for turn in talk.turns))
        return f"{len(talk.turns)} turns in {rest}"
    if name == "help":
        return help_text
    raise CommandError(f"no command /{name}; {help_text}")


def number_of(text: str, what: str) -> float:
    try:
        found = float(text)
    except ValueError:
        found = float("nan")
    if not np.isfinite(found):
        raise CommandError(f"{what} needs a finite number and got {text!r}")
    return found


def said(line: str) -> tuple[str, float | None]:
    """A line as its text and the strength behind `||`, where there is one."""
    text, mark, number = line.rpartition(OVERRIDE)
    if not mark:
        return line.strip(), None
    return text.strip(), number_of(number.strip(), OVERRIDE)


def converse(session: Session, lines: Iterable[str], write: Callable[[str], None], note: Callable[[str], None]) -> None:
    """Answer lines until they end or say /quit; replies go to `write` piece by piece, all else to `note`."""

    def answer(text: str, override: float | None) -> str:
        if not text:
            raise CommandError(f"nothing stands before {OVERRIDE}; say something, or set the strength with /{session.strengths.overridden}")
        session.say(text, override, write)
        return session.figures()

    answered(lines, lambda line: obey(session, line), answer, write, note)


def answered(
    lines: Iterable[str],
    obeyed: Callable[[str], str],
    answer: Callable[[str, float | None], str],
    write: Callable[[str], None],
    note: Callable[[str], None],
) -> None:
    """The loop of a conversation: commands go to `obeyed`, texts with the number behind `||` to `answer`, which returns the turn's figures."""
    for line in map(str.strip, lines):
        if line in ("/quit", "/exit", "quit"):
            return
        if not line:
            continue
        try:
            if line.startswith("/"):
                note(obeyed(line))
                continue
            figures = answer(*said(line))
            write("\n")
            note(figures)
        except (CommandError, ModelError) as error:
            note(f"{error}")


# --- vectors ----------------------------------------------------------------------------------------------------------


def layer_range(text: str) -> list[int]:
    """`12-20` or `12,14,16` as blocks."""
    found: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()) or (dash and int(last) < int(first)):
            raise click.BadParameter(f"{text!r}: give blocks as 12-20 or 12,14,16")
        found += range(int(first), int(last if dash else first) + 1)
    return list(dict.fromkeys(found))


@dataclass(frozen=True)
class Loaded:
    """How a model is loaded that no study names."""

    source: str
    dtype: str = "float32"
    device: str = "auto"


@dataclass(frozen=True)
class Chosen:
    """The model to load, the vectors by block, the block whose projection is printed, and what to call it all."""

    model: ModelSettings
    vectors: dict[int, np.ndarray]
    read_at: int
    title: str


def of_study(study: Study, site: str | None, epoch: int | None, layers: list[int] | None, extraction: str) -> Chosen:
    """The stored vector of a study's site, trained or derived, or its directions.

    Raises:
        StudyError: a study without vectors, an unknown site, or one that has not been computed.
    """
    if study.contrastive:
        return _directions(study, site, layers, extraction)
    if not study.steered and not study.published.vectors:
        raise StudyError(f"study {study.name} is a trial and has no vectors; `relseek studies` says which have")
    site = site or study.sites[0]
    sites = (*study.sites, *study.derived_sites)
    if site not in sites:
        raise StudyError(f"study {study.name} has no site {site!r}; there is {', '.join(sites)}")
    asset, files = asset_of(site, study.derived_sites), epochs_of(_stored(study), site, study.derived_sites)
    wanted = max(files, default=None) if epoch is None else epoch
    if wanted not in files:
        there = f"there is {', '.join(found.stem for found in files.values())}" if files else "nothing is"
        named = "" if epoch is None else f", epoch {epoch}"
        raise StudyError(
            f"{_stored(study) / asset / site}{named} has not been computed ({there}); `relseek run {study.name} --select {asset}` does it"
        )
    vector = read_tensors(files[wanted])[0]["vector"]
    blocks = layers or [layer_of(site)]
    return Chosen(study.model_of(site), dict.fromkeys(blocks, vector), blocks[-1], f"{study.name} {site} {files[wanted].stem}")


def _directions(study: Study, site: str | None, layers: list[int] | None, extraction: str) -> Chosen:
    """A contrastive study's directions: each block its own, the site's block unless several are named."""
    name, _, layer = (site or study.models[0].name).partition(":L")
    if name not in {model.name for model in study.models} or (layer and not layer.isdecimal()):
        raise StudyError(f"study {study.name} has no site {site!r}; a site is a model and a block: {site_key(study.models[0].name, 12)}")
    file = _stored(study) / "directions" / f"{name}.safetensors"
    if not file.is_file():
        raise StudyError(f"{file} has not been computed; `relseek run {study.name} --select directions` does it")
    arrays = read_tensors(file)[0]
    if extraction not in arrays:
        raise StudyError(f"{file}: no directions {extraction!r}; there is {', '.join(sorted(arrays))}")
    rows = arrays[extraction]
    blocks = layers or [int(layer) if layer else _best_layer(study, name, extraction)]
    beyond = [block for block in blocks if block >= len(rows)]
    if beyond:
        raise StudyError(f"{file}: no block {beyond[0]}; the model has the blocks 0 to {len(rows) - 1}")
    model = next(model for model in study.models if model.name == name)
    read_at = int(layer) if layer and int(layer) in blocks else blocks[-1]
    return Chosen(model, {block: rows[block] for block in blocks}, read_at, f"{study.name} {name} {extraction}")


def _best_layer(study: Study, model: str, extraction: str) -> int:
    """The block at which the direction tells held-out replies best apart, where the study's interventions add it too."""
    from relseek_assets.axes.interventions import best_layer
    from relseek_assets.vectors.contrastive_tables import DIRECTION_QUALITY

    file = _stored(study) / "direction_quality" / f"{model}.parquet"
    if not file.is_file():
        raise StudyError(f"{file} has not been computed; `relseek run {study.name} --select direction_quality` does it, or give --site with a block")
    return best_layer(read_table(file, DIRECTION_QUALITY), extraction)


def _stored(study: Study) -> Path:
    from relseek_resources.stored_vectors import store_folder

    return store_folder() / study.name


def of_file(source: str, file: Path, layers: list[int] | None) -> Chosen:
    """A vector from a file, for any model.

    Raises:
        VectorFileError: what `read_vectors` refuses, a file for other blocks than `layers` among it.
    """
    from relseek_resources.models import read_directions

    found = read_directions(file, layers)
    return Chosen(Loaded(source), found, list(found)[-1], file.name)


# --- the command ------------------------------------------------------------------------------------------------------


@click.command()
@click.argument("study", required=False)
@click.option("--site", help="Model and block of STUDY, e.g. smollm2-135m:L12. Default: its first site, or the best block of its directions.")
@click.option("--epoch", type=int, help="Epoch of STUDY's vector. Default: the last one stored.")
@click.option("--extraction", default="response_mean", show_default=True, help="Which of a contrastive STUDY's directions.")
@click.option("--model", "source", metavar="SOURCE", help="Instead of STUDY: embedded:NAME, a local folder or a hub name.")
@click.option("--vector", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="With --model: a .safetensors, .pt or .gguf file.")
@click.option(
    "--layer",
    type=int,
    help="With --model: the block after which the vector works, counted from 0. A file that gives its block works there alone.",
)
@click.option("--dtype", type=click.Choice(DTYPES), help="Default: the STUDY's, or float32.")
@click.option("--device", help="cpu, cuda, cuda:1, ... Default: the STUDY's, or a GPU where there is one.")
@click.option("--scale", type=float, help="Add the vector so many times.")
@click.option("--floor", type=float, help="Keep the projection on the vector from falling below this: llm-personality-axes' capping.")
@click.option("--cap", type=float, help="Keep the projection on the vector from rising above this: assistant-axis' capping.")
@click.option("--layers", metavar="12-20", help="Work after all of these blocks. A contrastive STUDY has a direction of its own for each.")
@click.option("--system", default="", help="A system prompt. Default: none.")
@click.option("--temperature", type=click.FloatRange(min=0), default=0.7, show_default=True, help="0 always takes the likeliest token.")
@click.option("--max-tokens", type=click.IntRange(min=1), default=200, show_default=True, help="Tokens of a reply at most.")
@click.option("--seed", type=int, default=0, show_default=True)
@explained
def steer(
    study: str | None,
    site: str | None,
    epoch: int | None,
    extraction: str,
    source: str | None,
    vector: Path | None,
    layer: int | None,
    dtype: str | None,
    device: str | None,
    scale: float | None,
    floor: float | None,
    cap: float | None,
    layers: str | None,
    system: str,
    temperature: float,
    max_tokens: int,
    seed: int,
) -> None:
    """Talk to a model while a vector of STUDY steers it.

    After each reply stand its mean projection on the vector and how long it took. Lines may come from a pipe: replies go to the standard output,
    all else to the standard error.

    \b
      relseek steer quickstart --scale 1.5                     add the vector 1.5 times
      relseek steer persona_axes --layers 10-19 --floor 2      each block's direction, its projection kept above 2
      relseek steer --model embedded:smollm2-135m-instruct --vector mine.pt --layer 12 --cap -1
      echo "My dog died. || -1" | relseek steer quickstart --scale 0 --temperature 0

    \b
    While it runs:
      TEXT || 1.5     say it at another strength, this turn only (of the scale, or of the floor or cap where only that is set)
      /scale S  /floor T  /cap T    change a strength for good; `off` takes it away
      /system TEXT    another system prompt        /reset   forget the conversation
      /save FILE      every turn as JSON Lines     /quit    as Ctrl-D; Ctrl-C breaks a reply off
    """
    from relseek_resources import models

    if (study is None) == (source is None):
        raise click.UsageError("name a STUDY, or give --model SOURCE with --vector FILE")
    if source is not None and vector is None:
        raise click.UsageError("--model needs --vector FILE")
    if study is not None and (vector is not None or layer is not None):
        raise click.UsageError("--vector and --layer go with --model; for a STUDY give --site or --layers")
    blocks = None if layers is None else layer_range(layers)
    if study is not None:
        chosen = of_study(load_study(study), site, epoch, blocks, extraction)
    else:
        assert source is not None and vector is not None
        chosen = of_file(source, vector, [layer] if blocks is None and layer is not None else blocks)
    click.echo(f"{chosen.title}: loading {chosen.model.source} ...", err=True)
    model = models.load(chosen.model.source, dtype=dtype or chosen.model.dtype, device=device or chosen.model.device)
    sampling = Sampling(temperature=temperature, max_new_tokens=max_tokens)
    session = Session(model, chosen.vectors, chosen.read_at, Strengths(scale, floor, cap), sampling, seed, system)
    with model.intervene(session.interventions(Strengths(scale or 0.0, floor, cap))):
        pass  # a vector that does not fit the model is refused before anything is said
    norms = ", ".join(f"{block}: {np.linalg.norm(one):.3g}" for block, one in sorted(chosen.vectors.items()))
    click.echo(f"blocks and norms of the vector {norms}; {session.strengths}\n{HELP}", err=True)
    converse(session, typed_lines(), lambda piece: click.echo(piece, nl=False), lambda note: click.echo(note, err=True))


def typed_lines() -> Iterator[str]:
    """Lines of the terminal with its editing keys, or of a pipe."""
    if not sys.stdin.isatty():
        yield from sys.stdin
        return
    import readline  # noqa: F401 (gives `input` its editing keys)

    while True:
        try:
            yield input("> ")
        except EOFError:
            click.echo("", err=True)
            return
        except KeyboardInterrupt:
            click.echo("\n/quit or Ctrl-D ends it", err=True)
