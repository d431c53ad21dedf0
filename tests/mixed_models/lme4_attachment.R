# The 48 models of the longitudinal attachment measures in lme4, with emmeans' Kenward-Roger contrasts of the 24 that are REML, as JSON.
#
#   Rscript lme4_attachment.R attachment.jsonl OUT.json
suppressPackageStartupMessages({library(lme4); library(lmerTest); library(emmeans); library(jsonlite)})
emm_options(pbkrtest.limit = 50000, lmerTest.limit = 50000)
arguments <- commandArgs(trailingOnly = TRUE)

constructs <- list(reliance = c("behavioural_reliance", "cognitive_reliance"), perceived_understanding = c("connection", "responsiveness", "understanding"),
                   self_disclosure = "self_disclosure", separation_distress = "separation_distress")
doses <- c(linear = "lam", quadratic = "lam + I(lam^2)", cubic = "lam + I(lam^2) + I(lam^3)")

data <- stream_in(file(arguments[1]), verbose = FALSE)
data <- data[data$study_id == "longitudinal", ]
data$week <- as.integer(sub("w", "", data$week))
data$lam <- data$multiplier
data$domain <- factor(data$domain, c("polchat", "emotchat"))
data$pers <- factor(data$personalisation, c("non-personalised", "personalised"))

# All three on one reference grid, so that the adjusted covariance is computed once a fit.
contrasts_of <- function(fit, lam) {
  grid <- ref_grid(fit, at = list(lam = c(-1, -0.5, 0.5, 1, lam)))
  cells <- grid@grid
  mean_of <- function(chosen) chosen / sum(chosen)
  at_mean <- cells$lam == lam
  found <- as.data.frame(contrast(grid, list(
    dose = mean_of(cells$lam > lam & !at_mean) - mean_of(cells$lam < lam & !at_mean),
    domain = mean_of(at_mean & cells$domain == "emotchat") - mean_of(at_mean & cells$domain == "polchat"),
    pers = mean_of(at_mean & cells$pers == "personalised") - mean_of(at_mean & cells$pers == "non-personalised"))))
  list(estimate = found$estimate, se = found$SE, df = found$df)
}

result <- list()
for (construct in names(constructs)) {
  items <- constructs[[construct]]
  pooled <- length(items) > 1
  rows <- do.call(rbind, lapply(items, function(item) data.frame(data[c("ppt_id", "week", "lam", "domain", "pers")], item = item, y = data[[item]])))
  rows <- rows[!is.na(rows$y), ]
  rows$item <- factor(rows$item, items)
  for (dose in names(doses)) for (full in c(FALSE, TRUE)) for (reml in c(TRUE, FALSE)) {
    text <- paste("y ~", doses[[dose]], "+ pers", if (pooled) "+ item", "+ domain", if (pooled) "+ lam:item + pers:item + domain:item", "+ week",
                  if (pooled) "+ week:item", if (full) "+ lam:pers + lam:domain + lam:week + pers:week + domain:week", "+ (1 + week | ppt_id)")
    control <- lmerControl(optimizer = "bobyqa", optCtrl = list(maxfun = 2e5))
    fitting <- system.time(fit <- suppressWarnings(suppressMessages(do.call(lmerTest::lmer, list(as.formula(text), rows, REML = reml, control = control)))))
    found <- list(construct = construct, dose = dose, full = full, reml = reml, log_likelihood = as.numeric(logLik(fit)), names = names(fixef(fit)),
                  coefficients = unname(fixef(fit)), se = unname(sqrt(diag(as.matrix(vcov(fit))))), fitting = fitting[["elapsed"]])
    if (reml) {
      seconds <- system.time(found$contrasts <- suppressMessages(contrasts_of(fit, mean(rows$lam))))
      found$contrasting <- seconds[["elapsed"]]
    }
    result <- c(result, list(found))
  }
}
write_json(result, arguments[2], digits = NA, auto_unbox = TRUE)
