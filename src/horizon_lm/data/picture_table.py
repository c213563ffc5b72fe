"""The pictures of a token store: which documents show them, and where they are.

    pictures.bin  hashes of the contents, 16 bytes each: a picture that many rows show is there once
    shown.bin     int64 [shown, 2]: document and picture, in the order of the placeholders
    sources.jsonl a line for each picture: file, size, time, pixels, features, small outputs of the processor
    embedded.bin  bytes of the pictures that came in rows of the data

The first two decide the training sequences; the other two say where the same pictures are now.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, Protocol, Self

import numpy as np
import xxhash

from horizon_lm.data.pictures import Opened, Picture, open_picture
from horizon_lm.data.processor import Processor
from horizon_lm.errors import DataError
from horizon_lm.io.files import create, open_file, read_bytes, write_file

_HASHES, _SHOWN, _SOURCES, _EMBEDDED = "pictures.bin", "shown.bin", "sources.jsonl", "embedded.bin"
_KEY_BYTES = 16


@dataclass(frozen=True)
class Shown:
    """A picture in a document. count: its features, one placeholder each. sizes: small outputs of the
    processor. content: its bytes, unless it is a file."""

    key: bytes
    path: str | None
    content: bytes | None
    num_bytes: int
    modified: int
    pixels: tuple[int, int]
    count: int
    sizes: dict[str, list[int]]

    @classmethod
    def of(cls, picture: Picture, opened: Opened, count: int, sizes: dict[str, list[int]]) -> Self:
        content = picture.content
        path = None if content is not None else picture.path
        facts = (opened.num_bytes, opened.modified, opened.image.size)
        return cls(opened.key, path, content, *facts, count, sizes)


class PictureWriter:
    """Writer of the pictures of a token store into its folder."""

    def __init__(self, folder: Path, processor: Processor) -> None:
        self._folder, self._processor = folder, processor
        self._numbers: dict[bytes, int] = {}
        self._sources: list[dict[str, Any]] = []
        self._shown: list[tuple[int, int]] = []
        self._embedded: BinaryIO | None = None
        self._offset = 0

    def add(self, document: int, pictures: Sequence[Shown]) -> None:
        """Raises OSError."""
        for shown in pictures:
            if shown.key not in self._numbers:
                self._numbers[shown.key] = len(self._numbers)
                self._sources.append(self._source(shown))
            self._shown.append((document, self._numbers[shown.key]))

    def _source(self, shown: Shown) -> dict[str, Any]:
        about = {"pixels": list(shown.pixels), "count": shown.count, "sizes": shown.sizes}
        about["bytes"] = shown.num_bytes
        if shown.content is None:
            return {"path": shown.path, "modified": shown.modified, **about}
        if self._embedded is None:
            self._embedded = create(self._folder / _EMBEDDED)
        self._embedded.write(shown.content)
        self._offset += len(shown.content)
        return {"offset": self._offset - len(shown.content), **about}

    def finish(self) -> dict[str, Any] | None:
        """Write the tables; return what describes them, or None without any picture. Raises OSError."""
        if self._embedded is not None:
            self._embedded.close()
        if not self._shown:
            return None
        write_file(self._folder / _HASHES, b"".join(self._numbers))
        write_file(self._folder / _SHOWN, np.asarray(self._shown, np.int64).tobytes())
        lines = "".join(json.dumps(source) + "\n" for source in self._sources)
        write_file(self._folder / _SOURCES, lines)
        types = self._processor.types
        return {
            "processor": self._processor.key,
            "types": None if types is None else [types[0], types[1]],
            "sources": xxhash.xxh3_128(lines.encode()).hexdigest(),
        }


class FeaturesOf(Protocol):
    """Features of pictures by number, and the names of small outputs that the model takes."""

    per_image: tuple[str, ...]

    def of(self, number: int) -> dict[str, Any]: ...


class Pictures:
    """The pictures of a token store, by number. features: set once they are computed, before training."""

    def __init__(self, folder: Path, meta: dict[str, Any], num_documents: int) -> None:
        """Raises DataError if the folder is damaged."""
        self._folder = folder
        content = read_bytes(folder / _SOURCES)
        if xxhash.xxh3_128(content).hexdigest() != meta["sources"]:
            raise DataError(f"{folder / _SOURCES} is damaged", hint=f"remove {folder}; it will be rebuilt")
        self.sources: list[dict[str, Any]] = [json.loads(line) for line in content.splitlines()]
        self.processor_key: str = meta["processor"]
        self._types = meta["types"]
        hashes = read_bytes(folder / _HASHES)
        self.keys = [hashes[i : i + _KEY_BYTES] for i in range(0, len(hashes), _KEY_BYTES)]
        shown = np.fromfile(folder / _SHOWN, np.int64).reshape(-1, 2)
        self.numbers = shown[:, 1]
        self._offsets = np.searchsorted(shown[:, 0], np.arange(num_documents + 1))
        self.features: FeaturesOf | None = None

    def __len__(self) -> int:
        return len(self.keys)

    @cached_property
    def counts(self) -> np.ndarray:
        """Features of each picture."""
        return np.array([source["count"] for source in self.sources], np.int64)

    @cached_property
    def of_documents(self) -> np.ndarray:
        """Number of pictures of each document."""
        return np.diff(self._offsets)

    def in_documents(self, documents: np.ndarray) -> np.ndarray:
        """Return the numbers of all pictures of `documents`, in order."""
        parts = [self.numbers[self._offsets[d] : self._offsets[d + 1]] for d in documents.tolist()]
        return np.concatenate(parts) if parts else np.empty(0, np.int64)

    def is_current(self) -> bool:
        """Tell whether all files still hold the pictures that were tokenised."""
        for number, source in enumerate(self.sources):
            if "path" not in source:
                continue
            try:
                found = os.stat(source["path"])
            except OSError:
                return False
            if (found.st_size, found.st_mtime_ns) == (source["bytes"], source["modified"]):
                continue
            if xxhash.xxh3_128(read_bytes(source["path"])).digest() != self.keys[number]:
                return False
        return True

    def load(self, number: int) -> Opened:
        """Read a picture again. Raises DataError if its content has changed."""
        source = self.sources[number]
        if "path" in source:
            picture = Picture(source["path"])
        else:
            with open_file(self._folder / _EMBEDDED) as file:
                file.seek(source["offset"])
                picture = Picture(None, file.read(source["bytes"]))
        opened = open_picture(picture, f"picture {number + 1}")
        if opened.key != self.keys[number]:
            raise DataError(
                f"the picture {picture.name} has changed since it was tokenised", hint="start the run again"
            )
        return opened

    def inputs(self, ids: np.ndarray, numbers: Sequence[int]) -> dict[str, Any]:
        """Return the inputs of a micro-batch that carry its pictures.

        ids: [rows, tokens]. numbers: of its pictures, in order. image_features is a list with an entry for
        each; the others are tensors.
        """
        import torch

        assert self.features is not None, "features are computed before the first step"
        found: dict[str, Any] = {}
        if self._types is not None:
            name, tokens = self._types
            found[name] = torch.from_numpy(np.isin(ids, tokens).astype(np.int64))
        if len(numbers):
            for name in self.features.per_image:
                if name in self.sources[numbers[0]]["sizes"]:
                    found[name] = torch.tensor([self.sources[k]["sizes"][name] for k in numbers])
            found["image_features"] = [self.features.of(k) for k in numbers]
        return found
