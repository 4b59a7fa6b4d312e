# The two commands: `make quickstart` and `make test`. Each makes the environment if it is missing.

# The first Python of 3.11 or newer; or say which: make PYTHON=/path/to/python3
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: quickstart test check bench docs pages clean environment

quickstart: $(INSTALLED)  ## run the main job to a report: pool of text -> choice -> models -> evidence
	$(BIN)/modelwright run quickstart

test: $(INSTALLED)  ## the whole test suite
	$(BIN)/python -m pytest -n 2 --dist loadfile

check: $(INSTALLED)  ## format, lint, types and the tests of the house itself: under a minute
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest tests/house -m "not slow"

bench: $(INSTALLED)  ## speed and memory, as ratios against peers measured in the same run
	for b in benchmarks/*.py; do $(BIN)/python $$b || exit 1; done

docs: $(INSTALLED)  ## the documentation as a site, in site/
	$(BIN)/python -m modelwright.verify.page
	$(BIN)/mkdocs build --strict

clean:  ## everything that was made here, the environment and runs/ included
	rm -rf $(VENV) runs site build dist .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

environment: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed: install it, or say where it is: make PYTHON=/path/to/python3"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	@# torch first and exactly: a looser request may bring gigabytes that nothing here needs.
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$$(grep '^torch==' constraints.txt)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@
