# Everything a person types. Each target makes what it needs; nothing is installed outside .venv*.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.fleetgrad
PIP    := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint .ci/constraints.txt

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-long check format proto clean

help:            ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 14

$(STAMP)-%: pyproject.toml .ci/constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing fleetgrad[$*] into $(VENV) (first run only)"
	@$(PIP) --editable '.[$*]'
	@touch $@

setup: $(STAMP)-dev ## make the development environment

demo: $(if $(EXPORT),$(STAMP)-dev,$(STAMP)-tools) ## train on ten device processes over a real broker (EXPORT=1 SEED=n ROUNDS=n)
	@$(BIN)/fldemo run $(if $(EXPORT),--export) $(if $(SEED),--seed $(SEED)) $(if $(ROUNDS),--rounds $(ROUNDS)) $(ARGS)

test: $(STAMP)-dev ## the tests, with the time of each directory
	@$(BIN)/python -m pytest -m 'not long' $(ARGS)

test-long: $(STAMP)-dev ## the tests that take more than a few seconds each
	@$(BIN)/python -m pytest -m long $(ARGS)

check: $(STAMP)-dev $(STAMP)-protoc ## formatting, lint, types, import rules, generated code
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python .ci/protobuf.py --check

format: $(STAMP)-dev ## format and mend what can be mended
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

# Generated code must load on protobuf 4.25, so the compiler is the old one, in its own environment.
$(STAMP)-protoc: .ci/protobuf.py
	@test -x $(VENV)-protoc/bin/python || $(PYTHON) -m venv $(VENV)-protoc
	@$(VENV)-protoc/bin/python -m pip install --quiet --disable-pip-version-check 'grpcio-tools==1.62.3' 'setuptools<81'
	@touch $@

proto: $(STAMP)-dev $(STAMP)-protoc ## regenerate wire_pb2.py from wire.proto
	@$(BIN)/python .ci/protobuf.py

clean:           ## remove what the targets made
	@rm -rf .venv .venv-* .demo build dist .mypy_cache .ruff_cache .hypothesis
