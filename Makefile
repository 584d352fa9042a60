# One environment, `.venv`, made on first use and kept up to date by two stamps; every target runs from it.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt
# Two workers with a thread each: torch would otherwise start as many threads in each as there are cores.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

.DEFAULT_GOAL := help
.NOTPARALLEL:  # two pips must not write to one environment
.PHONY: help demo test test-full test-floor lint bench clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' Makefile

demo: $(VENV)/.installed  ## the shipped model answers questions about a picture
	$(BIN)/vlmfx demo

test: lint  ## what a change must pass: lint, types, and every test that is not slow
	$(PYTEST) -m "not slow"

test-full: $(VENV)/.installed-dev  ## every test, the slow ones too
	$(PYTEST)

test-floor:  ## the eager path on the oldest torch and transformers we promise, in .venv-floor
	scripts/test_floor.sh

lint: $(VENV)/.installed-dev  ## ruff and mypy, changing nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/.installed  ## every scripts/bench_*.py, one after the other
	@set -e; found=; for script in scripts/bench_*.py; do \
	    [ -f "$$script" ] || continue; found=yes; echo "== $$script"; $(BIN)/python "$$script"; done; \
	[ -n "$$found" ] || { echo "No scripts/bench_*.py here: add one, or run .venv/bin/vlmfx --help." >&2; exit 1; }

clean:  ## remove caches and build outputs; the environments stay (rm -r .venv .venv-floor)
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find vlmfx tests scripts -name __pycache__ -type d -prune -exec rm -rf {} +

# A failed venv leaves a python without pip behind, which the next make would take for an environment: remove it.
$(BIN)/python:
	@$(PYTHON) -m venv $(VENV) || { rm -f $(BIN)/python*; \
	    echo "'$(PYTHON) -m venv' failed. On Debian or Ubuntu: apt install python3 python3-venv make" >&2; \
	    echo "For another interpreter (3.10 to 3.13): make PYTHON=python3.11 ..." >&2; exit 1; }

$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP_INSTALL) -e .
	@touch $@

# The development install contains the plain one, so it settles both stamps.
$(VENV)/.installed-dev: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP_INSTALL) -e '.[dev,video,serve]'
	@touch $(VENV)/.installed $@
