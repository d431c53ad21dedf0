"""The published numbers of a trial, and its computed tables compared with them value by value (spec/human_study.md).

Published numbers are read from the statistics files of the release; those that no file holds are in `published_{study}.csv` beside this module, with
the section of the specification that states them. Here belong the translation of both into rows of one shape and the comparison. No number is
estimated here, and where tables are stored is not known.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from relseek_assets.trial import Trial
from relseek_assets.trials.fdr import TOGETHER
from relseek_assets.trials.raw import TrialFault

STATISTICS = Path("8-human-studies-analysis/outputs/stats")  # below the folder of the release

#: What tells a value apart. For `trial_contrasts`, `test_type` and `test` are its test_type and contrast; for tables of instruments their part,
#: and their grouping and term.
KEY = ("asset", "study", "outcome", "test_type", "test", "variant", "quantity")
#: `unit` is one unit of the last digit that the source prints; `family` and `local_family` those of adjusted p-values.
PUBLISHED_COLUMNS = ("source", *KEY, "published", "unit", "family", "local_family")
COMPARED_COLUMNS = (
    *("source", "asset", "study", "outcome", "test", "variant", "quantity", "published", "computed", "difference", "tolerance", "verdict", "reason"),
)
AGREES, DIFFERS, ABSENT = "agrees", "differs", "absent"

FOUR_DECIMALS = 1e-4
SMALL = 1e-5  # the release prints smaller numbers with five significant digits, others with four decimals
RELATIVE = 2e-4
ADJUSTED = {"p_local": "local_family", "p_global": "family"}
MAIN_TABLES = ("trial_tables", "trial_forms", "trial_contrasts")
LACKS = "absent: "  # a note that names files
EVERYONE = "everyone"
DEGREES = {"linear": 1, "quadratic": 2, "cubic": 3}

INSTRUMENT_KEY = ("part", "study", "grouping", "outcome", "term")
INSTRUMENT_QUANTITIES = ("estimate", "se", "df", "statistic", "p", "p_adjusted", "lower", "upper", "n")
CONTRAST_QUANTITIES = {"estimate": "estimate", "se": "se", "lower_cl": "lower", "upper_cl": "upper", "p_raw": "p_raw", **{p: p for p in ADJUSTED}}


class PublishedFault(TrialFault):
    """Published numbers that are not there or not of the known layout; the message names the study or the file."""


# --- published --------------------------------------------------------------------------------------------------------


def published(study: str, release: Path | None) -> pd.DataFrame:
    """Every published number of a study, `PUBLISHED_COLUMNS`: from the release where it has the file, else from the specification.

    Raises:
        PublishedFault: nothing is published of this study, or a file has another layout.
    """
    stated = Path(__file__).with_name(f"published_{study}.csv")
    if not stated.is_file():
        known = sorted(path.stem.removeprefix("published_") for path in stated.parent.glob("published_*.csv"))
        raise PublishedFault(f"no published numbers of {study!r} are known; there are those of {', '.join(known)}")
    tables = [pd.read_csv(stated, dtype={"printed": str}, keep_default_na=False).rename(columns={"printed": "published"})]
    if release is not None:
        tables.insert(0, from_files(release / STATISTICS))
    found = pd.concat(tables, ignore_index=True).astype({"published": float, "unit": float})
    return found.drop_duplicates(list(KEY), ignore_index=True)[list(PUBLISHED_COLUMNS)]


def from_files(folder: Path) -> pd.DataFrame:
    """The numbers of the statistics files that are in `folder`, `PUBLISHED_COLUMNS`; files of other names are left alone."""
    rows = [row | {"source": path.name} for pattern, read in READERS.items() for path in sorted(folder.glob(pattern)) for row in _read(path, read)]
    return pd.DataFrame(rows, columns=list(PUBLISHED_COLUMNS)).fillna({name: "" for name in PUBLISHED_COLUMNS if name not in ("published", "unit")})


def _read(path: Path, read: Callable[[Any], Iterable[dict[str, Any]]]) -> Iterator[dict[str, Any]]:
    try:
        rows = list(read(json.loads(path.read_text(encoding="utf-8"))))
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise PublishedFault(f"{path} is not of the published layout ({type(error).__name__}: {error}); put the released file back") from error
    for row in rows:
        value = row["published"]
        if isinstance(value, int | float) and np.isfinite(value):  # NA is a string or null, and no number to compare
            yield row | {"published": float(value), "unit": printed_unit(float(value))}


def printed_unit(value: float) -> float:
    """One unit of the last digit with which the release prints a number: four decimals, five significant digits where that would leave none."""
    return 10.0 ** (np.floor(np.log10(abs(value))) - 4) if 0 < abs(value) < SMALL else FOUR_DECIMALS


def _contrasts(file: Any) -> Iterator[dict[str, Any]]:
    family = str(file["measure_family"])
    for row in file["contrasts"]:
        key = {name: row[name] for name in ("outcome", "test_type", "test")} | {"asset": "trial_contrasts", "study": row["study_type"]}
        for variant, values in row.items():
            if isinstance(values, dict):
                for printed, quantity in CONTRAST_QUANTITIES.items():
                    families = {"family": family, "local_family": row["local_family"]} if quantity in ADJUSTED else {}
                    yield {**key, **families, "variant": variant, "quantity": quantity, "published": values.get(printed)}


def _heterogeneity(file: Any) -> Iterator[dict[str, Any]]:
    for row in file.values():
        key = {"asset": "trial_forms", "study": row["study_type"], "outcome": row["construct"], "test_type": "heterogeneity"}
        yield {**key, "quantity": "p", "published": row["p_value"]}
        yield {**key, "quantity": "heterogeneous", "published": int(row["heterogeneous"])}


def _instrument(asset: str, part: str, quantities: Mapping[str, Any], **key: str) -> Iterator[dict[str, Any]]:
    """Numbers of one row of an instrument's table; key: study, grouping, outcome, term."""
    key["study"] = key.get("study", "").replace("-", "_")
    shared = {"asset": asset, "test_type": part, "test": _test(key.pop("grouping", ""), key.pop("term", "")), **key}
    for quantity, value in quantities.items():
        yield {**shared, "quantity": quantity, "published": value}


