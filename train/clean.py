"""From a folder of pictures, some filed wrongly, to a clean model and the list of wrong labels.

===========================================  ======================================================
DIR/choices.json                             the options
DIR/first/                                   the run on all labels
DIR/suspects.csv, suspects.html, labels.csv  its ranking, a page of the worst, what is left
DIR/ranked.json                              says that these are complete
DIR/second/                                  the same network, trained further on what is left
DIR/model/                                   its network, as `export` writes it
DIR/summary.json                             the figures
===========================================  ======================================================
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import math
import pathlib
import shlex
import shutil
from collections.abc import Iterator
from typing import Annotated, Any, Literal

import numpy as np
import tyro
from rich.console import Console

from train import augment, correct, demo, export, problem, suspects, trainer
from train.config import AUTO, Config, ConfigError, flags
from train.description import Description, NoDescriptionError
from train.files import write_json
from train.progress import Display, reading
from train.run_directory import InUseError, RunDirectoryError, read_metrics, read_result
from train.saved import open_run

Help = tyro.conf.arg

CHOICES, FIRST, RANKED, SECOND, MODEL, SUMMARY = (
    "choices.json", "first", "ranked.json", "second", "model", "summary.json",
)  # fmt: skip
TABLE, PAGE, LABELS = "suspects.csv", "suspects.html", "labels.csv"
_PICTURES_SHOWN = 200
_K, _B = 8, 8  # mini-batches of a step, examples of each where there are enough
_STEPS, _FEWEST, _MOST = 800, 20, 100  # of a training: steps, and bounds of its epochs
_FURTHER = 1 / 4  # as long as the first training is the second: docs/results.md


@dataclasses.dataclass(frozen=True)
class Clean:
    """Finds the wrong labels of a folder of pictures, and trains a network without them.

    1. first/: holds a tenth of the pictures back and trains a network on the others by coherent
       steps with early-learning regularization (`coherent_elr`), which keep it from memorising
       labels that the held-out ones contradict.
    2. suspects.csv, suspects.html, labels.csv: ranks all labels by how wrong they look, shows the
       worst on a page, and lists the labels without those that look wrong (score above 0).
    3. second/: trains that network further on the list, a quarter as long, with the same pictures
       held back.
    4. model/: that network by itself, for `predict`; summary.json: the figures.

    No picture is moved or changed. Start the same command again to go on after an interruption:
    stages that are done are not repeated, unless the pictures or their labels have changed since.
    labels.csv may be corrected by hand: then the last two stages are done anew, by that list.
    """

    folder: Annotated[
        tyro.conf.Positional[pathlib.Path],
        Help(
            help="the pictures, sorted into one folder per class; what else it may be: run --help"
        ),
    ]
    out: Annotated[pathlib.Path, Help(help="the folder to write, not inside the other one")]
    labels: Annotated[
        pathlib.Path | None,
        Help(help="a CSV file of labels (file,label[,split]), in place of the folder's own"),
    ] = None
    image_size: Annotated[
        int | None, Help(help="side in pixels that the pictures are brought to; none: chosen")
    ] = None
    bad_files: Annotated[
        Literal["error", "skip"],
        Help(help="stop where files cannot be read, or leave them out and count them"),
    ] = "error"
    network: Annotated[
        str, Help(help="one of `python -m train models`; auto: chosen by the size of the pictures")
    ] = AUTO
    augmentation: Annotated[str, Help(help=f"one of {', '.join(augment.PRESETS)}")] = "standardize"
    epochs: Annotated[
        int | None,
        Help(
            help=f"passes over the pictures, in the first training; none: about {_STEPS} steps, "
            f"from {_FEWEST} to {_MOST} passes"
        ),
    ] = None
    learning_rate: Annotated[
        float | None, Help(help="initial learning rate of SGD; none: as of `run`")
    ] = None
    seed: Annotated[int, Help(help="of weights, held-out pictures and their order")] = 0
    devices: Annotated[int | None, Help(help="use so many devices; none: all there are")] = None
    checkpoint_seconds: Annotated[
        float, Help(help="save every so many seconds; 0: at every end of an epoch")
    ] = 60.0


def run(clean: Clean, console: Console) -> dict[str, Any]:
    """Does whichever stages are to be done.

    Returns:
        What is written to ``summary.json``; see `summarize`.

    Raises:
        ConfigError: if the choices do not fit.
        RunDirectoryError: if the folder was begun with other choices, or is in use.
        Exception: otherwise as `trainer.load_problem` and `trainer.train`.
    """
    out = clean.out
    if out.resolve().is_relative_to(clean.folder.resolve()):
        raise ConfigError(
            f"--out {out} lies in {clean.folder}, where nothing is changed: give a folder elsewhere"
        )
    with _held(out):
        choices = _check_choices(clean)
        config = _config(clean)
        with reading(console) as on_file:
            problem.load_dataset(config, on_file)
        config = _sized(config, clean.epochs)
        first = trainer.load_problem(config)
        write_json(out / CHOICES, choices)  # now that the pictures can be read
        demo.describe(first, config, console)
        _forget_if_changed(out, first, console)
        _train(FIRST, config, first, clean, console)
        ranked = _rank(clean, console)
        last = FIRST
        by_hand = ranked["digest"] != _digest(out / LABELS)
        if ranked["left_out"] or by_hand:
            if by_hand:
                console.print(f"{out / LABELS} has been changed by hand, and is taken as it is")
            labels = str(out.resolve() / LABELS)
            config = dataclasses.replace(config, labels=labels, network=first.network)
            config = _sized(config, clean.epochs)
            second = trainer.load_problem(config)
            # Not where a list of one's own has other classes.
            if _fits(first.description, second.description):
                epochs = math.ceil(_FURTHER * config.epochs)
                begun = str(out.resolve() / FIRST)
                config = dataclasses.replace(config, pretrained=begun, epochs=epochs)
            if _changes(out / SECOND, second):
                _remove(out, SUMMARY, MODEL, SECOND)
            _train(SECOND, config, second, clean, console)
            last = SECOND
        export.save(export.from_run(out / last, chosen(out / last)[0]), out / MODEL)
        summary = summarize(out, last, ranked, first)
        write_json(out / SUMMARY, summary)
    for line in said(summary, out):
        console.print(line, soft_wrap=True)
    return summary


def summarize(
    out: pathlib.Path, last: str, ranked: dict[str, Any], first: trainer.Problem
) -> dict[str, Any]:
    """The figures of what was done; accuracies in percent, of the epochs that `chosen` names.

    Returns:
        ``examples``, ``wrong`` (labels that look wrong), ``never`` (those of them that no epoch has
        predicted), ``left_out``; ``held_out_before``, of the first network by the held-out
        labels as they came; of the last network on the same pictures, which it was not trained on
        either, ``held_out_after`` by the labels that are left of these, and
        ``held_out_after_as_came``; ``test_before``, ``test_after``. What could not be measured is
        None.
    """
    before, after = (chosen(out / name)[1] for name in (FIRST, last))
    run = open_run(out / last)
    return {
        **{name: ranked[name] for name in ("examples", "wrong", "never")},
        "left_out": ranked["examples"] - len(run.description.names),
        "held_out": len(first.description.held_out),
        "held_out_before": before["held_out"],
        "held_out_after": after["held_out"],
        "held_out_after_as_came": _as_came(run, chosen(out / last)[0], first),
        "test_before": before.get("test"),
        "test_after": after.get("test"),
    }


def chosen(directory: pathlib.Path) -> tuple[export.Epoch, dict[str, Any]]:
    """Which epoch's network of a finished run to use, and its line of metrics.

    It is the last one, after all the steps, unless its accuracy on the held-out part is below the
    best epoch's by more than a standard error. A held-out part without the labels that look wrong
    is soon predicted without a mistake, and then tells early epochs from late ones no longer.
    """
    lines = read_metrics(directory)
    best, last = max(lines, key=lambda line: line["held_out"]), lines[-1]
    count = len(Description.read(directory).held_out)
    share = (last["held_out"] / 100 * count + 1) / (count + 2)  # none wrong is no certainty
    error = 100 * math.sqrt(share * (1 - share) / count)
    if best["held_out"] - last["held_out"] > error:
        return "best", best
    return "last", last


def _as_came(run: trainer.Saved, epoch: export.Epoch, first: trainer.Problem) -> float | None:
    """The accuracy on the held-out part of the first run; None where it was trained on."""
    about, before = run.description, first.description
    trained_on = set(before.held_out) & set(about.train)
    if first.held_out is None or trained_on or not _same_input(about, before):
        return None
    network = run.network if epoch == "best" else run.state
    scores = trainer.predict(run.program, network, first.held_out)
    predicted = np.array(about.class_names)[scores.argmax(axis=-1)]
    return 100 * float(np.mean(predicted == np.array(before.class_names)[first.held_out.labels]))


def said(summary: dict[str, Any], out: pathlib.Path) -> Iterator[str]:
    """The summary for a reader, in lines."""
    examples, wrong, never = (summary[name] for name in ("examples", "wrong", "never"))
    before, after, as_came = (
        summary[f"held_out_{name}"] for name in ("before", "after", "after_as_came")
    )
    yield f"{wrong:,} of {examples:,} labels look wrong"
    if not wrong:
        yield f"held-out accuracy: {before:.1f}% before, {after:.1f}% after"
    else:
        yield f"  {never:,} are surest, no epoch predicted them: of such, 84 to 100% were wrong"
        yield f"  {wrong - never:,} are less sure: of such, 30 to 90% were, where truth was known"
        yield "held-out accuracy:"
        if as_came is None:
            yield f"  {before:.1f}% before, by all labels, wrong ones among them"
        else:
            error = 100 * math.sqrt(before / 100 * (1 - before / 100) / summary["held_out"])
            yield (
                f"  {before:.1f}% before, {as_came:.1f}% after, by all labels, wrong ones among "
                f"them; {2 * error:.1f} more or less may be chance"
            )
        yield f"  {after:.1f}% after, by the labels that look right"
    if summary["test_before"] is not None and summary["test_after"] is not None:
        yield (
            f"test accuracy: {summary['test_before']:.1f}% before, "
            f"{summary['test_after']:.1f}% after"
        )
    yield f"model: {out / MODEL}"
    yield f"list:  {out / LABELS}, {examples - summary['left_out']:,} labels"
    yield f"page:  {out / PAGE}"


# ------------------------------------------------------------------------------- the stages


def _config(clean: Clean) -> Config:
    return Config(
        dataset="folder",
        data_dir=str(clean.folder),
        labels=None if clean.labels is None else str(clean.labels),
        image_size=clean.image_size,
        bad_files=clean.bad_files,
        network=clean.network,
        augmentation=clean.augmentation,
        learning_rate=clean.learning_rate,
        schedule="linear",
        seed=clean.seed,
        method="coherent_elr",  # ends above coherent steps alone: docs/results.md
    )


def _sized(config: Config, epochs: int | None) -> Config:
    """With batches and epochs that suit the number of pictures."""
    count = len(problem.load_dataset(config).train)
    b = min(_B, max(1, count // (2 * _K)))
    steps = max(1, round((1 - config.held_out) * count / (_K * b)))
    chosen = min(_MOST, max(_FEWEST, math.ceil(_STEPS / steps)))
    return dataclasses.replace(config, k=_K, b=b, epochs=chosen if epochs is None else epochs)


def _fits(one: Description, other: Description) -> bool:
    """Whether a network for one data set can be trained further on the other."""
    return one.class_names == other.class_names and _same_input(one, other)


def _same_input(one: Description, other: Description) -> bool:
    """Whether a network for one data set can look at the pictures of the other."""
    return (one.image_shape, one.ranges) == (other.image_shape, other.ranges)


def _train(
    name: str,
    config: Config,
    on: trainer.Problem,
    clean: Clean,
    console: Console,
) -> None:
    """Trains, or goes on training, the run of a stage."""
    out, steps = clean.out, config.epochs * on.order.steps_per_epoch
    if read_result(out / name) is None:
        _remove(out, SUMMARY, MODEL)
        held_out = 0 if on.held_out is None else len(on.held_out)
        console.print(
            f"{name}: {len(on.dataset.train):,} pictures to train on, {held_out:,} held out, "
            f"{config.epochs} epochs of {on.order.steps_per_epoch} steps"
        )
    with Display(console) as display:
        options = display.follow(name, steps, config)
        options.tensorboard, options.devices = False, clean.devices
        options.checkpoint_seconds = clean.checkpoint_seconds
        trainer.train(config, out / name, options, on)


def _rank(clean: Clean, console: Console) -> dict[str, Any]:
    """Ranks the labels of the first run, unless that is done; returns what it came to."""
    out = clean.out
    marker = out / RANKED
    if marker.exists() and (out / LABELS).exists():
        return json.loads(marker.read_text())
    found = suspects.rank(out / FIRST)
    suspects.write_csv(found, out / TABLE)
    title = suspects.title(_config(clean))
    place = f"Put the list that you download here in the place of {out / LABELS}, then train by it:"
    suspects.write_page(found, out / PAGE, _PICTURES_SHOWN, title, [(place, _command(clean))])
    dataset = problem.load_dataset(open_run(out / FIRST).config)
    corrected = correct.correct(found, dataset, "drop")
    corrected.write(out / LABELS, "file", with_split=True)
    for line in corrected.said():
        console.print(line, soft_wrap=True)
    ranked = {
        "examples": corrected.total,
        "wrong": corrected.wrong,
        "never": corrected.never,
        "left_out": corrected.changed,
        "digest": _digest(out / LABELS),
    }
    write_json(marker, ranked)
    return ranked


def _command(clean: Clean) -> str:
    words = ["python", "-m", "train", "clean", str(clean.folder), "--out", str(clean.out)]
    return shlex.join([*words, *flags(clean)])


# --------------------------------------------------------------------- what was done before


@contextlib.contextmanager
def _held(out: pathlib.Path) -> Iterator[None]:
    """Creates the folder and holds it against other processes."""
    with export.writing(out):
        out.mkdir(parents=True, exist_ok=True)
    with open(out / "lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise InUseError(
                f"{out} is in use by another process; wait for it or take another folder"
            ) from error
        yield


def _check_choices(clean: Clean) -> dict[str, Any]:
    """The options, but for the places; other ones than the folder was begun with are refused."""
    file = clean.out / CHOICES
    choices = {
        name: value
        for name, value in dataclasses.asdict(clean).items()
        if name not in ("folder", "out", "labels", "devices", "checkpoint_seconds")
    }
    before = json.loads(file.read_text()) if file.exists() else choices
    for name, value in choices.items():
        if before.get(name) != value:
            raise RunDirectoryError(
                f"{clean.out} was begun with {name} = {before.get(name)!r}, and here it is "
                f"{value!r}; take another folder, or delete this one"
            )
    return choices


def _changes(directory: pathlib.Path, now: trainer.Problem) -> list[str]:
    """How the data differ from those of a run that has begun."""
    try:
        return Description.read(directory).differences(now.description)
    except NoDescriptionError:
        return []


def _forget_if_changed(out: pathlib.Path, now: trainer.Problem, console: Console) -> None:
    """Removes what was made of other data than there are now."""
    _remove_old(out)
    changes = _changes(out / FIRST, now)
    if not changes:
        return
    console.print(f"begun anew, for the data have changed: {'; '.join(changes)}", soft_wrap=True)
    marker, labels = out / RANKED, out / LABELS
    if marker.exists() and labels.exists():
        digest = _digest(labels)
        if digest != json.loads(marker.read_text())["digest"]:
            kept = out / f"labels.before-{digest[:8]}.csv"
            labels.replace(kept)
            console.print(f"the list that was changed by hand is kept as {kept}", soft_wrap=True)
    _remove(out, SUMMARY, MODEL, RANKED, LABELS, TABLE, PAGE, SECOND, FIRST)


def _remove(out: pathlib.Path, *names: str) -> None:
    """Removes files and folders in this order: what is made of others before these."""
    for name in names:
        path = out / name
        if path.is_dir():  # a folder half removed must not be taken for a whole one
            path.rename(out / f"{name}{_OLD}")
            _remove_old(out)
        else:
            path.unlink(missing_ok=True)


def _remove_old(out: pathlib.Path) -> None:
    for old in out.glob(f"*{_OLD}"):
        shutil.rmtree(old)


_OLD = ".old"


def _digest(file: pathlib.Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()
