"""Values of samples kept in a folder piece by piece, so that a killed pass goes on where it stopped.

A piece is int64 [n] numbers of samples, then fp32 [n, 2] values; its name is the hash of its content. So a
cut or changed one is found, and pieces of two processes do not collide.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import xxhash

from horizon_lm.io import files

_SUFFIX = ".part"
_BYTES = 8 + 2 * 4  # of a sample
_SECONDS = 20.0  # of work that a kill may cost


class Kept:
    """The folder of one pass over data. folder: None keeps nothing."""

    def __init__(self, folder: Path | None, warn: Callable[[str], None]) -> None:
        self._folder, self._warn = folder, warn
        self._waiting: list[np.ndarray] = []
        self._since = time.monotonic()

    def load(self, values: np.ndarray) -> None:
        """Fill values [samples, 2] from sound pieces; remove damaged ones."""
        if self._folder is None or not self._folder.is_dir():
            return
        for path in sorted(self._folder.glob("*" + _SUFFIX)):
            with suppress(OSError):
                content = files.read_bytes(path)
                if path.name != _name(content) or not self._fill(values, content):
                    self._warn(f"{path} is damaged; its values are computed anew")
                    files.remove(path)

    def _fill(self, values: np.ndarray, content: bytes) -> bool:
        num, rest = divmod(len(content), _BYTES)
        numbers = np.frombuffer(content, np.int64, num)
        if rest or num and not (numbers.min() >= 0 and numbers.max() < len(values)):
            return False
        values[numbers] = np.frombuffer(content, np.float32, 2 * num, offset=8 * num).reshape(num, 2)
        return True

    def add(self, numbers: np.ndarray, values: np.ndarray) -> None:
        """Keep the values of these samples, with the next piece."""
        self._waiting.append(numbers)
        if time.monotonic() - self._since >= _SECONDS:
            self.write(values)

    def write(self, values: np.ndarray) -> None:
        """Write what waits. A disk that fails costs the cache, not the run."""
        waiting, self._waiting = self._waiting, []
        self._since = time.monotonic()
        if self._folder is None or not waiting:
            return
        numbers = np.concatenate(waiting)
        content = numbers.astype(np.int64).tobytes() + values[numbers].astype(np.float32).tobytes()
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            files.write_file(self._folder / _name(content), content)
        except OSError as error:
            self._warn(f"reference log-probabilities are not kept: {self._folder}: {error.strerror or error}")
            self._folder = None


def _name(content: bytes) -> str:
    return xxhash.xxh3_128_hexdigest(content) + _SUFFIX
