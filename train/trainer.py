"""The training loop: from a config to a run directory, resumable at any moment."""

import contextlib
import dataclasses
import functools
import json
import pathlib
import resource
import signal
import sys
import time
import warnings
from collections.abc import Callable, Generator, Iterator
from typing import Any

import jax
import numpy as np

from train import data, distributed, mesh, noise, sampler
from train.checkpoints import Checkpoints
from train.config import Config, ConfigError
from train.mesh import Layout
from train.program import Program, RawBatch, Resident, State, build
from train.run_directory import RunDirectory, RunDirectoryError, write_json

EVALUATED_TRAINING_EXAMPLES = 5000
_EVALUATION_BATCH = 500
_RESIDENT_BYTES = 2**28  # of training images that are copied to the device
_AGREE_EVERY = 32  # steps between asking the first process whether it is time for a checkpoint

# An epoch's mean share of whole steps, and its training loss as a share of the first epoch's.
_STILL, _UNMOVED = 0.05, 0.98
_STANDS_STILL = (
    "nothing has been learnt, and there are hardly any steps any more: the warm-up ended on a "
    "plateau, where mini-batches agree on nothing. Begin anew with --sampling random, or with a "
    "larger --coherence-warmup (docs/past.md)"
)

# Streams of random numbers, apart from each other for every seed.
_INIT, _STEPS, _SUBSET = 1, 2, 3


class Interrupted(Exception):  # noqa: N818, not an error: the run can go on
    """The run was asked to stop and has saved its state; `signum` says by what."""

    def __init__(self, signum: int, step: int):
        """Names the signal and the step that was saved."""
        super().__init__(f"{signal.Signals(signum).name} at step {step}; start again to go on")
        self.signum = signum


class NotFiniteError(FloatingPointError):
    """A step left NaN or Inf in the parameters or running averages, or had no finite loss."""


@dataclasses.dataclass(frozen=True)
class Problem:
    """What a config trains on.

    Attributes:
        dataset: with the training split that is trained on, its labels the given ones.
        true: the true labels of the training split.
        order: which examples make up the mini-batches of each step.
        examples: their numbers in the training split of the data set, int [n].
    """

    dataset: data.Dataset
    true: np.ndarray
    order: sampler.Sampler
    examples: np.ndarray


@dataclasses.dataclass
class Options:
    """How a run is carried out; none of it changes its result (devices: but for rounding).

    Attributes:
        checkpoint_seconds: save after so many seconds; 0: at every end of an epoch.
        keep: how many checkpoints to keep.
        tensorboard: also write the metrics for TensorBoard.
        devices: how many of this process's devices to use; None: all, of all processes.
        parameters: "replicated" on all devices, or "sharded" over them with the optimizer's state.
        on_epoch: called with every line of metrics.
        on_step: called after every step with the number of steps done.
        on_finished: called with the last line of metrics of a run that was finished before.
    """

    checkpoint_seconds: float = 60.0
    keep: int = 2
    tensorboard: bool = True
    devices: int | None = None
    parameters: str = "replicated"
    on_epoch: Callable[[dict[str, Any]], None] = lambda line: None
    on_step: Callable[[int], None] = lambda step: None
    on_finished: Callable[[dict[str, Any]], None] = lambda line: None


@functools.lru_cache(maxsize=2)
def _dataset(name: str, data_dir: str | None, image_size: int | None) -> data.Dataset:
    return data.load(name, data_dir, image_size=image_size)


