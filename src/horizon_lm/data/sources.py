"""Sources: the files or Hub dataset behind an entry of `datasets`, and their rows."""

from __future__ import annotations

import glob
import hashlib
import os
import re
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice, takewhile
from pathlib import Path

import numpy as np

from horizon_lm.config import DatasetConfig
from horizon_lm.config.dataset_info import PYTHON_STDLIB, SUFFIXES, is_stdlib
from horizon_lm.data.file_content import FileHashes, is_compressed, suffix_of
from horizon_lm.data.hf_datasets import (
    ArrowRows,
    hint_for_names,
    is_saved_dataset,
    looks_like_repository,
    open_dataset,
)
from horizon_lm.data.readers import TYPES, PlacedRow, read_file
from horizon_lm.errors import DataError
from horizon_lm.io.hub import require_reachable
from horizon_lm.io.inside import check_files

_STDLIB_SKIPPED = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__", "lib2to3"}
)
# Files about a dataset in its folder.
_ABOUT = frozenset({"readme.md", "license.md", "license.txt", "dataset_info.json", "dataset_infos.json"})
_SPLIT = re.compile(r"[-_./](train|test|validation|valid|val|dev|eval)(?=[-_./0-9])")


@dataclass(frozen=True)
class ShardOrder:
    """Order of a stream's files and shards, by seed and epoch; is_fixed: their own order."""

    seed: int
    epoch: int
    is_fixed: bool = False

    def shuffled(self, files: list[Path]) -> list[Path]:
        if self.is_fixed:
            return files
        order = np.random.default_rng([self.seed, self.epoch, 2]).permutation(len(files))
        return [files[i] for i in order]


def rows(dataset: DatasetConfig, shards: ShardOrder | None = None) -> Iterator[PlacedRow]:
    """Yield (row, place) for each row of a dataset.

    max_samples takes the first rows in the dataset's own order, so a stream then keeps that order.
    """
    if dataset.max_samples is not None:
        own_order = None if shards is None else ShardOrder(shards.seed, shards.epoch, is_fixed=True)
        yield from islice(_all_rows(dataset, own_order), dataset.max_samples)
    else:
        yield from _all_rows(dataset, shards)


def _all_rows(dataset: DatasetConfig, shards: ShardOrder | None) -> Iterator[PlacedRow]:
    opened = opened_dataset(dataset, streaming=shards is not None)
    if opened is not None:
        if opened.is_stream and shards is not None and not shards.is_fixed:
            opened = opened.shuffled(shards.seed, shards.epoch)
        yield from opened
    elif is_stdlib(dataset.path):
        yield from read_stdlib()
    else:
        files = local_files(dataset)
        for path in shards.shuffled(files) if shards is not None else files:
            yield from read_file(path)


def opened_dataset(dataset: DatasetConfig, *, streaming: bool = False) -> ArrowRows | None:
    """Open what the `datasets` library has to read; return None for plain files."""
    path = Path(dataset.path).expanduser()
    if path.is_dir() and is_saved_dataset(path):
        return open_dataset(dataset)
    if not path.exists() and looks_like_repository(dataset.path) and not is_stdlib(dataset.path):
        return open_dataset(dataset, streaming=streaming)
    return None


def check_exists(dataset: DatasetConfig) -> None:
    """Check a dataset without reading it. Raises DataError."""
    path = Path(dataset.path).expanduser()
    is_saved = path.is_dir() and is_saved_dataset(path)
    is_remote = not path.exists() and looks_like_repository(dataset.path)
    if is_stdlib(dataset.path) or is_saved:
        return
    if is_remote:
        require_reachable(dataset.path, "datasets", kind="dataset", error=DataError)
    else:
        local_files(dataset)


def content(dataset: DatasetConfig, hashes: FileHashes) -> Iterator[bytes]:
    """Yield what identifies a dataset's content: a hash of each of its files in order."""
    opened = opened_dataset(dataset)
    if opened is not None:
        yield from opened.content(hashes)
    else:
        yield from hashes.of(stdlib_files() if is_stdlib(dataset.path) else local_files(dataset))


