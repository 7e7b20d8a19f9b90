"""Kill a run at random moments and go on: it ends in the bits of the run that was left alone.

Every process is a fresh ``python -m train run``, which loads, compiles and trains anew. The runs
draw random numbers all the time (dropout, random crops, sampling) and save several times a second,
so that many kills fall into a save.
"""

import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import pytest

from tests.train import tiny
from train.config import Config
from train.run_directory import read_metrics

ROOT = pathlib.Path(__file__).parents[2]
CONFIG = Config(
    train_size=320, hidden=(32,), k=4, b=8, epochs=200, momentum=0.9, dropout_rate=0.3,
    augmentation="preactresnet",
)  # fmt: skip
FLAGS = [
    "--train-size", "320", "--hidden", "32", "--k", "4", "--b", "8", "--epochs", "200",
    "--momentum", "0.9", "--dropout-rate", "0.3", "--augmentation", "preactresnet",
    "--checkpoint-seconds", "0.05", "--no-tensorboard",
]  # fmt: skip

pytestmark = pytest.mark.slow


def start(directory):
    environment = {**os.environ, "XLA_FLAGS": "", **tiny.compiled_once()}  # one device, as a user
    command = [sys.executable, "-m", "train", "run", "--out", str(directory), *FLAGS]
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )


def end(process):
    _, errors = process.communicate(timeout=300)
    return process.returncode, errors.decode()


def wait_for_training(directory, process, at_most=float("inf")):
    """Until the loop starts, which is when the file of metrics is written or rewritten."""
    file = directory / "metrics.jsonl"
    before = file.stat().st_mtime_ns if file.exists() else None
    deadline = time.monotonic() + at_most
    while process.poll() is None and time.monotonic() < deadline:
        if file.exists() and file.stat().st_mtime_ns != before:
            return
        time.sleep(0.005)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The uninterrupted run: its directory, and seconds until it trained."""
    directory = tmp_path_factory.mktemp("alone")
    begin = time.monotonic()
    process = start(directory)
    wait_for_training(directory, process)
    until_training = time.monotonic() - begin
    assert end(process) == (0, "")
    return directory, until_training


def assert_ends_as(directory, reference):
    """Trains to the end, and compares every bit."""
    assert end(start(directory))[0] == 0
    tiny.assert_same_bits(tiny.final_state(directory, CONFIG), tiny.final_state(reference, CONFIG))
    lines, expected = (tiny.untimed(read_metrics(d)) for d in (directory, reference))
    assert len(lines) == CONFIG.epochs
    assert lines == expected


def stop_at_random(directory, signum, rng, within=None):
    """Stops a new process at a random moment and returns its exit code.

    That is `within` so many seconds, but not in the training, or else by the progress of the
    training, in its next eight epochs and 10 ms, about what an epoch takes: by the clock of another
    run, which the machine may have slowed, the training would often be over. Four stops leave most
    epochs to do, so that this process may be late.
    """
    process = start(directory)
    if within is not None:
        wait_for_training(directory, process, at_most=rng.uniform(0, within))
    else:
        wait_for_training(directory, process)
        goal = len(read_metrics(directory)) + rng.randint(1, 8)
        while process.poll() is None and len(read_metrics(directory)) < goal:
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 0.01))
    process.send_signal(signum)
    return end(process)[0]


@pytest.mark.parametrize("group", range(2))
def test_killed_at_four_random_moments_it_ends_in_the_same_bits(alone, tmp_path, group):
    """One of the four may fall before the training."""
    reference, until_training = alone
    rng = random.Random(group)
    for attempt in range(4):
        within = until_training if attempt == 1 else None
        code = stop_at_random(tmp_path, signal.SIGKILL, rng, within)
        assert code == -signal.SIGKILL
    assert_ends_as(tmp_path, reference)


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_stopped_by_a_signal_it_says_so_and_ends_in_the_same_bits(alone, tmp_path, signum, code):
    reference, _ = alone
    rng = random.Random(signum)
    saved = 0
    for _ in range(2):
        assert stop_at_random(tmp_path, signum, rng) == code
        before, saved = saved, max(int(p.name) for p in (tmp_path / "checkpoints").iterdir())
        assert saved > before
    assert_ends_as(tmp_path, reference)
