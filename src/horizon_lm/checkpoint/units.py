"""Units of the store as safetensors files, written without a copy in memory; those of resident units pass
through a small one in host memory.

    weights.NAME  residual.NAME  exp_avg.NAME  exp_avg_sq.NAME      for each parameter NAME of the unit

`StoreSpec.saved` names those parameters if they are not all; a unit with none of them has no file.

One rank writes whole tensors in their shapes; of many, each writes the elements that it holds, as flat
tensors. Padding between parameters, and at the end of a rank's share, is zero and not in the file.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from math import prod
from typing import Any, NamedTuple

import torch
from torch import nn

from horizon_lm.checkpoint.disk import PIECE_BYTES, HashedFile
from horizon_lm.memory.layout import Parameter, UnitLayout
from horizon_lm.memory.shards import Piece, Shard, UnitShard
from horizon_lm.memory.store import HostStore, StoreSpec, regions, saved_in

DTYPE_NAMES = {
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

BUFFERS = "buffers.safetensors"

Entry = tuple[str, torch.Tensor]


class Part(NamedTuple):
    """Elements [start, stop) of a flattened tensor. shape: that of the whole tensor."""

    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def num_bytes(self) -> int:
        return (self.stop - self.start) * self.dtype.itemsize

    @property
    def is_whole(self) -> bool:
        return (self.start, self.stop) == (0, prod(self.shape))

    def hollow(self, *, flat: bool) -> torch.Tensor:
        """Return the tensor of the file on `meta`: flat, or a whole one in its shape."""
        shape = (self.stop - self.start,) if flat else self.shape
        return torch.empty(shape, dtype=self.dtype, device="meta")


def file_name(unit: int) -> str:
    return f"unit-{unit:05}.safetensors"


def unit_number(name: str) -> int:
    """Return the number in a name that matches `manifest.UNIT_FILE`."""
    return int(name.removeprefix("unit-").removesuffix(".safetensors"))


def parts(layout: UnitLayout, spec: StoreSpec, shard: Shard) -> list[tuple[Part, int]]:
    """Return the parts of a unit's saved tensors that a rank holds, in the order of its file, each with its
    first element in the rank's buffer of the region.

    Larger elements come first, so that each tensor starts at a multiple of its element size, which readers
    that map the file need.
    """
    return sorted(_parts(layout, spec, shard), key=lambda row: -row[0].dtype.itemsize)


def _parts(layout: UnitLayout, spec: StoreSpec, shard: Shard) -> Iterator[tuple[Part, int]]:
    cut = UnitShard(layout, shard)
    piece_of: dict[str, Callable[[Parameter], Piece | None]] = {
        "weights": cut.weights_piece,
        "residual": cut.residual_piece,
        "exp_avg": cut.trainable_piece,
        "exp_avg_sq": cut.trainable_piece,
    }
    for region in regions(spec):
        if not region.is_state:
            continue
        for parameter in saved_in(region.name, layout, spec):
            # A parameter without elements is named by every rank.
            piece = piece_of[region.name](parameter) if parameter.numel else Piece(0, 0, 0)
            if piece is not None:
                key = f"{region.name}.{parameter.name}"
                yield Part(key, region.dtype, parameter.shape, piece.start, piece.stop), piece.offset


def entries(store: HostStore, unit: int) -> list[Entry]:
    """Return (key, view into the store, wherever it lies) of the saved tensors of a unit in the order of the
    file: whole ones in their shapes, or the elements that this rank holds."""
    found = []
    shard = store.spec.shard
    for part, offset in parts(store.units[unit], store.spec, shard):
        view = store.run(part.key.partition(".")[0], unit).narrow(0, offset, part.stop - part.start)
        found.append((part.key, view if shard.world > 1 else view.view(part.shape)))
    return found


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
        entry = {"dtype": DTYPE_NAMES[tensor.dtype], "shape": list(tensor.shape)}
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
    for piece in pieces_of(tensor):
        if not is_wanted():
            return
        file.write(as_bytes(piece.cpu()))


def pieces_of(tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Views of a contiguous tensor's bytes, `PIECE_BYTES` at most: host memory has room for one of them."""
    return tensor.reshape(-1).view(torch.uint8).split(PIECE_BYTES)
