"""What coherent steps see: ``python -m benchmarks.coherence``.

Writes ``docs/results/coherence.json``: the coherence s of every step, with mini-batches of the same
labels and with random ones, of an MLP that learns and of CifarNet, which stands on a plateau. What
docs/past.md says of it.
"""

import contextlib
import dataclasses
import pathlib

import jax
import numpy as np
import tyro
from rich.console import Console

from train import trainer
from train.config import Config
from train.run_directory import write_json

_DIGITS = Config(
    noise="symmetric", augmentation="standardize", epochs=60, decay=0.97, dropout_rate=0.0
)
CASES = {
    "MLP 256-256, 50% wrong": dataclasses.replace(_DIGITS, hidden=(256, 256)),
    "CifarNet, 80% wrong": dataclasses.replace(_DIGITS, network="cifarnet", noise_rate=0.8),
}


def coherences(config: Config) -> np.ndarray:
    """Of every step of a run after the steps of its warm-up, s [steps]."""
    problem = trainer.load_problem(config)
    program = trainer.build_program(config, problem)
    init_key, step_key = jax.random.split(jax.random.key(config.seed))
    state = program.init(init_key)
    num_steps = config.epochs * problem.order.steps_per_epoch
    averages = []
    with contextlib.closing(trainer.feed(program, problem, 0, num_steps)) as batches:
        for _ in range(num_steps):
            state, _ = trainer.advance(program, batches, state, step_key)
            averages.append(float(state.method.coherence))
    average, decay = np.array(averages), config.coherence_decay
    warmup = round(config.coherence_warmup * num_steps)
    return (average[warmup:] - decay * average[warmup - 1 : -1]) / (1 - decay)


def main(out: pathlib.Path = pathlib.Path("docs/results/coherence.json")) -> None:
    """Trains every case with both samplings, and writes what s was."""
    console, results = Console(), {}
    for name, config in CASES.items():
        for sampling in ("stratified", "random"):
            s = coherences(dataclasses.replace(config, sampling=sampling))
            figures = {
                "mean": round(float(s.mean()), 3),
                "std": round(float(s.std()), 3),
                "share_above_0.9_in_size": round(float(np.mean(np.abs(s) > 0.9)), 3),
            }
            results[f"{name}, {sampling}"] = {
                "command": " ".join(
                    ["python -m train run", *config.flags(), "--sampling", sampling]
                ),
                **figures,
            }
            console.print(f"{name}, {sampling}: {figures}")
            write_json(out, results)


if __name__ == "__main__":
    tyro.cli(main)