def load_problem(config: Config) -> Problem:
    """Loads the data of a config, makes its noise and its order of examples.

    Raises:
        DataNotFoundError: if the data are not there.
        ValueError: if the choices do not fit the data.
    """
    dataset = _dataset(config.dataset, config.data_dir, config.image_size)
    examples = _subset(len(dataset.train), "train_size", config)
    train = _taken(dataset.train, examples)
    test = _taken(dataset.test, _subset(len(dataset.test), "test_size", config))
    if config.pixels != "natural":
        train, test = (_permuted(split, config) for split in (train, test))
    dataset = dataclasses.replace(dataset, test=test)
    true = train.labels
    if config.noise.endswith(".npz"):
        given = noise.from_file(config.noise, true, dataset.num_classes)
    elif config.noise == "none" or config.noise_rate == 0:
        given = true
    else:
        if dataset.multi_label:
            raise ConfigError(f"noise {config.noise} is for one label per example: take none")
        given = noise.corrupt(
            config.noise, true, config.noise_rate, dataset.num_classes, config.seed
        )
    given, order = _order(config, dataset, given, true)
    train = dataclasses.replace(train, labels=given)
    return Problem(dataclasses.replace(dataset, train=train), true, order, examples)


def _subset(count: int, name: str, config: Config) -> np.ndarray:
    """The numbers of the examples that a config takes of a split of `count`."""
    size = getattr(config, name)
    if size is None or size == count:
        return np.arange(count)
    if size > count:
        raise ConfigError(f"{name} is {size}, and {config.dataset} has {count} examples")
    rng = np.random.default_rng([_SUBSET, size])  # the same for all seeds
    return np.sort(rng.permutation(count)[:size])


def _taken(split: data.Split, examples: np.ndarray) -> data.Split:
    return split if len(examples) == len(split) else split.take(examples)


def _permuted(split: data.Split, config: Config) -> data.Split:
    if not isinstance(split.images, np.ndarray):
        raise ConfigError(f"pixels = {config.pixels} is for data sets that fit in memory")
    if config.pixels == "shuffled":
        return data.Split(noise.shuffled_pixels(split.images, config.seed), split.labels)
    indices = np.arange(len(split))
    return data.Split(noise.random_pixels(split.images, indices, config.seed), split.labels)


def _order(
    config: Config, dataset: data.Dataset, given: np.ndarray, true: np.ndarray
) -> tuple[np.ndarray, sampler.Sampler]:
    k, b, seed = config.k, config.b, config.seed
    if dataset.multi_label and config.validation_ratio:
        raise ConfigError("validation_ratio is for one label per example: take 0")
    if config.sampling == "random":
        return given, sampler.random(len(given), k, b, seed=seed)
    if dataset.multi_label:
        return given, sampler.multi_label(given, k, b, seed=seed)
    if not config.validation_ratio:
        return given, sampler.stratified(given, k, b, seed=seed, class_names=dataset.class_names)
    held_out = sampler.hold_out(given, config.validation_ratio, seed=seed)
    if config.clean_validation:
        given = given.copy()
        given[held_out] = true[held_out]
    return given, sampler.separate_validation(
        given,
        k,
        b,
        held_out,
        seed=seed,
        num_validation=config.num_validation,
        class_names=dataset.class_names,
    )


def layout_of(config: Config, options: Options) -> Layout | None:
    """How the steps of a run lie on its devices; None on one device.

    Raises:
        ValueError: if k or b do not fit the number of devices.
    """
    if (options.devices or jax.device_count()) == 1 and jax.process_count() == 1:
        return None
    sharded = options.parameters == "sharded"
    return mesh.choose(config.k, config.b, options.devices, sharded=sharded)


