"""Every experiment at both scales: its plan, and whole runs at a tiny size.

The data are small archives in the publishers' formats. Preparing most of them needs TensorFlow:
those tests are skipped where it is not installed.
"""

import dataclasses
import gzip
import io
import json
import pathlib
import struct

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from tests.train import tiny
from tests.train.known import some
from tests.train.test_data_prepared import jpeg, tar
from train import __main__ as cli
from train import augment, data, experiments, noise, trainer
from train.config import Config, ConfigError
from train.experiments import practice, runner
from train.experiments.common import METHODS, SCALES, Arm, Experiment, Panel, Scale, compare
from train.run_directory import RunDirectory, read_metrics

FIGURES = {"test_last_mean", "test_last_std", "test_best_mean", "seeds", "command"}
BESIDE = {"uniform", "bilevel_exact"}


def console():
    return Console(file=io.StringIO(), width=200, markup=False)


def shown(out):
    return out.file.getvalue()


# ------------------------------------------------------------------------------ definitions


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("name", experiments.NAMES)
def test_arms(name, scale):
    experiment = experiments.load(name)
    arms = experiment.arms(scale)
    assert experiment.name == name
    if name == "practice":
        assert all(arm.config.held_out == 0.1 for arm in arms if arm.label != "teacher")
    else:  # the paper holds nothing out beside its validation mini-batches
        assert all(not arm.config.held_out for arm in arms if arm.config.method != "coherent")
    labels = [arm.label for arm in arms]
    assert len(set(labels)) == len(labels)
    assert all(pathlib.Path(label).name == label for label in labels)
    assert all(arm.after in {None, *labels} for arm in arms)
    for command in SCALES:
        assert f"python -m train experiment {name} --scale {command}" in some(experiment.doc)
    if scale == "paper":
        assert {arm.config.dataset for arm in arms} <= {
            "cifar10", "cifar100", "imagenet2012", "voc/2007", "clothing1m", "clothing1m/clean",
        }  # fmt: skip
    else:
        ours = {"digits"} if name == "practice" else set()
        assert {arm.config.dataset for arm in arms} == {"fashion_mnist"} | ours
    noisy = [arm for arm in arms if arm.config.noise != "none" or arm.after]
    if noisy:
        assert {arm.config.method for arm in noisy} >= {"sgd", "bilevel", *BESIDE} - (
            {"figure2": {"sgd"}, "practice": {"bilevel_exact"}}.get(name, set())
        )


@pytest.mark.parametrize(
    ("network", "size", "prefix"), [("mlp", 4000, ""), ("cifarnet", 1000, "cifarnet-")]
)
def test_the_laptop_grid_of_figure_3(network, size, prefix):
    arms = experiments.load("figure3").arms("laptop")
    grid = [arm for arm in arms if arm.config.network == network]
    assert len(grid) == 60
    assert {arm.x for arm in grid} == {0, 20, 40, 50, 60, 80}
    for arm in grid:
        rate = arm.config.noise_rate if arm.config.noise == "symmetric" else 0
        assert rate == some(arm.x) / 100
        assert (arm.config.k, arm.config.b, arm.config.train_size) == (8, 8, size)
        assert (arm.config.sampling == "random") == (arm.series == "sgd_random")
    (dropout,) = (arm for arm in grid if arm.label == f"{prefix}noise50-dropout")
    assert (dropout.config.method, dropout.config.dropout_rate) == ("sgd", 0.7)


def test_the_rows_of_table_3():
    arms = experiments.load("table3").arms("paper")
    cifar10 = {arm.series: arm for arm in arms if arm.config.dataset == "cifar10"}
    assert set(cifar10) == set(METHODS)
    assert cifar10["bilevel"].paper == {"test": 87.0}
    assert cifar10["uniform"].paper == {}
    config = cifar10["bilevel_mixup"].config
    assert (config.method, config.k * config.b, config.epochs) == ("bilevel_mixup", 128, 200)
    laptop = experiments.load("table3").arms("laptop")
    assert {arm.series for arm in laptop} == set(METHODS)
    assert sum(arm.home == "figure3" for arm in laptop) == 10


