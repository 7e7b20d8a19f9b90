"""One setting of `coherent_steps` for all: the study behind it, by public names alone.

    python -m benchmarks.steps_study --fashion-mnist FOLDER [--only CASE ...] [--seeds 0 1]

Every case trains the same network on the same nine tenths of the images, with given labels of which
some are wrong, by the plain optimizer and by `coherent_steps` around it, on random batches of 64;
16 examples of the tenth that is kept back judge each step. FOLDER holds Fashion-MNIST's four IDX
files. What has been trained is not trained again; ``docs/results/steps.json`` has

    CASE -> {plain | coherent: {last, best, stopped, fitted: {mean, std}}, seeds, steps, ...}

in percent: `last` and `best` test accuracy, `stopped` that of the epoch with the best accuracy on
the held-out part's given labels, `fitted` the share of given training labels reproduced at the end.
"""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Callable
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from flax import nnx
from rich.console import Console

import models
import optax_bilevel
from train import arms, data, noise

BATCH, HELD_OUT = 64, 16
TEST = {"mlp": 4000}  # test images; 2000 of other networks, which take longer
FIGURES = ("last", "best", "stopped", "fitted")


class Case(NamedTuple):
    """A training; see `CASES`.

    Attributes:
        dataset: "digits" or "fashion_mnist".
        examples: how many training images, the held-out tenth included.
        network: a name of `models`.
        noise: a kind of `train.noise`, or "network": labels that a network has made.
        rate: share of wrong labels.
        optimizer: "sgd" (momentum 0.9) or "adamw".
        learning_rate: its first one.
        epochs: passes over the images.
        schedule: "constant" or "cosine".
        seeds: how many.
    """

    dataset: str = "fashion_mnist"
    examples: int = 4000
    network: str = "mlp"
    noise: str = "symmetric"
    rate: float = 0.5
    optimizer: str = "sgd"
    learning_rate: float = 0.03
    epochs: int = 60
    schedule: str = "constant"
    seeds: int = 3


_MLP = Case()
_NET = Case(network="resnet_small", examples=1000, epochs=30, learning_rate=0.05, seeds=2)
_DIGITS = Case("digits", 1200, epochs=100)
_CIFARNET = Case(network="cifarnet", examples=1000, epochs=40, seeds=1)
CASES = {
    "Fashion-MNIST 4,000, MLP, 50% wrong": _MLP,
    "Fashion-MNIST 4,000, MLP, 50% wrong, learning rate 0.01": _MLP._replace(learning_rate=0.01),
    "Fashion-MNIST 4,000, MLP, 50% wrong, learning rate 0.1": _MLP._replace(learning_rate=0.1),
    "Fashion-MNIST 4,000, MLP, 50% wrong, cosine": _MLP._replace(schedule="cosine"),
    "Fashion-MNIST 4,000, MLP, 50% wrong, AdamW": _MLP._replace(
        optimizer="adamw", learning_rate=1e-3
    ),
    "Fashion-MNIST 4,000, MLP, 50% wrong, AdamW, learning rate 0.0001": _MLP._replace(
        optimizer="adamw", learning_rate=1e-4
    ),
    "Fashion-MNIST 4,000, MLP, clean": _MLP._replace(rate=0.0),
    "Fashion-MNIST 4,000, MLP, clean, AdamW": _MLP._replace(
        rate=0.0, optimizer="adamw", learning_rate=1e-3
    ),
    "Fashion-MNIST 4,000, MLP, 20% wrong": _MLP._replace(rate=0.2),
    "Fashion-MNIST 4,000, MLP, 80% wrong": _MLP._replace(rate=0.8),
    "Fashion-MNIST 4,000, MLP, 40% one class further": _MLP._replace(noise="pair_flip", rate=0.4),
    "Fashion-MNIST 4,000, MLP, 40% by a network": _MLP._replace(noise="network", rate=0.4),
    "Fashion-MNIST 600, MLP, 50% wrong": _MLP._replace(examples=600, epochs=30, learning_rate=0.1),
    "Fashion-MNIST 10,000, MLP, 50% wrong": _MLP._replace(examples=10_000, epochs=107),
    "digits, MLP, 50% wrong": _DIGITS,
    "digits, MLP, clean": _DIGITS._replace(rate=0.0),
    "Fashion-MNIST 600, small residual network, 50% wrong": _NET._replace(
        examples=600, learning_rate=0.1
    ),
    "Fashion-MNIST 1,000, small residual network, 50% wrong": _NET,
    "Fashion-MNIST 1,000, small residual network, 50% wrong, learning rate 0.01": _NET._replace(
        learning_rate=0.01, seeds=1
    ),
    "Fashion-MNIST 1,000, small residual network, 50% wrong, AdamW": _NET._replace(
        optimizer="adamw", learning_rate=1e-3, seeds=1
    ),
    "Fashion-MNIST 1,000, small residual network, clean": _NET._replace(rate=0.0),
    "Fashion-MNIST 1,000, small residual network, 40% one class further": _NET._replace(
        noise="pair_flip", rate=0.4, seeds=1
    ),
    "Fashion-MNIST 1,000, CifarNet, 50% wrong": _CIFARNET,
    "Fashion-MNIST 1,000, CifarNet, clean": _CIFARNET._replace(rate=0.0),
    "Fashion-MNIST 600, PreActResNet-18, 50% wrong": _NET._replace(
        network="preact_resnet18", examples=600, epochs=20, seeds=1
    ),
}


