import errno
import gc
import io
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from tests.train.known import some
from train import __main__ as cli
from train import data, loop, methods, noise, progress, trainer
from train.checkpoints import CheckpointError
from train.config import Config
from train.run_directory import RunDirectory, read_metrics

ROOT = pathlib.Path(__file__).parents[2]
TINY = [
    "--train-size", "160", "--hidden", "16", "--k", "4", "--b", "8", "--epochs", "2",
    "--learning-rate", "0.1", "--noise", "symmetric",
]  # fmt: skip
BILEVEL = ["--method", "bilevel"]


@pytest.fixture(autouse=True)
def _wide(monkeypatch):
    """Lines of the terminal do not break in the middle of a message."""
    monkeypatch.setenv("COLUMNS", "250")


def call(*args):
    """The exit code of a command, whichever way it is given; runs on one device by default."""
    args = [str(arg) for arg in args]
    if args[0] == "run" and "--devices" not in args:
        args += ["--devices", "1"]
    try:
        return cli.main(args)
    except SystemExit as stopped:
        return stopped.code


def text(capsys):
    """What was written to either stream, frames of boxes left out, blanks made one."""
    captured = capsys.readouterr()
    return re.sub(r"[\s│╭╮╰╯─]+", " ", captured.out + captured.err)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    directory = tmp_path_factory.mktemp("cli") / "run"
    assert call("run", "--out", directory, *TINY, "--no-tensorboard") == 0
    return directory


# ----------------------------------------------------------------------------------- usage


def python(*args, **options):
    return subprocess.run(
        [sys.executable, *map(str, args)],
        capture_output=True, text=True, cwd=ROOT, timeout=120, **options,
    )  # fmt: skip


def test_help_names_every_command_and_exit_code():
    done = python("-m", "train", "--help")
    assert done.returncode == 0
    for name in cli.COMMANDS:
        assert f"\n  {name} " in done.stdout
    for code in (
        "0 done",
        "2 a wrong choice",
        "3 NaN",
        "4 run directory",
        "5 another",
        "75 (SIGTERM)",
        "130 ",
    ):
        assert code in done.stdout
    assert done.stderr == ""


def test_an_unknown_command_lists_the_known_ones(capsys):
    assert call("trian") == 2
    known = ", ".join(cli.COMMANDS)
    assert capsys.readouterr().err == f"unknown command 'trian'; known: {known}\n"
    assert known.startswith("clean, demo, run, experiment, report, evaluate")


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_every_command_has_help(command, capsys):
    assert call(command, "--help") == 0
    assert f"usage: python -m train {command}" in text(capsys)


def test_run_has_a_flag_with_help_for_every_field(capsys):
    assert call("run", "--help") == 0
    shown = text(capsys)
    for name in Config.__dataclass_fields__:
        flag = name.replace("_", "-")
        assert re.search(rf"--{flag}[ ,]", shown), flag
    for phrase in ("mini-batches per step", "after the reweighting", "label noise: none"):
        assert phrase in shown


def test_without_a_command_it_is_the_demo(capsys):
    assert call("--help") == 0
    assert call("--methods", "adam", "--out", "never") == 2
    assert "unknown method 'adam'; known: sgd, uniform, bilevel, bilevel_exact" in text(capsys)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--k", "1"], "k must be at least 2, got 1"),
        (["--k", "two"], "Error parsing --k: invalid"),
        (["--b", "0"], "b must be at least 1, got 0"),
        (["--noise", "sym"], "unknown noise 'sym'; known: none, symmetric, uniform, pair_flip or"),
        (["--noise-rate", "2"], "noise_rate must be from 0 to 1, got 2.0"),
        (["--dataset", "cifar"], f"unknown dataset 'cifar'; known: {', '.join(data.NAMES)}"),
        (["--method", "adam"], f"unknown method 'adam'; known: {', '.join(methods.NAMES)}"),
        (["--network", "vgg"], "unknown network 'vgg'; known: auto, alexnet, cifarnet, "),
        (["--augmentation", "x"], "unknown augmentation 'x'; known: none, standardize, cifarnet"),
        (["--seed", "-1"], "seed must be at least 0, got -1"),
        (["--sampling", "x"], "Expected one of ('auto', 'stratified', 'random')"),
        (["--colour", "red"], "unrecognized option"),
        (["--k", "32", "--b", "100"], "not one step: the data give"),
        ([*BILEVEL, "--form", "collective", "--k", "4"], "and there is one device; take another"),
        (["--devices", "8", "--k", "6"], "k = 6 mini-batches do not fit 8 devices: k must divide"),
        ([*BILEVEL, "--devices", "4", "--form", "stacked"], "form stacked is for one device, and"),
        (["--process-id", "0"], "--coordinator, --num-processes and --process-id need --distr"),
        (["--distributed", "--process-id", "0"], "give --coordinator, --num-processes and --proc"),
        (["--noise", "nowhere.npz"], "nowhere.npz"),
        (["--augmentation", "inception"], "images of 8x8 are too small"),
        (["--held-out", "0"], "method coherent judges its steps by a held-out part"),
        (["--optimizer", "adamax"], "unknown optimizer 'adamax'; known: sgd, adam, adamw, nadamw"),
        (["--keep", "0"], "keep must be at least 1 checkpoint, got 0"),
        (["--resume"], "holds no run: there is no config.json"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)  # fmt: skip
