"""Several processes on one machine train as one: to the same parameters, to the same end."""

import dataclasses
import random
import signal
import time

import jax
import numpy as np
import pytest

from tests.train import processes, tiny
from train import distributed
from train.config import Config
from train.run_directory import read_metrics

pytestmark = pytest.mark.slow

CONFIG = Config(
    method="bilevel", train_size=320, hidden=(32,), k=8, b=8, epochs=7, mu=0.1, noise="symmetric",
    noise_rate=0.5,
)  # fmt: skip
STEPS = 21  # 3 an epoch


def flags(config=CONFIG, *more):
    defaults = Config()
    result = ["--checkpoint-seconds", "0", *more]
    for field in dataclasses.fields(Config):
        value = getattr(config, field.name)
        if value != getattr(defaults, field.name):
            values = value if isinstance(value, tuple) else (value,)
            result += [f"--{field.name.replace('_', '-')}", *map(str, values)]
    return result


def parameters(directory, config=CONFIG):
    state = tiny.final_state(directory, config)
    return int(state.step), jax.tree.map(np.asarray, (state.params, state.opt_state))


def assert_same(actual, expected, tolerance=1e-6):
    assert actual[0] == expected[0]
    paths = jax.tree_util.tree_leaves_with_path(expected[1])
    for (path, x), y in zip(paths, jax.tree.leaves(actual[1]), strict=True):
        x, y = np.float64(x), np.float64(y)
        name = jax.tree_util.keystr(path)
        assert np.linalg.norm(x - y) <= tolerance * np.linalg.norm(x), name


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The parameters of one process on one device."""
    folder = tmp_path_factory.mktemp("alone")

    def of(config):
        directory = folder / config.digest()
        if not (directory / "result.json").exists():
            processes.run(directory, flags(config), 1, 1)
        return parameters(directory, config)

    return of


@pytest.mark.parametrize(
    ("k", "count", "devices", "more"),
    [
        (8, 1, 8, ()),
        (8, 2, 4, ()),
        (8, 4, 2, ()),
        (16, 2, 4, ("--parameters", "sharded")),
        (4, 4, 2, ("--parameters", "sharded")),
    ],
)
def test_trains_to_the_parameters_of_one_device(tmp_path, alone, k, count, devices, more):
    config = dataclasses.replace(CONFIG, k=k, b=64 // k)
    processes.run(tmp_path / "run", flags(config, *more), count, devices)
    actual = parameters(tmp_path / "run", config)
    assert actual[0] >= STEPS
    assert_same(actual, alone(config))
    assert [line["epoch"] for line in read_metrics(tmp_path / "run")] == [*range(1, 8)]


def test_goes_on_with_another_number_of_processes(tmp_path, alone):
    """Stopped by SIGTERM to one of four, gone on by two, then by one with a device."""
    directory = tmp_path / "run"
    at = (2, 7, signal.SIGTERM)
    sharded = flags(CONFIG, "--parameters", "sharded")
    codes, outputs = processes.end(directory, processes.start(directory, sharded, 4, 2, at), 120)
    assert codes == [75] * 4, "\n".join(outputs)
    stopped = parameters(directory)[0]
    assert 7 <= stopped < STEPS  # the same for all, or it could not be read
    for output in outputs:
        assert f"stopped by SIGTERM at step {stopped}; start again to go on" in output

    at = (0, stopped + 3, signal.SIGTERM)
    codes, outputs = processes.end(directory, processes.start(directory, sharded, 2, 4, at), 120)
    assert codes == [75] * 2, "\n".join(outputs)
    assert parameters(directory)[0] > stopped
    processes.run(directory, flags(), 1, 1)
    assert_same(parameters(directory), alone(CONFIG))


def test_the_death_of_one_ends_all_and_the_run_goes_on(tmp_path):
    """Twice one of four is killed after a random step; the third start ends the run."""
    config = dataclasses.replace(CONFIG, epochs=13)
    directory, reference = tmp_path / "run", tmp_path / "reference"
    processes.run(reference, flags(config), 4, 2)
    rng = random.Random(0)
    step = 0
    for _ in range(2):
        victim, step = rng.randrange(4), step + rng.randint(2, 10)
        at = (victim, step, signal.SIGKILL)
        started = processes.start(directory, flags(config), 4, 2, at)
        started[victim].join(120)
        before = time.monotonic()
        codes, outputs = processes.end(directory, started, 60)
        seconds = time.monotonic() - before
        assert codes[victim] == -signal.SIGKILL, "\n".join(outputs)
        for number, (code, output) in enumerate(zip(codes, outputs, strict=True)):
            if number != victim:
                assert code in (5, -signal.SIGABRT), (number, code, seconds, output)
                assert "another process has ended" in output or "another task died" in output
    processes.run(directory, flags(config), 4, 2)
    assert_same(parameters(directory, config), parameters(reference, config))
    assert tiny.untimed(read_metrics(directory)) == tiny.untimed(read_metrics(reference))


def test_all_processes_need_the_same_config(tmp_path):
    directory = tmp_path / "run"
    one, other = (dataclasses.replace(CONFIG, seed=seed) for seed in (0, 1))
    # One port for both: what `start` does, with different flags.
    started = processes.start(directory, [flags(one), flags(other)], 2, 4)
    codes, outputs = processes.end(directory, started, 60)
    assert codes == [2, 2], "\n".join(outputs)
    assert all("the processes have different configs" in output for output in outputs)
    assert not directory.exists()


def test_one_of_one_has_joined_too():
    assert not distributed.is_initialized()
    assert distributed.writes()
    assert distributed.of_first(True) is True
