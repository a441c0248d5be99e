# Two targets do everything on a fresh machine: `make demo` and `make test`. Both set up .venv first; later runs reuse it.
PYTHON ?= $(shell for python in python3 python3.11 python3.12 python3.13; do \
	$$python -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null && echo $$python && break; done)
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
TOOLS := $(VENV)/.tools

.PHONY: demo test lint types coverage docs format setup clean serve-test

demo: $(READY)
	@$(BIN)/python examples/demo.py

# One thread per worker: two workers that each start a thread per core only get in each other's way.
test: lint types
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

lint: $(TOOLS)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(TOOLS)
	$(BIN)/mypy

coverage: $(TOOLS)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 \
		--cov=dsv4c.ir --cov=dsv4c.models --cov=dsv4c.reference --cov-report=term-missing --cov-fail-under=90

# In an environment of its own, of 5 GB: plans served by the oldest and the newest vLLM, over HTTP.
SERVED := build/serve
VLLM := 0.23.0 0.33.0
serve-test:
	@PYTHON=$(PYTHON) tests/serve/environment.sh $(SERVED) $(VLLM)
	@for version in $(VLLM); do PYTHONPATH=$(SERVED)/vllm-$$version OMP_NUM_THREADS=1 \
		$(SERVED)/bin/python -m tests.serve.check build/served --host-platform || exit 1; done

format: $(TOOLS)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(TOOLS)
	@$(BIN)/python $(INSTALL) '.[docs]'
	$(BIN)/mkdocs build --strict --site-dir build/docs

setup: $(TOOLS)

# Bytecode is left to the first import: of what is installed, a run imports a tenth.
INSTALL := -m pip install --quiet --disable-pip-version-check --no-compile --constraint constraints.txt --editable

$(READY): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "error: no Python 3.11, 3.12 or 3.13 found; set PYTHON=/path/to/python" >&2; exit 1; }
	@echo "setting up $(VENV) with $(PYTHON); this takes a minute, once"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python $(INSTALL) .
	@touch $@

# What tests need besides, which the demo does without.
$(TOOLS): $(READY)
	@$(BIN)/python $(INSTALL) '.[dev]'
	@touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage
