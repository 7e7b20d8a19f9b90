"""A report of runs: one HTML page that needs nothing else, figures, a Markdown table."""

import dataclasses
import functools
import html
import itertools
import json
import os
import pathlib
import shlex
import urllib.parse
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import markdown_it
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from train import arms as arm_loop
from train import experiments, noise, plots
from train.arms import Outcome
from train.config import AUTO, Config, ConfigError
from train.description import Description
from train.experiments import runner
from train.experiments.common import SCALES, Arm, Panel
from train.files import write_json


@dataclasses.dataclass(frozen=True)
class Row:
    """An arm, with what its finished runs give.

    Attributes:
        arm: the arm.
        figures: means and deviations over seeds, as `runner.summarize` gives them, the sample
            visits, and the share of wrong given labels, %.
        curves: lines of metrics of each seed; none where the runs are not at hand.
        command: trains the arm with these seeds.
        run_command: trains the first of its runs by itself; empty likewise.
        runs: their folders, by seed; empty likewise.
    """

    arm: Arm
    figures: dict[str, Any]
    curves: list[list[dict[str, Any]]]
    command: str
    run_command: str
    runs: Mapping[int, pathlib.Path] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Section:
    """An experiment at a scale, or the runs of a folder that belong to none.

    Attributes:
        key: names files and, in ``summary.json``, what is before the slash.
        title: for the reader.
        about: the docstring of the experiment.
        rows: its arms with finished runs.
        missing: labels of its other arms.
    """

    key: str
    title: str
    about: str
    rows: list[Row]
    missing: list[str]

    @property
    def papers_data(self) -> bool:
        """Whether the paper's numbers were taken on the same data and networks."""
        return self.key.endswith("-paper")

    @property
    def note(self) -> str:
        """What the reader must know beside the title; may be empty."""
        notes = []
        if not self.papers_data and any(row.arm.paper for row in self.rows):
            notes.append(
                "The paper's numbers are of its own data and networks, much larger: compare the "
                "differences between rows, not the numbers."
            )
        if self.missing:
            every = len(self.rows) + len(self.missing)
            notes.append(f"Finished: {len(self.rows)} of {every} arms.")
        return " ".join(notes)

    def panels(self) -> dict[Panel, list[Row]]:
        """The rows by panel, in their order; within a panel those of a method together."""
        panels: dict[Panel, dict[str, list[Row]]] = {}
        for row in self.rows:
            panels.setdefault(row.arm.panel, {}).setdefault(row.arm.series, []).append(row)
        return {panel: [*itertools.chain(*rows.values())] for panel, rows in panels.items()}


# ------------------------------------------------------------------------------- reading


def read(paths: Iterable[pathlib.Path]) -> list[Section]:
    """Reads experiments' folders, run directories, and folders of such.

    Raises:
        ConfigError: if a path is not there, or if no run in them is finished.
    """
    paths = list(paths)
    folders: list[pathlib.Path] = []
    runs: list[pathlib.Path] = []
    for path in paths:
        if not path.is_dir():
            raise ConfigError(f"there is no folder {path} to report on")
        _look(path, folders, runs)
    sections = [section for folder in folders if (section := _experiment(folder)).rows]
    order = _keys()
    sections.sort(key=lambda section: order.index(section.key))
    others = _others(runs)
    sections += [others] if others.rows else []
    if not sections:
        raise ConfigError(f"no finished run in {', '.join(map(str, paths))}")
    return sections


def _look(folder: pathlib.Path, folders: list[pathlib.Path], runs: list[pathlib.Path]) -> None:
    name, _, scale = folder.name.rpartition("-")
    if name in experiments.NAMES and scale in SCALES:
        folders.append(folder)
    elif (folder / "config.json").exists():
        runs.append(folder)
    else:
        for child in sorted(folder.iterdir()):
            if child.is_dir():
                _look(child, folders, runs)


def _keys() -> list[str]:
    """Those of all experiments' sections, in order."""
    return [f"{name}-{scale}" for name in experiments.NAMES for scale in SCALES]


