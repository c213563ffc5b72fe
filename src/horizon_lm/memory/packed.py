"""Frozen weights in few bits: the blockwise formats of bitsandbytes, packed and unpacked by its functions.

The packed part of a unit is one flat tensor, cut into chunks. Each chunk is stored as these arrays, one after
the other, each at a multiple of `ALIGN_BYTES` bytes:

    int8    values (uint8) | absmax of each block of 64 (fp32)
    nf4     values (two in a uint8) | absmax of each block of 64 (uint8) | absmax of each 256 of those (fp32)
            | their mean (fp32)

bitsandbytes is imported when first used.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any, NamedTuple

import torch

from horizon_lm.errors import ConfigError
from horizon_lm.machine.libraries import load_bitsandbytes

FORMATS = ("int8", "nf4")
ALIGN_BYTES = 256
BLOCK = 64  # values with a common scale
CHUNK = 1 << 26  # values; kernels count in 32 bits
_NESTED = 256  # scales with a common scale
_PIECE = 1 << 18  # values that a CPU packs or unpacks at once: temporary tensors stay in caches
_DEVICE_PIECE = 1 << 24  # values that a GPU packs at once


class _Array(NamedTuple):
    """Where an array of a chunk lies in the unit's bytes."""

    begin: int
    numel: int
    dtype: torch.dtype

    def of(self, stored: torch.Tensor) -> torch.Tensor:
        return stored.narrow(0, self.begin, self.numel * self.dtype.itemsize).view(self.dtype)


class _Chunk(NamedTuple):
    """Values [start, stop) of a unit's packed part. arrays: in the order of the format."""

    start: int
    stop: int
    arrays: tuple[_Array, ...]
    end: int  # bytes of the unit up to the end of the chunk


def packed_bytes(numel: int, kind: str) -> int:
    """Bytes of `numel` packed values (a multiple of 64), scales included."""
    return max((chunk.end for chunk in _chunks(numel, kind)), default=0)


