"""The command line: ``python -m train [COMMAND] [OPTIONS]``; without a command, the demo.

Exit codes: 0 done; 1 a fault of ours; 2 a wrong choice, or data that are missing; 3 NaN or Inf;
4 the run directory is in use or holds another run; 5 another process of a distributed run has
ended; 75 stopped by SIGTERM and 130 by SIGINT, the state of the training saved: start again to go
on.
"""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator


@contextlib.contextmanager
def _importing() -> Iterator[None]:
    """Within, Ctrl-C ends the process at once: extension modules crash on an exception in them."""

    def leave(*_: object) -> None:
        print("stopped by SIGINT, before there was anything to save", file=sys.stderr, flush=True)
        os._exit(130)

    before = signal.getsignal(signal.SIGINT)
    with contextlib.suppress(ValueError):  # not the main thread: the signal does not come here
        if before is signal.default_int_handler:
            signal.signal(signal.SIGINT, leave)
    try:
        yield
    finally:
        if signal.getsignal(signal.SIGINT) is leave:
            signal.signal(signal.SIGINT, before)


with _importing():
    import dataclasses
    import errno
    import pathlib
    import warnings
    from typing import Annotated, Any, Literal

    import tyro
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

Help = tyro.conf.arg
USAGE = """usage: python -m train [COMMAND] [OPTIONS]; --help after a command lists its options

  clean      find the wrong labels of a folder of pictures, and train a network without them
  demo       compare methods on noisy labels and draw the result (the default)
  run        train one config in a run directory, or go on with it
  experiment train the arms of a table or figure of the paper
  report     a page, figures and tables of what experiments and runs have given
  evaluate   measure the newest checkpoint of a run directory
  predict    say which class new pictures are, by a run or an export
  export     write a run's network into two files that need neither the run nor its data
  relabel    label the training set by a run's network, dropout left on: realistic noise
  suspects   rank a run's training examples by how wrong their labels look: table and page
  list       experiments, data sets, networks, methods, augmentations, label noise
  models     every network with its input size, classes and parameter count
  prepare    prepare a data set, once

exit codes: 0 done; 2 a wrong choice or missing data; 3 NaN or Inf; 4 run directory in use or of
another config; 5 another process of a distributed run has ended; 75 (SIGTERM) and 130 (SIGINT)
stopped with the state saved, start again to go on"""


def _demo(args: list[str], console: Console) -> None:
    from train import demo

    demo.run(tyro.cli(demo.Demo, args=args, prog="python -m train demo"), console)


def _clean(args: list[str], console: Console) -> None:
    from train import clean

    clean.run(tyro.cli(clean.Clean, args=args, prog="python -m train clean"), console)


def _run(args: list[str], console: Console) -> None:
    from train import demo, distributed, saved, trainer
    from train.config import Config
    from train.problem import load_dataset
    from train.progress import Display, reading

    @dataclasses.dataclass(frozen=True)
    class Run:
        """Trains one config; start the same command again to go on after an interruption."""

        out: Annotated[pathlib.Path, Help(help="the run directory")]
        config: tyro.conf.OmitArgPrefixes[Config] = dataclasses.field(default_factory=Config)
        resume: Annotated[
            bool, Help(help="take the config from the run directory, not from the options")
        ] = False
        checkpoint_seconds: Annotated[
            float, Help(help="save every so many seconds; 0: at every end of an epoch")
        ] = 60.0
        keep: Annotated[int, Help(help="checkpoints to keep")] = 2
        tensorboard: Annotated[bool, Help(help="write metrics for TensorBoard too")] = True
        devices: Annotated[
            int | None, Help(help="use so many of the devices; none: all there are")
        ] = None
        parameters: Annotated[
            Literal["replicated", "sharded"],
            Help(help="on several devices: copied to each, or spread over them (FSDP)"),
        ] = "replicated"
        distributed: Annotated[
            bool, Help(help="one of several processes; on TPU pods, SLURM and Open MPI found")
        ] = False
        coordinator: Annotated[
            str | None, Help(help="HOST:PORT of the first process, where it is not detected")
        ] = None
        num_processes: Annotated[int | None, Help(help="likewise: how many there are")] = None
        process_id: Annotated[int | None, Help(help="likewise: which one this is, from 0")] = None

    chosen = tyro.cli(Run, args=args, prog="python -m train run")
    where = (chosen.coordinator, chosen.num_processes, chosen.process_id)
    if chosen.distributed:
        distributed.initialize(*where)
        console.quiet = not distributed.writes()
    elif where != (None, None, None):
        raise ValueError("--coordinator, --num-processes and --process-id need --distributed")
    config = saved.read_config(chosen.out) if chosen.resume else chosen.config
    with reading(console) as on_file:
        load_dataset(config, on_file)
    problem = trainer.load_problem(config)
    demo.describe(problem, config, console)
    with Display(console) as display:
        options = display.follow(
            config.method, config.epochs * problem.order.steps_per_epoch, config
        )
        options.devices, options.parameters = chosen.devices, chosen.parameters
        layout = trainer.layout_of(config, options)
        console.print(f"{config.method}: {trainer.build_program(config, problem, layout).how}")
        options.checkpoint_seconds = chosen.checkpoint_seconds
        options.keep = chosen.keep
        options.tensorboard = chosen.tensorboard
        result = trainer.train(config, chosen.out, options, problem)
    _print_figures(result, console)


def _experiment(args: list[str], console: Console) -> None:
    from train import experiments
    from train.experiments import runner

    @dataclasses.dataclass(frozen=True)
    class Experiment:
        """Trains the arms of a table or figure of the paper; start it again to go on.

        Finished runs are not trained again. Two processes can share the work.
        """

        name: Annotated[
            tyro.conf.Positional[str], Help(help=f"one of {', '.join(experiments.NAMES)}")
        ]
        scale: Annotated[
            Literal["paper", "laptop"],
            Help(help="paper: its protocol to the letter; laptop: real data, minutes a run"),
        ]
        dry_run: Annotated[bool, Help(help="show the arms, their steps and their time")] = False
        only: Annotated[tuple[str, ...], Help(help="labels of arms; without: all")] = ()
        seeds: Annotated[
            tuple[int, ...], Help(help="of every arm; without: the experiment's own")
        ] = ()
        data_dir: Annotated[
            str | None, Help(help="where the data are, if not in the default place")
        ] = None
        devices: Annotated[int | None, Help(help="how many to train on; none: all")] = 1
        out: Annotated[pathlib.Path, Help(help="the folder of all experiments' runs")] = runner.ROOT

    chosen = tyro.cli(Experiment, args=args, prog="python -m train experiment")
    choice = runner.Choice(
        experiments.load(chosen.name),
        chosen.scale,
        chosen.out,
        chosen.only,
        chosen.seeds,
        chosen.data_dir,
        devices=chosen.devices,
    )
    if chosen.dry_run:
        runner.plan(choice, console)
    else:
        runner.run(choice, console)


def _report(args: list[str], console: Console) -> None:
    from train.experiments import runner

    @dataclasses.dataclass(frozen=True)
    class Report:
        """Makes a page, figures and tables of finished runs, whatever else is still running."""

        runs: Annotated[
            tyro.conf.Positional[tuple[pathlib.Path, ...]],
            Help(help="run directories, or folders of them"),
        ] = (runner.ROOT,)
        out: Annotated[pathlib.Path, Help(help="the folder to write")] = pathlib.Path("report")
        docs: Annotated[
            pathlib.Path | None,
            Help(
                help="write summary.json, tables and figures here too, for the documentation; arms "
                "that are in its summary.json and not in the runs stay"
            ),
        ] = None
        redraw: Annotated[
            bool, Help(help="no runs: tables and figures of --docs anew, from its summary.json")
        ] = False

    chosen = tyro.cli(Report, args=args, prog="python -m train report")
    # Matplotlib takes a second to import: after the options are read.
    from train import report

    if chosen.redraw:
        if chosen.docs is None:
            raise ValueError("--redraw wants --docs, the folder with summary.json")
        console.print(f"{report.redraw(chosen.docs)} arms: {chosen.docs / 'tables.md'}")
        return
    arms = report.write(chosen.runs, chosen.out, chosen.docs)
    console.print(f"{arms} arms: {chosen.out / 'index.html'}")