def test_practice_compares_on_the_same_images_and_as_many_a_step():
    arms = {arm.label: arm for arm in experiments.load("practice").arms("laptop")}
    case = [arm for label, arm in arms.items() if label.startswith("fashion-noise50-")]
    assert [arm.series for arm in case] == list(practice.METHODS)
    assert {(arm.config.k * arm.config.b, arm.config.held_out) for arm in case} == {(64, 0.1)}
    stratified = {arm.series for arm in case if arm.config.order == "stratified"}
    assert stratified == {"uniform", "bilevel", "bilevel_k32"}
    assert {arm.after for label, arm in arms.items() if "network40" in label} == {"teacher"}


def test_the_tables_of_practice(tmp_path):
    folder = tmp_path / "practice-laptop"
    figures = {"test_last": 70.0, "stopped": 72.0, "test_best": 75.0, "train_noisy": 40.0}
    for method, seed, gain in (
        ("sgd_random", 0, 0), ("sgd_random", 1, 2), ("coherent", 0, 8), ("coherent", 1, 8),
    ):  # fmt: skip
        run = folder / f"fashion-noise50-{method}-s{seed}"
        (run / "checkpoints" / "1").mkdir(parents=True)
        result = {name: figure + gain for name, figure in figures.items()}
        (run / "result.json").write_text(json.dumps({**result, "seconds": 10 + gain, "steps": 1}))
        (run / "metrics.jsonl").write_text("{}\n")
    table = practice.collect(tmp_path)
    assert list(table) == ["fashion-noise50/sgd_random", "fashion-noise50/coherent"]
    known = {"digits-clean/elr": {}, "fashion-noise50/coherent": {}, "fashion-noise50/gone": {}}
    assert practice.merged(known, table) == table  # arms that the study no longer has are dropped
    known = {"fashion-noise50/elr": {"seeds": [0]}, "fashion-noise50/coherent": {}}
    assert practice.merged(known, table) == {**known, **table}
    row = table["fashion-noise50/sgd_random"]
    assert row["stopped"] == {"mean": 73.0, "std": 1.41}
    assert row["seeds"] == [0, 1]
    assert row["command"].endswith("--only fashion-noise50-sgd_random --seeds 0 1")
    assert practice.gains(table, "coherent", "sgd_random") == [78.0 - 73.0]
    row["stopped"] = {"mean": 79.0, "std": 1.41}
    table["fashion-noise50/coherent"]["stopped"] = {"mean": 80.0, "std": 0.5}
    for method, near in (("coherent", 1), ("sgd_random", 0)):
        assert practice.near_first(table, method) == (near, 1)
    table["fashion-noise50/coherent"]["stopped"]["std"] = 1.0
    assert practice.near_first(table, "sgd_random") == (1, 1)
    table = practice.collect(tmp_path)
    shown = practice.overview(table, {"fashion-noise50": "50% wrong"}).splitlines()
    assert shown[0] == "| | 50% wrong |"
    assert shown[2:] == [
        "| SGD, random batches | 71.0 (73.0) |", "| coherent steps | 78.0 (**80.0**) |",
    ]  # fmt: skip
    lines = practice.markdown(table).splitlines()
    assert lines[0] == "## Fashion-MNIST, 4,000 images, MLP, 50% wrong"
    assert lines[-1] == (
        "| coherent steps | **78.0 ± 0.0** | **80.0 ± 0.0** | 83.0 ± 0.0 | 48.0 ± 0.0 | 1.6 | 2 |"
    )


def test_figure_2_keeps_the_total_while_k_varies():
    totals: dict[Scale, int] = {"laptop": 64, "paper": 128}
    for scale, total in totals.items():
        for arm in experiments.load("figure2").arms(scale):
            if arm.panel.x == "k":
                assert (arm.config.k, arm.config.k * arm.config.b) == (arm.x, total)
            elif arm.panel.x == "b":
                assert (arm.config.k, arm.config.b) == (8, arm.x)


