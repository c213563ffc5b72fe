"""Bring files from outside docs/ into the site, so that links work there as they do in the repository.

CHANGELOG.md and benchmarks/results/*.md become pages. Any other file or folder that a page links to becomes a
page that shows it. MkDocs calls the functions whose names begin with `on_`.
"""

from __future__ import annotations

import json
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

RESULTS = "benchmarks/results/"
_LINK = re.compile(r"(?<=\]\()(?!\w+:|#)([^)\s#]+)")
_LANGUAGES = {".yml": "yaml", ".jsonl": "json", ".sbatch": "sh"}  # others are called as their suffix


def origin_of(uri: str) -> str:
    """Return the path in the repository of a page or file of the site."""
    if uri == "changelog.md":
        return "CHANGELOG.md"
    if uri.startswith("results/"):
        return RESULTS + uri.removeprefix("results/")
    return uri.removeprefix("source/").removesuffix(".md") if uri.startswith("source/") else f"docs/{uri}"


def uri_of(path: str) -> str:
    """Return where the site has a path of the repository."""
    if path in ("CHANGELOG.md", "README.md"):
        return {"CHANGELOG.md": "changelog.md", "README.md": "index.md"}[path]
    if path == RESULTS.rstrip("/"):
        return "results/index.md"
    if path.startswith(RESULTS) and path.endswith(".md"):
        return "results/" + path.removeprefix(RESULTS)
    return path.removeprefix("docs/") if path.startswith("docs/") else f"source/{path}.md"


def targets(text: str, origin: str) -> list[str]:
    """Return the paths in the repository that the links of a page lead to."""
    folder = posixpath.dirname(origin)
    return [posixpath.normpath(posixpath.join(folder, link)) for link in _LINK.findall(text)]


def results(root: Path) -> list[Path]:
    return sorted((root / RESULTS).glob("*.md"), reverse=True)


def on_config(config: MkDocsConfig) -> None:
    """Name the pages of benchmarks/results in the navigation, newest first."""
    pages: list[Any] = ["results/index.md"]
    for path in results(Path(config.config_file_path).parent):
        pages.append({f"{path.stem[:10]} {path.stem[11:]}": uri_of(RESULTS + path.name)})
    evidence = next(part["Evidence"] for part in config.nav or [] if "Evidence" in part)
    next(part for part in evidence if "Measurements" in part)["Measurements"] = pages


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages whose files lie outside docs/."""
    root = Path(config.config_file_path).parent
    waiting = [origin_of(file.src_uri) for file in files.documentation_pages()]
    for path in ["CHANGELOG.md", *(RESULTS + path.name for path in results(root))]:
        files.append(File.generated(config, uri_of(path), abs_src_path=str(root / path)))
        waiting.append(path)
    files.append(File.generated(config, "results/index.md", content=_index(root)))
    for origin in waiting:  # which grows: a notebook or a folder also has links
        for path in targets(_text(root, origin), origin):
            uri = uri_of(path)
            if path.startswith("..") or files.get_file_from_path(uri) or not (root / path).exists():
                continue
            files.append(File.generated(config, uri, content=_shown(root, path)))
            waiting.append(path)
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Lead the links of a page to where the site has their targets.

    Also hide a navigation of one page, and let search show measurements and the changelog last.
    """
    uri = page.file.src_uri
    if page.parent is None:
        page.meta["hide"] = ["navigation"]
    if uri.startswith("results/") or uri in ("changelog.md", "lab.md"):
        page.meta["search"] = {"boost": 0.2}
    folder = posixpath.dirname(origin_of(uri))

    def moved(link: re.Match[str]) -> str:
        path = posixpath.normpath(posixpath.join(folder, link[1]))
        target = uri_of(path)
        is_here = files.get_file_from_path(target) is not None
        return posixpath.relpath(target, posixpath.dirname(uri) or ".") if is_here else link[1]

    return _LINK.sub(moved, markdown)


def _text(root: Path, origin: str) -> str:
    """Return what may have links in a file of the repository: its own text, or the page that shows it."""
    path = root / origin
    if path.suffix == ".md":
        return path.read_text(encoding="utf-8") if path.exists() else ""
    return _shown(root, origin) if path.is_dir() or path.suffix == ".ipynb" else ""


def _index(root: Path) -> str:
    lines = [
        "# Measurements",
        "",
        "Each page names its command, commit and machine. No GPU has been measured",
    ]
    lines += ["yet: pages about GPUs are simulations or dry runs.", ""]
    lines += ["| date | benchmark | about |", "| --- | --- | --- |"]
    for path in results(root):
        paragraphs = path.read_text(encoding="utf-8").split("\n\n")
        about = " ".join(paragraphs[1].split()) if len(paragraphs) > 1 else ""
        date = path.stem[:10].replace("-", "\u2011")  # a hyphen at which no line ends
        lines.append(f"| {date} | [{path.stem[11:]}]({path.name}) | {about} |")
    return "\n".join(lines) + "\n"


def _shown(root: Path, path: str) -> str:
    """Return a page that shows a file or folder; search skips it."""
    place = root / path
    head = f"---\nsearch: {{exclude: true}}\n---\n\n# {posixpath.basename(path)}\n\n`{path}`\n\n"
    if place.is_dir():
        names = sorted(child.name for child in place.iterdir() if child.name[0] not in "._")
        return head + "".join(f"- [{name}]({posixpath.basename(path)}/{name})\n" for name in names)
    if place.suffix == ".ipynb":
        cells = json.loads(place.read_text(encoding="utf-8"))["cells"]
        sources = [("".join(cell["source"]), cell["cell_type"] == "code") for cell in cells]
        return head + "\n\n".join(_fenced(text, "python") if is_code else text for text, is_code in sources)
    return head + _fenced(place.read_text(encoding="utf-8"), _LANGUAGES.get(place.suffix, place.suffix[1:]))


def _fenced(text: str, language: str) -> str:
    return f"`````{language}\n{text.rstrip()}\n`````\n"
