# `make pretrain` and `make test` are all that a fresh clone needs; both install first.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c

# The oldest supported Python first: it is the one that constraints.txt was tested with.
PYTHON ?= $(shell for p in python3.11 python3 python3.12 python3.13; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
# Passed to pip, for example to take a CPU-only build of torch from elsewhere.
PIP_ARGS ?=
WORKERS ?= 2
RUN ?= runs/first-run

BIN := .venv/bin
STAMP := .venv/installed

.PHONY: install test test-slow test-slurm slurm-installed lint format pretrain

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "vlscale needs Python 3.11 or newer; name it: make PYTHON=/path/to/python3" >&2; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check $(PIP_ARGS) -c constraints.txt -e '.[dev]'
	touch $@

# One thread per process: with two workers on two cores more threads only get in each other's way. A file's tests stay
# together, so that those that share a run make it once.
test: install lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile -m 'not slow and not slurm'

test-slow: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m 'slow and not slurm'

# Starts a cluster of its own, as root, and stops it again; installs Slurm where Debian's packages are at hand.
test-slurm: install slurm-installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slurm tests/slurm

slurm-installed:
	@PATH="$$PATH:/usr/sbin"; command -v slurmctld slurmd srun munged >/dev/null || { \
		test "$$(id -u)" = 0 && command -v apt-get >/dev/null || { \
			echo "the tests of slurm/ need root and Debian's packages slurm-wlm and munge" >&2; exit 2; }; \
		apt-get update && apt-get install -y --no-install-recommends slurm-wlm munge; }

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

pretrain: install
	$(BIN)/vlscale first-run --out $(RUN)
