"""A token is drawn from the softmax of its logits, cut to the nucleus, by one uniform number of the row's own."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from relseek_resources.models import Sampling
from relseek_resources.models.sampling import draw, uniforms

LOGITS = np.array([1.3, -0.2, 0.4, 2.0, -1.5, 0.0, 0.9, -3.0])


def softmax(logits: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    weights = np.exp(logits / temperature)
    return weights / weights.sum()


def drawn(logits: np.ndarray, uniform: np.ndarray, **sampling: float) -> np.ndarray:
    rows = torch.tensor(logits, dtype=torch.float32).expand(len(uniform), -1)
    return draw(rows, torch.from_numpy(uniform), Sampling(**sampling)).numpy()


def p_value(tokens: np.ndarray, probabilities: np.ndarray) -> float:
    return chisquare(np.bincount(tokens, minlength=len(probabilities)), probabilities * len(tokens)).pvalue


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_tokens_are_drawn_as_often_as_the_softmax_at_the_temperature_says(temperature):
    tokens = drawn(LOGITS, uniforms(list(range(400)), 100).ravel(), temperature=temperature)
    assert p_value(tokens, softmax(LOGITS, temperature)) > 0.01
    assert p_value(tokens, softmax(LOGITS, temperature * 1.1)) < 1e-6, "40,000 draws tell a temperature from one 10 % higher"


def test_the_draws_of_the_first_step_over_many_rows_are_uniform_too():
    first_steps = uniforms(list(range(20_000)), 1).ravel()
    assert p_value(drawn(LOGITS, first_steps), softmax(LOGITS)) > 0.01


def test_inside_the_nucleus_probabilities_keep_their_proportions():
    probabilities = softmax(LOGITS)
    nucleus = np.argsort(-probabilities)[:3]
    top_p = probabilities[nucleus[:2]].sum() + 0.01
    expected = probabilities[nucleus] / probabilities[nucleus].sum()
    tokens = drawn(LOGITS, uniforms(list(range(200)), 100).ravel(), top_p=top_p)
    assert set(tokens) == set(nucleus)
    assert chisquare([np.sum(tokens == token) for token in nucleus], expected * len(tokens)).pvalue > 0.01


@pytest.mark.parametrize(
    ("top_p", "nucleus"), [(0.49, {2}), (0.51, {2, 0}), (0.79, {2, 0}), (0.81, {2, 0, 3}), (0.96, {2, 0, 3, 1}), (1.0, {2, 0, 3, 1})]
)
def test_the_nucleus_of_known_probabilities(top_p, nucleus):
    grid = np.linspace(0, 1, 2001)[:-1]
    assert set(drawn(np.log([0.3, 0.05, 0.5, 0.15]), grid, top_p=top_p)) == nucleus


@settings(deadline=None, max_examples=60)
@given(st.lists(st.floats(-6, 6), min_size=2, max_size=12, unique=True), st.floats(0.05, 0.999))
def test_top_p_keeps_exactly_the_fewest_most_likely_tokens_that_reach_it(logits, top_p):
    probabilities = softmax(np.float64(np.float32(logits)))
    ranked = sorted(range(len(logits)), key=lambda token: -probabilities[token])
    masses = np.cumsum(probabilities[ranked])
    if np.abs(masses - top_p).min() < 1e-9:
        return  # rounding may decide either way
    nucleus = ranked[: int(np.argmax(masses >= top_p)) + 1] if masses[-1] >= top_p else ranked
    found = set(drawn(np.array(logits), np.linspace(0, 1, 4001)[:-1], top_p=top_p).tolist())
    assert found <= set(nucleus)
    share = probabilities / probabilities[nucleus].sum()
    assert {token for token in nucleus if share[token] > 1e-3} <= found


@settings(deadline=None, max_examples=60)
@given(st.lists(st.floats(-200, 200, width=32), min_size=2, max_size=12), st.sampled_from([0.3, 0.9, 1.0]))
def test_the_smallest_and_largest_uniform_never_draw_an_impossible_token(logits, top_p):
    uniform = np.array([0.0, np.nextafter(1.0, 0.0)])
    probabilities = softmax(np.float64(logits) - max(logits))
    for token in drawn(np.array(logits), uniform, top_p=top_p):
        assert probabilities[token] > 0


def test_temperature_zero_takes_the_likeliest_token_whatever_the_uniform():
    assert set(drawn(LOGITS, np.linspace(0, 0.999, 50), temperature=0)) == {3}


@pytest.mark.parametrize("temperature", [1e-300, 1e-308, 5e-324])
def test_the_smallest_temperatures_take_the_likeliest_token_too(temperature):
    logits = torch.randn(8, 50, generator=torch.Generator().manual_seed(0)) * 10
    found = draw(logits, torch.full((8,), 0.999, dtype=torch.float64), Sampling(temperature))
    assert found.tolist() == logits.argmax(-1).tolist()


def test_a_rows_uniforms_depend_on_its_seed_alone():
    together = uniforms([11, 12, 11], 6)
    assert np.array_equal(together[0], together[2])
    assert not np.array_equal(together[0], together[1])
    assert np.array_equal(uniforms([12], 6)[0], together[1])
    assert np.array_equal(uniforms([12], 3)[0], together[1, :3]), "a shorter reply is the beginning of a longer one"


@pytest.mark.parametrize("settings", [{"temperature": -0.1}, {"top_p": 0.0}, {"top_p": 1.1}, {"max_new_tokens": 0}])
def test_impossible_settings_are_refused_by_name(settings):
    (name,) = settings
    with pytest.raises(ValueError, match=name):
        Sampling(**settings)
