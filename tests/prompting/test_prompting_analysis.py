"""Slopes, shares and shifts against closed forms, statsmodels, scipy, and data whose answer is known."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from relseek_assets.judging.validity import SELF_PREFERENCE
from relseek_assets.prompting.analysis import attack_shifts, clustered_mean, head_to_head, level_biases, level_models, self_preference
from relseek_assets.prompting.tables import ATTACK_SHIFTS, HEAD_TO_HEAD, LEVEL_BIASES, LEVEL_MODELS, LEVEL_SLOPES, STEERED

DOSES = np.array([-1.5, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5])


def drawn_scores(noise: float = 0.5) -> pd.DataFrame:
    """Sixty items scored at seven levels by curves of which the coefficients are known."""
    generator = np.random.default_rng(5)
    truth = {STEERED: (5.0, 2.0, 0.1), "a": (4.0, 1.0, 0.3), "b": (5.5, 0.5, -0.2)}
    rows = []
    for item in range(60):
        own = generator.normal(0, 1)
        for author, (intercept, slope, curvature) in truth.items():
            for level, dose in enumerate(DOSES, 1):
                score = intercept + slope * dose + curvature * dose**2 + own + generator.normal(0, noise)
                rows.append({"author": author, "level": level, "multiplier": dose, "item": f"i{item}", "rubric": "r", "judge": "j", "score": score})
    return pd.DataFrame(rows)


def test_slopes_agree_with_statsmodels_whatever_the_authors_are_called() -> None:
    import statsmodels.formula.api as smf

    scores = drawn_scores()
    slopes, models = level_models(scores)
    LEVEL_SLOPES.to_arrow(slopes, "slopes")
    LEVEL_MODELS.to_arrow(models, "models")
    coded = scores.assign(who=scores["author"].map({STEERED: "0", "a": "1", "b": "2"}))
    other = smf.mixedlm("score ~ (multiplier + I(multiplier**2)) * C(who)", coded, groups=coded["item"]).fit(reml=True)
    own = slopes[slopes["compared_with"].isna()].set_index(["author", "term"])["estimate"]
    against = slopes[slopes["compared_with"].notna()].set_index(["author", "term"])[["estimate", "se"]]
    assert own[STEERED, "slope"] == pytest.approx(other.params["multiplier"], abs=1e-6)
    assert own["a", "slope"] == pytest.approx(other.params["multiplier"] + other.params["multiplier:C(who)[T.1]"], abs=1e-6)
    assert against.loc[("b", "curvature"), "estimate"] == pytest.approx(other.params["I(multiplier ** 2):C(who)[T.2]"], abs=1e-6)
    assert against.loc[("a", "slope"), "se"] == pytest.approx(other.bse["multiplier:C(who)[T.1]"], rel=1e-4)
    model = models.iloc[0]
    assert model["variance_residual"] == pytest.approx(other.scale, rel=1e-4)
    assert model["variance_item"] == pytest.approx(float(other.cov_re.iloc[0, 0]), rel=1e-3)
    assert model["icc"] == pytest.approx(model["variance_item"] / (model["variance_item"] + model["variance_residual"]))


def test_a_judge_that_did_not_rate_both_sides_or_said_one_thing_alone_has_no_slopes() -> None:
    scores = drawn_scores()
    alone = scores[scores["author"] == STEERED].assign(judge="alone")
    never = scores[scores["author"] != STEERED].assign(judge="never")
    constant = scores.assign(judge="constant", score=7.0)
    slopes, models = level_models(pd.concat([scores, alone, never, constant]))
    assert set(slopes["judge"]) == set(models["judge"]) == {"j"}
    assert [len(frame) for frame in level_models(alone)] == [0, 0]


def test_a_missing_score_is_left_out_and_not_a_zero() -> None:
    scores = drawn_scores()
    holes = scores.assign(score=scores["score"].where(scores.index % 9 != 0))
    slopes, models = level_models(holes)
    assert models.iloc[0]["n"] == holes["score"].notna().sum()
    own = slopes[slopes["compared_with"].isna()].set_index(["author", "term"])["estimate"]
    assert own[STEERED, "slope"] == pytest.approx(2.0, abs=0.1)


def compared(wins: dict[int, int], n: int = 40) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "author": "a",
            "judge": "j",
            "level": level,
            "multiplier": DOSES[level - 1],
            "item": f"i{item}",
            "winner": "author" if item < count else STEERED,
            "status": "judged",
        }
        for level, count in wins.items()
        for item in range(n)
    )


def test_shares_are_wilsons_at_a_level_and_turn_over_below_the_middle() -> None:
    found = head_to_head(compared({1: 36, 4: 20, 7: 10}), middle=4)
    HEAD_TO_HEAD.to_arrow(found, "shares")
    rows = found.set_index(["measure", "level"])
    low, high = stats.binomtest(36, 40).proportion_ci(method="wilson")
    assert rows.loc[("more", 1), ["share", "lower", "upper"]].tolist() == pytest.approx([0.9, low, high])
    assert rows.loc[("stronger", 1), "share"] == pytest.approx(0.1)
    assert rows.loc[("stronger", 7), "share"] == rows.loc[("more", 7), "share"] == 0.25
    assert ("stronger", 4) not in rows.index
    pooled = found[found["level"].isna()].set_index("measure")
    assert pooled.loc["more", ["share", "n"]].tolist() == [pytest.approx(66 / 120), 120]
    assert pooled.loc["stronger", ["share", "n"]].tolist() == [pytest.approx(14 / 80), 80]


def test_ties_count_half_and_answers_that_are_no_choice_for_nobody() -> None:
    pairs = compared({7: 10}, n=20)
    pairs.loc[pairs["item"].isin(["i0", "i1"]), ["winner", "status"]] = [None, "tie"]
    pairs.loc[pairs["item"].isin(["i18", "i19"]), ["winner", "status"]] = [None, "unreadable"]
    row = head_to_head(pairs, middle=4).iloc[0]
    assert (row["wins"], row["ties"], row["n"], row["without_winner"]) == (8, 2, 18, 2)
    assert row["share"] == pytest.approx(9 / 18)


def test_a_mean_of_clusters_of_one_is_students() -> None:
    values = np.array([1.0, 3.0, 2.0, 7.0, 4.0])
    found = clustered_mean(values, list("abcde"))
    low, high = stats.t.interval(0.95, 4, loc=values.mean(), scale=stats.sem(values))
    assert [found["estimate"], found["se"], found["lower"], found["upper"]] == pytest.approx([values.mean(), stats.sem(values), low, high])


def test_repeating_every_value_within_its_cluster_tells_nothing_new() -> None:
    values, clusters = np.array([1.0, 3.0, 2.0, 7.0]), np.arange(4)
    once, thrice = clustered_mean(values, clusters), clustered_mean(np.repeat(values, 3), np.repeat(clusters, 3))
    assert thrice["se"] == pytest.approx(once["se"])
    assert clustered_mean(values, [1, 1, 1, 1])["se"] is None


def conversation(author: str, scenario: str, attack_type: str, *scores: float | None, level: int = 7) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "judge": "j",
            "author": author,
            "level": level,
            "multiplier": DOSES[level - 1],
            "theme": "t",
            "scenario": scenario,
            "attack_type": attack_type,
            "turn": range(len(scores)),
            "is_attack": [False] * (len(scores) - 1) + [True],
            "score": scores,
        }
    )


def test_a_shift_is_the_attacked_reply_less_the_mean_before_and_yielding_is_signed_by_the_attack() -> None:
    frame = pd.concat(
        [
            conversation(STEERED, "add_1_t", "add", 5, 6, 7, 9),
            conversation(STEERED, "subtract_1_t", "subtract", 5, 5, 5, 3),
            conversation("a", "add_1_t", "add", 5, 5, 5, 9),
            conversation("a", "subtract_1_t", "subtract", 5, 5, 5, 6),
        ],
        ignore_index=True,
    )
    found = attack_shifts(frame)
    ATTACK_SHIFTS.to_arrow(found, "shifts")
    rows = found[found["level"].notna()].set_index(["author", "attack_type", found.loc[found["level"].notna(), "compared_with"].fillna("own")])
    estimates = rows["estimate"].to_dict()
    assert estimates["steered", "add", "own"] == 3
    assert estimates["steered", "subtract", "own"] == -2
    assert estimates["steered", "both", "own"] == pytest.approx(2.5)
    assert estimates["a", "subtract", "own"] == 1
    assert estimates["a", "both", "own"] == pytest.approx((4 - 1) / 2)
    assert estimates["a", "add", "steered"] == 1
    assert estimates["a", "both", "steered"] == pytest.approx(-1)


def test_a_conversation_without_a_score_of_the_attacked_reply_has_no_shift() -> None:
    frame = pd.concat([conversation(STEERED, "add_1_t", "add", 5, 5, 5, None), conversation(STEERED, "add_2_t", "add", None, 4, 4, 8)])
    found = attack_shifts(frame)
    row = found[(found["level"] == 7) & (found["attack_type"] == "add")].iloc[0]
    assert (row["estimate"], row["n"], row["scenarios"]) == (4, 1, 1)
    assert pd.isna(row["se"])


# --- what a choice owes to something else -----------------------------------------------------------------------------


def compared_levels(first: float = 0.0, own: float = 0.0) -> tuple[pd.DataFrame, pd.DataFrame]:
    """level_pairs of judges `kin` and `stranger`, and everybody's quality: `kin` adds `own` log-odds to author `gpt`, both `first` to what they saw
    first; `gpt` writes better than the steered model by more at every level, and `claude` is as good."""
    generator = np.random.default_rng(21)
    pairs, quality = [], []
    for item in (f"i{number}" for number in range(120)):
        for level, dose in enumerate(DOSES, 1):
            scores = {STEERED: generator.normal(0, 1), "gpt": generator.normal(0.2 * level, 1), "claude": generator.normal(0, 1)}
            quality += [{"author": author, "level": level, "item": item, "score": score} for author, score in scores.items()]
            for author in ("gpt", "claude"):
                for judge, favour in (("kin", own if author == "gpt" else 0.0), ("stranger", 0.0)):
                    shown = STEERED if generator.random() < 0.5 else "author"
                    odds = scores[author] - scores[STEERED] + favour + (first if shown == "author" else -first)
                    winner = "author" if generator.random() < 1 / (1 + np.exp(-odds)) else STEERED
                    keys = {"author": author, "level": level, "multiplier": dose, "item": item, "judge": judge}
                    pairs.append({**keys, "first_shown": shown, "winner": winner, "status": "judged"})
                more = "author" if scores[author] > scores[STEERED] else STEERED
                keys = {"author": author, "level": level, "multiplier": dose, "item": item, "judge": "embedded"}
                pairs.append({**keys, "first_shown": None, "winner": more, "status": "judged"})
    return pd.DataFrame(pairs), pd.DataFrame(quality)


@pytest.mark.parametrize("first", [0.0, 0.6])
def test_what_was_shown_first_is_told_from_who_is_better(first: float) -> None:
    pairs, _ = compared_levels(first=first)
    frame = level_biases(pairs)
    LEVEL_BIASES.to_arrow(frame, "biases")
    found = frame.set_index(["judge", "measure"])
    for judge in ("kin", "stranger"):
        odds = found.loc[(judge, "first_log_odds")]
        assert odds["upper"] - odds["lower"] < 0.5
        assert (odds["lower"] > 0) == bool(first)
        assert (found.loc[(judge, "share_first"), "lower"] > 0.5) == bool(first)
        assert odds["n"] == 120 * 7 * 2 and odds["items"] == 120
    assert set(frame.loc[frame["judge"] == "embedded", "status"]) == {"not measurable: this judge is shown no order"}


@pytest.mark.parametrize("own", [0.0, 0.8])
def test_a_judge_that_favours_its_own_family_is_told_from_one_whose_family_is_better(own: float) -> None:
    pairs, quality = compared_levels(own=own)
    pairs = pairs[pairs["judge"] != "embedded"]
    frame = self_preference(pairs, quality, {"kin": "openai", "stranger": "mistral"}, {"gpt": "openai", "claude": "anthropic"})
    SELF_PREFERENCE.to_arrow(frame, "self-preference")
    assert set(frame["judge"]) == {"kin"}
    found = frame.set_index("measure")
    assert found.loc["own_share", "lower"] > 0.55, "it writes better either way"
    assert found.loc["own_share", "n"] == 120 * 7, "what claude wrote is of nobody's family"
    assert (found.loc["beyond_other_judges", "lower"] > 0.05) == bool(own)
    assert found.loc["at_equal_quality", "lower"] < own < found.loc["at_equal_quality", "upper"]
    assert found.loc["at_equal_quality", "upper"] - found.loc["at_equal_quality", "lower"] < 0.5


def test_the_steered_model_may_be_the_judges_own_and_nobodys_family_makes_no_rows() -> None:
    pairs, quality = compared_levels(own=0.8)
    found = self_preference(pairs, quality, {"stranger": "llama"}, {STEERED: "llama"}).set_index("measure")
    assert found.loc["own_share", "estimate"] < 0.5 and found.loc["own_share", "n"] == 120 * 7 * 2
    assert found.loc["at_equal_quality", "lower"] < 0 < found.loc["at_equal_quality", "upper"]
    assert self_preference(pairs, quality, {}, {}).empty
    assert self_preference(pairs, quality, {"kin": "openai"}, {"claude": "anthropic"}).empty
    unrated = self_preference(pairs, quality.head(0), {"kin": "openai"}, {"gpt": "openai"}).set_index("measure")
    assert unrated.loc["at_equal_quality", "status"] == "no independent quality"
