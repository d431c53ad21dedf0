"""The instruments' tables: published numbers of the release, what simulated trials were made of, absent tables and faulty input."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pandas as pd
import pytest
from released import ROOT, made_up, needs_release, same

from relseek_assets.study import load_study
from relseek_assets.trial import Analysis, RawTable, Trial
from relseek_assets.trials import covariates, published, raw
from relseek_assets.trials.instruments import INSTRUMENTS
from relseek_assets.trials.participants import CLUSTERS
from relseek_assets.trials.parts import SCHEMA
from relseek_assets.trials.psychometrics import SCALES
from relseek_assets.trials.raw import TrialFault
from relseek_assets.trials.regressions import SEPARATED

STUDY = load_study("kirk2025")
ARMS = ["participant", "study", "dose", "domain", "personalisation"]
KEY = ["part", "study", "grouping", "outcome", "term"]


@pytest.fixture(scope="module")
def trial() -> Trial:
    assert STUDY.trial is not None
    return STUDY.trial


def one(rows: pd.DataFrame, part: str, **where: Any) -> Any:
    """The single row of a part with these values in its key."""
    chosen = rows[rows["part"] == part]
    for name, value in where.items():
        chosen = chosen[chosen[name].isna() if value is None else chosen[name] == value]
    assert len(chosen) == 1, (part, where, len(chosen))
    return chosen.iloc[0]


def computed(trial: Trial, name: str, tables: Mapping[str, pd.DataFrame], people: pd.DataFrame | None = None) -> pd.DataFrame:
    """An instrument's rows, of the declared shape, given the tables that it asks for; its figures are drawn."""
    instrument = INSTRUMENTS[name]
    rows = instrument.table(trial, instrument.begin({table: found for table, found in tables.items() if table in instrument.tables}, people))
    SCHEMA.to_arrow(rows, name)
    return rows


# --- simulated trials -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def assigned() -> pd.DataFrame:
    return made_up(240).rename(columns={"ppt_id": "participant", "multiplier": "dose"})


@pytest.fixture(scope="module")
def people(trial: Trial, assigned: pd.DataFrame) -> pd.DataFrame:
    """Covariates, as the table of participants has them: without arms."""
    return assigned[[name for name in covariates.schema(trial).names if name in assigned]]