def _choice(key: str, root: pathlib.Path = runner.ROOT) -> runner.Choice:
    name, _, scale = key.rpartition("-")
    assert scale in SCALES
    return runner.Choice(experiments.load(name), scale, root=root)


def _experiment(folder: pathlib.Path) -> Section:
    choice = _choice(folder.name, folder.parent)

    def row(arm: Arm) -> Row | None:
        finished = runner.outcomes(choice, arm)
        if not finished:
            return None
        return _row(arm, finished, choice.command(arm, tuple(finished)), choice.directory)

    return _section(folder.name, choice, row)


def _section(key: str, choice: runner.Choice, row: Callable[[Arm], Row | None]) -> Section:
    rows = {arm.label: row(arm) for arm in choice.arms()}
    return Section(
        key,
        f"{choice.experiment.title} ({choice.scale})",
        choice.experiment.doc or "",
        [row for row in rows.values() if row is not None],
        [label for label, row in rows.items() if row is None],
    )


def _completed(sections: list[Section], committed: Mapping[str, Any]) -> list[Section]:
    """The sections, with what `summary` gave before of arms that have no finished run in them."""
    found = {
        _summary_key(section.key, row.arm): row for section in sections for row in section.rows
    }

    def row(key: str, arm: Arm) -> Row | None:
        name = _summary_key(key, arm)
        if name in found:
            return found[name]
        figures = committed.get(name)
        return figures and Row(arm, figures, [], figures["command"], "")

    every = [_section(key, _choice(key), functools.partial(row, key)) for key in _keys()]
    return [section for section in every if section.rows] + [
        section for section in sections if section.key == _OTHERS
    ]


def _row(arm: Arm, finished: dict[int, Outcome], command: str, directory: Any) -> Row:
    figures = runner.summarize(finished)
    figures["visits"] = figures["steps"] * arm.config.k * arm.config.b
    runs = {seed: directory(arm, seed) for seed in finished}
    wrong = [_wrong_labels(run) for run in runs.values()]
    figures |= arm_loop.over_seeds(wrong, ["wrong_labels"])
    curves = [lines for _, lines in finished.values()]
    return Row(arm, figures, curves, command, _command(next(iter(runs.values()))), runs)


def _wrong_labels(run: pathlib.Path) -> dict[str, float]:
    """The share of the given labels that are wrong, %, where the run changed them itself."""
    file = run / "noise.npz"
    if not file.exists():
        return {}
    given, true = noise.load(file)
    wrong = np.any((given != true).reshape(len(given), -1), axis=1)
    return {"wrong_labels": 100 * float(np.mean(wrong))}


def _command(run: pathlib.Path) -> str:
    config = Config.from_json(json.loads((run / "config.json").read_text()))
    words = ["python", "-m", "train", "run", *config.flags(), "--out", str(run)]
    return shlex.join(words)


_OTHERS = "runs"


def _others(runs: list[pathlib.Path]) -> Section:
    """Runs of no experiment; those that differ in the seed alone are one arm."""
    groups: dict[str, list[tuple[pathlib.Path, Config, Outcome]]] = {}
    for run in runs:
        finished = arm_loop.outcome(run)
        if finished is not None:
            config = Config.from_json(json.loads((run / "config.json").read_text()))
            key = dataclasses.replace(config, seed=0).digest()
            if config.network == AUTO:
                config = dataclasses.replace(config, network=Description.read(run).network)
            groups.setdefault(key, []).append((run, config, finished))
    rows = []
    configs = [group[0][1] for group in groups.values()]
    for group in groups.values():
        first, config, _ = group[0]
        panel = Panel(f"{config.dataset}, {config.network}")
        alike = [of for of in configs if _panel_of(of) == _panel_of(config)]
        name = _name(config, alike)
        arm = Arm(label=name, config=config, panel=panel, series=name)
        finished = {of.seed: outcome for _, of, outcome in group}
        folders = {of.seed: run for run, of, _ in group}
        rows.append(_row(arm, finished, _command(first), lambda _, seed, of=folders: of[seed]))
    order = {method: place for place, method in enumerate(plots.STYLES)}
    rows.sort(key=lambda row: order.get(row.arm.config.method, len(order)))
    return Section(_OTHERS, "Other runs", "", rows, [])


