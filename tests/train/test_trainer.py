import dataclasses
import errno
import gc
import json
import os
import pathlib
import shutil
import signal

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from PIL import Image

from tests.train import tiny
from tests.train.known import in_memory, some
from train import data, feed, loop, noise, sampler, trainer
from train import problem as problem_module
from train.checkpoints import CheckpointError
from train.config import Config, ConfigError
from train.run_directory import RunDirectory, RunDirectoryError, read_metrics
from train.state import RawBatch, Resident
from train.trainer import Interrupted, NotFiniteError

PLAIN = tiny.config()
RANDOM = tiny.config(dropout_rate=0.3, augmentation="preactresnet", momentum=0.9)


def run(config, directory, **options):
    return trainer.train(config, directory, tiny.options(**options))


def read_json(file):
    return json.loads(file.read_text())


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The directory of an uninterrupted run of PLAIN, not to be changed."""
    directory = tmp_path_factory.mktemp("plain")
    run(PLAIN, directory)
    return directory


@pytest.fixture(scope="module")
def finished_random(tmp_path_factory):
    directory = tmp_path_factory.mktemp("random")
    run(RANDOM, directory)
    return directory


def copy(directory, to):
    return pathlib.Path(shutil.copytree(directory, to))


def assert_same_run(directory, reference, config):
    """The same bits in every parameter, in the optimizer's state and in the metrics."""
    tiny.assert_same_bits(tiny.final_state(directory, config), tiny.final_state(reference, config))
    lines, expected = (tiny.untimed(read_metrics(d)) for d in (directory, reference))
    assert lines == expected
    results = [read_json(d / "result.json") for d in (directory, reference)]
    assert tiny.untimed(results[:1]) == tiny.untimed(results[1:])


# ------------------------------------------------------------------------ what a run leaves


@pytest.mark.slow
def test_a_run_learns(tmp_path):
    config = Config(
        method="bilevel", train_size=600, hidden=(32,), k=4, b=8, epochs=6, noise="none",
        learning_rate=0.1, augmentation="standardize",
    )  # fmt: skip
    result = run(config, tmp_path)
    first, *_, last = read_metrics(tmp_path)
    assert result["test_last"] > 85
    assert result["train_noisy"] > 90
    assert "train_clean" not in result  # nobody has looked which labels are right
    assert last["loss"] < 0.5 * first["loss"]
    assert last["running_given"] > first["running_given"] + 0.2


def test_a_run_that_begins_from_another_compiles_its_step_once(finished, tmp_path):
    config = dataclasses.replace(PLAIN, pretrained=str(finished), seed=7, learning_rate=0.0123)
    run(config, tmp_path)
    _, program = tiny.build(config)
    assert (program.step._cache_size(), program.new_epoch._cache_size()) == (1, 1)


def test_every_file_of_a_run(finished):
    assert sorted(path.name for path in finished.iterdir()) == [
        "checkpoints", "config.json", "data.json", "environment.json", "lock", "metrics.jsonl",
        "noise.npz", "result.json",
    ]  # fmt: skip
    assert Config.from_json(read_json(finished / "config.json")) == PLAIN
    assert len(read_json(finished / "environment.json")) == 1
    steps = sorted(int(path.name) for path in (finished / "checkpoints").iterdir())
    assert steps == [8, 12]


def test_metrics_have_a_line_per_epoch(finished):
    lines = read_metrics(finished)
    assert [line["epoch"] for line in lines] == [1, 2, 3]
    assert [line["step"] for line in lines] == [4, 8, 12]
    for line in lines:
        assert set(line) == {
            "epoch", "step", "loss", "running_given", "running_true", "not_finite",
            "omega_negative", "omega_effective", "omega_mean", "omega_by_share",
            "omega_histogram", "test", "train_given", "train_true", "train_given_loss",
            "train_true_loss", *tiny.TIMING,
        }  # fmt: skip
        assert np.sum(line["omega_histogram"]) == 4 * 3  # steps times training mini-batches
        assert 0 <= line["waiting"] <= 1
        assert line["images_per_second"] > 0
        assert line["not_finite"] == 0
        assert 1 <= line["omega_effective"] <= 3
        means = [0 if m is None else m for m in line["omega_by_share"]]
        counts = np.sum(line["omega_histogram"], axis=1)
        assert np.dot(means, counts) / 12 == pytest.approx(line["omega_mean"], rel=1e-5)
    assert np.all(np.diff([line["seconds"] for line in lines]) > 0)


