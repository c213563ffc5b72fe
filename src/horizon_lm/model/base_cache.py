"""Packed units on disk, so that the next run need not pack them again.

A file holds one unit as safetensors. Its name is made from the format and a hash of the values that were
packed, so that models share a folder, and a file never belongs to other weights. Files are checked when they
are read; one that is damaged, or whose content is not what its name says, is made again.
"""

from __future__ import annotations

import logging
from pathlib import Path

import torch
import xxhash

from horizon_lm.io import files

_log = logging.getLogger(__name__)
_FORMAT = "1"
_KEY = "packed"


class BaseCache:
    """The packed units of a folder, which is created if missing. kind: the format."""

    def __init__(self, folder: Path, kind: str) -> None:
        self._folder, self._kind = folder.expanduser().absolute(), kind

    def read(self, values: torch.Tensor, stored: torch.Tensor) -> bool:
        """Fill `stored` (uint8) with what these values [numel] become; return whether it was there."""
        from safetensors import SafetensorError, safe_open

        path, expected = self._place(values)
        try:
            files.check_is_file(path)
            with safe_open(str(path), framework="pt") as file:
                found, metadata = file.get_tensor(_KEY), dict(file.metadata() or {})
                metadata_digest = metadata.pop("xxh3_128", None)
                fits = metadata == expected and (found.dtype, found.shape) == (stored.dtype, stored.shape)
                if fits and _digest(found) == metadata_digest:
                    stored.copy_(found)
                    return True
        except FileNotFoundError:
            return False
        except (OSError, SafetensorError, ValueError) as error:
            _log.warning("%s cannot be read and will be replaced: %s", path, error)
            return False
        reason = "damaged (checksum mismatch)" if fits else "not the layer that its name says"
        _log.warning("%s is %s and will be replaced", path, reason)
        return False

    def write(self, values: torch.Tensor, stored: torch.Tensor) -> None:
        """Keep what these values became. A disk that refuses is only warned of."""
        from safetensors.torch import save

        path, metadata = self._place(values)
        content = save({_KEY: stored}, metadata | {"xxh3_128": _digest(stored)})
        try:
            existing = next(parent for parent in (self._folder, *self._folder.parents) if parent.is_dir())
            files.write_file(path, content, below=existing)
        except OSError as error:
            _log.warning("%s cannot be written, so the next run packs again: %s", path, error)

    def _place(self, values: torch.Tensor) -> tuple[Path, dict[str, str]]:
        """The file of these values, and what it must say of itself."""
        dtype, digest = str(values.dtype).removeprefix("torch."), _digest(values)
        metadata = {"format": self._kind, "version": _FORMAT, "dtype": dtype, "source": digest}
        return self._folder / f"{self._kind}-{dtype}-{digest}.safetensors", metadata


def _digest(values: torch.Tensor) -> str:
    return xxhash.xxh3_128_hexdigest(memoryview(values.view(torch.uint8).numpy()))  # type: ignore[arg-type]
