import csv

import numpy as np
import pytest
from numpy.typing import ArrayLike

from tests.train import tiny
from tests.train.known import some
from train import __main__ as cli
from train import correct, data, saved, suspects, trainer
from train.config import Config, ConfigError
from train.description import Description
from train.evidence import Means
from train.problem import load_problem

CLASSES = ("cat", "dog", "cow")


def made(scores, given, suggested, *, agreement: ArrayLike = 0.5, held_out=()):
    """A ranking and the data set that it is of: examples a, b, ... in the order given."""
    scores, given, suggested = (np.asarray(x) for x in (scores, given, suggested))
    names = tuple("abcdefgh"[: len(given)])
    split = data.Split(np.zeros((len(given), 2, 2, 1), np.uint8), given)
    dataset = data.Dataset("made", split, split, 3, CLASSES, (2, 2, 1), train_files=names)
    about = Description(
        dataset="made", class_names=CLASSES, image_shape=(2, 2, 1), max_value=255,
        multi_label=False, network="mlp", steps_per_epoch=1, train=names, held_out=(),
        labels=tuple(given), own_labels=None, counts={}, fit="crop", ranges={}, has_files=True,
        fingerprint=None,
    )  # fmt: skip
    order = np.argsort(-scores, kind="stable")
    agreement = np.broadcast_to(np.asarray(agreement, float), scores.shape)
    ranking = suspects.Suspects(
        names=tuple(names[i] for i in order), given=given[order], suggested=suggested[order],
        true=None, held_out=np.isin(np.array(names)[order], list(held_out)),
        means=Means(scores[order], scores[order], agreement[order]), pictures=split.take(order),
        description=about,
    )  # fmt: skip
    return ranking, dataset


def test_drop_leaves_out_what_has_a_score_above_zero():
    ranking, dataset = made([-1, 0.1, 0, np.nan, 2], [0, 1, 1, 2, 0], [0, 2, 2, 2, 0])
    corrected = correct.correct(ranking, dataset, "drop")
    assert corrected.labels == {"a": "cat", "c": "dog", "d": "cow"}
    assert (corrected.total, corrected.wrong, corrected.changed) == (5, 2, 2)


def test_relabel_takes_the_suggested_label():
    ranking, dataset = made([-1, 0.1, 0, np.nan, 2], [0, 1, 1, 2, 0], [1, 2, 2, 0, 0])
    corrected = correct.correct(ranking, dataset, "relabel")
    # The last one looks wrong, and yet the network gives it its label by now.
    assert corrected.labels == {"a": "cat", "b": "cow", "c": "dog", "d": "cow", "e": "cat"}
    assert (corrected.wrong, corrected.changed) == (2, 1)
    assert any("1 to which the network itself gives" in line for line in corrected.said())


@pytest.mark.parametrize(
    ("how", "labels"),
    [
        ("drop", {"a": "cat", "c": "dog", "d": "cow"}),
        ("relabel", {"a": "cat", "b": "dog", "c": "dog", "d": "cow"}),
    ],
)
def test_no_class_is_emptied(how, labels):
    # All that is left of the cows to train on looks wrong, and of the cats one.
    ranking, dataset = made([-1, 1, -1, 2], [0, 0, 1, 2], [0, 1, 1, 0])
    corrected = correct.correct(ranking, dataset, how)
    assert corrected.labels == labels
    assert corrected.spared == {"cow": 1}
    assert (corrected.wrong, corrected.changed) == (2, 1)
    assert any("left as they are: cow" in line for line in corrected.said())


def test_a_class_that_lived_on_relabelled_examples():
    # The cow becomes a dog and the only dog a cat; the cow has to stay, and then so has the dog.
    ranking, dataset = made([-1, 1, 1], [0, 1, 2], [0, 0, 1])
    corrected = correct.correct(ranking, dataset, "relabel")
    assert corrected.labels == {"a": "cat", "b": "dog", "c": "cow"}
    assert corrected.spared == {"cow": 1, "dog": 1}


def test_held_out_examples_are_not_enough_for_a_class():
    ranking, dataset = made([-1, -1, 1, -1], [0, 1, 2, 2], [0, 1, 0, 2], held_out="d")
    corrected = correct.correct(ranking, dataset, "drop")
    assert corrected.spared == {"cow": 1}
    assert corrected.held_out == {"d"}