def build_program(config: Config, problem: Problem, layout: Layout | None = None) -> Program:
    """The compiled functions for a problem, on one device or on the mesh of a layout."""
    dataset = problem.dataset
    return build(
        config,
        image_shape=dataset.image_shape,
        max_value=dataset.max_value,
        num_classes=dataset.num_classes,
        multi_label=dataset.multi_label,
        steps_per_epoch=problem.order.steps_per_epoch,
        layout=layout,
        num_examples=len(dataset.train),
    )


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
        RunDirectoryError: if another process holds the folder, or it holds another run.
        DataNotFoundError, ValueError: as `load_problem`.
        Interrupted: after SIGTERM or SIGINT, with the state saved.
        NotFiniteError: naming the step; the checkpoints before it are kept.
    """
    options = options or Options()
    distributed.check_alike(json.dumps(config.to_json()), "configs")
    reset_peak_memory()
    with RunDirectory(directory, config, writes=distributed.writes()) as run:
        result_file = directory / "result.json"
        if result_file.exists():
            last = run.metrics()[-1]
            options.on_step(last["step"])
            options.on_finished(last)
            return json.loads(result_file.read_text())
        problem = problem or load_problem(config)
        program = build_program(config, problem, layout_of(config, options))
        if not problem.dataset.multi_label and run.writes:
            _keep_labels(directory / "noise.npz", problem)
        with (
            Checkpoints(directory / "checkpoints", options.keep) as checkpoints,
            _stop_signals() as asked_to_stop,
            _tensorboard(directory, options.tensorboard and run.writes) as write_scalars,
        ):
            history = _loop(
                config, problem, program, run, checkpoints, asked_to_stop, write_scalars, options
            )
        result = {**summarize(history), "memory_mb": peak_memory()}
        if run.writes:
            write_json(result_file, result)
        return result


def _loop(
    config: Config,
    problem: Problem,
    program: Program,
    run: RunDirectory,
    checkpoints: Checkpoints,
    asked_to_stop: Callable[[int], int | None],
    write_scalars: Callable[[dict[str, Any]], None],
    options: Options,
) -> list[dict[str, Any]]:
    steps_per_epoch = problem.order.steps_per_epoch
    num_steps = config.epochs * steps_per_epoch
    key = jax.random.key(config.seed)
    init_key, step_key = (jax.random.fold_in(key, stream) for stream in (_INIT, _STEPS))
    if program.layout is not None:
        init_key, step_key = program.layout.copy((init_key, step_key))

    state = program.init(init_key)
    restored = checkpoints.restore(state)
    if restored is not None:
        state = restored
    elif config.pretrained is not None and not config.pretrained.endswith(".safetensors"):
        state = _network_of(pathlib.Path(config.pretrained), state)
    step = int(state.step)
    history = run.keep_metrics(step)
    last_save = started = time.monotonic()
    seconds_before = history[-1]["seconds"] if history else 0.0
    part_started, part_steps, waited = started, 0, 0.0  # of the epoch at hand, by this process
    said = False

    with contextlib.closing(feed(program, problem, step, num_steps)) as batches:
        while step < num_steps:
            state, seconds = advance(program, batches, state, step_key)
            waited += seconds
            step += 1
            part_steps += 1
            options.on_step(step)

            epoch_ends = step % steps_per_epoch == 0
            if epoch_ends:
                _check_finite(state)
                now = time.monotonic()
                line = {
                    "epoch": step // steps_per_epoch,
                    "step": step,
                    **_training_figures(state),
                    **evaluate(program, state, problem),
                    "images_per_second": part_steps * config.k * config.b / (now - part_started),
                    "waiting": waited / (now - part_started),
                    "seconds": seconds_before + time.monotonic() - started,
                }
                run.append_metrics(line)
                write_scalars(line)
                options.on_epoch(line)
                history.append(line)
                if not said and _stands_still(history):
                    said = True
                    warnings.warn(_STANDS_STILL, stacklevel=2)
                state = program.new_epoch(state)
                part_started, part_steps, waited = time.monotonic(), 0, 0.0

            signum = asked_to_stop(step)
            interval = options.checkpoint_seconds
            due = time.monotonic() - last_save >= interval if interval else epoch_ends
            if jax.process_count() > 1:  # their clocks differ, and to ask waits for the step
                due = (epoch_ends or step % _AGREE_EVERY == 0) and distributed.of_first(due)
            if due or signum or step == num_steps:
                _check_finite(state)
                checkpoints.save(step, state, wait=signum is not None)
                last_save = time.monotonic()
            if signum and step < num_steps:
                raise Interrupted(signum, step)
    return history


def _stands_still(history: list[dict[str, Any]]) -> bool:
    """Whether steps have ended with the training loss where it was in the first epoch."""
    step_size, loss = history[-1].get("step_size", 1), history[-1]["loss"]
    return step_size < _STILL and loss > _UNMOVED * history[0]["loss"]


def _keep_labels(file: pathlib.Path, problem: Problem) -> None:
    """Writes the labels of a run that starts; one that goes on must have those that it had."""
    labels = problem.dataset.train.labels, problem.true
    if not file.exists():
        noise.save(file, *labels)
    elif not all(map(np.array_equal, noise.load(file), labels)):
        raise RunDirectoryError(
            f"the training labels are not those that the run began with, in {file}: give "
            "--data-dir the place of its own data, or take another folder"
        )


def feed(
    program: Program, problem: Problem, first_step: int, num_steps: int
) -> Generator[RawBatch | Resident]:
    """What the steps ``first_step .. num_steps - 1`` of a run are given, one after the other.

    One device keeps the whole training set if its images are in memory and take at most 256 MiB;
    then a step is handed the numbers of its examples. Else it is handed the examples.
    """
    images = problem.dataset.train.images
    small = isinstance(images, np.ndarray) and images.nbytes <= _RESIDENT_BYTES
    if small and program.layout is None:
        return _resident(problem, first_step, num_steps)
    return _handed_over(program, problem, first_step, num_steps)


def _resident(problem: Problem, first_step: int, num_steps: int) -> Generator[Resident]:
    train, order = problem.dataset.train, problem.order
    images, labels, true = jax.device_put((train.images, train.labels, problem.true))
    for step in range(first_step, num_steps):
        # As NumPy's array: device_put would wait for the step at hand.
        indices = order.batch(*divmod(step, order.steps_per_epoch))
        yield Resident(images, labels, true, indices)


def _handed_over(
    program: Program, problem: Problem, first_step: int, num_steps: int
) -> Generator[RawBatch]:
    train, order, layout = problem.dataset.train, problem.order, program.layout
    part: Any = ()
    if layout is not None:
        rows, columns = layout.part((order.k, order.b))
        copies = np.arange(program.copies)[:, None]
        part = np.concatenate([copies, rows]), columns
    steps: Any = data.batches(train, order, first_step=first_step, num_steps=num_steps, part=part)
    with contextlib.closing(steps):
        for indices, images in steps:
            own = indices[part]
            raw = RawBatch(images, train.labels[own], problem.true[own], own)
            # On one device as NumPy's arrays: the step takes them in less time than device_put.
            yield raw if layout is None else place(raw, layout, indices.shape, program.copies)


def place(raw: RawBatch, layout: Layout, shape: tuple[int, ...], copies: int) -> RawBatch:
    """Puts on a mesh what this process has read: so many first mini-batches, then its own part."""
    placed = layout.place(jax.tree.map(lambda x: x[copies:], raw), shape)
    if not copies:
        return placed
    return placed._replace(copies=layout.copy(jax.tree.map(lambda x: x[:copies], raw)))


def advance(
    program: Program, batches: Iterator[RawBatch | Resident], state: State, key: jax.Array
) -> tuple[State, float]:
    """Does one step, without waiting for it; also returns the seconds waited for its batch."""
    before = time.monotonic()
    batch = next(batches)
    waited = time.monotonic() - before
    if program.layout is None:
        return program.step(state, batch, key), waited
    with jax.transfer_guard("disallow"):  # between devices it would be hidden, and slow
        return program.step(state, batch, key), waited


def _check_finite(state: State) -> None:
    failed = int(jax.device_get(state.failed))
    if failed >= 0:
        raise NotFiniteError(
            f"step {failed} left NaN or Inf in the parameters or the running averages, or had no "
            "finite loss; the checkpoint before it is kept. A smaller learning rate or a clip_norm "
            "may help"
        )


def _training_figures(state: State) -> dict[str, Any]:
    """Figures of the epoch's steps, in training mode (augmentation, dropout, batch statistics)."""
    sums = jax.tree.map(np.asarray, jax.device_get(state.sums))
    figures = {
        "loss": float(sums.loss / max(sums.losses, 1)),
        "running_given": float(sums.given / sums.examples),
        "running_true": float(sums.true / sums.examples),
        "not_finite": int(sums.dropped),
    }
    if sums.step_size != sums.steps:
        figures["step_size"] = float(sums.step_size / sums.steps)
    counts = sums.omega.sum(1)
    if not counts.any():  # a method that weighs nothing
        return figures
    return {
        **figures,
        "omega_negative": float(sums.negative / sums.steps),
        "omega_effective": float(sums.effective / sums.steps),
        "omega_mean": float(sums.omega_sum.sum() / max(counts.sum(), 1)),
        "omega_by_share": [
            float(total / count) if count else None
            for total, count in zip(sums.omega_sum, counts, strict=True)
        ],
        "omega_histogram": sums.omega.astype(int).tolist(),
    }


