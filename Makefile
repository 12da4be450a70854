# Every target creates .venv and installs what is missing, so each works on a fresh machine.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: quickstart test browser lint bench install clean

quickstart: $(STAMP)  ## train a small model with CAGSR from nothing, offline, and show before and after
	$(BIN)/cagsr quickstart

test: $(STAMP) browser  ## the test suite, a process a core with one thread each
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto

browser:  ## a Chromium for the browser tests, where it can be had; without one they are skipped
	$(PYTHON) tests/setup_browser.py

lint: $(STAMP)  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(STAMP) benchmarks/.trl  ## benchmarks: ratios measured alternately in one call
	$(BIN)/python -m benchmarks

benchmarks/.trl: $(STAMP)  ## the last TRL with a PPOTrainer, beside the one that is used: only to compare with
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target $@ trl==1.12.0
	touch $@

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) benchmarks/.trl
