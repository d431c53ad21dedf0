"""Commands that the documentation shows are commands: their names, options and number of arguments."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from relseek_assets.cli import main

CHECKOUT = Path(__file__).parents[2]
LINE = re.compile(r"^ {4}(?:[A-Z_]+=\S+ )*relseek (.+)$")


def documented() -> Iterator[tuple[str, str]]:
    for path in (CHECKOUT / "README.md", *sorted((CHECKOUT / "docs").glob("*.md"))):
        whole = path.read_text().replace("\\\n", " ")
        for number, line in enumerate(whole.splitlines(), 1):
            found = LINE.match(line)
            if found:
                yield f"{path.name}:{number}", found[1]


SHOWN = list(documented())


def test_the_documentation_shows_commands() -> None:
    assert len(SHOWN) > 40


@pytest.mark.parametrize(("place", "shown"), SHOWN, ids=[place for place, _ in SHOWN])
def test_a_documented_command_can_be_given(place: str, shown: str) -> None:
    words = shlex.split(re.sub(r"[\[\]]", "", shown).replace("...", ""), comments=True)
    words = words[: next((at for at, word in enumerate(words) if word in ("|", ">", "&&", "&", "<")), len(words))]
    command: click.Command = main
    context = click.Context(main, info_name="relseek")
    while isinstance(command, click.Group) and words:
        found = command.get_command(context, words[0])
        assert found is not None, f"{place}: relseek has no {words[0]!r}"
        command, words = found, words[1:]
    try:
        command.make_context("relseek", words, parent=context)
    except click.BadParameter as error:
        assert "does not exist" in error.message, f"{place}: {error.message}"
    except click.UsageError as error:
        pytest.fail(f"{place}: {error.format_message()}")
    except click.exceptions.Exit:
        pass  # --help
