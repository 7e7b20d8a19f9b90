"""Validation by the past, studied: ``python -m benchmarks.past`` writes ``docs/results/past/``.

What docs/past.md reports. A run is one jitted scan over plain arrays, so that a hundred of them are
affordable on two cores: data, noise, sampling and standardisation are the trainer's, the network is
an MLP whose inner products come from activations and errors (|Σ_n a_n d_nᵀ|² is a sum over pairs of
examples), so that no stack of k gradients is made. Finished arms are skipped.
"""

import dataclasses
import functools
import itertools
import json
import pathlib
import time
from collections.abc import Callable, Iterator
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from rich.console import Console

from train import augment, trainer
from train.config import Config
from train.run_directory import write_json

PyTree = Any

TEST_IMAGES = 2000
DATASETS: dict[str, dict[str, Any]] = {
    "digits": {"epochs": 100, "decay": 0.98},
    "fashion_mnist": {"epochs": 40, "decay": 0.95, "train_size": 4000},
    "fashion_mnist_10000": {"epochs": 100, "decay": 0.95, "train_size": 10000},
}


class Products(NamedTuple):
    """What a rule sees of a step.

    Attributes:
        dots: ⟨p, g_i⟩ with the past p, [k].
        gram: ⟨g_i, g_j⟩, [k, k].
        coherence: the running average of s that the last step left, and the variance of s, [2].
        first: whether there is no past yet, [].
        mu: μ̂, [].
        smoothing: the decay of the average of s, [].
        gain: the factor in front of it, [].
        cap: the largest share of a step, [].
        margin: the standard deviations of the average of s that it must be above zero, [].
        mixture: the share of this step's other mini-batches in the validation gradient, [].
    """

    dots: jax.Array
    gram: jax.Array
    coherence: jax.Array
    first: jax.Array
    mu: jax.Array
    smoothing: jax.Array
    gain: jax.Array
    cap: jax.Array
    margin: jax.Array
    mixture: jax.Array


class Decision(NamedTuple):
    """What a rule makes of it.

    Attributes:
        weights: of the k gradients, before the momentum, [k].
        movement: what the step along the momentum is multiplied by, [].
        coherence: as in `Products`.
    """

    weights: jax.Array
    movement: jax.Array | float
    coherence: jax.Array


def _l1(omega: jax.Array) -> jax.Array:
    return omega / (jnp.sum(jnp.abs(omega)) + 1e-20)


def _uniform(products: Products) -> Decision:
    k = products.dots.shape[0]
    return Decision(jnp.full(k, 1 / k), 1.0, products.coherence)


def _bilevel(products: Products) -> Decision:
    """Eq. (10): the first mini-batch validates."""
    gram = products.gram
    training = jnp.arange(len(gram)) > 0
    omega = jnp.where(training, gram[0] / (jnp.diag(gram) + products.mu), 0)
    return Decision(_l1(omega), 1.0, products.coherence)


def _past(
    products: Products, guard: str = "zero", solver: str = "diagonal", only_step_size: bool = False
) -> Decision:
    """Eq. (10), or (8), with the past as the validation gradient; weights before the momentum."""
    gram, k = products.gram, products.dots.shape[0]
    others = (jnp.sum(gram, axis=1) - jnp.diag(gram)) / (k - 1)
    dots = (1 - products.mixture) * products.dots + products.mixture * others
    if solver == "exact":
        omega = jnp.linalg.solve(gram + products.mu * jnp.eye(k), dots)
    else:
        omega = dots / (jnp.diag(gram) + products.mu)
    omega = _l1(omega)
    total = jnp.sum(omega)
    if guard == "clip":
        omega = _l1(jnp.maximum(omega, 0))
    elif guard == "centre":  # the nearest ω, before its normalisation, with Σω = 0
        omega = jnp.where(total < 0, _l1(omega - total / k), omega)
    elif guard == "sum":  # Σω = 1 instead of |ω|₁ = 1: no step-size
        omega = omega / jnp.where(total > 0, total, 1)
    elif guard == "zero":
        omega = jnp.where(total < 0, 0, omega)
    if only_step_size:
        omega = jnp.full(k, 1 / k) * jnp.sum(omega)
    moving = (total > 0).astype(jnp.float32) if guard == "still" else 1.0
    weights = jnp.where(products.first, 1 / k, omega)
    return Decision(weights, jnp.where(products.first, 1.0, moving), products.coherence)


