"""Kernels from other packages: attention, liger's, and those of the Hub.

All are opt-in. Only kernels named in the settings are downloaded, and no kernel replaces a missing one.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import nn

from horizon_lm.config.model import HUB_ATTENTION, HUB_KERNEL, ModelSettings
from horizon_lm.errors import ConfigError, UnsupportedModelError
from horizon_lm.model.configuration import reason_of

_PACKAGES = {
    "flash_attention_2": ("flash_attn", "flash-attn"),
    "flash_attention_3": ("flash_attn_interface", "flash-attn-3"),
}
_SDPA = "set attn_implementation=sdpa"


class Patch(NamedTuple):
    """A global of a transformers module that has another value while layers run."""

    module: ModuleType
    name: str
    value: Any
    original: Any


@contextmanager
def patched(patches: Sequence[Patch]) -> Iterator[None]:
    """While open, apply the patches; other models in the process never see them."""
    try:
        for patch in patches:
            setattr(patch.module, patch.name, patch.value)
        yield
    finally:
        for patch in patches:
            setattr(patch.module, patch.name, patch.original)


def check_kernels(settings: ModelSettings, device: torch.device) -> None:
    """Raise ConfigError for kernels whose GPU or package is missing."""
    _check_attention(settings.attn_implementation, device)
    if settings.kernels == "none":
        return
    who = f"kernels={settings.kernels}"
    if device.type != "cuda":
        raise ConfigError(f"{who} needs a GPU, and device is {device.type}", hint="set kernels=none")
    package = {"liger": "liger-kernel", "hub": "kernels"}[settings.kernels]
    if find_spec(package.replace("-", "_")) is None:
        raise ConfigError(
            f"{who} needs the package {package}, which is not installed",
            hint=f"pip install {package}, or set kernels=none",
        )


def _check_attention(name: str, device: torch.device) -> None:
    """Raise ConfigError for a missing package, for which transformers would use an unpinned Hub kernel."""
    is_hub = HUB_ATTENTION.fullmatch(name) is not None
    if not is_hub and name not in _PACKAGES:
        return
    who = f"attn_implementation={name}"
    if device.type != "cuda":
        raise ConfigError(f"{who} needs a GPU, and device is {device.type}", hint=_SDPA)
    if not is_hub:
        module, package = _PACKAGES[name]
        if find_spec(module) is None:
            raise ConfigError(
                f"{who} needs the package {package}, which is not installed",
                hint=f"pip install {package}, or {_SDPA}",
            )
        return
    if find_spec("kernels") is None:
        raise ConfigError(
            f"{who} needs the package kernels, which is not installed",
            hint=f"pip install kernels, or {_SDPA}",
        )
    from transformers.integrations.hub_kernels import load_and_register_attn_kernel

    try:
        load_and_register_attn_kernel(name)
    except Exception as error:  # of the network, the Hub's client, the package, or the kernel's own code
        raise ConfigError(
            f"{who} could not be loaded: {reason_of(error)}", hint=f"connect to the Hub once, or {_SDPA}"
        ) from error


def apply_kernels(model: nn.Module, settings: ModelSettings) -> list[Patch]:
    """Replace parts of a model with the kernels that the settings name; return patches to apply while its
    layers run.

    Raises UnsupportedModelError if there are none for this model, ConfigError if they cannot be loaded.
    """
    if settings.kernels == "liger":
        return _apply_liger(model)
    if settings.kernels == "hub":
        _apply_hub(model, settings.hub_kernels, compiled=bool(settings.compile))
    return []


def _apply_liger(model: Any) -> list[Patch]:
    """Apply liger's norms, MLPs and rotary embeddings, with the function that transformers' Trainer calls.

    Its losses are not used: ours is computed in chunks. liger replaces functions and classes of the model's
    module for the whole process; this is undone.
    """
    liger: Any = import_module("liger_kernel.transformers.monkey_patch")
    kind = str(getattr(model.config, "model_type", None))
    if kind not in liger.MODEL_TYPE_TO_APPLY_LIGER_FN:
        known = ", ".join(sorted(liger.MODEL_TYPE_TO_APPLY_LIGER_FN))
        raise UnsupportedModelError(
            f"liger-kernel has no kernels for {kind}; it has some for {known}", hint="set kernels=none"
        )
    module = sys.modules[type(model).__module__]
    before = dict(vars(module))
    try:
        liger._apply_liger_kernel_to_instance(
            model=model, cross_entropy=False, fused_linear_cross_entropy=False
        )
    finally:
        now = {name: value for name, value in vars(module).items() if value is not before.get(name)}
        for name in now.keys() & before.keys():
            setattr(module, name, before[name])
    return [Patch(module, name, value, before[name]) for name, value in now.items() if name in before]


def _apply_hub(model: nn.Module, chosen: dict[str, str], *, compiled: bool) -> None:
    """Replace the layers in `chosen`; transformers must mark them as replaceable."""
    kernels: Any = import_module("kernels")
    marked = {str(getattr(type(module), "kernel_layer_name", "")) for module in model.modules()} - {""}
    strange = sorted(chosen.keys() - marked)
    if strange:
        raise UnsupportedModelError(
            f"hub_kernels names {', '.join(strange)}, and the replaceable layers of this model are "
            f"{', '.join(sorted(marked)) or 'none'}",
            hint="correct hub_kernels, or set kernels=none",
        )
    _check_layers(model, chosen)
    mapping = {}
    for layer, source in chosen.items():
        match = HUB_KERNEL.fullmatch(source)
        assert match is not None  # checked by ModelSettings
        repository = kernels.LayerRepository(
            match["repository"], layer_name=match["layer"], revision=match["commit"]
        )
        mapping[layer] = {"cuda": repository}
    mode = kernels.Mode.TRAINING | kernels.Mode.TORCH_COMPILE if compiled else kernels.Mode.TRAINING
    try:
        with kernels.use_kernel_mapping(mapping, inherit_mapping=False):
            kernels.kernelize(model, mode=mode, device="cuda")
    except Exception as error:  # of the network, the Hub's client, or the kernel's own code
        raise ConfigError(
            f"a kernel of hub_kernels could not be loaded: {reason_of(error)}",
            hint="connect to the Hub once, or set kernels=none",
        ) from error


def _check_layers(model: nn.Module, chosen: Collection[str]) -> None:
    """Raise ConfigError for a kernel in place of a layer within which an adapter lies: it reads the weights
    itself, and would leave the adapter out."""
    for module in model.modules():
        name = getattr(type(module), "kernel_layer_name", None)
        if name in chosen and any(hasattr(inner, "base_layer") for inner in module.modules()):
            raise ConfigError(
                f"hub_kernels: {name} computes a whole {type(module).__name__}, and leaves out the adapter "
                "within it",
                hint=f"leave {name} out of hub_kernels, or choose target_modules outside of it",
            )


def packs_one_row_only(config: Any) -> bool:
    """Whether the model's attention keeps packed documents apart only in micro-batches of one row:
    only then does transformers' flash attention derive documents from position_ids."""
    name = str(getattr(config, "_attn_implementation", ""))
    return name.startswith("flash_attention") or HUB_ATTENTION.fullmatch(name) is not None
