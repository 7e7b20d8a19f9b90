"""`clean`, tried as a new user would: a folder of digits, a fifth of them filed wrongly."""

import csv
import fcntl
import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from PIL import Image
from rich.console import Console
from sklearn.datasets import load_digits

from tests.train.tiny import compiled_once
from train import __main__ as cli
from train import clean, export
from train.config import ConfigError
from train.run_directory import read_metrics

ROOT = pathlib.Path(__file__).parents[2]
CATS, DOGS = "cats", "dogs"


def call(*args):
    try:
        return cli.main([str(arg) for arg in args])
    except SystemExit as stopped:
        return stopped.code


def rows(file):
    with open(file, newline="", encoding="utf-8") as lines:
        return list(csv.DictReader(lines))


def true_label(name):
    """Files are called after what is on them."""
    return pathlib.PurePath(name).name.partition("-")[0]


# ------------------------------------------------------------------------- the whole of it


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """1,000 training and 300 test pictures, PNG and JPEG, with oddities of all kinds."""
    root = tmp_path_factory.mktemp("digits")
    mine, draw = root / "mine", np.random.default_rng(0)
    loaded: Any = load_digits()  # declared to be perhaps a tuple
    for i in range(1300):
        label = int(loaded.target[i])
        name, part = f"{label}-{i}", "train" if i < 1000 else "test"
        if part == "train" and draw.random() < 0.2:
            label = (label + int(draw.integers(1, 10))) % 10
        folder = mine / part / str(label) / ("deeper/still" if i % 7 == 0 else "")
        folder.mkdir(parents=True, exist_ok=True)
        picture = Image.fromarray((loaded.images[i] * 15).astype(np.uint8))
        match i % 5:
            case 0:
                picture.save(folder / f"{name}.JPG", quality=98)
            case 1:  # lies on its side
                exif = Image.Exif()
                exif[0x0112] = 6
                picture.transpose(Image.Transpose.ROTATE_90).save(folder / f"{name}.png", exif=exif)
            case 2:  # 16 bits
                deep = (loaded.images[i] * 15 * 257).astype(np.uint16)
                Image.fromarray(deep).save(folder / f"{name}.png")
            case _:
                picture.save(folder / f"{name}.png")
    for hidden in (".ipynb_checkpoints", "__MACOSX"):
        (mine / "train" / hidden).mkdir()
        (mine / "train" / hidden / "x.png").write_bytes(b"x")
    (mine / "train" / "3" / "broken.png").write_bytes(b"")
    (mine / "train" / "3" / "notes.txt").write_text("mine")
    shutil.copytree(mine / "test", root / "new")
    return root


@pytest.fixture(scope="module")
def cleaned(digits):
    """The folder that `clean` wrote."""
    out = digits / "out"
    before = files_of(digits / "mine")
    code = call(
        "clean", digits / "mine", "--out", out, "--bad-files", "skip", "--epochs", 20,
        "--devices", 1,
    )  # fmt: skip
    assert code == 0
    assert files_of(digits / "mine") == before
    return out


