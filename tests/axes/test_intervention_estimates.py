"""Conditions say what they do in the axis' own units, rows of a batch get their own, and estimates are those of the judged replies."""

from __future__ import annotations

import math
from collections import Counter
from itertools import product

import numpy as np
import pandas as pd
import pytest
import torch

from relseek_assets import intervention_figures
from relseek_assets.axes import interventions
from relseek_assets.axes.interventions import (
    ADD,
    FLOOR,
    NONE,
    Axis,
    Condition,
    axis_of,
    comparison,
    conditions,
    most_at_loss,
    settings_of,
    spread,
    summary,
)
from relseek_assets.persona_set import PersonaSetError, Prompt
from relseek_assets.stage import plot
from relseek_resources.models import Sampling

LAYERS, WIDTH = 4, 64


def units(seed: int = 0) -> np.ndarray:
    found = np.random.default_rng(seed).normal(size=(LAYERS, WIDTH))
    return (found / np.linalg.norm(found, axis=1, keepdims=True)).astype(np.float32)


def activations(axis: np.ndarray, assistant: np.ndarray, gap: float) -> np.ndarray:
    """Rows whose projections are known: 10 + row at every layer, assistants `gap` further at layer 2."""
    generator = np.random.default_rng(1)
    across = generator.normal(size=(len(assistant), LAYERS, WIDTH))
    across -= np.einsum("rlw,lw->rl", across, axis)[:, :, None] * axis
    place = 10.0 + np.arange(len(assistant))[:, None] * np.ones(LAYERS)
    place[:, 2] += gap * assistant
    return (across + place[:, :, None] * axis).astype(np.float32)


@pytest.fixture
def axis() -> Axis:
    direction, assistant = units(), np.array([True] * 5 + [False] * 5)
    return axis_of(direction, 2, activations(direction, assistant, gap=8.0), assistant)


def test_prompts_are_taken_from_every_kind_alike():
    prompts = [Prompt(f"{kind}-{number}", kind, "?") for kind in ("factual", "advice", "creative") for number in range(4)]
    assert Counter(one.kind for one in spread(prompts, 6)) == {"factual": 2, "advice": 2, "creative": 2}
    assert [one.prompt for one in spread(prompts, 4)] == ["factual-0", "advice-0", "creative-0", "factual-1"]
    with pytest.raises(PersonaSetError, match="asks for 13 prompts and there are 12"):
        spread(prompts, 13)


def test_an_axis_is_measured_by_its_projections(axis):
    # rows 0 to 4 are assistants: 10 to 14, and 8 further at layer 2; rows 5 to 9 are others
    assert axis.gap == pytest.approx(12 + 8 - 17, abs=1e-4)
    np.testing.assert_allclose(axis.ordinary[:, [0, 2]], [[10.0 + row, 18.0 + row] for row in range(5)], atol=1e-4)


def test_an_axis_that_points_the_other_way_is_refused():
    direction, assistant = units(), np.array([True] * 5 + [False] * 5)
    with pytest.raises(ValueError, match="layer 2.*do not project further.*choose another layer"):
        axis_of(direction, 2, activations(direction, assistant, gap=0.0), assistant)


def test_a_strength_is_so_many_gaps_and_a_floor_a_percentile_of_ordinary_replies_layer_by_layer(axis):
    none, half, quarter = settings_of(axis, conditions((0.5,), (25,)), [1, 2])
    assert [one.condition.name for one in (none, half, quarter)] == ["none", "add 0.5", "floor p25"]
    assert none.multiplier == 0 and none.thresholds is None and none.layers == ()
    assert half.multiplier == pytest.approx(0.5 * axis.gap) and half.layers == (2,) and half.thresholds is None
    assert quarter.thresholds == pytest.approx((11.0, 19.0), abs=1e-4) and quarter.layers == (1, 2) and quarter.multiplier == 0