# ------------------------------------------------------------------------------ command line


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("name", experiments.NAMES)
def test_a_dry_run_needs_no_data(name, scale, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(data, "load", lambda *args, **kwargs: pytest.fail("data were loaded"))
    out = tmp_path / "out"
    args = ["experiment", name, "--scale", scale, "--dry-run", "--out", str(out), "--seeds", "0"]
    assert cli.main(args) == 0
    text = capsys.readouterr().out
    arms = experiments.load(name).arms(scale)
    assert f"{len(arms)} arms × 1 seeds = {len(arms)} runs, about" in text
    for arm in arms:
        (line,) = (line for line in text.splitlines() if f" {arm.label} " in line)
        assert f"{runner.steps(arm):,}" in line
    assert not out.exists()


def test_list_names_every_experiment(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert cli.main(["list"]) == 0
    assert f"experiments: {', '.join(experiments.NAMES)}\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["figure9", "--scale", "laptop"], "unknown experiment 'figure9'; known: figure2, table1"),
        (
            ["table2", "--scale", "laptop", "--only", "adam"],
            "table2 has no arm 'adam' at scale laptop; known: sgd, sgd_random, uniform, bilevel",
        ),
    ],
)
def test_a_wrong_name_lists_the_right_ones(args, message, capsys):
    assert cli.main(["experiment", *args]) == 2
    assert message in capsys.readouterr().err


def test_steps_are_those_of_the_run(tmp_path):
    for changes in ({}, {"sampling": "random"}, {"k": 8, "b": 4, "train_size": 1000}):
        config = tiny.config(**changes)
        arm = Arm("arm", config, Panel("panel"), "arm")
        real = config.epochs * trainer.load_problem(config).order.steps_per_epoch
        assert 0 <= runner.steps(arm) - real <= 0.15 * real + config.epochs


def test_averaged_crops_count_in_the_estimated_time():
    (arm,) = (a for a in experiments.load("figure5").arms("paper") if a.label == "part100-sgd")
    flat = dataclasses.replace(arm.config, augmentation="none")
    times = [runner.seconds(a, "paper") for a in (arm, dataclasses.replace(arm, config=flat))]
    # 1,000 epochs: three passes' work for each of 4,992 images, and a pass for each of 5,000
    # training and 4,952 test images, or for each of their ten crops
    once, ten = 3 * 78 * 64 + 9952, 3 * 78 * 64 + 99520
    assert times == pytest.approx([1000 * 1.4e9 * passes / 1e13 for passes in (ten, once)])
    views = some(augment.preset("voc", (384, 384, 3)).views)
    assert jax.eval_shape(views, jax.random.key(0), jnp.ones((384, 384, 3))).shape[0] == 10


# ------------------------------------------------------------------------------- the runner


def arms_of(scale):
    panel = Panel("digits")
    first = compare(tiny.config(epochs=1, noise="symmetric"), ("uniform", "bilevel"), panel)
    then = Arm(
        "then", tiny.config(epochs=1), panel, "then", after="bilevel",
        inputs=lambda run: {"pretrained": str(run)},
    )  # fmt: skip
    return [*first, then]


@pytest.fixture
def choice(tmp_path):
    experiment = Experiment("small", "small", "", arms_of, {"laptop": (0, 1), "paper": (0,)})
    return runner.Choice(experiment, "laptop", tmp_path)


@pytest.mark.slow
def test_a_whole_experiment(choice, tmp_path, monkeypatch):
    out = console()
    summary = runner.run(choice, out)
    folder = tmp_path / "small-laptop"
    assert json.loads((folder / "summary.json").read_text()) == summary
    assert list(summary) == ["uniform", "bilevel", "then"]
    for label, row in summary.items():
        assert set(row) >= FIGURES
        assert row["seeds"] == [0, 1]
        last = [read_metrics(folder / f"{label}-s{seed}")[-1]["test"] for seed in (0, 1)]
        assert row["test_last_mean"] == pytest.approx(np.mean(last))
        assert row["test_last_std"] == pytest.approx(np.std(last, ddof=1))
        assert row["command"] == (
            f"python -m train experiment small --scale laptop --only {label} --seeds 0 1"
        )
        assert row["memory_mb_mean"] > 100
    assert "[6/6] then, seed 1: test " in shown(out)
    config = json.loads((folder / "then-s1" / "config.json").read_text())
    assert config["pretrained"] == str(folder / "bilevel-s1")

    # Again: nothing is trained, and arms that were not asked for stay in the summary.
    monkeypatch.setattr(trainer, "loop", lambda *args: pytest.fail("trained again"))
    out = console()
    again = runner.run(dataclasses.replace(choice, only=("uniform",), seeds=(0,)), out)
    assert again == summary
    assert "1 arms, 1 seeds, 1 runs" in shown(out)
    assert "finished before" in shown(out)


