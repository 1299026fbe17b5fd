# Everything a developer or a newcomer types. `make` alone lists the targets.
.DEFAULT_GOAL := help
.PHONY: help demo demo-broken demo-stop check-services test faults bench test-unit lint format services clean

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
export PREFECT_SERVER_ANALYTICS_ENABLED := false
export DO_NOT_TRACK := 1

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-15s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: services-for-demo $(VENV)/.control ## Deploy a real container to a second host and print its URL
	@$(BIN)/python -m deployments.demo up

demo-broken: services-for-demo $(VENV)/.control ## Deploy a broken version and see the previous one still answer
	@$(BIN)/python -m deployments.demo broken

demo-stop: $(VENV)/.control ## Take the demo away, with everything it made
	@$(BIN)/python -m deployments.demo stop
	@deployments/install_services.sh --stop-docker

check-services: $(VENV)/.control ## Name file, line and field of every mistake in deployments/services
	@$(BIN)/python -m deployments.service_files check

test: services-for-test $(VENV)/.dev ## Lint, type-check and run all tests on real services
	@$(MAKE) --no-print-directory lint
	$(BIN)/python -m pytest --numprocesses 2 --no-loadscope-reorder $(PYTEST_ARGS)

faults: services-for-test $(VENV)/.dev ## Strike running deployments with faults and check what serves; hours, resumable
	$(BIN)/python -m tests.faults run $(ARGS)

bench: services-for-bench $(VENV)/.dev ## Measure on hosts of its own and print the tables; hours, transfers resumable
	$(BIN)/python -m tests.bench run $(ARGS)

test-unit: $(VENV)/.dev ## Run the tests that need no service
	$(BIN)/python -m pytest tests/unit tests/contract tests/test_architecture.py

lint: $(VENV)/.dev ## Check format, lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(VENV)/.dev ## Format the sources
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

services: services-for-test ## Install what the tests need: Docker Engine, PostgreSQL, Kafka, Prometheus, Chromium

clean: ## Remove the virtual environment and caches
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis

.PHONY: services-for-demo services-for-test services-for-bench
services-for-demo:
	@deployments/install_services.sh --for demo --start-docker

services-for-test:
	@deployments/install_services.sh --for test

services-for-bench:
	@deployments/install_services.sh --for bench

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' \
	  || { echo "Gantry needs Python 3.11 to 3.13; give one: make PYTHON=python3.12 ..."; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.control: $(VENV)/bin/python pyproject.toml constraints.txt
	@echo "Installing Gantry into $(VENV)"
	@$(PIP_INSTALL) -e '.[control,receiver]'
	@touch $@

$(VENV)/.dev: $(VENV)/bin/python pyproject.toml constraints.txt
	@echo "Installing Gantry and its tools into $(VENV)"
	@$(PIP_INSTALL) -e '.[dev]'
	@touch $@ $(VENV)/.control
