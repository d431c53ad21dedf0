"""Exact tests against enumeration by hand, scipy and published p-values; adjustment and intervals against their definitions."""

from __future__ import annotations

import json
import os
from itertools import product
from math import comb
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from relseek_assets.trials import exact
from relseek_assets.trials.exact import ContingencyError, fisher_freeman_halton

#: human_study.md, section 10
PUBLISHED = {
    ("longitudinal", "personalisation"): 0.2701,
    ("longitudinal", "domain"): 0.4776,
    ("longitudinal", "multiplier"): 0.7765,
    ("cross-sectional", "personalisation"): 0.0496,
    ("cross-sectional", "domain"): 0.2908,
    ("cross-sectional", "multiplier"): 0.8852,
}


def by_hand(rows: list[int], columns: list[int], observed: list[list[int]]) -> float:
    """The exact p-value by listing every table, from ratios of binomial coefficients."""

    def weight(cells: tuple[tuple[int, ...], ...]) -> float:
        left, found = list(rows), 1
        for column in zip(*cells, strict=True):
            for row, cell in enumerate(column):
                found *= comb(left[row], cell)
                left[row] -= cell
        return found

    tables = []
    for cells in product(*(list(product(*(range(min(row, column) + 1) for column in columns))) for row in rows)):
        if [sum(row) for row in cells] == rows and [sum(column) for column in zip(*cells, strict=True)] == columns:
            tables.append(weight(cells))
    limit = weight(tuple(tuple(row) for row in observed))
    return sum(one for one in tables if one <= limit) / sum(tables)


@pytest.mark.parametrize("observed", [[[2, 0, 1], [1, 3, 2], [0, 1, 3]], [[4, 1], [2, 2], [0, 5]], [[0, 3, 1], [4, 0, 1]]])
def test_the_p_value_is_the_share_of_tables_no_likelier_than_the_one_seen(observed: list[list[int]]) -> None:
    table = np.array(observed)
    found = fisher_freeman_halton(table)
    assert (found.method, found.se, found.n) == ("enumeration", 0.0, table.sum())
    assert found.p == pytest.approx(by_hand(table.sum(1).tolist(), table.sum(0).tolist(), observed), rel=1e-9)


@pytest.mark.parametrize("table", [[[3, 1], [1, 3]], [[30, 15], [12, 40]], [[900, 96], [880, 120]], [[200, 0], [150, 60]]])
def test_two_by_two_tables_have_fishers_p_value(table: list[list[int]]) -> None:
    assert fisher_freeman_halton(table).p == pytest.approx(stats.fisher_exact(table).pvalue, rel=1e-7)


def test_the_order_and_orientation_of_a_table_do_not_matter() -> None:
    table = np.array([[40, 3, 9], [35, 8, 4], [52, 2, 7], [31, 9, 12]])
    p = fisher_freeman_halton(table).p
    for other in (table.T, table[::-1], table[:, [2, 0, 1]], np.insert(table, 1, 0, axis=0)):
        assert fisher_freeman_halton(other).p == pytest.approx(p, rel=1e-9)


def test_five_arms_of_two_thousand_participants_are_counted_exactly() -> None:
    table = [[212, 188], [199, 201], [190, 210], [205, 195], [181, 219]]
    found = fisher_freeman_halton(table)
    assert found.method == "enumeration"
    assert found.p == pytest.approx(stats.chi2_contingency(table).pvalue, abs=0.005)


def test_tables_with_too_many_others_are_sampled_and_say_so() -> None:
    table = np.random.default_rng(4).multinomial(600, np.full(48, 1 / 48)).reshape(8, 6)
    found = fisher_freeman_halton(table, seed=1)
    assert found.method == "monte_carlo" and found.random_tables == exact.RANDOM_TABLES
    assert found == fisher_freeman_halton(table, seed=1) != fisher_freeman_halton(table, seed=2)
    assert found.se == pytest.approx(np.sqrt(found.p * (1 - found.p) / found.random_tables))
    assert found.p == pytest.approx(stats.chi2_contingency(table).pvalue, abs=0.05)  # the tests order tables differently


def test_sampling_agrees_with_counting(monkeypatch: pytest.MonkeyPatch) -> None:
    table = [[40, 3, 9], [35, 8, 4], [52, 2, 7]]
    counted = fisher_freeman_halton(table)
    monkeypatch.setattr(exact, "PARTIAL_TABLES", 1)
    sampled = fisher_freeman_halton(table)
    assert sampled.method == "monte_carlo"
    assert abs(sampled.p - counted.p) < 4 * sampled.se


@pytest.mark.parametrize("table", [[[1, 2]], [[1, 2], [0, 0]], [[1.5, 2], [3, 4]], [[-1, 2], [3, 4]], [[np.nan, 2], [3, 4]]])
def test_what_is_no_table_of_counts_is_refused(table: list[list[float]]) -> None:
    with pytest.raises(ContingencyError):
        fisher_freeman_halton(table)


def test_adjusted_p_values_follow_benjamini_and_hochbergs_example() -> None:
    # Benjamini and Hochberg (1995), section 3.2: at a rate of 0.05 the first four of these fifteen are rejected.
    p = [0.0001, 0.0004, 0.0019, 0.0095, 0.0201, 0.0278, 0.0298, 0.0344, 0.0459, 0.3240, 0.4262, 0.5719, 0.6528, 0.7590, 1.0]
    found = exact.benjamini_hochberg(p)
    assert (found <= 0.05).sum() == 4
    assert found[0] == pytest.approx(0.0001 * 15) and found[3] == pytest.approx(0.0095 * 15 / 4)
    assert list(exact.benjamini_hochberg(p[::-1])) == pytest.approx(list(found[::-1]))


def test_a_missing_p_value_counts_as_one_test_of_its_family() -> None:
    assert list(exact.benjamini_hochberg([0.01, np.nan])) == pytest.approx([0.02, 1.0])


def test_no_p_value_is_outside_of_0_and_1() -> None:
    with pytest.raises(ContingencyError, match=r"1\.2"):
        exact.benjamini_hochberg([0.1, 1.2])


def test_exact_intervals_end_where_the_binomial_tails_hold_half_the_error() -> None:
    low, high = exact.binomial_interval(12, 40)
    assert stats.binom.sf(11, 40, low) == pytest.approx(0.025, abs=1e-9)
    assert stats.binom.cdf(12, 40, high) == pytest.approx(0.025, abs=1e-9)
    assert exact.binomial_interval(0, 20) == pytest.approx((0.0, 1 - 0.025 ** (1 / 20)))


def test_more_successes_than_trials_are_refused() -> None:
    with pytest.raises(ContingencyError, match="5 successes out of 4"):
        exact.binomial_interval(5, 4)


@pytest.mark.skipif("RELSEEK_RELEASE" not in os.environ, reason="RELSEEK_RELEASE is not set: the participants are not here")
def test_the_published_attrition_tests_are_recomputed() -> None:
    path = Path(os.environ["RELSEEK_RELEASE"]) / "data/human_study/main_studies/participant_characteristics/metadata_with_dropout.jsonl"
    people = pd.DataFrame(json.loads(line) for line in path.read_text().splitlines())
    people = people[~people["pre_treatment_dropout"].astype(bool)]
    found = {}
    for study, characteristic in PUBLISHED:
        part = people[people["study_id"] == study]
        found[study, characteristic] = fisher_freeman_halton(pd.crosstab(part[characteristic], part["post_treatment_dropout"]))
    assert {one.method for one in found.values()} == {"enumeration"}
    assert {key: round(one.p, 4) for key, one in found.items()} == PUBLISHED
