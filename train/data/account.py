"""What became of every file of a folder of pictures."""

import dataclasses
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from train.data.files import File

UNREADABLE = "cannot be read"
"""The reason under which bad files are counted."""

_NAMED = 20
_SHOWN_CLASSES = 40


@dataclasses.dataclass
class Line:
    """The files of one class in one part of the data.

    Attributes:
        part: "train", "test" or "" for files that belong to neither.
        label: The class; "" for files that have none.
        read: How many are examples.
        converted: How many were changed, by what was done; a file may count several times.
        skipped: How many are not examples, by the reason.
    """

    part: str
    label: str
    read: int = 0
    converted: dict[str, int] = dataclasses.field(default_factory=dict)
    skipped: dict[str, int] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class Account:
    """What became of every file: each counts once, as read or as skipped.

    Attributes:
        source: The folder.
        classes: The class names, in the order of the class numbers.
        lines: Counts by part and class.
        skipped: The first names of each reason to skip a file.
        bad: The first files that cannot be read, each with the reason.
        notes: What was decided for all pictures together: their size, colours, the test part.
        warnings: What is probably not as it should be.
    """

    source: str
    classes: list[str] = dataclasses.field(default_factory=list)
    lines: list[Line] = dataclasses.field(default_factory=list)
    skipped: dict[str, list[str]] = dataclasses.field(default_factory=dict)
    bad: list[tuple[str, str]] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(default_factory=list)
    warnings: list[str] = dataclasses.field(default_factory=list)

    @classmethod
    def of(cls, source: str, classes: Sequence[str], files: Iterable[File]) -> "Account":
        """Counts files, in the order they come."""
        lines: dict[tuple[str, str], Line] = {}
        skipped: dict[str, list[str]] = {}
        bad = []
        for file in files:
            key = (file.part, file.label if file.label in classes else "")
            line = lines.setdefault(key, Line(*key))
            reason = file.skipped if file.bad is None else UNREADABLE
            if file.bad is not None and len(bad) < _NAMED:
                bad.append((file.name, file.bad))
            if reason is not None:
                line.skipped[reason] = line.skipped.get(reason, 0) + 1
                if len(skipped.setdefault(reason, [])) < _NAMED:
                    skipped[reason].append(file.name)
            else:
                line.read += 1
                for how in file.converted:
                    line.converted[how] = line.converted.get(how, 0) + 1
        order = {label: number for number, label in enumerate(classes)}
        by_class = sorted(lines.values(), key=lambda x: (order.get(x.label, len(order)), x.part))
        return cls(source, list(classes), by_class, skipped, bad)

    def examples(self, part: str) -> dict[str, int]:
        """How many examples each class has in a part, "train" or "test"."""
        of_part = {line.label: line.read for line in self.lines if line.part == part}
        return {label: of_part.get(label, 0) for label in self.classes}

    def to_json(self) -> dict[str, Any]:
        """As values that `json` writes."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Account":
        """The account that `to_json` gave."""
        lines = [Line(**line) for line in values["lines"]]
        bad = [(name, reason) for name, reason in values["bad"]]
        return cls(**{**values, "lines": lines, "bad": bad})


def table(account: Account) -> Table:
    """Renders an account: a row per class and one for files of none, the sums, and the notes."""
    lines = account.lines
    read = {part: sum(x.read for x in lines if x.part == part) for part in ("train", "test")}
    shown = Table(
        title=Text(f"{account.source}: {len(account.classes):,} classes"),
        title_justify="left",
        caption=Text("\n".join(_said(account))),
        caption_justify="left",
        show_footer=True,
    )
    shown.add_column("class", footer="all")
    for part, total in read.items():
        shown.add_column(part, justify="right", footer=f"{total:,}")
    shown.add_column("converted", footer=_counts(lines, "converted"))
    shown.add_column("skipped", footer=_counts(lines, "skipped"))
    by_label: dict[str, list[Line]] = {label: [] for label in account.classes}
    for line in lines:
        by_label.setdefault(line.label, []).append(line)
    for number, (label, of_label) in enumerate(by_label.items()):
        if _SHOWN_CLASSES <= number < len(account.classes):
            if number == _SHOWN_CLASSES:
                shown.add_row(f"... {len(account.classes) - number:,} more")
            continue
        shown.add_row(
            Text(label or "(none)"),
            *(f"{sum(x.read for x in of_label if x.part == part):,}" for part in read),
            _counts(of_label, "converted"),
            _counts(of_label, "skipped"),
        )
    return shown


def counted(count: int, one: str, many: str = "") -> str:
    """Counts things in words: "1 file", "2,000 files"."""
    return f"{count:,} {one if count == 1 else many or one + 's'}"


def named(names: Sequence[str], count: int | None = None, most: int = 3) -> str:
    """Joins the first names of a list, and says how many there are where that is not all."""
    count = len(names) if count is None else count
    shown = ", ".join(names[:most])
    return shown if count <= most else f"{shown}, ... ({count:,} in all)"


def _said(account: Account) -> list[str]:
    skipped = Counter()
    for line in account.lines:
        skipped.update(line.skipped)
    said = list(account.notes)
    for reason, names in account.skipped.items():
        if reason != UNREADABLE:
            said.append(f"skipped, {reason}: {named(names, skipped[reason])}")
    said += [f"skipped, {UNREADABLE}: {name}: {reason}" for name, reason in account.bad]
    if (more := skipped[UNREADABLE] - len(account.bad)) > 0:
        said.append(f"... and {more:,} more that cannot be read")
    return said


def _counts(lines: list[Line], field: str) -> Text:
    total: Counter[str] = Counter()
    for line in lines:
        total.update(getattr(line, field))
    return Text(", ".join(f"{n:,} {what}" for what, n in sorted(total.items())))
