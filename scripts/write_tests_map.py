"""Writes the lists in tests/README.md from docstrings: `python scripts/write_tests_map.py`. A test holds them equal."""

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "tests" / "README.md"
HEADING = "## Helpers (`tests/support`)\n"


def _first_paragraph(path: Path) -> str:
    paragraph = (ast.get_docstring(ast.parse(path.read_text())) or "").partition("\n\n")[0]
    return " ".join(paragraph.split()).replace("|", "\\|")


def helpers_table() -> str:
    """All that follows the heading: a line a helper."""
    helpers = sorted(path for path in (ROOT / "tests" / "support").glob("*.py") if path.name != "__init__.py")
    rows = [f"| `{path.name}` | {_first_paragraph(path)} |\n" for path in helpers]
    return HEADING + "\n| module | |\n|---|---|\n" + "".join(rows)


def main() -> None:
    """Replace the section in the page."""
    PAGE.write_text(PAGE.read_text().partition(HEADING)[0] + helpers_table())


if __name__ == "__main__":
    main()
