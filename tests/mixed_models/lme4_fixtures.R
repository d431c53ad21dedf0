# Simulated designs and what lme4, lmerTest, pbkrtest and emmeans make of them, as JSON. Needs R with these packages and jsonlite.
#
#   Rscript lme4_fixtures.R designs 0 19 lme4_designs.json     # one grouping factor: the fixtures
#   Rscript lme4_fixtures.R crossed 0 3 lme4_crossed.json      # two crossed factors: the fixtures
#   Rscript lme4_fixtures.R designs 100 299 OUT.json           # the designs of the test that runs R
#
# A design is drawn from its number: the last digit chooses the kind, the digit before it REML (even) or maximum likelihood (odd).
suppressPackageStartupMessages({library(lme4); library(lmerTest); library(pbkrtest); library(emmeans); library(jsonlite)})
emm_options(pbkrtest.limit = 50000, lmerTest.limit = 50000)

KINDS <- c("balanced", "unbalanced", "no_slope_variance", "perfect_correlation", "near_boundary",
           "weighted", "two_rows_a_group", "no_group_variance", "large_ratio", "uncorrelated")

draw <- function(number) {
  set.seed(7000 + number)
  kind <- KINDS[number %% 10 + 1]
  groups <- sample(12:40, 1)
  size <- switch(kind, balanced = rep(5, groups), near_boundary = rep(5, groups), two_rows_a_group = rep(2, groups), sample(1:7, groups, replace = TRUE))
  if (kind == "unbalanced") size <- pmax(1, rpois(groups, 3))
  if (sum(size) < 2 * groups + 8) size <- size + 2
  g <- rep(seq_len(groups), size)
  t <- sequence(size)
  arm <- factor(c("a", "b", "c")[(seq_len(groups) %% 3 + 1)[g]])
  x <- round(rnorm(length(g)), 3)
  sd <- switch(kind, no_slope_variance = c(2, 0), perfect_correlation = c(2, 1), near_boundary = c(1.5, 0.2), no_group_variance = c(0, 0),
               two_rows_a_group = c(1.5, 0), large_ratio = c(40, 0), c(2, 0.7))
  shared <- rnorm(groups)
  slope <- if (kind == "perfect_correlation") shared else 0.3 * shared + sqrt(1 - 0.09) * rnorm(groups)
  w <- if (kind == "weighted") round(runif(length(g), 0.3, 4), 3) else rep(1, length(g))
  y <- 10 + 0.8 * x + 1.5 * (arm == "b") - 0.4 * t + sd[1] * shared[g] + sd[2] * slope[g] * t + rnorm(length(g), sd = 1.3 / sqrt(w))
  data <- data.frame(y = round(y, 5), x = x, arm = arm, t = t, g = sprintf("p%03d", g), w = w)[sample(length(g)), ]
  random <- switch(kind, two_rows_a_group = "(1 | g)", no_group_variance = "(1 | g)", large_ratio = "(1 | g)",
                   uncorrelated = "(1 | g) + (0 + t | g)", "(1 + t | g)")
  list(number = number, kind = kind, formula = paste("y ~ x + arm + t + arm:t +", random), reml = (number %/% 10) %% 2 == 0, data = data)
}

draw_crossed <- function(number) {
  set.seed(9000 + number)
  a <- sample(12, 240, replace = TRUE); b <- sample(25, 240, replace = TRUE)
  x <- round(rnorm(240), 3)
  y <- 3 + 0.5 * x + rnorm(12, sd = 1.2)[a] + rnorm(25, sd = if (number == 2) 0 else 0.8)[b] + rnorm(240)
  data <- data.frame(y = round(y, 5), x = x, a = sprintf("a%02d", a), b = sprintf("b%02d", b), w = if (number == 3) round(runif(240, .5, 2), 3) else 1)
  list(number = number, kind = if (number == 3) "weighted" else "crossed", formula = "y ~ x + (1 | a) + (1 | b)", reml = number %% 2 == 0, data = data)
}

estimate <- function(design) {
  data <- design$data
  data$ones <- 1
  weighted <- design$kind == "weighted"
  control <- lmerControl(optimizer = "bobyqa", optCtrl = list(maxfun = 2e5, rhoend = 1e-9))
  seconds <- system.time(fit <- suppressWarnings(suppressMessages(
    if (weighted) lmerTest::lmer(as.formula(design$formula), data, REML = design$reml, control = control, weights = w)
    else lmerTest::lmer(as.formula(design$formula), data, REML = design$reml, control = control))))[["elapsed"]]
  p <- length(fixef(fit))
  satterthwaite <- vapply(seq_len(p), function(i) contest1D(fit, diag(p)[i, ])$df, 0)
  components <- as.data.frame(VarCorr(fit))
  modes <- as.data.frame(ranef(fit, condVar = TRUE))
  found <- list(log_likelihood = as.numeric(logLik(fit)), coefficients = unname(fixef(fit)), se = unname(sqrt(diag(as.matrix(vcov(fit))))),
                sigma = sigma(fit), singular = isSingular(fit), variances = components, aic = AIC(fit), bic = BIC(fit),
                rmse = sqrt(mean(residuals(fit, type = "response")^2)), satterthwaite = satterthwaite, fitted = unname(fitted(fit)), modes = modes)
  if (design$reml && !weighted) {  # pbkrtest takes every weight to be one
    adjusted <- vcovAdj(fit)
    found$kr_se <- unname(sqrt(diag(as.matrix(adjusted))))
    found$kr_df <- vapply(seq_len(p), function(i) Lb_ddf(diag(p)[i, ], as.matrix(vcov(fit)), adjusted), 0)
  }
  c(design, list(found = found, seconds = seconds))
}

arguments <- commandArgs(trailingOnly = TRUE)
numbers <- as.integer(arguments[2]):as.integer(arguments[3])
designs <- lapply(numbers, if (arguments[1] == "crossed") draw_crossed else draw)
write_json(lapply(designs, estimate), arguments[4], digits = NA, auto_unbox = TRUE, dataframe = "columns", na = "null")
