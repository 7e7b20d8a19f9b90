import collections
import csv
import os
import pathlib
import re

import numpy as np
import pytest
from PIL import Image

from train import __main__ as cli
from train import export, predict
from train.config import ConfigError

CLASSES = ("upper left", "upper right", "lower left", "lower right")


def brightest(*, channels=1, size=2, **changes):
    """A network that names the brightest quarter of a picture; logits are 10 times the mean."""
    kernel = np.zeros((size, size, channels, 4), np.float32)
    half = size // 2
    for quarter in range(4):
        top, left = half * (quarter // 2), half * (quarter % 2)
        kernel[top : top + half, left : left + half, :, quarter] = 10 / (half * half * channels)
    shape = (size, size, channels)
    fields = {
        "network": "mlp", "options": {"hidden": []}, "class_names": CLASSES,
        "image_shape": shape, "input_shape": shape, "fit": "crop", "ranges": {}, "preset": "none",
        "multi_label": False, "trained": {},
        "arrays": {"head.kernel": kernel.reshape(-1, 4), "head.bias": np.zeros(4, np.float32)},
    }  # fmt: skip
    return export.Model(**{**fields, **changes})


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty working directory, but for an export in ``model``."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "250")
    export.save(brightest(), tmp_path / "model")
    return tmp_path


def quarters(*values, scale=1):
    """A grey picture of 2×2 quarters."""
    array = np.array(values, np.uint8).reshape(2, 2)
    return Image.fromarray(np.kron(array, np.ones((scale, scale), np.uint8)))


def call(capsys, *args):
    """Exit code and output of ``python -m train predict``."""
    try:
        code = cli.main(["predict", *map(str, args)])
    except SystemExit as stopped:
        code = stopped.code
    captured = capsys.readouterr()
    return code, captured.out + captured.err


def rows(file="predictions.csv"):
    with open(file, newline="", encoding="utf-8") as lines:
        return list(csv.reader(lines))


def test_one_picture(here, capsys):
    quarters(0, 255, 51, 0).save("a.png")
    code, shown = call(capsys, "model", "a.png")
    assert code == 0
    scores = np.exp([0, 10, 2, 0]) / np.exp([0, 10, 2, 0]).sum()
    assert rows() == [
        ["file", "label", "confidence"],
        ["a.png", "upper right", f"{scores[1]:.4f}"],
    ]
    assert "a.png: upper right (100.0%)" in shown
    assert "1 picture: 1 upper right" in shown


def test_top_names_the_next_ones(here, capsys):
    quarters(0, 51, 40, 26).save("a.png")
    assert call(capsys, "model", "a.png", "--top", 3, "--out", "out/deep/p.csv")[0] == 0
    header, row = rows("out/deep/p.csv")
    assert header == [
        "file",
        "label",
        "confidence",
        "label_2",
        "confidence_2",
        "label_3",
        "confidence_3",
    ]
    assert row[1::2] == ["upper right", "lower left", "lower right"]
    scores = np.exp(np.array([0, 51, 40, 26]) / 25.5)
    np.testing.assert_allclose([float(x) for x in row[2::2]], scores[1:] / scores.sum(), atol=6e-5)


@pytest.mark.parametrize("top", [0, 5])
def test_top_out_of_range(here, capsys, top):
    quarters(1, 0, 0, 0).save("a.png")
    code, shown = call(capsys, "model", "a.png", "--top", top)
    assert code == 2
    assert shown == f"error: top must be from 1 to the number of classes, 4, got {top}\n"
    assert not os.path.exists("predictions.csv")


def test_folders_at_any_depth_in_the_order_of_names(here, capsys):
    os.makedirs("new/b/deeper")
    os.makedirs("new/.git")
    quarters(255, 0, 0, 0).save("new/z.PNG")
    quarters(0, 255, 0, 0).save("new/b/deeper/ä.jpg", quality=100)
    quarters(0, 0, 255, 0).save("new/b/x.bmp")
    quarters(1, 0, 0, 0).save("new/.git/no.png")
    (here / "new" / "notes.txt").write_text("not a picture")
    quarters(0, 0, 0, 255).save("single.webp", lossless=True)
    code, shown = call(capsys, "model", "single.webp", "new")
    assert code == 0
    assert [row[:2] for row in rows()[1:]] == [
        ["single.webp", "lower right"],
        ["new/b/deeper/ä.jpg", "upper right"],
        ["new/b/x.bmp", "lower left"],
        ["new/z.PNG", "upper left"],
    ]
    assert "skipped, not a picture: new/notes.txt" in shown
    assert "skipped, hidden or system: new/.git/" in shown
    assert "4 pictures: 1 " in shown


def test_pictures_are_read_as_in_training(here):
    read = predict.Predictor(brightest()).read
    expected = np.array([0, 255, 100, 0], np.uint8).reshape(2, 2, 1)
    plain = quarters(0, 255, 100, 0)
    # Of another size: the shorter side is scaled, the centre kept.
    wide = Image.new("L", (18, 8), 77)
    wide.paste(quarters(0, 255, 100, 0, scale=4), (5, 0))
    assert (read(saved(wide, "wide.png"))[..., 0].argsort(axis=None)[-2:] == [2, 1]).all()
    # In colours for a grey network; lying on its side.
    np.testing.assert_array_equal(read(saved(plain.convert("RGB"), "rgb.png")), expected)
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90° to the right to see it upright
    lying = plain.transpose(Image.Transpose.ROTATE_90)
    np.testing.assert_array_equal(read(saved(lying, "lying.png", exif=exif)), expected)
    # A quarter that is transparent is white.
    rgba = plain.convert("LA")
    rgba.putalpha(quarters(255, 255, 255, 0))
    white = expected.copy()
    white[1, 1] = 255
    np.testing.assert_array_equal(read(saved(rgba, "alpha.png")), white)


def saved(image, name, **options):

    image.save(name, **options)
    return pathlib.Path(name)


def test_16_bits_have_the_range_of_the_training_data(here):
    deep = Image.fromarray(np.array([[0, 1000], [500, 0]], np.uint16))
    file = saved(deep, "deep.png")
    model = brightest(ranges={"16-bit grey": (0.0, 2000.0)})
    assert predict.Predictor(model).read(file)[..., 0].tolist() == [[0, 128], [64, 0]]


def test_a_grey_picture_for_a_network_of_colours(here):
    export.save(brightest(channels=3, size=4), here / "colours")
    quarters(0, 0, 9, 0).save("a.png")
    predictor = predict.Predictor(export.load_model(here / "colours"))
    pictures, _ = predict.find([here / "a.png"])
    assert predict.write(predictor, pictures, here / "p.csv").labels == {"lower left": 1}


def test_several_labels_have_chances_of_their_own(here):
    model = brightest(multi_label=True)
    quarters(255, 255, 0, 0).save("a.png")
    pictures, _ = predict.find([here / "a.png"])
    predict.write(predict.Predictor(model), pictures, here / "p.csv", top=4)
    confidences = [float(x) for x in rows("p.csv")[1][2::2]]
    np.testing.assert_allclose(confidences, [1, 1, 0.5, 0.5], atol=1e-3)


def bad_pictures():
    """A good picture and two bad ones."""
    quarters(0, 255, 0, 0).save("a.png")
    open("b.png", "wb").close()
    with open("a.png", "rb") as whole, open("c.png", "wb") as cut:
        cut.write(whole.read()[:-30])
    quarters(255, 0, 0, 0).save("d.png")
    return ["a.png", "b.png", "c.png", "d.png"]


def test_bad_pictures_are_an_error_that_lists_them(here, capsys):
    (here / "predictions.csv").write_text("file,label,confidence\nold,cat,1\n")
    code, shown = call(capsys, "model", *bad_pictures())
    assert code == 2
    assert shown.startswith(
        "error: 2 pictures of 4 cannot be read; --bad-files skip goes on without:\n"
    )
    assert re.search(r"b\.png: .+\n.*c\.png: .+\n", shown)
    # What was there before is left as it was, and nothing half written stays.
    assert rows()[1] == ["old", "cat", "1"]
    assert not list(here.glob("*.new"))


def test_bad_pictures_have_a_line_without_a_label(here, capsys):
    code, shown = call(capsys, "model", *bad_pictures(), "--bad-files", "skip")
    assert code == 0
    assert [row[:2] for row in rows()[1:]] == [
        ["a.png", "upper right"], ["b.png", ""], ["c.png", ""], ["d.png", "upper left"],
    ]  # fmt: skip
    assert rows()[2] == ["b.png", "", ""]
    assert "cannot be read: b.png: " in shown
    assert "4 pictures: 1 upper right, 1 upper left" in shown


def test_many_pictures_in_batches(here, monkeypatch):
    monkeypatch.setattr(predict, "_BATCH", 8)
    draw = np.random.default_rng(0)
    os.mkdir("many")
    expected = []
    for i in range(27):
        quarter = draw.integers(4)
        expected.append([f"many/{i:02}.png", CLASSES[quarter]])
        quarters(*(200 * (np.arange(4) == quarter))).save(f"many/{i:02}.png")
    pictures, _ = predict.find([pathlib.Path("many")])
    calls = []
    predicted = predict.write(
        predict.Predictor(brightest()), pictures, here / "p.csv", on_picture=lambda: calls.append(1)
    )
    assert [row[:2] for row in rows("p.csv")[1:]] == expected
    assert len(calls) == predicted.count == 27
    assert predicted.labels == collections.Counter(label for _, label in expected)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["model"], "pictures"),
        (["model", "gone.png"], "gone.png does not exist: give pictures, or folders"),
        (["model", "empty"], "empty holds no pictures"),
        (["empty", "a.png"], "empty is neither a run directory nor an export"),
        (["model", "a.png", "--out", "empty"], "empty is a folder: give --out a file"),
        (["model", "a.png", "--out", "a.png"], "a.png exists and holds no predictions"),
        (["model", "a.png", "--out", "a.png/p.csv"], "cannot write to a.png/p.csv"),
        (["model", "a.png", "--out", "/proc/new/p.csv"], "give --out a place that can be written"),
    ],
)  # fmt: skip
def test_a_wrong_choice_is_one_line(here, capsys, args, message):
    os.mkdir("empty")
    quarters(255, 0, 0, 0).save("a.png")
    before = (here / "a.png").read_bytes()
    code, shown = call(capsys, *args)
    assert code == 2
    assert message in shown
    if args != ["model"]:
        assert shown.startswith("error: ")
        assert shown.count("\n") == 1
    assert (here / "a.png").read_bytes() == before


def test_earlier_predictions_are_replaced(here, capsys):
    quarters(255, 0, 0, 0).save("a.png")
    quarters(0, 255, 0, 0).save("b.png")
    for picture in ("a.png", "b.png"):
        assert call(capsys, "model", picture)[0] == 0
    assert [row[0] for row in rows()] == ["file", "b.png"]


def test_no_place_is_a_choice_too():
    with pytest.raises(ConfigError, match="no pictures given"):
        predict.find([])
