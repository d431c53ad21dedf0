"""The tables of the prompting experiments.

Here belong schemas and the shapes of rows. How their figures are computed belongs in `analysis.py`.
"""

from __future__ import annotations

from relseek_assets.persona_attacks import ATTACK_TYPES
from relseek_resources.judges.answers import STATUSES
from relseek_resources.storage import Column, TableSchema

STEERED = "steered"  # the author whose replies come from the vector; the reference of every comparison
PERSONA = "persona"  # the control: the unsteered model under a persona prompt
REPLIED, NOT_REACHED = "replied", "not_reached"
BOTH = "both"  # attack types together
REPLY_STATUSES = (REPLIED, *(status for status in STATUSES if status != "scored"), NOT_REACHED)
SCORE_STATUSES = (*STATUSES, "empty_reply", "no_reply")
PAIR_STATUSES = ("judged", "tie", "unscored", *(status for status in STATUSES if status != "scored"))

AUTHOR = Column("author", "string", "who wrote the replies: `steered`, the control `persona`, or an author of the study")
LEVEL = Column("level", "integer", "what was asked for; 1 is least of the behaviour", low=1)
MULTIPLIER = Column("multiplier", "number", "dose λ that the level corresponds to")
JUDGE = Column("judge", "string", "who rated")
SOURCE = Column("source", "string", "`generated` or `judged` here, or `published`")
# what a reply or an answer of an endpoint cost; zeros where nobody was paid
PAID = (
    Column("model", "string", "the model that answered, as its endpoint names it", nullable=True),
    Column("prompt_tokens", "integer", "charged for, all attempts", "tokens", low=0),
    Column("completion_tokens", "integer", "charged for, all attempts", "tokens", low=0),
    Column("cost_usd", "number", "paid, all attempts", "USD", low=0),
    Column("attempt", "integer", "how often the endpoint was asked", low=1),
)
REPLY = (
    Column("system_prompt", "string", "what asked for the level; the study's plain one for the steered model", nullable=True),
    Column("examples", "json", "ids of the examples in the system prompt, in the order shown", nullable=True),
    Column("reply", "string", "what the author wrote; null where nothing came", nullable=True),
    Column("seed", "integer", "of the row's own random numbers", nullable=True),
    Column("finished", "boolean", "whether the reply ended by itself", nullable=True),
    Column("status", "string", "`replied`, or why there is no reply", choices=REPLY_STATUSES),
    *PAID,
    SOURCE,
)

PROMPTED_GENERATIONS = TableSchema(
    "prompted_generations",
    (
        AUTHOR,
        LEVEL,
        MULTIPLIER,
        Column("item", "string", "held-out conversation"),
        Column("prompt", "json", "messages before the reply, without the system prompt", nullable=True),
        *REPLY,
    ),
    key=("author", "level", "item"),
)

SCORE = (
    JUDGE,
    Column("score", "number", "1 to 10; 0 occurs in published scores", nullable=True, low=0, high=10),
    Column("status", "string", "`scored`, or why there is no score", choices=SCORE_STATUSES),
    Column("raw", "string", "what a language judge answered", nullable=True),
    *PAID,
    SOURCE,
)

LEVEL_SCORES = TableSchema(
    "level_scores",
    (
        AUTHOR,
        LEVEL,
        MULTIPLIER,
        Column("item", "string", "held-out conversation"),
        Column("rubric", "string", "what is rated"),
        *SCORE,
    ),
    key=("author", "level", "item", "rubric", "judge"),
)

LEVEL_MODELS = TableSchema(
    "level_models",
    (
        Column("rubric", "string", "what is rated"),
        JUDGE,
        Column("n", "integer", "scores", low=1),
        Column("items", "integer", "held-out conversations", low=1),
        Column("variance_item", "number", "of the random intercepts", "points²", low=0),
        Column("variance_residual", "number", "of what is left", "points²", low=0),
        Column("icc", "number", "share of the items in the variance that is left", low=0, high=1),
        Column("log_likelihood", "number", "restricted", "log units"),
        Column("converged", "boolean", "whether the search ended at an optimum"),
        Column("singular", "boolean", "whether the items' variance is zero"),
    ),
    key=("rubric", "judge"),
)

TERMS = ("intercept", "slope", "curvature")
LEVEL_SLOPES = TableSchema(
    "level_slopes",
    (
        Column("rubric", "string", "what is rated"),
        JUDGE,
        AUTHOR,
        Column("term", "string", "of score ~ intercept + slope λ + curvature λ²", choices=TERMS),
        Column("compared_with", "string", "null: the author's own; `steered`: the author's minus the steered model's", nullable=True),
        Column("estimate", "number", "by REML, with a random intercept an item", "points (per λ, per λ²)"),
        Column("se", "number", "Kenward and Roger's", low=0),
        Column("df", "number", "Kenward and Roger's", low=0),
        Column("lower", "number", "95% interval"),
        Column("upper", "number", "95% interval"),
        Column("p", "number", "of no effect, two-sided", low=0, high=1),
    ),
    key=("rubric", "judge", "author", "term", "compared_with"),
)

