"""Device names and device memory."""

from __future__ import annotations

import torch

from horizon_lm.errors import ConfigError


def memory_bytes(device: torch.device) -> int | None:
    """Return the total memory of a CUDA device in bytes; None for the CPU."""
    return int(torch.cuda.mem_get_info(device)[1]) if device.type == "cuda" else None


def free_memory_bytes(device: torch.device) -> int:
    """Return the free memory of a CUDA device in bytes, with what torch has reserved and does not use."""
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(torch.cuda.mem_get_info(device)[0]) + unused


def resolve_device(name: str, local_rank: int | None = None) -> torch.device:
    """Resolve `auto` to the CPU or a CUDA device: the current one or, of several ranks on this machine, that
    of `local_rank` (the only one if each rank sees only its own). Raises ConfigError if it is missing."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise ConfigError(
                f"device={name!r}, but torch sees no CUDA device", hint="set device=cpu, or check the driver"
            )
        if local_rank is not None and device.index is not None:
            raise ConfigError(
                f"device={name!r} is one GPU for several ranks",
                hint="set device=cuda; each rank takes its own",
            )
        index = device.index if device.index is not None else torch.cuda.current_device()
        if local_rank is not None:
            index = local_rank if torch.cuda.device_count() > 1 else 0
            if index >= torch.cuda.device_count():
                raise ConfigError(
                    f"device={name!r}: ranks of this machine: at least {local_rank + 1}, CUDA devices: "
                    f"{torch.cuda.device_count()}",
                    hint="start one rank per GPU (--nproc-per-node), or set device=cpu",
                )
        if index >= torch.cuda.device_count():
            raise ConfigError(
                f"device={name!r}, but CUDA devices: {torch.cuda.device_count()}", hint="set device=cuda:0"
            )
        device = torch.device("cuda", index)
    return device
