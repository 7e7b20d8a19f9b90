"""The compiled functions of a run."""

import dataclasses
import functools
from typing import Any

import jax
import optax
from flax import nnx
from jax.core import Tracer
from jax.sharding import SingleDeviceSharding

import models
from train import augment, methods, optimizers
from train.config import AUTO, Config, ConfigError
from train.mesh import Layout
from train.state import State
from train.step import Step, create_network


@dataclasses.dataclass(frozen=True)
class Program:
    """The functions of a run; the same for all its seeds.

    Attributes:
        init: ``key -> State``.
        step: ``(state, raw_batch, key) -> state``; donates the state. On one device a `Resident`
            may stand for the batch.
        predict: ``(params, batch_stats, images uint8 [n, h, w, c], key) -> scores [n, classes]``,
            log-probabilities (several labels: probabilities), averaged over views; with
            ``dropout=True`` dropout stays on.
        new_epoch: ``(state, Measured) -> state``: its sums at zero, its best epoch up to
            date; donates the state.
        like: a `State` of shapes, dtypes and shardings, for a checkpoint to be read into.
        how: a line that says how the method computes.
        layout: how the steps lie on a mesh; None on one device. States, batches and keys must lie
            on it (`Layout.place`, `Layout.copy`).
        copies: how many of a step's mini-batches are also to be handed over whole to every device
            of the mesh (`RawBatch.copies`).
        judges: how many held-out examples are to be handed over with a step (`RawBatch.judges`).
    """

    init: Any
    step: Any
    predict: Any
    new_epoch: Any
    like: State
    how: str
    layout: Layout | None = None
    copies: int = 0
    judges: int = 0


def build(
    config: Config,
    *,
    image_shape: tuple[int, int, int],
    max_value: int,
    num_classes: int,
    multi_label: bool,
    steps_per_epoch: int,
    layout: Layout | None = None,
    num_train: int = 0,
    num_held_out: int = 0,
) -> Program:
    """Builds the functions of a run; configs that differ in seed and labels alone share them.

    Args:
        config: names its network.
        image_shape, max_value: of the images.
        num_classes, multi_label: of the labels.
        steps_per_epoch: number of steps.
        layout: the mesh that they work on; None: one device.
        num_train, num_held_out: how many examples are trained on and held out; the steps gather
            evidence about each. 0: about none.

    Raises:
        ValueError: if the choices do not fit the images or the devices.
    """
    if config.network == AUTO:
        raise ValueError("the network must be named: train.problem.choose_network chooses one")
    return _build(
        dataclasses.replace(config, seed=0, noise="none", noise_rate=0.0),
        image_shape,
        max_value,
        num_classes,
        multi_label,
        steps_per_epoch,
        layout,
        num_train,
        num_held_out,
    )


@functools.lru_cache(maxsize=8)
def _build(
    config: Config,
    image_shape: tuple[int, int, int],
    max_value: int,
    num_classes: int,
    multi_label: bool,
    steps_per_epoch: int,
    layout: Layout | None,
    num_train: int,
    num_held_out: int,
) -> Program:
    if config.example_alignment and multi_label:
        raise ConfigError(
            f"example_alignment is for one label per image, and {config.dataset} has several"
        )
    preset = augment.preset(config.augmentation, image_shape, max_value)
    network = nnx.eval_shape(
        lambda: create_network(config, preset.shape, num_classes, jax.random.key(0))
    )
    parameters = nnx.state(network, nnx.Param)
    task = methods.Task(num_classes, multi_label, steps_per_epoch, parameters, layout, num_train)
    method = methods.make(config, task)
    optimizer = method.optimizer(optimizers.make(config, steps_per_epoch))
    functions = Step(
        config=config,
        preset=preset,
        method=method,
        tx=optax.with_extra_args_support(optimizer),
        graph=nnx.graphdef(nnx.eval_shape(method.network, network)),
        num_classes=num_classes,
        multi_label=multi_label,
        num_train=num_train,
        num_held_out=num_held_out,
        layout=layout,
    )

    like = jax.eval_shape(functions.init, jax.random.key(0))
    on_mesh: dict[str, Any] = {}
    scores_on_mesh: dict[str, Any] = {}
    if layout is None:
        alone = SingleDeviceSharding(jax.devices()[0])
        shardings = jax.tree.map(lambda _: alone, like)
    else:
        shardings = _shardings(layout, like)
        on_mesh, scores_on_mesh = ({"out_shardings": s} for s in (shardings, layout.replicated))
    # Initial weights are drawn once. On a CPU their program compiles with all optimizations in 22 s
    # for resnet_small and with fewer in 5 s, for the same bits.
    cpu = next(iter(jax.tree.leaves(shardings)[0].device_set)).platform == "cpu"
    quickly = {"xla_backend_optimization_level": 1} if cpu else None
    # On its device, as what a checkpoint or another run gives: mixed, a step would compile twice.
    start = jax.jit(functions.init, compiler_options=quickly, out_shardings=shardings)

    def init(key: jax.Array) -> State:
        if config.weights_file is None:
            # Traced, it is a part of another program, which has options of its own.
            return (functions.init if isinstance(key, Tracer) else start)(key)
        model = functions.create(key)
        assert isinstance(model, models.ResNet50)
        models.load_pretrained(model, config.weights_file, replace_head=num_classes != 1000)
        state = functions.state_of(model)
        return state if layout is None else layout.copy(state, shardings)

    return Program(
        init=init,
        step=jax.jit(functions.step, donate_argnums=0, **on_mesh),
        predict=jax.jit(functions.predict, static_argnames="dropout", **scores_on_mesh),
        new_epoch=jax.jit(functions.new_epoch, donate_argnums=0, **on_mesh),
        like=jax.tree.map(
            lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
            like,
            shardings,
        ),
        how=method.how,
        layout=layout,
        copies=method.copies,
        judges=method.judges,
    )


def _shardings(layout: Layout, state: State) -> State:
    """Where the state is kept: what is like the parameters as they are, the rest everywhere."""
    shardings = jax.tree.map(lambda _: layout.replicated, state)
    return shardings._replace(
        params=layout.parameter_shardings(state.params),
        opt_state=layout.parameter_shardings(state.opt_state),
        method=layout.parameter_shardings(state.method),
        best=layout.parameter_shardings(state.best),
    )
