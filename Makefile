# `make pretrain` trains and exports a small model, `make test` checks the project; both set everything up in .venv first.
# Set-up is repeated only when pyproject.toml or constraints.txt is newer than the last one.
PYTHON ?= python3
PY ?= .venv/bin/python
ARGS ?=

PIP := .venv/bin/python -m pip --disable-pip-version-check
RUN := .venv/.installed-run
DEV := .venv/.installed-dev

.DEFAULT_GOAL := help
.PHONY: help pretrain test test-all test-gpu check format clean

help:
	@echo 'make pretrain   set up, then train on the State of the Union texts (ARGS="--steps 100" adds options)'
	@echo 'make test       set up, then format check, lint, types and the fast tests'
	@echo 'make test-all   set up, then all of that, the slow tests and the mutations'
	@echo 'make test-gpu   set up, then the tests that need an accelerator'
	@echo 'make check      the same as make test in an environment that is already set up (PY=python names it)'
	@echo 'make format     format, and mend what the linter can mend'
	@echo 'make clean      remove .venv, builds and caches (runs/ stays)'

pretrain: $(RUN)
	.venv/bin/relora-opt pretrain $(ARGS)

test: $(DEV)
	$(MAKE) check PY=.venv/bin/python

test-all: test
	.venv/bin/python -m pytest -m 'slow and not gpu'
	FAULT_KILLS=50 .venv/bin/python -m pytest -m faults
	.venv/bin/python tests/mutations.py

test-gpu: $(DEV)
	.venv/bin/python -m pytest -m gpu

check:
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .
	$(PY) -m mypy relora_opt cli
	$(PY) -m pytest -n logical --maxprocesses 4 --dist worksteal

format: $(DEV)
	.venv/bin/python -m ruff format .
	.venv/bin/python -m ruff check --fix .

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(RUN): pyproject.toml constraints.txt | .venv/bin/python
	$(PIP) install -c constraints.txt -e '.[cli,demo]'
	@touch $@

$(DEV): pyproject.toml constraints.txt | .venv/bin/python
	$(PIP) install -c constraints.txt -e '.[cli,demo,dev]'
	@touch $(RUN) $@

.venv/bin/python:
	@command -v $(PYTHON) >/dev/null || { \
		echo 'There is no $(PYTHON) here. Install Python 3.10 or newer, or name one: make PYTHON=/path/to/python3'; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
		echo "$$($(PYTHON) --version 2>&1) is older than 3.10. Name another: make PYTHON=/path/to/python3"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
		echo '$(PYTHON) has no venv module. On Debian and Ubuntu: apt install python3-venv'; exit 1; }
	$(PYTHON) -m venv .venv
