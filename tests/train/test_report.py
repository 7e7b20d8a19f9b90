"""The report of tiny runs."""

import dataclasses
import html
import json
import re
import shlex
import shutil

import numpy as np
import pytest
from matplotlib.image import imread

from tests.train import tiny
from tests.train.known import some
from tests.train.test_config import others
from train import __main__ as cli
from train import experiments, noise, report, trainer
from train.config import Config
from train.experiments.common import Arm, Experiment, Panel, compare
from train.run_directory import read_metrics

METHODS = ("uniform", "bilevel")


def arms_of(scale):
    base = tiny.config(epochs=2, noise="none")
    along = Panel("digits by k", "k", log=True)
    return [
        *compare(
            base, METHODS, Panel("digits, 50% wrong labels"), "noisy-",
            paper={"bilevel": {"test": 47.62, "train": 89.28}},
        ),
        *(
            Arm(
                f"k{k}", dataclasses.replace(base, epochs=1, k=k, b=32 // k, method="uniform"),
                along, "uniform, clean labels", k,
            )
            for k in (2, 4)
        ),
        Arm(
            "k4-noisy", tiny.config(epochs=1, k=4, b=8, noise_rate=0.4, method="bilevel"), along,
            "bilevel, 40% wrong labels", 4,
        ),
        Arm("never", base, along, "uniform, clean labels", 8),
    ]  # fmt: skip


EXPERIMENT = Experiment("table1", "Table 1: ablations", "About <it>.", arms_of)


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """Runs of an experiment and one of none, and the folders that the report wrote."""
    root = tmp_path_factory.mktemp("report")
    runs = root / "runs" / "table1-laptop"
    for arm in arms_of("laptop")[:-1]:
        for seed in (0, 1) if arm.label.startswith("noisy") else (0,):
            config = tiny.config(**{**vars(arm.config), "seed": seed})
            trainer.train(config, runs / f"{arm.label}-s{seed}", tiny.options())
    single = tiny.config(epochs=1, mu=0.5, method="uniform", network="auto")
    trainer.train(single, root / "runs" / "single", tiny.options())
    assert cli.main(["suspects", str(root / "runs" / "single")]) == 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(experiments, "load", lambda name: EXPERIMENT)
        command = ["report", str(root / "runs"), "--out", str(root / "out"), "--docs"]
        assert cli.main([*command, str(root / "docs")]) == 0
    return root


@pytest.mark.slow
def test_the_page_needs_nothing_else(done):
    page = (done / "out" / "index.html").read_text()
    without_namespaces = re.sub(r'xmlns(:\w+)?="[^"]*"', "", page)
    assert "http" not in without_namespaces
    links = re.findall(r'(?:src|href)="(?!#)([^"]*)', page)
    assert links == ["../runs/single/suspects.html"]
    assert not re.search(r"url\((?!#)", page)
    assert "<script" not in page
    assert 'name="viewport"' in page
    assert "prefers-color-scheme: dark" in page
    ids = re.findall(r'\bid="([^"]*)"', page)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r"url\(#([^)]*)\)", page)) <= set(ids)


@pytest.mark.slow
def test_the_page_has_the_command_of_every_arm(done):
    page = html.unescape((done / "out" / "index.html").read_text())
    markdown = (done / "out" / "report.md").read_text().splitlines()
    for label in ("noisy-uniform", "noisy-bilevel", "k2", "k4", "k4-noisy"):
        seeds = "0 1" if label.startswith("noisy") else "0"
        command = f"python -m train experiment table1 --scale laptop --only {label} --seeds {seeds}"
        assert f"\n{command}\n" in page or f'">{command}\n' in page
        assert command in markdown
        assert f"--out {done / 'runs' / 'table1-laptop' / label}-s0" in page
    assert re.search(rf"--mu 0\.5 .*--out {re.escape(str(done / 'runs' / 'single'))}", page)
    assert "About <it>." in page


@pytest.mark.slow
def test_the_figures_are_drawn(done):
    names = [f"{name}-{i}" for name, count in (("table1-laptop", 2), ("runs", 1)) for i in
             range(1, count + 1)]  # fmt: skip
    figures = done / "out" / "figures"
    assert {file.name for file in figures.iterdir()} == {
        f"{name}.{suffix}" for name in names for suffix in ("png", "svg")
    }
    for name in names:
        pixels = imread(figures / f"{name}.png")[..., :3]
        assert 0.01 < (pixels.min(axis=-1) < 0.9).mean() < 0.5
    page = (done / "out" / "index.html").read_text()
    assert page.count("<svg") == page.count("<title id=") == page.count("<desc id=") == len(names)
    assert "Test accuracy after the last epoch, %: uniform control" in page
    # Those of two lines or fewer say no more than their tables.
    assert {file.stem for file in (done / "docs" / "figures").iterdir()} == {"table1-laptop-2"}


