"""Features of pictures on disk, each computed once: shards of safetensors, memory-mapped when read.

    pictures/KEY/UNIQUE.safetensors   HASH.features, HASH.deepstack_0, ... of some hundred pictures

HASH is that of a picture's bytes; KEY of what computed its features (processor, tower, dtype). Shards are
written atomically, so an interrupted run goes on after its last one. Header and size of a shard are checked
when it is opened, and a hash of each picture's features when they are read.
"""

from __future__ import annotations

import json
import shutil
import uuid
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xxhash

from horizon_lm.errors import DataError, DoesNotFitError
from horizon_lm.io.files import check_is_file, write_file
from horizon_lm.io.leftovers import OwnedFolder
from horizon_lm.words import size

if TYPE_CHECKING:
    import torch

SHARD_BYTES = 1 << 28
_CHECKED_BYTES = 1 << 32  # shards are read whole when opened, up to this many bytes in all
_HASHES = "hashes"  # key of a shard's metadata
_MARGIN = 1.05

Features = dict[str, "torch.Tensor"]


class FeatureCache:
    """The features of pictures by the hash of their bytes, in a folder.

    damaged: shards that were unreadable, and removed.
    """

    def __init__(self, folder: Path | None, key: str) -> None:
        """folder: of the token cache; None: a temporary one. Raises DataError if it cannot be made."""
        self._owned = OwnedFolder("horizon-pictures-") if folder is None else None
        self.folder = self._owned.path if self._owned is not None else Path(folder or "") / "pictures" / key
        self.is_temporary = folder is None
        self.damaged: list[str] = []
        self._places: dict[bytes, tuple[Any, dict[str, str]]] = {}  # opened shard, hashes of its features
        self._new: dict[bytes, Features] = {}
        self._new_bytes = 0
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DataError(
                f"features of pictures cannot be written to {self.folder}: {error.strerror or error}",
                hint="set dataset_cache_dir to another folder, or to null",
            ) from error
        self._open_all()

    def _open_all(self) -> None:
        shards = sorted(self.folder.glob("*.safetensors"))
        is_small = sum(path.stat().st_size for path in shards) <= _CHECKED_BYTES
        for path in shards:
            try:
                self._open(path, check=is_small)
            except Exception as error:  # safetensors raises its own; a damaged shard is made again
                self.damaged.append(f"{path}: {error}")
                with suppress(OSError):
                    path.unlink()

    def _open(self, path: Path, *, check: bool = False) -> None:
        from safetensors import safe_open

        check_is_file(path)
        shard = safe_open(path, framework="pt")
        hashes = json.loads(shard.metadata()[_HASHES])
        names: dict[bytes, list[str]] = {}
        for name in shard.keys():  # noqa: SIM118  (a method of safetensors)
            names.setdefault(bytes.fromhex(name.partition(".")[0]), []).append(name)
        places = {key: (shard, {name: hashes[name] for name in own}) for key, own in names.items()}
        for place in places.values() if check else ():
            self._read(*place)
        self._places |= places

    def __contains__(self, picture: bytes) -> bool:
        return picture in self._places or picture in self._new

    def read(self, picture: bytes) -> Features:
        """Return the features of a picture. Raises DataError if they are damaged."""
        return self._read(*self._places[picture])

    def _read(self, shard: Any, hashes: Mapping[str, str]) -> Features:
        found = {}
        for name, expected in hashes.items():
            tensor = shard.get_tensor(name)
            if _hash(tensor) != expected:
                raise DataError(
                    f"features of a picture in {self.folder} are damaged (checksum mismatch)",
                    hint=f"remove {self.folder}; they will be computed again",
                )
            found[name.partition(".")[2]] = tensor
        return found

    def add(self, picture: bytes, features: Features) -> None:
        """Keep features, and write a shard once there are enough. Raises DoesNotFitError."""
        self._new[picture] = features
        self._new_bytes += sum(tensor.nbytes for tensor in features.values())
        if self._new_bytes >= SHARD_BYTES:
            self.flush()

    def flush(self) -> None:
        """Write what was added as a shard. Raises DoesNotFitError if the disk is full."""
        if not self._new:
            return
        from safetensors.torch import save

        tensors = {f"{key.hex()}.{n}": t for key, own in self._new.items() for n, t in own.items()}
        hashes = {name: _hash(tensor) for name, tensor in tensors.items()}
        path = self.folder / f"{uuid.uuid4().hex}.safetensors"
        try:
            write_file(path, save(tensors, {_HASHES: json.dumps(hashes)}))
        except OSError as error:
            raise DoesNotFitError(
                f"writing {path} failed: {error.strerror or error}",
                hint="free disk space, or set dataset_cache_dir to a folder on a larger disk",
            ) from error
        self._new, self._new_bytes = {}, 0
        self._open(path)

    def refresh(self) -> None:
        """Open the shards that another process has written since."""
        known = set(self._places)
        for path in sorted(self.folder.glob("*.safetensors")):
            with suppress(Exception):
                self._open(path)
        assert known <= self._places.keys()

    def check_room(self, num_bytes: int) -> None:
        """Raise DoesNotFitError unless the disk has room for features of `num_bytes` more."""
        free = shutil.disk_usage(self.folder).free
        if _MARGIN * num_bytes > free:
            raise DoesNotFitError(
                f"the features of the pictures need {size(num_bytes)} of disk space in {self.folder}, and "
                f"{size(free)} are free",
                hint="free disk space, set dataset_cache_dir to a folder on a larger disk, or max_samples",
            )

    def num_bytes(self, pictures: Iterable[bytes]) -> int:
        """Return the bytes of the features of some pictures."""
        return sum(tensor.nbytes for picture in pictures for tensor in self.read(picture).values())


class FeaturesOf:
    """The features of the pictures of one token store, by number. per_image: see `PictureInputs`."""

    def __init__(self, cache: FeatureCache, keys: list[bytes], per_image: tuple[str, ...]) -> None:
        self._cache, self._keys, self.per_image = cache, keys, per_image

    def of(self, number: int) -> Features:
        return self._cache.read(self._keys[number])


def _hash(tensor: torch.Tensor) -> str:
    import torch

    flat = tensor.contiguous().view(-1).view(torch.uint8)
    return xxhash.xxh3_64(flat.numpy().data).hexdigest()
