"""Which device a name stands for."""

from __future__ import annotations

import torch

from horizon_lm.errors import ConfigError


def resolve_device(name: str) -> torch.device:
    """`auto` is the first CUDA device, or the CPU. Raises ConfigError for a device that is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise ConfigError(
                f"device={name!r}, but torch sees no CUDA device", hint="device: cpu, or check the driver"
            )
        index = device.index if device.index is not None else torch.cuda.current_device()
        if index >= torch.cuda.device_count():
            raise ConfigError(
                f"device={name!r}, but there are {torch.cuda.device_count()}", hint="device: cuda:0"
            )
        device = torch.device("cuda", index)
    return device
