"""Sphinx configuration."""

import os
import pathlib
import sys

os.environ.setdefault("JAX_PLATFORMS", "cpu")
sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

import optax_bilevel

project = "optax_bilevel"
author = "The optax_bilevel authors"
version = release = optax_bilevel.__version__
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.doctest",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
]
myst_enable_extensions = ["amsmath", "dollarmath"]
autodoc_member_order = "bysource"
autodoc_typehints = "none"
napoleon_custom_sections = ["Warns"]
html_theme = "furo"
exclude_patterns = ["_build"]
doctest_global_setup = """
import jax, jax.numpy as jnp, optax, optax_bilevel
"""
