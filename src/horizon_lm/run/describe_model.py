"""A model in host memory in a few lines: what `repr` shows."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .host_model import HostModel

# Of `HostModel.memory_bytes`: what lies on the device.
_ON_DEVICE = ("weight_slots", "gradient_slots", "boundary_slots")


def describe_model(model: HostModel) -> str:
    """Model type, parameters, device, dtype, memory by place, and how and when updates run."""
    settings, skeleton = model.settings, model.skeleton
    trainable = sum(p.numel for unit in model.store.units for p in unit.trainable)
    parameters = f"{amount(model.num_parameters)} parameters"
    if trainable != model.num_parameters:
        parameters += f" ({amount(trainable)} trainable)"
    kind = type(skeleton.model).__name__
    memory = model.memory_bytes()
    device = sum(memory[name] for name in _ON_DEVICE)
    parts = ", ".join(f"{n} {size(b)}" for n, b in memory.items() if b and n not in _ON_DEVICE)
    clipping = f"max_grad_norm {settings.max_grad_norm:g}" if settings.max_grad_norm else "no clipping"
    lines = [
        f"{kind} ({skeleton.model_type}), {skeleton.num_layers} layers, {parameters}",
        f"compute: {settings.dtype} on {model.device}",
        f"host memory: {size(sum(memory.values()) - device)} ({parts})",
        f"device memory: {size(device)} in slots" if device else "device memory: none, the host's is used",
        f"updates: {settings.optim}, {settings.update_mode}, {clipping}; {model.steps_done} steps done",
    ]
    return "HostModel(\n" + "".join(f"  {line}\n" for line in lines) + ")"


def amount(count: int) -> str:
    """A number of parameters: 8.03 B, 110.2 M, 5,120."""
    if count >= 1_000_000_000:
        return f"{count / 1e9:.2f} B"
    return f"{count / 1e6:.1f} M" if count >= 1_000_000 else f"{count:,}"


def size(num_bytes: int) -> str:
    """Bytes with three digits: 14.2 GB, 608 KB."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("KB", 1e3)):
        if num_bytes >= factor:
            value = num_bytes / factor
            return f"{value:.{0 if value >= 100 else 1 if value >= 10 else 2}f} {unit}"
    return f"{num_bytes} bytes"
