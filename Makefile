# Everything a person types. Each target makes what it needs; nothing is installed outside .venv*.
# Needed: Python 3.10 or newer with venv. Wanted: mosquitto; without it the demo falls back to amqtt and says so.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.fleetgrad
PIP    := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint .ci/constraints.txt

# The demo needs no torch, so it installs less; a development environment serves as well.
DEMO_EXTRA := $(if $(EXPORT)$(wildcard $(STAMP)-dev),dev,tools)

.DEFAULT_GOAL := help
.PHONY: help setup demo demo-seeds bench test test-long check format proto errors-page clean
.DELETE_ON_ERROR:

help:            ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 14

# A venv without pip is what `python3 -m venv` leaves behind where its package is missing: made again, not used.
$(STAMP)-%: pyproject.toml .ci/constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed: make PYTHON=python3.12 ...")'
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV) \
		|| { echo 'no venv: on Debian and Ubuntu `apt install python3-venv`, or make PYTHON=another' >&2; exit 1; }
	@echo "installing fleetgrad[$*] into $(VENV) (first run, or new versions)"
	@$(PIP) --editable '.[$*]'
	@touch $@

setup: $(STAMP)-dev ## make the development environment

demo: $(STAMP)-$(DEMO_EXTRA) ## train on ten device processes over a real broker (EXAMPLE=breast_cancer EXPORT=1 SEED=n ROUNDS=n ARGS='--json f')
	@$(BIN)/fldemo run $(if $(EXAMPLE),--example $(EXAMPLE)) $(if $(EXPORT),--export) $(if $(SEED),--seed $(SEED)) $(if $(ROUNDS),--rounds $(ROUNDS)) $(ARGS)

demo-seeds: $(STAMP)-$(DEMO_EXTRA) ## the demo with many seeds, a line for each (EXAMPLE=... SEEDS=20, about 40 s a seed)
	@$(BIN)/fldemo seeds $(if $(EXAMPLE),--example $(EXAMPLE)) --count $(or $(SEEDS),20) $(if $(ROUNDS),--rounds $(ROUNDS)) $(ARGS)

bench: $(STAMP)-$(DEMO_EXTRA) ## blob delivery to 1,000 clients, wave against pull, 1 and 10 MB: figures in .bench/ (about 8 min)
	@$(BIN)/flperftest blobs --size-mb 1 --size-mb 10 --repeat 2 --json .bench/blobs.json $(ARGS)

test: $(STAMP)-dev ## the tests, with the time of each directory (ARGS='tests/unit -k name')
	@$(BIN)/python -m pytest -m 'not long' $(ARGS)

test-long: $(STAMP)-dev ## the tests that take more than a few seconds each
	@$(BIN)/python -m pytest -m long $(ARGS)

check: $(STAMP)-dev $(STAMP)-protoc ## formatting, lint, types, import rules, generated code
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python .ci/protobuf.py --check
	$(BIN)/python .ci/errors_page.py --check

format: $(STAMP)-dev ## format and mend what can be mended
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

# Generated code must load on protobuf 4.25, so the compiler is the old one, in its own environment.
# Its wheels end with Python 3.12; on newer ones `make check` compares the SHA-256 that `make proto` wrote down.
$(STAMP)-protoc: .ci/protobuf.py | $(STAMP)-dev
	@$(BIN)/python .ci/protobuf.py --install
	@touch $@

proto: $(STAMP)-dev $(STAMP)-protoc ## regenerate wire_pb2.py from wire.proto (Python 3.12 or older)
	@$(BIN)/python .ci/protobuf.py

errors-page: $(STAMP)-dev ## docs/errors.md anew, from the tables of refusals and errors
	@$(BIN)/python .ci/errors_page.py

clean:           ## remove what the targets made
	@rm -rf .venv .venv-* .demo .bench build dist .mypy_cache .ruff_cache .import_linter_cache .hypothesis
