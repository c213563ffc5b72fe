"""The documentation site builds without a warning, loads nothing from elsewhere, and has no broken link."""

from __future__ import annotations

import json
import os
import posixpath
import re
import shutil
import subprocess
import sys
from collections import defaultdict
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import yaml

ROOT = Path(__file__).parents[2]
# What a browser loads by itself; other links are followed only by the reader.
_LOADED = {("script", "src"), ("img", "src"), ("iframe", "src"), ("source", "src"), ("object", "data")}


class Page(HTMLParser):
    """The links, anchors and loaded files of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.anchors: set[str] = set()
        self.loaded: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name in ("id", "name") and value:
                self.anchors.add(value)
            elif tag == "a" and name == "href" and value:
                self.links.append(value)
            elif value and ((tag, name) in _LOADED or (tag == "link" and name == "href")):
                self.loaded.append(value)


def build(root: Path, target: Path) -> subprocess.CompletedProcess[str]:
    """Build the site as `make docs` does."""
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(target)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    return subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=250)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("site")
    assert_built(build(ROOT, target))
    return target


def assert_built(done: subprocess.CompletedProcess[str]) -> None:
    lines = (done.stdout + done.stderr).splitlines()
    assert done.returncode == 0 and lines and [line for line in lines if not line.startswith("INFO ")] == []


def pages_of(site: Path) -> dict[str, Page]:
    """Return the pages by their path; 404.html is for servers, with links from their root."""
    files = {path.relative_to(site).as_posix(): path for path in site.rglob("*.html")}
    return {
        name: Page(path.read_text(encoding="utf-8")) for name, path in files.items() if name != "404.html"
    }


def broken(site: Path, pages: dict[str, Page]) -> dict[str, list[str]]:
    """Return the links of each page that lead to no file or no anchor of the site."""
    found = defaultdict(list)
    for name, page in pages.items():
        for link in [*page.links, *page.loaded]:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = posixpath.normpath(posixpath.join(posixpath.dirname(name), unquote(parts.path)))
            target = name if not parts.path else target
            anchor = unquote(parts.fragment)
            is_there = (site / target).is_file()
            if not is_there or (anchor and target in pages and anchor not in pages[target].anchors):
                found[name].append(link)
    return dict(found)


def test_links_and_anchors_lead_somewhere(site: Path) -> None:
    pages = pages_of(site)
    assert len(pages) > 60 and sum(len(page.links) for page in pages.values()) > 4000
    assert broken(site, pages) == {}


def test_nothing_is_loaded_from_elsewhere(site: Path) -> None:
    for name, page in pages_of(site).items():
        assert [link for link in page.loaded if urlsplit(link).scheme or link.startswith("//")] == [], name
    for sheet in site.rglob("*.css"):
        text = sheet.read_text(encoding="utf-8")
        assert not re.findall(r"(?:url\(|@import)\s*[\"']?(?:https?:)?//", text), sheet.name


def test_search_runs_without_a_server(site: Path) -> None:
    index = json.loads((site / "search" / "search_index.json").read_text(encoding="utf-8"))
    assert len(index["docs"]) > 400
    assert (site / "search" / "search_index.js").read_text(encoding="utf-8").startswith("var __index = {")
    assert any("iframe-worker" in link for link in pages_of(site)["index.html"].loaded)


def test_each_page_is_in_the_navigation(site: Path) -> None:
    linked = {posixpath.normpath(unquote(urlsplit(link).path)) for link in pages_of(site)["index.html"].links}
    top = {
        f"{path.relative_to(ROOT / 'docs').with_suffix('.html')}" for path in (ROOT / "docs").rglob("*.md")
    }
    assert top <= linked
    results = {f"results/{path.stem}.html" for path in (ROOT / "benchmarks" / "results").glob("*.md")}
    assert len(results) > 20 and results <= linked


def test_files_outside_docs_are_pages(site: Path) -> None:
    """Results link to drawings in docs/ and to each other, and pages link to results."""
    pages = pages_of(site)
    assert any("results/2026-11-25-heap-cpu.html" in link for link in pages["guides/python.html"].links)
    assert "../assets/grpo-toy.svg" in pages["results/2026-11-28-grpo-toy-cpu.html"].loaded
    assert (site / "changelog.html").exists() and "index.html" in {
        posixpath.basename(link) for link in pages["results/index.html"].links
    }


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """The site's settings and hooks over two pages."""
    settings = yaml.load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"), Loader=yaml.BaseLoader)
    assert settings["hooks"] == ["docs/hooks.py"]
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    nav = "nav:\n  - index.md\n  - Evidence:\n      - changelog.md\n      - Measurements: []\n\n"
    text = re.sub(r"^nav:\n(?:  .*\n)+\n", nav, text, flags=re.M)
    (tmp_path / "mkdocs.yml").write_text(text)
    shutil.copytree(ROOT / "docs" / "assets", tmp_path / "docs" / "assets")
    shutil.copy(ROOT / "docs" / "hooks.py", tmp_path / "docs")
    (tmp_path / "CHANGELOG.md").write_text("# Changelog\n\n## 0.1.0\n\n[home](docs/index.md)\n")
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    (tmp_path / "benchmarks" / "results" / "2026-01-01-x.md").write_text("# x\n\nAbout x.\n")
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "a.yaml").write_text("learning_rate: 1.0e-5\n")
    (tmp_path / "src").mkdir()
    return tmp_path


GOOD = """[a](../configs/a.yaml) [b](../configs) [c](../CHANGELOG.md#010)
[x](../benchmarks/results/2026-01-01-x.md)"""


def test_a_linked_file_is_shown(small: Path) -> None:
    (small / "docs" / "index.md").write_text(f"# Home\n\n{GOOD}\n")
    assert_built(build(small, small / "site"))
    pages = pages_of(small / "site")
    assert broken(small / "site", pages) == {}
    assert {"source/configs/a.yaml.html", "source/configs.html", "results/2026-01-01-x.html"} <= pages.keys()
    assert "1.0e-5" in (small / "site" / "source" / "configs" / "a.yaml.html").read_text()


@pytest.mark.parametrize(
    "link",
    [
        "[a](missing.md)",
        "[a](../configs/missing.yaml)",
        "[a](#missing)",
        "[a](../CHANGELOG.md#missing)",
        "[a](/x)",
    ],
)
def test_a_broken_link_fails_the_build(small: Path, link: str) -> None:
    """The negative control."""
    (small / "docs" / "index.md").write_text(f"# Home\n\n{GOOD}\n\n{link}\n")
    done = build(small, small / "site")
    assert done.returncode != 0 and "WARNING" in done.stdout + done.stderr


def test_a_page_outside_the_navigation_fails_the_build(small: Path) -> None:
    """The negative control."""
    (small / "docs" / "index.md").write_text("# Home\n")
    (small / "docs" / "lost.md").write_text("# Lost\n")
    assert build(small, small / "site").returncode != 0


def test_broken_links_of_built_pages_are_found(tmp_path: Path) -> None:
    """The negative control."""
    (tmp_path / "a.html").write_text(
        '<h1 id="x"></h1><a href="#x"></a><a href="b.html#y"></a><a href="c.html">'
    )
    (tmp_path / "b.html").write_text('<script src="https://example.org/x.js"></script>')
    pages = pages_of(tmp_path)
    assert broken(tmp_path, pages) == {"a.html": ["b.html#y", "c.html"]}
    assert pages["b.html"].loaded == ["https://example.org/x.js"]
