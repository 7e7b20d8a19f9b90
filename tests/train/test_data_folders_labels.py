"""Lists of labels, for flat folders and as corrections."""

import numpy as np
import pytest
from PIL import Image

from tests.train.known import in_memory, some
from train import data
from train.config import Config
from train.data import labels
from train.problem import load_problem


def write(path, value=100):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (6, 4), (value, 0, 0)).save(path)


def flat(root, *names):
    for i, name in enumerate(names):
        write(root / name, 10 * (i + 1))


def classes(root):
    flat(root, "train/cat/a.png", "train/cat/b.png", "train/dog/a.png", "train/dog/b.png")
    flat(root, "test/cat/t.png", "test/dog/t.png")


def listed(path, *rows, head="file,label"):
    path.write_text("\n".join([head, *rows]) + "\n", encoding="utf-8")
    return path


def load(folder, **options):
    return data.load("folder", folder, **options)


def labelled(dataset):
    names = np.array(dataset.class_names)
    return (
        dict(zip(dataset.train_files, names[dataset.train.labels].tolist(), strict=True)),
        dict(zip(dataset.test_files, names[dataset.test.labels].tolist(), strict=True)),
    )


def skipped(dataset):
    return {(line.part, line.label): line.skipped for line in dataset.account.lines if line.skipped}


def test_a_flat_folder_with_labels(tmp_path):
    flat(tmp_path, "1.png", "2.png", "sub/3.png", "4.png", "5.png")
    (tmp_path / "4.png").write_bytes(b"")  # not listed: nothing to complain of
    listed(tmp_path / "labels.csv", "2.png,dog", "1.png,cat", "sub/3.png,bird")
    loaded = load(tmp_path)
    assert loaded.class_names == ("bird", "cat", "dog")
    assert labelled(loaded) == ({"1.png": "cat", "2.png": "dog", "sub/3.png": "bird"}, {})
    np.testing.assert_array_equal(in_memory(loaded.train)[:, 0, 0, 0], [10, 20, 30])
    assert skipped(loaded) == {("train", ""): {"not in labels.csv": 2, "list of labels": 1}}
    assert f"labels: {tmp_path / 'labels.csv'}" in some(loaded.account).notes
    assert not any(line.converted for line in some(loaded.account).lines)


def test_a_list_with_parts(tmp_path):
    flat(tmp_path, *(f"images/{i}.png" for i in range(5)))
    rows = [
        "0.png,train,cat",
        "1.png,,dog",
        "2.png,test,cat",
        "images/3.png,TEST,dog",
        "4.png,,cat",
    ]
    listed(tmp_path / "labels.csv", *rows, head="file,split,label")
    assert labelled(load(tmp_path)) == (
        {"images/0.png": "cat", "images/1.png": "dog", "images/4.png": "cat"},
        {"images/2.png": "cat", "images/3.png": "dog"},
    )


def test_parts_by_folder_and_labels_by_list(tmp_path):
    flat(tmp_path, "train/1.png", "train/2.png", "test/1.png", "test/2.png", "test/3.png")
    rows = ["train/1.png,a", "train/2.png,b", "test/1.png,b", "test/2.png,a"]
    listed(tmp_path / "labels.csv", *rows)
    loaded = load(tmp_path)
    assert labelled(loaded) == (
        {"train/1.png": "a", "train/2.png": "b"},
        {"test/1.png": "b", "test/2.png": "a"},
    )
    assert skipped(loaded)["test", ""] == {"not in labels.csv": 1}


def test_a_flat_folder_with_a_list_given_by_name(tmp_path):
    flat(tmp_path / "data", "1.png", "2.png")
    path = listed(tmp_path / "mine.csv", "1.png,a", "2.png,b")
    assert labelled(load(tmp_path / "data", labels=path))[0] == {"1.png": "a", "2.png": "b"}
    inside = listed(tmp_path / "data" / "mine.csv", "1.png,b", "2.png,a")
    loaded = load(tmp_path / "data", labels=str(inside))
    assert labelled(loaded)[0] == {"1.png": "b", "2.png": "a"}
    assert skipped(loaded) == {("train", ""): {"list of labels": 1}}


