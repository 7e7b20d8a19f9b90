"""Formulas as SVG in the page: they need no script, no font and no network.

Matplotlib's mathtext sets them; what it does not know is said in words that it knows.
"""

import functools
import html
import re

from docutils import nodes
from matplotlib.font_manager import FontProperties
from matplotlib.path import Path
from matplotlib.textpath import TextPath, text_to_path

_SIZE = 10.0  # units an em
_FONT = FontProperties(size=_SIZE, math_fontfamily="stix")
_WORDS = (
    (r"(\\sum_(?:\{[^}]*\}|\w))", r"\1\\,"),
    (r"\\tfrac", r"\\frac"),
    (r"(\\d?frac)(\d)(\d)", r"\1{\2}{\3}"),
    (r"\\ge\b", r"\\geq"),
    (r"\\arg\\min", r"\\mathrm{arg\\,min}"),
    (r"\\mathbf (\w)", r"\\mathbf{\1}"),
    (r"\\Big([|()])", r"\1"),
    (r"\\!", ""),
    (r"\s+", " "),
)
_COMMANDS = {Path.MOVETO: "M", Path.LINETO: "L", Path.CURVE3: "Q", Path.CURVE4: "C"}


@functools.cache
def svg(formula: str) -> str:
    """A formula of LaTeX as an ``<svg>`` that stands on the line of the text around it."""
    text = formula
    for pattern, words in _WORDS:
        text = re.sub(pattern, words, text)
    text = f"${text.strip()}$"
    width, height, depth = text_to_path.get_text_width_height_descent(text, _FONT, ismath=True)
    steps = []
    for points, code in TextPath((0, 0), text, prop=_FONT).iter_segments(
        curves=True, simplify=False
    ):
        if code == Path.CLOSEPOLY:
            steps.append("Z")
        else:
            signed = points.reshape(-1, 2) * (1, -1)
            steps.append(_COMMANDS[code] + " ".join(f"{x:.2f}" for x in signed.ravel()))
    em = 1.05 / _SIZE
    label = html.escape(" ".join(formula.split()), quote=True)
    return (
        f'<svg class="formula" role="img" aria-label="{label}" '
        f'viewBox="0 {depth - height:.2f} {width:.2f} {height:.2f}" '
        f'style="width:{width * em:.3f}em;height:{height * em:.3f}em;'
        f'vertical-align:{-depth * em:.3f}em"><path d="{"".join(steps)}"/></svg>'
    )


def _inline(translator, node):
    translator.body.append(svg(node.astext()))
    raise nodes.SkipNode


def _block(translator, node):
    formula = node.astext().replace("\\frac", "\\dfrac")
    parts = " ".join(svg(part) for part in re.split(r"\\q?quad", formula))  # lines break there
    translator.body.append(f'<div class="formula">{parts}</div>')
    raise nodes.SkipNode


def setup(app):
    """Makes it Sphinx's renderer of formulas, by the name of "svg"."""
    app.add_html_math_renderer("svg", (_inline, None), (_block, None))
    return {"parallel_read_safe": True}
