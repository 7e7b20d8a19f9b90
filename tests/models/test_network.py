"""The training step that `Network` promises: a pure function of pytrees."""

from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import models
from tests.models.building import filled

K, B = 3, 4
LossFn = Callable[[Any, Any], tuple[jax.Array, Any]]


class Small(models.Network):
    """Batch norm and dropout in as few operations as can be."""

    def __init__(self, num_classes, input_shape, *, rngs, dtype=jnp.float32, dropout_rate=0.5):
        super().__init__(num_classes, input_shape, dropout_rate)
        self.fc = nnx.Linear(64, 32, dtype=dtype, rngs=rngs)
        self.bn = nnx.BatchNorm(32, momentum=0.9, dtype=dtype, rngs=rngs)
        self.head = nnx.Linear(32, num_classes, dtype=dtype, rngs=rngs)

    def logits(self, x, rngs):
        x = nnx.relu(self.bn(self.fc(x.reshape(x.shape[0], -1))))
        return self.head(self.dropout(x, rngs=rngs))


def setup(build, size=8) -> tuple[LossFn, Any, Any, dict[str, jax.Array]]:
    graphdef, params, batch_stats = nnx.split(filled(build), nnx.Param, ...)

    def loss_fn(params, batch):
        model = nnx.merge(graphdef, params, batch_stats, copy=True)
        logits = model(batch["image"], rngs=nnx.Rngs(batch["key"]))
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
        return loss.mean(), nnx.state(model, nnx.BatchStat)

    key = jax.random.key(7)
    batches = {
        "image": jax.random.normal(key, (K, B, size, size, 1)),
        "label": jax.random.randint(key, (K, B), 0, 5),
        "key": jax.random.split(key, K),
    }
    return loss_fn, params, batch_stats, batches


def small(**options):
    return setup(lambda: Small(5, (8, 8, 1), rngs=nnx.Rngs(0), **options))


def named(name, size, **options):
    def build():
        return models.create(
            name, num_classes=5, input_shape=(size, size, 1), rngs=nnx.Rngs(0), **options
        )

    return setup(build, size)


def first(batches):
    return jax.tree.map(lambda x: x[0], batches)


@pytest.mark.parametrize(
    "case",
    [
        small,
        pytest.param(lambda: named("cifarnet", 8), marks=pytest.mark.slow, id="cifarnet"),
        pytest.param(
            lambda: named("preact_resnet18", 8, dropout_rate=0.3),
            marks=pytest.mark.slow,
            id="preact_resnet18",
        ),
    ],
)
def test_vmap_loop_and_scan_agree(case):
    loss_fn, params, batch_stats, batches = case()
    grad_fn = jax.value_and_grad(loss_fn, has_aux=True)

    @jax.jit
    def stacked(params, batches):
        return jax.vmap(grad_fn, in_axes=(None, 0))(params, batches)

    @jax.jit
    def unrolled(params, batches):
        each = [grad_fn(params, jax.tree.map(lambda x, i=i: x[i], batches)) for i in range(K)]
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *each)

    @jax.jit
    def scanned(params, batches):
        return jax.lax.scan(lambda _, batch: (None, grad_fn(params, batch)), None, batches)[1]

    (losses, stats), grads = stacked(params, batches)
    assert losses.shape == (K,)
    assert len(set(losses.tolist())) == K
    assert jax.tree.structure(grads) == jax.tree.structure(params)
    assert jax.tree.structure(stats) == jax.tree.structure(batch_stats)
    for other in (unrolled, scanned):
        (other_losses, other_stats), other_grads = other(params, batches)
        np.testing.assert_allclose(losses, other_losses, rtol=1e-5)
        chex.assert_trees_all_close(stats, other_stats, atol=1e-5, rtol=1e-4)
        chex.assert_trees_all_close(grads, other_grads, atol=2e-5, rtol=1e-3)
    # Each mini-batch moved the running averages its own way.
    for path, leaf in nnx.to_flat_state(stats):
        assert not np.allclose(leaf[0], leaf[1], rtol=0, atol=1e-6), path


def test_dropout_masks_follow_the_key():
    loss_fn, params, _, batches = small()
    loss = jax.jit(lambda batch: loss_fn(params, batch)[0])
    batch = first(batches)
    assert loss(batch) == loss(batch)
    assert loss(batch) != loss({**batch, "key": batches["key"][1]})


def test_nothing_changes_outside():
    loss_fn, params, batch_stats, batches = small()
    before = jax.tree.map(np.array, (params, batch_stats))
    _, moved = loss_fn(params, first(batches))
    chex.assert_trees_all_equal(before, jax.tree.map(np.array, (params, batch_stats)))
    assert not np.array_equal(moved["bn"]["mean"][...], batch_stats["bn"]["mean"][...])


def test_evaluation_after_training():
    loss_fn, params, _, batches = small()
    _, stats = loss_fn(params, first(batches))
    model = nnx.eval_shape(lambda: Small(5, (8, 8, 1), rngs=nnx.Rngs(1)))
    nnx.update(model, params, stats)
    model.eval()
    images = batches["image"][0]
    logits = model(images)
    # Each image by itself: nothing depends on the rest of the batch.
    np.testing.assert_allclose(model(images[:1]), logits[:1], atol=1e-5)
    assert (model.bn.mean[...] == stats["bn"]["mean"][...]).all()
    model.train()
    assert not np.allclose(model(images, rngs=nnx.Rngs(0)), logits, atol=1e-2)


@pytest.mark.parametrize(
    "case",
    [
        small,
        pytest.param(
            lambda **options: named("cifarnet", 8, **options), marks=pytest.mark.slow, id="cifarnet"
        ),
    ],
)
def test_bfloat16_gradients_are_float32_and_close(case):
    loss_fn, params, _, batches = case(dropout_rate=0.0)
    low_fn, *_ = case(dropout_rate=0.0, dtype=jnp.bfloat16)
    batch = first(batches)
    grads = jax.jit(jax.grad(loss_fn, has_aux=True))(params, batch)[0]
    low, stats = jax.jit(jax.grad(low_fn, has_aux=True))(params, batch)
    assert {leaf.dtype for leaf in jax.tree.leaves((low, stats))} <= {jnp.dtype(jnp.float32)}
    exact, rounded = grads["head"]["kernel"][...], low["head"]["kernel"][...]
    error = jnp.linalg.norm(rounded - exact) / jnp.linalg.norm(exact)
    assert 1e-5 < error < 0.02
    # Further down rounding flips a ReLU here and there: with four images a unit that flips moves
    # a layer's gradient by some percent, the direction of the whole by little.
    cosine = optax.tree.vdot(low, grads) / optax.tree.norm(low) / optax.tree.norm(grads)
    assert cosine > 0.99


def test_base_class_is_no_network():
    with pytest.raises(NotImplementedError):
        models.Network(2, (4, 4, 1), 0.0)(jnp.zeros((1, 4, 4, 1)))