def _panel_of(config: Config) -> tuple[str, str]:
    return config.dataset, config.network


def _name(config: Config, among: list[Config]) -> str:
    """The method, and whatever else tells a config from others of the same method."""
    alike = [of for of in among if of.method == config.method]
    differing = [
        f"{field.name.replace('_', ' ')} {getattr(config, field.name)}"
        for field in dataclasses.fields(config)
        if field.name != "seed"
        and any(getattr(of, field.name) != getattr(config, field.name) for of in alike)
    ]
    return ", ".join([config.method, *differing])


# ------------------------------------------------------------------------------- writing


def write(paths: Sequence[pathlib.Path], out: pathlib.Path, docs: pathlib.Path | None) -> int:
    """Writes ``index.html``, ``report.md`` and ``figures/`` to a folder.

    Args:
        paths: as for `read`.
        out: the folder; made if need be.
        docs: where else to write ``summary.json``, ``tables.md`` and the figures, for the
            documentation; data folders are left out of what goes there. Arms in the
            ``summary.json`` of before that have no finished run in the paths stay as they are.

    Returns:
        The number of arms.

    Raises:
        ConfigError: as `read`.
    """
    sections = read(paths)
    (out / "figures").mkdir(parents=True, exist_ok=True)
    inline: dict[str, str] = {}
    for section in sections:
        for name, figure, panel, rows in _figures(section, runs=True):
            for suffix in ("png", "svg"):
                plots.save(figure, out / "figures" / f"{name}.{suffix}")
            inline[name] = plots.inline_svg(figure, name, panel.title, _in_words(rows))
            plt.close(figure)
    (out / "index.html").write_text(_page(sections, inline, out))
    (out / "report.md").write_text(markdown(sections, runs=True))
    if docs is not None:
        _write_docs(sections, docs)
    return sum(len(section.rows) for section in sections)


def redraw(docs: pathlib.Path) -> int:
    """Makes ``tables.md`` and the figures anew from ``summary.json`` alone.

    Returns:
        The number of arms.

    Raises:
        ConfigError: if it is not there.
    """
    file = docs / "summary.json"
    if not file.exists():
        raise ConfigError(f"there is no {file} to draw from")
    sections = _completed([], json.loads(file.read_text()))
    _draw_docs(sections, docs)
    return sum(len(section.rows) for section in sections)


def _write_docs(sections: list[Section], docs: pathlib.Path) -> None:
    file = docs / "summary.json"
    if file.exists():
        sections = _completed(sections, json.loads(file.read_text()))
    _draw_docs(sections, docs)
    write_json(file, summary(sections))


def _draw_docs(sections: list[Section], docs: pathlib.Path) -> None:
    for section in sections:
        for name, figure, *_ in _figures(section, runs=False):
            plots.save(figure, docs / "figures" / f"{name}.png")
            plt.close(figure)
    (docs / "tables.md").write_text(markdown(sections, runs=False))


def _summary_key(section: str, arm: Arm) -> str:
    of = f"{arm.panel.title}, " if section == _OTHERS else ""  # whose labels are not unique
    return f"{section.removesuffix('-laptop')}/{of}{arm.label}"


def summary(sections: list[Section]) -> dict[str, Any]:
    """What is committed of finished runs: "EXPERIMENT/ARM" to its figures and its command.

    The key of an experiment at scale paper begins with EXPERIMENT-paper.
    """
    return {
        _summary_key(section.key, row.arm): {
            **row.figures,
            **({"paper": dict(row.arm.paper)} if row.arm.paper else {}),
            "command": row.command,
        }
        for section in sections
        for row in section.rows
    }


