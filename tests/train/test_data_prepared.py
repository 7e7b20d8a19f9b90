"""Every TFDS builder, on small archives in the publishers' formats.

Preparing runs TFDS's real builders, most of which need TensorFlow; those tests are skipped where
it is not installed. The builder for Clothing1M, and reading, need none.
"""

import gzip
import io
import pickle
import struct
import subprocess
import sys
import tarfile
from typing import Literal

import numpy as np
import pytest
from PIL import Image

from tests.train.known import in_memory
from train import data, sampler
from train.data import clothing1m, prepared


def jpeg(value, size=(300, 260)):
    """A JPEG of one colour, red = value; width and height as given."""
    file = io.BytesIO()
    Image.new("RGB", size, (value, 100, 50)).save(file, "jpeg", quality=95)
    return file.getvalue()


def tar(path, members, mode: Literal["w", "w:gz"] = "w"):
    with tarfile.open(path, mode) as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


def red(split):
    """The colour of each image's centre, which names it."""
    images = split.read(np.arange(len(split)))
    return images[:, images.shape[1] // 2, images.shape[2] // 2, 0].astype(int)


def assert_examples(split, expected):
    """Each example is one of `expected` (red value: label), in whatever order."""
    found = sorted(zip(red(split).tolist(), np.asarray(split.labels).tolist(), strict=True))
    assert len(found) == len(expected)
    for (value, label), (expected_value, expected_label) in zip(
        found, sorted(expected.items()), strict=True
    ):
        assert abs(value - expected_value) <= 2  # JPEG
        assert label == expected_label


NOISY = {
    "images/0/00/a,1.jpg": (10, 3),
    "images/0/01/b.jpg": (20, 13),
    "images/1/02/c.jpg": (30, 0),
}
CLEAN = {
    "clean_train": {"images/2/00/d.jpg": (40, 1), "images/2/00/e.jpg": (50, 2)},
    "clean_val": {"images/2/00/f.jpg": (60, 5)},
    "clean_test": {"images/2/00/g.jpg": (70, 6), "images/9/99/h.jpg": (80, 7)},
}


@pytest.fixture
def clothing(tmp_path):
    root = tmp_path / "archive"
    for examples in (NOISY, *CLEAN.values()):
        for key, (value, _) in examples.items():
            (root / key).parent.mkdir(parents=True, exist_ok=True)
            (root / key).write_bytes(jpeg(value))
    for split, examples in {"noisy_train": NOISY, **CLEAN}.items():
        (root / f"{split}_key_list.txt").write_text("".join(f"{key}\n" for key in examples))
    clean = {key: example for examples in CLEAN.values() for key, example in examples.items()}
    for kind, examples in (("noisy", NOISY), ("clean", clean)):
        (root / f"{kind}_label_kv.txt").write_text(
            "".join(f"{key} {label}\n" for key, (_, label) in examples.items())
        )
    return root


def test_clothing1m(clothing, tmp_path):
    folder = data.prepare("clothing1m", tmp_path / "tfds", clothing)
    assert folder == tmp_path / "tfds" / "clothing1m" / "1.0.0"
    assert list(folder.glob("*.array_record*"))
    loaded = data.load("clothing1m", tmp_path / "tfds")
    assert loaded.class_names == clothing1m.CLASS_NAMES
    assert (loaded.num_classes, loaded.image_shape) == (14, (256, 256, 3))
    assert not loaded.train.in_memory
    assert_examples(loaded.train, dict(NOISY.values()))
    assert_examples(loaded.test, dict(CLEAN["clean_test"].values()))
    assert loaded.validation is not None
    assert_examples(loaded.validation, dict(CLEAN["clean_val"].values()))
    clean = data.load("clothing1m/clean", tmp_path / "tfds", image_size=64)
    assert_examples(clean.train, dict(CLEAN["clean_train"].values()))
    assert clean.train.read(np.array([0])).shape == (1, 64, 64, 3)


@pytest.mark.parametrize("num_workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_records_are_read_ahead(clothing, tmp_path, num_workers):
    data.prepare("clothing1m", tmp_path, clothing)
    train = data.load("clothing1m", tmp_path, image_size=32).train
    train.read(np.array([0]))  # opens the files, which cannot be sent to workers
    assert len(pickle.dumps(train.images)) < 1000
    draws = sampler.random(3, 1, 2, seed=0)
    for indices, images in data.batches(train, draws, num_steps=2, num_workers=num_workers):
        np.testing.assert_array_equal(images, train.read(indices))


def test_labels_are_kept_beside_the_records(clothing, tmp_path, monkeypatch):
    folder = data.prepare("clothing1m", tmp_path, clothing)
    labels = np.load(folder / "noisy_train-label.npy")
    with monkeypatch.context() as patch:
        patch.setattr(prepared.Records, "feature", None)  # not read again
        np.testing.assert_array_equal(data.load("clothing1m", tmp_path).train.labels, labels)
    for file in folder.glob("*.npy"):
        file.unlink()
    np.testing.assert_array_equal(data.load("clothing1m", tmp_path).train.labels, labels)


def test_a_damaged_image_is_named(clothing, tmp_path):
    (clothing / "images/0/01/b.jpg").write_bytes(jpeg(20)[:700])
    data.prepare("clothing1m", tmp_path, clothing)
    train = data.load("clothing1m", tmp_path).train
    with pytest.raises(
        ValueError, match=r"image \d of noisy_train in .*1\.0\.0: .* cannot be deco"
    ):
        train.read(np.arange(3))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            lambda root: (root / "clean_label_kv.txt").unlink(),
            data.DataNotFoundError,
            "lacks clean_label_kv.txt.*--archives ARCHIVES",
        ),
        (
            lambda root: (root / "noisy_label_kv.txt").write_text("images/0/00/a,1.jpg 14\n"),
            ValueError,
            "noisy_label_kv.txt:1: expected 'KEY LABEL', got 'images/0/00/a,1.jpg 14'",
        ),
        (
            lambda root: (root / "noisy_label_kv.txt").write_text("images/0/00/a,1.jpg 1\n"),
            ValueError,
            "noisy_train_key_list.txt:2: images/0/01/b.jpg has no label in noisy_label_kv.txt",
        ),
        (
            lambda root: (root / "images/0/01/b.jpg").unlink(),
            FileNotFoundError,
            "images/0/01/b.jpg",
        ),
    ],
)
def test_incomplete_clothing1m(clothing, tmp_path, change, error, message):
    change(clothing)
    with pytest.raises(error, match=message):
        data.prepare("clothing1m", tmp_path / "tfds", clothing)
    with pytest.raises(data.DataNotFoundError, match="clothing1m is not prepared in"):
        data.load("clothing1m", tmp_path / "tfds")


