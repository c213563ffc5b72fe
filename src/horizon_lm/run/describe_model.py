"""A model in host memory in a few lines: what `repr` shows."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..words import count, parameters, size

if TYPE_CHECKING:
    from .host_model import HostModel

# Of `HostModel.memory_bytes`: what lies on the device.
_ON_DEVICE = ("weight_slots", "gradient_slots", "boundary_slots")


def describe_model(model: HostModel) -> str:
    """Model type, parameters, device, dtype, memory by place, and how and when updates run."""
    settings, skeleton = model.settings, model.skeleton
    trainable = sum(p.numel for unit in model.store.units for p in unit.trainable)
    numbers = parameters(model.num_parameters)
    if trainable != model.num_parameters:
        numbers += f" ({parameters(trainable).removesuffix(' parameters')} trainable)"
    kind = type(skeleton.model).__name__
    memory = model.memory_bytes()
    device = sum(memory[name] for name in _ON_DEVICE)
    parts = ", ".join(f"{n} {size(b)}" for n, b in memory.items() if b and n not in _ON_DEVICE)
    clipping = f"max_grad_norm {settings.max_grad_norm:g}" if settings.max_grad_norm else "no clipping"
    lines = [
        f"{kind} ({skeleton.model_type}), {count(skeleton.num_layers, 'layer')}, {numbers}",
        f"compute: {settings.dtype} on {model.device}",
        f"host memory: {size(sum(memory.values()) - device)} ({parts})",
        f"device memory: {size(device)} in slots" if device else "device memory: none, the host's is used",
        f"updates: {settings.optim}, {settings.update_mode}, {clipping}; "
        f"{count(model.steps_done, 'step')} done",
    ]
    return "HostModel(\n" + "".join(f"  {line}\n" for line in lines) + ")"