def test_the_result_sums_the_metrics_up(finished):
    lines = read_metrics(finished)
    best = max(lines, key=lambda line: line["test"])
    result = read_json(finished / "result.json")
    assert 100 < result.pop("memory_mb") < 100_000
    assert result == {
        "test_last": lines[-1]["test"],
        "test_best": best["test"],
        "best_epoch": best["epoch"],
        "train_noisy": lines[-1]["train_given"],
        "train_clean": lines[-1]["train_true"],
        "epochs": 3,
        "steps": 12,
        "seconds": lines[-1]["seconds"],
    }


def test_the_noise_is_saved_and_never_touches_the_test_set(finished):
    given, true = noise.load(finished / "noise.npz")
    problem = trainer.load_problem(PLAIN)
    np.testing.assert_array_equal(given, problem.dataset.train.labels)
    np.testing.assert_array_equal(true, problem.true)
    floors = sum(int(0.5 * n) for n in np.bincount(true, minlength=10))
    assert (given != true).sum() == floors
    np.testing.assert_array_equal(problem.dataset.test.labels, data.load("digits").test.labels)


def test_the_metrics_are_those_of_the_last_checkpoint(finished):
    last = read_metrics(finished)[-1]
    measured = trainer.evaluate_run(finished)
    names = ("step", "test", "train_given", "train_true", "train_given_loss", "train_true_loss")
    assert measured == {name: last[name] for name in names}
    # and by hand
    problem, _ = tiny.build(PLAIN)
    params = jax.device_get(tiny.final_state(finished, PLAIN).params)

    def logits(images):
        x = images.reshape(-1, 64) / 16
        x = np.maximum(x @ params["hidden"][0]["kernel"] + params["hidden"][0]["bias"], 0)
        return x @ params["head"]["kernel"] + params["head"]["bias"]

    train, test = problem.dataset.train, problem.dataset.test
    right = np.argmax(logits(test.images), axis=1) == test.labels
    assert last["test"] == pytest.approx(100 * right.mean())
    scores = logits(train.images)
    for labels, name in ((train.labels, "train_given"), (some(problem.true), "train_true")):
        assert last[name] == pytest.approx(100 * np.mean(np.argmax(scores, axis=1) == labels))
        loss = np.log(np.exp(scores).sum(1)) - scores[np.arange(len(labels)), labels]
        assert last[f"{name}_loss"] == pytest.approx(loss.mean(), rel=1e-5)


def test_tensorboard_gets_the_scalars(tmp_path):
    run(PLAIN, tmp_path, tensorboard=True)
    (events,) = (tmp_path / "tensorboard").iterdir()
    content = events.read_bytes()
    assert all(name in content for name in (b"train_true", b"omega_negative", b"waiting"))


def test_the_same_config_ends_in_the_same_bits_and_another_seed_does_not(finished, tmp_path):
    run(PLAIN, tmp_path / "again")
    assert_same_run(tmp_path / "again", finished, PLAIN)
    other = dataclasses.replace(PLAIN, seed=1)
    run(other, tmp_path / "other")
    a, b = (tiny.untimed(read_metrics(d)) for d in (finished, tmp_path / "other"))
    assert a != b
    given, others = (noise.load(d / "noise.npz")[0] for d in (finished, tmp_path / "other"))
    assert (given != others).any()


# -------------------------------------------------------------------- interrupted and resumed


def interrupt_at(step, signum=signal.SIGTERM):
    def on_step(done):
        if done == step:
            os.kill(os.getpid(), signum)

    return on_step