@pytest.mark.parametrize("name", list(prepared.RECIPES))
def test_absent_data_name_the_command(name, tmp_path):
    with pytest.raises(data.DataNotFoundError) as caught:
        data.load(name, tmp_path)
    message = str(caught.value)
    assert f"{name} is not prepared in {tmp_path}" in message
    assert f"python -m train prepare {name} --data-dir {tmp_path} --archives" in message
    for archive in prepared.RECIPES[name].archives:
        assert archive in message
    assert ("downloads it" in message) == (
        name not in ("imagenet2012", "clothing1m", "clothing1m/clean")
    )


def test_preparing_without_tensorflow_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        ImportError, match=r"cifar10 needs TensorFlow .*pip install -e '\.\[prepare\]"
    ):
        data.prepare("cifar10", tmp_path)


def test_what_cannot_be_prepared(tmp_path):
    with pytest.raises(ValueError, match="unknown data set 'cifar'; known: mnist, fashion_mnist"):
        data.prepare("cifar")
    with pytest.raises(ValueError, match="digits needs no preparing"):
        data.prepare("digits")
    with pytest.raises(data.DataNotFoundError, match="clothing1m cannot be downloaded by program"):
        data.prepare("clothing1m", tmp_path)


@pytest.mark.parametrize("name", ["digits", "mnist", "cifar10"])
def test_image_size_is_for_images_of_different_sizes(name, tmp_path):
    with pytest.raises(ValueError, match="all have one size"):
        data.load(name, tmp_path, image_size=64)


# From here on with TensorFlow.


