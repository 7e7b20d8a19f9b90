"""Each method against its formula, written out over plain gradients in float64."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_bilevel
from tests.train.known import some
from train import mesh, methods
from train.config import Config
from train.methods import Aux, Batch, Task, forms, sgd

K, B, CLASSES = 8, 4, 3
JUDGED = "steps of sgd judged by 16 held-out ones"


NHWC = ("NHWC", "HWIO", "NHWC")

FORMS = ("streaming", "stacked", "multi_steps", "collective")


def config(method="bilevel", **changes: Any):
    return Config(**{"method": method, "k": K, "b": B, **changes})


def make_params():
    rng = np.random.default_rng(0)

    def layer(fan_in, fan_out):
        kernel = rng.normal(size=(fan_in, fan_out)) / np.sqrt(fan_in)
        return {
            "kernel": jnp.asarray(kernel, jnp.float32),
            "bias": jnp.asarray(0.1 * rng.normal(size=fan_out), jnp.float32),
        }

    return {"first": layer(6, 5), "head": layer(5, CLASSES)}


def make_batches(k=K):
    rng = np.random.default_rng(1)
    images = jnp.asarray(rng.normal(size=(k, B, 2, 3, 1)), jnp.float32)
    labels = jnp.asarray(rng.integers(0, CLASSES, (k, B)), jnp.int32)
    return Batch(images, labels, jax.random.split(jax.random.key(2), k))


def loss_fn(params, batch, criterion=methods.cross_entropy):
    x = batch.images.reshape(len(batch.images), -1)
    x = jnp.tanh(x @ params["first"]["kernel"] + params["first"]["bias"])
    logits = x @ params["head"]["kernel"] + params["head"]["bias"]
    return jnp.mean(criterion(logits, batch.labels)), Aux(logits, ())


PARAMS = make_params()
TASK = Task(num_classes=CLASSES, multi_label=False, steps_per_epoch=10, parameters=PARAMS)
ON_MESH = TASK._replace(layout=mesh.choose(K, B))
LARGE = TASK._replace(parameters={"kernel": jax.ShapeDtypeStruct((1024, 513), jnp.float32)})
CONVOLUTION = TASK._replace(parameters={"kernel": jax.ShapeDtypeStruct((3, 3, 8, 8), jnp.float32)})


of_one = jax.jit(lambda batch: jax.grad(lambda p: loss_fn(p, batch)[0])(PARAMS))


def gradients(batches):
    """The gradient of every mini-batch, one after the other: dict of float64 [k, ...]."""
    slices = [jax.tree.map(lambda x, i=i: x[i], batches) for i in range(len(batches.images))]
    grads = [of_one(batch) for batch in slices]
    return {
        f"{layer}/{name}": np.stack([np.asarray(g[layer][name], np.float64) for g in grads])
        for layer in PARAMS
        for name in PARAMS[layer]
    }


@functools.cache
def run(of):
    method = methods.make(of, ON_MESH if of.form == "collective" else TASK)
    gradient = jax.jit(lambda *arrays: method.gradient(loss_fn, *arrays))
    return gradient(PARAMS, make_batches(of.k), method.init(PARAMS))


def by_name(grads):
    return {f"{layer}/{name}": grads[layer][name] for layer in grads for name in grads[layer]}


def assert_close(actual, expected, tolerance=1e-6):
    """Within `tolerance` of the size of the whole gradient."""
    size = np.sqrt(sum(np.sum(np.square(x)) for x in expected.values()))
    for name, value in expected.items():
        np.testing.assert_allclose(actual[name], value, rtol=0, atol=tolerance * size, err_msg=name)


def omega(names, grads, of):
    """ω of eq. (10) or (8) over the parameters in `names`, normalised as the config says."""
    flat = np.concatenate([grads[name].reshape(of.k, -1) for name in names], axis=1)
    validation, training = flat[: of.num_validation], flat[of.num_validation :]
    products = training @ validation.sum(0)
    if of.method == "bilevel_exact":
        gram = training @ training.T
        weights = np.linalg.solve(gram / of.lam + of.mu * np.eye(len(gram)), products)
    else:
        weights = products / (np.square(training).sum(1) / of.lam + of.mu)
    if of.nonnegative:
        weights = np.maximum(weights, 0)
    if of.normalize:
        weights = weights / np.abs(weights).sum()
    return weights


def expected(of, groups):
    grads = gradients(make_batches(of.k))
    result = {}
    for names in groups(grads):
        weights = omega(names, grads, of)
        for name in names:
            result[name] = np.tensordot(weights, grads[name][of.num_validation :], 1)
    return result


GROUPS = {
    "all": lambda grads: [list(grads)],
    "leaf": lambda grads: [[name] for name in grads],
    "layer": lambda grads: [[n for n in grads if n.startswith(f"{layer}/")] for layer in PARAMS],
}


def test_sgd_descends_the_mean_over_all_examples():
    batches = make_batches()
    examples = Batch(
        batches.images.reshape(K * B, 1, 2, 3, 1),
        batches.labels.reshape(K * B, 1),
        jax.random.split(jax.random.key(2), K * B),
    )
    mean = {name: x.mean(0) for name, x in gradients(examples).items()}
    result = run(config("sgd"))
    assert_close(by_name(result.grads), mean)
    assert result.weights is None
    losses = [loss_fn(PARAMS, jax.tree.map(lambda x, i=i: x[i], batches))[0] for i in range(K)]
    np.testing.assert_allclose(result.losses, [np.mean(losses)], rtol=1e-6)
    assert result.aux.logits.shape == (1, K * B, CLASSES)


@pytest.mark.parametrize("num_validation", [1, 3])
def test_uniform_descends_the_mean_of_the_training_mini_batches(num_validation):
    grads = gradients(make_batches())
    mean = {name: x[num_validation:].mean(0) for name, x in grads.items()}
    result = run(config("uniform", num_validation=num_validation))
    assert_close(by_name(result.grads), mean)
    weights = [0.0] * num_validation + [1 / (K - num_validation)] * (K - num_validation)
    np.testing.assert_allclose(result.weights, weights, rtol=1e-6)


@pytest.mark.parametrize(
    ("form", "groups"),
    [*((form, groups) for form in FORMS for groups in ("all", "layer")), ("streaming", "leaf")],
)
def test_every_form_of_bilevel_is_eq_10(form, groups):
    of = config(form=form, groups=groups)
    result = run(of)
    assert_close(by_name(result.grads), expected(of, GROUPS[groups]))
    if groups == "all":
        weights = omega(list(by_name(PARAMS)), gradients(make_batches()), of)
        np.testing.assert_allclose(result.weights, [0, *weights], rtol=0, atol=1e-6)


@pytest.mark.parametrize("form", ["stacked", "collective"])
def test_bilevel_exact_is_eq_8(form):
    of = config("bilevel_exact", form=form)
    result = run(of)
    # The system is solved in float32; its condition number is about 100.
    assert_close(by_name(result.grads), expected(of, GROUPS["all"]), 1e-5)
    approximate = expected(config(), GROUPS["all"])
    with pytest.raises(AssertionError):
        assert_close(by_name(result.grads), approximate, 1e-2)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        pytest.param({"num_validation": 2, "normalize": False}, marks=pytest.mark.slow),
        {"groups": "layer"},
    ],
    ids=str,
)
def test_the_forms_agree_with_each_other(changes):
    results = {form: run(config(form=form, **changes)) for form in FORMS}
    reference = results.pop("stacked")
    for form, result in results.items():
        assert_close(
            by_name(result.grads),
            {name: np.asarray(x, np.float64) for name, x in by_name(reference.grads).items()},
        )
        size = np.abs(reference.weights).max()
        np.testing.assert_allclose(
            result.weights, reference.weights, rtol=0, atol=1e-6 * size, err_msg=form
        )
        np.testing.assert_allclose(result.losses, reference.losses, rtol=1e-6, err_msg=form)
        np.testing.assert_allclose(
            result.aux.logits, reference.aux.logits, rtol=1e-5, atol=1e-6, err_msg=form
        )


def test_coherent_has_the_gradient_of_sgd_and_wraps_the_optimizer():
    of = config("coherent", epochs=3)
    method = methods.make(of, TASK)
    plain = run(config("sgd"))
    assert_close(by_name(run(of).grads), by_name(plain.grads), 0)
    assert run(of).weights is None
    assert method.judges == 16

    batch = make_batches(2)
    losses = lambda params: jnp.stack(  # noqa: E731
        [loss_fn(params, jax.tree.map(lambda x, i=i: x[i], batch))[0] for i in range(2)]
    )
    wrapped = method.optimizer(optax.sgd(0.1, momentum=0.9))
    documented = optax_bilevel.coherent_steps(optax.sgd(0.1, momentum=0.9), total_steps=30)
    results = []
    for tx in (wrapped, documented):
        assert isinstance(tx, optax.GradientTransformationExtraArgs)
        params, state = PARAMS, tx.init(PARAMS)
        for _ in range(3):
            updates, state = tx.update(plain.grads, state, params, losses_fn=losses)
            params = optax.apply_updates(params, updates)
        results.append((params, state))
    jax.tree.map(np.testing.assert_array_equal, *results)
    assert isinstance(results[0][1], optax_bilevel.CoherentStepsState)


@pytest.mark.parametrize("method", ["coherent_mixup", "coherent_elr"])
def test_other_losses_are_judged_by_the_chance_that_a_label_is_missed(method):
    judged_by = methods.make(config(method), TASK).judged_by
    assert methods.make(config("coherent"), TASK).judged_by is methods.cross_entropy
    logits = jnp.log(jnp.array([[0.7, 0.2, 0.1], [0.1, 0.3, 0.6]]))
    np.testing.assert_allclose(judged_by(logits, jnp.array([0, 1])), [0.3, 0.7], rtol=1e-5)
    several = judged_by(jnp.zeros((2, CLASSES)), jnp.eye(CLASSES)[:2])
    np.testing.assert_allclose(several, [0.5, 0.5], rtol=1e-6)


@pytest.mark.slow
def test_the_stack_of_convolutions_has_no_grouped_ones():
    def convolve(params, batch, criterion=None):
        del criterion
        kernel = params["kernel"]
        x = jax.lax.conv_general_dilated(batch.images, kernel, (1, 1), "SAME", None, None, NHWC)
        return jnp.mean(jnp.square(x)), Aux(jnp.mean(x, axis=(1, 2)), ())

    params = {"kernel": jax.random.normal(jax.random.key(0), (2, 2, 1, 3))}
    of_all = functools.partial(forms.all_gradients, convolve)
    losses, aux, stack = jax.jit(of_all)(params, make_batches())
    assert losses.shape == (K,)
    assert aux.logits.shape == (K, B, 3)
    expected = jax.vmap(jax.grad(lambda *x: convolve(*x)[0]), (None, 0))(params, make_batches())
    np.testing.assert_allclose(stack["kernel"], expected["kernel"], rtol=1e-5)
    program = str(jax.make_jaxpr(of_all)(params, make_batches()))
    assert "conv_general_dilated" in program
    assert "group_count=8" not in program
    mixed = methods.make(config("bilevel_mixup", form="stacked"), CONVOLUTION)
    done = mixed.gradient(convolve, params, make_batches(), ())
    assert some(done.weights).shape == (K,)


def test_bilevel_exact_stacked_and_collective_agree():
    stacked, collective = (run(config("bilevel_exact", form=f)) for f in ("stacked", "collective"))
    reference = {name: np.asarray(x, np.float64) for name, x in by_name(stacked.grads).items()}
    assert_close(by_name(collective.grads), reference, 1e-5)


def test_options_reach_the_rule():
    plain = run(config())
    cases: list[dict[str, Any]] = [
        {"lam": 5.0}, {"mu": 1.0, "nonnegative": True}, {"num_validation": 2, "normalize": False},
    ]  # fmt: skip
    for changes in cases:
        of = config(**changes)
        result = run(of)
        assert_close(by_name(result.grads), expected(of, GROUPS[of.groups]))
        assert np.abs(result.weights - plain.weights).max() > 1e-4, changes


@pytest.mark.parametrize("method", methods.NAMES)
def test_every_method_says_how_it_computes(method):
    assert (
        methods.make(config(method), TASK).how
        == {
            "sgd": "one gradient over all examples of the step",
            "uniform": "weights 1/7, as the gradient of the mean training loss",
            "bilevel": "streaming form (chosen) on cpu",
            "bilevel_exact": "stacked form (chosen) on cpu",
            "bilevel_mixup": "mixup with α = 1, streaming form (chosen) on cpu",
            "mixup": f"mixup with α = 1, {sgd.HOW}",
            "label_smoothing": f"labels smoothed by 0.1, {sgd.HOW}",
            "bootstrapping": f"hard bootstrapping with β = 0.8, {sgd.HOW}",
            "noise_layer": f"a noise channel that starts from 0.3, {sgd.HOW}",
            "mentornet": f"examples weighed by percentile 75 of the losses, {sgd.HOW}",
            "azadi": f"group norm of the last layer times 10, {sgd.HOW}",
            "gce": f"generalized cross-entropy with q = 0.7, {sgd.HOW}",
            "elr": f"early-learning regularization with β = 0.7 and λ = 3, {sgd.HOW}",
            "coherent": f"{sgd.HOW}, {JUDGED}",
            "coherent_mixup": f"mixup with α = 1, {sgd.HOW}, {JUDGED}",
            "coherent_elr": "early-learning regularization with β = 0.7 and λ = 3, "
            f"{sgd.HOW}, {JUDGED}",
        }[method]
    )


@pytest.mark.parametrize("task", [TASK, LARGE, CONVOLUTION])
def test_gradients_are_streamed_on_a_cpu_whatever_their_size(task):
    assert "streaming form (chosen)" in methods.make(config(), task).how
    assert "stacked form (chosen)" in methods.make(config("bilevel_exact"), task).how


def test_small_gradients_are_stacked_on_a_gpu(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    for task in (LARGE, CONVOLUTION):
        assert "stacked form (chosen) on gpu" in methods.make(config(), task).how
    assert "streaming form" in methods.make(config(k=32), LARGE).how  # 64.1 MiB
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    assert "streaming form (chosen) on tpu" in methods.make(config(), TASK).how


def test_a_form_that_was_asked_for_is_not_called_chosen():
    assert methods.make(config(form="multi_steps"), TASK).how == "multi_steps form on cpu"
    assert methods.make(config(form="stacked"), CONVOLUTION).how == "stacked form on cpu"


@pytest.mark.parametrize(
    "method",
    [name for name in methods.NAMES if not name.startswith("bilevel")],
)
@pytest.mark.parametrize("form", FORMS)
def test_forms_are_for_methods_that_weigh(method, form):
    message = f"method {method} weighs nothing: form {form} is for bilevel methods"
    with pytest.raises(ValueError, match=message):
        config(method, form=form)


@pytest.mark.parametrize("form", ["streaming", "multi_steps"])
def test_eq_8_needs_all_gradients(form):
    with pytest.raises(
        ValueError, match=f"form {form} sees one gradient at a time.*known: stacked"
    ):
        config("bilevel_exact", form=form)


@pytest.mark.parametrize(
    ("method", "form", "k", "message"),
    [
        ("bilevel", "stacked", 8, "form stacked is for one device, and there are 8; known on sev"),
        ("bilevel", "collective", 16, "k = 16, but there are 8 .* take k = 8 .* or form streaming"),
        ("bilevel_exact", "auto", 16, "eq. .8. needs all gradients at once: k = 16, but there are"),
        ("bilevel", "streaming", 4, "form streaming .* must be a multiple of 8, got 4"),
    ],
)
def test_forms_that_do_not_fit_the_mesh_say_what_does(method, form, k, message):
    assert jax.device_count() == 8, "tests/conftest.py asks for 8 CPU devices"
    task = TASK._replace(layout=mesh.choose(k, B))
    with pytest.raises(ValueError, match=message):
        methods.make(config(method, k=k, form=form), task)


def test_the_collective_form_needs_several_devices():
    with pytest.raises(ValueError, match=f"there is one device; take another form, or k = {K}"):
        methods.make(config(form="collective"), TASK)
