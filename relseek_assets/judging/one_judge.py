"""Whose scores count where several judges have rated: a curve, a candidate and a page are of one judge each."""

from __future__ import annotations

import pandas as pd

from relseek_resources.judges import coherence, embedded

EMBEDDED_JUDGES = (embedded.NAME, coherence.NAME)


def of_one_judge(scores: pd.DataFrame) -> tuple[pd.DataFrame, str]:
    """Of a vector's scores, for each rubric those of one judge; or none, and what is wrong.

    It is a judge who rated every dose that anybody rated; where several did, the embedded one. Scores of different judges are not on one scale: a
    curve whose doses are rated by different ones, or the mean of two of them, means nothing.
    """
    kept = [scores.iloc[:0]]
    for rubric, part in scores.groupby("rubric"):
        doses = part.groupby("judge")["multiplier"].agg(lambda found: tuple(sorted(set(found))))
        whole = [judge for judge, rated in doses.items() if len(rated) == part["multiplier"].nunique()]
        chosen = [judge for judge in whole if judge in EMBEDDED_JUDGES] or whole
        if len(chosen) != 1:
            rated = "; ".join(f"{judge} at {', '.join(f'{dose:g}' for dose in found)}" for judge, found in doses.items())
            more = "several judges have" if whole else "no judge has"
            return scores.iloc[:0], f"{more} rated {rubric} at every dose ({rated}); import the scores of one judge for all of them"
        kept.append(part[part["judge"] == chosen[0]])
    return pd.concat(kept), ""
