"""Figure 5: few training images.

    python -m train experiment figure5 --scale laptop
    python -m train experiment figure5 --scale paper

The paper prints curves and no numbers: "a small, but consistent, improvement over the baseline in
all cases" in mean average precision, and a smaller generalisation gap.

Scale paper (section 5.4): VOC 2007 with all labels of an image, AlexNet, a quarter, half, three
quarters and all of the 5,011 images of trainval (the fractions are ours), 1,000 epochs of 4
mini-batches of 16, learning rate from 0.01 to 0 linearly, crops of 30% to 100% of the area; mean
average precision over ten random crops; on the training side of the first 5,000 of the images
trained on. 20 runs, about 3 days on a GPU of 10 TFLOP/s, by the estimate of --dry-run.

Scale laptop: VOC does not come without a download. The same protocol (4 × 16, linear decay to 0,
clean labels, ever smaller parts of the training set) on Fashion-MNIST with the MLP of figure 3;
accuracy. Two CPU cores: 5 to 40 s a run; 60 runs.

Measured here, test accuracy after the last epoch (all of it: docs/results/tables.md):
With 500 images SGD ends at 77.0%, eq. (10) at 77.4; with more they are level within 0.2 points.
Eq. (10)'s generalisation gap is 2.1 to 3.3 points smaller.
"""

import dataclasses

from train.config import Config
from train.experiments.common import ABLATED, LAPTOP, Arm, Experiment, Panel, Scale, compare

VOC = Config(
    method="bilevel",
    held_out=0.0,
    dataset="voc/2007",
    network="alexnet",
    augmentation="voc",
    k=4,
    b=16,
    epochs=1000,
    learning_rate=0.01,
    schedule="linear",
)
FRACTIONS = (25, 50, 75, 100)
IMAGES = "training images, %"


def _arms(scale: Scale) -> list[Arm]:
    size, base, title = 5011, VOC, "VOC 2007, AlexNet, mean average precision"
    if scale == "laptop":
        size, title = 2000, "Fashion-MNIST, 2,000 images at most, MLP"
        base = dataclasses.replace(LAPTOP, k=4, b=16, epochs=60, schedule="linear")
    return [
        arm
        for percent in FRACTIONS
        for arm in compare(
            dataclasses.replace(base, train_size=size * percent // 100),
            ABLATED,
            Panel(title, IMAGES),
            f"part{percent}-",
            percent,
        )
    ]


EXPERIMENT = Experiment("figure5", "Figure 5: small training sets", __doc__, _arms)
