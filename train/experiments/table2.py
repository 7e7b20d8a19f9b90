"""Table 2: images whose pixels are permuted, each by a permutation of its own.

    python -m train experiment table2 --scale laptop
    python -m train experiment table2 --scale paper

| CIFAR-10, Inception | train | test | gap |
|---|---|---|---|
| SGD | 50.0 | 33.2 | 16.8 |
| bilevel | 34.8 | 33.6 | 1.2 |

What can be learnt is the distribution of colours; what is learnt beyond that is memorised.

Scale paper (section 5.2): the Inception network of section 5.1, 200 epochs of 8 × 16. 5 runs,
about 2 hours on a GPU of 10 TFLOP/s, by the estimate of --dry-run.

Scale laptop: the MLP of figure 3, 8 × 8, on 4,000 images of Fashion-MNIST with permuted pixels;
also with the most and smallest mini-batches, and by coherent steps. Two CPU cores: 10 to 25 s a
run; 21 runs.

Measured here, test accuracy after the last epoch (all of it: docs/results/tables.md):
Train / test 100.0 / 23.0 by SGD, 99.0 / 22.8 by eq. (10), 98.6 / 22.6 by eq. (8): the gap stays.
With 32 mini-batches of 2 eq. (10) ends at 71.6 / 21.3.
"""

import dataclasses

from train.experiments.common import (
    ABLATED,
    INCEPTION,
    LAPTOP,
    Arm,
    Experiment,
    Panel,
    Scale,
    compare,
)

PAPER = {"sgd": {"train": 50.0, "test": 33.2}, "bilevel": {"train": 34.8, "test": 33.6}}


def _arms(scale: Scale) -> list[Arm]:
    if scale == "laptop":
        base = dataclasses.replace(LAPTOP, pixels="random")
        panel = Panel("Fashion-MNIST with random pixels, MLP")
        smallest = dataclasses.replace(base, k=32, b=2)
        coherent = dataclasses.replace(base, method="coherent", held_out=0.1)
        return [
            *compare(base, ABLATED, panel, paper=PAPER),
            Arm("bilevel-k32", smallest, panel, "bilevel, 32 × 2"),
            Arm("coherent", coherent, panel, "coherent"),
        ]
    base = dataclasses.replace(INCEPTION, pixels="random")
    return compare(base, ABLATED, Panel("CIFAR-10 with random pixels, Inception"), paper=PAPER)


EXPERIMENT = Experiment("table2", "Table 2: random pixels", __doc__, _arms)
