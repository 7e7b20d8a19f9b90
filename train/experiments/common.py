"""What the experiments share: arms, the paper's training recipes, the laptop's."""

import dataclasses
import pathlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, NamedTuple

from train.config import Config

Scale = Literal["paper", "laptop"]
SCALES: tuple[Scale, ...] = ("paper", "laptop")


class Panel(NamedTuple):
    """A panel of a figure, or a block of a table.

    Attributes:
        title: what is shown.
        x: what the arms' `x` means; None where the panel is a table of rows alone.
        log: whether x is drawn on a logarithmic axis.
    """

    title: str
    x: str | None = None
    log: bool = False


@dataclasses.dataclass(frozen=True)
class Arm:
    """One config, trained with several seeds.

    Attributes:
        label: names its run directories.
        config: its choices, with seed 0.
        panel: where it is shown.
        series: the curve, or the row of the table, that it belongs to.
        x: its place along the panel's x.
        paper: the paper's numbers, percent: `test`, and `train` on the given labels.
        home: the experiment that keeps its runs, if not its own: arms that two experiments have
            in common are trained once.
        after: the label of an arm that must be finished first.
        inputs: what the config takes from that arm's run directory of the same seed.
    """

    label: str
    config: Config
    panel: Panel
    series: str
    x: float | None = None
    paper: Mapping[str, float] = dataclasses.field(default_factory=dict)
    home: str | None = None
    after: str | None = None
    inputs: Callable[[pathlib.Path], dict[str, Any]] | None = None


@dataclasses.dataclass(frozen=True)
class Experiment:
    """A table or figure of the paper.

    Attributes:
        name: one of `train.experiments.NAMES`.
        title: what it shows.
        doc: the docstring of its file.
        arms: its arms at a scale.
        seeds: of every arm, by scale.
    """

    name: str
    title: str
    doc: str | None
    arms: Callable[[Scale], list[Arm]]
    seeds: Mapping[Scale, tuple[int, ...]] = dataclasses.field(
        default_factory=lambda: {"paper": (0,), "laptop": (0, 1, 2)}
    )


# What is compared, and how the config says so. "Dropout (p = 0.3)" of table 3 is the probability
# of keeping a unit (Arpit et al., 2017).
METHODS: dict[str, dict[str, Any]] = {
    "sgd": {"method": "sgd"},
    "sgd_random": {"method": "sgd", "sampling": "random"},
    "uniform": {"method": "uniform"},
    "label_smoothing": {"method": "label_smoothing"},
    "dropout": {"method": "sgd", "dropout_rate": 0.7},
    "mixup": {"method": "mixup"},
    "bootstrapping": {"method": "bootstrapping"},
    "noise_layer": {"method": "noise_layer"},
    "azadi": {"method": "azadi"},
    "mentornet": {"method": "mentornet"},
    "bilevel": {"method": "bilevel"},
    "bilevel_exact": {"method": "bilevel_exact"},
    "bilevel_mixup": {"method": "bilevel_mixup"},
}
ABLATED = ("sgd", "sgd_random", "uniform", "bilevel", "bilevel_exact")
"""The paper's two, and beside them SGD on random batches, the control and eq. (8).

`sgd` takes the examples that the k mini-batches of a step hold together, k of each label drawn;
the paper does not say how its SGD draws them.
"""


def compare(
    base: Config,
    names: Iterable[str],
    panel: Panel,
    prefix: str = "",
    x: float | None = None,
    paper: Mapping[str, Mapping[str, float]] | None = None,
) -> list[Arm]:
    """An arm for each of `METHODS` that is named, all else alike."""
    return [
        Arm(
            label=f"{prefix}{name}",
            config=dataclasses.replace(base, **METHODS[name]),
            panel=panel,
            series=name,
            x=x,
            paper=(paper or {}).get(name, {}),
        )
        for name in names
    ]


# Nothing is held out beside the validation mini-batches, as in the paper.
# Section 5.1, with 200 epochs of 8 mini-batches of 16; section 5.3 has 100 epochs of 8 × 8. Weight
# decay is that of the authors' released code, which the paper does not mention.
CIFARNET = Config(
    method="bilevel",
    held_out=0.0,
    dataset="cifar10",
    network="cifarnet",
    augmentation="cifarnet",
    k=8,
    b=16,
    epochs=200,
    learning_rate=0.01,
    weight_decay=5e-4,
)
INCEPTION = dataclasses.replace(
    CIFARNET, network="inception", augmentation="inception", learning_rate=0.1
)

# 4,000 images of Fashion-MNIST, few enough to be memorised within a minute.
LAPTOP = Config(
    method="bilevel",
    held_out=0.0,
    dataset="fashion_mnist",
    train_size=4000,
    network="mlp",
    hidden=(512, 512),
    k=8,
    b=8,
    epochs=40,
    learning_rate=0.03,
)
# Without dropout and with 60 epochs of few images: otherwise it memorises nothing in minutes.
LAPTOP_CIFARNET = Config(
    method="bilevel",
    held_out=0.0,
    dataset="fashion_mnist",
    train_size=1000,
    test_size=2000,
    network="cifarnet",
    augmentation="cifarnet",
    k=8,
    b=8,
    epochs=60,
    learning_rate=0.03,
    decay=0.97,
    dropout_rate=0.0,
)
LAPTOP_INCEPTION = Config(
    method="bilevel",
    held_out=0.0,
    dataset="fashion_mnist",
    train_size=640,
    test_size=500,
    network="inception",
    augmentation="inception",
    k=8,
    b=8,
    epochs=20,
    learning_rate=0.1,
)


def noisy(base: Config, rate: float) -> Config:
    """With that share of wrong labels in every class, uniformly of the other classes."""
    return dataclasses.replace(base, noise="symmetric", noise_rate=rate) if rate else base


NOISE = "wrong training labels, %"


def over_noise(base: Config, network: str) -> list[Arm]:
    """Figures 3 and 4: `ABLATED` on CIFAR-10 and CIFAR-100 with 0 to 90% wrong labels."""
    return [
        arm
        for dataset, title in (("cifar10", "CIFAR-10"), ("cifar100", "CIFAR-100"))
        for percent in range(0, 100, 10)
        for arm in compare(
            noisy(dataclasses.replace(base, dataset=dataset), percent / 100),
            ABLATED,
            Panel(f"{title}, {network}", NOISE),
            f"{dataset}-noise{percent}-",
            percent,
        )
    ]
