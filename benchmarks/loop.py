"""What the training loop costs beyond the compiled step: the demo's run, and the bare steps."""

import dataclasses
import itertools
import statistics
import time

import jax

from benchmarks.timing import turns
from train import demo, trainer
from train.program import Program
from train.state import RawBatch, State


def overhead(epochs: int = 20, rounds: int = 7) -> dict[str, float]:
    """Seconds per step of the loop and of the compiled step alone, and their ratio minus one.

    Both run the demo's config with the paper's rule: the loop with its sampler, transfer and
    dispatch, where each step takes its batch from the training set on the device; the step on an
    epoch's batches that were put there before. Evaluation and checkpoints come once an epoch and
    are left out. Beside them: `handed_over`, the step on an epoch's batches of NumPy's arrays, as
    it gets those of a training set that is not kept on the device, and `python`, the loop with a
    step that does nothing.
    """
    config = dataclasses.replace(demo.Demo().config, method="bilevel")
    problem = trainer.load_problem(config)
    program = trainer.build_program(config, problem)
    steps = epochs * problem.order.steps_per_epoch
    key = jax.random.key(0)
    train, true = problem.dataset.train, problem.true
    assert true is not None
    on_host = [RawBatch(train.read(i), train.labels[i], true[i], i) for i in problem.order.epoch(0)]
    on_device = jax.device_put(on_host)
    nothing = dataclasses.replace(program, step=lambda state, raw, key: state)

    def loop(state: State, program: Program = program) -> None:
        batches = trainer.feed(program, problem, 0, steps)
        for _ in range(steps):
            state, _ = trainer.advance(program, batches, state, key)
        jax.block_until_ready(state)

    def step(state: State, batches: list[RawBatch] = on_device) -> None:
        for _, raw in itertools.product(range(epochs), batches):
            state = program.step(state, raw, key)
        jax.block_until_ready(state)

    timed = {
        "loop": loop,
        "step": step,
        "handed_over": lambda state: step(state, on_host),
        "python": lambda state: loop(state, nothing),
    }
    seconds: dict[str, list[float]] = {name: [] for name in timed}
    loop(program.init(key))  # compiles
    for name in turns(timed, rounds):
        state = jax.block_until_ready(program.init(key))
        started = time.perf_counter()
        timed[name](state)
        seconds[name].append((time.perf_counter() - started) / steps)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    ratios = [a / b for a, b in zip(seconds["loop"], seconds["step"], strict=True)]
    return {**medians, "overhead": statistics.median(ratios) - 1}
