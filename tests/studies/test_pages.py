"""Tables of the pages against the numbers that they were made from.

`<!-- numbers/NAME.json -->` above a table names a file of {"command", "columns", "rows"}: a row is its title and its
cells, a cell a number, [mean, error], null or text. A row that is a title alone has no file any more that holds it.
"""

import json
import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs"
# Page: how many of its tables are held. The results of all others were not kept.
HELD = {
    "enhancement.md": 6,
    "results/ablations.md": 4,
    "results/generation.md": 1,
    "results/resynthesis.md": 1,
}
MARKED = r"<!-- (\S+\.json) -->\n\n((?:\|.*\n)+)"
TABLES = [
    (page, (DOCS / page).parent / file, lines)
    for page in HELD
    for file, lines in re.findall(MARKED, (DOCS / page).read_text())
]


def cells_of(line: str) -> list[str]:
    return [
        cell.replace("*", "").replace("`", "").strip()
        for cell in line.strip().strip("|").split("|")
    ]


def numbers_of(cell: str) -> list[str]:
    return cell.replace("−", "-").replace(",", "").split(" ± ")


def differences(lines: str, held: dict) -> list[str]:
    """What a table of a page says that is not what its numbers say, rounded."""
    heading, _, *rows = map(cells_of, lines.splitlines())
    known = {title: cells for title, *cells in held["rows"]}
    found = [] if heading == held["columns"] else [f"columns {heading}"]
    found += [f"no row {title}" for title in known.keys() - {title for title, *_ in rows}]
    found += [
        f"cells of {title}"
        for title, cells in known.items()
        if len(cells) not in (0, len(heading) - 1)
    ]
    for title, *cells in rows:
        if title not in known:  # as "not measured"
            found += [f"{title}: {cell}" for cell in cells if re.search(r"\d", cell)]
        for cell, value in zip(cells, known.get(title, []), strict=False):
            expected = (
                value
                if isinstance(value, list)
                else [value]
                if isinstance(value, (int, float))
                else []
            )
            written = numbers_of(cell) if expected else []
            digits = [len(text.partition(".")[2]) for text in written]
            right = len(written) <= len(expected) and all(
                re.fullmatch(r"-?\d*\.?\d+", text)
                and abs(float(text) - number) <= 0.5001 * 10.0**-places
                for text, number, places in zip(written, expected, digits, strict=False)
            )
            if not right or (not expected and cell != (value or "")):
                found.append(f"{title}: {cell}, not {value}")
    return found


@pytest.mark.parametrize("page, file, lines", TABLES, ids=[file.stem for _, file, _ in TABLES])
def test_a_page_says_what_was_measured(page, file, lines):
    assert differences(lines, json.loads(file.read_text())) == []


def test_the_held_tables_are_these():
    """A page lost its mark, or a file of numbers is not on any page."""
    assert {page: sum(other == page for other, *_ in TABLES) for page in HELD} == HELD
    marked = {
        page.relative_to(DOCS).as_posix()
        for page in DOCS.rglob("*.md")
        if re.search(MARKED, page.read_text())
    }
    assert marked == set(HELD)
    assert sorted(file.resolve() for _, file, _ in TABLES) == sorted(
        (DOCS / "results" / "numbers").iterdir()
    )


def test_a_wrong_number_is_found():
    held = {
        "columns": ["", "dB", "n"],
        "rows": [["one", [1.2345, 0.056], 2650], ["two", None, "text"], ["three"]],
    }
    lines = [
        "| | dB | n |",
        "|---|---|---|",
        "| **one** | 1.23 ± .06 | 2,650 |",
        "| two | | text |",
        "| three | 9 | |",
    ]
    table = "\n".join(lines)
    assert (
        differences(table, held) == [] == differences(f"{table}\n| four | | not measured |", held)
    )
    for old, new in (
        *(
            ("1.23", "1.24"),
            (".06", ".05"),
            ("1.23 ± .06", ""),
            ("1.23", "−1.23"),
            ("2,650", "2,651"),
        ),
        *(("text", "9"), ("| two |", "| 2 |"), ("dB", "%"), ("| two | |", "| two | 3 |")),
    ):
        assert differences(table.replace(old, new), held), new
    assert differences(f"{table}\n| four | 4 | |", held)
