"""rank-RANK/index.json: the parts of tensors in the files of a rank, and a checksum of each block of a file.

Readers that need other parts than a rank has written read and verify blocks instead of files. As in the
manifest, every value is checked before use.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from math import prod
from typing import Annotated, Literal, NamedTuple, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from horizon_lm.checkpoint.disk import damaged
from horizon_lm.checkpoint.manifest import CHECKSUM, MOST, UNIT_FILE
from horizon_lm.checkpoint.units import DTYPE_NAMES, Part, header
from horizon_lm.words import count

_DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}

Count = Annotated[int, Field(ge=0, le=MOST)]


class Listed(NamedTuple):
    """A file: its tensors in order, flat, and the xxh3-128 of each block."""

    parts: Sequence[Part]
    blocks: Sequence[str]

    @property
    def header(self) -> bytes:
        return header([(part.key, part.hollow(flat=True)) for part in self.parts])

    @property
    def num_bytes(self) -> int:
        return len(self.header) + sum(part.num_bytes for part in self.parts)


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class _Piece(_Strict):
    key: Annotated[str, Field(pattern=r"^(weights|residual|exp_avg|exp_avg_sq)\..", max_length=4096)]
    dtype: Literal["BF16", "F32", "I16"]
    shape: Annotated[list[Count], Field(max_length=64)]
    start: Count
    stop: Count

    @model_validator(mode="after")
    def _is_in_the_tensor(self) -> Self:
        if not self.start <= self.stop <= prod(self.shape) <= MOST:
            raise ValueError(f"elements {self.start} to {self.stop} are not within {self.shape}")
        return self


class _File(_Strict):
    pieces: list[_Piece]
    blocks: list[Annotated[str, Field(pattern=f"^{CHECKSUM.pattern}$")]]


class _Index(_Strict):
    block_bytes: Annotated[int, Field(ge=4096, le=1 << 28)]
    files: dict[Annotated[str, Field(pattern=f"^{UNIT_FILE.pattern}$")], _File]


def to_bytes(files: Mapping[str, Listed], block_bytes: int) -> bytes:
    """Return the text of an index of files by name."""
    values = {
        "block_bytes": block_bytes,
        "files": {
            name: {
                "pieces": [
                    {**part._asdict(), "dtype": DTYPE_NAMES[part.dtype], "shape": list(part.shape)}
                    for part in listed.parts
                ],
                "blocks": list(listed.blocks),
            }
            for name, listed in files.items()
        },
    }
    return json.dumps(values).encode() + b"\n"


def parse(data: bytes, place: str, sizes: Mapping[str, int]) -> tuple[int, dict[str, Listed]]:
    """Return the bytes of a block, and the files by name. Raises CheckpointError.

    place: the path of the index. sizes: bytes of each file that the rank has written, by the manifest.
    """
    try:
        found = _Index.model_validate_json(data)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise damaged(place, f"{where} is {first['input']!r:.60}: {first['msg']}") from None
    odd = sorted(found.files.keys() ^ sizes.keys())
    if odd:
        raise damaged(place, f"{odd[0]} is not in both the index and the manifest")
    files = {}
    for name, file in found.files.items():
        parts = [
            Part(piece.key, _DTYPES[piece.dtype], tuple(piece.shape), piece.start, piece.stop)
            for piece in file.pieces
        ]
        files[name] = Listed(parts, file.blocks)
        if len({part.key for part in parts}) < len(parts):
            raise damaged(place, f"{name} has a tensor twice")
        num_bytes = files[name].num_bytes
        if num_bytes != sizes[name] or len(file.blocks) != -(-num_bytes // found.block_bytes):
            raise damaged(place, f"pieces and blocks of {name} do not make its {count(sizes[name], 'byte')}")
    return found.block_bytes, files