def evaluate(program: Program, state: State, problem: Problem) -> dict[str, float]:
    """Test accuracy (several labels: mean average precision); accuracy and loss in training.

    The training set is measured on its first 5,000 examples, without augmentation and dropout,
    against the given and against the true labels.
    """
    dataset = problem.dataset
    train = dataset.train
    part = np.arange(min(len(train), EVALUATED_TRAINING_EXAMPLES))
    scores = predict(program, state, train.take(part))
    return {
        "test": measure(predict(program, state, dataset.test), dataset.test.labels),
        "train_given": measure(scores, train.labels[part]),
        "train_true": measure(scores, problem.true[part]),
        "train_given_loss": cross_entropy(scores, train.labels[part]),
        "train_true_loss": cross_entropy(scores, problem.true[part]),
    }


def evaluate_run(directory: pathlib.Path) -> dict[str, Any]:
    """Measures the newest checkpoint of a run directory as `evaluate` does.

    Raises:
        ConfigError: if there is no run, or no checkpoint yet.
    """
    _, problem, program, state = open_run(directory)
    return {"step": int(state.step), **evaluate(program, state, problem)}


def open_run(directory: pathlib.Path) -> tuple[Config, Problem, Program, State]:
    """The newest checkpoint of a run directory, with what it belongs to.

    Raises:
        ConfigError: if there is no run, or no checkpoint yet.
    """
    file = directory / "config.json"
    if not file.exists():
        raise ConfigError(f"{directory} holds no run: there is no config.json")
    config = Config.from_json(json.loads(file.read_text()))
    problem = load_problem(config)
    program = build_program(config, problem)
    folder = directory / "checkpoints"
    state = None
    if folder.exists():
        with Checkpoints(folder, read_only=True) as checkpoints:
            state = checkpoints.restore(program.init(jax.random.key(0)))
    if state is None:
        raise ConfigError(f"{directory} has no checkpoint yet, or none that can be read")
    return config, problem, program, state


