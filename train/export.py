"""A trained network apart from its run: two files that need neither the run nor its data.

=================  =================================================================================
model.safetensors  parameters and batch statistics, named as in the module tree:
                   ``blocks.0.conv1.kernel``
model.json         which network, its options, the classes in order, the pictures that it takes and
                   what is done to them, how it was trained, versions
=================  =================================================================================
"""

import contextlib
import dataclasses
import importlib.metadata
import json
import pathlib
import platform
from collections.abc import Iterator
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from flax import nnx

import models
from train import augment, saved
from train.config import ConfigError
from train.data.images import Fit
from train.files import write_text
from train.run_directory import read_metrics
from train.state import Best, State

WEIGHTS, DESCRIPTION = "model.safetensors", "model.json"
FORMAT = 1
WHITE = 255  # of a decoded picture
_PACKAGES = ("optax-bilevel", "jax", "flax", "numpy", "pillow", "safetensors")

Epoch = Literal["best", "last"]


@dataclasses.dataclass(frozen=True)
class Model:
    """A trained network and what is needed to use it; the fields of model.json, and the weights.

    Attributes:
        network: its name, for `models.create`.
        options: further arguments of `models.create`, as far as they are not the defaults.
        class_names: in the order of the scores.
        image_shape: (height, width, channels) that a picture is brought to.
        input_shape: what the network itself takes, after the preset's crop.
        fit: how it is brought there, as in `train.data.images`.
        ranges: the values that become black and white, by kind of picture of more than 8 bits;
            `train.data.images.convert` takes them.
        preset: what is done to its pixels then, by name (`train.augment.preset`).
        multi_label: whether a picture may have several labels.
        trained: the epoch and what was measured at its end.
        arrays: parameters and batch statistics by name, NumPy.
    """

    network: str
    options: dict[str, Any]
    class_names: tuple[str, ...]
    image_shape: tuple[int, int, int]
    input_shape: tuple[int, int, int]
    fit: Fit
    ranges: dict[str, tuple[float, float]]
    preset: str
    multi_label: bool
    trained: dict[str, Any]
    arrays: dict[str, np.ndarray]

    def build(self) -> models.Network:
        """The network with its weights, in evaluation mode.

        Raises:
            ValueError: if the weights are not those of the network, naming the first that differs.
        """
        model = nnx.eval_shape(
            lambda: models.create(
                self.network,
                num_classes=len(self.class_names),
                input_shape=self.input_shape,
                rngs=nnx.Rngs(0),
                **self.options,
            )
        )
        wanted = named(model)
        for name in (*wanted, *self.arrays):
            here = wanted[name].shape if name in wanted else None
            came = self.arrays[name].shape if name in self.arrays else None
            if here != came:
                raise ValueError(
                    f"{WEIGHTS} does not fit {DESCRIPTION}: {self.network} has {name} of shape "
                    f"{here}, the file {came}"
                )
        state = nnx.state(model, (nnx.Param, nnx.BatchStat))
        filled = [
            (path, leaf.replace(jnp.asarray(self.arrays[_name(path)], leaf.dtype)))
            for path, leaf in nnx.to_flat_state(state)
        ]
        nnx.update(model, nnx.from_flat_state(filled))
        model.eval()
        return model


def named(model: models.Network) -> dict[str, Any]:
    """Parameters and batch statistics by their names in the module tree, in its order."""
    state = nnx.state(model, (nnx.Param, nnx.BatchStat))
    return {_name(path): leaf for path, leaf in nnx.to_flat_state(state)}


def _name(path: tuple) -> str:
    return ".".join(map(str, path))


def load_model(directory: pathlib.Path) -> Model:
    """The network of a run directory or of an export, whichever it is.

    Raises:
        ConfigError: if it is neither, or is damaged; if the run has no checkpoint yet.
    """
    if (directory / "config.json").exists():
        return from_run(directory)
    if (directory / DESCRIPTION).exists():
        return load(directory)
    raise ConfigError(
        f"{directory} is neither a run directory nor an export: there is no config.json and no "
        f"{DESCRIPTION}"
    )


