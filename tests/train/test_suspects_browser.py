"""The page of suspects in a real browser: marks by keyboard, the filter, the downloaded list."""

import base64
import html.parser
import json
import pathlib
import shutil
import subprocess

import pytest

from tests.train.known import some
from tests.train.test_suspects import CLASSES, made
from train import suspects
from train.data import labels

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "google-chrome", "chromium-browser"))), None
)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(BROWSER is None, reason="neither Chromium nor Chrome is installed"),
]

# What a reader does, then what the page has come to, as an attribute of its root.
SCRIPT = """
<script>
const tile = (i) => document.querySelectorAll("ol li")[i];
const key = (name) => document.activeElement.dispatchEvent(
  new KeyboardEvent("keydown", { key: name, bubbles: true, cancelable: true }));
const pick = (id, value) => {
  const box = document.getElementById(id);
  if (box.type === "checkbox") box.checked = value; else box.value = value;
  box.dispatchEvent(new Event("change"));
};
const shown = () => [...document.querySelectorAll("ol li")].map((x) => !x.hidden);
const place = () => [...document.querySelectorAll("ol li")].indexOf(document.activeElement);
const out = {};
let blob;
URL.createObjectURL = (made) => { blob = made; return "#"; };
%s
document.getElementById("download").click();
blob.text().then((text) => {
  out.csv = text;
  out.said = document.querySelector("output").textContent;
  document.documentElement.dataset.out = btoa(unescape(encodeURIComponent(JSON.stringify(out))));
});
</script>
"""


class Root(html.parser.HTMLParser):
    """What the script left."""

    out = None

    def handle_starttag(self, tag, attrs):
        out = dict(attrs).get("data-out")
        if tag == "html" and out is not None:
            self.out = json.loads(base64.b64decode(out))


def browse(found, folder: pathlib.Path, script: str):
    page = folder / "page.html"
    suspects.write_page(found, page, 200, "labels that look wrong")
    page.write_text(page.read_text().replace("</html>", SCRIPT % script + "</html>"))
    shown = subprocess.run(
        [some(BROWSER), "--headless", "--no-sandbox", "--disable-gpu",
         f"--user-data-dir={folder / 'me'}", "--virtual-time-budget=5000", "--dump-dom",
         page.as_uri()],
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    root = Root()
    root.feed(shown.stdout)
    assert root.out is not None, shown.stderr[-2000:]
    listed = folder / "labels.csv"
    listed.write_text(root.out["csv"])
    return root.out, labels.read(listed)


def found_in(files=True):
    """Five examples, in this order: three above 0, of which the third gets no other suggestion."""
    found = made(
        scores=[3, 2, 1, -1, -2], given=[0, 1, 2, 1, 0], true=[1, 0, 2, 1, 0],
        suggested=[1, 0, 2, 1, 0], files=files,
    )  # fmt: skip
    names = ('train/a, "b".png', *found.names[1:])
    held_out = found.held_out.copy()
    held_out[3] = True
    return found._replace(names=names, held_out=held_out, others=(("train/new.png", CLASSES[2]),))


def test_unmarked_labels_that_look_wrong_are_left_out_unless_asked(tmp_path):
    out, listed = browse(found_in(), tmp_path, "")
    assert [(row.example, row.label, row.held_out) for row in listed.rows] == [
        ("train/103.png", "dog, big", True),
        ("train/104.png", "<cat>", False),
        ("train/new.png", "cow", False),
    ]
    assert "0 marked wrong, 0 right, 0 as suggested; 3 of 6 labels" in out["said"]
    _, listed = browse(found_in(), tmp_path, 'pick("drop", false);')
    assert len(listed.rows) == 6
    assert listed.rows[0].example == 'train/a, "b".png'


def test_marks_by_keyboard(tmp_path):
    script = """
    tile(0).focus(); key("r"); out.next = place();
    key("s"); key("ArrowRight"); key("w");
    tile(2).focus(); key("w"); key("u"); out.undone = place();
    out.marks = [0, 1, 2, 3, 4].map((i) => tile(i).dataset.mark);
    out.pressed = tile(0).querySelector("[value=right]").getAttribute("aria-pressed");
    """
    out, listed = browse(found_in(), tmp_path, script)
    assert (out["next"], out["undone"]) == (1, 2)
    assert out["marks"] == ["right", "suggested", "", "wrong", ""]
    assert out["pressed"] == "true"
    assert {row.example: row.label for row in listed.rows} == {
        'train/a, "b".png': "<cat>",  # marked right, though it looks wrong
        "train/101.png": "<cat>",  # as suggested
        "train/104.png": "<cat>",  # unmarked, and does not look wrong
        "train/new.png": "cow",  # was not ranked
    }
    assert "1 marked wrong, 1 right, 1 as suggested; 4 of 6 labels in the list" in out["said"]
    assert out["said"].endswith("none is left of dog, big")


def test_the_filter_by_class_and_by_mark(tmp_path):
    script = """
    pick("class", "2"); out.cows = shown();
    pick("class", "0"); out.cats = shown();
    pick("class", ""); tile(0).focus(); key("w");
    document.activeElement.blur();
    pick("which", "unmarked"); out.unmarked = shown();
    pick("which", "marked"); out.marked = shown();
    """
    out, _ = browse(found_in(), tmp_path, script)
    assert out["cows"] == [False, False, True, False, False]
    assert out["cats"] == [True, True, False, False, True]  # given or suggested
    assert out["unmarked"] == [False, True, True, True, True]
    assert out["marked"] == [True, False, False, False, False]


def test_examples_by_their_numbers(tmp_path):
    found = found_in(files=False)._replace(names=tuple("34567"), others=())
    page = tmp_path / "page.html"
    suspects.write_page(found, page, 200, "digits")
    assert '"column":"example"' in page.read_text()
