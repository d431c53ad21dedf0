"""Prices of judges: the dated table, and bills compared with arithmetic by hand."""

from __future__ import annotations

import tomllib
from datetime import date

import pytest

from relseek_assets.settings import Price as StudyPrice
from relseek_resources.judges.prices import TABLE, PriceError, price_of


def test_the_studys_own_judge_costs_what_the_spec_says() -> None:
    price = price_of("gpt-4o-2024-08-06")  # spec/pipeline.md, 4.1: 2.50 and 10.00 USD for a million
    assert price.cost(1_000_000, 0) == pytest.approx(2.50)
    assert price.cost(0, 1_000_000) == pytest.approx(10.00)
    assert price.cost(1_000_000, 1_000_000, batch=True) == pytest.approx(6.25)


def test_cached_tokens_cost_less_and_never_in_a_batch() -> None:
    price = price_of("gpt-4.1-mini")
    assert price.cost(1_000_000, 0, cached_tokens=400_000) == pytest.approx(0.6 * 0.40 + 0.4 * 0.10)
    assert price.cost(1_000_000, 0, batch=True, cached_tokens=400_000) == pytest.approx(0.20)
    assert price_of("claude-3-7-sonnet-20250219").cost(1_000_000, 0, cached_tokens=400_000) == pytest.approx(3.00)


def test_every_entry_is_dated_and_whole() -> None:
    for model, entry in tomllib.loads(TABLE.read_text()).items():
        assert isinstance(entry["dated"], date) and entry["source"], model
        assert 0 < entry.get("cached", 0.01) < entry["prompt"] < entry["completion"], model
        assert entry["batch_discount"] in (0.0, 0.5), model
        assert price_of(model).dated == entry["dated"].isoformat()


def test_a_price_of_the_study_goes_before_the_table_and_is_taken_as_it_stands() -> None:
    price = price_of("gpt-4o", StudyPrice(prompt=1.0, completion=2.0))
    assert price.cost(1_000_000, 1_000_000, batch=True) == pytest.approx(3.0)
    assert "[judges.price]" in price.source
    assert price_of("my-own/model", StudyPrice(prompt=0.0, completion=0.0)).cost(10**9, 10**9) == 0


@pytest.mark.parametrize("model", ["gpt-4o-audio-preview", "meta-llama/Llama-3.1-8B-Instruct", "GPT-4o", ""])
def test_a_model_that_is_not_listed_by_its_exact_name_asks_for_its_price(model: str) -> None:
    with pytest.raises(PriceError, match=r"\[judges\.price\]"):
        price_of(model)
