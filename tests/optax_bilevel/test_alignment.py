"""One forward-mode pass against the gradients of single examples, formed one by one."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import optax_bilevel
from benchmarks import timing
from tests.optax_bilevel.problems import batches_of, outputs, params_of

B = 6


def losses(params, batch):
    return jnp.mean(jnp.square(outputs(params, batch["x"]) - batch["y"]), axis=-1)


def examples(b=B, seed=1):
    return jax.tree.map(lambda x: x[0], batches_of(1, b, seed))


def direction_like(params, seed=5):
    rng = np.random.default_rng(seed)

    def draw(x):
        v = rng.normal(size=x.shape)
        if jnp.iscomplexobj(x):
            v = v + 1j * rng.normal(size=x.shape)
        return jnp.asarray(v, x.dtype)

    return jax.tree.map(draw, params)


def convolutional(params, batch):
    """Convolution, batch norm in evaluation mode, ReLU, mean over pixels, cross-entropy."""
    x = batch["x"]
    for layer, mean in zip(params["layers"], (0.1, -0.2), strict=True):
        x = jax.lax.conv_general_dilated(
            x, layer["kernel"], (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        normed = (x - mean) * jax.lax.rsqrt(jnp.float32(0.5 + 1e-3))
        x = jax.nn.relu(
            normed * layer["scale"][None, None, None] + layer["shift"][None, None, None]
        )
    logits = jnp.mean(x, axis=(1, 2)) @ params["head"]
    return optax.losses.softmax_cross_entropy_with_integer_labels(logits, batch["y"])


def convolutional_problem(b=B):
    rng = np.random.default_rng(0)

    def layer(size, channels, out):
        kernel = 0.3 * rng.normal(size=(size, size, channels, out))
        scale, shift = rng.uniform(0.5, 1.5, out), 0.3 * rng.normal(size=out)
        arrays = {"kernel": kernel, "scale": scale, "shift": shift}
        return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), arrays)

    head = jnp.asarray(rng.normal(size=(5, 3)), jnp.float32)
    params = {"layers": [layer(3, 2, 4), layer(3, 4, 5)], "head": head}
    x = jnp.asarray(rng.normal(size=(b, 8, 8, 2)), jnp.float32)
    return params, {"x": x, "y": jnp.asarray(rng.integers(0, 3, b), jnp.int32)}


def one_by_one(loss_fn, params, batch, direction):
    """Re⟨∇ℓ_e, v⟩ from explicit gradients, summed in float64."""

    def single(params, example):
        return loss_fn(params, jax.tree.map(lambda x: x[None], example))[0]

    return dots(jax.jit(jax.vmap(jax.grad(single), in_axes=(None, 0)))(params, batch), direction)


def dots(stack, direction):
    """Re⟨g_e, v⟩ of a stack, in float64."""
    total = np.zeros(())
    for g, v in zip(jax.tree.leaves(stack), jax.tree.leaves(direction), strict=True):
        g = np.asarray(g, np.complex128).reshape(len(g), -1)
        total = total + np.real(np.conj(g) @ np.asarray(v, np.complex128).ravel())
    return total


def one_row(tree):
    return jax.tree.map(lambda x: x[None], tree)


def alignment(loss_fn, *arguments, **options):
    return jax.jit(lambda *a: optax_bilevel.example_alignment(loss_fn, *a, **options))(*arguments)


PROBLEMS = {
    "one layer": (losses, params_of(), examples()),
    "conv and batch norm": (convolutional, *convolutional_problem()),
}


@pytest.mark.parametrize("name", PROBLEMS)
def test_equals_the_gradients_of_single_examples(name):
    loss_fn, params, batch = PROBLEMS[name]
    direction = direction_like(params)
    got = alignment(loss_fn, params, batch, direction)
    assert (got.shape, got.dtype) == ((B,), jnp.float32)
    expected = one_by_one(loss_fn, params, batch, direction)
    assert np.std(expected) > 0.1
    np.testing.assert_allclose(got, expected, rtol=2e-5, atol=1e-5)


def test_their_mean_is_the_inner_product_with_the_mini_batchs_gradient():
    """The numerator of eq. (10), which the library computes from gradients, cut by examples."""
    params, batches = params_of(), batches_of(2)
    validation, training = (jax.tree.map(lambda x, i=i: x[i], batches) for i in (0, 1))
    mean_grad = jax.jit(jax.grad(lambda p, b: losses(p, b).mean()))
    g_v, g = (mean_grad(params, b) for b in (validation, training))
    got = alignment(losses, params, training, g_v)
    np.testing.assert_allclose(got.mean(), dots(one_row(g), g_v)[0], rtol=1e-5)


def test_a_step_against_the_direction_changes_each_loss_by_it():
    params, batch = params_of(), examples()
    direction = direction_like(params)
    size = 1e-3
    stepped = jax.tree.map(lambda p, v: p - size * v, params, direction)
    change = (losses(params, batch) - losses(stepped, batch)) / size
    got = alignment(losses, params, batch, direction)
    np.testing.assert_allclose(change, got, atol=0.02 * float(jnp.abs(got).max()))


def test_auxiliary_data_come_along():
    params, batch = params_of(), examples()
    direction = direction_like(params)

    def with_aux(params, batch):
        values = losses(params, batch)
        return values, {"losses": values, "prediction": outputs(params, batch["x"])}

    got, aux = alignment(with_aux, params, batch, direction, has_aux=True)
    plain = alignment(losses, params, batch, direction)
    np.testing.assert_array_equal(got, plain)
    np.testing.assert_allclose(aux["losses"], losses(params, batch), rtol=1e-6)
    assert aux["prediction"].shape == (B, 3)


def test_losses_of_more_axes_give_as_many_inner_products():
    params, batch = params_of(), examples()
    direction = direction_like(params)

    def per_output(params, batch):
        return jnp.square(outputs(params, batch["x"]) - batch["y"])

    got = alignment(per_output, params, batch, direction)
    assert got.shape == (B, 3)
    whole = alignment(losses, params, batch, direction)
    np.testing.assert_allclose(got.mean(axis=1), whole, rtol=1e-5)


# ------------------------------------------------------------------------------------- dtypes


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("size", [1e6, 1e-9])
def test_narrow_parameters_and_directions_of_any_length(dtype, size):
    """1e6 is no number of float16, and 1e-9 would round to zero in it."""
    params = jax.tree.map(lambda x: x.astype(dtype), params_of())
    batch = examples()
    direction = jax.tree.map(lambda x: size * x, direction_like(params_of()))
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), params)

    def in_float32(params, batch):
        return losses(jax.tree.map(lambda x: x.astype(jnp.float32), params), batch)

    got = alignment(in_float32, params, batch, direction)
    assert got.dtype == jnp.float32
    expected = one_by_one(losses, wide, batch, direction)
    rounding = 2e-2 if dtype == jnp.bfloat16 else 2e-3  # of the direction, cast to it
    np.testing.assert_allclose(got, expected, atol=rounding * np.abs(expected).max())


def test_computed_in_bfloat16_throughout_the_result_is_float32():
    params = {"w": jnp.asarray([1.0, 2.0], jnp.bfloat16)}
    batch = jnp.asarray([[1.0, 0.0], [0.0, 1.0]], jnp.bfloat16)
    direction = {"w": jnp.asarray([3.0, -4.0], jnp.bfloat16)}
    got = alignment(lambda p, x: x @ p["w"], params, batch, direction)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, [3.0, -4.0], rtol=8e-3)


def test_a_zero_direction_gives_zeros_for_narrow_parameters_too():
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), {"w": jnp.ones(2)})
    batch = jnp.ones((3, 2), jnp.bfloat16)
    got = alignment(lambda p, x: x @ p["w"], params, batch, {"w": jnp.zeros(2)})
    np.testing.assert_array_equal(got, np.zeros(3, np.float32))


def test_complex_and_none_leaves():
    def energy(params, batch):
        z = batch @ params["z"] + params["shift"].astype(jnp.complex64)
        return jnp.square(jnp.abs(z - (1 + 2j)))

    params = {"z": jnp.asarray([1 + 1j, 2 - 1j], jnp.complex64), "shift": jnp.float32(0.5)}
    params |= {"frozen": None}
    batch = jnp.asarray(np.random.default_rng(0).normal(size=(B, 2)), jnp.complex64)
    direction = direction_like(params)
    got = alignment(energy, params, batch, direction)
    assert got.dtype == jnp.float32
    expected = one_by_one(energy, params, batch, direction)
    np.testing.assert_allclose(got, expected, rtol=1e-5)
    g = jax.jit(jax.grad(lambda p: energy(p, batch).mean()))(params)
    got = alignment(energy, params, batch, g)
    np.testing.assert_allclose(got.mean(), dots(one_row(g), g)[0], rtol=1e-5)


# ------------------------------------------------------------------------ composition, devices


def test_several_directions_by_vmap_and_batches_by_scan():
    params, batches = params_of(), batches_of(3)
    directions = [direction_like(params, seed) for seed in (1, 2)]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *directions)

    def along_all(batch):
        return jax.vmap(lambda v: optax_bilevel.example_alignment(losses, params, batch, v))(
            stacked
        )

    _, got = jax.lax.scan(lambda _, batch: (None, along_all(batch)), None, batches)
    assert got.shape == (3, 2, 4)
    batch = jax.tree.map(lambda x: x[2], batches)
    expected = one_by_one(losses, params, batch, directions[1])
    np.testing.assert_allclose(got[2, 1], expected, rtol=2e-5, atol=1e-5)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_sharded_parameters_and_examples(axis_type, dtype):
    mesh = jax.make_mesh((2, 4), ("x", "y"), axis_types=(axis_type,) * 2)
    rng = np.random.default_rng(0)
    w, v = (jnp.asarray(rng.normal(size=(4, 8)), dtype) for _ in range(2))
    x = jnp.asarray(rng.normal(size=(8, 4)), jnp.float32)

    def loss_fn(w, x):
        return jnp.sum(jnp.square(x @ w.astype(jnp.float32)), axis=-1)

    expected = one_by_one(loss_fn, w.astype(jnp.float32), x, v)
    w = jax.device_put(w, NamedSharding(mesh, P(None, "y")))
    x = jax.device_put(x, NamedSharding(mesh, P("x", None)))
    for spec in (P(None, "y"), P("x", None), P()):  # not only where the parameters lie
        placed = jax.device_put(v, NamedSharding(mesh, spec))
        with jax.set_mesh(mesh):
            got = jax.jit(lambda *a: optax_bilevel.example_alignment(loss_fn, *a))(w, x, placed)
        tolerance = 1e-5 if dtype == jnp.float32 else 1e-2
        np.testing.assert_allclose(got, expected, atol=tolerance * np.abs(expected).max())


def test_memory_does_not_hold_a_gradient_per_example():
    shapes = {"in": (64, 512), "mid": (512, 512), "out": (512, 10)}
    params = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}

    def mlp(params, batch):
        hidden = jax.nn.relu(jax.nn.relu(batch @ params["in"]) @ params["mid"])
        return jnp.mean(jnp.square(hidden @ params["out"]), axis=-1)

    def gradients(params, batch, direction):
        stack = jax.vmap(jax.grad(lambda p, x: mlp(p, x[None])[0]), (None, 0))(params, batch)
        dots = jax.tree.map(lambda g, v: jnp.einsum("bij,ij->b", g, v), stack, direction)
        return sum(jax.tree.leaves(dots))

    def forward_mode(params, batch, direction):
        return optax_bilevel.example_alignment(mlp, params, batch, direction)

    def temporary(function, b):
        batch = jax.ShapeDtypeStruct((b, 64), jnp.float32)
        compiled = jax.jit(function).lower(params, batch, params).compile()
        return timing.temporary_bytes(compiled)

    gradient = 4 * sum(a * b for a, b in shapes.values())
    assert temporary(gradients, 64) > 32 * gradient  # so that the next line can fail
    assert temporary(forward_mode, 64) < gradient
    # Activations and their derivatives alone, which grow with b: 4 layers of at most 512, twice.
    assert temporary(forward_mode, 64) < 64 * 4 * 512 * 4 * 2


# ------------------------------------------------------------------------------------- errors

PARAMS = {"layer": {"bias": jnp.zeros(3), "kernel": jnp.zeros((5, 3))}, "frozen": None}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"kernel": jnp.zeros((3, 5))},
            r"direction leaf \['layer'\]\['kernel'\]: expected the parameter's shape \(5, 3\), got "
            r"\(3, 5\)",
        ),
        (
            {"kernel": jnp.zeros((2, 5, 3))},
            r"\['kernel'\]: expected .* \(5, 3\), got \(2, 5, 3\).* for several, jax.vmap over it",
        ),
        ({"kernel": None}, r"direction leaf \['layer'\]\['kernel'\] is missing: .* \(5, 3\)"),
        ({"scale": jnp.zeros(3)}, r"direction leaf \['layer'\]\['scale'\] has no parameter"),
        (
            {"bias": jnp.zeros(3, jnp.int32)},
            r"direction leaf \['layer'\]\['bias'\]: expected a floating-point array, got int32",
        ),
        (
            {"bias": jnp.zeros(3, jnp.complex64)},
            r"direction leaf \['layer'\]\['bias'\]: expected real numbers .* got complex64",
        ),
    ],
)
def test_a_direction_unlike_the_parameters_is_named(change, message):
    direction = {"layer": {**PARAMS["layer"], **change}, "frozen": None}
    with pytest.raises(ValueError, match=message):
        optax_bilevel.example_alignment(losses, PARAMS, examples(), direction)


def test_a_direction_in_other_containers_goes_leaf_by_leaf():
    """As `nnx.Optimizer` keeps it."""
    params, batch = params_of(), examples()
    direction = direction_like(params)
    expected = alignment(losses, params, batch, direction)
    for other in (jax.tree.leaves(direction), tuple(jax.tree.leaves(direction))):
        np.testing.assert_array_equal(alignment(losses, params, batch, other), expected)


def test_parameters_without_a_derivative_are_named():
    params = {"w": jnp.zeros(2), "steps": jnp.int32(0)}
    with pytest.raises(ValueError, match=r"parameter leaf \['steps'\]: expected a floating-point"):
        optax_bilevel.example_alignment(losses, params, None, params)
    with pytest.raises(ValueError, match="params needs at least one leaf"):
        optax_bilevel.example_alignment(losses, {"w": None}, None, {"w": None})


@pytest.mark.parametrize(
    ("loss_fn", "message"),
    [
        (lambda p, b: losses(p, b).mean(), r"one scalar: .* examples, \[n\], before their mean"),
        (
            lambda p, b: losses(p, b).astype(jnp.complex64),
            "losses have dtype complex64: expected real",
        ),
        (lambda p, b: jnp.argmax(outputs(p, b["x"]), -1), "losses have dtype int32: expected real"),
    ],
)
def test_what_is_no_loss_per_example(loss_fn, message):
    params = params_of()
    with pytest.raises(ValueError, match=message):
        optax_bilevel.example_alignment(loss_fn, params, examples(), params)