def rows(markdown, first="arm"):
    """The rows of all tables whose first heading is `first`, by their first cell."""
    table, heads = {}, None
    for line in markdown.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if not line.startswith("|"):
            heads = None
        elif heads is None:
            heads = cells
        elif heads[0] == first and not line.startswith("|-"):
            table[cells[0]] = dict(zip(heads, cells, strict=True))
    return table


@pytest.mark.slow
def test_the_table_has_the_figures_of_the_runs(done):
    markdown = (done / "out" / "report.md").read_text()
    table = rows(markdown)
    assert set(table) == {"noisy-uniform", "noisy-bilevel", "k2", "k4", "k4-noisy", "uniform"}
    row = table["noisy-bilevel"]
    lines = [read_metrics(done / "runs/table1-laptop" / f"noisy-bilevel-s{s}") for s in (0, 1)]
    last = [run[-1]["test"] for run in lines]
    assert row["test, last"] == f"{np.mean(last):.1f} ± {np.std(last, ddof=1):.1f}"
    best = [max(line["test"] for line in run) for run in lines]
    assert row["test, best"] == f"{np.mean(best):.1f} ± {np.std(best, ddof=1):.1f}"
    assert (row["paper: test"], row["paper: train"]) == ("47.6", "89.3")
    assert (row["steps"], row["visits"], row["seeds"]) == ("8", "256", "2")
    assert int(row["MB"].replace(",", "")) > 100
    gap = float(row["train, given"].split()[0]) - float(row["test, last"].split()[0])
    assert float(row["gap"]) == pytest.approx(gap, abs=0.11)
    assert "±" not in table["uniform"]["test, last"]
    assert "Finished: 5 of 6 arms." in markdown
    assert "of its own data and networks" in markdown
    assert "| arm | test, last | test, best |" in markdown  # without empty columns
    assert table["k4-noisy"]["train, true"]
    assert not table["k4"].get("train, true")  # nobody has looked which labels are right


@pytest.mark.slow
def test_the_table_has_the_share_of_labels_that_are_wrong(done):
    table = rows((done / "out" / "report.md").read_text())
    given, true = noise.load(done / "runs/table1-laptop/k4-noisy-s0/noise.npz")
    assert table["k4-noisy"]["wrong labels"] == f"{100 * np.mean(given != true):.1f}"
    assert 35 < float(table["k4-noisy"]["wrong labels"]) <= 40
    assert table["k4"]["wrong labels"] == ""
    assert "wrong labels" not in table["noisy-bilevel"]  # a table of clean labels alone


@pytest.mark.slow
def test_a_panel_with_an_axis_has_a_table_of_series_along_it(done):
    markdown, page = ((done / "out" / name).read_text() for name in ("report.md", "index.html"))
    table, every = rows(markdown, "k"), rows(markdown)
    assert table == {
        "uniform control; clean labels": {
            "k": "uniform control; clean labels",
            "2": every["k2"]["test, last"],
            "4": every["k4"]["test, last"],
        },
        "bilevel, eq. (10); 40% wrong labels": {
            "k": "bilevel, eq. (10); 40% wrong labels",
            "2": "",
            "4": every["k4-noisy"]["test, last"],
        },
    }
    for cell in (every["k2"]["test, last"], every["k4-noisy"]["test, last"]):
        assert f'<td style="text-align:right">{cell}</td>' in page


def test_the_best_of_what_can_be_compared_is_bold():
    def row(series, x, mean):
        arm = Arm("", Config(), Panel("", "x"), series, x)
        figures = {"seeds": [0, 1], "test_last_mean": mean, "test_last_std": 0.5}
        return report.Row(arm, figures, [], "", "")

    rows = [
        row("sgd, clean labels", 1, 90.0), row("uniform, clean labels", 1, 91.0),
        row("sgd, 50% wrong labels", 1, 70.0), row("uniform, 50% wrong labels", 1, 60.0),
        row("sgd, clean labels", 2, 80.0),
    ]  # fmt: skip
    headings, cells = some(report._summary_table(Panel("", "x"), rows))
    assert headings == ["x", "1", "2"]
    assert cells == [
        ["SGD, whole batch; clean labels", "90.0 ± 0.5", "80.0 ± 0.5"],
        ["uniform control; clean labels", "**91.0 ± 0.5**", ""],
        ["SGD, whole batch; 50% wrong labels", "**70.0 ± 0.5**", ""],
        ["uniform control; 50% wrong labels", "60.0 ± 0.5", ""],
    ]
    page = report._as_html(report._markdown_table((headings, cells)))
    assert '<td style="text-align:right"><strong>91.0 ± 0.5</strong></td>' in page
    assert report._summary_table(Panel("", "x"), rows[:4]) is None