@pytest.mark.filterwarnings("ignore:.*the test part has no picture of fox")
def test_corrections(tmp_path):
    classes(tmp_path / "data")
    path = listed(
        tmp_path / "fixed.csv", "train/cat/a.png,dog", "train/cat/b.png,cat", "train/dog/a.png,fox"
    )
    loaded = load(tmp_path / "data", labels=path)
    train, test = labelled(loaded)
    assert train == {"train/cat/a.png": "dog", "train/cat/b.png": "cat", "train/dog/a.png": "fox"}
    assert test == {"test/cat/t.png": "cat", "test/dog/t.png": "dog"}
    assert skipped(loaded) == {("train", "dog"): {"not in fixed.csv": 1}}
    converted = {x.label: x.converted for x in some(loaded.account).lines if x.part == "train"}
    said = {"relabelled by fixed.csv": 1}
    assert converted == {"cat": {}, "dog": said, "fox": said}


def test_corrections_of_a_folder_with_a_list(tmp_path):
    """The test part keeps the labels of the folder's own list."""
    flat(tmp_path, "1.png", "2.png", "3.png", "4.png", "5.png")
    rows = ["1.png,a,", "2.png,b,", "3.png,a,test", "4.png,b,test"]
    listed(tmp_path / "labels.csv", *rows, head="file,label,split")
    path = listed(tmp_path / "fixed.csv", "2.png,a", "5.png,b")
    loaded = load(tmp_path, labels=path)
    assert labelled(loaded) == ({"2.png": "a", "5.png": "b"}, {"3.png": "a", "4.png": "b"})
    assert skipped(loaded) == {
        ("train", "a"): {"not in fixed.csv": 1},
        ("train", ""): {"list of labels": 2},
    }


def test_corrections_leave_bad_files_out(tmp_path):
    classes(tmp_path / "data")
    (tmp_path / "data" / "train" / "cat" / "bad.png").write_bytes(b"")
    with pytest.raises(ValueError, match="1 file of"):
        load(tmp_path / "data")
    names = ["cat/a.png,cat", "cat/b.png,cat", "dog/a.png,dog", "dog/b.png,dog"]
    path = listed(tmp_path / "fixed.csv", *(f"train/{name}" for name in names))
    loaded = load(tmp_path / "data", labels=path)
    assert skipped(loaded) == {("train", "cat"): {"not in fixed.csv": 1}}


def test_corrections_that_leave_a_class_without_examples(tmp_path):
    classes(tmp_path / "data")
    names = ["cat/a.png,cat", "cat/b.png,fox"]
    path = listed(tmp_path / "fixed.csv", *(f"train/{name}" for name in names))
    with pytest.raises(ValueError, match="test has classes that train has not: dog"):
        load(tmp_path / "data", labels=path)
    (tmp_path / "data" / "test" / "dog" / "t.png").unlink()
    (tmp_path / "data" / "test" / "cat" / "t.png").unlink()
    with pytest.warns(UserWarning, match=r"fixed\.csv leaves no example of dog|test part has no"):
        loaded = load(tmp_path / "data", labels=path)
    assert some(loaded.account).warnings[0] == "fixed.csv leaves no example of dog"
    path = listed(tmp_path / "fixed.csv", "train/cat/a.png,cat")
    with pytest.raises(ValueError, match="one class only, cat"):
        load(tmp_path / "data", labels=path)


