"""Published numbers against computed ones: what agrees, what differs, and what cannot be compared because data are not there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from released import ROOT, needs_release

from relseek_assets.study import load_study
from relseek_assets.trials import estimates, fdr, frames, published, raw
from relseek_assets.trials.contrasts import FULL
from relseek_assets.trials.published import PublishedFault

LABEL = "RS: Avg(Pos) - Avg(Neg)"


def stated(**values: Any) -> dict[str, Any]:
    """A published p-value or estimate of the dose's main effect."""
    row = {"source": "appendix A", "asset": "trial_contrasts", "study": "longitudinal", "outcome": "reliance", "test_type": "main_effect_RS"}
    return {
        **row,
        "test": LABEL,
        "variant": "primary",
        "quantity": "estimate",
        "published": 0.0,
        "unit": 1e-4,
        "family": "",
        "local_family": "",
        **values,
    }


def contrasts(*rows: dict[str, Any]) -> pd.DataFrame:
    """Computed contrasts with these values, the rest of a contrast's columns made up."""
    whole = {"study": "longitudinal", "outcome": "reliance", "test_type": "main_effect_RS", "contrast": LABEL, "variant": "primary"}
    numbers = {"estimate": 2.71494, "se": 1.3, "lower": 0.2, "upper": 5.2, "p_raw": 0.03, "p_local": 0.03, "p_global": 0.04, "df": 1900.0, "n": 7501}
    return pd.DataFrame([{**whole, **numbers, **row} for row in rows])


def compared(rows: list[dict[str, Any]], *computed: dict[str, Any], **incomplete: str) -> pd.DataFrame:
    return published.compare(pd.DataFrame(rows), {"trial_contrasts": contrasts(*computed)} if computed else {}, incomplete)


@pytest.mark.parametrize(
    ("printed", "unit", "computed", "verdict"),
    [
        (2.7149, 1e-4, 2.71494, "agrees"),
        (2.7149, 1e-4, 2.71496, "agrees"),  # arithmetic may cross the last digit's border
        (2.7149, 1e-4, 2.71502, "differs"),
        (2.7149, 1e-4, -2.7149, "differs"),
        (0.0001, 1e-4, 0.00014, "agrees"),
        (4.3076e-13, 1e-17, 4.30761e-13, "agrees"),
        (4.3076e-13, 1e-17, 4.3096e-13, "differs"),  # by 2 in the fourth digit, far below 6e-5
        (4.308e-13, 1e-16, 4.3076e-13, "agrees"),  # the specification prints four digits
        (0.0, 1e-4, 4.9e-5, "agrees"),
        (0.0, 1e-4, 5.2e-5, "differs"),
        (43.9, 0.1, 43.944, "agrees"),
        (43.9, 0.1, 43.96, "differs"),
        (1820, 1, 1820.0, "agrees"),
        (1820, 1, 1821.0, "differs"),
    ],
)
def test_a_number_agrees_up_to_the_digits_that_were_printed(printed: float, unit: float, computed: float, verdict: str) -> None:
    row = compared([stated(published=printed, unit=unit)], {"estimate": computed}).iloc[0]
    assert row["verdict"] == verdict
    assert row["difference"] == pytest.approx(computed - printed, abs=1e-18) and row["computed"] == computed


def test_a_computed_value_that_is_not_a_number_differs() -> None:
    assert compared([stated(published=2.7149)], {"estimate": np.nan}, {"variant": "full"}).iloc[0]["verdict"] == "differs"


def test_a_contrast_that_is_missing_beside_others_of_its_kind_differs() -> None:
    rows = [stated(published=2.7149), stated(published=1.0, test="RS: something else")]
    found = compared(rows, {})
    assert found["verdict"].tolist() == ["agrees", "differs"]
    assert found["reason"].tolist() == ["", "no such value was computed"]


def test_an_outcome_without_data_is_absent_and_says_so() -> None:
    found = compared([stated(), stated(outcome="likeability"), stated(asset="trial_forms")], {"estimate": 0.0})
    assert found["verdict"].tolist() == ["agrees", "absent", "absent"]
    assert found["reason"].tolist() == ["", "trial_contrasts has no main effect RS of longitudinal likeability", "trial_forms has not been computed"]


