"""Writes ARCHITECTURE.md's table of modules from their docstrings: `python scripts/write_map.py`.

`tests/arch/test_house.py` holds the file against what this makes, so a line is changed where the module says it.
"""

import ast
import inspect
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MAP = ROOT / "ARCHITECTURE.md"
HEADING = "## Modules\n"


def _docstring(path: Path) -> str:
    """Of a module that begins with it; else the empty string. The code below it is not parsed, which took a second."""
    text = path.read_text()
    return inspect.cleandoc(ast.literal_eval(text[: text.index('"""', 3) + 3])) if text.startswith('"""') else ""


def _first_sentences(path: Path) -> str:
    """The first paragraph on one line, with no full stop at its end: a cell of a table."""
    paragraph = _docstring(path).partition("\n\n")[0]
    return " ".join(paragraph.split()).rstrip(".").replace("|", "\\|")


def modules_table() -> str:
    """All that follows the heading: for each package its docstring, then a line a module."""
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    parts = [HEADING]
    for name in packages:
        folder = ROOT / name.replace(".", "/")
        parts.append(f"\n### {name.replace('.', '/')}/\n\n{_docstring(folder / '__init__.py')}\n")
        modules = sorted(path for path in folder.glob("*.py") if path.name != "__init__.py")
        if modules:
            parts.append("\n| module | |\n|---|---|\n")
            parts += [f"| `{path.name}` | {_first_sentences(path)} |\n" for path in modules]
    return "".join(parts)


def main() -> None:
    """Replace the section in the file."""
    before = MAP.read_text().partition(HEADING)[0]
    MAP.write_text(before + modules_table())


if __name__ == "__main__":
    main()