def _figures(section: Section, *, runs: bool) -> Iterable[tuple[str, Figure, Panel, list[Row]]]:
    """Those of the panels, by name; with `runs` also the curves behind them."""
    for number, (panel, rows) in enumerate(section.panels().items(), 1):
        if not _is_drawn(rows, runs):
            continue
        drawn = [{**row.figures, "x": row.arm.x, "paper": row.arm.paper} for row in rows]
        if panel.x is not None and len({row.arm.x for row in rows}) > 1:
            curves: dict[str, list[Any]] = {}
            for row, figures in zip(rows, drawn, strict=True):
                curves.setdefault(row.arm.series, []).append(figures)
            for points in curves.values():
                points.sort(key=lambda point: point["x"])
            figure = plots.draw_points(panel.title, panel.x, panel.log, curves)
        else:
            at = "" if panel.x is None else f"; {panel.x}: {rows[0].arm.x:g}"
            figure = plots.draw_rows(
                f"{panel.title}{at}",
                {row.arm.series: figures for row, figures in zip(rows, drawn, strict=True)},
                {row.arm.series: row.curves if runs else [] for row in rows},
                section.papers_data,
            )
        yield _figure_name(section, number), figure, panel, rows


def _figure_name(section: Section, number: int) -> str:
    return f"{section.key}-{number}"


def _is_drawn(rows: list[Row], runs: bool) -> bool:
    """Whether there is more to see than a table of two lines says."""
    return _can_be_drawn(rows) and (len(rows) > 2 or (runs and any(row.curves for row in rows)))


def _in_words(rows: list[Row]) -> str:
    """What a figure shows, for those who do not see it; of a curve, its ends."""
    said = []
    for series, group in itertools.groupby(rows, key=lambda row: row.arm.series):
        points = sorted(group, key=lambda row: row.arm.x or 0)
        ends = points if len(points) == 1 else [points[0], points[-1]]
        figures = (
            _mean(row, "test_last") + ("" if row.arm.x is None else f" at {row.arm.x:g}")
            for row in ends
        )
        said.append(f"{plots.style(series)[0]} {' to '.join(figures)}")
    return f"Test accuracy after the last epoch, %: {'; '.join(said)}."


def _can_be_drawn(rows: list[Row]) -> bool:
    """Whether there is a test accuracy to draw; a folder may have no test part."""
    return all("test_last_mean" in row.figures for row in rows)


def _with_deviation(row: Row, name: str) -> str:
    """Mean and deviation of a figure; empty where the runs do not have it."""
    if len(row.figures["seeds"]) > 1:
        return arm_loop.with_deviation(row.figures, name)
    return _mean(row, name)


def _mean(row: Row, name: str, form: str = ".1f") -> str:
    mean = row.figures.get(f"{name}_mean")
    return "" if mean is None else f"{mean:{form}}"


def _cells(row: Row, out: pathlib.Path | None) -> dict[str, str]:
    """Heading -> cell."""
    figures, paper = row.figures, row.arm.paper
    gap = ""
    if row.arm.config.noise == "none" and row.arm.after is None and "test_last_mean" in figures:
        gap = f"{figures['train_noisy_mean'] - figures['test_last_mean']:.1f}"
    return {
        "arm": row.arm.label,
        "test, last": _with_deviation(row, "test_last"),
        "paper: test": f"{paper['test']:.1f}" if "test" in paper else "",
        "test, stopped": _with_deviation(row, "stopped"),
        "test, best": _with_deviation(row, "test_best"),
        "at epoch": _mean(row, "best_epoch", ".0f"),
        "wrong labels": _mean(row, "wrong_labels"),
        "train, given": _with_deviation(row, "train_noisy"),
        "paper: train": f"{paper['train']:.1f}" if "train" in paper else "",
        "train, true": _with_deviation(row, "train_clean"),
        "gap": gap,
        "seeds": str(len(figures["seeds"])),
        "steps": f"{figures['steps']:,}",
        "visits": f"{figures['visits']:,}",
        "seconds": _mean(row, "seconds", ".0f"),
        "MB": _mean(row, "memory_mb", ",.0f"),
        "suspects": "" if out is None else _suspects(row, out),
    }


Table = tuple[list[str], list[list[str]]]
"""Headings and cells, in Markdown."""


def _table(rows: list[Row], out: pathlib.Path | None) -> Table:
    """All figures; columns that are empty throughout are left out."""
    cells = [_cells(row, out) for row in rows]
    headings = [name for name in cells[0] if any(row[name] for row in cells)]
    return headings, [[row[name] for name in headings] for row in cells]


