"""The main job: does bilevel weighting keep a network from memorising wrong labels?

Trains a small MLP on scikit-learn's handwritten digits, half of the training labels flipped to a
wrong class, with SGD, with the uniform control, with the paper's bilevel rule and with coherent
steps, which are not the paper's but the rule to start with, all with the same number of sample
visits; draws what happened and writes the figures down.
"""

import dataclasses
import pathlib
import time
from typing import Annotated, Any

import tyro
from rich.console import Console
from rich.table import Table

from train import arms, trainer
from train import methods as method_files
from train.arms import Outcome, Run, over_seeds, train_all
from train.config import AUTO, Config, ConfigError
from train.data import account
from train.files import write_json
from train.run_directory import InUseError, environment

Help = tyro.conf.arg

LABELS = {
    "sgd": "SGD",
    "uniform": "uniform",
    "bilevel": "bilevel",
    "bilevel_exact": "exact (8)",
    "coherent": "coherent steps",
}


@dataclasses.dataclass(frozen=True)
class Shared(Config):
    """What all runs of the demo have in common: all but the method and the seed."""

    method: tyro.conf.Suppress[str] = "coherent"
    seed: tyro.conf.Suppress[int] = 0


@dataclasses.dataclass(frozen=True)
class Demo:
    """Compares methods on noisy labels, several seeds each, and draws the result."""

    config: tyro.conf.OmitArgPrefixes[Shared] = dataclasses.field(
        default_factory=lambda: Shared(
            k=32,
            b=2,
            noise="symmetric",
            hidden=(256, 256),
            augmentation="standardize",
            decay=0.98,
        )
    )
    methods: Annotated[
        tuple[str, ...],
        Help(help=f"methods to compare, of {', '.join(method_files.NAMES)}", aliases=("--method",)),
    ] = ("sgd", "uniform", "bilevel", "bilevel_exact", "coherent")
    seeds: Annotated[
        tuple[int, ...], Help(help="seeds that each method is trained with", aliases=("--seed",))
    ] = (0, 1, 2)
    out: Annotated[pathlib.Path, Help(help="where the runs, the table and the picture go")] = (
        pathlib.Path("runs/demo")
    )


def run(demo: Demo, console: Console) -> dict[str, Any]:
    """Trains every method with every seed; finished runs are not trained again.

    Returns:
        What is written to ``summary.json``.
    """
    if not demo.methods or not demo.seeds:
        raise ConfigError("give at least one method and one seed")
    configs = [
        dataclasses.replace(demo.config, method=method, seed=seed)
        for method in dict.fromkeys(demo.methods)
        for seed in dict.fromkeys(demo.seeds)
    ]
    problem = trainer.load_problem(configs[0])
    describe(problem, demo.config, console)
    started = time.monotonic()
    runs = [
        Run(
            f"[{number}/{len(configs)}] {config.method}, seed {config.seed}",
            config,
            demo.out / "arms" / f"{config.method}-s{config.seed}-{config.digest()}",
        )
        for number, config in enumerate(configs, 1)
    ]
    outcomes = train_all(runs, console)
    results: dict[str, list[Outcome]] = {}
    for run in runs:
        if run.directory not in outcomes:
            raise InUseError(f"{run.directory} is in use by another process; start again after it")
        results.setdefault(run.config.method, []).append(outcomes[run.directory])
    summary = summarize(demo, results)
    write_json(demo.out / "summary.json", summary)
    console.print(table(summary))
    # Matplotlib takes a second to import: after the training, not before.
    from train import plots

    curves = {m: [lines for _, lines in runs] for m, runs in results.items()}
    picture = plots.draw_demo(curves, demo.out)[0]
    console.print(
        f"{len(configs)} runs in {time.monotonic() - started:.0f} s. "
        f"Picture: {picture}, figures: {demo.out / 'summary.json'}"
    )
    return summary


def describe(problem: trainer.Problem, config: Config, console: Console) -> None:
    """Says what is trained on."""
    dataset = problem.dataset
    if dataset.account is not None:
        console.print(account.table(dataset.account))
    counts = f"{len(dataset.train):,} training"
    if problem.held_out is not None:
        counts += f", {len(problem.held_out):,} held-out"
    test = f"{len(dataset.test):,} test" if len(dataset.test) else "no test"
    wrong = ""
    if problem.noise is not None:
        given, true = problem.noise
        share = 100 * (given != true).mean()
        wrong = f", {share:.1f}% of the labels wrong ({config.noise})"
    steps = problem.order.steps_per_epoch
    batches = f"k = {config.k} mini-batches of {config.b}"
    if config.order == "random":
        batches = f"batches of {config.k * config.b}"
    console.print(
        f"{dataset.name}: {counts} and {test} images of {dataset.num_classes} classes{wrong}; "
        f"{batches}, {config.epochs} epochs of {steps} steps"
    )
    if config.network == AUTO:
        side = "×".join(map(str, dataset.image_shape[:2]))
        console.print(
            f"network {problem.network}, chosen for {len(dataset.train):,} images of {side} "
            "pixels; --network takes another"
        )


def summarize(demo: Demo, results: dict[str, list[tuple[dict[str, Any], Any]]]) -> dict[str, Any]:
    """Means and sample standard deviations over seeds."""
    summary: dict[str, Any] = {"methods": {}}
    for method, runs in results.items():
        names = ("test_last", "stopped", "test_best", "train_noisy", "train_clean", "seconds")
        summary["methods"][method] = over_seeds([result for result, _ in runs], names)
    settings = demo.config.to_json()
    del settings["method"], settings["seed"]
    summary["settings"] = {**settings, "seeds": list(demo.seeds)}
    summary["environment"] = environment()
    return summary


def table(summary: dict[str, Any]) -> Table:
    """The summary for a terminal."""
    seeds = len(summary["settings"]["seeds"])
    return arms.table(
        "method",
        {LABELS.get(method) or method: row for method, row in summary["methods"].items()},
        title=f"Accuracy in %, mean ± standard deviation over {seeds} seeds",
        caption="train: on given (noisy) and on true labels; test: the last epoch, the one that "
        "held-out labels choose, the best one",
    )