def files_of(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_wrong_ones_are_dropped_and_the_right_ones_kept(cleaned):
    every = [row["file"] for row in rows(cleaned / "suspects.csv")]
    filed = {name: pathlib.PurePath(name).parts[1] for name in every}
    kept = {row["file"]: row["label"] for row in rows(cleaned / "labels.csv")}
    wrong = [name for name in every if filed[name] != true_label(name)]
    assert len(every) == 1000
    assert 150 < len(wrong) < 250
    assert all(filed[name] == label for name, label in kept.items())
    assert sum(name not in kept for name in wrong) >= 0.9 * len(wrong)
    assert len(kept) >= 0.9 * (len(every) - len(wrong))


def test_accuracy_is_better_than_before(cleaned):
    summary = json.loads((cleaned / "summary.json").read_text())
    kept = {row["file"] for row in rows(cleaned / "labels.csv")}
    assert summary["examples"] == 1000
    assert summary["left_out"] == 1000 - len(kept)
    assert 0.7 * summary["wrong"] < summary["never"] <= summary["wrong"]
    # By labels of which a fifth is wrong nobody can be right much more often.
    assert 60 < summary["held_out_before"] < 90
    assert summary["held_out_after"] > summary["held_out_before"] + 5
    assert summary["held_out_after_as_came"] == pytest.approx(summary["held_out_before"], abs=8)
    assert summary["test_after"] > summary["test_before"] - 1
    assert summary["test_after"] > 88


def test_the_second_run_holds_the_same_pictures_out(cleaned):
    held_out = [
        set(json.loads((cleaned / run / "data.json").read_text())["held_out"])
        for run in ("first", "second")
    ]
    kept = {row["file"] for row in rows(cleaned / "labels.csv")}
    assert held_out[1] == held_out[0] & kept
    assert len(held_out[0]) > len(held_out[1]) > 50


def test_the_second_run_trains_the_first_network_further(cleaned):
    first, second = (json.loads((cleaned / run / "config.json").read_text())
                     for run in ("first", "second"))  # fmt: skip
    assert second["pretrained"] == str(cleaned / "first")
    assert (first["epochs"], second["epochs"]) == (20, 5)
    # It begins where the first one has ended.
    began, ended = read_metrics(cleaned / "second")[0], read_metrics(cleaned / "first")[-1]
    assert began["test"] == pytest.approx(ended["test"], abs=5)


def test_the_model_is_right_on_new_pictures_at_the_test_accuracy(cleaned, tmp_path):
    """Of all that there was the model alone is left."""
    shutil.copytree(cleaned / "model", tmp_path / "model")
    code = call("predict", tmp_path / "model", cleaned.parent / "new", "--out", tmp_path / "p.csv")
    assert code == 0
    predicted = rows(tmp_path / "p.csv")
    right = [true_label(row["file"]) == row["label"] for row in predicted]
    assert len(right) == 300
    summary = json.loads((cleaned / "summary.json").read_text())
    assert 100 * np.mean(right) == pytest.approx(summary["test_after"], abs=0.01)


def test_what_is_done_is_not_done_again(cleaned, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "250")
    names = ("labels.csv", "suspects.csv", "summary.json", "model/model.safetensors",
             "first/metrics.jsonl", "second/metrics.jsonl")  # fmt: skip
    before = {name: (cleaned / name).read_bytes() for name in names}
    code = call(
        "clean", cleaned.parent / "mine", "--out", cleaned, "--bad-files", "skip", "--epochs", 20,
        "--devices", 1,
    )  # fmt: skip
    assert code == 0
    assert {name: (cleaned / name).read_bytes() for name in names} == before
    shown = capsys.readouterr().out
    assert "labels look wrong" in shown
    assert "held-out accuracy:\n" in shown
    for place in ("model", "labels.csv", "suspects.html"):
        assert str(cleaned / place) in shown


# --------------------------------------------------------------------- changes, at each stage


def tiny_folder(folder, *, seed=0, count=72):
    """Cats are bright on the left, dogs on the right; every sixth is filed wrongly."""
    draw = np.random.default_rng(seed)
    for i in range(count):
        label = (CATS, DOGS)[i % 2]
        pixels = draw.integers(0, 100, (8, 8))
        pixels[:, slice(4, None) if label == DOGS else slice(4)] += 100
        filed = (CATS, DOGS)[(i + (i // 2 % 6 == 0)) % 2]
        (folder / filed).mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.astype(np.uint8)).save(folder / filed / f"{label}-{i}.png")


def tiny(root, *more):
    return call(
        "clean", root / "mine", "--out", root / "out", "--epochs", 20, "--learning-rate", 0.05,
        "--devices", 1, *more,
    )  # fmt: skip


@pytest.fixture(scope="module")
def once(tmp_path_factory):
    root = tmp_path_factory.mktemp("tiny")
    tiny_folder(root / "mine")
    assert tiny(root) == 0
    return root


@pytest.fixture
def root(once, tmp_path, monkeypatch):
    """A copy of a small folder, cleaned, to change."""
    monkeypatch.setenv("COLUMNS", "250")
    shutil.copytree(once, tmp_path, dirs_exist_ok=True)
    return tmp_path


def listed(root):
    return {row["file"] for row in rows(root / "out" / "labels.csv")}


def test_the_small_folder_is_cleaned(root):
    assert all(pathlib.PurePath(name).parts[0] == true_label(name) for name in listed(root))
    assert len(listed(root)) == 60


@pytest.mark.slow
def test_a_label_corrected_in_the_folder(root, capsys):
    """The picture is never accused for the place that it has left."""
    moved = root / "mine" / DOGS / "cats-0.png"
    moved.rename(root / "mine" / CATS / "cats-0.png")
    assert tiny(root) == 0
    shown = capsys.readouterr().out
    assert "begun anew, for the data have changed: 1 file moved from dogs to cats" in shown
    assert f"{CATS}/cats-0.png" in listed(root)
    assert len(listed(root)) == 61
    summary = json.loads((root / "out" / "summary.json").read_text())
    assert summary["wrong"] == 11


@pytest.mark.slow
def test_a_list_corrected_by_hand_is_trained_on(root, capsys):
    first = (root / "out" / "first" / "metrics.jsonl").read_bytes()
    second = (root / "out" / "second" / "metrics.jsonl").read_bytes()
    file = root / "out" / "labels.csv"
    file.write_text(file.read_text() + f"{DOGS}/cats-0.png,{CATS},train\n")
    assert tiny(root) == 0
    assert "labels.csv has been changed by hand" in capsys.readouterr().out
    assert (root / "out" / "first" / "metrics.jsonl").read_bytes() == first
    assert (root / "out" / "second" / "metrics.jsonl").read_bytes() != second
    about = json.loads((root / "out" / "second" / "data.json").read_text())
    assert f"{DOGS}/cats-0.png" in about["train"]
    assert json.loads((root / "out" / "summary.json").read_text())["left_out"] == 11
    # And it stays when the pictures change, beside the list of the new ones.
    (root / "mine" / CATS / "cats-2.png").unlink()
    text = file.read_text()
    assert tiny(root) == 0
    assert "1 file removed (cats/cats-2.png)" in capsys.readouterr().out
    (kept,) = (root / "out").glob("labels.before-*.csv")
    assert kept.read_text() == text
    assert f"{CATS}/cats-2.png" not in listed(root)


@pytest.mark.slow
def test_a_list_with_other_classes_is_trained_on_anew(root):
    """The first network has no place for a third one."""
    file = root / "out" / "labels.csv"
    file.write_text(file.read_text().replace(f"-4.png,{CATS}", "-4.png,foxes"))
    assert tiny(root) == 0
    config = json.loads((root / "out" / "second" / "config.json").read_text())
    assert (config["pretrained"], config["epochs"]) == (None, 20)
    assert export.load_model(root / "out" / "model").class_names == (CATS, DOGS, "foxes")


def test_nothing_old_is_left_while_a_stage_is_done_anew(root, monkeypatch):
    (root / "mine" / CATS / "cats-2.png").unlink()

    def killed(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(clean.trainer, "train", killed)
    assert tiny(root) == 130
    left = {path.name for path in (root / "out").iterdir()}
    assert left == {"choices.json", "lock"}


def test_other_choices_are_refused(root, capsys):
    assert tiny(root, "--seed", 1) == 4
    assert (
        "was begun with seed = 0, and here it is 1; take another folder" in capsys.readouterr().err
    )
    assert (root / "out" / "summary.json").exists()


def test_what_could_not_be_read_does_not_fix_the_choices(root, monkeypatch, capsys):
    """The remedy that the error names is taken in the same folder."""
    (root / "mine" / CATS / "broken.png").write_bytes(b"\x89PNG")
    options = ("--out", root / "new", "--network", "mlp", "--epochs", 1)
    call = ["clean", root / "mine", *options]
    assert cli.main([*map(str, call)]) == 2
    assert "--bad-files skip goes on without" in capsys.readouterr().err
    assert not (root / "new" / "choices.json").exists()

    monkeypatch.setattr(clean, "_train", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
    assert cli.main([*map(str, call), "--bad-files", "skip"]) == 130
    assert (root / "new" / "choices.json").exists()


def test_it_goes_on_in_another_place(root, capsys):
    """Folders may move: neither is changed data."""
    elsewhere = root / "elsewhere"
    elsewhere.mkdir()
    (root / "mine").rename(elsewhere / "mine")
    (root / "out").rename(elsewhere / "out")
    before = (elsewhere / "out" / "second" / "metrics.jsonl").read_bytes()
    assert tiny(elsewhere) == 0
    assert "begun anew" not in capsys.readouterr().out
    assert (elsewhere / "out" / "second" / "metrics.jsonl").read_bytes() == before


def test_a_folder_in_use(root, capsys):
    with open(root / "out" / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert tiny(root) == 4
    assert "is in use by another process" in capsys.readouterr().err


@pytest.mark.parametrize("inside", ["mine", "mine/out", "mine/cats"])
def test_not_into_the_folder_of_the_pictures(root, inside, capsys):
    before = files_of(root / "mine")
    assert call("clean", root / "mine", "--out", root / inside) == 2
    assert "where nothing is changed: give a folder elsewhere" in capsys.readouterr().err
    assert files_of(root / "mine") == before


@pytest.mark.slow
def test_nothing_looks_wrong(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "250")
    tiny_folder(tmp_path / "mine")
    for file in (tmp_path / "mine").glob("*/*"):
        file.rename(tmp_path / "mine" / true_label(file) / file.name)
    assert tiny(tmp_path) == 0
    assert not (tmp_path / "out" / "second").exists()
    assert "0 of 72 labels look wrong" in capsys.readouterr().out
    assert export.load_model(tmp_path / "out" / "model").class_names == (CATS, DOGS)


@pytest.mark.parametrize(
    ("accuracies", "expected"),
    [
        ([50, 90, 90], ("last", 90)),
        ([50, 90, 87.5], ("last", 87.5)),  # by chance
        ([50, 90, 70], ("best", 90)),
        ([100, 100, 99], ("last", 99)),
        ([100, 100, 97], ("best", 100)),
    ],
)
def test_which_epoch_is_chosen(root, accuracies, expected):
    """With 100 held-out pictures a standard error is about 3 percentage points, or 1 near 100%."""
    run = root / "out" / "second"
    lines = [{**read_metrics(run)[0], "held_out": x} for x in accuracies]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    about = json.loads((run / "data.json").read_text())
    (run / "data.json").write_text(json.dumps({**about, "held_out": list(map(str, range(100)))}))
    epoch, line = clean.chosen(run)
    assert (epoch, line["held_out"]) == expected


@pytest.mark.slow
def test_killed_ten_times_it_ends_in_the_same_bits(once, tmp_path):
    shutil.copytree(once / "mine", tmp_path / "mine")
    command = [
        sys.executable, "-m", "train", "clean", "mine", "--out", "out", "--epochs", "20",
        "--learning-rate", "0.05", "--devices", "1",
        "--checkpoint-seconds", "0",
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **compiled_once()}
    environment["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"  # as `once` was compiled
    draw, kills = random.Random(0), 0
    for _ in range(40):
        process = subprocess.Popen(
            command, cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )  # fmt: skip
        try:
            # Nothing happens in the first seconds of a start.
            _, errors = process.communicate(timeout=draw.uniform(3, 11) if kills < 10 else 600)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.communicate()
            kills += 1
            continue
        assert process.returncode == 0, errors.decode()
        if kills >= 10:
            break
        if draw.random() < 0.5:  # done before the kill: begin again somewhere
            shutil.rmtree(tmp_path / "out" / "second")
        else:
            shutil.rmtree(tmp_path / "out")
    assert kills == 10
    for name in ("labels.csv", "suspects.csv", "suspects.html", "summary.json",
                 "model/model.safetensors"):  # fmt: skip
        killed, whole = ((root / "out" / name).read_bytes() for root in (tmp_path, once))
        if name == "suspects.html":  # it says the command, whose places and pauses are others
            whole = whole.replace(f"{once}/".encode(), b"")
            killed = killed.replace(b" --checkpoint-seconds 0.0", b"")
        assert killed == whole, name


def test_out_that_is_a_file(root, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="give --out a place that can be written to"):
        clean.run(clean.Clean(root / "mine", tmp_path / "file"), Console(quiet=True))
