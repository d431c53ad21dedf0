"""Who left after treatment began: differential attrition, balance of the arms, weights by the inverse probability of what happened (spec section 10).

Here belong tests and models of dropout. The use of the weights does not.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from scipy import stats

from relseek_assets.trials.exact import benjamini_hochberg, fisher_freeman_halton
from relseek_assets.trials.participants import COARSENINGS, STUDIES
from relseek_assets.trials.raw import TrialFault
from relseek_assets.trials.regressions import Regression, logit
from relseek_assets.trials.secondary_outcomes import COMPETENCIES

ARMS = ("personalisation", "domain", "multiplier")
CONTINUOUS = ("age", "education_years", "pre_psychosocial_F1", "pre_psychosocial_F2")
CATEGORICAL = tuple(coarsening.name for coarsening in COARSENINGS)
LONGITUDINAL_ONLY = ("seeking_companionship_likelihood", "mas_score", "gcs_score", "charity_amount_gbp", *COMPETENCIES)
HEAVIEST = 10.0
BALANCE_DRAWS = 19_999  # random tables of a balance test with more than two arms: a standard error of at most 0.0036

ATTRITION_COLUMNS = ("study", "treatment", "estimate", "se", "df", "p", "p_adjusted", "method", "n", "note")
BALANCE_COLUMNS = ("study", "treatment", "covariate", "statistic", "df", "p", "se_p", "method", "n", "note")
RATE_COLUMNS = ("study", "treatment", "level", "estimate", "se", "dropped", "n")
WEIGHT_COLUMNS = ("ppt_id", "study", "dropout_prob", "ipw_weight", "ipw_weight_truncated")


class AttritionFault(TrialFault):
    """A study whose dropout cannot be modelled; the message names it."""


def treated(participants: pd.DataFrame) -> pd.DataFrame:
    """The population of every analysis here: participants who did not leave before treatment."""
    return participants[~participants["pre_treatment_dropout"]]


def dropout_rates(participants: pd.DataFrame) -> pd.DataFrame:
    """The share of every arm that left after treatment began, with its binomial standard error: `RATE_COLUMNS`."""
    rows = []
    for study, members in _studies(treated(participants)):
        for treatment in ARMS:
            for level, arm in members.groupby(treatment, observed=True):
                share, n = arm["post_treatment_dropout"].mean(), len(arm)
                dropped = int(arm["post_treatment_dropout"].sum())
                rows.append((study, treatment, str(level), share, np.sqrt(share * (1 - share) / n), dropped, n))
    return pd.DataFrame(rows, columns=list(RATE_COLUMNS))


def differential_attrition(participants: pd.DataFrame) -> pd.DataFrame:
    """Fisher's exact test of dropout by each treatment, adjusted by Benjamini-Hochberg over a study's three tests: `ATTRITION_COLUMNS`.

    `estimate` is the largest difference of dropout between two arms, a share of participants, `se` its standard error. A study that nobody left, or
    all did, has rows without a test, and `note` says so.
    """
    rates = dropout_rates(participants)
    tables = []
    for study, members in _studies(treated(participants)):
        rows = []
        for treatment in ARMS:
            arms = rates[(rates["study"] == study) & (rates["treatment"] == treatment)].sort_values("estimate")
            lowest, highest = arms.iloc[0], arms.iloc[-1]
            p, _, method, note = _fisher(members[treatment], members["post_treatment_dropout"])
            se = float(np.hypot(lowest["se"], highest["se"]))
            rows.append((study, treatment, highest["estimate"] - lowest["estimate"], se, np.nan, p, np.nan, method, len(members), note))
        table = pd.DataFrame(rows, columns=list(ATTRITION_COLUMNS))
        tables.append(table.assign(p_adjusted=np.where(table["p"].isna(), np.nan, benjamini_hochberg(table["p"]))))
    return pd.concat(tables, ignore_index=True)


def balance_tests(participants: pd.DataFrame) -> pd.DataFrame:
    """Whether arms differ in what was measured before treatment: `BALANCE_COLUMNS`.

    Fisher's exact test of categorical covariates, Kruskal and Wallis's of continuous ones. `se_p` is the Monte Carlo error of p: with more than two
    arms `BALANCE_DRAWS` tables are drawn, which takes a fiftieth of the time of counting them; with two, all are counted and it is 0. Covariates
    that the table lacks are left out.
    """
    rows: list[tuple[object, ...]] = []
    for study, members in _studies(treated(participants)):
        for treatment in ARMS:
            for covariate in (*CATEGORICAL, "cluster_name"):
                if covariate in members:
                    known = members.dropna(subset=[covariate])
                    p, se_p, method, note = _fisher(known[treatment], known[covariate], draws=BALANCE_DRAWS)
                    rows.append((study, treatment, covariate, np.nan, np.nan, p, se_p, method, len(known), note))
            for covariate in CONTINUOUS:
                if covariate in members:
                    rows.append((study, treatment, covariate, *_kruskal(members, treatment, covariate)))
    return pd.DataFrame(rows, columns=list(BALANCE_COLUMNS))


def dropout_covariates(participants: pd.DataFrame, seeking_companionship: pd.DataFrame, domain_competency: pd.DataFrame) -> pd.DataFrame:
    """Participants with what the longitudinal dropout model adds: likelihood of seeking companionship and competencies before treatment.

    A participant who gave nothing to charity has no amount in the file; it counts as 0.
    """
    seeking = seeking_companionship[seeking_companionship["timepoint"] == "pre"].set_index("ppt_id")["seeking_companionship_likelihood"]
    before = domain_competency[domain_competency["timepoint"] == "pre"].set_index("ppt_id")
    competencies = pd.DataFrame({name: before[list(items)].mean(axis=1) for name, items in COMPETENCIES.items()})
    longitudinal = participants["study"] == "longitudinal"
    charity = participants["charity_amount_gbp"].mask(longitudinal & participants["charity_amount_gbp"].isna(), 0.0)
    return participants.assign(charity_amount_gbp=charity).join(seeking, on="ppt_id").join(competencies, on="ppt_id")


def dropout_model(covariates: pd.DataFrame, study: str) -> Regression:
    """The logit of leaving after treatment began, on the complete cases of one study among `dropout_covariates`.

    Raises:
        AttritionFault: nobody left or all did, so that no probability can be modelled.
    """
    members = treated(covariates)
    members = members[members["study"] == study]
    if members["post_treatment_dropout"].nunique() < 2:
        raise AttritionFault(
            f"{study}: of {len(members)} participants {int(members['post_treatment_dropout'].sum())} left; there is no dropout to model"
        )
    terms = [*CATEGORICAL, *CONTINUOUS, *(LONGITUDINAL_ONLY if study == "longitudinal" else ())]
    return logit(f"post_treatment_dropout ~ {' + '.join(terms)}", members, outcome=f"dropout, {study}")


def inverse_probability_weights(covariates: pd.DataFrame, studies: Sequence[str] = STUDIES) -> pd.DataFrame:
    """Weights by the inverse probability of what a participant did, `WEIGHT_COLUMNS`; a row for every complete case.

    The weight is 1/p of those who left and 1/(1 - p) of those who stayed; `ipw_weight_truncated` is at most 10. Weights are not stabilised.
    """
    tables = []
    for study in studies:
        model = dropout_model(covariates, study)
        left = model.design.y == 1
        weight = 1 / np.where(left, model.fitted, 1 - model.fitted)
        columns = (covariates.loc[model.design.rows, "ppt_id"].to_numpy(), study, model.fitted, weight, np.minimum(weight, HEAVIEST))
        tables.append(pd.DataFrame(dict(zip(WEIGHT_COLUMNS, columns, strict=True))))
    return pd.concat(tables, ignore_index=True)


def _studies(participants: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    return [(study, participants[participants["study"] == study]) for study in STUDIES if (participants["study"] == study).any()]


def _fisher(groups: pd.Series, values: pd.Series, *, draws: int = 0) -> tuple[float, float, str, str]:
    """(p, Monte Carlo error of p, method, note); with `draws`, tables of more than two groups are drawn rather than counted."""
    counts = pd.crosstab(groups, values).to_numpy()
    counts = counts[counts.sum(1) > 0][:, counts.sum(0) > 0]
    if min(counts.shape) < 2:
        return np.nan, np.nan, "Fisher", f"a table of {counts.shape[0]} x {counts.shape[1]}: nothing to compare"
    if draws and len(counts) > 2:
        drawing = stats.MonteCarloMethod(n_resamples=draws, rng=np.random.default_rng(0))
        p = float(stats.fisher_exact(counts, method=drawing).pvalue)
        return p, float(np.sqrt(p * (1 - p) / draws)), "Fisher, monte carlo", ""
    found = fisher_freeman_halton(counts)
    return found.p, found.se, f"Fisher, {found.method.replace('_', ' ')}", ""


def _kruskal(members: pd.DataFrame, treatment: str, covariate: str) -> tuple[object, ...]:
    known = members.dropna(subset=[covariate])
    samples = [values.to_numpy(dtype=float) for _, values in known.groupby(treatment, observed=True)[covariate]]
    if len(samples) < 2 or known[covariate].nunique() < 2:
        return np.nan, np.nan, np.nan, np.nan, "Kruskal-Wallis", len(known), "one group, or one value: nothing to compare"
    found = stats.kruskal(*samples)
    return found.statistic, len(samples) - 1, found.pvalue, 0.0, "Kruskal-Wallis", len(known), ""
