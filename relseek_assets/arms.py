"""`relseek arms`: allocate a trial's participants to arms, and serve the trial blinded before a server that replies.

Here belong arguments and printing; what an allocation is belongs in `relseek_resources.serving.trial_arms`, the conversations in `trial_chat`.
"""

from __future__ import annotations

import secrets
from collections import Counter
from pathlib import Path

import click

from relseek_assets.commands import explained
from relseek_resources.serving.trial_arms import Arm, Conduct, allocated, check_offered, read_allocation, room, write_once


@click.group()
def arms() -> None:
    """Run a trial whose participants cannot see which dose they talk to."""


def _doses(_context: click.Context, _option: click.Parameter, text: str) -> tuple[float, ...]:
    try:
        found = tuple(float(part) for part in text.split(","))
    except ValueError:
        raise click.BadParameter(f"{text!r}: give doses as -1,-0.5,0,0.5,1") from None
    if len(set(found)) < len(found) or len(found) < 2:
        raise click.BadParameter(f"{text!r}: give two different doses or more")
    return found


def _sizes(_context: click.Context, _option: click.Parameter, text: str | None) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(",")) if text else ()
    except ValueError:
        raise click.BadParameter(f"{text!r}: give sizes as 5,10") from None


@arms.command("make")
@click.argument("study")
@click.option("--arms", "doses", required=True, callback=_doses, metavar="-1,0,1", help="λ of each arm.")
@click.option("--participants", required=True, type=click.IntRange(min=1), help="How many tokens.")
@click.option("--url", default="http://127.0.0.1:8000", show_default=True, help="The running server, whose vector the trial is about.")
@click.option("--key", envvar="RELSEEK_KEY", help="The server's key. Default: RELSEEK_KEY.")
@click.option("--vector", metavar="NAME", help="One of the server's vectors. Default: the server's own default.")
@click.option("--blocks", callback=_sizes, metavar="5,10", help="Sizes of blocks, multiples of the arms. Default: once and twice their number.")
@click.option("--seed", type=int, help="Of the allocation; whoever knows it knows who is in which arm. Default: drawn, and kept in the arms file.")
@click.option("--system", default="", help="The system prompt of every arm. Default: none.")
@click.option("--temperature", type=click.FloatRange(0, 2), default=Conduct.temperature, show_default=True)
@click.option("--top-p", type=click.FloatRange(0, 1, min_open=True), default=Conduct.top_p, show_default=True)
@click.option("--max-tokens", type=click.IntRange(min=1), default=Conduct.max_tokens, show_default=True, help="Tokens of a reply at most.")
@click.option("--per-minute", type=click.IntRange(min=1), default=Conduct.per_minute, show_default=True, help="Messages of a participant at most.")
@click.option("--output", "-o", type=click.Path(dir_okay=False, path_type=Path), default="arms.json", show_default=True)
@click.option("--tokens", type=click.Path(dir_okay=False, path_type=Path), default="tokens.csv", show_default=True)
@explained
def make(
    study: str,
    doses: tuple[float, ...],
    participants: int,
    url: str,
    key: str | None,
    vector: str | None,
    blocks: tuple[int, ...],
    seed: int | None,
    system: str,
    temperature: float,
    top_p: float,
    max_tokens: int,
    per_minute: int,
    output: Path,
    tokens: Path,
) -> None:
    """Allocate participants to arms by permuted blocks, and give each a token.

    STUDY names the trial. The arms file is for the server: who is in which arm, the vector by name and SHA-256, the tokens as hashes. The tokens
    file is for whoever invites participants: it does not say the arm. Neither is ever overwritten, and both are readable by their owner alone.

    \b
      relseek arms make quickstart --arms "-1,-0.5,0,0.5,1" --participants 100 --blocks 5,10
    """
    from relseek_assets.chat import endpoint

    server = endpoint(url, key)
    chosen = server.vector(vector)
    if chosen is None:
        raise click.ClickException(f"{url}: the server offers no vector for the arms")
    of_arms = [Arm(f"{dose:g}", chosen["name"], dose, chosen["sha256"], server.layers(chosen)) for dose in doses]
    conduct = Conduct(system=system, temperature=temperature, top_p=top_p, max_tokens=max_tokens, per_minute=per_minute)
    blocks, seed = blocks or (len(doses), 2 * len(doses)), secrets.randbits(53) if seed is None else seed
    allocation, made = allocated(study, of_arms, participants, blocks, seed, conduct)
    check_offered(allocation, server.offered, server.context)
    write_once(allocation, made, output, tokens)
    sizes = Counter(allocation.arm_of.values())
    click.echo(f"{output}: {participants} participants, " + ", ".join(f"λ {arm.name}: {sizes[arm.name]}" for arm in of_arms))
    click.echo(f"{tokens}: their tokens, without arms. They are nowhere else: keep this file, and {output} away from whoever is to stay blind")
    if server.context is not None:
        click.echo(f"on the server as it runs now, {room(conduct, server.context)}")


@arms.command("serve")
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path), default="arms.json")
@click.option("--url", default="http://127.0.0.1:8000", show_default=True, help="The server that replies: relseek serve, or vLLM with the plugin.")
@click.option("--key", envvar="RELSEEK_KEY", help="That server's key. Default: RELSEEK_KEY.")
@click.option("--conversations", type=click.Path(dir_okay=False, path_type=Path), default="conversations.jsonl", show_default=True, help="The log.")
@click.option("--host", default="127.0.0.1", show_default=True)
@click.option("--port", type=int, default=8080, show_default=True)
@explained
def serve(file: Path, url: str, key: str | None, conversations: Path, host: str, port: int) -> None:
    """Serve the trial of an arms FILE, and nothing else, before a server that replies.

    FILE is what `relseek arms make` wrote.

    That server, vLLM perhaps, must be out of participants' reach. With the embedded engine `relseek serve --arms` does without this one. Either way
    TLS belongs before it.

    \b
      relseek arms serve arms.json --url http://127.0.0.1:8000
      curl localhost:8080/trial/chat -d '{"token": "...", "message": "Hello"}'
    """
    import openai
    import uvicorn

    from relseek_assets.chat import endpoint
    from relseek_resources.serving.trial_chat import ServerSpeaker, Trial, create_app
    from relseek_resources.serving.trial_log import TurnLog

    allocation, server = read_allocation(file), endpoint(url, key)
    check_offered(allocation, server.offered, server.context)
    client = openai.AsyncOpenAI(base_url=server.client.base_url, api_key=server.client.api_key, max_retries=1)
    trial = Trial(allocation, ServerSpeaker(client, server.model), TurnLog(conversations))
    click.echo(
        f"{allocation.study}: {len(allocation.arm_of)} participants in {len(allocation.arms)} arms, {len(trial.log.turns)} turns in {conversations}"
    )
    click.echo(f"http://{host}:{port}/trial/chat takes token and message; replies come from {server.model} at {url}")
    if server.context is not None:
        click.echo(room(allocation.conduct, server.context))
    uvicorn.run(create_app(trial), host=host, port=port, log_level="warning", access_log=False, server_header=False)
