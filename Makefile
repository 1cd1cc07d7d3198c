# Two commands do everything on a fresh machine: make quickstart, make test.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
WORKERS ?= 2
export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM = false

.PHONY: help setup quickstart test lint bench clean

help:  ## Show these lines
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

$(BIN)/.ready: requirements.lock pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	@touch $@

setup: $(BIN)/.ready  ## Make .venv with the locked versions

quickstart: setup  ## Train a LoRA on the bundled tiny model and show before and after
	OMP_NUM_THREADS=$(shell nproc 2>/dev/null || echo 2) $(BIN)/python examples/quickstart/quickstart.py

test: setup  ## Run the tests, with coverage of diffsynth/
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --cov=diffsynth --cov-report=term:skip-covered

lint: setup  ## Style, types, spelling
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/codespell diffsynth examples tests benchmarks docs README.md Makefile

bench: setup  ## Measure against the bare-torch floor, side by side
	$(BIN)/python benchmarks/run.py

clean:  ## Remove the environment and what runs have written
	rm -rf $(VENV) examples/quickstart/output benchmarks/data benchmarks/results