def test_rows_of_different_conditions_answer_as_if_each_were_alone(tiny_llama):
    direction = units(3)
    ordinary = np.random.default_rng(2).normal(0, 30, (20, LAYERS))
    axis = Axis(direction, 1, 12.0, ordinary)
    wanted = settings_of(axis, conditions((1, 4), (60, 95)), [1, 2])
    asked = [[{"role": "user", "content": text}] for text in ("Hi", "How do I bake bread?")]
    rows = [(question, setting) for question in asked for setting in wanted]
    greedy = Sampling(temperature=0, max_new_tokens=8)
    with tiny_llama.intervene(interventions.of_rows(axis, [setting for _, setting in rows])):
        together = tiny_llama.generate([question for question, _ in rows], greedy, batch_size=7)
    for (question, setting), reply in zip(rows, together, strict=True):
        with tiny_llama.intervene(interventions.of_rows(axis, [setting])):
            (alone,) = tiny_llama.generate([question], greedy)
        assert reply.tokens == alone.tokens
        np.testing.assert_allclose(reply.log_probs, alone.log_probs, atol=1e-4)
    (plain,) = tiny_llama.generate([asked[0]], greedy)
    assert together[0].log_probs == pytest.approx(plain.log_probs, abs=1e-4)
    assert len({tuple(reply.log_probs) for reply in together[:5]}) == 5, "every condition must do something of its own"


def test_no_intervention_in_a_whole_call_registers_no_hook(tiny_llama, axis):
    hooks = [list(block._forward_hooks) for block in tiny_llama.blocks]
    with tiny_llama.intervene(interventions.of_rows(axis, settings_of(axis, [Condition(NONE)], [1, 2]) * 3)):
        assert [list(block._forward_hooks) for block in tiny_llama.blocks] == hooks


def test_an_addition_moves_the_projection_by_its_gaps(tiny_llama, axis):
    (setting,) = settings_of(axis, [Condition(ADD, 2.0)], [1])
    asked = [[{"role": "user", "content": "Hi"}]]
    before = tiny_llama.projections(asked, axis.units[2], [2])[0, 0]
    with tiny_llama.intervene(interventions.of_rows(axis, [setting])):
        after = tiny_llama.projections(asked, axis.units[2], [2])[0, 0]
    assert after - before == pytest.approx(2 * axis.gap, abs=1e-3)
    assert torch.isfinite(torch.tensor(after))


# --- estimates --------------------------------------------------------------------------------------------------------

PERSONAS, PROMPTS = [f"p{number}" for number in range(5)], [f"q{number:02d}" for number in range(30)]


def judged(means: dict[tuple[str, float], tuple[float, float]], noise: float = 0.3, seed: int = 0) -> pd.DataFrame:
    """Scores of replies whose conditions have these mean likenesses and coherences; a persona and a prompt shift all conditions alike."""
    generator = np.random.default_rng(seed)
    shift = {name: generator.normal(0, noise, 2) for name in (*PERSONAS, *PROMPTS)}
    rows = []
    for (kind, amount), (prompt, persona) in product(means, product(PROMPTS, PERSONAS)):
        likeness, coherence = np.array(means[kind, amount]) + shift[prompt] + shift[persona] + generator.normal(0, noise, 2)
        keys = {"model": "m", "condition": Condition(kind, amount).name, "intervention": kind, "amount": amount, "prompt": prompt, "persona": persona}
        rows.append({**keys, "likeness": float(np.clip(likeness, 0, 10)), "coherence": float(np.clip(coherence, 1, 10)), "perplexity": 5.0})
    return pd.DataFrame(rows)


FLOOR_WINS = {(NONE, 0.0): (3, 8), (ADD, 1.0): (4, 7), (ADD, 2.0): (5, 4), (FLOOR, 25.0): (6, 7.8), (FLOOR, 50.0): (7, 6.5)}


def test_a_summary_gives_means_and_paired_changes():
    scores = judged(FLOOR_WINS)
    frame = summary(scores, draws=300, seed=1).set_index("condition")
    interventions.INTERVENTION_SUMMARY.to_arrow(frame.reset_index(), "test")
    assert list(frame.index) == ["none", "add 1", "add 2", "floor p25", "floor p50"]
    wide = scores.pivot_table(index=["prompt", "persona"], columns="condition", values="likeness")
    for condition, row in frame.iterrows():
        assert row["likeness"] == pytest.approx(wide[condition].mean())
        assert row["likeness_change"] == pytest.approx((wide[condition] - wide["none"]).mean())
        assert row["likeness_lower"] < row["likeness"] < row["likeness_upper"]
        assert (row["n"], row["prompts"], row["personas"], row["empty"]) == (150, 30, 5, 0)
    assert frame.loc["none", ["likeness_change", "likeness_change_lower", "likeness_change_upper"]].tolist() == [0, 0, 0]
    widths = {name: frame.loc["add 1", f"{name}_upper"] - frame.loc["add 1", f"{name}_lower"] for name in ("likeness", "likeness_change")}
    assert widths["likeness_change"] < widths["likeness"] / 2, "pairing takes out what personas and prompts share"


