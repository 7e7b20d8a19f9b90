"""Folders of pictures as people have them: layouts, odd files, and the account of them."""

import json
import os
import re
import struct
import unicodedata
import zlib

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from tests.train.known import in_memory, some
from train import data
from train.data import account, fingerprint, folders, pictures


def write(path, value: float | tuple[int, ...] = 100, size=(6, 4), mode="RGB", **options):
    """A picture of one colour; `size` is (width, height)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, value).save(path, **options)


def fill(root, **classes):
    """Pictures 0.png, 1.png, ... of each class, each with a value of its own."""
    value = 0
    for name, count in classes.items():
        for i in range(count):
            value += 10
            write(root / name / f"{i}.png", (value, 0, 255))


def parted(root):
    fill(root / "train", cat=3, ant=2)
    fill(root / "test", cat=1, ant=1)


def counts(dataset):
    """Of every line of the account: read, then what was converted and skipped."""
    return {
        (line.part, line.label): (line.read, line.converted, line.skipped)
        for line in dataset.account.lines
    }


def load(folder, **options):
    return data.load("folder", folder, **options)


# Layouts


def test_train_and_test(tmp_path):
    parted(tmp_path)
    loaded = load(tmp_path)
    assert loaded.class_names == ("ant", "cat")
    assert loaded.image_shape == (4, 6, 3)
    np.testing.assert_array_equal(loaded.train.labels, [0, 0, 1, 1, 1])
    np.testing.assert_array_equal(loaded.test.labels, [0, 1])
    assert loaded.train.labels.dtype == np.int32
    np.testing.assert_array_equal(in_memory(loaded.train)[:, 3, 5, 0], [40, 50, 10, 20, 30])
    assert loaded.train_files == tuple(
        f"train/{name}"
        for name in ("ant/0.png", "ant/1.png", "cat/0.png", "cat/1.png", "cat/2.png")
    )
    assert loaded.train_names == loaded.train_files
    assert loaded.test_files == ("test/ant/0.png", "test/cat/0.png")
    assert counts(loaded) == {
        ("train", "ant"): (2, {}, {}),
        ("train", "cat"): (3, {}, {}),
        ("test", "ant"): (1, {}, {}),
        ("test", "cat"): (1, {}, {}),
    }
    assert some(loaded.account).examples("train") == {"ant": 2, "cat": 3}
    assert some(loaded.account).notes == ["size: 4 x 6 (height x width), as the files have it"]


def test_classes_without_train_and_test(tmp_path):
    fill(tmp_path, cat=3, ant=2)
    loaded = load(tmp_path)
    assert (len(loaded.train), len(loaded.test)) == (5, 0)
    assert in_memory(loaded.test).shape == (0, 4, 6, 3)
    assert loaded.test.labels.dtype == np.int32
    assert loaded.test_files == ()
    assert some(loaded.account).notes[-1] == "test part: none, every picture is for training"
    assert some(loaded.account).examples("test") == {"ant": 0, "cat": 0}


def test_train_alone(tmp_path):
    fill(tmp_path / "train", cat=3, ant=2)
    loaded = load(tmp_path)
    assert (len(loaded.train), len(loaded.test), loaded.class_names) == (5, 0, ("ant", "cat"))


@pytest.mark.parametrize(
    ("train", "test"), [("Train", "Test"), ("training", "testing"), ("TRAIN", "val")]
)
def test_other_names_of_the_parts(tmp_path, train, test):
    fill(tmp_path / train, cat=3, ant=2)
    fill(tmp_path / test, cat=1, ant=1)
    loaded = load(tmp_path)
    assert (len(loaded.train), len(loaded.test)) == (5, 2)
    assert ("test part: val" in some(loaded.account).notes) == (test == "val")


def test_a_validation_part_beside_a_test_part_is_counted(tmp_path):
    parted(tmp_path)
    fill(tmp_path / "valid", cat=2)
    (tmp_path / "README.md").write_text("about")
    loaded = load(tmp_path)
    assert len(loaded.test) == 2
    assert counts(loaded)["", ""] == (0, {}, {"outside train and test": 2, "not a picture": 1})


def test_a_class_called_train(tmp_path):
    fill(tmp_path, bus=2, train=1)
    assert some(load(tmp_path).account).examples("train") == {"bus": 2, "train": 1}


@pytest.mark.parametrize("beside", [{}, {"cat": 2, "dog": 2}])
def test_a_test_part_without_train(tmp_path, beside):
    fill(tmp_path / "test", cat=1, dog=1)
    fill(tmp_path, **beside)
    with pytest.raises(ValueError, match="has test, but no train beside it"):
        load(tmp_path)


def test_two_training_parts(tmp_path):
    parted(tmp_path)
    fill(tmp_path / "training", cat=1, ant=1)
    with pytest.raises(ValueError, match="has both train and training: keep one"):
        load(tmp_path)


def test_nested_folders_and_suffixes(tmp_path):
    write(tmp_path / "cat" / "a" / "b" / "1.PNG")
    write(tmp_path / "cat" / "a" / "2.Jpeg")
    write(tmp_path / "cat" / "3.webp")
    write(tmp_path / "dog" / "1.TIF")
    write(tmp_path / "dog" / "deep" / "2.tiff")
    write(tmp_path / "dog" / "3.gif", mode="P")
    write(tmp_path / "dog" / "4.bmp")
    write(tmp_path / "dog" / "5.ppm")
    write(tmp_path / "dog" / "6", format="PNG")  # no suffix: known by what it holds
    write(tmp_path / "dog" / "7.png", format="JPEG")
    loaded = load(tmp_path)
    assert some(loaded.account).examples("train") == {"cat": 3, "dog": 7}
    assert some(loaded.train_files)[0] == "cat/3.webp"
    assert some(loaded.train_files)[2] == "cat/a/b/1.PNG"


def test_unicode_names(tmp_path):
    composed, apart = (unicodedata.normalize(form, "Käse") for form in ("NFC", "NFD"))
    write(tmp_path / "train" / apart / "crème brûlée.png")
    write(tmp_path / "train" / "猫" / "一.png")
    write(tmp_path / "test" / composed / "1.png")
    write(tmp_path / "test" / "猫" / "🐈.png")
    path = os.fsencode(tmp_path / "train" / "猫") + b"/\xff.png"  # no text at all
    write(tmp_path / "x.png")
    os.rename(tmp_path / "x.png", path)
    loaded = load(tmp_path)
    assert loaded.class_names == ("Käse", "猫")
    assert some(loaded.train_files)[-2:] == ("train/猫/\\xff.png", "train/猫/一.png")
    assert len(loaded.train) == 3
    json.dumps([loaded.fingerprint, some(loaded.account).to_json()], ensure_ascii=False).encode()


def test_names_that_differ_in_how_accents_are_coded(tmp_path):
    fill(tmp_path, cat=1, dog=1)
    for form in ("NFC", "NFD"):
        write(tmp_path / "cat" / unicodedata.normalize(form, "é.png"))
    with pytest.raises(ValueError, match=r"cat/é\.png: its name differs from another only in how"):
        load(tmp_path)


def test_links(tmp_path):
    fill(tmp_path / "elsewhere", a=2, b=1)
    root = tmp_path / "data"
    root.mkdir()
    (root / "a").symlink_to(tmp_path / "elsewhere" / "a")
    fill(root, c=1)
    (root / "c" / "more").symlink_to(tmp_path / "elsewhere" / "b")
    (root / "c" / "again.png").symlink_to(root / "c" / "0.png")
    (root / "c" / "up").symlink_to(root)
    (root / "c" / "self").symlink_to(".")
    linked = tmp_path / "link"
    linked.symlink_to(root)
    loaded = load(linked)
    assert some(loaded.account).examples("train") == {"a": 2, "c": 3}
    assert counts(loaded)["train", "c"][2] == {"link back to a folder above": 2}
    assert some(loaded.train_files)[2:] == ("c/0.png", "c/again.png", "c/more/0.png")


def test_the_order_does_not_depend_on_the_file_system(tmp_path, monkeypatch):
    fill(tmp_path, b=3, a=12)
    scandir = os.scandir
    first = load(tmp_path)
    monkeypatch.setattr(os, "scandir", lambda path: reversed(list(scandir(path))))
    second = load(tmp_path)
    assert first.train_files == second.train_files
    assert some(first.train_files)[:3] == ("a/0.png", "a/1.png", "a/10.png")
    np.testing.assert_array_equal(first.train.images, second.train.images)
    assert first.fingerprint == second.fingerprint


# What is no picture


def test_hidden_and_system_entries(tmp_path):
    parted(tmp_path)
    write(tmp_path / "train" / ".ipynb_checkpoints" / "0-checkpoint.png")
    write(tmp_path / "test" / "__MACOSX" / "cat" / "._0.png")
    write(tmp_path / "test" / "@eaDir" / "x.png")
    write(tmp_path / "train" / "cat" / ".ipynb_checkpoints" / "0.png")
    write(tmp_path / ".git" / "x.png")
    write(tmp_path / "train" / "cat" / "._0.png")
    for name in ("Thumbs.db", "desktop.ini", ".DS_Store"):
        (tmp_path / "train" / "cat" / name).write_bytes(b"x")
    loaded = load(tmp_path)
    assert loaded.class_names == ("ant", "cat")
    assert (len(loaded.train), len(loaded.test)) == (5, 2)
    assert counts(loaded) == {
        ("train", "ant"): (2, {}, {}),
        ("train", "cat"): (3, {}, {"hidden or system": 5}),
        ("test", "ant"): (1, {}, {}),
        ("test", "cat"): (1, {}, {}),
        ("", ""): (0, {}, {"hidden or system": 1}),
        ("train", ""): (0, {}, {"hidden or system": 1}),
        ("test", ""): (0, {}, {"hidden or system": 2}),
    }
    assert ".git/" in some(loaded.account).skipped["hidden or system"]


def test_a_hidden_folder_given_by_name(tmp_path):
    fill(tmp_path / ".pictures", cat=1, dog=1)
    assert len(load(tmp_path / ".pictures").train) == 2


def test_other_files(tmp_path):
    fill(tmp_path, cat=2, dog=1)
    (tmp_path / "cat" / "notes.txt").write_text("BM, P6 and GIF are no pictures")
    (tmp_path / "cat" / "film.mov").write_bytes(b"\0" * 20)
    (tmp_path / "cat" / "gone").symlink_to(tmp_path / "nothing")
    os.mkfifo(tmp_path / "cat" / "pipe")
    write(tmp_path / "loose.png")
    loaded = load(tmp_path)
    assert counts(loaded) == {
        ("train", "cat"): (2, {}, {"not a picture": 4}),
        ("train", "dog"): (1, {}, {}),
        ("train", ""): (0, {}, {"not in a folder of a class": 1}),
    }


def test_every_file_counts_once(tmp_path):
    parted(tmp_path)
    write(tmp_path / "loose.png")
    write(tmp_path / "train" / "loose.png")
    write(tmp_path / "docs" / "figure.png")
    (tmp_path / "train" / "cat" / "bad.png").write_bytes(b"")
    (tmp_path / "train" / "cat" / "notes.txt").write_text("x")
    on_disk = sum(len(names) for _, _, names in os.walk(tmp_path))
    lines = some(load(tmp_path, bad_files="skip").account).lines
    assert sum(line.read + sum(line.skipped.values()) for line in lines) == on_disk == 12


# Bad files


def damaged(root):
    """One file of each kind that cannot be read, beside ones that can; names and reasons."""
    fill(root, cat=3, dog=2)
    good = (root / "cat" / "0.png").read_bytes()
    large = Image.fromarray(np.random.default_rng(0).integers(0, 256, (6, 4, 3), np.uint8))
    large.resize((300, 200)).save(root / "large.jpg")
    photo = (root / "large.jpg").read_bytes()
    (root / "large.jpg").unlink()
    bomb = struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0)
    chunks = b"".join(
        struct.pack(">I", len(c)) + name + c + struct.pack(">I", zlib.crc32(name + c))
        for name, c in ((b"IHDR", bomb), (b"IDAT", b""))
    )
    contents = {
        "cat/00.png": good[: len(good) // 2],
        "cat/truncated.jpg": photo[: len(photo) // 2],
        "cat/empty.png": b"",
        "cat/page.jpg": b"<html>404</html>",
        "dog/bomb.png": b"\x89PNG\r\n\x1a\n" + chunks,
        "dog/photo.HEIC": b"\0\0\0\x18ftypheic",
    }
    for name, content in contents.items():
        (root / name).write_bytes(content)
    (root / "dog" / "gone.png").symlink_to(root / "nothing.png")
    (root / "dog" / "round.png").symlink_to(root / "dog" / "round.png")
    os.mkfifo(root / "dog" / "pipe.png")
    return {
        "cat/00.png": "",
        "cat/empty.png": "empty",
        "cat/page.jpg": "not a picture of a known format",
        "cat/truncated.jpg": "image file is truncated",
        "dog/bomb.png": "too many pixels",
        "dog/gone.png": "a link to nothing",
        "dog/photo.HEIC": "HEIC is not read: convert it to JPEG or PNG",
        "dog/pipe.png": "not an ordinary file",
        "dog/round.png": "too many levels of symbolic links",
    }


@pytest.mark.parametrize("image_size", [None, 8])
def test_all_bad_files_in_one_list(tmp_path, image_size):
    bad = damaged(tmp_path)
    with pytest.raises(ValueError, match="--bad-files skip") as caught:
        load(tmp_path, image_size=image_size)
    first, *rest = str(caught.value).splitlines()
    assert first == f"9 files of {tmp_path} cannot be read; --bad-files skip goes on without:"
    assert len(rest) == len(bad)
    for line, (name, reason) in zip(rest, bad.items(), strict=True):
        assert line.startswith(f"  {name}: {reason}")


@pytest.mark.parametrize("image_size", [None, 8])
def test_bad_files_are_skipped_and_counted(tmp_path, image_size):
    bad = damaged(tmp_path)
    loaded = load(tmp_path, image_size=image_size, bad_files="skip")
    assert [line.skipped for line in some(loaded.account).lines] == [
        {"cannot be read": 4},
        {"cannot be read": 5},
    ]
    assert [name for name, _ in some(loaded.account).bad] == list(bad)
    assert some(loaded.account).examples("train") == {"cat": 3, "dog": 2}
    # A bad file has no say in size and colours, nor is its place left in the arrays.
    assert loaded.image_shape == ((4, 6, 3) if image_size is None else (8, 8, 3))
    np.testing.assert_array_equal(in_memory(loaded.train)[:, 0, 0, 0], [10, 20, 30, 40, 50])
    assert list(some(loaded.fingerprint)["files"]) == list(some(loaded.train_files))


def test_a_bad_file_has_no_say_in_the_shape(tmp_path):
    """Found only when it is decoded, after its head has had a say."""
    for name in ("cat/1.png", "dog/1.png", "dog/2.png"):
        write(tmp_path / name, 7, mode="L")
    noise = np.random.default_rng(0).integers(0, 256, (80, 90, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "cat" / "0.jpg")
    content = (tmp_path / "cat" / "0.jpg").read_bytes()
    assert load(tmp_path).image_shape[2] == 3
    (tmp_path / "cat" / "0.jpg").write_bytes(content[: len(content) * 2 // 3])
    seen = []
    loaded = load(tmp_path, bad_files="skip", on_file=lambda *pair: seen.append(pair))
    assert loaded.image_shape == (4, 6, 1)
    assert (in_memory(loaded.train) == 7).all()
    assert seen[:8] == [(n, 8) for n in range(1, 9)]
    assert set(seen[8:]) <= {(8, 8)}


def test_long_lists_are_cut(tmp_path):
    fill(tmp_path, cat=2, dog=2)
    for i in range(23):
        (tmp_path / "cat" / f"x{i:02}.png").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"(?s)23 files of .*x19\.png.*\n  \.\.\. and 3 more$"):
        load(tmp_path)
    loaded = load(tmp_path, bad_files="skip")
    assert len(some(loaded.account).bad) == 20
    assert "and 3 more that cannot be read" in rendered(loaded.account)


@pytest.mark.parametrize("name", ["train/", "train/cat/", "train/cat/inner/"])
def test_folders_that_cannot_be_listed(tmp_path, monkeypatch, name):
    parted(tmp_path)
    write(tmp_path / "train" / "cat" / "inner" / "1.png")
    scandir = os.scandir

    def refuse(path):
        if f"{path}/" == f"{tmp_path}/{name}":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    message = f"{name}: the folder cannot be listed: permission denied"
    with pytest.raises(ValueError, match=re.escape(message)):
        load(tmp_path)
    if name == "train/cat/inner/":
        loaded = load(tmp_path, bad_files="skip")
        assert some(loaded.account).bad == [(name, message.split(": ", 1)[1])]
    elif name == "train/cat/":
        with pytest.raises(ValueError, match=r"cat \(1 the folder cannot be listed"):
            load(tmp_path, bad_files="skip")


def test_files_that_cannot_be_opened(tmp_path, monkeypatch):
    fill(tmp_path, cat=2, dog=1)

    def refuse(path, *args, **options):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(folders.pathlib.Path, "read_bytes", refuse)
    with pytest.raises(ValueError, match=r"(?s)3 files of .*cat/0\.png: permission denied"):
        load(tmp_path)


def test_places_that_are_no_folder(tmp_path):
    with pytest.raises(ValueError, match="'folder' needs data_dir, the folder of pictures"):
        data.load("folder")
    with pytest.raises(
        data.DataNotFoundError, match="nothing does not exist. A folder of pictures"
    ):
        load(tmp_path / "nothing")
    (tmp_path / "a.zip").write_bytes(b"PK")
    with pytest.raises(ValueError, match=r"a\.zip is a file, not a folder: unpack it"):
        load(tmp_path / "a.zip")
    (tmp_path / "void").mkdir()
    with pytest.raises(ValueError, match=r"holds no training pictures \(empty\)"):
        load(tmp_path / "void")


def test_wrong_options(tmp_path):
    fill(tmp_path, cat=1, dog=1)
    with pytest.raises(ValueError, match="bad_files must be error or skip, got 'ignore'"):
        load(tmp_path, bad_files="ignore")
    with pytest.raises(ValueError, match="image_size must be at least 1, got 0"):
        load(tmp_path, image_size=0)
    with pytest.raises(
        ValueError, match="bad_files = skip is for folders of pictures, not for dig"
    ):
        data.load("digits", bad_files="skip")


# Classes


def test_a_class_without_pictures(tmp_path):
    fill(tmp_path, cat=2, dog=2)
    (tmp_path / "fox").mkdir()
    with pytest.raises(ValueError, match=r"no picture to train on in 1 class: fox \(empty\)"):
        load(tmp_path)
    (tmp_path / "fox" / "notes.txt").write_text("x")
    with pytest.raises(ValueError, match=r"fox \(1 not a picture\)\. Add pictures or remove"):
        load(tmp_path)
    (tmp_path / "fox" / "0.png").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"1 file of .* cannot be read"):
        load(tmp_path)
    with pytest.raises(ValueError, match=r"fox \(1 not a picture of a known.*, 1 not a picture\)"):
        load(tmp_path, bad_files="skip")


def test_one_class(tmp_path):
    fill(tmp_path, cat=2)
    with pytest.raises(ValueError, match="has one class only, cat. A folder of pictures is"):
        load(tmp_path)


def test_a_folder_too_high(tmp_path):
    fill(tmp_path / "pets", cat=2, dog=2)
    with pytest.raises(
        ValueError, match="one class only, pets; if its sub-folders pets/cat, pets/dog"
    ):
        load(tmp_path)


def test_pictures_without_classes(tmp_path):
    for i in range(5):
        write(tmp_path / f"{i}.png")
    with pytest.raises(
        ValueError, match=r"0\.png, 1\.png, 2\.png, \.\.\. \(5 in all\) lie in no fol"
    ):
        load(tmp_path)
    fill(tmp_path / "test", cat=1, dog=1)
    (tmp_path / "train").mkdir()
    write(tmp_path / "train" / "0.png")
    with pytest.raises(ValueError, match="no training pictures with a class"):
        load(tmp_path)


def test_a_class_that_test_lacks(tmp_path):
    parted(tmp_path)
    (tmp_path / "test" / "ant" / "0.png").unlink()
    with pytest.warns(UserWarning, match="the test part has no picture of ant$"):
        loaded = load(tmp_path)
    assert some(loaded.account).warnings == ["the test part has no picture of ant"]
    np.testing.assert_array_equal(loaded.test.labels, [1])


def test_a_test_part_without_classes(tmp_path):
    fill(tmp_path / "train", cat=2, dog=2)
    write(tmp_path / "test" / "0.png")
    with pytest.warns(UserWarning, match="the test part has no picture of cat, dog"):
        loaded = load(tmp_path)
    assert len(loaded.test) == 0
    assert "test part: none, every picture is for training" in some(loaded.account).notes
    assert counts(loaded)["test", ""] == (0, {}, {"not in a folder of a class": 1})


def test_a_class_that_only_test_has(tmp_path):
    parted(tmp_path)
    write(tmp_path / "test" / "dog" / "1.png")
    with pytest.raises(ValueError, match="test has classes that train has not: dog"):
        load(tmp_path)


# Size, colours, range


def test_colours_are_decided_from_all_files(tmp_path):
    write(tmp_path / "ant" / "0.png", 7, mode="L")
    write(tmp_path / "cat" / "0.png", 9, mode="L")
    assert load(tmp_path).image_shape == (4, 6, 1)
    write(tmp_path / "dog" / "0.png", (200, 0, 0))
    loaded = load(tmp_path)
    np.testing.assert_array_equal(in_memory(loaded.train)[:, 0, 0], [[7] * 3, [9] * 3, [200, 0, 0]])
    assert counts(loaded)["train", "ant"] == (1, {"grey to RGB": 1}, {})
    assert some(loaded.account).notes[1] == "colours: RGB, since only 2 pictures of 3 are grey"
    # By the format alone: colours that are all equal are colours.
    write(tmp_path / "dog" / "0.png", (8, 8, 8))
    assert load(tmp_path).image_shape == (4, 6, 3)


def test_scans_of_16_bits_share_one_range(tmp_path):
    for name, value in (("cat/dark", 1000), ("dog/bright", 4000)):
        path = tmp_path / f"{name}.png"
        path.parent.mkdir()
        Image.fromarray(np.full((4, 6), value, np.uint16)).save(path)
    loaded = load(tmp_path)
    assert loaded.ranges == {"16-bit grey": (0.0, 4000.0)}
    np.testing.assert_array_equal(in_memory(loaded.train)[:, 0, 0, 0], [64, 255])
    note = "16-bit grey: 0 becomes black and 4,000 white, in all such files alike"
    assert note in some(loaded.account).notes
    assert counts(loaded)["train", "cat"] == (1, {"16-bit grey scaled to 8 bits": 1}, {})


def test_photographs_are_compared_upright(tmp_path):
    fill(tmp_path, cat=1, dog=1)
    exif = Image.Exif()
    exif[0x0112] = 6
    write(tmp_path / "cat" / "turned.jpg", (9, 9, 9), (4, 6), exif=exif)
    loaded = load(tmp_path)
    assert loaded.image_shape == (4, 6, 3)
    assert counts(loaded)["train", "cat"] == (2, {"turned upright": 1}, {})


def test_conversions_are_counted_by_class(tmp_path):
    fill(tmp_path, cat=2, dog=1)
    write(tmp_path / "cat" / "t.png", (0, 0, 0, 0), mode="RGBA")
    Image.new("RGB", (6, 4), (0, 99, 9)).quantize().save(tmp_path / "dog" / "p.gif")
    write(tmp_path / "dog" / "c.tif", (0, 255, 255, 0), mode="CMYK")
    loaded = load(tmp_path)
    assert (in_memory(loaded.train)[2] == 255).all()
    assert counts(loaded) == {
        ("train", "cat"): (3, {"transparent parts on white": 1}, {}),
        ("train", "dog"): (3, {"palette to RGB": 1, "CMYK to RGB": 1}, {}),
    }


@pytest.mark.parametrize(
    ("sizes", "side"),
    [
        ([(6, 4), (9, 4)], 4),
        ([(20, 40), (30, 50), (90, 80)], 20),
        ([(200, 300), (30, 40), (70, 71)], 64),
        ([(300, 280)] * 3, 64),  # of one size, which is too large for training
    ],
)
def test_sizes_without_an_image_size(tmp_path, sizes, side):
    for i, size in enumerate(sizes):
        write(tmp_path / "cat" / f"{i}.png", size=size)
    write(tmp_path / "dog" / "0.png", size=sizes[0])
    loaded = load(tmp_path)
    assert loaded.image_shape == (side, side, 3)
    note = some(loaded.account).notes[0]
    assert note.startswith(f"size: {side} x {side}, the shorter side scaled to {side} and the cent")
    assert note.endswith("; --image-size N takes N x N")
    lines = some(loaded.account).lines
    assert sum(line.converted.get("scaled and cut to size", 0) for line in lines) == len(sizes) + 1


def test_sizes_of_one_kind_are_kept(tmp_path):
    write(tmp_path / "cat" / "0.png", size=(400, 256))
    write(tmp_path / "dog" / "0.png", size=(400, 256))
    assert load(tmp_path).image_shape == (256, 400, 3)


def test_image_size_scales_and_cuts(tmp_path):
    parted(tmp_path)
    # Left half black, right half white: the central 4 x 4 of 4 x 8, doubled.
    wide = np.zeros((4, 8, 3), np.uint8)
    wide[:, 4:] = 255
    Image.fromarray(wide).save(tmp_path / "test" / "cat" / "0.png")
    image = in_memory(load(tmp_path, image_size=8).test)[1, :, :, 0]
    assert image.shape == (8, 8)
    np.testing.assert_array_equal(image[:, :3], 0)
    np.testing.assert_array_equal(image[:, 5:], 255)


def test_large_folders_stay_on_disk(tmp_path, monkeypatch):
    parted(tmp_path)
    Image.fromarray(np.full((4, 6), 2000, np.uint16)).save(tmp_path / "train" / "ant" / "9.png")
    Image.fromarray(np.full((4, 6), 4000, np.uint16)).save(tmp_path / "test" / "ant" / "9.png")
    memory = load(tmp_path)
    monkeypatch.setattr(pictures, "_IN_MEMORY_BYTES", 300)
    loaded = load(tmp_path)
    assert not loaded.train.in_memory
    assert loaded.test.in_memory
    np.testing.assert_array_equal(loaded.train.read(np.arange(6)), memory.train.images)
    np.testing.assert_array_equal(loaded.train.read(np.array([[4, 2]]))[..., 0, 0, 0], [[20, 128]])
    assert loaded.fingerprint == memory.fingerprint
    (tmp_path / "train" / "cat" / "2.png").write_bytes(b"\x89PNG no more")
    with pytest.raises(ValueError, match=r"train/cat/2\.png cannot be decoded as an image: not a"):
        loaded.train.read(np.array([5]))
    (tmp_path / "train" / "cat" / "3.png").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"2 files of .*"):
        load(tmp_path)
    assert len(load(tmp_path, bad_files="skip").train) == 5


def test_progress_and_interruption(tmp_path):
    fill(tmp_path, cat=30, dog=30)
    seen = []

    def stop(done, total):
        seen.append((done, total))
        if done == 70:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        load(tmp_path, on_file=stop)
    assert seen == [(n, 120) for n in range(1, 71)]


# The account


def rendered(found):
    console = Console(width=200, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    with console.file:
        console.print(account.table(found))
    return console.export_text()


def test_the_account_as_a_table_and_as_json(tmp_path):
    damaged(tmp_path)
    write(tmp_path / "cat" / "[red].png", (0, 0, 0, 0), mode="RGBA")
    (tmp_path / "cat" / "[bold]notes.txt").write_text("x")
    loaded = load(tmp_path, bad_files="skip")
    text = rendered(loaded.account)
    assert f"{tmp_path}: 2 classes" in text
    rows = [
        re.split(r"\s*[│┃]\s*", line)[1:-1]
        for line in text.splitlines()
        if "│" in line or "┃" in line
    ]
    assert rows == [
        ["class", "train", "test", "converted", "skipped"],
        ["cat", "4", "0", "1 transparent parts on white", "4 cannot be read, 1 not a picture"],
        ["dog", "2", "0", "", "5 cannot be read"],
        ["all", "6", "0", "1 transparent parts on white", "9 cannot be read, 1 not a picture"],
    ]
    assert "skipped, not a picture: cat/[bold]notes.txt" in text
    assert "skipped, cannot be read: cat/empty.png: empty" in text
    assert "test part: none" in text
    kept = json.loads(json.dumps(some(loaded.account).to_json()))
    assert account.Account.from_json(kept) == loaded.account


def test_a_table_of_many_classes(tmp_path):
    fill(tmp_path, **{f"class {i:02}": 1 for i in range(50)})
    text = rendered(load(tmp_path).account)
    assert "class 39" in text
    assert "class 40" not in text
    assert "... 10 more" in text


# Fingerprints


def changed(root, old):
    return fingerprint.differences(json.loads(json.dumps(old)), some(load(root).fingerprint))


def test_a_fingerprint_says_what_changed(tmp_path):
    rng = np.random.default_rng(0)
    for name in ("cat/a", "cat/b", "cat/c", "dog/a", "dog/b", "dog/c"):
        path = tmp_path / "train" / f"{name}.bmp"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (4, 6, 3), np.uint8)).save(path)
    train = tmp_path / "train"
    old = some(load(tmp_path).fingerprint)
    assert (old["train"], old["test"], old["classes"]) == (6, 0, ["cat", "dog"])
    assert old["files"]["train/cat/a.bmp"][:3] == ["train", "cat", 134]
    assert changed(tmp_path, old) == []
    (train / "cat" / "a.bmp").rename(train / "dog" / "new.bmp")
    moved = "1 file moved from cat to dog (train/cat/a.bmp -> train/dog/new.bmp)"
    assert changed(tmp_path, old) == [moved]
    (train / "dog" / "a.bmp").rename(train / "dog" / "z.bmp")
    (train / "dog" / "b.bmp").unlink()
    for i in range(5):
        Image.fromarray(rng.integers(0, 256, (4, 6, 3), np.uint8)).save(train / "cat" / f"n{i}.bmp")
    # The same size, as all BMP files of one size have.
    Image.fromarray(rng.integers(0, 256, (4, 6, 3), np.uint8)).save(train / "cat" / "c.bmp")
    assert changed(tmp_path, old) == [
        moved,
        "1 file moved to another name (train/dog/a.bmp -> train/dog/z.bmp)",
        "5 files added (train/cat/n0.bmp, train/cat/n1.bmp, train/cat/n2.bmp, ... (5 in all))",
        "1 file removed (train/dog/b.bmp)",
        "1 file changed (train/cat/c.bmp)",
    ]


def test_a_fingerprint_with_labels_and_classes(tmp_path):
    fill(tmp_path, cat=2, dog=2)
    old = load(tmp_path).fingerprint
    rows = "cat/0.png,cat,\ncat/1.png,fox,\ndog/0.png,fox,test\ndog/1.png,fox,\n"
    (tmp_path / "labels.csv").write_text("file,label,split\n" + rows)
    with pytest.warns(UserWarning, match="no ") as warned:
        said = changed(tmp_path, old)
    assert sorted(str(w.message).split(": ")[1] for w in warned) == [
        "labels.csv leaves no example of dog",
        "the test part has no picture of cat",
    ]
    assert said == [
        "1 file relabelled from cat to fox (cat/1.png)",
        "1 file moved from dog to fox and from train to test (dog/0.png)",
        "1 file relabelled from dog to fox (dog/1.png)",
        "1 new class: fox",
        "1 class less: dog",
    ]


def test_files_with_the_same_bytes_are_not_mixed_up(tmp_path):
    for name in ("cat/a.png", "cat/b.png", "dog/c.png"):
        write(tmp_path / name)
    old = load(tmp_path).fingerprint
    for name in ("cat/a.png", "cat/b.png"):
        (tmp_path / name).rename(tmp_path / name.replace("/", "/new "))
    assert changed(tmp_path, old) == [
        "2 files added (cat/new a.png, cat/new b.png)",
        "2 files removed (cat/a.png, cat/b.png)",
    ]


def test_fingerprints_of_packaged_data():
    digits = data.load("digits")
    print_ = json.loads(json.dumps(digits.fingerprint))
    assert print_ == data.load("digits").fingerprint
    assert fingerprint.differences(print_, some(digits.fingerprint)) == []
    assert (print_["name"], print_["train"], print_["test"]) == ("digits", 1200, 597)
    for key, said in (
        ("train images", ["the training images differ"]),
        ("train labels", ["the training labels differ"]),
        ("train", ["there were 1 training examples, now 1,200"]),
        ("name", ["the data set was 1 and is digits"]),
        ("classes", ["10 new classes: 0, 1, 2, ... (10 in all)"]),
    ):
        other = {**print_, key: [] if key == "classes" else 1}
        assert fingerprint.differences(other, print_) == said
