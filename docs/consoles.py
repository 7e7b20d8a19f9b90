"""Runs the ``console`` blocks of a page and compares what they print with what the page shows."""

import contextlib
import doctest
import io
import os
import pathlib
import re
import shlex
import subprocess
import sys
import tempfile

from train.__main__ import main

_FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
_BLOCK = re.compile(r"^```console\n(.*?)^```", re.DOTALL | re.MULTILINE)
_COMMAND = re.compile(r"^\$ ((?:.*\\\n)*.*)\n((?:(?!\$ ).*\n)*)", re.MULTILINE)


@contextlib.contextmanager
def temporary_folder():
    """Within, the working directory is a new folder."""
    before = os.getcwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            yield
        finally:
            os.chdir(before)


def check(page: str, first: int = 0, last: int | None = None) -> None:
    """Runs the commands of a page's ``console`` blocks, in order, in the working directory.

    Args:
        page: its file.
        first: the block to begin with.
        last: the block to end before; None for all.

    Raises:
        AssertionError: naming the first command that printed something else than the page shows,
            where ``...`` stands for anything and white space does not matter.
    """
    os.environ["COLUMNS"] = "80"
    path = f"{pathlib.Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path}  # `python` is this one
    checker, code = doctest.OutputChecker(), 0
    text = (pathlib.Path(__file__).parent / page).read_text()
    blocks = _BLOCK.findall(text)[first:last]
    commands = [match for block in blocks for match in _COMMAND.findall(block)]
    assert commands, f"{page} has no console blocks"
    for command, expected in commands:
        words = shlex.split(command.replace("\\\n", ""))
        if words[:3] == ["python", "-m", "train"]:
            code, got = _train(words[3:])
        elif words == ["echo", "$?"]:
            got = f"{code}\n"
        else:
            got = subprocess.run(
                command, shell=True, capture_output=True, text=True, check=True, env=environment
            ).stdout
        example = doctest.Example(command, expected)
        if not checker.check_output(expected, got, _FLAGS):
            difference = checker.output_difference(example, got, _FLAGS)
            raise AssertionError(f"{page}: $ {command}\n{difference}")


def _train(arguments: list[str]) -> tuple[int | str | None, str]:
    """Exit code and output of ``python -m train``, in this process to save its imports."""
    if arguments[0] in ("run", "clean"):  # on one device, as most have, not on the eight fake ones
        arguments = [*arguments, "--devices", "1"]
    output = io.TextIOWrapper(io.BytesIO(), "utf-8")  # which lets tyro draw its boxes
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        try:
            code = main(arguments)
        except SystemExit as stopped:
            code = stopped.code
    output.flush()
    return code, output.buffer.getvalue().decode()
