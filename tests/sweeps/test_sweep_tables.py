"""Seeds of replies come from their own keys, and the sweep's summary is that of pandas."""

from __future__ import annotations

from itertools import product

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from relseek_assets.sweeps import tables
from relseek_resources.models import Reply

KEY = (11, "small:L15", 2, 0.5, "rsa-001")
OTHER = (12, "small:L12", 3, -0.5, "rsa-002")


@pytest.mark.parametrize("place", range(5), ids=["study seed", "site", "epoch", "dose", "item"])
def test_each_part_of_the_key_changes_the_seed(place: int) -> None:
    changed = [*KEY[:place], OTHER[place], *KEY[place + 1 :]]
    assert tables.row_seed(*changed) != tables.row_seed(*KEY)


def test_the_same_key_has_the_same_seed_however_its_numbers_are_written() -> None:
    seed = tables.row_seed(11, "small:L15", 2, 1, "rsa-001")
    assert tables.row_seed(11, "small:L15", 2, 1.0, "rsa-001") == seed
    assert tables.row_seed(11, "small:L15", 2, np.float64(1), "rsa-001") == seed
    assert tables.row_seed(11, "small:L15", np.int64(2), 1, "rsa-001") == seed


def test_the_seeds_of_a_study_do_not_change_from_release_to_release() -> None:
    """A new value here makes every generation ever written irreproducible."""
    assert tables.row_seed(*KEY) == 7932721325410292825


def test_no_two_rows_of_a_grid_share_a_seed() -> None:
    sites, doses, items = [f"m:L{layer:02d}" for layer in range(10)], np.linspace(-2, 2, 9), [f"i{number}" for number in range(20)]
    seeds = [tables.row_seed(*key) for key in product((1, 2), sites, (1, 2, 12), doses, items)]
    assert len(set(seeds)) == len(seeds)


@settings(deadline=None)
@given(st.integers(0, 2**31), st.text(max_size=8), st.integers(1, 99), st.floats(-20, 20), st.text(max_size=8))
def test_a_seed_fits_a_generator_and_a_table(seed: int, site: str, epoch: int, dose: float, item: str) -> None:
    assert 0 <= tables.row_seed(seed, site, epoch, dose, item) < 2**63


def test_a_generation_row_holds_the_reply_and_its_key() -> None:
    reply = Reply("Hello there", (5, 6, 2), (-0.5, -1.0, -1.5), True)
    row = tables.generation_row("m:L03", 2, 1, "i1", [{"role": "user", "content": "Hi"}], 77, reply)
    assert (row["tokens"], row["seed"], row["finished"], row["reply"]) == (3, 77, True, "Hello there")
    assert row["mean_log_prob"] == pytest.approx(-1.0)
    assert tables.GENERATIONS.to_arrow(pd.DataFrame([row]), "generations").num_rows == 1


def test_a_dose_has_its_own_rows_in_the_order_of_items() -> None:
    frame = pd.DataFrame({"multiplier": [1.0, 0.0, 1.0, 0.0], "item": ["b", "b", "a", "a"], "reply": list("wxyz")})
    assert list(tables.of_cell(frame, 1.0)["reply"]) == ["y", "w"]
    assert list(tables.of_cell(frame, 0.0).index) == [0, 1]


@pytest.fixture(scope="module")
def rows() -> pd.DataFrame:
    generator = np.random.default_rng(2)
    keys = pd.DataFrame(product(("m:L03", "m:L15"), (1, 2), (-1.0, 0.0, 1.0), [f"i{n}" for n in range(8)]), columns=list(tables.KEY))
    frame = keys.assign(
        perplexity=generator.lognormal(2, 1, len(keys)),
        mean_log_prob=-generator.gamma(2, 1, len(keys)),
        propensity=generator.normal(size=len(keys)),
        published_perplexity=generator.lognormal(3, 1, len(keys)),
        published_propensity=generator.normal(size=len(keys)),
    )
    frame.loc[::5, "perplexity"] = np.nan  # empty replies
    return frame.sample(frac=1, random_state=1)


def test_the_summary_is_that_of_pandas_with_perplexities_as_log10(rows: pd.DataFrame) -> None:
    logged = rows.assign(perplexity=np.log10(rows["perplexity"]), published_perplexity=np.log10(rows["published_perplexity"]))
    long = logged.melt(id_vars=list(tables.KEY), var_name="quantity")
    keys = ["site", "epoch", "multiplier", "quantity"]
    expected = long.groupby(keys)["value"].agg(["mean", "std", "count"]).sort_index()
    found = tables.sweep_summary(rows).set_index(keys).sort_index()
    assert list(found.index) == list(expected.index)
    np.testing.assert_allclose(found["mean"], expected["mean"], rtol=1e-12)
    np.testing.assert_allclose(found["sd"].astype(float), expected["std"], rtol=1e-12)
    assert list(found["n"]) == list(expected["count"])


def test_one_reply_has_no_sd_and_none_has_no_row(rows: pd.DataFrame) -> None:
    single = rows[rows["perplexity"].notna()].head(1)
    summary = tables.sweep_summary(single).set_index("quantity")
    assert summary["sd"].isna().all()
    assert summary.loc["perplexity", "mean"] == pytest.approx(np.log10(single["perplexity"].iloc[0]))
    silent = tables.sweep_summary(single.assign(perplexity=np.nan))
    assert "perplexity" not in set(silent["quantity"])
    assert tables.SWEEP_SUMMARY.to_arrow(silent, "summary").num_rows == 4