def _network_of(directory: pathlib.Path, state: State) -> State:
    """The state with the network of a run directory's newest checkpoint."""
    *_, trained = open_run(directory)

    def shapes(of: State) -> Any:
        return jax.tree.map(jax.numpy.shape, (of.params, of.batch_stats))

    if shapes(trained) != shapes(state):
        raise ConfigError(f"the network of {directory} is not of the shape that this run trains")
    return state._replace(params=trained.params, batch_stats=trained.batch_stats)


def relabel_run(directory: pathlib.Path, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Labels the training set by a run's network with dropout left on, the paper's noise model.

    "We use the predicted labels of a pre-trained AlexNet to model realistic label noise ... we
    leave dropout active when making the predictions on the training set" (section 5.3).

    Returns:
        (given, true) labels of the training split, int32 [n] each.
    """
    config, problem, program, state = open_run(directory)
    if problem.dataset.multi_label:
        raise ConfigError(f"{config.dataset} has several labels per example: nothing to relabel")
    scores = predict(program, state, problem.dataset.train, dropout=True, seed=seed)
    predicted = np.argmax(scores, axis=-1)
    return noise.model_made(problem.true, predicted, problem.dataset.num_classes), problem.true


def predict(
    program: Program, state: State, split: data.Split, *, dropout: bool = False, seed: int = 0
) -> np.ndarray:
    """Scores [n, classes] of every image of a split, without augmentation.

    Args:
        program: the compiled functions.
        state: with the parameters to use.
        split: the images.
        dropout: leave dropout on.
        seed: of the dropout masks, and of the random crops that some presets average over.
    """
    size = min(_EVALUATION_BATCH, len(split))
    layout, part = program.layout, ()
    if layout is not None:
        size += -size % layout.mesh.size
        part = layout.part((size,))
    key = jax.random.key(seed)
    parts = []
    for i, (_, images, valid) in enumerate(data.in_order(split, size, part=part)):
        batch_key = jax.random.fold_in(key, i)
        if layout is None:
            images = jax.device_put(images)
        else:
            batch_key, images = layout.copy(batch_key), layout.place(images, (size,))
        scores = program.predict(
            state.params, state.batch_stats, images, batch_key, dropout=dropout
        )
        parts.append(jax.device_get(scores)[valid])
    return np.concatenate(parts)


def measure(scores: np.ndarray, labels: np.ndarray) -> float:
    """Accuracy, or mean average precision where examples have several labels; in percent."""
    if labels.ndim == 1:
        return 100 * float(np.mean(np.argmax(scores, -1) == labels))
    from sklearn.metrics import average_precision_score

    present = labels.any(axis=0)
    return 100 * float(average_precision_score(labels[:, present], scores[:, present]))


def cross_entropy(scores: np.ndarray, labels: np.ndarray) -> float:
    """The mean loss of scores as `predict` gives them."""
    if labels.ndim == 1:
        return -float(np.mean(np.take_along_axis(scores, labels[:, None], axis=1)))
    chances = np.maximum(np.where(labels == 1, scores, 1 - scores), np.finfo(np.float32).tiny)
    return -float(np.mean(np.sum(np.log(chances), axis=1)))


def summarize(history: list[dict[str, Any]]) -> dict[str, Any]:
    """The result of a finished run."""
    last = history[-1]
    best = max(history, key=lambda line: line["test"])
    return {
        "test_last": last["test"],
        "test_best": best["test"],
        "best_epoch": best["epoch"],
        "train_noisy": last["train_given"],
        "train_clean": last["train_true"],
        "epochs": last["epoch"],
        "steps": last["step"],
        "seconds": last["seconds"],
    }


def reset_peak_memory() -> None:
    """Lets `peak_memory` start anew, where the system can (Linux)."""
    with contextlib.suppress(OSError):
        pathlib.Path("/proc/self/clear_refs").write_text("5")


def peak_memory() -> float:
    """The most main memory that this process has held at a time, in megabytes of 1e6 bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


@contextlib.contextmanager
def _stop_signals() -> Iterator[Callable[[int], int | None]]:
    """Within, SIGTERM and SIGINT only set what the yielded function of the step returns.

    Once `jax.distributed` has been initialized JAX itself catches SIGTERM, of whichever process,
    and all agree on the step at which they stop. SIGINT then counts as SIGTERM.
    """
    received: list[int] = []
    previous = {}
    several = distributed.is_initialized()
    handlers: dict[int, Any] = {
        signum: lambda number, _: received.append(number)
        for signum in (signal.SIGTERM, signal.SIGINT)
    }
    if several:
        handlers = {signal.SIGINT: lambda number, _: signal.raise_signal(signal.SIGTERM)}
    with contextlib.suppress(ValueError):  # not the main thread: signals stay as they are
        for signum, handler in handlers.items():
            previous[signum] = signal.signal(signum, handler)

    def asked_to_stop(step: int) -> int | None:
        if several:
            return signal.SIGTERM if distributed.preempted(step) else None
        return received[0] if received else None

    try:
        yield asked_to_stop
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)


@contextlib.contextmanager
def _tensorboard(
    directory: pathlib.Path, wanted: bool
) -> Iterator[Callable[[dict[str, Any]], None]]:
    if not wanted:
        yield lambda line: None
        return
    import tensorboardX

    with tensorboardX.SummaryWriter(str(directory / "tensorboard")) as writer:

        def write(line: dict[str, Any]) -> None:
            for name, value in line.items():
                if isinstance(value, (int, float)):
                    writer.add_scalar(name, value, line["step"])
            writer.flush()

        yield write
