# Two commands are enough: `make quickstart` and `make test`. `make` alone lists the rest.

VENV := .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.stamp

# gpu-check, bench and soak also run with another Python that has torch, without .venv and
# without a network: make gpu-check PYTHON=python3
PYTHON ?= $(if $(wildcard $(PY)),$(PY),python3)

# Passed on to pytest, as in: make test ARGS='-k data'
ARGS ?=
WORKERS ?= $(shell nproc 2>/dev/null || echo 2)

.DEFAULT_GOAL := help
.PHONY: audit help setup quickstart test lint map types format bench bench-gpu bench-optimizer soak gpu-check clean

help: ## list these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-15s %s\n", $$1, $$2}' Makefile

setup: $(STAMP) ## create .venv and install everything into it

# The versions in constraints.txt are the tested ones. On Linux the ordinary index serves a
# torch for NVIDIA GPUs, which also runs on a CPU; a smaller CPU-only build can be chosen as
# PyTorch's installation page says, through pip's own settings (PIP_EXTRA_INDEX_URL).
$(STAMP): pyproject.toml constraints.txt setup.py $(wildcard csrc/*)
	@found=; \
	for python in python3.11 python3.12 python3; do \
	    if $$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then found=$$python; break; fi; \
	done; \
	if [ -z "$$found" ]; then \
	    echo "Python 3.11 or newer is needed, and none was found."; \
	    echo "  hint: sudo apt-get install python3 python3-venv"; exit 1; \
	fi; \
	if ! $$found -c 'import ensurepip, venv' 2>/dev/null; then \
	    version=$$($$found -c 'import sys; print("%d.%d" % sys.version_info[:2])'); \
	    echo "$$found cannot make a virtual environment: its venv package is missing."; \
	    echo "  hint: sudo apt-get install python3-venv python$$version-venv"; exit 1; \
	fi; \
	if ! $(PY) -m pip --version >/dev/null 2>&1; then \
	    echo "Creating $(VENV) with $$($$found --version)"; \
	    $$found -m venv --clear $(VENV) || exit 1; \
	fi; \
	echo "Installing into $(VENV): some minutes the first time"
	@$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

quickstart: setup ## train a small model on this machine, in a few minutes
	@$(VENV)/bin/horizon train configs/quickstart.yaml

# One thread for each worker: many small models are tested, and two of them side by side are
# faster than one on two threads. No test may reach for a network.
test: setup ## run all tests
	@OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 \
	    $(PY) -m pytest -q -n $(WORKERS) --maxprocesses 8 --dist worksteal $(ARGS)

lint: setup ## check style, formatting and the order of imports between rooms
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .
	@$(PY) -m tests.rooms --quiet

map: ## print the rooms of the package and the imports between them
	@$(PYTHON) -m tests.rooms

types: setup ## check types
	@$(PY) -m mypy

format: setup ## reformat, and mend what can be mended automatically
	@$(PY) -m ruff check --fix .
	@$(PY) -m ruff format .

bench: ## measure everything that this machine can run; a dated file in benchmarks/results
	@PYTHONPATH=src $(PYTHON) -m benchmarks $(ARGS)

bench-gpu: ## the GPU suite, in parts that go on where they stopped; says so where there is none
	@PYTHONPATH=src $(PYTHON) -m benchmarks gpu $(ARGS)

bench-optimizer: ## measure the update on the host against memory speed and other optimizers
	@PYTHONPATH=src $(PYTHON) -m horizon_lm.optim.kernel --build
	@PYTHONPATH=src $(PYTHON) -m benchmarks.optimizer $(ARGS)

soak: ## repeat the random tests for long, with new seeds
	@PYTHONPATH=src $(PYTHON) -m tests.soak $(ARGS)

audit: ## look for known vulnerabilities in the pinned versions (needs a network)
	@$(PYTHON) -m venv build/audit && build/audit/bin/pip install --quiet pip-audit
	@build/audit/bin/pip-audit -r constraints.txt --no-deps --disable-pip

gpu-check: ## check everything that needs a GPU; says so where there is none
	@PYTHONPATH=src $(PYTHON) -m tests.gpu.check $(ARGS)

clean: ## remove caches and build output; keeps .venv and runs/
	@rm -rf build dist src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	@find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +
