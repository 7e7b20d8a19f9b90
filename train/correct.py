"""From a ranking of suspects to a list of labels without the wrong ones."""

import dataclasses
import itertools
import pathlib
from collections.abc import Iterator
from typing import Literal

import numpy as np

from train.config import Config, ConfigError
from train.data import Dataset, labels
from train.data.account import counted, named
from train.export import writing
from train.suspects import Suspects

How = Literal["drop", "relabel"]
"""What is done to a label that looks wrong: its example goes, or gets the suggested label."""


@dataclasses.dataclass(frozen=True)
class Corrected:
    """A list of labels.

    Attributes:
        how: what was done.
        labels: the name of the class of every example that stays, by the example's name, in the
            order of the data set.
        held_out: which of them the run held out.
        total: how many examples there were.
        wrong: how many labels look wrong.
        never: how many of these no epoch has predicted, the surest ones.
        changed: how many examples were left out, or got another label.
        spared: how many labels of a class look wrong and stay, by class, where all its labels do.
    """

    how: How
    labels: dict[str, str]
    held_out: frozenset[str]
    total: int
    wrong: int
    never: int
    changed: int
    spared: dict[str, int]

    def write(self, file: pathlib.Path, column: str, *, with_split: bool = False) -> None:
        """Writes the list, as ``--labels`` takes it.

        Args:
            file: the CSV file.
            column: "file", or "example" where the examples' names are numbers.
            with_split: add the column ``split``, so that the same examples are held out again.
        """
        held_out = self.held_out if with_split else None
        with writing(file):
            file.parent.mkdir(parents=True, exist_ok=True)
            labels.write(file, self.labels, self.labels.values(), column, held_out)

    def said(self) -> Iterator[str]:
        """The same for a reader, in lines."""
        yield (
            f"{counted(self.wrong, 'label')} of {self.total:,} "
            f"({100 * self.wrong / self.total:.1f}%) look wrong; {self.never:,} of them no "
            "epoch predicted, which are the surest"
        )
        done = "left out" if self.how == "drop" else "relabelled"
        yield f"{counted(self.changed, 'example')} {done}, {len(self.labels):,} in the list"
        if self.spared:
            yield (
                f"left as they are: {named(list(self.spared))}, since all labels of such a class "
                "look wrong: it has not been learnt"
            )
        if stay := self.wrong - self.changed - sum(self.spared.values()):
            yield f"left as they are: {stay:,} to which the network itself gives their label by now"


def check_place(file: pathlib.Path, config: Config) -> None:
    """Raises ConfigError where a list would change what it is made from."""
    folder = config.data_dir
    if folder is not None and file.resolve().is_relative_to(pathlib.Path(folder).resolve()):
        raise ConfigError(
            f"{file} lies in the folder of the data, {folder}, where it would count as theirs: "
            "give --out a file elsewhere"
        )
    if file.is_dir():
        raise ConfigError(f"{file} is a folder: give --out a file, such as {file}/labels.csv")


def correct(suspects: Suspects, dataset: Dataset, how: How) -> Corrected:
    """Drops the labels that look wrong, or takes those that the network suggests instead.

    A label looks wrong where its score is above 0, that is, where the logit of another class was
    on average above that of the given one. How well that works hangs on how well the network
    learns the classes, here as `clean` trains it, for about 800 steps, three seeds:

    ===============================================  ============  ============  ==============
    data, labels moved                               wrong ones    right ones    never predicted:
                                                     found, %      taken, %      wrong, %
    ===============================================  ============  ============  ==============
    digits (98% right on new ones), 20% at random    98            1             98
    the same, 5%                                     97            1             93
    the same, 50%                                    95            1             100
    the same, 20% to the next class                  97            1             99
    Fashion-MNIST, 1,500 images (80%), 20%           69            6             85
    ===============================================  ============  ============  ==============

    No class is emptied: where nothing of a class would be left to train on, its labels stay.

    Args:
        suspects: the ranking.
        dataset: the data as they are now. Examples that the run did not see, or whose label has
            changed since, are in the list with the label that they have.
        how: "drop" or "relabel".
    """
    classes = np.array(suspects.description.class_names, object)
    given, suggested = classes[suspects.given], classes[suspects.suggested]
    wrong = np.nan_to_num(suspects.means.score, nan=-1.0) > 0
    change = wrong if how == "drop" else wrong & (given != suggested)
    names = [dataset.class_names[label] for label in dataset.train.labels]
    now = dict(zip(dataset.train_names, names, strict=True))
    others = [now[name] for name in now.keys() - set(suspects.names)]

    spared: dict[str, int] = {}
    while True:
        change = change & ~np.isin(given, list(spared))
        after = np.where(change, suggested, given)
        stays = ~suspects.held_out & ~(change & (how == "drop"))
        left = {*others, *after[stays]}
        emptied = {label for label in given[change] if label not in left}
        if not emptied:
            break
        spared |= {label: int((wrong & (given == label)).sum()) for label in sorted(emptied)}

    listed = dict(now)
    for name, label, changed in zip(suspects.names, after, change, strict=True):
        if changed and how == "drop":
            del listed[name]
        else:
            listed[name] = label
    return Corrected(
        how=how,
        labels=listed,
        held_out=frozenset(itertools.compress(suspects.names, suspects.held_out)) & listed.keys(),
        total=len(now),
        wrong=int(wrong.sum()),
        never=int((wrong & (suspects.means.agreement == 0)).sum()),
        changed=int(change.sum()),
        spared=spared,
    )
