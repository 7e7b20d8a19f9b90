"""How well `python -m train suspects` finds flipped labels, beside cleanlab and training loss.

    python -m benchmarks.suspects --data-dir TFDS_FOLDER

Writes ``docs/results/suspects.json``. Takes about half an hour on two cores; finished runs are
kept in ``runs/suspects`` and not trained again. Needs the extra ``peers`` (cleanlab), but with
``--cross-validate`` and no method after it, which leaves the figures of cleanlab as they are.

Everything has the same network, learning rate and epochs. The rankings compared, by the area under
the ROC curve and the precision at the true number of flips:

- ``bilevel``, ``coherent``, ``sgd``: the score of a run by that method.
- ``training_loss``: the loss of each example after the last epoch of plain SGD.
- ``alignment_METHOD``: the mean alignment of each example's gradient with the momentum of a METHOD
  run, the lowest first, of the examples that are trained on.
- ``cleanlab_METHOD_EPOCH``: cleanlab's label quality (self-confidence, by which
  `find_label_issues` ranks) of out-of-sample predictions, by 5-fold cross-validation of METHOD,
  stopped at EPOCH.
"""

import dataclasses
import json
import pathlib
from collections.abc import Iterator
from typing import Annotated, Any

import jax
import numpy as np
import tyro
from rich.console import Console

from train import data, sampler, suspects, trainer
from train.config import Config
from train.demo import Demo
from train.program import Program
from train.run_directory import environment, write_json

FOLDS = 5
DATA = {"digits": {}, "fashion_mnist": {"train_size": 4000}}
NOISE = {
    "symmetric_20": {"noise": "symmetric", "noise_rate": 0.2},
    "symmetric_50": {"noise": "symmetric", "noise_rate": 0.5},
    "pair_flip_20": {"noise": "pair_flip", "noise_rate": 0.2},
}
METHODS = ("sgd", "bilevel", "coherent")


@dataclasses.dataclass(frozen=True)
class Options:
    """Ranks flipped labels in six cases."""

    data_dir: Annotated[str | None, tyro.conf.arg(help="where TFDS keeps Fashion-MNIST")] = None
    datasets: tuple[str, ...] = tuple(DATA)
    seeds: tuple[int, ...] = (0,)
    cross_validate: Annotated[
        tuple[str, ...], tyro.conf.arg(help="methods whose predictions cleanlab gets")
    ] = ("sgd", "bilevel")
    runs: pathlib.Path = pathlib.Path("runs/suspects")
    out: pathlib.Path = pathlib.Path("docs/results/suspects.json")


def quality(order: np.ndarray, wrong: np.ndarray) -> dict[str, float]:
    """Of a ranking, the most suspicious first: AUC and precision at the number of flips, in %."""
    from sklearn.metrics import roc_auc_score

    ranked = wrong[order]
    return {
        "auc": 100 * float(roc_auc_score(ranked, -np.arange(len(ranked)))),
        "precision": 100 * float(ranked[: ranked.sum()].mean()),
    }


def trainings(
    config: Config,
    problem: trainer.Problem,
    kept: np.ndarray,
    labels: np.ndarray,
    order: sampler.Sampler,
) -> Iterator[tuple[Program, Any]]:
    """Trains a fresh network on a part of a problem.

    Args:
        config: of the training; nothing is held out.
        problem: whose training split the part is of.
        kept: positions of the part, int [m].
        labels: to train on, int [m].
        order: of the part.

    Yields:
        The program and its state after every epoch.
    """
    train = dataclasses.replace(problem.dataset.train.take(kept), labels=labels)
    smaller = dataclasses.replace(
        problem,
        dataset=dataclasses.replace(problem.dataset, train=train),
        true=None if problem.true is None else problem.true[kept],
        order=order,
        examples=problem.examples[kept],
        names=tuple(problem.names[i] for i in kept),
    )
    program = trainer.build_program(config, smaller)
    state = program.init(jax.random.key(config.seed))
    batches = trainer.feed(program, smaller, 0, config.epochs * order.steps_per_epoch)
    for _ in range(config.epochs):
        for _ in range(order.steps_per_epoch):
            state, _ = trainer.advance(program, batches, state, jax.random.key(1))
        yield program, state


def probabilities(program: Program, state: Any, split: data.Split) -> np.ndarray:
    """What a network makes of images, float64 [n, classes]."""
    p = np.exp(trainer.predict(program, state, split).astype(np.float64))
    return p / p.sum(axis=1, keepdims=True)


