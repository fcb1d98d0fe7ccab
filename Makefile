# make figures   every chapter at PROFILE (quick), then figures/, the ledger and README.md
# make test      set-up, clean gate, every notebook at smoke, ruff, mypy, pytest
# make help      all targets and variables

PROFILE  ?= quick
CHAPTERS ?=
JOBS     ?= 2
PYTHON   ?= $(shell for p in python3 python3.13 python3.12 python3.11; do $$p -c 'import sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$p; break; }; done)
BIN      := .venv/bin
STAMP    := .venv/.installed
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.DEFAULT_GOAL := help
.PHONY: help setup export fetch figures test clean-gate smoke lint notebooks lock readme clean

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | awk -F'\t' '{printf "  make %-12s %s\n", $$1, $$2}'
	@echo; echo "  PROFILE=smoke|quick|full  CHAPTERS=\"inside/20_logit_lens …\"  JOBS=2  LONG=1 (long tests)  PYTHON=python3.12"

$(STAMP): requirements.lock requirements-index.txt settings.ini setup.py
	@test -n "$(PYTHON)" || { echo "memnotes needs Python 3.11 or newer with venv; none was found. Install one, or name it: make PYTHON=/path/to/python3.12"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q -r requirements.lock
	$(BIN)/python -m pip install -q --no-deps -r requirements-index.txt
	$(BIN)/python -m pip install -q --no-deps -e .
	@touch $@

setup: $(STAMP) ## .venv from requirements.lock, with memnotes in it

export: $(STAMP)
	@$(BIN)/nbdev_export

fetch: $(STAMP) ## fetch and verify the sources
	@$(BIN)/memnotes fetch

figures: export $(STAMP) ## run the chapters that are missing or changed; regenerate figures/, the ledger and README.md
	@$(BIN)/memnotes fetch --all || { echo "an optional source is missing: figures that can use it are drawn without it, and say so"; $(BIN)/memnotes fetch; }
	@$(BIN)/memnotes run $(CHAPTERS) --profile $(PROFILE) --jobs $(JOBS)
	@$(BIN)/memnotes ledger --write
	@$(BIN)/memnotes readme

test: $(STAMP) ## set-up, clean gate, every notebook at smoke, ruff, mypy, pytest (LONG=1: the long forms too)
	@$(MAKE) --no-print-directory clean-gate fetch smoke lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

clean-gate: $(STAMP) ## export and clean change no byte of the tree
	@before=$$(mktemp); after=$$(mktemp); list() { git ls-files -z --cached --others --exclude-standard nbs memnotes settings.ini pyproject.toml | xargs -0 sha256sum 2>&1; }; \
	list > $$before; $(BIN)/nbdev_export && $(BIN)/nbdev_clean && list > $$after && diff $$before $$after > /dev/null \
	  || { echo "clean gate: nbdev_export or nbdev_clean changed the tree; commit what it wrote:"; diff $$before $$after | sed -n 's/^> [0-9a-f]*  /  /p'; exit 1; }; rm $$before $$after

smoke: $(STAMP)
	@$(BIN)/memnotes run --profile smoke --jobs $(JOBS)

lint: $(STAMP)
	@$(BIN)/ruff check .
	@$(BIN)/mypy

notebooks: export ## open JupyterLab on nbs/
	$(BIN)/jupyter lab --notebook-dir=nbs

lock: $(STAMP) ## requirements.lock from settings.ini
	$(BIN)/python -m memnotes.lab.lock

readme: export ## README.md from nbs/index.ipynb
	@$(BIN)/memnotes readme

clean: ## remove everything that is made anew, but for data/cache
	rm -rf .venv runs .snakemake .mypy_cache .ruff_cache .pytest_cache .hypothesis build dist *.egg-info
