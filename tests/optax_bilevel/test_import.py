"""What importing the library costs, and that it documents itself."""

import ast
import doctest
import graphlib
import importlib
import inspect
import pathlib
import subprocess
import sys

import pytest

import optax_bilevel

ROOT = pathlib.Path(optax_bilevel.__file__).parents[1]
PACKAGE = ROOT / "optax_bilevel"
MODULES = sorted(path.stem for path in PACKAGE.glob("_[a-z]*.py"))
FEEDERS = ["_reweight", "_value_and_grad", "_multi_steps", "_pmean", "_coherent"]


@pytest.fixture(autouse=True)
def strict_promotion():
    """Not here: the examples use optimizers of optax's that are not strict themselves."""


def run(program: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT
    )
    return result.stdout.strip()


def test_pulls_in_nothing_heavy():
    heavy = {"flax", "tensorflow", "tensorflow_datasets", "chex", "models", "train", "orbax"}
    loaded = run("import sys, optax_bilevel; print(*sys.modules)").split()
    assert heavy.isdisjoint(loaded)


def test_costs_little_beyond_optax():
    program = (
        "import sys, time, optax; before = time.process_time(); import optax_bilevel; "
        "print(time.process_time() - before); assert 'jax.extend' not in sys.modules"
    )
    assert min(float(run(program)) for _ in range(3)) < 0.06


def imports_of(file: pathlib.Path) -> list[str]:
    """All modules that a file imports, or imports from."""
    names = []
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names.append(node.module or "")
    return names


def test_packages_import_one_way():
    """train -> models, optax_bilevel; these import none of the others."""
    ours = {"optax_bilevel", "models", "train"}
    found = {
        package: {
            name.partition(".")[0]
            for file in ROOT.glob(f"{package}/**/*.py")
            for name in imports_of(file)
        }
        & ours - {package}
        for package in ours
    }
    assert found == {"optax_bilevel": set(), "models": set(), "train": {"models", "optax_bilevel"}}


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


def imported_by(name):
    """The modules of the library that a module of it imports."""
    tree = ast.parse((PACKAGE / f"{name}.py").read_text())
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == "optax_bilevel":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and "optax_bilevel." in (module := node.module or ""):
            found.add(module.removeprefix("optax_bilevel."))
        elif isinstance(node, ast.Import):
            assert not any(alias.name.startswith("optax_bilevel") for alias in node.names)
    return found


def test_feeders_do_not_import_each_other():
    for feeder in FEEDERS:
        assert imported_by(feeder)
        assert not imported_by(feeder) & set(FEEDERS)


def test_imports_run_one_way():
    order = graphlib.TopologicalSorter({name: imported_by(name) for name in MODULES})
    assert set(order.static_order()) == set(MODULES)  # raises CycleError for a circle


def test_only_jax_optax_and_numpy_are_imported():
    known = {"jax", "optax", "numpy", "optax_bilevel"} | set(sys.stdlib_module_names)
    for path in PACKAGE.glob("*.py"):
        names = imports_of(path)
        assert {name.partition(".")[0] for name in names} <= known, path
        assert not any(name.startswith("jax.extend") for name in names), path
