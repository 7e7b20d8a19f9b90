# Everything runs from .venv, which the targets make and fill as needed.
PYTHON ?= python3
VENV ?= .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip install --quiet --disable-pip-version-check

.PHONY: demo test slow oracle lowest check docs wheel bench clean
.DELETE_ON_ERROR:

demo: $(VENV)/.train
	$(PY) -m train

test: $(VENV)/.dev
	$(PY) -m pytest -n 2

slow: $(VENV)/.dev
	$(PY) -m pytest -n 2 -m slow

# The rule against its oracle, 250 cases a test.
oracle: $(VENV)/.dev
	HYPOTHESIS_PROFILE=ci $(PY) -m pytest -n 2 tests/optax_bilevel/test_rule.py

# The library's tests with the lowest jax and optax that pyproject.toml allows.
lowest: .venv-lowest/.test
	.venv-lowest/bin/python -m pytest -n 2 -W default::DeprecationWarning tests/optax_bilevel

check: $(VENV)/.dev
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m pyright --pythonpath $(PY)
	$(PY) .ci/check_docs_code.py

docs: $(VENV)/.dev
	$(PY) -m sphinx -q -W --keep-going -b html docs docs/_build/html
	$(PY) -m sphinx -q -W -b doctest docs docs/_build/doctest

wheel: $(VENV)/.dev
	rm -rf dist
	$(PY) -m build --wheel
	$(PY) .ci/check_wheel.py

bench: $(VENV)/.dev
	$(PY) -m benchmarks

clean:
	rm -rf $(VENV) .venv-lowest docs/_build dist

$(PY):
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is needed: make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.train: pyproject.toml | $(PY)
	$(PIP) --editable '.[train]'
	touch $@

# libtpu compiles for TPU pods on any x86 Linux. It has a folder of its own, for an environment
# that has it looks for a TPU at every start of JAX.
$(VENV)/.dev: pyproject.toml | $(PY)
	$(PIP) --editable '.[dev]'
	-$(PIP) --target $(VENV)/tpu --upgrade libtpu
	touch $(VENV)/.train $@

LOWEST = $$($(PYTHON) -c 'import tomllib; project = tomllib.load(open("pyproject.toml", "rb"))["project"]; \
	print(*(need.replace(">=", "==") for need in project["dependencies"]))')

.venv-lowest/.test: pyproject.toml
	$(PYTHON) -m venv .venv-lowest
	.venv-lowest/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[test]' \
		flax equinox dm-haiku $(LOWEST)
	touch $@

# Preparing data sets needs TensorFlow; nothing else does.
$(VENV)/.prepare: pyproject.toml | $(PY)
	$(PIP) --editable '.[train,test,prepare]'
	touch $@