# Step 4 ends an epoch; 1 is before any checkpoint; 12 is the last.
@pytest.mark.parametrize("step", [1, 4, 6, 11])
def test_a_run_that_is_interrupted_ends_in_the_same_bits(finished_random, tmp_path, step):
    with pytest.raises(Interrupted, match=f"SIGTERM at step {step}; start again") as stopped:
        run(RANDOM, tmp_path, on_step=interrupt_at(step))
    assert stopped.value.signum == signal.SIGTERM
    assert int(tiny.final_state(tmp_path, RANDOM).step) == step
    assert not (tmp_path / "result.json").exists()
    steps = []
    run(RANDOM, tmp_path, on_step=steps.append)
    assert steps == list(range(step + 1, 13))
    assert_same_run(tmp_path, finished_random, RANDOM)


@pytest.mark.parametrize(
    "method",
    [
        pytest.param("mentornet", marks=pytest.mark.slow),
        "noise_layer",
        "coherent",
        pytest.param("coherent_elr", marks=pytest.mark.slow),
        "elr",
        pytest.param("bilevel_mixup", marks=pytest.mark.slow),
    ],
)
def test_what_a_method_carries_is_in_the_checkpoint(tmp_path, method):
    config = tiny.config(method=method, dropout_rate=0.3, epochs=2)
    reference, stopped = tmp_path / "reference", tmp_path / "stopped"
    run(config, reference)
    with pytest.raises(Interrupted):
        run(config, stopped, on_step=interrupt_at(3))
    carried = tiny.final_state(stopped, config)
    if method == "mentornet":
        assert int(carried.method.step) == 3
        assert carried.method.percentile > 0
    if method == "noise_layer":
        assert carried.params["channel"].shape == (10, 10)
    if method.endswith("elr"):  # three steps of 32 examples, of an epoch of four
        seen = np.asarray(carried.method).sum(1)
        assert np.count_nonzero(seen) == 96
        np.testing.assert_allclose(seen[seen > 0], 0.3, rtol=1e-5)
    run(config, stopped)
    assert_same_run(stopped, reference, config)


@pytest.mark.slow
def test_images_that_are_not_kept_on_the_device_train_to_the_same_bits(
    finished_random, tmp_path, monkeypatch
):
    made, program = tiny.build(RANDOM)
    size = in_memory(made.dataset.train).nbytes
    kinds = []
    for kept in (size, size - 1):
        monkeypatch.setattr(feed, "_RESIDENT_BYTES", kept)
        kinds += [type(batch) for batch in feed.feed(program, made, 5, 12)]
    assert kinds == [Resident] * 7 + [RawBatch] * 7
    with pytest.raises(Interrupted):
        run(RANDOM, tmp_path, on_step=interrupt_at(6))
    run(RANDOM, tmp_path)
    assert_same_run(tmp_path, finished_random, RANDOM)


def test_a_run_can_be_interrupted_at_every_step(finished, tmp_path):
    for step in range(1, 12):
        with pytest.raises(Interrupted):
            run(PLAIN, tmp_path, on_step=interrupt_at(step, signal.SIGINT))
    run(PLAIN, tmp_path)
    assert_same_run(tmp_path, finished, PLAIN)
    assert len(read_json(tmp_path / "environment.json")) == 12


def test_a_signal_after_the_last_step_is_no_interruption(finished, tmp_path):
    run(PLAIN, tmp_path, on_step=interrupt_at(12))
    assert_same_run(tmp_path, finished, PLAIN)


def test_signals_are_handed_back(tmp_path):
    before = [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)]
    with pytest.raises(Interrupted):
        run(PLAIN, tmp_path, on_step=interrupt_at(2))
    assert [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)] == before


class Crash(BaseException):
    pass


@pytest.mark.parametrize("seconds", [0, 1e-9, 1000])
def test_a_crash_goes_on_from_the_last_checkpoint(finished, tmp_path, seconds):
    def crash(step):
        if step == 10:
            raise Crash

    with pytest.raises(Crash):
        run(PLAIN, tmp_path, on_step=crash, checkpoint_seconds=seconds)
    steps = []
    run(PLAIN, tmp_path, on_step=steps.append, checkpoint_seconds=seconds)
    # the end of the second epoch; every step; none
    assert steps[0] == {0: 9, 1e-9: 10, 1000: 1}[seconds]
    assert_same_run(tmp_path, finished, PLAIN)


