import base64
import csv
import dataclasses
import html.parser
import io
import pathlib
import re
import shutil
import warnings

import numpy as np
import pytest
from PIL import Image
from sklearn.metrics import roc_auc_score

from tests.train import tiny
from tests.train.known import in_memory, some
from train import __main__ as cli
from train import data, saved, suspects, trainer
from train import problem as problem_module
from train.config import Config, ConfigError
from train.description import Description
from train.evidence import Means
from train.run_directory import RunDirectoryError, read_metrics


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run that does not memorise: 320 digits, a quarter of the labels flipped."""
    directory = tmp_path_factory.mktemp("suspects")
    config = tiny.config(
        train_size=320, hidden=(32,), noise="symmetric", noise_rate=0.25, epochs=12,
        augmentation="standardize", learning_rate=0.05, held_out=0.1,
    )  # fmt: skip
    trainer.train(config, directory, tiny.options(checkpoint_seconds=60))
    return directory


CLASSES = ("<cat>", "dog, big", "cow")


def made(scores, given, true, suggested=None, files=False):
    """Suspects of images of one grey each, in the order of the scores."""
    scores, given, true = np.asarray(scores, float), np.asarray(given), np.asarray(true)
    images = np.arange(len(given), dtype=np.uint8)[:, None, None, None] * np.ones((1, 4, 6, 1))
    split = data.Split(images.astype(np.uint8), given)
    names = tuple(f"train/{i}.png" if files else str(i) for i in 100 + np.arange(len(given)))
    about = Description(
        dataset="made", class_names=CLASSES, image_shape=(4, 6, 1), max_value=10,
        multi_label=False, network="mlp", steps_per_epoch=1, train=names, held_out=(),
        labels=tuple(given), own_labels=tuple(true), counts={}, fit="crop", ranges={},
        has_files=files, fingerprint=None,
    )  # fmt: skip
    order = np.argsort(-scores, kind="stable")
    means = Means(scores[order], 2 * scores[order], np.where(np.isnan(scores), np.nan, 0.5)[order])
    suggested = true if suggested is None else np.asarray(suggested)
    return suspects.Suspects(
        names=tuple(names[i] for i in order), given=given[order], suggested=suggested[order],
        true=true[order], held_out=np.zeros(len(order), bool), means=means,
        pictures=split.take(order), description=about,
    )  # fmt: skip


def rows(file):
    with open(file, newline="", encoding="utf-8") as lines:
        return list(csv.DictReader(lines))


class Page(html.parser.HTMLParser):
    """The attributes of all elements, and the text of each list item."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.items, self.ended = [], [], False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag == "li":
            self.items.append("")

    def handle_endtag(self, tag):
        self.ended |= tag == "ol"

    def handle_data(self, data):
        if self.items and not self.ended:
            self.items[-1] += data + " "


def test_flipped_labels_of_a_run_come_first(run):
    found = suspects.rank(run)
    wrong = found.given != found.true
    assert wrong.sum() == 77  # a quarter, rounded down in each class
    assert np.all(np.diff(found.means.score) <= 0)
    assert roc_auc_score(wrong, found.means.score) > 0.93
    figures = suspects.measure(found)
    assert figures["auc"] == pytest.approx(100 * roc_auc_score(wrong, found.means.score))
    assert figures["precision"] > 80
    assert figures["suggested"] > 60
    assert sorted(found.names) == sorted(trainer.open_run(run).description.names)
    assert 0 < found.held_out.sum() < 40
    assert roc_auc_score(wrong[found.held_out], found.means.score[found.held_out]) > 0.85


def test_measures_of_a_ranking():
    found = made(
        scores=[3, 2, 1, 0.5, -1, -2], given=[0, 0, 0, 1, 1, 1], true=[1, 0, 2, 1, 0, 1],
        suggested=[1, 1, 1, 1, 0, 0],
    )  # fmt: skip
    # wrong: 1st, 3rd and 5th of six; 9 pairs, of which 1st beats 3, 3rd 2, 5th 1
    assert suspects.measure(found) == pytest.approx(
        {"auc": 100 * 6 / 9, "precision": 200 / 3, "recall": 200 / 3, "suggested": 200 / 3}
    )
    with pytest.raises(ValueError, match="right and wrong labels"):
        suspects.measure(made([1, 2], [0, 1], [0, 1]))


def test_the_table_has_a_line_per_example(tmp_path):
    for what, name in (("file", "train/{}.png"), ("example", "{}")):
        found = made([-1, 2.5, np.nan], [0, 1, 2], [0, 1, 0], [1, 1, 0], files=what == "file")
        suspects.write_csv(found, tmp_path / "s.csv")
        assert rows(tmp_path / "s.csv") == [
            {what: name.format(101), "given": "dog, big", "suggested": "dog, big",
             "score": "2.5000", "loss": "5.0000", "agreement": "0.5000"},
            {what: name.format(100), "given": "<cat>", "suggested": "dog, big",
             "score": "-1.0000", "loss": "-2.0000", "agreement": "0.5000"},
            {what: name.format(102), "given": "cow", "suggested": "<cat>",
             "score": "", "loss": "", "agreement": ""},
        ]  # fmt: skip


def test_the_alignment_is_a_column_where_it_was_gathered(tmp_path):
    directory = tmp_path / "run"
    trainer.train(tiny.config(example_alignment=True), directory, tiny.options())
    assert cli.main(["suspects", str(directory)]) == 0
    found = suspects.rank(directory)
    lines = rows(directory / "suspects.csv")
    assert list(lines[0])[-2:] == ["agreement", "alignment"]
    written = [float(line["alignment"] or "nan") for line in lines]
    np.testing.assert_allclose(written, some(found.means.alignment), atol=1e-4)
    assert np.nanmax(written) > np.nanmin(written)


def test_the_page_shows_the_most_suspicious_and_needs_no_other_file(tmp_path):
    found = made([-1, 2.5, 1, np.nan], [0, 1, 2, 0], [0, 1, 0, 0], [0, 0, 2, 1])
    for count, shown in ((2, [1, 2]), (9, [1, 2, 0])):  # what was never seen is not shown
        file = tmp_path / "page.html"
        suspects.write_page(found, file, count, "digits & more")
        text = file.read_text()
        page = Page(text)
        images = [attrs for tag, attrs in page.elements if tag == "img"]
        pictures = [x["src"].removeprefix("data:image/png;base64,") for x in images]
        decoded = [np.asarray(Image.open(io.BytesIO(base64.b64decode(x)))) for x in pictures]
        assert [x.shape for x in decoded] == [(4, 6)] * len(shown)
        greys = [round(i * 255 / 10) for i in shown]  # the brightest possible is 10
        assert [int(x[0, 0]) for x in decoded] == greys
        assert page.items[0].split() == [
            "dog,", "big", "→", "<cat>", "example", "101", "score", "2.50",
        ]  # fmt: skip
        assert page.items[1].split() == ["cow", "example", "102", "score", "1.00"]
    assert "<cat>" not in text
    assert "digits &amp; more" in text
    assert "2 have a score above 0" in text
    assert not any(word in text for word in ("http", "<link", "url(", "import"))
    assert 'alt="example 101: labelled dog, big, suggested &lt;cat&gt;"' in text
    assert 'alt="example 102: cow"' in text
    assert {tag for tag, attrs in page.elements if "src" in attrs or "href" in attrs} == {"img"}


def test_what_to_do_next_trains_by_the_list_that_is_downloaded():
    config = Config(noise="symmetric", noise_rate=0.3, train_size=320, k=4)
    again, drop = (command for _, command in suspects.what_next(config, pathlib.Path("runs/a")))
    assert again.startswith("python -m train run ")
    assert again.endswith(" --out runs/a-again")
    assert {"--k 4", "--labels labels.csv"} == set(re.findall(r"--(?!out)\S+ \S+", again))
    assert drop == "python -m train suspects runs/a --apply drop"


def test_the_page_is_headed_by_the_folders_name(tmp_path):
    config = Config(dataset="folder", data_dir=str(tmp_path / "birds" / "." / ""))
    assert suspects.title(config) == "birds: labels that look wrong"
    assert suspects.title(Config(dataset="digits")) == "digits: labels that look wrong"


def test_large_and_coloured_images_become_small_pictures():
    pixels = np.zeros((400, 300, 3), np.uint8)
    pixels[..., 0] = 200
    picture = Image.open(io.BytesIO(base64.b64decode(suspects._png(pixels, 255))))
    assert (picture.mode, picture.size) == ("RGB", (120, 160))
    assert picture.getpixel((60, 80)) == (200, 0, 0)


def test_the_command_writes_both(run, tmp_path, capsys):
    assert cli.main(["suspects", str(run), "--out", str(tmp_path / "new"), "--count", "12"]) == 0
    shown = capsys.readouterr().out
    assert "of 320 labels look wrong" in shown
    assert "auc" in shown
    table = rows(tmp_path / "new" / "suspects.csv")
    assert len(table) == 320
    # The 320 are a choice among 1,200, and go by their numbers there.
    dataset = data.load("digits")
    assert max(int(row["example"]) for row in table) > 320
    first = int(table[0]["example"])
    (picture,) = suspects.rank(run).pictures.read(np.array([0]))
    np.testing.assert_array_equal(in_memory(dataset.train)[first], picture)
    page = Page((tmp_path / "new" / "suspects.html").read_text())
    assert len(page.items) == 12
    assert f"example {first}" in page.items[0]


