"""Files of units as sources of elements: what each holds, and reading some of it, verified.

A file that one rank wrote has one checksum, so all of it is read. One of many ranks has one per block, and
only blocks with wanted elements are read. Bytes go from the file to their place without a copy; those that
are read only to be verified pass through a buffer.
"""

from __future__ import annotations

import json
import os
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
import xxhash

from horizon_lm.checkpoint.disk import PIECE_BYTES, damaged
from horizon_lm.checkpoint.units import DTYPE_NAMES, Part, as_bytes, header
from horizon_lm.errors import CheckpointError
from horizon_lm.memory.store import in_host_memory

_MAX_HEADER_BYTES = 100_000_000  # the limit of safetensors


class Check(NamedTuple):
    """Bytes [begin, end) of a file and their xxh3-128."""

    begin: int
    end: int
    digest: str


@dataclass(frozen=True)
class Source:
    """A safetensors file. parts: its tensors in order. is_flat: it has them flat, whatever their shape in the
    model. checks: of all bytes, in order."""

    path: Path
    parts: tuple[Part, ...]
    is_flat: bool
    checks: tuple[Check, ...]

    @cached_property
    def header(self) -> bytes:
        return header([(part.key, part.hollow(flat=self.is_flat)) for part in self.parts])

    @property
    def num_bytes(self) -> int:
        return len(self.header) + sum(part.num_bytes for part in self.parts)


class Wanted(NamedTuple):
    """The place, flat and contiguous, of a tensor's elements from `start` on."""

    start: int
    target: torch.Tensor


class _Segment(NamedTuple):
    """Bytes [begin, end) of a file and the bytes to fill with them, if any; the header if key is None."""

    begin: int
    end: int
    key: str | None
    target: torch.Tensor | None

    def cut(self, begin: int, end: int) -> _Segment:
        begin, end = max(begin, self.begin), min(end, self.end)
        target = self.target
        if target is not None:
            target = target[begin - self.begin : end - self.begin]
        return _Segment(begin, end, self.key, target)


def fill(
    source: Source,
    wanted: Mapping[str, Wanted],
    *,
    everything: bool = False,
    digest: xxhash.xxh3_128 | None = None,
) -> None:
    """Fill the elements of `wanted` that the file holds.

    everything: verify all of the file. digest: gets all bytes that are read. Raises CheckpointError if the
    file is damaged or has other tensors; targets are unusable then.
    """
    segments = list(_segments(source, wanted))
    everything |= not source.is_flat  # has one checksum
    if not everything and all(segment.target is None for segment in segments):
        return
    begins = [segment.begin for segment in segments]
    with opened(source.path) as file:
        for check in source.checks:
            found = []
            for number in range(max(0, bisect_right(begins, check.begin) - 1), len(segments)):
                if begins[number] >= check.end:
                    break
                found.append(segments[number].cut(check.begin, check.end))
            is_wanted = any(segment.target is not None for segment in found)
            if everything or is_wanted:
                _read_block(file, source, found, check, digest)
        if os.pread(file, 1, source.num_bytes):
            raise damaged(source.path, "continues after its last tensor")


def _segments(source: Source, wanted: Mapping[str, Wanted]) -> Iterator[_Segment]:
    """Cut a file into what goes to one place each."""
    at = len(source.header)
    yield _Segment(0, at, None, None)
    for part in source.parts:
        start, stop, size = part.start, part.stop, part.dtype.itemsize
        place = wanted.get(part.key)
        first = last = start
        if place is not None:
            first = min(max(start, place.start), stop)
            last = max(first, min(stop, place.start + place.target.numel()))
        for begin, end in ((start, first), (first, last), (last, stop)):
            if begin < end:
                target = None
                if place is not None and (begin, end) == (first, last):
                    target = place.target[begin - place.start : end - place.start].view(torch.uint8)
                yield _Segment(at + (begin - start) * size, at + (end - start) * size, part.key, target)
        at += part.num_bytes


def _read_block(
    file: int, source: Source, segments: Sequence[_Segment], check: Check, also: xxhash.xxh3_128 | None
) -> None:
    digests = [xxhash.xxh3_128(), *([also] if also is not None else [])]
    for segment in segments:
        if segment.key is None:
            expected = source.header[segment.begin : segment.end]
            if _read_exactly(file, bytearray(len(expected)), segment.begin) != expected:
                raise damaged(source.path, _difference(file, source))
            for digest in digests:
                digest.update(expected)
        elif not _read_segment(file, segment, digests):
            raise damaged(source.path, f"ends within {segment.key}")
    if digests[0].hexdigest() != check.digest:
        raise corrupt(source.path)


