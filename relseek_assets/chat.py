"""`relseek chat`: a conversation in the terminal, each message at a dose of its own, with a running server or with a study's vector.

Here belong the conversation with a server and the terminal. Floors, caps and vectors from files belong in `steer.py`, whose session speaks here for a
study.
"""

from __future__ import annotations

import json
import math
import secrets
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import click

from relseek_assets import steer
from relseek_assets.commands import explained
from relseek_assets.steer import CommandError
from relseek_assets.study import Study, load_study
from relseek_resources.models.loading import ModelError
from relseek_resources.models.sampling import Sampling
from relseek_resources.storage import keyed_seed

HELP = "TEXT says something, TEXT || 1.5 says it at another λ for this turn; /dose λ changes λ for good; /system TEXT, /reset, /save FILE, /quit"


class ChatError(ModelError):
    """A server that cannot be talked to; the message says why and what to do."""


class Talk(Protocol):
    """A conversation. `turns` has every turn since the start, whatever was reset meanwhile, as it is saved."""

    multiplier: float
    system: str

    @property
    def turns(self) -> Sequence[dict[str, Any]]: ...

    def say(self, text: str, multiplier: float, write: Callable[[str], None]) -> None:
        """Answer `text`, giving the reply to `write` piece by piece. One that Ctrl-C breaks off counts as far as it went.

        Raises:
            ChatError: the server did not answer, or its reply has no end of its own; neither counts.
        """

    def reset(self) -> None:
        """Forget what was said."""


# --- with a server ------------------------------------------------------------------------------------------------------


@dataclass
class Served:
    """A conversation with a server of OpenAI's protocol, steered by one of its vectors."""

    client: Any
    model: str
    vector: dict[str, Any] | None  # as the server lists it; None where it offers none
    multiplier: float
    sampling: Sampling
    seed: int = 0
    system: str = ""
    layers: tuple[int, ...] | None = None  # None for those that the vector's file names
    session: str = field(default_factory=lambda: secrets.token_hex(16))  # by which a router keeps the conversation on one replica
    history: list[dict[str, str]] = field(default_factory=list)
    turns: list[dict[str, Any]] = field(default_factory=list)

    def say(self, text: str, multiplier: float, write: Callable[[str], None]) -> None:
        import openai

        from relseek_resources.serving.trial_chat import WHOLE

        if multiplier and self.vector is None:
            raise CommandError("this server offers no vectors: only λ = 0 can be had")
        opening = [{"role": "system", "content": self.system}] if self.system else []
        asked = {"role": "user", "content": text}
        seed = keyed_seed(self.seed, "chat", len(self.turns)) >> 32
        steering = self._steering(multiplier)
        pieces: list[str] = []
        tokens: int | None = None
        finish_reason: str | None = None
        start, first = time.monotonic(), None
        try:
            with self.client.chat.completions.create(
                model=self.model,
                messages=[*opening, *self.history, asked],
                temperature=self.sampling.temperature,
                max_tokens=self.sampling.max_new_tokens,
                seed=seed,
                stream=True,
                stream_options={"include_usage": True},
                extra_headers={"x-session-id": self.session},
                extra_body={"vllm_xargs": {"relseek": json.dumps(steering)}} if steering else None,
            ) as events:
                for event in events:
                    if event.choices and event.choices[0].delta.content:
                        first = first or time.monotonic()
                        pieces.append(event.choices[0].delta.content)
                        write(pieces[-1])
                    finish_reason = (event.choices[0].finish_reason if event.choices else None) or finish_reason
                    tokens = event.usage.completion_tokens if event.usage else tokens
            if finish_reason not in WHOLE:
                ended = "before its end" if finish_reason is None else f"with the finish_reason {finish_reason}"
                raise ChatError(f"the reply broke off {ended}; it does not count, say it again")
        except KeyboardInterrupt:
            pass  # the person has read enough; leaving the block tells the server
        except openai.OpenAIError as error:
            raise ChatError(f"the server did not answer: {_told(error)}") from error
        reply = "".join(pieces)
        self.history += [asked, {"role": "assistant", "content": reply}]
        name, sha256 = (self.vector["name"], self.vector["sha256"]) if self.vector else (None, None)
        timing = {"seconds_to_first_token": first and round(first - start, 3), "seconds": round(time.monotonic() - start, 3), "tokens": tokens}
        layers = self.vector and (self.layers or self.vector["layers"])
        settings = {"model": self.model, "vector": name, "vector_sha256": sha256, "layers": layers, "multiplier": multiplier, "seed": seed}
        self.turns.append({"system": self.system, "user": text, "reply": reply, **settings, **timing})

    def _steering(self, multiplier: float) -> list[dict[str, Any]]:
        if self.vector is None or not multiplier:
            return []
        blocks = {} if self.layers is None else {"layers": list(self.layers)}
        return [{"vector": self.vector["name"], "sha256": self.vector["sha256"], "multiplier": multiplier, **blocks}]

    def reset(self) -> None:
        self.history.clear()


