import json
import re
import subprocess
import sys

import jax
import pytest

from train import run_directory
from train.config import Config, ConfigError
from train.files import write_json
from train.run_directory import RunDirectory, RunDirectoryError, read_metrics


def test_a_new_folder_gets_the_config_and_the_environment(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "orig_argv", ["/usr/bin/python", "-m", "train", "run", "--k", "4"])
    config = Config(k=4, hidden=(16,))
    with RunDirectory(tmp_path / "a" / "run", config) as run:
        assert run.path == tmp_path / "a" / "run"
        assert Config.from_json(json.loads((run.path / "config.json").read_text())) == config
        (entry,) = json.loads((run.path / "environment.json").read_text())
        assert run.metrics() == []
    assert set(entry) == {
        "time", "command", "revision", "python", "packages", "devices",
    }  # fmt: skip
    assert entry["packages"]["jax"] == jax.__version__
    assert len(entry["devices"]) == jax.device_count()
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", entry["time"])
    assert entry["command"] == ["python", "-m", "train", "run", "--k", "4"]


def test_every_start_adds_an_entry(tmp_path):
    for count in (1, 2, 3):
        with RunDirectory(tmp_path, Config()):
            assert len(json.loads((tmp_path / "environment.json").read_text())) == count


def test_outside_of_git_there_is_no_revision(monkeypatch):
    def fail(*args, **kwargs):
        raise subprocess.CalledProcessError(128, "git")

    monkeypatch.setattr(subprocess, "run", fail)
    assert run_directory.environment()["revision"] is None


def test_a_folder_in_use_is_refused_and_free_afterwards(tmp_path):
    with (
        RunDirectory(tmp_path, Config()),
        pytest.raises(RunDirectoryError, match=r"is in use by another process; wait for it or"),
        RunDirectory(tmp_path, Config()),
    ):
        pass
    with RunDirectory(tmp_path, Config()):
        pass


@pytest.mark.parametrize("place", ["file", "file/run", "/proc/nowhere/run", "/sys/run"])
def test_a_place_that_takes_no_folder_is_told(tmp_path, place):
    (tmp_path / "file").write_text("")
    message = r"cannot write to the run directory .*\): give --out a folder that can be written"
    with pytest.raises(ConfigError, match=message), RunDirectory(tmp_path / place, Config()):
        pass
    assert (tmp_path / "file").read_text() == ""


def test_another_config_is_refused_by_the_field_and_nothing_is_written(tmp_path):
    with RunDirectory(tmp_path, Config(k=4)):
        pass
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    other = RunDirectory(tmp_path, Config(k=8, b=2, seed=3))
    with pytest.raises(RunDirectoryError) as error, other:
        pass
    message = str(error.value)
    assert message.startswith(f"{tmp_path} holds a run of another config: k is 4 there and 8 here")
    assert "(2 more differ)" in message
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    with RunDirectory(tmp_path, Config(k=4)):  # the failed attempt holds no lock
        pass


def test_data_that_have_moved_are_the_same_data(tmp_path):
    for data_dir in ("here", "there"):
        with RunDirectory(tmp_path / "run", Config(dataset="mnist", data_dir=data_dir)):
            pass
    assert json.loads((tmp_path / "run" / "config.json").read_text())["data_dir"] == "there"


def test_the_run_that_was_begun_from_may_have_moved_or_been_copied(tmp_path):
    def begun_from(place):
        return RunDirectory(tmp_path / "run", Config(pretrained=str(tmp_path / place / "first")))

    def finished(place, accuracy):
        with RunDirectory(tmp_path / place / "first", Config()) as run:
            run.append_metrics({"test": accuracy})

    for place in ("here", "copied"):
        finished(place, 90)
        with begun_from(place):
            pass
    (tmp_path / "copied").rename(tmp_path / "moved")
    with begun_from("moved"):
        pass
    finished("other", 80)  # has the same name and is another run
    with (
        pytest.raises(RunDirectoryError, match="pretrained is .*moved.* there"),
        begun_from("other"),
    ):
        pass


def test_widths_compare_equal_after_json(tmp_path):
    for _ in range(2):
        with RunDirectory(tmp_path, Config(hidden=(3, 4))):
            pass


def test_metrics_are_appended_and_read_back(tmp_path):
    lines = [{"epoch": i, "step": 5 * i, "test": 0.1 * i} for i in (1, 2, 3)]
    with RunDirectory(tmp_path, Config()) as run:
        for line in lines:
            run.append_metrics(line)
        assert run.metrics() == lines
    assert read_metrics(tmp_path) == lines
    assert read_metrics(tmp_path / "nowhere") == []


def test_a_line_cut_short_by_a_kill_is_left_out_and_replaced(tmp_path):
    with RunDirectory(tmp_path, Config()) as run:
        run.append_metrics({"step": 5})
        with open(tmp_path / "metrics.jsonl", "a") as file:
            file.write('{"step": 10, "te')
        assert run.metrics() == [{"step": 5}]
        assert run.keep_metrics(20) == [{"step": 5}]
        run.append_metrics({"step": 10})
        assert run.metrics() == [{"step": 5}, {"step": 10}]


def test_metrics_after_the_checkpoint_are_dropped(tmp_path):
    with RunDirectory(tmp_path, Config()) as run:
        for step in (5, 10, 15):
            run.append_metrics({"step": step})
        assert run.keep_metrics(10) == [{"step": 5}, {"step": 10}]
        assert read_metrics(tmp_path) == [{"step": 5}, {"step": 10}]
        assert run.keep_metrics(0) == []


def test_json_is_there_whole_or_not_at_all(tmp_path):
    file = tmp_path / "x.json"
    write_json(file, {"a": 1})
    with pytest.raises(TypeError):
        write_json(file, {"a": object()})
    assert json.loads(file.read_text()) == {"a": 1}
    write_json(file, [1])
    assert json.loads(file.read_text()) == [1]
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]
