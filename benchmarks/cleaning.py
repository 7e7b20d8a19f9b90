"""The model after cleaning: `python -m train clean` against cleanlab's CleanLearning.

    python -m benchmarks.cleaning --data-dir FASHION_MNIST [--seeds 0 1 2] [--cases CASE]

Both get the same pictures, some filed wrongly, and the same network, epochs, batches and learning
rate: `clean` trains by coherent steps, ranks, and trains further without the labels that look
wrong; `cleanlab.classification.CleanLearning`, around plain SGD, trains on four fifths five times
to predict the other fifth, and then on what `find_label_issues` leaves. Writes
``docs/results/cleaning.json``: CASE -> {METHOD: {test, seconds: {mean, std}}, seeds}, test accuracy
in percent; `seconds` are of CPU time, as multiples of one plain training's. Needs the extra
``peers``. Finished cells are kept in ``runs/cleaning.jsonl``.
"""

import dataclasses
import json
import pathlib
import tempfile
import time
from typing import Annotated, Any

import numpy as np
import tyro
from PIL import Image
from rich.console import Console
from sklearn.base import BaseEstimator, ClassifierMixin

from benchmarks import suspects
from train import arms, clean, data, noise, sampler, trainer
from train import problem as load
from train.config import AUTO, Config

TITLES = {"digits": "digits", "fashion_mnist": "Fashion-MNIST"}
WORDS = {"symmetric": "wrong", "pair_flip": "one class further"}
SIZES = {"digits": (1200, 597), "fashion_mnist": (4000, 2000)}  # training, test
CASES = {
    f"{TITLES[dataset]}, {noise['noise_rate']:.0%} {WORDS[noise['noise']]}": (
        dataset,
        noise["noise"],
        noise["noise_rate"],
        "mlp",
        SIZES[dataset],
    )
    for dataset in suspects.DATA
    for noise in suspects.NOISE.values()
}
# What `clean` does with such pictures: a residual network, whose training is more than compiling.
CASES["Fashion-MNIST, 2,000, 50% wrong, residual network"] = (
    "fashion_mnist", "symmetric", 0.5, AUTO, (2000, 2000),
)  # fmt: skip
METHODS = ("plain", "clean", "cleanlearning")


def write_folder(folder: pathlib.Path, parts: dict[str, tuple[np.ndarray, np.ndarray]]) -> None:
    """Writes ``FOLDER/{train,test}/CLASS/NUMBER.png``; `parts` are images and labels of each."""
    for part, (images, labels) in parts.items():
        for number, (image, label) in enumerate(zip(images, labels, strict=True)):
            place = folder / part / f"class{label}"
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image[..., 0]).save(place / f"{number:05}.png")


class Network(BaseEstimator, ClassifierMixin):
    """Plain SGD as scikit-learn has it; X are positions of pictures, int [n, 1].

    Attributes:
        config: of the training.
        problem: whose training split the positions are of.
    """

    def __init__(self, config: Config, problem: trainer.Problem):
        self.config, self.problem = config, problem

    def fit(self, X: np.ndarray, y: np.ndarray) -> "Network":
        """Trains a fresh network on the pictures at X with labels y, int [n]."""
        config, kept = self.config, np.ravel(X)
        order = sampler.random(len(kept), config.k, config.b, seed=config.seed)
        each = suspects.trainings(config, self.problem, kept, y.astype(np.int32), order)
        for self.program, self.state in each:
            pass
        self.classes_ = np.arange(self.problem.dataset.num_classes)
        return self

    def predict_proba(self, X: np.ndarray) -> np.ndarray:
        """Probabilities [n, classes] for pictures of the training split."""
        return self.probabilities(self.problem.dataset.train.take(np.ravel(X)))

    def probabilities(self, split: data.Split) -> np.ndarray:
        """Probabilities [n, classes]."""
        return suspects.probabilities(self.program, self.state, split)

    def predict(self, X: np.ndarray) -> np.ndarray:
        """The likeliest class, int [n]."""
        return self.predict_proba(X).argmax(axis=1)

    def test_accuracy(self) -> float:
        """On the test split, in percent."""
        test = self.problem.dataset.test
        return 100 * float(np.mean(self.probabilities(test).argmax(axis=1) == test.labels))