@dataclass(frozen=True)
class Endpoint:
    """A server that answers. `vectors` are as it lists them, by name; `offered` is that list whole (`GET /v1/relseek/vectors`).

    `context`: tokens of prompt and reply together, None where the server does not say.
    """

    url: str
    client: Any
    model: str
    offered: dict[str, Any]
    context: int | None = None

    @property
    def vectors(self) -> dict[str, dict[str, Any]]:
        return {one["name"]: one for one in self.offered["vectors"]}

    def vector(self, name: str | None = None) -> dict[str, Any] | None:
        """The vector of this name, or the server's own choice; None where it offers none and none is named.

        Raises:
            ChatError: no such vector, or several and none is named.
        """
        vectors = self.vectors
        wanted = name or (self.offered["default"] or {}).get("vector") or (next(iter(vectors)) if len(vectors) == 1 else None)
        if wanted in vectors:
            return vectors[wanted]
        if wanted is None and not vectors:
            return None
        fault = "name one with --vector" if wanted is None else f"the server has no vector {wanted!r}"
        raise ChatError(f"{self.url}: {fault}; there is {', '.join(vectors) or 'none'}")

    def layers(self, vector: dict[str, Any]) -> tuple[int, ...] | None:
        """The blocks after which the server's default vector works where `vector` is that one and they are declared; None for those of its file."""
        default = self.offered["default"] or {}
        return tuple(default["layers"]) if default.get("vector") == vector["name"] and "layers" in default else None


def endpoint(url: str, key: str | None = None, model: str | None = None) -> Endpoint:
    """The server at `url`.

    Raises:
        ChatError: nobody answers there, the key is refused, or there is no such model.
    """
    import openai

    base = url.rstrip("/")
    client = openai.OpenAI(base_url=base if base.endswith("/v1") else f"{base}/v1", api_key=key or "none", max_retries=1)
    try:
        models = {one.id: getattr(one, "max_model_len", None) for one in client.models.list()}
        offered = _offered(client)
    except openai.OpenAIError as error:
        raise ChatError(f"{url}: {_told(error)}; `relseek serve` starts a server and prints its address, --key gives its key") from error
    if not models or model not in (None, *models):
        raise ChatError(f"{url}: the server has no model {model!r}; there is {', '.join(models) or 'none'}")
    chosen = model or next(iter(models))
    return Endpoint(url, client, chosen, offered, models[chosen])


def _offered(client: Any) -> Any:
    import openai

    try:
        return client.get("/relseek/vectors", cast_to=object)
    except openai.NotFoundError:  # a server without steering
        return {"vectors": [], "default": None}


def _told(error: Exception) -> str:
    """What the server said, without the client's wrapping."""
    body = getattr(error, "body", None)
    return str(body["message"]) if isinstance(body, dict) and "message" in body else str(error).rstrip(".")


# --- with a study's vector in this process ------------------------------------------------------------------------------


class Loaded:
    """A conversation with a model in this process: the session of `relseek steer` with the vector added λ times, within its study's range."""

    def __init__(self, session: steer.Session, dose_limit: float = math.inf) -> None:
        self.session, self.dose_limit = session, dose_limit
        self.multiplier = session.strengths.scale or 0.0

    @property
    def system(self) -> str:
        return self.session.system

    @system.setter
    def system(self, text: str) -> None:
        self.session.system = text

    @property
    def turns(self) -> list[dict[str, Any]]:
        return [{"multiplier": turn["scale"], **{name: turn[name] for name in turn if name not in steer.STRENGTHS}} for turn in self.session.turns]

    def say(self, text: str, multiplier: float, write: Callable[[str], None]) -> None:
        check_dose(multiplier, self.dose_limit)
        self.session.say(text, multiplier, write)

    def reset(self) -> None:
        self.session.reset()


def check_dose(multiplier: float, limit: float) -> None:
    """Refuse a dose that a server of the study would refuse.

    Raises:
        CommandError: it is beyond the study's `dose_limit`.
    """
    if abs(multiplier) > limit:
        raise CommandError(f"λ {multiplier:g} is outside the declared range {-limit:g} to {limit:g}; the study's dose_limit declares it")


# --- the terminal -------------------------------------------------------------------------------------------------------


def converse(talk: Talk, lines: Iterable[str], write: Callable[[str], None], note: Callable[[str], None]) -> None:
    """Answer lines until they end or say /quit; replies go to `write` piece by piece, all else to `note`."""

    def answer(text: str, override: float | None) -> str:
        if not text:
            raise CommandError(f"nothing stands before {steer.OVERRIDE}; say something, or set λ with /dose")
        talk.say(text, talk.multiplier if override is None else override, write)
        return figures(talk.turns[-1])

    steer.answered(lines, lambda line: _obeyed(talk, line), answer, write, note)


def _obeyed(talk: Talk, line: str) -> str:
    name, _, rest = line[1:].partition(" ")
    rest = rest.strip()
    if name == "dose":
        talk.multiplier = steer.number_of(rest, "/dose")
        return f"λ {talk.multiplier:g}"
    return steer.obey_any(talk, name, rest, HELP)


