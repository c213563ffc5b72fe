# `make quickstart` and `make test` are enough to begin with. `make` lists all targets.

VENV := .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.stamp

# The Python that .venv is made with, as in: make setup BASE_PYTHON=python3.13
# By default the first of these that is 3.11 or newer. CONSTRAINTS= installs the newest versions, not the tested ones.
BASE_PYTHON ?= python3.11 python3.12 python3
CONSTRAINTS ?= constraints.txt

# gpu-check, gpu-evidence, bench and soak also run offline without .venv, on any Python that has torch:
# make gpu-check PYTHON=python3
PYTHON ?= $(if $(wildcard $(PY)),$(PY),python3)

# Arguments for the command, as in: make test ARGS='-k data'
ARGS ?=
WORKERS ?= $(shell unset OMP_NUM_THREADS; nproc 2>/dev/null || echo 2)

.DEFAULT_GOAL := help
.PHONY: audit compat help setup quickstart test lint map types format docs docs-serve reference drawings bench bench-gpu \
    bench-optimizer soak gpu-check gpu-evidence gpu-wheels clean

help: ## list all targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-15s %s\n", $$1, $$2}' Makefile

setup: $(STAMP) ## create .venv and install everything in it

# constraints.txt pins the tested versions. On Linux the default index serves a torch for NVIDIA
# GPUs, which also runs on a CPU. PyTorch's installation page explains how to choose a smaller
# CPU-only build through pip's own settings (PIP_EXTRA_INDEX_URL).
$(STAMP): pyproject.toml constraints.txt setup.py $(wildcard csrc/*)
	@found=; \
	for python in $(BASE_PYTHON); do \
	    if $$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then found=$$python; break; fi; \
	done; \
	if [ -z "$$found" ]; then \
	    echo "Python 3.11 or newer not found (tried: $(BASE_PYTHON))."; \
	    echo "  hint: sudo apt-get install python3 python3-venv"; exit 1; \
	fi; \
	if ! $$found -c 'import ensurepip, venv' 2>/dev/null; then \
	    version=$$($$found -c 'import sys; print("%d.%d" % sys.version_info[:2])'); \
	    echo "$$found cannot create a virtual environment: its venv package is missing."; \
	    echo "  hint: sudo apt-get install python3-venv python$$version-venv"; exit 1; \
	fi; \
	if ! $(PY) -m pip --version >/dev/null 2>&1; then \
	    echo "Creating $(VENV) with $$($$found --version)"; \
	    $$found -m venv --clear $(VENV) || exit 1; \
	fi; \
	echo "Installing into $(VENV); the first time takes some minutes"
	@$(PY) -m pip install --quiet --disable-pip-version-check $(addprefix -c ,$(CONSTRAINTS)) -e '.[dev]'
	@touch $@

quickstart: setup ## train a small model on this machine in a few minutes
	@$(VENV)/bin/horizon train quickstart

# One thread per worker: the models are small, and two at once are faster than one on two threads.
# No test may use the network. Without bytecode each worker and each process of a test would compile all files anew.
test: setup ## run all tests
	@unset PYTHONDONTWRITEBYTECODE; \
	    OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 \
	    $(PY) -m pytest -q -n $(WORKERS) --maxprocesses 8 --dist worksteal $(ARGS)

# Takes minutes, and needs a network the first time. Writes to build/.
compat: setup ## check the oldest supported transformers, the GPU dry runs and the peers' adapters
	@PYTHONPATH=src $(PY) -m tests.compat $(ARGS)

lint: setup ## check style, formatting and the direction of imports
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .
	@$(PY) -m tests.rooms --quiet

map: ## print the package's rooms and the imports between them
	@$(PYTHON) -m tests.rooms

types: setup ## check types
	@$(PY) -m mypy

# Needs no network. With --quiet, --strict would let warnings pass. The variable silences news of Material's successor.
docs: setup ## build the documentation site in build/site, strictly
	@NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict

docs-serve: setup ## show the documentation site while it is being edited
	@NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs serve $(ARGS)

reference: setup ## write the generated pages: settings, commands, errors
	@PYTHONPATH=src $(PY) -m tests.reference

format: setup ## reformat and apply automatic fixes
	@$(PY) -m ruff check --fix .
	@$(PY) -m ruff format .

bench: ## run all benchmarks this machine can run; write a dated file in benchmarks/results
	@PYTHONPATH=src $(PYTHON) -m benchmarks $(ARGS)

bench-gpu: ## run the whole GPU suite in resumable stages, if there is a GPU; takes hours
	@PYTHONPATH=src:$(PYTHONPATH) $(PYTHON) -m benchmarks gpu $(ARGS)

gpu-evidence: ## run the most telling GPU stages; a call takes under nine minutes, the next one continues
	@PYTHONPATH=src:$(PYTHONPATH) $(PYTHON) -m benchmarks gpu --evidence $(ARGS)

gpu-wheels: ## download wheels that a GPU machine without a network lacks: FOLDER=wheels ARGS='NAME==VERSION'
	@$(PYTHON) -m benchmarks.wheels $(or $(FOLDER),build/wheels) $(ARGS)

bench-optimizer: ## compare the host update with memory speed and other optimizers
	@PYTHONPATH=src $(PYTHON) -m horizon_lm.optim.kernel --build
	@PYTHONPATH=src $(PYTHON) -m benchmarks.optimizer $(ARGS)

# RUN=runs/quickstart also draws the step that this run recorded.
drawings: ## draw the simulated steps of docs/assets again
	@PYTHONPATH=src $(PYTHON) -m benchmarks.drawings $(if $(RUN),--run $(RUN)) $(ARGS)

soak: ## repeat the random tests many times with new seeds; GRPO learns a task
	@PYTHONPATH=src $(PYTHON) -m tests.soak $(ARGS)

audit: ## check the pinned versions for known vulnerabilities (needs a network)
	@$(PYTHON) -m venv build/audit && build/audit/bin/pip install --quiet pip-audit
	@build/audit/bin/pip-audit -r constraints.txt --no-deps --disable-pip

gpu-check: ## run all checks that need a GPU, if there is one
	@PYTHONPATH=src:$(PYTHONPATH) $(PYTHON) -m tests.gpu.check $(ARGS)

clean: ## remove caches and build output; keep .venv and runs/
	@rm -rf build dist src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	@find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +
