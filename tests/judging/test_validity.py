"""What biases a judge is found where it was put, and a judge corrected by a few reference scores covers the truth where the judge alone does not."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy.special import expit
from scipy.stats import binomtest

from relseek_assets.judging import validity
from tests.judging.baseball import GAMES, TEAMS

DOSES = np.array([-1.0, -0.5, 0.0, 0.5, 1.0])


def words(items: int, doses: np.ndarray, seed: int, longer: float = 0.0) -> np.ndarray:
    """Words of replies (items, doses): `longer` doublings a unit of dose."""
    generator = np.random.default_rng([1, seed])
    return np.maximum(np.rint(40 * 2 ** (longer * doses + generator.normal(0, 0.8, (items, len(doses))))), 1)


def compared(
    items: int, seed: int, *, first: float = 0.0, length: float = 0.0, longer: float = 0.0, shown: bool = True
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """judge_pairs of a judge that adds `first` log-odds to the reply shown first and `length` for twice the words, and the replies' lengths."""
    generator = np.random.default_rng([2, seed])
    count = words(items, DOSES, seed, longer)
    rows = []
    for item in range(items):
        worth = 0.8 * DOSES + length * np.log2(count[item]) + generator.normal(0, 0.3, len(DOSES))
        for one, two in combinations(range(len(DOSES)), 2):
            side = "a" if generator.random() < 0.5 else "b"
            won = generator.random() < expit(worth[one] - worth[two] + (first if side == "a" else -first))
            places = {"multiplier_a": DOSES[one], "multiplier_b": DOSES[two], "first_shown": side if shown else None}
            keys = {"site": "m:L01", "epoch": 1, "item": f"i{item:03d}", **places, "judge": "j"}
            rows.append({**keys, "winner": "a" if won else "b", "status": "judged", "cost_usd": 0.0})
    cells = {"item": np.repeat([f"i{item:03d}" for item in range(items)], len(DOSES)), "multiplier": np.tile(DOSES, items)}
    return pd.DataFrame(rows), pd.DataFrame({"site": "m:L01", "epoch": 1, **cells, "words": count.ravel().astype(int)})


def rated(judges: dict[str, np.ndarray], doses: np.ndarray = DOSES, rubric: str = "warmth") -> pd.DataFrame:
    """judge_scores from scores (items, doses), NaN where there is none."""
    parts = []
    for judge, scores in judges.items():
        items = len(scores)
        cells = {"item": np.repeat([f"i{item:03d}" for item in range(items)], len(doses)), "multiplier": np.tile(doses, items)}
        parts.append(pd.DataFrame({"site": "m:L01", "epoch": 1, **cells, "rubric": rubric, "judge": judge, "score": scores.ravel()}))
    return pd.concat(parts, ignore_index=True)


# --- biases -----------------------------------------------------------------------------------------------------------


def test_playing_at_home_is_worth_what_r_says_it_is() -> None:
    """The reply shown first is the home team: BradleyTerry2 gives 0.3023 with a standard error of 0.1309 as if games were independent."""
    rows = []
    for home, games in GAMES.items():
        for away, results in games.items():
            ends = {"multiplier_a": TEAMS.index(home), "multiplier_b": TEAMS.index(away), "first_shown": "a", "status": "judged"}
            rows += [{**ends, "winner": winner} for winner, count in zip("ab", results, strict=True) for _ in range(count)]
    pairs = pd.DataFrame(rows).assign(item=[f"game {number}" for number in range(len(rows))])
    found = validity.position_bias(pairs)
    assert found["first_log_odds"]["estimate"] == pytest.approx(0.3023, abs=5e-5)
    assert found["first_log_odds"]["se"] == pytest.approx(0.1309, abs=0.008), "of single games the sandwich is close to it"
    assert found["share_first"]["estimate"] == pytest.approx((pairs["winner"] == "a").mean())


def test_a_clustered_logit_and_least_squares_are_statsmodels() -> None:
    import statsmodels.api as sm

    generator = np.random.default_rng(3)
    clusters = np.repeat(np.arange(40), 6)
    design = np.column_stack([np.ones(240), generator.normal(size=(240, 2)) + generator.normal(size=(40, 2))[clusters]])
    signal = design @ [0.3, 0.8, -0.5] + generator.normal(0, 1, 40)[clusters]
    chosen = (generator.random(240) < expit(signal)).astype(float)
    settings: dict[str, Any] = {"cov_type": "cluster", "cov_kwds": {"groups": clusters, "use_correction": False}}
    for ours, theirs in (
        (validity.logit(chosen, design, clusters), sm.Logit(chosen, design).fit(disp=0, **settings)),
        (validity.least_squares(signal, design, clusters), sm.OLS(signal, design).fit(**settings)),
    ):
        np.testing.assert_allclose(ours.coefficients, theirs.params, rtol=1e-6)
        np.testing.assert_allclose(ours.covariance, theirs.cov_params() * 40 / 39, rtol=1e-5)
        assert ours.clusters == 40


