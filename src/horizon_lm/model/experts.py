"""Mixtures of experts: the parameters of their experts, and the implementation that computes them.

transformers chooses an implementation for classes that use its experts interface, and falls back to another
one without a word; `experts_in_use` says which one runs.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import nn

from horizon_lm.config import ModelSettings
from horizon_lm.errors import UnsupportedModelError

WORD = "experts"  # stands for all experts in `freeze` and `train`
_SHARED = frozenset({"shared_expert", "shared_experts", "shared_mlp"})
# Experts by their class where the name does not tell (jetmoe), and experts that are rows of tables (doge).
_CLASS, _OF_TABLES = re.compile(r"Experts$"), re.compile(r"MoE$")
_ROUTER = re.compile(r"(^|[._])router([._]|$)")  # within experts (jetmoe)
_EACH = "one product per expert"


class InUse(NamedTuple):
    """implementation: grouped_mm, eager, batched_mm, or another one of transformers. remark: how or why."""

    implementation: str
    remark: str

    def __str__(self) -> str:
        return f"{self.implementation} ({self.remark})"


def experts_of(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters of all experts, routed and shared, under each of their names, without routers.

    Empty for a model without routed experts.
    """
    routed, shared = set[str](), set[str]()
    for path, module in model.named_modules(remove_duplicate=False):
        if path.rpartition(".")[2] in _SHARED:
            shared.add(path)
        elif _holds_experts(path, module):
            routed.add(path)
        elif _OF_TABLES.search(type(module).__name__):
            children = module.named_children()
            routed |= {f"{path}.{name}" for name, child in children if isinstance(child, nn.Embedding)}
    found = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        parts = name.split(".")
        above = next((n for n in range(1, len(parts)) if ".".join(parts[:n]) in routed | shared), None)
        if routed and above is not None and not _ROUTER.search(".".join(parts[above:])):
            found[name] = parameter
    return found


def _holds_experts(path: str, module: nn.Module) -> bool:
    last = path.rpartition(".")[2]
    return last == WORD or _has_interface(module) or bool(_CLASS.search(type(module).__name__))


def _has_interface(module: nn.Module) -> bool:
    """Whether the module's class is decorated with transformers' `use_experts_implementation`."""
    return hasattr(module, "is_transposed") and hasattr(module, "has_bias") and hasattr(module, "config")


def _interfaces(model: nn.Module) -> Iterator[Any]:
    return (module for module in model.modules() if _has_interface(module))


def choose_experts(model: nn.Module, settings: ModelSettings) -> None:
    """Set the experts' implementation that the settings name; auto leaves transformers' choice.

    Raises UnsupportedModelError if the model has no experts, or none that can be computed in this way.
    """
    name = settings.experts_implementation
    found = list(_interfaces(model))
    if name == "auto" or (name == "eager" and not found and experts_of(model)):
        return
    if not found:
        kind = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
        only = "its experts run only as eager" if experts_of(model) else "it has no experts"
        raise UnsupportedModelError(
            f"experts_implementation={name} is not supported for {kind}: {only}",
            hint="set experts_implementation=auto",
        )
    for module in found:
        module.config._experts_implementation_internal = name


def implementation_of(model: nn.Module) -> str | None:
    """Return the name of the implementation that computes the model's experts; None without experts."""
    module = next(_interfaces(model), None)
    if module is None:
        return "eager" if experts_of(model) else None
    return str(module.config._experts_implementation or "eager")


def experts_in_use(model: nn.Module, settings: ModelSettings, device: torch.device) -> InUse | None:
    """Return the implementation by which the model's experts run here; None without experts."""
    name = implementation_of(model)
    if name is None:
        return None
    if next(_interfaces(model), None) is None:
        paths = (type(m).__name__ for path, m in model.named_modules() if path and _holds_experts(path, m))
        return InUse(name, f"transformers computes {next(paths, type(model).__name__)} in no other way")
    if name == "grouped_mm":
        dtype = torch.bfloat16 if settings.dtype == "bfloat16" else torch.float32
        return InUse(name, grouped_kernel(device, dtype, compiled=bool(settings.compile)))
    if name == "batched_mm":
        return InUse(name, "copies the weights of each token's experts")
    if name == "eager" and settings.experts_implementation == "auto" and not _can_choose(model):
        return InUse(name, f"transformers offers {type(model).__name__} nothing else")
    return InUse(name, "a loop over experts" if name == "eager" else "by the model object")


def _can_choose(model: Any) -> bool:
    """Whether transformers lets the model's class choose, which it decides by the text of its source file."""
    can = getattr(model, "_can_set_experts_implementation", None)
    return can is None or bool(can())


def grouped_kernel(device: torch.device, dtype: torch.dtype, *, compiled: bool = False) -> str:
    """Say how grouped_mm multiplies on a device of this machine: by one kernel, or expert by expert."""
    name = str(dtype).removeprefix("torch.")
    if compiled and dtype != torch.bfloat16:
        return f"{_EACH}: compiled layers have one for all only in bfloat16"
    if not _has_grouped_product(device, dtype):
        return f"{_EACH}: torch {torch.__version__} has no grouped product of {name} on this {device.type}"
    if device.type == "cuda" and dtype == torch.bfloat16 and _major(device) in (9, 10):
        return "one kernel for all experts"
    return f"{_EACH}: torch has one kernel for all only for bfloat16 on Hopper and Blackwell"


def _major(device: torch.device) -> int:
    return torch.cuda.get_device_capability(device)[0]


def _has_grouped_product(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether transformers calls torch's grouped product, rather than its own loop."""
    from transformers.integrations import moe

    if not hasattr(moe, "_can_use_grouped_mm"):
        return hasattr(torch.nn.functional, "grouped_mm")
    rows = torch.empty(16, 16, dtype=dtype, device=device)
    weights = torch.empty(1, 16, 16, dtype=dtype, device=device)
    return bool(moe._can_use_grouped_mm(rows, weights, torch.ones(1, dtype=torch.int32, device=device)))