@pytest.mark.slow
def test_what_another_process_trains_is_left_to_it(choice, tmp_path):
    config = dataclasses.replace(arms_of("laptop")[1].config, seed=0)
    chosen = dataclasses.replace(choice, seeds=(0,))
    out = console()
    with RunDirectory(tmp_path / "small-laptop" / "bilevel-s0", config):
        summary = runner.run(chosen, out)
    assert list(summary) == ["uniform"]
    assert "bilevel, seed 0: in use by another process" in shown(out)
    assert "then, seed 0: needs bilevel, which is not finished" in shown(out)
    assert list(runner.run(chosen, console())) == ["uniform", "bilevel", "then"]


def test_another_config_in_the_folder_is_an_error(choice):
    chosen = dataclasses.replace(choice, only=("uniform",), seeds=(0,))
    runner.run(chosen, console())
    with pytest.raises(RuntimeError, match="holds a run of another config: mu is 0.01 there"):
        runner.run(dataclasses.replace(chosen, changes={"mu": 0.1}), console())


@pytest.mark.slow
def test_an_arm_that_ends_in_nan_does_not_keep_the_others(choice):
    def arms(scale):
        first, second, _ = arms_of(scale)
        diverging = dataclasses.replace(first.config, learning_rate=1e30, method="sgd")
        return [dataclasses.replace(first, config=diverging), second]

    experiment = dataclasses.replace(choice.experiment, arms=arms)
    chosen = dataclasses.replace(choice, experiment=experiment, seeds=(0,))
    with pytest.raises(trainer.NotFiniteError, match=r"\[1/2\] uniform, seed 0: step \d left NaN"):
        runner.run(chosen, console())
    summary = json.loads((chosen.folder() / "summary.json").read_text())
    assert list(summary) == ["bilevel"]


def test_only_brings_along_what_an_arm_starts_from(choice):
    labels = [arm.label for arm in dataclasses.replace(choice, only=("then",)).arms()]
    assert labels == ["bilevel", "then"]


def test_arms_of_another_experiment_are_trained_once(tmp_path):
    table3, figure3 = (
        runner.Choice(experiments.load(name), "laptop", tmp_path) for name in ("table3", "figure3")
    )
    (arm,) = (arm for arm in table3.arms() if arm.label == "noise40-mixup")
    (same,) = (arm for arm in figure3.arms() if arm.label == "noise40-mixup")
    assert arm.config == same.config
    assert table3.directory(arm, 2) == figure3.directory(same, 2)
    assert table3.directory(arm, 2) == tmp_path / "figure3-laptop" / "noise40-mixup-s2"


# ------------------------------------------------------------- whole runs, the original formats


@pytest.fixture(scope="module")
def fashion(tmp_path_factory):
    """Fashion-MNIST as four IDX files: 400 training and 40 test images of noise, ten classes."""
    folder = tmp_path_factory.mktemp("idx")
    rng = np.random.default_rng(0)
    for part, count in (("train", 400), ("t10k", 40)):
        labels = np.arange(count) % 10
        images = (rng.integers(0, 128, (count, 28, 28)) + 12 * labels[:, None, None]).astype("u1")
        for kind, header, content in (
            ("images-idx3", struct.pack(">4I", 0x803, count, 28, 28), images.tobytes()),
            ("labels-idx1", struct.pack(">2I", 0x801, count), labels.astype("u1").tobytes()),
        ):
            (folder / f"{part}-{kind}-ubyte.gz").write_bytes(gzip.compress(header + content))
    return folder


def run(name, scale, root, data_dir, only=(), **changes):
    chosen = runner.Choice(
        experiments.load(name), scale, root, only, (0,), str(data_dir), {"epochs": 1, **changes}
    )
    summary = runner.run(chosen, console())
    arms = [arm.label for arm in chosen.arms()]
    assert list(summary) == arms
    for row in summary.values():
        assert set(row) >= FIGURES
        assert 0 <= row["test_last_mean"] <= 100
    return chosen


