"""manifest.json: content of a checkpoint. A folder without a valid one is not a checkpoint.

Every value is checked before use: the file may be damaged, or written by somebody else.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from horizon_lm.checkpoint.disk import checksum, damaged
from horizon_lm.errors import CheckpointError
from horizon_lm.io import files
from horizon_lm.words import size

NAME = "manifest.json"
FORMAT = "horizon-checkpoint"
# Written by one rank; by many. The same without the frozen base (`Manifest.base`).
VERSION, RANKS_VERSION, PART_VERSION, RANKS_PART_VERSION = VERSIONS = (1, 2, 3, 4)
INDEX = "index.json"  # in the folder of each rank: see `index`
UNIT_FILE = re.compile(r"unit-[0-9]{5,9}\.safetensors")
_MAX_BYTES = 64 << 20
_SEAL = "manifest_xxh3_128"
# At most one folder deep; no name can leave the folder, hide in it, or act as an option of a program.
_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}(/[A-Za-z0-9][A-Za-z0-9._-]{0,127})?")
_RANK_FOLDER = re.compile(r"rank-[0-9]{5,9}")
CHECKSUM = re.compile(r"[0-9a-f]{32}")


@dataclass(frozen=True)
class Manifest:
    """step: optimizer steps done, skipped ones included. serial: grows with every checkpoint of a run folder;
    the highest is the latest, whatever the folders are called. files: name -> (bytes, xxh3-128). config: the
    resolved settings. state: state of the run (JSON). created: UTC, for people. parent: the checkpoint that
    the run was resumed from, if any. ranks: how many wrote it; more than one have a folder each. base: of a
    checkpoint without all parameters, unit -> digest of what it lacks (`model.fingerprint`)."""

    step: int
    serial: int
    files: dict[str, tuple[int, str]]
    config: dict[str, Any]
    state: dict[str, Any]
    versions: dict[str, str] = field(default_factory=dict)
    created: str = ""
    parent: str | None = None
    ranks: int = 1
    base: dict[str, str] | None = None

    @property
    def num_bytes(self) -> int:
        return sum(num_bytes for num_bytes, _ in self.files.values())

    @property
    def small_files(self) -> list[str]:
        """Names of files that do not grow with the model: configuration, tokenizer, buffers and others."""
        return [name for name in self.files if not _is_of_units(name)]

    @property
    def holds(self) -> str:
        """What it holds of the run's parameters, in words."""
        if self.base is None:
            return "a whole model"
        return "an adapter" if "adapter" in self.state else "all but the packed weights of a model"

    def to_bytes(self) -> bytes:
        version = VERSIONS[(self.ranks > 1) + 2 * (self.base is not None)]
        values = {"format": FORMAT, "version": version, **asdict(self)}
        if self.ranks == 1:
            del values["ranks"]
        if self.base is None:
            del values["base"]
        values[_SEAL] = _seal(values)
        return (json.dumps(values, indent=1, allow_nan=False) + "\n").encode()


def _seal(values: dict[str, Any]) -> str:
    """Return the checksum of the manifest's values, independent of the text's layout."""
    plain = {key: value for key, value in values.items() if key != _SEAL}
    return checksum(json.dumps(plain, sort_keys=True, separators=(",", ":")).encode())


def parse(data: bytes, place: str) -> Manifest:
    """Return the manifest in `data`. Raises CheckpointError. place: its path, for errors."""
    try:
        values = json.loads(data)
    except (ValueError, RecursionError):  # ValueError also for numbers with too many digits
        raise damaged(place, "is not JSON") from None
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        raise damaged(place, "is not the manifest of a checkpoint")
    version = values.get("version")
    if type(version) is not int or version not in VERSIONS:
        raise CheckpointError(
            f"{place}: has format version {version!r:.60}, expected {VERSIONS[0]} to {VERSIONS[-1]}",
            hint="use the version of horizon-lm that wrote it",
        )
    if values.get(_SEAL) != _seal(values):
        raise damaged(place, "corrupt (checksum mismatch)")
    kinds: dict[str, type] = {"step": int, "serial": int, "files": dict, "config": dict, "state": dict}
    kinds |= {"versions": dict, "created": str}
    for key, kind in kinds.items():
        if not isinstance(values.get(key), kind) or isinstance(values[key], bool):
            raise damaged(place, f"{key} is {values.get(key)!r:.60}")
    if values["step"] < 0 or values["serial"] < 0 or not isinstance(values.get("parent"), str | None):
        raise damaged(place, "step, serial or parent is out of range")
    wrong = _unusable(values["config"], values["state"])
    if wrong is not None:
        raise damaged(place, wrong)
    files = {name: _file(name, entry, place) for name, entry in values["files"].items()}
    of_many = version in (RANKS_VERSION, RANKS_PART_VERSION)
    ranks = _ranks(values.get("ranks"), files, place) if of_many else 1
    is_part = version in (PART_VERSION, RANKS_PART_VERSION)
    base = _base(values.get("base"), place) if is_part else None
    known = {"parent": values.get("parent"), **{key: values[key] for key in kinds}}
    return Manifest(**{**known, "files": files, "ranks": ranks, "base": base})


