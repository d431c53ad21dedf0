"""What the study tests beside its main models: answers about change, leaving the chat, companionship use, competency, closeness to the assistant.

Here belong the choice of rows and the questions of spec sections 3 (Cross-study) to 7. The arithmetic of tests belongs in `comparisons.py` and
`regressions.py`, the confirmatory models elsewhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import pandas as pd
from scipy.special import expit

from relseek_assets.trials.comparisons import PAIRS, one_sample_tests, welch_tests
from relseek_assets.trials.exact import benjamini_hochberg
from relseek_assets.trials.participants import DOMAINS, DOSES, PERSONALISATION, PNTS, STUDIES, treatment_columns
from relseek_assets.trials.regressions import COEFFICIENT_COLUMNS, logit, ols


@dataclass(frozen=True)
class Recoding:
    """A question about change whose five answers become three; an answer outside `codes` becomes missing."""

    name: str
    item: str
    codes: Mapping[str, str]


RECODINGS = (
    Recoding(
        "goodbye_feeling_recoded",
        "goodbye_feeling_towards_assistant_response",
        {
            "Much more negative": "More negative",
            "Slightly more negative": "More negative",
            "No change": "No change",
            "Slightly more positive": "More positive",
            "Much more positive": "More positive",
        },
    ),
    # The published tests list only the outer answers and "no change", so that the 988 who answered "somewhat" drop out (spec section 3).
    Recoding(
        "change_recoded",
        "perceived_change_seeking_companionship_likelihood",
        {
            "Much less likely than before": "Less likely",
            "No change from before": "No change",
            "Much more likely than before": "More likely",
        },
    ),
    Recoding(
        "change_recoded_all_answers",
        "perceived_change_seeking_companionship_likelihood",
        {
            "Much less likely than before": "Less likely",
            "Somewhat less likely than before": "Less likely",
            "No change from before": "No change",
            "Somewhat more likely than before": "More likely",
            "Much more likely than before": "More likely",
        },
    ),
    Recoding(
        "change_sentience_recoded",
        "change_sentience",
        {
            "Much less conscious than I thought before": "Less conscious",
            "Somewhat less conscious than I thought before": "Less conscious",
            "No change in my view": "No change",
            "Somewhat more conscious than I thought before": "More conscious",
            "Much more conscious than I thought before": "More conscious",
        },
    ),
)

COMPETENCIES = {
    "emotional_competency": ("emotchat_satis", "emotchat_effectiveness"),
    "political_competency": ("polchat_knowledge", "polchat_confidence"),
}
COMPETENCY_ITEMS = ("emotchat_effectiveness", "emotchat_satis", "polchat_confidence", "polchat_knowledge")
BACKGROUND = ("age", "education_years", "gender_binary", "disability_binary", "ethnicity_binary", "income_binary", "religion_binary")
MARGINAL_COLUMNS = ("study", "lambda_factor", "estimate", "se", "df", "lower", "upper", "log_odds", "method", "n", "note")
ODDS_RATIO_COLUMNS = (
    "study",
    "contrast",
    "estimate",
    "se",
    "df",
    "statistic",
    "p",
    "p_adjusted",
    "lower",
    "upper",
    "log_odds",
    "method",
    "n",
    "note",
)


def recoded(table: pd.DataFrame) -> pd.DataFrame:
    """`table` with its treatments and, for every recoding whose item it has, a column of three levels (spec section 3, Cross-study)."""
    table = treatment_columns(table)
    for recoding in RECODINGS:
        if recoding.item in table:
            table[recoding.name] = table[recoding.item].map(dict(recoding.codes)).astype(object)
    return table


def goodbye_by_dose(goodbye: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Probability of saying goodbye at each dose and the odds ratios between doses, in each study (spec section 4).

    From the full logit with five dose levels. A probability is the inverse logit of the log-odds averaged over personalisation and domain, so is its
    interval; its standard error is by the delta method. p is adjusted by Benjamini-Hochberg over the pairs of a study.

    Returns:
        (`MARGINAL_COLUMNS`, `ODDS_RATIO_COLUMNS`), both with `log_odds`, the estimate before transformation.
    """
    formula = "goodbye_action ~ lambda_factor + personalisation + domain + lambda_factor:personalisation + lambda_factor:domain"
    means, ratios = [], []
    data = treatment_columns(goodbye)
    for study in STUDIES:
        rows = data[data["study"] == study]
        if rows.empty:
            continue
        fit = logit(formula, rows)
        doses = [dose for dose in DOSES.values() if (rows["lambda_factor"] == dose).any()]
        rows_of = {dose: fit.design.at(_grid(dose)).mean(axis=0) for dose in doses}
        means.append(fit.contrast(np.array(list(rows_of.values())), doses).assign(study=study))
        pairs = list(combinations(doses, 2))
        labels = [f"{one} / {other}" for one, other in pairs]
        ratios.append(fit.contrast(np.array([rows_of[one] - rows_of[other] for one, other in pairs]), labels).assign(study=study))
        ratios[-1]["p_adjusted"] = benjamini_hochberg(ratios[-1]["p"])
    return _probabilities(pd.concat(means)), _odds_ratios(pd.concat(ratios))


