"""Pictures of runs."""

import html
import io
import pathlib
import re
from collections.abc import Callable, Collection
from typing import Any

import matplotlib
import numpy as np

from train.sums import OMEGA_BINS, OMEGA_RANGE, SHARE_BINS

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.figure import Figure

Runs = dict[str, list[list[dict[str, Any]]]]  # method -> seeds -> lines of metrics

# The colour of a method is the same in every picture of the project, and has contrast enough on
# white and on the dark pages alike.
STYLES = {
    "sgd": ("SGD, whole batch", "#767676", "--"),
    "sgd_random": ("SGD, random batches", "#8a6d3b", ":"),
    "uniform": ("uniform control", "#d55e00", "-"),
    "bilevel": ("bilevel, eq. (10)", "#0072b2", "-"),
    "bilevel_exact": ("bilevel, eq. (8)", "#009e73", "-"),
    "coherent": ("coherent steps", "#d0206e", "-"),
    "label_smoothing": ("label smoothing", "#b8860b", ":"),
    "dropout": ("dropout, keep 0.3", "#5f8a8b", ":"),
    "mixup": ("mixup", "#a678de", "--"),
    "bootstrapping": ("bootstrapping", "#5f7fbf", ":"),
    "noise_layer": ("noise layer", "#17a2b8", ":"),
    "azadi": ("AIR regularizer", "#7a8f2a", ":"),
    "mentornet": ("MentorNet", "#c0706d", ":"),
    "gce": ("generalized cross-entropy", "#4f9a3a", "-."),
    "elr": ("ELR", "#b07d00", "-."),
    "coherent_mixup": ("coherent + mixup", "#e0559a", "-."),
    "coherent_elr": ("coherent + ELR", "#f0707f", "-."),
    "bilevel_mixup": ("bilevel + mixup", "#7b52cf", "-"),
    "a) no L1 norm": ("a) no L1 norm", "#a0522d", "-"),
    "b) ω per layer": ("b) ω per layer", "#3f7f7f", "-"),
    "c) random sampling": ("c) random sampling", "#8b5f9e", "-"),
    "d) independent dropout": ("d) independent dropout", "#c46ab0", "-"),
}
_MANY = 6  # lines that can be told apart
_MAIN = ("sgd", "sgd_random", "bilevel", "bilevel_exact", "bilevel_mixup", "coherent")
_OTHER = "#b0b0b0"
_AGAIN = ("-", "--", ":")  # the lines of a method's second curve and of later ones, from "--" on


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


def is_main(series: str, among: Collection[str]) -> bool:
    """Whether a series keeps its colour beside so many others; the rest is drawn in one grey."""
    return len(among) <= _MANY or series.partition(", ")[0] in _MAIN


def draw_demo(runs: Runs, folder: pathlib.Path) -> list[pathlib.Path]:
    """Test accuracy, memorising, and the weights of mini-batches, a picture each.

    Args:
        runs: lines of metrics of every seed of every method.
        folder: where to write ``demo.png``, ``demo_memorised.png`` and ``demo_weights.png``; those
            for which the runs have nothing are left out.

    Returns:
        The files.
    """
    pictures: dict[str, Callable[[Any], None]] = {}
    if all("test" in seeds[0][0] for seeds in runs.values()):
        pictures["demo"] = lambda axes: _curves(axes, runs, "test", "accuracy on clean test images")
    pictures["demo_memorised"] = lambda axes: _curves(
        axes, runs, "train_given", "training labels reproduced, wrong ones included"
    )
    for method in ("bilevel_exact", "bilevel"):
        if method in runs and "omega_histogram" in runs[method][0][0]:
            pictures["demo_weights"] = lambda axes, of=method: _histogram(axes, of, runs[of])
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"{name}.png" for name in pictures]
    for file, draw in zip(files, pictures.values(), strict=True):
        with plt.rc_context({"font.size": 11, "axes.titlesize": 11, "axes.titlelocation": "left"}):
            figure, axes = plt.subplots(figsize=(5.4, 4.6), layout="constrained")
            draw(axes)
            figure.savefig(file, dpi=160)
            plt.close(figure)
    return files


def _curves(axes: Any, runs: Runs, name: str, title: str) -> None:
    for method, seeds in runs.items():
        _curve(axes, method, seeds, name, width=2.4 if method == "coherent" else 1.6)
    axes.set(title=f"{title}, %", xlabel="epoch")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.figure.legend(loc="outside lower center", ncols=2, frameon=False, handlelength=2.2)