def test_an_empty_reply_has_no_likeness_and_counts_as_such():
    scores = judged(FLOOR_WINS)
    gone = scores.index[(scores["condition"] == "add 2") & (scores["persona"] == "p1")]
    scores.loc[gone, ["likeness", "coherence"]] = np.array([np.nan, 1.0])
    frame = summary(scores, draws=200, seed=1).set_index("condition")
    there = scores[(scores["condition"] == "add 2") & scores["likeness"].notna()]
    assert frame.loc["add 2", "empty"] == 30 and frame.loc["add 2", "n"] == 150
    assert frame.loc["add 2", "likeness"] == pytest.approx(there["likeness"].mean())


@pytest.mark.parametrize(
    ("means", "finding"),
    [
        (FLOOR_WINS, FLOOR),
        (
            {(k, a): FLOOR_WINS[f] for (k, a), f in zip([(NONE, 0.0), (FLOOR, 1.0), (FLOOR, 25.0), (ADD, 0.5), (ADD, 1.0)], FLOOR_WINS, strict=True)},
            ADD,
        ),
    ],
)
def test_the_comparison_finds_which_keeps_more_likeness_at_matched_coherence(means, finding):
    frame = comparison(judged(means), draws=300, seed=1)
    interventions.INTERVENTION_COMPARISON.to_arrow(frame, "test")
    assert (frame[frame["loss"].between(0.5, 1.0)]["finding"] == finding).all()
    row = frame.set_index("loss").loc[1.0]
    better, worse = (FLOOR, ADD) if finding == FLOOR else (ADD, FLOOR)
    assert row[better] == pytest.approx(6 + 0.8 / 1.3, abs=0.3) and row[worse] == pytest.approx(4, abs=0.3)
    assert row["difference"] == pytest.approx(row["floor"] - row["add"])


def test_where_one_never_costs_so_much_coherence_nothing_is_found():
    frame = comparison(judged(FLOOR_WINS), draws=300, seed=1).set_index("loss")
    assert frame.loc[2.0, "floor_loss"] == pytest.approx(1.5, abs=0.3) and frame.loc[2.0, "add_loss"] == pytest.approx(4.0, abs=0.3)
    assert frame.loc[2.0, "finding"] == "unmatched" and frame.loc[2.0, "difference_lower"] > 0


def test_where_both_do_the_same_the_finding_is_open():
    same = {(NONE, 0.0): (3, 8), (ADD, 1.0): (5, 7.5), (ADD, 2.0): (6, 5), (FLOOR, 25.0): (5, 7.5), (FLOOR, 50.0): (6, 5)}
    frame = comparison(judged(same), draws=300, seed=1)
    assert (frame["finding"] == "open").all() and (frame["difference"].abs() < 0.3).all()


def test_an_intervention_that_only_harms_offers_what_no_intervention_has():
    harm = {(NONE, 0.0): (3, 8), (ADD, 1.0): (2, 4), (FLOOR, 25.0): (1, 2)}
    scores = judged(harm, noise=0.0)
    frame = comparison(scores, draws=100, seed=1)
    assert frame["floor"].tolist() == frame["add"].tolist() == [3.0] * len(frame)


def test_most_likeness_at_a_loss_is_found_on_the_straight_lines_between_strengths():
    coherence, likeness = np.array([[8.0, 7.0, 4.0, 7.5]]), np.array([[3.0, 4.0, 10.0, 2.0]])
    grid = np.linspace(0, 3, 300001)
    path = np.interp(grid, range(4), coherence[0]), np.interp(grid, range(4), likeness[0])
    for loss in (0.0, 0.25, 1.0, 2.5, 4.0, 9.0):
        expected = path[1][path[0] >= 8.0 - loss].max()
        assert most_at_loss(coherence, likeness, loss)[0] == pytest.approx(expected, abs=1e-3)
    assert math.isclose(most_at_loss(coherence, likeness, 2.5)[0], 7.0)


