"""What the training loop costs beyond the compiled step: the demo's run, and the bare steps."""

import dataclasses
import itertools
import statistics
import time

import jax

from train import data, demo, trainer
from train.program import Program, RawBatch


def overhead(epochs: int = 20, rounds: int = 7) -> dict[str, float]:
    """Seconds per step of the loop and of the compiled step alone, and their ratio minus one.

    Between the two, for what the difference is made of: `handed_over`, the step on an epoch's
    batches of NumPy's arrays, and `python`, the loop with a step that does nothing.

    Both run the demo's config with the paper's rule: the loop with its sampler, gathering, transfer
    and dispatch; the step on an epoch's batches that are on the device already. Evaluation and
    checkpoints come once an epoch and are left out.
    """
    config = dataclasses.replace(demo.Demo().config, method="bilevel")
    problem = trainer.load_problem(config)
    program = trainer.build_program(config, problem)
    steps = epochs * problem.order.steps_per_epoch
    key = jax.random.key(0)
    train = problem.dataset.train
    on_host = [
        RawBatch(train.read(i), train.labels[i], problem.true[i], i) for i in problem.order.epoch(0)
    ]
    on_device = jax.device_put(on_host)
    nothing = dataclasses.replace(program, step=lambda state, raw, key: state)

    def loop(program: Program = program) -> None:
        batches = iter(data.batches(train, problem.order, num_steps=steps))
        state = program.init(key)
        for _ in range(steps):
            state, _ = trainer.advance(program, problem, batches, state, key)
        jax.block_until_ready(state)

    def step(batches: list[RawBatch] = on_device) -> None:
        state = program.init(key)
        for _, raw in itertools.product(range(epochs), batches):
            state = program.step(state, raw, key)
        jax.block_until_ready(state)

    timed = {
        "loop": loop,
        "step": step,
        "handed_over": lambda: step(on_host),
        "python": lambda: loop(nothing),
    }
    seconds: dict[str, list[float]] = {name: [] for name in timed}
    loop()  # compiles
    for _ in range(rounds):
        for name, function in timed.items():
            started = time.perf_counter()
            function()
            seconds[name].append((time.perf_counter() - started) / steps)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    ratios = [a / b for a, b in zip(seconds["loop"], seconds["step"], strict=True)]
    return {**medians, "overhead": statistics.median(ratios) - 1}
