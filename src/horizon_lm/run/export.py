"""A Hugging Face folder straight from the store, through the skeleton's own `save_pretrained`."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from ..errors import ConfigError, DoesNotFitError
from ..memory.store import HostStore
from ..model.skeleton import Skeleton


def save_model(
    skeleton: Skeleton,
    store: HostStore,
    folder: Path,
    *,
    dtype: str | None,
    max_shard_size: str,
    extra: Callable[[Path], None] | None = None,
) -> None:
    """Write config, generation config and sharded safetensors to `folder`; whole or absent.

    dtype None: the store's compute dtype, from views of the store (no second copy). float32 from a
    bf16 store reconstructs the masters. extra: writes further files (the tokenizer) into the folder.
    """
    wanted = {None: store.dtype, "bfloat16": torch.bfloat16, "float32": torch.float32}[dtype]

    def write(target: Path) -> None:
        state = {name: _exported(skeleton, store, name, wanted) for name in store.names()}
        state.update((name, b) for name, b in skeleton.model.named_buffers() if _is_saved(skeleton, name))
        for name, alias in _tied_names(skeleton):
            state[alias] = state[name]
        skeleton.model.save_pretrained(target, state_dict=state, max_shard_size=max_shard_size)
        # It writes the skeleton's own dtype into the configuration, not that of the state it was given.
        skeleton.config.dtype = wanted
        try:
            skeleton.config.save_pretrained(target)
        finally:
            skeleton.config.dtype = store.dtype
        if extra is not None:
            extra(target)

    write_folder(folder, write)


def write_folder(folder: Path, write: Callable[[Path], None]) -> None:
    """Have `write` fill a new folder beside `folder`, then put it in place: whole or absent.

    An existing folder is replaced only once the new one is complete. Raises DoesNotFitError when
    the disk is full and ConfigError when the place cannot be written.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    except OSError as error:
        raise ConfigError(
            f"cannot write to {folder.parent}: {error.strerror}", hint="choose another folder"
        ) from error
    try:
        write(staging)
        _open_to_umask(staging)
        if folder.exists():
            retired = Path(tempfile.mkdtemp(prefix=f".{folder.name}.old.", dir=folder.parent))
            os.rename(folder, retired / "old")
            os.rename(staging, folder)
            shutil.rmtree(retired)
        else:
            os.rename(staging, folder)
    except OSError as error:
        raise DoesNotFitError(
            f"writing {folder} failed: {error.strerror or error}",
            hint="free disk space or choose another folder",
        ) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _open_to_umask(folder: Path) -> None:
    """Give a private staging folder and its files the modes that new ones have (safetensors writes 0600)."""
    umask = os.umask(0)
    os.umask(umask)
    for path in [folder, *folder.rglob("*")]:
        os.chmod(path, (0o777 if path.is_dir() else 0o666) & ~umask)


def _exported(skeleton: Skeleton, store: HostStore, name: str, dtype: torch.dtype) -> torch.Tensor:
    unit, parameter = store.locate(name)
    if parameter.compute_dtype != store.dtype and dtype != torch.float32:
        return store.master(name)  # one of the few that transformers keeps in fp32
    if dtype == store.dtype:
        return store.weight(name)
    return store.master(name).to(dtype)


def _is_saved(skeleton: Skeleton, name: str) -> bool:
    path, _, local = name.rpartition(".")
    return local not in skeleton.model.get_submodule(path)._non_persistent_buffers_set


def _tied_names(skeleton: Skeleton) -> list[tuple[str, str]]:
    """(stored name, other name) of each parameter that several modules share."""
    return [(name, alias) for name, aliases in skeleton.aliases.items() for alias in aliases]
