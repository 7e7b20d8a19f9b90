"""Runs that take a second, and what tests compare of them."""

import functools
import tempfile
from typing import Any

import jax
import numpy as np

from train import trainer
from train.config import Config
from train.program import Program

TIMING = {"images_per_second", "waiting", "seconds"}


def config(**changes: Any) -> Config:
    """160 digits, 3 epochs of 4 steps of the paper's rule, a hidden layer of 16.

    Nothing is held out but for `coherent`, which needs it.
    """
    choices: dict[str, Any] = {
        "method": "bilevel", "train_size": 160, "noise": "symmetric", "hidden": (16,), "k": 4,
        "b": 8, "epochs": 3, "learning_rate": 0.1, "network": "mlp",
        "held_out": 0.1 if changes.get("method", "").startswith("coherent") else 0.0,
    }  # fmt: skip
    return Config(**{**choices, **changes})


def options(**changes: Any) -> trainer.Options:
    """A checkpoint at every end of an epoch, no TensorBoard, one device."""
    return trainer.Options(
        **{"checkpoint_seconds": 0, "tensorboard": False, "devices": 1, **changes}
    )


def build(of: Config) -> tuple[trainer.Problem, Program]:
    problem = trainer.load_problem(of)
    return problem, trainer.build_program(of, problem)


def untimed(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Lines of metrics, or results, without the fields that the machine decides."""
    machine = TIMING | {"memory_mb"}
    return [{name: line[name] for name in line if name not in machine} for line in lines]


def assert_same_bits(actual: Any, expected: Any) -> None:
    """Every leaf of two pytrees has the same bytes."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    paths = jax.tree_util.tree_leaves_with_path(expected)
    for (path, x), y in zip(paths, jax.tree.leaves(actual), strict=True):
        x, y = np.asarray(x), np.asarray(y)
        assert (x.dtype, x.shape) == (y.dtype, y.shape), jax.tree_util.keystr(path)
        assert x.tobytes() == y.tobytes(), jax.tree_util.keystr(path)


def final_state(directory: Any, of: Config) -> Any:
    """The newest checkpoint of a run directory, which is left as it is."""
    from train.checkpoints import Checkpoints

    _, program = build(of)
    with Checkpoints(directory / "checkpoints", read_only=True) as checkpoints:
        state = checkpoints.restore(program.like)
    assert state is not None
    return state


@functools.cache
def _compiled() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory()  # until the tests end


def compiled_once() -> dict[str, str]:
    """The environment in which processes take from each other what they have compiled."""
    return {
        "JAX_COMPILATION_CACHE_DIR": _compiled().name,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
