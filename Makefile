# `make` lists the targets. They need Python 3.11 or newer and make, nothing else: everything is installed into .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt
#: Passed on: make test ARGS='-k smoke -x', make run ARGS='--out /tmp/pictures'
ARGS ?=

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:
.PHONY: help setup run test check fix bench chaos chaos-webhooks chaos-farm clean

help: ## List the targets
	@awk 'BEGIN { FS = ":.*## " } /^[a-z-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(VENV)/.installed ## Make .venv with everything that run, test and check need

run: $(VENV)/.installed-run ## Send real latents the whole way: broker, worker, pictures in demo-output/
	$(BIN)/latentq demo $(ARGS)

test: $(VENV)/.installed ## Run the tests
	$(BIN)/pytest -n 2 --dist loadfile $(ARGS)

check: $(VENV)/.installed ## Lint, formatting, types, and who may import whom
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

fix: $(VENV)/.installed ## Repair what ruff can repair by itself
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

bench: $(VENV)/.installed ## Measure: ratios against baselines of the same run, JSON in benchmarks/results/
	$(BIN)/python -m benchmarks $(ARGS)

chaos: $(VENV)/.installed ## Kill everything at random, 2,000 jobs long, and check that nothing is missing
	$(BIN)/python -m tests.chaos $(ARGS)

chaos-webhooks: $(VENV)/.installed ## Kill workers and couriers at random; every end of a job is told, under one id
	$(BIN)/python -m tests.chaos.webhook_storm $(ARGS)

chaos-farm: $(VENV)/.installed ## Make 500 pictures while generators and workers are killed, and check that none is missing
	$(BIN)/python -m tests.chaos.farm $(ARGS)

clean: ## Remove everything that these targets made
	rm -rf $(VENV) build dist demo-output .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamps make a second run fast; a change of the dependencies installs again. `run` does without the tools of
# `test` and `check`, which cost another 200 MB.
$(VENV)/.installed-run: pyproject.toml constraints.txt | $(BIN)/python
	$(INSTALL) -e '.[worker,farm,local]'
	@touch $@

$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/python
	$(INSTALL) -e '.[worker,farm,local,dev]'
	@touch $(VENV)/.installed-run $@

$(BIN)/python:
	@command -v $(PYTHON) >/dev/null || { \
	  echo "latentq: $(PYTHON) was not found. Install Python 3.11 or newer, or name it: make PYTHON=/path/to/python3" >&2; \
	  exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "latentq: needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) --version 2>&1)." \
	    "Name a newer one: make PYTHON=python3.12 …" >&2; \
	  exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "latentq: $(PYTHON) has no venv module. On Debian and Ubuntu: apt-get install python3-venv" >&2; \
	  exit 1; }
	$(PYTHON) -m venv $(VENV)
