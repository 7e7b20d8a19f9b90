"""What the steps of a run are given, one after the other."""

import contextlib
from collections.abc import Generator
from typing import Any

import jax
import numpy as np

from train import data, sampler
from train.mesh import Layout
from train.problem import Problem
from train.program import Program
from train.state import Examples, RawBatch, Resident

_RESIDENT_BYTES = 2**28  # of images that are copied to the device


def feed(
    program: Program, problem: Problem, first_step: int, num_steps: int
) -> Generator[RawBatch | Resident]:
    """What the steps ``first_step .. num_steps - 1`` of a run are given.

    One device keeps all examples if their images are in memory and take at most 256 MiB; then a
    step is handed their numbers. Else it is handed the examples.
    """
    if program.layout is None and _is_small(problem):
        return _resident(program, problem, first_step, num_steps)
    return _handed_over(program, problem, first_step, num_steps)


def _is_small(problem: Problem) -> bool:
    parts = [part for part in (problem.dataset.train, problem.held_out) if part is not None]
    sizes = [part.images.nbytes for part in parts if isinstance(part.images, np.ndarray)]
    return len(sizes) == len(parts) and sum(sizes) <= _RESIDENT_BYTES


def _judges(program: Program, problem: Problem) -> sampler.Turns | None:
    """Which held-out examples judge a step, by their positions in the held-out part."""
    if not program.judges:
        return None
    assert problem.held_out is not None  # Config sees to it
    positions = np.arange(len(problem.held_out))
    return sampler.Turns(positions, program.judges, seed=problem.order.seed)


def _resident(
    program: Program, problem: Problem, first_step: int, num_steps: int
) -> Generator[Resident]:
    everything, true, order = problem.everything, problem.true, problem.order
    judges, count = _judges(program, problem), len(problem.dataset.train)
    images, labels, true = jax.device_put((everything.images, everything.labels, true))
    for step in range(first_step, num_steps):
        # As NumPy's arrays: device_put would wait for the step at hand.
        indices = order.batch(*divmod(step, order.steps_per_epoch))
        held_out = None if judges is None else judges[step] + np.int32(count)
        yield Resident(images, labels, true, indices, held_out)


def _handed_over(
    program: Program, problem: Problem, first_step: int, num_steps: int
) -> Generator[RawBatch]:
    train, true, order = problem.dataset.train, problem.true, problem.order
    layout, judges = program.layout, _judges(program, problem)
    part: Any = ()
    if layout is not None:
        rows, columns = layout.part((order.k, order.b))
        copies = np.arange(program.copies)[:, None]
        part = np.concatenate([copies, rows]), columns
    steps = data.batches(train, order, first_step=first_step, num_steps=num_steps, part=part)
    with contextlib.closing(steps):
        for step, (indices, images) in enumerate(steps, first_step):
            own = indices[part]
            known = None if true is None else true[own]
            raw = RawBatch(images, train.labels[own], known, own)
            if layout is not None:
                raw = place(raw, layout, indices.shape, program.copies)
            # On one device as NumPy's arrays: the step takes them in less time than device_put.
            if judges is not None:
                held_out = _examples(problem.held_out, judges[step])
                held_out = held_out if layout is None else layout.copy(held_out)
                raw = raw._replace(judges=held_out)
            yield raw


def _examples(split: Any, positions: np.ndarray) -> Examples:
    return Examples(split.read(positions), split.labels[positions])


def place(raw: RawBatch, layout: Layout, shape: tuple[int, ...], copies: int) -> RawBatch:
    """Puts on a mesh what this process has read: so many first mini-batches, then its own part."""
    placed = layout.place(jax.tree.map(lambda x: x[copies:], raw), shape)
    if not copies:
        return placed
    return placed._replace(copies=layout.copy(jax.tree.map(lambda x: x[:copies], raw)))
