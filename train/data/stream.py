"""Images in the order that a sampler gives, decoded ahead of the step that needs them."""

import dataclasses
import gc
import multiprocessing
import os
import threading
import weakref
from collections.abc import Iterator
from typing import Any, Protocol, TypeVar

import numpy as np

from train.data.types import Split
from train.sampler import Sampler

Item_co = TypeVar("Item_co", covariant=True)


class Stream(Iterator[Item_co], Protocol[Item_co]):
    """Items one after the other, of which the last need not be taken."""

    def close(self) -> None:
        """Stops what makes the items; there are no more of them."""
        ...


def batches(
    split: Split,
    sampler: Sampler,
    *,
    first_step: int = 0,
    num_steps: int,
    part: Any = (),
    num_workers: int = 4,
    ahead: int = 2,
) -> Stream[tuple[np.ndarray, np.ndarray]]:
    """Yields the images of the steps ``first_step .. num_steps - 1`` of a run.

    The order is the sampler's alone: step s is step ``s % steps_per_epoch`` of epoch
    ``s // steps_per_epoch``, whatever the number of workers and wherever the run starts, and
    nothing before `first_step` is read. Images in memory are gathered on the spot; others are
    read and decoded by worker processes (grain).

    Args:
        split: The training split.
        sampler: Gives the indices of each step.
        first_step: The step to start with, counted over the whole run.
        num_steps: The number of steps of the whole run.
        part: Which part of the ``[k, b]`` indices this process reads, as an index of that array,
            as `train.mesh.Layout.part` gives it; by default all.
        num_workers: Worker processes for images on disk; 0 decodes on threads of this process.
        ahead: How many steps each worker may be ahead.

    Yields:
        ``(indices, images)``: all indices of the step ``int32 [k, b]``, and the images of the
        given part of them, ``uint8 [k, b, h, w, c]``.
    """
    steps = _Steps(split, sampler, first_step, num_steps, part)
    if split.in_memory:
        return (steps[i] for i in range(len(steps)))
    return _Ahead(steps, num_workers, ahead)


def in_order(
    split: Split, batch_size: int, *, part: Any = (), num_workers: int = 4, ahead: int = 2
) -> Stream[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Yields all images of a split once, in order, in batches of one size; for evaluation.

    Args:
        split: The split.
        batch_size: Images per batch.
        part: Which part of the images of a batch this process reads, as an index ``[batch_size]``.
        num_workers: As for `batches`.
        ahead: As for `batches`.

    Yields:
        ``(indices, images, valid)``: ``int32 [batch_size]``, ``uint8 [batch_size, h, w, c]`` (or
        the given part of them) and
        ``bool [batch_size]``. The last batch is filled up with its last example; `valid` is
        false there.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    parts = _Batches(split, batch_size, part)
    if split.in_memory:
        return (parts[i] for i in range(len(parts)))
    return _Ahead(parts, num_workers, ahead)


@dataclasses.dataclass(frozen=True)
class _Steps:
    split: Split
    sampler: Sampler
    first_step: int
    num_steps: int
    part: Any

    def __len__(self) -> int:
        return max(0, self.num_steps - self.first_step)

    def __getitem__(self, item: int) -> tuple[np.ndarray, np.ndarray]:
        epoch, step = divmod(self.first_step + item, self.sampler.steps_per_epoch)
        indices = self.sampler.batch(epoch, step)
        return indices, self.split.read(indices[self.part])


@dataclasses.dataclass(frozen=True)
class _Batches:
    split: Split
    batch_size: int
    part: Any

    def __len__(self) -> int:
        return -(-len(self.split) // self.batch_size)

    def __getitem__(self, item: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        places = item * self.batch_size + np.arange(self.batch_size, dtype=np.int32)
        indices = np.minimum(places, np.int32(len(self.split) - 1))
        return indices, self.split.read(indices[self.part]), places < len(self.split)


class _Ahead(Iterator[Any]):
    """The items of a source, made ahead of their use by worker processes."""

    def __init__(self, source: Any, num_workers: int, ahead: int):
        import grain
        from absl import flags

        if not flags.FLAGS.is_parsed():  # grain reads absl flags, which only absl programs parse
            flags.FLAGS.mark_as_parsed()
        reading = grain.ReadOptions(num_threads=1, prefetch_buffer_size=ahead)
        dataset = grain.MapDataset.source(source).to_iter_dataset(reading)
        if num_workers:
            workers = grain.MultiprocessingOptions(num_workers, per_worker_buffer_size=ahead)
            dataset = dataset.mp_prefetch(workers, worker_init_fn=_end_with_parent)
        iterators = [iter(dataset)] if len(source) else []
        self._iterators = iterators
        # Also at exit, while the modules that closing needs are still there.
        self._closing = weakref.finalize(self, _close, iterators)

    def __next__(self) -> Any:
        if not self._iterators:
            raise StopIteration
        try:
            # Copies: the originals lie in memory that is shared with a worker and reused.
            return tuple(np.array(array) for array in next(self._iterators[0]))
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Stops the workers; there are no more items."""
        self._closing()


def _end_with_parent(worker: int, num_workers: int) -> None:
    """Ends this worker process if the training process is killed: grain's would live on."""
    del worker, num_workers
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch():
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _close(iterators: list) -> None:
    for iterator in iterators:
        iterator.close()
    iterators.clear()
    # Iterators in reference cycles hold shared memory, which would be reported as leaked at exit
    # (google/grain issues 398 and 1031).
    iterator = None
    gc.collect()