def silenced(scores: pd.DataFrame, *conditions: str) -> pd.DataFrame:
    """The same with every reply of these conditions empty: the worst coherence and no likeness."""
    scores.loc[scores["condition"].isin(conditions), ["likeness", "coherence"]] = np.array([np.nan, 1.0])
    return scores


def drawable(scores: pd.DataFrame) -> pd.DataFrame:
    """The comparison, stored and drawn as the assets do it, and so is the summary."""
    frame, means = comparison(scores, draws=100, seed=1), summary(scores, draws=100, seed=1)
    interventions.INTERVENTION_COMPARISON.to_arrow(frame, "test")
    interventions.INTERVENTION_SUMMARY.to_arrow(means, "test")
    for figure in (intervention_figures.matched_coherence(frame), *(draw(means) for draw in DRAWN)):
        plot(figure)
    return frame.set_index("loss")


DRAWN = (intervention_figures.likeness_against_coherence, intervention_figures.by_strength)


def test_a_strength_that_leaves_every_reply_empty_offers_nothing():
    frame = drawable(silenced(judged(FLOOR_WINS), "add 2"))
    without = drawable(judged({key: mean for key, mean in FLOOR_WINS.items() if key != (ADD, 2.0)}))
    for loss in (0.0, 0.25, 0.5):
        assert (
            frame.loc[loss, "finding"] in (FLOOR, "open") and np.isfinite(frame.loc[loss, ["floor", "add", "difference_lower"]].astype(float)).all()
        )
    # what is left of additions costs a point at most: `add 1`
    assert frame["add_loss"].iloc[0] == pytest.approx(1.0, abs=0.3) and without["add_loss"].iloc[0] == pytest.approx(1.0, abs=0.3)
    assert frame.loc[2.0, "finding"] == without.loc[2.0, "finding"] == "unmatched"


def test_where_one_intervention_only_silences_nothing_is_found_beyond_no_loss():
    frame = drawable(silenced(judged(FLOOR_WINS), "floor p25", "floor p50"))
    assert frame["floor_loss"].tolist() == [0.0] * len(frame)
    assert (frame.loc[frame.index > 0, "finding"] == "unmatched").all()
    assert frame["floor"].tolist() == pytest.approx([frame["floor"].iloc[0]] * len(frame)), "what no intervention has"


@pytest.mark.parametrize("silent", [("none",), tuple(Condition(*key).name for key in FLOOR_WINS)], ids=["none", "all"])
def test_where_no_intervention_leaves_no_text_nothing_is_found(silent):
    frame = drawable(silenced(judged(FLOOR_WINS), *silent))
    assert (frame["finding"] == "unmatched").all() and (frame[["floor_loss", "add_loss"]] == 0).all(axis=None)
    assert frame["difference"].isna().all() == (silent != ("none",))


def test_scores_of_a_judge_elsewhere_go_through_the_same_estimates_as_csv(tmp_path):
    scores = silenced(judged(FLOOR_WINS), "add 2").drop(columns="perplexity")
    scores.to_csv(tmp_path / "scored.csv", index=False)
    read = pd.read_csv(tmp_path / "scored.csv")
    for estimate in (summary, comparison):
        pd.testing.assert_frame_equal(estimate(read, draws=50, seed=0), estimate(scores, draws=50, seed=0))


def test_lines_to_a_point_without_likeness_are_not_walked_along():
    coherence, likeness = np.array([[8.0, 7.0, 1.0, 5.0, 9.0]] * 2), np.array([[3.0, 4.0, np.nan, 9.0, 2.0], [np.nan] * 5])
    found = [most_at_loss(coherence, likeness, loss) for loss in (0.0, 1.5, 3.0)]
    # at a loss of 1.5, the line from (5, 9) to (9, 2) is entered at 6.5: 9 - 1.5 / 4 * 7
    assert [float(one[0]) for one in found] == pytest.approx([9 - 3 / 4 * 7, 9 - 1.5 / 4 * 7, 9.0])
    assert np.isnan([one[1] for one in found]).all()