def _taken(row: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """What a row has of the named columns, under our names."""
    return {mine: row[theirs] for theirs, mine in names.items() if theirs in row}


T_TEST = {"t_stat": "statistic", "df": "df", "p_value": "p", "ci_lower": "lower", "ci_upper": "upper"}
CHI_SQUARED = {"chi_sq": "statistic", "df": "df", "p_value": "p", "min_expected": "min_expected"}
MARGINAL_MEAN = {"prob": "estimate", "SE": "se", "asymp.LCL": "lower", "asymp.UCL": "upper"}
ODDS_RATIO = {"odds.ratio": "estimate", "SE": "se", "z.ratio": "statistic", "p.value": "p_adjusted"}


def _chi_squared(file: Any) -> Iterator[dict[str, Any]]:
    for scope, outcomes in file.items():
        across = scope == "cross_study"
        for outcome, treatments in outcomes.items():
            for treatment, found in treatments.items():
                key = {"outcome": outcome, "grouping": "study" if across else treatment}
                # R writes numbers as lists of one.
                tested = {column: value[0] for column, value in found.items() if column in CHI_SQUARED}
                yield from _instrument(
                    "comparisons", "chi-squared", _taken(tested, CHI_SQUARED), **key, study="" if across else scope, term="association"
                )
                for row in found["breakdown"] if across else ():
                    shares = _taken(row, {"n": "count", "percentage": "percentage"})
                    yield from _instrument("comparisons", "answers", shares, **key, study=row["group"], term=str(row["level"]))


def _goodbye_by_dose(file: Any) -> Iterator[dict[str, Any]]:
    for study, tables in file.items():
        key = {"study": study, "grouping": "lambda_factor", "outcome": "goodbye_action"}
        for row in tables["marginal_means"]:
            yield from _instrument("comparisons", "goodbye by dose", _taken(row, MARGINAL_MEAN), **key, term=row["lambda_factor"])
        for row in tables["pairwise"]:
            yield from _instrument("comparisons", "goodbye odds ratios", _taken(row, ODDS_RATIO), **key, term=row["contrast"])


def _competency_changes(file: Any) -> Iterator[dict[str, Any]]:
    names = {"n": "n", "mean_change": "estimate", "sd_change": "sd", **T_TEST}
    for row in file:
        study, _, domain = row["study"].lower().partition(" ")
        key = {"study": study, "grouping": domain, "outcome": f"{row['outcome']}_diff", "term": "mean"}
        yield from _instrument("comparisons", "competency changes", _taken(row, names), **key)


def _competency_between_arms(file: Any) -> Iterator[dict[str, Any]]:
    names = {column: column for column in ("n1", "n2", "mean1", "mean2", "sd1", "sd2")} | T_TEST
    for row in file:
        outcome = row["outcome"] if row["outcome"].endswith("_diff") else f"post_{row['outcome']}"
        key = {"study": row["study"].lower(), "grouping": row["treatment"], "outcome": outcome, "term": f"{row['group1']} - {row['group2']}"}
        yield from _instrument("comparisons", "competency between arms", _taken(row, names), **key)


# Test of a comparison of profiles -> its numbers in the file (spec section 9).
PROFILE_TESTS = {
    "profiles": {"chisq_stat": "statistic", "chisq_p": "p"},
    "risk_difference": {"risk_diff": "estimate", "prop_test_p": "p"},
    "odds_ratio": {"odds_ratio": "estimate", "ci_lower": "lower", "ci_upper": "upper"},
    "harm": {"nnh": "estimate"},
    "steady": {"sens1_p": "p"},
    "steep": {"sens2_p": "p"},
    "score": {"decoupling_t": "statistic", "decoupling_p": "p"},
    "effect_size": {"cohens_d": "estimate"},
}
SEEKING, GOODBYE = "seeking_companionship_likelihood", "goodbye_action"
PROFILE_OUTCOMES = {"sep_distress": "separation_distress", "goodbye": GOODBYE, "seeking": SEEKING}
WANTING = {"sep_distress": "separation_distress", "seeking": "seeking_companionship"}
GROUPS = {"seeking": "pos_lambda", "avoiding": "neg_lambda"}


def _profiles(file: Any) -> Iterator[dict[str, Any]]:
    study = "longitudinal"
    for wanting in WANTING.values():
        for comparison, found in file[wanting].items():
            for term, names in PROFILE_TESTS.items():
                key = {"study": study, "grouping": comparison, "outcome": wanting, "term": term}
                yield from _instrument("profiles", "profile comparisons", _taken(found, names), **key)
    for short, counts in file["behavioral_categories"].items():
        for row in counts:
            yield from _instrument("profiles", "profile sizes", {"count": row["Freq"]}, study=study, outcome=WANTING[short], term=row["Var1"])
    for row in file["validation"]:
        for short, outcome in PROFILE_OUTCOMES.items():
            key = {"study": study, "grouping": row["behavior_category"], "outcome": outcome, "term": "mean"}
            yield from _instrument("profiles", "profile outcomes", _taken(row, {f"mean_{short}": "estimate", f"sd_{short}": "sd"}), **key)
    for outcome, found in ((SEEKING, file["predictive_analysis"]), (GOODBYE, file["goodbye_analysis"])):
        for grouping, term, quantities in _predictions(found):
            yield from _instrument("profiles", "distress predicts", quantities, study=study, grouping=grouping, outcome=outcome, term=term)


def _predictions(found: Mapping[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """(analysis, term, numbers) of either outcome's predictions from separation distress."""
    slope, crossed = "separation_distress", "separation_distress:relationship_seeking_category[T.pos_lambda]"
    models = {"full_model": "three categories", "binary_model": "outer categories", "logistic_model": "outer categories"}
    for model, analysis in models.items():
        numbers = found.get(model, {})
        yield analysis, slope, _taken(numbers, {"sep_distress_beta": "estimate", "sep_distress_p": "p"})
        yield analysis, crossed, _taken(numbers, {"interaction_beta": "estimate", "interaction_p": "p"})
        yield analysis, "R²", _taken(numbers, {"r_squared": "estimate"})
    for short, category in GROUPS.items():
        yield category, slope, _taken(found["by_group"], {f"{short}_beta": "estimate", f"{short}_p": "p"})
    yield "correlation", "r", _taken(found["correlation"], {"r": "estimate", "p": "p"})
    if "logistic_model" not in found:
        yield "correlation", "r", {"n": found["n"]}
        return
    yield "outer categories", slope, {"n": found["n"]}
    yield "goodbye", "distress without - with goodbye", _taken(found["t_test"], {"statistic": "statistic", "p_value": "p"})
    yield "goodbye", "Cohen's d, with - without goodbye", {"estimate": found["t_test"]["cohens_d"]}
    at = found["predicted_probs"]
    for short, category in GROUPS.items():
        for distress, probability in zip(at["separation_distress"], at[f"Prob_{short.capitalize()}"], strict=True):
            yield "outer categories", f"probability at {distress:g}, {category}", {"estimate": probability}


def _condition_sizes(file: Any) -> Iterator[dict[str, Any]]:
    for table, rows in file.items():
        kind, _, rest = table.partition("_")
        for row in rows:
            arm = [f"{row['multiplier']:g}", row["domain"], row["personalisation"]] if kind == "factorial" else [str(row[rest])]
            key = {"study": rest if kind == "factorial" else row["study_id"], "grouping": "arm" if kind == "factorial" else rest}
            yield from _instrument("topics", "condition sizes", {"n": row["n"]}, **key, outcome="participants", term=", ".join(arm))


def _participant_counts(file: Any) -> Iterator[dict[str, Any]]:
    for study, count in file["study_sizes"].items():
        yield from _instrument("topics", "sociodemographics", {"count": count}, study=study, outcome="gender", term=EVERYONE)
    for table, counts in file.items():
        if table.endswith("_distribution"):
            for answer, count in counts.items():
                key = {"outcome": table.removesuffix("_distribution"), "term": answer}
                yield from _instrument("topics", "sociodemographics", {"count": count}, **key)


READERS: dict[str, Callable[[Any], Iterable[dict[str, Any]]]] = {
    "*_contrasts.json": _contrasts,
    "*_contrasts_cs.json": _contrasts,
    "*_heterogeneity.json": _heterogeneity,
    "goodbye_treatment_tests.json": _chi_squared,
    "seeking_companionship_categorical_tests.json": _chi_squared,
    "goodbye_pairwise.json": _goodbye_by_dose,
    "domain_competency_one_sample*.json": _competency_changes,
    "domain_competency_two_sample*.json": _competency_between_arms,
    "decoupling_stats.json": _profiles,
    "sample_sizes_per_condition.json": _condition_sizes,
    "sociodemographics_participant_counts.json": _participant_counts,
}


# --- computed ---------------------------------------------------------------------------------------------------------


def computed_values(asset: str, table: pd.DataFrame) -> pd.DataFrame:
    """Every number of a computed table that could be published: `KEY` and `computed`, a row a number."""
    if asset == "trial_tables":
        return _long(table.rename(columns={"table": "outcome"}), asset, ["rows"])
    if asset == "trial_contrasts":
        return _long(table.rename(columns={"contrast": "test"}), asset, list(dict.fromkeys(CONTRAST_QUANTITIES.values())))
    if asset == "trial_forms":
        chosen = table[table["selected"].astype(bool)]
        form = _long(chosen.assign(test_type="form", degree=chosen["form"].map(DEGREES)), asset, ["degree"])
        likelihood = {f"heterogeneity_{quantity}": quantity for quantity in ("chi2", "df", "p")}
        items = chosen.assign(test_type="heterogeneity").rename(columns=likelihood)
        return pd.concat([form, _long(items, asset, [*likelihood.values(), "heterogeneous"])], ignore_index=True)
    return _instrument_values(asset, table)


def _instrument_values(asset: str, table: pd.DataFrame) -> pd.DataFrame:
    rows = table[[*INSTRUMENT_KEY, *INSTRUMENT_QUANTITIES]].reset_index(drop=True)
    details = pd.DataFrame([found if isinstance(found, dict) else {} for found in table["details"]], index=rows.index)
    further = details.drop(columns=details.columns.intersection(rows.columns)).select_dtypes("number")
    rows = _summed(pd.concat([rows, further], axis=1), details)
    # The topics themselves are no number; what is published of them is in the order of their ranks.
    ranked = rows["part"].eq("topic ranks")
    rows.loc[ranked, "term"] = [f"place {place}" for place in range(1, ranked.sum() + 1)]
    rows["test"] = [_test(grouping, term) for grouping, term in zip(rows["grouping"], rows["term"], strict=True)]
    return _long(rows.rename(columns={"part": "test_type"}), asset, [*INSTRUMENT_QUANTITIES, *further.columns])


def _summed(rows: pd.DataFrame, details: pd.DataFrame) -> pd.DataFrame:
    """`rows` with counts that were published over several cells of the table: over studies, over answers, over the other factors of an arm."""
    sums = []
    asked = rows[rows["part"].eq("sociodemographics") & rows["term"].notna()]
    if len(asked):
        sums.append(asked.groupby(["part", "outcome", "term"], as_index=False)["count"].sum())
        sums.append(asked.groupby(["part", "study", "outcome"], as_index=False)["count"].sum().assign(term=EVERYONE))
    arms = rows[rows["part"].eq("condition sizes") & rows["term"].notna()].join(details, rsuffix=" of the arm")
    for factor in details.columns.intersection(["multiplier", "domain", "personalisation"]):
        if len(arms):
            counted = arms.groupby(["part", "study", "outcome", factor], as_index=False)["n"].sum()
            sums.append(counted.rename(columns={factor: "term"}).assign(grouping=factor))
    return pd.concat([rows, *(found.astype({"term": object}) for found in sums)], ignore_index=True)


def _test(grouping: Any, term: Any) -> str:
    """One name of a grouping and a term; numbers are written alike, whatever type their column has."""
    return ": ".join(_name(part) for part in (grouping, term) if _name(part))


def _name(part: Any) -> str:
    if not isinstance(part, str):
        return "" if pd.isna(part) else f"{part:g}"
    try:
        return f"{float(part):g}"
    except ValueError:
        return part


def _long(table: pd.DataFrame, asset: str, quantities: list[str]) -> pd.DataFrame:
    rows = table.assign(asset=asset).reindex(columns=[*KEY[:-1], *quantities])
    long = rows.melt(list(KEY[:-1]), quantities, var_name="quantity", value_name="computed")
    long[list(KEY)] = long[list(KEY)].astype(object).where(long[list(KEY)].notna(), "")
    return long.assign(computed=pd.to_numeric(long["computed"], errors="coerce").astype(float))


# --- compared ---------------------------------------------------------------------------------------------------------


def compare(published: pd.DataFrame, computed: Mapping[str, pd.DataFrame], incomplete: Mapping[str, str] | None = None) -> pd.DataFrame:
    """Every published number beside the computed one, `COMPARED_COLUMNS`, in the order of `published`.

    published: `PUBLISHED_COLUMNS`. computed: asset -> its stored table; `trial_tables` is one of `table` and `rows`. incomplete: outcome or raw
    table -> why it cannot be compared (`incomplete_data`). A number is `absent`, with a reason, where its outcome or its part of an asset has not
    been computed or is incomplete, and where it is a p-value adjusted in a family of which an outcome is absent. One that is missing beside others
    that are there differs.
    """
    parts = [computed_values(asset, table) for asset, table in computed.items() if len(table)]
    ours = pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=[*KEY, "computed"])
    found = published.reset_index(drop=True).merge(ours.assign(there=True), on=list(KEY), how="left", validate="many_to_one")
    found["computed"] = found["computed"].astype(float)
    found["reason"] = _absent(found, ours, computed, incomplete or {})
    found["reason"] = found["reason"].where(found["reason"].ne(""), _family_absent(found))
    found["tolerance"] = tolerance(found["published"].to_numpy(float), found["unit"].to_numpy(float))
    absent = found["reason"].ne("")
    found.loc[absent, "computed"] = np.nan
    found["difference"] = found["computed"] - found["published"]
    found["verdict"] = np.select([absent, found["difference"].abs() <= found["tolerance"]], [ABSENT, AGREES], DIFFERS)
    found.loc[~absent & found["computed"].isna(), "reason"] = "no such value was computed"
    return found[list(COMPARED_COLUMNS)]


def _absent(found: pd.DataFrame, ours: pd.DataFrame, computed: Mapping[str, pd.DataFrame], incomplete: Mapping[str, str]) -> pd.Series:
    """Why a row's number is not there, empty where it is, or should be."""
    there = set(map(_kind, ours.dropna(subset=["computed"]).itertuples(index=False)))
    notes = {asset: _empty_parts(table) for asset, table in computed.items() if "note" in table}
    reasons = []
    for row in found.itertuples(index=False):
        if row.outcome in incomplete:
            reasons.append(incomplete[row.outcome])
        elif row.asset not in computed:
            reasons.append(f"{row.asset} has not been computed")
        elif not np.isnan(row.computed) or _kind(row) in there:
            reasons.append("")
        elif row.asset in notes:
            mine = notes[row.asset].get((row.test_type, row.outcome)) or notes[row.asset].get((row.test_type, ""))
            # A part can have rows under several names; without a note under this one, whatever the asset lacks may be the cause.
            told = [mine] if mine else [note for note in dict.fromkeys(notes[row.asset].values()) if note.startswith(LACKS)]
            reasons.append("; ".join(told) if all(note.startswith(LACKS) for note in told) else "")
        else:
            reasons.append(f"{row.asset} has no {row.test_type.replace('_', ' ')} of {row.study} {row.outcome}".replace("  ", " "))
    return pd.Series(reasons, index=found.index, dtype=object)


def _kind(row: Any) -> tuple[str, ...]:
    """Values of one kind are made together: where some are there, none may be missing."""
    where = row.study if row.asset in MAIN_TABLES else row.test.partition(": ")[0]
    return row.asset, row.test_type, row.outcome, where


def _empty_parts(table: pd.DataFrame) -> dict[tuple[str, str], str]:
    """(part, outcome) of an instrument's table that could not be made -> why: files that it lacks, or a fault."""
    rows = table[table["term"].isna() & table["note"].notna()]
    return {(row.part, row.outcome or ""): row.note for row in rows.itertuples()}


def _family_absent(found: pd.DataFrame) -> pd.Series:
    """Why an adjusted p-value cannot be compared: outcomes that were published in its family and are absent here."""
    reason = pd.Series("", index=found.index, dtype=object)
    group = found["test_type"].replace(TOGETHER)
    for quantity, column in ADJUSTED.items():
        rows = found[found["quantity"].eq(quantity)]
        for (family, *_), members in rows.groupby([rows[column], rows["family"], rows["study"], group[rows.index]]):
            lacking = list(dict.fromkeys(members.loc[members["reason"].ne(""), "outcome"]))
            if lacking:
                reason[members.index] = f"the family {family} lacks {', '.join(lacking)}"
    return reason


def tolerance(published: np.ndarray, unit: np.ndarray) -> np.ndarray:
    """How far a computed value may be from a published one: half a unit of its last printed digit, and a little for arithmetic.

    Four decimals: 6e-5. Small numbers in five significant digits: 2e-4 of their value. Zero in four decimals stands for less than 5e-5, as smaller
    numbers than 1e-5 are printed in full. Others as printed: half a unit and 10%.
    """
    half = 0.55 * unit
    small = (np.abs(published) < 1e-3) & (unit < FOUR_DECIMALS)
    four = np.where(published == 0, 5e-5, 6e-5)
    return np.where(small, np.maximum(half, RELATIVE * np.abs(published)), np.where(np.isclose(unit, FOUR_DECIMALS), four, half))


def incomplete_data(trial: Trial, rows: Mapping[str, int], published: pd.DataFrame) -> dict[str, str]:
    """Raw table, or outcome that reads it -> how much of it is missing; rows: table -> rows that are there.

    Estimates of a part of the participants are not the published ones, however right.
    """
    stated = published[published["asset"] == "trial_tables"].set_index("outcome")["published"]
    short = {}
    for table in trial.tables:
        there, whole = rows.get(table, 0), int(stated.get(table, 1))
        if there < whole:
            short[table] = f"{table}: {there} of {whole} rows are there" if there else f"{table} is absent or at fault"
    return short | {outcome.name: short[outcome.table] for outcome in trial.outcomes if outcome.table in short}


def summary(compared: pd.DataFrame) -> pd.DataFrame:
    """Numbers by asset and verdict: asset, published, agrees, differs, absent; the last row is the sum."""
    counts = pd.crosstab(compared["asset"], compared["verdict"]).reindex(columns=[AGREES, DIFFERS, ABSENT], fill_value=0)
    counts.insert(0, "published", counts.sum(axis=1))
    counts = counts.reindex(list(dict.fromkeys(compared["asset"])))
    counts.loc["all"] = counts.sum()
    return counts.rename_axis(index="asset", columns=None).reset_index()


def reasons(compared: pd.DataFrame) -> pd.DataFrame:
    """Why numbers are absent, the commonest first: reason, numbers."""
    counts = compared.loc[compared["verdict"].eq(ABSENT), "reason"].value_counts()
    return counts.rename_axis("reason").rename("numbers").reset_index()