def _coherent(
    products: Products, before_momentum: bool = False, clip_first: bool = False
) -> Decision:
    """The momentum of plain gradients, its length set by the averaged agreement s of fresh ones."""
    k = products.dots.shape[0]
    s = jnp.sum(_l1(products.dots / jnp.sqrt(jnp.diag(products.gram) + 1e-12)))
    if clip_first:
        s = jnp.maximum(s, 0)
    decay, (before, variance) = products.smoothing, products.coherence
    mean = decay * before + (1 - decay) * s
    variance = decay * variance + (1 - decay) * (s - before) * (s - mean)
    mean = jnp.where(products.first, 1.0, mean)
    variance = jnp.where(products.first, 0.0, variance)
    deviation = jnp.sqrt((1 - decay) / (1 + decay) * variance)
    movement = jnp.clip(products.gain * (mean - products.margin * deviation), 0, products.cap)
    weights, coherence = jnp.full(k, 1 / k), jnp.stack([mean, variance])
    if before_momentum:
        return Decision(weights * movement, 1.0, coherence)
    return Decision(weights, movement, coherence)


RULES: dict[str, Callable[[Products], Decision]] = {
    "uniform": _uniform,
    "bilevel": _bilevel,
    "past": _past,
    "past, no guard": functools.partial(_past, guard="none"),
    "past, guard after momentum": functools.partial(_past, guard="still"),
    "past, Σω = 0 where Σω < 0": functools.partial(_past, guard="centre"),
    "past, ω clipped at 0": functools.partial(_past, guard="clip"),
    "past, Σω = 1": functools.partial(_past, guard="sum"),
    "past, eq. (8)": functools.partial(_past, solver="exact"),
    "past, Σω as step-size only": functools.partial(_past, only_step_size=True),
    "coherent": _coherent,
    "coherent, before momentum": functools.partial(_coherent, before_momentum=True),
    "coherent, clipped before averaging": functools.partial(_coherent, clip_first=True),
}


@dataclasses.dataclass(frozen=True)
class Arm:
    """One cell of a table; the fields but `table` say all about it."""

    table: str
    rule: str
    dataset: str
    noise_rate: float = 0.5
    learning_rate: float = 0.03
    k: int = 8
    momentum: float = 0.9
    past_decay: float = 0.9
    smoothing: float = 0.9
    gain: float = 3.0
    cap: float = 1.0
    margin: float = 0.0
    mixture: float = 0.0
    epochs: int | None = None


RECOMMENDED = {"past_decay": 0.97, "smoothing": 0.9, "gain": 4.0}
"""Of the coherent step: the defaults of `optax_bilevel.coherent_steps`."""
LONG = {**RECOMMENDED, "past_decay": 0.99, "margin": 1.0}
"""For long trainings."""
FRESH = (3, 4, 5, 6, 7)
"""Seeds that no choice was made by."""


