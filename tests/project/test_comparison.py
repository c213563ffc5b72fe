"""docs/comparison.md: statements about other systems have a source, and figures of ours their file."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "comparison.md"
README = ROOT / "README.md"
CODE = r"\b[DFMLTH]\d\b"
FIGURE = r"\d+(?:,\d{3})*(?:\.\d+)?%?"
BEGIN, END = "<!-- comparison:begin -->\n", "\n<!-- comparison:end -->"


def rows(text: str, header: str) -> list[list[str]]:
    """Return the cells of the rows below a header that begins with `header`."""
    lines = text.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(header))
    body = lines[start + 2 :]
    end = next((i for i, line in enumerate(body) if line[:1] != "|"), len(body))
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in body[:end]]


def without_source(page: str) -> list[str]:
    """Return what is said of another system without naming a source, and codes that name none."""
    sources = page.partition("## Sources")[2]
    defined = set(re.findall(rf"^  - ({CODE}):", sources, re.M))
    wrong = []
    for name, _, *theirs in rows(page, "| | Horizon-LM"):
        for cell in theirs:
            codes = re.findall(CODE, cell)
            if not codes and cell != "not found" or not set(codes) <= defined:
                wrong.append(f"{name}: {cell}")
    for system, _, figure, source in rows(page, "| system | run"):
        codes = re.findall(CODE, source)
        if not figure.startswith("none") and not (codes and set(codes) <= defined):
            wrong.append(f"{system}: {figure}")
    return wrong


def of_no_file(page: str) -> list[str]:
    """Return cells of ours and measured ones of others whose figures are not all in one line of the linked
    file."""
    wrong = []
    for _, *cells, link in rows(page, "| run | simulated") + rows(page, "| run | ours"):
        lines = (PAGE.parent / re.findall(r"\((\S+)\)", link)[0]).read_text().splitlines()
        for cell in cells:
            figures = set(re.findall(rf"(?<![\w.]){FIGURE}", cell))
            if not figures or not any(figures <= set(re.findall(FIGURE, line)) for line in lines):
                wrong.append(cell)
    return wrong


def unlike(readme: str, page: str) -> list[list[str]]:
    """Return rows of the README's table that are not rows of the page without their codes."""
    short = readme.partition(BEGIN)[2].partition(END)[0]
    plain = re.sub(rf" {CODE}", "", page)
    known = rows(plain, "| | Horizon-LM")
    return [row for row in rows(short, "| | Horizon-LM") if row not in known]


def test_each_statement_has_a_source() -> None:
    page = PAGE.read_text()
    assert not without_source(page)
    table = rows(page, "| | Horizon-LM")
    assert len(table) >= 12 and {len(row) for row in table} == {7}
    used = set(re.findall(CODE, page.partition("## Sources")[0]))
    assert used == set(re.findall(rf"^  - ({CODE}):", page, re.M))
    assert "\nAll read on 2026-" in page.partition("## Sources")[2]


@pytest.mark.parametrize(("old", "new"), [(" D2 |", " |"), ("  - D2:", "  - D9:"), ("| T1 |\n", "| |\n")])
def test_a_statement_without_a_source_is_found(old: str, new: str) -> None:
    page = PAGE.read_text()
    assert old in page and len(without_source(page.replace(old, new, 1))) == 1


def test_each_figure_is_in_its_file() -> None:
    page = PAGE.read_text()
    assert not of_no_file(page)
    assert all(re.search(r"/20\d\d-\d\d-\d\d-[\w-]+\.md\)$", row[-1]) for row in rows(page, "| run | ours"))
    assert all("simulated" in row[-1] for row in rows(page, "| run | simulated"))


@pytest.mark.parametrize(
    ("old", "new"), [("| 736 |", "| 737 |"), ("56.3% MFU", "56.4% MFU"), ("6,516", "6,517")]
)
def test_a_changed_figure_is_found(old: str, new: str) -> None:
    page = PAGE.read_text()
    wrong = of_no_file(page.replace(old, new, 1))
    assert len(wrong) == 1 and new.strip("| ") in wrong[0]


def test_the_readme_says_the_same() -> None:
    page, readme = PAGE.read_text(), README.read_text()
    assert BEGIN in readme and not unlike(readme, page)
    changed = readme.replace("| **not yet** |", "| yes |", 1)
    assert len(unlike(changed, page)) == 1
