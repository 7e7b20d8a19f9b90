# Everything runs from .venv, which the targets make and fill as needed.
PYTHON ?= python3
VENV ?= .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip install --quiet --disable-pip-version-check

.PHONY: demo test slow check docs bench clean
.DELETE_ON_ERROR:

demo: $(VENV)/.train
	$(PY) -m train

test: $(VENV)/.dev
	$(PY) -m pytest -n 2

slow: $(VENV)/.dev
	$(PY) -m pytest -n 2 -m slow

check: $(VENV)/.dev
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m pyright

docs: $(VENV)/.dev
	$(PY) -m sphinx -q -W --keep-going -b html docs docs/_build/html
	$(PY) -m sphinx -q -W -b doctest docs docs/_build/doctest

bench: $(VENV)/.dev
	$(PY) -m benchmarks

clean:
	rm -rf $(VENV) docs/_build dist

$(PY):
	$(PYTHON) -m venv $(VENV)

$(VENV)/.train: pyproject.toml | $(PY)
	$(PIP) --editable '.[train]'
	touch $@

$(VENV)/.dev: pyproject.toml | $(PY)
	$(PIP) --editable '.[dev]'
	touch $(VENV)/.train $@