def _grid(dose: str) -> pd.DataFrame:
    cells = [(dose, personalisation, domain) for personalisation in PERSONALISATION for domain in DOMAINS]
    return pd.DataFrame(cells, columns=["lambda_factor", "personalisation", "domain"])


def _probabilities(log_odds: pd.DataFrame) -> pd.DataFrame:
    found = log_odds.rename(columns={"term": "lambda_factor", "estimate": "log_odds"}).reset_index(drop=True)
    found["estimate"] = expit(found["log_odds"])
    found["se"] *= found["estimate"] * (1 - found["estimate"])
    return found.assign(lower=expit(found["lower"]), upper=expit(found["upper"]))[list(MARGINAL_COLUMNS)]


def _odds_ratios(log_odds: pd.DataFrame) -> pd.DataFrame:
    found = log_odds.rename(columns={"term": "contrast", "estimate": "log_odds"}).reset_index(drop=True)
    found["estimate"] = np.exp(found["log_odds"])
    found["se"] *= found["estimate"]
    return found.assign(lower=np.exp(found["lower"]), upper=np.exp(found["upper"]))[list(ODDS_RATIO_COLUMNS)]


def cross_study_change(participants: pd.DataFrame, outcomes: Mapping[str, tuple[str, str]]) -> pd.DataFrame:
    """Whether the longitudinal study ends elsewhere than the cross-sectional one (spec section 3, Cross-study).

    outcomes: name -> (column before, column after). Two least-squares models of completers: `post ~ pre + study`, and with `domain * study`. Columns:
    `model` and `COEFFICIENT_COLUMNS`.
    """
    tables = []
    for outcome, (before, after) in outcomes.items():
        data = participants.assign(pre=participants[before], post=participants[after])
        for model, terms in (("study", "pre + study"), ("study by domain", "pre + domain * study")):
            tables.append(ols(f"post ~ {terms}", data, outcome=outcome).table().assign(model=model))
    return pd.concat(tables, ignore_index=True)[["model", *COEFFICIENT_COLUMNS]]


def cross_study_goodbye(goodbye: pd.DataFrame) -> pd.DataFrame:
    """The logit of saying goodbye by study, `COEFFICIENT_COLUMNS` (spec section 3, Cross-study)."""
    return logit("goodbye_action ~ study", treatment_columns(goodbye)).table()


def companionship_users(seeking_companionship: pd.DataFrame, participants: pd.DataFrame) -> pd.DataFrame:
    """Who used AI for companionship before the longitudinal study: a logit on background, wellbeing and attitudes (spec section 5).

    participants: with `cluster_name` and the factor scores. Columns: `COEFFICIENT_COLUMNS` and `p_adjusted` over terms other than the intercept and
    "Prefer not to say", missing for those.
    """
    before = seeking_companionship[(seeking_companionship["timepoint"] == "pre") & seeking_companionship["companionship_freq"].notna()]
    users = before[["ppt_id"]].assign(companionship_user=(before["companionship_freq"] != "Never").astype(float))
    data = users.merge(participants, on="ppt_id", validate="one_to_one")
    terms = (*BACKGROUND, "pre_psychosocial_F1", "pre_psychosocial_F2", "ai_frequency_coarsened", "cluster_name")
    found = logit(f"companionship_user ~ {' + '.join(terms)}", data).table()
    counted = (found["term"] != "Intercept") & ~found["term"].str.contains(PNTS, regex=False)
    found["p_adjusted"] = np.nan
    found.loc[counted, "p_adjusted"] = benjamini_hochberg(found.loc[counted, "p"])
    return found