LEVEL_PAIRS = TableSchema(
    "level_pairs",
    (
        AUTHOR,
        LEVEL,
        MULTIPLIER,
        Column("item", "string", "held-out conversation"),
        JUDGE,
        Column(
            "first_shown", "string", "which reply the judge saw first; null for one that sees no order", nullable=True, choices=(STEERED, "author")
        ),
        Column("winner", "string", "the reply with more of the behaviour; null where there is none", nullable=True, choices=(STEERED, "author")),
        Column("status", "string", "`judged`, `tie`, or why there is no winner", choices=PAIR_STATUSES),
        Column("raw", "string", "what a language judge answered", nullable=True),
        *PAID,
        SOURCE,
    ),
    key=("author", "level", "item", "judge"),
)

MEASURES = ("more", "stronger")
HEAD_TO_HEAD = TableSchema(
    "head_to_head",
    (
        AUTHOR,
        JUDGE,
        Column(
            "measure",
            "string",
            "`more`: the author's reply has more of the behaviour than the steered one; `stronger`: it goes further the way that the level asks, "
            "which leaves out the middle level",
            choices=MEASURES,
        ),
        Column("level", "integer", "null: all levels", nullable=True, low=1),
        Column("multiplier", "number", "dose λ that the level corresponds to", nullable=True),
        Column("share", "number", "of the comparisons that the author wins, ties as halves", low=0, high=1),
        Column("lower", "number", "95% interval: Wilson's at a level, over items for all levels", low=0, high=1),
        Column("upper", "number", "95% interval", low=0, high=1),
        Column("wins", "integer", "comparisons won by the author", low=0),
        Column("ties", "integer", "comparisons without a difference", low=0),
        Column("n", "integer", "comparisons that count", low=1),
        Column("without_winner", "integer", "comparisons whose answer is no choice; they count for nobody", low=0),
        Column("items", "integer", "held-out conversations", low=1),
    ),
    key=("author", "judge", "measure", "level"),
)

LEVEL_BIASES = TableSchema(
    "level_biases",
    (
        JUDGE,
        Column("bias", "string", "what the answer should not depend on", choices=("position",)),
        Column(
            "measure",
            "string",
            "share_first: share of decided comparisons in which the reply shown first won; first_log_odds: log-odds that it wins, given both "
            "authors and the level",
            choices=("share_first", "first_log_odds"),
        ),
        Column("estimate", "number", "the measure", nullable=True),
        Column("lower", "number", "95% interval", nullable=True),
        Column("upper", "number", "95% interval", nullable=True),
        Column("se", "number", "standard error, clustered by item; of share_first on the scale of log-odds", nullable=True, low=0),
        Column("n", "integer", "comparisons", low=0),
        Column("items", "integer", "held-out conversations that they are of", low=0),
        Column("method", "string", "how the interval was made"),
        Column("status", "string", "`measured`, or why not"),
    ),
    key=("judge", "measure"),
)

PROMPTING_ESTIMATES = TableSchema(
    "prompting_estimates",
    (
        AUTHOR,
        Column("experiment", "string", "levels, or attacks on them", choices=("levels", "attacks")),
        Column("requests", "integer", "replies to be written", low=0),
        Column("prompt_tokens", "integer", "of all requests; replies not yet written count as long as they may be", "tokens", low=0),
        Column("completion_tokens", "integer", "at most", "tokens", low=0),
        Column("usd", "number", "at most, if each is asked once", "USD", low=0),
        Column("counted", "string", "how prompt tokens were counted"),
        Column("dated", "string", "date of the price list", nullable=True),
        Column("price_source", "string", "where the price is from"),
    ),
    key=("author", "experiment"),
)

SCENARIO = (
    AUTHOR,
    Column("theme", "string", "what the conversation is about"),
    LEVEL,
    MULTIPLIER,
    Column("scenario", "string", "theme and attack"),
    Column("attack_type", "string", "whether the attack pushes for more or for less of the behaviour", choices=ATTACK_TYPES),
    Column("turn", "integer", "of the user, from 0; the last is the attack", low=0),
    Column("is_attack", "boolean", "whether the user's message is the attack"),
)

ATTACK_CONVERSATIONS = TableSchema(
    "attack_conversations",
    (*SCENARIO, Column("user", "string", "the user's message"), *REPLY),
    key=("author", "level", "scenario", "turn"),
)

ATTACK_SCORES = TableSchema(
    "attack_scores",
    (*SCENARIO, *SCORE),
    key=("author", "level", "scenario", "turn", "judge"),
)

SHIFTS = ("shift", "yield")
ATTACK_SHIFTS = TableSchema(
    "attack_shifts",
    (
        JUDGE,
        AUTHOR,
        Column("level", "integer", "what was asked for; null: all levels", nullable=True, low=1),
        Column("multiplier", "number", "dose λ that the level corresponds to", nullable=True),
        Column("attack_type", "string", "which way the attack pushes", choices=(*ATTACK_TYPES, BOTH)),
        Column(
            "measure",
            "string",
            "`shift`: score of the reply to the attack minus the mean of those before it; `yield`, of both types: the same, counted the way that the "
            "attack pushes",
            choices=SHIFTS,
        ),
        Column("compared_with", "string", "null: the author's own; `steered`: the author's minus the steered model's, pair by pair", nullable=True),
        Column("estimate", "number", "mean over conversations", "points"),
        Column("se", "number", "clustered by scenario; null of a single scenario", nullable=True, low=0),
        Column("df", "number", "scenarios less one", low=0),
        Column("lower", "number", "95% interval", nullable=True),
        Column("upper", "number", "95% interval", nullable=True),
        Column("scenarios", "integer", "clusters", low=1),
        Column("n", "integer", "conversations", low=1),
    ),
    key=("judge", "author", "level", "attack_type", "compared_with"),
)
