# On a fresh machine `make demo` or `make test` is all there is to do: each makes a virtual environment and installs
# what it needs into it, once. `make demo EXTRAS=dev,cuda12` (or cuda13, or rocm) installs jax for a GPU.
PYTHON ?= python3
VENV ?= .venv
EXTRAS ?= dev
TESTS ?= tests

PY := $(VENV)/bin/python
comma := ,
STAMP := $(VENV)/.installed-$(subst $(comma),-,$(EXTRAS))

.PHONY: demo test lint format bench clean

demo: $(STAMP)
	$(PY) -m jaxmoe demo

test: $(STAMP)
	$(PY) -m pytest --timeout=600 --numprocesses=auto $(TESTS)

lint: $(STAMP)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

format: $(STAMP)
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

bench: $(STAMP)
	$(PY) -m jaxmoe bench

clean:
	rm -rf .venv* build dist *.egg-info demo_output .pytest_cache .ruff_cache .mypy_cache .hypothesis

$(STAMP): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --editable ".[$(EXTRAS)]"
	touch $@