SMALL = {"train_size": 320, "test_size": 40, "hidden": (8,)}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "only"),
    [
        ("figure2", ("noise50-ratio0.25", "noise50-k4", "noise0-uniform-k2", "noise0-b1")),
        ("table1", ("mlp-noise50-a", "mlp-noise50-b", "mlp-noise0-c", "mlp-noise50-d")),
        ("table2", ("sgd", "bilevel", "coherent")),
        ("table3", ("noise40-bilevel_mixup", "noise40-azadi", "noise40-mentornet")),
        ("figure5", ("part25-sgd", "part100-bilevel")),
        ("practice", ("fashion-network40-elr", "fashion-pair40-coherent_mixup")),
    ],
)
def test_a_laptop_experiment_end_to_end(name, only, fashion, tmp_path):
    run(name, "laptop", tmp_path, fashion, only, **SMALL)


@pytest.mark.slow
def test_the_convolutional_laptop_arms_end_to_end(fashion, tmp_path):
    small = {"train_size": 160, "test_size": 20, "k": 2, "b": 4}
    run("figure4", "laptop", tmp_path, fashion, ("noise50-uniform",), **small)
    for name, arm in (
        ("figure2", "cifarnet-noise50-k4"),  # before figure 3, whose arm of k = 8 is its own
        ("figure3", "cifarnet-noise50-bilevel"),
        ("table1", "cifarnet-noise50-b"),
    ):
        run(name, "laptop", tmp_path, fashion, (arm,), **small)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:never drawn")  # so small a teacher knows few classes
def test_table_4_trains_on_the_labels_of_its_teacher(fashion, tmp_path):
    chosen = run("table4", "laptop", tmp_path, fashion, ("noisy-sgd", "noisy-bilevel"), **SMALL)
    folder = chosen.folder()
    given, true = noise.load(folder / "teacher-s0" / "labels.npz")
    assert (given != true).any()
    for label in ("noisy-sgd", "noisy-bilevel"):
        np.testing.assert_array_equal(noise.load(folder / f"{label}-s0" / "noise.npz")[0], given)


@pytest.mark.slow
def test_clothing_is_fine_tuned_from_the_noisy_run(fashion, tmp_path):
    small = {**SMALL, "learning_rate": 1e-9}
    chosen = run("clothing1m", "laptop", tmp_path, fashion, ("clean-bilevel",), **small)
    noisy, clean = (
        read_metrics(chosen.folder() / f"{n}-bilevel-s0")[-1] for n in ("noisy", "clean")
    )
    assert clean["test"] == pytest.approx(noisy["test"], abs=1e-6)


def jpegs(count, size=(240, 240)):
    return [jpeg(int(value), size) for value in np.linspace(5, 250, count)]


@pytest.fixture(scope="module")
def clothing(tmp_path_factory):
    """Clothing1M, two classes of 16 images."""
    root = tmp_path_factory.mktemp("clothing")
    folder = root / "archive"
    (folder / "images").mkdir(parents=True)
    for split, kind in (
        ("noisy_train", "noisy"), ("clean_train", "clean"), ("clean_val", "clean"),
        ("clean_test", "clean"),
    ):  # fmt: skip
        keys = [f"images/{split}{i}.jpg" for i in range(16)]
        for key, content in zip(keys, jpegs(16), strict=True):
            (folder / key).write_bytes(content)
        (folder / f"{split}_key_list.txt").write_text("".join(f"{key}\n" for key in keys))
        with open(folder / f"{kind}_label_kv.txt", "a") as file:
            file.writelines(f"{key} {i % 2}\n" for i, key in enumerate(keys))
    data.prepare("clothing1m", root / "tfds", folder)
    return root / "tfds"


@pytest.mark.slow
def test_clothing1m_at_scale_paper_end_to_end(clothing, tmp_path):
    small = {"k": 2, "b": 2, "image_size": 227, "pretrained": None}
    run("clothing1m", "paper", tmp_path, clothing, ("noisy-bilevel",), **small)


