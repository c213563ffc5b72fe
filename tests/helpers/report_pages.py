"""Runs, and the report's page as a parser sees it."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from horizon_lm.report.html import write_report
from horizon_lm.training.train import train
from small_runs import settings, write_text

Line = dict[str, Any]


class Page(HTMLParser):
    """(tag, attributes, text within) of each element of a page; fails where tags do not fit together."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str], str]] = []
        self._open: list[tuple[str, dict[str, str], list[str]]] = []
        self.feed(text)
        self.close()
        assert not self._open, self._open

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        if tag in ("meta", "br"):
            self.elements.append((tag, dict(attrs), ""))
        else:
            self._open.append((tag, dict(attrs), []))

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        self.elements.append((tag, dict(attrs), ""))

    def handle_endtag(self, tag: str) -> None:
        opened, attributes, text = self._open.pop()
        assert opened == tag, f"</{tag}> closes <{opened}>"
        self.elements.append((tag, attributes, " ".join("".join(text).split())))

    def handle_data(self, data: str) -> None:
        for _, _, text in self._open:
            text.append(data)

    def text(self, tag: str) -> list[str]:
        return [text for name, _, text in self.elements if name == tag]

    def dots(self, kind: str) -> list[tuple[float, float, str]]:
        """(x, y, title) of the marked points of a series."""
        found = []
        for tag, attributes, title in self.elements:
            if tag == "path" and attributes.get("class") == f"dot {kind}" and title:
                x, y = re.match(r"M([\d.]+) ([\d.]+)h", attributes["d"]).groups()  # type: ignore[union-attr]
                found.append((float(x), float(y), title))
        return found


def report_of(run: Path) -> tuple[Page, str]:
    """The page, and what the terminal shows."""
    report = write_report(run)
    assert report.written[0] == run / "report.html"
    return Page((run / "report.html").read_text()), report.text


def lines_of(run: Path) -> list[Line]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def write_lines(run: Path, lines: list[Line], end: str = "") -> Path:
    run.mkdir(exist_ok=True)
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + end)
    return run


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("data") / "text.txt")


@pytest.fixture(scope="module")
def evaluated(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 6 steps that evaluates before the first and at every other one, with loss.png."""
    run = tmp_path_factory.mktemp("evaluated") / "run"
    held_out = {"eval_datasets": str(text), "eval_strategy": "steps", "eval_steps": 2, "eval_on_start": True}
    train(settings(text, run, max_steps=6, save_steps=3, plot_loss=True, **held_out))
    return run


@pytest.fixture(scope="module")
def plain(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same without anything held out."""
    run = tmp_path_factory.mktemp("plain") / "run"
    train(settings(text, run, max_steps=6, save_steps=3))
    return run


def ended(lines: list[Line], last: int, total: int, **end: Any) -> list[Line]:
    """The lines of a run that ended after step `last` of `total`, logged or not."""
    kept = [dict(line) for line in lines if line.get("step", 0) <= last and line["event"] != "end"]
    kept[0]["num_steps"] = total
    return [*kept, *([{"event": "end", **end, "time": kept[-1]["time"]}] if end else [])]