def test_a_variance_that_rounds_below_zero_is_zero() -> None:
    row = validity.Regression(np.array([1.0]), np.array([[-1e-33]]), 8, 4, "least squares").row()
    assert (row["estimate"], row["lower"], row["upper"], row["se"]) == (1.0, 1.0, 1.0, 0.0)


def test_firths_logit_of_an_intercept_adds_half_a_row_on_either_side() -> None:
    found = validity.logit(np.ones(12), np.ones((12, 1)), np.arange(12))
    assert found.model == "logit, Firth"
    assert found.coefficients[0] == pytest.approx(np.log(12.5 / 0.5))


@pytest.mark.parametrize("bias", [0.0, 0.6])
def test_a_judge_that_favours_the_reply_shown_first_is_found_out(bias: float) -> None:
    pairs, _ = compared(150, 4, first=bias)
    found = validity.position_bias(pairs)
    odds, share = found["first_log_odds"], found["share_first"]
    assert odds["lower"] < bias < odds["upper"]
    assert odds["upper"] - odds["lower"] < 0.5
    assert (share["lower"] > 0.5) == bool(bias)
    assert share["lower"] < share["estimate"] < share["upper"]
    assert share["n"] == 1500 and share["items"] == 150


def test_position_is_not_measurable_where_no_order_was_shown() -> None:
    pairs, _ = compared(5, 1, shown=False)
    assert {row["status"] for row in validity.position_bias(pairs).values()} == {"not measurable: this judge is shown no order"}
    nobody = compared(5, 1)[0].assign(winner=None, status="unreadable")
    assert {row["status"] for row in validity.position_bias(nobody).values()} == {"no decided pairs"}


@pytest.mark.parametrize("bias", [0.0, 0.5])
def test_a_preference_for_length_is_told_from_doses_that_make_replies_longer(bias: float) -> None:
    pairs, lengths = compared(200, 5, length=bias, longer=0.7)
    found = validity.length_bias_of_pairs(pairs, lengths)
    assert found["lower"] < bias < found["upper"]
    assert found["upper"] - found["lower"] < 0.35
    at = lengths.set_index(["item", "multiplier"])["words"]
    longer = [at[row.item, row.multiplier_b] > at[row.item, row.multiplier_a] for row in pairs.itertuples()]
    naive = ((pairs["winner"] == "b") == np.array(longer)).mean()
    assert naive > 0.55, "the longer reply wins more often even where length is worth nothing: it has the larger dose"


def test_length_bias_of_ratings_is_within_doses_and_beyond_what_the_reference_shares() -> None:
    items = 200
    generator = np.random.default_rng(6)
    count = words(items, DOSES, 6, longer=1.0)
    people = 5 + 1.5 * DOSES + 0.2 * np.log2(count / 40) + generator.normal(0, 0.5, count.shape)
    judge = people + 0.6 * np.log2(count / 40) + generator.normal(0, 0.5, count.shape)
    scores = rated({"judge": judge, "people": np.where(np.arange(items)[:, None] < 80, people, np.nan)})
    cells = scores[scores["judge"] == "judge"][["site", "epoch", "multiplier", "item"]]
    frame = validity.judge_biases(scores, None, cells.assign(words=count.ravel().astype(int)), "people")
    validity.JUDGE_BIASES.to_arrow(frame, "biases")
    found = frame.set_index(["judge", "measure"])
    for judge_, measure, truth in (
        ("judge", "points_per_doubling", 0.8),
        ("judge", "points_per_doubling_beyond_reference", 0.6),
        ("people", "points_per_doubling", 0.2),
    ):
        row = found.loc[(judge_, measure)]
        assert row["lower"] < truth < row["upper"]
        assert row["upper"] - row["lower"] < 0.25
    assert ("people", "points_per_doubling_beyond_reference") not in found.index
    assert found.loc[("judge", "points_per_doubling_beyond_reference"), "items"] == 80


