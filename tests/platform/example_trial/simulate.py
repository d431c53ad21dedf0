"""Writes the CSV files of the example trial: a writing coach in three arms, `control`, `gentle` and `warm`, over text or voice.

`python simulate.py` writes them beside this file again, byte for byte. EFFECTS are the true effects of the highest dose against none.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

PEOPLE, WEEKS, SEED = 150, 4, 2025
DOSES = {"control": 0.0, "gentle": 0.5, "warm": 1.0}
EFFECTS = {"closeness": 8.0, "wellbeing": 4.0, "returned": 1.6, "comfort": 6.0}  # linear in the dose; `returned` in log-odds
GROWTH = 1.5  # of the effect on closeness, a week


def simulate() -> dict[str, pd.DataFrame]:
    """File stem -> table. One in twelve weekly questionnaires is not answered."""
    draw = np.random.default_rng(SEED)
    who = pd.Series([f"p{number:03d}" for number in range(1, PEOPLE + 1)], name="who")
    arm = pd.Series(draw.permutation(np.resize(list(DOSES), PEOPLE)), name="arm")
    channel = pd.Series(draw.permutation(np.resize(["text", "voice"], PEOPLE)), name="channel")
    dose, voice = arm.map(DOSES).to_numpy(), channel.eq("voice").to_numpy(float)
    age = draw.integers(18, 70, PEOPLE)
    schooling = draw.choice(["school", "college", "university"], PEOPLE)
    head = pd.concat([who, arm, channel], axis=1)

    level, pace = draw.normal(0, 8, PEOPLE), draw.normal(0, 1, PEOPLE)
    weeks = []
    for week in range(1, WEEKS + 1):
        at = week - (WEEKS + 1) / 2
        closeness = 45 + 2 * voice + (EFFECTS["closeness"] + GROWTH * at) * dose + level + (0.8 + pace) * at + draw.normal(0, 5, PEOPLE)
        answered = draw.random(PEOPLE) > 1 / 12
        weeks.append(head.assign(week=week, closeness=closeness.round(1))[answered])

    before = draw.normal(50, 10, PEOPLE)
    after = 15 + 0.7 * before + EFFECTS["wellbeing"] * dose + 0.05 * (age - 40) + draw.normal(0, 5, PEOPLE)
    returned = draw.random(PEOPLE) < 1 / (1 + np.exp(-(-0.8 + EFFECTS["returned"] * dose + 0.3 * voice)))
    ease = draw.normal(0, 6, PEOPLE)
    comfort = {item: 50 + shift + EFFECTS["comfort"] * dose + ease + draw.normal(0, 5, PEOPLE) for item, shift in (("at_ease", 0.0), ("heard", 4.0))}
    ending = head.assign(
        wellbeing_before=before.round(1),
        wellbeing_after=after.round(1),
        returned=returned.astype(int),
        **{item: values.round(1) for item, values in comfort.items()},
    )
    people = pd.DataFrame({"who": who, "age": age, "schooling": schooling})
    stayed = 1 / (1 + np.exp(-(2.0 - 0.03 * (age - 40) - 0.5 * dose)))
    weights = pd.DataFrame({"who": who, "weight": (1 / stayed).round(4)})
    weekly = pd.concat(weeks).sort_values(["who", "week"])
    return {"weekly": weekly, "ending": ending, "people": people, "weights": weights}


if __name__ == "__main__":
    for stem, table in simulate().items():
        table.to_csv(Path(__file__).with_name(f"{stem}.csv"), index=False, lineterminator="\n")