def arms() -> Iterator[Arm]:
    """Every arm, the most telling first."""
    both, longest = ("digits", "fashion_mnist"), "fashion_mnist_10000"

    def recommended(table: str, name: str, **changes: Any) -> Iterator[Arm]:
        for setting in (RECOMMENDED, LONG):
            yield Arm(table, "coherent", name, **{**setting, **changes})

    for rate in (0.5, 0.0, 0.8, 0.2):
        for rule, name in itertools.product(("uniform", "coherent", "past", "bilevel"), both):
            yield Arm("noise", rule, name, noise_rate=rate)
        for name in both:
            yield from recommended("noise", name, noise_rate=rate)
    for rate, name in itertools.product((0.5, 0.0), both):
        yield Arm("fresh seeds", "uniform", name, noise_rate=rate)
        yield from recommended("fresh seeds", name, noise_rate=rate)
    for lr, rate in ((0.1, 0.5), (0.01, 0.5), (0.1, 0.0), (0.01, 0.0)):
        for rule, name in itertools.product(("uniform", "coherent", "past"), both):
            yield Arm("learning rate", rule, name, noise_rate=rate, learning_rate=lr)
        for name in both:
            yield from recommended("learning rate", name, noise_rate=rate, learning_rate=lr)
    for rate, gain, cap, name in itertools.product((0.5, 0.0), (1.0, 2.0, 4.0), (1.0, 100.0), both):
        yield Arm("gain", "coherent", name, noise_rate=rate, gain=gain, cap=cap)
    for rate, name in itertools.product((0.5, 0.0), both):
        short = DATASETS[name]["epochs"] // 8
        yield Arm("controls", "uniform", name, noise_rate=rate, epochs=short)
        yield Arm("controls", "uniform", name, noise_rate=rate, learning_rate=0.003)
    for name in both:
        for rule in list(RULES)[3:10]:
            yield Arm("parts", rule, name)
        yield Arm("parts", "past", name, mixture=0.5)
        yield Arm("parts", "past", name, momentum=0.0, learning_rate=0.1)
        yield Arm("parts", "past", name, past_decay=0.97)
        yield Arm("parts", "coherent, before momentum", name)
        yield Arm("parts", "coherent, clipped before averaging", name)
        yield Arm("parts", "coherent", name, smoothing=0.0)
        yield Arm("parts", "coherent", name, smoothing=0.97)
        yield Arm("parts", "coherent", name, past_decay=0.97)
        for k in (2, 32):
            yield Arm("mini-batches", "past", name, k=k)
            yield Arm("mini-batches", "coherent", name, k=k)
            yield from recommended("mini-batches", name, k=k)
    for rate in (0.5, 0.0):
        yield Arm("margin", "uniform", longest, noise_rate=rate)
        yield from recommended("margin", longest, noise_rate=rate)
        for name, (margin, decay) in itertools.product(DATASETS, ((0.0, 0.99), (1.0, 0.97))):
            yield Arm("margin", "coherent", name, rate, gain=4.0, margin=margin, past_decay=decay)


class Layers(NamedTuple):
    """Inputs [n, in] and errors (gradients in the pre-activations) [n, out] of every layer."""

    inputs: list[jax.Array]
    errors: list[jax.Array]


def _logits(params: PyTree, x: jax.Array) -> tuple[jax.Array, list[jax.Array]]:
    inputs = []
    for kernel, bias in params:
        x = jax.nn.relu(x) if inputs else x
        inputs.append(x)
        x = x @ kernel + bias
    return x, inputs


def _backward(params: PyTree, x: jax.Array, labels: jax.Array) -> Layers:
    """Of the cross-entropy of each of n examples."""
    logits, inputs = _logits(params, x)
    error = jax.nn.softmax(logits) - jax.nn.one_hot(labels, logits.shape[-1])
    errors = [error]
    for (kernel, _), layer_input in zip(params[:0:-1], inputs[:0:-1], strict=True):
        error = (error @ kernel.T) * (layer_input > 0)
        errors.append(error)
    return Layers(inputs, errors[::-1])


def _weighted_gradient(layers: Layers, weights: jax.Array) -> PyTree:
    """Σ_n weights_n ∇ℓ_n, like the parameters."""
    return [(a.T @ (weights[:, None] * d), weights @ d) for a, d in zip(*layers, strict=True)]


def _dots(direction: PyTree, layers: Layers) -> jax.Array:
    """⟨direction, ∇ℓ_n⟩, [n]."""
    return sum(  # pyright: ignore[reportReturnType]
        jnp.sum((a @ kernel + bias) * d, axis=1)
        for (kernel, bias), a, d in zip(direction, *layers, strict=True)
    )


def _gram(layers: Layers) -> jax.Array:
    """⟨∇ℓ_n, ∇ℓ_m⟩, [n, n]."""
    return sum((a @ a.T + 1) * (d @ d.T) for a, d in zip(*layers, strict=True))  # pyright: ignore


class State(NamedTuple):
    """What a step passes on; `past` is bias-corrected where it is used."""

    params: PyTree
    trace: PyTree
    past: PyTree
    coherence: jax.Array
    average: PyTree
    step: jax.Array


