"""From a config to a run directory, resumable at any moment."""

import json
import pathlib
from typing import Any

import jax

from train import distributed, memory, mesh, noise, signals, tensorboard
from train.checkpoints import CheckpointError, Checkpoints
from train.config import Config
from train.evaluate import cross_entropy, measure, predict
from train.feed import feed, place
from train.files import write_json
from train.loop import NotFiniteError, Options, advance, loop
from train.mesh import Layout
from train.problem import Problem, build_program, load_problem
from train.run_directory import RunDirectory, read_result
from train.saved import Saved, evaluate_run, open_run, relabel_run
from train.signals import Interrupted

__all__ = [
    "CheckpointError",
    "Interrupted",
    "NotFiniteError",
    "Options",
    "Problem",
    "Saved",
    "advance",
    "build_program",
    "cross_entropy",
    "evaluate_run",
    "feed",
    "layout_of",
    "load_problem",
    "measure",
    "open_run",
    "place",
    "predict",
    "relabel_run",
    "summarize",
    "train",
]


def layout_of(config: Config, options: Options) -> Layout | None:
    """How the steps of a run lie on its devices; None on one device.

    Raises:
        ValueError: if k or b do not fit the number of devices.
    """
    if (options.devices or jax.device_count()) == 1 and jax.process_count() == 1:
        return None
    sharded = options.parameters == "sharded"
    return mesh.choose(config.k, config.b, options.devices, sharded=sharded)


def train(
    config: Config,
    directory: pathlib.Path,
    options: Options | None = None,
    problem: Problem | None = None,
) -> dict[str, Any]:
    """Trains, or goes on training, the run in `directory`; returns its result.

    A finished run is not trained again. The run ends in the same bits however often it was
    interrupted, if it goes on on as many devices and processes; on others, to rounding. Where
    there are several processes all of them call this, with a directory that they share. `problem`
    is what `load_problem` gives for the config, where that is loaded already.

    Raises:
        RunDirectoryError: if another process holds the folder, or it holds another run, or a run
            on other data.
        DataNotFoundError, ValueError: as `load_problem`.
        Interrupted: after SIGTERM or SIGINT, with the state saved.
        NotFiniteError: naming the step; the checkpoints before it are kept.
        CheckpointError: if the last checkpoint cannot be kept; the run can go on.
    """
    options = options or Options()
    distributed.check_alike(json.dumps(config.to_json()), "configs")
    memory.reset_peak()
    # Of a finished run the data are looked at where they may well have changed.
    if problem is None and (config.dataset == "folder" or read_result(directory) is None):
        problem = load_problem(config)
    description = None if problem is None else problem.description
    with RunDirectory(directory, config, description, writes=distributed.writes()) as run:
        if (result := read_result(directory)) is not None:
            last = run.metrics()[-1]
            options.on_step(last["step"])
            options.on_finished(last)
            return result
        assert problem is not None
        program = build_program(config, problem, layout_of(config, options))
        if run.writes:
            _note(problem, directory)
        with (
            Checkpoints(directory / "checkpoints", options.keep) as checkpoints,
            signals.stop_signals() as asked_to_stop,
            tensorboard.writer(directory, options.tensorboard and run.writes) as write_scalars,
        ):
            history = loop(
                config, problem, program, run, checkpoints, asked_to_stop, write_scalars, options
            )
        result = {**summarize(history), "memory_mb": memory.peak()}
        if run.writes:
            write_json(directory / "result.json", result)
        return result


def _note(problem: Problem, directory: pathlib.Path) -> None:
    """Writes beside the description what the run was given."""
    if problem.noise is not None and not problem.dataset.multi_label:
        noise.save(directory / "noise.npz", *problem.noise)
    if problem.dataset.account is not None:
        write_json(directory / "account.json", problem.dataset.account.to_json())


def summarize(history: list[dict[str, Any]]) -> dict[str, Any]:
    """The result of a finished run; what was not measured is not in it.

    ``stopped`` is the test accuracy at the epoch that the held-out part chooses, the first one
    with the highest accuracy on its given labels; ``test_best`` takes the test labels to choose.
    """
    last = history[-1]
    result: dict[str, Any] = {}
    if "test" in last:
        best = max(history, key=lambda line: line["test"])
        result |= {"test_last": last["test"], "test_best": best["test"]}
        result["best_epoch"] = best["epoch"]
    if "held_out" in last:
        chosen = max(history, key=lambda line: line["held_out"])
        if "test" in last:
            result["stopped"] = chosen["test"]
        result["stopped_epoch"] = chosen["epoch"]
        result["held_out"] = chosen["held_out"]
    result["train_noisy"] = last["train_given"]
    if "train_true" in last:
        result["train_clean"] = last["train_true"]
    return {
        **result,
        "epochs": last["epoch"],
        "steps": last["step"],
        "seconds": last["seconds"],
    }
