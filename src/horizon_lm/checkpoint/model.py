"""The transformers model of a checkpoint: built from its own configuration, without or with its weights."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from horizon_lm.checkpoint.disk import damaged
from horizon_lm.checkpoint.folder import Checkpoint
from horizon_lm.checkpoint.manifest import UNIT_FILE
from horizon_lm.checkpoint.reader import file_checksum, read_small, sources_of_ranks
from horizon_lm.checkpoint.sources import Source, Wanted, corrupt, fill, whole_tensors
from horizon_lm.checkpoint.units import BUFFERS, DTYPE_NAMES
from horizon_lm.engine.policies import DTYPES
from horizon_lm.errors import ConfigError, HorizonError
from horizon_lm.io import files
from horizon_lm.io.leftovers import temporary_folder
from horizon_lm.memory.master import join_master
from horizon_lm.model.configuration import read_configuration, reason_of
from horizon_lm.model.pretrained import model_class

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CONFIGURATIONS = ("config.json", "generation_config.json")
# What `trainers` adds to a checkpoint; no part of a model.
TRAINER_FILES = ("trainer_state.json", "trainer.json", "trainer.safetensors", "training_args.json")
_FLOATS = ("BF16", "F16", "F32")  # dtypes of weights, as safetensors names them

Tensors = dict[str, torch.Tensor]
Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Group:
    """Tensors that are in memory together: those of one unit.

    hollow: name -> tensor to write, on `meta`. load: returns the same with content.
    """

    hollow: Tensors
    load: Callable[[], Tensors]


def hollow_model(
    checkpoint: Checkpoint, *, trust_remote_code: bool, attn_implementation: str | None = None
) -> PreTrainedModel:
    """Build the transformers model of a checkpoint without its weights.

    Parameters are on `meta`, in the dtypes that the run computes with; buffers are those of a new model.
    Raises CheckpointError for a damaged configuration, ConfigError for one that transformers rejects and for
    untrusted remote code.
    """
    from accelerate import init_empty_weights
    from transformers import GenerationConfig

    with temporary_folder("horizon-files-") as folder:
        for file in CONFIGURATIONS:
            if file in checkpoint.manifest.files:
                files.write_file(folder / file, read_small(checkpoint, file))
        if not (folder / "config.json").exists():
            raise damaged(checkpoint.path / "config.json", "is not part of the checkpoint")
        if has_own_code(checkpoint) and not trust_remote_code:
            raise ConfigError(
                f"{checkpoint.path}: the model comes with code of its own, which is not run",
                hint="read the code, then pass --trust-remote-code",
            )
        try:
            config = read_configuration(
                str(folder),
                trust_remote_code=trust_remote_code,
                attn_implementation=attn_implementation,
                where=str(checkpoint.path / "config.json"),
                local_files_only=True,
            )
            dtype = DTYPES[str(checkpoint.manifest.config.get("dtype", "bfloat16"))]
            with torch.random.fork_rng(devices=[]), init_empty_weights(include_buffers=False):
                model: PreTrainedModel = model_class(config).from_config(
                    config, dtype=dtype, trust_remote_code=trust_remote_code
                )
            model.tie_weights()
            if (folder / CONFIGURATIONS[1]).exists():
                model.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
        except HorizonError:
            raise
        except Exception as error:  # an odd configuration may raise anything
            raise ConfigError(
                f"{checkpoint.path / 'config.json'} is refused by transformers: {reason_of(error)}",
                hint="install the versions that manifest.json lists",
            ) from error
    wide = frozenset(checkpoint.manifest.state.get("kept_in_fp32", ()))
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(torch.float32 if name in wide else dtype)
    return model


def has_own_code(checkpoint: Checkpoint) -> bool:
    """Tell whether the model comes with code of its own, which a checkpoint does not hold."""
    data = read_small(checkpoint, "config.json")
    try:
        values = json.loads(data)
    except (ValueError, RecursionError):
        values = None
    if not isinstance(values, dict):
        raise damaged(checkpoint.path / "config.json", "is not a JSON object")
    return bool(values.get("auto_map"))


def weights_of(checkpoint: Checkpoint, wanted: torch.dtype) -> list[Group]:
    """Return the weights of a checkpoint, one group per unit, and its buffers. wanted: their dtype."""
    return [*weights_of_units(checkpoint, wanted), _buffers(checkpoint)]


def weights_of_units(checkpoint: Checkpoint, wanted: torch.dtype) -> list[Group]:
    """Return the weights of a checkpoint, one group per unit. wanted: their dtype."""
    own = DTYPES[str(checkpoint.manifest.config.get("dtype", "bfloat16"))]
    wide = frozenset(checkpoint.manifest.state.get("kept_in_fp32", ()))
    if checkpoint.manifest.ranks > 1:
        by_unit = sources_of_ranks(checkpoint).values()
        return [_group_of_ranks(checkpoint.path, sources, wanted, own, wide) for sources in by_unit]
    names = [name for name in checkpoint.manifest.files if UNIT_FILE.fullmatch(name)]
    return [_group(checkpoint, name, wanted, own, wide) for name in names]


def buffers_of(checkpoint: Checkpoint) -> Tensors:
    """Return the persistent buffers of a checkpoint."""
    return _buffers(checkpoint).load()


def _buffers(checkpoint: Checkpoint) -> Group:
    if BUFFERS not in checkpoint.manifest.files:
        raise damaged(checkpoint.path / BUFFERS, "is not part of the checkpoint")
    return _group(checkpoint, BUFFERS, torch.float32, torch.float32, frozenset())


def model_of(checkpoint: Checkpoint, *, trust_remote_code: bool, attn_implementation: str) -> PreTrainedModel:
    """Build the transformers model of a checkpoint with the weights that the run computes with.

    Raises CheckpointError for damaged files, ConfigError.
    """
    model = hollow_model(
        checkpoint, trust_remote_code=trust_remote_code, attn_implementation=attn_implementation
    )
    groups = weights_of(checkpoint, DTYPES[str(checkpoint.manifest.config.get("dtype", "bfloat16"))])
    check_weights(checkpoint, groups, shapes_of(model), [name for name, _ in model.named_parameters()])
    for group in groups:
        model.load_state_dict(group.load(), strict=False, assign=True)
    model.tie_weights()
    return model


def _group(
    checkpoint: Checkpoint, name: str, wanted: torch.dtype, own: torch.dtype, wide: frozenset[str]
) -> Group:
    """Return the weights in the file of one unit, after a check of its checksum."""
    path = checkpoint.path / name
    if file_checksum(path) != checkpoint.manifest.files[name][1]:
        raise corrupt(path)
    prefix = "weights." if name != BUFFERS else ""

    def load() -> Tensors:
        with safe_open(path, framework="pt") as file:
            keys = frozenset(file.keys())
            found = {}
            for key in sorted(key for key in keys if key.startswith(prefix)):
                tensor, plain = file.get_tensor(key), key.removeprefix(prefix)
                dtype = torch.float32 if plain in wide else wanted
                if prefix and own == torch.bfloat16 and dtype == torch.float32:
                    rest = f"residual.{plain}"
                    tensor = _joined(tensor, file.get_tensor(rest), path) if rest in keys else tensor.float()
                found[plain] = tensor.to(dtype) if prefix else tensor
        return found

    return Group(dict(_shapes(path, prefix, wanted, wide)), load)


def _group_of_ranks(
    place: Path, sources: list[Source], wanted: torch.dtype, own: torch.dtype, wide: frozenset[str]
) -> Group:
    """Return the weights of a unit in the files of several ranks, which are verified when they are loaded."""
    parts = whole_tensors(place, sources)
    hollow = {}
    for key, part in parts.items():
        region, _, name = key.partition(".")
        if region != "weights":
            continue
        if not part.dtype.is_floating_point:
            raise damaged(place, f"{key} is {DTYPE_NAMES[part.dtype]}, not a dtype of weights")
        dtype = torch.float32 if name in wide else wanted
        hollow[name] = torch.empty(part.shape, dtype=dtype, device="meta")
    needed = [f"weights.{name}" for name in hollow]
    if own == torch.bfloat16:
        rests = (f"residual.{name}" for name, tensor in hollow.items() if tensor.dtype == torch.float32)
        needed += [rest for rest in rests if rest in parts]

    def load() -> Tensors:
        found = {key: torch.empty(parts[key].shape, dtype=parts[key].dtype) for key in needed}
        for source in sources:
            fill(source, {key: Wanted(0, tensor.view(-1)) for key, tensor in found.items()})
        loaded = {}
        for name, tensor in hollow.items():
            weight, rest = found.pop(f"weights.{name}"), found.pop(f"residual.{name}", None)
            loaded[name] = (weight if rest is None else _joined(weight, rest, place)).to(tensor.dtype)
        return loaded

    return Group(hollow, load)


def _joined(weight: torch.Tensor, rest: torch.Tensor, path: Path) -> torch.Tensor:
    kinds = (weight.dtype, rest.dtype) == (torch.bfloat16, torch.int16)
    if not kinds or weight.shape != rest.shape:
        raise damaged(path, f"residual ({rest.dtype} {list(rest.shape)}) and weight do not match")
    return join_master(weight, rest)


def _shapes(
    path: Path, prefix: str, wanted: torch.dtype, wide: frozenset[str]
) -> list[tuple[str, torch.Tensor]]:
    """Return (name, tensor on `meta`) of all tensors to export from a file, from its header alone."""
    found = []
    try:
        with safe_open(path, framework="pt") as file:
            for key in sorted(key for key in file.keys() if key.startswith(prefix)):  # noqa: SIM118
                plain, view = key.removeprefix(prefix), file.get_slice(key)
                dtype = torch.float32 if plain in wide else wanted
                if not prefix:
                    dtype = file.get_tensor(key).dtype
                elif view.get_dtype() not in _FLOATS:
                    raise damaged(path, f"{key} is {view.get_dtype()}, not a dtype of weights")
                found.append((plain, torch.empty(view.get_shape(), dtype=dtype, device="meta")))
    except SafetensorError as error:
        raise damaged(path, str(error)) from None
    return found


def shapes_of(model: nn.Module) -> Shapes:
    """Return the shape of each parameter and buffer of a model by name."""
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict(keep_vars=True).items()}


def check_weights(
    checkpoint: Checkpoint, groups: Sequence[Group], expected: Shapes, needed: Iterable[str]
) -> None:
    """Raise CheckpointError unless the groups hold each needed weight once, and no weight of another name or
    shape than expected."""
    found: set[str] = set()
    for group in groups:
        for name, tensor in group.hollow.items():
            if name in found or name not in expected:
                what = "is in two of its files" if name in found else "is of no part of the model"
                raise damaged(checkpoint.path, f"{name} {what}")
            found.add(name)
            shape = tuple(tensor.shape)
            if shape != expected[name]:
                raise damaged(checkpoint.path, f"{name} is {list(shape)}, expected {list(expected[name])}")
    missing = [name for name in needed if name not in found]
    if missing:
        raise damaged(checkpoint.path, f"has no weights of {missing[0]}")