@functools.partial(jax.jit, static_argnames=("rule", "k"))
def _train(
    data: dict[str, jax.Array],
    order: jax.Array,
    learning_rates: jax.Array,
    options: dict[str, jax.Array],
    params: PyTree,
    *,
    rule: str,
    k: int,
) -> tuple[jax.Array, jax.Array]:
    """Trains one run.

    Returns:
        Test accuracy after every epoch, [epochs], and after the last: training (given, true
        labels) and, with averaged weights, test, [3]; in %.
    """
    n = order.shape[-1]
    b = n // k
    decay = options["past_decay"]

    def step(state: State, inputs: tuple[jax.Array, jax.Array]) -> tuple[State, None]:
        chosen, learning_rate = inputs
        layers = _backward(state.params, data["x"][chosen], data["given"][chosen])
        first = state.step == 0
        correction = jnp.where(first, 1, 1 - decay**state.step)
        products = Products(
            _dots(state.past, layers).reshape(k, b).mean(1) / correction,
            _gram(layers).reshape(k, b, k, b).mean((1, 3)),
            state.coherence,
            first,
            **{name: options[name] for name in Products._fields if name in options},
        )
        decision = RULES[rule](products)
        update = _weighted_gradient(layers, jnp.repeat(decision.weights, b) / b)
        mean = _weighted_gradient(layers, jnp.full(n, 1 / n))
        trace = jax.tree.map(lambda t, u: options["momentum"] * t + u, state.trace, update)
        rate = learning_rate * decision.movement
        params = jax.tree.map(lambda p, t: p - rate * t, state.params, trace)
        past = optax.incremental_update(mean, state.past, 1 - decay)
        average = optax.incremental_update(params, state.average, 0.01)
        return State(params, trace, past, decision.coherence, average, state.step + 1), None

    def accuracy(params: PyTree, x: str, labels: str) -> jax.Array:
        return 100 * jnp.mean(jnp.argmax(_logits(params, data[x])[0], axis=1) == data[labels])

    def epoch(state: State, inputs: Any) -> tuple[State, jax.Array]:
        indices, rate = inputs
        state, _ = jax.lax.scan(step, state, (indices, jnp.broadcast_to(rate, len(indices))))
        return state, accuracy(state.params, "test_x", "test")

    zeros = jax.tree.map(jnp.zeros_like, params)
    start = State(params, zeros, zeros, jnp.array([1.0, 0.0]), params, jnp.float32(0))
    state, test = jax.lax.scan(epoch, start, (order, learning_rates))
    given, true = (accuracy(state.params, "x", labels) for labels in ("given", "true"))
    return test, jnp.stack([given, true, accuracy(state.average, "test_x", "test")])


@functools.cache
def _problem(name: str, data_dir: str | None, noise_rate: float, k: int, seed: int) -> Any:
    config = Config(
        dataset=name.removesuffix("_10000"),
        data_dir=data_dir,
        train_size=DATASETS[name].get("train_size"),
        noise_rate=noise_rate,
        noise="symmetric" if noise_rate else "none",
        k=k,
        b=64 // k,
        seed=seed,
    )
    problem = trainer.load_problem(config)
    dataset = problem.dataset
    standardize = augment.preset("standardize", dataset.image_shape, dataset.max_value).evaluate

    @jax.jit
    def prepare(images: jax.Array) -> jax.Array:
        key = jax.random.key(0)  # which evaluation does not use
        return jax.vmap(lambda image: standardize(key, image).ravel())(images)

    test = dataset.test.take(np.arange(min(TEST_IMAGES, len(dataset.test))))
    data = {
        "x": prepare(dataset.train.read(np.arange(len(dataset.train)))),
        "given": jnp.asarray(dataset.train.labels),
        "true": jnp.asarray(problem.true),
        "test_x": prepare(test.read(np.arange(len(test)))),
        "test": jnp.asarray(test.labels),
    }
    return data, problem.order


