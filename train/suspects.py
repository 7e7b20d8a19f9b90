"""Which training labels look wrong: a list of all examples, and a page of the worst."""

import base64
import csv
import dataclasses
import html
import io
import json
import pathlib
import shlex
import string
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np
from PIL import Image

from train import data, evidence, saved
from train.config import Config, ConfigError
from train.description import Description
from train.problem import load_dataset, load_problem

_PAGE = pathlib.Path(__file__).with_name("suspects_page.html")
_LARGEST_SIDE = 160  # pixels of a picture on the page; larger images are scaled down


class Suspects(NamedTuple):
    """The examples of a run, the most suspicious first.

    Attributes:
        names: of the examples: files or, where there are none, numbers.
        given: the labels that they had in the run, int [n].
        suggested: the labels that the network gives, int [n]; often the given ones.
        true: the true labels, int [n]; None where nobody knows them.
        held_out: whether the example was held out, bool [n].
        means: the evidence, [n] each.
        pictures: the images, in this order.
        description: of the run's data.
        gone: names of examples whose pictures are no longer there.
        relabelled: names of examples whose label is no longer the one that the run had.
        others: names and labels, as they are now, of the training examples that are not ranked.
    """

    names: tuple[str, ...]
    given: np.ndarray
    suggested: np.ndarray
    true: np.ndarray | None
    held_out: np.ndarray
    means: evidence.Means
    pictures: data.Split
    description: Description
    gone: tuple[str, ...] = ()
    relabelled: tuple[str, ...] = ()
    others: tuple[tuple[str, str], ...] = ()


def rank(directory: pathlib.Path) -> Suspects:
    """Ranks the examples of a run by the evidence of its newest checkpoint.

    Examples are sorted by `train.evidence.Means.score`; those never seen come last. The suggested
    label is what the chosen network predicts for the image without augmentation. Pictures are
    matched with the evidence by name: of those that are gone nothing can be shown, and to those
    with another label by now the evidence does not apply.

    Raises:
        ConfigError: if there is no run or no checkpoint, or if images have several labels.
        DataNotFoundError: if the data are not there.
    """
    run = saved.open_run(directory)
    about = run.description
    if run.state.evidence is None or about.labels is None:
        raise ConfigError(
            f"{run.config.dataset} has several labels per example: suspects are for one label each"
        )
    positions, pictures, gone, relabelled = _matched(run)
    if not len(positions):
        raise ConfigError(f"none of the pictures that {directory} was trained on is still there")
    means = evidence.means(run.state.evidence)
    suggested = np.argmax(run.scores(pictures), axis=-1)
    order = np.argsort(-means.score[positions], kind="stable")  # NaN last
    chosen = positions[order]
    true = None if about.own_labels is None else np.array(about.own_labels)[chosen]
    names = tuple(about.names[i] for i in chosen)
    return Suspects(
        names=names,
        given=np.array(about.labels)[chosen],
        suggested=suggested[order],
        true=true,
        held_out=chosen >= len(about.train),
        means=jax.tree.map(lambda x: x[chosen], means),
        pictures=pictures.take(order),
        description=about,
        gone=gone,
        relabelled=relabelled,
        others=_others(run.config, frozenset(names)),
    )


def _others(config: Config, ranked: frozenset[str]) -> tuple[tuple[str, str], ...]:
    if config.train_size is not None:  # the others were not wanted
        return ()
    dataset = load_dataset(config)
    labels = (dataset.class_names[label] for label in dataset.train.labels)
    every = zip(dataset.train_names, labels, strict=True)
    return tuple((name, label) for name, label in every if name not in ranked)


def _matched(
    run: saved.Saved,
) -> tuple[np.ndarray, data.Split, tuple[str, ...], tuple[str, ...]]:
    """Positions of the examples that are as they were, their pictures; names gone, relabelled."""
    about, dataset = run.description, load_dataset(run.config)
    if not about.differences(load_problem(run.config).description):
        return np.arange(len(about.names)), load_problem(run.config).everything, (), ()
    place = {name: i for i, name in enumerate(dataset.train_names)}
    labels = about.labels if about.own_labels is None else about.own_labels
    kept, gone, relabelled = [], [], []
    for position, (name, label) in enumerate(zip(about.names, labels or (), strict=True)):
        if name not in place:
            gone.append(name)
        elif dataset.class_names[dataset.train.labels[place[name]]] != about.class_names[label]:
            relabelled.append(name)
        else:
            kept.append(position)
    pictures = dataset.train.take(np.array([place[about.names[i]] for i in kept], int))
    return np.array(kept, int), pictures, tuple(gone), tuple(relabelled)


def measure(suspects: Suspects) -> dict[str, float]:
    """How well the ranking finds the wrong labels, where they are known; in percent.

    Returns:
        ``auc``, area under the ROC curve, the chance that a wrong label ranks before a right one;
        ``precision``, share of wrong labels among the first m, if m labels are wrong;
        ``recall``, share of the wrong labels that have a score above 0;
        ``suggested``, share of the wrong labels whose suggested label is the true one.

    Raises:
        ValueError: if nobody knows the true labels, or all labels are right, or all wrong.
    """
    from sklearn.metrics import roc_auc_score

    if suspects.true is None:
        raise ValueError("nobody knows which labels are wrong")
    wrong = suspects.given != suspects.true
    if wrong.all() or not wrong.any():
        raise ValueError("needs right and wrong labels to tell apart")
    return {
        "auc": 100 * float(roc_auc_score(wrong, -np.arange(len(wrong)))),
        "precision": 100 * float(wrong[: wrong.sum()].mean()),
        "recall": 100 * float((suspects.means.score[wrong] > 0).mean()),
        "suggested": 100 * float((suspects.suggested == suspects.true)[wrong].mean()),
    }


def write_csv(suspects: Suspects, file: pathlib.Path) -> None:
    """Writes a line per example, the most suspicious first.

    Columns: ``file`` or, where the data are not files, ``example``, its number in the training
    split of the data set; ``given`` and ``suggested``, names of classes; ``score``, ``loss``,
    ``agreement`` and, where it was gathered, ``alignment``, as in `train.evidence.Means`, empty
    for an example never seen.
    """
    means, classes = suspects.means, suspects.description.class_names
    with open(file, "w", newline="", encoding="utf-8") as out:
        writer = csv.writer(out, lineterminator="\n")
        gathered = {name: x for name, x in means._asdict().items() if x is not None}
        what = "file" if suspects.description.has_files else "example"
        writer.writerow([what, "given", "suggested", *gathered])
        for i, name in enumerate(suspects.names):
            figures = (x[i] for x in gathered.values())
            writer.writerow(
                [
                    name,
                    classes[suspects.given[i]],
                    classes[suspects.suggested[i]],
                    *("" if np.isnan(x) else f"{x:.4f}" for x in figures),
                ]
            )


def title(config: Config) -> str:
    """Heads the page of a run: the data set, or the folder by its own name."""
    name = config.dataset
    if name == "folder" and config.data_dir is not None:
        name = pathlib.Path(config.data_dir).resolve().name
    return f"{name}: labels that look wrong"


def what_next(config: Config, directory: pathlib.Path) -> list[tuple[str, str]]:
    """What to do with a ranking of a run: words and commands, for `write_page`."""
    listed = dataclasses.replace(config, labels="labels.csv", train_size=None, noise="none")
    flags = dataclasses.replace(listed, noise_rate=Config.noise_rate).flags()
    again = ["python", "-m", "train", "run", *flags, "--out", f"{directory}-again"]
    drop = ["python", "-m", "train", "suspects", str(directory), "--apply", "drop"]
    return [
        ("Train again by the list that you download here:", shlex.join(again)),
        ("Or without looking, leave out every label with a score above 0:", shlex.join(drop)),
    ]


def write_page(
    suspects: Suspects,
    file: pathlib.Path,
    count: int,
    title: str,
    commands: Sequence[tuple[str, str]] = (),
) -> None:
    """Writes a page of the `count` most suspicious images; it needs no other file.

    Its reader marks labels as right or wrong, and downloads a list of all labels that
    ``run --labels`` takes.

    Args:
        suspects: the ranking.
        file: the page.
        count: how many images to show, of those that were ever seen in training.
        title: of the page.
        commands: what to do next, words and a command each.
    """
    means, about = suspects.means, suspects.description
    count = min(count, int(np.isfinite(means.score).sum()))
    tiles = []
    for i, pixels in enumerate(suspects.pictures.read(np.arange(count)) if count else []):
        given, suggested = (
            html.escape(about.class_names[x]) for x in (suspects.given[i], suspects.suggested[i])
        )
        source = html.escape(suspects.names[i])
        if not about.has_files:
            source = f"example {source}"
        labels, spoken = given, f"{source}: {given}"
        if suggested != given:
            labels = f"<s>{given}</s> → <b>{suggested}</b>"
            spoken = f"{source}: labelled {given}, suggested {suggested}"
        tiles.append(
            f'<li><img alt="{spoken}" '
            f'src="data:image/png;base64,{_png(pixels, about.max_value)}">'
            f"<p>{labels}</p><small>{source}<br>score {means.score[i]:.2f}</small></li>"
        )
    above = int((means.score > 0).sum())
    steps = "".join(
        f"<p>{html.escape(words)}</p><pre>{html.escape(command)}</pre>"
        for words, command in commands
    )
    file.write_text(
        string.Template(_PAGE.read_text(encoding="utf-8")).substitute(
            title=html.escape(title),
            summary=f"The {count:,} most suspicious of {len(means.score):,} examples; "
            f"{above:,} have a score above 0.",
            tiles="\n".join(tiles),
            next=steps and f"<section><h2>What next</h2>{steps}</section>",
            data=_for_script(suspects, above),
        ),
        encoding="utf-8",
    )


def _for_script(suspects: Suspects, above: int) -> str:
    """What the page's script needs of all examples, as JSON that no tag can end."""
    about = suspects.description
    what = {
        "column": "file" if about.has_files else "example",
        "classes": about.class_names,
        "names": suspects.names,
        "given": suspects.given.tolist(),
        "suggested": suspects.suggested.tolist(),
        "held_out": suspects.held_out.astype(int).tolist(),
        "above": above,
        "others": [(name, label, "train") for name, label in suspects.others],
    }
    return json.dumps(what, separators=(",", ":")).replace("<", "\\u003c")


def _png(pixels: np.ndarray, max_value: int) -> str:
    """An image, uint8 [h, w, c], as a PNG in base64."""
    bright = (pixels.astype(np.float32) * (255 / max_value)).round().astype(np.uint8)
    image = Image.fromarray(bright[..., 0] if bright.shape[-1] == 1 else bright)
    image.thumbnail((_LARGEST_SIDE, _LARGEST_SIDE))  # never larger than it is
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode()
