"""What the README tells people to type works as it stands."""

import pathlib
import re

ROOT = pathlib.Path(__file__).parents[2]
TEXT = (ROOT / "README.md").read_text()
PROSE = re.sub(r"^```.*?^```|(?<=\])\([^)]*\)", "", TEXT, flags=re.DOTALL | re.MULTILINE)


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


def test_every_block_is_one_that_is_tested():
    languages = re.findall(r"^```(\w+)$", TEXT, re.MULTILINE)
    assert set(languages) == {"sh", "diff", "python"}


def test_commands_are_known():
    from train.__main__ import USAGE

    commands = re.findall(r"python -m train (\w+)", TEXT)
    assert commands
    for command in commands:
        assert re.search(rf"^  {command} ", USAGE, re.MULTILINE), command


def test_extras_and_options_are_known():
    import dataclasses
    import tomllib

    from train.clean import Clean

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for extra in re.findall(r"pip install -e '\.\[(\w+)\]'", TEXT):
        assert extra in project["optional-dependencies"], extra
    assert f"pip install {project['name']}`" in TEXT
    (line,) = re.findall(r"^python -m train clean (.*)$", TEXT, re.MULTILINE)
    known = {field.name.replace("_", "-") for field in dataclasses.fields(Clean)}
    assert set(re.findall(r"--([\w-]+)", line)) <= known


def test_make_targets_are_known():
    makefile = (ROOT / "Makefile").read_text()
    targets = re.findall(r"`make (\w+)`", TEXT)
    assert targets
    for target in targets:
        assert f"\n{target}:" in makefile, target


def test_links_lead_somewhere():
    for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", TEXT):
        assert (ROOT / link).exists(), link


def test_a_newcomer_finds_the_doors():
    head = TEXT[: TEXT.index("\n## ")]
    for page in ("tutorial_folder", "tutorial_loop", "tutorial_paper", "use_the_network"):
        assert f"docs/{page}.md" in head, page
    for picture in re.findall(r'(?:src|srcset)="([^"]+)"', TEXT):
        assert (ROOT / picture).is_file(), picture
    assert 'src="docs/images/suspects.png"' in TEXT
    for word in ("When not to use it", "PyTorch", "stop early", "arXiv", "CITATION.cff"):
        assert word in TEXT, word


def test_the_figures_are_those_of_the_study():
    import json

    cases = json.loads((ROOT / "docs/results/steps.json").read_text())
    for case, row in (
        ("Fashion-MNIST 4,000, MLP, 50% wrong", "MLP, 4,000 images: plain training"),
        ("Fashion-MNIST 1,000, small residual network, 50% wrong", "residual network"),
    ):
        plain = TEXT[TEXT.index(row) :]
        coherent = plain[plain.index("**coherent steps**") :]
        for text, method in ((plain, "plain"), (coherent, "coherent")):
            shown = [float(x) for x in re.findall(r"\d+\.\d", text[: text.index("\n")])]
            figures = cases[case][method]
            assert shown == [round(figures[x]["mean"], 1) for x in ("last", "stopped", "best")]


def test_it_is_read_in_a_minute():
    assert len(TEXT.splitlines()) <= 110
    assert len(TEXT.split()) <= 900
    assert len(re.findall(r"\d[\d.,]*", PROSE)) <= 25