def from_run(directory: pathlib.Path, epoch: Epoch = "best") -> Model:
    """The network of a run: of its best epoch by held-out labels, or of its newest checkpoint.

    Where nothing is held out nobody knows the best epoch, and it is the newest checkpoint.

    Raises:
        ConfigError: if there is no run, or no checkpoint yet.
    """
    run = saved.open_run(directory)
    config, data = run.config, run.description
    state = run.network if epoch == "best" else run.state
    leaves = [*nnx.to_flat_state(state.params), *nnx.to_flat_state(state.batch_stats)]
    every = {_name(path): np.asarray(leaf.get_value()) for path, leaf in leaves}
    if config.method == "noise_layer":  # the channel behind the network is for training alone
        every = {
            name.removeprefix("network."): array
            for name, array in every.items()
            if name.startswith("network.")
        }
    options = {
        name: value
        for name, value, default in (
            ("hidden", config.hidden and list(config.hidden), None),
            ("dropout_rate", config.dropout_rate, None),
            ("dtype", config.dtype, "float32"),
        )
        if value != default
    }
    preset = augment.preset(config.augmentation, data.image_shape)
    return Model(
        network=data.network,
        options=options,
        class_names=data.class_names,
        image_shape=data.image_shape,
        input_shape=preset.shape,
        fit=data.fit,
        ranges={kind: (low, high) for kind, (low, high) in data.ranges.items()},
        preset=config.augmentation,
        multi_label=data.multi_label,
        trained=_trained(run, state, epoch),
        arrays=every,
    )


def _trained(run: saved.Saved, state: State | Best, epoch: Epoch) -> dict[str, Any]:
    """The epoch, how it was chosen, and what was measured at its end."""
    step = int(state.step)
    chosen = epoch == "best" and state is run.state.best
    trained: dict[str, Any] = {
        "method": run.config.method,
        "epoch": step // run.description.steps_per_epoch,
        "of_epochs": run.config.epochs,
        "chosen_by": "held-out labels" if chosen else "being the last",
    }
    for line in read_metrics(run.directory):
        if line["step"] == step:
            trained |= {name: line[name] for name in ("held_out", "test") if name in line}
    return trained


def save(model: Model, directory: pathlib.Path) -> None:
    """Writes model.safetensors and model.json, in place of earlier ones.

    Raises:
        ConfigError: if the folder holds a run, which has files of its own, or cannot be written
            to.
    """
    if (directory / "config.json").exists():
        raise ConfigError(f"{directory} is a run directory: give --out a folder for the export")
    about = {
        "format": FORMAT,
        "network": model.network,
        "options": model.options,
        "num_classes": len(model.class_names),
        "class_names": model.class_names,
        "image_shape": model.image_shape,
        "input_shape": model.input_shape,
        "fit": model.fit,
        "ranges": model.ranges,
        "max_value": WHITE,
        "preset": model.preset,
        "normalization": augment.normalization(model.preset, WHITE),
        "multi_label": model.multi_label,
        "trained": model.trained,
        "versions": {
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in _PACKAGES},
        },
    }
    text = json.dumps(about, indent=1, ensure_ascii=False) + "\n"
    with writing(directory):
        directory.mkdir(parents=True, exist_ok=True)
        # The old description goes first and the new one comes last: never one with other weights.
        (directory / DESCRIPTION).unlink(missing_ok=True)
        temporary = directory / f"{WEIGHTS}.new"
        try:
            temporary.write_bytes(safetensors.numpy.save(model.arrays))
            temporary.replace(directory / WEIGHTS)
        finally:
            temporary.unlink(missing_ok=True)
        write_text(directory / DESCRIPTION, text)


@contextlib.contextmanager
def writing(place: pathlib.Path) -> Iterator[None]:
    """Within, what the system says against writing to --out becomes a ConfigError."""
    try:
        yield
    except OSError as error:
        raise ConfigError(
            f"cannot write to {place} ({error.strerror}): give --out a place that can be written to"
        ) from error


def load(directory: pathlib.Path) -> Model:
    """Reads what `save` wrote.

    Raises:
        ConfigError: naming the file, and what is wrong with it.
    """
    file = directory / DESCRIPTION
    try:
        about = json.loads(file.read_text(encoding="utf-8"))
        if about["format"] != FORMAT:
            raise ConfigError(
                f"{file} has format {about['format']}, and this version reads {FORMAT}: export "
                "the run again"
            )
        fields = {
            field.name: about[field.name]
            for field in dataclasses.fields(Model)
            if field.name != "arrays"
        }
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ConfigError(f"{file} is damaged, export the run again: {error!r}") from error
    for name in ("class_names", "image_shape", "input_shape"):
        fields[name] = tuple(fields[name])
    fields["ranges"] = {kind: tuple(values) for kind, values in fields["ranges"].items()}
    file = directory / WEIGHTS
    try:
        arrays = safetensors.numpy.load_file(file)
    except FileNotFoundError as error:
        raise ConfigError(f"{file} is missing: export the run again") from error
    except safetensors.SafetensorError as error:
        raise ConfigError(f"{file} is damaged, export the run again: {error}") from error
    return Model(**fields, arrays=arrays)
