"""Trains the arms of an experiment, and sums up what is finished."""

import contextlib
import dataclasses
import fcntl
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from train import arms as arm_loop
from train.arms import Outcome, Run
from train.config import ConfigError
from train.experiments.common import Arm, Experiment, Scale
from train.run_directory import write_json

ROOT = pathlib.Path("runs/experiments")

# Training examples of the data sets; for the steps of a dry run, which loads nothing.
_SIZES = {
    "digits": 1200,
    "mnist": 60_000,
    "fashion_mnist": 60_000,
    "cifar10": 50_000,
    "cifar100": 50_000,
    "imagenet2012": 1_281_167,
    "voc/2007": 5011,
    "clothing1m": 1_000_000,
    "clothing1m/clean": 47_570,
}
_TEST_SIZES = {
    "digits": 597,
    "imagenet2012": 50_000,
    "voc/2007": 4952,
    "clothing1m": 10_526,
    "clothing1m/clean": 10_526,
}


@dataclasses.dataclass(frozen=True)
class Choice:
    """What of an experiment is trained, and where.

    Attributes:
        experiment, scale: which.
        root: the folder of all experiments' runs.
        only: labels of arms; none: all.
        seeds: of every arm; none: the experiment's own.
        data_dir: where the data are, if not in the default place.
        changes: further fields of every arm's config.
        devices: as in `trainer.Options`.
    """

    experiment: Experiment
    scale: Scale
    root: pathlib.Path = ROOT
    only: Sequence[str] = ()
    seeds: Sequence[int] = ()
    data_dir: str | None = None
    changes: dict[str, Any] = dataclasses.field(default_factory=dict)
    devices: int | None = 1

    def arms(self) -> list[Arm]:
        """The chosen arms, and before them those whose runs they start from.

        Raises:
            ConfigError: naming the arms that there are, if one is unknown.
        """
        every = {arm.label: arm for arm in self.experiment.arms(self.scale)}
        for label in self.only:
            if label not in every:
                raise ConfigError(
                    f"{self.experiment.name} has no arm {label!r} at scale {self.scale}; "
                    f"known: {', '.join(every)}"
                )
        wanted = set(self.only or every)
        wanted |= {every[label].after or label for label in wanted}
        changes = dict(self.changes)
        if self.data_dir is not None:
            changes["data_dir"] = self.data_dir
        return [
            dataclasses.replace(arm, config=dataclasses.replace(arm.config, **changes))
            for arm in every.values()
            if arm.label in wanted
        ]

    def all_seeds(self) -> tuple[int, ...]:
        """The seeds of every arm."""
        return tuple(dict.fromkeys(self.seeds or self.experiment.seeds[self.scale]))

    def folder(self, arm: Arm | None = None) -> pathlib.Path:
        """Where the runs of an arm are; without one, the experiment's own folder."""
        home = (arm.home if arm else None) or self.experiment.name
        return self.root / f"{home}-{self.scale}"

    def directory(self, arm: Arm, seed: int) -> pathlib.Path:
        """The run directory of an arm and a seed."""
        return self.folder(arm) / f"{arm.label}-s{seed}"

    def command(self, arm: Arm, seeds: Sequence[int]) -> str:
        """The command that trains an arm."""
        return (
            f"python -m train experiment {self.experiment.name} --scale {self.scale} "
            f"--only {arm.label} --seeds {' '.join(map(str, seeds))}"
        )


def run(choice: Choice, console: Console) -> dict[str, Any]:
    """Trains the chosen arms; writes and returns ``summary.json`` of the experiment's folder.

    The summary maps labels of arms to means over the seeds that are finished, whoever trained
    them; it is written after every run.

    Raises:
        Exception: as `train.arms.train_all`.
    """
    arms, seeds = choice.arms(), choice.all_seeds()
    total = len(arms) * len(seeds)
    title = f"{choice.experiment.name}, scale {choice.scale}"
    console.print(f"{title}: {len(arms)} arms, {len(seeds)} seeds, {total} runs")

    def runs() -> Iterator[Run]:
        number = 0
        for arm in arms:
            for seed in seeds:
                number += 1
                name = f"[{number}/{total}] {arm.label}, seed {seed}"
                config = dataclasses.replace(arm.config, seed=seed)
                if arm.inputs is not None:
                    before = choice.folder() / f"{arm.after}-s{seed}"
                    if arm_loop.outcome(before) is None:
                        console.print(f"{name}: needs {arm.after}, which is not finished")
                        continue
                    config = dataclasses.replace(config, **arm.inputs(before))
                yield Run(name, config, choice.directory(arm, seed))

    def sum_up(_: Run) -> None:
        write_summary(choice)

    try:
        arm_loop.train_all(runs(), console, on_finished=sum_up, devices=choice.devices)
    finally:
        summary = write_summary(choice)
    console.print(table(title, summary))
    console.print(f"figures: {choice.folder() / 'summary.json'}")
    return summary