def test_what_is_surest():
    ranking, dataset = made(
        [1, 2, -1, 3, -1], [0, 0, 0, 1, 1], [1, 1, 0, 0, 1], agreement=[0, 0.1, 0, 0, 1]
    )
    corrected = correct.correct(ranking, dataset, "drop")
    assert (corrected.wrong, corrected.never) == (3, 2)
    assert next(corrected.said()) == (
        "3 labels of 5 (60.0%) look wrong; 2 of them no epoch predicted, which are the surest"
    )


def test_examples_that_the_run_did_not_see_stay():
    ranking, dataset = made([1, -1, -1], [0, 0, 1], [1, 0, 1])
    # Since then the second has been relabelled in the folder, and a picture has come.
    now = data.Split(np.zeros((3, 2, 2, 1), np.uint8), np.array([0, 2, 2]))
    dataset = data.Dataset("made", now, now, 3, CLASSES, (2, 2, 1), train_files=("a", "b", "new"))
    ranking = ranking._replace(
        names=("a",), given=ranking.given[:1], suggested=ranking.suggested[:1],
        held_out=ranking.held_out[:1], means=Means(*(np.array([1.0]),) * 3),
    )  # fmt: skip
    corrected = correct.correct(ranking, dataset, "drop")
    assert corrected.labels == {"a": "cat", "b": "cow", "new": "cow"}
    assert corrected.spared == {"cat": 1}


def test_the_list_with_and_without_a_split(tmp_path):
    ranking, dataset = made([-1, 1, -1], [0, 0, 1], [0, 1, 1], held_out="bc")
    corrected = correct.correct(ranking, dataset, "drop")
    corrected.write(tmp_path / "new/plain.csv", "file")
    assert (tmp_path / "new/plain.csv").read_text() == "file,label\na,cat\nc,dog\n"
    corrected.write(tmp_path / "split.csv", "file", with_split=True)
    assert (tmp_path / "split.csv").read_text() == (
        "file,label,split\na,cat,train\nc,dog,held_out\n"
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """400 digits, a quarter of the labels flipped, the network kept from memorising."""
    directory = tmp_path_factory.mktemp("correct") / "run"
    config = tiny.config(
        method="coherent", train_size=400, hidden=(64,), noise="symmetric", noise_rate=0.25,
        epochs=15, augmentation="standardize", learning_rate=0.03,
    )  # fmt: skip
    trainer.train(config, directory, tiny.options(checkpoint_seconds=60))
    return directory


@pytest.mark.parametrize("how", ["drop", "relabel"])
def test_the_command(run, tmp_path, capsys, monkeypatch, how):
    monkeypatch.setenv("COLUMNS", "250")
    listed = tmp_path / "lists" / "labels.csv"
    assert cli.main(["suspects", str(run), "--apply", how, "--out", str(listed)]) == 0
    shown = capsys.readouterr().out
    assert f"{run / 'suspects.html'}, {listed}" in shown
    about = saved.open_run(run).description
    with open(listed, newline="") as lines:
        rows = {row["example"]: row["label"] for row in csv.DictReader(lines)}
    # Of the 400 that it trained on the wrong ones go, or become right; the others stay.
    true = dict(zip(about.names, some(about.own_labels), strict=True))
    given = dict(zip(about.names, some(about.labels), strict=True))
    wrong = [name for name in true if true[name] != given[name]]
    right = [name for name in true if true[name] == given[name]]
    kept_wrong = [name for name in wrong if rows.get(name) == str(given[name])]
    kept_right = [name for name in right if rows.get(name) == str(true[name])]
    assert len(kept_wrong) < 0.1 * len(wrong)
    assert len(kept_right) > 0.85 * len(right)
    assert len(rows) == (1200 if how == "relabel" else 1200 - (400 - len(kept_wrong + kept_right)))
    # The list is what `run --labels` takes.
    problem = load_problem(Config(labels=str(listed)))
    assert {problem.names[i] for i in range(len(problem.names))} == set(rows)


def test_where_a_list_cannot_go(tmp_path):
    (tmp_path / "mine").mkdir()
    config = Config(dataset="folder", data_dir=str(tmp_path / "mine"))
    with pytest.raises(ConfigError, match="lies in the folder of the data"):
        correct.check_place(tmp_path / "mine" / "labels.csv", config)
    with pytest.raises(ConfigError, match="is a folder: give --out a file"):
        correct.check_place(tmp_path, config)
    correct.check_place(tmp_path / "labels.csv", config)