_SUMMARY = "Test, last epoch; in bold the best of those on the same labels."
_ALL = "All figures of every arm"
_COMMANDS = "The command of every arm"


def _summary_table(panel: Panel, rows: list[Row]) -> Table | None:
    """A row a series and a column a place along x; None where there is but one place."""
    places = sorted({row.arm.x for row in rows if row.arm.x is not None})
    if len(places) < 2:
        return None
    groups: dict[tuple[float | None, str], list[Row]] = {}  # what can be compared
    for row in rows:
        groups.setdefault((row.arm.x, row.arm.series.partition(", ")[2]), []).append(row)
    best = [
        max(group, key=lambda row: row.figures.get("test_last_mean", 0))
        for group in groups.values()
        if len(group) > 1
    ]
    cells: dict[str, dict[float | None, str]] = {}
    for row in rows:
        text = _with_deviation(row, "test_last")
        bold = any(row is other for other in best)
        cells.setdefault(row.arm.series, {})[row.arm.x] = f"**{text}**" if bold else text
    return (
        [panel.x or "", *(f"{x:g}" for x in places)],
        [[plots.style(name)[0], *(at.get(x, "") for x in places)] for name, at in cells.items()],
    )


_LEGEND = (
    "Accuracy in %, mean ± standard deviation over seeds. Test: clean test labels; the last epoch, "
    "the one that held-out labels choose, the best one. Wrong labels: the share of the given ones, "
    "where the runs changed them. Train: on the given (noisy) and on the true labels. Gap: train "
    "less test, last, where labels are clean. Visits: images seen in training. MB: the most main "
    "memory of the process, what the arms before have left in it included."
)


def markdown(sections: list[Section], *, runs: bool) -> str:
    """Headings, figures (in the folder ``figures``, as `_figures` makes them) and tables."""
    parts = [_LEGEND]
    for section in sections:
        parts += [f"## {section.title}"]
        if section.note:
            parts.append(section.note)
        for number, (panel, rows) in enumerate(section.panels().items(), 1):
            parts.append(f"### {panel.title}")
            if _is_drawn(rows, runs):
                words = f"{panel.title}. {_in_words(rows)}".replace("[", "(").replace("]", ")")
                parts.append(f"![{words}](figures/{_figure_name(section, number)}.png)")
            parts += _of_panel(panel, rows)
    return "\n\n".join(parts) + "\n"


def _of_panel(panel: Panel, rows: list[Row], out: pathlib.Path | None = None) -> Iterable[str]:
    """Tables and commands, in Markdown.

    Args:
        panel: what the rows are shown in.
        rows: the rows.
        out: the folder of a page whose reader has the runs: it gets the command of a run of each
            arm as well, and links to the runs' pages of suspects.
    """
    every, summary = _table(rows, out), _summary_table(panel, rows)
    if summary is None:
        yield _markdown_table(every)
    else:
        yield _SUMMARY
        yield _markdown_table(summary)
        yield from _details(_ALL, _markdown_table(every))
    commands = [row.command for row in rows]
    if out is not None:
        commands += [row.run_command for row in rows if row.run_command]
    text = "\n".join(["```text", *dict.fromkeys(commands), "```"])
    yield from _details(_COMMANDS, text, shown=out is not None)


def _suspects(row: Row, out: pathlib.Path) -> str:
    """Links to the pages of suspects that the runs have, by seed."""
    pages = {seed: run / "suspects.html" for seed, run in row.runs.items()}
    links = {
        seed: urllib.parse.quote(pathlib.Path(os.path.relpath(page, out)).as_posix())
        for seed, page in pages.items()
        if page.exists()
    }
    return " ".join(f"[seed {seed}]({link})" for seed, link in links.items())


def _details(summary: str, content: str, *, shown: bool = False) -> Iterable[str]:
    """Something that unfolds, or folds."""
    yield f"<details{' open' if shown else ''}><summary>{summary}</summary>"
    yield content
    yield "</details>"