@pytest.mark.slow
class TestBuilders:
    @pytest.mark.parametrize("name", ["mnist", "fashion_mnist"])
    def test_mnist(self, name, tmp_path, publisher, monkeypatch):
        from tensorflow_datasets.image_classification import mnist

        monkeypatch.setattr(mnist, "_TRAIN_EXAMPLES", 4)
        monkeypatch.setattr(mnist, "_TEST_EXAMPLES", 2)
        for part, values in (("train", [10, 20, 30, 40]), ("t10k", [50, 60])):
            pixels = np.repeat(np.array(values, np.uint8), 28 * 28).tobytes()
            labels = bytes(v // 10 for v in values)
            for kind, header, content in (
                ("images-idx3", struct.pack(">4I", 0x803, len(values), 28, 28), pixels),
                ("labels-idx1", struct.pack(">2I", 0x801, len(values)), labels),
            ):
                path = tmp_path / f"{part}-{kind}-ubyte.gz"
                path.write_bytes(gzip.compress(header + content))
        publisher(name)
        data.prepare(name, tmp_path / "tfds", tmp_path)
        loaded = data.load(name, tmp_path / "tfds")
        assert loaded.image_shape == (28, 28, 1)
        assert loaded.train.in_memory
        assert_examples(loaded.train, {10: 1, 20: 2, 30: 3, 40: 4})
        assert_examples(loaded.test, {50: 5, 60: 6})
        direct = data.load(name, tmp_path)
        assert direct.class_names == loaded.class_names
        assert_examples(direct.train, {10: 1, 20: 2, 30: 3, 40: 4})

    @pytest.mark.parametrize("name", ["cifar10", "cifar100"])
    def test_cifar(self, name, tmp_path, publisher):
        def records(values):
            """Label bytes (for CIFAR-100 the coarse one first), then the three colour planes."""
            return b"".join(
                bytes([0, v // 10] if name == "cifar100" else [v // 10])
                + bytes([v]) * 1024
                + bytes([100]) * 1024
                + bytes([50]) * 1024
                for v in values
            )

        if name == "cifar10":
            root = "cifar-10-batches-bin/"
            members = {f"{root}data_batch_{i}.bin": records([10 * i]) for i in range(1, 6)}
            members |= {
                f"{root}test_batch.bin": records([70, 80]),
                f"{root}batches.meta.txt": "\n".join(f"class{i}" for i in range(10)).encode(),
            }
        else:
            root = "cifar-100-binary/"
            members = {
                f"{root}train.bin": records([10, 20, 30, 40, 50]),
                f"{root}test.bin": records([70, 80]),
                f"{root}fine_label_names.txt": "\n".join(f"class{i}" for i in range(100)).encode(),
                f"{root}coarse_label_names.txt": "\n".join(map(str, range(20))).encode(),
            }
        tar(tmp_path / f"cifar-{name[5:]}-binary.tar.gz", members, "w:gz")
        publisher(name)
        data.prepare(name, tmp_path / "tfds", tmp_path)
        loaded = data.load(name, tmp_path / "tfds")
        assert (loaded.num_classes, loaded.class_names[7]) == (int(name[5:]), "class7")
        assert in_memory(loaded.train).shape == (5, 32, 32, 3)
        assert_examples(loaded.train, {10: 1, 20: 2, 30: 3, 40: 4, 50: 5})
        assert_examples(loaded.test, {70: 7, 80: 8})
        assert (in_memory(loaded.train)[..., 1] == 100).all()

        # Reading, pixels and labels, does without TensorFlow even where it is installed.
        for file in (tmp_path / "tfds" / name).glob("*/*.npy"):
            file.unlink()
        code = (
            "import sys; from train import data; "
            f"print(len(data.load({name!r}, {str(tmp_path / 'tfds')!r}).train), "
            "'tensorflow' in sys.modules)"
        )
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=False
        )
        assert done.stdout.strip() == "5 False", done.stderr

    def test_imagenet2012(self, tmp_path):
        pytest.importorskip("tensorflow")
        synsets = ["n01440764", "n01484850"]  # the classes 0 and 2
        for name, values in zip(synsets, ([10, 20], [30]), strict=True):
            tar(
                tmp_path / f"{name}.tar",
                {f"{name}_{value}.JPEG": jpeg(value, (500, 375)) for value in values},
            )
        tar(
            tmp_path / "ILSVRC2012_img_train.tar",
            {f"{name}.tar": (tmp_path / f"{name}.tar").read_bytes() for name in synsets},
        )
        with pytest.raises(data.DataNotFoundError, match=r"lacks ILSVRC2012_img_val\.tar"):
            data.prepare("imagenet2012", tmp_path / "tfds", tmp_path)
        tar(
            tmp_path / "ILSVRC2012_img_val.tar",
            {f"ILSVRC2012_val_0000000{i}.JPEG": jpeg(100 * i) for i in (2, 1)},
        )
        data.prepare("imagenet2012", tmp_path / "tfds", tmp_path)
        loaded = data.load("imagenet2012", tmp_path / "tfds")
        assert (loaded.num_classes, loaded.image_shape) == (1000, (256, 256, 3))
        assert loaded.class_names[2] == "n01484850"
        assert not loaded.train.in_memory
        assert_examples(loaded.train, {10: 0, 20: 0, 30: 2})
        # The published validation labels begin with n01751748, n09193705.
        first, second = (loaded.class_names.index(n) for n in ("n01751748", "n09193705"))
        assert_examples(loaded.test, {100: first, 200: second})

    def test_voc(self, tmp_path, publisher):
        def annotation(objects):
            return (
                "<annotation><size><width>500</width><height>375</height></size>"
                + "".join(
                    f"<object><name>{name}</name><pose>Left</pose><truncated>0</truncated>"
                    f"<difficult>{difficult}</difficult><bndbox><xmin>1</xmin><ymin>1</ymin>"
                    "<xmax>100</xmax><ymax>100</ymax></bndbox></object>"
                    for name, difficult in objects
                )
                + "</annotation>"
            ).encode()

        def members(sets):
            root = "VOCdevkit/VOC2007/"
            files = {}
            for name, examples in sets.items():
                files[f"{root}ImageSets/Main/{name}.txt"] = "".join(
                    f"{image}\n" for image in examples
                ).encode()
                for image, (value, objects) in examples.items():
                    files[f"{root}JPEGImages/{image}.jpg"] = jpeg(value, (500, 375))
                    files[f"{root}Annotations/{image}.xml"] = annotation(objects)
            return files

        trainval = {
            "train": {"000005": (10, [("chair", 0), ("person", 1)])},
            "val": {"000007": (20, [("car", 0), ("car", 0)]), "000009": (30, [("horse", 0)])},
        }
        test = {"test": {"000001": (40, [("dog", 0), ("person", 0)])}}
        tar(tmp_path / "VOCtrainval_06-Nov-2007.tar", members(trainval))
        tar(tmp_path / "VOCtest_06-Nov-2007.tar", members(test))
        publisher("voc")
        data.prepare("voc/2007", tmp_path / "tfds", tmp_path)
        loaded = data.load("voc/2007", tmp_path / "tfds")
        assert loaded.multi_label
        assert (loaded.num_classes, loaded.image_shape) == (20, (384, 384, 3))

        def hot(*names):
            return [int(name in names) for name in loaded.class_names]

        assert loaded.train.labels.dtype == np.int32
        assert_examples(
            loaded.train, {10: hot("chair", "person"), 20: hot("car"), 30: hot("horse")}
        )
        assert_examples(loaded.test, {40: hot("dog", "person")})

    def test_wrong_checksum(self, tmp_path):
        pytest.importorskip("tensorflow")
        tar(tmp_path / "cifar-10-binary.tar.gz", {"cifar-10-batches-bin/x": b""}, "w:gz")
        with pytest.raises(Exception, match="has wrong checksum"):
            data.prepare("cifar10", tmp_path / "tfds", tmp_path)

    def test_prepared_as_tfrecord(self, tmp_path, clothing):
        pytest.importorskip("tensorflow")
        import tensorflow_datasets as tfds

        clothing1m.Clothing1m(data_dir=tmp_path, file_format="tfrecord").download_and_prepare(
            download_config=tfds.download.DownloadConfig(manual_dir=clothing)
        )
        with pytest.raises(data.DataNotFoundError, match="but not as array_record"):
            data.load("clothing1m", tmp_path)
        with pytest.raises(data.DataNotFoundError, match="but not as array_record"):
            data.prepare("clothing1m", tmp_path, clothing)
