"""Figure 2: the validation ratio, k, the mini-batch size and μ.

    python -m train experiment figure2 --scale laptop
    python -m train experiment figure2 --scale paper

The paper prints curves, and the values along the axes are not in its text: those here are ours.
It says that the validation ratio "has only a small influence", with a slight negative trend; that
with wrong labels accuracy rises with the number of mini-batches and with smaller mini-batches,
and falls a little on clean labels; and that μ has no significant influence.

Scale paper (section 5.1): CIFAR-10, CifarNet and Inception, clean and 50% wrong labels, 200
epochs; 8 × 16 but where it is varied; k at a fixed total of 128 images a step; the mini-batch size
at k = 8, with as many visits of each image. 112 runs, about 32 hours on a
GPU of 10 TFLOP/s, by the estimate of --dry-run.

Scale laptop: the MLP of figure 3 on 4,000 images of Fashion-MNIST, 8 × 8; k at a fixed total of
64; and that row with figure 3's CifarNet. Two CPU cores: 10 to 40 s a run of the MLP (two minutes
at b = 1), 5 minutes one of CifarNet; 258 runs. At both scales the uniform control and eq. (8) stand
beside the row of k.

Measured here, test accuracy after the last epoch (all of it: docs/results/tables.md):
With half of the labels wrong eq. (10) ends at 69.2, 67.9, 76.5, 77.5 and 73.6% at k = 2, 4, 8, 16
and 32, the uniform control at 68.3, 67.2, 70.5, 74.8 and 73.1; larger mini-batches do better
here. CifarNet ends at 51.8, 53.2, 52.7, 59.6 and 71.8.
"""

import dataclasses

from train.config import Config
from train.experiments.common import (
    CIFARNET,
    INCEPTION,
    LAPTOP,
    LAPTOP_CIFARNET,
    Arm,
    Experiment,
    Panel,
    Scale,
    noisy,
)

RATIOS = (0.1, 0.25, 0.5)
COUNTS = (2, 4, 8, 16, 32)
SIZES = {"paper": (1, 4, 8, 16, 32, 64), "laptop": (1, 2, 4, 8, 16, 32)}
MUS = (0.0001, 0.01, 1.0, 100.0)


def _arms(scale: Scale) -> list[Arm]:
    bases: dict[str, Config] = {"CifarNet": CIFARNET, "Inception": INCEPTION}
    if scale == "laptop":
        bases = {"MLP": LAPTOP, "CifarNet": LAPTOP_CIFARNET}
    return [
        arm
        for network, base in bases.items()
        for percent in (0, 50)
        for arm in _rows(noisy(base, percent / 100), scale, network, percent)
        # There a run takes minutes: of the rows the one that matters most.
        if base is not LAPTOP_CIFARNET or arm.panel.x == "k"
    ]


def _rows(base: Config, scale: Scale, network: str, percent: int) -> list[Arm]:
    prefix = "" if network == "MLP" else f"{network.lower()}-"
    total = base.k * base.b
    of_labels = "50% wrong labels" if percent else "clean labels"

    def arm(row: str, x: float, panel: Panel, method: str = "bilevel", **changes) -> Arm:
        name = "" if method == "bilevel" else f"{method}-"
        label, home = f"{prefix}noise{percent}-{name}{row}{x:g}", None
        if scale == "laptop" and network == "CifarNet" and (row, x) == ("k", base.k):
            label, home = f"{prefix}noise{percent}-{method}", "figure3"  # which trains it
        return Arm(
            label=label,
            config=dataclasses.replace(base, method=method, **changes),
            panel=panel,
            series=f"{method}, {of_labels}",
            x=x,
            home=home,
        )

    ratio = Panel(f"{network}: share of the data kept for validation only", "validation ratio")
    count = Panel(f"{network}: number of mini-batches, {total} images a step", "k", log=True)
    size = Panel(f"{network}: size of the mini-batches, k = {base.k}", "b", log=True)
    mu = Panel(f"{network}: μ", "μ", log=True)
    return [
        *(arm("ratio", x, ratio, validation_ratio=x) for x in RATIOS),
        *(
            arm("k", k, count, method, k=k, b=total // k)
            for method in ("bilevel", "uniform", "bilevel_exact")
            for k in COUNTS
        ),
        *(arm("b", b, size, b=b) for b in SIZES[scale]),
        *(arm("mu", x, mu, mu=x) for x in MUS),
    ]  # fmt: skip


EXPERIMENT = Experiment(
    "figure2", "Figure 2: validation ratio, k, mini-batch size, μ", __doc__, _arms
)
