"""The generated pages of the documentation are current."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from tests.raises import raised
from tests.reference import PAGES, errors

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("page", PAGES)
def test_a_generated_page_is_current(page: str) -> None:
    assert (ROOT / page).read_text(encoding="utf-8") == PAGES[page](), "run: make reference"


def test_another_message_gives_another_page() -> None:
    """The negative control."""
    one = 'def f(n):\n  way = "lower it"\n  raise ConfigError(f"{n} exceeds {len(rows)} | rows", hint=way)\n'
    page = errors(raised(one, "data/x.py"))
    assert "| <i>n</i> exceeds <i>rows</i> \\| rows | lower it |" in page and "### Data" in page
    assert page != errors(raised(one.replace("exceeds", "is above"), "data/x.py"))


def test_errors_are_read_from_all_over_the_source() -> None:
    page = (ROOT / "docs" / "reference" / "errors.md").read_text(encoding="utf-8")
    assert page.count("\n| ") > 480
    codes = {int(code) for code in re.findall(r"^## (\d+):", page, re.M)}
    assert codes == {1, 2, 3, 4, 5, 6, 7}
