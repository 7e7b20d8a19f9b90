"""Draws images/weights.svg, the picture of "How it works": ``python docs/draw_weights.py``."""

import pathlib
from typing import Any

import jax.numpy as jnp
import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

import optax_bilevel

BLUE, ORANGE, GREEN, GREY, DARK = "#0072b2", "#d55e00", "#009e73", "#888888", "#222222"

# The validation gradient, then five training gradients in the plane; and where their labels go.
GRADIENTS = np.array(
    [[1.25, 0.55], [1.05, 0.85], [0.95, -0.05], [-0.38, 0.92], [-0.95, 0.25], [-0.35, -1.0]]
)
LABELS = [(1.3, 0.46), (0.62, 0.98), (0.98, -0.15), (-0.3, 1.02), (-1.25, 0.36), (-0.3, -1.1)]
TERM_LABELS = [(0.1, 0.21), (0.33, 0.24), None, (0.65, 0.03), (0.86, 0.17)]


def arrow(axes: Any, start: Any, vector: Any, color: str, width: float = 0.012, **options: Any):
    """Draws an arrow from `start` along `vector`."""
    axes.quiver(
        *start, *vector, color=color, width=width, angles="xy", scale_units="xy", scale=1, **options
    )


def main() -> None:
    """Weighs the gradients by eq. (10); draws them, and how the update is made of them."""
    matplotlib.rcParams["svg.hashsalt"] = "weights"  # the same file every time
    omega = np.asarray(optax_bilevel.bilevel_weights(jnp.asarray(GRADIENTS)))[1:]
    validation, training = GRADIENTS[0], GRADIENTS[1:]
    terms = omega[:, None] * training
    colors = [BLUE if weight > 0 else ORANGE for weight in omega]

    figure = Figure(figsize=(9.6, 4), layout=ConstrainedLayoutEngine(h_pad=0.12))  # room for a hat
    left, right = figure.subplots(1, 2)
    left.set(xlim=(-1.5, 1.75), ylim=(-1.3, 1.25))
    left.set_title("Gradients and their weights $\\hat\\omega_i$")
    right.set(xlim=(-0.25, 1.25), ylim=(-0.35, 0.75))
    right.set_title("Their terms $\\hat\\omega_i\\,g_i$ add up to the update")
    across = np.array([-validation[1], validation[0]])
    for axes in (left, right):
        axes.set(aspect="equal")
        axes.axis("off")
        axes.plot(*np.array([-2 * across, 2 * across]).T, color="#cccccc", lw=1, zorder=0)

    arrow(left, (0, 0), validation, DARK, 0.016)
    left.text(*LABELS[0], "$g_v$", fontsize=13, color=DARK)
    for i, (gradient, weight, color) in enumerate(zip(training, omega, colors, strict=True), 1):
        arrow(left, (0, 0), gradient, color)
        label = f"$g_{i}$: {weight:+.2f}".replace("-", "−")
        left.text(*LABELS[i], label, color=color, fontsize=11)

    right.plot(*np.array([np.zeros(2), 2 * validation]).T, color=DARK, lw=1, ls=":", zorder=0)
    right.text(1.02, 0.56, "to $g_v$", fontsize=11, color=DARK)
    arrow(right, (0, 0), terms.sum(0), GREEN, 0.016, zorder=1)
    right.text(0.24, -0.02, "reweighted", color=GREEN, fontsize=11)
    arrow(right, (0, 0), training.mean(0), GREY, 0.016, zorder=1)
    right.text(0.0, 0.2, "uniform", color=GREY, fontsize=11, ha="right")
    starts = np.cumsum(terms, axis=0) - terms
    for i, (start, term, color) in enumerate(zip(starts, terms, colors, strict=True)):
        if (place := TERM_LABELS[i]) is not None:  # the third is too short to see
            arrow(right, start, term, color, 0.008, zorder=2)
            right.text(*place, f"$\\hat\\omega_{i + 1}g_{i + 1}$", color=color, fontsize=11)

    folder = pathlib.Path(__file__).parent / "images"
    figure.savefig(folder / "weights.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
