"""The folder of a run: one process at a time, every file says what it is.

config.json        the choices of the run
data.json          what it must know of its data: classes, size, names of its examples, labels
account.json       what became of every file, where the data are files
environment.json   versions, devices, command, git revision, one entry per start
noise.npz          given and true labels, where labels were changed on purpose
metrics.jsonl      a line per epoch
result.json        the figures of a finished run
checkpoints/       by Orbax
tensorboard/       the metrics again
"""

import fcntl
import importlib.metadata
import json
import pathlib
import platform
import subprocess
import sys
import time
from typing import IO, Any

import jax

from train.config import Config, ConfigError
from train.description import Description
from train.files import write_json, write_text


class RunDirectoryError(RuntimeError):
    """The folder is in use, or holds another run."""


class InUseError(RunDirectoryError):
    """Another process holds the folder."""


class RunDirectory:
    """A run's folder, held by this process from `__enter__` to `__exit__`.

    Attributes:
        path: the folder.
        config: what it is for.
        description: of the data that it is for; None where they were not looked at.
        writes: whether this process writes to it: of several that share a run, one does.
    """

    def __init__(
        self,
        path: pathlib.Path,
        config: Config,
        description: Description | None = None,
        *,
        writes: bool = True,
    ):
        """Takes the folder, which need not exist, and what it is for."""
        self.path = path
        self.config = config
        self.description = description
        self.writes = writes
        self._lock: IO[str] | None = None

    def __enter__(self) -> "RunDirectory":
        """Creates and locks the folder.

        Raises:
            InUseError: if another process holds it.
            RunDirectoryError: if it holds a run of another config, or on other data.
            ConfigError: if it cannot be written to.
        """
        if not self.writes:
            return self
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = open(self.path / "lock", "w")
        except OSError as error:
            raise ConfigError(
                f"cannot write to the run directory {self.path} ({error.strerror}): "
                "give --out a folder that can be written to"
            ) from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._lock.close()
            raise InUseError(
                f"{self.path} is in use by another process; wait for it or take another folder"
            ) from error
        try:
            self._check_config()
            self._check_data()
            self._append_environment()
        except BaseException:
            self._lock.close()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        """Lets the folder go."""
        if self._lock is not None:
            self._lock.close()

    def _check_config(self) -> None:
        file = self.path / "config.json"
        wanted = self.config.to_json()
        if file.exists():
            found = json.loads(file.read_text())
            # A field that came with a later version has its default in the older run.
            found = {**Config().to_json(), **found}
            differ = [name for name in wanted if found[name] != wanted[name]]
            # The data or their list have moved; whether they have changed, data.json says.
            moved = {"data_dir"} if self.description is None else {"data_dir", "labels"}
            if "pretrained" in differ:
                # So may the run that this one started from, or this is a copy beside its copy.
                old, new = (pathlib.Path(of["pretrained"] or "") for of in (found, wanted))
                gone = not old.exists()
                if old.name == new.name and (gone or read_metrics(old) == read_metrics(new)):
                    moved.add("pretrained")
            differ = [name for name in differ if name not in moved]
            if differ:
                name = differ[0]
                raise RunDirectoryError(
                    f"{self.path} holds a run of another config: {name} is {found[name]!r} "
                    f"there and {wanted[name]!r} here"
                    + (f" ({len(differ) - 1} more differ)" if len(differ) > 1 else "")
                    + "; take another folder, or delete this one"
                )

    def _check_data(self) -> None:
        """Compares the data with those of the run, or of a new one notes them."""
        file = self.path / "data.json"
        if self.description is not None:
            if file.exists():
                differ = Description.read(self.path).differences(self.description)
                if differ:
                    raise RunDirectoryError(
                        f"{self.path} holds a run on other data: {'; '.join(differ)}; train on "
                        "the data as they are now in another folder (--out), or delete this one"
                    )
            else:
                self.description.write(self.path)
        write_json(self.path / "config.json", self.config.to_json())

    def _append_environment(self) -> None:
        file = self.path / "environment.json"
        entries = json.loads(file.read_text()) if file.exists() else []
        write_json(file, [*entries, environment()])

    def metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl; one cut short by a kill is left out."""
        return read_metrics(self.path)

    def keep_metrics(self, before_step: int) -> list[dict[str, Any]]:
        """Drops the lines of epochs that end after the given step; returns the others."""
        kept = [line for line in self.metrics() if line["step"] <= before_step]
        if self.writes:
            text = "".join(json.dumps(line) + "\n" for line in kept)
            write_text(self.path / "metrics.jsonl", text)
        return kept

    def append_metrics(self, line: dict[str, Any]) -> None:
        """Adds a line to metrics.jsonl."""
        if not self.writes:
            return
        with open(self.path / "metrics.jsonl", "a") as file:
            file.write(json.dumps(line) + "\n")


def read_result(path: pathlib.Path) -> dict[str, Any] | None:
    """The result of a finished run; None where it must go on, or its last checkpoint is gone."""
    file = path / "result.json"
    if not file.exists():
        return None
    result = json.loads(file.read_text())
    return result if (path / "checkpoints" / str(result["steps"])).is_dir() else None


def read_metrics(path: pathlib.Path) -> list[dict[str, Any]]:
    """The complete lines of a run's metrics.jsonl."""
    file = path / "metrics.jsonl"
    if not file.exists():
        return []
    text = file.read_text()
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def environment() -> dict[str, Any]:
    """What a run's figures depend on beside its config."""
    packages = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
    try:
        revision = subprocess.run(
            ["git", "describe", "--always", "--dirty"],
            capture_output=True,
            text=True,
            check=True,
            cwd=pathlib.Path(__file__).parent,
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        revision = None
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "command": [pathlib.Path(sys.orig_argv[0]).name, *sys.orig_argv[1:]],
        "revision": revision,
        "python": platform.python_version(),
        "packages": {name: importlib.metadata.version(name) for name in packages},
        "devices": [str(device.device_kind) for device in jax.devices()],
    }