def test_estimates_of_some_of_the_participants_are_absent_however_near() -> None:
    found = compared([stated(published=2.7149)], {}, reliance="attachment: 149 of 9007 rows are there").iloc[0]
    assert (found["verdict"], found["reason"]) == ("absent", "attachment: 149 of 9007 rows are there") and np.isnan(found["computed"])


def family(*outcomes: str, **values: Any) -> list[dict[str, Any]]:
    """p-values of a measure family in which every outcome is a local family of its own."""
    quantities = {"p_raw": {}, "p_local": {"local_family": "of {}"}, "p_global": {"family": "attachment"}}
    rows = []
    for outcome in outcomes:
        for quantity, families in quantities.items():
            named = {"family": "attachment", "local_family": f"of {outcome}"} if families else {}
            rows.append(stated(outcome=outcome, quantity=quantity, published=0.03, **named, **values))
    return rows


def test_adjustment_in_a_family_of_which_an_outcome_is_absent_is_not_compared() -> None:
    found = compared(family("reliance", "will_miss_ai"), {"p_global": 0.9}).set_index(["outcome", "quantity"])
    assert found.loc["reliance", "verdict"].to_dict() == {"p_raw": "agrees", "p_local": "agrees", "p_global": "absent"}
    assert found.loc[("reliance", "p_global"), "reason"] == "the family attachment lacks will_miss_ai"
    whole = compared(family("reliance", "will_miss_ai"), {"p_global": 0.9}, {"outcome": "will_miss_ai", "p_global": 0.03})
    assert whole["verdict"].tolist() == ["agrees", "agrees", "differs", "agrees", "agrees", "agrees"]


def test_families_are_of_one_study_and_one_kind_of_test() -> None:
    rows = family("reliance") + family("will_miss_ai", study="cross_sectional") + family("tool_friend", test_type="dose_response")
    found = compared(rows, {"p_global": 0.03})
    assert found[found["outcome"] == "reliance"]["verdict"].eq("agrees").all()
    assert found[found["outcome"] != "reliance"]["verdict"].eq("absent").all()


def test_temporal_tests_share_a_family() -> None:
    rows = family("reliance", test_type="temporal_main") + family("tool_friend", test_type="temporal_interaction")
    found = compared(rows, {"test_type": "temporal_main", "p_global": 0.03}).set_index(["outcome", "quantity"])
    assert found.loc[("reliance", "p_global"), "reason"] == "the family attachment lacks tool_friend"


def test_the_summary_counts_every_number_once() -> None:
    found = compared([stated(published=2.7149), stated(published=2.0), stated(asset="trial_forms"), stated(outcome="mood")], {})
    table = published.summary(found).set_index("asset")
    assert table.loc["trial_contrasts"].tolist() == [3, 1, 1, 1] and table.loc["trial_forms"].tolist() == [1, 0, 0, 1]
    assert table.loc["all"].tolist() == [4, 1, 1, 2]
    assert published.reasons(found)["numbers"].tolist() == [1, 1]


def test_the_chosen_polynomial_is_compared_by_its_degree() -> None:
    forms = pd.DataFrame({"study": "longitudinal", "outcome": "reliance", "form": ["linear", "quadratic", "cubic"], "selected": [False, False, True]})
    forms = forms.assign(heterogeneous=True, heterogeneity_chi2=203.73, heterogeneity_df=4, heterogeneity_p=5.9262e-43)
    row = {"asset": "trial_forms", "test": "", "variant": ""}
    rows = [
        stated(**row, test_type="form", quantity="degree", published=3, unit=1),
        stated(**row, test_type="heterogeneity", quantity="p", published=5.9262e-43, unit=1e-47),
        stated(**row, test_type="heterogeneity", quantity="heterogeneous", published=1, unit=1),
    ]
    assert published.compare(pd.DataFrame(rows), {"trial_forms": forms})["verdict"].tolist() == ["agrees"] * 3
    other = forms.assign(selected=[False, True, False], heterogeneous=False)
    assert published.compare(pd.DataFrame(rows), {"trial_forms": other})["verdict"].tolist() == ["differs", "agrees", "differs"]


