"""The interface of a method."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import optax

import models
from train.mesh import Layout

PyTree = Any


class Batch(NamedTuple):
    """One mini-batch, or k of them along a leading axis.

    Attributes:
        images: float32 [b, h, w, c], augmented.
        labels: the given labels, int32 [b], or [b, classes] of 0 and 1; for a criterion of a
            method's own, any pytree whose leaves lead with b.
        key: the random key of the mini-batch's dropout, and of what a method draws, [].
        copies: beside k mini-batches on a mesh, the first of them again, whole on every device, as
            many as `Method.copies` asks for.
        indices: which training examples they are, int32 [b], where `Method.by_example` asks for it.
    """

    images: jax.Array
    labels: Any
    key: jax.Array
    copies: Any = None
    indices: Any = None


class Task(NamedTuple):
    """What a method may need to know of the run beside its config.

    Attributes:
        num_classes: of the labels.
        multi_label: whether an example can have several labels.
        steps_per_epoch: number of steps.
        parameters: the network's, arrays or abstract ones.
        layout: how the mini-batches lie on a mesh of devices; None on one device. The arrays that
            a method gets lie so; what it does not map itself the compiler maps.
        num_examples: how many examples are trained on.
    """

    num_classes: int
    multi_label: bool
    steps_per_epoch: int
    parameters: PyTree
    layout: Layout | None = None
    num_examples: int = 0


class Aux(NamedTuple):
    """What the network makes of a mini-batch, beside its loss.

    Attributes:
        logits: float32 [b, classes].
        batch_stats: the running averages, updated by this mini-batch.
        recorded: what modules of `Method.network` have kept as `nnx.Intermediate`.
    """

    logits: jax.Array
    batch_stats: PyTree
    recorded: PyTree = ()


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """The loss of each example, [b].

    Args:
        logits: float32 [b, classes].
        labels: int32 [b]; or [b, classes] of 0 and 1, whose binary cross-entropies are summed.
    """
    if labels.ndim == logits.ndim:
        losses = optax.losses.sigmoid_binary_cross_entropy(logits, labels)
        return jnp.sum(losses, axis=-1)
    return optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels)


class LossFn(Protocol):
    """The mean loss of one mini-batch; what a method that changes the loss wraps.

    ``criterion(logits, labels) -> [b]`` is the loss of each example.
    """

    def __call__(
        self,
        params: PyTree,
        batch: Batch,
        criterion: Callable[[jax.Array, Any], jax.Array] = cross_entropy,
    ) -> tuple[jax.Array, Aux]:
        """The loss, [], and what came of the mini-batch beside it."""
        ...


class Gradient(NamedTuple):
    """What a method makes of a step.

    Attributes:
        losses: of each mini-batch, [k] (SGD: [1]).
        aux: an `Aux` of each mini-batch, leaves [k, ...] (SGD: [1, ...]).
        grads: the gradient to descend, like the parameters.
        weights: ω̂ [k], 0 in validation slots; None where nothing is weighed.
        state: the method's state after the step, of the same structure, shapes and dtypes.
    """

    losses: jax.Array
    aux: Any
    grads: PyTree
    weights: jax.Array | None
    state: PyTree = ()


GradientFn = Callable[[LossFn, PyTree, Batch, PyTree], Gradient]
"""``(loss_fn, params, batches, state) -> Gradient``, a pure function; see `Method`."""

Optimizer = optax.GradientTransformation


@dataclasses.dataclass(frozen=True)
class Method:
    """A method, made for a run: a gradient and, if it likes, a wrapper of the optimizer.

    Attributes:
        gradient: ``(loss_fn, params, batches, state) -> Gradient``, a pure function. Leaves of
            `batches` lead with [k, b], but for the mini-batches' random keys [k].
        how: a line that says how it computes.
        init: ``params -> state``; what a method without a state of its own leaves out. The state
            is a part of the checkpoint.
        network: wraps the network, for a method that trains parameters of its own; they are the
            optimizer's like the others. Evaluation sees the wrapper in evaluation mode.
        optimizer: wraps the run's whole optimizer, learning rate and decay included.
        judges: of how many held-out examples every update is handed the losses, as the argument
            ``losses_fn``, a function of the parameters; 0: it is not.
        judged_by: ``(logits, labels) -> [n]``, these losses.
        copies: of how many mini-batches, the first ones, every device of a mesh needs the whole.
        by_example: whether it keeps something of every example, and must know which it is given.
    """

    gradient: GradientFn
    how: str
    init: Callable[[PyTree], PyTree] = lambda params: ()
    network: Callable[[models.Network], models.Network] = lambda network: network
    optimizer: Callable[[Optimizer], Optimizer] = lambda optimizer: optimizer
    judges: int = 0
    judged_by: Callable[[jax.Array, jax.Array], jax.Array] = cross_entropy
    copies: int = 0
    by_example: bool = False
