"""The files below a folder, and which of them are pictures."""

import dataclasses
import errno
import itertools
import os
import pathlib
import stat
import unicodedata

from PIL import Image

SUFFIXES = frozenset({
    ".apng", ".bmp", ".dib", ".gif", ".jfif", ".jpe", ".jpeg", ".jpg", ".pbm", ".pgm", ".png",
    ".pnm", ".ppm", ".tif", ".tiff", ".webp",
})  # fmt: skip
"""Suffixes of pictures that are read, in lower case."""

_OTHER_PICTURES = frozenset({
    ".arw", ".avif", ".cr2", ".cr3", ".dcm", ".dng", ".exr", ".heic", ".heif", ".hif", ".j2k",
    ".jp2", ".jpx", ".jxl", ".nef", ".nrw", ".orf", ".pef", ".psd", ".raf", ".raw", ".rw2",
    ".srw", ".svg", ".tga",
})  # fmt: skip
_SYSTEM = frozenset({
    "#recycle", "$recycle.bin", "@eadir", "@recycle", "__macosx", "__pycache__", "desktop.ini",
    "ehthumbs.db", "icon\r", "lost+found", "network trash folder", "system volume information",
    "temporary items", "thumbs.db",
})  # fmt: skip
# What a file without a known suffix is tried as. No TIFF: raw photographs look like TIFFs and
# would be read as the stamp-sized preview in them.
_SNIFFED = ("PNG", "JPEG", "WEBP", "GIF", "BMP")

HIDDEN = "hidden or system"
LOOP = "link back to a folder above"
NO_PICTURE = "not a picture"
LIST = "list of labels"
NEVER = frozenset({HIDDEN, LOOP, NO_PICTURE, LIST})
"""Reasons to skip a file that no list of labels overrules."""


@dataclasses.dataclass
class File:
    """One entry below a folder, and what becomes of it.

    Attributes:
        path: Where it is.
        name: Its path below the folder, with ``/``, accents composed (NFC); ends with ``/`` for a
            folder that was not gone into.
        skipped: Why it is no example; None where it is one.
        bad: Why it cannot be read; None where it can.
        part: "train", "test", or "" for neither.
        label: Its class; "" if it has none.
        converted: What was changed when it was decoded.
        held_out: Whether a list says that it is never to be trained on.
    """

    path: pathlib.Path
    name: str
    skipped: str | None = None
    bad: str | None = None
    part: str = ""
    label: str = ""
    converted: tuple[str, ...] = ()
    held_out: bool = False

    @property
    def parts(self) -> list[str]:
        """The folders that lead to it, and its own name."""
        return self.name.rstrip("/").split("/")

    @property
    def is_folder(self) -> bool:
        """Whether it is a folder that was not gone into."""
        return self.name.endswith("/")


def walk(folder: pathlib.Path) -> tuple[list[File], set[str]]:
    """Lists whatever lies below a folder, in the order of the names.

    Links are followed, but not back to a folder that leads to them. Hidden and system entries are
    listed as skipped, folders among them not gone into. Pictures are known by their suffix, in
    upper or lower case; a file with an unknown suffix, or none, by what it holds.

    Returns:
        ``(files, folders)``: every file, and the names of the folders that are neither hidden nor
        loops.

    Raises:
        OSError: if the folder itself cannot be listed.
    """
    files: list[File] = []
    folders: set[str] = set()
    waiting: list[tuple[pathlib.Path, str, tuple]] = [(folder, "", (_identity(folder),))]
    while waiting:
        here, prefix, above = waiting.pop()
        if prefix:
            folders.add(prefix[:-1])
        try:
            entries = list(os.scandir(here))
        except OSError as error:
            if not prefix:
                raise
            files.append(File(here, prefix, bad=f"the folder cannot be listed: {_said(error)}"))
            continue
        for entry in entries:
            path, name = pathlib.Path(entry.path), prefix + readable(entry.name)
            is_folder = os.path.isdir(path)
            if _is_hidden(entry.name):
                files.append(File(path, name + "/" * is_folder, HIDDEN))
            elif not is_folder:
                files.append(_file(path, name))
            elif (identity := _identity(path)) in above:
                files.append(File(path, name + "/", LOOP))
            else:
                waiting.append((path, name + "/", (*above, identity)))
    files.sort(key=lambda file: (file.parts, os.fsencode(file.path)))
    for before, file in itertools.pairwise(files):
        if file.name == before.name and file.skipped is None:
            file.bad = "its name differs from another only in how accents are coded"
    return files, folders


def readable(name: str) -> str:
    """A file name as text: accents composed (NFC), bytes that are no text escaped."""
    return unicodedata.normalize("NFC", os.fsencode(name).decode("utf-8", "backslashreplace"))


def _is_hidden(name: str) -> bool:
    return name.startswith((".", "~$")) or name.casefold() in _SYSTEM


def _identity(folder: pathlib.Path) -> tuple[int, int]:
    status = os.stat(folder)
    return status.st_dev, status.st_ino


def _file(path: pathlib.Path, name: str) -> File:
    suffix = path.suffix.lower()
    if suffix in _OTHER_PICTURES:
        return File(path, name, bad=f"{suffix[1:].upper()} is not read: convert it to JPEG or PNG")
    bad = None
    try:
        status = os.stat(path)
    except OSError as error:
        bad = _said(error)
    else:
        if not stat.S_ISREG(status.st_mode):
            bad = "not an ordinary file"
        elif not status.st_size:
            bad = "empty"
    if suffix not in SUFFIXES and (bad or not _holds_picture(path)):
        return File(path, name, NO_PICTURE)
    return File(path, name, bad=bad)


def _holds_picture(path: pathlib.Path) -> bool:
    try:
        with Image.open(path, formats=_SNIFFED):
            return True
    except Image.DecompressionBombError:
        return True
    except Exception:  # whatever Pillow raises for what is none
        return False


def _said(error: OSError) -> str:
    if error.errno == errno.ENOENT:
        return "a link to nothing"
    return (error.strerror or str(error)).lower()