def test_a_wrong_choice_is_exit_code_2_and_says_what_is_right(tmp_path, capsys, args, message):
    assert call("run", "--out", tmp_path / "run", "--hidden", "16", *args) == 2
    assert message.lower() in text(capsys).lower()


def test_hidden_widths_are_for_the_mlp(tmp_path, capsys):
    assert call("run", "--out", tmp_path / "run", "--hidden", "16", "--network", "cifarnet") == 2
    assert "hidden is for the network mlp, not cifarnet" in text(capsys)


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--dataset", "cifar10"], ["python -m train prepare cifar10"]),
        (["--dataset", "fashion_mnist"], ["python -m train prepare fashion_mnist"]),
        (["--dataset", "clothing1m"], ["python -m train prepare clothing1m"]),
        (["--dataset", "folder"], ["train/CLASS/", "test/CLASS/"]),
    ],
    ids=str,
)
def test_missing_data_name_the_command_and_leave_nothing_behind(tmp_path, capsys, args, words):
    out = tmp_path / "run"
    assert call("run", "--out", out, *args, "--data-dir", tmp_path / "empty") == 2
    shown = capsys.readouterr().err
    assert shown.startswith("error: ")
    assert all(word in shown for word in words), shown
    assert "Traceback" not in shown
    assert not out.exists()


# -------------------------------------------------------------------------------- run, resume


def test_a_run_says_what_it_does_and_prints_its_result(tmp_path, capsys):
    assert call("run", "--out", tmp_path, *TINY, "--no-tensorboard") == 0
    shown = text(capsys)
    given, true = noise.load(tmp_path / "noise.npz")
    wrong = f"{100 * (given != true).mean():.1f}% of the labels wrong (symmetric)"
    about = json.loads((tmp_path / "data.json").read_text())
    counts = f"{len(about['train'])} training, {len(about['held_out'])} held-out and 597 test"
    assert f"digits: {counts} images of 10 classes, {wrong}; batches of 32, " in shown
    assert "2 epochs of 4 steps" in shown
    assert f"network mlp, chosen for {len(about['train'])} images of 8×8 pixels; --network" in shown
    assert "coherent: one gradient over all examples of the step, steps of sgd judged" in shown
    for line in read_metrics(tmp_path):  # this is no terminal: a line an epoch
        figures = f"test {line['test']:.1f}% held-out {line['held_out']:.1f}%"
        assert f"coherent epoch {line['epoch']}/2 {figures}" in shown
    result = json.loads((tmp_path / "result.json").read_text())
    for name in ("test_last", "test_best", "stopped", "held_out"):
        assert f"{name} {result[name]:.2f}" in shown
    assert not (tmp_path / "tensorboard").exists()
    written = Config.from_json(json.loads((tmp_path / "config.json").read_text()))
    assert (written.hidden, written.k, written.epochs) == ((16,), 4, 2)


def test_a_finished_run_is_shown_again_and_resume_takes_its_config(finished, capsys):
    before = (finished / "metrics.jsonl").read_bytes()
    for args in (TINY, ["--resume"]):
        assert call("run", "--out", finished, *args, "--no-tensorboard") == 0
        assert "test_last" in text(capsys)
    assert (finished / "metrics.jsonl").read_bytes() == before


def test_another_config_in_the_same_directory_is_exit_code_4(finished, capsys):
    assert call("run", "--out", finished, *TINY, "--seed", "1") == 4
    assert "holds a run of another config: seed is 0 there and 1 here" in text(capsys)


def test_a_second_process_in_the_same_directory_is_exit_code_4(finished):
    config = Config.from_json(json.loads((finished / "config.json").read_text()))
    with RunDirectory(finished, config):
        done = python("-m", "train", "run", "--out", finished, *TINY)
    assert done.returncode == 4, done.stderr
    assert "is in use by another process" in done.stderr
    assert "Traceback" not in done.stderr


