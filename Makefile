# The one entry. Needs python3 (3.10 or newer) and make; everything else goes into .venv.

PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: help demo serve test check bench format

help:
	@echo "make demo     the whole funnel on real data (10 minutes at most, after the installation)"
	@echo "make serve    the demo's bundle over HTTP, with a console (ARGS=... such as --port 9000)"
	@echo "make test     all tests"
	@echo "make check    format, lint, types, architecture"
	@echo "make bench    list the benchmarks; NAME=trie runs one (ARGS=... are its arguments)"
	@echo "make format   put the code into shape"

# Anew when the lock or the project's metadata changed.
$(STAMP): requirements.lock pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check -q -r requirements.lock
	$(BIN)/python -m pip install --disable-pip-version-check -q --no-deps -e .
	touch $@

demo: $(STAMP)
	$(BIN)/tiglon demo

serve: $(STAMP)
	test -f demo/complete-journey/manifest.json || $(BIN)/tiglon demo
	$(BIN)/tiglon serve demo/complete-journey $(ARGS)

test: $(STAMP)
	$(BIN)/python -m pytest

check: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest tests/test_architecture.py

bench: $(STAMP)
ifdef NAME
	$(BIN)/python benchmarks/$(NAME).py $(ARGS)
else
	@ls benchmarks | sed -n '/^machine/d; s/\.py$$//p'
	@echo "Run one: make bench NAME=... ARGS=..."
endif

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