def test_a_wrong_choice_is_exit_code_2(run, tmp_path, capsys):
    assert cli.main(["suspects", str(run), "--count", "0"]) == 2
    assert "--count must be at least 1, got 0" in capsys.readouterr().err
    assert cli.main(["suspects", str(tmp_path)]) == 2
    assert "holds no run" in capsys.readouterr().err


def test_several_labels_are_refused_by_name(run, monkeypatch):
    opened = trainer.open_run(run)
    config = dataclasses.replace(opened.config, dataset="voc/2007", noise="none")
    opened = dataclasses.replace(opened, config=config, state=opened.state._replace(evidence=None))
    monkeypatch.setattr(saved, "open_run", lambda directory: opened)
    with pytest.raises(ConfigError, match="voc/2007 has several labels per example"):
        suspects.rank(run)


# ----------------------------------------------------------------------- a folder that changes


@pytest.fixture
def folder(tmp_path):
    """Pictures of digits, three classes by the folder, and a run on them; two are misfiled."""
    digits = data.load("digits").train
    pictures = tmp_path / "pictures"
    for label in range(3):
        (pictures / f"{label}").mkdir(parents=True)
        for number in np.flatnonzero(digits.labels == label)[:40]:
            image = Image.fromarray(in_memory(digits)[number, ..., 0] * 15)
            image.save(pictures / f"{label}" / f"{number}.png")
    for name in sorted(file.name for file in (pictures / "0").iterdir())[:2]:
        (pictures / "0" / name).rename(pictures / "1" / f"misfiled-{name}")
    config = Config(
        dataset="folder", data_dir=str(pictures), hidden=(32,), k=4, b=4, epochs=20,
        learning_rate=0.05, augmentation="standardize", method="bilevel",
    )  # fmt: skip
    trainer.train(config, tmp_path / "run", tiny.options(checkpoint_seconds=60))
    return config, pictures, tmp_path / "run"


def test_evidence_stays_with_its_picture_when_others_go(folder, capsys):
    config, pictures, directory = folder
    before = suspects.rank(directory)
    scores = dict(zip(before.names, before.means.score, strict=True))
    assert before.true is None
    worst = {name for name in before.names[:4] if "misfiled" in name}
    assert len(worst) == 2
    # One of the wrong ones is filed rightly, another picture renamed, a third one deleted, and
    # a new one comes first of all.
    wrong, other = sorted(worst)
    moved = pictures / "0" / wrong.split("misfiled-")[1]
    (pictures / wrong).rename(moved)
    renamed, deleted = [name for name in before.names if name.startswith("2/")][:2]
    (pictures / renamed).rename(pictures / "2" / "renamed.png")
    (pictures / deleted).unlink()
    Image.fromarray(np.full((8, 8), 200, np.uint8)).save(pictures / "0" / "0-new.png")
    problem_module.forget()

    after = suspects.rank(directory)
    assert set(after.gone) == {wrong, renamed, deleted}
    assert set(after.names) == set(before.names) - set(after.gone)
    for name, score in zip(after.names, after.means.score, strict=True):
        assert score == pytest.approx(scores[name], nan_ok=True)
    assert other in after.names[:3]
    assert cli.main(["suspects", str(directory)]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "3 pictures are gone: " in shown
    listed = [row["file"] for row in rows(directory / "suspects.csv")]
    assert str(moved.relative_to(pictures)) not in listed
    assert listed == list(after.names)

    # The old result is not that of the new data.
    for _ in range(2):
        with pytest.raises(RunDirectoryError, match=r"run on other data: .*; train on the data"):
            trainer.train(config, directory, tiny.options())
        (directory / "result.json").unlink(missing_ok=True)
    with pytest.warns(UserWarning, match="figures are those that the run noted: the data have ch"):
        assert "test" not in trainer.evaluate_run(directory)


def test_a_run_whose_pictures_are_gone_can_be_opened_and_evaluated(folder, capsys):
    _, pictures, directory = folder
    last = read_metrics(directory)[-1]
    shutil.rmtree(pictures)
    problem_module.forget()
    opened = trainer.open_run(directory)
    assert opened.description.class_names == ("0", "1", "2")
    assert opened.description.image_shape == (8, 8, 1)
    assert sum(opened.description.counts["train"].values()) == len(opened.description.train)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        assert cli.main(["evaluate", str(directory)]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "warning: the figures are those that the run noted: " in shown
    assert f"held_out {last['held_out']:.2f}" in shown
    assert cli.main(["suspects", str(directory)]) == 2
    assert cli.main(["run", "--resume", "--out", str(directory)]) == 2
    assert "Traceback" not in capsys.readouterr().err