def test_a_class_of_bad_files_alone(tmp_path):
    flat(tmp_path, "1.png", "2.png", "3.png")
    (tmp_path / "3.png").write_bytes(b"x")
    listed(tmp_path / "labels.csv", "1.png,a", "2.png,b", "3.png,c")
    with pytest.raises(ValueError, match=r"3\.png: not a picture"):
        load(tmp_path)
    with pytest.raises(ValueError, match=r"no picture to train on in 1 class: c \(1 not a pict"):
        load(tmp_path, bad_files="skip")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("file,label\n1.png,a\n2.png,b\n", "ab"),
        ("\ufefffile;label\r\n1.png;a\r\n2.png;b\r\n", "ab"),  # as Excel writes it
        ("File\tLABEL\tsure\n1.png\ta\t0.9\n\n./2.png\tb\t1\n", "ab"),
        (' file , label \n"1.png", a \n 2.png,"b"\n1.png,a\n', "ab"),
        ("label,file\nä,1.png\na\u0308 ,2.png\nb,3.png\n", "ääb"),
    ],
)
def test_how_lists_are_written(tmp_path, text, expected):
    flat(tmp_path, "1.png", "2.png", "3.png")
    (tmp_path / "labels.csv").write_bytes(text.encode())
    assert list(labelled(load(tmp_path))[0].values()) == list(expected)


@pytest.mark.parametrize(
    "name", ["a,b.png", 'say "a".png', "a\nb.png", " a.png", "ä;b.png", "a\\b.png"]
)
def test_names_that_need_quoting(tmp_path, name):
    flat(tmp_path / "data", name, "other.png")
    labels.write(tmp_path / "l.csv", [name, "other.png"], ["x, y", "z"])
    loaded = load(tmp_path / "data", labels=tmp_path / "l.csv")
    assert labelled(loaded)[0] == {name: "x, y", "other.png": "z"}


def test_what_is_written_is_read_again(tmp_path):
    classes(tmp_path)
    loaded = load(tmp_path)
    path = tmp_path / "all.csv"
    names = np.array(loaded.class_names)
    labels.write(path, loaded.train_names, names[loaded.train.labels])
    assert path.read_text().startswith("file,label\ntrain/cat/a.png,cat\n")
    again = load(tmp_path, labels=path)
    assert labelled(again) == labelled(loaded)
    assert again.fingerprint == loaded.fingerprint
    assert not path.with_suffix(".csv.tmp").exists()


def test_a_list_says_what_is_held_out(tmp_path):
    classes(tmp_path)
    loaded = load(tmp_path)
    assert loaded.held_out is None
    path = tmp_path / "all.csv"
    names = [loaded.class_names[label] for label in loaded.train.labels]
    kept = {"train/cat/b.png", "train/dog/a.png"}
    labels.write(path, loaded.train_names, names, held_out=kept)
    assert path.read_text().startswith("file,label,split\ntrain/cat/a.png,cat,train\n")
    again = load(tmp_path, labels=path)
    assert labelled(again) == labelled(loaded)
    assert {again.train_names[i] for i in some(again.held_out)} == kept
    config = {"dataset": "folder", "data_dir": str(tmp_path), "labels": str(path), "k": 2, "b": 1}
    problem = load_problem(Config(**config, held_out=0.1))
    assert set(problem.description.held_out) == kept
    # Zero turns it off all the same.
    assert load_problem(Config(**config, held_out=0, method="sgd")).held_out is None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "must have the columns file,label and may have split, .* which is ''"),
        (b"id,breed\n1,cat\n", "must have the columns file,label .* which is 'id,breed'"),
        (b"1.png,cat\n", "named in its first line, which is '1.png,cat'"),
        (b"file,label\n\xff\xfe\n", "is not text in UTF-8"),
        (b'file,label\n"1.png,cat\n', r"labels\.csv:2 is not a line of a CSV file"),
        (b"file,label\n1.png\n,cat\n", "2 rows cannot be used: line 2: no label; line 3: no file"),
        (b"file,label,split\n1.png,a,dev\n", "line 2: split is 'dev', not train, held_out"),
        (b"file,label\n1.png,a\n1.png,b\n", r"line 3: 1\.png is also in line 2, differently"),
        (b"file,label\n1.png,a\n./1.png,b\n", r"line 3: \./1\.png is also in line 2, differently"),
        (
            b"file,label\n9.png,a\nnotes.txt,a\n1.png,b\n",
            r"2 rows cannot be used \(each must name one picture of the folder\): line 2: 9\.png; "
            r"line 3: notes\.txt \(not a picture\)",
        ),
        (b"file,label\nsame.png,a\n1.png,b\n", r"1 row cannot be used .*: line 2: same\.png"),
    ],
)
def test_wrong_lists(tmp_path, content, message):
    flat(tmp_path, "1.png", "2.png", "x/same.png", "y/same.png")
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "labels.csv").write_bytes(content)
    if b"breed" in content or b"1.png,cat" in content or not content:
        (tmp_path / "y" / "same.png").unlink()  # one class by folders: the list is needed
        (tmp_path / "y").rmdir()
    with pytest.raises(ValueError, match=message):
        load(tmp_path)


