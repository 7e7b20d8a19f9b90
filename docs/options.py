"""The table of a run's options, `docs/options.txt`, from the config: ``python docs/options.py``."""

import dataclasses
import pathlib
import sys
from typing import get_args, get_origin, get_type_hints

FILE = pathlib.Path(__file__).with_suffix(".txt")
sys.path.insert(0, str(FILE.parents[1]))


def table() -> str:
    """A line of Markdown per field of the config: option, default, what it is."""
    from train.config import Config

    hints = get_type_hints(Config, include_extras=True)
    lines = ["| option | default | |", "|---|---|---|"]
    for field in dataclasses.fields(Config):
        kind, *notes = get_args(hints[field.name])
        name = field.name.replace("_", "-")
        flag = f"`--{'no-' if field.default is True else ''}{name}`"
        (what,) = [note.help for note in notes if hasattr(note, "help")]
        if get_origin(kind) is not None and get_args(kind) and isinstance(get_args(kind)[0], str):
            what = f"{', '.join(f'`{value}`' for value in get_args(kind))}: {what}"
        lines.append(f"| {flag} | {_shown(field.default)} | {what} |")
    return "\n".join(lines) + "\n"


def _shown(value: object) -> str:
    if value is None or isinstance(value, bool):
        return ""
    return f"{value:g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    FILE.write_text(table(), encoding="utf-8")