def measure(case: str, seed: int, data_dir: str | None) -> dict[str, dict[str, float]]:
    """Test accuracy and seconds of CPU time of each of `METHODS`."""
    from cleanlab.classification import (  # pyright: ignore[reportMissingImports]
        CleanLearning,
    )

    name, kind, rate, network, sizes = CASES[case]
    dataset = data.load(name, None if name == "digits" else data_dir)
    rng = np.random.default_rng(0)
    parts = {}
    for part, split, size in zip(
        ("train", "test"), (dataset.train, dataset.test), sizes, strict=True
    ):
        chosen = np.sort(rng.permutation(len(split))[:size])
        images, labels = split.read(chosen), split.labels[chosen]
        if name == "digits":
            images = (images.astype(np.uint16) * 255 // 16).astype(np.uint8)
        given = noise.corrupt(kind, labels, rate, 10, seed) if part == "train" else labels
        parts[part] = images, given
    quiet = Console(quiet=True)
    results = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder, out = pathlib.Path(scratch, "pictures"), pathlib.Path(scratch, "out")
        write_folder(folder, parts)
        started = time.process_time()
        summary = clean.run(clean.Clean(folder, out, network=network, seed=seed, devices=1), quiet)
        results["clean"] = {
            "test": summary["test_after"], "seconds": time.process_time() - started,
        }  # fmt: skip
        trained = Config.from_json(json.loads((out / clean.FIRST / "config.json").read_text()))
        config = dataclasses.replace(trained, method="sgd", sampling="random", held_out=0.0)
        problem = trainer.load_problem(config)
        positions = np.arange(len(problem.dataset.train))[:, None]
        given = problem.dataset.train.labels
        started = time.process_time()
        plain = Network(config, problem).fit(positions, given)
        results["plain"] = {
            "test": plain.test_accuracy(), "seconds": time.process_time() - started,
        }  # fmt: skip
        started = time.process_time()
        classifier = Network(config, problem)
        cleaned = CleanLearning(classifier, seed=seed, find_label_issues_kwargs={"n_jobs": 1})
        cleaned.fit(positions, given)
        results["cleanlearning"] = {
            "test": classifier.test_accuracy(), "seconds": time.process_time() - started,
        }  # fmt: skip
        load.forget()
    return results


def summary(cells: list[dict[str, Any]]) -> dict[str, Any]:
    """Means and deviations over seeds; seconds as multiples of plain training's."""
    table: dict[str, Any] = {}
    for case in CASES:
        found = [cell for cell in cells if cell["case"] == case]
        if not found:
            continue
        row: dict[str, Any] = {"seeds": [cell["seed"] for cell in found]}
        for method in METHODS:
            results = [
                {**cell[method], "seconds": cell[method]["seconds"] / cell["plain"]["seconds"]}
                for cell in found
            ]
            row[method] = arms.rounded(results, ("test", "seconds"))
        table[case] = row
    return table


def markdown(table: dict[str, Any]) -> str:
    """A row for every case; the better of the two in bold."""
    lines = [
        "| pictures, labels | plain | clean | CleanLearning | clean takes | CleanLearning takes "
        "| seeds |",
        "|---|---|---|---|---|---|---|",
    ]
    for case, row in table.items():
        tests = {method: row[method]["test"] for method in METHODS}
        cells = {method: arms.cell(x, len(row["seeds"])) for method, x in tests.items()}
        better = max(("clean", "cleanlearning"), key=lambda method: tests[method]["mean"])
        cells[better] = f"**{cells[better]}**"
        takes = [f"{row[m]['seconds']['mean']:.1f} trainings" for m in METHODS[1:]]
        lines.append(f"| {' | '.join([case, *cells.values(), *takes, str(len(row['seeds']))])} |")
    return "\n".join(lines) + "\n"


@dataclasses.dataclass(frozen=True)
class Options:
    """Measures what has not been measured yet, and writes the table, as JSON and as Markdown."""

    data_dir: Annotated[
        str | None, tyro.conf.arg(help="where Fashion-MNIST is, as for `run --data-dir`")
    ] = None
    seeds: tuple[int, ...] = (0, 1, 2)
    cases: Annotated[tuple[str, ...], tyro.conf.arg(help="some of the table's")] = tuple(CASES)
    runs: pathlib.Path = pathlib.Path("runs/cleaning.jsonl")
    out: pathlib.Path = pathlib.Path("docs/results/cleaning.json")


def main(options: Options, console: Console) -> None:
    """Measures the cases and seeds of the options."""
    for case in options.cases:
        if case not in CASES:
            raise SystemExit(f"unknown case {case!r}; known: {'; '.join(CASES)}")
    options.runs.parent.mkdir(parents=True, exist_ok=True)
    lines = options.runs.read_text().splitlines() if options.runs.exists() else []
    cells = [json.loads(line) for line in lines]
    done = {(cell["case"], cell["seed"]) for cell in cells}
    kept = json.loads(options.out.read_text()) if options.out.exists() else {}  # measured elsewhere
    for seed in options.seeds:
        for case in options.cases:
            if (case, seed) not in done:
                cell = {"case": case, "seed": seed, **measure(case, seed, options.data_dir)}
                cells.append(cell)
                with open(options.runs, "a") as file:
                    file.write(json.dumps(cell) + "\n")
                shown = {m: {x: round(v, 1) for x, v in cell[m].items()} for m in METHODS}
                console.print(case, seed, shown)
            table = arms.merged(kept, summary(cells), CASES)
            options.out.write_text(json.dumps(table, indent=1) + "\n")
            options.out.with_suffix(".md").write_text(markdown(table))


if __name__ == "__main__":
    main(tyro.cli(Options, prog="python -m benchmarks.cleaning"), Console(markup=False))