def test_only_the_last_checkpoints_are_kept(tmp_path):
    run(PLAIN, tmp_path, checkpoint_seconds=1e-9, keep=3)
    assert sorted(int(p.name) for p in (tmp_path / "checkpoints").iterdir()) == [10, 11, 12]


def test_images_per_second_count_what_this_process_did(finished, tmp_path, monkeypatch):
    clock = iter(np.arange(0.0, 1e6))
    with pytest.raises(Interrupted):
        run(PLAIN, tmp_path, on_step=interrupt_at(3))
    monkeypatch.setattr(loop.time, "monotonic", lambda: next(clock))
    lines = []
    with pytest.raises(Interrupted):
        run(PLAIN, tmp_path, on_step=interrupt_at(5), on_epoch=lines.append)
    (line,) = lines
    # one step of 4 · 8 images before the epoch ended, in a few ticks of a second each
    assert line["images_per_second"] <= 32 / 2


def test_a_finished_run_is_not_trained_again(finished, tmp_path, monkeypatch):
    directory = copy(finished, tmp_path / "run")
    monkeypatch.setattr(trainer, "load_problem", lambda config: pytest.fail("loaded again"))
    steps, lines = [], []
    result = run(PLAIN, directory, on_step=steps.append, on_finished=lines.append)
    assert result == read_json(finished / "result.json")
    assert steps == [12]
    assert lines == read_metrics(finished)[-1:]


def test_a_directory_in_use_or_of_another_run_is_refused(finished, tmp_path):
    directory = copy(finished, tmp_path / "run")
    with pytest.raises(RunDirectoryError, match="k is 4 there and 8 here"):
        run(tiny.config(k=8, b=4), directory)
    with (
        RunDirectory(directory, PLAIN),
        pytest.raises(RunDirectoryError, match="in use by another process"),
    ):
        run(PLAIN, directory)


# ----------------------------------------------------------------------- damage and full disk


@pytest.fixture
def _collected():
    yield
    gc.collect()