def _markdown_table(table: Table) -> str:
    headings, cells = table
    head, *rows = (f"| {' | '.join(line)} |" for line in (headings, *cells))
    return "\n".join([head, f"|---|{'---:|' * (len(headings) - 1)}", *rows])


# ---------------------------------------------------------------------------------- the page

_STYLE = """
:root { color-scheme: light dark; --ink: #1c1c1e; --soft: #6b6b70; --paper: #ffffff;
  --line: #dcdce0; --card: #f6f6f8; }
@media (prefers-color-scheme: dark) { :root { --ink: #ececf0; --soft: #a0a0a8; --paper: #17171a;
  --line: #3a3a40; --card: #212126; } }
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 84rem; padding: 1rem; background: var(--paper);
  color: var(--ink); font: 15px/1.5 system-ui, sans-serif }
h1 { font-size: 1.5rem } h2 { margin-top: 3rem; font-size: 1.25rem }
h3 { font-size: 1rem; margin: 1.5rem 0 .5rem }
nav a { display: inline-block; margin-right: 1rem } a { color: inherit }
figure { margin: 0; padding: .5rem; background: var(--card); border-radius: .5rem;
  max-width: 34rem }
.panel > div { min-width: 0 }
@media (min-width: 64rem) { .panel { display: grid; gap: 0 2rem; align-items: start;
  grid-template-columns: minmax(20rem, 34rem) minmax(0, 1fr) }
  .panel > div:only-child { grid-column: 1 / -1 } }
svg { display: block; width: 100%; height: auto; font-family: system-ui, sans-serif }
.scroll { overflow-x: auto } table { border-collapse: collapse; font-size: .85rem }
th, td { padding: .2rem .45rem; white-space: nowrap;
  border-bottom: 1px solid var(--line); font-variant-numeric: tabular-nums }
th { color: var(--soft); font-weight: 500 } th:first-child, td:first-child { text-align: left;
  position: sticky; left: 0; background: var(--paper) }
pre { white-space: pre-wrap; overflow-wrap: anywhere; padding: .6rem; background: var(--card);
  border-radius: .5rem; font-size: .8rem }
@media (max-width: 30rem) {
  th:first-child, td:first-child { white-space: normal; overflow-wrap: anywhere; min-width: 7rem } }
summary { cursor: pointer; margin: .6rem 0 } .soft { color: var(--soft) }
"""


def _page(sections: list[Section], figures: dict[str, str], out: pathlib.Path) -> str:
    """The same as HTML, a panel's figure beside its tables; `figures` has the ``<svg>`` by name."""
    body = [
        "<h1>Deep Bilevel Learning: runs</h1>",
        f'<p class="soft">{html.escape(_LEGEND)}</p>',
        "<nav>",
        *(f'<a href="#{s.key}">{html.escape(s.title)}</a>' for s in sections),
        "</nav>",
    ]
    for section in sections:
        body.append(f'<section id="{section.key}"><h2>{html.escape(section.title)}</h2>')
        body.append(f"<p>{html.escape(section.note)}</p>" if section.note else "")
        for number, (panel, rows) in enumerate(section.panels().items(), 1):
            svg = figures.get(_figure_name(section, number))
            tables = "\n\n".join(_of_panel(panel, rows, out))
            body += [
                f'<h3>{html.escape(panel.title)}</h3><div class="panel">',
                f"<figure>{svg}</figure>" if svg else "",
                f"<div>{_as_html(tables)}</div>",
                "</div>",
            ]
        if section.about:
            body.append("<details><summary>The paper, and what was done here</summary>")
            body.append(f"<pre>{html.escape(section.about.strip())}</pre></details>")
        body.append("</section>")
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>Deep Bilevel Learning: runs</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(body)
        + "\n</body>\n</html>\n"
    )


def _as_html(text: str) -> str:
    """Markdown as HTML."""
    made = markdown_it.MarkdownIt("commonmark").enable("table")
    # On a telephone a table moves sideways by itself.
    made.add_render_rule("table_open", lambda *_: '<div class="scroll"><table>')
    made.add_render_rule("table_close", lambda *_: "</table></div>")
    return made.render(text)
