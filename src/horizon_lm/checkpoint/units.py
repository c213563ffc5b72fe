"""Units of the store as safetensors files, written and read without a copy in memory; parameters of resident
units pass through one in host memory, one at a time.

    weights.NAME  residual.NAME  exp_avg.NAME  exp_avg_sq.NAME      for each parameter NAME of the unit

The header of a file follows from the store's layout alone, so that reading needs no parser: a file with any
other header does not fit the model. Padding between parameters is always zero and not in the file.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import xxhash
from torch import nn

from horizon_lm.checkpoint.disk import PIECE_BYTES, HashedFile, damaged
from horizon_lm.memory.layout import Parameter
from horizon_lm.memory.store import HostStore, in_host_memory

_DTYPE_NAMES = {
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.int8: "I8",
    torch.int16: "I16",
    torch.int32: "I32",
    torch.int64: "I64",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_MAX_HEADER_BYTES = 100_000_000  # the limit of safetensors

BUFFERS = "buffers.safetensors"

Entry = tuple[str, torch.Tensor]


def file_name(unit: int) -> str:
    return f"unit-{unit:05}.safetensors"


def entries(store: HostStore, unit: int) -> list[Entry]:
    """Return (key, view into the store, wherever it lies) of all tensors of a unit in the order of the file.

    Larger elements come first, so that each tensor starts at a multiple of its element size, which readers
    that map the file need.
    """
    return sorted(_entries(store, unit), key=lambda row: -row[1].element_size())


def _entries(store: HostStore, unit: int) -> Iterator[Entry]:
    layout = store.units[unit]
    views: dict[str, Callable[[torch.Tensor, Parameter], torch.Tensor]] = {
        "weights": layout.view,
        "residual": layout.residual_view,
        "exp_avg": layout.trainable_view,
        "exp_avg_sq": layout.trainable_view,
    }
    for region, view in views.items():
        if not store.has(region):
            continue
        for parameter in layout.parameters:
            if region == "residual" and parameter.offset < layout.wide_offset:
                continue
            if region.startswith("exp_avg") and not parameter.trainable:
                continue
            yield f"{region}.{parameter.name}", view(store.run(region, unit), parameter)


def persistent_buffers(module: nn.Module) -> list[Entry]:
    """Return the buffers that belong to a saved model."""
    found = []
    for name, buffer in module.named_buffers(remove_duplicate=False):  # equal ones share memory in a skeleton
        path, _, local = name.rpartition(".")
        if local not in module.get_submodule(path)._non_persistent_buffers_set:
            found.append((name, buffer))
    return found


def copied_buffers(module: nn.Module) -> list[Entry]:
    """Copy the persistent buffers to host memory."""
    return [(name, b.detach().cpu().contiguous().clone()) for name, b in persistent_buffers(module)]


def header(rows: Sequence[Entry], metadata: dict[str, str] | None = None) -> bytes:
    """Return the header of a safetensors file that holds the rows in order."""
    table: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    end = 0
    for key, tensor in rows:
        start, end = end, end + tensor.nbytes
        entry = {"dtype": _DTYPE_NAMES[tensor.dtype], "shape": list(tensor.shape)}
        table[key] = {**entry, "data_offsets": [start, end]}
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def as_bytes(tensor: torch.Tensor) -> memoryview:
    """Return the memory of a contiguous tensor in host memory."""
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


def write(file: HashedFile, rows: list[Entry], is_wanted: Callable[[], bool]) -> None:
    """Write rows as a safetensors file; end early if it is no longer wanted."""
    file.write(memoryview(header(rows)))
    for _, tensor in rows:
        _write_tensor(file, tensor, is_wanted)


def _write_tensor(file: HashedFile, tensor: torch.Tensor, is_wanted: Callable[[], bool]) -> None:
    for piece in _pieces(tensor):
        if not is_wanted():
            return
        file.write(as_bytes(piece.cpu()))


def _pieces(tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Views of a contiguous tensor's bytes, `PIECE_BYTES` at most: host memory has room for one of them."""
    return tensor.reshape(-1).view(torch.uint8).split(PIECE_BYTES)


def read(file: int, rows: list[Entry], name: str) -> str:
    """Fill rows from an open file that `write` made; return the checksum of the bytes read.

    Raises CheckpointError if the file does not hold these rows.
    """
    expected = header(rows)
    digest = xxhash.xxh3_128()
    found = _read_exactly(file, bytearray(len(expected)))
    digest.update(found)
    if found != expected:
        raise damaged(name, _difference(file, bytes(found), rows))
    for key, tensor in rows:
        if not _read_tensor(file, tensor, digest):
            raise damaged(name, f"ends within {key}")
    if os.read(file, 1):
        raise damaged(name, "continues after its last tensor")
    return str(digest.hexdigest())


def _read_tensor(file: int, tensor: torch.Tensor, digest: xxhash.xxh3_128) -> bool:
    """Fill a tensor; return whether the file was long enough."""
    return all(_read_piece(file, piece, digest) for piece in _pieces(tensor))


def _read_piece(file: int, piece: torch.Tensor, digest: xxhash.xxh3_128) -> bool:
    with in_host_memory(piece) as target:
        data = as_bytes(target)
        if len(_read_exactly(file, data)) < len(data):
            return False
        digest.update(data)
    return True


def _read_exactly(file: int, target: bytearray | memoryview) -> memoryview:
    """Fill `target` as far as the file goes; return the filled part."""
    view, filled = memoryview(target), 0
    while filled < len(view):
        count = os.readv(file, [view[filled:]])
        if not count:
            break
        filled += count
    return view[:filled]


def _difference(file: int, start: bytes, rows: list[Entry]) -> str:
    """Describe how the header of a file differs from that of `rows`."""
    size = int.from_bytes(start[:8], "little")
    if len(start) < 8 or size > _MAX_HEADER_BYTES:
        return "is not a safetensors file"
    text = start[8 : 8 + size]
    text += bytes(_read_exactly(file, bytearray(max(0, size - len(text)))))
    try:
        table = json.loads(text)
        found = {key: (entry["dtype"], tuple(entry["shape"])) for key, entry in table.items()}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return "its header is damaged"
    for key, tensor in rows:
        wanted = _DTYPE_NAMES[tensor.dtype], tuple(tensor.shape)
        if key not in found:
            return f"has no tensor {key}"
        if found[key] != wanted:
            return f"{key} is {found[key][0]} {list(found[key][1])}, expected {wanted[0]} {list(wanted[1])}"
    strange = sorted(found.keys() - {key for key, _ in rows})
    return f"holds {strange[0]}, which the model does not have" if strange else "its header is damaged"
