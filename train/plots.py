"""Pictures of runs."""

import io
import pathlib
import re
from typing import Any

import matplotlib
import numpy as np

from train.sums import OMEGA_BINS, OMEGA_RANGE, SHARE_BINS

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.figure import Figure

Runs = dict[str, list[list[dict[str, Any]]]]  # method -> seeds -> lines of metrics

STYLES = {
    "sgd": ("SGD, whole batch", "#888888", "--"),
    "sgd_random": ("SGD, random batches", "#333333", ":"),
    "uniform": ("uniform control", "#d55e00", "-"),
    "bilevel": ("bilevel, eq. (10)", "#0072b2", "-"),
    "bilevel_exact": ("bilevel, eq. (8)", "#009e73", "-"),
    "coherent": ("coherent steps", "#56b4e9", "-"),
    "label_smoothing": ("label smoothing", "#b8860b", ":"),
    "dropout": ("dropout, keep 0.3", "#8c6d5a", ":"),
    "mixup": ("mixup", "#cc79a7", "--"),
    "bootstrapping": ("bootstrapping", "#9467bd", ":"),
    "noise_layer": ("noise layer", "#17a2b8", ":"),
    "azadi": ("AIR regularizer", "#7a8f2a", ":"),
    "mentornet": ("MentorNet", "#c0504d", ":"),
    "gce": ("generalized cross-entropy", "#5d7f1f", "-."),
    "elr": ("ELR", "#b03060", "-."),
    "coherent_mixup": ("coherent + mixup", "#1f78b4", "-."),
    "coherent_elr": ("coherent + ELR", "#1b9e9e", "-."),
    "bilevel_mixup": ("bilevel + mixup", "#7b3294", "-"),
}


def style(series: str) -> tuple[str, str | None, str]:
    """Label, colour and line of "METHOD" or "METHOD, LABELS"; of anything else its own name."""
    method, _, labels = series.partition(", ")
    if method not in STYLES:
        return series, None, "-"
    label, color, line = STYLES[method]
    if labels:
        label = f"{label}; {labels}"
        line = "--" if labels.startswith("clean") else "-"
    return label, color, line


def draw_demo(runs: Runs, file: pathlib.Path) -> None:
    """Test accuracy, memorising, and the weights of clean-heavy and noisy-heavy mini-batches.

    Args:
        runs: lines of metrics of every seed of every method.
        file: the PNG to write.
    """
    figure, (test, memorised, omega) = plt.subplots(1, 3, figsize=(15, 4.4), layout="constrained")
    for method, seeds in runs.items():
        if "test" in seeds[0][0]:
            _curve(test, method, seeds, "test")
        _curve(memorised, method, seeds, "train_given")
    test.set(title="Accuracy on clean test images", xlabel="epoch", ylabel="%")
    memorised.set(
        title="Training labels reproduced, wrong ones included", xlabel="epoch", ylabel="%"
    )
    for axes in (test, memorised):
        axes.grid(alpha=0.3)
    if test.has_data():
        test.legend(loc="lower left", frameon=False)
    weighed = [
        method
        for method in ("bilevel", "bilevel_exact")
        if method in runs and "omega_histogram" in runs[method][0][0]
    ]
    if weighed:
        _histogram(omega, weighed[0], runs[weighed[0]])
    else:
        omega.set_axis_off()
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=110)
    plt.close(figure)


def _curve(
    axes: Any,
    method: str,
    seeds: list[list[dict[str, Any]]],
    name: str,
    otherwise: str | None = None,
) -> None:
    label, color, line = style(method)
    color = color or otherwise
    epochs = [entry["epoch"] for entry in seeds[0]]
    values = np.array([[entry[name] for entry in lines] for lines in seeds])
    mean = values.mean(0)
    (drawn,) = axes.plot(epochs, mean, line, color=color, label=f"{label}: {mean[-1]:.1f}")
    axes.fill_between(
        epochs, values.min(0), values.max(0), color=drawn.get_color(), alpha=0.15, lw=0
    )
    axes.locator_params(axis="x", integer=True)  # there is no epoch 2.5


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
        title=f"Weights of mini-batches, {style(method)[0]}",
        xlabel="ω̂ · (k-1); the outer bars are all beyond ±5",
        ylabel="share of mini-batches",
    )
    axes.legend(frameon=False, loc="upper left")


# Ink that is neither data nor paper: pages replace it by the colour of their text.
INK = "#3a3a3b"


