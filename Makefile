# Everything a developer or a newcomer runs. `make help` lists it.
#
#   SHOAL_DEVICE=cpu|cuda  which locked versions to install; found out by asking nvidia-smi
#   PYTHON=python3.12      which Python to make .venv with; the first suitable one on PATH
#   ARGS="..."             more arguments for `shoal demo` or pytest

.DEFAULT_GOAL := help
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:

ifndef SHOAL_DEVICE
SHOAL_DEVICE := $(shell [[ "$$(nvidia-smi --list-gpus 2>/dev/null)" == GPU* ]] && echo cuda || echo cpu)
endif
ifeq ($(filter cpu cuda,$(SHOAL_DEVICE)),)
$(error SHOAL_DEVICE=$(SHOAL_DEVICE) is neither cpu nor cuda)
endif

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --no-input $(if $(CI),--quiet)
LOCK := requirements/$(SHOAL_DEVICE).txt
# Exists once this device's lock is installed in full; newer than all that decides what that means.
STAMP := $(VENV)/.installed-$(SHOAL_DEVICE)
OTHER_STAMP := $(filter-out $(STAMP),$(wildcard $(VENV)/.installed-*))

# Two files of tests at a time, in the order of tests/conftest.py; on GPUs, which tests want for themselves, one. For a
# debugger: ARGS="-n 0 --pdb".
SIDE_BY_SIDE := $(if $(filter cpu,$(SHOAL_DEVICE)),--numprocesses 2 --dist loadfile --no-loadscope-reorder)

.PHONY: help setup demo test check format lint types fast-test lock clean

help: ## Show this list
	@sed -nE 's/^([a-z-]+):.*## (.*)/  make \1\t\2/p' $(firstword $(MAKEFILE_LIST)) | expand -t 20

setup: $(STAMP) ## Make .venv with `shoal` and all it needs (a second run installs nothing)

demo: setup ## Train a small model on this machine, with or without GPUs
	$(BIN)/shoal demo $(ARGS)

test: setup ## Run all tests, real vLLM engines included
	$(BIN)/python -m pytest $(SIDE_BY_SIDE) $(ARGS)

check: lint types fast-test ## What every commit passes: format, lint, types, import rules, fast tests

format: setup ## Put every file into the common format
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports

types: setup
	$(BIN)/mypy

fast-test: setup
	$(BIN)/python -m pytest $(SIDE_BY_SIDE) -m "not engine and not gpu" $(ARGS)

lock: ## Renew requirements/*.txt after a change of dependencies (UPGRADE=1: the newest versions)
	scripts/lock.sh

clean: ## Remove .venv and all caches; keeps runs/
	rm -rf $(VENV) .cache .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache build
	find src tests benchmarks -name __pycache__ -prune -exec rm -rf {} +

# torch comes first and with its dependencies: its CUDA build pins its own libraries, its CPU build has none. All the rest
# comes as locked and no more (scripts/lock.sh says what is left out on purpose). Shoal itself is built with the locked setuptools.
$(STAMP): $(LOCK) pyproject.toml Makefile
	$(if $(OTHER_STAMP),rm -rf $(VENV))
	@[ -x $(BIN)/python ] || { python=$$(scripts/find-python); echo "Making $(VENV) with $$python"; "$$python" -m venv $(VENV); }
	$(PIP) --constraint $(LOCK) torch
	$(PIP) --no-deps --requirement $(LOCK)
	$(PIP) --no-deps --no-build-isolation --editable .
	@touch $@
	@echo "Installed $(LOCK) in $(VENV)"
