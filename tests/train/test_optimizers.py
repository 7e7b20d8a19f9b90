from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.train import tiny
from train import optimizers
from train.config import Config
from train.run_directory import read_metrics
from train.trainer import train

PARAMS = {"head": {"kernel": jnp.array([1.0, -2.0]), "bias": jnp.array([3.0])}}
GRADS = {"head": {"kernel": jnp.array([0.5, 0.1]), "bias": jnp.array([-1.0])}}


def moved(tx, steps=3) -> Any:
    """Where some steps lead."""
    params, state = PARAMS, tx.init(PARAMS)
    for _ in range(steps):
        updates, state = tx.update(GRADS, state, params)
        params = optax.apply_updates(params, updates)
    return params


@pytest.mark.parametrize("name", optimizers.NAMES)
def test_an_optimizer_is_the_one_of_optax_at_its_own_learning_rate(name):
    config = Config(optimizer=name, schedule="constant")
    options = {"momentum": 0.9} if name == "sgd" else {}
    if name in optimizers.DECOUPLED:
        options["weight_decay"] = 0.0  # the default here, not optax's
    expected = getattr(optax, name)(optimizers.RATES[name], **options)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6),
        moved(optimizers.make(config, 4)),
        moved(expected),
    )
    other = moved(optimizers.make(Config(optimizer=name, learning_rate=0.02), 4))
    assert abs(other["head"]["bias"] - moved(expected)["head"]["bias"]) > 1e-4


@pytest.mark.parametrize("name", optimizers.NAMES)
def test_kernels_alone_are_decayed(name):
    plain, decayed = (
        moved(optimizers.make(Config(optimizer=name, weight_decay=decay, schedule="constant"), 4))
        for decay in (0.0, 0.1)
    )
    np.testing.assert_array_equal(plain["head"]["bias"], decayed["head"]["bias"])
    assert (plain["head"]["kernel"] != decayed["head"]["kernel"]).any()
    if name in optimizers.DECOUPLED:  # by the rate times the decay, whatever the gradient
        tx = optimizers.make(Config(optimizer=name, weight_decay=0.1, schedule="constant"), 4)
        one, without = moved(tx, 1), moved(optimizers.make(Config(optimizer=name), 4), 1)
        difference = one["head"]["kernel"] - without["head"]["kernel"]
        expected = -optimizers.RATES[name] * 0.1 * PARAMS["head"]["kernel"]
        np.testing.assert_allclose(difference, expected, rtol=0.02)


@pytest.mark.parametrize("name", optimizers.NAMES)
def test_every_optimizer_has_a_schedule(name):
    rate = optimizers.learning_rate(Config(optimizer=name, epochs=8, decay=0.5), 4)
    base = optimizers.RATES[name]
    assert [rate(step) for step in (0, 3, 4, 8)] == pytest.approx([base, base, base / 2, base / 4])


def test_the_direction_is_the_optimizers_average_of_gradients():
    for name in optimizers.MOMENTUM:
        tx = optimizers.make(Config(optimizer=name), 4)
        _, state = tx.update(GRADS, tx.init(PARAMS), PARAMS)
        direction = optimizers.direction(state)
        scale = direction["head"]["bias"] / GRADS["head"]["bias"]
        np.testing.assert_allclose(
            direction["head"]["kernel"], scale * GRADS["head"]["kernel"], rtol=1e-5
        )
    tx = optimizers.make(Config(optimizer="rmsprop"), 4)
    with pytest.raises(ValueError, match="no average of gradients"):
        optimizers.direction(tx.init(PARAMS))


@pytest.mark.parametrize("method", ["coherent", pytest.param("uniform", marks=pytest.mark.slow)])
def test_a_run_with_adamw_learns(tmp_path, method):
    config = tiny.config(
        method=method, optimizer="adamw", learning_rate=0.01, weight_decay=0.01, epochs=8,
        noise="none", augmentation="standardize",
    )  # fmt: skip
    train(config, tmp_path, tiny.options(checkpoint_seconds=60))
    first, *_, last = read_metrics(tmp_path)
    assert last["loss"] < 0.7 * first["loss"]
