# The first Python >= 3.11 that runs; override with `make setup PYTHON=...`.
PYTHON ?= $(shell for candidate in python3.11 python3.12 python3.13 python3.14 python3; do \
	"$$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
	&& echo "$$candidate" && break; done)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.mopd-setup
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
SOURCES := mopd tests $(wildcard launch)
ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help setup train test test-fast bench lint types format clean

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

train: setup ## distil two teachers into a student: make train ARGS="train.steps=100"
	$(BIN)/python launch/train.py recipe=mopd_ctkd $(ARGS)

test: lint types ## lint, format check, type check and every test
	$(BIN)/python -m pytest

test-fast: setup ## unit tests that are not marked slow
	$(BIN)/python -m pytest tests/unit -m "not slow"

bench: setup ## speed, memory and error of the losses: bench.json
	$(BIN)/python -m tests.bench $(ARGS)

lint: setup ## ruff: rules and formatting
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)

types: setup ## basedpyright on mopd (its wheel brings its own node)
	$(BIN)/basedpyright

format: setup ## apply ruff's formatting and safe fixes
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

clean: ## remove .venv, caches and builds; runs/ and .cache/ stay
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache .hypothesis
	find mopd tests launch -type d -name __pycache__ -prune -exec rm -rf {} +
