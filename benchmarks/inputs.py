"""The sampler and the input pipeline: images per second, against what a step consumes."""

import pathlib
import tempfile
import time
from collections.abc import Iterable
from typing import Any

import numpy as np
from PIL import Image

from train import data, sampler
from train.data import folders

_K, _B = 8, 16


def measure(seconds: float = 3.0) -> dict[str, float]:
    """Images per second of the stages that feed a step of 8 mini-batches of 16.

    Args:
        seconds: how long each stage is run.

    Returns:
        "sampler": indices alone, stratified, 50,000 examples of 10 classes, epochs drawn
        included. "memory": images of 32×32×3 gathered from memory. "jpeg_256": JPEG files of
        256×256 read and decoded by four worker processes, counted from the second step on.
    """
    labels = np.random.default_rng(0).integers(10, size=50_000)
    order = sampler.stratified(labels, _K, _B, seed=0)
    indices = (
        order.batch(epoch, step)
        for epoch in range(1_000_000)
        for step in range(order.steps_per_epoch)
    )
    images = np.zeros((len(labels), 32, 32, 3), np.uint8)
    split = data.Split(images, labels.astype(np.int32))
    return {
        "sampler": _rate(indices, seconds),
        "memory": _rate(data.batches(split, order, num_steps=10**9), seconds),
        "jpeg_256": _jpeg(seconds),
    }


def _rate(batches: Iterable[Any], seconds: float) -> float:
    """Images per second, from the second step on: the first starts workers or draws an epoch."""
    batches = iter(batches)
    next(batches)
    steps, started = 0, time.perf_counter()
    while (passed := time.perf_counter() - started) < seconds:
        next(batches)
        steps += 1
    return steps * _K * _B / passed


def _jpeg(seconds: float, count: int = 512) -> float:
    rng = np.random.default_rng(0)
    labels = np.arange(count, dtype=np.int32) % 4
    with tempfile.TemporaryDirectory() as folder:
        paths = []
        for i in range(count):
            # Noise on a coarse grid, enlarged: about the bytes of a photograph of this size.
            coarse = rng.integers(256, size=(64, 64, 3), dtype=np.uint8)
            image = Image.fromarray(coarse).resize((256, 256), Image.Resampling.BICUBIC)
            paths.append(pathlib.Path(folder, f"{i}.jpg"))
            image.save(paths[-1], quality=90)
        split = data.Split(folders.Files(tuple(paths), (256, 256, 3), None), labels)
        order = sampler.stratified(labels, _K, _B, seed=0)
        batches = data.batches(split, order, num_steps=10**6)
        try:
            return _rate(batches, seconds)
        finally:
            # Ends the workers before their files go.
            batches.close()
