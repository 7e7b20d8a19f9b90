"""What the README tells people to type works as it stands."""

import pathlib
import re

ROOT = pathlib.Path(__file__).parents[2]
TEXT = (ROOT / "README.md").read_text()


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", TEXT, re.DOTALL | re.MULTILINE)


def test_the_blocks_of_python_train():
    """Pasted one after the other; the labels are wrong by 30%, and the true ones are known."""
    names = {}
    for block in blocks("python"):
        exec(block, names)
        x = names["x"]
        right = ((x @ names["params"]).argmax(axis=1) == (x[:, 0] > 0)).mean()
        assert right > 0.7, block


def test_the_diff_is_in_the_loop():
    (diff,) = blocks("diff")
    loop = " ".join(blocks("python")[0].split())
    for line in diff.splitlines():
        if line[0] != "-":
            assert " ".join(line[1:].replace("1e-3", "1e-2").split()) in loop


def test_commands_are_known():
    from train.__main__ import USAGE

    commands = re.findall(r"python -m train (\w+)", TEXT)
    assert commands
    for command in commands:
        assert re.search(rf"^  {command} ", USAGE, re.MULTILINE), command


def test_make_targets_are_known():
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"`make (\w+)`", TEXT):
        assert f"\n{target}:" in makefile, target


def test_links_lead_somewhere():
    for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", TEXT):
        assert (ROOT / link).exists(), link


def test_it_is_read_in_a_minute():
    assert len(TEXT.splitlines()) <= 110
    assert len(TEXT.split()) <= 900
