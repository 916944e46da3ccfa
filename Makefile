# `make help` lists the targets. Each sets up .venv first, once.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.DEFAULT_GOAL := help
.PHONY: help setup reproduce real test test-all test-fast lint bench clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*##/ \t/'

setup: $(READY) ## make the environment in .venv

# torch first and alone: resolved together with the rest, pip may pick another build of it.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev,text,launchers,sweeps]'
	touch $@

reproduce: setup ## the paper's tables in the micro world, into results/micro
	$(BIN)/steerlora experiment=micro

REAL ?= data/real
BENCHMARKS ?= data/benchmarks

real: setup ## the same on SmolLM2 135M: REAL=<folder of text> BENCHMARKS=<folder of benchmarks>
	$(BIN)/python scripts/download.py model=smollm2_135m_q4
	$(BIN)/steerlora experiment=smollm2 domains.dir=$(REAL) evaluation.folder=$(BENCHMARKS)

# With bytecode: tests start processes, each of which would compile the package anew.
PYTEST := PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

test: setup ## the tests, but for the longest
	$(PYTEST) -m "not long"

test-all: setup ## all tests
	$(PYTEST)

test-fast: setup ## the tests that take no seconds each
	$(PYTEST) -m "not slow"

lint: setup ## style and common mistakes
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: setup ## a training step beside PEFT LoRA, an SAE step beside its bound
	$(BIN)/python scripts/bench_adapter.py
	$(BIN)/python scripts/bench_sae.py

clean: ## remove artifacts and logs, keep results and the environment
	rm -rf artifacts outputs wandb .pytest_cache .ruff_cache