@dataclasses.dataclass(frozen=True)
class Problem:
    """What a case trains on: images float32 [n, h, w, c] with mean 0 and deviation 1, labels [n].

    Attributes:
        images, given: of the training and the held-out part.
        training, held_out: the numbers of the examples of each.
        test_images, test_labels: of the test part.
    """

    images: np.ndarray
    given: np.ndarray
    training: np.ndarray
    held_out: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray


def load(case: Case, seed: int, folder: pathlib.Path | None) -> Problem:
    """The images of a case, which are the same for all seeds, with labels that are not."""
    dataset = data.load(case.dataset, None if case.dataset == "digits" else folder)
    rng = np.random.default_rng(0)
    train = dataset.train.take(np.sort(rng.permutation(len(dataset.train))[: case.examples]))
    test = dataset.test.take(
        np.sort(rng.permutation(len(dataset.test))[: TEST.get(case.network, 2000)])
    )
    images, test_images = (
        split.read(np.arange(len(split))).astype(np.float32) for split in (train, test)
    )
    mean, deviation = images.mean(), images.std()
    images, test_images = (images - mean) / deviation, (test_images - mean) / deviation
    if case.noise == "network":
        given = _labels_by_a_network(images, train.labels, case.rate, seed)
    else:
        given = noise.corrupt(case.noise, train.labels, case.rate, 10, seed)
    rng = np.random.default_rng([seed, 1])
    kept_back = []
    for label in range(10):
        members = rng.permutation(np.flatnonzero(given == label))
        kept_back.append(members[: max(1, round(0.1 * len(members)))])
    held_out = np.sort(np.concatenate(kept_back))
    training = np.setdiff1d(np.arange(len(given)), held_out)
    return Problem(images, given, training, held_out, test_images, test.labels)