def test_half_a_file_makes_its_outcomes_incomplete_and_no_others() -> None:
    trial = load_study("kirk2025").trial
    assert trial is not None
    rows = dict.fromkeys(trial.tables, 10_000) | {"relational": 149, "mood": 0}
    found = published.incomplete_data(trial, rows, published.published("kirk2025", None))
    assert found["tool_friend"] == found["relational"] == "relational: 149 of 9007 rows are there"
    assert found["valence"] == "mood is absent or at fault"
    assert set(found) == {"relational", "mood", "tool_friend", "ios_scale", "personalisation_sensecheck", "valence", "arousal"}


def instrument(*rows: dict[str, Any]) -> pd.DataFrame:
    """A table of a published instrument with these rows."""
    return pd.DataFrame(list(rows)).reindex(columns=list(INSTRUMENT_COLUMNS)).astype(object).where(lambda table: table.notna(), None)


INSTRUMENT_COLUMNS = (
    *("part", "study", "grouping", "outcome", "term", "estimate", "se", "df", "statistic", "p", "p_adjusted", "lower", "upper", "n"),
    *("method", "note", "details"),
)


def of_instrument(asset: str, part: str, test: str, quantity: str, value: float, **key: Any) -> dict[str, Any]:
    return stated(asset=asset, test_type=part, test=test, variant="", quantity=quantity, published=value, **{"study": "", "outcome": "", **key})


def test_rows_of_instruments_are_found_by_grouping_and_term_and_their_further_numbers_too() -> None:
    shared = {"part": "answers", "grouping": "study", "outcome": "goodbye_action"}
    table = instrument(
        {**shared, "study": "longitudinal", "term": "1.0", "estimate": 0.439, "n": 1820, "details": {"count": 799, "level": "yes"}},
        {**shared, "study": "cross_sectional", "term": "1.0", "estimate": 0.2796, "n": 1506, "details": {"count": 421}},
        {"part": "chi-squared", "grouping": "study", "outcome": "goodbye_action", "term": "association", "statistic": 89.5378},
    )
    here = {"outcome": "goodbye_action"}
    rows = [
        of_instrument("comparisons", "answers", "study: 1", "count", 799, study="longitudinal", **here),
        of_instrument("comparisons", "answers", "study: 1", "n", 1506, study="cross_sectional", **here),
        of_instrument("comparisons", "chi-squared", "study: association", "statistic", 89.5378, **here),
        of_instrument("comparisons", "chi-squared", "study: association", "p", 3.0083e-21, **here),
    ]
    found = published.compare(pd.DataFrame(rows), {"comparisons": table})
    assert found["computed"].tolist()[:3] == [799, 1506, 89.5378]
    assert found["verdict"].tolist() == ["agrees", "agrees", "agrees", "differs"]


def test_a_part_that_lacks_its_file_is_absent_and_one_that_failed_differs() -> None:
    table = instrument(
        {"part": "profile sizes", "outcome": "separation_distress", "note": "absent: preferences.jsonl"},
        {"part": "distress predicts", "outcome": "goodbye_action", "note": "ValueError: something else"},
        {"part": "slopes", "study": "longitudinal", "outcome": "separation_distress", "term": "everyone", "estimate": 2.17},
    )
    rows = [
        of_instrument("profiles", "profile sizes", "Aligned Engagement", "count", 876, study="longitudinal", outcome="separation_distress"),
        of_instrument("profiles", "slopes", "everyone", "estimate", 2.17, study="longitudinal", outcome="separation_distress"),
        of_instrument("profiles", "slopes", "everyone", "se", 2.17, study="longitudinal", outcome="separation_distress"),
    ]
    found = published.compare(pd.DataFrame(rows), {"profiles": table})
    assert found["verdict"].tolist() == ["absent", "agrees", "differs"] and found.loc[0, "reason"] == "absent: preferences.jsonl"
    failed = of_instrument("profiles", "distress predicts", "correlation: r", "estimate", 0.4, study="longitudinal", outcome="goodbye_action")
    assert published.compare(pd.DataFrame([failed]), {"profiles": table})["verdict"].tolist() == ["differs"]


