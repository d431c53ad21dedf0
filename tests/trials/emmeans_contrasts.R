# Contrasts of one mixed model of a simulated diary by emmeans, as JSON: rows with value, dose, topic, voice, time and participant.
#
#   Rscript emmeans_contrasts.R ROWS.csv OUT.json
suppressPackageStartupMessages({library(lme4); library(lmerTest); library(emmeans); library(jsonlite)})
arguments <- commandArgs(trailingOnly = TRUE)
rows <- read.csv(arguments[1])
rows$topic <- factor(rows$topic, c("sport", "music"))
rows$voice <- factor(rows$voice, c("non-human", "human"))
fit <- lmerTest::lmer(value ~ dose + I(dose^2) + topic + voice + time + dose:topic + dose:voice + dose:time + topic:time + voice:time +
                        (1 + time | participant), rows, control = lmerControl(optimizer = "bobyqa", optCtrl = list(maxfun = 2e5)))
doses <- list(dose = c(-1, -0.5, 0.5, 1))
apart <- c(-0.5, -0.5, 0.5, 0.5)
ends <- list(dose = c(-1, -0.5, 0.5, 1), time = c(1, 4))
found <- rbind(
  as.data.frame(contrast(emmeans(fit, ~dose, at = doses), list(effect = apart))),
  as.data.frame(contrast(emmeans(fit, ~topic), list(topic = c(-1, 1)))),
  as.data.frame(contrast(emmeans(fit, ~ dose * topic, at = doses), list(moderation = c(-apart, apart)))),
  as.data.frame(contrast(emmeans(fit, ~ dose * time, at = ends), list(growth = c(-apart, apart)))),
  as.data.frame(contrast(emmeans(fit, ~time, at = list(time = c(1, 4))), list(time = c(-1, 1)))))
slope <- as.data.frame(emtrends(fit, ~dose, var = "time", at = list(dose = 0.75)))
write_json(list(estimate = c(found$estimate, slope$time.trend), se = c(found$SE, slope$SE), df = c(found$df, slope$df)), arguments[2], digits = NA)
