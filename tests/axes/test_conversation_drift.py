"""A conversation is played with everything before as context, measured by the plain model, and its trend is a slope with its interval."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch

from relseek_assets.axes import drift
from relseek_assets.axes.interventions import Axis, conditions, settings_of
from relseek_assets.persona_set import DriftConversation
from relseek_resources.models import Floor, Sampling

SYSTEM = "Be kind."
TALKS = (
    DriftConversation("a", "coding", ("How do I sort?", "And backwards?", "Thanks.")),
    DriftConversation("b", "therapy", ("I am sad.", "Stay with me.")),
)


@pytest.fixture
def axis() -> Axis:
    generator = np.random.default_rng(0)
    units = generator.normal(size=(4, 64))
    units /= np.linalg.norm(units, axis=1, keepdims=True)
    return Axis(units.astype(np.float32), 2, 5.0, generator.normal(0, 20, (50, 4)))


def played(model, axis: Axis, turns: int = 3) -> pd.DataFrame:
    settings = settings_of(axis, conditions((), (90,)), [1, 2])
    return drift.play(model, axis, TALKS, settings, Sampling(max_new_tokens=6), system=SYSTEM, turns=turns, seed=4)


def test_every_turn_is_answered_with_the_whole_conversation_before_it(tiny_llama, axis):
    frame = played(tiny_llama, axis)
    assert len(frame) == 2 * (3 + 2) and set(frame["condition"]) == {"none", "floor p90"}
    for (name, condition), talk in frame.groupby(["conversation", "condition"]):
        history = [{"role": "system", "content": SYSTEM}]
        turns = next(one.turns for one in TALKS if one.conversation == name)
        for row, user in zip(talk.sort_values("turn").itertuples(), turns, strict=True):
            history.append({"role": "user", "content": user})
            limits = np.percentile(axis.ordinary, 90, axis=0)
            floors = [] if condition == "none" else [Floor(axis.units[layer], layer, limits[layer]) for layer in (1, 2)]
            with tiny_llama.intervene(floors):
                (reply,) = tiny_llama.generate([history], Sampling(max_new_tokens=6), seeds=[row.seed])
            assert row.reply == reply.text and row.tokens == len(reply.tokens)
            history.append({"role": "assistant", "content": reply.text})


def test_a_projection_is_the_mean_over_the_replys_tokens_read_by_the_plain_model(tiny_llama, axis):
    frame = played(tiny_llama, axis)
    checked = 0
    for _, talk in frame.groupby(["conversation", "condition"]):
        history = [{"role": "system", "content": SYSTEM}]
        for row in talk.sort_values("turn").itertuples():
            history.append({"role": "user", "content": row.user})
            prompt, reply = tiny_llama.prompt_tokens(history), tiny_llama.reply_tokens(row.reply, end=False)
            if reply:
                ids = torch.tensor([[*prompt, *reply]])
                with torch.no_grad():
                    stream = tiny_llama.model(input_ids=ids, output_hidden_states=True).hidden_states[3][0, len(prompt) :]
                expected = float((stream @ torch.tensor(axis.units[2])).mean())
                assert row.projection == pytest.approx(expected, abs=1e-3)
                assert row.percentile == pytest.approx(100 * np.mean(axis.ordinary[:, 2] < row.projection))
                checked += 1
            history.append({"role": "assistant", "content": row.reply})
    assert checked > 5
    drift.DRIFT.to_arrow(frame.assign(model="m"), "test")


def test_the_number_of_turns_can_be_bounded_and_conversations_may_end_earlier(tiny_llama, axis):
    frame = played(tiny_llama, axis, turns=1)
    assert frame["turn"].tolist() == [1] * 4
    assert played(tiny_llama, axis).groupby("conversation")["turn"].max().to_dict() == {"a": 3, "b": 2}


def test_a_reply_without_tokens_has_no_projection(tiny_llama, axis):
    asked = [[{"role": "user", "content": "Hi"}]] * 2
    found = drift.reply_projections(tiny_llama, axis, asked, ["", "well"])
    assert np.isnan(found[0]) and np.isfinite(found[1])


def test_trends_are_least_squares_slopes_with_students_t_over_conversations():
    slopes = {"c1": -1.0, "c2": -2.0, "t1": -4.0, "t2": -6.0}
    rows = [
        {
            "kind": "coding" if name[0] == "c" else "therapy",
            "conversation": name,
            "condition": condition,
            "turn": turn,
            "projection": 5 + slope * turn,
        }
        for name, base in slopes.items()
        for condition, slope in (("none", base), ("floor p25", base / 2))
        for turn in range(1, 6)
    ]
    frame = drift.trends(pd.DataFrame(rows)).set_index(["condition", "kind"])
    drift.DRIFT_TRENDS.to_arrow(frame.reset_index().assign(model="m"), "test")
    whole = frame.loc[("none", "all")]
    assert whole["slope"] == pytest.approx(-3.25) and whole["n"] == 4 and whole["df"] == 3
    se = np.std([-1, -2, -4, -6], ddof=1) / 2
    assert whole["se"] == pytest.approx(se)
    assert (whole["lower"], whole["upper"]) == pytest.approx((-3.25 - 3.182446 * se, -3.25 + 3.182446 * se), rel=1e-5)
    assert frame.loc[("none", "therapy"), "slope"] == pytest.approx(-5)
    assert frame.loc[("floor p25 − none", "all"), "slope"] == pytest.approx(3.25 / 2)


def test_one_conversation_of_a_kind_has_a_slope_and_no_interval():
    rows = [{"kind": "coding", "conversation": "c", "condition": "none", "turn": turn, "projection": 2.0 * turn} for turn in (1, 2, 3)]
    frame = drift.trends(pd.DataFrame(rows))
    assert frame["slope"].tolist() == pytest.approx([2.0, 2.0]) and frame["lower"].isna().all()
