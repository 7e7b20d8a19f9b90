"""What importing the library costs, and that it documents itself."""

import doctest
import importlib
import inspect
import pathlib
import subprocess
import sys

import pytest

import optax_bilevel

ROOT = pathlib.Path(optax_bilevel.__file__).parents[1]
MODULES = ["_rule", "_inner_products", "_reweight", "_streaming", "_multi_steps", "_collective"]


def run(program: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT
    )
    return result.stdout.strip()


def test_pulls_in_nothing_heavy():
    heavy = {"flax", "tensorflow", "tensorflow_datasets", "chex", "models", "train", "orbax"}
    loaded = run("import sys, optax_bilevel; print(*sys.modules)").split()
    assert heavy.isdisjoint(loaded)


def test_costs_under_a_tenth_of_a_second_beyond_optax():
    program = (
        "import time, optax; before = time.process_time(); import optax_bilevel; "
        "print(time.process_time() - before)"
    )
    assert min(float(run(program)) for _ in range(3)) < 0.1


@pytest.mark.parametrize("name", optax_bilevel.__all__)
def test_public_names_are_documented(name):
    assert len(inspect.getdoc(getattr(optax_bilevel, name)) or "") > 100


def test_all_is_the_public_surface():
    exported = {
        name
        for name, value in vars(optax_bilevel).items()
        if not name.startswith("_") and not inspect.ismodule(value)
    }
    assert exported == set(optax_bilevel.__all__)


@pytest.mark.parametrize("name", MODULES)
def test_doctests(name):
    module = importlib.import_module(f"optax_bilevel.{name}")
    assert doctest.testmod(module).failed == 0


def test_feeders_do_not_import_each_other():
    feeders = {"_reweight", "_streaming", "_multi_steps", "_collective"}
    for feeder in feeders:
        source = (ROOT / "optax_bilevel" / f"{feeder}.py").read_text()
        for other in feeders - {feeder}:
            assert f"optax_bilevel.{other}" not in source
            assert f"import {other}" not in source