def _evaluate(args: list[str], console: Console) -> None:
    from train import trainer

    @dataclasses.dataclass(frozen=True)
    class Evaluate:
        """Measures the newest checkpoint of a run directory.

        Where the data are gone, or have changed, it shows the figures that the run noted.
        """

        run: Annotated[tyro.conf.Positional[pathlib.Path], Help(help="the run directory")]

    _print_figures(
        trainer.evaluate_run(tyro.cli(Evaluate, args=args, prog="python -m train evaluate").run),
        console,
    )


def _predict(args: list[str], console: Console) -> None:
    from rich.progress import Progress

    from train import export, predict

    @dataclasses.dataclass(frozen=True)
    class Predict:
        """Says which class new pictures are: a CSV file with file, label and confidence.

        The pictures are read as those that the network was trained on, which may be gone.
        """

        model: Annotated[
            tyro.conf.Positional[pathlib.Path], Help(help="a run directory, or an export")
        ]
        pictures: Annotated[
            tyro.conf.Positional[tuple[pathlib.Path, ...]],
            Help(help="pictures, and folders of pictures at any depth"),
        ]
        out: Annotated[
            pathlib.Path, Help(help="the file to write, in place of earlier predictions")
        ] = pathlib.Path("predictions.csv")
        top: Annotated[int, Help(help="how many classes to name, the best first")] = 1
        bad_files: Annotated[
            Literal["error", "skip"],
            Help(help="stop where pictures cannot be read, or list them without a label"),
        ] = "error"

    chosen = tyro.cli(Predict, args=args, prog="python -m train predict")
    pictures, skipped = predict.find(chosen.pictures)
    predictor = predict.Predictor(export.load_model(chosen.model))
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("pictures", total=len(pictures))
        predicted = predict.write(
            predictor,
            pictures,
            chosen.out,
            top=chosen.top,
            bad_files=chosen.bad_files,
            on_picture=lambda: progress.advance(task),
        )
    for line in predicted.said(skipped):
        console.print(line, soft_wrap=True)
    console.print(f"written: {chosen.out}")


def _export(args: list[str], console: Console) -> None:
    from train import export

    @dataclasses.dataclass(frozen=True)
    class Export:
        """Writes a run's network as model.safetensors and model.json, which suffice to use it."""

        run: Annotated[tyro.conf.Positional[pathlib.Path], Help(help="the run directory")]
        out: Annotated[pathlib.Path, Help(help="the folder to write")]
        epoch: Annotated[
            Literal["best", "last"],
            Help(help="best by held-out labels (without held-out examples: last), or last"),
        ] = "best"

    chosen = tyro.cli(Export, args=args, prog="python -m train export")
    model = export.from_run(chosen.run, chosen.epoch)
    export.save(model, chosen.out)
    trained = model.trained
    console.print(
        f"{model.network}, {len(model.class_names)} classes, epoch {trained['epoch']} of "
        f"{trained['of_epochs']}, chosen by {trained['chosen_by']}"
    )
    console.print(f"written: {chosen.out / export.WEIGHTS}, {chosen.out / export.DESCRIPTION}")


def _relabel(args: list[str], console: Console) -> None:
    from train import noise, trainer

    @dataclasses.dataclass(frozen=True)
    class Relabel:
        """Writes the labels that a run's network gives its training set with dropout left on."""

        run: Annotated[tyro.conf.Positional[pathlib.Path], Help(help="the run directory")]
        out: Annotated[pathlib.Path, Help(help="the file to write, for --noise of another run")]
        seed: Annotated[int, Help(help="of the dropout masks")] = 0

    chosen = tyro.cli(Relabel, args=args, prog="python -m train relabel")
    if chosen.out.suffix != ".npz":
        raise ValueError(f"--out must end in .npz, got {chosen.out}")
    given, true = trainer.relabel_run(chosen.run, chosen.seed)
    noise.save(chosen.out, given, true)
    console.print(f"{chosen.out}: {100 * (given != true).mean():.1f}% of the labels wrong")


