"""Tests between arms without a model: Pearson's chi-squared, t tests, their versions for clustered rows, equivalence.

Here belongs the arithmetic of a comparison. Which outcomes are compared belongs in `secondary_outcomes.py`; tests that count tables exactly in
`exact.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from relseek_assets.trials.participants import TREATMENTS
from relseek_assets.trials.raw import TrialFault

# Welch tests compare two levels; of the dose categories they are the outer ones (spec section 6).
PAIRS = {
    "personalisation": ("non-personalised", "personalised"),
    "domain": ("polchat", "emotchat"),
    "relationship_seeking_category": ("neg_lambda", "pos_lambda"),
}

CHI_SQUARED_COLUMNS = ("scope", "outcome", "treatment", "estimate", "statistic", "df", "p", "min_expected", "n", "method", "note")
BREAKDOWN_COLUMNS = ("scope", "outcome", "treatment", "group", "level", "n", "percentage")
TWO_SAMPLE_COLUMNS = (
    *("scope", "outcome", "treatment", "group1", "group2", "n1", "n2", "mean1", "mean2", "sd1", "sd2"),
    *("estimate", "se", "df", "statistic", "p", "lower", "upper", "method", "n", "clusters", "note"),
)
ONE_SAMPLE_COLUMNS = ("scope", "outcome", "n", "mean", "sd", "estimate", "se", "df", "statistic", "p", "lower", "upper", "method", "note")
EQUIVALENCE_COLUMNS = ("margin", "p_above_lower", "p_below_upper", "p_equivalence", "lower90", "upper90")

TOO_FEW = "fewer than two values in a group"
CONSTANT = "no variation within the groups"


class ComparisonFault(TrialFault):
    """A comparison that the data do not allow; the message names the column."""


def chi_squared(data: pd.DataFrame, outcome: str, treatment: str, *, scope: str = "") -> dict[str, Any]:
    """Pearson's test of a categorical outcome by treatment, a row of `CHI_SQUARED_COLUMNS`.

    A 2 x 2 table has Yates' correction (spec section 3). `estimate` is Cramér's V, without correction. Levels that nobody has do not count; where
    fewer than two are left on a side there is no test, and `note` says so.
    """
    counts = pd.crosstab(data[treatment], data[outcome]).to_numpy()
    counts = counts[counts.sum(1) > 0][:, counts.sum(0) > 0]
    row = dict.fromkeys(CHI_SQUARED_COLUMNS, np.nan) | {
        "scope": scope,
        "outcome": outcome,
        "treatment": treatment,
        "n": int(counts.sum()),
        "note": "",
    }
    row["method"] = "Pearson" + (" with Yates' correction" if counts.shape == (2, 2) else "")
    if min(counts.shape) < 2:
        return row | {"note": f"a table of {counts.shape[0]} x {counts.shape[1]}: nothing to compare"}
    found = stats.chi2_contingency(counts)
    plain = stats.chi2_contingency(counts, correction=False).statistic
    return row | {
        "estimate": float(np.sqrt(plain / (counts.sum() * (min(counts.shape) - 1)))),
        "statistic": found.statistic,
        "df": found.dof,
        "p": found.pvalue,
        "min_expected": found.expected_freq.min(),
    }


def treatment_tests(data: pd.DataFrame, outcome: str) -> pd.DataFrame:
    """`chi_squared` of one outcome between studies and, within each study, between the levels of every treatment (spec section 3, Cross-study).

    data: one row a participant, with `treatment_columns`. The studies are compared where both measured the outcome; scope is then cross_study.
    """
    answered = data.dropna(subset=[outcome])
    studies = [study for study in data["study"].cat.categories if (answered["study"] == study).any()]
    rows = [chi_squared(answered, outcome, "study", scope="cross_study")] if len(studies) > 1 else []
    for study in studies:
        rows += [chi_squared(answered[answered["study"] == study], outcome, treatment, scope=study) for treatment in TREATMENTS]
    return pd.DataFrame(rows, columns=list(CHI_SQUARED_COLUMNS))


def breakdown(data: pd.DataFrame, outcome: str, treatment: str, *, scope: str = "") -> pd.DataFrame:
    """How many in each group gave each answer, and the percentage of the group: `BREAKDOWN_COLUMNS`, groups in the order of their levels."""
    counts = pd.crosstab(data[treatment], data[outcome]).stack().rename("n")
    counts.index.names = ["group", "level"]
    rows = counts[counts > 0].reset_index().astype({"group": object})
    rows["percentage"] = 100 * rows["n"] / rows.groupby("group")["n"].transform("sum")
    return rows.assign(scope=scope, outcome=outcome, treatment=treatment)[list(BREAKDOWN_COLUMNS)]


def welch_tests(
    data: pd.DataFrame, outcomes: Sequence[str], pairs: Mapping[str, tuple[str, str]] = PAIRS, *, scope: str = "", cluster: str | None = None
) -> pd.DataFrame:
    """Welch's test of every outcome between the two groups of every pair, `TWO_SAMPLE_COLUMNS`; the difference is group 1 - group 2.

    With `cluster`, the column that tells whose rows are whose, rows of one participant may depend on each other: the standard error is CR2 (Bell and
    McCaffrey 2002), df theirs. A group with fewer than two values (clusters), or without variation, gives a row without a test, with a `note`.

    Raises:
        ComparisonFault: a cluster with rows in both groups.
    """
    rows = []
    for outcome in outcomes:
        for treatment, (group1, group2) in pairs.items():
            values = data[[outcome, treatment, *([cluster] if cluster else [])]].dropna()
            samples = [values[values[treatment] == group] for group in (group1, group2)]
            row = {"scope": scope, "outcome": outcome, "treatment": treatment, "group1": group1, "group2": group2}
            numbers = [sample[outcome].to_numpy(dtype=float) for sample in samples]
            if cluster is None:
                row |= _welch(*numbers)
            else:
                both = set(samples[0][cluster]) & set(samples[1][cluster])
                if both:
                    raise ComparisonFault(f"{outcome}: {cluster} {min(both)} has rows in both {group1} and {group2}; a participant has one arm")
                row |= _clustered(numbers, [pd.factorize(sample[cluster])[0] for sample in samples], cluster)
            rows.append(row)
    return pd.DataFrame(rows, columns=list(TWO_SAMPLE_COLUMNS))


def _welch(first: np.ndarray, second: np.ndarray) -> dict[str, Any]:
    row = _described(first, second) | {"method": "Welch", "clusters": len(first) + len(second)}
    if min(len(first), len(second)) < 2:
        return row | {"note": TOO_FEW}
    se = np.sqrt(first.var(ddof=1) / len(first) + second.var(ddof=1) / len(second))
    if se == 0:
        return row | {"note": CONSTANT}
    return row | _t_test(row["estimate"], se, stats.ttest_ind(first, second, equal_var=False).df)


def _clustered(numbers: Sequence[np.ndarray], codes: Sequence[np.ndarray], cluster: str) -> dict[str, Any]:
    sizes = [np.bincount(code) if len(code) else np.zeros(0, dtype=int) for code in codes]
    row = _described(*numbers) | {"method": f"CR2 by {cluster}, Bell-McCaffrey df", "clusters": len(sizes[0]) + len(sizes[1])}
    if min(len(size) for size in sizes) < 2:
        return row | {"note": TOO_FEW}
    parts = [_mean_variance(values, code, size) for values, code, size in zip(numbers, codes, sizes, strict=True)]
    variance, trace, square = (sum(part[index] for part in parts) for index in range(3))
    if variance == 0:
        return row | {"note": CONSTANT}
    return row | _t_test(row["estimate"], np.sqrt(variance), trace**2 / square)


def _mean_variance(values: np.ndarray, codes: np.ndarray, sizes: np.ndarray) -> tuple[float, float, float]:
    """(CR2 variance of a mean, expectation, sum of squares for its df) for clusters of `sizes`; expectation and squares under independent rows.

    The hat matrix of a mean is 1/n throughout, so that (I - H_ii)^(-1/2) acts on a cluster's sum as the number a_i = (1 - m_i/n)^(-1/2).
    """
    n = len(values)
    sums = np.bincount(codes, values - values.mean())
    inflation = 1 / (1 - sizes / n)
    scaled = inflation * sizes**2
    off_diagonal = scaled.sum() ** 2 - (scaled**2).sum()
    return float((inflation * sums**2).sum() / n**2), 1 / n, float((sizes**2).sum() / n**4 + off_diagonal / n**6)


def one_sample_tests(data: pd.DataFrame, outcomes: Sequence[str], *, scope: str = "") -> pd.DataFrame:
    """Student's test of every mean against zero, `ONE_SAMPLE_COLUMNS`; fewer than two values, or a constant, give a row without a test."""
    rows = []
    for outcome in outcomes:
        values = data[outcome].dropna().to_numpy(dtype=float)
        n, mean, sd = _summary(values)
        row = dict.fromkeys(ONE_SAMPLE_COLUMNS, np.nan) | {"scope": scope, "outcome": outcome, "n": n, "mean": mean, "sd": sd, "estimate": mean}
        row |= {"method": "one-sample t", "note": TOO_FEW if n < 2 else CONSTANT if sd == 0 else ""}
        rows.append(row if row["note"] else row | _t_test(mean, sd / np.sqrt(n), n - 1))
    return pd.DataFrame(rows, columns=list(ONE_SAMPLE_COLUMNS))


