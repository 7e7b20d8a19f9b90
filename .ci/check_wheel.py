"""The wheel holds the library alone, and works where nothing but its dependencies is installed."""

import pathlib
import subprocess
import tempfile
import venv
import zipfile

(wheel,) = pathlib.Path("dist").glob("*.whl")
names = zipfile.ZipFile(wheel).namelist()
folders = {name.split("/")[0] for name in names}
assert folders == {"optax_bilevel", next(f for f in folders if f.endswith(".dist-info"))}, folders
assert "optax_bilevel/py.typed" in names, names
assert any(name.endswith("licenses/LICENSE") for name in names), names

PROGRAM = """
import sys, jax.numpy as jnp, optax_bilevel
print(optax_bilevel.__file__, optax_bilevel.bilevel_weights(jnp.eye(3) + 1))
assert not {"flax", "tensorflow", "chex"} & set(sys.modules)
"""
with tempfile.TemporaryDirectory() as folder:
    venv.create(folder, with_pip=True)
    python = pathlib.Path(folder, "bin", "python")
    subprocess.run([python, "-m", "pip", "install", "--quiet", wheel.resolve()], check=True)
    subprocess.run([python, "-c", PROGRAM], check=True, cwd=folder)
print(f"{wheel.name}: {len(names)} files")