def write_summary(choice: Choice) -> dict[str, Any]:
    """Sums up the finished runs of all arms of the experiment and writes ``summary.json``."""
    everything = dataclasses.replace(choice, only=(), changes={})  # which may not suit all arms
    summary = {}
    for arm in everything.arms():
        finished = outcomes(everything, arm)
        if finished:
            summary[arm.label] = {
                **summarize(finished),
                "command": choice.command(arm, tuple(finished)),
            }
    if summary:
        folder = choice.folder()
        folder.mkdir(parents=True, exist_ok=True)
        with _alone(folder / "lock"):
            write_json(folder / "summary.json", summary)
    return summary


def outcomes(choice: Choice, arm: Arm) -> dict[int, Outcome]:
    """The finished runs of an arm, by seed, whether chosen or not."""
    found = {}
    prefix = f"{arm.label}-s"
    for directory in choice.folder(arm).glob(f"{prefix}*"):
        seed = directory.name.removeprefix(prefix)
        finished = arm_loop.outcome(directory) if seed.isdecimal() else None
        if finished is not None:
            found[int(seed)] = finished
    return dict(sorted(found.items()))


def summarize(finished: dict[int, Outcome]) -> dict[str, Any]:
    """Means and sample standard deviations over seeds."""
    results = [result for result, _ in finished.values()]
    names = ("test_last", "stopped", "test_best", "best_epoch", "train_noisy", "train_clean",
             "seconds", "memory_mb")  # fmt: skip
    row = arm_loop.over_seeds(results, names)
    return {**row, "steps": results[0]["steps"], "seeds": list(finished)}


@contextlib.contextmanager
def _alone(file: pathlib.Path) -> Iterator[None]:
    with open(file, "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def table(title: str, summary: dict[str, Any]) -> Table:
    """A summary for a terminal."""
    return arm_loop.table(
        "arm",
        {
            label if len(row["seeds"]) == 1 else f"{label} ({len(row['seeds'])} seeds)": row
            for label, row in summary.items()
        },
        title=f"{title}: accuracy in %, mean ± standard deviation over seeds",
    )


# ---------------------------------------------------------------------------------- dry run


# Images per second in training and in evaluation, measured on two CPU cores (AVX2) with bilevel,
# streaming, 8 × 8.
_SPEED = {
    "mlp": (13_000, 90_000),
    "cifarnet": (300, 1100),
    "inception": (75, 170),
    "resnet_small": (600, 2500),
    "preact_resnet18": (35, 120),
}
# Elsewhere, an estimate: a GPU that does 10 TFLOP/s, three forward passes' work for a step, and at
# least 3 ms a step. Test images are seen once an epoch, and as many times as there are crops whose
# predictions are averaged. GFLOP of a forward pass of an image:
_GFLOP = {
    "cifarnet": 0.05,
    "inception": 0.5,
    "preact_resnet18": 1.1,
    "alexnet": 1.4,
    "resnet50": 8.2,
}
_GPU_FLOPS, _GPU_STEP = 1e13, 3e-3
_VIEWS = {"imagenet": 10, "voc": 10}


def steps(arm: Arm) -> int:
    """The steps of a run, about: the sampler may leave out a few examples of an epoch."""
    config = arm.config
    images = config.train_size or _SIZES[config.dataset]
    per_epoch = images * (1 - config.held_out) / (config.k * config.b)
    if config.validation_ratio:  # all but num_validation of the k come from what is left
        share = (config.k - config.num_validation) / config.k
        per_epoch *= (1 - config.validation_ratio) / share
    return config.epochs * max(1, int(per_epoch))


def seconds(arm: Arm, scale: Scale) -> float:
    """How long a run takes, roughly: on two CPU cores at scale laptop, on a GPU at scale paper."""
    config = arm.config
    visits = steps(arm) * config.k * config.b
    tested = config.test_size or _TEST_SIZES.get(config.dataset, 10_000)
    measured = config.epochs * (min(config.train_size or 5000, 5000) + tested)
    if scale == "laptop":
        training, evaluation = _SPEED[config.network]
        return visits / training + measured / evaluation + 5
    measured *= _VIEWS.get(config.augmentation, 1)
    flops = 1e9 * _GFLOP[config.network] * (3 * visits + measured)
    return max(flops / _GPU_FLOPS, _GPU_STEP * steps(arm))


def plan(choice: Choice, console: Console) -> None:
    """Prints the arms, their steps and the time they take; needs no data."""
    arms, seeds = choice.arms(), choice.all_seeds()
    machine = {"laptop": "two CPU cores", "paper": "one GPU (estimate)"}[choice.scale]
    result = Table(title=f"{choice.experiment.title}, scale {choice.scale}")
    result.add_column("arm", no_wrap=True)
    result.add_column("trains")
    result.add_column("steps", justify="right")
    result.add_column(machine, justify="right")
    total = 0.0
    for arm in arms:
        config, duration = arm.config, seconds(arm, choice.scale)
        total += len(seeds) * duration
        result.add_row(
            arm.label,
            f"{config.dataset} {config.network} {config.k}×{config.b} {config.epochs} epochs",
            f"{steps(arm):,}",
            _duration(duration),
        )
    console.print(result)
    console.print(
        f"{len(arms)} arms × {len(seeds)} seeds = {len(arms) * len(seeds)} runs, about "
        f"{_duration(total)} on {machine}; into {choice.folder()}"
    )


def _duration(seconds: float) -> str:
    for unit, size in (("d", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"