def _suspects(args: list[str], console: Console) -> None:
    from train import correct, suspects
    from train.problem import load_dataset
    from train.saved import read_config

    @dataclasses.dataclass(frozen=True)
    class Suspects:
        """Ranks the training examples of a run by how wrong their labels look.

        Writes suspects.csv, a line per example, and suspects.html, pictures of the worst. With
        --apply it writes a list of labels as well, without those that look wrong (score above 0),
        or with the suggested ones in their place: `run --labels` trains on it. No picture is
        moved or changed.
        """

        run: Annotated[tyro.conf.Positional[pathlib.Path], Help(help="the run directory")]
        out: Annotated[
            pathlib.Path | None,
            Help(
                help="the folder to write to, if not the run directory; with --apply the list to "
                "write, if not labels.csv in it"
            ),
        ] = None
        apply: Annotated[
            Literal["drop", "relabel"] | None,
            Help(help="write a list of labels: leave the suspects out, or relabel them"),
        ] = None
        count: Annotated[int, Help(help="how many images to show on the page")] = 200

    chosen = tyro.cli(Suspects, args=args, prog="python -m train suspects")
    if chosen.count < 1:
        raise ValueError(f"--count must be at least 1, got {chosen.count}")
    out, listed = chosen.out or chosen.run, None
    if chosen.apply is not None:
        out, listed = chosen.run, chosen.out or chosen.run / "labels.csv"
        correct.check_place(listed, read_config(chosen.run))
    found = suspects.rank(chosen.run)
    out.mkdir(parents=True, exist_ok=True)
    suspects.write_csv(found, out / "suspects.csv")
    config = read_config(chosen.run)
    title, commands = suspects.title(config), suspects.what_next(config, chosen.run)
    suspects.write_page(found, out / "suspects.html", chosen.count, title, commands)
    if chosen.apply is None:
        above = int((found.means.score > 0).sum())
        console.print(f"{above:,} of {len(found.given):,} labels look wrong (score above 0)")
    for what, names in (
        ("are gone", found.gone),
        ("have another label by now and are left out", found.relabelled),
    ):
        if names:
            more = f" and {len(names) - 3:,} more" if len(names) > 3 else ""
            console.print(f"{len(names):,} pictures {what}: {', '.join(names[:3])}{more}")
    if found.true is not None and (found.given != found.true).any():
        console.print("against the true labels, %:")
        _print_figures(suspects.measure(found), console)
    written = [out / "suspects.csv", out / "suspects.html"]
    if chosen.apply is not None and listed is not None:
        dataset = load_dataset(read_config(chosen.run))
        corrected = correct.correct(found, dataset, chosen.apply)
        corrected.write(listed, "file" if found.description.has_files else "example")
        for line in corrected.said():
            console.print(line, soft_wrap=True)
        written.append(listed)
    console.print(f"written: {', '.join(map(str, written))}")


def _print_figures(figures: dict[str, Any], console: Console) -> None:
    for name, value in figures.items():
        console.print(
            f"{name:12} {value:.2f}" if isinstance(value, float) else f"{name:12} {value}"
        )


def _list(args: list[str], console: Console) -> None:
    tyro.cli(lambda: None, args=args, prog="python -m train list")
    import models
    from train import augment, data, experiments, methods, noise

    for title, names in (
        ("experiments", experiments.NAMES),
        ("data sets", data.NAMES),
        ("networks", models.names()),
        ("methods", methods.NAMES),
        ("augmentations", augment.PRESETS),
        ("label noise", (*noise.KINDS, "FILE.npz")),
    ):
        console.print(Text.assemble((title, "bold"), f": {', '.join(names)}"))


def _models(args: list[str], console: Console) -> None:
    tyro.cli(lambda: None, args=args, prog="python -m train models")
    import models

    table = Table("network", "input", "classes", "parameters")
    for column in table.columns[1:]:
        column.justify = "right"
    for row in models.table():
        shape = "×".join(map(str, row.input_shape))
        table.add_row(row.name, shape, f"{row.num_classes:,}", f"{row.parameters:,}")
    console.print(table)