def local_files(dataset: DatasetConfig) -> list[Path]:
    """List the files of a dataset outside the Hub, in its split. Raises DataError if there are none."""
    files = list_files(dataset.path, follow_links=dataset.follow_links)
    folder = Path(dataset.path).expanduser()
    found = {file: split_of(file.relative_to(folder)) for file in files} if folder.is_dir() else {}
    splits = set(found.values()) - {None}
    wanted = split_of(Path(dataset.split)) or dataset.split
    if "train" in splits and len(splits) > 1 or wanted in splits and wanted != "train":
        chosen = [file for file, split in found.items() if split == wanted]
        if chosen:
            return chosen
    elif dataset.split == "train":
        return files
    raise DataError(
        f"{dataset.path} has no split {dataset.split!r}",
        hint="name a folder's files by their split, such as train.jsonl and test.jsonl, or pass the files "
        "themselves as the path",
    )


def split_of(path: Path) -> str | None:
    """Return the split named by a file or by a folder above it; None for other names."""
    found = _SPLIT.search("/" + path.with_suffix("").as_posix().lower() + "/")
    return (
        {"valid": "validation", "val": "validation", "dev": "validation", "eval": "validation"}.get(
            found[1], found[1]
        )
        if found
        else None
    )


def list_files(name: str, *, follow_links: bool = False) -> list[Path]:
    """List the readable files that a file, folder or glob stands for, sorted.

    Skips other file types in folders and globs and, in folders, other forms of the same data: a compressed
    file beside the uncompressed one, and CSV beside JSON or parquet. Raises `DataError` for a file of another
    type, for no file, and for links that lead out of the folder, unless `follow_links`.
    """
    path = Path(name).expanduser()
    if path.is_file():
        if suffix_of(path) not in SUFFIXES:
            raise DataError(f"{name}: unknown file type {suffix_of(path)!r}", hint=TYPES)
        return [path]
    folder = path
    if path.is_dir():
        found: Iterable[str] = _in_folder(path, follow_links=follow_links)
    elif glob.has_magic(name):
        folder = _before_magic(path)
        matches = (Path(match) for match in glob.iglob(str(path), recursive=True))
        found = (str(match) for match in matches if match.exists() and not match.is_dir())
    elif path.exists():
        raise DataError(f"{name} is a pipe or device, not a file", hint="save its content as a file")
    else:
        raise DataError(
            f"{name} does not exist",
            hint=hint_for_names(name)
            or "pass a local file, a folder, a glob, a name on the Hugging Face Hub, or "
            f"{PYTHON_STDLIB}; looked in {os.getcwd()}",
        )
    files = sorted(Path(file) for file in found if file.lower().endswith(SUFFIXES))
    files = [file for file in files if file.name.lower() not in _ABOUT] or files
    if path.is_dir():
        files = _one_form(files)
    if not files:
        raise DataError(f"{name} matches no file of a known type", hint=TYPES)
    check_files(files, folder, follow_links=follow_links)
    return files


def _in_folder(path: Path, *, follow_links: bool) -> Iterator[str]:
    seen: set[str] = set()  # a link may lead back up the tree
    for at, folders, names in os.walk(path, followlinks=follow_links):
        real = os.path.realpath(at)
        if real in seen:
            folders.clear()
        else:
            seen.add(real)
            yield from (os.path.join(at, file) for file in names)


def _before_magic(path: Path) -> Path:
    """Return the folder that a glob begins in: its parts before the first with a `*`, `?` or `[`."""
    parts = list(takewhile(lambda part: not glob.has_magic(part), path.parts))
    return Path(*parts)


def _one_form(files: list[Path]) -> list[Path]:
    there = set(files)
    files = [file for file in files if not (is_compressed(file) and file.with_suffix("") in there)]
    types = {file: suffix_of(file).removesuffix(".gz") for file in files}
    has_rows = any(type in (".jsonl", ".json", ".parquet") for type in types.values())
    return [file for file in files if not (has_rows and types[file] == ".csv")]


def stdlib_files() -> list[Path]:
    """List the modules of the standard library, mixing its folders.

    The order is by hash of each relative name: any prefix is a fair sample of the whole, and only the Python
    version decides.
    """
    root = Path(sysconfig.get_path("stdlib"))
    names = []
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if name not in _STDLIB_SKIPPED]
        paths = (Path(folder, name) for name in files if name.endswith(".py"))
        names += [path.relative_to(root).as_posix() for path in paths if not path.is_symlink()]
    if not names:
        raise DataError(f"{root} has no Python sources", hint="set datasets=FILE")
    return [root / name for name in sorted(names, key=lambda name: hashlib.sha256(name.encode()).digest())]


def read_stdlib() -> Iterator[PlacedRow]:
    for path in stdlib_files():
        yield {"text": path.read_text(encoding="utf-8", errors="ignore")}, str(path)