def test_without_replies_lengths_are_unknown() -> None:
    pairs, _ = compared(5, 1)
    frame = validity.judge_biases(rated({"j": np.ones((5, 5))}), pairs, None)
    validity.JUDGE_BIASES.to_arrow(frame, "biases")
    assert set(frame.loc[frame["bias"] == "length", "status"]) == {"lengths unknown: the study has no replies"}
    assert frame.loc[frame["bias"] == "length", "estimate"].isna().all()
    replies = pd.DataFrame({"site": "m:L01", "epoch": 1, "multiplier": 0.0, "item": ["a", "b"], "reply": ["one  two\nthree", " "]})
    assert validity.words_of(replies)["words"].tolist() == [3, 0]


# --- self-preference --------------------------------------------------------------------------------------------------


def head_to_head(own: float, better: float, seed: int = 8) -> pd.DataFrame:
    """A model of each family against another; the first judge adds `own` log-odds to its family, whose replies are `better` by some points."""
    generator = np.random.default_rng(seed)
    rows = []
    for item in range(300):
        quality = {"gpt-4o": generator.normal(better, 1), "claude": generator.normal(0, 1)}
        one, two = ("gpt-4o", "claude") if generator.random() < 0.5 else ("claude", "gpt-4o")
        for judge, favour in (("gpt-4.1-mini", own), ("mistral", 0.0)):
            odds = quality[one] - quality[two] + (favour if one == "gpt-4o" else -favour)
            keys = {"item": f"i{item}", "judge": judge, "author_a": one, "author_b": two, "quality_a": quality[one], "quality_b": quality[two]}
            rows.append({**keys, "winner": "a" if generator.random() < expit(odds) else "b"})
    return pd.DataFrame(rows)


JUDGES, AUTHORS = {"gpt-4.1-mini": "gpt", "mistral": "mistral"}, {"gpt-4o": "gpt"}


@pytest.mark.parametrize("own", [0.0, 0.8])
def test_favouring_ones_own_family_is_told_from_its_being_better(own: float) -> None:
    frame = validity.self_preference(head_to_head(own, better=1.0), JUDGES, AUTHORS)
    validity.SELF_PREFERENCE.to_arrow(frame, "self-preference")
    found = frame[frame["judge"] == "gpt-4.1-mini"].set_index("measure")
    assert found.loc["own_share", "lower"] > 0.6, "it wins most comparisons either way"
    assert (found.loc["beyond_other_judges", "lower"] > 0) == bool(own)
    assert found.loc["at_equal_quality", "lower"] < own < found.loc["at_equal_quality", "upper"]
    assert set(frame["judge"]) == {"gpt-4.1-mini"}, "the other judge has no author of its own family"


def test_what_self_preference_cannot_be_told_from_is_said() -> None:
    alone = head_to_head(0.8, 0.0)
    alone = alone[alone["judge"] == "gpt-4.1-mini"].drop(columns=["quality_a", "quality_b"])
    found = validity.self_preference(alone, JUDGES, AUTHORS).set_index("measure")
    assert found.loc["beyond_other_judges", "status"] == "no judge of another family made the same comparisons"
    assert found.loc["at_equal_quality", "status"] == "no independent quality"
    undecided = alone.assign(winner=[None, *alone["winner"][1:]])
    assert validity.self_preference(undecided, JUDGES, AUTHORS).set_index("measure").loc["own_share", "n"] == len(alone) - 1
    rival = validity.self_preference(alone, JUDGES, {"claude": "gpt", "gpt-4o": "gpt"}).set_index("measure")
    assert rival.loc["own_share", "status"].startswith("the judge compared nobody of its own family")


def test_a_judge_and_an_author_of_one_name_are_no_family() -> None:
    rows = head_to_head(0.8, 0.0)
    rows = rows.assign(judge=rows["judge"].replace("gpt-4.1-mini", "claude"))
    assert validity.self_preference(rows, {}, {}).empty
    assert validity.self_preference(rows, {"claude": ""}, {"claude": ""}).empty
    assert set(validity.self_preference(rows, {"claude": "gpt"}, AUTHORS)["judge"]) == {"claude"}


# --- prediction-powered inference -------------------------------------------------------------------------------------


