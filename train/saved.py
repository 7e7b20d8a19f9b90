"""A run directory opened again: its network, and what it is about, without its data."""

import dataclasses
import json
import pathlib
import warnings
from typing import Any

import jax
import numpy as np

from train import evaluate, noise
from train.checkpoints import Checkpoints
from train.config import Config, ConfigError
from train.description import Description
from train.problem import Problem, load_problem
from train.program import Program
from train.run_directory import RunDirectoryError, read_metrics
from train.state import Best, State


@dataclasses.dataclass(frozen=True, eq=False)
class Saved:
    """The newest checkpoint of a run directory, with what it belongs to.

    Attributes:
        directory: the run directory.
        config: the choices of the run.
        description: what it knows of its data.
        program: its functions, on one device.
        state: of the newest checkpoint.
    """

    directory: pathlib.Path
    config: Config
    description: Description
    program: Program
    state: State

    @property
    def network(self) -> State | Best:
        """The parameters to use: of the epoch that the held-out part chose, or the newest."""
        best = self.state.best
        return self.state if best is None or not int(best.step) else best

    @property
    def epoch(self) -> int:
        """The epoch of `network`, from 1; 0 before the first one has ended."""
        return self.chosen_step // self.description.steps_per_epoch

    @property
    def chosen_step(self) -> int:
        """The steps done by `network`."""
        return int(self.network.step)

    def scores(self, split: Any) -> np.ndarray:
        """What `network` makes of the images of a split, [n, classes]: `evaluate.predict`."""
        return evaluate.predict(self.program, self.network, split)

    def problem(self) -> Problem:
        """What it was trained on, loaded anew.

        Raises:
            DataNotFoundError: if the data are not there.
            RunDirectoryError: if they have changed since.
        """
        problem = load_problem(self.config)
        differ = self.description.differences(problem.description)
        if differ:
            raise RunDirectoryError(
                f"the data have changed since {self.directory} was trained: {'; '.join(differ)}"
            )
        return problem


def read_config(directory: pathlib.Path) -> Config:
    """The choices of a run.

    Raises:
        ConfigError: if there is no run.
    """
    file = directory / "config.json"
    if not file.exists():
        raise ConfigError(f"{directory} holds no run: there is no config.json")
    return Config.from_json(json.loads(file.read_text()))


def open_run(directory: pathlib.Path) -> Saved:
    """Opens a run directory, which need not be finished; needs no data and changes nothing.

    Raises:
        ConfigError: if there is no run, or no checkpoint yet.
    """
    config = read_config(directory)
    description = Description.read(directory)
    program = description.program(config)
    folder = directory / "checkpoints"
    state = None
    if folder.exists():
        with Checkpoints(folder, read_only=True) as checkpoints:
            state = checkpoints.restore(program.like)
    if state is None:
        raise ConfigError(f"{directory} has no checkpoint yet, or none that can be read")
    return Saved(directory, config, description, program, state)


def evaluate_run(directory: pathlib.Path) -> dict[str, Any]:
    """Figures of the newest checkpoint, and the test accuracy of the epoch that was chosen.

    They are measured; where the data are gone or have changed they are those that the run noted.

    Warns:
        UserWarning: says so, and why.

    Raises:
        ConfigError: if there is no run, no checkpoint yet, or neither data nor a noted figure.
    """
    run = open_run(directory)
    step = int(run.state.step)
    lines = [line for line in read_metrics(directory) if line["step"] <= step]
    try:
        problem = run.problem()
    except (OSError, ValueError, RunDirectoryError) as error:  # gone, damaged, changed
        if not lines:
            raise ConfigError(f"{directory} has noted no figures yet, and {error}") from error
        warnings.warn(f"the figures are those that the run noted: {error}", stacklevel=2)
        figures = _measured(lines[-1])
    else:
        figures = {"step": step, **evaluate.evaluate(run.program, run.state, problem)[0]}
    for line in lines:
        if run.state.best is not None and line["step"] == run.chosen_step and "test" in line:
            figures |= {"stopped": line["test"], "stopped_epoch": line["epoch"]}
    return figures


def _measured(line: dict[str, Any]) -> dict[str, Any]:
    """Of a line of metrics, what evaluation has given."""
    names = ("step", "test", "held_out", "train_given", "train_given_loss", "train_true",
             "train_true_loss")  # fmt: skip
    return {name: line[name] for name in names if name in line}


def with_network_of(directory: pathlib.Path, state: State) -> State:
    """The state with the network of a run directory's newest checkpoint."""
    trained = open_run(directory).state

    def shapes(of: State) -> Any:
        return jax.tree.map(jax.numpy.shape, (of.params, of.batch_stats))

    if shapes(trained) != shapes(state):
        raise ConfigError(f"the network of {directory} is not of the shape that this run trains")
    return state._replace(params=trained.params, batch_stats=trained.batch_stats)


def relabel_run(directory: pathlib.Path, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Labels a run's examples by its newest network with dropout left on, the paper's noise model.

    "We use the predicted labels of a pre-trained AlexNet to model realistic label noise ... we
    leave dropout active when making the predictions on the training set" (section 5.3).

    Returns:
        (given, true) labels of the data set's training split, int32 [n] each; the true ones are
        the data set's own.
    """
    run = open_run(directory)
    if run.description.multi_label:
        raise ConfigError(
            f"{run.config.dataset} has several labels per example: nothing to relabel"
        )
    problem = run.problem()
    everything, order = problem.everything, np.argsort(problem.examples)
    scores = evaluate.predict(run.program, run.state, everything, dropout=True, seed=seed)
    predicted = np.argmax(scores, axis=-1)[order]
    true = everything.labels[order] if problem.noise is None else problem.noise[1]
    return noise.model_made(true, predicted, problem.dataset.num_classes), true