@pytest.mark.usefixtures("_collected")
@pytest.mark.filterwarnings(
    "ignore:.*was never awaited:RuntimeWarning",
    "ignore::pytest.PytestUnraisableExceptionWarning",
    "ignore::pytest.PytestUnhandledThreadExceptionWarning",
)
@pytest.mark.parametrize("damage", ["truncated", "flipped", "removed"])
def test_a_damaged_newest_checkpoint_costs_an_epoch_and_no_bit(finished, tmp_path, damage):
    def crash(step):
        if step == 10:
            raise Crash

    with pytest.raises(Crash):
        run(PLAIN, tmp_path, on_step=crash)
    files = (tmp_path / "checkpoints" / "8").rglob("d/*")  # of arrays; their sizes vary
    largest = max(files, key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    if damage == "truncated":
        largest.write_bytes(content[:64])
    elif damage == "removed":
        largest.unlink()
    else:
        for place in range(0, len(content), 64):  # parts of the file are not in use
            content[place] ^= 1
        largest.write_bytes(content)
    steps = []
    with pytest.warns(UserWarning, match="checkpoint of step 8 cannot be read, trying the one bef"):
        run(PLAIN, tmp_path, on_step=steps.append)
    assert steps[0] == 5
    assert_same_run(tmp_path, finished, PLAIN)


def test_a_full_disk_is_a_warning_and_the_run_goes_on(finished, tmp_path, monkeypatch):
    save = ocp.CheckpointManager.save

    def full_in_between(manager, step, **options):
        if step == 8:
            raise OSError(errno.ENOSPC, "No space left on device")
        return save(manager, step, **options)

    monkeypatch.setattr(ocp.CheckpointManager, "save", full_in_between)
    with pytest.warns(UserWarning, match=r"step 8 not written.*No space left on device"):
        run(PLAIN, tmp_path)
    assert_same_run(tmp_path, finished, PLAIN)
    assert sorted(int(p.name) for p in (tmp_path / "checkpoints").iterdir()) == [4, 12]


@pytest.mark.filterwarnings("ignore:checkpoint of step")
@pytest.mark.parametrize("room_until", [0, 8])
def test_a_run_whose_last_checkpoint_finds_no_room_is_not_finished(
    finished, tmp_path, monkeypatch, room_until
):
    save = ocp.CheckpointManager.save

    def full(manager, step, **options):
        if step > room_until:
            raise OSError(errno.ENOSPC, "No space left on device")
        return save(manager, step, **options)

    with monkeypatch.context() as patch:
        patch.setattr(ocp.CheckpointManager, "save", full)
        after = f"step {room_until}" if room_until else "the beginning"
        with pytest.raises(CheckpointError, match=f"step 12 cannot be kept.*goes on from {after}"):
            run(PLAIN, tmp_path)
        assert not (tmp_path / "result.json").exists()
        with pytest.raises(CheckpointError, match="step 10 cannot be kept"):  # nor is a stop saved
            run(PLAIN, tmp_path, on_step=interrupt_at(10))
    steps = []
    run(PLAIN, tmp_path, on_step=steps.append)
    assert steps[0] == room_until + 1
    assert_same_run(tmp_path, finished, PLAIN)


def test_a_finished_run_without_its_network_is_trained_again(finished, tmp_path):
    directory = copy(finished, tmp_path / "run")
    shutil.rmtree(directory / "checkpoints")
    steps = []
    run(PLAIN, directory, on_step=steps.append)
    assert steps[0] == 1
    assert_same_run(directory, finished, PLAIN)


def test_metrics_that_cannot_be_written_end_the_run_and_it_goes_on(finished, tmp_path, monkeypatch):
    append = RunDirectory.append_metrics

    def full(self, line):
        if line["epoch"] == 2:
            raise OSError(errno.ENOSPC, "No space left on device", str(self.path))
        append(self, line)

    with monkeypatch.context() as patch:
        patch.setattr(RunDirectory, "append_metrics", full)
        with pytest.raises(OSError, match="No space left"):
            run(PLAIN, tmp_path)
    run(PLAIN, tmp_path)
    assert_same_run(tmp_path, finished, PLAIN)


def test_nan_stops_the_run_with_the_step_named_and_the_checkpoint_before_kept(tmp_path):
    config = tiny.config(method="uniform", learning_rate=1e30, schedule="constant")
    with pytest.raises(NotFiniteError, match=r"^step 1 left NaN or Inf .* smaller learning rate"):
        run(config, tmp_path, checkpoint_seconds=0)
    assert not (tmp_path / "result.json").exists()
    assert read_metrics(tmp_path) == []
    with pytest.raises(NotFiniteError, match="^step 1 "):  # and again
        run(config, tmp_path, checkpoint_seconds=1e-9)
    assert int(tiny.final_state(tmp_path, config).step) == 1


def test_nan_in_a_later_epoch_keeps_the_last_good_checkpoint(tmp_path, monkeypatch):
    program = trainer.build_program(PLAIN, trainer.load_problem(PLAIN))

    def poisoned(state, raw, key):
        if int(state.step) == 9:
            params = jax.tree.map(lambda x: x * np.float32(np.nan), state.params)
            state = state._replace(params=params)
        return program.step(state, raw, key)

    def poisoned_outside_the_guard(*args):
        with jax.transfer_guard("allow"):
            return poisoned(*args)

    replaced = dataclasses.replace(program, step=poisoned_outside_the_guard)
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "build_program", lambda *_: replaced)
        with pytest.raises(NotFiniteError, match="^step 9 "):
            run(PLAIN, tmp_path, checkpoint_seconds=0)
        state = tiny.final_state(tmp_path, PLAIN)
        assert (int(state.step), int(state.failed)) == (8, -1)
        # a signal does not save what is broken either
        with pytest.raises(NotFiniteError, match="^step 9 "):
            run(PLAIN, tmp_path, on_step=interrupt_at(11))
    assert int(tiny.final_state(tmp_path, PLAIN).step) == 8
    assert [line["step"] for line in read_metrics(tmp_path)] == [4, 8]