def _read_segment(file: int, segment: _Segment, digests: Sequence[xxhash.xxh3_128]) -> bool:
    """Fill a segment, a piece at a time; return whether the file was long enough."""
    size, target = segment.end - segment.begin, segment.target
    if target is None:  # every piece to one buffer
        buffer = torch.empty(min(PIECE_BYTES, size), dtype=torch.uint8)
    for start in range(0, size, PIECE_BYTES):
        count = min(PIECE_BYTES, size - start)
        piece = buffer[:count] if target is None else target[start : start + count]
        if not _read_piece(file, piece, segment.begin + start, digests):
            return False
    return True


def _read_piece(file: int, piece: torch.Tensor, begin: int, digests: Sequence[xxhash.xxh3_128]) -> bool:
    with in_host_memory(piece) as place:
        data = as_bytes(place)
        if len(_read_exactly(file, data, begin)) < len(data):
            return False
        for digest in digests:
            digest.update(data)
    return True


def _read_exactly(file: int, target: bytearray | memoryview, begin: int) -> memoryview:
    """Fill `target` with the bytes from `begin` on, as far as the file goes; return the filled part."""
    view, filled = memoryview(target), 0
    while filled < len(view):
        count = os.preadv(file, [view[filled:]], begin + filled)
        if not count:
            break
        filled += count
    return view[:filled]


def _difference(file: int, source: Source) -> str:
    """Describe how the header of a file differs from that of its parts."""
    size = int.from_bytes(_read_exactly(file, bytearray(8), 0), "little")
    if size > _MAX_HEADER_BYTES or os.fstat(file).st_size < 8:
        return "is not a safetensors file"
    text = bytes(_read_exactly(file, bytearray(size), 8))
    try:
        table = json.loads(text)
        found = {key: (entry["dtype"], tuple(entry["shape"])) for key, entry in table.items()}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return "its header is damaged"
    wanted = {}
    for part in source.parts:
        tensor = part.hollow(flat=source.is_flat)
        wanted[part.key] = DTYPE_NAMES[tensor.dtype], tuple(tensor.shape)
    return difference(found, wanted) or "its header is damaged"


def difference(
    found: Mapping[str, tuple[str, tuple[Any, ...]]], wanted: Mapping[str, tuple[str, tuple[int, ...]]]
) -> str | None:
    """Describe the first tensor (dtype, shape) that is not as wanted; None if all are."""
    for key, (dtype, shape) in wanted.items():
        if key not in found:
            return f"has no tensor {key}"
        if found[key] != (dtype, shape):
            return f"{key} is {found[key][0]} {list(found[key][1])}, expected {dtype} {list(shape)}"
    strange = sorted(found.keys() - wanted.keys())
    return f"holds {strange[0]}, which the model does not have" if strange else None


def whole_tensors(place: Path, sources: Iterable[Source]) -> dict[str, Part]:
    """Return the tensors of a unit that its files have between them, in order.

    Raises CheckpointError unless the files have each element once. place: the checkpoint, for errors.
    """
    found: dict[str, list[Part]] = defaultdict(list)
    for source in sources:
        for part in source.parts:
            found[part.key].append(part)
    for key, parts in found.items():
        first, end = parts[0], 0
        for part in sorted(parts, key=lambda part: (part.start, part.stop)):
            if (part.dtype, part.shape) != (first.dtype, first.shape):
                raise damaged(place, f"{key} has two dtypes or shapes")
            if part.start != end:
                what = "are in none of its files" if part.start > end else "are in two of its files"
                low, high = sorted((part.start, end))
                raise damaged(place, f"elements {low} to {high} of {key} {what}")
            end = part.stop
        if end != prod(first.shape):
            raise damaged(place, f"elements {end} to {prod(first.shape)} of {key} are in none of its files")
    return {key: parts[0]._replace(start=0, stop=prod(parts[0].shape)) for key, parts in found.items()}


@contextmanager
def opened(path: Path) -> Iterator[int]:
    """Open a file of a checkpoint; never through a link, never a device. OSErrors become CheckpointErrors."""
    try:
        file = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise damaged(path, f"cannot be opened: {error.strerror}") from None
    try:
        yield file
    except OSError as error:
        raise damaged(path, f"cannot be read: {error.strerror}") from None
    finally:
        os.close(file)


def corrupt(path: Path) -> CheckpointError:
    return damaged(path, "corrupt (checksum mismatch)")
