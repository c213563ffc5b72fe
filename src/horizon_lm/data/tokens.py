"""Tokenised documents on disk: written once, then mapped into memory, which the system can take back.

    tokens.bin    all ids in one row, uint16 or uint32
    trained.bin   one byte a token, whether it is trained on; absent where all are
    documents.bin int64 [documents, 2]: length, number of the dataset
    meta.json     counts, size and xxh3 hash of each file, and a hash of all that

The folder is made beside its place and renamed, so that it is whole or absent; hashes are checked when it is
opened, as a flipped bit in a token would otherwise train on something else.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO, Self

import numpy as np
import xxhash

from horizon_lm.data.encode import Encoded
from horizon_lm.errors import DataError, DoesNotFitError
from horizon_lm.io import files
from horizon_lm.io.leftovers import OwnedFolder

_META = "meta.json"
_STAGED = ".horizon-tokens-"  # a folder that is being filled: one prefix for all, so that any run sweeps them
_EARLIER = re.compile(r"\.[0-9a-f]{32}\.[a-z0-9_]{8}")  # what earlier versions called it


@dataclass(frozen=True)
class Counts:
    """What went into the tokens. is_text: every document is plain text."""

    num_documents: int
    num_tokens: int
    num_trained: int
    num_empty: int
    num_bad: int
    bad_rows: list[str]
    formats: list[str | None]
    is_text: bool


class TokenStore:
    """ids [tokens]; trained [tokens] of bool, or None; lengths, datasets [documents]; fingerprint of all."""

    def __init__(self, folder: Path, keep_alive: Any = None) -> None:
        """Raises DataError where the folder is damaged. keep_alive: dropped with this object."""
        self._keep_alive = keep_alive
        meta = json.loads(files.read_text(folder / _META))
        if meta.pop("hash", None) != _meta_hash(meta):
            raise DataError(f"{folder / _META} is damaged", hint=f"remove {folder}; it is made again")
        for name, expected in meta["files"].items():
            if _hash(folder / name) != expected:
                raise DataError(f"{folder / name} is damaged", hint=f"remove {folder}; it is made again")
        self.counts = Counts(**meta["counts"])
        self.hashes: dict[str, Any] = meta["files"]
        self.fingerprint = xxhash.xxh3_128(json.dumps(meta["files"], sort_keys=True).encode()).hexdigest()
        self.folder = folder
        self.ids = _mapped(folder / "tokens.bin", np.dtype(meta["dtype"]))
        has_mask = "trained.bin" in meta["files"]
        self.trained = _mapped(folder / "trained.bin", np.dtype(bool)) if has_mask else None
        documents = np.fromfile(folder / "documents.bin", np.int64).reshape(-1, 2)
        self.lengths = documents[:, 0]
        self.datasets = documents[:, 1]
        self.starts = np.concatenate([[0], np.cumsum(self.lengths)])[:-1]


def _mapped(path: Path, dtype: np.dtype[Any]) -> np.ndarray:
    if path.stat().st_size == 0:
        return np.empty(0, dtype)
    return np.memmap(path, dtype, mode="r")


def _meta_hash(meta: dict[str, Any]) -> str:
    return xxhash.xxh3_128(json.dumps(meta, sort_keys=True).encode()).hexdigest()


def _hash(path: Path) -> list[Any]:
    digest = xxhash.xxh3_128()
    size = 0
    try:
        with files.open_file(path) as file:
            while chunk := file.read(1 << 22):
                digest.update(chunk)
                size += len(chunk)
    except OSError as error:
        raise DataError(
            f"{path} cannot be read: {error.strerror or error}", hint="check its permissions"
        ) from error
    return [size, digest.hexdigest()]


class TokenWriter:
    """Collects encoded documents in a folder beside `place`, or in a temporary one, and opens the result."""

    def __init__(self, place: Path | None, dtype: np.dtype[Any]) -> None:
        self._place, self._dtype = place, dtype
        self._temporary: OwnedFolder
        try:
            if place is None:
                self._temporary = OwnedFolder("horizon-tokens-")
                self._folder = self._temporary.path
            else:
                place.parent.mkdir(parents=True, exist_ok=True)
                self._temporary = OwnedFolder(_STAGED, place.parent, relatives=_EARLIER)
                self._folder = self._temporary.path
        except OSError as error:
            raise DataError(
                f"tokens cannot be written to {place}: {error.strerror or error}",
                hint="set dataset_cache_dir to another folder, or to null",
            ) from error
        self._tokens: BinaryIO = files.create(self._folder / "tokens.bin")
        self._trained: BinaryIO | None = None
        self._documents: list[tuple[int, int]] = []
        self._num_tokens = self._num_trained = 0
        self._is_text = True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: Any, *_: object) -> None:
        for file in (self._tokens, self._trained):
            if file is not None:
                file.close()
        if kind is not None:
            self._temporary.release()

    def add(self, documents: Sequence[Encoded]) -> None:
        """Append documents. Raises DoesNotFitError when the disk is full."""
        try:
            for document in documents:
                self._add(document)
        except OSError as error:
            raise DoesNotFitError(
                f"writing {self._folder} failed: {error.strerror or error}",
                hint="free disk space, or set dataset_cache_dir to a folder on a larger disk",
            ) from error

    def _add(self, document: Encoded) -> None:
        self._tokens.write(np.ascontiguousarray(document.ids).data)
        if document.trained is not None and self._trained is None:
            self._trained = files.create(self._folder / "trained.bin")
            self._trained.write(b"\x01" * self._num_tokens)
        if self._trained is not None:
            trained = document.trained
            self._trained.write(b"\x01" * len(document.ids) if trained is None else trained.tobytes())
        self._documents.append((len(document.ids), document.dataset))
        self._num_tokens += len(document.ids)
        self._num_trained += len(document.ids) if document.trained is None else int(document.trained.sum())
        self._is_text &= document.is_text

    def finish(
        self,
        *,
        num_empty: int,
        num_bad: int,
        bad_rows: list[str],
        formats: list[Any],
        is_kept: bool = False,
    ) -> TokenStore:
        """Put the folder in place (is_kept) and open it; one that is there by now is taken instead."""
        documents = np.asarray(self._documents, np.int64).reshape(-1, 2)
        files.write_file(self._folder / "documents.bin", lambda file: file.write(documents.data))
        for file in (self._tokens, self._trained):
            if file is not None:
                file.close()
        counts = Counts(
            num_documents=len(self._documents),
            num_tokens=self._num_tokens,
            num_trained=self._num_trained,
            num_empty=num_empty,
            num_bad=num_bad,
            bad_rows=bad_rows,
            formats=formats,
            is_text=self._is_text,
        )
        hashes = {path.name: _hash(path) for path in sorted(self._folder.glob("*.bin"))}
        meta = {"dtype": self._dtype.name, "counts": asdict(counts), "files": hashes}
        meta["hash"] = _meta_hash(meta)
        files.write_file(self._folder / _META, json.dumps(meta))
        if self._place is None or not is_kept:
            return TokenStore(self._folder, keep_alive=self._temporary)
        self._temporary.disown()
        try:
            files.put_folder(self._folder, self._place)
        except OSError:  # another run was faster
            shutil.rmtree(self._folder, ignore_errors=True)
        return TokenStore(self._place)


def open_cached(place: Path) -> TokenStore | None:
    """The tokens of an earlier run, if they are there and whole; damaged ones are removed."""
    if not place.exists():
        return None
    try:
        return TokenStore(place)
    except (DataError, ValueError, KeyError, TypeError, AttributeError, OSError):
        shutil.rmtree(place, ignore_errors=True)
        return None