def competency_scores(domain_competency: pd.DataFrame) -> pd.DataFrame:
    """The longitudinal study's competencies, one row a participant (spec section 7).

    For each item and composite (the mean of the items that were answered, 0-100): `pre_…`, `post_…` and `…_diff`, post - pre. The cross-sectional
    study was not asked before.
    """
    asked = domain_competency[domain_competency["study"] == "longitudinal"]
    asked = asked.assign(**{name: asked[list(items)].mean(axis=1) for name, items in COMPETENCIES.items()})
    names = [*COMPETENCIES, *COMPETENCY_ITEMS]
    wide = asked.pivot(index="ppt_id", columns="timepoint", values=names).reindex(columns=pd.MultiIndex.from_product([names, ["pre", "post"]]))
    arms = asked.drop_duplicates("ppt_id").set_index("ppt_id")[["study", "multiplier", "domain", "personalisation"]]
    scores = {f"{when}_{name}": wide[(name, when)] for name in names for when in ("pre", "post")}
    changes = {f"{name}_diff": wide[(name, "post")] - wide[(name, "pre")] for name in names}
    return treatment_columns(arms.assign(**scores, **changes).reset_index())


def competency_tests(scores: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Changes of competency against zero, overall and by domain, and competencies after and their changes between arms (spec section 7).

    Returns:
        (`ONE_SAMPLE_COLUMNS`, `TWO_SAMPLE_COLUMNS`).
    """
    composites = list(COMPETENCIES)
    changed = [one_sample_tests(scores, [f"{name}_diff" for name in (*composites, *COMPETENCY_ITEMS)], scope="longitudinal")]
    for domain in DOMAINS:
        rows = scores[scores["domain"] == domain]
        changed.append(one_sample_tests(rows, [f"{name}_diff" for name in composites], scope=f"longitudinal {domain}"))
    between = welch_tests(scores, [*(f"post_{name}" for name in composites), *(f"{name}_diff" for name in composites)], scope="longitudinal")
    return pd.concat(changed, ignore_index=True), between


def relational_tests(relational: pd.DataFrame) -> pd.DataFrame:
    """Closeness (IOS, 1-7) and felt personalisation (0-100) between arms, `TWO_SAMPLE_COLUMNS` (spec section 6).

    The published tests take every week's row as independent. Each is given as published and, for the study with repeated rows, with a standard error
    that allows for dependence within participants; `method` tells them apart.
    """
    data = treatment_columns(relational)
    seeking = {"relationship_seeking_category": PAIRS["relationship_seeking_category"]}
    tests = []
    for study in STUDIES:
        rows = data[data["study"] == study]
        cases = [(study, rows, "ios_scale", PAIRS), (study, rows, "personalisation_sensecheck", {**seeking, "personalisation": PERSONALISATION})]
        cases += [(f"{study} {level}", rows[rows["personalisation"] == level], "personalisation_sensecheck", seeking) for level in PERSONALISATION]
        for scope, chosen, outcome, pairs in cases:
            if chosen[outcome].notna().any():
                repeated = chosen.dropna(subset=[outcome])["ppt_id"].duplicated().any()
                tests += [
                    welch_tests(chosen, [outcome], pairs, scope=scope, cluster=cluster) for cluster in ([None, "ppt_id"] if repeated else [None])
                ]
    return pd.concat(tests, ignore_index=True)


def closeness_change(relational: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Change of closeness (IOS) from week 1 to week 4 of the longitudinal study: against zero, overall and in each arm, and between arms (section 6).

    Returns:
        (`ONE_SAMPLE_COLUMNS`, `TWO_SAMPLE_COLUMNS`), one value a participant who has both weeks.
    """
    data = treatment_columns(relational)
    data = data[data["study"] == "longitudinal"]
    weeks = data.pivot(index="ppt_id", columns="week", values="ios_scale").reindex(columns=[1, 4])
    change = (weeks[4] - weeks[1]).rename("ios_change")
    arms = data.drop_duplicates("ppt_id").set_index("ppt_id").join(change)
    tests = [one_sample_tests(arms, ["ios_change"], scope="longitudinal")]
    for treatment, pair in PAIRS.items():
        tests += [one_sample_tests(arms[arms[treatment] == level], ["ios_change"], scope=f"longitudinal {level}") for level in pair]
    return pd.concat(tests, ignore_index=True), welch_tests(arms, ["ios_change"], scope="longitudinal")
