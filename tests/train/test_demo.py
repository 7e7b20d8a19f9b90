import dataclasses
import io
import json
import statistics

import matplotlib.image
import numpy as np
import pytest
from rich.console import Console

from train import __main__ as cli
from train import demo, plots, trainer
from train.config import Config, ConfigError
from train.demo import Demo
from train.run_directory import read_metrics
from train.sums import OMEGA_BINS, SHARE_BINS

LONG = True  # the demo itself, compiled as users have it
METHODS = ("sgd", "uniform", "bilevel", "bilevel_exact", "coherent")
TINY = {"train_size": 160, "hidden": (16,), "k": 4, "b": 8, "epochs": 2}


def tiny_demo(out, **changes):
    settings = {name: changes.pop(name) for name in list(changes) if hasattr(Config, name)}
    return Demo(demo.Shared(**{**TINY, **settings}), **{"seeds": (0, 1), "out": out, **changes})


def run(chosen):
    shown = io.StringIO()
    summary = demo.run(chosen, Console(file=shown, width=200))
    return summary, shown.getvalue()


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A demo's folder, its summary and what it printed."""
    out = tmp_path_factory.mktemp("demo")
    return out, *run(tiny_demo(out))


def test_the_summary_has_the_figures_of_every_method(done):
    out, summary, _ = done
    written = json.loads((out / "summary.json").read_text())
    assert written == summary
    assert tuple(written["methods"]) == METHODS
    for row in written["methods"].values():
        figures = {
            "test_last_mean", "test_last_std", "stopped_mean", "test_best_mean",
            "train_noisy_mean", "seconds_mean",
        }  # fmt: skip
        assert figures <= set(row)
        assert all(isinstance(value, float) for value in row.values())
    settings = written["settings"]
    assert settings["seeds"] == [0, 1]
    assert not {"method", "seed"} & set(settings)
    for name, value in {**TINY, "hidden": [16]}.items():
        assert settings[name] == value


def test_the_figures_are_those_of_the_runs(done):
    out, summary, _ = done
    arms = sorted((out / "arms").iterdir())
    assert len(arms) == 10
    for method in METHODS:
        of_method = [
            arm for arm in arms if json.loads((arm / "config.json").read_text())["method"] == method
        ]
        lines = [read_metrics(arm) for arm in of_method]
        row = summary["methods"][method]
        last = [run[-1]["test"] for run in lines]
        assert row["test_last_mean"] == pytest.approx(statistics.mean(last))
        assert row["test_last_std"] == pytest.approx(statistics.stdev(last))
        best = [max(line["test"] for line in run) for run in lines]
        assert row["test_best_mean"] == pytest.approx(statistics.mean(best))
        chosen = [max(run, key=lambda line: line["held_out"])["test"] for run in lines]
        assert row["stopped_mean"] == pytest.approx(statistics.mean(chosen))
        given = [run[-1]["train_given"] for run in lines]
        assert row["train_noisy_mean"] == pytest.approx(statistics.mean(given))
        seconds = [run[-1]["seconds"] for run in lines]
        assert row["seconds_mean"] == pytest.approx(statistics.mean(seconds))


def test_every_method_sees_the_same_labels_and_as_many_examples(done):
    out, _, _ = done
    for seed in (0, 1):
        arms = sorted((out / "arms").glob(f"*-s{seed}-*"))
        assert len(arms) == 5
        about = [json.loads((arm / "data.json").read_text()) for arm in arms]
        for one in about:
            for name in ("train", "held_out", "labels"):
                assert one[name] == about[0][name]
        steps = [read_metrics(arm)[-1]["step"] for arm in arms]
        assert max(steps) - min(steps) <= 2  # random batches leave fewer examples out


def test_the_table_names_methods_and_both_accuracies(done):
    _, summary, shown = done
    for words in (*demo.LABELS.values(), "test,", "train,", "stopped", "± "):
        assert words in shown
    row = summary["methods"]["uniform"]
    assert f"{row['test_last_mean']:.1f} ± {row['test_last_std']:.1f}" in shown
    assert "held-out and 597 test images of 10 classes" in shown
    assert "[10/10] coherent, seed 1" in shown


def ink(picture, left, right):
    """The share of pixels between two columns that are not white."""
    pixels = matplotlib.image.imread(picture)
    part = pixels[:, int(left * pixels.shape[1]) : int(right * pixels.shape[1]), :3]
    return (part.min(axis=-1) < 0.99).mean()


def has_something(picture):
    height, width, _ = matplotlib.image.imread(picture).shape
    return width > height > 300 and 0.01 < ink(picture, 0, 1) < 0.7


def test_there_are_pictures_with_something_in_each(done):
    out, _, _ = done
    assert has_something(out / "demo.png")
    assert has_something(out / "demo_memorised.png")