def draw_points(title: str, x: str, log: bool, curves: dict[str, list[Any]]) -> Figure:
    """A panel of a figure: test accuracy and labels reproduced along x.

    Args:
        title: of the panel.
        x: what the horizontal axis shows.
        log: whether it is logarithmic.
        curves: series -> rows of a report, with an `x` each.
    """
    with _neutral():
        figure, (test, train) = plt.subplots(2, 1, figsize=(5.2, 6.4), sharex=True)
        for series, rows in curves.items():
            label, color, line = style(series)
            places = [row["x"] for row in rows]
            for axes, name in ((test, "test_last"), (train, "train_noisy")):
                means = [row[f"{name}_mean"] for row in rows]
                (drawn,) = axes.plot(
                    places, means, line, color=color, marker="o", ms=3.5, lw=1.6, label=label
                )
                color = drawn.get_color()
                axes.errorbar(
                    places, means, [row[f"{name}_std"] for row in rows], fmt="none", color=color,
                    lw=0.9, alpha=0.6,
                )  # fmt: skip
        test.set(title="test, last epoch, %")
        train.set(title="given training labels reproduced, %", xlabel=x)
        for axes in (test, train):
            axes.grid(alpha=0.25)
            if log:
                axes.set_xscale("log")
                ticks = sorted({row["x"] for rows in curves.values() for row in rows})
                axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
                axes.minorticks_off()
        return _finish(figure, title, test)


def draw_rows(title: str, rows: dict[str, Any], curves: Runs, same_data: bool) -> Figure:
    """A panel of a table: last and best test accuracy, the paper's, and the curves behind them.

    Args:
        title: of the panel.
        rows: series -> row of a report.
        curves: series -> seeds -> lines of metrics; a series may have none.
        same_data: whether the paper's numbers are of the same data and networks; if not, they
            have an axis of their own beside ours.
    """
    printed = {place: row["paper"]["test"] for place, row in enumerate(rows.values())
               if "test" in row["paper"]}  # fmt: skip
    beside = bool(printed) and not same_data
    with _neutral():
        height = 1.3 + 0.28 * len(rows)
        figure = plt.figure(figsize=(5.2, height + 3.2))
        axes = figure.subplot_mosaic(
            [["ours", "paper"], ["test", "test"]] if beside else [["ours"], ["test"]],
            height_ratios=(height, 2.6),
            width_ratios=(3, 2) if beside else None,
        )
        ours, test = axes["ours"], axes["test"]
        for place, (series, row) in enumerate(rows.items()):
            _, color, _ = style(series)
            color = color or f"C{place}"
            ours.errorbar(
                row["test_last_mean"], place, xerr=row["test_last_std"], fmt="o", ms=5, color=color
            )
            ours.plot(row["test_best_mean"], place, "o", ms=5, mfc="none", color=color)
            if "stopped_mean" in row:
                ours.plot(row["stopped_mean"], place, "s", ms=5, mfc="none", color=color)
            if curves[series]:
                _curve(test, series, curves[series], "test", color)
        ours.set_yticks(range(len(rows)), [style(series)[0] for series in rows])
        marks = "test, %: last ●, best epoch ○"
        if any("stopped_mean" in row for row in rows.values()):
            marks += ", stopped by held-out labels □"
        if printed:
            paper = axes["paper"] if beside else ours
            paper.plot(list(printed.values()), list(printed), "D", ms=5, mfc="none", color=INK)
        if beside:
            axes["paper"].set_yticks(range(len(rows)), [""] * len(rows))
            axes["paper"].set_title("the paper's")
        elif printed:
            marks += ", paper ◇"
        for dots in (ours, axes.get("paper")):
            if dots is not None:
                dots.set_ylim(len(rows) - 0.5, -0.5)
        ours.set_title(marks)
        test.set(title="test by epoch, %; colours as above", xlabel="epoch")
        for each in axes.values():
            each.grid(alpha=0.25)
        return _finish(figure, title, None)


def _finish(figure: Figure, title: str, labelled: Any) -> Figure:
    figure.suptitle(title, fontsize=10, fontweight="bold")
    if labelled is not None:
        handles, labels = labelled.get_legend_handles_labels()
        figure.legend(
            handles, labels, loc="outside lower center", ncols=2 if len(labels) > 1 else 1,
            frameon=False, handlelength=3,
        )  # fmt: skip
    return figure


def _neutral() -> Any:
    """Small type and one colour for all that is not data."""
    return plt.rc_context(
        {
            "font.size": 8.5,
            "axes.titlesize": 8.5,
            "axes.titlelocation": "left",
            "axes.spines.top": False,
            "axes.spines.right": False,
            "figure.constrained_layout.use": True,
            "legend.fontsize": 8,
            **dict.fromkeys(
                ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"),
                INK,
            ),
        }
    )


def save(figure: Figure, file: pathlib.Path) -> None:
    """Writes a figure, in the format that the suffix names, and closes nothing."""
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=110)


def inline_svg(figure: Figure, salt: str) -> str:
    """A figure as an ``<svg>`` element that takes the page's text colour and has no background.

    Args:
        figure: the figure.
        salt: keeps the element's ids apart from those of others on the page.
    """
    buffer = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with plt.rc_context({"svg.hashsalt": salt, "svg.fonttype": "none"}):
        figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(id="|url\(#|href="#)', rf"\g<1>{salt}-", text)
    return text.replace(INK, "currentColor")
