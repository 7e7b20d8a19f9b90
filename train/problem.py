"""What a config trains on: its examples and their labels, those held out, their order."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from train import data, noise, sampler
from train.config import AUTO, Config, ConfigError
from train.description import Description
from train.mesh import Layout
from train.program import Program

_SUBSET = 2  # a stream of random numbers apart from those of the seeds


@dataclasses.dataclass(frozen=True, eq=False)
class Problem:
    """What a config trains on.

    Attributes:
        dataset: its training split is what is trained on, with the given labels.
        held_out: examples that are not, with their given labels; None where there are none.
        true: the true labels of the training split; None where nobody knows them.
        held_out_true: those of the held-out part; None likewise.
        order: which examples make up the mini-batches of each step.
        examples: numbers, in the data set's own training split, of the examples trained on and
            then of those held out, int [n + m].
        names: of these examples: files or, where there are none, numbers.
        network: the name of the network, chosen if the config leaves it open.
        noise: given and true labels of all these in the order of the data set's training split,
            where labels were changed on purpose.
    """

    dataset: data.Dataset
    held_out: data.Split | None
    true: np.ndarray | None
    held_out_true: np.ndarray | None
    order: sampler.Sampler
    examples: np.ndarray
    names: tuple[str, ...]
    network: str
    noise: tuple[np.ndarray, np.ndarray] | None = None

    @property
    def everything(self) -> data.Split:
        """The examples trained on, and then those held out: by the positions of the evidence."""
        if self.held_out is None:
            return self.dataset.train
        return data.concatenate(self.dataset.train, self.held_out)

    @functools.cached_property
    def description(self) -> Description:
        """What a run has to know of its data."""
        return Description.of(self)


_loaded: dict[Any, data.Dataset] = {}  # the last two


def forget() -> None:
    """Lets go of the data sets in memory: what is on the disk may have changed since."""
    _loaded.clear()


def load_dataset(
    config: Config, on_file: Callable[[int, int], None] = lambda done, total: None
) -> data.Dataset:
    """The whole data set of a config; read once, and kept for the next that asks for it.

    Args:
        config: names it.
        on_file: called while the files of a folder are read, with the number done and of all.

    Raises:
        DataNotFoundError: if the data are not there.
        ValueError: if they are damaged, or the choices do not fit them.
    """
    name, folder = config.dataset, config.data_dir
    options: dict[str, Any] = {
        "image_size": config.image_size, "labels": config.labels, "bad_files": config.bad_files,
    }  # fmt: skip
    key = (name, folder, *options.values())
    if key not in _loaded:
        dataset = data.load(name, folder, on_file=on_file, **options)
        while len(_loaded) > 1:
            del _loaded[next(iter(_loaded))]
        _loaded[key] = dataset
    return _loaded[key]


def load_problem(config: Config) -> Problem:
    """Loads the data of a config, makes its noise, holds a part out, orders the rest.

    Raises:
        DataNotFoundError: if the data are not there.
        ValueError: if the choices do not fit the data.
    """
    dataset = load_dataset(config)
    examples = _subset(len(dataset.train), "train_size", config)
    train = _taken(dataset.train, examples)
    test = _taken(dataset.test, _subset(len(dataset.test), "test_size", config))
    if config.pixels != "natural":
        train, test = (_permuted(split, config) for split in (train, test))
    true = train.labels
    given = _given(config, dataset, true)
    known = given is not true  # whether there are true labels beside the given ones
    trained, kept = _hold_out(config, given, _listed(dataset, examples))
    given = given.copy()
    given[trained], order = _order(config, dataset, given[trained], true[trained])

    examples = examples[np.concatenate([trained, kept])]
    names = dataset.train_names
    whole = dataclasses.replace(train, labels=given)
    return Problem(
        dataset=dataclasses.replace(dataset, train=_taken(whole, trained), test=test),
        held_out=whole.take(kept) if len(kept) else None,
        true=true[trained] if known else None,
        held_out_true=true[kept] if known and len(kept) else None,
        order=order,
        examples=examples,
        names=tuple(str(names[i]) for i in examples.tolist()),
        network=choose_network(config, dataset, len(trained)),
        noise=(given, true) if known else None,
    )


def _given(config: Config, dataset: data.Dataset, true: np.ndarray) -> np.ndarray:
    """The labels that noise makes of the data set's own; `true` itself where it makes none."""
    if config.noise.endswith(".npz"):
        return noise.from_file(config.noise, true, dataset.num_classes)
    if config.noise == "none" or config.noise_rate == 0:
        return true
    if dataset.multi_label:
        raise ConfigError(f"noise {config.noise} is for one label per example: take none")
    return noise.corrupt(config.noise, true, config.noise_rate, dataset.num_classes, config.seed)


def _listed(dataset: data.Dataset, examples: np.ndarray) -> np.ndarray | None:
    """The positions, among the examples, of those that a list of labels wants held out."""
    if dataset.held_out is None:
        return None
    return np.flatnonzero(np.isin(examples, dataset.held_out))


def _hold_out(
    config: Config, given: np.ndarray, listed: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    """The positions that are trained on, and those held out: those of a list, or a share of all."""
    every = np.arange(len(given))
    if not config.held_out:
        return every, every[:0]
    kept = listed
    if kept is None:
        kept = sampler.keep_back(given, config.held_out, seed=config.seed)
    if not len(kept):
        raise ConfigError(
            f"held_out = {config.held_out:g}: no class has two examples, so that none can be held "
            "out; give 0 and a method other than coherent"
        )
    return np.setdiff1d(every, kept), kept


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
    """The labels that are trained on, and the order of the examples."""
    k, b, seed = config.k, config.b, config.seed
    if dataset.multi_label and config.validation_ratio:
        raise ConfigError("validation_ratio is for one label per example: take 0")
    if config.order == "random":
        return given, sampler.random(len(given), k, b, seed=seed)
    if dataset.multi_label:
        return given, sampler.multi_label(given, k, b, seed=seed)
    if not config.validation_ratio:
        return given, sampler.stratified(given, k, b, seed=seed, class_names=dataset.class_names)
    validation = sampler.hold_out(given, config.validation_ratio, seed=seed)
    if config.clean_validation:
        given = given.copy()
        given[validation] = true[validation]
    return given, sampler.separate_validation(
        given,
        k,
        b,
        validation,
        seed=seed,
        num_validation=config.num_validation,
        class_names=dataset.class_names,
    )


# -------------------------------------------------------------------------------- the network

# Sides in pixels between which the small residual network is at home, and how many images a large
# network needs.
_SMALLEST, _LARGEST, _MANY = 9, 96, 20_000


def choose_network(config: Config, dataset: data.Dataset, num_examples: int) -> str:
    """The network of a config, by the size and number of the images where it names none.

    Images of up to 8 pixels a side, as scikit-learn's digits, get the `mlp`. Others get
    `resnet_small`, which a CPU trains in minutes at 64 pixels; from 20,000 images of more than 96
    pixels on it is `resnet50`.
    """
    if config.network != AUTO:
        return config.network
    if config.hidden is not None:
        return "mlp"
    if config.weights_file is not None:
        return "resnet50"
    side = max(dataset.image_shape[:2])
    if side < _SMALLEST:
        return "mlp"
    return "resnet50" if side > _LARGEST and num_examples >= _MANY else "resnet_small"


# ---------------------------------------------------------------------------- its functions


def build_program(config: Config, problem: Problem, layout: Layout | None = None) -> Program:
    """The compiled functions for a problem, on one device or on the mesh of a layout."""
    return problem.description.program(config, layout)