def _prepare(args: list[str], console: Console) -> None:
    from train import data

    @dataclasses.dataclass(frozen=True)
    class Prepare:
        """Prepares a data set, once, with TFDS; needs TensorFlow: pip install -e '.[prepare]'."""

        name: Annotated[tyro.conf.Positional[str], Help(help="the data set")]
        data_dir: Annotated[
            pathlib.Path | None, Help(help="TFDS's data folder, if not ~/tensorflow_datasets")
        ] = None
        archives: Annotated[
            pathlib.Path | None,
            Help(help="a folder with the archives as their publishers serve them"),
        ] = None

    chosen = tyro.cli(Prepare, args=args, prog="python -m train prepare")
    console.print(f"prepared: {data.prepare(chosen.name, chosen.data_dir, chosen.archives)}")


COMMANDS = {
    "clean": _clean,
    "demo": _demo,
    "run": _run,
    "experiment": _experiment,
    "report": _report,
    "evaluate": _evaluate,
    "predict": _predict,
    "export": _export,
    "relabel": _relabel,
    "suspects": _suspects,
    "list": _list,
    "models": _models,
    "prepare": _prepare,
}


def main(argv: list[str] | None = None) -> int:
    """Runs a command; returns the exit code."""
    args = list(sys.argv[1:] if argv is None else argv)
    console = Console(markup=False)  # messages and paths have brackets of their own
    if args and args[0] in ("-h", "--help"):
        print(USAGE)
        return 0
    name = args.pop(0) if args and not args[0].startswith("-") else "demo"
    if name not in COMMANDS:
        print(f"unknown command {name!r}; known: {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    warnings.showwarning = lambda message, *_: console.print(
        Text.assemble(("warning: ", "yellow"), str(message))
    )
    # While it trains the trainer has handlers of its own, which save the state first.
    handler = signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
    try:
        with _no_signal_is_lost():
            return _run_command(name, args, console)
    except KeyboardInterrupt:
        print("stopped by SIGINT, before there was anything to save", file=sys.stderr)
        return 130
    finally:
        signal.signal(signal.SIGTERM, handler)


@contextlib.contextmanager
def _no_signal_is_lost() -> Iterator[None]:
    """Within, a signal whose exception Python ignored is sent again.

    It ignores those in callbacks of the garbage collector, of which JAX has one.
    """
    before = sys.unraisablehook

    def send_again(ignored: "sys.UnraisableHookArgs") -> None:
        signum = {KeyboardInterrupt: signal.SIGINT, SystemExit: signal.SIGTERM}.get(
            ignored.exc_type
        )
        if signum is None:
            before(ignored)
        else:  # when the callback is over
            threading.Timer(0.05, os.kill, (os.getpid(), signum)).start()

    sys.unraisablehook = send_again
    try:
        yield
    finally:
        sys.unraisablehook = before


def _run_command(name: str, args: list[str], console: Console) -> int:
    with _importing():
        from train import distributed

    try:
        code = _code_of(name, args, console)
    except Exception as error:
        if not distributed.is_initialized():
            raise
        code = distributed.explain(error)
    if code not in (0, 75) and distributed.is_initialized():
        distributed.leave(code)
    return code


def _code_of(name: str, args: list[str], console: Console) -> int:
    with _importing():
        from train.problem import forget
        from train.run_directory import RunDirectoryError
        from train.trainer import Interrupted, NotFiniteError

    forget()  # of an earlier command in this process
    try:
        COMMANDS[name](args, console)
    except Interrupted as stopped:
        print(f"stopped by {stopped}", file=sys.stderr)
        return 75 if stopped.signum == signal.SIGTERM else 130
    except NotFiniteError as error:
        print(f"error: {error}", file=sys.stderr)
        return 3
    except RunDirectoryError as error:
        print(f"error: {error}", file=sys.stderr)
        return 4
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {_in_a_line(error)}", file=sys.stderr)
        return 2
    return 0


def _in_a_line(error: Exception) -> str:
    """What went wrong; of the system's errors the place, the reason and what to do."""
    if not isinstance(error, OSError) or error.strerror is None:
        return str(error)
    where = "" if error.filename is None else f"{error.filename}: "
    remedy = {
        errno.ENOSPC: "; make space and start the same command again to go on",
        errno.EACCES: "; give a place that may be read, or for --out one that may be written to",
    }.get(error.errno or 0, "")
    return f"{where}{error.strerror}{remedy}"


if __name__ == "__main__":
    sys.exit(main())