# ----------------------------------------------------------------------------------- problems


def test_a_subset_is_the_same_for_all_seeds():
    one, other = (
        in_memory(trainer.load_problem(tiny.config(seed=seed)).dataset.train) for seed in range(2)
    )
    np.testing.assert_array_equal(one, other)
    assert one.shape == (160, 8, 8, 1)
    everything = in_memory(data.load("digits").train)
    assert all((everything == image).all((1, 2, 3)).any() for image in one)


def test_a_run_goes_on_with_its_own_labels_alone(tmp_path):
    true = trainer.load_problem(tiny.config(noise="none")).dataset.train.labels
    config = tiny.config(noise=str(tmp_path / "n.npz"))
    noise.save(tmp_path / "n.npz", (true + 1) % 10, true)
    run(config, tmp_path / "run")
    noise.save(tmp_path / "n.npz", (true + 2) % 10, true)
    for _ in range(2):
        with pytest.raises(
            RunDirectoryError, match="run on other data: the training examples or t"
        ):
            trainer.train(config, tmp_path / "run", tiny.options(), trainer.load_problem(config))
        (tmp_path / "run" / "result.json").unlink(missing_ok=True)
    noise.save(tmp_path / "n.npz", (true + 1) % 10, true)
    run(config, tmp_path / "run")


def test_the_side_of_images_is_a_choice(tmp_path):
    for split in ("train", "test"):
        for label in "ab":
            (tmp_path / split / label).mkdir(parents=True)
            for shade in (40, 200):
                Image.new("L", (12, 12), shade).save(tmp_path / split / label / f"{shade}.png")
    choices = {
        "dataset": "folder", "data_dir": str(tmp_path), "k": 2, "b": 1, "sampling": "random",
        "method": "sgd", "held_out": 0.0,
    }  # fmt: skip
    for size, side in ((None, 12), (9, 9)):
        problem = trainer.load_problem(Config(**choices, image_size=size))
        assert problem.dataset.image_shape == (side, side, 1)
        assert problem.network == "resnet_small"  # none is named


def test_labels_stay_as_they_are_unless_noise_is_asked_for():
    problem = trainer.load_problem(Config())
    assert problem.true is None
    assert problem.noise is None
    given = np.concatenate([problem.dataset.train.labels, some(problem.held_out).labels])
    np.testing.assert_array_equal(given, data.load("digits").train.labels[problem.examples])


def test_a_subset_larger_than_the_set_is_refused():
    with pytest.raises(ConfigError, match="train_size is 1201, and digits has 1200 examples"):
        trainer.load_problem(tiny.config(train_size=1201))
    assert len(trainer.load_problem(tiny.config(train_size=1200)).dataset.train) == 1200


def test_stratified_mini_batches_have_the_same_given_labels():
    problem = trainer.load_problem(PLAIN)
    labels = problem.dataset.train.labels[problem.order.epoch(0)]
    assert (labels == labels[:, :1]).all()


def test_random_sampling_mixes_labels():
    config = tiny.config(sampling="random")
    problem = trainer.load_problem(config)
    assert problem.order.steps_per_epoch == 160 // 32
    assert sampler.label_distance(problem.dataset.train.labels, problem.order.epoch(0)) > 0.2


@pytest.mark.parametrize("clean", [False, True])
def test_a_share_of_the_training_set_is_for_validation_only(clean):
    config = tiny.config(validation_ratio=0.2, clean_validation=clean)
    problem = trainer.load_problem(config)
    given, true = problem.dataset.train.labels, some(problem.true)
    indices = np.concatenate([problem.order.epoch(epoch) for epoch in range(5)])
    validation, training = np.unique(indices[:, 0]), np.unique(indices[:, 1:])
    assert not np.intersect1d(validation, training).size
    assert 20 <= len(validation) <= 40
    assert (given[training] != true[training]).mean() > 0.3
    if clean:
        np.testing.assert_array_equal(given[validation], true[validation])
    else:
        assert (given[validation] != true[validation]).mean() > 0.3
    assert (given[indices] == given[indices[:, :1]]).all()


