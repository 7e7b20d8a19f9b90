"""Type-checks the code of README and docs, page by page: ``make check``.

Every page's blocks are put together, in their order, as one module. README's keep to all rules.
What other pages show of optax's trees and scikit-learn's data, whose types are unions, is checked
for neither arguments nor attributes nor indices; and sections may use a name again.
"""

import pathlib
import re
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).parents[1]
UNIONS = "# pyright: " + ", ".join(
    f"report{rule}=false"
    for rule in ("ArgumentType", "AttributeAccessIssue", "IndexIssue", "Redeclaration")
)
BLOCK = re.compile(r"^```(?:\{testcode\}|\{testsetup\}|python)[^\n]*\n(.*?)^```", re.M | re.S)


def code(page: pathlib.Path) -> str:
    """The Python of a page; empty where it has none."""
    blocks = BLOCK.findall(page.read_text())
    lines = [line for block in blocks for line in block.splitlines()]
    return "\n".join(line for line in lines if not re.match(r":\w+:", line))


def main() -> int:
    """Returns pyright's exit code."""
    build = ROOT / "docs" / "_build"
    build.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=build) as folder:
        for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
            if text := code(page):
                header = "" if page.name == "README.md" else f"{UNIONS}\n"
                module = re.sub(r"\W", "_", page.stem.lower())
                pathlib.Path(folder, f"{module}.py").write_text(f"{header}{text}\n")
        command = [sys.executable, "-m", "pyright", "--pythonpath", sys.executable, folder]
        return subprocess.run(command, cwd=ROOT).returncode


if __name__ == "__main__":
    sys.exit(main())
