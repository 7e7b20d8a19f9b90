"""Files that are there whole or not at all."""

import json
import pathlib
from typing import Any


def write_json(file: pathlib.Path, value: Any) -> None:
    """Writes a JSON file in one piece: it is there whole or not at all."""
    write_text(file, json.dumps(value, indent=1) + "\n")


def write_text(file: pathlib.Path, text: str) -> None:
    """Writes a file in one piece likewise."""
    temporary = file.with_suffix(file.suffix + ".new")
    try:
        temporary.write_text(text)
        temporary.replace(file)
    except OSError:  # a full disk has no room for what is left of it either
        temporary.unlink(missing_ok=True)
        raise
