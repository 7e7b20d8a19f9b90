import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from train import data, sampler


class Numbered:
    """Images on disk, as it were: image i is filled with i."""

    def __init__(self, n):
        self.n = n

    def __len__(self):
        return self.n

    def __getitems__(self, indices):
        if 99 in indices:
            raise ValueError("image 99 is damaged")
        return np.tile(np.asarray(indices, np.uint8)[:, None, None, None], (1, 2, 3, 1))


def make(n, in_memory):
    images = Numbered(n)
    labels = np.arange(n, dtype=np.int32) % 3
    if in_memory:
        return data.Split(images.__getitems__(list(range(n))), labels)
    return data.Split(images, labels)


# 24 examples, 3 classes of 8: 12 pairs, 4 steps an epoch
LABELS = np.arange(24) % 3


def draws():
    return sampler.stratified(LABELS, 2, 3, seed=0)


@pytest.mark.parametrize(
    ("in_memory", "num_workers"),
    [(True, 0), (False, 0), pytest.param(False, 2, marks=pytest.mark.slow)],
)
def test_steps_come_in_the_samplers_order_from_any_step(in_memory, num_workers):
    split = make(24, in_memory)
    stream = data.batches(split, draws(), first_step=3, num_steps=11, num_workers=num_workers)
    steps = list(stream)
    assert len(steps) == 8
    for step, (indices, images) in enumerate(steps, 3):
        np.testing.assert_array_equal(indices, draws().batch(step // 4, step % 4))
        assert images.shape == (2, 3, 2, 3, 1)
        assert images.dtype == np.uint8
        np.testing.assert_array_equal(images[..., 0, 0, 0], indices)


@pytest.mark.parametrize("in_memory", [True, False])
def test_a_process_reads_its_part_only(in_memory):
    part = np.s_[:, 1:2]
    stream = data.batches(make(24, in_memory), draws(), num_steps=2, part=part, num_workers=0)
    for step, (indices, images) in enumerate(stream):
        np.testing.assert_array_equal(indices, draws().batch(0, step))
        np.testing.assert_array_equal(images[..., 0, 0, 0], indices[:, 1:2])


@pytest.mark.parametrize("in_memory", [True, False])
def test_in_order_reads_its_part_only(in_memory):
    part = (np.arange(2, 4),)
    for indices, images, valid in data.in_order(make(8, in_memory), 4, part=part, num_workers=0):
        assert (indices.shape, valid.shape) == ((4,), (4,))
        np.testing.assert_array_equal(images[:, 0, 0, 0], indices[2:])


@pytest.mark.parametrize("in_memory", [True, False])
def test_in_order_covers_everything_once(in_memory):
    parts = list(data.in_order(make(10, in_memory), 4, num_workers=0))
    assert [images.shape for _, images, _ in parts] == [(4, 2, 3, 1)] * 3
    indices, images, valid = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    np.testing.assert_array_equal(indices[valid], np.arange(10))
    np.testing.assert_array_equal(images[:, 0, 0, 0], indices)
    np.testing.assert_array_equal(valid, np.arange(12) < 10)
    np.testing.assert_array_equal(indices[~valid], 9)


def test_nothing_left_to_do():
    stream = data.batches(make(24, False), draws(), first_step=5, num_steps=5, num_workers=0)
    assert list(stream) == []


def test_a_stream_may_be_left_early():
    stream = data.batches(make(24, False), draws(), num_steps=100, num_workers=0)
    next(stream)
    stream.close()


@pytest.mark.parametrize("num_workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_an_error_names_its_cause(num_workers):
    split = data.Split(Numbered(100), np.zeros(100, np.int32))
    with pytest.raises(Exception, match="image 99 is damaged"):
        list(data.in_order(split, 10, num_workers=num_workers))


def test_batch_size():
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        data.in_order(make(3, True), 0)


SCRIPT = """
import multiprocessing, os, signal, sys
import numpy as np
from train import data

class Numbered:
    def __len__(self):
        return 1000
    def __getitems__(self, indices):
        return np.zeros((len(indices), 64, 64, 3), np.uint8)

if __name__ == "__main__":
    stream = data.in_order(data.Split(Numbered(), np.zeros(1000, np.int32)), 8, num_workers=2)
    next(stream), next(stream)
    print(*(child.pid for child in multiprocessing.active_children()), flush=True)
    if sys.argv[1] == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    raise SystemExit(75)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("ending", "status"), [("exit", 75), ("killed", -signal.SIGKILL)])
def test_workers_end_with_the_process(tmp_path, ending, status):
    path = tmp_path / "script.py"
    path.write_text(SCRIPT)
    root = pathlib.Path(__file__).resolve().parents[2]
    with subprocess.Popen(
        [sys.executable, path, ending],
        env={**os.environ, "PYTHONPATH": str(root)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == status, stderr
    if ending == "exit":  # although the stream was neither finished nor closed
        assert stderr == ""
    workers = [int(pid) for pid in stdout.split()]
    assert len(workers) == 2
    deadline = time.monotonic() + 10
    while any(alive(pid) for pid in workers):
        assert time.monotonic() < deadline, "the workers go on after the process is gone"
        time.sleep(0.1)


def alive(pid):
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