@pytest.mark.slow
class TestWithTensorFlow:
    @pytest.mark.filterwarnings("ignore:never drawn")  # 32 images, up to 100 classes
    def test_cifar(self, tmp_path, publisher):
        rng = np.random.default_rng(0)
        for name in ("cifar10", "cifar100"):
            coarse = b"\0" if name == "cifar100" else b""

            def records(count, coarse=coarse):
                return b"".join(
                    coarse + bytes([i % 2]) + rng.integers(0, 256, 3072, "u1").tobytes()
                    for i in range(count)
                )

            if name == "cifar10":
                root = "cifar-10-batches-bin/"
                members = {f"{root}data_batch_{i}.bin": records(32) for i in range(1, 6)}
                members |= {
                    f"{root}test_batch.bin": records(8),
                    f"{root}batches.meta.txt": "\n".join(f"c{i}" for i in range(10)).encode(),
                }
            else:
                root = "cifar-100-binary/"
                members = {
                    f"{root}train.bin": records(160),
                    f"{root}test.bin": records(8),
                    f"{root}fine_label_names.txt": "\n".join(f"c{i}" for i in range(100)).encode(),
                    f"{root}coarse_label_names.txt": "\n".join(map(str, range(20))).encode(),
                }
            tar(tmp_path / f"cifar-{name[5:]}-binary.tar.gz", members, "w:gz")
            publisher(name)
            data.prepare(name, tmp_path / "tfds", tmp_path)
        small = {"k": 2, "b": 4, "train_size": 32}
        for name, only in (
            ("figure2", ("cifarnet-noise50-k4",)),
            ("table1", ("cifarnet-noise50-b",)),
            ("table2", ("bilevel",)),
            ("figure3", ("cifar100-noise20-bilevel",)),
            ("figure4", ("cifar10-noise50-uniform",)),
            ("table3", ("cifar100-bilevel_mixup",)),
        ):
            run(name, "paper", tmp_path / "runs", tmp_path / "tfds", only, **small)

    def test_voc(self, tmp_path, publisher):
        def annotation(name):
            return (
                "<annotation><size><width>240</width><height>240</height></size>"
                f"<object><name>{name}</name><pose>Left</pose><truncated>0</truncated>"
                "<difficult>0</difficult><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>100</xmax>"
                "<ymax>100</ymax></bndbox></object></annotation>"
            ).encode()

        def members(sets):
            root = "VOCdevkit/VOC2007/"
            files = {}
            for split, first in sets.items():
                images = [f"{first + i:06d}" for i in range(8)]
                files[f"{root}ImageSets/Main/{split}.txt"] = "\n".join([*images, ""]).encode()
                for i, (image, content) in enumerate(zip(images, jpegs(8), strict=True)):
                    files[f"{root}JPEGImages/{image}.jpg"] = content
                    files[f"{root}Annotations/{image}.xml"] = annotation(("cat", "dog")[i % 2])
            return files

        tar(tmp_path / "VOCtrainval_06-Nov-2007.tar", members({"train": 0, "val": 100}))
        tar(tmp_path / "VOCtest_06-Nov-2007.tar", members({"test": 200}))
        publisher("voc")
        data.prepare("voc/2007", tmp_path / "tfds", tmp_path)
        small = {"k": 2, "b": 2, "train_size": 8}
        run("figure5", "paper", tmp_path, tmp_path / "tfds", ("part25-bilevel",), **small)

    def test_imagenet(self, tmp_path):
        pytest.importorskip("tensorflow")
        synsets = ["n01440764", "n01484850"]
        for name in synsets:
            images = {f"{name}_{i}.JPEG": content for i, content in enumerate(jpegs(8))}
            tar(tmp_path / f"{name}.tar", images)
        tar(
            tmp_path / "ILSVRC2012_img_train.tar",
            {f"{name}.tar": (tmp_path / f"{name}.tar").read_bytes() for name in synsets},
        )
        tar(
            tmp_path / "ILSVRC2012_img_val.tar",
            {f"ILSVRC2012_val_0000000{i}.JPEG": content for i, content in enumerate(jpegs(4), 1)},
        )
        data.prepare("imagenet2012", tmp_path / "tfds", tmp_path)
        # Such a teacher gives any labels: classes may be too small for stratified mini-batches.
        small = {"k": 2, "b": 2, "sampling": "random"}
        run("table4", "paper", tmp_path, tmp_path / "tfds", ("noisy-bilevel",), **small)


def test_a_flag_for_every_choice():
    assert Config().flags() == []
    config = Config(
        method="bilevel",
        hidden=(3, 4),
        normalize=False,
        clean_validation=True,
        validation_ratio=0.1,
    )
    assert config.flags() == [
        "--hidden", "3", "4", "--method", "bilevel", "--no-normalize", "--validation-ratio", "0.1",
        "--clean-validation",
    ]  # fmt: skip


def test_a_wrong_experiment_is_a_config_error():
    with pytest.raises(ConfigError, match="unknown experiment 'figure1'"):
        experiments.load("figure1")
