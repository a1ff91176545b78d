"""Tables of the pages against the numbers that they were made from.

`<!-- numbers/NAME.json -->` above a table names a file of {"command", "columns", "rows"}. A row is
its title and its cells; a cell is a number, [mean, error], null or text. The numbers of a row that
is a title alone were not kept.
"""

import json
import re
from collections import Counter
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs"
# Page → number of its tables whose results are in a file. The results of all others were not kept.
NUM_TABLES = {
    "enhancement.md": 6,
    "results/ablations.md": 4,
    "results/generation.md": 1,
    "results/resynthesis.md": 1,
}
MARKED = r"<!-- (\S+\.json) -->\n\n((?:\|.*\n)+)"
TABLES = []  # (page, file of numbers, lines of the table)
for page in NUM_TABLES:
    for name, table_lines in re.findall(MARKED, (DOCS / page).read_text()):
        TABLES.append((page, (DOCS / page).parent / name, table_lines))


def cells_of(line: str) -> list[str]:
    cells = line.strip().strip("|").split("|")
    return [cell.replace("*", "").replace("`", "").strip() for cell in cells]


def numbers_of(cell: str) -> list[str]:
    return cell.replace("−", "-").replace(",", "").split(" ± ")


def is_rounded(text: str, number: float) -> bool:
    """Return whether a text is the number, rounded to the text's decimals."""
    if not re.fullmatch(r"-?\d*\.?\d+", text):
        return False
    decimals = len(text.partition(".")[2])
    return abs(float(text) - number) <= 0.5001 * 10.0**-decimals


def says(cell: str, value) -> bool:
    """Return whether a cell of a page says a value: a number, [mean, error], None or text."""
    if value is None or isinstance(value, str):
        return cell == (value or "")
    numbers = value if isinstance(value, list) else [value]
    written = numbers_of(cell)
    if len(written) > len(numbers):
        return False
    return all(is_rounded(*pair) for pair in zip(written, numbers, strict=False))


def differences(lines: str, table: dict) -> list[str]:
    """Return where a table of a page is not that of its numbers."""
    heading, _, *rows = map(cells_of, lines.splitlines())
    values_of = {title: values for title, *values in table["rows"]}
    errors = []
    if heading != table["columns"]:
        errors.append(f"columns {heading}")
    for title in values_of.keys() - {title for title, *_ in rows}:
        errors.append(f"no row {title}")
    for title, values in values_of.items():
        if len(values) not in (0, len(heading) - 1):
            errors.append(f"cells of {title}")
    for title, *cells in rows:
        if title not in values_of:  # A row without numbers may say "not measured".
            errors += [f"{title}: {cell}" for cell in cells if re.search(r"\d", cell)]
        for cell, value in zip(cells, values_of.get(title, []), strict=False):
            if not says(cell, value):
                errors.append(f"{title}: {cell}, not {value}")
    return errors


@pytest.mark.parametrize("page, file, lines", TABLES, ids=[file.stem for _, file, _ in TABLES])
def test_a_page_says_what_was_measured(page, file, lines):
    assert differences(lines, json.loads(file.read_text())) == []


def test_the_held_tables_are_these():
    """Fails if a page lost its mark, or a file of numbers is not on any page."""
    assert Counter(page for page, _, _ in TABLES) == NUM_TABLES
    marked_pages = set()
    for page in DOCS.rglob("*.md"):
        if re.search(MARKED, page.read_text()):
            marked_pages.add(page.relative_to(DOCS).as_posix())
    assert marked_pages == set(NUM_TABLES)
    files = sorted(file.resolve() for _, file, _ in TABLES)
    assert files == sorted((DOCS / "results" / "numbers").iterdir())


def test_a_wrong_number_is_found():
    """Fails if `differences` misses an error in a table."""
    rows = [["one", [1.2345, 0.056], 2650], ["two", None, "text"], ["three"]]
    numbers = {"columns": ["", "dB", "n"], "rows": rows}
    lines = [
        "| | dB | n |",
        "|---|---|---|",
        "| **one** | 1.23 ± .06 | 2,650 |",
        "| two | | text |",
        "| three | 9 | |",
    ]
    table = "\n".join(lines)
    assert differences(table, numbers) == []
    assert differences(f"{table}\n| four | | not measured |", numbers) == []
    for old, new in (
        ("1.23", "1.24"),
        (".06", ".05"),
        ("1.23 ± .06", ""),
        ("1.23", "−1.23"),
        ("2,650", "2,651"),
        ("text", "9"),
        ("| two |", "| 2 |"),
        ("dB", "%"),
        ("| two | |", "| two | 3 |"),
    ):
        assert differences(table.replace(old, new), numbers), new
    assert differences(f"{table}\n| four | 4 | |", numbers)
