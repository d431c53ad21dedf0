"""Who took part and what they wanted to talk about: topic ranks, topic matches, sociodemographic counts, condition sizes.

Descriptions only, each a count or a mean with its n; how a match changes an outcome is a regression and lies elsewhere.
Source: human_study.md, sections 0 and 13.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from scipy import stats

from relseek_assets.trials.raw import TrialFault

RANKS = 5
RANK_COLUMNS = tuple(f"rank_{rank}_topic" for rank in range(1, RANKS + 1))
DOMAIN_TOPICS = {
    "polchat": "Discussions about current events and political topics",
    "emotchat": "Personal conversations about daily life and emotional wellbeing",
}
MATCHES = {"absolute": "received_absolute_pref_topic_match", "relative": "received_pref_topic_relative_match"}
CHARACTERISTICS = ("age_category", "gender", "ethnicity", "religion", "education", "income", "disability", "ai_frequency")
#: Answers as the published counts shorten them; others stay as they were given.
SHORT_ANSWERS = {
    "Asian and Asian British": "Asian",
    "Black, African, Caribbean or Black British": "Black",
    "Mixed and multiple ethnic groups": "Mixed",
    "Undergraduate degree or equivalent": "Undergraduate degree",
    "A levels or equivalent": "A levels",
    "GCSEs or equivalent": "GCSEs",
    "I do not have a disability": "No disability",
    "I have minor health issues or a mild disability": "Minor disability",
    "I have major health issues or a major disability that significantly affects my day-to-day activities, but I am not registered disabled": (
        "Non-registered major disability"
    ),
    "Yes, and I am registered disabled": "Registered disabled",
    "I have never used a chatbot": "Never",
}


class TopicError(TrialFault):
    """A table of topics or participants lacks what its description needs."""


def topic_ranks(usecase_preferences: pd.DataFrame) -> pd.DataFrame:
    """Mean reversed rank by topic, 5 for the most and 1 for the least wanted: topic, mean, sd, se, n, highest first."""
    _require(usecase_preferences, RANK_COLUMNS, "usecase_preferences")
    long = usecase_preferences[list(RANK_COLUMNS)].melt(var_name="column", value_name="topic").dropna()
    points = RANKS + 1 - long["column"].map({column: rank for rank, column in enumerate(RANK_COLUMNS, 1)})
    found = points.groupby(long["topic"]).agg(["mean", "std", "count"]).reset_index()
    found.columns = pd.Index(["topic", "mean", "sd", "n"])
    found["se"] = found["sd"] / np.sqrt(found["n"])
    return found[["topic", "mean", "sd", "se", "n"]].sort_values("mean", ascending=False, ignore_index=True)


def topic_groups(usecase_preferences: pd.DataFrame) -> pd.DataFrame:
    """ppt_id, study, domain and whether the assigned domain's topic was ranked first of all (absolute) and above the other's (relative).

    Raises TopicError where a participant did not rank both domains' topics or has an unknown domain.
    """
    _require(usecase_preferences, ("ppt_id", "study", "domain", *RANK_COLUMNS), "usecase_preferences")
    places = {}
    ranked = usecase_preferences[list(RANK_COLUMNS)].to_numpy(dtype=object)
    for domain, topic in DOMAIN_TOPICS.items():
        chosen = ranked == topic
        if not (chosen.sum(1) == 1).all():
            person = usecase_preferences["ppt_id"].to_numpy()[chosen.sum(1) != 1][0]
            raise TopicError(f"usecase_preferences: {person} did not rank {topic!r} exactly once")
        places[domain] = chosen.argmax(1) + 1
    domain = usecase_preferences["domain"].to_numpy(dtype=object)
    if unknown := set(domain) - set(DOMAIN_TOPICS):
        raise TopicError(f"usecase_preferences: domain is one of {sorted(DOMAIN_TOPICS)}, not {sorted(map(str, unknown))}")
    political = domain == "polchat"
    own = np.where(political, places["polchat"], places["emotchat"])
    other = np.where(political, places["emotchat"], places["polchat"])
    return usecase_preferences[["ppt_id", "study", "domain"]].assign(**{MATCHES["absolute"]: own == 1, MATCHES["relative"]: own < other})


def match_shares(groups: pd.DataFrame, participants: pd.DataFrame | None = None) -> pd.DataFrame:
    """Share of participants whose domain matched what they wanted: study, domain, match, share, lower, upper (exact 95%), matched, n.

    `groups` is the table of `topic_groups`, or the imported one, which lacks `study`; then `participants` (ppt_id, study) has it.
    """
    _require(groups, ("ppt_id", "domain", *MATCHES.values()), "topic_groups")
    if "study" not in groups:
        if participants is None:
            raise TopicError("topic_groups has no column study: give participants with ppt_id and study")
        groups = groups.merge(participants[["ppt_id", "study"]].drop_duplicates(), on="ppt_id", how="left", validate="one_to_one")
        if groups["study"].isna().any():
            raise TopicError(f"participants lacks {groups['ppt_id'][groups['study'].isna()].iloc[0]}, who is in topic_groups")
    rows = []
    for (study, domain), part in groups.groupby(["study", "domain"]):
        for match, column in MATCHES.items():
            matched, n = int(part[column].astype(bool).sum()), len(part)
            interval = stats.binomtest(matched, n).proportion_ci(method="exact")
            rows.append((study, domain, match, matched / n, interval.low, interval.high, matched, n))
    return pd.DataFrame(rows, columns=["study", "domain", "match", "share", "lower", "upper", "matched", "n"])


def sociodemographic_counts(participants: Sequence[pd.DataFrame], characteristics: Sequence[str] = CHARACTERISTICS) -> pd.DataFrame:
    """Participants by study, characteristic and answer: study, characteristic, answer, n, share of those who answered.

    `participants` are sociodemographics of one or several studies, a row a participant; a table need not have every characteristic.
    """
    rows = []
    for table in participants:
        _require(table, ("ppt_id", "study"), "sociodemographics")
        asked = [name for name in characteristics if name in table]
        rows.append(table[["ppt_id", "study", *asked]].melt(["ppt_id", "study"], var_name="characteristic", value_name="answer").dropna())
    long = pd.concat(rows, ignore_index=True)
    long["answer"] = long["answer"].astype(object).replace(SHORT_ANSWERS)
    found = long.groupby(["study", "characteristic", "answer"])["ppt_id"].nunique().rename("n").reset_index()
    return found.assign(share=found["n"] / found.groupby(["study", "characteristic"])["n"].transform("sum"))


def condition_sizes(metadata: pd.DataFrame) -> pd.DataFrame:
    """Participants who began treatment by study, multiplier, domain and personalisation: those columns and n."""
    keys = ["study", "multiplier", "domain", "personalisation"]
    _require(metadata, ("ppt_id", "pre_treatment_dropout", *keys), "metadata_with_dropout")
    treated = metadata[~metadata["pre_treatment_dropout"].astype(bool)]
    return treated.groupby(keys)["ppt_id"].nunique().rename("n").reset_index()


def _require(table: pd.DataFrame, columns: Sequence[str], name: str) -> None:
    if missing := [column for column in columns if column not in table]:
        raise TopicError(f"{name} has no column {missing[0]!r}; it has {list(table.columns)}")
