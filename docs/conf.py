"""Sphinx configuration."""

import doctest
import os
import pathlib
import re
import sys

# Before jax starts: the pages' code runs on eight fake CPU devices.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
DOCS = pathlib.Path(__file__).parent
sys.path[:0] = [str(DOCS.parent), str(DOCS)]

from docutils import nodes

import optax_bilevel

project = "optax_bilevel"
author = "The optax_bilevel authors"
project_copyright = f"2026, {author}"
version = release = optax_bilevel.__version__
extensions = [
    "formulas",
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.doctest",
    "sphinx.ext.napoleon",
]
myst_enable_extensions = ["amsmath", "dollarmath"]
myst_heading_anchors = 3
autodoc_member_order = "bysource"
autodoc_typehints = "none"
default_role = "py:obj"  # `name` in a docstring
napoleon_attr_annotations = False
html_theme = "furo"
html_theme_options = {"dark_css_variables": {"figure-filter": "invert(.92) hue-rotate(180deg)"}}
pygments_style, pygments_dark_style = "default", "monokai"  # removed red, added green
html_static_path = ["_static"]
html_css_files = ["pages.css"]
html_math_renderer = "svg"
html_title = f"optax_bilevel {version}"
exclude_patterns = ["_build", "results"]
# Sphinx's own flags leave out what an error says.
doctest_default_flags = doctest.ELLIPSIS | doctest.DONT_ACCEPT_TRUE_FOR_1


def _unbroken(_, doctree):
    """Keeps a mean and its deviation on one line."""
    for text in doctree.findall(nodes.Text):
        if not isinstance(text.parent, nodes.FixedTextElement | nodes.literal | nodes.math):
            whole = re.sub(r"(?<=\d) ([±/]) (?=\d)", "\xa0\\1\xa0", text)
            text.parent.replace(text, nodes.Text(whole))


def _anchors(app, doctree):
    """Tells MyST what links may lead to in a page that is not its own, api.rst say."""
    elements = doctree.findall(nodes.Element)
    ids = {name: (0, name, "") for element in elements for name in element["ids"]}
    app.env.metadata[app.env.docname].setdefault("myst_slugs", ids)


def _signature(_app, _what, _name, _object, _options, signature, returns):
    """Defaults that have no literal, <function <lambda>> say, become dots."""
    return signature and re.sub(r"=<.*?>(?=, |\)$)", "=...", signature), returns


def setup(app):
    app.connect("autodoc-process-signature", _signature)
    app.connect("doctree-read", _unbroken)
    app.connect("doctree-read", _anchors)