def _labels_by_a_network(
    images: np.ndarray, true: np.ndarray, rate: float, seed: int
) -> np.ndarray:
    """Labels drawn from what a small network believes, so warm that `rate` of them are wrong."""
    rng = np.random.default_rng([seed, 2])
    model = models.create(
        "mlp", num_classes=10, input_shape=images.shape[1:], rngs=nnx.Rngs(seed), hidden=(64,)
    )
    known = rng.permutation(len(true))[: max(len(true) // 40, 100)]
    optimizer = nnx.Optimizer(model, optax.adam(1e-3), wrt=nnx.Param)

    @nnx.jit
    def step(model: Any, optimizer: Any) -> None:
        def loss(model: Any) -> jax.Array:
            return _losses(model(images[known]), true[known]).mean()

        optimizer.update(model, nnx.grad(loss)(model))

    for _ in range(100):
        step(model, optimizer)
    logits, drawn = np.asarray(model(jnp.asarray(images))), rng.gumbel(size=(len(true), 10))
    low, high, given = 1e-3, 1e3, true
    for _ in range(40):  # the share of wrong labels grows with the temperature
        middle = np.sqrt(low * high)
        given = np.argmax(logits / middle + drawn, axis=-1)
        low, high = (middle, high) if np.mean(given != true) < rate else (low, middle)
    return given.astype(np.int32)


def _losses(logits: jax.Array, labels: Any) -> jax.Array:
    return optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels)


def train(case: Case, seed: int, problem: Problem, *, coherent: bool) -> dict[str, float]:
    """Trains one case by one of the two; the figures of the module's docstring."""
    model = models.create(
        case.network,
        num_classes=10,
        input_shape=problem.images.shape[1:],
        rngs=nnx.Rngs(seed),
        dropout_rate=0.0,
    )
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    steps = len(problem.training) // BATCH
    rate: Any = case.learning_rate
    if case.schedule == "cosine":
        rate = optax.cosine_decay_schedule(rate, case.epochs * steps)
    tx = optax.sgd(rate, momentum=0.9) if case.optimizer == "sgd" else optax.adamw(rate)
    if coherent:
        tx = optax_bilevel.coherent_steps(tx, total_steps=case.epochs * steps)
    images, given = jnp.asarray(problem.images), jnp.asarray(problem.given)

    def losses(params: Any, rest: Any, examples: jax.Array) -> tuple[jax.Array, Any]:
        model = nnx.merge(graph, params, rest, copy=True)
        model.train()
        losses = _losses(model(images[examples]), given[examples])
        return losses, nnx.state(model, nnx.Not(nnx.Param))

    def step(carry: Any, examples: tuple[jax.Array, jax.Array]) -> tuple[Any, None]:
        params, rest, state = carry
        batch, held_out = examples

        def mean_loss(params: Any) -> tuple[jax.Array, Any]:
            each, stats = losses(params, rest, batch)
            return each.mean(), stats

        grads, stats = jax.grad(mean_loss, has_aux=True)(params)
        told: dict[str, Any] = {}
        if coherent:
            told = {"losses_fn": lambda p: losses(p, rest, held_out)[0]}
        updates, state = tx.update(grads, state, params, **told)
        return (optax.apply_updates(params, updates), stats, state), None

    epoch = _epoch(step, in_a_loop=case.network == "mlp")

    @jax.jit
    def predict(params: Any, rest: Any, images: jax.Array) -> jax.Array:
        model = nnx.merge(graph, params, rest, copy=True)
        model.eval()
        return jnp.argmax(model(images), axis=-1)

    def accuracy(carry: Any, images: np.ndarray, labels: np.ndarray) -> float:
        parts = range(0, len(images), 1000)
        predicted = [np.asarray(predict(*carry[:2], images[i : i + 1000])) for i in parts]
        return 100 * float(np.mean(np.concatenate(predicted) == labels))

    rng = np.random.default_rng([seed, 3])
    turns = _in_turn(problem.held_out, rng)
    carry = (params, rest, tx.init(params))
    test, held = [], []
    for _ in range(case.epochs):
        batches = rng.permutation(problem.training)[: steps * BATCH].reshape(steps, BATCH)
        carry = epoch(carry, (batches, turns(steps)))
        test.append(accuracy(carry, problem.test_images, problem.test_labels))
        held_out = problem.held_out
        held.append(accuracy(carry, problem.images[held_out], problem.given[held_out]))
    training = problem.training
    return {
        "last": test[-1],
        "best": max(test),
        "stopped": test[int(np.argmax(held))],
        "fitted": accuracy(carry, problem.images[training], problem.given[training]),
    }


def _epoch(step: Callable[..., Any], in_a_loop: bool) -> Callable[[Any, Any], Any]:
    """All steps of an epoch; in XLA's loops on CPU convolutions are ten times slower."""
    if in_a_loop:
        scan = jax.jit(lambda carry, examples: jax.lax.scan(step, carry, examples)[0])
        return lambda carry, examples: scan(carry, examples)
    one = jax.jit(lambda carry, examples: step(carry, examples)[0], donate_argnums=0)

    def epoch(carry: Any, examples: tuple[np.ndarray, np.ndarray]) -> Any:
        for each in zip(*examples, strict=True):
            carry = one(carry, each)
        return carry

    return epoch


def _in_turn(examples: np.ndarray, rng: np.random.Generator) -> Callable[[int], np.ndarray]:
    """``steps -> int [steps, HELD_OUT]``: all of the examples before any comes again."""
    left = np.empty(0, examples.dtype)

    def take(steps: int) -> np.ndarray:
        nonlocal left
        while len(left) < steps * HELD_OUT:
            left = np.concatenate([left, rng.permutation(examples)])
        taken, left = np.split(left, [steps * HELD_OUT])
        return taken.reshape(steps, HELD_OUT)

    return take


def summary(runs: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Means and deviations over seeds of ``{"CASE/METHOD/SEED": figures}``, by case and method."""
    table: dict[str, Any] = {}
    for name, case in CASES.items():
        methods = {}
        for method in ("plain", "coherent"):
            found = [
                runs[key] for s in range(case.seeds) if (key := f"{name}/{method}/{s}") in runs
            ]
            if found:
                methods[method] = arms.rounded(found, FIGURES) | {"seeds": len(found)}
        if methods:
            table[name] = methods | {"case": case._asdict()}
    return table


def markdown(table: dict[str, Any]) -> str:
    """The table as docs/coherent_steps.md shows it; test accuracy in percent."""
    lines = [
        "| case | plain: last epoch | stopped by held-out labels | best epoch "
        "| coherent: last epoch | given labels fitted | seeds |",
        "|---|---|---|---|---|---|---|",
    ]

    def cell(figures: dict[str, Any], name: str) -> str:
        return arms.cell(figures[name], figures["seeds"])

    for name, row in table.items():
        if {"plain", "coherent"} <= set(row):
            plain, coherent = row["plain"], row["coherent"]
            cells = [cell(plain, x) for x in ("last", "stopped", "best")]
            cells += [f"**{cell(coherent, 'last')}**", cell(coherent, "fitted")]
            lines.append(f"| {name} | {' | '.join(cells)} | {coherent['seeds']} |")
    return "\n".join(lines) + "\n"


@dataclasses.dataclass(frozen=True)
class Study:
    """Trains what has not been trained yet, and writes the table, as JSON and as Markdown."""

    fashion_mnist: Annotated[
        pathlib.Path | None, tyro.conf.arg(help="a folder with Fashion-MNIST's IDX files")
    ] = None
    only: Annotated[tuple[str, ...], tyro.conf.arg(help="cases that have one of these words")] = ()
    seeds: Annotated[tuple[int, ...], tyro.conf.arg(help="of every case; none: the case's")] = ()
    runs: Annotated[pathlib.Path, tyro.conf.arg(help="a line for every training")] = pathlib.Path(
        "runs/steps.jsonl"
    )
    out: Annotated[pathlib.Path, tyro.conf.arg(help="the table")] = pathlib.Path(
        "docs/results/steps.json"
    )


def main() -> None:
    """The command line."""
    study, console = tyro.cli(Study), Console(markup=False)
    study.runs.parent.mkdir(parents=True, exist_ok=True)
    load_once = functools.lru_cache(maxsize=1)(load)
    for seed in range(max(case.seeds for case in CASES.values())):
        for name, case in CASES.items():
            wanted = set(study.seeds or range(case.seeds)) & set(range(case.seeds))
            if seed not in wanted or (study.only and not any(x in name for x in study.only)):
                continue
            for method in ("plain", "coherent"):
                key = f"{name}/{method}/{seed}"
                if key in _read(study.runs):
                    continue
                problem = load_once(case, seed, study.fashion_mnist)
                figures = train(case, seed, problem, coherent=method == "coherent")
                with open(study.runs, "a") as file:
                    file.write(json.dumps({"run": key, **figures}) + "\n")
                console.print(key, {x: round(v, 1) for x, v in figures.items()})
    table = summary(_read(study.runs))
    study.out.write_text(json.dumps(table, indent=1) + "\n")
    study.out.with_suffix(".md").write_text(markdown(table))


def _read(runs: pathlib.Path) -> dict[str, dict[str, Any]]:
    if not runs.exists():
        return {}
    lines = map(json.loads, runs.read_text().splitlines())
    return {line.pop("run"): line for line in lines}


if __name__ == "__main__":
    main()