def published_rows() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Sixty truths with their predictions, and 240 further predictions."""
    generator = np.random.default_rng(5)
    truth = np.round(generator.normal(5, 1.5, 60), 3)
    predicted = np.round(0.8 * truth + generator.normal(1, 1, 60), 3)
    return truth, predicted, np.round(0.8 * generator.normal(5, 1.5, 240) + generator.normal(1, 1, 240), 3)


def test_a_mean_is_that_of_ppi_python() -> None:
    """ppi-python 0.2.3 on the same rows: ppi_mean_pointestimate and ppi_mean_ci with lam=1 and tuned. It divides by n, we by n - 1."""
    truth, predicted, rest = published_rows()
    judge = np.concatenate([predicted, rest])[:, None]
    reference = np.concatenate([truth, np.full(240, np.nan)])[:, None]
    found = validity.corrected(judge, reference, np.ones(1))
    assert found["ppi"].value == pytest.approx(5.0964875)
    assert found["ppi"].se == pytest.approx((5.38092998 - 4.81204502) / 2 / 1.959964, rel=0.01)
    assert found["ppi++"].value == pytest.approx(4.93475767, abs=0.015), "its weight pools the variances of the predictions"
    assert found["ppi++"].se == pytest.approx((4.6956361 - 5.1738792) / -2 / 1.959964, rel=0.02)
    assert found["ppi++"].df == 59 and found["ppi++"].unlabelled == 240
    assert found["reference"].value == pytest.approx(truth.mean())
    assert found["reference"].se == pytest.approx(truth.std(ddof=1) / 60**0.5)
    assert found["rectifier"].value == pytest.approx((truth - predicted).mean())


def test_a_slope_is_that_of_ppi_python() -> None:
    """ppi-python 0.2.3: ppi_ols_pointestimate of score on dose, one row an item, doses in turn; lam=1 and tuned."""
    truth, predicted, rest = published_rows()
    doses = np.array([-1.0, 0.0, 1.0])
    at = np.arange(300) % 3
    judge, reference = np.full((300, 3), np.nan), np.full((300, 3), np.nan)
    judge[np.arange(300), at] = np.round(np.concatenate([predicted, rest]) + doses[at], 3)
    reference[np.arange(60), at[:60]] = np.round(truth + 1.5 * doses[at[:60]], 3)
    found = validity.corrected(judge, reference, validity.slope_along(doses, np.ones(3, dtype=bool)))
    assert found["ppi"].value == pytest.approx(1.91425)
    assert found["ppi++"].value == pytest.approx(1.81497492, abs=0.01)
    assert found["ppi++"].se == pytest.approx((2.09367021 - 1.51956595) / 2 / 1.959964, rel=0.06)
    everything = judge[~np.isnan(judge)]
    assert found["judge"].value == pytest.approx(np.polyfit(doses[at], everything, 1)[0])


def study(items: int, labelled: int, generator: np.random.Generator, longer: float) -> tuple[np.ndarray, np.ndarray]:
    """Scores (items, doses) of a judge and of people, who rated some items. The people's slope is 1 and the judge adds half a point for twice the
    words, of which there are `longer` doublings more a unit of dose; it sees a good part of what people see."""
    own = generator.normal(0, 1, (items, 1))
    people = 5 + DOSES + own + generator.normal(0, 0.7, (items, len(DOSES)))
    doublings = longer * DOSES + generator.normal(0, 0.5, (items, len(DOSES)))
    judge = 1 + 0.9 * people + 0.5 * doublings + generator.normal(0, 0.5, people.shape)
    return judge, np.where(generator.permutation(items)[:, None] < labelled, people, np.nan)


def test_corrected_intervals_cover_where_a_judge_with_a_length_bias_does_not() -> None:
    runs, generator = 1000, np.random.default_rng(12)
    slope, top = validity.slope_along(DOSES, np.ones(5, dtype=bool)), np.eye(5)[4]
    covered: dict[tuple[str, str], int] = {}
    widths: dict[tuple[str, str], float] = {}
    for _ in range(runs):
        judge, people = study(150, 40, generator, longer=1.0)
        for what, along, truth in (("slope", slope, 1.0), ("mean", top, 6.0)):
            for name, found in validity.corrected(judge, people, along).items():
                low, high = found.interval
                covered[what, name] = covered.get((what, name), 0) + int(low <= truth <= high)
                widths[what, name] = widths.get((what, name), 0.0) + (high - low) / runs
    shares = {name: binomtest(count, runs).proportion_ci() for name, count in covered.items()}
    for what in ("slope", "mean"):
        assert shares[what, "judge"].high < 0.2, "the judge's own interval is of the judge"
        for name in ("reference", "ppi", "ppi++"):
            assert shares[what, name].low <= 0.95 <= shares[what, name].high, (what, name, covered[what, name])
        assert widths[what, "ppi++"] < 0.92 * widths[what, "reference"], "and narrower than people's alone"
        assert widths[what, "ppi++"] <= widths[what, "ppi"]


def test_a_worthless_judge_is_given_no_weight() -> None:
    generator = np.random.default_rng(3)
    judge, people = study(400, 100, generator, 0.0)
    noise = generator.normal(5, 3, judge.shape)
    found = validity.corrected(noise, people, np.eye(5)[2])
    assert found["ppi++"].weight == pytest.approx(0, abs=0.1)
    assert found["ppi++"].se <= found["reference"].se
    assert found["ppi"].se > 1.5 * found["reference"].se, "which plain prediction-powered inference would give it"
    assert validity.corrected(judge, people, np.eye(5)[2])["ppi++"].weight > 0.4


def test_how_much_of_the_slope_is_the_judge() -> None:
    judge, people = study(2000, 1500, np.random.default_rng(4), longer=1.0)
    frame = validity.corrected_dose_response(rated({"judge": judge, "people": people}), "people")
    validity.CORRECTED_DOSE_RESPONSE.to_arrow(frame, "corrected")
    share = frame[frame["quantity"] == "judge_share"].iloc[0]
    assert share["estimate"] == pytest.approx(1 - 1 / 1.4, abs=0.02), "the judge's slope is 0.9 + 0.5, people's is 1"
    assert share["lower"] < share["estimate"] < share["upper"] < share["lower"] + 0.06
    slopes = frame[frame["quantity"] == "slope"].set_index("estimator")
    assert slopes.loc["judge", "estimate"] == pytest.approx(1.4, abs=0.04)
    assert slopes.loc["ppi++", "lower"] < 1 < slopes.loc["ppi++", "upper"]
    rectifiers = frame[frame["estimator"] == "rectifier"].set_index("multiplier")["estimate"]
    assert rectifiers.loc[1.0] - rectifiers.loc[-1.0] == pytest.approx(-0.8, abs=0.1)
    assert set(frame["judge"]) == {"judge"}


def test_the_interval_of_that_share_covers() -> None:
    runs, generator = 500, np.random.default_rng(13)
    slope, covered = validity.slope_along(DOSES, np.ones(5, dtype=bool)), 0
    for _ in range(runs):
        judge, people = study(150, 60, generator, longer=1.0)
        found = validity.corrected(judge, people, slope)
        low, high = validity.judge_share(found["judge"], found["ppi++"]).interval
        covered += low <= 1 - 1 / 1.4 <= high
    low, high = binomtest(covered, runs).proportion_ci()
    assert low <= 0.95 <= high


def test_nothing_is_invented_without_reference_scores() -> None:
    judge, people = study(30, 10, np.random.default_rng(5), 0.0)
    scores = rated({"judge": judge})
    for reference, told in (("", "no reference: [judge] reference names nobody"), ("people", "no reference: 'people' scored none of these rows")):
        frame = validity.corrected_dose_response(scores, reference)
        validity.CORRECTED_DOSE_RESPONSE.to_arrow(frame, "corrected")
        assert frame[frame["estimate"].isna()]["status"].tolist() == [told]
        assert frame[frame["estimate"].notna()][["quantity", "estimator"]].to_numpy().tolist() == [["slope", "judge"]]
    one = np.where(np.arange(30)[:, None] == 3, people[~np.isnan(people[:, 0])][0], np.nan)
    few = validity.corrected_dose_response(rated({"judge": judge, "people": one}), "people")
    assert "a mean needs two items" in few[few["estimate"].isna()]["status"].iloc[0]


def test_a_dose_without_reference_scores_keeps_the_judges_mean_and_leaves_the_slopes() -> None:
    judge, people = study(60, 30, np.random.default_rng(6), 0.0)
    people[:, 4] = np.nan
    frame = validity.corrected_dose_response(rated({"judge": judge, "people": people}), "people")
    at = frame[frame["multiplier"] == 1.0].set_index("estimator")
    assert set(at.index) == {"judge", "ppi++"}
    assert at.loc["ppi++", "status"] == "fewer than two items have a reference score at this dose"
    slopes = frame[frame["quantity"] == "slope"].set_index("estimator")
    assert slopes.loc["reference", "estimate"] == pytest.approx(np.polyfit(DOSES[:4], np.nanmean(people[:, :4], axis=0), 1)[0])
    narrow = validity.corrected_dose_response(rated({"judge": judge, "people": people}), "people", DOSES[1:4])
    assert narrow[(narrow["quantity"] == "slope") & (narrow["estimator"] == "judge")]["estimate"].iloc[0] == pytest.approx(
        np.polyfit(DOSES[1:4], judge.mean(0)[1:4], 1)[0]
    )


def test_where_people_rated_everything_the_judge_adds_nothing() -> None:
    judge, people = study(40, 40, np.random.default_rng(7), 1.0)
    found = validity.corrected(judge, people, np.eye(5)[0])
    assert found["ppi++"].value == found["ppi"].value == found["reference"].value
    assert found["ppi++"].weight == 0 and found["ppi++"].unlabelled == 0
