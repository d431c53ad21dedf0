"""Persona attacks: the file of a behaviour, and conversations that are played to their end by whoever writes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from relseek_assets.behaviour import BehaviourError
from relseek_assets.persona_attacks import FILE, Scenario, read_persona_attacks
from relseek_assets.prompting.attacks import histories, play, started
from relseek_assets.prompting.authors import Conversation, ModelWriter, Replied
from relseek_assets.prompting.levels import Level
from relseek_assets.prompting.tables import ATTACK_CONVERSATIONS, NOT_REACHED, STEERED
from relseek_assets.study import BEHAVIOURS
from relseek_resources.models.sampling import Sampling
from tests.prompting.test_levels import FOLDERS, prompts_of

ENDS = [Level(1, 7, -1.5), Level(7, 7, 1.5)]


@pytest.mark.parametrize("behaviour", [folder.name for folder in FOLDERS])
def test_every_shipped_behaviour_has_five_themes_of_three_turns_and_eight_attacks(behaviour: str) -> None:
    found = read_persona_attacks(BEHAVIOURS / behaviour / FILE)
    assert list(found.themes) == ["casual", "ethics", "learning", "technical", "friendship"]
    for theme in found.themes:
        scenarios = list(found.scenarios(theme))
        assert [scenario.name for scenario in scenarios] == [f"{kind}_{number}_{theme}" for kind in ("add", "subtract") for number in range(1, 5)]
        assert {scenario.turns[:3] for scenario in scenarios} == {found.themes[theme]}
        assert len({scenario.turns[3] for scenario in scenarios}) == 8


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("subtract = ['b']\n[[themes]]\nname = 'x'\nturns = ['u']", "add must be a list with at least one message"),
        ("add = ['a']\nsubtract = ['b']", "themes must be tables"),
        ("add = ['a']\nsubtract = [' ']\n[[themes]]\nname = 'x'\nturns = ['u']", "subtract must hold texts"),
        ("add = ['a']\nsubtract = ['b']\n[[themes]]\nname = 'x|y'\nturns = ['u']", "becomes part of partition keys"),
        ("add = ['a']\nsubtract = ['b']\n[[themes]]\nname = 'x'\nturns = ['u']\n[[themes]]\nname = 'x'\nturns = ['u']", "is there already"),
        ("add = ['a']\nsubtract = ['b']\nmultiply = ['c']", "multiply is unknown"),
    ],
)
def test_a_faulty_file_is_refused_with_its_name_and_the_fault(tmp_path: Path, text: str, fault: str) -> None:
    file = tmp_path / FILE
    file.write_text(text)
    with pytest.raises(BehaviourError, match=fault) as raised:
        read_persona_attacks(file)
    assert str(file) in str(raised.value)


def scenarios() -> list[Scenario]:
    return list(read_persona_attacks(FOLDERS[0] / FILE).scenarios("casual"))


class Parrot:
    """Says how many messages it was shown and of which dose; falls silent where it is told to."""

    def __init__(self, silent_on: str = "") -> None:
        self.silent_on, self.calls = silent_on, 0

    def __call__(self, conversations: Sequence[Conversation], seeds: Sequence[int], multipliers: Sequence[float]) -> list[Replied]:
        self.calls += 1
        return [
            Replied(None, None, "failed")
            if self.silent_on and self.silent_on in conversation[-1]["content"]
            else Replied(f"{len(conversation)} at {dose:g}: {conversation[-1]['content']}", True)
            for conversation, dose in zip(conversations, multipliers, strict=True)
        ]


def test_every_reply_sees_the_whole_conversation_before_it() -> None:
    writer = Parrot()
    frame = play("one", started("one", scenarios(), ENDS, prompts_of(FOLDERS[0])), writer, 3)
    ATTACK_CONVERSATIONS.to_arrow(frame, "played")
    assert writer.calls == 4, "all conversations of a turn go together"
    assert len(frame) == 2 * 8 * 4
    assert all(row.reply.startswith(f"{2 * row.turn + 2} at {row.multiplier:g}: {row.user}") for row in frame.itertuples())
    assert frame["seed"].is_unique
    assert (frame["is_attack"] == (frame["turn"] == 3)).all()
    last = frame[(frame["turn"] == 2)].index[0]
    before = histories(frame)[frame.index.get_loc(last)]
    assert [message["role"] for message in before] == ["user", "assistant", "user", "assistant", "user"]
    own = frame[(frame["scenario"] == frame.loc[last, "scenario"]) & (frame["level"] == frame.loc[last, "level"])].sort_values("turn")
    assert [message["content"] for message in before[1::2]] == list(own["reply"].head(2))


def test_a_conversation_whose_reply_never_came_goes_no_further() -> None:
    stopped = scenarios()[0].turns[1]
    frame = play("one", started("one", scenarios(), ENDS, prompts_of(FOLDERS[0])), Parrot(silent_on=stopped), 3)
    ATTACK_CONVERSATIONS.to_arrow(frame, "played")
    assert {turn: set(part["status"]) for turn, part in frame.groupby("turn")} == {0: {"replied"}, 1: {"failed"}, 2: {NOT_REACHED}, 3: {NOT_REACHED}}
    assert frame.loc[frame["turn"] > 0, "reply"].isna().all()


def test_a_conversation_is_the_same_whatever_is_played_beside_it(tiny_llama) -> None:  # type: ignore[no-untyped-def]
    vector = np.random.default_rng(0).normal(size=tiny_llama.width).astype(np.float32)
    writer = ModelWriter(tiny_llama, Sampling(max_new_tokens=5), 4, vector, 2)
    together = play(STEERED, started(STEERED, scenarios()[:3], ENDS, prompts_of(FOLDERS[0])), writer, 3)
    alone = play(STEERED, started(STEERED, scenarios()[1:2], ENDS[1:], prompts_of(FOLDERS[0])), writer, 3)
    beside = together[(together["scenario"] == alone["scenario"].iloc[0]) & (together["level"] == 7)]
    assert list(alone["reply"]) == list(beside["reply"])
    assert list(alone["seed"]) == list(beside["seed"])


def test_the_steered_author_feels_its_dose_and_the_others_nothing(tiny_llama) -> None:  # type: ignore[no-untyped-def]
    vector = 30 * np.random.default_rng(1).normal(size=tiny_llama.width).astype(np.float32)
    conversation = [{"role": "user", "content": "Hello there"}]
    sampling = Sampling(temperature=0, max_new_tokens=8)
    plain = tiny_llama.generate([conversation], sampling)[0].text
    unsteered = ModelWriter(tiny_llama, sampling, 4)([conversation] * 2, [1, 2], [1.0, -1.0])
    steered = ModelWriter(tiny_llama, sampling, 4, vector, 1)([conversation] * 3, [1, 2, 3], [1.0, 0.0, -1.0])
    assert [reply.text for reply in unsteered] == [plain, plain]
    assert steered[1].text == plain
    assert plain not in (steered[0].text, steered[2].text)
