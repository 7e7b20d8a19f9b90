"""The part of the data that no step trains on: who is in it, and what comes of it."""

import contextlib
import dataclasses
import json
import os
import signal

import jax
import numpy as np
import pytest

from tests.train import tiny
from tests.train.known import in_memory, some
from train import data, feed, methods, sampler, trainer
from train import problem as problem_module
from train.config import Config, ConfigError
from train.evaluate import measure, predict
from train.run_directory import read_metrics
from train.signals import Interrupted
from train.state import Resident

HELD_OUT = tiny.config(held_out=0.1, epochs=5, dropout_rate=0.3, momentum=0.9)


def run(config, directory, **options):
    return trainer.train(config, directory, tiny.options(**options))


def stop_at(step):
    def on_step(done):
        if done == step:
            os.kill(os.getpid(), signal.SIGTERM)

    return on_step


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    directory = tmp_path_factory.mktemp("held-out")
    run(HELD_OUT, directory)
    return directory


# --------------------------------------------------------------------------------- who is in


def test_a_share_of_each_class_is_kept_back():
    labels = np.repeat([0, 1, 2, 3, 4], [100, 14, 3, 2, 1])
    kept = sampler.keep_back(labels, 0.1, seed=0)
    assert np.bincount(labels[kept], minlength=5).tolist() == [10, 1, 1, 1, 0]
    assert (np.diff(kept) > 0).all()
    np.testing.assert_array_equal(kept, sampler.keep_back(labels, 0.1, seed=0))
    assert (kept != sampler.keep_back(labels, 0.1, seed=1)).any()


def test_with_several_labels_a_share_of_all_is_kept_back():
    kept = sampler.keep_back(np.ones((40, 3), int), 0.25, seed=0)
    assert len(np.unique(kept)) == 10


def test_turns_go_through_all_before_any_comes_again():
    turns = sampler.Turns(np.arange(100, 150), 16, seed=3)
    for number in (0, 1, 7):
        seen = np.concatenate([turns[3 * number + i] for i in range(3)])
        assert len(np.unique(seen)) == 48  # of 50: two are left out, others each time
        assert set(seen) <= set(range(100, 150))
    again = sampler.Turns(np.arange(100, 150), 16, seed=3)
    np.testing.assert_array_equal(again[20], turns[20])  # a pure function of seed and number
    assert (turns[0] != turns[3]).any()
    assert sampler.Turns(np.arange(5), 16, seed=0)[2].tolist() != [0, 1, 2, 3, 4]
    assert sorted(sampler.Turns(np.arange(5), 16, seed=0)[2]) == [0, 1, 2, 3, 4]


def test_the_parts_are_the_data_set():
    problem = trainer.load_problem(dataclasses.replace(HELD_OUT, train_size=None))
    own = data.load("digits").train
    trained, held_out = problem.dataset.train, some(problem.held_out)
    assert sorted(problem.examples) == list(range(1200))
    assert len(held_out) == round(1200 * 0.1)
    pictures = np.concatenate([in_memory(trained), in_memory(held_out)])
    np.testing.assert_array_equal(pictures, in_memory(own)[problem.examples])
    np.testing.assert_array_equal(problem.everything.images, pictures)
    true = np.concatenate([some(problem.true), some(problem.held_out_true)])
    np.testing.assert_array_equal(true, own.labels[problem.examples])
    given, true = some(problem.noise)
    np.testing.assert_array_equal(true, own.labels)
    labels = np.concatenate([trained.labels, held_out.labels])
    np.testing.assert_array_equal(given[problem.examples], labels)
    share = np.bincount(held_out.labels, minlength=10) / np.bincount(given, minlength=10)
    assert (abs(share - 0.1) < 0.01).all()  # of the given labels, wrong ones included
    assert problem.names == tuple(map(str, problem.examples))


@pytest.mark.parametrize("method", methods.NAMES)
def test_no_method_trains_on_it(method):
    config = tiny.config(method=method, held_out=0.2)
    problem, program = tiny.build(config)
    count = len(problem.dataset.train)
    assert count < 160
    for batch in feed.feed(program, problem, 0, 2 * problem.order.steps_per_epoch):
        assert isinstance(batch, Resident)
        assert batch.indices.max() < count
        assert batch.images.shape[0] == 160  # held-out ones are at hand for those that judge
        if method.startswith("coherent"):
            assert batch.judges.shape == (16,)
            assert batch.judges.min() >= count
        else:
            assert batch.judges is None


def test_images_on_disk_are_judged_by_the_same_examples(monkeypatch):
    problem, program = tiny.build(tiny.config(method="coherent"))
    resident = list(feed.feed(program, problem, 3, 9))
    monkeypatch.setattr(feed, "_RESIDENT_BYTES", 0)
    handed_over = list(feed.feed(program, problem, 3, 9))
    for one, other in zip(resident, handed_over, strict=True):
        assert isinstance(one, Resident)
        of_one = one.batch()
        np.testing.assert_array_equal(of_one.images, other.images)
        judges, others = some(of_one.judges), some(other.judges)
        np.testing.assert_array_equal(judges.images, others.images)
        np.testing.assert_array_equal(judges.labels, others.labels)