def figures(turn: dict[str, Any]) -> str:
    """A turn's λ and latency in one line."""
    parts = [f"λ {turn['multiplier']:g}"]
    if turn.get("seconds_to_first_token") is not None:
        parts.append(f"first token after {turn['seconds_to_first_token']:.2f} s")
    parts.append(f"{turn['seconds']:.2f} s" if turn["tokens"] is None else f"{turn['tokens']} tokens in {turn['seconds']:.2f} s")
    if turn.get("projection") is not None:
        parts.append(f"projection {turn['projection']:.3f} after block {turn['layer']}")
    return f"[{'; '.join(parts)}]"


@click.command()
@click.argument("where", metavar="STUDY|URL")
@click.option("--multiplier", "-m", type=float, default=0.0, show_default=True, help="λ of messages that name none.")
@click.option("--site", help="With STUDY: its model and block, e.g. smollm2-135m:L12. Default: what STUDY selected, as `relseek serve` has it.")
@click.option("--epoch", type=int, help="With STUDY: the vector's epoch. Default: what STUDY selected, or the site's last one.")
@click.option("--vector", metavar="NAME", help="With URL: one of the server's vectors. Default: the server's own default.")
@click.option("--model", metavar="NAME", help="With URL: one of the server's models. Default: its first.")
@click.option("--key", envvar="RELSEEK_KEY", help="With URL: the server's key. Default: RELSEEK_KEY.")
@click.option("--system", default="", help="A system prompt. Default: none.")
@click.option("--temperature", type=click.FloatRange(min=0), default=0.7, show_default=True, help="0 always takes the likeliest token.")
@click.option("--max-tokens", type=click.IntRange(min=1), default=200, show_default=True, help="Tokens of a reply at most.")
@click.option("--seed", type=int, default=0, show_default=True)
@explained
def chat(
    where: str,
    multiplier: float,
    site: str | None,
    epoch: int | None,
    vector: str | None,
    model: str | None,
    key: str | None,
    system: str,
    temperature: float,
    max_tokens: int,
    seed: int,
) -> None:
    """Talk to a steered model, each message at the λ that stands behind it.

    With a URL it talks to a running server (`relseek serve`), with a STUDY it loads model and vector itself. After each reply stand λ and how long
    it took. Lines may come from a pipe: replies go to the standard output, all else to the standard error.

    \b
      relseek chat http://localhost:8000 --multiplier 1
      relseek chat quickstart
      echo "My dog died. || -1" | relseek chat quickstart --temperature 0

    \b
    While it runs:
      TEXT || 1.5     say it at another λ, this turn only
      /dose λ         another λ from now on        /system TEXT    another system prompt
      /reset          forget the conversation      /save FILE      every turn as JSON Lines
      /quit           as Ctrl-D; Ctrl-C breaks a reply off
    """
    sampling = Sampling(temperature=temperature, max_new_tokens=max_tokens)
    if where.startswith(("http://", "https://")):
        if site is not None or epoch is not None:
            raise click.UsageError("--site and --epoch go with a STUDY; a server has vectors by name: --vector NAME")
        server = endpoint(where, key, model)
        chosen = server.vector(vector)
        click.echo(f"{server.model} at {where}, {chosen['name'] if chosen else 'no vector'}, λ {multiplier:g}\n{HELP}", err=True)
        talk: Talk = Served(server.client, server.model, chosen, multiplier, sampling, seed, system, server.layers(chosen) if chosen else None)
    else:
        if vector is not None or model is not None:
            raise click.UsageError("--vector and --model go with a URL; for a STUDY give --site and --epoch, or use `relseek steer`")
        talk = _loaded(where, site, epoch, multiplier, sampling, seed, system)
    converse(talk, steer.typed_lines(), lambda piece: click.echo(piece, nl=False), lambda note: click.echo(note, err=True))


def _loaded(study: str, site: str | None, epoch: int | None, multiplier: float, sampling: Sampling, seed: int, system: str) -> Loaded:
    from relseek_resources import models

    found = load_study(study)
    try:
        check_dose(multiplier, found.dose_limit)
    except CommandError as error:
        raise click.BadParameter(str(error), param_hint="--multiplier") from error
    chosen = vector_of(found, site, epoch)
    click.echo(f"{chosen.title}: loading {chosen.model.source} ...", err=True)
    model = models.load(chosen.model.source, dtype=chosen.model.dtype, device=chosen.model.device)
    strengths = steer.Strengths(scale=multiplier)
    session = steer.Session(model, chosen.vectors, chosen.read_at, strengths, sampling, seed, system)
    with model.intervene(session.interventions(strengths)):
        pass  # a vector that does not fit the model is refused before anything is said
    click.echo(f"λ {multiplier:g}\n{HELP}", err=True)
    return Loaded(session, found.dose_limit)


def vector_of(study: Study, site: str | None, epoch: int | None) -> steer.Chosen:
    """The vector with which `relseek serve` begins its list.

    Raises:
        StudyError: nothing is stored, or nothing is selected and none is named.
    """
    from relseek_assets.serve import wanted_of

    if not study.contrastive:
        site, epoch = wanted_of(study, site, epoch)
    return steer.of_study(study, site, epoch, None, "response_mean")
