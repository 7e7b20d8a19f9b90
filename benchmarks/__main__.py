"""Runs the benchmarks, prints tables, and writes ``runs/bench/summary.json``."""

import dataclasses
import pathlib
from typing import Annotated, Any

import jax.numpy as jnp
import tyro
from rich.console import Console
from rich.table import Table

from benchmarks import alignment, loop, steps, weighting
from train.run_directory import environment, write_json


@dataclasses.dataclass(frozen=True)
class Benchmarks:
    """Measures what the bilevel rule costs, as ratios within one run."""

    cases: Annotated[
        tuple[str, ...], tyro.conf.arg(help=f"training steps, of {', '.join(steps.CASES)}")
    ] = tuple(steps.CASES)
    rounds: Annotated[int, tyro.conf.arg(help="timings of each candidate; the median counts")] = 9
    out: Annotated[pathlib.Path, tyro.conf.arg(help="where the results go")] = pathlib.Path(
        "runs/bench"
    )

    def __post_init__(self):
        """Raises ValueError for an unknown case."""
        unknown = set(self.cases) - set(steps.CASES)
        if unknown:
            raise ValueError(f"unknown case {unknown.pop()!r}; known: {', '.join(steps.CASES)}")


def main(options: Benchmarks, console: Console) -> None:
    """Runs everything; each part prints as it ends."""
    summary: dict[str, Any] = {"environment": environment(), "steps": {}}
    against = {"streaming_vs_accumulate": {}, "stacked_vs_accumulate": {}, "big_vs_accumulate": {}}
    for name in options.cases:
        timings = steps.measure(steps.CASES[name], options.rounds)
        base = timings["accumulate"].seconds
        ratios = {candidate: timing.seconds / base for candidate, timing in timings.items()}
        against["streaming_vs_accumulate"][name] = ratios["streaming"]
        against["stacked_vs_accumulate"][name] = min(ratios["stacked"], ratios["stacked_unrolled"])
        against["big_vs_accumulate"][name] = ratios["big_batch"]
        summary["steps"][name] = {c: timing._asdict() for c, timing in timings.items()}
        table = Table(title=f"{name}: a training step")
        for column in ("", "ms", "ratio", "compile, s", "temporary, MB"):
            table.add_column(column, justify="left" if not column else "right")
        for candidate, timing in timings.items():
            table.add_row(
                candidate,
                f"{1e3 * timing.seconds:.2f}",
                f"{ratios[candidate]:.2f}",
                f"{timing.compile_seconds:.1f}",
                f"{timing.temp_bytes / 1e6:.1f}",
            )
        console.print(table)
    summary.update(against)

    limits = {
        jnp.dtype(dtype).name: weighting.measure(dtype, rounds=options.rounds)
        for dtype in (jnp.float32, jnp.bfloat16)
    }
    summary["weighting"] = limits
    summary["weighting_vs_limit"] = {name: figures["ratio"] for name, figures in limits.items()}
    for name, figures in limits.items():
        console.print(
            f"weighting of [8, 10 million] {name}: {1e3 * figures['weighting']:.1f} ms, "
            f"{figures['ratio']:.2f} times two reads and one write"
        )

    memory = steps.temporary_memory(steps.CASES["mlp_8x8"], (2, 4, 8, 16, 32))
    summary["memory"] = memory
    summary["memory_k32_vs_k4"] = memory[32] / memory[4]
    figures = ", ".join(f"k = {k}: {size / 1e6:.2f} MB" for k, size in memory.items())
    console.print(f"temporary memory of streaming, MLP 3×512, b = 8: {figures}")

    timings = {name: alignment.measure(steps.CASES[name], options.rounds) for name in options.cases}
    summary["example_alignment"] = {
        name: {c: t._asdict() for c, t in of.items()} for name, of in timings.items()
    }
    summary["example_alignment_vs_forward"] = {}
    for name, of in timings.items():
        ratio, by_gradients = (
            of[c].seconds / of["forward"].seconds for c in ("example_alignment", "vmap_grad")
        )
        summary["example_alignment_vs_forward"][name] = ratio
        console.print(
            f"{name}: alignments of all examples {ratio:.2f} forward passes, "
            f"{of['example_alignment'].temp_bytes / 1e6:.1f} MB; by vmap(grad) "
            f"{by_gradients:.1f} forward passes, {of['vmap_grad'].temp_bytes / 1e6:.1f} MB"
        )

    summary["loop"] = loop.overhead()
    summary["loop_overhead"] = summary["loop"]["overhead"]
    console.print(
        f"training loop of the demo: {100 * summary['loop_overhead']:.1f}% beyond the compiled "
        f"step of {1e3 * summary['loop']['step']:.2f} ms"
    )
    options.out.mkdir(parents=True, exist_ok=True)
    write_json(options.out / "summary.json", summary)
    console.print(f"written: {options.out / 'summary.json'}")


if __name__ == "__main__":
    main(tyro.cli(Benchmarks, prog="python -m benchmarks"), Console())
