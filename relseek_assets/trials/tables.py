"""The declared shape of every table of a trial."""

from __future__ import annotations

from relseek_resources.storage import Column, TableSchema

STUDY = Column("study", "string", "which trial")
OUTCOME = Column("outcome", "string", "what was measured")


def _estimate(unit: str = "outcome") -> tuple[Column, ...]:
    return (
        Column("estimate", "number", "point estimate; null where the rows cannot show it", unit, nullable=True),
        Column("se", "number", "standard error", unit, nullable=True, low=0),
        Column("df", "number", "degrees of freedom; null for z", nullable=True, low=0),
    )


def _interval(unit: str = "outcome") -> tuple[Column, ...]:
    return Column("lower", "number", "lower end of the 95% interval", unit, nullable=True), Column(
        "upper", "number", "upper end of the 95% interval", unit, nullable=True
    )


N = Column("n", "integer", "rows analysed", low=0)
PARTICIPANTS = Column("participants", "integer", "participants analysed", low=0)
METHOD = Column("method", "string", "how the estimate and its interval were made")

FORMS = TableSchema(
    "trial_forms",
    (
        STUDY,
        OUTCOME,
        Column("form", "string", "polynomial of the dose", choices=("linear", "quadratic", "cubic")),
        Column("k", "integer", "parameters"),
        N,
        Column("log_likelihood", "number", "of the full model, by maximum likelihood"),
        Column("aic", "number", "Akaike's criterion"),
        Column("aicc", "number", "with the correction for small samples"),
        Column("bic", "number", "Schwarz's criterion"),
        Column("rmse", "number", "root mean square of conditional residuals"),
        Column("score", "number", "published performance score", low=0, high=1),
        Column("selected", "boolean", "declared or chosen by the published rule, and used"),
        Column("selected_by_aic", "boolean", "what plain AIC would choose"),
        Column("heterogeneous", "boolean", "pooled items keep effects of their own"),
        Column("heterogeneity_chi2", "number", "likelihood ratio between items with own and with common effects", nullable=True),
        Column("heterogeneity_df", "integer", "its degrees of freedom", nullable=True),
        Column("heterogeneity_p", "number", "its p-value", nullable=True, low=0, high=1),
    ),
    ("study", "outcome", "form"),
)

FITS = TableSchema(
    "trial_fits",
    (
        STUDY,
        OUTCOME,
        Column("model", "string", "additive or full, by polynomial, category or level of the dose"),
        Column("term", "string", "coefficient"),
        *_estimate(),
        Column("statistic", "number", "estimate over standard error", nullable=True),
        Column("p_raw", "number", "two-sided", nullable=True, low=0, high=1),
        *_interval(),
        Column("formula", "string", "what was fitted"),
        Column("family", "string", "model family", choices=("lmm", "ols", "logit")),
        N,
        PARTICIPANTS,
        Column("log_likelihood", "number", "restricted for mixed models; null where a logit separates", nullable=True),
        Column("theta", "json", "relative covariance factor of the random effects", nullable=True),
        Column("sigma", "number", "residual standard deviation", nullable=True, low=0),
        Column("converged", "boolean", "the optimiser reached an optimum"),
        Column("singular", "boolean", "a random effect has no variance"),
    ),
    ("study", "outcome", "model", "term"),
)

CONTRASTS = TableSchema(
    "trial_contrasts",
    (
        STUDY,
        OUTCOME,
        Column("test_type", "string", "kind of contrast"),
        Column("contrast", "string", "what is compared"),
        Column("variant", "string", "dose range", choices=("primary", "coarsened", "narrow", "full")),
        *_estimate(),
        *_interval(),
        Column("p_raw", "number", "two-sided", nullable=True, low=0, high=1),
        Column("p_local", "number", "adjusted in the local family (joined when read)", nullable=True, low=0, high=1),
        Column("p_global", "number", "adjusted in the measure family (joined when read)", nullable=True, low=0, high=1),
        N,
        PARTICIPANTS,
        Column("model", "string", "which of the six models"),
        METHOD,
        Column("unit", "string", "unit of the estimate"),
    ),
    ("study", "outcome", "test_type", "contrast", "variant"),
)

EQUIVALENCE = TableSchema(
    "trial_equivalence",
    (
        STUDY,
        OUTCOME,
        Column("contrast", "string", "what is compared"),
        Column("margin", "number", "declared δ: effects within ±δ count as none", "outcome", low=0),
        *_estimate(),
        Column("lower", "number", "lower end of the 90% interval", "outcome"),
        Column("upper", "number", "upper end of the 90% interval", "outcome"),
        Column("p", "number", "larger of two one-sided tests", low=0, high=1),
        Column("equivalent", "boolean", "p below 0.05"),
        N,
    ),
    ("study", "outcome", "contrast"),
)

FDR = TableSchema(
    "trial_fdr",
    (
        Column("family", "string", "measure family"),
        Column("local_family", "string", "local family"),
        *CONTRASTS.columns,
        Column("tests_local", "integer", "tests adjusted together locally"),
        Column("tests_global", "integer", "tests adjusted together globally"),
    ),
    ("study", "outcome", "test_type", "contrast"),
)

CURVES = TableSchema(
    "dose_response_curves",
    (
        STUDY,
        OUTCOME,
        Column("kind", "string", "marginal means of the additive model, or raw means of participants", choices=("model", "raw")),
        Column("dose", "number", "dose of the arm"),
        Column("estimate", "number", "mean, on the outcome's own scale", "outcome"),
        Column("se", "number", "standard error", "outcome", nullable=True, low=0),
        *_interval(),
        N,
    ),
    ("study", "outcome", "kind", "dose"),
)

TRAJECTORIES = TableSchema(
    "trajectories",
    (
        STUDY,
        OUTCOME,
        Column("kind", "string", "marginal means of the full model, or raw means of participants", choices=("model", "raw")),
        Column("dose", "number", "dose of the arm"),
        Column("time", "number", "week or session"),
        *CURVES.columns[4:],
    ),
    ("study", "outcome", "kind", "dose", "time"),
)

ROBUSTNESS = TableSchema(
    "trial_robustness",
    (
        STUDY,
        OUTCOME,
        Column("specification", "string", "additive, full, or full with covariates or weights"),
        Column("form", "string", "polynomial of the dose, or coarsened"),
        Column("term", "string", "coefficient, or the primary contrast"),
        *_estimate(),
        *_interval(),
        Column("p_raw", "number", "two-sided, not adjusted", nullable=True, low=0, high=1),
        Column("change_percent", "number", "of the estimate against the full specification", "%", nullable=True),
        Column("bootstrap_lower", "number", "lower end of the Bayesian bootstrap over participants", "outcome", nullable=True),
        Column("bootstrap_upper", "number", "its upper end", "outcome", nullable=True),
        METHOD,
        N,
        PARTICIPANTS,
    ),
    ("study", "outcome", "specification", "form", "term"),
)
