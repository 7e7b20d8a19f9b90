"""Pictures of runs."""

import pathlib
from typing import Any

import matplotlib
import numpy as np

from train.program import OMEGA_BINS, OMEGA_RANGE, SHARE_BINS

matplotlib.use("Agg")
import matplotlib.pyplot as plt

Runs = dict[str, list[list[dict[str, Any]]]]  # method -> seeds -> lines of metrics

STYLES = {
    "sgd": ("SGD, whole batch", "#888888", "--"),
    "uniform": ("uniform control", "#d55e00", "-"),
    "bilevel": ("bilevel, eq. (10)", "#0072b2", "-"),
    "bilevel_exact": ("bilevel, eq. (8)", "#009e73", "-"),
    "past": ("bilevel, validated by the past", "#cc79a7", "-"),
}


def draw_demo(runs: Runs, file: pathlib.Path) -> None:
    """Test accuracy, memorising, and the weights of clean-heavy and noisy-heavy mini-batches.

    Args:
        runs: lines of metrics of every seed of every method.
        file: the PNG to write.
    """
    figure, (test, memorised, omega) = plt.subplots(1, 3, figsize=(15, 4.4), layout="constrained")
    for method, seeds in runs.items():
        _curve(test, method, seeds, "test")
        _curve(memorised, method, seeds, "train_given")
    test.set(title="Accuracy on clean test images", xlabel="epoch", ylabel="%")
    memorised.set(
        title="Training labels reproduced, wrong ones included", xlabel="epoch", ylabel="%"
    )
    for axes in (test, memorised):
        axes.grid(alpha=0.3)
    test.legend(loc="lower left", frameon=False)
    weighed = [method for method in ("bilevel", "bilevel_exact") if method in runs]
    if weighed:
        _histogram(omega, weighed[0], runs[weighed[0]])
    else:
        omega.set_axis_off()
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=110)
    plt.close(figure)


def _curve(axes: Any, method: str, seeds: list[list[dict[str, Any]]], name: str) -> None:
    label, color, line = STYLES.get(method, (method, None, "-"))
    epochs = [entry["epoch"] for entry in seeds[0]]
    values = np.array([[entry[name] for entry in lines] for lines in seeds])
    mean = values.mean(0)
    (drawn,) = axes.plot(epochs, mean, line, color=color, label=f"{label}: {mean[-1]:.1f}")
    axes.fill_between(
        epochs, values.min(0), values.max(0), color=drawn.get_color(), alpha=0.15, lw=0
    )


def _histogram(axes: Any, method: str, seeds: list[list[dict[str, Any]]]) -> None:
    counts = np.sum(
        [np.array(line["omega_histogram"]) for lines in seeds for line in lines], axis=0
    )
    half = SHARE_BINS // 2
    edges = np.linspace(-OMEGA_RANGE, OMEGA_RANGE, OMEGA_BINS + 1)
    for rows, label, color in (
        (counts[:half], "most labels right", "#0072b2"),
        (counts[half + 1 :], "most labels wrong", "#d55e00"),
    ):
        total = rows.sum()
        if total:
            share = rows.sum(0) / total
            mean = float(share @ (edges[:-1] + edges[1:]) / 2)
            axes.stairs(
                share, edges, fill=True, alpha=0.45, color=color, label=f"{label}: mean {mean:.2f}"
            )
    axes.axvline(1, color="black", lw=0.8, ls=":")
    axes.text(1.1, 0.02, "uniform weight", transform=axes.get_xaxis_transform(), fontsize=8)
    low, high = axes.get_ylim()
    axes.set_yscale("log")
    axes.set_ylim(max(low, 1e-5), 20 * high)  # room for the legend
    axes.set(
        title=f"Weights of mini-batches, {STYLES[method][0]}",
        xlabel="ω̂ · (k-1); the outer bars are all beyond ±5",
        ylabel="share of mini-batches",
    )
    axes.legend(frameon=False, loc="upper left")
