"""Table 3: other methods against label noise, 40% of the labels wrong.

    python -m train experiment table3 --scale laptop
    python -m train experiment table3 --scale paper

| test accuracy, % | network in the paper | CIFAR-10 | CIFAR-100 |
|---|---|---|---|
| Reed et al., bootstrapping (by Jiang et al.) | ResNet | 62.3 | 46.5 |
| Goldberger and Ben-Reuven, noise layer (by Jiang et al.) | ResNet | 69.9 | 45.8 |
| Azadi et al. (their own figure) | AlexNet | 75.0 | |
| Jiang et al., MentorNet (their own figure) | ResNet | 76.6 | 56.9 |
| Zhang et al., mixup | PreActResNet-18 | 88.3 | 56.4 |
| SGD | PreActResNet-18 | 69.6 | 44.9 |
| dropout, keep 0.3 | PreActResNet-18 | 84.5 | 50.1 |
| label smoothing 0.1 | PreActResNet-18 | 69.3 | 46.1 |
| bilevel | PreActResNet-18 | 87.0 | 59.8 |
| bilevel + mixup | PreActResNet-18 | 89.0 | 61.6 |

The first four rows are quotations, from other networks and schedules. Here every method is
trained with the same network and recipe.

Scale paper: CIFAR-10 and CIFAR-100, PreActResNet-18 and the recipe of the mixup comparison:
learning rate 0.1, ÷ 10 at half and at three quarters of 200 epochs, momentum 0.9, weight decay
1e-4, 128 images a step (8 × 16), crops and flips. 26 runs, about 26 hours
on a GPU of 10 TFLOP/s, by the estimate of --dry-run.

Scale laptop: figure 3's arms at 40%, whose runs it shares, and the methods that figure 3 leaves
out. Two CPU cores: 10 to 25 s a run; 39 runs, 30 of them figure 3's.

Measured here, test accuracy after the last epoch (all of it: docs/results/tables.md):
At 40% SGD ends at 75.6%, eq. (10) at 78.7, eq. (8) 79.4, mixup 80.4, bilevel + mixup 80.5.
"""

import dataclasses

from train.config import Config
from train.experiments import figure3
from train.experiments.common import (
    LAPTOP,
    METHODS,
    Arm,
    Experiment,
    Panel,
    Scale,
    compare,
    noisy,
)

PREACT_RESNET = Config(
    method="bilevel",
    held_out=0.0,
    network="preact_resnet18",
    augmentation="preactresnet",
    k=8,
    b=16,
    epochs=200,
    learning_rate=0.1,
    schedule="steps",
    weight_decay=1e-4,
    noise="symmetric",
    noise_rate=0.4,
)
PAPER = {
    "cifar10": {
        "bootstrapping": 62.3, "noise_layer": 69.9, "azadi": 75.0, "mentornet": 76.6,
        "mixup": 88.3, "sgd": 69.6, "dropout": 84.5, "label_smoothing": 69.3, "bilevel": 87.0,
        "bilevel_mixup": 89.0,
    },
    "cifar100": {
        "bootstrapping": 46.5, "noise_layer": 45.8, "mentornet": 56.9, "mixup": 56.4,
        "sgd": 44.9, "dropout": 50.1, "label_smoothing": 46.1, "bilevel": 59.8,
        "bilevel_mixup": 61.6,
    },
}  # fmt: skip


def _arms(scale: Scale) -> list[Arm]:
    if scale == "laptop":
        panel = Panel("Fashion-MNIST, MLP, 40% wrong labels")
        paper = _paper("cifar10")
        shared = [
            dataclasses.replace(
                arm, panel=panel, x=None, home="figure3", paper=paper.get(arm.series, {})
            )
            for arm in figure3.EXPERIMENT.arms("laptop")
            if arm.x == 40 and arm.config.network == "mlp"
        ]
        left_out = [name for name in METHODS if name not in figure3.LAPTOP_METHODS]
        return shared + compare(noisy(LAPTOP, 0.4), left_out, panel, "noise40-", paper=paper)
    return [
        arm
        for dataset, title in (("cifar10", "CIFAR-10"), ("cifar100", "CIFAR-100"))
        for arm in compare(
            dataclasses.replace(PREACT_RESNET, dataset=dataset),
            METHODS,
            Panel(f"{title}, PreActResNet-18, 40% wrong labels"),
            f"{dataset}-",
            paper=_paper(dataset),
        )
    ]


def _paper(dataset: str) -> dict[str, dict[str, float]]:
    return {name: {"test": value} for name, value in PAPER[dataset].items()}


EXPERIMENT = Experiment("table3", "Table 3: methods against label noise", __doc__, _arms)
