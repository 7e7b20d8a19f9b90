"""Networks without the wait: drawing their initial weights costs seconds of compilation."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx


def filled(build, seed=0):
    """The network with every variable drawn by NumPy, batch norm away from its initial values."""
    model = nnx.eval_shape(build)
    draw = np.random.default_rng(seed)

    def value(path, variable):
        shape = variable.shape
        name = path[-1]
        if name == "kernel":
            array = draw.normal(size=shape) * (2 / np.prod(shape[:-1])) ** 0.5
        elif name in ("scale", "var"):
            array = draw.uniform(0.5, 1.5, shape)
        else:
            array = draw.normal(0, 0.2, shape)
        return path, variable.replace(jnp.asarray(array, jnp.float32))

    leaves = nnx.to_flat_state(nnx.state(model, (nnx.Param, nnx.BatchStat)))
    nnx.update(model, nnx.from_flat_state([value(path, leaf) for path, leaf in leaves]))
    return model


def initial(build, *paths):
    """The initial values of these parameters alone; XLA drops the computation of the others."""

    @jax.jit
    def values():
        params = dict(nnx.to_flat_state(nnx.state(build(), nnx.Param)))
        return [params[path].get_value() for path in paths]

    return values()


def call(model, x, key=None):
    """`model(x)`, compiled as one program; `key` for dropout."""

    @nnx.jit
    def apply(model, x, key):
        return model(x, rngs=None if key is None else nnx.Rngs(key))

    return apply(model, jnp.asarray(x), key)


def params_of(model):
    return nnx.to_pure_dict(nnx.state(model, nnx.Param))