def _curve(
    axes: Any,
    method: str,
    seeds: list[list[dict[str, Any]]],
    name: str,
    color: str | None = None,
    *,
    line: str | None = None,
    width: float = 1.5,
    main: bool = True,
) -> None:
    label, own_color, own_line = style(method)
    color, line = color or own_color, line or own_line
    epochs = [entry["epoch"] for entry in seeds[0]]
    values = np.array([[entry[name] for entry in lines] for lines in seeds])
    mean = values.mean(0)
    if not main:
        axes.plot(epochs, mean, color=_OTHER, lw=1, zorder=1)
        return
    (drawn,) = axes.plot(epochs, mean, line, color=color, lw=width, label=label)
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
        (counts[:half], "most labels right", "#35978f"),
        (counts[half + 1 :], "most labels wrong", "#bf812d"),
    ):
        total = rows.sum()
        if total:
            share = rows.sum(0) / total
            mean = float(share @ (edges[:-1] + edges[1:]) / 2)
            axes.stairs(
                share, edges, fill=True, alpha=0.45, color=color, label=f"{label}: mean {mean:.2f}"
            )
    axes.axvline(1, color="black", lw=0.8, ls=":")
    axes.text(1.1, 0.02, "uniform weight", transform=axes.get_xaxis_transform(), fontsize=9)
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
        figure, (test, train) = plt.subplots(2, 1, figsize=(5.2, 7), sharex=True)
        for series, rows in sorted(curves.items(), key=lambda item: is_main(item[0], curves)):
            label, color, line = style(series)
            main = is_main(series, curves)
            if not main:
                label, color, line = "others: see the table", _OTHER, "-"
            places = [row["x"] for row in rows]
            for axes, name in ((test, "test_last"), (train, "train_noisy")):
                means = [row[f"{name}_mean"] for row in rows]
                (drawn,) = axes.plot(
                    places, means, line, color=color, marker="o" if main else None, ms=4,
                    lw=1.8 if main else 1, label=label,
                )  # fmt: skip
                color = drawn.get_color()
                if not main:
                    continue
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
        curves: series -> seeds -> lines of metrics; a series may have none. Without any there is
            no panel of curves.
        same_data: whether the paper's numbers are of the same data and networks; if not, they
            have an axis of their own beside ours.
    """
    printed = {place: row["paper"]["test"] for place, row in enumerate(rows.values())
               if "test" in row["paper"]}  # fmt: skip
    beside = bool(printed) and not same_data
    with _neutral():
        height = 1.3 + 0.3 * len(rows)
        mosaic: list[Any] = [["ours", "paper"] if beside else ["ours"]]
        heights = [height]
        if any(curves.values()):
            mosaic, heights = [*mosaic, ["test"] * len(mosaic[0])], [height, 2.8]
        figure = plt.figure(figsize=(5.2, sum(heights) + 0.6))
        axes = figure.subplot_mosaic(
            mosaic, height_ratios=heights, width_ratios=(3, 2) if beside else None
        )
        ours, test = axes["ours"], axes.get("test")
        drawn: list[str] = []
        for place, (series, row) in enumerate(rows.items()):
            color = style(series)[1] or f"C{place}"
            ours.errorbar(
                row["test_last_mean"], place, xerr=row["test_last_std"], fmt="o", ms=5, color=color
            )
            ours.plot(row["test_best_mean"], place, "o", ms=5, mfc="none", color=color)
            if "stopped_mean" in row:
                ours.plot(row["stopped_mean"], place, "s", ms=5, mfc="none", color=color)
            if test is not None and curves[series]:
                main = is_main(series, rows)
                line = style(series)[2] if color not in drawn else _AGAIN[drawn.count(color) % 3]
                drawn.append(color)
                _curve(test, series, curves[series], "test", color, line=line, main=main)
        ours.set_yticks(range(len(rows)), [style(series)[0] for series in rows])
        marks = "test, %: last ●, best epoch ○"
        if any("stopped_mean" in row for row in rows.values()):
            marks += ",\nstopped by held-out labels □"
        if printed:
            paper = axes["paper"] if beside else ours
            paper.plot(list(printed.values()), list(printed), "D", ms=5, mfc="none", color=INK)
        if beside:
            axes["paper"].set_yticks(range(len(rows)), [""] * len(rows))
            axes["paper"].set_title("the paper's")
            axes["paper"].margins(x=0.2)  # or the last tick's label is cut
        elif printed:
            marks += ", paper ◇"
        for dots in (ours, axes.get("paper")):
            if dots is not None:
                dots.set_ylim(len(rows) - 0.5, -0.5)
        ours.set_title(marks)
        if test is not None:
            more = "" if all(is_main(series, rows) for series in rows) else ", others grey"
            test.set(title=f"test by epoch, %; colours as above{more}", xlabel="epoch")
        for each in axes.values():
            each.grid(alpha=0.25)
        return _finish(figure, title, None)


def _finish(figure: Figure, title: str, labelled: Any) -> Figure:
    figure.suptitle(title, fontsize=11, fontweight="bold")
    if labelled is not None:
        handles, labels = labelled.get_legend_handles_labels()
        unlike = {label: handle for handle, label in zip(handles, labels, strict=True)}
        labels, handles = list(unlike), list(unlike.values())
        columns = 2 if len(labels) > 1 and max(map(len, labels)) < 26 else 1
        figure.legend(
            handles, labels, loc="outside lower center", ncols=columns, frameon=False,
            handlelength=3,
        )  # fmt: skip
    return figure


def _neutral() -> Any:
    """Small type and one colour for all that is not data."""
    return plt.rc_context(
        {
            "font.size": 10,
            "axes.titlesize": 10,
            "axes.titlelocation": "left",
            "axes.spines.top": False,
            "axes.spines.right": False,
            "figure.constrained_layout.use": True,
            "legend.fontsize": 9.5,
            **dict.fromkeys(
                ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"),
                INK,
            ),
        }
    )


def save(figure: Figure, file: pathlib.Path) -> None:
    """Writes a figure, in the format that the suffix names, and closes nothing."""
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=130)


def inline_svg(figure: Figure, salt: str, title: str, description: str) -> str:
    """A figure as an ``<svg>`` element that takes the page's text colour and has no background.

    Args:
        figure: the figure.
        salt: keeps the element's ids apart from those of others on the page.
        title: what the figure is, for those who do not see it.
        description: what it shows, likewise.
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
    head, inside = text.split(">", 1)
    words = (
        f'<title id="{salt}-title">{html.escape(title)}</title>'
        f'<desc id="{salt}-desc">{html.escape(description)}</desc>'
    )
    head += f' role="img" aria-labelledby="{salt}-title" aria-describedby="{salt}-desc"'
    return f"{head}>{words}{inside}".replace(INK, "currentColor")
