"""The trend against R's lmerTest on a simulated panel (fixtures/crossed.R); doses by hand and from the published vector scores."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from relseek_assets.trials import frontier
from relseek_assets.trials.frontier import FrontierError

FIXTURES = Path(__file__).parent / "fixtures"
#: human_study.md, section 15: mean, standard deviation, half width of the interval
PUBLISHED = {-1.0: (2.17, 0.726, 0.144), -0.5: (3.04, 1.421, 0.282), 0.0: (4.11, 1.836, 0.364), 0.5: (5.50, 1.834, 0.364), 1.0: (7.16, 1.032, 0.205)}
DOSE_MEANS = pd.DataFrame({"multiplier": list(PUBLISHED), "mean": [mean for mean, *_ in PUBLISHED.values()]})


def models(scores: dict[str, list[float]], released: str = "2025-03-01") -> pd.DataFrame:
    """A panel in which every model answers as many prompts as it has scores; the first was released two years before."""
    rows = [
        {"model_name": name, "provider": "maker", "entry_id": entry, "score": score, "released": released}
        for name, values in scores.items()
        for entry, score in enumerate(values)
    ]
    old = {"model_name": "old", "provider": "maker", "entry_id": 0, "score": 3.0, "released": "2023-03-01"}
    return pd.DataFrame([old, *rows])


@pytest.fixture(scope="module")
def panel() -> pd.DataFrame:
    return pd.read_csv(FIXTURES / "crossed_panel.csv")


def test_the_trend_by_three_models_is_rs(panel: pd.DataFrame) -> None:
    expected = json.loads((FIXTURES / "crossed.json").read_text())
    found = frontier.trend(panel).set_index("model")
    for model, values in expected.items():
        for name, value in values.items():
            # lmerTest differentiates numerically: its degrees of freedom are good to five digits.
            assert found.loc[model, name] == pytest.approx(value, rel=2e-5), (model, name)
    assert (found["n"] == 700).all() and (found["models"] == 30).all() and (found["providers"] == 6).all()


def test_the_mixed_interval_is_196_standard_errors_either_side(panel: pd.DataFrame) -> None:
    row = frontier.trend(panel).set_index("model").loc["mixed"]
    assert row["upper"] - row["estimate"] == pytest.approx(1.96 * row["se"]) == row["estimate"] - row["lower"]


def test_the_naive_line_is_scipys(panel: pd.DataFrame) -> None:
    years = frontier.panel(panel)["years"]
    line = stats.linregress(years, panel["score"])
    row = frontier.trend(panel).set_index("model").loc["ols"]
    assert [row["estimate"], row["se"], row["p"], row["r_squared"]] == pytest.approx([line.slope, line.stderr, line.pvalue, line.rvalue**2])


def test_years_are_counted_from_the_earliest_scored_model() -> None:
    scores = models({"new": [4.0]}, released="2024-03-01")
    unscored = pd.DataFrame([{"model_name": "older", "provider": "maker", "entry_id": 1, "score": None, "released": "2020-01-01"}])
    found = frontier.panel(pd.concat([scores, unscored]))
    assert found["years"].tolist() == [0.0, pytest.approx(366 / 365.25)]


def test_vector_scores_have_students_interval() -> None:
    scores = pd.DataFrame({"multiplier": [0.0] * 4 + [1.0] * 2, "score": [1.0, 2.0, 3.0, None, 5.0, 7.0]})
    found = frontier.vector_scores(scores)
    low, high = stats.t.interval(0.95, 2, 2.0, 1 / np.sqrt(3))
    assert found.iloc[0].to_dict() == pytest.approx(
        {"multiplier": 0, "mean": 2, "sd": 1, "se": 1 / np.sqrt(3), "df": 2, "lower": low, "upper": high, "n": 3}
    )
    assert found["n"].tolist() == [3, 2]


def test_between_doses_0_and_a_half_the_published_rule_holds() -> None:
    # Section 15: λ(s) = .5 (s - 4.11) / (5.50 - 4.11); the mean of 2025's models, 4.849, is worth 0.266.
    scores = np.linspace(4.11, 5.5, 9)
    assert frontier.equivalent_dose(scores, DOSE_MEANS) == pytest.approx(0.5 * (scores - 4.11) / (5.50 - 4.11))
    assert float(frontier.equivalent_dose(4.849, DOSE_MEANS)) == pytest.approx(0.266, abs=5e-4)


def test_means_are_worth_their_own_dose_and_others_have_none() -> None:
    assert frontier.equivalent_dose(DOSE_MEANS["mean"].to_numpy(), DOSE_MEANS.sample(frac=1, random_state=2)).tolist() == list(PUBLISHED)
    assert np.isnan(frontier.equivalent_dose(np.array([2.1, 7.2]), DOSE_MEANS)).all()


def test_a_year_is_worth_the_dose_of_its_responses_mean_and_of_its_models_median() -> None:
    scores = models({"a": [4.11] * 6, "b": [5.5, 5.5], "c": [5.0, 5.0]})
    found = frontier.dose_equivalent(scores, DOSE_MEANS, 2025, draws=200)
    assert (found.models, found.n) == (3, 10)
    assert found.mean == pytest.approx((6 * 4.11 + 11 + 10) / 10) and found.median == pytest.approx(5.0)
    assert found.median_dose == pytest.approx(0.5 * 0.89 / 1.39)
    assert (found.lower, found.upper) == (pytest.approx(0.0), pytest.approx(0.5))


def test_the_interval_of_the_median_is_that_of_order_statistics() -> None:
    generator = np.random.default_rng(5)
    means = np.sort(generator.normal(4.8, 0.25, 201))
    found = frontier.dose_equivalent(models({f"m{number}": [mean] for number, mean in enumerate(means)}), DOSE_MEANS, 2025, draws=4000)
    # The median of n values lies between those of ranks n/2 -+ 0.98 sqrt(n) in 95 of 100 samples.
    expected = frontier.equivalent_dose(means[[100 - 14, 100 + 14]], DOSE_MEANS)
    assert [found.lower, found.upper] == pytest.approx(expected, abs=0.006)


def test_refusals_say_what_is_wrong(panel: pd.DataFrame) -> None:
    with pytest.raises(FrontierError, match="no column 'released'"):
        frontier.trend(panel.drop(columns="released"))
    with pytest.raises(FrontierError, match="model_01 has 2 values of provider"):
        frontier.trend(pd.concat([panel, panel[panel["model_name"] == "model_01"].assign(provider="other")]))
    with pytest.raises(FrontierError, match="same day"):
        frontier.trend(panel.assign(released="2024-01-01"))
    with pytest.raises(FrontierError, match="do not vary within any provider"):
        frontier.trend(panel.assign(provider=panel["model_name"]))
    with pytest.raises(FrontierError, match="1999"):
        frontier.dose_equivalent(panel, DOSE_MEANS, 1999)
    with pytest.raises(FrontierError, match="do not rise"):
        frontier.equivalent_dose(5.0, DOSE_MEANS.assign(mean=[1.0, 3.0, 2.0, 4.0, 5.0]))
    with pytest.raises(FrontierError, match="single score"):
        frontier.vector_scores(pd.DataFrame({"multiplier": [0.0], "score": [1.0]}))


@pytest.mark.skipif("RELSEEK_RELEASE" not in os.environ, reason="RELSEEK_RELEASE is not set: the vector's scores are not here")
def test_the_published_vector_scores_are_recomputed() -> None:
    path = Path(os.environ["RELSEEK_RELEASE"]) / "5-frontier-model-behavioral-landscaping/data/scored_vector_generations_ep10.jsonl"
    rows = pd.DataFrame(json.loads(line) for line in path.read_text().splitlines())
    found = frontier.vector_scores(rows[["multiplier", "relationship_score"]].rename(columns={"relationship_score": "score"}))
    half = (found["upper"] - found["lower"]) / 2
    figures = {row.multiplier: (round(row.mean, 2), round(row.sd, 3), round(width, 3)) for row, width in zip(found.itertuples(), half, strict=True)}
    assert figures == {dose: pytest.approx(values, abs=6e-4) for dose, values in PUBLISHED.items()}
    assert (found["n"] == 100).all()