def test_nan_is_exit_code_3(tmp_path, capsys):
    assert call("run", "--out", tmp_path, *TINY, "--learning-rate", "1e30", "--method", "sgd") == 3
    assert "error: step 1 left NaN or Inf in the parameters" in text(capsys)


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_signal_while_training_saves_and_has_an_exit_code(
    tmp_path, capsys, monkeypatch, signum, code
):
    advance = loop.advance
    done = []

    def then_signal(*args):
        done.append(None)
        if len(done) == 3:
            os.kill(os.getpid(), signum)
        return advance(*args)

    monkeypatch.setattr(loop, "advance", then_signal)
    assert call("run", "--out", tmp_path, *TINY) == code
    assert f"stopped by {signum.name} at step 3; start again to go on" in text(capsys)
    assert (tmp_path / "checkpoints" / "3").is_dir()
    assert call("run", "--out", tmp_path, "--resume") == 0
    assert len(done) == 8


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_signal_before_the_training_has_the_same_exit_code(
    tmp_path, capsys, monkeypatch, signum, code
):
    # A shell starts what it puts in the background with SIGINT ignored.
    inherited = signal.signal(signal.SIGINT, signal.default_int_handler)
    before = signal.getsignal(signum)
    monkeypatch.setattr(trainer, "load_problem", lambda config: os.kill(os.getpid(), signum))
    try:
        assert call("run", "--out", tmp_path / "run", *TINY) == code
        assert signal.getsignal(signum) == before
        said = capsys.readouterr().err.splitlines()
        assert len(said) == (1 if signum == signal.SIGINT else 0)
    finally:
        signal.signal(signal.SIGINT, inherited)


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_signal_within_the_garbage_collector_is_not_lost(tmp_path, monkeypatch, signum, code):
    """Python ignores exceptions in the collector's callbacks, of which JAX has one."""
    inherited = signal.signal(signal.SIGINT, signal.default_int_handler)

    def callback(phase, info):
        gc.callbacks.remove(callback)
        os.kill(os.getpid(), signum)
        time.sleep(0.01)

    def load(config):
        gc.callbacks.append(callback)
        gc.collect()
        assert callback not in gc.callbacks
        time.sleep(30)
        raise AssertionError("the signal was lost")

    monkeypatch.setattr(trainer, "load_problem", load)
    try:
        assert call("run", "--out", tmp_path / "run", *TINY) == code
    finally:
        signal.signal(signal.SIGINT, inherited)


