# One environment in .venv, made once and again only when what it is made from changes.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/installed

.DEFAULT_GOAL := help
MUTATIONS ?= 1000000
SEED ?= 1

.PHONY: help setup train test test-slow test-faults docker-test fuzz verify-quick check format clean

help: ## list the verbs
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(STAMP): pyproject.toml constraints.txt hatch_build.py $(wildcard rustyrl/c/*)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed; make PYTHON=/path/to/python3.11"; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[learner,dev]'
	@touch $@

setup: $(STAMP) ## create .venv with everything installed

train: $(STAMP) ## watch a quadrotor learn to fly to its target
	$(BIN)/rustyrl train drone

check: $(STAMP) ## the quick part of the tests: format, lint, types, import contracts
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python tests/forbidden.py

test: check ## everything that CI runs
	$(BIN)/pytest -n auto --dist worksteal

test-slow: $(STAMP) ## longer forms of some tests, which the default run leaves out
	$(BIN)/pytest -m slow

test-faults: $(STAMP) ## break clusters in every way for half an hour; FAULTS_MINUTES=3 shortens its longest part
	$(BIN)/pytest -m faults

docker-test: $(STAMP) ## build the images, and run, kill and scale a cluster of containers
	$(BIN)/pytest -v -m docker tests/test_containers.py

fuzz: $(STAMP) ## change a million messages, files and keys, and see each one read or refused; takes minutes
	PYTHONPATH=tests $(BIN)/python tests/fuzzing.py --mutations $(MUTATIONS) --seed $(SEED)

verify-quick: $(STAMP) ## hold learning on CartPole and Acrobot against published scores, in under 5 minutes
	$(BIN)/rustyrl verify cartpole cartpole-zoo acrobot --seeds 1 --lag 1

format: $(STAMP) ## format and mend what can be mended
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean: ## remove the environment and all caches; runs stay
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
