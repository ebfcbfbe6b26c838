# Each target works on a fresh machine with Python 3.11 or later and no packages: it makes .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OUTPUTS ?= outputs
STAMP := $(VENV)/.installed

.PHONY: help install quickstart sample train-mini test test-fast lint tensorboard embedded-data clean
.DEFAULT_GOAL := help

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 18

# editable by a path (compat): a finder would come after a folder dcar beside the user's script
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt --config-settings editable_mode=compat -e ".[dev]"
	@touch $@

install: $(STAMP)  ## make .venv and install the project with pinned versions

quickstart: $(STAMP)  ## train all of DC-AR on the embedded data, sample, write a report
	$(BIN)/python -m experiments.run --exp=quickstart outputs=$(OUTPUTS)

PROMPT ?= a sunflower, 3d style
# as it was given: a $ in a prompt is a dollar
override export PROMPT := $(value PROMPT)

sample: $(STAMP)  ## a picture of PROMPT by the shipped model: make sample PROMPT="a sunflower, 3d style"
	@$(BIN)/python -m experiments.run --exp=sample "prompt=$$PROMPT" out=$(OUTPUTS)/sample.png

train-mini: $(STAMP)  ## train the shipped model anew, from nothing; goes on where it was stopped
	$(BIN)/python -m experiments.run --exp=mini outputs=$(OUTPUTS) $(SETTINGS)

# in the order of tests/conftest.py
test: test-fast  ## every test, the slow ones too, README.md's commands among them
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow -n auto --dist loadfile --no-loadscope-reorder

test-fast: $(STAMP)  ## the tests that take seconds, a process of one thread on each core
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow" -n auto

lint: $(STAMP)  ## format check, lint, types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

tensorboard: $(STAMP)  ## curves and pictures of every run, on http://localhost:6006 (or PORT)
	$(BIN)/tensorboard --logdir $(OUTPUTS) $(if $(PORT),--port $(PORT))

embedded-data: $(STAMP)  ## rebuild assets/emoji from the packages it is made of, byte for byte
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[emoji]"
	$(BIN)/python -m dcar.data.sources.emoji --out assets/emoji

clean:  ## remove .venv and outputs
	rm -rf $(VENV) outputs