def test_counts_published_over_several_cells_are_sums_of_them() -> None:
    people = [("longitudinal", "Male", 3), ("cross_sectional", "Male", 4), ("cross_sectional", "Female", 5)]
    arms = [(-1.0, "polchat", 6), (-1.0, "emotchat", 7), (0.5, "polchat", 8)]
    table = instrument(
        *({"part": "sociodemographics", "study": s, "outcome": "gender", "term": t, "details": {"count": n}} for s, t, n in people),
        *(
            {"part": "condition sizes", "study": "longitudinal", "grouping": "arm", "outcome": "participants", "term": f"{dose:g}, {domain}", "n": n}
            | {"details": {"multiplier": dose, "domain": domain}}
            for dose, domain, n in arms
        ),
        *({"part": "topic ranks", "outcome": "reversed rank", "term": topic, "estimate": mean} for topic, mean in (("a", 3.69), ("b", 3.55))),
    )
    sizes = {"study": "longitudinal", "outcome": "participants"}
    rows = [
        of_instrument("topics", "sociodemographics", "Male", "count", 7, outcome="gender"),
        of_instrument("topics", "sociodemographics", "everyone", "count", 9, outcome="gender", study="cross_sectional"),
        of_instrument("topics", "condition sizes", "multiplier: -1", "n", 13, **sizes),
        of_instrument("topics", "condition sizes", "domain: polchat", "n", 14, **sizes),
        of_instrument("topics", "condition sizes", "arm: -1, emotchat", "n", 7, **sizes),
        of_instrument("topics", "topic ranks", "place 2", "estimate", 3.55, outcome="reversed rank"),
    ]
    assert published.compare(pd.DataFrame(rows), {"topics": table})["verdict"].tolist() == ["agrees"] * 6


# --- what is published ------------------------------------------------------------------------------------------------


def test_numbers_of_the_specification_are_numbers_and_each_is_stated_once() -> None:
    found = published.published("kirk2025", None)
    assert list(found.columns) == list(published.PUBLISHED_COLUMNS)
    assert np.isfinite(found[["published", "unit"]].to_numpy()).all() and (found["unit"] > 0).all()
    assert not found.duplicated(list(published.KEY)).any()
    assert set(found["source"].str.split().str[0]) == {"appendix", "section"}
    p = found[found["quantity"].isin(["p", "p_raw", "p_local", "p_global", "p_adjusted"])]
    assert p["published"].between(0, 1).all()
    adjusted = found["quantity"].isin(list(published.ADJUSTED)) & found["asset"].eq("trial_contrasts")
    assert found.loc[adjusted, ["family", "local_family"]].ne("").all(axis=None)
    contrast = found[found["asset"] == "trial_contrasts"].pivot_table(
        index=["study", "outcome", "test", "variant"], columns="quantity", values="published"
    )
    primary = contrast.xs("primary", level="variant")
    assert (primary["lower"] <= primary["estimate"]).all() and (primary["estimate"] <= primary["upper"]).all()
    # adjustment never lowers a p-value; printed digits may
    assert (primary["p_local"] >= primary["p_raw"] - 6e-5).all() and (primary["p_global"] >= primary["p_raw"] - 6e-5).all()


def test_an_unknown_study_has_no_published_numbers() -> None:
    with pytest.raises(PublishedFault, match="no published numbers of 'sycophancy' are known; there are those of kirk2025"):
        published.published("sycophancy", None)


