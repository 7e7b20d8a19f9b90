"""The figures of a summary as Markdown: on the console, and on the page of the documentation.

``python -m benchmarks.tables docs/results/bench.json > docs/results/bench.md`` makes the page.
"""

import json
import pathlib
import sys
from collections.abc import Callable, Iterable
from typing import Any

Summary = dict[str, Any]


def _table(columns: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A table; nothing where there are no rows."""
    columns, rows = list(columns), list(rows)
    if not rows:
        return ""
    rule = ["---", *["---:"] * (len(columns) - 1)]
    lines = ["| " + " | ".join(row) + " |" for row in (columns, rule, *rows)]
    return "\n".join(lines) + "\n"


def steps(summary: Summary) -> str:
    """Every way to take a step, by case."""
    text = ""
    for case, timings in summary.get("steps", {}).items():
        plain, accumulate = (timings[name]["seconds"] for name in ("plain", "accumulate"))
        text += f"\n`{case}`, a training step:\n\n" + _table(
            ("", "ms", "of plain", "of accumulate", "compile, s", "temporary, MB"),
            (
                (
                    name.replace("_", " "),
                    f"{1e3 * t['seconds']:.1f}",
                    f"{t['seconds'] / plain:.2f}",
                    f"{t['seconds'] / accumulate:.2f}",
                    f"{t['compile_seconds']:.1f}",
                    f"{t['temp_bytes'] / 1e6:.1f}",
                )
                for name, t in timings.items()
            ),
        )
    return text


def weighting(summary: Summary) -> str:
    """The weighting alone, and by hand."""
    return _table(
        ("stack [8, 10 million]", "`bilevel_reweight`, ms", "by hand in `jax.numpy`, ms", "ratio"),
        (
            (
                dtype,
                f"{1e3 * figures['weighting']:.1f}",
                f"{1e3 * figures['by_hand']:.1f}",
                f"{figures['ratio']:.2f}",
            )
            for dtype, figures in summary.get("weighting", {}).items()
        ),
    )


def memory(summary: Summary) -> str:
    """Temporary memory by k."""
    of = summary.get("memory", {})
    return _table(
        (
            "k mini-batches of 8, MLP 3×512",
            "streaming by 1, temporary, MB",
            "streaming, temporary, MB",
        ),
        (
            (k, *(f"{sizes[k] / 1e6:.2f}" for sizes in of.values()))
            for k in of.get("streaming_by_1", {})
        ),
    )


def compile_time(summary: Summary) -> str:
    """Compile time by number of leaves."""
    of = summary.get("compile_vs_by_hand", {})
    return _table(
        ("leaves of a stack", "compile time of `bilevel_reweight`, of the same rule by hand"),
        ((f"{int(leaves):,}", f"{ratio:.2f}") for leaves, ratio in of.items()),
    )


def alignment(summary: Summary) -> str:
    """Alignments of all examples."""
    rows = []
    for case, timings in summary.get("example_alignment", {}).items():
        base = timings["forward"]["seconds"]
        names = ("example_alignment", "vmap_grad")
        rows.append(
            (
                f"`{case}`",
                *(f"{timings[name]['seconds'] / base:.2f}" for name in names),
                *(f"{timings[name]['temp_bytes'] / 1e6:.1f}" for name in names),
            )
        )
    return _table(
        (
            "alignments of all examples",
            "forward passes",
            "by vmap(grad)",
            "temporary, MB",
            "by vmap(grad)",
        ),
        rows,
    )


def loop(summary: Summary) -> str:
    """What the training loop adds to the compiled step."""
    figures = summary.get("loop")
    if figures is None:
        return ""
    return _table(
        ("the demo's training loop", "per step"),
        (
            ("the compiled step alone", f"{1e3 * figures['step']:.3f} ms"),
            ("the loop", f"{1e3 * figures['loop']:.3f} ms"),
            ("beyond the step", f"{100 * figures['overhead']:.1f}%"),
            ("the step, taking NumPy's arrays", f"{1e3 * figures['handed_over']:.3f} ms"),
            ("the loop with a step that does nothing", f"{1e3 * figures['python']:.3f} ms"),
        ),
    )


def inputs(summary: Summary) -> str:
    """What the input pipeline yields, and what steps consume."""
    figures = summary.get("inputs")
    if figures is None:
        return ""
    names = {
        "sampler": "the sampler alone, stratified",
        "memory": "gathered from memory, 32×32×3",
        "jpeg_256": "JPEG files of 256×256, four worker processes",
    }
    rows = [(names[name], f"{rate:,.0f}") for name, rate in figures.items()]
    for case, timings in summary.get("steps", {}).items():
        k, b = case.rpartition("_")[2].split("x")
        rate = int(k) * int(b) / timings["streaming"]["seconds"]
        rows.append((f"consumed by a streaming step, `{case}`", f"{rate:,.0f}"))
    return _table(("", "images/s"), rows)


def peers(summary: Summary) -> str:
    """Peers, against plain SGD of their own framework."""
    figures = summary.get("peers")
    if figures is None:
        return ""
    return (
        _table(
            ("a step of the MLP 3×512, 8 × 8", "of one SGD step of its framework"),
            ((name, f"{ratio:.2f}") for name, ratio in figures["steps_vs_sgd"].items()),
        )
        + "\n"
        + _table(
            ("a float32 stack [8, 1,735,178] to one gradient", "ms"),
            ((name, f"{1e3 * seconds:.1f}") for name, seconds in figures["aggregators"].items()),
        )
    )


def pods(summary: Summary) -> str:
    """Traffic and memory of ResNet-50's step, compiled for pods."""
    rows = []
    for pod, figures in summary.get("pods", {}).items():
        for name in (name for name in ("sgd", "bilevel", "coherent") if name in figures):
            of = figures[name]
            moved = ", ".join(f"{kind} {size / 1e6:.1f}" for kind, size in of["moved"].items())
            ours = name != "sgd"
            rows.append(
                (
                    f"`{pod}`, {name}",
                    moved,
                    f"{figures['traffic_vs_sgd']:.4f}" if ours else "1",
                    f"{of['memory'] / 1e6:,.0f}",
                    f"{figures['extra_gradients']:+.2f}" if ours else "",
                    f"{of['flops'] / figures['sgd']['flops']:.3f}",
                    f"{of['compile_seconds']:.0f}",
                )
            )
    return _table(
        (
            "the trainer's step of ResNet-50, 32 images of 256×256 a chip",
            "MB sent by a chip",
            "of SGD's",
            "MB held by a chip",
            "beyond SGD, gradients",
            "operations, of SGD's",
            "compile, s",
        ),
        rows,
    )


PARTS: dict[str, Callable[[Summary], str]] = {
    "steps": steps,
    "weighting": weighting,
    "memory": memory,
    "compile_time": compile_time,
    "alignment": alignment,
    "loop": loop,
    "inputs": inputs,
    "peers": peers,
    "pods": pods,
}


def machine(summary: Summary) -> str:
    """On where the figures come from: a line for the parts that were measured with the same."""
    lines: dict[str, list[str]] = {}
    for part, of in summary["environments"].items():
        lines.setdefault(_environment(of), []).append(part)
    return "\n".join(f"{', '.join(parts)}: {line}.\n" for line, parts in lines.items())


def _environment(of: dict[str, Any]) -> str:
    packages = ", ".join(f"{name} {version}" for name, version in of["packages"].items())
    return (
        f"{of['cores']} cores of {of['processor']}, devices {', '.join(of['devices'])}, "
        f"Python {of['python']}, {packages}, revision {of['revision']}, {of['time'][:10]}"
    )


def page(summary: Summary) -> str:
    """All tables, one after the other."""
    parts = (part(summary) for part in PARTS.values())
    return "\n".join([machine(summary), *filter(None, parts)])


if __name__ == "__main__":
    print(page(json.loads(pathlib.Path(sys.argv[1]).read_text())), end="")
