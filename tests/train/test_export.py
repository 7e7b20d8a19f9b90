import json
import pathlib
import re
from typing import Any

import jax
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx
from PIL import Image

import models
from tests.models.building import call, filled
from tests.train import tiny
from tests.train.known import in_memory
from train import __main__ as cli
from train import export, predict, saved, trainer
from train.config import ConfigError
from train.run_directory import read_metrics


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run that memorises, so that its best epoch by held-out labels is not the last."""
    directory = tmp_path_factory.mktemp("export") / "run"
    config = tiny.config(
        method="sgd", train_size=200, hidden=(32,), held_out=0.2, noise_rate=0.5, epochs=12,
        learning_rate=0.3,
    )  # fmt: skip
    trainer.train(config, directory, tiny.options())
    return directory


def made(model, name, shape, classes):
    """An export of an untrained network."""
    return export.Model(
        network=name, options={}, class_names=classes, image_shape=shape, input_shape=shape,
        fit="crop", ranges={"16-bit grey": (0.0, 4095.0)}, preset="standardize",
        multi_label=False, trained={"epoch": 3},
        arrays={name: np.asarray(leaf.get_value()) for name, leaf in export.named(model).items()},
    )  # fmt: skip


@pytest.fixture
def small(tmp_path):
    """The folder of an export of a network with batch norm, and its scores of some images."""
    shape = (8, 8, 1)
    network = filled(
        lambda: models.create("resnet_small", num_classes=3, input_shape=shape, rngs=nnx.Rngs(0))
    )
    network.eval()
    images = np.random.default_rng(0).normal(size=(4, *shape)).astype(np.float32)
    export.save(made(network, "resnet_small", shape, ("a", "Ü", "c")), tmp_path / "out")
    return tmp_path / "out", images, call(network, images)


def test_what_is_loaded_is_what_was_saved(small):
    folder, images, logits = small
    model = export.load(folder)
    np.testing.assert_array_equal(call(model.build(), images), logits)
    assert model.class_names == ("a", "Ü", "c")
    assert model.ranges == {"16-bit grey": (0.0, 4095.0)}
    assert model.trained == {"epoch": 3}


def test_names_are_those_of_the_module_tree(small):
    arrays = safetensors.numpy.load_file(small[0] / "model.safetensors")
    assert arrays["blocks.0.conv1.kernel"].shape == (3, 3, 16, 16)
    assert arrays["blocks.1.shortcut.norm.mean"].shape == (32,)
    assert {name.rpartition(".")[2] for name in arrays} == {
        "kernel", "bias", "scale", "mean", "var",
    }  # fmt: skip
    assert {array.dtype for array in arrays.values()} == {np.dtype(np.float32)}


def test_the_description_says_what_is_needed(small):
    text = (small[0] / "model.json").read_text(encoding="utf-8")
    assert "Ü" in text
    about = json.loads(text)
    assert about["network"] == "resnet_small"
    assert about["num_classes"] == 3
    assert about["image_shape"] == about["input_shape"] == [8, 8, 1]
    assert about["max_value"] == 255
    assert about["normalization"] == {"divide_by": 255, "standardize_each_image": True}
    assert about["versions"]["jax"] == jax.__version__


def test_a_run_exports_its_best_epoch_by_held_out_labels(run, tmp_path):
    opened = saved.open_run(run)
    lines = read_metrics(run)
    best = max(lines, key=lambda line: line["held_out"])
    assert best["epoch"] < len(lines)
    chosen: dict[export.Epoch, dict[str, Any]] = {"best": best, "last": lines[-1]}
    for epoch, line in chosen.items():
        model = export.from_run(run, epoch)
        export.save(model, tmp_path / epoch)
        loaded = export.load_model(tmp_path / epoch)
        assert loaded.trained == {
            "method": "sgd",
            "epoch": line["epoch"],
            "of_epochs": 12,
            "chosen_by": "held-out labels" if epoch == "best" else "being the last",
            "held_out": line["held_out"],
            "test": line["test"],
        }
        # Digits are 0 to 16: a picture of one has 255 where they have 16.
        test = opened.problem().dataset.test
        pixels = np.rint(in_memory(test)[:500] * (255 / 16)).astype(np.uint8)
        probabilities = predict.Predictor(loaded)(pixels)
        np.testing.assert_allclose(probabilities.sum(1), 1, atol=1e-5)
        state = opened.network if epoch == "best" else opened.state
        scores = trainer.predict(opened.program, state, test.take(np.arange(500)))
        np.testing.assert_allclose(probabilities, np.exp(scores), atol=0.02)
        assert 100 * (probabilities.argmax(1) == test.labels[:500]).mean() == pytest.approx(
            line["test"], abs=1.5
        )
    assert not np.array_equal(
        export.load(tmp_path / "best").arrays["head.kernel"],
        export.load(tmp_path / "last").arrays["head.kernel"],
    )


def test_a_run_itself_is_as_good_as_its_export(run, tmp_path):
    export.save(export.from_run(run), tmp_path)
    one, other = export.load_model(run), export.load_model(tmp_path)
    assert one.arrays.keys() == other.arrays.keys()
    assert all(np.array_equal(one.arrays[name], other.arrays[name]) for name in one.arrays)
    assert one.options == other.options == {"hidden": [32]}


def test_without_a_held_out_part_it_is_the_last_epoch(tmp_path):
    config = tiny.config(method="noise_layer", held_out=0.0, epochs=1)
    trainer.train(config, tmp_path / "run", tiny.options())
    model = export.from_run(tmp_path / "run")
    assert model.trained["chosen_by"] == "being the last"
    # The channel of the method stays behind: the network is the one of that name.
    assert set(model.arrays) == {"hidden.0.kernel", "hidden.0.bias", "head.kernel", "head.bias"}
    model.build()


def test_the_command(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "250")
    for epoch in ("best", "last"):
        assert cli.main(["export", str(run), "--out", str(tmp_path / "a/b"), "--epoch", epoch]) == 0
        shown = capsys.readouterr().out
        assert re.search(r"mlp, 10 classes, epoch \d+ of 12, chosen by", shown)
        assert str(tmp_path / "a/b/model.safetensors") in shown
    assert {file.name for file in (tmp_path / "a/b").iterdir()} == {
        "model.safetensors", "model.json",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: (f / "model.json").unlink(), "neither a run directory nor an export"),
        (lambda f: (f / "model.json").write_text("{"), "model.json is damaged, export the run"),
        (lambda f: (f / "model.json").write_text('{"format": 1}'), "model.json is damaged"),
        (lambda f: (f / "model.json").write_text('{"format": 9}'), "has format 9, and this"),
        (lambda f: (f / "model.safetensors").unlink(), "model.safetensors is missing: export"),
        (
            lambda f: (f / "model.safetensors").write_bytes(b"\x08"),
            "model.safetensors is damaged, export the run again",
        ),
    ],
)
def test_a_damaged_export_says_so(small, change, message):
    change(small[0])
    with pytest.raises(ConfigError, match=message):
        export.load_model(small[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda a: a.pop("conv.kernel"),
            r"has conv.kernel of shape \(3, 3, 1, 16\), the file None",
        ),
        (lambda a: a.update(more=a["head.bias"]), r"has more of shape None, the file \(3,\)"),
        (lambda a: a.update({"head.bias": np.zeros(4, np.float32)}), r"\(3,\), the file \(4,\)"),
    ],
)
def test_weights_of_another_network_are_refused(small, change, message):
    file = small[0] / "model.safetensors"
    arrays = safetensors.numpy.load_file(file)
    change(arrays)
    safetensors.numpy.save_file(arrays, file)
    with pytest.raises(ValueError, match=message):
        export.load(small[0]).build()


def test_where_an_export_cannot_go(run, small, tmp_path):
    model = export.load(small[0])
    with pytest.raises(ConfigError, match="is a run directory: give --out a folder for the"):
        export.save(model, run)
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"cannot write to .*file \(File exists\): give --out"):
        export.save(model, tmp_path / "file")


def test_a_full_disk_leaves_no_export_of_two_halves(small, monkeypatch):
    model = export.load(small[0])

    def full(self, content):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pathlib.Path, "write_bytes", full)
    with pytest.raises(ConfigError, match="No space left on device"):
        export.save(model, small[0])
    with pytest.raises(ConfigError, match="neither a run directory nor an export"):
        export.load_model(small[0])


def test_the_loader_of_the_documentation(run, tmp_path, monkeypatch, capsys):
    """The very block of the page, on an export and a picture of the names that it uses."""
    page = (pathlib.Path(__file__).parents[2] / "docs/use_the_network.md").read_text()
    (block,) = [
        block
        for block in re.findall(r"```\{testcode\}\n(.*?)```", page, re.DOTALL)
        if "load_file" in block
    ]
    monkeypatch.chdir(tmp_path)
    model = export.from_run(run)
    export.save(model, pathlib.Path("model"))
    (picture,) = re.findall(r'"(new/.*?)"', block)
    pathlib.Path("new").mkdir()
    pixels = np.random.default_rng(3).integers(0, 256, (8, 8), np.uint8)
    Image.fromarray(pixels).save(picture)
    variables = {}
    exec(block, variables)
    expected = predict.Predictor(model)(pixels[None, :, :, None])[0]
    np.testing.assert_allclose(variables["chances"], expected, atol=1e-6)
    assert capsys.readouterr().out == f"{model.class_names[expected.argmax()]}\n"