@pytest.mark.parametrize("delay", [0.1, 0.4, 0.8, 1.5])
def test_ctrl_c_while_importing_is_one_line(delay, tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", IMPORTING, str(tmp_path / "run")], cwd=ROOT,
        stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert some(process.stdout).readline() == "importing\n"
    time.sleep(delay)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    if process.returncode == 0:
        pytest.skip("it was over before the signal")
    assert process.returncode == 130, errors
    assert errors.startswith("stopped by SIGINT")
    assert len(errors.splitlines()) == 1


IMPORTING = """
import runpy, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.argv = ["train", "run", "--out", sys.argv[1], "--epochs", "100000"]
print("importing", flush=True)
runpy.run_module("train", run_name="__main__", alter_sys=True)
"""


def test_messages_with_brackets_come_out_whole(capsys, monkeypatch):
    """rich takes brackets for markup, and a path in them for a closing tag, unless told not to."""
    message = "cannot read [/some/path]: leaf [k, b], got [3]"

    def warn(args, console):
        import warnings

        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.warn(message, stacklevel=1)
        console.print(f"prepared: {message}")

    monkeypatch.setitem(cli.COMMANDS, "list", warn)
    assert call("list") == 0
    shown = text(capsys)
    assert f"warning: {message}" in shown
    assert f"prepared: {message}" in shown


REFUSALS = {
    OSError(errno.ENOSPC, "No space left on device", "/x/y"): (
        "/x/y: No space left on device; make space and start the same command again to go on"
    ),
    PermissionError(errno.EACCES, "Permission denied", "/x/y"): (
        "/x/y: Permission denied; give a place that may be read, or for --out one that may be "
        "written to"
    ),
    CheckpointError("step 3 cannot be kept"): "step 3 cannot be kept",
}


@pytest.mark.parametrize(("error", "said"), REFUSALS.items())
def test_what_the_system_refuses_is_a_line_and_exit_code_2(
    tmp_path, capsys, monkeypatch, error, said
):
    def refuse(*args):
        raise error

    monkeypatch.setattr(trainer, "train", refuse)
    assert call("run", "--out", tmp_path / "run", *TINY) == 2
    assert capsys.readouterr().err == f"error: {said}\n"


def test_a_run_directory_that_is_a_file_is_exit_code_2(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert call("run", "--out", tmp_path / "file", *TINY) == 2
    shown = capsys.readouterr().err
    assert "cannot write to the run directory" in shown
    assert "give --out a folder" in shown
    assert len(shown.splitlines()) == 1


# ------------------------------------------------------------------------------ other commands


def test_evaluate_agrees_with_the_last_line_of_metrics(finished, capsys):
    assert call("evaluate", finished) == 0
    shown = text(capsys)
    last = read_metrics(finished)[-1]
    for name in ("test", "train_given", "train_true"):
        assert f"{name} {last[name]:.2f}" in shown
    assert f"step {last['step']}" in shown


@pytest.mark.parametrize("command", [["evaluate"], ["suspects"], ["relabel", "--out", "x.npz"]])
def test_what_is_no_run_is_exit_code_2(tmp_path, capsys, command):
    assert call(*command, tmp_path) == 2
    assert "holds no run: there is no config.json" in text(capsys)


def test_relabelled_data_serve_another_run(finished, tmp_path, capsys):
    file = tmp_path / "made.npz"
    assert call("relabel", finished, "--out", tmp_path / "made.txt") == 2
    assert "--out must end in .npz" in text(capsys)
    assert call("relabel", finished, "--out", file) == 0
    given, true = noise.load(file)
    wrong = 100 * (given != true).mean()
    assert f"{wrong:.1f}% of the labels wrong" in text(capsys)
    assert 0 < wrong < 100
    args = ["--train-size", "160", "--hidden", "16", "--k", "4", "--epochs", "1", "--method", "sgd"]
    assert (
        call("run", "--out", tmp_path / "run", *args, "--noise", file, "--sampling", "random") == 0
    )
    np.testing.assert_array_equal(noise.load(tmp_path / "run" / "noise.npz")[0], given)
    (line,) = read_metrics(tmp_path / "run")
    assert not [name for name in line if name.startswith("omega")]  # SGD weighs nothing


def test_models_lists_parameter_counts_with_commas(capsys):
    assert call("models") == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    rows = [[cell for cell in row if cell != "│"] for row in rows]
    for row in (
        ["cifarnet", "28×28×3", "10", "1,387,786"],
        ["cifarnet", "28×28×3", "100", "1,405,156"],
        ["cifarnet_slim", "32×32×3", "10", "1,756,426"],
        ["inception", "29×29×3", "10", "1,649,402"],
        ["preact_resnet18", "32×32×3", "10", "11,171,274"],
        ["alexnet", "227×227×3", "1,000", "60,965,224"],
        ["resnet50", "224×224×3", "1,000", "25,557,032"],
        ["mlp_1x512", "28×28×3", "10", "1,209,866"],
        ["mlp_3x512", "28×28×3", "10", "1,735,178"],
    ):
        assert row in rows


def test_list_names_everything_there_is(capsys):
    assert call("list") == 0
    shown = text(capsys)
    for names in (data.NAMES, methods.NAMES, noise.KINDS):
        assert ", ".join(names) in shown
    assert "cifarnet_slim" in shown
    assert "preactresnet" in shown


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("digits", "digits needs no preparing"),
        ("cifar", "unknown data set 'cifar'; known: mnist, fashion_mnist, cifar10"),
    ],
)
def test_preparing_what_cannot_be_prepared(capsys, name, message):
    assert call("prepare", name) == 2
    assert message in text(capsys)


# ------------------------------------------------------------------------------ class folders


def test_a_folder_of_classes_from_end_to_end(tmp_path, capsys):
    rng = np.random.default_rng(0)
    for split, count in (("train", 24), ("test", 8)):
        for name, level in (("dark", 50), ("light", 200)):
            folder = tmp_path / "pictures" / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = np.clip(level + rng.normal(0, 20, (6, 6, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.png")
    args = [
        "--dataset", "folder", "--data-dir", tmp_path / "pictures", "--hidden", "8", "--k", "4",
        "--b", "2", "--epochs", "4", "--noise", "symmetric",
        "--noise-rate", "0.25", "--learning-rate", "0.1", *BILEVEL,
    ]  # fmt: skip
    assert call("run", "--out", tmp_path / "run", *args) == 0
    shown = text(capsys)
    assert "folder: 44 training, 4 held-out and 16 test images of 2 classes, 25.0% of the" in shown
    account = json.loads((tmp_path / "run" / "account.json").read_text())
    assert sum(line["read"] for line in account["lines"]) == 64
    assert json.loads((tmp_path / "run" / "result.json").read_text())["test_last"] == 100
    assert (tmp_path / "run" / "tensorboard").is_dir()


@pytest.mark.parametrize("terminal", [True, False])
def test_reading_many_pictures_is_shown(terminal):
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=80)
    with progress.reading(console) as on_file:
        on_file(1, 4000)
        on_file(4000, 4000)
    shown = out.getvalue()
    assert ("reading pictures" in shown) == terminal
    assert ("reading 2,000 pictures" in shown) != terminal
    quiet = io.StringIO()
    with progress.reading(Console(file=quiet)) as on_file:
        on_file(1, 20)
    assert quiet.getvalue() == ""
