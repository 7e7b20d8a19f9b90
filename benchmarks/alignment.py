"""What `example_alignment` costs: against the forward pass whose losses it also computes."""

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import models
import optax_bilevel
from benchmarks.steps import Case, PyTree
from benchmarks.timing import Timing, compare


def measure(case: Case, rounds: int = 9) -> dict[str, Timing]:
    """Times a forward pass in evaluation mode over all k·b examples, and two ways to alignments.

    Returns:
        Timings of the losses alone ("forward"), of `example_alignment`, and, as what else a user
        could do, of the gradients of all examples by ``vmap(grad)`` with their inner products.
    """
    model = models.create(
        case.network, num_classes=10, input_shape=case.input_shape, rngs=nnx.Rngs(0)
    )
    model.eval()
    graph, params, stats = nnx.split(model, nnx.Param, ...)
    b = case.k * case.b

    def forward(params: PyTree, batch: PyTree, direction: PyTree | None = None) -> jax.Array:
        logits = nnx.merge(graph, params, stats, copy=True)(batch["image"])
        return optax.losses.softmax_cross_entropy_with_integer_labels(logits, batch["label"])

    def alignment(params: PyTree, batch: PyTree, direction: PyTree) -> jax.Array:
        return optax_bilevel.example_alignment(forward, params, batch, direction)

    def by_gradients(params: PyTree, batch: PyTree, direction: PyTree) -> jax.Array:
        def dot(example: PyTree) -> jax.Array:
            one = jax.tree.map(lambda x: x[None], example)
            grads = jax.grad(lambda p: forward(p, one)[0])(params)
            return jnp.asarray(optax.tree.vdot(grads, direction))

        return jax.vmap(dot)(batch)

    key = jax.random.key(1)
    batch = {
        "image": jax.random.normal(key, (b, *case.input_shape)),
        "label": jax.random.randint(key, (b,), 0, 10),
    }
    direction = jax.tree.map(lambda x: jax.random.normal(key, jnp.shape(x)), params)
    candidates = {
        "forward": forward,
        "example_alignment": alignment,
        "vmap_grad": by_gradients,
    }
    return compare(candidates, (params, batch, direction), rounds)