def test_nothing_to_hold_out_is_told(monkeypatch):
    split = data.Split(np.zeros((3, 4, 4, 1), np.uint8), np.arange(3, dtype=np.int32))
    dataset = data.Dataset("three", split, split, 3, tuple("abc"), (4, 4, 1))
    monkeypatch.setattr(problem_module, "load_dataset", lambda config: dataset)
    with pytest.raises(ConfigError, match=r"held_out = 0.1: no class has two examples.* give 0"):
        trainer.load_problem(Config(sampling="random", k=2, b=1))


# -------------------------------------------------------------------------- what comes of it


def test_every_line_and_the_result_have_its_accuracy(finished):
    lines = read_metrics(finished)
    assert all(0 <= line["held_out"] <= 100 for line in lines)
    chosen = max(lines, key=lambda line: line["held_out"])  # the first of equals
    result = json.loads((finished / "result.json").read_text())
    assert result["stopped"] == chosen["test"]
    assert (result["stopped_epoch"], result["held_out"]) == (chosen["epoch"], chosen["held_out"])
    assert result["test_last"] == lines[-1]["test"]


def test_the_best_epoch_is_kept_beside_the_newest(finished, tmp_path):
    result = json.loads((finished / "result.json").read_text())
    saved = trainer.open_run(finished)
    assert saved.epoch == result["stopped_epoch"]
    problem = saved.problem()
    for split, name in ((problem.dataset.test, "stopped"), (some(problem.held_out), "held_out")):
        scores = predict(saved.program, saved.network, split)
        assert measure(scores, split.labels) == pytest.approx(result[name])
    # and it is bit by bit what that epoch ended with
    then = tmp_path / "then"
    with contextlib.suppress(Interrupted):  # which the last step is not
        run(HELD_OUT, then, on_step=stop_at(saved.chosen_step))
    tiny.assert_same_bits(some(saved.state.best).params, tiny.final_state(then, HELD_OUT).params)


def test_the_first_of_equals_is_chosen():
    lines = [
        {"epoch": epoch, "step": 4 * epoch, "held_out": held_out, "test": test, "train_given": 9.0,
         "seconds": 1.0}
        for epoch, held_out, test in ((1, 50.0, 60.0), (2, 70.0, 65.0), (3, 70.0, 90.0))
    ]  # fmt: skip
    result = trainer.summarize(lines)
    assert (result["stopped"], result["stopped_epoch"]) == (65.0, 2)
    assert (result["test_best"], result["best_epoch"]) == (90.0, 3)


@pytest.mark.parametrize("step", [2, 9])
def test_a_run_that_is_interrupted_keeps_the_same_best(finished, tmp_path, step):
    with pytest.raises(Interrupted):
        run(HELD_OUT, tmp_path, on_step=stop_at(step))
    run(HELD_OUT, tmp_path)
    states = [tiny.final_state(directory, HELD_OUT) for directory in (tmp_path, finished)]
    tiny.assert_same_bits(*states)
    assert tiny.untimed(read_metrics(tmp_path)) == tiny.untimed(read_metrics(finished))


def test_held_out_examples_are_evidence_too(finished):
    saved = trainer.open_run(finished)
    visits = jax.device_get(some(saved.state.evidence).visits)
    count = len(saved.description.train)
    assert (visits[count:] == HELD_OUT.epochs).all()
    assert len(visits) == len(saved.description.names) == 160


def test_with_nothing_held_out_there_is_nothing_of_it(tmp_path):
    result = run(tiny.config(epochs=1), tmp_path)
    assert not [name for name in result if "stopped" in name or "held_out" in name]
    assert trainer.open_run(tmp_path).state.best is None
    assert trainer.open_run(tmp_path).epoch == 1


@pytest.fixture
def no_test(monkeypatch):
    """Digits without a test part."""
    whole = data.load("digits")
    dataset = dataclasses.replace(whole, test=whole.test.take(np.arange(0)))
    monkeypatch.setattr(problem_module, "load_dataset", lambda config, on_file=None: dataset)


@pytest.mark.usefixtures("no_test")
def test_without_test_images_there_are_no_test_figures(tmp_path, capsys):
    from train import __main__ as cli

    args = ["--train-size", "160", "--hidden", "16", "--k", "4", "--epochs", "2", "--devices", "1"]
    assert cli.main(["run", "--out", str(tmp_path), *args, "--no-tensorboard"]) == 0
    shown = capsys.readouterr().out
    assert "and no test images" in shown
    assert "test_" not in shown
    for line in [json.loads((tmp_path / "result.json").read_text()), *read_metrics(tmp_path)]:
        assert not [name for name in line if "test" in name or name == "stopped"]
    assert cli.main(["evaluate", str(tmp_path)]) == 0
    assert "test" not in capsys.readouterr().out
