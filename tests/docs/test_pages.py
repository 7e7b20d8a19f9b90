"""What holds for all pages of the documentation."""

import itertools
import pathlib
import re

DOCS = pathlib.Path(__file__).parents[2] / "docs"
PAGES = {file.name: file.read_text() for file in sorted(DOCS.glob("*.md"))}


def test_they_are_short():
    """All but the appendix; the tables that are generated lie in other files."""
    part = PAGES["index.md"].split(":caption: Appendix\n:hidden:\n\n")[1]
    appendix = part[: part.index("```")].split()
    words = {name: len(text.split()) for name, text in PAGES.items()}
    main = sum(count for name, count in words.items() if name[:-3] not in appendix)
    assert main <= 14_000, words
    assert words["coherent_steps.md"] <= 1_500


def test_code_is_run():
    """Or is of a kind that says that it is not: it wants a network, other machines, hours."""
    run = {"{testcode}", "{testsetup}", "{testcleanup}", "{testoutput}", "{doctest}", "console"}
    not_run = {"diff", "sh", "text"}
    shown = {"{figure}", "{image}", "{toctree}", "{include}", "{literalinclude}"}
    for name, text in PAGES.items():
        kinds = set(re.findall(r"^```([^\s`]+)", text, re.MULTILINE))
        assert kinds <= run | not_run | shown, name
        if "console" in kinds:
            assert f'consoles.check("{name}"' in text, name


def test_consoles_that_are_run_in_parts_are_all_run():
    for name, text in PAGES.items():
        calls = re.findall(rf'consoles\.check\("{name}"(.*?)\)', text)
        parts = [dict(re.findall(r"(first|last)=(\d+)", call)) for call in calls]
        if parts:
            assert "first" not in parts[0], name
            assert "last" not in parts[-1], name
        for one, two in itertools.pairwise(parts):
            assert one["last"] == two["first"], name