def test_a_clean_validation_set_runs(tmp_path):
    config = tiny.config(validation_ratio=0.2, clean_validation=True, epochs=1, method="uniform")
    run(config, tmp_path)
    (line,) = read_metrics(tmp_path)
    assert line["omega_effective"] == pytest.approx(3)
    assert line["omega_negative"] == 0
    given, true = noise.load(tmp_path / "noise.npz")
    assert 0.2 < (given != true).mean() < 0.45  # less than half: the clean ones are counted in


def test_pixels_are_permuted_in_both_splits():
    natural, shuffled, random = (
        trainer.load_problem(tiny.config(pixels=pixels)).dataset
        for pixels in ("natural", "shuffled", "random")
    )
    for split in ("train", "test"):
        plain = getattr(natural, split).images.reshape(-1, 64)
        for permuted in (shuffled, random):
            images = getattr(permuted, split).images.reshape(-1, 64)
            np.testing.assert_array_equal(np.sort(images), np.sort(plain))
            assert (images != plain).any(1).all()
    # one permutation for all: pixel statistics over the set are permuted
    plain, same = (in_memory(d.train).reshape(-1, 64).sum(0) for d in (natural, shuffled))
    np.testing.assert_array_equal(np.sort(same), np.sort(plain))
    each = in_memory(random.train).reshape(-1, 64).sum(0)
    assert (np.sort(each) != np.sort(plain)).any()


def test_no_noise_gives_true_labels(tmp_path):
    for config in (tiny.config(noise="none"), tiny.config(noise_rate=0.0)):
        problem = trainer.load_problem(config)
        own = data.load("digits").train.labels[problem.examples]
        np.testing.assert_array_equal(problem.dataset.train.labels, own)


def test_noise_from_a_file(tmp_path):
    true = trainer.load_problem(tiny.config(noise="none")).dataset.train.labels
    given = (true + 3) % 10
    noise.save(tmp_path / "n.npz", given, true)
    problem = trainer.load_problem(tiny.config(noise=str(tmp_path / "n.npz")))
    np.testing.assert_array_equal(problem.dataset.train.labels, given)
    np.testing.assert_array_equal(problem.true, true)
    with pytest.raises(ValueError, match="is for other data"):
        trainer.load_problem(tiny.config(noise=str(tmp_path / "n.npz"), train_size=159))


def test_missing_data_say_what_to_do(tmp_path):
    with pytest.raises(data.DataNotFoundError, match="python -m train prepare cifar10"):
        trainer.load_problem(Config(dataset="cifar10", data_dir=str(tmp_path)))


# --------------------------------------------------------------------------- relabel, evaluate


def test_relabelling_leaves_dropout_on(finished, finished_random):
    given, true = trainer.relabel_run(finished_random, seed=1)
    again, _ = trainer.relabel_run(finished_random, seed=1)
    other, _ = trainer.relabel_run(finished_random, seed=2)
    np.testing.assert_array_equal(given, again)
    assert (given != other).any()
    np.testing.assert_array_equal(true, trainer.load_problem(RANDOM).true)
    # without dropout the seed has nothing to say, and the labels are the network's predictions
    plain, same = (trainer.relabel_run(finished, seed=seed)[0] for seed in range(2))
    np.testing.assert_array_equal(plain, same)
    accuracy = 100 * (plain == trainer.load_problem(PLAIN).true).mean()
    assert accuracy == pytest.approx(read_metrics(finished)[-1]["train_true"])