def equivalence(tests: pd.DataFrame, margin: float) -> pd.DataFrame:
    """Two one-sided tests that an estimate lies within ±`margin` (in its own units), `EQUIVALENCE_COLUMNS` added to rows with estimate, se and df.

    `p_equivalence` is the larger of the two; the 90% interval lies within ±`margin` exactly where it is below .05 (Schuirmann 1987).
    """
    if not margin > 0:
        raise ComparisonFault(f"an equivalence margin is positive, not {margin}; give it in units of the estimate")
    estimate, se, df = (tests[column].to_numpy(dtype=float) for column in ("estimate", "se", "df"))
    above, below = stats.t.sf((estimate + margin) / se, df), stats.t.cdf((estimate - margin) / se, df)
    reach = stats.t.ppf(0.95, df) * se
    found = (np.full(len(tests), float(margin)), above, below, np.maximum(above, below), estimate - reach, estimate + reach)
    return tests.assign(**dict(zip(EQUIVALENCE_COLUMNS, found, strict=True)))


def _summary(values: np.ndarray) -> tuple[int, float, float]:
    n = len(values)
    return n, float(values.mean()) if n else np.nan, float(values.std(ddof=1)) if n > 1 else np.nan


def _described(first: np.ndarray, second: np.ndarray) -> dict[str, Any]:
    (n1, mean1, sd1), (n2, mean2, sd2) = _summary(first), _summary(second)
    described = {"n1": n1, "n2": n2, "mean1": mean1, "mean2": mean2, "sd1": sd1, "sd2": sd2, "estimate": mean1 - mean2, "n": n1 + n2, "note": ""}
    return dict.fromkeys(("se", "df", "statistic", "p", "lower", "upper"), np.nan) | described


def _t_test(estimate: float, se: float, df: float) -> dict[str, float]:
    reach = stats.t.ppf(0.975, df) * se
    p = 2 * stats.t.sf(abs(estimate / se), df)
    return {"se": se, "df": df, "statistic": estimate / se, "p": p, "lower": estimate - reach, "upper": estimate + reach}
