"""Runs the benchmarks, prints tables, and writes ``runs/bench/summary.json``.

The aims, of one run: ``streaming_vs_accumulate`` at most 1.05 on convolutional networks and 0.5 on
``mlp_8x8``; ``coherent_of_plain`` at most 1.15 on CifarNet and Inception, 1.30 on ``mlp_8x8``;
``memory_k32_vs_k4`` 1; ``compile_vs_by_hand`` at most 1.5; ``pod_traffic_vs_sgd`` at most 1.01, of
coherent steps 1.002.
"""

import concurrent.futures
import dataclasses
import importlib.metadata
import json
import multiprocessing
import os
import pathlib
import platform
import sys
import time
from collections.abc import Callable
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import tyro
from rich.console import Console
from rich.markdown import Markdown

from benchmarks import alignment, compile_time, inputs, loop, peers, steps, tables, weighting
from benchmarks import pods as pod_steps
from train.run_directory import environment, write_json

Figures = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Benchmarks:
    """Measures what both rules cost, as ratios within one run.

    Parts that are not run keep their figures of an earlier run of the same code on the same
    machine, if there was one.
    """

    parts: Annotated[
        tuple[str, ...],
        tyro.conf.arg(
            help="what to measure, of steps, weighting, memory, compile_time, alignment, loop, "
            "inputs, peers, pods"
        ),
    ] = (
        "steps", "weighting", "memory", "compile_time", "alignment", "loop", "inputs", "peers",
        "pods",
    )  # fmt: skip
    cases: Annotated[
        tuple[str, ...], tyro.conf.arg(help=f"training steps, of {', '.join(steps.CASES)}")
    ] = tuple(steps.CASES)
    pods: Annotated[
        tuple[str, ...],
        tyro.conf.arg(
            help=f"what to compile ResNet-50 for, of {', '.join(pod_steps.PODS)}; three to "
            "nine minutes of a core for each, and for SGD on each topology"
        ),
    ] = ("v5e_4x4_k8", "v5e_4x4_coherent")
    rounds: Annotated[int, tyro.conf.arg(help="timings of each candidate; the median counts")] = 9
    out: Annotated[pathlib.Path, tyro.conf.arg(help="where the results go")] = pathlib.Path(
        "runs/bench"
    )

    def __post_init__(self):
        """Raises ValueError for an unknown name."""
        for what, names, known in (
            ("part", self.parts, _PARTS),
            ("case", self.cases, steps.CASES),
            ("pod", self.pods, pod_steps.PODS),
        ):
            unknown = [name for name in names if name not in known]
            if unknown:
                raise ValueError(f"unknown {what} {unknown[0]!r}; known: {', '.join(known)}")


def _afresh(function: Callable[..., Any], *arguments: Any) -> Any:
    """Calls it in a process of its own: large blocks freed before would spare some page faults.

    Not where there is a GPU, whose memory this process has taken.
    """
    if jax.default_backend() != "cpu":
        return function(*arguments)
    spawned = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, spawned) as pool:
        return pool.submit(function, *arguments).result()


# Ratios of steps: to the figure's name, what is compared with what.
_RATIOS = {
    "streaming_vs_accumulate": ("streaming", "accumulate"),
    "stacked_vs_accumulate": ("stacked", "accumulate"),
    "big_vs_accumulate": ("plain", "accumulate"),
    "coherent_of_plain": ("coherent", "plain"),
}


def _steps(options: Benchmarks, console: Console) -> Figures:
    figures: Figures = {"steps": {}, **{name: {} for name in _RATIOS}}
    for case in options.cases:
        console.print(f"  {case} …")
        timings = _afresh(steps.measure, steps.CASES[case], options.rounds)
        figures["steps"][case] = {name: timing._asdict() for name, timing in timings.items()}
        for name, (one, other) in _RATIOS.items():
            figures[name][case] = timings[one].seconds / timings[other].seconds
    return figures


def _weighting(options: Benchmarks, console: Console) -> Figures:
    figures = {
        jnp.dtype(dtype).name: weighting.measure(dtype, rounds=options.rounds)
        for dtype in (jnp.float32, jnp.bfloat16)
    }
    ratios = {name: of["ratio"] for name, of in figures.items()}
    return {"weighting": figures, "weighting_vs_by_hand": ratios}


def _memory(options: Benchmarks, console: Console) -> Figures:
    memory: dict[str, dict[str, int]] = {}
    for candidate in ("streaming_by_1", "streaming"):
        sizes = steps.temporary_memory(candidate, steps.CASES["mlp_8x8"], (2, 4, 8, 16, 32))
        memory[candidate] = {str(k): size for k, size in sizes.items()}  # as JSON has keys
    one_by_one = memory["streaming_by_1"]
    return {"memory": memory, "memory_k32_vs_k4": one_by_one["32"] / one_by_one["4"]}


