"""The running batch and the embedded engine: what a request gets does not depend on who else is there."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from relseek_resources.models import Sampling, SteeredModel
from relseek_resources.serving import requests
from relseek_resources.serving.engine import Busy, Engine, EngineError, Request, RequestError, Text
from relseek_resources.serving.running import CHUNK, Prompts, RunningBatch
from relseek_resources.serving.vectors import Configuration, Vectors
from tests.serving.embedded import engine_of, written_vectors
from tests.serving.reference import hooked, shortfall

LAYERS = (1, 2)


def drawn_steering(rng: random.Random) -> list[dict[str, Any]]:
    """None to three interventions of every mode, some of which do nothing."""

    def one() -> dict[str, Any]:
        name = rng.choice(["warm", "many"])
        layers = sorted(rng.sample(LAYERS, rng.choice([1, 2])))
        mode = rng.choice(["add", "add", "floor", "ceiling", "ablate"])
        if mode == "add":
            return {"vector": name, "layers": layers, "multiplier": rng.choice([0, -1, rng.uniform(-1, 1)])}
        if mode == "ablate":
            return {"vector": name, "layers": layers, "mode": mode, "strength": rng.choice([0, 1, rng.random()])}
        return {"vector": name, "layers": layers, "mode": mode, "threshold": [rng.uniform(-1, 1) for _ in layers]}

    return [one() for _ in range(rng.choice([0, 1, 1, 2, 3]))]


@pytest.fixture
def offered(tmp_path: Path) -> Callable[[SteeredModel], tuple[Configuration, dict[str, dict[int, np.ndarray]]]]:
    def of(model: SteeredModel) -> tuple[Configuration, dict[str, dict[int, np.ndarray]]]:
        vectors = written_vectors(tmp_path, model.width, LAYERS)
        return Configuration(tmp_path, {name: f"{name}.safetensors" for name in vectors}, {"vector": "warm"}), vectors

    return of


def prompt(rng: random.Random, length: int) -> tuple[int, ...]:
    return tuple(rng.randrange(6, 200) for _ in range(length))


def test_rows_that_come_and_go_are_answered_as_alone(tiny: Any, offered: Any) -> None:
    configuration, vectors = offered(tiny)
    known, rng = Vectors(configuration, tiny.layers, tiny.width), random.Random(0)
    lengths = [3, 7, 40, 130, CHUNK + 30, 5, 60, 9, 20, 33]
    asked = [(prompt(rng, length), drawn_steering(rng)) for length in lengths]
    texts = [requests.canonical(requests.read(steering, known)) for _, steering in asked]
    batch = RunningBatch(tiny, rows=8)
    for digest, vector in known.by_digest().items():
        batch.tables.register(digest, vector)
    live: list[int] = []
    replies: dict[int, list[int]] = {}
    waiting = list(range(len(asked)))
    while live or waiting:
        if waiting and len(live) < 6 and rng.random() < 0.6:
            taken = [waiting.pop(0) for _ in range(min(len(waiting), rng.choice([1, 2])))]
            prompts, logits = Prompts([asked[one][0] for one in taken], [texts[one] for one in taken]), None
            while logits is None:
                logits = batch.advance(prompts)
            live += taken
            replies |= {one: [token] for one, token in zip(taken, logits.argmax(-1).tolist(), strict=True)}
        elif live:
            logits = batch.step([replies[one][-1] for one in live])
            for one, token in zip(live, logits.argmax(-1).tolist(), strict=True):
                replies[one].append(token)
        for one in [one for one in live if len(replies[one]) >= rng.choice([4, 9, 14])]:
            place, last = live.index(one), live.pop()
            batch.leave(place)
            if place < len(live):
                live[place] = last
    batch.close()
    for one, (tokens, steering) in enumerate(asked):
        _, short = shortfall(tiny, list(tokens), replies[one], hooked(steering, vectors))
        assert short.max() < 1e-4, f"request {one}: a token that the hooked model does not draw"


def test_columns_that_run_out_are_moved(tiny_llama: Any) -> None:
    first = prompt(random.Random(1), 10)
    expected = tiny_llama.generate_tokens([first], Sampling(temperature=0, max_new_tokens=150))[0].tokens
    batch = RunningBatch(tiny_llama, rows=2)
    logits = batch.advance(Prompts([first], [""]))
    found: list[int] = []
    for step in range(len(expected)):
        found.append(int(logits[0].argmax()))
        if step == 40:  # longer than what the running row has behind it, and than the columns that are free
            newcomer, joined = Prompts([prompt(random.Random(2), 200)], [""]), None
            while joined is None:
                joined = batch.advance(newcomer)
        tokens = [found[-1], 7] if step >= 40 else [found[-1]]
        logits = batch.step(tokens)
    batch.close()
    assert tuple(found) == expected


def test_nan_left_by_a_row_does_not_reach_the_one_that_takes_its_place(tiny_llama: Any) -> None:
    rng = random.Random(3)
    batch = RunningBatch(tiny_llama, rows=2)
    batch.advance(Prompts([prompt(rng, 30), prompt(rng, 30)], ["", ""]))
    with torch.inference_mode():
        for block in batch.rows.layers:
            block.keys[1], block.values[1] = torch.nan, torch.nan
    batch.leave(1)
    batch.advance(Prompts([prompt(rng, 4)], [""]))
    assert torch.isfinite(batch.step([7, 7])).all()
    batch.close()


# --- the engine ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def engine(tiny_llama: Any, offered: Any) -> Iterator[Engine]:
    with engine_of(tiny_llama, offered(tiny_llama)[0], rows=4) as found:
        yield found


def at_once(engine: Engine, asked: list[Request]) -> list[Any]:
    async def all_of_them() -> list[Any]:
        return await asyncio.gather(*(engine.reply(one) for one in asked), return_exceptions=True)

    return asyncio.run(all_of_them())


def test_a_seed_gives_the_same_text_whoever_is_beside_it(engine: Engine, tiny_llama: Any) -> None:
    rng = random.Random(0)
    asked = [
        Request(prompt(rng, rng.randrange(2, 60)), 20, temperature=rng.choice([0.5, 1.0]), top_p=rng.choice([0.8, 1.0]), seed=n) for n in range(12)
    ]
    together = at_once(engine, asked)
    for one, reply in zip(asked, together, strict=True):
        [alone] = tiny_llama.generate_tokens([one.prompt], Sampling(one.temperature, one.top_p, 20), seeds=[one.seed])
        assert reply.text == alone.text
        assert reply.finished == ("stop" if alone.finished else "length") and reply.completion_tokens == len(alone.tokens)


def test_without_a_seed_two_replies_differ(engine: Engine) -> None:
    one, other = at_once(engine, [Request((7, 8, 9), 30)] * 2)
    assert one.text != other.text


def test_log_probabilities_are_those_of_the_steered_model(engine: Engine, tiny_llama: Any) -> None:
    entries = requests.read([{"vector": "warm", "multiplier": 0.5}], engine.vectors)
    asked = Request((7, 8, 9), 12, requests.canonical(entries), temperature=0, top_log_probs=3)
    [reply] = at_once(engine, [asked])
    with tiny_llama.steer(engine.vectors.by_name["warm"].at(1), 1, 0.5):
        [alone] = tiny_llama.generate_tokens([asked.prompt], Sampling(temperature=0, max_new_tokens=12))
    assert [token.id for token in reply.tokens] == list(alone.tokens)
    assert [token.log_prob for token in reply.tokens] == pytest.approx(alone.log_probs, abs=1e-4)
    assert all(token.top[0] == (token.id, token.log_prob) and len(token.top) == 3 for token in reply.tokens)


def test_a_dose_of_nothing_is_the_plain_model_to_the_last_bit(engine: Engine) -> None:
    zero = requests.canonical(requests.read([{"vector": "warm", "multiplier": 0}], engine.vectors))
    plain, nothing = (at_once(engine, [Request((7, 8, 9), 12, text, temperature=0, top_log_probs=5)])[0] for text in ("", zero))
    assert plain == nothing


def test_logits_that_are_not_finite_fail_their_own_request_alone(tiny_llama: Any, offered: Any) -> None:
    with engine_of(tiny_llama, offered(tiny_llama)[0]) as engine:
        digest = engine.vectors.by_name["warm"].digest(1)
        bad = requests.canonical([requests.Entry(1, "add", digest, float("inf"))])
        asked = [Request((7, 8, 9), 6, text, temperature=0) for text in ("", bad, "")]
        first, broken, third = at_once(engine, asked)
        assert isinstance(broken, RequestError) and "not finite" in str(broken)
        assert first == third == at_once(engine, asked[:1])[0]


def test_more_than_fits_is_refused_and_said_to_be(engine: Engine) -> None:
    engine.most_waiting = 3

    async def ask() -> int:
        tickets = engine.submit([Request((7,), 400)] * 3)
        with pytest.raises(Busy) as found:
            engine.submit([Request((7,), 400)] * 4)
        for ticket in tickets:
            ticket.cancel()
        return found.value.seconds

    assert asyncio.run(ask()) >= 1


@pytest.mark.parametrize(("tokens", "limit", "says"), [((), 5, "without tokens"), ((7,) * 600, 5, "at most 512"), ((7,), 512, "at most 512")])
def test_what_does_not_fit_is_refused(engine: Engine, tokens: tuple[int, ...], limit: int, says: str) -> None:
    with pytest.raises(RequestError, match=says):
        asyncio.run(engine.reply(Request(tokens, limit)))


def test_a_client_that_goes_away_frees_its_row(engine: Engine) -> None:
    async def ask() -> None:
        waiting = [asyncio.ensure_future(engine.reply(Request((7, 8), 500))) for _ in range(8)]  # four run, four wait
        await asyncio.sleep(0.05)
        for one in waiting:
            one.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        await asyncio.wait_for(engine.reply(Request((9,), 2)), 5)

    asyncio.run(ask())
    deadline = time.monotonic() + 5
    while engine._live:
        assert time.monotonic() < deadline, "the rows of clients that went away are still running"
        time.sleep(0.01)
    assert not engine._batch.rows.lengths


def test_a_fault_fails_what_is_under_way_and_the_engine_goes_on(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = [Request((7, 8, 9), 5, temperature=0)]
    before = at_once(engine, asked)
    with monkeypatch.context() as patch:
        patch.setattr(engine._batch, "step", lambda tokens: 1 / 0)
        [failed] = at_once(engine, asked)
    assert isinstance(failed, EngineError) and "division" not in str(failed)
    assert at_once(engine, asked) == before


def test_a_closed_engine_says_so(engine: Engine) -> None:
    engine.close()
    [answer] = at_once(engine, [Request((7,), 1)])
    assert isinstance(answer, EngineError) and not engine.alive


@pytest.mark.parametrize("steering", [[], [{"vector": "warm", "multiplier": 0.7}]])
def test_a_replys_projection_is_that_of_the_hooked_model(engine: Engine, tiny_llama: Any, steering: list[dict[str, Any]]) -> None:
    said, reply = [{"role": "user", "content": "How are you? " * 30}], "Well, thank you."
    text = requests.canonical(requests.read(steering, engine.vectors))
    found = asyncio.run(engine.projection(said, reply, text, "many", 2))
    many = engine.vectors.by_name["many"].at(2)
    with tiny_llama.steer(engine.vectors.by_name["warm"].at(1), 1, 0.7 if steering else 0.0):
        expected = tiny_llama.projections([said], many, [2], [reply])[0, 0]
    assert found == pytest.approx(float(expected), abs=1e-4)


# --- text ---------------------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(st.text(max_size=40), st.lists(st.text(min_size=1, max_size=4), max_size=3))
def test_pieces_make_up_the_text_before_the_first_stop(byte_tokenizer: Any, text: str, stop: list[str]) -> None:
    tokens = byte_tokenizer(text, add_special_tokens=False)["input_ids"]
    spoken, pieces = Text(lambda ids: byte_tokenizer.decode(ids, skip_special_tokens=True), stop), []
    stopped = False
    for token in tokens:
        stopped = spoken.add(token)
        pieces.append(spoken.given(whole=stopped))
        if stopped:
            break
    if not stopped:
        pieces.append(spoken.given(whole=True))
    whole = byte_tokenizer.decode(tokens, skip_special_tokens=True)
    ends = [whole.find(one) for one in stop if one in whole]
    assert "".join(pieces) == (whole[: min(ends)] if ends else whole)
    assert "\ufffd" in text or not any("\ufffd" in piece for piece in pieces)  # no half characters