def cross_validated(config: Config) -> tuple[dict[int, np.ndarray], np.ndarray, np.ndarray]:
    """Predictions for every example by a network that has not seen it.

    Returns:
        probabilities [n, classes] at a fifth, at half and at all of the epochs; given and true
        labels [n].
    """
    config = dataclasses.replace(config, held_out=0.0)
    problem = trainer.load_problem(config)
    train, true = problem.dataset.train, problem.true
    assert true is not None
    order = np.random.default_rng(0).permutation(len(train))
    folds = np.empty(len(train), np.int64)
    for c in range(problem.dataset.num_classes):  # stratified by the given labels
        members = order[train.labels[order] == c]
        folds[members] = np.arange(len(members)) % FOLDS
    stops = (config.epochs // 5, config.epochs // 2, config.epochs)
    chances = {epoch: np.zeros((len(train), problem.dataset.num_classes)) for epoch in stops}
    for fold in range(FOLDS):
        kept, left_out = np.flatnonzero(folds != fold), np.flatnonzero(folds == fold)
        labels = train.labels[kept]
        order = sampler.stratified(labels, config.k, config.b, seed=config.seed)
        each = trainings(config, problem, kept, labels, order)
        for epoch, (program, state) in enumerate(each, 1):
            if epoch in stops:
                chances[epoch][left_out] = probabilities(program, state, train.take(left_out))
    return chances, train.labels, true


def cleanlab(given: np.ndarray, chances: np.ndarray, wrong: np.ndarray) -> dict[str, float]:
    """The quality of cleanlab's ranking, and what `find_label_issues` flags."""
    from cleanlab.filter import find_label_issues  # pyright: ignore[reportMissingImports]
    from cleanlab.rank import get_label_quality_scores  # pyright: ignore[reportMissingImports]

    flagged = find_label_issues(given, chances, n_jobs=1)
    return {
        **quality(np.argsort(get_label_quality_scores(given, chances), kind="stable"), wrong),
        "flagged": int(flagged.sum()),
        "flagged_precision": 100 * float(wrong[flagged].mean()),
        "flagged_recall": 100 * float(flagged[wrong].mean()),
    }


def measure(config: Config, runs: pathlib.Path, cross_validate: tuple[str, ...]) -> dict[str, Any]:
    """All rankings of one case."""
    results: dict[str, Any] = {}
    for method in METHODS:
        arm = dataclasses.replace(config, method=method, example_alignment=True)
        directory = runs / f"{arm.dataset}-{arm.noise}-{arm.noise_rate}-{method}-{arm.digest()}"
        trainer.train(arm, directory, trainer.Options(tensorboard=False))
        found = suspects.rank(directory)
        results[method] = suspects.measure(found)
        assert found.true is not None
        assert found.means.alignment is not None
        wrong, alignment = found.given != found.true, found.means.alignment
        known = np.isfinite(alignment)
        order = np.argsort(alignment[known], kind="stable")
        results[f"alignment_{method}"] = quality(order, wrong[known])
        if method == "sgd":
            run = trainer.open_run(directory)
            scores = trainer.predict(run.program, run.state, found.pictures)
            of_given = np.take_along_axis(scores, found.given[:, None], axis=1)[:, 0]
            results["training_loss"] = quality(np.argsort(of_given, kind="stable"), wrong)
        if method not in cross_validate:
            continue
        file = directory / "cross_validated.npz"
        if not file.exists():
            chances, given, true = cross_validated(arm)
            np.savez_compressed(
                file, epochs=list(chances), chances=list(chances.values()), given=given, true=true
            )
        with np.load(file) as saved:
            given, wrong = saved["given"], saved["given"] != saved["true"]
            for epoch, chances in zip(saved["epochs"], saved["chances"], strict=True):
                results[f"cleanlab_{method}_{epoch}"] = cleanlab(given, chances, wrong)
    return results


def main(options: Options, console: Console) -> None:
    """Measures all cases and seeds; writes the file after each."""
    here = environment()
    here = {name: here[name] for name in ("time", "revision", "python", "packages", "devices")}
    summary = {"environment": here, "cases": {}}
    if options.out.exists():
        summary["cases"] = json.loads(options.out.read_text())["cases"]
    for seed in options.seeds:
        for dataset in options.datasets:
            for name, noise in NOISE.items():
                directory = options.data_dir if dataset != "digits" else None
                config = dataclasses.replace(
                    Demo().config,
                    dataset=dataset, data_dir=directory, seed=seed, **DATA[dataset], **noise,
                )  # fmt: skip
                results = measure(config, options.runs, options.cross_validate)
                seeds = summary["cases"].setdefault(f"{dataset}/{name}", {})
                seeds.setdefault(str(seed), {}).update(results)
                write_json(options.out, summary)
                console.print(f"{dataset} {name}, seed {seed}: AUC, precision")
                for ranking, figures in results.items():
                    console.print(
                        f"  {ranking:24} {figures['auc']:6.2f} {figures['precision']:6.2f}"
                    )


if __name__ == "__main__":
    main(tyro.cli(Options, prog="python -m benchmarks.suspects"), Console())