def test_evaluating_what_is_no_run_or_has_no_checkpoint(tmp_path, finished):
    with pytest.raises(ConfigError, match="holds no run: there is no config.json"):
        trainer.evaluate_run(tmp_path)
    directory = copy(finished, tmp_path / "run")
    shutil.rmtree(directory / "checkpoints")
    with pytest.raises(ConfigError, match="has no checkpoint yet"):
        trainer.evaluate_run(directory)
    assert not (directory / "checkpoints").exists()


def test_evaluating_does_not_disturb_a_run_in_another_process(finished, tmp_path):
    directory = copy(finished, tmp_path / "run")
    (directory / "checkpoints" / "16.orbax-checkpoint-tmp").mkdir()
    before = sorted(directory.rglob("*"))
    with RunDirectory(directory, PLAIN):
        before = {path: path.stat().st_mtime_ns for path in directory.rglob("*")}
        trainer.evaluate_run(directory)
        assert {path: path.stat().st_mtime_ns for path in directory.rglob("*")} == before


# ------------------------------------------------------------------------------ several labels


@pytest.fixture
def multi_label(monkeypatch):
    """Stripes: label c is set where row c of the image is bright."""

    def make(n, seed):
        rng = np.random.default_rng(seed)
        labels = (rng.random((n, 4)) < 0.4).astype(np.int32)
        images = rng.integers(0, 60, (n, 4, 4, 1)) + 150 * labels[:, :, None, None]
        return data.Split(images.astype(np.uint8), labels)

    dataset = data.Dataset(
        "stripes", make(96, 0), make(64, 1), 4, tuple("abcd"), (4, 4, 1), multi_label=True
    )
    problem_module.forget()
    monkeypatch.setattr(data, "load", lambda name, data_dir, **options: dataset)
    yield dataset
    problem_module.forget()


def test_several_labels_from_end_to_end(multi_label, tmp_path):
    from sklearn.metrics import average_precision_score

    config = Config(
        dataset="voc/2007", noise="none", hidden=(16,), k=4, b=8, epochs=12, learning_rate=0.1,
        method="uniform",
    )  # fmt: skip
    result = run(config, tmp_path)
    assert not (tmp_path / "noise.npz").exists()
    opened = trainer.open_run(tmp_path)
    scores = trainer.predict(opened.program, opened.state, multi_label.test)
    assert ((scores > 0) & (scores < 1)).all()
    each = [average_precision_score(multi_label.test.labels[:, c], scores[:, c]) for c in range(4)]
    assert result["test_last"] == pytest.approx(100 * np.mean(each))
    assert result["test_last"] > 90  # what chance has is the share of positives, 40
    assert trainer.evaluate_run(tmp_path)["test"] == result["test_last"]
    labels = multi_label.test.labels
    loss = -np.where(labels == 1, np.log(scores), np.log(1 - scores)).sum(1).mean()
    assert trainer.cross_entropy(scores, labels) == pytest.approx(loss, rel=1e-5)


def test_what_is_for_one_label_is_refused_for_several(multi_label, tmp_path):
    base = {"dataset": "voc/2007", "hidden": (16,), "k": 4, "b": 8}
    with pytest.raises(ConfigError, match="noise symmetric is for one label per example"):
        trainer.load_problem(Config(**base, noise="symmetric"))
    with pytest.raises(ConfigError, match="validation_ratio is for one label per example"):
        trainer.load_problem(Config(**base, method="bilevel", noise="none", validation_ratio=0.1))
    config = Config(**base, noise="none", epochs=1, learning_rate=0.1, method="sgd")
    run(config, tmp_path)
    with pytest.raises(ConfigError, match="several labels per example: nothing to relabel"):
        trainer.relabel_run(tmp_path)


def test_classes_without_a_test_image_are_left_out_of_the_mean():
    labels = np.array([[1, 0, 0], [0, 1, 0], [1, 1, 0]])
    scores = np.array([[0.9, 0.1, 0.3], [0.2, 0.8, 0.5], [0.8, 0.7, 0.1]])
    assert trainer.measure(scores, labels) == 100
    assert trainer.measure(scores[:, ::-1], labels) < 100
    assert trainer.measure(scores, np.array([0, 1, 2])) == pytest.approx(200 / 3)
