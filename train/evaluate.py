"""What a network knows: scores of images, and figures of scores."""

from typing import Any

import jax
import numpy as np

from train import data
from train.problem import Problem
from train.program import Program
from train.state import State

TRAINING_EXAMPLES = 5000
"""How many of the training examples are measured, the first ones."""

_BATCH = 500


def evaluate(
    program: Program, state: State, problem: Problem
) -> tuple[dict[str, float], np.ndarray | None]:
    """Accuracies in percent (several labels: mean average precision), and losses in training.

    The training set is measured on its first 5,000 examples, without augmentation and dropout,
    against the given and, where they are known, against the true labels. There is no ``test``
    where the data set has no test images.

    Returns:
        the figures, and the scores of the held-out examples [m, classes]; None if there are none.
    """
    figures: dict[str, float] = {}
    train, test = problem.dataset.train, problem.dataset.test
    if len(test):
        figures["test"] = measure(predict(program, state, test), test.labels)
    held_out = None
    if problem.held_out is not None:
        held_out = predict(program, state, problem.held_out)
        figures["held_out"] = measure(held_out, problem.held_out.labels)
    part = np.arange(min(len(train), TRAINING_EXAMPLES))
    scores = predict(program, state, train.take(part))
    for name, labels in (("given", train.labels), ("true", problem.true)):
        if labels is not None:
            figures[f"train_{name}"] = measure(scores, labels[part])
            figures[f"train_{name}_loss"] = cross_entropy(scores, labels[part])
    return figures, held_out


def predict(
    program: Program, state: Any, split: data.Split, *, dropout: bool = False, seed: int = 0
) -> np.ndarray:
    """Scores [n, classes] of every image of a split, without augmentation.

    Args:
        program: the compiled functions.
        state: with the parameters to use, a `State` or a `Best`.
        split: the images.
        dropout: leave dropout on.
        seed: of the dropout masks, and of the random crops that some presets average over.
    """
    size = min(_BATCH, len(split))
    layout, part = program.layout, ()
    if layout is not None:
        size += -size % layout.mesh.size
        part = layout.part((size,))
    key = jax.random.key(seed)
    parts = []
    for i, (_, images, valid) in enumerate(data.in_order(split, size, part=part)):
        batch_key = jax.random.fold_in(key, i)
        if layout is None:
            images = jax.device_put(images)
        else:
            batch_key, images = layout.copy(batch_key), layout.place(images, (size,))
        scores = program.predict(
            state.params, state.batch_stats, images, batch_key, dropout=dropout
        )
        parts.append(jax.device_get(scores)[valid])
    return np.concatenate(parts)


def measure(scores: np.ndarray, labels: np.ndarray) -> float:
    """Accuracy, or mean average precision where examples have several labels; in percent."""
    if labels.ndim == 1:
        return 100 * float(np.mean(np.argmax(scores, -1) == labels))
    from sklearn.metrics import average_precision_score

    present = labels.any(axis=0)
    return 100 * float(average_precision_score(labels[:, present], scores[:, present]))


def cross_entropy(scores: np.ndarray, labels: np.ndarray) -> float:
    """The mean loss of scores as `predict` gives them."""
    if labels.ndim == 1:
        return -float(np.mean(np.take_along_axis(scores, labels[:, None], axis=1)))
    chances = np.maximum(np.where(labels == 1, scores, 1 - scores), np.finfo(np.float32).tiny)
    return -float(np.mean(np.sum(np.log(chances), axis=1)))
