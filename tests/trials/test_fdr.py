"""Benjamini-Hochberg within declared families, computed by hand: sort, multiply by n / rank, take the running minimum from the largest."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest

from relseek_assets.trials.fdr import adjusted, family_table
from tests.trials.declared import OUTCOMES, trial


def outcomes() -> list[dict[str, Any]]:
    """Two local families of one measure family, another measure family, and an outcome in none."""
    families = {"trust": ("views", "first"), "warmth": ("views", "first"), "mood": ("views", "second"), "pain": ("body", "body")}
    return [outcome | dict(zip(("family", "local_family"), families.get(outcome["name"], ("", "")), strict=True)) for outcome in OUTCOMES]


DECLARED = trial(outcomes=outcomes(), study={"column": "which", "values": {"main": "main", "other": "other"}})


def table(*rows: tuple[str, str, str, float], variant: str = "primary", study: str = "main") -> pd.DataFrame:
    found = pd.DataFrame(rows, columns=["outcome", "test_type", "contrast", "p_raw"])
    return found.assign(study=study, variant=variant)


def test_local_families_are_adjusted_apart_and_the_measure_family_together() -> None:
    found = adjusted(
        table(
            ("trust", "main_effect_RS", "RS", 0.01),
            ("warmth", "main_effect_RS", "RS", 0.04),
            ("mood", "main_effect_RS", "RS", 0.03),
            ("pain", "main_effect_RS", "RS", 0.2),
            ("stayed", "main_effect_RS", "RS", 0.001),
        ),
        DECLARED,
    )
    # first: .01 * 2 / 1, .04 * 2 / 2. second and body have one test each.
    np.testing.assert_allclose(found["p_local"], [0.02, 0.04, 0.03, 0.2, np.nan])
    # views: .01 * 3 / 1, .03 * 3 / 2 = .045 cut to the next one's .04 * 3 / 3.
    np.testing.assert_allclose(found["p_global"], [0.03, 0.04, 0.04, 0.2, np.nan])


def test_kinds_of_test_are_adjusted_apart_but_change_over_time_together() -> None:
    found = adjusted(
        table(
            ("mood", "main_effect_RS", "RS", 0.01),
            ("mood", "temporal_main", "Time", 0.01),
            ("mood", "temporal_interaction", "RS × Time", 0.03),
            ("mood", "temporal_interaction", "Topic × Time", 0.5),
            ("mood", "temporal_coefficient", "Time", 0.02),
        ),
        DECLARED,
    )
    np.testing.assert_allclose(found["p_local"], [0.01, 0.03, 0.045, 0.5, 0.02])


def test_only_primary_contrasts_are_tests_and_simple_effects_are_descriptions() -> None:
    tested = table(
        ("trust", "main_effect_RS", "RS", 0.01), ("trust", "simple_effect", "RS at music", 0.01), ("mood", "temporal_simple", "RS at S1", 0.01)
    )
    rough = table(("trust", "main_effect_RS", "RS", 0.5), variant="coarsened")
    found = adjusted(pd.concat([tested, rough], ignore_index=True), DECLARED)
    np.testing.assert_allclose(found["p_local"], [0.01, np.nan, np.nan, np.nan])
    np.testing.assert_allclose(found["p_global"], [0.01, np.nan, np.nan, np.nan])


def test_studies_are_families_of_their_own_and_rows_keep_their_order() -> None:
    here, there = table(("trust", "main_effect_RS", "RS", 0.01)), table(("trust", "main_effect_RS", "RS", 0.04), study="other")
    found = adjusted(pd.concat([there, here], ignore_index=True), DECLARED)
    assert found["study"].tolist() == ["other", "main"]
    np.testing.assert_allclose(found["p_global"], [0.04, 0.01])


def test_a_test_without_a_p_value_counts_as_one() -> None:
    found = adjusted(table(("trust", "main_effect_RS", "RS", 0.01), ("warmth", "main_effect_RS", "RS", np.nan)), DECLARED)
    np.testing.assert_allclose(found["p_local"], [0.02, 1.0])


@pytest.mark.parametrize("family", ["views", "body"])
def test_the_table_of_a_family_has_its_tests_and_their_number(family: str) -> None:
    rows = [(name, "main_effect_RS", "RS", p) for name, p in (("trust", 0.01), ("warmth", 0.04), ("mood", 0.03), ("pain", 0.2), ("stayed", 0.001))]
    found = family_table(table(*rows, ("trust", "simple_effect", "RS at music", 0.01)), DECLARED, family)
    expected = {"views": {"trust": (2, 3), "warmth": (2, 3), "mood": (1, 3)}, "body": {"pain": (1, 1)}}[family]
    sizes = found.set_index("outcome")[["tests_local", "tests_global"]]
    assert {name: tuple(map(int, row)) for name, row in sizes.iterrows()} == expected
    assert set(found["family"]) == {family} and found["p_global"].notna().all()
