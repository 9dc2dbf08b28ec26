# Each target does its own set-up: a virtual environment in .venv, kept until pyproject.toml or the pins change.

# The first Python on the path that persona runs on; PYTHON=/path/to/python3.12 make test chooses another.
PYTHON ?= $(shell for name in python3 python3.13 python3.12 python3.11 python3.10 python; do \
  "$$name" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null && { echo "$$name"; break; }; done)
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/ready
WORKERS ?= 2

.DEFAULT_GOAL := help
.PHONY: help setup demo test backends test-backends test-peers fuzz lint format types docs clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' $(MAKEFILE_LIST) | expand -t 22

setup: $(READY) ## make the environment: persona, torch and the tools, at the versions of constraints/torch.txt

$(READY): pyproject.toml constraints/torch.txt
	@if [ -z "$(PYTHON)" ]; then \
	  echo "persona needs Python 3.10, 3.11, 3.12 or 3.13, and none was found on the path."; \
	  echo "Install one (Debian, Ubuntu: apt install python3 python3-venv), or: make $(or $(MAKECMDGOALS),setup) PYTHON=/path/to/python3"; exit 1; fi
	@"$(PYTHON)" -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "$(PYTHON) cannot make a virtual environment: its venv or ensurepip module is missing."; \
	  echo "Install it (Debian, Ubuntu: apt install python3-venv), then run make again."; exit 1; }
	@echo "Making the environment in $(VENV) (once; torch is a large download)"
	"$(PYTHON)" -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[torch,dev]" --constraint constraints/torch.txt
	@touch $(READY)

demo: $(READY) ## teach the embedded base a toy robot it has never seen, and draw the sheet that shows it
	$(BIN)/persona train --plugin dreambooth

test: lint types ## everything that has to be green: format, lint, types, tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses $(WORKERS)

backends: export PERSONA_DATA ?= $(CURDIR)/.backends
backends: $(READY) ## make the environments of Paddle and MindSpore, in .backends (4 GB on disk)
	$(BIN)/persona backends setup paddle
	$(BIN)/persona backends setup mindspore

# The frameworks' own tests run inside their environments, with pytest lent to them; the last line runs every method on
# every framework from here, as a user would.
test-backends: export PERSONA_DATA ?= $(CURDIR)/.backends
test-backends: export OMP_NUM_THREADS = 1
test-backends: backends ## every method on every backend: train, resume, generate, convert
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade --target "$$PERSONA_DATA/pytest" \
	  --constraint constraints/torch.txt pytest
	for name in paddle mindspore; do \
	  PYTHONPATH="$$PERSONA_DATA/pytest" "$$PERSONA_DATA/environments/$$name/bin/python" -m pytest "tests/backends/$$name" || exit 1; done
	PERSONA_REQUIRE_BACKENDS=1 $(BIN)/python -m pytest tests/backends/test_all_backends.py

# Each consumer's tests run where it is installed; lycoris-lora needs nothing that is not there beside diffusers already.
test-peers: export PERSONA_DATA ?= $(CURDIR)/.backends
test-peers: export OMP_NUM_THREADS = 1
test-peers: backends ## files that persona writes, loaded by diffusers, PEFT, lycoris-lora, Paddle and MindSpore themselves
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade --target "$$PERSONA_DATA/pytest" \
	  --constraint constraints/torch.txt pytest
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade --target "$$PERSONA_DATA/lycoris" \
	  --no-deps --requirement constraints/lycoris.txt
	PYTHONPATH="$$PERSONA_DATA/lycoris" $(BIN)/python -m pytest \
	  tests/peers/test_diffusers.py tests/peers/test_peft.py tests/peers/test_peft_methods.py \
	  tests/peers/test_whole_transformers.py tests/peers/test_lycoris.py
	for name in paddle mindspore; do \
	  PYTHONPATH="$$PERSONA_DATA/pytest" "$$PERSONA_DATA/environments/$$name/bin/python" -m pytest \
	    "tests/peers/test_$$name.py" || exit 1; done

MINUTES ?= 10
fuzz: $(READY) ## coverage-guided fuzzing of files and names with atheris, MINUTES=10 each
	$(BIN)/python -m pip install --quiet --disable-pip-version-check atheris==3.0.0
	$(BIN)/python -m tools.fuzz bytes --minutes $(MINUTES)
	$(BIN)/python -m tools.fuzz names --minutes $(MINUTES)

lint: $(READY) ## ruff: format and lint
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

format: $(READY) ## let ruff put it right
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(READY) ## mypy, strict on core and formats
	$(BIN)/mypy

docs: $(READY) ## write docs/cli.md and docs/formats.md again, after a verb, a flag or a dialect has changed
	$(BIN)/python -m tools.docs.cli_reference
	$(BIN)/python -m tools.docs.formats_reference

clean: ## remove the environment, caches and build output (runs and demo results stay)
	rm -rf $(VENV) .backends build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find persona tests tools benchmarks examples -name __pycache__ -type d -prune -exec rm -rf {} +