@pytest.fixture(scope="module")
def tables(assigned: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """A longitudinal trial in which warm doses make liking fall and wanting rise."""
    draw = np.random.default_rng(3)
    arms = assigned[ARMS]
    warm = (arms["dose"] > 0).to_numpy(float)
    distress, liking = draw.normal(-1 + 4 * warm, 2), draw.normal(0.4 - 1.2 * warm, 0.8)
    weekly = [
        arms.assign(
            week=week, separation_distress=40 + week * distress + draw.normal(0, 2, len(arms)), behavioural_reliance=draw.normal(50, 9, len(arms))
        )
        for week in range(1, 5)
    ]
    sessions = [
        arms.assign(session=session, **{item: 60 + session * liking + draw.normal(0, 3, len(arms)) for item in ("likeability", "engagingness")})
        for session in range(1, 21, 3)
    ]
    asked = [
        arms.assign(timepoint=time, week=week, seeking_companionship_likelihood=draw.uniform(0, 100, len(arms)) + gain)
        for time, week, gain in (("pre", 0, 0), ("post", 4, 20 * warm))
    ]
    changed = "perceived_change_seeking_companionship_likelihood"
    frequency = draw.choice(["Never", "Weekly"], len(arms))
    seeking = pd.concat(asked, ignore_index=True).assign(companionship_freq=np.tile(frequency, 2), **{changed: "No change from before"})
    answers = draw.uniform(0, 100, (2 * len(arms), 4))
    names = ["emotchat_effectiveness", "emotchat_satis", "polchat_confidence", "polchat_knowledge"]
    competency = pd.concat([arms.assign(timepoint="pre"), arms.assign(timepoint="post")], ignore_index=True)
    return {
        "metadata_with_dropout": assigned[[*ARMS, "pre_treatment_dropout", "post_treatment_dropout"]],
        "attachment": pd.concat(weekly, ignore_index=True).assign(cognitive_reliance=lambda rows: rows["behavioural_reliance"] + 1),
        "preferences": pd.concat(sessions, ignore_index=True),
        "seeking_companionship": seeking,
        "goodbye": arms.assign(goodbye_action=draw.integers(0, 2, len(arms)).astype(float), goodbye_feeling_towards_assistant_response="No change"),
        "domain_competency": competency.assign(**{name: answers[:, number] for number, name in enumerate(names)}),
    }


def test_every_analysis_that_a_trial_can_name_is_an_instrument_whose_tables_are_declared(trial: Trial) -> None:
    assert tuple(INSTRUMENTS) == get_args(Analysis)
    for instrument in INSTRUMENTS.values():
        assert set(instrument.tables) <= set(trial.tables), instrument.name


@pytest.mark.parametrize("name", INSTRUMENTS)
def test_without_any_table_every_row_says_which_file_is_absent(trial: Trial, name: str) -> None:
    rows = computed(trial, name, {})
    assert len(rows) and rows["estimate"].isna().all() and rows["note"].str.startswith("absent: ").all()
    files = {trial.tables[table].file for table in INSTRUMENTS[name].tables}
    named = {file for note in rows["note"] for file in note.removeprefix("absent: ").split(", ")}
    assert named <= files | {"the table of participants"} and named & files
    assert INSTRUMENTS[name].figures(rows, trial) == {}


def test_a_faulty_table_is_a_note_in_its_parts_and_harms_no_other(trial: Trial, tables: dict[str, pd.DataFrame], people: pd.DataFrame) -> None:
    faulty = {
        **tables,
        "goodbye": tables["goodbye"].assign(goodbye_action=1.0),
        "domain_competency": tables["domain_competency"].drop(columns="timepoint"),
    }
    rows = computed(trial, "comparisons", faulty, people)
    assert "constant outcome" in one(rows, "goodbye by dose")["note"]
    assert "timepoint" in one(rows, "competency changes")["note"]
    whole = computed(trial, "comparisons", tables, people)
    for part in ("companionship users", "cross-study change"):
        pd.testing.assert_frame_equal(*(found[found["part"] == part].reset_index(drop=True) for found in (rows, whole)))


def test_an_endless_odds_ratio_is_null_and_says_why(trial: Trial, tables: dict[str, pd.DataFrame]) -> None:
    goodbye = tables["goodbye"].copy()
    goodbye.loc[goodbye["dose"] == 1, "goodbye_action"] = 1.0
    rows = computed(trial, "comparisons", {"goodbye": goodbye})
    endless = one(rows, "goodbye odds ratios", term="zero / pos1")
    assert np.isnan(endless["estimate"]) and endless["note"] == SEPARATED and endless["details"] == {"log_odds": None}
    assert one(rows, "goodbye odds ratios", term="neg1 / zero")["note"] is None


def test_profiles_say_how_many_are_harmed(trial: Trial, tables: dict[str, pd.DataFrame], people: pd.DataFrame) -> None:
    rows = computed(trial, "profiles", tables, people)
    assert set(rows["note"].dropna()) <= {"the risk does not rise"}
    risk = one(rows, "profile comparisons", outcome="separation_distress", grouping="relationship_seeking_category", term="risk_difference")
    assert risk["estimate"] > 0.5 and risk["details"]["nnh"] == pytest.approx(1 / risk["estimate"])
    sizes = rows[(rows["part"] == "profile sizes") & (rows["outcome"] == "separation_distress")]
    assert sizes["estimate"].sum() == pytest.approx(1) and set(sizes["n"]) == {240}
    slope = one(rows, "slopes", outcome="separation_distress", term="pos_lambda")
    assert slope["estimate"] == pytest.approx(3, abs=0.5) and slope["n"] == 96


def test_a_density_holds_every_participant_once_and_no_slope_of_theirs(trial: Trial, tables: dict[str, pd.DataFrame]) -> None:
    rows = computed(trial, "profiles", tables)
    density = rows[rows["part"] == "slope density"]
    assert [np.sum(details["counts"]) for details in density["details"]] == [96, 48, 96] == density["n"].tolist()
    edges = density["details"].iloc[0]["wanting_edges"]
    assert 0.0 in np.round(edges, 12)
    quadrants = np.array(density["details"].iloc[2]["counts"])[: len(edges) // 2, len(edges) // 2 :].sum()
    warm = one(rows, "profile comparisons", outcome="separation_distress", grouping="relationship_seeking_category", term="risk_difference")
    assert quadrants / 96 > warm["estimate"] > 0.5
    assert set(INSTRUMENTS["profiles"].figures(rows, trial)) == {"quadrants", "harm", "slopes"}


def test_one_outcome_without_its_table_leaves_the_others_and_their_adjustment(
    trial: Trial, tables: dict[str, pd.DataFrame], people: pd.DataFrame
) -> None:
    some = {name: tables[name] for name in ("attachment", "goodbye", "metadata_with_dropout")}
    rows = computed(trial, "vulnerability", some, people)
    assert one(rows, "vulnerability", outcome="tool_friend")["note"] == f"absent: {trial.tables['relational'].file}"
    found = rows[rows["grouping"] == "interaction"]
    assert set(found["outcome"]) == {"separation_distress", "reliance", "goodbye"}
    assert all(details["outcomes"] == 3 for details in found["details"])
    # Benjamini and Hochberg's smallest adjusted p is at most the number of tests times the smallest p, and never below it.
    smallest = found["p"].min()
    assert smallest <= min(details["p_global"] for details in found["details"]) <= min(1, len(found) * smallest)
    assert set(INSTRUMENTS["vulnerability"].figures(rows, trial)) == {"vulnerability"}


def test_rates_of_arms_average_to_that_of_everyone(trial: Trial, tables: dict[str, pd.DataFrame], people: pd.DataFrame) -> None:
    rows = computed(trial, "attrition", {"metadata_with_dropout": tables["metadata_with_dropout"]}, people)
    rates = rows[rows["part"] == "dropout rates"]
    everyone = one(rows, "dropout rates", term="everyone")
    assert everyone["estimate"] == people["post_treatment_dropout"].mean() and everyone["n"] == 240
    for _, arms in rates.dropna(subset=["grouping"]).groupby("grouping"):
        assert np.average(arms["estimate"], weights=arms["n"].astype(int)) == pytest.approx(everyone["estimate"])
    assert rows.loc[rows["part"] == "weights", "note"].str.startswith("absent").all()


def test_a_balance_test_says_how_far_its_p_may_be_off(trial: Trial, tables: dict[str, pd.DataFrame], people: pd.DataFrame) -> None:
    rows = computed(trial, "attrition", {"metadata_with_dropout": tables["metadata_with_dropout"]}, people)
    drawn = one(rows, "balance", grouping="multiplier", outcome="religion_binary")
    assert drawn["details"]["se_p"] == pytest.approx(np.sqrt(drawn["p"] * (1 - drawn["p"]) / 19_999))
    assert one(rows, "balance", grouping="domain", outcome="religion_binary")["details"]["se_p"] == 0


def test_psychometrics_are_those_of_the_simulated_answers(trial: Trial, people: pd.DataFrame) -> None:
    draw = np.random.default_rng(5)
    n = 400
    mood, company = draw.multivariate_normal([0, 0], [[1, 0.4], [0.4, 1]], n).T
    answers = {}
    for scale in SCALES:
        cause = company if scale.name in ("lubben", "ucla") else mood
        for item in scale.items:
            felt = (-1 if item in scale.reversed_items else 1) * cause + 0.6 * draw.standard_normal(n)
            level = scale.low + np.digitize(felt, np.linspace(-1.2, 1.2, scale.high - scale.low))
            answers[item] = [str(value) for value in level]
    who = pd.DataFrame({"participant": [f"p{number}" for number in range(n)], "study": "longitudinal"})
    items = pd.concat([pd.concat([who.assign(timepoint=time), pd.DataFrame(answers)], axis=1) for time in ("pre", "post")], ignore_index=True)
    high = np.repeat([70.0, 30.0], n // 2)[:, None]
    sliders = np.clip(high + 10 * draw.standard_normal((n, 20)), 0, 100)
    named = [f"tone:{name}" for name in (*"abcdefghijk", "rude_to_ai")]
    sliders[:, 11] = 100 - sliders[:, 11]
    attitudes = pd.concat([who, pd.DataFrame(sliders[:, :12], columns=named)], axis=1).melt(["participant", "study"], named, "item", "answer")
    stated = [name for table in trial.tables["stated_preferences"].columns for name in table.names]
    tables = {
        "psychosocial_items": items,
        "anthro_attitudes": attitudes,
        "stated_preferences": pd.concat([who, pd.DataFrame(sliders[:, 12:19], columns=stated)], axis=1),
        "seeking_companionship": who.assign(timepoint="pre", seeking_companionship_likelihood=sliders[:, 19]),
    }
    rows = computed(trial, "psychometrics", tables)
    loadings = rows[rows["part"] == "psychosocial loadings"].pivot(index="outcome", columns="term", values="estimate").astype(float)
    assert loadings.shape == (23, 2)
    leading = loadings.abs().idxmax(axis=1)
    assert leading[leading.index.str.startswith(("who", "phq"))].nunique() == leading[leading.index.str.startswith(("ucla", "lubben"))].nunique() == 1
    assert one(rows, "psychosocial fit", grouping="fit", outcome="bartlett_dof")["estimate"] == 253
    assert one(rows, "psychosocial scores", grouping="made", outcome="pre_psychosocial_F1")["details"]["sd"] == pytest.approx(1)
    assert one(rows, "types", grouping="made", outcome="cluster_name", term=CLUSTERS[0])["n"] == n
    chosen = rows[(rows["grouping"] == "clusters") & rows["details"].map(lambda details: bool(details and details.get("chosen")))]
    assert set(chosen["term"]) == {"2"} and set(chosen["outcome"]) == {"silhouette", "calinski_harabasz"}
    assert set(INSTRUMENTS["psychometrics"].figures(rows, trial)) == {"psychosocial_loadings", "type_loadings", "psychosocial_scores"}


def test_a_trend_over_listed_models_and_the_dose_that_they_are_worth(trial: Trial) -> None:
    draw = np.random.default_rng(4)
    days = {"openai/gpt-3.5-turbo": "2024-05-01", **{f"maker{number % 4}/m{number}": f"2025-{1 + number % 12:02d}-10" for number in range(24)}}
    catalogue = pd.DataFrame({"group": "any", "id": list(days), "created_timestamp": [pd.Timestamp(day).timestamp() + 3600 for day in days.values()]})
    forced = {**days, "openai/gpt-3.5-turbo": "2023-03-01"}
    years = {model: (pd.Timestamp(day) - pd.Timestamp("2023-03-01")).days / 365.25 for model, day in forced.items()}
    scores = [
        {"model_id": model, "entry_id": str(entry), "relationship_score": 3 + years.get(model, 0) + draw.normal(0, 0.1) + 0.05 * (entry % 5)}
        for model in [*forced, "maker/unlisted"]
        for entry in range(20)
    ]
    vector = pd.DataFrame(
        {"multiplier": np.repeat([-1.0, 0.0, 1.0], 5), "relationship_score": np.repeat([2.0, 4.0, 6.0], 5) + np.tile(np.arange(5) - 2, 3) / 10}
    )
    rows = computed(trial, "frontier_trend", {"frontier_scores": pd.DataFrame(scores), "frontier_models": catalogue, "frontier_vector": vector})
    mixed = one(rows, "trend", grouping="mixed")
    assert mixed["lower"] < 1 < mixed["upper"] and mixed["upper"] - mixed["lower"] < 0.1
    assert mixed["details"]["models"] == 25 and mixed["n"] == 500
    assert one(rows, "model means", term="openai/gpt-3.5-turbo")["details"]["released"] == "2023-03-01"
    worth = one(rows, "dose equivalents", grouping="2025", term="median of models")
    assert worth["estimate"] == pytest.approx((worth["details"]["score"] - 4) / 2) and worth["lower"] < worth["estimate"] < worth["upper"]
    assert set(INSTRUMENTS["frontier_trend"].figures(rows, trial)) == {"trend", "vector_scores"}


def test_years_beyond_the_vectors_scores_have_no_dose_and_say_so(trial: Trial) -> None:
    catalogue = pd.DataFrame({"group": "a", "id": ["a/old", "a/new"], "created_timestamp": [0.0, 400 * 86_400.0]})
    scores = pd.DataFrame(
        {"model_id": np.repeat(["a/old", "a/new"], 4), "entry_id": ["0", "1", "2", "3"] * 2, "relationship_score": [9.0, 9.5, 9.2, 9.1, 3, 4, 3, 4]}
    )
    vector = pd.DataFrame({"multiplier": [0.0, 0.0, 1.0, 1.0], "relationship_score": [1.0, 2.0, 7.0, 8.0]})
    rows = computed(trial, "frontier_trend", {"frontier_scores": scores, "frontier_models": catalogue, "frontier_vector": vector})
    beyond = one(rows, "dose equivalents", grouping="1970", term="mean of responses")
    assert np.isnan(beyond["estimate"]) and beyond["note"] == "outside of the vector's mean scores"
    assert one(rows, "dose equivalents", grouping="1971", term="mean of responses")["note"] is None


# --- files that are no rows -------------------------------------------------------------------------------------------


def with_table(trial: Trial, table: RawTable) -> Trial:
    return trial.model_copy(update={"tables": {**trial.tables, "this": table}})


def test_lists_by_name_in_a_json_file_become_rows(trial: Trial, tmp_path: Path) -> None:
    path = tmp_path / "models.json"
    path.write_text(json.dumps({"a": [{"id": "a/1", "created_timestamp": 5}], "b": [{"id": "b/1", "created_timestamp": 7}]}))
    found = raw.read_table(with_table(trial, trial.tables["frontier_models"]), "this", path)
    assert found.to_dict("list") == {"group": ["a", "b"], "id": ["a/1", "b/1"], "created_timestamp": [5.0, 7.0]}
    path.write_text(json.dumps([{"id": "a/1"}]))
    with pytest.raises(TrialFault, match=r"models.json.*one object whose values are lists"):
        raw.read_table(with_table(trial, trial.tables["frontier_models"]), "this", path)


def test_columns_named_category_and_item_become_answers(trial: Trial, tmp_path: Path) -> None:
    path = tmp_path / "attitudes.jsonl"
    rows = [{"ppt_id": f"p{number}", "study_id": "longitudinal", "tone:kind": number, "tone:rude": None} for number in range(2)]
    path.write_text("\n".join(map(json.dumps, rows)))
    found = raw.read_table(with_table(trial, trial.tables["anthro_attitudes"]), "this", path)
    assert found[["participant", "item", "answer"]].dropna().values.tolist() == [["p0", "tone:kind", 0.0], ["p1", "tone:kind", 1.0]]
    assert len(found) == 4
    path.write_text(json.dumps({"ppt_id": "p1", "study_id": "longitudinal", "kind": 3}))
    with pytest.raises(TrialFault, match="no column is named category:item"):
        raw.read_table(with_table(trial, trial.tables["anthro_attitudes"]), "this", path)


# --- the release ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def release(trial: Trial) -> tuple[dict[str, pd.DataFrame], pd.DataFrame]:
    """The release's tables that are there, and its participants."""
    found = {}
    for name in {table for instrument in INSTRUMENTS.values() for table in instrument.tables} | set(trial.participants):
        try:
            path = raw.raw_path(trial, name, STUDY.path)
        except raw.AbsentTable:
            continue
        found[name] = raw.read_table(trial, name, path)
    return found, covariates.participants_table(trial, {name: found[name] for name in trial.participants if name in found})


Release = tuple[dict[str, pd.DataFrame], pd.DataFrame]


def assert_published(row: Any, **expected: float) -> None:
    for name, value in expected.items():
        assert same(float(row[name]), value), (name, row[name], value)


@needs_release
@pytest.mark.parametrize("name", [name for name in INSTRUMENTS if name != "vulnerability"])  # of which nothing is published
def test_every_published_number_of_an_instrument_has_its_row_and_no_whole_one_differs(trial: Trial, release: Release, name: str) -> None:
    stated = published.published("kirk2025", Path(ROOT))
    rows = {table: len(found) for table, found in release[0].items()}
    found = published.compare(
        stated[stated["asset"] == name], {name: computed(trial, name, *release)}, published.incomplete_data(trial, rows, stated)
    )
    differing = found[found["verdict"] == published.DIFFERS]
    assert differing.empty, differing[["study", "outcome", "test", "quantity", "published", "computed"]].to_string()
    assert (found["verdict"] == published.AGREES).sum() > 10


@needs_release
def test_the_published_comparisons(trial: Trial, release: Release) -> None:
    rows = computed(trial, "comparisons", *release)
    ratio = one(rows, "goodbye odds ratios", study="cross_sectional", term="neg1 / zero")
    assert_published(ratio, estimate=1.3904, se=0.2593, statistic=1.7674, p_adjusted=0.3858)
    association = one(rows, "chi-squared", study=None, grouping="study", outcome="goodbye_action")
    assert_published(association, statistic=89.5378)
    assert association["details"]["min_expected"] == pytest.approx(552.4113, abs=6e-5)
    share = one(rows, "answers", study="longitudinal", grouping="study", outcome="goodbye_action", term="1")
    assert share["estimate"] == pytest.approx(0.439011, abs=6e-7) and share["n"] == 1820
    treated = one(rows, "cross-study change", grouping="study", outcome="psychosocial_F1", term="study[T.longitudinal]")
    assert_published(treated, estimate=0.0504, lower=0.0135, upper=0.0874, p=0.0075)
    change = one(rows, "competency changes", study="longitudinal", grouping="polchat", outcome="political_competency_diff")
    assert_published(change, estimate=8.2224, statistic=11.3026, lower=6.7947, upper=9.6502)
    arms = one(rows, "competency between arms", grouping="domain", outcome="post_emotional_competency")
    assert_published(arms, statistic=1.3192, df=1816.7675, p=0.1873, lower=-0.6837, upper=3.4932)
    assert arms["details"]["n1"] == 906 and arms["term"] == "polchat - emotchat"
    assert set(INSTRUMENTS["comparisons"].figures(rows, trial)) == {"goodbye_by_dose", "competency"}


@needs_release
def test_the_published_slopes_and_what_distress_predicts(trial: Trial, release: Release) -> None:
    rows = computed(trial, "profiles", *release)
    wanting = one(rows, "slopes", outcome="separation_distress", term="everyone")
    assert (wanting["estimate"], wanting["details"]["sd"], wanting["n"]) == (pytest.approx(2.1652, abs=6e-5), pytest.approx(3.4317, abs=6e-5), 1939)
    seeking = {"outcome": "seeking_companionship_likelihood", "grouping": "outer categories"}
    assert_published(one(rows, "distress predicts", term="separation_distress", **seeking), estimate=0.5039)
    crossed = one(rows, "distress predicts", term="separation_distress:relationship_seeking_category[T.pos_lambda]", **seeking)
    assert_published(crossed, estimate=0.0917, p=0.0182)
    assert_published(one(rows, "distress predicts", term="R²", **seeking), estimate=0.3464)
    assert one(rows, "slopes", outcome="liking")["note"] == f"absent: {trial.tables['preferences'].file}" or "preferences" in release[0]


@needs_release
def test_the_published_attrition(trial: Trial, release: Release) -> None:
    rows = computed(trial, "attrition", *release)
    published = {"cross_sectional": (0.0496, 0.2908, 0.8852), "longitudinal": (0.2701, 0.4776, 0.7765)}
    for study, expected in published.items():
        for treatment, p in zip(("personalisation", "domain", "multiplier"), expected, strict=True):
            assert_published(one(rows, "differential attrition", study=study, grouping=treatment), p=p)
    for study, dropped, mean in (("cross_sectional", 203, 1.953), ("longitudinal", 176, 1.701)):
        assert one(rows, "dropout rates", study=study, term="everyone")["details"]["dropped"] == dropped
        assert one(rows, "weights", study=study, outcome="ipw_weight_truncated")["estimate"] == pytest.approx(mean, abs=5.1e-4)
    assert set(INSTRUMENTS["attrition"].figures(rows, trial)) == {"dropout_rates", "balance"}


@needs_release
def test_the_published_scores_and_types(trial: Trial, release: Release) -> None:
    rows = computed(trial, "psychometrics", *release)
    after = one(rows, "psychosocial scores", grouping="imported", outcome="post_psychosocial_F2", term="mean")
    assert (round(after["estimate"], 3), round(after["details"]["sd"], 3)) == (-0.093, 1.008)
    related = one(rows, "psychosocial scores", grouping="imported", term="correlation")
    assert related["estimate"] == pytest.approx(0.3878, abs=6e-5)
    sizes = {name: one(rows, "types", grouping="imported", outcome="cluster_name", term=name)["details"]["count"] for name in CLUSTERS}
    assert sizes == {"Anthro Skeptic": 1561, "Anthro Enthusiast": 1973}
    difference = one(rows, "types", grouping="imported", term="Anthro Enthusiast - Anthro Skeptic")
    assert abs(difference["estimate"] - (0.511984 + 0.647114)) < 2e-6
    assert difference["statistic"] == pytest.approx(45.847648, abs=6e-7)


@needs_release
def test_the_published_topics_and_sizes(trial: Trial, release: Release) -> None:
    rows = computed(trial, "topics", *release)
    assert rows.loc[rows["part"] == "topic ranks", "estimate"].astype(float).round(2).tolist() == [3.69, 3.55, 2.68, 2.67, 2.41]
    matched = [(study, domain) for study in ("cross_sectional", "longitudinal") for domain in ("emotchat", "polchat")]
    for (study, domain), absolute, relative in zip(matched, (13.3, 10.9, 15.5, 13.7), (36.7, 63.7, 41.2, 61.2), strict=True):
        for match, share in (("absolute", absolute), ("relative", relative)):
            for source in ("made", "imported"):
                row = one(rows, "topic matches", study=study, grouping=f"{source} {domain}", outcome=match)
                assert 100 * row["estimate"] == pytest.approx(share, abs=0.051), (study, domain, match)
    women = rows[(rows["part"] == "sociodemographics") & (rows["outcome"] == "gender") & (rows["term"] == "Female")]
    assert sum(details["count"] for details in women["details"]) == 2017 and set(women["study"]) == {"longitudinal", "cross_sectional", "calibration"}


@needs_release
def test_the_published_worths_win_rates_and_rating_models(trial: Trial, release: Release) -> None:
    rows = computed(trial, "calibration", *release)
    worths = rows[(rows["part"] == "log-worths") & (rows["grouping"] == "all doses") & (rows["outcome"] == "preference")]
    assert worths["estimate"].astype(float).round(3).tolist() == [-1.034, -0.637, -0.398, 0, 0.313, 0.107, -0.862]
    rates = rows[(rows["part"] == "win rates") & (rows["outcome"] == "relationship-seeking")]
    assert rates["estimate"].astype(float).round(3).tolist() == [0.166, 0.241, 0.374, 0.505, 0.673, 0.756, 0.786]
    assert (rates["lower"] < rates["estimate"]).all() and (rates["estimate"] < rates["upper"]).all()
    assert one(rows, "mixed models", grouping="truncated quadratic", outcome="coherence", term="multiplier")["n"] == 933
    assert set(INSTRUMENTS["calibration"].figures(rows, trial)) == {"ratings", "worths", "win_rates"}


@needs_release
def test_the_published_scores_of_the_vector(trial: Trial, release: Release) -> None:
    rows = computed(trial, "frontier_trend", *release)
    scores = rows[rows["part"] == "vector scores"]
    assert scores["term"].tolist() == ["-1", "-0.5", "0", "0.5", "1"] and set(scores["n"]) == {100}
    assert scores["estimate"].astype(float).round(2).tolist() == [2.17, 3.04, 4.11, 5.50, 7.16]
    assert (scores["upper"] - scores["estimate"]).astype(float).round(3).tolist() == [0.144, 0.282, 0.364, 0.364, 0.205]


@needs_release
def test_vulnerability_has_a_family_of_interactions_an_outcome(trial: Trial, release: Release) -> None:
    rows = computed(trial, "vulnerability", *release)
    found = rows[rows["grouping"] == "interaction"]
    there = {"psychosocial_F1": 10, "separation_distress": 12, "goodbye": 12}
    assert found.groupby("outcome").size()[list(there)].to_dict() == there
    assert (found["p_adjusted"].astype(float) >= found["p"].astype(float)).all()
    untold = rows[rows["term"].fillna("").str.contains("Prefer not to say", regex=False)]
    assert len(untold) and untold[["p_adjusted", "grouping"]].isna().all(axis=None)
