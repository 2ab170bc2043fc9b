VENV ?= .venv
PYTHON ?= python3
PORT ?= 8000
SETTINGS ?=
TESTS ?= tests
PARTS = $(patsubst tests,tests/unit tests/integration tests/conformance tests/e2e,$(TESTS:/=))
INSTALL = $(PYTHON) requirements/install.py --venv $(VENV)
BIN = $(VENV)/bin

.DEFAULT_GOAL := help
.PHONY: help install serve cluster test abuse matrix chart lint format bench clean

help: ## list the targets
	@echo "make TARGET [VENV=.venv] [PYTHON=python3]"
	@sed -n 's/^\([a-z]*\):[^#]*## \(.*\)/  \1|\2/p' $(MAKEFILE_LIST) | awk -F'|' '{printf "%-10s %s\n", $$1, $$2}'

install: ## make the virtual environment and install xloom with its pinned requirements
	@$(INSTALL) cpu isq

serve: install ## serve the sample, or SETTINGS=file.yaml, at PORT=8000
	@exec $(BIN)/xloom serve $(SETTINGS) --port $(PORT)

cluster: install ## a Ray cluster of two nodes on this machine, serving SETTINGS (default: cluster/local.yaml)
	@exec $(BIN)/python cluster/local_cluster.py $(SETTINGS)

# Whole servers and clusters have the machine to themselves; the other tests run beside each other.
test: ALONE = $(filter tests/e2e%,$(PARTS))
test: BESIDE = $(filter-out $(ALONE),$(PARTS))
test: ## run the tests (TESTS=tests/unit for a part)
	@$(INSTALL) cpu mistralrs isq dev
	@failed=0; \
	$(if $(BESIDE),$(BIN)/python -m pytest -n 2 --dist loadfile $(BESIDE) || failed=1;) \
	$(if $(ALONE),$(BIN)/python -m pytest $(ALONE) || failed=1;) \
	exit $$failed

abuse: ## hostile requests beside good streams, for some minutes
	@$(INSTALL) cpu mistralrs isq dev
	@ABUSE_ROUNDS=10 $(BIN)/python -m pytest -s tests/e2e/tiny/test_abuse.py

matrix: ## test each combination of extras in an environment of its own (long)
	@$(INSTALL) cpu mistralrs isq dev
	@$(BIN)/nox

chart: ## write the chart's README and schema from its values, and the boards and alerts from their code
	@$(INSTALL) cpu dev
	@$(BIN)/python -m xloom_dashboards.generate
	@$(BIN)/python helm/readme.py
	@$(BIN)/python helm/schema.py

lint: ## ruff and mypy
	@$(INSTALL) cpu dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: ## mend what ruff can mend
	@$(INSTALL) cpu dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: ## measure, side by side with peers (see docs/benchmarks.md)
	@$(INSTALL) cpu mistralrs isq bench
	@$(BIN)/python -m benchmarks

clean: ## remove caches and the virtual environment
	rm -rf $(VENV) .nox build dist .pytest_cache .mypy_cache .ruff_cache *.egg-info
	find deployments dashboards tests benchmarks requirements -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true