def test_weights_have_a_picture_where_the_true_labels_are_known(tmp_path):
    histogram = np.ones((SHARE_BINS, OMEGA_BINS), int).tolist()
    lines = [{"epoch": 1, "test": 50.0, "train_given": 40.0, "omega_histogram": histogram}]
    files = plots.draw_demo({"bilevel": [lines], "coherent": [lines]}, tmp_path)
    names = ["demo.png", "demo_memorised.png", "demo_weights.png"]
    assert files == [tmp_path / name for name in names]
    assert all(map(has_something, files))


def test_a_second_call_trains_nothing(done, monkeypatch):
    out, summary, _ = done
    monkeypatch.setattr(trainer, "loop", lambda *args: pytest.fail("trained again"))
    again, shown = run(tiny_demo(out))
    assert again["methods"] == summary["methods"]
    assert "[10/10]" in shown


def test_another_setting_is_another_arm_and_finished_ones_stay(done, tmp_path):
    out, summary, _ = done
    trained = []
    train = trainer.train
    with pytest.MonkeyPatch.context() as patch:

        def spy(config, directory, *more):
            if not (directory / "result.json").exists():
                trained.append((config.method, config.seed))
            return train(config, directory, *more)

        patch.setattr(trainer, "train", spy)
        more, _ = run(tiny_demo(out, methods=("sgd", "uniform"), seeds=(0, 1, 2)))
    assert trained == [("sgd", 2), ("uniform", 2)]
    assert tuple(more["methods"]) == ("sgd", "uniform")
    assert more["methods"]["sgd"] != summary["methods"]["sgd"]


def chosen_by(monkeypatch, *args):
    """The demo that a command line asks for."""
    asked = []
    monkeypatch.setattr(demo, "run", lambda chosen, console: asked.append(chosen))
    assert cli.main(list(args)) == 0
    return asked[0]


def test_the_default_is_the_demo_of_the_readme(monkeypatch):
    chosen = chosen_by(monkeypatch)
    assert chosen.methods == METHODS
    assert chosen.seeds == (0, 1, 2)
    assert str(chosen.out) == "runs/demo"
    config = chosen.config
    assert (config.dataset, config.noise, config.noise_rate) == ("digits", "symmetric", 0.5)
    assert (config.k, config.b, config.momentum) == (32, 2, 0.9)


@pytest.mark.parametrize(
    ("flags", "field", "value"),
    [
        (["--k", "16"], "k", 16),
        (["--b", "4"], "b", 4),
        (["--noise-rate", "0.3"], "noise_rate", 0.3),
        (["--noise", "uniform"], "noise", "uniform"),
        (["--dataset", "fashion_mnist"], "dataset", "fashion_mnist"),
    ],
)
def test_a_setting_is_a_flag_away(monkeypatch, flags, field, value):
    chosen = chosen_by(monkeypatch, "demo", *flags)
    expected = dataclasses.replace(chosen_by(monkeypatch).config, **{field: value})
    assert chosen.config == expected


@pytest.mark.parametrize("names", [("--method", "--seed"), ("--methods", "--seeds")])
def test_methods_and_seeds_are_a_flag_away(monkeypatch, names):
    chosen = chosen_by(monkeypatch, "demo", names[0], "bilevel", "uniform", names[1], "5")
    assert chosen.methods == ("bilevel", "uniform")
    assert chosen.seeds == (5,)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": ("adam",)}, "unknown method 'adam'; known: sgd, uniform, bilevel, bilevel_ex"),
        ({"methods": ()}, "give at least one method and one seed"),
        ({"seeds": ()}, "give at least one method and one seed"),
        ({"seeds": (-1,)}, "seed must be at least 0, got -1"),
    ],
)
def test_a_wrong_choice_is_told_before_anything_is_trained(tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        run(tiny_demo(tmp_path / "out", **changes))
    assert not (tmp_path / "out").exists()


def test_without_a_method_that_weighs_there_is_no_picture_of_weights(tmp_path):
    _, shown = run(tiny_demo(tmp_path, methods=("sgd",), seeds=(0,)))
    assert "± 0.0" in shown
    assert ink(tmp_path / "demo.png", 0, 1) > 0.01
    assert not (tmp_path / "demo_weights.png").exists()


@pytest.mark.slow
def test_bilevel_weighting_beats_the_uniform_control_by_ten_points(tmp_path):
    """50% wrong labels, one of the demo's seeds."""
    summary, _ = run(dataclasses.replace(Demo(), seeds=(0,), out=tmp_path))
    test = {method: row["test_last_mean"] for method, row in summary["methods"].items()}
    for method in ("bilevel", "bilevel_exact", "coherent"):
        assert test[method] >= test["uniform"] + 10, method
    memorised = {m: row["train_noisy_mean"] for m, row in summary["methods"].items()}
    assert memorised["bilevel"] < memorised["uniform"] - 10