def _initial(size: int, hidden: tuple[int, ...], seed: int) -> PyTree:
    init = jax.nn.initializers.variance_scaling(1.0, "fan_avg", "normal")
    widths = list(itertools.pairwise((size, *hidden, 10)))
    keys = jax.random.split(jax.random.key(seed), len(widths))
    return [
        (init(key, shape), jnp.zeros(shape[1])) for key, shape in zip(keys, widths, strict=True)
    ]


def measure(arm: Arm, seeds: tuple[int, ...], data_dir: str | None) -> dict[str, Any]:
    """Trains one arm with every seed; accuracies in %."""
    settings = DATASETS[arm.dataset]
    epochs = arm.epochs or settings["epochs"]
    directory = data_dir if arm.dataset != "digits" else None
    started = time.monotonic()
    curves, ends = [], []
    problems = [_problem(arm.dataset, directory, arm.noise_rate, arm.k, s) for s in seeds]
    steps = min(order.steps_per_epoch for _, order in problems)  # noise changes it by one or two
    names = ("past_decay", "momentum", "smoothing", "gain", "cap", "margin", "mixture")
    options = {name: jnp.float32(getattr(arm, name)) for name in names} | {"mu": jnp.float32(0.01)}
    for seed, (data, order) in zip(seeds, problems, strict=True):
        indices = np.stack([order.epoch(e)[:steps].reshape(steps, -1) for e in range(epochs)])
        # A shorter schedule decays as far as a long one.
        rates = arm.learning_rate * settings["decay"] ** (
            np.arange(epochs, dtype=np.float32) * settings["epochs"] / epochs
        )
        params = _initial(data["x"].shape[1], (256, 256), seed)
        curve, end = _train(data, indices, rates, options, params, rule=arm.rule, k=arm.k)
        curves.append(np.asarray(curve, np.float64))
        ends.append(np.asarray(end, np.float64))
    test, end = np.stack(curves), np.mean(ends, axis=0)
    last, best = test[:, -1], test.max(1)

    def spread(values: np.ndarray) -> float:
        return round(float(values.std(ddof=1)), 2) if len(values) > 1 else 0.0

    return {
        **dataclasses.asdict(arm),
        "seeds": list(seeds),
        "test_last_mean": round(float(last.mean()), 2),
        "test_last_std": spread(last),
        "test_best_mean": round(float(best.mean()), 2),
        "train_noisy_mean": round(float(end[0]), 2),
        "train_clean_mean": round(float(end[1]), 2),
        "test_averaged_weights_mean": round(float(end[2]), 2),
        "test_mean_by_epoch": [round(float(v), 2) for v in test.mean(0)],
        "seconds": round(time.monotonic() - started, 1),
    }


@dataclasses.dataclass(frozen=True)
class Study:
    """Trains every arm that `out` does not hold yet."""

    data_dir: Annotated[
        str | None, tyro.conf.arg(help="where Fashion-MNIST is, if not in the default place")
    ] = None
    out: pathlib.Path = pathlib.Path("docs/results/past")
    seeds: tuple[int, ...] = (0, 1, 2)
    tables: Annotated[
        tuple[str, ...], tyro.conf.arg(help="only these: noise, learning rate, controls, parts, …")
    ] = ()


def main(study: Study, console: Console) -> None:
    """Writes one JSON file a table, an entry an arm, after every arm."""
    study.out.mkdir(parents=True, exist_ok=True)
    for arm in arms():
        if study.tables and arm.table not in study.tables:
            continue
        file = study.out / f"{arm.table.replace(' ', '_')}.json"
        results = json.loads(file.read_text()) if file.exists() else []
        seeds = FRESH if arm.table == "fresh seeds" else study.seeds
        fields = {**dataclasses.asdict(arm), "seeds": list(seeds)}
        if any(fields.items() <= result.items() for result in results):
            continue
        result = measure(arm, seeds, study.data_dir)
        write_json(file, [*results, result])
        console.print(
            f"{arm.dataset} {arm.noise_rate} {arm.rule} lr {arm.learning_rate} k {arm.k}: last "
            f"{result['test_last_mean']} ± {result['test_last_std']}, best "
            f"{result['test_best_mean']}, {result['seconds']} s"
        )


if __name__ == "__main__":
    main(tyro.cli(Study), Console())
