# Everything runs in a virtual environment that make builds itself. All it needs
# is Python 3.10 or newer with pip and venv.
#
#   make demo                             the main job on real input
#   make demo ARGS=--crash                the same, with a worker killed on the way
#   make test ARGS='-k crash'             a part of the tests
#   make test PYTHON=python3.13 VENV=.venv-3.13

PYTHON ?= python3
VENV ?= .venv
ARGS ?=

BIN := $(VENV)/bin
RUN := $(BIN)/python
SPHINX := $(BIN)/sphinx-build -W --keep-going -q -n

.PHONY: help demo test lint types docs bench clean
.NOTPARALLEL:

help:
	@echo "make demo   measure the standard library with a pool of workers (ARGS=--crash)"
	@echo "make test   run the tests (ARGS='-k name')"
	@echo "make lint   check style and formatting"
	@echo "make types  check types"
	@echo "make docs   build the documentation into docs/_build/html and run its examples"
	@echo "make bench  compare with other process pools (ARGS=--quick)"
	@echo "make clean  remove the virtual environment, caches and built files"
	@echo "PYTHON=$(PYTHON) VENV=$(VENV)"

demo: $(VENV)/installed-demo
	@$(RUN) examples/demo.py $(ARGS)

test: $(VENV)/installed-test
	@$(RUN) -m pytest $(ARGS)

lint: $(VENV)/installed-dev
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

types: $(VENV)/installed-dev
	@$(BIN)/mypy

docs: $(VENV)/installed-docs
	@$(SPHINX) -b html docs docs/_build/html
	@$(SPHINX) -b doctest docs docs/_build/doctest
	@echo "docs/_build/html/index.html"

bench: $(VENV)/installed-bench
	@$(RUN) -m benchmarks $(ARGS)

clean:
	rm -rf $(VENV) build dist docs/_build
	rm -rf .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# One stamp per extra: an installation happens once, and again when pyproject.toml
# has changed. An interrupted one leaves no stamp and is tried again.
$(VENV)/installed-%: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and \
	    "zmqexecutor needs Python 3.10 or newer, and $(PYTHON) is %d.%d; try make PYTHON=python3.13" \
	    % sys.version_info[:2])'
	@echo "Installing zmqexecutor[$*] into $(VENV) (once)"
	@$(PYTHON) -m venv $(VENV)
	@$(RUN) -m pip install -qq --disable-pip-version-check --editable '.[$*]'
	@touch $@