@pytest.mark.slow
def test_what_goes_into_the_documentation(done):
    summary = json.loads((done / "docs" / "summary.json").read_text())
    assert list(summary) == [
        "table1/noisy-uniform", "table1/noisy-bilevel", "table1/k2", "table1/k4",
        "table1/k4-noisy", "runs/digits, mlp, uniform",
    ]  # fmt: skip
    row = summary["table1/noisy-bilevel"]
    assert {"test_last_mean", "test_last_std", "test_best_mean", "seeds", "command"} <= set(row)
    assert row["seeds"] == [0, 1]
    assert row["paper"] == {"test": 47.62, "train": 89.28}
    tables = (done / "docs" / "tables.md").read_text()
    for link in re.findall(r"!\[[^]]*\]\(([^)]*)\)", tables):
        assert (done / "docs" / link).exists()


@pytest.mark.slow
def test_tables_and_figures_are_made_again_from_the_summary_alone(done, tmp_path, monkeypatch):
    monkeypatch.setattr(experiments, "load", lambda name: EXPERIMENT)
    docs = tmp_path / "docs"
    docs.mkdir()
    shutil.copy(done / "docs" / "summary.json", docs)
    assert cli.main(["report", "--redraw", "--docs", str(docs)]) == 0
    figure = "figures/table1-laptop-2.png"
    assert (docs / figure).read_bytes() == (done / "docs" / figure).read_bytes()
    again, before = (rows((at / "tables.md").read_text()) for at in (docs, done / "docs"))
    del before["uniform"]  # of no experiment
    assert again == before
    assert cli.main(["report", "--redraw", "--docs", str(tmp_path)]) == 2


@pytest.mark.slow
def test_arms_whose_runs_are_elsewhere_stay_in_the_documentation(done, tmp_path, monkeypatch):
    monkeypatch.setattr(experiments, "load", lambda name: EXPERIMENT)
    docs, arm = tmp_path / "docs", "table1-laptop/noisy-bilevel-s0"
    shutil.copytree(done / "docs", docs)
    shutil.copytree(done / "runs" / arm, tmp_path / "runs" / arm)
    figure = docs / "figures" / "table1-laptop-2.png"  # of the other arms
    kept = figure.read_bytes()
    report.write([tmp_path / "runs"], tmp_path / "out", docs)
    old, new = (json.loads((at / "summary.json").read_text()) for at in (done / "docs", docs))
    del old["runs/digits, mlp, uniform"]  # of no experiment: nothing says where it belongs
    assert list(new) == list(old)
    assert {key for key in new if new[key] != old[key]} == {"table1/noisy-bilevel"}
    assert new["table1/noisy-bilevel"]["seeds"] == [0]
    tables = [rows((at / "tables.md").read_text()) for at in (done / "docs", docs)]
    assert tables[0].pop("uniform")
    assert {arm for arm in tables[1] if tables[1][arm] != tables[0][arm]} == {"noisy-bilevel"}
    assert figure.read_bytes() == kept
    page = (tmp_path / "out" / "index.html").read_text()
    assert "noisy-bilevel" in page
    assert "noisy-uniform" not in page


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: None, "there is no folder"),
        (lambda folder: folder.mkdir(), "no finished run in"),
    ],
)
def test_nothing_to_report_is_exit_code_2(tmp_path, capsys, make, message):
    make(tmp_path / "runs")
    out = tmp_path / "out"
    assert cli.main(["report", str(tmp_path / "runs"), "--out", str(out)]) == 2
    assert message in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize(
    "name", ["hidden", "normalize", "train_size", "clean_validation", "validation_ratio", "dtype"]
)
def test_the_flags_of_a_config_make_it_again(name, monkeypatch):
    config = others()[name]
    asked = []
    monkeypatch.setattr(trainer, "load_problem", lambda config: asked.append(config) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        cli.main(["run", "--out", "never", *config.flags()])
    assert asked == [config]


@pytest.mark.slow
def test_a_command_can_be_pasted_into_a_shell(tmp_path):
    run = tmp_path / "with a blank"
    config = tiny.config(epochs=1, hidden=(8, 8))
    trainer.train(config, run, tiny.options())
    (section,) = report.read([tmp_path])
    words = shlex.split(section.rows[0].command)
    assert words[:4] == ["python", "-m", "train", "run"]
    assert words[4:] == [*config.flags(), "--out", str(run)]
    assert Config.from_json(json.loads((run / "config.json").read_text())) == config