def unpacking_bytes(numel: int, kind: str, dtype: torch.dtype, is_cpu: bool) -> int:
    """Bytes that unpacking takes for a moment: scales of a chunk, and on a CPU a piece of its values."""
    count = min(numel, CHUNK)
    scales = -(-count // BLOCK) * 4 if kind == "nf4" else 0
    return scales + min(count, _PIECE) * dtype.itemsize * is_cpu


def _chunks(numel: int, kind: str) -> Iterator[_Chunk]:
    end = 0
    for start in range(0, numel, CHUNK):
        count = min(CHUNK, numel - start)
        blocks = -(-count // BLOCK)
        rows: list[tuple[int, torch.dtype]] = [(count, torch.uint8), (blocks, torch.float32)]
        if kind == "nf4":
            rows = [(count // 2, torch.uint8), (blocks, torch.uint8)]
            rows += [(-(-blocks // _NESTED), torch.float32), (1, torch.float32)]
        arrays = []
        for size, dtype in rows:
            arrays.append(_Array(end, size, dtype))
            end += -(-size * dtype.itemsize // ALIGN_BYTES) * ALIGN_BYTES
        yield _Chunk(start, start + count, tuple(arrays), end)


def check_installed(kind: str) -> None:
    """Raise ConfigError if bitsandbytes is missing."""
    _functions(kind)


@cache
def _functions(kind: str) -> Any:
    """bitsandbytes.functional. kind: what it is needed for."""
    try:
        return load_bitsandbytes().functional
    except ImportError as error:
        raise ConfigError(
            f"base_dtype={kind} needs the package bitsandbytes, which is not installed",
            hint="pip install bitsandbytes",
        ) from error


@cache
def _code(device: torch.device) -> torch.Tensor:
    """The 256 values of bitsandbytes' dynamic 8-bit type, fp32 on the device."""
    code: torch.Tensor = _functions("int8").create_dynamic_map()
    return code.to(device)


def prepare(device: torch.device) -> None:
    """Copy constants to the device now: in a step the host would wait for it."""
    _code(device)


def pack(values: torch.Tensor, stored: torch.Tensor, kind: str, device: torch.device) -> None:
    """Pack values [numel] (bf16 or fp32, in host memory) into `stored` [packed_bytes], on the device.

    What a chunk becomes is what bitsandbytes' quantize_4bit (nf4, compress_statistics) or quantize_blockwise
    make of it.
    """
    functions = _functions(kind)
    for chunk in _chunks(values.numel(), kind):
        absmax = torch.empty((chunk.stop - chunk.start) // BLOCK, dtype=torch.float32, device=device)
        target, *scales = (array.of(stored) for array in chunk.arrays)
        per_byte = 2 if kind == "nf4" else 1
        size = _PIECE if device.type == "cpu" else _DEVICE_PIECE
        for start in range(0, chunk.stop - chunk.start, size):
            piece = values[chunk.start + start : min(chunk.start + start + size, chunk.stop)].to(device)
            if kind == "nf4":
                found, state = functions.quantize_4bit(piece, blocksize=BLOCK, quant_type="nf4")
            else:
                found, state = functions.quantize_blockwise(piece, blocksize=BLOCK)
            target[start // per_byte : (start + piece.numel()) // per_byte].copy_(found.view(-1))
            absmax[start // BLOCK : (start + piece.numel()) // BLOCK].copy_(state.absmax)
        if kind == "nf4":
            mean = absmax.mean()
            found, state = functions.quantize_blockwise(absmax - mean, blocksize=_NESTED)
            for scale, value in zip(scales, (found, state.absmax, mean.view(1)), strict=True):
                scale.copy_(value)
        else:
            scales[0].copy_(absmax)


def unpack(stored: torch.Tensor, numel: int, kind: str, target: torch.Tensor, begin: int = 0) -> None:
    """Unpack values [begin, begin + n) of a unit's `numel` into target [n], on the device of both.

    begin: a multiple of 64. The same bits each time, and whatever part is unpacked.
    """
    for chunk in _chunks(numel, kind):
        start, stop = max(begin, chunk.start), min(begin + target.numel(), chunk.stop)
        if start < stop:
            absmax = _scales(stored, chunk, kind)
            part, first = target[start - begin : stop - begin], start - chunk.start
            size = _PIECE if target.device.type == "cpu" else CHUNK
            for place in part.split(size):
                _unpack_piece(chunk.arrays[0].of(stored), absmax, first, place, kind)
                first += place.numel()


def _scales(stored: torch.Tensor, chunk: _Chunk, kind: str) -> torch.Tensor:
    """The absmax of each block of a chunk, fp32."""
    _, scales, *nested = (array.of(stored) for array in chunk.arrays)
    if kind != "nf4":
        return scales
    functions = _functions(kind)
    state = functions.QuantState(
        absmax=nested[0], code=_code(stored.device), blocksize=_NESTED, dtype=torch.float32
    )
    found: torch.Tensor = functions.dequantize_blockwise(scales, state)
    return found.add_(nested[1])


def _unpack_piece(
    values: torch.Tensor, absmax: torch.Tensor, first: int, target: torch.Tensor, kind: str
) -> None:
    """Unpack values of a chunk from `first` on, a multiple of 64."""
    functions, count = _functions(kind), -(-target.numel() // BLOCK) * BLOCK
    whole, scales = count == target.numel(), absmax[first // BLOCK : (first + count) // BLOCK]
    # The CPU's kernels have no `out`; rows let threads share the work.
    out = {"out": target} if whole and target.device.type != "cpu" else {}
    if kind == "nf4":
        shape = torch.Size([count] if out else [count // BLOCK, BLOCK])
        state = functions.QuantState(
            absmax=scales, shape=shape, dtype=target.dtype, blocksize=BLOCK, quant_type="nf4"
        )
        given = values[first // 2 : (first + count) // 2].view(-1, 1)
        found = functions.dequantize_4bit(given, state, **out)
    else:
        state = functions.QuantState(
            absmax=scales, code=_code(target.device), dtype=target.dtype, blocksize=BLOCK
        )
        found = functions.dequantize_blockwise(values[first : first + count], state, **out)
    if not out:
        target.copy_(found.view(-1)[: target.numel()])