def _base(values: Any, place: str) -> dict[str, str]:
    """Return the digests of a frozen base after a check."""
    if not isinstance(values, dict) or not values:
        raise damaged(place, f"base is {values!r:.60}")
    for name, digest in values.items():
        if not isinstance(digest, str) or not CHECKSUM.fullmatch(digest):
            raise damaged(place, f"base.{name:.60} is {digest!r:.60}")
    return values


def _is_of_units(name: str) -> bool:
    folder, _, file = name.rpartition("/")
    return UNIT_FILE.fullmatch(file) is not None or _RANK_FOLDER.fullmatch(folder) is not None


def rank_folder(rank: int) -> str:
    return f"rank-{rank:05}"


def _ranks(ranks: Any, names: Collection[str], place: str) -> int:
    """Return the number of ranks after a check that each has its folder, and nobody else a file of a unit."""
    if type(ranks) is not int or not 2 <= ranks <= len(names):
        raise damaged(place, f"ranks is {ranks!r:.60}")
    folders = {rank_folder(rank) for rank in range(ranks)}
    for name in names:
        folder, _, file = name.rpartition("/")
        is_unit = UNIT_FILE.fullmatch(file) is not None
        if _RANK_FOLDER.fullmatch(folder):
            fits = folder in folders and (is_unit or file == INDEX)
        else:
            fits = not is_unit
        if not fits:
            raise damaged(place, f"{name} is not a file of one of its {ranks} ranks")
    missing = folders - {name.rpartition("/")[0] for name in names if name.endswith(f"/{INDEX}")}
    if missing:
        raise damaged(place, f"has no {min(missing)}/{INDEX}")
    return ranks


def _file(name: str, entry: Any, place: str) -> tuple[int, str]:
    if not _FILE_NAME.fullmatch(name) or ".." in name or name == NAME:
        raise damaged(place, f"the file name {name!r:.80} is not allowed")
    try:
        num_bytes, digest = entry
    except (TypeError, ValueError):
        num_bytes = digest = None
    ok = type(num_bytes) is int and num_bytes >= 0 and isinstance(digest, str)
    if not ok or not CHECKSUM.fullmatch(digest):
        raise damaged(place, f"size or checksum of {name} is {entry!r:.80}")
    return num_bytes, digest


def read(folder: Path) -> Manifest:
    """Read the manifest of a folder. Raises CheckpointError."""
    path = folder / NAME
    try:
        if path.is_symlink():
            raise damaged(path, "is a link")
        if path.stat().st_size > _MAX_BYTES:
            raise damaged(path, f"is larger than {size(_MAX_BYTES)}")
        return parse(files.read_bytes(path), str(path))
    except FileNotFoundError:
        raise damaged(path, "is missing") from None
    except OSError as error:
        raise damaged(path, f"cannot be read: {error.strerror or error}") from None


# Schemas of state and settings. Unknown keys pass unchecked; all keys may be missing, since checkpoints of
# earlier versions lack some.

MOST = 1 << 53  # steps, rows, tokens: integers that floats hold exactly

Count = Annotated[int, Field(ge=0, le=MOST)]
Real = Annotated[float, Field(ge=-1e60, le=1e60)]
Number = Real | None  # null: not finite


class _Part(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)


class _Loop(_Part):
    step: Count
    skipped_in_a_row: Count
    rollbacks: Count


class _Loader(_Part):
    epoch: Count = 0
    position: Count = 0
    document: Count = 0
    seed: Annotated[int, Field(ge=0, le=1 << 64)] = 0
    rows: Annotated[int, Field(ge=1, le=MOST)] | None = None
    crosses_epochs: bool = True
    counted: list[Count] = Field(default=[0, 0], min_length=2, max_length=2)

    @model_validator(mode="after")
    def _is_in_the_data(self) -> Self:
        if self.rows is not None and self.position > self.rows:
            raise ValueError(f"position {self.position} is beyond its {self.rows} rows")
        return self


class _Meter(_Part):
    sums: Annotated[tuple[Count, Count, Count, Real], Field(strict=False)]
    window: list[Annotated[tuple[dict[str, Any], dict[str, Any]], Field(strict=False)]] = []


class _Last(_Part):
    step: Count
    learning_rate: Number = None
    loss: Number = None
    num_tokens: Count = 0
    seconds: Number = None


class _Mark(_Part):
    value: Real
    step: Count
    path: Annotated[str, Field(max_length=4096)] | None


class _Best(_Part):
    best: _Mark | None
    kept: _Mark | None
    asked: _Mark | None
    evaluations: Count
    waited: Count


class _State(_Part):
    steps_done: Count = 0
    loop: _Loop | None = None
    loader: _Loader | None = None
    meter: _Meter = _Meter(sums=(0, 0, 0, 0.0))
    losses: list[Real] = []
    kept_in_fp32: list[str] = []
    last: _Last | None = None
    best: _Best | None = None


class _Config(_Part):
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    max_length: Count = 0
    per_device_train_batch_size: Count = 0
    gradient_accumulation_steps: Count = 0


def _unusable(config: dict[str, Any], state: dict[str, Any]) -> str | None:
    """Describe the first invalid value; None if all are valid."""
    for name, kind, values in (("config", _Config, config), ("state", _State, state)):
        try:
            kind.model_validate(values)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            where = ".".join((name, *map(str, first["loc"])))
            return f"{where} is {first['input']!r:.60}: {first['msg'][:1].lower()}{first['msg'][1:]}"
    return None