def test_a_table_of_something_else_beside_classes(tmp_path):
    classes(tmp_path)
    listed(tmp_path / "labels.csv", "1,cat", head="id,breed")
    with pytest.warns(UserWarning, match=r"not used: .*labels\.csv must have the columns"):
        loaded = load(tmp_path)
    assert len(loaded.train) == 4
    assert some(loaded.account).warnings[0].startswith("not used: ")


def test_a_missing_list(tmp_path):
    classes(tmp_path)
    with pytest.raises(
        data.DataNotFoundError, match=r"no\.csv does not exist \(a list of labels\)"
    ):
        load(tmp_path, labels=tmp_path / "no.csv")
    with pytest.raises(ValueError, match=r"train cannot be read: Is a directory"):
        load(tmp_path, labels=tmp_path / "train")
    with pytest.raises(data.DataNotFoundError, match=r"no\.csv does not exist"):
        data.load("digits", labels=tmp_path / "no.csv")


# Data sets that are no folders


def test_corrections_of_digits(tmp_path):
    plain = data.load("digits")
    kept = np.delete(np.arange(1200), [3, 700])
    given = plain.train.labels.copy()
    given[[5, 1199]] = (given[[5, 1199]] + 1) % 10
    path = tmp_path / "labels.csv"
    names = [plain.train_names[i] for i in kept.tolist()]
    labels.write(path, names, map(str, given[kept]), column="example")
    assert data.load("digits", labels=path).held_out is None
    labels.write(path, names, map(str, given[kept]), "example", held_out={names[4], names[900]})
    loaded = data.load("digits", labels=path)
    assert some(loaded.held_out).tolist() == [4, 900]
    np.testing.assert_array_equal(loaded.train.images, in_memory(plain.train)[kept])
    np.testing.assert_array_equal(loaded.train.labels, given[kept])
    assert loaded.train.labels.dtype == np.int32
    assert list(loaded.train_names) == names
    np.testing.assert_array_equal(loaded.train_numbers, kept)
    np.testing.assert_array_equal(loaded.test.labels, plain.test.labels)
    counted = {"not in labels.csv": 0, "relabelled by labels.csv": 0}
    for line in some(loaded.account).lines:
        for reason, n in {**line.skipped, **line.converted}.items():
            counted[reason] += n
    assert counted == {"not in labels.csv": 2, "relabelled by labels.csv": 2}
    assert some(loaded.account).examples("test")["0"] == (plain.test.labels == 0).sum()
    old, new = some(plain.fingerprint), some(loaded.fingerprint)
    assert data.fingerprint.differences(old, new) == [
        "there were 1,200 training examples, now 1,198",
        "the training images differ",
        "the training labels differ",
        "the training numbers differ",
    ]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (["1200,3"], "line 2: no example 1200, only 0 to 1199"),
        (["-1,3", "x,3"], "2 rows cannot be used: line 2: no example -1, .* line 3: no example x"),
        (["1,ten"], "line 2: no class ten"),
        (["1,3", "01,4"], "line 3: example 1 has another label before"),
        ([f"{i},1" for i in range(5)], r"leaves no example of 0, 2, 3, \.\.\. \(9 in all\)"),
    ],
)
def test_wrong_corrections_of_digits(tmp_path, rows, message):
    path = listed(tmp_path / "labels.csv", *rows, head="example,label")
    with pytest.raises(ValueError, match=message):
        data.load("digits", labels=path)
    with pytest.raises(ValueError, match="must have the columns example,label"):
        data.load("digits", labels=listed(tmp_path / "labels.csv", "a.png,1"))