def contrast_file(folder: Path, name: str, **values: Any) -> None:
    """A statistics file with one contrast of one outcome."""
    (folder / published.STATISTICS).mkdir(parents=True, exist_ok=True)
    row = {"test": LABEL, "test_type": "main_effect_RS", "local_family": "attachment_core", "study_type": "longitudinal", "outcome": "reliance"}
    row |= {
        "primary": {"estimate": 9.5, "lower_cl": 9.0, "upper_cl": 10.0, "p_raw": 2.5e-13, "p_local": 0.25, "p_global": "NA"},
        FULL: {"estimate": 8.5},
    }
    text = json.dumps({"measure_family": "attachment", "contrasts": [row | values]})
    (folder / published.STATISTICS / name).write_text(text)


def test_files_of_the_release_come_before_the_specification(tmp_path: Path) -> None:
    contrast_file(tmp_path, "attachment_contrasts.json")
    contrast_file(tmp_path, "perceptions_contrasts.json", outcome="tool_friend", local_family="relational")
    found = published.published("kirk2025", tmp_path)
    key = found["outcome"].eq("reliance") & found["test"].eq(LABEL) & found["study"].eq("longitudinal") & found["quantity"].eq("estimate")
    mine = found[key].set_index("variant")
    assert mine.loc["primary", ["source", "published"]].tolist() == ["attachment_contrasts.json", 9.5]
    assert mine.loc["narrow", "source"] == "appendix A"
    other = found[found["source"] == "perceptions_contrasts.json"]
    assert set(other["quantity"]) == {"estimate", "lower", "upper", "p_raw", "p_local"}  # NA is no number
    assert other.set_index("quantity").loc["p_local", "local_family"] == "relational"
    units = other[other["variant"] == "primary"].set_index("quantity")["unit"]
    assert units["p_raw"] == pytest.approx(1e-17) and units["estimate"] == 1e-4


def test_a_file_of_another_layout_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / published.STATISTICS).mkdir(parents=True)
    (tmp_path / published.STATISTICS / "mood_contrasts.json").write_text('{"contrasts": [{"test": "x"}]}')
    with pytest.raises(PublishedFault, match="mood_contrasts.json is not of the published layout"):
        published.published("kirk2025", tmp_path)


@needs_release
def test_the_published_contrasts_of_self_disclosure_are_recomputed_from_the_release() -> None:
    study = load_study("kirk2025")
    trial = study.trial
    assert trial is not None
    table = raw.read_table(trial, "attachment", raw.raw_path(trial, "attachment", study.path))
    keys = ["longitudinal:self_disclosure", "cross_sectional:self_disclosure"]
    parts = []
    for key in keys:
        frame = frames.outcome_frame(trial, key, {"attachment": table})
        specification = estimates.specification_of(estimates.forms_table(frame))
        fits = {name: estimates.fit_one(frame, specification, name) for name in ("full_continuous", "full_coarsened", "additive_continuous")}
        parts.append(estimates.contrasts_table(frame, fits))
    computed = fdr.adjusted(pd.concat(parts, ignore_index=True), trial)
    everything = published.published("kirk2025", Path(ROOT))
    found = published.compare(everything, {"trial_contrasts": computed})
    mine = found[found["outcome"].eq("self_disclosure") & found["asset"].eq("trial_contrasts")]
    assert mine["verdict"].value_counts().to_dict().keys() == {"agrees", "absent"} and (mine["verdict"] == "agrees").sum() > 500
    assert mine[mine["verdict"] == "absent"]["reason"].str.startswith("the family attachment").all()


@needs_release
def test_every_statistics_file_of_the_release_is_read_and_no_number_is_stated_twice() -> None:
    folder = Path(ROOT) / published.STATISTICS
    found = published.from_files(folder)
    assert set(found["source"]) == {path.name for path in folder.glob("*.json")}
    assert not found.duplicated(list(published.KEY)).any()
    # what both state is the same up to the fewer digits of the specification
    both = published.published("kirk2025", None).merge(found, on=list(published.KEY), suffixes=("", "_file"))
    unit = np.maximum(both["unit"], both["unit_file"])
    assert len(both) > 900 and ((both["published"] - both["published_file"]).abs() <= 0.51 * unit).all()
