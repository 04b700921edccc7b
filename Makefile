# Every target says what it does: `make help`.
PYTHON ?= python3
# Options for pip, e.g. PIP_OPTIONS="--index-url …" for a mirror, or for a CPU-only torch.
PIP_OPTIONS ?=
# How many processes run tests; each starts others of its own, and two cores are enough for two.
TEST_PROCESSES ?= 2
VENV := .venv
READY := $(VENV)/.ready
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)

.DEFAULT_GOAL := help
.PHONY: help setup demo check test lint format peers bench-gpu clean

help: ## Show this list
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 20

$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(f"error: Python 3.10 to 3.12 is needed, $(PYTHON) is {v[0]}.{v[1]}: make PYTHON=python3.11 …" if not (3, 10) <= v <= (3, 12) else 0)'
	@test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV) (a minute or two the first time)"
	@$(VENV)/bin/python -m pip install -q --disable-pip-version-check $(PIP_OPTIONS) -e '.[dev]'
	@touch $@

setup: $(READY) ## Make .venv with everything the project needs

demo: $(READY) ## The whole path in minutes: synthetic pairs -> shards -> training -> evaluation -> report
	@rm -rf demo_run
	@bash examples/demo.sh demo_run

check: $(READY) lint ## Lint, types and the tests that are not slow: for every save
	@python -m pytest -q -n $(TEST_PROCESSES) --dist loadfile -m "not slow"

test: $(READY) lint ## Lint, types and the whole test suite (what CI runs)
	@python -m pytest -q -n $(TEST_PROCESSES) --dist loadfile

lint: $(READY) ## ruff and mypy
	@ruff check --quiet .
	@ruff format --check --quiet . || { echo "error: run 'make format'" >&2; exit 1; }
	@mypy --no-error-summary

format: $(READY) ## Format the code
	@ruff check --fix-only --quiet .
	@ruff format --quiet .

peers: ## Build .peers, a separate environment with open_clip and transformers, for parity tests
	@PYTHON="$(PYTHON)" PIP_OPTIONS="$(PIP_OPTIONS)" bash tests/peers/setup.sh .peers

bench-gpu: $(READY) ## On a GPU: images/s, utilisation, memory, relative time -> benchmarks/results/gpu_throughput.json
	@python benchmarks/gpu_throughput.py

clean: ## Remove .venv, .peers, caches and the demo's output
	@rm -rf $(VENV) .peers demo_run .mypy_cache .ruff_cache .pytest_cache .hypothesis *.egg-info build
