"""Write a model in Hugging Face format one unit at a time.

It takes the memory of one layer. Names and shapes are those of transformers' own `save_pretrained`: its
rules for tied weights and its renames (fused experts are split again) are applied first to `meta` tensors, to
learn which file each tensor goes into, then to the weights of one unit after the other.
"""

from __future__ import annotations

import glob
import json
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from horizon_lm.checkpoint import units
from horizon_lm.checkpoint.disk import Disk, HashedFile
from horizon_lm.checkpoint.model import Group, Tensors
from horizon_lm.engine.policies import DTYPES
from horizon_lm.errors import ConfigError, DoesNotFitError
from horizon_lm.io import files
from horizon_lm.io.leftovers import OwnedFolder
from horizon_lm.model.pretrained import quiet_transformers

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_STAGED = re.compile(r"\..+\.horizon-[a-z0-9_]{8}")  # next to a folder that is being written
_SIZE = re.compile(r"[0-9]*[1-9][0-9]*(\.[0-9]+)?(KB|MB|GB|TB)", re.IGNORECASE)


def choose_dtype(dtype: str | torch.dtype | None, max_shard_size: int | str) -> str | None:
    """Return the name of the dtype to save in, or None. Raises ConfigError for a dtype or size that is not
    supported."""
    name = str(dtype).removeprefix("torch.")
    if dtype is not None and name not in DTYPES:
        raise ConfigError(f"dtype={name} cannot be saved", hint=f"dtype={' or dtype='.join(DTYPES)}")
    if isinstance(max_shard_size, str):
        is_size = _SIZE.fullmatch(max_shard_size.strip()) is not None
    else:
        is_size = type(max_shard_size) is int and max_shard_size > 0
    if not is_size:
        raise ConfigError(
            f"max_shard_size={max_shard_size!r} is not a size", hint='max_shard_size="5GB", or bytes'
        )
    return None if dtype is None else name


def tokenizer_saver(tokenizer: Any, trust_remote_code: bool) -> Callable[[Path], object]:
    """Return a function that writes a tokenizer or processor, or that of a folder or name, into a folder.

    Raises ConfigError if `tokenizer` is neither.
    """
    if tokenizer is None:
        return lambda target: None
    if isinstance(tokenizer, (str, os.PathLike)):
        from horizon_lm.data.processor import load_processor  # with all of `data`
        from horizon_lm.data.tokenizer import load_tokenizer

        name = os.fspath(tokenizer)
        tokenizer = load_tokenizer(name, trust_remote_code=trust_remote_code)
        processor = load_processor(name, tokenizer, trust_remote_code=trust_remote_code)
        tokenizer = tokenizer if processor is None else processor.own
    if not callable(getattr(tokenizer, "save_pretrained", None)):
        raise ConfigError(
            f"tokenizer is a {type(tokenizer).__name__}, which cannot be saved",
            hint="pass a transformers tokenizer or processor, or the folder of one",
        )
    save: Callable[[Path], object] = tokenizer.save_pretrained
    return save


