import base64
import csv
import dataclasses
import html.parser
import io

import numpy as np
import pytest
from PIL import Image
from sklearn.metrics import roc_auc_score

from tests.train import tiny
from train import __main__ as cli
from train import data, suspects, trainer
from train.config import ConfigError
from train.evidence import Means


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run that does not memorise: 320 digits, a quarter of the labels flipped."""
    directory = tmp_path_factory.mktemp("suspects")
    config = tiny.config(
        train_size=320, hidden=(32,), noise="symmetric", noise_rate=0.25, epochs=12,
        augmentation="standardize", learning_rate=0.05,
    )  # fmt: skip
    trainer.train(config, directory, tiny.options(checkpoint_seconds=60))
    return directory


def made(scores, given, true, suggested=None, **changes):
    """Suspects of images of one grey each, in the order of the scores."""
    scores, given, true = np.asarray(scores, float), np.asarray(given), np.asarray(true)
    images = np.arange(len(given), dtype=np.uint8)[:, None, None, None] * np.ones((1, 4, 6, 1))
    split = data.Split(images.astype(np.uint8), given)
    dataset = data.Dataset(
        "made", split, split, 3, ("<cat>", "dog, big", "cow"), (4, 6, 1), 10, **changes
    )
    problem = trainer.Problem(dataset, true, None, 100 + np.arange(len(given)))
    order = np.argsort(-scores, kind="stable")
    means = Means(scores[order], 2 * scores[order], np.where(np.isnan(scores), np.nan, 0.5)[order])
    suggested = true if suggested is None else np.asarray(suggested)
    return suspects.Suspects(order, suggested[order], means, problem)


def rows(file):
    with open(file, newline="", encoding="utf-8") as lines:
        return list(csv.DictReader(lines))


class Page(html.parser.HTMLParser):
    """The attributes of all elements, and the text of each list item."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.items = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag == "li":
            self.items.append("")

    def handle_data(self, data):
        if self.items:
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
    assert sorted(found.positions) == list(range(320))


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
    files = tuple(f"train/{i}.png" for i in range(200))
    found = made([-1, 2.5, np.nan], [0, 1, 2], [0, 1, 0], [1, 1, 0], train_files=files)
    suspects.write_csv(found, tmp_path / "s.csv")
    assert rows(tmp_path / "s.csv") == [
        {"example": "101", "file": "train/101.png", "given": "dog, big", "suggested": "dog, big",
         "score": "2.5000", "loss": "5.0000", "agreement": "0.5000"},
        {"example": "100", "file": "train/100.png", "given": "<cat>", "suggested": "dog, big",
         "score": "-1.0000", "loss": "-2.0000", "agreement": "0.5000"},
        {"example": "102", "file": "train/102.png", "given": "cow", "suggested": "<cat>",
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
    np.testing.assert_allclose(written, found.means.alignment, atol=1e-4)
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
    assert not any(word in text for word in ("http", "<script", "<link", "url("))
    assert {tag for tag, attrs in page.elements if "src" in attrs or "href" in attrs} == {"img"}


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
    _, problem, *_ = trainer.open_run(run)
    assert max(int(row["example"]) for row in table) > 320
    first = int(table[0]["example"])
    position = suspects.rank(run).positions[0]
    np.testing.assert_array_equal(
        dataset.train.images[first], problem.dataset.train.images[position]
    )
    page = Page((tmp_path / "new" / "suspects.html").read_text())
    assert len(page.items) == 12
    assert f"example {first}" in page.items[0]


def test_a_wrong_choice_is_exit_code_2(run, tmp_path, capsys):
    assert cli.main(["suspects", str(run), "--count", "0"]) == 2
    assert "--count must be at least 1, got 0" in capsys.readouterr().err
    assert cli.main(["suspects", str(tmp_path)]) == 2
    assert "holds no run" in capsys.readouterr().err


def test_several_labels_are_refused_by_name(run, monkeypatch):
    config, problem, program, state = trainer.open_run(run)
    config = dataclasses.replace(config, dataset="voc/2007", noise="none")
    opened = config, problem, program, state._replace(evidence=None)
    monkeypatch.setattr(trainer, "open_run", lambda directory: opened)
    with pytest.raises(ConfigError, match="voc/2007 has several labels per example"):
        suspects.rank(run)
