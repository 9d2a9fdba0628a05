# `make demo` and `make test` set up what they need in .venv on a machine with Python 3.11 or later.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
WORKERS ?= 2

BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
INSTALLED_DEMO := $(VENV)/.installed-demo
TORCH := $(shell grep '^torch==' constraints.txt)
PIP_INSTALL := $(BIN)/pip install --constraint constraints.txt

.PHONY: demo test test-all conformance smoke fuzz kill soak lint format format-check types docs clean

demo: $(INSTALLED_DEMO)
	$(BIN)/dfn-hf demo

test: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m "not slow"

test-all: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

conformance: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q tests/conformance

smoke: $(INSTALLED)
	$(BIN)/dfn-hf bench --smoke

# Test campaigns of random hostile input, killed processes and long runs: make fuzz MINUTES=60, make kill KILLS=1000, make soak MINUTES=60.
MINUTES ?= 10
KILLS ?= 100
CAMPAIGN := HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m tests.campaigns

fuzz: $(INSTALLED)
	$(CAMPAIGN).fuzz --minutes $(MINUTES)

kill: $(INSTALLED)
	$(CAMPAIGN).kill --kills $(KILLS)

soak: $(INSTALLED)
	$(CAMPAIGN).soak_models
	$(CAMPAIGN).soak_serve --minutes $(MINUTES)

lint: $(INSTALLED)
	$(BIN)/ruff check .

format: $(INSTALLED)
	$(BIN)/ruff format .

format-check: $(INSTALLED)
	$(BIN)/ruff format --check .

# mypy does not know package-dir mappings: it checks a tree of links that has the layout of the installed package.
types: $(INSTALLED)
	rm -rf build/types && mkdir -p build/types/dfn_hf
	ln -s $(CURDIR)/dfn_hf/* $(CURDIR)/modeling $(CURDIR)/conversion build/types/dfn_hf
	cd build/types && $(abspath $(BIN))/mypy --config-file $(CURDIR)/pyproject.toml --cache-dir $(CURDIR)/.mypy_cache -p dfn_hf

docs: $(INSTALLED)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# torch comes first and by its exact version: an unpinned request may download gigabytes of GPU libraries.
$(VENV)/.torch: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install $(TORCH)
	touch $@

$(INSTALLED_DEMO): pyproject.toml $(VENV)/.torch
	$(PIP_INSTALL) --editable '.[train,plot]'
	touch $@

# The development install includes what the demo needs.
$(INSTALLED): pyproject.toml $(VENV)/.torch
	$(PIP_INSTALL) --editable '.[dev]'
	touch $@ $(INSTALLED_DEMO)

clean:
	rm -rf $(VENV) build dist site *.egg-info .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
