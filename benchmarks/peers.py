"""Peers in PyTorch, each against plain SGD of its own framework: TorchJD, and the rule by hand.

Needs the optional packages of ``pip install -e '.[peers]'``.
"""

import importlib.util
import itertools
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax

from benchmarks import steps
from benchmarks.timing import compare, turns
from benchmarks.weighting import LAM, MU, rule

AGGREGATORS = ("UPGrad", "MGDA", "PCGrad", "IMTLG", "AlignedMTL")


def available() -> bool:
    """Whether PyTorch and TorchJD are installed."""
    return all(importlib.util.find_spec(name) for name in ("torch", "torchjd"))


def measure(rounds: int = 9) -> dict[str, dict[str, float]]:
    """Steps of the MLP 3×512 at 8 mini-batches of 8, and what turns a stack [8, P] into one row.

    Returns:
        "steps_vs_sgd": seconds of a step over those of one big-batch SGD step of the same
        framework on the same 64 images. "aggregators": seconds for a stack [8, 1,735,178] in
        float32.
    """
    case = steps.CASES["mlp_8x8"]
    problem = steps.problem(case)
    timings = steps.compare_steps(steps.candidates(problem), problem, rounds)
    base = timings["plain"].seconds
    versus = {f"jax {name}": timing.seconds / base for name, timing in timings.items()}
    seconds = _time(_torch_steps(case), rounds)
    versus |= {f"torch {name}": value / seconds["plain"] for name, value in seconds.items()}

    size = sum(x.size for x in jax.tree.leaves(problem.params))
    stack = jax.random.normal(jax.random.key(0), (case.k, size))
    rules = {"optax_bilevel diagonal": rule(), "optax_bilevel exact": rule("exact")}
    aggregators = {name: t.seconds for name, t in compare(rules, (stack,), rounds).items()}
    return {
        "steps_vs_sgd": versus,
        "aggregators": aggregators | _torch_stacks(case.k, size, rounds),
    }


def _time(functions: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Median seconds of each, in turns."""
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for name in turns(functions, rounds):
        functions[name]()
        started = time.perf_counter()
        functions[name]()
        seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in seconds.items()}


def _torch_steps(case: steps.Case) -> dict[str, Callable[[], Any]]:
    import torch  # pyright: ignore[reportMissingImports]
    from torchjd import aggregation  # pyright: ignore[reportMissingImports]

    torch.set_num_threads(os.cpu_count() or 1)
    torch.manual_seed(0)
    images = torch.randn(case.k, case.b, *case.input_shape)
    labels = torch.randint(10, (case.k, case.b))
    sizes = (images[0, 0].numel(), 512, 512, 512, 10)
    layers = [torch.nn.Flatten()]
    for i, (before, after) in enumerate(itertools.pairwise(sizes)):
        layers += [torch.nn.Linear(before, after), *([torch.nn.ReLU()] if i < 3 else [])]
    model = torch.nn.Sequential(*layers)
    params = list(model.parameters())
    # A step of size 0 costs the same; sums of 8 gradients would diverge over the rounds.
    optimizer = torch.optim.SGD(params, lr=0.0, momentum=0.9)

    def gradient(i: int) -> tuple[Any, ...]:
        loss = torch.nn.functional.cross_entropy(model(images[i]), labels[i])
        return torch.autograd.grad(loss, params)

    def finish(grads: Any) -> None:
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad
        optimizer.step()

    def plain() -> None:
        loss = torch.nn.functional.cross_entropy(model(images.flatten(0, 1)), labels.flatten())
        finish(torch.autograd.grad(loss, params))

    def accumulate() -> None:
        total = gradient(0)
        for i in range(1, case.k):
            total = [a + g for a, g in zip(total, gradient(i), strict=True)]
        finish(total)

    def bilevel_by_hand() -> None:
        validation, *grads = (gradient(i) for i in range(case.k))
        omega = []
        for grad in grads:
            dot = sum(torch.sum(v * g) for v, g in zip(validation, grad, strict=True))
            omega.append(dot / (sum(torch.sum(g * g) for g in grad) / LAM + MU))
        omega = torch.stack(omega)
        omega = omega / torch.sum(torch.abs(omega))
        finish(
            [
                sum(w * g for w, g in zip(omega, leaf, strict=True))
                for leaf in zip(*grads, strict=True)
            ]
        )

    def torchjd(name: str) -> Callable[[], None]:
        aggregator = getattr(aggregation, name)()

        def step() -> None:
            rows = (torch.cat([g.flatten() for g in gradient(i)]) for i in range(case.k))
            total = aggregator(torch.stack(list(rows)))
            parts = total.split([p.numel() for p in params])
            finish([x.view_as(p) for x, p in zip(parts, params, strict=True)])

        return step

    return {
        "plain": plain,
        "accumulate": accumulate,
        "bilevel by hand": bilevel_by_hand,
        **{f"torchjd {name}": torchjd(name) for name in AGGREGATORS},
    }


def _torch_stacks(k: int, size: int, rounds: int) -> dict[str, float]:
    import torch  # pyright: ignore[reportMissingImports]
    from torchjd import aggregation  # pyright: ignore[reportMissingImports]

    stack = torch.randn(k, size)
    functions = {}
    for name in AGGREGATORS:
        aggregator = getattr(aggregation, name)()
        functions[f"torchjd {name}"] = lambda aggregator=aggregator: aggregator(stack)
    return _time(functions, rounds)