def aliases_of(model: nn.Module) -> dict[str, list[str]]:
    """Map the first name of each parameter to its other names."""
    first: dict[int, str] = {}
    found: dict[str, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        known = first.setdefault(id(parameter), name)
        if known != name:
            found.setdefault(known, []).append(name)
    return found


def write_model(
    model: PreTrainedModel,
    aliases: Mapping[str, Sequence[str]],
    groups: Iterable[Group],
    target: Path,
    dtype: torch.dtype,
    max_shard_size: int | str,
) -> None:
    """Fill the folder `target`.

    model: a transformers model, possibly on `meta`. aliases: name in the groups -> other names of the same
    tensor. Leaves `dtype` in the model's configuration.
    """
    from huggingface_hub import split_state_dict_into_shards_factory
    from transformers.core_model_loading import revert_weight_conversion

    # Without weights it writes the configurations, and the code of a model with remote code.
    with quiet_transformers():  # its progress bar would count no weights
        model.save_pretrained(target, state_dict={})
    for rest in target.glob("*.safetensors*"):
        rest.unlink()
    model.config.dtype = dtype  # it has written the dtype of the model, not of the export
    model.config.save_pretrained(target)

    groups = list(groups)
    kept = _kept_names(model, {n: t for g in groups for n, t in g.hollow.items()}, aliases)
    plans = [revert_weight_conversion(model, _renamed(g.hollow, kept)) for g in groups]
    hollow = {name: tensor for plan in plans for name, tensor in plan.items()}
    split = split_state_dict_into_shards_factory(
        hollow,
        get_storage_size=lambda tensor: tensor.nbytes,
        get_storage_id=lambda tensor: None,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_shard_size,
    )
    shards = _Shards(target, split.filename_to_tensors, hollow)
    for group, plan in zip(groups, plans, strict=True):
        content = revert_weight_conversion(model, _renamed(group.load(), kept))
        for name in plan:
            shards.write(name, content.pop(name))
    shards.close()
    if split.is_sharded:
        total = sum(tensor.numel() for tensor in hollow.values())
        index = {
            "metadata": {"total_parameters": total, **split.metadata},
            "weight_map": split.tensor_to_filename,
        }
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        files.write_file(target / "model.safetensors.index.json", text)


class _Shards:
    """Weight files that are filled concurrently, each in the order of its header."""

    def __init__(self, folder: Path, contents: Mapping[str, Sequence[str]], hollow: Tensors) -> None:
        self._folder, self._hollow = folder, hollow
        self._file_of = {name: file for file, names in contents.items() for name in names}
        # In the order of the groups, which is that of the headers.
        self._left = {file: [n for n in hollow if self._file_of[n] == file] for file in contents}
        self._open: dict[str, HashedFile] = {}

    def write(self, name: str, tensor: torch.Tensor) -> None:
        file = self._file_of[name]
        if file not in self._open:
            self._open[file] = HashedFile(Disk(), self._folder / file)
            rows = [(n, self._hollow[n]) for n in self._left[file]]
            self._open[file].write(memoryview(units.header(rows, {"format": "pt"})))
        planned = self._hollow[name]
        assert self._left[file].pop(0) == name
        assert tensor.shape == planned.shape and tensor.dtype == planned.dtype, name
        self._open[file].write(units.as_bytes(tensor.detach().cpu().contiguous()))
        if not self._left[file]:
            self._open.pop(file).close()

    def close(self) -> None:
        assert not self._open, "a file is not complete"


def _kept_names(
    model: PreTrainedModel, hollow: Tensors, aliases: Mapping[str, Sequence[str]]
) -> dict[str, str]:
    """Map names in the groups to names in the files; of tied names transformers keeps one."""
    from transformers.modeling_utils import remove_tied_weights_from_state_dict

    # Buffers are never tied, though equal ones share memory in a skeleton.
    buffers = {name for name, _ in model.named_buffers(remove_duplicate=False)}
    state = {name: tensor for name, tensor in hollow.items() if name not in buffers}
    for name, others in aliases.items():
        if name in hollow:
            state.update(dict.fromkeys(others, hollow[name]))
    ignored = set(model._keys_to_ignore_on_save or ())
    state = {name: tensor for name, tensor in state.items() if name not in ignored}
    left = buffers - ignored | remove_tied_weights_from_state_dict(state, model).keys()
    found = {}
    for name in hollow:
        names = [n for n in (name, *aliases.get(name, ())) if n in left]
        if names:
            found[name] = names[0]
    return found


def _renamed(tensors: Tensors, kept: Mapping[str, str]) -> Tensors:
    return {kept[name]: tensor for name, tensor in tensors.items() if name in kept}


def write_folder(folder: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a new folder next to `folder`, then rename it into place.

    An existing folder is replaced only once the new one is complete. Raises DoesNotFitError if the disk is
    full, ConfigError if the path cannot be written.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _put_back(folder)
        # Also sweeps those of killed processes, including other exports.
        owned = OwnedFolder(f".{folder.name}.horizon-", folder.parent, relatives=_STAGED)
        staging = owned.path
    except OSError as error:
        raise ConfigError(
            f"cannot write to {folder.parent}: {error.strerror}", hint="choose another folder"
        ) from error
    try:
        write(staging)
        owned.disown()
        _open_to_umask(staging)
        if folder.exists() and not folder.is_symlink():
            retired = Path(tempfile.mkdtemp(prefix=f".{folder.name}.horizon-old-", dir=folder.parent))
            files.put_folder(folder, retired / "old")
            files.put_folder(staging, folder)
            shutil.rmtree(retired)
        else:
            files.put_folder(staging, folder)
    except OSError as error:
        raise DoesNotFitError(
            f"writing {folder} failed: {error.strerror or error}",
            hint="free disk space or choose another folder",
        ) from error
    finally:
        owned.release()
        shutil.rmtree(staging, ignore_errors=True)


def _put_back(folder: Path) -> None:
    """Restore the old folder if a process was killed between the two renames. Never through a link, and never
    somebody else's."""
    for aside in sorted(folder.parent.glob(f".{glob.escape(folder.name)}.horizon-old-*")):
        found, retired = aside.lstat(), aside / "old"
        is_ours = stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid()
        if is_ours and retired.is_dir() and not retired.is_symlink() and not folder.exists():
            files.put_folder(retired, folder)
            aside.rmdir()


def _open_to_umask(folder: Path) -> None:
    """Give a private staging folder and its files the usual modes (safetensors writes 0600)."""
    umask = os.umask(0)
    os.umask(umask)
    for path in [folder, *(path for path in folder.rglob("*") if not path.is_symlink())]:
        os.chmod(path, (0o777 if path.is_dir() else 0o666) & ~umask)