def _compile_time(options: Benchmarks, console: Console) -> Figures:
    ratios = compile_time.measure()
    return {"compile_vs_by_hand": {str(leaves): ratio for leaves, ratio in ratios.items()}}


def _alignment(options: Benchmarks, console: Console) -> Figures:
    figures: Figures = {"example_alignment": {}, "example_alignment_vs_forward": {}}
    for name in options.cases:
        console.print(f"  {name} …")
        timings = alignment.measure(steps.CASES[name], options.rounds)
        ratio = timings["example_alignment"].seconds / timings["forward"].seconds
        figures["example_alignment"][name] = {c: t._asdict() for c, t in timings.items()}
        figures["example_alignment_vs_forward"][name] = ratio
    return figures


def _loop(options: Benchmarks, console: Console) -> Figures:
    # Many, of a fifth of a second each: what is looked for is a few hundredths of what is timed.
    figures = loop.overhead(rounds=5 * options.rounds)
    return {"loop": figures, "loop_overhead": figures["overhead"]}


def _inputs(options: Benchmarks, console: Console) -> Figures:
    return {"inputs": inputs.measure()}


def _peers(options: Benchmarks, console: Console) -> Figures:
    if not peers.available():
        console.print("  skipped: PyTorch and TorchJD are not installed: pip install -e '.[peers]'")
        return {}
    return {"peers": peers.measure(options.rounds)}


def _pods(options: Benchmarks, console: Console) -> Figures:
    if not pod_steps.available():
        console.print("  skipped: libtpu is not installed: make bench does that on x86-64 Linux")
        return {}
    figures = pod_steps.measure(options.pods)
    ratios = {name: of["traffic_vs_sgd"] for name, of in figures.items()}
    return {"pods": figures, "pod_traffic_vs_sgd": ratios}


_PARTS: dict[str, Callable[[Benchmarks, Console], Figures]] = {
    "steps": _steps,
    "weighting": _weighting,
    "memory": _memory,
    "compile_time": _compile_time,
    "alignment": _alignment,
    "loop": _loop,
    "inputs": _inputs,
    "peers": _peers,
    "pods": _pods,
}


def _machine() -> dict[str, Any]:
    """What the figures depend on: code, versions, devices, processor."""
    processor = platform.processor() or platform.machine()
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = (line.partition(":") for line in cpuinfo.read_text().splitlines())
        core = {name.strip(): value.strip() for name, _, value in lines}
        if "model name" in core:  # on virtual machines it may name a brand and no generation
            processor = core["model name"]
            processor += f" (family {core.get('cpu family')}, model {core.get('model')})"
    here = {"processor": processor, "cores": os.cpu_count()}
    installed = importlib.metadata.distributions(path=[*sys.path, str(pod_steps.libtpu())])
    optional = {each.name: each.version for each in installed if each.name in _OPTIONAL}
    common = environment()
    return {**common, **here, "packages": common["packages"] | optional}


_OPTIONAL = ("torch", "torchjd", "libtpu")


def _comparable(machine: dict[str, Any] | None) -> dict[str, Any] | None:
    """What two runs must share for their figures to stand in one table; None where none can."""
    if machine is None or str(machine["revision"]).endswith("-dirty"):
        return None
    return {name: of for name, of in machine.items() if name not in ("time", "command")}


def main(options: Benchmarks, console: Console) -> None:
    """Runs the parts; each is printed and written as it ends.

    Parts that are not run keep what an earlier run wrote; "environments" says what each part was
    measured with. Within a part, cases measured with the same are kept beside the new ones.
    """
    options.out.mkdir(parents=True, exist_ok=True)
    file = options.out / "summary.json"
    machine = _machine()
    summary = json.loads(file.read_text()) if file.exists() else {}
    environments = summary.setdefault("environments", {})
    begun = time.monotonic()
    for part in options.parts:
        started = time.monotonic()
        console.print(f"[bold]{part}[/bold]")
        before = _comparable(environments.get(part))
        alike = before is not None and before == _comparable(machine)
        found = _PARTS[part](options, console)
        for name, figures in found.items():
            known: Any = summary.get(name)
            both = isinstance(known, dict) and isinstance(figures, dict)
            summary[name] = known | figures if alike and both else figures
        if found:
            environments[part] = machine
        write_json(file, summary)
        console.print(Markdown(tables.PARTS[part](summary)))
        console.print(f"  {time.monotonic() - started:.0f} s")
    console.print(f"written: {file}, after {time.monotonic() - begun:.0f} s")


if __name__ == "__main__":
    main(tyro.cli(Benchmarks, prog="python -m benchmarks"), Console())
